"""A CVXPY problem as a ``Problem``: the same variables, parameters and constraints, the functions in torch.

minimise f(u, x)            objective of Minimize, minus that of Maximize
subject to  lhs - rhs = 0,  lhs - rhs <= 0,  |X| - t <= 0 for each cone of SOC(t, X)
lower <= u <= upper         what the variables' attributes and the domains of the atoms say
"""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ddn_solvers.arrays import Array
from ddn_solvers.errors import ProblemError
from ddn_solvers.imported.cvxpy_atoms import lowered, quoted
from ddn_solvers.imported.formula import Formula, FormulaBuilder, Operation
from ddn_solvers.problem import Bound, Function, Problem
from ddn_solvers.validation import RESERVED, callable_name

# What an attribute of a variable asks for that is neither a bound nor an equality.
UNREPRESENTABLE = {
    "complex": "a complex one",
    "imag": "an imaginary one",
    "hermitian": "a Hermitian one",
    "boolean": "a boolean one",
    "integer": "an integer one",
    "PSD": "a positive semidefinite cone",
    "NSD": "a negative semidefinite cone",
}
SIDES = {
    "Equality": "equality",
    "Zero": "equality",
    "Inequality": "inequality",
    "NonPos": "inequality",
    "NonNeg": "inequality",
    "SOC": "inequality",
}
# Atoms whose entries are entries of their argument, and atoms whose slope is infinite, or which have no value, at the
# edge of their domain.
REARRANGEMENTS = ("Promote", "broadcast_to", "index", "reshape", "special_index", "transpose")
NO_SOLUTION_AT_EDGE = frozenset(
    "entr GeoMean GeoMeanApprox kl_div log log1p Pnorm PnormApprox quad_over_lin rel_entr".split()
)
CONES = {
    "PSD": "a semidefinite cone",
    "ExpCone": "an exponential cone",
    "PowCone3D": "a power cone",
    "PowConeND": "a power cone",
    "FiniteSet": "a finite set",
}


def from_cvxpy(problem: Any, parameters: Sequence[Any], variables: Sequence[Any]) -> Problem:
    """Take over a problem that was written for CVXPY, with the arguments of cvxpylayers' ``CvxpyLayer``.

    The problem need not be DCP or DPP: its functions become torch functions, and any backend may solve it.

    Args:
        problem: A ``cvxpy.Problem``. ``Maximize(f)`` becomes the minimisation of -f, at the same point;
            ``solution.objective`` is then minus CVXPY's value.
        parameters: All of its ``cvxpy.Parameter`` objects, in the order in which a layer takes them. What
            their attributes promise (``nonneg``, ``PSD``, ...) is not checked.
        variables: Those of its ``cvxpy.Variable`` objects that come first in the ``Problem``, in this order.
            The others follow in the order of ``problem.variables()``: a layer returns all of them.

    Returns:
        A ``Problem`` whose variables and parameters have the shapes and names that they have in CVXPY; one whose
        name is no Python identifier, or that another one has too, is called ``variable0``,
        ``parameter1``, ... by its place. Constraints are called by their label, else ``equality0``,
        ``inequality0``, ... by their place among those of their kind. ``nonneg``, ``nonpos``, ``pos``,
        ``neg``, ``bounds``, ``diag`` and ``sparsity`` of a variable are bounds, ``symmetric`` is the equality
        ``"<name>_symmetric"`` of its two triangles. The domain that an atom implies (``log``, ``sqrt``, a
        power, ...) is a bound where its argument is a variable, else, unless CVXPY can see that
        it holds, the inequality ``"domain0"``, ...

    Raises:
        ProblemError: A parameter or variable is missing, occurs twice or does not belong to the problem; an
            atom, a cone or an attribute has no counterpart. The message names it.
    """
    import cvxpy as cp

    if not isinstance(problem, cp.Problem):
        raise ProblemError(
            "problem is not a CVXPY problem", expected="a cvxpy.Problem", got=type(problem).__name__
        )
    ordered = _ordered_variables(cp, problem, variables)
    _check_parameters(cp, problem, ordered, parameters)
    names = _names(ordered, list(parameters))
    equality, inequality = _constraints(problem, names)
    symmetries = {
        f"{names[variable.id]}_symmetric": _symmetry(variable, names)
        for variable in ordered
        if variable.attributes["symmetric"] and variable.shape[0] > 1
    }
    objective = _objective(problem.objective, names)
    at_least, domains = _domains(problem, names)
    return Problem(
        variables={names[variable.id]: variable.shape for variable in ordered},
        parameters={names[parameter.id]: parameter.shape for parameter in parameters},
        objective=objective,
        equality=_added(equality, symmetries),
        inequality=_added(inequality, domains),
        bounds={names[v.id]: _bounds(v, at_least.get(v.id), names) for v in ordered},
    )


