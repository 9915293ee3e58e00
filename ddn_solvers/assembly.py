"""Flat outputs of the autograd operation -> a ``Solution`` in the caller's names, shapes, dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ddn_solvers.binding import Binding
from ddn_solvers.certificate import Certificate
from ddn_solvers.implicit import Outputs
from ddn_solvers.program import Program
from ddn_solvers.solution import DualSolution, Residuals, Solution, Stats, Status


def assemble(
    program: Program,
    binding: Binding,
    outputs: Outputs,
    status: tuple[Status, ...],
    stats: Stats,
    certificate: Callable[[], Certificate],
    slacks: Mapping[str, torch.Tensor] | None = None,
) -> Solution:
    """Name every part of ``outputs``; all of it keeps its gradients."""
    give, m, n = binding.give_back, program.equality.size, program.variables.size
    dual = DualSolution(
        equality=program.equality.split(give(outputs.y[:, :m], m)),
        inequality=program.inequality.split(
            give(outputs.y[:, m : program.constraints], program.inequality.size)
        ),
        lower=program.variables.split(give(outputs.lower, n)),
        upper=program.variables.split(give(outputs.upper, n)),
    )
    return Solution(
        primal=program.variables.split(give(outputs.z, n)),
        dual=dual,
        objective=give(outputs.objective),
        status=status,
        converged=give(outputs.converged),
        residuals=Residuals(*(give(column) for column in outputs.residuals.unbind(-1))),
        stats=stats,
        slacks=slacks,
        _certify=certificate,
    )
