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

Threads = int | str  # a number; "all": what torch is set to; "auto": one where matrices are small, else all

_SMALL = 500  # rows of a KKT matrix up to which one thread is enough

_lock = threading.Lock()
_calls, _before = 0, 1
_here = threading.local()  # how many calls of this Python thread are inside of each other


@contextmanager
def limited(threads: Threads, rows: int) -> Iterator[None]:
    """So many threads for KKT matrices of so many ``rows``, and afterwards as before."""
    global _calls, _before
    if threads == "auto":
        threads = 1 if rows <= _SMALL else "all"
    if not isinstance(threads, int):
        yield
        return
    with _lock:  # several calls at once, of several Python threads: the first one knows what was set
        _before = torch.get_num_threads() if _calls == 0 else _before
        _calls += 1
    outer, depth = torch.get_num_threads(), getattr(_here, "depth", 0)
    _here.depth = depth + 1
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            _here.depth = depth
            torch.set_num_threads(outer if depth else _before)
