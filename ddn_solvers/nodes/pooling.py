"""Robust pooling: the value that a set of numbers agrees on.

    y = argmin_u  sum_i w_i phi(u - x_i; alpha)

With k_i = w_i phi''(y - x_i), which the optimality condition  sum_i w_i psi(y - x_i) = 0  gives:

    dy/dx_i = k_i / sum k,     dy/dw_i = -psi_i / sum k,     dy/dalpha = sum_i (dy/dx_i) (y - x_i) / alpha

The derivatives by x sum to one. The last formula is Euler's: y(c x, c alpha) = c y(x, alpha) for every penalty, so
sum_i x_i dy/dx_i + alpha dy/dalpha = y. Source: Gould et al. (2019), section 5.1 and Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ddn_solvers.errors import DegeneracyWarning, ProblemError, warn_caller
from ddn_solvers.nodes.closed_form import Rule, Tensors, apply, working_dtype
from ddn_solvers.nodes.location import location
from ddn_solvers.nodes.penalised import Penalised, check_values, penalty_named, scale_of, weights_of
from ddn_solvers.nodes.penalties import PENALTIES, Penalty
from ddn_solvers.problem import Problem
from ddn_solvers.transforms import is_transformed

_BLOCK = 1 << 17  # entries of a block of rows: one and a few temporaries of it stay in the second-level cache


class _Pool(Rule):
    """Points x (*batch, n), alpha (*batch, 1) and, if any, weights (*batch, n) to y (*batch, 1)."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        check_values(inputs[1], inputs[2] if len(inputs) > 2 else None)
        batch, rows = _rows(*inputs)
        y, flat = rows[0].new_empty(len(rows[0]), 1), 0
        for some in _blocks(rows[0]):
            x, alpha, *rest = (value[some] for value in rows)
            w = rest[0] if rest else None
            mean = x.mean(1, keepdim=True) if w is None else _mean(x, w)
            v, middle = location(self.penalty, (x - mean) / alpha, w)
            y[some] = torch.addcmul(mean, alpha, v)
            flat += int(middle.sum())
        if flat:
            warn_caller(
                f"the minimum of {flat} of {len(y)} pools is not unique: no point is nearer than alpha. The middle of "
                "the interval of minimisers is returned, with the derivative of that middle.",
                DegeneracyWarning,
            )
        return y.reshape(*batch, 1)

    def _slopes(
        self, inputs: Tensors, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """z_i = (y - x_i) / alpha, dy/dx_i = k_i / sum k, psi_i, and sum k."""
        x, alpha, *rest = inputs
        z = (y - x) / alpha
        force, k = self.penalty.newton(z)
        if rest:
            k = k * rest[0]
        if self.penalty is PENALTIES["huber"]:
            k = _or_nearest(k, z, y / alpha, rest)
        total = k.sum(-1, keepdim=True)
        return z, k / total, force, total

    def final_vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """The same block by block: a few passes over each while it is in the cache."""
        batch, rows = _rows(*inputs, y, cotangent)
        found = [torch.empty_like(value) if need else None for value, need in zip(rows, needed, strict=False)]
        for some in _blocks(rows[0]):
            *values, y_rows, v_rows = (value[some] for value in rows)
            for whole, part in zip(found, self.vjp(values, y_rows, v_rows, needed), strict=True):
                if whole is not None and part is not None:
                    whole[some] = part
        return tuple(
            None if g is None else g.reshape(*batch, g.shape[-1]).sum_to_size(i.shape)
            for g, i in zip(found, inputs, strict=True)
        )

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        z, shares, force, total = self._slopes(inputs, y)
        found: list[torch.Tensor | None] = [shares * cotangent if needed[0] else None]
        found.append((shares * z).sum(-1, keepdim=True) * cotangent if needed[1] else None)
        if len(inputs) > 2:
            found.append(-force * (inputs[1] * cotangent / total) if needed[2] else None)
        return tuple(
            None if g is None else g.sum_to_size(i.shape) for g, i in zip(found, inputs, strict=True)
        )

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        z, shares, force, total = self._slopes(inputs, y)
        by_x, by_alpha, *rest = tangents
        change = torch.zeros_like(y)
        if by_x is not None:
            change = change + (shares * by_x).sum(-1, keepdim=True)
        if by_alpha is not None:
            change = change + (shares * z).sum(-1, keepdim=True) * by_alpha
        if rest and rest[0] is not None:
            change = change - (force * rest[0]).sum(-1, keepdim=True) * inputs[1] / total
        return change


def _mean(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    share = w / w.amax(1, keepdim=True)  # huge weights do not overflow
    return (share * x).sum(1, keepdim=True) / share.sum(1, keepdim=True)


def _or_nearest(k: torch.Tensor, z: torch.Tensor, scale: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """Where no point is nearer than alpha, one for the two points that bound the interval of minimisers."""
    distance = z.abs()
    if weights:
        distance = torch.where(weights[0] > 0, distance, math.inf)
    least = distance.amin(-1, keepdim=True)
    flat = least > 1
    if not (torch.is_grad_enabled() or is_transformed(flat)) and not bool(flat.any()):
        return k
    # y lies in the middle of two points up to its rounding.
    slack = 8 * torch.finfo(z.dtype).eps * (least + scale.abs())
    return torch.where(flat, (distance <= least + slack).to(z.dtype), k)


def _rows(*inputs: torch.Tensor) -> tuple[torch.Size, list[torch.Tensor]]:
    """The batch shape, and every input as a matrix with one row a pool, without a copy where torch can."""
    batch = torch.broadcast_shapes(*(value.shape[:-1] for value in inputs))
    count = batch.numel()
    return batch, [value.expand(*batch, -1).reshape(count, value.shape[-1]) for value in inputs]


def _blocks(x: torch.Tensor) -> list[slice]:
    """Rows of a matrix in blocks that stay in the cache."""
    step = max(1, _BLOCK // max(1, x.shape[1]))
    return [slice(start, start + step) for start in range(0, len(x), step)]


_RULES = {name: _Pool(penalty) for name, penalty in PENALTIES.items()}


def robust_pool(
    x: torch.Tensor,
    penalty: str = "huber",
    alpha: float | torch.Tensor = 1.0,
    dim: int | Sequence[int] | None = -1,
    *,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    keepdim: bool = False,
) -> torch.Tensor:
    """Pool a tensor over dimensions with a robust penalty: its global minimum, differentiable to any order.

    Exact for "quadratic" (the mean), "huber" and "truncated"; Newton's method to rounding for "pseudo-huber" and
    "welsch". The gradient by the points of a pool sums to one. Each pool stands alone; a NaN makes its own pool NaN.
    Half precision is computed in float32.

    Args:
        x: Points, of any shape.
        penalty: "quadratic", "pseudo-huber", "huber", "welsch" or "truncated" (quadratic).
        alpha: The distance at which points begin to count as outliers, in units of ``x``; positive. A tensor
            broadcasts against the result (without ``keepdim``) and gets its gradient.
        dim: Dimensions to pool over; None for all.
        weights: Broadcasts against ``x``; not negative; gets its gradient.
        mask: Broadcasts against ``x``: True for points that count. What the others hold (NaN too) has no effect.
        keepdim: Keep the pooled dimensions, of size 1.

    Returns:
        A tensor of the shape of ``x`` without ``dim``.

    Raises:
        ProblemError: Unknown penalty, wrong dtype or shape, alpha or weights out of range, an empty pool.

    Warns:
        DegeneracyWarning: A Huber pool has an interval of minimisers; the middle is returned.
    """
    points, alpha, weights, finish = _arranged(x, penalty, alpha, dim, weights, mask, keepdim)
    if penalty == "quadratic" and weights is None:
        return finish(points.mean(-1))
    inputs = (points, alpha) if weights is None else (points, alpha, weights)
    return finish(apply(_RULES[penalty], *inputs).squeeze(-1))


def _arranged(
    x: torch.Tensor,
    penalty: str,
    alpha: float | torch.Tensor,
    dim: int | Sequence[int] | None,
    weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    keepdim: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Callable[[torch.Tensor], torch.Tensor]]:
    """Points (*kept, n), alpha (*kept or 1, 1), weights, and what puts a result (*kept) into the caller's shape."""
    penalty_named(penalty)
    work = working_dtype(x)
    pooled = _dimensions(x, dim)
    kept = [d for d in range(x.ndim) if d not in pooled]
    shape = torch.Size(x.shape[d] for d in kept)

    def flattened(values: torch.Tensor) -> torch.Tensor:
        return values.permute(*kept, *pooled).reshape(*shape, math.prod(x.shape[d] for d in pooled))

    def finish(y: torch.Tensor) -> torch.Tensor:
        full = [1 if d in pooled else size for d, size in enumerate(x.shape)]
        return (y.reshape(full) if keepdim else y).to(x.dtype)

    weights = weights_of(weights, mask, x.shape, work)
    if weights is not None:
        weights = flattened(weights)
    if mask is not None:
        x = torch.where(mask.to(torch.bool), x, 0)
    points = flattened(x.to(work))
    if points.shape[-1] == 0:
        raise ProblemError(
            f"x of shape {tuple(x.shape)} has no points along dim {dim}: a pool has no minimum"
        )
    return points, scale_of(alpha, shape, x.device, work), weights, finish


def _dimensions(x: torch.Tensor, dim: int | Sequence[int] | None) -> list[int]:
    given = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if not all(-x.ndim <= d < x.ndim for d in given):
        raise ProblemError(f"dim {dim} is out of range for x of shape {tuple(x.shape)}")
    found = [d % x.ndim for d in given]
    if not found or len(set(found)) != len(found):
        raise ProblemError(f"dim {dim} must name at least one dimension of x, and each one time")
    return found


class RobustPool(Penalised):
    """``robust_pool`` as a module.

    Args:
        penalty: As in ``robust_pool``.
        alpha: As in ``robust_pool``; a tensor becomes a buffer.
        dim: As in ``robust_pool``.
        learnable: Make alpha a parameter, ``log_alpha``, which keeps it positive.
        keepdim: As in ``robust_pool``.
    """

    def __init__(
        self,
        penalty: str = "huber",
        alpha: float | torch.Tensor = 1.0,
        dim: int | Sequence[int] | None = -1,
        learnable: bool = False,
        keepdim: bool = False,
    ) -> None:
        super().__init__(penalty, alpha, learnable)
        self.dim, self.keepdim = dim, keepdim

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``robust_pool``."""
        return robust_pool(
            x, self.penalty, self.alpha, self.dim, weights=weights, mask=mask, keepdim=self.keepdim
        )

    def problem(self, n: int) -> Problem:
        """The pool of n points: variable ``u``, parameters ``x``, ``alpha`` and ``weights``."""
        penalty = PENALTIES[self.penalty]

        def objective(
            u: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            return (weights * penalty.value(((u - x) / alpha) ** 2)).sum() * alpha**penalty.scale

        return Problem({"u": ()}, {"x": (n,), "alpha": (), "weights": (n,)}, objective)
