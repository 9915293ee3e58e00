"""Newton's method for small smooth problems with equality constraints alone, whole batches in one go.

    [ H + delta I   A^T ] [ dz ]     [ grad f ]
    [ A             -e  ] [ y  ]  = -[ c      ],   H of f + y^T c,   A the Jacobian of c

delta makes all curvature on the null space of A positive (Nocedal and Wright 2006, section 3.4). A step is taken as far as
it lowers the merit function f + sigma |c|_1 (their algorithm 18.3), if need be after a correction of second order
(section 18.3). Every operation works on all samples at once: what a compiled solver does for one sample costs as much as
this for thirty. Samples do not see each other, so that each gets the same point in any batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    Array,
    Batch,
    Capabilities,
    Dialect,
    Feature,
    Instance,
    Method,
    Point,
    ProblemClass,
    Status,
)
from ddn_solvers.arrays import without_symmetry

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


class NewtonAdapter(Adapter):
    """One method, batch or not."""

    capabilities = Capabilities(
        summary="small smooth problems with equality constraints, whole batches at a time",
        package="numpy",
        pip="numpy",
        methods=(
            Method(
                "line-search",
                frozenset({ProblemClass.QP, ProblemClass.LEAST_SQUARES, ProblemClass.NLP}),
                frozenset({Feature.EQUALITY, Feature.NONCONVEX, Feature.NONSMOOTH}),
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

    def solve(self, instance: Instance) -> Point:
        """One sample, as a batch of one."""
        return self.solve_batch(Batch.of(instance))[0]

    def solve_batch(self, batch: Batch) -> list[Point]:
        """All samples together. The time limit is that of each one, since each takes as long as all."""
        settings = self.native(batch)
        deadline = min(batch.options.deadline, time.monotonic() + settings["time_limit"])
        with np.errstate(all="ignore"):  # a sample that runs off is judged, not computed with
            return _solve_all(batch, int(settings["max_iter"]), settings["tolerance"], deadline)


def _solve_all(batch: Batch, max_iter: int, tolerance: float, deadline: float) -> list[Point]:
    points: dict[int, Point] = {}
    at, open_ = _Iterates.at_start(batch), np.ones(len(batch), dtype=bool)
    status, steps = Status.ITERATION_LIMIT, max_iter
    for count in range(1, max_iter + 1):
        if time.monotonic() > deadline:
            status, steps = Status.TIME_LIMIT, count - 1
            break
        arrived, stuck = at.advance(open_, tolerance)
        for k in np.flatnonzero(open_ & (arrived | stuck)):
            said = Status.OPTIMAL if arrived[k] else Status.NUMERICAL_ERROR
            points[at.samples[k]] = at.point(k, said, count)
        open_ &= ~(arrived | stuck)
        if not open_.any():
            break
        half = len(open_)
        while 2 * open_.sum() <= half:  # few sizes, for each of which functions are mapped once
            half = (half + 1) // 2
        if half < len(open_):
            left = np.argsort(~open_, kind="stable")[:half]
            at, open_ = at.take(left), open_[left]
    for k in np.flatnonzero(open_):
        points[at.samples[k]] = at.point(k, status, steps)
    return [points[i] for i in range(len(batch))]


@dataclass
class _Iterates:
    """Where samples are: points, multipliers, and what is remembered of their last step."""

    program: Any
    samples: Any  # their numbers in the batch
    parameters: Sequence[Array]
    z: Array  # (B, n)
    y: Array  # (B, m)
    penalty: Array  # (B,), sigma

    @staticmethod
    def at_start(batch: Batch) -> _Iterates:
        size, y = len(batch), np.zeros((len(batch), batch.program.equality.size))
        for multipliers, point in zip(y, batch.warm_start or [None] * size, strict=True):
            if point is not None and point.equality is not None:
                multipliers[:] = point.equality
        z, penalty = batch.initial.copy(), np.zeros(size)
        return _Iterates(batch.program, np.arange(size), batch.parameters, z, y, penalty)

    def take(self, rows: Any) -> _Iterates:
        parameters = [p if p.ndim == 1 else p[rows] for p in self.parameters]
        of_samples = (values[rows] for values in (self.z, self.y, self.penalty))
        return _Iterates(self.program, self.samples[rows], parameters, *of_samples)

    def point(self, k: Any, status: Status, iterations: int) -> Point:
        z, y = self.z[k].copy(), self.y[k].copy()
        message = (
            "no step, or no part of it, lowers the merit function" if status is Status.NUMERICAL_ERROR else ""
        )
        if not np.isfinite(z).all() or not np.isfinite(y).all():
            return Point(z, Status.NUMERICAL_ERROR, iterations=iterations, message=message)
        none = np.zeros(0)
        return Point(z, status, equality=y, inequality=none, iterations=iterations, message=message)

    def advance(self, open_: Any, tolerance: float) -> tuple[Any, Any]:
        """Take a step with the samples that are ``open_``; who has arrived, and who is stuck, (B,) bool each."""
        first = self.program.first_order(self.z, self.parameters)
        A = self.program.jacobian_pattern.dense(first.jacobian)
        lost = ((A == 0).all(axis=2) & (first.constraints != 0)).any(axis=1)  # as in the middle of a sphere
        K = self._matrix(A, open_ & ~lost)
        right = -np.concatenate([first.gradient, first.constraints], axis=1)
        step, y = np.split(_solution(K, right), [self.z.shape[1]], axis=1)
        length = np.maximum(1.0, np.abs(self.z).max(axis=1, initial=0.0))
        arrived = (np.abs(step).max(axis=1, initial=0.0) <= tolerance * length) & ~lost
        violation = np.abs(first.constraints).sum(axis=1)
        self.penalty = np.maximum(_FORGOTTEN * self.penalty, _PENALTY * np.abs(y).max(axis=1, initial=0.0))
        merit = first.objective + self.penalty * violation
        slope = (first.gradient * step).sum(axis=1) - self.penalty * violation
        noise = _NOISE * (np.abs(first.objective) + self.penalty * violation)
        z, moved = self._line_search(K, step, merit + noise, slope, open_ & ~arrived & ~lost)
        z = np.where(arrived[:, None], self.z + step, z)
        self.z = np.where(lost[:, None], self.z + length[:, None] * _direction(z.shape[1]), z)
        self.y = np.where(lost[:, None], 0.0, y)
        self.penalty = np.where(lost, 0.0, self.penalty)
        return arrived, ~arrived & ~moved & ~lost

    def _matrix(self, A: Array, open_: Any) -> Array:
        """K, with curvature positive along the constraints in the samples that are ``open_``."""
        (batch, n), m = self.z.shape, A.shape[1]
        nonzeros = self.program.hessian(self.z, self.parameters, self.y)
        largest = np.abs(nonzeros).max(axis=1, initial=0.0)
        unit = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        norms = np.sqrt((A**2).sum(axis=2))
        K = np.zeros((batch, n + m, n + m))
        K[:, :n, :n] = self.program.hessian_pattern.dense(nonzeros)
        K[:, n:, :n], K[:, :n, n:] = A, A.transpose(0, 2, 1)
        np.einsum("bii->bi", K)[:, n:] = -_CORNER * norms**2 / unit[:, None]
        H, rows = K[:, :n, :n], A / np.where(norms > 0, norms, 1.0)[:, :, None]
        good = np.isfinite(H).all(axis=(1, 2)) & np.isfinite(rows).all(axis=(1, 2))
        lifted = H + (_RHO * unit)[:, None, None] * (rows.transpose(0, 2, 1) @ rows)
        bent = np.array([i for i in np.flatnonzero(open_ & good) if not _positive(lifted[i])], dtype=np.intp)
        if bent.size:  # or nearly so: their eigenvalues decide
            along, big = np.eye(n) - np.linalg.pinv(rows[bent]) @ rows[bent], unit[bent, None, None]
            least = np.linalg.eigvalsh(along @ H[bent] @ along + big * (np.eye(n) - along))[:, 0]
            delta = np.where(
                least <= _FLAT * unit[bent], np.maximum(_MARGIN * -least, _SMALLEST * unit[bent]), 0.0
            )
            H[bent] += delta[:, None, None] * np.eye(n)
        return K

    def _line_search(
        self, K: Array, step: Array, merit: Array, slope: Array, wanted: Any
    ) -> tuple[Array, Any]:
        """Where the steps lead, and which of the samples ``wanted`` they bring on."""
        z, share, n = self.z.copy(), np.ones(len(step)), step.shape[1]
        searching, moved, limit = wanted.copy(), np.zeros(len(step), dtype=bool), merit + _SUFFICIENT * slope
        while searching.any():
            tried = self.z + share[:, None] * step
            there, c = self._merit(tried)
            lower = searching & (there <= limit)
            if (share == 1).all() and (searching & ~lower).any():
                # c bends away from the step: back to it from there
                back = tried + _solution(K, np.concatenate([np.zeros_like(step), -c], axis=1))[:, :n]
                helped = searching & ~lower & (self._merit(back)[0] <= limit)
                tried, lower = np.where(helped[:, None], back, tried), lower | helped
            z, moved = np.where(lower[:, None], tried, z), moved | lower
            parabola = -slope * share**2 / (2 * (there - merit - slope * share))  # its lowest point
            share = np.clip(np.nan_to_num(parabola), 0.1 * share, 0.5 * share)
            searching &= ~lower & (share > _SHORTEST)
            limit = merit + _SUFFICIENT * share * slope
        return z, moved

    def _merit(self, z: Array) -> tuple[Array, Array]:
        f, c = self.program.values(z, self.parameters)
        return f[:, 0] + self.penalty * np.abs(c).sum(axis=1), c


def _solution(K: Array, right: Array) -> Array:
    """K^-1 right, (B, n + m); not finite where K is singular or not finite itself."""
    try:
        return np.asarray(np.linalg.solve(K, right[:, :, None])[:, :, 0], dtype=float)
    except np.linalg.LinAlgError:  # of some sample: the others have theirs
        half = len(K) // 2
        if not half:
            return np.full_like(right, np.nan)
        return np.concatenate([_solution(K[:half], right[:half]), _solution(K[half:], right[half:])])


def _positive(matrix: Array) -> bool:
    from scipy.linalg.lapack import dpotrf  # a tenth of a second to import

    return dpotrf(matrix, lower=True)[1] == 0


def _direction(n: int) -> Array:
    """A unit vector, (n,)."""
    direction = without_symmetry(n)
    return direction / np.linalg.norm(direction)
