"""SciPy: general nonlinear problems by SLSQP, trust-constr and L-BFGS-B, linear ones by HiGHS.

SciPy's signs against ours, L = f + nu^T h + lambda^T g + l^T (lower - z) + r^T (z - upper):

    SLSQP         L = f - m^T [h; -g]                     nu = -m,  lambda = m;  bounds: none returned
    trust-constr  L = f + v^T [h; g] + v_z^T z            l = max(-v_z, 0),  r = max(v_z, 0)
    highs         marginals d f* / d (b, h, lower, upper) nu, lambda, r are minus them,  l is the same
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    Array,
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

_LINEAR = frozenset({ProblemClass.LP})
_ALL = frozenset(ProblemClass)
_SMOOTH = frozenset({Feature.NONCONVEX, Feature.CALLBACKS, Feature.NONSMOOTH})
_CONSTRAINED = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY})
_VIOLATION = 1e-4  # trust-constr stops with status 2 at an infeasible stationary point, too
_STUCK = 1e-6  # violation at which trust-constr starts again in a larger region
_TOO_MANY = -1  # no status of SciPy's
_NO_DESCENT = 8  # how SLSQP ends when rounding is larger than ftol; a looser one tells whether it has arrived
_CONFIRM = 1e-7
_SPARSE_FROM = 200  # variables; below, trust-constr factorises dense Jacobians, rank-deficient ones too

# No names for a time limit, except HiGHS: an ``Instance`` stops whoever evaluates it.
_SLSQP = Dialect(
    max_iter="maxiter",
    tolerance="ftol",
    time_limit="",
    tight=1e-12,
    defaults={"maxiter": 1000},
    status={0: Status.OPTIMAL, 4: Status.INFEASIBLE, 9: Status.ITERATION_LIMIT},
)
_TRUST_CONSTR = Dialect(
    max_iter="maxiter",
    tolerance="gtol xtol barrier_tol",
    time_limit="",
    tight=1e-9,
    defaults={"xtol": 1e-12, "maxiter": 2000},
    # 2: xtol; 3: stopped by our callback; 4: a last point, judged as any other
    status={0: Status.ITERATION_LIMIT, **dict.fromkeys((1, 2, 3, 4), Status.OPTIMAL)},
)
_LBFGSB = Dialect(
    max_iter="maxiter",
    tolerance="ftol gtol",
    time_limit="",
    tight=1e-9,
    defaults={"ftol": 0.0, "maxiter": 15_000, "maxfun": 100_000, "maxcor": 20, "maxls": 50},
    status={0: Status.OPTIMAL, 1: Status.ITERATION_LIMIT},
)
_HIGHS = Dialect(
    max_iter="maxiter",
    tolerance="primal_feasibility_tolerance dual_feasibility_tolerance",
    time_limit="time_limit",
    tight=1e-9,
    status={0: Status.OPTIMAL, 1: Status.ITERATION_LIMIT, 2: Status.INFEASIBLE, 3: Status.UNBOUNDED},
)


class SciPyAdapter(Adapter):
    """What ``scipy.optimize`` solves, with compiled derivatives."""

    capabilities = Capabilities(
        summary="general nonlinear problems; linear programs by HiGHS",
        package="scipy",
        pip="scipy",
        methods=(
            Method("highs", _LINEAR, _CONSTRAINED, dialect=_HIGHS),
            Method("SLSQP", _ALL, _SMOOTH | _CONSTRAINED, dialect=_SLSQP),
            Method("trust-constr", _ALL, _SMOOTH | _CONSTRAINED, dialect=_TRUST_CONSTR),
            Method("L-BFGS-B", _ALL, _SMOOTH | {Feature.BOUNDS}, duals=False, dialect=_LBFGSB),
            Method("highs-ds", _LINEAR, _CONSTRAINED, dialect=_HIGHS),
            Method("highs-ipm", _LINEAR, _CONSTRAINED, dialect=_HIGHS),
        ),
    )

    def solve(self, instance: Instance) -> Point:
        from scipy.optimize import OptimizeWarning

        run, options = _RUNS.get(instance.method, _highs), self.native(instance)
        with warnings.catch_warnings():  # about steps of the iteration; the result is judged by us
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "(Unknown|Unrecognized) .*options", OptimizeWarning)
            found, multipliers = run(instance, options)
        status = self.dialect(instance.method).status.get(found.status, Status.NUMERICAL_ERROR)
        if status is Status.OPTIMAL and found.get("constr_violation", 0.0) > _VIOLATION:
            status = Status.INFEASIBLE
        if "ime limit" in found.message:  # HiGHS counts it among the iteration limits
            status = Status.TIME_LIMIT
        z = instance.initial if found.x is None else found.x
        return Point(z, status, iterations=found.nit, message=str(found.message), **multipliers)


class _Objective:
    """The objective in units of its own slope and curvature at the start: SciPy's tolerances are absolute."""

    def __init__(self, instance: Instance) -> None:
        self.instance, z = instance, instance.initial
        self._none = np.zeros(instance.program.equality.size), np.zeros(instance.program.inequality.size)
        slope = np.abs(instance.gradient(z)).max(initial=0.0)
        at_start = instance.program.hessian(z, instance.parameters, np.concatenate(self._none))
        curvature = np.abs(at_start).max(initial=0.0)
        unit = float(max(slope, curvature * max(1.0, np.abs(z).max(initial=0.0))))
        self.unit = unit if np.isfinite(unit) and unit > 0 else 1.0

    def value(self, z: Array) -> float:
        return self.instance.objective(z) / self.unit

    def gradient(self, z: Array) -> Array:
        return self.instance.gradient(z) / self.unit

    def hessian(self, z: Array) -> Any:
        return self.instance.hessian(z, *self._none, 1 / self.unit)


