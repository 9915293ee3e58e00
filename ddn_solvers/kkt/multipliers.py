"""Multipliers from the point alone: least squares of stationarity over the nearly active constraints.

    min_{nu, lambda >= 0, l >= 0, r >= 0}  | grad f + J_h^T nu + J_g^T lambda - l + r |

Where active rows depend on each other multipliers are not unique. Then those are taken whose Lagrangian bends
most on the null space of the active rows, max_y tr(Z^T H(y) Z), since that is the curvature which binds (of a
ball and a plane that touch there, the ball: Bonnans and Shapiro 2000, section 4.3: the second-order term is
the maximum over all multipliers), and of those the ones of minimum norm.

The minimum-norm solution serves if its signs are right (Gould et al. 2019, Prop. 4.5); otherwise the
problem with signs is solved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet, kink_sides
from ddn_solvers.arrays import Array, Index, Mask
from ddn_solvers.kkt.curvature import Curvature, curvature
from ddn_solvers.kkt.linear import DEPENDENT, least_squares
from ddn_solvers.kkt.operator import large_and_sparse
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual

_NEARLY_ACTIVE = 1e-5  # scaled slack within which a constraint may be active
_UNCHANGED = 1e-9  # relative change of a force, or of a multiplier that is held, that is rounding
_NOTHING = 1e-30  # entry of a unit vector that is zero
_ZERO = 1e-10  # relative difference of curvature, or multiplier, that counts as none
_CUTS = 100  # linear programs for one choice of multipliers
_CANCELLING = (
    1e6  # force of a multiplier relative to those of the objective that only dependent rows can hold
)
# And within which a point may lie on a kink: in a large set of data some residuals are that small without being zero, so
# that where the first is too far the second decides.
NEARLY_ON_KINK: Final = (1e-3, 1e-6)


def least_squares_multipliers(
    program: Program, bound: Bound, z: Array, nearly: float = NEARLY_ON_KINK[0]
) -> PrimalDual:
    """Multipliers of a batch of points, those of kinks that are ``nearly`` reached included; with slack they are zero."""
    evaluation = _on_kinks(program, bound, PrimalDual.resting(program, bound.parameters, z), nearly)
    near = evaluation.scaled_slack <= _NEARLY_ACTIVE
    near[:, kink_sides(evaluation)] = evaluation.point.pieces == 0
    return _fitted(evaluation, near, np.ones(program.equality.size, dtype=bool))


def without_cancellation(evaluation: Evaluation) -> Evaluation:
    """The points; where multipliers exceed every force by far and cancel each other, with those of least squares.

    Some backends let the multipliers of dependent rows grow without limit. Their rounding would hide whatever is
    wrong with the point.
    """
    program, bound, point = evaluation.program, evaluation.bound, evaluation.point
    forces = np.abs(point.y) * evaluation.reach / evaluation.force
    huge = np.flatnonzero(forces.max(axis=1, initial=0.0) > _CANCELLING)
    if not huge.size:
        return evaluation
    found = least_squares_multipliers(program, bound.take(huge), point.z[huge])
    point = PrimalDual(**{name: values.copy() for name, values in vars(point).items()})
    for k, i in enumerate(huge):
        point.put(int(i), found, k)
    return Evaluation.at(program, bound, point)


def with_kink_forces(
    program: Program, bound: Bound, point: PrimalDual, nearly: float = NEARLY_ON_KINK[0]
) -> PrimalDual:
    """A batch of points with the forces of the kinks on which they nearly lie, the other multipliers given."""
    if program.pieces is None:
        return point
    evaluation = _on_kinks(program, bound, point, nearly)
    near = np.zeros(evaluation.slack.shape, dtype=bool)
    near[:, kink_sides(evaluation)] = evaluation.point.pieces == 0
    return _fitted(evaluation, near, np.zeros(program.equality.size, dtype=bool))


def _on_kinks(program: Program, bound: Bound, point: PrimalDual, nearly: float) -> Evaluation:
    """The point with sigma = 0 wherever it is ``nearly`` on a kink."""
    evaluation = Evaluation.at(program, bound, point)
    if program.pieces is None:
        return evaluation
    near = evaluation.scaled_slack[:, kink_sides(evaluation)] <= nearly
    if not near.any():
        return evaluation
    pushed = point.y.copy()
    pushed[:, : program.constraints] = 1.0  # those of constraints may not be known yet
    on, loaded = (
        Evaluation.at(program, bound, replace(point, y=y, pieces=np.where(near, 0.0, point.pieces)))
        for y in (point.y, pushed)
    )
    passed = near & on.idle_kinks & loaded.idle_kinks  # ties of what a maximum passes over hold nothing
    if not passed.any():
        return on
    return Evaluation.at(program, bound, replace(point, pieces=np.where(near & ~passed, 0.0, point.pieces)))


def _fitted(evaluation: Evaluation, near: Mask, equality: Mask) -> PrimalDual:
    """The point with multipliers of the sides ``near`` and of the rows ``equality`` by least squares."""
    point, program = evaluation.point, evaluation.program
    equalities, q, n = program.equality.size, program.inequality.size, program.variables.size
    y, bounds = point.y.copy(), (point.lower.copy(), point.upper.copy())
    kinks = near.shape[1] - q - 2 * n
    for i in np.flatnonzero(near.any(axis=1) | equality.any()):
        inequality, kink, lower, upper = (
            np.flatnonzero(part) for part in np.split(near[i], [q, q + kinks, q + kinks + n])
        )
        free = np.concatenate([np.flatnonzero(equality), equalities + q + kink])
        signed = equalities + inequality
        columns = _columns(evaluation, int(i), np.concatenate([free, signed]), lower, upper)
        unit = 1 / _norms(columns)
        weights, norms = evaluation.kink_weights[i, kink], evaluation.row_norms[i, equalities + q + kink]
        unit[len(free) - len(kink) : len(free)] = _kink_units(weights, norms)
        measured = _scaled(columns, unit)
        solution = unit * _signed_least_squares(measured, -evaluation.stationarity[i], len(free))
        if len(kink) and isinstance(measured, np.ndarray):
            of_kinks = slice(len(free) - len(kink), len(free))
            limits = _limits(len(unit), slice(len(free), None), of_kinks, np.abs(weights))
            solution = _within(solution, measured, limits, _balls(program, free), unit)
        cuts = np.cumsum([len(free), len(inequality), len(lower)])
        y[i, free], y[i, signed], bounds[0][i, lower], bounds[1][i, upper] = np.split(solution, cuts)
    return replace(point, y=y, lower=bounds[0], upper=bounds[1])


def _within(solution: Array, columns: Array, limits: Array, balls: tuple[Index, ...], unit: Array) -> Array:
    """Where kinks depend on each other, those of the multipliers that balance as much which are inside their limits."""
    choice = _Choice(solution, limits, balls, unit, np.zeros((len(unit), 0)))
    if choice.holds(solution) or not np.isfinite(columns).all():
        return solution
    free = _undetermined(columns)
    inside = replace(choice, free=unit[:, None] * free).inmost() if free.shape[1] else None
    return solution if inside is None else inside


def _undetermined(columns: Array) -> Array:
    """Directions of multipliers that exert no force, orthonormal, (rows, d): the null space of ``columns`` (n, rows)."""
    _, singular, rotated = np.linalg.svd(columns)
    rank = int((singular > DEPENDENT * max(singular.max(initial=0.0), 1.0)).sum())
    # LAPACK leaves subnormal numbers in rows that share no variable, and arithmetic on those takes a hundred times as long.
    return np.where(np.abs(rotated[rank:].T) < _NOTHING, 0.0, rotated[rank:].T)


def _limits(count: int, signed: slice, kinks: slice, weights: Array) -> Array:
    """Of so many multipliers, (2, count): none, but >= 0 for those that are ``signed`` and |mu| <= w for ``kinks``."""
    limits = np.repeat([[-np.inf], [np.inf]], count, axis=1)
    limits[0, signed] = 0.0
    limits[:, kinks] = -weights, weights
    return limits


def _columns(evaluation: Evaluation, i: int, rows: Index, lower: Index, upper: Index) -> Any:
    """Gradients of rows of c and of bounds of one sample, (n, rows): an array, or sparse as the problem is."""
    n = evaluation.point.z.shape[1]
    if not large_and_sparse(evaluation.H.pattern, evaluation.J.pattern):
        identity = np.eye(n)
        return np.concatenate([evaluation.jacobian[i, rows], -identity[lower], identity[upper]]).T
    import scipy.sparse as sp

    jacobian = evaluation.J.pattern.matrix(evaluation.J.nonzeros[i]).tocsr()
    units = sp.eye_array(n, format="csr")
    return sp.vstack([jacobian[rows], -units[lower], units[upper]]).T.tocsc()


def _signed_least_squares(columns: Any, target: Array, free: int) -> Array:
    """min |columns y - target| with y >= 0 from entry ``free`` on."""
    if not isinstance(columns, np.ndarray):
        return _sparse_signed_least_squares(columns, target, free)
    if columns.shape[1] == 0 or not np.isfinite(columns).all() or not np.isfinite(target).all():
        return np.zeros(columns.shape[1])
    solution = np.asarray(np.linalg.lstsq(columns, target, rcond=None)[0], dtype=float)
    if (solution[free:] < 0).any():
        from scipy.optimize import lsq_linear  # costs a quarter of a second to import

        lowest = np.where(np.arange(len(solution)) < free, -np.inf, 0.0)
        solution = lsq_linear(columns, target, (lowest, np.inf), method="bvls").x
    return solution


def _sparse_signed_least_squares(columns: Any, target: Array, free: int) -> Array:
    count = columns.shape[1]
    if count == 0 or not np.isfinite(columns.data).all() or not np.isfinite(target).all():
        return np.zeros(count)
    solution = least_squares(columns.tocsr(), target)
    if not (solution[free:] >= 0).all():
        from scipy.optimize import lsq_linear  # costs a quarter of a second to import

        lowest = np.where(np.arange(count) < free, -np.inf, 0.0)
        solution = lsq_linear(columns.tocsr(), target, (lowest, np.inf), method="trf", lsq_solver="lsmr").x
    result: Array = solution
    return result


def _scaled(columns: Any, unit: Array) -> Any:
    if isinstance(columns, np.ndarray):
        return columns * unit
    import scipy.sparse as sp

    return columns @ sp.diags_array(unit)


def _kink_units(weights: Array, norms: Array) -> Array:
    """In which multipliers of kinks are measured, so that parallel ones share a force as their weights are."""
    good = (weights > 0) & (norms > 0)
    return np.where(good, np.sqrt(np.where(good, weights, 1.0) / np.where(good, norms, 1.0)), 1.0)


def _norms(columns: Any) -> Array:
    """Of each column, one where it vanishes."""
    if isinstance(columns, np.ndarray):
        norms: Array = np.linalg.norm(columns, axis=0)
    else:
        import scipy.sparse as sp

        norms = sp.linalg.norm(columns, axis=0)
    return np.where(norms > 0, norms, 1.0)


@dataclass(frozen=True)
class _Choice:
    """Multipliers known + free t of one sample, any t (d,), and the limits between which they have to be.

    Attributes:
        known: (rows,).
        limits: Between which numbers each lies, (2, rows): none for equalities, >= 0, |mu| <= w.
        balls: Rows of each norm of several entries, whose |mu| <= w holds of all of them together.
        unit: In which each is measured, (rows,); see ``_kink_units``.
        free: Directions in which the multipliers are not determined, (rows, d).
    """

    known: Array
    limits: Array
    balls: tuple[Index, ...]
    unit: Array
    free: Array

    def _room(self) -> tuple[Array, Array, Array]:
        """Rows, right-hand side and unit of every limit, as rows t <= room for multipliers known + free t."""
        least, most = self.limits
        below, above = np.isfinite(least), np.isfinite(most)
        rows = np.concatenate([-self.free[below], self.free[above]])
        room = np.concatenate([(self.known - least)[below], (most - self.known)[above]])
        return rows, room, np.concatenate([self.unit[below], self.unit[above]])

    def largest(self, gain: Array) -> Array | None:
        """Multipliers that maximise ``gain`` (d,) along ``free``; ``None`` if there is no limit."""
        from scipy.optimize import linprog  # a quarter of a second to import, needed here only

        if not len(gain):
            return self.known
        rows, room, _ = self._room()
        found = linprog(-gain, rows, np.maximum(room, 0), bounds=(None, None))
        return self.known + self.free @ found.x if found.status == 0 else None

    def holds(self, multipliers: Array, depth: float = 0.0) -> bool:
        """Whether they are inside of the limits of kinks, by ``depth`` units of each."""
        least, most = self.limits
        kinks, margin = np.isfinite(most), depth * self.unit
        inside = (multipliers >= least + margin) & (multipliers <= most - margin)
        return bool(inside[kinks].all()) and not self._outside(multipliers, depth)

    def _outside(self, multipliers: Array, depth: float) -> list[Index]:
        """The balls in which they are not, by ``depth`` units."""
        return [
            ball
            for ball in self.balls
            if np.linalg.norm(multipliers[ball]) > self.limits[1, ball[0]] - depth * self.unit[ball[0]]
        ]

    def inmost(self) -> Array | None:
        """Multipliers as far inside of all limits as can be, in their units; ``None`` if there are none inside.

        Balls by cutting planes (Kelley 1960): a half space for each in which they were not.
        """
        from scipy.optimize import linprog  # a quarter of a second to import, needed here only

        rows, room, unit = self._room()
        d = self.free.shape[1]
        for _ in range(_CUTS):
            found = linprog(
                [*[0.0] * d, -1.0], np.column_stack([rows, unit]), room, bounds=[*[(None, None)] * d, (0, 1)]
            )
            if found.status != 0:
                return None
            multipliers, depth = self.known + self.free @ found.x[:d], float(found.x[d])
            # Halfway in from the best there can be is inside enough.
            outside = self._outside(multipliers, depth / 2 - _ZERO)
            if not outside:
                return multipliers
            for ball in outside:
                outward = multipliers[ball] / np.linalg.norm(multipliers[ball])
                rows = np.vstack([rows, outward @ self.free[ball]])
                room = np.append(room, self.limits[1, ball[0]] - outward @ self.known[ball])
                unit = np.append(unit, self.unit[ball[0]])
        return None


@dataclass(frozen=True)
class _ActiveRows(_Choice):
    """The active rows of one sample, bounds included, and the choice of their multipliers.

    With J the active rows of c, ``free`` is the null space of J^T in the variables that no bound fixes; bounds take what
    J^T y is in the others.

    Attributes:
        index: Which rows of c, lower bounds and upper bounds they are.
        norms: Of their gradients, (rows,).
        on_free: J in the variables that no bound fixes, (rows of c, free variables).
    """

    index: tuple[Index, Index, Index]
    norms: Array
    on_free: Array

    @staticmethod
    def of(evaluation: Evaluation, active: ActiveSet, i: int) -> _ActiveRows:
        point = evaluation.point
        rows, left, right = (np.flatnonzero(m[i]) for m in (active.constraints, active.lower, active.upper))
        J, loose = evaluation.jacobian[i, rows], ~active.fixed[i]
        known = np.concatenate([point.y[i, rows], point.lower[i, left], point.upper[i, right]])
        m = evaluation.program.constraints
        weights = np.abs(evaluation.kink_weights[i, rows[rows >= m] - m])
        of_rows, of_kinks = slice(0, len(rows)), slice(len(rows) - len(weights), len(rows))
        limits = _limits(len(known), slice(int((rows < active.equalities).sum()), None), of_kinks, weights)
        norms = np.concatenate([np.linalg.norm(J, axis=1), np.ones(len(left) + len(right))])
        unit = np.ones(len(known))
        unit[of_kinks] = _kink_units(weights, norms[of_kinks])
        scale = np.where(norms[of_rows] > 0, norms[of_rows], 1.0)
        undetermined = _undetermined(J[:, loose].T / scale) / scale[:, None]
        taken = J.T @ undetermined
        free = np.concatenate([undetermined, taken[left], -taken[right]])
        balls = _balls(evaluation.program, rows)
        return _ActiveRows(known, limits, balls, unit, free, (rows, left, right), norms, J[:, loose])

    def put(self, point: PrimalDual, i: int, values: Array) -> None:
        """Write multipliers into sample ``i`` of a point."""
        rows, left, right = self.index
        cuts = np.cumsum([len(rows), len(left)])
        point.y[i, rows], point.lower[i, left], point.upper[i, right] = np.split(values, cuts)

    def bends(self, evaluation: Evaluation, i: int, bent: Curvature) -> Array:
        """tr(Z^T H_j Z) of each row, (rows,), Z being the null space of all: bounds are straight, and all of a QP."""
        if bent.null is None or evaluation.program.quadratic:
            return np.zeros(len(self.known))
        null = bent.null[i] * bent.size[i]
        rows, one = self.index[0], evaluation.take(np.array([i]))
        weights = np.zeros((len(rows), evaluation.functions.rows))
        weights[np.arange(len(rows)), rows] = 1.0
        z = np.repeat(one.point.z, len(rows), axis=0)
        inputs = [p if p.ndim == 1 else np.repeat(p, len(rows), axis=0) for p in one.inputs]
        nonzeros, pattern = (
            evaluation.functions.hessian(z, inputs, weights, 0.0),
            evaluation.functions.hessian_pattern,
        )
        projection = null.T @ null  # tr(Z^T H_j Z) = sum of H_j * Z Z^T
        straight = np.zeros(len(self.known) - len(rows))
        return np.concatenate([nonzeros @ projection[pattern.indices, pattern.columns], straight])


def _balls(program: Program, rows: Index) -> tuple[Index, ...]:
    """Where among ``rows`` of c those of each norm of several entries are."""
    if program.pieces is None or program.numbers.all():
        return ()
    kinks = np.flatnonzero(rows >= program.constraints)
    group = program.pieces.group[rows[kinks] - program.constraints]
    balls = (kinks[group == g] for g in np.unique(group))
    return tuple(ball for ball in balls if len(ball) > 1)


def dependent_rows(evaluation: Evaluation, active: ActiveSet, bent: Curvature) -> tuple[Mask, Mask, Mask]:
    """Active rows of c, lower and upper bounds whose gradients depend on those of others, as masks of each."""
    found = tuple(np.zeros_like(mask) for mask in (active.constraints, active.lower, active.upper))
    for i in np.flatnonzero(bent.rank < bent.rows):
        rows = _ActiveRows.of(evaluation, active, int(i))
        share = np.abs(rows.free * rows.norms[:, None]).max(axis=1, initial=0.0)
        involved = (share > 1e-8 * share.max(initial=0.0)) | (rows.norms <= 1e-300)
        cuts = np.cumsum([len(index) for index in rows.index[:2]])
        for mask, index, part in zip(found, rows.index, np.split(involved, cuts), strict=True):
            mask[i, index] = part
    rows_of_c, lower, upper = found
    return rows_of_c, lower, upper


def canonical_multipliers(evaluation: Evaluation, active: ActiveSet) -> PrimalDual:
    """The same points; where the active rows are dependent, with the multipliers described above.

    Args:
        evaluation: At KKT points.
        active: The active set there.
    """
    bent = curvature(evaluation, active)
    if bent.null is None:  # too many to choose from
        return evaluation.point
    point = PrimalDual(**{name: values.copy() for name, values in vars(evaluation.point).items()})
    for i in map(int, np.flatnonzero(bent.rank < bent.rows)):
        rows = _ActiveRows.of(evaluation, active, i)
        rows.put(point, i, _of_binding_curvature(rows, rows.bends(evaluation, i, bent)))
    return point


def steepest_multipliers(
    evaluation: Evaluation, active: ActiveSet, dc: Array, lower: Array, upper: Array
) -> PrimalDual | None:
    """The multipliers of one sample (B = 1) that maximise d_p L = y^T dc + l^T d lower - r^T d upper.

    Returns:
        The point itself where they are unique; ``None`` where d_p L has no limit: no solution is near in
        that direction.
    """
    bent = curvature(evaluation, active)
    if bent.rank[0] == bent.rows[0]:
        return evaluation.point
    rows = _ActiveRows.of(evaluation, active, 0)
    c, left, right = rows.index
    change = np.concatenate([dc[c], lower[left], -upper[right]]) @ rows.free
    # Curvature decides between those that are equally steep.
    curved = rows.bends(evaluation, 0, bent) @ rows.free
    size = np.abs(curved).max(initial=0.0)
    if size > 0:
        change = change + 1e-7 * max(np.abs(change).max(), 1e-300) * curved / size
    chosen = rows.largest(change)
    if chosen is None:
        return None
    point = PrimalDual(**{name: values.copy() for name, values in vars(evaluation.point).items()})
    rows.put(point, 0, chosen)
    return point


def _of_binding_curvature(rows: _ActiveRows, bends: Array) -> Array:
    """The canonical multipliers of one sample; ``bends`` is what each of its rows adds to the trace."""
    free, known, curved = rows.free, rows.known, bends @ rows.free
    largest = np.abs(bends).max(initial=0.0)
    if np.abs(curved).max(initial=0.0) > _ZERO * largest * np.abs(free).max(initial=0.0):
        binding = rows.largest(curved)
        if binding is not None:  # otherwise the curvature has no limit, and nothing can be chosen by it
            known = binding
            free = free @ np.linalg.svd(curved[None])[2][1:].T  # along which it stays what it is
    unit = rows.unit
    found = unit * _minimum_norm(free / unit[:, None], known / unit, *(rows.limits / unit))
    moved = (found - known)[: len(rows.on_free)]
    forces = np.abs(found[: len(moved)]) @ np.abs(rows.on_free)
    if (np.abs(moved @ rows.on_free) > _UNCHANGED * forces.max(initial=0.0)).any():
        found = known  # rows that are dependent to six digits
    if rows.holds(found, _ZERO):
        return found
    inside = rows.inmost()  # kinks that hold: as far from being left as they can be
    return found if inside is None else inside


def _minimum_norm(free: Array, known: Array, least: Array, most: Array) -> Array:
    """y = known + free s of minimum norm, least <= y <= most; ``known`` where that is not found.

    With Q orthonormal and the same span, y = nearest + Q s where nearest is orthogonal to Q: that of minimum norm
    has the s that has.
    """
    Q = torch.linalg.qr(torch.from_numpy(free))[0].numpy()
    nearest = known - Q @ (Q.T @ known)
    y, held = nearest, np.full(len(known), np.nan)  # entries that are held at a limit
    for _ in known:
        margin = _ZERO * np.abs(y).max(initial=0.0)
        outside = np.isnan(held) & ((y < least - margin) | (y > most + margin))
        if not outside.any():
            return np.clip(y, least, most)
        held = np.where(outside, np.clip(y, least, most), held)
        at = np.flatnonzero(~np.isnan(held))
        there = torch.from_numpy(Q[at]), torch.from_numpy(held[at] - nearest[at])[:, None]
        y = nearest + Q @ torch.linalg.lstsq(*there, rcond=DEPENDENT, driver="gelsy").solution[:, 0].numpy()
        if not np.allclose(y[at], held[at], rtol=0, atol=_UNCHANGED * np.abs(known).max()):
            return known
        y[at] = held[at]
    return known
