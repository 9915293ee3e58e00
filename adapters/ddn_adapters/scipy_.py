"""SciPy: general nonlinear problems by SLSQP, trust-constr and L-BFGS-B, linear ones by HiGHS.

SciPy's signs against ours, L = f + nu^T h + lambda^T g + l^T (lower - z) + r^T (z - upper):

    SLSQP         L = f - m^T [h; -g]                     nu = -m,  lambda = m;  bounds: none returned
    trust-constr  L = f + v^T [h; g] + v_z^T z            l = max(-v_z, 0),  r = max(v_z, 0)
    highs         marginals d f* / d (b, h, lower, upper) nu, lambda, r are minus them,  l is the same
"""

from __future__ import annotations

import difflib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    BackendCannotSolve,
    Capabilities,
    Feature,
    Instance,
    Method,
    Point,
    ProblemClass,
    ProblemError,
    Status,
)

Array = np.ndarray[Any, np.dtype[np.float64]]

_LINEAR = ("highs", "highs-ds", "highs-ipm")
_ALL = frozenset(ProblemClass)
_SMOOTH = frozenset({Feature.NONCONVEX, Feature.CALLBACKS, Feature.NONSMOOTH})
_CONSTRAINED = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY})
_UNBOUNDED = -1e20  # an objective below this is on its way to minus infinity
_VIOLATION = 1e-4  # trust-constr stops with status 2 at an infeasible stationary point, too
_NO_DESCENT = 8  # how SLSQP ends when rounding is larger than ftol; a looser one tells whether it has arrived
_CONFIRM = 1e-7
_SPARSE_FROM = 200  # variables; below, trust-constr factorises dense Jacobians, rank-deficient ones too


@dataclass(frozen=True)
class _Names:
    """What a method calls its options, its defaults here, and what its return codes mean."""

    max_iter: str
    tolerance: tuple[str, ...]
    known: frozenset[str]
    status: Mapping[int, Status]
    defaults: Mapping[str, Any] = field(default_factory=dict)


