"""A point on a circle fitted to a target: the parameters of a projection move until it hits.

    lower level:  y(x, r) = argmin_u 1/2 |u - x|^2   subject to   |u|^2 = r^2
    upper level:  min over x, r of  J = 1/2 |y(x, r) - t|^2

Closed form: y = r x / |x|, dy/dx = (r I - y y^T / r) / |x| and dy/dr = x / |x|; J is zero where r = |t| and x
points at t. (Gould, Hartley and Campbell 2019, equations 8 to 10: DJ = D_Y J Dy.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import ddn_solvers as ddn

STEPS, RATE = 40, 0.5
TARGET = torch.tensor([0.6, 0.9], dtype=torch.float64)

problem = ddn.Problem(
    variables={"u": (2,)},
    parameters={"x": (2,), "r": ()},
    objective=lambda u, x: 0.5 * (u - x).square().sum(),
    equality={"circle": lambda u, r: u.square().sum() - r**2},
)


class Result(NamedTuple):
    """What the descent did, detached."""

    path: torch.Tensor  # y at each step: (STEPS + 1, 2)
    losses: torch.Tensor  # (STEPS + 1,)
    x: torch.Tensor  # where it ended: (2,)
    r: torch.Tensor
    first_gradient: torch.Tensor  # of J by x and r at the start: (3,)


def main(solver: str = "auto") -> Result:
    """Descend the upper level through the projection, print where it came, and return the path."""
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    x = torch.tensor([1.0, -0.2], dtype=torch.float64, requires_grad=True)
    r = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    path, gradients = [], []
    for _ in range(STEPS + 1):
        y = layer(x, r, initial=x.detach())  # the nearest point: from the far side one starts at a maximum
        path.append(y.detach())
        gradients.append(torch.autograd.grad(0.5 * (y - TARGET).square().sum(), (x, r)))
        with torch.no_grad():
            for parameter, gradient in zip((x, r), gradients[-1], strict=True):
                parameter -= RATE * gradient
    points = torch.stack(path)
    losses = 0.5 * (points - TARGET).square().sum(-1)
    print(f"loss    {losses[0]:.2e} -> {losses[-1]:.2e} in {STEPS} steps of gradient descent")
    print(f"radius  {r.item():.6f}, |target| {TARGET.norm():.6f}")
    print(f"point   {points[-1].tolist()}, target {TARGET.tolist()}")
    return Result(points, losses, x.detach(), r.detach(), torch.cat([gradients[0][0], gradients[0][1][None]]))


if __name__ == "__main__":
    main()
