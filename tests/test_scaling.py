"""Units do not matter: badly scaled versions of well-behaved problems have the same points and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers import registry
from ddn_solvers.adapter import Adapter, Capabilities, Feature, Instance, Method, Point, ProblemClass, Status
from ddn_solvers.lowering.pattern import Matrices, Pattern
from ddn_solvers.units import units_of

D = torch.float64
N, P, Q = 10, 3, 6


class Data:
    """A strictly convex problem in v with equalities and inequalities, and the units of v and of the rows."""

    def __init__(self, seed, decades):
        g = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.randn(shape, generator=g, dtype=D)

        def units(size):
            return 10.0 ** torch.randint(-decades, decades + 1, (size,), generator=g).to(D)

        L, self.A, self.G, inside = rand(N, N), rand(P, N), rand(Q, N), rand(N)
        self.H = L @ L.T / N + torch.eye(N, dtype=D)
        self.b, self.h = self.A @ inside, self.G @ inside + 0.3 * torch.rand(Q, generator=g, dtype=D)
        self.low, self.c = inside - 0.2, 3 * rand(N)
        self.d, self.e, self.f = units(N), units(P), units(Q)

    def problem(self, quartic, scaled):
        """Of u with v = d u; rows times e and f."""
        d, e, f = (u if scaled else torch.ones_like(u) for u in (self.d, self.e, self.f))

        def objective(u, c):
            v = d * u
            return 0.5 * v @ self.H @ v + c @ v + (0.1 * (v**4).sum() if quartic else 0.0)

        return ddn.Problem(
            {"u": (N,)},
            {"c": (N,)},
            objective,
            {"equal": lambda u: e * (self.A @ (d * u) - self.b)},
            {"below": lambda u: f * (self.G @ (d * u) - self.h)},
            bounds={"u": (torch.where(torch.arange(N) < 3, self.low, -torch.inf) / d, None)},
        )


def solved(data, quartic, scaled, solver="auto"):
    c = data.c.clone().requires_grad_()
    solution = ddn.solve(data.problem(quartic, scaled), {"c": c}, solver=solver)
    v = solution["u"] * (data.d if scaled else 1)
    (gradient,) = torch.autograd.grad(v @ torch.arange(1, N + 1, dtype=D), c)
    return v.detach(), gradient, solution


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("decades", [2, 4, 6])
@pytest.mark.parametrize(
    ("quartic", "solver"),
    [
        *((False, s) for s in ("auto", "casadi:ipopt", "casadi:daqp", "scipy:SLSQP", "cvxpy:CLARABEL")),
        (True, "auto"),
        (True, "casadi:ipopt"),
    ],
)
def test_units_of_variables_and_rows_change_nothing(quartic, solver, decades, seed):
    """A slack was measured by the largest variable: with units 1e8 apart rows were active that were not."""
    data = Data(seed, decades)
    v, gradient, expected = solved(data, quartic, scaled=False)
    assert expected.certificate.ok
    found, mine, solution = solved(data, quartic, scaled=True, solver=solver)
    torch.testing.assert_close(found, v, rtol=0, atol=1e-11)
    torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()))
    certificate = solution.certificate
    assert certificate.ok
    assert certificate.licq
    assert certificate.sosc
    for name, active in expected.certificate.active.items():
        assert torch.equal(certificate.active[name], active), name


@pytest.mark.parametrize("sparse", [False, True])
def test_units_are_those_of_the_variables(sparse):
    g = np.random.default_rng(0)
    H, J = g.standard_normal((3, N, N)), g.standard_normal((3, P, N))
    H = H + H.transpose(0, 2, 1)
    if sparse:
        J[:, :, ::2] = 0
    d, e = (10.0 ** g.uniform(-5, 5, (3, size)) for size in (N, P))

    def matrices(dense):
        row, column = np.nonzero(dense[0].T)[::-1]
        pointers = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=N))])
        return Matrices(Pattern(dense.shape[1:], pointers, row), dense[:, row, column])

    assert units_of(matrices(H), matrices(J * e[:, :, None])) is None
    scaled = matrices(H * d[:, :, None] * d[:, None, :]), matrices(J * d[:, None, :] * e[:, :, None])
    found = units_of(*scaled) * d
    assert (found.max(axis=1) / found.min(axis=1) < 10).all()
    np.testing.assert_array_equal(units_of(*scaled).max(axis=1), 1)


def test_units_of_a_batch_mate_do_not_matter():
    """The other sample's units decide nothing here: same size, same active set, same margin."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"d": (2,), "x": (2,)},
        lambda u, d, x: 0.5 * (d * u - x).square().sum(),
        {"sum": lambda u, d: (d * u).sum() - 1},
        bounds={"u": (0.0, None)},
    )
    d = torch.tensor([[1.0, 3.0], [1e-6, 1e6]], dtype=D)
    x = torch.tensor([[2.0, 0.5], [0.3, 0.6]], dtype=D)
    both, alone = ddn.solve(problem, {"d": d, "x": x}), ddn.solve(problem, {"d": d[0], "x": x[0]})
    assert torch.equal(both["u"][0], alone["u"])
    assert torch.equal(both.certificate.margin[0], alone.certificate.margin)


