"""DAQP itself: dense quadratic programs by a dual active-set method (Arnstrom, Bemporad and Axehill 2022).

    minimise  1/2 z^T P z + q^T z   subject to   A z = b,   G z <= h,   lower <= z <= upper

The same solver is in CasADi; called directly it takes a third of the time.
"""

from __future__ import annotations

from typing import Any

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
    ProblemClass,
    Status,
    bound_multipliers,
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

    def solve_all(self, batch: Batch) -> list[Point]:
        """The coefficients of all samples at once, then one after the other."""
        import daqp

        program, given = batch.program, batch.coefficients
        settings = self.native(batch)
        P = np.ascontiguousarray(program.hessian_pattern.dense(given.hessian))
        J = np.ascontiguousarray(program.jacobian_pattern.dense(given.jacobian))
        m, n = program.equality.size, program.variables.size
        upper = np.concatenate([batch.upper, -given.constraints], axis=1)
        lower = np.concatenate([batch.lower, -given.constraints], axis=1)
        lower[:, n + m :] = -np.inf
        lower, upper = np.maximum(lower, -1e30), np.minimum(upper, 1e30)  # what it takes for none
        kinds = np.zeros(lower.shape[1], dtype=np.int32)
        kinds[n : n + m] = _EQUALITY
        fixed = np.where(batch.lower == batch.upper, _EQUALITY, 0).astype(np.int32)
        points = []
        for i in range(len(batch)):
            late = batch.given_up(i)
            if late is not None:
                points.append(late)
                continue
            sense = kinds.copy()
            sense[:n] = fixed[i]
            # Of an LP it moves by proximal steps, whose length is absolute.
            steepest = np.abs(given.gradient[i]).max(initial=0.0)
            unit = float(steepest) if steepest > 0 and np.isfinite(steepest) and not P[i].any() else 1.0
            start = self._start(batch.warm_start[i] if batch.warm_start else None, unit)
            found = daqp.solve(
                P[i], given.gradient[i] / unit, J[i], upper[i], lower[i], sense, **settings, **start
            )
            points.append(self._point(found, m, n, batch.initial[i], unit))
        return points

    def _start(self, warm: Point | None, unit: float) -> dict[str, Array]:
        parts = None if warm is None else (warm.lower, warm.upper, warm.equality, warm.inequality)
        if warm is None or parts is None or any(part is None for part in parts):
            return {}
        lower, upper, equality, inequality = parts
        return {"dual_start": np.concatenate([upper - lower, equality, inequality]) / unit}  # type: ignore[operator]  # none is None

    def _point(self, found: tuple[Any, ...], m: int, n: int, initial: Array, unit: float) -> Point:
        z, _, flag, info = found
        multipliers, finite = unit * np.asarray(info["lam"], dtype=float), np.isfinite(z).all()
        return Point(
            np.asarray(z, dtype=float) if finite else initial,
            _STATUS.get(int(flag), Status.NUMERICAL_ERROR) if finite else Status.NUMERICAL_ERROR,
            equality=multipliers[n : n + m],
            inequality=multipliers[n + m :],
            iterations=int(info["iterations"]),
            message=f"daqp: {int(flag)}",
            **bound_multipliers(multipliers[:n]),
        )
