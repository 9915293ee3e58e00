"""Robust pooling: penalties, objectives with their minima, and who gets the gradient.

y = argmin_u  sum_i phi(u - x_i; alpha)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from style import BLUE, DARK, LIGHT, ORANGE

import ddn_solvers as ddn
from ddn_solvers.nodes import RobustPool, robust_pool

D = torch.float64
PENALTIES = ("quadratic", "pseudo-huber", "huber", "welsch", "truncated")
TITLES = {"truncated": "Truncated quadratic"}
TWO = torch.tensor([-2.0, 2.0], dtype=D)  # the paper's example; alpha = 1 throughout
OUTLIERS = torch.tensor([-0.9, -0.5, -0.2, 0.0, 0.1, 0.35, 0.6, 0.95, 5.0, 5.6], dtype=D)


@dataclass
class Pool:
    """A pool of points and what the library finds in it."""

    penalty: str
    x: torch.Tensor  # (n,)
    grid: torch.Tensor  # values of u: (k,)
    objective: torch.Tensor  # at these: (k,)
    minimum: torch.Tensor  # the global one, by the node
    minima: torch.Tensor  # local ones, by the generic problem; the ends of an interval: (m,)
    heights: torch.Tensor  # the objective at these: (m,)
    slopes: torch.Tensor  # dy/dx_i: (n,)


def _pooling(penalty: str, x: torch.Tensor) -> tuple[ddn.Problem, dict[str, torch.Tensor]]:
    """The generic problem of the node, and its parameters."""
    ones = {"alpha": torch.ones((), dtype=D), "weights": torch.ones(len(x), dtype=D)}
    return RobustPool(penalty).problem(len(x)), {"x": x} | ones


def objective(penalty: str, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The problem's own objective at every u: (k,). Of the one point x = 0 it is the penalty."""
    problem, values = _pooling(penalty, x)
    function: Any = problem.objective
    return torch.func.vmap(lambda u: function(u=u, **values))(u)


def _beside_valleys(grid: torch.Tensor, heights: torch.Tensor) -> torch.Tensor:
    """Points one step uphill of every valley: no minimum is missed, and none is on a flat stretch or a hill."""
    left, right = heights[:-2] - heights[1:-1], heights[2:] - heights[1:-1]
    valley = (left > -1e-9) & (right > -1e-9)
    return torch.cat([grid[:-2][valley & (left > 1e-9)], grid[2:][valley & (right > 1e-9)]])


def pool(penalty: str, x: torch.Tensor, low: float, high: float) -> Pool:
    """The objective over [low, high], its minima, and the derivative of the global one."""
    problem, values = _pooling(penalty, x)
    grid = torch.linspace(low, high, 601, dtype=D)
    heights = objective(penalty, x, grid)
    starts = _beside_valleys(grid, heights)
    many = values | {"x": x.expand(len(starts), -1)}
    # IPOPT goes round in circles where Huber's objective is flat; what it has found by then is verified all the same.
    found = ddn.solve(problem, many, solver="casadi:ipopt", initial=starts, options={"max_iter": 30})
    minima = torch.unique((found["u"].detach() * 1e9).round()) / 1e9
    points = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)  # Huber's two points: an interval is best
        minimum = robust_pool(points, penalty)
        (slopes,) = torch.autograd.grad(minimum, points)
    return Pool(
        penalty,
        x,
        grid,
        heights,
        minimum.detach(),
        minima,
        objective(penalty, x, minima),
        slopes,
    )


