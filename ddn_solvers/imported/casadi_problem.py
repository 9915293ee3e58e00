"""A CasADi NLP as a ``Problem``.

    minimise f(x, p)   subject to   lbx <= x <= ubx,  lbg <= g(x, p) <= ubg

A row of g whose two bounds coincide is an equality, ``g - lbg = 0``; each finite bound of another is an
inequality, ``lbg - g <= 0`` or ``g - ubg <= 0``; one with neither is no constraint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ddn_solvers.errors import ProblemError
from ddn_solvers.imported.casadi_operations import (
    Inputs,
    Instruction,
    column_by_column,
    instructions_of,
    vectorised,
)
from ddn_solvers.layout import Shape
from ddn_solvers.problem import Bound, Problem

Column = Any  # casadi.SX of one column


def from_casadi(
    nlp: Any,
    lbx: Any = None,
    ubx: Any = None,
    lbg: Any = None,
    ubg: Any = None,
    variables: Mapping[str, Shape] | None = None,
    parameters: Mapping[str, Shape] | None = None,
) -> Problem:
    """Take over a problem that was written for ``casadi.nlpsol``, or an ``Opti``.

    Args:
        nlp: The dict that ``nlpsol`` takes: ``"x"``, and ``"p"``, ``"f"``, ``"g"`` as far as there are any, SX or
            MX. Or an ``Opti``, which has its own bounds.
        lbx: Lower bound of x, as the solver takes it: a number, or one for each entry; or an expression of p.
        ubx: Upper bound of x.
        lbg: Lower bound of g; equal to ``ubg`` where g is an equality.
        ubg: Upper bound of g.
        variables: Names and shapes of what x is made of, in its order, each entry by entry in CasADi's order:
            column by column. By default one variable, ``{"x": (n,)}``.
        parameters: The same for p. By default ``{"p": (m,)}``.

    Returns:
        A ``Problem`` with the constraints ``"g_equal"``, ``"g_lower"`` and ``"g_upper"``, each the rows of g
        that are of this kind, in order. CasADi's multiplier ``lam_g`` is that of ``g_equal`` on its rows,
        elsewhere that of ``g_upper`` minus that of ``g_lower``.

    Raises:
        ProblemError: A field, bound, name or shape is not what it has to be; a function depends on a symbol
            that is neither in x nor in p; or an operation has no counterpart in torch: the message names it.
    """
    import casadi as ca

    fields, bounds = _declaration(ca, nlp, {"lbx": lbx, "ubx": ubx, "lbg": lbg, "ubg": ubg})
    n, m = fields["x"].numel(), fields["p"].numel()
    variables = _shapes("variables", {"x": (n,)} if variables is None else variables, n)
    parameters = _shapes("parameters", {"p": (m,)} if parameters is None and m else parameters or {}, m)
    symbols, values = _expanded(ca, fields, bounds)
    rows = _rows(ca, values)
    listed, outputs = instructions_of(ca.Function("rows", symbols, list(rows.values())))
    results = dict(zip(rows, outputs, strict=True))
    inputs = Inputs(variables, parameters)
    functions = {
        name: vectorised(f"{name} of CasADi", listed, results[name], inputs, (len(results[name]),))
        for name in ("g_equal", "g_lower", "g_upper")
        if results[name]
    }
    has_objective = listed[results["f"][0]].what != 0.0
    return Problem(
        variables=variables,
        parameters=parameters,
        objective=vectorised("f of CasADi", listed, results["f"], inputs, ()) if has_objective else None,
        equality={name: function for name, function in functions.items() if name == "g_equal"},
        inequality={name: function for name, function in functions.items() if name != "g_equal"},
        bounds=_bounds(variables, listed, results, inputs),
    )


# --- the declaration -------------------------------------------------------------------------------------------


def _declaration(ca: Any, nlp: Any, bounds: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """x, p, f, g, and the bounds, each as the column that it is in CasADi."""
    if isinstance(nlp, ca.Opti):
        given = [name for name, bound in bounds.items() if bound is not None]
        if given:
            raise ProblemError(f"{given[0]} is given beside an Opti", expected="the bounds that the Opti has")
        bounds = {"lbx": None, "ubx": None, "lbg": nlp.lbg, "ubg": nlp.ubg}
        nlp = {"x": nlp.x, "p": nlp.p, "f": nlp.f, "g": nlp.g}
    if not isinstance(nlp, Mapping):
        raise ProblemError(
            "nlp is not a problem of CasADi's", expected="a dict or an Opti", got=type(nlp).__name__
        )
    unknown = [key for key in nlp if key not in ("x", "p", "f", "g")]
    if unknown:
        raise ProblemError(f"nlp has an unknown field {unknown[0]!r}", expected="only x, p, f, g")
    if not isinstance(nlp.get("x"), (ca.SX, ca.MX)):
        raise ProblemError(
            "nlp['x'] is not a symbol of CasADi's", expected="an SX or MX", got=repr(nlp.get("x"))
        )
    if not nlp["x"].is_column() or not nlp["x"].is_dense():
        raise ProblemError(
            "nlp['x'] is not a dense column",
            got=f"shape {nlp['x'].shape}",
            fix="Take casadi.vec of it, as for nlpsol.",
        )
    kind = type(nlp["x"])
    defaults = {"p": kind(0, 1), "f": kind(0), "g": kind(0, 1)}
    fields = {"x": nlp["x"]} | {name: nlp.get(name, default) for name, default in defaults.items()}
    for name in ("p", "f", "g"):
        try:
            fields[name] = ca.densify(ca.vec(kind(fields[name])))
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ProblemError(
                f"nlp[{name!r}] is not an expression",
                expected=f"{kind.__name__}, as x",
                got=repr(fields[name]),
            ) from error
    if fields["f"].numel() != 1:
        raise ProblemError("nlp['f'] is not a scalar", got=f"shape {fields['f'].shape}")
    if fields["g"].numel() and bounds["lbg"] is None and bounds["ubg"] is None:
        raise ProblemError("g has no bounds", expected="lbg, ubg or both", fix="For g(x) = 0 both are 0.")
    return fields, {
        name: _column(ca, kind, name, bound, fields[name[2:]].numel()) for name, bound in bounds.items()
    }


def _column(ca: Any, kind: Any, name: str, bound: Any, size: int) -> Any:
    """A bound as a column of ``size`` entries."""
    if bound is None:
        bound = -math.inf if name.startswith("lb") else math.inf
    try:
        column = ca.densify(ca.vec(kind(bound if isinstance(bound, (ca.SX, ca.MX, ca.DM)) else ca.DM(bound))))
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ProblemError(
            f"{name} is not a bound", expected=f"numbers or an {kind.__name__} of p", got=repr(bound)
        ) from error
    if column.numel() == 1:
        return ca.repmat(column, size, 1)
    if column.numel() != size:
        raise ProblemError(f"{name} has the wrong size", expected=f"1 or {size}", got=str(column.numel()))
    return column


def _shapes(field: str, shapes: Any, size: int) -> dict[str, Shape]:
    """Names and shapes whose entries are those of x or p."""
    whole = "nlp['x']" if field == "variables" else "nlp['p']"
    if not isinstance(shapes, Mapping) or not all(
        isinstance(shape, tuple) and all(isinstance(extent, int) for extent in shape)
        for shape in shapes.values()
    ):
        raise ProblemError(f"{field} is not a dict from names to shapes", got=repr(shapes))
    count = sum(math.prod(shape) for shape in shapes.values())
    if count != size:
        raise ProblemError(
            f"{field} has {count} entries", expected=f"the {size} of {whole}", got=str(dict(shapes))
        )
    return dict(shapes)


# --- scalar expressions --------------------------------------------------------------------------------------


def _expanded(
    ca: Any, fields: Mapping[str, Any], bounds: Mapping[str, Any]
) -> tuple[list[Column], dict[str, Column]]:
    """New symbols for x and p, and everything in terms of them, in scalar operations."""
    parts = {"f": fields["f"], "g": fields["g"], **bounds}
    try:
        function = ca.Function("nlp", [fields["x"], fields["p"]], list(parts.values()))
    except RuntimeError as error:
        raise ProblemError(
            f"nlp cannot be a function of x and p: {_reason(error)}",
            expected="x and p made of symbols, and nothing else in f, g and the bounds",
        ) from error
    symbols = [ca.SX.sym("x", fields["x"].numel()), ca.SX.sym("p", fields["p"].numel())]
    try:
        values = function(*symbols)
    except RuntimeError as error:
        raise ProblemError(
            f"nlp cannot be expanded into scalar operations: {_reason(error)}",
            fix="Write what is named there with elementary operations: logsumexp(v) as log(sum1(exp(v))); or use SX.",
        ) from error
    found = dict(zip(parts, values, strict=True))
    for name in bounds:
        if ca.depends_on(found[name], symbols[0]):
            raise ProblemError(f"{name} depends on x", expected="numbers or an expression of p")
    return symbols, found


def _reason(error: RuntimeError) -> str:
    """The last line of CasADi's message, without the place in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rpartition(".cpp:")[2].partition(": ")[2] or lines[-1]


