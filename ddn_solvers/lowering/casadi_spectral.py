"""Eigenvalues, singular values and their vectors, for small matrices.

    A = X diag(w) X^T  (A symmetric, w ascending),      A = U diag(s) V^T  (s descending)

Jacobi's rotations find the vectors, and nothing is differentiated through them. Two refinements follow
(Ogita and Aishima, Iterative refinement for symmetric eigenvalue decomposition, 2018; for singular value
decomposition, 2020). They are matrix products that turn vectors with an error E into vectors with an
error O(E^2). In numbers they only remove rounding errors; as functions of A they carry its derivatives:
after two of them the vectors differ from the exact ones by O(E^4), so their derivatives are exact up to
the third, and the values, whose error is the square of the vectors', have exact ones up to the seventh.

Where two values coincide, vectors have no derivative. What would divide by their difference is zero.
"""

from __future__ import annotations

import functools
from typing import Any

import casadi as ca

from ddn_solvers.lowering.casadi_linalg import NOT_DIFFERENTIATED, matrices, mirrored, stacked
from ddn_solvers.lowering.casadi_tensor import Call, concatenate, lowers

LARGEST = 12
SWEEPS = 14  # random matrices need 7; ill-conditioned ones, of the kind that singular values meet, 12
REFINEMENTS = 2
TIE = 1e-11  # values closer than this, relative to the largest, count as equal
NEGLIGIBLE = 1e-13  # singular values smaller than this, relative to the largest, determine no left vector


@lowers("_linalg_eigh")
def eigh(call: Call, a: Any, uplo: str = "L", compute_v: bool = True) -> tuple[Any, Any]:
    _require_small(call, a)
    pairs = [_eigen(mirrored(call, m, uplo == "U")) for m in matrices(a)]
    call.kink(concatenate([ca.diff(w) for w, _ in pairs]))
    return concatenate([w for w, _ in pairs]), stacked([x for _, x in pairs])


@lowers("_linalg_svd")
def svd(
    call: Call, a: Any, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Any, Any, Any]:
    _require_small(call, a)
    rows, columns = a.shape[-2:]
    count = min(rows, columns)
    if rows >= columns:
        triples = [_singular(m) for m in matrices(a)]
    else:
        triples = [(v, s, u) for u, s, v in (_singular(m.T) for m in matrices(a))]
    left, right = (rows, columns) if full_matrices else (count, count)
    values = [s[:count] for _, s, _ in triples]
    call.kink(-concatenate([ca.diff(ca.vertcat(s, 0)) for s in values]))
    return (
        stacked([u[:, :left] for u, _, _ in triples]),
        concatenate(values),
        stacked([v[:, :right].T for _, _, v in triples]),
    )


def _require_small(call: Call, a: Any) -> None:
    rows, columns = a.shape[-2:]
    if max(rows, columns) > LARGEST:
        raise call.refusal(
            f"takes a {rows} x {columns} matrix, and is lowered up to {LARGEST} x {LARGEST}. "
            "Use a smaller matrix."
        )


# ---------------------------------------------------------------------------- refinement


def _eigen(a: Any) -> tuple[Any, Any]:
    """w and X of a symmetric matrix."""
    x = _eigenvectors(a.shape[0])(a)
    for _ in range(REFINEMENTS):
        # X + X F, where F + F^T = R = I - X^T X and X^T A X = W - F^T W - W F to first order
        w, product, r, _ = _quotients(a, x, x)
        across, product = _rows(w), (product + product.T) / 2  # F is skew to the last bit if R = 0
        x += ca.mtimes(x, _divided(product + r * across, across - across.T, r / 2, w))
    return _quotients(a, x, x)[0], x


def _singular(a: Any) -> tuple[Any, Any, Any]:
    """U and V (square) and s of a matrix with no more columns than rows; s has a zero for each row more."""
    rows, columns = a.shape
    u, v = _singular_vectors(rows, columns)(a)
    more = rows - columns
    a, v = ca.horzcat(a, ca.MX(rows, more)), ca.diagcat(v, ca.MX.eye(more))
    for _ in range(REFINEMENTS):
        # U + U F and V + V G, where F + F^T = R, G + G^T = S and U^T A V = W - F^T W - W G to first order
        w, product, r, s = _quotients(a, u, v)
        across = _rows(w)
        alpha, beta = product + r * across, product.T + s * across
        even = _divided(alpha + beta, across - across.T, (r + s) / 2, w)  # F + G
        odd = _divided(alpha - beta, across + across.T, (r - s) / 2, w)  # F - G
        u, v = u + ca.mtimes(u, even + odd) / 2, v + ca.mtimes(v, even - odd) / 2
    return u, _quotients(a, u, v)[0], v[:columns, :columns]


