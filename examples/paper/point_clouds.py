"""Point clouds under outliers: PointNet with robust pooling in place of max pooling (Gould et al. 2019, Tables 3, 4).

    feature_c = argmin_u  sum_i phi(u - f_c(p_i); alpha),    c = 1 ... channels, p_i the points of one cloud

Every model is PointNet without input transforms; only the pool differs: max [Qi et al. 2017], quadratic (Q),
pseudo-Huber (PH), Huber (H), Welsch (W), truncated quadratic (TQ), alpha = 1. Outliers are uniform in the unit ball and
replace points. ``--table 4`` trains clean and tests with outliers, ``--table 3`` trains and tests at the same rate.

    python examples/paper/point_clouds.py DATA [--table 3] [--seeds 0 1 2] [--out artifacts/paper] [--quick]

DATA is an .npz of X (clouds, points, 3), Y (clouds,) and test (clouds,) bool, or the folder of ModelNet40's HDF5 files
(``modelnet40_ply_hdf5_2048``; needs h5py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import nn

POOLS = {"max": None, "Q": "quadratic", "PH": "pseudo-huber", "H": "huber", "W": "welsch", "TQ": "truncated"}
RATES = {3: (0.0, 0.1, 0.2, 0.5, 0.9), 4: (0.0, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}


@dataclass(frozen=True)
class Data:
    """Clouds (N, points, 3) in the unit ball with their classes, for training and testing."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int


def load(path: Path, points: int) -> Data:
    """Read a file or folder of clouds; each keeps its first ``points`` points, which are in random order."""
    if path.is_dir():
        arrays = [_modelnet(path, part) for part in ("train", "test")]
    else:
        file = np.load(path)
        test, classes = file["test"], np.unique(file["Y"], return_inverse=True)[1]
        arrays = [(file["X"][~test], classes[~test]), (file["X"][test], classes[test])]
    (train, test) = (
        (torch.from_numpy(x[:, :points].astype(np.float32)), torch.from_numpy(y.astype(np.int64)))
        for x, y in arrays
    )
    return Data(train, test, int(max(train[1].max(), test[1].max())) + 1)


def _modelnet(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        import h5py
    except ImportError:
        raise SystemExit("ModelNet40's files need h5py: pip install h5py") from None
    files = sorted(folder.glob(f"ply_data_{part}*.h5"))
    if not files:
        raise SystemExit(f"{folder} has no ply_data_{part}*.h5: give the folder modelnet40_ply_hdf5_2048")
    parts = [(np.array(f["data"]), np.array(f["label"]).reshape(-1)) for f in map(h5py.File, files)]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def with_outliers(clouds: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Replace a share of the points of each cloud by points that are uniform in the unit ball."""
    count = round(rate * clouds.shape[1])
    if count == 0:
        return clouds
    direction = torch.randn((len(clouds), count, 3), generator=generator)
    radius = torch.rand((len(clouds), count, 1), generator=generator) ** (1 / 3)
    replaced = torch.rand(clouds.shape[:2], generator=generator).argsort(1)[:, :count, None].expand(-1, -1, 3)
    return clouds.scatter(1, replaced, radius * direction / direction.norm(dim=2, keepdim=True))


class MaxPool(nn.Module):
    """The pool of the original network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(-1)


class PointNet(nn.Module):
    """A perceptron on each point, one pool over the points, a perceptron on what it returns."""

    def __init__(self, pool: nn.Module, classes: int, width: float = 1.0) -> None:
        super().__init__()
        sizes = [3, *(round(width * size) for size in (64, 64, 64, 128, 1024))]
        head = [sizes[-1], *(round(width * size) for size in (512, 256))]
        self.points = nn.Sequential(
            *(layer for pair in pairwise(sizes) for layer in _block(nn.Conv1d(*pair, 1)))
        )
        self.pool = pool
        self.head = nn.Sequential(
            *(layer for pair in pairwise(head) for layer in _block(nn.Linear(*pair))),
            nn.Dropout(0.3),
            nn.Linear(head[-1], classes),
        )

    def forward(self, clouds: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.points(clouds.transpose(1, 2))))


def _block(linear: nn.Module) -> list[nn.Module]:
    return [linear, nn.BatchNorm1d(linear.weight.shape[0]), nn.ReLU()]


@dataclass(frozen=True)
class Training:
    """The paper's protocol: SGD, momentum 0.9, rate 0.01 halved after each third of the epochs, batches of 24."""

    epochs: int = 60
    rate: float = 0.01
    batch: int = 24


def train(
    model: nn.Module,
    data: Data,
    outliers: float,
    training: Training,
    seed: int,
    advance: Callable[[], Any] = lambda: None,
) -> None:
    """Train with fresh outliers at every step."""
    generator = torch.Generator().manual_seed(seed)
    clouds, classes = data.train
    optimizer = torch.optim.SGD(model.parameters(), training.rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, training.epochs // 3), 0.5)
    model.train()
    for _ in range(training.epochs):
        order = torch.randperm(len(clouds), generator=generator)
        for batch in order[: len(order) // training.batch * training.batch].split(training.batch):
            optimizer.zero_grad()
            output = model(with_outliers(clouds[batch], outliers, generator))
            nn.functional.cross_entropy(output, classes[batch]).backward()
            optimizer.step()
        schedule.step()
        advance()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, outliers: float, seed: int = 0) -> tuple[float, float]:
    """Top-1 accuracy and mean average precision over classes, both in per cent."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    clouds, classes = data.test
    clouds = with_outliers(clouds, outliers, generator)
    scores = torch.cat([model(part) for part in clouds.split(64)]).softmax(1)
    present = classes.unique()
    hot = nn.functional.one_hot(classes, data.classes)
    precision = average_precision_score(hot[:, present].numpy(), scores[:, present].numpy(), average="macro")
    return 100 * float((scores.argmax(1) == classes).double().mean()), 100 * float(precision)
