"""Lowering to CasADi: derivatives equal torch's, kinks are exported, patterns are sparse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import casadi as ca
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd.functional import hessian, jacobian
from torch.fx.experimental.proxy_tensor import make_fx

from ddn_solvers.errors import TraceError
from ddn_solvers.lowering.to_casadi import Lowered, UnsupportedOperation, lower

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while tracing

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X, U = randn(4), randn(3).abs()
A, W, B = randn(4, 4), randn(3, 4), randn(3)
ZEROS4, ONES4 = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
EYE4 = torch.eye(4, dtype=torch.float64)
MASK = torch.tensor([[True, False, True, True], [False, True, False, False], [True, True, True, True]])


def frozen(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.to(torch.float64).parameters():
            parameter.copy_(0.5 * randn(*parameter.shape))
    return module.requires_grad_(False)


NET = frozen(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1)))
GRU, LAYER_NORM = frozen(nn.GRUCell(4, 4)), frozen(nn.LayerNorm(4))
ATTENTION = frozen(nn.MultiheadAttention(4, 2, batch_first=True))


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """The pre-dispatch graph; without pre-dispatch where it would mutate or hold half of a transform."""

    def positional(*tensors: torch.Tensor) -> Any:  # defaults of library functions confuse make_fx
        return function(*tensors)

    graph = make_fx(positional, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    for node in graph.graph.nodes:
        mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        held = getattr(graph, node.target) if node.op == "get_attr" else None
        if mutates or (held is not None and torch._C._functorch.is_functorch_wrapped_tensor(held)):
            functional = torch.func.functionalize(positional, remove="mutations_and_views")
            return make_fx(functional, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    return graph


def lowered(
    function: Callable[..., Any], *inputs: torch.Tensor, variables: int | None = None
) -> tuple[Lowered, list[Any]]:
    symbols = [ca.MX.sym(f"x{i}", tensor.numel()) for i, tensor in enumerate(inputs)]
    count = len(inputs) if variables is None else variables
    return lower(traced(function, *inputs), symbols, count), symbols


def evaluate(expressions: list[Any], symbols: list[Any], *inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    function = ca.Function("f", symbols, expressions)
    results = function.call([ca.DM(tensor.reshape(-1).numpy()) for tensor in inputs])
    return [result.full() for result in results]


def derivatives(function: Callable[..., Any], *inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Value, Jacobian and Hessian of the sum in all inputs, through CasADi."""
    result, symbols = lowered(function, *inputs)
    (output,) = result.outputs
    z = ca.MX.sym("z", sum(tensor.numel() for tensor in inputs))
    edges = np.cumsum([0] + [tensor.numel() for tensor in inputs]).tolist()
    parts = [z[start:stop] for start, stop in itertools.pairwise(edges)]
    (output,) = ca.graph_substitute([output], symbols, parts)
    expressions = [output, ca.jacobian(output, z), ca.hessian(ca.sum1(output), z)[0]]
    return evaluate(expressions, [z], torch.cat([tensor.reshape(-1) for tensor in inputs]))


