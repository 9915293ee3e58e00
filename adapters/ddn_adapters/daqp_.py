"""DAQP itself: dense quadratic programs by a dual active-set method (Arnstrom, Bemporad and Axehill 2022).

    minimise  1/2 z^T P z + q^T z   subject to   A z = b,   G z <= h,   lower <= z <= upper

The same solver is in CasADi; called directly it takes a third of the time.
"""

from __future__ import annotations

import numpy as np

from ddn_solvers.adapter import (
    Array,
    Batch,
    BatchAdapter,
    Capabilities,
    Dialect,
    Feature,
    Method,
    Point,
    Points,
    ProblemClass,
    Status,
)

_STATUS = {
    1: Status.OPTIMAL,
    -1: Status.INFEASIBLE,
    -2: Status.NUMERICAL_ERROR,  # cycles
    -3: Status.UNBOUNDED,
    -4: Status.ITERATION_LIMIT,
    -5: Status.NUMERICAL_ERROR,  # not convex
    -6: Status.INFEASIBLE,  # more active constraints than variables
    -7: Status.TIME_LIMIT,
}
# It would pass over others.
_SETTINGS = (
    "primal_tol dual_tol zero_tol pivot_tol progress_tol cycle_tol iter_limit fval_bound eps_prox eta_prox rho_soft "
    "rel_subopt abs_subopt sing_tol refactor_tol time_limit"
)
_EQUALITY = 5  # how DAQP marks one


class DAQPAdapter(BatchAdapter):
    """One method, batch or not."""

    capabilities = Capabilities(
        summary="small dense QPs by an active-set method, without CasADi between",
        package="daqp",
        pip="daqp",
        methods=(
            Method(
                "active-set",
                frozenset({ProblemClass.LP, ProblemClass.QP}),
                frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY}),
                dialect=Dialect(
                    max_iter="iter_limit",
                    tolerance="primal_tol dual_tol",
                    time_limit="time_limit",
                    # Negative: proximal-point iterations where the Hessian is singular, and only there.
                    defaults={"primal_tol": 1e-9, "eps_prox": -1e-6, "eta_prox": 1e-10},
                    accepts=_SETTINGS,
                    status=_STATUS,
                ),
            ),
        ),
    )

    def solve_all(self, batch: Batch) -> Points:
        """The coefficients of all samples at once, then one after the other."""
        import daqp

        program, given = batch.program, batch.coefficients
        settings = self.native(batch)
        P = np.ascontiguousarray(program.hessian_pattern.dense(given.hessian))
        J = np.ascontiguousarray(program.jacobian_pattern.dense(given.jacobian))
        m, n = program.equality.size, program.variables.size if program.bounded else 0
        upper = np.concatenate([batch.upper[:, :n], -given.constraints], axis=1)
        lower = np.concatenate([batch.lower[:, :n], -given.constraints], axis=1)
        lower[:, n + m :] = -np.inf
        lower, upper = np.maximum(lower, -1e30), np.minimum(upper, 1e30)  # what it takes for none
        sense = np.zeros(lower.shape, dtype=np.int32)
        sense[:, :n] = np.where(batch.lower == batch.upper, _EQUALITY, 0)[:, :n]
        sense[:, n : n + m] = _EQUALITY
        # Of an LP it moves by proximal steps, whose length is absolute.
        steepest, linear = np.abs(given.gradient).max(axis=1, initial=0.0), ~given.hessian.any(axis=1)
        unit = np.where(linear & (steepest > 0) & np.isfinite(steepest), steepest, 1.0)
        slopes, forces = given.gradient / unit[:, None], np.zeros(lower.shape)
        points, seen = Points.at(program, batch.initial, Status.BACKEND_ERROR), []
        for i in range(len(batch)):
            late = batch.given_up(i)
            if late is not None:
                points.put(i, late)
                continue
            start = _start(batch.warm_start[i], m + n, unit[i]) if batch.warm_start else {}
            z, _, flag, info = daqp.solve(
                P[i], slopes[i], J[i], upper[i], lower[i], sense[i], **settings, **start
            )
            points.primal[i], forces[i] = z, info["lam"]
            points.status[i] = _STATUS.get(int(flag), Status.NUMERICAL_ERROR)
            points.iterations[i], points.message[i] = int(info["iterations"]), f"daqp: {int(flag)}"
            seen.append(i)
        forces *= unit[:, None]
        points.put_forces(seen, *np.split(forces[seen], [n, n + m], axis=1))
        return points


def _start(warm: Point | None, leading: int, unit: float) -> dict[str, Array]:
    """The multipliers of an earlier solution, if all are there: of bounds, where there are any, then of rows."""
    parts = None if warm is None else (warm.lower, warm.upper, warm.equality, warm.inequality)
    if parts is None or any(part is None for part in parts):
        return {}
    lower, upper, equality, inequality = parts
    bounds = (upper - lower)[: leading - len(equality)]  # type: ignore[operator, arg-type]  # none is None
    return {"dual_start": np.concatenate([bounds, equality, inequality]) / unit}
