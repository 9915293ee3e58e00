"""Random problems around a chosen KKT point, and the derivative of that point by dense algebra.

    minimise    a (z^T P z / 2 + q^T z + phi(z, c))
    subject to  r_i (rows_i(z, A) - b_i) = 0 or <= 0,   lower <= z <= upper

The point z, the multipliers and which sides hold are chosen first. The Hessian of the Lagrangian that is
wanted then gives P, stationarity gives q, the slacks give b and the bounds. Every capital and small letter
is a parameter, so that parameters enter objective, constraints and bounds, linearly and not.

``reference`` differentiates the KKT conditions with torch.func, forms [H A^T; A 0], B and C and solves
with NumPy. It shares no code with ddn_solvers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import ddn_solvers as ddn

D = torch.float64
Shape = tuple[int, ...]
Variables = tuple[tuple[str, Shape], ...]
Flat = Mapping[str, torch.Tensor]

INACTIVE, STRONG, WEAK = 0, 1, 2

ROWS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda z, A: A @ z,
    "sphere": lambda z, A: (z - A).square().sum(-1),
    "ellipsoid": lambda z, A: (A * z).square().sum(-1),
    "exponential": lambda z, A: (0.5 * A * z).exp().sum(-1),
    "norm": lambda z, A: torch.linalg.vector_norm(z - A, dim=-1),
    "product": lambda z, A: (A @ z) * (A @ z.roll(1)),
    "sine": lambda z, A: (A @ z).sin(),
}
TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "exp": lambda z, c: (0.5 * c * z).exp().sum(),
    "logsumexp": lambda z, c: torch.logsumexp(c @ z, 0),
    "norm": lambda z, c: torch.linalg.vector_norm(z - c),
    "quartic": lambda z, c: (z - c).square().square().sum(),
    "hyperbola": lambda z, c: (1 + (z - c).square()).sqrt().sum(),
    "log": lambda z, c: (1 + (z - c).square()).log().sum(),
}
NONCONVEX = {"product", "sine", "log"}

# How the Hessian of the Lagrangian is chosen, given an orthonormal basis Z of the null space of what is active.
CONVEX = ("definite", "semidefinite")  # P itself: positive definite, or with a null space that A covers
CURVATURES = (*CONVEX, "indefinite", "saddle", "flat")  # Z^T H Z: definite, indefinite, semidefinite


@dataclass(frozen=True)
class Block:
    """One constraint function: its rows, and the shape in which it returns them.

    ``copies``: it is this multiple of the block before it, row by row: dependent by construction.
    """

    kind: str
    shape: Shape
    copies: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Declaration:
    """What is traced once; a ``Known`` has numbers for it.

    Attributes:
        variables: (name, shape) pairs.
        term: phi, a key of ``TERMS``, or ``"none"``, or ``"linear"``: no P either.
        equality, inequality: Blocks.
        bounds: One kind a variable: ``"free"``, ``"lower"``, ``"upper"``, ``"box"`` (parameters),
            ``"function"`` (sinh of a parameter), ``"cap"`` (one scalar for all entries), ``"fixed"``,
            ``"constant"`` (numbers and infinities).
        shadow: Inequalities repeat the lower bounds of the first variable.
    """

    variables: Variables
    term: str = "none"
    equality: tuple[Block, ...] = ()
    inequality: tuple[Block, ...] = ()
    bounds: tuple[str, ...] = ()
    shadow: bool = False

    @property
    def n(self) -> int:
        return sum(math.prod(shape) for _, shape in self.variables)

    @property
    def convex(self) -> bool:
        """Whether the problem is convex if P is positive semidefinite."""
        curved = any(block.kind != "linear" for block in self.equality)
        return not curved and not NONCONVEX & {self.term, *(b.kind for b in self.inequality)}

    @property
    def quadratic(self) -> bool:
        kinds = {b.kind for b in (*self.equality, *self.inequality)}
        return self.term in ("none", "linear") and kinds <= {"linear"}

    @property
    def dependent(self) -> bool:
        return self.shadow or any(b.copies for b in (*self.equality, *self.inequality))

    @property
    def blocks(self) -> dict[str, Block]:
        """Constraints by name, equalities first: the order of the multipliers."""
        named = {f"h{i}": block for i, block in enumerate(self.equality)}
        return named | {f"g{i}": block for i, block in enumerate(self.inequality)}

    @property
    def equalities(self) -> int:
        return sum(block.size for block in self.equality)

    @property
    def inequalities(self) -> int:
        shadowed = math.prod(self.variables[0][1]) if self.shadow else 0
        return sum(block.size for block in self.inequality) + shadowed

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Of the bounds of each entry of z."""
        bounds = self.bounds or ("free",) * len(self.variables)
        pairs = zip(self.variables, bounds, strict=True)
        return tuple(kind for (_, shape), kind in pairs for _ in range(math.prod(shape)))

    @cached_property
    def sources(self) -> np.ndarray:
        """(q + n,): the side that each inequality repeats, if any, else itself; then the bounds themselves."""
        q = self.inequalities
        sources, start, before = np.arange(q + self.n), 0, 0
        for block in self.inequality:
            if block.copies:
                sources[start : start + block.size] -= before
            start, before = start + block.size, block.size
        sources[start:q] = q + np.arange(q - start)
        return sources

    @cached_property
    def choosable(self) -> np.ndarray:
        """(q + n,) bool: sides that may be active or not."""
        place = np.concatenate([np.arange(math.prod(shape)) for _, shape in self.variables])
        unbounded = np.isin(self.kinds, "constant") & (place % 4 == 3)  # see constant_bounds
        bounds = ~np.isin(self.kinds, ("free", "fixed")) & ~unbounded
        own = self.sources == np.arange(len(self.sources))
        return np.concatenate([own[: self.inequalities], bounds])

    @cached_property
    def parameters(self) -> dict[str, Shape]:
        n = self.n
        shapes: dict[str, Shape] = {"a": (), "q": (n,)}
        if self.term != "linear":
            shapes["P"] = (n, n)
        if self.term in TERMS:
            shapes["c"] = (4, n) if self.term == "logsumexp" else (n,)
        for name, block in self.blocks.items():
            if not block.copies:
                shapes |= {f"A_{name}": (block.size, n), f"b_{name}": (block.size,)}
                shapes[f"r_{name}"] = (block.size,)
        for (name, shape), kind in zip(self.variables, self.bounds, strict=False):
            if kind in ("lower", "box", "function", "fixed"):
                shapes[f"lower_{name}"] = shape
            if kind in ("upper", "box"):
                shapes[f"upper_{name}"] = shape
            if kind == "cap":
                shapes[f"upper_{name}"] = ()
        return shapes

    # -- functions of flat z and parameters by name --------------------------------------------------

    def objective(self, z: torch.Tensor, p: Flat) -> torch.Tensor:
        return _objective(self.term, z, p)

    def constraints(self, z: torch.Tensor, p: Flat) -> torch.Tensor:
        """c = [h; g], flat."""
        blocks = self.blocks
        parts = [_rows(blocks, name, z, p).reshape(-1) for name in blocks]
        if self.shadow:
            parts.append(_shadow(*self.variables[0], z, p).reshape(-1))
        return torch.cat([z[:0], *parts])

    def bounds_of(self, p: Flat) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bounds of flat z, infinite where there is none."""
        lower, upper = [], []
        for (name, shape), kind in zip(self.variables, self.bounds, strict=False):
            size = math.prod(shape)
            low, high = torch.full((size,), -torch.inf, dtype=D), torch.full((size,), torch.inf, dtype=D)
            if kind == "constant":
                low, high = constant_bounds(size)
            if kind in ("lower", "box", "fixed"):
                low = p[f"lower_{name}"].reshape(-1)
            if kind == "function":
                low = p[f"lower_{name}"].sinh().reshape(-1)
            if kind in ("upper", "box", "cap"):
                high = p[f"upper_{name}"].expand(shape).reshape(-1)
            lower.append(low)
            upper.append(low if kind == "fixed" else high)
        if not self.bounds:
            infinite = torch.full((self.n,), torch.inf, dtype=D)
            return -infinite, infinite
        return torch.cat(lower), torch.cat(upper)

    # -- the problem that the library sees ----------------------------------------------------------

    @property
    def problem(self) -> ddn.Problem:
        """Traced once a declaration."""
        return _problem(self)

    def declared(self) -> ddn.Problem:
        """A new one."""
        everything, blocks = self.parameters, self.blocks
        functions = {name: self._of_block(name) for name in blocks}
        inequality = {name: f for name, f in functions.items() if name[0] == "g"}
        bounds: dict[str, Any] = {}
        for (name, shape), kind in zip(self.variables, self.bounds, strict=False):
            lower, upper = f"lower_{name}", f"upper_{name}"
            if kind == "constant":
                bounds[name] = tuple(side.reshape(shape) for side in constant_bounds(math.prod(shape)))
            elif kind != "free":
                sinh = _with_arguments(lambda lower=lower, **values: values[lower].sinh(), [lower])
                sides = {"lower": (lower, None), "box": (lower, upper), "fixed": (lower, lower)}
                bounds[name] = (sides | {"function": (sinh, None)}).get(kind, (None, upper))
        if self.shadow:
            inequality["shadow"] = self._of_shadow()
        return ddn.Problem(
            variables=dict(self.variables),
            parameters=everything,
            objective=self._of_objective(),
            equality={name: f for name, f in functions.items() if name[0] == "h"},
            inequality=inequality,
            bounds=bounds,
        )

    def _of_objective(self) -> Any:
        term = self.term
        used = [p for p in ("a", "q", "P", "c") if p in self.parameters]
        return _by_name(self.variables, used, lambda z, p: _objective(term, z, p))

    def _of_block(self, name: str) -> Any:
        blocks = self.blocks
        source = _source(name) if blocks[name].copies else name
        used = [p for p in self.parameters if p.endswith(f"_{source}")]
        return _by_name(self.variables, used, lambda z, p: _rows(blocks, name, z, p))

    def _of_shadow(self) -> Any:
        name, shape = self.variables[0]
        return _by_name(self.variables, [f"lower_{name}"], lambda z, p: _shadow(name, shape, z, p))


@cache
def _problem(declaration: Declaration) -> ddn.Problem:
    return declaration.declared()


def _objective(term: str, z: torch.Tensor, p: Flat) -> torch.Tensor:
    value = p["q"] @ z
    if "P" in p:
        value = value + 0.5 * z @ p["P"] @ z
    if "c" in p:
        value = value + TERMS[term](z, p["c"])
    return p["a"] * value


def _rows(blocks: Mapping[str, Block], name: str, z: torch.Tensor, p: Flat) -> torch.Tensor:
    block = blocks[name]
    if block.copies:
        source = _rows(blocks, _source(name), z, p).reshape(-1)
        return block.copies * source[: block.size].reshape(block.shape)
    rows = ROWS[block.kind](z, p[f"A_{name}"]) - p[f"b_{name}"]
    return (p[f"r_{name}"] * rows).reshape(block.shape)


def _source(name: str) -> str:
    """The block before: g1 -> g0."""
    return f"{name[0]}{int(name[1:]) - 1}"


def _shadow(name: str, shape: Shape, z: torch.Tensor, p: Flat) -> torch.Tensor:
    return 2.0 * (p[f"lower_{name}"] - z[: math.prod(shape)].reshape(shape))


def _by_name(variables: Variables, parameters: Sequence[str], function: Any) -> Any:
    """``function(z, p)`` with the arguments by name that a problem's functions have.

    It holds no ``Declaration``: what a function captures is watched, and a call should cost little.
    """
    names = [name for name, _ in variables]

    def call(**values: torch.Tensor) -> torch.Tensor:
        return function(torch.cat([values[name].reshape(-1) for name in names]), values)

    return _with_arguments(call, [*names, *parameters])


def _with_arguments(function: Any, names: Sequence[str]) -> Any:
    arguments = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    function.__signature__ = inspect.Signature(arguments)
    return function


def constant_bounds(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries in turn: both sides, lower alone, upper alone, none."""
    turn, inf = torch.arange(size) % 4, torch.tensor(torch.inf, dtype=D)
    return torch.where(turn <= 1, -0.5, -inf), torch.where((turn == 0) | (turn == 2), 0.5, inf)


