"""What a problem's functions read besides their arguments, found by accessor and watched.

A function may capture tensors, modules and plain values: through closure cells, globals, defaults,
attributes of its ``self``, containers. A traced graph must not bake them in and go stale. So each
captured value is known here by its *accessor* (a root such as a closure cell, then attribute and
item steps), and is

- an **input** of the graph, if it is a floating-point tensor that requires a gradient or belongs to
  a module: re-read at every call, whoever holds it now;
- a **constant**, watched: a change of content (tensors, arrays), of value (numbers, flags such as
  ``training``), of structure (containers, modules) or of identity (functions) means: trace again.

A layer owns copies of the modules and Parameters; it hands them in as ``overrides`` by anchor name.
"""

from __future__ import annotations

import dis
import functools
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

from ddn_solvers.problem import Problem
from ddn_solvers.validation import FIELDS

Overrides = Mapping[str, Any]
_SCALARS = (Number, str, bytes, type(None), np.generic, timedelta, date)
_SEQUENCES = (list, tuple, deque)
# torch's own attributes, whose contents are walked as what they are.
_OF_MODULES = frozenset(key for key in vars(torch.nn.Module()) if key.startswith("_"))
_MAX_DEPTH = 12
_MAX_OBJECTS = 20_000  # a captured data set is not searched to its last item
# Entries of a constant up to which its content is compared, not only a checksum of it.
_MAX_COMPARED = 100_000
# Packages whose functions and objects hold no captures of the user's.
_FOREIGN = (
    "torch",
    "numpy",
    "scipy",
    "builtins",
    "math",
    "casadi",
    "cvxpy",
    "functools",
    "operator",
    "ddn_solvers",
)


@dataclass(frozen=True)
class Accessor:
    """How to reach a captured object: a root, then steps.

    Attributes:
        name: How messages call it, for instance ``net.0.weight``.
        root: Returns the object that the function itself refers to, as of now.
        steps: ``("attr" | "item", key)`` from the root on.
        anchor: Name under which a layer registers the first module or Parameter on the way.
        anchor_depth: Number of steps up to that module or Parameter.
    """

    name: str
    root: Callable[[], Any]
    steps: tuple[tuple[str, Any], ...] = ()
    anchor: str | None = None
    anchor_depth: int = 0

    def read(self, overrides: Overrides | None = None) -> Any:
        """The object as of now.

        Raises:
            LookupError, AttributeError, ValueError: It is no longer there.
        """
        if overrides and self.anchor is not None and self.anchor in overrides:
            value, steps = overrides[self.anchor], self.steps[self.anchor_depth :]
        else:
            value, steps = self.root(), self.steps
        for kind, key in steps:
            value = getattr(value, key) if kind == "attr" else value[key]
        return value

    def read_anchor(self) -> Any:
        """The module or Parameter that a layer registers for this accessor."""
        return replace(self, steps=self.steps[: self.anchor_depth]).read()

    def step(self, kind: str, key: Any) -> Accessor:
        suffix = f".{key}" if kind == "attr" else f"[{key!r}]"
        return replace(self, name=self.name + suffix, steps=(*self.steps, (kind, key)))


@dataclass(frozen=True)
class Watch:
    """A captured value that the graph depends on without having it as an input."""

    accessor: Accessor
    fingerprint: tuple[Any, ...]
    is_input: bool

    def holds(self, overrides: Overrides | None) -> bool:
        try:
            return fingerprint(self.accessor.read(overrides), self.is_input) == self.fingerprint
        except (LookupError, AttributeError, ValueError, TypeError):
            return False

    @property
    def incidental(self) -> bool:
        """Whether it is in a private attribute, or a tensor of the trace that the functions kept."""
        private = any(kind == "attr" and str(key).startswith("_") for kind, key in self.accessor.steps)
        return private or isinstance(self.accessor.read(), FakeTensor)


@dataclass(frozen=True)
class Captures:
    """Everything that a problem's functions may read, as of one moment.

    Attributes:
        inputs: Accessors of the tensors that become inputs, one for each distinct tensor.
        watches: The rest, compared at each call.
    """

    inputs: tuple[Accessor, ...]
    watches: tuple[Watch, ...]

    def copies(self) -> dict[int, torch.Tensor]:
        """By id, a copy of each captured tensor for a call that must leave the captured ones alone, a counter's say."""
        found = {}
        for accessor in self.accessors:
            value = accessor.read()
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                wide = torch.float64 if value.is_floating_point() else value.dtype
                found[id(value)] = value.detach().to("cpu", wide, copy=True)
        return found

    @property
    def accessors(self) -> tuple[Accessor, ...]:
        """Of inputs and watched values, those of inputs first: their names are what a layer registers first."""
        return (*self.inputs, *(watch.accessor for watch in self.watches))


