"""Matrices whose entries are affine in the parameters, as those of parametrised QPs are: gathered, not evaluated.

    nonzeros(p) = constant + sum_k coefficients_k * p[source_k]

CasADi evaluates a constant Hessian as a product with each unit vector. Here it is found out once which parameters each
nonzero is made of, and a batch is then a copy: from the expressions where they are small, else from values at a few points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import casadi as ca
import numpy as np
import scipy.sparse as sp

from ddn_solvers.arrays import Array, Index

_LARGEST = 200_000  # nonzeros and parameters up to which that is found out
_TERMS = 4  # parameters in one nonzero beyond which CasADi is as fast
_OPERATIONS = (
    16  # of one nonzero beyond which there are more terms, or none; told before any derivative is taken
)
_QUICK = 100_000  # multiplications that take no time worth a look
_ARITHMETIC = frozenset(
    {
        ca.OP_ASSIGN,
        ca.OP_CONST,
        ca.OP_INPUT,
        ca.OP_OUTPUT,
        ca.OP_PARAMETER,
        ca.OP_ADD,
        ca.OP_SUB,
        ca.OP_NEG,
        ca.OP_TWICE,
        ca.OP_MUL,
        ca.OP_DIV,
        ca.OP_SQ,
        ca.OP_INV,
    }
)
# And of matrices, moves and sums: what is made of these alone is a polynomial.
_POLYNOMIAL = _ARITHMETIC - {ca.OP_DIV, ca.OP_INV} | {
    ca.OP_ADDNONZEROS,
    ca.OP_BILIN,
    ca.OP_DIAGCAT,
    ca.OP_DIAGSPLIT,
    ca.OP_DOT,
    ca.OP_EINSTEIN,
    ca.OP_GETNONZEROS,
    ca.OP_HORZCAT,
    ca.OP_HORZREPMAT,
    ca.OP_HORZREPSUM,
    ca.OP_HORZSPLIT,
    ca.OP_MTIMES,
    ca.OP_PROJECT,
    ca.OP_RANK1,
    ca.OP_RESHAPE,
    ca.OP_SETNONZEROS,
    ca.OP_SPARSITY_CAST,
    ca.OP_TRANSPOSE,
    ca.OP_VERTCAT,
    ca.OP_VERTSPLIT,
}
_EXACT, _TESTS = 1e-12, 3  # relative error of a map that is rounding, and points at which it is tested


@dataclass(frozen=True)
class LinearMap:
    """Parameter blocks to nonzeros.

    Attributes:
        constant: (nnz,).
        blocks: Those that enter, end to end the vector that is gathered from.
        terms: ``(source, coefficients)``, (nnz,) each; coefficients may be (1,), if all are the same, or ``None``, if
            they are one. A nonzero without a term has coefficient 0.
    """

    constant: Array
    blocks: tuple[int, ...]
    terms: tuple[tuple[Index, Array | None], ...]

    def __call__(self, parameters: Sequence[Array], batch: int) -> Array:
        """(batch, nnz)"""
        found: Array | None = None
        used = [parameters[block] for block in self.blocks]
        if any(p.ndim == 2 for p in used):
            used = [np.broadcast_to(p, (batch, p.shape[-1])) for p in used]
        if used:
            values = used[0] if len(used) == 1 else np.concatenate(used, axis=-1)
            for source, coefficients in self.terms:
                term = np.take(values, source, axis=-1)
                if coefficients is not None:
                    term *= coefficients
                found = term if found is None else np.add(found, term, out=found)
        if found is None:
            found = self.constant
        elif self.constant.any():
            found = found + self.constant
        return np.tile(found, (batch, 1)) if found.ndim == 1 else found


def linear_map(nonzeros: ca.MX, parameters: Sequence[ca.MX], ones: Sequence[ca.MX] = ()) -> LinearMap | None:
    """The map that ``nonzeros`` are of ``parameters``; ``None`` if they are no affine one of few terms each.

    Args:
        ones: Further symbols, which are one.
    """
    sizes = [p.numel() for p in parameters]
    count = int(nonzeros.numel())
    if count == 0 or count + sum(sizes) > _LARGEST:
        return None
    symbols = [ca.SX.sym(f"p{i}", size) for i, size in enumerate(sizes)]
    most = sum(sizes) + _OPERATIONS * count
    try:
        whole = ca.Function("nonzeros", [*parameters, *ones], [nonzeros])
        if _multiplications(whole) > max(most, _QUICK):
            return None
        function = whole.expand()
    except RuntimeError:  # depends on more than the parameters, or has operations that are not of scalars
        return None
    if function.n_instructions() > most or not _smooth(function):
        return None
    inputs = [*symbols, *[ca.SX(1)] * len(ones)]
    values, stacked = ca.densify(ca.SX(function.call(inputs)[0])), ca.vertcat(ca.SX(0, 1), *symbols)
    jacobian = ca.jacobian(values, stacked)
    if ca.depends_on(jacobian, stacked):
        return None
    constant = ca.Function("constant", symbols, [values]).call([ca.DM.zeros(size) for size in sizes])[0]
    slope = ca.Function("slope", [], [jacobian]).call([])[0]
    pattern, shape = slope.sparsity(), (count, sum(sizes))
    M = sp.csc_array((slope.nonzeros(), pattern.row(), pattern.colind()), shape=shape)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    blocks = tuple(b for b in range(len(sizes)) if M.indptr[starts[b]] < M.indptr[starts[b + 1]])
    M = sp.hstack([M[:, starts[b] : starts[b + 1]] for b in blocks]).tocsr() if blocks else M.tocsr()
    lengths = np.diff(M.indptr)
    if lengths.max(initial=0) > _TERMS:
        return None
    terms: list[tuple[Index, Array | None]] = []
    for k in range(lengths.max(initial=0)):
        there = lengths > k
        entries = np.where(there, M.indptr[:-1] + k, 0)
        coefficients = np.where(there, M.data[entries], 0.0)
        source = M.indices[entries].astype(np.intp)
        terms.append((source, None if (coefficients == 1).all() else coefficients))
    return LinearMap(constant.full().reshape(-1), blocks, tuple(terms))


def probed_maps(
    evaluate: Callable[[list[Array]], Sequence[Array]], sizes: Sequence[int]
) -> tuple[LinearMap, ...] | None:
    """The same of polynomials whose expressions are too large to take apart, where a nonzero is c p_i or c (p_i + p_j).

    At p = 0, 1, k and k^2, k being the number of each parameter, such a nonzero tells c, i + j and i^2 + j^2. A polynomial
    that is another one differs at random points. Blocks that no nonzero has told must not enter any: that has to be asked of
    the expressions, see ``SymbolicFunctions.matrices_depend_on``.

    Args:
        evaluate: Parameter blocks, (size,) each, to the nonzeros of several matrices, (nnz,) each.
        sizes: Of the blocks.
    """
    total, cuts = sum(sizes), np.cumsum(sizes)[:-1]
    numbers, rng = np.arange(1.0, total + 1), np.random.default_rng(0)
    # Of all sizes, so that no term hides behind another one.
    tests = [rng.standard_normal(total) * 10.0 ** rng.uniform(-8, 8, total) for _ in range(_TESTS)]
    points = (np.zeros(total), np.ones(total), numbers, numbers**2, *tests)
    found = []
    for values in zip(*(evaluate(np.split(p, cuts)) for p in points), strict=True):
        zero, one, first, second, *others = values
        candidate = _decoded(zero, one, first, second, sizes)
        if candidate is None:
            return None
        for test, there in zip(tests, others, strict=True):
            (told,) = candidate(np.split(test, cuts), 1)
            if not (np.abs(told - there) <= _EXACT * np.abs(there)).all():
                return None
        found.append(candidate)
    return tuple(found)


def _decoded(zero: Array, one: Array, first: Array, second: Array, sizes: Sequence[int]) -> LinearMap | None:
    """What values at p = 0, 1, k and k^2 tell."""
    whole, total = one - zero, sum(sizes)
    unit = np.where(whole != 0, whole, 1.0)
    mean, square = (first - zero) / unit, (second - zero) / unit
    apart = np.sqrt(np.maximum(square - mean**2, 0.0))
    places = [np.rint(mean + sign * apart) - 1 for sign in (1, -1)]
    if not all(np.isfinite(p).all() and (p >= -1).all() and (p < total).all() for p in places):
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])
    where = [np.searchsorted(starts, np.maximum(p, 0), side="right") - 1 for p in places]
    used = np.unique(np.concatenate([block[whole != 0] for block in where]))
    offsets = np.zeros(len(sizes), dtype=np.intp)
    offsets[used] = starts[used] - np.concatenate([[0], np.cumsum(np.asarray(sizes)[used])])[:-1]
    sources = [
        np.where(whole != 0, p - offsets[block], 0).astype(np.intp)
        for p, block in zip(places, where, strict=True)
    ]
    coefficients = whole[:1] if (whole == whole[:1]).all() else whole
    if not used.size:
        terms: list[tuple[Index, Array | None]] = []
    elif (sources[0] == sources[1]).all():
        terms = [(sources[0], None if (whole == 1).all() else coefficients)]
    else:
        terms = [(source, coefficients / 2) for source in sources]
    return LinearMap(zero, tuple(int(block) for block in used), tuple(terms))


def polynomial(function: ca.Function) -> bool:
    """Whether the outputs of an MX function are polynomials in its inputs, by the operations that it has."""
    used = {function.instruction_id(k) for k in range(function.n_instructions())}
    return used <= _POLYNOMIAL


def _multiplications(function: ca.Function) -> int:
    """In the matrix products of an MX function: to write one out takes seconds for millions of them."""
    total = 0
    for k in range(function.n_instructions()):
        if function.instruction_id(k) == ca.OP_MTIMES:
            product = function.instruction_MX(k)
            left, right = product.dep(1), product.dep(2)
            total += left.nnz() * right.nnz() // max(1, left.size2())
    return total


def _smooth(function: ca.Function) -> bool:
    """Whether an SX function has arithmetic alone: the derivative of a step is zero wherever there is one."""
    used = {function.instruction_id(k) for k in range(function.n_instructions())}
    return used <= _ARITHMETIC
