"""Robust pooling against the mean: forward and backward of a (16, 256, 2048) float32 tensor.

One process, one thread, medians, side by side; beside each time the peak of extra memory over the size of the input,
and how far the result is from the same pool in float64. Run it as ``python benchmarks/pooling.py``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from spine import median_ms

from ddn_solvers import nodes
from ddn_solvers.nodes.penalties import PENALTIES

SHAPE = (16, 256, 2048)
ASKED = {"quadratic": None, "pseudo-huber": 8, "huber": 6, "welsch": 15, "truncated": 20}


def data(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def peak_of(penalty: str) -> float:
    """Peak memory beyond that of the input, the gradient of one size included, in sizes of the input."""
    script = f"import pooling; pooling.print_peak({penalty!r})"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(out.stdout)


def print_peak(penalty: str) -> None:
    torch.set_num_threads(1)
    small = data((2, 2, 64)).requires_grad_()
    nodes.robust_pool(small, penalty).sum().backward()  # what is loaded on first use
    x = data().requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is held now
    before = peak_kib()
    nodes.robust_pool(x, penalty).sum().backward()
    print((peak_kib() - before) * 1024 / (x.numel() * x.element_size()))


def peak_kib() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    torch.set_num_threads(1)
    x = data().requires_grad_()
    v = torch.randn(SHAPE[:2], generator=torch.Generator().manual_seed(1))

    def both(pool) -> None:
        torch.autograd.grad((pool(x) * v).sum(), x)

    table = Table(title=f"Pooling {SHAPE}, float32, forward and backward, one thread")
    for column in ("pool", "ms", "/ mean", "asked", "peak / input", "point error", "gradient error"):
        table.add_column(column, justify="right")
    mean = median_ms(lambda: both(lambda x: x.mean(-1)), 7)
    sort = median_ms(lambda: torch.sort(x.detach(), -1), 3)
    table.add_row("mean", f"{mean:.1f}", "1", "", "", "", "")
    few = x.detach()[:1, :32].requires_grad_()
    exact = few.detach().double().requires_grad_()
    for name in PENALTIES:
        ms = median_ms(lambda name=name: both(lambda x: nodes.robust_pool(x, name)), 5)
        y, reference = nodes.robust_pool(few, name), nodes.robust_pool(exact, name)
        g, h = (torch.autograd.grad((p * v[:1, :32]).sum(), q)[0] for p, q in ((y, few), (reference, exact)))
        asked = ASKED[name]
        table.add_row(
            name, f"{ms:.1f}", f"{ms / mean:.1f}", "" if asked is None else str(asked), f"{peak_of(name):.1f}",
            f"{float((y - reference).detach().abs().max()):.0e}", f"{float((g - h).abs().max()):.0e}",
        )  # fmt: skip
    table.add_row("torch.sort alone", f"{sort:.1f}", f"{sort / mean:.1f}", "", "", "", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
