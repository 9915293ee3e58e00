"""Projections on Lp spheres, and the field of gradients through them, both ways at the kinks.

y = argmin_u  1/2 |u - x|^2   subject to   |u|_p = 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from style import BLUE, GREEN, GREY, LIGHT, ORANGE

import ddn_solvers as ddn

D = torch.float64
NORMS = {"L2": 2.0, "L1": 1.0, "Linf": math.inf}
LATEX = {"L2": "2", "L1": "1", "Linf": "\\infty"}
TARGET = torch.tensor([0.45, 1.0], dtype=D)  # a direction: the target is where it meets the sphere
EXAMPLE = torch.tensor([1.7, 0.55], dtype=D)


@dataclass
class Projections:
    """Points, their projections on one sphere, and the gradient of 1/2 |y - t|^2 both ways."""

    p: float
    x: torch.Tensor  # (k, 2); the first is the example
    y: torch.Tensor  # (k, 2)
    target: torch.Tensor  # t: (2,)
    manifold: torch.Tensor  # gradient by x through Dzy: (k, 2)
    clarke: torch.Tensor  # and through Dy: (k, 2)


def sphere(p: float) -> ddn.Problem:
    """The Euclidean projection on |u|_p = 1."""
    return ddn.Problem(
        {"u": (2,)},
        {"x": (2,)},
        lambda u, x: 0.5 * (u - x).square().sum(),
        {"sphere": lambda u: torch.linalg.vector_norm(u, p) - 1},
    )


def project(p: float, x: torch.Tensor) -> Projections:
    """Project all points at once, starting on the rays to them, and differentiate the same y both ways."""
    x = x.clone().requires_grad_()
    start = (x / torch.linalg.vector_norm(x, p, dim=-1, keepdim=True)).detach()
    target = TARGET / torch.linalg.vector_norm(TARGET, p)
    problem = sphere(p)
    found = ddn.solve(problem, {"x": x}, initial=start)["u"].detach()
    gradients = []
    for nonsmooth in ("manifold", "clarke"):
        y = ddn.attach(problem, {"x": x}, found, policy=ddn.Policy(nonsmooth=nonsmooth))["u"]
        gradients.append(torch.autograd.grad(0.5 * (y - target).square().sum(), x)[0])
    return Projections(p, x.detach(), found, target, *gradients)


def draw_projections(figure: Figure) -> dict[str, Projections]:
    """Projections of a point and of a ring, and the descent directions of a loss on the projection."""
    panels = figure.subplots(2, 3)
    angles = torch.linspace(0, 2 * math.pi, 41, dtype=D)[:-1] + 0.03
    ring = 1.9 * torch.stack([angles.cos(), angles.sin()], -1)
    axis = torch.linspace(-2, 2, 14, dtype=D)
    grid = torch.cartesian_prod(axis, axis)
    found = {}
    for (above, below), (name, p) in zip(panels.T, NORMS.items(), strict=True):
        outside = grid[torch.linalg.vector_norm(grid, p, dim=-1) > 0.45]
        result = found[name] = project(p, torch.cat([EXAMPLE[None], ring, outside]))
        _draw_projections(above, result, 1 + len(ring))
        _draw_field(below, result, 1 + len(ring))
        above.set_title(f"$\\|u\\|_{{{LATEX[name]}}} = 1$")
        for axes in (above, below):
            _draw_sphere(axes, p)
            axes.set(aspect="equal", xlim=(-2.25, 2.25), ylim=(-2.25, 2.25), xticks=range(-2, 3))
        below.set_xlabel("$x_1$")
    for axes in panels[:, 0]:
        axes.set_ylabel("$x_2$")
    labels = {
        BLUE: "descent of $\\frac{1}{2}|y - t|^2$ through $D^z y$, on the manifold of the kink",
        GREY: "and through $Dy$ (Clarke), where it differs",
    }
    handles = [Line2D([], [], color=colour, lw=1.8, label=label) for colour, label in labels.items()]
    handles.append(
        Line2D([], [], color=BLUE, marker=".", ms=5, ls="", label="no descent: $D^z y$ keeps $y$ where it is")
    )
    handles.append(Line2D([], [], color=ORANGE, marker="*", ms=11, ls="", label="target $t$"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return found


def _draw_sphere(axes: Axes, p: float) -> None:
    angles = torch.linspace(0, 2 * math.pi, 361, dtype=D)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    curve = directions / torch.linalg.vector_norm(directions, p, dim=-1, keepdim=True)
    axes.plot(*curve.T, color=GREEN, lw=1.8, zorder=1)


def _draw_projections(axes: Axes, found: Projections, count: int) -> None:
    for x, y in zip(found.x[1:count], found.y[1:count], strict=True):
        axes.plot(*torch.stack([x, y]).T, color=LIGHT, lw=1)
        axes.plot(*y, "o", ms=3.5, color=GREY)
    x, y = found.x[0], found.y[0]
    axes.annotate("", y, x, arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 1.6, "shrinkB": 2})
    axes.plot(*x, "o", ms=6, color=BLUE, zorder=4)
    axes.plot(*y, "o", ms=6, color="white", mec=BLUE, mew=1.5, zorder=4)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    axes.annotate("x", x, (5, 5), textcoords="offset points", color=BLUE, weight="bold", bbox=box)
    axes.annotate("y", y, (-13, -3), textcoords="offset points", color=BLUE, weight="bold", bbox=box)


def _draw_field(axes: Axes, found: Projections, first: int) -> None:
    x, manifold, clarke = found.x[first:], found.manifold[first:], found.clarke[first:]
    differs = (manifold - clarke).norm(dim=-1) > 1e-9
    size = {"angles": "xy", "scale_units": "xy", "scale": 3.5, "width": 0.006}
    axes.quiver(*x[differs].T, *-clarke[differs].T, color=GREY, **size)
    axes.quiver(*x.T, *-manifold.T, color=BLUE, **size)
    still = manifold.norm(dim=-1) < 1e-9
    axes.plot(*x[still].T, ".", ms=3, color=BLUE)
    axes.plot(*found.target, "*", ms=12, color=ORANGE, mec="white", mew=0.8, zorder=4)
