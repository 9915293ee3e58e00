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
) -> Mask:
    """Regular samples whose KKT matrix is another at points as good as these: what its inverse says is then chance.

    So it is at the minimum of u^4, or where two circles touch. K^-1 (K' - K) is estimated along the direction that K^-1
    enlarges most, K' being the matrix farther off than the solution can be by the ``predicted`` step; only where the
    curvature of some variable, or K as a whole, gives reason to.
    """
    found = np.zeros(len(singular), dtype=bool)
    if evaluation.program.quadratic:
        return found
    curved = evaluation.H.absolute.times(evaluation.own_size) * evaluation.own_size
    curved = np.where(active.fixed | (curved == 0), np.inf, curved)
    flat = curved.min(axis=1, initial=np.inf) < _FAINT * evaluation.force[:, 0]
    flat |= active.n <= _FEW  # all of them may be flat at once, with nothing to compare them with
    solved = computable(evaluation) & (evaluation.scaled_feasibility <= policy.accuracy) & ~singular
    doubtful = np.flatnonzero((flat | (condition > 1 / _FAINT)) & solved)
    if not doubtful.size:
        return found
    here = evaluation.take(doubtful)
    sign = np.sign(without_symmetry(active.n))
    far = np.clip(_FARTHER * predicted[doubtful], _EXACT, policy.accuracy)[:, None]
    way = np.where(active.fixed[doubtful], 0.0, here.size * here.narrowing * sign)
    moved = replace(here.point, z=here.point.z + far * way)
    there = here.at_known(moved, Evaluation.at(here.program, here.bound, moved).first)
    system = kkt_system(here, active.take(doubtful), linear_solver=policy.linear_solver)
    n, force, reach = active.n, here.force, here.reach
    v, vector = np.zeros_like(here.size), without_symmetry(n + reach.shape[1])
    x, t = _solved(system, vector[:n] * force / here.size, vector[n:] * reach, v)
    a = there.H.times(x) - here.H.times(x) + there.J.transposed_times(t) - here.J.transposed_times(t)
    change = _solved(system, a, there.J.times(x) - here.J.times(x), v)
    before, after = (
        np.abs(np.concatenate([x / here.size, t * reach / force], axis=1)).max(axis=1)
        for x, t in ((x, t), change)
    )
    found[doubtful] = after > _OTHER * before
    return found


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