# --- variables and parameters ------------------------------------------------------------------------------


def _ordered_variables(cp: Any, problem: Any, listed: Sequence[Any]) -> list[Any]:
    """The listed variables, then the others."""
    present = problem.variables()
    _check_listed("variables", cp.Variable, listed, present)
    for variable in present:
        for attribute, kind in UNREPRESENTABLE.items():
            if _has(variable.attributes[attribute]):
                raise ProblemError(
                    f"the variable {variable.name()!r} is declared {attribute}",
                    expected="real variables, whose attributes are bounds or equalities",
                    fix=f"A Problem has no {kind}; symmetric=True with log_det stays inside the cone."
                    if attribute in ("PSD", "NSD")
                    else f"A Problem has no {kind}.",
                )
    ids = {variable.id for variable in listed}
    return [*listed, *(variable for variable in present if variable.id not in ids)]


def _check_parameters(cp: Any, problem: Any, variables: Sequence[Any], listed: Sequence[Any]) -> None:
    present = {parameter.id: parameter for parameter in problem.parameters()}
    for variable in variables:
        for side in variable.attributes["bounds"] or ():
            if isinstance(side, cp.Expression):
                present |= {parameter.id: parameter for parameter in side.parameters()}
    _check_listed("parameters", cp.Parameter, listed, list(present.values()))
    ids = {parameter.id for parameter in listed}
    missing = [parameter.name() for parameter in present.values() if parameter.id not in ids]
    if missing:
        raise ProblemError(
            f"parameters lacks {', '.join(map(repr, missing))}", expected="every parameter of the problem"
        )
    for parameter in listed:
        if parameter.is_complex():
            raise ProblemError(f"the parameter {parameter.name()!r} is complex", expected="real parameters")


def _check_listed(field: str, leaf: Any, listed: Sequence[Any], present: Sequence[Any]) -> None:
    """A list of CVXPY leaves of one kind, each once, each of the problem's."""
    if not isinstance(listed, (list, tuple)):
        raise ProblemError(
            f"{field} is not a list", expected=f"a list of cvxpy.{leaf.__name__}", got=type(listed).__name__
        )
    ids = {item.id for item in present}
    seen: set[int] = set()
    for item in listed:
        if not isinstance(item, leaf):
            raise ProblemError(
                f"{field} holds something else than a cvxpy.{leaf.__name__}", got=type(item).__name__
            )
        if item.id not in ids:
            raise ProblemError(
                f"{field} lists {item.name()!r}, which does not occur in the problem",
                expected="out of " + (", ".join(repr(other.name()) for other in present) or "none"),
            )
        if item.id in seen:
            raise ProblemError(f"{field} lists {item.name()!r} twice")
        seen.add(item.id)


def _names(variables: Sequence[Any], parameters: Sequence[Any]) -> dict[int, str]:
    """Name of each leaf by its id: CVXPY's, where it can be the name of an argument and is no other's."""
    counts = Counter(leaf.name() for leaf in (*variables, *parameters))
    names, unusable = {}, []
    for kind, leaves in (("variable", variables), ("parameter", parameters)):
        for place, leaf in enumerate(leaves):
            name = leaf.name()
            reserved = keyword.iskeyword(name) or name in RESERVED
            if name.isidentifier() and not reserved and counts[name] == 1:
                names[leaf.id] = name
            else:
                unusable.append((leaf, f"{kind}{place}"))
    for leaf, name in unusable:
        while name in names.values():
            name += "_"
        names[leaf.id] = name
    return names


def _has(attribute: Any) -> bool:
    """An attribute is a flag, or a list of the entries that it is of."""
    return attribute if isinstance(attribute, bool) else bool(len(attribute))


# --- functions -----------------------------------------------------------------------------------------------


