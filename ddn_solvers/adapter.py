"""What a backend author reads: an adapter turns one compiled problem into a point.

An adapter implements one method, ``Adapter.solve``: it receives an ``Instance`` (a compiled
problem with numbers for its parameters) and returns a ``Point``. It knows no derivative rule of
the solution: residuals, active set, multipliers it did not return, polish and gradients are the
library's. Everything it needs to evaluate, ``Instance`` offers, as NumPy and SciPy arrays:

    minimise f(z)   subject to   h(z) = 0,  g(z) <= 0,  lower <= z <= upper        (z flat, (n,))

Multipliers follow ``L = f + nu^T h + lambda^T g + l^T (lower - z) + r^T (z - upper)`` with
lambda, l, r >= 0. What an adapter has no multipliers for, it leaves ``None``.

What most backends need besides is here, once: ``Dialect`` translates limits and options,
``Instance`` remembers its last evaluation and watches the time, ``Adapter.attempt`` turns what a
backend raises into a status, ``bound_multipliers`` splits forces of one sign convention.
"""

from __future__ import annotations

import abc
import contextlib
import difflib
import enum
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ddn_solvers.arrays import Array
from ddn_solvers.errors import (
    BackendCannotSolve,
    BackendNotInstalled,
    DDNError,
    FallbackWarning,
    ProblemError,
    warn_caller,
)
from ddn_solvers.least_distance import LeastDistance
from ddn_solvers.points import Point, Points, as_point, bound_multipliers
from ddn_solvers.solution import Status
from ddn_solvers.threads import Threads

if TYPE_CHECKING:
    import scipy.sparse as sp

    from ddn_solvers.evaluators import Coefficients, FirstOrder
    from ddn_solvers.program import Program

__all__ = [
    "Adapter",
    "Array",
    "BackendCannotSolve",
    "BackendNotInstalled",
    "Batch",
    "BatchAdapter",
    "Capabilities",
    "Dialect",
    "Feature",
    "Instance",
    "LeastDistance",
    "Method",
    "Options",
    "OutOfTime",
    "Point",
    "Points",
    "ProblemClass",
    "ProblemError",
    "QuadraticForm",
    "Status",
    "bound_multipliers",
    "interruptible",
]


class ProblemClass(enum.Enum):
    """What the graph shows the problem to be, in the variables; LP is a QP is an NLP."""

    LP = "LP"
    QP = "QP"
    LEAST_SQUARES = "least squares"
    NLP = "NLP"


class Feature(enum.Enum):
    """What a problem may need beyond its class."""

    BOUNDS = "bounds"
    EQUALITY = "equality constraints"
    INEQUALITY = "inequality constraints"
    NONCONVEX = "non-convexity"
    CALLBACKS = "functions that only torch can evaluate"
    NONSMOOTH = "non-smooth terms"


_LATE = "the time limit of the call was reached before this sample"
_OFF_BOUNDS = 1e-8  # how far off, relative to the size of a variable
_RAY = 1e10  # an entry beyond this is a ray that was followed, whatever a backend says


