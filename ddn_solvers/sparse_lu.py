"""LU factors of one sparse matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import scipy.sparse as sp
    from scipy.sparse.linalg import SuperLU


def sparse_lu(matrix: sp.csc_array, **options: Any) -> SuperLU | None:
    """SuperLU's factors; ``None`` where the matrix is exactly singular.

    One that is singular by its pattern is not given to SuperLU at all: SciPy's (1.17) then writes where it must not.

    Args:
        matrix: Finite.
        **options: Of ``scipy.sparse.linalg.splu``.
    """
    from scipy.sparse.csgraph import structural_rank
    from scipy.sparse.linalg import splu

    # A diagonal without zeros is one choice of an entry in each row and column.
    if not matrix.diagonal().all() and structural_rank(matrix) < matrix.shape[0]:
        return None
    try:
        return splu(matrix, **options)
    except RuntimeError:  # a pivot is exactly zero
        return None
