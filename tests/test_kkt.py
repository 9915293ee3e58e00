"""The KKT module against the paper's formulas and against dense algebra, on random systems."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.arrays import without_symmetry
from ddn_solvers.dense_lu import inverses
from ddn_solvers.kkt.linear import SINGULAR, DenseLU, condition
from ddn_solvers.kkt.operator import Bordered, Dense
from ddn_solvers.kkt.system import System

D = torch.float64


def random_system(
    n: int, m: int, batch: int, seed: int, definite: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hessian, Jacobian, and masks with a different active set in each sample."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, n, n, dtype=D, generator=generator)
    hessian = root @ root.mT + torch.eye(n, dtype=D) if definite else root + root.mT
    jacobian = torch.randn(batch, m, n, dtype=D, generator=generator)
    active = torch.rand(batch, m, generator=generator) < 0.5
    fixed = torch.rand(batch, n, generator=generator) < 0.2
    return hessian, jacobian, active, fixed


@pytest.mark.parametrize("definite", [True, False])
def test_system_solves_the_bordered_equations_of_mixed_active_sets(definite: bool) -> None:
    n, m, batch = 20, 8, 5
    hessian, jacobian, active, fixed = random_system(n, m, batch, 0, definite)
    a, b, v = (torch.randn(batch, k, dtype=D) for k in (n, m, n))
    step = System(hessian, jacobian, active, fixed).solve(a, b, v)
    for i in range(batch):
        rows, free = active[i], ~fixed[i]
        stationarity = hessian[i] @ step.x[i] + jacobian[i].T @ step.t[i] - a[i]
        torch.testing.assert_close(
            stationarity[free], torch.zeros(int(free.sum()), dtype=D), atol=1e-9, rtol=0
        )
        torch.testing.assert_close(stationarity[fixed[i]], step.q[i][fixed[i]])
        torch.testing.assert_close((jacobian[i] @ step.x[i])[rows], b[i][rows], atol=1e-9, rtol=0)
        assert (step.t[i][~rows] == 0).all()
        torch.testing.assert_close(step.x[i][fixed[i]], v[i][fixed[i]])


def test_singular_samples_do_not_touch_regular_ones() -> None:
    """A repeated row makes one sample singular: minimum-norm multipliers there, the others exact."""
    n, m = 6, 3
    hessian, jacobian, _, _ = random_system(n, m, 2, 1)
    jacobian[1, 2] = jacobian[1, 1]
    active, fixed = torch.ones(2, m, dtype=torch.bool), torch.zeros(2, n, dtype=torch.bool)
    system = System(hessian, jacobian, active, fixed)
    assert system.singular.tolist() == [False, True]
    a, b = torch.randn(2, n, dtype=D), torch.randn(2, m, dtype=D)
    b[1, 2] = b[1, 1]
    step = system.solve(a, b, torch.zeros(2, n, dtype=D))
    alone = System(hessian[:1], jacobian[:1], active[:1], fixed[:1]).solve(
        a[:1], b[:1], torch.zeros(1, n, dtype=D)
    )
    torch.testing.assert_close(step.x[:1], alone.x, rtol=1e-12, atol=1e-12)
    reduced = System(hessian[1:], jacobian[1:, :2], active[1:, :2], fixed[1:])
    unique = reduced.solve(a[1:], b[1:, :2], torch.zeros(1, n, dtype=D))
    torch.testing.assert_close(step.x[1:], unique.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step.t[1, 1], step.t[1, 2])  # minimum norm shares the force equally


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-4, 10.0], ids=str)
def test_a_factorization_serves_nearby_points_exactly(distance: float) -> None:
    """Refined against the new matrix; too far away, factored anew."""
    hessian, jacobian, active, fixed = random_system(20, 8, 3, 7)
    other_hessian, other_jacobian, _, _ = random_system(20, 8, 3, 8)
    hessian_there, jacobian_there = hessian + distance * other_hessian, jacobian + distance * other_jacobian
    a, b, v = (torch.randn(3, k, dtype=D) for k in (20, 8, 20))
    moved = System(hessian, jacobian, active, fixed).moved(hessian_there, jacobian_there).solve(a, b, v)
    fresh = System(hessian_there, jacobian_there, active, fixed).solve(a, b, v)
    for found, expected in zip(vars(moved).values(), vars(fresh).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singularity_does_not_depend_on_the_objectives_unit(scale: float) -> None:
    hessian, jacobian, _, _ = random_system(10, 4, 1, 2)
    everything, nothing = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.bool)
    assert not System(scale * hessian, jacobian, everything, nothing).singular
    jacobian[0, 3] = 2 * jacobian[0, 0]
    assert System(scale * hessian, jacobian, everything, nothing).singular


@pytest.mark.parametrize("power", [0, 3, 6, 9])
def test_condition_estimate_is_within_a_small_factor(power: int) -> None:
    values = torch.logspace(0, -power, 30, dtype=D)
    basis, _ = torch.linalg.qr(torch.randn(30, 30, dtype=D, generator=torch.Generator().manual_seed(3)))
    matrix = (basis * values) @ basis.T
    solver, kept = DenseLU(), torch.ones(1, 30, dtype=torch.bool)
    K = Bordered.of(Dense(matrix[None]), Dense(torch.zeros(1, 0, 30, dtype=D)), kept)
    norm = matrix.abs().sum(-1).amax()[None]
    estimate = condition(
        solver,
        solver.init(K),
        kept,
        norm,
        torch.from_numpy(without_symmetry(kept.shape[-1])).expand(kept.shape),
    ).item()
    assert 10.0**power / 3 <= estimate <= 10.0**power * 30
    assert estimate < SINGULAR


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_condition_does_not_depend_on_units(scale: float) -> None:
    hessian, jacobian, active, fixed = random_system(20, 8, 1, 6)
    plain = System(hessian, jacobian, active, fixed).condition.item()
    rescaled = System(scale * hessian, jacobian, active, fixed).condition.item()
    torch.testing.assert_close(plain, rescaled, rtol=1e-6, atol=0)


# -- the paper's propositions, through ddn.sensitivity at exactly known points --------------------------


def quadratic_with(constraint: str, n: int) -> ddn.Problem:
    """1/2 u^T Q u - x^T u with one constraint, as the propositions have it."""
    constraints = {
        "none": {},
        "linear": {"equality": lambda u, A, d: A @ u - d},
        "single": {"equality": lambda u, c: c @ u - 1.0},
    }[constraint]
    extra = {"none": {}, "linear": {"A": (3, n), "d": (3,)}, "single": {"c": (n,)}}[constraint]
    return ddn.Problem(
        variables={"u": (n,)},
        parameters={"Q": (n, n), "x": (n,), **extra},
        objective=lambda u, Q, x: 0.5 * u @ Q @ u - x @ u,
        **constraints,
    )


def data(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(n, n, dtype=D, generator=generator)
    return {
        "Q": root @ root.T + torch.eye(n, dtype=D),
        "x": torch.randn(n, dtype=D, generator=generator),
        "A": torch.randn(3, n, dtype=D, generator=generator),
        "d": torch.randn(3, dtype=D, generator=generator),
        "c": torch.randn(n, dtype=D, generator=generator),
    }


def test_proposition_4_4_unconstrained() -> None:
    """Dy = -H^-1 B, here Q^-1."""
    n, given = 20, data(20)
    p = {k: given[k] for k in ("Q", "x")}
    found = ddn.sensitivity(quadratic_with("none", n), p, torch.linalg.solve(given["Q"], given["x"]))
    torch.testing.assert_close(found.jacobian("u", "x"), torch.linalg.inv(given["Q"]), rtol=1e-10, atol=1e-12)


def test_proposition_4_5_and_corollary_4_9_linear_equalities() -> None:
    """Dy = H^-1 A^T (A H^-1 A^T)^-1 (A H^-1 B - C) - H^-1 B; the multipliers' derivative with it."""
    n, given = 20, data(20)
    p = {k: given[k] for k in ("Q", "x", "A", "d")}
    inverse, a = torch.linalg.inv(given["Q"]), given["A"]
    schur = torch.linalg.inv(a @ inverse @ a.T)
    y = inverse @ (given["x"] + a.T @ schur @ (given["d"] - a @ inverse @ given["x"]))
    found = ddn.sensitivity(quadratic_with("linear", n), p, y)
    to_x = inverse - inverse @ a.T @ schur @ a @ inverse
    torch.testing.assert_close(found.jacobian("u", "x"), to_x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.jacobian("u", "d"), inverse @ a.T @ schur, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.jacobian("equality.equality0", "d"), -schur, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        found.jacobian("equality.equality0", "x"), schur @ a @ inverse, rtol=1e-9, atol=1e-9
    )


