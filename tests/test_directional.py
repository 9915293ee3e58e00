"""Directional derivatives where the solution has a kink: against one-sided differences of re-solves."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

Tensors = dict[str, torch.Tensor]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: Any, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=D), rtol=0, atol=atol)


def quietly(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """A call in which a one-sided derivative is what is wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)
        return function(*arguments, **keywords)


def tangent_of(
    problem: ddn.Problem, p: Tensors, point: torch.Tensor, dp: Tensors, **policy: Any
) -> torch.Tensor:
    found = ddn.sensitivity(problem, p, point, policy=ddn.Policy(**policy) if policy else None)
    return quietly(found.jvp, dp)["u"]


def outputs(solution: ddn.Solution) -> torch.Tensor:
    """Point, multipliers and objective in one vector."""
    dual = solution.dual
    parts = [*solution.primal.values(), *dual.equality.values(), *dual.inequality.values()]
    parts += [*dual.lower.values(), *dual.upper.values(), solution.objective]
    return torch.cat([part.reshape(-1) for part in parts])


def one_sided(
    problem: ddn.Problem, p: Tensors, dp: Tensors, solver: str, step: float, initial: Any = None
) -> torch.Tensor:
    """(y(p + t dp) - y(p)) / t of all outputs, extrapolated once: error O(t^2), rounding / t."""

    def at(t: float) -> torch.Tensor:
        moved = {name: value + t * dp.get(name, torch.zeros_like(value)) for name, value in p.items()}
        return outputs(quietly(ddn.solve, problem, moved, solver=solver, initial=initial)).detach()

    here = at(0.0)
    return 2 * (at(step / 2) - here) / (step / 2) - (at(step) - here) / step


def forward(problem: ddn.Problem, p: Tensors, dp: Tensors, solver: str, initial: Any = None) -> torch.Tensor:
    """Tangent of all outputs by torch.func.jvp through ``solve``."""
    names = list(dp)

    def solved(*values: torch.Tensor) -> torch.Tensor:
        given = {**p, **dict(zip(names, values, strict=True))}
        return outputs(ddn.solve(problem, given, solver=solver, initial=initial))

    result: torch.Tensor = quietly(
        torch.func.jvp, solved, tuple(p[name] for name in names), tuple(dp.values())
    )[1]
    return result


# -- closed forms -----------------------------------------------------------------------------------------

RELU = ddn.Problem(
    {"u": (20,)}, {"x": (20,)}, lambda u, x: 0.5 * (u - x).square().sum(), bounds={"u": (0.0, None)}
)


