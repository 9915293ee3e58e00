"""The spine side by side: tracing, IPOPT against a hand-written model and torch callbacks, the backward.

    minimise 0.1 sum exp(u) + sum log(1 + (u - x)^2)   s.t.   |u|^2 = 1,  |u[:25]| <= 0.6,   n = 50

One process, one thread, medians; every time stands beside the accuracy of what it computed. Run it as
``python benchmarks/spine.py``.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import casadi as ca
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import ddn_solvers as ddn

N, HALF = 50, 25
SOLVER = "casadi:ipopt"


def cost(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 0.1 * u.exp().sum() + (1 + (u - x).square()).log().sum()


def branching_cost(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same; the branch on values keeps it from being traced."""
    return cost(u, x) if u.sum() > -1e9 else u.sum()


def sphere(u: torch.Tensor) -> torch.Tensor:
    return u.square().sum() - 1


def norm(u: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(u[:HALF]) - 0.6


def declare(objective: Callable[..., torch.Tensor]) -> ddn.Problem:
    return ddn.Problem(
        variables={"u": (N,)}, parameters={"x": (N,)}, objective=objective, equality=sphere, inequality=norm
    )


def median_ms(function: Callable[[], Any], repeats: int, prepare: Callable[[], Any] = lambda: None) -> float:
    times = []
    for _ in range(repeats + 2):
        prepared = prepare()
        started = time.perf_counter()
        function() if prepared is None else function(prepared)  # type: ignore[call-arg]  # the two forms of a timed function
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Medians of two functions called in turn, so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 2):
        for function, record in zip((first, second), times, strict=True):
            started = time.perf_counter()
            function()
            record.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def by_hand() -> ca.Function:
    z, p = ca.MX.sym("z", N), ca.MX.sym("p", N)
    f = 0.1 * ca.sum1(ca.exp(z)) + ca.sum1(ca.log(1 + (z - p) ** 2))
    g = ca.vertcat(ca.sumsqr(z) - 1, ca.norm_2(z[:HALF]) - 0.6)
    options = {
        "print_time": False,
        "ipopt": {
            "print_level": 0,
            "sb": "yes",
            "tol": 1e-9,
            "constr_viol_tol": 1e-9,
            "bound_relax_factor": 0.0,
        },
    }
    return ca.nlpsol("by_hand", "ipopt", {"x": z, "p": p, "f": f, "g": g}, options)


