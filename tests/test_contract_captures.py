"""What functions capture: never stale, always differentiable, owned by the layer that captured it."""

import collections
import copy
import decimal
import enum
import fractions
import functools
import io
import pickle
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import ddn_solvers as ddn
from ddn_solvers.program import compile_program

D = torch.float64
SOLVERS = ("scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt")
X = torch.tensor([1.5, -2.0, 0.25], dtype=D)


def distance(target):
    """argmin |u - target()|^2: the solution is what the function sees of its captures."""
    return ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - target() * x).square().sum())


def seen(problem, **keywords):
    """By how much the captures scaled x."""
    return float((ddn.solve(problem, {"x": X}, solver="scipy:SLSQP", **keywords)["u"].detach() / X).mean())


# -- nothing goes stale ----------------------------------------------------------------------------------

GLOBAL = 1.0


class Holder:
    def __init__(self, value=1.0):
        self.value = value

    def get(self):
        return self.value

    def get_global(self):
        return GLOBAL


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value=1.0):
        self.value = value


class Settings:
    value: ClassVar[float] = 1.0


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = [1.0]

    def forward(self):
        return self.scales[0]


class ReadsGlobal(nn.Module):
    def forward(self):
        return GLOBAL


class Scale(nn.Module):
    def __init__(self, value=1.0, dtype=D):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value, dtype=dtype))

    def forward(self):
        return self.weight


class Flagged(nn.Module):
    def forward(self):
        return 2.0 if self.training else 1.0


def make(value):
    return lambda: value


def tensor(value, **keywords):
    return torch.tensor(float(value), dtype=D, **keywords)


def rebinding(make_value, read):
    """A change that binds the captured name anew."""

    def case():
        cell = make_value(1.0)

        def target():
            return read(cell)

        def change():
            nonlocal cell
            cell = make_value(2.0)

        return target, change

    return case


def changing(build, read, change):
    """A change inside the captured object."""

    def case():
        held = build()
        return (lambda: read(held)), (lambda: change(held))

    return case


def global_case():
    def change():
        globals()["GLOBAL"] = 2.0

    return (lambda: GLOBAL), change


def global_in_module_case():
    net = ReadsGlobal()
    return (lambda: net()), global_case()[1]


def global_in_method_case():
    held = Holder()
    return held.get_global, global_case()[1]


def class_attribute_case():
    def change():
        Settings.value = 2.0

    return (lambda: Settings.value), change


def numpy_tensor():
    array = np.array(1.0)
    return array, torch.from_numpy(array)


def write_numpy(pair):
    pair[0][...] = 2.0


def no_grad_copy(weight):
    with torch.no_grad():
        weight.copy_(tensor(2.0))


CHANGES = {
    "rebind-number": rebinding(float, lambda v: v),
    "rebind-numpy-number": rebinding(np.float32, lambda v: float(v)),
    "rebind-numpy-array": rebinding(lambda v: np.full(3, v), torch.as_tensor),
    "rebind-tensor": rebinding(tensor, lambda v: v),
    "rebind-leaf": rebinding(lambda v: tensor(v, requires_grad=True), lambda v: v),
    "rebind-parameter": rebinding(lambda v: nn.Parameter(tensor(v)), lambda v: v),
    "rebind-shape": rebinding(lambda v: torch.full((3,) if v > 1 else (), v, dtype=D), lambda v: v),
    "rebind-dtype": rebinding(lambda v: torch.tensor(v, dtype=D if v > 1 else torch.float32), lambda v: v),
    "rebind-module": rebinding(Scale, lambda net: net()),
    "rebind-other-module": rebinding(lambda v: Scale() if v == 1 else nn.Sequential(Scale(2.0)),
                                     lambda net: net() if isinstance(net, Scale) else net[0]()),
    "rebind-function": rebinding(make, lambda f: f()),
    "rebind-partial": rebinding(lambda v: functools.partial(float, v), lambda f: f()),
    "rebind-bound-method": rebinding(lambda v: Holder(v).get, lambda f: f()),
    "rebind-object": rebinding(Holder, lambda o: o.value),
    "rebind-slotted-object": rebinding(Slotted, lambda o: o.value),
    "rebind-tuple": rebinding(lambda v: (0.0, v), lambda t: t[1]),
    "rebind-namespace": rebinding(lambda v: types.SimpleNamespace(a=types.SimpleNamespace(b=v)), lambda n: n.a.b),
    "list-item": changing(lambda: [1.0], lambda v: v[0], lambda v: v.__setitem__(0, 2.0)),
    "dict-item": changing(lambda: {"a": 1.0}, lambda v: v["a"], lambda v: v.__setitem__("a", 2.0)),
    "list-of-tensors": changing(lambda: [tensor(1)], lambda v: v[0], lambda v: v.__setitem__(0, tensor(2))),
    "nested-lists": changing(lambda: [[[[[[[1.0]]]]]]], lambda v: v[0][0][0][0][0][0][0],
                             lambda v: v[0][0][0][0][0][0].__setitem__(0, 2.0)),
    "set": changing(lambda: {1.0}, lambda v: max(v), lambda v: v.add(2.0)),
    "attribute": changing(Holder, lambda o: o.value, lambda o: setattr(o, "value", 2.0)),
    "attribute-by-method": changing(Holder, lambda o: o.get(), lambda o: setattr(o, "value", 2.0)),
    "slot": changing(Slotted, lambda o: o.value, lambda o: setattr(o, "value", 2.0)),
    "global": global_case,
    "global-read-by-module": global_in_module_case,
    "global-read-by-method": global_in_method_case,
    "class-attribute": class_attribute_case,
    "module-list": changing(Lists, lambda m: m(), lambda m: m.scales.__setitem__(0, 2.0)),
    "module-flag": changing(lambda: Flagged().eval(), lambda m: m(), lambda m: m.train()),
    "nested-module-flag": changing(lambda: nn.Sequential(Flagged()).eval(), lambda m: m[0](), lambda m: m.train()),
    "module-parameter-replaced": changing(Scale, lambda m: m(), lambda m: setattr(m, "weight", nn.Parameter(tensor(2)))),
    "module-weight-data": changing(Scale, lambda m: m(), lambda m: m.weight.data.fill_(2.0)),
    "constant-in-place": changing(lambda: tensor(1), lambda v: v, lambda v: v.mul_(2)),
    "constant-no-grad": changing(lambda: tensor(1), lambda v: v, no_grad_copy),
    "constant-data": changing(lambda: tensor(1), lambda v: v, lambda v: v.data.fill_(2.0)),
    "constant-memory-of-numpy": changing(numpy_tensor, lambda v: v[1], write_numpy),
    "numpy-array-in-place": changing(lambda: np.ones(3), torch.as_tensor, lambda v: v.fill(2.0)),
    "leaf-in-place": changing(lambda: tensor(1, requires_grad=True), lambda v: v, no_grad_copy),
    "buffer": changing(lambda: nn.BatchNorm1d(1).double().eval(), lambda m: m.running_var[0], lambda m: m.running_var.fill_(2.0)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def restore_globals():
    yield
    globals()["GLOBAL"] = Settings.value = 1.0


@pytest.mark.parametrize("how", ["solve", "layer"])
@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_capture_is_seen(case, how):
    target, change = case()
    problem = distance(target)
    layer = ddn.DeclarativeLayer(problem, solver="scipy:SLSQP")

    def now():
        return seen(problem) if how == "solve" else factor(layer)

    assert now() == pytest.approx(1.0, abs=1e-9)
    change()
    assert now() == pytest.approx(2.0, abs=1e-9)


def test_a_changed_bound_tensor_and_constraint_constant_are_seen():
    low, level = torch.zeros(3, dtype=D), torch.tensor(1.0, dtype=D)
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - x).square().sum(),
        equality={"sum": lambda u: u.sum() - level}, bounds={"u": (low, None)},
    )  # fmt: skip
    ddn.solve(problem, {"x": X})
    low.fill_(1.0)
    level.fill_(4.0)
    u = ddn.solve(problem, {"x": X})["u"]
    assert torch.allclose(u, torch.tensor([2.0, 1.0, 1.0], dtype=D), rtol=0, atol=1e-9)


def test_requires_grad_switched_on_later_is_seen():
    weight = torch.tensor(1.0, dtype=D)
    problem = distance(lambda: weight)
    assert not seen(problem) > 1.5
    weight.requires_grad_(True)
    ddn.solve(problem, {"x": X})["u"].sum().backward()
    assert weight.grad is not None
    assert abs(weight.grad - X.sum()) < 1e-9


# -- gradients to captures ----------------------------------------------------------------------------------


def central(function, weight, step=1e-5):
    """Gradient of a scalar function of no arguments by central differences in ``weight.data``."""
    gradient = torch.zeros_like(weight, dtype=D).reshape(-1)
    flat = weight.data.view(-1)
    for i in range(flat.numel()):
        kept = flat[i].item()
        values = []
        for sign in (1, -1):
            flat[i] = kept + sign * step
            values.append(float(function().detach()))
        flat[i] = kept
        gradient[i] = (values[0] - values[1]) / (2 * step)
    return gradient.reshape(weight.shape)


def leaf(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=D, requires_grad=True)


class Bag:
    def __init__(self, weight):
        self.weight = weight

    def objective(self, u, x):
        return (u - self.weight * x).square().sum()


def default_argument(weight):
    def objective(u, x, w=weight):
        return (u - w * x).square().sum()

    return objective


def keyword_only(weight):
    def objective(u, x, *, w=weight):
        return (u - w * x).square().sum()

    return objective


def through_helper(weight):
    def inner():
        return weight

    def helper(x):
        return inner() * x

    return lambda u, x: (u - helper(x)).square().sum()


def by_partial(weight):
    return functools.partial(lambda u, x, w: (u - w * x).square().sum(), w=weight)


class CallMe:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, u, x):
        return (u - self.weight * x).square().sum()


ROUTES = {
    "closure": lambda w: lambda u, x: (u - w * x).square().sum(),
    "list": lambda w, held=None: (lambda held: lambda u, x: (u - held[0] * x).square().sum())([w]),
    "dict": lambda w: (lambda held: lambda u, x: (u - held["w"] * x).square().sum())({"w": w}),
    "method": lambda w: Bag(w).objective,
    "callable-object": CallMe,
    "default": default_argument,
    "keyword-only": keyword_only,
    "helper": through_helper,
    "partial": by_partial,
    "parameter-list": lambda w: (lambda held: lambda u, x: (u - held[0] * x).square().sum())(
        nn.ParameterList([w])
    ),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("kind", ["leaf", "non-leaf", "parameter"])
def test_a_captured_tensor_gets_its_gradient_by_every_route(route, kind):
    base = leaf(1.25)
    weight = {
        "leaf": lambda: base,
        "non-leaf": lambda: base * 2,
        "parameter": lambda: nn.Parameter(base.detach()),
    }[kind]()
    if route is ROUTES["parameter-list"]:
        if kind == "non-leaf":
            return  # a ParameterList holds parameters only
        weight = nn.Parameter(base.detach())
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, route(weight))
    ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")["u"].sum().backward()
    owner, factor = (base, 2.0) if kind == "non-leaf" else (weight, 1.0)
    assert owner.grad is not None
    assert abs(owner.grad - factor * X.sum()) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("where", ["lower-tensor", "upper-callable", "equality", "inequality"])
def test_captures_in_bounds_and_constraints_get_gradients(where, solver):
    weight = leaf(0.5, 0.25, -0.5)
    fields = {
        "lower-tensor": {"bounds": {"u": (weight, None)}},
        "upper-callable": {"bounds": {"u": (None, lambda: weight)}},
        "equality": {"equality": lambda u: u - weight},
        "inequality": {"inequality": lambda u: u - weight},
    }[where]
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - x).square().sum(), **fields)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=D)
    (ddn.solve(problem, {"x": X}, solver=solver)["u"] @ v).backward()
    active = {"lower-tensor": weight > X, "equality": X == X}.get(where, weight < X)
    assert torch.allclose(weight.grad, torch.where(active, v, 0.0), rtol=0, atol=1e-9)


def mlp(dtype=D):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 3)).to(dtype)


def module_problem(net):
    """A nonlinear problem with a module in objective and constraint, active at the solution."""
    return ddn.Problem(
        {"u": (3,)}, {"x": (3,)},
        lambda u, x: (u - x).square().sum() + 0.1 * net(u).square().sum(),
        inequality={"ball": lambda u, x: u.square().sum() - 1 - 0.1 * net(x).square().mean()},
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_a_whole_module_receives_its_gradient(solver):
    net, v = mlp(), torch.tensor([1.0, -0.5, 2.0], dtype=D)
    problem = module_problem(net)
    x = X.clone().requires_grad_()
    (ddn.solve(problem, {"x": x}, solver=solver)["u"] @ v).backward()

    def loss():
        with torch.no_grad():
            return ddn.solve(problem, {"x": x}, solver=solver)["u"] @ v

    for name, weight in [*net.named_parameters(), ("x", x)]:
        assert weight.grad.abs().max() > 1e-4, name
        assert torch.allclose(weight.grad, central(loss, weight), rtol=0, atol=1e-8), name


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_float32_modules_compute_in_float64(solver):
    """Same point and gradient as the module converted to float64, to float32's rounding of the result."""
    small, x = mlp(torch.float32), X.float()
    large = copy.deepcopy(small).double()
    expected = ddn.solve(module_problem(large), {"x": x.double()}, solver=solver)["u"]
    expected.sum().backward()
    u = ddn.solve(module_problem(small), {"x": x}, solver=solver)["u"]
    u.sum().backward()
    assert u.dtype == torch.float32
    assert torch.equal(u, expected.float())
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert torch.allclose(a.grad, b.grad.float(), rtol=1e-6, atol=1e-8)


def test_float64_parameters_with_a_float32_module():
    small = mlp(torch.float32)
    expected = ddn.solve(module_problem(copy.deepcopy(small).double()), {"x": X})["u"]
    u = ddn.solve(module_problem(small), {"x": X})["u"]
    assert u.dtype == D
    assert torch.allclose(u, expected, rtol=0, atol=1e-12)


FLOAT32_INSIDE = {
    "captured-matrix": lambda: (lambda m: lambda u, x: (m @ (u - x)).square().sum())(2 * torch.eye(3)),
    "created-eye": lambda: lambda u, x: (torch.eye(3) @ (u - x)).square().sum(),
    "created-ones": lambda: lambda u, x: torch.ones(3) @ (u - x).square(),
    "created-tensor": lambda: lambda u, x: (torch.tensor([1.0, 2.0, 3.0]) * (u - x).square()).sum(),
    "linear-function": lambda: lambda u, x: nn.functional.linear(u - x, torch.eye(3)).square().sum(),
}


@pytest.mark.parametrize("build", FLOAT32_INSIDE.values(), ids=FLOAT32_INSIDE)
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
def test_float32_constants_inside_functions(build, dtype):
    """With float32 parameters these are valid torch: float64 inside is the library's own business."""
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, build())
    u = ddn.solve(problem, {"x": X.to(dtype)}, solver="scipy:SLSQP")["u"]
    assert u.dtype == dtype
    assert torch.allclose(u, X.to(dtype), rtol=0, atol=1e-7)


def test_tied_weights_get_the_sum_of_their_gradients():
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)}).double()
    net["b"].weight = net["a"].weight
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - net["a"](x)).square().sum() + net["b"](u).square().sum()
    )
    loss = lambda: ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")["u"].sum()  # noqa: E731  # read once, below
    loss().backward()
    assert torch.allclose(net["a"].weight.grad, central(loss, net["a"].weight), rtol=0, atol=1e-8)


def test_untying_weights_is_seen():
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)}).double()
    net["b"].weight = net["a"].weight
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - net["a"](x)).square().sum() + net["b"](u).square().sum()
    )
    ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")
    net["b"].weight = nn.Parameter(torch.zeros(3, 3, dtype=D))
    u = ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")["u"]
    assert torch.allclose(u, net["a"](X), rtol=0, atol=1e-9)


def test_parametrised_modules_get_gradients():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).double()
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - net(x)).square().sum() + net(u).square().sum()
    )
    loss = lambda: ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")["u"].sum()  # noqa: E731  # read once, below
    loss().backward()
    for name, weight in net.named_parameters():
        assert torch.allclose(weight.grad, central(loss, weight), rtol=0, atol=1e-8), name


def test_a_frozen_module_costs_no_gradient_and_others_still_get_theirs():
    net, w = mlp().requires_grad_(False), leaf(1.0)
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - w * x).square().sum() + net(u).square().sum()
    )
    ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")["u"].sum().backward()
    assert w.grad is not None
    assert all(p.grad is None for p in net.parameters())


def test_second_order_gradient_to_a_capture():
    w = leaf(1.5)
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - w.square() * x).square().sum())
    u = ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")["u"].sum()
    (first,) = torch.autograd.grad(u, w, create_graph=True)
    (second,) = torch.autograd.grad(first, w)
    assert abs(first - 2 * w * X.sum()) < 1e-9
    assert abs(second - 2 * X.sum()) < 1e-9


def test_multipliers_and_objective_carry_gradients_to_captures():
    w = leaf(2.0)
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), {"sum": lambda u: u.sum() - w}
    )
    solution = ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")
    (dual,) = torch.autograd.grad(solution.dual.equality["sum"], w, retain_graph=True)
    (value,) = torch.autograd.grad(solution.objective, w)
    nu = (X.sum() - w.detach()) / 3
    assert abs(dual + 1 / 3) < 1e-9
    assert abs(value + nu) < 1e-9


# -- a layer owns its captures -----------------------------------------------------------------------------


def scaled_layer(**keywords):
    net = Scale(1.0)
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - net() * x).square().sum())
    return net, ddn.DeclarativeLayer(problem, solver="scipy:SLSQP", **keywords)


def factor(layer, x=X):
    return float((layer(x).detach() / x).mean())


def test_names_in_the_layer_are_those_in_the_functions():
    net, bare = mlp(), nn.Parameter(torch.ones(3, dtype=D))
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - bare * x).square().sum() + net(u).square().sum()
    )
    layer = ddn.DeclarativeLayer(problem)
    assert set(dict(layer.named_parameters())) == {
        "bare",
        *(f"net.{name}" for name, _ in net.named_parameters()),
    }
    assert set(layer.state_dict()) == set(dict(layer.named_parameters()))


@pytest.mark.parametrize(
    "name", ["forward", "problem", "solver", "training", "solve", "parameters", "_modules"]
)
def test_a_captured_module_of_any_name(name):
    """A name that the layer itself uses must not be shadowed."""
    scope = {"ddn": ddn, "net": Scale(2.0)}
    exec(f"def build({name}):\n    return lambda u, x: (u - {name}() * x).square().sum()", scope)
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, scope["build"](scope["net"]))
    layer = ddn.DeclarativeLayer(problem, solver="scipy:SLSQP")
    assert factor(layer) == pytest.approx(2.0, abs=1e-9)
    assert len(list(layer.parameters())) == 1
    assert factor(copy.deepcopy(layer)) == pytest.approx(2.0, abs=1e-9)


def test_training_a_layer_trains_its_module():
    net, layer = scaled_layer()
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(X) - 2 * X).square().mean().backward()
        optimizer.step()
    assert abs(net.weight.item() - 2) < 1e-3


def test_functional_call_feeds_other_weights_and_leaves_none_behind():
    _, layer = scaled_layer()
    w = leaf(3.0)
    y = torch.func.functional_call(layer, {"net.weight": w}, (X,))
    assert torch.allclose(y, 3 * X, rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(y.sum(), w)
    assert abs(gradient - X.sum()) < 1e-9
    assert factor(layer) == pytest.approx(1.0, abs=1e-9)


def test_functional_call_under_grad_and_vmap():
    _, layer = scaled_layer()

    def loss(weight, x):
        return torch.func.functional_call(layer, {"net.weight": weight}, (x,)).sum()

    weight = torch.tensor(1.0, dtype=D)
    assert abs(torch.func.grad(loss)(weight, X) - X.sum()) < 1e-9
    batch = torch.stack([X, 2 * X])
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, batch)
    assert torch.allclose(per_sample, batch.sum(-1), rtol=0, atol=1e-9)
    ensemble = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(torch.tensor([1.0, 2.0], dtype=D), X)
    assert torch.allclose(ensemble, X.sum().expand(2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    _, layer = scaled_layer()
    assert factor(layer) == pytest.approx(1.0, abs=1e-9)
    layer.load_state_dict({"net.weight": torch.tensor(2.0, dtype=D)}, assign=assign)
    assert factor(layer) == pytest.approx(2.0, abs=1e-9)
    layer(X).sum().backward()
    (weight,) = layer.parameters()
    assert abs(weight.grad - X.sum()) < 1e-9


@pytest.mark.parametrize("called_before", [False, True])
def test_a_deep_copy_trains_apart(called_before):
    net, layer = scaled_layer()
    if called_before:
        layer(X)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        next(twin.parameters()).fill_(5.0)
    assert (factor(layer), factor(twin)) == (pytest.approx(1.0, abs=1e-9), pytest.approx(5.0, abs=1e-9))
    twin(X).sum().backward()
    assert net.weight.grad is None
    assert next(twin.parameters()).grad is not None
    with torch.no_grad():
        net.weight.fill_(3.0)
    assert (factor(layer), factor(twin)) == (pytest.approx(3.0, abs=1e-9), pytest.approx(5.0, abs=1e-9))


def test_a_deep_copied_model_around_the_layer_trains_apart():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.layer = scaled_layer()

        def forward(self, x):
            return self.layer(x)

    model = Model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.net.weight.fill_(4.0)
    assert factor(twin) == pytest.approx(4.0, abs=1e-9)
    assert factor(model) == pytest.approx(1.0, abs=1e-9)


def test_a_module_that_defines_the_problem_on_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0, dtype=D))
            problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, self.objective)
            self.layer = [ddn.DeclarativeLayer(problem, solver="scipy:SLSQP")]

        def objective(self, u, x):
            return (u - self.weight * x).square().sum()

        def forward(self, x):
            return self.layer[0](x)

    model = Model()
    model(X).sum().backward()
    assert abs(model.weight.grad - X.sum()) < 1e-9


def test_the_layers_train_and_eval_reach_the_module():
    net = Flagged()
    problem = distance(lambda: net())
    layer = ddn.DeclarativeLayer(problem, solver="scipy:SLSQP")
    # a module without tensors has nothing to register; where it is registered, the flag follows the layer
    net.eval()
    assert factor(layer) == pytest.approx(1.0, abs=1e-9)
    net.train()
    assert factor(layer) == pytest.approx(2.0, abs=1e-9)


def test_eval_of_the_layer_switches_dropout_off():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.5)).double()
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - net(x)).square().sum())
    net.eval()
    layer = ddn.DeclarativeLayer(problem, solver="scipy:SLSQP").eval()
    assert torch.allclose(layer(X), net[0](X), rtol=0, atol=1e-9)
    layer.train()
    with pytest.raises(ddn.TraceError, match=r"(?i)dropout|bernoulli|random"):
        layer(X)


def test_to_moves_the_captured_module():
    net, layer = scaled_layer()
    layer.to(torch.float32)
    assert net.weight.dtype == torch.float32
    y = layer(X.float())
    assert y.dtype == torch.float32
    assert torch.allclose(y, X.float(), rtol=0, atol=1e-7)
    layer.double()
    assert layer(X).dtype == D


def test_two_layers_over_one_module_share_it():
    net = Scale(1.0)
    layers = [ddn.DeclarativeLayer(distance(lambda: net()), solver="scipy:SLSQP") for _ in range(2)]
    (layers[0](X).sum() + layers[1](X).sum()).backward()
    assert abs(net.weight.grad - 2 * X.sum()) < 1e-9


def test_two_modules_of_the_same_name_are_told_apart():
    def term(net):
        return lambda u, x: u - net() * x

    a, b = Scale(1.0), Scale(2.0)
    of_b = term(b)

    def second(v, x):
        return of_b(v, x)

    problem = ddn.Problem(
        {"u": (3,), "v": (3,)}, {"x": (3,)}, lambda u, v: u.square().sum() + v.square().sum(),
        {"a": term(a), "b": second},
    )  # fmt: skip
    layer = ddn.DeclarativeLayer(problem, solver="scipy:SLSQP")
    assert len(list(layer.parameters())) == 2
    twin = copy.deepcopy(layer)
    for u, v in (layer(X), twin(X)):
        assert torch.allclose(u, X, rtol=0, atol=1e-9)
        assert torch.allclose(v, 2 * X, rtol=0, atol=1e-9)


def test_two_layers_of_one_problem_with_different_weights():
    """functional_call on one must not leak into the other through a shared compiled problem."""
    net = Scale(1.0)
    problem = distance(lambda: net())
    first, second = (ddn.DeclarativeLayer(problem, solver="scipy:SLSQP") for _ in range(2))
    second = copy.deepcopy(second)
    with torch.no_grad():
        next(second.parameters()).fill_(2.0)
    for _ in range(2):
        assert factor(first) == pytest.approx(1.0, abs=1e-9)
        assert factor(second) == pytest.approx(2.0, abs=1e-9)


# -- pickling --------------------------------------------------------------------------------------------------

WEIGHT = nn.Parameter(torch.tensor(2.0, dtype=D))


def named_objective(u, x):
    return (u - x).square().sum()


def named_objective_with_weight(u, x):
    return (u - WEIGHT * x).square().sum()


def named_plane(u):
    return u.sum()


def test_a_layer_of_named_functions_is_picklable():
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, named_objective, named_plane, bounds={"u": (-5.0, None)})
    layer = ddn.DeclarativeLayer(
        problem, solver="scipy:SLSQP", options={"max_iter": 50}, policy=ddn.Policy("nan")
    )
    clone = pickle.loads(pickle.dumps(layer))
    assert torch.equal(clone(X), layer(X))
    assert clone.policy == layer.policy
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), layer(X))


def test_a_pickled_layer_keeps_its_own_weights():
    layer = ddn.DeclarativeLayer(
        ddn.Problem({"u": (3,)}, {"x": (3,)}, named_objective_with_weight), solver="scipy:SLSQP"
    )
    data = pickle.dumps(layer)
    with torch.no_grad():
        WEIGHT.fill_(7.0)
    try:
        clone = pickle.loads(data)
        assert factor(clone) == pytest.approx(2.0, abs=1e-9)
        assert factor(layer) == pytest.approx(7.0, abs=1e-9)
    finally:
        with torch.no_grad():
            WEIGHT.fill_(2.0)


LAMBDAS = {
    "objective": {"objective": lambda u, x: (u - x).square().sum()},
    "equality": {"objective": named_objective, "equality": {"plane": lambda u: u.sum()}},
    "inequality": {"objective": named_objective, "inequality": [lambda u: u]},
    "bound": {"objective": named_objective, "bounds": {"u": (lambda x: x - 1, None)}},
}


@pytest.mark.parametrize("where", LAMBDAS)
def test_a_lambda_refuses_to_be_pickled_and_is_named(where):
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, **LAMBDAS[where])
    layer = ddn.DeclarativeLayer(problem, solver="scipy:SLSQP")
    word = {"equality": "plane", "inequality": "inequality0", "bound": "u"}.get(where, where)
    with pytest.raises((pickle.PicklingError, ddn.DDNError), match=f"(?s){word}.*lambda"):
        pickle.dumps(layer)


def test_data_parallel_replicas_use_their_own_weights():
    """What nn.DataParallel does on the way: shallow replicas whose parameters were replaced."""
    net, layer = scaled_layer()
    replica = layer._replicate_for_data_parallel()
    inner = net._replicate_for_data_parallel()
    inner.weight = torch.tensor(4.0, dtype=D)
    replica._modules = {**replica._modules, "net": inner}
    assert factor(replica) == pytest.approx(4.0, abs=1e-9)
    assert factor(layer) == pytest.approx(1.0, abs=1e-9)


# -- defects that were found and mended -----------------------------------------------------------------


class _HoldsItsProblem:
    def __init__(self):
        self.problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, self.cost)

    def cost(self, u, x):
        return (u - x).square().sum()


def test_a_problem_that_its_own_functions_can_see_is_traced_once():
    model, x = _HoldsItsProblem(), torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        ddn.solve(model.problem, {"x": x})
    assert len(model.problem.__dict__["_programs"]) == 1


class _Base:
    scale = 1.0


class _Overrides(_Base):
    scale = 2.0

    def cost(self, u, x):
        return self.scale * (u - x).square().sum()


def test_an_attribute_that_overrides_that_of_a_base_class_is_traced_once():
    problem, x = ddn.Problem({"u": (2,)}, {"x": (2,)}, _Overrides().cost), torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        ddn.solve(problem, {"x": x})
    assert len(problem.__dict__["_programs"]) == 1


# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_problem_is_compiled_inside_a_transform():
    """Constants that the functions capture are no tensors of the transform that happens to be in force."""
    weights, offsets = torch.tensor([1.0, 2.0], dtype=torch.float64), np.array([0.5, -0.5])
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (2,)},
        lambda u, x: (weights * (u - x).abs()).sum() + (u - torch.tensor(offsets)).square().sum(),
    )
    x = torch.tensor([0.4, 3.0], dtype=torch.float64)
    tangent = torch.func.jvp(lambda x: ddn.solve(problem, {"x": x})["u"], (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)


# -- one object under two names --------------------------------------------------------------------------------------


class Mode(enum.Enum):
    NEAR = 1
    FAR = 2


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3, dtype=D) for _ in range(2))
        self.active = self.experts[0]

    def energy(self, u, x):
        penalty = sum(e.weight.square().sum() for e in self.experts)
        return (u - self.active(x)).square().sum() + 1e-3 * penalty


def test_a_module_that_another_name_held_before_is_seen():
    torch.manual_seed(0)
    model = Mixture()
    layer = ddn.DeclarativeLayer(ddn.Problem({"u": (3,)}, {"x": (3,)}, model.energy))
    for expert in (0, 1, 0):
        model.active = model.experts[expert]
        model.zero_grad()
        y = layer(X)
        torch.testing.assert_close(y, model.experts[expert](X))
        y.sum().backward()
        assert model.experts[expert].weight.grad.abs().sum() > 0


def test_an_enum_that_another_name_held_before_is_seen():
    config = types.SimpleNamespace(mode=Mode.NEAR)
    problem = distance(lambda: 1.0 if config.mode is Mode.NEAR else 9.0)
    assert seen(problem) == pytest.approx(1)
    config.mode = Mode.FAR
    assert seen(problem) == pytest.approx(9)


def test_a_dict_that_another_name_held_before_is_seen():
    near, far = {"w": 1.0}, {"w": 9.0}
    cases, state = {"near": near, "far": far}, {"now": near}
    problem = distance(lambda: state["now"]["w"] + 0 * cases["near"]["w"])
    assert seen(problem) == pytest.approx(1)
    state["now"] = far
    assert seen(problem) == pytest.approx(9)


def test_a_default_of_the_class_that_the_instance_overrides_is_seen():
    class Weighted:
        weight = 1.0

        def get(self):
            return self.weight

    first, second = Weighted(), Weighted()
    problem = distance(lambda: first.get() * second.get())
    assert seen(problem) == pytest.approx(1)
    second.weight = 9.0
    assert seen(problem) == pytest.approx(9)
    Weighted.weight = 2.0
    assert seen(problem) == pytest.approx(18)


@pytest.mark.parametrize("change", [
    lambda net: net.register_forward_hook(lambda *a: 2 * a[2]),
    lambda net: net.register_forward_pre_hook(lambda _, a: (3 * a[0],)),
    lambda net: setattr(net, "forward", lambda x: 5 * x),
])  # fmt: skip
def test_hooks_and_a_forward_of_its_own_are_seen(change):
    net = nn.Linear(3, 3, dtype=D)
    layer = ddn.DeclarativeLayer(
        ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - net(x)).square().sum())
    )
    layer(X)
    change(net)
    torch.testing.assert_close(layer(X), net(X))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_constants(convert):
    dense = torch.tensor([[2.0, 0, 1], [0, 1, 0]], dtype=D)
    A = getattr(dense, convert)()
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (2,)}, lambda u, x: (A @ u - x).square().sum() + u.square().sum()
    )
    right = torch.linalg.solve(dense.mT @ dense + torch.eye(3, dtype=D), dense.mT @ X[:2])
    torch.testing.assert_close(ddn.solve(problem, {"x": X[:2]})["u"], right)
    A = (2 * dense).to_sparse()
    right = torch.linalg.solve(4 * dense.mT @ dense + torch.eye(3, dtype=D), 2 * dense.mT @ X[:2])
    torch.testing.assert_close(ddn.solve(problem, {"x": X[:2]})["u"], right)
    A.requires_grad_()
    with pytest.raises(ddn.ProblemError, match="sparse tensor that requires a gradient"):
        ddn.solve(problem, {"x": X[:2]})


