"""Where the time of a layer's call goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ddn_solvers.solution import Solution


@dataclass(frozen=True)
class Profile:
    """Median seconds of the parts of a call, forward and backward; ``str`` is a table.

    Attributes:
        first: The first call on these parameters: a problem that has not been used yet is traced and compiled there.
        backend: In the solver.
        verification: Polish, residuals, multipliers, active set, second-order conditions.
        rest: Binding of parameters, routing, assembly of the solution.
        backward: One vector-Jacobian product with the derivative of all variables.
        samples, repeats: What was measured.
    """

    first: float
    backend: float
    verification: float
    rest: float
    backward: float
    samples: int
    repeats: int

    @property
    def total(self) -> float:
        """Of a later call, forward and backward."""
        return self.backend + self.verification + self.rest + self.backward

    def __str__(self) -> str:
        rows = {
            name: getattr(self, name) for name in ("backend", "verification", "rest", "backward", "total")
        }
        lines = [
            f"{name:<14}{1e3 * seconds:9.2f} ms {seconds / self.total:5.0%}" for name, seconds in rows.items()
        ]
        title = f"{self.samples} sample{'s' if self.samples > 1 else ''}, medians of {self.repeats} calls"
        return "\n".join([title, *lines, f"{'first call':<14}{1e3 * self.first:9.2f} ms"])


def profile(solve: Callable[[], Solution], inputs: Mapping[str, torch.Tensor], repeats: int) -> Profile:
    """Measure calls of ``solve`` and the backward of each, with respect to those inputs that it depends on."""
    times: list[tuple[float, ...]] = []
    first, samples = 0.0, 0
    for call in range(repeats + 1):
        started = time.perf_counter()
        solution = solve()
        solved = time.perf_counter()
        total = torch.stack([values.sum() for values in solution.primal.values()]).sum()
        begun = time.perf_counter()
        if total.requires_grad:
            torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        backward = time.perf_counter() - begun
        parts = solution.stats.phases
        rest = solved - started - sum(parts.values())
        if call:
            times.append((parts["backend"], parts["verification"], rest, backward))
        else:
            first, samples = solved - started + backward, len(solution.status)
    backend, verification, rest, backward = (statistics.median(part) for part in zip(*times, strict=True))
    return Profile(first, backend, verification, rest, backward, samples, repeats)
