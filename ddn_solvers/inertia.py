"""Signs of the eigenvalues of a large sparse symmetric matrix, by Sylvester's law of inertia.

    P M P^T = L D L^T:  M has as many negative eigenvalues as D has negative entries.

Such a factorization without pivoting exists for every order P if M is definite or quasi-definite
(Vanderbei 1995); for others it may break down, which is noticed and reported as no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddn_solvers.arrays import without_symmetry
from ddn_solvers.sparse_lu import sparse_lu

if TYPE_CHECKING:
    import scipy.sparse as sp

_TRUSTED = 1e-6  # backward error of a solve up to which the signs of the pivots are believed


def negative_eigenvalues(matrix: sp.csc_array) -> int | None:
    """How many eigenvalues of a symmetric matrix are negative, none being zero; ``None`` if that cannot be told."""
    size = matrix.shape[0]
    if not size:
        return 0
    if not np.isfinite(matrix.data).all():
        return None
    # SuperLU with its pivots taken from the diagonal is L D L^T with U = D L^T
    options = {"SymmetricMode": True}
    factors = sparse_lu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    if factors is None or not np.array_equal(factors.perm_r, factors.perm_c):
        return None
    target = without_symmetry(size)
    solution = factors.solve(target)
    error = np.abs(matrix @ solution - target).max()
    if not error <= _TRUSTED * (1.0 + np.abs(matrix.data).max() * np.abs(solution).max()):
        return None
    return int((factors.U.diagonal() < 0).sum())


def positive_definite(matrix: sp.csc_array) -> bool:
    """Whether a symmetric matrix surely is."""
    return negative_eigenvalues(matrix) == 0
