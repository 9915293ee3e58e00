"""A linear function on a circle (in 20 dimensions a sphere) whose radius is learnt.

    lower level:  y(c, r) = argmin_u c^T u   subject to   |u|^2 = r^2
    upper level:  min over r of  J = 1/2 |y(c, r) - t|^2

Closed form: y = -r c / |c|, dy/dc = (y y^T / r - r I) / |c|, dy/dr = -c / |c|; J is least at r = -c^T t / |c|.
The objective has no curvature: H = 2 nu I comes from the constraint alone, nu = |c| / (2 r).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import ddn_solvers as ddn

SIZE, STEPS = 20, 40

problem = ddn.Problem(
    variables={"u": (SIZE,)},
    parameters={"c": (SIZE,), "r": ()},
    objective=lambda u, c: c @ u,
    equality={"sphere": lambda u, r: u.square().sum() - r**2},
)


class Result(NamedTuple):
    """What was found, detached."""

    c: torch.Tensor  # (SIZE,)
    target: torch.Tensor  # (SIZE,)
    point: torch.Tensor  # y at the first radius, 1: (SIZE,)
    by_c: torch.Tensor  # dy/dc there: (SIZE, SIZE)
    by_r: torch.Tensor  # dy/dr there: (SIZE,)
    multiplier: torch.Tensor  # nu there
    r: torch.Tensor  # learnt


def main(solver: str = "auto") -> Result:
    """Differentiate the solution, learn the radius, print both, and return them."""
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    target = torch.randn(SIZE, generator=generator, dtype=torch.float64) - 0.5 * c
    r = torch.ones((), dtype=torch.float64, requires_grad=True)
    start = -c / c.norm()  # zero, the default, is where the constraint has no gradient

    solution = ddn.solve(problem, {"c": c, "r": r}, solver=solver, initial=start)
    derivative = ddn.sensitivity(problem, {"c": c, "r": r}, solution.primal, solution.dual)
    by_c, by_r = derivative.jacobian(of="u", wrt="c"), derivative.jacobian(of="u", wrt="r")

    layer = ddn.DeclarativeLayer(problem, solver=solver)
    for _ in range(STEPS):
        loss = 0.5 * (layer(c, r, initial=start) - target).square().sum()
        (gradient,) = torch.autograd.grad(loss, r)
        with torch.no_grad():
            r -= 0.5 * gradient
    multiplier = solution.dual.equality["sphere"].detach()
    print(f"multiplier  {multiplier:.6f}, in closed form {c.norm() / 2:.6f}")
    print(f"radius      {r.item():.10f}, in closed form {-(c @ target) / c.norm():.10f}")
    return Result(c, target, solution["u"].detach(), by_c.detach(), by_r.detach(), multiplier, r.detach())


if __name__ == "__main__":
    main()
