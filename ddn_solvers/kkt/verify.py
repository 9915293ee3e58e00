"""Is a point a solution? Decided by our residuals, whatever found it.

Solved means: after the polish, scaled feasibility and complementarity are within ``accuracy``, and so is
the predicted Newton step |dz / w|, w being the sizes of the variables (``residuals.py``), where the KKT matrix is
regular (stationarity scaled by row where it is not). Where curvature is not that of the way to the solution, as close
to the zero of a norm, a step says little: forces that do not balance at all are then no solution either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet, entangled, identify, off_kinks, settled
from ddn_solvers.arrays import Array, Index, Mask
from ddn_solvers.kkt.chance import unsettled, without_pull
from ddn_solvers.kkt.curvature import descending, vanishing
from ddn_solvers.kkt.multipliers import NEARLY_ON_KINK, canonical_multipliers
from ddn_solvers.kkt.polish import Polished, kkt_system, merged, merged_evaluation, polish
from ddn_solvers.kkt.system import System
from ddn_solvers.pieces import Kink
from ddn_solvers.policy import Policy
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual
from ddn_solvers.solution import Status

_ON_KINK = 1e-8  # |residual| / max(1, |z|) that counts as sitting on a kink, once polished
_UNBALANCED = 1e-2  # scaled stationarity that no small step excuses
_NEAR_KINK = 1e-2  # and as possibly the reason why a point is not stationary


@dataclass(frozen=True)
class Verified:
    """A batch of points with everything that was established about them.

    Attributes:
        evaluation: At the polished points.
        active: Active set there.
        singular: Where the KKT matrix is singular, (B,).
        condition: Its condition estimate, (B,).
        status: OPTIMAL, NOT_A_KKT_POINT, NOT_A_MINIMUM or NUMERICAL_ERROR, one a sample.
        reasons: What is wrong with each sample; empty for good ones.
        system: A factored system near these points with this active set, if there is one for the batch.
    """

    evaluation: Evaluation
    active: ActiveSet
    singular: Mask
    condition: Array
    status: tuple[Status, ...]
    reasons: tuple[str, ...]
    system: System | None = None

    def take(self, samples: Index) -> Verified:
        """What was established about some samples, by index."""
        return Verified(
            self.evaluation.take(samples),
            self.active.take(samples),
            self.singular[samples],
            self.condition[samples],
            tuple(self.status[i] for i in samples),
            tuple(self.reasons[i] for i in samples),
        )

    def put(self, samples: Index, other: Verified, accept: Mask) -> Verified:
        """With what was established about some samples once more, where that is to be accepted."""
        if not accept.any():
            return self
        active = {
            name: merged(getattr(self.active, name), samples, getattr(other.active, name), accept)
            for name in ("sides", "weak", "margin")
        }
        status, reasons = list(self.status), list(self.reasons)
        for k in np.flatnonzero(accept):
            status[samples[k]], reasons[samples[k]] = other.status[k], other.reasons[k]
        return Verified(
            merged_evaluation(self.evaluation, samples, other.evaluation, accept),
            replace(self.active, **active),
            merged(self.singular, samples, other.singular, accept),
            merged(self.condition, samples, other.condition, accept),
            tuple(status),
            tuple(reasons),
        )

    @property
    def degenerate(self) -> bool:
        """Whether a sample that is solved has a singular KKT matrix."""
        return bool((self.singular & self.optimal).any())

    @property
    def one_sided(self) -> bool:
        """Whether a sample that is solved has a weakly active constraint."""
        return bool((self.active.weak.any(axis=1) & self.optimal).any())

    @property
    def optimal(self) -> Mask:
        return np.array([status is Status.OPTIMAL for status in self.status], dtype=bool)


def verify(
    program: Program,
    bound: Bound,
    start: PrimalDual,
    policy: Policy,
    dtype: torch.dtype,
    minimum: bool = True,
) -> Verified:
    """Polish and judge a batch of points; ``dtype`` and ``minimum`` as of ``judge``."""
    return judge(polish(program, bound, start, policy), policy, dtype, minimum)


def verify_from(
    program: Program,
    bound: Bound,
    start: Callable[[Index, float], PrimalDual],
    policy: Policy,
    dtype: torch.dtype,
    minimum: bool = True,
) -> Verified:
    """The same from points whose kinks have to be told from what is merely close to them.

    Args:
        start: The points of some samples, with multipliers, for how near to a kink counts as on it.
    """
    everything, (near, nearest) = np.arange(len(bound.lower)), NEARLY_ON_KINK
    first = start(everything, near)
    found = verify(program, bound, first, policy, dtype, minimum)
    failed = np.flatnonzero(~found.optimal)
    if program.pieces is None or not failed.size:
        return found
    second = start(failed, nearest)
    other = (second.pieces != first.pieces[failed]).any(axis=1)
    failed = failed[other]
    if not failed.size:
        return found
    again = verify(program, bound.take(failed), second.take(other), policy, dtype, minimum)
    return found.put(failed, again, again.optimal)


@np.errstate(all="ignore")  # a failed sample may hold anything; it is judged, not computed with
def judge(polished: Polished, policy: Policy, dtype: torch.dtype, minimum: bool = True) -> Verified:
    """Judge a batch of polished points.

    Args:
        dtype: The caller's; the tolerance of the active set depends on its rounding.
        minimum: Refuse points with negative curvature (``attach`` accepts them).
    """
    evaluation, batch = polished.evaluation, len(polished.predicted)
    program = evaluation.program
    before, predicted = evaluation, polished.predicted
    evaluation, active, singular, condition, complementarity = _established(before, polished, policy, dtype)
    # On other pieces than those of the polish other forces meet.
    kinks, feasibility = _kinks(evaluation), np.fmax(before.scaled_feasibility, evaluation.scaled_feasibility)
    stationarity = np.fmax(before.scaled_stationarity, evaluation.scaled_stationarity)
    decides = polished.singular | (stationarity > _UNBALANCED)
    gone = vanishing(evaluation, active)
    lost = np.flatnonzero(gone.any(axis=1))
    if lost.size:
        alone = without_pull(evaluation.take(lost), active.take(lost), gone[lost])
        stationarity[lost], singular[lost], decides[lost] = alone.scaled_stationarity, True, True
    singular |= entangled(evaluation)
    same = np.array_equal(polished.working.sides, active.sides)
    nearby = polished.system if same and not singular.any() else None
    singular |= unsettled(evaluation, active, singular, condition, predicted, policy, nearby)
    nearby = None if singular.any() else nearby
    convex = nearby is not None and program.quadratic and nearby.convex
    asked = minimum and program.may_be_nonconvex
    bent = descending(evaluation, active, convex) if asked else np.zeros(batch, dtype=bool)
    numbers = {
        "feasibility": feasibility,
        "complementarity": complementarity,
        "stationarity": np.where(decides, stationarity, 0.0),
        "predicted Newton step": np.where(polished.singular, 0.0, predicted),
    }
    values = np.stack(list(numbers.values()))
    finite = np.isfinite(values).all(axis=0) & np.isfinite(evaluation.first.objective)
    large, on_kink = values > policy.accuracy, kinks <= _ON_KINK
    status, reasons = [Status.OPTIMAL] * batch, [""] * batch
    for i in np.flatnonzero(~finite | large.any(axis=0) | on_kink.any(axis=1) | bent):
        above = {name: numbers[name][i] for name, much in zip(numbers, large[:, i], strict=True) if much}
        names = [program.kinks[k] for k in np.flatnonzero(on_kink[i])]
        hint = _nearby(kinks[i], program.kinks)
        status[i], reasons[i] = _failure(bool(finite[i]), names, above, policy.accuracy, hint)
    return Verified(evaluation, active, singular, condition, tuple(status), tuple(reasons), nearby)


def _tolerance(evaluation: Evaluation, policy: Policy, dtype: torch.dtype) -> Array:
    """Of the active set, (B,): it is judged less finely where the point could not be polished to rounding."""
    tolerance = np.maximum(policy.activity_tolerance(dtype), 10 * evaluation.scaled)
    return np.where(np.isfinite(tolerance), tolerance, 0.0)


def _established(
    evaluation: Evaluation, polished: Polished, policy: Policy, dtype: torch.dtype
) -> tuple[Evaluation, ActiveSet, Mask, Array, Array]:
    """The points with their active set, on its pieces and with its multipliers; singularity and condition there.

    And scaled complementarity, of the multipliers that are chosen where there is a choice.
    """
    complementarity = evaluation.scaled_complementarity.copy()
    active = identify(evaluation, _tolerance(evaluation, policy, dtype))
    there = settled(evaluation, active)
    singular, condition = polished.singular.copy(), polished.condition.copy()
    finite = np.isfinite(there.scaled)
    differs = (active.sides != polished.last.sides).any(axis=1)
    differs |= (there.point.pieces != evaluation.point.pieces).any(axis=1)
    other = np.flatnonzero(differs & finite)
    if other.size:
        system = kkt_system(there.take(other), active.take(other), linear_solver=policy.linear_solver)
        singular[other], condition[other] = system.singular.numpy(), system.condition.numpy()
    feasible = there.scaled_feasibility <= policy.accuracy
    degenerate = np.flatnonzero(singular & finite & feasible)
    # Those samples alone: the others stay as they are, and for those that failed it costs much.
    if degenerate.size:
        on_kinks = settled(evaluation, replace(active, weak=np.zeros_like(active.weak)))
        chosen = canonical_multipliers(on_kinks.take(degenerate), active.take(degenerate))
        point = PrimalDual(**{name: values.copy() for name, values in vars(there.point).items()})
        for k, i in enumerate(degenerate):
            point.put(int(i), chosen, k)
        here = Evaluation.at(there.program, there.bound, point)
        # Of nested kinks one's multiplier is another's weight, which the choice has not looked at.
        worse = np.flatnonzero(
            (here.scaled_complementarity > policy.accuracy) & (there.scaled <= policy.accuracy)
        )
        if worse.size:
            for i in worse:
                point.put(int(i), there.point, int(i))
            here = Evaluation.at(there.program, there.bound, point)
        chosen_at = np.setdiff1d(degenerate, worse)
        complementarity[chosen_at] = here.scaled_complementarity[chosen_at]
        active = identify(here, _tolerance(here, policy, dtype))
        there = settled(here, active)
    return there, active, singular, condition, complementarity


def on_chosen_pieces(verified: Verified, policy: Policy) -> Verified:
    """What is differentiated: the verified points themselves, or Clarke's subdifferential at their kinks."""
    if policy.nonsmooth == "manifold":
        return verified
    evaluation, active = off_kinks(verified.evaluation, verified.active)
    if active is verified.active:
        return verified
    good, singular = np.flatnonzero(verified.optimal), np.zeros_like(verified.singular)
    singular[good] = kkt_system(evaluation.take(good), active.take(good)).singular.numpy()
    return replace(verified, evaluation=evaluation, active=active, singular=singular, system=None)


