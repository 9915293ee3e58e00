"""How far a point is from satisfying the KKT conditions, computed from the problem alone.

    stationarity     grad f + J^T y - l + r                      (J: Jacobian of c = [h; g])
    feasibility      |h|, max(g, 0), max(lower - z, 0), max(z - upper, 0)
    complementarity  |multiplier * slack| of every inequality and bound

A kink |r| (``pieces.py``) on which the point sits is like an inequality, with slack |r| and multiplier w - |mu|:
its row r = 0 is active while the force mu on it is smaller than the weight w; when mu reaches w it leaves, to
the side that sigma = sign(mu) names. Off the kink, on the piece sigma, it is the inequality -sigma r <= 0, and
what would have to push it back is -sigma mu. Stationarity is then the distance to Clarke's subdifferential.

Unscaled maximum norms are what the user sees. Decisions use the scaled ones, which do not change
when the objective or a constraint row is multiplied by a number, nor much when a variable is: with w the
sizes of the variables, a slack is a distance, s_i / |J_i w|, and a multiplier is a force, lambda_i |J_i w| / (largest
force at the point). Sizes are max(1, |z|), one for all, unless the derivatives say that units differ by far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np

from ddn_solvers.arrays import Array, Index, Mask, largest, unit_without_symmetry
from ddn_solvers.evaluators import Coefficients, Evaluators, FirstOrder
from ddn_solvers.lowering.pattern import Matrices
from ddn_solvers.program import Program
from ddn_solvers.steep import SteepBounds, of_variables
from ddn_solvers.units import FLAT, units_of

# What of an evaluation depends on the matrices of an LP or QP alone, and not on the point.
_OF_MATRICES = ("J", "_second", "row_norms", "length", "_units_of_variables")
_TINY = 1e-300
EPSILON: Final = float(np.finfo(float).eps)
_CANCELLED = 1e3 * EPSILON  # of the terms of a difference, what may be their rounding
_SMALLEST = 1e-9  # size of the variables relative to 1 that may not be rounding
_NOTHING = 1e-7  # relative size of the forces that meet in a row below which they are not told apart: with the accuracy, rounding
_ROUNDING = 1e-13  # relative force that counts as none
# Force of a multiplier, relative to those of the objective, from which on its row may be vanishing.
BEYOND: Final = 1e2
_CLOSE_BY = 1e-3  # way of a point relative to its own size
_NEAR_ZERO = 1e-3  # of the length of a vector relative to what it can become
_VANISHING = 1e-2  # of the change of a row's gradient over a hundredth of the point's size


@dataclass(frozen=True)
class PrimalDual:
    """A batch of points with multipliers, flat: y stacks those of h, g and kinks, l and r are those of bounds."""

    z: Array  # (B, n)
    y: Array  # (B, equalities + inequalities + kinks)
    lower: Array  # (B, n)
    upper: Array  # (B, n)
    pieces: Array  # (B, kinks): sigma, the piece that each kink is on; 0 on the kink itself

    @staticmethod
    def resting(program: Program, parameters: tuple[Array, ...], z: Array) -> PrimalDual:
        """Points without multipliers, on the pieces where they lie."""
        y = np.zeros((len(z), program.smooth.rows))
        return PrimalDual(z, y, np.zeros_like(z), np.zeros_like(z), program.pieces_at(z, parameters))

    def take(self, samples: Any) -> PrimalDual:
        return PrimalDual(**{name: values[samples] for name, values in vars(self).items()})

    def put(self, samples: Any, other: PrimalDual, sources: Any) -> None:
        """Overwrite a sample, or some, by samples ``sources`` of another batch."""
        for name, values in vars(self).items():
            values[samples] = getattr(other, name)[sources]


@dataclass(frozen=True)
class Bound:
    """Parameters and bounds of a batch, as every evaluation needs them."""

    parameters: tuple[Array, ...]
    lower: Array  # (B, n)
    upper: Array  # (B, n)
    coefficients: Coefficients | None = None  # of an LP or QP, if they are known already

    @staticmethod
    def of(program: Program, parameters: tuple[Array, ...], samples: int) -> Bound:
        """Bounds evaluated, and of an LP or QP the coefficients."""
        lower, upper = np.full((2, samples, program.variables.size), [[[-np.inf]], [[np.inf]]])
        if program.bounded:
            lower[:], upper[:] = program.bounds(parameters)
        known = program.coefficients(parameters, samples) if program.quadratic else None
        return Bound(parameters, lower, upper, known)

    def take(self, samples: Index | Sequence[int]) -> Bound:
        """Some samples, by index; of all of them, itself."""
        if np.array_equal(samples, np.arange(len(self.lower))):
            return self
        parameters = tuple(p if p.ndim == 1 else p[samples] for p in self.parameters)
        known = None if self.coefficients is None else self.coefficients.take(samples)
        return Bound(parameters, self.lower[samples], self.upper[samples], known)


@dataclass(frozen=True)
class Evaluation:
    """First and second derivatives at a batch of points, and the residuals that follow from them."""

    program: Program
    bound: Bound
    point: PrimalDual
    first: FirstOrder

    @staticmethod
    def at(program: Program, bound: Bound, point: PrimalDual) -> Evaluation:
        if bound.coefficients is not None and program.compiled:
            f, gradient, c = program.slopes(point.z, bound.parameters)
            return Evaluation(program, bound, point, FirstOrder(f, gradient, c, bound.coefficients.jacobian))
        inputs = _inputs(bound, point)
        return Evaluation(program, bound, point, program.smooth.first_order(point.z, inputs))

    def moved(self, point: PrimalDual) -> Evaluation:
        """The same samples at other points; the matrices of an LP or QP are the same there, and what is made of them.

        Close to where it was, its values and slopes are told from those: rounding enters by the way alone.
        """
        if not self.program.quadratic:
            return self.at_known(point, Evaluation.at(self.program, self.bound, point).first)
        way = point.z - self.point.z
        first, bends = self.first, self._second.times(way)
        objective = first.objective + ((first.gradient + bends / 2) * way).sum(axis=1)
        # Of each variable, or a small one would carry the rounding of where it was; nor may the objective vanish.
        near = (np.abs(way) <= _CLOSE_BY * np.abs(self.point.z)).all(axis=1)
        near &= np.abs(objective) >= np.abs(first.objective) / 2
        told = FirstOrder(
            objective,
            first.gradient + bends,
            first.constraints + self.J.times(way),
            first.jacobian,
        )
        if near.all():
            return self.at_known(point, told)
        afresh = Evaluation.at(self.program, self.bound, point).first
        chosen = {
            name: np.where(near if value.ndim == 1 else near[:, None], value, getattr(afresh, name))
            for name, value in vars(told).items()
            if name != "jacobian"
        }
        return self.at_known(point, replace(told, **chosen))

    def at_known(self, point: PrimalDual, first: FirstOrder) -> Evaluation:
        """``moved`` to points at which the derivatives are known already."""
        there = Evaluation(self.program, self.bound, point, first)
        if self.program.quadratic:
            there.__dict__.update({name: getattr(self, name) for name in _OF_MATRICES})
        return there

    def with_bounds_pushing(self, lower: Array, upper: Array) -> Evaluation:
        """The same points with other multipliers of the bounds, which no derivative depends on."""
        there = self.at_known(replace(self.point, lower=lower, upper=upper), self.first)
        there.__dict__.update({name: getattr(self, name) for name in ("J", "_second", "steep")})
        return there

    def tame(self) -> Evaluation:
        """The same with zero derivatives in samples where some have no finite square: failed ones, that run off."""
        with np.errstate(all="ignore"):
            matrices = self._second.squared.nonzeros, self.J.squared.nonzeros
            good = np.logical_and(*(np.isfinite(m.sum(axis=1)) for m in matrices))[:, None]
        if good.all():
            return self
        first = replace(self.first, jacobian=np.where(good, self.first.jacobian, 0.0))
        there = Evaluation(self.program, self.bound, self.point, first)
        there.__dict__["_second"] = self._second.map(lambda values: np.where(good, values, 0.0))
        return there

    @property
    def functions(self) -> Evaluators:
        """The compiled functions on the smooth pieces."""
        return self.program.smooth

    @property
    def inputs(self) -> tuple[Array, ...]:
        """Their parameters: those of the problem, then sigma and tau."""
        return _inputs(self.bound, self.point)

    def take(self, samples: Any) -> Evaluation:
        """The evaluation of some samples, by index; of all of them, itself with what it has computed."""
        if len(samples) == len(self.point.z):
            return self
        first = FirstOrder(**{name: value[samples] for name, value in vars(self.first).items()})
        return Evaluation(self.program, self.bound.take(samples), self.point.take(samples), first)

    @cached_property
    def J(self) -> Matrices:
        """The Jacobian of c."""
        return Matrices(self.functions.jacobian_pattern, self.first.jacobian)

    @cached_property
    def H(self) -> Matrices:
        """The Hessian of the Lagrangian; zero in variables in which it is rounding beside the others.

        What counts is curvature times size squared, which does not depend on the unit of a variable. Without this
        a flat coordinate whose second derivative came out as 1e-17 would be scaled up and taken for a curved one.
        """
        matrices = self._second
        rows = matrices.absolute.times(self.own_size) * self.own_size
        lasting = rows
        if self.steep.any:
            lasting = self.steep.lasting.absolute.times(self.own_size) * self.own_size
        curved = rows > FLAT * largest(lasting)[:, None]
        if not self.program.quadratic:  # multipliers that are rounding bend rows
            curved &= rows > EPSILON * self._strength
        return matrices if curved.all() else matrices.scaled(curved.astype(float), curved.astype(float))

    @cached_property
    def _bending(self) -> Matrices:
        """|H|, by which forces are measured; of the objective alone where multipliers exceed by far what it exerts.

        Close to where a row's gradient vanishes, as those of complementarity do, multipliers grow without limit and the
        curvature that they make with them: beside that any force would look small.
        """
        H, y = self.steep.lasting.absolute, self.point.y
        if self.program.affine_constraints and self.program.pieces is None:
            return H
        beyond = largest(y * self.reach) > BEYOND * self._strength[:, 0]
        if not beyond.any():
            return H
        alone = np.abs(self.functions.hessian(self.point.z, self.inputs, np.zeros_like(y)))
        return H.map(lambda values: np.where(beyond[:, None], alone, values))

    @cached_property
    def _second(self) -> Matrices:
        known, pattern = self.bound.coefficients, self.functions.hessian_pattern
        if known is not None:
            return Matrices(pattern, known.hessian)
        nonzeros = self.functions.hessian(self.point.z, self.inputs, self.point.y)
        if not np.isfinite(nonzeros).all():
            # As that of u^1.5 at the bound u = 0, which fixes u: what curves there moves nothing.
            z, bound = self.point.z, self.bound
            held = of_variables((z == bound.lower) | (z == bound.upper), pattern)
            nonzeros = np.where(held & ~np.isfinite(nonzeros), 0.0, nonzeros)
        return Matrices(pattern, nonzeros)

    @cached_property
    def steep(self) -> SteepBounds:
        """What the points have to do with bounds at which curvature has no limit."""
        # Of another evaluation: one that knows this would keep all arrays until the garbage collector comes.
        return SteepBounds(Evaluation(self.program, self.bound, self.point, self.first), self._second)

    @property
    def jacobian(self) -> Array:
        """``J`` densely, (B, m, n)."""
        return self.J.dense

    @property
    def hessian(self) -> Array:
        """``H`` densely, (B, n, n)."""
        return self.H.dense

    @cached_property
    def constraint_forces(self) -> Array:
        """grad f + J^T y, (B, n): what the bound multipliers have to balance."""
        return self.first.gradient + self.J.transposed_times(self.point.y)

    @cached_property
    def stationarity(self) -> Array:
        """grad_z L, (B, n)."""
        return self.constraint_forces - self.point.lower + self.point.upper

    @property
    def equality(self) -> Array:
        return self.first.constraints[:, : self.program.equality.size]

    @cached_property
    def slack(self) -> Array:
        """Slacks of inequalities, kinks, lower and upper bounds, (B, q + k + 2n); infinite where no bound is."""
        g = self.first.constraints[:, self.program.equality.size : self.program.constraints]
        z = self.point.z
        return np.concatenate([-g, self._kink_slack, z - self.bound.lower, self.bound.upper - z], axis=1)

    @cached_property
    def multiplier(self) -> Array:
        """Multipliers in the order of ``slack``."""
        inequality = self.point.y[:, self.program.equality.size : self.program.constraints]
        return np.concatenate([inequality, self._kink_multiplier, self.point.lower, self.point.upper], axis=1)

    # -- kinks ------------------------------------------------------------------------------------

    @property
    def kink_residuals(self) -> Array:
        """r, (B, k)."""
        return self.first.constraints[:, self.program.constraints :]

    @cached_property
    def kink_weights(self) -> Array:
        """w of the norm that each row belongs to, (B, k)."""
        if self.program.pieces is None:
            return np.zeros_like(self.point.pieces)
        return self._in_group(self.functions.kink_weights(self.point.z, self.inputs, self.point.y), np.add)

    @cached_property
    def kink_directions(self) -> Array:
        """r / |r| of vectors and 1 of numbers, whose sigma is a sign, (B, k)."""
        length = np.sqrt(self._in_group(self.kink_residuals**2, np.add))
        vectors: Array = self.kink_residuals / np.maximum(length, _TINY)
        return np.where(self.program.numbers, 1.0, vectors)

    @property
    def scaled_kink_weights(self) -> Array:
        return self.kink_weights * self._kink_norms / self.force

    @property
    def kink_forces(self) -> Array:
        """mu, (B, k)."""
        return self.point.y[:, self.program.constraints :]

    @cached_property
    def idle_kinks(self) -> Any:
        """Kinks that nothing depends on here or nearby, such as those of entries that a maximum passes over."""
        unit = self._strength
        idle = np.abs(self.kink_weights * self._kink_norms) <= _ROUNDING * unit
        if not idle.any():
            return idle
        *parameters, sigma, tau = self.inputs
        there = self.point.z + 1e-3 * self.size * unit_without_symmetry(self.point.z.shape[1])
        weights = self.functions.kink_weights(there, (*parameters, sigma, tau + 1e-3), self.point.y)
        forces = np.abs(self._in_group(weights, np.add) * self._kink_norms)
        return idle & (forces <= _ROUNDING * np.where(unit > 0, unit, 1.0))

    @property
    def _at_norms(self) -> Mask:
        """Samples near the zero of a norm that pushes: its curvature there has no limit, its force has, (B,)."""
        pushes = ~self.program.numbers & (self.point.pieces != 0) & (np.abs(self.kink_weights) > 0)
        near: Mask = (pushes & (self._kink_slack <= _NEAR_ZERO * self._kink_norms)).any(axis=1)
        return near

    @property
    def _strength(self) -> Array:
        """The largest force of objective and kinks, curvature aside, (B, 1): that of a norm has no limit at zero."""
        kinks = largest(self.kink_weights * self._kink_norms)
        return np.maximum(largest(self.first.gradient * self.size), kinks)[:, None]

    @cached_property
    def unloaded(self) -> Mask:
        """Samples with a constant objective: it exerts no force, and multipliers are rounding, as is what they bend, (B,)."""
        flat: Mask = (self.first.gradient == 0).all(axis=1)
        if flat.any():
            alone = self.functions.hessian(self.point.z, self.inputs, np.zeros_like(self.point.y))
            flat = flat & (alone == 0).all(axis=1) & (self.kink_weights == 0).all(axis=1)
        return flat

    @cached_property
    def _kink_slack(self) -> Array:
        r, sigma = self.kink_residuals, self.point.pieces
        if self.program.pieces is None:
            return r
        length = np.sqrt(self._in_group(r**2, np.add))
        return np.where(self.program.numbers & (sigma != 0), sigma * r, length)

    @cached_property
    def _kink_multiplier(self) -> Array:
        mu, sigma = self.kink_forces, self.point.pieces
        if self.program.pieces is None:
            return mu
        length = np.sqrt(self._in_group(mu**2, np.add))
        return np.where(
            sigma == 0, self.kink_weights - length, np.where(self.program.numbers, -sigma * mu, 0.0)
        )

    @cached_property
    def _kink_norms(self) -> Array:
        """The unit of r, (B, k): the largest of the gradients of its rows."""
        norms = self.reach[:, self.program.constraints :]
        return norms if self.program.pieces is None else self._in_group(norms, np.maximum)

    def _in_group(self, values: Array, combine: Any) -> Array:
        """``values`` (B, k) combined over the rows of each norm, one result for each of its rows."""
        assert self.program.pieces is not None
        combined: Array = combine.reduceat(values, self.program.pieces.first, axis=1)
        return combined[:, self.program.pieces.group]

    @cached_property
    def vanishing(self) -> Any:
        """Rows of c whose gradient is nothing beside what it is nearby, (B, m) bool.

        A sum of squares is one where all of them vanish: it holds without saying in which direction
        (Gould et al. 2019, after observation 4.8). "Nearby" is a hundredth of the point's own size away, and of each
        variable's.
        """
        return self.vanishing_in(np.ones(self.point.z.shape, dtype=bool))

    def vanishing_in(self, free: Mask) -> Any:
        """The same of the gradient in some of the variables alone, (B, n) bool."""
        size = np.where(free, self.size, 0.0)
        if self._nearby is None:  # the gradients are the same everywhere
            return np.zeros_like(self.reach, dtype=bool)
        change = self.J.map(lambda here: self._nearby - here).scaled(np.ones_like(self.reach), size)
        return self._reach(size) < _VANISHING * change.row_norms()

    @property
    def reach_nearby(self) -> Array:
        """``reach`` there, (B, m)."""
        if self._nearby is None:
            return self.reach
        there = Matrices(self.functions.jacobian_pattern, self._nearby)
        found: Array = np.sqrt(there.squared.times(self.size**2))
        return found

    @cached_property
    def _nearby(self) -> Array | None:
        """The Jacobian's nonzeros there; ``None`` where they do not depend on the point."""
        if self.program.affine_constraints and self.program.pieces is None:
            return None
        z = self.point.z
        size = np.maximum(np.sqrt((z**2).sum(axis=1, keepdims=True)), 1e-2)
        # Of each variable no more than its own: a position of 1e5 would take a direction beside it out of all bounds.
        there = z + 1e-2 * np.minimum(size, self.own_size) * unit_without_symmetry(z.shape[1])
        return self.functions.first_order(there, self.inputs).jacobian

    # -- unscaled ---------------------------------------------------------------------------------

    @cached_property
    @np.errstate(all="ignore")  # those of a failed sample may be anything
    def norms(self) -> tuple[Array, Array, Array]:
        """Stationarity, feasibility, complementarity: unscaled maximum norms, (B,) each."""
        sides = self.slack.copy()
        kinks = slice(self.program.inequality.size, self.program.inequality.size + self.point.pieces.shape[1])
        sides[:, kinks] = 0.0  # where a kink is, is no question of feasibility
        violation = np.concatenate([np.abs(self.equality), np.maximum(-sides, 0)], axis=1)
        product = self.multiplier * np.where(np.isfinite(self.slack), self.slack, 0)
        return largest(self._distance_to_subdifferential), largest(violation), largest(product)

    @property
    def _distance_to_subdifferential(self) -> Array:
        """Stationarity with no more force on a kink than its weight, (B, n)."""
        if self.program.pieces is None:
            return self.stationarity
        mu, m = self.kink_forces, self.program.constraints
        length = np.sqrt(self._in_group(mu**2, np.add))
        allowed = np.where(self.point.pieces == 0, np.abs(self.kink_weights), 0.0)
        excess = mu * np.maximum(1 - allowed / np.maximum(length, _TINY), 0)
        on_rows = np.concatenate([np.zeros((len(mu), m)), excess], axis=1)
        return self.stationarity - self.J.transposed_times(on_rows)

    # -- scaled -----------------------------------------------------------------------------------

    @cached_property
    def row_norms(self) -> Array:
        """|J_i|, (B, m)."""
        return self.J.row_norms()

    @cached_property
    def reach(self) -> Array:
        """|J_i w|: how much a constraint changes where the variables change by their sizes, (B, m)."""
        return self._reach(self.size)

    def _reach(self, size: Array) -> Array:
        reach: Array = np.sqrt(self.J.squared.times(size**2))
        return reach

    @cached_property
    def size(self) -> Array:
        """w, by which changes of the variables are measured, (B, n): never more than max(1, |z|)."""
        z = self.point.z
        size = np.broadcast_to(np.maximum(self.reference, largest(z))[:, None], z.shape)
        units = self._units_of_variables
        if units is None:
            return size
        length = np.maximum(1.0, largest(z / units))[:, None]
        return np.minimum(units * length, size)

    @cached_property
    def _units_of_variables(self) -> Array | None:
        return units_of(self.steep.lasting, self.J)

    @cached_property
    def reference(self) -> Array:
        """What counts as small for the variables as a whole, (B,): 1, or ``length`` where that is less.

        Below 1e-9 what is small may be rounding.
        """
        found: Array = np.clip(self.length, _SMALLEST, 1.0)
        return found

    @cached_property
    @np.errstate(all="ignore")  # the coefficients of a failed sample may be infinite
    def length(self) -> Array:
        """Of the numbers of which an LP or QP is made, seen as points, the largest, (B,); 1 where there is none.

        Its bounds, how far its constraints are from zero, |c(0)| / |J|, and the minimum of its objective, |q| / P and
        sqrt(2 |f(0)| / P). Of other problems nothing is known: 1.
        """
        z = self.point.z
        if not self.program.quadratic:
            return np.ones(len(z))
        first, H, J, far = self.first, self._second, self.J, np.abs(z)
        curvature, bends = H.diagonal(), H.times(z)
        bending = H.absolute.times(far)
        q = _significant(first.gradient - bends, bending)
        offset = _significant(first.constraints - J.times(z), J.absolute.times(far))
        at_zero = first.objective - ((first.gradient - bends / 2) * z).sum(axis=1)
        at_zero = _significant(at_zero, ((np.abs(q) + bending) * far).sum(axis=1))
        steepest, most, rows = largest(q), largest(curvature), self.row_norms
        lengths = [
            *(
                largest(np.where(np.isfinite(side), side, 0.0))
                for side in (self.bound.lower, self.bound.upper)
            ),
            largest(np.where(rows > 0, offset / rows, 0.0)),
            largest(np.where(curvature != 0, q / curvature, 0.0)),
            np.where(most > 0, np.sqrt(2 * np.abs(at_zero) / most), 0.0),
            np.where((most == 0) & (steepest > 0), np.abs(at_zero) / steepest, 0.0),
        ]
        length = np.maximum.reduce(lengths)
        found: Array = np.where((length > 0) & np.isfinite(length), length, 1.0)
        return found

    @cached_property
    def own_size(self) -> Array:
        """Of each variable by itself, (B, n), at most w: of curvature nothing is felt beyond it.

        With w instead, one variable that has run off to 1e20 would make any force beside the others' curvature
        look small, and an unbounded problem solved.
        """
        own: Array = np.minimum(np.maximum(self.reference[:, None], np.abs(self.point.z)), self.size)
        return own

    @cached_property
    def force(self) -> Array:
        """The unit of multipliers, (B, 1): what the objective changes by at most where a variable changes by its size.

        Multipliers do not enter it: where the objective exerts none, theirs is rounding.
        """
        return self._force(self._curvature, self.size)

    @cached_property
    def _curvature(self) -> Array:
        """The largest change of the objective by curvature where each variable changes by its own size, (B,)."""
        return self._bending.scaled(self.own_size, self.own_size).largest()

    def _force(self, curvature: Array, size: Array) -> Array:
        """The largest change of the objective: by ``curvature``, (B,), or where variables change by ``size``."""
        kinks = largest(self.kink_weights * self._kink_norms)
        slopes = np.maximum(largest(self.first.gradient * size), kinks)
        if not self.program.numbers.all():
            curvature = np.where(self._at_norms, np.minimum(curvature, slopes), curvature)
        forces = np.maximum(slopes, curvature)
        return np.where(forces > 0, forces, 1.0)[:, None]

    @cached_property
    def _units(self) -> Array:
        """How much each side changes where the variables change by their sizes, in the order of ``slack``."""
        rows = self.reach[:, self.program.equality.size : self.program.constraints]
        return np.concatenate([rows, self._kink_norms, self.size, self.size], axis=1)

    @cached_property
    def scaled_slack(self) -> Array:
        """Slack over what it changes by where the variables change by their sizes.

        That of a steep bound is a force as well.
        """
        found: Array = self.slack / np.maximum(self._units, _TINY)
        if self.steep.any:
            sides = slice(-2 * self.point.z.shape[1], None)
            forces = self.steep.forces(self.slack[:, sides]) * np.tile(self.size, 2) / self.force
            found[:, sides] = np.maximum(found[:, sides], np.minimum(forces, 1.0))
        return found

    @cached_property
    def scaled_multiplier(self) -> Array:
        return self.multiplier * self._units / self.force

    @cached_property
    def scaled_feasibility(self) -> Array:
        """(B,). Over what a row changes where each variable changes by its own size, which is what its rounding is of.

        With w instead, one variable that has run off to 1e20 would make any violation by the others look small.
        """
        m, q = self.program.equality.size, self.program.inequality.size
        reach, kinks = (np.maximum(units, _TINY) for units in (self._reach(self.own_size), self._kink_norms))
        units = np.concatenate([reach[:, m : m + q], kinks, self.own_size, self.own_size], axis=1)
        equality = np.abs(self.equality) / reach[:, :m]
        return np.maximum(largest(equality), largest(np.maximum(-self.slack, 0) / units))

    @cached_property
    def scaled_complementarity(self) -> Array:
        """Natural residual: what is neither slack nor force must vanish; negative multipliers count."""
        natural = np.minimum(np.maximum(self.scaled_slack, 0), self.scaled_multiplier)
        return largest(natural)

    @cached_property
    def scaled_stationarity(self) -> Array:
        """By row: residual over the forces that meet there, (B,).

        Of curvature no more than is felt over the problem's own length: however far a point has run off along a flat
        direction, a force that nothing meets there remains one. Where it is so far that rounding hides any force, the
        residual is that rounding.
        """
        meeting = np.abs(self.first.gradient) + self.J.absolute.transposed_times(np.abs(self.point.y))
        bends, limit = self._bending, np.maximum(self.reference, self.length)
        felt, most = np.minimum(self.own_size, limit[:, None]), self._curvature
        if (limit < largest(self.own_size)).any():
            most = bends.scaled(felt, felt).largest()
        curvature, rounding = bends.times(felt), EPSILON * bends.times(np.abs(self.point.z))
        if not self.program.numbers.all():
            limited = np.minimum(curvature, self._strength / self.size)
            curvature = np.where(self._at_norms[:, None], limited, curvature)
        meeting += curvature + np.abs(self.point.lower) + self.point.upper
        floor = _NOTHING * self._force(most, felt) / felt
        hidden = rounding / np.maximum(curvature, floor)  # multipliers may be of that rounding themselves
        return np.maximum(largest(self.stationarity / np.maximum(meeting, floor)), largest(hidden))

    @cached_property
    def scaled(self) -> Array:
        """The largest of the three scaled residuals, (B,)."""
        return np.maximum.reduce(
            [self.scaled_stationarity, self.scaled_feasibility, self.scaled_complementarity]
        )


def _inputs(bound: Bound, point: PrimalDual) -> tuple[Array, ...]:
    if not point.pieces.shape[1]:
        return bound.parameters
    return (*bound.parameters, point.pieces, np.zeros_like(point.pieces))


def _significant(values: Array, terms: Array) -> Array:
    """Differences that are more than the rounding of what cancels in them, else zero."""
    found: Array = np.where(np.abs(values) > _CANCELLED * terms, values, 0.0)
    return found