@dataclass(frozen=True)
class Options:
    """Limits that every adapter translates, and the backend's native options.

    Attributes:
        max_iter: Iterations, or ``None`` for the backend's default.
        time_limit: Seconds of wall time for one sample, or ``None``.
        tolerance: The backend's own stopping tolerance, or ``None`` for a tight one.
        call_time_limit: Seconds for all samples and retries, or ``None``: adapters see ``deadline``.
        deadline: When that is over, on ``time.monotonic``; kept by ``attempt`` between samples, and by
            ``Instance`` in methods that call back.
        workers: Processes of their own in which the backend runs, each with a share of the samples; with 0 it
            runs in this one. Adapters see nothing of it.
        threads: How many torch may take; adapters see nothing of it.
        native: Options under the backend's own names; unknown ones are a ``ProblemError``.
    """

    max_iter: int | None = None
    time_limit: float | None = None
    tolerance: float | None = None
    call_time_limit: float | None = None
    deadline: float = np.inf
    workers: int = 0
    threads: Threads = "auto"
    native: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dialect:
    """How one method says what can be said to all of them, and what it answers, as data.

    Attributes:
        max_iter, tolerance, time_limit: Its names, separated by spaces, for these ``Options``, each set
            to the same value; ``""``: nothing to tell it (the adapter sees to it); ``None``: asking for
            it is an error.
        tight: Its tolerance unless told otherwise; ``None``: the backend's own default.
        defaults: Further options unless told otherwise.
        accepts: Every option it has, separated by spaces, where it would pass over others itself; else ``None``.
        status: What it returns -> ``Status``.
    """

    max_iter: str | None = None
    tolerance: str | None = None
    time_limit: str | None = None
    tight: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    accepts: str | None = None
    status: Mapping[Any, Status] = field(default_factory=dict)

    def native(self, options: Options, where: str) -> dict[str, Any]:
        """Defaults, limits asked for, native options, each over the ones before.

        Args:
            options: What the user asks for.
            where: ``"backend:method"``, for the error.

        Raises:
            ProblemError: A limit that the method cannot keep, or an option that it does not have.
        """
        if self.accepts is not None:
            known = self.accepts.split()
            for name in set(options.native).difference(known):
                raise ProblemError(
                    f"option {name!r} is not one that {where} accepts", expected=", ".join(known)
                )
        tight = {} if self.tight is None else dict.fromkeys((self.tolerance or "").split(), self.tight)
        native = {**tight, **self.defaults}
        for limit in ("max_iter", "tolerance", "time_limit"):
            value, names = getattr(options, limit), getattr(self, limit)
            if value is not None and names is None:
                raise ProblemError(
                    f"{where} has no option for {limit!r} that we know", fix="Use a native one."
                )
            if value is not None:
                native.update(dict.fromkeys(names.split(), value))
        return {**native, **options.native}

    def blame(self, options: Options, error: Exception, where: str) -> None:
        """Raise a ``ProblemError`` if what the backend complains of is a native option, by name.

        Raises:
            ProblemError: It is; near matches are among the names that this dialect knows.
        """
        limits = f"{self.max_iter or ''} {self.tolerance or ''} {self.time_limit or ''}"
        known = {*self.defaults, *limits.split()}
        for name in options.native:
            if re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", str(error)):
                near = difflib.get_close_matches(name, known) or sorted(known)
                raise ProblemError(
                    f"option {name!r} is not one that {where} accepts",
                    expected=f"one such as {', '.join(near)}" if near else None,
                    got=_last_line(error),
                ) from error


@dataclass(frozen=True)
class Method:
    """One method of a backend, as data: routing, errors, tests and the README's table read it.

    Attributes:
        name: As in ``"backend:name"``.
        classes: Problem classes it solves natively.
        features: Features it takes.
        duals: It returns multipliers.
        kinks: It models absolute values, maxima and norms itself. For other methods they are lifted into
            inequalities where that is possible; ``Feature.NONSMOOTH`` is then about the rest.
        package: Import name that it needs beyond the backend's own, or ``None``.
        pip: What ``pip install`` has to be given for that.
        dialect: Its names for options, and its statuses.
    """

    name: str
    classes: frozenset[ProblemClass]
    features: frozenset[Feature]
    duals: bool = True
    kinks: bool = False
    package: str | None = None
    pip: str | None = None
    dialect: Dialect = Dialect()


@dataclass(frozen=True)
class Capabilities:
    """What a backend is and which methods it has, the preferred ones first.

    Attributes:
        summary: A few words for the table in the README.
        package: Import name of the backend's package.
        pip: What ``pip install`` has to be given.
        methods: In order of preference: a bare ``"backend"`` takes the first that can take the
            problem.
    """

    summary: str
    package: str
    pip: str
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class QuadraticForm:
    """1/2 z^T P z + q^T z + constant  s.t.  A z = b, G z <= h; P symmetric, all of one instance."""

    P: sp.csc_array  # (n, n)
    q: Array  # (n,)
    constant: float
    A: sp.csc_array  # (equalities, n)
    b: Array
    G: sp.csc_array  # (inequalities, n)
    h: Array


