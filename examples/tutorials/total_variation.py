"""Total-variation denoising of a signal, its weight learnt on a second measurement.

    lower level:  y(x, w) = argmin_u 1/2 |u - x|^2 + w sum_i |u_(i+1) - u_i|
    upper level:  min over log w of  J = 1/2 |y(x, w) - z|^2,   z another noisy measurement of the same signal

Closed form where the plateaus S of y are known: y_S = mean(x_S) + w d_S / |S| with d_S = +1 for each neighbour
above and -1 for each one below. So dy/dx averages over plateaus, and dy_S/dw = d_S / |S|: only the plateaus'
heights answer to the weight. The differences of zero are kinks of |.|, kept as active constraints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rich.progress import track

import ddn_solvers as ddn

SIZE, NOISE, STEPS = 60, 0.25, 25

problem = ddn.Problem(
    variables={"u": (SIZE,)},
    parameters={"x": (SIZE,), "w": ()},
    objective=lambda u, x, w: 0.5 * (u - x).square().sum() + w * u.diff().abs().sum(),
)


class Result(NamedTuple):
    """What was learnt, detached."""

    clean: torch.Tensor  # (SIZE,)
    noisy: torch.Tensor  # x: (SIZE,)
    validation: torch.Tensor  # z: (SIZE,)
    denoised: torch.Tensor  # y at the learnt weight: (SIZE,)
    by_w: torch.Tensor  # dy/dw there: (SIZE,)
    by_x: torch.Tensor  # dy/dx there: (SIZE, SIZE)
    weights: torch.Tensor  # w at each step: (STEPS + 1,)
    losses: torch.Tensor  # J at each step: (STEPS + 1,)


def main(solver: str = "auto") -> Result:
    """Learn the weight, print what it did to the errors, and return it."""
    generator = torch.Generator().manual_seed(0)
    heights = torch.tensor([0.0, 1.0, 0.4, -0.6, 0.2], dtype=torch.float64)
    clean = heights.repeat_interleave(SIZE // len(heights))
    x, z = clean + NOISE * torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    log_w = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    weights, losses = [], []
    for _ in track(range(STEPS + 1), "learning the weight", transient=True):
        loss = 0.5 * (layer(x, log_w.exp()) - z).square().sum()
        weights.append(log_w.exp().item())
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, log_w)
        with torch.no_grad():
            log_w -= gradient
    w = torch.tensor(weights[-1], dtype=torch.float64)
    solution = layer.solve(x, w)
    derivative = ddn.sensitivity(problem, {"x": x, "w": w}, solution.primal, solution.dual)
    y = solution["u"].detach()
    print(
        f"weight  {weights[0]:.3f} -> {weights[-1]:.3f}, validation loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    print(f"rms     noisy {(x - clean).square().mean().sqrt():.3f}, ", end="")
    print(f"denoised {(y - clean).square().mean().sqrt():.3f}, {_plateaus(y)} plateaus of 5")
    return Result(
        clean,
        x,
        z,
        y,
        derivative.jacobian(of="u", wrt="w").detach(),
        derivative.jacobian(of="u", wrt="x").detach(),
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(losses, dtype=torch.float64),
    )


def _plateaus(y: torch.Tensor) -> int:
    return 1 + int((y.diff().abs() > 1e-8).sum())


if __name__ == "__main__":
    main()
