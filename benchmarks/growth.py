"""S: cost as it grows. Time and memory of one layer against the size of its problem, one process a size.

    dense       one dense QP, n/4 equalities, n/2 inequalities             n = 10 to 2000
    banded      smoothing of a signal between bounds, a QP                 n = 100 to 100,000
    elastic     a chain of springs in exponential potentials, an NLP       n = 100 to 100,000
    batch       QPs of n = 10 with 5 inequalities                          batch of 1 to 10,000
    points      a polynomial fitted to points, each one a parameter        1 to 1,000,000 parameters
    matrix      ridge regression, ten unknowns, its matrix a parameter     42 to 1,000,010 parameters
    captured    logistic regression, its matrix captured                   10 to 1,000,000 parameters
    promises    what was asked for: sparse, batched, and one QP of n = 400 beside cvxpylayers

``first`` is construction and first call (trace, compile, solve), ``first back`` the first backward; ``forward`` and
``backward`` are medians of later calls, ``backend`` and ``verification`` parts of forward; all in ms. Memory is the
process's peak, above what it was after imports and one call on the smallest size. A series stops after a call that
takes a minute. A slope is the exponent that the last decade of sizes fits. Run it as
``python benchmarks/growth.py [folder [series ...]]``; figures go to the folder, by default ``artifacts``.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import QP
from rich.console import Console
from rich.table import Table

import ddn_solvers as ddn

LIMIT = 60.0  # seconds of one call, after which a series ends
PATIENCE = 8 * LIMIT  # seconds for all that one process does
GIGABYTES = 12  # of data in one process
BUDGET, REPEATS = 5.0, 7  # seconds and number of repeated calls, whichever ends first
D = torch.float64
Tensors = Mapping[str, torch.Tensor]
TIMES = ("first", "forward", "first back", "backward")
PARTS = ("backend", "verification")  # of forward


@dataclass(frozen=True)
class Case:
    """A problem, its parameters, and the tensors that get gradients."""

    problem: ddn.Problem
    parameters: Tensors
    needing: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One size: seconds by name, megabytes, and who found the point; or only why there is none."""

    size: int
    seconds: Mapping[str, float]
    megabytes: float = 0.0
    backend: str = ""
    iterations: float = 0.0
    note: str = ""


def case(problem: ddn.Problem, captured: Sequence[torch.Tensor] = (), **parameters: torch.Tensor) -> Case:
    needing = [t.requires_grad_() for t in parameters.values()]
    return Case(problem, parameters, (*needing, *captured))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=D)


# -- problems -----------------------------------------------------------------------------------------


def quadratic(batch: int, n: int, m: int, k: int) -> Case:
    """Feasible, some of the inequalities active."""
    L, u, slack = normal(batch, n, n), normal(batch, n), normal(batch, k).abs()
    t = {"P": L @ L.mT / n + torch.eye(n, dtype=D), "q": normal(batch, n, 1)[..., 0]}
    for matrix, side, rows in (("A", "b", m), ("G", "h", k)):
        if rows:
            t[matrix] = normal(batch, rows, n)
            t[side] = (t[matrix] @ u[..., None])[..., 0]
    t["h"] = t["h"] + slack
    return case(ddn.quadratic_program(n, m, k), **t)


