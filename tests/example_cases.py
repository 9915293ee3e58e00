"""Examples as modules, and the solvers to run them on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import ddn_solvers as ddn
from ddn_solvers.program import compile_program
from ddn_solvers.registry import able

EXAMPLES = Path(__file__).parent.parent / "examples"
# One or two methods a backend are what the time allows.
METHODS = {"scipy:SLSQP", "scipy:trust-constr", "cvxpy:CLARABEL", "casadi:ipopt", "casadi:daqp"}


def example(name: str) -> Any:
    """An example, such as ``"demo"`` or ``"tutorials/circle"``; they import what is beside them, as scripts do."""
    path = EXAMPLES / name
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.name)


def cases(problem: ddn.Problem, convex: bool = True) -> list[str]:
    """Solvers of an example; what is not convex, CVXPY refuses when it sees the functions."""
    found = sorted(METHODS & set(able(compile_program(problem))))
    found = [name for name in found if convex or not name.startswith("cvxpy")]
    assert {name.split(":")[0] for name in found} == {"scipy", "casadi"} | ({"cvxpy"} if convex else set())
    return ["auto", *found]
