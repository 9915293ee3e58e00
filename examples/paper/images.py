"""Projection layers in an image classifier: Table 5 of the paper, at the scale of one CPU core.

    image -> small ResNet -> features -> batch norm without parameters -> projection on |u|_p = r or <= r -> linear

The radius is the paper's: 2/3 of the median norm of the batch-normalised training features of a network that was
trained without projection (Gould, Hartley and Campbell 2019, section 7.2); here that network has the same seed.
"batch norm" is a control that the paper does not have: the same network with the batch norm and no projection.

    python examples/paper/images.py                     Fashion-MNIST, three seeds
    python examples/paper/images.py --quick             scikit-learn's digits, about a minute
    python examples/paper/images.py --dataset cifar10 --data cifar-10-batches-py --train-size 50000 --epochs 60

A line a network goes to images.csv in --out as soon as it is trained; the figure images.png follows at the end.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from image_data import DATASETS, Images
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.metrics import average_precision_score, log_loss, top_k_accuracy_score
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from ddn_solvers.nodes import BallProjection, SphereProjection

# name -> norm and projection; a norm without projection is the control
MODELS: dict[str, tuple[float, type[nn.Module]] | None] = {
    "none": None,
    "batch norm": (2, nn.Identity),
    "L1 sphere": (1, SphereProjection),
    "L1 ball": (1, BallProjection),
    "L2 sphere": (2, SphereProjection),
    "L2 ball": (2, BallProjection),
    "Linf sphere": (math.inf, SphereProjection),
    "Linf ball": (math.inf, BallProjection),
}
METRICS = {"top1": "top-1 %", "top5": "top-5 %", "map": "mAP x 100", "nll": "NLL", "ece": "ECE x 100"}
BINS = 15  # of the calibration error


# -- the network --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = (
            nn.Identity()
            if before == after and stride == 1
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A stem, a stage a width, global average pooling; ``last`` stands between features and classifier."""

    def __init__(
        self, channels: int, classes: int, widths: Sequence[int], blocks: int, stem: int, last: nn.Module
    ) -> None:
        super().__init__()
        before = widths[0]
        layers: list[nn.Module] = [
            nn.Conv2d(channels, before, 3, stem, 1, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU(inplace=True),
        ]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(before, width, 2 if stage and not block else 1))
                before = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = last
        self.classifier = nn.Linear(before, classes)
        self.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.last(self.features(x.contiguous(memory_format=torch.channels_last))))


def last_layer(name: str, features: int, radii: dict[float, float]) -> nn.Module:
    """What ``MODELS`` names, on batch-normalised features."""
    kind = MODELS[name]
    if kind is None:
        return nn.Identity()
    p, projection = kind
    return nn.Sequential(nn.BatchNorm1d(features, affine=False), projection(p, radii[p]))


# -- training and scores ------------------------------------------------------------------------------------


def batches(data: Any, size: int, seed: int | None = None) -> Iterator[Any]:
    """Batches in a random order of the seed, or in the order of the data; tensors are indexed a batch at once."""
    if seed is None:
        sampler: Any = SequentialSampler(data)
    else:
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    if isinstance(data, TensorDataset):
        return iter(DataLoader(data, sampler=BatchSampler(sampler, size, seed is not None), batch_size=None))
    return iter(DataLoader(data, size, sampler=sampler, drop_last=seed is not None))