class OutOfTime(Exception):
    """``Options.time_limit`` is over; ``Adapter.attempt`` makes it a status."""


@dataclass(frozen=True)
class Instance:
    """A compiled problem with numbers for its parameters: one sample.

    Functions and first derivatives are evaluated together and kept for the last z, since methods ask
    for them one by one; a new z after the time limit raises ``OutOfTime``. So a backend that calls
    back needs neither a cache nor a clock.

    Attributes:
        program: The compiled problem; its structure is shared by all samples.
        parameters: One flat float64 array a parameter block of ``program.parameters``.
        lower: (n,), -inf where there is no bound. Never above ``upper``.
        upper: (n,), +inf where there is no bound.
        initial: (n,), inside the bounds.
        method: Name of the method asked for, one of the adapter's.
        options: Limits and native options.
        warm_start: Multipliers (and the point, which ``initial`` repeats unless the user gave
            another start) of an earlier solve, or ``None``.
    """

    program: Program
    parameters: tuple[Array, ...]
    lower: Array
    upper: Array
    initial: Array
    method: str
    options: Options = Options()
    warm_start: Point | None = None

    _last: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)  # z, what is there

    @cached_property
    def deadline(self) -> float:
        """When ``options.time_limit`` is over, on ``time.monotonic``, counted from the first look at it, or the call's."""
        limit = self.options.time_limit
        return min(self.options.deadline, np.inf if limit is None else time.monotonic() + limit)

    @property
    def last(self) -> Array:
        """The z of the last evaluation, ``initial`` before the first."""
        z: Array = self._last[0] if self._last else self.initial
        return z

    def objective(self, z: Array) -> float:
        """As all of these, next to z where that is on a bound and something is not finite there."""
        return float(self._first_order(z).objective[0])

    def gradient(self, z: Array) -> Array:
        """(n,)"""
        return self._first_order(z).gradient[0]

    def constraints(self, z: Array) -> Array:
        """h(z), then g(z)."""
        return self._first_order(z).constraints[0]

    def jacobian(self, z: Array) -> sp.csc_array:
        """Of ``constraints``, (equalities + inequalities, n)."""
        return self.program.jacobian_pattern.matrix(self._first_order(z).jacobian[0])

    def equality(self, z: Array) -> Array:
        """h(z), (equalities,)"""
        return self.constraints(z)[: self.program.equality.size]

    def inequality(self, z: Array) -> Array:
        """g(z), (inequalities,)"""
        return self.constraints(z)[self.program.equality.size :]

    def equality_jacobian(self, z: Array) -> sp.csc_array:
        return self.jacobian(z)[: self.program.equality.size]

    def inequality_jacobian(self, z: Array) -> sp.csc_array:
        return self.jacobian(z)[self.program.equality.size :]

    def hessian(self, z: Array, equality: Array, inequality: Array, objective: float = 1.0) -> sp.csc_array:
        """Hessian of ``objective * f + equality^T h + inequality^T g``, symmetric, (n, n)."""
        weights = np.concatenate([equality, inequality])
        nonzeros = self.program.hessian(z, self.parameters, weights, objective)
        if not np.isfinite(nonzeros).all():
            nonzeros = self.program.hessian(self._off_bounds(z), self.parameters, weights, objective)
        return self.program.hessian_pattern.matrix(nonzeros[0])

    def _first_order(self, z: Array) -> FirstOrder:
        if not self._last or not np.array_equal(z, self._last[0]):
            if time.monotonic() > self.deadline:
                raise OutOfTime("time limit reached")
            first = self.program.first_order(z, self.parameters)
            if not all(np.isfinite(part).all() for part in vars(first).values()):
                first = self.program.first_order(self._off_bounds(z), self.parameters)
            self._last[:] = [z.copy(), first]
        found: FirstOrder = self._last[1]
        return found

    def _off_bounds(self, z: Array) -> Array:
        """Next to z, off its bounds: on them x log(x) has no finite slope, and a method may step there."""
        room = np.minimum(_OFF_BOUNDS * np.maximum(1.0, np.abs(z)), (self.upper - self.lower) / 2)
        inside: Array = np.clip(z, self.lower + room, self.upper - room)
        return inside

    def quadratic(self) -> QuadraticForm:
        """The data of an LP or QP (exact there; elsewhere the expansion at z = 0)."""
        return self.program.quadratic_forms(self.parameters)[0]


