"""The same call gives the same bits; a sample is the same alone and in any batch, in any thread or process."""

import concurrent.futures as futures
import gc
import multiprocessing
import sys
import warnings
import weakref
from typing import Any

import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
N, B = 20, 12


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


WEIGHTS = rand(N, N, seed=0) / N**0.5
ROWS = rand(5, N, seed=1)


def quadratic(u, x):
    return 0.5 * (WEIGHTS @ u).square().sum() + 0.05 * u.square().sum() - x @ u


def nonlinear(u, x):
    return (u - x).exp().sum() + 0.5 * u.square().sum()


def rows(u):
    return ROWS @ u


def within(u, x):
    return u.square().sum() - 4 - x[0].square()


PROBLEMS = {
    "qp": ddn.Problem({"u": (N,)}, {"x": (N,)}, quadratic, {"rows": rows}, bounds={"u": (-0.5, 0.5)}),
    "nlp": ddn.Problem({"u": (N,)}, {"x": (N,)}, nonlinear, {"rows": rows}, {"within": within}),
}
SOLVERS = {
    "qp": ("auto", "scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt", "casadi:daqp"),
    "nlp": ("auto", "scipy:SLSQP", "casadi:sqpmethod"),
}
CASES = [(name, solver) for name, solvers in SOLVERS.items() for solver in solvers]
every_case = pytest.mark.parametrize(("name", "solver"), CASES, ids=[f"{n}-{s}" for n, s in CASES])
X = rand(B, N, seed=2)
V = rand(B, N, seed=3)


def call(name, solver, x, v):
    """Point, gradient."""
    x = x.clone().requires_grad_()
    u = ddn.solve(PROBLEMS[name], {"x": x}, solver=solver)["u"]
    return u.detach(), torch.autograd.grad(u, x, v)[0]


def agree(found, expected):
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))


@every_case
def test_the_same_cold_call_gives_the_same_bits(name, solver):
    first, again = (call(name, solver, X, V) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_case
def test_alone_or_in_another_batch_and_order(name, solver):
    whole = call(name, solver, X, V)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(4))
    assert agree(call(name, solver, X[order], V[order]), [part[order] for part in whole])
    for i in (0, 7):
        assert agree(call(name, solver, X[i], V[i]), [part[i] for part in whole])
    assert agree(call(name, solver, X[3:5], V[3:5]), [part[3:5] for part in whole])


@every_case
def test_a_warm_start_agrees_to_the_accuracy(name, solver):
    near = ddn.solve(PROBLEMS[name], {"x": X + 0.01}, solver=solver)
    warm = ddn.solve(PROBLEMS[name], {"x": X}, solver=solver, warm_start=near)
    cold = ddn.solve(PROBLEMS[name], {"x": X}, solver=solver)
    assert torch.allclose(warm["u"], cold["u"], rtol=0, atol=ddn.Policy().accuracy)


@pytest.mark.parametrize("name", PROBLEMS)
def test_several_threads_at_once(name):
    expected = [call(name, "auto", X[i], V[i]) for i in range(B)]
    with futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(call, name, "auto", X[i % B], V[i % B]) for i in range(3 * B)]
        found = [job.result(timeout=60) for job in jobs]
    assert all(agree(found[i], expected[i % B]) for i in range(3 * B))


class Solved(torch.utils.data.Dataset):
    """A dataset whose items are solutions."""

    def __len__(self):
        return B

    def __getitem__(self, i):
        return call("qp", "auto", X[i], V[i])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    expected = call("qp", "auto", X, V)  # before: a fork finds everything compiled, locks and caches in use
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # a threaded parent, Python 3.12
        loader = torch.utils.data.DataLoader(
            Solved(), batch_size=4, num_workers=2, multiprocessing_context=method, timeout=100
        )
        found = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    assert agree(found, expected)


def test_a_call_leaves_no_reference_cycle_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrays are freed with its solution, not when the garbage collector comes by: else each call gets cold memory."""
    made: list[weakref.ref[Any]] = []
    module = sys.modules["ddn_solvers.solve"]  # which the function of that name hides
    plain = module.Search

    def recorded(*arguments: Any, **options: Any) -> Any:
        search = plain(*arguments, **options)
        made.append(weakref.ref(search))
        return search

    monkeypatch.setattr(module, "Search", recorded)
    for name in PROBLEMS:
        call(name, "auto", X, V)
    gc.disable()
    try:
        made.clear()
        for name in PROBLEMS:
            call(name, "auto", X, V)
        assert [search() for search in made] == [None] * len(PROBLEMS)
    finally:
        gc.enable()
