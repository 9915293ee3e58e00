"""Why a problem has no solution: infeasible where it is, and by which constraints."""

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.diagnosis import diagnose
from ddn_solvers.problem import as_problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.residuals import Bound

D = torch.float64


def driven(seed: int, steps: int = 40) -> tuple[Program, Bound]:
    """A horizon of linear dynamics, most of them unstable, with bounds within which a trajectory was simulated."""
    g = torch.Generator().manual_seed(seed)
    A = torch.eye(2, dtype=D) + 0.3 * torch.randn(2, 2, generator=g, dtype=D)
    first = torch.randn(2, generator=g, dtype=D)
    u = 0.9 * (2 * torch.rand(steps, generator=g, dtype=D) - 1)
    states = [first]
    for force in u:
        states.append(A @ states[-1] + torch.stack([torch.zeros_like(force), force]))
    reached = torch.stack(states[1:])

    def dynamics(s: torch.Tensor, u: torch.Tensor, A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return s - torch.cat([x[None], s[:-1]]) @ A.T - torch.stack([0 * u, u], dim=-1)

    problem = ddn.Problem(
        {"s": (steps, 2), "u": (steps,)},
        {"A": (2, 2), "x": (2,)},
        lambda s, u: s.square().sum() + u.square().sum(),
        equality={"dynamics": dynamics},
        bounds={"u": (-1.0, 1.0), "s": (float(reached.min()) - 0.1, float(reached.max()) + 0.1)},
    )
    program = compile_program(as_problem(problem))
    return program, Bound.of(program, (A.reshape(-1).numpy(), first.numpy()), 1)


@pytest.mark.parametrize("seed", [1, 2, 7])
def test_a_feasible_horizon_is_not_called_infeasible(seed: int) -> None:
    """On these Gauss and Newton's method ends at violations from 2e-5 to 4e-2, which are not the smallest."""
    program, bound = driven(seed)
    assert diagnose(program, bound, np.zeros(program.variables.size), 1e-6) is None


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_only_the_rows_that_contradict_each_other_are_named(unit: float) -> None:
    """Not those that hold anyway, nor those that are violated where the others are violated least."""
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,)},
        lambda u, x: (u - x).square().sum(),
        equality={"sum": lambda u: u.sum() - 5 * unit},
        inequality={
            "first": lambda u: u[:2].sum() - unit,
            "last": lambda u: u[2] - 2 * unit,
            "other": lambda u: u[0] - u[1] - 3 * unit,
        },
    )
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(problem, {"x": unit * torch.tensor([1.0, -2.0, 1.0], dtype=D)})
    assert caught.value.solution.status == (ddn.Status.INFEASIBLE,)
    (said,) = caught.value.solution.stats.message
    assert "of sum, first, last" in said or "of sum, last, first" in said
    assert "other" not in said


