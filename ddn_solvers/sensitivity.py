"""Derivatives at a point that was found elsewhere: ``sensitivity`` and ``attach``.

The given point is verified and polished as a backend's would be; the derivative is that of the polished
point, and the certificate reports the distance between the two. Any KKT point will do, a saddle or a
maximum too (Gould et al. 2019, Prop. 4.4); the certificate's ``sosc`` says which it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ddn_solvers.arrays import Array, Index
from ddn_solvers.assembly import assemble
from ddn_solvers.binding import Binding, as_tensor, bind, check_finite, flat_batch, flat_point, initial_batch
from ddn_solvers.certificate import Certificate, certify
from ddn_solvers.errors import ConvergenceWarning, ProblemError, SensitivityError, warn_caller
from ddn_solvers.implicit import Operation, Outputs, apply, check_derivative, directional, vjp
from ddn_solvers.kkt.conditions import Cotangents
from ddn_solvers.kkt.derivative import scale_rows
from ddn_solvers.kkt.multipliers import least_squares_multipliers, with_kink_forces
from ddn_solvers.kkt.verify import Verified, verify_from
from ddn_solvers.layout import Layout
from ddn_solvers.policy import Policy, as_policy
from ddn_solvers.problem import Problem, as_problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual
from ddn_solvers.solution import DualSolution, Solution, Stats, Status

# The given point may be this many times ``accuracy`` away from its polish.
_DISTANCE = 10.0


def sensitivity(
    problem: Problem | Mapping[str, Any],
    parameters: Mapping[str, Any] | None,
    primal: Mapping[str, torch.Tensor] | torch.Tensor,
    dual: DualSolution | None = None,
    policy: Policy | None = None,
) -> Sensitivity:
    """Derivatives of a solution found elsewhere.

    Args:
        problem: A ``Problem`` or the dict that ``Problem.from_dict`` takes.
        parameters: As in ``ddn.solve``.
        primal: The point: by variable, or a tensor when there is one variable; (*batch, *shape).
        dual: Its multipliers, as ``solution.dual``; computed by least squares if missing.
        policy: As in ``ddn.solve``.

    Returns:
        Products with the derivative, exact at the polish of the point; see ``Sensitivity``.

    Raises:
        ProblemError: A wrong declaration, parameter, point or policy.
        SensitivityError: The point is not a KKT point to ``policy.accuracy`` (unless
            ``policy.on_failure`` says otherwise).
    """
    policy = as_policy(policy)
    if not isinstance(dual, DualSolution | None):
        raise ProblemError(
            "dual is not valid", expected="a DualSolution, as solution.dual is", got=repr(dual)
        )
    program, binding, point = _given(as_problem(problem), parameters, primal)
    # A batch of its own for every block, so that nothing is summed over samples before it has to be.
    blocks = [b.detach().expand(binding.samples, b.shape[-1]).contiguous() for b in binding.blocks]
    found = _Found(program, policy, binding.dtype, point, dual)
    operation = Operation(program, policy, found.examine)
    outputs = operation.run(blocks)
    _report(found, policy)
    return Sensitivity(program, binding, found, operation, blocks, outputs, dict(parameters or {}))


def attach(
    problem: Problem | Mapping[str, Any],
    parameters: Mapping[str, Any] | None,
    primal: Mapping[str, torch.Tensor] | torch.Tensor,
    policy: Policy | None = None,
) -> Solution:
    """The same point as a ``Solution`` that is differentiable in the parameters.

    Args, Raises: As ``sensitivity``.
    """
    started = time.perf_counter()
    policy = as_policy(policy)
    program, binding, point = _given(as_problem(problem), parameters, primal)
    found = _Found(program, policy, binding.dtype, point, None)
    outputs = apply(Operation(program, policy, found.examine), binding.blocks)
    _report(found, policy)
    if outputs.z.shape == point.shape:  # the caller's own point, with the gradient of its polish
        here = found.given()
        outputs = outputs._replace(
            z=_with_gradient_of(outputs.z, point),
            objective=_with_gradient_of(outputs.objective, here.first.objective),
            residuals=torch.from_numpy(np.stack(here.norms, axis=1)),
        )
    samples = len(found.status)
    stats = Stats(
        ("attach",) * samples,
        ("",) * samples,
        (None,) * samples,
        found.reasons,
        time.perf_counter() - started,
    )

    def certificate() -> Certificate:
        return certify(found.verified, policy, binding.batch, found.distance)

    return assemble(program, binding, outputs, found.status, stats, certificate)


@dataclass(frozen=True)
class Sensitivity:
    """Products with the derivative of the solution; one factorization serves them all."""

    program: Program
    binding: Binding
    found: _Found
    operation: Operation
    blocks: Sequence[torch.Tensor]
    outputs: Outputs
    parameters: Mapping[str, Any]

    @cached_property
    def certificate(self) -> Certificate:
        """What can be said of each sample's derivative."""
        return certify(self.found.verified, self.operation.policy, self.binding.batch, self.found.distance)

    def vjp(self, cotangents: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cotangents of outputs -> gradients of parameters.

        Args:
            cotangents: By variable, ``"objective"``, or multiplier (``"equality.plane"``,
                ``"inequality.ball"``, ``"lower.u"``, ``"upper.u"``); (*batch, *shape) or the shape of one
                instance; missing ones are zero.

        Returns:
            By declared parameter, in the shape in which it was given (summed over a batch it shares).

        Raises:
            ProblemError: No dict, an unknown key or a wrong shape.
            SensitivityError: The policy refuses this derivative.
        """
        _check_by_name("cotangents", cotangents)
        flat = {name: self._flat_cotangent(name, value) for name, value in cotangents.items()}
        self._check()
        gradients = self._vjp(flat)
        result = {}
        for name, gradient in zip(self.program.problem.parameters, gradients, strict=False):
            shape, value = self.program.problem.parameters[name], self.parameters[name]
            values = self.binding.give_back(gradient, *shape)
            given = value.shape if isinstance(value, torch.Tensor) else shape
            result[name] = values.sum_to_size(given)
        return result

    def jvp(self, tangents: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tangents of parameters -> tangents of variables.

        Args:
            tangents: By declared parameter; (*batch, *shape) or (*shape); missing ones are zero.

        Returns:
            By variable, (*batch, *shape).

        Raises:
            ProblemError: No dict, an unknown key or a wrong shape.
            SensitivityError: The policy refuses this derivative.
        """
        _check_by_name("tangents", tangents)
        declared = self.program.problem.parameters
        unknown = [name for name in tangents if name not in declared]
        if unknown:
            raise ProblemError(f"unknown parameter {unknown[0]!r} in tangents", expected=", ".join(declared))
        samples, directions = self.binding.samples, []
        for block in self.program.parameters:  # declared ones, then captured tensors
            flat = np.zeros((samples, block.size))
            if block.name in declared and block.name in tangents:
                where = f"tangent of {block.name!r}"
                tensor = as_tensor(where, tangents[block.name]).detach().to("cpu", torch.float64)
                flat = self._expand(where, tensor, block.shape)
            directions.append(torch.from_numpy(flat))
        self._check()
        dz = scale_rows(directional(self.operation, directions)[0], self.outputs.gradient_scale)
        return self.program.variables.split(self.binding.give_back(dz, self.program.variables.size))

    def jacobian(self, of: str | None = None, wrt: str | None = None) -> torch.Tensor:
        """The derivative of one output with respect to one parameter, sample by sample.

        Args:
            of: A key as in ``vjp``; by default the only variable.
            wrt: A declared parameter; by default the only one.

        Returns:
            (*batch, *shape of the output, *shape of the parameter).
        """
        of = of or _only("variable", self.program.problem.variables)
        wrt = wrt or _only("parameter", self.program.problem.parameters)
        if wrt not in self.program.problem.parameters:
            raise ProblemError(
                f"unknown parameter {wrt!r}", expected=", ".join(self.program.problem.parameters)
            )
        shape = self._shape_of(of)
        size, samples = math.prod(shape), self.binding.samples
        index = list(self.program.problem.parameters).index(wrt)
        self._check()
        rows = []
        for i in range(size):
            unit = torch.zeros(samples, size, dtype=torch.float64)
            unit[:, i] = 1.0
            rows.append(self._vjp({of: unit})[index])
        parameter = self.program.problem.parameters[wrt]
        stacked = torch.stack(rows, dim=1) if rows else torch.zeros(samples, 0, math.prod(parameter))
        return self.binding.give_back(stacked, *shape, *parameter)

    def _check(self) -> None:
        check_derivative(self.operation.policy, self.operation.established())

    def _vjp(self, flat: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """(B, size) by key -> gradients by block, (B, size); of failed samples as the policy says."""
        envelope = set(flat) <= {"objective"}
        return vjp(self.operation, self.blocks, self.outputs, self._cotangents(flat), envelope)

    def _shape_of(self, key: str) -> tuple[int, ...]:
        if key == "objective":
            return ()
        kind, _, name = key.rpartition(".")
        layout = self._layouts.get(kind)
        if layout is None or name not in layout.by_name:
            raise ProblemError(
                f"unknown output {key!r}",
                expected="a variable, 'objective', 'equality.NAME', 'inequality.NAME', 'lower.VARIABLE' or "
                "'upper.VARIABLE'",
            )
        return layout.by_name[name].shape

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        variables = self.program.variables
        return {
            "": variables,
            "equality": self.program.equality,
            "inequality": self.program.inequality,
            "lower": variables,
            "upper": variables,
        }

    def _flat_cotangent(self, key: str, value: torch.Tensor) -> torch.Tensor:
        tensor = as_tensor(f"cotangent of {key!r}", value).detach().to("cpu", torch.float64)
        return torch.from_numpy(self._expand(f"cotangent of {key!r}", tensor, self._shape_of(key)))

    def _expand(self, where: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> Array:
        try:
            whole = tensor.expand((*self.binding.batch, *shape))
        except RuntimeError as error:
            expected = f"a tensor that broadcasts to {(*self.binding.batch, *shape)}"
            raise ProblemError(
                f"{where} has the wrong shape", expected=expected, got=str(tuple(tensor.shape))
            ) from error
        flat: Array = whole.reshape(self.binding.samples, math.prod(shape)).numpy()
        return flat

    def _cotangents(self, flat: Mapping[str, torch.Tensor]) -> Cotangents:
        """(B, size) by key -> one cotangent of everything."""
        samples, n = self.binding.samples, self.program.variables.size
        equalities = self.program.equality.size
        widths = {"z": n, "y": self.program.smooth.rows, "lower": n, "upper": n}
        zeros = {name: torch.zeros(samples, width, dtype=torch.float64) for name, width in widths.items()}
        v = Cotangents(**zeros, objective=torch.zeros(samples, dtype=torch.float64))
        targets = {
            "": v.z,
            "equality": v.y[:, :equalities],
            "inequality": v.y[:, equalities : self.program.constraints],
            "lower": v.lower,
            "upper": v.upper,
        }
        for key, value in flat.items():
            if key == "objective":
                v.objective.copy_(value.reshape(samples))
                continue
            kind, _, name = key.rpartition(".")
            block = self._layouts[kind].by_name[name]
            targets[kind][:, block.start : block.stop] = value
        return v


@dataclass
class _Found:
    """A given point, examined: what ``Search`` is to ``solve``."""

    program: Program
    policy: Policy
    dtype: torch.dtype
    point: Array  # (B, n)
    dual: DualSolution | None
    verified: Any = None
    distance: Any = None

    @np.errstate(all="ignore")  # the given point may be anything; it is judged, not computed with
    def examine(self, blocks: tuple[Array, ...]) -> Verified:
        """Verify and polish the point for these parameters."""
        program = self.program
        check_finite(program, blocks)
        samples = max((len(b) for b in blocks if b.ndim == 2), default=len(self.point))
        z = np.tile(self.point, (samples // max(len(self.point), 1), 1))
        bound = Bound.of(program, blocks, samples)
        given = None if self.dual is None else _with_dual(program, bound, z, self.dual)

        def start(some: Index, nearly: float) -> PrimalDual:
            if given is None:
                return least_squares_multipliers(program, bound.take(some), z[some], nearly)
            return with_kink_forces(program, bound.take(some), given.take(some), nearly)

        verified = verify_from(program, bound, start, self.policy, self.dtype, minimum=False)
        moved = np.abs(verified.evaluation.point.z - z).max(axis=1, initial=0.0)
        far = moved > _DISTANCE * self.policy.accuracy * np.maximum(1.0, np.abs(z).max(axis=1, initial=0.0))
        status, reasons = list(verified.status), list(verified.reasons)
        for i in np.flatnonzero(far & verified.optimal):
            status[i] = Status.NOT_A_KKT_POINT
            reasons[i] = f"the nearest KKT point is {moved[i]:.1e} away"
        self.verified = replace(verified, status=tuple(status), reasons=tuple(reasons))
        self.distance = moved
        return self.verified

    def given(self) -> Evaluation:
        """At the point itself, with the multipliers of its polish."""
        there = self.verified.evaluation
        return Evaluation.at(there.program, there.bound, replace(there.point, z=self.point))

    @property
    def status(self) -> tuple[Status, ...]:
        return tuple(self.verified.status)

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(self.verified.reasons)


def _given(
    problem: Problem, parameters: Mapping[str, Any] | None, primal: Any
) -> tuple[Program, Binding, Array]:
    program = compile_program(problem)
    if primal is None:
        raise ProblemError("primal is missing", expected="a point by variable")
    tensors, batch = initial_batch(program.variables, primal, "primal")
    missing = [name for name in problem.variables if name not in tensors]
    if missing:
        raise ProblemError(f"primal has no variable {missing[0]!r}", expected=", ".join(problem.variables))
    binding = bind(program, parameters, program.graph.read_captures(None), tensors, batch)
    return program, binding, flat_point(program.variables, tensors, binding.batch)


def _with_dual(program: Program, bound: Bound, z: Array, dual: DualSolution) -> PrimalDual:
    def flat(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Array:
        return flat_batch(layout, tensors, len(z))

    equality, inequality = flat(program.equality, dual.equality), flat(program.inequality, dual.inequality)
    point = PrimalDual.resting(program, bound.parameters, z)
    point.y[:, : program.constraints] = np.concatenate([equality, inequality], axis=1)
    sides = {"lower": flat(program.variables, dual.lower), "upper": flat(program.variables, dual.upper)}
    return replace(point, **sides)


def _with_gradient_of(tensor: torch.Tensor, values: Array) -> torch.Tensor:
    return tensor + (torch.from_numpy(values) - tensor).detach()


def _report(found: _Found, policy: Policy) -> None:
    wrong = [
        (i, r)
        for i, (s, r) in enumerate(zip(found.status, found.reasons, strict=True))
        if s is not Status.OPTIMAL
    ]
    if not wrong or policy.on_failure in ("nan", "mask"):
        return
    samples = ", ".join(f"sample {i}: {reason}" for i, reason in wrong[:5])
    message = f"the given point is not a KKT point to accuracy {policy.accuracy:.0e}: {samples}"
    if policy.on_failure == "warn":
        warn_caller(message, ConvergenceWarning)
    else:
        raise SensitivityError(message)


def _check_by_name(what: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ProblemError(f"{what} are no dict", expected="a dict of tensors by name", got=repr(given))


def _only(what: str, names: Mapping[str, Any]) -> str:
    if len(names) != 1:
        raise ProblemError(f"several {what}s: name one", expected=", ".join(names))
    return next(iter(names))