def test_corollary_4_7_single_constraint() -> None:
    """Dy = (H^-1 a a^T H^-1 / (a^T H^-1 a) - H^-1) B."""
    n, given = 20, data(20)
    p = {k: given[k] for k in ("Q", "x", "c")}
    inverse, a = torch.linalg.inv(given["Q"]), given["c"]
    y = inverse @ (given["x"] + a * (1 - a @ inverse @ given["x"]) / (a @ inverse @ a))
    found = ddn.sensitivity(quadratic_with("single", n), p, y)
    expected = inverse - torch.outer(inverse @ a, inverse @ a) / (a @ inverse @ a)
    torch.testing.assert_close(found.jacobian("u", "x"), expected, rtol=1e-9, atol=1e-10)


def test_top_eigenvector_has_an_indefinite_hessian_and_an_exact_derivative() -> None:
    """max u^T X u on the sphere: H is singular or indefinite, the bordered matrix is regular."""
    n = 20
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(n, n, dtype=D, generator=generator)
    matrix = root + root.T
    problem = ddn.Problem(
        variables={"u": (n,)},
        parameters={"X": (n, n)},
        objective=lambda u, X: -u @ X @ u,
        equality=lambda u: u.square().sum() - 1,
    )
    values, vectors = torch.linalg.eigh(matrix)
    y, weights = vectors[:, -1], torch.randn(n, dtype=D, generator=generator)
    gradient = ddn.sensitivity(problem, {"X": matrix}, y).vjp({"u": weights})["X"]
    resolvent = sum(
        vectors[:, i] * (vectors[:, i] @ weights) / (values[-1] - values[i]) for i in range(n - 1)
    )
    symmetric = 0.5 * (gradient + gradient.T)
    expected = 0.5 * (torch.outer(resolvent, y) + torch.outer(y, resolvent))
    torch.testing.assert_close(symmetric, expected, rtol=1e-9, atol=1e-11)


