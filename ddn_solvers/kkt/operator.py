"""The bordered matrix as an operator: multiplied, scaled and handed over without being formed.

    K = [ H   A^T ]     D diagonal, zero or negative (``conditions.py``, smoothed);
        [ A    D  ]     rows and columns that are not ``kept`` are those of the identity

H and A are dense tensors, or matrices of a fixed pattern (``lowering.pattern``) whose nonzeros are all
that is ever touched. A linear solver takes from K what it needs: products, the dense matrix, its blocks,
or one sparse matrix a sample that holds the kept rows and columns alone.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from ddn_solvers.arrays import Array, Index, largest
from ddn_solvers.lowering.pattern import Matrices, Pattern
from ddn_solvers.transforms import is_transformed

if TYPE_CHECKING:
    import scipy.sparse as sp


class Operator(abc.ABC):
    """A batch of matrices, (B, rows, columns); vectors are tensors (B, rows) or (B, columns)."""

    shape: tuple[int, int]

    @abc.abstractmethod
    def times(self, x: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def transposed_times(self, y: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def absolute(self) -> Operator:
        """Entry by entry; not differentiated."""

    @abc.abstractmethod
    def scaled(self, rows: torch.Tensor, columns: torch.Tensor) -> Operator:
        """diag(rows) M diag(columns)"""

    @abc.abstractmethod
    def masked(self, rows: torch.Tensor, columns: torch.Tensor) -> Operator:
        """Zero outside of these rows and columns, whatever stood there."""

    @abc.abstractmethod
    def take(self, samples: Any) -> Operator: ...

    @abc.abstractmethod
    def largest(self) -> torch.Tensor:
        """max |M_ij|, (B,); not differentiated."""

    @abc.abstractmethod
    def row_norms(self) -> torch.Tensor:
        """(B, rows); not differentiated."""

    @abc.abstractmethod
    def dense(self) -> torch.Tensor:
        """(B, rows, columns)"""


@dataclass(frozen=True)
class Dense(Operator):
    """Tensors, possibly under torch.func transforms."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # read only
        return self.matrix.shape[-2], self.matrix.shape[-1]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.matrix, x.unsqueeze(-1)).squeeze(-1)

    def transposed_times(self, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.matrix.transpose(-1, -2), y.unsqueeze(-1)).squeeze(-1)

    def absolute(self) -> Dense:
        return Dense(self.matrix.detach().abs())

    def scaled(self, rows: torch.Tensor, columns: torch.Tensor) -> Dense:
        return Dense(self.matrix * rows.unsqueeze(-1) * columns.unsqueeze(-2))

    def masked(self, rows: torch.Tensor, columns: torch.Tensor) -> Dense:
        return Dense(torch.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), self.matrix, 0.0))

    def take(self, samples: Any) -> Dense:
        return Dense(self.matrix[samples])

    def largest(self) -> torch.Tensor:
        return self.matrix.detach().abs().amax((-2, -1))

    def row_norms(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self.matrix.detach(), dim=-1)

    def dense(self) -> torch.Tensor:
        return self.matrix


# Entries of a matrix up to which NumPy multiplies it by vectors: a batch of small ones takes a fraction of torch's time,
# for large ones its BLAS takes threads of its own, which nobody limits.
_SMALL = 9_000


@dataclass(frozen=True)
class Full(Operator):
    """Arrays, in whichever order they lie."""

    matrix: Array

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # read only
        return self.matrix.shape[1], self.matrix.shape[2]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        if math.prod(self.shape) > _SMALL:
            return Dense(self.dense()).times(x)
        return torch.from_numpy(np.matmul(self.matrix, x.numpy()[:, :, None])[:, :, 0])

    def transposed_times(self, y: torch.Tensor) -> torch.Tensor:
        if math.prod(self.shape) > _SMALL:
            return Dense(self.dense()).transposed_times(y)
        return torch.from_numpy(np.matmul(y.numpy()[:, None, :], self.matrix)[:, 0])

    def absolute(self) -> Full:
        return Full(np.abs(self.matrix))

    def scaled(self, rows: torch.Tensor, columns: torch.Tensor) -> Full:
        product = self.matrix * rows.numpy()[:, :, None]
        product *= columns.numpy()[:, None, :]
        return Full(product)

    def masked(self, rows: torch.Tensor, columns: torch.Tensor) -> Full:
        inside = rows.numpy()[:, :, None] & columns.numpy()[:, None, :]
        return Full(np.where(inside, self.matrix, 0.0))

    def take(self, samples: Any) -> Full:
        return Full(self.matrix[np.asarray(samples)])

    def largest(self) -> torch.Tensor:
        return torch.from_numpy(largest(self.matrix, 2))

    def row_norms(self) -> torch.Tensor:
        return torch.from_numpy(np.sqrt(np.einsum("bij,bij->bi", self.matrix, self.matrix)))

    def dense(self) -> torch.Tensor:
        return torch.from_numpy(self.matrix)


