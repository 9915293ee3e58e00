"""Projections: points and derivatives against the generic problem, the paper's formulas and central differences."""

from __future__ import annotations

import math

import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers import nodes
from ddn_solvers.nodes import (
    project_affine,
    project_ball,
    project_box,
    project_halfspace,
    project_simplex,
    project_sphere,
)

D = torch.float64
N = 20
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
norms = pytest.mark.parametrize("p", [1, 2, math.inf])
kinds = pytest.mark.parametrize("project", [project_sphere, project_ball])
PROJECT = {True: project_ball, False: project_sphere}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def norm(x, p):
    return torch.linalg.vector_norm(x, p, dim=-1)


def gradients(y, v, inputs):
    return torch.autograd.grad((y * v).sum(), inputs, retain_graph=True)


# -- against the generic problem ----------------------------------------------------------------------------


@norms
@pytest.mark.parametrize("module", [nodes.SphereProjection, nodes.BallProjection])
@pytest.mark.parametrize("nonsmooth", ["manifold", "clarke"])
def test_spheres_and_balls_agree_with_their_problem(p, module, nonsmooth):
    center, v = rand(N, seed=3), rand(4, N, seed=2)
    radius = {1: 6.0, 2: 2.0, math.inf: 0.8}[p]
    node = module(p, radius, center, nonsmooth=nonsmooth)
    # two points outside, one of them near, and two inside
    x = (center + rand(4, N) * torch.tensor([2.0, 0.8, 0.1, 0.01], dtype=D)[:, None]).requires_grad_()
    y = node(x)
    with_ball = module is nodes.BallProjection
    generic = ddn.solve(
        node.problem(N),
        {"x": x if with_ball else x[:2]},
        solver="casadi:ipopt",
        initial=y.detach() if with_ball else y[:2].detach(),
        policy=ddn.Policy(nonsmooth=nonsmooth),
    )["u"]
    count = len(generic)
    torch.testing.assert_close(y[:count], generic, rtol=0, atol=1e-10)
    (found,), (expected,) = gradients(y[:count], v[:count], x), gradients(generic, v[:count], x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "node",
    [
        nodes.SimplexProjection(1.5),
        nodes.BoxProjection(rand(N, seed=5) - 1, 0.5),
        nodes.HalfspaceProjection(rand(N, seed=6), -3.0),
        nodes.AffineProjection(rand(7, N, seed=7), rand(7, seed=8)),
    ],
    ids=lambda node: type(node).__name__,
)
def test_polyhedra_agree_with_their_problem(node):
    if isinstance(node, nodes.BoxProjection):
        node.lower.clamp_(max=0.4)
    x, v = rand(3, N).requires_grad_(), rand(3, N, seed=2)
    generic = ddn.solve(node.problem(N), {"x": x}, solver="casadi:daqp")["u"]
    y = node(x)
    torch.testing.assert_close(y, generic, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(y, v, x), gradients(generic, v, x), rtol=0, atol=1e-11)


# -- against formulas ---------------------------------------------------------------------------------------


@norms
@kinds
def test_points_are_on_the_surface_and_nearest(p, project):
    """The first-order condition over the ball; for the sphere, no point of many on it is nearer."""
    x = rand(6, N) * torch.tensor([1e-2, 0.1, 0.5, 1, 10, 1e3], dtype=D)[:, None]
    radius = 0.3 * torch.arange(1, 7, dtype=D)
    y = project(x, p, radius)
    inside = norm(x, p) <= radius
    on = ~inside if project is project_ball else torch.ones_like(inside)
    torch.testing.assert_close(norm(y, p)[on], radius[on], rtol=1e-14, atol=0)
    if project is project_ball:
        assert torch.equal(y[inside], x[inside])
    others = rand(5000, 1, N, seed=1)
    near = y + 1e-3 * rand(5000, 6, N, seed=2) * norm(y, 2)[:, None]
    for u in (others * torch.ones(6, 1, dtype=D), near):
        u = u / norm(u, p)[..., None] * radius[:, None]
        assert ((u - x).norm(dim=-1) >= (y - x).norm(dim=-1) * (1 - 1e-12)).all()


@norms
@kinds
@pytest.mark.parametrize("nonsmooth", ["manifold", "clarke"])
def test_jacobians_are_the_papers(p, project, nonsmooth):
    """Section 5.2: with a = D_Y h, Dy = I - a a^T / a^T a, and Dzy masked on what does not move."""
    x, radius = 2 * rand(N), 9.0 if p == 1 else 1.5
    y = project(x, p, radius, nonsmooth=nonsmooth)
    J = torch.func.jacrev(lambda x: project(x, p, radius, nonsmooth=nonsmooth))(x)
    eye = torch.eye(N, dtype=D)
    if p == 2:
        expected = 1.5 / norm(x, 2) * (eye - torch.outer(y, y) / 1.5**2)
    else:
        a = y.sign() if p == 1 else y.sign() * (y.abs() >= 1.5)
        assert 1 < int(a.abs().sum()) < N  # kinks are there to be told apart
        if nonsmooth == "clarke":
            expected = eye - torch.outer(a, a) / (a @ a)
        elif p == 1:
            expected = a.abs().diag() - torch.outer(a, a) / (a @ a)
        else:
            expected = eye - a.abs().diag()
    torch.testing.assert_close(J, expected, rtol=0, atol=1e-14)


