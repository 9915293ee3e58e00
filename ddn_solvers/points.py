"""What a backend returns: the point of one sample, or those of a whole batch as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ddn_solvers.arrays import Array, Mask
from ddn_solvers.solution import Status

if TYPE_CHECKING:
    from ddn_solvers.program import Program

MULTIPLIERS: Final = ("equality", "inequality", "lower", "upper")


@dataclass(frozen=True)
class Point:
    """What a backend found for one instance: the point, its word, and multipliers if it has them.

    Nothing of it has to be checked: numbers that are not finite, multipliers below zero by rounding,
    a status that says too much are the library's to find.
    """

    primal: Array  # (n,)
    status: Status
    equality: Array | None = None
    inequality: Array | None = None
    lower: Array | None = None
    upper: Array | None = None
    iterations: int | None = None
    message: str = ""
    fallback: str = ""  # why it went the slow way; one ``FallbackWarning`` a call


def as_point(answer: Any, initial: Array, equalities: int, inequalities: int) -> Point:
    """What a backend returned, if it is a ``Point`` of the right shapes; else one at ``initial`` that says what it is."""
    if not isinstance(answer, Point):
        message = f"returned {type(answer).__name__}, expected a Point"
        return Point(initial, Status.BACKEND_ERROR, message=message)
    n = len(initial)
    sizes = {"primal": n, "equality": equalities, "inequality": inequalities, "lower": n, "upper": n}
    for name, size in sizes.items():
        value = getattr(answer, name)
        if np.shape(value) != (size,) and (value is not None or name == "primal"):
            message = f"returned {name} of shape {np.shape(value)}, expected {(size,)}"
            return Point(initial, Status.BACKEND_ERROR, message=message)
    return answer


@dataclass(frozen=True)
class Points(Sequence[Point]):
    """The points of a batch, stacked; ``points[i]`` is one of them.

    What ``solve_batch`` may return in place of a list where a backend takes many samples at once: ``Points.at`` makes
    them, and an adapter then fills in what it found, rows of arrays and entries of lists.

    Attributes:
        primal: (B, n).
        status: One a sample.
        equality, inequality, lower, upper: Multipliers, (B, size); NaN where a sample has none.
        iterations, message: One a sample.
    """

    primal: Array
    status: list[Status]
    equality: Array
    inequality: Array
    lower: Array
    upper: Array
    iterations: list[int | None]
    message: list[str]

    @staticmethod
    def at(program: Program, initial: Array, status: Status) -> Points:
        """Points at ``initial``, (B, n), of which nothing else is known."""
        size, n = initial.shape
        nu, lam, lower, upper = (
            np.full((size, rows), np.nan) for rows in (program.equality.size, program.inequality.size, n, n)
        )
        z = np.array(initial, dtype=float)
        return Points(z, [status] * size, nu, lam, lower, upper, [None] * size, [""] * size)

    @staticmethod
    def of(program: Program, points: Sequence[Point], initial: Array) -> Points:
        """A list as one of these; what has not the shapes that it should have is a failure at ``initial``."""
        found = Points.at(program, initial, Status.BACKEND_ERROR)
        if isinstance(points, Points):
            own, wrong = points._own(found)
            found.message[:] = [wrong] * len(found)
            return found if own is None else own
        for i, (point, z) in enumerate(zip(points, initial, strict=True)):
            found.put(i, as_point(point, z, program.equality.size, program.inequality.size))
        return found

    @staticmethod
    def joined(parts: Sequence[Points]) -> Points:
        """Several batches as one."""
        whole: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("primal", *MULTIPLIERS)
        }
        for name in ("status", "iterations", "message"):
            whole[name] = [one for part in parts for one in getattr(part, name)]
        return Points(**whole)

    def _own(self, like: Points) -> tuple[Points | None, str]:
        """A copy in float64, or what has not the shape that it has in ``like``."""
        parts: dict[str, Any] = {}
        for name, there in vars(like).items():
            try:
                given: Any = getattr(self, name)
                if isinstance(there, np.ndarray):
                    parts[name] = np.asarray(given).astype(float, casting="same_kind", copy=True)
                else:
                    parts[name] = list(given)
            except (TypeError, ValueError) as error:
                return None, f"returned {name} that is no array of numbers, or no list: {error}"
            got, expected = np.shape(given), np.shape(there)
            if got != expected:
                return None, f"returned {name} of shape {got}, expected {expected}"
        return Points(**parts), ""

    def put(self, i: Any, point: Point) -> None:
        """Make ``point`` that of sample i."""
        for name in ("primal", *MULTIPLIERS):
            value = getattr(point, name)
            getattr(self, name)[i] = np.nan if value is None else value
        self.status[i], self.iterations[i], self.message[i] = point.status, point.iterations, point.message

    def put_forces(self, samples: Any, bounds: Array, equality: Array, inequality: Array) -> None:
        """Multipliers of some samples; those of bounds, if there are any, are positive at upper ones."""
        self.equality[samples], self.inequality[samples] = equality, inequality
        if bounds.shape[1]:
            self.lower[samples], self.upper[samples] = bound_multipliers(bounds).values()

    def take(self, samples: Any) -> Points:
        """Some samples, by index."""
        parts: dict[str, Any] = {name: getattr(self, name)[samples] for name in ("primal", *MULTIPLIERS)}
        for name in ("status", "iterations", "message"):
            parts[name] = [getattr(self, name)[i] for i in samples]
        return Points(**parts)

    def multipliers(self, bounded: bool) -> tuple[list[Array], Mask]:
        """Of equalities, inequalities, lower and upper bounds, and the samples that lack some, (B,): zero there.

        Args:
            bounded: Whether there are bounds; those of none are zero.
        """
        parts = [getattr(self, name) for name in MULTIPLIERS]
        needed = parts if bounded else parts[:2]
        missing: Mask = ~np.logical_and.reduce([np.isfinite(part).all(axis=1) for part in needed])
        nothing = missing[:, None], missing[:, None] | (not bounded)
        return [np.where(nothing[k // 2], 0.0, part) for k, part in enumerate(parts)], missing

    def __len__(self) -> int:
        return len(self.primal)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.take(range(*i.indices(len(self))))
        rows = {name: getattr(self, name)[i] for name in MULTIPLIERS}
        given: dict[str, Any] = {name: None if np.isnan(row).any() else row for name, row in rows.items()}
        return Point(
            self.primal[i], self.status[i], iterations=self.iterations[i], message=self.message[i], **given
        )


def bound_multipliers(forces: Array) -> dict[str, Any]:
    """``lower`` and ``upper`` of a ``Point`` from multipliers that are positive at upper bounds."""
    return {"lower": np.maximum(-forces, 0), "upper": np.maximum(forces, 0)}
