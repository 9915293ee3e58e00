"""Entropic optimal transport: point, gradients and limits, against the generic problem and closed forms."""

from __future__ import annotations

import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.nodes import EntropicTransport, entropic_transport

D = torch.float64
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def masses(*shape, seed=0):
    m = rand(*shape, seed=seed) + 0.1
    return m / m.sum(-1, keepdim=True)


# One of the constraints follows from the others: both derivatives are of minimum norm.
@pytest.mark.filterwarnings("ignore:the KKT matrix is singular:ddn_solvers.DegeneracyWarning")
@pytest.mark.parametrize(("m", "n"), [(6, 5), (5, 6), (20, 20)])
def test_plan_and_gradients_agree_with_the_generic_problem(m, n):
    C, r, c = (
        rand(m, n).requires_grad_(),
        masses(m, seed=1).requires_grad_(),
        masses(n, seed=2).requires_grad_(),
    )
    node = EntropicTransport(0.2)
    start = {"P": (r[:, None] * c).detach()}
    generic = ddn.solve(
        node.problem(m, n), {"cost": C, "source": r, "target": c}, solver="casadi:ipopt", initial=start
    )["P"]
    plan, v = node(C, r, c), rand(m, n, seed=3)
    torch.testing.assert_close(plan, generic, rtol=0, atol=1e-12)
    for found, expected in zip(
        *(torch.autograd.grad((P * v).sum(), (C, r, c)) for P in (plan, generic)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_gradients_against_central_differences_at_n_50():
    C, r, c, v = rand(50, 50), masses(50, seed=1), masses(50, seed=2), rand(50, 50, seed=3)

    def value(t):
        shift = t * rand(50, seed=5)
        source, target = (
            (r * (-shift).exp()) / (r * (-shift).exp()).sum(),
            (c * shift.exp()) / (c * shift.exp()).sum(),
        )
        return (entropic_transport(C + t * rand(50, 50, seed=4), source, target, 0.2 * (1 + t)) * v).sum()

    t = torch.zeros((), dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(value(t), t)
    h = 1e-3
    near, far = (value(torch.tensor(d, dtype=D)) - value(torch.tensor(-d, dtype=D)) for d in (h, 2 * h))
    torch.testing.assert_close(slope, (8 * near - far) / (12 * h), rtol=1e-8, atol=0)


@forward_mode
def test_derivatives_of_every_kind():
    def plan(C, a, b, epsilon):
        return entropic_transport(C, 3 * a.softmax(-1), 3 * b.softmax(-1), epsilon)

    inputs = (rand(2, 4, 3), rand(2, 4, seed=1), rand(2, 3, seed=2), torch.tensor([0.3, 0.5], dtype=D))
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(plan, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(plan, inputs)
    C, a, b = (x.detach() for x in inputs[:3])

    def one(C, a, b):
        return entropic_transport(C, a.softmax(-1), b.softmax(-1), 0.3)

    torch.testing.assert_close(
        torch.func.jacrev(one)(C[0], a[0], b[0]), torch.func.jacfwd(one)(C[0], a[0], b[0])
    )
    torch.testing.assert_close(torch.func.vmap(one)(C, a, b), one(C, a, b))
    hessian = torch.func.hessian(lambda C: one(C, a[0], b[0]).square().sum())(C[0]).reshape(12, 12)
    torch.testing.assert_close(hessian, hessian.T)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_masses_are_met_from_blurred_to_almost_an_assignment(epsilon, dtype):
    C, r, c = rand(4, 30, 40).to(dtype), masses(4, 30, seed=1).to(dtype), masses(4, 40, seed=2).to(dtype)
    c = c * r.sum(-1, keepdim=True) / c.sum(-1, keepdim=True)
    plan = entropic_transport(C, r, c, epsilon)
    tolerance = torch.finfo(dtype).eps * (50 + 2 / epsilon)
    assert float((plan.sum(-1) - r).abs().sum(-1).max()) < tolerance
    assert float((plan.sum(-2) - c).abs().sum(-1).max()) < tolerance


def test_the_limit_of_small_epsilon_is_the_assignment():
    points = rand(12, 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    C = torch.cdist(points, points[order] + 1e-3).square()
    plan = entropic_transport(C, epsilon=1e-5)
    assert torch.equal(plan.argmax(1), order.argsort())
    torch.testing.assert_close(plan.amax(1), torch.full((12,), 1 / 12, dtype=D))


def test_points_without_mass_have_the_one_sided_derivative():
    C, v, c = rand(6, 5), rand(6, 5, seed=3), masses(5, seed=2)
    r = masses(6, seed=1)
    r[2] = 0
    r = (r / r.sum()).requires_grad_()
    plan = entropic_transport(C, r, c, 0.3)
    assert not plan[2].any()
    (gradient,) = torch.autograd.grad((plan * v).sum(), r)
    direction = torch.zeros(6, dtype=D)
    direction[2], direction[0] = 1, -1
    step = 1e-7
    moved = entropic_transport(C, r + step * direction, c, 0.3)
    difference = ((moved - plan) * v).sum().detach() / step
    torch.testing.assert_close(gradient @ direction, difference, rtol=1e-6, atol=0)


def test_pairs_without_mass_on_both_sides_cannot_overflow():
    C = torch.full((4, 3), 1e4, dtype=D)
    C[0, 0] = -1e4  # a padded pair that would fit exceedingly well
    r, c = torch.tensor([0, 1, 1, 1], dtype=D) / 3, torch.tensor([0, 0.5, 0.5], dtype=D)
    C.requires_grad_()
    plan = entropic_transport(C, r, c)
    (gradient,) = torch.autograd.grad((plan * rand(4, 3)).sum(), C)
    torch.testing.assert_close(plan[1:, 1:], torch.full((3, 2), 1 / 6, dtype=D))
    assert gradient.isfinite().all()


def test_weakly_linked_blocks_keep_exact_gradients_by_cost():
    """Two far clusters: the link between them underflows and the reduced system is singular to rounding."""
    C = torch.full((6, 6), 1e5, dtype=D)
    C[:3, :3], C[3:, 3:] = rand(3, 3), rand(3, 3, seed=1)
    C.requires_grad_()
    v = rand(6, 6, seed=2)
    (gradient,) = torch.autograd.grad((entropic_transport(C, epsilon=0.5) * v).sum(), C)
    for block in (slice(0, 3), slice(3, 6)):
        alone = C.detach()[block, block].requires_grad_()
        plan = entropic_transport(alone, epsilon=0.5) / 2
        (expected,) = torch.autograd.grad((plan * v[block, block]).sum(), alone)
        torch.testing.assert_close(gradient[block, block], expected, rtol=0, atol=1e-13)


def test_gradients_by_masses_keep_their_sums_equal():
    C, r, c = rand(7, 5), masses(7, seed=1).requires_grad_(), masses(5, seed=2).requires_grad_()
    by_r, by_c = torch.autograd.grad((entropic_transport(C, r, c, 0.1) * rand(7, 5, seed=3)).sum(), (r, c))
    torch.testing.assert_close(by_r.sum(), by_c.sum(), rtol=0, atol=1e-14)


def test_a_plan_is_the_same_alone_or_in_a_batch_and_under_offsets():
    C = rand(5, 8, 6) * torch.tensor([1, 10, 100, 0.1, 1000], dtype=D)[:, None, None]
    together = entropic_transport(C, epsilon=0.5)
    for i in range(5):
        torch.testing.assert_close(entropic_transport(C[i], epsilon=0.5), together[i], rtol=0, atol=1e-14)
    shifted = C + 2.0**20 * torch.arange(8, dtype=D)[:, None]
    torch.testing.assert_close(entropic_transport(shifted, epsilon=0.5), together, rtol=0, atol=1e-8)
    assert entropic_transport(torch.zeros(0, 4, 3)).shape == (0, 4, 3)


def test_float32_is_float64_rounded():
    C, r, c, v = rand(3, 40, 30), masses(3, 40, seed=1), masses(3, 30, seed=2), rand(3, 40, 30, seed=3)
    for epsilon in (0.02, 0.5):
        gradients = []
        for dtype in (torch.float32, D):
            inputs = [x.to(dtype).requires_grad_() for x in (C, r, c)]
            plan = entropic_transport(*inputs, epsilon)
            gradients.append(torch.autograd.grad((plan * v.to(dtype)).sum(), inputs))
        for single, double in zip(*gradients, strict=True):
            size = float(double.abs().max())
            torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-4 * size)


def test_an_unfinished_plan_says_so(monkeypatch):
    monkeypatch.setattr("ddn_solvers.nodes.transport._ITERATIONS", 1)
    with pytest.warns(ddn.ConvergenceWarning, match="1 of 1 plans miss"):
        entropic_transport(rand(6, 5), epsilon=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": torch.ones(3, dtype=D)}, "shape"),
        ({"cost": torch.full((3, 3), torch.nan, dtype=D)}, "cost; expected finite"),
        ({"source": torch.tensor([0.5, 0.6, -0.1], dtype=D)}, "source; expected finite masses"),
        ({"source": torch.ones(3, dtype=D)}, r"total mass, by a share of 2.0e\+00"),
        ({"source": torch.ones(4, dtype=D) / 4}, r"source; expected shape \(..., 3\)"),
        ({"target": torch.ones(2, 3, dtype=D) / 3, "cost": torch.ones(5, 3, 3, dtype=D)}, "broadcast"),
        ({"epsilon": 0.0}, "epsilon; expected a positive"),
        ({"epsilon": torch.tensor(-1.0)}, "epsilon; expected positive"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"cost": torch.ones(3, 3, dtype=D), **change}
    with pytest.raises(ddn.ProblemError, match=message):
        entropic_transport(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    C = rand(2, 6, 5).cuda().requires_grad_()
    plan = entropic_transport(C, epsilon=0.3)
    plan.square().sum().backward()
    torch.testing.assert_close(plan.cpu(), entropic_transport(C.detach().cpu(), epsilon=0.3))


def test_gradients_of_a_batch_of_many_points_on_several_threads():
    """torch's batched LU with two threads is wrong from 150 rows on, or never returns."""
    cost = torch.rand(2, 170, 170, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            given = cost.clone().requires_grad_()
            plan = entropic_transport(given, epsilon=0.5)
            found.append(torch.autograd.grad((plan * cost.sin()).sum(), given)[0])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-14)
