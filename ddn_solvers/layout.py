"""Named tensors laid end to end in one flat vector, row-major.

The mathematics works on flat vectors z (variables), h, g (constraints) and a list of flat
parameter blocks; users see named tensors with shapes. This is the one map between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One named tensor of ``shape`` at ``start:stop`` of the flat vector."""

    name: str
    shape: Shape
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size

    def element(self, flat_index: int) -> str:
        """``name[i, j]`` of the entry at ``flat_index`` of the whole vector, for messages."""
        if not self.shape:
            return self.name
        index, offset = [], flat_index - self.start
        for extent in reversed(self.shape):
            index.append(offset % extent)
            offset //= extent
        return f"{self.name}[{', '.join(map(str, reversed(index)))}]"


class Layout:
    """An ordered set of blocks."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        blocks, start = [], 0
        for name, shape in shapes.items():
            block = Block(name, tuple(shape), start)
            blocks.append(block)
            start = block.stop
        self.blocks = tuple(blocks)
        self.size = start

    @cached_property
    def by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.blocks}

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """(*batch, size) -> {name: (*batch, *shape)}."""
        batch = flat.shape[:-1]
        if len(self.blocks) == 1:  # the usual case: no slice, which autograd would have to pad again
            return {self.blocks[0].name: flat.reshape((*batch, *self.blocks[0].shape))}
        return {b.name: flat[..., b.start : b.stop].reshape((*batch, *b.shape)) for b in self.blocks}

    def element(self, flat_index: int) -> str:
        """Name and index of one entry, for messages."""
        block = next(b for b in self.blocks if b.start <= flat_index < b.stop)
        return block.element(flat_index)