@norms
@kinds
@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_central_differences_by_x_radius_and_center(p, project, scale):
    x, c, r = scale * rand(3, N), 0.1 * rand(N, seed=1), torch.tensor([1.0, 1.5, 2.0], dtype=D)
    v, direction = rand(3, N, seed=2), [rand(3, N, seed=3), rand(3, seed=4), rand(N, seed=5)]
    inputs = [t.requires_grad_() for t in (x, r, c)]
    y = project(x, p, r, c)
    slope = sum((g * d).sum() for g, d in zip(gradients(y, v, inputs), direction, strict=True))
    with torch.no_grad():
        h = 1e-6
        ends = [
            project(*(p if i is None else inputs[i] + s * h * direction[i] for i in (0, None, 1, 2)))
            for s in (1, -1)
        ]
    torch.testing.assert_close(slope, ((ends[0] - ends[1]) * v).sum() / (2 * h), rtol=1e-7, atol=1e-8)


# -- derivatives of every kind ------------------------------------------------------------------------------

NORMAL, MATRIX = rand(3, seed=9), rand(2, 3, seed=9)
FUNCTIONS = {
    **{f"sphere {p}": lambda x, r, p=p: project_sphere(x, p, r, dim=1) for p in (1, 2, math.inf)},
    **{f"ball {p}": lambda x, r, p=p: project_ball(x, p, r, 0.1, dim=1) for p in (1, 2, math.inf)},
    "simplex": lambda x, r: project_simplex(x, r, dim=1),
    "halfspace": lambda x, r: project_halfspace(x, NORMAL, r[:, 0, None]),
    "affine": lambda x, r: project_affine(x, MATRIX, r[:, None, :2]),
    "box": lambda x, r: project_box(x, -r[:, None], r[:, None]),
}


@forward_mode
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_derivatives_of_every_kind(function):
    x, r = rand(2, 5, 3).requires_grad_(), (rand(2, 3, seed=1).square() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, r), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, r))
    a, b = x.detach(), r.detach()
    for i in (0, 1):
        torch.testing.assert_close(torch.func.jacrev(function, i)(a, b), torch.func.jacfwd(function, i)(a, b))
    mapped = torch.func.vmap(function)(torch.stack([a, -a]), torch.stack([b, b + 1]))
    torch.testing.assert_close(mapped, torch.stack([function(a, b), function(-a, b + 1)]))
    hessian = torch.func.hessian(lambda a: function(a, b).square().sum())(a).reshape(30, 30)
    torch.testing.assert_close(hessian, hessian.T)


# -- limits -------------------------------------------------------------------------------------------------


