"""Every linear solver on the same systems: regular, ill-conditioned, mixed active sets, singular, large and sparse."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch

import ddn_solvers as ddn
from ddn_solvers.inertia import negative_eigenvalues, positive_definite
from ddn_solvers.kkt.linear import SINGULAR, BandedSchur, Schur, SparseLU, least_squares
from ddn_solvers.kkt.system import System
from ddn_solvers.lowering.pattern import Matrices, Pattern

D = torch.float64


def custom(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(matrix, rhs)


SOLVERS = ["auto", "dense", "sparse", "iterative", custom]
each_solver = pytest.mark.parametrize(
    "solver", SOLVERS, ids=lambda s: s if isinstance(s, str) else "callable"
)


def with_pattern(matrix: Any) -> Matrices:
    """A batch of dense arrays as nonzeros."""
    there = sp.csc_array((np.abs(matrix) > 0).any(axis=0))
    there.sort_indices()
    pattern = Pattern(there.shape, there.indptr.astype(int), there.indices.astype(int))
    return Matrices(pattern, matrix[:, pattern.indices, pattern.columns])


def random_batch(
    n: int, m: int, batch: int, condition: float = 1e2, density: float = 1.0, seed: int = 0
) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """H with eigenvalues from 1/condition to 1, J, and a different active set in each sample."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(batch, n, n)))[0]
    hessian = (q * np.logspace(0, -np.log10(condition), n)) @ q.transpose(0, 2, 1)
    hessian = 0.5 * (hessian + hessian.transpose(0, 2, 1))
    jacobian = rng.normal(size=(batch, m, n)) * (rng.random((m, n)) < density) + 3 * np.eye(m, n)
    fixed = (rng.random((batch, n)) < 0.4) & (np.arange(n) >= m)
    return hessian, jacobian, torch.from_numpy(rng.random((batch, m)) < 0.6), torch.from_numpy(fixed)


def reference(
    H: Any,
    J: Any,
    active: torch.Tensor,
    fixed: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    v: torch.Tensor,
) -> tuple[Any, Any]:
    """x and t by LU with residuals in extended precision: right to rounding whatever the condition."""
    xs, ts = np.zeros(a.shape), np.zeros(b.shape)
    for i in range(len(a)):
        rows, free = active[i].numpy(), ~fixed[i].numpy()
        A, x = J[i][rows], np.where(free, 0.0, v[i].numpy())
        K = np.block([[H[i][np.ix_(free, free)], A[:, free].T], [A[:, free], np.zeros((len(A), len(A)))]])
        rhs = np.concatenate([(a[i].numpy() - H[i] @ x)[free], b[i].numpy()[rows] - A @ x])
        factors, exact = scipy.linalg.lu_factor(K), np.zeros(len(rhs), dtype=np.longdouble)
        for _ in range(20):
            exact += scipy.linalg.lu_solve(factors, (rhs - K.astype(np.longdouble) @ exact).astype(float))
        x[free] = exact[: free.sum()]
        xs[i], ts[i, rows] = x, exact[free.sum() :]
    return xs, ts


def right_hand_sides(batch: int, n: int, m: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, k, dtype=D, generator=generator) for k in (n, m, n))


