"""Robust pooling: global minima, exact gradients, every scale, masks and weights, torch's transforms."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.nodes import RobustPool, robust_pool
from ddn_solvers.nodes.penalties import PENALTIES

D = torch.float64
NAMES = tuple(PENALTIES)
ROBUST = NAMES[1:]
# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def rand(*shape, seed=0, dtype=D):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clusters(pools, n, seed=0, apart=3.0, dtype=D):
    """Two clusters a pool, of random shares."""
    generator = torch.Generator().manual_seed(seed)
    second = torch.rand((pools, n), generator=generator) < torch.rand((pools, 1), generator=generator)
    return rand(pools, n, seed=seed + 1, dtype=dtype) * 0.7 + apart * second


def objective(name, u, x, alpha=1.0, weights=1.0):
    """Of points u (..., K) for pools x (..., n)."""
    return (weights * PENALTIES[name].value(((u[..., None] - x[..., None, :]) / alpha) ** 2)).sum(-1)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [1, 2, 3, 25, 100])
@pytest.mark.parametrize("name", NAMES)
def test_the_minimum_is_global(name, n):
    """No point of a dense grid is better, for clustered data whose mean and median lie in the wrong valley."""
    x = clusters(40, n, seed=n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)
        y = robust_pool(x, name)
    grid = torch.linspace(-4, 7, 1101, dtype=D)
    own = objective(name, y[:, None], x)[:, 0]
    for part in range(0, 40, 8):
        best = objective(name, grid.expand(8, -1), x[part : part + 8]).amin(1)
        assert (own[part : part + 8] <= best + 1e-12 * n).all()


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.1, 3.0])
@pytest.mark.parametrize("name", ["welsch", "truncated"])
def test_the_minimum_is_global_where_the_range_is_many_alphas(name, alpha):
    """Every point and every mean of two neighbours is tried, and where they lead."""
    x = clusters(6, 50, seed=5)
    y = robust_pool(x, name, alpha)
    ordered = x.sort(1).values
    start = torch.cat((ordered, (ordered[:, 1:] + ordered[:, :-1]) / 2), 1)
    for _ in range(60):  # mean shift never goes up
        w = PENALTIES[name].ratio(((start[..., None] - x[:, None]) / alpha) ** 2)
        start = torch.where(w.sum(-1) > 0, (w * x[:, None]).sum(-1) / w.sum(-1), start)
    best = objective(name, start, x, alpha).amin(1)
    assert (objective(name, y[:, None], x, alpha)[:, 0] <= best + 1e-10).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_agrees_with_its_problem(name):
    """Point and gradients by points, alpha and weights, at n = 25, from the generic layer started beside it."""
    x = clusters(6, 25, seed=3, apart=2.5).requires_grad_()
    alpha = torch.tensor([0.8, 1.0, 1.2, 0.9, 1.1, 1.0], dtype=D, requires_grad=True)
    weights = (0.5 + rand(6, 25, seed=4).abs()).requires_grad_()
    pool = RobustPool(name)
    y = robust_pool(x, name, alpha, weights=weights)
    parameters = {"x": x, "alpha": alpha, "weights": weights}
    start = {"u": (y + 1e-3).detach()}
    generic = ddn.solve(pool.problem(25), parameters, solver="casadi:ipopt", initial=start)["u"]
    close(y, generic, 1e-9)
    v = rand(6, seed=9)
    leaves = (x, alpha, weights) if name != "quadratic" else (x, weights)
    found, expected = (torch.autograd.grad((t * v).sum(), leaves) for t in (y, generic))
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_central_differences(name):
    x, alpha = clusters(2, 20, seed=8), torch.tensor(0.9, dtype=D)
    weights = 0.5 + rand(20, seed=2).abs()  # shared by the pools

    def pooled(x, alpha, weights):
        return robust_pool(x, name, alpha, weights=weights)

    leaves = tuple(t.clone().requires_grad_() for t in (x, alpha, weights))
    assert torch.autograd.gradcheck(pooled, leaves, atol=1e-6)
    assert torch.autograd.gradgradcheck(pooled, leaves, atol=1e-6)


@forward_mode
@pytest.mark.parametrize("name", ROBUST)
def test_torch_func_agrees_with_autograd(name):
    x, alpha = clusters(4, 21, seed=6), torch.tensor(0.9, dtype=D)

    def total(x, alpha):
        return robust_pool(x, name, alpha).square().sum()

    leaf, at = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    expected = torch.autograd.grad(total(leaf, at), (leaf, at))
    for one, other in zip(torch.func.grad(total, (0, 1))(x, alpha), expected, strict=True):
        close(one, other, 1e-12)
    each = torch.func.vmap(torch.func.grad(total), in_dims=(0, None))(x, alpha)
    close(each, expected[0], 1e-12)
    close(
        torch.func.vmap(lambda x: robust_pool(x, name, alpha), in_dims=1)(x.T),
        robust_pool(x, name, alpha),
        1e-12,
    )
    by_rows, by_columns = (
        transform(total, 1)(x, alpha) for transform in (torch.func.jacrev, torch.func.jacfwd)
    )
    close(by_rows, by_columns, 1e-12)
    close(torch.func.jacrev(robust_pool)(x[0], name), torch.func.jacfwd(robust_pool)(x[0], name), 1e-12)
    hessian = torch.func.hessian(total)(x[:1], alpha)
    close(hessian, torch.autograd.functional.hessian(lambda x: total(x, alpha), x[:1]), 1e-10)
    rows = torch.autograd.functional.jacobian(lambda x: robust_pool(x, name), x, vectorize=True)
    close(rows, torch.autograd.functional.jacobian(lambda x: robust_pool(x, name), x), 1e-12)


@forward_mode
def test_forward_mode_in_forward_mode_is_refused_not_zero():
    with pytest.raises(ddn.SensitivityError, match="forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(lambda x: robust_pool(x, "welsch")))(rand(5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_scales_from_1e_minus_6_to_1e6(name, dtype):
    """The gradient does not see the unit of x and alpha; its sum is one."""
    x = clusters(50, 64, seed=1, dtype=dtype)
    v = rand(50, seed=2, dtype=dtype)
    tolerance = 4e-4 if dtype == torch.float32 else 1e-12  # float32: points at alpha may change sides
    found = {}
    for scale in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        leaf = (x * scale).requires_grad_()
        y = robust_pool(leaf, name, scale)
        (g,) = torch.autograd.grad((y * v).sum(), leaf)
        assert g.isfinite().all()
        close(g.sum(1), v, 4e-6 if dtype == torch.float32 else 1e-13)
        found[scale] = (y.detach() / scale, g)
    for y, g in found.values():
        close(y, found[1.0][0], tolerance)
        close(g, found[1.0][1], tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_an_offset_costs_no_digits(name):
    x = clusters(20, 50, seed=11)
    far = x + 2.0**20
    close(robust_pool(far, name) - 2.0**20, robust_pool(x, name), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_each_pool_stands_alone(name):
    """Alone, in another order, beside a pool of NaN or of huge numbers: the same bits or as good as."""
    x = clusters(30, 40, seed=12)
    y = robust_pool(x, name)
    close(torch.stack([robust_pool(pool, name) for pool in x]), y, 1e-12)
    close(robust_pool(x.flip(0), name).flip(0), y, 1e-12)
    mixed = torch.cat((x, torch.full((1, 40), torch.nan, dtype=D), 1e9 * rand(1, 40), rand(1, 40)))
    mixed[-1, 3] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)  # points 1e9 alphas apart
        found = robust_pool(mixed.requires_grad_(), name)
    close(found[:30], y, 1e-12)
    assert found[30].isnan()
    assert found[31].isfinite()
    assert found[32].isnan()
    (g,) = torch.autograd.grad(found[:30].sum(), mixed)
    leaf = x.clone().requires_grad_()
    close(g[:30], torch.autograd.grad(robust_pool(leaf, name).sum(), leaf)[0], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_masks_and_weights(name):
    """A mask is a ragged set; a weight of two is a point twice; what is masked out has no effect, NaN included."""
    x = clusters(8, 30, seed=13)
    keep = torch.arange(30) < torch.arange(20, 28)[:, None]
    hidden = torch.where(keep, x, torch.nan).requires_grad_()
    y = robust_pool(hidden, name, mask=keep)
    for i in range(8):
        close(y[i], robust_pool(x[i, : 20 + i], name), 1e-12)
    (g,) = torch.autograd.grad(y.sum(), hidden)
    assert (g[~keep] == 0).all()
    close(g.sum(1), torch.ones(8, dtype=D), 1e-13)
    twice = torch.ones(30, dtype=D)
    twice[:7] = 2
    close(robust_pool(x, name, weights=twice), robust_pool(torch.cat((x, x[:, :7]), 1), name), 1e-12)
    close(robust_pool(x, name, weights=1e30 * twice), robust_pool(x, name, weights=twice), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_dimensions(name):
    x = clusters(60, 24, seed=14).reshape(3, 4, 5, 24)
    reference = robust_pool(x, name)
    close(robust_pool(x.movedim(-1, 1), name, dim=1), reference, 1e-12)
    kept = robust_pool(x.movedim(-1, 1), name, dim=1, keepdim=True)
    assert kept.shape == (3, 1, 4, 5)
    close(robust_pool(x.reshape(3, 4, 5, 4, 6), name, dim=(-1, -2)), reference, 1e-12)
    close(robust_pool(x.reshape(12, 5, 24), name, dim=None), robust_pool(x.reshape(-1), name), 1e-12)
    by_channel = torch.linspace(0.7, 1.3, 5, dtype=D)
    close(
        robust_pool(x, name, by_channel)[:, :, 2], robust_pool(x[:, :, 2], name, float(by_channel[2])), 1e-12
    )
    assert robust_pool(x[:0], name).shape == (0, 4, 5)


def test_huber_between_two_points_is_their_middle():
    """Any u in [-a, a] is a minimum at x = (-2a, 2a): the middle, whose derivative is 1/2 by each; and a flag."""
    x = torch.tensor([[-2.0, 2.0], [-0.1, 0.2]], dtype=D, requires_grad=True)
    with pytest.warns(ddn.DegeneracyWarning, match="1 of 2 pools"):
        y = robust_pool(x, "huber")
    close(y, torch.tensor([0.0, 0.05], dtype=D), 1e-14)
    close(torch.autograd.grad(y.sum(), x)[0], torch.full((2, 2), 0.5, dtype=D), 1e-14)
    # More points, weights and an offset: the two next to the gap carry the derivative.
    x = torch.tensor([-9.0, -7.0, -3.0, 2.0, 11.0], dtype=D, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 1.5, 2.0, 1.0], dtype=D)
    with pytest.warns(ddn.DegeneracyWarning):
        y = robust_pool(x, "huber", 0.5, weights=weights)
    close(y, torch.tensor(-0.5, dtype=D), 1e-14)
    close(torch.autograd.grad(y, x)[0], torch.tensor([0, 0, 0.5, 0.5, 0], dtype=D), 1e-14)


def test_huber_goes_from_mean_to_median():
    x = rand(20, 31, seed=15)
    close(robust_pool(x, "huber", 1e6), x.mean(1), 1e-12)
    close(robust_pool(x, "huber", 1e-9), x.median(1).values, 1e-12)
    close(robust_pool(x, "pseudo-huber", 1e5), x.mean(1), 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_identical_points(name):
    x = torch.full((2, 22), 3.5, dtype=D, requires_grad=True)
    y = robust_pool(x, name)
    close(y, torch.full((2,), 3.5, dtype=D), 0.0)
    close(torch.autograd.grad(y.sum(), x)[0], torch.full((2, 22), 1 / 22, dtype=D), 1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float32(dtype):
    x = clusters(4, 50, seed=16, dtype=torch.float32).to(dtype)
    y = robust_pool(x, "huber")
    assert y.dtype == dtype
    close(y, robust_pool(x.float(), "huber").to(dtype), 0.0)


def test_alpha_is_learnt():
    pool = RobustPool("welsch", 2.0, learnable=True)
    assert [name for name, _ in pool.named_parameters()] == ["log_alpha"]
    x = clusters(16, 30, seed=17, dtype=torch.float32)
    target = robust_pool(x, "welsch", 0.7)
    optimizer = torch.optim.Adam(pool.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (pool(x) - target).square().mean().backward()
        optimizer.step()
    assert abs(float(pool.alpha.detach()) - 0.7) < 0.02
    again = copy.deepcopy(pool)
    again.load_state_dict(pool.state_dict())
    close(again(x), pool(x), 0.0)
    fixed = RobustPool("huber", 2.0).double()
    assert fixed.alpha.dtype == D
    assert "huber" in repr(fixed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": "hubber"}, "unknown penalty 'hubber'; there are 'quadratic'"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"alpha": torch.tensor([1.0, -1.0, 1.0])}, "alpha must be positive"),
        ({"alpha": torch.ones(4)}, "does not broadcast against the result"),
        ({"weights": torch.ones(4)}, "weights of shape"),
        ({"weights": -torch.ones(5)}, "not negative"),
        ({"mask": torch.zeros(5, dtype=torch.bool)}, "3 pools are empty"),
        ({"dim": 2}, "out of range"),
        ({"dim": (1, -1)}, "each one time"),
        ({"x": torch.ones(3, 5, dtype=torch.int64)}, "floating-point"),
        ({"x": torch.ones(3, 0)}, "no points"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ddn.ProblemError, match=message):
        robust_pool(**{"x": rand(3, 5, dtype=torch.float32), **arguments})


@pytest.mark.parametrize("name", ROBUST)
def test_pools_larger_than_a_block(name):
    x = clusters(3, 200_000, seed=18).requires_grad_()
    y = robust_pool(x, name)
    close(y[1], robust_pool(x[1], name), 1e-12)
    (g,) = torch.autograd.grad(y.sum(), x)
    close(g.sum(1), torch.ones(3, dtype=D), 1e-10)
    many = clusters(5000, 21, seed=19, dtype=torch.float32)
    close(robust_pool(many, name)[4321], robust_pool(many[4321], name), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", NAMES)
def test_on_cuda(name):
    x = clusters(8, 60, seed=20)
    leaf = x.cuda().requires_grad_()
    y = robust_pool(leaf, name)
    assert y.is_cuda
    close(y.cpu(), robust_pool(x, name), 1e-10)
    assert torch.autograd.grad(y.sum(), leaf)[0].is_cuda


@pytest.mark.parametrize("penalty", PENALTIES)
def test_an_empty_batch_has_an_empty_gradient(penalty):
    x, weights = torch.rand(0, 4, 3, requires_grad=True), torch.rand(0, 4, 3, requires_grad=True)
    robust_pool(x, penalty, weights=weights).sum().backward()
    assert x.grad.shape == weights.grad.shape == (0, 4, 3)
