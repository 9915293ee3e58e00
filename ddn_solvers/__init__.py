"""Optimization problems as PyTorch layers: written once, solved by any backend, exact gradients.

y(x) = argmin_u f(u, x)   subject to   h(u, x) = 0,  g(u, x) <= 0,  lower(x) <= u <= upper(x)
"""

from ddn_solvers.certificate import Certificate
from ddn_solvers.errors import (
    BackendCannotSolve,
    BackendNotFound,
    BackendNotInstalled,
    ConvergenceWarning,
    DDNError,
    DDNWarning,
    DegeneracyWarning,
    FallbackWarning,
    ProblemError,
    SensitivityError,
    SolveError,
    TraceError,
)
from ddn_solvers.explain import Compiled, compile
from ddn_solvers.forms import least_squares, linear_program, quadratic_program
from ddn_solvers.imported import from_casadi, from_cvxpy
from ddn_solvers.layer import DeclarativeLayer
from ddn_solvers.policy import Policy
from ddn_solvers.problem import Problem
from ddn_solvers.registry import backends, register
from ddn_solvers.sensitivity import Sensitivity, attach, sensitivity
from ddn_solvers.solution import Solution, Status
from ddn_solvers.solve import solve

__version__ = "0.1.0"
__all__ = [
    "BackendCannotSolve",
    "BackendNotFound",
    "BackendNotInstalled",
    "Certificate",
    "Compiled",
    "ConvergenceWarning",
    "DDNError",
    "DDNWarning",
    "DeclarativeLayer",
    "DegeneracyWarning",
    "FallbackWarning",
    "Policy",
    "Problem",
    "ProblemError",
    "Sensitivity",
    "SensitivityError",
    "Solution",
    "SolveError",
    "Status",
    "TraceError",
    "attach",
    "backends",
    "compile",
    "from_casadi",
    "from_cvxpy",
    "least_squares",
    "linear_program",
    "quadratic_program",
    "register",
    "sensitivity",
    "solve",
]
