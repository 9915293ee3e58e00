"""What a backend author reads: an adapter turns one compiled problem into a point.

An adapter implements one method, ``Adapter.solve``: it receives an ``Instance`` (a compiled
problem with numbers for its parameters) and returns a ``Point``. It knows no derivative rule of
the solution: residuals, active set, multipliers it did not return, polish and gradients are the
library's. Everything it needs to evaluate, ``Instance`` offers, as NumPy and SciPy arrays:

    minimise f(z)   subject to   h(z) = 0,  g(z) <= 0,  lower <= z <= upper        (z flat, (n,))

Multipliers follow ``L = f + nu^T h + lambda^T g + l^T (lower - z) + r^T (z - upper)`` with
lambda, l, r >= 0. What an adapter has no multipliers for, it leaves ``None``.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ddn_solvers.errors import BackendCannotSolve, BackendNotInstalled, ProblemError
from ddn_solvers.solution import Status

if TYPE_CHECKING:
    import scipy.sparse as sp

    from ddn_solvers.program import Program

__all__ = [
    "Adapter",
    "BackendCannotSolve",
    "BackendNotInstalled",
    "Batch",
    "Capabilities",
    "Feature",
    "Instance",
    "Method",
    "Options",
    "Point",
    "ProblemClass",
    "ProblemError",
    "QuadraticForm",
    "Status",
]

Array = np.ndarray[Any, np.dtype[np.float64]]


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


@dataclass(frozen=True)
class Method:
    """One method of a backend, as data: routing, errors, tests and the README's table read it.

    Attributes:
        name: As in ``"backend:name"``.
        classes: Problem classes it solves natively.
        features: Features it takes.
        duals: It returns multipliers.
        package: Import name that it needs beyond the backend's own, or ``None``.
        pip: What ``pip install`` has to be given for that.
    """

    name: str
    classes: frozenset[ProblemClass]
    features: frozenset[Feature]
    duals: bool = True
    package: str | None = None
    pip: str | None = None


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
class Options:
    """Limits that every adapter translates, and the backend's native options.

    Attributes:
        max_iter: Iterations, or ``None`` for the backend's default.
        time_limit: Seconds of wall time for one sample, or ``None``.
        tolerance: The backend's own stopping tolerance, or ``None`` for a tight one.
        native: Options under the backend's own names; unknown ones are a ``ProblemError``.
    """

    max_iter: int | None = None
    time_limit: float | None = None
    tolerance: float | None = None
    native: Mapping[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Point:
    """What a backend found for one instance: the point, its word, and multipliers if it has them."""

    primal: Array  # (n,)
    status: Status
    equality: Array | None = None
    inequality: Array | None = None
    lower: Array | None = None
    upper: Array | None = None
    iterations: int | None = None
    message: str = ""


@dataclass(frozen=True)
class Instance:
    """A compiled problem with numbers for its parameters: one sample.

    Attributes:
        program: The compiled problem; its structure is shared by all samples.
        parameters: One flat float64 array a parameter block of ``program.parameters``.
        lower: (n,), -inf where there is no bound. Never above ``upper``.
        upper: (n,), +inf where there is no bound.
        initial: (n,), inside the bounds.
        method: Name of the method asked for, one of the adapter's.
        options: Limits and native options.
        warm_start: A point and multipliers of an earlier solve, or ``None``.
    """

    program: Program
    parameters: tuple[Array, ...]
    lower: Array
    upper: Array
    initial: Array
    method: str
    options: Options = Options()
    warm_start: Point | None = None

    def objective(self, z: Array) -> float:
        return float(self.program.values(z, self.parameters)[0][0, 0])

    def gradient(self, z: Array) -> Array:
        """(n,)"""
        return self.program.first_order(z, self.parameters).gradient[0]

    def equality(self, z: Array) -> Array:
        """h(z), (equalities,)"""
        return self.program.values(z, self.parameters)[1][0, : self.program.equality.size]

    def inequality(self, z: Array) -> Array:
        """g(z), (inequalities,)"""
        return self.program.values(z, self.parameters)[1][0, self.program.equality.size :]

    def equality_jacobian(self, z: Array) -> sp.csc_array:
        return self._jacobian(z)[: self.program.equality.size]

    def inequality_jacobian(self, z: Array) -> sp.csc_array:
        return self._jacobian(z)[self.program.equality.size :]

    def hessian(self, z: Array, equality: Array, inequality: Array, objective: float = 1.0) -> sp.csc_array:
        """Hessian of ``objective * f + equality^T h + inequality^T g``, symmetric, (n, n)."""
        weights = np.concatenate([equality, inequality])
        nonzeros = self.program.hessian(z, self.parameters, weights, objective)
        return self.program.hessian_pattern.matrix(nonzeros[0])

    def _jacobian(self, z: Array) -> sp.csr_array:
        nonzeros = self.program.first_order(z, self.parameters).jacobian
        return self.program.jacobian_pattern.matrix(nonzeros[0]).tocsr()

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

    def __len__(self) -> int:
        return len(self.initial)

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
        """Solve one sample. Report failure by ``Point.status``; raise only for wrong usage.

        Raises:
            BackendCannotSolve: The problem lacks what the method needs (say what, and who has it).
            ProblemError: An option that the backend does not know.
        """

    def solve_batch(self, batch: Batch) -> list[Point]:
        """Solve every sample; override where the backend can do better than a loop."""
        return [self.solve(batch[i]) for i in range(len(batch))]

    def method(self, name: str) -> Method | None:
        """The method of that name, also one found only at run time; ``None`` if there is none."""
        return next((m for m in self.capabilities.methods if m.name == name), None)
