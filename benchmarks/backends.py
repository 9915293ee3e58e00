"""Our own backends beside each other on the problems for which "auto" chooses between them.

    small     nonlinear programs with inequalities and bounds, 10 variables, by batch size
    norms     sums of norms and absolute values, by batch size
    sparse    quadratic programs: total variation of a signal, by its length; a batch of 16
    linear    linear programs, a shortest way through a grid, by its size; a batch of 64

Backends take turns in one process and one thread; times are medians of whole calls, verification included, over the number of
samples. "Off" is by how much the objective is above the best one that any of them found, the mean over samples, relative: of
problems with many minima each backend ends in others. Run it as ``python benchmarks/backends.py [small norms sparse linear]``.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

import ddn_solvers as ddn

D = torch.float64
REPEATS = 5
Case = tuple[str, ddn.Problem, dict[str, torch.Tensor]]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


# -- problems -----------------------------------------------------------------------------------------

SMALL = {
    "in a ball": ddn.Problem(
        {"u": (10,)},
        {"x": (10,)},
        lambda u, x: (u - x).square().sum() + u.exp().sum(),
        inequality=lambda u: u.square().sum() - 1,
    ),
    "in a box, many minima": ddn.Problem(
        {"u": (10,)},
        {"x": (10,)},
        lambda u, x: (4 * u + x).sin().sum() + 0.1 * u.square().sum() + (u[1:] * u[:-1] * x[1:]).sum(),
        bounds={"u": (-2.0, 2.0)},
    ),
    "everything": ddn.Problem(
        {"u": (10,)},
        {"x": (10,)},
        lambda u, x: 0.5 * (u - x).square().sum() + (u[:-1] * u[1:]).square().sum(),
        equality=lambda u: u.sum() - 1,
        inequality=[lambda u: u.square().sum() - 2, lambda u, x: (u * x)[:3] - 0.2],
        bounds={"u": (-1.0, None)},
    ),
    "around obstacles": ddn.Problem(
        {"u": (6, 2)},
        {"x": (6, 2)},
        lambda u, x: (u - x).square().sum() + (u[1:] - u[:-1]).square().sum(),
        inequality=[
            lambda u: 1 - (u - torch.tensor([0.3, 0.1], dtype=D)).square().sum(-1),
            lambda u: 0.5 - (u - torch.tensor([-1.0, 1.0], dtype=D)).square().sum(-1),
        ],
        bounds={"u": (-3.0, 3.0)},
    ),
}
NORMS = {
    "median": ddn.Problem(
        {"u": (4,)}, {"x": (8, 4)}, lambda u, x: torch.linalg.vector_norm(u - x, dim=-1).sum()
    ),
    "grouped lasso": ddn.Problem(
        {"u": (6, 2)},
        {"x": (6, 2)},
        lambda u, x: (u - x).square().sum() + torch.linalg.vector_norm(u, dim=-1).sum(),
    ),
    "logistic lasso": ddn.Problem(
        {"u": (12,)}, {"x": (12,)}, lambda u, x: (1 + (-u * x).exp()).log().sum() + 0.2 * u.abs().sum()
    ),
}


def batches(problems: dict[str, ddn.Problem]) -> Iterator[Case]:
    for name, problem in problems.items():
        for batch in (1, 32, 128):
            yield f"{name}, {batch}", problem, {"x": normal(batch, *problem.parameters["x"])}


def sparse() -> Iterator[Case]:
    for n in (60, 120, 300):
        problem = ddn.Problem(
            {"u": (n,)},
            {"x": (n,)},
            lambda u, x: (u - x).square().sum() + 0.3 * (u[1:] - u[:-1]).abs().sum(),
        )
        yield f"n = {n}", problem, {"x": normal(16, n)}


def linear() -> Iterator[Case]:
    """Edges to the right and down through a square grid, of random lengths."""
    for side in (3, 6):
        ends = [(r, c, r, c + 1) for r in range(side) for c in range(side - 1)]
        ends += [(r, c, r + 1, c) for r in range(side - 1) for c in range(side)]
        flow = torch.zeros(side * side, len(ends), dtype=D)
        for edge, (r, c, s, d) in enumerate(ends):
            flow[r * side + c, edge], flow[s * side + d, edge] = 1.0, -1.0
        supply = torch.zeros(side * side, dtype=D)
        supply[0], supply[-1] = 1.0, -1.0
        problem = ddn.Problem(
            {"u": (len(ends),)},
            {"x": (len(ends),)},
            lambda u, x: u @ x,
            equality=lambda u, flow=flow[:-1], supply=supply[:-1]: flow @ u - supply,
            bounds={"u": (0.0, 1.0)},
        )
        yield f"grid of {side}", problem, {"x": 1 + normal(64, len(ends)).abs()}


SERIES: dict[str, tuple[Callable[[], Iterator[Case]], tuple[str, ...]]] = {
    "small": (lambda: batches(SMALL), ("newton", "casadi:ipopt")),
    "norms": (lambda: batches(NORMS), ("auto", "casadi:ipopt", "cvxpy:CLARABEL")),
    "sparse": (sparse, ("clarabel", "casadi:ipopt", "cvxpy:CLARABEL", "daqp")),
    "linear": (linear, ("highs", "scipy:highs", "casadi:ipopt", "cvxpy:CLARABEL")),
}


# -- the measurement ----------------------------------------------------------------------------------


def compared(title: str, cases: Iterator[Case], solvers: tuple[str, ...]) -> Table:
    first = solvers[0]
    table = Table("", "solver", "ms a sample", f"{first} / this", "off", "solved", title=title)
    policy = ddn.Policy(on_failure="mask")
    for name, problem, x in cases:
        times: dict[str, list[float]] = {solver: [] for solver in solvers}
        found: dict[str, ddn.Solution] = {}
        for turn in range(REPEATS + 1):
            for solver in solvers:
                start = time.perf_counter()
                found[solver] = ddn.solve(problem, x, solver=solver, policy=policy)
                if turn:
                    times[solver].append(time.perf_counter() - start)
        samples, medians = len(x["x"]), {solver: statistics.median(each) for solver, each in times.items()}
        best = torch.stack([s.objective.masked_fill(~s.converged, torch.inf) for s in found.values()]).amin(0)
        for solver, solution in found.items():
            above = ((solution.objective - best) / best.abs().clamp(min=1.0))[solution.converged]
            table.add_row(
                name if solver == first else "",
                solver,
                f"{1e3 * medians[solver] / samples:.2f}",
                "" if solver == first else f"{medians[first] / medians[solver]:.2f}",
                f"{above.mean().item():.0e}" if above.numel() else "",
                f"{int(solution.converged.sum())} of {samples}",
            )
    return table


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console(width=110)
    for name in sys.argv[1:] or SERIES:
        cases, solvers = SERIES[name]
        console.print(compared(name, cases(), solvers))


if __name__ == "__main__":
    main()
