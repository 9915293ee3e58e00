"""Linear solvers for batches of bordered systems, behind one interface.

    init(K) -> state,   compute(state, rhs) -> solution,   transpose(state) -> state

K is a ``Bordered`` operator of (B, N, N), equilibrated; right-hand sides are (B, N), zero on the rows
that K does not keep. Each solver takes from K what it needs, and only the dense ones form it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch

from ddn_solvers.arrays import Array, Mask
from ddn_solvers.dense_lu import inverses, lu_factors
from ddn_solvers.kkt.bands import Structure
from ddn_solvers.kkt.operator import Bordered, Formed, Full, Operator, Sparse
from ddn_solvers.lowering.pattern import Matrices
from ddn_solvers.sparse_lu import sparse_lu

# Beyond this condition number (after equilibration) the solution of a system is rounding error.
SINGULAR: Final = 1e12
# Singular value, relative to the largest, below which rows of unit norm are dependent: the KKT matrix, in which
# it enters squared, is then singular.
DEPENDENT: Final = SINGULAR**-0.5

_UNBALANCED = 1e-4  # ratio of pivots below which a Cholesky factorization gives way to LU
_MINRES = 1e-13  # relative residual at which MINRES stops
_UNSOLVED = 1e-8  # and above which its answer is not taken


@dataclass(frozen=True)
class Step:
    """Solution of one bordered system: x (B, n), t (B, m), and q (B, n), zero on free variables."""

    x: torch.Tensor
    t: torch.Tensor
    q: torch.Tensor


class LinearSolver(abc.ABC):
    """A factorization that is made once and used for every right-hand side.

    Attributes:
        sparse: It reads the nonzeros alone, so that dense matrices need not be made.
        formed: It takes K as one dense matrix.
        refine: Its solutions are improved by iterative refinement: it is less than backward stable.
        decides: It shows a singular matrix by a large solution; otherwise LU does in its place.
        steadier: The choice of ``Policy.linear_solver`` to fall back on where refinement does not converge.
    """

    sparse: ClassVar[bool] = False
    formed: ClassVar[bool] = False
    refine: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    steadier: ClassVar[str | None] = None

    @abc.abstractmethod
    def init(self, K: Any) -> Any:
        """Factor a batch: ``Bordered``, or ``Formed`` where it takes that."""

    @abc.abstractmethod
    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (B, N)"""

    def convex(self, state: Any) -> bool:
        """Whether factoring has shown every H to be positive definite."""
        return False

    def transpose(self, state: Any) -> Any:
        """The state of the transposed system: itself, KKT matrices being symmetric."""
        return state


class DenseLU(LinearSolver):
    """LU with partial pivoting; exact for regular systems."""

    formed = True

    def init(self, K: Bordered | Formed) -> Any:
        return lu_factors(K.dense())

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        factors, pivots = state
        return torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(-1)).squeeze(-1)


class Schur(LinearSolver):
    """Cholesky factors of H and of its Schur complement S; LU for samples where that is no good.

        H = L L^T,   W = L^-1 A^T,   S = W^T W - D = A H^-1 A^T - D = R R^T
        t = S^-1 (W^T L^-1 a - b),   x = L^-T (L^-1 a - W t)

    Half the work of LU without its pivoting. It asks for a positive definite H, which a regular system
    need not have (Gould et al. 2019, Prop. 4.5 written out).
    """

    refine = True
    steadier = "dense"

    def init(self, K: Bordered) -> Any:
        H, A, d = K.hessian.dense(), K.border.dense(), K.diagonal
        if bool(d[:, : K.n].any()):
            H = H + torch.diag_embed(d[:, : K.n])
        L, failed = torch.linalg.cholesky_ex(H)
        W = torch.linalg.solve_triangular(L, A.mT, upper=False)
        S = W.mT @ W
        S.diagonal(dim1=1, dim2=2).add_(d[:, K.n :].abs())
        R, failed_too = torch.linalg.cholesky_ex(S)
        good = (failed == 0) & (failed_too == 0) & _balanced(L) & _balanced(R)
        others = (~good).nonzero()[:, 0]
        lu = DenseLU()
        return L, Full(W.numpy()), R, others, lu, lu.init(K.take(others)) if len(others) else None

    def convex(self, state: Any) -> bool:
        return len(state[3]) == 0

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        L, W, R, others, lu, factors = state
        n, column = L.shape[-1], rhs.unsqueeze(-1)
        u = torch.linalg.solve_triangular(L, column[:, :n], upper=False)
        lifted = W.transposed_times(u.squeeze(-1)).unsqueeze(-1)
        t = torch.cholesky_solve(lifted - column[:, n:], R)
        moved = W.times(t.squeeze(-1)).unsqueeze(-1)
        x = torch.linalg.solve_triangular(L.mT, u - moved, upper=True)
        solution = torch.cat([x, t], dim=1).squeeze(-1)
        if len(others):
            solution[others] = lu.compute(factors, rhs[others])
        return solution