def reference(function: Callable[..., Any], *inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """The same through torch."""
    edges = [tensor.numel() for tensor in inputs]

    def flat(z: torch.Tensor) -> torch.Tensor:
        parts = [part.reshape(t.shape) for part, t in zip(z.split(edges), inputs, strict=True)]
        return function(*parts).reshape(-1)

    z = torch.cat([tensor.reshape(-1) for tensor in inputs])
    second = hessian(lambda z: flat(z).sum(), z)
    return [flat(z).numpy()[:, None], jacobian(flat, z).numpy(), second.numpy()]


def assert_matches(
    function: Callable[..., Any], *inputs: torch.Tensor, like: Callable[..., Any] | None = None
) -> None:
    actual, expected = derivatives(function, *inputs), reference(like or function, *inputs)
    for result, wanted, tolerance in zip(actual, expected, (1e-9, 1e-7, 1e-6), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance)


def in_place(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(4, dtype=torch.float64)
    y[0] = x[1] * u[0]
    y[2:] = x[:2].exp()
    y += x
    return y.sum()


def pendulum(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    for t in range(5):
        x = x + 0.1 * torch.stack([x[1], -torch.sin(x[0]) + u[t % 3], x[3], x[2] * x[0]])
    return (x**2).sum()


def diagonally_dominant(x: torch.Tensor) -> torch.Tensor:
    return torch.diag(x**2 + 1) + 0.1 * torch.ones(4, 4, dtype=torch.float64)


def definite(x: torch.Tensor) -> torch.Tensor:
    return torch.outer(x, x) + EYE4


def hard_activations(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """hardsigmoid + hardswish in operations that torch can differentiate twice."""
    gate = (x + 3).clamp(0, 6) / 6
    return gate + x * gate


def distances(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """cdist in operations that torch can differentiate twice."""
    return (x.reshape(2, 1, 2) - torch.ones(1, 1, 2)).square().sum(-1).sqrt().sum()


CASES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "quadratic": lambda x, u: x @ A @ x + (u * B).sum(),
    "exp_log": lambda x, u: (torch.exp(x) + torch.log(1 + x**2)).sum() + u.sum() ** 3,
    "powers": lambda x, u: ((x**2 + 1) ** -1.5).sum() + (u.abs() + 1).pow(0.3).sum(),
    "power_of_tensor": lambda x, u: torch.pow(x.abs() + 1, x).sum() + u[0],
    "norm": lambda x, u: torch.norm(x) + torch.linalg.norm(u, ord=1),
    "norm_inf": lambda x, u: torch.linalg.vector_norm(x, ord=math.inf),
    "norm_3": lambda x, u: torch.linalg.vector_norm(x, ord=3),
    "frobenius": lambda x, u: torch.linalg.norm(torch.outer(x, u)),
    "relu": lambda x, u: torch.relu(W @ x + u).sum(),
    "clamp": lambda x, u: torch.clamp(x, -0.5, 0.5).sum() + u.clamp_min(0.0).sum(),
    "huber": lambda x, u: F.huber_loss(x, ZEROS4),
    "smooth_l1": lambda x, u: F.smooth_l1_loss(x, ONES4),
    "index": lambda x, u: x[[0, 2]].sum() * u[1],
    "fixed_mask": lambda x, u: x[torch.tensor([True, False, True, True])].sum(),
    "stack": lambda x, u: torch.stack([x[0] * u[0], x[1], u[2]]),
    "cat_prod": lambda x, u: torch.cat([x, u]).prod(),
    "softmax": lambda x, u: (torch.softmax(x, 0) * A[0]).sum(),
    "log_softmax": lambda x, u: torch.log_softmax(x, 0)[1],
    "logsumexp": lambda x, u: torch.logsumexp(x, 0) + torch.logsumexp(u, 0),
    "entropy": lambda x, u: -(torch.softmax(x, 0) * torch.log_softmax(x, 0)).sum(),
    "xlogy": lambda x, u: torch.special.xlogy(x.abs(), x.abs()).sum(),
    "entr": lambda x, u: torch.special.entr(x.abs()).sum(),
    "mlp": lambda x, u: NET(x).squeeze(),
    "mlp_batch": lambda x, u: NET(torch.stack([x, 2 * x])).sum(),
    "silu": lambda x, u: F.silu(x).sum(),
    "gelu": lambda x, u: F.gelu(x).sum(),
    "gelu_tanh": lambda x, u: F.gelu(x, approximate="tanh").sum(),
    "elu": lambda x, u: F.elu(x).sum(),
    "layer_norm": lambda x, u: (LAYER_NORM(x) ** 2 * A[1]).sum(),
    "gru": lambda x, u: GRU(x[None], torch.ones(1, 4, dtype=torch.float64)).sum(),
    "einsum": lambda x, u: torch.einsum("i,ij,j->", x, A, x),
    "einsum_2d": lambda x, u: torch.einsum("ij,kj->ik", torch.outer(x, x), W).sum(1),
    "bmm": lambda x, u: torch.bmm(torch.outer(x, x)[None], A[None]).sum(),
    "outer": lambda x, u: torch.outer(x, u).sum(0),
    "diag": lambda x, u: torch.diag(x) @ x,
    "tril": lambda x, u: torch.tril(torch.outer(x, x)).sum(1),
    "cumsum": lambda x, u: torch.cumsum(x, 0),
    "cumprod": lambda x, u: torch.cumprod(torch.outer(x, u), 0).sum(1) + torch.cumprod(x, 0).flip(0)[0],
    "circular_padding": lambda x, u: F.conv1d(F.pad(x[None, None], (1, 1), mode="circular"), u[None, None])[
        0, 0
    ],
    "unfold": lambda x, u: F.unfold(torch.outer(x, u)[None, None], (2, 2))[0] @ torch.arange(6.0).double(),
    "erfc": lambda x, u: torch.log(torch.erfc(3 * x)) + torch.special.erfcx(x),
    "diff": lambda x, u: torch.diff(x),
    "roll": lambda x, u: torch.roll(x, 1) * x,
    "flip": lambda x, u: x.flip(0) * A[0],
    "var": lambda x, u: x.var(),
    "std": lambda x, u: x.std(),
    "mean": lambda x, u: x.mean() + torch.outer(x, u).mean(1).sum(),
    "max": lambda x, u: x.max() + torch.maximum(x[:3], u).sum(),
    "max_dim": lambda x, u: torch.outer(x, u).max(1).values.sum(),
    "where": lambda x, u: torch.where(x > 0, x**2, torch.sin(x)).sum(),
    "solve": lambda x, u: torch.linalg.solve(diagonally_dominant(x), x).sum(),
    "inv": lambda x, u: torch.linalg.inv(definite(x)).sum(),
    "det": lambda x, u: torch.linalg.det(definite(x)),
    "logdet": lambda x, u: torch.logdet(definite(x)),
    "cholesky": lambda x, u: torch.linalg.cholesky(definite(x)).sum(),
    "atan2_hypot": lambda x, u: torch.atan2(x[0], x[1]) + torch.hypot(x[2], x[3]),
    "in_place": in_place,
    "loop": pendulum,
    "conv1d": lambda x, u: F.conv1d(x[None, None], torch.ones(1, 1, 2, dtype=torch.float64)).sum(),
    "cross": lambda x, u: torch.linalg.cross(x[:3], u).sum(),
    "trace": lambda x, u: torch.trace(torch.outer(x, x)),
    "kron": lambda x, u: torch.kron(x, u).sum(),
    "erf_ndtr": lambda x, u: torch.erf(x).sum() + torch.special.ndtr(x).sum(),
    "log_ndtr": lambda x, u: torch.special.log_ndtr(x).sum(),
    "sigmoid": lambda x, u: torch.sigmoid(x).sum() + F.logsigmoid(x).sum(),
    "remainder": lambda x, u: torch.remainder(x, 0.7).sum(),
    "mse": lambda x, u: F.mse_loss(x, A[0]),
    "bce_with_logits": lambda x, u: F.binary_cross_entropy_with_logits(x, ONES4),
    "bce_weighted": lambda x, u: F.binary_cross_entropy_with_logits(
        torch.outer(u, x), A[:3].sigmoid(), W.exp(), pos_weight=A[0].exp(), reduction="none"
    ),
    "sort": lambda x, u: x.sort().values[:2].sum(),
    "topk": lambda x, u: x.topk(2).values.sum(),
    "gather": lambda x, u: x.gather(0, torch.tensor([2, 1])).sum(),
    "vmap": lambda x, u: torch.vmap(lambda q: (q**2).sum() + q[0] * u[0])(x.reshape(2, 2)).sum(),
    "grad": lambda x, u: torch.func.grad(lambda q: (q**3).sum() * u[0])(x),
    "jacrev": lambda x, u: torch.func.jacrev(lambda q: W @ torch.tanh(q))(x).sum(1),
    "matrix_exp": lambda x, u: torch.matrix_exp(torch.outer(x, x) * 0.1).sum(),
    "eigvalsh": lambda x, u: torch.linalg.eigvalsh(diagonally_dominant(x)) @ A[0],
    "svdvals": lambda x, u: torch.linalg.svdvals(torch.outer(x, x) + A) @ A[0],
}
MORE_CASES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "attention": lambda x, u: ATTENTION(*[torch.outer(u, x)[None]] * 3)[0].square().sum(),
    "attention_whole": lambda x, u: F.scaled_dot_product_attention(*[torch.outer(u, x)[None]] * 3, scale=0.3),
    "attention_causal": lambda x, u: F.scaled_dot_product_attention(
        torch.outer(u, x), A, A[:, :2] * x[0], is_causal=True
    ),
    "attention_masked": lambda x, u: F.scaled_dot_product_attention(
        torch.outer(u, x), A, torch.outer(x, u), MASK
    ),
    "attention_biased": lambda x, u: F.scaled_dot_product_attention(
        torch.outer(u, x).expand(2, 3, 4), A, torch.outer(x, u), torch.outer(u, x)
    ),
    "dropout_off": lambda x, u: F.dropout(x, 0.5, training=False) * x,
    "avg_pool": lambda x, u: F.avg_pool1d((x**2)[None, None], 2),
    "amax": lambda x, u: torch.outer(u, x).amax(0) + torch.outer(u, x).amin((0, 1)),
    "any_all": lambda x, u: torch.where((x > 0).any() & (u > 0).all(), x**2, x),
    "addcmul": lambda x, u: torch.addcmul(x, x, x, value=0.5) + torch.lerp(x, x**2, 0.3),
    "baddbmm": lambda x, u: torch.baddbmm(EYE4[None], x.reshape(1, 4, 1), x.reshape(1, 1, 4), alpha=2),
    "batch_norm": lambda x, u: F.batch_norm(torch.outer(u, x), ZEROS4, ONES4),
    "broadcast_matmul": lambda x, u: (A.reshape(2, 1, 2, 4) @ torch.outer(x, u).expand(3, 4, 3)).sum((0, 1)),
    "cholesky_batch": lambda x, u: torch.linalg.cholesky(torch.stack([definite(x), 2 * EYE4])),
    "clamp_tensor": lambda x, u: torch.clamp(x[:3], -u, u),
    "column_plus_scalar": lambda x, u: torch.outer(x, u).sum(0) + torch.outer(x, u).sum(),
    "conv2d": lambda x, u: F.conv2d(x.reshape(1, 1, 2, 2), u.reshape(3, 1, 1, 1), B, padding=1).square(),
    "cond": lambda x, u: torch.linalg.cond(torch.outer(x, x) + A),
    "conv_groups": lambda x, u: F.conv1d(
        x.reshape(1, 2, 2).expand(2, 2, 2), u[:2].reshape(2, 1, 1), groups=2, stride=2
    ),
    "conv_kernel": lambda x, u: F.conv1d(x[None, None], u[None, None], padding=2, dilation=2),
    "cosine": lambda x, u: F.cosine_similarity(x[:3], u, dim=0),
    "cross_entropy": lambda x, u: F.cross_entropy(x[None], torch.tensor([1])),
    "cumprod_by_hand": lambda x, u: torch.stack([x[: i + 1].prod() for i in range(4)]),
    "div_modes": lambda x, u: x * torch.div(x, 0.3, rounding_mode="floor") + x * torch.fmod(x, 0.3),
    "einsum_batch": lambda x, u: torch.einsum("bi,bj,ij->b", torch.outer(u, x), torch.outer(u, x), A),
    "erfc": lambda x, u: torch.erfc(x) + torch.special.erfinv(torch.tanh(x)),
    "exponentials": lambda x, u: torch.exp2(x) + torch.expm1(x) + torch.log1p(x**2) + torch.log2(1 + x**2),
    "fill": lambda x, u: torch.full_like(x, 2.0) * x + torch.fill(x, u[0]) * x.new_full((4,), 3.0),
    "glu": lambda x, u: F.glu(x, 0),
    "group_norm": lambda x, u: F.group_norm(torch.outer(u, x)[None], 3) ** 3,
    "hardtanh": lambda x, u: F.hardtanh(x, -0.3, 0.3) + F.relu6(x),
    "hyperbolic": lambda x, u: torch.sinh(x) + torch.cosh(x) + torch.asinh(x) + torch.atanh(torch.tanh(x)),
    "index_add": lambda x, u: x.index_add(0, torch.tensor([1, 1, 3]), u, alpha=2) ** 2,
    "index_put": lambda x, u: x.index_put((torch.tensor([1, 3]),), u[:2]) ** 2,
    "index_put_sum": lambda x, u: x.index_put((torch.tensor([1, 1]),), u[:2], accumulate=True) ** 2,
    "kl_div": lambda x, u: F.kl_div(torch.log_softmax(x, 0), torch.softmax(A[0], 0), reduction="sum"),
    "kthvalue": lambda x, u: x.kthvalue(2).values + x.median() + torch.outer(x, u).median(0).values,
    "l1_loss": lambda x, u: F.l1_loss(x, A[0]),
    "leaky_relu": lambda x, u: F.leaky_relu(x, 0.2) + F.celu(x, 0.7) + F.selu(x) + F.softplus(x, 2.0),
    "linalg_multi_dot": lambda x, u: torch.linalg.multi_dot([x, A, A, x]),
    "logaddexp_masked": lambda x, u: torch.logaddexp(x, torch.tensor([-math.inf, 0.0, 0.0, 0.0])),
    "logcumsumexp_by_hand": lambda x, u: torch.stack([x[: i + 1].logsumexp(0) for i in range(4)]),
    "masked_fill": lambda x, u: x.masked_fill(torch.tensor([True, False, True, False]), 2.0) * x,
    "masked_fill_of_values": lambda x, u: x.square().masked_fill(x > 0, 1.0) + x,
    "matrix_power": lambda x, u: torch.linalg.matrix_power(definite(x), 3),
    "meshgrid": lambda x, u: (
        torch.meshgrid(x, u, indexing="ij")[0] * torch.meshgrid(x, u, indexing="xy")[1].T
    ),
    "minimum": lambda x, u: torch.minimum(x[:3], u) + torch.fmax(x[:3], u) * torch.fmin(x[:3], u),
    "mish": lambda x, u: F.mish(x) + torch.special.expit(x),
    "norm_half": lambda x, u: torch.linalg.vector_norm(torch.outer(x, u), ord=0.5, dim=0),
    "norm_matrix": lambda x, u: torch.linalg.matrix_norm(torch.outer(x, u), ord=1),
    "norm_nuclear": lambda x, u: torch.linalg.matrix_norm(torch.outer(x, u) + W.T, ord="nuc"),
    "norm_spectral": lambda x, u: torch.linalg.norm(torch.outer(x, u) + W.T, ord=2),
    "norm_minus_inf": lambda x, u: torch.linalg.vector_norm(x, ord=-math.inf),
    "pad": lambda x, u: F.pad(x, (1, 2)) ** 2 + F.pad(x, (2, 1), value=3.0),
    "pad_reflect": lambda x, u: F.pad(x[None, None], (1, 2), mode="reflect") ** 2,
    "power_base": lambda x, u: 2**x + x.unsqueeze(1) ** torch.arange(4),
    "prelu": lambda x, u: F.prelu(x, torch.full((1,), 0.25, dtype=torch.float64)),
    "rearranged": lambda x, u: (
        torch.outer(x, u).movedim(0, 1).reshape(2, 6).unfold(1, 3, 2).flatten(1).T ** 2
    ),
    "rounding": lambda x, u: (
        x * (torch.floor(x) + torch.ceil(x) + torch.round(x) + torch.trunc(x)) + x.frac()
    ),
    "rsub": lambda x, u: (
        1 - x + torch.rsub(x, 2.0, alpha=3) + torch.reciprocal(1 + x**2) + torch.rsqrt(1 + x**2)
    ),
    "scatter": lambda x, u: x.scatter(0, torch.tensor([2, 0]), u[:2]) * x.scatter(0, torch.tensor([1]), 5.0),
    "scatter_add": lambda x, u: x.scatter_add(0, torch.tensor([2, 2, 0]), u) ** 2,
    "select_scatter": lambda x, u: torch.select_scatter(torch.outer(x, u), x, 1, 2) ** 2,
    "sign": lambda x, u: torch.sign(x) * x**2 + torch.sgn(x) * x,
    "slogdet": lambda x, u: torch.linalg.slogdet(A + torch.diag(x)).logabsdet,
    "softmax_2d": lambda x, u: torch.softmax(torch.outer(x, u), 0) + torch.log_softmax(torch.outer(x, u), 1),
    "solve_matrix": lambda x, u: torch.linalg.solve(diagonally_dominant(x), torch.outer(x, u)),
    "solve_right": lambda x, u: torch.linalg.solve(diagonally_dominant(x), torch.outer(u, x), left=False),
    "solve_triangular": lambda x, u: torch.linalg.solve_triangular(
        definite(x), torch.outer(x, u), upper=False
    ),
    "sort_descending": lambda x, u: torch.outer(u, x).sort(0, descending=True).values,
    "split": lambda x, u: (
        torch.cat([p * i for i, p in enumerate(x.split(2))]) + torch.stack(x.chunk(2)).sum()
    ),
    "std_dim": lambda x, u: torch.outer(x, u).std(1) + torch.outer(x, u).var(1, unbiased=False),
    "sums": lambda x, u: torch.outer(x, u).cumsum(0).sum(0, keepdim=True) + torch.outer(x, u).sum((0, 1)),
    "tensordot": lambda x, u: torch.tensordot(torch.outer(x, u), W, dims=([0], [1])),
    "threshold": lambda x, u: F.threshold(x, 0.1, 0.5) + F.softshrink(x, 0.1) + F.hardshrink(x, 0.1),
    "tile": lambda x, u: x.tile(2).reshape(2, 4) * x.repeat_interleave(2).reshape(4, 2).T,
    "topk_smallest": lambda x, u: torch.outer(u, x).topk(2, 0, largest=False).values,
    "truth_to_number": lambda x, u: (x > 0).double() * x**2 + (x > 0).sum() * x,
    "two_masks": lambda x, u: torch.outer(x, u)[torch.eye(4, 3, dtype=torch.bool)] ** 2 * 3.0,
    "masked_select": lambda x, u: torch.masked_select(torch.outer(x, u), u.new_tensor([1, 0, 1]) > 0).sin(),
    "unbind": lambda x, u: torch.cross(torch.stack(x.unbind()[:3]), u, dim=0),
    "upsample": lambda x, u: F.interpolate((x**2)[None, None], scale_factor=2, mode="linear"),
    "where_fixed": lambda x, u: torch.where(torch.tensor([True, False, True, False]), x**2, x.sin()),
    "xlog1py": lambda x, u: (
        torch.special.xlog1py(x, x**2) + torch.logaddexp(x, x**2) + torch.logit(torch.sigmoid(x))
    ),
}
REFUSED: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "item": ("item", lambda x, u: x * x[0].item()),
    "mask_of_values": ("index", lambda x, u: x[x > 0].sum()),
    "random": ("rand", lambda x, u: (x * torch.rand(4)).sum()),
    "random_attention": (
        "scaled_dot_product_attention",
        lambda x, u: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
    ),
    "random_dropout": ("dropout", lambda x, u: F.dropout(x, 0.5)),
    "large_svdvals": ("linalg_svdvals", lambda x, u: torch.linalg.svdvals(x.repeat(13, 1))),
    "large_eigh": ("linalg_eigh", lambda x, u: torch.linalg.eigh(torch.eye(13) * x[0]).eigenvectors),
    "argmax": ("argmax", lambda x, u: x.argmax() * x),
    "index_of_max": ("max", lambda x, u: u[torch.stack([x[:3], u]).max(0).indices]),
    "lgamma": ("lgamma", lambda x, u: torch.lgamma(x).sum()),
}


# What torch itself cannot differentiate twice, beside the same function written in simpler operations.
WITHOUT_HESSIAN = [
    (lambda x, u: torch.cdist(x.reshape(2, 2), torch.ones(1, 2, dtype=torch.float64)).sum(), distances),
    (lambda x, u: F.hardsigmoid(x) + F.hardswish(x), hard_activations),
]


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_equal_torch(name: str) -> None:
    assert_matches(CASES[name], X, U)


@pytest.mark.parametrize("name", MORE_CASES)
def test_further_operations_equal_torch(name: str) -> None:
    assert_matches(MORE_CASES[name], X, U)


@pytest.mark.parametrize(("function", "like"), WITHOUT_HESSIAN, ids=["cdist", "hard_activations"])
def test_operations_that_torch_differentiates_once(function: Any, like: Any) -> None:
    assert_matches(function, X, U, like=like)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_operation(name: str) -> None:
    operation, function = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=f"`{operation}`") as refusal:
        lowered(function, X, U)
    assert isinstance(refusal.value, TraceError)
    assert refusal.value.operation == operation


def test_refusal_names_the_line() -> None:
    graph = traced(lambda x: torch.lgamma(x).sum(), X)
    for node in graph.graph.nodes:
        node.meta["source"] = "model.py:3: torch.lgamma(x)"
    with pytest.raises(UnsupportedOperation, match=r"`lgamma` in model\.py:3: .*Rewrite") as refusal:
        lower(graph, [ca.MX.sym("x", 4)], 1)
    assert refusal.value.source == "model.py:3: torch.lgamma(x)"


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda v: A @ v.T @ v, (2, 4)),
        (lambda v: (v @ A).transpose(0, 1).cumsum(1).square(), (3, 2, 4)),
        (lambda v: torch.einsum("bij,bkj->bik", v, v).softmax(1), (2, 3, 2)),
        (lambda v: v.sum(1) * v.mean((0, 2)).sum() + v.logsumexp(0).amax(0, keepdim=True), (2, 3, 2)),
        (lambda v: v.permute(2, 0, 1).reshape(4, -1)[1:, ::2].flip(0).T @ v[0, 0, :3], (3, 2, 4)),
        (lambda v: torch.linalg.inv(v + 3 * torch.eye(2)) @ v, (3, 2, 2)),
        (lambda v: torch.matrix_exp(v), (2, 3, 3)),
        (lambda v: torch.linalg.vector_norm(v, dim=1).prod(1) + v.var(1).sum(0), (2, 3, 2)),
        (lambda v: v * 2.0 + v[0, 0, 0], (1, 1, 1)),
        (lambda v: v.squeeze() ** 2, ()),
    ],
)
def test_variables_of_any_rank(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    assert_matches(function, 0.5 * randn(math.prod(shape)).reshape(shape))


COEFFICIENTS = randn(12, 12)


def eigenvalues(v: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(v + v.mT) @ COEFFICIENTS[0, : v.shape[-1]]


def eigenvectors(v: torch.Tensor) -> torch.Tensor:
    """Projection on the lowest two, which leaves their signs open."""
    x = torch.linalg.eigh(v + v.mT).eigenvectors[:, :2]
    return (x @ x.T * COEFFICIENTS[: len(v), : len(v)]).sum()


def singular_values(v: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(v) @ COEFFICIENTS[0, : min(v.shape[-2:])]


def singular_vectors(v: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(v, full_matrices=False)
    return (u[:, :2] @ vh[:2] * COEFFICIENTS[: v.shape[0], : v.shape[1]]).sum()


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        *itertools.product(
            [eigenvalues, eigenvectors, singular_values, singular_vectors], [(2, 2), (8, 8), (12, 12)]
        ),
        (eigenvalues, (1, 1)),
        (eigenvalues, (2, 1, 3, 3)),
        (singular_values, (1, 1)),
        (singular_values, (2, 3, 4)),
        (singular_values, (5, 2)),
        (singular_vectors, (5, 2)),
        (singular_vectors, (2, 5)),
    ],
)
def test_spectra(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    assert_matches(function, randn(*shape))


def test_third_derivatives_of_spectra() -> None:
    x, direction = randn(4, 4), randn(4, 4)
    for function in (eigenvalues, eigenvectors, singular_values, singular_vectors):
        result, (symbol,) = lowered(function, x)
        (actual,) = result.outputs

        def along(t: torch.Tensor, function: Any = function) -> torch.Tensor:
            return function(x + t * direction)

        expected = along
        for _ in range(3):
            actual = ca.jtimes(actual, symbol, ca.DM(direction.reshape(-1).numpy()))
            expected = torch.func.grad(expected)
        (third,) = evaluate([actual], [symbol], x)
        zero = torch.zeros((), dtype=torch.float64)
        assert third.item() == pytest.approx(expected(zero).item(), rel=1e-9)


@pytest.mark.parametrize("point", [torch.zeros(3, 3), torch.eye(3), torch.ones(3, 3), torch.ones(3, 2)])
def test_spectra_where_values_coincide(point: torch.Tensor) -> None:
    x = point.double()
    for function in (torch.linalg.svdvals, lambda v: torch.linalg.eigvalsh(v @ v.T)):
        value, slope, curvature = derivatives(function, x)
        np.testing.assert_allclose(value[:, 0], function(x).numpy(), atol=1e-14)
        assert np.isfinite(slope).all()
        assert np.isfinite(curvature).all()
    u, s, vh = torch.linalg.svd(x)
    for full, part in ((True, (u, s, vh)), (False, (u[:, : len(s)], s, vh[: len(s)]))):
        result, symbols = lowered(lambda v, full=full: torch.linalg.svd(v, full_matrices=full), x)
        outputs = evaluate(list(result.outputs), symbols, x)
        left, values, right = (a.reshape(b.shape) for a, b in zip(outputs, part, strict=True))
        rank = len(s)
        np.testing.assert_allclose(left[:, :rank] * values @ right[:rank], x.numpy(), atol=1e-14)
        np.testing.assert_allclose(left.T @ left, np.eye(left.shape[1]), atol=1e-14)
        np.testing.assert_allclose(right @ right.T, np.eye(len(right)), atol=1e-14)


def test_nuclear_norm_is_smooth_where_singular_values_coincide() -> None:
    def norm(v: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_norm(v, ord="nuc")

    eye = torch.eye(3, dtype=torch.float64)
    _, slope, curvature = derivatives(norm, eye)
    expected = reference(norm, eye + torch.diag(torch.arange(3.0)) * 1e-6)
    np.testing.assert_allclose(slope, expected[1], atol=1e-5)
    np.testing.assert_allclose(curvature, expected[2], atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_determinants_are_polynomials_also_at_singular_matrices(size: int) -> None:
    """Value, adjugate and second derivatives at rank n - 1 and n - 2, beside Leibniz's sum."""

    def leibniz(v: torch.Tensor) -> torch.Tensor:
        def signed(order: tuple[int, ...]) -> torch.Tensor:
            swaps = sum(a > b for a, b in itertools.combinations(order, 2))
            return (-1) ** swaps * v[range(size), order].prod()

        return sum(signed(order) for order in itertools.permutations(range(size)))

    full = randn(size, size)
    singular, poorer = full.clone(), full.clone()
    singular[-1] = singular[:-1].sum(0)
    poorer[-2:] = poorer[:1]
    for v in (full, singular, poorer, torch.zeros_like(full)):
        if size <= 5:
            assert_matches(torch.linalg.det, v, like=leibniz)
        value, slope, _ = derivatives(torch.linalg.det, v)
        np.testing.assert_allclose(value.item(), torch.linalg.det(v).item(), rtol=1e-9, atol=1e-12)
        adjugate = value * np.eye(size)
        np.testing.assert_allclose(slope.reshape(size, size).T @ v.numpy(), adjugate, atol=1e-9)
    stacked = torch.stack([full @ full.mT + torch.eye(size), torch.eye(size).double()])
    assert_matches(
        lambda v: torch.logdet(v) + torch.linalg.slogdet(v).logabsdet + torch.linalg.det(v), stacked
    )


def test_several_outputs_constants_and_chosen_nodes() -> None:
    def function(x: torch.Tensor, p: torch.Tensor) -> Any:
        return x * p.square().sum(), torch.arange(3.0), (p * 2).reshape(3, 1)

    graph = traced(function, X, U)
    symbols = [ca.MX.sym("x", 4), ca.MX.sym("p", 3)]
    outputs = evaluate(list(lower(graph, symbols, 1).outputs), symbols, X, U)
    for actual, expected in zip(outputs, function(X, U), strict=True):
        np.testing.assert_allclose(actual[:, 0], expected.reshape(-1).double())
    total = next(node for node in graph.graph.nodes if "sum" in node.name)
    chosen = lower(graph, symbols, 1, nodes=[total])
    (value,) = evaluate(list(chosen.outputs), symbols, X, U)
    assert value.item() == pytest.approx(U.square().sum().item())
    assert chosen.kinks == ()


# ------------------------------------------------------------------------------------------- kinks

# function and a point where it has a kink, or where derivatives of its parts are not finite
CONVENTIONS = {
    "relu": (torch.relu, [0.0]),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.3), [0.0]),
    "abs": (torch.abs, [0.0]),
    "norm": (torch.linalg.vector_norm, [0.0, 0.0]),
    "norm_1": (lambda x: torch.linalg.vector_norm(x, 1), [0.0, 1.0]),
    "norm_3": (lambda x: torch.linalg.vector_norm(x, 3), [0.0, 0.0]),
    "norm_inf": (lambda x: torch.linalg.vector_norm(x, math.inf), [-1.0, 0.5, 1.0]),
    "std": (torch.std, [2.0, 2.0, 2.0]),
    "cdist": (lambda x: torch.cdist(x[None], torch.ones(1, 2, dtype=torch.float64)), [1.0, 1.0]),
    "maximum": (lambda x: torch.maximum(x[0], x[1]), [1.0, 1.0]),
    "minimum": (lambda x: torch.minimum(x[0], x[1]), [1.0, 1.0]),
    "fmax": (lambda x: torch.fmax(x[0], x[1]), [1.0, 1.0]),
    "fmin": (lambda x: torch.fmin(x[0], x[1]), [1.0, 1.0]),
    "amax": (lambda x: torch.amax(x, 0), [2.0, 1.0, 2.0, 2.0]),
    "max": (torch.max, [2.0, 1.0, 2.0]),
    "min": (torch.min, [1.0, 2.0, 1.0]),
    "max_dim": (lambda x: torch.max(x, 0).values, [1.0, 2.0, 2.0]),
    "min_dim": (lambda x: torch.min(x, 0).values, [1.0, 1.0, 2.0]),
    "sort": (lambda x: x.sort(stable=True).values @ torch.arange(1.0, 4.0).double(), [2.0, 1.0, 2.0]),
    "clamp": (lambda x: torch.clamp(x, -1, 1), [-1.0, 0.0, 1.0, 2.0]),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), [0.0, -1.0]),
    "clamp_max": (lambda x: torch.clamp_max(x, 0), [0.0, 1.0]),
    "clamp_crossed": (lambda x: torch.clamp(x, 1, -1), [0.0, 2.0]),
    "hardtanh": (F.hardtanh, [-1.0, 0.0, 1.0]),
    "where": (lambda x: torch.where(x > 0, x, 2 * x), [0.0]),
    "elu": (lambda x: F.elu(x, alpha=0.5), [0.0]),
    "sign": (torch.sign, [0.0]),
    "sigmoid": (lambda x: torch.sigmoid(x) + F.logsigmoid(x) + F.silu(x) + F.softplus(x), [0.0]),
    "huber": (lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"), [-1.0, 1.0, 3.0]),
    "smooth_l1": (lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)), [-1.0, 1.0, 0.0]),
    "powers": (lambda x: (x[:, None] ** torch.arange(5)).sum(), [0.0, 1.0]),
    "prod": (torch.prod, [0.0, 2.0, 3.0]),
    "power_at_zero": (lambda x: x[0] ** x[1], [0.0, 2.0]),
    "xlogy": (lambda x: torch.xlogy(x, 3.0), [0.0]),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_derivative_at_a_kink_is_torchs_and_all_are_finite(name: str) -> None:
    function, point = CONVENTIONS[name]
    x = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    _, slope, curvature = derivatives(function, x.detach())
    np.testing.assert_allclose(slope.sum(0), gradient.numpy(), atol=1e-14)
    assert np.isfinite(curvature).all()


ENTROPIES = {
    "entr": (torch.special.entr, math.inf),
    "xlogy": (lambda x: torch.xlogy(x, x), -math.inf),
    "xlog1py": (lambda x: torch.special.xlog1py(x, x - 1), -math.inf),
    "kl_div": (lambda x: F.kl_div(torch.zeros_like(x), x, reduction="none"), -math.inf),
}


@pytest.mark.parametrize("name", ENTROPIES)
def test_entropies_are_zero_at_zero_and_infinitely_steep(name: str) -> None:
    function, steep = ENTROPIES[name]
    value, slope, _ = derivatives(function, torch.tensor([0.0, 0.3], dtype=torch.float64))
    inside = reference(function, torch.tensor([0.3], dtype=torch.float64))
    np.testing.assert_allclose(value[:, 0], [0.0, inside[0].item()], rtol=1e-15)
    np.testing.assert_allclose(np.diagonal(slope), [steep, inside[1].item()], rtol=1e-15)
    tiny = torch.tensor([1e-200], dtype=torch.float64)
    if name != "xlog1py":
        _, slope, curvature = derivatives(function, tiny)
        np.testing.assert_allclose(slope.item(), math.copysign(1.0, steep) * (-1 - math.log(1e-200)))
        np.testing.assert_allclose(curvature.item(), math.copysign(1e200, -steep))


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_a_parameter_of_zero_leaves_nothing_of_a_logarithm(at: float) -> None:
    """xlogy(p, u) with p = 0 is zero for every u, and so are its derivatives in u."""
    result, (u, p) = lowered(lambda u, p: torch.xlogy(p, u).sum(), torch.ones(2), torch.ones(2), variables=1)
    (f,) = result.outputs
    points = torch.tensor([at, 0.5]), torch.tensor([0.0, 2.0])
    value, slope, curvature = evaluate(
        [f, ca.gradient(f, u), ca.hessian(f, u)[0]], [u, p], *(point.double() for point in points)
    )
    np.testing.assert_allclose(value, [[2 * math.log(0.5)]])
    np.testing.assert_allclose(slope[:, 0], [0.0, 4.0])
    np.testing.assert_allclose(curvature, np.diag([0.0, -8.0]))


def softmax_attention(q: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.T / math.sqrt(q.shape[1]), 1) @ q


def log_cosh_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log(e^x + e^y), where x and y are close."""
    return (x + y) / 2 + torch.log(2 * torch.cosh((x - y) / 2))


def sine_over_angle(x: torch.Tensor) -> torch.Tensor:
    """sin(t) / t with t = pi x, by its series."""
    squared = (math.pi * x).square()
    return sum((-squared) ** k / float(math.factorial(2 * k + 1)) for k in range(12))


TARGET = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
# Smooth functions that torch computes in branches, at the points where those meet, beside a formula without any.
SMOOTH_WHERE_BRANCHES_MEET = {
    "logaddexp": (lambda x: torch.logaddexp(x[:2], x[1]), lambda x: log_cosh_sum(x[:2], x[1]), [0.4, 0.4]),
    "logaddexp2": (
        lambda x: torch.logaddexp2(x[0], x[1]),
        lambda x: log_cosh_sum(*(x * math.log(2))) / math.log(2),
        [-0.7, -0.7],
    ),
    "bce_with_logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, TARGET),
        lambda x: (torch.log(2 * torch.cosh(x / 2)) + x / 2 - TARGET * x).mean(),
        [0.0, 0.0, 0.0],
    ),
    "sinc": (torch.sinc, sine_over_angle, [0.0, 1e-9, -1e-3, 0.3, 1 / math.pi, 0.4]),
    "isfinite": (
        lambda x: torch.where(torch.isfinite(x) & ~torch.isnan(x) & (x == x), x**3, 0),
        lambda x: x**3,
        [0.0, 2.0],
    ),
    "fmod": (lambda x: torch.fmod(x, 10) ** 2, torch.square, [0.0, 3.0]),
    "frac": (lambda x: torch.frac(x) ** 2, torch.square, [0.0, -0.3]),
    "lerp": (lambda x: torch.lerp(x, x**2, x), lambda x: x + x * (x**2 - x), [0.5, 0.1]),
    "xlog1py": (
        lambda x: torch.special.xlog1py(x, 2 * x),
        lambda x: x * torch.log1p(2 * x),
        [0.0, 1.0],
    ),
    "attention": (
        lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 3, 2)] * 3),
        lambda x: softmax_attention(x.reshape(3, 2)),
        [0.0, 0.0, 0.5, 0.5, 0.5, 0.5],
    ),
}


@pytest.mark.parametrize("name", SMOOTH_WHERE_BRANCHES_MEET)
def test_smooth_functions_have_no_kinks_where_their_branches_meet(name: str) -> None:
    function, formula, point = SMOOTH_WHERE_BRANCHES_MEET[name]
    x = torch.tensor(point, dtype=torch.float64)
    result, symbols = lowered(function, x)
    residuals = [evaluate([kink.residual], symbols, x)[0] for kink in result.kinks]
    assert all(residual.all() for residual in residuals)
    assert_matches(function, x, like=formula)


# function, point, operation, residuals there
KINKS = {
    "relu": (torch.relu, [1.0, -2.0], "relu", [1.0, -2.0]),
    "abs": (torch.abs, [1.0, -2.0], "abs", [1.0, -2.0]),
    "leaky_relu": (F.leaky_relu, [1.0, -2.0], "leaky_relu", [1.0, -2.0]),
    "elu": (lambda x: F.elu(x, 0.5), [1.0], "elu", [1.0]),
    "maximum": (lambda x: torch.maximum(x[0], x[1]), [1.0, -2.0], "maximum", [3.0]),
    "minimum": (lambda x: torch.minimum(x[0], x[1]), [1.0, -2.0], "minimum", [3.0]),
    "clamp": (lambda x: x.clamp(-1, 2), [1.0], "clamp", [2.0, -1.0]),
    "norm": (torch.linalg.vector_norm, [3.0, 4.0], "linalg_vector_norm", [5.0]),
    "norm_rows": (
        lambda x: torch.linalg.vector_norm(x.reshape(2, 2), dim=1),
        [3.0, 4.0, 0.0, 2.0],
        "linalg_vector_norm",
        [5.0, 2.0],
    ),
    "norm_1": (lambda x: torch.norm(x, p=1), [3.0, -4.0], "linalg_vector_norm", [3.0, -4.0]),
    "norm_inf": (lambda x: torch.norm(x, p=math.inf), [3.0, -5.0, 1.0], "linalg_vector_norm", [2.0]),
    "amax": (lambda x: x.amax(0), [3.0, -5.0, 1.0], "amax", [2.0]),
    "max_tied": (torch.max, [3.0, -5.0, 3.0], "max", [0.0]),
    "min_dim": (lambda x: x.reshape(2, 2).min(1).values, [3.0, 5.0, 1.0, 7.0], "min", [2.0, 6.0]),
    "sign": (torch.sign, [0.5], "sign", [0.5]),
    "floor": (torch.floor, [0.75, 2.25], "floor", [-0.25, 0.25]),
    "round": (torch.round, [0.75], "round", [0.25]),
    "where": (lambda x: torch.where(x > 1, x, 2 * x - 1), [3.0], "gt", [2.0]),
    "sort": (lambda x: x.sort().values, [3.0, -5.0, 1.0], "sort", [6.0, 2.0]),
    "topk": (lambda x: x.topk(1).values, [3.0, -5.0, 1.0], "topk", [2.0]),
    "eigvalsh": (
        lambda x: torch.linalg.eigvalsh(torch.diag(x)),
        [3.0, -5.0, 1.0],
        "linalg_eigvalsh",
        [6.0, 2.0],
    ),
    "svdvals": (lambda x: torch.linalg.svdvals(torch.diag(x)), [3.0, -5.0], "linalg_svdvals", [2.0, 3.0]),
    "l1_loss": (lambda x: F.l1_loss(x, torch.zeros_like(x)), [3.0, -5.0], "l1_loss", [3.0, -5.0]),
    "hinge": (
        lambda x: F.margin_ranking_loss(x[0], x[1], ONES4[0]),
        [3.0, 1.0],
        "margin_ranking_loss",
        [-2.0],
    ),
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_are_exported(name: str) -> None:
    function, point, operation, residuals = KINKS[name]
    x = torch.tensor(point, dtype=torch.float64)
    result, symbols = lowered(function, x)
    assert {kink.operation for kink in result.kinks} == {operation}
    actual = np.concatenate(evaluate([kink.residual for kink in result.kinks], symbols, x))[:, 0]
    np.testing.assert_allclose(np.abs(actual), np.abs(residuals), atol=1e-14)


def test_residual_of_a_tie_has_the_derivative_of_the_difference() -> None:
    x = torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64)
    result, symbols = lowered(torch.max, x)
    (slope,) = evaluate([ca.jacobian(result.kinks[0].residual, symbols[0])], symbols, x)
    np.testing.assert_array_equal(np.abs(slope), [[1.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, p: F.huber_loss(x[:3], p) + F.smooth_l1_loss(x[:3], p) + F.elu(x).sum(),
        lambda x, p: F.softplus(x).sum() + F.silu(x).sum() + F.gelu(x).sum() + F.mish(x).sum(),
        lambda x, p: x.logsumexp(0) + x.softmax(0).prod() + x.sum() * p.abs().max(),
        lambda x, p: (
            torch.where(p > 0, x[:3], 2 * x[:3]).sum() + p.relu().sum() + p.sort().values[0] * x.sum()
        ),
        lambda x, p: torch.where(torch.tensor([True, False, True]), x[:3], p).sum() + x[:1].max(),
    ],
)
def test_smooth_operations_and_kinks_of_parameters_are_not_exported(function: Callable[..., Any]) -> None:
    result, _ = lowered(lambda x, p: function(x, p), X, U, variables=1)
    assert result.kinks == ()


def test_kink_carries_its_line() -> None:
    graph = traced(lambda x: F.l1_loss(x, torch.zeros_like(x)), X)
    for node in graph.graph.nodes:
        node.meta["source"] = "model.py:12: return F.l1_loss(x, y)"
    (kink,) = lower(graph, [ca.MX.sym("x", 4)], 1).kinks
    assert kink.source == "model.py:12: return F.l1_loss(x, y)"


# ---------------------------------------------------------------------------- extremes and sparsity

STABLE = {
    "logsumexp": lambda x: torch.logsumexp(x, 0),
    "log_softmax": lambda x: torch.log_softmax(x, 0),
    "softmax": lambda x: torch.softmax(x, 0),
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "elu": F.elu,
    "gelu": F.gelu,
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    "log_ndtr": lambda x: torch.special.log_ndtr(x / 30),
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(0)),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize(
    "point", [[1e3, -1e3, 0.0], [-1e3, -1e3, -1e3], [1e3, 1e3, 1e3], [-800.0, -30.0, -1.5]]
)
def test_extremes_are_stable(name: str, point: list[float]) -> None:
    x = torch.tensor(point, dtype=torch.float64)
    value, slope, curvature = derivatives(STABLE[name], x)
    np.testing.assert_allclose(value[:, 0], STABLE[name](x).reshape(-1).numpy(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slope, reference(STABLE[name], x)[1], rtol=1e-9, atol=1e-12)
    assert np.isfinite(curvature).all()


BANDED = torch.diag(torch.ones(50)).double() - torch.diag(torch.ones(49), 1).double()
PATTERNS = {
    "elementwise": (lambda x: torch.sin(x) * torch.exp(x) + F.softplus(x), 50, 50),
    "diff": (torch.diff, 98, 0),
    "banded": (lambda x: BANDED @ x, 99, 0),
    "banded_linear": (lambda x: F.linear(x.reshape(1, 50), BANDED), 99, 0),
    "sum_of_squares": (lambda x: x.square().sum(), 50, 50),
    "residuals": (lambda x: (x[1:] - x[:-1] ** 2).square().sum(), 50, 50 + 2 * 49),
    "moved": (lambda x: x.reshape(5, 10).T.flip(0)[2:], 40, 0),
    "tril": (lambda x: x.reshape(5, 10).tril(), 15, 0),
    "rows": (lambda x: x.reshape(5, 10).square().sum(1), 50, 50),
    "blocks": (lambda x: torch.stack([x[:25].prod(), x[25:].sum()]), 50, 25 * 24),
    "reflected": (lambda x: F.pad(x, (2, 3)), 50, 0),
    "where_fixed": (lambda x: torch.where(torch.arange(50) < 10, x, 1.0), 10, 0),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_jacobians_and_hessians_are_sparse(name: str) -> None:
    function, slopes, curvatures = PATTERNS[name]
    result, (x,) = lowered(function, randn(50))
    (output,) = result.outputs
    assert ca.jacobian(output, x).nnz() == slopes
    assert ca.hessian(ca.sum1(output), x)[0].nnz() == curvatures


@pytest.mark.parametrize(
    ("function", "limit"),
    [
        (lambda x: x.reshape(5, 10), 2),  # nothing moves
        (lambda x: (BANDED @ x).sum(), 10),
        (lambda x: x[10:20] * 2, 4),
    ],
)
def test_expressions_stay_small(function: Callable[..., Any], limit: int) -> None:
    result, _ = lowered(function, randn(50))
    assert ca.n_nodes(result.outputs[0]) <= limit


@pytest.mark.parametrize("at", [-8.0, -0.3, 0.4, 0.6, 3.0, 8.0, 20.0])
def test_small_tails_keep_all_digits(at: float) -> None:
    """1 - erf(x) has no digit of erfc left at 6; values and first two derivatives relative to themselves."""
    x = torch.tensor([at], dtype=torch.float64)
    for function in (torch.erfc, torch.special.erfcx, torch.special.log_ndtr):
        for mine, right in zip(derivatives(function, x), reference(function, x), strict=True):
            np.testing.assert_allclose(mine, right, rtol=1e-9, atol=1e-15)
    mine = derivatives(lambda x: 2 * torch.special.ndtr(-math.sqrt(2) * x), x)[0]
    np.testing.assert_allclose(mine.ravel(), torch.erfc(x), rtol=1e-12)


def test_what_torch_itself_writes_into_memory_it_made_is_followed() -> None:
    """vander and circular padding fill an empty tensor in place, out of torch.func.functionalize's sight."""
    powers = [3, 2, 1, 0]
    assert_matches(
        lambda x: torch.vander(x, 4).sum(0), X, like=lambda x: torch.stack([x**k for k in powers], 1).sum(0)
    )


PACKED = torch.tensor([[4.0, 0, 0], [1, 3, 0], [0.5, 0.2, 2]], dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        torch.linalg.eigvalsh,
        lambda m: torch.linalg.eigvalsh(m.mT, UPLO="U"),
        lambda m: torch.linalg.cholesky(m).diagonal(),
        lambda m: torch.linalg.cholesky(m.mT, upper=True).diagonal(),
    ],
)
def test_one_triangle_is_read_as_torch_reads_it(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The value is that of the triangle; of parameters the derivative is shared by both, of variables it is true."""
    p = ca.MX.sym("p", 9)
    graph = traced(lambda z, m: function(m), torch.zeros(1), PACKED)
    (output,) = lower(graph, [ca.MX.sym("z", 1), p], 1).outputs
    evaluated = ca.Function("f", [p], [output, ca.jacobian(output, p)])
    value, slope = (v.full() for v in evaluated(PACKED.reshape(-1).numpy()))
    np.testing.assert_allclose(value.ravel(), function(PACKED), rtol=1e-12)
    np.testing.assert_allclose(slope, jacobian(function, PACKED).reshape(3, 9), atol=1e-9)

    rows, columns = torch.tril_indices(3, 3)
    at = PACKED[rows, columns]

    def packed(v: torch.Tensor) -> torch.Tensor:
        return function(torch.zeros(3, 3, dtype=torch.float64).index_put((rows, columns), v))

    def whole(v: torch.Tensor) -> torch.Tensor:
        lower = torch.zeros(3, 3, dtype=torch.float64).index_put((rows, columns), v)
        return function(lower + lower.tril(-1).mT)

    for mine, right in zip(derivatives(packed, at), reference(whole, at), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("function", [
    lambda x: torch.where(torch.isnan(x.log()), 0.0, x),
    lambda x: torch.where(torch.isinf(1 / x), 5.0, x),
    lambda x: torch.where(torch.isfinite(x.sqrt()), x, 0.0),
    lambda x: x % 0.1,
    lambda x: x % -0.1,
    lambda x: torch.fmod(x, 0.1),
    lambda x: torch.div(x, 0.1, rounding_mode="floor"),
    lambda x: torch.div(x, -0.1, rounding_mode="floor"),
    lambda x: torch.std_mean(0 * x)[0] + x,
])  # fmt: skip
def test_values_at_special_points_are_those_of_torch(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 0.7, 7.0, 0.9, -0.3, 0.05], dtype=torch.float64)
    result, symbols = lowered(function, x)
    (found,) = evaluate(list(result.outputs), symbols, x)
    np.testing.assert_allclose(found.ravel(), function(x), atol=1e-15)
