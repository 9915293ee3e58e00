"""How far a point is from satisfying the KKT conditions, computed from the problem alone.

    stationarity     grad f + J^T y - l + r                      (J: Jacobian of c = [h; g])
    feasibility      |h|, max(g, 0), max(lower - z, 0), max(z - upper, 0)
    complementarity  |multiplier * slack| of every inequality and bound

Unscaled maximum norms are what the user sees. Decisions use the scaled ones, which do not change
when the objective or a constraint row is multiplied by a number: a slack is a distance,
s_i / (|J_i| max(1, |z|)), and a multiplier is a force, lambda_i |J_i| / (largest force at the point).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ddn_solvers.arrays import Array
from ddn_solvers.lowering.pattern import Matrices
from ddn_solvers.program import FirstOrder, Program

_TINY = 1e-300
_VANISHING = 1e-2  # of the change of a row's gradient over a hundredth of the point's size


@dataclass(frozen=True)
class PrimalDual:
    """A batch of points with multipliers, flat: y stacks those of h and g, l and r those of bounds."""

    z: Array  # (B, n)
    y: Array  # (B, equalities + inequalities)
    lower: Array  # (B, n)
    upper: Array  # (B, n)

    def take(self, samples: Any) -> PrimalDual:
        return PrimalDual(self.z[samples], self.y[samples], self.lower[samples], self.upper[samples])

    def put(self, sample: int, other: PrimalDual, source: int) -> None:
        """Overwrite one sample by sample ``source`` of another batch."""
        for name, values in vars(self).items():
            values[sample] = getattr(other, name)[source]


@dataclass(frozen=True)
class Bound:
    """Parameters and bounds of a batch, as every evaluation needs them."""

    parameters: tuple[Array, ...]
    lower: Array  # (B, n)
    upper: Array  # (B, n)

    def take(self, samples: Any) -> Bound:
        parameters = tuple(p if p.ndim == 1 else p[samples] for p in self.parameters)
        return replace(self, parameters=parameters, lower=self.lower[samples], upper=self.upper[samples])


@dataclass(frozen=True)
class Evaluation:
    """First and second derivatives at a batch of points, and the residuals that follow from them."""

    program: Program
    bound: Bound
    point: PrimalDual
    first: FirstOrder

    @staticmethod
    def at(program: Program, bound: Bound, point: PrimalDual) -> Evaluation:
        return Evaluation(program, bound, point, program.first_order(point.z, bound.parameters))

    def take(self, samples: Any) -> Evaluation:
        """The evaluation of some samples, by index; of all of them, itself with what it has computed."""
        if len(samples) == len(self.point.z):
            return self
        first = FirstOrder(**{name: value[samples] for name, value in vars(self.first).items()})
        return Evaluation(self.program, self.bound.take(samples), self.point.take(samples), first)

    @cached_property
    def J(self) -> Matrices:
        """The Jacobian of c."""
        return Matrices(self.program.jacobian_pattern, self.first.jacobian)

    @cached_property
    def H(self) -> Matrices:
        """The Hessian of the Lagrangian."""
        nonzeros = self.program.hessian(self.point.z, self.bound.parameters, self.point.y)
        return Matrices(self.program.hessian_pattern, nonzeros)

    @property
    def jacobian(self) -> Array:
        """``J`` densely, (B, m, n)."""
        return self.J.dense

    @property
    def hessian(self) -> Array:
        """``H`` densely, (B, n, n)."""
        return self.H.dense

    @cached_property
    def constraint_forces(self) -> Array:
        """grad f + J^T y, (B, n): what the bound multipliers have to balance."""
        return self.first.gradient + self.J.transposed_times(self.point.y)

    @cached_property
    def stationarity(self) -> Array:
        """grad_z L, (B, n)."""
        return self.constraint_forces - self.point.lower + self.point.upper

    @property
    def equality(self) -> Array:
        return self.first.constraints[:, : self.program.equality.size]

    @cached_property
    def slack(self) -> Array:
        """Slacks of inequalities, lower and upper bounds, (B, q + 2n); infinite where no bound is."""
        g = self.first.constraints[:, self.program.equality.size :]
        z = self.point.z
        return np.concatenate([-g, z - self.bound.lower, self.bound.upper - z], axis=1)

    @cached_property
    def multiplier(self) -> Array:
        """Multipliers in the order of ``slack``."""
        inequality = self.point.y[:, self.program.equality.size :]
        return np.concatenate([inequality, self.point.lower, self.point.upper], axis=1)

    @property
    def regular_J(self) -> Matrices:
        """``J`` with vanishing rows zero: the system of a derivative is then singular, and says so."""
        if not self.vanishing.any():
            return self.J
        pattern = self.J.pattern
        return Matrices(pattern, np.where(self.vanishing[:, pattern.indices], 0.0, self.J.nonzeros))

    @property
    def regular_jacobian(self) -> Array:
        """``regular_J`` densely, (B, m, n)."""
        return self.regular_J.dense

    @cached_property
    def vanishing(self) -> Any:
        """Rows of c whose gradient is nothing beside what it is nearby, (B, m) bool.

        A sum of squares is one where all of them vanish: it holds without saying in which direction
        (Gould et al. 2019, after observation 4.8). "Nearby" is a hundredth of the point's own size away.
        """
        norms = self.row_norms
        if self.program.affine_constraints:
            return norms < 0
        z = self.point.z
        size = np.maximum(np.sqrt((z**2).sum(axis=1, keepdims=True)), 1e-2)
        direction = np.cos(1.0 + np.arange(z.shape[1]) ** 2)
        step = 1e-2 * size * direction / np.linalg.norm(direction)
        nearby = self.program.first_order(z + step, self.bound.parameters).jacobian
        return norms < _VANISHING * self.J.map(lambda here: nearby - here).row_norms()

    # -- unscaled ---------------------------------------------------------------------------------

    @cached_property
    def norms(self) -> tuple[Array, Array, Array]:
        """Stationarity, feasibility, complementarity: unscaled maximum norms, (B,) each."""
        violation = np.concatenate([np.abs(self.equality), np.maximum(-self.slack, 0)], axis=1)
        product = self.multiplier * np.where(np.isfinite(self.slack), self.slack, 0)
        return _largest(self.stationarity), _largest(violation), _largest(product)

    # -- scaled -----------------------------------------------------------------------------------

    @cached_property
    def row_norms(self) -> Array:
        """|J_i|, (B, m)."""
        return self.J.row_norms()

    @cached_property
    def size(self) -> Array:
        """max(1, |z|), (B, 1)."""
        return np.maximum(1.0, _largest(self.point.z))[:, None]

    @cached_property
    def force(self) -> Array:
        """The unit of multipliers, (B, 1): the largest force that the objective exerts at the point or nearby.

        Multipliers do not enter it: where the objective exerts none, theirs is rounding.
        """
        curvature = self.H.largest() * self.size[:, 0]
        forces = np.maximum(_largest(self.first.gradient), curvature)
        return np.where(forces > 0, forces, 1.0)[:, None]

    @cached_property
    def scaled_slack(self) -> Array:
        ones = np.ones_like(self.point.z)
        norms = np.concatenate([self.row_norms[:, self.program.equality.size :], ones, ones], axis=1)
        return self.slack / np.maximum(norms * self.size, _TINY)

    @cached_property
    def scaled_multiplier(self) -> Array:
        ones = np.ones_like(self.point.z)
        norms = np.concatenate([self.row_norms[:, self.program.equality.size :], ones, ones], axis=1)
        return self.multiplier * norms / self.force

    @cached_property
    def scaled_feasibility(self) -> Array:
        """(B,)"""
        equality_norms = np.maximum(self.row_norms[:, : self.program.equality.size] * self.size, _TINY)
        equality = np.abs(self.equality) / equality_norms
        return np.maximum(_largest(equality), _largest(np.maximum(-self.scaled_slack, 0)))

    @cached_property
    def scaled_complementarity(self) -> Array:
        """Natural residual: what is neither slack nor force must vanish; negative multipliers count."""
        natural = np.minimum(np.maximum(self.scaled_slack, 0), self.scaled_multiplier)
        return _largest(natural)

    @cached_property
    def scaled_stationarity(self) -> Array:
        """By row: residual over the forces that meet there, (B,)."""
        meeting = np.abs(self.first.gradient) + self.J.map(np.abs).transposed_times(np.abs(self.point.y))
        meeting += self.H.map(np.abs).row_sums() * self.size + np.abs(self.point.lower) + self.point.upper
        floor = np.finfo(float).eps * self.force
        return _largest(self.stationarity / np.maximum(meeting, floor))

    @cached_property
    def scaled(self) -> Array:
        """The largest of the three scaled residuals, (B,)."""
        return np.maximum.reduce(
            [self.scaled_stationarity, self.scaled_feasibility, self.scaled_complementarity]
        )


def _largest(values: Array) -> Array:
    """Maximum norm over the last axis, (B,); zero of nothing."""
    return np.abs(values).max(axis=-1, initial=0.0)