def _slsqp(instance: Instance, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from scipy.optimize import Bounds, OptimizeResult, minimize

    m = instance.program.equality.size
    if m > len(instance.initial):  # SciPy 1.17 writes beyond its arrays, and the process dies
        message = "SLSQP takes no more equations than variables"
        return OptimizeResult(x=None, status=_TOO_MANY, nit=0, message=message), {}
    objective = _Objective(instance)
    bounds = Bounds(instance.lower, instance.upper)
    constraints = [
        {"type": "eq", "fun": instance.equality, "jac": lambda z: instance.jacobian(z).toarray()[:m]},
        {
            "type": "ineq",
            "fun": lambda z: -instance.inequality(z),
            "jac": lambda z: -instance.jacobian(z).toarray()[m:],
        },
    ]

    def run(z: Array, options: dict[str, Any]) -> Any:
        return minimize(
            objective.value,
            z,
            jac=objective.gradient,
            method="SLSQP",
            bounds=bounds,
            constraints=constraints,
            options=options,
        )

    found = run(instance.initial, options)
    if found.status == _NO_DESCENT and run(found.x, {**options, "ftol": _CONFIRM, "maxiter": 1}).success:
        found.status = 0
    multipliers = objective.unit * np.asarray(found.multipliers, dtype=float)
    return found, {"equality": -multipliers[:m], "inequality": multipliers[m:]}


def _trust_constr(instance: Instance, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from scipy.optimize import Bounds, NonlinearConstraint, minimize

    m, n, rows = instance.program.equality.size, len(instance.initial), instance.program.constraints
    objective = _Objective(instance)

    def jacobian(z: Array) -> Any:
        sparse = instance.jacobian(z)
        return sparse.toarray() if n < _SPARSE_FROM else sparse

    # Only where there are some: an empty constraint is an error there, and so are infinite bounds alone.
    constraints = []
    if rows:
        low = np.concatenate([np.zeros(m), np.full(rows - m, -np.inf)])
        curvature = lambda z, v: instance.hessian(z, v[:m], v[m:], 0.0)  # noqa: E731  # as the others are handed over
        constraints = [NonlinearConstraint(instance.constraints, low, np.zeros(rows), jacobian, curvature)]
    bounded = np.isfinite(instance.lower).any() or np.isfinite(instance.upper).any()
    # Trial points keep to the bounds, where the start does: beyond them a logarithm may have no value.
    inside = (instance.lower < instance.initial) & (instance.initial < instance.upper)
    # SciPy's own test of gtol ignores complementarity and may end far from the bounds that are active:
    # it is switched off, and made here once the barrier is gone.
    tolerance, barrier = options["gtol"], options["barrier_tol"]

    def finished(intermediate_result: Any) -> bool:
        state = intermediate_result
        small = max(state.optimality, state.constr_violation) <= tolerance
        return bool(small and state.get("barrier_parameter", 0.0) <= barrier)

    def run(options: dict[str, Any]) -> Any:
        return minimize(
            objective.value,
            instance.initial,
            jac=objective.gradient,
            hess=objective.hessian,
            method="trust-constr",
            bounds=Bounds(instance.lower, instance.upper, inside) if bounded else None,
            constraints=constraints,
            callback=finished,
            options={**options, "gtol": 1e-300},
        )

    found = run(options)
    if found.constr_violation > _STUCK:  # the first trust region was too small to get round a corner
        found = run({**options, "initial_tr_radius": 10.0})
    y = objective.unit * np.asarray(found.v[0]) if rows else np.zeros(0)
    forces = objective.unit * np.asarray(found.v[-1]) if bounded else np.zeros(n)
    return found, {"equality": y[:m], "inequality": y[m:], **bound_multipliers(forces)}


def _lbfgsb(instance: Instance, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from scipy.optimize import Bounds, minimize

    objective, bounds = _Objective(instance), Bounds(instance.lower, instance.upper)
    start, gradient = instance.initial, objective.gradient
    return minimize(
        objective.value, start, jac=gradient, method="L-BFGS-B", bounds=bounds, options=options
    ), {}


def _highs(instance: Instance, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from scipy.optimize import linprog

    form, bounds = instance.quadratic(), np.stack([instance.lower, instance.upper], axis=1)
    found = linprog(form.q, form.G, form.h, form.A, form.b, bounds, instance.method, options=options)
    if found.x is None:
        return found, {}
    return found, {
        "equality": -found.eqlin.marginals,
        "inequality": -found.ineqlin.marginals,
        "lower": found.lower.marginals,
        "upper": -found.upper.marginals,
    }


_RUNS: dict[str, Callable[[Instance, dict[str, Any]], tuple[Any, dict[str, Any]]]] = {
    "SLSQP": _slsqp,
    "trust-constr": _trust_constr,
    "L-BFGS-B": _lbfgsb,
}