_SLSQP = _Names(
    "maxiter",
    ("ftol",),
    frozenset({"maxiter", "ftol", "disp", "iprint", "eps", "finite_diff_rel_step"}),
    {0: Status.OPTIMAL, 4: Status.INFEASIBLE, 9: Status.ITERATION_LIMIT},
    {"ftol": 1e-12, "maxiter": 1000},
)
_TRUST_CONSTR = _Names(
    "maxiter",
    ("gtol", "xtol", "barrier_tol"),
    frozenset(
        {"maxiter", "gtol", "xtol", "barrier_tol", "initial_tr_radius", "initial_constr_penalty"}
        | {"initial_barrier_parameter", "initial_barrier_tolerance", "factorization_method"}
        | {"sparse_jacobian", "verbose", "disp"}
    ),
    # 3: stopped by our callback; 4: a last point whose violation _trust_constr looks at
    {0: Status.ITERATION_LIMIT, 1: Status.OPTIMAL, 2: Status.OPTIMAL, 3: Status.OPTIMAL, 4: Status.OPTIMAL},
    {"gtol": 1e-9, "xtol": 1e-12, "barrier_tol": 1e-9, "maxiter": 2000},
)
_LBFGSB = _Names(
    "maxiter",
    ("ftol", "gtol"),
    frozenset({"maxiter", "maxfun", "maxls", "maxcor", "ftol", "gtol", "eps"}),
    {0: Status.OPTIMAL, 1: Status.ITERATION_LIMIT},
    {"ftol": 0.0, "gtol": 1e-9, "maxiter": 15_000, "maxfun": 100_000, "maxcor": 20, "maxls": 50},
)
_HIGHS = _Names(
    "maxiter",
    ("primal_feasibility_tolerance", "dual_feasibility_tolerance"),
    frozenset({"maxiter", "time_limit", "disp", "presolve", "primal_feasibility_tolerance"})
    | frozenset({"dual_feasibility_tolerance", "ipm_optimality_tolerance"})
    | frozenset({"simplex_dual_edge_weight_strategy"}),
    {
        0: Status.OPTIMAL,
        1: Status.ITERATION_LIMIT,
        2: Status.INFEASIBLE,
        3: Status.UNBOUNDED,
        4: Status.NUMERICAL_ERROR,
    },
    {"primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9},
)
_NAMES = {
    "SLSQP": _SLSQP,
    "trust-constr": _TRUST_CONSTR,
    "L-BFGS-B": _LBFGSB,
    "highs": _HIGHS,
    "highs-ds": _HIGHS,
    "highs-ipm": _HIGHS,
}


class SciPyAdapter(Adapter):
    """What ``scipy.optimize`` solves, with compiled derivatives."""

    capabilities = Capabilities(
        summary="general nonlinear problems; linear programs by HiGHS",
        package="scipy",
        pip="scipy",
        methods=(
            Method("highs", frozenset({ProblemClass.LP}), _CONSTRAINED),
            Method("SLSQP", _ALL, _SMOOTH | _CONSTRAINED),
            Method("trust-constr", _ALL, _SMOOTH | _CONSTRAINED),
            Method("L-BFGS-B", _ALL, _SMOOTH | {Feature.BOUNDS}, duals=False),
            Method("highs-ds", frozenset({ProblemClass.LP}), _CONSTRAINED),
            Method("highs-ipm", frozenset({ProblemClass.LP}), _CONSTRAINED),
        ),
    )

    def solve(self, instance: Instance) -> Point:
        _refuse(self.method(instance.method), instance)
        options = _native(_NAMES[instance.method], instance)
        evaluator = _Evaluator(instance)
        try:
            with warnings.catch_warnings():  # about steps of the iteration; the result is judged by us
                warnings.simplefilter("ignore")
                point = _RUNS[instance.method](instance, evaluator, options)
        except _OutOfTime:
            return Point(evaluator.z, Status.TIME_LIMIT, message="time limit reached")
        except Exception as error:
            if "KeyboardInterrupt" in str(error):  # Ctrl-C inside a callback comes wrapped
                raise KeyboardInterrupt from error
            return Point(evaluator.z, Status.BACKEND_ERROR, message=f"{type(error).__name__}: {error}")
        if not np.isfinite(point.primal).all():
            worse = Status.NUMERICAL_ERROR if point.status is Status.OPTIMAL else point.status
            return replace(point, status=worse)
        return point


class _OutOfTime(Exception):
    """Raised where the functions are evaluated, the one place that every method comes back to."""


class _Evaluator:
    """f, c and their derivatives at the last z: the methods ask for them one by one at the same z.

    The objective is handed over in units of its own slope and curvature at the start, ``unit``: SciPy's
    tolerances are absolute.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance, self.program = instance, instance.program
        start = instance.initial if instance.warm_start is None else instance.warm_start.primal
        # Newton-like methods of SciPy do not move a start that lies outside the bounds.
        self.z: Array = np.clip(start, instance.lower, instance.upper)
        self._first: Any = None
        self._deadline = np.inf
        self.unit = 1.0
        if instance.method not in _LINEAR:
            size = max(1.0, float(np.abs(self.z).max(initial=0.0)))
            slope = np.abs(self.gradient(self.z)).max(initial=0.0)
            curvature = np.abs(self.hessian(self.z, np.zeros(self.program.constraints), 1.0).data)
            unit = max(slope, curvature.max(initial=0.0) * size)
            self.unit = float(unit) if np.isfinite(unit) and unit > 0 else 1.0
        if instance.options.time_limit is not None:
            self._deadline = time.monotonic() + instance.options.time_limit

    def first(self, z: Array) -> Any:
        if self._first is None or not np.array_equal(z, self.z):
            if time.monotonic() > self._deadline:
                raise _OutOfTime
            self._first = self.program.first_order(z, self.instance.parameters)
            self.z = z.copy()
        return self._first

    def objective(self, z: Array) -> float:
        return float(self.first(z).objective[0]) / self.unit

    def gradient(self, z: Array) -> Array:
        gradient: Array = self.first(z).gradient[0] / self.unit
        return gradient

    def constraints(self, z: Array) -> Array:
        constraints: Array = self.first(z).constraints[0]
        return constraints

    def jacobian(self, z: Array) -> Array:
        jacobian: Array = self.program.jacobian_pattern.dense(self.first(z).jacobian)[0]
        return jacobian

    def sparse_jacobian(self, z: Array) -> Any:
        return self.program.jacobian_pattern.matrix(self.first(z).jacobian[0])

    def hessian(self, z: Array, weights: Array, objective: float) -> Any:
        nonzeros = self.program.hessian(z, self.instance.parameters, weights, objective / self.unit)[0]
        return self.program.hessian_pattern.matrix(nonzeros)


def _slsqp(instance: Instance, at: _Evaluator, options: dict[str, Any]) -> Point:
    from scipy.optimize import Bounds, minimize

    m = instance.program.equality.size
    rows = (("eq", slice(None, m), 1.0), ("ineq", slice(m, None), -1.0))

    def constraint(kind: str, part: slice, sign: float) -> dict[str, Any]:
        return {
            "type": kind,
            "fun": lambda z: sign * at.constraints(z)[part],
            "jac": lambda z: sign * at.jacobian(z)[part],
        }

    def run(z: Array, options: dict[str, Any]) -> Any:
        return minimize(
            at.objective,
            z,
            jac=at.gradient,
            method="SLSQP",
            bounds=Bounds(instance.lower, instance.upper),
            constraints=[constraint(*row) for row in rows],
            options=options,
        )

    found = run(at.z, options)
    if found.status == _NO_DESCENT and run(found.x, {**options, "ftol": _CONFIRM, "maxiter": 1}).success:
        found.status = 0
    multipliers = at.unit * np.asarray(found.multipliers, dtype=float)
    return _point(instance, found, equality=-multipliers[:m], inequality=multipliers[m:])


def _trust_constr(instance: Instance, at: _Evaluator, options: dict[str, Any]) -> Point:
    from scipy.optimize import Bounds, NonlinearConstraint, minimize

    program = instance.program
    m, n, rows = program.equality.size, len(instance.initial), program.constraints
    # Only where there are some: an empty constraint is an error there, and so are infinite bounds alone.
    constraints = []
    if rows:
        low = np.concatenate([np.zeros(m), np.full(rows - m, -np.inf)])
        jacobian = at.jacobian if n < _SPARSE_FROM else at.sparse_jacobian
        constraints.append(
            NonlinearConstraint(
                at.constraints, low, np.zeros(rows), jacobian, lambda z, v: at.hessian(z, v, 0.0)
            )
        )
    bounded = np.isfinite(instance.lower).any() or np.isfinite(instance.upper).any()
    # Trial points keep to the bounds, where the start does: beyond them a logarithm may have no value.
    inside = (instance.lower < at.z) & (at.z < instance.upper)
    # SciPy's own test of gtol ignores complementarity and may end far from the bounds that are active:
    # it is switched off, and made here once the barrier is gone.
    tolerance, barrier = options["gtol"], options["barrier_tol"]
    options["gtol"] = 1e-300

    def finished(intermediate_result: Any) -> bool:
        state = intermediate_result
        small = max(state.optimality, state.constr_violation) <= tolerance
        return bool(small and state.get("barrier_parameter", 0.0) <= barrier)

    found = minimize(
        at.objective,
        at.z,
        jac=at.gradient,
        hess=lambda z: at.hessian(z, np.zeros(rows), 1.0),
        method="trust-constr",
        bounds=Bounds(instance.lower, instance.upper, inside) if bounded else None,
        constraints=constraints,
        callback=finished,
        options=options,
    )
    y = at.unit * np.asarray(found.v[0]) if rows else np.zeros(0)
    forces = at.unit * np.asarray(found.v[-1]) if bounded else np.zeros(n)
    point = _point(
        instance,
        found,
        equality=y[:m],
        inequality=np.maximum(y[m:], 0),
        lower=np.maximum(-forces, 0),
        upper=np.maximum(forces, 0),
    )
    infeasible = point.status is Status.OPTIMAL and found.constr_violation > _VIOLATION
    return replace(point, status=Status.INFEASIBLE) if infeasible else point


def _lbfgsb(instance: Instance, at: _Evaluator, options: dict[str, Any]) -> Point:
    from scipy.optimize import Bounds, minimize

    bounds = Bounds(instance.lower, instance.upper)
    found = minimize(at.objective, at.z, jac=at.gradient, method="L-BFGS-B", bounds=bounds, options=options)
    return _point(instance, found, equality=np.zeros(0), inequality=np.zeros(0))


def _highs(instance: Instance, at: _Evaluator, options: dict[str, Any]) -> Point:
    from scipy.optimize import linprog

    form = instance.quadratic()
    if instance.options.time_limit is not None:
        options["time_limit"] = instance.options.time_limit
    found = linprog(
        form.q,
        A_ub=form.G,
        b_ub=form.h,
        A_eq=form.A,
        b_eq=form.b,
        bounds=np.stack([instance.lower, instance.upper], axis=1),
        method=instance.method,
        options=options,
    )
    if found.x is None:
        return replace(_point(instance, found), primal=np.full(len(form.q), np.nan))
    return _point(
        instance,
        found,
        equality=-found.eqlin.marginals,
        inequality=np.maximum(-found.ineqlin.marginals, 0),
        lower=np.maximum(found.lower.marginals, 0),
        upper=np.maximum(-found.upper.marginals, 0),
    )


_RUNS: dict[str, Callable[[Instance, _Evaluator, dict[str, Any]], Point]] = {
    "SLSQP": _slsqp,
    "trust-constr": _trust_constr,
    "L-BFGS-B": _lbfgsb,
    **dict.fromkeys(("highs", "highs-ds", "highs-ipm"), _highs),
}


def _point(instance: Instance, found: Any, **multipliers: Array) -> Point:
    status = _NAMES[instance.method].status.get(found.status, Status.NUMERICAL_ERROR)
    if found.fun is not None and found.fun < _UNBOUNDED:
        status = Status.UNBOUNDED
    if "ime limit" in found.message:  # HiGHS counts it among the iteration limits
        status = Status.TIME_LIMIT
    return Point(found.x, status, iterations=found.nit, message=str(found.message), **multipliers)


def _native(names: _Names, instance: Instance) -> dict[str, Any]:
    """The method's own options: our defaults, the common ones, the native ones, in that order."""
    options, common = dict(names.defaults), instance.options
    if common.max_iter is not None:
        options[names.max_iter] = common.max_iter
    if common.tolerance is not None:
        options.update(dict.fromkeys(names.tolerance, common.tolerance))
    for name in common.native:
        if name not in names.known:
            near = difflib.get_close_matches(name, names.known) or sorted(names.known)
            raise ProblemError(
                f"option {name!r} is unknown to scipy:{instance.method}", expected=f"one of {', '.join(near)}"
            )
    return {**options, **common.native}


def _refuse(method: Method | None, instance: Instance) -> None:
    """Raise where the method lacks what the problem needs."""
    assert method is not None
    program = instance.program
    lacking = [feature.value for feature in program.features - method.features]
    if program.problem_class not in method.classes:
        lacking.append(f"problems of class {program.problem_class.value}")
    if lacking:
        raise BackendCannotSolve(
            f"scipy:{method.name} does not take {', '.join(sorted(lacking))}; scipy:SLSQP does"
        )
