"""Multipliers from the point alone: least squares of stationarity over the nearly active constraints.

    min_{nu, lambda >= 0, l >= 0, r >= 0}  | grad f + J_h^T nu + J_g^T lambda - l + r |

The minimum-norm solution serves if its signs are right (Gould et al. 2019, Prop. 4.5); otherwise the
problem with signs is solved.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ddn_solvers.active_set import kink_sides
from ddn_solvers.arrays import Array, Mask
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual

_NEARLY_ACTIVE = 1e-5  # scaled slack within which a constraint may be active
_NEARLY_ON_KINK = 1e-3  # and within which a point may lie on a kink


def least_squares_multipliers(program: Program, bound: Bound, z: Array) -> PrimalDual:
    """Multipliers of a batch of points, kinks included; those of constraints with slack get zero."""
    evaluation = _on_kinks(program, bound, PrimalDual.resting(program, bound.parameters, z))
    near = evaluation.scaled_slack <= _NEARLY_ACTIVE
    near[:, kink_sides(evaluation)] = evaluation.point.pieces == 0
    return _fitted(evaluation, near, np.ones(program.equality.size, dtype=bool))


def with_kink_forces(program: Program, bound: Bound, point: PrimalDual) -> PrimalDual:
    """A batch of points with the forces of the kinks on which they nearly lie, the other multipliers given."""
    if program.pieces is None:
        return point
    evaluation = _on_kinks(program, bound, point)
    near = np.zeros(evaluation.slack.shape, dtype=bool)
    near[:, kink_sides(evaluation)] = evaluation.point.pieces == 0
    return _fitted(evaluation, near, np.zeros(program.equality.size, dtype=bool))


def _on_kinks(program: Program, bound: Bound, point: PrimalDual) -> Evaluation:
    """The point with sigma = 0 wherever it is near a kink."""
    evaluation = Evaluation.at(program, bound, point)
    if program.pieces is None:
        return evaluation
    near = evaluation.scaled_slack[:, kink_sides(evaluation)] <= _NEARLY_ON_KINK
    return Evaluation.at(program, bound, replace(point, pieces=np.where(near, 0.0, point.pieces)))


def _fitted(evaluation: Evaluation, near: Mask, equality: Mask) -> PrimalDual:
    """The point with multipliers of the sides ``near`` and of the rows ``equality`` by least squares."""
    point, program = evaluation.point, evaluation.program
    equalities, q, n = program.equality.size, program.inequality.size, program.variables.size
    y, bounds = point.y.copy(), (point.lower.copy(), point.upper.copy())
    identity, kinks = np.eye(n), near.shape[1] - q - 2 * n
    for i in range(len(point.z)):
        inequality, kink, lower, upper = (
            np.flatnonzero(part) for part in np.split(near[i], [q, q + kinks, q + kinks + n])
        )
        free = np.concatenate([np.flatnonzero(equality), equalities + q + kink])
        signed = equalities + inequality
        columns = np.concatenate(
            [evaluation.jacobian[i, free], evaluation.jacobian[i, signed], -identity[lower], identity[upper]]
        ).T
        solution = _signed_least_squares(columns, -evaluation.stationarity[i], len(free))
        cuts = np.cumsum([len(free), len(inequality), len(lower)])
        y[i, free], y[i, signed], bounds[0][i, lower], bounds[1][i, upper] = np.split(solution, cuts)
    return replace(point, y=y, lower=bounds[0], upper=bounds[1])


def _signed_least_squares(columns: Array, target: Array, free: int) -> Array:
    """min |columns y - target| with y >= 0 from entry ``free`` on."""
    if columns.shape[1] == 0 or not np.isfinite(columns).all() or not np.isfinite(target).all():
        return np.zeros(columns.shape[1])
    norms = np.linalg.norm(columns, axis=0)
    norms[norms == 0] = 1.0
    solution = np.linalg.lstsq(columns / norms, target, rcond=None)[0]
    if (solution[free:] < 0).any():
        from scipy.optimize import lsq_linear  # costs a quarter of a second to import

        lowest = np.where(np.arange(len(solution)) < free, -np.inf, 0.0)
        solution = lsq_linear(columns / norms, target, (lowest, np.inf), method="bvls").x
    result: Array = solution / norms
    return result
