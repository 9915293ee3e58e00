"""A convex QP as a problem of least distance, as dual active-set methods solve it (Lawson and Hanson 1974, chapter 23).

    minimise  1/2 z^T P z + q^T z   subject to   E^T z = e,   l <= F^T z <= u

With P = L L^T, v = L^-1 q, z = L^-T (d - v), W = L^-1 F and V = L^-1 E, the equalities are V^T d = e + V^T v. They hold for
d = V y + d' where V^T d' = 0, and what is left of the rest is

    minimise |d'|^2 / 2   subject to   l <= (W - V C)^T d' + s <= u
    y = (V^T V)^-1 (e + V^T v),   C = (V^T V)^-1 V^T W,   s = W^T (V y - v)

with the multipliers lambda of the rest; those of the equalities are -y - C lambda. Rows are divided by their lengths, and d'
by the largest pivot of L where that is above one: a solver's tolerances are absolute. All of it is LAPACK's, in torch, whose
threads a call limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ddn_solvers.arrays import Array, Mask

# Ratio of the pivots of a Cholesky factor, or of a row's length to what it was, that is no reason for doubt.
_REGULAR = 1e-5


@dataclass(frozen=True)
class LeastDistance:
    """The problem that is left.

    Attributes:
        rows: Of length one, (k, n).
    """

    rows: Array
    _shift: Array
    _lengths: Array
    _unit: float
    _L: torch.Tensor
    _origin: torch.Tensor  # V y - v
    _y: torch.Tensor
    _C: torch.Tensor
    _norms: torch.Tensor

    @staticmethod
    def of(P: Array, q: Array, J: Array, sides: Array, equal: Mask, free: Mask) -> LeastDistance | None:
        """The problem; ``None`` where P or the rows are not clearly regular.

        Args:
            J: All rows, (m, n).
            sides: Their right sides, (m,), of which those of equalities are read.
            equal: Which of them are equalities, (m,).
            free: Which are left, (m,): others, but not those without sides.
        """
        matrix, rows, right = (torch.from_numpy(np.ascontiguousarray(a)) for a in (P, J, sides))
        L, failed = torch.linalg.cholesky_ex(matrix)
        if failed or not _regular(L.diagonal()):
            return None
        every = torch.cat([rows, torch.from_numpy(q)[None]]).mT
        *columns, v = torch.linalg.solve_triangular(L, every, upper=False).mT
        both = torch.stack(columns) if columns else rows
        V, W = both[torch.from_numpy(equal)], both[torch.from_numpy(free)]
        norms = torch.linalg.vector_norm(V, dim=1)
        V = V / torch.where(norms > 0, norms, 1.0).unsqueeze(1)
        R, failed = torch.linalg.cholesky_ex(V @ V.mT)
        if failed or not _regular(R.diagonal()):
            return None
        targets = right[torch.from_numpy(equal)] / norms + V @ v
        y, C = torch.cholesky_solve(torch.cat([targets.unsqueeze(1), V @ W.mT], dim=1), R).split(
            [1, len(W)], dim=1
        )
        origin, left = (y.mT @ V)[0] - v, W - C.mT @ V
        lengths = torch.linalg.vector_norm(left, dim=1)
        if not (lengths > _REGULAR * torch.linalg.vector_norm(W, dim=1)).all():
            return None  # the equalities say the same, but for rounding
        unit = max(1.0, float(L.diagonal().max()))
        rows, shift = left / lengths.unsqueeze(1), W @ origin
        arrays = (rows.numpy(), shift.numpy(), lengths.numpy())
        return LeastDistance(*arrays, unit, L, origin, y[:, 0], C, norms)

    def side(self, values: Array) -> Array:
        """l or u of the problem that is left, of those of the QP, (k,)."""
        found: Array = (values - self._shift) / (self._lengths * self._unit)
        return found

    def start(self, multipliers: Array) -> Array:
        """Its multipliers, of those of the QP, (k,)."""
        found: Array = multipliers * self._lengths / self._unit
        return found

    def solution(self, d: Array, multipliers: Array) -> tuple[Array, Array, Array]:
        """z, (n,), and the multipliers of the QP's equalities and of the rest, of its d' and lambda."""
        there = (self._unit * torch.from_numpy(d) + self._origin).unsqueeze(1)
        z = torch.linalg.solve_triangular(self._L.mT, there, upper=True)[:, 0]
        lam = multipliers * self._unit / self._lengths
        nu = -(self._y + self._C @ torch.from_numpy(lam)) / self._norms
        return z.numpy(), nu.numpy(), lam


def _regular(pivots: torch.Tensor) -> bool:
    return not len(pivots) or bool(pivots.min() > _REGULAR * pivots.max())