def _formula(expression: Any, names: Mapping[int, str], finish: Operation | None = None) -> Formula:
    builder = FormulaBuilder()
    place = lowered(builder, expression, names)
    return builder.formula(str(expression), place if finish is None else builder.step(finish, place))


def _objective(objective: Any, names: Mapping[int, str]) -> Formula | None:
    expression = objective.args[0]
    if not expression.variables() and not expression.parameters() and expression.value == 0:
        return None
    maximised = type(objective).__name__ == "Maximize"
    return _formula(expression, names, _negated_scalar if maximised else _scalar)


def _scalar(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(())


def _negated_scalar(x: torch.Tensor) -> torch.Tensor:
    return -x.reshape(())


def _constraints(problem: Any, names: Mapping[int, str]) -> tuple[dict[str, Function], dict[str, Function]]:
    """Equalities and inequalities by name."""
    found: dict[str, dict[str, Function]] = {"equality": {}, "inequality": {}}
    for constraint in problem.constraints:
        kind, function = _constraint(constraint, names)
        if constraint.variables() or constraint.parameters():
            name = constraint.label or f"{kind}{len(found[kind])}"
            if name in found["equality"] or name in found["inequality"]:
                raise ProblemError(f"two constraints are called {name!r}", fix="Give them different labels.")
            found[kind][name] = function
        elif not constraint.value():
            raise ProblemError(f"the constraint {quoted(constraint)} does not hold for any value")
    return found["equality"], found["inequality"]


def _added(found: dict[str, Function], more: Mapping[str, Function]) -> dict[str, Function]:
    """The constraints of a problem and those that its variables and atoms imply."""
    for name in more:
        if name in found:
            raise ProblemError(
                f"the constraint label {name!r} is a name that is given to {callable_name(more[name])}"
            )
    return {**found, **more}


def _constraint(constraint: Any, names: Mapping[int, str]) -> tuple[str, Formula]:
    """Kind and function of a constraint, by its class."""
    kind = type(constraint).__name__
    builder = FormulaBuilder()
    places = [lowered(builder, argument, names) for argument in constraint.args] if kind in SIDES else []
    if kind in ("Equality", "Inequality"):
        left, right = constraint.args
        if _is_zero(left):
            place = builder.step(torch.neg, places[1])
        else:
            place = places[0] if _is_zero(right) else builder.step(torch.sub, *places)
    elif kind == "SOC":
        dim = constraint.axis if len(constraint.args[1].shape) == 2 else None
        place = builder.step(_cone, *places, dim=dim)
    elif kind in SIDES:
        place = builder.step(torch.neg, *places) if kind == "NonNeg" else places[0]
    else:
        raise ProblemError(
            f"the constraint {quoted(constraint)} is {CONES.get(kind, 'a ' + kind)}",
            expected="equalities, inequalities and second-order cones",
        )
    return SIDES[kind], builder.formula(str(constraint), place)


def _cone(t: torch.Tensor, X: torch.Tensor, dim: int | None) -> torch.Tensor:
    return torch.linalg.vector_norm(X, 2, dim) - t


def _is_zero(expression: Any) -> bool:
    leaf = not expression.args and not expression.variables() and not expression.parameters()
    return leaf and expression.is_zero()


def _symmetry(variable: Any, names: Mapping[int, str]) -> Formula:
    """u[i, j] - u[j, i] for i < j: one row a pair, so that the rows are independent."""
    rows, columns = np.triu_indices(variable.shape[0], 1)
    builder = FormulaBuilder()
    place = builder.argument(names[variable.id])
    above, below = torch.from_numpy(rows), torch.from_numpy(columns)
    place = builder.step(_difference_across, place, rows=above, columns=below)
    return builder.formula(f"{variable} == {variable}.T", place)


def _difference_across(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return x[rows, columns] - x[columns, rows]


# --- bounds and domains -----------------------------------------------------------------------------------


def _domains(problem: Any, names: Mapping[int, str]) -> tuple[dict[int, Array], dict[str, Formula]]:
    """What the atoms require: lower bounds by the variable's id, and inequalities for other arguments."""
    stated = {id(expression) for constraint in problem.constraints for expression in _nonnegative(constraint)}
    at_least: dict[int, Array] = {}
    domains: dict[str, Formula] = {}
    for atom, left, right in _required(problem):
        least = float(np.max(left.value))
        known = least <= 0 and (right.is_nonneg() or id(right) in stated)
        variable, entries = _entries(right)
        if variable is not None and (not known or _starts_inside(atom)):
            lower = at_least.setdefault(variable.id, np.full(variable.size, -np.inf))
            lower[entries] = np.maximum(lower[entries], least)
        elif variable is None and not known:
            stated.add(id(right))
            domains[f"domain{len(domains)}"] = _formula(left - right, names)
    return at_least, domains


def _required(problem: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Atom, left and right of ``left <= right``, outside of which the atom is not defined; left is a number."""
    pending = [problem.objective.args[0], *(e for constraint in problem.constraints for e in constraint.args)]
    visited: set[int] = set()
    while pending:
        expression = pending.pop()
        if id(expression) in visited or not expression.args:
            continue
        visited.add(id(expression))
        pending.extend(expression.args)
        for constraint in expression._domain():
            # Semidefinite domains (log_det, matrix_frac) cannot be stated.
            if type(constraint).__name__ == "Inequality" and constraint.args[1].variables():
                yield expression, *constraint.args


def _starts_inside(atom: Any) -> bool:
    """Whether its domain is stated even where a constraint says the same, for solvers that have to begin inside.

    It does no harm as long as no solution lies at the edge, where the two would be dependent.
    """
    kind = type(atom).__name__
    return kind in NO_SOLUTION_AT_EDGE or (kind in ("Power", "PowerApprox") and atom.p.value < 1)


def _entries(expression: Any) -> tuple[Any, Array]:
    """The variable that an expression rearranges, and which of its entries; ``None`` if it is something else."""
    movements = []
    while type(expression).__name__ in REARRANGEMENTS:
        movements.append(expression)
        expression = expression.args[0]
    if expression.args:
        return None, np.zeros(0)
    entries = np.arange(expression.size, dtype=np.float64).reshape(expression.shape)
    for movement in reversed(movements):
        entries = np.asarray(movement.numeric([entries]))
    return expression, entries.astype(int).ravel()


def _nonnegative(constraint: Any) -> list[Any]:
    """Expressions that a constraint of the problem keeps nonnegative."""
    kind = type(constraint).__name__
    if kind == "NonNeg":
        return [constraint.args[0]]
    if kind == "Inequality" and constraint.args[0].is_nonneg():
        return [constraint.args[1]]
    return []


def _bounds(variable: Any, at_least: Array | None, names: Mapping[int, str]) -> tuple[Bound, Bound]:
    attributes = variable.attributes
    lower, upper = np.full(variable.shape, -np.inf), np.full(variable.shape, np.inf)
    if at_least is not None:
        lower = at_least.reshape(variable.shape)
    if attributes["nonneg"] or attributes["pos"]:
        lower = np.maximum(lower, 0.0)
    if attributes["nonpos"] or attributes["neg"]:
        upper = np.minimum(upper, 0.0)
    if attributes["diag"]:
        outside = ~np.eye(variable.shape[0], dtype=bool)
    elif variable.sparse_idx is not None:
        outside = np.ones(variable.shape, dtype=bool)
        outside[variable.sparse_idx] = False
    else:
        outside = np.zeros(variable.shape, dtype=bool)
    lower, upper = np.where(outside, 0.0, lower), np.where(outside, 0.0, upper)
    sides = attributes["bounds"] or (-np.inf, np.inf)
    return _side(lower, sides[0], torch.maximum, names), _side(upper, sides[1], torch.minimum, names)


def _side(values: Array, declared: Any, tighter: Operation, names: Mapping[int, str]) -> Bound:
    """One side: what attributes and domains say, and what the variable's own bounds do."""
    if hasattr(declared, "parameters") and declared.parameters():
        builder = FormulaBuilder()
        place = lowered(builder, declared, names)
        if np.isfinite(values).any():
            place = builder.step(tighter, place, builder.constant(values))
        return builder.formula(str(declared), place)
    declared = getattr(declared, "value", declared)
    declared = declared.toarray() if hasattr(declared, "toarray") else np.asarray(declared, dtype=np.float64)
    bound = tighter(torch.from_numpy(values), torch.from_numpy(np.array(declared)))
    return bound if torch.isfinite(bound).any() else None
