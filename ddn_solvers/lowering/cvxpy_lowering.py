"""Graph -> CVXPY expressions whose DCP rules certify convexity.

CVXPY canonicalises a problem once, and only moves numbers at later calls, if every product has its
parameters on one side and free of each other (DPP). So

- maximal subgraphs of parameters alone are *hoisted*: ``r**2`` becomes one ``cp.Parameter``, whose
  value the compiled functions give at each call;
- where a product needs the sign of its weight, the parameter takes the sign that its value has, and
  the expression holds for as long as the value keeps it (``Hoisted.prepare``);
- in ``weight * loss(A z - b)`` with parameters in both, ``A z - b`` becomes a variable of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from ddn_solvers.arrays import Array
from ddn_solvers.layout import Shape
from ddn_solvers.lowering import cvxpy_operations as ops
from ddn_solvers.lowering.cvxpy_operations import Expression, Refusal, Tensor, operation_name_of

Values = Mapping[fx.Node, Array]

# Operations that read the shape of their argument only, not its values.
_SHAPE_ONLY = frozenset(
    ["zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"]
)


class NotLowered(Exception):
    """A node is not an expression that DCP accepts.

    Attributes:
        node: The smallest sub-expression that breaks the rules.
        reason: Why.
        final: Whatever the values of the parameters.
    """

    def __init__(self, node: fx.Node, reason: str, final: bool = False) -> None:
        source = node.meta.get("source", "")
        self.node, self.reason, self.final = node, reason, final
        super().__init__(f"'{operation_name_of(node.target)}'{f' at {source}' if source else ''} {reason}")


@dataclass(frozen=True)
class Convexity:
    """Whether a problem is convex for all values of its parameters, and the reason.

    Attributes:
        excluded: CVXPY takes it for no values at all.
    """

    convex: bool
    reason: str
    excluded: bool = False


def square_root(matrix: Array, tolerance: float = 1e-11) -> Array:
    """F with F^T F = matrix, symmetric and positive semidefinite up to ``tolerance``, relative.

    Raises:
        ValueError: It is indefinite; the message has its smallest eigenvalue.
    """
    eigenvalues, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    smallest, size = eigenvalues.min(initial=0.0), np.abs(eigenvalues).max(initial=0.0)
    if smallest < -tolerance * len(matrix) * size:
        raise ValueError(f"its matrix has the eigenvalue {smallest:.3g}")
    return np.asarray(np.sqrt(np.maximum(eigenvalues, 0.0))[:, None] * vectors.T)


def _inverse(value: Array) -> Array:
    return np.asarray(np.linalg.inv(value))


# What is made of a hoisted node's value, as a tensor, before it becomes that of a CVXPY parameter.
_TRANSFORMS: dict[str, Callable[[Array], Array]] = {
    "value": lambda value: value,
    "reciprocal": lambda value: 1.0 / value,
    "complement": lambda value: 1.0 - value,
    "inverse": _inverse,
    "factor": square_root,
    "factor of minus": lambda value: square_root(-value),
}


@dataclass(frozen=True, eq=False)
class Hoisted:
    """A CVXPY parameter that stands for a node that depends on parameters only.

    Attributes:
        node: The node.
        parameter: Shape ``()`` or ``(size,)``.
        transform: Key of what is made of the node's value.
        sign: +1 nonnegative, -1 nonpositive, 0 not known; assumed from a value, not given.
    """

    node: fx.Node
    parameter: cp.Parameter
    transform: str
    sign: int

    def prepare(self, values: Values) -> Array | None:
        """The parameter's value, or ``None`` if it breaks what the expressions assume of it."""
        try:
            value = _transformed(self.transform, values[self.node], _shape(self.node))
        except ValueError:
            return None
        holds = self.sign == 0 or bool(np.all(self.sign * value >= 0))
        return value.reshape(self.parameter.shape) if holds else None


def _transformed(transform: str, value: Array, shape: Shape) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(_TRANSFORMS[transform](np.reshape(value, shape)), dtype=np.float64)


def _shape(node: fx.Node) -> Shape:
    return tuple(node.meta["val"].shape)


def hoistable(module: fx.GraphModule, variables: int, outputs: Sequence[int] | None = None) -> list[fx.Node]:
    """Nodes of parameters alone that feed a node of variables, or are an output: their values are needed.

    Args:
        variables: How many of the placeholders are variables; they come first.
        outputs: Which outputs count; all by default.
    """
    levels = _levels(module, variables)
    results = _results(module)
    wanted = [results[k] for k in (range(len(results)) if outputs is None else outputs)]
    needed = _ancestors(wanted)
    readers = [
        n.all_input_nodes
        for n in levels
        if levels[n] == _VARIABLE and n in needed and n.op == "call_function"
    ]
    candidates = dict.fromkeys([node for inputs in readers for node in inputs] + wanted)
    return [n for n in candidates if levels[n] == _PARAMETER and isinstance(n.meta["val"], torch.Tensor)]


