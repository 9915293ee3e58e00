"""Euclidean projections on a box, a half-space and an affine set.

    y = argmin_u  1/2 |u - x|^2    subject to
        lower <= u <= upper        y = min(max(x, lower), upper)
        a^T u <= b                 y = x - max(a^T x - b, 0) a / a^T a
        A u = b                    y = x - A^+ (A x - b)

What is written here are these formulas: torch differentiates them exactly, and every vector-Jacobian product costs what
the projection costs. A constraint that is met with equality is active, as ReLU's at zero.
"""

from __future__ import annotations

import torch
from torch import nn

from ddn_solvers.errors import ProblemError
from ddn_solvers.nodes.closed_form import keep, require, times, working_dtype
from ddn_solvers.nodes.projections import squared_distance
from ddn_solvers.problem import Problem

Bound = float | torch.Tensor


def _like(value: Bound, x: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=None if isinstance(value, torch.Tensor) else x.device)


def project_box(x: torch.Tensor, lower: Bound, upper: Bound) -> torch.Tensor:
    """The nearest point to ``x`` between the bounds; they may be infinite.

    An entry that is held by a bound has derivative one by that bound and zero by ``x``; where the bounds coincide and
    ``x`` with them, the lower one counts.

    Args:
        lower: A number, or a tensor that broadcasts against ``x``.
        upper: As ``lower``.

    Raises:
        ProblemError: ``x`` is not real floating point, or ``lower`` exceeds ``upper``.
    """
    working_dtype(x)
    low, high = _like(lower, x), _like(upper, x)
    require(low <= high, ProblemError("a lower bound exceeds its upper bound", expected="lower <= upper"))
    return torch.where(x <= low, low, torch.where(x >= high, high, x))


def project_halfspace(x: torch.Tensor, normal: torch.Tensor, offset: Bound) -> torch.Tensor:
    """The nearest point to ``x`` with ``normal^T y <= offset``.

    Args:
        x: Shape (..., n).
        normal: Shape (..., n), not zero.
        offset: A number, or a tensor of shape (...).

    Raises:
        ProblemError: ``x`` is not real floating point, the shapes do not fit, or a normal is zero.
    """
    working_dtype(x)
    if x.ndim == 0 or normal.shape[-1:] != x.shape[-1:]:
        raise ProblemError(
            "normal", expected=f"shape (..., n) for x {tuple(x.shape)}", got=tuple(normal.shape)
        )
    normal, offset = normal.to(x.dtype), _like(offset, x)
    largest = normal.detach().abs().amax(-1, keepdim=True)
    require(largest > 0, ProblemError("a normal is zero", fix="Drop a constraint without a direction."))
    scaled = normal / largest  # the set is that of normal / s and offset / s: no square over- or underflows
    excess = (scaled * x).sum(-1, keepdim=True) - offset.unsqueeze(-1) / largest
    return x - torch.where(excess >= 0, excess, 0) / scaled.square().sum(-1, keepdim=True) * scaled


def project_affine(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The nearest point to ``x`` with ``A y = b``, through the pseudo-inverse, to about ``eps * cond(A)``.

    Rows of ``A`` may depend on each other if ``b`` agrees; their derivative is then that at constant rank.

    Args:
        x: Shape (..., n).
        A: Shape (..., m, n); without batch dimensions it is factored once.
        b: Shape (..., m).

    Raises:
        ProblemError: ``x`` is not real floating point, the shapes do not fit, or ``A u = b`` has no solution.
    """
    working_dtype(x)
    if x.ndim == 0 or A.ndim < 2 or A.shape[-1] != x.shape[-1] or b.shape[-1:] != A.shape[-2:-1]:
        got = f"x {tuple(x.shape)}, A {tuple(A.shape)}, b {tuple(b.shape)}"
        raise ProblemError(
            "shapes of an affine set", expected="x (..., n), A (..., m, n), b (..., m)", got=got
        )
    A, b = A.to(x.dtype), b.to(x.dtype)
    y = x - times(torch.linalg.pinv(A), times(A, x) - b)
    size = times(A.abs(), y.abs()) + b.abs()
    allowed = torch.finfo(x.dtype).eps ** 0.5 * size.amax(-1, keepdim=True) if A.shape[-2] else size
    require(
        (times(A, y) - b).abs() <= allowed,
        ProblemError("A u = b has no solution", expected="b in the range of A"),
    )
    return y


class BoxProjection(nn.Module):
    """``project_box`` as a module."""

    lower: Bound
    upper: Bound

    def __init__(self, lower: Bound, upper: Bound) -> None:
        super().__init__()
        keep(self, lower=lower, upper=upper)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project_box(x, self.lower, self.upper)

    def problem(self, n: int) -> Problem:
        """The problem that it solves for n entries: variable ``u``, parameter ``x``."""
        return Problem({"u": (n,)}, {"x": (n,)}, squared_distance, bounds={"u": (self.lower, self.upper)})


class HalfspaceProjection(nn.Module):
    """``project_halfspace`` as a module."""

    normal: torch.Tensor
    offset: Bound

    def __init__(self, normal: torch.Tensor, offset: Bound) -> None:
        super().__init__()
        keep(self, normal=normal, offset=offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project_halfspace(x, self.normal, self.offset)

    def problem(self, n: int) -> Problem:
        """The problem that it solves for n entries: variable ``u``, parameter ``x``."""
        a, b = self.normal, self.offset
        return Problem(
            {"u": (n,)}, {"x": (n,)}, squared_distance, inequality={"halfspace": lambda u: a @ u - b}
        )


class AffineProjection(nn.Module):
    """``project_affine`` as a module."""

    A: torch.Tensor
    b: torch.Tensor

    def __init__(self, A: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        keep(self, A=A, b=b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project_affine(x, self.A, self.b)

    def problem(self, n: int) -> Problem:
        """The problem that it solves for n entries: variable ``u``, parameter ``x``."""
        A, b = self.A, self.b
        return Problem({"u": (n,)}, {"x": (n,)}, squared_distance, {"affine": lambda u: A @ u - b})
