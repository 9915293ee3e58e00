"""The bordered KKT system, assembled in one place and solved for every purpose.

Differentiating the KKT conditions with the active rows A of c and the active bounds gives

    [ H   A^T ] [ x ]   [ a ]
    [ A    0  ] [ t ] = [ b ],     x_j = v_j  for each variable j that an active bound fixes,

where the stationarity rows of fixed variables do not constrain x: they give what the bound multiplier
has to take up, q = H x + A^T t - a. The matrix is symmetric, so this one solve serves

    jvp      x = dz, t = dy,   a = -d(grad_z L), b = -dc, v = d bound,          d bound multiplier = +-q
    adjoint  x = w,  t = s,    a = cotangent of z, b = of y, v = -+ that of the bound multiplier
    polish   x = Newton step,  a = -grad_z L, b = -c, v = bound - z

H itself need not be invertible. Rows that are inactive are replaced by t_i = 0 and fixed variables by
x_j = v_j, so that samples with different active sets form one batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ddn_solvers.kkt.degenerate import Degenerate
from ddn_solvers.kkt.linear import (
    SINGULAR,
    Custom,
    DenseInverse,
    DenseLU,
    Iterative,
    LinearSolver,
    SparseLU,
    Step,
    condition,
    equilibrate,
)

_REFINEMENTS = 4
_ROUNDING = 4e-15  # backward error |r| / (|b| + |K| |x|) at which a refined solution is taken


class System:
    """Batch of factored KKT systems.

    Args:
        hessian: H of the Lagrangian, (B, n, n).
        jacobian: J of all constraints, (B, m, n).
        active: Rows of J that are active, (B, m) bool.
        fixed: Variables that an active bound fixes, (B, n) bool.
        singular: Which samples are singular, if that is known already; found otherwise.
        any_singular: With ``singular`` given: whether any is. (A transformed tensor cannot be asked.)
        transformed: The tensors may be under torch.func transforms.
        linear_solver: As in ``Policy``.
        corner: Diagonal in place of the zero block, (B, m), <= 0; none is zero.
        proximal: Added to the diagonal of H of singular samples instead of taking the pseudo-inverse.
    """

    def __init__(
        self,
        hessian: torch.Tensor,
        jacobian: torch.Tensor,
        active: torch.Tensor,
        fixed: torch.Tensor,
        *,
        singular: torch.Tensor | None = None,
        any_singular: bool = True,
        transformed: bool = False,
        linear_solver: Any = "auto",
        proximal: float | None = None,
        corner: torch.Tensor | None = None,
    ) -> None:
        self.hessian, self.jacobian, self.active, self.fixed = hessian, jacobian, active, fixed
        kept = torch.cat([~fixed, active], dim=-1)
        matrix = _bordered(hessian, jacobian, kept, corner)
        self._corner = corner
        self._any_fixed = transformed or bool(fixed.any())
        self._scale = equilibrate(matrix, torch.where(kept, _units(hessian, jacobian), 1.0))
        scaled = matrix * self._scale.unsqueeze(-1) * self._scale.unsqueeze(-2)
        self._solver = _solver(linear_solver, transformed)
        if singular is None or not any_singular:
            self._state = self._solver.init(scaled)
        if singular is None:
            self.condition = condition(self._solver, self._state, scaled)
            singular = self.condition > SINGULAR
            any_singular = bool(singular.any())
        self.singular, self._repair, self._moved = singular, any_singular, False
        if any_singular:
            self._prepare_singular(scaled, proximal)

    def _prepare_singular(self, scaled: torch.Tensor, proximal: float | None) -> None:
        """Regular samples keep their factorization; a singular one gets an identity there, and its own."""
        pick = self.singular.unsqueeze(-1)
        identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype).expand_as(scaled)
        self._state = self._solver.init(torch.where(pick.unsqueeze(-1), identity, scaled))
        hessian, jacobian = (torch.where(pick.unsqueeze(-1), t, 0.0) for t in (self.hessian, self.jacobian))
        active = self.active & pick
        if self._corner is not None:  # rows with a corner entry are a part of the Hessian
            soft = active & (self._corner != 0)
            stiffness = torch.where(soft, -1 / torch.where(soft, self._corner, 1.0), 0.0)
            hessian = hessian + jacobian.mT @ (stiffness.unsqueeze(-1) * jacobian)
            active = active & ~soft
        self._degenerate = Degenerate(hessian, jacobian, active, self.fixed & pick, proximal)

    def moved(self, hessian: torch.Tensor, jacobian: torch.Tensor) -> System:
        """The system of a nearby point with the same active set: this factorization, refined (regular only)."""
        nearby = copy.copy(self)
        nearby.hessian, nearby.jacobian, nearby._moved = hessian, jacobian, True
        return nearby

    def solve(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> Step:
        """Solve for one right-hand side a batch member; entries of b on inactive rows are ignored.

        Args:
            a: (B, n). b: (B, m). v: (B, n), used where a variable is fixed.
        """
        step = self._regular(a, b, v)
        if not self._repair:
            return step
        other, pick = self._degenerate.solve(a, b, v), self.singular.unsqueeze(-1)
        return Step(
            *(torch.where(pick, o, s) for o, s in zip(vars(other).values(), vars(step).values(), strict=True))
        )

    def _regular(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> Step:
        n, solve = a.shape[-1], self._refined if self._moved else self._factored
        if not self._any_fixed:
            solution = solve(torch.cat([a, torch.where(self.active, b, 0.0)], dim=-1))
            return Step(solution[..., :n], solution[..., n:], torch.zeros_like(a))
        v = torch.where(self.fixed, v, 0.0)
        moved_a = a - _times(self.hessian, v)
        moved_b = b - _times(self.jacobian, v)
        rhs = torch.cat(
            [torch.where(self.fixed, 0.0, moved_a), torch.where(self.active, moved_b, 0.0)], dim=-1
        )
        solution = solve(rhs)
        x, t = torch.where(self.fixed, v, solution[..., :n]), solution[..., n:]
        q = _times(self.hessian, x) + _times(self.jacobian.transpose(-1, -2), t) - a
        return Step(x, t, torch.where(self.fixed, q, 0.0))

    def error(self) -> torch.Tensor:
        """|K x - b| / |b| of the solution for a fixed right-hand side in the range of K, (B,)."""
        n, size = self.hessian.shape[-1], self._scale.shape[-1]
        there = torch.cos(1.0 + torch.arange(size, dtype=self._scale.dtype) ** 2).expand_as(self._scale)
        kept = torch.cat([torch.ones_like(self.fixed), self.active], dim=-1)
        rhs = self._product(torch.where(kept, there, 0.0))
        step = self.solve(rhs[..., :n], rhs[..., n:], rhs[..., :n])
        left = self._product(torch.cat([step.x, step.t], dim=-1)) - rhs
        return torch.linalg.vector_norm(left, dim=-1) / torch.linalg.vector_norm(rhs, dim=-1).clamp(
            min=1e-300
        )

    def _factored(self, rhs: torch.Tensor) -> torch.Tensor:
        return self._scale * self._solver.compute(self._state, self._scale * rhs)

    def _refined(self, rhs: torch.Tensor) -> torch.Tensor:
        """Iterative refinement against the matrix of the point moved to; factored anew if it is too far."""
        solution, scale = self._factored(rhs), self._scale
        for _ in range(_REFINEMENTS):
            residual = rhs - self._product(solution)
            # In equilibrated units, where |K| is about one: else small rows would go unnoticed.
            size = (scale * rhs).abs() + (solution / scale).abs()
            if bool(((scale * residual).abs() <= _ROUNDING * size.amax(-1, keepdim=True)).all()):
                return solution
            solution = solution + self._factored(residual)
        return System(self.hessian, self.jacobian, self.active, self.fixed)._factored(rhs)

    def _product(self, solution: torch.Tensor) -> torch.Tensor:
        n = self.hessian.shape[-1]
        x, t = solution[..., :n], solution[..., n:]
        top = _times(self.hessian, x) + _times(self.jacobian.transpose(-1, -2), t)
        rows = torch.where(self.active, _times(self.jacobian, x), t)
        return torch.cat([torch.where(self.fixed, x, top) if self._any_fixed else top, rows], dim=-1)


def _solver(choice: Any, transformed: bool) -> LinearSolver:
    if callable(choice):
        return Custom(choice)
    if transformed:
        return DenseInverse()
    return {"sparse": SparseLU, "iterative": Iterative}.get(choice, DenseLU)()


def _bordered(
    hessian: torch.Tensor, jacobian: torch.Tensor, kept: torch.Tensor, corner: torch.Tensor | None
) -> torch.Tensor:
    """The matrix with rows and columns of the identity in place of what is not ``kept``, (B, n + m)."""
    block = torch.diag_embed(torch.zeros_like(jacobian[..., 0]) if corner is None else corner)
    top = torch.cat([hessian, jacobian.transpose(-1, -2)], dim=-1)
    whole = torch.cat([top, torch.cat([jacobian, block], dim=-1)], dim=-2)
    masked = torch.where(kept.unsqueeze(-1) & kept.unsqueeze(-2), whole, 0.0)
    return masked + torch.diag_embed((~kept).to(whole.dtype))


def _units(hessian: torch.Tensor, jacobian: torch.Tensor) -> torch.Tensor:
    """One unit for all variables such that H has norm one, and one a row such that it has, (B, n + m)."""
    curvature = hessian.detach().abs().amax((-2, -1)).unsqueeze(-1)
    unit = torch.where(curvature > 0, curvature, 1.0).rsqrt()  # (B, 1)
    rows = torch.linalg.vector_norm(jacobian.detach(), dim=-1)
    border = torch.where(rows > 0, rows * unit, 1.0).reciprocal()
    return torch.cat([unit.expand((*unit.shape[:-1], hessian.shape[-1])), border], dim=-1)


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)
