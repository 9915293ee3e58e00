"""Derivatives of the solution through the KKT system: one adjoint solve, one pass over the parameters.

With the system of ``system.py``, cotangents (v_z, v_y, v_l, v_r) of point and multipliers give w, s and q,
and for the parameters p, whatever their number,

    grad_p = d/dp [ e f - w^T grad_z (f + y^T c) - s^T c - s_l^T lower + s_r^T upper ],
    s_l = q on active lower bounds, s_r = -q on active upper ones,

where e is the cotangent of the optimal value: by the envelope theorem it adds e d/dp L, that is e f and
-e times the multipliers to s, s_l and s_r, and needs no solve (Gould et al. 2019, sections 3 and 6.1).
The Jacobians with respect to p are never formed.

Stated once for arrays (compiled functions, fast) and once for what differs when the backward pass
itself is to be differentiated (torch functions, any order): both share the system and this formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ddn_solvers.active_set import ActiveSet
from ddn_solvers.arrays import Array, Mask
from ddn_solvers.kkt.system import System
from ddn_solvers.policy import Policy
from ddn_solvers.program import Program
from ddn_solvers.residuals import Evaluation


@dataclass(frozen=True)
class Cotangents:
    """Of z (B, n), y (B, m), the bound multipliers (B, n) and the objective (B,)."""

    z: torch.Tensor
    y: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    objective: torch.Tensor


@dataclass(frozen=True)
class Multipliers:
    """y (B, m), lower and upper (B, n), as tensors."""

    y: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


@dataclass(frozen=True)
class Masks:
    """One choice of active set, as tensors: rows of c (B, m), lower and upper bounds (B, n)."""

    constraints: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    @property
    def fixed(self) -> torch.Tensor:
        return self.lower | self.upper


@dataclass(frozen=True)
class Adjoint:
    """Weights of the formula above: w (B, n), s (B, m), s_l and s_r (B, n), e (B, 1)."""

    w: torch.Tensor
    s: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    e: torch.Tensor


def choices(
    sides: torch.Tensor, weak: torch.Tensor, m: int, n: int, policy: Policy
) -> list[tuple[float, Masks]]:
    """The active sets whose solutions are averaged: one, or two for ``weakly_active="mean"``."""
    if policy.weakly_active in ("active", "raise"):
        return [(1.0, _masks(sides, m, n))]
    without = _masks(sides & ~weak, m, n)
    if policy.weakly_active == "inactive":
        return [(1.0, without)]
    return [(0.5, _masks(sides, m, n)), (0.5, without)]


def _masks(sides: torch.Tensor, m: int, n: int) -> Masks:
    inequality, lower, upper = sides[..., : -2 * n], sides[..., -2 * n : -n], sides[..., -n:]
    always = torch.ones_like(lower[..., :1]).expand(*lower.shape[:-1], m - inequality.shape[-1])
    return Masks(torch.cat([always, inequality], dim=-1), lower, upper)


def adjoint(systems: Sequence[tuple[float, Masks, System]], v: Cotangents, at: Multipliers) -> Adjoint:
    """The weights for a cotangent; linear in it, so that the choices of active set simply average."""
    e = v.objective.unsqueeze(-1)
    w, s = torch.zeros_like(v.z), -e * at.y
    lower, upper = -e * at.lower, -e * at.upper
    for weight, masks, system in systems:
        target = torch.where(masks.lower, -v.lower, v.upper)
        step = system.solve(v.z, v.y, target)
        w, s = w + weight * step.x, s + weight * torch.where(masks.constraints, step.t, 0.0)
        lower = lower + weight * torch.where(masks.lower, step.q, 0.0)
        upper = upper - weight * torch.where(masks.upper, step.q, 0.0)
    return Adjoint(w, s, lower, upper, e)


@dataclass(frozen=True)
class Linearisation:
    """The KKT systems at a batch of verified points, factored once for every right-hand side."""

    evaluation: Evaluation
    active: ActiveSet
    singular: Mask
    policy: Policy
    nearby: System | None = None  # factored near these points with this active set

    @cached_property
    def systems(self) -> list[tuple[float, Masks, System]]:
        sides, weak = torch.from_numpy(self.active.sides), torch.from_numpy(self.active.weak)
        m, n = self.evaluation.program.constraints, self.active.n
        proximal = self.policy.proximal if self.policy.on_singular == "proximal" else None
        options: dict[str, Any] = {"linear_solver": self.policy.linear_solver, "proximal": proximal}
        if self.policy.weakly_active in ("active", "raise") or not self.active.weak.any():
            # The systems are those that were verified; dropping weakly active rows makes others.
            options |= {
                "singular": torch.from_numpy(self.singular),
                "any_singular": bool(self.singular.any()),
            }
            if self.nearby is not None:
                moved = self.nearby.moved(self.evaluation.H, self.evaluation.J)
                return [(weight, masks, moved) for weight, masks in choices(sides, weak, m, n, self.policy)]
        result = []
        for weight, masks in choices(sides, weak, m, n, self.policy):
            hessian, jacobian = self.evaluation.H, self.evaluation.regular_J
            result.append(
                (weight, masks, System(hessian, jacobian, masks.constraints, masks.fixed, **options))
            )
        return result

    def vjp(self, v: Cotangents) -> list[Array]:
        """Gradient by parameter block, (B, size) or, for a shared block, summed, (size,)."""
        point = self.evaluation.point
        at = Multipliers(*(torch.from_numpy(a) for a in (point.y, point.lower, point.upper)))
        a = adjoint(self.systems, v, at)
        weights = [t.numpy() for t in (a.w, a.s, a.lower, a.upper, a.e)]
        return self.evaluation.program.adjoint(point.z, self.evaluation.bound.parameters, point.y, *weights)

    def jvp(self, tangents: Sequence[Array]) -> tuple[torch.Tensor, ...]:
        """Tangents of z, y, lower, upper and objective for tangents of every parameter block."""
        point, parameters = self.evaluation.point, self.evaluation.bound.parameters
        arrays = self.evaluation.program.tangent(point.z, parameters, point.y, tangents)
        d_gradient, d_c, d_lower, d_upper = (torch.from_numpy(a) for a in arrays)
        return solution_tangent(self.systems, d_gradient, d_c, d_lower, d_upper)


def solution_tangent(
    systems: Sequence[tuple[float, Masks, System]],
    d_gradient: torch.Tensor,
    d_c: torch.Tensor,
    d_lower: torch.Tensor,
    d_upper: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """dz, dy, d lower, d upper for directional derivatives of grad_z L, c and the bounds."""
    totals = [torch.zeros_like(t) for t in (d_gradient, d_c, d_gradient, d_gradient)]
    for weight, masks, system in systems:
        step = system.solve(-d_gradient, -d_c, torch.where(masks.lower, d_lower, d_upper))
        parts = (
            step.x,
            torch.where(masks.constraints, step.t, 0.0),
            torch.where(masks.lower, step.q, 0.0),
            torch.where(masks.upper, -step.q, 0.0),
        )
        totals = [total + weight * part for total, part in zip(totals, parts, strict=True)]
    return tuple(totals)


class TorchLinearisation:
    """The same out of torch operations on z, multipliers and parameters, differentiable to any order."""

    def __init__(
        self,
        program: Program,
        parameters: Sequence[torch.Tensor],
        z: torch.Tensor,
        at: Multipliers,
        sides: torch.Tensor,
        weak: torch.Tensor,
        singular: torch.Tensor,
        any_singular: bool,
        policy: Policy,
    ) -> None:
        self.program, self.parameters, self.z, self.at = program, list(parameters), z, at
        # A declared block is 1-d when shared and 2-d in a batch; captured ones likewise.
        self._dims = [0 if p.dim() == 2 else None for p in self.parameters]
        hessian = self._map(torch.func.jacrev(self._gradient))(z, at.y, *self.parameters)
        jacobian = self._map(torch.func.jacrev(self._constraints))(z, at.y, *self.parameters)
        options: dict[str, Any] = {
            "singular": singular,
            "any_singular": any_singular,
            "transformed": True,
            "linear_solver": policy.linear_solver,
            "proximal": policy.proximal if policy.on_singular == "proximal" else None,
        }
        self.systems = [
            (weight, masks, System(hessian, jacobian, masks.constraints, masks.fixed, **options))
            for weight, masks in choices(sides, weak, program.constraints, z.shape[-1], policy)
        ]

    def vjp(self, v: Cotangents, scale: torch.Tensor) -> list[torch.Tensor]:
        """As ``Linearisation.vjp``; ``scale`` (B,) is 1, or what replaces the gradient of a sample (0, NaN)."""
        zero = Cotangents(*(torch.where(_rows(scale, t) == 1, t, 0.0) for t in vars(v).values()))
        a = adjoint(self.systems, zero, self.at)

        def total(z: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
            (w, s, sl, su, e), p = rest[:5], rest[5:]
            f, c, lower, upper = self.program.evaluate(z, p)
            along = w @ self._gradient(z, y, *p)
            return e[0] * f - along - s @ c - sl @ _finite(lower) + su @ _finite(upper)

        indices = tuple(range(7, 7 + len(self.parameters)))
        if not indices:
            return []
        gradients = self._map(torch.func.grad(total, argnums=indices), weights=5)(
            self.z, self.at.y, a.w, a.s, a.lower, a.upper, a.e, *self.parameters
        )
        scaled = [scale_rows(g, scale) for g in gradients]
        return [g if d == 0 else g.sum(0) for g, d in zip(scaled, self._dims, strict=True)]

    def jvp(self, tangents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """As ``Linearisation.jvp``, with the objective's tangent as well."""

        def directional(z: torch.Tensor, y: torch.Tensor, *rest: torch.Tensor) -> Any:
            p, dp = rest[: len(self.parameters)], rest[len(self.parameters) :]

            def all_of(*p: torch.Tensor) -> Any:
                f, c, lower, upper = self.program.evaluate(z, p)
                return f, self._gradient(z, y, *p), c, _finite(lower), _finite(upper)

            return _directional(all_of, p, dp)

        df, d_gradient, d_c, d_lower, d_upper = self._map(directional, twice=True)(
            self.z, self.at.y, *self.parameters, *tangents
        )
        dz, dy, dl, du = solution_tangent(self.systems, d_gradient, d_c, d_lower, d_upper)
        envelope = df + (self.at.y * d_c).sum(-1)
        envelope = envelope + (self.at.lower * d_lower).sum(-1) - (self.at.upper * d_upper).sum(-1)
        return dz, dy, dl, du, envelope

    def _gradient(self, z: torch.Tensor, y: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        def lagrangian(z: torch.Tensor) -> torch.Tensor:
            f, c, _, _ = self.program.evaluate(z, p)
            return f + y @ c

        gradient: torch.Tensor = torch.func.grad(lagrangian)(z)
        return gradient

    def _constraints(self, z: torch.Tensor, y: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        return self.program.evaluate(z, p)[1]

    def _map(self, function: Callable[..., Any], weights: int = 0, twice: bool = False) -> Callable[..., Any]:
        """``function`` over the batch; a loop where the problem's functions cannot be vectorised."""
        dims = (0, 0, *([0] * weights), *(self._dims * 2 if twice else self._dims))
        if self.program.traced:
            return torch.func.vmap(function, in_dims=dims)

        def loop(*arguments: torch.Tensor) -> Any:
            rows = [
                function(*(a if d is None else a[i] for a, d in zip(arguments, dims, strict=True)))
                for i in range(len(self.z))
            ]
            if isinstance(rows[0], tuple):
                return tuple(torch.stack(column) for column in zip(*rows, strict=True))
            return torch.stack(rows)

        return loop


def _directional(function: Callable[..., Any], p: Sequence[torch.Tensor], dp: Sequence[torch.Tensor]) -> Any:
    """Directional derivative by reverse mode twice: torch cannot nest its forward mode (v -> J^T v is linear)."""
    values, pullback = torch.func.vjp(function, *p)[:2]
    pushforward = torch.func.vjp(pullback, tuple(torch.zeros_like(v) for v in values))[1]
    (directions,) = pushforward(tuple(dp))
    return directions


def scale_rows(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The rows of ``values`` (B, ...) where ``scale`` (B,) is 1, else ``scale`` itself."""
    return torch.where(_rows(scale, values) == 1, values, _rows(scale, values))


def _rows(scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scale.reshape(-1, *[1] * (values.dim() - 1))


def _finite(bound: torch.Tensor) -> torch.Tensor:
    """Absent bounds are infinite and never active: zero, so that 0 * inf does not make NaN."""
    return torch.where(torch.isfinite(bound), bound, 0.0)
