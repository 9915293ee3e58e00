"""Do compiled functions say what the functions themselves say?

They are made of torch's own decompositions, among much else, and not each of those is right: in torch 2.13 that of
``multilabel_margin_loss`` is another function. So both are called at two points of no significance, once a compilation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ddn_solvers.trace import called

if TYPE_CHECKING:
    from ddn_solvers.program import Program

# Relative to the largest entry, and what terms that cancel may leave.
_CLOSE, _ROUNDING = 1e-4, 1e-8
_BOUNDS = ("lower bounds", "upper bounds")
_COMPARED = ("objective", "constraints", *_BOUNDS, "objective's pieces", "constraints' pieces")


def disagreement(program: Program) -> str:
    """What a compiled program says otherwise than the functions that it was made of; empty if nothing."""
    generator = torch.Generator().manual_seed(0)
    problem, graph = program.problem, program.graph
    sizes = [program.variables.size, *(block.size for block in program.parameters[: len(problem.parameters)])]
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.enable_grad():
        captured = [t.detach().to("cpu", torch.float64).reshape(-1) for t in graph.read_captures(None)]
        for draw in (torch.rand, torch.randn):
            z, *given = (draw(size, generator=generator, dtype=torch.float64) for size in sizes)
            shaped = (v.reshape(shape) for v, shape in zip(given, problem.parameters.values(), strict=True))
            named = program.variables.split(z) | dict(zip(problem.parameters, shaped, strict=True))
            try:
                right = program.stacked(z, called(graph.terms, named, graph.seen), z.new_zeros(0))
            except Exception:
                # Where the functions have no value, as the inverse of such a matrix, none is asked for.
                continue
            if any(isinstance(value, FakeTensor) for value in right):  # of what they kept from the trace
                continue
            arrays = [block.numpy() for block in (*given, *captured)]
            said = [*program.values(z.numpy(), arrays), *program.bounds(arrays)]
            if program.pieces is not None:
                sigma = program.pieces_at(z.numpy()[None], arrays)
                f, c = program.smooth.values(z.numpy(), [*arrays, sigma, np.zeros_like(sigma)])
                said += [f, c[:, : program.constraints]]
            for what, ours, torchs in zip(_COMPARED, said, [*right, *right[:2]], strict=False):
                entry = _different(ours.reshape(-1), torchs.detach().numpy().reshape(-1))
                if entry is not None:
                    return (
                        f"their {what}, of which an entry would be {entry[0]:.6g} in place of {entry[1]:.6g}"
                    )
    return ""


def _different(ours: Any, right: Any) -> tuple[float, float] | None:
    """The pair that is farthest apart, where it is too far; where torch has no finite value there is nothing to say."""
    finite = np.isfinite(right)
    if not finite.any():
        return None
    ours, right = ours[finite], right[finite]
    away = np.nan_to_num(np.abs(ours - right), nan=np.inf)
    worst = int(away.argmax())
    if away[worst] <= _CLOSE * np.abs(right).max() + _ROUNDING:
        return None
    return float(ours[worst]), float(right[worst])
