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
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual

_MAX_STEPS = 8
_CONVERGED = 1e-9  # relative step after which, the convergence being quadratic, another is rounding
_ROUNDING = 1e-13  # relative size of a step that is not worth taking
_EXACT = 1e-12  # at points with no scaled residual above this
_SIGN = 1e-11  # scaled slack or multiplier that counts as negative
# How many sides may join or leave the active set in each step of a tentative sample: a share of those of the step before,
# or so few. Measured on bounded regulators and smoothed signals: what settles more slowly takes longer than a solver.
_SETTLING, _FEW = 0.5, 8


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


def kkt_system(evaluation: Evaluation, active: ActiveSet, **options: Any) -> System:
    """The KKT system at a batch of points, for the active set ``active``."""
    return System(
        evaluation.H,
        evaluation.J,
        torch.from_numpy(active.constraints),
        torch.from_numpy(active.fixed),
        **options,
    )


@np.errstate(all="ignore")  # a failed sample may hold anything; it is judged, not computed with
def polish(
    program: Program, bound: Bound, start: PrimalDual, linear_solver: Any = "auto", tentative: bool = False
) -> Polished:
    """Polish a batch of points; a sample that Newton's method does not improve stays as it is.

    Args:
        tentative: The points are guesses: give up those whose KKT matrix is singular, or whose active set does
            not settle soon.
    """
    best = without_cancellation(Evaluation.at(program, bound, start))
    working = identify(best, 0.0)
    best = _where_finite(best, settled(best, working))
    batch = len(start.z)
    predicted, condition = np.full(batch, np.inf), np.full(batch, np.inf)
    singular = np.zeros(batch, dtype=bool)
    open_ = _computable(best)
    whole, of_whole, last = None, working, working
    allowed, known, steps = np.full(batch, np.inf), None, np.zeros(batch, dtype=np.intp)
    for _ in range(_MAX_STEPS):
        samples = np.flatnonzero(open_)
        if not samples.size:
            break
        active = working.take(samples)
        before = best.take(samples)
        here = settled(before, active)
        defined = _computable(here)
        if not defined.all():  # at the zero of a norm that holds nothing, or where a function overflows
            open_[samples[~defined]] = False
            continue
        # All that the system of an LP or QP depends on.
        content = (samples.tobytes(), active.sides.tobytes()) if program.quadratic else None
        if content is None or content != known:
            system, known = kkt_system(here, active, linear_solver=linear_solver), content
        lost = system.singular.numpy() & tentative
        if lost.any():
            open_[samples[lost]], predicted[samples[lost]] = False, np.inf
            continue
        if len(samples) == batch:
            whole, of_whole = system, active
        last = replace(last, sides=_put(last.sides, samples, active.sides, np.ones(len(samples), dtype=bool)))
        singular[samples], condition[samples] = system.singular.numpy(), system.condition.numpy()
        there = program.quadratic & (before.scaled <= _EXACT) & singular[samples]
        if there.any():  # no step of a singular system brings such a point on, and each costs singular values
            predicted[samples[there]], open_[samples[there]] = 0.0, False
            continue
        step = _newton_step(here, active, system)
        predicted[samples] = step.size
        exact = step.rounding & (before.scaled <= _EXACT)
        exact &= (steps[samples] > 0) | (not tentative)  # the first step of a guess is taken, however small
        steps[samples] += 1
        if exact.all():  # as active-set methods leave a QP
            break
        tried = _taken(here, active, step)
        better = ~exact & (tried.scaled < before.scaled)
        corrected = _corrected(active, tried, system.singular.numpy())
        changed = (corrected.sides != active.sides).any(axis=1) & np.isfinite(tried.scaled) & ~exact
        sides, weak = (
            _put(getattr(working, name), samples, getattr(corrected, name), changed)
            for name in ("sides", "weak")
        )
        working = replace(working, sides=sides, weak=weak)
        best = _put_evaluation(best, samples, tried, better)
        open_[samples] = changed | (better & (predicted[samples] > _CONVERGED))
        if tentative:
            moving = (corrected.sides != active.sides).sum(axis=1)
            lost = changed & (moving > np.maximum(allowed[samples], _FEW))
            allowed[samples], open_[samples[lost]], predicted[samples[lost]] = (
                _SETTLING * moving,
                False,
                np.inf,
            )
    return Polished(best, predicted, singular, condition, whole, of_whole, last, steps)


def _computable(evaluation: Evaluation) -> Mask:
    """Samples in which a step can be taken: residuals, and squares of derivatives, are finite."""
    squares = np.isfinite(evaluation.reach).all(axis=1) & np.isfinite(evaluation.force[:, 0] ** 2)
    found: Mask = np.isfinite(evaluation.scaled) & squares
    return found


def _where_finite(before: Evaluation, after: Evaluation) -> Evaluation:
    """``after`` for the samples where it has finite residuals."""
    defined = np.isfinite(after.scaled)
    return after if defined.all() else _put_evaluation(before, np.arange(len(defined)), after, defined)


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
    target = np.where(active.lower, here.bound.lower, here.bound.upper)
    step = system.solve(
        torch.from_numpy(-forces),
        torch.from_numpy(-here.first.constraints),
        torch.from_numpy(np.where(active.fixed, target - here.point.z, 0.0)),
    )
    x, t = step.x.numpy(), step.t.numpy()
    z = np.where(active.fixed, target, here.point.z + x)
    size, unit = np.abs(x / here.size).max(axis=1, initial=0.0), here.reach / here.force
    change, force = (np.abs(v * unit).max(axis=1, initial=0.0) for v in (t, y))
    rounding = (size <= _ROUNDING) & (change <= _ROUNDING * np.maximum(force, 1.0))
    rounding &= (~active.fixed | (here.point.z == target)).all(axis=1)  # at a bound is where it says
    return _Step(z, y + t, size, rounding & ~system.singular.numpy())


def _taken(here: Evaluation, active: ActiveSet, step: _Step) -> Evaluation:
    """The points after a step."""
    moved = here.moved(replace(here.point, z=step.z, y=step.y))
    return moved.with_bounds_pushing(*bound_multipliers(moved, active))


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


def _put_evaluation(whole: Evaluation, samples: Index, part: Evaluation, accept: Mask) -> Evaluation:
    if not accept.any():
        return whole
    if accept.all() and len(samples) == len(whole.point.z):
        return part
    point = PrimalDual(
        **{k: _put(v, samples, getattr(part.point, k), accept) for k, v in vars(whole.point).items()}
    )
    first = replace(
        whole.first,
        **{k: _put(v, samples, getattr(part.first, k), accept) for k, v in vars(whole.first).items()},
    )
    return whole.at_known(point, first)


def _put(whole: Any, samples: Index, part: Any, accept: Mask) -> Any:
    result = whole.copy()
    result[samples[accept]] = part[accept]
    return result
