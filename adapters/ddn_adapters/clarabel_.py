"""Clarabel itself: sparse convex quadratic programs by an interior point method (Goulart and Chen 2024).

    minimise  1/2 z^T P z + q^T z   subject to   M z + s = r,   s = 0 in the first rows,  s >= 0 in the others

with rows [h; fixed variables] and [g; upper bounds; lower bounds], and L = f + y^T (M z + s - r). CVXPY
calls it too, with more to do for each sample (measured in docs/performance.md).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
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
    ProblemError,
    Status,
    bound_multipliers,
)

_STATUS = {
    "Solved": Status.OPTIMAL,
    "AlmostSolved": Status.OPTIMAL,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.ITERATION_LIMIT,
    "MaxTime": Status.TIME_LIMIT,
}
_SETTINGS = (
    "max_iter time_limit verbose max_step_fraction tol_gap_abs tol_gap_rel tol_feas tol_infeas_abs tol_infeas_rel tol_ktratio "
    "reduced_tol_gap_abs reduced_tol_gap_rel reduced_tol_feas reduced_tol_infeas_abs reduced_tol_infeas_rel "
    "reduced_tol_ktratio equilibrate_enable equilibrate_max_iter equilibrate_min_scaling equilibrate_max_scaling "
    "linesearch_backtrack_step min_switch_step_length min_terminate_step_length max_threads direct_solve_method "
    "static_regularization_enable static_regularization_constant static_regularization_proportional "
    "dynamic_regularization_enable dynamic_regularization_eps dynamic_regularization_delta "
    "iterative_refinement_enable iterative_refinement_reltol iterative_refinement_abstol "
    "iterative_refinement_max_iter iterative_refinement_stop_ratio presolve_enable"
)


class ClarabelAdapter(BatchAdapter):
    """One method."""

    capabilities = Capabilities(
        summary="sparse convex QPs by an interior point method, without CVXPY between",
        package="clarabel",
        pip="clarabel",
        methods=(
            Method(
                "interior-point",
                frozenset({ProblemClass.LP, ProblemClass.QP}),
                frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY}),
                dialect=Dialect(
                    max_iter="max_iter",
                    tolerance="tol_gap_abs tol_gap_rel tol_feas",
                    time_limit="time_limit",
                    tight=1e-9,
                    accepts=_SETTINGS,
                    status=_STATUS,
                ),
            ),
        ),
    )

    def solve_all(self, batch: Batch) -> list[Point]:
        """The coefficients of all samples at once, then one after the other."""
        settings, given, points = self._settings(batch), batch.coefficients, []
        pattern, frame = batch.program.hessian_pattern, None
        upper = pattern.indices <= pattern.columns  # of P's nonzeros
        counts = np.bincount(pattern.columns[upper], minlength=pattern.shape[1])
        triangle = pattern.indices[upper], np.concatenate([[0], np.cumsum(counts)])
        for i in range(len(batch)):
            late = batch.given_up(i)
            if late is not None:
                points.append(late)
                continue
            if frame is None or not frame.serves(batch.lower[i], batch.upper[i]):
                frame = _Frame.of(batch, batch.lower[i], batch.upper[i])
            P = given.hessian[i][upper], *triangle
            M = frame.matrix(given.jacobian[i])
            right = frame.right(-given.constraints[i], batch.lower[i], batch.upper[i])
            points.append(_solved(P, given.gradient[i], M, right, frame, settings, batch.initial[i]))
        return points

    def _settings(self, batch: Batch) -> Any:
        import clarabel

        settings = clarabel.DefaultSettings()
        settings.verbose = False
        for name, value in self.native(batch).items():
            try:
                setattr(settings, name, value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ProblemError(f"option {name!r} cannot be set: {error}", got=repr(value)) from error
        return settings


@dataclass(frozen=True)
class _Frame:
    """Where the nonzeros of M lie, for samples that have the same bounds finite and the same variables fixed.

    Attributes:
        order: Of [nonzeros of J, ones of fixed variables and upper bounds, minus ones of lower ones], by column.
        rows, indptr: Of M.
        place: Of each row of c, of fixed variables, of upper and of lower bounds among the rows of M.
        fixed, above, below: Variables that are fixed, have an upper or a lower bound, (n,) bool.
        equalities: Rows in which s = 0.
    """

    order: Any
    rows: Any
    indptr: Any
    place: tuple[Any, ...]
    fixed: Any
    above: Any
    below: Any
    equalities: int

    @staticmethod
    def of(batch: Batch, lower: Array, upper: Array) -> _Frame:
        J, m = batch.program.jacobian_pattern, batch.program.equality.size
        fixed, above, below = _kinds(lower, upper)
        counts = (m, fixed.sum(), J.shape[0] - m, above.sum(), below.sum())
        starts = np.concatenate([[0], np.cumsum(counts)])
        of_h, of_fixed, of_g, of_upper, of_lower = (
            np.arange(start, stop) for start, stop in itertools.pairwise(starts)
        )
        of_c = np.concatenate([of_h, of_g])
        rows = np.concatenate([of_c[J.indices], of_fixed, of_upper, of_lower])
        columns = np.concatenate([J.columns, *(np.flatnonzero(kind) for kind in (fixed, above, below))])
        order = np.lexsort((rows, columns))
        indptr = np.searchsorted(columns[order], np.arange(J.shape[1] + 1))
        place = of_c, of_fixed, of_upper, of_lower
        return _Frame(order, rows[order], indptr, place, fixed, above, below, int(starts[2]))

    def serves(self, lower: Array, upper: Array) -> bool:
        known = (self.fixed, self.above, self.below)
        return all(np.array_equal(a, b) for a, b in zip(_kinds(lower, upper), known, strict=True))

    def matrix(self, jacobian: Array) -> tuple[Any, Any, Any]:
        signs = np.ones(sum(len(rows) for rows in self.place[1:]))
        signs[len(signs) - len(self.place[3]) :] = -1.0
        return np.concatenate([jacobian, signs])[self.order], self.rows, self.indptr

    def right(self, c: Array, lower: Array, upper: Array) -> Array:
        r = np.empty(sum(len(rows) for rows in self.place))
        r[self.place[0]], r[self.place[1]] = c, lower[self.fixed]
        r[self.place[2]], r[self.place[3]] = upper[self.above], -lower[self.below]
        return r

    def multipliers(self, y: Array) -> dict[str, Any]:
        """Those of a ``Point``."""
        of_c, of_fixed, of_upper, of_lower = (y[rows] for rows in self.place)
        forces = np.zeros(len(self.fixed))
        forces[self.fixed] = of_fixed
        found = bound_multipliers(forces)
        found["upper"][self.above] = of_upper
        found["lower"][self.below] = of_lower
        m = self.equalities - len(of_fixed)
        return {"equality": of_c[:m], "inequality": of_c[m:], **found}


def _kinds(lower: Array, upper: Array) -> tuple[Any, Any, Any]:
    """Which variables are fixed, have an upper, and a lower bound."""
    fixed = lower == upper
    return fixed, np.isfinite(upper) & ~fixed, np.isfinite(lower) & ~fixed


def _solved(
    P: tuple[Any, ...], q: Array, M: tuple[Any, ...], r: Array, frame: _Frame, settings: Any, initial: Array
) -> Point:
    import clarabel
    import scipy.sparse as sp

    n, zero = len(q), frame.equalities
    cones = [clarabel.ZeroConeT(zero), clarabel.NonnegativeConeT(len(r) - zero)]
    triangle, rows = sp.csc_matrix(P, shape=(n, n)), sp.csc_matrix(M, shape=(len(r), n))
    for matrix in (triangle, rows):
        matrix.eliminate_zeros()  # a dense parameter may be mostly zero, and the factorization looks at the pattern
    found = clarabel.DefaultSolver(triangle, q, rows, r, cones, settings).solve()
    said = str(found.status)
    status, z = _STATUS.get(said, Status.NUMERICAL_ERROR), np.array(found.x, dtype=float)
    if status in (Status.INFEASIBLE, Status.UNBOUNDED) or not np.isfinite(z).all():  # z is a certificate
        return Point(initial, status, iterations=found.iterations, message=said)
    return Point(z, status, iterations=found.iterations, message=said, **frame.multipliers(np.array(found.z)))
