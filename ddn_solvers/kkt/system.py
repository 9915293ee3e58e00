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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ddn_solvers.arrays import without_symmetry
from ddn_solvers.kkt.bands import by_bands
from ddn_solvers.kkt.degenerate import Degenerate, LargeDegenerate
from ddn_solvers.kkt.linear import (
    SINGULAR,
    BandedSchur,
    Custom,
    DenseInverse,
    DenseLU,
    Iterative,
    LinearSolver,
    Schur,
    SparseLU,
    Step,
    condition,
    equilibrate,
)
from ddn_solvers.kkt.operator import (
    DENSE_LIMIT,
    Bordered,
    Dense,
    Operator,
    Sparse,
    factored_sparsely,
)
from ddn_solvers.lowering.pattern import Matrices

_REFINEMENTS = 4
_ROUNDING = 4e-15  # backward error |r| / (|b| + |K| |x|) at which a refined solution is taken
# Entries of a batch of matrices from which it pays to leave out what is not kept, and to factor H and its
# Schur complement in place of all: 64 samples of 45 unknowns, one of 360 (measured on one core).
_LARGE_BATCH = 2**17
_MANY = 1000  # unknowns of all samples from which band factors pay: three samples of 330 (measured likewise)


class System:
    """Batch of factored KKT systems.

    Args:
        hessian: H of the Lagrangian, (B, n, n): a tensor, or matrices of a fixed pattern.
        jacobian: J of all constraints, (B, m, n), likewise.
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
        hessian: torch.Tensor | Matrices | Operator,
        jacobian: torch.Tensor | Matrices | Operator,
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
        self._choice, self._corner = linear_solver, corner
        self._solver = _solver(linear_solver, transformed, hessian, jacobian)
        self.hessian, self.jacobian = self._operator(hessian), self._operator(jacobian)
        self.active, self.fixed, self._kept = active, fixed, torch.cat([~fixed, active], dim=-1)
        self._any_fixed = transformed or bool(fixed.any())
        packable = isinstance(self._solver, (DenseLU, Schur)) and len(fixed) > 0
        self._packing = _Packing.of(~fixed, active) if packable else None
        K: Any = self._bordered().formed() if self._solver.formed else self._bordered()
        units = torch.where(self._kept, _units(self.hessian, self.jacobian), 1.0)
        scale, norm = equilibrate(K, self._pack(units))
        self._scale = self._unpack(scale, 1.0)
        K = K.scaled(scale)
        if singular is None:
            judge = self._solver if self._solver.decides else DenseLU()
            self._state, start = judge.init(K), torch.from_numpy(without_symmetry(self._kept.shape[-1]))
            start = self._pack(start.expand(self._kept.shape))
            self.condition = condition(judge, self._state, K.kept, norm, start)
            singular = self.condition > SINGULAR
            any_singular, factored = bool(singular.any()), self._solver.decides
        else:
            factored = False
        self.singular, self._repair, self._moved, self._proximal = singular, any_singular, False, proximal
        if any_singular or not factored:
            self._state = self._solver.init(K.without(singular) if any_singular else K)

    @property
    def convex(self) -> bool:
        """Whether factoring has shown that H is positive definite on the free variables of every sample."""
        return not self._repair and self._solver.convex(self._state)

    def _operator(self, matrix: torch.Tensor | Matrices | Operator) -> Operator:
        if isinstance(matrix, Operator):
            return matrix
        if isinstance(matrix, torch.Tensor):
            return Dense(matrix)
        return Sparse(matrix) if self._solver.sparse else Dense(torch.from_numpy(matrix.dense))

    def _bordered(self) -> Bordered:
        hessian, jacobian, kept = self.hessian, self.jacobian, self._pack(self._kept)
        if self._packing is not None:
            hessian = Dense(self._packing.hessian(hessian.dense()))
            jacobian = Dense(self._packing.border(jacobian.dense()))
        if self._corner is None:
            return Bordered.of(hessian, jacobian, kept)
        diagonal = torch.cat([torch.zeros_like(self.fixed, dtype=self._corner.dtype), self._corner], dim=-1)
        return Bordered.of(hessian, jacobian, kept, self._pack(diagonal))

    @cached_property
    def _degenerate(self) -> Degenerate | LargeDegenerate:
        """What serves singular samples; dense, whatever the solver of the others, but for very large problems."""
        pick = self.singular.unsqueeze(-1)
        if isinstance(self.hessian, Sparse) and self.hessian.shape[1] > DENSE_LIMIT:
            kept = torch.cat([torch.ones_like(self.fixed), self.active], dim=-1)
            K = Bordered.of(self.hessian, self.jacobian, kept & pick)
            return LargeDegenerate(K, self.fixed, self._proximal)
        nothing = torch.zeros_like(self.fixed)
        hessian = self.hessian.masked(~nothing & pick, ~nothing).dense()
        jacobian = self.jacobian.masked(self.active & pick, ~nothing).dense()
        active = self.active & pick
        if self._corner is not None:  # rows with a corner entry are a part of the Hessian
            soft = active & (self._corner != 0)
            stiffness = torch.where(soft, -1 / torch.where(soft, self._corner, 1.0), 0.0)
            hessian = hessian + jacobian.mT @ (stiffness.unsqueeze(-1) * jacobian)
            active = active & ~soft
        return Degenerate(hessian, jacobian, active, self.fixed & pick, self._proximal)

    def moved(self, hessian: torch.Tensor | Matrices, jacobian: torch.Tensor | Matrices) -> System:
        """The system of a nearby point with the same active set: this factorization, refined (regular only)."""
        nearby = copy.copy(self)
        nearby.hessian, nearby.jacobian = self._operator(hessian), self._operator(jacobian)
        nearby._moved = True
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
        n, solve = a.shape[-1], self._refined if self._solver.refine or self._moved else self._factored
        if not self._any_fixed:
            solution = solve(torch.cat([a, torch.where(self.active, b, 0.0)], dim=-1))
            return Step(solution[..., :n], solution[..., n:], torch.zeros_like(a))
        v = torch.where(self.fixed, v, 0.0)
        moved_a = a - self.hessian.times(v)
        moved_b = b - self.jacobian.times(v)
        rhs = torch.cat(
            [torch.where(self.fixed, 0.0, moved_a), torch.where(self.active, moved_b, 0.0)], dim=-1
        )
        solution = solve(rhs)
        x, t = torch.where(self.fixed, v, solution[..., :n]), solution[..., n:]
        q = self.hessian.times(x) + self.jacobian.transposed_times(t) - a
        return Step(x, t, torch.where(self.fixed, q, 0.0))

    def error(self) -> torch.Tensor:
        """|K x - b| / |b| of the solution for a fixed right-hand side in the range of K, (B,)."""
        n, size = self.hessian.shape[-1], self._scale.shape[-1]
        there = torch.from_numpy(without_symmetry(size)).expand_as(self._scale)
        kept = torch.cat([torch.ones_like(self.fixed), self.active], dim=-1)
        rhs = self._product(torch.where(kept, there, 0.0))
        step = self.solve(rhs[..., :n], rhs[..., n:], rhs[..., :n])
        left = self._product(torch.cat([step.x, step.t], dim=-1)) - rhs
        return torch.linalg.vector_norm(left, dim=-1) / torch.linalg.vector_norm(rhs, dim=-1).clamp(
            min=1e-300
        )

    def _factored(self, rhs: torch.Tensor) -> torch.Tensor:
        packed = self._pack(self._scale * rhs)
        return self._scale * self._unpack(self._solver.compute(self._state, packed), 0.0)

    def _refined(self, rhs: torch.Tensor) -> torch.Tensor:
        """Iterative refinement against the matrix at this point; factored anew where that does not converge."""
        solution, scale = self._factored(rhs), self._scale
        for _ in range(_REFINEMENTS):
            residual = rhs - self._product(solution)
            # In equilibrated units, where |K| is about one: else small rows would go unnoticed.
            size = (scale * rhs).abs() + (solution / scale).abs()
            exact = ((scale * residual).abs() <= _ROUNDING * size.amax(-1, keepdim=True)).all(-1)
            if bool((exact | self.singular).all()):
                return solution
            solution = solution + self._factored(residual)
        steadier = self._solver.steadier
        if not self._moved and steadier is None:
            return solution  # as good as this solver gets
        afresh = System(
            self.hessian,
            self.jacobian,
            self.active,
            self.fixed,
            singular=self.singular,
            any_singular=self._repair,
            linear_solver=self._choice if steadier is None else steadier,
            corner=self._corner,
        )
        return afresh._factored(rhs)

    def _product(self, solution: torch.Tensor) -> torch.Tensor:
        n = self.hessian.shape[-1]
        x, t = solution[..., :n], solution[..., n:]
        top = self.hessian.times(x) + self.jacobian.transposed_times(t)
        rows = self.jacobian.times(x)
        if self._corner is not None:
            rows = rows + self._corner * t
        rows = torch.where(self.active, rows, t)
        return torch.cat([torch.where(self.fixed, x, top) if self._any_fixed else top, rows], dim=-1)

    # -- samples without what they do not keep --------------------------------------------------------

    def _pack(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._packing is None else values.gather(-1, self._packing.all)

    def _unpack(self, values: torch.Tensor, absent: float) -> torch.Tensor:
        if self._packing is None:
            return values
        whole = values.new_full(self._kept.shape, absent)
        return whole.scatter(-1, self._packing.all, values)


@dataclass(frozen=True)
class _Packing:
    """Free variables and active rows of each sample, followed by others up to the longest sample.

    A batch whose samples have 20 of 50 inequalities active needs no matrix with 50 rows for them.
    """

    variables: torch.Tensor  # (B, n') indices
    rows: torch.Tensor  # (B, m') indices
    all: torch.Tensor  # (B, n' + m') indices into [variables; rows]

    @staticmethod
    def of(free: torch.Tensor, active: torch.Tensor) -> _Packing | None:
        batch, n = free.shape
        if batch * (n + active.shape[1]) ** 2 < _LARGE_BATCH:
            return None
        variables, rows = _first(free), _first(active)
        if variables.shape[1] == n and rows.shape[1] == active.shape[1]:
            return None
        return _Packing(variables, rows, torch.cat([variables, rows + n], dim=1))

    def hessian(self, matrix: torch.Tensor) -> torch.Tensor:
        return _columns(_rows(matrix, self.variables), self.variables)

    def border(self, matrix: torch.Tensor) -> torch.Tensor:
        return _columns(_rows(matrix, self.rows), self.variables)


def _first(mask: torch.Tensor) -> torch.Tensor:
    """Indices that put what is set first, as many as the fullest sample has; all in order, where that is all."""
    count = int(mask.sum(-1).amax()) if mask.numel() else 0
    if count == mask.shape[1]:
        return torch.arange(count).expand(mask.shape)
    return torch.argsort(~mask, dim=-1, stable=True)[:, :count]


def _rows(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if index.shape[1] == matrix.shape[1]:
        return matrix  # all of them, in order: see ``_first``
    return matrix.gather(1, index.unsqueeze(2).expand(-1, -1, matrix.shape[2]))


def _columns(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if index.shape[1] == matrix.shape[2]:
        return matrix
    return matrix.gather(2, index.unsqueeze(1).expand(-1, matrix.shape[1], -1))


def _solver(choice: Any, transformed: bool, hessian: Any, jacobian: Any) -> LinearSolver:
    if callable(choice):
        return Custom(choice)
    if transformed:
        return DenseInverse()
    if choice == "auto":
        if isinstance(hessian, Matrices) and factored_sparsely(hessian.pattern, jacobian.pattern):
            many = len(hessian) * sum(jacobian.shape) >= _MANY
            structure = by_bands(hessian.pattern, jacobian.pattern) if many else None
            return BandedSchur(structure) if structure is not None else SparseLU()
        batch = len(hessian) if isinstance(hessian, (torch.Tensor, Matrices)) else 1
        return Schur() if batch * sum(jacobian.shape[-2:]) ** 2 >= _LARGE_BATCH else DenseLU()
    return {"sparse": SparseLU, "iterative": Iterative}.get(choice, DenseLU)()


def _units(hessian: Operator, jacobian: Operator) -> torch.Tensor:
    """One unit for all variables such that H has norm one, and one a row such that it has, (B, n + m)."""
    curvature = hessian.largest().unsqueeze(-1)
    unit = torch.where(curvature > 0, curvature, 1.0).rsqrt()  # (B, 1)
    rows = jacobian.row_norms()
    border = torch.where(rows > 0, rows * unit, 1.0).reciprocal()
    return torch.cat([unit.expand((*unit.shape[:-1], hessian.shape[-1])), border], dim=-1)
