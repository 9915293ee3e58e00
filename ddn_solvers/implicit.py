"""The autograd front: a solve as one differentiable operation.

``Implicit`` returns point, multipliers and optimal value. Its backward is written in differentiable
operations of parameters, point, multipliers and cotangent; since point and multipliers are outputs of
this same operation, differentiating the backward runs through it again, to any order. Where no graph
of the backward is asked for, the compiled functions serve instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet
from ddn_solvers.arrays import Array, Index, Mask
from ddn_solvers.errors import DegeneracyWarning, SensitivityError, warn_caller
from ddn_solvers.kkt.conditions import Cotangents, Multipliers
from ddn_solvers.kkt.derivative import Linearisation, TorchLinearisation, scale_rows
from ddn_solvers.kkt.verify import Verified, on_chosen_pieces
from ddn_solvers.policy import Policy
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual
from ddn_solvers.solution import Status
from ddn_solvers.threads import Threads, limited
from ddn_solvers.transforms import (
    is_transformed,
    one_by_one,
    refuse_batched_tangents,
    refuse_nested_forward_mode,
    untransformed,
)


class Outputs(NamedTuple):
    """What the operation returns; what follows the objective is not differentiable."""

    z: torch.Tensor  # (B, n)
    y: torch.Tensor  # (B, m), kinks included
    lower: torch.Tensor  # (B, n)
    upper: torch.Tensor  # (B, n)
    objective: torch.Tensor  # (B,)
    pieces: torch.Tensor  # (B, k), see PrimalDual
    sides: torch.Tensor  # (B, q + k + 2n) bool, see ActiveSet
    weak: torch.Tensor  # (B, q + k + 2n) bool, those that can be dropped
    singular: torch.Tensor  # (B, 2) bool: with and without the weakly active rows
    gradient_scale: torch.Tensor  # (B,): 1; 0 for masked and NaN for failed samples
    converged: torch.Tensor  # (B,) bool
    residuals: torch.Tensor  # (B, 3): stationarity, feasibility, complementarity, unscaled


_DIFFERENTIABLE = 5


@dataclass
class Operation:
    """One call: how to find the point, and what the derivative needs to know.

    Attributes:
        program: The compiled problem.
        policy: For degenerate derivatives.
        find: Parameter blocks, (B, size) or shared (size,), to verified points.
        threads: How many torch may take for it.
        verified: Set by ``run``: what was established about the points, as the policy wants them differentiated.
        failed: Set by ``run``: some sample has no derivative (masked or NaN).
        any_singular: Set by ``run``: some KKT matrix is singular, with or without weakly active rows.
    """

    program: Program
    policy: Policy
    find: Callable[[tuple[Array, ...]], Verified]
    threads: Threads = "auto"
    verified: Verified | None = None
    failed: bool = False
    any_singular: bool = False
    _linearisation: Linearisation | None = None

    @classmethod
    def resumed(
        cls,
        program: Program,
        policy: Policy,
        threads: Threads,
        blocks: Sequence[torch.Tensor],
        outputs: Outputs,
    ) -> Operation:
        """The operation that returned ``outputs`` for ``blocks``, with what its backward needs to know."""
        at = {name: tensor.numpy() for name, tensor in outputs._asdict().items()}
        # Of failed samples, which may be NaN, nothing is used.
        point = PrimalDual(*(np.nan_to_num(at[name]) for name in ("z", "y", "lower", "upper", "pieces")))
        parameters = tuple(block.numpy() for block in blocks)
        evaluation = Evaluation.at(program, Bound.of(program, parameters, len(point.z)), point)
        unknown = np.full(len(point.z), np.nan)
        active = ActiveSet(at["sides"], at["weak"], unknown, program.equality.size, program.variables.size)
        status = tuple(Status.OPTIMAL if good else Status.NOT_A_KKT_POINT for good in at["converged"])
        verified = Verified(evaluation, active, at["singular"][:, 0], unknown, status, ("",) * len(status))
        return cls(program, policy, _not_again, threads, verified)

    def run(self, blocks: Sequence[torch.Tensor]) -> Outputs:
        """Find the points; see ``Outputs``."""
        with self.limited():
            return outputs_of(self, self.find(tuple(block.detach().numpy() for block in blocks)))

    def limited(self) -> AbstractContextManager[None]:
        """Within it torch has as many ``threads``."""
        return limited(self.threads, self.program.variables.size + self.program.constraints)

    def established(self) -> Verified:
        """``verified``, after ``run``."""
        assert self.verified is not None
        return self.verified

    def depends_on_direction(self) -> bool:
        """Whether forward mode has to ask for directional derivatives: some sample has no linear one."""
        verified = self.established()
        if verified.one_sided or not verified.degenerate:
            return verified.one_sided
        with untransformed():
            return bool(self.linearisation(self.good).directional.any())

    @property
    def good(self) -> Index:
        """Samples that have a derivative."""
        verified = self.established()
        return np.flatnonzero(verified.optimal) if self.failed else np.arange(len(verified.status))

    def linearisation(self, good: Index) -> Linearisation:
        """The KKT systems of the samples ``good`` of the batch that ``find`` returned, factored once."""
        if self._linearisation is None:
            verified = self.established()
            self._linearisation = Linearisation(
                verified.evaluation.take(good),
                verified.active.take(good),
                verified.singular[good],
                self.policy,
                verified.system if len(good) == len(verified.status) else None,
            )
        return self._linearisation


def _not_again(_: tuple[Array, ...]) -> Verified:
    raise AssertionError("the point is known")


def check_derivative(policy: Policy, verified: Verified) -> None:
    """Apply the policy to a derivative that is about to be computed at verified points.

    Raises:
        SensitivityError: The policy refuses it.
    """
    if verified.one_sided and policy.weakly_active == "raise" and not policy.smoothing:
        raise SensitivityError(
            "a constraint is weakly active (neither slack nor multiplier), so the derivative is one-sided. "
            "See solution.certificate, or choose policy.weakly_active."
        )
    if verified.degenerate and policy.on_singular == "raise":
        raise SensitivityError(
            "the KKT matrix is singular, so the derivative is not unique. "
            "See solution.certificate, or choose policy.on_singular."
        )
    if verified.degenerate and policy.on_singular == "least_squares":
        warn_caller(
            "the KKT matrix is singular at the solution of some sample: the minimum-norm derivative is "
            "returned. solution.certificate says more; policy.on_singular chooses.",
            DegeneracyWarning,
        )


def to_differentiate(verified: Verified, policy: Policy) -> Verified:
    """Verified points as the policy wants them differentiated: on which pieces, smoothed or not."""
    verified = on_chosen_pieces(verified, policy)
    if not policy.smoothing:
        return verified
    good, singular = np.flatnonzero(verified.optimal), np.zeros_like(verified.singular)
    here = Linearisation(verified.evaluation.take(good), verified.active.take(good), singular[good], policy)
    singular[good] = here.singular_smoothed
    return replace(verified, singular=singular, system=None)


def outputs_of(operation: Operation, verified: Verified) -> Outputs:
    """A verified batch as the operation's outputs; failed samples as ``policy.on_failure`` says."""
    operation.verified = verified = to_differentiate(verified, operation.policy)
    converged, on_failure = verified.optimal, operation.policy.on_failure
    evaluation, active = verified.evaluation, verified.active
    point = evaluation.point
    arrays = [a.copy() for a in (point.z, point.y, point.lower, point.upper, evaluation.first.objective)]
    scale = np.ones(len(point.z))
    if on_failure in ("mask", "closest"):
        scale[~converged] = 0.0
        operation.failed = not converged.all()
    if on_failure == "nan":
        scale[~converged] = np.nan
        operation.failed = not converged.all()
        for array in arrays:
            array[~converged] = np.nan
    norms = np.stack(evaluation.norms, axis=1)
    singular = np.stack([verified.singular, _singular_without_weak(operation, verified)], axis=1)
    dropped = active.droppable(evaluation.program.numbers)
    rest = [point.pieces, active.sides, dropped, singular, scale, converged, norms]
    return Outputs(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (*arrays, *rest)))


