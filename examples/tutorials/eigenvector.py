"""The top eigenvector as an optimization problem, and a derivative that the eigendecomposition does not have.

    y(A) = argmin_u  -1/2 u^T A u    subject to  |u|^2 = 1

Every minimum is a top eigenvector, y or -y. Closed form, with A v_i = lambda_i v_i and y = v_1:

    dy = sum_(i>1) v_i (v_i^T dA y) / (lambda_1 - lambda_i)

Only the gap at the top counts. ``torch.linalg.eigh`` divides by all the gaps: where two of the other eigenvalues are
equal its gradient of a loss of y alone is NaN, and that of the problem is what it should be. (Magnus 1985.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import ddn_solvers as ddn

SIZE = 20

problem = ddn.Problem(
    variables={"u": (SIZE,)},
    parameters={"A": (SIZE, SIZE)},
    objective=lambda u, A: -0.5 * u @ (0.5 * (A + A.T)) @ u,
    equality={"unit": lambda u: u.square().sum() - 1},
)


class Result(NamedTuple):
    """Of two matrices, with distinct eigenvalues and with all but the top one equal, detached."""

    A: torch.Tensor  # (2, SIZE, SIZE)
    weights: torch.Tensor  # of the loss (weights^T y)^2, which does not know the sign of y: (SIZE,)
    y: torch.Tensor  # (2, SIZE)
    gradient: torch.Tensor  # through the layer: (2, SIZE, SIZE)
    eigh_gradient: torch.Tensor  # through torch.linalg.eigh: (2, SIZE, SIZE)


def main(solver: str = "auto") -> Result:
    """Differentiate a function of the top eigenvector both ways, print how they compare, and return it."""
    generator = torch.Generator().manual_seed(0)
    noise, weights = torch.randn(SIZE + 1, SIZE, generator=generator, dtype=torch.float64).split([SIZE, 1])
    weights = weights[0]
    equal = torch.diag(torch.cat([torch.ones(SIZE - 1), torch.full((1,), 3.0)]).double())
    A = torch.stack([0.5 * (noise + noise.T), equal]).requires_grad_()
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    y = layer(A, initial=torch.ones(SIZE, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((y @ weights).square().sum(), A)
    top = torch.linalg.eigh(A).eigenvectors[..., -1]
    (eigh_gradient,) = torch.autograd.grad((top @ weights).square().sum(), A)
    for name, mine, theirs in zip(("distinct", "repeated"), gradient, eigh_gradient, strict=True):
        print(f"{name} eigenvalues: |gradient| {mine.norm():.6f}, through eigh {theirs.norm():.6f}")
    return Result(A.detach(), weights, y.detach(), gradient, eigh_gradient)


if __name__ == "__main__":
    main()
