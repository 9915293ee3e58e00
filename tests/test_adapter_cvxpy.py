"""CVXPY as a backend: known solutions, signs of multipliers, routes to an expression, refusals."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_adapters.cvxpy_ import CVXPYAdapter
from ddn_solvers.adapter import Batch, Instance, Options, Point
from ddn_solvers.errors import BackendCannotSolve, BackendNotInstalled, FallbackWarning, ProblemError
from ddn_solvers.lowering.to_cvxpy import AffineForm, Models, QuadraticForm, convexity
from ddn_solvers.problem import Problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.solution import Status

METHODS = ("CLARABEL", "OSQP", "HIGHS", "SCS")
A = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)


def instance(
    problem: Problem, *parameters: Any, method: str = "CLARABEL", warm: Point | None = None, **options: Any
) -> Instance:
    program = compile_program(problem)
    flat = tuple(np.ravel(np.asarray(p, dtype=float)) for p in parameters)
    lower, upper = (side[0] for side in program.bounds(flat))
    initial = np.clip(np.zeros(program.variables.size), lower, upper)
    native = options.pop("native", {})
    return Instance(program, flat, lower, upper, initial, method, Options(native=native, **options), warm)


def solve(problem: Problem, *parameters: Any, **kwargs: Any) -> tuple[Instance, Point]:
    case = instance(problem, *parameters, **kwargs)
    return case, attempt(case)


def attempt(case: Instance) -> Point:
    """As the core asks for one sample."""
    each = [p[None] for p in case.parameters]
    bounds = case.lower[None], case.upper[None], case.initial[None]
    (point,) = CVXPYAdapter().solve_batch(
        Batch(case.program, tuple(each), *bounds, case.method, case.options, [case.warm_start])
    )
    return point


def assert_kkt(case: Instance, point: Point, tolerance: float = 1e-6) -> None:
    """Stationarity, feasibility, signs and complementarity, all by the signs of ``problem.py``."""
    assert point.status is Status.OPTIMAL, point
    z = point.primal
    for dual in (point.inequality, point.lower, point.upper):
        assert dual is not None
        assert (dual >= -tolerance).all()
    assert point.equality is not None
    assert point.lower is not None
    assert point.upper is not None
    gradient = case.gradient(z) - point.lower + point.upper
    gradient = gradient + case.equality_jacobian(z).T @ point.equality
    gradient = gradient + case.inequality_jacobian(z).T @ point.inequality
    assert np.abs(gradient).max() < tolerance
    assert np.abs(case.equality(z)).max(initial=0.0) < tolerance
    g = case.inequality(z)
    assert g.max(initial=-1.0) < tolerance
    assert np.abs(g * point.inequality).max(initial=0.0) < tolerance
    for bound, dual in ((case.lower, point.lower), (case.upper, point.upper)):
        finite = np.isfinite(bound)
        assert np.abs((z - bound)[finite] * dual[finite]).max(initial=0.0) < tolerance
        assert (dual[~finite] == 0).all()


PROJECTION = Problem(
    variables={"u": (3,)},
    parameters={"x": (3,), "r": ()},
    objective=lambda u, x: 0.5 * (u - x).square().sum(),
    equality={"plane": lambda u: u.sum() - 1},
    inequality={"ball": lambda u, r: u.square().sum() - r**2},
    bounds={"u": (None, "x")},
)
QP = Problem(
    variables={"u": (2,), "v": ()},
    parameters={"x": (2,)},
    objective=lambda u, v, x: 0.5 * (u - x).square().sum() + 0.5 * v**2 - v,
    equality=lambda u, v: u.sum() + v - 2,
    inequality={"first": lambda u: u[0] - 0.25, "rest": lambda u, v: torch.stack([v - 3, -u[1] - 5])},
    bounds={"u": (-1.0, None), "v": (None, 0.5)},
)


@pytest.mark.parametrize("method", ["CLARABEL", "SCS"])
def test_projection_onto_a_ball(method: str) -> None:
    case, point = solve(PROJECTION, [1.0, 2.0, -0.5], 1.3, method=method)
    assert_kkt(case, point)
    models = case.program.memo("cvxpy", lambda: Models(case.program))
    model = models.find(case.parameters, case.lower, case.upper)
    assert not model.forms
    assert not model.fallback


@pytest.mark.parametrize("method", METHODS)
def test_multipliers_have_our_signs(method: str) -> None:
    case, point = solve(QP, [2.0, -4.0], method=method)
    assert_kkt(case, point)
    # Bounds fix v = 0.5 and the constraint u0 = 0.25; the plane gives u1.
    np.testing.assert_allclose(point.primal, [0.25, 1.25, 0.5], atol=1e-7)
    np.testing.assert_allclose(point.equality, [-5.25], atol=1e-6)
    np.testing.assert_allclose(point.inequality, [7.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(point.upper, [0.0, 0.0, 5.75], atol=1e-6)
    np.testing.assert_allclose(point.lower, 0.0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_active_lower_bound(method: str) -> None:
    problem = Problem(
        variables={"u": (2,)},
        parameters={"c": (2,)},
        objective=lambda u, c: (c * u).sum(),
        bounds={"u": (0.5, 2.0)},
    )
    case, point = solve(problem, [3.0, -1.0], method=method)
    assert_kkt(case, point)
    np.testing.assert_allclose(point.primal, [0.5, 2.0], atol=1e-7)
    np.testing.assert_allclose(point.lower, [3.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(point.upper, [0.0, 1.0], atol=1e-6)


def test_coinciding_and_infinite_bounds() -> None:
    problem = Problem(
        variables={"u": (3,)},
        parameters={"low": (3,), "high": (3,)},
        objective=lambda u: (u - torch.tensor([1.0, 2.0, 3.0]).double()).square().sum(),
        bounds={"u": ("low", "high")},
    )
    program = compile_program(problem)
    for low, high, expected in (
        ([0.5, -np.inf, -np.inf], [0.5, 1.0, np.inf], [0.5, 1.0, 3.0]),
        ([-np.inf, 4.0, 3.5], [np.inf, 4.0, 9.0], [1.0, 4.0, 3.5]),
    ):
        parameters = (np.array(low), np.array(high))
        case = Instance(program, parameters, *parameters, np.zeros(3), "CLARABEL")
        point = attempt(case)
        assert_kkt(case, point)
        np.testing.assert_allclose(point.primal, expected, atol=1e-8)


SMOOTH = {
    "log-sum-exp": (
        Problem(
            variables={"u": (3,)},
            parameters={"x": (3,)},
            objective=lambda u, x: torch.logsumexp(A @ u, 0) - (x * u).sum() + 0.1 * u.square().sum(),
        ),
        ([0.1, 0.2, 0.3],),
    ),
    "entropy on the simplex": (
        Problem(
            variables={"u": (3,)},
            parameters={"x": (3,)},
            objective=lambda u, x: (u * torch.log(u)).sum() - (x * u).sum(),
            equality=lambda u: u.sum() - 1,
        ),
        ([0.1, 0.2, 1.3],),
    ),
    "weighted logistic": (
        Problem(
            variables={"u": (3,)},
            parameters={"x": (4,), "w": ()},
            objective=lambda u, x, w: (
                w * torch.nn.functional.softplus(-(A @ u) * x).sum() + 0.1 * u.square().sum()
            ),
        ),
        ([1.0, -1.0, 1.0, 1.0], 2.0),
    ),
    "parametric quadratic form": (
        Problem(
            variables={"u": (3,)},
            parameters={"B": (3, 3), "x": (3,)},
            objective=lambda u, B, x: u @ (B.T @ B) @ u + (u - x).exp().sum(),
        ),
        (np.arange(9.0).reshape(3, 3) / 5, [1.0, 2.0, 0.5]),
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_convex_problems(name: str) -> None:
    problem, parameters = SMOOTH[name]
    case, point = solve(problem, *parameters)
    assert_kkt(case, point, 1e-5)


def test_lasso_and_a_weight_that_changes_sign() -> None:
    problem = Problem(
        variables={"u": (3,)},
        parameters={"x": (4,), "lam": ()},
        objective=lambda u, x, lam: 0.5 * (A @ u - x).square().sum() + u.square().sum() + lam * u.abs().sum(),
    )
    _, point = solve(problem, [1.0, 2.0, -1.0, 0.5], 50.0)
    np.testing.assert_allclose(point.primal, 0.0, atol=1e-6)
    _, point = solve(problem, [1.0, 2.0, -1.0, 0.5], 0.0)
    H = A.numpy().T @ A.numpy() + 2 * np.eye(3)
    np.testing.assert_allclose(
        point.primal, np.linalg.solve(H, A.numpy().T @ [1.0, 2.0, -1.0, 0.5]), atol=1e-6
    )
    with pytest.raises(
        BackendCannotSolve, match=r"objective: 'add'.*neither convex nor concave.*casadi:ipopt"
    ):
        solve(problem, [1.0, 2.0, -1.0, 0.5], -1.0)
    _, point = solve(problem, [1.0, 2.0, -1.0, 0.5], 50.0)
    np.testing.assert_allclose(point.primal, 0.0, atol=1e-6)


def coefficients_problem() -> Problem:
    """A convex problem that the composition rule does not see, with a quadratic and an affine row in one."""
    return Problem(
        variables={"u": (2,)},
        parameters={"a": (), "x": (2,)},
        objective=lambda u, a, x: (
            (u[0] + u[1]) * (u[0] + u[1] - x[0]) + a * u[0] * u[0] + u[1] * u[1] - x[1] * u[1]
        ),
        equality=lambda u, a: a * (u[0] - a * u[1]) - 0.5,
        inequality=lambda u, a: torch.stack([u[0] * u[0] + u[0] * u[1] + u[1] * u[1] - a, u[0] - 5]),
    )


def test_quadratics_by_their_coefficients() -> None:
    problem = coefficients_problem()
    for a in (2.0, 3.0, 3.0, 2.0):  # the second Hessian differs from the first: then it is a parameter
        case = instance(problem, a, [1.0, -6.0])
        assert_kkt(case, attempt(case))
    models = case.program.memo("cvxpy", lambda: Models(case.program))
    (built,) = models._models.values()
    assert len(built) == 2
    assert not built[-1].fallback
    assert built[-1].problem("CLARABEL").is_dpp()


def test_affine_functions_by_their_coefficients() -> None:
    """What the expressions do not show: an operation without an entry, a quadratic whose squares cancel."""
    problem = Problem(
        variables={"u": (2,)},
        parameters={"x": (2,)},
        objective=lambda u, x: ((u - x) * (u + x) - u * u).sum() + (x * u).sum(),
        equality=lambda u, x: torch.linalg.solve_triangular(torch.diag(x), u[:, None], upper=True)[:1, 0] - 1,
        bounds={"u": (-3.0, 3.0)},
    )
    for x in ([2.0, -1.0], [-0.5, 4.0]):
        case, point = solve(problem, x)
        assert_kkt(case, point)
        np.testing.assert_allclose(point.primal, [x[0], -3.0 * np.sign(x[1])], atol=1e-7)
    models = case.program.memo("cvxpy", lambda: Models(case.program))
    assert [type(form) for form in models.find(case.parameters, case.lower, case.upper).forms] == [
        QuadraticForm,
        AffineForm,
    ]


def test_indefinite_quadratic_is_refused_with_its_eigenvalue() -> None:
    with pytest.raises(BackendCannotSolve, match=r"objective is quadratic and not convex: .*eigenvalue -"):
        solve(coefficients_problem(), -3.0, [1.0, 1.0])


def test_nonconvex_is_refused_with_term_and_alternative() -> None:
    problem = Problem(
        variables={"u": (2,)},
        objective=lambda u: u.square().sum(),
        inequality={"wave": lambda u: torch.sin(u).sum()},
    )
    with pytest.raises(
        BackendCannotSolve, match=r"inequality\['wave'\]: 'sin' at test_adapter_cvxpy.py:.*ipopt"
    ):
        solve(problem)
    outside = Problem(
        variables={"u": (2,)}, objective=lambda u: u.sum(), inequality={"out": lambda u: 1 - u.exp().sum()}
    )
    with pytest.raises(BackendCannotSolve, match=r"inequality\['out'\]: it is concave and has to be convex"):
        solve(outside)
    curved = Problem(
        variables={"u": (2,)},
        objective=lambda u: u.sum(),
        equality={"circle": lambda u: u.square().sum() - 1},
    )
    with pytest.raises(BackendCannotSolve, match=r"equality\['circle'\]: it is convex and has to be affine"):
        solve(curved)


def test_not_dpp_canonicalises_every_call_and_warns_once() -> None:
    problem = Problem(
        variables={"u": (2,)},
        parameters={"a": (), "b": ()},
        objective=lambda u, a, b: a * (b * u.exp().sum() + u.square().sum()) - u.sum(),
    )
    case = instance(problem, 2.0, 0.5)
    with pytest.warns(FallbackWarning, match="at every call: .* in objective"):
        assert_kkt(case, attempt(case), 1e-5)
    batch = Batch(case.program, (np.array([[1.0], [2.0]]), np.array([0.5])), *np.zeros((3, 2, 2)), "CLARABEL")
    free = Batch(
        batch.program, batch.parameters, batch.lower - np.inf, batch.upper + np.inf, batch.initial, "CLARABEL"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        points = CVXPYAdapter().solve_batch(free)
    assert [w.category for w in caught] == [FallbackWarning]
    np.testing.assert_allclose(points[1].primal, _point_of(case), atol=1e-6)


def _point_of(case: Instance) -> Any:
    with pytest.warns(FallbackWarning):
        return attempt(case).primal


@pytest.mark.parametrize("method", METHODS)
def test_infeasible_and_unbounded(method: str) -> None:
    infeasible = Problem(
        variables={"u": (2,)},
        objective=lambda u: u.sum(),
        inequality=lambda u: torch.stack([u.sum() + 1, 1 - u.sum()]),
        bounds={"u": (-9.0, 9.0)},
    )
    _, point = solve(infeasible, method=method)
    assert point.status is Status.INFEASIBLE
    assert point.primal.shape == (2,)
    unbounded = Problem(variables={"u": (2,)}, objective=lambda u: u.sum(), bounds={"u": (None, 0.0)})
    _, point = solve(unbounded, method=method)
    assert point.status in (Status.UNBOUNDED, Status.INFEASIBLE)


def test_limits_are_translated() -> None:
    _, point = solve(QP, [2.0, -4.0], method="CLARABEL", max_iter=2)
    assert point.status is Status.ITERATION_LIMIT
    assert point.iterations == 2
    _, point = solve(QP, [2.0, -4.0], method="OSQP", tolerance=1e-2, time_limit=10.0)
    assert point.status is Status.OPTIMAL


@pytest.mark.parametrize("method", METHODS)
def test_unknown_options_are_named(method: str) -> None:
    with pytest.raises(ProblemError, match=f"option 'turbo' is not one that cvxpy:{method} accepts"):
        solve(QP, [2.0, -4.0], method=method, native={"turbo": 9})


@pytest.mark.parametrize("method", METHODS)
def test_samples_stand_alone_and_warm_starts_are_taken(method: str) -> None:
    _, alone = solve(QP, [2.0, -4.0], method=method)
    solve(QP, [-1.0, 1.0], method=method)
    _, again = solve(QP, [2.0, -4.0], method=method)
    np.testing.assert_array_equal(alone.primal, again.primal)
    case, warm = solve(QP, [2.0, -4.0], method=method, warm=alone)
    assert_kkt(case, warm)


def test_cones_are_refused_by_quadratic_solvers() -> None:
    with pytest.raises(BackendCannotSolve, match=r"OSQP does not take this problem's cones.*CLARABEL"):
        solve(PROJECTION, [1.0, 2.0, -0.5], 1.0, method="OSQP")


def test_other_solvers_are_found_at_run_time() -> None:
    adapter = CVXPYAdapter()
    assert adapter.method("SCIPY") is not None
    assert adapter.method("clarabel") is None
    assert adapter.method("NOSUCH") is None
    with pytest.raises(BackendNotInstalled, match=r"pip install .cvxpy\[NAG\]"):
        adapter.method("NAG")


@pytest.mark.parametrize("method", METHODS)
def test_without_constraints(method: str) -> None:
    problem = Problem(
        variables={"u": (2,)}, parameters={"x": (2,)}, objective=lambda u, x: (u - x).square().sum()
    )
    case, point = solve(problem, [3.0, -1.0], method=method)
    assert_kkt(case, point)


def test_feasibility_problem() -> None:
    problem = Problem(variables={"u": (2,)}, equality=lambda u: u.sum() - 1, inequality=lambda u: u[0] - 0.2)
    case, point = solve(problem)
    assert_kkt(case, point)


def test_undefined_parameter_expressions_fail_by_name() -> None:
    problem = Problem(
        variables={"u": (2,)}, parameters={"x": ()}, objective=lambda u, x: (u - torch.log(x)).square().sum()
    )
    _, point = solve(problem, -1.0)
    assert point.status is Status.NUMERICAL_ERROR
    assert "'log'" in point.message


def test_graphs_that_are_not_compiled_are_taken() -> None:
    """CVXPY has the sum of the largest entries; the compiled functions know no ``nonzero`` positions."""
    problem = Problem(
        variables={"u": (3,)},
        parameters={"x": (3,)},
        objective=lambda u, x: torch.topk(u - x.sort().values, 2).values.sum() + u.square().sum(),
        equality=lambda u: u.sum() - 1,
    )
    case, point = solve(problem, [0.3, -0.2, 0.1])
    assert_value = case.objective(point.primal)
    assert point.status is Status.OPTIMAL
    generator = np.random.default_rng(0)
    for _ in range(50):
        other = point.primal + 0.01 * generator.standard_normal(3)
        assert case.objective(other + (1 - other.sum()) / 3) >= assert_value - 1e-9


def branching(u: torch.Tensor) -> torch.Tensor:
    return u.sum() if u.sum() > 0 else -u.sum()


def test_callbacks_are_refused() -> None:
    problem = Problem(variables={"u": (2,)}, objective=branching, bounds={"u": (-1.0, 1.0)})
    with (
        pytest.warns(FallbackWarning, match="cannot be compiled"),
        pytest.raises(BackendCannotSolve, match="only torch can evaluate"),
    ):
        ddn.solve(problem, {}, solver="cvxpy")


@pytest.mark.parametrize(
    ("problem", "convex", "reason"),
    [
        (PROJECTION, True, "canonicalised once"),
        (QP, True, "canonicalised once"),
        (
            Problem(
                variables={"u": (2,)}, parameters={"lam": ()}, objective=lambda u, lam: lam * u.exp().sum()
            ),
            False,
            "objective: 'mul' at .*'lam.*' of unknown sign",
        ),
        (
            Problem(variables={"u": (2,)}, objective=lambda u: (1 / u).sum(), bounds={"u": (0.0, None)}),
            True,
            "canonicalised once",
        ),
        (
            Problem(variables={"u": (2,)}, objective=lambda u: u[0] * u[0] + u[0] * u[1] + u[1] * u[1]),
            True,
            "by its Hessian",
        ),
        (
            Problem(variables={"u": (2,)}, objective=lambda u: u[0] * u[1]),
            False,
            r"quadratic and not convex: its matrix has the eigenvalue -1",
        ),
        (
            Problem(
                variables={"u": (2,)},
                parameters={"x": (2,)},
                objective=lambda u, x: x.square().sum() * (x.exp().sum() * u.exp().sum() + u.square().sum()),
            ),
            True,
            "canonicalised at every call for objective",
        ),
        (Problem(variables={"u": (2,)}, objective=branching), False, "torch callbacks"),
    ],
)
def test_convexity_for_explain(problem: Problem, convex: bool, reason: str) -> None:
    program: Program = compile_program(problem)
    found = convexity(program)
    assert found.convex is convex
    assert re.search(reason, found.reason), found.reason


SPELLINGS = {  # convex quadratics beside a kink, as people write them
    "(u-b)@S@(u-b)": lambda u, S, b, w: (u - b) @ S @ (u - b),
    "(u-b)@(u-b)": lambda u, S, b, w: (u - b) @ (u - b),
    ".5*u@u": lambda u, S, b, w: 0.5 * u @ u - b @ u,
    "w*u@u": lambda u, S, b, w: w * u @ u - b @ u,
    "w*u@S@u": lambda u, S, b, w: w * u @ S @ u - b @ u,
    "einsum i,i->": lambda u, S, b, w: torch.einsum("i,i->", u, u) - b @ u,
    "weighted squares": lambda u, S, b, w: (b.exp() * u * u).sum() - b @ u,
    "slices": lambda u, S, b, w: u[:2] @ u[:2] + u[2].square() - b @ u,
    "rows": lambda u, S, b, w: sum(torch.outer(b, u)[t] @ S @ torch.outer(b, u)[t] for t in range(2)) - b @ u,
    "sqrt of a form": lambda u, S, b, w: (u @ S @ u).sqrt() + 2 * (u - 3).square().sum(),
}


@pytest.mark.filterwarnings("ignore::ddn_solvers.FallbackWarning")
@pytest.mark.parametrize("name", SPELLINGS)
def test_quadratics_as_people_write_them(name):
    """A kink makes the problem no QP, so that CVXPY's rules have to see that they are convex."""
    f = SPELLINGS[name]
    problem = ddn.Problem(
        {"u": (3,)},
        {"S": (3, 3), "b": (3,), "w": ()},
        lambda u, S, b, w: f(u, S, b, w) + 0.1 * (u - b).abs().sum(),
    )
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {
        "S": root @ root.mT + torch.eye(3, dtype=torch.float64),
        "b": torch.tensor([0.5, -1.0, 0.8], dtype=torch.float64),
        "w": torch.tensor(0.7, dtype=torch.float64),
    }
    start = torch.ones(3, dtype=torch.float64)
    found, wanted = (
        ddn.solve(problem, given, solver=solver, initial=start)["u"] for solver in ("cvxpy:CLARABEL", "auto")
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
