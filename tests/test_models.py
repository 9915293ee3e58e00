"""Models that contain a layer, as torch treats models: modes, copies, threads, transforms, batches of cotangents."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.autograd import functional

import ddn_solvers as ddn
from ddn_solvers import implicit

# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
D = torch.float64
X = torch.tensor([[1.0, 2.0, -2.0], [3.0, 1.0, 1.0], [0.5, -2.0, 1.0], [2.0, 2.0, 0.1]], dtype=D)
R = torch.tensor(1.5, dtype=D)


def half_squares(u, x):
    return 0.5 * (u - x).square().sum()


def in_ball(u, r):
    return u.square().sum() - r**2


BALL = ddn.Problem({"u": (3,)}, {"x": (3,), "r": ()}, half_squares, inequality={"ball": in_ball})


def ball(x, r):
    """The solution of BALL for x outside of the ball."""
    return r * x / x.norm(dim=-1, keepdim=True)


def close(a, b, atol=1e-10):
    return torch.allclose(a, b, rtol=0, atol=atol)


class Model(nn.Module):
    """A layer between others; ``explicit`` has the same parameters and the formula in place of the layer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        with torch.no_grad():
            self.first.bias.add_(4.0)  # outside of the ball
        self.radius = nn.Parameter(torch.tensor(0.7, dtype=D))
        self.layer = ddn.DeclarativeLayer(BALL)

    def forward(self, x):
        return self.last(self.layer(self.first(x), self.radius))

    def explicit(self, x):
        return self.last(ball(self.first(x), self.radius))


def loss(y):
    return (y - 1).square().sum()


def gradients(function, model, x=X):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(function(x)), [x, *model.parameters()])


def assert_gradients(found, expected):
    for one, two in zip(found, expected, strict=True):
        assert close(one, two)


# -- modes of autograd ------------------------------------------------------------------------------------------


@pytest.fixture
def linearisations(monkeypatch):
    """Counts the KKT systems that are set up for derivatives."""
    made = []
    for name in ("Linearisation", "TorchLinearisation"):
        kind = getattr(implicit, name)

        class Counted(kind):
            def __init__(self, *arguments, **keywords):
                made.append(self)
                super().__init__(*arguments, **keywords)

        monkeypatch.setattr(implicit, name, Counted)
    return made


def test_the_forward_does_no_backward_work_and_all_backwards_share_theirs(linearisations):
    x = X.clone().requires_grad_()
    y = ddn.DeclarativeLayer(BALL)(x, R)
    assert not linearisations
    for _ in range(3):
        torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(12, dtype=D).reshape(12, 4, 3), is_grads_batched=True)
    assert len(linearisations) == 1


def test_inference_tensors_may_be_used_later():
    with torch.inference_mode():
        x = X.clone()
    assert close(ddn.DeclarativeLayer(BALL)(x, R), ball(X, R))


def test_anomaly_mode():
    model = Model()
    with torch.autograd.set_detect_anomaly(True):
        assert_gradients(gradients(model, model), gradients(model.explicit, model))


def test_autocast_rounds_the_parameters_and_nothing_inside():
    lin = nn.Linear(3, 3)
    layer = ddn.DeclarativeLayer(BALL)
    x, r = X.float(), R.float()
    with torch.autocast("cpu", torch.bfloat16):
        inner = lin(x)
        y = layer(2 + inner, r)
        z = layer(2 + inner, r.bfloat16())
    assert inner.dtype == torch.bfloat16
    assert (y.dtype, z.dtype) == (torch.float32, torch.bfloat16)
    found = torch.autograd.grad(y.sum(), inner, retain_graph=True)[0]
    again = (2 + inner).detach().double().requires_grad_()
    reference = layer(again, r.double())
    assert close(y, reference.float(), 1e-6)
    assert torch.allclose(z, reference.bfloat16())
    assert torch.allclose(found, torch.autograd.grad(reference.sum(), again)[0].bfloat16(), atol=1e-2)


# -- copies -----------------------------------------------------------------------------------------------------------


def steps(model, count=3):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        loss(model(X)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_copies_of_a_model_train_apart_and_alike(how, trained):
    model = Model()
    if trained:
        steps(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    twin = COPIES[how](model)
    after = steps(twin)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(steps(model), after, strict=True))


def test_a_copy_keeps_the_settings_and_not_the_memory():
    layer = ddn.DeclarativeLayer(
        BALL, "casadi:ipopt", {"max_iter": 50}, ddn.Policy(on_failure="nan"), warm_start=True
    )
    layer(X, R)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.solver, twin.options, twin.policy, twin.warm_start) == (
            "casadi:ipopt", {"max_iter": 50}, ddn.Policy(on_failure="nan"), True
        )  # fmt: skip
        assert twin._previous is None
        assert close(twin(X, R), ball(X, R))


class OnItself(nn.Module):
    """A model whose layer's problem is made of the model: ``self`` captures what holds the layer."""

    def __init__(self, how):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(3, 3).double()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=D))
        closure = lambda u, x: (u - self.scale * self.net(x)).square().sum()  # noqa: E731  # a formula
        objective = {"method": self.objective, "closure": closure}[how]
        self.layer = ddn.DeclarativeLayer(ddn.Problem({"u": (3,)}, {"x": (3,)}, objective))

    def objective(self, u, x):
        return (u - self.scale * self.net(x)).square().sum()

    def forward(self, x):
        return self.layer(x)

    def explicit(self, x):
        return self.scale * self.net(x)


