"""A compiled problem as a CVXPY problem that is canonicalised once:

    minimise f(z)   subject to   h(z) = 0,  g(z) <= 0,  lower <= z <= upper

Each function takes the first of these forms that fits it:

1. its expression, lowered from the graph, if DCP accepts it with parameters as parameters (DPP);
2. its coefficients, if it is affine, ``A z + b``, or a convex quadratic, ``1/2 |F z|^2 + q^T z + c``,
   in the variables, whatever it is in the parameters: ``A, b, F, q, c`` are read off its derivatives;
3. its expression, if DCP accepts it once the parameters are numbers: canonicalised at every call.

What fits none is refused, with the term that breaks the rules.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.atoms.affine.wraps import nonneg_wrap, nonpos_wrap, psd_wrap
from torch import fx

from ddn_solvers.arrays import Array
from ddn_solvers.errors import BackendCannotSolve
from ddn_solvers.lowering.cvxpy_lowering import (
    Convexity,
    Lowering,
    NotLowered,
    Values,
    evaluate,
    hoistable,
    square_root,
)
from ddn_solvers.lowering.cvxpy_operations import Expression

__all__ = ["Convexity", "Model", "Models", "convexity"]

_ELSEWHERE = "A nonlinear backend such as 'casadi:ipopt' takes it."
_FUNCTIONS = ("objective", "equality", "inequality")


class Program(Protocol):
    """What is read of a compiled problem (``ddn_solvers.program.Program``)."""

    @property
    def graph(self) -> Any: ...
    @property
    def variables(self) -> Any: ...
    @property
    def equality(self) -> Any: ...
    @property
    def inequality(self) -> Any: ...
    @property
    def parameters(self) -> Sequence[Any]: ...
    @property
    def compiled(self) -> bool: ...
    @property
    def kinks(self) -> Sequence[Any]: ...
    @property
    def jacobian_pattern(self) -> Any: ...
    @property
    def hessian_pattern(self) -> Any: ...
    def degree(self, kind: str, name: str) -> int | None: ...
    def values(self, z: Array, parameters: Any) -> tuple[Array, Array]: ...
    def first_order(self, z: Array, parameters: Any) -> Any: ...
    def hessian(self, z: Array, parameters: Any, weights: Array, objective_weight: float) -> Array: ...
    def evaluate_nodes(self, nodes: Sequence[fx.Node], parameters: Any) -> Sequence[Array]: ...


# --- coefficients of affine and quadratic functions ------------------------------------------------


class Expansion:
    """Derivatives of every function at one point, for one instance's parameters."""

    def __init__(self, program: Program, parameters: Sequence[Array]) -> None:
        self.program, self.parameters = program, tuple(parameters)

    @cached_property
    def _first(self) -> tuple[Array, Any]:
        # Any point serves a function that is affine or quadratic; at 0 there is no rounding, but
        # another function may be undefined there and spoil what they are computed with.
        n = self.program.variables.size
        for point in (np.zeros(n), np.full(n, 0.5)):
            first = self.program.first_order(point, self.parameters)
            if np.isfinite(first.jacobian).all() and np.isfinite(first.gradient).all():
                break
        return point, first

    def _hessian(self, row: int | None) -> Any:
        weights = np.zeros(self.program.equality.size + self.program.inequality.size)
        if row is not None:
            weights[row] = 1.0
        nonzeros = self.program.hessian(self._first[0], self.parameters, weights, float(row is None))
        return self.program.hessian_pattern.matrix(nonzeros[0]).toarray()

    def affine(self, rows: range, entries: Any) -> tuple[Array, Array]:
        """Nonzeros of A, those ``entries`` of the Jacobian, and b."""
        point, first = self._first
        jacobian = first.jacobian[0]
        at_zero = first.constraints[0] - self.program.jacobian_pattern.matrix(jacobian) @ point
        return jacobian[entries], at_zero[rows.start : rows.stop]

    def quadratic(self, row: int | None) -> tuple[Array, Array, float]:
        """P, q and c of the objective (``None``) or of one constraint."""
        point, first = self._first
        P = self._hessian(row)
        if row is None:
            value, gradient = float(np.ravel(first.objective)[0]), first.gradient[0]
        else:
            value = float(first.constraints[0][row])
            gradient = self.program.jacobian_pattern.matrix(first.jacobian[0]).tocsr()[[row]].toarray()[0]
        return P, gradient - P @ point, value - float(gradient @ point) + 0.5 * float(point @ P @ point)


