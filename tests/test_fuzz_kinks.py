"""Properties of random non-smooth problems with known KKT points, against dense algebra.

    minimise    z^T P z / 2 + q^T z + sum_k w_k phi_k(K_k z - d_k)
    subject to  A z = b,   z >= lower,   phi(K z - d) <= rho

The point, the rows that sit on a kink and the subgradient that they have there are chosen first. On the
manifold of those rows phi is a smooth piece, and ``reference`` differentiates the KKT conditions of that
smooth problem: with force s, phi contributes piece(r) + s^T rows(r), and rows(r) = 0 are equalities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from known_kkt import (
    CONVEX,
    D,
    Flat,
    Reference,
    _by_name,
    _definite,
    _hessian,
    _normal,
    _null_space,
    _powers,
    _solved,
    _uniform,
)
from test_fuzz import NIGHT, SEEDS, examples, tolerance

import ddn_solvers as ddn

Piece = Callable[[torch.Tensor], torch.Tensor]
PINBALL = 0.3

KINKS: dict[str, Piece] = {
    "abs": lambda r: r.abs().sum(),
    "hinge": lambda r: r.relu().sum(),
    "pinball": lambda r: torch.maximum(PINBALL * r, (PINBALL - 1) * r).sum(),
    "deadzone": lambda r: (r.abs() - 1).clamp(min=0).sum(),
    "largest": lambda r: r.amax(),
    "linf": lambda r: torch.linalg.vector_norm(r, float("inf")),
    "norm": lambda r: torch.linalg.vector_norm(r),
    "twice": lambda r: r.abs().sum() + 0.3 * (2 * r).abs().sum(),
}
SLOPES = {"abs": (-1.0, 1.0), "hinge": (0.0, 1.0), "pinball": (PINBALL - 1, PINBALL), "twice": (-1.6, 1.6)}


@dataclass(frozen=True)
class Declaration:
    """``kinks``: (kind, rows) of each phi_k; ``budget``: the last is a constraint. All but that is optional."""

    n: int
    kinks: tuple[tuple[str, int], ...]
    equalities: int = 0
    bounded: bool = False
    budget: bool = False

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        n = self.n
        shapes: dict[str, tuple[int, ...]] = {"P": (n, n), "q": (n,)}
        for k, (_, size) in enumerate(self.kinks):
            shapes |= {f"K{k}": (size, n), f"d{k}": (size,), f"w{k}": ()}
        if self.equalities:
            shapes |= {"A": (self.equalities, n), "b": (self.equalities,)}
        return shapes | ({"lower": (n,)} if self.bounded else {})

    def smooth(self, z: torch.Tensor, p: Flat) -> torch.Tensor:
        return 0.5 * z @ p["P"] @ z + p["q"] @ z

    @property
    def problem(self) -> ddn.Problem:
        return _problem(self)


@cache
def _problem(declaration: Declaration) -> ddn.Problem:
    kinks, names = declaration.kinks, declaration.parameters
    costs = kinks[: len(kinks) - declaration.budget]

    def objective(z: torch.Tensor, p: Flat) -> torch.Tensor:
        terms = [p[f"w{k}"] * KINKS[kind](p[f"K{k}"] @ z - p[f"d{k}"]) for k, (kind, _) in enumerate(costs)]
        return 0.5 * z @ p["P"] @ z + p["q"] @ z + sum(terms)

    last = len(kinks) - 1

    def budget(z: torch.Tensor, p: Flat) -> torch.Tensor:
        return KINKS[kinks[last][0]](p[f"K{last}"] @ z - p[f"d{last}"]) - p[f"w{last}"]

    u = (("u", (declaration.n,)),)
    of_costs = ["P", "q", *(f"{s}{k}" for k in range(len(costs)) for s in "Kdw")]
    equality = _by_name(u, ["A", "b"], lambda z, p: p["A"] @ z - p["b"])
    return ddn.Problem(
        variables={"u": (declaration.n,)},
        parameters=names,
        objective=_by_name(u, of_costs, objective),
        equality={"plane": equality} if declaration.equalities else None,
        inequality={"budget": _by_name(u, [f"{s}{last}" for s in "Kdw"], budget)} if declaration.budget else None,
        bounds={"u": ("lower", None)} if declaration.bounded else None,
    )  # fmt: skip


# -- kinks at a chosen value and subgradient ---------------------------------------------------------------


@dataclass(frozen=True)
class Kink:
    """phi near r: ``piece`` on the manifold where ``rows`` vanish, ``force`` the subgradient along them.

    ``weak``: rows whose force is on the boundary; ``onto`` is the piece where they are left instead, in
    whichever direction that force allows.
    """

    piece: Piece
    rows: Piece
    force: torch.Tensor
    weak: torch.Tensor


def kink(kind: str, size: int, room: int, weak: bool, rng: np.random.Generator) -> tuple[torch.Tensor, Kink]:
    """A value of r with at most ``room`` rows on the kink, and what phi is around it."""
    none = torch.zeros(0, dtype=D)
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], size))
    away = signs * _powers(rng, -1, 0.5, size)
    if kind == "norm":
        if room < size or rng.random() < 0.4:
            return away, Kink(torch.linalg.vector_norm, lambda r: r[:0], none, none.bool())
        force = 0.8 * torch.nn.functional.normalize(_normal(rng, size), dim=0) * float(rng.uniform(0.1, 1))
        return 0 * away, Kink(lambda r: 0 * r.sum(), lambda r: r, force, torch.zeros(size, dtype=torch.bool))
    on = torch.from_numpy(rng.permutation(size) < min(room, rng.integers(0, size + 1)))
    if kind in ("largest", "linf"):
        ties = torch.from_numpy(rng.permutation(size)[: min(room, int(rng.integers(0, size))) + 1])
        sigma = torch.ones(size, dtype=D) if kind == "largest" else signs
        top = 1.0 + _powers(rng, -1, 0.5)
        r = sigma * (top - _powers(rng, -1, -0.1, size))  # of one sign each: the rest is nearer to zero
        r[ties] = sigma[ties] * top
        share = _uniform(rng, 0.2, 1.0, len(ties))
        force = (share / share.sum())[1:]
        first, others = ties[0], ties[1:]
        free = torch.zeros(len(others), dtype=torch.bool)
        rows = lambda r: sigma[others] * r[others] - sigma[first] * r[first]  # noqa: E731  # a formula
        return r, Kink(lambda r: sigma[first] * r[first], rows, force, free)
    if kind == "deadzone":  # max(|r| - 1, 0), on the kink where |r| = 1
        out = torch.from_numpy(rng.random(size) < 0.5)
        r = torch.where(on, signs, torch.where(out, signs + away, 0.8 * signs * away.abs().clamp(max=1)))
        force, tight = _forces(0.0, 1.0, int(on.sum()), weak, rng)
        keep = (out & ~on) * signs
        constant = (out & ~on).sum()
        return r, Kink(lambda r: keep @ r - constant, lambda r: (signs * r - 1)[on], force, tight)
    low, high = SLOPES[kind]
    force, tight = _forces(low, high, int(on.sum()), weak, rng)
    slopes = torch.where(away > 0, away.new_tensor(high), away.new_tensor(low)) * ~on
    return torch.where(on, 0 * away, away), Kink(lambda r: slopes @ r, lambda r: r[on], force, tight)


def _forces(
    low: float, high: float, count: int, weak: bool, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inside the interval, or some of them at its ends."""
    share = _uniform(rng, 0.05, 0.95, count)
    tight = torch.from_numpy(rng.random(count) < 0.5) & torch.tensor(weak)
    share = torch.where(tight, share.round(), share)
    return low + (high - low) * share, tight


