"""The functions of a problem, called by name with captured tensors replaced, and the user's lines in them.

Every evaluation goes through ``Substitution``, traced or not: it puts the graph's inputs (or the tensors that
are differentiated) in place of what the functions capture, computes in float64 whatever dtype they have,
and, in a trace, refuses what a graph cannot hold.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ddn_solvers.errors import ProblemError, TraceError
from ddn_solvers.imported.formula import Formula
from ddn_solvers.problem import Problem
from ddn_solvers.validation import argument_names, callable_name

_TORCH_FOLDER = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)
_TRACING = (
    __file__,
    os.path.join(_HERE, "trace.py"),
    os.path.join(_HERE, "imported"),
)  # not the user's lines


class Untraceable(Exception):
    """A function that torch can evaluate and no graph can hold; callbacks take over.

    Attributes:
        operation: What stood in the way.
        source: The user's line, ``file.py:12: code``.
    """

    def __init__(self, operation: str, source: str) -> None:
        super().__init__(f"{operation} at {source}" if source else operation)
        self.operation, self.source = operation, source


@dataclass(frozen=True)
class Term:
    """One function of the problem: ``kind`` is objective, equality, inequality, lower or upper."""

    kind: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.kind if self.kind == "objective" else f"{self.kind}[{self.name!r}]"


def terms_of(problem: Problem) -> tuple[Term, ...]:
    """Every function of the problem in the order of the graph's outputs."""
    known = [*problem.variables, *problem.parameters]
    terms = [Term("objective", "", problem.objective or _zero, ())]
    if problem.objective is not None:
        terms = [Term("objective", "", problem.objective, argument_names(problem.objective, known))]
    for kind in ("equality", "inequality"):
        for name, function in getattr(problem, kind).items():
            terms.append(Term(kind, name, function, argument_names(function, known)))
    for name, sides in (problem.bounds or {}).items():
        for kind, bound in zip(("lower", "upper"), sides, strict=True):
            if bound is not None:
                terms.append(_bound_term(kind, name, bound, problem))
    return tuple(terms)


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


def _bound_term(kind: str, variable: str, bound: Any, problem: Problem) -> Term:
    shape = problem.variables[variable]
    if isinstance(bound, str):
        arguments: tuple[str, ...] = (bound,)
    elif callable(bound) and not isinstance(bound, torch.Tensor):
        arguments = argument_names(bound, problem.parameters)
    else:
        arguments = ()

    def function(**values: torch.Tensor) -> torch.Tensor:
        if isinstance(bound, str):
            value = values[bound]
        elif isinstance(bound, torch.Tensor):
            value = torch.clone(bound)  # through the mode, so that a captured Parameter is an input
        elif callable(bound):
            value = bound(**values)
        else:
            value = torch.tensor(float(bound), dtype=torch.float64)
        try:
            return torch.broadcast_to(value, shape)
        except (RuntimeError, TypeError) as error:
            raise ProblemError(
                f"{kind} bound of {variable!r} does not fit the variable",
                expected=f"a tensor that broadcasts to {shape}",
                got=f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value),
            ) from error

    return Term(kind, variable, function, arguments)


class Substitution(TorchFunctionMode):
    """Replaces captured tensors, computes in float64, and notes the user's line of each operation.

    Args:
        replacements: id of a captured tensor -> the tensor that stands for it.
        tracing: Refuse what a graph cannot hold, and label the graph's new nodes.
    """

    def __init__(self, replacements: Mapping[int, torch.Tensor], tracing: bool) -> None:
        super().__init__()
        self.replacements = dict(replacements)
        self.tracing = tracing
        self.undeclared: list[torch.Tensor] = []
        self._alive: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map(self._replace, (args, kwargs or {}))
        if not self.tracing:
            return _widen(func(*args, **kwargs))
        _refuse_what_loses_values(func, args)
        if func is torch.tensor and not any(map(_is_symbolic, pytree.tree_leaves(args))):
            # A real constant, which the graph can hold, not one of a transform in force.
            with _disable_current_modes(), temporarily_clear_interpreter_stack():
                return _widen(func(*args, **kwargs))
        if func in _INDEXING:
            args = (args[0], _static_index(args[1]), *args[2:])
        proxy_mode = get_proxy_mode()
        if proxy_mode is None:
            return _widen(func(*args, **kwargs))
        graph = proxy_mode.tracer.graph
        before = len(graph.nodes)
        result = _widen(func(*args, **kwargs))
        node, source = graph._root._prev, ""
        for _ in range(len(graph.nodes) - before):
            source = source or user_line()
            node.meta.setdefault("source", source)
            if func in _DETACHING:
                node.meta["detached"] = True
            node = node._prev
        return result

    def _replace(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or _is_wrapped(value):
            return value
        stand_in = self.replacements.get(id(value))
        if stand_in is not None:
            return stand_in
        if value.layout is not torch.strided:
            return self._dense(value)
        if value.requires_grad and self.tracing:  # captured out of the accessors' sight
            self.undeclared.append(value)
        if value.is_floating_point() and (value.dtype != torch.float64 or value.device.type != "cpu"):
            stand_in = (
                value.detach().to("cpu", torch.float64) if self.tracing else value.to("cpu", torch.float64)
            )
            self._alive.append(value)
            self.replacements[id(value)] = stand_in
            return stand_in
        return value

    def _dense(self, value: torch.Tensor) -> torch.Tensor:
        """A captured sparse tensor as a constant; lowering finds its zeros again."""
        if value.requires_grad:
            raise ProblemError(
                "the problem's functions capture a sparse tensor that requires a gradient",
                expected="a dense one",
                fix="Call .to_dense().",
            )
        with _disable_current_modes(), temporarily_clear_interpreter_stack():
            dense = value.to_dense().to("cpu", torch.float64)
        self._alive.append(value)
        self.replacements[id(value)] = dense
        return dense


_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


def _static_index(index: Any) -> Any:
    """Constant boolean masks as positions, so that the shape of the result is known."""
    parts = index if isinstance(index, tuple) else (index,)
    static: list[Any] = []
    for part in parts:
        mask = isinstance(part, torch.Tensor) and part.dtype == torch.bool and not _is_symbolic(part)
        if mask and part.dim():
            with _disable_current_modes():  # a trace does not know how many there are
                static.extend(part.nonzero(as_tuple=True))
        else:
            static.append(part)
    return tuple(static)


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, torch.Tensor) and _is_wrapped(value))


