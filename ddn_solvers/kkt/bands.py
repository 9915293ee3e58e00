"""The structure of horizons and chains: H in small blocks along its diagonal, A H^-1 A^T a narrow band.

    H = L L^T by blocks,   V = A L^-T,   S = V V^T,   a lower band once the rows are in the order of Cuthill and McKee (1969)

Everything is found once a pattern: where the nonzeros of H and A go into dense blocks, whose factors are those of all
blocks of a size in all samples at once, where those of V come from, and which products of them make an entry of S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ddn_solvers.arrays import Array, Index
from ddn_solvers.kkt.operator import factored_sparsely
from ddn_solvers.lowering.pattern import Pattern

_LARGEST = 16  # variables of a block
_WIDEST = 64  # diagonals up to which a band is worth the while: its factors have no holes
_PAIRS, _ALL = 64, 2 * 10**7  # products for each nonzero of A, and of all, up to which it is
_AT_ONCE = 16  # samples whose products stay in the cache


@dataclass(frozen=True)
class Blocks:
    """All blocks of one size b, k of them.

    Attributes:
        variables: (k, b)
        H: Which nonzero of H stands where, (k, b, b); the one after the last for a zero.
        A: The same of A^T with the rows that meet a block, r at most, (k, b, r).
    """

    variables: Index
    H: Index
    A: Index


@dataclass(frozen=True)
class Structure:
    """See above; ``by_bands`` says for which patterns.

    Attributes:
        blocks: By size.
        V: The pattern of V, as that of A.
        order: Rows of A in the order of the band.
        width: Diagonals of S below the main one.
    """

    blocks: tuple[Blocks, ...]
    V: Pattern
    order: Index
    width: int
    _source: Index  # of each nonzero of V among the entries of all L^-1 A^T
    _pairs: tuple[Index, Index]  # of nonzeros of V that are in one column
    _starts: Index  # where the products of one entry of the band begin
    _place: Index  # and where it goes

    def factors(self, hessian: Array, diagonal: Array) -> list[torch.Tensor]:
        """L by size of block, (B, k, b, b); not finite where H, (B, nnz) with ``diagonal`` (B, n), is not positive."""
        entries, found = _with_zero(hessian), []
        for blocks in self.blocks:
            H = torch.from_numpy(entries[:, blocks.H])
            H.diagonal(dim1=-2, dim2=-1).add_(torch.from_numpy(diagonal[:, blocks.variables]))
            if H.shape[-1] == 1:
                found.append(H.sqrt())
            else:
                L, failed = torch.linalg.cholesky_ex(H)
                found.append(torch.where((failed == 0)[..., None, None], L, torch.nan))
        return found

    def border(self, factors: Sequence[torch.Tensor], border: Array) -> Array:
        """Nonzeros of V from those of A, (B, nnz)."""
        entries = _with_zero(border)
        parts = [
            _solved(L, torch.from_numpy(entries[:, blocks.A])).flatten(1).numpy()
            for L, blocks in zip(factors, self.blocks, strict=True)
        ]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return np.take(whole, self._source, axis=1)

    def solve(self, factors: Sequence[torch.Tensor], right: Array, transposed: bool = False) -> Array:
        """L^-1, or L^-T, times (B, n)."""
        found = np.empty_like(right)
        for L, blocks in zip(factors, self.blocks, strict=True):
            part = torch.from_numpy(right[:, blocks.variables]).unsqueeze(-1)
            found[:, blocks.variables] = _solved(L, part, transposed).squeeze(-1).numpy()
        return found

    def pivots(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Diagonals of all L, (B, n) in any order."""
        return torch.cat([L.diagonal(dim1=-2, dim2=-1).flatten(1) for L in factors], dim=1)

    def band(self, border: Array) -> Array:
        """(B, nnz) of V -> V V^T, (B, rows, width + 1): [i, j, k] is the entry of rows j and j + k."""
        found = np.zeros((len(border), len(self.order) * (self.width + 1)))
        for start in range(0, len(border), _AT_ONCE):
            some = border[start : start + _AT_ONCE]
            products = some[:, self._pairs[0]] * some[:, self._pairs[1]]
            found[start : start + _AT_ONCE, self._place] = np.add.reduceat(products, self._starts, axis=1)
        return found.reshape(len(border), len(self.order), self.width + 1)