@pytest.mark.parametrize("how", ["method", "closure"])
def test_a_model_may_hold_the_layer_whose_problem_is_made_of_it(how):
    """Every walk over the modules ended in a RecursionError: the layer registered the model that holds it."""
    model = OnItself(how)
    model(X)
    assert len(vars(model.layer.problem)["_programs"]) == 1  # that it got the layer since is no change
    model.train().eval().to(D).apply(lambda m: None)
    assert "OnItself" in repr(model)
    assert {name for name, _ in model.named_parameters()} == {"scale", "net.weight", "net.bias"}
    model.load_state_dict(OnItself(how).state_dict())
    assert_gradients(gradients(model, model), gradients(model.explicit, model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.scale.fill_(2.0)
    assert_gradients(gradients(twin, twin), gradients(twin.explicit, twin))
    assert_gradients(gradients(model, model), gradients(model.explicit, model))
    model.net = nn.Linear(3, 3).double()
    assert close(model(X), model.explicit(X))


@pytest.mark.parametrize("how", ["method", "closure"])
def test_such_a_model_refuses_to_be_pickled_and_says_why(how):
    with pytest.raises(ddn.ProblemError, match=r"objective.*cannot be pickled"):
        pickle.dumps(OnItself(how))


# -- threads and processes -------------------------------------------------------------------------------------------


def replicate(model):
    """What ``torch.nn.parallel.replicate`` does, on the CPU: parameters are copies that lead back to the originals."""
    modules = list(model.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            replica._modules[name] = replicas[id(child)]
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.clone())
    return replicas[id(model)]


def in_threads(work, count):
    results, errors = [None] * count, []
    start = threading.Barrier(count)

    def run(index):
        try:
            start.wait(timeout=60)
            results[index] = work(index)
        except BaseException as error:  # to be raised by the main thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("build", [Model, lambda: OnItself("method")], ids=["model", "on itself"])
def test_replicas_in_threads_lead_back_to_the_original(build):
    """Data parallelism: scatter, replicate, run in threads, gather, one backward."""
    model = build()
    pieces = X.repeat(2, 1).split(2)
    replicas = [replicate(model) for _ in pieces]
    outputs = in_threads(lambda i: replicas[i](pieces[i]), len(pieces))
    found = torch.autograd.grad(loss(torch.cat(outputs)), list(model.parameters()))
    expected = torch.autograd.grad(loss(model.explicit(X.repeat(2, 1))), list(model.parameters()))
    assert_gradients(found, expected)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm start"])
def test_one_layer_in_many_threads(warm):
    layer = ddn.DeclarativeLayer(BALL, warm_start=warm)

    def work(index):
        found = []
        for repetition in range(5):
            x = (X + 0.1 * index + 0.01 * repetition).requires_grad_()
            y = layer(x[: 1 + index % 4], R)
            found.append((y.detach(), *torch.autograd.grad(loss(y), x)))
        return found

    def expected(index, repetition):
        x = (X + 0.1 * index + 0.01 * repetition).requires_grad_()
        y = ball(x[: 1 + index % 4], R)
        return y.detach(), *torch.autograd.grad(loss(y), x)

    for index, found in enumerate(in_threads(work, 6)):
        for repetition, pair in enumerate(found):
            assert_gradients(pair, expected(index, repetition))


def test_backward_in_another_thread():
    x = X.clone().requires_grad_()
    y = ddn.DeclarativeLayer(BALL)(x, R)
    in_threads(lambda _: loss(y).backward(), 1)
    (expected,) = torch.autograd.grad(loss(ball(x, R)), x)
    assert close(x.grad, expected)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel_of_one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Model()
        loss(nn.parallel.DistributedDataParallel(model)(X)).backward()
        expected = torch.autograd.grad(loss(model.explicit(X)), list(model.parameters()))
        assert_gradients([p.grad for p in model.parameters()], expected)
    finally:
        torch.distributed.destroy_process_group()


# -- torch.func over models and over solve -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Model, lambda: OnItself("closure")], ids=["model", "on itself"])
def test_gradients_sample_by_sample(build):
    model = build()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    # tie_weights=True leaves foreign tensors behind in modules that are registered twice (pytorch issue 164759)
    def single(weights, x):
        return loss(torch.func.functional_call(model, weights, (x,), tie_weights=False))

    found = torch.func.vmap(torch.func.grad(single), in_dims=(None, 0))(weights, X)
    for i, x in enumerate(X):
        expected = torch.autograd.grad(loss(model.explicit(x)), list(model.parameters()))
        assert_gradients([found[name][i] for name, _ in model.named_parameters()], expected)


@pytest.mark.parametrize("build", [Model, lambda seed=0: OnItself("closure")], ids=["model", "on itself"])
def test_an_ensemble_of_models(build):
    models = [build() for _ in range(3)]
    for i, model in enumerate(models):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 0.1 * i)
    stacked, _ = torch.func.stack_module_state(models)
    base = models[0]
    found = torch.func.vmap(lambda w: torch.func.functional_call(base, w, (X,), tie_weights=False))(stacked)
    assert close(found, torch.stack([model.explicit(X) for model in models]))


OUTPUTS = {
    "primal": (lambda s: s["u"], lambda x, r: ball(x, r)),
    "objective": (lambda s: s.objective, lambda x, r: 0.5 * (x.norm(dim=-1) - r).square()),
    "multiplier": (
        lambda s: s.dual.inequality["ball"],
        lambda x, r: (x.norm(dim=-1) - r) / (2 * r),
    ),
}
DERIVATIVES = {
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "vmap of jacrev": lambda f, argnums: torch.func.vmap(torch.func.jacrev(f, argnums), in_dims=(0, None)),
    "vmap of jacfwd": lambda f, argnums: torch.func.vmap(torch.func.jacfwd(f, argnums), in_dims=(0, None)),
    "hessian": lambda f, argnums: torch.func.hessian(lambda x, r: f(x, r).sum(), argnums),
    "jacrev of jacfwd": lambda f, argnums: torch.func.jacrev(torch.func.jacfwd(f, argnums), argnums),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_transforms_of_every_output_of_solve(output, derivative):
    pick, formula = OUTPUTS[output]

    def function(x, r):
        return pick(ddn.solve(BALL, {"x": x, "r": r}))

    for argnums in (0, 1):
        found = DERIVATIVES[derivative](function, argnums)(X, R)
        expected = DERIVATIVES[derivative](formula, argnums)(X, R)
        assert close(found, expected, 1e-9)


def test_vjp_and_jvp_over_a_layer_of_several_variables():
    problem = ddn.Problem(
        {"u": (3,), "v": ()}, {"x": (3,)}, lambda u, v, x: (u - x).square().sum() + (v - x.sum()).square(),
        equality={"tie": lambda u, v: u[0] - v},
    )  # fmt: skip
    layer = ddn.DeclarativeLayer(problem)

    def formula(x):
        v = (x[..., 0] + x.sum(-1)) / 2
        return torch.cat([v.unsqueeze(-1), x[..., 1:]], -1), v

    direction = X.flip(0)
    for one, two in zip(
        torch.func.jvp(layer, (X,), (direction,)), torch.func.jvp(formula, (X,), (direction,)), strict=True
    ):
        assert all(close(a, b) for a, b in zip(one, two, strict=True))
    (found,) = torch.func.vjp(layer, X)[1]((direction, direction[:, 0]))
    (expected,) = torch.func.vjp(formula, X)[1]((direction, direction[:, 0]))
    assert close(found, expected)


# -- autograd's own batches, older than torch.func -----------------------------------------------------------------------


def eye(rows, *shape):
    return torch.eye(rows, dtype=D).reshape(rows, *shape)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("argument", [0, 1])
def test_vectorised_jacobians(strategy, argument):
    layer = ddn.DeclarativeLayer(BALL)

    def of_one(function):
        return (lambda x: function(x, R), lambda r: function(X, r))[argument]

    inputs = (X, R)[argument]
    found = functional.jacobian(of_one(layer), inputs, vectorize=True, strategy=strategy)
    assert close(found, functional.jacobian(of_one(ball), inputs))


def test_batched_cotangents_through_a_model_and_again_through_themselves():
    model = Model()
    x = X.clone().requires_grad_()

    def twice(function):
        (rows,) = torch.autograd.grad(function(x), x, eye(8, 4, 2), is_grads_batched=True, create_graph=True)
        return rows, torch.autograd.grad(rows.square().sum(), x)[0]

    for found, expected in zip(twice(model), twice(model.explicit), strict=True):
        assert close(found, expected)


def test_vectorised_second_derivatives():
    layer = ddn.DeclarativeLayer(BALL)
    scalar = [lambda x: layer(x, R).pow(3).sum(), lambda x: ball(x, R).pow(3).sum()]
    found, expected = (functional.hessian(f, X, vectorize=True) for f in scalar)
    assert close(found, expected)
    nested = [
        functional.jacobian(
            lambda x: functional.jacobian(lambda x: f(x, R), x, vectorize=True, create_graph=True),  # noqa: B023  # called at once
            X[:1],
            vectorize=True,
        )
        for f in (layer, ball)
    ]
    assert close(*nested)
    with pytest.raises(ddn.SensitivityError, match=r"torch\.func\.hessian"):
        functional.hessian(scalar[0], X, vectorize=True, outer_jacobian_strategy="forward-mode")


def test_batched_cotangents_beside_failed_and_weakly_active_samples():
    problem = ddn.Problem(
        {"u": ()}, {"x": (), "b": ()}, lambda u, x: 0.5 * (u - x).square(), bounds={"u": (0.0, "b")}
    )
    x = torch.tensor([-1.0, 0.0, 0.5, 3.0, 1.0], dtype=D, requires_grad=True)
    b = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0], dtype=D)
    policy = ddn.Policy(on_failure="mask", weakly_active="mean")
    y = ddn.solve(problem, {"x": x, "b": b}, policy=policy)["u"]
    (found,) = torch.autograd.grad(y, x, eye(5, 5), is_grads_batched=True)
    assert close(found, torch.diag(torch.tensor([0.0, 0.5, 1.0, 0.0, 0.0], dtype=D)))


def test_batched_tangents_get_directional_derivatives_each():
    """At a kink of the solution a tangent and its negative have different derivatives."""
    relu = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: 0.5 * (u - x).square(), bounds={"u": (0.0, None)})
    layer = ddn.DeclarativeLayer(relu)
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=D)
    forward = functional.jacobian(layer, x, vectorize=True, strategy="forward-mode")
    assert close(forward, torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=D)))
    reverse = functional.jacobian(layer, x, vectorize=True)
    assert close(reverse, torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=D)))
