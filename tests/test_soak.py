"""Memory does not grow with the number of calls, 200 by default, 20,000 in ``make fuzz`` (DDN_FUZZ); no call leaves cycles."""

import gc
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import ddn_solvers as ddn

CALLS = 20_000 if "DDN_FUZZ" in os.environ else 200
D = torch.float64


STATM = Path("/proc/self/statm")


def resident():
    """Memory in use now, MB: its peak would be that of an earlier test in this process."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not STATM.exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("solver", ["casadi:daqp", "casadi:ipopt", "scipy:SLSQP", "newton"])
def test_memory_does_not_grow_with_calls(solver):
    net = torch.nn.Linear(5, 5, dtype=D)
    layer = ddn.DeclarativeLayer(
        ddn.Problem(
            {"u": (5,)},
            {"x": (5,)},
            lambda u, x: (u - net(x)).square().sum(),
            {"sum": lambda u: u.sum()},
            bounds={"u": (-1, 1)},
        ),
        solver=solver,
        policy=ddn.Policy("mask"),
    )
    generator = torch.Generator().manual_seed(0)

    def call():
        x = torch.randn(2, 5, generator=generator, dtype=D, requires_grad=True)
        layer(x).square().sum().backward()

    for _ in range(CALLS // 5):
        call()
    sizes = [resident()]
    for _ in range(10):
        for _ in range(CALLS // 10):
            call()
        sizes.append(resident())
    # A leak grows in every tenth; the allocator takes some MB at once, now and then.
    *tenths, largest = sorted(after - before for before, after in pairwise(sizes))
    assert sum(tenths) < 2 + 1e-4 * CALLS, sizes  # MB: 100 bytes a call
    assert largest < 10, sizes


CYCLE_FREE = {
    "QP": {"objective": lambda u, x: (u - x).square().sum(), "bounds": {"u": (0.2, 0.7)}},
    "NLP": {
        "objective": lambda u, x: (u - x).exp().sum() - u.sum(),
        "inequality": lambda u: u.square().sum() - 1,
    },
    "entropy": {
        "objective": lambda u, x: (u * u.log()).sum() - u @ x,
        "equality": lambda u: u.sum() - 1,
        "bounds": {"u": (0, None)},
    },
    "lasso": {"objective": lambda u, x: (u - x).square().sum() + 0.5 * u.abs().sum()},
    "dependent rows": {
        "objective": lambda u, x: (u - x).square().sum(),
        "equality": [lambda u: u[:2].sum(), lambda u: 2 * u[:2].sum()],
    },
}


@pytest.mark.filterwarnings("ignore::ddn_solvers.DegeneracyWarning")
@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt"])
@pytest.mark.parametrize("name", CYCLE_FREE)
def test_a_call_leaves_nothing_to_the_garbage_collector(name: str, solver: str) -> None:
    """Cycles of references kept the arrays of tens of large batches until it came."""
    layer = ddn.DeclarativeLayer(ddn.Problem({"u": (6,)}, {"x": (6,)}, **CYCLE_FREE[name]), solver=solver)
    x = torch.rand(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(2):
        layer(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        layer(x).sum().backward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = sorted({type(one).__name__ for one in gc.garbage if type(one).__module__.startswith("ddn")})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []
