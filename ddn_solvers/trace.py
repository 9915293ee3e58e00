"""Torch functions of a problem -> one functional ATen graph, made once.

All functions are traced together by ``make_fx`` in fake mode. ``pre_dispatch=True`` keeps ``square``,
``logsumexp``, ``relu``, norms and einsum whole, as CVXPY's rules and the kinks need them. Where the
functions mutate tensors or call ``torch.func`` transforms, which that mode cannot hold, a second
trace after dispatch functionalises them.

Captured tensors become inputs (``captures.py``): a torch-function mode replaces each by its
placeholder wherever it is used, which also makes float32 modules compute in float64.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from ddn_solvers.captures import Accessor, Captures, Overrides, find_captures
from ddn_solvers.errors import DDNError, ProblemError, TraceError
from ddn_solvers.layout import Shape
from ddn_solvers.problem import Problem
from ddn_solvers.terms import Substitution, Term, Untraceable, evaluate, line_of, terms_of

_Content = tuple[str, list[torch.Tensor]]  # what makes a graph: its code and its constants


@dataclass(frozen=True, eq=False)
class Graph:
    """The problem's functions as one graph.

    Attributes:
        module: Placeholders: variables, parameters, captured tensors, in order, float64; returns
            one tensor an entry of ``outputs``. ``None`` if the functions cannot be traced.
        outputs: ``(kind, name)`` of each output.
        shapes: Shape of each output.
        captures: Accessors of the captured tensors that are inputs.
        capture_shapes: Their shapes.
        refusal: Why there is no module.
    """

    module: fx.GraphModule | None
    terms: tuple[Term, ...]
    shapes: tuple[Shape, ...]
    captures: tuple[Accessor, ...]
    capture_shapes: tuple[Shape, ...]
    seen: Captures
    refusal: Untraceable | None = None

    @property
    def outputs(self) -> tuple[tuple[str, str], ...]:
        return tuple((term.kind, term.name) for term in self.terms)

    def holds(self, overrides: Overrides | None) -> bool:
        """Whether everything that the functions capture is still what the graph was made from."""
        return all(watch.holds(overrides) for watch in self.seen.watches)

    def read_captures(self, overrides: Overrides | None) -> list[torch.Tensor]:
        """The captured input tensors as of now."""
        return [accessor.read(overrides) for accessor in self.captures]


def trace(problem: Problem) -> Graph:
    """Trace every function of ``problem``; a ``Graph`` without module if they cannot be traced.

    Raises:
        ProblemError: A function returns something that is not what it has to be.
        TraceError: A function has no sound derivative or no fixed value (random numbers, numbers
            taken out of tensors, arguments or captured values that it changes itself).
    """
    _fill_caches(problem)
    seen = find_captures(problem)
    graph = _trace(problem, seen)
    if all(watch.holds(None) for watch in seen.watches):
        return graph
    before = _content(graph.module)
    seen = find_captures(problem)  # a cache that was filled at the first call stays as it is at the second
    again = _trace(problem, seen)
    changed = [watch.accessor.name for watch in seen.watches if not watch.holds(None)]
    if changed and graph.module is not None and not _same(before, _content(again.module)):
        raise TraceError(
            f"the problem's functions change what they capture ({', '.join(changed)}) each time they are called, so the "
            "problem has no fixed value. Compute a new value instead of changing one, and pass counters as parameters."
        )
    # What counts or logs, and changes nothing, is not watched: each call would mean a new trace.
    kept = tuple(watch for watch in seen.watches if watch.holds(None) or not watch.incidental)
    return replace(again, seen=replace(seen, watches=kept))


def _fill_caches(problem: Problem) -> None:
    """Call the functions once with numbers: what they make at the first call and keep would be tensors of the trace."""
    named = {**problem.variables, **problem.parameters}
    with (
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        contextlib.suppress(Exception),  # whatever is wrong with them, the trace says it
    ):
        inputs = {name: _generic(shape).to(torch.float64) for name, shape in named.items()}
        called(terms_of(problem), inputs, find_captures(problem))


def called(
    terms: Sequence[Term], inputs: Mapping[str, torch.Tensor], seen: Captures
) -> tuple[torch.Tensor, ...]:
    """The values of the functions themselves at numbers; what they capture is left alone, a counter's buffer say."""
    return evaluate(terms, inputs, Substitution(seen.copies(), tracing=False))


