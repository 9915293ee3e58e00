"""Which inequalities and bounds hold with equality, judged from slack and multiplier together.

With the scaled slack s and multiplier l of ``residuals.py`` and a tolerance t:

    strongly active   l > t           (s is then zero to tolerance)
    inactive          s > t           (l is then zero to tolerance)
    weakly active     neither: the derivative is one-sided there, the policy decides

Where a point is not good enough for that, the larger of the two decides. Equalities are always
active, whatever their multiplier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ddn_solvers.arrays import Array, Mask
from ddn_solvers.residuals import Evaluation


@dataclass(frozen=True)
class ActiveSet:
    """Active constraints of a batch. ``sides`` are inequalities, lower bounds, upper bounds, in that order.

    Attributes:
        sides: Which of them hold with equality, (B, q + 2n); a variable's two bounds never both.
        weak: Which of those are weakly active, (B, q + 2n).
        margin: Smallest over all sides of the larger of scaled slack and multiplier, (B,).
        equalities: Number of equality constraints.
        n: Number of variables.
    """

    sides: Mask
    weak: Mask
    margin: Array
    equalities: int
    n: int

    @property
    def constraints(self) -> Mask:
        """Active rows of c = [h; g], (B, m)."""
        always = np.ones((len(self.sides), self.equalities), dtype=bool)
        return np.concatenate([always, self.sides[:, : -2 * self.n]], axis=1)

    @property
    def lower(self) -> Mask:
        """(B, n)"""
        return self.sides[:, -2 * self.n : -self.n]

    @property
    def upper(self) -> Mask:
        """(B, n)"""
        return self.sides[:, -self.n :]

    @property
    def fixed(self) -> Mask:
        """Variables that an active bound fixes, (B, n)."""
        return self.lower | self.upper

    def take(self, samples: Any) -> ActiveSet:
        return replace(self, sides=self.sides[samples], weak=self.weak[samples], margin=self.margin[samples])


def identify(evaluation: Evaluation, tolerance: float | np.ndarray[Any, Any]) -> ActiveSet:
    """The active set at a batch of points; ``tolerance`` a number or (B,)."""
    slack, multiplier = evaluation.scaled_slack, evaluation.scaled_multiplier
    tolerance = np.broadcast_to(np.asarray(tolerance, dtype=float), (len(slack),))[:, None]
    weak = (slack <= tolerance) & (multiplier <= tolerance)
    sides = weak | (multiplier > slack)
    larger = np.where(np.isfinite(slack), np.maximum(slack, multiplier), np.inf)
    fixed = fixed_by_bounds(evaluation)
    n = fixed.shape[1]
    # A fixed variable stays where it is whatever the force on it, so neither of its bounds is weak.
    lower, upper = sides[:, -2 * n : -n], sides[:, -n:]
    pushed_up = evaluation.point.lower >= evaluation.point.upper
    lower, upper = np.where(fixed, pushed_up, lower), np.where(fixed, ~pushed_up, upper & ~lower)
    sides = np.concatenate([sides[:, : -2 * n], lower, upper], axis=1)
    twice = np.concatenate([np.zeros_like(sides[:, : -2 * n]), fixed, fixed], axis=1)
    margin = np.where(twice, np.inf, larger).min(axis=1, initial=np.inf)
    return ActiveSet(sides, weak & sides & ~twice, margin, evaluation.program.equality.size, n)


def fixed_by_bounds(evaluation: Evaluation) -> Mask:
    """Variables whose bounds coincide, (B, n)."""
    fixed: Mask = evaluation.bound.lower == evaluation.bound.upper
    return fixed
