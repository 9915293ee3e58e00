"""Euclidean projections on spheres and balls of the Lp norms, p = 1, 2, inf, and on the simplex.

    y = argmin_u  1/2 |u - x|^2    subject to    |u - c|_p = r  (sphere)    or  <= r  (ball)
    y = argmin_u  1/2 |u - x|^2    subject to    sum u = r, u >= 0          (simplex)

With z = x - c and a, the gradient of the constraint at y (signs of y for L1, signs of the largest entries for Linf),
every derivative by z is symmetric:

           D_z y, manifold (Dzy)              D_z y, clarke (Dy)         D_r y
    L2     r (I - u u^T) / |z|, u = z / |z|   the same                   u
    L1     diag |a| - a a^T / a^T a           I - a a^T / a^T a          a / a^T a
    Linf   I - diag |a|                       I - a a^T / a^T a          a; clarke: a / a^T a

Source: Gould, Hartley and Campbell (2019), section 5.2. Inside a ball the derivative is the identity.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from ddn_solvers.errors import ProblemError
from ddn_solvers.nodes.closed_form import Rule, Tensors, apply, keep, positive, working_dtype
from ddn_solvers.problem import Problem

Nonsmooth = Literal["manifold", "clarke"]
_BLOCK = 2**16  # entries of the rows that are iterated on together: they stay in the cache of one core


class _Projection(Rule):
    """dy = S dz + g dr with S symmetric; z of shape (..., n), r of shape (..., 1)."""

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.point(*inputs)

    @abstractmethod
    def point(self, z: torch.Tensor, r: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def derivative(
        self, z: torch.Tensor, r: torch.Tensor, y: torch.Tensor
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """S, as what it does to a vector, and g."""

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        z, r = inputs
        S, g = self.derivative(z, r, y)
        return S(cotangent) if needed[0] else None, _dot(g, cotangent) if needed[1] else None

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        z, r = inputs
        S, g = self.derivative(z, r, y)
        by_z, by_r = tangents
        return (0 if by_z is None else S(by_z)) + (torch.zeros_like(y) if by_r is None else g * by_r)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, keepdim=True)


def _along(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """a a^T v / a^T a; where a = 0 there is nothing along it."""
    return a * (_dot(a, v) / _dot(a, a).clamp(min=1))  # entries of a are -1, 0, 1


def _unit(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z / |z| and |z|, scaled so that no square over- or underflows; the direction of zero is (1, ..., 1)."""
    scale = z.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    scaled = z / scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    zero = length == 0
    return scaled / torch.where(zero, 1, length) + zero * z.shape[-1] ** -0.5, scale * length


