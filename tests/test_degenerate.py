"""Singular KKT systems: the pseudo-inverse against dense algebra, and every way to get one, end to end."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.kkt import curvature as curvature_module
from ddn_solvers.kkt import polish as polish_module
from ddn_solvers.kkt.degenerate import Degenerate
from ddn_solvers.kkt.system import System

D = torch.float64
NLP = ["casadi:ipopt", "scipy:SLSQP"]
CONVEX = [*NLP, "cvxpy:CLARABEL"]
# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def known_bug(*values: Any, reason: str) -> Any:
    """A case that is wrong on the branch point; strict, so that mending it calls for removing this mark."""
    return pytest.param(*values, marks=pytest.mark.xfail(reason=reason, strict=True))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=generator(seed))


def close(found: torch.Tensor, expected: Any, atol: float = 1e-8) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=D), rtol=1e-8, atol=atol)


def quietly(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """A call in which a degenerate derivative is what is wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)
        return function(*arguments, **keywords)


def jacobian_of(solution: ddn.Solution, parameter: torch.Tensor, name: str = "u") -> torch.Tensor:
    """(*shape of the variable, *shape of the parameter), row by row in reverse mode."""
    rows = [
        quietly(torch.autograd.grad, entry, parameter, retain_graph=True)[0]
        for entry in solution[name].reshape(-1)
    ]
    return torch.stack(rows).reshape(*solution[name].shape, *parameter.shape)


def re_solved(
    problem: ddn.Problem, parameters: dict[str, torch.Tensor], wrt: str, solver: str
) -> torch.Tensor:
    """Central differences of tight re-solves."""
    value, step, columns = parameters[wrt].detach(), 1e-5, []
    for i in range(value.numel()):
        ends = []
        for sign in (1, -1):
            moved = value.clone()
            moved.view(-1)[i] += sign * step
            ends.append(quietly(ddn.solve, problem, {**parameters, wrt: moved}, solver=solver)["u"])
        columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(columns, -1).reshape(*columns[0].shape, *value.shape).detach()


# -- the system itself --------------------------------------------------------------------------------


