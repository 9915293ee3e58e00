"""Types of the NumPy arrays that the numeric core passes around, and one vector that many parts of it need."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Index = np.ndarray[Any, np.dtype[np.intp]]

_SHORT = 1000  # numbers under one maximum of which another array costs less than another pass


def without_symmetry(n: int) -> Array:
    """A vector, (n,), that no symmetry of a problem leaves as it is; always the same, as random ones would not be."""
    vector: Array = np.cos(1.0 + np.arange(n) ** 2)
    return vector


def unit_without_symmetry(n: int) -> Array:
    """The same of length one, (n,)."""
    vector = without_symmetry(n)
    return vector / np.linalg.norm(vector)


def largest(values: Array, axes: int = 1) -> Array:
    """Maximum norm over the last axis, or so many of the last; zero of nothing."""
    over: Any = tuple(range(values.ndim - axes, values.ndim)) if axes > 1 else -1
    found: Array
    if math.prod(values.shape[values.ndim - axes :]) < _SHORT:
        found = np.abs(values).max(axis=over, initial=0.0)
    else:  # two passes, and no array of magnitudes
        found = np.maximum(values.max(axis=over, initial=0.0), -values.min(axis=over, initial=0.0))
    return found
