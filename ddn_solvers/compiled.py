"""The compiled-graph front: a layer under ``torch.compile``, as two opaque operators over the eager core.

Dynamo cannot look into a solve, and it refuses an ``autograd.Function`` with a jvp. So what it traces is

    blocks   = bind(parameters, captured tensors)          torch operations
    outputs  = ddn_solvers::solve(layer, blocks)           the search and its verification, as in eager
    solution = give_back(outputs.z)                        torch operations

and the derivative of the middle line is ``ddn_solvers::adjoint(outputs, blocks, v)``. Both operators are
functions of their tensors, as compilers assume: what goes from one to the other is the eager operation's
``Outputs``, which determine its backward, and ``adjoint`` factors the KKT systems of that very point. Nothing
is solved again, and nothing is kept on the side that could be stale, or gone, when a graph packs, moves or
recomputes what it saved for backward.

What a graph cannot hold, it names by number. The layer's number is a tensor, so that it is an input of the
graph and all copies of a model share their compiled code. ``solve`` also returns the number of the ``Rule``,
program and policy, by which the point is to be differentiated: captured constants and the layer's policy may
be others by the time of the backward.

Compiled is first order. In eager these operators are never called: there ``torch.func.grad`` fails on them
and ``torch.func.jvp`` returns zeros without a word.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ddn_solvers.binding import Binding, bind
from ddn_solvers.errors import SensitivityError
from ddn_solvers.implicit import Operation, Outputs, check_derivative, vjp
from ddn_solvers.kkt.conditions import Cotangents
from ddn_solvers.policy import Policy, as_policy
from ddn_solvers.problem import Problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.search import Search
from ddn_solvers.solve import Solver, as_options, conclude, routes, warn_if_callbacks

_MAX_RULES = 16  # programs and policies a layer remembers for backward passes that are still to come


class Layer(Protocol):
    """What is needed of a ``DeclarativeLayer``."""

    problem: Problem
    solver: Solver
    options: Mapping[str, Any] | None
    policy: Policy | None
    _front: Front

    def _own_captures(self) -> dict[str, Any]: ...


# -- what a graph refers to by number -----------------------------------------------------------------


_NUMBERED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_LOCK = threading.Lock()


def _numbered(value: Any) -> torch.Tensor:
    """A number for ``value``, good while somebody holds it."""
    number = next(_NUMBERS)
    _NUMBERED[number] = value
    return torch.tensor(number)


@dataclass(eq=False)
class Rule:
    """By what a point is differentiated."""

    program: Program
    policy: Policy

    def __post_init__(self) -> None:
        self.number = _numbered(self)


class Front:
    """A layer as compiled code sees it: its number, and the program whose shapes are traced.

    Attributes:
        number: () int64.
        sizes: n variables, m rows of c, kinks, and sides of the active set: the widths of ``Outputs``.
        anchors: Names under which the layer holds what the program's functions capture.
    """

    def __init__(self, layer: Layer, program: Program) -> None:
        self.layer, self.program = weakref.ref(layer), program
        n, m = program.variables.size, program.smooth.rows
        self.sizes = (n, m, m - program.constraints, m - program.equality.size + 2 * n)
        self.anchors = tuple({a.anchor: None for a in program.graph.captures if a.anchor is not None})
        self.number = _numbered(self)
        self._rules: list[Rule] = []

    def rule(self, program: Program, policy: Policy) -> Rule:
        """The one rule of this program and policy; the layer remembers the last few."""
        with _LOCK:
            for rule in self._rules:
                if rule.program is program and rule.policy == policy:
                    break
            else:
                rule = Rule(program, policy)
            self._rules = [*(r for r in self._rules if r is not rule), rule][-_MAX_RULES:]
            return rule


# -- what Dynamo traces -------------------------------------------------------------------------------


def forward(layer: Layer, parameters: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The variables of the layer's solution, out of operations that a graph can hold."""
    front = layer._front
    program = front.program
    own = {name: getattr(layer, name) for name in front.anchors}
    captured = [accessor.read(own) for accessor in program.graph.captures]
    binding = bind(program, parameters, captured, {}, ())
    z = _solve(front.number, list(binding.blocks), list(binding.batch), binding.dtype, list(front.sizes))[0]
    values = program.variables.split(binding.give_back(z, program.variables.size))
    return tuple(values.values())