def _balanced(factor: torch.Tensor) -> torch.Tensor:
    return _alike(factor.diagonal(dim1=-2, dim2=-1))


def _alike(pivots: torch.Tensor) -> torch.Tensor:
    if not pivots.shape[-1]:
        return torch.ones(len(pivots), dtype=torch.bool)
    return pivots.amin(-1) > _UNBALANCED * pivots.amax(-1)


class BandedSchur(LinearSolver):
    """``Schur`` where H is in small blocks and S a band: LAPACK's band Cholesky. Arrays only.

    Samples for which that is no good are left to sparse LU, which takes five to ten times as long.
    """

    sparse = True
    refine = True
    steadier = "sparse"

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def init(self, K: Bordered) -> Any:
        structure, diagonal = self._structure, K.diagonal.numpy()
        with np.errstate(all="ignore"):  # of a sample that is no good
            L = structure.factors(_nonzeros(K.hessian), diagonal[:, : K.n])
            V = Matrices(structure.V, structure.border(L, _nonzeros(K.border)))
            S = structure.band(V.nonzeros)
        S[:, :, 0] += np.abs(diagonal[:, K.n :])[:, structure.order]
        positive = _cholesky_of_bands(S)
        good = positive & (_alike(structure.pivots(L)) & _alike(torch.from_numpy(S[:, :, 0]))).numpy()
        others, lu = np.flatnonzero(~good), SparseLU()
        return L, V, S, others, lu, lu.init(K.take(others)) if others.size else None

    def convex(self, state: Any) -> bool:
        return not state[3].size

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        from scipy.linalg.lapack import dpbtrs

        (L, V, R, others, lu, factors), structure = state, self._structure
        n, right = V.shape[1], rhs.numpy()
        u = structure.solve(L, right[:, :n])
        t, target = np.empty((len(right), V.shape[0])), V.times(u) - right[:, n:]
        for i, row in enumerate(target[:, structure.order]):
            t[i, structure.order] = dpbtrs(R[i].T, row, lower=1)[0]
        x = structure.solve(L, u - V.transposed_times(t), transposed=True)
        solution = torch.from_numpy(np.concatenate([x, t], axis=1))
        if others.size:
            solution[others] = lu.compute(factors, rhs[others])
        return solution


def _nonzeros(operator: Operator) -> Array:
    assert isinstance(operator, Sparse)
    return operator.matrices.nonzeros


def _cholesky_of_bands(S: Array) -> Mask:
    """Factors of (B, m, width + 1) lower bands in their place; which of them are positive definite, (B,)."""
    from scipy.linalg.lapack import dpbtrf

    return np.array([dpbtrf(band.T, lower=1, overwrite_ab=1)[1] == 0 for band in S], dtype=bool)


class DenseInverse(LinearSolver):
    """The inverse, with one step of iterative refinement; for tensors under torch.func transforms.

    torch 2.13 is silently wrong there: vmap of ``lu_solve`` where factors and right-hand side are mapped
    to different depths, vmap of the forward derivative of ``solve``. ``inv`` and ``matmul`` are right.
    """

    formed = True

    def init(self, K: Bordered | Formed) -> Any:
        matrix = K.dense()
        return matrix, inverses(matrix)

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        matrix, inverse = state
        column = rhs.unsqueeze(-1)
        solution = inverse @ column
        return (solution + inverse @ (column - matrix @ solution)).squeeze(-1)


class SparseLU(LinearSolver):
    """SuperLU on the kept nonzeros of each sample; arrays only."""

    sparse = True
    refine = True

    def init(self, K: Bordered) -> Any:
        return [_superlu(K, sample) for sample in range(len(K.kept))]

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        solution = rhs.numpy().copy()  # rows that are not kept are those of the identity
        for row, (solve, where) in zip(solution, state, strict=True):
            row[where] = solve(row[where])
        return torch.from_numpy(solution)


def _superlu(K: Bordered, sample: int) -> tuple[Callable[[Array], Array], Any]:
    matrix, where = K.kept_part(sample)
    if not len(where):
        return (lambda target: target), where
    if not np.isfinite(matrix.data).all():
        return (lambda target: np.full_like(target, np.nan)), where
    factors = sparse_lu(matrix)
    if factors is None:  # the condition estimate sees it
        return (lambda target: np.full_like(target, np.inf)), where
    return factors.solve, where


class Iterative(LinearSolver):
    """MINRES on products with K alone; a sample that it cannot solve is left to sparse LU. Arrays only.

    MINRES minimises the residual and cannot tell a singular system from an ill-conditioned one: both
    are decided by the factorization, so that they are decided as with every other solver.
    """

    sparse = True
    refine = True

    def init(self, K: Bordered) -> Any:
        return K, {}

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        K, factored = state
        open_ = [i for i in range(len(rhs)) if i not in factored]
        solution = rhs.numpy().copy()
        if open_:
            solution[open_], residual = minres(K.take(open_), solution[open_])
            for i in np.asarray(open_)[~(residual <= _UNSOLVED)].tolist():
                factored[i] = _superlu(K, i)
        for i, (solve, where) in factored.items():
            solution[i] = rhs[i].numpy()
            solution[i, where] = solve(solution[i, where])
        return torch.from_numpy(solution)


