"""Where is the camera? Perspective-n-point with a robust penalty, and the focal length learnt through it.

    lower level:  s, t = argmin  sum_i phi(|f pi(R(s) X_i + t) - p_i|; w),   phi(e; w) = w^2 (sqrt(1 + e^2 / w^2) - 1)
    upper level:  min over f of  J = 1/2 sum over other points of |f pi(R(s) X + t) - p|^2

pi divides by depth. The rotation has the fewest parameters that it can have, the modified Rodrigues parameters
s = axis tan(angle / 4): R(s) = I + (8 S^2 + 4 (1 - s^T s) S) / (1 + s^T s)^2 with S u = s x u, smooth up to a full turn
(Shuster 1993, section 3). With H the Hessian of the lower level, d(s, t) = -H^-1 f_XY dx: no unrolled iterations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import ddn_solvers as ddn

POINTS, HELD_OUT, OUTLIERS, VIEWS = 24, 12, 5, 3
FOCAL, WIDTH = 500.0, 2.0  # pixels


def rotation(s: torch.Tensor) -> torch.Tensor:
    """The matrix of modified Rodrigues parameters (3,)."""
    zero = torch.zeros_like(s[0])
    S = torch.stack([zero, -s[2], s[1], s[2], zero, -s[0], -s[1], s[0], zero]).reshape(3, 3)
    square = (s * s).sum()
    return torch.eye(3, dtype=s.dtype) + (8 * S @ S + 4 * (1 - square) * S) / (1 + square) ** 2


def projected(s: torch.Tensor, t: torch.Tensor, points: torch.Tensor, focal: torch.Tensor) -> torch.Tensor:
    """Pixels (n, 2) of points (n, 3)."""
    seen = points @ rotation(s).T + t
    return focal * seen[:, :2] / seen[:, 2:]


def error(
    s: torch.Tensor,
    t: torch.Tensor,
    points: torch.Tensor,
    pixels: torch.Tensor,
    focal: torch.Tensor,
    width: torch.Tensor,
) -> torch.Tensor:
    """The robust reprojection error, in squares of pixels."""
    squares = (projected(s, t, points, focal) - pixels).square().sum(1)
    return width**2 * ((1 + squares / width**2).sqrt() - 1).sum()


problem = ddn.Problem(
    variables={"s": (3,), "t": (3,)},
    parameters={"points": (POINTS, 3), "pixels": (POINTS, 2), "focal": (), "width": ()},
    objective=error,
)


class Scene(NamedTuple):
    """What cameras see: poses s, t (VIEWS, 3) of points (n, 3), and their pixels (VIEWS, n, 2)."""

    s: torch.Tensor
    t: torch.Tensor
    points: torch.Tensor
    pixels: torch.Tensor


class Result(NamedTuple):
    """What was found, detached."""

    scene: Scene
    pixels: torch.Tensor  # with noise and outliers: (VIEWS, POINTS, 2)
    s: torch.Tensor  # of these: (VIEWS, 3)
    t: torch.Tensor
    misplaced: tuple[float, float]  # largest error of t, by least squares and robustly
    focals: list[float]  # at each evaluation of the upper level


def scene() -> Scene:
    """Points in a cube of side two, four to six away."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    s, points = 0.3 * (rand(VIEWS, 3) - 0.5), 2 * rand(POINTS + HELD_OUT, 3) - 1
    t = torch.tensor([0.0, 0.0, 5.0]) + rand(VIEWS, 3) - 0.5
    focal = torch.tensor(FOCAL, dtype=torch.float64)
    pixels = torch.stack([projected(a, b, points, focal) for a, b in zip(s, t, strict=True)])
    return Scene(s, t, points, pixels)


def main(solver: str = "auto") -> Result:
    """Find poses in spite of outliers, then the focal length; print both, and return them."""
    truth = scene()
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    points, clean = truth.points[:POINTS], truth.pixels[:, :POINTS]
    start = {"s": torch.zeros(3).double(), "t": torch.tensor([0.0, 0.0, 5.0]).double()}
    generator = torch.Generator().manual_seed(1)
    pixels = clean + 0.5 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    pixels[:, :OUTLIERS] += 80 * torch.randn((VIEWS, OUTLIERS, 2), generator=generator, dtype=torch.float64)
    focal, width = torch.tensor([FOCAL, WIDTH], dtype=torch.float64)
    poses = [layer(points, pixels, focal, w, initial=start) for w in (1e4 * width, width)]
    squares, robust = (float((t - truth.t).norm(dim=1).max()) for _, t in poses)
    print(
        f"position off by at most {squares:.3f} by least squares, {robust:.4f} robustly ({OUTLIERS} outliers)"
    )

    log_focal = (1.3 * focal).log().requires_grad_()
    descent = torch.optim.LBFGS(
        [log_focal], max_iter=30, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    focals: list[float] = []

    def loss() -> torch.Tensor:
        descent.zero_grad()
        f = log_focal.exp()
        s, t = layer(points, clean, f, width, initial=start)
        seen = torch.stack([projected(a, b, truth.points[POINTS:], f) for a, b in zip(s, t, strict=True)])
        J = 0.5 * (seen - truth.pixels[:, POINTS:]).square().sum() / FOCAL
        J.backward()
        focals.append(f.item())
        return J

    descent.step(loss)
    print(f"focal length {focals[0]:.1f} -> {focals[-1]:.8f} in {len(focals)} evaluations, truth {FOCAL}")
    s, t = (value.detach() for value in poses[1])
    return Result(truth, pixels, s, t, (squares, robust), focals)


if __name__ == "__main__":
    main()
