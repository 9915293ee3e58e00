"""The caller's tensors -> flat float64 blocks with one batch dimension, and back.

Leading batch dimensions are broadcast against each other. A tensor without any stays shared by all
samples: it is never copied, and its gradient is summed where it is computed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ddn_solvers.arrays import Array
from ddn_solvers.errors import ProblemError
from ddn_solvers.layout import Block, Layout, Shape
from ddn_solvers.program import Program


@dataclass(frozen=True)
class Binding:
    """Parameters of one call.

    Attributes:
        blocks: One tensor a parameter block, float64 on the CPU, (B, size) or shared (size,); carries
            gradients to the caller's tensors.
        batch: The broadcast batch shape.
        dtype, device: What the caller gets back.
    """

    blocks: tuple[torch.Tensor, ...]
    batch: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def samples(self) -> int:
        return math.prod(self.batch)

    def give_back(self, values: torch.Tensor, *shape: int) -> torch.Tensor:
        """(B, ...) -> (*batch, *shape), in the caller's dtype (unless boolean) and on his device."""
        dtype = self.dtype if values.is_floating_point() else values.dtype
        return values.reshape((*self.batch, *shape)).to(self.device, dtype)


def bind(
    program: Program,
    parameters: Mapping[str, Any] | None,
    captured: Sequence[torch.Tensor],
    point: Mapping[str, torch.Tensor],
    batch: Shape = (),
) -> Binding:
    """Check the parameters of one call against their declaration and flatten them.

    Args:
        program: The compiled problem.
        parameters: Name -> tensor (or number) of shape (*batch, *shape).
        captured: The captured tensors, in the order of the program's blocks.
        point: A point by variable; without tensors elsewhere, its dtype and device are the caller's.
        batch: The batch shape that this point brings.

    Raises:
        ProblemError: A missing or unknown name, a wrong dtype or shape, batches that do not broadcast.
    """
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise ProblemError(
            "parameters is not a dict", expected="name -> tensor", got=type(parameters).__name__
        )
    declared = program.problem.parameters
    unknown, missing = (
        [n for n in parameters if n not in declared],
        [n for n in declared if n not in parameters],
    )
    if unknown or missing:
        wrong = f"unknown parameter {unknown[0]!r}" if unknown else f"missing parameter {missing[0]!r}"
        raise ProblemError(wrong, expected="exactly " + (", ".join(map(repr, declared)) or "none"))
    tensors = [as_tensor(f"parameter {name!r}", parameters[name]) for name in declared]
    given = [
        t
        for t, name in zip(tensors, declared, strict=True)
        if isinstance(parameters[name], (torch.Tensor, np.ndarray))
    ]
    source = given or list(captured) or list(point.values())
    dtype, device = common(source)
    own = [
        _batch_of(f"parameter {name!r}", tensor, shape)
        for tensor, (name, shape) in zip(tensors, declared.items(), strict=True)
    ]
    try:
        whole = np.broadcast_shapes(*own, batch)  # torch's own takes ten times as long
    except ValueError as error:
        sizes = ", ".join(f"{name} {tuple(b)}" for name, b in zip(declared, own, strict=True))
        sizes += f", the given point {tuple(batch)}" if batch else ""
        raise ProblemError("the batch dimensions do not broadcast against each other", got=sizes) from error
    blocks = [
        _flatten(tensor, block, batch_, whole)
        for tensor, block, batch_ in zip(tensors, program.parameters, own, strict=False)
    ]
    for tensor, block in zip(captured, program.parameters[len(declared) :], strict=True):
        blocks.append(_flatten(tensor, block, (), whole))
    return Binding(tuple(blocks), whole, dtype, device)


def common(tensors: Sequence[torch.Tensor]) -> tuple[torch.dtype, torch.device]:
    """Promoted dtype and the one device of some tensors; torch's defaults if there are none.

    Raises:
        ProblemError: They are on several devices.
    """
    if not tensors:
        return torch.get_default_dtype(), torch.get_default_device()
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ProblemError("the parameters are on several devices", expected="one device", got=names)
    return dtype, tensors[0].device


def as_tensor(where: str, value: Any) -> torch.Tensor:
    """A floating-point tensor from a tensor, a number or a floating-point array."""
    if isinstance(value, torch.Tensor):
        tensor = value
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, np.ndarray):
        tensor = torch.from_numpy(value) if value.dtype.kind in "fiuc" else torch.zeros(0, dtype=torch.bool)
    else:
        raise ProblemError(
            f"{where} is not a tensor", expected="a floating-point tensor", got=type(value).__name__
        )
    if not tensor.is_floating_point():
        raise ProblemError(
            f"{where} has the wrong dtype",
            expected="a floating-point tensor",
            got=str(tensor.dtype),
            fix="Convert it, for instance with .double().",
        )
    if tensor.layout is not torch.strided:
        raise ProblemError(
            f"{where} is not dense",
            expected="a strided tensor",
            got=str(tensor.layout),
            fix="Call .to_dense().",
        )
    if tensor.is_meta:
        raise ProblemError(f"{where} holds no numbers", expected="a tensor with data", got="device meta")
    return tensor


def _batch_of(where: str, tensor: torch.Tensor, shape: Shape) -> Shape:
    lead = tensor.dim() - len(shape)
    if lead < 0 or tuple(tensor.shape[lead:]) != tuple(shape):
        expected = f"(..., {', '.join(map(str, shape))})" if shape else "(...)"
        raise ProblemError(f"{where} has the wrong shape", expected=expected, got=str(tuple(tensor.shape)))
    return tuple(tensor.shape[:lead])


def _flatten(tensor: torch.Tensor, block: Block, own: Shape, whole: Shape) -> torch.Tensor:
    tensor = tensor.to("cpu", torch.float64)
    if not own:
        return tensor.reshape(block.size)
    return tensor.expand((*whole, *block.shape)).reshape(math.prod(whole), block.size)


def check_finite(program: Program, blocks: Sequence[Array]) -> None:
    """Every number a solver would see.

    Raises:
        ProblemError: A parameter holds NaN or an infinity; the message names it and the sample.
    """
    declared = len(program.problem.parameters)
    for index, (block, values) in enumerate(zip(program.parameters, blocks, strict=True)):
        if np.isfinite(values.sum()):
            continue  # one pass over what is mostly good; a sum may overflow where its terms do not
        # A captured tensor may be a bound, and bounds may be infinite.
        wrong = ~np.isfinite(values) if index < declared else np.isnan(values)
        if wrong.any():
            where = np.argwhere(wrong)[0]
            sample = f" of sample {where[0]}" if values.ndim == 2 else ""
            kind = "parameter" if index < declared else "captured tensor"
            raise ProblemError(
                f"{kind} {block.name!r} is not finite",
                expected="finite numbers",
                got=f"{values[tuple(where)]} at {block.element(int(where[-1]))}{sample}",
            )


def initial_batch(
    variables: Layout, initial: Any, what: str = "initial"
) -> tuple[dict[str, torch.Tensor], Shape]:
    """A point by variable, checked, and the batch shape that it brings.

    Raises:
        ProblemError: An unknown variable, a wrong shape or dtype, NaN or infinite entries.
    """
    if initial is None:
        return {}, ()
    if isinstance(initial, torch.Tensor):
        if len(variables) != 1:
            names = ", ".join(repr(block.name) for block in variables)
            raise ProblemError(
                f"{what} is a tensor", expected=f"a dict, there being several variables: {names}"
            )
        initial = {variables.blocks[0].name: initial}
    if not isinstance(initial, Mapping):
        raise ProblemError(
            f"{what} is not a point", expected="a dict by variable", got=type(initial).__name__
        )
    tensors, batches = {}, []
    for name, value in initial.items():
        block = variables.by_name.get(name)
        if block is None:
            raise ProblemError(
                f"{what} names an unknown variable {name!r}", expected=", ".join(variables.by_name)
            )
        tensor = as_tensor(f"{what}[{name!r}]", value)
        batches.append(_batch_of(f"{what}[{name!r}]", tensor, block.shape))
        if not np.isfinite(_array(name, tensor)).all():
            raise ProblemError(f"{what}[{name!r}] is not finite", expected="finite numbers")
        tensors[name] = tensor
    return tensors, tuple(torch.broadcast_shapes(*batches))


def flat_point(variables: Layout, tensors: Mapping[str, torch.Tensor], batch: Shape) -> Array:
    """A point by variable as (B, n), zero where a variable is not given."""
    flat = np.zeros((math.prod(batch), variables.size))
    for name, tensor in tensors.items():
        block = variables.by_name[name]
        values = np.broadcast_to(_array(name, tensor), (*batch, *block.shape))
        flat[:, block.start : block.stop] = values.reshape(len(flat), block.size)
    return flat


def flat_batch(layout: Layout, tensors: Mapping[str, torch.Tensor], samples: int) -> Array:
    """Tensors by name, (*batch, *shape), as one (samples, size) array of numbers."""
    flat = np.zeros((samples, layout.size))
    for block in layout:
        flat[:, block.start : block.stop] = _array(block.name, tensors[block.name]).reshape(-1, block.size)
    return flat


def _array(name: str, tensor: torch.Tensor) -> Array:
    """The numbers of a tensor that is not differentiated; torch.func's grad levels are taken off."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if torch._C._functorch.is_batchedtensor(tensor):
        raise ProblemError(
            f"the point given for {name!r} is mapped over by torch.func.vmap",
            expected="one that is the same for all; parameters may be mapped",
        )
    with temporarily_clear_interpreter_stack():  # else detach would wrap it anew
        array: Array = tensor.detach().to("cpu", torch.float64).numpy()
    return array
