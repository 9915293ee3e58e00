"""The trace: one graph for all functions, whole operations where it can, nothing baked in that may change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.trace import operation_name, trace

D = torch.float64
MASK = torch.tensor([True, False, True])


def declare(objective: Callable[..., torch.Tensor]) -> ddn.Problem:
    return ddn.Problem(variables={"u": (3,)}, parameters={"x": (3,)}, objective=objective)


def in_place(u: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(3, dtype=D)
    y[1] = u[0]
    y += u
    return y.square().sum()


COMPILED = {
    "mask-made-inside": lambda u: u[torch.tensor([True, False, True])].square().sum(),
    "mask-captured": lambda u: u[MASK].square().sum(),
    "constant-made-inside": lambda u: (u * torch.tensor([1.0, 2.0, 3.0])).square().sum(),
    "float32-inside": lambda u: (u + torch.ones(3)).square().sum(),
    "in-place": in_place,
    "grad-inside": lambda u: torch.func.grad(lambda v: v.pow(3).sum())(u).sum(),
    "vmap-inside": lambda u: torch.func.vmap(lambda v: v.square())(u).sum(),
}


@pytest.mark.parametrize("objective", COMPILED.values(), ids=COMPILED)
def test_compiles_and_equals_torch(objective: Callable[..., torch.Tensor]) -> None:
    """No FallbackWarning (warnings are errors), value and gradient as torch has them."""
    program = ddn.compile(declare(objective)).program
    assert program.compiled
    u = torch.tensor([0.3, -1.2, 2.0], dtype=D)
    first = program.first_order(u.numpy()[None], (np.zeros(3),))
    torch.testing.assert_close(torch.from_numpy(first.objective)[0], objective(u).to(D), rtol=1e-12, atol=0)
    expected = torch.func.grad(objective)(u)
    torch.testing.assert_close(torch.from_numpy(first.gradient)[0], expected.to(D), rtol=1e-12, atol=1e-12)


def test_composite_operations_stay_whole() -> None:
    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (
            torch.logsumexp(u, 0) + u.square().sum() + torch.linalg.vector_norm(u - x) + torch.relu(u).sum()
        )

    module = trace(declare(objective)).module
    assert module is not None
    names = {operation_name(node) for node in module.graph.nodes if node.op == "call_function"}
    assert {"logsumexp", "square", "linalg_vector_norm", "relu"} <= names


def test_nodes_carry_the_users_line() -> None:
    module = trace(declare(lambda u: u.exp().sum())).module
    assert module is not None
    sources = [node.meta["source"] for node in module.graph.nodes if operation_name(node) == "exp"]
    assert sources
    assert all(source.startswith("test_trace.py:") for source in sources)


def test_a_problem_is_compiled_once() -> None:
    problem = declare(lambda u, x: (u - x).square().sum())
    assert ddn.compile(problem).program is ddn.compile(problem).program


def test_states_of_what_is_captured_are_kept_side_by_side() -> None:
    """Switching back and forth, as train() and eval() do, traces each state once."""
    dropout = torch.nn.Dropout(0.5).eval()
    scale = 1.0
    problem = declare(lambda u, x: (dropout(u) - scale * x).square().sum())
    one = ddn.compile(problem).program
    scale = 2.0
    two = ddn.compile(problem).program
    scale = 1.0
    assert ddn.compile(problem).program is one
    assert two is not one


LAYERS = {
    "attention": lambda: torch.nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True, dtype=D),
    "encoder": lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, 0.1, "gelu", batch_first=True, dtype=D),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_dropout_are_refused_in_training_and_compiled_in_evaluation(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        u = u[None]
        out = layer(u, u, u, need_weights=False)[0] if name == "attention" else layer(u)
        return (u - x).square().sum() + 0.1 * out.square().sum()

    problem = ddn.Problem({"u": (3, 4)}, {"x": (3, 4)}, objective)
    with pytest.raises(ddn.TraceError, match="draws random numbers"):
        ddn.compile(problem)
    layer.eval()
    x = torch.linspace(-1, 1, 12, dtype=D).reshape(3, 4).requires_grad_()
    solution = ddn.solve(problem, {"x": x})
    assert solution.certificate.ok
    u = solution["u"].detach()
    weight = next(layer.parameters())
    slope = torch.func.grad(objective)(u, x.detach())
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)
    (by_weight,) = torch.autograd.grad(solution.objective, weight)
    (expected,) = torch.autograd.grad(objective(u, x.detach()), weight)
    torch.testing.assert_close(by_weight, expected, rtol=0, atol=1e-6)


def test_a_failing_function_is_told_in_one_error_and_not_in_torchs_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ddn.ProblemError, match=r"test_trace\.py:\d+"):
        ddn.compile(declare(lambda u, x: (u - x[:2]).sum()))
    assert capfd.readouterr().err == ""


def test_no_grad_inside_matters_only_for_what_depends_on_arguments() -> None:
    def constant(u: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = torch.arange(3, dtype=D)
        return (weight * u).square().sum()

    assert ddn.compile(declare(constant)).program.compiled


def test_evaluating_the_graph_leaves_the_grad_mode_alone() -> None:
    def switching(u: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = torch.ones(3, dtype=D)
        return (weight * u).sum()

    program = ddn.compile(declare(switching)).program
    with torch.no_grad():
        program.evaluate(torch.zeros(3, dtype=D), (torch.zeros(3, dtype=D),))
        assert not torch.is_grad_enabled()
