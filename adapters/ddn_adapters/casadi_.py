"""CasADi: IPOPT and an SQP method for anything smooth, active-set and splitting solvers for QPs.

CasADi's signs are L = f + lam_g^T g(x) + lam_x^T x with lam >= 0 at upper and lam <= 0 at lower limits:

    [nu; lambda] = lam_g  (h: 0 <= h <= 0,  g: -inf <= g <= 0),    l = max(-lam_x, 0),   r = max(lam_x, 0)

CasADi's plugins load on first use, and only those named here: some others crash beside each other.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    BackendCannotSolve,
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

if TYPE_CHECKING:
    from ddn_solvers.program import Program

Array = np.ndarray[Any, np.dtype[np.float64]]

_NONLINEAR = frozenset(ProblemClass)
_QUADRATIC = frozenset({ProblemClass.LP, ProblemClass.QP})
_CONSTRAINED = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY})
_SMOOTH = _CONSTRAINED | {Feature.NONCONVEX, Feature.CALLBACKS, Feature.NONSMOOTH}
_SOLVED = 1e-6  # relative KKT residual above which a sample of a map is solved again to learn its status
_INFINITE = 1e10  # an entry beyond this is a ray that was followed, whatever the solver says
# Of every CasADi function; what a plugin adds to them, it lists itself.
_COMMON = frozenset(
    {"expand", "jit", "compiler", "jit_options", "verbose", "print_time", "record_time", "calc_multipliers"}
    | {"iteration_callback", "iteration_callback_step", "iteration_callback_ignore_errors", "bound_consistency"}
    | {"min_lam", "oracle_options", "common_options", "specific_options", "show_eval_warnings", "error_on_fail"}
    | {"warn_initial_bounds", "discrete", "inputs_check", "regularity_check", "monitor", "max_num_threads"}
)


@dataclass(frozen=True)
class _Plugin:
    """One CasADi plugin as data; a dotted option is one of the solver behind it.

    Attributes:
        status: Its ``return_status`` to ours; anything else is a numerical error.
        time_limit: ``None``: cannot be interrupted, bounded by its iterations alone.
        warm: Options for a solve that starts from an earlier solution.
    """

    max_iter: str
    tolerance: tuple[str, ...]
    time_limit: str | None
    status: Mapping[str, Status]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    warm: Mapping[str, Any] = field(default_factory=dict)


# Multipliers of the parameters are ours to compute, and callbacks do not offer what they take.
_NLP = {"print_time": False, "show_eval_warnings": False, "error_on_fail": False, "calc_lam_p": False}
_CONIC = {"error_on_fail": False, "print_time": False}
_NLP_STATUS = {
    "Solve_Succeeded": Status.OPTIMAL,
    "Solved_To_Acceptable_Level": Status.OPTIMAL,
    "Feasible_Point_Found": Status.OPTIMAL,
    "Infeasible_Problem_Detected": Status.INFEASIBLE,
    "Diverging_Iterates": Status.UNBOUNDED,
    "Maximum_Iterations_Exceeded": Status.ITERATION_LIMIT,
    "Maximum_CpuTime_Exceeded": Status.TIME_LIMIT,
    "Maximum_WallTime_Exceeded": Status.TIME_LIMIT,
    "Invalid_Problem_Definition": Status.BACKEND_ERROR,
    "Unrecoverable_Exception": Status.BACKEND_ERROR,
    "NonIpopt_Exception_Thrown": Status.BACKEND_ERROR,
    "Insufficient_Memory": Status.BACKEND_ERROR,
    "Internal_Error": Status.BACKEND_ERROR,
}
_PLUGINS = {
    "ipopt": _Plugin(
        "ipopt.max_iter",
        ("ipopt.tol", "ipopt.constr_viol_tol"),
        "ipopt.max_wall_time",
        _NLP_STATUS,
        {
            **_NLP,
            "ipopt.print_level": 0,
            "ipopt.sb": "yes",
            "ipopt.tol": 1e-9,
            "ipopt.constr_viol_tol": 1e-9,
            "ipopt.bound_relax_factor": 0.0,  # else the point lies outside its bounds by 1e-8
        },
        {
            "ipopt.warm_start_init_point": "yes",
            "ipopt.mu_init": 1e-7,
            "ipopt.warm_start_bound_push": 1e-9,
            "ipopt.warm_start_bound_frac": 1e-9,
            "ipopt.warm_start_slack_bound_push": 1e-9,
            "ipopt.warm_start_slack_bound_frac": 1e-9,
            "ipopt.warm_start_mult_bound_push": 1e-9,
        },
    ),
    "sqpmethod": _Plugin(
        "max_iter",
        ("tol_pr", "tol_du"),
        "iteration_callback",
        {**_NLP_STATUS, "User_Requested_Stop": Status.TIME_LIMIT},
        {
            **_NLP,
            "print_header": False,
            "print_iteration": False,
            "print_status": False,
            "max_iter": 200,
            "tol_pr": 1e-9,
            "tol_du": 1e-9,
            # daqp needs a convex QP; clipping leaves a convex Hessian as it is, so that Newton stays Newton.
            "qpsol": "daqp",
            "qpsol_options.error_on_fail": False,
            "convexify_strategy": "eigen-clip",
        },
    ),
    "daqp": _Plugin(
        "daqp.iter_limit",
        ("daqp.primal_tol", "daqp.dual_tol"),
        None,
        {"1": Status.OPTIMAL, "2": Status.OPTIMAL, "-1": Status.INFEASIBLE, "-3": Status.UNBOUNDED}
        | {"-4": Status.ITERATION_LIMIT, "-7": Status.TIME_LIMIT},
        # Proximal-point iterations take singular Hessians (an LP's is zero) and cost a regular one nothing.
        {**_CONIC, "daqp.primal_tol": 1e-9, "daqp.eps_prox": 1e-6, "daqp.eta_prox": 1e-10},
    ),
    "qpoases": _Plugin(
        "nWSR",
        ("terminationTolerance",),
        "CPUtime",
        {
            "Successful return.": Status.OPTIMAL,
            "Initial QP could not be solved due to infeasibility!": Status.INFEASIBLE,
            "Initial QP could not be solved due to unboundedness!": Status.UNBOUNDED,
            "Maximum number of working set recalculations performed.": Status.ITERATION_LIMIT,
        },
        {**_CONIC, "printLevel": "none"},
    ),
    "osqp": _Plugin(
        "osqp.max_iter",
        ("osqp.eps_abs", "osqp.eps_rel"),
        "osqp.time_limit",
        {
            "solved": Status.OPTIMAL,
            "solved inaccurate": Status.OPTIMAL,
            "primal infeasible": Status.INFEASIBLE,
            "primal infeasible inaccurate": Status.INFEASIBLE,
            "dual infeasible": Status.UNBOUNDED,
            "dual infeasible inaccurate": Status.UNBOUNDED,
            "maximum iterations reached": Status.ITERATION_LIMIT,
            "run time limit reached": Status.TIME_LIMIT,
        },
        {**_CONIC, "osqp.verbose": False, "osqp.eps_abs": 1e-9, "osqp.eps_rel": 1e-9, "osqp.max_iter": 100_000},
    ),
    "qrqp": _Plugin(
        "max_iter",
        ("constr_viol_tol", "dual_inf_tol"),
        None,
        {"success": Status.OPTIMAL, "Maximum number of iterations reached": Status.ITERATION_LIMIT},
        # Its iterations are dense and may cycle: minutes at the default limit of 1000 and some 100 variables.
        {**_CONIC, "print_iter": False, "print_header": False, "print_info": False, "max_iter": 300},
    ),
}


class CasADiAdapter(Adapter):
    """What CasADi's ``nlpsol`` and ``conic`` solve, on the compiled functions themselves."""

    capabilities = Capabilities(
        summary="nonlinear problems by IPOPT; batches of QPs in compiled code",
        package="casadi",
        pip="casadi",
        methods=(
            Method("daqp", _QUADRATIC, _CONSTRAINED),
            Method("ipopt", _NONLINEAR, _SMOOTH),
            Method("sqpmethod", _NONLINEAR, _SMOOTH),
            Method("qpoases", _QUADRATIC, _CONSTRAINED),
            Method("osqp", _QUADRATIC, _CONSTRAINED),
            Method("qrqp", _QUADRATIC, _CONSTRAINED),
        ),
    )

    def solve(self, instance: Instance) -> Point:
        _refuse(self.method(instance.method), instance.program)
        if instance.method in ("ipopt", "sqpmethod"):
            return _guarded(_Nonlinear.of, instance)
        ...
