"""The search for the solutions of a batch: call backends in turn, verify what they return, keep the best."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ddn_solvers import isolation
from ddn_solvers.adapter import Adapter, Batch, Method, Options
from ddn_solvers.arrays import Array, Index, Mask
from ddn_solvers.binding import check_finite
from ddn_solvers.derived import scaled, with_extra
from ddn_solvers.diagnosis import diagnose, nearest_feasible
from ddn_solvers.errors import BackendCannotSolve
from ddn_solvers.evaluators import samples_of
from ddn_solvers.kkt.multipliers import NEARLY_ON_KINK, least_squares_multipliers, with_kink_forces
from ddn_solvers.kkt.polish import polish
from ddn_solvers.kkt.verify import Verified, judge, verify, verify_from
from ddn_solvers.points import MULTIPLIERS, Points
from ddn_solvers.policy import Policy
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual
from ddn_solvers.solution import Status

_RUN_OFF = 1e15  # size of a point relative to where the search began, and to the numbers of an LP or QP
_LEFT = 1e-2  # share of the violation at the start that a solution may have left where rows have become steep
_FAR = 1.0  # powers of ten from one beyond which the numbers of an LP or QP are scaled, if it fails otherwise
_TENTATIVE = 30  # iterations after which what is worth a try because it is quick is so no longer
# Statuses about which a look at the constraints says more, or says that a backend was wrong.
_UNEXPLAINED = (Status.NUMERICAL_ERROR, Status.NOT_A_KKT_POINT, Status.BACKEND_ERROR, Status.INFEASIBLE)


class Start(enum.Enum):
    """Where a route begins; the value is how ``stats`` calls it."""

    GIVEN = ""  # the caller's initial point or warm start, without one the fresh start
    FRESH = "a fresh start"  # zero, moved into the bounds
    ANOTHER = "another start"  # a fixed point off all symmetries of zero, moved into the bounds


class Form(enum.Enum):
    """In which form a route puts the problem to its backend; the value is how ``stats`` calls it."""

    DECLARED = ""
    LIFTED = "lifted kinks"  # ``Program.lifted``
    SCALED = (
        "scaled variables"  # ``derived.scaled``, for samples of an LP or QP whose numbers are far from one
    )


@dataclass(frozen=True)
class Route:
    """One backend and method to try, the form of the problem that it gets, and where it begins.

    Attributes:
        tentative: Worth a try because it is quick; what it does not solve it has no verdict on.
    """

    backend: str
    adapter: Adapter
    method: Method
    form: Form = Form.DECLARED
    start: Start = Start.GIVEN
    tentative: bool = False

    def __str__(self) -> str:
        form, start = self.form.value, self.start.value
        return (
            f"{self.backend}:{self.method.name}"
            + (f" on {form}" if form else "")
            + (f" from {start}" if start else "")
        )


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
    warm_start: Points | None
    newton_first: bool = False  # see ``routing.newton_first``
    status: list[Status] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    backend: list[str] = field(default_factory=list)
    method: list[str] = field(default_factory=list)
    iterations: list[int | None] = field(default_factory=list)
    verified: Verified | None = None
    phases: dict[str, float] = field(default_factory=lambda: {"backend": 0.0, "verification": 0.0})

    @np.errstate(all="ignore")  # points of failed samples may be anything
    def find(self, parameters: tuple[Array, ...]) -> Verified:
        """Solve every sample, route after route."""
        started, before = time.perf_counter(), self.phases["backend"]
        verified = self._find(parameters)
        in_backends = self.phases["backend"] - before
        self.phases["verification"] += time.perf_counter() - started - in_backends
        return verified

    def _find(self, parameters: tuple[Array, ...]) -> Verified:
        program = self.program
        check_finite(program, parameters)
        samples = samples_of(parameters, self.samples)
        bound = Bound.of(program, parameters, samples)
        lower, upper = bound.lower, bound.upper
        given = self._given = self.start(Start.GIVEN, lower, upper)
        self._reset(samples)
        best = PrimalDual.resting(program, parameters, given.copy())
        crossed = lower > upper
        open_: Mask = np.logical_not(crossed.any(axis=1))
        for i in np.flatnonzero(~open_):
            name = program.variables.element(int(np.flatnonzero(crossed[i])[0]))
            self.status[i], self.reasons[i] = (
                Status.INFEASIBLE,
                f"the bounds of {name} contradict: lower > upper",
            )
        if self.options.call_time_limit is not None:
            deadline = time.monotonic() + self.options.call_time_limit
            self.options = replace(self.options, deadline=deadline)
        refusal: BackendCannotSolve | None = None
        if self.newton_first and not self.options.native and not self.options.workers:
            self._newton(given, bound, best, open_)
        attempts = self._attempts()
        for route in attempts:
            remaining = self._remaining(route, open_)
            if not remaining.size:
                continue
            if time.monotonic() > self.options.deadline:
                self._out_of_time(remaining)
                break
            initial = given if route.start is Start.GIVEN else self.start(route.start, lower, upper)
            lifted = route.form is Form.LIFTED
            if lifted and route is not attempts[-1] and self._has_concave_kinks(bound, initial):
                continue
            if route.form is Form.SCALED:
                length = self._measured(bound.take(remaining), initial[remaining]).length
                remaining = remaining[np.abs(np.log10(length)) > _FAR]
                if not remaining.size:
                    continue
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
        self._tell_undefined(given, bound)
        return self._whole(bound, best)

    def _out_of_time(self, samples: Index) -> None:
        """Samples that no solver has seen say so; of the others the verdict stands."""
        for i in samples:
            if not self.backend[i]:
                self.status[i], self.reasons[i] = Status.TIME_LIMIT, "the time limit of the call was reached"

    def _attempts(self) -> list[Route]:
        """The routes; where the caller gave a start that may have misled them, then again from a fresh one.

        Those of an LP or QP at last on scaled variables.
        """
        routes = self.routes
        if self.options.native:  # which are for a backend that has to be asked
            routes = [route for route in routes if not route.tentative]
        given = [route for route in routes if route.start is Start.GIVEN]
        rest = [route for route in routes if route.start is not Start.GIVEN]
        if self.initial is not None or self.warm_start is not None:
            rest = [*(replace(route, start=Start.FRESH) for route in given), *rest]
        if self.program.quadratic:
            rest += [replace(route, form=Form.SCALED) for route in given if route.form is Form.DECLARED]
        return [*given, *rest]

    def _measured(self, bound: Bound, z: Array) -> Evaluation:
        return Evaluation.at(self.program, bound, PrimalDual.resting(self.program, bound.parameters, z))

    def _remaining(self, route: Route, open_: Mask) -> Index:
        """Samples that are to be tried; where the caller chose the start, a stationary point it led to stands."""
        stands = self.initial is not None and route.start is not Start.GIVEN
        left = [not (stands and status is Status.NOT_A_MINIMUM) for status in self.status]
        return np.flatnonzero(open_ & np.array(left, dtype=bool))

    def start(self, start: Start, lower: Array, upper: Array) -> Array:
        """Where the samples begin, (B, n), inside the bounds."""
        z = np.zeros(lower.shape)
        if start is Start.ANOTHER:
            z += np.random.default_rng(0).standard_normal(self.program.variables.size)
        elif start is Start.GIVEN and self.initial is not None:
            z += self.initial
        elif start is Start.GIVEN and self.warm_start is not None and len(self.warm_start) == len(z):
            z = self.warm_start.primal
        inside: Array = np.clip(z, lower, np.maximum(lower, upper))
        return inside

    def _reset(self, samples: int) -> None:
        self.status = [Status.BACKEND_ERROR] * samples
        self.reasons, self.backend, self.method = [""] * samples, [""] * samples, [""] * samples
        self.iterations = [None] * samples

    def _call(self, route: Route, bound: Bound, initial: Array, samples: Index) -> Points:
        """The backend's points; an exception of its own fails the samples, not the program."""
        warm = self._warm(samples) if route.start is Start.GIVEN else None
        program, n, parameters = self.program, initial.shape[1], bound.parameters
        lower, upper, start = bound.lower, bound.upper, initial
        if route.form is Form.SCALED:
            unit, energy = _scales(self._measured(bound, initial))
            parameters = tuple(with_extra(program, parameters, (unit, energy)))
            program, warm = scaled(program), None
            start, lower, upper = start / unit, lower / unit, upper / unit
        if route.form is Form.LIFTED and program.lifted is not None:
            program, warm = program.lifted, None
            start, lower, upper = (
                np.concatenate([side, np.full((len(initial), program.variables.size - n), value)], axis=1)
                for side, value in ((initial, 1.0), (lower, -np.inf), (upper, np.inf))
            )
        known = bound.coefficients if route.form is Form.DECLARED else None
        options = self.options
        if route.tentative and options.max_iter is None:
            options = replace(options, max_iter=_TENTATIVE)
        batch = Batch(program, parameters, lower, upper, start, route.method.name, options, warm, known)
        attempt = isolation.attempt_batch if self.options.workers else Adapter.attempt_batch
        started = time.perf_counter()
        try:
            points = attempt(route.adapter, batch)
        finally:
            self.phases["backend"] += time.perf_counter() - started
        points = _finite(points, start)
        if route.form is Form.SCALED:
            return _unscaled(points, unit, energy)
        return self._lowered(points) if route.form is Form.LIFTED else points

    def _lowered(self, points: Points) -> Points:
        """Points of the lifted problem as those of the problem itself."""
        n, q = self.program.variables.size, self.program.inequality.size
        lengths = {"primal": n, "inequality": q, "lower": n, "upper": n}
        return replace(points, **{name: getattr(points, name)[:, :size] for name, size in lengths.items()})

    def _has_concave_kinks(self, bound: Bound, z: Array) -> bool:
        """Whether some |r| lowers the objective, or an inequality, where the search starts: t has no limit then."""
        program = self.program
        here = self._measured(bound, z)
        here.point.y[:, program.equality.size : program.constraints] = 1.0
        return bool((here.kink_weights < 0).any())

    def _newton(self, given: Array, bound: Bound, best: PrimalDual, open_: Mask) -> None:
        """Newton's method from where the search begins, as the polish has it; no backend where that does."""
        samples, program = np.flatnonzero(open_), self.program
        warm = self._warm(samples)
        if not samples.size or (warm is None and not program.quadratic):
            return
        part = bound.take(samples)
        if warm is None:
            start = PrimalDual.resting(program, part.parameters, given[samples])
        else:
            start = _with_multipliers(program, part, warm)
        polished = polish(program, part, start, self.policy, tentative=program.quadratic)
        near = np.flatnonzero(polished.singular | (polished.predicted <= self.policy.accuracy))
        if not near.size:
            return
        verified = judge(polished.take(near), self.policy, self.dtype)
        if len(near) == len(self.status):
            self.verified = verified
        for k in np.flatnonzero(verified.optimal):
            i = samples[near[k]]
            best.put(i, verified.evaluation.point, int(k))
            self.backend[i], self.method[i] = "ddn_solvers", "newton"
            self.iterations[i] = int(polished.steps[near[k]])
            self.status[i], open_[i] = Status.OPTIMAL, False

    def _warm(self, samples: Index) -> Points | None:
        """The warm start of some samples, if there is one for this batch."""
        if self.warm_start is None or len(self.warm_start) != len(self.status):
            return None
        return self.warm_start.take(samples)

    def _judge(
        self, route: Route, points: Points, bound: Bound, samples: Index, best: PrimalDual, open_: Mask
    ) -> None:
        """Verify what a backend returned; keep the better of old and new, close what is solved."""
        verified = self._verify(points, bound, samples)
        taken = []
        for k, i in enumerate(samples):
            solved = verified.status[k] is Status.OPTIMAL
            if not solved and (self.backend[i] or route.tentative):
                continue  # an earlier backend's verdict stands
            taken.append(k)
            before = f"solved by {route}, after: {self.status[i].value}" if self.backend[i] else ""
            self.backend[i], self.method[i] = route.backend, route.method.name
            self.iterations[i] = points.iterations[k]
            self.status[i], reason = _verdict(
                points.status[k], points.message[k], verified.status[k], verified.reasons[k]
            )
            self.reasons[i] = "; ".join(text for text in (before, reason) if text)
            z = verified.evaluation.point.z[k]
            open_[i] = not (solved or self._proved(bound.take([int(i)]), z, self.status[i]))
        best.put(samples[taken], verified.evaluation.point, taken)

    def _verify(self, points: Points, bound: Bound, samples: Index) -> Verified:
        part = bound.take(samples)

        def start(some: Index, nearly: float) -> PrimalDual:
            return _with_multipliers(self.program, part.take(some), points.take(some), nearly)

        verified = self._credible(
            verify_from(self.program, part, start, self.policy, self.dtype), part, samples
        )
        if len(samples) == len(self.status):
            self.verified = verified
        return verified

    def _credible(self, verified: Verified, bound: Bound, samples: Index) -> Verified:
        """Without points that have run off, where forces and distances prove nothing.

        As an unbounded problem's, beside whose numbers any force is small; and those that violate constraints about as much
        as where the search began, since a row has become so steep that any violation is a tiny distance.
        """
        if not verified.optimal.any():
            return verified
        here, given, reasons = verified.evaluation, self._given[samples], list(verified.reasons)
        largest = np.abs(here.point.z).max(axis=1, initial=0.0)
        begun = np.maximum(np.abs(given).max(axis=1, initial=0.0), here.length)
        lost = verified.optimal & (largest > _RUN_OFF * np.maximum(begun, 1.0))
        for k in np.flatnonzero(lost):
            reasons[k] = f"the point has run off, to {largest[k]:.1e}"
        steep, accuracy = np.zeros_like(lost), self.policy.accuracy
        if not self.program.affine_constraints:
            left = here.norms[1]
            steep = verified.optimal & ~lost & (left > accuracy)
        if steep.any():
            start = self._measured(bound, given)
            reach = start.reach[:, : self.program.constraints].max(axis=1, initial=0.0)
            steep &= left > np.maximum(_LEFT * start.norms[1], accuracy * reach)
            for k in np.flatnonzero(steep):
                reasons[k] = f"constraints are violated by {left[k]:.1e}, about as where the search began"
        status = [
            Status.NOT_A_KKT_POINT if gone else status
            for gone, status in zip(lost | steep, verified.status, strict=True)
        ]
        return replace(verified, status=tuple(status), reasons=tuple(reasons))

    def _proved(self, bound: Bound, z: Array, claim: Status) -> bool:
        """Whether a backend's claim that an LP or QP has no solution holds; then no other need be asked."""
        claims = claim in (Status.INFEASIBLE, Status.UNBOUNDED)
        if not claims or not self.program.quadratic:
            return False
        found = diagnose(self.program, bound, z, self.policy.accuracy)
        return found is not None and found[0] is claim

    def _solve_determined(self, bound: Bound, best: PrimalDual) -> None:
        """More equations than variables, which backends refuse, leave at most one point: find that."""
        failed = np.flatnonzero([status in _UNEXPLAINED for status in self.status])
        if self.program.equality.size <= self.program.variables.size or not failed.size:
            return
        part = bound.take(failed)
        z = np.stack([nearest_feasible(self.program, bound.take([int(i)]), best.z[i]) for i in failed])
        start = least_squares_multipliers(self.program, part, z)
        verified = self._credible(verify(self.program, part, start, self.policy, self.dtype), part, failed)
        for k in np.flatnonzero(verified.optimal):
            best.put(int(failed[k]), verified.evaluation.point, int(k))
            self.status[failed[k]], self.reasons[failed[k]] = Status.OPTIMAL, ""
            self.method[failed[k]] = "gauss-newton"

    def _diagnose(self, bound: Bound, best: PrimalDual) -> None:
        """Tell infeasible and unbounded samples where the backend could not."""
        limits = (self.options.max_iter, self.options.time_limit, self.options.call_time_limit)
        limited = any(limit is not None for limit in limits)
        for i, status in enumerate(self.status):
            if status not in _UNEXPLAINED and (status is not Status.ITERATION_LIMIT or limited):
                continue
            if (bound.lower[i] > bound.upper[i]).any():
                continue  # contradicting bounds are explained already
            found = diagnose(self.program, bound.take([int(i)]), best.z[i], self.policy.accuracy)
            if found is not None:
                self.status[i], why = found
                self.reasons[i] = "; ".join(text for text in (why, self.reasons[i]) if text)
            elif status is Status.INFEASIBLE:
                self.status[i] = Status.NOT_A_KKT_POINT
                self.reasons[i] = "; ".join(t for t in ("there are feasible points", self.reasons[i]) if t)

    def _tell_undefined(self, given: Array, bound: Bound) -> None:
        """Where log(0) or the like stands where the search begins, no solver gets away from it."""
        failed = np.flatnonzero([status in _UNEXPLAINED for status in self.status])
        if not failed.size:
            return
        at = self._measured(bound.take(failed), given[failed])
        which = "initial" if self.initial is not None else "zero, where the search begins"
        finite = np.isfinite(at.first.objective) & np.isfinite(at.first.gradient).all(axis=1)
        finite &= np.isfinite(at.first.constraints).all(axis=1)
        c = at.first.constraints[:, : self.program.constraints]
        equality = np.arange(c.shape[1]) < self.program.equality.size
        missed = np.where(equality, np.abs(c), c) > self.policy.accuracy
        lost = (missed & (at.row_norms[:, : c.shape[1]] == 0)).any(axis=1)
        for k, i in enumerate(failed):
            hint = ""
            if not finite[k]:
                hint = f"the functions are not finite at {which}: give an initial point where they are"
            elif lost[k]:
                hint = f"a constraint that does not hold has no gradient at {which}: give an initial point where it has"
            self.reasons[i] = "; ".join(text for text in (hint, self.reasons[i]) if text)

    def _whole(self, bound: Bound, best: PrimalDual) -> Verified:
        """One ``Verified`` for the batch: that of a single route as it is, pieces put together again."""
        if self.verified is None or not np.array_equal(self.verified.evaluation.point.z, best.z):
            self.verified = verify(self.program, bound, best, self.policy, self.dtype, minimum=False)
        self.verified = replace(self.verified, status=tuple(self.status), reasons=tuple(self.reasons))
        return self.verified