def evaluate(
    module: fx.GraphModule, nodes: Sequence[fx.Node], variables: int, parameters: Sequence[Array]
) -> list[Array]:
    """Values of nodes of parameters alone, by torch: where the graph has no compiled functions."""
    needed, tensors = _ancestors(nodes), dict[fx.Node, Any]()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders[variables:], parameters, strict=True):
        tensors[node] = torch.from_numpy(np.ascontiguousarray(value)).reshape(_shape(node))
    for node in module.graph.nodes:
        if node not in needed or node in tensors:
            continue
        if node.op == "get_attr":
            tensors[node] = getattr(module, str(node.target))
        else:
            args, kwargs = pytree.tree_map_only(fx.Node, tensors.__getitem__, (node.args, node.kwargs))
            tensors[node] = node.target(*args, **kwargs)
    return [tensors[node].detach().to(torch.float64).numpy() for node in nodes]


_CONSTANT, _PARAMETER, _VARIABLE = range(3)


def _levels(module: fx.GraphModule, variables: int) -> dict[fx.Node, int]:
    """What each node's value depends on, in the graph's order."""
    levels: dict[fx.Node, int] = {}
    seen = 0
    for node in module.graph.nodes:
        if node.op == "placeholder":
            levels[node] = _VARIABLE if seen < variables else _PARAMETER
            seen += 1
        elif node.op == "get_attr" or operation_name_of(node.target) in _SHAPE_ONLY:
            levels[node] = _CONSTANT
        elif node.op == "call_function":
            levels[node] = max((levels[argument] for argument in node.all_input_nodes), default=_CONSTANT)
    return levels


