"""The barrier-smoothed derivative against closed forms, against dense algebra, and in the limit."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.kkt.conditions import smoothed

D = torch.float64
# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

TAUS = [1e-1, 1e-3, 1e-6]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=D), rtol=0, atol=atol)


RELU = ddn.Problem(
    {"u": (20,)}, {"x": (20,)}, lambda u, x: 0.5 * (u - x).square().sum(), bounds={"u": (0.0, None)}
)
ROWS = ddn.Problem(  # the same with rows in place of bounds
    {"u": (20,)}, {"x": (20,)}, lambda u, x: 0.5 * (u - x).square().sum(), inequality=lambda u: -u
)


def barrier(x: torch.Tensor, tau: float) -> torch.Tensor:
    """argmin 1/2 (u - x)^2 - tau log u, which the pair (s', l') of the exact solution happens to be."""
    return (x + (x.square() + 4 * tau).sqrt()) / 2


# -- the pair -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1e-12, 1e-6, 1e-2])
def test_the_pair_lies_on_the_hyperbola_with_the_same_difference(tau: float) -> None:
    """Also where s - l cancels: no digit is lost from 1e-8 to 1e8."""
    slack = torch.cat([torch.logspace(-8, 8, 17, dtype=D), torch.zeros(18, dtype=D)])
    multiplier = torch.cat([torch.zeros(18, dtype=D), torch.logspace(-8, 8, 17, dtype=D)])
    s, force = smoothed(slack, multiplier, tau)
    torch.testing.assert_close(s * force, torch.full_like(s, tau), rtol=1e-12, atol=0)
    torch.testing.assert_close(s - force, slack - multiplier, rtol=1e-12, atol=1e-12)
    assert (s > 0).all()
    assert (force > 0).all()


# -- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("problem", [RELU, ROWS], ids=["bounds", "rows"])
def test_relu_is_the_derivative_of_the_barrier_problem(problem: ddn.Problem, tau: float) -> None:
    """vjp, jvp, both backward passes and torch.func, with an entry at the kink; a half there."""
    x = randn(20, seed=1)
    x[0] = 0.0
    expected = (1 + x / (x.square() + 4 * tau).sqrt()) / 2
    policy = ddn.Policy(smoothing=tau)
    found = ddn.sensitivity(problem, {"x": x}, x.clamp_min(0), policy=policy)
    d = randn(20, seed=2)
    close(found.vjp({"u": d})["x"], expected * d)
    close(found.jvp({"x": d})["u"], expected * d)
    close(found.jacobian(), torch.diag(expected))

    def solved(x: torch.Tensor) -> torch.Tensor:
        return ddn.solve(problem, {"x": x}, policy=policy)["u"]

    close(solved(x), x.clamp_min(0))  # the point stays exact
    leaf = x.clone().requires_grad_()
    for create_graph in (False, True):
        (gradient,) = torch.autograd.grad(solved(leaf) @ d, leaf, create_graph=create_graph)
        close(gradient.detach(), expected * d)
    close(torch.func.jvp(solved, (x,), (d,))[1], expected * d)
    close(torch.func.jacrev(solved)(x), torch.diag(expected))
    close(torch.func.jacfwd(solved)(x), torch.diag(expected))


@pytest.mark.parametrize("tau", TAUS)
def test_the_second_derivative_is_that_of_the_barrier_problem(tau: float) -> None:
    """s - l moves as x does, so differentiating the smoothed derivative gives 2 tau / (x^2 + 4 tau)^(3/2)."""
    x = torch.linspace(-1, 1, 20, dtype=D)

    def total(x: torch.Tensor) -> torch.Tensor:
        return ddn.solve(RELU, {"x": x}, policy=ddn.Policy(smoothing=tau))["u"].sum()

    expected = torch.diag(2 * tau * (x.square() + 4 * tau) ** -1.5)
    atol = 1e-10 * expected.max().item()
    close(torch.autograd.functional.hessian(total, x), expected, max(atol, 1e-10))
    close(torch.func.hessian(total)(x), expected, max(atol, 1e-10))


@pytest.mark.parametrize("tau", TAUS)
def test_a_box_has_both_of_its_barriers(tau: float) -> None:
    """du/dx = 1 / (1 + l'/s' of the lower + r'/s' of the upper side); the bounds' own derivatives with it."""
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,), "a": (3,), "b": (3,)},
        lambda u, x: 0.5 * (u - x).square().sum(),
        bounds={"u": ("a", "b")},
    )
    x = torch.tensor([-2.0, 0.3, 1.7], dtype=D)
    a, b = -torch.ones(3, dtype=D), torch.ones(3, dtype=D)
    u = x.clamp(-1, 1)
    found = ddn.sensitivity(problem, {"x": x, "a": a, "b": b}, u, policy=ddn.Policy(smoothing=tau))

    def stiffness(slack: torch.Tensor, force: torch.Tensor) -> torch.Tensor:
        d = slack - force
        s = (d + (d.square() + 4 * tau).sqrt()) / 2
        return tau / s.square()

    lower, upper = stiffness(u - a, (u - x).clamp_min(0)), stiffness(b - u, (x - u).clamp_min(0))
    whole = 1 + lower + upper
    for name, expected in (("x", 1 / whole), ("a", lower / whole), ("b", upper / whole)):
        close(found.jacobian("u", name), torch.diag(expected), 1e-9)