# -- operators ----------------------------------------------------------------------------------------


@torch.library.custom_op("ddn_solvers::solve", mutates_args=())
def _solve(
    layer: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    batch: Sequence[int],
    dtype: torch.dtype,
    sizes: Sequence[int],
) -> list[torch.Tensor]:
    """``Outputs`` for the blocks, and the number of the rule of their derivative."""
    started = time.perf_counter()
    front: Front | None = _NUMBERED.get(int(layer))
    if front is None:
        raise SensitivityError("the layer is gone")
    module = front.layer()
    own = module._own_captures()
    program = compile_program(module.problem, own)
    warn_if_callbacks(program)
    binding = Binding(tuple(blocks), tuple(batch), dtype, torch.device("cpu"))
    policy = as_policy(module.policy)
    search = Search(
        program=program,
        policy=policy,
        dtype=dtype,
        samples=binding.samples,
        routes=routes(module.solver, program),
        options=as_options(module.options),
        initial=None,
        warm_start=None,
    )
    search.operation = Operation(program, policy, search.find)
    outputs = search.find(tuple(block.numpy() for block in blocks))
    conclude(search, binding, outputs, started)
    return [*outputs, front.rule(program, policy).number.clone()]


@_solve.register_fake
def _(
    layer: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    batch: Sequence[int],
    dtype: torch.dtype,
    sizes: Sequence[int],
) -> list[torch.Tensor]:
    n, m, kinks, sides = sizes
    B = math.prod(batch)
    real = [(B, n), (B, m), (B, n), (B, n), (B,), (B, kinks)]
    masks = [(B, sides), (B, sides), (B, 2)]
    return [
        *(torch.empty(shape, dtype=torch.float64) for shape in real),
        *(torch.empty(shape, dtype=torch.bool) for shape in masks),
        torch.empty(B, dtype=torch.float64),
        torch.empty(B, dtype=torch.bool),
        torch.empty(B, 3, dtype=torch.float64),
        torch.empty((), dtype=torch.int64),
    ]


@torch.library.custom_op("ddn_solvers::adjoint", mutates_args=())
def _adjoint(
    rule: torch.Tensor, blocks: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], v: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients of the blocks for a cotangent v (B, n) of z."""
    by: Rule | None = _NUMBERED.get(int(rule))
    if by is None:
        raise SensitivityError("the rule is gone")
    at = Outputs(*outputs)
    operation = Operation.resumed(by.program, by.policy, blocks, at)
    check_derivative(by.policy, operation.established())
    zeros = (torch.zeros_like(t) for t in (at.y, at.lower, at.upper, at.objective))
    return vjp(operation, blocks, at, Cotangents(v.contiguous(), *zeros))


@_adjoint.register_fake
def _(
    rule: torch.Tensor, blocks: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], v: torch.Tensor
) -> list[torch.Tensor]:
    return [torch.empty_like(block) for block in blocks]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    _, blocks, *_ = inputs
    ctx.blocks = len(blocks)
    ctx.save_for_backward(*blocks, *output)


def _backward(ctx: Any, cotangents: list[torch.Tensor | None]) -> tuple[Any, ...]:
    blocks, (*outputs, rule) = ctx.saved_tensors[: ctx.blocks], ctx.saved_tensors[ctx.blocks :]
    v = cotangents[0]
    gradients = _adjoint(rule, list(blocks), list(outputs), v)
    return None, gradients, None, None, None


def _refuse(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise SensitivityError("second order")


_solve.register_autograd(_backward, setup_context=_save)
_adjoint.register_autograd(_refuse)