def _is_wrapped(value: torch.Tensor) -> bool:
    """Whether a transform (grad, vmap, functionalize) made this tensor: then it is no capture."""
    return (
        isinstance(value, FunctionalTensor)
        or torch._is_functional_tensor(value)
        or torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _widen(result: Any) -> Any:
    """float64 for every narrower floating result, whatever the user's factory call said."""
    if isinstance(result, torch.Tensor):
        narrow = result.is_floating_point() and result.dtype != torch.float64
        return result.to(torch.float64) if narrow else result
    if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
        return type(result)(_widen(item) for item in result)
    return result


_DETACHING = (torch.Tensor.detach, torch.detach, torch.Tensor.detach_)
_VALUE_READERS = {
    getattr(torch.Tensor, name): name
    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__index__", "__bool__", "__complex__")
}


_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a descriptor


def _refuse_what_loses_values(func: Any, args: tuple[Any, ...]) -> None:
    """Reading a value into Python: a branch is a matter for callbacks, a number loses its derivative."""
    tensor: Any = args[0] if args else None
    reader = _VALUE_READERS.get(func)
    if reader is not None and _is_symbolic(tensor):
        if reader == "__bool__" or not tensor.is_floating_point():
            raise Untraceable("a branch on the values of a tensor", user_line())
        raise TraceError(
            f"'{reader}' at {user_line()} turns a tensor into a Python number, which loses its derivative. "
            "Keep it a tensor, or take constants from outside the function."
        )
    if func is _DATA and _is_symbolic(tensor):
        raise Untraceable("'.data'", user_line())
    silent = not torch.is_grad_enabled() and func is not torch._C._set_grad_enabled
    if silent and any(map(_is_symbolic, pytree.tree_leaves(args))):
        raise Untraceable("'torch.no_grad'", user_line())


def user_line() -> str:
    """``file.py:12: code`` of the innermost frame that is neither torch's nor ours; or the imported expression."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is Formula.__call__.__code__:
            return str(frame.f_locals["formula_source"])
        filename = frame.f_code.co_filename
        if not filename.startswith((_TORCH_FOLDER, *_TRACING, "<")) and "contextlib" not in filename:
            return _quote(filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return ""


def _quote(filename: str, line: int) -> str:
    code = linecache.getline(filename, line).strip()
    code = code if len(code) <= 80 else code[:77] + "..."
    return f"{os.path.basename(filename)}:{line}: {code}".rstrip(": ")


def evaluate(
    terms: Sequence[Term],
    inputs: Mapping[str, torch.Tensor],
    substitution: Substitution,
) -> tuple[torch.Tensor, ...]:
    """Every term at ``inputs`` (name -> tensor of one instance), checked and in float64."""
    versions = {name: tensor._version for name, tensor in inputs.items()}
    results = []
    for term in terms:
        with substitution:
            value = term.function(**{name: inputs[name] for name in term.arguments})
        for name in term.arguments:
            if inputs[name]._version != versions[name]:
                raise TraceError(
                    f"{term.label} changes its argument {name!r} in place; work on a clone of it"
                )
        results.append(_checked(term, value))
    return tuple(results)


def _checked(term: Term, value: Any) -> torch.Tensor:
    where = f"{term.label}, {callable_name(term.function)},"
    if not isinstance(value, torch.Tensor):
        raise ProblemError(
            f"{where} does not return a tensor",
            expected="a tensor made from its arguments",
            got=type(value).__name__,
        )
    if not value.is_floating_point():
        raise ProblemError(
            f"{where} returns the wrong dtype", expected="a floating-point tensor", got=str(value.dtype)
        )
    if term.kind == "objective" and value.dim() != 0:
        raise ProblemError(
            f"{where} does not return a scalar",
            expected="a 0-d tensor",
            got=f"shape {tuple(value.shape)}",
            fix="Reduce it, for instance with .sum().",
        )
    return value if value.dtype == torch.float64 else value.to(torch.float64)


def line_of(error: BaseException) -> str:
    """The user's innermost line in the traceback of ``error``."""
    line, trace_ = "", error.__traceback__
    while trace_ is not None:
        filename = trace_.tb_frame.f_code.co_filename
        if not filename.startswith((_TORCH_FOLDER, *_TRACING, "<")):
            line = _quote(filename, trace_.tb_lineno)
        trace_ = trace_.tb_next
    return line
