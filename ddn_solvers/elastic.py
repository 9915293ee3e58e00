"""The elastic problem: how near to feasible one can get where no point is.

    minimise  f(z) + (penalty / 2) |s|^2   subject to   h(z) = unit s_h,   g(z) <= unit s_g,   lower <= z <= upper

with a slack s for every row of c = [h; g]. With a large penalty the violation is the smallest in the
sense of least squares, and f chooses among the points that share it. Its multipliers are those of the problem
whose constraints are shifted by the slacks. Bounds stay hard; where two contradict, both become their middle, which
is the point of least squares between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ddn_solvers.pieces import replay
from ddn_solvers.program import Program
from ddn_solvers.terms import Term
from ddn_solvers.trace import retrace

_SLACKS = "constraint_slacks_"  # the variable s, in the order of c
_UNIT, _PENALTY = "slack_unit_", "slack_penalty_"  # the last two declared parameters


def elastic(program: Program) -> Program:
    """The elastic problem of ``program``, made once: s are its last variables, then it has two more parameters."""

    def build() -> Program:
        relaxed = _elastic(program)
        relaxed.origin = program, "elastic"
        return relaxed

    return program.memo("elastic", build)


def _elastic(program: Program) -> Program:
    problem, graph = program.problem, program.graph
    relaxed = replace(
        problem,
        variables={**problem.variables, _SLACKS: (program.constraints,)},
        parameters={**problem.parameters, _UNIT: (), _PENALTY: ()},
    )
    module = graph.module
    if module is None:
        return _Elastic(relaxed, graph)
    variables, declared = len(problem.variables), len(relaxed.parameters)

    def functions(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own, slacks, parameters = inputs[:variables], inputs[variables], inputs[variables + 1 :]
        *given, unit, penalty = parameters[:declared]
        outputs = replay(module, (*own, *given, *parameters[declared:]))
        return tuple(_relaxed(graph.terms, outputs, slacks, unit, penalty))

    shapes = [*relaxed.variables.values(), *relaxed.parameters.values(), *graph.capture_shapes]
    return _Elastic(relaxed, replace(graph, module=retrace(functions, shapes)))


class _Elastic(Program):
    def _call_functions(self, variables: list[torch.Tensor], blocks: list[torch.Tensor]) -> Any:
        values = super()._call_functions(variables, blocks)
        unit, penalty = blocks[len(self.problem.parameters) - 2 : len(self.problem.parameters)]
        return _relaxed(self.graph.terms, values, variables[-1], unit, penalty)


def _relaxed(
    terms: Sequence[Term],
    values: Sequence[torch.Tensor],
    slacks: torch.Tensor,
    unit: torch.Tensor,
    penalty: torch.Tensor,
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
