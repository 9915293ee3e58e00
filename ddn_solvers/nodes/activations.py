"""Softmax and sparsemax as the problems that they solve, over one dimension.

    softmax:    y = argmin_u  -x^T u + tau sum_i u_i log u_i    subject to  sum u = 1
    sparsemax:  y = argmin_u  -x^T u + tau/2 |u|^2              subject to  sum u = 1, u >= 0

Sources: Martins and Astudillo (2016), From Softmax to Sparsemax, section 2; Amos (2019), section 2.4.
"""

from __future__ import annotations

import torch
from torch import nn

from ddn_solvers.nodes.closed_form import keep, positive, working_dtype
from ddn_solvers.nodes.projections import project_simplex
from ddn_solvers.problem import Problem


def _scaled(x: torch.Tensor, temperature: float | torch.Tensor, dim: int) -> torch.Tensor:
    working_dtype(x)
    tau = positive("temperature", temperature)
    return x / (tau.to(x).unsqueeze(dim) if isinstance(tau, torch.Tensor) and tau.ndim else tau)


def softmax(x: torch.Tensor, temperature: float | torch.Tensor = 1.0, dim: int = -1) -> torch.Tensor:
    """The entropy-regularised maximum, ``torch.softmax(x / temperature, dim)``, differentiable to any order.

    A temperature of more than no dimensions is that of each instance, of the shape of x without ``dim``.

    Raises:
        ProblemError: ``x`` is not real floating point, or ``temperature`` not positive.
    """
    return torch.softmax(_scaled(x, temperature, dim), dim)


def sparsemax(x: torch.Tensor, temperature: float | torch.Tensor = 1.0, dim: int = -1) -> torch.Tensor:
    """The Euclidean projection of ``x / temperature`` on the probability simplex over ``dim``.

    Exact. Where an entry is exactly at the threshold the derivative is one-sided, and the entry is
    kept at zero. Differentiable to any order, on any device, under ``torch.func``. ``temperature`` as in ``softmax``.

    Raises:
        ProblemError: ``x`` is not real floating point, has no entries along ``dim``, or ``temperature`` is not positive.
    """
    return project_simplex(_scaled(x, temperature, dim), dim=dim)


class Softmax(nn.Module):
    """``softmax`` as a module; an ``nn.Parameter`` as temperature is learnt."""

    temperature: float | torch.Tensor

    def __init__(self, temperature: float | torch.Tensor = 1.0, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim
        keep(self, temperature=temperature)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return softmax(x, self.temperature, self.dim)

    def problem(self, n: int) -> Problem:
        """The problem that it solves for n entries: variable ``u``, parameter ``x``."""
        tau = self.temperature
        return Problem(
            {"u": (n,)},
            {"x": (n,)},
            lambda u, x: tau * (u * u.log()).sum() - (x * u).sum(),
            {"simplex": lambda u: u.sum() - 1},
        )


class Sparsemax(nn.Module):
    """``sparsemax`` as a module; an ``nn.Parameter`` as temperature is learnt."""

    temperature: float | torch.Tensor

    def __init__(self, temperature: float | torch.Tensor = 1.0, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim
        keep(self, temperature=temperature)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sparsemax(x, self.temperature, self.dim)

    def problem(self, n: int) -> Problem:
        """The problem that it solves for n entries: variable ``u``, parameter ``x``."""
        tau = self.temperature
        return Problem(
            {"u": (n,)},
            {"x": (n,)},
            lambda u, x: 0.5 * tau * u.square().sum() - (x * u).sum(),
            {"simplex": lambda u: u.sum() - 1},
            bounds={"u": (0.0, None)},
        )