def _trace(problem: Problem, seen: Captures) -> Graph:
    terms = terms_of(problem)
    captured = [accessor.read() for accessor in seen.inputs]
    accessors = list(seen.inputs)
    while True:
        with torch.enable_grad(), _quiet_tracer():
            drawn = _random_state()
            module, shapes, undeclared, refusal = _attempt(problem, terms, captured)
            if module is not None and _random_state() != drawn:  # by these functions, or by another thread
                _refuse_random(_content(module), _attempt(problem, terms, captured)[0])
        if not undeclared:
            break
        for tensor in undeclared:  # held by no accessor: the tensor itself is the accessor
            accessors.append(Accessor(f"captured{len(accessors)}", _returning(tensor)))
            captured.append(tensor)
    if module is not None:
        accessors, captured = _drop_unused(module, problem, accessors, captured)
    capture_shapes = tuple(tuple(tensor.shape) for tensor in captured)
    return Graph(module, terms, shapes, tuple(accessors), capture_shapes, seen, refusal)


def _random_state() -> Any:
    """Of the generators of Python and NumPy, from which numbers come that a graph takes for constants."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # it is what users may draw from
    return random.getstate(), name, np.asarray(keys).tobytes(), rest


def _refuse_random(first: _Content | None, again: fx.GraphModule | None) -> None:
    """Two traces of the same functions have to be the same."""
    if not _same(first, _content(again)):
        raise TraceError(
            "the problem's functions draw random numbers from Python's or NumPy's global generator, so the problem has "
            "no fixed value. Draw them outside and pass them as a parameter."
        )


def _content(module: fx.GraphModule | None) -> _Content | None:
    """Code and constants of a graph, as of now: a constant may be a tensor that functions change."""
    if module is None:
        return None
    return module.code, [constant.clone() for constant in module.buffers()]


def _same(first: _Content | None, again: _Content | None) -> bool:
    if first is None or again is None or first[0] != again[0]:
        return False
    return all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@contextlib.contextmanager
def _quiet_tracer() -> Iterator[None]:
    """torch logs the whole traceback of an operation that fails in a trace; we say it in one line."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _returning(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _attempt(
    problem: Problem, terms: tuple[Term, ...], captured: list[torch.Tensor]
) -> tuple[fx.GraphModule | None, tuple[Shape, ...], list[torch.Tensor], Untraceable | None]:
    undeclared: list[torch.Tensor] = []
    names = [*problem.variables, *problem.parameters]

    def joint(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(names, inputs, strict=False))
        stand_ins = {id(t): i for t, i in zip(captured, inputs[len(names) :], strict=True)}
        substitution = Substitution(stand_ins, tracing=True)
        results = evaluate(terms, named, substitution)
        undeclared.extend({id(t): t for t in substitution.undeclared}.values())
        return results

    shapes = [*problem.variables.values(), *problem.parameters.values(), *(t.shape for t in captured)]
    try:
        module = _trace_whole(joint, shapes)
        if module is None:
            undeclared.clear()
            module = _trace_functional(joint, shapes)
        _tidy_norms(module)
        _clean(module)
        _check_sound(module, len(problem.variables))
    except (DDNError, Untraceable) as error:
        if isinstance(error, Untraceable):
            return None, _output_shapes(problem, terms), [], error
        raise
    except Exception as error:  # anything else: torch itself decides whether the function is wrong
        refusal = Untraceable(
            f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__,
            line_of(error),
        )
        return None, _output_shapes(problem, terms), [], refusal
    output = next(node for node in module.graph.nodes if node.op == "output")
    return module, tuple(tuple(node.meta["val"].shape) for node in output.args[0]), undeclared, None


