"""Softmax and sparsemax as the problems that they solve, over one dimension.

    softmax:    y = argmin_u  -x^T u + tau sum_i u_i log u_i    subject to  sum u = 1
    sparsemax:  y = argmin_u  -x^T u + tau/2 |u|^2              subject to  sum u = 1, u >= 0

Sources: Martins and Astudillo (2016), From Softmax to Sparsemax, section 2; Amos (2019), section 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ddn_solvers.errors import ProblemError
from ddn_solvers.nodes.closed_form import Rule, Tensors, apply
from ddn_solvers.problem import Problem


def _checked(x: torch.Tensor, temperature: float) -> None:
    if not x.is_floating_point():
        raise ProblemError(f"x is {x.dtype}, a real floating-point tensor was expected: convert it")
    if not 0 < temperature < float("inf"):
        raise ProblemError(f"temperature is {temperature}, a positive finite number was expected")


def softmax(x: torch.Tensor, temperature: float = 1.0, dim: int = -1) -> torch.Tensor:
    """The entropy-regularised maximum, ``torch.softmax(x / temperature, dim)``, differentiable to any order.

    Raises:
        ProblemError: ``x`` is not real floating point, or ``temperature`` not positive.
    """
    _checked(x, temperature)
    return torch.softmax(x / temperature, dim)


class _Sparsemax(Rule):
    """y = max(z - t, 0) with t such that the sum is one; Dy = diag(s) - s s^T / |s|_1, s the support."""

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        (z,) = inputs
        z = z - z.amax(-1, keepdim=True)  # the solution does not change; no digits are lost to an offset
        sorted_ = z.sort(-1, descending=True).values
        excess = sorted_.cumsum(-1) - 1
        count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        support = (sorted_ * count > excess).sum(-1, keepdim=True)
        return (z - excess.gather(-1, support - 1) / support).clamp(min=0)

    def _project(self, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = (y > 0).to(v.dtype)
        return s * (v - (s * v).sum(-1, keepdim=True) / s.sum(-1, keepdim=True))

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        return (self._project(y, cotangent),)

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        (tangent,) = tangents
        assert tangent is not None
        return self._project(y, tangent)


_SPARSEMAX = _Sparsemax()


def sparsemax(x: torch.Tensor, temperature: float = 1.0, dim: int = -1) -> torch.Tensor:
    """The Euclidean projection of ``x / temperature`` on the probability simplex over ``dim``.

    Exact, by sorting. Where an entry is exactly at the threshold the derivative is one-sided, and the entry is
    kept at zero. Differentiable to any order, on any device, under ``torch.func``.

    Raises:
        ProblemError: ``x`` is not real floating point, has no entries along ``dim``, or ``temperature`` is not positive.
    """
    _checked(x, temperature)
    if x.ndim == 0 or x.shape[dim] == 0:
        raise ProblemError(f"x of shape {tuple(x.shape)} has no entries along dim {dim}")
    return apply(_SPARSEMAX, (x / temperature).movedim(dim, -1)).movedim(-1, dim)


class Softmax(nn.Module):
    """``softmax`` as a module."""

    def __init__(self, temperature: float = 1.0, dim: int = -1) -> None:
        super().__init__()
        self.temperature, self.dim = temperature, dim

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
    """``sparsemax`` as a module."""

    def __init__(self, temperature: float = 1.0, dim: int = -1) -> None:
        super().__init__()
        self.temperature, self.dim = temperature, dim

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
