"""Second-order conditions: the Hessian of the Lagrangian on the null space of the active constraints.

With P = I - A^+ A the projection on that null space, the eigenvalues of P H P are those of the reduced
Hessian Z^T H Z and a zero for each active direction. A point is a strict minimum if the former are
positive (SOSC), and no minimum if one is clearly negative. Weakly active rows are kept active: only
then does a negative eigenvalue rule a minimum out.

Large sparse problems are judged by inertia instead (Gould 1985): with rows of norm one and |H| = 1,

    [ H - e I    A^T  ]
    [ A       -I / rho ]  has as many negative eigenvalues as A has rows  <=>  H - e I + rho A^T A > 0,

which proves a reduced Hessian above e. Where it does not, Lanczos' method on P H P looks for a negative
eigenvalue far from zero, and on the reduced Hessian's inverse, a block of K^-1, for one close to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet
from ddn_solvers.arrays import Array, Mask, without_symmetry
from ddn_solvers.inertia import negative_eigenvalues
from ddn_solvers.kkt.linear import DEPENDENT, least_squares
from ddn_solvers.kkt.operator import DENSE_LIMIT, Bordered, Sparse, large_and_sparse
from ddn_solvers.kkt.packing import Packing, pick
from ddn_solvers.kkt.system import System
from ddn_solvers.lowering.pattern import Matrices
from ddn_solvers.residuals import EPSILON, Evaluation

_CLEARLY = 1e-7  # relative to the largest entry of H: below it, an eigenvalue may be rounding
_RHO = 1e3  # weight of the active rows, relative to H
_DISTANCE = 1e-4  # of a row of norm one from the span of others: beyond it, it surely counts
_LANCZOS = 60  # steps


@dataclass(frozen=True)
class Curvature:
    """Of each sample.

    Attributes:
        rank: Of the active rows, bounds included, (B,).
        rows: How many there are, (B,).
        smallest: Smallest eigenvalue of the reduced Hessian over |H|, (B,); inf where the null space is {0}.
        null: Orthonormal rows that span the null space of the active ones, others zero, (B, n', n), of variables in
            units of ``size``; ``None`` where the problem is too large for that.
        size: Of the variables, the largest one, (B, n).
        unit: |H| in these units, (B,), one where it vanishes.
    """

    rank: np.ndarray[Any, np.dtype[np.int64]]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    smallest: Array
    null: Array | None
    size: Array
    unit: Array

    @property
    def negative(self) -> Any:
        """(B,) bool: not a minimum."""
        return self.smallest < -_CLEARLY

    @property
    def positive(self) -> Any:
        """(B,) bool: the second-order sufficient condition holds."""
        return self.smallest > _CLEARLY


def vanishing(evaluation: Evaluation, active: ActiveSet) -> Mask:
    """Active rows of c that hold nothing: their gradient vanishes, or does in all variables that no bound fixes, (B, m).

    The latter depend on the bounds that are active, as at a cusp: the system, whose rows are equilibrated without the fixed
    variables, would not show it.
    """
    gone: Mask = evaluation.vanishing
    if active.fixed.any():
        gone = gone | evaluation.vanishing_in(~active.fixed)
    return gone & active.constraints


def regular_jacobian(evaluation: Evaluation, active: ActiveSet) -> Matrices:
    """J with rows zero that hold nothing: the system of a derivative is then singular, and says so."""
    gone, J = vanishing(evaluation, active), evaluation.J
    if not gone.any():
        return J
    return Matrices(J.pattern, np.where(gone[:, J.pattern.indices], 0.0, J.nonzeros))


def curvature(evaluation: Evaluation, active: ActiveSet) -> Curvature:
    """Rank and curvature at a batch of points."""
    if large_and_sparse(evaluation.H.pattern, evaluation.J.pattern):
        found = _sparse_curvature(evaluation, active)
        if found is not None:
            return found
    n, size = active.n, _size(evaluation)
    hessian = evaluation.hessian * size[:, :, None] * size[:, None, :]
    packing = Packing.of(torch.from_numpy(~active.fixed), torch.from_numpy(active.constraints))
    rows = np.where(active.constraints[:, :, None], _normalised(evaluation, size), 0.0)
    rows, free = (
        packed(torch.from_numpy(M)).numpy()
        for packed, M in ((packing.border, rows), (packing.hessian, hessian))
    )
    fixed = pick(torch.from_numpy(active.fixed), packing.variables).numpy()  # of those that fill up
    stacked = np.concatenate([rows, fixed[:, :, None] * np.eye(fixed.shape[1])], axis=1)
    _, singular, right = np.linalg.svd(stacked, full_matrices=True)
    counted = singular > DEPENDENT * np.maximum(singular.max(axis=1, keepdims=True, initial=0.0), 1.0)
    null = np.where(counted[:, :, None], 0.0, right)  # but for the right singular vectors that span the rows
    reduced = null @ free @ null.transpose(0, 2, 1)
    unit = _unit_of(hessian, evaluation)
    above = np.where(counted, 2.0 * n, 0.0)  # lifts the directions that do not count out of the way
    reduced = reduced / unit[:, None, None] + above[:, :, None] * np.eye(counted.shape[1])
    smallest = np.linalg.eigvalsh(reduced).min(axis=1, initial=np.inf)
    rank = counted.sum(axis=1) + active.fixed.sum(axis=1) - fixed.sum(axis=1)
    count = active.constraints.sum(axis=1) + active.fixed.sum(axis=1)
    whole = np.zeros((*null.shape[:2], n))
    np.put_along_axis(whole, packing.variables.numpy()[:, None], null, axis=2)
    return Curvature(rank, count, np.where(rank == n, np.inf, smallest), whole, size, unit)


def descending(evaluation: Evaluation, active: ActiveSet, convex: bool) -> Mask:
    """Samples from which a way leads down by curvature, (B,); ``convex``: H is positive definite on free variables."""
    bent = np.zeros(len(active.sides), dtype=bool)
    if not convex and not _surely_minimal(evaluation, active):
        finite = np.flatnonzero(np.isfinite(evaluation.scaled))
        bent[finite] = curvature(evaluation.take(finite).tame(), active.take(finite)).negative
    if active.weak.any():
        finite = np.flatnonzero(np.isfinite(evaluation.scaled) & ~bent)
        bent[finite] = _descends(evaluation.take(finite).tame(), active.take(finite))
    return bent


def _descends(evaluation: Evaluation, active: ActiveSet) -> Mask:
    """Samples with a direction of negative curvature that weakly active inequalities and bounds leave open, (B,).

    Such a point is no minimum, whatever the curvature on all active rows; where every such direction is closed one way and
    the other it may be one, as that of u v over u, v >= 0 is. Of large sparse problems it is not asked.
    """
    found, program = np.zeros(len(active.sides), dtype=bool), evaluation.program
    q = program.inequality.size
    weak = active.weak.copy()
    weak[:, q : -2 * active.n] = False  # kinks push both ways
    some = np.flatnonzero(weak.any(axis=1))
    if not some.size:
        return found
    here, weak = evaluation.take(some), weak[some]
    strong = replace(active.take(some), sides=active.sides[some] & ~weak)
    if _surely_minimal(here, strong):
        return found
    bent = curvature(here, strong)
    if bent.null is None:
        return found
    J, n = here.jacobian[:, program.equality.size :][:, :q], active.n
    for k in np.flatnonzero(bent.negative):
        null, size = bent.null[k], bent.size[k]
        basis = null[(null != 0).any(axis=1)] * size  # (n - rank, n)
        values, vectors = np.linalg.eigh(basis @ here.hessian[k] @ basis.T / bent.unit[k])
        directions = vectors[:, values < -_CLEARLY].T @ basis
        limits = np.concatenate(
            [J[k][weak[k, :q]], -np.eye(n)[weak[k, -2 * n : -n]], np.eye(n)[weak[k, -n:]]]
        )
        limits = limits / np.maximum(np.linalg.norm(limits * size, axis=1, keepdims=True), 1e-300)
        along = limits @ directions.T  # <= 0 where open
        found[some[k]] = ((along <= _CLEARLY).all(axis=0) | (along >= -_CLEARLY).all(axis=0)).any()
    return found


def _surely_minimal(evaluation: Evaluation, active: ActiveSet) -> bool:
    """Whether H + rho A^T A is positive definite for every sample, which proves a positive reduced Hessian.

    One Cholesky factorization; where it fails nothing is proved (rho is finite), and ``curvature`` decides.
    """
    if not np.isfinite(evaluation.H.nonzeros).all() or not np.isfinite(evaluation.J.nonzeros).all():
        return False
    if large_and_sparse(evaluation.H.pattern, evaluation.J.pattern):
        K = _unit(evaluation, active)
        return all(_above(K, i, 0.0, _RHO) for i in range(len(active.sides)))
    size = _size(evaluation)
    hessian = evaluation.hessian * size[:, :, None] * size[:, None, :]
    rows = np.where(active.constraints[:, :, None], _normalised(evaluation, size), 0.0)
    norm = np.abs(hessian).max(axis=(1, 2), initial=0.0)[:, None, None]
    matrix = hessian + _RHO * norm * (rows.transpose(0, 2, 1) @ rows)
    diagonal = np.arange(active.n)
    matrix[:, diagonal, diagonal] += np.where(active.fixed, _RHO * norm[:, :, 0], 0.0)
    _, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    return not bool(info.any())


def _size(evaluation: Evaluation) -> Array:
    """Sizes of the variables, the largest one: ones unless their units differ by far, or curvature at a bound, (B, n)."""
    size: Array = evaluation.size * evaluation.steep.narrowing / evaluation.size.max(axis=1, keepdims=True)
    return size


def _unit_of(hessian: Array, evaluation: Evaluation) -> Array:
    """By which curvature is measured, (B,): the largest, unless it is rounding beside the forces."""
    norm = np.maximum(np.abs(hessian).max(axis=(1, 2), initial=0.0), EPSILON * evaluation.force[:, 0])
    return np.where(norm > 0, norm, 1.0)


def _normalised(evaluation: Evaluation, size: Array) -> Array:
    """Rows of unit norm, so that rank does not depend on the units of a constraint; vanishing ones zero."""
    scale, _ = _row_scale(evaluation)
    scaled: Array = evaluation.jacobian * scale[:, :, None] * size[:, None, :]
    return scaled


def _row_scale(evaluation: Evaluation) -> tuple[Array, Mask]:
    """What makes each row's norm one, zero for vanishing rows, and which do not vanish, (B, m) each."""
    norms = evaluation.reach / evaluation.size.max(axis=1, keepdims=True)
    good: Mask = ~evaluation.vanishing & (norms > 1e-300)
    return np.where(good, 1.0 / np.where(good, norms, 1.0), 0.0), good


# -- large and sparse ----------------------------------------------------------------------------------


def _unit(evaluation: Evaluation, active: ActiveSet) -> Bordered:
    """The bordered matrix with |H| = 1 and rows of norm one."""
    size = _size(evaluation)
    hessian = evaluation.H.scaled(size, size)
    norm = hessian.largest()[:, None]
    scale, good = _row_scale(evaluation)
    kept = np.concatenate([~active.fixed, active.constraints & good], axis=1)
    hessian = hessian.map(lambda values: values / np.where(norm > 0, norm, 1.0))
    border = evaluation.J.scaled(scale, size)
    return Bordered.of(Sparse(hessian), Sparse(border), torch.from_numpy(kept))


def _above(K: Bordered, sample: int, shift: float, rho: float) -> bool:
    """Whether H - shift I + rho A^T A surely is positive definite on the free variables."""
    diagonal = torch.full((K.kept.shape[1],), -1.0 / rho, dtype=torch.float64)
    diagonal[: K.n] = -shift
    matrix, where = K.take([sample]).with_diagonal(diagonal).kept_part(0)
    return negative_eigenvalues(matrix) == int((where >= K.n).sum())


def _sparse_curvature(evaluation: Evaluation, active: ActiveSet) -> Curvature | None:
    """``None`` where some sample is singular and dense algebra, which is sharper there, still possible."""
    masks = torch.from_numpy(active.constraints), torch.from_numpy(active.fixed)
    system = System(evaluation.H, regular_jacobian(evaluation, active), *masks, linear_solver="sparse")
    if active.n <= DENSE_LIMIT and bool(system.singular.any()):
        return None
    K = _unit(evaluation, active)
    rows = active.constraints.sum(axis=1) + active.fixed.sum(axis=1)
    rank, smallest = rows.copy(), np.full(len(rows), np.inf)
    for i in range(len(rows)):
        fixed = int(active.fixed[i].sum())
        if system.singular[i]:
            rank[i] = fixed + _rank(K, i)  # a regular system has independent rows
        if rank[i] < active.n:
            smallest[i] = _smallest(K, i, bool(system.singular[i]))
    size = _size(evaluation)
    norm = evaluation.H.scaled(size, size).largest()
    return Curvature(rank, rows, smallest, None, size, np.where(norm > 0, norm, 1.0))


def _rank(K: Bordered, sample: int) -> int:
    """Rank of the kept rows of A, of norm one.

    The pivots of A A^T are squared distances of each row from the span of those before it. Rows that are
    clearly apart are taken; what the others have outside of their span, by least squares, is small enough
    for a dense rank.
    """
    from scipy.sparse.linalg import splu

    matrix, where = K.kept_part(sample)
    first = int((where < K.n).sum())
    A = matrix[first:, :first].tocsr()
    gram = A @ A.T
    gram.setdiag(gram.diagonal() + _DISTANCE**2 * 1e-3)
    factors = splu(
        gram.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    pivots = np.empty(A.shape[0])
    pivots[:] = np.abs(factors.U.diagonal())[factors.perm_c]
    apart, close = A[pivots > _DISTANCE**2], A[pivots <= _DISTANCE**2]
    if not close.shape[0]:
        return int(A.shape[0])
    outside = [row - apart.T @ least_squares(apart.T, row) for row in close.toarray()]
    values = np.linalg.svd(np.array(outside), compute_uv=False)
    return int(apart.shape[0] + (values > DEPENDENT).sum())


def _smallest(K: Bordered, sample: int, singular: bool) -> float:
    """A bound below the smallest eigenvalue of the reduced Hessian if that is clearly positive, else an estimate."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import splu

    for rho in (_RHO, 1e3 * _RHO):
        if _above(K, sample, 2 * _CLEARLY, rho):
            return 2 * _CLEARLY
    matrix, where = K.kept_part(sample)
    first = int((where < K.n).sum())
    H, A = matrix[:first, :first], matrix[first:, :first]
    count = A.shape[0]
    corner = -(_DISTANCE**2) * sp.eye_array(count)
    projection = splu(sp.block_array([[sp.eye_array(first), A.T], [A, corner]]).tocsc()) if count else None

    def project(x: Array) -> Array:
        return x if projection is None else projection.solve(np.concatenate([x, np.zeros(count)]))[:first]

    start = project(without_symmetry(first))
    found = _ritz(lambda x: project(H @ project(x)), start)
    if singular:
        return min(found, 0.0)  # positive is what is proved so
    if found > -_CLEARLY:
        inverse = splu(matrix)
        reciprocal = _ritz(lambda x: inverse.solve(np.concatenate([x, np.zeros(count)]))[:first], start)
        found = 1.0 / reciprocal if reciprocal < 0 else found
    return found


def _ritz(times: Callable[[Array], Array], start: Array) -> float:
    """The smallest Ritz value of a symmetric operator, never below its smallest eigenvalue (Lanczos 1950)."""
    size = np.linalg.norm(start)
    if not size > 0:
        return np.inf
    basis, diagonal, beside = [start / size], [], []
    for _ in range(min(_LANCZOS, len(start))):
        product = times(basis[-1])
        diagonal.append(float(product @ basis[-1]))
        for _ in range(2):  # against all of them, twice: else converged values come again
            vectors = np.array(basis)
            product = product - vectors.T @ (vectors @ product)
        norm = float(np.linalg.norm(product))
        if norm <= 1e-12 * np.abs(diagonal).max():
            break
        beside.append(norm)
        basis.append(product / norm)
    inside = beside[: len(diagonal) - 1]
    return float(np.linalg.eigvalsh(np.diag(diagonal) + np.diag(inside, 1) + np.diag(inside, -1)).min())
