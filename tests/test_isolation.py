"""``options={"isolate": True}``: a backend that crashes its process, or hangs, fails its sample alone."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers import adapter as a
from ddn_solvers import isolation

D = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _end():
    yield
    isolation.end()


def dangerous_adapter():
    """A backend for u = x that does as x[0] says; a local class, so it crosses over by value."""

    class Dangerous(a.Adapter):
        capabilities = a.Capabilities(
            summary="does as it is told",
            package="numpy",
            pip="numpy",
            methods=(
                a.Method(
                    "any", frozenset(a.ProblemClass), frozenset(a.Feature), duals=False,
                    dialect=a.Dialect(time_limit=""),
                ),
            ),
        )  # fmt: skip

        def solve(self, instance):
            order = instance.parameters[0][0]
            if order == 100:
                os.kill(os.getpid(), signal.SIGSEGV)
            if order == 200:
                time.sleep(1000)
            if order == 400:
                raise ddn.ProblemError("what the caller did")
            if order == 300:
                raise RuntimeError("on purpose")
            return a.Point(np.array(instance.parameters[0]), a.Status.OPTIMAL, iterations=os.getpid())

    return Dangerous


@pytest.fixture(scope="module")
def dangerous():
    ddn.register("dangerous", dangerous_adapter())
    return ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - x).cosh().sum()
    )  # no polish gets from 0 to 100


def test_a_crash_and_a_hang_fail_their_samples_and_nothing_else(dangerous, monkeypatch):
    monkeypatch.setattr(isolation, "_LATE", 1.0)
    x = torch.tensor([[0.0, 1.0, 2.0], [100.0, 0, 0], [5.0, 6.0, 7.0], [200.0, 0, 0], [300.0, 0, 0]], dtype=D)
    x.requires_grad_()
    options = {"isolate": True, "time_limit": 0.2}
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(dangerous, {"x": x}, solver="dangerous", options=options)
    solution = caught.value.solution
    S = ddn.Status
    assert solution.status == (S.OPTIMAL, S.BACKEND_ERROR, S.OPTIMAL, S.TIME_LIMIT, S.BACKEND_ERROR)
    assert "its process ended with SIGSEGV" in solution.stats.message[1]
    assert "did not come back within" in solution.stats.message[3]
    assert "RuntimeError: on purpose" in solution.stats.message[4]
    torch.testing.assert_close(solution["u"][[0, 2]], x[[0, 2]])
    (gradient,) = torch.autograd.grad(solution["u"][[0, 2]].sum(), x)
    assert gradient[[0, 2]].tolist() == [[1.0] * 3] * 2


LAYER = torch.nn.Linear(4, 4, dtype=D)
PROBLEMS = {
    "kinks": ({"u": (4,)}, lambda u, x: (u - x).square().sum() + u.abs().sum()),
    "module": ({"u": (4,)}, lambda u, x: (u - LAYER(x)).square().sum() + 0.1 * u.pow(4).sum()),
    "callbacks": ({"u": (4,)}, lambda u, x: (u - x).square().sum() * (2.0 if u.sum() > 1e9 else 1.0)),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.filterwarnings("ignore:the problem's functions cannot be compiled")
def test_the_same_bits_as_without(name):
    variables, objective = PROBLEMS[name]
    problem = ddn.Problem(variables, {"x": (4,)}, objective, inequality=lambda u: u.sum() - 1)
    x = torch.randn(5, 4, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = ddn.solve(problem, {"x": x}, solver="casadi:ipopt")
    isolated = ddn.solve(problem, {"x": x}, solver="casadi:ipopt", options={"isolate": True})
    assert torch.equal(plain["u"], isolated["u"])
    gradients = [torch.autograd.grad(s["u"].square().sum(), x)[0] for s in (plain, isolated)]
    assert torch.equal(*gradients)
    warm = ddn.solve(problem, {"x": x}, solver="casadi:ipopt", warm_start=plain, options={"isolate": True})
    torch.testing.assert_close(warm["u"], plain["u"], rtol=1e-9, atol=1e-9)


def test_a_layer_with_its_own_module_and_the_closest_point():
    head = torch.nn.Linear(3, 2, dtype=D)
    layer = ddn.DeclarativeLayer(
        ddn.Problem(
            {"u": (2,)},
            {"x": (3,)},
            lambda u, x: (u - head(x)).square().sum(),
            inequality={"low": lambda u, x: x[0] + u.sum(), "high": lambda u, x: x[0] - u.sum()},
        ),
        options={"isolate": True},
        policy=ddn.Policy(on_failure="closest"),
    )
    x = torch.tensor([[0.5, 1.0, 2.0], [-1.0, 0.0, 1.0]], dtype=D)
    layer(x).square().sum().backward()
    assert layer.solve(x).status == (ddn.Status.INFEASIBLE, ddn.Status.OPTIMAL)
    assert all(bool(p.grad.abs().sum() > 0) for p in layer.parameters())


def test_threads_share_the_worker(dangerous):
    found = {}

    def work(k):
        x = torch.full((3,), 10.0 + k, dtype=D)
        found[k] = ddn.solve(dangerous, {"x": x}, solver="dangerous", options={"isolate": True})

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[k]["u"][0].item() for k in range(6)] == [10.0 + k for k in range(6)]
    pids = {solution.stats.iterations[0] for solution in found.values()}
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_workers_share_the_samples(dangerous):
    x = torch.arange(15.0, dtype=D).reshape(5, 3)
    solution = ddn.solve(dangerous, {"x": x}, solver="dangerous", options={"workers": 2})
    torch.testing.assert_close(solution["u"], x)
    first, second = {*solution.stats.iterations[:3]}, {*solution.stats.iterations[3:]}
    assert len(first) == len(second) == len(first ^ second) / 2 == 1
    assert os.getpid() not in first | second
    alone = ddn.solve(dangerous, {"x": x[:1]}, solver="dangerous", options={"workers": 2})
    torch.testing.assert_close(alone["u"], x[:1])


def test_a_worker_that_is_lost_takes_its_own_samples_along_and_those_are_tried_again(dangerous):
    x = torch.tensor([[1.0, 2.0, 3.0], [100.0, 0, 0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=D)
    solution = ddn.solve(
        dangerous, {"x": x}, solver="dangerous", options={"workers": 2}, policy=ddn.Policy("mask")
    )
    assert solution.converged.tolist() == [True, False, True, True]
    assert "its process ended with SIGSEGV" in solution.stats.message[1]


def test_a_worker_that_is_lost_while_it_has_nothing_to_do_is_replaced(dangerous):
    """Every call after that had raised TerminatedWorkerError."""
    x, options = torch.ones(2, 3, dtype=D), {"isolate": True}
    first = ddn.solve(dangerous, {"x": x}, solver="dangerous", options=options)
    executor = isolation._WORKERS[0].executor
    os.kill(*executor._processes, signal.SIGKILL)
    while not executor._flags.broken:  # it has seen that
        time.sleep(0.01)
    second = ddn.solve(dangerous, {"x": x}, solver="dangerous", options=options)
    assert second.converged.all()
    assert first.stats.iterations != second.stats.iterations


def test_an_error_in_one_share_does_not_wait_for_the_others(dangerous):
    x = torch.tensor([[400.0, 0, 0], [200.0, 0, 0]], dtype=D)  # an error, and a long sleep
    with pytest.raises(ddn.ProblemError, match="what the caller did"):
        ddn.solve(dangerous, {"x": x}, solver="dangerous", options={"workers": 2})
    after = ddn.solve(
        dangerous,
        {"x": x[:, 1:2].expand(2, 3)},
        solver="dangerous",
        options={"workers": 2, "time_limit": 1.0},
    )
    assert after.converged.all()


def test_errors_of_the_caller_come_back_by_name(dangerous):
    x = torch.zeros(3, dtype=D)
    with pytest.raises(ddn.ProblemError, match="nonsense"):
        ddn.solve(dangerous, {"x": x}, solver="casadi:ipopt", options={"isolate": True, "nonsense": 1})
    with pytest.raises(ddn.ProblemError, match="'isolate' is not valid; expected True or False"):
        ddn.solve(dangerous, {"x": x}, options={"isolate": "yes"})
    for wrong in (0, True, "two"):
        with pytest.raises(ddn.ProblemError, match="'workers' is not valid; expected a positive int"):
            ddn.solve(dangerous, {"x": x}, options={"workers": wrong})
    lock = threading.Lock()

    def objective(u, x):
        with lock:
            return (u - x).square().sum()

    locked = ddn.Problem({"u": (3,)}, {"x": (3,)}, objective)
    with pytest.raises(ddn.ProblemError, match=r"the problem cannot be sent to another process.*lock"):
        ddn.solve(locked, {"x": x}, options={"isolate": True})
