"""The one style of all pictures."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#d9782d", "#3a9a6b", "#8a8f98"
LIGHT, DARK = "#d5d8dd", "#222222"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw_arrow(axes: Axes, tail: torch.Tensor, step: torch.Tensor, colour: str) -> None:
    """From ``tail`` (2,) to ``tail + step``."""
    style = {
        "arrowstyle": "-|>",
        "color": colour,
        "lw": 1.8,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 13,
    }
    axes.annotate("", (tail + step).tolist(), tail.tolist(), arrowprops=style, zorder=4)


def label(axes: Axes, text: str, at: torch.Tensor, offset: tuple[float, float], colour: str) -> None:
    """A text beside the point ``at`` (2,), ``offset`` in points."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
    axes.annotate(
        text, at.tolist(), offset, textcoords="offset points", color=colour, bbox=box, zorder=3, fontsize=9.5
    )
