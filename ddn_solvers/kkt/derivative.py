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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet, kink_sides
from ddn_solvers.arrays import Array, Mask
from ddn_solvers.errors import DegeneracyWarning, warn_caller
from ddn_solvers.kkt.conditions import (
    ActiveConditions,
    Cotangents,
    Movement,
    Multipliers,
    Weighted,
    active_masks,
    smoothed,
    smoothed_conditions,
)
from ddn_solvers.kkt.curvature import curvature, regular_jacobian
from ddn_solvers.kkt.directional import Change, directional_derivative, needs_direction
from ddn_solvers.kkt.polish import kkt_system
from ddn_solvers.kkt.system import System
from ddn_solvers.policy import Policy
from ddn_solvers.program import Program
from ddn_solvers.residuals import Evaluation


def weights(conditions: Weighted, v: Cotangents, at: Multipliers) -> Movement:
    """w, s, s_l and s_r for a cotangent; linear in it, so that the choices of active set simply average."""
    e = v.objective.unsqueeze(-1)
    total = Movement(torch.zeros_like(v.z), -e * at.y, -e * at.lower, -e * at.upper)
    for weight, one in conditions:
        total = total.plus(weight, one.adjoint(v))
    return total


def tangent(conditions: Weighted, *changes: torch.Tensor) -> Movement:
    """The movement for directional derivatives of grad_z L, c and the bounds through the parameters alone."""
    d_gradient, d_c = changes[:2]
    total = Movement(*(torch.zeros_like(t) for t in (d_gradient, d_c, d_gradient, d_gradient)))
    for weight, one in conditions:
        total = total.plus(weight, one.tangent(*changes))
    return total


@dataclass(frozen=True)
class Linearisation:
    """The KKT systems at a batch of verified points, factored once for every right-hand side."""

    evaluation: Evaluation
    active: ActiveSet
    singular: Mask
    policy: Policy
    nearby: System | None = None  # factored near these points with this active set

    @cached_property
    def _at(self) -> Evaluation:
        """Where the conditions are linearised: the points, with the multipliers l' where they are smoothed."""
        if not self.policy.smoothing:
            return self.evaluation
        here, point = self.evaluation, self.evaluation.point
        _, multiplier = self._pair
        q, n = here.program.inequality.size, self.active.n
        y = point.y.copy()
        y[:, self.active.equalities : here.program.constraints] = multiplier[:, :q].numpy()
        lower, upper = multiplier[:, q : q + n].numpy(), multiplier[:, q + n :].numpy()
        return Evaluation.at(here.program, here.bound, replace(point, y=y, lower=lower, upper=upper))

    @cached_property
    def _pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """s' and l' of inequalities, lower and upper bounds."""
        slack, multiplier = (
            torch.from_numpy(np.delete(values, np.r_[kink_sides(self.evaluation)], axis=1))
            for values in (self.evaluation.slack, self.evaluation.multiplier)
        )
        return smoothed(slack, multiplier, self.policy.smoothing)

    @cached_property
    def conditions(self) -> Weighted:
        """One linear system, or two that are averaged."""
        sides = torch.from_numpy(self.active.sides)
        weak = torch.from_numpy(self.active.droppable(self.evaluation.program.numbers))
        m, n = self.evaluation.functions.rows, self.active.n
        masks = active_masks(sides, weak, m, n, self.policy)
        options = _options(self.policy)
        hessian, jacobian = self._at.H, regular_jacobian(self._at, self.active)
        if self.policy.smoothing:
            dense, rows = [torch.from_numpy(a.dense) for a in (hessian, jacobian)], masks[0][1][0]
            smooth = smoothed_conditions(
                dense[0], dense[1], self._pair, rows, self.active.equalities, **options
            )
            return [(1.0, smooth)]
        if self.policy.weakly_active in ("active", "raise") or not self.active.weak.any():
            # The systems are those that were verified; dropping weakly active rows makes others.
            options |= {
                "singular": torch.from_numpy(self.singular),
                "any_singular": bool(self.singular.any()),
            }
            if self.nearby is not None:
                moved = self.nearby.moved(hessian, jacobian)
                return [(weight, ActiveConditions(moved, *choice)) for weight, choice in masks]
        return [(weight, _active(hessian, jacobian, choice, options)) for weight, choice in masks]

    @cached_property
    def singular_smoothed(self) -> Mask:
        """Where the smoothed system is singular, (B,)."""
        ((_, conditions),) = self.conditions
        found: Mask = conditions.system.singular.numpy()
        return found

    @cached_property
    def singular_without_weak(self) -> Mask:
        """Where the system without the weakly active rows is singular, (B,): the active one may not be."""
        dropped = self.active.droppable(self.evaluation.program.numbers)
        without = replace(self.active, sides=self.active.sides & ~dropped)
        found: Mask = kkt_system(self.evaluation, without).singular.numpy()
        return found

    def vjp(self, v: Cotangents, envelope: bool = False) -> list[Array]:
        """Gradient by parameter block, (B, size) or, for a shared block, summed, (size,).

        Args:
            v: The cotangents.
            envelope: Only that of the objective is there: by the envelope theorem nothing is solved.
        """
        point, here = self.evaluation.point, self._at
        at = Multipliers(*(torch.from_numpy(a) for a in (point.y, point.lower, point.upper)))
        a = weights(() if envelope else self.conditions, v, at)
        arrays = [t.numpy() for t in (*vars(a).values(), v.objective.unsqueeze(-1))]
        return here.functions.adjoint(point.z, here.inputs, here.point.y, *arrays)

    def jvp(self, tangents: Sequence[Array]) -> tuple[torch.Tensor, ...]:
        """Tangents of z, y, lower, upper and objective for tangents of every parameter block, (B, size) each.

        The true directional derivative, also where it is not linear in the tangents (``directional.py``).
        """
        change = Change.along(self._at, tangents)
        changes = (change.gradient, change.constraints, change.lower, change.upper)
        moved = tangent(self.conditions, *(torch.from_numpy(a) for a in changes))
        without: list[int] = []
        for i in np.flatnonzero(self.directional):
            one, rows = np.array([i]), [t if t.ndim == 1 else t[[i]] for t in tangents]
            found = directional_derivative(self.evaluation.take(one), self.active.take(one), rows)
            if found is None:
                without.append(int(i))
                continue
            for part, row in zip(vars(moved).values(), found, strict=True):
                part[i] = torch.from_numpy(row)
        if without:
            warn_caller(
                f"there is no directional derivative for sample {without[0]} (no solution of the problem is near in "
                "that direction, or none is unique): that of the active set is returned",
                DegeneracyWarning,
            )
        gradient = torch.from_numpy(self.evaluation.first.gradient)
        objective = torch.from_numpy(change.objective[:, 0]) + (gradient * moved.z).sum(-1)
        return (*vars(moved).values(), objective)

    @cached_property
    def directional(self) -> Mask:
        """Samples whose derivative depends on the direction, (B,)."""
        dependent = np.zeros(len(self.singular), dtype=bool)
        if self.policy.smoothing:
            return dependent
        if self.singular.any():
            bent = curvature(self.evaluation, self.active)
            dependent = self.singular & (bent.rank < bent.rows)
        found: Mask = needs_direction(self.active, dependent)
        return found


