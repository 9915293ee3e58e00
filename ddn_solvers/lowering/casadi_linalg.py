"""Products, factorisations and convolutions; products stay whole.

The transpose of a row-major m x n matrix is its column reshaped to n x m, so C = A B is computed as
C^T = B^T A^T without transposing anything.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import casadi as ca
import torch

from ddn_solvers.lowering.casadi_reductions import softmax
from ddn_solvers.lowering.casadi_tensor import (
    Call,
    Tensor,
    broadcast,
    column,
    concatenate,
    gather,
    lowers,
    matrix,
    row_major,
)

NOT_DIFFERENTIATED = {"is_diff_in": [False]}  # of a CasADi function


def _part(tensor: Any, start: int, shape: tuple[int, ...]) -> Any:
    """``shape`` many entries of a tensor from ``start`` on, in row-major order."""
    stop = start + math.prod(shape)
    if isinstance(tensor, torch.Tensor):
        return tensor.reshape(-1)[start:stop].reshape(shape)
    entries = tensor.column if stop - start == tensor.size else tensor.column[start:stop]
    return Tensor(entries, shape, tensor.dtype, tensor.varies)


def _expanded(tensor: Any, shape: tuple[int, ...]) -> Any:
    if tuple(tensor.shape) == shape:
        return tensor
    if isinstance(tensor, torch.Tensor):
        return tensor.expand(shape)
    return Tensor(broadcast(tensor, shape), shape, tensor.dtype, tensor.varies)


def _product(left: Any, right: Any) -> Any:
    """(m, n) @ (n, k), a row-major column."""
    (rows, inner), columns = left.shape, right.shape[1]
    transposed = ca.mtimes(
        matrix(right, inner, columns, transpose=True), matrix(left, rows, inner, transpose=True)
    )
    return ca.densify(ca.vec(transposed))


@lowers("matmul", "mm", "mv", "bmm", "dot", "vdot")
def matmul(call: Call, x: Any, y: Any) -> Any:
    if len(x.shape) == len(y.shape) == 1:
        return ca.dot(column(x), column(y))
    if len(x.shape) == 1:
        x = _part(x, 0, (1, *x.shape))
    if len(y.shape) == 1:
        y = _part(y, 0, (*y.shape, 1))
    (rows, inner), columns = x.shape[-2:], y.shape[-1]
    if len(y.shape) == 2:  # all matrices of x, one below the other
        return _product(_part(x, 0, (math.prod(x.shape[:-1]), inner)), y)
    batch = tuple(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    x, y = _expanded(x, (*batch, rows, inner)), _expanded(y, (*batch, inner, columns))
    return concatenate(
        [
            _product(
                _part(x, i * rows * inner, (rows, inner)), _part(y, i * inner * columns, (inner, columns))
            )
            for i in range(math.prod(batch))
        ]
    )


@lowers("linear")
def linear(call: Call, x: Any, weight: Any, bias: Any = None) -> Any:
    if len(weight.shape) == 1:
        return matmul(call, x, weight) + (0 if bias is None else column(bias))
    rows, (outputs, inner) = math.prod(x.shape[:-1]), weight.shape
    transposed = ca.mtimes(matrix(weight, outputs, inner), matrix(x, rows, inner, transpose=True))
    result = ca.densify(ca.vec(transposed))
    return result if bias is None else result + broadcast(bias, call.shape)


@lowers("addmm", "addmv", "baddbmm")
def addmm(call: Call, x: Any, left: Any, right: Any, beta: float = 1, alpha: float = 1) -> Any:
    return beta * broadcast(x, call.shape) + alpha * matmul(call, left, right)


@lowers("outer", "ger")
def outer(call: Call, x: Any, y: Any) -> Any:
    return _product(_part(x, 0, (*x.shape, 1)), _part(y, 0, (1, *y.shape)))


@lowers("scaled_dot_product_attention")
def attention(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale Q K^T + mask) V"""
    if dropout_p > 0:
        raise call.refusal(
            "depends on random numbers. Put the module into evaluation mode, or pass dropout_p=0."
        )
    if enable_gqa:
        raise call.refusal("is not lowered for grouped queries. Repeat keys and values by repeat_interleave.")
    batch = tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]))
    shape = (*batch, query.shape[-2], key.shape[-2])
    scores = matmul(call, query, _transposed(key)) * (
        1 / math.sqrt(query.shape[-1]) if scale is None else scale
    )
    if is_causal:
        attn_mask = torch.ones(shape[-2:], dtype=torch.bool).tril()
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(~attn_mask, -math.inf)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = ca.if_else(broadcast(attn_mask, shape), scores, -math.inf)
    elif attn_mask is not None:
        scores += broadcast(attn_mask, shape)
    weights = softmax(call, Tensor(scores, shape), -1)
    return matmul(call, Tensor(weights, shape), value)


