"""The fixed sparsity of a matrix whose nonzeros a compiled function returns as one column.

A batch of such matrices is its nonzeros, (B, nnz). With row r_k and column c_k of nonzero k,

    (M x)_i   = sum over r_k = i of M_k x_{c_k},        (M^T y)_j = sum over c_k = j of M_k y_{r_k},

sums over runs of neighbours: columns as they lie in memory, rows after one permutation. Full matrices are faster as
what they are, and cost nothing to make; many nonzeros as one sparse matrix with those of the samples along its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ddn_solvers.arrays import Array, Index, largest

if TYPE_CHECKING:
    import scipy.sparse as sp


# Nonzeros of a batch from which one block-diagonal product is the faster one (a call of SciPy costs ten microseconds),
# and about how many it takes at a time.
_MANY, _BLOCK = 4_000, 2**18


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

    @property
    def full(self) -> bool:
        """Whether every entry is a nonzero."""
        return self.nnz == self.shape[0] * self.shape[1]

    @cached_property
    def by_row(self) -> Index:
        """The order of the nonzeros by row, (nnz,)."""
        return np.argsort(self.indices, kind="stable")

    @cached_property
    def row_runs(self) -> Runs:
        """The nonzeros of each row, once they are in the order ``by_row``."""
        return Runs.of(np.bincount(self.indices, minlength=self.shape[0]))

    @cached_property
    def column_runs(self) -> Runs:
        """The nonzeros of each column."""
        return Runs.of(np.diff(self.indptr))

    @cached_property
    def _diagonal_blocks(self) -> tuple[int, Any, Any]:
        """How many matrices a block-diagonal one takes, and its indices and indptr, which begin with those of fewer."""
        count = max(1, _BLOCK // max(1, self.nnz, *self.shape))
        number = np.arange(count)[:, None]
        indices = (self.indices + self.shape[0] * number).astype(np.int32).reshape(-1)
        ends = (self.indptr[1:] + self.nnz * number).astype(np.int32).reshape(-1)
        return count, indices, np.concatenate([np.zeros_like(ends[:1]), ends])

    def product(self, nonzeros: Array, x: Array, transposed: bool = False) -> Array:
        """M x, or M^T x, of each sample: (B, nnz) and (B, columns) -> (B, rows), or the other way round."""
        if nonzeros.size < _MANY:
            if transposed:
                return self.column_runs.sum(nonzeros * x[:, self.indices])
            return self.row_runs.sum((nonzeros * x[:, self.columns])[:, self.by_row])
        import scipy.sparse as sp

        (rows, columns), form = (self.shape[::-1], sp.csr_array) if transposed else (self.shape, sp.csc_array)
        (count, indices, indptr), found = self._diagonal_blocks, np.empty((len(x), rows))
        for start in range(0, len(x), count):
            some = slice(start, start + count)
            size = len(x[some])
            where = indices[: size * self.nnz], indptr[: size * self.shape[1] + 1]
            blocks = form((nonzeros[some].reshape(-1), *where), shape=(size * rows, size * columns))
            found[some] = (blocks @ x[some].reshape(-1)).reshape(size, rows)
        return found

    def matrix(self, nonzeros: np.ndarray[Any, Any]) -> sp.csc_array:
        """One sparse matrix from its nonzeros, (nnz,)."""
        import scipy.sparse as sp  # 0.2 s, which an import of this package should not cost

        return sp.csc_array((nonzeros, self.indices, self.indptr), shape=self.shape)

    def entries(self, matrix: Any) -> Array:
        """The nonzeros of one dense matrix, (nnz,)."""
        found: Array = np.asarray(matrix)[self.indices, self.columns]
        return found

    def dense(self, nonzeros: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(B, nnz) -> (B, *shape)."""
        if self.full:  # a column after the other is the transpose, as it lies in memory
            return nonzeros.reshape(len(nonzeros), self.shape[1], self.shape[0]).transpose(0, 2, 1)
        filled = np.zeros((len(nonzeros), *self.shape))
        filled[:, self.indices, self.columns] = nonzeros
        return filled


