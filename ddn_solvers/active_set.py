"""Which inequalities and bounds hold with equality, judged from slack and multiplier together.

With the scaled slack s and multiplier l of ``residuals.py`` and a tolerance t:

    strongly active   l > t           (s is then zero to tolerance)
    inactive          s > t           (l is then zero to tolerance)
    weakly active     neither: the derivative is one-sided there, the policy decides

Where a point is not good enough for that, the larger of the two decides. Equalities are always
active, whatever their multiplier. A kink is a side like an inequality; see ``residuals.py`` for its slack and
multiplier. One whose weight vanishes with it, such as that of relu(u)^2, only bends: the second derivative
jumps there, nothing holds the point, and it is weakly active without being a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ddn_solvers.arrays import Array, Mask
from ddn_solvers.pieces import spread
from ddn_solvers.residuals import Evaluation

_NO_SLACK = 1e-12  # scaled slack that is rounding
_REACHED = 1e-9  # residual of a kink, relative to the size of the variables, that is rounding
_AT_ZERO = 1e-6  # scaled length of a vector, or lack of force, within which its norm counts as zero


@dataclass(frozen=True)
class ActiveSet:
    """Active constraints of a batch. ``sides``: inequalities, kinks, lower bounds, upper bounds, in that order.

    Attributes:
        sides: Which of them hold with equality, (B, q + k + 2n); a variable's two bounds never both.
        weak: Which of those are weakly active, (B, q + k + 2n).
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
        """Active rows of c = [h; g; kinks], (B, m)."""
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

    def droppable(self, numbers: Any) -> Mask:
        """Weakly active sides that can be dropped: not the zero of a vector's norm, off which nothing is smooth.

        Args:
            numbers: Which kinks are those of one number, (k,) bool.
        """
        dropped = self.weak.copy()
        stop = dropped.shape[1] - 2 * self.n
        dropped[:, stop - len(numbers) : stop] &= numbers
        return dropped

    def take(self, samples: Any) -> ActiveSet:
        return replace(self, sides=self.sides[samples], weak=self.weak[samples], margin=self.margin[samples])


def identify(evaluation: Evaluation, tolerance: float | np.ndarray[Any, Any]) -> ActiveSet:
    """The active set at a batch of points; ``tolerance`` a number or (B,)."""
    slack, multiplier = evaluation.scaled_slack, evaluation.scaled_multiplier
    tolerance = np.broadcast_to(np.asarray(tolerance, dtype=float), (len(slack),))[:, None]
    weak = (slack <= tolerance) & (multiplier <= tolerance)
    sides = weak | (multiplier > slack)
    larger = np.where(np.isfinite(slack), np.maximum(slack, multiplier), np.inf)
    if evaluation.program.pieces is not None:
        kinks, idle = kink_sides(evaluation), evaluation.idle_kinks
        numbers = evaluation.program.numbers
        bends = (evaluation.scaled_kink_weights <= tolerance) & numbers
        # Off a norm's zero its Hessian has no limit, so what may lie on it does.
        at_zero = (slack[:, kinks] <= _AT_ZERO) & (multiplier[:, kinks] >= -_AT_ZERO) & ~numbers
        sides[:, kinks] = (sides[:, kinks] | at_zero) & ~idle & ~bends
        weak[:, kinks] &= ~idle
        weak[:, kinks] &= ~bends | _bent(evaluation, weak[:, kinks] & bends)[:, None]
        larger[:, kinks] = np.where(idle, np.inf, larger[:, kinks])
    fixed = fixed_by_bounds(evaluation)
    n = fixed.shape[1]
    # A fixed variable stays where it is whatever the force on it, so neither of its bounds is weak.
    lower, upper = sides[:, -2 * n : -n], sides[:, -n:]
    pushed_up = evaluation.point.lower >= evaluation.point.upper
    lower, upper = np.where(fixed, pushed_up, lower), np.where(fixed, ~pushed_up, upper & ~lower)
    sides = np.concatenate([sides[:, : -2 * n], lower, upper], axis=1)
    twice = np.concatenate([np.zeros_like(sides[:, : -2 * n]), fixed, fixed], axis=1)
    margin = np.where(twice, np.inf, larger).min(axis=1, initial=np.inf)
    return ActiveSet(sides, weak & ~twice, margin, evaluation.program.equality.size, n)


def _bent(evaluation: Evaluation, bends: Mask) -> Any:
    """Samples in which the second derivative does jump at their ``bends``, (B,) bool: that of |u|^3 does not."""
    if not bends.any():
        return bends.any(axis=1)
    sides = [
        _on_pieces(evaluation, np.where(bends, sign, evaluation.point.pieces), bends) for sign in (-1.0, 1.0)
    ]
    w = evaluation.size
    change = np.abs(sides[0].hessian - sides[1].hessian) * w[:, :, None] * w[:, None, :]
    return change.max(axis=(1, 2), initial=0.0) > 1e-9 * evaluation.force[:, 0]