def test_an_infeasible_horizon_is_told_at_once() -> None:
    """It took half a minute: singular values of every step, and multipliers of a point that had failed already."""
    steps = 120

    def dynamics(s: torch.Tensor, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return s - torch.cat([x[None], s[:-1]]) - 0.1 * u

    problem = ddn.Problem(
        {"s": (steps,), "u": (steps,)},
        {"x": ()},
        lambda s, u: s.square().sum() + u.square().sum(),
        equality={"dynamics": dynamics, "end": lambda s: s[-1] - 1e3},
        bounds={"u": (-1.0, 1.0)},
    )
    policy = ddn.Policy(on_failure="mask")
    solution = ddn.solve(problem, {"x": torch.zeros(4, dtype=D)}, policy=policy)
    assert solution.status == (ddn.Status.INFEASIBLE,) * 4
    assert all("end" in reason for reason in solution.stats.message)


@pytest.mark.parametrize("slope", [1e-8, 1e-10, 1e-12])
def test_a_row_with_a_small_entry_is_not_called_contradicted(slope: float) -> None:
    """HiGHS leaves entries of 1e-9 out, and what is left of these rows is 1 = 0.5."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": ()},
        lambda u, x: ((1e-6 * u[0]) ** 2 + u[1] ** 2) * x,
        equality={"both": lambda u: u[1] + slope * u[0] - 1.0, "one": lambda u: u[1] - 0.5},
        bounds={"u": (-1e13, 1e13)},
    )
    program = compile_program(as_problem(problem))
    bound = Bound.of(program, (np.ones(1),), 1)
    found = diagnose(program, bound, np.zeros(2), 1e-6)
    assert found is None or found[0] is not ddn.Status.INFEASIBLE


FEASIBLE = {
    "outside of a ball, from its middle": (
        ddn.Problem(
            {"u": (2,)},
            {"p": (2,)},
            lambda u, p: (u - p).square().sum(),
            inequality={"out": lambda u: 1 - u.square().sum()},
        ),
        torch.zeros(2, dtype=torch.float64),
        "casadi:ipopt",
        None,
    ),
    "cubic row": (
        ddn.Problem({"u": ()}, {"p": ()}, lambda u: -u, inequality={"c": lambda u, p: u**3 - p}),
        torch.zeros((), dtype=torch.float64),
        "casadi:sqpmethod",
        -1.0,
    ),
    "triple root": (
        ddn.Problem({"u": ()}, {"p": ()}, lambda u: (u - 2) ** 2, {"c": lambda u, p: (u - 1) ** 3 - p}),
        torch.zeros((), dtype=torch.float64),
        "casadi:ipopt",
        2.0,
    ),
    "root on the other side": (
        ddn.Problem({"u": ()}, {"p": ()}, lambda u: u**2, {"c": lambda u, p: u**3 - 3 * u + 20 + p}),
        torch.zeros((), dtype=torch.float64),
        "casadi:ipopt",
        1.5,
    ),
}


@pytest.mark.parametrize("name", FEASIBLE)
def test_a_problem_with_feasible_points_is_not_called_infeasible(name: str) -> None:
    """The violation was largest there, least nearby alone, or 1e-14 where its gradient vanishes."""
    problem, p, solver, start = FEASIBLE[name]
    initial = None if start is None else torch.tensor(start, dtype=torch.float64)
    solution = ddn.solve(
        problem, {"p": p}, solver=solver, initial=initial, policy=ddn.Policy(on_failure="mask")
    )
    assert solution.status[0] is not ddn.Status.INFEASIBLE


def test_a_nonlinear_contradiction_is_infeasible() -> None:
    problem = ddn.Problem({"u": ()}, {"p": ()}, lambda u: u**2, {"c": lambda u, p: u**2 + 1 + p})
    with pytest.raises(ddn.SolveError, match="the smallest violation is 1, of c"):
        ddn.solve(problem, {"p": torch.zeros((), dtype=torch.float64)})


@pytest.mark.parametrize("solver", ["casadi:ipopt", "casadi:sqpmethod", "scipy:SLSQP", "scipy:trust-constr"])
def test_a_sphere_is_not_called_infeasible_from_its_centre(solver: str) -> None:
    """SciPy's "trf" goes as far as it may where rows are few, here from anywhere to the centre."""
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=D)
    problem = ddn.Problem(
        {"u": (5,)}, {"A": (5, 5)}, lambda u, A: -u @ A @ u, equality={"sphere": lambda u: u @ u - 1}
    )
    with pytest.raises(ddn.SolveError, match="no gradient at zero, where the search begins") as caught:
        ddn.solve(problem, {"A": root @ root.mT}, solver=solver)
    assert caught.value.solution.status[0] is not ddn.Status.INFEASIBLE


