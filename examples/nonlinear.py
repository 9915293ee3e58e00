"""A non-convex problem with an equality and an inequality, and its gradient against re-solves.

    y(a, s) = argmin_u  sum_i [ exp(a_i u_i) + a_i^2 log(1 + u_i^2) ]
              subject to  |u|^2 = 1  (a sphere),   sum_i u_i^4 <= s^4  (a 4-norm ball)

A sphere is no convex set, so CVXPY refuses this problem by name (``ddn.BackendCannotSolve``);
SciPy and CasADi find the same local minimum from the same start. The gradient that the layer
returns is compared with central differences of the solved problem, component by component.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import ddn_solvers as ddn

SIZE = 20
STEP = 1e-6  # of the central differences: error O(STEP^2) + O(rounding / STEP)


def objective(u: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """An exponential term that is convex, and a logarithmic one that is not."""
    return (torch.exp(a * u) + a.square() * torch.log1p(u.square())).sum()


problem = ddn.Problem(
    variables={"u": (SIZE,)},
    parameters={"a": (SIZE,), "s": ()},
    objective=objective,
    equality={"sphere": lambda u: u.square().sum() - 1.0},
    inequality={"norm": lambda u, s: u.pow(4).sum() - s**4},
)


@dataclass
class Result:
    """What the example computed, detached."""

    point: torch.Tensor  # (SIZE,)
    multiplier: torch.Tensor  # of the 4-norm ball; positive: the constraint is active
    gradient: torch.Tensor  # of a loss on the point, by a and s: (SIZE + 1,)
    differences: torch.Tensor  # the same by central differences of re-solves
    ok: bool  # a unique two-sided derivative exists and was computed

    @property
    def error(self) -> float:
        """|gradient - differences| / |differences|, maximum norms."""
        return float((self.gradient - self.differences).abs().max() / self.differences.abs().max())


def main(solver: str = "auto") -> Result:
    """Solve, differentiate, compare with differences, print and return."""
    torch.manual_seed(0)
    a = (0.5 + 2.0 * torch.rand(SIZE, dtype=torch.float64)).requires_grad_()
    s = torch.tensor(0.485, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(SIZE, dtype=torch.float64)  # the loss: weights . u
    start = -a.detach() / a.detach().norm()

    solution = ddn.solve(problem, {"a": a, "s": s}, solver=solver, initial=start)
    point = solution["u"]
    gradient_a, gradient_s = torch.autograd.grad(weights @ point, [a, s])
    gradient = torch.cat([gradient_a, gradient_s[None]])

    # All 2 (SIZE + 1) perturbed problems are one batch, started from the solution.
    centre = torch.cat([a, s[None]]).detach()
    shifts = STEP * torch.eye(SIZE + 1, dtype=torch.float64)
    shifted = torch.stack([centre + shifts, centre - shifts])  # (2, SIZE + 1, SIZE + 1)
    again = ddn.solve(
        problem, {"a": shifted[..., :-1], "s": shifted[..., -1]}, solver=solver, initial=point.detach()
    )
    losses = again["u"] @ weights
    result = Result(
        point=point.detach(),
        multiplier=solution.dual.inequality["norm"].detach(),
        gradient=gradient,
        differences=(losses[0] - losses[1]) / (2 * STEP),
        ok=bool(solution.certificate.ok),
    )

    print(f"solved by              {solution.stats.backend[0]}:{solution.stats.method[0]}")
    print(f"objective              {solution.objective.item():.10f}")
    print(f"multipliers            sphere {solution.dual.equality['sphere'].item():+.6f}, ", end="")
    print(f"norm {result.multiplier.item():+.6f}")
    print("            gradient      differences")
    for i in (0, 1, 2, SIZE):
        name = f"d/d a[{i}]" if i < SIZE else "d/d s"
        print(f"  {name:9s} {result.gradient[i].item():+.10f} {result.differences[i].item():+.10f}")
    print(f"largest relative error {result.error:.1e} over {SIZE + 1} components")
    return result


if __name__ == "__main__":
    main()
