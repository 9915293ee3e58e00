"""A layer as an ordinary nn.Module: hooks, checkpoints, accumulation, saved weights, threads on it and on replicas."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ddn_solvers as ddn
from ddn_solvers.kkt.derivative import Linearisation, TorchLinearisation
from ddn_solvers.search import Search

f64 = torch.float64


def layer_around(net: nn.Module) -> ddn.DeclarativeLayer:
    """argmin |u - net(x)|^2 with u in a ball of radius r: the projection of what the network says."""
    return ddn.DeclarativeLayer(
        ddn.Problem(
            variables={"u": (3,)},
            parameters={"x": (3,), "r": ()},
            objective=lambda u, x: (u - net(x)).square().sum(),
            inequality={"ball": lambda u, r: u.square().sum() - r**2},
        )
    )


def projection(net: nn.Module, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The closed form of the same."""
    y = net(x)
    return y * (r / y.norm(dim=-1, keepdim=True)).clamp(max=1.0)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Linear(3, 3, dtype=f64)


@pytest.fixture
def x():
    return (2 * torch.randn(4, 3, dtype=f64, generator=torch.Generator().manual_seed(1))).requires_grad_()


R = torch.tensor(1.0, dtype=f64)


@pytest.fixture
def counts(monkeypatch):
    """How often a batch was solved, and how often a derivative of a solution was taken."""
    counts = {"solves": 0, "derivatives": 0}
    methods = ((Search, "find", "solves"), (Linearisation, "vjp", "derivatives"))
    for cls, name, counted in (*methods, (TorchLinearisation, "__init__", "derivatives")):
        original = getattr(cls, name)

        def counting(self, *arguments, original=original, counted=counted):
            counts[counted] += 1
            return original(self, *arguments)

        monkeypatch.setattr(cls, name, counting)
    return counts