class Form:
    """A function by its coefficients: an expression, and the values of its parameters at each call."""

    label: str
    expression: Expression

    def prepare(self, expansion: Expansion) -> list[tuple[cp.Parameter, Any]] | None:
        """Parameters with their values; ``None`` if what was taken for constant has changed."""
        raise NotImplementedError


class AffineForm(Form):
    """``A z + b`` for some rows of the constraints, A by its nonzeros."""

    def __init__(self, program: Program, z: cp.Variable, label: str, rows: range) -> None:
        pattern = program.jacobian_pattern
        self.label, self.rows = label, rows
        self.entries = np.flatnonzero((pattern.indices >= rows.start) & (pattern.indices < rows.stop))
        count = len(self.entries)
        self.offset = cp.Parameter(len(rows))
        self.nonzeros = cp.Parameter(count) if count else None
        self.expression = self.offset
        if self.nonzeros is not None:
            row_sums = np.zeros((len(rows), count))
            row_sums[pattern.indices[self.entries] - rows.start, np.arange(count)] = 1.0
            products = cp.multiply(self.nonzeros, z[pattern.columns[self.entries]])
            self.expression = cp.Constant(sp.csr_array(row_sums)) @ products + self.offset

    def prepare(self, expansion: Expansion) -> list[tuple[cp.Parameter, Any]]:
        nonzeros, offset = expansion.affine(self.rows, self.entries)
        pairs = [(self.offset, offset)]
        return pairs if self.nonzeros is None else [*pairs, (self.nonzeros, nonzeros)]


class QuadraticForm(Form):
    """``1/2 z^T P z + q^T z + c``, the objective or one constraint, convex.

    P is taken for a constant until it changes (``varies``), since most are and a constant leads to
    a smaller problem; one that varies enters by its factor, which keeps the problem parametrised.

    Raises:
        BackendCannotSolve: P is not positive semidefinite.
    """

    def __init__(
        self, z: cp.Variable, label: str, row: int | None, expansion: Expansion, varies: bool
    ) -> None:
        self.label, self.row = label, row
        P, _, _ = expansion.quadratic(row)
        self.support = np.arange(len(P)) if varies else np.flatnonzero(P.any(axis=0))
        self.P = None if varies else P
        self.q, self.constant = cp.Parameter(len(P)), cp.Parameter()
        self.factor = cp.Parameter(P.shape) if varies else None
        root = self._root(P)
        self.expression = self.q @ z + self.constant
        if self.factor is not None:
            self.expression += 0.5 * cp.sum_squares(self.factor @ z)
        elif len(self.support) and row is None:
            self.expression += 0.5 * cp.quad_form(z[self.support], psd_wrap(root.T @ root))
        elif len(self.support):
            self.expression += 0.5 * cp.sum_squares(root @ z[self.support])

    def _root(self, P: Array) -> Array:
        try:
            return square_root(P[np.ix_(self.support, self.support)])
        except ValueError as error:
            raise BackendCannotSolve(
                f"{self.label} is quadratic and not convex: {error}. {_ELSEWHERE}"
            ) from error

    def prepare(self, expansion: Expansion) -> list[tuple[cp.Parameter, Any]] | None:
        P, q, constant = expansion.quadratic(self.row)
        pairs = [(self.q, q), (self.constant, constant)]
        if self.factor is not None:
            return [*pairs, (self.factor, self._root(P))]
        return pairs if self.P is not None and np.array_equal(P, self.P) else None


