"""Every tutorial on every backend that can take it, point and gradient against its closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from example_cases import EXAMPLES, cases, example

from ddn_solvers import nodes

pytest.importorskip("rich")

D = torch.float64


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


SLOW = "scipy:trust-constr"  # and of no use on minimum_kl, where it stops before it is feasible


def tutorial(
    name: str, convex: bool = True, without: str = "", problem: str = "problem"
) -> pytest.MarkDecorator:
    """Parametrize over the solvers of a tutorial's problem."""
    found = cases(getattr(example(f"tutorials/{name}"), problem), convex)
    return pytest.mark.parametrize("solver", [solver for solver in found if solver not in (SLOW, without)])


def test_every_tutorial_is_tested_and_in_the_docs() -> None:
    found = {path.stem for path in (EXAMPLES / "tutorials").glob("*.py")}
    assert {f"test_{name}" for name in found} <= set(globals())
    page = (EXAMPLES.parent / "docs" / "tutorials.md").read_text(encoding="utf-8")
    assert {name for name in found if f"../examples/tutorials/{name}.py" in page} == found


@tutorial("circle", convex=False)
def test_circle(solver: str) -> None:
    module = example("tutorials/circle")
    result = module.main(solver)
    x, target = torch.tensor([1.0, -0.2], dtype=D), module.TARGET
    unit = x / x.norm()
    first = 0.5 * unit
    by_x = 0.5 * (torch.eye(2, dtype=D) - torch.outer(unit, unit)) / x.norm()
    close(result.path[0], first)
    close(result.first_gradient, torch.cat([by_x @ (first - target), (unit @ (first - target))[None]]))
    assert (result.losses.diff() <= 1e-15).all()
    close(result.path[-1], target)
    close(result.r, target.norm())
    close(result.x / result.x.norm(), target / target.norm())


@tutorial("robust_mean", convex=False)  # convex, but CVXPY has no rule for sqrt(1 + z^2)
def test_robust_mean(solver: str) -> None:
    result = example("tutorials/robust_mean").main(solver)
    x = result.data[0]
    pooled = nodes.robust_pool(x, "pseudo-huber")
    slopes = (1 + (pooled - x).square()) ** -1.5
    close(result.means[0], pooled)
    close(result.first_gradient, slopes / slopes.sum())
    close(result.means, nodes.robust_pool(result.data, "pseudo-huber"))
    assert abs(result.means[-1]) < 1e-8
    inliers, outliers = result.moved
    assert outliers < 0.01 * inliers


@tutorial("linear_on_circle", convex=False)
def test_linear_on_circle(solver: str) -> None:
    result = example("tutorials/linear_on_circle").main(solver)
    norm = result.c.norm()
    unit = result.c / norm
    close(result.point, -unit)
    close(result.by_c, (torch.outer(unit, unit) - torch.eye(len(unit), dtype=D)) / norm)
    close(result.by_r, -unit)
    close(result.multiplier, norm / 2)
    close(result.r, -unit @ result.target)


@tutorial("minimum_kl")
def test_minimum_kl(solver: str) -> None:
    module = example("tutorials/minimum_kl")
    result = module.main(solver)
    tilted = torch.softmax(result.q.log() + result.theta @ module.MOMENTS, 0)
    close(result.point, tilted)
    close(module.MOMENTS @ tilted, result.b)
    centred = module.MOMENTS - result.b[:, None]
    covariance = (centred * tilted) @ centred.T
    close(result.by_b, torch.linalg.solve(covariance, centred * tilted).T, 1e-9)
    rows = torch.cat([torch.ones(1, module.SIZE, dtype=D), module.MOMENTS])
    weighted = rows * tilted
    by_log_q = torch.diag(tilted) - weighted.T @ torch.linalg.solve(weighted @ rows.T, weighted)
    close(result.by_q, by_log_q / result.q, 1e-9)