@dataclass(frozen=True)
class Batch:
    """Samples that share a program, method and options; ``batch[i]`` is one of them.

    Attributes: as ``Instance``, with a leading batch dimension on lower, upper, initial and on
        those parameters that are not shared by all samples (2-d arrays; shared ones are 1-d).
    """

    program: Program
    parameters: tuple[Array, ...]  # each (B, size) or (size,)
    lower: Array  # (B, n)
    upper: Array  # (B, n)
    initial: Array  # (B, n)
    method: str
    options: Options = Options()
    warm_start: Sequence[Point | None] | None = None
    known: Coefficients | None = field(default=None, repr=False)  # what ``coefficients`` returns

    @staticmethod
    def of(instance: Instance) -> Batch:
        """One sample as a batch."""
        warm = None if instance.warm_start is None else [instance.warm_start]
        rows = (instance.lower[None], instance.upper[None], instance.initial[None])
        return Batch(instance.program, instance.parameters, *rows, instance.method, instance.options, warm)

    def __len__(self) -> int:
        return len(self.initial)

    @cached_property
    def coefficients(self) -> Coefficients:
        """Of an LP or QP, all samples at once: gradient, constraints and nonzeros of H and J at z = 0.

        The library has them already; the patterns are ``program.hessian_pattern`` and ``program.jacobian_pattern``.
        """
        return self.known or self.program.coefficients(self.parameters, len(self))

    def given_up(self, i: int) -> Point | None:
        """What sample i is if the time of the whole call is over, else ``None``."""
        if time.monotonic() <= self.options.deadline:
            return None
        return Point(self.initial[i], Status.TIME_LIMIT, message=_LATE)

    def take(self, samples: Any) -> Batch:
        """Some samples, by index."""
        rows = {name: getattr(self, name)[samples] for name in ("lower", "upper", "initial")}
        parameters = tuple(p if p.ndim == 1 else p[samples] for p in self.parameters)
        warm = self.warm_start
        if warm is not None:
            warm = warm.take(samples) if isinstance(warm, Points) else [warm[i] for i in samples]
        return replace(self, parameters=parameters, warm_start=warm, known=None, **rows)

    def __getitem__(self, i: int) -> Instance:
        return Instance(
            self.program,
            tuple(p if p.ndim == 1 else p[i] for p in self.parameters),
            self.lower[i],
            self.upper[i],
            self.initial[i],
            self.method,
            self.options,
            None if self.warm_start is None else self.warm_start[i],
        )