def _rows(ca: Any, values: Mapping[str, Column]) -> dict[str, Column]:
    """f, the bounds of x, and the rows of g by kind, each such that zero is its bound."""
    kinds: dict[str, list[Column]] = {"g_equal": [], "g_lower": [], "g_upper": []}
    for i in range(values["g"].numel()):
        g, lower, upper = (values[name][i] for name in ("g", "lbg", "ubg"))
        for name, bound, impossible in (("lbg", lower, math.inf), ("ubg", upper, -math.inf)):
            if bound.is_constant() and (math.isnan(float(bound)) or float(bound) == impossible):
                raise ProblemError(f"{name}[{i}] is {float(bound)}, which no value satisfies")
        if ca.is_equal(lower, upper, 100):
            kinds["g_equal"].append(g - lower)
            continue
        if lower.is_constant() and upper.is_constant() and float(lower) > float(upper):
            raise ProblemError(f"the bounds of g[{i}] contradict", got=f"lbg={lower}, ubg={upper}")
        if not (lower.is_constant() and float(lower) == -math.inf):
            kinds["g_lower"].append(lower - g)
        if not (upper.is_constant() and float(upper) == math.inf):
            kinds["g_upper"].append(g - upper)
    rows = {name: values[name] for name in ("f", "lbx", "ubx")}
    return rows | {name: ca.vertcat(*found) if found else ca.SX(0, 1) for name, found in kinds.items()}


def _bounds(
    variables: Mapping[str, Shape],
    listed: Sequence[Instruction],
    results: Mapping[str, list[int]],
    inputs: Inputs,
) -> dict[str, tuple[Bound, Bound]]:
    """Of each variable: numbers where all are, else a function of the parameters."""
    bounds, start = {}, 0
    for name, shape in variables.items():
        order = np.argsort(column_by_column(shape))
        sides: list[Bound] = []
        for side in ("lbx", "ubx"):
            entries = [results[side][start + place] for place in order]
            numbers = [what for what in (listed[i].what for i in entries) if isinstance(what, float)]
            if len(numbers) < len(entries):
                sides.append(vectorised(f"{side} of CasADi", listed, entries, inputs, shape))
            else:
                tensor = torch.tensor(numbers, dtype=torch.float64).reshape(shape)
                sides.append(None if torch.isinf(tensor).all() else tensor)
        bounds[name] = (sides[0], sides[1])
        start += math.prod(shape)
    return bounds