@dataclass(frozen=True)
class Sample:
    """What a point is built of; ``y``: multipliers of equalities, then of the budget."""

    z: torch.Tensor
    y: torch.Tensor
    push: torch.Tensor
    kinks: tuple[Kink, ...]
    parameters: dict[str, torch.Tensor]

    @property
    def weak(self) -> bool:
        return any(bool(k.weak.any()) for k in self.kinks)


@dataclass(frozen=True)
class Known:
    declaration: Declaration
    samples: tuple[Sample, ...]
    recipe: str

    def __repr__(self) -> str:
        return self.recipe

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {k: torch.stack([s.parameters[k] for s in self.samples]) for k in self.declaration.parameters}

    @property
    def z(self) -> torch.Tensor:
        return torch.stack([s.z for s in self.samples])


def build(declaration: Declaration, seed: int, samples: int, curvature: str, weak: bool = False) -> Known:
    rng = np.random.default_rng(seed)
    made = tuple(_sample(declaration, rng, curvature, weak) for _ in range(samples))
    return Known(declaration, made, f"build({declaration!r}, {seed}, {samples}, {curvature!r}, {weak})")


def _sample(declaration: Declaration, rng: np.random.Generator, curvature: str, weak: bool) -> Sample:
    n, p = declaration.n, {}
    z, room = _normal(rng, n), n - declaration.equalities - declaration.budget
    active = torch.from_numpy(rng.random(n) < 0.3) & torch.tensor(declaration.bounded)
    active[torch.cumsum(active, 0) > room // 2] = False
    push = active * _powers(rng, -1, 1, n)
    room -= int(active.sum())
    p["lower"] = z - ~active * _powers(rng, -1, 0.5, n)
    p["A"] = _normal(rng, declaration.equalities, n)
    p["b"] = p["A"] @ z
    y = torch.cat([_normal(rng, declaration.equalities), _powers(rng, -1, 1, int(declaration.budget))])
    kinks = []
    for k, (kind, size) in enumerate(declaration.kinks):
        held = declaration.budget and k == len(declaration.kinks) - 1  # one row off its kink: a gradient
        r, around = kink(kind, size, min(room, size - 1) if held else room, weak, rng)
        kinks.append(around)
        room -= len(around.force)
        p |= {f"K{k}": _normal(rng, size, n), f"w{k}": _uniform(rng, 0.3, 3.0)}
        p[f"d{k}"] = p[f"K{k}"] @ z - r
    last = len(kinks) - 1
    if declaration.budget:
        p[f"w{last}"] = KINKS[declaration.kinks[last][0]](r)
    p |= {"q": torch.zeros(n, dtype=D), "P": torch.zeros(n, n, dtype=D)}
    sample = Sample(z, y, push, tuple(kinks), p)
    null = _null_space(torch.func.jacrev(rows_of)(z, p, declaration, sample, True))
    H = torch.func.jacrev(torch.func.grad(lagrangian))(z, p, declaration, sample)
    p["P"] = (
        _definite(rng, n, n - null.shape[1] if curvature == "semidefinite" else 0)
        if curvature in CONVEX
        else _hessian(rng, null, curvature, 0) - H
    )
    p["q"] = push - torch.func.grad(lagrangian)(z, p, declaration, sample)
    return sample


# -- the derivative by dense algebra -----------------------------------------------------------------------


def lagrangian(z: torch.Tensor, p: Flat, declaration: Declaration, sample: Sample) -> torch.Tensor:
    """Without bounds; forces of kinks are constants times the weight that the term has at the point."""
    total = declaration.smooth(z, p)
    if declaration.equalities:
        total = total + sample.y[: declaration.equalities] @ (p["A"] @ z - p["b"])
    for k, around in enumerate(sample.kinks):
        r, w = p[f"K{k}"] @ z - p[f"d{k}"], p[f"w{k}"]
        held = declaration.budget and k == len(sample.kinks) - 1
        weight = sample.y[-1] if held else sample.parameters[f"w{k}"]
        value = sample.y[-1] * (around.piece(r) - w) if held else w * around.piece(r)
        total = total + value + weight * around.force @ around.rows(r)
    return total


def rows_of(z: torch.Tensor, p: Flat, declaration: Declaration, sample: Sample, kept: bool) -> torch.Tensor:
    """Active rows: equalities, budget, bounds, kinks; without the weakly active ones if not ``kept``."""
    parts = [p["A"] @ z - p["b"]] if declaration.equalities else []
    for k, around in enumerate(sample.kinks):
        r = p[f"K{k}"] @ z - p[f"d{k}"]
        strong = ~around.weak | kept
        parts.append(around.rows(r)[strong])
        if declaration.budget and k == len(sample.kinks) - 1:
            weak = (around.force * around.rows(r))[~strong].sum()  # a kink that is left: its slope stays
            parts.append((around.piece(r) + weak - p[f"w{k}"])[None])
    if declaration.bounded:
        parts.append((p["lower"] - z)[sample.push > 0])
    return torch.cat([z[:0], *parts])


def reference(known: Known, i: int, kept: bool = True) -> Reference:
    """(n + 1, P): of the point and of the optimal value."""
    declaration, sample = known.declaration, known.samples[i]
    names = list(declaration.parameters)
    shapes = [sample.parameters[k].shape for k in names]
    flat = torch.cat([sample.parameters[k].reshape(-1) for k in names])
    n = declaration.n

    def named(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = flat.split([s.numel() for s in shapes])
        return {k: v.reshape(s) for k, v, s in zip(names, pieces, shapes, strict=True)}

    def free(z: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """A weakly active kink that is dropped has w_k times its end slope, not a constant force."""
        p = named(flat)
        total = lagrangian(z, p, declaration, sample)
        for k, around in enumerate(sample.kinks):
            held = declaration.budget and k == len(sample.kinks) - 1
            if not kept and not held:
                moved = (around.force * around.rows(p[f"K{k}"] @ z - p[f"d{k}"]))[around.weak].sum()
                total = total + (p[f"w{k}"] - sample.parameters[f"w{k}"]) * moved
        return total

    def rows(z: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        return rows_of(z, named(flat), declaration, sample, kept)

    def full(z: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        bounds = sample.push @ (named(flat)["lower"] - z) if declaration.bounded else 0.0
        return lagrangian(z, named(flat), declaration, sample) + bounds

    H, B = (d.numpy() for d in torch.func.jacrev(torch.func.grad(free), (0, 1))(sample.z, flat))
    A, C = (d.numpy() for d in torch.func.jacrev(rows, (0, 1))(sample.z, flat))
    K = np.block([[H, A.T], [A, np.zeros((len(A), len(A)))]])
    solution, condition = _solved(K, -np.concatenate([B, C]), False)
    value = torch.func.grad(full, 1)(sample.z, flat).numpy()
    return Reference(np.concatenate([solution[:n], value[None]]), condition)


def assert_gradients(
    found: Flat, known: Known, v: torch.Tensor, s: torch.Tensor, references: list[Reference], bound: float
) -> None:
    cotangents = torch.cat([v, s[:, None]], dim=1).numpy()
    exact = np.stack([c @ one.matrix for c, one in zip(cotangents, references, strict=True)])
    terms = np.stack([abs(c) @ abs(one.matrix) for c, one in zip(cotangents, references, strict=True)])
    shapes, start = known.declaration.parameters, 0
    for name, shape in shapes.items():
        part = slice(start, start := start + int(np.prod(shape)))
        error = abs(found[name].reshape(len(exact), -1).numpy() - exact[:, part]).max()
        size = max(terms[:, part].max(), 1e-3 * terms.max())
        assert error <= bound * size, f"{name}: off by {error:.2e} beside {size:.2e}"


def cotangents_for(known: Known, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, dtype=D, generator=generator) for shape in (known.z.shape, known.z.shape[:1])
    )


def references_of(known: Known, kept: bool = True) -> list[Reference]:
    references = [reference(known, i, kept) for i in range(len(known.samples))]
    assume(all(one.condition < 1e8 for one in references))
    return references


# -- strategies --------------------------------------------------------------------------------------------

REGULAR = (
    Declaration(4, (("abs", 4),)),
    Declaration(6, (("hinge", 8),), equalities=1),
    Declaration(5, (("pinball", 7),), bounded=True),
    Declaration(7, (("norm", 3), ("norm", 2), ("abs", 3)), equalities=1),
    Declaration(5, (("largest", 5),)),
    Declaration(6, (("linf", 4), ("hinge", 3)), bounded=True),
    Declaration(6, (("deadzone", 5), ("norm", 2))),
    Declaration(15, (("abs", 10), ("pinball", 8)), equalities=3, bounded=True),
)
BUDGETS = (
    Declaration(6, (("abs", 6),), budget=True),
    Declaration(5, (("hinge", 3), ("linf", 4)), budget=True),
    Declaration(8, (("abs", 3), ("abs", 5)), equalities=1, budget=True),
)
TWICE = (Declaration(5, (("twice", 4),)), Declaration(7, (("twice", 5), ("norm", 3)), equalities=1))


def random_declaration(seed: int) -> Declaration:
    """Beyond the chosen ones, for the long run."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 21))
    kinds = [k for k in KINKS if k != "twice"]
    blocks = [(str(rng.choice(kinds)), int(rng.integers(1, n + 2))) for _ in range(int(rng.integers(1, 4)))]
    return Declaration(n, tuple(blocks), int(rng.integers(0, n // 3 + 1)), bool(rng.random() < 0.5))


DECLARATIONS = (*REGULAR, *BUDGETS, *(random_declaration(seed) for seed in range(40 if NIGHT else 0)))
SLOPED = tuple(d for d in DECLARATIONS if {kind for kind, _ in d.kinks} <= {*SLOPES, "deadzone"})


def known_points(
    declarations: tuple[Declaration, ...], curvatures: tuple[str, ...], weak: bool = False
) -> Any:
    return st.builds(
        build, st.sampled_from(declarations), SEEDS, st.integers(1, 3), st.sampled_from(curvatures), st.just(weak)
    )  # fmt: skip


def sensitivity_at(known: Known, policy: ddn.Policy | None = None) -> ddn.Sensitivity:
    return ddn.sensitivity(known.declaration.problem, known.parameters, {"u": known.z}, policy=policy)


# -- properties --------------------------------------------------------------------------------------------


@examples(60)
@given(known_points(DECLARATIONS, (*CONVEX, "indefinite", "saddle")), SEEDS)
def test_vjp_and_certificate_at_kinks_are_those_of_the_manifold(known: Known, seed: int) -> None:
    references, (v, s) = references_of(known), cotangents_for(known, seed)
    found = sensitivity_at(known)
    gradient = found.vjp({"u": v, "objective": s})
    assert_gradients(gradient, known, v, s, references, tolerance(references))
    certificate = found.certificate
    assert not certificate.singular.any()
    assert certificate.licq.all()
    assert not certificate.one_sided.any()
    assert certificate.ok.all()
    assert (certificate.stationarity < 1e-9).all()


@examples(30)
@given(known_points(REGULAR, CONVEX), st.sampled_from(["auto", "casadi:ipopt", "scipy:SLSQP"]), SEEDS)
def test_solvers_reach_kinks(known: Known, solver: str, seed: int) -> None:
    references, (v, s) = references_of(known), cotangents_for(known, seed)
    leaves = {k: p.requires_grad_() for k, p in known.parameters.items()}
    solution = ddn.solve(known.declaration.problem, leaves, solver=solver)
    torch.testing.assert_close(solution["u"].detach(), known.z, rtol=0, atol=1e-7)
    total = (solution["u"] * v).sum() + (solution.objective * s).sum()
    found = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert_gradients(found, known, v, s, references, tolerance(references))
    assert solution.certificate.ok.all()


@examples(30)
@given(
    known_points(SLOPED, ("definite", "indefinite"), weak=True),
    st.sampled_from(["active", "inactive", "mean"]),
    SEEDS,
)
def test_a_subgradient_at_its_limit_is_kept_or_left_as_the_policy_says(
    known: Known, choice: str, seed: int
) -> None:
    kept, left = references_of(known), references_of(known, kept=False)
    mean = [Reference((a.matrix + b.matrix) / 2, max(a.condition, b.condition)) for a, b in zip(kept, left, strict=True)]  # fmt: skip
    v, s = cotangents_for(known, seed)
    found = sensitivity_at(known, ddn.Policy(weakly_active=choice))
    expected = {"active": kept, "inactive": left, "mean": mean}[choice]
    assert_gradients(found.vjp({"u": v, "objective": s}), known, v, s, expected, tolerance(expected))
    assert found.certificate.one_sided.tolist() == [one.weak for one in known.samples]


@examples(20)
@given(known_points(TWICE, ("definite",)), SEEDS)
@pytest.mark.filterwarnings("ignore::ddn_solvers.DegeneracyWarning")
def test_a_kink_written_twice_is_one_kink(known: Known, seed: int) -> None:
    references, (v, s) = references_of(known), cotangents_for(known, seed)
    found = sensitivity_at(known)
    gradient = found.vjp({"u": v, "objective": s})
    assert_gradients(gradient, known, v, s, references, tolerance(references))
    assert not found.certificate.one_sided.any()
    assert (found.certificate.stationarity < 1e-9).all()


@examples(20)
@given(known_points(REGULAR, (*CONVEX, "indefinite")), st.sampled_from([-6, 6]), SEEDS)
def test_the_unit_of_the_objective_decides_nothing_at_kinks(known: Known, power: int, seed: int) -> None:
    references, (v, s) = references_of(known), cotangents_for(known, seed)
    factor, scaled = 10.0**power, dict(known.parameters)
    costs = [k for k in scaled if k[0] in "Pqw"]
    scaled |= {k: scaled[k] * factor for k in costs}
    found = ddn.sensitivity(known.declaration.problem, scaled, {"u": known.z})
    gradient = found.vjp({"u": v})
    gradient |= {k: gradient[k] * factor for k in costs}
    assert_gradients(gradient, known, v, 0 * s, references, tolerance(references))
    assert found.certificate.ok.all()


def test_ties_among_what_a_maximum_passes_over_hold_nothing() -> None:
    """A vertex of ten hinges and four bounds; ties far below a maximum took a share of the forces there."""
    known = build(Declaration(14, (("hinge", 14), ("linf", 12)), bounded=True), 3, 1, "semidefinite")
    certificate = sensitivity_at(known).certificate
    assert certificate.ok.all()
    assert (certificate.stationarity < 1e-9).all()


def test_a_weakly_held_kink_that_is_left_is_left_to_the_side_of_its_force() -> None:
    """Seven rows of condition 1e7: rounding of their multipliers left two, to the side where nothing balances."""
    kinks = (("pinball", 5), ("deadzone", 6), ("pinball", 1))
    known = build(Declaration(7, kinks), 200000, 1, "indefinite", weak=True)
    certificate = sensitivity_at(known).certificate
    assert certificate.one_sided.all()
    assert (certificate.stationarity < 1e-9).all()


def test_the_curvature_of_a_norm_near_its_zero_excuses_no_force() -> None:
    """SLSQP stops 7e-12 off the zero of a norm, whose curvature of 1e11 made forces of 0.8 look like none."""
    kinks = (("norm", 3), ("norm", 2), ("abs", 3))
    known = build(Declaration(7, kinks, equalities=1), 55697480, 2, "semidefinite")
    solution = ddn.solve(known.declaration.problem, known.parameters, solver="scipy:SLSQP")
    torch.testing.assert_close(solution["u"], known.z, rtol=0, atol=1e-7)
