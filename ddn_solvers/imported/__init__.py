"""Problems written for CVXPY or CasADi, taken over: their functions become torch functions."""

from ddn_solvers.imported.casadi_problem import from_casadi
from ddn_solvers.imported.cvxpy_problem import from_cvxpy

__all__ = ["from_casadi", "from_cvxpy"]