class _L2(_Projection):
    def __init__(self, ball: bool) -> None:
        self.ball = ball

    def _outside(self, norm: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return norm >= r if self.ball else torch.ones_like(norm, dtype=torch.bool)

    def point(self, z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        u, norm = _unit(z)
        return torch.where(self._outside(norm, r), r * u, z)

    def derivative(
        self, z: torch.Tensor, r: torch.Tensor, y: torch.Tensor
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        u, norm = _unit(z)
        outside = self._outside(norm, r)
        # At the centre of a sphere every point is nearest and the derivative unbounded: the answer stays where it is.
        limits = torch.finfo(z.dtype)
        shrinking = torch.where(norm > 0, (r / norm.clamp(min=limits.tiny)).clamp(max=limits.max), 0)
        factor = torch.where(outside, shrinking, 1)
        normal = outside * u
        return lambda v: factor * (v - normal * _dot(normal, v)), normal


class _Linf(_Projection):
    def __init__(self, ball: bool, nonsmooth: Nonsmooth) -> None:
        self.ball, self.manifold = ball, nonsmooth == "manifold"

    def point(self, z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        clipped = torch.minimum(torch.maximum(z, -r), r)
        if self.ball:
            return clipped
        # The first of the largest entries is on the face if z is outside, and goes there if it is inside.
        largest = z.abs().argmax(-1, keepdim=True)
        return clipped.scatter(-1, largest, torch.where(z.gather(-1, largest) < 0, -r, r))

    def derivative(
        self, z: torch.Tensor, r: torch.Tensor, y: torch.Tensor
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        size = (y.abs() >= r).to(y.dtype)
        a = size * y.sign()
        if self.manifold:
            return lambda v: v - size * v, a
        return lambda v: v - _along(a, v), a / _dot(a, a).clamp(min=1)


class _L1(_Projection):
    """The simplex with the signs of z: the nearest point of the sphere lies in the orthant of z, from inside too."""

    def __init__(self, ball: bool, nonsmooth: Nonsmooth) -> None:
        self.ball, self.manifold = ball, nonsmooth == "manifold"

    def point(self, z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        # Adding zero turns -0.0 into 0.0: equal inputs have equal answers.
        y = torch.copysign(_on_simplex(z.abs(), r), z + 0.0)
        return torch.where(self._outside(z, r), y, z) if self.ball else y

    def _outside(self, z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return z.abs().sum(-1, keepdim=True) >= r

    def derivative(
        self, z: torch.Tensor, r: torch.Tensor, y: torch.Tensor
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        a = y.sign()
        free = a.abs() if self.manifold else torch.ones_like(a)
        if self.ball:
            outside = self._outside(z, r)
            a, free = outside * a, torch.where(outside, free, 1)
        return lambda v: free * v - _along(a, v), a / _dot(a, a).clamp(min=1)


class _Simplex(_L1):
    """A face of the L1 sphere."""

    def __init__(self) -> None:
        super().__init__(ball=False, nonsmooth="manifold")

    def point(self, z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return _on_simplex(z, r)


def _on_simplex(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """max(z - t, 0) with t such that the sum is r, in blocks of rows."""
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    rows, points = z.reshape(-1, z.shape[-1]), y.view(-1, z.shape[-1])
    size = max(1, _BLOCK // z.shape[-1]) if z.device.type == "cpu" else max(1, rows.shape[0])
    blocks = (tensor.split(size) for tensor in (rows, r.reshape(-1, 1), points))
    for block, radius, out in zip(*blocks, strict=True):
        _threshold(block, radius, out)
    return y


def _threshold(z: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> None:
    """Newton's method for sum max(z - t, 0) = r, from below; the result goes to y.

    The sum is convex and piecewise linear in t: from a t where it is at least r the steps rise, the support shrinks,
    and when it stays t is exact (Michelot 1986; Condat 2016, section 3). A row that has its answer keeps it, whatever
    its neighbours still need. Relative to its largest entry, r is the scale of a row: an offset costs no digits.
    """
    z = z - z.amax(-1, keepdim=True)
    t = torch.maximum(-r, (z.sum(-1, keepdim=True) - r) / z.shape[-1])
    before = torch.full_like(r, math.inf)
    signs = torch.empty_like(z)
    while True:
        torch.sub(z, t, out=y).clamp_(min=0)
        support = torch.sign(y, out=signs).sum(-1, keepdim=True)
        shrunk = support < before
        if not shrunk.any():
            return
        step = (y.sum(-1, keepdim=True) - r) / support.clamp(min=1)
        t = torch.where(shrunk, t + step, t)
        before = support


_INF = math.inf
_SPHERES_AND_BALLS: dict[tuple[float, bool, str], _Projection] = {
    (p, ball, nonsmooth): rule
    for ball in (False, True)
    for nonsmooth in ("manifold", "clarke")
    for p, rule in ((1, _L1(ball, nonsmooth)), (2, _L2(ball)), (_INF, _Linf(ball, nonsmooth)))
}
_SIMPLEX = _Simplex()


def _rule(p: float, ball: bool, nonsmooth: str) -> _Projection:
    if (p, ball, nonsmooth) not in _SPHERES_AND_BALLS:
        field, allowed, got = (
            ("p", "1, 2 or inf", p)
            if p not in (1, 2, _INF)
            else ("nonsmooth", "'manifold' or 'clarke'", nonsmooth)
        )
        raise ProblemError(field, expected=allowed, got=got)
    return _SPHERES_AND_BALLS[p, ball, nonsmooth]


def _project(
    rule: _Projection,
    x: torch.Tensor,
    radius: float | torch.Tensor,
    center: float | torch.Tensor | None,
    dim: int,
) -> torch.Tensor:
    work = working_dtype(x)
    if not -x.ndim <= dim < x.ndim or x.shape[dim] == 0:
        raise ProblemError(
            f"x of shape {tuple(x.shape)} has no entries along dim {dim}", expected="at least one"
        )
    dim = (
        dim - x.ndim if dim >= 0 else dim
    )  # counted from the end: a radius may bring batch dimensions of its own
    positive("radius", radius)
    if isinstance(center, torch.Tensor):
        center = center.to(work)
    z = x.to(work) if center is None else x.to(work) - center
    z = z.movedim(dim, -1)
    r = radius.to(work) if isinstance(radius, torch.Tensor) else z.new_full((), radius)
    try:
        batch = torch.broadcast_shapes(z.shape[:-1], r.shape)
    except RuntimeError:
        raise ProblemError(
            "radius", expected=f"a shape that broadcasts against {tuple(z.shape[:-1])}", got=tuple(r.shape)
        ) from None
    y = apply(rule, z.expand(*batch, -1), r.expand(batch).unsqueeze(-1)).movedim(-1, dim)
    return (y if center is None else y + center).to(x.dtype)


def project_sphere(
    x: torch.Tensor,
    p: float = 2,
    radius: float | torch.Tensor = 1.0,
    center: float | torch.Tensor | None = None,
    dim: int = -1,
    nonsmooth: Nonsmooth = "manifold",
) -> torch.Tensor:
    """The nearest point to ``x`` with ``|y - center|_p = radius`` over ``dim``, from outside and from inside.

    Exact, of any order, on any device, under ``torch.func``. Where several points are nearest one is chosen: zero
    counts as positive, of equally large entries the first goes to the face of the Linf sphere, and the centre of the
    L2 sphere goes to ``radius / sqrt(n)`` in every entry, with a zero derivative by ``x``. Entries on a kink stay.

    Args:
        radius: A number, or a tensor that broadcasts against ``x`` without ``dim``; positive.
        center: A tensor that broadcasts to ``x``, or None for zero.
        nonsmooth: ``"manifold"``, what finite differences give (the paper's Dzy), or ``"clarke"`` (its Dy).

    Raises:
        ProblemError: ``x`` is not real floating point or has no entries along ``dim``, ``radius`` is not positive and
            finite, ``p`` is not 1, 2 or inf, or ``nonsmooth`` is unknown.
    """
    return _project(_rule(p, False, nonsmooth), x, radius, center, dim)


def project_ball(
    x: torch.Tensor,
    p: float = 2,
    radius: float | torch.Tensor = 1.0,
    center: float | torch.Tensor | None = None,
    dim: int = -1,
    nonsmooth: Nonsmooth = "manifold",
) -> torch.Tensor:
    """The nearest point to ``x`` with ``|y - center|_p <= radius`` over ``dim``.

    As ``project_sphere`` outside, and ``x`` itself inside. On the boundary the derivative is one-sided; the constraint
    counts as active, as ReLU's at zero does.

    Raises:
        ProblemError: As for ``project_sphere``.
    """
    return _project(_rule(p, True, nonsmooth), x, radius, center, dim)


def project_simplex(x: torch.Tensor, radius: float | torch.Tensor = 1.0, dim: int = -1) -> torch.Tensor:
    """The nearest point to ``x`` with ``y >= 0`` and ``y.sum(dim) = radius``.

    Exact, of any order, on any device, under ``torch.func``. Where an entry is exactly at the threshold the derivative
    is one-sided, and the entry is kept at zero.

    Raises:
        ProblemError: ``x`` is not real floating point or has no entries along ``dim``, or ``radius`` is not positive
            and finite.
    """
    return _project(_SIMPLEX, x, radius, None, dim)


class _LpProjection(nn.Module):
    """The settings of a projection; tensors among them are parameters or buffers of the module."""

    radius: float | torch.Tensor
    center: float | torch.Tensor | None
    ball: bool

    def __init__(
        self,
        p: float = 2,
        radius: float | torch.Tensor = 1.0,
        center: float | torch.Tensor | None = None,
        dim: int = -1,
        nonsmooth: Nonsmooth = "manifold",
    ) -> None:
        super().__init__()
        _rule(p, self.ball, nonsmooth)
        self.p, self.dim, self.nonsmooth = p, dim, nonsmooth
        keep(self, radius=radius, center=center)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _project(_rule(self.p, self.ball, self.nonsmooth), x, self.radius, self.center, self.dim)

    def problem(self, n: int) -> Problem:
        """The problem that it solves for n entries: variable ``u``, parameter ``x``, a radius of shape ()."""
        p, radius, center = self.p, self.radius, self.center

        def beyond(u: torch.Tensor) -> torch.Tensor:
            d = u if center is None else u - center
            if p == 2:
                return d.square().sum() - radius**2
            return (d.abs().sum() if p == 1 else d.abs().amax()) - radius

        constraint = {"ball" if self.ball else "sphere": beyond}
        equality, inequality = (None, constraint) if self.ball else (constraint, None)
        return Problem({"u": (n,)}, {"x": (n,)}, squared_distance, equality, inequality)


def squared_distance(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """1/2 |u - x|^2."""
    return 0.5 * (u - x).square().sum()


class SphereProjection(_LpProjection):
    """``project_sphere`` as a module."""

    ball = False


class BallProjection(_LpProjection):
    """``project_ball`` as a module."""

    ball = True


class SimplexProjection(nn.Module):
    """``project_simplex`` as a module."""

    radius: float | torch.Tensor

    def __init__(self, radius: float | torch.Tensor = 1.0, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim
        keep(self, radius=radius)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project_simplex(x, self.radius, self.dim)

    def problem(self, n: int) -> Problem:
        """The problem that it solves for n entries: variable ``u``, parameter ``x``, a radius of shape ()."""
        radius = self.radius
        return Problem(
            {"u": (n,)},
            {"x": (n,)},
            squared_distance,
            {"simplex": lambda u: u.sum() - radius},
            bounds={"u": (0.0, None)},
        )
