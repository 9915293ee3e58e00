"""Least squares, weighted, ridge, with bias, and on a sphere: against the generic problem, torch and closed forms."""

from __future__ import annotations

import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.nodes import LeastSquares, SphereLeastSquares, least_squares, sphere_least_squares

D = torch.float64
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def leaves(*tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def agree(found, expected, atol):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.3, "each"])
def test_regression_agrees_with_the_generic_problem(ridge, bias):
    ridge = rand(20, seed=9).square() if ridge == "each" else ridge
    node = LeastSquares(ridge, bias)
    inputs = leaves(rand(3, 30, 20), rand(3, 30, seed=1), rand(3, 30, seed=2).square())
    named = dict(zip(("A", "b", "weights"), inputs, strict=True))
    generic = ddn.solve(node.problem(30, 20), named, solver="casadi:ipopt")["u"]
    y, v = node(*inputs), rand(3, 20 + bias, seed=3)
    torch.testing.assert_close(y, generic, rtol=0, atol=1e-11)
    agree(*(torch.autograd.grad((u * v).sum(), inputs) for u in (y, generic)), atol=1e-9)


def test_regression_agrees_with_torch_lstsq():
    A, b = leaves(rand(2, 40, 25), rand(2, 40, seed=1))
    v = rand(2, 25, seed=2)
    theirs = torch.linalg.lstsq(A, b[..., None]).solution[..., 0]
    agree(*(torch.autograd.grad((u * v).sum(), (A, b)) for u in (least_squares(A, b), theirs)), atol=1e-12)


def test_rows_without_weight_count_for_nothing_and_have_their_gradient():
    A, b, w = leaves(rand(12, 4), rand(12, seed=1), torch.ones(12, dtype=D))
    with torch.no_grad():
        w[:5] = 0
    y, v = least_squares(A, b, w), rand(4, seed=2)
    torch.testing.assert_close(y, least_squares(A[5:], b[5:]))
    (by_w,) = torch.autograd.grad(y @ v, w, create_graph=True)
    step = 1e-6 * torch.eye(12, dtype=D)
    moved = least_squares(A, b, w + step) @ v
    torch.testing.assert_close(by_w, ((moved - y @ v) / 1e-6).detach(), rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(by_w.square().sum(), w)[0].isfinite().all()


def test_errors_grow_with_the_condition_of_A_not_its_square():
    Q, V = torch.linalg.qr(rand(40, 20))[0], torch.linalg.qr(rand(20, 20, seed=1))[0]
    A = (Q * torch.logspace(0, -7, 20, dtype=D)) @ V
    x, v = rand(20, seed=2), rand(20, seed=3)
    A, b = leaves(A, A @ x)
    y = least_squares(A, b)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-8)
    pulled = torch.linalg.pinv(A.detach()).T @ v
    by_A, by_b = torch.autograd.grad(y @ v, (A, b))
    torch.testing.assert_close(by_b, pulled, rtol=0, atol=1e-8 * float(pulled.abs().max()))
    expected = -torch.outer(pulled, x)
    torch.testing.assert_close(by_A, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


@forward_mode
def test_regression_derivatives_of_every_kind():
    inputs = leaves(
        rand(2, 5, 3), rand(2, 5, seed=1), rand(2, 5, seed=2).square(), torch.tensor(0.3, dtype=D)
    )

    def fitted(A, b, w, ridge):
        return least_squares(A, b, w, ridge, bias=True)

    assert torch.autograd.gradcheck(fitted, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fitted, inputs)
    A, b, w, ridge = (x.detach() for x in inputs)
    for i in range(4):
        one = (A[0], b[0], w[0], ridge)
        torch.testing.assert_close(torch.func.jacrev(fitted, i)(*one), torch.func.jacfwd(fitted, i)(*one))
    mapped = torch.func.vmap(fitted, in_dims=(0, 0, 0, None))(A, b, w, ridge)
    torch.testing.assert_close(mapped, fitted(A, b, w, ridge))


def test_units_of_a_column_do_not_count_as_dependence():
    A, b = rand(30, 20), rand(30, seed=1)
    units = torch.logspace(-12, 12, 20, dtype=D)
    torch.testing.assert_close(least_squares(A * units, b) * units, least_squares(A, b), rtol=0, atol=1e-11)
    small = least_squares((A * 1e-3).float(), b.float()) * 1e-3
    torch.testing.assert_close(small.double(), least_squares(A, b), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(25, 20), (15, 20), (20, 20)])