def _transposed(tensor: Any) -> Any:
    """Its matrices, over the batch, transposed."""
    if isinstance(tensor, torch.Tensor):
        return tensor.mT
    places = torch.arange(tensor.size).reshape(tensor.shape).mT
    return Tensor(gather(tensor.column, places), tuple(places.shape), tensor.dtype, tensor.varies)


# ---------------------------------------------------------------------------- square matrices


def matrices(tensor: Any) -> list[Any]:
    """The matrices in the last two dimensions, over the batch."""
    rows, columns = tensor.shape[-2:]
    batch = math.prod(tensor.shape[:-2])
    return [matrix(_part(tensor, i * rows * columns, (rows, columns)), rows, columns) for i in range(batch)]


def stacked(values: list[Any]) -> Any:
    """Matrices one below the other, as a row-major column."""
    return concatenate([row_major(value) for value in values])


@lowers("linalg_solve", "_linalg_solve_ex")
def solve(call: Call, a: Any, b: Any, left: bool = True, check_errors: bool = False) -> Any:
    vector = len(b.shape) == 1 or tuple(b.shape) == tuple(a.shape[:-1])
    if vector:
        b = _part(b, 0, (*b.shape, 1))
    batch = tuple(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    coefficients = matrices(_expanded(a, (*batch, *a.shape[-2:])))
    targets = matrices(_expanded(b, (*batch, *b.shape[-2:])))
    solved = [
        ca.solve(m, ca.densify(rhs)) if left or vector else ca.solve(m.T, ca.densify(rhs.T)).T
        for m, rhs in zip(coefficients, targets, strict=True)
    ]
    return _first_of(call, stacked(solved))


@lowers("linalg_solve_triangular")
def solve_triangular(
    call: Call, a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    if unitriangular:
        raise call.refusal("is not lowered for unit triangular matrices. Use torch.linalg.solve.")
    size = a.shape[-1]
    keep = torch.ones(size, size, dtype=torch.float64)
    keep = (keep.triu() if upper else keep.tril()).expand(tuple(a.shape))
    triangle = Tensor(column(a) * column(keep), tuple(a.shape))
    return solve(call, triangle, b, left)


@lowers("linalg_inv", "linalg_inv_ex", "inverse")
def inverse(call: Call, a: Any, check_errors: bool = False) -> Any:
    return _first_of(call, stacked([ca.inv(m) for m in matrices(a)]))


EXPANDED = 8  # size of a matrix up to which its determinant is expanded into minors, 2^size of them


@lowers("linalg_det", "_linalg_det", "det")
def det(call: Call, a: Any) -> Any:
    return _first_of(call, _determinants(a))


def _determinants(a: Any) -> Any:
    """As the polynomials that they are, with all derivatives, also at singular matrices; large ones by their factors."""
    expanded = a.shape[-1] <= EXPANDED
    return concatenate([_expansion(m) if expanded else ca.det(m) for m in matrices(a)])


def _expansion(m: Any) -> Any:
    """Laplace's, row by row from the last: the minors of the rows so far, over all choices of columns.

    As exact as elimination with pivots: no difference of products is divided again.
    """
    size = m.shape[0]
    minors: Any = ca.MX(1)
    place: dict[tuple[int, ...], int] = {(): 0}
    for count in range(1, size + 1):
        row, choices = ca.densify(m[size - count, :].T), list(itertools.combinations(range(size), count))
        terms = []
        for i in range(count):
            column_of = torch.tensor([choice[i] for choice in choices])
            rest = torch.tensor([place[choice[:i] + choice[i + 1 :]] for choice in choices])
            terms.append((-1) ** i * gather(row, column_of) * gather(minors, rest))
        minors, place = sum(terms), {choice: i for i, choice in enumerate(choices)}
    return minors


@lowers("linalg_slogdet", "_linalg_slogdet", "slogdet")
def slogdet(call: Call, a: Any) -> tuple[Any, ...]:
    determinants = _determinants(a)
    outputs = [ca.sign(determinants), ca.log(ca.fabs(determinants)), None, None]
    return tuple(outputs[: len(call.op._schema.returns)])


@lowers("logdet")
def logdet(call: Call, a: Any) -> Any:
    return ca.log(_determinants(a))


@lowers("linalg_cholesky", "linalg_cholesky_ex", "cholesky")
def cholesky(call: Call, a: Any, upper: bool = False, check_errors: bool = False) -> Any:
    factors = [_cholesky(mirrored(call, m, upper)) for m in matrices(a)]
    return _first_of(call, stacked([factor.T if upper else factor for factor in factors]))


def mirrored(call: Call, m: Any, upper: bool) -> Any:
    """The symmetric matrix that has this one's lower or upper triangle, which is all that torch reads.

    Of variables the derivative is that of the triangle. Of parameters it is shared between both, as torch has it: the
    same where the matrix is made to be symmetric.
    """
    return _of_triangle(m, upper) if call.varies else (m + m.T) / 2 + _unsymmetric(m.shape[0], upper)(m)


def _of_triangle(m: Any, upper: bool) -> Any:
    lower = ca.tril(m.T if upper else m)
    return ca.densify(lower + ca.tril(lower, False).T)


@functools.cache
def _unsymmetric(size: int, upper: bool) -> Any:
    m = ca.MX.sym("m", size, size)
    return ca.Function("unsymmetric", [m], [_of_triangle(m, upper) - (m + m.T) / 2], NOT_DIFFERENTIATED)


def _cholesky(rest: Any) -> Any:
    """Right-looking: one column a step, its outer product taken from what is left."""
    size = rest.shape[0]
    columns = []
    for done in range(size):
        current = rest[:, 0] / ca.sqrt(rest[0, 0])
        columns.append(ca.vertcat(ca.MX.zeros(done, 1), current))
        rest = rest[1:, 1:] - ca.mtimes(current[1:], current[1:].T)
    return ca.horzcat(*columns)


TAYLOR_DEGREE, SQUARINGS, LARGEST_NORM = 18, 8, 2.0**8


@lowers("linalg_matrix_exp", "matrix_exp")
def matrix_exp(call: Call, a: Any) -> Any:
    return stacked([_exponential(m) for m in matrices(a)])


def _exponential(m: Any) -> Any:
    """(Taylor polynomial of M / 2^8)^(2^8): exact to rounding for a 1-norm up to 2^8, NaN beyond."""
    identity = ca.MX.eye(m.shape[0])
    scaled = m / 2**SQUARINGS
    result = identity
    for degree in range(TAYLOR_DEGREE, 0, -1):
        result = identity + ca.mtimes(scaled, result) / degree
    for _ in range(SQUARINGS):
        result = ca.mtimes(result, result)
    norm = ca.mmax(ca.sum1(ca.fabs(m)))
    return ca.if_else(ca.repmat(norm <= LARGEST_NORM, *m.shape), result, math.nan)


def _first_of(call: Call, result: Any) -> Any:
    """The result alone, or followed by nothing for the other outputs (pivots, status codes)."""
    others = len(call.op._schema.returns) - 1
    return (result, *[None] * others) if others else result


# ---------------------------------------------------------------------------- convolutions, pooling


@lowers("convolution")
def convolution(
    call: Call,
    x: Any,
    weight: Any,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    if transposed:
        raise call.refusal("is not lowered. Write it as a product with a matrix.")
    samples, channels = x.shape[:2]
    outputs, kernel = weight.shape[0], list(weight.shape[2:])
    # Number the entries from 1 so that the padding is 0, and slide the kernel over the numbers.
    places = torch.arange(1, 1 + math.prod(x.shape)).reshape(x.shape)
    places = torch.nn.functional.pad(places, [p for p in reversed(padding) for _ in range(2)])
    for d, extent in enumerate(kernel):
        places = places.unfold(2 + d, (extent - 1) * dilation[d] + 1, stride[d])[..., :: dilation[d]]
    spatial = list(range(2, 2 + len(kernel)))
    offsets = [d + len(kernel) for d in spatial]
    places = places.permute(1, *offsets, 0, *spatial)  # (channels, *kernel, samples, *positions)
    depth, per_group = channels // groups * math.prod(kernel), outputs // groups
    places = places.reshape(groups, depth, -1) - 1
    count = places.shape[-1]
    blocks = []
    for group, index in enumerate(places):
        patches = Tensor(gather(column(x), index), (depth, count))
        blocks.append(_product(_part(weight, group * per_group * depth, (per_group, depth)), patches))
    order = torch.arange(outputs * count).reshape(outputs, samples, -1).transpose(0, 1)
    result = gather(concatenate(blocks), order)
    if bias is None:
        return result
    return result + broadcast(_part(bias, 0, (outputs, *[1] * len(kernel))), call.shape)


@lowers(
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "upsample_bicubic2d",
    "upsample_bilinear2d",
    "upsample_linear1d",
)
def linear_map(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A linear operation on one tensor, as the matrix of its values at the unit vectors."""
    units = torch.eye(x.size, dtype=torch.float64).reshape(x.size, *x.shape)
    images = torch.stack([call.op(unit, *args, **kwargs).reshape(-1) for unit in units])
    return ca.densify(ca.mtimes(matrix(images, *images.shape, transpose=True), x.column))