class Gained(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self._gain, self._unused = gain, [0]

    def forward(self):
        self._unused[0] += 1  # a counter that no result depends on, as frameworks keep many
        return self._gain


@pytest.mark.parametrize("gain", [
    lambda v: v,
    lambda v: torch.tensor(v, dtype=D),
    lambda v: torch.tensor(v, dtype=D, requires_grad=True),
])  # fmt: skip
def test_a_private_attribute_of_a_module_is_seen(gain):
    module = Gained(gain(2.0))
    problem = distance(module)
    layer = ddn.DeclarativeLayer(problem)
    torch.testing.assert_close(layer(X), 2 * X)
    module._gain = gain(3.0)
    torch.testing.assert_close(layer(X), 3 * X)
    assert seen(problem) == pytest.approx(3)


def test_an_attribute_of_a_function_and_items_of_a_deque_are_seen():
    queue = collections.deque([1.0])

    def gain():
        return gain.value * queue[0]

    gain.value = 2.0
    problem = distance(gain)
    assert seen(problem) == pytest.approx(2)
    gain.value = 3.0
    assert seen(problem) == pytest.approx(3)
    queue.appendleft(4.0)
    assert seen(problem) == pytest.approx(12)


def test_a_module_without_parameters_follows_the_modes_of_its_layer():
    class Switch(nn.Module):
        def forward(self, x):
            return (2.0 if self.training else 3.0) * x

    switch = Switch()
    layer = ddn.DeclarativeLayer(
        ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - switch(x)).square().sum())
    )
    assert dict(layer.named_children()) == {"switch": switch}
    torch.testing.assert_close(layer(X), 2 * X)
    torch.testing.assert_close(layer.eval()(X), 3 * X)
    own = copy.deepcopy(layer).train()
    torch.testing.assert_close(own(X), 2 * X)
    torch.testing.assert_close(layer(X), 3 * X)


@pytest.mark.parametrize(("before", "after"), [
    (decimal.Decimal(2), decimal.Decimal(9)),
    (fractions.Fraction(2), fractions.Fraction(9)),
])  # fmt: skip
def test_numbers_of_other_kinds_are_seen(before, after):
    state = {"value": before}
    problem = distance(lambda: float(state["value"]))
    assert seen(problem) == pytest.approx(2)
    state["value"] = after
    assert seen(problem) == pytest.approx(9)


class Holding(nn.Module):
    """A model whose layer is made of the model's own method."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=D))
        self.layer = ddn.DeclarativeLayer(ddn.Problem({"u": (3,)}, {"x": (3,)}, self.energy))

    def energy(self, u, x):
        return (u - self.w * x).square().sum()

    def forward(self, x):
        return self.layer(x)


def test_a_model_that_holds_its_own_layer_is_copied_after_it_was_traced_anew():
    model = Holding()
    model(X)
    model.eval()
    model(X)
    best = copy.deepcopy(model)
    with torch.no_grad():
        model.w.fill_(5.0)
    torch.testing.assert_close(best(X), X)
    assert [name for name, _ in model.layer.named_parameters()] == ["self_w"]


# -- what functions keep ---------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    """Makes a buffer at the first call, counts its calls, and has a hook that keeps what it returned."""

    _grid = None

    def __init__(self):
        super().__init__()
        self._calls, self.seen = 0, {}
        self.register_forward_hook(lambda _, __, out: self.seen.update(out=out.detach()))

    def forward(self, x):
        self._calls += 1
        if self._grid is None:
            self._grid = torch.linspace(1, 2, 3, dtype=D)
        return self._grid * x


def test_what_functions_make_and_keep_is_no_tensor_of_the_trace():
    module = Lazy()
    layer = ddn.DeclarativeLayer(
        ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - module(x)).square().sum())
    )
    expected = torch.linspace(1, 2, 3, dtype=D) * X
    torch.testing.assert_close(layer(X), expected)
    torch.testing.assert_close(module(X), expected)  # its own grid is one of numbers
    calls = module._calls
    layer(X)
    assert module._calls == calls  # no new trace


def test_a_call_before_the_trace_leaves_counters_of_modules_alone():
    norm = nn.BatchNorm1d(3, dtype=D)
    with pytest.raises(ddn.TraceError, match="num_batches_tracked"):
        ddn.solve(distance(lambda: norm(torch.eye(3, dtype=D))[0]), {"x": X})
    assert (norm.running_mean == 0).all()


def test_private_attributes_that_a_function_of_the_file_reads_are_seen():
    model = Gained(2.0)
    problem = distance(lambda: private_gain(model))
    assert seen(problem) == pytest.approx(2)
    model._gain = 9.0
    assert seen(problem) == pytest.approx(9)


def private_gain(model):
    return model._gain


@pytest.mark.parametrize("held", ["array", "tensor", "view"])
def test_entries_of_a_large_constant_that_change_in_place_are_seen(held):
    """Of 120,000; that of an array, or written through NumPy into a tensor, moves no version counter."""
    entries = np.zeros((400, 300))
    weights = {"array": entries, "tensor": torch.zeros(400, 300, dtype=D), "view": torch.from_numpy(entries)}[
        held
    ]
    problem = ddn.Problem(
        {"u": (300,)}, {"x": (300,)}, lambda u, x: (u - x - torch.as_tensor(weights)[7]).square().sum()
    )
    layer, x = ddn.DeclarativeLayer(problem), torch.zeros(300, dtype=D)
    first = layer(x)
    program = compile_program(problem)
    layer(x)
    assert compile_program(problem) is program, "traced anew although nothing changed"
    (weights if held == "tensor" else entries)[7, 3] = 2.0
    assert (layer(x) - first)[3] == 2.0
