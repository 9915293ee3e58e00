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

import functools
import itertools
import math
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._guards import tracing
from torch.utils._python_dispatch import _disable_current_modes

from ddn_solvers.binding import Binding, bind
from ddn_solvers.errors import SensitivityError, TraceError
from ddn_solvers.implicit import Operation, Outputs, check_derivative, vjp
from ddn_solvers.kkt.conditions import Cotangents
from ddn_solvers.policy import Policy, as_policy
from ddn_solvers.problem import Problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.routing import Solver, newton_first, routes
from ddn_solvers.search import Search
from ddn_solvers.solve import as_options, conclude, warn_if_callbacks
from ddn_solvers.threads import Threads

_SECOND_ORDER = (
    "a compiled layer has no second derivative (create_graph=True, double backward): leave torch.compile out, eager has "
    "derivatives of any order"
)
_MASKS = ("sides", "weak", "singular", "converged")  # outputs of type bool
_NONE = -1
_MAX_RULES = 16  # programs and policies a layer remembers for backward passes that are still to come


class Layer(Protocol):
    """What is needed of a ``DeclarativeLayer``."""

    problem: Problem
    solver: Solver
    options: Mapping[str, Any] | None
    policy: Policy | None
    _front: Front

    def _own_captures(self) -> dict[str, Any]: ...

    def _rebound(self) -> list[str]: ...


# -- what a graph refers to by number -----------------------------------------------------------------


_NUMBERED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_LOCK = threading.Lock()


def _numbered(value: Any) -> torch.Tensor:
    """A number for ``value``, good while somebody holds it."""
    number = next(_NUMBERS)
    _NUMBERED[number] = value
    return torch.tensor(number, device="cpu")


@dataclass(eq=False)
class Rule:
    """By what a point is differentiated."""

    program: Program
    policy: Policy
    threads: Threads

    def __post_init__(self) -> None:
        self.number = _numbered(self)


class Front:
    """A layer as compiled code sees it: its number, and the program whose shapes are traced.

    Attributes:
        number: () int64.
        program: Whose parameters and captured tensors the graph takes; one ``like`` it may be what runs.
        widths: Second dimension of each of ``Outputs``, -1 where it has one only. An argument of the operator, so that
            compilers that cache graphs by their text tell layers, and versions of this library, apart.
    """

    def __init__(self, layer: Layer, program: Program) -> None:
        self.layer, self.number = weakref.ref(layer), _numbered(self)
        self._rules: list[Rule] = []
        self.take(program)
        torch.compiler.assume_constant_result(_look)  # here, as this loads Dynamo; tracing a problem has, too

    def take(self, program: Program) -> None:
        """Let graphs be made for this program from now on."""
        self.program, self.widths = program, _widths(program)

    def like(self, program: Program) -> bool:
        """Whether graphs that were made for this front serve ``program``."""
        return program is self.program or _signature(program) == _signature(self.program)

    def rule(self, program: Program, policy: Policy, threads: Threads) -> Rule:
        """The one rule with this content; the layer remembers the last few."""
        with _LOCK:
            for rule in self._rules:
                if rule.program is program and (rule.policy, rule.threads) == (policy, threads):
                    break
            else:
                rule = Rule(program, policy, threads)
            self._rules = [*(r for r in self._rules if r is not rule), rule][-_MAX_RULES:]
            return rule


def _widths(program: Program) -> tuple[int, ...]:
    n, m = program.variables.size, program.smooth.rows
    sides = m - program.equality.size + 2 * n
    widths = dict.fromkeys(("z", "lower", "upper"), n) | {"y": m, "pieces": m - program.constraints}
    widths |= {"sides": sides, "weak": sides, "singular": 2, "residuals": 3}
    return tuple(widths.get(name, _NONE) for name in Outputs._fields)


def _signature(program: Program) -> tuple[Any, ...]:
    """What a graph depends on: shapes, and how captured tensors are reached."""
    blocks = tuple((block.name, block.shape) for block in program.parameters)
    return _widths(program), blocks, tuple((a.name, a.anchor, a.steps) for a in program.graph.captures)


# -- what Dynamo traces -------------------------------------------------------------------------------


def possible() -> bool:
    """Whether a graph is made in which the operators are right: no torch.func transform, no forward mode, no export."""
    transformed: bool = torch._C._are_functorch_transforms_active()
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() and not (
        transformed or forward_mode or torch.compiler.is_exporting()
    )