def _singular_without_weak(operation: Operation, verified: Verified) -> Mask:
    """Singular samples of the system without the weakly active rows, where the policy asks for it, (B,)."""
    singular = verified.singular.copy()
    weak = np.flatnonzero(verified.active.weak.any(axis=1) & verified.optimal)
    if weak.size and operation.policy.weakly_active in ("inactive", "mean"):
        here = Linearisation(
            verified.evaluation.take(weak), verified.active.take(weak), singular[weak], operation.policy
        )
        singular[weak] = here.singular_without_weak
    operation.any_singular = bool(singular.any() or verified.singular.any())
    return singular


def apply(operation: Operation, blocks: Sequence[torch.Tensor]) -> Outputs:
    """Run the operation on float64 CPU blocks, (B, size) or shared (size,)."""
    return Outputs(*_Implicit.apply(operation, *blocks))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(operation: Operation, *blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(operation.run(blocks))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        operation, *blocks = inputs
        ctx.operation, ctx.blocks = operation, len(blocks)
        ctx.mark_non_differentiable(*output[_DIFFERENTIABLE:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*blocks, *output)
        ctx.save_for_forward(*blocks, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        operation: Operation = ctx.operation
        saved = ctx.saved_tensors  # once: checkpointing unpacks them one time
        blocks, outputs = saved[: ctx.blocks], Outputs(*saved[ctx.blocks :])
        if all(c is None for c in cotangents[:_DIFFERENTIABLE]):
            return (None,) * (1 + ctx.blocks)
        check_derivative(operation.policy, operation.established())
        envelope = all(c is None for c in cotangents[: _DIFFERENTIABLE - 1])
        full = [
            torch.zeros_like(output) if c is None else c.to(output.dtype)
            for c, output in zip(cotangents[:_DIFFERENTIABLE], outputs, strict=False)
        ]

        def gradients(*v: torch.Tensor) -> list[torch.Tensor]:
            with operation.limited():
                if torch.is_grad_enabled() or any(map(is_transformed, (*blocks, *v))):
                    refuse_batched_tangents((*blocks, *outputs[:_DIFFERENTIABLE], *v))
                    linearisation = _torch_linearisation(operation, blocks, outputs)
                    return linearisation.vjp(Cotangents(*v), outputs.gradient_scale, envelope)
                return vjp(operation, blocks, outputs, Cotangents(*v), envelope)

        return None, *one_by_one(gradients, full)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        operation: Operation = ctx.operation
        saved = ctx.saved_tensors  # once: checkpointing unpacks them one time
        blocks, outputs = saved[: ctx.blocks], Outputs(*saved[ctx.blocks :])
        check_derivative(operation.policy, operation.established())
        refuse_nested_forward_mode()
        full = [torch.zeros_like(b) if t is None else t for t, b in zip(tangents, blocks, strict=True)]

        def changes(*full: torch.Tensor) -> list[torch.Tensor]:
            with operation.limited():
                if operation.depends_on_direction():
                    found = _Directional.apply(operation, *full)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                else:
                    found = _torch_linearisation(operation, blocks, outputs).jvp(full)
            return [scale_rows(change, outputs.gradient_scale) for change in found]

        return (*one_by_one(changes, full), *(None,) * (len(outputs) - _DIFFERENTIABLE))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], operation: Operation, *blocks: torch.Tensor) -> Any:
        return _mapped(_Implicit, info.batch_size, in_dims, operation, blocks)


def directional(operation: Operation, tangents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Tangents of blocks, (B, size) or shared (size,) -> tangents of the outputs; zero of samples that have none."""
    samples, good = len(operation.established().status), operation.good
    rows = max((len(t) for t in tangents if t.dim() == 2), default=samples)
    # Under vmap there may be several tangents a sample, one after the other for the whole batch.
    index = np.concatenate([good + start for start in range(0, rows, samples)])
    linearisation = operation.linearisation(good)
    if len(index) != len(good):
        at = np.tile(np.arange(len(good)), rows // samples)
        linearisation = Linearisation(
            linearisation.evaluation.take(at),
            linearisation.active.take(at),
            linearisation.singular[at],
            operation.policy,
        )
    picked = [t.numpy() if t.dim() == 1 else t.numpy()[index] for t in tangents]
    changes = []
    for part in linearisation.jvp(picked):
        whole = part.new_zeros((rows, *part.shape[1:]))
        whole[index] = part
        changes.append(whole)
    return tuple(changes)


class _Directional(torch.autograd.Function):
    """Tangents of blocks, (B, size) or shared (size,) -> tangents of the outputs; not linear, so not differentiable."""

    @staticmethod
    def forward(operation: Operation, *tangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return directional(operation, tangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Nothing is kept: see ``backward``."""

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise SensitivityError(
            "a directional derivative at a weakly active constraint is not linear in its tangent and has no "
            "derivative; see solution.certificate"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], operation: Operation, *tangents: torch.Tensor) -> Any:
        return _mapped(_Directional, info.batch_size, in_dims, operation, tangents)


def _mapped(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[Any, ...],
    operation: Operation,
    blocks: Sequence[torch.Tensor],
) -> Any:
    """vmap of an operation on blocks: the mapped dimension becomes part of its own batch."""
    moved = [b if d is None else b.movedim(d, 0) for b, d in zip(blocks, in_dims[1:], strict=True)]
    mapped = [d is not None for d in in_dims[1:]]
    inner = max((b.shape[-2] for b, d in zip(moved, mapped, strict=True) if b.dim() - d == 2), default=None)
    flat = [_flatten(b, d, size, inner) for b, d in zip(moved, mapped, strict=True)]
    outputs = function.apply(operation, *flat)
    batch = 1 if inner is None else inner
    return tuple(o.reshape(size, batch, *o.shape[1:]) for o in outputs), (0,) * len(outputs)


def _flatten(block: torch.Tensor, mapped: bool, size: int, inner: int | None) -> torch.Tensor:
    """One batch dimension out of the mapped one and the operation's own (``inner``)."""
    batched = block.dim() - mapped == 2
    if not mapped and not batched:
        return block
    if not mapped:
        block = block.expand(size, *block.shape)
    elif not batched and inner is not None:
        block = block.unsqueeze(1).expand(size, inner, block.shape[-1])
    return block.reshape(-1, block.shape[-1])


def vjp(
    operation: Operation,
    blocks: Sequence[torch.Tensor],
    outputs: Outputs,
    v: Cotangents,
    envelope: bool = False,
) -> list[torch.Tensor]:
    """Gradients by block out of compiled functions; masked samples get zero, failed ones NaN."""
    scale = outputs.gradient_scale.numpy()
    good = np.flatnonzero(scale == 1)
    linearisation = operation.linearisation(good)
    if len(good) == len(scale):
        return [torch.from_numpy(gradient) for gradient in linearisation.vjp(v, envelope)]
    picked = Cotangents(*(getattr(v, name)[good] for name in ("z", "y", "lower", "upper", "objective")))
    results = []
    for gradient, block in zip(linearisation.vjp(picked, envelope), blocks, strict=True):
        if block.dim() == 1:
            failed = 0.0 if np.isfinite(scale).all() else np.nan
            results.append(torch.from_numpy(gradient + failed))
        else:
            whole = np.repeat(scale[:, None], block.shape[1], axis=1)
            whole[good] = gradient
            results.append(torch.from_numpy(whole))
    return results


def _torch_linearisation(
    operation: Operation, blocks: Sequence[torch.Tensor], outputs: Outputs
) -> TorchLinearisation:
    if operation.failed:
        blocks, outputs = _without_failures(blocks, outputs)
    return TorchLinearisation(
        operation.program,
        blocks,
        outputs.z,
        Multipliers(outputs.y, outputs.lower, outputs.upper),
        outputs.pieces,
        outputs.sides,
        outputs.weak,
        outputs.singular,
        operation.any_singular,
        operation.policy,
    )


def _without_failures(
    blocks: Sequence[torch.Tensor], outputs: Outputs
) -> tuple[Sequence[torch.Tensor], Outputs]:
    """A good sample in place of each failed one: what is not finite there must not enter a sum, even times 0."""
    good = outputs.gradient_scale == 1
    stand_in = good.to(torch.int64).argmax().unsqueeze(0)

    def replaced(values: torch.Tensor) -> torch.Tensor:
        shaped = good.reshape(-1, *[1] * (values.dim() - 1))
        return torch.where(shaped, values, values.index_select(0, stand_in))

    kept = {
        name: replaced(getattr(outputs, name))
        for name in ("z", "y", "lower", "upper", "pieces", "sides", "weak", "singular")
    }
    return [replaced(b) if b.dim() == 2 else b for b in blocks], outputs._replace(**kept)
