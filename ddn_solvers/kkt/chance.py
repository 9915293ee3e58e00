"""What a verified point owes to chance: curvature that the next point would not have, multipliers without limit.

Both look regular at the point itself. At the minimum of u^4, found to within 1e-5, the curvature is 1e-9 and its inverse
some number; at a cusp, where the gradient of a row vanishes, a multiplier of 1e13 times nothing balances any force.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet
from ddn_solvers.arrays import Array, Mask, without_symmetry
from ddn_solvers.kkt.polish import bound_multipliers, computable, kkt_system
from ddn_solvers.kkt.system import System
from ddn_solvers.policy import Policy
from ddn_solvers.residuals import BEYOND, Evaluation

_FAINT = 1e-4  # curvature relative to the forces, or reciprocal of the condition, from which on it may be that of chance
_FEW = 8  # variables
# How much farther off, over the predicted step, and at least; and the relative change of the inverse that makes it so.
_FARTHER, _EXACT, _OTHER = 10.0, 1e-12, 0.5


def unsettled(
    evaluation: Evaluation,
    active: ActiveSet,
    singular: Mask,
    condition: Array,
    predicted: Array,
    policy: Policy,
    nearby: System | None,
) -> Mask:
    """Regular samples whose KKT matrix is another at points as good as these: what its inverse says is then chance.

    So it is at the minimum of u^4, or where two circles touch. K^-1 (K' - K) is estimated along the direction that K^-1
    enlarges most, K' being the matrix farther off than the solution can be by the ``predicted`` step; only where the
    curvature of some variable, or K as a whole, gives reason to.

    Args:
        nearby: A system factored near these points with this active set, if there is one for the batch.
    """
    found = np.zeros(len(singular), dtype=bool)
    if evaluation.program.quadratic:
        return found
    solved = computable(evaluation) & (evaluation.scaled_feasibility <= policy.accuracy) & ~singular
    if not solved.any():
        return found
    farther = _farther(evaluation, active, predicted, policy)
    curved = evaluation.H.absolute.times(evaluation.own_size) * evaluation.own_size
    curved = np.where(active.fixed | (curved == 0), np.inf, curved)
    doubtful = curved.min(axis=1, initial=np.inf) < _FAINT * evaluation.force[:, 0]
    # All of them may be flat at once, with nothing to compare them with: then H is another farther off.
    H = evaluation.H.nonzeros
    differs = np.abs(evaluation.functions.hessian(farther, evaluation.inputs, evaluation.point.y) - H)
    doubtful |= differs.max(axis=1, initial=0.0) > _OTHER * np.abs(H).max(axis=1, initial=0.0)
    some = np.flatnonzero((doubtful | (active.n <= _FEW) | (condition > 1 / _FAINT)) & solved)
    if not some.size:
        return found
    here = evaluation.take(some)
    moved = replace(here.point, z=farther[some])
    there = here.at_known(moved, Evaluation.at(here.program, here.bound, moved).first)
    if nearby is not None and len(some) == len(singular):
        system = nearby.moved(here.H, here.J)
    else:
        system = kkt_system(here, active.take(some), linear_solver=policy.linear_solver)
    n, force, reach = active.n, here.force, here.reach
    v, vector = np.zeros_like(here.size), without_symmetry(n + reach.shape[1])
    x, t = _solved(system, vector[:n] * force / here.size, vector[n:] * reach, v)
    a = there.H.times(x) - here.H.times(x) + there.J.transposed_times(t) - here.J.transposed_times(t)
    change = _solved(system, a, there.J.times(x) - here.J.times(x), v)
    before, after = (
        np.abs(np.concatenate([x / here.size, t * reach / force], axis=1)).max(axis=1)
        for x, t in ((x, t), change)
    )
    found[some] = after > _OTHER * before
    return found


def _farther(evaluation: Evaluation, active: ActiveSet, predicted: Array, policy: Policy) -> Array:
    """Points farther off than the solution can be by the predicted step, on the same side of all bounds, (B, n)."""
    z, bound = evaluation.point.z, evaluation.bound
    far = np.clip(_FARTHER * predicted, _EXACT, policy.accuracy)[:, None]
    step = far * evaluation.size * evaluation.steep.narrowing * np.sign(without_symmetry(active.n))
    step = np.where(active.fixed, 0.0, step)
    outside = (z + step < bound.lower) | (z + step > bound.upper)
    return z + np.where(outside, -step, step)


def without_pull(evaluation: Evaluation, active: ActiveSet, gone: Mask) -> Evaluation:
    """The same points without what rows that hold nothing exert on free variables.

    Where a gradient vanishes, a multiplier without limit balances anything. One that does not vanish in fixed variables
    pushes those all the same.
    """
    pattern = evaluation.functions.jacobian_pattern
    alone = evaluation.at_known(
        replace(evaluation.point, y=np.zeros_like(evaluation.point.y)), evaluation.first
    )
    # A row that is merely short, as that of a small ball far from the origin, has a multiplier in proportion.
    gone = gone & (np.abs(evaluation.point.y) * evaluation.reach_nearby > BEYOND * alone.force)
    free = ~active.fixed[:, pattern.columns]
    pull, point = gone[:, pattern.indices] & free, evaluation.point
    point = replace(point, y=np.where(evaluation.vanishing & gone, 0.0, point.y))
    first = replace(evaluation.first, jacobian=np.where(pull, 0.0, evaluation.first.jacobian))
    alone = evaluation.at_known(point, first)
    return alone.with_bounds_pushing(*(np.maximum(m, 0.0) for m in bound_multipliers(alone, active)))


def _solved(system: System, a: Array, b: Array, v: Array) -> tuple[Array, Array]:
    step = system.solve(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (a, b, v)))
    return step.x.numpy(), step.t.numpy()