# --- the problem --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """Which entries are bounded below, above, or fixed, and the sign that bounds give each variable."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    fixed: tuple[int, ...]
    signs: tuple[int, ...]

    @staticmethod
    def of(program: Program, lower: Array, upper: Array) -> Bounds:
        fixed = lower == upper
        return Bounds(
            tuple(np.flatnonzero(np.isfinite(lower) & ~fixed).tolist()),
            tuple(np.flatnonzero(np.isfinite(upper) & ~fixed).tolist()),
            tuple(np.flatnonzero(fixed).tolist()),
            tuple(
                1
                if (lower[b.start : b.stop] >= 0).all()
                else -1
                if (upper[b.start : b.stop] <= 0).all()
                else 0
                for b in program.variables.blocks
            ),
        )


class Model:
    """One CVXPY problem: built for the signs and constants that hold now, valid while they hold.

    Attributes:
        z: The variables, flat.
        constraints: CVXPY constraint of each equality and inequality, by ``(kind, name)``.
        at_bounds: Constraint of the ``lower``, ``upper`` and ``fixed`` entries of ``bounds``.
        fallback: Functions for whose sake the problem is canonicalised at every call.

    Raises:
        BackendCannotSolve: A function is not convex, or not so that CVXPY could see it.
    """

    def __init__(
        self, program: Program, bounds: Bounds, values: Values, expansion: Expansion, varying: set[str]
    ) -> None:
        self.bounds, self.z = bounds, cp.Variable(program.variables.size)
        self.forms: list[Form] = []
        self.fallback: list[str] = []
        self.constraints: dict[tuple[str, str], cp.Constraint] = {}
        self._program, self._expansion, self._varying = program, expansion, varying
        blocks = signed_blocks(program, self.z, bounds.signs)
        self._lowering = Lowering(program.graph.module, blocks, values, _names(program))
        self._problems: dict[str, cp.Problem] = {}
        self._objective = self._build_functions()
        self._build_bounds()

    def _build_functions(self) -> Expression:
        objective: Expression = cp.Constant(0.0)
        for index, (kind, name) in enumerate(self._program.graph.outputs):
            if kind == "objective":
                objective = self._function(index, kind, name)
            elif kind in _FUNCTIONS and len(_rows(self._program, kind, name)):
                expression = self._function(index, kind, name)
                self.constraints[kind, name] = expression == 0 if kind == "equality" else expression <= 0
        return objective

    def _build_bounds(self) -> None:
        self.at_bounds: dict[str, cp.Constraint] = {}
        self._bound_values: dict[str, cp.Parameter] = {}
        for side in ("lower", "upper", "fixed"):
            entries = list(getattr(self.bounds, side))
            if not entries:
                continue
            value = self._bound_values[side] = cp.Parameter(len(entries))
            above = self.z[entries] - value
            if side == "fixed":
                self.at_bounds[side] = above == 0
            else:
                self.at_bounds[side] = (above if side == "upper" else -above) <= 0

    def _function(self, index: int, kind: str, name: str) -> Expression:
        label = _label(kind, name)
        expression, refusal, _ = _expression(self._lowering, index, kind)
        if expression is not None and expression.is_dpp():
            return expression
        degree = self._program.degree(kind, name)
        if degree is not None and degree <= (1 if kind == "equality" else 2):
            return self._by_coefficients(kind, name, degree)
        if expression is None:
            raise BackendCannotSolve(f"CVXPY cannot take the {label}: {refusal}. {_ELSEWHERE}")
        self.fallback.append(label)
        return expression

    def _by_coefficients(self, kind: str, name: str, degree: int) -> Expression:
        label, forms = _label(kind, name), self.forms
        if kind == "objective":
            forms.append(QuadraticForm(self.z, label, None, self._expansion, label in self._varying))
            return forms[-1].expression
        rows = _rows(self._program, kind, name)
        if degree <= 1:
            forms.append(AffineForm(self._program, self.z, label, rows))
            return forms[-1].expression
        new = [QuadraticForm(self.z, label, row, self._expansion, label in self._varying) for row in rows]
        forms.extend(new)
        return cp.hstack([form.expression for form in new])

    def prepare(self, values: Values, expansion: Expansion, lower: Array, upper: Array) -> bool:
        """Give every CVXPY parameter its value; ``False`` if the model does not hold for them."""
        pairs: list[tuple[cp.Parameter, Any]] = []
        for hoisted in self._lowering.hoisted:
            value = hoisted.prepare(values)
            if value is None:
                return False
            pairs.append((hoisted.parameter, value))
        for form in self.forms:
            prepared = form.prepare(expansion)
            if prepared is None:
                self._varying.add(form.label)
                return False
            pairs += prepared
        for side, parameter in self._bound_values.items():
            pairs.append((parameter, (upper if side == "upper" else lower)[list(getattr(self.bounds, side))]))
        for parameter, value in pairs:
            parameter.value = value
        return True

    def problem(self, solver: str) -> cp.Problem:
        """The problem whose canonical form for this solver is kept."""
        if solver not in self._problems:
            constraints = [*self.constraints.values(), *self.at_bounds.values(), *self._lowering.constraints]
            self._problems[solver] = cp.Problem(cp.Minimize(self._objective), constraints)
        return self._problems[solver]


