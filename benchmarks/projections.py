"""Projections of (4096, 512) float32 rows, forward and backward, against what torch has for a comparison.

L1 against ``torch.sort`` (which the usual method begins with), L2 and Linf against ``torch.nn.functional.normalize``,
forward and backward. One process, one thread, medians, each pair measured in turn; beside each time how far point and
gradient are from those in float64. Run it as ``python benchmarks/projections.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from spine import median_ms

from ddn_solvers.nodes import project_ball, project_simplex, project_sphere

SHAPE = (4096, 512)
Function = Callable[[torch.Tensor], torch.Tensor]
# 2/3 of the median norm of standard normal rows, as in the paper's section 7.2
RADII = {1: 272.0, 2: 15.1, math.inf: 2.1}
CASES: dict[str, tuple[Function, str, float]] = {
    **{
        f"{name} {kind}": (lambda x, f=f, p=p: f(x, p, RADII[p]), against, asked)
        for name, p, against, asked in (
            ("L1", 1, "torch.sort", 1.5), ("L2", 2, "normalize", 3), ("Linf", math.inf, "normalize", 3)
        )
        for kind, f in (("sphere", project_sphere), ("ball", project_ball))
    },
    "simplex": (project_simplex, "torch.sort", 1.5),
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator).requires_grad_()
    v = torch.randn(SHAPE, generator=generator)

    def both(function: Function) -> Callable[[], object]:
        return lambda: torch.autograd.grad((function(x) * v).sum(), x)

    theirs: dict[str, Callable[[], object]] = {
        "torch.sort": lambda: torch.sort(x.detach(), -1),
        "normalize": both(torch.nn.functional.normalize),
    }
    table = Table(title=f"Projection of {SHAPE}, float32, forward and backward, one thread")
    for column in ("projection", "ms", "against", "ms", "ratio", "asked", "point error", "gradient error"):
        table.add_column(column, justify="right")
    few, exact = x.detach()[:256].requires_grad_(), x.detach()[:256].double().requires_grad_()
    for name, (function, against, asked) in CASES.items():
        rounds = [(median_ms(both(function), 5), median_ms(theirs[against], 5)) for _ in range(3)]
        mine, other = (sorted(times)[1] for times in zip(*rounds, strict=True))
        y, z = function(few), function(exact)
        g, h = (torch.autograd.grad((u * v[:256]).sum(), t)[0] for u, t in ((y, few), (z, exact)))
        table.add_row(
            name, f"{mine:.1f}", against, f"{other:.1f}", f"{mine / other:.2f}", f"{asked:g}",
            f"{float((y - z).detach().abs().max()):.0e}", f"{float((g - h).abs().max()):.0e}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