@pytest.mark.parametrize("choice", ["active", "inactive", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_relu_at_zero_follows_the_direction(seed: int, choice: str) -> None:
    """relu'(0; d) = max(d, 0), n = 20, six entries at zero; whatever a vjp would choose."""
    x, d = randn(20, seed=seed), randn(20, seed=seed + 10)
    x[::3] = 0.0
    expected = torch.where(x > 0, d, torch.where(x < 0, 0.0, d.clamp_min(0)))
    close(tangent_of(RELU, {"x": x}, x.clamp_min(0), {"x": d}, weakly_active=choice), expected)


def test_raise_refuses_a_jvp_at_a_weakly_active_point() -> None:
    x = torch.zeros(20, dtype=D)
    with pytest.raises(ddn.SensitivityError):
        tangent_of(RELU, {"x": x}, x, {"x": x + 1}, weakly_active="raise")


SMALLER = ddn.Problem(
    {"u": ()}, {"a": (), "b": ()}, lambda u: -u, inequality=[lambda u, a: u - a, lambda u, b: u - b]
)


@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP", "cvxpy:CLARABEL"])
@pytest.mark.parametrize(
    "direction", [(1.0, 2.0), (2.0, 1.0), (-1.0, 1.0), (-1.0, -3.0), (1.0, 1.0), (0.0, -1.0)]
)
def test_the_smaller_of_two_parameters(direction: tuple[float, float], solver: str) -> None:
    """min(a, b) = argmax u s.t. u <= a, u <= b: multipliers are not unique; min'(a, a; d) = min(da, db)."""
    p = {"a": torch.tensor(0.7, dtype=D), "b": torch.tensor(0.7, dtype=D)}
    dp = dict(zip("ab", vector(*direction), strict=True))
    close(tangent_of(SMALLER, p, p["a"], dp), min(direction))
    close(forward(SMALLER, p, dp, solver)[0], min(direction))


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_of_many_parameters_at_a_tie_of_some(seed: int) -> None:
    """u_j <= every row of a (6, 4), three of them tied in each column."""
    problem = ddn.Problem(
        {"u": (4,)}, {"a": (6, 4)}, lambda u: -u.sum(), inequality=lambda u, a: u.expand(6, 4) - a
    )
    a, d = randn(6, 4, seed=seed).abs() + 1, randn(6, 4, seed=seed + 10)
    a[:3] = a.amin(0) - 0.5
    close(tangent_of(problem, {"a": a}, a[0], {"a": d}), d[:3].amin(0))


PROJECTION = ddn.Problem(
    {"u": (3,)},
    {"x": (3,), "b": (2,)},
    lambda u, x: 0.5 * (u - x).square().sum(),
    inequality=lambda u, b: torch.stack([u[0] + u[1] - b[0], u[1] + u[2] - b[1]]),
)


def projected_tangent(rows: torch.Tensor, d: torch.Tensor, db: torch.Tensor) -> torch.Tensor:
    """Projection of d on {rows v <= db}, every subset of the rows tried: independent of any QP method."""
    for size in range(len(rows) + 1):
        for subset in itertools.combinations(range(len(rows)), size):
            chosen = rows[list(subset)]
            force = torch.linalg.solve(chosen @ chosen.T, chosen @ d - db[list(subset)])
            v = d - chosen.T @ force
            if (force >= -1e-12).all() and (rows @ v <= db + 1e-12).all():
                return v
    raise AssertionError("no subset is optimal")


@pytest.mark.parametrize("seed", range(12))
def test_two_coupled_weak_inequalities(seed: int) -> None:
    """x on an edge of the polyhedron: the derivative of the projection is the projection on the cone."""
    x = vector(0.3, -0.1, 0.5)
    p = {"x": x, "b": vector(0.2, 0.4)}
    dp = {"x": randn(3, seed=seed), "b": randn(2, seed=seed + 20)}
    rows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=D)
    close(tangent_of(PROJECTION, p, x, dp), projected_tangent(rows, dp["x"], dp["b"]))


def test_the_derivative_is_positively_homogeneous_and_not_linear() -> None:
    x = vector(0.3, -0.1, 0.5)
    p, one, other = {"x": x, "b": vector(0.2, 0.4)}, randn(3, seed=1), -randn(3, seed=2)

    def along(d: torch.Tensor) -> torch.Tensor:
        return tangent_of(PROJECTION, p, x, {"x": d})

    close(along(7.0 * one), 7.0 * along(one))
    close(along(torch.zeros(3, dtype=D)), torch.zeros(3))
    assert (along(-one) + along(one)).abs().max() > 0.1
    assert (along(one + other) - along(one) - along(other)).abs().max() > 1e-2


# -- the QP's theory against re-solves ------------------------------------------------------------------------


def known_quadratic(seed: int, n: int = 20) -> tuple[ddn.Problem, Tensors, torch.Tensor]:
    """A strictly convex QP made from its solution: 2 equalities, 3 strong, 4 weak, 3 loose rows; 3 weak bounds."""
    rng = np.random.default_rng(seed)
    root, z = rng.normal(size=(n, n)), rng.normal(size=n)
    a, g = rng.normal(size=(2, n)), rng.normal(size=(10, n))
    force = np.concatenate([rng.random(3) + 0.5, np.zeros(7)])
    loose = np.concatenate([np.zeros(7), rng.random(3) + 0.5])
    lower = z - 1.0
    lower[:3] = z[:3]  # weak
    lower[3:5] = z[3:5]  # strong
    pressed = np.zeros(n)
    pressed[3:5] = rng.random(2) + 0.5
    quadratic = root @ root.T / n + np.eye(n)
    q = -(quadratic @ z + a.T @ rng.normal(size=2) + g.T @ force - pressed)
    matrix, equal, less = (torch.from_numpy(array) for array in (quadratic, a, g))
    problem = ddn.Problem(
        {"u": (n,)},
        {"q": (n,), "b": (2,), "h": (10,), "lower": (n,)},
        lambda u, q: 0.5 * u @ matrix @ u + q @ u,
        equality=lambda u, b: equal @ u - b,
        inequality=lambda u, h: less @ u - h,
        bounds={"u": ("lower", None)},
    )
    p = {"q": q, "b": a @ z, "h": g @ z + loose, "lower": lower}
    return problem, {k: torch.from_numpy(v) for k, v in p.items()}, torch.from_numpy(z)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("seed", range(6))
def test_quadratic_programs_with_seven_weak_constraints(seed: int, sign: float) -> None:
    """Piecewise linear, so that a one-sided difference is exact; multipliers and objective too."""
    problem, p, z = known_quadratic(seed)
    dp = {name: sign * randn(*value.shape, seed=seed + 30) for name, value in p.items()}
    expected = one_sided(problem, p, dp, "cvxpy:CLARABEL", 1e-4)
    close(tangent_of(problem, p, z, dp), expected[:20], atol=1e-7)
    close(forward(problem, p, dp, "cvxpy:CLARABEL"), expected, atol=1e-6)


def curved(n: int = 20) -> ddn.Problem:
    """A point on a ball without pressing on it, within nonlinear rows that it does press on."""
    return ddn.Problem(
        {"u": (n,)},
        {"x": (n,), "r": (), "s": ()},
        lambda u, x: 0.5 * (u - x).square().sum() + 0.1 * (u - x).pow(4).sum(),
        equality={"curve": lambda u, s: u[0] + 0.3 * u[1].square() - s},
        inequality={
            "ball": lambda u, r: u.square().sum() - r**2,
            "wave": lambda u, x: (torch.sin(u[2:6]) - torch.sin(x[2:6])).sum(),
        },
    )


@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP"])
@pytest.mark.parametrize("seed", range(4))
def test_nonlinear_problems_with_weak_constraints(seed: int, solver: str) -> None:
    """At u = x every inequality holds with equality and none has a multiplier."""
    x = 0.3 * randn(20, seed=1)
    p = {"x": x, "r": x.norm(), "s": x[0] + 0.3 * x[1] ** 2}
    dp = {"x": randn(20, seed=seed), "r": randn(1, seed=seed + 40)[0], "s": randn(1, seed=seed + 50)[0]}
    expected = one_sided(curved(), p, dp, solver, 1e-4, initial=x)
    close(tangent_of(curved(), p, x, dp), expected[:20], atol=1e-6)
    close(forward(curved(), p, dp, solver, initial=x), expected, atol=1e-5)


TANGENT = ddn.Problem(
    {"u": (2,)},
    {"x": (2,), "r": (), "b": ()},
    lambda u, x: 0.5 * (u - x).square().sum(),
    inequality={"ball": lambda u, r: u.square().sum() - r**2, "plane": lambda u, b: u[0] - b},
)


@pytest.mark.parametrize(
    ("dr", "db", "expected"),
    [
        (1.0, 0.5, (0.5, 1.0)),  # the plane moves in front of the ball
        (0.5, 1.0, (0.5, 1 / 3)),
        (0.0, 0.0, (0.0, 1 / 3)),  # the ball is behind the plane all around
        (-1.0, -0.2, (-1.0, 1 / 3)),
        (-0.2, -1.0, (-1.0, 1.0)),
    ],
)
def test_multipliers_that_are_not_unique_are_chosen_by_the_direction(
    dr: float, db: float, expected: tuple[float, float]
) -> None:
    """A ball and a plane that touch at (1, 0), x = (3, 0) pressing: H = 1 + 2 lambda of the ball."""
    p = {"x": vector(3.0, 0.0), "r": torch.ones((), dtype=D), "b": torch.ones((), dtype=D)}
    dp = {"x": vector(0.4, 1.0), "r": torch.tensor(dr, dtype=D), "b": torch.tensor(db, dtype=D)}
    close(tangent_of(TANGENT, p, vector(1.0, 0.0), dp), expected, atol=1e-6)
    moved = {name: value + 1e-5 * dp[name] for name, value in p.items()}
    there = ddn.solve(TANGENT, moved, solver=["casadi:ipopt", "scipy:SLSQP"])["u"]
    close((there - vector(1.0, 0.0)) / 1e-5, expected, atol=1e-4)  # a ball's side is a square root away


def test_a_fixed_variable_and_a_bound_that_moves_away() -> None:
    """u in [l, h], both at x: the interval opens, shuts or shifts."""
    problem = ddn.Problem(
        {"u": ()}, {"x": (), "low": ()}, lambda u, x: 0.5 * (u - x) ** 2, bounds={"u": ("low", None)}
    )
    p = {"x": torch.tensor(0.5, dtype=D), "low": torch.tensor(0.5, dtype=D)}
    for dx, dlow in itertools.product((-1.0, 0.0, 2.0), (-0.5, 0.0, 1.0)):
        dp = {"x": torch.tensor(dx, dtype=D), "low": torch.tensor(dlow, dtype=D)}
        close(tangent_of(problem, p, p["x"], dp), max(dx, dlow))


# -- forward mode through solve and layer -----------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["active", "inactive", "mean"])
def test_forward_mode_through_a_layer_is_the_directional_derivative(choice: str) -> None:
    layer = ddn.DeclarativeLayer(RELU, policy=ddn.Policy(weakly_active=choice))
    x, d = randn(20, seed=3), randn(20, seed=4)
    x[::4] = 0.0
    expected = torch.where(x > 0, d, torch.where(x < 0, 0.0, d.clamp_min(0)))
    close(quietly(torch.func.jvp, layer, (x,), (d,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        y = quietly(layer, torch.autograd.forward_ad.make_dual(x, d))
        close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected)


def test_jacfwd_has_the_derivative_along_each_unit_vector() -> None:
    x = vector(0.3, -0.1, 0.5)
    b = vector(0.2, 0.4)
    rows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=D)
    found = quietly(torch.func.jacfwd(lambda x: ddn.solve(PROJECTION, {"x": x, "b": b})["u"]), x)
    columns = [projected_tangent(rows, unit, torch.zeros(2, dtype=D)) for unit in torch.eye(3, dtype=D)]
    close(found, torch.stack(columns, -1))


def test_samples_of_a_batch_keep_their_own_derivative() -> None:
    """Strong, weak and loose samples together are what each is alone."""
    x = torch.stack([vector(0.3, -0.1, 0.5), vector(1.0, 1.0, 1.0), vector(-1.0, -1.0, -1.0)])
    b, d = vector(0.2, 0.4).expand(3, 2), randn(3, 3, seed=6)
    points = ddn.solve(PROJECTION, {"x": x, "b": b})["u"]
    together = tangent_of(PROJECTION, {"x": x, "b": b}, points, {"x": d})
    for i in range(3):
        alone = tangent_of(PROJECTION, {"x": x[i], "b": b[i]}, points[i], {"x": d[i]})
        torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-13)
    mapped = quietly(
        torch.func.vmap(
            lambda x, d: torch.func.jvp(
                lambda x: ddn.solve(PROJECTION, {"x": x, "b": b[0]})["u"], (x,), (d,)
            )[1]
        ),
        x,
        d,
    )
    close(mapped, together)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_objectives_unit_changes_no_directional_derivative(scale: float) -> None:
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,), "b": (2,)},
        lambda u, x: scale * 0.5 * (u - x).square().sum(),
        inequality=lambda u, b: torch.stack([u[0] + u[1] - b[0], u[1] + u[2] - b[1]]),
    )
    x, d = vector(0.3, -0.1, 0.5), randn(3, seed=7)
    p = {"x": x, "b": vector(0.2, 0.4)}
    close(tangent_of(problem, p, x, {"x": d}), tangent_of(PROJECTION, p, x, {"x": d}))


