"""HiGHS itself: linear programs by the simplex method and an interior point method (Huangfu and Hall 2018).

    minimise  q^T z + constant   subject to   row_lower <= J z <= row_upper,   lower <= z <= upper

HiGHS's duals are d f* / d (side of a row or variable): nu, lambda and r are minus them, l is the same. SciPy has the same
solver, with more to do for each sample (measured in docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ddn_solvers.adapter import (
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
    "kOptimal": Status.OPTIMAL,
    "kInfeasible": Status.INFEASIBLE,
    "kUnbounded": Status.UNBOUNDED,
    "kIterationLimit": Status.ITERATION_LIMIT,
    "kTimeLimit": Status.TIME_LIMIT,
    "kModelEmpty": Status.OPTIMAL,
}
_DIALECT = Dialect(
    max_iter="simplex_iteration_limit ipm_iteration_limit",
    tolerance="primal_feasibility_tolerance dual_feasibility_tolerance",
    time_limit="time_limit",
    tight=1e-9,
    status=_STATUS,
)
_METHODS = {"highs": "choose", "highs-ds": "simplex", "highs-ipm": "ipm"}
_FEATURES = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY})


class HiGHSAdapter(BatchAdapter):
    """The methods are called as in SciPy; each gives a vertex."""

    capabilities = Capabilities(
        summary="linear programs, without SciPy between",
        package="highspy",
        pip="highspy",
        methods=tuple(
            Method(name, frozenset({ProblemClass.LP}), _FEATURES, dialect=_DIALECT) for name in _METHODS
        ),
    )

    def where(self, name: str) -> str:
        return f"highs:{name}"

    def solve_all(self, batch: Batch) -> list[Point]:
        """The coefficients of all samples at once, then one after the other."""
        import highspy

        options = {"solver": _METHODS[batch.method], **self.native(batch)}
        pattern, m, given = batch.program.jacobian_pattern, batch.program.equality.size, batch.coefficients
        model = highspy.HighsLp()
        model.num_row_, model.num_col_ = pattern.shape
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_, model.a_matrix_.index_ = pattern.indptr, pattern.indices
        points = []
        for i in range(len(batch)):
            late = batch.given_up(i)
            if late is not None:
                points.append(late)
                continue
            c = given.constraints[i]
            model.col_cost_, model.a_matrix_.value_ = given.gradient[i], given.jacobian[i]
            model.col_lower_, model.col_upper_ = batch.lower[i], batch.upper[i]
            model.row_upper_ = -c
            model.row_lower_ = np.where(np.arange(len(c)) < m, -c, -np.inf)
            points.append(_solved(model, options, m, batch.initial[i]))
        return points


def _solved(model: Any, options: dict[str, Any], m: int, initial: Any) -> Point:
    import highspy

    solver = highspy.Highs.__new__(highspy.Highs)
    super(highspy.Highs, solver).__init__()  # without the callbacks of its own, whose set-up prints a banner
    solver.setOptionValue("output_flag", False)
    for name, value in options.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise ProblemError(
                f"option {name!r} is not one that highs accepts with this value", got=repr(value)
            )
    solver.passModel(model)
    solver.run()
    undecided = highspy.HighsModelStatus.kUnboundedOrInfeasible
    if solver.getModelStatus() == undecided:  # not without presolve
        solver.setOptionValue("presolve", "off")
        solver.run()
    said, info, found = solver.getModelStatus().name, solver.getInfo(), solver.getSolution()
    steps = max(info.simplex_iteration_count, info.ipm_iteration_count, 0)
    status, z = _STATUS.get(said, Status.NUMERICAL_ERROR), np.array(found.col_value, dtype=float)
    if len(z) != len(initial) or not np.isfinite(z).all():
        return Point(initial, status, iterations=steps, message=said)
    rows, sides = (np.array(duals, dtype=float) for duals in (found.row_dual, found.col_dual))
    if not found.dual_valid:
        return Point(z, status, iterations=steps, message=said)
    return Point(z, status, -rows[:m], -rows[m:], iterations=steps, message=said, **bound_multipliers(-sides))
