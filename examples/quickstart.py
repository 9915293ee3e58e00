"""Project a point onto a plane, a ball and bounds, and differentiate the projection.

    y(x, r) = argmin_u 1/2 |u - x|^2   subject to   sum(u) = 0,  |u|^2 <= r^2,  u <= x

The problem is declared once; any backend solves it, and the gradient does not depend on which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import ddn_solvers as ddn

problem = ddn.Problem(
    variables={"u": (3,)},
    parameters={"x": (3,), "r": ()},
    objective=lambda u, x: 0.5 * (u - x).square().sum(),
    equality={"plane": lambda u: u.sum()},
    inequality={"ball": lambda u, r: u.square().sum() - r**2},
    bounds={"u": (None, "x")},
)


@dataclass
class Result:
    """What the example computed, detached."""

    point: torch.Tensor  # (3,)
    plane: torch.Tensor  # multiplier of the plane, free in sign
    ball: torch.Tensor  # multiplier of the ball, >= 0
    gradient_x: torch.Tensor  # of the point's first component, (3,)
    gradient_r: torch.Tensor
    ok: bool  # a unique two-sided derivative exists and was computed
    batch: torch.Tensor  # projections of a batch, (2, 3)


def main(solver: str = "auto") -> Result:
    """Solve one instance and a batch, print what is known about them, and return it."""
    x = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64, requires_grad=True)
    r = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    # One instance, with everything that is known about its solution.
    solution = ddn.solve(problem, {"x": x, "r": r}, solver=solver)
    gradient_x, gradient_r = torch.autograd.grad(solution["u"][0], [x, r])
    print(f"solved by    {solution.stats.backend[0]}:{solution.stats.method[0]}")
    print(f"point        {_numbers(solution['u'])}")
    print(f"multipliers  plane {_numbers(solution.dual.equality['plane'])}, ", end="")
    print(f"ball {_numbers(solution.dual.inequality['ball'])}")
    print(f"d u_0 / d x  {_numbers(gradient_x)}")
    print(f"d u_0 / d r  {_numbers(gradient_r)}")
    print(f"certificate  {solution.certificate}")

    # The same as a torch module; any leading batch dimensions of the parameters broadcast.
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    batch = layer(torch.stack([x, 0.5 * x]), r)
    print(f"a batch      {_numbers(batch[0])}\n             {_numbers(batch[1])}")

    return Result(
        point=solution["u"].detach(),
        plane=solution.dual.equality["plane"].detach(),
        ball=solution.dual.inequality["ball"].detach(),
        gradient_x=gradient_x,
        gradient_r=gradient_r,
        ok=bool(solution.certificate.ok),
        batch=batch.detach(),
    )


def _numbers(tensor: torch.Tensor) -> str:
    return "  ".join(f"{value:+.6f}" for value in tensor.detach().reshape(-1).tolist())


if __name__ == "__main__":
    main()