def kink_sides(evaluation: Evaluation) -> slice:
    """Where the kinks are among the sides."""
    start = evaluation.program.inequality.size
    return slice(start, start + evaluation.point.pieces.shape[1])


def settled(evaluation: Evaluation, active: ActiveSet) -> Evaluation:
    """The same points on the pieces that ``active`` says: sigma = 0 on a kink, and mu = 0 off it.

    A weakly active one is on the piece to which its force leads. A kink that is left is left to the side to
    which it is pushed too hard, or on which the point lies; one that is reached takes over the force of its
    piece. Of a bend it is the piece r > 0.
    """
    point, program = evaluation.point, evaluation.program
    if program.pieces is None:
        return evaluation
    kinks = kink_sides(evaluation)
    on, weak = active.sides[:, kinks], active.weak[:, kinks] & program.numbers
    sigma, mu = point.pieces, evaluation.kink_forces
    slack = evaluation.scaled_slack[:, kinks]  # at rounding it has no side of its own
    pushed = weak | (-evaluation.scaled_multiplier[:, kinks] > slack) | (slack <= _NO_SLACK)
    side = np.where(pushed & (mu != 0), mu, evaluation.kink_residuals)
    side = np.where((side < 0) & program.numbers, -1.0, 1.0)
    bends = active.weak[:, kinks] & ~on
    side = np.where(bends, 1.0, side)  # whatever side rounding has put the point on
    stays = (sigma != 0) & ~evaluation.idle_kinks & ~bends
    # Nothing is smooth at the zero of a vector's norm but for its piece 0: that does where nothing depends on it.
    at_zero = evaluation.idle_kinks & ~program.numbers & (slack <= _NO_SLACK)
    pieces = np.where((on & ~weak) | at_zero, 0.0, np.where(stays, sigma, side))
    if np.array_equal(pieces, sigma):
        return evaluation
    return _on_pieces(evaluation, pieces, on)


def _on_pieces(evaluation: Evaluation, pieces: Array, on: Mask) -> Evaluation:
    """The same points on other pieces; the whole force of a kink, mu + sigma w r/|r|, stays where it is ``on``."""
    point = evaluation.point
    mu = (
        evaluation.kink_forces
        + (point.pieces - pieces) * evaluation.kink_weights * evaluation.kink_directions
    )
    y = point.y.copy()
    y[:, evaluation.program.constraints :] = np.where(on, mu, 0.0)
    return Evaluation.at(evaluation.program, evaluation.bound, replace(point, y=y, pieces=pieces))


def off_kinks(evaluation: Evaluation, active: ActiveSet) -> tuple[Evaluation, ActiveSet]:
    """The points with an element of Clarke's subdifferential in place of each kink, whose row is dropped.

    sigma = 0, the middle of the subdifferential; for a maximum an even share of each entry that ties. The
    derivative of what results is the paper's Dy (Gould et al. 2019, section 5.2).
    """
    pieces, kinks = evaluation.program.pieces, kink_sides(evaluation)
    if pieces is None or not active.sides[:, kinks].any():
        return evaluation, active
    on = active.sides[:, kinks]
    sigma = np.where(on, 0.0, evaluation.point.pieces)
    shares = np.array([spread(pieces.branches, one) for one in sigma])
    sides, weak = active.sides.copy(), active.weak.copy()
    sides[:, kinks] = weak[:, kinks] = False
    none = np.zeros_like(on)
    return _on_pieces(evaluation, shares, none), replace(active, sides=sides, weak=weak)


def entangled(evaluation: Evaluation) -> Mask:
    """Samples with a kink that pushes, is reached, and moves only with another one that is reached as well, (B,).

    As of relu(|u| - x) at u = x = 0: which side each is on depends on the other, and no row of the first says so.
    """
    point, program = evaluation.point, evaluation.program
    found = np.zeros(len(point.z), dtype=bool)
    if program.pieces is None:
        return found
    kinks, reached = slice(program.constraints, None), _REACHED * evaluation.size.max(axis=1, keepdims=True)
    still = (evaluation.row_norms[:, kinks] == 0) & (np.abs(evaluation.kink_residuals) <= reached)
    still &= evaluation.kink_weights > 0
    some = np.flatnonzero(still.any(axis=1) & ((point.pieces == 0) & ~still).any(axis=1))
    if not some.size:
        return found
    here = evaluation.take(some)
    off = np.where(here.point.pieces == 0, 1.0, here.point.pieces)
    there = Evaluation.at(program, here.bound, replace(here.point, pieces=off))
    found[some] = (still[some] & (there.row_norms[:, kinks] > 0)).any(axis=1)
    return found


def fixed_by_bounds(evaluation: Evaluation) -> Mask:
    """Variables whose bounds coincide, (B, n)."""
    fixed: Mask = evaluation.bound.lower == evaluation.bound.upper
    return fixed