def _without_end(seed: int, n: int = 30, m: int = 12) -> dict[str, torch.Tensor]:
    """A feasible region with the ray d, along which q falls and P is flat."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=D)

    d, root = randn(n), randn(n // 2, n)
    d = torch.where(torch.arange(n) < n // 3, d.abs(), d)  # of the variables with a lower bound
    root, A, G = (M - torch.outer(M @ d, d) / (d @ d) for M in (root, randn(m // 2, n), randn(m, n)))
    q = randn(n)
    q = q - (q @ d + 1) / (d @ d) * d
    inside = randn(n).abs()
    return {
        "P": root.mT @ root,
        "q": q,
        "A": A,
        "b": A @ inside,
        "G": G - torch.outer(torch.rand(m, generator=generator, dtype=D), d) / (d @ d),
        "h": G @ inside + 1,
    }


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("solver", ["auto", "clarabel", "casadi:ipopt"])
@pytest.mark.parametrize("seed", range(3))
def test_a_ray_proves_an_lp_or_qp_unbounded(seed: int, solver: str, quadratic: bool) -> None:
    """It was told only where the last point or the gradient happened to be one; all others were tried, for minutes."""
    data = _without_end(seed)
    P = data["P"] if quadratic else 0 * data["P"]
    bounded = torch.arange(30) < 10
    problem = ddn.Problem(
        {"u": (30,)},
        {"q": (30,)},
        (lambda u, q: 0.5 * u @ P @ u + q @ u) if quadratic else (lambda u, q: q @ u),
        equality=lambda u: data["A"] @ u - data["b"],
        inequality=lambda u: data["G"] @ u - data["h"],
        bounds={"u": (torch.where(bounded, 0.0, -torch.inf).to(D), None)},
    )
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(problem, {"q": data["q"]}, solver=solver)
    assert caught.value.solution.status == (ddn.Status.UNBOUNDED,)


@pytest.mark.parametrize("solver", ["auto", "scipy:SLSQP"])
def test_many_more_equations_than_variables(solver: str) -> None:
    """SciPy's SLSQP writes beyond its arrays there, and the process died."""
    t = torch.linspace(0.5, 6, 54, dtype=D)
    problem = ddn.Problem(
        {"x": (3,)},
        {"y": (54,)},
        lambda x: x.square().sum(),
        equality={"e": lambda x, y: torch.exp(-x[0] * t) / (x[1] + x[2] * t) - y},
    )
    at, start = (torch.tensor(v, dtype=D) for v in ([0.2, 0.5, 0.3], [0.1, 0.4, 0.4]))
    y = torch.exp(-at[0] * t) / (at[1] + at[2] * t)
    torch.testing.assert_close(ddn.solve(problem, {"y": y}, initial=start, solver=solver)["x"], at)
    with pytest.raises(ddn.SolveError, match="the smallest violation"):
        ddn.solve(problem, {"y": y + torch.sin(40 * t)}, initial=start, solver=solver)


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP"])
@pytest.mark.parametrize("seed", range(3))
def test_a_cost_that_is_a_parameter_and_zero(seed: int, solver: str) -> None:
    """Multipliers were rounding then, and so was the curvature they make: saddles, and gradients of 1e12."""
    problem = ddn.Problem(
        {"x": (5,)},
        {"c": (5,)},
        lambda x, c: c @ x,
        equality={"e": lambda x: torch.stack([x.square().sum() - 2, x[:3].prod() - 0.1])},
    )
    start = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=D)
    ddn.solve(problem, {"c": torch.zeros(5, dtype=D)}, initial=start, solver=solver)

    generator = torch.Generator().manual_seed(seed)
    M = 3 * torch.eye(10, dtype=D) + torch.randn(10, 10, generator=generator, dtype=D)
    t = torch.rand(10, generator=generator, dtype=D)

    def F(x: torch.Tensor) -> torch.Tensor:
        return M @ x + x**2 + x * x.roll(1)

    determined = ddn.Problem(
        {"x": (10,)},
        {"c": (10,), "r": (10,)},
        lambda x, c: c @ x,
        equality={"e": lambda x, r: F(x) - F(t) - r},
        bounds={"x": (0.0, None)},
    )
    c, r = (torch.zeros(10, dtype=D, requires_grad=True) for _ in range(2))
    s = ddn.solve(determined, {"c": c, "r": r}, initial=t + 0.1, solver=solver)
    by_c, by_r = torch.autograd.grad(s["x"].sum(), (c, r))
    assert s.certificate.ok
    assert by_c.abs().max() < 1e-12
    slope = torch.func.jacrev(F)(s["x"].detach())
    torch.testing.assert_close(by_r, torch.linalg.solve(slope.mT, torch.ones(10, dtype=D)))


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "newton"])
def test_equations_that_contradict_each_other_are_not_solved_where_they_are_steep(solver: str) -> None:
    """Meyer's data (NIST MGH10) as equations: where exponentials run off any violation is a tiny distance."""
    u = torch.linspace(50, 125, 16, dtype=D)
    data = [
        34780,
        28610,
        23650,
        19630,
        16370,
        13720,
        11540,
        9744,
        8261,
        7030,
        6005,
        5147,
        4427,
        3820,
        3307,
        2872,
    ]
    problem = ddn.Problem(
        {"x": (3,)},
        {"y": (16,)},
        lambda x: 0 * x.sum(),
        equality={"e": lambda x, y: x[0] * torch.exp(x[1] / (u + x[2])) - y},
    )
    for start in ([0.02, 4000.0, 250.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ddn.SolveError):
            ddn.solve(
                problem,
                {"y": torch.tensor(data, dtype=D)},
                initial=torch.tensor(start, dtype=D),
                solver=solver,
            )


def test_a_nonconvex_qp_that_is_unbounded_is_not_solved_at_1e20() -> None:
    """Beside numbers of 1e20 no force counted: OPTIMAL, with a stationarity of one."""
    problem = ddn.Problem(
        {"u": (2,)}, {"c": (2,)}, lambda u, c: c @ u + u[0] * u[1], bounds={"u": (0.0, None)}
    )
    policy = ddn.Policy(on_failure="mask")
    s = ddn.solve(problem, {"c": -torch.ones(2, dtype=D)}, policy=policy)
    assert not s.converged
