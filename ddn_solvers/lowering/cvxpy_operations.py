"""What each torch operation is in CVXPY's atoms.

A tensor of any rank is one row-major vector and a shape. Three kinds of operation need no entry of
their own: *movements* (reshape, slice, cat, tril, ...) are run by torch on a tensor of positions and
become one gather; *linear maps* (cumsum, conv1d with constant weights, ...) become their matrix,
which is their Jacobian; what is left is decomposed by torch into core operations.

``REWRITES`` look at a node together with its arguments: compositions such as ``x * log(x)`` or
``sqrt(sum(x**2))`` that are convex as a whole, and that the composition rule does not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
import torch.utils._pytree as pytree
from torch import fx

from ddn_solvers.layout import Shape
from ddn_solvers.trace import operation_name, same_value

Expression = Any  # cvxpy.Expression: CVXPY ships no type information
Dims = int | Sequence[int] | None


class Refusal(Exception):
    """An operation has no atom, or none for these arguments; the message says which and why.

    Attributes:
        final: Whatever the values of the parameters.
    """

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True, eq=False)
class Tensor:
    """A torch tensor as a CVXPY expression.

    Attributes:
        expression: Shape ``()`` for a 0-d tensor, else ``(size,)`` in row-major order.
        shape: The tensor's own shape.
        node: The parameter-only node it stands for, where it is a hoisted one.
    """

    expression: Expression
    shape: Shape
    node: fx.Node | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def matrix(self) -> Expression:
        """The expression as a matrix; vectors and scalars stay what they are."""
        if len(self.shape) < 2:
            return self.expression
        if isinstance(self.expression, cp.Constant):
            return cp.Constant(np.reshape(self.expression.value, self.shape))
        return cp.reshape(self.expression, self.shape, order="C")


class Context(Protocol):
    """What an operation may ask of the lowering that it is part of."""

    def value(self, node: Any) -> Any: ...
    def independent(self, node: Any) -> bool: ...
    def signed(self, tensor: Tensor) -> Tensor: ...
    def derived(self, tensor: Tensor, transform: str) -> Tensor: ...
    def factor(self, tensor: Tensor) -> tuple[int, Tensor]: ...
    def free_of_parameters(self, expression: Expression) -> Expression: ...


Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)
OPERATIONS: dict[str, Handler] = {}
REWRITES: dict[str, list[Callable[[Context, fx.Node], Tensor | None]]] = {}


def operation(*names: str) -> Callable[[H], H]:
    """Register ``handler(context, *args, **kwargs)`` for the ATen operations of these names."""

    def register(handler: H) -> H:
        OPERATIONS.update(dict.fromkeys(names, handler))
        return handler

    return register


def rewrite(*names: str) -> Callable[[H], H]:
    """Register ``rule(context, node) -> Tensor | None`` for nodes of these operations."""

    def register(rule: H) -> H:
        for name in names:
            REWRITES.setdefault(name, []).append(rule)
        return rule

    return register


def _apply(name: str, context: Context, *args: Any) -> Tensor:
    result: Tensor = OPERATIONS[name](context, *args)
    return result


# --- tensors ------------------------------------------------------------------------------------


def as_tensor(value: Any) -> Tensor:
    """A ``Tensor`` from one, from a torch tensor or from a number."""
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value.detach().numpy() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    return Tensor(cp.Constant(array.ravel() if array.shape else array), array.shape)


def make(expression: Expression, shape: Sequence[int]) -> Tensor:
    """``expression``, whatever its shape, as a tensor of ``shape``."""
    wanted = (math.prod(shape),) if shape else ()
    if expression.shape != wanted:
        expression = cp.reshape(expression, wanted, order="C")
    return Tensor(expression, tuple(shape))


def move(function: Callable[..., torch.Tensor], *args: Any) -> Tensor:
    """Apply a torch function that only moves entries (or fills in zeros) to tensors."""
    moved: Tensor = moved_all(function, args, {})
    return moved


def moved_all(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The same for a function that may return several tensors."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sources, start = [], 1  # position 0 stands for a filled-in zero
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) or (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()):
            source = as_tensor(leaf)
            # float64 holds every position exactly, and more operations take it than take int64.
            leaves[k] = torch.arange(start, start + source.size, dtype=torch.float64).reshape(source.shape)
            sources.append(source)
            start += source.size
    moved_args, moved_kwargs = pytree.tree_unflatten(leaves, spec)
    moved = function(*moved_args, **moved_kwargs)
    if isinstance(moved, torch.Tensor):
        return _gather(sources, moved)
    return [_gather(sources, item) for item in moved]


def _gather(sources: list[Tensor], positions: torch.Tensor) -> Tensor:
    index, shape = positions.long().reshape(-1).numpy(), tuple(positions.shape)
    sources, index = _only_used(sources, index)
    if len(sources) == 1 and np.array_equal(index, np.arange(1, sources[0].size + 1)):
        return Tensor(make(sources[0].expression, shape).expression, shape, sources[0].node)
    parts = [make(source.expression, (source.size,)).expression for source in sources]
    if not index.all():
        parts, index = [cp.Constant(np.zeros(1)), *parts], index + 1
    whole = parts[0] if len(parts) == 1 else cp.hstack(parts)
    index = index - 1
    steps = np.unique(np.diff(index))
    if len(index) == 1:
        return make(whole[int(index[0])], shape)
    if len(steps) == 1 and steps[0] > 0:  # a slice is a cheaper atom than a list of entries
        return make(whole[int(index[0]) : int(index[-1]) + 1 : int(steps[0])], shape)
    return make(whole[index], shape)


def _only_used(sources: list[Tensor], index: Any) -> tuple[list[Tensor], Any]:
    """Drop the tensors that none of the entries comes from: they would blur sign and curvature."""
    stops = 1 + np.cumsum([source.size for source in sources])
    owner = np.searchsorted(stops, index, side="right")
    used = [k for k in range(len(sources)) if np.any((owner == k) & (index > 0))]
    gaps = np.cumsum([0 if k in used else source.size for k, source in enumerate(sources)])
    return [sources[k] for k in used], np.where(
        index > 0, index - gaps[np.minimum(owner, len(sources) - 1)], 0
    )


def broadcast(*values: Any) -> tuple[list[Expression], Shape]:
    """Expressions of one common shape; those of a single entry stay scalars, which CVXPY promotes."""
    tensors = [as_tensor(value) for value in values]
    shape = tuple(np.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    expressions = []
    for tensor in tensors:
        if tensor.size == 1:
            expressions.append(make(tensor.expression, ()).expression)
        else:
            expressions.append(move(lambda t: t.expand(shape), tensor).expression)
    return expressions, shape


def elementwise(atom: Callable[..., Expression]) -> Handler:
    """A handler that broadcasts its tensors and applies ``atom`` to them."""

    def handler(context: Context, *values: Any, **_: Any) -> Tensor:
        expressions, shape = broadcast(*values)
        return make(atom(*expressions), shape)

    return handler


def reduction(atom: Callable[..., Expression]) -> Handler:
    """A handler of signature ``(x, dim, keepdim)`` from an atom with an ``axis`` argument."""

    def handler(context: Context, x: Tensor, dim: Dims = None, keepdim: bool = False, **_: Any) -> Tensor:
        return reduce(atom, x, dim, keepdim)

    return handler


def reduce(atom: Callable[..., Expression], x: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    """Apply ``atom(expression, axis)`` over ``dim`` (all dimensions if ``None`` or empty)."""
    rank = len(x.shape)
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    reduced = sorted({d % rank for d in dims}) if rank else []
    kept = [d for d in range(rank) if d not in reduced]
    shape = tuple(1 if d in reduced else n for d, n in enumerate(x.shape) if keepdim or d not in reduced)
    count = math.prod(x.shape[d] for d in kept)
    if count == 1:
        return make(atom(x.expression, None), shape)
    rows = move(lambda t: t.permute(*kept, *reduced).reshape(count, -1), x)
    return make(atom(rows.matrix(), 1), shape)


# --- products: one side must not depend on variables -----------------------------------------------


def _weigh(context: Context, weight: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
    """The two sides of a product as CVXPY's rules for parametrised products want them."""
    if not term.expression.is_affine():  # convexity of the product hangs on the weight's sign
        weight = context.signed(weight)
    if weight.expression.parameters():
        term = Tensor(context.free_of_parameters(term.expression), term.shape)
    return weight, term


