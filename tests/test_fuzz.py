"""Properties of random problems with known KKT points, against dense algebra (``known_kkt.py``).

Some hundred examples by default, the same at every run. DDN_FUZZ=40 (``make fuzz``) draws forty times as
many anew, on more declarations.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from known_kkt import (
    CONVEX,
    CURVATURES,
    DEPENDENT,
    INACTIVE,
    REGULAR,
    STRONG,
    WEAK,
    Block,
    D,
    Declaration,
    Known,
    Reference,
    build,
    known_points,
    random_declaration,
    reference,
)

import ddn_solvers as ddn

TIMES = int(os.environ.get("DDN_FUZZ", "1"))
NIGHT = TIMES > 1
DECLARATIONS = (*REGULAR, *(random_declaration(seed) for seed in range(100 if NIGHT else 0)))
UNIQUE = tuple(d for d in DECLARATIONS if d.convex)  # where solve can find no other point
SEEDS = st.integers(0, 2**32 - 1)


def examples(count: int) -> Callable[[Any], Any]:
    """So many by default, always the same; a night has time for more."""
    return settings(
        max_examples=TIMES * count,
        derandomize=not NIGHT,
        print_blob=NIGHT,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


# -- what is compared -------------------------------------------------------------------------------------


def flattened(outputs: Mapping[str, torch.Tensor], known: Known) -> torch.Tensor:
    """Outputs by key -> (B, all of them), in the order of the rows of ``reference``."""
    return torch.cat([outputs[key].reshape(known.samples, -1) for key in known.outputs], dim=1)


def outputs_of(solution: ddn.Solution) -> dict[str, torch.Tensor]:
    """A solution by the keys of ``Sensitivity.vjp``."""
    result = dict(solution.primal) | {"objective": solution.objective}
    for kind in ("equality", "inequality", "lower", "upper"):
        result |= {f"{kind}.{name}": value for name, value in getattr(solution.dual, kind).items()}
    return result


def cotangents_for(known: Known, seed: int, primal_only: bool = False) -> dict[str, torch.Tensor]:
    """Normal numbers for every output; zeros for multipliers if ``primal_only``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, dtype=D, generator=generator) * (not primal_only or "." not in key)
        for key, value in known.outputs.items()
    }


def tolerance(references: list[Reference]) -> float:
    """1e-9, or what rounding leaves of it where the KKT matrix is badly conditioned."""
    return 1e-9 * max(1.0, *(one.condition / 1e6 for one in references))


def references_of(known: Known, weak: bool = True) -> list[Reference]:
    references = [reference(known, i, weak) for i in range(known.samples)]
    assume(all(one.condition < 1e9 for one in references))
    return references


