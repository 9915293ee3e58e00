"""Units of the variables, where those of a problem differ by far.

In variables u = D v the Hessian of v is D H D and the Jacobian J D, with rows in whatever units. Where there is
curvature, D_j = H_jj^(-1/2) makes it one; elsewhere D_j makes the largest entry of column j one as e_k = 1 / max_j
|J_kj| D_j makes that of each row (Ruiz 2001, of J alone).
"""

from __future__ import annotations

import numpy as np

from ddn_solvers.arrays import Array
from ddn_solvers.lowering.pattern import Matrices

_ALIKE = 1e2  # ratio of the roots of H's diagonal, and of J's columns, up to which units count as alike
_SWEEPS = 12


def units_of(H: Matrices, J: Matrices) -> Array | None:
    """The unit of each variable, the largest of each sample being one, (B, n); ``None`` where all are alike."""
    with np.errstate(all="ignore"):
        curvature = np.abs(H.diagonal())
        ones = np.ones_like(curvature)
        if _alike(np.sqrt(curvature)) and _alike(_normalised(J, ones).column_largest()):
            return None
        curved = curvature > 0
        units = np.where(curved, 1 / np.sqrt(np.where(curved, curvature, 1.0)), 1.0)
        if not curved.all():
            for _ in range(_SWEEPS):
                columns = _normalised(J, units).column_largest()
                units = np.where(curved | (columns == 0), units, units / np.sqrt(columns))
        units = units / units.max(axis=1, keepdims=True, initial=0.0)
    found: Array = np.where(np.isfinite(units).all(axis=1, keepdims=True), units, 1.0)
    return found


def _normalised(J: Matrices, units: Array) -> Matrices:
    """J D with rows whose largest entry is one."""
    scaled = J.scaled(np.ones((len(units), J.shape[0])), units)
    rows = scaled.row_largest()
    return scaled.scaled(1 / np.where(rows > 0, rows, 1.0), np.ones_like(units))


def _alike(values: Array) -> bool:
    """Whether what is not zero differs by no more than ``_ALIKE`` in every sample."""
    smallest = np.where(values > 0, values, np.inf).min(axis=1, initial=np.inf)
    return bool((values.max(axis=1, initial=0.0) <= _ALIKE * smallest).all())
