"""A primal-dual interior point method for small smooth problems, whole batches in one go.

With the sides w(z) = [-g(z); z - lower; upper - z] >= 0, their slacks s > 0 and multipliers k > 0, a step solves

    [ H + W^T S W + delta I   A^T ] [ dz ]     [ grad f - W^T (mu/s - S (w - s)) ]
    [ A                       -e  ] [ y  ]  = -[ h                               ],   S = k/s,  ds = W dz + w - s,

A and W the Jacobians of h and w, H the Hessian of f + y^T h - k^T w: Newton's method for the conditions s k = mu, where mu
goes to zero (Nocedal and Wright 2006, section 19.3; as fast as Waechter and Biegler 2006, section 2.1, let it). Where there are
no sides, it is Newton's method. delta makes all curvature on the null space of A positive (their section 3.4). A step
is taken as far as it lowers the merit function f - mu sum log s + sigma |(h, w - s)|_1 (their algorithm 18.3), if need be after
a correction of second order (section 18.3). Every operation works on all samples at once: what a compiled solver does for
one sample costs as much as this for thirty. Samples do not see each other, so that each gets the same point in any batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ddn_solvers.adapter import (
    Array,
    Batch,
    BatchAdapter,
    Capabilities,
    Dialect,
    Feature,
    Method,
    Points,
    ProblemClass,
    Status,
)
from ddn_solvers.arrays import unit_without_symmetry

_SUFFICIENT = 1e-4  # share of the predicted decrease of the merit function that a step has to bring
_NOISE = 1e-14  # relative change of the merit function that is rounding
_SHORTEST = 1e-8  # part of a step below which the search has failed
# Curvature, relative to the largest of H, that is none, and what stands in its place.
_FLAT, _SMALLEST = 1e-10, 1e-4
_MARGIN = 2.0  # delta over the most negative curvature: more makes short steps, which stay in the valley
_RHO = 1e3  # of H + rho A^T A, which is tried for whether all curvature is positive
_CORNER = 1e-12  # e, relative to A A^T over the largest of H: dependent rows leave the matrix regular
# sigma over the largest multiplier, and the part of it that stays from step to step.
_PENALTY, _FORGOTTEN = 1.1, 0.1
# mu at the start and at the end over the tolerance, both relative to the change of the objective over the point's size.
_BARRIER, _LAST_BARRIER = 0.1, 0.1
_SOLVED = 10.0  # residuals of the conditions, over mu, at which mu is lowered
_LINEAR, _SUPERLINEAR = 0.2, 1.5  # to the lesser of 0.2 mu and mu^1.5
_INSIDE = 1e-2  # how far inside of bounds and inequalities the search begins, relative to the size of what they limit
_TO_BOUNDARY = 0.995  # part of the way to the boundary that a step may go
_AT_ONCE = 2**20  # entries of all matrices of the samples that are solved at once
_MAX_LOWERED = 3  # times in one step
_CENTRAL = 1e10  # factor by which s k may be away from mu


class NewtonAdapter(BatchAdapter):
    """One method, batch or not."""

    capabilities = Capabilities(
        summary="small smooth problems, whole batches at a time",
        package="numpy",
        pip="numpy",
        methods=(
            Method(
                "interior-point",
                frozenset({ProblemClass.QP, ProblemClass.LEAST_SQUARES, ProblemClass.NLP}),
                frozenset(
                    {
                        Feature.EQUALITY,
                        Feature.INEQUALITY,
                        Feature.BOUNDS,
                        Feature.NONCONVEX,
                        Feature.NONSMOOTH,
                    }
                ),
                dialect=Dialect(
                    max_iter="max_iter",
                    tolerance="tolerance",
                    time_limit="time_limit",
                    tight=1e-8,
                    defaults={"max_iter": 50, "time_limit": np.inf},
                    accepts="max_iter tolerance time_limit",
                ),
            ),
        ),
    )

    def where(self, name: str) -> str:
        return f"newton:{name}"

    def solve_all(self, batch: Batch) -> Points:
        """All samples together, and so their time."""
        settings = self.native(batch)
        deadline = min(batch.options.deadline, time.monotonic() + settings["time_limit"] * len(batch))
        steps, tolerance = int(settings["max_iter"]), settings["tolerance"]
        size, parts = batch.initial.shape[1] + batch.program.constraints, []
        at_once = max(1, _AT_ONCE // max(1, size**2))
        with np.errstate(all="ignore"):  # a sample that runs off is judged, not computed with
            for start in range(0, len(batch), at_once):
                part = batch.take(range(start, min(start + at_once, len(batch))))
                parts.append(_solve_all(part, steps, tolerance, deadline))
        return Points.joined(parts)


def _solve_all(batch: Batch, max_iter: int, tolerance: float, deadline: float) -> Points:
    points = Points.at(batch.program, batch.initial, Status.ITERATION_LIMIT)
    at, open_ = _Iterates.at_start(batch), np.ones(len(batch), dtype=bool)
    status, steps = Status.ITERATION_LIMIT, max_iter
    for count in range(1, max_iter + 1):
        if time.monotonic() > deadline:
            status, steps = Status.TIME_LIMIT, count - 1
            break
        arrived, stuck = at.advance(open_, tolerance)
        at.put(points, open_ & arrived, Status.OPTIMAL, count)
        at.put(points, open_ & stuck & ~arrived, Status.NUMERICAL_ERROR, count)
        open_ &= ~(arrived | stuck)
        if not open_.any():
            break
        half = len(open_)
        while 2 * open_.sum() <= half:  # few sizes, for each of which functions are mapped once
            half = (half + 1) // 2
        if half < len(open_):
            left = np.argsort(~open_, kind="stable")[:half]
            at, open_ = at.take(left), open_[left]
    at.put(points, open_, status, steps)
    return points


@dataclass(frozen=True)
class _Sides:
    """w(z) >= 0 and its Jacobian W for a batch; what is infinite stays at 1.

    Attributes:
        lower, upper: (B, n).
        present: Which sides there are, (B, q) or, with bounds, (B, q + 2n).
        free: Variables whose bounds do not coincide, (B, n).
    """

    lower: Array
    upper: Array
    present: Any
    free: Any

    @staticmethod
    def of(batch: Batch) -> _Sides:
        lower, upper, free = batch.lower, batch.upper, batch.lower != batch.upper
        present = [np.ones((len(lower), batch.program.inequality.size), dtype=bool)]
        if np.isfinite(lower).any() or np.isfinite(upper).any():
            present += [np.isfinite(side) & free for side in (lower, upper)]
        return _Sides(lower, upper, np.concatenate(present, axis=1), free)

    def take(self, rows: Any) -> _Sides:
        return _Sides(self.lower[rows], self.upper[rows], self.present[rows], self.free[rows])

    def at(self, z: Array, g: Array) -> Array:
        """w(z), (B, sides)."""
        bounds = [z - self.lower, self.upper - z] if self.present.shape[1] > g.shape[1] else []
        return np.where(self.present, np.concatenate([-g, *bounds], axis=1), 1.0)

    def along(self, G: Array, dz: Array) -> Array:
        """W dz, G being the Jacobian of g, (B, q, n)."""
        bounds = [dz, -dz] if self.present.shape[1] > G.shape[1] else []
        rows = -_times(G, dz)
        return np.where(self.present, np.concatenate([rows, *bounds], axis=1), 0.0)

    def back(self, G: Array, v: Array) -> Array:
        """W^T v."""
        of_rows, lower, upper = self._split(G, v)
        return lower - upper - _transposed_times(G, of_rows)

    def squared(self, G: Array, v: Array) -> Array:
        """W^T diag(v) W, (B, n, n)."""
        of_rows, lower, upper = self._split(G, v)
        found = G.transpose(0, 2, 1) @ (of_rows[:, :, None] * G)
        np.einsum("bii->bi", found)[:] += lower + upper
        return found

    @staticmethod
    def _split(G: Array, v: Array) -> tuple[Array, Any, Any]:
        _, q, n = G.shape
        if v.shape[1] == q:
            return v, 0.0, 0.0
        return v[:, :q], v[:, q : q + n], v[:, q + n :]

    def inside(self, z: Array) -> Array:
        """Points moved off the bounds."""
        room = np.where(self.free, self.upper - self.lower, 0.0)
        lowest, highest = (
            side
            + np.where(
                np.isfinite(side), sign * _INSIDE * np.minimum(np.maximum(1.0, np.abs(side)), room), 0.0
            )
            for side, sign in ((self.lower, 1), (self.upper, -1))
        )
        return np.where(self.free, np.clip(z, lowest, highest), self.lower)


@dataclass
class _Iterates:
    """Where samples are: points, slacks, multipliers, and what is remembered of their last step."""

    program: Any
    samples: Any  # their numbers in the batch
    parameters: Sequence[Array]
    sides: _Sides
    z: Array  # (B, n)
    y: Array  # (B, m)
    s: Array  # (B, sides), 1 of those that are not present
    k: Array  # (B, sides), 0 of those
    mu: Array  # (B,)
    penalty: Array  # (B,), sigma
    forces: Array  # (B, n), on fixed variables

    @staticmethod
    def at_start(batch: Batch) -> _Iterates:
        size, program, sides = len(batch), batch.program, _Sides.of(batch)
        y = np.zeros((size, program.equality.size))
        for multipliers, point in zip(y, batch.warm_start or [None] * size, strict=True):
            if point is not None and point.equality is not None:
                multipliers[:] = point.equality
        z = sides.inside(batch.initial) if sides.present.any() else batch.initial.copy()
        ones, none = np.ones(sides.present.shape), np.zeros(size)
        at = _Iterates(
            program, np.arange(size), batch.parameters, sides, z, y, ones, 0 * ones, none, none, 0 * z
        )
        if sides.present.any():
            first = program.first_order(z, batch.parameters)
            G = program.jacobian_pattern.dense(first.jacobian)[:, y.shape[1] :]
            w, far = sides.at(z, first.constraints[:, y.shape[1] :]), _size(z)[:, None]
            reach = np.concatenate(
                [np.sqrt((G**2).sum(axis=2)) * far, np.zeros_like(w[:, G.shape[1] :])], axis=1
            )
            at.s = np.maximum(w, _INSIDE * (reach + np.abs(w)))
            hessian = program.hessian(z, batch.parameters, np.zeros(first.constraints.shape[1]))
            at.mu = np.where(sides.present.any(axis=1), _BARRIER * _energy(first.gradient, hessian, z), 0.0)
            at.k = np.where(sides.present, at.mu[:, None] / at.s, 0.0)
        return at

    def take(self, rows: Any) -> _Iterates:
        parameters = [p if p.ndim == 1 else p[rows] for p in self.parameters]
        of_samples = (
            values[rows] for values in (self.z, self.y, self.s, self.k, self.mu, self.penalty, self.forces)
        )
        return _Iterates(self.program, self.samples[rows], parameters, self.sides.take(rows), *of_samples)

    def put(self, points: Points, which: Any, status: Status, iterations: int) -> None:
        """Say of the samples ``which``, (B,) bool, where they are now."""
        rows, (n, q) = self.samples[which], (self.z.shape[1], self.program.inequality.size)
        points.primal[rows], k = self.z[which], self.k[which]
        points.put_forces(rows, -self.forces[which], self.y[which], k[:, :q])
        if k.shape[1] > q:
            points.lower[rows] += k[:, q : q + n]
            points.upper[rows] += k[:, q + n :]
        finite = np.isfinite(points.primal[rows]).all(axis=1) & np.isfinite(self.y[which]).all(axis=1)
        finite &= np.isfinite(k).all(axis=1)
        for i, good in zip(rows, finite, strict=True):
            points.status[i] = status if good else Status.NUMERICAL_ERROR
            points.iterations[i] = iterations
            if status is Status.NUMERICAL_ERROR:
                points.message[i] = "no step, or no part of it, lowers the merit function"

    def advance(self, open_: Any, tolerance: float) -> tuple[Any, Any]:
        """Take a step with the samples that are ``open_``; who has arrived, and who is stuck, (B,) bool each."""
        here, sides, n = _Local.of(self), self.sides, self.z.shape[1]
        energy, searching = _energy(here.gradient, here.hessian, self.z), open_ & ~here.lost
        last = _LAST_BARRIER * tolerance * energy
        if sides.present.shape[1]:
            self._lower_barrier(here, energy, last)
        stiffness, pull = self.k / self.s, np.where(sides.present, self.mu[:, None] / self.s, 0.0)
        K = self._matrix(here, stiffness, searching)
        pushed = here.gradient - sides.back(here.G, pull - stiffness * here.apart)
        right = -np.concatenate([pushed * sides.free, here.h], axis=1)
        dz, y = np.split(_solution(K, right), [n], axis=1)
        ds = sides.along(here.G, dz) + here.apart
        k, room = pull - stiffness * ds, _room(self.s, ds)
        arrived = (_largest(dz) <= tolerance * _size(self.z)) & (self.mu <= last) & ~here.lost
        arrived &= (self.s * self.k).max(axis=1, initial=0.0) <= _SOLVED * last
        weight = np.maximum(_largest(y), _largest(k[:, : here.G.shape[1]]))
        self.penalty = np.maximum(_FORGOTTEN * self.penalty, _PENALTY * weight)
        merit = here.f + self.penalty * here.violation - self.mu * np.log(self.s).sum(axis=1)
        merit += _NOISE * (np.abs(here.f) + self.penalty * here.violation)
        slope = (here.gradient * dz).sum(axis=1) - self.mu * (ds / self.s).sum(axis=1)
        slope -= self.penalty * here.violation
        search = _LineSearch(self, K, here.G, stiffness, dz, ds, merit, slope)
        z, s, moved = search.run(room, searching & ~arrived)
        z = np.where(arrived[:, None], self.z + room[:, None] * dz, z)
        self.forces = np.where(sides.free, 0.0, here.unbalanced(sides, y, k))
        lost = here.lost[:, None]
        away = sides.inside(self.z + _size(self.z)[:, None] * unit_without_symmetry(n)) if lost.any() else z
        self.z = np.where(lost, away, z)
        self.y, self.penalty = np.where(lost, 0.0, y), np.where(here.lost, 0.0, self.penalty)
        k = np.where(lost, self.k, self.k + _room(self.k, k - self.k)[:, None] * (k - self.k))
        center = self.mu[:, None] / s
        self.s, self.k = s, np.where(sides.present, np.clip(k, center / _CENTRAL, center * _CENTRAL), 0.0)
        return arrived, ~arrived & ~moved & ~here.lost

    def _lower_barrier(self, here: _Local, energy: Array, last: Array) -> None:
        """Lower mu, of the samples whose conditions hold up to it; all in units of the objective."""
        unbalanced = _largest(here.unbalanced(self.sides, self.y, self.k) * self.sides.free)
        off = np.maximum(unbalanced * _size(self.z), self.penalty * here.violation)
        for _ in range(_MAX_LOWERED):
            apart = np.where(self.sides.present, self.s * self.k - self.mu[:, None], 0.0)
            solved = np.maximum(off, _largest(apart)) <= _SOLVED * self.mu
            if not solved.any():
                break
            lower = np.minimum(_LINEAR * self.mu, energy * (self.mu / energy) ** _SUPERLINEAR)
            self.mu = np.where(solved, np.maximum(lower, np.minimum(last, self.mu)), self.mu)

    def _matrix(self, here: _Local, stiffness: Array, open_: Any) -> Array:
        """K, with curvature positive along the constraints in the samples that are ``open_``."""
        A, free = here.A, self.sides.free
        (batch, m, n), largest = A.shape, np.abs(here.hessian).max(axis=1, initial=0.0)
        unit = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        H = self.program.hessian_pattern.dense(here.hessian)
        if stiffness.shape[1]:
            H = H + self.sides.squared(here.G, stiffness)
        if not free.all():
            A = A * free[:, None, :]
            H = np.where(free[:, None, :] & free[:, :, None], H, unit[:, None, None] * np.eye(n))
        norms = np.sqrt((A**2).sum(axis=2))
        rows = A / np.where(norms > 0, norms, 1.0)[:, :, None]
        lifted = (rows.transpose(0, 2, 1) * (_RHO * unit)[:, None, None]) @ rows
        lifted += H
        good = open_ & np.isfinite(lifted.sum(axis=(1, 2)))
        bent = _not_positive(lifted, np.flatnonzero(good))
        K = np.zeros((batch, n + m, n + m))
        K[:, :n, :n], K[:, n:, :n], K[:, :n, n:] = H, A, A.transpose(0, 2, 1)
        diagonal = np.einsum("bii->bi", K)
        diagonal[:, n:] = -_CORNER * norms**2 / unit[:, None]
        if bent.size:  # or nearly so: their eigenvalues decide
            along, big = np.eye(n) - np.linalg.pinv(rows[bent]) @ rows[bent], unit[bent, None, None]
            least = np.linalg.eigvalsh(along @ H[bent] @ along + big * (np.eye(n) - along))[:, 0]
            delta = np.maximum(_MARGIN * -least, _SMALLEST * unit[bent])
            diagonal[bent, :n] += np.where(least <= _FLAT * unit[bent], delta, 0.0)[:, None]
        return K


@dataclass(frozen=True)
class _Local:
    """Values and derivatives at the points of a batch.

    Attributes:
        hessian: Nonzeros of that of the Lagrangian.
        apart: w - s.
        lost: A row that does not hold has no gradient, as in the middle of a sphere, (B,).
    """

    f: Array
    gradient: Array
    h: Array
    A: Array
    G: Array
    hessian: Array
    apart: Array
    lost: Any

    @staticmethod
    def of(at: _Iterates) -> _Local:
        m, program = at.y.shape[1], at.program
        first = program.first_order(at.z, at.parameters)
        J, h, g = program.jacobian_pattern.dense(first.jacobian), *np.split(first.constraints, [m], axis=1)
        multipliers = np.concatenate([at.y, at.k[:, : g.shape[1]]], axis=1)
        hessian = program.hessian(at.z, at.parameters, multipliers)
        lost = ((J == 0).all(axis=2) & np.concatenate([h != 0, g > 0], axis=1)).any(axis=1)
        apart = at.sides.at(at.z, g) - at.s
        return _Local(first.objective, first.gradient, h, J[:, :m], J[:, m:], hessian, apart, lost)

    @cached_property
    def violation(self) -> Array:
        """|(h, w - s)|_1, (B,)."""
        found: Array = np.abs(self.h).sum(axis=1) + np.abs(self.apart).sum(axis=1)
        return found

    def unbalanced(self, sides: _Sides, y: Array, k: Array) -> Array:
        """grad f + A^T y - W^T k, (B, n)."""
        return self.gradient + _transposed_times(self.A, y) - sides.back(self.G, k)


@dataclass
class _LineSearch:
    """How far to go along a step (dz, ds) of a batch.

    Attributes:
        merit, slope: Of the merit function at its beginning, (B,).
    """

    at: _Iterates
    K: Array
    G: Array
    stiffness: Array
    dz: Array
    ds: Array
    merit: Array
    slope: Array

    def run(self, share: Array, searching: Any) -> tuple[Array, Array, Any]:
        """Where the steps lead, z and s, and which of the samples ``searching`` they bring on.

        Args:
            share: How far to go at most, (B,).
        """
        z, s, moved = self.at.z.copy(), self.at.s.copy(), np.zeros(len(self.dz), dtype=bool)
        corrected = False
        while searching.any():
            limit = self.merit + _SUFFICIENT * share * self.slope
            tried_z, tried_s = self.at.z + share[:, None] * self.dz, self.at.s + share[:, None] * self.ds
            there, h, apart, tried_s = self._merit(tried_z, tried_s)
            lower = searching & (there <= limit)
            if not corrected and (searching & ~lower).any():
                back_z, back_s = self._back(tried_z, tried_s, h, apart)
                helped, back_s = self._helped(back_z, back_s, limit)
                helped &= searching & ~lower
                tried_z, tried_s = (
                    np.where(helped[:, None], a, b) for a, b in ((back_z, tried_z), (back_s, tried_s))
                )
                lower = lower | helped
            corrected = True
            z, s = np.where(lower[:, None], tried_z, z), np.where(lower[:, None], tried_s, s)
            moved = moved | lower
            # To the lowest point of the parabola through both values.
            lowest = -self.slope * share**2 / (2 * (there - self.merit - self.slope * share))
            share = np.clip(np.nan_to_num(lowest), 0.1 * share, 0.5 * share)
            searching = searching & ~lower & (share > _SHORTEST)
        return z, s, moved

    def _back(self, z: Array, s: Array, h: Array, apart: Array) -> tuple[Array, Array]:
        """Back to the constraints, which bend away from the step."""
        at = self.at
        force = -at.sides.back(self.G, self.stiffness * apart)
        right = np.concatenate([force * at.sides.free, -h], axis=1)
        dz = _solution(self.K, right)[:, : z.shape[1]]
        return z + dz, s + at.sides.along(self.G, dz) + apart

    def _helped(self, z: Array, s: Array, limit: Array) -> tuple[Any, Array]:
        inside = (s >= (1 - _TO_BOUNDARY) * self.at.s).all(axis=1)
        there, _, _, s = self._merit(z, np.maximum(s, (1 - _TO_BOUNDARY) * self.at.s))
        return inside & (there <= limit), s

    def _merit(self, z: Array, s: Array) -> tuple[Array, Array, Array, Array]:
        """The merit function, h, w - s, and the slacks, which may grow to those of the inequalities."""
        at, m = self.at, self.at.y.shape[1]
        f, c = at.program.values(z, at.parameters)
        w = at.sides.at(z, c[:, m:])
        s = np.where(np.isfinite(w), np.maximum(s, w), s)
        violation = np.abs(c[:, :m]).sum(axis=1) + np.abs(w - s).sum(axis=1)
        merit = f[:, 0] + at.penalty * violation - at.mu * np.log(s).sum(axis=1)
        return merit, c[:, :m], w - s, s


def _times(matrices: Array, vectors: Array) -> Array:
    found: Array = (matrices @ vectors[:, :, None])[:, :, 0]
    return found


def _transposed_times(matrices: Array, vectors: Array) -> Array:
    found: Array = (vectors[:, None, :] @ matrices)[:, 0, :]
    return found


def _room(values: Array, change: Array) -> Array:
    """How much of a change leaves positive numbers positive, (B,), at most 1."""
    shares = np.where(change < 0, -_TO_BOUNDARY * values / np.where(change < 0, change, 1.0), 1.0)
    return np.minimum(shares.min(axis=1, initial=1.0), 1.0)


def _energy(gradient: Array, hessian: Array, z: Array) -> Array:
    """By how much the objective changes over the size of the point, (B,); 1 where it does not."""
    size = _size(z)
    change = np.maximum(_largest(gradient) * size, _largest(hessian) * size**2)
    return np.where((change > 0) & np.isfinite(change), change, 1.0)


def _size(z: Array) -> Array:
    """max(1, |z|), (B,)"""
    return np.maximum(1.0, _largest(z))


def _largest(values: Array) -> Array:
    """Maximum norm, (B,)."""
    return np.abs(values).max(axis=1, initial=0.0)


def _solution(K: Array, right: Array) -> Array:
    """K^-1 right, (B, n + m); not finite where K is singular or not finite itself."""
    try:
        return np.asarray(np.linalg.solve(K, right[:, :, None])[:, :, 0], dtype=float)
    except np.linalg.LinAlgError:  # of some sample: the others have theirs
        half = len(K) // 2
        if not half:
            return np.full_like(right, np.nan)
        return np.concatenate([_solution(K[:half], right[:half]), _solution(K[half:], right[half:])])


def _not_positive(matrices: Array, samples: Any) -> Any:
    """Those of the samples whose matrices are not positive definite."""
    from scipy.linalg.lapack import dpotrf  # a tenth of a second to import

    try:
        np.linalg.cholesky(matrices if len(samples) == len(matrices) else matrices[samples])
    except np.linalg.LinAlgError:  # of some: which?
        found = [i for i in samples if dpotrf(matrices[i], lower=True)[1] != 0]
        return np.array(found, dtype=np.intp)
    return samples[:0]
