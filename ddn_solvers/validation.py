"""Declaration -> normalised fields: every mistake in a ``Problem`` is named here, before tracing."""

from __future__ import annotations

import functools
import inspect
import keyword
import math
import numbers
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ddn_solvers.errors import ProblemError

if TYPE_CHECKING:
    from ddn_solvers.problem import Problem

FIELDS = ("variables", "parameters", "objective", "equality", "inequality", "bounds")
RESERVED = ("initial", "warm_start", "policy", "self")


def checked_fields(declaration: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dict declaration, unknown and missing ones refused."""
    if not isinstance(declaration, Mapping):
        raise ProblemError(
            "the problem is not a declaration",
            expected="a ddn.Problem or a dict of its fields",
            got=type(declaration).__name__,
        )
    unknown = [key for key in declaration if key not in FIELDS]
    if unknown:
        raise ProblemError(
            f"unknown field {', '.join(map(repr, unknown))} in the problem",
            expected="only " + ", ".join(FIELDS),
        )
    if "variables" not in declaration:
        raise ProblemError("the problem has no field 'variables'", expected="a dict from name to shape")
    return dict(declaration)


def normalise(problem: Problem) -> dict[str, Any]:
    """Every field in its one internal form; raises ``ProblemError`` on the first mistake."""
    variables = _shapes("variables", problem.variables)
    parameters = _shapes("parameters", problem.parameters)
    if not variables:
        raise ProblemError("variables is empty", expected="at least one variable")
    if not any(math.prod(shape) for shape in variables.values()):
        raise ProblemError("variables have no elements", expected="at least one element", got=str(variables))
    twice = sorted(set(variables) & set(parameters))
    if twice:
        raise ProblemError(f"the name {twice[0]!r} is used both for a variable and for a parameter")
    known = [*variables, *parameters]
    if problem.objective is not None:
        check_arguments("objective", problem.objective, known)
    equality = _constraints("equality", problem.equality, known)
    inequality = _constraints("inequality", problem.inequality, known)
    both = sorted(set(equality) & set(inequality))
    if both:
        raise ProblemError(f"the constraint name {both[0]!r} is used both in equality and in inequality")
    bounds = _bounds(problem.bounds, variables, parameters)
    return {
        "variables": variables,
        "parameters": parameters,
        "equality": equality,
        "inequality": inequality,
        "bounds": bounds,
    }


def argument_names(function: Callable[..., Any], known: Iterable[str]) -> tuple[str, ...]:
    """Names of the variables and parameters that ``function`` takes, in its own order."""
    known = set(known)
    return tuple(name for name in signature(function).parameters if name in known)


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature arguments are bound by; a module's is that of its ``forward``."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    return inspect.signature(target)


def check_arguments(where: str, function: object, known: Sequence[str]) -> None:
    """A callable whose arguments are all names of variables or parameters (or have defaults)."""
    if not callable(function):
        raise ProblemError(
            f"{where} is not callable",
            expected="a function of variables and parameters",
            got=type(function).__name__,
        )
    try:
        arguments = signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ProblemError(
            f"the arguments of {where} cannot be read", fix="Wrap it in a def or lambda with named arguments."
        ) from error
    for argument in arguments:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise ProblemError(
                f"{where} takes *{argument.name}",
                expected="arguments that are names of variables and parameters",
                fix="Arguments are bound by name: write them out.",
            )
        if argument.kind is argument.POSITIONAL_ONLY:
            raise ProblemError(
                f"{where} takes {argument.name!r} by position only", expected="named arguments"
            )
        if argument.name not in known and argument.default is argument.empty:
            raise ProblemError(
                f"{where} takes an unknown argument {argument.name!r}",
                expected="names out of " + (", ".join(map(repr, known)) or "none"),
                fix="Arguments are bound by name to variables and parameters.",
            )


def check_picklable(fields: Mapping[str, Any]) -> None:
    """Functions are pickled by name: lambdas and nested functions have none.

    Raises:
        ProblemError: One cannot be pickled; the message names it.
    """
    functions = [("objective", fields["objective"])]
    for kind in ("equality", "inequality"):
        functions += [(f"{kind}[{name!r}]", function) for name, function in fields[kind].items()]
    for name, sides in fields["bounds"].items():
        functions += [(f"bounds[{name!r}]", side) for side in sides if callable(side)]
    for where, function in functions:
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
            # Endless: the method of an object that holds this very problem.
            raise ProblemError(
                f"{where}, {callable_name(function)}, cannot be pickled",
                expected="functions defined at the top level of a module",
                fix="Replace the lambda, nested function or method by a def there.",
            ) from error


def _shapes(field: str, shapes: object) -> dict[str, tuple[int, ...]]:
    if not isinstance(shapes, Mapping):
        raise ProblemError(f"{field} is not a dict", expected="name -> shape", got=type(shapes).__name__)
    checked = {}
    for name, shape in shapes.items():
        _check_name(field, name)
        if isinstance(shape, numbers.Integral) and not isinstance(shape, bool):
            raise ProblemError(
                f"{field}[{name!r}] is not a shape", expected=f"a tuple such as ({shape},)", got=repr(shape)
            )
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise ProblemError(
                f"{field}[{name!r}] is not a shape", expected="a tuple of integers", got=repr(shape)
            )
        for extent in shape:
            if not isinstance(extent, numbers.Integral) or isinstance(extent, bool) or extent < 0:
                raise ProblemError(
                    f"{field}[{name!r}] is not a shape", expected="integers >= 0", got=repr(tuple(shape))
                )
        checked[name] = tuple(int(extent) for extent in shape)
    return checked


def _check_name(field: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ProblemError(f"{field} has a name that is not a string", got=repr(name))
    if name in RESERVED:
        raise ProblemError(
            f"{field} uses the reserved name {name!r}",
            expected="a name other than " + ", ".join(RESERVED),
            fix="The layer's call takes these as keywords.",
        )
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ProblemError(
            f"{field} uses the name {name!r}",
            expected="a Python identifier",
            fix="Functions take it as an argument, so it cannot contain dots or spaces.",
        )


def _constraints(field: str, value: object, known: Sequence[str]) -> dict[str, Callable[..., Any]]:
    if value is None:
        return {}
    if callable(value):
        value = [value]
    if isinstance(value, Mapping):
        named = dict(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        named = {f"{field}{i}": function for i, function in enumerate(value)}
    else:
        raise ProblemError(
            f"{field} is not a set of functions",
            expected="a function, a list, or a dict by name",
            got=type(value).__name__,
        )
    for name, function in named.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ProblemError(
                f"{field} has an unusable name", expected="a string without dots", got=repr(name)
            )
        check_arguments(f"{field}[{name!r}]", function, known)
    return named


def _bounds(
    bounds: object, variables: Mapping[str, tuple[int, ...]], parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Any, Any]]:
    if bounds is None:
        return {}
    if not isinstance(bounds, Mapping):
        raise ProblemError(
            "bounds is not a dict", expected="variable -> (lower, upper)", got=type(bounds).__name__
        )
    checked = {}
    for name, pair in bounds.items():
        if name not in variables:
            raise ProblemError(
                f"bounds names an unknown variable {name!r}",
                expected="one of " + ", ".join(map(repr, variables)),
            )
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ProblemError(f"bounds[{name!r}] is not a pair", expected="(lower, upper)", got=repr(pair))
        sides = tuple(
            _bound(f"bounds[{name!r}] {side}", value, variables[name], parameters)
            for side, value in zip(("lower", "upper"), pair, strict=True)
        )
        _check_order(name, *sides)
        checked[name] = sides
    return checked


def _bound(where: str, value: Any, shape: tuple[int, ...], parameters: Mapping[str, tuple[int, ...]]) -> Any:
    if value is None:
        return None
    if isinstance(value, bool):
        raise ProblemError(
            f"{where} is a bool", expected="None, a number, a tensor, a parameter's name or a function"
        )
    if isinstance(value, str):
        if value not in parameters:
            raise ProblemError(
                f"{where} names an unknown parameter {value!r}",
                expected="one of " + (", ".join(map(repr, parameters)) or "none"),
            )
        _check_broadcast(where, parameters[value], shape)
        return value
    if isinstance(value, numbers.Real):
        return _check_constant(where, torch.tensor(float(value), dtype=torch.float64), float(value))
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            value_dtype = str(value.dtype)
            raise ProblemError(
                f"{where} has the wrong dtype", expected="a floating-point tensor", got=value_dtype
            )
        _check_broadcast(where, tuple(value.shape), shape)
        return _check_constant(where, value.detach(), value)
    if callable(value):
        check_arguments(where, value, list(parameters))
        return value
    raise ProblemError(
        f"{where} is not a bound",
        expected="None, a number, a tensor, a parameter's name or a function of parameters",
        got=type(value).__name__,
    )


def _check_constant(where: str, numeric: torch.Tensor, value: Any) -> Any:
    if torch.isnan(numeric).any():
        raise ProblemError(f"{where} is NaN", expected="numbers, infinite ones allowed")
    return value


def _check_broadcast(where: str, shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    try:
        fits = torch.broadcast_shapes(shape, target) == torch.Size(target)
    except RuntimeError:
        fits = False
    if not fits:
        raise ProblemError(
            f"{where} has the wrong shape", expected=f"a shape that broadcasts to {target}", got=str(shape)
        )


def _check_order(name: str, lower: Any, upper: Any) -> None:
    constants = []
    for side, value in (("lower", lower), ("upper", upper)):
        if isinstance(value, (int, float, torch.Tensor)):
            tensor = torch.as_tensor(value, dtype=torch.float64).detach()
            impossible = torch.inf if side == "lower" else -torch.inf
            if (tensor == impossible).any():
                raise ProblemError(f"bounds[{name!r}] {side} is {impossible}", fix="No value can satisfy it.")
            constants.append(tensor.cpu())
    if len(constants) == 2 and (constants[0] > constants[1]).any():
        raise ProblemError(f"bounds[{name!r}] contradict: lower > upper", got=f"lower={lower}, upper={upper}")


def callable_name(function: Callable[..., Any]) -> str:
    """How messages call a user's function: its qualified name and where it was written."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name} ({code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno})" if code else name