def _quotients(a: Any, u: Any, v: Any) -> tuple[Any, Any, Any, Any]:
    """u_i^T A v_i / |u_i| |v_i|, and U^T A V, I - U^T U, I - V^T V."""
    identity = ca.MX.eye(a.shape[0])
    product = ca.mtimes(u.T, ca.mtimes(a, v))
    r = identity - ca.mtimes(u.T, u)
    s = r if u is v else identity - ca.mtimes(v.T, v)
    return ca.diag(product) / (1 - ca.diag(r + s) / 2), product, r, s


def _rows(w: Any) -> Any:
    """Element (i, j) is w_j."""
    return ca.repmat(w.T, w.numel(), 1)


def _divided(numerator: Any, denominator: Any, otherwise: Any, w: Any) -> Any:
    """The quotient, or ``otherwise`` where the denominator is a difference of equal values."""
    limit = TIE * ca.mmax(ca.fabs(w))
    tied = ca.fabs(denominator) <= ca.repmat(limit, *denominator.shape)
    return ca.if_else(tied, otherwise, numerator / (denominator + tied))


# ---------------------------------------------------------------------------- Jacobi's rotations


@functools.cache
def _eigenvectors(size: int) -> Any:
    a = ca.MX.sym("a", size, size)
    vectors, _ = _diagonalised(-a, hermitian=True)
    return ca.Function("eigenvectors", [a], [vectors], NOT_DIFFERENTIATED)


@functools.cache
def _singular_vectors(rows: int, columns: int) -> Any:
    a = ca.MX.sym("a", rows, columns)
    right, images = _diagonalised(a, hermitian=False)
    left = _orthonormal(ca.horzcat(images, ca.MX.zeros(rows, rows - columns)))
    return ca.Function("singular_vectors", [a], [left, right], NOT_DIFFERENTIATED)


def _diagonalised(a: Any, *, hermitian: bool) -> tuple[Any, Any]:
    """V and A V such that V^T A V, or else (A V)^T A V, is diagonal and descends."""
    rows, columns = a.shape
    inputs = ca.SX.sym("v", columns, columns), ca.SX.sym("av", rows, columns)
    v, av = (ca.horzsplit(matrix) for matrix in inputs)
    left = v if hermitian else av
    for q in range(1, columns):
        for p in range(q):
            excess = ca.dot(left[p], av[p]) - ca.dot(left[q], av[q])
            angle = ca.atan2(2 * ca.dot(left[p], av[q]), excess) / 2
            c, s = ca.cos(angle), ca.sin(angle)
            for side in (v, av):
                side[p], side[q] = c * side[p] + s * side[q], c * side[q] - s * side[p]
    sweep = ca.Function("sweep", inputs, [ca.horzcat(*v), ca.horzcat(*av)])
    result: tuple[Any, Any] = (ca.MX.eye(columns), a)
    for _ in range(SWEEPS):
        result = sweep(*result)
    return result


def _orthonormal(matrix: Any) -> Any:
    """Orthogonal columns made orthonormal; those that are zero become any that complete the basis."""
    size = matrix.shape[0]
    given = ca.SX.sym("given", size, size)
    columns = ca.horzsplit(given)
    lengths = [ca.norm_2(column) for column in columns]
    longest = functools.reduce(ca.fmax, lengths)
    absent = [length <= NEGLIGIBLE * longest for length in lengths]
    basis = [
        (1 - gone) * c / (length + gone) for c, length, gone in zip(columns, lengths, absent, strict=True)
    ]
    rest = ca.SX.eye(size) - ca.mtimes(ca.horzcat(*basis), ca.horzcat(*basis).T)
    for i, gone in enumerate(absent):
        chosen, square = rest[:, 0], rest[0, 0]
        for j in range(1, size):
            larger = rest[j, j] > square
            chosen, square = ca.if_else(larger, rest[:, j], chosen), ca.if_else(larger, rest[j, j], square)
        added = gone * chosen / ca.sqrt(ca.if_else(gone, square, 1))
        basis[i] += added
        rest -= ca.mtimes(added, added.T)
    return ca.Function("orthonormal", [given], [ca.horzcat(*basis)])(matrix)
