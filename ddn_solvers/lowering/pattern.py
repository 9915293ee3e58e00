"""The fixed sparsity of a matrix whose nonzeros a compiled function returns as one column."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse as sp


@dataclass(frozen=True, eq=False)
class Pattern:
    """Positions of the nonzeros in compressed-column order (CasADi's and SciPy CSC's alike)."""

    shape: tuple[int, int]
    indptr: np.ndarray[Any, Any]  # (columns + 1,)
    indices: np.ndarray[Any, Any]  # (nnz,), row of each nonzero

    @property
    def nnz(self) -> int:
        return len(self.indices)

    @cached_property
    def columns(self) -> np.ndarray[Any, Any]:
        """Column of each nonzero, (nnz,)."""
        return np.repeat(np.arange(self.shape[1]), np.diff(self.indptr))

    def matrix(self, nonzeros: np.ndarray[Any, Any]) -> sp.csc_array:
        """One sparse matrix from its nonzeros, (nnz,)."""
        import scipy.sparse as sp  # 0.2 s, which an import of this package should not cost

        return sp.csc_array((nonzeros, self.indices, self.indptr), shape=self.shape)

    def dense(self, nonzeros: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(B, nnz) -> (B, *shape)."""
        filled = np.zeros((len(nonzeros), *self.shape))
        filled[:, self.indices, self.columns] = nonzeros
        return filled
