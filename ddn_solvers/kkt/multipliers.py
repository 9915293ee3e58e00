"""Multipliers from the point alone: least squares of stationarity over the nearly active constraints.

    min_{nu, lambda >= 0, l >= 0, r >= 0}  | grad f + J_h^T nu + J_g^T lambda - l + r |

The minimum-norm solution serves if its signs are right (Gould et al. 2019, Prop. 4.5); otherwise the
problem with signs is solved.
"""

from __future__ import annotations

import numpy as np

from ddn_solvers.arrays import Array
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual

_NEARLY_ACTIVE = 1e-5  # scaled slack within which a constraint may be active


def least_squares_multipliers(program: Program, bound: Bound, z: Array) -> PrimalDual:
    """Multipliers of a batch of points; those of constraints with slack get zero."""
    batch, n = z.shape
    zero = PrimalDual(z, np.zeros((batch, program.constraints)), np.zeros_like(z), np.zeros_like(z))
    evaluation = Evaluation.at(program, bound, zero)
    near = evaluation.scaled_slack <= _NEARLY_ACTIVE
    for i in range(batch):
        equalities, q = program.equality.size, program.inequality.size
        free = np.arange(equalities)
        inequality, lower, upper = (np.flatnonzero(part) for part in np.split(near[i], [q, q + n]))
        identity = np.eye(n)
        columns = np.concatenate(
            [
                evaluation.jacobian[i, free],
                evaluation.jacobian[i, equalities + inequality],
                -identity[lower],
                identity[upper],
            ]
        ).T
        solution = _signed_least_squares(columns, -evaluation.first.gradient[i], len(free))
        cuts = np.cumsum([len(free), len(inequality), len(lower)])
        nu, lam, left, right = np.split(solution, cuts)
        zero.y[i, free], zero.y[i, equalities + inequality] = nu, lam
        zero.lower[i, lower], zero.upper[i, upper] = left, right
    return zero


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
