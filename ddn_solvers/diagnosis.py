"""Why a sample has no solution, where the backend could not tell: infeasible or unbounded.

Infeasible: the smallest violation of the constraints within the bounds is positive. Where they are affine, that of the
largest one, a linear program, proves it, and its multipliers say which rows contradict each other; elsewhere it is that
of their squares, min |(h, max(g, 0))|^2, from the last point and from one far off, and holds locally. Unbounded: a
feasible ray along which the objective falls, which of LPs and convex QPs a linear program finds; of others one along the
last point or the slope, without end in sight.
"""

from __future__ import annotations

import numpy as np

from ddn_solvers.arrays import Array, Mask, without_symmetry
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual
from ddn_solvers.solution import Status

_NAMED = 4  # conflicting constraints named in a message
_STEPS = (1e2, 1e4, 1e6)  # along a ray, relative to max(1, |z|)
_TIGHT = 1e-10  # tolerance of HiGHS
# Entries of a row of norm one below which HiGHS may leave them out, and solve another problem.
_DROPPED = 1e-8
_BLAMELESS = 1e-6  # multiplier, of those that sum to one, that is rounding
_FAR = 2.0  # from a point of smallest violation, relative to its size, to where the search for another begins
_NEARBY = 1e-2  # relative to the size of each variable
_FALLING = 1e-6  # slope of a ray, relative to the steepest of a variable
_LARGE = 1_000_000  # nonzeros of matrices that are not looked through for one
_FALL = 1e3  # the objective has to fall by this much, relative to its scale, to count as unbounded


def diagnose(program: Program, bound: Bound, z: Array, accuracy: float) -> tuple[Status, str] | None:
    """Status and explanation of one failed sample, or ``None`` if nothing can be said.

    Args:
        bound: Of that sample alone, B = 1.
        z: The last point, (n,).
    """
    with np.errstate(all="ignore"):
        evaluation = _evaluate(program, bound, z)
        if not np.isfinite(evaluation.first.constraints).all():
            return None
        if not evaluation.scaled_feasibility[0] > accuracy:
            return _unbounded(program, bound, z, evaluation)
        closest, blamed = _least_violation(program, bound, z)
        if _feasible(program, bound, closest, accuracy):
            return _ray(program, bound) if program.quadratic else None
        if not program.affine_constraints:  # it may be the least of those nearby alone, or the largest
            far = closest + _FAR * max(1.0, np.abs(closest).max()) * without_symmetry(len(closest))
            if _feasible(program, bound, nearest_feasible(program, bound, far), accuracy):
                return None
        return _infeasible(program, bound, closest, blamed)


def _feasible(program: Program, bound: Bound, z: Array, accuracy: float) -> bool:
    """Whether a point violates no constraint by more than is rounding beside how it changes there, or nearby."""
    here = _evaluate(program, bound, z)
    far = bool(here.scaled_feasibility[0] > accuracy)
    if not far or program.affine_constraints:
        return not far
    there = _evaluate(program, bound, z + _NEARBY * here.own_size[0] * without_symmetry(len(z)))
    reach = np.maximum(
        *(at.J.absolute.times(here.own_size)[0, : program.constraints] for at in (here, there))
    )
    return bool((np.abs(violation(program, bound, z)) <= accuracy * reach).all())


def _evaluate(program: Program, bound: Bound, z: Array) -> Evaluation:
    return Evaluation.at(program, bound, PrimalDual.resting(program, bound.parameters, z[None]))


def _least_violation(program: Program, bound: Bound, z: Array) -> tuple[Array, Mask]:
    """A point of smallest violation, (n,), and the rows of c that are to blame, (equalities + inequalities,)."""
    found = _by_linear_program(program, bound) if program.affine_constraints else None
    if found is not None:
        return found
    closest = nearest_feasible(program, bound, z)
    residual = np.abs(violation(program, bound, closest))
    return closest, residual > 1e-2 * residual.max(initial=0.0)


def _by_linear_program(program: Program, bound: Bound) -> tuple[Array, Mask] | None:
    """min t,  |h| <= t and g <= t in units of the rows and of the problem's length; ``None`` if that fails."""
    import scipy.sparse as sp
    from scipy.optimize import linprog  # a quarter of a second to import, needed for failures only

    m, n = program.equality.size, program.variables.size
    at_zero = _evaluate(program, bound, np.zeros(n))
    length, norms = at_zero.length[0], at_zero.row_norms[0, : program.constraints]
    unit = np.where(norms > 0, norms, 1.0)
    pattern, nonzeros = at_zero.J.pattern, at_zero.first.jacobian[0]
    rows = sp.diags_array(1 / unit) @ pattern.matrix(nonzeros).tocsr()[: program.constraints]
    offset = at_zero.first.constraints[0, : program.constraints] / unit / length
    signed = sp.vstack([rows, -rows[:m]]).tocsr()
    above = sp.hstack([signed, sp.csr_array(-np.ones((signed.shape[0], 1)))]).tocsr()
    target = np.concatenate([-offset, offset[:m]])
    small = (above.data != 0) & (np.abs(above.data) < _DROPPED)
    if not np.isfinite(above.data).all() or not np.isfinite(target).all() or small.any():
        return None
    sides = np.stack([np.append(bound.lower[0] / length, 0.0), np.append(bound.upper[0] / length, np.inf)], 1)
    found = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=above,
        b_ub=target,
        bounds=sides,
        method="highs",
        options={"primal_feasibility_tolerance": _TIGHT, "dual_feasibility_tolerance": _TIGHT},
    )
    if found.status != 0:
        return None
    force = np.abs(found.ineqlin.marginals)
    force[:m] += force[program.constraints :]
    point = np.clip(length * found.x[:n], bound.lower[0], bound.upper[0])
    return point, force[: program.constraints] > _BLAMELESS