def forward(layer: Layer, parameters: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The variables of the layer's solution, out of operations that a graph can hold."""
    front = layer._front
    _look(front.number)
    program = front.program
    # Read by attribute: whether a name was rebound would be a guard for each module, and copies shared no graph.
    own = {a.anchor: getattr(layer, a.anchor) for a in program.graph.captures if a.anchor is not None}
    captured = [accessor.read(own) for accessor in program.graph.captures]
    binding = bind(program, parameters, captured, {}, ())
    shape = [*binding.batch, program.variables.size]
    z = _solve(front.number, list(binding.blocks), shape, binding.dtype, list(front.widths))[0]
    values = program.variables.split(binding.give_back(z, program.variables.size))
    return tuple(values.values())


def _look(number: torch.Tensor) -> None:
    """Meet what the layer's functions capture now; runs once while a graph is made, and is not in it."""
    front: Front = _NUMBERED[int(number)]
    layer = front.layer()
    assert layer is not None
    with _eagerly(), _disable_current_modes(), tracing(None):
        front.take(compile_program(layer.problem, layer._own_captures()))


# -- operators ----------------------------------------------------------------------------------------


def _eagerly() -> AbstractContextManager[Any]:
    """The dispatcher as plain Python code finds it: the core is eager code, with autograd, tracing and torch.func.

    Inside of an operator of a compiled graph most of it is switched off, below grad mode and in silence:
    ``torch.autograd.grad`` gives zeros there.
    """
    return torch._C._ForceDispatchKeyGuard(*_dispatch_of_new_threads())


@functools.cache
def _dispatch_of_new_threads() -> tuple[Any, Any]:
    """Dispatch keys that are included and excluded before anybody has changed them."""
    found: list[tuple[Any, Any]] = []

    def look() -> None:
        found.append((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def _current_program(front: Front, layer: Layer) -> Program:
    """The program for what is captured now, if the graph's inputs are its own still.

    Raises:
        TraceError: They are not; the next call will compile anew.
    """
    rebound = layer._rebound()
    program = compile_program(layer.problem, layer._own_captures())
    if not rebound and front.like(program):
        return program
    front.take(program)
    names = ", ".join(rebound) or ", ".join(block.name for block in program.parameters) or "nothing"
    raise TraceError(
        f"what the layer's functions capture is no longer what was compiled (now: {names}). The next call compiles anew."
    )


@torch.library.custom_op("ddn_solvers::solve", mutates_args=())
def _solve(
    layer: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    widths: Sequence[int],
) -> list[torch.Tensor]:
    """``Outputs`` for the blocks, and the number of the rule of their derivative."""
    started = time.perf_counter()
    front: Front | None = _NUMBERED.get(int(layer))
    module = front.layer() if front is not None else None
    if front is None or module is None:
        raise TraceError("compiled code refers to a layer that no longer exists")
    with _eagerly():
        program = _current_program(front, module)
    warn_if_callbacks(program)
    binding = Binding(tuple(blocks), tuple(shape[:-1]), dtype, torch.device("cpu"))
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
        newton_first=newton_first(module.solver, program, warm_start=False),
    )
    threads = search.options.threads
    operation = Operation(program, policy, search.find, threads)
    with _eagerly():
        outputs = operation.run(blocks)
        conclude(search, binding, outputs, started)
    # Whole: of those that cannot be dropped a policy may speak.
    weak = operation.established().active.weak
    outputs = outputs._replace(weak=torch.from_numpy(weak.copy()))
    return [*outputs, front.rule(program, policy, threads).number.clone()]


@_solve.register_fake
def _(
    layer: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    widths: Sequence[int],
) -> list[torch.Tensor]:
    B = math.prod(shape[:-1])
    outputs = (
        torch.empty(
            (B,) if width == _NONE else (B, width),
            dtype=torch.bool if name in _MASKS else torch.float64,
            device="cpu",
        )
        for name, width in zip(Outputs._fields, widths, strict=True)
    )
    return [*outputs, torch.empty((), dtype=torch.int64, device="cpu")]


@torch.library.custom_op("ddn_solvers::adjoint", mutates_args=())
def _adjoint(
    rule: torch.Tensor, blocks: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], v: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients of the blocks for a cotangent v (B, n) of z."""
    _refuse_second_order()
    by: Rule | None = _NUMBERED.get(int(rule))
    if by is None:
        raise SensitivityError(
            "what the layer's functions captured, or its policy, has changed too often since the forward pass, or the "
            "layer no longer exists"
        )
    at = Outputs(*outputs)
    zeros = (torch.zeros_like(t) for t in (at.y, at.lower, at.upper, at.objective))
    with _eagerly():
        operation = Operation.resumed(by.program, by.policy, by.threads, blocks, at)
        check_derivative(by.policy, operation.established())
        with operation.limited():
            return vjp(operation, blocks, at, Cotangents(v.contiguous(), *zeros))


@_adjoint.register_fake
def _(
    rule: torch.Tensor, blocks: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], v: torch.Tensor
) -> list[torch.Tensor]:
    return [torch.empty_like(block) for block in blocks]


def _refuse_second_order() -> None:
    """A compiled backward whose own graph is asked for: torch makes one that leads nowhere, or raises much later."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not frame.f_code.co_qualname.endswith(
        "CompiledFunctionBackward.forward"
    ):
        frame = frame.f_back
    if torch.is_grad_enabled() or frame.f_back is not None:
        raise SensitivityError(_SECOND_ORDER)


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
    raise SensitivityError(_SECOND_ORDER)


_solve.register_autograd(_backward, setup_context=_save)
_adjoint.register_autograd(_refuse)
