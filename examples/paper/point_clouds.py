"""Point clouds under outliers: PointNet with robust pooling in place of max pooling (Gould et al. 2019, Tables 3, 4).

    feature_c = argmin_u  sum_i phi(u - f_c(p_i); alpha),    c = 1 ... channels, p_i the points of one cloud

Every model is PointNet without input transforms; only the pool differs: max (Qi et al. 2017), quadratic (Q),
pseudo-Huber (PH), Huber (H), Welsch (W), truncated quadratic (TQ), alpha = 1. Outliers are uniform in the unit ball and
replace points. Table 4 trains clean and tests with outliers, table 3 trains and tests at the same rate.

    python examples/paper/point_clouds.py DATA --table 4
    python examples/paper/point_clouds.py DATA --quick
    python examples/paper/point_clouds.py DATA --sgd --points 2048       the paper's protocol

DATA is an .npz of X (clouds, points, 3), Y (clouds,) and test (clouds,) bool, or the folder of ModelNet40's HDF5 files
(modelnet40_ply_hdf5_2048; needs h5py).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.metrics import average_precision_score
from torch import nn

from ddn_solvers.nodes import RobustPool

POOLS = {"max": None, "Q": "quadratic", "PH": "pseudo-huber", "H": "huber", "W": "welsch", "TQ": "truncated"}
RATES = {3: (0.0, 0.1, 0.2, 0.5, 0.9), 4: (0.0, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}


@dataclass(frozen=True)
class Data:
    """All points of clouds (N, points, 3) in the unit ball with their classes, for training and testing."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int


def load(path: Path) -> Data:
    """Read a file or folder of clouds."""
    if path.is_dir():
        arrays = [_modelnet(path, part) for part in ("train", "test")]
    else:
        file = np.load(path)
        test, classes = file["test"], np.unique(file["Y"], return_inverse=True)[1]
        arrays = [(file["X"][~test], classes[~test]), (file["X"][test], classes[test])]
    (train, test) = (
        (torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))) for x, y in arrays
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


