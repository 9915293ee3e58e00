"""Nodes whose solution and derivative have a closed form, as one differentiable operation.

    y = argmin_u f(u, x),     v -> v^T Dy  and  t -> Dy t  written out

The vjp and jvp are written in differentiable operations of inputs, solution and cotangent, and the solution is
an output of this same operation: differentiating the backward runs through it again, to any order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddn_solvers.errors import ProblemError
from ddn_solvers.transforms import (
    is_transformed,
    one_by_one,
    refuse_batched_tangents,
    refuse_nested_forward_mode,
)
from ddn_solvers.uncompiled import uncompiled

Tensors = Sequence[torch.Tensor]


class Rule(ABC):
    """How a node is solved and differentiated; all inputs and the solution have the same number of batch dimensions.

    Batch dimensions come first and broadcast; a rule treats each instance by itself.
    """

    @abstractmethod
    def solve(self, *inputs: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients by those inputs that are needed, each of the shape of its input."""

    def final_vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """``vjp`` where nothing is differentiated further and tensors are plain: it may work in place."""
        return self.vjp(inputs, y, cotangent, needed)

    @abstractmethod
    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The tangent of the solution; an input without tangent is constant."""


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(rule: Rule, *inputs: torch.Tensor) -> torch.Tensor:
        # Forward mode asks for tangents of the same layout, and of a view that its base has one too.
        return rule.solve(*inputs).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.rule = inputs[0]
        ctx.save_for_backward(*inputs[1:], output)
        ctx.save_for_forward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, y = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        wanted = [i for i, need in enumerate(needed) if need]

        def gradients(v: torch.Tensor) -> list[torch.Tensor]:
            further = torch.is_grad_enabled() or any(map(is_transformed, (*inputs, v)))
            if further:
                refuse_batched_tangents((*inputs, y, v))
            found = (ctx.rule.vjp if further else ctx.rule.final_vjp)(inputs, y, v, needed)
            return [found[i] for i in wanted]

        found = dict(zip(wanted, one_by_one(gradients, [cotangent]), strict=True))
        return (None, *(found.get(i) for i in range(len(inputs))))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> torch.Tensor:
        *inputs, y = ctx.saved_tensors
        refuse_nested_forward_mode()
        given = {i: tangent for i, tangent in enumerate(tangents) if tangent is not None}

        def change(*directions: torch.Tensor) -> list[torch.Tensor]:
            known = dict(zip(given, directions, strict=True))
            return [ctx.rule.jvp(inputs, y, [known.get(i) for i in range(len(inputs))]).contiguous()]

        return one_by_one(change, list(given.values()))[0]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], rule: Rule, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        size = info.batch_size
        moved = (
            x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(inputs, in_dims[1:], strict=True)
        )
        return _Node.apply(rule, *moved), 0  # type: ignore[no-untyped-call]  # torch leaves it untyped


class _Required(Rule):
    """The identity, on a condition that has to hold: checked where its values are plain."""

    def __init__(self, error: ProblemError) -> None:
        self.error = error

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        (condition,) = inputs
        if not condition.all():
            raise self.error
        return condition.clone()

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        return (cotangent,)

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        return torch.zeros_like(y)


def require(condition: torch.Tensor, error: ProblemError) -> None:
    """Raise where a condition on values does not hold everywhere, under ``torch.func`` too."""
    apply(_Required(error), condition)


def positive(name: str, value: float | torch.Tensor) -> float | torch.Tensor:
    """The value itself, a number or a tensor.

    Raises:
        ProblemError: It is not positive and finite.
    """
    if isinstance(value, torch.Tensor):
        require((value > 0) & (value < math.inf), ProblemError(name, expected="positive finite entries"))
    elif not 0 < value < math.inf:
        raise ProblemError(name, expected="a positive finite number", got=value)
    return value


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that a node computes in: float32 for half precision, else that of x.

    Raises:
        ProblemError: ``x`` is not real floating point.
    """
    if not x.is_floating_point():
        raise ProblemError(f"x is {x.dtype}", expected="a real floating-point tensor", fix="Convert it.")
    return torch.promote_types(x.dtype, torch.float32)


@uncompiled
def apply(rule: Rule, *inputs: torch.Tensor) -> torch.Tensor:
    """The solution, differentiable in every input, under ``torch.func`` too."""
    return _Node.apply(rule, *inputs)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def times(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x of matrices (..., m, n) and vectors (..., n), batches broadcast; one product where A is the same for all."""
    return (x.unsqueeze(-2) @ A.mT).squeeze(-2)


def keep(module: nn.Module, **settings: float | torch.Tensor | None) -> None:
    """Set attributes of a module, plain tensors as buffers."""
    for name, value in settings.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)
