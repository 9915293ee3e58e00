"""Robust pooling of vectors: the point that a set of points agrees on.

    y = argmin_u  sum_i w_i phi(|u - x_i|; alpha),     u, x_i in R^d

With d_i = (y - x_i) / alpha, s = |d_i|^2, k1 = psi / z and k2 = dk1/dz / z, the Hessian is a sum of small matrices:

    H_i = w_i (k1 I + k2 d_i d_i^T),    H = sum_i H_i,    dy/dx_i = H^-1 H_i,    sum_i dy/dx_i = I

    dy/dw_i = -alpha H^-1 k1 d_i,       dy/dalpha = sum_i (dy/dx_i) d_i      (Euler's formula, as in pooling.py)

A vjp is one d x d solve v = H^-1 cotangent and one product H_i v a point. Source: Gould et al. (2019), section 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ddn_solvers.errors import ProblemError
from ddn_solvers.nodes.closed_form import Rule, Tensors, apply, working_dtype
from ddn_solvers.nodes.penalised import Penalised, check_values, penalty_named, scale_of, weights_of
from ddn_solvers.nodes.penalties import PENALTIES, Penalty
from ddn_solvers.problem import Problem

_STARTS = 64  # points of a pool that are tried as starts
_KEPT = 8  # of these, the best are followed
_SHIFTS = 30
_STEPS = 500


class _VectorPool(Rule):
    """Points x (*batch, n, d), alpha (*batch, 1, 1) and, if any, weights (*batch, n, 1) to y (*batch, 1, d)."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        x, alpha = inputs[:2]
        check_values(alpha, inputs[2].squeeze(-1) if len(inputs) > 2 else None)
        w = inputs[2] if len(inputs) > 2 else torch.ones_like(x[..., :1])
        batch = torch.broadcast_shapes(*(value.shape[:-2] for value in inputs))
        x, w = (value.expand(*batch, *value.shape[-2:]) for value in (x, w))
        mean = (w * x).sum(-2, keepdim=True) / w.sum(-2, keepdim=True)
        if self.penalty is PENALTIES["quadratic"]:
            return mean
        t = (x - mean) / alpha
        lost = t.sum((-2, -1), keepdim=True).isnan()
        y = mean + alpha * self._minimum(t.masked_fill(lost, 0), w)
        return y.masked_fill(lost, math.nan)

    def _minimum(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Mean shift from every start, which never goes up, then Newton's method from the best."""
        u = self._starts(t, w)
        for _ in range(_SHIFTS):
            u = self._shifted(u, t, w)
        best = self._objective(u, t, w).argmin(-1)[..., None, None]
        u = u.gather(-2, best.expand(*best.shape[:-1], t.shape[-1]))
        moving = torch.ones_like(best, dtype=torch.bool)
        for _ in range(_STEPS):
            d = u - t
            k1, k2 = self._slopes(d)
            gradient = (w * k1 * d).sum(-2, keepdim=True)
            newton = u - gradient @ _inverse(_hessian(d, k1, k2, w))
            # As good as before up to rounding: near the end the objective cannot tell.
            good = self._objective(newton, t, w) <= self._objective(u, t, w) * (1 + 4 * _eps(t))
            new = torch.where(good[..., None], newton, self._shifted(u, t, w))
            small = (new - u).abs().amax((-2, -1), keepdim=True) <= 8 * _eps(t) * (
                1 + u.abs().amax((-2, -1), keepdim=True)
            )
            u = torch.where(moving, new, u)
            moving = moving & ~small
            if not bool(moving.any()):
                break
        return u

    def _starts(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """(*batch, S, d): the mean, which is zero; if there may be several valleys, the median and the best points."""
        mean = torch.zeros_like(t[..., :1, :])
        if self.penalty.convex:
            return mean
        counted = torch.where(w > 0, t, math.nan)
        some = t[..., :: max(1, t.shape[-2] // _STARTS), :]
        value = self._objective(some, t, w).masked_fill(
            w[..., :: max(1, t.shape[-2] // _STARTS), 0] == 0, math.inf
        )
        best = value.topk(min(_KEPT, value.shape[-1]), -1, largest=False).indices[..., None]
        points = some.gather(-2, best.expand(*best.shape[:-1], t.shape[-1]))
        return torch.cat((mean, counted.nanmedian(-2, keepdim=True).values, points), -2)

    def _objective(self, u: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Of points u (*batch, S, d): (*batch, S)."""
        s = (u[..., None, :] - t[..., None, :, :]).square().sum(-1)
        return (self.penalty.value(s) * w[..., None, :, 0]).sum(-1)

    def _shifted(self, u: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The minimum of the quadratic that touches the objective at u from above."""
        s = (u[..., None, :] - t[..., None, :, :]).square().sum(-1)
        pull = self.penalty.ratio(s) * w[..., None, :, 0]
        total = pull.sum(-1, keepdim=True)
        return torch.where(total > 0, pull @ t / total, u)

    def _slopes(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = d.square().sum(-1, keepdim=True)
        k1 = self.penalty.ratio(s)
        return k1, self.penalty.bend(s, k1)

    def _derivative(
        self, inputs: Tensors, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """d, w k1, w k2, k1 and the inverse of H."""
        x, alpha, *rest = inputs
        d = (y - x) / alpha
        k1, k2 = self._slopes(d)
        w = rest[0] if rest else torch.ones_like(k1)
        return d, w * k1, w * k2, k1, _inverse(_hessian(d, k1, k2, w))

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        d, k1, k2, unweighted, inverse = self._derivative(inputs, y)
        v = cotangent @ inverse
        along = (d * v).sum(-1, keepdim=True)
        by_x = k1 * v + k2 * along * d  # H_i v
        found: list[torch.Tensor | None] = [by_x if needed[0] else None]
        found.append((by_x * d).sum((-2, -1), keepdim=True) if needed[1] else None)
        if len(inputs) > 2:
            found.append(-inputs[1] * unweighted * along if needed[2] else None)
        return tuple(
            None if g is None else g.sum_to_size(i.shape) for g, i in zip(found, inputs, strict=True)
        )

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        d, k1, k2, unweighted, inverse = self._derivative(inputs, y)
        by_x, by_alpha, *rest = tangents
        change = torch.zeros_like(y)
        for tangent in (by_x, None if by_alpha is None else by_alpha * d):
            if tangent is not None:
                change = change + (k1 * tangent + k2 * (d * tangent).sum(-1, keepdim=True) * d).sum(
                    -2, keepdim=True
                )
        if rest and rest[0] is not None:
            change = change - inputs[1] * (unweighted * rest[0] * d).sum(-2, keepdim=True)
        return change @ inverse


def _eps(t: torch.Tensor) -> float:
    return torch.finfo(t.dtype).eps


def _hessian(d: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)
    return (w * k1).sum((-2, -1))[..., None, None] * identity + d.mT @ (w * k2 * d)


def _inverse(hessian: torch.Tensor) -> torch.Tensor:
    """The inverse; the pseudo-inverse where points on one line leave a Huber pool undecided."""
    return torch.linalg.pinv(hessian, rtol=1e3 * _eps(hessian), hermitian=True)


_RULES = {name: _VectorPool(penalty) for name, penalty in PENALTIES.items()}


def robust_vector_pool(
    x: torch.Tensor,
    penalty: str = "huber",
    alpha: float | torch.Tensor = 1.0,
    *,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pool sets of vectors with a robust penalty of the Euclidean distance, differentiable to any order.

    Convex penalties: the minimum, by Newton's method to rounding. "welsch" and "truncated": the best local minimum
    reached from the mean, the coordinates' medians and the best of up to 64 of the points; the global one where some
    start lies in its valley. The Jacobians by the points of a pool sum to the identity. Each pool stands alone.

    Args:
        x: (..., n, d): sets of n points.
        penalty: As in ``robust_pool``.
        alpha: As in ``robust_pool``; broadcasts against (...).
        weights: Broadcasts against (..., n); not negative; gets its gradient.
        mask: Broadcasts against (..., n): True for points that count.

    Returns:
        (..., d).

    Raises:
        ProblemError: As ``robust_pool``.
    """
    if x.ndim < 2:
        raise ProblemError(f"x of shape {tuple(x.shape)} is no set of points: (..., n, d) was expected")
    penalty_named(penalty)
    work, batch = working_dtype(x), x.shape[:-2]
    if x.shape[-2] == 0:
        raise ProblemError(f"x of shape {tuple(x.shape)} has no points: a pool has no minimum")
    w = weights_of(weights, mask, x.shape[:-1], work)
    if mask is not None:
        x = torch.where(mask.to(torch.bool)[..., None], x, 0)
    inputs = [x.to(work), scale_of(alpha, batch, x.device, work)[..., None]]
    if w is not None:
        inputs.append(w[..., None])
    return apply(_RULES[penalty], *inputs).squeeze(-2).to(x.dtype)


class RobustVectorPool(Penalised):
    """``robust_vector_pool`` as a module; its arguments are those of ``RobustPool`` without dimensions."""

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``robust_vector_pool``."""
        return robust_vector_pool(x, self.penalty, self.alpha, weights=weights, mask=mask)

    def problem(self, n: int, d: int) -> Problem:
        """The pool of n points in d dimensions: variable ``u``, parameters ``x``, ``alpha`` and ``weights``."""
        penalty = PENALTIES[self.penalty]

        def objective(
            u: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            s = ((u - x) / alpha).square().sum(-1)
            return (weights * penalty.value(s)).sum() * alpha**penalty.scale

        return Problem({"u": (d,)}, {"x": (n, d), "alpha": (), "weights": (n,)}, objective)
