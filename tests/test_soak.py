"""Memory does not grow with the number of calls: 200 by default, 20,000 in ``make fuzz`` (which sets DDN_FUZZ)."""

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