def dense(n: int) -> Case:
    return quadratic(1, n, n // 4, n // 2)


def batch(size: int) -> Case:
    return quadratic(size, 10, 0, 5)


def banded(n: int) -> Case:
    def objective(u: torch.Tensor, x: torch.Tensor, stiffness: torch.Tensor) -> torch.Tensor:
        return (u - x).square().sum() + stiffness * (u[1:] - u[:-1]).square().sum()

    shapes = {"x": (n,), "stiffness": ()}
    problem = ddn.Problem({"u": (n,)}, shapes, objective, bounds={"u": (-1.0, 1.0)})
    return case(problem, x=_signal(n), stiffness=torch.tensor(5.0, dtype=D))


def elastic(n: int) -> Case:
    def objective(u: torch.Tensor, x: torch.Tensor, stiffness: torch.Tensor) -> torch.Tensor:
        lengths = (1 + (u[1:] - u[:-1]).square()).sqrt()
        return stiffness * lengths.sum() + ((u - x).exp() - (u - x)).sum()

    shapes = {"x": (n,), "stiffness": ()}
    problem = ddn.Problem({"u": (n,)}, shapes, objective, bounds={"u": (-1.0, 1.0)})
    return case(problem, x=_signal(n), stiffness=torch.tensor(5.0, dtype=D))


def _signal(n: int) -> torch.Tensor:
    """Its bounds are reached on a part of each wave, however many there are."""
    return 1.5 * torch.sin(torch.arange(n, dtype=D) / 10) + 0.3 * normal(n)


def points(size: int) -> Case:
    def objective(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        powers = torch.stack([torch.ones_like(t), t, t**2, t**3], 1)
        return (powers @ u - t.sin()).square().mean() + 0.01 * u.square().sum()

    return case(ddn.Problem({"u": (4,)}, {"t": (size,)}, objective), t=normal(size))


def matrix(size: int) -> Case:
    n, rows = 10, (size - 10) // 11
    weights = torch.ones(n, dtype=D)
    return case(ddn.least_squares(rows, n, ridge=True), M=normal(rows, n), y=normal(rows), w=weights)


def captured(size: int) -> Case:
    X = normal(size // 5, 5).requires_grad_()

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(X @ u).mean() + 0.5 * (u - x).square().sum()

    return case(ddn.Problem({"u": (5,)}, {"x": (5,)}, objective), [X], x=normal(5))


SERIES: Mapping[str, tuple[Callable[[int], Case], str, tuple[int, ...]]] = {
    "dense": (dense, "unknowns", (10, 30, 100, 200, 400, 700, 1000, 1400, 2000)),
    "banded": (banded, "unknowns", (100, 300, 1000, 3000, 10_000, 30_000, 100_000)),
    "elastic": (elastic, "unknowns", (100, 300, 1000, 3000, 10_000, 30_000, 100_000)),
    "batch": (batch, "problems", (1, 4, 16, 64, 250, 1000, 3000, 10_000)),
    "points": (points, "parameters", (1, 10, 100, 1000, 10_000, 100_000, 300_000, 1_000_000)),
    "matrix": (matrix, "parameters", (43, 120, 1000, 10_000, 100_010, 300_010, 1_000_010)),
    "captured": (captured, "parameters", (10, 100, 1000, 10_000, 100_000, 300_000, 1_000_000)),
}
PROMISES = "promises"


# -- measurement --------------------------------------------------------------------------------------


def measured(series: str, size: int) -> Row:
    """In this process; the smallest size of the series has loaded the backends before."""
    make, _, sizes = SERIES[series]
    _calls(_ours, make(sizes[0]), repeats=1)
    base, data = _peak(), make(size)
    seconds, solution = _calls(_ours, data, REPEATS)
    megabytes, stats = (_peak() - base) / 1e6, solution.stats
    iterations = [i for i in stats.iterations if i is not None]
    backend = f"{stats.backend[0]}:{stats.method[0]}"
    return Row(size, seconds, megabytes, backend, statistics.fmean(iterations) if iterations else 0.0)


def theirs(n: int) -> Row:
    """The dense QP by cvxpylayers, in the same way."""
    _calls(_cvxpylayers, dense(10), repeats=1)
    base, data = _peak(), dense(n)
    seconds, _ = _calls(_cvxpylayers, data, REPEATS)
    return Row(n, seconds, (_peak() - base) / 1e6)


def _ours(case: Case) -> Callable[[], Any]:
    return partial(ddn.DeclarativeLayer(case.problem).solve, **case.parameters)


def _cvxpylayers(case: Case) -> Callable[[], Any]:
    return partial(QP["cvxpylayers"](case.parameters), case.parameters)


def _calls(
    prepare: Callable[[Case], Callable[[], Any]], case: Case, repeats: int
) -> tuple[dict[str, float], Any]:
    """Seconds, and what the last call returned: a ``Solution``, or a tensor."""
    started = time.perf_counter()
    call = prepare(case)
    solution = call()
    first = time.perf_counter() - started
    found = {"first": [first], "first back": [_backward(case, solution)]}
    started = time.perf_counter()
    for _ in range(repeats):
        begun = time.perf_counter()
        solution = call()
        taken = {"forward": time.perf_counter() - begun, "backward": _backward(case, solution)}
        if isinstance(solution, ddn.Solution):
            taken |= {part: solution.stats.phases[part] for part in PARTS}
        for name, seconds in taken.items():
            found.setdefault(name, []).append(seconds)
        if time.perf_counter() - started > BUDGET:
            break
    return {name: statistics.median(values) for name, values in found.items()}, solution


def _backward(case: Case, solution: Any) -> float:
    u = solution["u"] if isinstance(solution, ddn.Solution) else solution
    cotangent = torch.linspace(-1, 1, u.numel(), dtype=D).reshape(u.shape)
    started = time.perf_counter()
    torch.autograd.grad(u, case.needing, cotangent)
    return time.perf_counter() - started


def _peak() -> float:
    """Bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _child(answer: Connection, measure: Callable[[int], Row], size: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30,) * 2)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", ddn.DDNWarning)
        try:
            row = measure(size)
        except Exception as error:
            row = Row(size, {}, note=f"{type(error).__name__}: {str(error).splitlines()[0][:90]}")
    answer.send(replace(row, note=" ".join([row.note, *sorted({w.category.__name__ for w in heard})])))


def apart(measure: Callable[[int], Row], size: int) -> Row:
    """In a process of its own, which may run out of time or memory, or crash."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(its, measure, size), daemon=True)
    process.start()
    its.close()
    try:
        if mine.poll(PATIENCE):
            return mine.recv()
        process.kill()
        return Row(size, {}, note=f"stopped after {PATIENCE:.0f} s")
    except EOFError:
        process.join()
        return Row(size, {}, note=f"crashed, exit code {process.exitcode}")
    finally:
        process.join()


def grown(series: str) -> list[Row]:
    """Rows of a series, up to the first that fails or is too slow."""
    rows: list[Row] = []
    for size in SERIES[series][2]:
        rows.append(apart(partial(measured, series), size))
        if max(rows[-1].seconds.values(), default=LIMIT) >= LIMIT:
            break
    return rows


# -- what is shown ------------------------------------------------------------------------------------


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of the last decade."""
    last = [
        (np.log(x), np.log(y)) for x, y in zip(sizes, values, strict=True) if x * 10 >= max(sizes) and y > 0
    ]
    return float(np.polyfit(*np.transpose(last), 1)[0]) if len(last) > 1 else float("nan")


def table(series: str, rows: Sequence[Row]) -> Table:
    _, unit, _ = SERIES[series]
    shown = Table(unit, *TIMES, "MB", *PARTS, "solver", "iterations", title=series)
    good = [row for row in rows if row.seconds]
    for row in rows:
        if not row.seconds:
            shown.add_row(f"{row.size:,}", row.note)
            continue
        shown.add_row(
            f"{row.size:,}",
            *(f"{1e3 * row.seconds[name]:.2f}" for name in TIMES),
            f"{row.megabytes:.0f}",
            *(f"{1e3 * row.seconds[name]:.2f}" for name in PARTS),
            row.backend,
            f"{row.iterations:.0f} {row.note}",
        )
    sizes = [row.size for row in good]
    slopes = [slope(sizes, [row.seconds[name] for row in good]) for name in TIMES]
    slopes.append(slope(sizes, [row.megabytes for row in good]))
    shown.add_section()
    shown.add_row("slope", *(f"{value:.2f}" for value in slopes))
    return shown


def draw(series: str, rows: Sequence[Row], folder: Path) -> None:
    """Times on the left, memory on the right; a slope beside each curve."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    good = [row for row in rows if row.seconds]
    sizes = [row.size for row in good]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    curves = [(times, name, [1e3 * row.seconds[name] for row in good]) for name in TIMES]
    curves.append((memory, "peak memory", [max(row.megabytes, 0.1) for row in good]))
    for axes, name, values in curves:
        (line,) = axes.loglog(sizes, values, "o-", ms=3, label=name)
        axes.annotate(
            f" {slope(sizes, values):.2f}", (sizes[-1], values[-1]), color=line.get_color(), va="center"
        )
        axes.set(xlabel=SERIES[series][1])
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    times.set(ylabel="ms", title=series)
    times.legend()
    memory.set(ylabel="MB", title="peak memory")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"growth_{series}.png", dpi=110)
    pyplot.close(figure)


# -- what was asked for -------------------------------------------------------------------------------


def promises() -> Table:
    """Sparse, batched, and one QP of n = 400, as asked for and as measured."""
    shown = Table("asked for", "measured", "holds", title=PROMISES)
    for name in ("banded", "elastic"):
        half, whole = (apart(partial(measured, name), n) for n in (50_000, 100_000))
        if not whole.seconds or not half.seconds:
            shown.add_row(f"{name}, n = 100,000", whole.note or half.note, "no")
            continue
        step, back = whole.seconds["forward"] / max(whole.iterations, 1), whole.seconds["backward"]
        text = f"{1e3 * back:.0f} ms, {1e3 * step:.0f} ms ({whole.iterations:.0f} iterations)"
        shown.add_row(f"{name}, n = 100,000: backward below one iteration", text, _yes(back < step))
        ratio = whole.megabytes / max(half.megabytes, 1e-9)
        text = f"{half.megabytes:.0f} MB, {whole.megabytes:.0f} MB: x {ratio:.2f}"
        shown.add_row(f"{name}: memory linear, n = 50,000 and 100,000", text, _yes(ratio < 2.2))
    few, many = (apart(partial(measured, "batch"), size) for size in (64, 10_000))
    if few.seconds and many.seconds:
        one = [1e6 * (row.seconds["forward"] + row.seconds["backward"]) / row.size for row in (few, many)]
        text = f"{one[0]:.0f} us, {one[1]:.0f} us a problem"
        shown.add_row("batch of 10,000 no dearer a problem than of 64", text, _yes(one[1] <= 1.05 * one[0]))
    else:
        shown.add_row("batch of 10,000 and of 64", many.note or few.note, "no")
    ours = apart(partial(measured, "dense"), 400)
    ready = ours.seconds.get("first", float("inf"))
    shown.add_row("QP of n = 400 ready in 1 s", _dense_text(ours), _yes(ready < 1))
    shown.add_row("  cvxpylayers on it", _dense_text(apart(theirs, 400)), "")
    return shown


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _dense_text(row: Row) -> str:
    return ", ".join(f"{name} {1e3 * row.seconds[name]:.0f} ms" for name in TIMES if row.seconds) or row.note


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, *names = sys.argv[1:] or ["artifacts"]
    console, found = Console(width=140), {}
    for name in names or [*SERIES, PROMISES]:
        if name == PROMISES:
            console.print(promises())
        else:
            found[name] = grown(name)
            console.print(table(name, found[name]))
    for name, rows in found.items():  # last: a process begins with the peak of the one that starts it
        draw(name, rows, Path(folder))


if __name__ == "__main__":
    main()