def _solved(L: torch.Tensor, right: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    if L.shape[-1] == 1:
        return right / L
    return torch.linalg.solve_triangular(L.mT if transposed else L, right, upper=transposed)


def _with_zero(nonzeros: Array) -> Array:
    return np.concatenate([nonzeros, np.zeros((len(nonzeros), 1))], axis=1)


def by_bands(hessian: Pattern, border: Pattern) -> Structure | None:
    """The structure of a problem with these patterns, where it has one and sparse algebra is the better one."""
    return _structure(hessian, border) if factored_sparsely(hessian, border) else None


@lru_cache(maxsize=32)
def _structure(hessian: Pattern, border: Pattern) -> Structure | None:
    import scipy.sparse as sp
    from scipy.sparse.csgraph import connected_components, reverse_cuthill_mckee

    if not border.nnz:
        return None
    rows, n = border.shape
    count, label = connected_components(hessian.matrix(np.ones(hessian.nnz)), directed=False)
    label = label.astype(np.intp)  # numbers of pairs below exceed 32 bits
    sizes = np.bincount(label, minlength=count)
    if sizes.max(initial=0) > _LARGEST:
        return None
    # Pairs of a block and a row that meets it, by block; each brings as many nonzeros as the block has variables.
    pair, of_nonzero = np.unique(label[border.columns] * rows + border.indices, return_inverse=True)
    block, row = pair // rows, pair % rows
    meets = np.bincount(block, minlength=count)
    if (meets**2 * sizes).sum() > min(_PAIRS * border.nnz, _ALL):
        return None
    rank = np.arange(len(pair)) - (np.cumsum(meets) - meets)[block]
    by_block = np.argsort(label, kind="stable")  # variables
    local = np.empty(n, dtype=np.intp)
    local[by_block] = np.arange(n) - (np.cumsum(sizes) - sizes)[label[by_block]]
    blocks, sources, columns, indices, before = [], [], [], [], 0
    for size in np.unique(sizes):
        mine = np.flatnonzero(sizes == size)
        number = np.full(count, -1)
        number[mine] = np.arange(len(mine))
        variables = by_block[(sizes == size)[label[by_block]]].reshape(len(mine), size)
        H = np.full((len(mine), size, size), hessian.nnz)
        inside = np.flatnonzero(number[label[hessian.indices]] >= 0)
        i, j = hessian.indices[inside], hessian.columns[inside]
        H[number[label[i]], local[i], local[j]] = inside
        A = np.full((len(mine), size, max(1, int(meets[mine].max()))), border.nnz)
        inside = np.flatnonzero(number[label[border.columns]] >= 0)
        j = border.columns[inside]
        A[number[label[j]], local[j], rank[of_nonzero[inside]]] = inside
        if A.size > _PAIRS * border.nnz:
            return None
        blocks.append(Blocks(variables, H, A))
        met = np.flatnonzero(number[block] >= 0)
        where = np.ravel_multi_index(
            (number[block[met]][:, None], np.arange(size)[None], rank[met][:, None]), A.shape
        )
        sources.append((before + where).reshape(-1))
        columns.append(variables[number[block[met]]].reshape(-1))
        indices.append(np.repeat(row[met], size))
        before += A.size
    column, index, source = (np.concatenate(each) for each in (columns, indices, sources))
    order = np.lexsort((index, column))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=n))])
    V = Pattern(border.shape, indptr, index[order])
    pattern = sp.csr_matrix(V.matrix(np.ones(V.nnz)))
    in_band = reverse_cuthill_mckee(pattern @ pattern.T, symmetric_mode=True)
    of_row = np.empty(rows, dtype=np.intp)
    of_row[in_band] = np.arange(rows)
    at, filled = of_row[V.indices], V.indptr[:-1][np.diff(V.indptr) > 0]
    width = int((np.maximum.reduceat(at, filled) - np.minimum.reduceat(at, filled)).max())
    if width > _WIDEST:
        return None
    pairs, starts, place = _products(V, at, width)
    return Structure(tuple(blocks), V, in_band, width, source[order], pairs, starts, place)


def _products(V: Pattern, row: Index, width: int) -> tuple[tuple[Index, Index], Index, Index]:
    """Which products of nonzeros make each entry of the lower band of V V^T, where they begin, and where it goes.

    Args:
        row: Of each nonzero, in the order of the band.
    """
    count = np.diff(V.indptr)[V.columns]
    first = np.repeat(np.arange(V.nnz), count)
    second = V.indptr[V.columns[first]] + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    lower = row[first] >= row[second]
    first, second = first[lower], second[lower]
    place = row[second] * (width + 1) + row[first] - row[second]
    by_place = np.argsort(place, kind="stable")
    places, starts = np.unique(place[by_place], return_index=True)
    return (first[by_place], second[by_place]), starts, places
