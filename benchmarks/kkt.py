"""The KKT module's figures: many constraints, many parameters, memory, and what gradients are exact to.

One process, one thread, medians; every time stands beside the accuracy of what it computed. Run it as
``python benchmarks/kkt.py``; it takes some minutes, most of them the paper's formula with torch.autograd.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from spine import median_ms

import ddn_solvers as ddn

D = torch.float64
SPHERES, M, BATCH = 50, 100, 4
MEMORY_N, MEMORY_M = 10**6, 10
SOLVERS = ("casadi:daqp", "casadi:ipopt", "casadi:osqp", "cvxpy:CLARABEL", "scipy:SLSQP")
SIZES, CONDITIONS = (50, 100, 200), (1e2, 1e4, 1e6)
Arrays = dict[str, np.ndarray]


# -- 50 spheres in 100 variables ----------------------------------------------------------------------------


def distance(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (1 + (u - x).square()).sqrt().sum()


def spheres(u: torch.Tensor, C: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return (u - C).square().sum(-1) - r**2


def spheres_row() -> tuple[str, str, str]:
    """A point where 50 random spheres meet is stationary for an x that is found from random multipliers."""
    problem = ddn.Problem({"u": (M,)}, {"x": (M,), "C": (SPHERES, M), "r": (SPHERES,)}, distance, spheres)
    generator = torch.Generator().manual_seed(0)
    u, C = (torch.randn(BATCH, *shape, dtype=D, generator=generator) for shape in ((M,), (SPHERES, M)))
    multipliers = 0.5 * torch.rand(BATCH, SPHERES, dtype=D, generator=generator) / SPHERES / M**0.5
    forces = 2 * torch.einsum("bi,bij->bj", multipliers, u[:, None] - C)  # = -grad f, entries within (-1, 1)
    x = u + forces / (1 - forces.square()).sqrt()
    parameters = {"x": x, "C": C, "r": (u[:, None] - C).norm(dim=-1)}
    leaves = {name: value.requires_grad_() for name, value in parameters.items()}
    v = torch.randn(BATCH, M, dtype=D, generator=generator)

    def attached() -> torch.Tensor:
        return (ddn.attach(problem, leaves, u)["u"] * v).sum()

    ours = median_ms(lambda total: torch.autograd.grad(total, list(leaves.values())), 10, prepare=attached)
    found = torch.autograd.grad(attached(), list(leaves.values()))
    samples = [{name: value[i].detach() for name, value in parameters.items()} for i in range(BATCH)]
    started = time.perf_counter()
    paper = [proposition_4_5(u[i], sample, v[i]) for i, sample in enumerate(samples)]
    theirs = 1e3 * (time.perf_counter() - started)
    error = max(
        relative(g, torch.stack(rows)) for g, rows in zip(found, zip(*paper, strict=True), strict=True)
    )
    beside = f"below 50 ms; Prop. 4.5 by torch.autograd {theirs / 1e3:.1f} s, {theirs / ours:.0f} times; they differ by {error:.0e}"
    return f"backward, {SPHERES} spheres, m = {M}, batch {BATCH}", f"{ours:.1f} ms", beside


def proposition_4_5(
    u: torch.Tensor, parameters: dict[str, torch.Tensor], v: torch.Tensor
) -> list[torch.Tensor]:
    """v^T Dy with Dy = H^-1 A^T (A H^-1 A^T)^-1 (A H^-1 B - C) - H^-1 B, one sample, derivatives by autograd.

    Gould et al. 2019; multipliers by A^T lambda = grad f, signs as in the paper. Each derivative is a row of
    torch.autograd.grad, as the reference implementation has it: A and grad f, H one constraint at a time;
    A, C and B are formed.
    """
    u = u.clone().requires_grad_()
    p = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    inputs = list(p.values())
    (gradient,) = torch.autograd.grad(distance(u, p["x"]), u, create_graph=True)
    h = spheres(u, p["C"], p["r"])
    normals = [torch.autograd.grad(value, u, create_graph=True)[0] for value in h]
    A = torch.stack(normals).detach()
    lam = torch.linalg.lstsq(A.T, gradient.detach()).solution
    H = rows(gradient, u) - sum(weight * rows(a, u) for weight, a in zip(lam, normals, strict=True))
    B = rows(gradient, *inputs) - rows(lam @ torch.stack(normals), *inputs)
    C = rows(h, *inputs)
    HB, HA = torch.linalg.solve(H, B), torch.linalg.solve(H, A.T)
    Dy = HA @ torch.linalg.solve(A @ HA, A @ HB - C) - HB
    pieces = (v @ Dy).split([value.numel() for value in inputs])
    return [piece.reshape(value.shape) for piece, value in zip(pieces, inputs, strict=True)]


def rows(values: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """The Jacobian, a row at a time."""
    found = []
    for value in values:
        gradients = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
        found.append(torch.cat([g.reshape(-1) for g in flat]))
    return torch.stack(found)


# -- many parameters ----------------------------------------------------------------------------------------


def robust_fit(n: int, m: int, batch: int) -> tuple[ddn.Problem, dict[str, torch.Tensor], torch.Tensor]:
    """sum_i sqrt(1 + (x_i^T u - 1)^2) on the unit sphere, x (n / m, m), with its solutions."""
    problem = ddn.Problem(
        {"u": (m,)},
        {"x": (n // m, m)},
        lambda u, x: (1 + (x @ u - 1).square()).sqrt().sum(),
        lambda u: u.square().sum() - 1,
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n // m, m, dtype=D, generator=generator)
    initial = torch.nn.functional.normalize(x.mean(1), dim=-1)
    return problem, {"x": x}, ddn.solve(problem, {"x": x}, initial=initial)["u"]


def many_parameters_row() -> tuple[str, str, str]:
    n, m, batch = 20_000, 50, 2
    problem, parameters, u = robust_fit(n, m, batch)
    v = torch.randn(batch, m, dtype=D, generator=torch.Generator().manual_seed(1))

    def prepared() -> ddn.Sensitivity:
        return ddn.sensitivity(problem, parameters, u)

    took = median_ms(lambda at: at.vjp({"u": v}), 20, prepare=prepared)
    at = prepared()
    again = median_ms(lambda: at.vjp({"u": v}), 20)
    tangent = torch.randn(parameters["x"].shape, dtype=D, generator=torch.Generator().manual_seed(2))
    step = 1e-6
    ahead, behind = (
        ddn.solve(problem, {"x": parameters["x"] + sign * step * tangent}, initial=u)["u"] for sign in (1, -1)
    )
    along = ((ahead - behind) * v).sum() / (2 * step)
    error = abs((at.vjp({"u": v})["x"] * tangent).sum() / along - 1).item()
    beside = f"below 20 ms; {again:.1f} ms for a second one; differences of a re-solve: {error:.0e}"
    return f"vjp, m = {m}, n = {n}, batch {batch}, factorization included", f"{took:.1f} ms", beside


def memory_row() -> tuple[str, str, str]:
    """In a process of its own, whose peak is reset before the vjp (Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return f"peak memory of a vjp, m = {MEMORY_M}, n = 1e6", "-", "measured on Linux only"
    code = "import kkt; kkt.measure_memory()"
    here = str(Path(__file__).parent)
    # Large arrays go back to the system when they are freed, so that none hides behind an earlier one.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=True
    )
    extra, error = map(float, done.stdout.split())
    smaller, took = (vjp_ms(n) for n in (MEMORY_N // 10, MEMORY_N))
    beside = (
        f"{extra / (8 * MEMORY_N / 2**20):.1f} vectors of n numbers (m x n: {MEMORY_M}); {took:.0f} ms, "
        f"{took / smaller:.0f} times that of n / 10; against autograd {error:.0e}"
    )
    return f"peak memory of a vjp, m = {MEMORY_M}, n = 1e6", f"{extra:.0f} MiB", beside


def vjp_ms(n: int) -> float:
    problem, parameters, u = robust_fit(n, MEMORY_M, 1)
    at = ddn.sensitivity(problem, parameters, u)
    return median_ms(lambda: at.vjp({"u": torch.ones(1, MEMORY_M, dtype=D)}), 5)


def measure_memory() -> None:
    """MiB above what was there before, and error against derivatives by autograd."""
    torch.set_num_threads(1)
    problem, parameters, u = robust_fit(MEMORY_N, MEMORY_M, 1)
    at, v = ddn.sensitivity(problem, parameters, u), torch.ones(1, MEMORY_M, dtype=D)
    at.vjp({"u": v})
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    found = at.vjp({"u": v})["x"]
    extra = status("VmHWM") - before
    print(extra, relative(found, fit_vjp(parameters["x"][0], u[0], v[0])[None]))


def status(field: str) -> float:
    """MiB"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def fit_vjp(x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same gradient with the reduced system on the sphere's tangent plane and derivatives by autograd."""
    x = x.clone().requires_grad_()

    def forces(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        residual = x @ u - 1
        return x.T @ (residual / (1 + residual.square()).sqrt())

    weights = (1 + (x @ u - 1).square()).pow(-1.5).detach()
    multiplier = -(forces(u, x.detach()) @ u) / 2  # grad f + 2 nu u = 0 with |u| = 1
    H = (x.detach().T * weights) @ x.detach() + 2 * multiplier * torch.eye(len(u), dtype=D)
    tangent = torch.linalg.svd(u[None], full_matrices=True)[2][1:].T
    w = tangent @ torch.linalg.solve(tangent.T @ H @ tangent, tangent.T @ v)
    (gradient,) = torch.autograd.grad(-(w @ forces(u, x)), x)
    return gradient


# -- what gradients are exact to ----------------------------------------------------------------------------


def accuracy_table() -> Table:
    """Random strictly convex QPs of given condition, by each backend at its own tolerance."""
    table = Table("solver", "n", *(f"condition {c:.0e}" for c in CONDITIONS))
    table.title = "relative error of the gradient (solve, backward in ms); at most 1e-9"
    cases = {(n, c): random_qp(n, c) for n in SIZES for c in CONDITIONS}
    for solver in SOLVERS:
        for n in SIZES:
            if solver == "scipy:SLSQP" and n > SIZES[0]:
                continue
            table.add_row(solver, str(n), *(accuracy(solver, *cases[n, c]) for c in CONDITIONS))
    return table


def random_qp(n: int, condition: float) -> tuple[ddn.Problem, Arrays, Arrays, np.ndarray]:
    """A QP with n / 5 equalities and n / 2 inequalities, half of them active; its gradient to 80 bits."""
    rng = np.random.default_rng(n)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    P = (basis * np.logspace(0, -np.log10(condition), n)) @ basis.T
    P = (P + P.T) / 2
    A, G = (rng.standard_normal((rows, n)) / n**0.5 for rows in (n // 5, n // 2))
    z, nu, lam = rng.standard_normal(n), rng.standard_normal(n // 5), rng.uniform(0.5, 2.0, n // 2)
    active = np.arange(n // 2) % 2 == 0
    lam = np.where(active, lam, 0.0)
    slack = np.where(active, 0.0, rng.uniform(0.5, 2.0, n // 2))
    arrays = {"P": P, "q": -(P @ z + A.T @ nu + G.T @ lam), "A": A, "b": A @ z, "G": G, "h": G @ z + slack}
    v = rng.standard_normal(n)
    problem = ddn.quadratic_program(n, equalities=n // 5, inequalities=n // 2)
    return problem, arrays, exact_gradient(arrays, active, v), v


def exact_gradient(arrays: Arrays, active: np.ndarray, v: np.ndarray) -> Arrays:
    """Point, multipliers and adjoint of the active set in extended precision."""
    P, q, A, b, G, h = (a.astype(np.longdouble) for a in arrays.values())
    C, n, rows = np.concatenate([A, G[active]]), len(q), len(b) + int(active.sum())
    K = np.block([[P, C.T], [C, np.zeros((rows, rows))]])
    right = np.stack([np.concatenate([-q, b, h[active]]), np.concatenate([v, np.zeros(rows)])], axis=1)
    (z, w), (y, s) = (part.T for part in np.split(solved(K, right), [n]))
    split = len(b)
    lam, t = (np.zeros(len(h), dtype=np.longdouble) for _ in range(2))
    lam[active], t[active] = y[split:], s[split:]
    return {
        "P": -(np.outer(w, z) + np.outer(z, w)) / 2, "q": -w,
        "A": -(np.outer(y[:split], w) + np.outer(s[:split], z)), "b": s[:split],
        "G": -(np.outer(lam, w) + np.outer(t, z)), "h": t,
    }  # fmt: skip


def solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Gaussian elimination with partial pivoting, in the dtype given: LAPACK has no 80 bits."""
    a, n = np.concatenate([matrix, right.astype(matrix.dtype)], axis=1), len(matrix)
    for k in range(n):
        pivot = k + int(np.argmax(abs(a[k:, k])))
        a[[k, pivot]] = a[[pivot, k]]
        a[k + 1 :, k:] -= np.outer(a[k + 1 :, k] / a[k, k], a[k, k:])
    x = a[:, n:]
    for k in reversed(range(n)):
        x[k] = (x[k] - a[k, k + 1 : n] @ x[k + 1 :]) / a[k, k]
    return x


def accuracy(solver: str, problem: ddn.Problem, arrays: Arrays, exact: Arrays, v: np.ndarray) -> str:
    parameters = {name: torch.from_numpy(a).requires_grad_() for name, a in arrays.items()}
    cotangent = torch.from_numpy(v)

    def total() -> torch.Tensor:
        return ddn.solve(problem, parameters, solver=solver)["u"] @ cotangent

    def backward(value: torch.Tensor) -> Any:
        return torch.autograd.grad(value, list(parameters.values()))

    try:
        found = backward(total())
    except ddn.SolveError as error:
        return f"no solution: {error.solution.status[0].value}"
    pairs = zip(found, exact.values(), strict=True)
    error = max(relative(g, torch.from_numpy(e.astype(float))) for g, e in pairs)
    return f"{error:.0e} ({median_ms(total, 3):.0f}, {median_ms(backward, 3, prepare=total):.1f})"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    torch.set_num_threads(1)
    if np.finfo(np.longdouble).eps > 1e-18:
        warnings.warn("no extended precision here: errors below 1e-10 are the reference's own", stacklevel=1)
    measured: tuple[Callable[[], tuple[str, str, str]], ...] = (spheres_row, many_parameters_row, memory_row)
    table = Table("what", "figure", "beside it", title="The KKT module, one thread, medians")
    for row in measured:
        table.add_row(*row())
    console = Console(width=130)
    console.print(table)
    console.print(accuracy_table())


if __name__ == "__main__":
    main()
