"""CVXPY: convex problems, canonicalised once, by any solver that CVXPY knows and that is installed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    BackendCannotSolve,
    BackendNotInstalled,
    Batch,
    Capabilities,
    Feature,
    Instance,
    Method,
    Options,
    Point,
    ProblemClass,
    ProblemError,
    Status,
)
from ddn_solvers.errors import FallbackWarning

if TYPE_CHECKING:
    from ddn_solvers.lowering.to_cvxpy import Model

_QUADRATIC = frozenset({ProblemClass.LP, ProblemClass.QP})
_CONVEX = frozenset(ProblemClass)
_FEATURES = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY, Feature.NONSMOOTH})


@dataclass(frozen=True)
class _Names:
    """What a solver calls the options that every backend has, and what it is given by default."""

    tolerance: tuple[str, ...] = ()
    max_iter: tuple[str, ...] = ()
    time_limit: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


_NAMES = {
    "CLARABEL": _Names(
        ("tol_gap_abs", "tol_gap_rel", "tol_feas"),
        ("max_iter",),
        "time_limit",
        # Where 1e-10 is out of reach, its last point is still the best there is; we verify it anyway.
        {
            "tol_gap_abs": 1e-10,
            "tol_gap_rel": 1e-10,
            "tol_feas": 1e-10,
            "max_iter": 500,
            "accept_unknown": True,
        },
    ),
    "OSQP": _Names(
        ("eps_abs", "eps_rel"),
        ("max_iter",),
        "time_limit",
        {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "polishing": True},
    ),
    "SCS": _Names(
        ("eps_abs", "eps_rel"),
        ("max_iters",),
        "time_limit_secs",
        {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 100_000},
    ),
    "HIGHS": _Names(
        ("primal_feasibility_tolerance", "dual_feasibility_tolerance"),
        ("simplex_iteration_limit", "ipm_iteration_limit", "qp_iteration_limit"),
        "time_limit",
        {"primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9},
    ),
    "PIQP": _Names(("eps_abs", "eps_rel"), ("max_iter",), "", {"eps_abs": 1e-9, "eps_rel": 1e-9}),
    "PROXQP": _Names(("eps_abs", "eps_rel"), ("max_iter",), "", {"eps_abs": 1e-9, "eps_rel": 1e-9}),
    "QPALM": _Names(("eps_abs", "eps_rel"), ("max_iter",), "time_limit", {"eps_abs": 1e-9, "eps_rel": 1e-9}),
    "DAQP": _Names(("primal_tol", "dual_tol"), ("iter_limit",), "", {}),
    "ECOS": _Names(("abstol", "reltol", "feastol"), ("max_iters",), "", {}),
    "CVXOPT": _Names(("abstol", "reltol", "feastol"), ("max_iters",), "", {}),
    "GUROBI": _Names(
        ("FeasibilityTol", "OptimalityTol"), ("BarIterLimit", "IterationLimit"), "TimeLimit", {}
    ),
}
_STATUS = {
    "optimal": Status.OPTIMAL,
    "optimal_inaccurate": Status.OPTIMAL,  # our own residuals decide whether it is accurate enough
    "infeasible": Status.INFEASIBLE,
    "infeasible_inaccurate": Status.INFEASIBLE,
    "infeasible_or_unbounded": Status.INFEASIBLE,
    "unbounded": Status.UNBOUNDED,
    "unbounded_inaccurate": Status.UNBOUNDED,
    "user_limit": Status.ITERATION_LIMIT,
    "solver_error": Status.NUMERICAL_ERROR,
}
# Where the package is not called as the solver is.
_PIP = {
    "CBC": "cylp",
    "COPT": "coptpy",
    "CUOPT": "cuopt-cu12",
    "ECOS_BB": "ecos",
    "GLOP": "ortools",
    "GLPK": "cvxopt",
    "GLPK_MI": "cvxopt",
    "GUROBI": "gurobipy",
    "NAG": "naginterfaces",
    "PDLP": "ortools",
    "PROXQP": "proxsuite",
    "SCIP": "pyscipopt",
    "SDPA": "sdpa-python",
}


class CVXPYAdapter(Adapter):
    """Certified convexity; cones, quadratic and linear programs."""

    capabilities = Capabilities(
        summary="convex problems, certified by DCP; canonicalised once",
        package="cvxpy",
        pip="cvxpy",
        methods=(
            Method("CLARABEL", _CONVEX, _FEATURES, package="clarabel", pip="clarabel"),
            Method("OSQP", _QUADRATIC, _FEATURES, package="osqp", pip="osqp"),
            Method("HIGHS", _QUADRATIC, _FEATURES, package="highspy", pip="highspy"),
            Method("SCS", _CONVEX, _FEATURES, package="scs", pip="scs"),
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
            pip = _PIP.get(name, name.lower())
            raise BackendNotInstalled(f"CVXPY's solver {name} is not installed: pip install {pip}")
        if name in defines.SOLVER_MAP_QP:
            return Method(name, _QUADRATIC, _FEATURES)
        takes_cones = cp.SOC in conic.SUPPORTED_CONSTRAINTS
        return Method(name, _CONVEX if takes_cones else frozenset({ProblemClass.LP}), _FEATURES)

    def solve(self, instance: Instance) -> Point:
        point, fallback = self._solve(instance)
        self._warn(fallback)
        return point

    def solve_batch(self, batch: Batch) -> list[Point]:
        results = [self._solve(batch[i]) for i in range(len(batch))]
        self._warn(next((fallback for _, fallback in results if fallback), []))
        return [point for point, _ in results]

    @staticmethod
    def _warn(fallback: list[str]) -> None:
        if fallback:
            message = (
                f"CVXPY canonicalises at every call: parameters multiply each other in {', '.join(fallback)}"
            )
            warnings.warn(message, FallbackWarning, stacklevel=3)

    def _solve(self, instance: Instance) -> tuple[Point, list[str]]:
        """The point, and the functions for whose sake the problem was canonicalised again."""
        from ddn_solvers.lowering.to_cvxpy import Models

        program = instance.program
        if not program.traced:
            raise BackendCannotSolve(
                f"CVXPY needs expressions, and the functions are torch callbacks ({program.refusal}). "
                "A nonlinear backend such as 'casadi:ipopt' or 'scipy:SLSQP' takes them."
            )
        options = _native(instance.method, instance.options)
        models = program.memo("cvxpy", lambda: Models(program))
        with models.lock:
            try:
                model = models.find(instance.parameters, instance.lower, instance.upper)
            except FloatingPointError as error:
                return _failure(instance, Status.NUMERICAL_ERROR, str(error)), []
            return self._run(model, instance, options), model.fallback

    def _run(self, model: Model, instance: Instance, options: dict[str, Any]) -> Point:
        import cvxpy as cp

        problem = model.problem(instance.method)
        warm = instance.warm_start is not None
        model.z.value = instance.warm_start.primal if instance.warm_start is not None else instance.initial
        try:
            data, chain, inverse = problem.get_problem_data(
                instance.method, ignore_dpp=bool(model.fallback), solver_opts=options
            )
        except cp.SolverError as error:
            raise BackendCannotSolve(
                f"{instance.method} does not take this problem's cones: {error}. 'cvxpy:CLARABEL' does."
            ) from error
        try:
            raw = chain.solve_via_data(problem, data, warm_start=warm, solver_opts=dict(options))
            found = chain.invert(raw, inverse)
        except Exception as error:
            unknown = [name for name in instance.options.native if name in str(error)]
            if unknown:
                raise ProblemError(
                    f"option {unknown[0]!r} is not one that cvxpy:{instance.method} accepts", got=str(error)
                ) from error
            return _failure(instance, Status.BACKEND_ERROR, f"{type(error).__name__}: {error}")
        return _point(model, instance, found)


def _native(method: str, options: Options) -> dict[str, Any]:
    """The solver's own options, from its defaults, our common ones and the native ones, in that order."""
    names = _NAMES.get(method, _Names())
    native = dict(names.defaults)
    for common, own in (
        ("tolerance", names.tolerance),
        ("max_iter", names.max_iter),
        ("time_limit", (names.time_limit,) if names.time_limit else ()),
    ):
        value = getattr(options, common)
        if value is not None and not own:
            raise ProblemError(
                f"cvxpy:{method} has no option for {common!r} that we know", fix="Use a native one."
            )
        if value is not None:
            native.update(dict.fromkeys(own, value))
    return {**native, **options.native}


