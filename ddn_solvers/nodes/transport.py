"""Optimal transport with an entropy, over the last two dimensions.

    P = argmin_P  sum_ij C_ij P_ij + eps P_ij (log P_ij - 1)    subject to  P 1 = r,  P^T 1 = c

Written as P_ij = r_i c_j E_ij with E_ij = exp(k_i + h_j - C_ij / eps), the constraints are E c = 1 and E^T r = 1, which
say what k and h are for points without mass too. Their linearisation in (k, h), with k eliminated, is

    X = I - E^T diag(r) E diag(c)        (+ 1 c^T / sum c: k + t, h - t is the same plan)

and this one n x n matrix gives Newton's step, the vjp and the jvp.

Sources: Cuturi (2013); Luise et al. (2018), section 4, for the gradients; Schmitzer (2019), section 3, for scaling eps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ddn_solvers.dense_lu import solved
from ddn_solvers.errors import ConvergenceWarning, ProblemError, warn_caller
from ddn_solvers.nodes.closed_form import Rule, Tensors, apply, keep, positive, times, working_dtype
from ddn_solvers.problem import Problem

_GENTLE = 8.0  # spread of C / eps where Newton's method starts, at h = 0
_NEAR = 0.1  # share of misplaced mass at which eps is halved
_LONGEST = 8.0  # change of a potential in one step
_HALVINGS = 8  # of Newton's step
_ITERATIONS = 200


def _plan_over_masses(K: torch.Tensor, k: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """E; only where both masses are zero, or nearly, can it be so large that it is cut."""
    exponent = k[..., :, None] + h[..., None, :] - K
    return exponent.clamp(max=0.5 * math.log(torch.finfo(K.dtype).max)).exp()


def _reduced(E: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """X; a few roundings are added where blocks of the plan are linked by nothing, as each has a shift of its own."""
    n = c.shape[-1]
    link = 1 + 16 * torch.finfo(E.dtype).eps
    product = (r[..., None] * E).mT @ E
    deflated = 1 / c.sum(-1)[..., None, None] - product
    return link * torch.eye(n, dtype=E.dtype, device=E.device) + deflated * c[..., None, :]


class _Potentials(Rule):
    """(k, h) of shape (..., m + n) from C / eps of shape (..., m, n), r of shape (..., m), c of shape (..., n)."""

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        K, r, c = inputs
        _check(K, r, c)
        batch, (m, n) = K.shape[:-2], K.shape[-2:]
        flat = (K.reshape(-1, m, n), r.reshape(-1, m), c.reshape(-1, n))
        return torch.cat(_solved(*flat), -1).reshape(*batch, m + n)

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        (K, r, c), m = inputs, inputs[1].shape[-1]
        E = _plan_over_masses(K, y[..., :m], y[..., m:])
        v_k, v_h = cotangent[..., :m], cotangent[..., m:]
        by_columns = solved(_reduced(E, r, c).mT, v_h - c * times(E.mT, v_k))
        by_rows = v_k - r * times(E, by_columns)
        return (
            E * (torch.stack([by_rows, r], -1) @ torch.stack([c, by_columns], -2)) if needed[0] else None,
            -times(E, by_columns) if needed[1] else None,
            -times(E.mT, by_rows) if needed[2] else None,
        )

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        (K, r, c), m = inputs, inputs[1].shape[-1]
        E = _plan_over_masses(K, y[..., :m], y[..., m:])
        d_K, d_r, d_c = (
            torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)
        )
        rows = times(E * d_K, c) - times(E, d_c)
        columns = times((E * d_K).mT, r) - times(E.mT, d_r)
        d_h = solved(_reduced(E, r, c), columns - times(E.mT, r * rows))
        return torch.cat([rows - times(E, c * d_h), d_h], -1)


def _check(K: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> None:
    if not K.isfinite().all():
        raise ProblemError("cost", expected="finite entries", fix="Forbid a pair by a large cost.")
    for name, mass in (("source", r), ("target", c)):
        if not ((mass >= 0) & (mass < math.inf)).all() or (mass.sum(-1) == 0).any():
            raise ProblemError(name, expected="finite masses, none negative, not all zero", got=mass)
    gap = (r.sum(-1) / c.sum(-1) - 1).abs()
    if (gap > math.sqrt(torch.finfo(K.dtype).eps)).any():
        raise ProblemError(
            f"source and target differ in their total mass, by a share of {float(gap.max()):.1e}",
            expected="equal sums",
            fix="Scale one of them, target * source.sum() / target.sum().",
        )


class _Dual:
    """The concave dual problem in h alone, k eliminated, of each instance of a flat batch; c sums to what r does."""

    def __init__(self, K: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> None:
        self.K, self.r, self.c, self.log_r, self.log_c = K, r, c, r.log(), c.log()

    def rows(self, h: torch.Tensor) -> torch.Tensor:
        return -((self.log_c + h)[:, None, :] - self.K).logsumexp(-1)

    def columns(self, k: torch.Tensor) -> torch.Tensor:
        return -((self.log_r + k)[:, :, None] - self.K).logsumexp(-2)

    def at(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """E, what columns get over what they should, the dual value, the share of mass that is misplaced."""
        k = self.rows(h)
        E = _plan_over_masses(self.K, k, h)
        filled = times(E.mT, self.r)
        value = (self.c * h).sum(-1) + (self.r * k).sum(-1)
        return E, filled, value, (self.c * (filled - 1)).abs().sum(-1) / self.c.sum(-1)

    def following(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next h, by Newton's step if a part of it helps, else by Sinkhorn's; and the misplaced mass before it."""
        E, filled, value, misplaced = self.at(h)
        X = _reduced(E / filled[:, None, :], self.r, self.c * filled)
        step = solved(X, 1 / filled - 1, checked=False)
        # Blocks that almost nothing links shift against each other by huge steps in the right direction.
        step = step * (_LONGEST / step.abs().amax(-1, keepdim=True)).clamp(max=1)
        rise = (self.c * (1 - filled) * step).sum(-1)
        rounding = torch.finfo(h.dtype).eps * 8 * (self.c * h).abs().sum(-1)
        found, left = h, step.isfinite().all(-1)
        stuck = torch.ones_like(left)
        for halvings in range(_HALVINGS):
            tried = torch.where(left[:, None], h + 0.5**halvings * step, h)
            *_, there, remaining = self.at(tried)
            # Where the value changes by rounding only, the residual decides.
            level = (remaining < misplaced) & ((there - value).abs() <= rounding)
            better = left & (level | (there > value + 1e-4 * 0.5**halvings * rise))
            found, left, stuck = torch.where(better[:, None], tried, found), left & ~better, stuck & ~better
            if not left.any():
                break
        if stuck.any():
            found = torch.where(stuck[:, None], self.columns(self.rows(h)), found)
        return found, misplaced