def _finite(points: Points, initial: Array) -> Points:
    """The points; those that are not finite are failures where they began."""
    lost = ~np.isfinite(points.primal).all(axis=1)
    points.primal[lost] = initial[lost]
    for name in MULTIPLIERS:
        getattr(points, name)[lost] = np.nan
    for i in np.flatnonzero(lost):
        if points.status[i] is Status.OPTIMAL:
            points.status[i] = Status.NUMERICAL_ERROR
        points.message[i] = points.message[i] or "returned numbers that are not finite"
    return points


def _scales(measured: Evaluation) -> tuple[Array, Array]:
    """Unit and energy of the scaled problem, powers of two, (B, 1) each: its numbers are then about one."""
    unit = measured.length
    gradient = np.abs(measured.first.gradient).max(axis=1, initial=0.0)
    energy = np.maximum(unit * gradient, unit**2 * measured.H.absolute.largest())

    def rounded(values: Array) -> Array:
        return np.exp2(np.round(np.log2(np.where(values > 0, values, 1.0))))[:, None]

    return rounded(unit), rounded(energy)


def _unscaled(points: Points, unit: Array, energy: Array) -> Points:
    """Points of the scaled problem as those of the problem itself."""
    multipliers = {name: getattr(points, name) * (energy / unit) for name in MULTIPLIERS}
    return replace(points, primal=points.primal * unit, **multipliers)


