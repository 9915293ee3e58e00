"""The paper's figures draw, and the numbers behind them are right."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from example_cases import example

pytest.importorskip("matplotlib")

D = torch.float64


@pytest.fixture(scope="module")
def figures() -> Any:
    return example("paper/figures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures") / "new"


def drawn(figures: Any, name: str, folder: Path) -> Any:
    found = figures.draw(name, folder)
    picture = (folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 10_000 < len(picture) < 150_000
    return found


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_the_docs_have_every_figure(figures: Any) -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "tutorials.md").read_text(encoding="utf-8")
    for name in figures.FIGURES:
        assert f"figures/{name}.png" in page
        assert (docs / "figures" / f"{name}.png").stat().st_size < 150_000


# dy/dx_i is proportional to these, z = y - x_i and alpha = 1 (section 5.1 of the paper).
WEIGHTS = {
    "quadratic": torch.ones_like,
    "pseudo-huber": lambda z: (1 + z**2) ** -1.5,
    "huber": lambda z: (z.abs() <= 1).to(D),
    "welsch": lambda z: (1 - z**2) * torch.exp(-(z**2) / 2),
    "truncated": lambda z: (z.abs() <= 1).to(D),
}


def test_penalties(figures: Any, folder: Path) -> None:
    pools = drawn(figures, "table1_penalties", folder)
    OUTLIERS = sys.modules["pooling_figure"].OUTLIERS
    assert set(pools) == set(WEIGHTS)
    for penalty, found in pools.items():
        two, ten = found
        for pool in found:
            assert (pool.heights.min() <= pool.objective + 1e-12).all()
            best = pool.minima[pool.heights < pool.heights.min() + 1e-9]
            assert best.min() - 1e-8 <= pool.minimum <= best.max() + 1e-8
        weights = WEIGHTS[penalty](ten.minimum - ten.x)
        close(ten.slopes, weights / weights.sum())
        close(two.slopes.sum(), torch.ones((), dtype=D))
    close(pools["quadratic"][1].minimum, pools["quadratic"][1].x.mean())
    close(pools["huber"][0].minima, torch.tensor([-1.0, 1.0], dtype=D))  # the ends of the interval
    close(pools["truncated"][0].minima, torch.tensor([-2.0, 2.0], dtype=D))
    assert len(pools["welsch"][1].minima) == 2
    means = [OUTLIERS[:7].mean(), OUTLIERS[:8].mean(), OUTLIERS[1:8].mean(), OUTLIERS[8:].mean()]
    close(
        pools["truncated"][1].minima, torch.stack(means)
    )  # of every set of points that a window can hold alone
    assert abs(pools["truncated"][1].minimum - pools["truncated"][1].x[1:8].mean()) < 1e-9  # without outliers


@pytest.fixture(scope="module")
def projections(figures: Any, folder: Path) -> Any:
    return drawn(figures, "table2_projections", folder)


@pytest.mark.parametrize("name", ["L2", "L1", "Linf"])
def test_projections(projections: Any, name: str) -> None:
    found = projections[name]
    close(torch.linalg.vector_norm(found.y, found.p, dim=-1), torch.ones(len(found.y), dtype=D))
    angles = torch.linspace(0, 2 * math.pi, 3601, dtype=D)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    sphere = directions / torch.linalg.vector_norm(directions, found.p, dim=-1, keepdim=True)
    distance = (found.x - found.y).norm(dim=-1)
    assert (distance <= torch.cdist(found.x, sphere).amin(-1) + 1e-9).all()

    y, loss, eye = found.y, found.y - found.target, torch.eye(2, dtype=D)
    if name == "L2":
        tangent = eye - y[:, :, None] * y[:, None, :]
        manifold = clarke = tangent / found.x.norm(dim=-1)[:, None, None]
    else:
        largest = y.abs() > y.abs().amax(-1, keepdim=True) - 1e-9
        a = torch.where(y.abs() < 1e-9, 0, y.sign()) if name == "L1" else y.sign() * largest
        along = a[:, :, None] * a[:, None, :] / a.square().sum(-1)[:, None, None]
        clarke = eye - along
        manifold = torch.diag_embed(a.abs()) - along if name == "L1" else eye - torch.diag_embed(a.abs())
        assert ((clarke - manifold).abs() > 0.1).any()
    close(found.manifold, torch.einsum("ki,kij->kj", loss, manifold))
    close(found.clarke, torch.einsum("ki,kij->kj", loss, clarke))


def test_scenarios(figures: Any, folder: Path) -> None:
    found = drawn(figures, "figure3_scenarios", folder)
    module = sys.modules["scenario_figure"]
    inside, active, between = found.values()
    Q, d, step = module.Q, module.PATH, 1e-5
    for scenario in found.values():
        close(Q @ (scenario.y - scenario.x) + scenario.multiplier * scenario.y, torch.zeros(2, dtype=D))
        assert scenario.multiplier >= 0
    assert (inside.y.norm() < 1, inside.multiplier) == (True, 0)
    close(inside.y, inside.x)
    close(inside.derivatives["active"], d)
    assert active.multiplier > 0.1
    close(active.y.norm(), torch.ones((), dtype=D))
    s = module.SCENARIOS["active, λ > 0"]
    below, above = module.scenarios([s - step, s + step])
    close(
        active.derivatives["active"],
        (above.y - below.y) / (2 * step),
        1e-7,
    )
    assert [scenario.one_sided for scenario in found.values()] == [False, False, True]
    close(between.y, between.x)
    normal = torch.linalg.solve(Q, between.y)
    kept = d - normal * (between.y @ d) / (between.y @ normal)  # proposition 4.5 with A = y^T, H = Q, B = -Q
    close(between.derivatives["inactive"], d)
    close(between.derivatives["active"], kept)
    close(between.derivatives["mean"], (d + kept) / 2)


def test_geometry(figures: Any, folder: Path) -> None:
    found = drawn(figures, "figure4_geometry", folder)
    module = sys.modules["geometry_figure"]
    close(found.root @ found.derivative, found.b - found.along + found.shift)
    close(found.root @ found.root, module.CURVED + found.multiplier * torch.eye(2, dtype=D))
    step = 1e-5
    differences = (module.geometry(step).y - module.geometry(-step).y) / (2 * step)
    close(found.derivative, differences, 1e-8)
    close(
        found.y @ found.derivative, torch.tensor(module.GROWTH, dtype=D)
    )  # y stays on the circle as it grows
    assert found.multiplier > 0
    assert abs(found.a @ (found.b - found.along)) < 1e-12
