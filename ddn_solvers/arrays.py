"""Types of the NumPy arrays that the numeric core passes around, and one vector that many parts of it need."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Index = np.ndarray[Any, np.dtype[np.intp]]

_SMALL = 10_000  # numbers of which another array costs less than another call


def without_symmetry(n: int) -> Array:
    """A vector, (n,), that no symmetry of a problem leaves as it is; always the same, as random ones would not be."""
    vector: Array = np.cos(1.0 + np.arange(n) ** 2)
    return vector


def unit_without_symmetry(n: int) -> Array:
    """The same of length one, (n,)."""
    vector = without_symmetry(n)
    return vector / np.linalg.norm(vector)


def largest(values: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Maximum norm along an axis, or several; zero of nothing."""
    found: Array
    if values.size < _SMALL:
        found = np.abs(values).max(axis=axis, initial=0.0)
    else:  # two passes, and no array of magnitudes
        found = np.maximum(values.max(axis=axis, initial=0.0), -values.min(axis=axis, initial=0.0))
    return found