@dataclass(frozen=True)
class Runs:
    """Groups of neighbours in an array, some of them empty, and what is made of each."""

    starts: Index  # of the groups that are not empty
    groups: Index  # their numbers
    count: int

    @staticmethod
    def of(sizes: np.ndarray[Any, Any]) -> Runs:
        groups = np.flatnonzero(sizes)
        return Runs((np.cumsum(sizes) - sizes)[groups], groups, len(sizes))

    def sum(self, values: Array) -> Array:
        """(B, nnz) -> (B, count)"""
        return self._reduced(np.add, values)

    def largest(self, values: Array) -> Array:
        """(B, nnz), none negative -> (B, count), zero of nothing."""
        return self._reduced(np.maximum, values)

    def _reduced(self, function: np.ufunc, values: Array) -> Array:
        if not len(self.starts):
            return np.zeros((len(values), self.count))
        reduced: Array = function.reduceat(values, self.starts, axis=1)
        if len(self.groups) == self.count:
            return reduced
        whole = np.zeros((len(values), self.count))
        whole[:, self.groups] = reduced
        return whole


@dataclass(frozen=True, eq=False)
class Matrices:
    """A batch of matrices of one pattern."""

    pattern: Pattern
    nonzeros: Array  # (B, nnz)

    @property
    def shape(self) -> tuple[int, int]:
        """Of each one."""
        return self.pattern.shape

    def __len__(self) -> int:
        return len(self.nonzeros)

    @cached_property
    def dense(self) -> Array:
        """(B, *shape); made on first use, never by the methods below where the pattern is sparse."""
        return self.pattern.dense(self.nonzeros)

    def times(self, x: Array) -> Array:
        """(B, columns) -> (B, rows)"""
        if self.pattern.full:
            product: Array = np.matmul(self.dense, x[:, :, None])[:, :, 0]
            return product
        return self.pattern.product(self.nonzeros, x)

    def transposed_times(self, y: Array) -> Array:
        """(B, rows) -> (B, columns)"""
        if self.pattern.full:
            product: Array = np.matmul(y[:, None, :], self.dense)[:, 0]
            return product
        return self.pattern.product(self.nonzeros, y, transposed=True)

    def row_sums(self) -> Array:
        """(B, rows)"""
        return self.times(np.ones((len(self), self.shape[1])))

    def map(self, function: Any) -> Matrices:
        """``function`` of every nonzero."""
        return Matrices(self.pattern, function(self.nonzeros))

    @cached_property
    def absolute(self) -> Matrices:
        """|M_ij|"""
        return self.map(np.abs)

    @cached_property
    def squared(self) -> Matrices:
        """M_ij^2"""
        return self.map(np.square)

    def scaled(self, rows: Array, columns: Array) -> Matrices:
        """diag(rows) M diag(columns)"""
        if self.pattern.full:
            turned = self.dense.transpose(0, 2, 1) * columns[:, :, None]
            turned *= rows[:, None, :]
            return Matrices(self.pattern, turned.reshape(self.nonzeros.shape))
        return Matrices(
            self.pattern,
            self.nonzeros * rows[:, self.pattern.indices] * columns[:, self.pattern.columns],
        )

    def rows_scaled(self, rows: Array) -> Matrices:
        """diag(rows) M"""
        if self.pattern.full:
            turned = self.dense.transpose(0, 2, 1) * rows[:, None, :]
            return Matrices(self.pattern, turned.reshape(self.nonzeros.shape))
        return Matrices(self.pattern, self.nonzeros * rows[:, self.pattern.indices])

    def row_norms(self) -> Array:
        """(B, rows)"""
        return np.sqrt(self.squared.row_sums())

    def largest(self) -> Array:
        """max |M_ij|, (B,)"""
        return largest(self.nonzeros)

    def row_largest(self) -> Array:
        """max_j |M_ij|, (B, rows)"""
        if self.pattern.full:
            found: Array = self.absolute.dense.max(axis=2, initial=0.0)
            return found
        return self.pattern.row_runs.largest(self.absolute.nonzeros[:, self.pattern.by_row])

    def diagonal(self) -> Array:
        """(B, min(shape))"""
        if self.pattern.full:
            return self.dense.diagonal(axis1=1, axis2=2)
        found = np.zeros((len(self), min(self.shape)))
        on = np.flatnonzero(self.pattern.indices == self.pattern.columns)
        found[:, self.pattern.indices[on]] = self.nonzeros[:, on]
        return found

    def column_largest(self) -> Array:
        """max_i |M_ij|, (B, columns)"""
        if self.pattern.full:
            found: Array = self.absolute.dense.max(axis=1, initial=0.0)
            return found
        return self.pattern.column_runs.largest(self.absolute.nonzeros)

    def take(self, samples: Any) -> Matrices:
        return Matrices(self.pattern, self.nonzeros[samples])
