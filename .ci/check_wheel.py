"""Run in a clean environment where only the wheel is installed: import it and solve with every backend."""

import sys
from importlib.resources import files
from pathlib import Path

import torch

import ddn_solvers as ddn

BUILT_IN = {"casadi", "cvxpy", "scipy", "clarabel", "daqp", "highs", "newton"}
EXTRA = {"daqp"}  # whose packages the wheel does not ask for
LINEAR = {"highs"}  # that take linear programs alone


def main() -> None:
    prefix = Path(sys.prefix).resolve()
    for package in ("ddn_solvers", "ddn_adapters"):
        folder = Path(str(files(package))).resolve()
        assert folder.is_relative_to(prefix), f"{package} comes from {folder}, not from the wheel"
        assert (folder / "py.typed").is_file(), f"{package} ships no py.typed"
    assert set(ddn.backends()) == BUILT_IN, ddn.backends()

    nearest = ddn.Problem(
        variables={"u": (2,)},
        parameters={"x": (2,)},
        objective=lambda u, x: 0.5 * (u - x).square().sum(),
        equality=lambda u: u.sum() - 1,
    )
    cheapest = ddn.Problem(
        variables={"u": (2,)},
        parameters={"x": (2,)},
        objective=lambda u, x: u @ x,
        equality=lambda u: u.sum() - 1,
        bounds={"u": (0.0, None)},
    )
    for backend in sorted(BUILT_IN - EXTRA):
        problem, point, slope = (
            (cheapest, [0.0, 1.0], [0.0, 0.0])
            if backend in LINEAR
            else (nearest, [0.75, 0.25], [0.5, -0.5])  # x moved along (1, 1) onto the line
        )
        x = torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)
        y = ddn.solve(problem, {"x": x}, solver=backend)["u"]
        (gradient,) = torch.autograd.grad(y[0], x)
        for found, expected in ((y.detach(), point), (gradient, slope)):
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    print(f"wheel: {', '.join(sorted(BUILT_IN - EXTRA))} solve from {prefix.name}")


main()