@norms
@kinds
@pytest.mark.parametrize("nonsmooth", ["manifold", "clarke"])
def test_zero_and_ties_have_an_answer(p, project, nonsmooth):
    x = torch.zeros(4, N, dtype=D)
    x[1], x[2, :2], x[3] = 3, -2, torch.tensor([1, -1] * (N // 2), dtype=D)
    x.requires_grad_()
    y = project(x, p, 1.0, nonsmooth=nonsmooth)
    (g,) = gradients(y, rand(4, N), x)
    assert y.isfinite().all()
    assert g.isfinite().all()
    torch.testing.assert_close(norm(y, p)[1:], torch.ones(3, dtype=D))
    if project is project_ball:
        assert not y[0].any()
        torch.testing.assert_close(g[0], rand(4, N)[0])
    else:
        torch.testing.assert_close(norm(y, p)[0], torch.ones((), dtype=D))
    symmetric = {1: 1 / N, 2: N**-0.5, math.inf: 1.0}[p]
    torch.testing.assert_close(y[1], torch.full((N,), symmetric, dtype=D))
    torch.testing.assert_close(y[3], symmetric * x[3].detach())


@norms
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_no_scale_breaks_it(p, project, dtype):
    for exponent in (-30, -12, 0, 12, 30):
        x = (rand(5, N).to(dtype) * 10.0**exponent).requires_grad_()
        for radius in (1e-30, 1.0, 1e30):
            y = project(x, p, radius)
            (g,) = gradients(y, rand(5, N).to(dtype), x)
            assert y.isfinite().all()
            assert not g.isnan().any()
            overflows = radius / float(norm(x.detach().double(), 2).min()) > torch.finfo(dtype).max
            assert g.isfinite().all() or (p == 2 and overflows)
            assert (norm(y.detach().double(), p) <= radius * (1 + 1e-5)).all()


@norms
@kinds
def test_float32_is_float64_rounded_and_half_is_kept(p, project):
    x = 2 * rand(8, 100)
    exact, v = x.clone().requires_grad_(), rand(8, 100, seed=1)
    single = x.float().requires_grad_()
    y, z = project(single, p, 2.0), project(exact, p, 2.0)
    torch.testing.assert_close(y.double(), z, rtol=0, atol=2e-6)
    (g,), (h,) = gradients(y, v.float(), single), gradients(z, v, exact)
    torch.testing.assert_close(g.double(), h, rtol=0, atol=1e-5)
    assert project(x.half(), p, 2.0).dtype == torch.float16


@norms
@kinds
def test_a_point_is_the_same_alone_or_in_a_batch(p, project):
    x = rand(2000, 50) * rand(2000, 1, seed=1).exp()
    x[7] = torch.nan
    together = project(x, p, 1.0)
    assert together[7].isnan().any()
    for i in (0, 6, 8, 1999):
        assert torch.equal(project(x[i], p, 1.0), together[i])
    moved = project(x[:50].T.reshape(50, 5, 10), p, 1.0, dim=0)
    torch.testing.assert_close(moved.reshape(50, 50).T, together[:50], equal_nan=True)


@kinds
def test_a_radius_brings_batch_dimensions_and_empty_batches_work(project):
    x = rand(4, N)
    radii = torch.tensor([[0.5], [1.0], [2.0]], dtype=D)
    y = project(x, 1, radii)
    assert y.shape == (3, 4, N)
    torch.testing.assert_close(y[1], project(x, 1, 1.0))
    for p in (1, 2, math.inf):
        empty = torch.zeros(0, N, dtype=D, requires_grad=True)
        project(empty, p).sum().backward()
        assert empty.grad.shape == (0, N)


def test_the_simplex_with_a_large_offset_and_many_entries():
    x = rand(3, 10_000)
    for offset in (0.0, 2.0**20):
        y = project_simplex(x + offset)
        torch.testing.assert_close(y.sum(-1), torch.ones(3, dtype=D), rtol=0, atol=1e-9)
        ordered = x.sort(-1, descending=True).values
        support = (y > 0).sum(-1, keepdim=True)
        threshold = (ordered.cumsum(-1).gather(-1, support - 1) - 1) / support
        torch.testing.assert_close(y, (x - threshold).clamp(min=0), rtol=0, atol=1e-9)


def test_learnt_settings_of_modules():
    radius = torch.nn.Parameter(torch.tensor(1.0))
    node = nodes.BallProjection(1, radius, center=torch.ones(3))
    node(torch.tensor([[3.0, 2.0, 1.0]])).sum().backward()
    assert float(radius.grad) == 1.0
    assert [name for name, _ in node.named_buffers()] == ["center"]
    assert [name for name, _ in nodes.SimplexProjection(radius).named_parameters()] == ["radius"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: project_sphere(x, 3), "p; expected 1, 2 or inf; got 3"),
        (lambda x: project_sphere(x, nonsmooth="free"), "nonsmooth; expected 'manifold' or 'clarke'"),
        (lambda x: project_ball(x, 1, 0.0), "radius; expected a positive finite number; got 0.0"),
        (lambda x: project_ball(x, 1, torch.tensor([1.0, -1.0])), "radius; expected positive finite entries"),
        (lambda x: project_ball(x, 1, torch.ones(3)), r"radius; expected a shape that broadcasts against \(2,\)"),
        (lambda x: torch.func.vmap(lambda r: project_ball(x, 1, r))(torch.tensor([1.0, -1.0])), "radius; expected positive"),
        (lambda x: project_ball(x.long()), "floating"),
        (lambda x: project_ball(x[:, :0]), "no entries along dim -1"),
        (lambda x: project_ball(x, dim=2), "no entries along dim 2"),
        (lambda x: project_box(x, 1.0, 0.0), "a lower bound exceeds its upper bound"),
        (lambda x: project_halfspace(x, torch.zeros(4), 1.0), "a normal is zero"),
        (lambda x: project_halfspace(x, torch.ones(3), 1.0), "normal; expected shape"),
        (lambda x: project_affine(x, torch.ones(2, 4), torch.tensor([1.0, 2.0])), "A u = b has no solution"),
        (lambda x: torch.func.vmap(lambda x: project_affine(x, torch.ones(2, 4), torch.tensor([1.0, 2.0])))(x), "no solution"),
        (lambda x: project_affine(x, torch.ones(2, 3), torch.ones(2)), "shapes of an affine set"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ddn.ProblemError, match=message):
        call(torch.ones(2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@norms
@kinds
def test_on_cuda(p, project):
    x = rand(5, N).cuda().requires_grad_()
    y = project(x, p, 1.5)
    y.square().sum().backward()
    torch.testing.assert_close(y.cpu(), project(x.detach().cpu(), p, 1.5))
