"""Units of the variables, where those of a problem differ by far.

In variables u = D v the Hessian of v is D H D and the Jacobian J D, with rows in whatever units. Where there is
curvature, D_j = H_jj^(-1/2) makes it one; elsewhere D_j makes the largest entry of column j one as e_k = 1 / max_j
|J_kj| D_j makes that of each row (Ruiz 2001, of J alone).
"""

from __future__ import annotations

import numpy as np

from ddn_solvers.arrays import Array, Mask
from ddn_solvers.lowering.pattern import Matrices

FLAT = 1e-14  # curvature relative to the largest that is rounding
_ALIKE = 1e2  # ratio of the roots of H's diagonal, and of J's columns, up to which units count as alike
_SWEEPS = 12


def units_of(H: Matrices, J: Matrices) -> Array | None:
    """The unit of each variable, (B, n); infinite in samples where all are alike, ``None`` where that is every one.

    The largest unit of a sample is one.
    """
    with np.errstate(all="ignore"):
        rows = H.absolute.row_sums()
        curvature = np.where(
            rows > FLAT * rows.max(axis=1, keepdims=True, initial=0.0), np.abs(H.diagonal()), 0.0
        )
        alike = _alike(np.sqrt(curvature)) & (_columns_surely_alike(J) or _alike(_columns(J)))
        if alike.all():
            return None
        curved = curvature > 0
        units = np.where(curved, 1 / np.sqrt(np.where(curved, curvature, 1.0)), 1.0)
        if not curved.all():
            for _ in range(_SWEEPS):
                columns = _columns(J.scaled(np.ones((len(units), J.shape[0])), units))
                units = np.where(curved | (columns == 0), units, units / np.sqrt(columns))
        units = units / units.max(axis=1, keepdims=True, initial=0.0)
    found: Array = np.where(alike[:, None] | ~np.isfinite(units).all(axis=1, keepdims=True), np.inf, units)
    return found


def _columns(J: Matrices) -> Array:
    """The largest entry of each column, (B, n), where rows are scaled so that theirs is one."""
    rows = J.row_largest()
    return J.rows_scaled(1 / np.where(rows > 0, rows, 1.0)).column_largest()


def _columns_surely_alike(J: Matrices) -> bool:
    """Whether norms say so already.

    With rows of norm one no entry is larger than with rows whose largest entry is one, and one of column j is at least
    |J_j| / sqrt(m); there the largest of all is one. Where squares vanish or overflow nothing is said.
    """
    rows = J.squared.row_sums()
    if not ((rows > 1e-200) & (rows < 1e200)).all():
        return False
    return bool((J.squared.transposed_times(1 / rows) > J.shape[0] / _ALIKE**2).all())


def _alike(values: Array) -> Mask:
    """Samples in which what is not zero differs by no more than ``_ALIKE``, (B,)."""
    smallest = np.where(values > 0, values, np.inf).min(axis=1, initial=np.inf)
    found: Mask = ~(values.max(axis=1, initial=0.0) > _ALIKE * smallest)
    return found