def by_parameter(known: Known, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """(B, P) -> by parameter in its given shape, summed where the batch shares it."""
    sizes = [value.numel() for value in known.one(0).values()]
    pieces = torch.from_numpy(rows).split(sizes, dim=1)
    result = {}
    for piece, (name, value) in zip(pieces, known.parameters.items(), strict=True):
        own = value.dim() > len(known.declaration.parameters[name])
        result[name] = (piece if own else piece.sum(0)).reshape(value.shape)
    return result


def assert_vjp(
    found: Mapping[str, torch.Tensor],
    known: Known,
    cotangents: Mapping[str, torch.Tensor],
    references: list[Reference],
    atol: float | None = None,
    floor: float = 1e-3,
) -> None:
    """Every gradient to ``tolerance``, relative to the largest sum of absolute terms of its parameter.

    Args:
        floor: Of these sums, relative to that of all parameters: what cancels leaves rounding.
    """
    flat = flattened(cotangents, known).numpy()
    exact = np.stack([v @ one.matrix for v, one in zip(flat, references, strict=True)])
    terms = np.stack([abs(v) @ abs(one.matrix) for v, one in zip(flat, references, strict=True)])
    bound = atol or tolerance(references)
    expected, scale = by_parameter(known, exact), by_parameter(known, terms)
    least = floor * max(value.max().item() for value in scale.values())
    for name, gradient in found.items():
        error, size = (
            (gradient.to(D) - expected[name]).abs().max().item(),
            max(scale[name].max().item(), least),
        )
        assert error <= bound * size, f"{name}: off by {error:.2e} beside {size:.2e}"
    assert found.keys() == known.parameters.keys()


def leaves(known: Known) -> dict[str, torch.Tensor]:
    return {name: value.clone().requires_grad_() for name, value in known.parameters.items()}


def gradients(
    solution: ddn.Solution, parameters: Mapping[str, torch.Tensor], cotangents: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    outputs = outputs_of(solution)
    total = sum((outputs[key] * value.to(outputs[key].dtype)).sum() for key, value in cotangents.items())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(parameters.items(), found, strict=True)
    }


def sensitivity_at(known: Known, policy: ddn.Policy | None = None) -> ddn.Sensitivity:
    return ddn.sensitivity(known.declaration.problem, known.parameters, known.primal, policy=policy)


def expected_masks(known: Known, codes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """By name as in a certificate: the constraints and bounds with one of these codes."""
    q = known.declaration.inequalities
    on = torch.isin(known.sides, torch.tensor(codes))
    fixed = torch.tensor([kind == "fixed" for kind in known.declaration.kinds])
    low = torch.where(fixed, known.lower > 0, on[:, q:] & known.at_lower)
    high = torch.where(fixed, known.upper > 0, on[:, q:] & ~known.at_lower)
    strong = torch.tensor(STRONG in codes)
    low, high = low & (strong | ~fixed), high & (strong | ~fixed)
    equality = strong.expand(known.samples, known.declaration.equalities)
    nothing = torch.zeros(known.samples, 1, dtype=torch.bool)
    flat = torch.cat(
        [torch.zeros_like(known.z, dtype=torch.bool), equality, on[:, :q], low, high, nothing], dim=1
    )
    named = known.by_output(flat)
    names = {"equality": "{}", "inequality": "{}", "lower": "{}.lower", "upper": "{}.upper"}
    return {
        names[key.split(".")[0]].format(key.split(".")[1]): mask for key, mask in named.items() if "." in key
    }


def assert_certificate(certificate: ddn.Certificate, known: Known, references: list[Reference]) -> None:
    """Everything that the construction of a regular point decides."""
    weak = (known.sides == WEAK).any(dim=1)
    assert certificate.strictly_complementary.tolist() == (~weak).tolist()
    assert certificate.one_sided.tolist() == weak.tolist()
    assert certificate.singular.tolist() == (known.flat > 0).tolist()
    assert_curvature(certificate, known, references)
    assert certificate.licq.all()
    assert (certificate.rank_deficiency == 0).all()
    assert certificate.ok.tolist() == (~weak & (known.flat == 0)).tolist()
    assert [basis.shape[1] for basis in certificate.null_space] == known.flat.tolist()
    for found, codes in ((certificate.active, (STRONG, WEAK)), (certificate.weakly_active, (WEAK,))):
        expected = expected_masks(known, codes)
        for name, mask in found.items():
            assert mask.tolist() == expected[name].tolist(), (name, codes)
        assert all(not mask.any() for name, mask in expected.items() if name not in found)
    for name, value in vars(certificate).items():  # nothing that is said of a good point is NaN
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert not value.isnan().any(), name


def assert_curvature(certificate: ddn.Certificate, known: Known, references: list[Reference]) -> None:
    """Where it is clear: below 1e-7 of H it counts as none."""
    clear = torch.tensor([one.condition < 1e6 for one in references])
    assert certificate.sosc[clear].tolist() == known.sosc[clear].tolist()


# -- at the known point -----------------------------------------------------------------------------------


@examples(50)
@given(known_points(DECLARATIONS, CURVATURES[:4]), SEEDS)
def test_vjp_is_that_of_the_dense_kkt_system(known: Known, seed: int) -> None:
    references, cotangents = references_of(known), cotangents_for(known, seed)
    assert_vjp(sensitivity_at(known).vjp(cotangents), known, cotangents, references)


@examples(40)
@given(known_points(DECLARATIONS, CURVATURES[:4]), SEEDS)
def test_jvp_and_jacobian_are_those_of_the_dense_kkt_system(known: Known, seed: int) -> None:
    references, generator = references_of(known), torch.Generator().manual_seed(seed)
    found = sensitivity_at(known)
    tangents = {
        name: torch.randn(value.shape, dtype=D, generator=generator)
        for name, value in known.parameters.items()
    }
    each = replace(known, parameters=tangents)
    flat = np.stack([torch.cat([v.reshape(-1) for v in each.one(i).values()]) for i in range(known.samples)])
    n, bound = known.declaration.n, tolerance(references)
    expected = np.stack([one.matrix[:n] @ t for one, t in zip(references, flat, strict=True)])
    terms = np.stack([abs(one.matrix[:n]) @ abs(t) for one, t in zip(references, flat, strict=True)])
    dz = torch.cat([v.reshape(known.samples, -1) for v in found.jvp(tangents).values()], dim=1)
    assert abs(dz.numpy() - expected).max() <= bound * max(terms.max(), 1e-9)

    outputs = known.outputs
    of = list(outputs)[seed % len(outputs)]
    wrt = list(tangents)[seed // 7 % len(tangents)]
    mask = flattened({k: torch.full_like(v, float(k == of)) for k, v in outputs.items()}, known)[0] > 0
    jacobian = found.jacobian(of, wrt)
    shape = known.declaration.parameters[wrt]
    assert jacobian.shape == (known.samples, *outputs[of].shape[1:], *shape)
    start = list(known.one(0)).index(wrt)
    sizes = [value.numel() for value in known.one(0).values()]
    columns = slice(sum(sizes[:start]), sum(sizes[: start + 1]))
    exact = np.stack([one.matrix[mask.numpy()][:, columns] for one in references])
    error = abs(jacobian.reshape(exact.shape).numpy() - exact).max(initial=0.0)
    largest = max(abs(one.matrix).max() for one in references)
    assert error <= bound * max(abs(exact).max(initial=0.0), 1e-3 * largest)


@examples(50)
@given(known_points(DECLARATIONS, CURVATURES, weak=True))
def test_certificate_and_multipliers_are_those_of_the_construction(known: Known) -> None:
    references = references_of(known)
    solution = ddn.attach(known.declaration.problem, known.parameters, known.primal)
    assert_certificate(solution.certificate, known, references)
    assert solution.converged.all()
    assert all(status is ddn.Status.OPTIMAL for status in solution.status)
    bound, expected = 100 * tolerance(references), known.outputs
    for key, value in outputs_of(solution).items():
        size = 1 + expected[key].abs().max().item() if expected[key].numel() else 1.0
        torch.testing.assert_close(value, expected[key], rtol=0, atol=bound * size)
    for multipliers in (
        *solution.dual.inequality.values(),
        *solution.dual.lower.values(),
        *solution.dual.upper.values(),
    ):
        assert (multipliers >= -1e-9).all()


@examples(30)
@given(known_points(DECLARATIONS, weak=True), st.sampled_from(["active", "inactive", "mean"]), SEEDS)
def test_weakly_active_sides_are_kept_or_dropped_as_the_policy_says(
    known: Known, choice: str, seed: int
) -> None:
    kept, dropped = references_of(known, weak=True), references_of(known, weak=False)
    mean = [
        Reference((a.matrix + b.matrix) / 2, max(a.condition, b.condition))
        for a, b in zip(kept, dropped, strict=True)
    ]
    expected = {"active": kept, "inactive": dropped, "mean": mean}[choice]
    cotangents = cotangents_for(known, seed)
    found = sensitivity_at(known, ddn.Policy(weakly_active=choice)).vjp(cotangents)
    assert_vjp(found, known, cotangents, expected)


@examples(30)
@given(known_points(DEPENDENT, CURVATURES[:3]), SEEDS)
def test_dependent_rows_leave_the_unique_derivative_of_the_point(known: Known, seed: int) -> None:
    references, cotangents = references_of(known), cotangents_for(known, seed, primal_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sensitivity_at(known)
        gradient = found.vjp(cotangents)
    assert_vjp(gradient, known, cotangents, references)
    declaration = known.declaration
    copied = declaration.sources != np.arange(len(declaration.sources))
    missing = (known.sides[:, copied] != INACTIVE).sum(1) + sum(
        b.size for b in declaration.equality if b.copies
    )
    assert found.certificate.rank_deficiency.tolist() == missing.tolist()
    assert found.certificate.licq.tolist() == (missing == 0).tolist()
    assert found.certificate.singular.tolist() == (missing > 0).tolist()
    assert_curvature(found.certificate, known, references)
    assert [w.category for w in caught] == [ddn.DegeneracyWarning] * bool((missing > 0).any())


@examples(30)
@given(known_points([d for d in DECLARATIONS if d.term != "linear"], ["flat"]), SEEDS)
def test_flat_directions_give_the_minimum_norm_derivative(known: Known, seed: int) -> None:
    references, cotangents = references_of(known), cotangents_for(known, seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradient = sensitivity_at(known).vjp(cotangents)
    # A null space is known to rounding over the gap beside it: with a wide one in every block, else in all together.
    clear = all(one.condition < 1e5 for one in references)
    assert_vjp(gradient, known, cotangents, references, floor=1e-3 if clear else 1.0)
    assert [w.category for w in caught] == [ddn.DegeneracyWarning] * bool((known.flat > 0).any())


# -- invariances ------------------------------------------------------------------------------------------


@examples(40)
@given(known_points(DECLARATIONS, CURVATURES[:4]), st.sampled_from([-6, -3, 3, 6]), SEEDS)
def test_units_of_objective_and_rows_change_no_decision_and_no_gradient(
    known: Known, power: int, seed: int
) -> None:
    references, cotangents = references_of(known), cotangents_for(known, seed, primal_only=True)
    cotangents["objective"] = torch.zeros_like(cotangents["objective"])
    scaled = rescaled(known, power, seed)
    found = sensitivity_at(scaled)
    assert_certificate(found.certificate, scaled, references)
    gradient = found.vjp(cotangents)
    for name in known.rescaled:  # d/dr of a row that r alone multiplies, in units of r
        gradient[name] = gradient[name] * scaled.parameters[name] / known.parameters[name]
    assert_vjp(gradient, known, cotangents, references)


def rescaled(known: Known, power: int, seed: int) -> Known:
    """The objective or single rows times 10^power, with the multipliers that go with it."""
    rng = np.random.default_rng(seed)
    parameters, shares = dict(known.parameters), []
    objective = bool(rng.random() < 0.5) or len(known.rescaled) == 1
    factor = 10.0**power if objective else 1.0
    parameters["a"] = parameters["a"] * factor
    for name, block in known.declaration.blocks.items():
        row = torch.from_numpy(10.0 ** (power * rng.integers(0, 2, block.size) * (not objective)))
        parameters[f"r_{name}"] = parameters[f"r_{name}"] * row
        shares.append(row)
    rows = torch.cat([torch.ones(0, dtype=D), *shares])
    moved = {"y": known.y * factor / rows, "lower": known.lower * factor, "upper": known.upper * factor}
    return replace(known, parameters=parameters, **moved)


@examples(30)
@given(
    known_points(DECLARATIONS, CURVATURES[:4], weak=True, samples=4), st.randoms(use_true_random=False), SEEDS
)
def test_a_sample_is_the_same_alone_and_in_any_batch(known: Known, random: Any, seed: int) -> None:
    bound = 1e-12 * max(1.0, *(one.condition / 1e3 for one in references_of(known)))
    order = list(range(known.samples))
    random.shuffle(order)
    cotangents = cotangents_for(known, seed)
    shapes = known.declaration.parameters
    own = {
        k: v.expand(known.samples, *shapes[k]) for k, v in known.parameters.items()
    }  # no sums over samples
    known = replace(known, parameters=own)
    whole = sensitivity_at(known).vjp(cotangents)
    permuted = sensitivity_at(known.take(order)).vjp({k: v[order] for k, v in cotangents.items()})
    for i in range(known.samples):
        one = {key: value[i] for key, value in known.primal.items()}
        found = ddn.sensitivity(known.declaration.problem, known.one(i), one)
        alone = found.vjp({key: value[i] for key, value in cotangents.items()})
        least = 1e-3 * max(gradient[i].abs().max().item() for gradient in whole.values())
        for name, gradient in whole.items():
            for other in (alone[name], permuted[name][order.index(i)]):
                error = (other - gradient[i]).abs().max().item()
                assert error <= bound * max(gradient[i].abs().max().item(), least), name


# -- through solve ----------------------------------------------------------------------------------------


def solvers_for(declaration: Declaration) -> list[str]:
    if declaration.term == "linear":
        return ["auto", "casadi:ipopt", "scipy:highs", "cvxpy:CLARABEL"]
    return [
        "auto",
        "casadi:ipopt",
        "scipy:SLSQP",
        *(["casadi:daqp", "cvxpy:CLARABEL"] if declaration.quadratic else []),
        "newton",
    ]


@examples(50)
@given(known_points(UNIQUE, CONVEX), st.data(), SEEDS)
def test_every_solver_finds_the_point_and_attach_and_solve_agree(known: Known, data: Any, seed: int) -> None:
    references, cotangents = references_of(known), cotangents_for(known, seed)
    solver = data.draw(st.sampled_from(solvers_for(known.declaration)))
    parameters = leaves(known)
    solution = ddn.solve(known.declaration.problem, parameters, solver=solver)
    assert_certificate(solution.certificate, known, references)
    bound, expected = 100 * tolerance(references), known.outputs
    for key, value in outputs_of(solution).items():
        size = 1 + expected[key].abs().max().item() if expected[key].numel() else 1.0
        torch.testing.assert_close(value.detach(), expected[key], rtol=0, atol=bound * size)
    assert_vjp(gradients(solution, parameters, cotangents), known, cotangents, references)
    attached = ddn.attach(known.declaration.problem, parameters, known.primal)
    assert_vjp(gradients(attached, parameters, cotangents), known, cotangents, references)


@examples(12)  # each takes three seconds
@given(known_points(DECLARATIONS, ["indefinite", "saddle"]), SEEDS)
def test_what_solve_calls_optimal_is_a_minimum_with_its_own_gradient(known: Known, seed: int) -> None:
    """From close by, a nonconvex problem may lead elsewhere: the reference is taken where it leads."""
    noise = torch.randn(known.z.shape, dtype=D, generator=torch.Generator().manual_seed(seed))
    start = known.by_variable(known.z + 1e-3 * noise)
    parameters = leaves(known)
    policy = ddn.Policy(on_failure="mask")
    solution = ddn.solve(known.declaration.problem, parameters, initial=start, policy=policy)
    ok, clear = solution.certificate.ok, solution.certificate.condition < 1e6  # see ``assert_curvature``
    assert not (solution.converged & clear & ~solution.certificate.sosc).any()
    assume(ok.all())
    there = at(known, solution)
    assert kkt_residual(there) <= 1e-6
    references, cotangents = references_of(there), cotangents_for(known, seed)
    assert_vjp(
        gradients(solution, parameters, cotangents), there, cotangents, references, 10 * tolerance(references)
    )


def at(known: Known, solution: ddn.Solution) -> Known:
    """The same parameters with the point, multipliers and active set of a solution."""
    outputs = {k: v.detach() for k, v in outputs_of(solution).items()}
    n, declaration = known.declaration.n, known.declaration
    m = declaration.equalities + declaration.inequalities
    flat = torch.cat([outputs[key].reshape(known.samples, -1).to(D) for key in known.outputs], dim=1)
    z, y, lower, upper, _ = flat.split([n, m, n, n, 1], dim=1)
    certificate = solution.certificate
    active = {k: certificate.active[k] | certificate.weakly_active[k] for k in certificate.active}

    def stacked(names: list[str]) -> torch.Tensor:
        return torch.cat(
            [
                torch.zeros(known.samples, 0, dtype=torch.bool),
                *(active[k].reshape(known.samples, -1) for k in names),
            ],
            dim=1,
        )

    def sides(side: str) -> torch.Tensor:
        pieces = [
            active[f"{name}.{side}"].reshape(known.samples, -1)
            if f"{name}.{side}" in active
            else torch.zeros(known.samples, int(np.prod(shape)), dtype=torch.bool)
            for name, shape in declaration.variables
        ]
        return torch.cat(pieces, dim=1)

    inequality = stacked([key.split(".")[1] for key in known.outputs if key.startswith("inequality.")])
    low, high = sides("lower"), sides("upper")
    codes = torch.cat([inequality, low | high], dim=1).to(known.sides.dtype) * STRONG
    return replace(known, z=z, y=y, lower=lower, upper=upper, at_lower=low, sides=codes)


def kkt_residual(known: Known) -> float:
    """Largest unscaled residual of the KKT conditions, from the declaration's own functions."""
    return max(
        _residual(known.declaration, known.one(i), *row)
        for i, row in enumerate(zip(known.z, known.y, known.lower, known.upper, strict=True))
    )


def _residual(
    declaration: Declaration,
    p: Any,
    z: torch.Tensor,
    y: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
) -> float:
    forces = torch.func.grad(lambda z: declaration.objective(z, p) + y @ declaration.constraints(z, p))(z)
    c, (low, high) = declaration.constraints(z, p), declaration.bounds_of(p)
    h, g, dual = *c.split([declaration.equalities, declaration.inequalities]), y[declaration.equalities :]
    negative = torch.cat([g, low - z, z - high, -dual, lower.neg(), upper.neg()])
    parts = torch.cat([forces - lower + upper, h, negative.clamp(min=0), dual * g])
    return float(parts.abs().max())


@examples(20)
@given(known_points(UNIQUE, CONVEX), SEEDS)
def test_central_differences_of_a_tight_solve_agree(known: Known, seed: int) -> None:
    references, generator = references_of(known), torch.Generator().manual_seed(seed)
    assume(all(one.condition < 1e4 for one in references))
    tangents = {k: torch.randn(v.shape, dtype=D, generator=generator) for k, v in known.parameters.items()}
    expected = sensitivity_at(known).jvp(tangents)
    step = 1e-5 / max(1.0, *(v.abs().max().item() for v in expected.values()))
    ahead, behind = (
        ddn.solve(
            known.declaration.problem, {k: v + sign * step * tangents[k] for k, v in known.parameters.items()}
        )
        for sign in (1, -1)
    )
    for name, tangent in expected.items():
        difference = (ahead[name] - behind[name]) / (2 * step)
        size = max(1.0, *(v.abs().max().item() for v in expected.values()))
        torch.testing.assert_close(difference, tangent, rtol=0, atol=1e-5 * size)


@examples(25)
@given(known_points(UNIQUE, CONVEX), SEEDS)
def test_float32_parameters_give_the_gradients_of_their_values(known: Known, seed: int) -> None:
    assume(all(one.condition < 1e3 for one in references_of(known)))
    narrow = {name: value.float().requires_grad_() for name, value in known.parameters.items()}
    wide = replace(known, parameters={name: value.detach().to(D) for name, value in narrow.items()})
    solution = ddn.solve(known.declaration.problem, narrow)
    assert all(value.dtype == torch.float32 for value in outputs_of(solution).values())
    exact = ddn.solve(known.declaration.problem, wide.parameters)
    assume(exact.certificate.ok.all())
    there = at(wide, exact)
    references, cotangents = references_of(there), cotangents_for(known, seed)
    assert_vjp(gradients(solution, narrow, cotangents), there, cotangents, references, 1e-4)


@examples(15)
@given(known_points(UNIQUE, CONVEX), st.sampled_from([-6, 6]), SEEDS)
def test_solve_does_not_depend_on_the_unit_of_the_objective(known: Known, power: int, seed: int) -> None:
    references, cotangents = references_of(known), cotangents_for(known, seed, primal_only=True)
    cotangents["objective"] = torch.zeros_like(cotangents["objective"])
    parameters = leaves(
        replace(known, parameters=known.parameters | {"a": known.parameters["a"] * 10.0**power})
    )
    solution = ddn.solve(known.declaration.problem, parameters)
    assert_certificate(solution.certificate, known, references)
    gradient = gradients(solution, parameters, cotangents)
    gradient["a"] = gradient["a"] * 10.0**power
    assert_vjp(gradient, known, cotangents, references)


# -- what the long run found ------------------------------------------------------------------------------


def test_a_flat_coordinate_is_singular_although_its_zero_is_rounding() -> None:
    """Equation 36 of the paper along an axis: H = diag(0, h, h, h), where that 0 is 1e-17 for some x."""
    problem = ddn.Problem({"u": (4,)}, {"x": (4,)}, lambda u, x: -(x @ u) / u.norm())
    rng = np.random.default_rng(0)
    for alpha, size in zip(rng.uniform(0.1, 3, 30), rng.uniform(0.1, 1, 30), strict=True):
        x = torch.tensor([size, 0, 0, 0], dtype=D)
        found = ddn.sensitivity(problem, {"x": x}, alpha * x)
        assert found.certificate.singular
        with pytest.warns(ddn.DegeneracyWarning):
            jacobian = found.jacobian()
        torch.testing.assert_close(
            jacobian, alpha * torch.tensor([0.0, 1, 1, 1], dtype=D).diag(), rtol=0, atol=1e-9
        )


def test_a_point_whose_forces_cancel_to_rounding_is_stationary() -> None:
    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * u[1].square() + (0.1 * u[0] * x + 0.2 * u[0] * x - 0.3 * u[0] * x)  # 3e-17 u[0] x

    problem = ddn.Problem({"u": (2,)}, {"x": ()}, objective)
    found = ddn.sensitivity(problem, {"x": torch.ones((), dtype=D)}, torch.zeros(2, dtype=D))
    assert found.certificate.stationarity < 1e-15


def test_a_gradient_that_nearly_cancels_at_dependent_rows_keeps_its_digits() -> None:
    """Of d/da = sum over 8000 that cancels to 7, formed pseudo-inverses left 2e-7; one refinement leaves 1e-11."""
    shadowed = Declaration((("u", (6,)),), "none", (Block("linear", (), 0.0),), (), ("lower",), True)
    sides = [[0] * 12, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]]
    known = build(shadowed, 142769, sides, "semidefinite", shared=False)
    references, cotangents = [reference(known, i) for i in (0, 1)], cotangents_for(known, 2, primal_only=True)
    with pytest.warns(ddn.DegeneracyWarning):
        gradient = sensitivity_at(known).vjp(cotangents)
    assert_vjp(gradient, known, cotangents, references, 1e-9)


def test_a_row_without_forces_is_not_held_to_less_than_rounding() -> None:
    """In u[1] of sample 1 nothing meets: its 1e-14 is the rounding of terms that cancel inside of the function."""
    inequality = (Block("exponential", (1,), 0.0),)
    flat = Declaration((("u", (3,)),), "quartic", (), inequality, ("free",), False)
    known = build(flat, 0, [[1, 0, 0, 0], [0, 0, 0, 0]], "flat", shared=True)
    found = ddn.sensitivity(known.declaration.problem, known.parameters, known.primal)
    assert found.certificate.singular.all()
