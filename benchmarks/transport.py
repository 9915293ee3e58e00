"""Backward of entropic optimal transport against differentiating through Sinkhorn's iterations.

One process, one thread, medians, side by side: a batch of 8 plans, 128 x 128, float64. The iterations run in the log
domain until columns are met as closely as ours are. Run it as ``python benchmarks/transport.py``.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from spine import median_ms

from ddn_solvers.nodes import entropic_transport

BATCH, SIZE = 8, 128


def unrolled(
    cost: torch.Tensor, source: torch.Tensor, target: torch.Tensor, epsilon: float, iterations: int
) -> torch.Tensor:
    """Sinkhorn's iterations, for autograd to go through."""
    K, log_r, log_c = cost / epsilon, source.log()[..., None], target.log()[..., None, :]
    h = torch.zeros_like(log_c)
    for _ in range(iterations):
        k = -(log_c + h - K).logsumexp(-1, keepdim=True)
        h = -(log_r + k - K).logsumexp(-2, keepdim=True)
    return (log_r + log_c + k + h - K).exp()


def iterations_needed(*arguments: torch.Tensor, epsilon: float) -> int:
    """Until rows miss by less than 1e-10 of the mass."""
    source = arguments[1]
    for count in (2**i for i in range(3, 15)):
        if float((unrolled(*arguments, epsilon, count).sum(-1) - source).abs().sum(-1).max()) < 1e-10:
            return count
    raise SystemExit(f"Sinkhorn does not get there within {count} iterations at epsilon {epsilon}")


def measured(inputs: tuple[torch.Tensor, ...], v: torch.Tensor, epsilon: float) -> list[str]:
    """A line of the table."""
    with torch.no_grad():
        count = iterations_needed(*inputs, epsilon=epsilon)

    def backward(plan: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((plan * v).sum(), inputs, retain_graph=True)

    ours, theirs = entropic_transport(*inputs, epsilon), unrolled(*inputs, epsilon, count)
    forward = median_ms(lambda: entropic_transport(*inputs, epsilon), 7)
    forward_theirs = median_ms(lambda: unrolled(*inputs, epsilon, count), 3)
    ms, ms_theirs = median_ms(lambda: backward(ours), 7), median_ms(lambda: backward(theirs), 3)
    pairs = zip(map(centred, backward(ours)), map(centred, backward(theirs)), strict=True)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    times = (f"{value:.0f}" for value in (forward, forward_theirs, ms, ms_theirs, ms_theirs / ms))
    return [f"{epsilon}", str(count), *times, f"{error:.0e}"]


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    cost = torch.cdist(rand(BATCH, SIZE, 2), rand(BATCH, SIZE, 2)).square().requires_grad_()
    source, target = (
        (m / m.sum(-1, keepdim=True)).requires_grad_()
        for m in (rand(BATCH, SIZE) + 0.1, rand(BATCH, SIZE) + 0.1)
    )
    v = rand(BATCH, SIZE, SIZE)
    inputs = (cost, source, target)
    table = Table(title=f"Backward of transport, {BATCH} x {SIZE} x {SIZE}, float64, one thread")
    for column in (
        "epsilon",
        "iterations",
        "forward ms",
        "theirs",
        "backward ms",
        "theirs",
        "ratio",
        "gradient error",
    ):
        table.add_column(column, justify="right")
    for epsilon in (0.5, 0.1, 0.05):
        table.add_row(*measured(inputs, v, epsilon))
    Console(width=120).print(table)


def centred(gradient: torch.Tensor) -> torch.Tensor:
    """Gradients by masses are compared along directions that keep the sum: what else there is, is a matter of choice."""
    return gradient - gradient.mean(-1, keepdim=True) if gradient.ndim == 2 else gradient


if __name__ == "__main__":
    main()
