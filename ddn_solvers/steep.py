"""Bounds at which curvature has no limit, as that of entropies and of u^1.5 at zero.

There H is 1e10 or infinite and says nothing of what a variable feels over its size, by which forces, units and flatness
are measured: the curvature a little farther in does. Where no slope is finite either, the edge of the bound stands for it,
as near as numbers are; from there the slope leads back inside, that of u log u, or not, that of u sqrt(u).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ddn_solvers.arrays import Array, Mask
from ddn_solvers.lowering.pattern import Matrices, Pattern

if TYPE_CHECKING:
    from ddn_solvers.residuals import Evaluation

# To a bound, relative to max(1, |z|): how far in it is looked whether curvature lasts; and by how much it has to fall.
_CLOSE, _FALLS = 1e-2, 1e2
# Curvature, relative to the largest slope, from which on that is asked.
_STEEP = 1e2
# How far inside the edge is, relative to the bound and at least.
_ULPS, _INSIDE = 1e-15, 1e-30


@dataclass(frozen=True)
class SteepBounds:
    """What a batch of points has to do with such bounds.

    Attributes:
        evaluation: At the points.
        H: The Hessian of the Lagrangian there.
    """

    evaluation: Evaluation
    H: Matrices

    @cached_property
    def local(self) -> Mask:
        """Variables close to a bound whose curvature is much less a little farther in, (B, n)."""
        return self._farther_in[0]

    @property
    def any(self) -> bool:
        return bool(self.local.any())

    @property
    def lasting(self) -> Matrices:
        """H with that much less in its place."""
        return self._farther_in[1]

    @cached_property
    def narrowing(self) -> Array:
        """Factors of the variables' sizes that make curvature what it is a little farther in, (B, n)."""
        if not self.any:
            return np.ones(self.local.shape)
        here, farther = (np.abs(H.diagonal()) for H in (self.H, self.lasting))
        narrow = self.local & (here > 0)
        return np.where(narrow, np.sqrt(farther / np.where(narrow, here, 1.0)), 1.0)

    @cached_property
    def open(self) -> tuple[Mask, Mask]:
        """Lower and upper bounds at which the slope has no value, (B, n) each."""
        z, bound = self.evaluation.point.z, self.evaluation.bound
        at_lower = self.local & (z - bound.lower <= bound.upper - z)
        if not self.any:
            return at_lower, at_lower
        nearest = np.where(at_lower, bound.lower, bound.upper)
        undefined = self.local & ~np.isfinite(self._moved(np.where(self.local, nearest, z)).first.gradient)
        return undefined & at_lower, undefined & ~at_lower

    @cached_property
    def edges(self) -> tuple[Array, Array]:
        """How near to its bounds a variable comes, (B, n) each: to themselves, unless they are open."""
        lower, upper = self.evaluation.bound.lower, self.evaluation.bound.upper
        if not self.any:
            return lower, upper
        inside = (np.maximum(_INSIDE, _ULPS * np.abs(side)) for side in (lower, upper))
        above, below = inside
        return np.where(self.open[0], lower + above, lower), np.where(self.open[1], upper - below, upper)

    @cached_property
    def repelled(self) -> Mask:
        """Variables that an open bound cannot hold, since the slope leads away from its edge, (B, n)."""
        at_lower, at_upper = self.open
        found: Mask = at_lower | at_upper
        if not found.any():
            return found
        z, (lower, upper) = self.evaluation.point.z, self.edges
        force = self._moved(np.where(at_lower, lower, np.where(at_upper, upper, z))).constraint_forces
        return found & np.where(at_lower, force < 0, force > 0)

    def forces(self, slack: Array) -> Array:
        """By which the slopes change on the way to lower and upper bounds, from their ``slack``, (B, 2n).

        Without limit where the bound repels; none where it is open and holds, as near as its edge is.
        """
        curved = np.tile(np.where(self.local, np.abs(self.H.diagonal()), 0.0), 2)
        forces = np.where(np.isfinite(slack), slack, 0.0) * curved
        forces = np.where(np.concatenate(self.open, axis=1), 0.0, forces)
        return np.where(np.tile(self.repelled, 2), np.inf, forces)

    def _moved(self, z: Array) -> Evaluation:
        return self.evaluation.moved(replace(self.evaluation.point, z=z))

    @cached_property
    def _farther_in(self) -> tuple[Mask, Matrices]:
        here, H = self.evaluation, self.H
        z, none = here.point.z, np.zeros(here.point.z.shape, dtype=bool)
        if here.bound.coefficients is not None or here.program.quadratic:
            return none, H
        own, below, above = np.maximum(1.0, np.abs(z)), z - here.bound.lower, here.bound.upper - z
        slope = np.abs(here.first.gradient).max(axis=1, initial=0.0, keepdims=True)
        steep = (np.abs(H.diagonal()) > _STEEP * slope) | (below == 0) | (above == 0)
        near = (np.minimum(below, above) <= _CLOSE * own) & steep
        if not near.any():
            return none, H
        inward = np.where(below <= above, 1.0, -1.0) * np.minimum(_CLOSE * own, (below + above) / 2)
        there = np.where(near, z + np.where(near, inward, 0.0), z)
        farther = H.map(lambda _: here.functions.hessian(there, here.inputs, here.point.y))
        local = near & (np.abs(H.diagonal()) > _FALLS * np.abs(farther.diagonal()))
        local |= near & (H.diagonal() == 0)  # as of u^1.5 where it is held at zero
        if not local.any():
            return none, H
        of_local = of_variables(local, H.pattern)
        return local, H.map(lambda values: np.where(of_local, farther.nonzeros, values))


def of_variables(chosen: Mask, pattern: Pattern) -> Mask:
    """Nonzeros of a matrix in the row or column of a chosen variable, (B, n) -> (B, nnz)."""
    found: Mask = chosen[:, pattern.indices] | chosen[:, pattern.columns]
    return found