def _sized(kind):
    """An LP or QP all of whose numbers are parameters, to be multiplied by a size."""
    g = torch.Generator().manual_seed(5)
    L, A, G = (torch.randn(k, 20, generator=g, dtype=D) for k in (20, 3, 10))
    H = L @ L.T / 20 + 0.1 * torch.eye(20, dtype=D)
    values = {k: torch.randn(s, generator=g, dtype=D) for k, s in {"q": 20, "b": 3, "h": 10}.items()}
    values = {**values, "h": values["h"].abs(), "r": torch.tensor(0.8, dtype=D)}
    objective = (lambda u, q: 0.5 * u @ H @ u + q @ u) if kind == "QP" else (lambda u, q: q @ u)
    problem = ddn.Problem(
        {"u": (20,)},
        {"q": (20,), "b": (3,), "h": (10,), "r": ()},
        objective,
        lambda u, b: A @ u - b,
        lambda u, h: G @ u - h,
        {"u": (lambda r: -r * torch.ones(20, dtype=D), lambda r: r * torch.ones(20, dtype=D))},
    )
    return problem, values


@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-8, 1e-7, 1e-6, 1e-3, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("QP", "auto"),
        ("QP", "casadi:ipopt"),
        ("QP", "scipy:SLSQP"),
        ("QP", "cvxpy:CLARABEL"),
        ("LP", "auto"),
        ("LP", "casadi:ipopt"),
    ],
)
def test_a_problem_all_of_whose_numbers_are_small_or_large_is_solved_or_fails_by_name(kind, solver, size):
    """Below 1e-6 any point passed as solved: |du| / max(1, |u|) was small."""
    problem, values = _sized(kind)
    plain = ddn.solve(problem, values, solver="casadi:daqp")
    large = {name: (size * value).requires_grad_() for name, value in values.items()}
    try:
        solution = ddn.solve(problem, large, solver=solver)
    except ddn.SolveError:
        assert solver == "cvxpy:CLARABEL"
        assert size in (1e-12, 1e9, 1e12)
        return
    torch.testing.assert_close(solution["u"] / size, plain["u"], rtol=0, atol=1e-10)
    v = torch.linspace(-1, 1, 20, dtype=D)
    gradients = torch.autograd.grad(v @ solution["u"], list(large.values()))
    expected = ddn.sensitivity(problem, values, {"u": plain["u"]}).vjp({"u": v})
    for gradient, name in zip(gradients, values, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)
    assert solution.certificate.ok


def test_a_variable_that_has_run_off_hides_no_violation() -> None:
    """Of u the ball is empty; measured over changes by the size of t, 1e28, that was nothing (found by fuzzing)."""
    problem = ddn.Problem(
        {"u": (2,), "t": ()},
        {"c": (2,)},
        lambda u, t, c: (u - c).square().sum() + 0 * t,
        inequality={"ball": lambda u, c: (u - c - 1).square().sum() + 0.5},
    )
    point = {"u": torch.tensor([1.5, 2.0], dtype=torch.float64), "t": torch.tensor(1e28, dtype=torch.float64)}
    with pytest.raises(ddn.SensitivityError, match="scaled feasibility"):
        ddn.sensitivity(problem, {"c": torch.ones(2, dtype=torch.float64)}, point)


@pytest.mark.parametrize("size", [1e100, 1e200])
def test_points_that_overflow_are_failures_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    """A backend's last point may be anything; its multipliers are estimated all the same."""

    class Runaway(Adapter):
        capabilities = Capabilities(
            "runs away", "numpy", "numpy", (Method("none", frozenset(ProblemClass), frozenset(Feature)),)
        )

        def solve(self, instance: Instance) -> Point:
            return Point(np.full(instance.initial.shape, size), Status.ITERATION_LIMIT)

    problem = ddn.Problem({"u": (2,)}, {"c": (2,)}, lambda u, c: (u - c).pow(4).sum(), lambda u: u.prod() - 1)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # undone afterwards
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    ddn.register("runaway", Runaway)
    solution = ddn.solve(
        problem, {"c": torch.ones(2)}, solver="runaway", policy=ddn.Policy(on_failure="mask")
    )
    assert not solution.converged.any()
    assert not solution.certificate.ok  # nor does reading it raise: H is not finite there


