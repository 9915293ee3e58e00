"""A traced graph as CasADi expressions.

    lower(graph, inputs, variables).outputs[i](inputs) = output i of the graph,  flat and row-major

Each operation is lowered by its rule in the table (``casadi_elementwise``, ``casadi_movement``,
``casadi_reductions``, ``casadi_linalg``, ``casadi_spectral``). One that depends on no symbol is run by
torch. One that has no rule is decomposed by torch into simpler operations, which are lowered in its place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import casadi as ca
import torch
from torch import fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ddn_solvers.lowering import (
    casadi_elementwise,
    casadi_linalg,
    casadi_movement,
    casadi_reductions,
    casadi_spectral,
)
from ddn_solvers.lowering.casadi_tensor import (
    Call,
    KinkExpression,
    Tensor,
    UnsupportedOperation,
    column,
    rule_for,
)

__all__ = ["KinkExpression", "Lowered", "UnsupportedOperation", "lower"]

RULE_MODULES = (  # fill the table
    casadi_elementwise,
    casadi_linalg,
    casadi_movement,
    casadi_reductions,
    casadi_spectral,
)

ATEN = torch.ops.aten
# Core ATen operations that torch can still take apart.
BEYOND_CORE = (
    ATEN.native_layer_norm,
    ATEN.native_group_norm,
    ATEN.native_batch_norm,
    ATEN._native_batch_norm_legit,
    ATEN._native_batch_norm_legit_no_training,
)
RANDOM = "depends on random numbers. Draw them outside and pass them as a parameter."
UNKNOWN = (
    "has no counterpart in CasADi and torch has no decomposition of it. "
    "Rewrite the function with operations that have one."
)
ABSENT = "is used for its indices, which depend on values in steps. Use the values that it returns."
OPAQUE = (
    "is a constant that exists only inside a torch.func transform. "
    "Trace without pre_dispatch, so that the transform is resolved first."
)


@dataclass(frozen=True)
class Lowered:
    """A graph as CasADi expressions.

    Attributes:
        outputs: One dense column (``casadi.MX``), flat and row-major, for each output.
        kinks: Where they are not differentiable in the optimization variables.
    """

    outputs: tuple[Any, ...]
    kinks: tuple[KinkExpression, ...]


def lower(
    module: fx.GraphModule, inputs: Sequence[Any], variables: int, nodes: Sequence[fx.Node] | None = None
) -> Lowered:
    """Lower a functional graph, or some of its nodes.

    Args:
        module: A graph without mutation made by ``make_fx``; each node carries ``meta["val"]`` and, for
            messages, ``meta["source"]``.
        inputs: One column for each placeholder, its entries in row-major order.
        variables: How many of the placeholders, from the first, are optimization variables.
        nodes: What to return in place of the graph's outputs; nothing else is evaluated.

    Returns:
        The values and the kinks on the way to them.

    Raises:
        UnsupportedOperation: An operation has no lowering; the message says which one, where, and what
            to do about it.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    symbols = [
        Tensor(entries, tuple(node.meta["val"].shape), node.meta["val"].dtype, varies=position < variables)
        for position, (node, entries) in enumerate(zip(placeholders, inputs, strict=True))
    ]
    targets = nodes if nodes is not None else _output_nodes(module)
    kinks: list[KinkExpression] = []
    with temporarily_clear_interpreter_stack():  # else a torch.func transform in force would wrap constants
        values = _Run(module, symbols, kinks).values(targets)
        return Lowered(tuple(ca.densify(ca.MX(column(value))) for value in values), tuple(kinks))


def _output_nodes(module: fx.GraphModule) -> list[Any]:
    """What the graph returns: nodes, or numbers that do not depend on anything."""
    return tree_leaves(module.graph.output_node().args[0])


@dataclass(frozen=True)
class _Absent:
    """The value of an output that no rule computes, such as the index of a maximum."""

    operation: str
    source: str


@dataclass(frozen=True)
class _Origin:
    """The operation of the user's that is being decomposed, and what it was decomposed into so far."""

    operation: str
    source: str
    through: tuple[Any, ...]