# -- dense algebra, n = 12 -------------------------------------------------------------------------------------


def curved() -> ddn.Problem:
    """Nonlinear rows, an equality and bounds; every kind of side strongly active, weak and loose."""
    return ddn.Problem(
        {"u": (12,)},
        {"x": (12,), "r": ()},
        lambda u, x: 0.5 * (u - x).square().sum() + 0.1 * u.pow(4).sum(),
        equality=lambda u: u[:3].sum() - 0.4,
        inequality={
            "ball": lambda u, r: u.square().sum() - r**2,
            "plane": lambda u, x: u[3] + u[4] - x[5] - 2,
        },
        bounds={"u": (-0.3, 0.8)},
    )


def dense_reference(x: torch.Tensor, r: torch.Tensor, s: ddn.Solution, tau: float) -> torch.Tensor:
    """d(u)/d(x, r) from the formula, in NumPy and by hand: nothing of the library."""
    u = s["u"].detach().numpy()
    ball, plane = (s.dual.inequality[k].item() for k in ("ball", "plane"))
    n, here, radius = 12, x.numpy(), r.item()
    slack = np.concatenate([[radius**2 - u @ u, here[5] + 2 - u[3] - u[4]], u + 0.3, 0.8 - u])
    force = np.concatenate(
        [[ball, plane], s.dual.lower["u"].detach().numpy(), s.dual.upper["u"].detach().numpy()]
    )
    d = slack - force
    big = (d + np.sqrt(d**2 + 4 * tau)) / 2
    small = (-d + np.sqrt(d**2 + 4 * tau)) / 2  # tau is large enough here for it not to cancel
    hessian = np.diag(1 + 1.2 * u**2 + 2 * small[0])
    rows = np.zeros((3 + 2 * n, n))
    rows[0, :3] = 1
    rows[1] = 2 * u
    rows[2, 3:5] = 1
    rows[3 : 3 + n], rows[3 + n :] = -np.eye(n), np.eye(n)
    corner = -np.diag(np.concatenate([[0.0], big / small]))
    matrix = np.block([[hessian, rows.T], [rows, corner]])
    rhs = np.zeros((len(matrix), n + 1))
    rhs[:n, :n] = np.eye(n)  # -d(grad L)/dx
    rhs[n + 1, n] = 2 * radius  # -d ball/dr
    rhs[n + 2, 5] = 1.0  # -d plane/dx
    return torch.from_numpy(np.linalg.solve(matrix, rhs)[:n])


@pytest.mark.parametrize("tau", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP"])
def test_a_nonlinear_problem_is_the_formula_term_by_term(tau: float, solver: str) -> None:
    x, r = randn(12, seed=2), torch.tensor(1.1, dtype=D)
    policy = ddn.Policy(smoothing=tau)
    leaves = x.clone().requires_grad_(), r.clone().requires_grad_()
    solution = ddn.solve(curved(), dict(zip("xr", leaves, strict=True)), solver=solver, policy=policy)
    assert solution.dual.inequality["ball"] > 0
    assert (solution.dual.lower["u"] > 0).any()
    expected = dense_reference(x, r, solution, tau)
    found = ddn.sensitivity(curved(), {"x": x, "r": r}, solution["u"].detach(), policy=policy)
    close(found.jacobian("u", "x"), expected[:, :12], 1e-8)
    close(found.jacobian("u", "r"), expected[:, 12], 1e-8)
    tangent = found.jvp({"x": x, "r": r})["u"]
    close(tangent, expected @ torch.cat([x, r[None]]), 1e-8)
    weights = randn(12, seed=3)
    for create_graph in (False, True):
        gradients = torch.autograd.grad(
            solution["u"] @ weights, leaves, retain_graph=True, create_graph=create_graph
        )
        close(gradients[0].detach(), weights @ expected[:, :12], 1e-8)
        close(gradients[1].detach(), weights @ expected[:, 12], 1e-8)


def test_forward_and_reverse_mode_agree_for_every_output() -> None:
    """Point, multipliers and the optimal value: <v, J d> = <J^T v, d>."""
    x, r, problem = randn(12, seed=2), torch.tensor(1.1, dtype=D), curved()
    ddn.solve(problem, {"x": x, "r": r}, solver="casadi:ipopt")  # traced outside of the transform

    def solved(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = ddn.solve(problem, {"x": x, "r": r}, solver="casadi:ipopt", policy=ddn.Policy(smoothing=1e-2))
        dual = (*s.dual.equality.values(), *s.dual.inequality.values(), *s.dual.lower.values())
        return s["u"], *dual, s.objective

    d = randn(12, seed=4), torch.tensor(0.3, dtype=D)
    values, tangents = torch.func.jvp(solved, (x, r), d)
    for i, (value, tangent) in enumerate(zip(values, tangents, strict=True)):
        v = randn(*value.shape, seed=5 + i)
        leaves = x.clone().requires_grad_(), r.clone().requires_grad_()
        gradients = torch.autograd.grad(solved(*leaves)[i], leaves, v)
        backward = sum((g * t).sum() for g, t in zip(gradients, d, strict=True))
        close((v * tangent).sum(), backward, 1e-9)


# -- the limit ---------------------------------------------------------------------------------------------------


def test_it_tends_to_the_exact_derivative_at_the_rate_of_tau() -> None:
    """Where strict complementarity holds the error is O(tau): a hundredth of it for a hundredth of tau."""
    x, r = randn(12, seed=2), torch.tensor(1.1, dtype=D)
    point = ddn.solve(curved(), {"x": x, "r": r}, solver="casadi:ipopt")["u"]
    exact = ddn.sensitivity(curved(), {"x": x, "r": r}, point)
    assert exact.certificate.strictly_complementary
    errors = []
    for tau in (1e-4, 1e-6, 1e-8, 1e-10):
        found = ddn.sensitivity(curved(), {"x": x, "r": r}, point, policy=ddn.Policy(smoothing=tau))
        errors.append((found.jacobian("u", "x") - exact.jacobian("u", "x")).abs().max().item())
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 1e-6
    assert all(50 < ratio < 200 for ratio in ratios[1:]), (errors, ratios)


@pytest.mark.parametrize("tau", [1e-2, 1e-8])
def test_a_weakly_active_side_is_halfway_whatever_tau(tau: float) -> None:
    """s' = l' = sqrt(tau), a corner entry of -1 for a row of unit norm: the mean of both sides of relu."""
    x = torch.zeros(20, dtype=D)
    found = ddn.sensitivity(RELU, {"x": x}, x, policy=ddn.Policy(smoothing=tau, weakly_active="raise"))
    close(found.jacobian(), 0.5 * torch.eye(20, dtype=D))


def test_samples_of_a_batch_are_smoothed_each_for_itself() -> None:
    x = randn(4, 20, seed=7)
    x[1, :5] = 0.0
    policy = ddn.Policy(smoothing=1e-3)
    together = ddn.sensitivity(RELU, {"x": x}, x.clamp_min(0), policy=policy).jacobian()
    for i in range(4):
        alone = ddn.sensitivity(RELU, {"x": x[i]}, x[i].clamp_min(0), policy=policy).jacobian()
        torch.testing.assert_close(together[i], alone, rtol=1e-13, atol=1e-14)


def test_equalities_are_not_smoothed() -> None:
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), equality=lambda u: u.sum() - 1
    )
    x = randn(3, seed=1)
    point = x - (x.sum() - 1) / 3
    found = ddn.sensitivity(problem, {"x": x}, point, policy=ddn.Policy(smoothing=0.1))
    close(found.jacobian(), np.eye(3) - 1 / 3)


# -- what stays degenerate though it is smoothed -----------------------------------------------------------------

STILL_SINGULAR = {
    "repeated equality": (
        {"equality": [lambda u, x: u[0] - x, lambda u, x: 2 * u[0] - 2 * x]},
        lambda u, x: 0.5 * (u - x).square().sum(),
        [1.0, 1.0],
    ),
    "flat direction": ({}, lambda u, x: 0.5 * (u[0] - x).square(), [1.0, 0.0]),
}


@pytest.mark.parametrize("name", STILL_SINGULAR)
def test_a_singular_system_is_no_less_singular_for_smoothing(name: str) -> None:
    """Equalities that depend on each other and flat directions: minimum norm and a warning, or refused."""
    constraints, objective, expected = STILL_SINGULAR[name]
    problem = ddn.Problem({"u": (2,)}, {"x": ()}, objective, **constraints)
    x, point = torch.ones((), dtype=D), torch.ones(2, dtype=D)
    found = ddn.sensitivity(problem, {"x": x}, point, policy=ddn.Policy(smoothing=1e-3))
    with pytest.warns(ddn.DegeneracyWarning):
        jacobian = found.jacobian("u", "x")
    close(jacobian, expected)
    with pytest.raises(ddn.SensitivityError):
        ddn.sensitivity(
            problem, {"x": x}, point, policy=ddn.Policy(smoothing=1e-3, on_singular="raise")
        ).jacobian("u", "x")


@pytest.mark.parametrize("tau", [1e-3, 1e-6])
def test_repeated_inequalities_are_regular_once_smoothed(tau: float) -> None:
    """Two rows of one multiplier between them: half of it each, and the limit is the independent one."""
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,)},
        lambda u, x: 0.5 * (u - x).square().sum(),
        inequality=[lambda u: u.sum() - 1, lambda u: u.sum() - 1],
    )
    x = torch.tensor([1.0, 2.0, 3.0], dtype=D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ddn.sensitivity(problem, {"x": x}, x - 5 / 3, policy=ddn.Policy(smoothing=tau))
        jacobian = found.jacobian()
    close(jacobian, np.eye(3) - 1 / 3, 10 * tau)
