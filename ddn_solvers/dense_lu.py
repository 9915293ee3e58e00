"""LU of batches of dense matrices; one matrix after the other where torch's own batches are wrong.

Batched LU of torch 2.13 (MKL) with two threads or more gives pivots of zero for matrices of 160 rows, and at 150 it
may never return. One thread is right, and so is one matrix at a time on any number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

_WRONG_FROM: Final = 128  # rows


def lu_factors(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LU factors and pivots of a batch, (..., n, n) and (..., n); what they solve is not finite for a singular matrix."""
    factors, pivots = _of_each(lambda one: torch.linalg.lu_factor_ex(one)[:2], matrices)
    return factors, pivots


def inverses(matrices: torch.Tensor) -> torch.Tensor:
    """M^-1 of each, (..., n, n).

    Raises:
        torch.linalg.LinAlgError: One is singular.
    """
    return _of_each(lambda one: (torch.linalg.inv(one),), matrices)[0]


def solved(matrices: torch.Tensor, right: torch.Tensor, checked: bool = True) -> torch.Tensor:
    """M^-1 b of matrices (..., n, n) and vectors (..., n), batches broadcast; differentiable.

    Args:
        checked: A singular matrix raises ``torch.linalg.LinAlgError``; otherwise its result is not finite.
    """

    def solve(matrix: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.linalg.solve_ex(matrix, column, check_errors=checked)[0],)

    return _of_each(solve, matrices, right.unsqueeze(-1))[0].squeeze(-1)


def _of_each(
    function: Callable[..., Sequence[torch.Tensor]], *operands: torch.Tensor
) -> Sequence[torch.Tensor]:
    """``function`` of operands (..., n, m), the first of them square, whose batches broadcast."""
    matrices = operands[0]
    sound = matrices.device.type != "cpu" or torch.get_num_threads() == 1 or matrices.shape[-1] < _WRONG_FROM
    if sound:
        return function(*operands)
    batch = torch.broadcast_shapes(*(operand.shape[:-2] for operand in operands))
    if batch.numel() < 2:
        return function(*operands)
    flat = [operand.expand(*batch, -1, -1).flatten(0, -3) for operand in operands]
    found = zip(*(function(*one) for one in zip(*flat, strict=True)), strict=True)
    return [torch.stack(parts).unflatten(0, batch) for parts in found]