def singular_system(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A semidefinite H with flat directions, dependent rows, and a bound that repeats one: n = 12, m = 6."""
    n = 12
    root = randn(n, n - 5, seed=seed)
    jacobian = randn(6, n, seed=seed + 100)
    jacobian[3] = jacobian[0] - 2 * jacobian[1]
    jacobian[4] = 0.0
    jacobian[4, 2] = 3.0  # the same as the bound of variable 2
    active = torch.tensor([True, True, True, True, True, False])
    fixed = torch.zeros(n, dtype=torch.bool)
    fixed[2] = True
    return (root @ root.T)[None], jacobian[None], active[None], fixed[None]


def dense_matrix(
    hessian: torch.Tensor, jacobian: torch.Tensor, active: torch.Tensor, fixed: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """[H A^T; A 0] of one sample with the active bounds as rows of the identity; rows of c that are active."""
    n = hessian.shape[-1]
    border = torch.cat([jacobian[0, active[0]], torch.eye(n, dtype=D)[fixed[0]]])
    zero = torch.zeros(len(border), len(border), dtype=D)
    whole = torch.cat([torch.cat([hessian[0], border.T], 1), torch.cat([border, zero], 1)])
    return whole, int(active.sum())


@pytest.mark.parametrize("seed", range(4))
def test_semidefinite_systems_get_the_moore_penrose_inverse(seed: int) -> None:
    system = singular_system(seed)
    _, _, active, fixed = system
    matrix, rows = dense_matrix(*system)
    n = 12
    a, b, v = randn(1, n, seed=1), randn(1, 6, seed=2), randn(1, n, seed=3)
    step = Degenerate(*system).solve(a, b, v)
    rhs = torch.cat([a[0], b[0, active[0]], v[0, fixed[0]]])
    # The pseudo-inverse of the whole matrix is the formula's on consistent sides; make them so.
    rhs = matrix @ torch.linalg.pinv(matrix, rtol=1e-11) @ rhs
    b[0, active[0]], v[0, fixed[0]] = rhs[n : n + rows], rhs[n + rows :]
    step = Degenerate(*system).solve(rhs[None, :n], b, v)
    expected = torch.linalg.pinv(matrix, rtol=1e-11) @ rhs
    close(step.x[0], expected[:n])
    close(step.t[0, active[0]], expected[n : n + rows])
    close(-step.q[0, fixed[0]], expected[n + rows :])
    assert (step.t[0, ~active[0]] == 0).all()
    assert (step.q[0, ~fixed[0]] == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_solution_operator_is_symmetric(seed: int) -> None:
    """So that vjp and jvp agree, on inconsistent right-hand sides too and for an indefinite H."""
    _, jacobian, active, fixed = singular_system(seed)
    root = randn(12, 12, seed=seed)
    hessian = (root + root.T)[None]
    operator = Degenerate(hessian, jacobian, active, fixed)

    def flat(rhs: torch.Tensor) -> torch.Tensor:
        step = operator.solve(rhs[None, :12], rhs[None, 12:18], rhs[None, 18:])
        return torch.cat([step.x[0], step.t[0], -step.q[0]])

    matrix = torch.stack([flat(unit) for unit in torch.eye(30, dtype=D)], dim=1)
    close(matrix, matrix.T, atol=1e-10)


@pytest.mark.parametrize("row", [1.0, 1e3, 1e8])
@pytest.mark.parametrize("seed", range(3))
def test_fixed_variables_leave_the_system_and_change_nothing(seed: int, row: float) -> None:
    """Two thirds of the variables at bounds, sides that contradict each other: A^+ of all rows, written out."""
    n, m = 24, 9
    root, J, unit = randn(n, n, seed=seed), randn(m, n, seed=seed + 10), torch.ones(m, dtype=D)
    J[3], J[5], unit[4] = J[0] - J[1], 0.0, row
    H, J, fixed, active = root + root.T, unit[:, None] * J, torch.arange(n) % 3 != 0, torch.arange(m) != 7
    a, b, v = (randn(size, seed=seed + 20) for size in (n, m, n))
    step = Degenerate(H[None], J[None], active[None], fixed[None]).solve(a[None], (unit * b)[None], v[None])

    A, sides = torch.cat([J[active], torch.eye(n, dtype=D)[fixed]]), torch.cat([(unit * b)[active], v[fixed]])
    norms = A.norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1.0)
    weight = (1e-6 * norms.max() / norms).clamp(min=1.0)  # as if no row were below a millionth of the largest
    inverse = torch.linalg.pinv(weight[:, None] * A, rtol=1e-13) * weight
    P = torch.eye(n, dtype=D) - torch.linalg.pinv(A / norms[:, None], rtol=1e-6) @ (A / norms[:, None])
    x = inverse @ sides
    x = x + torch.linalg.pinv(P @ H @ P, atol=1e-10, hermitian=True) @ P @ (a - H @ x)
    t, count = norms * (inverse.T @ (a - H @ x)), int(active.sum())
    close(step.x[0], x)
    close(step.t[0, active] * norms[:count], t[:count])
    close(-step.q[0, fixed], t[count:])


@pytest.mark.parametrize("consistent", [True, False])
def test_more_rows_than_variables_are_least_squares(consistent: bool) -> None:
    n, m = 5, 9
    rows, hessian = randn(1, m, n), torch.eye(n, dtype=D)[None]
    b = (rows @ randn(n, 1, seed=1))[..., 0] if consistent else randn(1, m, seed=1)
    everything, nothing = torch.ones(1, m, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool)
    step = System(hessian, rows, everything, nothing).solve(
        randn(1, n, seed=2), b, torch.zeros(1, n, dtype=D)
    )
    close(step.x[0], torch.linalg.lstsq(rows[0], b[0]).solution, atol=1e-11)


@pytest.mark.parametrize("objective", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("row", [1e-6, 1e-4, 1e4, 1e6, 1e8])
def test_units_of_objective_and_rows_do_not_decide_the_rank(objective: float, row: float) -> None:
    """One independent row in another unit, next to a repeated one: x stays what it is."""
    n = 8
    root = randn(n, n)
    hessian, rows = (root @ root.T)[None], randn(1, 3, n, seed=1)
    rows[0, 1] = rows[0, 0]
    b = randn(1, 3, seed=2)
    b[0, 1] = b[0, 0]
    a, zero = randn(1, n, seed=3), torch.zeros(1, n, dtype=D)
    everything, nothing = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool)
    unit = torch.tensor([1.0, 1.0, row], dtype=D)
    system = System(objective * hessian, rows * unit[:, None], everything, nothing)
    assert system.singular.all()
    step = system.solve(objective * a, b * unit, zero)
    independent = System(hessian, rows[:, 1:], everything[:, 1:], nothing).solve(a, b[:, 1:], zero)
    close(step.x, independent.x)
    close(step.t[0, 2] * row / objective, independent.t[0, 1])
    close(
        step.t[0, 0] / objective, step.t[0, 1] / objective, atol=1e-7
    )  # the square of the rows' ratio, times eps


def test_the_pseudo_inverse_is_differentiable_to_second_order() -> None:
    """Along H and right-hand sides that keep the rank; under vmap too."""
    _, jacobian, active, fixed = singular_system(0)
    basis = torch.linalg.qr(randn(12, 7, seed=5))[0]  # flat directions stay where they are

    def solved(inner: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        hessian = basis @ (inner @ inner.mT + torch.eye(7, dtype=D)) @ basis.T
        operator = Degenerate(hessian[None], jacobian, active, fixed)
        step = operator.solve(a[None], torch.ones(1, 6, dtype=D), torch.ones(1, 12, dtype=D))
        return torch.cat([step.x[0], step.t[0]])

    inner, a = randn(7, 7, seed=6).requires_grad_(), randn(12, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(solved, (inner, a))
    assert torch.autograd.gradgradcheck(solved, (inner, a))
    batch = torch.stack([a.detach(), 2 * a.detach(), randn(12, seed=8)])
    together = torch.func.vmap(torch.func.jacrev(solved, argnums=1), in_dims=(None, 0))(inner.detach(), batch)
    alone = torch.stack([torch.func.jacrev(solved, argnums=1)(inner.detach(), one) for one in batch])
    close(together, alone, atol=1e-12)


@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6])
def test_proximal_solves_the_system_with_delta_on_the_null_space(delta: float) -> None:
    """Which is that of H + delta I wherever A x is given: min over x on A x = b."""
    n = 6
    hessian = torch.zeros(1, n, n, dtype=D)
    hessian[0, 0, 0], hessian[0, 1, 1] = 2.0, 3.0
    row = torch.tensor([[[1.0, 1.0, 0, 0, 0, 1.0]]], dtype=D)
    everything, nothing = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool)
    a, b, zero = randn(1, n), torch.zeros(1, 1, dtype=D), torch.zeros(1, n, dtype=D)
    step = System(hessian, row, everything, nothing, proximal=delta).solve(a, b, zero)
    expected = System(hessian + delta * torch.eye(n, dtype=D), row, everything, nothing).solve(a, b, zero)
    torch.testing.assert_close(step.x, expected.x, rtol=1e-8, atol=1e-10 * expected.x.abs().max().item())


# -- dependent rows, end to end -------------------------------------------------------------------------


def nearest(**constraints: Any) -> ddn.Problem:
    """The projection of x in R^3, with constraints that depend on x[0] through d."""
    return ddn.Problem(
        variables={"u": (3,)},
        parameters={"x": (3,), "d": ()},
        objective=lambda u, x: 0.5 * (u - x).square().sum(),
        **constraints,
    )


DEPENDENT = {
    "repeated equality": (
        nearest(equality=[lambda u, d: u.sum() - d, lambda u, d: u.sum() - d]),
        nearest(equality=lambda u, d: u.sum() - d),
    ),
    "redundant equality in another unit": (
        nearest(
            equality=[
                lambda u, d: u[0] + u[1] - d,
                lambda u, d: 1e4 * (u[1] - u[2] - 2 * d),
                lambda u, d: u[0] + u[2] + d,
            ]
        ),
        nearest(equality=[lambda u, d: u[0] + u[1] - d, lambda u, d: u[1] - u[2] - 2 * d]),
    ),
    "repeated inequality": (
        nearest(inequality=[lambda u, d: u.sum() - d, lambda u, d: 3 * u.sum() - 3 * d]),
        nearest(inequality=lambda u, d: u.sum() - d),
    ),
    "inequality along an equality": (
        nearest(equality=lambda u, d: u.sum() - d, inequality=lambda u, d: u.sum() - d),
        nearest(equality=lambda u, d: u.sum() - d),
    ),
    "constraint along a bound": (
        nearest(inequality=lambda u, d: 2 * u[1] - 2 * d, bounds={"u": (None, lambda d: d.expand(3))}),
        nearest(bounds={"u": (None, lambda d: d.expand(3))}),
    ),
}


@pytest.mark.parametrize("solver", CONVEX)
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_rows_move_the_solution_as_the_independent_ones_do(name: str, solver: str) -> None:
    problem, independent = DEPENDENT[name]
    x, d = (
        torch.tensor([1.0, 2.0, 3.0], dtype=D, requires_grad=True),
        torch.tensor(0.5, dtype=D, requires_grad=True),
    )
    found = ddn.solve(problem, {"x": x, "d": d}, solver=solver)
    expected = ddn.solve(independent, {"x": x, "d": d}, solver=solver)
    close(found["u"], expected["u"].detach())
    for parameter in (x, d):
        close(jacobian_of(found, parameter), jacobian_of(expected, parameter))
    assert found.certificate.rank_deficiency == 1
    assert not found.certificate.licq
    assert found.certificate.singular


@pytest.mark.parametrize("solver", CONVEX)
def test_repeated_rows_share_their_multiplier_equally(solver: str) -> None:
    """Rows a and 3 a of minimum norm: multipliers 1 : 3."""
    problem = DEPENDENT["repeated inequality"][0]
    x = torch.tensor([1.0, 2.0, 3.0], dtype=D)
    solution = ddn.solve(problem, {"x": x, "d": 0.5}, solver=solver)
    force = (6 - 0.5) / 3
    close(solution.dual.inequality["inequality0"], force / 10)
    close(solution.dual.inequality["inequality1"], 3 * force / 10)


@pytest.mark.parametrize("solver", ["casadi:ipopt"])  # SLSQP stops at dependent equalities, and says so
@pytest.mark.parametrize("k", [2, 3])
def test_orthogonal_frames_with_all_k_squared_equations(k: int, solver: str) -> None:
    """Nearest frame to X, written with U^T U = I (symmetric: K (K - 1) / 2 rows too many): X = U S V^T gives U V^T."""
    n = 4
    problem = ddn.Problem(
        variables={"u": (n, k)},
        parameters={"X": (n, k)},
        objective=lambda u, X: 0.5 * (u - X).square().sum(),
        equality=lambda u: u.T @ u - torch.eye(k, dtype=u.dtype),
    )
    x = randn(n, k, seed=3).requires_grad_()

    def polar(x: torch.Tensor) -> torch.Tensor:
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        return left @ right

    start = polar(x.detach()) + 0.1 * randn(n, k, seed=4)
    solution = ddn.solve(problem, {"X": x}, solver=solver, initial=start)
    close(solution["u"], polar(x.detach()), atol=1e-9)
    close(jacobian_of(solution, x), torch.autograd.functional.jacobian(polar, x.detach()))
    assert solution.certificate.rank_deficiency == k * (k - 1) // 2
    multipliers = solution.dual.equality["equality0"].detach()
    close(multipliers, multipliers.T)  # the two copies of a row share


def transport(entropic: bool) -> ddn.Problem:
    def objective(p: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        cost = (C * p).sum()
        return cost + 0.3 * (p * p.log()).sum() if entropic else cost

    return ddn.Problem(
        variables={"u": (3, 4)},
        parameters={"C": (3, 4), "r": (3,), "c": (4,)},
        objective=lambda u, C: objective(u, C),
        equality={"rows": lambda u, r: u.sum(1) - r, "columns": lambda u, c: u.sum(0) - c},
        bounds={"u": (0.0, None)},
    )


def transport_data() -> dict[str, torch.Tensor]:
    return {
        "C": torch.rand(3, 4, dtype=D, generator=generator(1)),
        "r": torch.tensor([0.25, 0.35, 0.4], dtype=D),
        "c": torch.tensor([0.1, 0.22, 0.3, 0.38], dtype=D),
    }


@pytest.mark.parametrize("solver", ["casadi:ipopt", "cvxpy:CLARABEL"])  # SLSQP solves neither, and says so
@pytest.mark.parametrize("entropic", [True, False])
def test_the_redundant_marginal_of_a_transport_problem(entropic: bool, solver: str) -> None:
    """Against the same problem without its last marginal, along changes that keep the sums equal."""
    data = {k: v.requires_grad_() for k, v in transport_data().items()}
    start = torch.full((3, 4), 1 / 12, dtype=D)
    found = ddn.solve(transport(entropic), data, solver=solver, initial=start)
    full = transport(entropic)
    fewer = ddn.Problem(
        variables=full.variables,
        parameters=full.parameters,
        objective=full.objective,
        equality={"rows": lambda u, r: u.sum(1) - r, "columns": lambda u, c: (u.sum(0) - c)[:3]},
        bounds={"u": (0.0, None)},
    )
    expected = ddn.solve(fewer, data, solver=solver, initial=start)
    close(found["u"], expected["u"].detach(), atol=1e-7)
    close(jacobian_of(found, data["C"]), jacobian_of(expected, data["C"]), atol=1e-6)
    direction = torch.tensor([1.0, -2.0, 1.5], dtype=D), torch.tensor([0.3, -0.4, 0.1, 0.5], dtype=D)
    moved, reference = (
        jacobian_of(s, data["r"]) @ direction[0] + jacobian_of(s, data["c"]) @ direction[1]
        for s in (found, expected)
    )
    close(moved, reference, atol=1e-6)
    assert found.certificate.rank_deficiency >= 1


# -- multipliers that are not unique ----------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP"])
@pytest.mark.parametrize("order", ["ball first", "plane first"])
def test_of_two_tangent_constraints_the_curvature_that_binds(order: str, solver: str) -> None:
    """max u1 + p u2 with |u|^2 <= 1 and u1 <= 1 at (1, 0): the ball moves it, du2/dp = 1."""
    constraints = {"ball": lambda u: u.square().sum() - 1, "plane": lambda u: u[0] - 1}
    if order == "plane first":
        constraints = dict(reversed(constraints.items()))
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"p": ()},
        objective=lambda u, p: -u[0] - p * u[1],
        inequality=constraints,
    )
    p = torch.zeros((), dtype=D, requires_grad=True)
    solution = ddn.solve(problem, {"p": p}, solver=solver, initial=torch.tensor([0.5, 0.1], dtype=D))
    close(solution["u"], [1.0, 0.0], atol=1e-7)
    close(jacobian_of(solution, p), [0.0, 1.0], atol=1e-6)
    close(solution.dual.inequality["ball"], 0.5, atol=1e-6)
    close(solution.dual.inequality["plane"], 0.0, atol=1e-6)


def test_two_tangent_balls_bend_as_the_smaller() -> None:
    """Radii 1 and 2 touching at (1, 0): the inner one is the feasible set."""
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"p": ()},
        objective=lambda u, p: -u[0] - p * u[1],
        inequality={
            "large": lambda u: (u[0] + 1) ** 2 + u[1] ** 2 - 4,
            "small": lambda u: u.square().sum() - 1,
        },
    )
    found = ddn.sensitivity(problem, {"p": torch.zeros((), dtype=D)}, torch.tensor([1.0, 0.0], dtype=D))
    close(quietly(found.jacobian, "u", "p"), [0.0, 1.0])


# -- more constraints than variables, feasibility -----------------------------------------------------------


@pytest.mark.parametrize("consistent", [True, False])
def test_more_active_constraints_than_variables(consistent: bool) -> None:
    """Four lines through one point of the plane; moved apart, the least squares answer of A Dy = -C."""
    rows = randn(4, 2, seed=2)
    shifts = rows @ torch.tensor([[1.0, 0.5], [2.0, -1.0]], dtype=D) if consistent else randn(4, 2, seed=3)
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"t": (2,)},
        objective=lambda u: 0.5 * u.square().sum(),
        equality=lambda u, t: rows @ u - shifts @ t,
    )
    found = ddn.sensitivity(problem, {"t": torch.zeros(2, dtype=D)}, torch.zeros(2, dtype=D))
    jacobian = quietly(found.jacobian, "u", "t")
    close(jacobian, torch.linalg.lstsq(rows, shifts).solution)
    tangent = torch.tensor([0.3, -0.7], dtype=D)
    close(quietly(found.jvp, {"t": tangent})["u"], jacobian @ tangent)
    assert found.certificate.rank_deficiency == 2


@pytest.mark.parametrize("solver", NLP)
def test_a_sum_of_squares_is_detected_and_reported(solver: str) -> None:
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"x": (2,)},
        equality=lambda u, x: (u - x).square().sum(),
    )
    x = torch.tensor([1.0, -2.0], dtype=D)
    found = ddn.sensitivity(problem, {"x": x}, x)
    assert not found.certificate.ok
    assert not found.certificate.licq
    with pytest.warns(ddn.DegeneracyWarning):
        found.vjp({"u": torch.ones(2, dtype=D)})


@pytest.mark.parametrize("branch", [1.0, -1.0])
@pytest.mark.parametrize("solver", NLP)
def test_both_branches_of_equation_33(branch: float, solver: str) -> None:
    problem = ddn.Problem(
        variables={"u": ()}, parameters={"x": ()}, equality=lambda u, x: (u - 1) ** 2 - x**2
    )
    x = torch.tensor(0.7, dtype=D, requires_grad=True)
    start = torch.tensor(1 + branch * 0.9, dtype=D)
    solution = ddn.solve(problem, {"x": x}, solver=solver, initial=start)
    close(solution["u"], 1 + branch * 0.7)
    close(torch.autograd.grad(solution["u"], x)[0], branch)


def test_equation_33_at_zero_is_reported() -> None:
    problem = ddn.Problem(
        variables={"u": ()}, parameters={"x": ()}, equality=lambda u, x: (u - 1) ** 2 - x**2
    )
    found = ddn.sensitivity(problem, {"x": torch.zeros((), dtype=D)}, torch.ones((), dtype=D))
    assert not found.certificate.ok
    assert not found.certificate.licq
    with pytest.raises(ddn.SensitivityError):
        ddn.sensitivity(
            problem,
            {"x": torch.zeros((), dtype=D)},
            torch.ones((), dtype=D),
            policy=ddn.Policy(on_singular="raise"),
        ).vjp({"u": torch.ones((), dtype=D)})


@pytest.mark.parametrize("solver", NLP)
def test_an_under_determined_feasibility_problem_moves_by_minimum_norm(solver: str) -> None:
    """-A^+ C at the point that was found."""
    problem = ddn.Problem(
        variables={"u": (4,)},
        parameters={"x": (2,)},
        equality=lambda u, x: torch.stack([u.square().sum() - x[0], u[0] * u[1] - u[2] - x[1]]),
    )
    x = torch.tensor([3.0, 0.2], dtype=D, requires_grad=True)
    start = torch.tensor([1.0, 0.5, 0.3, 1.0], dtype=D)
    solution = ddn.solve(problem, {"x": x}, solver=solver, initial=start)
    u = solution["u"].detach()
    border = torch.stack(
        [2 * u, torch.stack([u[1], u[0], -torch.ones((), dtype=D), torch.zeros((), dtype=D)])]
    )
    close(jacobian_of(solution, x), torch.linalg.pinv(border))
    flat = solution.certificate.null_space[0]
    assert flat.shape == (4, 2)
    close(border @ flat, torch.zeros(2, 2))


# -- flat directions ------------------------------------------------------------------------------------------


def quaternion(sphere: bool) -> ddn.Problem:
    """Equation 36, as it stands and (37) on the unit sphere."""
    return ddn.Problem(
        variables={"u": (4,)},
        parameters={"x": (4,)},
        objective=lambda u, x: -(x @ u) if sphere else -(x @ u) / u.norm(),
        equality=(lambda u: u.square().sum() - 1) if sphere else None,
    )


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_the_unnormalised_quaternion(alpha: float) -> None:
    """Equation 38 at y = alpha x; (37) at alpha = 1 / |x|; the flat direction is x itself."""
    x = randn(4, seed=9)
    projection = torch.eye(4, dtype=D) - torch.outer(x, x) / x.square().sum()
    found = ddn.sensitivity(quaternion(False), {"x": x}, alpha * x)
    close(quietly(found.jacobian, "u", "x"), alpha * projection)
    flat = found.certificate.null_space[0][:, 0]
    close(flat @ x.div(x.norm()) * torch.sign(flat @ x), 1.0)
    on_sphere = ddn.sensitivity(quaternion(True), {"x": x}, x / x.norm())
    close(on_sphere.jacobian("u", "x"), projection / x.norm())
    assert on_sphere.certificate.ok


@pytest.mark.parametrize("solver", CONVEX)
def test_flat_directions_beside_constraints_move_by_minimum_norm(solver: str) -> None:
    """1/2 (a u - x)^2 on a plane, n = 4: the pseudo-inverse of the bordered matrix."""
    row, plane = randn(4, seed=1), randn(4, seed=2)
    problem = ddn.Problem(
        variables={"u": (4,)},
        parameters={"x": (), "d": ()},
        objective=lambda u, x: 0.5 * (row @ u - x) ** 2,
        equality=lambda u, d: plane @ u - d,
    )
    x, d = (torch.tensor(value, dtype=D, requires_grad=True) for value in (0.8, -0.3))
    solution = ddn.solve(problem, {"x": x, "d": d}, solver=solver)
    pseudo = torch.linalg.pinv(
        torch.stack([row, plane])
    )  # dz of minimum norm with row dz = dx, plane dz = dd
    close(jacobian_of(solution, x), pseudo[:, 0])
    close(jacobian_of(solution, d), pseudo[:, 1])
    assert solution.certificate.null_space[0].shape == (4, 2)
    assert solution.certificate.licq
    assert not solution.certificate.sosc


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_objectives_unit_changes_no_pseudo_inverse(scale: float) -> None:
    row = randn(4, seed=1)
    problem = ddn.Problem(
        variables={"u": (4,)},
        parameters={"x": ()},
        objective=lambda u, x: scale * 0.5 * (row @ u - x) ** 2,
        equality=[lambda u: u[0] - u[1], lambda u: 2 * u[0] - 2 * u[1]],
    )
    reduced = torch.stack([row, torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=D)])
    start = torch.linalg.pinv(reduced)[:, 0] * 0.8
    found = ddn.sensitivity(problem, {"x": torch.tensor(0.8, dtype=D)}, start)
    close(quietly(found.jacobian, "u", "x"), torch.linalg.pinv(reduced)[:, 0])


# -- every mode, every batch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["casadi:ipopt", "cvxpy:CLARABEL", "scipy:SLSQP"])
def test_regular_samples_of_a_mixed_batch_are_exact(solver: str) -> None:
    """Weights w of (w u - x)^2: zero makes a sample flat; the others are as if alone."""
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"w": (2,), "x": (2,)},
        objective=lambda u, w, x: 0.5 * (w * u - x).square().sum(),
        equality=lambda u, x: u.sum() - x[0],
    )
    w = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.5]], dtype=D, requires_grad=True)
    x = torch.tensor([[1.0, 0.3], [0.7, -0.2], [0.1, 1.0]], dtype=D, requires_grad=True)
    weights = torch.tensor([0.4, 1.3], dtype=D)
    solution = ddn.solve(problem, {"w": w, "x": x}, solver=solver)
    together = quietly(torch.autograd.grad, (solution["u"] @ weights).sum(), (w, x))
    assert solution.certificate.singular.tolist() == [False, True, False]
    for i in (0, 2):
        one = [t[i].detach().requires_grad_() for t in (w, x)]
        alone = ddn.solve(problem, dict(zip(("w", "x"), one, strict=True)), solver=solver)
        expected = torch.autograd.grad(alone["u"] @ weights, one)
        for found, reference in zip(together, expected, strict=True):
            torch.testing.assert_close(found[i], reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DEPENDENT)
def test_vjp_jvp_and_torch_func_agree_where_rows_are_dependent(name: str) -> None:
    problem = DEPENDENT[name][0]
    x, d = torch.tensor([1.0, 2.0, 3.0], dtype=D), torch.tensor(0.5, dtype=D)
    # 1.0 is inside the bound at 0.5 plus nothing: the point of each is found by a backend once.
    point = ddn.solve(problem, {"x": x, "d": d}, solver="scipy:SLSQP")["u"]
    found = ddn.sensitivity(problem, {"x": x, "d": d}, point)
    jacobian = quietly(found.jacobian, "u", "x")
    columns = [quietly(found.jvp, {"x": unit})["u"] for unit in torch.eye(3, dtype=D)]
    close(torch.stack(columns, -1), jacobian)

    def solved(x: torch.Tensor) -> torch.Tensor:
        return ddn.solve(problem, {"x": x, "d": d}, solver="scipy:SLSQP")["u"]

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(quietly(transform(solved), x), jacobian)


@pytest.mark.parametrize("solver", ["casadi:ipopt"])
def test_second_derivatives_where_rows_are_dependent(solver: str) -> None:
    """The sphere written twice: y = x / |x|, to second order."""
    problem = ddn.Problem(
        variables={"u": (3,)},
        parameters={"x": (3,)},
        objective=lambda u, x: 0.5 * (u - x).square().sum(),
        equality=[lambda u: u.square().sum() - 1, lambda u: 2 * u.square().sum() - 2],
    )
    x, weights = torch.tensor([0.6, -1.1, 0.8], dtype=D), torch.tensor([1.0, 0.5, -0.3], dtype=D)

    def value(x: torch.Tensor) -> torch.Tensor:
        start = x.detach() if not torch._C._functorch.is_functorch_wrapped_tensor(x) else None
        initial = torch.tensor([0.5, -0.6, 0.4], dtype=D) if start is None else start
        return (ddn.solve(problem, {"x": x}, solver=solver, initial=initial)["u"] * weights).sum()

    def exact(x: torch.Tensor) -> torch.Tensor:
        return (x / x.norm() * weights).sum()

    close(
        quietly(torch.autograd.functional.hessian, value, x),
        torch.autograd.functional.hessian(exact, x),
        1e-7,
    )
    close(quietly(torch.func.hessian(value), x), torch.autograd.functional.hessian(exact, x), 1e-7)


@pytest.mark.parametrize("policy", ["least_squares", "raise", "proximal"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "dependent"])
def test_what_each_policy_does_with_a_singular_system(policy: str, flat: bool) -> None:
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"x": ()},
        objective=(lambda u, x: 0.5 * (u[0] - x) ** 2) if flat else lambda u, x: 0.5 * (u - x).square().sum(),
        equality=None if flat else [lambda u, x: u[1] - x, lambda u, x: 2 * u[1] - 2 * x],
    )
    found = ddn.sensitivity(
        problem,
        {"x": torch.tensor(1.0, dtype=D)},
        torch.ones(2, dtype=D),
        policy=ddn.Policy(on_singular=policy),
    )
    if policy == "raise":
        with pytest.raises(ddn.SensitivityError):
            found.jacobian("u", "x")
        return
    jacobian = quietly(found.jacobian, "u", "x")
    close(jacobian, [1.0, 0.0] if flat else [1.0, 1.0], atol=1e-5 if policy == "proximal" else 1e-10)


def test_random_redundant_equalities_match_their_independent_part() -> None:
    """n = 20, five rows and seven combinations of them, one row far out of scale."""
    n = 20
    base, mixing, root = randn(5, n, seed=1), randn(7, 5, seed=2), randn(n, n, seed=3)
    rows = torch.cat([base, mixing @ base])
    rows[3] *= 1e5
    sides = torch.cat([torch.eye(5, dtype=D), mixing])
    sides[3] *= 1e5
    quadratic = root @ root.T + torch.eye(n, dtype=D)
    full, reduced = (
        ddn.Problem(
            variables={"u": (n,)},
            parameters={"x": (n,), "b": (5,)},
            objective=lambda u, x: 0.5 * u @ quadratic @ u - x @ u,
            equality=lambda u, b, k=k: rows[:k] @ u - sides[:k] @ b,
        )
        for k in (12, 5)
    )
    data = {"x": randn(n, seed=4), "b": randn(5, seed=5)}
    bordered = torch.cat(
        [torch.cat([quadratic, base.T], 1), torch.cat([base, torch.zeros(5, 5, dtype=D)], 1)]
    )
    point = torch.linalg.solve(bordered, torch.cat([data["x"], data["b"]]))[:n]
    found, expected = (ddn.sensitivity(p, data, point) for p in (full, reduced))
    for wrt in data:
        close(quietly(found.jacobian, "u", wrt), expected.jacobian("u", wrt))
    assert found.certificate.rank_deficiency == 7


@pytest.mark.parametrize("pair", list(itertools.product([1e-3, 1.0, 1e3], repeat=2)), ids=str)
def test_dependent_rows_in_any_units_end_to_end(pair: tuple[float, float]) -> None:
    problem = nearest(equality=[lambda u, d: pair[0] * (u.sum() - d), lambda u, d: pair[1] * (u.sum() - d)])
    x, d = torch.tensor([1.0, 2.0, 3.0], dtype=D), torch.tensor(0.5, dtype=D)
    found = ddn.sensitivity(problem, {"x": x, "d": d}, x - (x.sum() - d) / 3)
    close(quietly(found.jacobian, "u", "x"), np.eye(3) - 1 / 3)
    close(quietly(found.jacobian, "u", "d"), np.full(3, 1 / 3))


@pytest.mark.parametrize(
    ("solver", "units"),
    [
        ("casadi:ipopt", (1.0, 1.0)),
        ("casadi:ipopt", (1e-3, 1e3)),
        ("scipy:SLSQP", (1.0, 1.0)),
        ("scipy:SLSQP", (1e-3, 1e3)),
    ],
)
def test_a_repeated_inequality_that_carries_no_force(solver: str, units: tuple[float, float]) -> None:
    """SLSQP gives the whole multiplier to one of two equal balls: the other is weakly active and dependent."""
    problem = ddn.Problem(
        variables={"u": (3,)},
        parameters={"x": (3,)},
        objective=lambda u, x: 0.5 * (u - x).square().sum(),
        inequality=[lambda u, k=k: k * (u.square().sum() - 1) for k in units],
    )
    x = torch.tensor([1.6, -1.1, 0.8], dtype=D, requires_grad=True)
    solution = ddn.solve(problem, {"x": x}, solver=solver, initial=torch.tensor([0.5, -0.3, 0.4], dtype=D))
    n = (x / x.norm()).detach()
    close(solution["u"], n)
    with pytest.warns(ddn.DegeneracyWarning):
        (gradient,) = torch.autograd.grad(solution["u"][0], x)
    close(gradient, (torch.eye(3, dtype=D) - torch.outer(n, n))[0] / x.norm().detach())


@pytest.mark.parametrize(
    "steep", [1.0, 1e4, 1e8, known_bug(1e12, reason="flat is measured against all of H")]
)
def test_a_steep_direction_that_is_fixed_hides_no_curvature(steep: float) -> None:
    """H = diag(steep, 1), u[0] given twice: du[1]/dx[1] = 1 whatever the curvature along u[0]."""
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"x": (2,)},
        objective=lambda u, x: 0.5 * steep * (u[0] - x[0]) ** 2 + 0.5 * (u[1] - x[1]) ** 2,
        equality=[lambda u, x: u[0] - x[0], lambda u, x: 2 * u[0] - 2 * x[0]],
    )
    x = torch.tensor([1.0, 2.0], dtype=D)
    found = ddn.sensitivity(problem, {"x": x}, x)
    close(quietly(found.jacobian), torch.eye(2))
    assert found.certificate.null_space[0].shape == (2, 0)


@pytest.mark.parametrize("kind", ["inequality", "equality"])
@pytest.mark.parametrize("solver", ["auto", "newton", "casadi:ipopt", "scipy:SLSQP"])
def test_complementarity_as_a_constraint_has_no_false_solutions(solver: str, kind: str) -> None:
    """0 <= u, 0 <= v, u v <= 0: next to v = 0 a multiplier of 1e13 balances any force on u."""
    pairs: dict[str, Any] = {kind: {"one": lambda u, v: u * v}}
    problem = ddn.Problem(
        {"u": (3,), "v": (3,)},
        {"x": (3,), "y": (3,)},
        lambda u, v, x, y: (u - x).square().sum() + (v - y).square().sum(),
        bounds={"u": (0.0, None), "v": (0.0, None)},
        **pairs,
    )
    x, y = 2 * randn(10, 3, seed=1), 2 * randn(10, 3, seed=2)
    found = ddn.solve(problem, {"x": x, "y": y}, solver=solver, policy=ddn.Policy(on_failure="mask"))
    u, v = (
        torch.stack([(found[name] - target.clamp(min=0)).abs(), found[name].abs()]).detach()
        for name, target in (("u", x), ("v", y))
    )
    one = (torch.maximum(u[0], v[1]) < 1e-6) | (torch.maximum(u[1], v[0]) < 1e-6)
    assert one.all(-1)[found.converged].all()
    if solver == "auto":
        assert found.converged.sum() >= 9
        assert "casadi" in found.stats.backend


# -- work that is done once, or not at all --------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """A list that grows with each call of a module's function."""
    calls: list[None] = []
    original = getattr(module, name)

    def counting(*arguments: Any, **more: Any) -> Any:
        calls.append(None)
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_a_vertex_of_a_degenerate_lp_is_not_polished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simplex method leaves it exact; each Newton step would cost the singular values of the batch."""
    steps = counted(monkeypatch, polish_module, "_newton_step")
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,)},
        lambda u, x: u @ x,
        equality=lambda u: u.sum() - 1,
        inequality=lambda u: u[0] - 1,
        bounds={"u": (0.0, 1.0)},
    )
    x = torch.tensor([[-1.0, 2.0, 3.0], [-2.0, 1.0, 0.5]], dtype=torch.float64)
    solution = ddn.solve(problem, {"x": x}, solver="highs")
    assert solution.certificate.singular.all()
    torch.testing.assert_close(solution["u"], torch.tensor([[1.0, 0, 0]] * 2, dtype=torch.float64))
    assert not steps


def test_singular_values_are_taken_of_what_no_bound_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assignment of six to six has six variables in its basis: forward, backward and certificate."""
    shapes: list[tuple[int, ...]] = []
    for module, name in ((np.linalg, "svd"), (torch.linalg, "pinv")):
        original = getattr(module, name)

        def noting(matrix: Any, *more: Any, original: Any = original, **options: Any) -> Any:
            shapes.append(tuple(matrix.shape[-2:]))
            return original(matrix, *more, **options)

        monkeypatch.setattr(module, name, noting)
    k = 6
    ways = ddn.Problem(
        {"u": (k, k)},
        {"x": (k, k)},
        lambda u, x: (u * x).sum(),
        equality=[lambda u: u.sum(0) - 1, lambda u: u.sum(1) - 1],
        bounds={"u": (0.0, 1.0)},
    )
    x = randn(3, k, k).requires_grad_()
    solution = ddn.solve(ways, {"x": x}, solver="highs")
    with pytest.warns(ddn.DegeneracyWarning):
        solution["u"].square().sum().backward()
    assert solution.certificate.singular.all()
    assert (solution["u"].round() == solution["u"]).all()
    assert shapes
    assert all(min(shape) <= 2 * k for shape in shapes)


def test_a_regular_sample_needs_no_pseudo_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """One singular sample of eight had those of all made."""
    batches: list[int] = []
    original = torch.linalg.pinv

    def noting(matrix: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        batches.append(len(matrix))
        return original(matrix, *more, **options)

    monkeypatch.setattr(torch.linalg, "pinv", noting)
    n, m, batch = 6, 2, 8
    rows = randn(batch, m, n)
    rows[3, 1] = rows[3, 0]
    hessian, everything = torch.eye(n, dtype=D).repeat(batch, 1, 1), torch.ones(batch, m, dtype=torch.bool)
    nothing = torch.zeros(batch, n, dtype=torch.bool)
    system = System(hessian, rows, everything, nothing)
    step = system.solve(randn(batch, n, seed=1), randn(batch, m, seed=2), torch.zeros(batch, n, dtype=D))
    assert system.singular.tolist() == [i == 3 for i in range(batch)]
    assert step.x.isfinite().all()
    assert set(batches) == {1}


def test_the_bordered_matrices_of_a_sparse_batch_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were made for the whole batch again for each sample of it."""
    made = counted(monkeypatch, curvature_module, "_unit")
    problem = ddn.Problem(
        {"u": (250,)},
        {"x": (250,)},
        lambda u, x: (u - x).square().sum() + (u[1:] - u[:-1]).cosh().sum(),
        inequality=lambda u: u[::50] - 0.1,
    )
    x = torch.randn(6, 250, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert ddn.solve(problem, {"x": x}, solver="casadi:ipopt").converged.all()
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore::ddn_solvers.DegeneracyWarning")
@pytest.mark.parametrize("n", [1, 8, 9, 20])
def test_minima_that_are_flat_in_all_variables_have_no_derivative(n: int) -> None:
    """Of sum (u - 1)^4: curvature of 1e-13 in all of them has nothing to be compared with."""
    problem = ddn.Problem({"u": (n,)}, {"c": (n,)}, lambda u, c: ((u - 1) ** 4).sum() + c @ u)
    start = torch.full((n,), 1.5, dtype=D)
    solution = ddn.solve(problem, {"c": torch.zeros(n, dtype=D)}, initial=start)
    assert not solution.certificate.ok


@pytest.mark.filterwarnings("ignore::ddn_solvers.DegeneracyWarning")
@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP", "newton"])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_in_multipliers_is_no_curvature(seed: int, solver: str) -> None:
    """min u_0 >= 1, other variables tied by nonlinear equations that the objective does not press on: no saddle."""
    n, m = 12, 4
    generator = torch.Generator().manual_seed(seed)
    M, t = (
        torch.randn(m, n - 1, generator=generator, dtype=D),
        torch.rand(n - 1, generator=generator, dtype=D),
    )

    def rows(u: torch.Tensor) -> torch.Tensor:
        v = u[1:]
        return M @ v + 0.5 * (v * v.roll(1))[:m] + u[0] * v[:m].sin()

    right = rows(torch.cat([torch.ones(1, dtype=D), t]))
    least = torch.tensor([1.0] + [-5.0] * (n - 1), dtype=D)
    problem = ddn.Problem(
        {"u": (n,)},
        {"r": (m,)},
        lambda u: u[0],
        equality={"e": lambda u, r: rows(u) - right - r},
        bounds={"u": (least, 5.0)},
    )
    start = torch.cat([torch.full((1,), 1.5, dtype=D), t + 0.1])
    solution = ddn.solve(problem, {"r": torch.zeros(m, dtype=D)}, initial=start, solver=solver)
    assert solution["u"][0] == 1.0