def train(model: ResNet, images: Images, args: argparse.Namespace, seed: int, advance: Any) -> None:
    """SGD with momentum under one cosine schedule, the same for every model."""
    steps = args.epochs * (len(images.train) // args.batch_size)  # type: ignore[arg-type]  # every data set here has a length
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    model.train()
    for epoch in range(args.epochs):
        for x, y in batches(images.train, args.batch_size, 1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        advance()


@torch.no_grad()
def over(function: nn.Module, data: Any) -> torch.Tensor:
    """What a network in evaluation mode makes of a whole data set."""
    function.eval()
    return torch.cat([function(x) for x, _ in batches(data, 500)])


def paper_radii(model: ResNet, images: Images) -> dict[float, float]:
    """2/3 of the median norm of the batch-normalised training features, for each norm."""
    features = F.batch_norm(over(model.features, images.train), None, None, training=True)
    return {
        p: 2 / 3 * float(torch.linalg.vector_norm(features, p, dim=-1).median()) for p in (1, 2, math.inf)
    }


def calibration_error(probability: np.ndarray, label: np.ndarray) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence (Guo et al. 2017, section 2)."""
    confidence, right = probability.max(1), probability.argmax(1) == label
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = (abs((confidence - right)[index == k].sum()) for k in range(BINS))
    return float(sum(gaps) / len(label))


def scores(model: ResNet, images: Images) -> dict[str, float]:
    """The metrics on the test set, as ``METRICS`` scales them."""
    p = over(model, images.test).double().softmax(1).numpy()
    y = torch.cat([y for _, y in batches(images.test, 500)]).numpy()
    classes = np.arange(images.classes)
    return {
        "top1": 100 * float(top_k_accuracy_score(y, p, k=1, labels=classes)),
        "top5": 100 * float(top_k_accuracy_score(y, p, k=5, labels=classes)),
        "map": 100 * float(average_precision_score(y[:, None] == classes, p, average="macro")),
        "nll": float(log_loss(y, p, labels=classes)),
        "ece": 100 * calibration_error(p, y),
    }


# -- the experiment -----------------------------------------------------------------------------------------


def subset(images: Images, size: int, seed: int) -> Images:
    """A random part of the training set, another one for every seed."""
    total = len(images.train)  # type: ignore[arg-type]  # every data set here has a length
    if size >= total:
        return images
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:size]
    if isinstance(images.train, TensorDataset):
        return images._replace(train=TensorDataset(*images.train[chosen]))
    return images._replace(train=Subset(images.train, chosen.tolist()))


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train every model with every seed; a row of results for each, as soon as it is there."""
    everything = DATASETS[args.dataset](args.data)
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.seeds * len(MODELS) * args.epochs)
        for seed in range(args.seeds):
            images = subset(everything, args.train_size, seed)
            radii: dict[float, float] = {2: math.nan}
            for name in MODELS:  # "none" comes first: it tells the radii
                progress.update(task, description=name)
                torch.manual_seed(seed)  # the same weights to begin with
                last = last_layer(name, args.widths[-1], radii)
                model = ResNet(images.channels, images.classes, args.widths, args.blocks, args.stem, last)
                started = time.perf_counter()
                train(model, images, args, seed, lambda: progress.advance(task))
                seconds = time.perf_counter() - started
                if MODELS[name] is None:
                    radii = paper_radii(model, images)
                kind = MODELS[name]
                radius = radii[kind[0]] if kind and kind[1] is not nn.Identity else math.nan
                yield {
                    "model": name,
                    "seed": seed,
                    "radius": radius,
                    **scores(model, images),
                    "seconds": seconds,
                }


def by_model(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, np.ndarray]:
    """The values over seeds of each model."""
    names = [name for name in MODELS if any(row["model"] == name for row in rows)]
    return {name: np.array([float(r[metric]) for r in rows if r["model"] == name]) for name in names}


def report(rows: Sequence[dict[str, Any]]) -> Table:
    """Mean and standard deviation over the seeds."""
    table = Table("model", *METRICS.values(), title="mean ± standard deviation over seeds")
    values = {metric: by_model(rows, metric) for metric in METRICS}
    for name in values["top1"]:
        digits = (4 if metric == "nll" else 2 for metric in METRICS)
        cells = (
            f"{v[name].mean():.{d}f} ± {v[name].std(ddof=min(1, v[name].size - 1)):.{d}f}"
            for v, d in zip(values.values(), digits, strict=True)
        )
        table.add_row(name, *cells)
    return table


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a metric: seeds as dots, mean and standard deviation as a bar."""
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 2.6), dpi=100, layout="constrained")
        panels = figure.subplots(1, len(METRICS), sharey=True)
        for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
            values = by_model(rows, metric)
            for height, (name, v) in enumerate(values.items()):
                color = "0.45" if height < 2 else "C0"
                panel.plot(v, np.full(v.size, height), ".", color=color, alpha=0.4, markersize=4)
                deviation = v.std(ddof=min(1, v.size - 1))
                panel.errorbar(
                    v.mean(), height, xerr=deviation, fmt="o", color=color, markersize=4, capsize=2
                )
                if name == "none":
                    panel.axvline(v.mean(), color="0.8", linewidth=0.8, zorder=0)
            panel.set_title(title, fontsize=8)
            panel.set_yticks(range(len(values)), list(values))
        panels[0].invert_yaxis()
        figure.savefig(path)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="fashion-mnist")
    add("--data", type=Path, help="folder of the data; by default where Debian puts Fashion-MNIST")
    add("--out", type=Path, default=Path("artifacts"), help="folder for images.csv and images.png")
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=10)
    add("--train-size", type=int, default=10_000, help="images to train on, a random subset for every seed")
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=0.1)
    add("--weight-decay", type=float, default=5e-4)
    add("--widths", type=int, nargs="+", default=[16, 32, 64, 128], help="channels of each stage")
    add("--stem", type=int, default=2, help="stride of the first convolution; 4 for ImageNet's sizes")
    add("--blocks", type=int, default=1, help="residual blocks of a stage")
    add("--quick", action="store_true", help="scikit-learn's digits, one seed, four epochs")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(dataset="digits", seeds=1, epochs=4, widths=[8, 16, 32], stem=1, batch_size=64)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the experiment and write its table and figure."""
    args = parsed(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with (args.out / "images.csv").open("w", newline="", encoding="utf-8") as file:
        for row in run(args):
            rows.append(row)
            shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            writer = csv.DictWriter(file, list(row))
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(shown)
            file.flush()
    draw(rows, args.out / "images.png")
    Console().print(report(rows))
    print(args.out / "images.csv", args.out / "images.png")
    return rows


if __name__ == "__main__":
    main()
