"""Linear solvers for batches of symmetric systems, behind one interface.

    init(matrix) -> state,   compute(state, rhs) -> solution,   transpose(state) -> state

Matrices are (B, N, N), right-hand sides (B, N). Each solver works on torch tensors and is
differentiable, so that the backward pass can itself be differentiated.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

# Beyond this condition number (after equilibration) the solution of a system is rounding error.
SINGULAR: Final = 1e12
# Singular value, relative to the largest, below which rows of unit norm are dependent: the KKT matrix, in which
# it enters squared, is then singular.
DEPENDENT: Final = SINGULAR**-0.5


@dataclass(frozen=True)
class Step:
    """Solution of one bordered system: x (B, n), t (B, m), and q (B, n), zero on free variables."""

    x: torch.Tensor
    t: torch.Tensor
    q: torch.Tensor


class LinearSolver(abc.ABC):
    """A factorization that is made once and used for every right-hand side."""

    @abc.abstractmethod
    def init(self, matrix: torch.Tensor) -> Any:
        """Factor (B, N, N)."""

    @abc.abstractmethod
    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (B, N)"""

    def transpose(self, state: Any) -> Any:
        """The state of the transposed system: itself, KKT matrices being symmetric."""
        return state


class DenseLU(LinearSolver):
    """LU with partial pivoting; exact for regular systems."""

    def init(self, matrix: torch.Tensor) -> Any:
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        return factors, pivots

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        factors, pivots = state
        return torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(-1)).squeeze(-1)


class DenseInverse(LinearSolver):
    """The inverse, with one step of iterative refinement; for tensors under torch.func transforms.

    torch 2.13 is silently wrong there: vmap of ``lu_solve`` where factors and right-hand side are mapped
    to different depths, vmap of the forward derivative of ``solve``. ``inv`` and ``matmul`` are right.
    """

    def init(self, matrix: torch.Tensor) -> Any:
        return matrix, torch.linalg.inv(matrix)

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        matrix, inverse = state
        column = rhs.unsqueeze(-1)
        solution = inverse @ column
        return (solution + inverse @ (column - matrix @ solution)).squeeze(-1)


class SparseLU(LinearSolver):
    """SuperLU on the nonzeros of each matrix; arrays only."""

    def init(self, matrix: torch.Tensor) -> Any:
        import scipy.sparse as sp
        from scipy.sparse.linalg import splu

        def factor(one: Any) -> Any:
            try:
                return splu(sp.csc_array(one)).solve
            except RuntimeError:  # exactly singular: the condition estimate sees it
                return lambda target: np.full_like(target, np.inf)

        return [factor(one) for one in matrix.numpy()]

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        solutions = [solve(one) for solve, one in zip(state, rhs.numpy(), strict=True)]
        return torch.from_numpy(np.stack(solutions)) if solutions else rhs


class Iterative(LinearSolver):
    """MINRES (Paige and Saunders 1975) to rounding, refined once; arrays only."""

    def init(self, matrix: torch.Tensor) -> Any:
        import scipy.sparse as sp

        return [sp.csr_array(one) for one in matrix.numpy()]

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        from scipy.sparse.linalg import minres

        solutions = []
        for matrix, target in zip(state, rhs.numpy(), strict=True):
            solution, residual = np.zeros_like(target), target
            for _ in range(2):
                step, _ = minres(matrix, residual, rtol=1e-14, maxiter=20 * len(target))
                solution = solution + step
                residual = target - matrix @ solution
            solutions.append(solution)
        return torch.from_numpy(np.stack(solutions)) if solutions else rhs


class Custom(LinearSolver):
    """A user's ``(matrix, rhs) -> solution``."""

    def __init__(self, solve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._solve = solve

    def init(self, matrix: torch.Tensor) -> Any:
        return matrix

    def compute(self, state: Any, rhs: torch.Tensor) -> torch.Tensor:
        return self._solve(state, rhs)


def equilibrate(matrix: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Symmetric scaling d that brings the rows of diag(d) K diag(d) towards norm one (Ruiz 2001), (B, N).

    Together with a ``start`` that takes out the units of objective and constraints, it makes every later
    decision independent of them.
    """
    scale, magnitude = start, matrix.detach().abs()
    for _ in range(2):
        rows = (magnitude @ scale.unsqueeze(-1)).squeeze(-1) * scale
        scale = torch.where(rows > 0, scale * rows.rsqrt(), scale)
    return scale


def condition(solver: LinearSolver, state: Any, matrix: torch.Tensor) -> torch.Tensor:
    """Estimate of |K| |K^-1| by two steps of inverse iteration from a fixed start, (B,)."""
    batch, size = matrix.shape[:2]
    if size == 0:
        return matrix.new_ones(batch)
    # Fixed and without symmetry; no random numbers, which vmap refuses.
    start = torch.cos(1.0 + torch.arange(size, dtype=matrix.dtype) ** 2)
    x = solver.compute(state, (start / start.norm()).expand(batch, size))
    for _ in range(2):
        norm = x.norm(dim=-1)
        x = solver.compute(state, x / norm.unsqueeze(-1))
    inverse = x.norm(dim=-1)
    largest = matrix.abs().sum(-1).amax(-1)
    return torch.nan_to_num(largest * inverse, nan=torch.inf, posinf=torch.inf)
