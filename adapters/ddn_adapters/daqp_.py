"""DAQP itself: dense quadratic programs by a dual active-set method (Arnstrom, Bemporad and Axehill 2022).

    minimise  1/2 z^T P z + q^T z   subject to   A z = b,   G z <= h,   lower <= z <= upper

The same solver is in CasADi; called directly it takes a third of the time.

It begins by factoring P and multiplying all rows by the factor, which for larger problems takes most of its time: LAPACK
does that several times faster, and leaves it a problem of least distance (``LeastDistance``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ddn_solvers.adapter import (
    Array,
    Batch,
    BatchAdapter,
    Capabilities,
    Dialect,
    Feature,
    LeastDistance,
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
_TOO_MANY = -6  # that one
# It would pass over others.
_SETTINGS = (
    "primal_tol dual_tol zero_tol pivot_tol progress_tol cycle_tol iter_limit fval_bound eps_prox eta_prox rho_soft "
    "rel_subopt abs_subopt sing_tol refactor_tol time_limit"
)
_EQUALITY = 5  # how DAQP marks one
_NONE = 1e30  # a side from which on it takes it for none
_LARGE = 250  # variables from which the problem of least distance pays: a seventh there, a third at 400

_Found = tuple[Array, Array, int, int]  # z, multipliers of [bounds; rows], DAQP's word, iterations


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
        program, given = batch.program, batch.coefficients
        settings = self.native(batch)
        P = np.ascontiguousarray(program.hessian_pattern.dense(given.hessian))
        J = np.ascontiguousarray(program.jacobian_pattern.dense(given.jacobian))
        m, n = program.equality.size, program.variables.size if program.bounded else 0
        upper = np.concatenate([batch.upper[:, :n], -given.constraints], axis=1)
        lower = np.concatenate([batch.lower[:, :n], -given.constraints], axis=1)
        lower[:, n + m :] = -np.inf
        lower, upper = np.maximum(lower, -_NONE), np.minimum(upper, _NONE)
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
            start = _start(batch.warm_start[i], m + n, unit[i]) if batch.warm_start else None
            qp = _QP(P[i], slopes[i], J[i], lower[i], upper[i], sense[i], start)
            found = qp.solved_by_distance(settings) if P.shape[1] >= _LARGE else None
            z, lam, flag, iterations = found or qp.solved(settings)
            if flag == _TOO_MANY:  # what it returns then is what was in memory
                z, lam = batch.initial[i], np.full(len(lam), np.nan)
            points.primal[i], forces[i] = z, lam
            points.status[i] = _STATUS.get(flag, Status.NUMERICAL_ERROR)
            points.iterations[i], points.message[i] = iterations, f"daqp: {flag}"
            seen.append(i)
        forces *= unit[:, None]
        points.put_forces(seen, *np.split(forces[seen], [n, n + m], axis=1))
        return points


def _start(warm: Point | None, leading: int, unit: float) -> Array | None:
    """The multipliers of an earlier solution, if all are there: of bounds, where there are any, then of rows."""
    parts = None if warm is None else (warm.lower, warm.upper, warm.equality, warm.inequality)
    if parts is None or any(part is None for part in parts):
        return None
    lower, upper, equality, inequality = parts
    bounds = (upper - lower)[: leading - len(equality)]  # type: ignore[operator, arg-type]  # none is None
    start: Array = np.concatenate([bounds, equality, inequality]) / unit
    return start


class _QP(NamedTuple):
    """One sample: bounds, where there are any, come before the rows of J; P and q are ``None`` for |z|^2 / 2."""

    P: Array | None
    q: Array | None
    J: Array
    lower: Array
    upper: Array
    sense: Any
    start: Array | None

    def solved(self, settings: Mapping[str, Any]) -> _Found:
        import daqp

        P, q, J, lower, upper, sense, start = self
        given = {} if start is None else {"dual_start": start}
        z, _, flag, info = daqp.solve(P, q, J, upper, lower, sense, **settings, **given)
        return z, np.asarray(info["lam"]), int(flag), int(info["iterations"])

    def solved_by_distance(self, settings: Mapping[str, Any]) -> _Found | None:
        """The same by a problem of least distance; ``None`` where P or the rows are not clearly regular."""
        P, q, J, lower, upper, sense, start = self
        assert P is not None
        assert q is not None
        equal, bounds = sense == _EQUALITY, len(lower) - len(J)
        free = ~equal & ((lower > -_NONE) | (upper < _NONE))
        rows = np.concatenate([np.eye(bounds, len(q)), J])
        least = LeastDistance.of(P, q, rows, upper, equal, free) if free.any() else None
        if least is None:
            return None
        below, above = (
            np.where(np.abs(side[free]) < _NONE, least.side(side[free]), side[free])
            for side in (lower, upper)
        )
        start = None if start is None else least.start(start[free])
        left = _QP(None, None, least.rows, below, above, sense[free], start)
        d, forces, flag, iterations = left.solved(settings)
        lam = np.zeros(len(lower))
        z, lam[equal], lam[free] = least.solution(d, forces)
        return z, lam, flag, iterations