@dataclass(frozen=True)
class Sparse(Operator):
    """The nonzeros of a fixed pattern; arrays only."""

    matrices: Matrices

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # read only
        return self.matrices.pattern.shape

    def times(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.matrices.times(x.numpy()))

    def transposed_times(self, y: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.matrices.transposed_times(y.numpy()))

    def absolute(self) -> Sparse:
        return Sparse(self.matrices.absolute)

    def scaled(self, rows: torch.Tensor, columns: torch.Tensor) -> Sparse:
        return Sparse(self.matrices.scaled(rows.numpy(), columns.numpy()))

    def masked(self, rows: torch.Tensor, columns: torch.Tensor) -> Sparse:
        pattern = self.matrices.pattern
        inside = rows.numpy()[:, pattern.indices] & columns.numpy()[:, pattern.columns]
        return Sparse(self.matrices.map(lambda values: np.where(inside, values, 0.0)))

    def take(self, samples: Any) -> Sparse:
        return Sparse(
            self.matrices.take(np.asarray(samples))
        )  # NumPy takes a tensor of one index for a number

    def largest(self) -> torch.Tensor:
        return torch.from_numpy(self.matrices.largest())

    def row_norms(self) -> torch.Tensor:
        return torch.from_numpy(self.matrices.row_norms())

    def dense(self) -> torch.Tensor:
        return torch.from_numpy(self.matrices.dense)


@dataclass(frozen=True)
class Bordered:
    """A batch of bordered matrices.

    Attributes:
        hessian, border: H (B, n, n) and A (B, m, n); zero where a row or column is not kept.
        kept: (B, n + m) bool.
        diagonal: Added, (B, n + m): one where a row is not kept, zero or the corner's entries where it is.
    """

    hessian: Operator
    border: Operator
    kept: torch.Tensor
    diagonal: torch.Tensor

    @staticmethod
    def of(
        hessian: Operator, border: Operator, kept: torch.Tensor, diagonal: torch.Tensor | float = 0.0
    ) -> Bordered:
        """With rows and columns that are not ``kept`` masked."""
        n = hessian.shape[1]
        x, t = kept[..., :n], kept[..., n:]
        diagonal = torch.where(kept, diagonal, torch.ones_like(kept, dtype=torch.float64))
        if not is_transformed(kept) and bool(kept.all()):
            return Bordered(hessian, border, kept, diagonal)
        return Bordered(hessian.masked(x, x), border.masked(t, x), kept, diagonal)

    @property
    def n(self) -> int:
        return self.hessian.shape[1]

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """(B, n + m) -> (B, n + m)"""
        x, t = v[..., : self.n], v[..., self.n :]
        top = self.hessian.times(x) + self.border.transposed_times(t)
        return torch.cat([top, self.border.times(x)], dim=-1) + self.diagonal * v

    def absolute(self) -> Bordered:
        diagonal = self.diagonal.abs()
        return Bordered(self.hessian.absolute(), self.border.absolute(), self.kept, diagonal)

    def scaled(self, d: torch.Tensor) -> Bordered:
        """diag(d) K diag(d), the identity's rows excepted."""
        x, t = d[..., : self.n], d[..., self.n :]
        diagonal = torch.where(self.kept, self.diagonal * d * d, self.diagonal)
        return Bordered(self.hessian.scaled(x, x), self.border.scaled(t, x), self.kept, diagonal)

    def dense(self) -> torch.Tensor:
        """(B, n + m, n + m)"""
        hessian, border = self.hessian.dense(), self.border.dense()
        corner = border.new_zeros((*border.shape[:-1], border.shape[-2]))
        top = torch.cat([hessian, border.transpose(-1, -2)], dim=-1)
        return torch.cat([top, torch.cat([border, corner], dim=-1)], dim=-2) + torch.diag_embed(self.diagonal)

    def without(self, samples: torch.Tensor) -> Bordered:
        """The identity in place of some samples, (B,) bool."""
        return Bordered.of(self.hessian, self.border, self.kept & ~samples.unsqueeze(-1), self.diagonal)

    def formed(self) -> Formed:
        return Formed(self.dense(), self.kept)

    def take(self, samples: Any) -> Bordered:
        """Some samples, by index."""
        return Bordered(
            self.hessian.take(samples), self.border.take(samples), self.kept[samples], self.diagonal[samples]
        )

    def kept_part(self, sample: int) -> tuple[sp.csc_array, Index]:
        """The kept rows and columns of one sample, and which they are."""
        import scipy.sparse as sp

        kept = self.kept[sample].numpy()
        where = np.flatnonzero(kept)
        if not isinstance(self.hessian, Sparse) or not isinstance(self.border, Sparse):
            return sp.csc_array(self.take([sample]).dense()[0].numpy()[np.ix_(where, where)]), where
        hessian, border = self.hessian.matrices, self.border.matrices
        frame, diagonal = _frame(hessian.pattern, border.pattern), self.diagonal[sample].numpy()
        return frame.matrix(hessian.nonzeros[sample], border.nonzeros[sample], diagonal, kept), where

    def with_diagonal(self, diagonal: torch.Tensor) -> Bordered:
        """With another diagonal on the rows that are kept, (n + m,)."""
        return replace(self, diagonal=torch.where(self.kept, diagonal, 1.0))


