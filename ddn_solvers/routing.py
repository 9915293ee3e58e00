"""From the name of a solver to what is tried, in order: backend, method, form of the problem, and where it begins."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ddn_solvers import registry
from ddn_solvers.adapter import Feature, ProblemClass
from ddn_solvers.errors import BackendCannotSolve, BackendNotFound, BackendNotInstalled, ProblemError
from ddn_solvers.kkt.bands import by_bands
from ddn_solvers.kkt.operator import large_and_sparse
from ddn_solvers.program import Program
from ddn_solvers.search import Form, Route, Start

Solver = str | Sequence[str]

# What "auto" tries, in order, by problem class; entries that cannot take the problem are passed over.
AUTO: Mapping[ProblemClass, tuple[str, ...]] = {
    ProblemClass.LP: ("highs", "scipy:highs", "casadi:ipopt"),
    ProblemClass.QP: ("daqp", "casadi:daqp", "casadi:ipopt"),
    ProblemClass.LEAST_SQUARES: ("casadi:ipopt", "scipy:SLSQP"),
    ProblemClass.NLP: ("casadi:ipopt", "scipy:SLSQP"),
}
AUTO_SPARSE_QP = ("clarabel", "casadi:ipopt")  # DAQP's algebra is dense
# Before those, on small smooth problems: whole batches at a time, dense.
AUTO_SMALL = "newton"
# Variables and rows up to which it is the faster one, from a few samples on; with inequalities or bounds.
_SMALL, _SMALL_WITH_SIDES = 128, 64
_SIDES = {Feature.BOUNDS, Feature.INEQUALITY}
AUTO_NONSMOOTH = ("cvxpy:CLARABEL", "casadi:ipopt", "scipy:SLSQP")


def routes(solver: Solver, program: Program) -> list[Route]:
    """What to try, in order; at least one."""
    if isinstance(solver, str):
        if solver == "auto":
            return _auto(program)
        return _named(solver, program)
    if not isinstance(solver, Sequence) or not solver or not all(isinstance(s, str) for s in solver):
        raise ProblemError(
            "solver is not a name", expected="'backend', 'backend:method', 'auto' or a list", got=repr(solver)
        )
    found: list[Route] = []
    refusal: BackendCannotSolve | None = None
    for name in solver:
        try:
            found += _auto(program) if name == "auto" else _named(name, program)
        except BackendCannotSolve as error:
            refusal = error
    if not found and refusal is not None:
        raise refusal
    return found


def _named(name: str, program: Program) -> list[Route]:
    """The routes of one name: with kinks lifted first, unless the method models them itself."""
    lifted = _lifted(name, program)
    try:
        plain = _route(name, program)
    except BackendCannotSolve:
        if not lifted:
            raise
        return lifted
    return [plain] if plain.method.kinks else [*lifted, plain]


def _lifted(name: str, program: Program) -> list[Route]:
    if program.lifted is None:
        return []
    try:
        return [replace(_route(name, program.lifted), form=Form.LIFTED)]
    except BackendCannotSolve:
        return []


def _route(name: str, program: Program) -> Route:
    adapter, method = registry.resolve(name, program)
    return Route(name.partition(":")[0], adapter, method)


def _auto_names(program: Program) -> tuple[str, ...]:
    sparse = large_and_sparse(program.hessian_pattern, program.jacobian_pattern)
    return (
        AUTO_SPARSE_QP if sparse and program.problem_class is ProblemClass.QP else AUTO[program.problem_class]
    )


def _auto(program: Program) -> list[Route]:
    # What a name stands for does not change: none can be registered twice.
    return program.memo("auto", lambda: _found_for(program))


def _found_for(program: Program) -> list[Route]:
    found: list[Route] = []
    smooth = program.lifted or program
    attempts = [(name, smooth) for name in _auto_names(smooth)] if program.lifted else []
    names = AUTO_NONSMOOTH if Feature.NONSMOOTH in program.features else _auto_names(program)
    for name, form in [*attempts, *((name, program) for name in names)]:
        found += _possible(name, form, Form.DECLARED if form is program else Form.LIFTED)
    if not found:
        raise BackendCannotSolve(
            "no installed backend can solve this problem; see ddn.compile(problem).explain()"
        )
    if program.quadratic:
        return found  # where one starts says nothing about where these end
    local = (r for r in found if Feature.NONCONVEX in r.method.features and r.form is Form.DECLARED)
    another = (replace(route, start=Start.ANOTHER) for route in itertools.islice(local, 1))
    return [*_quick(program), *found, *another]


def newton_first(solver: Solver, program: Program, warm_start: bool) -> bool:
    """Whether Newton steps on the active set come before the routes of ``solver``, which may then have nothing left to do.

    With "auto", from a warm start; and on QPs from any start where nothing can be active, so that one step is all there is
    to do, or where sparse steps cost much less than a solver.
    """
    if solver != "auto":
        return False
    if not program.quadratic:
        return warm_start
    if program.problem_class is not ProblemClass.QP or not program.compiled or program.pieces is not None:
        return False
    sides = program.features & _SIDES
    patterns = program.hessian_pattern, program.jacobian_pattern
    return not sides or large_and_sparse(*patterns) or by_bands(*patterns) is not None


def _quick(program: Program) -> list[Route]:
    """In the lifted form what has kinks; before that as declared, if they are norms of vectors: |u| mostly ends there."""
    forms = [] if program.numbers.any() else [(Form.DECLARED, program)]
    if program.lifted is not None:
        forms.append((Form.LIFTED, program.lifted))
    found: list[Route] = []
    for form, smooth in forms:
        size = smooth.variables.size + smooth.constraints
        large = size > (_SMALL_WITH_SIDES if smooth.features & _SIDES else _SMALL)
        if large or smooth.quadratic or not smooth.compiled:
            continue
        found += [replace(route, tentative=True) for route in _possible(AUTO_SMALL, smooth, form)]
    return found


def _possible(name: str, program: Program, form: Form) -> list[Route]:
    """The route of one name, if there is one for this problem, which is in that form."""
    try:
        return [replace(_route(name, program), form=form)]
    except (BackendCannotSolve, BackendNotFound, BackendNotInstalled):
        return []