def test_where_nothing_is_weak_forward_and_reverse_mode_agree() -> None:
    problem, p, _ = known_quadratic(0)
    p["q"] = p["q"] + 0.05 * randn(20, seed=8)
    point = ddn.solve(problem, p, solver="cvxpy:CLARABEL")["u"]
    found = ddn.sensitivity(problem, p, point)
    assert found.certificate.strictly_complementary
    d, weights = randn(20, seed=9), randn(20, seed=10)
    close(found.jvp({"q": d})["u"] @ weights, found.vjp({"u": weights})["q"] @ d)


def test_the_other_side_is_another_derivative_and_both_are_of_the_family() -> None:
    """One weak row: along d and -d one side moves as if it were active, the other as if it were not."""
    half = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), inequality=lambda u: u.sum()
    )
    x, d = vector(1.0, -0.4, -0.6), vector(0.5, 1.0, -0.2)
    by_choice: dict[str, torch.Tensor] = {
        choice: quietly(
            ddn.sensitivity(half, {"x": x}, x, policy=ddn.Policy(weakly_active=choice)).jacobian, "u", "x"
        )
        for choice in ("active", "inactive", "mean")
    }
    close(by_choice["mean"], (by_choice["active"] + by_choice["inactive"]) / 2)
    close(tangent_of(half, {"x": x}, x, {"x": d}), by_choice["active"] @ d)
    close(tangent_of(half, {"x": x}, x, {"x": -d}), -by_choice["inactive"] @ d)


