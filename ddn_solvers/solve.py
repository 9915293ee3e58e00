"""Validate, route, call, verify, retry: the one way from a problem and its parameters to a solution."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ddn_solvers import registry
from ddn_solvers.adapter import Adapter, Batch, Feature, Method, Options, Point, ProblemClass
from ddn_solvers.arrays import Array, Index, Mask
from ddn_solvers.assembly import assemble
from ddn_solvers.binding import Binding, bind, check_finite, flat_point, initial_batch
from ddn_solvers.captures import Overrides
from ddn_solvers.certificate import Certificate, certify
from ddn_solvers.diagnosis import diagnose, nearest_feasible
from ddn_solvers.errors import (
    BackendCannotSolve,
    BackendNotInstalled,
    ConvergenceWarning,
    DDNError,
    FallbackWarning,
    ProblemError,
    SolveError,
)
from ddn_solvers.implicit import Operation, Outputs, apply, outputs_of
from ddn_solvers.kkt.multipliers import least_squares_multipliers
from ddn_solvers.kkt.verify import Verified, verify
from ddn_solvers.layout import Layout
from ddn_solvers.policy import Policy, as_policy
from ddn_solvers.problem import Problem, as_problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.residuals import Bound, PrimalDual
from ddn_solvers.solution import Solution, Stats, Status

Solver = str | Sequence[str]

# What "auto" tries, in order, by problem class; entries that cannot take the problem are passed over.
AUTO: Mapping[ProblemClass, tuple[str, ...]] = {
    ProblemClass.LP: ("scipy:highs", "casadi:ipopt"),
    ProblemClass.QP: ("casadi:daqp", "casadi:ipopt"),
    ProblemClass.LEAST_SQUARES: ("casadi:ipopt", "scipy:SLSQP"),
    ProblemClass.NLP: ("casadi:ipopt", "scipy:SLSQP"),
}
AUTO_NONSMOOTH = ("cvxpy:CLARABEL", "casadi:ipopt", "scipy:SLSQP")
# Statuses that say less than a look at the constraints can.
_UNEXPLAINED = (Status.NUMERICAL_ERROR, Status.NOT_A_KKT_POINT, Status.BACKEND_ERROR)
# Slack, relative, within which a constraint may be active when a backend gives no multipliers.
_NEARLY_ACTIVE = 1e-5


def solve(
    problem: Problem | Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    solver: Solver = "auto",
    initial: Any = None,
    warm_start: Solution | None = None,
    options: Mapping[str, Any] | None = None,
    policy: Policy | None = None,
) -> Solution:
    """Solve a problem for a batch of parameters; differentiable in them.

    Args:
        problem: A ``Problem`` or the dict that ``Problem.from_dict`` takes.
        parameters: Name -> tensor (*batch, *shape); leading batch dimensions broadcast.
        solver: ``"backend"``, ``"backend:method"``, ``"auto"`` (by problem class), or a list of
            these, tried in order for each sample.
        initial: Starting point: a dict by variable, or a tensor when there is one variable; by
            default zero, moved into the bounds.
        warm_start: An earlier ``Solution`` of the same batch: point and multipliers to start from.
        options: ``max_iter``, ``time_limit`` (seconds a sample), ``tolerance``, and native options of
            the backend.
        policy: What to do about failures and degenerate derivatives.

    Returns:
        The polished, verified solution of every sample. Point, multipliers and objective carry
        gradients; they are exact to rounding times the condition of the KKT matrix.

    Raises:
        ProblemError: A wrong declaration, parameter, option or policy, before any solver runs.
        BackendNotFound, BackendNotInstalled, BackendCannotSolve: The solver's name does not serve.
        SolveError: A sample has no verified solution (unless ``policy.on_failure`` says otherwise).
    """
    return solve_captured(as_problem(problem), parameters, solver, initial, warm_start, options, policy, None)


def solve_captured(
    problem: Problem,
    parameters: Mapping[str, Any] | None,
    solver: Solver,
    initial: Any,
    warm_start: Solution | None,
    options: Mapping[str, Any] | None,
    policy: Policy | None,
    overrides: Overrides | None,
) -> Solution:
    """``solve`` with other objects in place of what the problem's functions capture (a layer's own)."""
    started = time.perf_counter()
    policy = as_policy(policy)
    call_options = as_options(options)
    program = compile_program(problem, overrides)
    warn_if_callbacks(program)
    start, start_batch = initial_batch(program.variables, initial)
    binding = bind(program, parameters, program.graph.read_captures(overrides), start, start_batch)
    if start and start_batch != binding.batch:
        start = {k: v.expand((*binding.batch, *program.variables.by_name[k].shape)) for k, v in start.items()}
    search = Search(
        program=program,
        policy=policy,
        dtype=binding.dtype,
        samples=binding.samples,
        routes=routes(solver, program),
        options=call_options,
        initial=flat_point(program.variables, start, binding.batch) if start else None,
        warm_start=_warm_points(program, warm_start, binding),
    )
    operation = Operation(program, policy, search.find)
    search.operation = operation
    outputs = apply(operation, binding.blocks)
    stats = Stats(
        tuple(search.backend),
        tuple(search.method),
        tuple(search.iterations),
        tuple(search.reasons),
        time.perf_counter() - started,
    )

    def certificate() -> Certificate:
        assert search.verified is not None
        return certify(search.verified, policy, binding.batch, np.zeros(len(search.status)))

    solution = assemble(program, binding, outputs, tuple(search.status), stats, certificate)
    report_failures(solution, search, policy)
    return solution


# -- routing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """One backend and method to try."""

    backend: str
    adapter: Adapter
    method: Method


def routes(solver: Solver, program: Program) -> list[Route]:
    """What to try, in order; at least one."""
    if isinstance(solver, str):
        if solver == "auto":
            return _auto(program)
        return [_route(solver, program)]
    if not isinstance(solver, Sequence) or not solver or not all(isinstance(s, str) for s in solver):
        raise ProblemError(
            "solver is not a name", expected="'backend', 'backend:method', 'auto' or a list", got=repr(solver)
        )
    found: list[Route] = []
    refusal: BackendCannotSolve | None = None
    for name in solver:
        try:
            found += _auto(program) if name == "auto" else [_route(name, program)]
        except BackendCannotSolve as error:
            refusal = error
    if not found and refusal is not None:
        raise refusal
    return found


def _route(name: str, program: Program) -> Route:
    adapter, method = registry.resolve(name, program)
    return Route(name.partition(":")[0], adapter, method)


def auto_names(program: Program) -> tuple[str, ...]:
    """What ``"auto"`` would try, before asking what is installed and able."""
    return AUTO_NONSMOOTH if Feature.NONSMOOTH in program.features else AUTO[program.problem_class]


def _auto(program: Program) -> list[Route]:
    found = []
    for name in auto_names(program):
        try:
            found.append(_route(name, program))
        except (BackendCannotSolve, BackendNotInstalled):
            continue
    if not found:
        raise BackendCannotSolve(
            "no installed backend can solve this problem; see ddn.compile(problem).explain()"
        )
    return found


def as_options(options: Mapping[str, Any] | None) -> Options:
    """The limits that every adapter translates, split from the backend's native options."""
    native = dict(options or {})
    limits: dict[str, Any] = {}
    for name, kind in (("max_iter", int), ("time_limit", float), ("tolerance", float)):
        value = native.pop(name, None)
        if value is None:
            continue
        good = isinstance(value, (int,) if kind is int else (int, float)) and not isinstance(value, bool)
        if not good or not value > 0:
            raise ProblemError(
                f"option {name!r} is not valid", expected=f"a positive {kind.__name__}", got=repr(value)
            )
        limits[name] = kind(value)
    return Options(**limits, native=native)


