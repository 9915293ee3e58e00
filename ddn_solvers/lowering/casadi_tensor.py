"""Tensors as CasADi columns, and the table of rules that lower torch operations onto them.

A tensor of any shape is one dense column, its entries in row-major order. So a row-major m x n matrix A
held as column v is ``reshape(v, n, m).T`` (CasADi is column-major), and moving data around is one
indexing of the column. A rule is a function ``rule(call, *args, **kwargs)`` that receives what the torch
operation received, with ``Tensor`` where a value depends on a symbol and ``torch.Tensor`` where it is a
constant, and returns the column of the result: one for each output, ``None`` for an output that has no
value (indices of a maximum), or a ``torch.Tensor`` where the result turns out to be constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import casadi as ca
import torch

from ddn_solvers.errors import TraceError

Shape = tuple[int, ...]
Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)

RULES: dict[str, Rule] = {}


class UnsupportedOperation(TraceError):
    """An operation that cannot be lowered.

    Attributes:
        operation: Its name in torch.
        source: The line that calls it, or an empty string.
    """

    def __init__(self, operation: str, source: str, reason: str) -> None:
        self.operation, self.source = operation, source
        super().__init__(f"`{operation}` {f'in {source} ' if source else ''}{reason}")


@dataclass(frozen=True)
class KinkExpression:
    """Where an operation is not differentiable.

    Attributes:
        residual: Column (``casadi.MX``); an element is zero exactly where there is a kink.
        operation: Name in torch, as in ``"relu"``.
        source: The line that calls it, or an empty string.
    """

    residual: Any
    operation: str
    source: str


@dataclass(frozen=True)
class Tensor:
    """A value that depends on a symbol: a dense row-major column and its shape."""

    column: Any  # ca.MX, (size, 1)
    shape: Shape
    dtype: torch.dtype = torch.float64
    varies: bool = False  # depends on an optimization variable, not on parameters alone

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """One operation on its way through the table: what a rule may ask about it."""

    op: Any  # torch._ops.OpOverload
    operation: str  # what the user called; differs from ``op`` inside a decomposition
    source: str
    output: torch.Tensor  # fake: shape and dtype of the (first) result
    varies: bool
    kinks: list[KinkExpression]

    @property
    def shape(self) -> Shape:
        return tuple(self.output.shape)

    def columns(self, *operands: Any) -> list[Any]:
        """The operands, broadcast to the shape of the result."""
        return [broadcast(operand, self.shape) for operand in operands]

    def kink(self, residual: Any) -> None:
        """Record that the operation is not differentiable where an entry of ``residual`` is zero.

        A residual that is constant, as that of ``x != x``, is crossed nowhere.
        """
        if self.varies and residual.numel() and not residual.is_constant():
            self.kinks.append(KinkExpression(ca.densify(ca.vec(residual)), self.operation, self.source))

    def refusal(self, reason: str) -> UnsupportedOperation:
        return UnsupportedOperation(self.operation, self.source, reason)


def lowers(*names: str) -> Callable[[R], R]:
    """Register a rule for operations, as ``"name"`` or, for one overload, ``"name.overload"``."""

    def register(rule: R) -> R:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def elementwise(*names: str) -> Callable[[R], R]:
    """Register a smooth function of columns that have been broadcast against each other."""

    def register(function: R) -> R:
        def rule(call: Call, *operands: Any, **options: Any) -> Any:
            return function(*call.columns(*operands), **options)

        lowers(*names)(rule)
        return function

    return register


def rule_for(op: Any) -> Rule | None:
    """The rule for an ``OpOverload``, or ``None``."""
    if getattr(op, "namespace", None) != "aten":
        return None
    name = op._schema.name.removeprefix("aten::")
    return RULES.get(f"{name}.{op._overloadname}") or RULES.get(name)


def constant(tensor: torch.Tensor) -> Any:
    """A constant tensor as a dense column."""
    return ca.MX(ca.DM(tensor.detach().to(torch.float64).reshape(-1).numpy()))


def column(operand: Any) -> Any:
    """The column of a tensor; a number stays one."""
    if isinstance(operand, Tensor):
        return operand.column
    return constant(operand) if isinstance(operand, torch.Tensor) else operand


def broadcast(operand: Any, shape: Shape) -> Any:
    """The column of ``operand`` expanded to ``shape``; numbers and single constants stay as they are.

    A symbol is never left to CasADi to repeat: ``jacobian`` of a column plus a scalar loses terms where
    it takes several adjoint directions at once (CasADi 3.8.2).
    """
    if not isinstance(operand, Tensor | torch.Tensor):
        return operand
    size = math.prod(operand.shape)
    if size == math.prod(shape):
        return column(operand)
    if isinstance(operand, torch.Tensor):
        return constant(operand if size == 1 else operand.expand(shape))
    return gather(operand.column, torch.arange(size).reshape(operand.shape).expand(shape))


def gather(source: Any, index: torch.Tensor) -> Any:
    """Entries of a column, ``index`` in row-major order; -1 stands for a structural zero."""
    flat = index.reshape(-1)
    count, size = flat.numel(), source.numel()
    if count == 0:
        return ca.MX(0, 1)
    if size == 1 and count > 1 and not flat.any():  # a list of indices into a scalar would give a row
        return ca.repmat(source, count, 1)
    first = int(flat[0])
    if first >= 0 and torch.equal(flat, torch.arange(first, first + count)):
        return source if count == size else source[first : first + count]
    if int(flat.min()) < 0:
        source = ca.vertcat(source, 0)
        flat = torch.where(flat < 0, size, flat)
    return source[flat.tolist()]


def matrix(operand: Any, rows: int, columns: int, *, transpose: bool = False) -> Any:
    """A row-major column as a CasADi matrix; zeros of a constant become structural."""
    if isinstance(operand, torch.Tensor):
        dense = ca.DM(operand.detach().to(torch.float64).reshape(rows, columns).numpy())
        dense = ca.sparsify(dense)
        return ca.MX(dense.T if transpose else dense)
    across = ca.reshape(column(operand), columns, rows)
    return across if transpose else across.T


def row_major(value: Any) -> Any:
    """A CasADi matrix as a row-major column."""
    return ca.densify(ca.vec(value.T))


def concatenate(columns: Sequence[Any]) -> Any:
    """Columns laid end to end."""
    return columns[0] if len(columns) == 1 else ca.vertcat(*columns)