@pytest.mark.parametrize("choice", ["active", "inactive", "mean"])
def test_a_sample_that_is_singular_without_its_weak_rows(choice: str) -> None:
    """Only the weak bound holds u[1]: dropped, the direction is flat, and no backward pass may be NaN or huge."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (2,)},
        lambda u, x: 0.5 * (u[0] - x[0]).square() + 0.0 * u[1],
        bounds={"u": (torch.tensor([-1.0, 0.0], dtype=D), None)},
    )
    x = vector(0.4, 0.7).requires_grad_()
    policy = ddn.Policy(weakly_active=choice)
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D)
    for create_graph in (False, True):
        u = quietly(ddn.attach, problem, {"x": x}, torch.tensor([0.4, 0.0], dtype=D), policy)["u"]
        rows = [
            quietly(torch.autograd.grad, one, x, retain_graph=True, create_graph=create_graph)[0] for one in u
        ]
        close(torch.stack(rows).detach(), expected)
    point = torch.tensor([0.4, 0.0], dtype=D)

    def attached(x: torch.Tensor) -> torch.Tensor:
        return ddn.attach(problem, {"x": x}, point, policy)["u"]

    close(quietly(torch.func.jacrev(attached), x.detach()), expected)


@pytest.mark.parametrize(("choice", "slope", "bend"), [("active", 0.0, 0.0), ("inactive", 1.0, -2.0)])
def test_second_derivatives_are_those_of_the_chosen_side(choice: str, slope: float, bend: float) -> None:
    """u - x + u^2 = 0 where u is free: u' = 1 / (1 + 2 u), u'' = -2 / (1 + 2 u)^3, at u = x = 0 on the bound."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (2,)},
        lambda u, x: (0.5 * (u - x).square() + u**3 / 3).sum(),
        bounds={"u": (0.0, None)},
    )
    policy = ddn.Policy(weakly_active=choice)
    x = torch.zeros(2, dtype=D)

    def total(x: torch.Tensor) -> torch.Tensor:
        return ddn.attach(problem, {"x": x}, torch.zeros(2, dtype=D), policy)["u"].sum()

    close(quietly(torch.func.grad(total), x), [slope, slope])
    for hessian in (torch.func.hessian(total), torch.func.jacrev(torch.func.jacrev(total))):
        close(quietly(hessian, x), torch.diag(vector(bend, bend)))
    close(quietly(torch.autograd.functional.hessian, total, x), torch.diag(vector(bend, bend)))


