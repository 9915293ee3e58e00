"""The tour that ``make demo`` runs: every backend on one problem, a model trained, a picture.

    y(x) = argmin_u f(u, x)   subject to   h(u, x) = 0,  g(u, x) <= 0,  lower(x) <= u <= upper(x)

First a convex problem goes through every backend (``backends.py``); then penalties of a ridge
regression are learnt through its solution on real data (``ridge_penalties.py``); both end up in
``artifacts/demo.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import backends
import matplotlib
import numpy as np
import ridge_penalties
from matplotlib.axes import Axes
from ridge_penalties import Result
from style import BLUE, DARK, GREEN, GREY, LIGHT, ORANGE, STYLE

matplotlib.use("Agg")

from matplotlib import pyplot as plt

MARKS = (("o", 130, BLUE), ("s", 70, ORANGE), ("^", 34, GREEN), ("x", 14, DARK))
SHOWN = 16  # features named in the picture


def draw_learning(axes: Axes, result: Result) -> None:
    """Errors over the descent minus where it starts, RidgeCV: mean over splits and its standard error."""
    steps = np.arange(len(result.test))
    for errors, label, colour in (
        (result.validation - result.validation[0], "validation, 5 folds (± s.e.)", BLUE),
        (result.test - result.ridge, "held-out test (± s.e.)", ORANGE),
    ):
        mean, deviation = errors.mean(1), errors.std(1) / np.sqrt(errors.shape[1])
        axes.plot(steps, mean, color=colour, lw=2, label=label)
        axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.18, lw=0)
    axes.axhline(0, color=GREY, lw=1.2, ls="--")
    axes.annotate(
        "RidgeCV: one penalty", (steps[-1], 0), (0, 4), textcoords="offset points", ha="right", color=GREY
    )
    axes.axhline(
        (result.lasso - result.ridge).mean(), color=GREEN, lw=1.2, ls=":", label="LassoCV, held-out test"
    )
    axes.set(xlabel="gradient step through the layer", ylabel="mean squared error minus RidgeCV's")
    axes.set_title(f"Learning {len(result.names)} penalties, {len(result.ridge)} splits")
    axes.legend(loc="lower left")


def draw_coefficients(axes: Axes, result: Result) -> None:
    """The largest coefficients and their penalties, mean over the splits."""
    ridge, learnt = result.ridge_coefficients.mean(0), result.coefficients.mean(0)
    order = np.argsort(-np.maximum(ridge, learnt))[:SHOWN]
    rows = np.arange(len(order))[::-1]
    axes.hlines(rows, ridge[order], learnt[order], color=LIGHT, lw=3, zorder=1)
    axes.scatter(ridge[order], rows, color=GREY, s=26, label="RidgeCV", zorder=2)
    ratio = np.log10(result.penalties / result.ridge_penalty[:, None]).mean(0)[order]
    limit = float(np.abs(ratio).max())
    dots = axes.scatter(
        learnt[order],
        rows,
        c=ratio,
        cmap="coolwarm",
        vmin=-limit,
        vmax=limit,
        s=44,
        edgecolor="#444444",
        lw=0.6,
        label="learnt penalties",
        zorder=3,
    )
    axes.set_yticks(rows, [result.names[j].replace(" ", " · ").replace("^2", "²") for j in order])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="|coefficient|, standardised, mean over splits", xlim=(-0.01, None))
    axes.set_title("What they do to the coefficients")
    axes.legend(loc="lower right")
    bar = axes.figure.colorbar(dots, ax=axes, pad=0.02, aspect=35)
    bar.set_label("log10 of learnt / RidgeCV's penalty")
    bar.outline.set_visible(False)


def draw_gradients(axes: Axes, rows: Sequence[backends.Row]) -> None:
    """Every component of every backend's gradient against central differences of its own re-solves."""
    values = np.concatenate([row.differences.numpy() for row in rows])
    low, high = values.min() - 0.08 * np.ptp(values), values.max() + 0.08 * np.ptp(values)
    axes.plot([low, high], [low, high], color=LIGHT, lw=1.2, zorder=1)
    for row, (marker, size, colour) in zip(rows, MARKS, strict=False):
        name = row.solver if row.solver == row.found_by else f"{row.solver} = {row.found_by}"
        colours = {"color": colour} if marker == "x" else {"facecolor": "none", "edgecolor": colour}
        label = f"{name}  ({row.difference_error:.0e})"
        axes.scatter(row.differences, row.gradient, s=size, marker=marker, lw=1.2, label=label, **colours)
    axes.set(xlabel="central differences of re-solves", ylabel="gradient from the KKT system")
    axes.set_title("One problem, every backend, one gradient")
    axes.legend(loc="upper left", title="solver  (relative error)", title_fontsize=8.5, alignment="left")


def draw(rows: Sequence[backends.Row], result: Result, path: Path) -> None:
    """The three panels, written to ``path``."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, 3, figsize=(16, 5.2), layout="constrained", width_ratios=(1, 1.15, 1)
        )
        draw_learning(panels[0], result)
        draw_coefficients(panels[1], result)
        draw_gradients(panels[2], rows)
        figure.get_layout_engine().set(wspace=0.05)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main(solver: str = "auto", quick: bool = False, path: Path = Path("artifacts/demo.png")) -> Path:
    """Run the tour and return where the picture is.

    Args:
        solver: For the training; the comparison takes every backend.
        quick: A smaller training, for tests.
        path: Of the picture.
    """
    rows = backends.main(repeats=3 if quick else 21)
    results = ridge_penalties.main(solver, quick)
    draw(rows, results[-1], path)
    print(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Every backend on one problem, a model trained, a picture.")
    parser.add_argument("--solver", default="auto", help="for the training, such as casadi:daqp")
    parser.add_argument("--quick", action="store_true", help="a smaller training")
    main(**vars(parser.parse_args()))
