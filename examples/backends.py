"""One convex problem through every backend: the same point, the same gradient, side by side.

    y(m, w, r) = argmin_u  1/k log sum_s exp(-k (R_s + m)^T u)       (entropic risk of a portfolio)
                 subject to  sum(u) = 1,  |u - w|^2 <= r^2,  0 <= u <= 0.12

R holds scenarios of the assets' returns, m shifts their means, w is the portfolio held today and
r limits how far to trade away from it. Smooth, convex, with an equality, a nonlinear inequality
and bounds: SciPy, CVXPY and CasADi all take it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import ddn_solvers as ddn

ASSETS, SCENARIOS, AVERSION = 20, 60, 5.0
SOLVERS = ("scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt", "auto")
STEP = 2e-6  # of the central differences

_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


scenarios = 0.15 * _normal(SCENARIOS, 1) + 0.2 * _normal(SCENARIOS, ASSETS)
means = 0.05 + 0.1 * _normal(ASSETS)
held = torch.softmax(0.3 * _normal(ASSETS), 0)
weights = _normal(ASSETS)  # the loss whose gradient is compared: weights . u


def risk(u: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Entropic risk: between the mean loss (aversion -> 0) and the worst one (-> infinity)."""
    return torch.logsumexp(-AVERSION * (scenarios @ u + m @ u), 0) / AVERSION


problem = ddn.Problem(
    variables={"u": (ASSETS,)},
    parameters={"m": (ASSETS,), "w": (ASSETS,), "r": ()},
    objective=risk,
    equality={"budget": lambda u: u.sum() - 1.0},
    inequality={"turnover": lambda u, w, r: (u - w).square().sum() - r**2},
    bounds={"u": (0.0, 0.12)},
)


@dataclass
class Row:
    """What one backend gave."""

    solver: str  # as asked for
    found_by: str  # backend:method that answered
    point: torch.Tensor  # (ASSETS,)
    gradient: torch.Tensor  # of the loss by m, w and r: (2 ASSETS + 1,)
    differences: torch.Tensor  # the same by central differences of this backend's re-solves
    residual: float  # largest of stationarity, feasibility, complementarity
    ok: bool  # a unique two-sided derivative exists and was computed
    active: int  # active constraints and bounds
    solve_ms: float  # median of forward
    backward_ms: float  # median of backward

    @property
    def difference_error(self) -> float:
        """|gradient - differences| / |differences|, maximum norms."""
        return float((self.gradient - self.differences).abs().max() / self.differences.abs().max())


def run(solver: str, repeats: int = 11) -> Row:
    """Solve with one backend, take the gradient, and compare it with re-solves."""
    inputs = {"m": means.clone(), "w": held.clone(), "r": torch.tensor(0.2, dtype=torch.float64)}
    for tensor in inputs.values():
        tensor.requires_grad_()
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    solution = layer.solve(**inputs)  # the first call compiles, and is not timed
    solve_ms, backward_ms = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        point = layer(**inputs)
        solved = time.perf_counter()
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(weights @ point, [*inputs.values()])]
        )
        backward_ms.append(1e3 * (time.perf_counter() - solved))
        solve_ms.append(1e3 * (solved - started))
    residuals = solution.residuals
    worst = max(residuals.stationarity, residuals.feasibility, residuals.complementarity)
    return Row(
        solver=solver,
        found_by=f"{solution.stats.backend[0]}:{solution.stats.method[0]}",
        point=solution["u"].detach(),
        gradient=gradient,
        differences=_central_differences(layer, inputs),
        residual=float(worst),
        ok=bool(solution.certificate.ok),
        active=sum(int(mask.sum()) for mask in solution.certificate.active.values()),
        solve_ms=statistics.median(solve_ms),
        backward_ms=statistics.median(backward_ms),
    )


def _central_differences(layer: ddn.DeclarativeLayer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All 2 (2 ASSETS + 1) perturbed problems as one batch."""
    centre = torch.cat([tensor.detach().reshape(-1) for tensor in inputs.values()])
    shifts = STEP * torch.eye(centre.numel(), dtype=torch.float64)
    m, w, r = torch.stack([centre + shifts, centre - shifts]).split([ASSETS, ASSETS, 1], dim=-1)
    losses = layer(m, w, r[..., 0]) @ weights
    return (losses[0] - losses[1]) / (2 * STEP)


def table(rows: Sequence[Row]) -> Table:
    """Side by side: against the first row's point and gradient, and against central differences."""
    title = f"One problem: {ASSETS} variables, {rows[0].active} active constraints and bounds"
    shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("solver", no_wrap=True)
    for heading in ("point\nvs first", "gradient\nvs first", "vs finite\ndiffer.", "residual"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for heading in ("solve\nms", "back\nms"):
        shown.add_column(heading, justify="right", no_wrap=True)
    first = rows[0]
    for row in rows:
        apart = (row.gradient - first.gradient).abs().max() / first.gradient.abs().max()
        shown.add_row(
            row.solver if row.solver == row.found_by else f"{row.solver} = {row.found_by}",
            "-" if row is first else f"{(row.point - first.point).abs().max():.0e}",
            "-" if row is first else f"{apart:.0e}",
            f"{row.difference_error:.0e}",
            f"{row.residual:.0e}",
            f"{row.solve_ms:.1f}",
            f"{row.backward_ms:.1f}",
        )
    return shown


@threadpool_limits.wrap(limits=1)  # on matrices this small, threads only wait for each other
def main(solver: str | Sequence[str] = SOLVERS, repeats: int = 11) -> list[Row]:
    """Run the solvers named, print them side by side, and return the rows."""
    rows = [run(name, repeats) for name in ([solver] if isinstance(solver, str) else solver)]
    Console().print(table(rows))
    return rows


if __name__ == "__main__":
    main()