# -- search -------------------------------------------------------------------------------------------


@dataclass
class Search:
    """One call's search for the solutions of a batch, and what it found out.

    ``find`` is what the autograd operation calls; the rest is read by ``solve`` afterwards.
    """

    program: Program
    policy: Policy
    dtype: torch.dtype
    samples: int
    routes: list[Route]
    options: Options
    initial: Array | None
    warm_start: list[Point] | None
    operation: Operation | None = None
    status: list[Status] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    backend: list[str] = field(default_factory=list)
    method: list[str] = field(default_factory=list)
    iterations: list[int | None] = field(default_factory=list)
    verified: Verified | None = None

    def find(self, parameters: tuple[Array, ...]) -> Outputs:
        """Solve every sample, route after route; see ``Outputs``."""
        program = self.program
        check_finite(program, parameters)
        lower, upper = program.bounds(parameters)
        samples = max((len(p) for p in parameters if p.ndim == 2), default=self.samples)
        lower, upper = (
            np.ascontiguousarray(np.broadcast_to(s, (samples, s.shape[1]))) for s in (lower, upper)
        )
        bound = Bound(parameters, lower, upper)
        initial = np.clip(self._start(samples), lower, np.maximum(lower, upper))
        self._reset(samples)
        best = PrimalDual(
            initial.copy(),
            np.zeros((samples, program.constraints)),
            np.zeros_like(initial),
            np.zeros_like(initial),
        )
        crossed = lower > upper
        open_: Mask = np.logical_not(crossed.any(axis=1))
        for i in np.flatnonzero(~open_):
            name = program.variables.element(int(np.flatnonzero(crossed[i])[0]))
            self.status[i], self.reasons[i] = (
                Status.INFEASIBLE,
                f"the bounds of {name} contradict: lower > upper",
            )
        refusal: BackendCannotSolve | None = None
        for route in self.routes:
            remaining = np.flatnonzero(open_)
            if not remaining.size:
                break
            try:
                points = self._call(route, bound.take(remaining), initial[remaining], remaining)
            except BackendCannotSolve as error:
                refusal = error
                continue
            refusal = None
            self._judge(route, points, bound, remaining, best, open_)
        if refusal is not None and all(not name for name in self.backend):
            raise refusal
        self._solve_determined(bound, best)
        self._diagnose(bound, best)
        return self._outputs(bound, best)

    def _start(self, samples: int) -> Array:
        n = self.program.variables.size
        if self.initial is not None:
            return np.broadcast_to(self.initial, (samples, n)) if len(self.initial) == 1 else self.initial
        if self.warm_start is not None and len(self.warm_start) == samples:
            return np.stack([point.primal for point in self.warm_start])
        return np.zeros((samples, n))

    def _reset(self, samples: int) -> None:
        self.status = [Status.BACKEND_ERROR] * samples
        self.reasons, self.backend, self.method = [""] * samples, [""] * samples, [""] * samples
        self.iterations = [None] * samples

    def _call(self, route: Route, bound: Bound, initial: Array, samples: Index) -> list[Point]:
        """The backend's points; an exception of its own fails the samples, not the program."""
        warm = None
        if self.warm_start is not None and len(self.warm_start) == len(self.status):
            warm = [self.warm_start[i] for i in samples]
        batch = Batch(
            self.program,
            bound.parameters,
            bound.lower,
            bound.upper,
            initial,
            route.method.name,
            self.options,
            warm,
        )
        try:
            points = route.adapter.solve_batch(batch)
        except DDNError:
            raise
        except Exception:  # of some sample: ask one by one
            points = [_isolated(route.adapter, batch, i) for i in range(len(batch))]
        return [self._checked(point, z) for point, z in zip(points, initial, strict=True)]

    def _checked(self, point: Point, initial: Array) -> Point:
        if np.shape(point.primal) != initial.shape:
            message = f"returned a point of shape {np.shape(point.primal)}, expected {initial.shape}"
            return Point(initial, Status.BACKEND_ERROR, message=message)
        if not np.isfinite(point.primal).all():
            status = Status.NUMERICAL_ERROR if point.status is Status.OPTIMAL else point.status
            return Point(initial, status, message=point.message or "returned numbers that are not finite")
        return point

    def _judge(
        self, route: Route, points: list[Point], bound: Bound, samples: Index, best: PrimalDual, open_: Mask
    ) -> None:
        """Verify what a backend returned; keep the better of old and new, close what is solved."""
        part = bound.take(samples)
        start = _with_multipliers(self.program, part, points)
        verified = verify(self.program, part, start, self.policy, self.dtype)
        if len(samples) == len(self.status):
            self.verified = verified
        for k, i in enumerate(samples):
            solved = verified.status[k] is Status.OPTIMAL
            if not solved and self.backend[i]:
                continue  # an earlier backend's verdict stands
            point = verified.evaluation.point
            for name in ("z", "y", "lower", "upper"):
                getattr(best, name)[i] = getattr(point, name)[k]
            self.backend[i], self.method[i] = route.backend, route.method.name
            self.iterations[i] = points[k].iterations
            self.status[i], self.reasons[i] = _verdict(points[k], verified.status[k], verified.reasons[k])
            decided = self.status[i] in (Status.INFEASIBLE, Status.UNBOUNDED)
            linear = self.program.problem_class in (ProblemClass.LP, ProblemClass.QP)
            open_[i] = not (solved or (decided and linear))

    def _solve_determined(self, bound: Bound, best: PrimalDual) -> None:
        """More equations than variables, which backends refuse, leave at most one point: find that."""
        failed = np.flatnonzero([status in _UNEXPLAINED for status in self.status])
        if self.program.equality.size <= self.program.variables.size or not failed.size:
            return
        part = bound.take(failed)
        z = np.stack([nearest_feasible(self.program, bound.take([i]), best.z[i]) for i in failed])
        start = least_squares_multipliers(self.program, part, z, _NEARLY_ACTIVE)
        verified = verify(self.program, part, start, self.policy, self.dtype)
        for k in np.flatnonzero(verified.optimal):
            for name in ("z", "y", "lower", "upper"):
                getattr(best, name)[failed[k]] = getattr(verified.evaluation.point, name)[k]
            self.status[failed[k]], self.reasons[failed[k]] = Status.OPTIMAL, ""
            self.method[failed[k]] = "gauss-newton"

    def _diagnose(self, bound: Bound, best: PrimalDual) -> None:
        """Tell infeasible and unbounded samples where the backend could not."""
        limited = self.options.max_iter is not None or self.options.time_limit is not None
        for i, status in enumerate(self.status):
            if status in _UNEXPLAINED or (status is Status.ITERATION_LIMIT and not limited):
                found = diagnose(self.program, bound.take([i]), best.z[i], self.policy.accuracy)
                if found is not None:
                    self.status[i], why = found
                    self.reasons[i] = "; ".join(text for text in (why, self.reasons[i]) if text)

    def _outputs(self, bound: Bound, best: PrimalDual) -> Outputs:
        assert self.operation is not None
        converged = np.array([status is Status.OPTIMAL for status in self.status], dtype=bool)
        return outputs_of(self.operation, self._whole(bound, best), converged, self.policy.on_failure)

    def _whole(self, bound: Bound, best: PrimalDual) -> Verified:
        """One ``Verified`` for the batch: that of a single route as it is, pieces put together again."""
        if self.verified is None or not np.array_equal(self.verified.evaluation.point.z, best.z):
            self.verified = verify(self.program, bound, best, self.policy, self.dtype, minimum=False)
        return self.verified


