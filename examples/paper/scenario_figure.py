"""Figure 3: a solution inside the feasible set, on its boundary with a multiplier, and on it without one.

y = argmin_u  1/2 (u - x)^T Q (u - x)   subject to   g(u) = (|u|^2 - 1) / 2 <= 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from style import BLUE, DARK, GREEN, GREY, ORANGE, draw_arrow, label

import ddn_solvers as ddn

D = torch.float64
Q = torch.tensor([[1.0, 0.45], [0.45, 0.7]], dtype=D)
KINK = torch.tensor([math.cos(-0.1), math.sin(-0.1)], dtype=D)  # on the boundary
PATH = torch.tensor([math.cos(0.75), math.sin(0.75)], dtype=D)  # x = KINK + s PATH
SCENARIOS = {"inactive": -0.8, "active, λ > 0": 0.4, "active, λ = 0": 0.0}
SIDES = ("inactive", "mean", "active")  # what policy.weakly_active may be

bowl_in_disc = ddn.Problem(
    {"u": (2,)},
    {"x": (2,)},
    lambda u, x: 0.5 * (u - x) @ Q @ (u - x),
    inequality={"disc": lambda u: 0.5 * (u.square().sum() - 1)},
)


@dataclass
class Scenario:
    """One position of x, its solution, and the derivative as x moves outwards, by choice of side."""

    x: torch.Tensor  # (2,)
    y: torch.Tensor  # (2,)
    multiplier: torch.Tensor
    one_sided: bool
    derivatives: dict[str, torch.Tensor]  # Dy PATH, by policy.weakly_active: (2,)


def scenarios(s: Sequence[float]) -> list[Scenario]:
    """Solve at x = KINK + s PATH, all at once, and differentiate in the direction PATH."""
    x = KINK + torch.tensor(s, dtype=D)[:, None] * PATH
    solution = ddn.solve(bowl_in_disc, {"x": x}, solver="casadi:ipopt")
    derivatives = {}
    for side in SIDES:
        at = ddn.sensitivity(bowl_in_disc, {"x": x}, solution.primal, policy=ddn.Policy(weakly_active=side))
        derivatives[side] = at.jacobian(of="u", wrt="x") @ PATH
    y, multipliers = solution["u"].detach(), solution.dual.inequality["disc"].detach()
    return [
        Scenario(x[i], y[i], multipliers[i], bool(one_sided), {side: derivatives[side][i] for side in SIDES})
        for i, one_sided in enumerate(solution.certificate.one_sided)
    ]


def draw_scenarios(figure: Figure) -> dict[str, Scenario]:
    """The three scenarios, and the derivative along the way through them."""
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.15))
    found = dict(zip(SCENARIOS, scenarios(list(SCENARIOS.values())), strict=True))
    for axes, symbol, (name, shown) in zip(panels[:3], "y₁ y₂ y₃".split(), found.items(), strict=True):
        _draw_scenario(axes, shown)
        axes.set_title(f"{symbol}  {name}")
    away = torch.cat([torch.linspace(-1, -0.005, 12), torch.linspace(0.005, 1, 40)]).tolist()
    _draw_speed(panels[3], dict(zip(away, scenarios(away), strict=True)), list(found.values())[2])
    return found


def _draw_scenario(axes: Axes, shown: Scenario) -> None:
    axes.add_patch(Circle((0, 0), 1, facecolor=GREEN, alpha=0.15, lw=0))
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=GREEN, lw=1.8))
    first, second = torch.meshgrid(
        torch.linspace(-1.3, 2.3, 161, dtype=D), torch.linspace(-1.3, 1.7, 161, dtype=D), indexing="xy"
    )
    away = torch.stack([first, second], -1) - shown.x
    levels = torch.linspace(0.2, 2.4, 9).square() / 2
    axes.contour(
        first, second, 0.5 * ((away @ Q) * away).sum(-1), levels, colors=GREY, linewidths=0.7, alpha=0.5
    )
    slope = -(Q @ (shown.y - shown.x))
    if slope.norm() > 1e-6:
        draw_arrow(axes, shown.y, slope, ORANGE)
        label(axes, "$-D_Y f$", shown.y + slope, (3, 4), ORANGE)
        axes.plot(*shown.x, "+", ms=9, mew=1.8, color=DARK, zorder=5)
        label(axes, "$x$", shown.x, (6, -11), DARK)
        label(axes, "$y$", shown.y, (-14, -4), BLUE)
    else:
        label(axes, "$y = x$", shown.y, (-36, -4), BLUE)
    for side in SIDES if shown.one_sided else ("active",):
        tip = 0.9 * shown.derivatives[side]
        draw_arrow(axes, shown.y, tip, BLUE)
        label(axes, side if shown.one_sided else "$Dy\\,d$", shown.y + tip, (5, 2), BLUE)
    axes.plot(*shown.y, "o", ms=6, color=BLUE, zorder=6)
    axes.set(aspect="equal", xlim=(-1.25, 2.25), ylim=(-1.25, 1.65), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_speed(axes: Axes, path: dict[float, Scenario], kink: Scenario) -> None:
    for part in ([s for s in path if s < 0], [s for s in path if s > 0]):
        axes.plot(part, [float(PATH @ path[s].derivatives["active"]) for s in part], color=BLUE, lw=2)
        axes.plot(part, [float(path[s].multiplier) for s in part], color=ORANGE, lw=1.6)
    for side in SIDES:
        height = float(PATH @ kink.derivatives[side])
        axes.plot(0, height, "o", ms=6, color="white", mec=BLUE, mew=1.5, zorder=3)
        axes.annotate(side, (0, height), (9, -3), textcoords="offset points", color=BLUE)
    last = list(path)[-1]
    ends = {
        "$d^T Dy\\,d$": (PATH @ path[last].derivatives["active"], BLUE),
        "$\\lambda$": (path[last].multiplier, ORANGE),
    }
    for text, (height, colour) in ends.items():
        axes.annotate(
            text, (last, float(height)), (4, -3), textcoords="offset points", color=colour, fontsize=9.5
        )
    axes.set(xlabel="$s$,   with $x(s) = y_3 + s\\,d$", title="Along $d$")
    axes.margins(x=0.02)
