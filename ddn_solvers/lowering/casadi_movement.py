"""Operations that move entries without computing: torch runs them on an index tensor.

Entry i of the tensors that go in is numbered 1 + i, and 0 stands for a zero, so whatever an operation
does (slices, permutes, pads with zeros, keeps the lower triangle), its result read as indices is the
gather that does the same to the columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import casadi as ca
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ddn_solvers.lowering.casadi_tensor import (
    Call,
    Tensor,
    broadcast,
    column,
    concatenate,
    gather,
    lowers,
)

IDENTITY = ("alias", "clone", "contiguous", "detach", "lift", "lift_fresh", "lift_fresh_copy", "positive")

VIEWS = """
    diagonal expand narrow permute reshape select slice split split_with_sizes squeeze t transpose
    unbind unfold unsqueeze view
""".split()
REARRANGEMENTS = """
    _unsafe_view block_diag broadcast_tensors broadcast_to cat channel_shuffle chunk concat concatenate
    diag diag_embed diagonal_scatter expand_as flatten flip fliplr flipud hstack im2col meshgrid movedim
    pixel_shuffle pixel_unshuffle ravel reflection_pad1d reflection_pad2d repeat
    repeat_interleave.self_int replication_pad1d replication_pad2d reshape_as roll rot90 select_scatter
    slice_scatter stack tensor_split tile tril triu unflatten unsafe_chunk unsafe_split view_as vstack
""".split()
# These take tensors of integers or truth values that say where, not what.
INDEXED = """
    gather index index_copy index_put index_select masked_select repeat_interleave.self_Tensor
    scatter.src take take_along_dim
""".split()
SHAPE_ONLY = """
    empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like
""".split()
# The position of the number that these write into the entries they fill.
FILLED: dict[str, int] = {"constant_pad_nd": 2, "index_fill": 3, "scatter.value": 3}


@lowers(*IDENTITY)
def identity(call: Call, x: Any, *_: Any, **__: Any) -> Any:
    # detach included: where a function is minimised, its value counts, however it was computed.
    return column(x)


@lowers(*VIEWS, *(f"{name}_copy" for name in VIEWS), *REARRANGEMENTS)
def move(call: Call, *args: Any, **kwargs: Any) -> Any:
    return _moved(call.op, args, kwargs, integers_are_data=True)


@lowers(*INDEXED)
def pick(call: Call, *args: Any, **kwargs: Any) -> Any:
    _require_fixed(call, args, kwargs)
    return _moved(call.op, args, kwargs, integers_are_data=False)


@lowers(*FILLED)
def fill(call: Call, *args: Any, **kwargs: Any) -> Any:
    _require_fixed(call, args, kwargs)
    name = call.op._schema.name.removeprefix("aten::")
    position = FILLED.get(name) or FILLED[f"{name}.{call.op._overloadname}"]
    filled = [_Number(arg) if place == position else arg for place, arg in enumerate(args)]
    return _moved(call.op, filled, kwargs, integers_are_data=False)


@lowers("index_put")
def index_put(call: Call, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    if not accumulate:
        return pick(call, x, indices, values)
    _require_fixed(call, indices)
    return _accumulated(x, torch.ops.aten.index(_positions(x), indices), values)


@lowers("scatter_add")
def scatter_add(call: Call, x: Any, dim: int, index: Any, source: Any) -> Any:
    _require_fixed(call, index)
    corner = _positions(source)[tuple(slice(extent) for extent in index.shape)]
    added = Tensor(gather(column(source), corner), tuple(index.shape))
    return _accumulated(x, _positions(x).gather(dim, index), added)


@lowers("where.self", "where.Scalar", "where.ScalarOther", "where.ScalarSelf")
def where(call: Call, condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, Tensor):
        return ca.if_else(*call.columns(condition, x, y))
    x, y = (_as_tensor(choice) for choice in (x, y))
    places = torch.where(condition, _positions(x), _positions(y) + math.prod(x.shape))
    return gather(concatenate([column(x), column(y)]), places)


@lowers("masked_fill")
def masked_fill(call: Call, x: Any, mask: Any, value: Any) -> Any:
    return where(call, mask, value, x)


@lowers("copy")
def copy(call: Call, destination: Any, source: Any, non_blocking: bool = False) -> Any:
    return gather(column(source), _positions(_as_tensor(source)).expand(call.shape))


@lowers(*SHAPE_ONLY, "fill.Scalar")
def constant_like(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What does not depend on the values."""
    return call.op(torch.zeros(x.shape, dtype=x.dtype), *args, **kwargs)


@lowers("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def dropout(call: Call, x: Any, p: float, train: bool) -> Any:
    if train and p > 0:
        raise call.refusal("depends on random numbers. Put the module into evaluation mode.")
    others = len(call.op._schema.returns) - 1
    return (column(x), None) if others else column(x)


@lowers("_local_scalar_dense", "argmax", "argmin", "argsort", "item", "nonzero", "view.dtype")
def stepwise(call: Call, *_: Any, **__: Any) -> Any:
    raise call.refusal(
        "makes an index, a number or a shape of values that are not known in advance. "
        "Keep tensors, and use torch.where or the values that max, sort and topk return."
    )


@dataclass(frozen=True)
class _Number:
    """A number that becomes an entry of the result."""

    value: float


def _moved(op: Any, args: Any, kwargs: Any, *, integers_are_data: bool) -> Any:
    """Run ``op`` on indices in place of data; gather from all the data laid end to end."""
    pieces: list[Any] = []
    count = 0

    def number(data: Any) -> Any:
        nonlocal count
        if isinstance(data, torch.Tensor) and not (integers_are_data or data.is_floating_point()):
            return data
        first = count + 1
        if isinstance(data, _Number):
            pieces.append(data.value)
            count += 1
            return first
        pieces.append(column(data))
        count += math.prod(data.shape)
        # Exact up to 2^53; some operations, im2col among them, take no integers.
        return (_positions(data) + first).double()

    args, kwargs = tree_map_only((Tensor, torch.Tensor, _Number), number, (tuple(args), kwargs))
    results = op(*args, **kwargs)
    source = concatenate(pieces)
    if isinstance(results, torch.Tensor):
        return gather(source, results.long() - 1)
    return tuple(gather(source, result.long() - 1) for result in results)


def _positions(tensor: Any) -> torch.Tensor:
    return torch.arange(math.prod(tensor.shape)).reshape(tensor.shape)


def _as_tensor(value: Any) -> Any:
    return value if isinstance(value, Tensor | torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def _accumulated(x: Any, places: torch.Tensor, source: Any) -> Any:
    """x plus the entries of ``source``, each added at its place in x."""
    size, count = math.prod(x.shape), places.numel()
    added = broadcast(source, tuple(places.shape)) + ca.MX.zeros(count)
    rows = places.reshape(-1).tolist()
    spread = ca.DM.triplet(rows, list(range(count)), ca.DM.ones(count), size, count)
    return column(x) + ca.densify(ca.mtimes(spread, added))


def _require_fixed(call: Call, *indices: Any) -> None:
    """Refuse an index or a mask that depends on a symbol (truth values have no other use here)."""
    leaves = [leaf for leaf in tree_leaves(indices) if isinstance(leaf, Tensor)]
    if any(not leaf.dtype.is_floating_point for leaf in leaves):
        raise call.refusal(
            "takes an index or a mask that depends on the values of variables or parameters. "
            "Use fixed indices, or torch.where with both branches computed."
        )