def nearest_feasible(program: Program, bound: Bound, z: Array) -> Array:
    """The point of smallest violation near ``z`` by Gauss and Newton's method, within the bounds, (n,)."""
    from scipy.optimize import least_squares

    lower, upper = bound.lower[0], bound.upper[0]
    free = lower < upper
    start = np.clip(z, lower, upper)

    def embed(values: Array) -> Array:
        point = start.copy()
        point[free] = values
        return point

    def jacobian(values: Array) -> Array:
        evaluation = _evaluate(program, bound, embed(values))
        violated = violation(program, bound, embed(values)) > 0
        violated[: program.equality.size] = True
        return (evaluation.jacobian[0, : program.constraints] * violated[:, None])[:, free]

    if not free.any():
        return start
    try:
        found = least_squares(
            lambda values: violation(program, bound, embed(values)),
            start[free],
            jacobian,
            (lower[free], upper[free]),
            # Where there are fewer rows than variables, "trf" goes as far as it may in any case, here to the zero of a sphere.
            method="trf" if program.constraints >= free.sum() else "dogbox",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=200,
        )
    except ValueError:  # numbers that are not finite: the point itself is the best there is
        return start
    return embed(found.x)


def violation(program: Program, bound: Bound, z: Array) -> Array:
    """h and max(g, 0) at the point z (n,) of one sample, (equalities + inequalities,)."""
    c = program.values(z, bound.parameters)[1][0]
    c[program.equality.size :] = np.maximum(c[program.equality.size :], 0)
    return c


def _infeasible(program: Program, bound: Bound, closest: Array, blamed: Mask) -> tuple[Status, str]:
    residual = np.abs(violation(program, bound, closest))
    largest, equalities = residual.max(), program.equality.size
    rows = [
        program.equality.element(int(i))
        if i < equalities
        else program.inequality.element(int(i) - equalities)
        for i in np.argsort(-np.round(residual / largest, 6), kind="stable")
        if blamed[i]
    ]
    names = ", ".join(rows[:_NAMED]) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
    return Status.INFEASIBLE, f"the smallest violation is {largest:.2g}, of {names}"


def _ray(program: Program, bound: Bound) -> tuple[Status, str] | None:
    """Of an LP or QP, a way that stays feasible, does not curve, and along which the objective falls:

    min q^T d   subject to   A d = 0,  G d <= 0,  P d = 0,  |d| <= 1, and not towards a finite bound.
    """
    import scipy.sparse as sp
    from scipy.optimize import linprog

    here, m = _evaluate(program, bound, np.zeros(program.variables.size)), program.equality.size
    J, H = (M.pattern.matrix(M.nonzeros[0]).tocsr() for M in (here.J, here.H))
    slope = here.first.gradient[0] / max(np.abs(here.first.gradient[0]).max(initial=0.0), 1e-300)
    J = J[: program.constraints]
    if not all(np.isfinite(values).all() for values in (J.data, H.data, slope)) or J.nnz + H.nnz > _LARGE:
        return None
    straight = sp.vstack([J[:m], H]).tocsr()
    norms = np.sqrt(straight.power(2).sum(axis=1))
    straight = (sp.diags_array(1 / np.where(norms > 0, norms, 1.0)) @ straight).tocsr()
    low = np.where(np.isfinite(bound.lower[0]), 0.0, -1.0)
    high = np.where(np.isfinite(bound.upper[0]), 0.0, 1.0)
    found = linprog(
        slope,
        A_ub=J[m:],
        b_ub=np.zeros(program.constraints - m),
        A_eq=straight,
        b_eq=np.zeros(straight.shape[0]),
        bounds=np.stack([low, high], axis=1),
        method="highs",
    )
    if found.status != 0 or found.fun > -_FALLING:
        return None
    return Status.UNBOUNDED, _falls_along(program, found.x)


def _falls_along(program: Program, direction: Array) -> str:
    names = ", ".join(
        f"{program.variables.element(int(i))} {'up' if direction[i] > 0 else 'down'}"
        for i in np.argsort(-np.abs(direction))[:_NAMED]
        if direction[i] != 0
    )
    return f"the objective falls without end along {names}"


def _unbounded(program: Program, bound: Bound, z: Array, evaluation: Evaluation) -> tuple[Status, str] | None:
    if program.quadratic:
        found = _ray(program, bound)
        if found is not None:
            return found
    objective = float(evaluation.first.objective[0])
    scale = max(1.0, abs(objective))
    for direction in (z, -evaluation.first.gradient[0]):
        length = np.abs(direction).max(initial=0.0)
        if length == 0 or not np.isfinite(length):
            continue
        step = direction / length * max(1.0, np.abs(z).max())
        values, good = [], True
        for distance in _STEPS:
            point = np.clip(z + distance * step, bound.lower[0], bound.upper[0])
            there = _evaluate(program, bound, point)
            good = good and bool(there.scaled_feasibility[0] <= 1e-6)
            values.append(float(there.first.objective[0]))
        falls = all(b < a for a, b in zip([objective, *values], values, strict=False))
        if good and falls and (values[-1] == -np.inf or objective - values[-1] > _FALL * scale):
            return Status.UNBOUNDED, _falls_along(program, step)
    return None
