"""Problems derived from a compiled one, with the same constraints by name.

Elastic: how near to feasible one can get where no point is,

    minimise  f(z) + (penalty / 2) |s|^2   subject to   h(z) = unit s_h,   g(z) <= unit s_g,   lower <= z <= upper

with a slack s for every row of c = [h; g]. With a large penalty the violation is the smallest in the sense of least
squares, and f chooses among the points that share it. Its multipliers are those of the problem whose constraints are
shifted by the slacks. Bounds stay hard; where two contradict, both become their middle, which is the point of least
squares between them.

Scaled: the problem in v = z / unit, with f / energy and c / unit, so that a solver's tolerances, which are made for
numbers of about one, mean something. Its multipliers, of bounds too, are those of the problem times unit / energy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ddn_solvers.layout import Shape
from ddn_solvers.pieces import replay
from ddn_solvers.problem import Problem
from ddn_solvers.program import Program
from ddn_solvers.terms import Term
from ddn_solvers.trace import Graph, retrace

Values = Sequence[torch.Tensor]  # one a term of the graph
# The base problem's values as a function of its variables; the new variables; the new parameters -> the new values.
Rewrite = Callable[[Callable[[Values], Values], Values, Values], Values]


def elastic(program: Program) -> Program:
    """The elastic problem: the variable s behind those of ``program``, unit and penalty behind its declared parameters."""
    slacks = {"constraint_slacks_": (program.constraints,)}

    def rewrite(base: Callable[[Values], Values], variables: Values, extra: Values) -> Values:
        *own, s = variables
        return _relaxed(program.graph.terms, base(own), s, *extra)

    return _derived(program, "elastic", slacks, ("slack_unit_", "slack_penalty_"), rewrite)


def scaled(program: Program) -> Program:
    """The scaled problem: unit and energy behind the declared parameters of ``program``."""

    def rewrite(base: Callable[[Values], Values], variables: Values, extra: Values) -> Values:
        unit, energy = extra
        values = base([unit * v for v in variables])
        terms = zip(program.graph.terms, values, strict=True)
        return [value / (energy if term.kind == "objective" else unit) for term, value in terms]

    return _derived(program, "scaled", {}, ("unit_", "energy_"), rewrite)


FORMS: Mapping[str, Callable[[Program], Program | None]] = {
    "elastic": elastic,
    "scaled": scaled,
    "lifted": lambda program: program.lifted,
}


def with_extra(program: Program, blocks: Sequence[Any], extra: Sequence[Any]) -> list[Any]:
    """The parameter blocks of ``program`` with those that a problem derived from it has besides."""
    declared = len(program.problem.parameters)
    return [*blocks[:declared], *extra, *blocks[declared:]]


def _derived(
    base: Program, name: str, variables: Mapping[str, Shape], parameters: Sequence[str], rewrite: Rewrite
) -> Program:
    """Made once a program."""
    problem = replace(
        base.problem,
        variables={**base.problem.variables, **variables},
        parameters={**base.problem.parameters, **dict.fromkeys(parameters, ())},
    )
    return base.memo(("derived", name), lambda: _Derived(base, name, problem, rewrite))


class _Derived(Program):
    def __init__(self, base: Program, name: str, problem: Problem, rewrite: Rewrite) -> None:
        self.origin = base, name
        self._base, self._rewrite = base, rewrite
        self._extra = slice(len(base.problem.parameters), len(problem.parameters))
        super().__init__(problem, self._graph(problem))

    def _graph(self, problem: Problem) -> Graph:
        graph, module = self._base.graph, self._base.graph.module
        if module is None:
            return graph
        count = len(problem.variables)

        def functions(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            blocks = inputs[count:]
            given = (*blocks[: self._extra.start], *blocks[self._extra.stop :])
            return tuple(
                self._rewrite(lambda own: replay(module, (*own, *given)), inputs[:count], blocks[self._extra])
            )

        shapes = [*problem.variables.values(), *problem.parameters.values(), *graph.capture_shapes]
        return replace(graph, module=retrace(functions, shapes))

    def _call_functions(self, variables: list[torch.Tensor], blocks: list[torch.Tensor]) -> Any:
        given = [*blocks[: self._extra.start], *blocks[self._extra.stop :]]
        return self._rewrite(
            lambda own: self._base._call_functions(list(own), given), variables, blocks[self._extra]
        )


def _relaxed(
    terms: Sequence[Term], values: Values, slacks: torch.Tensor, unit: torch.Tensor, penalty: torch.Tensor
) -> list[torch.Tensor]:
    """The values of a problem's terms as those of its elastic problem."""
    sides = {(term.kind, term.name): value for term, value in zip(terms, values, strict=True)}
    relaxed, row = [], 0
    for term, value in zip(terms, values, strict=True):
        if term.kind == "objective":
            value = value + penalty / 2 * slacks.square().sum()
        elif term.kind in ("equality", "inequality"):
            value = value - unit * slacks[row : row + value.numel()].reshape(value.shape)
            row += value.numel()
        elif ("lower", term.name) in sides and ("upper", term.name) in sides:
            lower, upper = sides["lower", term.name], sides["upper", term.name]
            value = torch.where(lower > upper, (lower + upper) / 2, value)
        relaxed.append(value)
    return relaxed