def _options(policy: Policy) -> dict[str, Any]:
    proximal = policy.proximal if policy.on_singular == "proximal" else None
    return {"linear_solver": policy.linear_solver, "proximal": proximal}


def _active(
    hessian: Any, jacobian: Any, choice: tuple[torch.Tensor, ...], options: dict[str, Any]
) -> ActiveConditions:
    rows, lower, upper = choice
    return ActiveConditions(System(hessian, jacobian, rows, lower | upper, **options), rows, lower, upper)


class TorchLinearisation:
    """The same out of torch operations on z, multipliers and parameters, differentiable to any order."""

    def __init__(
        self,
        program: Program,
        parameters: Sequence[torch.Tensor],
        z: torch.Tensor,
        at: Multipliers,
        pieces: torch.Tensor,
        sides: torch.Tensor,
        weak: torch.Tensor,
        singular: torch.Tensor,
        any_singular: bool,
        policy: Policy,
    ) -> None:
        self.program, self.parameters, self.z, self.at = program, list(parameters), z, at
        self.pieces, self._y = pieces, at.y
        # A declared block is 1-d when shared and 2-d in a batch; captured ones likewise.
        self._dims = [0 if p.dim() == 2 else None for p in self.parameters]
        self._masks = active_masks(sides, weak, program.smooth.rows, z.shape[-1], policy)
        self._policy, self._singular, self._any_singular = policy, singular, any_singular
        self._pair = self._smoothed(policy.smoothing) if policy.smoothing else None

    @cached_property
    def conditions(self) -> Weighted:
        """As those of ``Linearisation``."""
        options = _options(self._policy) | {"any_singular": self._any_singular, "transformed": True}
        at = (self.z, self._y, self.pieces, *self.parameters)
        hessian = self._map(torch.func.jacrev(self._gradient))(*at)
        jacobian = self._map(torch.func.jacrev(self._constraints))(*at)
        with_weak, without = self._singular.unbind(-1)
        if self._pair is not None:
            options |= {"singular": with_weak}
            rows, equalities = self._masks[0][1][0], self.program.equality.size
            return [(1.0, smoothed_conditions(hessian, jacobian, self._pair, rows, equalities, **options))]
        of_choice = {"inactive": [without], "mean": [with_weak, without]}
        found = of_choice.get(self._policy.weakly_active, [with_weak])
        return [
            (weight, _active(hessian, jacobian, choice, options | {"singular": which}))
            for (weight, choice), which in zip(self._masks, found, strict=True)
        ]

    def _smoothed(self, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
        """s' and l', and l' as the multipliers with which the conditions are linearised."""

        def slacks(z: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
            _, c, lower, upper = self.program.evaluate(z, p, sigma)
            return torch.cat([-c[m : self.program.constraints], z - lower, upper - z])

        m, at = self.program.equality.size, self.at
        slack = self._map(slacks)(self.z, at.y, self.pieces, *self.parameters)
        inequality = at.y[..., m : self.program.constraints]
        pair = smoothed(slack, torch.cat([inequality, at.lower, at.upper], dim=-1), tau)
        mine = pair[1][..., : inequality.shape[-1]]
        self._y = torch.cat([at.y[..., :m], mine, at.y[..., self.program.constraints :]], dim=-1)
        return pair

    def vjp(self, v: Cotangents, scale: torch.Tensor, envelope: bool = False) -> list[torch.Tensor]:
        """As ``Linearisation.vjp``; ``scale`` (B,) is 1, or what replaces the gradient of a sample (0, NaN)."""
        zero = Cotangents(*(torch.where(_rows(scale, t) == 1, t, 0.0) for t in vars(v).values()))
        a = weights(() if envelope else self.conditions, zero, self.at)
        e = zero.objective.unsqueeze(-1)

        def total(z: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor, *rest: Any) -> torch.Tensor:
            (w, s, sl, su, e), p = rest[:5], rest[5:]
            f, c, lower, upper = self.program.evaluate(z, p, sigma)
            along = w @ self._gradient(z, y, sigma, *p)
            return e[0] * f - along - s @ c - sl @ _finite(lower) + su @ _finite(upper)

        indices = tuple(range(8, 8 + len(self.parameters)))
        if not indices:
            return []
        gradients = self._map(torch.func.grad(total, argnums=indices), weights=5)(
            self.z, self._y, self.pieces, a.z, a.y, a.lower, a.upper, e, *self.parameters
        )
        scaled = [scale_rows(g, scale) for g in gradients]
        return [g if d == 0 else g.sum(0) for g, d in zip(scaled, self._dims, strict=True)]

    def jvp(self, tangents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """As ``Linearisation.jvp``, with the objective's tangent as well."""

        def directional(z: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor, *rest: torch.Tensor) -> Any:
            p, dp = rest[: len(self.parameters)], rest[len(self.parameters) :]

            def all_of(*p: torch.Tensor) -> Any:
                f, c, lower, upper = self.program.evaluate(z, p, sigma)
                return f, self._gradient(z, y, sigma, *p), c, _finite(lower), _finite(upper)

            return _directional(all_of, p, dp)

        df, d_gradient, d_c, d_lower, d_upper = self._map(directional, twice=True)(
            self.z, self._y, self.pieces, *self.parameters, *tangents
        )
        moved = tangent(self.conditions, d_gradient, d_c, d_lower, d_upper)
        envelope = df + (self.at.y * d_c).sum(-1)
        envelope = envelope + (self.at.lower * d_lower).sum(-1) - (self.at.upper * d_upper).sum(-1)
        return (*vars(moved).values(), envelope)

    def _gradient(
        self, z: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor, *p: torch.Tensor
    ) -> torch.Tensor:
        def lagrangian(z: torch.Tensor) -> torch.Tensor:
            f, c, _, _ = self.program.evaluate(z, p, sigma)
            return f + y @ c

        gradient: torch.Tensor = torch.func.grad(lagrangian)(z)
        return gradient

    def _constraints(
        self, z: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor, *p: torch.Tensor
    ) -> torch.Tensor:
        return self.program.evaluate(z, p, sigma)[1]

    def _map(self, function: Callable[..., Any], weights: int = 0, twice: bool = False) -> Callable[..., Any]:
        dims = (0, 0, 0, *([0] * weights), *(self._dims * 2 if twice else self._dims))
        return self.program.over_batch(function, dims)


def _directional(function: Callable[..., Any], p: Sequence[torch.Tensor], dp: Sequence[torch.Tensor]) -> Any:
    """Directional derivative by reverse mode twice: torch cannot nest its forward mode (v -> J^T v is linear)."""
    values, pullback = torch.func.vjp(function, *p)[:2]
    pushforward = torch.func.vjp(pullback, tuple(torch.zeros_like(v) for v in values))[1]
    (directions,) = pushforward(tuple(dp))
    return directions


def scale_rows(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The rows of ``values`` (B, ...) where ``scale`` (B,) is 1, else ``scale``, zero or NaN, as its derivatives are."""
    rows = _rows(scale, values)
    return torch.where(rows == 1, values, rows * values.nan_to_num())


def _rows(scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scale.reshape(-1, *[1] * (values.dim() - 1))


def _finite(bound: torch.Tensor) -> torch.Tensor:
    """Absent bounds are infinite and never active: zero, so that 0 * inf does not make NaN."""
    return torch.where(torch.isfinite(bound), bound, 0.0)
