"""Backends in processes of their own: one that crashes or hangs fails its sample, and the program goes on.

Several of them share the samples of a batch. A worker process gets a problem once, as functions by value, and compiles
it; then arrays go there and points come back. If it dies, or is later than the time limit allows, the samples that it had
are tried one by one, each in what is then a new process, so that only those fail that bring it down. What comes back is
verified like any other point.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ddn_solvers.adapter import Adapter, Batch
from ddn_solvers.derived import FORMS
from ddn_solvers.errors import BackendNotInstalled, ProblemError
from ddn_solvers.points import Points
from ddn_solvers.problem import Problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.solution import Status
from ddn_solvers.validation import FIELDS

_LATE = 5.0  # seconds over its time limit after which a process is given up
_REMEMBERED = 16  # programs that a worker keeps


def attempt_batch(adapter: Adapter, batch: Batch) -> Points:
    """``adapter.attempt_batch`` in worker processes, ``batch.options.workers`` of them.

    Raises:
        DDNError: As there.
        BackendNotInstalled: The package that runs worker processes is missing.
        ProblemError: The problem cannot be sent to another process.
    """
    shares = np.array_split(np.arange(len(batch)), min(batch.options.workers, len(batch)))
    parts: list[Points] = []
    for share, found in zip(shares, _together(adapter, [batch.take(share) for share in shares]), strict=True):
        if not isinstance(found, _Lost):
            parts.append(found)
        elif len(share) == 1:
            lost = Points.at(batch.program, batch.initial[share], found.status)
            lost.message[0] = found.message
            parts.append(lost)
        else:
            parts += [attempt_batch(adapter, batch.take([i])) for i in share]
    return Points.joined(parts)


def _together(adapter: Adapter, parts: list[Batch]) -> list[Points | _Lost]:
    """The points of each part, each part in a worker of its own, all at the same time."""
    program, limit = parts[0].program, parts[0].options.time_limit
    sent = program.memo("isolated", lambda: _Sent(uuid.uuid4().hex, _declaration(program)))
    stays = ("program", "known")  # the worker has the one, and makes the other again
    jobs = [
        _by_value(
            (adapter, {f.name: getattr(part, f.name) for f in fields(part) if f.name not in stays}),
            "the backend's adapter, or an option,",
        )
        for part in parts
    ]
    seconds = {} if limit is None else {k: limit * len(part) + _LATE for k, part in enumerate(parts)}
    solve = {k: (_solve, sent.key, job) for k, job in enumerate(jobs)}
    with contextlib.ExitStack() as locks:
        workers = _workers(len(parts))
        for worker in workers:
            locks.enter_context(worker.lock)
        known = {k: solve[k] for k, worker in enumerate(workers) if worker.executor is not None}
        found = _called(workers, known, seconds)
        # Where the process or the problem is new, its start does not count.
        new = [k for k in solve if found.get(k) is None]
        found |= _called(workers, dict.fromkeys(new, (_prepare, sent.key, sent.declaration)), {})
        ready = {k: solve[k] for k in new if found[k] is None}
        found |= _called(workers, ready, seconds)
    return [found[k] for k in solve]


@dataclass(frozen=True)
class _Lost:
    """Instead of what was asked for: the worker process is gone."""

    status: Status
    message: str


class _Worker:
    """One process, started when it is needed, and again after it was lost."""

    def __init__(self) -> None:
        self.executor: Any = None
        self.lock = threading.Lock()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.executor is not None:
            try:
                return self.executor.submit(function, *arguments)
            except BrokenExecutor:  # it was lost while it had nothing to do
                self.end()
        self.executor = _executor()
        return self.executor.submit(function, *arguments)

    def result(self, future: Any, start: float, seconds: float | None) -> Any:
        """What was submitted at ``start`` returns within so many seconds, or that the process was lost."""
        try:
            return future.result(None if seconds is None else max(start + seconds - time.monotonic(), 0.0))
        except NotInTime:
            self.end()
            return _Lost(
                Status.TIME_LIMIT, f"did not come back within {seconds:.3g} s; its process was ended"
            )
        except BrokenExecutor as error:
            self.end()
            code = re.search(r"\{(.*)\}", str(error))
            return _Lost(Status.BACKEND_ERROR, f"its process ended{f' with {code[1]}' if code else ''}")

    def end(self) -> None:
        """Kill the process, whatever it does."""
        executor, self.executor = self.executor, None
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)


def _called(workers: list[_Worker], calls: Mapping[int, Any], seconds: Mapping[int, float]) -> dict[int, Any]:
    """What calls return, or ``_Lost``, by the number of their worker, all at the same time."""
    start, futures = time.monotonic(), {k: workers[k].submit(*call) for k, call in calls.items()}
    try:
        return {k: workers[k].result(future, start, seconds.get(k)) for k, future in futures.items()}
    except BaseException:  # an error in one of them, or Ctrl-C: nobody waits for the others
        for k, future in futures.items():
            if not future.done():
                workers[k].end()
        raise


def _executor() -> Any:
    try:
        from loky import ProcessPoolExecutor
    except ImportError as error:
        raise BackendNotInstalled(
            "isolate=True needs loky, which runs the worker processes: pip install 'ddn_solvers[isolate]'"
        ) from error
    return ProcessPoolExecutor(max_workers=1)


_WORKERS: list[_Worker] = []
_LOCK = threading.Lock()


def _workers(count: int) -> list[_Worker]:
    """The first so many workers."""
    with _LOCK:
        _WORKERS.extend(_Worker() for _ in range(count - len(_WORKERS)))
        return _WORKERS[:count]


@atexit.register
def end() -> None:
    """End all worker processes; the next call that needs one starts it."""
    for worker in _WORKERS:
        worker.end()


def _forget() -> None:
    """A forked process has no workers: they are its parent's."""
    global _LOCK
    _WORKERS.clear()
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# -- what crosses over --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    key: str
    declaration: bytes


def _declaration(program: Program) -> bytes:
    """The problem, and how the program is derived from its own."""
    steps = []
    while program.origin is not None:
        program, step = program.origin
        steps.append(step)
    declared = {name: getattr(program.problem, name) for name in FIELDS}
    return _by_value((declared, steps[::-1]), "the problem")


def _by_value(value: Any, what: str) -> bytes:
    """Pickled with functions by value, those of a script or a notebook included."""
    try:
        import cloudpickle
    except ImportError:
        _executor()  # which needs it, and says so
        raise
    try:
        pickled: bytes = cloudpickle.dumps(value)
    except Exception as error:
        raise ProblemError(
            f"{what} cannot be sent to another process, as isolate=True asks",
            got=f"{type(error).__name__}: {error}",
            fix="Functions may capture tensors and modules, but no locks, files or generators.",
        ) from error
    return pickled


# -- in the worker ------------------------------------------------------------------------------------

_PROGRAMS: dict[str, Program] = {}


def _prepare(key: str, declaration: bytes) -> None:
    declared, steps = pickle.loads(declaration)  # our own, from the process that started this one
    program: Program | None = compile_program(Problem(**declared))
    for step in steps:
        assert program is not None
        program = FORMS[step](program)
    assert program is not None
    _PROGRAMS[key] = program
    while len(_PROGRAMS) > _REMEMBERED:
        del _PROGRAMS[next(iter(_PROGRAMS))]


def _solve(key: str, job: bytes) -> Points | None:
    """The points; ``None`` where the program has not been prepared."""
    if key not in _PROGRAMS:
        return None
    adapter, arguments = pickle.loads(job)
    points: Points = adapter.attempt_batch(Batch(_PROGRAMS[key], **arguments))
    return points