@tutorial("minimum_product", convex=False)
def test_minimum_product(solver: str) -> None:
    result = example("tutorials/minimum_product").main(solver)

    def closed(a: torch.Tensor, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        a, b = a - a.mean(), b - b.mean()
        direction = a / a.norm() - b / b.norm()
        return r * direction / direction.norm()

    close(result.point, closed(**result.inputs))
    a, b, r = result.inputs.values()
    a, b = a - a.mean(), b - b.mean()
    close(result.product, r**2 * (a @ b - a.norm() * b.norm()) / 2)
    jacobians = torch.autograd.functional.jacobian(closed, tuple(result.inputs.values()))
    for found, expected in zip(result.jacobians.values(), jacobians, strict=True):
        close(found, expected)
    assert result.ok
    assert result.least_eigenvalue < -1
    assert result.least_on_tangents > 1


@tutorial("total_variation", without="scipy:SLSQP")  # five seconds
def test_total_variation(solver: str) -> None:
    result = example("tutorials/total_variation").main(solver)
    x, w = result.noisy, result.weights[-1]
    edges = [0, *(1 + result.denoised.diff().abs().gt(1e-8).nonzero().squeeze(-1)).tolist(), len(x)]
    assert len(edges) - 2 >= 4
    y, by_w, by_x = (
        torch.empty(len(x), dtype=D),
        torch.empty(len(x), dtype=D),
        torch.zeros(len(x), len(x), dtype=D),
    )
    for start, end in pairwise(edges):
        height = result.denoised[start]
        neighbours = [result.denoised[i] for i in (start - 1, end) if 0 <= i < len(x)]
        above = sum(float((other - height).sign()) for other in neighbours)
        by_w[start:end] = above / (end - start)
        by_x[start:end, start:end] = 1 / (end - start)
        y[start:end] = x[start:end].mean() + w * by_w[start:end]
    close(result.denoised, y)
    close(result.by_w, by_w)
    close(result.by_x, by_x)
    # The weight learnt is a minimum: the slope of J is zero.
    assert abs(by_w @ (result.denoised - result.validation)) < 1e-3
    assert result.losses[-1] < 0.8 * result.losses[0]


@tutorial("lqr")
def test_lqr(solver: str) -> None:
    module = example("tutorials/lqr")
    result = module.main(solver)
    close(result.gain, module.K, 1e-8)
    start = result.states[0]
    close(result.value, 0.5 * start @ module.P @ start, 1e-9)
    close(result.value_gradient, module.P @ start, 1e-9)
    expected = [start]
    for _ in range(module.SIMULATED):
        expected.append((module.A - module.B @ module.K) @ expected[-1])
    close(result.states, torch.stack(expected), 1e-8)


@tutorial("attention", problem="weights")
def test_attention(solver: str) -> None:
    result = example("tutorials/attention").main(solver)
    close(result.found, result.expected, 1e-9)
    for found, expected in zip(result.gradients, result.expected_gradients, strict=True):
        close(found, expected, 1e-9)


def test_ground_metric() -> None:
    tutorial = example("tutorials/ground_metric")
    found = tutorial.main()
    close(found.theta, tutorial.TRUTH, 1e-9)
    theta = torch.zeros(2, dtype=D, requires_grad=True)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return (tutorial.plan(theta, found.source, found.target) - found.plans[0]).square().sum()

    (gradient,) = torch.autograd.grad(loss(theta), theta)
    with torch.no_grad():
        steps = 1e-4 * torch.eye(2, dtype=D)
        differences = [(8 * (loss(s) - loss(-s)) - (loss(2 * s) - loss(-2 * s))) / 12e-4 for s in steps]
    close(gradient, torch.stack(differences), 1e-9)


@tutorial("eigenvector", convex=False)
def test_eigenvector(solver: str) -> None:
    result = example("tutorials/eigenvector").main(solver)
    for A, y, gradient in zip(result.A, result.y, result.gradient, strict=True):
        values, vectors = torch.linalg.eigh(A)
        top, rest = vectors[:, -1], vectors[:, :-1]
        close(torch.outer(y, y), torch.outer(top, top), 1e-12)
        pulled = rest @ ((rest.T @ result.weights) / (values[-1] - values[:-1]))
        expected = 2 * (result.weights @ top) * torch.outer(pulled, top)
        close(gradient, 0.5 * (expected + expected.T), 1e-12)
    close(result.gradient[0], result.eigh_gradient[0], 1e-12)
    assert result.eigh_gradient[1].isnan().any()


@tutorial("pose", convex=False)
def test_pose(solver: str) -> None:
    tutorial = example("tutorials/pose")
    result = tutorial.main(solver)
    squares, robust = result.misplaced
    assert robust < 0.02 < 0.3 < squares
    assert result.focals[-1] == pytest.approx(tutorial.FOCAL, rel=1e-9)
    names = ("points", "pixels", "focal", "width")
    focal, width = torch.tensor([tutorial.FOCAL, tutorial.WIDTH], dtype=D)
    at = (result.scene.points[: tutorial.POINTS], result.pixels[0], focal, width)
    inputs = tuple(value.clone().requires_grad_() for value in at)
    layer = tutorial.ddn.DeclarativeLayer(tutorial.problem, solver=solver)

    def pose(*values: torch.Tensor) -> torch.Tensor:
        return torch.cat(layer(*values, initial={"s": result.s[0], "t": result.t[0]}))

    v = torch.arange(1, 7, dtype=D)
    gradients = torch.autograd.grad(pose(*inputs) @ v, inputs)
    generator = torch.Generator().manual_seed(2)
    for i, name in enumerate(names):
        direction = torch.randn(at[i].shape, generator=generator, dtype=D)
        h = 2e-5 * float(at[i].abs().amax())

        def along(step: float, i: int = i, direction: torch.Tensor = direction) -> torch.Tensor:
            moved = [value + (step * direction if j == i else 0) for j, value in enumerate(at)]
            return pose(*moved).detach() @ v

        difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        slope = (gradients[i] * direction).sum()
        torch.testing.assert_close(
            slope, difference, rtol=1e-7, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