# -- numbers --------------------------------------------------------------------------------------------


_BATCHED = ("z", "y", "lower", "upper", "at_lower", "sides", "sosc", "flat")


@dataclass(frozen=True, eq=False)
class Known:
    """A batch of instances of one declaration with their KKT points.

    Attributes:
        parameters: (B, *shape), or (*shape) where the batch shares it.
        z, lower, upper: Point and multipliers of the bounds, (B, n).
        y: Multipliers of c = [h; g], (B, m).
        at_lower: Which bound of each variable may be active, (B, n) bool.
        sides: INACTIVE, STRONG or WEAK, (B, q + n): inequalities, then bounds.
        sosc: Whether the second-order sufficient condition holds, (B,) bool.
        flat: Number of directions in which the KKT conditions leave the solution open, (B,).
        recipe: The call of ``build`` that makes it again.
    """

    declaration: Declaration
    parameters: dict[str, torch.Tensor]
    z: torch.Tensor
    y: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    at_lower: torch.Tensor
    sides: torch.Tensor
    sosc: torch.Tensor
    flat: torch.Tensor
    recipe: str = ""

    @property
    def samples(self) -> int:
        return len(self.z)

    def __repr__(self) -> str:
        return self.recipe

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis shows of a failing example
        printer.text(self.recipe)

    def one(self, i: int) -> dict[str, torch.Tensor]:
        """Parameters of one sample."""
        shapes = self.declaration.parameters
        return {k: v if v.dim() == len(shapes[k]) else v[i] for k, v in self.parameters.items()}

    def take(self, samples: Sequence[int]) -> Known:
        """Some samples, in that order."""
        index = list(samples)
        shapes = self.declaration.parameters
        parameters = {k: v if v.dim() == len(shapes[k]) else v[index] for k, v in self.parameters.items()}
        return Known(self.declaration, parameters, **{k: getattr(self, k)[index] for k in _BATCHED})

    @property
    def primal(self) -> dict[str, torch.Tensor]:
        return self.by_variable(self.z)

    def by_variable(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, n) -> by variable."""
        sizes = [math.prod(shape) for _, shape in self.declaration.variables]
        pieces = zip(self.declaration.variables, flat.split(sizes, dim=-1), strict=True)
        return {name: piece.reshape(*flat.shape[:-1], *shape) for (name, shape), piece in pieces}

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """Point, multipliers and optimal value by the keys of ``Sensitivity.vjp``."""
        values = torch.stack(
            [self.declaration.objective(self.z[i], self.one(i)) for i in range(self.samples)]
        )
        return self.by_output(torch.cat([self.z, self.y, self.lower, self.upper, values[:, None]], dim=1))

    def by_output(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, n + m + 2 n + 1) -> by key; the order of the rows of ``reference``."""
        n, declaration = self.declaration.n, self.declaration
        m = declaration.equalities + declaration.inequalities
        z, y, lower, upper, value = flat.split([n, m, n, n, 1], dim=-1)
        result = dict(self.by_variable(z))
        shapes = {name: block.shape for name, block in declaration.blocks.items()}
        if declaration.shadow:
            shapes["shadow"] = declaration.variables[0][1]
        pieces = y.split([math.prod(s) for s in shapes.values()], dim=-1)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
            kind = "equality" if name[0] == "h" else "inequality"
            result[f"{kind}.{name}"] = piece.reshape(*piece.shape[:-1], *shape)
        for side, multipliers in (("lower", lower), ("upper", upper)):
            result |= {f"{side}.{name}": v for name, v in self.by_variable(multipliers).items()}
        result["objective"] = value[..., 0]
        return result

    @property
    def rescaled(self) -> list[str]:
        """Parameters that multiply the objective or rows; all positive."""
        return [name for name in self.parameters if name == "a" or name.startswith("r_")]