@each_solver
@pytest.mark.parametrize("density", [1.0, 0.1])
@pytest.mark.parametrize("n", [12, 60])
def test_mixed_active_sets(solver: Any, n: int, density: float) -> None:
    H, J, active, fixed = random_batch(n, n // 2, 40, density=density)
    rhs = right_hand_sides(40, n, n // 2)
    x, t = reference(H, J, active, fixed, *rhs)
    step = System(with_pattern(H), with_pattern(J), active, fixed, linear_solver=solver).solve(*rhs)
    np.testing.assert_allclose(step.x, x, rtol=0, atol=1e-10 * np.abs(x).max())
    np.testing.assert_allclose(step.t, t, rtol=0, atol=1e-10 * np.abs(t).max())


@each_solver
@pytest.mark.parametrize("n", [50, 200])
def test_ill_conditioned_to_1e_9(solver: Any, n: int) -> None:
    H, J, active, fixed = random_batch(n, n // 2, 2, condition=1e6)
    rhs = right_hand_sides(2, n, n // 2)
    x, _ = reference(H, J, active, fixed, *rhs)
    step = System(with_pattern(H), with_pattern(J), active, fixed, linear_solver=solver).solve(*rhs)
    assert np.linalg.norm(step.x.numpy() - x) <= 1e-10 * np.linalg.norm(x)


@each_solver
def test_nothing_kept(solver: Any) -> None:
    """All variables fixed and no row active: nothing to solve, and no condition number but one."""
    H, J, active, fixed = random_batch(5, 3, 2)
    active[:], fixed[:] = False, True
    system = System(with_pattern(H), with_pattern(J), active, fixed, linear_solver=solver)
    a, b, v = right_hand_sides(2, 5, 3)
    step = system.solve(a, b, v)
    torch.testing.assert_close(step.x, v, rtol=0, atol=0)
    assert system.condition.tolist() == [1.0, 1.0]


@each_solver
@pytest.mark.parametrize("condition", [1e3, 1e8, 1e10, 1e14, np.inf])
def test_singular_is_the_same_for_every_solver(solver: Any, condition: float) -> None:
    """Decided by the same estimate: MINRES alone could not tell, so a factorization decides for it."""
    n = 30
    rng = np.random.default_rng(3)
    root = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = np.ones(n)
    values[-1] = 1 / condition
    H = ((root * values) @ root.T)[None]
    system = System(
        with_pattern(0.5 * (H + H.transpose(0, 2, 1))),
        with_pattern(np.zeros((1, 0, n))),
        torch.ones(1, 0, dtype=torch.bool),
        torch.zeros(1, n, dtype=torch.bool),
        linear_solver=solver,
    )
    assert bool(system.singular) is (condition > SINGULAR)
    if condition < SINGULAR:
        assert condition / 30 <= system.condition.item() <= 30 * condition


@each_solver
def test_a_repeated_row_makes_one_sample_singular_and_no_other(solver: Any) -> None:
    H, J, active, fixed = random_batch(20, 6, 3)
    active[:], fixed[:] = True, False
    J[1, 5] = J[1, 4]
    rhs = right_hand_sides(3, 20, 6)
    system = System(with_pattern(H), with_pattern(J), active, fixed, linear_solver=solver)
    assert system.singular.tolist() == [False, True, False]
    step = system.solve(*rhs)
    x, t = reference(H[::2], J[::2], active[::2], fixed[::2], *(r[::2] for r in rhs))
    np.testing.assert_allclose(step.x[::2], x, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(step.t[::2], t, rtol=1e-9, atol=1e-10)


def test_an_indefinite_hessian_leaves_the_fast_path_for_those_samples_alone() -> None:
    H, J, active, fixed = random_batch(60, 20, 40)
    active[:, :5] = True
    H[::2] -= 0.5 * np.eye(60)
    system = System(with_pattern(H), with_pattern(J), active, fixed)
    assert isinstance(system._solver, Schur)
    assert system._state[3].tolist() == list(range(0, 40, 2))  # what LU factored
    rhs = right_hand_sides(40, 60, 20)
    step = system.solve(*rhs)
    x, _ = reference(H, J, active, fixed, *rhs)
    np.testing.assert_allclose(step.x, x, rtol=0, atol=1e-9 * np.abs(x).max())


def test_refinement_pays_where_the_hessian_is_nearly_singular_and_the_whole_matrix_is_not() -> None:
    """Schur's S then has the Hessian's condition squared over; one product brings back what LU would give."""
    n, m, batch = 60, 10, 40
    rng = np.random.default_rng(5)
    q = np.linalg.qr(rng.normal(size=(batch, n, n)))[0]
    values = np.ones(n)
    values[:m] = 1e-7
    H = (q * values) @ q.transpose(0, 2, 1)
    H, J = 0.5 * (H + H.transpose(0, 2, 1)), q[:, :, :m].transpose(0, 2, 1)  # rows where H is small
    active, fixed = torch.ones(batch, m, dtype=torch.bool), torch.zeros(batch, n, dtype=torch.bool)
    rhs = right_hand_sides(batch, n, m)
    x, _ = reference(H, J, active, fixed, *rhs)
    system = System(with_pattern(H), with_pattern(J), active, fixed)
    assert isinstance(system._solver, Schur)
    plain = system._factored(torch.cat(rhs[:2], dim=1))[:, :n].numpy()
    refined = system.solve(*rhs).x.numpy()
    assert np.abs(plain - x).max() > 1e-12
    assert np.abs(refined - x).max() < 1e-13 * np.abs(x).max() + 1e-14


# -- bands ---------------------------------------------------------------------------------------------


def horizon(batch: int, blocks: bool, steps: int = 30, states: int = 4, seed: int = 11) -> tuple[Any, ...]:
    """Rows s_t - A s_{t-1} - B u_t of linear dynamics and bounds on sums of forces; H, diagonal or not; masks."""
    rng = np.random.default_rng(seed)
    n, m = steps * (states + 2), steps * states
    J = np.zeros((batch, m + steps, n))
    for t in range(steps):
        rows, now = slice(t * states, (t + 1) * states), t * (states + 2)
        J[:, rows, now : now + states] = np.eye(states)
        J[:, rows, now + states : now + states + 2] = rng.normal(size=(batch, states, 2))
        if t:
            J[:, rows, now - states - 2 : now - 2] = rng.normal(size=(batch, states, states))
        J[:, m + t, now + states : now + states + 2] = 1.0
    H = rng.uniform(0.1, 3.0, size=(batch, n))[:, :, None] * np.eye(n)
    if blocks:  # of the states of one time, of the forces of another: sizes 4 and 1, or 2
        for t in range(steps):
            some = slice(t * (states + 2), t * (states + 2) + states)
            if t % 3 == 1:
                some = slice(some.stop, some.stop + 2)
            root = rng.normal(size=(batch, some.stop - some.start, some.stop - some.start))
            H[:, some, some] += root @ root.transpose(0, 2, 1)
    fixed = (rng.random((batch, n)) < 0.3) & (np.arange(n) % (states + 2) == states)  # some of the forces
    active = (rng.random((batch, m + steps)) < 0.3) | (np.arange(m + steps) < m)
    active[:, m:] &= ~fixed[:, states :: states + 2]
    return H, J, torch.from_numpy(active), torch.from_numpy(fixed)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_band_of_mixed_active_sets(blocks: bool) -> None:
    H, J, active, fixed = horizon(20, blocks)
    rhs = right_hand_sides(20, H.shape[1], J.shape[1])
    system = System(with_pattern(H), with_pattern(J), active, fixed)
    assert isinstance(system._solver, BandedSchur)
    assert system.convex
    step, plain = system.solve(*rhs), System(torch.from_numpy(H), torch.from_numpy(J), active, fixed)
    for found, other in zip(vars(step).values(), vars(plain.solve(*rhs)).values(), strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-12 * float(other.abs().max()))
    ratio = system.condition / plain.condition
    assert ((ratio > 0.1) & (ratio < 10)).all()


@pytest.mark.parametrize("blocks", [False, True])
def test_samples_without_a_band_factor_are_left_to_sparse_lu(blocks: bool) -> None:
    """One whose H is negative somewhere, one with a variable that only rows hold, one with a repeated row."""
    H, J, active, fixed = horizon(6, blocks)
    H[1, 7, 7], H[2, 0, 0] = -1.0, 1e-9
    active[:, 120:] = False
    J[3, 121], active[3, 120:122] = J[3, 120], True
    J[:, 121, :6] += 1e-300  # in the pattern
    rhs = right_hand_sides(6, H.shape[1], J.shape[1])
    system = System(with_pattern(H), with_pattern(J), active, fixed)
    assert isinstance(system._solver, BandedSchur)
    assert system.singular.tolist() == [False, False, False, True, False, False]
    assert not system.convex
    good = [0, 1, 2, 4, 5]
    x, t = reference(H[good], J[good], active[good], fixed[good], *(r[good] for r in rhs))
    step = system.solve(*rhs)
    np.testing.assert_allclose(step.x[good], x, rtol=0, atol=1e-11 * np.abs(x).max())
    np.testing.assert_allclose(step.t[good], t, rtol=0, atol=1e-11 * np.abs(t).max())


@pytest.mark.parametrize("solver", ["sparse", "auto"])
def test_more_active_rows_than_free_variables_do_not_corrupt_memory(solver: str, capfd: Any) -> None:
    """SuperLU wrote beyond its arrays where a matrix is singular by its pattern, and now and then crashed."""
    H, J, active, _ = horizon(10, blocks=False, steps=60)
    active[:], n = True, H.shape[1]
    fixed = torch.from_numpy(np.random.default_rng(1).random((10, n)) < 0.4)
    system = System(with_pattern(H), with_pattern(J), active, fixed, linear_solver=solver)
    assert system.singular.all()
    assert "illegal" not in "".join(capfd.readouterr())


# -- large and sparse ----------------------------------------------------------------------------------


def tridiagonal(n: int, diagonal: float) -> sp.csc_array:
    return sp.diags_array(
        [-np.ones(n - 1), diagonal * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1]
    ).tocsc()


def one(matrix: Any) -> Matrices:
    matrix = sp.csc_array(matrix)
    matrix.sort_indices()
    pattern = Pattern(matrix.shape, matrix.indptr.astype(int), matrix.indices.astype(int))
    return Matrices(pattern, matrix.data[None].astype(float))


@pytest.mark.parametrize("solver", ["auto", "sparse", "iterative"])
def test_twenty_thousand_variables_without_a_dense_matrix(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m = (5_000, 1_000) if solver == "iterative" else (20_000, 5_000)
    H = tridiagonal(n, 2.5)
    A = sp.diags_array([np.ones(m), -np.ones(m)], offsets=[0, 1], shape=(m, n)).tocsc()
    rng = np.random.default_rng(7)
    active, fixed = rng.random((1, m)) < 0.7, (rng.random((1, n)) < 0.1) & (np.arange(n) > m)
    monkeypatch.setattr(Pattern, "dense", None)  # whoever asks for one fails
    masks = torch.from_numpy(active), torch.from_numpy(fixed)
    system = System(one(H), one(A), *masks, linear_solver=solver)
    a, b, v = right_hand_sides(1, n, m)
    step = system.solve(a, b, v)
    x, t, q = (part[0].numpy() for part in (step.x, step.t, step.q))
    np.testing.assert_allclose(H @ x + A.T @ t - a[0].numpy(), q, rtol=0, atol=1e-12)
    np.testing.assert_allclose((A @ x)[active[0]], b[0].numpy()[active[0]], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(x[fixed[0]], v[0].numpy()[fixed[0]])
    assert not t[~active[0]].any()
    assert 1 < system.condition.item() < 1e3


def test_auto_is_sparse_only_for_large_and_sparse_patterns() -> None:
    def chosen(n: int, bandwidth: int) -> Any:
        H = sp.diags_array(
            [np.ones(n - abs(k)) for k in range(-bandwidth, bandwidth + 1)],
            offsets=list(range(-bandwidth, bandwidth + 1)),
        )
        H = one(H + 10 * bandwidth * sp.eye_array(n))
        nothing = torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool)
        return type(System(H, one(sp.csc_array((0, n))), *nothing)._solver)

    assert chosen(1000, 1) is SparseLU
    assert chosen(1000, 100) is not SparseLU
    assert chosen(100, 1) is not SparseLU
    assert chosen(300, 5) is SparseLU  # 4 % of the entries, but next to the diagonal
    assert chosen(300, 20) is not SparseLU


@pytest.mark.parametrize("lowest", [-1e-3, -1e-6, 1e-6, 1.0])
def test_inertia_of_a_sparse_matrix(lowest: float) -> None:
    n = 400
    smallest = 2 - 2 * np.cos(np.pi / (n + 1))  # of tridiag(-1, 2, -1)
    matrix = (tridiagonal(n, 2.0) + (lowest - smallest) * sp.eye_array(n)).tocsc()
    expected = int((np.linalg.eigvalsh(matrix.toarray()) < 0).sum())
    assert positive_definite(matrix) is (lowest > 0)
    assert negative_eigenvalues(matrix) in (expected, None if lowest < 0 else expected)


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_sparse_least_squares_is_the_minimum_norm_solution(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(8)
    matrix = rng.normal(size=shape)
    matrix[:, 3] = matrix[:, 2]  # not of full rank
    target = rng.normal(size=shape[0])
    expected = np.linalg.pinv(matrix) @ target
    np.testing.assert_allclose(least_squares(sp.csr_array(matrix), target), expected, atol=1e-10)


def test_products_of_matrices_with_a_pattern() -> None:
    rng = np.random.default_rng(9)
    for density in (0.0, 0.05, 1.0):  # rows and columns without a nonzero among them
        dense = rng.normal(size=(3, 7, 5)) * (rng.random((7, 5)) < density)
        matrices = with_pattern(dense)
        x, y = rng.normal(size=(3, 5)), rng.normal(size=(3, 7))
        np.testing.assert_allclose(matrices.times(x), np.einsum("bij,bj->bi", dense, x), atol=1e-14)
        np.testing.assert_allclose(
            matrices.transposed_times(y), np.einsum("bij,bi->bj", dense, y), atol=1e-14
        )
        np.testing.assert_allclose(matrices.row_norms(), np.linalg.norm(dense, axis=2), atol=1e-14)
        np.testing.assert_array_equal(matrices.largest(), np.abs(dense).max(axis=(1, 2)))
        np.testing.assert_array_equal(matrices.dense, dense)


@pytest.mark.parametrize("batch", [1, 3, 70])
def test_products_of_many_nonzeros_are_those_of_each_sample(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one block-diagonal matrix, several times; a sample that is not finite does not touch the others."""
    monkeypatch.setattr("ddn_solvers.lowering.pattern._BLOCK", 20_000)
    rng = np.random.default_rng(10)
    dense = rng.normal(size=(batch, 300, 200)) * (rng.random((300, 200)) < 0.1)
    dense[-1, dense[-1] != 0] *= np.inf if batch > 1 else 1.0
    matrices = with_pattern(dense)
    x, y = rng.normal(size=(batch, 200)), rng.normal(size=(batch, 300))
    good = slice(None, -1 if batch > 1 else None)
    for product, sparse in ((matrices.times(x), "bij,bj->bi"), (matrices.transposed_times(y), "bij,bi->bj")):
        expected = np.einsum(sparse, dense[good], (x if "bj->" in sparse else y)[good])
        np.testing.assert_allclose(product[good], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrices.row_sums()[good], dense[good].sum(axis=2), rtol=0, atol=1e-12)


# -- through the public interface ----------------------------------------------------------------------


def control(n: int) -> ddn.Problem:
    """Track x with a state that moves by a bounded control: n states, n controls."""
    return ddn.Problem(
        variables={"s": (n,), "a": (n,)},
        parameters={"x": (n,), "start": ()},
        objective=lambda s, a, x: 0.5 * (s - x).square().sum() + 0.05 * a.square().sum(),
        equality={
            "moves": lambda s, a: s[1:] - s[:-1] - 0.1 * a[:-1],
            "starts": lambda s, start: s[0] - start,
        },
        bounds={"a": (-0.8, 0.8)},
    )


def given(n: int) -> dict[str, torch.Tensor]:
    x = 2 * torch.sin(0.05 * torch.arange(n, dtype=D))
    return {"x": x.requires_grad_(), "start": torch.tensor(0.3, dtype=D, requires_grad=True)}


def test_a_chain_of_two_hundred_thousand_unknowns_is_a_band() -> None:
    """Pairs of a block and a row are more than 32 bits hold."""
    n = 100_000
    solution = ddn.solve(control(n), given(n))
    assert solution.converged
    assert solution.stats.backend == ("ddn_solvers",)


@pytest.mark.parametrize("solver", ["sparse", "iterative", "auto"])
def test_gradients_through_every_solver(solver: str) -> None:
    n = 120
    p, weights = given(n), torch.cos(torch.arange(n, dtype=D))

    def gradients(linear_solver: str) -> torch.Tensor:
        policy = ddn.Policy(linear_solver=linear_solver)
        solution = ddn.solve(control(n), p, solver="casadi:ipopt", policy=policy)
        return torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(solution["s"] @ weights, list(p.values()))]
        )

    torch.testing.assert_close(gradients(solver), gradients("dense"), rtol=1e-10, atol=1e-10)


def test_large_and_small_problems_have_the_same_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse inertia and dense eigenvalues say the same; here of 240 variables, once each way."""
    p = given(120)
    sparse = ddn.solve(control(120), p, solver="casadi:ipopt").certificate
    monkeypatch.setattr("ddn_solvers.kkt.curvature.large_and_sparse", lambda *_: False)
    dense = ddn.solve(control(120), p, solver="casadi:ipopt").certificate
    for name in ("ok", "licq", "rank_deficiency", "sosc", "singular"):
        assert getattr(sparse, name) == getattr(dense, name), name
    assert sparse.null_space[0].shape == dense.null_space[0].shape == (240, 0)


@pytest.mark.parametrize("depth", [1.0, 1e-3])
@pytest.mark.parametrize("n", [600, 3000])
def test_a_saddle_of_a_large_problem_is_no_minimum(n: int, depth: float) -> None:
    """One direction of negative curvature among thousands of positive ones, found without a dense matrix."""
    signs = torch.ones(n, dtype=D)
    signs[n // 2] = -depth
    problem = ddn.Problem(
        variables={"u": (n,)},
        parameters={"x": (n,)},
        objective=lambda u, x: 0.5 * (signs * (u - x).square()).sum() + 0.0 * u.pow(4).sum(),
        equality=lambda u: u[:9].sum(),
    )
    x = torch.zeros(n, dtype=D)
    found = ddn.sensitivity(problem, {"x": x}, x)
    assert found.certificate.licq
    assert not found.certificate.sosc
    convex = ddn.Problem(
        variables={"u": (n,)},
        parameters={"x": (n,)},
        objective=lambda u, x: 0.5 * (u - x).square().sum() + 0.1 * u.pow(4).sum(),
        equality=lambda u: u[:9].sum(),
    )
    assert ddn.sensitivity(convex, {"x": x}, x).certificate.sosc


@pytest.mark.parametrize("n", [600, 1500])
def test_singular_samples_of_large_problems(n: int) -> None:
    """A repeated equality and a flat direction, densely taken apart up to 1000 variables, by LSMR beyond."""
    problem = ddn.Problem(
        variables={"u": (n,)},
        parameters={"x": (n,), "d": ()},
        objective=lambda u, x: 0.5 * (u - x)[1:].square().sum(),  # u[0] is free
        equality=[lambda u, d: u[1] + u[2] - d, lambda u, d: 2 * u[1] + 2 * u[2] - 2 * d],
    )
    x, d = (
        torch.linspace(-1, 1, n, dtype=D, requires_grad=True),
        torch.tensor(0.5, dtype=D, requires_grad=True),
    )
    y = x.detach().clone()
    y[0] = 0.0
    y[1:3] += (0.5 - y[1] - y[2]) / 2
    solution, weights = ddn.attach(problem, {"x": x, "d": d}, y), torch.cos(torch.arange(n, dtype=D))
    with pytest.warns(ddn.DegeneracyWarning):
        gradient, to_d = torch.autograd.grad(solution["u"] @ weights, (x, d))
    expected = weights.clone()
    expected[0] = 0.0
    expected[1:3] -= (weights[1] + weights[2]) / 2
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_d, (weights[1] + weights[2]) / 2, rtol=1e-9, atol=1e-9)
    certificate = solution.certificate
    assert certificate.singular
    assert certificate.rank_deficiency == 1
    assert not certificate.sosc


def test_a_constant_sparse_hessian_is_judged_by_its_nonzeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(sign: float) -> Any:
        problem = ddn.Problem(
            variables={"u": (2000,)},
            parameters={"x": (2000,)},
            objective=lambda u, x: 0.5 * (u[1:] - u[:-1]).square().sum() + sign * u[0].square() - x @ u,
        )
        return ddn.compile(problem).program

    monkeypatch.setattr(Pattern, "dense", None)
    assert not program(0.0).may_be_nonconvex  # semidefinite: constants cost nothing
    assert not program(1.0).may_be_nonconvex
    assert program(-1.0).may_be_nonconvex


def test_solving_and_differentiating_ten_thousand_variables_makes_no_dense_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n = 5000
    p, weights = given(n), torch.cos(torch.arange(n, dtype=D))
    monkeypatch.setattr(Pattern, "dense", None)
    solution = ddn.solve(control(n), p, solver="casadi:ipopt")
    gradient, to_start = torch.autograd.grad(solution["s"] @ weights, list(p.values()))
    assert solution.certificate.ok
    step = 1e-4  # piecewise linear in the start: exact until the active set changes
    with warnings.catch_warnings(), torch.no_grad():
        up, down = (
            ddn.solve(control(n), p | {"start": p["start"] + h}, solver="casadi:ipopt")["s"] @ weights
            for h in (step, -step)
        )
    torch.testing.assert_close((up - down) / (2 * step), to_start, rtol=1e-6, atol=1e-8)
    assert gradient.isfinite().all()


def test_multipliers_of_a_large_point_found_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Least squares on the nonzeros, with the signs of active bounds, before the polish makes them exact."""
    n = 3000
    p = {name: value.detach() for name, value in given(n).items()}
    solution = ddn.solve(control(n), p, solver="casadi:ipopt")
    monkeypatch.setattr(Pattern, "dense", None)
    attached = ddn.attach(control(n), p, solution.primal)
    for side in ("lower", "upper"):
        expected = getattr(solution.dual, side)["a"]
        assert (expected > 1e-3).sum() > 100
        torch.testing.assert_close(getattr(attached.dual, side)["a"], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        attached.dual.equality["moves"], solution.dual.equality["moves"], rtol=1e-8, atol=1e-9
    )