def weighted(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.arange(1.0, 1.0 + y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


def assert_gradients(found: Any, expected: Any) -> None:
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def exact(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(weighted(projection(net, x, R)), [x, *net.parameters()]))


# -- how much is done ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_without_gradients_no_derivative_is_prepared(how, net, x, counts):
    layer = layer_around(net)
    with how():
        y = layer(x, R)
    assert not y.requires_grad
    torch.testing.assert_close(y.clone(), projection(net, x, R).detach(), rtol=1e-9, atol=1e-9)
    assert counts == {"solves": 1, "derivatives": 0}


def test_a_backward_is_one_derivative_and_no_solve(net, x, counts):
    layer = layer_around(net)
    y = weighted(layer(x, R))
    first = torch.autograd.grad(y, [x, *net.parameters()], retain_graph=True)
    assert counts == {"solves": 1, "derivatives": 1}
    second = torch.autograd.grad(y, [x, *net.parameters()])
    assert counts == {"solves": 1, "derivatives": 2}
    assert_gradients(first, exact(net, x))
    assert_gradients(second, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


# -- hooks --------------------------------------------------------------------------------------------


def test_hooks_see_and_may_replace_what_passes(net, x):
    layer = layer_around(net)
    model = nn.Sequential(layer_with_radius := _Radius(layer), nn.Tanh())
    seen: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: (seen.append("pre"), (2 * args[0], args[1]))[1]),
        layer.register_forward_hook(lambda _, args, y: (seen.append("post"), 3 * y)[1]),
        layer_with_radius.register_full_backward_pre_hook(lambda _, v: seen.append("backward pre")),
        layer_with_radius.register_full_backward_hook(
            lambda _, into, out: (seen.append("backward"), (10 * into[0],))[1]
        ),
    ]
    y = model(x)
    torch.testing.assert_close(y, (3 * projection(net, 2 * x, R)).tanh(), rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(weighted(y), x)
    (expected,) = torch.autograd.grad(weighted((3 * projection(net, 2 * x, R)).tanh()), x)
    assert_gradients([gradient], [10 * expected])
    assert seen == ["pre", "post", "backward pre", "backward"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(x), projection(net, x, R).tanh(), rtol=1e-9, atol=1e-9)


class _Radius(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, R)


def test_tensor_hooks_on_solution_and_parameters(net, x):
    layer = layer_around(net)
    y = layer(x, R)
    y.register_hook(lambda v: 2 * v)
    norms: list[torch.Tensor] = []
    net.weight.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    weighted(y).backward()
    assert_gradients([x.grad, net.weight.grad, net.bias.grad], [2 * g for g in exact(net, x)])
    assert norms == [net.weight.grad.norm()]


# -- checkpointing and accumulation -------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_solves_again_and_gives_the_same(use_reentrant, net, x, counts):
    layer = layer_around(net)
    y = checkpoint(lambda x: layer(x * 1.0, R) * 1.0, x, use_reentrant=use_reentrant)
    weighted(y).backward()
    assert counts == {"solves": 2, "derivatives": 1}
    assert_gradients([x.grad, net.weight.grad, net.bias.grad], exact(net, x))


def test_saved_tensors_may_be_packed(net, x):
    layer = layer_around(net)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        y = layer(x, R)
    assert_gradients(torch.autograd.grad(weighted(y), [x, *net.parameters()]), exact(net, x))


def test_changing_a_saved_parameter_in_place_is_noticed(net):
    layer, x = layer_around(net), torch.randn(2, 3, dtype=f64)
    y = weighted(layer(x, R))
    with torch.no_grad():
        net.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gradients_accumulate_over_micro_batches(net, x):
    layer = layer_around(net)
    weights = torch.arange(1.0, 13.0, dtype=f64).reshape(4, 3)
    for part, weight in zip(x.split(1), weights.split(1), strict=True):
        (layer(part, R) * weight).sum().backward()
    assert_gradients([x.grad, net.weight.grad, net.bias.grad], exact(net, x))
    with torch.no_grad():
        assert not torch.equal(net.weight.grad, torch.zeros_like(net.weight))
    layer.zero_grad()
    assert net.weight.grad is None


# -- saved and copied ---------------------------------------------------------------------------------


def test_a_state_dict_goes_through_a_file(net, x):
    layer = layer_around(net)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = nn.Linear(3, 3, dtype=f64)
    twin = layer_around(other)
    assert twin.load_state_dict(torch.load(file, weights_only=True)) == ([], [])
    torch.testing.assert_close(twin(x, R), layer(x, R), rtol=1e-12, atol=1e-12)
    assert torch.equal(other.weight, net.weight)


def test_a_copy_made_while_a_graph_is_alive_leaves_it_alone(net, x):
    layer = layer_around(net)
    y = weighted(layer(x, R))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(x, R).abs().max() < 1e-9
    assert_gradients(torch.autograd.grad(y, [x, *net.parameters()]), exact(net, x))


# -- threads ------------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run ``work`` in threads at once; what one of them raises is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            barrier.wait()
            for _ in range(3):
                work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def rows(i: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(i)
    return (2 * torch.randn(1 + i, 3, dtype=f64, generator=generator)).requires_grad_()


def test_threads_share_one_layer_and_its_module(net):
    layer = layer_around(net)

    def work(i: int) -> None:
        x = rows(i)
        gradients = torch.autograd.grad(weighted(layer(x, R)), [x, *net.parameters()])
        assert_gradients(gradients, exact(net, x))

    in_threads(work)


def test_threads_on_replicas_send_their_gradients_to_the_original(net):
    """As nn.DataParallel does: a replica's parameters are copies that autograd leads back to the original's."""
    layer = layer_around(net)
    replicas = [layer._replicate_for_data_parallel() for _ in range(4)]
    for replica in replicas:
        inner = net._replicate_for_data_parallel()
        inner.weight, inner.bias = net.weight * 1.0, net.bias * 1.0
        replica._modules = {**replica._modules, "net": inner}

    def work(i: int) -> None:
        x = rows(i)
        y = weighted(replicas[i](x, R))
        gradients = torch.autograd.grad(y, [x, *net.parameters()], retain_graph=True)
        assert_gradients(gradients, exact(net, x))

    in_threads(work)


def test_threads_on_copies_train_apart(net):
    layer = layer_around(net)
    copies = [copy.deepcopy(layer) for _ in range(4)]
    for i, twin in enumerate(copies):
        with torch.no_grad():
            twin.net.weight.fill_(0.0)
            twin.net.bias.fill_(0.1 * i)

    def work(i: int) -> None:
        y = copies[i](rows(i), R)
        torch.testing.assert_close(y, torch.full_like(y, 0.1 * i), rtol=0, atol=1e-9)
        y.sum().backward()

    in_threads(work)
    assert net.weight.grad is None
    assert all(twin.net.bias.grad is not None for twin in copies)


class Doubling(nn.Linear):
    """Twice as much in training as in evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if self.training else 1.0)


def test_a_first_call_in_another_mode_from_many_threads():
    """The functions are traced again for evaluation, while others wait for the trace or use it."""
    net = Doubling(3, 3, dtype=f64)
    layer = layer_around(net)
    layer.eval()

    def work(i: int) -> None:
        y, expected = layer(rows(i), R), projection(net, rows(i), R)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)

    in_threads(work)