@dataclass(frozen=True)
class Formed:
    """The same as one dense matrix: for small ones, where every operation costs more than its arithmetic."""

    matrix: torch.Tensor  # (B, N, N)
    kept: torch.Tensor

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (B, N)"""
        return torch.matmul(self.matrix, v.unsqueeze(-1)).squeeze(-1)

    def absolute(self) -> Formed:
        return Formed(self.matrix.detach().abs(), self.kept)

    def scaled(self, d: torch.Tensor) -> Formed:
        """diag(d) K diag(d); d is one where a row is not kept."""
        return Formed(self.matrix * d.unsqueeze(-1) * d.unsqueeze(-2), self.kept)

    def without(self, samples: torch.Tensor) -> Formed:
        """The identity in place of some samples, (B,) bool."""
        pick = samples.unsqueeze(-1)
        identity = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype)
        return Formed(torch.where(pick.unsqueeze(-1), identity, self.matrix), self.kept & ~pick)

    def dense(self) -> torch.Tensor:
        return self.matrix


@dataclass(frozen=True)
class _Frame:
    """Where the nonzeros of H, A^T, A and the diagonal lie in K; the same for all points and samples."""

    order: Index  # of [H, A, A, diagonal] by column of K
    rows: Index
    columns: Index
    indptr: Index
    size: int

    def matrix(self, hessian: Any, border: Any, diagonal: Any, kept: Any) -> sp.csc_array:
        import scipy.sparse as sp

        # The diagonal's zeros are no entries: whether the matrix can be regular is read from its pattern.
        added = np.concatenate([np.ones(len(hessian) + 2 * len(border), dtype=bool), diagonal != 0])[
            self.order
        ]
        inside = kept[self.rows] & kept[self.columns] & added
        values = np.concatenate([hessian, border, border, diagonal])[self.order][inside]
        number = np.cumsum(kept) - 1
        before = np.concatenate([[0], np.cumsum(inside)])[self.indptr]
        indptr = np.concatenate([before[:-1][kept], before[-1:]])
        count = len(indptr) - 1
        matrix = sp.csc_array((values, number[self.rows[inside]], indptr), shape=(count, count))
        matrix.sum_duplicates()
        return matrix


# Measured on one core: SuperLU beats dense LU from here on, on random patterns as on banded ones,
_LARGE = 200  # unknowns
_SPARSE = 0.02  # nonzeros over entries of the bordered matrix
_NARROW = 1e-3  # or on narrow ones, as those of a horizon: squares of the envelope's widths over size^3, 1/3 if full

# Singular samples are taken apart by dense singular values as long as that takes a second at most.
DENSE_LIMIT: Final = 1000  # variables


def large_and_sparse(hessian: Pattern, jacobian: Pattern) -> bool:
    """Whether sparse algebra is the better one for a problem with these patterns."""
    size = sum(jacobian.shape)
    return size >= _LARGE and hessian.nnz + 2 * jacobian.nnz <= _SPARSE * size**2


def factored_sparsely(hessian: Pattern, jacobian: Pattern) -> bool:
    """Whether a sparse factorization of the bordered matrix is the better one, whatever the rest of the algebra is."""
    size, nonzeros = sum(jacobian.shape), hessian.nnz + 2 * jacobian.nnz
    if large_and_sparse(hessian, jacobian):
        return True
    # No envelope is narrow that has to hold more (by Cauchy and Schwarz, the widths adding up to half of them).
    few = nonzeros - size <= 2 * _NARROW**0.5 * size**2
    return size >= _LARGE and few and _envelope(hessian, jacobian) <= _NARROW


@lru_cache(maxsize=32)
def _envelope(hessian: Pattern, border: Pattern) -> float:
    """Squares of the widths left of K's diagonal over size^3, in the order of Cuthill and McKee (1969)."""
    import scipy.sparse as sp
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    frame = _frame(hessian, border)
    K = sp.csr_matrix((np.ones(len(frame.rows)), frame.rows, frame.indptr), shape=(frame.size, frame.size))
    place = np.empty(frame.size, dtype=np.intp)
    place[reverse_cuthill_mckee(K, symmetric_mode=True)] = np.arange(frame.size)
    widths = np.zeros(frame.size)
    np.maximum.at(widths, place[frame.rows], place[frame.rows] - place[frame.columns])
    return float((widths**2).sum() / frame.size**3)


@lru_cache(maxsize=32)
def _frame(hessian: Pattern, border: Pattern) -> _Frame:
    n, size = hessian.shape[0], hessian.shape[0] + border.shape[0]
    rows = np.concatenate([hessian.indices, border.columns, border.indices + n, np.arange(size)])
    columns = np.concatenate([hessian.columns, border.indices + n, border.columns, np.arange(size)])
    order = np.lexsort((rows, columns))
    indptr = np.searchsorted(columns[order], np.arange(size + 1))
    return _Frame(order, rows[order], columns[order], indptr, size)