def _trace_whole(joint: Callable[..., Any], shapes: Sequence[Sequence[int]]) -> fx.GraphModule | None:
    """Pre-dispatch graph, or ``None`` if it would have to mutate or lost sight of a value."""
    module = make_fx(joint, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
        *_fake(shapes)
    )
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, node.target), FakeTensor):
            return None
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return None
    return module


def _trace_functional(joint: Callable[..., Any], shapes: Sequence[Sequence[int]]) -> fx.GraphModule:
    functional = dispatch_functionalize(joint)
    return make_fx(functional, tracing_mode="fake", _allow_non_fake_inputs=True)(*_fake(shapes))


def _clean(module: fx.GraphModule) -> None:
    """Take out dead code and switches of the grad mode, which would outlive an evaluation of the graph."""
    for node in list(module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _tidy_norms(module: fx.GraphModule) -> None:
    """|x|^2 as the sum of squares that it is, smooth where |x| has its kink; and roots of squares as norms."""
    aten = torch.ops.aten
    for node in module.graph.nodes:
        inside = node.args[0] if node.args else None
        if not isinstance(inside, fx.Node) or inside.kwargs:
            continue
        name = operation_name(inside)
        rest: list[Any] = list(inside.args)
        with module.graph.inserting_before(node):
            if _is_square(node) and (
                name == "abs" or (name == "linalg_vector_norm" and rest[1:2] in ([], [2]))
            ):
                new = _call_like(rest[0], node, aten.square.default, rest[0])
                if name == "linalg_vector_norm":
                    new = _call_like(node, node, aten.sum.dim_IntList, new, *(rest[2:] or [None]))
            elif _is_root(node) and _is_square(inside):
                new = _call_like(node, node, aten.abs.default, rest[0])
            elif _is_root(node) and name == "sum" and isinstance(rest[0], fx.Node) and _is_square(rest[0]):
                new = _call_like(node, node, aten.linalg_vector_norm.default, rest[0].args[0], 2, *rest[1:])
            elif (
                _is_root(node)
                and name in ("dot", "matmul")
                and rest[0].meta["val"].dim() == 1
                and same_value(*rest)
            ):
                new = _call_like(node, node, aten.linalg_vector_norm.default, rest[0])
            else:
                continue
        node.replace_all_uses_with(new)


def _call_like(value: Any, line: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """A new call of ``target`` whose result has shape and dtype of ``value``, on the user's line of ``line``."""
    node: fx.Node = line.graph.call_function(target, arguments)
    node.meta = {**value.meta, "source": line.meta.get("source", "")}
    return node


def _is_square(node: fx.Node) -> bool:
    name = operation_name(node)
    if name == "mul":
        return same_value(*node.args[:2])
    return name == "square" or (name == "pow" and bool(node.args[1] == 2))


def _is_root(node: fx.Node) -> bool:
    name = operation_name(node)
    return name == "sqrt" or (name == "pow" and bool(node.args[1] == 0.5))


def same_value(x: Any, y: Any) -> bool:
    """Whether two nodes are one, or the same calls of the same things: ``(u - b) @ (u - b)`` computes u - b twice."""
    return isinstance(x, fx.Node) and _alike(x, y, _DEEP)


_DEEP = 8  # calls within each other that are compared


def _alike(x: Any, y: Any, depth: int) -> bool:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        if x is y or depth == 0 or x.op != "call_function" or x.target != y.target:
            return x is y
        return _alike((x.args, dict(x.kwargs)), (y.args, dict(y.kwargs)), depth - 1)
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return len(x) == len(y) and all(_alike(a, b, depth) for a, b in zip(x, y, strict=True))
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(_alike(x[key], y[key], depth) for key in x)
    return type(x) is type(y) and bool(x == y)


def retrace(function: Callable[..., Any], shapes: Sequence[Sequence[int]]) -> fx.GraphModule:
    """The graph of a function of float64 tensors that is known to be traceable, made as ``trace`` makes its own."""
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
        *_fake(shapes)
    )
    _clean(module)
    return module


def _fake(shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [torch.empty(tuple(shape), dtype=torch.float64) for shape in shapes]


def _output_shapes(
    problem: Problem, terms: tuple[Term, ...], filled: Callable[[Shape], torch.Tensor] = torch.zeros
) -> tuple[Shape, ...]:
    """Evaluate for real, at zero; a function that fails here is wrong, not merely untraceable."""
    named = {**problem.variables, **problem.parameters}
    inputs = {name: filled(shape).to(torch.float64) for name, shape in named.items()}
    try:
        states, results = [_random_state()], []
        for _ in range(2):
            results.append(evaluate(terms, inputs, Substitution({}, tracing=False)))
            states.append(_random_state())
        values, again = results
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(values, again, strict=True))
        if not same or (
            states[0] != states[1] and states[1] != states[2]
        ):  # a function may seed what it draws
            raise TraceError(
                "the problem's functions return another value each time they are called; do they draw random "
                "numbers? Draw them outside and pass them as a parameter."
            )
        return tuple(tuple(value.shape) for value in values)
    except DDNError:
        raise
    except Exception as error:
        singular = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # it is there
        if singular and filled is not _generic:
            return _output_shapes(problem, terms, _generic)  # at zero matrices are singular
        raise ProblemError(f"the problem's functions fail at {line_of(error)}: {error}") from error


def _generic(shape: Shape) -> torch.Tensor:
    """Numbers that make a regular matrix, the same each time."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _drop_unused(
    module: fx.GraphModule, problem: Problem, accessors: list[Accessor], captured: list[torch.Tensor]
) -> tuple[list[Accessor], list[torch.Tensor]]:
    declared = len(problem.variables) + len(problem.parameters)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    kept = []
    for accessor, tensor, node in zip(accessors, captured, placeholders[declared:], strict=True):
        if node.users:
            kept.append((accessor, tensor))
        else:
            module.graph.erase_node(node)
    module.recompile()
    return [a for a, _ in kept], [t for _, t in kept]


def dependent_nodes(module: fx.GraphModule, first: int, stop: int | None = None) -> set[fx.Node]:
    """Nodes whose value depends on one of the placeholders ``first:stop``."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    dependent = set(placeholders[first:stop])
    for node in module.graph.nodes:
        if any(argument in dependent for argument in node.all_input_nodes):
            dependent.add(node)
    return dependent


def _check_sound(module: fx.GraphModule, variables: int) -> None:
    """Refuse what has no fixed value, and what hides a value from differentiation."""
    on_variables = dependent_nodes(module, 0, variables)
    on_inputs = dependent_nodes(module, 0)
    for node in module.graph.nodes:
        source = node.meta.get("source", "")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _draws_nothing(node):
            raise TraceError(
                f"'{operation_name(node)}' at {source} draws random numbers, so the problem has no fixed "
                "value. Draw them outside and pass them as a parameter."
            )
        if node.meta.get("detached") and node in on_variables:
            raise TraceError(
                f"'detach' at {source} hides a variable from differentiation, so the derivatives would not "
                "be those of the objective. Remove it."
            )
        if node.meta.get("detached") and node in on_inputs:
            raise Untraceable("'detach'", source)


def _draws_nothing(node: fx.Node) -> bool:
    """Whether an operation that can draw random numbers is told not to: out of training, or at a rate of zero."""
    schema: Any = node.target._schema  # type: ignore[union-attr]  # what has tags is an OpOverload
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given |= dict(zip(given, node.args, strict=False)) | node.kwargs
    return any(given.get(name, True) in (False, 0.0) for name in _DRAWING)


# What torch's operations call the mode in which they draw, and the rate of a dropout.
_DRAWING = ("train", "training", "p", "dropout", "dropout_p")


def operation_name(node: fx.Node) -> str:
    """The torch name of a node's operation, without namespace and overload."""
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)