class Models:
    """The models of one program, found by what they assume. Hold ``lock`` from ``find`` to the last read."""

    _KEPT = 16  # models of one shape of bounds: each holds a canonical form

    def __init__(self, program: Program) -> None:
        self.lock = threading.Lock()
        self._program = program
        self._models: dict[Bounds, list[Model]] = {}
        self._varying: set[str] = set()
        outputs = [k for k, (kind, _) in enumerate(program.graph.outputs) if kind in _FUNCTIONS]
        self._nodes = hoistable(program.graph.module, len(program.variables.blocks), outputs)

    def find(self, parameters: Sequence[Array], lower: Array, upper: Array) -> Model:
        """The model for these numbers, its CVXPY parameters set; built if there is none.

        Raises:
            BackendCannotSolve: The problem is not convex, or not so that CVXPY could see it.
            FloatingPointError: An expression of the parameters is not finite.
        """
        values = self._node_values(parameters)
        for node, value in values.items():
            if not np.isfinite(value).all():
                raise FloatingPointError(f"'{node.name}', an expression of the parameters, is not finite")
        bounds = Bounds.of(self._program, lower, upper)
        models = self._models.setdefault(bounds, [])
        expansion = Expansion(self._program, parameters)
        for model in reversed(models):
            if model.prepare(values, expansion, lower, upper):
                return model
        model = Model(self._program, bounds, values, expansion, self._varying)
        model.prepare(values, expansion, lower, upper)
        models.append(model)
        del models[: -self._KEPT]
        return model

    def _node_values(self, parameters: Sequence[Array]) -> Values:
        if not self._nodes:
            return {}
        if self._program.compiled:
            found = self._program.evaluate_nodes(self._nodes, parameters)
        else:
            graph, variables = self._program.graph, len(self._program.variables.blocks)
            found = evaluate(graph.module, self._nodes, variables, parameters)
        return {node: np.ravel(value) for node, value in zip(self._nodes, found, strict=True)}


def signed_blocks(program: Program, z: cp.Variable, signs: Sequence[int]) -> list[Expression]:
    """Each variable as an expression of known sign: CVXPY's rules know no bounds."""
    wraps = {1: nonneg_wrap, -1: nonpos_wrap, 0: lambda block: block}
    return [wraps[s](z[b.start : b.stop]) for b, s in zip(program.variables.blocks, signs, strict=True)]