def import_seconds() -> float:
    code = "import time, torch; t = time.perf_counter(); import ddn_solvers; print(time.perf_counter() - t)"
    return statistics.median(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(N, dtype=torch.float64, requires_grad=True)
    initial = torch.full((N,), 0.1, dtype=torch.float64)
    problem = declare(cost)
    rows: list[tuple[str, str, str]] = []

    rows.append(("import beyond torch", f"{import_seconds():.3f} s", "at most 0.3 s"))
    ddn.solve(
        problem, {"x": x}, solver=SOLVER, initial=initial
    )  # the first trace of a process loads torch's tracer
    ready = median_ms(lambda: ddn.solve(declare(cost), {"x": x}, solver=SOLVER, initial=initial), 10)
    again = median_ms(lambda: ddn.solve(problem, {"x": x}, solver=SOLVER, initial=initial), 20)
    traced = median_ms(lambda: _everything_compiled(declare(cost)), 20)
    rows.append(("trace and compile", f"{traced:.1f} ms", "below 50 ms"))
    rows.append(("first solve of a new problem", f"{ready:.1f} ms", f"later ones {again:.1f} ms"))

    model, point = by_hand(), initial.numpy()
    arguments = {"x0": point, "p": x.detach().numpy(), "lbg": [0, -np.inf], "ubg": [0, 0]}
    ours = _backend_alone(problem, x, initial)
    alone, hand = interleaved(ours, lambda: model(**arguments), 40)
    whole, hand_again = interleaved(
        lambda: ddn.solve(problem, {"x": x}, solver=SOLVER, initial=initial), lambda: model(**arguments), 40
    )
    solution = ddn.solve(problem, {"x": x}, solver=SOLVER, initial=initial)
    error = np.abs(model(**arguments)["x"].full().ravel() - solution["u"].detach().numpy()).max()
    rows.append(
        (
            "IPOPT, traced / by hand",
            f"{alone / hand:.2f}",
            f"{alone:.2f} / {hand:.2f} ms, points differ by {error:.0e}",
        )
    )
    rows.append(
        (
            "whole solve / by hand",
            f"{whole / hand_again:.2f}",
            f"{whole:.2f} / {hand_again:.2f} ms, verified and polished",
        )
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.FallbackWarning)
        slow_problem = declare(branching_cost)
        slow = median_ms(lambda: ddn.solve(slow_problem, {"x": x}, solver=SOLVER, initial=initial), 3)
    rows.append(
        ("torch callbacks / traced", f"{slow / whole:.1f}", f"{slow:.0f} / {whole:.2f} ms, whole solves")
    )

    def solved() -> torch.Tensor:
        return ddn.solve(problem, {"x": x}, solver=SOLVER, initial=initial)["u"].sum()

    backward = median_ms(lambda total: torch.autograd.grad(total, x), 40, prepare=solved)
    rows.append(
        ("backward", f"{backward:.2f} ms", f"below 1 ms; error {_gradient_error(problem, x, initial):.0e}")
    )
    rows.append(("gradients across backends", f"{_disagreement():.0e}", "at most 1e-7"))

    table = Table("what", "figure", "beside it", title="ddn_solvers, one thread, medians")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def _everything_compiled(problem: ddn.Problem) -> None:
    program = ddn.compile(problem).program
    z, parameters = np.full((1, N), 0.1), (np.zeros((1, N)),)
    program.first_order(z, parameters)
    program.hessian(z, parameters, np.ones((1, 2)))
    program.adjoint(z, parameters, np.ones((1, 2)), z, np.ones((1, 2)), z, z, np.ones((1, 1)))


def _backend_alone(problem: ddn.Problem, x: torch.Tensor, initial: torch.Tensor) -> Callable[[], Any]:
    """What the adapter does, without verification."""
    from ddn_solvers.adapter import Instance
    from ddn_solvers.registry import adapter

    infinite = np.full(N, np.inf)
    program = ddn.compile(problem).program
    instance = Instance(program, (x.detach().numpy(),), -infinite, infinite, initial.numpy(), "ipopt")
    backend = adapter("casadi")
    return lambda: backend.solve(instance)


def _gradient_error(problem: ddn.Problem, x: torch.Tensor, initial: torch.Tensor) -> float:
    """Against central differences of a re-solve, relative to the gradient's norm."""

    def total(point: torch.Tensor) -> torch.Tensor:
        return ddn.solve(problem, {"x": point}, solver=SOLVER, initial=initial)["u"].sum()

    (gradient,) = torch.autograd.grad(total(x), x)
    step, base = 1e-5, x.detach()
    differences = torch.stack(
        [
            (total(base + step * e) - total(base - step * e)) / (2 * step)
            for e in torch.eye(N, dtype=base.dtype)
        ]
    )
    return float((gradient - differences).norm() / gradient.norm())


def _disagreement() -> float:
    """Largest relative difference of gradients between the three backends on a convex problem."""
    problem = ddn.Problem(
        variables={"u": (20,)},
        parameters={"x": (20,), "r": ()},
        objective=lambda u, x: 0.5 * (u - x).square().sum() + 0.1 * u.exp().sum(),
        equality=lambda u: u.sum(),
        inequality=lambda u, r: u.square().sum() - r**2,
        bounds={"u": (-0.3, None)},
    )
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    r = torch.ones((), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(20, dtype=torch.float64)
    gradients = []
    for solver in ("scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt"):
        point = ddn.solve(problem, {"x": x, "r": r}, solver=solver)["u"]
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(point @ weights, (x, r))]))
    return max(float((g - gradients[0]).norm() / gradients[0].norm()) for g in gradients)


if __name__ == "__main__":
    main()
