"""Closed-form nodes agree with the generic problem that they solve, in point and gradient."""

from __future__ import annotations

import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers import nodes

D = torch.float64


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("module", [nodes.Softmax, nodes.Sparsemax])
def test_a_node_agrees_with_its_problem(module, temperature):
    node = module(temperature)
    x, v = rand(3, 20, seed=1).requires_grad_(), rand(3, 20, seed=2)
    start = torch.full((20,), 1 / 20, dtype=D)
    generic = ddn.solve(node.problem(20), {"x": x}, solver="casadi:ipopt", initial=start)["u"]
    y = node(x)
    torch.testing.assert_close(y, generic, rtol=0, atol=1e-9)
    found, expected = (torch.autograd.grad((t * v).sum(), x)[0] for t in (y, generic))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_sparsemax_derivatives_of_every_kind():
    x = rand(2, 3, 7, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nodes.sparsemax(x, 0.7, 1), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: nodes.sparsemax(x, 0.7, 1), x)
    flat = x.detach()[0, 0]
    by_rows, by_columns = torch.func.jacrev(nodes.sparsemax)(flat), torch.func.jacfwd(nodes.sparsemax)(flat)
    torch.testing.assert_close(by_rows, by_columns)
    mapped = torch.func.vmap(nodes.sparsemax, in_dims=1)(x.detach()[0])
    torch.testing.assert_close(mapped, nodes.sparsemax(x.detach()[0], dim=0).T)


MARGINALS = torch.full((5,), 1 / 5, dtype=D), torch.full((4,), 1 / 4, dtype=D)
NORMAL = rand(4, seed=6)
OF_A_MATRIX = {  # functions of one (5, 4) matrix
    "softmax": nodes.softmax,
    "sparsemax": nodes.sparsemax,
    "robust_pool": lambda x: nodes.robust_pool(x, "pseudo-huber"),
    "robust_vector_pool": lambda x: nodes.robust_vector_pool(x, "huber"),
    "entropic_transport": lambda x: nodes.entropic_transport(x, *MARGINALS),
    "least_squares": lambda x: nodes.least_squares(x, x[..., 0] ** 2, ridge=0.1),
    "sphere_least_squares": lambda x: nodes.sphere_least_squares(x, x[..., 0] ** 2, radius=0.7),
    "project_sphere": nodes.project_sphere,
    "project_ball": nodes.project_ball,
    "project_simplex": nodes.project_simplex,
    "project_box": lambda x: nodes.project_box(x, -0.5, 0.5),
    "project_halfspace": lambda x: nodes.project_halfspace(x, NORMAL, 0.1),
    "project_affine": lambda x: nodes.project_affine(x, NORMAL[None], NORMAL[:1]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=["one", "batch of one", "batch"])
@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_dual_numbers_and_torch_func_give_the_same_tangent(name, batch):
    node, x, t = OF_A_MATRIX[name], rand(*batch, 5, 4, seed=7), rand(*batch, 5, 4, seed=8)
    value, tangent = torch.func.jvp(node, (x,), (t,))
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        found = forward.unpack_dual(node(forward.make_dual(x, t)))
    torch.testing.assert_close(found.primal, value)
    torch.testing.assert_close(found.tangent, tangent)


def test_sparsemax_keeps_its_digits_under_an_offset():
    x = rand(50, seed=4)
    torch.testing.assert_close(nodes.sparsemax(x + 2.0**20), nodes.sparsemax(x), rtol=0, atol=1e-9)
    assert nodes.sparsemax(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "temperature", "message"),
    [
        (torch.ones(3, dtype=torch.int64), 1.0, "floating"),
        (torch.ones(3), 0.0, "temperature"),
        (torch.ones(0), 1.0, "no entries"),
    ],
)
def test_bad_input_is_named(x, temperature, message):
    with pytest.raises(ddn.ProblemError, match=message):
        nodes.sparsemax(x, temperature)