class _Run:
    """One pass over a graph, or over the decomposition of one operation."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        kinks: list[KinkExpression],
        origin: _Origin | None = None,
    ) -> None:
        self._module, self._kinks, self._origin = module, kinks, origin
        self._known: dict[fx.Node, Any] = dict(
            zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)
        )

    def values(self, targets: Sequence[Any]) -> list[Any]:
        """The values of nodes; only what they need is evaluated."""
        needed = set()
        pending = [target for target in targets if isinstance(target, fx.Node)]
        while pending:
            node = pending.pop()
            if node not in needed and node not in self._known:
                needed.add(node)
                pending.extend(node.all_input_nodes)
        for node in self._module.graph.nodes:
            if node in needed:
                self._known[node] = self._evaluate(node)
        return [self._lookup(target) if isinstance(target, fx.Node) else target for target in targets]

    def _lookup(self, node: fx.Node) -> Any:
        value = self._known[node]
        if isinstance(value, _Absent):
            raise UnsupportedOperation(value.operation, value.source, ABSENT)
        return value

    def _evaluate(self, node: fx.Node) -> Any:
        operation, source, through = self._whence(node)
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self._module)
            if isinstance(value, torch.Tensor) and _is_opaque(value):
                raise UnsupportedOperation(str(node.target), source, OPAQUE)
            return value
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._lookup)
        if node.target is operator.getitem:
            return args[0][args[1]]
        symbols = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        rule = rule_for(node.target) if symbols else None
        if rule is None and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UnsupportedOperation(operation, source, RANDOM)
        if not symbols and node.op == "call_function":
            return _constant_result(node.target, args, kwargs)
        if not isinstance(node.target, OpOverload) or node.target in through:
            raise UnsupportedOperation(operation, source, _unknown(node, operation))
        varies = any(symbol.varies for symbol in symbols)
        outputs = _settled(node, args, kwargs)
        call = Call(node.target, operation, source, tree_leaves(outputs)[0], varies, self._kinks)
        if rule is None:
            return self._decomposed(call, args, kwargs, through)
        return _wrapped(call, rule(call, *args, **kwargs), outputs)

    def _whence(self, node: fx.Node) -> tuple[str, str, tuple[Any, ...]]:
        """The operation and the line that a message about a node has to name."""
        if self._origin is not None:
            return self._origin.operation, self._origin.source, self._origin.through
        return _name(node.target), node.meta.get("source", ""), ()

    def _decomposed(self, call: Call, args: Any, kwargs: Any, through: tuple[Any, ...]) -> Any:
        """Lower what torch decomposes the operation into; through an operation at most once."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor | torch.Tensor)]
        described = (
            _Placeholder(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor | torch.Tensor) else leaf
            for leaf in leaves
        )
        try:
            module = _decomposition(call.op, structure, *described)
        except Exception as error:  # whatever torch raises, it cannot take the operation apart
            raise call.refusal(f"{UNKNOWN} (Torch: {error})") from error
        origin = _Origin(call.operation, call.source, (*through, call.op))
        run = _Run(module, tensors, self._kinks, origin)
        result = module.graph.output_node().args[0]
        return run.values(result) if isinstance(result, tuple | list) else run.values([result])[0]


def _name(target: Any) -> str:
    return target._schema.name.split("::")[-1] if isinstance(target, OpOverload) else str(target)


def _unknown(node: fx.Node, operation: str) -> str:
    inner = _name(node.target)
    return UNKNOWN if inner == operation else f"comes down to `{inner}`, which {UNKNOWN}"


def _is_opaque(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _constant_result(op: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on constants; wherever it was traced, on the CPU."""
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with torch.no_grad():
        return op(*args, **kwargs)


def _wrapped(call: Call, value: Any, fake: Any) -> Any:
    """What a rule returned as tensors of the shapes that torch says they have."""
    if isinstance(fake, tuple | list):
        return [_wrapped(call, *pair) for pair in zip(value, fake, strict=True)]
    if value is None:
        return _Absent(call.operation, call.source)
    if isinstance(value, torch.Tensor):
        return value
    value = value if isinstance(value, ca.MX) else ca.MX(value)
    value = value if value.is_dense() else ca.densify(value)
    if value.numel() != fake.numel():
        raise AssertionError(f"{call.op}: {value.numel()} entries lowered, {fake.numel()} in torch")
    return Tensor(value, tuple(fake.shape), fake.dtype, call.varies)


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's, except of what the table lowers whole."""
    table = {**get_decompositions(BEYOND_CORE), **core_aten_decompositions()}
    return {op: function for op, function in table.items() if rule_for(op) is None}


@dataclass(frozen=True)
class _Placeholder:
    """A tensor argument, as far as a decomposition depends on it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@functools.lru_cache(maxsize=512, typed=True)
def _decomposition(op: OpOverload, structure: TreeSpec, *leaves: Any) -> fx.GraphModule:
    """The graph of one operation in terms of simpler ones; its inputs are the placeholders in order."""
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, _Placeholder)]

    def function(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = tree_unflatten(filled, structure)
        return op(*args, **kwargs)

    examples = [torch.empty(leaves[place].shape, dtype=leaves[place].dtype) for place in places]
    # torch.func.functionalize would leave what torch itself writes into tensors that it makes on the way.
    with torch.no_grad():
        return make_fx(
            dispatch_functionalize(function),
            decomposition_table=_decompositions(),
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*examples)


def _settled(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """``meta["val"]``, or its like where a fixed mask, as in ``x[mask]``, made tracing leave shapes open."""
    fake = node.meta["val"]
    shapes = [leaf.shape for leaf in tree_leaves(fake) if isinstance(leaf, torch.Tensor)]
    if not any(isinstance(extent, torch.SymInt) for shape in shapes for extent in shape):
        return fake

    def stand_in(tensor: Any) -> torch.Tensor:
        if tensor.dtype is torch.bool:  # of symbols only by mistake, and about to be refused
            return torch.ones(tensor.shape, dtype=torch.bool) if isinstance(tensor, Tensor) else tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    op: Any = node.target
    args, kwargs = tree_map_only((Tensor, torch.Tensor), stand_in, (args, kwargs))
    if op is ATEN.masked_select.default:
        entries, mask = args
        shape = torch.broadcast_shapes(entries.shape, mask.shape)
        return entries.new_empty(int(mask.expand(shape).sum()))
    if op is ATEN.index.Tensor:
        places = [p.nonzero(as_tuple=True) if _is_mask(p) else (p,) for p in args[1]]
        args = (args[0], [place for some in places for place in some])
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return op(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool
