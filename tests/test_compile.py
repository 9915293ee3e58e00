"""torch.compile of models that contain a layer: equal to eager, or refused by name."""

from __future__ import annotations

import copy
import gc
import shutil
import threading
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

import ddn_solvers as ddn
from ddn_solvers.kkt.derivative import Linearisation
from ddn_solvers.search import Search

# torch itself warns about itself while it compiles, differently from version to version.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.*"),
]
CXX = shutil.which("g++") or shutil.which("clang++")
f64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(model: Any, backend: str = "aot_eager", fullgraph: bool = True, **options: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=fullgraph, **options)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def ball(**fields: Any) -> ddn.Problem:
    """The point of a ball that is nearest to x, seen from a corner; solutions on and inside of the ball."""
    return ddn.Problem(
        variables={"u": (3,)},
        parameters={"x": (3,), "r": ()},
        objective=lambda u, x: 0.5 * (u - x).square().sum() + 0.1 * u.pow(4).sum(),
        inequality={"ball": lambda u, r: u.square().sum() - r**2},
        bounds={"u": (-1.0, None)},
        **fields,
    )


class Model(nn.Module):
    """A layer between two others."""

    def __init__(self, layer: ddn.DeclarativeLayer) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(4, 3), layer, nn.Linear(3, 2)
        self.double()

    def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(self.before(x), r)).tanh()


def gradients(function: Any, inputs: list[torch.Tensor], parameters: Any = ()) -> Any:
    """Value of the function and gradients of a weighted sum of it, in inputs and parameters."""
    value = function(*inputs)
    total = sum(((1.0 + torch.arange(v.numel()).reshape(v.shape)) * v).sum() for v in _tuple(value))
    wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
    return value, torch.autograd.grad(total, wanted)


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_equal(eager: Any, found: Any, inputs: list[torch.Tensor], parameters: Any = (), tolerance=1e-12):
    parameters = list(parameters)
    expected, expected_gradients = gradients(eager, inputs, parameters)
    value, value_gradients = gradients(found, inputs, parameters)
    for one, two in zip(_tuple(value), _tuple(expected), strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    assert len(value_gradients) == len(expected_gradients) > 0
    for one, two in zip(value_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    assert any(g.abs().max() > 1e-3 for g in value_gradients)


def inputs(*batch: int, dtype: torch.dtype = f64) -> list[torch.Tensor]:
    x = (2 * torch.randn(*batch, 4, dtype=dtype)).requires_grad_()
    return [x, torch.tensor(1.2, dtype=dtype, requires_grad=True)]


# -- what works ---------------------------------------------------------------------------------------


def test_without_aot_autograd():
    """Backend "eager": autograd itself calls the operators' formulas."""
    layer = ddn.DeclarativeLayer(ball())
    x = torch.randn(4, 3, dtype=f64, requires_grad=True)
    assert_equal(layer, compiled(layer, "eager"), [x, inputs()[1]])


@pytest.mark.skipif(not CXX, reason="inductor needs a C++ compiler")
def test_inductor():
    """The default backend: values, gradients, another batch size, an error and a second order."""
    layer = ddn.DeclarativeLayer(ball())
    model = Model(layer)
    found = compiled(model, "inductor", dynamic=True)
    for size in (5, 7):
        assert_equal(model, found, inputs(size), model.parameters())
    with pytest.raises(ddn.ProblemError, match="'x' is not finite"):
        found(inputs(3)[0] * torch.nan, R)
    x, r = inputs(3)
    value = found(x, r).sum()
    with pytest.raises((ddn.SensitivityError, RuntimeError), match="create_graph"):  # torch may be first
        torch.autograd.grad(value, x, create_graph=True)


def test_batches_of_every_size_share_two_graphs():
    model = Model(ddn.DeclarativeLayer(ball()))
    found = compiled(model)
    for size in (4, 5, 9, 2, 17):
        assert_equal(model, found, inputs(size), model.parameters())
    assert graphs() <= 2


@pytest.mark.parametrize(("batch", "radii"), [((), ()), ((1,), (1,)), ((2, 3), ()), ((2, 1, 3), (4, 1))])
def test_batch_dimensions(batch, radii):
    layer = ddn.DeclarativeLayer(ball())
    x = torch.randn(*batch, 3, dtype=f64, requires_grad=True)
    r = (1.0 + torch.rand(radii, dtype=f64)).requires_grad_()
    assert_equal(layer, compiled(layer), [x, r])


def test_float32():
    model = Model(ddn.DeclarativeLayer(ball())).float()
    assert_equal(model, compiled(model), inputs(4, dtype=torch.float32), model.parameters(), tolerance=1e-6)


def test_numbers_names_and_several_variables():
    layer = ddn.DeclarativeLayer(
        ddn.Problem(
            variables={"u": (2, 2), "t": ()},
            parameters={"a": (2, 2), "b": ()},
            objective=lambda u, t, a, b: (u - a).square().sum() + (t - b * u.sum()).square() + 0.5 * t**2,
            bounds={"t": (0.0, None)},
        )
    )
    a = torch.randn(3, 2, 2, requires_grad=True)  # float32, and the number must not make it float64
    found = compiled(lambda a: layer(b=0.3, a=a))
    assert_equal(lambda a: layer(b=0.3, a=a), found, [a], tolerance=1e-6)


def test_a_problem_without_parameters():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=f64))
    layer = ddn.DeclarativeLayer(
        {
            "variables": {"u": (2,)},
            "objective": lambda u: (u - weight).square().sum(),
            "bounds": {"u": (0.0, None)},
        }
    )
    assert_equal(layer, compiled(layer), [], [weight])


