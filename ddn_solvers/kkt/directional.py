"""The directional derivative where it is not linear: weakly active constraints, multipliers that are not unique.

Along a tangent dp of the parameters the solution moves by the dz that solves (Ralph and Dempe 1995)

    min_dz  1/2 dz^T H dz + dz^T d(grad_z L)
    s.t.    A_S dz = -dc_S  (strongly active),    G_W dz <= -dg_W  (weakly active)

where, if the multipliers y are not unique, those count that maximise d_p L = y^T dc over all of them: they
decide which constraints are strongly active along dp. With the system of the strongly active rows solved,
x0 for the right-hand side and R G_W^T for the weak rows, the multipliers m >= 0 of the weak rows solve the
linear complementarity problem

    0 <= m   complementary to   (-dg_W - G_W x0) + (G_W R G_W^T) m >= 0

which is nonnegative least squares in a factor of its matrix. A vjp cannot express any of this: it is linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet, kink_sides
from ddn_solvers.arrays import Array, Index, Mask
from ddn_solvers.kkt.linear import Step
from ddn_solvers.kkt.multipliers import steepest_multipliers
from ddn_solvers.kkt.system import System
from ddn_solvers.residuals import Evaluation

_ZERO = 1e-9  # relative multiplier, or complementarity, that counts as zero


@dataclass(frozen=True)
class Change:
    """Directional derivatives, through p alone, of f, grad_z L, c and the bounds; a row a sample."""

    objective: Array  # (B, 1)
    gradient: Array  # (B, n)
    constraints: Array  # (B, rows)
    lower: Array  # (B, n)
    upper: Array  # (B, n)

    @staticmethod
    def along(evaluation: Evaluation, tangents: Any) -> Change:
        """For tangents of every parameter block."""
        point = evaluation.point
        return Change(*evaluation.functions.tangent(point.z, evaluation.inputs, point.y, tangents))


def needs_direction(active: ActiveSet, dependent: Mask) -> Any:
    """Samples whose derivative depends on the direction, (B,) bool.

    Args:
        active: The active set.
        dependent: Whether a sample's active rows depend on each other.
    """
    return active.weak.any(axis=1) | (dependent & active.sides.any(axis=1))


def directional_derivative(
    evaluation: Evaluation, active: ActiveSet, tangents: Any
) -> tuple[Array, ...] | None:
    """Tangents of z, y, lower and upper of one sample (B = 1), or ``None`` if the QP has no solution."""
    kinks = slice(evaluation.program.inequality.size, -2 * active.n)
    bends = (active.weak & ~active.sides)[:, kinks]
    for _ in range(1 + int(bends.sum())):
        found, dr = _on_one_piece(evaluation, active, tangents)
        wrong = bends & (evaluation.point.pieces * dr < 0)
        if not wrong.any():
            return found
        pieces = np.where(wrong, -evaluation.point.pieces, evaluation.point.pieces)
        point = replace(evaluation.point, pieces=pieces)
        evaluation = Evaluation.at(evaluation.program, evaluation.bound, point)
    return None


def _on_one_piece(
    evaluation: Evaluation, active: ActiveSet, tangents: Any
) -> tuple[tuple[Array, ...] | None, Array]:
    """The same on the given side of every bend, and the change of r, which tells whether it is the right one."""
    none = None, np.zeros_like(evaluation.point.pieces)
    change = Change.along(evaluation, tangents)
    steepest = steepest_multipliers(
        evaluation, active, change.constraints[0], change.lower[0], change.upper[0]
    )
    if steepest is None:
        return none
    if steepest is not evaluation.point:
        evaluation = Evaluation.at(evaluation.program, evaluation.bound, steepest)
        active = replace(active, weak=_without_multiplier(evaluation, active))
        change = Change.along(evaluation, tangents)
    weak = active.weak & active.sides
    strong = replace(active, sides=active.sides & ~weak)
    system = System(
        evaluation.H,
        evaluation.J,
        torch.from_numpy(strong.constraints),
        torch.from_numpy(strong.fixed),
    )
    target = np.where(strong.lower, change.lower, change.upper)
    free = _solve(system, -change.gradient[0], -change.constraints[0], target[0])
    rows, limits, index = _weak_rows(evaluation, weak, change)
    norms = np.maximum(np.linalg.norm(rows, axis=1), 1e-300)  # so that small and zero do not depend on units
    rows, limits = rows / norms[:, None], limits / norms
    zero = np.zeros(strong.constraints.shape[1]), np.zeros(active.n)
    responses = [_solve(system, -row, *zero) for row in rows]
    x, t, q = (
        np.array([values, *(getattr(r, name)[0].numpy() for r in responses)])
        for name, values in ((name, getattr(free, name)[0].numpy()) for name in ("x", "t", "q"))
    )
    stiffness = np.abs(evaluation.hessian).max(initial=0.0)
    size = max(np.abs(limits).max(initial=0.0), np.abs(x[0]).max(initial=0.0), 1e-300)
    multipliers = _complementary(
        -rows @ x[1:].T, limits - rows @ x[0], 1 / stiffness if stiffness else 1.0, size
    )
    if multipliers is None:
        return none
    weights = np.array([1.0, *multipliers])
    dz, dy, force = weights @ x, np.where(strong.constraints[0], weights @ t, 0.0), weights @ q
    sides = np.zeros(weak.shape[1])
    sides[index] = multipliers / norms
    kinks = slice(evaluation.program.inequality.size, -2 * active.n)
    sides[kinks] *= -evaluation.point.pieces[0]
    dy[active.equalities :] += sides[: -2 * active.n]
    lower = np.where(strong.lower[0], force, 0.0) + sides[-2 * active.n : -active.n]
    upper = np.where(strong.upper[0], -force, 0.0) + sides[-active.n :]
    m = evaluation.program.constraints
    return (dz, dy, lower, upper), change.constraints[:, m:] + (evaluation.jacobian[0, m:] @ dz)


def _without_multiplier(evaluation: Evaluation, active: ActiveSet) -> Mask:
    """The weakly active sides for these multipliers; kinks, whose force is not chosen among several, as before."""
    weak: Mask = active.sides & (evaluation.scaled_multiplier <= _ZERO)
    kinks = kink_sides(evaluation)
    weak[:, kinks] = active.weak[:, kinks]
    return weak


def _solve(system: System, a: Array, b: Array, v: Array) -> Step:
    return system.solve(*(torch.from_numpy(values[None]) for values in (a, b, v)))


def _weak_rows(evaluation: Evaluation, weak: Mask, change: Change) -> tuple[Array, Array, Index]:
    """G_W (k, n), -dg_W (k,), and which sides they are."""
    (index,) = np.nonzero(weak[0])
    n, m = evaluation.point.z.shape[1], evaluation.program.equality.size
    identity = np.eye(n)
    signs = np.ones(evaluation.first.constraints.shape[1] - m)
    signs[evaluation.program.inequality.size :] = -evaluation.point.pieces[0]  # a kink is -sigma r <= 0
    rows = np.concatenate([signs[:, None] * evaluation.jacobian[0, m:], -identity, identity])
    limits = np.concatenate([-signs * change.constraints[0, m:], -change.lower[0], change.upper[0]])
    return rows[index], limits[index], index


def _complementary(matrix: Array, offset: Array, compliance: float, size: float) -> Array | None:
    """m >= 0 with offset + matrix m >= 0, complementary; ``None`` if there is none.

    Args:
        compliance: Of the unit of the matrix: weak rows that strong ones already determine respond by rounding.
        size: Of the movement: what is nothing beside it is zero.
    """
    if not len(offset):
        return offset
    from scipy.optimize import nnls  # a quarter of a second to import, needed here only

    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    nothing = _ZERO * max(values.max(), compliance)
    kept, responding = values > nothing, np.diag(matrix) > nothing
    root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T  # matrix = root^T root
    target = -(vectors[:, kept].T @ offset) / np.sqrt(values[kept])
    multipliers: Array = 0 * offset
    if responding.any():  # of a column that is rounding, any multiple would be taken
        multipliers[responding] = nnls(root[:, responding], target)[0]
    held = root.T @ (root @ multipliers)
    slack = offset + held
    size = max(size, np.abs(held).max())
    good = slack.min() >= -_ZERO * size and np.abs(slack * multipliers).max() <= _ZERO * size * max(
        multipliers.max(), 1e-300
    )
    return multipliers if good else None