def sampled(clouds: torch.Tensor, points: int, generator: torch.Generator) -> torch.Tensor:
    """A random sample of the points of each cloud."""
    chosen = torch.rand(clouds.shape[:2], generator=generator).argsort(1)[:, :points, None]
    return clouds.gather(1, chosen.expand(-1, -1, 3))


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
    """How a model is trained: by Adam, the rate rising and falling once, or by the paper's SGD."""

    epochs: int
    rate: float
    batch: int
    points: int
    adam: bool = True

    def optimizer(
        self, model: nn.Module
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Averaging pools learn slowly: Adam in one cycle is ahead of the paper's SGD where steps are few."""
        if self.adam:
            adam = torch.optim.Adam(model.parameters(), self.rate)
            return adam, torch.optim.lr_scheduler.OneCycleLR(
                adam, self.rate, epochs=self.epochs, steps_per_epoch=1
            )
        sgd = torch.optim.SGD(model.parameters(), self.rate, momentum=0.9)
        return sgd, torch.optim.lr_scheduler.StepLR(sgd, max(1, self.epochs // 3), 0.5)


def train(
    model: nn.Module,
    data: Data,
    outliers: float,
    training: Training,
    seed: int,
    advance: Callable[[], Any] = lambda: None,
) -> None:
    """Train with a fresh sample of the points of each cloud, and fresh outliers, at every step."""
    generator = torch.Generator().manual_seed(seed)
    clouds, classes = data.train
    optimizer, schedule = training.optimizer(model)
    model.train()
    for _ in range(training.epochs):
        order = torch.randperm(len(clouds), generator=generator)
        for batch in order.split(training.batch):
            if len(batch) == 1:
                continue  # batch norm needs two
            optimizer.zero_grad()
            points = sampled(clouds[batch], training.points, generator)
            output = model(with_outliers(points, outliers, generator))
            nn.functional.cross_entropy(output, classes[batch]).backward()
            optimizer.step()
        schedule.step()
        advance()


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, outliers: float, points: int, seed: int = 0
) -> tuple[float, float]:
    """Top-1 accuracy and mean average precision over classes, both in per cent; the same clouds for every model.

    All points of a cloud are used, in groups of as many as the model was trained with, which vote.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    clouds, classes = data.test
    clouds = sampled(with_outliers(clouds, outliers, generator), clouds.shape[1], generator)
    votes = [group for group in clouds.split(points, 1) if group.shape[1] == points]
    scores = sum(torch.cat([model(part) for part in group.split(64)]).softmax(1) for group in votes) / len(
        votes
    )
    present = classes.unique()
    hot = nn.functional.one_hot(classes, data.classes)
    precision = average_precision_score(hot[:, present].numpy(), scores[:, present].numpy(), average="macro")
    return 100 * float((scores.argmax(1) == classes).double().mean()), 100 * float(precision)


class Row(NamedTuple):
    """A line of the results: rates are shares of outliers, scores per cent."""

    table: int
    pool: str
    seed: int
    trained: float
    tested: float
    top1: float
    map: float


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Train what the table asks for, and yield a row for each model, seed and rate, as soon as it is known."""
    data = load(args.data)
    if args.quick:
        data = Data((data.train[0][::4], data.train[1][::4]), data.test, data.classes)
    training = Training(args.epochs, args.rate, args.batch, args.points, not args.sgd)
    rates = args.rates or RATES[args.table]
    jobs = [
        (seed, rate, name)
        for seed in args.seeds
        for rate in (rates if args.table == 3 else [0.0])
        for name in args.pools
    ]
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(jobs) * args.epochs)
        for seed, rate, name in jobs:
            progress.update(task, description=f"{name}, seed {seed}, {rate:.0%}")
            torch.manual_seed(seed)
            penalty = POOLS[name]
            pool = MaxPool() if penalty is None else RobustPool(penalty, args.alpha)
            model = PointNet(pool, data.classes, args.width)
            train(model, data, rate, training, seed, lambda: progress.advance(task))
            for tested in [rate] if args.table == 3 else rates:
                yield Row(args.table, name, seed, rate, tested, *evaluate(model, data, tested, args.points))


def by_pool(rows: Sequence[Row], score: str) -> dict[str, dict[float, np.ndarray]]:
    """Scores over seeds, by pool and by the rate of outliers in the test."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(row.pool, {}).setdefault(row.tested, []).append(getattr(row, score))
    return {name: {rate: np.array(v) for rate, v in rates.items()} for name, rates in found.items()}


def report(rows: Sequence[Row]) -> Table:
    """The paper's table: a line a rate of outliers, a column a pool, mean over the seeds."""
    top, precision = by_pool(rows, "top1"), by_pool(rows, "map")
    table = Table("outliers %", *top, title="top-1 accuracy / mAP, mean over seeds")
    for rate in next(iter(top.values())):
        cells = (f"{top[name][rate].mean():.1f} / {precision[name][rate].mean():.1f}" for name in top)
        table.add_row(f"{100 * rate:.0f}", *cells)
    return table


def draw(rows: Sequence[Row], path: Path) -> None:
    """Both scores against the rate of outliers; the band is one standard deviation over seeds."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
        how = "the same rate" if rows[0].table == 3 else "no outliers"
        for axes, (score, title) in zip(
            figure.subplots(1, 2), {"top1": "top-1 accuracy %", "map": "mAP x 100"}.items(), strict=True
        ):
            for name, rates in by_pool(rows, score).items():
                x = 100 * np.array(list(rates))
                mean, deviation = (np.array([f(v) for v in rates.values()]) for f in (np.mean, np.std))
                colour = "black" if POOLS[name] is None else f"C{list(POOLS).index(name) - 1}"
                axes.plot(x, mean, "o-", color=colour, label=name, markersize=3, linewidth=1.4)
                axes.fill_between(
                    x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0
                )
            axes.set(title=title, xlabel=f"% outliers in the test (training: {how})", ylim=(0, 100))
        figure.axes[0].legend(frameon=False)
        figure.savefig(path)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, help="an .npz of X, Y, test, or the folder of ModelNet40's HDF5 files")
    add("--table", type=int, choices=RATES, default=4, help="of the paper")
    add("--out", type=Path, default=Path("artifacts"), help="folder for the CSV and the figure")
    add("--pools", nargs="+", choices=POOLS, default=list(POOLS))
    add("--rates", type=float, nargs="+", help="shares of outliers; by default those of the table")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--alpha", type=float, default=1.0)
    add("--points", type=int, default=1024, help="of a cloud, for each step; the paper has 2048")
    add("--width", type=float, default=1.0, help="factor on the channels of PointNet")
    add("--epochs", type=int, default=60)
    add("--rate", type=float, default=1e-2)
    add("--batch", type=int, default=24)
    add("--sgd", action="store_true", help="the paper's SGD with momentum 0.9 in place of Adam")
    add("--quick", action="store_true", help="a quarter of the data, few points and epochs: a minute")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(seeds=[0], points=64, width=0.25, epochs=3, rates=[0.0, 0.2, 0.5])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and write its table and figure."""
    args = parsed(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"point_clouds_table{args.table}.csv"
    rows = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        for row in run(args):
            rows.append(row)
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in row])
            file.flush()
    draw(rows, path.with_suffix(".png"))
    Console(width=110).print(report(rows))
    print(path, path.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main()