def build(
    declaration: Declaration, seed: int, sides: Sequence[Sequence[int]], curvature: str, shared: bool = False
) -> Known:
    """Numbers for a declaration, from a seed and what should be active.

    Args:
        sides: (B, q + n), see ``Known``; trimmed to what can be independent, filled up to a vertex in a
            linear program.
        curvature: See ``CURVATURES``.
        shared: One c, one A and, where it is chosen as such, one P for all samples.
    """
    rng = np.random.default_rng(seed)
    common = _coefficients(declaration, rng) if shared else {}
    if shared and curvature in CONVEX and declaration.term != "linear":
        common["P"] = _definite(rng, declaration.n, 0)
    made = [_sample(declaration, rng, _trimmed(declaration, row), curvature, common) for row in sides]
    parameters = {
        name: common[name] if name in common else torch.stack([p[name] for p, _ in made])
        for name in declaration.parameters
    }
    recipe = f"build({declaration!r}, {seed}, {[list(row) for row in sides]}, {curvature!r}, shared={shared})"
    return Known(
        declaration, parameters, **{k: torch.stack([r[k] for _, r in made]) for k in _BATCHED}, recipe=recipe
    )


def _normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(rng.standard_normal(shape)))


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(rng.uniform(low, high, shape)))


def _powers(rng: np.random.Generator, low: float, high: float, *shape: int) -> torch.Tensor:
    return 10.0 ** _uniform(rng, low, high, *shape)


