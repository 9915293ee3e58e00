"""The certificate: its numbers against dense algebra, and a report from which one understands a gradient."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch

import ddn_solvers as ddn

D = torch.float64


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def certified(problem: ddn.Problem, p: dict[str, torch.Tensor], point: torch.Tensor, **policy: Any) -> Any:
    return ddn.sensitivity(problem, p, point, policy=ddn.Policy(**policy) if policy else None).certificate


def half_squares(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (u - x).square().sum()


REGULAR = ddn.Problem(
    {"u": (3,)},
    {"x": (3,)},
    half_squares,
    equality={"plane": lambda u: u.sum() - 1},
    inequality={"ball": lambda u: u.square().sum() - 9},
    bounds={"u": (0.0, None)},
)
REPEATED = ddn.Problem(
    {"u": (3,)},
    {"x": (3,)},
    half_squares,
    equality={
        "plane": lambda u: u.sum() - 1,
        "apart": lambda u: u[0] - u[1],
        "again": lambda u: 2 * u.sum() - 2,
    },
)
FLAT = ddn.Problem(
    {"u": (3,)}, {"x": ()}, lambda u, x: 0.5 * (u[0] + u[1] - x).square(), equality={"third": lambda u: u[2]}
)
WEAK = ddn.Problem(
    {"u": (3,)}, {"x": (3,)}, half_squares, inequality={"half": lambda u: u.sum()}, bounds={"u": (-1.0, None)}
)
SADDLE = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: (u[0] - x[0]) ** 2 - (u[1] - x[1]) ** 2)

# problem, x, point, what must hold
CASES: dict[str, tuple[ddn.Problem, torch.Tensor, torch.Tensor, dict[str, Any]]] = {
    "regular": (
        REGULAR, vector(0.7, 0.5, -1.0), vector(0.6, 0.4, 0.0),
        {"ok": True, "licq": True, "sosc": True, "singular": False, "one_sided": False, "rank_deficiency": 0},
    ),
    "repeated": (
        REPEATED, vector(1.0, 1.0, 0.0), vector(2 / 3, 2 / 3, -1 / 3),
        {"ok": False, "licq": False, "sosc": True, "singular": True, "one_sided": False, "rank_deficiency": 1},
    ),
    "flat": (
        FLAT, torch.tensor(1.0, dtype=D), vector(0.5, 0.5, 0.0),
        {"ok": False, "licq": True, "sosc": False, "singular": True, "one_sided": False, "rank_deficiency": 0},
    ),
    "weak": (
        WEAK, vector(1.0, -0.4, -0.6), vector(1.0, -0.4, -0.6),
        {"ok": False, "licq": True, "sosc": True, "singular": False, "one_sided": True, "rank_deficiency": 0},
    ),
    "saddle": (
        SADDLE, vector(1.0, 2.0), vector(1.0, 2.0),
        {"licq": True, "sosc": False, "singular": False, "one_sided": False, "rank_deficiency": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_holds_at_a_point(name: str) -> None:
    problem, x, point, expected = CASES[name]
    certificate = certified(problem, {"x": x}, point)
    assert {field: getattr(certificate, field).item() for field in expected} == expected
    assert certificate.strictly_complementary.item() == (not expected["one_sided"])
    for residual in (certificate.stationarity, certificate.feasibility, certificate.complementarity):
        assert residual < 1e-12
    assert certificate.distance < 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_objectives_unit_changes_no_verdict(name: str, scale: float) -> None:
    problem, x, point, expected = CASES[name]
    objective = problem.objective
    names = tuple(problem.variables), tuple(problem.parameters)
    assert names == (("u",), ("x",))
    rescaled = dataclasses.replace(problem, objective=lambda u, x: scale * objective(u, x))
    certificate = certified(rescaled, {"x": x}, point)
    assert {field: getattr(certificate, field).item() for field in expected} == expected


@pytest.mark.parametrize("name", CASES)
def test_the_report_is_about_ten_lines_of_readable_length(name: str) -> None:
    problem, x, point, _ = CASES[name]
    lines = str(certified(problem, {"x": x}, point)).splitlines()
    assert 5 <= len(lines) <= 12
    assert max(map(len, lines)) <= 130


def test_a_regular_point_is_said_to_be_exact() -> None:
    report = str(certified(REGULAR, {"x": vector(0.7, 0.5, -1.0)}, vector(0.6, 0.4, 0.0)))
    assert "unique two-sided derivative" in report
    assert "NOT" not in report
    assert "exact" in report
    assert "plane" in report
    assert "u.lower[2]" in report
    assert "ball" not in report


def test_dependent_rows_are_named_and_others_are_not() -> None:
    certificate = certified(REPEATED, {"x": vector(1.0, 1.0, 0.0)}, vector(2 / 3, 2 / 3, -1 / 3))
    assert {name for name, mask in certificate.dependent.items() if mask.any()} == {"plane", "again"}
    licq = next(line for line in str(certificate).splitlines() if "LICQ" in line)
    assert "plane" in licq
    assert "again" in licq
    assert "apart" not in licq
    assert "minimum norm" in str(certificate)


def test_a_bound_that_depends_on_a_row_is_named() -> None:
    problem = ddn.Problem(
        {"u": (2,)}, {"x": (2,)}, half_squares, equality={"first": lambda u: u[0]}, bounds={"u": (0.0, None)}
    )
    certificate = certified(problem, {"x": vector(-1.0, 2.0)}, vector(0.0, 2.0))
    assert certificate.dependent["first"].item()
    assert certificate.dependent["u.lower"].tolist() == [True, False]
    assert "u.lower[0]" in str(certificate)


@pytest.mark.parametrize("delta", [None, 1e-4])
def test_flat_directions_are_counted_and_what_was_done_is_said(delta: float | None) -> None:
    policy = {} if delta is None else {"on_singular": "proximal", "proximal": delta}
    certificate = certified(FLAT, {"x": torch.tensor(1.0, dtype=D)}, vector(0.5, 0.5, 0.0), **policy)
    (basis,) = certificate.null_space
    assert basis.shape == (3, 1)
    torch.testing.assert_close(basis[:, 0].abs(), vector(0.5**0.5, 0.5**0.5, 0.0))
    assert abs(basis[0, 0] + basis[1, 0]) < 1e-12
    report = str(certificate)
    assert "1 flat direction" in report
    assert ("1e-04" if delta else "minimum norm") in report


@pytest.mark.parametrize(
    ("choice", "words"), [("active", "kept"), ("inactive", "dropped"), ("mean", "mean of both")]
)
def test_weakly_active_ones_are_named_and_what_was_done_is_said(choice: str, words: str) -> None:
    x = vector(1.0, -0.4, -0.6)
    certificate = certified(WEAK, {"x": x}, x, weakly_active=choice)
    assert certificate.weakly_active["half"].item()
    assert not certificate.weakly_active["u.lower"].any()
    assert certificate.margin < 1e-12
    report = str(certificate)
    assert "half" in next(line for line in report.splitlines() if "weakly active" in line)
    assert words in report


def test_smoothing_is_said() -> None:
    x = vector(1.0, -0.4, -0.6)
    report = str(certified(WEAK, {"x": x}, x, smoothing=1e-3))
    assert "smoothed" in report
    assert "1e-03" in report


def test_kinks_are_named_by_operation_and_line() -> None:
    lasso = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: 0.5 * (u - x).square().sum() + u.abs().sum())
    certificate = certified(lasso, {"x": vector(0.3, 2.0)}, vector(0.0, 1.0))
    on = {name: mask for name, mask in certificate.active.items() if mask.any()}
    assert len(on) == 1
    assert "abs" in next(iter(on))
    assert certificate.ok
    assert "abs" in str(certificate)


def test_a_sum_of_squares_is_reported_as_dependent() -> None:
    problem = ddn.Problem(
        {"u": (2,)}, {"x": (2,)}, None, equality={"squares": lambda u, x: (u - x).square().sum()}
    )
    certificate = certified(problem, {"x": vector(1.0, -2.0)}, vector(1.0, -2.0))
    assert not certificate.ok
    assert not certificate.licq
    assert certificate.rank_deficiency == 1
    assert "squares" in next(line for line in str(certificate).splitlines() if "LICQ" in line)


def test_a_saddle_is_told_from_a_minimum_though_its_derivative_is_unique() -> None:
    certificate = certified(SADDLE, {"x": vector(1.0, 2.0)}, vector(1.0, 2.0))
    assert not certificate.sosc
    assert "second order      does not hold" in str(certificate)
    assert certificate.null_space[0].shape == (2, 0)


@pytest.mark.parametrize("name", CASES)
def test_the_adjoint_residual_is_rounding(name: str) -> None:
    """Relative, for a right-hand side that the matrix can reach: singular ones too."""
    problem, x, point, _ = CASES[name]
    assert certified(problem, {"x": x}, point).adjoint_residual < 1e-13


def test_an_inexact_linear_solver_shows_in_the_adjoint_residual() -> None:
    """A user's own, wrong in the sixth digit: the certificate tells, whatever the gradient looks like."""

    def sloppy(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
        exact: torch.Tensor = torch.linalg.solve(matrix, rhs)
        return exact * (1 + 1e-6)

    x, point = vector(0.7, 0.5, -1.0), vector(0.6, 0.4, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = certified(REGULAR, {"x": x}, point, linear_solver=sloppy).adjoint_residual
    assert 1e-8 < found < 1e-4


def test_a_large_adjoint_residual_is_not_ok() -> None:
    """Half of the digits are wrong, and with them any gradient; point and multipliers are right."""

    def wrong(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
        exact: torch.Tensor = torch.linalg.solve(matrix, rhs)
        return exact * (1 + 1e-3)

    x, point = vector(0.7, 0.5, -1.0), vector(0.6, 0.4, 0.0)
    for solver, ok in (("dense", True), (wrong, False)):
        certificate = certified(REGULAR, {"x": x}, point, linear_solver=solver)
        assert bool(certificate.ok) is ok
        assert not certificate.singular


@pytest.mark.parametrize("power", [0, 4, 8])
def test_the_condition_is_that_of_the_equilibrated_matrix(power: int) -> None:
    """1/2 u^T diag(1 .. 10^-k) u turned by a rotation, so that no scaling can mend it."""
    n = 8
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=D, generator=torch.Generator().manual_seed(1)))
    matrix = (basis * torch.logspace(0, -power, n, dtype=D)) @ basis.T
    problem = ddn.Problem({"u": (n,)}, {"x": (n,)}, lambda u, x: 0.5 * u @ matrix @ u - x @ u)
    x = torch.ones(n, dtype=D)
    found = certified(problem, {"x": x}, torch.linalg.solve(matrix, x)).condition.item()
    assert 10.0**power / 10 <= found <= 10.0**power * 100


def test_a_batch_has_a_certificate_a_sample_and_a_short_report() -> None:
    """Strong, weak and loose: shapes of the batch, masks (*batch, *shape), one line of a rest."""
    x = torch.stack([vector(1.0, 1.0, 1.0), vector(1.0, -0.4, -0.6), vector(-0.5, -0.5, 0.1)]).repeat(2, 1, 1)
    x = x.reshape(2, 3, 3)
    point = x - torch.relu(x.sum(-1, keepdim=True)) / 3
    certificate = certified(WEAK, {"x": x}, point)
    assert certificate.ok.tolist() == [[True, False, True]] * 2
    assert certificate.active["half"].tolist() == [[True, True, False]] * 2
    assert certificate.weakly_active["half"].tolist() == [[False, True, False]] * 2
    assert certificate.active["u.lower"].shape == (2, 3, 3)
    assert len(certificate.null_space) == 6
    report = str(certificate)
    assert "sample 0" in report
    assert "more sample" in report
    assert len(report.splitlines()) <= 60


def test_solve_and_attach_and_sensitivity_certify_alike() -> None:
    x = vector(0.7, 0.5, -1.0)
    solution = ddn.solve(REGULAR, {"x": x}, solver="casadi:ipopt")
    point = solution["u"].detach()
    certificates = [
        solution.certificate,
        ddn.attach(REGULAR, {"x": x}, point).certificate,
        ddn.sensitivity(REGULAR, {"x": x}, point).certificate,
    ]
    for certificate in certificates:
        assert certificate.ok
        torch.testing.assert_close(certificate.condition, certificates[0].condition, rtol=1e-6, atol=0)
        assert certificate.active["plane"].item()


def test_a_failed_sample_says_why() -> None:
    problem = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: u * x, bounds={"u": (0.0, 1.0)})
    point = torch.tensor([0.5, 0.0], dtype=D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.ConvergenceWarning)
        found = ddn.sensitivity(
            problem, {"x": vector(1.0, 1.0)}, point, policy=ddn.Policy(on_failure="warn")
        ).certificate
    assert found.ok.tolist() == [False, True]
    assert "not a verified solution" in str(found).splitlines()[0]