def _verdict(claim: Status, message: str, verified: Status, reason: str) -> tuple[Status, str]:
    if verified is Status.OPTIMAL:
        return verified, "" if claim is Status.OPTIMAL else message
    if claim is Status.OPTIMAL or verified is Status.NOT_A_MINIMUM:
        return verified, reason
    said = f"the backend says: {message}" if message else ""
    return claim, "; ".join(text for text in (said, reason) if text)


def _with_multipliers(
    program: Program, bound: Bound, points: Points, nearly: float = NEARLY_ON_KINK[0]
) -> PrimalDual:
    """The backend's multipliers where it gave them all, else those of least squares."""
    z = points.primal
    start = PrimalDual.resting(program, bound.parameters, z)
    if program.degree("objective") == 0:  # feasibility: nothing pushes against the constraints
        return start
    (equality, inequality, lower, upper), missing = points.multipliers(program.bounded)
    start.y[:, : program.constraints] = np.concatenate([equality, inequality], axis=1)
    start = replace(start, lower=lower, upper=upper)
    start = with_kink_forces(program, bound, start, nearly)
    if missing.any():
        without = np.flatnonzero(missing)
        found = least_squares_multipliers(program, bound.take(without), z[without], nearly)
        for source, sample in enumerate(without):
            start.put(int(sample), found, source)
    return start
