"""What each atom of CVXPY is in torch.

An atom is looked up by the name of its class or of a class that it derives from, so that nothing here
imports CVXPY. There are four kinds: *elementwise* ones are torch functions of the arguments; *reductions*
also take the axes; *movements* (reshape in Fortran order, indexing, stacking, ...) are run by CVXPY itself
on an array of positions and become one gather; the rest has a rule of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ddn_solvers.arrays import Array
from ddn_solvers.errors import ProblemError
from ddn_solvers.imported.formula import FormulaBuilder, Operation
from ddn_solvers.layout import Shape

Atom = Any  # cvxpy.Atom: CVXPY ships no type information
Dims = tuple[int, ...]
Rule = Callable[[Atom], tuple[Operation, dict[str, Any]]]

# --- elementwise ------------------------------------------------------------------------------------------


def _sum_of(*terms: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.add, terms)


def _largest_of(*terms: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.maximum, terms)


def _smallest_of(*terms: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.minimum, terms)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _logistic(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(
        x, threshold=50.0
    )  # beyond it, exp(-x) is below rounding: exact, where torch's 20 is not


def _relative_entropy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.xlogy(x, x / y)


def _divergence(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.xlogy(x, x / y) - x + y


def _x_exp(x: torch.Tensor) -> torch.Tensor:
    return x * torch.exp(x)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y if x.dim() == 0 or y.dim() == 0 else x @ y


ELEMENTWISE: dict[str, Operation] = {
    "AddExpression": _sum_of,
    "NegExpression": torch.neg,
    "MulExpression": _product,
    "multiply": torch.mul,
    "DivExpression": torch.div,
    "Wrap": _identity,
    "conj": _identity,
    "real": _identity,
    "kron": torch.kron,
    "abs": torch.abs,
    "asinh": torch.asinh,
    "atanh": torch.atanh,
    "cos": torch.cos,
    "entr": torch.special.entr,
    "exp": torch.exp,
    "kl_div": _divergence,
    "log": torch.log,
    "log1p": torch.log1p,
    "logistic": _logistic,
    "maximum": _largest_of,
    "minimum": _smallest_of,
    "normcdf": torch.special.ndtr,
    "rel_entr": _relative_entropy,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "xexp": _x_exp,
}

# --- reductions over axes: operation(x, dim, keepdim) ----------------------------------------------------


def _sum(x: torch.Tensor, dim: Dims, keepdim: bool) -> torch.Tensor:
    return x.sum(dim, keepdim=keepdim)


def _norm(x: torch.Tensor, dim: Dims, keepdim: bool, p: float) -> torch.Tensor:
    if p >= 1:
        return torch.linalg.vector_norm(x, p, dim, keepdim=keepdim)
    return x.pow(p).sum(dim, keepdim=keepdim).pow(1 / p)  # on x >= 0, where CVXPY defines it


def _sum_of_squares(x: torch.Tensor, one: torch.Tensor, dim: Dims, keepdim: bool) -> torch.Tensor:
    return x.square().sum(dim, keepdim=keepdim)


def _squares_over(x: torch.Tensor, y: torch.Tensor, dim: Dims, keepdim: bool) -> torch.Tensor:
    return x.square().sum(dim, keepdim=keepdim) / y.reshape(())


def _prod(x: torch.Tensor, dim: Dims, keepdim: bool) -> torch.Tensor:
    for axis in sorted(dim, reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _as_rows(x: torch.Tensor, dim: Dims) -> torch.Tensor:
    """The reduced axes as the last one."""
    kept = [d for d in range(x.dim()) if d not in dim]
    return x.permute(*kept, *dim).reshape([*(x.shape[d] for d in kept), -1])


def _sum_largest(x: torch.Tensor, dim: Dims, keepdim: bool, k: float) -> torch.Tensor:
    rows, whole = _as_rows(x, dim), math.floor(k)
    if k >= rows.shape[-1]:
        total = rows.sum(-1)
    elif whole == k:
        total = rows.topk(whole).values.sum(-1)
    else:  # a part of the next one
        values = rows.topk(whole + 1).values
        total = values[..., :whole].sum(-1) + (k - whole) * values[..., whole]
    return total.reshape([1 if d in dim else n for d, n in enumerate(x.shape)]) if keepdim else total


def _geometric_mean(x: torch.Tensor, dim: Dims, keepdim: bool, weights: torch.Tensor) -> torch.Tensor:
    return (weights * x.log()).sum(dim, keepdim=keepdim).exp()


def _plain(operation: Operation) -> Rule:
    return lambda atom: (operation, {})


def _geometric_mean_rule(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    weights, shape = np.array([float(weight) for weight in atom.w]), atom.args[0].shape
    reduced = _axes(atom)["dim"]
    if len(weights) != math.prod(shape[d] for d in reduced):
        raise ProblemError(
            f"{quoted(atom)} is a geo_mean with a zero weight", fix="Leave out the entries without weight."
        )
    weights = np.transpose(weights.reshape([shape[d] for d in reduced], order="F"), np.argsort(reduced))
    weights = weights.reshape([n if d in reduced else 1 for d, n in enumerate(shape)])
    return _geometric_mean, {"weights": torch.from_numpy(weights)}


def _squares_rule(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    over = atom.args[1]
    plain = over.is_constant() and not over.parameters() and np.all(over.value == 1.0)
    return (_sum_of_squares if plain else _squares_over), {}


REDUCTIONS: dict[str, Rule] = {
    "Sum": _plain(_sum),
    "max": _plain(torch.amax),
    "min": _plain(torch.amin),
    "log_sum_exp": _plain(torch.logsumexp),
    "norm1": lambda atom: (_norm, {"p": 1.0}),
    "norm_inf": lambda atom: (_norm, {"p": math.inf}),
    "Pnorm": lambda atom: (_norm, {"p": float(atom.original_p)}),
    "Prod": _plain(_prod),
    "quad_over_lin": _squares_rule,
    "sum_largest": lambda atom: (_sum_largest, {"k": float(atom.k)}),
    "GeoMean": _geometric_mean_rule,
}

# --- movements ------------------------------------------------------------------------------------------------

MOVEMENTS = frozenset(
    "Concatenate Hstack Vstack diag_mat diag_vec index reshape special_index upper_tri".split()
)


def _gathered(*parts: torch.Tensor, positions: torch.Tensor, zeros: bool) -> torch.Tensor:
    flat = [part.reshape(-1) for part in parts]
    if zeros:
        flat.append(torch.zeros(1, dtype=torch.float64))
    return (flat[0] if len(flat) == 1 else torch.cat(flat))[positions]


def _sliced(x: torch.Tensor, key: tuple[slice, ...], shape: Shape) -> torch.Tensor:
    return x[key].reshape(shape)


def _movement(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    kind = type(atom).__name__
    if kind == "reshape" and atom.order == "C":
        return torch.reshape, {"shape": tuple(atom.shape)}
    if kind == "index" and all(isinstance(part, slice) and (part.step or 1) > 0 for part in atom.key):
        return _sliced, {"key": tuple(atom.key), "shape": tuple(atom.shape)}
    numbered, start = [], 1  # 0 stands for an entry that the atom fills in
    for argument in atom.args:
        count = math.prod(argument.shape)
        numbered.append(np.arange(start, start + count, dtype=np.float64).reshape(argument.shape))
        start += count
    places = np.reshape(np.asarray(atom.numeric(numbered)), atom.shape).astype(np.int64)
    zeros = not places.all()
    positions = torch.tensor(np.where(places == 0, start, places) - 1)
    return _gathered, {"positions": positions, "zeros": zeros}


# --- rules of their own --------------------------------------------------------------------------------------


def _power(x: torch.Tensor, p: float) -> torch.Tensor:
    if p in SPECIAL_POWERS:
        return SPECIAL_POWERS[p](x)
    if p < 0 and p.is_integer():
        # Not 1 / x^n, which goes on below zero, where CVXPY's power is not defined, and is not convex there.
        return _power(x.rsqrt(), -2 * p)
    return x.pow(p)


SPECIAL_POWERS: dict[float, Operation] = {0.5: torch.sqrt, 1.0: _identity, 2.0: torch.square}


def _power_rule(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    if atom.p.parameters():
        raise ProblemError(f"the exponent of {quoted(atom)} is a parameter", expected="a number")
    return _power, {"p": float(np.squeeze(atom.p.value))}


def _huber(x: torch.Tensor, delta: float) -> torch.Tensor:
    return 2 * F.huber_loss(x, torch.zeros((), dtype=x.dtype).expand(x.shape), reduction="none", delta=delta)


def _huber_rule(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    if atom.M.parameters():
        raise ProblemError(f"the threshold of {quoted(atom)} is a parameter", expected="a number")
    return _huber, {"delta": float(np.squeeze(atom.M.value))}


def _quadratic_form(x: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    x = x.reshape(-1)
    return x @ (P @ x)


def _matrix_fraction(X: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    return (X * torch.linalg.solve(P, X)).sum()


def _log_determinant(X: torch.Tensor) -> torch.Tensor:
    return torch.logdet(0.5 * (X + X.mT))  # as CVXPY does, and symmetric for whoever reads one triangle


def _trace_of_inverse(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(0.5 * (X + X.mT)).diagonal().sum()


def _largest_eigenvalue(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(0.5 * (X + X.mT))[..., -1]


def _singular_values(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(X)


def _nuclear_norm(X: torch.Tensor) -> torch.Tensor:
    return _singular_values(X).sum()


def _spectral_norm(X: torch.Tensor) -> torch.Tensor:
    return _singular_values(X)[0]


def _trace(X: torch.Tensor) -> torch.Tensor:
    return X.diagonal(dim1=-2, dim2=-1).sum(-1)


def _convolution(c: torch.Tensor, x: torch.Tensor, positions: torch.Tensor, shape: Shape) -> torch.Tensor:
    """c * x as the Toeplitz matrix of c times x."""
    padded = torch.cat([c.reshape(-1), torch.zeros(1, dtype=torch.float64)])
    return (padded[positions] @ x.reshape(-1)).reshape(shape)


def _convolution_rule(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    m, n = (math.prod(argument.shape) for argument in atom.args)
    lag = np.arange(m + n - 1)[:, None] - np.arange(n)
    positions = np.where((lag >= 0) & (lag < m), lag, m)
    return _convolution, {"positions": torch.from_numpy(positions), "shape": tuple(atom.shape)}


def _cumulative(x: torch.Tensor, dim: int | None) -> torch.Tensor:
    return x.reshape(-1).cumsum(0) if dim is None else x.cumsum(dim)


def _transposed(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    dims = tuple(reversed(range(len(atom.shape)))) if atom.axes is None else tuple(atom.axes)
    return torch.permute, {"dims": dims}


def _expanded(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    return torch.broadcast_to, {"size": tuple(atom.shape)}


RULES: dict[str, Rule] = {
    "Power": _power_rule,
    "huber": _huber_rule,
    "QuadForm": _plain(_quadratic_form),
    "MatrixFrac": _plain(_matrix_fraction),
    "log_det": _plain(_log_determinant),
    "tr_inv": _plain(_trace_of_inverse),
    "lambda_max": _plain(_largest_eigenvalue),
    "normNuc": _plain(_nuclear_norm),
    "sigma_max": _plain(_spectral_norm),
    "Trace": _plain(_trace),
    "conv": _convolution_rule,
    "convolve": _convolution_rule,
    "cumsum": lambda atom: (_cumulative, {"dim": atom.axis}),
    "transpose": _transposed,
    "Promote": _expanded,
    "broadcast_to": _expanded,
}

# --- expressions ------------------------------------------------------------------------------------------------


def lowered(builder: FormulaBuilder, expression: Any, names: Mapping[int, str]) -> int:
    """Place of the value of a CVXPY expression.

    Args:
        builder: Takes the steps.
        expression: Any expression of CVXPY's.
        names: Name of each variable and parameter by its CVXPY id.

    Raises:
        ProblemError: An atom has no counterpart in torch; the message names it.
    """
    places: dict[int, int] = {}
    constant: set[int] = set()
    pending = [expression]
    while pending:
        node = pending[-1]
        missing = [argument for argument in node.args if id(argument) not in places]
        if missing:
            pending.extend(missing)
            continue
        pending.pop()
        if node.args and not all(id(argument) in constant for argument in node.args):
            operation, options = _rule(node)
            builder.source = quoted(node)
            inputs = [places[id(argument)] for argument in node.args]
            places[id(node)] = builder.step(operation, *inputs, **options)
        elif getattr(node, "id", None) in names:
            places[id(node)] = builder.argument(names[node.id])
        else:  # whatever it is made of, CVXPY knows its value
            constant.add(id(node))
            places[id(node)] = builder.constant(_number(node))
    return places[id(expression)]


def _number(expression: Any) -> Array:
    value = expression.value
    if np.iscomplexobj(value):
        raise ProblemError(f"{quoted(expression)} is complex", expected="real numbers")
    return value.toarray() if hasattr(value, "toarray") else np.asarray(value, dtype=np.float64)


def _rule(atom: Atom) -> tuple[Operation, dict[str, Any]]:
    """The operation of an atom, by the first of its classes that a table knows."""
    for name in (cls.__name__ for cls in type(atom).__mro__):
        if name in ELEMENTWISE:
            return ELEMENTWISE[name], {}
        if name in REDUCTIONS:
            operation, options = REDUCTIONS[name](atom)
            return operation, options | _axes(atom)
        if name in MOVEMENTS:
            return _movement(atom)
        if name in RULES:
            return RULES[name](atom)
    raise ProblemError(
        f"CVXPY's atom {type(atom).__name__!r} in {quoted(atom)} is not known here",
        fix="Write it with other atoms, or the problem as a ddn.Problem, in torch.",
    )


def _axes(atom: Atom) -> dict[str, Any]:
    rank = len(atom.args[0].shape)
    axis = atom.axis if atom.axis is not None else tuple(range(rank))
    dims = axis if isinstance(axis, tuple) else (axis,)
    return {"dim": tuple(int(dim) % rank for dim in dims), "keepdim": bool(atom.keepdims)}


def quoted(expression: Any) -> str:
    """An expression or constraint for a message, not longer than a line."""
    text = str(expression)
    return f"'{text}'" if len(text) <= 80 else f"'{text[:77]}...'"
