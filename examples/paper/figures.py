"""The pictures of Gould, Hartley and Campbell (2019), drawn from the library's own solutions.

    python examples/paper/figures.py [--out artifacts] [--dpi 110]     (--out docs/figures: those of the docs)

Each ``draw_*`` solves, draws on a figure, and returns the numbers that it drew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/style.py is what all pictures share

from geometry_figure import draw_geometry
from pooling_figure import draw_penalties
from projection_figure import draw_projections
from scenario_figure import draw_scenarios
from style import STYLE

matplotlib.use("Agg")

from matplotlib import pyplot as plt

FIGURES: dict[str, tuple[Callable[[Figure], Any], tuple[float, float]]] = {
    "table1_penalties": (draw_penalties, (12, 7.4)),
    "table2_projections": (draw_projections, (10, 7.1)),
    "figure3_scenarios": (draw_scenarios, (13, 2.95)),
    "figure4_geometry": (draw_geometry, (10.5, 4.3)),
}


def draw(name: str, out: Path, dpi: int = 110) -> Any:
    """Draw one figure to ``out / name.png`` and return the numbers behind it."""
    function, size = FIGURES[name]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=size, layout="constrained")
        found = function(figure)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}.png"
        figure.savefig(path, dpi=dpi)
        plt.close(figure)
    with Image.open(path) as picture:  # a few colours are all there is: a third of the size
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    return found


def main(out: Path = Path("artifacts"), dpi: int = 110) -> list[Path]:
    """Draw them all and return where they are."""
    for name in FIGURES:
        draw(name, out, dpi)
        print(out / f"{name}.png")
    return [out / f"{name}.png" for name in FIGURES]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The paper's pictures from the library's solutions.")
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder")
    parser.add_argument("--dpi", type=int, default=110)
    main(**vars(parser.parse_args()))