class Adapter(abc.ABC):
    """Base class of every backend. Implement ``solve``; override the rest where it pays."""

    capabilities: ClassVar[Capabilities]

    @abc.abstractmethod
    def solve(self, instance: Instance) -> Point:
        """Solve one sample that the method takes by its ``Method.classes`` and ``features``.

        Report failure by ``Point.status``, or by any exception: see ``attempt``.

        Raises:
            BackendCannotSolve: The problem lacks what ``Method`` cannot tell (say what, and who has it).
            ProblemError: An option that the backend does not know.
        """

    def refusal(self, program: Program) -> str:
        """Why it takes ``program`` for no numbers at all, beyond what ``Method`` tells; empty if it may."""
        return ""

    def solve_batch(self, batch: Batch) -> Sequence[Point]:
        """Attempt every sample; override where the backend can do better than a loop."""
        points = [self.attempt(batch[i]) for i in range(len(batch))]
        fallback = next((point.fallback for point in points if point.fallback), "")
        if fallback:
            warn_caller(fallback, FallbackWarning)
        return points

    def attempt_batch(self, batch: Batch) -> Points:
        """``solve_batch``, where an exception of the backend's own fails its samples alone.

        Raises:
            DDNError, KeyboardInterrupt: As ``attempt``.
        """
        answers: Any
        try:
            answers = self.solve_batch(batch)
        except DDNError:
            raise
        except Exception:  # of some sample: ask one by one
            answers = [self.attempt(batch[i]) for i in range(len(batch))]
        if not isinstance(answers, Sequence) or len(answers) != len(batch):
            points = Points.at(batch.program, batch.initial, Status.BACKEND_ERROR)
            points.message[:] = [f"did not return a list of {len(batch)} points"] * len(batch)
            return points
        return Points.of(batch.program, answers, batch.initial)

    def attempt(self, instance: Instance) -> Point:
        """``solve``, where an exception of the backend's own fails that sample alone.

        Raises:
            DDNError: As ``solve``; also a native option that the backend's exception names.
            KeyboardInterrupt: Ctrl-C, even where the backend swallows it.
        """
        try:
            if time.monotonic() > instance.options.deadline:
                raise OutOfTime(_LATE)
            with interruptible():
                answer = self.solve(instance)
            program = instance.program
            point = as_point(answer, instance.initial, program.equality.size, program.inequality.size)
        except DDNError:
            raise
        except OutOfTime as error:
            return Point(instance.last, Status.TIME_LIMIT, message=str(error))
        except Exception as error:
            if instance.options.native:
                self.dialect(instance.method).blame(instance.options, error, self.where(instance.method))
            arithmetic = isinstance(error, ArithmeticError)
            status = Status.NUMERICAL_ERROR if arithmetic else Status.BACKEND_ERROR
            return Point(instance.last, status, message=f"{type(error).__name__}: {_last_line(error)}")
        if point.status is Status.OPTIMAL and np.abs(point.primal).max(initial=0.0) > _RAY:
            return replace(point, status=Status.UNBOUNDED)
        return point

    def method(self, name: str) -> Method | None:
        """The method of that name, also one found only at run time; ``None`` if there is none."""
        return next((m for m in self.capabilities.methods if m.name == name), None)

    def dialect(self, name: str) -> Dialect:
        """The dialect of a method, by the method's name."""
        method = self.method(name)
        return Dialect() if method is None else method.dialect

    def where(self, name: str) -> str:
        """``"backend:method"``, for messages."""
        return f"{self.capabilities.package}:{name}"

    def native(self, instance: Instance | Batch) -> dict[str, Any]:
        """The options of ``instance`` as its method wants them; see ``Dialect.native``."""
        return self.dialect(instance.method).native(instance.options, self.where(instance.method))


class BatchAdapter(Adapter):
    """An adapter that takes a batch as a whole; one sample is a batch of one."""

    @abc.abstractmethod
    def solve_all(self, batch: Batch) -> Sequence[Point]:
        """Every sample; ``batch.given_up(i)`` where they are solved one after the other.

        Raises:
            BackendCannotSolve, ProblemError: As ``Adapter.solve``.
        """

    def solve(self, instance: Instance) -> Point:
        point: Point = self.solve_all(Batch.of(instance))[0]
        return point

    def solve_batch(self, batch: Batch) -> Sequence[Point]:
        with interruptible():
            return self.solve_all(batch)


def _last_line(error: Exception) -> str:
    """Of an error text: compiled backends put their call stack above it."""
    return (str(error).strip().splitlines() or [""])[-1]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let a Ctrl-C out that compiled code swallows or reports as some failure of its own.

    The handler in force decides, as ever, what the signal means: what it raises is raised again on
    leaving the block. Only the main thread is told of signals.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[BaseException] = []

    def note(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if raised:
            raise raised[0]
