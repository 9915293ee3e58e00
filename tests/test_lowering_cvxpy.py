"""Every operation of the table has torch's value; DCP and DPP come out as they should."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from ddn_solvers.lowering.cvxpy_lowering import Lowering, NotLowered, hoistable, square_root

A = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)
S = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 3.0]], dtype=torch.float64)


def graph(function: Any, *shapes: tuple[int, ...]) -> Any:
    inputs = [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in shapes]
    tracer = make_fx(
        lambda *z: (function(*z),), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
    )
    module = tracer(*inputs)
    module.graph.eliminate_dead_code()
    return module


def node_values(module: Any, variables: int, inputs: list[torch.Tensor]) -> dict[Any, np.ndarray]:
    nodes = hoistable(module, variables)
    environment: dict[Any, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            environment[node] = super().run_node(node)
            return environment[node]

    Recorder(module).run(*inputs)
    return {node: environment[node].detach().numpy().astype(float).ravel() for node in nodes}


def lowered(
    function: Any,
    shapes: list[tuple[int, ...]],
    inputs: list[torch.Tensor],
    variables: int = 1,
    nonneg: bool = False,
) -> tuple[Any, Lowering]:
    module = graph(function, *shapes)
    expressions = []
    for shape, value in zip(shapes[:variables], inputs, strict=False):
        variable = cp.Variable(int(np.prod(shape)), nonneg=nonneg)
        variable.value = value.numpy().ravel()
        expressions.append(variable)
    values = node_values(module, variables, inputs)
    lowering = Lowering(module, expressions, values)
    result = lowering.output(0).expression
    for hoisted in lowering.hoisted:
        prepared = hoisted.prepare(values)
        assert prepared is not None
        hoisted.parameter.value = prepared
    for constraint in lowering.constraints:  # variable == expression
        constraint.args[0].value = constraint.args[1].value
    return result, lowering


def linear(net: torch.Tensor) -> Any:
    return lambda u, p: F.linear(u, net)


# name -> function of u (a variable of shape (3,), positive) and p (a parameter of shape (3,), positive)
VECTOR_CASES = {
    "add": lambda u, p: u + 2 * p + 1,
    "add alpha": lambda u, p: torch.add(u, p, alpha=3),
    "sub": lambda u, p: p - u,
    "sub alpha": lambda u, p: torch.sub(p, u, alpha=2),
    "rsub": lambda u, p: torch.rsub(u, p, alpha=2),
    "neg": lambda u, p: -u,
    "mul parameter": lambda u, p: p * u,
    "mul scalar": lambda u, p: 3 * u,
    "div number": lambda u, p: u / 3,
    "div parameter": lambda u, p: u / p,
    "div constant": lambda u, p: u / A[3],
    "div by variable": lambda u, p: 1 / u,
    "square": lambda u, p: (u - p).square(),
    "times itself": lambda u, p: u * u,
    "pow 2": lambda u, p: u**2,
    "pow 4": lambda u, p: (u - p) ** 4,
    "pow 3": lambda u, p: u**3,
    "pow 1": lambda u, p: u**1,
    "pow 0": lambda u, p: u + u**0,
    "pow half": lambda u, p: u**0.5,
    "pow 1.5": lambda u, p: u**1.5,
    "pow -1": lambda u, p: u**-1,
    "number to a power": lambda u, p: 2.0**u,
    "sqrt": lambda u, p: u.sqrt(),
    "rsqrt": lambda u, p: u.rsqrt(),
    "exp": lambda u, p: torch.exp(u * p),
    "exp2": lambda u, p: torch.exp2(u),
    "expm1": lambda u, p: torch.expm1(u),
    "log": lambda u, p: u.log(),
    "log1p": lambda u, p: u.log1p(),
    "log2": lambda u, p: u.log2(),
    "log10": lambda u, p: u.log10(),
    "cosh": lambda u, p: u.cosh(),
    "abs": lambda u, p: (u - p).abs(),
    "relu": lambda u, p: F.relu(u - p),
    "leaky relu": lambda u, p: F.leaky_relu(u - p, 0.1),
    "clamp min": lambda u, p: torch.clamp(u - p, min=0.1),
    "clamp max": lambda u, p: torch.clamp(u, max=1.0),
    "clamp_min": lambda u, p: (u - p).clamp_min(0.0),
    "maximum": lambda u, p: torch.maximum(u, p),
    "minimum": lambda u, p: torch.minimum(u, p),
    "softplus": lambda u, p: F.softplus(u - p, beta=2),
    "logsigmoid": lambda u, p: F.logsigmoid(u - p),
    "log1p of exp": lambda u, p: torch.log1p(torch.exp(u)),
    "log of 1 + exp": lambda u, p: torch.log(1 + torch.exp(u)),
    "logaddexp": lambda u, p: torch.logaddexp(u, p),
    "hypot": lambda u, p: torch.hypot(u, p),
    "entr": lambda u, p: torch.special.entr(u),
    "x log x": lambda u, p: u * u.log(),
    "xlogy": lambda u, p: torch.xlogy(u, u),
    "x log x/y": lambda u, p: u * torch.log(u / p),
    "xlogy parameter": lambda u, p: torch.xlogy(p, u),
    "log_softmax": lambda u, p: F.log_softmax(u * p, 0),
    "where": lambda u, p: torch.where(torch.tensor([True, False, True]), u.square(), p),
    "where parameter": lambda u, p: torch.where(p > 1, u, p),
    "masked_fill": lambda u, p: u.masked_fill(torch.tensor([True, False, True]), 2.0),
    "cumsum": lambda u, p: u.cumsum(0),
    "diff": lambda u, p: (u * p).diff(),
    "cross": lambda u, p: torch.linalg.cross(u, A[3]),
    "conv1d": lambda u, p: F.conv1d(u[None, None], A[None, None, 0, :2]),
    "avg_pool1d": lambda u, p: F.avg_pool1d(u[None], 2),
    "zeros_like": lambda u, p: u + torch.zeros_like(u) + torch.ones_like(p),
    "new_zeros": lambda u, p: torch.cat([u, u.new_zeros(2)]),
    "matmul matrix": lambda u, p: A @ u,
    "matmul parameter": lambda u, p: torch.outer(p, p) @ u,
    "vector matmul": lambda u, p: u @ A.T,
    "mv": lambda u, p: torch.mv(A, u),
    "linear": linear(A),
    "linear bias": lambda u, p: F.linear(u, S, p),
    "addmv": lambda u, p: torch.addmv(p, S, u, beta=2, alpha=3),
    "multi_dot": lambda u, p: torch.linalg.multi_dot([A, S, u]),
    "kron": lambda u, p: torch.kron(A[0], u),
    "outer": lambda u, p: torch.outer(u, p),
    "solve": lambda u, p: torch.linalg.solve(S + torch.diag(p), u),
    "tensordot": lambda u, p: torch.tensordot(A, u, 1),
    "inner": lambda u, p: torch.inner(A, u),
    "einsum mv": lambda u, p: torch.einsum("ij,j->i", A, u),
    "einsum elementwise": lambda u, p: torch.einsum("i,i->i", p, u),
    "einsum outer": lambda u, p: torch.einsum("i,j->ji", p, u),
    "einsum three": lambda u, p: torch.einsum("ij,jk,k->i", A, S, u),
    "einsum sum out": lambda u, p: torch.einsum("ij,k->k", A, u),
    "einsum implicit": lambda u, p: torch.einsum("ij,j", A, u),
    "einsum diagonal": lambda u, p: torch.einsum("ii,i->i", S, u),
    "getitem": lambda u, p: u[1],
    "slice": lambda u, p: u[:2] * p[1:],
    "step": lambda u, p: u[::2],
    "fancy index": lambda u, p: u[[2, 0, 2]],
    "tensor index": lambda u, p: u[torch.tensor([1, 1])],
    "gather": lambda u, p: u.gather(0, torch.tensor([2, 1])),
    "cat": lambda u, p: torch.cat([u, p, u[:1]]),
    "stack": lambda u, p: torch.stack([u, p], dim=1),
    "flip": lambda u, p: u.flip(0),
    "roll": lambda u, p: u.roll(1),
    "diag": lambda u, p: torch.diag(u),
    "pad": lambda u, p: F.pad(u, (1, 2)),
    "unbind": lambda u, p: sum(k * x for k, x in enumerate(u.unbind())),
    "split": lambda u, p: torch.cat(tuple(reversed(torch.split(u, [1, 2])))),
    "expand": lambda u, p: u.expand(2, 3) * p,
    "broadcast": lambda u, p: u[:, None] - p[None, :],
    "clone and to": lambda u, p: u.clone().to(torch.float64).contiguous(),
    "repeat": lambda u, p: u.repeat(2),
    "index_put": lambda u, p: torch.index_put(u, (torch.tensor([0]),), p[:1]),
    "poisson loss": lambda u, p: F.poisson_nll_loss(u, p),
    "bce with logits": lambda u, p: F.binary_cross_entropy_with_logits(u, torch.tensor([1.0, 0, 1]).double()),
    "cross entropy": lambda u, p: F.cross_entropy(u, torch.tensor(1)),
    "sum": lambda u, p: (u * p).sum(),
    "sum keepdim": lambda u, p: u.sum(0, keepdim=True),
    "mean": lambda u, p: u.mean(),
    "dot": lambda u, p: p.dot(u),
    "dot itself": lambda u, p: u.dot(u),
    "vecdot": lambda u, p: torch.linalg.vecdot(p, u),
    "sum of squares": lambda u, p: ((u - p) ** 2).sum(),
    "mean of squares": lambda u, p: (u - p).square().mean(),
    "root of squares": lambda u, p: torch.sqrt(((u - p) ** 2).sum()),
    "root of mean square": lambda u, p: torch.sqrt((u - p).square().mean()),
    "root of squares by pow": lambda u, p: ((u - p) ** 2).sum() ** 0.5,
    "logsumexp": lambda u, p: torch.logsumexp(p * u, 0),
    "log of sum of exp": lambda u, p: torch.log(torch.exp(p * u).sum()),
    "amax": lambda u, p: u.amax(),
    "max": lambda u, p: (u - p).max(),
    "max dim": lambda u, p: u.max(0).values,
    "min": lambda u, p: u.min(),
    "norm": lambda u, p: (u - p).norm(),
    "norm 1": lambda u, p: torch.linalg.vector_norm(u - p, 1),
    "norm inf": lambda u, p: torch.linalg.vector_norm(u - p, float("inf")),
    "norm 3": lambda u, p: torch.linalg.vector_norm(u - p, 3),
    "linalg norm": lambda u, p: torch.linalg.norm(u - p),
    "linalg norm 1": lambda u, p: torch.linalg.norm(u - p, 1),
    "dist": lambda u, p: torch.dist(u, p),
    "mse": lambda u, p: F.mse_loss(u, p),
    "mse sum": lambda u, p: F.mse_loss(u, p, reduction="sum"),
    "mse none": lambda u, p: F.mse_loss(u, p, reduction="none"),
    "l1": lambda u, p: F.l1_loss(u, p),
    "huber": lambda u, p: F.huber_loss(3 * u, p, delta=0.7),
    "huber sum": lambda u, p: F.huber_loss(3 * u, p, reduction="sum"),
    "smooth l1": lambda u, p: F.smooth_l1_loss(3 * u, p, beta=0.5, reduction="none"),
    "topk sum": lambda u, p: u.topk(2).values.sum(),
    "quadratic form": lambda u, p: u @ S @ u,
    "quadratic form 2": lambda u, p: u @ (S @ u),
    "half a quadratic form": lambda u, p: 0.5 * u @ S @ u,
    "quadratic form, scaled inside": lambda u, p: (3 * u).dot(S @ (u * 2)),
    "quadratic form by sum": lambda u, p: (u * (S @ u)).sum(),
    "quadratic form by dot": lambda u, p: u.dot(torch.mv(S, u)),
    "quadratic form by einsum": lambda u, p: torch.einsum("i,ij,j->", u, S, u),
    "quadratic form, parameter": lambda u, p: u @ torch.diag(p) @ u,
    "negative quadratic form": lambda u, p: u @ (-S) @ u,
    "quadratic over linear": lambda u, p: u.square().sum() / u.sum(),
}
# functions of U (a variable of shape (4, 3)) and p (a parameter of shape (3,))
MATRIX_CASES = {
    "sum dim": lambda U, p: U.sum(0) * p,
    "sum dims": lambda U, p: U.sum((0, 1)),
    "mean dim": lambda U, p: U.mean(-1, keepdim=True),
    "amax dim": lambda U, p: (U - p).amax(1),
    "max dim": lambda U, p: (U - p).max(1, keepdim=True)[0],
    "logsumexp dim": lambda U, p: torch.logsumexp(U * p, 1),
    "logsumexp dims": lambda U, p: torch.logsumexp(U * p, (0, 1)),
    "norm dim": lambda U, p: (U - p).norm(dim=1),
    "norm 1 dim": lambda U, p: (U - p).norm(p=1, dim=0),
    "norm 3 dim": lambda U, p: torch.linalg.vector_norm(U - p, 3, dim=1),
    "frobenius": lambda U, p: torch.linalg.matrix_norm(U),
    "nuclear": lambda U, p: torch.linalg.matrix_norm(U, "nuc"),
    "spectral": lambda U, p: torch.linalg.norm(U, 2),
    "max column sum": lambda U, p: torch.linalg.matrix_norm(U, 1),
    "root of sum dim": lambda U, p: torch.sqrt(((U - p) ** 2).sum(1)),
    "matmul": lambda U, p: U @ p,
    "matmul left": lambda U, p: p @ U.T,
    "mm": lambda U, p: A.T @ U,
    "batched matmul": lambda U, p: U.reshape(2, 2, 3) @ A.T,
    "batched matmul vector": lambda U, p: U.reshape(2, 2, 3) @ p,
    "bmm": lambda U, p: torch.bmm(A.reshape(2, 2, 3), U.reshape(2, 3, 2)),
    "einsum matrix": lambda U, p: torch.einsum("ij,kj->ki", A, U),
    "einsum batch": lambda U, p: torch.einsum("bi,bi->b", A, U),
    "einsum trace": lambda U, p: torch.einsum("ij,ij->", A, U),
    "transpose": lambda U, p: U.T.reshape(-1),
    "permute": lambda U, p: U.reshape(2, 2, 3).permute(2, 0, 1),
    "tril": lambda U, p: U.tril(),
    "triu": lambda U, p: U.triu(1),
    "diagonal": lambda U, p: U.diagonal(),
    "trace": lambda U, p: torch.trace(U[:3]),
    "index": lambda U, p: U[[0, 2], [1, 1]],
    "select": lambda U, p: U[1] + U[:, 1][:3],
    "squeeze": lambda U, p: U[:, :1].squeeze(-1).unsqueeze(0),
    "kron": lambda U, p: torch.kron(A[:2], U),
    "cumsum": lambda U, p: U.cumsum(1),
    "total variation": lambda U, p: U.diff(dim=0).abs().sum() + U.diff(dim=1).abs().sum(),
    "linear": lambda U, p: F.linear(U, S, p),
    "addmm": lambda U, p: torch.addmm(p, U, S),
    "logdet": lambda U, p: torch.logdet(torch.diag(U[0]) + 0.1 * (U[1:] + U[1:].T)),
    "group lasso": lambda U, p: (p[0] * (U - p).norm(dim=1)).sum(),
    "huber of rows": lambda U, p: F.huber_loss((U - p).norm(dim=1), torch.zeros(4, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", VECTOR_CASES)
def test_value_of_vector_function(name: str) -> None:
    _check_value(VECTOR_CASES[name], (3,))


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_value_of_matrix_function(name: str) -> None:
    _check_value(MATRIX_CASES[name], (4, 3))


def _check_value(function: Any, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        inputs = [0.5 + torch.rand(s, generator=generator, dtype=torch.float64) for s in (shape, (3,))]
        expression, _lowering = lowered(function, [shape, (3,)], inputs, nonneg=True)
        expected = function(*inputs).numpy()
        assert np.size(expression.value) == expected.size
        np.testing.assert_allclose(np.ravel(expression.value), expected.ravel(), rtol=1e-9, atol=1e-12)
        assert expression.is_dcp()


CONVEX = {
    "lasso": (lambda u, x, lam: (A @ u - x).square().sum() + lam * u.abs().sum(), [(3,), (4,), ()]),
    "weighted lasso": (lambda u, x, w: (w * (A @ u - x).square()).sum() + u.abs().sum(), [(3,), (4,), (4,)]),
    "scaled residual": (lambda u, x, lam: lam * (A @ u - x).square().sum(), [(3,), (4,), ()]),
    "entropy": (lambda u, x: (x * u).sum() - torch.special.entr(u).sum(), [(3,), (3,)]),
    "log-sum-exp": (lambda u, x: torch.logsumexp(A @ u, 0) - (x * u).sum(), [(3,), (3,)]),
    "logistic": (lambda u, x: F.softplus(-(A @ u) * x).sum() + 0.1 * u.square().sum(), [(3,), (4,)]),
    "weighted logistic": (lambda u, x, lam: lam * F.softplus(-(A @ u) * x).sum(), [(3,), (4,), ()]),
    "qp": (lambda u, x: 0.5 * (u - x).square().sum(), [(3,), (3,)]),
    "ball": (lambda u, r: u.square().sum() - r**2, [(3,), ()]),
    "convex network": (
        lambda u, V, W: F.linear(F.softplus(F.linear(u, V)), W).sum(),
        [(3,), (4, 3), (2, 4)],
    ),
    "parameter matrix": (lambda u, B: (B @ u).norm(), [(3,), (2, 3)]),
    "hoisted sign": (lambda u, x: x.square().sum() * u.abs().sum(), [(3,), (3,)]),
    "quadratic form": (lambda u, B: u @ (B.T @ B) @ u + u.exp().sum(), [(3,), (3, 3)]),
}


@pytest.mark.parametrize("name", CONVEX)
def test_convex_functions_are_dcp_and_canonicalised_once(name: str) -> None:
    function, shapes = CONVEX[name]
    inputs = [0.5 + torch.rand(shape, dtype=torch.float64) for shape in shapes]
    expression, lowering = lowered(function, shapes, inputs)
    assert expression.is_convex()
    problem = cp.Problem(cp.Minimize(expression), lowering.constraints)
    assert problem.is_dcp(dpp=True)


def test_nonconvex_is_refused_with_the_term() -> None:
    module = graph(lambda u, x: (u.square() - x).square().sum(), (3,), (3,))
    node = next(n for n in module.graph.nodes if n.name == "square_1")
    node.meta["source"] = "model.py:7: (u.square() - x).square()"
    with pytest.raises(
        NotLowered, match=r"'square' at model.py:7: \(u.square\(\) - x\).square\(\) is neither"
    ) as caught:
        Lowering(module, [cp.Variable(3)]).output(0)
    assert caught.value.node is node


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda u, x: torch.sin(u).sum(), "'sin' is not an operation that CVXPY knows"),
        (lambda u, x: u[0] * u[1], "'mul' multiplies two terms"),
        (lambda u, x: (u**3).sum(), "'pow' .*known to be nonnegative"),
        (lambda u, x: (1 / u).sum(), "'reciprocal' .*known to be nonnegative"),
        (lambda u, x: F.softmax(u, 0).sum(), "'softmax' is not an operation"),
        (lambda u, x: (u.abs() - u.square()).sum(), "'sub' is neither convex nor concave"),
        (lambda u, x: u @ (S - 3 * torch.eye(3).double()) @ u + u.exp().sum(), "indefinite .*eigenvalue -"),
        (lambda u, x: (x * u.abs()).sum(), "'mul' is neither .*of unknown sign"),
        (lambda u, x: torch.where(u > 0, u, x).sum(), "'gt' makes integers or truth values of variables"),
        (lambda u, x: torch.linalg.vector_norm(u, 0.5), "p >= 1"),
        (lambda u, x: torch.index_put(u, (torch.tensor([0, 0]),), x[:2], True).sum(), "'index_put' adds"),
        (lambda u, x: F.pad(u, (1, 1), value=2.0).sum(), "other than zero"),
        (lambda u, x: u[x.long()].sum(), "positions that depend on parameters"),
        (lambda u, x: torch.logdet(u.reshape(3, 1) * A[:3]), "symmetric by construction"),
    ],
)
def test_refusals_name_the_operation(function: Any, reason: str) -> None:
    module = graph(function, (3,), (3,))
    with pytest.raises(NotLowered, match=reason):
        Lowering(module, [cp.Variable(3)]).output(0)


def test_signs_are_assumed_from_values_and_only_where_needed() -> None:
    module = graph(lambda u, x, lam: (u - x).square().sum() + lam * u.abs().sum(), (3,), (3,), ())
    x, lam = [node for node in module.graph.nodes if node.op == "placeholder"][1:]
    values = {x: np.array([1.0, -1.0, 2.0]), lam: np.array([0.5])}
    lowering = Lowering(module, [cp.Variable(3)], values)
    assert lowering.output(0).expression.is_convex()
    by_node = {hoisted.node: hoisted for hoisted in lowering.hoisted if hoisted.sign or hoisted.node is x}
    assert by_node[x].sign == 0
    assert by_node[lam].sign == 1
    assert by_node[lam].prepare({**values, lam: np.array([-0.5])}) is None
    assert by_node[lam].prepare(values) == pytest.approx(0.5)


def test_only_maximal_parameter_subgraphs_are_hoisted() -> None:
    module = graph(lambda u, r, x: u.square().sum() - (r**2 + x.exp().sum()), (3,), (), (2,))
    assert [node.name for node in hoistable(module, 1)] == ["add"]


def test_square_root_of_a_semidefinite_matrix() -> None:
    singular = np.outer([1.0, 2.0, 0.0], [1.0, 2.0, 0.0])
    root = square_root(singular)
    np.testing.assert_allclose(root.T @ root, singular, atol=1e-12)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        square_root(np.diag([1.0, -1.0]))


def test_long_graphs_need_no_recursion() -> None:
    def chain(u: torch.Tensor) -> torch.Tensor:
        for k in range(1500):
            u = u + float(k % 2)
        return u.sum()

    module = graph(chain, (3,))
    assert Lowering(module, [cp.Variable(3)]).output(0).expression.is_affine()
