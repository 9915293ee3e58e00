"""The least product of two linear forms over vectors of sum zero on a sphere: H is indefinite, the system regular.

    y(a, b, r) = argmin_u (a^T u) (b^T u)   subject to   sum(u) = 0,   |u|^2 = r^2

Closed form, with a_0 = a - mean(a) and b_0 = b - mean(b): y = r (a_0 / |a_0| - b_0 / |b_0|) / norm of the same, or
minus that, and the product is r^2 (a_0^T b_0 - |a_0| |b_0|) / 2. H = a b^T + b a^T + 2 nu I has a negative
eigenvalue, so that -H^-1 B and Cholesky mislead, and still y is a minimum: H is positive where sum and sphere
allow to go, and [H A^T; A 0] is regular.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import ddn_solvers as ddn

SIZE = 20

problem = ddn.Problem(
    variables={"u": (SIZE,)},
    parameters={"a": (SIZE,), "b": (SIZE,), "r": ()},
    objective=lambda u, a, b: (a @ u) * (b @ u),
    equality={"sum": lambda u: u.sum(), "sphere": lambda u, r: u.square().sum() - r**2},
)


class Result(NamedTuple):
    """What was found, detached."""

    inputs: dict[str, torch.Tensor]  # a, b: (SIZE,) and r
    point: torch.Tensor  # (SIZE,)
    product: torch.Tensor
    jacobians: dict[str, torch.Tensor]  # of the point by a, b: (SIZE, SIZE) and r: (SIZE,)
    least_eigenvalue: float  # of H, negative
    least_on_tangents: float  # of H where the constraints allow to go, positive
    ok: bool  # a unique two-sided derivative exists and was computed


def main(solver: str = "auto") -> Result:
    """Solve, differentiate, look at H, print and return it all."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(SIZE, generator=generator, dtype=torch.float64) + 1.0
    b = torch.randn(SIZE, generator=generator, dtype=torch.float64) - 1.0
    inputs = {"a": a, "b": b, "r": torch.tensor(1.5, dtype=torch.float64)}
    # y and -y are both minima: the start chooses.
    solution = ddn.solve(problem, inputs, solver=solver, initial=a - b - (a - b).mean())
    derivative = ddn.sensitivity(problem, inputs, solution.primal, solution.dual)

    point = solution["u"].detach()
    nu = solution.dual.equality["sphere"].detach()
    H = torch.outer(a, b) + torch.outer(b, a) + 2 * nu * torch.eye(SIZE, dtype=torch.float64)
    rows = torch.stack([torch.ones(SIZE, dtype=torch.float64), 2 * point])
    tangents = torch.linalg.svd(rows).Vh[2:]  # (SIZE - 2, SIZE)
    result = Result(
        inputs=inputs,
        point=point,
        product=solution.objective.detach(),
        jacobians={name: derivative.jacobian(of="u", wrt=name).detach() for name in inputs},
        least_eigenvalue=float(torch.linalg.eigvalsh(H)[0]),
        least_on_tangents=float(torch.linalg.eigvalsh(tangents @ H @ tangents.T)[0]),
        ok=bool(derivative.certificate.ok),
    )
    print(f"product      {result.product:.10f}")
    print(f"eigenvalues  of H from {result.least_eigenvalue:.3f}, ", end="")
    print(f"on the tangents from {result.least_on_tangents:.3f}")
    print(f"certificate  {derivative.certificate}")
    return result


if __name__ == "__main__":
    main()
