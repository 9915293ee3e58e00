"""What the transforms of torch do to a custom autograd function, and which of them it cannot carry.

``torch.func`` wraps tensors; autograd's own vmap (``is_grads_batched``, ``vectorize=True``), which is older, hides a
batch dimension in them; nested forward mode would be zero in silence and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from ddn_solvers.errors import SensitivityError


def refuse_nested_forward_mode() -> None:
    """torch does not carry a second forward derivative through a custom function: it would be zero."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise SensitivityError(
            "forward mode inside forward mode (jacfwd of jacfwd) is not possible through a solve; "
            "use torch.func.hessian, or jacrev inside"
        )


def refuse_batched_tangents(tensors: Sequence[torch.Tensor]) -> None:
    """Autograd's own vmap over forward mode does not go through torch.func, of which the backward is made."""
    if forward_ad._current_level < 0 or any(map(is_transformed, tensors)):
        return
    tangents = (forward_ad.unpack_dual(tensor).tangent for tensor in tensors)
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tangents):
        raise SensitivityError(
            "torch.autograd.functional.hessian with vectorize=True and forward mode outside is not possible "
            "through a solve; use torch.func.hessian, or its reverse mode"
        )


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a torch.func transform wraps the tensor, so that it has no array."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


@contextmanager
def untransformed() -> Iterator[None]:
    """Outside of every torch.func transform that is under way: under a level of theirs no tensor has an array."""
    with ExitStack() as levels:
        while torch._C._functorch.peek_interpreter_stack() is not None:
            levels.enter_context(temporarily_pop_interpreter_stack())
        yield


def one_by_one(
    derivative: Callable[..., list[torch.Tensor]],
    directions: Sequence[torch.Tensor],
    nesting: int | None = None,
) -> list[torch.Tensor]:
    """``derivative`` of each of a batch of directions, as autograd's own vmap makes them, older than torch.func.

    ``is_grads_batched`` and ``vectorize=True`` come here with tensors that hide a batch dimension, one for each
    level of nesting, and have no arrays; the linearisation is the same for all.
    """
    if not any(map(torch._C._functorch.is_legacy_batchedtensor, directions)):
        return derivative(*directions)
    level = _legacy_vmap_level() if nesting is None else nesting
    # Of a tensor without this level, one row stands for all.
    shown = [torch._remove_batch_dim(d, level, 1, 0) for d in directions]
    size = max(len(rows) for rows in shown)
    found = [
        one_by_one(derivative, [rows[i if len(rows) > 1 else 0] for rows in shown], level - 1)
        for i in range(size)
    ]
    return [torch._add_batch_dim(torch.stack(column), 0, level) for column in zip(*found, strict=True)]


def _legacy_vmap_level() -> int:
    torch._C._vmapmode_increment_nesting()
    return torch._C._vmapmode_decrement_nesting()