@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP", "cvxpy:CLARABEL"])
def test_the_choices_are_the_one_sided_values_of_re_solves(solver: str) -> None:
    """Halfspace through x: to the inside the identity ("inactive"), to the outside the projection ("active")."""
    half = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), inequality=lambda u: u.sum()
    )
    x = vector(1.0, -0.4, -0.6)
    for choice, side in (("active", 1.0), ("inactive", -1.0)):
        found = ddn.sensitivity(half, {"x": x}, x, policy=ddn.Policy(weakly_active=choice))
        jacobian = quietly(found.jacobian, "u", "x")
        for d in (side * vector(1.0, 1.0, 0.5), side * vector(0.2, -0.1, 1.0)):
            moved = one_sided(half, {"x": x}, {"x": d}, solver, 1e-4)[:3]
            close(jacobian @ d, moved, 1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_parallel_rows_in_any_units_move_as_the_tightest_of_them(seed: int) -> None:
    """Strong rows of a QP, some repeated in units of 1e-3 to 1e3: along dh each group has the smallest dh / unit."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 9))
    root, z = rng.normal(size=(n, n)), rng.normal(size=n)
    quadratic, k = root @ root.T + np.eye(n), int(rng.integers(1, n - 1))
    rows, force = rng.normal(size=(k, n)), rng.random(k) + 0.5
    copies, unit = rng.integers(0, k, size=3), 10.0 ** rng.uniform(-3, 3, size=3)
    matrix, less = (
        torch.from_numpy(a) for a in (quadratic, np.concatenate([rows, unit[:, None] * rows[copies]]))
    )
    problem = ddn.Problem(
        {"u": (n,)},
        {"q": (n,), "h": (k + 3,)},
        lambda u, q: 0.5 * u @ matrix @ u + q @ u,
        inequality=lambda u, h: less @ u - h,
    )
    point = torch.from_numpy(z)
    p = {"q": torch.from_numpy(-(quadratic @ z + rows.T @ force)), "h": less @ point}
    dq, dh = rng.normal(size=n), rng.normal(size=k + 3) * np.concatenate([np.ones(k), unit])
    tightest = dh[:k].copy()
    np.minimum.at(tightest, copies, dh[k:] / unit)
    bordered = np.block([[quadratic, rows.T], [rows, np.zeros((k, k))]])
    expected = np.linalg.solve(bordered, np.concatenate([-dq, tightest]))[:n]
    dp = {"q": torch.from_numpy(dq), "h": torch.from_numpy(dh)}
    close(tangent_of(problem, p, point, dp), expected, 1e-8)


@pytest.mark.parametrize("unit", [1.0, 30.0])
@pytest.mark.parametrize("gap", [1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("solver", ["casadi:ipopt", "cvxpy:CLARABEL"])
def test_of_parallel_rows_close_to_each_other_the_one_in_front(solver: str, gap: float, unit: float) -> None:
    """u0 + u1 <= 0 in front of u0 + u1 <= gap: gaps above the tolerance of activity are told apart."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (2,), "b": (2,)},
        lambda u, x: 0.5 * (u - x).square().sum(),
        inequality=[lambda u, b: u.sum() - b[0], lambda u, b: unit * (u.sum() - b[1])],
    )
    b = vector(0.0, gap).requires_grad_()
    solution = quietly(ddn.solve, problem, {"x": vector(1.0, 0.5), "b": b}, solver=solver)
    close(solution["u"], [0.25, -0.25], 1e-10)
    close(quietly(torch.autograd.grad, solution["u"][0], b)[0], [0.5, 0.0], 1e-8)


