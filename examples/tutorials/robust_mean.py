"""Data moved until their robust mean is zero; those that it does not trust hardly move.

    lower level:  y(x) = argmin_u sum_i phi(u - x_i),   phi(z) = sqrt(1 + z^2) - 1   (pseudo-Huber)
    upper level:  min over x of  J = 1/2 y(x)^2

Closed form: dy/dx_i = w_i / sum w with w_i = phi''(y - x_i) = (1 + (y - x_i)^2)^(-3/2), so that one step moves
x_i by -rate y w_i / sum w. (Gould, Hartley and Campbell 2019, section 5.1.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import ddn_solvers as ddn

POINTS, OUTLIERS, STEPS = 24, 4, 25

problem = ddn.Problem(
    variables={"u": ()},
    parameters={"x": (POINTS,)},
    objective=lambda u, x: (torch.sqrt(1 + (u - x).square()) - 1).sum(),
)


class Result(NamedTuple):
    """What the descent did, detached."""

    data: torch.Tensor  # at each step: (STEPS + 1, POINTS)
    means: torch.Tensor  # (STEPS + 1,)
    first_gradient: torch.Tensor  # of the robust mean by the data at the start: (POINTS,)
    moved: tuple[float, float]  # mean distance that inliers and outliers have moved


def main(solver: str = "auto") -> Result:
    """Descend the upper level through the robust mean, print what moved, and return it."""
    generator = torch.Generator().manual_seed(0)
    x = 1.5 + 0.4 * torch.randn(POINTS, generator=generator, dtype=torch.float64)
    x[-OUTLIERS:] += 8.0
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    data, means, gradients = [], [], []
    for _ in range(STEPS + 1):
        x = x.detach().requires_grad_()
        y = layer(x, initial=x.detach().median())
        (gradient,) = torch.autograd.grad(y, x)
        data.append(x.detach())
        means.append(y.detach())
        gradients.append(gradient)
        x = x - 0.5 * POINTS * y * gradient  # |gradient|^2 is about 1 / POINTS: y about halves
    shift = (data[-1] - data[0]).abs()
    moved = float(shift[:-OUTLIERS].mean()), float(shift[-OUTLIERS:].mean())
    print(f"mean         {data[0].mean():.3f} of the data, robust {means[0]:.3f} -> {means[-1]:.1e}")
    print(f"moved        inliers {moved[0]:.3f}, outliers {moved[1]:.4f}")
    return Result(torch.stack(data), torch.stack(means), gradients[0], moved)


if __name__ == "__main__":
    main()
