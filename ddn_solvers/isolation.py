"""Backends in a process of their own: one that crashes or hangs fails its sample, and the program goes on.

A worker process gets a problem once, as functions by value, and compiles it; then arrays go there and points come back.
If it dies, or is later than the time limit allows, the samples of that call are tried one by one, each in what is
then a new process, so that only those fail that bring it down. What comes back is verified like any other point.
"""

from __future__ import annotations

import atexit
import os
import pickle
import re
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass, fields, replace
from typing import Any

from ddn_solvers.adapter import Adapter, Batch, Point
from ddn_solvers.derived import FORMS
from ddn_solvers.errors import BackendNotInstalled, ProblemError
from ddn_solvers.problem import Problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.solution import Status
from ddn_solvers.validation import FIELDS

_LATE = 5.0  # seconds over its time limit after which a process is given up
_REMEMBERED = 16  # programs that a worker keeps


def attempt_batch(adapter: Adapter, batch: Batch) -> list[Point]:
    """``adapter.attempt_batch`` in the worker process.

    Raises:
        DDNError: As there.
        BackendNotInstalled: The package that runs worker processes is missing.
        ProblemError: The problem cannot be sent to another process.
    """
    try:
        return _WORKER.solve(adapter, batch)
    except _Lost as lost:
        if len(batch) == 1:
            return [Point(batch.initial[0], lost.status, message=str(lost))]
    return [attempt_batch(adapter, _one(batch, i))[0] for i in range(len(batch))]


def _one(batch: Batch, i: int) -> Batch:
    """Sample i as a batch."""
    rows = {name: getattr(batch, name)[i : i + 1] for name in ("lower", "upper", "initial")}
    parameters = tuple(p if p.ndim == 1 else p[i : i + 1] for p in batch.parameters)
    warm = None if batch.warm_start is None else batch.warm_start[i : i + 1]
    return replace(batch, parameters=parameters, warm_start=warm, known=None, **rows)


class _Lost(Exception):
    """The worker process is gone."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Worker:
    """One process, started when it is needed, and again after it was lost."""

    def __init__(self) -> None:
        self._executor: Any = None
        self._lock = threading.Lock()

    def solve(self, adapter: Adapter, batch: Batch) -> list[Point]:
        program, limit = batch.program, batch.options.time_limit
        sent = program.memo("isolated", lambda: _Sent(uuid.uuid4().hex, _declaration(program)))
        stays = ("program", "known")  # the worker has the one, and makes the other again
        arguments = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in stays}
        job = _by_value((adapter, arguments), "the backend's adapter, or an option,")
        seconds = None if limit is None else limit * len(batch) + _LATE
        with self._lock:
            points = None if self._executor is None else self._call(seconds, _solve, sent.key, job)
            if points is None:  # a new process, whose start does not count, or a new problem
                self._call(None, _prepare, sent.key, sent.declaration)
                points = self._call(seconds, _solve, sent.key, job)
        found: list[Point] = points
        return found

    def _call(self, seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._executor is None:
            self._executor = _executor()
        try:
            return self._executor.submit(function, *arguments).result(seconds)
        except NotInTime:
            self.end()
            message = f"did not come back within {seconds:.3g} s; its process was ended"
            raise _Lost(Status.TIME_LIMIT, message) from None
        except BrokenExecutor as error:
            self.end()
            code = re.search(r"\{(.*)\}", str(error))
            message = f"its process ended{f' with {code[1]}' if code else ''}"
            raise _Lost(Status.BACKEND_ERROR, message) from None
        except KeyboardInterrupt:
            self.end()
            raise

    def end(self) -> None:
        """Kill the process, whatever it does."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)


def _executor() -> Any:
    try:
        from loky import ProcessPoolExecutor
    except ImportError as error:
        raise BackendNotInstalled(
            "isolate=True needs loky, which runs the worker processes: pip install 'ddn_solvers[isolate]'"
        ) from error
    return ProcessPoolExecutor(max_workers=1)


_WORKER = _Worker()
atexit.register(_WORKER.end)


def _forget() -> None:
    """A forked process has no worker: it is its parent's."""
    global _WORKER
    _WORKER = _Worker()


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


def _solve(key: str, job: bytes) -> list[Point] | None:
    """The points; ``None`` where the program has not been prepared."""
    if key not in _PROGRAMS:
        return None
    adapter, arguments = pickle.loads(job)
    points: list[Point] = adapter.attempt_batch(Batch(_PROGRAMS[key], **arguments))
    return points
