"""The distribution nearest to a given one that has the mean and the variance asked for.

    y(q, b) = argmin_p  sum_i p_i log(p_i / q_i)   subject to   sum(p) = 1,   F p = b

Closed form: exponential tilting, p_i = q_i exp(theta^T F_i) / Z with theta such that F p = b. There
dp/db = diag(p) (F - b)^T Cov_p(F)^-1 and dp/dlog q = P (I - G^T (G P G^T)^-1 G P), P = diag(p), G = [1; F].
Without F it is p = q / sum(q). (Kullback 1959; Jaynes 1957; section 5 of Csiszar 1975 for the geometry.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import ddn_solvers as ddn

SIZE = 24
GRID = torch.linspace(-2, 2, SIZE, dtype=torch.float64)
MOMENTS = torch.stack([GRID, GRID.square()])  # F

problem = ddn.Problem(
    variables={"p": (SIZE,)},
    parameters={"q": (SIZE,), "b": (2,)},
    objective=lambda p, q: torch.special.xlogy(p, p / q).sum(),
    equality={"total": lambda p: p.sum() - 1, "moments": lambda p, b: MOMENTS @ p - b},
    bounds={"p": (0.0, None)},  # never active: the slope of x log x is infinite at zero
)


class Result(NamedTuple):
    """What was found, detached."""

    q: torch.Tensor  # (SIZE,)
    b: torch.Tensor  # (2,)
    point: torch.Tensor  # p: (SIZE,)
    theta: torch.Tensor  # the tilt, minus the multipliers of the moments: (2,)
    by_q: torch.Tensor  # dp/dq: (SIZE, SIZE)
    by_b: torch.Tensor  # dp/db: (SIZE, 2)


def main(solver: str = "auto") -> Result:
    """Ask a two-humped distribution for another mean and second moment; print and return what comes."""
    q = torch.exp(-4 * (GRID - 1).square()) + torch.exp(-4 * (GRID + 1).square()) + 0.05
    q = q / q.sum()
    b = torch.tensor([0.4, 0.9], dtype=torch.float64)
    solution = ddn.solve(problem, {"q": q, "b": b}, solver=solver, initial=q)
    derivative = ddn.sensitivity(problem, {"q": q, "b": b}, solution.primal, solution.dual)
    theta = -solution.dual.equality["moments"].detach()
    print(f"moments     {(MOMENTS @ q).tolist()} -> {(MOMENTS @ solution['p']).tolist()}")
    print(f"divergence  {solution.objective.item():.6f}")
    print(f"tilt        exp({theta[0]:+.4f} z {theta[1]:+.4f} z^2)")
    return Result(
        q,
        b,
        solution["p"].detach(),
        theta,
        derivative.jacobian(of="p", wrt="q").detach(),
        derivative.jacobian(of="p", wrt="b").detach(),
    )


if __name__ == "__main__":
    main()