def test_sensitivity_at_a_maximum_is_computed_and_says_so() -> None:
    """Prop. 4.4 holds at any stationary point; the certificate tells which kind it is."""
    problem = ddn.Problem(
        variables={"u": (3,)}, parameters={"x": (3,)}, objective=lambda u, x: -0.5 * (u - x).square().sum()
    )
    x = torch.arange(3, dtype=D)
    found = ddn.sensitivity(problem, {"x": x}, x)
    torch.testing.assert_close(found.jacobian("u", "x"), torch.eye(3, dtype=D))
    assert not found.certificate.sosc


@pytest.mark.parametrize("seed", range(5))
def test_points_perturbed_by_1e_6_give_the_exact_gradient(seed: int) -> None:
    """Polish: on a QP with bounds and inequalities, n = 20, gradients agree to 1e-8."""
    n, rng = 20, np.random.default_rng(seed)
    problem = ddn.quadratic_program(n, 5, 10, bounds=(-1.0, 1.0))
    root = rng.normal(size=(n, n))
    arrays = {
        "P": root @ root.T + np.eye(n),
        "q": 3 * rng.normal(size=n),
        "A": rng.normal(size=(5, n)),
        "b": 0.1 * rng.normal(size=5),
        "G": rng.normal(size=(10, n)),
        "h": 0.3 + rng.random(10),
    }
    p = {k: torch.from_numpy(v).requires_grad_() for k, v in arrays.items()}
    solution = ddn.solve(problem, p, solver="scipy:SLSQP", options={"max_iter": 500})
    weights = torch.from_numpy(rng.normal(size=n))
    exact = torch.autograd.grad(solution["u"] @ weights, list(p.values()))
    moved = solution["u"].detach() + 1e-6 * torch.from_numpy(rng.normal(size=n))
    found = ddn.sensitivity(problem, p, moved).vjp({"u": weights})
    for name, gradient in zip(p, exact, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_singular_system_has_the_same_derivative_in_both_backward_passes(create_graph: bool) -> None:
    """The differentiable one inverted the exactly singular matrix before it was repaired, and raised."""
    problem = ddn.Problem(
        variables={"u": (3,)},
        parameters={"x": (3,)},
        objective=lambda u, x: (u[0] - x[0]).square(),  # u[2] is free
        equality=[lambda u, x: u[1] - x[1], lambda u, x: 2 * u[1] - 2 * x[1]],  # the same twice
    )
    x = torch.tensor([1.0, 2.0, 3.0], dtype=D, requires_grad=True)
    solution = ddn.solve(problem, {"x": x}, solver="scipy:SLSQP")
    with pytest.warns(ddn.DegeneracyWarning):
        (gradient,) = torch.autograd.grad(solution["u"].sum(), x, create_graph=create_graph)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 1.0, 0.0], dtype=D))


def test_batches_of_large_matrices_with_several_threads() -> None:
    """torch's batched LU with two threads gives pivots of zero from 160 rows on, and hangs at 150."""
    n, m, batch = 180, 40, 3
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=D, generator=generator)

    root, jacobian = randn(batch, n, n), randn(batch, m, n)
    hessian = root + root.mT
    everything, nothing = torch.ones(batch, m, dtype=torch.bool), torch.zeros(batch, n, dtype=torch.bool)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        system = System(hessian, jacobian, everything, nothing, linear_solver="dense")
        a, b = randn(batch, n), randn(batch, m)
        step = system.solve(a, b, torch.zeros(batch, n, dtype=D))
        inverse = inverses(hessian)
    finally:
        torch.set_num_threads(threads)
    left = (hessian @ step.x.unsqueeze(-1)).squeeze(-1) + (jacobian.mT @ step.t.unsqueeze(-1)).squeeze(-1) - a
    assert left.abs().max() < 1e-9
    torch.testing.assert_close(
        inverse @ hessian, torch.eye(n, dtype=D).expand(batch, n, n), rtol=0, atol=1e-8
    )