def test_forward_mode_of_a_large_sparse_problem_with_dependent_rows() -> None:
    """Whether its derivative depends on the direction was asked inside of the transform, where tensors have no arrays."""
    n = 300
    problem = ddn.Problem(
        {"u": (n,)},
        {"x": (n,)},
        lambda u, x: (u - x).square().sum(),
        equality=[lambda u: u[1:] - u[:-1], lambda u: u[-1:] - u[:1]],
        bounds={"u": (0.0, None)},
    )
    x = torch.linspace(-1, 2, n, dtype=D)
    y, dy = quietly(torch.func.jvp, ddn.DeclarativeLayer(problem), (x,), (torch.linspace(0, 1, n, dtype=D),))
    close(y, torch.full((n,), 0.5, dtype=D))
    close(dy, torch.full((n,), 0.5, dtype=D))


@pytest.mark.parametrize("seed", range(6))
def test_dependent_rows_beside_a_weakly_active_one(seed: int) -> None:
    """A weak row that the strong ones determine responds by rounding: a multiplier of 1e17 was put on it."""
    problem = ddn.Problem(
        {"u": (3,)},
        {"q": (3,), "A": (4, 3), "b": (4,)},
        lambda u, q: 0.5 * u.square().sum() + q @ u,
        inequality={"c": lambda u, A, b: A @ u - b},
    )
    A = torch.stack([vector(1, 2, 0), vector(1, 2, 0), vector(1, -1, -2), vector(0, 1, 1)])
    p = {"q": vector(-1, -2, 1), "A": A, "b": vector(0, 0, 2, 5)}
    dp = {name: randn(*value.shape, seed=10 * seed + k) for k, (name, value) in enumerate(p.items())}
    u, step = vector(0, 0, -1), 1e-7
    moved = ddn.solve(problem, {name: p[name] + step * dp[name] for name in p})["u"]
    close(tangent_of(problem, p, u, dp), (moved - u) / step, 1e-5)
