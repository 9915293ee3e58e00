"""The experiments of the paper run from the command line, on little data, and show what they should."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from example_cases import example

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)


def written(path: Path) -> list[dict[str, str]]:
    assert path.with_suffix(".png").stat().st_size > 5000
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spheres, discs and rods: 160 clouds each."""
    rng = np.random.default_rng(0)
    clouds = rng.standard_normal((480, 128, 3))
    clouds /= np.linalg.norm(clouds, axis=2, keepdims=True)
    clouds[160:320, :, 2] *= 0.05
    clouds[320:, :, 1:] *= 0.05
    path = tmp_path_factory.mktemp("clouds") / "shapes.npz"
    np.savez(path, X=clouds.astype(np.float16), Y=np.arange(480) // 160, test=np.arange(480) % 4 == 0)
    return path


def test_outliers_replace_points_and_are_uniform_in_the_ball() -> None:
    experiment = example("paper/point_clouds")
    clouds = torch.full((50, 200, 3), 2.0)
    generator = torch.Generator().manual_seed(0)
    changed = experiment.with_outliers(clouds, 0.3, generator)
    outliers = changed[(changed != clouds).any(2)]
    assert torch.equal((changed != clouds).any(2).sum(1), torch.full((50,), 60))
    volumes = outliers.norm(dim=1) ** 3  # uniform on [0, 1]
    assert float(volumes.max()) <= 1
    assert abs(float(volumes.mean()) - 0.5) < 0.02
    assert float(outliers.mean(0).abs().max()) < 0.03
    assert experiment.with_outliers(clouds, 0.0, generator) is clouds


def test_the_files_of_modelnet_are_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    clouds, labels = rng.random((7, 16, 3), dtype=np.float32), np.arange(7, dtype=np.uint8)[:, None]
    for part, name in ((slice(0, 3), "train0"), (slice(3, 5), "train1"), (slice(5, 7), "test0")):
        with h5py.File(tmp_path / f"ply_data_{name}.h5", "w") as file:
            file["data"], file["label"] = clouds[part], labels[part]
    data = example("paper/point_clouds").load(tmp_path)
    assert np.array_equal(data.train[0].numpy(), clouds[:5])
    assert data.train[1].tolist() == [0, 1, 2, 3, 4]
    assert data.test[1].tolist() == [5, 6]
    assert data.classes == 7


def test_outliers_ruin_max_pooling_and_not_truncated_quadratic(shapes: Path, tmp_path: Path) -> None:
    arguments = [
        str(shapes),
        "--quick",
        "--epochs",
        "10",
        "--pools",
        "max",
        "TQ",
        "--batch",
        "10",
        "--out",
        str(tmp_path),
    ]
    rows = example("paper/point_clouds").main(arguments)
    top1 = {(row.pool, row.tested): row.top1 for row in rows}
    assert min(top1["max", 0.0], top1["TQ", 0.0]) > 90
    assert top1["max", 0.5] < 70 < 90 < top1["TQ", 0.2]
    lines = written(tmp_path / "point_clouds_table4.csv")
    assert [float(line["top1"]) for line in lines] == pytest.approx([row.top1 for row in rows], rel=1e-3)


def test_every_pool_trains_with_outliers(shapes: Path, tmp_path: Path) -> None:
    arguments = [
        str(shapes),
        "--quick",
        "--table",
        "3",
        "--epochs",
        "1",
        "--rates",
        "0.2",
        "--out",
        str(tmp_path),
    ]
    rows = example("paper/point_clouds").main(arguments)
    assert [row.pool for row in rows] == ["max", "Q", "PH", "H", "W", "TQ"]
    assert {(row.trained, row.tested) for row in rows} == {(0.2, 0.2)}
    assert len(written(tmp_path / "point_clouds_table3.csv")) == 6


def test_projections_in_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = example("paper/images")
    chosen = ("none", "L1 ball", "Linf sphere")
    monkeypatch.setattr(experiment, "MODELS", {name: experiment.MODELS[name] for name in chosen})
    rows = experiment.main(["--quick", "--epochs", "3", "--out", str(tmp_path)])
    assert tuple(row["model"] for row in rows) == chosen
    assert min(row["top1"] for row in rows) > 80
    assert [row["radius"] > 0 for row in rows] == [False, True, True]
    assert [line["model"] for line in written(tmp_path / "images.csv")] == list(chosen)