@pytest.mark.parametrize("origin", [0.0, 1e3, 1e4, 5e5])
def test_the_origin_of_a_map_does_not_matter_to_a_heading(origin: float) -> None:
    """A pose in map coordinates: to move all variables by a hundredth of |z| made the row of the heading look vanishing."""
    landmarks = torch.tensor([[12.0, 3.0], [-4.0, 8.0], [6.0, -9.0]], dtype=D)
    there = torch.tensor([origin, 10 * origin], dtype=D)

    def misfit(t, d, z):
        turned = torch.stack([torch.stack([d[0], -d[1]]), torch.stack([d[1], d[0]])])
        return ((landmarks + there - t) @ turned - z).square().sum()

    problem = ddn.Problem(
        {"t": (2,), "d": (2,)}, {"z": (3, 2)}, misfit, {"unit": lambda d: d.square().sum() - 1}
    )
    z = landmarks @ torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=D) + torch.tensor(
        [[0.1, 0.0], [0.0, -0.1], [0.05, 0.1]], dtype=D
    )
    z.requires_grad_()
    start = {"t": there + 1.0, "d": torch.tensor([1.0, 0.0], dtype=D)}
    solution = ddn.solve(problem, {"z": z}, initial=start)
    assert solution.certificate.ok
    (gradient,) = torch.autograd.grad(solution["d"][1], z)
    torch.testing.assert_close(
        gradient[0], torch.tensor([-0.0071653175183, -0.0206615634058], dtype=D), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("unit", [1.0, 1e2, 1e3, 1e6])
def test_a_pressure_in_pascal_beside_a_flow(unit: float, sign: float) -> None:
    """q^2 = d, whatever the unit of p: the root was called no minimum, or a constant."""
    problem = ddn.Problem(
        {"p": (), "q": ()},
        {"d": ()},
        lambda p, q: 1e-12 * (unit * p - 5e6 - 1e5 * q).square() + 0.01 * sign * q,
        {"flow": lambda q, d: q**2 - d},
    )
    d = torch.tensor(4.0, dtype=D, requires_grad=True)
    start = {"p": torch.tensor(5e6 / unit, dtype=D), "q": torch.tensor(1.0, dtype=D)}
    solution = ddn.solve(problem, {"d": d}, solver="casadi:ipopt", initial=start)
    assert solution.certificate.ok
    torch.testing.assert_close(solution["q"], torch.tensor(2.0, dtype=D))
    torch.testing.assert_close(torch.autograd.grad(solution["q"], d)[0], torch.tensor(0.25, dtype=D))


@pytest.mark.parametrize("decades", [2, 4, 6])
def test_units_of_the_variables_of_a_nonlinear_problem(decades: int) -> None:
    """u = v / d with exponentials and a sphere of v: the same gradient for every d."""
    n = 6

    def gradient(seed: int, spread: int):
        g = torch.Generator().manual_seed(seed)
        d = 10.0 ** (spread * (2 * torch.rand(n, generator=g, dtype=D) - 1))
        c, x = torch.randn(n, generator=g, dtype=D), torch.randn(n, generator=g, dtype=D).requires_grad_()
        problem = ddn.Problem(
            {"u": (n,)},
            {"x": (n,)},
            lambda u, x: (d * u - x).square().sum() + (d * u * c).exp().sum(),
            equality=lambda u: (d * u).square().sum() - 1,
        )
        solution = ddn.solve(problem, {"x": x}, initial=0.4 / d)
        return (d * solution["u"]).detach(), torch.autograd.grad((d * solution["u"])[0], x)[0]

    for seed in range(4):
        for found, expected in zip(gradient(seed, decades), gradient(seed, 0), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("far", "small"), [(1e8, 1e-8), (1e5, 1e-5), (1e4, 1e-7)])
def test_a_small_variable_does_not_keep_the_rounding_of_where_it_began(far: float, small: float) -> None:
    """Values close to where a point began are told from there: close in each variable."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (2,)},
        lambda u, x: 0.5 * ((u[0] - x[0]) / far).square(),
        equality=lambda u, x: (u[1] - x[1]) / small,
    )
    x = torch.tensor([1.00001 * far, 1.2345678 * small], dtype=torch.float64)
    start = torch.tensor([far, 1e5], dtype=torch.float64)
    assert ddn.solve(problem, {"x": x}, initial=start)["u"].tolist() == pytest.approx(x.tolist(), rel=1e-14)


def test_an_objective_that_vanishes_has_its_own_digits() -> None:
    x = torch.tensor([1000.0, 2000.0], dtype=torch.float64)
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: 1e8 * (u - x).square().sum() + 1e-6 * u[0])
    found = ddn.solve(problem, {"x": x}, initial=x + 0.9)
    assert float(found.objective) == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize(
    "rows", [[[1e-170, 1e-176]], [[1.0, 1e-165]], [[1e160, 1.0]], [[1.0, 1e-3], [0.0, 0.0]]]
)
def test_units_are_told_where_squares_vanish_or_overflow(rows: list[list[float]]) -> None:
    J, H = np.array([rows]), np.zeros((1, 2, 2))
    patterns = [
        Pattern(M.shape[1:], np.arange(3) * M.shape[1], np.tile(np.arange(M.shape[1]), 2)) for M in (J, H)
    ]
    matrices = [
        Matrices(p, M.transpose(0, 2, 1).reshape(1, -1)) for p, M in zip(patterns, (J, H), strict=True)
    ]
    units = units_of(matrices[1], matrices[0])
    assert units is not None
    assert np.isfinite(units).all()