def _failure(instance: Instance, status: Status, message: str) -> Point:
    return Point(np.full(len(instance.initial), np.nan), status, message=message)


def _point(model: Model, instance: Instance, found: Any) -> Point:
    """What CVXPY found, by our names; the multipliers of its ``== 0`` and ``<= 0`` have our signs."""
    status = _STATUS.get(found.status, Status.BACKEND_ERROR)
    if status is Status.ITERATION_LIMIT and instance.options.max_iter is None and instance.options.time_limit:
        status = Status.TIME_LIMIT
    message = f"{instance.method}: {found.status}"
    primal = found.primal_vars.get(model.z.id) if found.primal_vars else None
    if primal is None:
        return _failure(instance, status, message)
    iterations = found.attr.get("num_iters")
    return Point(
        np.ravel(primal),
        status,
        **_multipliers(model, instance, found.dual_vars or {}),
        iterations=None if iterations is None else int(iterations),
        message=message,
    )


def _multipliers(model: Model, instance: Instance, found: Mapping[int, Any]) -> dict[str, Any]:
    """By field of ``Point``; nothing if the solver left any out."""
    by_name: dict[tuple[str, str], Any] = {
        key: found.get(constraint.id) for key, constraint in model.constraints.items()
    }
    at_bounds: dict[str, Any] = {
        side: found.get(constraint.id) for side, constraint in model.at_bounds.items()
    }
    if any(dual is None for dual in (*by_name.values(), *at_bounds.values())):
        return {}
    multipliers = {}
    for kind in ("equality", "inequality"):
        parts = [np.ravel(dual) for (of, _), dual in by_name.items() if of == kind]
        multipliers[kind] = np.concatenate([np.zeros(0), *parts])
    n, bounds = len(instance.initial), model.bounds
    lower, upper = np.zeros(n), np.zeros(n)
    lower[list(bounds.lower)] = np.ravel(at_bounds.get("lower", 0.0))
    upper[list(bounds.upper)] = np.ravel(at_bounds.get("upper", 0.0))
    fixed = np.ravel(at_bounds.get("fixed", 0.0))  # of z - value = 0: its sign says which bound it leans on
    lower[list(bounds.fixed)], upper[list(bounds.fixed)] = np.maximum(-fixed, 0.0), np.maximum(fixed, 0.0)
    # An interior point method may leave a multiplier of an inactive row below zero by rounding.
    return {
        "equality": multipliers["equality"],
        "inequality": np.maximum(multipliers["inequality"], 0.0),
        "lower": np.maximum(lower, 0.0),
        "upper": np.maximum(upper, 0.0),
    }