def _sides(context: Context, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    x, y = as_tensor(x), as_tensor(y)
    if x.expression.is_constant():
        return _weigh(context, x, y)
    if y.expression.is_constant():
        y, x = _weigh(context, y, x)
        return x, y
    raise Refusal("multiplies two terms that depend on variables", final=True)


@operation("mul", "multiply")
def product(context: Context, x: Any, y: Any) -> Tensor:
    (left, right), shape = broadcast(*_sides(context, x, y))
    return make(cp.multiply(left, right), shape)


@operation("matmul", "mm", "mv", "dot", "vdot", "bmm")
def matmul(context: Context, x: Any, y: Any) -> Tensor:
    x, y = _sides(context, x, y)
    if len(x.shape) <= 2 and len(y.shape) <= 2:
        shape = (*x.shape[:-1], *y.shape[1:]) if len(y.shape) == 2 else x.shape[:-1]
        return make(x.matrix() @ y.matrix(), shape)
    if len(y.shape) == 1:
        return _summed(context, product(context, x, y), -1)
    left = move(lambda t: t.unsqueeze(-1), x)
    right = move(lambda t: t.unsqueeze(-3), y)
    if len(x.shape) == 1:
        return _summed(context, product(context, left, y), -2)
    return _summed(context, product(context, left, right), -2)


def _summed(context: Context, x: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    return reduce(_SUM, x, dim, keepdim)


@operation("div", "divide", "true_divide")
def divide(context: Context, x: Any, y: Any, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        raise Refusal("rounds")
    return product(context, x, reciprocal(context, as_tensor(y)))


@operation("reciprocal")
def reciprocal(context: Context, x: Tensor) -> Tensor:
    if x.expression.is_constant():
        return context.derived(x, "reciprocal")
    return _power_of_nonnegative(x, -1.0)


@operation("linear")
def linear(context: Context, x: Any, weight: Any, bias: Any = None) -> Tensor:
    x, weight = as_tensor(x), as_tensor(weight)
    if weight.expression.is_constant() and not x.expression.is_affine():
        weight = context.signed(weight)  # before it is moved, which would lose what it stands for
    result = matmul(context, x, move(torch.t, weight))
    return result if bias is None else add(context, result, bias)


@operation("addmm", "addmv", "addbmm", "baddbmm")
def addmm(context: Context, bias: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> Tensor:
    scaled = product(context, alpha, matmul(context, x, y))
    return add(context, product(context, beta, bias), scaled)


@operation("inner")
def inner(context: Context, x: Any, y: Any) -> Tensor:
    return matmul(
        context, x, move(lambda t: t.movedim(-1, max(0, t.dim() - 2)) if t.dim() > 1 else t, as_tensor(y))
    )


@operation("linalg_vecdot")
def vecdot(context: Context, x: Any, y: Any, dim: int = -1) -> Tensor:
    return _summed(context, product(context, x, y), dim)


@operation("outer", "ger")
def outer(context: Context, x: Any, y: Any) -> Tensor:
    return product(context, move(lambda t: t.unsqueeze(-1), as_tensor(x)), y)


@operation("linalg_multi_dot", "chain_matmul")
def multi_dot(context: Context, factors: Sequence[Any]) -> Tensor:
    result = as_tensor(factors[-1])
    for factor in reversed(factors[:-1]):
        result = matmul(context, factor, result)
    return result


@operation("kron")
def kron(context: Context, x: Any, y: Any) -> Tensor:
    x, y = as_tensor(x), as_tensor(y)
    left = move(lambda t: torch.kron(t, torch.ones(y.shape, dtype=t.dtype)), x)
    right = move(lambda t: torch.kron(torch.ones(x.shape, dtype=t.dtype), t), y)
    return product(context, left, right)


@operation("linalg_solve")
def solve(context: Context, matrix: Any, right: Any, left: bool = True) -> Tensor:
    matrix = as_tensor(matrix)
    if not left or len(matrix.shape) != 2 or not matrix.expression.is_constant():
        raise Refusal("is taken only with a matrix that does not depend on variables")
    return matmul(context, context.derived(matrix, "inverse"), right)


@operation("tensordot")
def tensordot(context: Context, x: Any, y: Any, dims_x: Sequence[int], dims_y: Sequence[int]) -> Tensor:
    x, y = as_tensor(x), as_tensor(y)
    labels_x, labels_y = list(range(len(x.shape))), list(range(100, 100 + len(y.shape)))
    for i, j in zip(dims_x, dims_y, strict=True):
        labels_y[j] = labels_x[i]
    keep = [label for label in (*labels_x, *labels_y) if not (label in labels_x and label in labels_y)]
    return _contract(context, (x, labels_x), (y, labels_y), keep)[0]


@operation("einsum")
def einsum(context: Context, equation: str, tensors: Sequence[Any], path: Any = None) -> Tensor:
    inputs, _, output = equation.replace(" ", "").partition("->")
    if "." in equation:
        raise Refusal("is taken without '...' only")
    if "->" not in equation:
        output = "".join(sorted({c for c in inputs if c.isalpha() and inputs.count(c) == 1}))
    terms = [(as_tensor(t), list(labels)) for t, labels in zip(tensors, inputs.split(","), strict=True)]
    terms = [_without_repeats(tensor, labels) for tensor, labels in terms]
    result, labels = terms[0]
    for k, term in enumerate(terms[1:], 2):
        keep = [*output, *(label for _, rest in terms[k:] for label in rest)]
        result, labels = _contract(context, (result, labels), term, keep)
    result, labels = _sum_out(context, result, labels, list(output))
    return move(lambda t: t.permute([labels.index(label) for label in output]), result)


Labelled = tuple[Tensor, list[Any]]


def _without_repeats(tensor: Tensor, labels: list[Any]) -> Labelled:
    """The diagonal over labels that occur twice."""
    unique = list(dict.fromkeys(labels))
    if len(unique) == len(labels):
        return tensor, labels
    equation = f"{''.join(labels)}->{''.join(unique)}"
    return move(lambda t: torch.einsum(equation, t), tensor), unique


def _sum_out(context: Context, tensor: Tensor, labels: list[Any], keep: list[Any]) -> Labelled:
    dropped = [k for k, label in enumerate(labels) if label not in keep]
    if not dropped:
        return tensor, labels
    return _summed(context, tensor, dropped), [label for label in labels if label in keep]


def _contract(context: Context, x: Labelled, y: Labelled, keep: Sequence[Any]) -> Labelled:
    """Multiply two labelled tensors and sum over the labels that are not kept."""
    (left, on_left), (right, on_right) = x, y
    left, on_left = _sum_out(context, left, on_left, [*keep, *on_right])
    right, on_right = _sum_out(context, right, on_right, [*keep, *on_left])
    batch = [label for label in on_left if label in on_right and label in keep]
    summed = [label for label in on_left if label in on_right and label not in keep]
    rows = [label for label in on_left if label not in on_right]
    columns = [label for label in on_right if label not in on_left]
    size = dict(zip([*on_left, *on_right], [*left.shape, *right.shape], strict=True))

    def arranged(tensor: Tensor, labels: list[Any], *groups: list[Any]) -> Tensor:
        order = [labels.index(label) for group in groups for label in group]
        shape = [math.prod(size[label] for label in group) for group in groups]
        return move(lambda t: t.permute(order).reshape(shape), tensor)

    if batch:
        arranged_left = arranged(left, on_left, batch, rows, summed)
        arranged_right = arranged(right, on_right, batch, summed, columns)
    else:
        arranged_left = arranged(left, on_left, rows, summed)
        arranged_right = arranged(right, on_right, summed, columns)
    labels = [*batch, *rows, *columns]
    result = matmul(context, arranged_left, arranged_right)
    return make(result.expression, [size[label] for label in labels]), labels


# --- sums and elementwise functions ------------------------------------------------------------------


@operation("add")
def add(context: Context, x: Any, y: Any, alpha: float = 1) -> Tensor:
    (left, right), shape = broadcast(x, y if abs(alpha) == 1 else product(context, alpha, y))
    return make(left - right if alpha == -1 else left + right, shape)


@operation("sub", "subtract")
def subtract(context: Context, x: Any, y: Any, alpha: float = 1) -> Tensor:
    return add(context, x, y, -alpha)


@operation("rsub")
def reversed_subtract(context: Context, x: Any, y: Any, alpha: float = 1) -> Tensor:
    return add(context, y, x, -alpha)


@operation("sum")
def total(context: Context, x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    return _summed(context, x, dim, keepdim)


@operation("mean")
def mean(context: Context, x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    result = _summed(context, x, dim, keepdim)
    return product(context, result.size / x.size, result)


@operation("pow")
def power(context: Context, x: Any, exponent: Any) -> Tensor:
    exponent, x = as_tensor(exponent), as_tensor(x)
    if not exponent.expression.is_constant():  # a number to the power of x
        if x.expression.parameters() or not x.expression.is_constant() or np.any(x.expression.value <= 0):
            raise Refusal("is taken with an exponent that is a number, or a base that is a positive one")
        logarithm = Tensor(cp.Constant(np.log(x.expression.value)), x.shape)
        return _apply("exp", context, product(context, logarithm, exponent))
    if exponent.expression.parameters() or exponent.size != 1:
        raise Refusal("is taken with one number as exponent")
    p = float(np.squeeze(exponent.expression.value))
    if p == 0:
        return as_tensor(torch.ones(x.shape))
    if p == 1:
        return make(x.expression, x.shape)
    if p == 2:
        return make(cp.square(x.expression), x.shape)
    # Even powers are convex everywhere, and torch itself gives NaN for a broken power of a negative
    # number. The others CVXPY defines on half of the domain only.
    if not p.is_integer() or (p > 0 and p % 2 == 0):
        return make(_exact_power(x.expression, p), x.shape)
    return _power_of_nonnegative(x, p)


def _power_of_nonnegative(x: Tensor, p: float) -> Tensor:
    if not x.expression.is_nonneg():
        raise Refusal(
            f"(power {p:g}) is convex only where its argument is known to be nonnegative; bound it below by 0"
        )
    return make(_exact_power(x.expression, p), x.shape)


def _exact_power(expression: Expression, p: float) -> Expression:
    return cp.power(expression, int(p) if p.is_integer() else p, approx=_is_simple(p))


def _is_simple(p: float) -> bool:
    """Whether second-order cones hold the power exactly; otherwise the power cone has to."""
    return bool(Fraction(p).limit_denominator(1024) == Fraction(p))


@operation("softplus")
def softplus(context: Context, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return make(cp.logistic(beta * x.expression) / beta, x.shape)


@operation("leaky_relu")
def leaky_relu(context: Context, x: Tensor, slope: float = 0.01) -> Tensor:
    if not 0 <= slope <= 1:
        raise Refusal("is convex only with a slope between 0 and 1")
    return make(cp.maximum(x.expression, slope * x.expression), x.shape)


@operation("clamp", "clip")
def clamp(context: Context, x: Tensor, low: Any = None, high: Any = None, **named: Any) -> Tensor:
    low, high = named.get("min", low), named.get("max", high)
    if low is not None:
        x = _apply("maximum", context, x, low)
    return x if high is None else _apply("minimum", context, x, high)


@operation("logaddexp")
def logaddexp(context: Context, x: Any, y: Any) -> Tensor:
    return _apply("logsumexp", context, _stacked(x, y), 0)


@operation("hypot")
def hypot(context: Context, x: Any, y: Any) -> Tensor:
    return norm(context, _stacked(x, y), 2, 0)


def _stacked(x: Any, y: Any) -> Tensor:
    x, y = as_tensor(x), as_tensor(y)
    shape = np.broadcast_shapes(x.shape, y.shape)
    return move(lambda *t: torch.stack([item.expand(shape) for item in t]), x, y)


@operation("xlogy", "special_xlogy")
def xlogy(context: Context, x: Any, y: Any) -> Tensor:
    return product(context, x, _apply("log", context, as_tensor(y)))


@operation("log_softmax", "_log_softmax")
def log_softmax(context: Context, x: Tensor, dim: int, *_: Any) -> Tensor:
    return subtract(context, x, _apply("logsumexp", context, x, dim, True))


@operation("where")
def where(context: Context, mask: Any, x: Any, y: Any) -> Tensor:
    mask = as_tensor(mask)
    if not mask.expression.is_constant():
        raise Refusal("chooses by a condition on variables", final=True)
    return add(context, product(context, mask, x), product(context, context.derived(mask, "complement"), y))


@operation("masked_fill")
def masked_fill(context: Context, x: Any, mask: Any, value: Any) -> Tensor:
    return where(context, mask, value, x)


def _logistic_of_minus(x: Expression) -> Expression:
    return -cp.logistic(-x)


def _hyperbolic_cosine(x: Expression) -> Expression:
    return 0.5 * (cp.exp(x) + cp.exp(-x))


for _names, _atom in {
    "neg": lambda x: -x,
    "square": cp.square,
    "abs": cp.abs,
    "exp": cp.exp,
    "expm1": lambda x: cp.exp(x) - 1,
    "exp2 special_exp2": lambda x: cp.exp(math.log(2) * x),
    "log": cp.log,
    "log1p": cp.log1p,
    "log2": lambda x: cp.log(x) / math.log(2),
    "log10": lambda x: cp.log(x) / math.log(10),
    "sqrt": cp.sqrt,
    "rsqrt": lambda x: cp.power(x, -0.5),
    "relu": cp.pos,
    "cosh": _hyperbolic_cosine,
    "log_sigmoid log_sigmoid_forward": _logistic_of_minus,
    "special_entr": cp.entr,
    "maximum fmax clamp_min": cp.maximum,
    "minimum fmin clamp_max": cp.minimum,
}.items():
    operation(*_names.split())(elementwise(_atom))


def _sum(x: Expression, axis: int | None) -> Expression:
    return cp.sum(x, axis=axis)


_SUM = _sum
for _names, _axis_atom in {
    "amax": cp.max,
    "amin": cp.min,
    "logsumexp special_logsumexp": cp.log_sum_exp,
}.items():
    operation(*_names.split())(reduction(lambda x, axis, atom=_axis_atom: atom(x, axis=axis)))


@operation("max")
def maximum(context: Context, x: Any, other: Any = None, keepdim: bool = False) -> Any:
    return _extreme(context, "maximum", "amax", x, other, keepdim)


@operation("min")
def minimum(context: Context, x: Any, other: Any = None, keepdim: bool = False) -> Any:
    return _extreme(context, "minimum", "amin", x, other, keepdim)


def _extreme(context: Context, binary: str, over: str, x: Any, other: Any, keepdim: bool) -> Any:
    if isinstance(other, int):  # values and positions; the latter no function of ours can use
        return [_apply(over, context, x, other, keepdim), None]
    return _apply(over, context, x) if other is None else _apply(binary, context, x, other)


# --- norms and losses ------------------------------------------------------------------------------------


@operation("linalg_vector_norm", "norm")
def norm(
    context: Context, x: Tensor, p: Any = 2, dim: Dims = None, keepdim: bool = False, **_: Any
) -> Tensor:
    p = 2 if p in (None, "fro") else p
    if isinstance(p, Tensor) or p < 1:
        raise Refusal(f"is convex only for p >= 1, not {p}")
    return reduce(lambda e, axis: _vector_norm(e, p, axis), x, dim, keepdim)


def _vector_norm(x: Expression, p: float, axis: int | None) -> Expression:
    if x.shape == ():
        return cp.abs(x)
    if p in (1, 2, math.inf):
        return cp.norm(x, p, axis=axis)
    if axis is None:
        return cp.pnorm(x, p, approx=_is_simple(float(p)))
    return cp.hstack([_vector_norm(x[i], p, None) for i in range(x.shape[0])])


@operation("linalg_matrix_norm")
def matrix_norm(
    context: Context, x: Tensor, p: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False
) -> Tensor:
    if len(x.shape) != 2 or [d % 2 for d in dim] != [0, 1] or p in (-1, -2, -math.inf):
        raise Refusal(f"is taken of whole matrices, and not with ord={p}")
    return make(cp.norm(x.matrix(), p), (1, 1) if keepdim else ())


@operation("linalg_norm")
def linalg_norm(
    context: Context, x: Tensor, p: Any = None, dim: Dims = None, keepdim: bool = False
) -> Tensor:
    over = [dim] if isinstance(dim, int) else dim
    if p is not None and (len(over) if over is not None else len(x.shape)) == 2:
        return matrix_norm(context, x, p, over or (-2, -1), keepdim)
    return norm(context, x, p, dim, keepdim)


@operation("dist")
def dist(context: Context, x: Any, y: Any, p: float = 2) -> Tensor:
    return norm(context, subtract(context, x, y), p)


def _reduced_loss(context: Context, loss: Tensor, how: int) -> Tensor:
    return (loss, mean(context, loss), total(context, loss))[how] if how else loss


@operation("mse_loss")
def mse_loss(context: Context, x: Any, y: Any, how: int = 1) -> Tensor:
    residual = subtract(context, x, y)
    if not how:
        return make(cp.square(residual.expression), residual.shape)
    return make(cp.sum_squares(residual.expression) / (residual.size if how == 1 else 1), ())


@operation("l1_loss")
def l1_loss(context: Context, x: Any, y: Any, how: int = 1) -> Tensor:
    return _reduced_loss(context, _apply("abs", context, subtract(context, x, y)), how)


@operation("huber_loss")
def huber_loss(context: Context, x: Any, y: Any, how: int = 1, delta: float = 1.0) -> Tensor:
    residual = subtract(context, x, y)
    return _reduced_loss(context, make(0.5 * cp.huber(residual.expression, delta), residual.shape), how)


@operation("binary_cross_entropy_with_logits")
def cross_entropy_of_logits(
    context: Context, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, how: int = 1
) -> Tensor:
    if weight is not None or pos_weight is not None:
        raise Refusal("is taken without weights; multiply the losses instead")
    return _reduced_loss(context, subtract(context, softplus(context, x), product(context, target, x)), how)


@operation("smooth_l1_loss")
def smooth_l1_loss(context: Context, x: Any, y: Any, how: int = 1, beta: float = 1.0) -> Tensor:
    if beta == 0:
        return l1_loss(context, x, y, how)
    return product(context, 1 / beta, huber_loss(context, x, y, how, beta))


@operation("logdet")
def logdet(context: Context, x: Tensor) -> Tensor:
    """On positive definite matrices; CVXPY reads one triangle, so the argument must be symmetric."""
    if len(x.shape) != 2 or not _is_symmetric(x.matrix()):
        raise Refusal("is taken of matrices that are symmetric by construction; write 0.5 * (X + X.T)")
    return make(cp.log_det(x.matrix()), ())


def _is_symmetric(matrix: Expression) -> bool:
    """An affine expression is symmetric for all variables if its map to the skew part is zero."""
    skew = matrix - matrix.T
    leaves = [*skew.variables(), *skew.parameters()]
    if not skew.is_affine():
        return False
    saved = [leaf.value for leaf in leaves]
    for leaf in leaves:
        leaf.save_value(np.random.default_rng(0).standard_normal(leaf.shape))
    symmetric = bool(np.allclose(skew.value, 0.0))
    for leaf, value in zip(leaves, saved, strict=True):
        leaf.save_value(value)
    return symmetric


# --- operations that need no entry of their own ---------------------------------------------------------


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


MOVEMENTS = _words(
    """
    reshape view _unsafe_view _reshape_alias view_as flatten unflatten ravel transpose t permute movedim
    moveaxis swapaxes swapdims numpy_T mT matrix_H mH adjoint expand expand_as broadcast_to
    broadcast_tensors unsqueeze squeeze slice select narrow index index_select gather take
    take_along_dim masked_select cat concat concatenate stack hstack vstack dstack column_stack
    row_stack split split_with_sizes tensor_split chunk unbind flip fliplr flipud rot90 roll repeat
    tile repeat_interleave diagonal diag diag_embed diagflat linalg_diagonal tril triu constant_pad_nd
    pad meshgrid unfold as_strided select_scatter slice_scatter diagonal_scatter index_put scatter
    clone contiguous alias to _to_copy type_as lift_fresh lift_fresh_copy detach positive atleast_1d
    atleast_2d atleast_3d block_diag
    """
)
LINEAR_MAPS = _words(
    """
    cumsum diff trace conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d avg_pool1d
    avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d cross linalg_cross upsample_linear1d
    upsample_bilinear2d upsample_nearest1d upsample_nearest2d deg2rad rad2deg
    """
)
# Results whose every entry is nonnegative, whatever the argument.
NONNEGATIVE = _words(
    """
    square abs exp exp2 softplus relu sigmoid sqrt rsqrt norm linalg_vector_norm linalg_matrix_norm
    linalg_norm mse_loss l1_loss huber_loss smooth_l1_loss softmax _softmax cosh logical_not gt ge lt le
    eq ne logical_and logical_or dist hypot
    """
)
# Results that are nonnegative if the arguments are.
SIGN_KEEPING = MOVEMENTS | {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "cumsum",
    "matmul",
    "dot",
    "mv",
    "mm",
}


def movement(target: Any, args: Any, kwargs: Any) -> Any:
    name = operation_name_of(target)
    if "pad" in name and any(isinstance(a, (int, float)) and a for a in (*args, kwargs.get("value"))):
        raise Refusal("fills in a number other than zero")
    if (name == "index_put" and (True in args[3:] or kwargs.get("accumulate"))) or (
        name == "scatter" and "reduce" in kwargs
    ):
        raise Refusal("adds entries up, which is not taken; use index_select and sum")
    return moved_all(target, args, kwargs)


def linear_map(target: Any, args: Any, kwargs: Any) -> Tensor:
    """``target`` as its matrix, which is its Jacobian in the one argument that is not constant."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    moving = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not _is_number(leaf)]
    if len(moving) != 1:
        raise Refusal("is linear in one argument only; the others must be constants")
    x = leaves[moving[0]]
    leaves = [_torch_value(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def apply(value: torch.Tensor) -> Any:
        now_args, now_kwargs = pytree.tree_unflatten(
            [value if k == moving[0] else leaf for k, leaf in enumerate(leaves)], spec
        )
        return target(*now_args, **now_kwargs)

    jacobian = torch.func.jacrev(apply)(torch.zeros(x.shape, dtype=torch.float64))
    shape = tuple(jacobian.shape[: jacobian.dim() - len(x.shape)])
    matrix = sp.csr_array(jacobian.reshape(math.prod(shape), x.size).numpy())
    return make(matrix @ make(x.expression, (x.size,)).expression, shape)


def _is_number(tensor: Tensor) -> bool:
    return bool(tensor.expression.is_constant() and not tensor.expression.parameters())


def _torch_value(tensor: Tensor) -> torch.Tensor:
    if not _is_number(tensor):
        return torch.empty(tensor.shape, dtype=torch.float64)
    return torch.as_tensor(np.asarray(tensor.expression.value), dtype=torch.float64).reshape(tensor.shape)


def operation_name_of(target: Any) -> str:
    """The torch name of an operation, without namespace and overload."""
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)


# --- compositions that are convex as a whole -----------------------------------------------------------


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and operation_name(node) in names


def _squared(node: Any) -> fx.Node | None:
    """x, where the node is x squared elementwise."""
    if _is(node, "square") or (_is(node, "pow") and node.args[1] == 2):
        return node.args[0]
    return node.args[0] if _is(node, "mul") and same_value(*node.args[:2]) else None


def _dims(node: fx.Node) -> tuple[Dims, bool]:
    """``dim`` and ``keepdim`` of a node of a reduction."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return dim, bool(keepdim)  # type: ignore[return-value]  # fx types arguments loosely


@rewrite("sum", "mean")
def _sum_of_squares(context: Context, node: fx.Node) -> Tensor | None:
    inner = _squared(node.args[0])
    if inner is None or node.meta["val"].numel() != 1:
        return None
    x = context.value(inner)
    scale = 1 / x.size if operation_name(node) == "mean" else 1
    return make(scale * cp.sum_squares(x.expression), tuple(node.meta["val"].shape))


@rewrite("sqrt", "pow")
def _root_of_squares(context: Context, node: fx.Node) -> Tensor | None:
    summed = node.args[0]
    if not _is(summed, "sum", "mean") or (operation_name(node) == "pow" and node.args[1] != 0.5):
        return None
    inner = _squared(summed.args[0])  # type: ignore[union-attr]  # fx types arguments loosely
    if inner is None:
        return None
    x, (dim, keepdim) = context.value(inner), _dims(summed)  # type: ignore[arg-type]  # fx types arguments loosely
    result = norm(context, x, 2, dim, keepdim)
    scale = math.sqrt(result.size / x.size) if _is(summed, "mean") else 1
    return make(scale * result.expression, result.shape)


@rewrite("mul")
def _square(context: Context, node: fx.Node) -> Tensor | None:
    """x * x, and w * x * x with w free of variables."""
    inner = _squared(node)
    if inner is not None:
        return _apply("square", context, context.value(inner))
    for weighted, x in (node.args[:2], reversed(node.args[:2])):
        if not _is(weighted, "mul"):
            continue
        for weight, factor in (weighted.args[:2], reversed(weighted.args[:2])):  # type: ignore[union-attr]  # fx types arguments loosely
            if same_value(factor, x) and context.independent(weight):
                return product(context, context.value(weight), _apply("square", context, context.value(x)))
    return None


@rewrite("mul", "xlogy", "special_xlogy")
def _entropy(context: Context, node: fx.Node) -> Tensor | None:
    """x log x, and x log (x / y)."""
    x, y = node.args[:2]
    if operation_name(node) == "mul":
        x, y = (x, y) if _is(y, "log") else (y, x)
        if not _is(y, "log"):
            return None
        y = y.args[0]  # type: ignore[union-attr]  # fx types arguments loosely
    if same_value(x, y):
        x = context.value(x)
        return make(-cp.entr(x.expression), x.shape)
    if _is(y, "div") and same_value(y.args[0], x):  # type: ignore[union-attr]  # fx types arguments loosely
        (left, right), shape = broadcast(context.value(x), context.value(y.args[1]))  # type: ignore[union-attr]  # fx types arguments loosely
        return make(cp.rel_entr(left, right), shape)
    return None


@rewrite("log")
def _log_of_sum_of_exp(context: Context, node: fx.Node) -> Tensor | None:
    summed = node.args[0]
    if _is(summed, "sum") and _is(summed.args[0], "exp"):  # type: ignore[union-attr]  # fx types arguments loosely
        x = context.value(summed.args[0].args[0])  # type: ignore[union-attr]  # fx types arguments loosely
        return _apply("logsumexp", context, x, *_dims(summed))  # type: ignore[arg-type]  # fx types arguments loosely
    if _is(summed, "add") and 1 in summed.args and not summed.kwargs:  # type: ignore[union-attr]  # fx types arguments loosely
        return next((_logistic(context, arg) for arg in summed.args if _is(arg, "exp")), None)  # type: ignore[union-attr]  # fx types arguments loosely
    return None


@rewrite("log1p")
def _log1p_of_exp(context: Context, node: fx.Node) -> Tensor | None:
    return _logistic(context, node.args[0]) if _is(node.args[0], "exp") else None


def _logistic(context: Context, exponential: Any) -> Tensor:
    x = context.value(exponential.args[0])
    return make(cp.logistic(x.expression), x.shape)


@rewrite("sum")
def _sum_of_largest(context: Context, node: fx.Node) -> Tensor | None:
    values = node.args[0]
    top = values.args[0] if isinstance(values, fx.Node) and values.args else None
    if not _is(top, "topk") or values.args[1] != 0 or len(node.args) > 1:  # type: ignore[union-attr]  # fx types arguments loosely
        return None
    x, k = context.value(top.args[0]), top.args[1]  # type: ignore[union-attr]  # fx types arguments loosely
    largest = top.args[3] if len(top.args) > 3 else top.kwargs.get("largest", True)  # type: ignore[union-attr]  # fx types arguments loosely
    if len(x.shape) != 1:
        return None
    return make((cp.sum_largest if largest else cp.sum_smallest)(x.expression, k), ())


@rewrite("div")
def _quadratic_over_linear(context: Context, node: fx.Node) -> Tensor | None:
    numerator, denominator = node.args[:2]
    inner = _squared(numerator.args[0]) if _is(numerator, "sum") else _squared(numerator)  # type: ignore[union-attr]  # fx types arguments loosely
    if inner is None or not isinstance(denominator, fx.Node) or context.independent(denominator):
        return None
    y = context.value(denominator)
    if node.meta["val"].numel() != 1 or y.size != 1 or not y.expression.is_nonneg():
        return None
    x = context.value(inner)
    quotient = cp.quad_over_lin(make(x.expression, (x.size,)).expression, make(y.expression, ()).expression)
    return make(quotient, tuple(node.meta["val"].shape))


_FORMS = ("dot", "vdot", "matmul", "inner", "linalg_vecdot", "sum")


@rewrite(*_FORMS)
def _quadratic_form(context: Context, node: fx.Node) -> Tensor | None:
    """x^T x, and x^T P x with P free of variables."""
    found = _form_of(context, node)
    if found is None:
        return None
    factors, x, matrix = found
    if matrix is None:
        return _scaled(context, factors, make(cp.sum_squares(context.value(x).expression), ()))
    form = _form(context, context.value(x), context.value(matrix))
    return None if form is None else _scaled(context, factors, form)


@rewrite("sqrt", "pow")
def _root_of_form(context: Context, node: fx.Node) -> Tensor | None:
    """sqrt(x^T P x), a norm."""
    inside: Any = node.args[0]
    if (operation_name(node) == "pow" and node.args[1] != 0.5) or not _is(inside, *_FORMS):
        return None
    factors, x, matrix = _form_of(context, inside) or ((), None, None)
    if matrix is None or not all(isinstance(factor, (int, float)) and factor > 0 for factor in factors):
        return None
    image = _factored(context, context.value(x), context.value(matrix))
    if image is None or image[0] < 0:
        return None
    return make(math.sqrt(math.prod(factors)) * cp.norm(image[1], 2), ())


def _form_of(context: Context, node: fx.Node) -> tuple[tuple[Any, ...], Any, Any] | None:
    """Factors, x and P of a quadratic form, P being ``None`` where there is none."""
    product_node = node.args[0] if operation_name(node) == "sum" else node
    if (product_node is not node and not _is(product_node, "mul")) or node.meta["val"].dim() != 0:
        return None
    (of_x, x), (of_y, y) = (_unscaled(context, arg) for arg in product_node.args[:2])  # type: ignore[union-attr]  # fx types arguments loosely
    if same_value(x, y):
        return (*of_x, *of_y), x, None
    for vector, image in ((x, y), (y, x)):
        if not _is(image, "matmul", "mv"):
            continue
        for argument, matrix in (image.args, reversed(image.args)):
            of_argument, argument = _unscaled(context, argument)
            if same_value(argument, vector) and context.independent(matrix):
                return (*of_x, *of_y, *of_argument), vector, matrix
    return None


def _unscaled(context: Context, node: Any) -> tuple[tuple[Any, ...], Any]:
    """Factors that are one number each, and a node, whose product is the node: ``0.5 * u @ P @ u`` scales its first ``u``."""
    if _is(node, "mul"):
        for factor, scaled in (node.args[:2], reversed(node.args[:2])):
            number = isinstance(factor, (int, float))
            if number or (context.independent(factor) and factor.meta["val"].numel() == 1):
                more, inner = _unscaled(context, scaled)
                return (factor, *more), inner
    return (), node


def _scaled(context: Context, factors: Sequence[Any], term: Tensor) -> Tensor:
    for factor in factors:
        value = factor if isinstance(factor, (int, float)) else context.value(factor)
        term = product(context, value, term)
    return make(term.expression, ())


@rewrite("einsum")
def _quadratic_einsum(context: Context, node: fx.Node) -> Tensor | None:
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    labels, operands = inputs.split(","), list(node.args[1])  # type: ignore[arg-type]  # fx types arguments loosely
    alike = len(labels) == 2 and labels[0] == labels[1] and len(set(labels[0])) == len(labels[0])
    if not output and alike and same_value(*operands):
        return make(cp.sum_squares(context.value(operands[0]).expression), ())
    if output or len(labels) != 3 or sorted(map(len, labels)) != [1, 1, 2]:
        return None
    at = next(k for k, label in enumerate(labels) if len(label) == 2)
    x, y = (operands[k] for k in range(3) if k != at)
    others = {labels[k] for k in range(3) if k != at}
    if (
        not same_value(x, y)
        or set(labels[at]) != others
        or len(others) != 2
        or not context.independent(operands[at])
    ):
        return None
    return _form(context, context.value(x), context.value(operands[at]))


def _form(context: Context, x: Tensor, matrix: Any) -> Tensor | None:
    image = _factored(context, x, matrix)
    return None if image is None else make(image[0] * cp.sum_squares(image[1]), ())


def _factored(context: Context, x: Tensor, matrix: Any) -> tuple[int, Any] | None:
    """Sign and F x of x^T P x = +-|F x|^2; ``None`` where x is not affine, or the shapes are others."""
    matrix = as_tensor(matrix)
    if len(x.shape) != 1 or len(matrix.shape) != 2 or not x.expression.is_affine():
        return None
    sign, factor = context.factor(matrix)
    if factor.expression.parameters():
        x = Tensor(context.free_of_parameters(x.expression), x.shape)
    return sign, factor.matrix() @ x.expression
