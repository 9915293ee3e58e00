"""A compiled function over a batch of NumPy arrays, without a Python loop and without copies.

CasADi functions work on columns; a (B, n) row-major array is a batch of B columns as it lies in
memory. So the arrays are handed over as they are, and ``Function.map`` runs over the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import casadi as ca
import numpy as np

from ddn_solvers.arrays import Array

_MAX_MAPS = 16  # batch sizes kept; a training loop has two or three


class Kernel:
    """Calls ``function`` on (B, size) arrays; 1-d arrays are shared by all samples.

    Args:
        function: Takes and returns dense columns.
        reduced: ``{output: input}``: that output belongs to that input and is summed over the batch
            where the input is shared (the gradient of a shared parameter).
    """

    def __init__(self, function: ca.Function, reduced: dict[int, int] | None = None) -> None:
        self.function = function
        self._reduced = reduced or {}
        self._maps: dict[tuple[int, tuple[int, ...]], ca.Function] = {}
        self._lock = threading.Lock()
        self._sizes_out = [function.numel_out(i) for i in range(function.n_out())]

    def __call__(self, *arrays: Array) -> list[Array]:
        """Outputs of shape (B, size), or (size,) for an output summed over the batch; NaN where there is no value."""
        batch = max((a.shape[0] for a in arrays if a.ndim == 2), default=1)
        shared = tuple(i for i, a in enumerate(arrays) if a.ndim == 1)
        outputs = [
            np.empty(size if self._reduced.get(i) in shared else (batch, size))
            for i, size in enumerate(self._sizes_out)
        ]
        if batch == 0:
            return [np.zeros_like(output) for output in outputs]
        try:
            if not _evaluated(self.function if batch == 1 else self._mapped(batch, shared), arrays, outputs):
                self._one_by_one(batch, arrays, outputs)
        except RuntimeError as error:
            raise getattr(self.function, "refusal", None) or error from None
        return outputs

    def _one_by_one(self, batch: int, arrays: Sequence[Array], outputs: list[Array]) -> None:
        """Evaluate sample by sample after a failure of the batch; NaN where a sample has no value (a singular matrix)."""
        found = []
        for i in range(batch):
            sample = [array[i] if array.ndim == 2 and len(array) > 1 else array for array in arrays]
            values = [np.empty(size) for size in self._sizes_out]
            if not _evaluated(self.function, sample, values):
                values = [np.full(size, np.nan) for size in self._sizes_out]
            found.append(values)
        for output, rows in zip(outputs, zip(*found, strict=True), strict=True):
            output[...] = np.sum(rows, axis=0) if output.ndim == 1 else np.stack(rows)

    def _mapped(self, batch: int, shared: tuple[int, ...]) -> ca.Function:
        key = (batch, shared)
        with self._lock:
            function = self._maps.get(key)
            if function is None:
                sums = [output for output, source in self._reduced.items() if source in shared]
                name = f"{self.function.name()}_map"
                # With shared inputs CasADi puts copies of all inputs around the map; without any there is no need.
                function = (
                    self.function.map(name, "serial", batch, list(shared), sums)
                    if shared
                    else self.function.map(batch)
                )
                if len(self._maps) >= _MAX_MAPS:
                    self._maps.pop(next(iter(self._maps)))
                self._maps[key] = function
            return function


def _evaluated(function: ca.Function, arrays: Sequence[Array], outputs: Sequence[Array]) -> bool:
    """Whether ``function`` has a value; then it is in ``outputs``."""
    buffer, trigger = function.buffer()
    held = []  # the buffer keeps no reference to the memory
    for i, array in enumerate(arrays):
        if array.size:
            flat = np.ascontiguousarray(array, dtype=np.float64).reshape(-1)
            if not flat.flags.writeable:  # the buffer takes nothing else
                flat = flat.copy()
            held.append(flat)
            buffer.set_arg(i, flat.data)
    for i, output in enumerate(outputs):
        if output.size:
            buffer.set_res(i, output.reshape(-1).data)
    trigger()
    return not buffer.ret()