POLICIES = {
    "mean": ddn.Policy(weakly_active="mean"),
    "inactive": ddn.Policy(weakly_active="inactive"),
    "clarke": ddn.Policy(nonsmooth="clarke"),
    "smoothed": ddn.Policy(smoothing=1e-3),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_kinks_and_weakly_active_bounds(policy):
    lasso = ddn.DeclarativeLayer(
        ddn.Problem(
            variables={"u": (3,)},
            parameters={"x": (3,)},
            objective=lambda u, x: 0.5 * (u - x).square().sum() + u.abs().sum(),
            bounds={"u": (None, 1.0)},
        ),
        policy=POLICIES[policy],
    )
    x = torch.tensor([[0.5, -3.0, 2.0], [1.4, 4.0, -0.1]], dtype=f64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)
        assert_equal(lasso, compiled(lasso), [x])


def test_a_weakly_active_norm_may_be_refused():
    layer = ddn.DeclarativeLayer(
        ddn.Problem(
            variables={"u": (2,)},
            parameters={"x": (2,)},
            objective=lambda u, x: 0.5 * (u - x).square().sum() + u.norm(),
        ),
        policy=ddn.Policy(weakly_active="raise"),
    )
    x = torch.tensor([0.6, 0.8], dtype=f64, requires_grad=True)
    for function in (layer, compiled(layer)):
        value = function(x).sum()
        with pytest.raises(ddn.SensitivityError, match="weakly active"):
            value.backward()


def test_training_follows_eager_step_by_step():
    net = nn.Linear(3, 3, dtype=f64)
    layer = ddn.DeclarativeLayer(
        ddn.Problem(
            variables={"u": (3,)},
            parameters={"x": (3,)},
            objective=lambda u, x: (u - net(x)).square().sum() + u.sum(),
            inequality={"ball": lambda u: u.square().sum() - 2},
        )
    )
    target = torch.randn(6, 3, dtype=f64)
    x = torch.randn(6, 3, dtype=f64)

    def train(model: nn.Module, step: Any) -> list[torch.Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (step(x) - target).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in model.parameters())]

    twin = copy.deepcopy(layer)
    for one, two in zip(train(twin, compiled(twin)), train(layer, layer), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert graphs() == 1


def test_captured_tensors_of_every_kind():
    closure = torch.tensor([0.3, -0.2, 0.1], dtype=f64, requires_grad=True)
    constant = torch.tensor([1.0, 2.0, 3.0], dtype=f64)
    holder = {"scale": nn.Parameter(torch.tensor(2.0, dtype=f64))}
    layer = ddn.DeclarativeLayer(
        ddn.Problem(
            variables={"u": (3,)},
            parameters={"x": (3,)},
            objective=lambda u, x: (
                ((u - x).square() * constant).sum() * holder["scale"] + (closure * u).sum()
            ),
            inequality={"ball": lambda u: u.square().sum() - 1},
        )
    )
    found = compiled(layer)
    x = torch.randn(2, 3, dtype=f64, requires_grad=True)
    assert_equal(layer, found, [x], [closure, holder["scale"]])
    constant.mul_(2)
    assert_equal(layer, found, [x], [closure, holder["scale"]])
    closure = torch.tensor([-0.3, 0.4, 0.0], dtype=f64, requires_grad=True)
    assert_equal(layer, found, [x], [closure, holder["scale"]])


def test_a_changed_constant_between_forward_and_backward_does_not_reach_the_backward():
    scale = [1.0]
    layer = ddn.DeclarativeLayer(
        {
            "variables": {"u": ()},
            "parameters": {"x": ()},
            "objective": lambda u, x: u**4 + (u - scale[0] * x).square(),
        }
    )
    x = torch.tensor(1.5, dtype=f64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x), x)
    y = compiled(layer)(x)
    scale[0] = 3.0
    layer.policy = ddn.Policy(on_singular="raise")
    layer(x)
    (gradient,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_a_rebound_module_is_named_and_then_taken():
    nets = [nn.Linear(3, 3, dtype=f64), nn.Linear(3, 3, dtype=f64)]
    net = nets[0]
    layer = ddn.DeclarativeLayer(
        {
            "variables": {"u": (3,)},
            "parameters": {"x": (3,)},
            "objective": lambda u, x: (u - net(x)).square().sum(),
        }
    )
    found, x = compiled(layer), torch.randn(2, 3, dtype=f64, requires_grad=True)
    assert_equal(layer, found, [x], net.parameters())
    net = nets[1]
    with pytest.raises(ddn.TraceError, match=r"now: net.*compiles anew"):
        found(x)
    assert_equal(layer, found, [x], net.parameters())


class OnItself(nn.Module):
    """Holds the layer whose problem is made of it, and reads other weights in other modes."""

    def __init__(self) -> None:
        super().__init__()
        self.training_weight, self.weight = (
            nn.Parameter(torch.randn(3, dtype=f64)),
            nn.Parameter(torch.randn(3, dtype=f64)),
        )
        self.layer = ddn.DeclarativeLayer(
            {"variables": {"u": (3,)}, "parameters": {"x": (3,)}, "objective": self.objective}
        )

    def objective(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight = self.training_weight if self.training else self.weight
        return (u - weight * x).square().sum() + 0.1 * u.pow(4).sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh()


def test_a_model_that_holds_the_layer_made_of_it():
    model = OnItself()
    found, x = compiled(model), torch.randn(2, 3, dtype=f64, requires_grad=True)
    assert_equal(model, found, [x], [model.training_weight])
    assert graphs() == 1


def test_a_mode_set_before_the_first_call_is_seen():
    """It was a TraceError: a graph was made for what was captured when the layer was made."""
    model = OnItself().eval()
    found, x = compiled(model), torch.randn(2, 3, dtype=f64, requires_grad=True)
    assert_equal(model, found, [x], [model.weight])


def test_a_mode_that_asks_for_other_tensors_is_named_and_then_taken():
    model = OnItself()
    found, x = compiled(model), torch.randn(2, 3, dtype=f64, requires_grad=True)
    assert_equal(model, found, [x], [model.training_weight])
    model.eval()
    with pytest.raises(ddn.TraceError, match=r"now: x, self\.weight.*compiles anew"):
        found(x)
    assert_equal(model, found, [x], [model.weight])


def test_the_mode_of_a_captured_module_is_seen():
    net = nn.Linear(3, 3, dtype=f64)
    layer = ddn.DeclarativeLayer(
        {
            "variables": {"u": (3,)},
            "parameters": {"x": (3,)},
            "objective": lambda u, x: (u - net(x) * (2.0 if net.training else 1.0)).square().sum(),
        }
    )
    found, x = compiled(layer), torch.randn(2, 3, dtype=f64, requires_grad=True)
    assert_equal(layer, found, [x], net.parameters())
    layer.eval()
    assert_equal(layer, found, [x], net.parameters())
    torch.testing.assert_close(found(x), net(x), rtol=1e-9, atol=1e-9)


def test_a_changed_number_of_constraints_is_named_and_then_taken():
    planes = [torch.tensor([1.0, 1.0], dtype=f64)]
    layer = ddn.DeclarativeLayer(
        {
            "variables": {"u": (2,)},
            "parameters": {"x": (2,)},
            "objective": lambda u, x: (u - x).square().sum(),
            "inequality": lambda u: torch.stack([u @ plane for plane in planes]),
        }
    )
    found, x = compiled(layer), torch.tensor([[1.0, 2.0]], dtype=f64, requires_grad=True)
    assert_equal(layer, found, [x])
    planes.append(torch.tensor([-1.0, 2.0], dtype=f64))
    with pytest.raises(ddn.TraceError, match="compiles anew"):
        found(x)
    x = torch.tensor([[1.0, 2.0], [0.5, -3.0]], dtype=f64, requires_grad=True)
    assert_equal(layer, found, [x])


def test_an_empty_batch():
    layer = ddn.DeclarativeLayer(ball())
    x = torch.randn(0, 3, dtype=f64, requires_grad=True)
    value, (gradient,) = gradients(lambda x: compiled(layer)(x, R), [x])
    assert value.shape == gradient.shape == (0, 3)


def test_two_layers_in_one_model():
    one, two = ddn.DeclarativeLayer(ball()), ddn.DeclarativeLayer(ball())

    def chained(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return two(one(x, r) + x, 2 * r)

    x = torch.randn(4, 3, dtype=f64, requires_grad=True)
    assert_equal(chained, compiled(chained), [x, inputs(1)[1]])


def test_copies_of_a_model_share_compiled_code_and_keep_their_own_weights():
    net = nn.Linear(3, 3, dtype=f64)
    layer = ddn.DeclarativeLayer(
        {
            "variables": {"u": (3,)},
            "parameters": {"x": (3,)},
            "objective": lambda u, x: (u - net(x)).square().sum(),
        }
    )
    x = torch.randn(2, 3, dtype=f64, requires_grad=True)
    copies = [copy.deepcopy(layer) for _ in range(12)]
    for twin in copies:
        with torch.no_grad():
            for weight in twin.parameters():
                weight.normal_()
        assert_equal(twin, compiled(twin), [x], twin.parameters())
    assert graphs() <= 2


def test_functional_call_and_vanished_layers():
    model = Model(ddn.DeclarativeLayer(ball()))
    weights = {k: torch.randn_like(v).requires_grad_() for k, v in model.named_parameters()}

    def functional(x, r):
        return torch.func.functional_call(model, weights, (x, r))

    assert_equal(functional, compiled(functional), inputs(3), weights.values())
    layer = ddn.DeclarativeLayer(ball())
    x = torch.randn(3, dtype=f64, requires_grad=True)
    y = compiled(lambda x, layer: layer(x, torch.tensor(1.0)))(x, layer)
    torch._dynamo.reset()
    del layer
    gc.collect()
    with pytest.raises(ddn.SensitivityError, match="layer no longer exists"):
        y.sum().backward()


# -- how much is done ---------------------------------------------------------------------------------


def test_no_second_solve_and_one_linearisation(monkeypatch):
    counts = {"find": 0, "vjp": 0}
    for cls, name in ((Search, "find"), (Linearisation, "vjp")):
        original = getattr(cls, name)

        def counting(self, *arguments, original=original, name=name):
            counts[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(cls, name, counting)
    model = Model(ddn.DeclarativeLayer(ball()))
    found = compiled(model)
    y = found(*inputs(3))
    assert counts == {"find": 1, "vjp": 0}
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert counts == {"find": 1, "vjp": 2}
    with torch.no_grad():
        expected = model(*inputs(3))
        assert not found(*inputs(3)).requires_grad
    assert expected.shape == (3, 2)
    assert counts == {"find": 3, "vjp": 2}


def test_newton_steps_come_first_as_in_eager(monkeypatch):
    """A quadratic program without sides needs no backend; compiled code had asked one."""
    layer = ddn.DeclarativeLayer(
        ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - x).square().sum(), {"sum": lambda u: u.sum()})
    )

    def no_backend(*_: Any) -> Any:
        raise AssertionError("a backend was asked")

    monkeypatch.setattr(Search, "_call", no_backend)
    x = torch.randn(2, 3, dtype=f64)
    torch.testing.assert_close(compiled(layer)(x), x - x.mean(1, keepdim=True))


def test_accumulation_and_saved_tensors_that_are_moved():
    model = Model(ddn.DeclarativeLayer(ball()))
    found = compiled(model)
    x, r = inputs(3)

    def accumulated(function: Any) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            first = function(x, r)
        second = function(x.flip(0), r)
        second.sum().backward()
        first.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for one, two in zip(accumulated(found), accumulated(model), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_checkpointing_inside_compiled_code():
    model = Model(ddn.DeclarativeLayer(ball()))

    def checkpointed(x, r):
        return torch.utils.checkpoint.checkpoint(model, x, r, use_reentrant=False)

    assert_equal(model, compiled(checkpointed), inputs(3), model.parameters())


def test_threads():
    model = Model(ddn.DeclarativeLayer(ball()))
    found = compiled(model)
    given = [inputs(4) for _ in range(8)]
    expected = [gradients(model, g) for g in given]
    found(*given[0])
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = gradients(found, given[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (value, grads) in enumerate(expected):
        torch.testing.assert_close(results[i][0], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(results[i][1], grads, rtol=1e-12, atol=1e-12)


# -- failures and policies ----------------------------------------------------------------------------


def halfway(on_failure: str = "raise") -> ddn.DeclarativeLayer:
    """Infeasible where x < 1: 1 <= u <= x."""
    return ddn.DeclarativeLayer(
        ddn.Problem(
            variables={"u": ()},
            parameters={"x": ()},
            objective=lambda u, x: (u - 2 * x).square(),
            bounds={"u": (1.0, "x")},
        ),
        policy=ddn.Policy(on_failure=on_failure),
    )


def test_a_solve_error_comes_out_of_compiled_code():
    found = compiled(halfway())
    x = torch.tensor([[2.0, 3.0], [0.5, 4.0]], dtype=f64, requires_grad=True)
    with pytest.raises(ddn.SolveError, match=r"1 of 4 samples .* sample 2: infeasible") as caught:
        found(x)
    solution = caught.value.solution
    assert solution.converged.tolist() == [[True, True], [False, True]]
    assert found(x + 1).shape == (2, 2)


@pytest.mark.parametrize("on_failure", ["nan", "mask"])
def test_failed_samples_follow_the_policy(on_failure):
    layer = halfway(on_failure)
    found = compiled(layer)
    for values in ([2.0, 0.5, 3.0], [0.5, 0.2, 0.1]):
        x = torch.tensor(values, dtype=f64, requires_grad=True)
        value, (gradient,) = gradients(found, [x])
        expected, (wanted,) = gradients(layer, [x])
        torch.testing.assert_close(value, expected, equal_nan=True)
        torch.testing.assert_close(gradient, wanted, equal_nan=True)


def test_warnings_and_refusals_of_a_derivative():
    def flat(**policy: Any) -> ddn.DeclarativeLayer:
        return ddn.DeclarativeLayer(
            {
                "variables": {"u": (2,)},
                "parameters": {"x": ()},
                "objective": lambda u, x: (u.sum() - x).square(),
            },
            policy=ddn.Policy(**policy),
        )

    x = torch.tensor(1.0, dtype=f64, requires_grad=True)
    layer = flat()
    y = compiled(layer)(x).sum()
    with pytest.warns(ddn.DegeneracyWarning, match="minimum-norm"):
        (gradient,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(gradient, torch.tensor(1.0, dtype=f64))
    layer = flat(on_singular="raise")
    y = compiled(layer)(x).sum()
    with pytest.raises(ddn.SensitivityError, match="singular"):
        y.backward()
    layer = halfway("warn")
    found = compiled(layer)
    with pytest.warns(ddn.ConvergenceWarning, match="1 of 2 samples"):
        found(torch.tensor([0.5, 2.0], dtype=f64))


def test_functions_that_are_torch_callbacks():
    layer = ddn.DeclarativeLayer(
        {
            "variables": {"u": (2,)},
            "parameters": {"x": (2,)},
            "objective": lambda u, x: (u - x).square().sum() + torch.special.i0(u).sum(),
        },
        solver="scipy:SLSQP",
    )
    x = torch.randn(2, 2, dtype=f64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.FallbackWarning)
        assert_equal(layer, compiled(layer), [x])


# -- what is refused ----------------------------------------------------------------------------------


X = torch.tensor([[0.5, -2.0, 1.0]], dtype=f64)
R = torch.tensor(1.0, dtype=f64)


def _double(layer: ddn.DeclarativeLayer) -> Any:
    return lambda x: 2 * layer(x, R)


OUTSIDE = {
    "layer.solve": lambda layer: lambda x: layer.solve(x, R)["u"] * 2,
    "ddn.solve": lambda layer: lambda x: ddn.solve(layer.problem, {"x": x, "r": R})["u"] * 2,
    "initial": lambda layer: lambda x: layer(x, R, initial=x) * 2,
    "policy": lambda layer: lambda x: layer(x, R, policy=ddn.Policy(on_failure="nan")) * 2,
    "warm_start": lambda layer: lambda x: layer(x, R, warm_start=layer.solve(X, R)) * 2,
    "a layer that warm starts": lambda layer: _double(ddn.DeclarativeLayer(layer.problem, warm_start=True)),
    "torch.func.grad": lambda layer: torch.func.grad(lambda x: layer(x, R).sin().sum()),
    "torch.func.jvp": lambda layer: lambda x: torch.func.jvp(lambda x: layer(x, R), (x,), (x,))[1],
    "torch.func.jacrev": lambda layer: torch.func.jacrev(lambda x: layer(x, R)),
    "torch.func.vmap": lambda layer: torch.func.vmap(lambda x: layer(x, R)),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_needs_eager_says_so_and_gets_it(case):
    layer = ddn.DeclarativeLayer(ball())
    function = OUTSIDE[case](layer)
    expected = function(X)
    torch.testing.assert_close(compiled(function, fullgraph=False)(X), expected, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ddn_solvers: what compiled code can hold"):
        compiled(function)(X)


def test_forward_mode_is_never_silent():
    layer = ddn.DeclarativeLayer(ball())

    found, strict = compiled(lambda x: layer(x, R), fullgraph=False), compiled(lambda x: layer(x, R))
    strict(X)
    found(X)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        expected = torch.autograd.forward_ad.unpack_dual(layer(dual, R)).tangent
        tangent = torch.autograd.forward_ad.unpack_dual(found(dual)).tangent
        with pytest.raises(torch._dynamo.exc.Unsupported, match="forward-mode"):
            strict(dual)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_second_order_raises(backend):
    """Of exp, AOTAutograd saves nothing that requires a gradient: by itself it would drop the second term."""
    layer = ddn.DeclarativeLayer(ball())
    x = X.clone().requires_grad_()
    value = compiled(lambda x: layer(x.exp(), R).sin().sum(), backend)(x)

    def penalised() -> Any:
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(gradient.sum() + value, x)

    with pytest.raises(ddn.SensitivityError, match=r"no second derivative.*eager"):
        penalised()


def test_wrong_parameters_are_named():
    layer = ddn.DeclarativeLayer(ball())
    for wrong in (lambda x: layer(x[:, :2], R), lambda x: layer(x)):
        with pytest.raises(ddn.ProblemError, match=r"parameter '[xr]'"):
            compiled(wrong, fullgraph=False)(X)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"ProblemError.*parameter '[xr]'"):
            compiled(wrong)(X)
    with pytest.raises(ddn.ProblemError, match="'x' is not finite"):
        compiled(layer)(X * torch.nan, R)


def test_export_is_refused():
    model = Model(ddn.DeclarativeLayer(ball()))
    with pytest.raises(ddn.TraceError, match=r"torch\.export"):
        torch.export.export(model, (X.new_ones(2, 4), R))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"TraceError.*torch\.export"):
        torch.export.export(model, (X.new_ones(2, 4), R), strict=True)
