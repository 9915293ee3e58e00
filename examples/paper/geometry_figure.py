"""Figure 4: how the constraint bends the unconstrained derivative, for one parameter and one constraint.

    Dy = H^(-1/2) (b~ - (a^ . b~) a^ + c / |a~| a^),   a~ = -H^(-1/2) a,  b~ = -H^(-1/2) b,  a^ = a~ / |a~|

with a = D_Y h, c = D_X h, H and b the derivatives of the Lagrangian's gradient by u and x (equation 27). The sign
of c is that of proposition 4.5; the preprint's figure has the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from style import BLUE, DARK, GREEN, GREY, ORANGE, draw_arrow, label

import ddn_solvers as ddn

D = torch.float64
GROWTH = 0.2  # of the radius with x
CURVED = torch.tensor([[0.9, 0.35], [0.35, 0.6]], dtype=D)


def _centre(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([1.5 + 0.3 * x, 0.9 + 2.0 * x])


def _objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (u - _centre(x)) @ CURVED @ (u - _centre(x))


def _circle(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (u.square().sum() - (1 + GROWTH * x) ** 2)


moving_circle = ddn.Problem(
    {"u": (2,)},
    {"x": ()},
    _objective,
    {"circle": _circle},
)


@dataclass
class Geometry:
    """Equation 27 at one solution; vectors are (2,)."""

    y: torch.Tensor
    multiplier: torch.Tensor
    derivative: torch.Tensor  # Dy, by the library
    root: torch.Tensor  # H^(1/2): (2, 2)
    a: torch.Tensor  # the unit vector a^
    b: torch.Tensor  # b~
    along: torch.Tensor  # (a^ . b~) a^, against the surface
    shift: torch.Tensor  # c / |a~| a^, as the surface moves


def geometry(x: float = 0.0) -> Geometry:
    """Solve, and take equation 27 apart with derivatives that torch makes of the problem's functions."""
    at = torch.tensor(x, dtype=D)
    solution = ddn.solve(moving_circle, {"x": at}, solver="casadi:ipopt", initial=_centre(at))
    derivative = ddn.sensitivity(moving_circle, {"x": at}, solution.primal, solution.dual)
    y, nu = solution["u"].detach(), solution.dual.equality["circle"].detach()

    def slope(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda u: _objective(u, x) + nu * _circle(u, x))(u)

    H, B = torch.func.jacrev(slope, (0, 1))(y, at)
    a, c = torch.func.grad(_circle, (0, 1))(y, at)
    values, vectors = torch.linalg.eigh(H)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    a_tilde, b_tilde = -torch.linalg.solve(root, a), -torch.linalg.solve(root, B)
    unit = a_tilde / a_tilde.norm()
    return Geometry(
        y,
        nu,
        derivative.jacobian(of="u", wrt="x"),
        root,
        unit,
        b_tilde,
        (unit @ b_tilde) * unit,
        c / a_tilde.norm() * unit,
    )


def draw_geometry(figure: Figure) -> Geometry:
    """Left the problem, right the vectors of equation 27 in coordinates scaled by H^(1/2)."""
    left, right = figure.subplots(1, 2)
    found = geometry()
    _draw_surface(left, found)
    _draw_vectors(right, found)
    return found


def _draw_surface(axes: Axes, found: Geometry) -> None:
    step = 0.5  # of x
    first, second = torch.meshgrid(
        torch.linspace(0.1, 2.0, 161, dtype=D), torch.linspace(0.0, 1.5, 161, dtype=D), indexing="xy"
    )
    away = torch.stack([first, second], -1) - _centre(torch.zeros((), dtype=D))
    heights = 0.5 * ((away @ CURVED) * away).sum(-1)
    levels = torch.linspace(0.1, 2, 14).square() / 2
    axes.contour(first, second, heights, levels, colors=GREY, linewidths=0.7, alpha=0.5)
    for x, style in ((0.0, "-"), (step, "--")):
        axes.add_patch(Circle((0, 0), 1 + GROWTH * x, fill=False, edgecolor=GREEN, lw=1.8, ls=style))
    x = torch.linspace(-0.3, 1.2, 16, dtype=D)
    centres = torch.vmap(_centre)(x)
    path = ddn.solve(moving_circle, {"x": x}, solver="casadi:ipopt", initial=centres)["u"]
    axes.plot(*path.T, color=BLUE, lw=1.3, ls=":")
    label(axes, "path of $y$", path[0], (-58, -3), BLUE)
    for arrow, colour, text, offset in (
        (torch.linalg.solve(found.root, found.b), ORANGE, r"$\delta\,Dy_{unc}$", (5, -8)),
        (found.derivative, BLUE, r"$\delta\,Dy$", (-32, 1)),
    ):
        draw_arrow(axes, found.y, step * arrow, colour)
        label(axes, text, found.y + step * arrow, offset, colour)
    axes.plot(*found.y, "o", ms=6, color=BLUE, zorder=6)
    label(axes, "$y(x)$", found.y, (-32, -7), BLUE)
    label(axes, "$h(u, x) = 0$", torch.tensor([0.98, 0.2]), (-70, -4), GREEN)
    label(axes, r"$h(u, x + \delta) = 0$", torch.tensor([1.08, 0.2]), (8, -4), GREEN)
    axes.set(aspect="equal", xlim=(0.1, 2.0), ylim=(0.05, 1.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title("The constraint surface moves with $x$")


def _draw_vectors(axes: Axes, found: Geometry) -> None:
    origin, tangent = torch.zeros(2, dtype=D), torch.stack([-found.a[1], found.a[0]])
    for point, style, text, offset in (  # where the linearised constraint holds
        (origin, "-", "$a^T Dy = 0$", (-82, 0)),
        (found.shift, "--", "$a^T Dy + c = 0$", (6, 0)),
    ):
        ends = torch.stack([point - 1.15 * tangent, point + 0.4 * tangent])
        axes.plot(*ends.T, color=GREEN, lw=1.4, ls=style, zorder=1)
        label(axes, text, max(ends, key=lambda end: -float(end[1])), offset, GREEN)
    rest = found.b - found.along
    for start in (found.along, rest):  # the two parts of b~
        axes.plot(*torch.stack([start, found.b]).T, color=GREY, lw=1, ls=":")
    for tail, arrow, colour, text, offset in (
        (origin, found.b, ORANGE, r"$\tilde{b} = H^{1/2} Dy_{unc}$", (6, 0)),
        (origin, found.along, GREY, r"$(\hat{a} \cdot \tilde{b})\,\hat{a}$", (6, -6)),
        (origin, rest, GREY, r"$\tilde{b} - (\hat{a} \cdot \tilde{b})\,\hat{a}$", (-88, -4)),
        (rest, found.shift, DARK, r"$(c / |\tilde{a}|)\,\hat{a}$", (-62, 3)),
        (origin, rest + found.shift, BLUE, r"$H^{1/2} Dy$", (7, 2)),
        (origin, 0.45 * found.a, DARK, r"$\hat{a}$", (-14, -4)),
    ):
        draw_arrow(axes, tail, arrow, colour)
        label(axes, text, tail + arrow, offset, colour)
    axes.plot(0, 0, "o", ms=4, color=DARK, zorder=6)
    axes.set(aspect="equal", xlim=(-0.95, 1.4), ylim=(-0.5, 1.293), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title("Equation 27")
