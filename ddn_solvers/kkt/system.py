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
    Full,
    Operator,
    Sparse,
    factored_sparsely,
)
from ddn_solvers.kkt.packing import Packing, pick, put
from ddn_solvers.lowering.pattern import Matrices
from ddn_solvers.transforms import is_transformed

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
        narrowing: Factors of the variables' units where those of their curvature are known, (B, n).
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
        narrowing: torch.Tensor | None = None,
    ) -> None:
        self._choice, self._corner, self._transformed = linear_solver, corner, transformed
        self._solver = _solver(linear_solver, transformed, hessian, jacobian)
        self.hessian, self.jacobian = self._operator(hessian), self._operator(jacobian)
        self.active, self.fixed, self._kept = active, fixed, torch.cat([~fixed, active], dim=-1)
        self._any_fixed = transformed or bool(fixed.any())
        packable = isinstance(self._solver, (DenseLU, Schur)) and len(fixed) > 0
        self._packing = _packed(fixed, active) if packable else None
        K: Any = self._bordered().formed() if self._solver.formed else self._bordered()
        units = torch.where(self._kept, _units(self.hessian, self.jacobian, narrowing), 1.0)
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
            return Dense(matrix) if self._transformed else Full(matrix.numpy())
        return Sparse(matrix) if self._solver.sparse else Full(matrix.dense)

    def _bordered(self) -> Bordered:
        hessian, jacobian, kept = self.hessian, self.jacobian, self._pack(self._kept)
        if self._packing is not None:
            hessian = Full(self._packing.hessian(hessian.dense()).numpy())
            jacobian = Full(self._packing.border(jacobian.dense()).numpy())
        if self._corner is None:
            return Bordered.of(hessian, jacobian, kept)
        diagonal = torch.cat([torch.zeros_like(self.fixed, dtype=self._corner.dtype), self._corner], dim=-1)
        return Bordered.of(hessian, jacobian, kept, self._pack(diagonal))

    @cached_property
    def _lone(self) -> torch.Tensor | None:
        """The singular samples, by index; ``None`` under a transform, where nobody can tell."""
        return None if is_transformed(self.singular) else self.singular.nonzero()[:, 0]

    @cached_property
    def _degenerate(self) -> Degenerate | LargeDegenerate:
        """What serves singular samples, and them alone; dense, whatever the solver of the others, but for very large ones."""
        active, fixed, corner, lone = self.active, self.fixed, self._corner, self._lone
        hessian, jacobian, everywhere = self.hessian, self.jacobian, torch.ones_like(fixed)
        if lone is None:
            pick = self.singular.unsqueeze(-1)
            active, fixed, hessian = (
                active & pick,
                fixed & pick,
                hessian.masked(everywhere & pick, everywhere),
            )
        else:
            active, fixed, everywhere = active[lone], fixed[lone], everywhere[lone]
            hessian, jacobian = hessian.take(lone), jacobian.take(lone)
            corner = None if corner is None else corner[lone]
        if isinstance(hessian, Sparse) and hessian.shape[1] > DENSE_LIMIT:
            K = Bordered.of(hessian, jacobian, torch.cat([everywhere, active], dim=-1))
            return LargeDegenerate(K, fixed, self._proximal)
        H, J = hessian.dense(), jacobian.masked(active, everywhere).dense()
        if corner is not None:  # rows with a corner entry are a part of the Hessian
            soft = active & (corner != 0)
            stiffness = torch.where(soft, -1 / torch.where(soft, corner, 1.0), 0.0)
            H = H + J.mT @ (stiffness.unsqueeze(-1) * J)
            active = active & ~soft
        return Degenerate(H, J, active, fixed, self._proximal)

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
        lone = self._lone
        if lone is None:
            other, pick = self._degenerate.solve(a, b, v), self.singular.unsqueeze(-1)
            pairs = zip(vars(other).values(), vars(step).values(), strict=True)
            return Step(*(torch.where(pick, o, s) for o, s in pairs))
        other = self._degenerate.solve(a[lone], b[lone], v[lone])
        pairs = zip(vars(other).values(), vars(step).values(), strict=True)
        return Step(*(s.index_put((lone,), o) for o, s in pairs))

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

    def _pack(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._packing is None else pick(values, self._packing.all)

    def _unpack(self, values: torch.Tensor, absent: float) -> torch.Tensor:
        if self._packing is None:
            return values
        return put(values, self._packing.all, self._kept.shape[-1], absent)


def _packed(fixed: torch.Tensor, active: torch.Tensor) -> Packing | None:
    """What to leave out of the matrices of a batch, where it pays."""
    batch, n = fixed.shape
    if batch * (n + active.shape[1]) ** 2 < _LARGE_BATCH:
        return None
    packing = Packing.of(~fixed, active)
    return packing if packing.smaller else None


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


def _units(hessian: Operator, jacobian: Operator, narrowing: torch.Tensor | None) -> torch.Tensor:
    """One unit for all variables, but for a factor, such that H has norm one, and one a row such that it has, (B, n + m)."""
    if narrowing is not None:
        hessian = hessian.scaled(narrowing, narrowing)
        everywhere = narrowing.new_ones((len(narrowing), jacobian.shape[0]))
        jacobian = jacobian.scaled(everywhere, narrowing)
    curvature = hessian.largest().unsqueeze(-1)
    unit = torch.where(curvature > 0, curvature, 1.0).rsqrt()  # (B, 1)
    rows = jacobian.row_norms()
    border = torch.where(rows > 0, rows * unit, 1.0).reciprocal()
    units = unit.expand((*unit.shape[:-1], hessian.shape[-1]))
    return torch.cat([units if narrowing is None else units * narrowing, border], dim=-1)
