"""CVXPY: convex problems, canonicalised once, by any solver that CVXPY knows and that is installed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    BackendCannotSolve,
    BackendNotInstalled,
    Capabilities,
    Dialect,
    Feature,
    Instance,
    Method,
    Point,
    ProblemClass,
    Status,
    bound_multipliers,
)

if TYPE_CHECKING:
    from ddn_solvers.lowering.to_cvxpy import Model
    from ddn_solvers.program import Program

_QUADRATIC = frozenset({ProblemClass.LP, ProblemClass.QP})
_CONVEX = frozenset(ProblemClass)
_FEATURES = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY, Feature.NONSMOOTH})
_STATUS = {
    "optimal": Status.OPTIMAL,
    "optimal_inaccurate": Status.OPTIMAL,  # our own residuals decide whether it is accurate enough
    "infeasible": Status.INFEASIBLE,
    "infeasible_inaccurate": Status.INFEASIBLE,
    "infeasible_or_unbounded": Status.INFEASIBLE,
    "unbounded": Status.UNBOUNDED,
    "unbounded_inaccurate": Status.UNBOUNDED,
    "user_limit": Status.ITERATION_LIMIT,
}
# SCS calls any point so at which its iterations are over.
_INEXACT = {**_STATUS, "optimal_inaccurate": Status.ITERATION_LIMIT}
_SLOW = "CVXPY canonicalises at every call: parameters multiply each other in "


def _dialect(max_iter: str, tolerance: str, time_limit: str | None, **more: Any) -> Dialect:
    return Dialect(max_iter, tolerance, time_limit, **{"tight": 1e-9, **more}, status=_STATUS)


_DIALECTS = {
    "CLARABEL": _dialect(
        "max_iter",
        "tol_gap_abs tol_gap_rel tol_feas",
        "time_limit",
        # Where 1e-10 is out of reach, its last point is still the best there is; we verify it anyway.
        tight=1e-10,
        defaults={"max_iter": 500, "accept_unknown": True},
    ),
    "OSQP": _dialect(
        "max_iter", "eps_abs eps_rel", "time_limit", defaults={"max_iter": 100_000, "polishing": True}
    ),
    "SCS": _dialect("max_iters", "eps_abs eps_rel", "time_limit_secs", defaults={"max_iters": 100_000}),
    "HIGHS": _dialect(
        "simplex_iteration_limit ipm_iteration_limit qp_iteration_limit",
        "primal_feasibility_tolerance dual_feasibility_tolerance",
        "time_limit",
        # Its active-set method for QPs may go round in circles.
        defaults={"qp_iteration_limit": 100_000},
    ),
    "PIQP": _dialect("max_iter", "eps_abs eps_rel", None),
    "PROXQP": _dialect("max_iter", "eps_abs eps_rel", None),
    "QPALM": _dialect("max_iter", "eps_abs eps_rel", "time_limit"),
    "DAQP": _dialect("iter_limit", "primal_tol dual_tol", None, tight=None),
    "ECOS": _dialect("max_iters", "abstol reltol feastol", None, tight=None),
    "CVXOPT": _dialect("max_iters", "abstol reltol feastol", None, tight=None),
    "GUROBI": _dialect(
        "BarIterLimit IterationLimit", "FeasibilityTol OptimalityTol", "TimeLimit", tight=None
    ),
}


def _method(name: str, classes: frozenset[ProblemClass], package: str | None = None) -> Method:
    dialect = _DIALECTS.get(name, Dialect(status=_STATUS))
    return Method(name, classes, _FEATURES, kinks=True, package=package, pip=package, dialect=dialect)


class CVXPYAdapter(Adapter):
    """Certified convexity; cones, quadratic and linear programs."""

    capabilities = Capabilities(
        summary="convex problems, certified by DCP; canonicalised once",
        package="cvxpy",
        pip="cvxpy",
        methods=(
            _method("CLARABEL", _CONVEX, "clarabel"),
            _method("OSQP", _QUADRATIC, "osqp"),
            _method("HIGHS", _QUADRATIC, "highspy"),
            _method("SCS", _CONVEX, "scs"),
        ),
    )

    def method(self, name: str) -> Method | None:
        """A listed method, or any other solver that CVXPY knows.

        Raises:
            BackendNotInstalled: CVXPY knows the solver, and its package is missing.
        """
        listed = super().method(name)
        if listed is not None:
            return listed
        import cvxpy as cp
        from cvxpy.reductions.solvers import defines

        conic = defines.SOLVER_MAP_CONIC.get(name)
        if conic is None and name not in defines.SOLVER_MAP_QP:
            return None
        if name not in cp.installed_solvers():
            raise BackendNotInstalled(f"CVXPY's solver {name} is not installed: pip install 'cvxpy[{name}]'")
        if name in defines.SOLVER_MAP_QP:
            return _method(name, _QUADRATIC)
        takes_cones = cp.SOC in conic.SUPPORTED_CONSTRAINTS
        return _method(name, _CONVEX if takes_cones else frozenset({ProblemClass.LP}))

    def refusal(self, program: Program) -> str:
        if not program.traced:
            return ""  # as its methods tell
        from ddn_solvers.lowering.to_cvxpy import convexity

        found = program.memo("convexity", lambda: convexity(program))
        return found.reason if found.excluded else ""

    def solve(self, instance: Instance) -> Point:
        import cvxpy as cp

        from ddn_solvers.lowering.to_cvxpy import Models

        if instance.method == "HIGHS":
            _take_banner()
        program, options = instance.program, self.native(instance)
        models = program.memo("cvxpy", lambda: Models(program))
        with models.lock:
            model = models.find(instance.parameters, instance.lower, instance.upper)
            problem = model.problem(instance.method)
            model.z.value = instance.initial
            try:
                data, chain, inverse = problem.get_problem_data(
                    instance.method, ignore_dpp=bool(model.fallback), solver_opts=options
                )
            except cp.SolverError as error:
                raise BackendCannotSolve(
                    f"{instance.method} does not take this problem's cones: {error}. 'cvxpy:CLARABEL' does."
                ) from error
            warm = instance.warm_start is not None
            raw = chain.solve_via_data(problem, data, warm_start=warm, solver_opts=dict(options))
            return _point(model, instance, chain.invert(raw, inverse))


@functools.cache
def _take_banner() -> None:
    """HiGHS prints its version once a process, when CVXPY has not yet told it to be silent: here to no console."""
    import highspy

    solver = highspy.Highs.__new__(highspy.Highs)
    super(highspy.Highs, solver).__init__()  # without its callbacks, whose set-up prints
    solver.setOptionValue("log_to_console", False)
    solver.run()


def _point(model: Model, instance: Instance, found: Any) -> Point:
    """What CVXPY found, by our names; the multipliers of its ``== 0`` and ``<= 0`` have our signs."""
    limits = instance.options
    status = (_INEXACT if instance.method == "SCS" else _STATUS).get(found.status, Status.NUMERICAL_ERROR)
    if status is Status.ITERATION_LIMIT and limits.max_iter is None and limits.time_limit:
        status = Status.TIME_LIMIT
    primal = found.primal_vars.get(model.z.id) if found.primal_vars else None
    iterations = found.attr.get("num_iters")
    return Point(
        instance.initial if primal is None else np.ravel(primal),
        status,
        **_multipliers(model, found.dual_vars or {}),
        iterations=None if iterations is None else int(iterations),
        message=f"{instance.method}: {found.status}",
        fallback=_SLOW + ", ".join(model.fallback) if model.fallback else "",
    )


def _multipliers(model: Model, found: Mapping[int, Any]) -> dict[str, Any]:
    """By field of ``Point``; nothing if the solver left any out."""
    constraints: dict[Any, Any] = {**model.constraints, **model.at_bounds}
    duals: dict[Any, Any] = {key: found.get(constraint.id) for key, constraint in constraints.items()}
    if any(dual is None for dual in duals.values()):
        return {}
    rows: dict[str, Any] = {"equality": [np.zeros(0)], "inequality": [np.zeros(0)]}
    for kind, name in model.constraints:
        rows[kind].append(np.ravel(duals[kind, name]))
    forces = np.zeros(model.z.size)  # of z - value = 0: its sign says which bound it leans on
    forces[list(model.bounds.fixed)] = np.ravel(duals.get("fixed", 0.0))
    sides = bound_multipliers(forces)
    for side in sides:
        sides[side][list(getattr(model.bounds, side))] = np.ravel(duals.get(side, 0.0))
    return {kind: np.concatenate(parts) for kind, parts in rows.items()} | sides