def _failure(
    finite: bool, on: list[Kink], large: dict[str, Any], accuracy: float, hint: str
) -> tuple[Status, str]:
    """What is wrong with a point: the first of what there is; nothing of it, and it is no minimum."""
    if not finite:
        return Status.NUMERICAL_ERROR, "the point or the functions there are not finite"
    if on:
        return Status.NOT_A_KKT_POINT, f"the solution sits on a kink of {on[0]}"
    if large:
        reason = ", ".join(f"scaled {name} {value:.1e}" for name, value in large.items())
        return Status.NOT_A_KKT_POINT, f"{reason}, above the accuracy {accuracy:.0e}{hint}"
    return Status.NOT_A_MINIMUM, "the reduced Hessian of the Lagrangian has a negative eigenvalue"


def _nearby(distances: Array, names: tuple[Kink, ...]) -> str:
    nearest = int(distances.argmin()) if distances.size else -1
    close = nearest >= 0 and distances[nearest] <= _NEAR_KINK
    return f"; close to a kink of {names[nearest]}" if close else ""


def _kinks(evaluation: Evaluation) -> Array:
    """Scaled distance to each kink without pieces, (B, kinks)."""
    program, z = evaluation.program, evaluation.point.z
    if not program.kinks:
        return np.zeros((len(z), 0))
    distances: Array = np.abs(
        evaluation.functions.kink_residuals(z, evaluation.inputs)
    ) / evaluation.size.max(axis=1, keepdims=True)
    return distances
