"""Reductions over dimensions, norms, softmax and order statistics.

The entries are laid out as a matrix with one column for each group that is reduced together. Where the
largest entry is needed as a shift only, its floor serves: any shift is right, and floor has derivative
zero, so nothing of it remains in the derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import casadi as ca
import numpy as np
import torch

from ddn_solvers.lowering.casadi_elementwise import safe_sqrt
from ddn_solvers.lowering.casadi_tensor import Call, Tensor, broadcast, column, gather, lowers

Dims = int | Sequence[int] | None


class Groups:
    """A tensor as a matrix, (size of a group, number of groups)."""

    def __init__(self, tensor: Any, dims: Dims) -> None:
        shape = tuple(tensor.shape)
        natural = list(range(len(shape)))
        chosen = [dims] if isinstance(dims, int) else list(dims or natural)
        reduced = sorted({d % len(shape) for d in chosen}) if shape else []
        kept = [d for d in natural if d not in reduced]
        self.size = math.prod(shape[d] for d in reduced)
        self.count = math.prod(shape[d] for d in kept)
        self._transposed = self.count > 1 and reduced + kept == natural
        self._order: torch.Tensor | None = None
        entries = column(tensor)
        if self._transposed:
            self.matrix = ca.reshape(entries, self.count, self.size).T
            return
        if kept + reduced != natural and self.count > 1:
            order = torch.arange(math.prod(shape)).reshape(shape).permute(kept + reduced)
            self._order = order.reshape(-1)
            entries = gather(entries, self._order)
        self.matrix = ca.reshape(entries, self.size, self.count)

    def restore(self, values: Any) -> Any:
        """A matrix of this layout as a column in the tensor's order."""
        entries = ca.vec(values.T if self._transposed else values)
        return entries if self._order is None else gather(entries, torch.argsort(self._order))


def repeated(row: Any, size: int) -> Any:
    """A row as a matrix with ``size`` equal rows."""
    return ca.repmat(row, size, 1)


