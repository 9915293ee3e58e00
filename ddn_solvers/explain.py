"""What the library makes of a problem, in a few lines a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddn_solvers import registry
from ddn_solvers.adapter import ProblemClass
from ddn_solvers.lowering.pattern import Pattern
from ddn_solvers.problem import Problem, as_problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.routing import routes
from ddn_solvers.solve import warn_if_callbacks

_SHAPES = {0: "constant", 1: "affine", 2: "quadratic", None: "nonlinear"}


@dataclass(frozen=True)
class Compiled:
    """A compiled problem.

    Attributes:
        program: Its evaluators and structure, as adapters see them.
    """

    program: Program

    @property
    def problem_class(self) -> ProblemClass:
        return self.program.problem_class

    def explain(self) -> str:
        """Print, and return, what is known of the problem: class, convexity, sparsity, captures, backends."""
        program = self.program
        able = registry.able(program)
        tried = [r for r in routes("auto", program) if not r.adapter.refusal(program)] if able else []
        auto = ", then ".join(map(str, tried)) or "none"
        captured = ", ".join(a.name for a in program.graph.captures) or "nothing that is an input"
        lines = [
            ("class", f"{program.problem_class.value}: {self._why()}"),
            ("convexity", _convexity(program)),
            (
                "size",
                f"{program.variables.size} variables, {program.equality.size} equalities, "
                f"{program.inequality.size} inequalities",
            ),
            (
                "sparsity",
                f"Jacobian {_density(program.jacobian_pattern)}; Hessian {_density(program.hessian_pattern)}",
            ),
            ("kinks", _kinks(program)),
            ("captured", captured),
            (
                "evaluation",
                "compiled" if program.compiled else f"torch callbacks, because of {program.refusal}",
            ),
            ("backends", ", ".join(able) or "none that is installed"),
            ("auto", auto),
        ]
        text = "\n".join(f"{name:<11} {value}" for name, value in lines)
        print(text)  # noqa: T201  # printing is what it is for
        return text

    def _why(self) -> str:
        parts = []
        for term in self.program.graph.terms:
            if term.kind in ("objective", "equality", "inequality"):
                parts.append(f"{term.label} {_SHAPES[self.program.degree(term.kind, term.name)]}")
        if self.program.sum_of_squares:
            parts[0] += " (least squares: a sum of squares)"
        return ", ".join(parts)


def compile(problem: Problem | Mapping[str, Any]) -> Compiled:
    """Trace and compile a problem (``solve`` and layers do it by themselves).

    Args:
        problem: A ``Problem`` or the dict that ``Problem.from_dict`` takes.

    Raises:
        ProblemError: A wrong declaration, or a function that returns what it must not.
        TraceError: A function has no sound derivative or no fixed value.
    """
    program = compile_program(as_problem(problem))
    warn_if_callbacks(program)
    return Compiled(program)


def _density(pattern: Pattern) -> str:
    rows, columns = pattern.shape
    return f"{pattern.nnz} of {rows} x {columns}"


def _kinks(program: Program) -> str:
    """Those that are handled as rows of the KKT system, and those at which no derivative is given."""
    handled = program.pieces.kinks if program.pieces is not None else ()
    parts = []
    for kinks, what in ((handled, ""), (program.kinks, " (refused where a solution sits on them)")):
        if kinks:
            parts.append(f"{len(kinks)}, of {', '.join(dict.fromkeys(map(str, kinks)))}{what}")
    return "; ".join(parts) or "none"


def _convexity(program: Program) -> str:
    if not program.traced:
        return "unknown: there is no graph for CVXPY's rules to read"
    from ddn_solvers.lowering.to_cvxpy import convexity  # cvxpy takes a second to import

    return program.memo("convexity", lambda: convexity(program)).reason
