"""Samples of a batch without what they do not keep: variables that active bounds fix, rows that are inactive.

A batch whose samples have 20 of 50 inequalities active needs no matrix with 50 rows for them, and at a vertex of a linear
program, where most variables are at a bound, hardly any columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Packing:
    """Free variables and active rows of each sample, followed by others up to the longest sample.

    Attributes:
        variables: Indices, (B, n').
        rows: Indices, (B, m').
        n, m: How many variables and rows there are before packing.
    """

    variables: torch.Tensor
    rows: torch.Tensor
    n: int
    m: int

    @staticmethod
    def of(free: torch.Tensor, active: torch.Tensor) -> Packing:
        """For ``free`` (B, n) and ``active`` (B, m), bool."""
        return Packing(_first(free), _first(active), free.shape[1], active.shape[1])

    @staticmethod
    def everything(free: torch.Tensor, active: torch.Tensor) -> Packing:
        """The one that leaves nothing out, as transformed tensors need, which cannot be asked."""
        variables, rows = (torch.arange(mask.shape[1]).expand(mask.shape) for mask in (free, active))
        return Packing(variables, rows, free.shape[1], active.shape[1])

    @property
    def smaller(self) -> bool:
        """Whether it leaves anything out."""
        return self.variables.shape[1] < self.n or self.rows.shape[1] < self.m

    @cached_property
    def all(self) -> torch.Tensor:
        """Indices into [variables; rows], (B, n' + m')."""
        return torch.cat([self.variables, self.rows + self.n], dim=1)

    def hessian(self, matrix: torch.Tensor) -> torch.Tensor:
        """(B, n, n) -> (B, n', n')"""
        return self.columns(_rows(matrix, self.variables))

    def border(self, matrix: torch.Tensor) -> torch.Tensor:
        """(B, m, n) -> (B, m', n')"""
        return self.columns(self.of_rows(matrix))

    def of_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """(B, m, columns) -> (B, m', columns)"""
        return _rows(matrix, self.rows)

    def columns(self, matrix: torch.Tensor) -> torch.Tensor:
        """(B, rows, n) -> (B, rows, n')"""
        index = self.variables
        if index.shape[1] == matrix.shape[2]:
            return matrix  # all of them, in order: see ``_first``
        return matrix.gather(2, index.unsqueeze(1).expand(-1, matrix.shape[1], -1))


def _first(mask: torch.Tensor) -> torch.Tensor:
    """Indices that put what is set first, as many as the fullest sample has; all in order, where that is all."""
    count = int(mask.sum(-1).amax()) if mask.numel() else 0
    if count == mask.shape[1]:
        return torch.arange(count).expand(mask.shape)
    return torch.from_numpy(np.argsort(~mask.numpy(), axis=-1, kind="stable")[:, :count])


def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of (B, k) by ``index`` (B, k')."""
    return values if index.shape[1] == values.shape[-1] else values.gather(-1, index)  # all, in order


def put(values: torch.Tensor, index: torch.Tensor, size: int, absent: float = 0.0) -> torch.Tensor:
    """The reverse of ``pick``: (B, size) with ``absent`` elsewhere."""
    if index.shape[1] == size:
        return values
    return values.new_full((len(index), size), absent).scatter(-1, index, values)


def _rows(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if index.shape[1] == matrix.shape[1]:
        return matrix
    return matrix[torch.arange(len(matrix)).unsqueeze(1), index]