def _coefficients(declaration: Declaration, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """What does not depend on the point: c and A."""
    shapes = {k: v for k, v in declaration.parameters.items() if k == "c" or k.startswith("A_")}
    return {name: _normal(rng, *shape) for name, shape in shapes.items()}


def _trimmed(declaration: Declaration, wanted: Sequence[int]) -> np.ndarray:
    """No more independent active rows than variables; in a linear program as many, and strongly active."""
    sides = np.where(declaration.choosable, np.asarray(wanted), INACTIVE)
    fixed = np.isin(declaration.kinds, "fixed")
    equalities = sum(b.size for b in declaration.equality if not b.copies)
    room = declaration.n - equalities - int(fixed.sum())
    assert room >= 0
    active = np.flatnonzero(sides)
    sides[active[room:]] = INACTIVE
    if declaration.term == "linear":
        sides[sides == WEAK] = STRONG
        spare = np.flatnonzero(declaration.choosable & (sides == INACTIVE))[::-1]  # bounds first
        missing = room - np.count_nonzero(sides)
        assert len(spare) >= missing, "a linear program needs enough sides for a vertex"
        sides[spare[:missing]] = STRONG
    sides[declaration.inequalities :][fixed] = STRONG
    return sides[declaration.sources]


def _place(
    declaration: Declaration, rng: np.random.Generator, active: torch.Tensor, p: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A point, and which of its bounds may be active; puts the bounds into p."""
    z, at_lower = _normal(rng, declaration.n), torch.zeros(declaration.n, dtype=torch.bool)
    start = 0
    for (name, shape), kind in zip(declaration.variables, declaration.bounds, strict=False):
        part = slice(start, start := start + math.prod(shape))
        size, on = part.stop - part.start, active[part]
        gap, far = _powers(rng, -1, 0.5, size) * ~on, _powers(rng, -1, 0.5, size)
        random = torch.from_numpy(rng.random(size) < 0.5)
        if kind == "constant":
            low, high = constant_bounds(size)
            at_lower[part] = low.isfinite() & (~high.isfinite() | random)
            inside = torch.where(low.isfinite() & high.isfinite(), 0.4 * z[part].tanh(), z[part])
            inside = torch.where(low.isfinite() & ~high.isfinite(), low + gap, inside)
            inside = torch.where(high.isfinite() & ~low.isfinite(), high - gap, inside)
            z[part] = torch.where(on, torch.where(at_lower[part], low, high), inside)
        if kind == "cap":
            p[f"upper_{name}"] = _normal(rng)
            z[part] = p[f"upper_{name}"] - gap
        if kind in ("lower", "function", "fixed", "box"):
            at_lower[part] = random if kind == "box" else True
            low = z[part] - torch.where(at_lower[part], gap, far)
            p[f"lower_{name}"] = (low.asinh() if kind == "function" else low).reshape(shape)
        if kind in ("upper", "box"):
            p[f"upper_{name}"] = (z[part] + torch.where(at_lower[part], far, gap)).reshape(shape)
    return z, at_lower


def _sample(
    declaration: Declaration,
    rng: np.random.Generator,
    codes: np.ndarray,
    curvature: str,
    common: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters of one sample, and its fields of ``Known``."""
    n, q, equalities = declaration.n, declaration.inequalities, declaration.equalities
    sides = torch.from_numpy(codes)
    p = _coefficients(declaration, rng) | common | {"a": _uniform(rng, 0.5, 2.0)}
    z, at_lower = _place(declaration, rng, sides[q:] != INACTIVE, p)

    strength = _powers(rng, -1, 1, q + n) * (sides == STRONG)
    y = torch.cat([_normal(rng, equalities), strength[:q]])
    fixed = torch.from_numpy(np.isin(declaration.kinds, "fixed"))
    push = strength[q:] * torch.where(fixed, _normal(rng, n).sign(), torch.where(at_lower, 1.0, -1.0))

    gaps, start = _powers(rng, -1, 0.5, q) * (sides[:q] == INACTIVE), 0
    for name, block in declaration.blocks.items():
        slack = gaps[start : start + block.size] if name[0] == "g" else torch.zeros(block.size, dtype=D)
        start += block.size if name[0] == "g" else 0
        if not block.copies:
            p[f"r_{name}"] = _uniform(rng, 0.5, 2.0, block.size)
            p[f"b_{name}"] = ROWS[block.kind](z, p[f"A_{name}"]) + slack

    def lagrangian(z: torch.Tensor) -> torch.Tensor:  # without bounds
        return declaration.objective(z, p) + y @ declaration.constraints(z, p)

    p["q"] = torch.zeros(n, dtype=D)
    strong = torch.cat([torch.ones(equalities, dtype=torch.bool), sides[:q] == STRONG])
    active = torch.func.jacrev(declaration.constraints)(z, p)[strong]
    held = torch.cat([active, torch.eye(n, dtype=D)[sides[q:] == STRONG]])
    null = _null_space(held)
    flat = 0
    if declaration.term != "linear" and "P" not in p:
        p["P"] = torch.zeros(n, n, dtype=D)
        if curvature in CONVEX:
            p["P"] = _definite(rng, n, n - len(null.T) if curvature == "semidefinite" else 0)
        else:
            # Something of H or A is left: where all of it cancels, only rounding would tell that it does.
            flat = min(2, null.shape[1], n - 1) if curvature == "flat" else 0
            target = _hessian(rng, null, curvature, flat)
            p["P"] = (target - torch.func.jacrev(torch.func.grad(lagrangian))(z)) / p["a"]
    p["q"] = -(torch.func.grad(lagrangian)(z) - push) / p["a"]
    sosc = flat == 0 and (null.shape[1] == 0 or curvature != "saddle")
    fields = {"z": z, "y": y, "lower": push.clamp(min=0), "upper": (-push).clamp(min=0), "at_lower": at_lower}
    return p, fields | {"sides": sides, "sosc": torch.tensor(sosc), "flat": torch.tensor(flat)}


def _null_space(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis, (n, k)."""
    _, values, right = torch.linalg.svd(rows, full_matrices=True)
    return right[int((values > 1e-10).sum()) :].T


def _rotated(rng: np.random.Generator, values: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis, _ = torch.linalg.qr(_normal(rng, len(values), len(values)))
    matrix = (basis * values) @ basis.T
    return 0.5 * (matrix + matrix.T)


def _definite(rng: np.random.Generator, n: int, zeros: int) -> torch.Tensor:
    values = _uniform(rng, 1.0, 10.0, n)
    values[:zeros] = 0.0
    return _rotated(rng, values)


def _hessian(rng: np.random.Generator, null: torch.Tensor, curvature: str, flat: int) -> torch.Tensor:
    """A symmetric matrix that is chosen on a null space and anything (mostly indefinite) beside it."""
    n, k = null.shape
    values = _uniform(rng, 1.0, 10.0, k)
    values[:flat] = 0.0
    if curvature == "saddle":
        values[: (k + 2) // 3] *= -1
    inner = torch.diag(values)
    if k > flat:
        inner[flat:, flat:] = _rotated(rng, values[flat:])
    along, across = null, _null_space(null.T)
    mixed = 3.0 * _normal(rng, n - k, k)
    mixed[:, :flat] = 0.0  # H vanishes on flat directions: they move no multiplier
    outer = 3.0 * _normal(rng, n - k, n - k)
    matrix = along @ inner @ along.T + across @ (outer + outer.T) @ across.T
    cross = across @ mixed @ along.T
    return matrix + cross + cross.T


# -- the derivative by dense algebra ----------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Derivatives of every output of one sample in every parameter, and the condition of K.

    Attributes:
        matrix: (n + m + 2 n + 1, P): point, y, multipliers of lower and upper bounds, optimal value.
        condition: Of the KKT matrix with rows of norm one; where it is singular, of its nonzero part, as it is too.
    """

    matrix: np.ndarray
    condition: float


def reference(known: Known, i: int, weak: bool = True) -> Reference:
    """Differentiate the KKT conditions of sample i with its weakly active sides kept, or dropped."""
    declaration, p = known.declaration, known.one(i)
    names, shapes = list(p), [p[name].shape for name in p]
    n, q, equalities = declaration.n, declaration.inequalities, declaration.equalities
    m = equalities + q
    on = (known.sides[i] == STRONG) | ((known.sides[i] == WEAK) if weak else torch.tensor(False))
    low, high = on[q:] & known.at_lower[i], on[q:] & ~known.at_lower[i]
    # A variable whose bounds coincide is at the one that pushes.
    fixed = torch.from_numpy(np.isin(declaration.kinds, "fixed"))
    low, high = torch.where(fixed, known.lower[i] > 0, low), torch.where(fixed, known.upper[i] > 0, high)
    active = torch.cat([torch.ones(equalities, dtype=torch.bool), on[:q]])

    def named(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = flat.split([math.prod(s) for s in shapes])
        return {k: v.reshape(s) for k, v, s in zip(names, pieces, shapes, strict=True)}

    def gradient(z: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        p = named(flat)
        total = lambda z: declaration.objective(z, p) + known.y[i] @ declaration.constraints(z, p)  # noqa: E731  # a formula
        return torch.func.grad(total)(z)

    def rows(z: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        p = named(flat)
        lower, upper = declaration.bounds_of(p)
        return torch.cat([declaration.constraints(z, p)[active], (lower - z)[low], (z - upper)[high]])

    z, flat = known.z[i], torch.cat([p[name].reshape(-1) for name in names])
    H, B = (d.numpy() for d in torch.func.jacrev(gradient, (0, 1))(z, flat))
    A, C = (d.numpy() for d in torch.func.jacrev(rows, (0, 1))(z, flat))
    f_z, f_p = torch.func.grad(lambda z, flat: declaration.objective(z, named(flat)), (0, 1))(z, flat)

    K = np.block([[H, A.T], [A, np.zeros((len(A), len(A)))]])
    singular = declaration.dependent or bool(known.flat[i])
    solution, condition = _solved(K, -np.concatenate([B, C]), singular)
    dz, dual = solution[:n], solution[n:]
    matrix = np.zeros((n + m + 2 * n + 1, len(flat)))
    matrix[:n] = dz
    places = [n + active.nonzero()[:, 0], n + m + low.nonzero()[:, 0], n + m + n + high.nonzero()[:, 0]]
    matrix[torch.cat(places).numpy()] = dual
    matrix[-1] = f_z.numpy() @ dz + f_p.numpy()
    return Reference(matrix, condition)


def _solved(K: np.ndarray, rhs: np.ndarray, singular: bool) -> tuple[np.ndarray, float]:
    """K^-1 rhs, or K^+ rhs; equilibrated, as the condition number is meant."""
    norms = np.sqrt(np.linalg.norm(K, axis=1))
    norms[norms == 0] = 1.0
    values = np.linalg.svd(K / norms[:, None] / norms, compute_uv=False)
    if not singular:
        return np.linalg.solve(K, rhs), values[0] / values[-1]
    plain = np.linalg.svd(K, compute_uv=False)  # least norm is meant in the user's units
    kept = [v[v > 1e-11 * v[0]] for v in (values, plain)]
    condition = max([1.0, *(v[0] / v[-1] for v in kept if len(v))])
    return _least_norm(K, rhs), condition


def _least_norm(K: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """K^+ rhs of a symmetric K; residuals in extended precision, else its null space is off by 1e-16 / gap."""
    U, values, right = np.linalg.svd(K)
    kept = values > 1e-11 * values[0]
    inverse, wide = (right[kept].T / values[kept]) @ U[:, kept].T, K.astype(np.longdouble)
    null = right[~kept].T
    for _ in range(2):
        null = np.linalg.qr(null - inverse @ (wide @ null).astype(float))[0]
    rhs = rhs - null @ (null.T @ rhs)
    solution = inverse @ rhs
    for _ in range(2):
        solution = solution + inverse @ (rhs - wide @ solution).astype(float)
    return solution - null @ (null.T @ solution)


# -- strategies -------------------------------------------------------------------------------------------


def _vector(n: int) -> Variables:
    return (("u", (n,)),)


_MIXED: Variables = (("t", ()), ("u", (4,)), ("V", (2, 3)))  # n = 11
_MATRIX: Variables = (("U", (3, 4)),)

REGULAR = (
    Declaration(_vector(1), bounds=("box",)),
    Declaration((("u", ()),), "exp", bounds=("function",)),
    Declaration(_vector(5), inequality=(Block("linear", (4,)),), bounds=("box",)),
    Declaration(_vector(12), "none", (Block("linear", (3,)),), (Block("linear", (2, 2)),), ("constant",)),
    Declaration(_vector(30), "none", (Block("linear", (5,)),), (Block("linear", (10,)),), ("lower",)),
    Declaration(_vector(8), "linear", (Block("linear", (2,)),), (Block("linear", (4,)),), ("box",)),
    Declaration(_MIXED, "linear", (), (Block("linear", (3,)),), ("upper", "box", "lower")),
    Declaration(_vector(6), "exp", (Block("linear", (2,)),), (Block("sphere", (2,)),), ("upper",)),
    Declaration(_MATRIX, "logsumexp", (Block("linear", (2,)),), (Block("exponential", (2, 1)),), ("cap",)),
    Declaration(
        _MIXED, "norm", (), (Block("ellipsoid", (2,)), Block("linear", ())), ("free", "fixed", "box")
    ),
    Declaration(_vector(4), "quartic", (), (Block("norm", (2,)),), ("function",)),
    Declaration(_vector(20), "hyperbola", (Block("linear", (4,)),), (Block("exponential", (3,)),), ("box",)),
    Declaration(_vector(7), "none", (Block("sphere", ()),), (Block("linear", (3,)),), ("lower",)),
    Declaration(_MATRIX, "log", (Block("ellipsoid", (2,)),), (Block("product", (2,)),), ("constant",)),
    Declaration(_vector(9), "exp", (Block("product", (2,)),), (Block("sine", (3,)), Block("sphere", ()))),
    Declaration(
        _MIXED, "quartic", (Block("exponential", (2,)),), (Block("norm", ()),), ("cap", "upper", "free")
    ),
    Declaration(_vector(3), "log"),
    Declaration(_vector(10), "exp", (Block("linear", (3,)),)),
    Declaration(_MATRIX, "hyperbola"),
)

DEPENDENT = (
    Declaration(_vector(6), "none", (Block("linear", (2,)), Block("linear", (2,), -3.0)), (), ("box",)),
    Declaration(_vector(5), "exp", (Block("sphere", ()), Block("sphere", (), 0.5))),
    Declaration(_vector(8), "none", (), (Block("linear", (3,)), Block("linear", (2,), 2.0)), ("lower",)),
    Declaration(_MIXED, "hyperbola", (), (Block("exponential", (2,)), Block("exponential", (2,), 7.0))),
    Declaration(_vector(6), "none", (Block("linear", ()),), (), ("lower",), shadow=True),
)


def random_declaration(seed: int) -> Declaration:
    """Beyond the chosen ones, for the long run."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 31))
    variables: Variables = _vector(n)
    if n >= 8 and rng.random() < 0.4:
        variables = (("t", ()), ("U", (2, 2)), ("v", (n - 5,)))

    def blocks(kinds: Sequence[str], most: int) -> tuple[Block, ...]:
        sizes = [int(rng.integers(1, most + 1)) for _ in range(int(rng.integers(0, 3)))] if most else []
        return tuple(Block(str(rng.choice(kinds)), (size,)) for size in sizes)

    kinds = list(ROWS)
    bounds = rng.choice(
        ["free", "lower", "upper", "box", "function", "cap", "fixed", "constant"], len(variables)
    )
    if (bounds == "fixed").all():
        bounds[0] = "free"
    equality = blocks(kinds, n // 8)
    return Declaration(
        variables, str(rng.choice(["none", *TERMS])), equality, blocks(kinds, max(1, n // 4)), tuple(map(str, bounds))
    )  # fmt: skip


@st.composite
def known_points(
    draw: st.DrawFn,
    declarations: Sequence[Declaration] = REGULAR,
    curvatures: Sequence[str] = CURVATURES[:3],
    weak: bool = False,
    samples: int = 3,
) -> Known:
    """A declaration, what is active in each sample, and numbers.

    Structure is drawn (and shrinks); numbers come from a seed, which a generator spreads better.
    """
    declaration = draw(st.sampled_from(declarations))
    possible = [c for c in curvatures if c not in CONVEX or declaration.convex]
    curvature = draw(st.sampled_from(possible or ["indefinite"]))
    width = declaration.inequalities + declaration.n
    weak = weak and curvature not in ("saddle", "flat")  # which directions count would depend on them
    code = st.sampled_from([INACTIVE, STRONG, WEAK] if weak else [INACTIVE, STRONG])
    sides = draw(st.lists(st.lists(code, min_size=width, max_size=width), min_size=1, max_size=samples))
    seed = draw(st.integers(0, 2**32 - 1))
    return build(declaration, seed, sides, curvature, shared=draw(st.booleans()))
