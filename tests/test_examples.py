"""Every example runs on every backend that can take it, and what it prints is true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_cases import EXAMPLES, cases, example

import ddn_solvers as ddn

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)


def test_every_example_is_tested() -> None:
    tested = {"quickstart", "nonlinear", "backends", "ridge_penalties", "demo"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested | {"style"}  # which all pictures share


@pytest.mark.parametrize("solver", cases(example("quickstart").problem))
def test_quickstart(solver: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = example("quickstart").main(solver)
    # In closed form: with the mean m of x, u = r (x - m) / |x - m| where that is longer than r.
    x = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    centred = x - x.mean()
    torch.testing.assert_close(result.point, centred / centred.norm(), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.ball, (centred.norm() - 1) / 2, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.plane, x.mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.gradient_r, result.point[0], rtol=0, atol=1e-10)
    unit = centred / centred.norm()
    tangent = torch.eye(3, dtype=torch.float64) - 1 / 3 - torch.outer(unit, unit)
    torch.testing.assert_close(result.gradient_x, tangent[0] / centred.norm(), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.batch[1], 0.5 * centred, rtol=0, atol=1e-10)
    assert result.ok
    assert "unique two-sided derivative" in capsys.readouterr().out


@pytest.fixture(scope="module")
def nonlinear_point() -> torch.Tensor:
    point: torch.Tensor = example("nonlinear").main("scipy:SLSQP").point
    return point


@pytest.mark.parametrize("solver", cases(example("nonlinear").problem, convex=False))
def test_nonlinear(solver: str, nonlinear_point: torch.Tensor) -> None:
    result = example("nonlinear").main(solver)
    assert result.ok
    assert result.multiplier > 0.1  # the inequality is active
    assert result.error < 1e-6
    torch.testing.assert_close(result.point, nonlinear_point, rtol=0, atol=1e-7)


def test_nonlinear_is_refused_by_cvxpy() -> None:
    with pytest.raises(ddn.BackendCannotSolve, match="CVXPY"):
        example("nonlinear").main("cvxpy:CLARABEL")


@pytest.fixture(scope="module")
def backend_rows() -> dict[str, Any]:
    return {
        row.solver: row for row in example("backends").main(cases(example("backends").problem), repeats=1)
    }


@pytest.mark.parametrize("solver", cases(example("backends").problem))
def test_backends(solver: str, backend_rows: dict[str, Any]) -> None:
    row, first = backend_rows[solver], backend_rows["scipy:SLSQP"]
    assert row.ok
    assert row.residual < 1e-9
    assert row.difference_error < 1e-6
    torch.testing.assert_close(row.point, first.point, rtol=0, atol=1e-7)
    torch.testing.assert_close(row.gradient, first.gradient, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def ridge_penalties() -> np.ndarray:
    (result,) = example("ridge_penalties").main("scipy:SLSQP", quick=True)
    penalties: np.ndarray = result.penalties
    return penalties


@pytest.mark.parametrize("solver", cases(ddn.quadratic_program(10, bounds=(0.0, None))))
def test_ridge_penalties(solver: str, ridge_penalties: np.ndarray) -> None:
    (result,) = example("ridge_penalties").main(solver, quick=True)
    assert (result.validation[-1] < result.validation[0]).all()  # the gradient is one of descent
    # Before the first step the layer is scikit-learn's ridge: the signs are its own.
    np.testing.assert_allclose(result.test[0], result.ridge, rtol=1e-9)
    assert (result.coefficients >= 0).all()
    np.testing.assert_allclose(result.penalties, ridge_penalties, rtol=1e-7)


def test_demo_draws_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = example("demo").main(quick=True, path=tmp_path / "artifacts" / "demo.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