def _isolated(adapter: Adapter, batch: Batch, i: int) -> Point:
    try:
        return adapter.solve(batch[i])
    except DDNError:
        raise
    except Exception as error:
        return Point(batch.initial[i], Status.BACKEND_ERROR, message=f"{type(error).__name__}: {error}")


def _verdict(point: Point, verified: Status, reason: str) -> tuple[Status, str]:
    if verified is Status.OPTIMAL:
        return verified, ""
    if point.status is Status.OPTIMAL or verified is Status.NOT_A_MINIMUM:
        return verified, reason
    said = f"the backend says: {point.message}" if point.message else ""
    return point.status, "; ".join(text for text in (said, reason) if text)


def _with_multipliers(program: Program, bound: Bound, points: list[Point]) -> PrimalDual:
    """The backend's multipliers where it gave them all, else those of least squares."""
    z = np.stack([point.primal for point in points]).astype(float)
    if program.degree("objective") == 0:  # feasibility: nothing pushes against the constraints
        zero = np.zeros_like(z)
        return PrimalDual(z, np.zeros((len(z), program.constraints)), zero, zero.copy())
    given = [_stacked_multipliers(program, point) for point in points]
    y, lower, upper = (np.zeros((len(z), size)) for size in (program.constraints, z.shape[1], z.shape[1]))
    missing = np.array([g is None for g in given], dtype=bool)
    for i, multipliers in enumerate(given):
        if multipliers is not None:
            y[i], lower[i], upper[i] = multipliers
    if missing.any():
        found = least_squares_multipliers(program, bound.take(missing), z[missing], _NEARLY_ACTIVE)
        y[missing], lower[missing], upper[missing] = found.y, found.lower, found.upper
    return PrimalDual(z, y, lower, upper)


