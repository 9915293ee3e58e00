"""Newton's method on the KKT conditions of the identified active set.

A backend's point is good to its own tolerance, 1e-5 or 1e-9; the gradient at that point is no better,
and a wrong active set makes it wrong altogether. One to three Newton steps on the active equations
give point and multipliers to rounding. A step is taken only where it lowers the scaled residual; a
multiplier that turns negative leaves the active set, a constraint that gets violated joins it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet, fixed_by_bounds, identify, kink_sides, settled
from ddn_solvers.arrays import Array, Index, Mask
from ddn_solvers.kkt.multipliers import without_cancellation
from ddn_solvers.kkt.system import System
from ddn_solvers.lowering.pattern import Matrices
from ddn_solvers.policy import Policy
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual

_MAX_STEPS = 8
_CONVERGED = 1e-9  # relative step after which, the convergence being quadratic, another is rounding
_QUADRATIC = 1e-3  # by which a step near the solution at least lowers the residual
_ROUNDING = 1e-13  # relative size of a step that is not worth taking
_EXACT = 1e-12  # at points with no scaled residual above this
_FELT = 1e-8  # force of a multiplier, relative to the largest, that changes something
_SIGN = 1e-11  # scaled slack or multiplier that counts as negative
# How many sides may join or leave the active set in each step of a tentative sample: a share of those of the step before,
# or so few. Measured on bounded regulators and smoothed signals: what settles more slowly takes longer than a solver.
_SETTLING, _FEW = 0.5, 8
# Step relative to the slack of a bound that repels, and the largest change of its logarithm.
_LONG, _GROWTH = 0.5, 20.0


@dataclass(frozen=True)
class Polished:
    """The best point found, and what Newton's method says about its distance from the solution.

    Attributes:
        evaluation: Derivatives and residuals at the polished points.
        predicted: Relative size of the last Newton step, |dz / w|, (B,): taken or not, the
            solution is no farther than that. Infinite for tentative samples that were given up.
        singular: Where the KKT matrix is singular, (B,).
        condition: Its condition estimate, (B,).
        system: The last factored system of the whole batch.
        working: Its active set.
        last: The active set of each sample's last step, to which ``singular`` and ``condition`` belong.
        steps: How many each sample has taken or tried, (B,).
    """

    evaluation: Evaluation
    predicted: Array
    singular: Mask
    condition: Array
    system: System | None
    working: ActiveSet
    last: ActiveSet
    steps: Index

    def take(self, samples: Index) -> Polished:
        """Some samples, by index; of all of them, itself with its system."""
        if len(samples) == len(self.predicted):
            return self
        return Polished(
            self.evaluation.take(samples),
            self.predicted[samples],
            self.singular[samples],
            self.condition[samples],
            None,
            self.working.take(samples),
            self.last.take(samples),
            self.steps[samples],
        )


def kkt_system(
    evaluation: Evaluation, active: ActiveSet, jacobian: Matrices | None = None, **options: Any
) -> System:
    """The KKT system at a batch of points, for the active set ``active``; with another ``jacobian`` than that of c."""
    narrowing = torch.from_numpy(evaluation.steep.narrowing) if evaluation.steep.any else None
    return System(
        evaluation.H,
        evaluation.J if jacobian is None else jacobian,
        torch.from_numpy(active.constraints),
        torch.from_numpy(active.fixed),
        narrowing=narrowing,
        **options,
    )


@np.errstate(all="ignore")  # a failed sample may hold anything; it is judged, not computed with
def polish(
    program: Program, bound: Bound, start: PrimalDual, policy: Policy, tentative: bool = False
) -> Polished:
    """Polish a batch of points; a sample that Newton's method does not improve stays as it is.

    Args:
        tentative: The points are guesses: give up those whose KKT matrix is singular, or whose active set does
            not settle soon.
    """
    best = _unforced(without_cancellation(_at_edges(Evaluation.at(program, bound, start))))
    working = identify(best, 0.0)
    best = _without_idle_multipliers(best, working)
    newton = _Newton(_where_finite(best, settled(best, working)), working, policy, tentative)
    for _ in range(_MAX_STEPS):
        if not newton.open.any():
            break
        newton.advance()
    return newton.polished


def _unforced(evaluation: Evaluation) -> Evaluation:
    """The points; without any multipliers where the objective is constant."""
    point, loaded = evaluation.point, ~evaluation.unloaded[:, None]
    if loaded.all():
        return evaluation
    sides = {name: np.where(loaded, getattr(point, name), 0.0) for name in ("y", "lower", "upper")}
    return evaluation.at_known(replace(point, **sides), evaluation.first)


def _at_edges(evaluation: Evaluation) -> Evaluation:
    """The points off the bounds on which they lie and the slope has no value."""
    z, (lower, upper) = evaluation.point.z, evaluation.steep.edges
    inside = np.clip(z, lower, np.maximum(lower, upper))
    if np.array_equal(inside, z):
        return evaluation
    return evaluation.moved(replace(evaluation.point, z=inside))


def _without_idle_multipliers(evaluation: Evaluation, working: ActiveSet) -> Evaluation:
    """The points without multipliers of what the working set does not hold.

    Those of bounds that an interior point method leaves balance forces as if they held: a step that drops them would look
    like a loss. Of rows they are dropped where they would be felt. At u = 0, where |u| <= 1 has no gradient, one would
    hold u and be seen nowhere; and in H it makes every step short, so that a point far inside of a small ball would look
    like a solution.
    """
    program, point, fixed = evaluation.program, evaluation.point, fixed_by_bounds(evaluation)
    lower = np.where(working.lower | fixed, point.lower, 0.0)
    upper = np.where(working.upper | fixed, point.upper, 0.0)
    idle = ~working.constraints & (point.y != 0)
    idle[:, program.constraints :] = False
    if program.quadratic:
        idle[:] = False
    elif program.pieces is None:
        idle &= np.abs(point.y) * evaluation.reach > _FELT * evaluation.force
    if idle.any():
        point = replace(point, y=np.where(idle, 0.0, point.y), lower=lower, upper=upper)
        return Evaluation(program, evaluation.bound, point, evaluation.first)
    if np.array_equal(lower, point.lower) and np.array_equal(upper, point.upper):
        return evaluation
    return evaluation.with_bounds_pushing(lower, upper)


@dataclass(frozen=True)
class _Factored:
    """The system of some samples, and what it was made for."""

    system: System
    samples: Index
    active: ActiveSet
    pieces: Array

    def serves(self, samples: Index, working: ActiveSet) -> bool:
        """Whether all of ``samples`` are among its own, and the active sets of these are what they were."""
        same = np.array_equal(working.sides[self.samples], self.active.sides)
        return same and bool(np.isin(samples, self.samples).all())


class _Newton:
    """Newton's method for a batch: where its samples are, and what was found out about them on the way.

    A factorization serves again while active sets stay what they are and its last step has shown that the matrix is nearly
    that of the solution; that of an LP or QP is.

    Attributes:
        open: Samples that are still to be moved, (B,).
    """

    def __init__(self, best: Evaluation, working: ActiveSet, policy: Policy, tentative: bool) -> None:
        batch = len(best.point.z)
        self._policy, self._tentative = policy, tentative
        self._best, self._working, self._last = best, working, working
        self._predicted, self._condition, self._allowed = (np.full(batch, np.inf) for _ in range(3))
        self._singular, self._near = np.zeros(batch, dtype=bool), np.zeros(batch, dtype=bool)
        self._steps = np.zeros(batch, dtype=np.intp)
        self._factored: _Factored | None = None
        self._whole: _Factored | None = None
        self.open = computable(best)

    @property
    def polished(self) -> Polished:
        """What there is to say of the batch as it is now."""
        system, working = (
            (None, self._working) if self._whole is None else (self._whole.system, self._whole.active)
        )
        return Polished(
            self._best,
            self._predicted,
            self._singular,
            self._condition,
            system,
            working,
            self._last,
            self._steps,
        )

    def advance(self) -> None:
        """Take a step with the samples that are open, and close those that need no other."""
        quadratic, factored = self._best.program.quadratic, self._at_hand()
        samples = np.flatnonzero(self.open) if factored is None else factored.samples
        active, before, going = self._working.take(samples), self._best.take(samples), self.open[samples]
        here = settled(before, active)
        undefined = going & ~computable(here)
        if undefined.any():  # at the zero of a norm that holds nothing, or where a function overflows
            self.open[samples[undefined]] = False
            return
        if factored is None or not np.array_equal(here.point.pieces, factored.pieces):
            system = kkt_system(here, active, linear_solver=self._policy.linear_solver)
            factored = _Factored(system, samples, active, here.point.pieces)
        self._factored, system, singular = factored, factored.system, factored.system.singular.numpy()
        lost = going & singular & self._tentative
        if lost.any():
            self._give_up(samples[lost])
            return
        if len(samples) == len(self.open):
            self._whole = factored
        self._last = replace(self._last, sides=merged(self._last.sides, samples, active.sides, going))
        self._singular[samples], self._condition[samples] = singular, system.condition.numpy()
        there = going & quadratic & (before.scaled <= _EXACT) & singular
        if there.any():  # no step of a singular system brings such a point on, and each costs singular values
            self._predicted[samples[there]], self.open[samples[there]] = 0.0, False
            return
        step = _newton_step(here, active, system)
        self._predicted[samples[going]] = step.size[going]
        exact = step.rounding & (before.scaled <= _EXACT)
        # The first step of a guess is taken, however small.
        exact &= (self._steps[samples] > 0) | (not self._tentative)
        self._steps[samples[going]] += 1
        going = going & ~exact
        self.open[samples] = going
        if not going.any():  # as active-set methods leave a QP
            return
        tried = _taken(here, active, step)
        better = going & (tried.scaled < before.scaled)
        corrected = _corrected(active, tried, singular)
        changed = going & (corrected.sides != active.sides).any(axis=1) & np.isfinite(tried.scaled)
        self._working = replace(
            self._working,
            sides=merged(self._working.sides, samples, corrected.sides, changed),
            weak=merged(self._working.weak, samples, corrected.weak, changed),
        )
        self._best = merged_evaluation(self._best, samples, tried, better)
        self._near[samples] = quadratic | (better & (tried.scaled <= _QUADRATIC * before.scaled))
        accuracy = self._policy.accuracy
        far = (self._predicted[samples] > min(_CONVERGED, accuracy)) | (tried.scaled > accuracy)
        self.open[samples] = changed | (better & far)
        if self._tentative:
            moving = (corrected.sides != active.sides).sum(axis=1)
            self._give_up(samples[changed & (moving > np.maximum(self._allowed[samples], _FEW))])
            self._allowed[samples] = _SETTLING * moving

    def _at_hand(self) -> _Factored | None:
        """What the open samples can use once more."""
        known, samples = self._factored, np.flatnonzero(self.open)
        serves = known is not None and self._near[samples].all() and known.serves(samples, self._working)
        return known if serves else None

    def _give_up(self, samples: Index) -> None:
        self.open[samples], self._predicted[samples] = False, np.inf


def computable(evaluation: Evaluation) -> Mask:
    """Samples in which a step can be taken: residuals, and squares of derivatives, are finite."""
    squares = np.isfinite(evaluation.reach).all(axis=1) & np.isfinite(evaluation.force[:, 0] ** 2)
    found: Mask = np.isfinite(evaluation.scaled) & squares
    return found


def _where_finite(before: Evaluation, after: Evaluation) -> Evaluation:
    """``after`` for the samples where it has finite residuals."""
    defined = np.isfinite(after.scaled)
    return after if defined.all() else merged_evaluation(before, np.arange(len(defined)), after, defined)


@dataclass(frozen=True)
class _Step:
    """A Newton step on the active equations.

    Attributes:
        z, y: Where it leads, (B, n) and (B, m).
        size: Relative size of the step, |dz / w|, (B,).
        rounding: Whether step and change of the multipliers are rounding, (B,).
    """

    z: Array
    y: Array
    size: Array
    rounding: Mask


def _newton_step(here: Evaluation, active: ActiveSet, system: System) -> _Step:
    y = np.where(active.constraints, here.point.y, 0.0)
    forces = Evaluation(here.program, here.bound, replace(here.point, y=y), here.first).constraint_forces
    target = np.where(active.lower, *here.steep.edges)
    step = system.solve(
        torch.from_numpy(-forces),
        torch.from_numpy(-here.first.constraints),
        torch.from_numpy(np.where(active.fixed, target - here.point.z, 0.0)),
    )
    x, t = step.x.numpy(), step.t.numpy()
    z = np.where(active.fixed, target, _off_bounds(here, here.point.z + x))
    size, unit = np.abs(x / here.size).max(axis=1, initial=0.0), here.reach / here.force
    change, force = (np.abs(v * unit).max(axis=1, initial=0.0) for v in (t, y))
    rounding = (size <= _ROUNDING) & (change <= _ROUNDING * np.maximum(force, 1.0))
    rounding &= (~active.fixed | (here.point.z == target)).all(axis=1)  # at a bound is where it says
    return _Step(z, y + t, size, rounding & ~system.singular.numpy())


def _off_bounds(here: Evaluation, z: Array) -> Array:
    """Where a step leads; of variables that a bound repels a long one is taken in the logarithm of their slack.

    That of u log u is solved by it at once, from whichever side, and no slack vanishes.
    """
    if not here.steep.repelled.any():
        return z
    before, bound = here.point.z, here.bound
    at_lower = before - bound.lower <= bound.upper - before
    slack = np.where(at_lower, before - bound.lower, bound.upper - before)
    growth = np.where(at_lower, z - before, before - z) / np.where(slack > 0, slack, 1.0)
    grown = slack * np.exp(np.clip(growth, -_GROWTH, _GROWTH))
    long = here.steep.repelled & (slack > 0) & (np.abs(growth) > _LONG)
    return np.where(long, np.where(at_lower, bound.lower + grown, bound.upper - grown), z)


def _taken(here: Evaluation, active: ActiveSet, step: _Step) -> Evaluation:
    """The points after a step."""
    moved = _off_zeros(_unforced(here.moved(replace(here.point, z=step.z, y=step.y))), active)
    return moved.with_bounds_pushing(*bound_multipliers(moved, active))


def _off_zeros(evaluation: Evaluation, active: ActiveSet) -> Evaluation:
    """The points off the zero of norms that they have left: on its piece a norm is zero wherever the point goes."""
    point, program = evaluation.point, evaluation.program
    if program.pieces is None:
        return evaluation
    kinks = kink_sides(evaluation)
    left = (point.pieces == 0) & ~program.numbers & ~active.sides[:, kinks]
    left &= evaluation.scaled_slack[:, kinks] > _SIGN
    if not left.any():
        return evaluation
    return evaluation.moved(replace(point, pieces=np.where(left, 1.0, point.pieces)))


def bound_multipliers(evaluation: Evaluation, active: ActiveSet) -> tuple[Array, Array]:
    """The multipliers of active lower and upper bounds that balance the forces on the variables they fix."""
    forces, fixed = evaluation.constraint_forces, fixed_by_bounds(evaluation)
    lower = np.where(fixed, np.maximum(forces, 0), np.where(active.lower, forces, 0.0))
    upper = np.where(fixed, np.maximum(-forces, 0), np.where(active.upper, -forces, 0.0))
    return lower, upper


def _corrected(active: ActiveSet, tried: Evaluation, singular: Mask) -> ActiveSet:
    # Dependent rows that contradict each other meet half-way: those that are left with slack do not bind.
    apart = singular[:, None] & (tried.scaled_slack > _SIGN)
    leave = (tried.scaled_multiplier < -_SIGN) | apart
    join = tried.scaled_slack < -_SIGN
    if tried.program.pieces is not None:
        join[:, kink_sides(tried)] &= ~tried.idle_kinks
    sides = np.where(active.sides, ~leave, join)
    n = active.n
    fixed = fixed_by_bounds(tried)
    sides[:, -2 * n :] = np.where(np.tile(fixed, 2), active.sides[:, -2 * n :], sides[:, -2 * n :])
    left = active.sides & ~sides  # and no longer weak: what is weak and no side is a bend
    return replace(active, sides=sides, weak=active.weak & ~left)


def merged_evaluation(whole: Evaluation, samples: Index, part: Evaluation, accept: Mask) -> Evaluation:
    """The same of an evaluation."""
    if not accept.any():
        return whole
    if accept.all() and len(samples) == len(whole.point.z):
        return part
    point = PrimalDual(
        **{k: merged(v, samples, getattr(part.point, k), accept) for k, v in vars(whole.point).items()}
    )
    first = replace(
        whole.first,
        **{k: merged(v, samples, getattr(part.first, k), accept) for k, v in vars(whole.first).items()},
    )
    return whole.at_known(point, first)


def merged(whole: Any, samples: Index, part: Any, accept: Mask) -> Any:
    """An array with some samples overwritten by rows of ``part``, where those are to be accepted."""
    result = whole.copy()
    result[samples[accept]] = part[accept]
    return result