def draw_penalties(figure: Figure) -> dict[str, tuple[Pool, Pool]]:
    """Penalties, objectives of the paper's two points and of ten points with two outliers, derivatives."""
    panels = figure.subplots(4, 5, height_ratios=(1, 1, 1, 0.6))
    pools, z = {}, torch.linspace(-4, 4, 401, dtype=D)
    for column, penalty in zip(panels.T, PENALTIES, strict=True):
        two, ten = pool(penalty, TWO, -4.5, 4.5), pool(penalty, OUTLIERS, -2.5, 7)
        pools[penalty] = two, ten
        column[0].plot(z, objective(penalty, torch.zeros(1, dtype=D), z), color=BLUE, lw=1.8)
        column[0].set_title(TITLES.get(penalty, penalty.title()))
        for axes, shown in zip(column[1:3], (two, ten), strict=True):
            _draw_objective(axes, shown)
        column[3].vlines(ten.x, 0, ten.slopes, color=BLUE, lw=1.8)
        column[3].plot(ten.x, ten.slopes, "o", ms=3.5, color=BLUE)
        column[3].axhline(0, color=LIGHT, lw=1, zorder=0)
        column[3].set(xlim=column[2].get_xlim(), ylim=(-0.02, 0.23))
        for axes, first in zip(column, (-4, -4, -2, -2), strict=True):
            axes.set_xticks(range(first, 7 if axes in column[2:] else 5, 2))
        for axes, symbol in zip(column, ("z", "u", "u", "x_i"), strict=True):
            axes.set_xlabel(rf"${symbol}/\alpha$", labelpad=1)
    rows = (r"$\phi(z; \alpha)$", r"$f$,  $x = (-2\alpha, 2\alpha)$", "$f$,  two outliers", "$dy/dx_i$")
    for axes, row in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(row)
    figure.align_ylabels(panels[:, 0])
    _legend_of_pools(figure)
    return pools


def _draw_objective(axes: Axes, pool: Pool) -> None:
    axes.plot(pool.grid, pool.objective, color=BLUE, lw=1.8)
    lowest = float(pool.heights.min())
    flat = pool.objective < lowest + 1e-9
    if int(flat.sum()) > 1:
        axes.plot(pool.grid[flat], pool.objective[flat], color=ORANGE, lw=4, solid_capstyle="round")
    _draw_minima(axes, pool)
    ticks = {"color": DARK, "transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(pool.x, torch.zeros(len(pool.x)), "|", ms=11, mew=1.3, **ticks)
    axes.set_ylim(top=1.12 * float(pool.objective.max()) - 0.12 * lowest)
    if (pool.minima.diff() < 0.5).any():
        _draw_enlarged(axes, pool, lowest)


def _draw_enlarged(axes: Axes, pool: Pool, lowest: float) -> None:
    """The lowest valley again, where its minima are too close to tell apart."""
    inset = axes.inset_axes((0.47, 0.2, 0.26, 0.5))
    inset.plot(pool.grid, pool.objective, color=BLUE, lw=1.4)
    _draw_minima(inset, pool)
    u = float(pool.minimum)
    inset.set(xlim=(u - 0.45, u + 0.25), ylim=(lowest - 0.03, lowest + 0.16), xticks=[], yticks=[])
    inset.spines[:].set(visible=True, color=LIGHT)


def _draw_minima(axes: Axes, pool: Pool) -> None:
    lowest = float(pool.heights.min())
    for u, height in zip(pool.minima.tolist(), pool.heights.tolist(), strict=True):
        best = height < lowest + 1e-9
        mark = {"color": ORANGE, "ms": 6, "zorder": 4} if best else {"color": "white", "ms": 4.5, "zorder": 3}
        axes.plot(u, height, "o", mec=ORANGE, mew=1.3, **mark)


def _legend_of_pools(figure: Figure) -> None:
    marks: list[tuple[str, dict[str, Any]]] = [
        ("global minimum (a bar where it is an interval)", {"marker": "o", "ms": 6, "color": ORANGE}),
        (
            "local minimum",
            {"marker": "o", "ms": 4.5, "color": "white", "markeredgecolor": ORANGE, "markeredgewidth": 1.3},
        ),
        ("points $x_i$", {"marker": "|", "ms": 10, "markeredgewidth": 1.3, "color": DARK}),
    ]
    handles = [Line2D([], [], ls="", label=label, **mark) for label, mark in marks]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