def _results(module: fx.GraphModule) -> list[Any]:
    """The nodes that the graph returns."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    return list(output.args[0])


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


class Lowering:
    """The outputs of one graph as CVXPY expressions, and what they need at each call.

    Args:
        module: The graph; placeholders are variables, parameters, captured tensors, in order.
        variables: One flat expression a variable.
        values: Values of the ``hoistable`` nodes, from which signs are assumed; ``None`` assumes
            nothing, and refuses what hangs on a sign.
        names: What messages call the placeholders.

    Attributes:
        hoisted: The CVXPY parameters in use.
        constraints: Equations of the variables that the expressions introduce.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        variables: Sequence[Expression],
        values: Values | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.module, self.values = module, values
        self.constraints: list[cp.Constraint] = []
        self._levels = _levels(module, len(variables))
        self._hoisted: dict[tuple[fx.Node, str, int], Hoisted] = {}
        self._tensors: dict[fx.Node, Any] = {}  # a Tensor, a list of them, or the NotLowered that it raises
        self._constants: dict[fx.Node, Any] = {}
        self._isolated: dict[int, Expression] = {}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._names = dict(zip(placeholders, names, strict=False))
        self._nonnegative: set[fx.Node] = set()
        for node, level in self._levels.items():
            if level != _VARIABLE and self._is_nonnegative(node):
                self._nonnegative.add(node)
        for node, expression in zip(placeholders, variables, strict=False):
            self._tensors[node] = ops.make(expression, _shape(node))

    @property
    def hoisted(self) -> list[Hoisted]:
        return list(self._hoisted.values())

    def output(self, index: int) -> Tensor:
        """The expression of one output: DCP as it stands, of any curvature.

        Raises:
            NotLowered: A node of it is not, or is no CVXPY expression at all.
        """
        result = _results(self.module)[index]
        needed = _ancestors([result])
        for node in self._levels:  # in order, so that no recursion grows with the graph
            if node in needed and self._levels[node] == _VARIABLE and node not in self._tensors:
                self._tensors[node] = self._attempt(node)
        return ops.as_tensor(self.value(result))

    def value(self, node: Any) -> Any:
        """What an argument of a node stands for: tensors as ``Tensor``, constants as torch has them."""
        if not isinstance(node, fx.Node):
            return node
        level = self._levels[node]
        if level == _CONSTANT:
            return self._constant(node)
        if level == _PARAMETER:
            return self._parameter(node)
        tensor = self._tensors[node]
        if isinstance(tensor, NotLowered):
            raise tensor
        return tensor

    def independent(self, node: Any) -> bool:
        """Whether an argument of a node depends on no variable."""
        return not isinstance(node, fx.Node) or self._levels[node] != _VARIABLE

    def signed(self, tensor: Tensor) -> Tensor:
        """The same tensor with the sign of its present value, if it has one and no other is known."""
        known = tensor.expression.is_nonneg() or tensor.expression.is_nonpos()
        if known or tensor.node is None or self.values is None:
            return tensor
        value = self.values[tensor.node]
        sign = 1 if np.all(value >= 0) else -1 if np.all(value <= 0) else 0
        if sign == 0:
            return tensor
        signed = self._parameter(tensor.node, sign=sign)
        return Tensor(ops.make(signed.expression, tensor.shape).expression, tensor.shape, tensor.node)

    def derived(self, tensor: Tensor, transform: str) -> Tensor:
        """An elementwise or matrix function of a tensor that depends on no variable."""
        if not tensor.expression.parameters():
            value = _transformed(transform, tensor.expression.value, tensor.shape)
            return ops.as_tensor(torch.from_numpy(value))
        if tensor.node is None:
            raise Refusal("needs the value of an expression of parameters")
        source = self._parameter(tensor.node, transform)
        return Tensor(ops.make(source.expression, tensor.shape).expression, tensor.shape)

    def factor(self, tensor: Tensor) -> tuple[int, Tensor]:
        """sign and F with sign * F^T F = matrix, for the symmetric part of a matrix free of variables."""
        if tensor.expression.parameters() and (self.values is None or tensor.node is None):
            raise Refusal("is a quadratic form whose matrix hangs on parameters; convex only if semidefinite")
        reason = ""
        for sign, transform in ((1, "factor"), (-1, "factor of minus")):
            value = tensor.expression.value if tensor.node is None else self.values[tensor.node]  # type: ignore[index]  # fx types arguments loosely
            try:
                _transformed(transform, value, tensor.shape)
            except ValueError as error:
                reason = reason or str(error)
                continue
            return sign, self.derived(tensor, transform)
        raise Refusal(f"is an indefinite quadratic form: {reason}")

    def free_of_parameters(self, expression: Expression) -> Expression:
        """The same expression with parts that are affine and hold parameters replaced by new variables.

        CVXPY canonicalises a product once only if one factor is free of parameters.
        """
        if expression.is_constant() or not expression.parameters():
            return expression
        if expression.id not in self._isolated:
            if expression.is_affine():
                if not expression.is_dpp():
                    return expression
                isolated = cp.Variable(expression.shape)
                self.constraints.append(isolated == expression)
            else:
                isolated = expression.copy([self.free_of_parameters(part) for part in expression.args])
            self._isolated[expression.id] = isolated
        return self._isolated[expression.id]

    def _is_nonnegative(self, node: fx.Node) -> bool:
        """Whether a node free of variables is so whatever the parameters are; arguments come first."""
        if self._levels[node] == _CONSTANT:
            value = self._constant(node)
            return isinstance(value, torch.Tensor) and bool((value >= 0).all())
        if node.op != "call_function":
            return False
        name = operation_name_of(node.target)
        if name in ops.NONNEGATIVE or (name == "pow" and node.args[1] in (2, 4, 6)):
            return True
        if name in ("clamp", "clamp_min") and isinstance(node.args[1], (int, float)):
            return node.args[1] >= 0
        numbers = [leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, (int, float))]
        keeps_sign = name in ops.SIGN_KEEPING or (
            name in ("add", "mul", "div") and all(n >= 0 for n in numbers)
        )
        return keeps_sign and not node.kwargs and all(n in self._nonnegative for n in node.all_input_nodes)

    def _constant(self, node: fx.Node) -> Any:
        if node not in self._constants:
            if node.op == "get_attr":
                result = getattr(self.module, str(node.target))
            elif operation_name_of(node.target) in _SHAPE_ONLY:
                result = _shape_only(node.target, _shape(node.args[0]), node.args, node.kwargs)  # type: ignore[arg-type]  # fx types arguments loosely
            else:
                args, kwargs = pytree.tree_map_only(fx.Node, self._constant, (node.args, node.kwargs))
                result = node.target(*args, **kwargs)  # type: ignore[operator]  # fx types arguments loosely
            self._constants[node] = result
        return self._constants[node]

    def _parameter(self, node: fx.Node, transform: str = "value", sign: int = 0) -> Tensor:
        key = (node, transform, sign)
        if not isinstance(node.meta["val"], torch.Tensor):
            raise Refusal("uses a list of tensors that depend on parameters")
        if not node.meta["val"].is_floating_point() and node.meta["val"].dtype != torch.bool:
            raise Refusal("uses positions that depend on parameters")
        if key not in self._hoisted:
            shape = _shape(node)
            known_nonnegative = transform == "complement" or (
                transform in ("value", "reciprocal") and node in self._nonnegative
            )
            attributes = (
                {"nonneg": True} if sign > 0 or known_nonnegative else {"nonpos": True} if sign < 0 else {}
            )
            size = (math.prod(shape),) if shape else ()
            self._hoisted[key] = Hoisted(
                node, cp.Parameter(size, name=node.name, **attributes), transform, sign
            )
        return Tensor(self._hoisted[key].parameter, _shape(node), node)

    def _attempt(self, node: fx.Node) -> Any:
        try:
            result = self._node(node)
        except NotLowered as error:
            return error
        except Refusal as refusal:
            return NotLowered(node, str(refusal), refusal.final)
        except (
            ValueError,
            TypeError,
            NotImplementedError,
            RuntimeError,
        ) as error:  # CVXPY on shapes and options
            return NotLowered(node, f"has no CVXPY form: {error}")
        if isinstance(result, Tensor) and not result.expression.is_dcp():
            return NotLowered(node, self._curvatures(node))
        return result

    def _curvatures(self, node: fx.Node) -> str:
        kinds = []
        for argument in node.all_input_nodes:
            tensor = self.value(argument)
            if isinstance(tensor, Tensor):
                curvature, sign = tensor.expression.curvature.lower(), tensor.expression.sign.lower()
                kinds.append(f"{curvature} '{self._names.get(argument, argument.name)}' of {sign} sign")
        return f"is neither convex nor concave by the DCP rules; it is applied to {' and '.join(kinds)}"

    def _node(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            raise Refusal("makes integers or truth values of variables", final=True)
        if node.target is operator.getitem:
            return self.value(node.args[0])[node.args[1]]
        for rule in ops.REWRITES.get(operation_name_of(node.target), ()):
            result = rule(self, node)
            if result is not None:
                return result
        args, kwargs = pytree.tree_map_only(fx.Node, self.value, (node.args, node.kwargs))
        return self._call(node.target, args, kwargs)

    def _call(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = operation_name_of(target)
        if name in _SHAPE_ONLY:
            return _shape_only(target, args[0].shape, args, kwargs)
        if name in ops.MOVEMENTS:
            return ops.movement(target, args, kwargs)
        if name in ops.LINEAR_MAPS:
            return ops.linear_map(target, args, kwargs)
        handler = ops.OPERATIONS.get(name)
        if handler is None:
            return self._decomposed(target, args, kwargs)
        return handler(
            self, *args, **{key: value for key, value in kwargs.items() if key not in _NO_MATHEMATICS}
        )

    def _decomposed(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation without an entry, through the core operations that torch makes of it."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        at = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def call(*tensors: torch.Tensor) -> Any:
            filled = list(leaves)
            for k, tensor in zip(at, tensors, strict=True):
                filled[k] = tensor
            call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
            return target(*call_args, **call_kwargs)

        blanks = [torch.zeros(leaves[k].shape, dtype=torch.float64) for k in at]
        functional = torch.func.functionalize(call, remove="mutations_and_views")
        graph = make_fx(functional, decomposition_table=dict(core_aten_decompositions()))(*blanks)
        environment: dict[fx.Node, Any] = {}
        inputs = iter(leaves[k] for k in at)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                environment[node] = next(inputs)
                continue
            if node.op == "get_attr":
                environment[node] = getattr(graph, str(node.target))
                continue
            now_args, now_kwargs = pytree.tree_map_only(
                fx.Node, environment.__getitem__, (node.args, node.kwargs)
            )
            if node.op == "output":
                return now_args[0]
            if node.target is operator.getitem:
                environment[node] = now_args[0][now_args[1]]
            elif not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((now_args, now_kwargs))):
                environment[node] = node.target(*now_args, **now_kwargs)
            elif node.target is target:
                break
            else:
                environment[node] = self._call(node.target, now_args, now_kwargs)
        raise Refusal("is not an operation that CVXPY knows", final=True)


def _shape_only(target: Any, shape: Shape, args: Any, kwargs: Any) -> torch.Tensor:
    return target(torch.zeros(shape, dtype=torch.float64), *args[1:], **kwargs)


# Keyword arguments that say where and how a result is stored.
_NO_MATHEMATICS = frozenset(["dtype", "device", "layout", "pin_memory", "memory_format", "out_dtype"])
