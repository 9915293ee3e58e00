"""A linear-quadratic controller as one problem: its Jacobian in the initial state is the Riccati gain.

    states x, controls u (x_0) = argmin  sum_(k<T) 1/2 (x_k^T Q x_k + u_k^T R u_k) + 1/2 x_T^T P x_T
                                 subject to  x_(k+1) = A x_k + B u_k,   k = 0, ..., T - 1

Closed form: u_0 = -K x_0. With P the solution of the algebraic Riccati equation, K = (R + B^T P B)^-1 B^T P A for
every horizon T, so that du_0/dx_0 = -K, and the optimal value is 1/2 x_0^T P x_0. A, B, Q and R could be
learnt from here: the layer differentiates in whatever its functions read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.linalg import solve_discrete_are

import ddn_solvers as ddn

STATES, CONTROLS, HORIZON, SIMULATED = 4, 2, 15, 30

_generator = torch.Generator().manual_seed(0)
A = torch.eye(STATES, dtype=torch.float64)
A = A + 0.3 * torch.randn(STATES, STATES, generator=_generator, dtype=torch.float64)
B = torch.randn(STATES, CONTROLS, generator=_generator, dtype=torch.float64)
Q = torch.diag(torch.tensor([2.0, 1.0, 0.5, 1.5], dtype=torch.float64))
R = torch.diag(torch.tensor([0.3, 0.7], dtype=torch.float64))
P = torch.from_numpy(solve_discrete_are(A.numpy(), B.numpy(), Q.numpy(), R.numpy()))
K = torch.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)


def cost(x: torch.Tensor, u: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Of states x_1, ..., x_T (HORIZON, STATES) and controls u_0, ..., u_(T-1) (HORIZON, CONTROLS)."""
    stages = ((x[:-1] @ Q) * x[:-1]).sum() + ((u @ R) * u).sum()
    return 0.5 * (start @ Q @ start + stages + x[-1] @ P @ x[-1])


def dynamics(x: torch.Tensor, u: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """x_(k+1) - A x_k - B u_k, (HORIZON, STATES)."""
    return x - torch.cat([start[None], x[:-1]]) @ A.T - u @ B.T


problem = ddn.Problem(
    variables={"x": (HORIZON, STATES), "u": (HORIZON, CONTROLS)},
    parameters={"start": (STATES,)},
    objective=cost,
    equality={"dynamics": dynamics},
)


class Result(NamedTuple):
    """What was found, detached."""

    gain: torch.Tensor  # -du_0/dx_0: (CONTROLS, STATES)
    value: torch.Tensor  # the optimal cost of the first state
    value_gradient: torch.Tensor  # of it, by the first state: (STATES,)
    states: torch.Tensor  # of the closed loop, the problem solved anew at each: (SIMULATED + 1, STATES)


def main(solver: str = "auto") -> Result:
    """Compare the layer with the Riccati gain, drive the system with it, and return both."""
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    start = torch.tensor([1.0, -0.5, 0.8, 0.3], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(start)
    (value_gradient,) = torch.autograd.grad(solution.objective, start, retain_graph=True)
    rows = [torch.autograd.grad(value, start, retain_graph=True)[0] for value in solution["u"][0]]
    gain = -torch.stack(rows)

    states = [start.detach()]
    for _ in range(SIMULATED):  # model-predictive control: solve, apply the first control, look again
        _, controls = layer(states[-1])
        states.append(A @ states[-1] + B @ controls[0])
    print(f"gain    largest difference from Riccati's {(gain - K).abs().max():.1e}")
    print(f"value   {solution.objective.item():.10f}, 1/2 x^T P x {(0.5 * start @ P @ start).item():.10f}")
    print(f"system  spectral radius {_radius(A):.3f}, closed loop {_radius(A - B @ K):.3f}; ", end="")
    print(f"|x| {states[0].norm():.2f} -> {states[-1].norm():.1e} in {SIMULATED} steps")
    return Result(gain, solution.objective.detach(), value_gradient, torch.stack(states))


def _radius(matrix: torch.Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


if __name__ == "__main__":
    main()