def fingerprint(value: Any, is_input: bool) -> tuple[Any, ...]:
    """Equal fingerprints: the graph that saw the one serves for the other."""
    if isinstance(value, torch.Tensor):
        if is_input:
            return ("input", tuple(value.shape))
        return ("constant", value.requires_grad, *_content(value))
    if isinstance(value, np.ndarray):
        with temporarily_clear_interpreter_stack():
            numbers = value.dtype.kind in "fiu"
            return ("array", *_content(torch.from_numpy(value) if numbers else value))
    if isinstance(value, _SCALARS):
        return (type(value), repr(value))
    if isinstance(value, torch.nn.Module):
        # A model gets its layer as a child after the layer has traced functions of that model: no change for them.
        children = (n for n, child in value.named_children() if not _is_layer(child))
        hooks = (*value._forward_pre_hooks.values(), *value._forward_hooks.values())
        return (type(value), tuple(children), hooks, vars(value).get("forward"))
    if isinstance(value, Mapping):
        return (type(value), tuple(value))
    if isinstance(value, _SEQUENCES):
        return (type(value), len(value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(value))
    if isinstance(value, types.MethodType):
        return (type(value), value.__func__)
    return (type(value), value if isinstance(value, types.FunctionType) else None)


def _is_layer(value: Any) -> bool:
    return any(base.__module__ == "ddn_solvers.layer" for base in type(value).__mro__)


def _content(value: Any) -> tuple[Any, ...]:
    """What tells one constant from another: its entries, or where they are many their checksum."""
    if isinstance(value, FakeTensor):  # which the functions kept when they were traced
        return (value.dtype, tuple(value.shape), id(value))
    if not isinstance(value, torch.Tensor):
        return (value.dtype.str, value.shape, value.tobytes() if value.dtype.kind != "O" else id(value))
    if value.layout is not torch.strided:
        return (value.layout, tuple(value.shape), *map(_content, _sparse_parts(value)))
    if value.device.type == "cpu":
        with temporarily_clear_interpreter_stack():  # else a torch.func transform in force would wrap it
            data = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            entries = data.view(torch.uint8).numpy().data if data.numel() else b""
        content = zlib.crc32(entries) if value.numel() > _MAX_COMPARED else bytes(entries)
        return (value.dtype, tuple(value.shape), content)
    version = None if value.is_inference() else value._version
    return (value.dtype, tuple(value.shape), id(value), version)


def _sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def find_captures(problem: Problem) -> Captures:
    """Walk every function and bound of ``problem``."""
    inputs: dict[int, Accessor] = {}
    watches: list[Watch] = []
    first_walk = _Walk(set())
    for _ in _walk_problem(problem, first_walk):
        pass
    # Which private attributes count depends on what the functions refer to, wherever they are.
    walk = _Walk(first_walk.names)
    for accessor, value, in_module in _walk_problem(problem, walk):
        is_input = isinstance(value, torch.Tensor) and _is_input(value, in_module)
        if is_input:
            first = inputs.setdefault(id(value), accessor)
            if first is not accessor:  # tied: two names for one tensor must stay one
                watches.append(_TieWatch(accessor, (), True, first))
        watches.append(Watch(accessor, fingerprint(value, is_input), is_input))
    watches += [_TieWatch(accessor, (), False, first) for accessor, first in walk.ties]
    return Captures(tuple(inputs.values()), tuple(watches))


@dataclass(frozen=True)
class _TieWatch(Watch):
    """An object that has two names; what is in it is watched under the first."""

    first: Accessor

    def holds(self, overrides: Overrides | None) -> bool:
        overrides = overrides if self.is_input else None  # a layer has one copy of what has two names
        try:
            return self.accessor.read(overrides) is self.first.read(overrides)
        except (LookupError, AttributeError, ValueError, TypeError):
            return False


def _is_input(tensor: torch.Tensor, in_module: bool) -> bool:
    owned = in_module or isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad
    return owned and tensor.is_floating_point() and tensor.layout is torch.strided


Found = tuple[Accessor, Any, bool]


class _Walk:
    """One depth-first walk; ``visited`` stops cycles, tensors are reported each time they are met.

    Args:
        names: That the functions refer to, as far as they are known.

    Attributes:
        ties: Further accessors of objects that had been met, with the first of each.
    """

    def __init__(self, names: set[str]) -> None:
        self.visited: dict[int, Accessor] = {}
        self.classes: set[type] = set()
        self.names = set(names)
        self.anchors: dict[str, int] = {}
        self.ties: list[tuple[Accessor, Accessor]] = []
        self.kept_alive: list[Any] = []  # ids are only good while their objects live

    def value(self, accessor: Accessor, value: Any, depth: int, in_module: bool = False) -> Iterator[Found]:
        if (depth > _MAX_DEPTH and not in_module) or len(self.kept_alive) > _MAX_OBJECTS:
            return
        leaf = isinstance(value, (torch.Tensor, *_SCALARS, np.ndarray, set, frozenset))
        first = None if leaf else self.visited.get(id(value))
        if first is not None:
            self.ties.append((accessor, first))
            return
        # What a function calls its self most likely holds the layer, which must not hold it in turn, nor itself: its parts do.
        registrable = isinstance(value, (torch.nn.Module, torch.nn.Parameter)) and accessor.name != "self"
        registrable = registrable and not _is_layer(value)
        if accessor.anchor is None and registrable:
            accessor = replace(
                accessor, anchor=self._anchor_name(accessor.name, value), anchor_depth=len(accessor.steps)
            )
        if isinstance(value, torch.Tensor):
            self.kept_alive.append(value)
        if leaf:
            yield accessor, value, in_module
            return
        self.visited[id(value)] = accessor
        self.kept_alive.append(value)
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            yield accessor, value, in_module
            yield from self.function(accessor, value, depth)
        elif isinstance(value, torch.nn.Module):
            yield accessor, value, True
            yield from self._module(accessor, value, depth)
        elif isinstance(value, Mapping):
            yield accessor, value, in_module
            for key in value:
                yield from self.value(accessor.step("item", key), value[key], depth + 1)
        elif isinstance(value, _SEQUENCES):
            yield accessor, value, in_module
            for key, item in enumerate(value):
                yield from self.value(accessor.step("item", key), item, depth + 1)
        elif isinstance(value, type):
            if not _foreign(value.__module__):
                yield from self._class(accessor, value, depth)
        elif isinstance(value, Problem):  # what it says, not what was compiled from it
            for key in FIELDS:
                yield from self.value(accessor.step("attr", key), getattr(value, key), depth + 1)
        elif not _foreign(type(value).__module__):
            yield accessor, value, in_module
            for key in _attributes(value):
                yield from self.value(accessor.step("attr", key), getattr(value, key), depth + 1)
            yield from self._class(accessor, type(value), depth, set(_attributes(value)))

    def _class(
        self, accessor: Accessor, cls: type, depth: int, overridden: set[str] | None = None
    ) -> Iterator[Found]:
        """Attributes of a user's class, and what its methods refer to.

        Args:
            accessor: Of the class, or of an instance, which may get an attribute of its own in place of one of these.
            overridden: What the instance has itself.
        """
        overridden = overridden or set()
        for base in cls.__mro__:
            if _foreign(base.__module__):
                continue
            known = base in self.classes
            self.classes.add(base)
            for key, attribute in list(vars(base).items()):
                if isinstance(attribute, types.FunctionType) and not known:
                    yield from self.function(accessor, attribute, depth + 1)
                elif (
                    not key.startswith("__")
                    and key not in overridden
                    and isinstance(attribute, (*_SCALARS, torch.Tensor, list, dict, tuple))
                ):
                    yield from self.value(accessor.step("attr", key), attribute, depth + 1)
            overridden |= vars(base).keys()

    def _module(self, accessor: Accessor, module: torch.nn.Module, depth: int) -> Iterator[Found]:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield from self.value(accessor.step("attr", key), tensor, depth + 1, True)
        for key, child in module.named_children():
            yield from self.value(accessor.step("attr", key), child, depth + 1, True)
        named = self._named(type(module))
        for key, attribute in list(vars(module).items()):
            # Frameworks keep much in private attributes; of those, only what these functions refer to.
            if key not in _OF_MODULES and (key in named or not key.startswith("_")):
                yield from self.value(accessor.step("attr", key), attribute, depth + 1, True)
        yield from self._class(accessor, type(module), depth, set(vars(module)))

    def _named(self, cls: type) -> set[str]:
        """Names that the functions refer to, and methods of ``cls`` that those may call."""
        methods: dict[str, list[types.CodeType]] = {}
        for base in cls.__mro__:
            for key, attribute in {} if _foreign(base.__module__) else vars(base).items():
                function = attribute.fget if isinstance(attribute, property) else attribute
                if isinstance(function, types.FunctionType):
                    methods.setdefault(key, []).append(function.__code__)
        named, called = set(self.names), {"forward", "__call__"} & methods.keys()
        while called:
            named |= {name for key in called for code in methods.pop(key) for name in _global_names(code)}
            called = named & methods.keys()
        return named

    def function(self, accessor: Accessor, function: Any, depth: int) -> Iterator[Found]:
        """Everything that a function refers to: closure, globals it names, defaults, ``self``."""
        if isinstance(function, functools.partial):
            yield from self.function(accessor.step("attr", "func"), function.func, depth)
            for index, argument in enumerate(function.args):
                yield from self.value(accessor.step("attr", "args").step("item", index), argument, depth + 1)
            for key, argument in function.keywords.items():
                here = replace(accessor.step("attr", "keywords").step("item", key), name=key)
                yield from self.value(here, argument, depth + 1)
            return
        if isinstance(function, types.MethodType):
            if isinstance(function.__func__, types.FunctionType):
                self.names |= _global_names(function.__func__.__code__)
            owner = replace(accessor.step("attr", "__self__"), name="self")
            yield from self.value(owner, function.__self__, depth + 1)
            function = function.__func__
        if not isinstance(function, types.FunctionType) or _foreign(function.__module__):
            return
        names = _global_names(function.__code__)
        self.names |= names
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield from self._cell(name, cell, depth)
        for name, default in _defaults(function):
            yield from self.value(Accessor(name, _constant(default)), default, depth + 1)
        for key in sorted(vars(function).keys() & self.names):  # decorators keep much there
            yield from self.value(accessor.step("attr", key), vars(function)[key], depth + 1)
        for name in sorted(names & function.__globals__.keys()):
            yield from self._global(name, function.__globals__, names, depth)

    def _cell(self, name: str, cell: types.CellType, depth: int) -> Iterator[Found]:
        try:
            value = cell.cell_contents
        except ValueError:  # not yet assigned
            return
        yield from self.value(Accessor(name, lambda: cell.cell_contents), value, depth + 1)

    def _global(self, name: str, scope: dict[str, Any], names: set[str], depth: int) -> Iterator[Found]:
        value = scope[name]
        accessor = Accessor(name, lambda: scope[name])
        if not isinstance(value, types.ModuleType):
            yield from self.value(accessor, value, depth + 1)
        elif not _foreign(value.__name__):  # of a Python module, only what the code names
            for key in sorted(names & vars(value).keys()):
                yield from self.value(accessor.step("attr", key), vars(value)[key], depth + 2)

    def _anchor_name(self, name: str, value: Any) -> str:
        base = "".join(c if c.isalnum() else "_" for c in name).strip("_") or "captured"
        if hasattr(torch.nn.Module, base) or base in _LAYER_ATTRIBUTES:
            base += "_"
        candidate, count = base, 0
        while self.anchors.setdefault(candidate, id(value)) != id(value):
            count += 1
            candidate = f"{base}_{count}"
        return candidate


# Attributes of ``DeclarativeLayer`` that a registered capture must not shadow.
_LAYER_ATTRIBUTES = ("problem", "solver", "options", "policy", "warm_start", "training", "solve")


def _walk_problem(problem: Problem, walk: _Walk) -> Iterator[Found]:
    functions = [("objective", problem.objective), *problem.equality.items(), *problem.inequality.items()]  # type: ignore[union-attr]  # normalised to dicts
    for name, (lower, upper) in (problem.bounds or {}).items():
        functions += [(f"lower_{name}", lower), (f"upper_{name}", upper)]
    for name, function in functions:
        if function is not None and not isinstance(function, (str, int, float)):
            yield from walk.value(Accessor(name, _constant(function)), function, 0)


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _attributes(value: Any) -> list[str]:
    """Names of an object's own attributes, slots included."""
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    names = [*getattr(value, "__dict__", ()), *([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if hasattr(value, name)]


def _foreign(module: str | None) -> bool:
    return (module or "").split(".", 1)[0] in _FOREIGN


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = function.__defaults__ or ()
    yield from zip(positional[len(positional) - len(values) :], values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _global_names(code: types.CodeType) -> set[str]:
    """Names that the code and the code nested in it load as globals or attributes."""
    names = {
        str(i.argval)
        for i in dis.get_instructions(code)
        if i.opname.startswith("LOAD_") and i.argval in code.co_names
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names
