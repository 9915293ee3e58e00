"""What do movers care about? The metric behind a transport plan, learnt from the plan.

    lower level:  P(theta) = argmin_P  sum_ij C_ij(theta) P_ij + eps P_ij (log P_ij - 1),   rows and columns given,
                  C_ij(theta) = sum_k exp(theta_k) (s_ik - t_jk)^2
    upper level:  min over theta of  J = 1/2 |P(theta) - observed|^2

The plan depends on a cost only up to what is added to its rows and columns; squared distances along different axes do
not differ by such, so theta is identified and J is zero at the truth alone. (Cuturi and Avis 2014, Ground Metric
Learning.) Run it with a path to draw the plans: ``python ground_metric.py picture.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ddn_solvers.nodes import entropic_transport

SIZE, EPSILON = 24, 0.02
TRUTH = torch.tensor(
    [2.0, 0.2], dtype=torch.float64
).log()  # the first axis is ten times as dear as the second


class Result(NamedTuple):
    """What was learnt, detached."""

    source: torch.Tensor  # (SIZE, 2)
    target: torch.Tensor  # (SIZE, 2)
    plans: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # observed, before, after: (SIZE, SIZE)
    theta: torch.Tensor  # log weights: (2,)
    losses: list[float]


def plan(theta: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The lower level: (SIZE, SIZE)."""
    squares = (source[:, None] - target).square()
    return entropic_transport(squares @ theta.exp(), epsilon=EPSILON)


def main() -> Result:
    """Descend through the plan, print what was found, and return it."""
    generator = torch.Generator().manual_seed(0)
    source, target = torch.rand((2, SIZE, 2), generator=generator, dtype=torch.float64)
    observed = plan(TRUTH, source, target)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    before, losses = plan(theta, source, target).detach(), []
    descent = torch.optim.LBFGS(
        [theta], max_iter=100, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        descent.zero_grad()
        J = 0.5 * SIZE**2 * (plan(theta, source, target) - observed).square().sum()
        J.backward()
        losses.append(J.item())
        return J

    descent.step(loss)
    print(f"loss     {losses[0]:.2e} -> {losses[-1]:.2e} in {len(losses)} evaluations")
    print(f"weights  {theta.exp().tolist()}, truth {TRUTH.exp().tolist()}")
    after = plan(theta, source, target).detach()
    return Result(source, target, (observed, before, after), theta.detach(), losses)


def draw(result: Result, path: Path) -> None:
    """The plans as lines between the points, as dark as the mass that they move."""
    import matplotlib as mpl
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(9, 3.1), dpi=100, layout="constrained")
        titles = (
            "observed: the horizontal is dear",
            "before: both axes alike",
            "after: learnt from the plan",
        )
        for axes, P, title in zip(figure.subplots(1, 3), result.plans, titles, strict=True):
            i, j = (P > 0.01 / SIZE).nonzero(as_tuple=True)
            lines = torch.stack([result.source[i], result.target[j]], 1).numpy()
            axes.add_collection(
                LineCollection(
                    list(lines), colors="#222222", linewidths=1.2, alpha=(SIZE * P[i, j]).clamp(max=1).numpy()
                )
            )
            axes.scatter(*result.source.T, s=22, color="#2f6db3", zorder=2, label="from")
            axes.scatter(*result.target.T, s=22, color="#d9782d", zorder=2, label="to")
            axes.set(title=title, xticks=[], yticks=[], aspect="equal")
        figure.axes[0].legend(loc="lower left", fontsize=8)
        figure.savefig(path)


if __name__ == "__main__":
    found = main()
    for argument in sys.argv[1:]:
        draw(found, Path(argument))
