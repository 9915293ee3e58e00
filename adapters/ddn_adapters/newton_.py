"""Newton's method for small smooth problems with equality constraints alone, whole batches in one go.

    [ H + delta I   A^T ] [ dz ]     [ grad f ]
    [ A             -e  ] [ y  ]  = -[ c      ],   H of f + y^T c,   A the Jacobian of c

Each step is taken as far as it lowers the merit function f + sigma |c|_1 (Nocedal and Wright 2006, algorithm 18.3), if
need be after a correction of second order (their section 18.3); delta grows until the step has positive curvature
(Chiang and Zavala 2016, in place of counting eigenvalues). Every operation works on all samples at once: what a compiled
solver does for one sample costs as much as this for thirty. Samples do not see each other, so that each gets the same
point in any batch.
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
    ProblemError,
    Status,
)

_SUFFICIENT = 1e-4  # share of the predicted decrease of the merit function that a step has to bring
_NOISE = 1e-14  # relative change of the merit function that is rounding
_SHORTEST = 1e-8  # part of a step below which the search has failed
_CURVED = 1e-10  # curvature along a step, relative to the largest of H, that counts as positive
_SMALLEST, _LARGEST, _GROWTH = 1e-4, 1e10, 10.0  # delta, relative to the largest of H
_CORNER = 1e-12  # e, relative to A A^T over it: dependent rows leave the matrix regular
_PENALTY, _FORGOTTEN = (
    1.1,
    0.1,
)  # sigma over the largest multiplier, and the part of it that stays from step to step


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
                ),
            ),
        ),
    )

    def solve(self, instance: Instance) -> Point:
        """One sample, as a batch of one."""
        return self.solve_batch(Batch.of(instance))[0]

    def solve_batch(self, batch: Batch) -> list[Point]:
        """All samples together. The time limit is that of each one, since each takes as long as all."""
        settings = self._settings(batch)
        deadline = min(batch.options.deadline, time.monotonic() + settings["time_limit"])
        with np.errstate(all="ignore"):  # a sample that runs off is judged, not computed with
            return _solve_all(batch, int(settings["max_iter"]), settings["tolerance"], deadline)

    def _settings(self, batch: Batch) -> dict[str, Any]:
        dialect, where = self.dialect(batch.method), self.where(batch.method)
        known = ("max_iter", "tolerance", "time_limit")
        for name in batch.options.native:
            if name not in known:
                raise ProblemError(
                    f"option {name!r} is not one that {where} accepts", expected=", ".join(known)
                )
        return dialect.native(batch.options, where)


def _solve_all(batch: Batch, max_iter: int, tolerance: float, deadline: float) -> list[Point]:
    points = [Point(z, Status.ITERATION_LIMIT, iterations=0) for z in batch.initial]
    at, open_ = _Iterates.at_start(batch), np.ones(len(batch), dtype=bool)
    status = Status.ITERATION_LIMIT
    for count in range(1, max_iter + 1):
        if time.monotonic() > deadline:
            status = Status.TIME_LIMIT
            break
        arrived, stuck = at.advance(open_, tolerance)
        for k in np.flatnonzero(open_ & (arrived | stuck)):
            said = Status.OPTIMAL if arrived[k] else Status.NUMERICAL_ERROR
            points[at.samples[k]] = at.point(k, said, count)
        open_ &= ~(arrived | stuck)
        if not open_.any():
            return points
        half = len(open_)
        while 2 * open_.sum() <= half:  # few sizes, for each of which functions are mapped once
            half = (half + 1) // 2
        if half < len(open_):
            left = np.argsort(~open_, kind="stable")[:half]
            at, open_ = at.take(left), open_[left]
    for k in np.flatnonzero(open_):
        points[at.samples[k]] = at.point(k, status, max_iter)
    return points


@dataclass
class _Iterates:
    """Where samples are: points, multipliers, and what is remembered of their last step."""

    program: Any
    samples: Any  # their numbers in the batch
    parameters: Sequence[Array]
    z: Array  # (B, n)
    y: Array  # (B, m)
    delta: Array  # (B,), relative to the largest of H
    penalty: Array  # (B,)

    @staticmethod
    def at_start(batch: Batch) -> _Iterates:
        size, y = len(batch), np.zeros((len(batch), batch.program.equality.size))
        for multipliers, point in zip(y, batch.warm_start or [None] * size, strict=True):
            if point is not None and point.equality is not None:
                multipliers[:] = point.equality
        zero = np.zeros(size)
        return _Iterates(
            batch.program, np.arange(size), batch.parameters, batch.initial.copy(), y, zero, zero
        )

    def take(self, rows: Any) -> _Iterates:
        parameters = [p if p.ndim == 1 else p[rows] for p in self.parameters]
        of_samples = (values[rows] for values in (self.z, self.y, self.delta, self.penalty))
        return _Iterates(self.program, self.samples[rows], parameters, *of_samples)

    def point(self, k: Any, status: Status, iterations: int) -> Point:
        z, y = self.z[k].copy(), self.y[k].copy()
        message = "no part of the step lowers the merit function" if status is Status.NUMERICAL_ERROR else ""
        if not np.isfinite(z).all() or not np.isfinite(y).all():
            return Point(z, Status.NUMERICAL_ERROR, iterations=iterations, message=message)
        none = np.zeros(0)
        return Point(z, status, equality=y, inequality=none, iterations=iterations, message=message)

    def advance(self, open_: Any, tolerance: float) -> tuple[Any, Any]:
        """Take a step with the samples that are ``open_``; who has arrived, and who is stuck, (B,) bool each."""
        first = self.program.first_order(self.z, self.parameters)
        A = self.program.jacobian_pattern.dense(first.jacobian)
        K, step, y = self._step(first.gradient, first.constraints, A, open_)
        length = np.maximum(1.0, np.abs(self.z).max(axis=1, initial=0.0))
        arrived = np.abs(step).max(axis=1, initial=0.0) <= tolerance * length
        violation = np.abs(first.constraints).sum(axis=1)
        self.penalty = np.maximum(_FORGOTTEN * self.penalty, _PENALTY * np.abs(y).max(axis=1, initial=0.0))
        merit = first.objective + self.penalty * violation
        slope = (first.gradient * step).sum(axis=1) - self.penalty * violation
        noise = _NOISE * (np.abs(first.objective) + self.penalty * violation)
        z, moved = self._line_search(K, step, merit + noise, slope, open_ & ~arrived)
        self.z, self.y = np.where(arrived[:, None], self.z + step, z), y
        return arrived, ~arrived & ~moved

    def _step(self, gradient: Array, c: Array, A: Array, open_: Any) -> tuple[Array, Array, Array]:
        """The matrix of the last system, dz and y."""
        (batch, n), m = self.z.shape, A.shape[1]
        nonzeros = self.program.hessian(self.z, self.parameters, self.y)
        largest = np.abs(nonzeros).max(axis=1, initial=0.0)
        unit = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        K = np.zeros((batch, n + m, n + m))
        K[:, :n, :n] = self.program.hessian_pattern.dense(nonzeros)
        K[:, n:, :n], K[:, :n, n:] = A, A.transpose(0, 2, 1)
        diagonal = np.einsum("bii->bi", K)  # a view
        diagonal[:, n:] = -_CORNER * (A**2).sum(axis=2) / unit[:, None]
        curvature, right = diagonal[:, :n].copy(), -np.concatenate([gradient, c], axis=1)
        self.delta = np.where(self.delta > _GROWTH * _SMALLEST, self.delta / _GROWTH, 0.0)
        solution, bent = np.zeros_like(right), np.ones(batch, dtype=bool)
        while True:
            diagonal[:, :n] = curvature + (self.delta * unit)[:, None]
            solution[bent] = _solution(K[bent], right[bent])
            step = solution[:, :n]
            along = (step[:, None, :] @ K[:, :n, :n] @ step[:, :, None])[:, 0, 0]
            bent = ~(along >= _CURVED * unit * (step**2).sum(axis=1)) & (self.delta < _LARGEST) & open_
            if not bent.any():
                return K, step, solution[:, n:]
            self.delta = np.where(bent, np.maximum(_GROWTH * self.delta, _SMALLEST), self.delta)

    def _line_search(
        self, K: Array, step: Array, merit: Array, slope: Array, wanted: Any
    ) -> tuple[Array, Any]:
        """Where the steps lead, and which of the samples ``wanted`` they bring on."""
        accepted, z, share = ~wanted, self.z.copy(), np.ones(len(step))
        limit = merit + _SUFFICIENT * slope
        while True:
            tried = self.z + share[:, None] * step
            there, c = self._merit(tried)
            lower = ~accepted & (there <= limit)
            z[lower], accepted = tried[lower], accepted | lower
            if not (~accepted & (share > _SHORTEST)).any():
                return z, accepted & wanted
            if (share == 1).all():  # c bends away from the step: back to it from there
                back = _solution(K, np.concatenate([np.zeros_like(step), -c], axis=1))[:, : step.shape[1]]
                lower = ~accepted & (self._merit(tried + back)[0] <= limit)
                z[lower], accepted = (tried + back)[lower], accepted | lower
            parabola = -slope * share**2 / (2 * (there - merit - slope * share))  # its lowest point
            shorter = np.clip(np.nan_to_num(parabola), 0.1 * share, 0.5 * share)
            share = np.where(accepted, 1.0, shorter)
            limit = merit + _SUFFICIENT * share * slope

    def _merit(self, z: Array) -> tuple[Array, Array]:
        f, c = self.program.values(z, self.parameters)
        return f[:, 0] + self.penalty * np.abs(c).sum(axis=1), c


def _solution(K: Array, right: Array) -> Array:
    """K^-1 right, (B, n + m); not finite where K is singular or not finite itself."""
    try:
        return np.asarray(np.linalg.solve(K, right[:, :, None])[:, :, 0], dtype=float)
    except np.linalg.LinAlgError:  # of one sample: the others have theirs
        if len(K) == 1:
            return np.full_like(right, np.nan)
        return np.concatenate([_solution(K[i : i + 1], right[i : i + 1]) for i in range(len(K))])
