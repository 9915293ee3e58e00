"""The linearised KKT conditions in the problem's own terms: which rows the system has, and what its solution means.

Exact: active rows hold with equality, inactive ones have no multiplier, active bounds fix their variable
(``system.py``). Smoothed by tau > 0, as a barrier would: slack s and multiplier l of every inequality and bound
are replaced by the pair on the hyperbola s' l' = tau with the same difference d = s - l,

    s' = (d + sqrt(d^2 + 4 tau)) / 2,     l' = s' - d,

no row is dropped, and row i of the system becomes  A_i dz - (s'_i / l'_i) dl_i = -dc_i  (the derivative of
s' l' = tau). As tau -> 0 the ratio goes to 0 for an active row and to infinity for an inactive one.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddn_solvers.kkt.system import System
from ddn_solvers.policy import Policy


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
class Movement:
    """Of z (B, n), y (B, m) and the bound multipliers (B, n): tangents, or the weights of an adjoint."""

    z: torch.Tensor
    y: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    def plus(self, weight: float, other: Movement) -> Movement:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Movement(*(mine + weight * its for mine, its in pairs))


class Conditions(abc.ABC):
    """A linear system for the movement of a solution; symmetric, so that tangents and adjoints share it."""

    system: System

    @abc.abstractmethod
    def solve(self, z: torch.Tensor, y: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> Movement:
        """For right-hand sides of stationarity (B, n), of rows c (B, m), and of lower - z and z - upper (B, n)."""

    def tangent(
        self, d_gradient: torch.Tensor, d_c: torch.Tensor, d_lower: torch.Tensor, d_upper: torch.Tensor
    ) -> Movement:
        """For directional derivatives, through the parameters alone, of grad_z L, c and the bounds."""
        return self.solve(-d_gradient, -d_c, -d_lower, d_upper)

    def adjoint(self, v: Cotangents) -> Movement:
        """The weights w, s, s_l, s_r for a cotangent."""
        return self.solve(v.z, v.y, v.lower, v.upper)


class ActiveConditions(Conditions):
    """Exact, for one choice of the active set.

    Args:
        system: Its KKT system.
        constraints: Active rows of c, (B, m) bool.
        lower, upper: Active bounds, (B, n) bool.
    """

    def __init__(
        self, system: System, constraints: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
    ) -> None:
        self.system, self._constraints, self._lower, self._upper = system, constraints, lower, upper

    def solve(self, z: torch.Tensor, y: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> Movement:
        step = self.system.solve(z, y, torch.where(self._lower, -lower, upper))
        return Movement(
            step.x,
            torch.where(self._constraints, step.t, 0.0),
            torch.where(self._lower, step.q, 0.0),
            torch.where(self._upper, -step.q, 0.0),
        )


class SmoothedConditions(Conditions):
    """Smoothed; ``system`` has the rows of c, then those of lower - z and of z - upper."""

    def __init__(self, system: System) -> None:
        self.system = system

    def solve(self, z: torch.Tensor, y: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> Movement:
        m, n = y.shape[-1], z.shape[-1]
        step = self.system.solve(z, torch.cat([y, lower, upper], dim=-1), torch.zeros_like(z))
        return Movement(step.x, step.t[..., :m], step.t[..., m : m + n], step.t[..., m + n :])


Weighted = Sequence[tuple[float, Conditions]]  # averaged: one, or two for ``weakly_active="mean"``


def active_masks(
    sides: torch.Tensor, weak: torch.Tensor, m: int, n: int, policy: Policy
) -> list[tuple[float, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Active rows of c and active bounds for each choice that the policy makes of weakly active sides."""
    if policy.weakly_active in ("active", "raise"):
        return [(1.0, _masks(sides, m, n))]
    without = _masks(sides & ~weak, m, n)
    if policy.weakly_active == "inactive":
        return [(1.0, without)]
    return [(0.5, _masks(sides, m, n)), (0.5, without)]


def _masks(sides: torch.Tensor, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inequality, lower, upper = sides[..., : -2 * n], sides[..., -2 * n : -n], sides[..., -n:]
    always = torch.ones_like(lower[..., :1]).expand(*lower.shape[:-1], m - inequality.shape[-1])
    return torch.cat([always, inequality], dim=-1), lower, upper


def smoothed(slack: torch.Tensor, multiplier: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """s' and l'; where there is no bound the slack is infinite and the multiplier zero."""
    d = torch.where(torch.isfinite(slack), slack - multiplier, 1.0)
    larger = (d.abs() + (d.square() + 4 * tau).sqrt()) / 2
    smaller = tau / larger  # not as a difference, which would cancel
    there = torch.isfinite(slack)
    s = torch.where(there, torch.where(d > 0, larger, smaller), torch.inf)
    return s, torch.where(there, torch.where(d > 0, smaller, larger), 0.0)


def smoothed_conditions(
    hessian: torch.Tensor,
    jacobian: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor],
    active: torch.Tensor,
    equalities: int,
    **options: Any,
) -> SmoothedConditions:
    """The smoothed conditions.

    Args:
        hessian: Of the Lagrangian with the multipliers l', (B, n, n).
        jacobian: Of c = [h; g; kinks], (B, m, n).
        pair: s' and l' of inequalities, lower and upper bounds, (B, q + 2n) each.
        active: Active rows of c, (B, m) bool; equalities and kinks hold as they are.
        equalities: Number of rows of h.
        **options: Of ``System``.
    """
    n, (s, multiplier) = hessian.shape[-1], pair
    q, there = s.shape[-1] - 2 * n, torch.isfinite(s)
    ratio = -torch.where(there, s, 1.0) / torch.where(there, multiplier, 1.0)
    identity = torch.eye(n, dtype=hessian.dtype).expand_as(hessian)
    rows = torch.cat([jacobian, -identity, identity], dim=-2)

    def in_order(of_rows: torch.Tensor, of_sides: torch.Tensor) -> torch.Tensor:
        h, kinks = of_rows[..., :equalities], of_rows[..., equalities + q :]
        return torch.cat([h, of_sides[..., :q], kinks, of_sides[..., q:]], dim=-1)

    corner = in_order(torch.zeros_like(jacobian[..., 0]), ratio)
    kept, nothing = in_order(active, there), torch.zeros_like(hessian[..., 0], dtype=torch.bool)
    return SmoothedConditions(System(hessian, rows, kept, nothing, corner=corner, **options))
