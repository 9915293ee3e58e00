"""Calls of several libraries that take turns on the same problems, in one process and one thread: times beside errors.

A ``Reference`` has the problems, a cotangent, and what exact arithmetic makes of them. A contestant is a function that
takes the tensors once, to set up what can be set up before, and returns the call that is timed; one that is not
installed raises ``ImportError`` and is named under the table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.table import Table

SLOW = 3.0  # seconds for all calls of a contestant, about, after which its turns are over
OURS = "ddn_solvers"

Tensors = Mapping[str, torch.Tensor]
Call = Callable[[Tensors], torch.Tensor]
Contestant = Callable[[Tensors], Call]


@dataclass
class Reference:
    """Problems as tensors, a cotangent ``v`` of the solution, the solution and its gradients by tensor.

    Attributes:
        symmetric: Tensors of which only the symmetric part enters.
    """

    tensors: dict[str, torch.Tensor]
    v: torch.Tensor
    u: np.ndarray
    gradients: dict[str, np.ndarray]
    symmetric: tuple[str, ...] = ()


@dataclass
class Entry:
    """A contestant's call and its times in seconds; ``backward`` is empty for one that has none."""

    call: Call
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def milliseconds(self) -> tuple[float, float | None]:
        forward = 1e3 * statistics.median(self.forward)
        return forward, 1e3 * statistics.median(self.backward) if self.backward else None


def refined(K: np.ndarray, right: np.ndarray) -> np.ndarray:
    """K^-1 right, with residuals in extended precision."""
    inverse, wide = np.linalg.inv(K), K.astype(np.longdouble)
    x = (inverse @ right).astype(np.longdouble)
    for _ in range(4):
        x += inverse @ (right - wide @ x).astype(float)
    return x.astype(float)


def errors(r: Reference, call: Call) -> tuple[float, float | None]:
    """Of the point, and of the worst block of gradients; relative to the largest entry."""
    u = call(r.tensors)
    off = float(np.abs(u.detach().numpy() - r.u).max() / np.abs(r.u).max())
    if not u.requires_grad:
        return off, None
    found = torch.autograd.grad(u, list(r.tensors.values()), r.v)
    worst = 0.0
    for name, gradient in zip(r.tensors, found, strict=True):
        got, exact = gradient.numpy(), r.gradients[name]
        got = (got + got.transpose(0, 2, 1)) / 2 if name in r.symmetric else got
        worst = max(worst, float(np.abs(got - exact).max() / np.abs(exact).max()))
    return off, worst


def take_turns(r: Reference, entries: Mapping[str, Entry], repeats: int) -> None:
    """Forward and backward of each in turn, so that all see the same machine; the first turn does not count."""
    inputs = list(r.tensors.values())
    for turn in range(repeats + 1):
        for entry in entries.values():
            if sum(entry.forward) + sum(entry.backward) > SLOW and len(entry.forward) >= 3:
                continue
            start = time.perf_counter()
            u = entry.call(r.tensors)
            middle = time.perf_counter()
            if u.requires_grad:
                torch.autograd.grad(u, inputs, r.v)
            if turn:
                entry.forward.append(middle - start)
                if u.requires_grad:
                    entry.backward.append(time.perf_counter() - middle)


def made(r: Reference, make: Contestant) -> tuple[Call | None, str]:
    """The call of a contestant, or why there is none."""
    try:
        call = make(r.tensors)
        call(r.tensors)
    except ImportError as error:
        return None, f"not installed: {error.name}"
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return call, ""


def contest(name: str, r: Reference, contestants: Mapping[str, Contestant], repeats: int) -> Table:
    """The table of times and errors, the fastest first; those without a backward pass are compared by forward."""
    columns = ("library", "forward ms", "backward ms", "total ms", "ours / theirs", "point", "gradient")
    table, entries, missing = Table(*columns, title=name), {}, []
    for peer, make in contestants.items():
        call, why = made(r, make)
        if call is None:
            missing.append((peer, why))
        else:
            entries[peer] = Entry(call)
    take_turns(r, entries, repeats)
    times = {peer: entry.milliseconds() for peer, entry in entries.items()}
    ours = times[OURS]
    for peer in sorted(times, key=lambda peer: sum(t or 0.0 for t in times[peer])):
        forward, backward = times[peer]
        off, worst = errors(r, entries[peer].call)
        total = forward + (backward or 0.0)
        ratio = ours[0] / forward if backward is None else sum(t or 0.0 for t in ours) / total
        table.add_row(
            peer,
            f"{forward:.2f}",
            "" if backward is None else f"{backward:.2f}",
            f"{total:.2f}",
            f"{ratio:.2f}" + (" (forward)" if backward is None else ""),
            f"{off:.0e}",
            "" if worst is None else f"{worst:.0e}",
        )
    for peer, why in missing:
        table.add_row(peer, why)
    return table
