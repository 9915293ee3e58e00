"""How many threads torch's linear algebra takes inside a call.

A thread more shortens the factorization of a small matrix by little, and where another program has the core it waits for
it: on two loaded cores a batch of 64 QPs takes 30 ms with one thread and 70 to 800 ms with two. So one is the default
for small problems. torch's setting is that of its process; it is put back as it was when the last call is over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddn_solvers.policy import Policy

_SMALL = 500  # rows of a KKT matrix up to which one thread is enough

_lock = threading.Lock()
_calls, _before = 0, 1


@contextmanager
def threads(policy: Policy, rows: int) -> Iterator[None]:
    """As many threads as the policy says for KKT matrices of so many ``rows``, and afterwards as before."""
    global _calls, _before
    count = policy.threads
    if count == "auto":
        count = 1 if rows <= _SMALL else None
    if count is None:
        yield
        return
    with _lock:  # several calls at once, of several Python threads: the first one knows what was set
        _before = torch.get_num_threads() if _calls == 0 else _before
        _calls += 1
    torch.set_num_threads(int(count))
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            torch.set_num_threads(_before)