def folded(matrix: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """All rows of a matrix combined, pairwise in a tree."""
    while (size := matrix.shape[0]) > 1:
        half = size // 2
        rest = matrix[2 * half :, :]
        matrix = ca.vertcat(combine(matrix[:half, :], matrix[half : 2 * half, :]), rest)
    return matrix


@lowers("sum")
def sum_(call: Call, x: Any, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return ca.vec(ca.sum1(Groups(x, dim).matrix))


@lowers("mean")
def mean(call: Call, x: Any, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Any:
    groups = Groups(x, dim)
    return ca.vec(ca.sum1(groups.matrix)) / groups.size


@lowers("prod")
def prod(call: Call, x: Any, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return ca.vec(folded(Groups(x, dim).matrix, lambda a, b: a * b))


@lowers("any")
def any_(call: Call, x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return ca.vec(folded(Groups(x, dim).matrix != 0, ca.logic_or))


@lowers("all")
def all_(call: Call, x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return ca.vec(folded(Groups(x, dim).matrix != 0, ca.logic_and))


@lowers("cumsum")
def cumsum(call: Call, x: Any, dim: int, dtype: Any = None) -> Any:
    groups = Groups(x, dim)
    lower = ca.DM(ca.Sparsity.lower(groups.size), 1)
    return groups.restore(ca.mtimes(lower, groups.matrix))


@lowers("cumprod")
def cumprod(call: Call, x: Any, dim: int, dtype: Any = None) -> Any:
    groups = Groups(x, dim)
    rows = ca.vertsplit(groups.matrix)
    for i in range(1, groups.size):
        rows[i] = rows[i - 1] * rows[i]
    return groups.restore(ca.vertcat(*rows))


def _variance(x: Any, dim: Dims, correction: float | None) -> Any:
    groups = Groups(x, dim)
    centred = groups.matrix - repeated(ca.sum1(groups.matrix) / groups.size, groups.size)
    return ca.vec(ca.sum1(centred**2)) / (groups.size - (1 if correction is None else correction))


@lowers("var.correction")
def var(call: Call, x: Any, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> Any:
    return _variance(x, dim, correction)


@lowers("var_mean.correction")
def var_mean(
    call: Call, x: Any, dim: Dims = None, correction: float | None = None, keepdim: bool = False
) -> tuple[Any, Any]:
    return _variance(x, dim, correction), mean(call, x, dim)


@lowers("std.correction")
def std(call: Call, x: Any, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> Any:
    result = safe_sqrt(_variance(x, dim, correction))
    call.kink(result)
    return result


@lowers("std_mean.correction")
def std_mean(
    call: Call, x: Any, dim: Dims = None, correction: float | None = None, keepdim: bool = False
) -> tuple[Any, Any]:
    return std(call, x, dim, correction), mean(call, x, dim)


# ---------------------------------------------------------------------------- exponentials


def _shift(groups: Groups) -> Any:
    return repeated(ca.floor(_largest(groups.matrix)), groups.size)


@lowers("logsumexp")
def logsumexp(call: Call, x: Any, dim: Dims, keepdim: bool = False) -> Any:
    groups = Groups(x, dim)
    shift = ca.floor(_largest(groups.matrix))
    total = ca.sum1(ca.exp(groups.matrix - repeated(shift, groups.size)))
    return ca.vec(ca.log(total) + shift)


@lowers("softmax", "_softmax")
def softmax(call: Call, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    groups = Groups(x, dim)
    weights = ca.exp(groups.matrix - _shift(groups))
    return groups.restore(weights / repeated(ca.sum1(weights), groups.size))


@lowers("log_softmax", "_log_softmax")
def log_softmax(call: Call, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    groups = Groups(x, dim)
    shifted = groups.matrix - _shift(groups)
    return groups.restore(shifted - repeated(ca.log(ca.sum1(ca.exp(shifted))), groups.size))


# ---------------------------------------------------------------------------- largest and smallest


def _largest(matrix: Any) -> Any:
    """Row of column maxima, as a value only: its derivative is not torch's."""
    return folded(matrix, ca.fmax)


def _first_of_largest(matrix: Any) -> Any:
    """1 at the first largest entry of each column, else 0."""
    size, count = matrix.shape
    place = ca.MX(ca.repmat(ca.DM(np.arange(size)), 1, count))
    is_largest = matrix == repeated(_largest(matrix), size)
    first = folded(ca.if_else(is_largest, place, size), ca.fmin)
    return place == repeated(first, size)


def _kink_at_ties(call: Call, matrix: Any) -> None:
    """The largest entry minus the runner-up, each with the derivative of the entry that it is."""
    size = matrix.shape[0]
    if not call.varies or size < 2:
        return
    first = _first_of_largest(matrix)
    second = _first_of_largest(ca.if_else(first, -math.inf, matrix))
    call.kink(ca.sum1((first - second) * matrix))


def _shared_largest(call: Call, matrix: Any) -> Any:
    """Column maxima; the derivative is divided evenly among entries that tie."""
    _kink_at_ties(call, matrix)
    size = matrix.shape[0]
    is_largest = matrix == repeated(_largest(matrix), size)
    return ca.vec(ca.sum1(is_largest * matrix) / ca.sum1(is_largest))


@lowers("amax", "max")
def amax(call: Call, x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return _shared_largest(call, Groups(x, dim).matrix)


@lowers("amin", "min")
def amin(call: Call, x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return -_shared_largest(call, -Groups(x, dim).matrix)


@lowers("max.dim")
def max_over(call: Call, x: Any, dim: int, keepdim: bool = False) -> tuple[Any, None]:
    return _chosen_largest(call, Groups(x, dim).matrix), None


@lowers("min.dim")
def min_over(call: Call, x: Any, dim: int, keepdim: bool = False) -> tuple[Any, None]:
    return -_chosen_largest(call, -Groups(x, dim).matrix), None


def _chosen_largest(call: Call, matrix: Any) -> Any:
    """Column maxima; the derivative goes to the first of the entries that tie."""
    _kink_at_ties(call, matrix)
    return ca.vec(ca.sum1(_first_of_largest(matrix) * matrix))


# ---------------------------------------------------------------------------- order statistics


def _ranked(matrix: Any, first: int, stop: int) -> Any:
    """Rows ``first`` to ``stop`` of the matrix with its columns sorted, ties in order of appearance.

    The rank of an entry is the number of those that come before it; all pairs are compared, so the cost
    is quadratic in the size of a group while the expression stays short.
    """
    size, count = matrix.shape
    mine = matrix[np.repeat(np.arange(size), size).tolist(), :]
    other = ca.repmat(matrix, size, 1)
    earlier = ca.DM(np.tri(size, size, -1).reshape(-1))
    before = ca.logic_or(other < mine, ca.logic_and(other == mine, ca.repmat(earlier, 1, count)))
    rank = ca.reshape(ca.sum1(ca.reshape(before, size, size * count)), size, count)
    wanted = stop - first
    target = ca.repmat(ca.DM(np.repeat(np.arange(first, stop), size)), 1, count)
    chosen = (ca.repmat(rank, wanted, 1) == target) * ca.repmat(matrix, wanted, 1)
    return ca.reshape(ca.sum1(ca.reshape(chosen, size, wanted * count)), wanted, count)


def _sorted(call: Call, matrix: Any, descending: bool, first: int, stop: int) -> Any:
    """Rows ``first`` to ``stop`` of the sorted columns; neighbours that tie are kinks."""
    size = matrix.shape[0]
    low, high = max(first - 1, 0), min(stop + 1, size)
    rows = _ranked(-matrix if descending else matrix, low, high)
    call.kink(rows[1:, :] - rows[:-1, :])
    rows = rows[first - low : stop - low, :]
    return -rows if descending else rows


def _spread_along(call: Call, x: Any, dim: int, rows: Any) -> Any:
    """Rows of order statistics as a column in the order of the result, whose ``dim`` counts them."""
    shape = list(x.shape)
    if not shape:
        return ca.vec(rows)
    dim %= len(shape)
    shape[dim] = rows.shape[0]
    order = [d for d in range(len(shape)) if d != dim] + [dim]
    places = torch.arange(math.prod(shape)).reshape([shape[d] for d in order])
    return gather(ca.vec(rows), places.permute([order.index(d) for d in range(len(shape))]))


@lowers("sort.default")
def sort(call: Call, x: Any, dim: int = -1, descending: bool = False) -> tuple[Any, None]:
    groups = Groups(x, dim)
    return groups.restore(_sorted(call, groups.matrix, descending, 0, groups.size)), None


@lowers("sort.stable")
def stable_sort(
    call: Call, x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Any, None]:
    return sort(call, x, dim, descending)


@lowers("topk")
def topk(
    call: Call, x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Any, None]:
    rows = _sorted(call, Groups(x, dim).matrix, largest, 0, k)
    return _spread_along(call, x, dim, rows), None


@lowers("kthvalue")
def kthvalue(call: Call, x: Any, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Any, None]:
    return ca.vec(_sorted(call, Groups(x, dim).matrix, False, k - 1, k)), None


@lowers("median.dim")
def median_over(call: Call, x: Any, dim: int, keepdim: bool = False) -> tuple[Any, None]:
    return kthvalue(call, x, (Groups(x, dim).size + 1) // 2, dim)


@lowers("median.default")
def median(call: Call, x: Any) -> Any:
    middle = (math.prod(x.shape) - 1) // 2
    return ca.vec(_sorted(call, column(x), False, middle, middle + 1))


# ---------------------------------------------------------------------------- norms


@lowers("linalg_vector_norm")
def vector_norm(
    call: Call, x: Any, ord: float = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    return _norm(call, Groups(x, dim).matrix, ord)


@lowers("cdist", "_cdist_forward")
def cdist(call: Call, x: Any, y: Any, p: float = 2, *_: Any) -> Any:
    left, right = (*x.shape[:-1], 1, x.shape[-1]), (*y.shape[:-2], 1, *y.shape[-2:])
    shape = torch.broadcast_shapes(left, right)
    difference = broadcast(_reshaped(x, left), shape) - broadcast(_reshaped(y, right), shape)
    return _norm(call, ca.reshape(difference, shape[-1], math.prod(shape[:-1])), p)


def _reshaped(tensor: Any, shape: tuple[int, ...]) -> Any:
    return Tensor(column(tensor), tuple(shape))


def _norm(call: Call, matrix: Any, order: float) -> Any:
    """The p-norm of each column. Its derivative where the norm is zero is zero."""
    if order == 2:
        norms = safe_sqrt(ca.sum1(matrix**2))
        call.kink(norms)
    elif order == 1:
        call.kink(matrix)
        norms = ca.sum1(ca.fabs(matrix))
    elif abs(order) == math.inf:
        sign = math.copysign(1, order)
        norms = sign * _shared_largest(call, sign * ca.fabs(matrix))
    elif order == 0:
        call.kink(matrix)
        norms = ca.sum1(matrix != 0)
    else:
        total = ca.sum1(ca.fabs(matrix) ** order)
        zero = total == 0
        norms = (1 - zero) * (total + zero) ** (1 / order)
        call.kink(matrix if order < 1 else norms)
    return ca.vec(norms)
