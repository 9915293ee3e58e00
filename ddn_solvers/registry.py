"""Backend name -> adapter, through the entry-point group ``ddn_solvers.adapters``.

Nothing is imported before a name is asked for; built-in adapters load exactly as a stranger's.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ddn_solvers.adapter import Adapter, Method
from ddn_solvers.errors import BackendCannotSolve, BackendNotFound, BackendNotInstalled, ProblemError
from ddn_solvers.program import Program

GROUP = "ddn_solvers.adapters"
_adapters: dict[str, Adapter] = {}
_registered: dict[str, Callable[[], Adapter]] = {}
_lock = threading.RLock()


def register(name: str, factory: Callable[[], Adapter]) -> None:
    """Register a backend for this process (a package does it with an entry point instead).

    Args:
        name: As in ``solver="name"`` or ``"name:method"``.
        factory: Called once, on first use; an ``Adapter`` subclass will do.

    Raises:
        ProblemError: The name is unusable or taken, or the factory cannot be called.
    """
    if not isinstance(name, str) or not name or not set(name).isdisjoint(": ,") or name == "auto":
        raise ProblemError("the backend's name is unusable", expected="a word without ':'", got=repr(name))
    if not callable(factory):
        raise ProblemError(
            f"the factory of backend {name!r} cannot be called",
            expected="an Adapter subclass",
            got=repr(factory),
        )
    if name in backends():
        raise ProblemError(f"a backend named {name!r} is registered already")
    with _lock:
        _registered[name] = factory


def backends() -> tuple[str, ...]:
    """Names of all registered backends, installed or not."""
    return tuple(sorted({*_entry_points(), *_registered}))


def adapter(name: str) -> Adapter:
    """The adapter of that name, made on first use.

    Raises:
        BackendNotFound: There is none; the message lists what there is.
        BackendNotInstalled: Its package is missing; the message carries the pip line.
    """
    with _lock:
        if name not in _adapters:
            _adapters[name] = _load(name)
        return _adapters[name]


def resolve(solver: str, program: Program) -> tuple[Adapter, Method]:
    """Adapter and method of ``"backend"`` or ``"backend:method"`` for a problem.

    Raises:
        BackendNotFound, BackendNotInstalled: As ``adapter``; also an unknown or missing method.
        BackendCannotSolve: The method lacks a class or feature; the message says who has it.
    """
    backend, _, name = solver.partition(":")
    found = adapter(backend)
    methods = found.capabilities.methods
    if name:
        method = found.method(name)
        if method is None:
            known = ", ".join(m.name for m in methods)
            raise BackendNotFound(f"backend {backend!r} has no method {name!r}; it has: {known}")
        _check_installed(f"{backend}:{name}", method.package, method.pip)
        lacking = lacks(method, program)
        if lacking:
            raise _cannot(solver, lacking, program)
        return found, method
    for method in methods:
        if not lacks(method, program) and _installed(method.package):
            return found, method
    raise _cannot(solver, "; ".join(f"{m.name}: {lacks(m, program)}" for m in methods), program)


def lacks(method: Method, program: Program) -> str:
    """What ``program`` needs and ``method`` does not take; empty if nothing."""
    missing = sorted(feature.value for feature in program.features - method.features)
    form = program.lifted if method.kinks and program.lifted is not None else program
    if form.problem_class not in method.classes:
        missing.insert(0, f"problems of class {form.problem_class.value}")
    return ", ".join(missing)


def takes(method: Method, program: Program) -> bool:
    """Whether a method takes the problem, as it is or with its kinks lifted."""
    lifted = program.lifted
    return not lacks(method, program) or (lifted is not None and not lacks(method, lifted))


def able(program: Program) -> list[str]:
    """``"backend:method"`` of everything installed that takes the problem."""
    names = []
    for backend in backends():
        try:
            found = adapter(backend)
        except BackendNotInstalled:
            continue
        methods = [m for m in found.capabilities.methods if takes(m, program) and _installed(m.package)]
        if methods and not found.refusal(program):
            names += [f"{backend}:{method.name}" for method in methods]
    return names


def _cannot(solver: str, lacking: str, program: Program) -> BackendCannotSolve:
    others = ", ".join(able(program)) or "none that is installed"
    return BackendCannotSolve(
        f"{solver!r} cannot solve this problem: it does not take {lacking}. Able: {others}"
    )


@cache  # to look for them takes longer than to solve a small problem
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(name: str) -> Adapter:
    if name in _registered:
        return _registered[name]()
    if name not in _entry_points():
        _entry_points.cache_clear()  # it may have been installed since
    point = _entry_points().get(name)
    if point is None:
        raise BackendNotFound(f"no backend named {name!r}; there is: {', '.join(backends())}")
    found: type[Adapter] = point.load()
    _check_installed(name, found.capabilities.package, found.capabilities.pip)
    return found()


def _check_installed(name: str, package: str | None, pip: str | None) -> None:
    if not _installed(package):
        raise BackendNotInstalled(f"{name!r} needs the package {package!r}: pip install {pip or package}")


def _installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package.split(".")[0]) is not None