def test_sphere_agrees_with_the_generic_problem_and_is_global(shape):
    m, n = shape
    # With fewer rows than columns, and a radius that A u = b can have, minima are not isolated.
    radii = torch.tensor([0.1, 0.2, 0.3] if m < n else [0.5, 2.0, 30.0], dtype=D)
    A, b, r = leaves(rand(3, m, n), rand(3, m, seed=1), radii)
    y, v = sphere_least_squares(A, b, r), rand(3, n, seed=2)
    torch.testing.assert_close(y.norm(dim=-1), r)
    mine = torch.autograd.grad((y * v).sum(), (A, b), retain_graph=True)
    for i in range(3):
        node = SphereLeastSquares(float(radii[i]))
        near = {"u": y[i].detach() + 0.01}
        u = ddn.solve(node.problem(m, n), {"A": A[i], "b": b[i]}, solver="casadi:ipopt", initial=near)["u"]
        torch.testing.assert_close(y[i], u, rtol=0, atol=1e-11)
        theirs = torch.autograd.grad((u * v[i]).sum(), (A, b))
        agree([g[i] for g in mine], [g[i] for g in theirs], atol=1e-10)
    with torch.no_grad():  # projected gradient from 200 random points finds nothing lower
        u = torch.nn.functional.normalize(rand(200, 3, n, seed=3), dim=-1) * r[:, None]
        rate = 1 / torch.linalg.matrix_norm(A, 2).square()[:, None]
        for _ in range(1500):
            residual = torch.einsum("bmn,sbn->sbm", A, u) - b
            u = u - rate * torch.einsum("bmn,sbm->sbn", A, residual)
            u = torch.nn.functional.normalize(u, dim=-1) * r[:, None]
        found = 0.5 * (torch.einsum("bmn,sbn->sbm", A, u) - b).square().sum(-1).amin(0)
        assert ((0.5 * (torch.einsum("bmn,bn->bm", A, y) - b).square().sum(-1)) <= found + 1e-9 * found).all()


@forward_mode
def test_sphere_derivatives_of_every_kind():
    inputs = leaves(rand(2, 5, 3), rand(2, 5, seed=1), torch.tensor([0.3, 2.0], dtype=D))
    assert torch.autograd.gradcheck(sphere_least_squares, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(sphere_least_squares, inputs)
    A, b, r = (x.detach() for x in inputs)
    for i in range(3):
        one = (A[0], b[0], r[0])
        torch.testing.assert_close(
            torch.func.jacrev(sphere_least_squares, i)(*one), torch.func.jacfwd(sphere_least_squares, i)(*one)
        )
    mapped = torch.func.vmap(sphere_least_squares)(A, b, r)
    torch.testing.assert_close(mapped, sphere_least_squares(A, b, r))


@pytest.mark.parametrize("node", [least_squares, sphere_least_squares])
def test_float32_is_float64_rounded(node):
    A, b, v = rand(3, 60, 20), rand(3, 60, seed=1), rand(3, 20, seed=2)
    found = []
    for dtype in (torch.float32, D):
        inputs = [x.to(dtype).requires_grad_() for x in (A, b)]
        y = node(*inputs)
        found.append((y, *torch.autograd.grad((y * v.to(dtype)).sum(), inputs)))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_two_minima_on_the_sphere_are_said_and_differentiated():
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=D))
    b = torch.tensor([1.0, 1.0, 0.0], dtype=D).requires_grad_()
    with pytest.warns(ddn.DegeneracyWarning, match="two minima"):
        y = sphere_least_squares(A, b, 5.0)
    # (A^T A - 1) u = A^T b in the first two entries, the third is what is left of the radius
    head = torch.tensor([3 / 8, 2 / 3], dtype=D)
    expected = torch.cat([head, (25 - head.square().sum()).sqrt()[None]])
    torch.testing.assert_close(y, expected)
    v = rand(3)
    (gradient,) = torch.autograd.grad(y @ v, b)
    step = 1e-6 * torch.eye(3, dtype=D)[:2]  # the third direction decides which minimum is lower
    up, down = (
        sphere_least_squares(A, b.detach() + s + torch.tensor([0, 0, 1e-9]), 5.0) @ v for s in (step, -step)
    )
    torch.testing.assert_close(gradient[:2], (up - down) / 2e-6, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: least_squares(rand(4, 3), rand(5)), r"shapes \(..., m, n\) and \(..., m\)"),
        (lambda: least_squares(rand(4, 3), rand(4), -rand(4).square()), "weights; expected finite"),
        (lambda: least_squares(rand(4, 3), rand(4), ridge=-1.0), "ridge; expected finite"),
        (lambda: least_squares(rand(2, 4, 3), rand(3, 4)), "do not broadcast"),
        (lambda: least_squares(rand(4, 3)[:, [0, 1, 1]], rand(4)), "1 of 1 least-squares problems"),
        (lambda: least_squares(rand(5, 2, 3), rand(5, 2)), "5 of 5 least-squares problems"),
        (lambda: least_squares(rand(4, 3).long(), rand(4)), "floating"),
        (lambda: sphere_least_squares(rand(4, 3), rand(4), 0.0), "radius; expected a positive"),
        (lambda: sphere_least_squares(rand(4, 3), rand(4), torch.tensor(-1.0)), "radius; expected positive"),
        (lambda: sphere_least_squares(rand(2, 4), rand(2), 30.0), "1 of 1 problems have a whole circle"),
        (lambda: sphere_least_squares(rand(4, 3) / 0, rand(4)), "finite entries"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ddn.ProblemError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    A, b = rand(2, 6, 3).cuda().requires_grad_(), rand(2, 6, seed=1).cuda()
    for node in (least_squares, sphere_least_squares):
        y = node(A, b)
        y.square().sum().backward()
        torch.testing.assert_close(y.cpu(), node(A.detach().cpu(), b.cpu()))