def minres(K: Bordered, rhs: Array) -> tuple[Array, Array]:
    """Solutions (B, N) and relative residuals (B,) by the method of Paige and Saunders (1975, section 6).

    All samples step together; one that is done takes no more part in what is added.
    """
    with np.errstate(all="ignore"):  # a sample that is done, or that breaks down, runs on unheeded
        return _minres(K, rhs)


def _minres(K: Bordered, rhs: Array) -> tuple[Array, Array]:
    x, w, w_before = (np.zeros_like(rhs) for _ in range(3))
    norm = np.linalg.norm(rhs, axis=1, keepdims=True)
    v, v_before, beta = rhs / np.where(norm > 0, norm, 1.0), np.zeros_like(rhs), np.zeros_like(norm)
    cosine, sine, delta_bar, epsilon, phi = (
        -np.ones_like(norm),
        *(np.zeros_like(norm) for _ in range(3)),
        norm,
    )
    for _ in range(min(10 * rhs.shape[1], 20_000) + 10):
        going = phi > _MINRES * norm
        if not going.any():
            break
        # Lanczos: K v = beta v_before + alpha v + beta_next v_next
        product = K.times(torch.from_numpy(v)).numpy() - beta * v_before
        alpha = (v * product).sum(axis=1, keepdims=True)
        product -= alpha * v
        beta = np.linalg.norm(product, axis=1, keepdims=True)
        v_before, v = v, product / np.where(beta > 0, beta, 1.0)
        # the next rotation of its tridiagonal matrix
        delta, gamma_bar = cosine * delta_bar + sine * alpha, sine * delta_bar - cosine * alpha
        epsilon_before, epsilon, delta_bar = epsilon, sine * beta, -cosine * beta
        gamma = np.maximum(np.hypot(gamma_bar, beta), np.finfo(float).tiny)
        cosine, sine = gamma_bar / gamma, beta / gamma
        w_before, w = w, (v_before - epsilon_before * w_before - delta * w) / gamma
        x += np.where(going, cosine * phi * w, 0.0)
        phi = np.where(going, sine * phi, phi)
    residual = np.linalg.norm(rhs - K.times(torch.from_numpy(x)).numpy(), axis=1)
    return x, residual / np.where(norm[:, 0] > 0, norm[:, 0], 1.0)


def least_squares(matrix: Any, target: Array) -> Array:
    """The x of least norm that minimises |matrix x - target|, for one sparse matrix; NaN if LSMR fails."""
    from scipy.sparse.linalg import lsmr

    solution = np.zeros(matrix.shape[1])
    for _ in range(2):  # the second time for what the first left over
        residual = target - matrix @ solution
        step, stopped, *_ = lsmr(
            matrix, residual, atol=1e-14, btol=1e-14, conlim=0, maxiter=20 * sum(matrix.shape)
        )
        if stopped == 7:
            return np.full_like(solution, np.nan)
        solution = solution + step
    return solution


class Custom(LinearSolver):
    """A user's ``(matrix, rhs) -> solution``, asked about regular matrices only."""

    formed = True
    decides = False

    def __init__(self, solve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._solve = solve

    def init(self, K: Bordered | Formed) -> Any:
        return K.dense()

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        return self._solve(state, rhs)


def equilibrate(K: Bordered | Formed, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric scaling d that brings the rows of diag(d) K diag(d) towards norm one (Ruiz 2001), (B, N).

    Together with a ``start`` that takes out the units of objective and constraints, it makes every later
    decision independent of them.

    Returns:
        d, and the largest of the norms then, (B,).
    """
    scale, magnitude = start, K.absolute()
    for _ in range(2):
        rows = magnitude.times(scale) * scale
        scale = torch.where(rows > 0, scale * rows.rsqrt(), scale)
    norms = torch.where(K.kept, magnitude.times(scale) * scale, 0.0)
    return scale, norms.amax(-1) if norms.shape[-1] else norms.sum(-1)


def condition(
    solver: LinearSolver, state: Any, kept: torch.Tensor, norm: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Estimate of |K| |K^-1| on the kept rows by two steps of inverse iteration from ``start``, (B,).

    Args:
        kept: Rows that K keeps, (B, N).
        norm: |K|, (B,).
    """
    something = kept.any(-1)
    x = torch.where(kept, start, 0.0)
    x = x / torch.where(something, torch.linalg.vector_norm(x, dim=-1), 1.0).unsqueeze(-1)
    for _ in range(2):
        x = solver.compute(state, x)
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.linalg.vector_norm(solver.compute(state, x), dim=-1)
    estimate = torch.nan_to_num(norm * inverse, nan=torch.inf, posinf=torch.inf)
    return torch.where(something, estimate, 1.0)