def _solved(K: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Newton's method while eps is halved down to its value; each instance goes and stops by itself."""
    if not K.numel():
        return torch.zeros_like(r), torch.zeros_like(c)
    c = c * (r.sum(-1, keepdim=True) / c.sum(-1, keepdim=True))
    spread = K.amax((-1, -2)) - K.amin((-1, -2))
    tolerance = torch.finfo(K.dtype).eps * (32 + spread)
    scale = (spread / _GENTLE).clamp(min=1)
    h = torch.zeros_like(c)
    active = torch.arange(len(K), device=K.device)
    for _ in range(_ITERATIONS):
        at = scale[active, None]
        dual = _Dual(K[active] / at[..., None], r[active], c[active])
        following, misplaced = dual.following(h[active])
        final = at[:, 0] == 1
        going = ~final | (misplaced > tolerance[active])
        h[active] = torch.where(going[:, None], following, h[active])
        near = ~final & (misplaced < _NEAR)
        scale[active] = torch.where(near, (at[:, 0] / 2).clamp(min=1), at[:, 0])
        h[active] *= at / scale[active, None]
        active = active[going]
        if not len(active):
            break
    else:
        warn_caller(
            f"entropic_transport: {len(active)} of {len(K)} plans miss the target masses, the worst by a share of "
            f"{float(misplaced.max()):.1e}. Raise epsilon, or use float64.",
            ConvergenceWarning,
        )
    dual = _Dual(K, r, c)
    h = dual.columns(dual.rows(h))
    return dual.rows(h), h


def entropic_transport(
    cost: torch.Tensor,
    source: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    epsilon: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The cheapest plan that moves ``source`` to ``target``, blurred by an entropy of weight ``epsilon``.

    Solved in the log domain to rounding (rows sum to ``source`` exactly, columns to ``target`` within a share of
    ``eps * (32 + (max C - min C) / epsilon)``, eps that of the dtype), by Sinkhorn's iteration and Newton's method.
    Differentiable in all inputs, to any order, in forward mode and under ``torch.func``; the backward solves one
    system of the smaller side. Gradients by ``source`` and ``target`` are those along which their sums stay equal, as
    no other direction has a plan. Zero masses are allowed; their derivative is the one-sided one.

    Args:
        cost: Shape (..., m, n), of any sign.
        source: Masses, shape (..., m); by default 1 / m each.
        target: Masses of the same sum, shape (..., n); by default 1 / n each.
        epsilon: Positive, in the units of cost; a number or a tensor that broadcasts against the batch.

    Returns:
        The plan, shape (..., m, n).

    Raises:
        ProblemError: Shapes do not fit, costs are not finite, masses are negative or of different sums, or
            ``epsilon`` is not positive and finite.

    Warns:
        ConvergenceWarning: A plan has misplaced mass beyond what is said above.
    """
    dtype = working_dtype(cost)
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ProblemError("cost", expected="shape (..., m, n), m and n positive", got=tuple(cost.shape))
    m, n = cost.shape[-2:]
    masses = []
    for name, mass, size in (("source", source, m), ("target", target, n)):
        mass = torch.full((size,), 1 / size, dtype=dtype) if mass is None else mass
        if mass.shape[-1:] != (size,):
            raise ProblemError(name, expected=f"shape (..., {size})", got=tuple(mass.shape))
        masses.append(mass.to(cost.device, dtype))
    r, c = masses
    epsilon = torch.as_tensor(positive("epsilon", epsilon), dtype=dtype, device=cost.device)
    try:
        batch = torch.broadcast_shapes(cost.shape[:-2], r.shape[:-1], c.shape[:-1], epsilon.shape)
    except RuntimeError:
        raise ProblemError(
            f"batches of cost, source, target and epsilon do not broadcast: {tuple(cost.shape[:-2])}, "
            f"{tuple(r.shape[:-1])}, {tuple(c.shape[:-1])}, {tuple(epsilon.shape)}"
        ) from None
    K = (cost.to(dtype) / epsilon[..., None, None]).expand(*batch, m, n)
    r, c = _balanced(r.expand(*batch, m), c.expand(*batch, n))
    plan = _plan(K, r, c) if m >= n else _plan(K.mT, c, r).mT
    return plan.to(cost.dtype)


def _balanced(r: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same masses, with gradients projected on those that keep their sums equal."""
    excess = (r.sum(-1, keepdim=True) - c.sum(-1, keepdim=True)) / (r.shape[-1] + c.shape[-1])
    nothing = excess - excess.detach()
    return r - nothing, c + nothing


def _plan(K: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # What is added to a row or a column of costs changes no plan; without it exponents keep their digits.
    K = K - K.detach().amin(-1, keepdim=True)
    K = K - K.detach().amin(-2, keepdim=True)
    k, h = apply(_Potentials(), K, r, c).split([r.shape[-1], c.shape[-1]], -1)
    return r[..., None] * c[..., None, :] * _plan_over_masses(K, k, h)


class EntropicTransport(nn.Module):
    """``entropic_transport`` as a module; an ``nn.Parameter`` as epsilon is learnt."""

    epsilon: float | torch.Tensor

    def __init__(self, epsilon: float | torch.Tensor = 1.0) -> None:
        super().__init__()
        keep(self, epsilon=epsilon)

    def forward(
        self, cost: torch.Tensor, source: torch.Tensor | None = None, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        return entropic_transport(cost, source, target, self.epsilon)

    def problem(self, m: int, n: int) -> Problem:
        """The problem that it solves: variable ``P``, parameters ``cost``, ``source``, ``target``."""
        epsilon = self.epsilon
        return Problem(
            {"P": (m, n)},
            {"cost": (m, n), "source": (m,), "target": (n,)},
            lambda P, cost: (cost * P).sum() + epsilon * (P * (P.log() - 1)).sum(),
            {"source": lambda P, source: P.sum(1) - source, "target": lambda P, target: P.sum(0) - target},
        )