def _expression(lowering: Lowering, index: int, kind: str) -> tuple[Expression | None, str, bool]:
    """The expression of a function if its curvature is right for its place, else why not; whatever the parameters?"""
    try:
        expression = lowering.output(index).expression
    except NotLowered as refusal:
        return None, str(refusal), refusal.final
    wanted = "affine" if kind == "equality" else "convex"
    if getattr(expression, f"is_{wanted}")():
        return expression, "", False
    return None, f"it is {expression.curvature.lower()} and has to be {wanted}", True


def _names(program: Program) -> list[str]:
    return [block.name for block in (*program.variables.blocks, *program.parameters)]


def _rows(program: Program, kind: str, name: str) -> range:
    """Rows of a constraint in [equality; inequality]."""
    block = getattr(program, kind).by_name[name]
    start = block.start + (program.equality.size if kind == "inequality" else 0)
    return range(start, start + block.size)


def _label(kind: str, name: str) -> str:
    return kind if kind == "objective" else f"{kind}[{name!r}]"


# --- what ``explain`` says ------------------------------------------------------------------------------


def convexity(program: Program) -> Convexity:
    """Whether the problem is convex as CVXPY sees it, for all values of the parameters."""
    module = program.graph.module
    if module is None:
        return Convexity(
            False, "unknown: the functions are torch callbacks, which have no expression", excluded=True
        )
    blocks = signed_blocks(program, cp.Variable(program.variables.size), _constant_signs(program))
    lowering = Lowering(module, blocks, names=_names(program))
    by_hessian, every_call = [], []
    for index, (kind, name) in enumerate(program.graph.outputs):
        if kind not in _FUNCTIONS:
            continue
        label, degree = _label(kind, name), program.degree(kind, name)
        expression, refusal, final = _expression(lowering, index, kind)
        if (expression is not None and expression.is_dpp()) or degree in (0, 1):
            continue
        by_coefficients = degree == 2 and kind != "equality"
        if expression is not None:
            every_call.append(label)
        elif by_coefficients and not program.parameters:
            refusal = _indefinite(program, kind, name)
            by_hessian.append(label)
        if expression is None and refusal:
            excluded = not program.parameters or (final and not by_coefficients)
            return Convexity(False, f"not known to be convex: {label}: {refusal}", excluded)
    reason = "convex by the DCP rules"
    if by_hessian:
        reason += f" and, for {', '.join(by_hessian)}, by its Hessian"
    how = f"at every call for {', '.join(every_call)}" if every_call else "once"
    return Convexity(True, f"{reason}; canonicalised {how}")


def _indefinite(program: Program, kind: str, name: str) -> str:
    """Why a quadratic without parameters is not convex; empty if it is."""
    expansion = Expansion(program, ())
    for row in [None] if kind == "objective" else _rows(program, kind, name):
        try:
            square_root(expansion.quadratic(row)[0])
        except ValueError as error:
            return f"it is quadratic and not convex: {error}"
    return ""


def _constant_signs(program: Program) -> tuple[int, ...]:
    """The sign that bounds without parameters give each variable."""
    lowering = Lowering(
        program.graph.module, [cp.Constant(np.zeros(b.size)) for b in program.variables.blocks]
    )
    sides: dict[tuple[str, str], Any] = {}
    for index, (kind, name) in enumerate(program.graph.outputs):
        if kind in ("lower", "upper"):
            bound = lowering.output(index).expression
            sides[kind, name] = None if bound.parameters() else bound.value
    signs = []
    for block in program.variables.blocks:
        lower, upper = sides.get(("lower", block.name)), sides.get(("upper", block.name))
        nonnegative = lower is not None and bool(np.all(lower >= 0))
        signs.append(1 if nonnegative else -1 if upper is not None and bool(np.all(upper <= 0)) else 0)
    return tuple(signs)
