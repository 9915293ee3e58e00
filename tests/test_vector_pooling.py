"""Robust pooling of vectors: minima, gradients by points, alpha and weights, transforms, degenerate sets."""

from __future__ import annotations

import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.nodes import RobustVectorPool, robust_pool, robust_vector_pool
from ddn_solvers.nodes.penalties import PENALTIES

D = torch.float64
NAMES = tuple(PENALTIES)
# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def rand(*shape, seed=0, dtype=D):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clusters(pools, n, d, seed=0):
    """A tight cluster and a looser one, of random shares."""
    generator = torch.Generator().manual_seed(seed)
    second = torch.rand((pools, n, 1), generator=generator) < torch.rand((pools, 1, 1), generator=generator)
    return rand(pools, n, d, seed=seed + 1) * 0.6 + 3.0 * second


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def objective(name, u, x, alpha=1.0):
    return PENALTIES[name].value(((u[..., None, :] - x[..., None, :, :]) / alpha).square().sum(-1)).sum(-1)


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("name", NAMES)
def test_no_point_of_a_grid_is_better(name, n):
    x = clusters(12, n, 2, seed=n)
    y = robust_vector_pool(x, name)
    grid = torch.cartesian_prod(*[torch.linspace(-2, 5, 71, dtype=D)] * 2)
    own = objective(name, y[:, None], x)[:, 0]
    assert (own <= objective(name, grid.expand(12, -1, -1), x).amin(1) + 1e-12 * n).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_agrees_with_its_problem(name):
    x = clusters(4, 25, 3, seed=3).requires_grad_()
    alpha = torch.tensor([1.6, 1.8, 2.0, 1.7], dtype=D, requires_grad=True)
    weights = (0.5 + rand(4, 25, seed=4).abs()).requires_grad_()
    y = robust_vector_pool(x, name, alpha, weights=weights)
    generic = ddn.solve(
        RobustVectorPool(name).problem(25, 3),
        {"x": x, "alpha": alpha, "weights": weights},
        solver="casadi:ipopt",
        initial={"u": (y + 1e-3).detach()},
    )["u"]
    close(y, generic, 1e-9)
    v = rand(4, 3, seed=9)
    leaves = (x, alpha, weights) if name != "quadratic" else (x, weights)
    found, expected = (torch.autograd.grad((t * v).sum(), leaves) for t in (y, generic))
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-8)


@forward_mode
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_every_kind(name):
    x, alpha = clusters(2, 20, 2, seed=8), torch.tensor(1.3, dtype=D)
    weights = 0.5 + rand(20, seed=2).abs()

    def pooled(x, alpha, weights):
        return robust_vector_pool(x, name, alpha, weights=weights)

    leaves = tuple(t.clone().requires_grad_() for t in (x, alpha, weights))
    assert torch.autograd.gradcheck(pooled, leaves, atol=1e-6, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(pooled, leaves, atol=1e-6, fast_mode=True)
    jacobian = torch.func.jacrev(pooled)(x, alpha, weights)
    close(jacobian, torch.func.jacfwd(pooled)(x, alpha, weights), 1e-12)
    identity = torch.einsum("pq,ij->piqj", torch.eye(2, dtype=D), torch.eye(2, dtype=D))
    close(jacobian.sum(3), identity, 1e-12)
    each = torch.func.vmap(torch.func.jacrev(pooled), in_dims=(0, None, None))(x, alpha, weights)
    close(each[1], jacobian[1, :, 1], 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_scales_and_offsets(name, dtype):
    x = clusters(10, 40, 3, seed=1).to(dtype)
    v = rand(10, 3, seed=2, dtype=dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    found = {}
    for scale in (1e-6, 1.0, 1e6):
        leaf = (x * scale).requires_grad_()
        y = robust_vector_pool(leaf, name, scale)
        (g,) = torch.autograd.grad((y * v).sum(), leaf)
        close(g.sum(1), v, 1e-4 if dtype == torch.float32 else 1e-12)
        found[scale] = (y.detach() / scale, g)
    for y, g in found.values():
        close(y, found[1.0][0], tolerance)
        close(g, found[1.0][1], tolerance)
    close(robust_vector_pool(x + 64, name) - 64, found[1.0][0], tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_one_dimension_is_robust_pool(name):
    x = clusters(10, 40, 1, seed=5)
    close(robust_vector_pool(x, name)[:, 0], robust_pool(x[..., 0], name), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_each_set_stands_alone_and_masks_hide(name):
    x = clusters(6, 30, 3, seed=6)
    y = robust_vector_pool(x, name)
    close(torch.stack([robust_vector_pool(points, name) for points in x]), y, 1e-12)
    beside = torch.cat((x, torch.full((1, 30, 3), torch.nan, dtype=D)))
    found = robust_vector_pool(beside, name)
    close(found[:6], y, 1e-12)
    assert found[6].isnan().all()
    keep = torch.arange(30) < 22
    hidden = torch.where(keep[:, None], x, torch.nan).requires_grad_()
    masked = robust_vector_pool(hidden, name, mask=keep)
    close(masked, robust_vector_pool(x[:, :22], name), 1e-12)
    assert (torch.autograd.grad(masked.sum(), hidden)[0][:, 22:] == 0).all()
    assert robust_vector_pool(x[:0], name).shape == (0, 3)


def test_identical_points_have_a_derivative():
    x = torch.full((20, 3), 2.0, dtype=D, requires_grad=True)
    for name in NAMES:
        y = robust_vector_pool(x, name)
        close(y, torch.full((3,), 2.0, dtype=D), 0.0)
        close(torch.autograd.grad(y.sum(), x)[0], torch.full((20, 3), 1 / 20, dtype=D), 1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(5)}, "set of points"),
        ({"x": torch.ones(3, 0, 2)}, "no points"),
        ({"penalty": "L2"}, "unknown penalty"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"weights": torch.ones(4)}, "weights of shape"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ddn.ProblemError, match=message):
        robust_vector_pool(**{"x": rand(3, 5, 2), **arguments})