def _stacked_multipliers(program: Program, point: Point) -> tuple[Array, Array, Array] | None:
    n = program.variables.size
    parts = []
    for values, size, needed in (
        (point.equality, program.equality.size, True),
        (point.inequality, program.inequality.size, True),
        (point.lower, n, Feature.BOUNDS in program.features),
        (point.upper, n, Feature.BOUNDS in program.features),
    ):
        if values is None and (size and needed):
            return None
        parts.append(np.zeros(size) if values is None else np.asarray(values, dtype=float).reshape(size))
    if not all(np.isfinite(part).all() for part in parts):
        return None
    return np.concatenate(parts[:2]), parts[2], parts[3]


def _warm_points(program: Program, warm_start: Solution | None, binding: Binding) -> list[Point] | None:
    """An earlier solution as points, detached; it must be of the same batch."""
    if warm_start is None:
        return None
    if not isinstance(warm_start, Solution):
        raise ProblemError(
            "warm_start is not a solution", expected="a ddn Solution", got=type(warm_start).__name__
        )
    if len(warm_start.status) != binding.samples or set(warm_start.primal) != set(program.problem.variables):
        raise ProblemError(
            "warm_start is the solution of another batch or problem",
            expected=f"{binding.samples} samples of {', '.join(program.problem.variables)}",
            got=f"{len(warm_start.status)} samples of {', '.join(warm_start.primal)}",
        )

    def flat(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Array:
        if not layout.size:
            return np.zeros((binding.samples, 0))
        joined = layout.join(tensors).detach().to("cpu", torch.float64)
        return joined.reshape(binding.samples, layout.size).nan_to_num().numpy()

    dual = warm_start.dual
    arrays = (
        flat(program.variables, warm_start.primal),
        flat(program.equality, dual.equality),
        flat(program.inequality, dual.inequality),
        flat(program.variables, dual.lower),
        flat(program.variables, dual.upper),
    )
    return [
        Point(z, status, equality=nu, inequality=lam, lower=left, upper=right)
        for z, nu, lam, left, right, status in zip(*arrays, warm_start.status, strict=True)
    ]


# -- failures -----------------------------------------------------------------------------------------


def report_failures(solution: Solution, search: Search, policy: Policy) -> None:
    """Raise or warn about samples without a verified solution, as the policy says."""
    failed = [i for i, status in enumerate(search.status) if status is not Status.OPTIMAL]
    if not failed or policy.on_failure in ("nan", "mask"):
        return
    total = len(search.status)
    shown = [
        (f"sample {i}: " if total > 1 else "")
        + search.status[i].value
        + (f" ({search.reasons[i]})" if search.reasons[i] else "")
        for i in failed[:5]
    ]
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    who = f"{len(failed)} of {total} samples have" if total > 1 else "the problem has"
    message = f"{who} no verified solution: {'; '.join(shown)}{more}"
    if policy.on_failure == "raise":
        raise SolveError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=4)


def warn_if_callbacks(program: Program) -> None:
    """One ``FallbackWarning`` a call where the functions are torch callbacks."""
    if program.refusal is not None:
        warnings.warn(
            f"the problem's functions cannot be compiled because of {program.refusal}; torch evaluates them at "
            "every step instead, which is slower.",
            FallbackWarning,
            stacklevel=4,
        )
