"""Validate, route, call, verify, retry: the one way from a problem and its parameters to a solution."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ddn_solvers.adapter import Options
from ddn_solvers.arrays import Array
from ddn_solvers.assembly import assemble
from ddn_solvers.binding import Binding, bind, flat_batch, flat_point, initial_batch
from ddn_solvers.captures import Overrides
from ddn_solvers.certificate import Certificate, certify
from ddn_solvers.closest import Closest, replace_infeasible
from ddn_solvers.errors import (
    ConvergenceWarning,
    FallbackWarning,
    ProblemError,
    SolveError,
    warn_caller,
)
from ddn_solvers.implicit import Operation, Outputs, apply
from ddn_solvers.layout import Layout
from ddn_solvers.points import Points
from ddn_solvers.policy import Policy, as_policy
from ddn_solvers.problem import Problem, as_problem
from ddn_solvers.program import Program, compile_program
from ddn_solvers.routing import Solver, newton_first, routes
from ddn_solvers.search import Search
from ddn_solvers.solution import Solution, Stats, Status
from ddn_solvers.uncompiled import uncompiled

_EXPLAINED = 5  # failed samples whose reasons a message gives; of the others it gives number and status


@uncompiled
def solve(
    problem: Problem | Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    solver: Solver = "auto",
    initial: Any = None,
    warm_start: Solution | None = None,
    options: Mapping[str, Any] | None = None,
    policy: Policy | None = None,
) -> Solution:
    """Solve a problem for a batch of parameters; differentiable in them.

    Args:
        problem: A ``Problem`` or the dict that ``Problem.from_dict`` takes.
        parameters: Name -> tensor (*batch, *shape); leading batch dimensions broadcast.
        solver: ``"backend"``, ``"backend:method"``, ``"auto"`` (by problem class), or a list of
            these, tried in order for each sample. ``"auto"`` begins with Newton steps on a QP without inequalities
            and bounds, or a sparse one, and with an interior point method for whole batches on small problems that
            are no LP or QP; on these, large or small, it ends with another start.
        initial: Starting point: a dict by variable, or a tensor when there is one variable; by
            default zero, moved into the bounds. Samples that fail from there are tried from the default.
        warm_start: An earlier ``Solution`` of the same batch: point and multipliers to start from, with
            the same retry. ``"auto"`` first takes Newton steps from there, on the active set as it
            changes (of an LP or QP as without a warm start); a sample that ends in a verified minimum needs
            no backend.
        options: ``max_iter``, ``time_limit`` (seconds a sample), ``call_time_limit`` (seconds for
            all samples and retries together), ``tolerance``, ``isolate`` (``True``: the
            backend runs in a process of its own, which may crash or be ended), ``workers`` (in so many of them, each
            with a share of the samples), ``threads`` (how many torch may use in the call and its derivatives: a
            number, ``"all"`` that it is set to, or ``"auto"``: one for KKT matrices of up to 500 rows), and native
            options of the backend.
        policy: What to do about failures and degenerate derivatives.

    Returns:
        The polished, verified solution of every sample. Point, multipliers and objective carry
        gradients; they are exact to rounding times the condition of the KKT matrix.

    Raises:
        ProblemError: A wrong declaration, parameter, option or policy, before any solver runs.
        BackendNotFound, BackendNotInstalled, BackendCannotSolve: The solver's name does not serve.
        SolveError: A sample has no verified solution (unless ``policy.on_failure`` says otherwise).
    """
    return solve_captured(as_problem(problem), parameters, solver, initial, warm_start, options, policy, None)


def solve_captured(
    problem: Problem,
    parameters: Mapping[str, Any] | None,
    solver: Solver,
    initial: Any,
    warm_start: Solution | None,
    options: Mapping[str, Any] | None,
    policy: Policy | None,
    overrides: Overrides | None,
) -> Solution:
    """``solve`` with other objects in place of what the problem's functions capture (a layer's own)."""
    started = time.perf_counter()
    policy = as_policy(policy)
    call_options = as_options(options)
    program = compile_program(problem, overrides)
    warn_if_callbacks(program)
    start, start_batch = initial_batch(program.variables, initial)
    binding = bind(program, parameters, program.graph.read_captures(overrides), start, start_batch)
    if start and start_batch != binding.batch:
        start = {k: v.expand((*binding.batch, *program.variables.by_name[k].shape)) for k, v in start.items()}
    search = Search(
        program=program,
        policy=policy,
        dtype=binding.dtype,
        samples=binding.samples,
        routes=routes(solver, program),
        options=call_options,
        initial=flat_point(program.variables, start, binding.batch) if start else None,
        warm_start=_warm_points(program, warm_start, binding),
        newton_first=newton_first(solver, program, warm_start is not None),
    )
    outputs, closest = (
        apply(Operation(program, policy, search.find, call_options.threads), binding.blocks),
        None,
    )
    if policy.on_failure == "closest":
        outputs, closest = replace_infeasible(search, binding, outputs, solver)
    return conclude(search, binding, outputs, started, closest)


def conclude(
    search: Search, binding: Binding, outputs: Outputs, started: float, closest: Closest | None = None
) -> Solution:
    """What a search has found, as the caller's ``Solution``; failures as the policy says.

    Args:
        started: When the call began, by ``time.perf_counter``.
        closest: Samples for which ``outputs`` has the closest point instead of a solution.

    Raises:
        SolveError: As ``solve``.
    """
    stats = Stats(
        tuple(search.backend),
        tuple(search.method),
        tuple(search.iterations),
        tuple(search.reasons),
        time.perf_counter() - started,
        dict(search.phases),
    )

    def certificate() -> Certificate:
        assert search.verified is not None
        found = certify(search.verified, search.policy, binding.batch, np.zeros(len(search.status)))
        return found if closest is None else closest.vouch(found)

    slacks = None if closest is None else closest.slacks
    solution = assemble(search.program, binding, outputs, tuple(search.status), stats, certificate, slacks)
    report_failures(solution, search, () if closest is None else closest.samples)
    return solution


def as_options(options: Mapping[str, Any] | None) -> Options:
    """What every adapter translates, or never sees, split from the backend's native options."""
    if not isinstance(options, Mapping | None):
        raise ProblemError("options are no dict", expected="a dict of options by name", got=repr(options))
    native = dict(options or {})
    limits: dict[str, Any] = {}
    for name, kind in (
        ("max_iter", int),
        ("time_limit", float),
        ("call_time_limit", float),
        ("tolerance", float),
    ):
        value = native.pop(name, None)
        if value is None:
            continue
        good = isinstance(value, (int,) if kind is int else (int, float)) and not isinstance(value, bool)
        if not good or not value > 0:
            raise ProblemError(
                f"option {name!r} is not valid", expected=f"a positive {kind.__name__}", got=repr(value)
            )
        limits[name] = kind(value)
    isolate = native.pop("isolate", False)
    if not isinstance(isolate, bool):
        raise ProblemError("option 'isolate' is not valid", expected="True or False", got=repr(isolate))
    workers = native.pop("workers", None)
    if workers is None:
        workers = int(isolate)
    elif not _is_count(workers):
        raise ProblemError("option 'workers' is not valid", expected="a positive int", got=repr(workers))
    threads = native.pop("threads", "auto")
    if not _is_count(threads) and threads not in ("auto", "all"):
        raise ProblemError(
            "option 'threads' is not valid", expected="'auto', 'all' or a positive int", got=repr(threads)
        )
    return Options(**limits, workers=workers, threads=threads, native=native)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _warm_points(program: Program, warm_start: Solution | None, binding: Binding) -> Points | None:
    """An earlier solution as points, detached; it must be of the same batch."""
    if warm_start is None:
        return None
    if not isinstance(warm_start, Solution):
        raise ProblemError(
            "warm_start is not a solution", expected="a ddn Solution", got=type(warm_start).__name__
        )
    if len(warm_start.status) != binding.samples or set(warm_start.primal) != set(program.problem.variables):
        raise ProblemError(
            "warm_start is the solution of another batch or problem",
            expected=f"{binding.samples} samples of {', '.join(program.problem.variables)}",
            got=f"{len(warm_start.status)} samples of {', '.join(warm_start.primal)}",
        )

    def flat(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Array:
        return np.nan_to_num(flat_batch(layout, tensors, binding.samples))

    dual, samples = warm_start.dual, binding.samples
    return Points(
        flat(program.variables, warm_start.primal),
        list(warm_start.status),
        flat(program.equality, dual.equality),
        flat(program.inequality, dual.inequality),
        flat(program.variables, dual.lower),
        flat(program.variables, dual.upper),
        [None] * samples,
        [""] * samples,
    )


# -- failures -----------------------------------------------------------------------------------------


def report_failures(solution: Solution, search: Search, replaced: Sequence[int]) -> None:
    """Raise or warn about samples without a verified solution, as the policy says.

    Args:
        replaced: Samples for which the policy has put another point already.
    """
    on_failure = search.policy.on_failure
    failed = [i for i, s in enumerate(search.status) if s is not Status.OPTIMAL and i not in replaced]
    if not failed or on_failure in ("nan", "mask"):
        return
    total = len(search.status)
    shown = [
        (f"sample {i}: " if total > 1 else "")
        + search.status[i].value
        + (f" ({search.reasons[i]})" if search.reasons[i] else "")
        for i in failed[:_EXPLAINED]
    ]
    rest = failed[_EXPLAINED:]
    more = "".join(
        f"; {status.value} too: {_ranges([i for i in rest if search.status[i] is status])}"
        for status in dict.fromkeys(search.status[i] for i in rest)
    )
    who = f"{len(failed)} of {total} samples have" if total > 1 else "the problem has"
    message = f"{who} no verified solution: {'; '.join(shown)}{more}"
    if on_failure == "warn":
        warn_caller(message, ConvergenceWarning)
    else:
        raise SolveError(message, solution)


def _ranges(samples: Sequence[int]) -> str:
    """Increasing numbers as ``samples 3, 7-9``."""
    runs: list[list[int]] = []
    for i in samples:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{'samples' if len(samples) > 1 else 'sample'} {text}"


def warn_if_callbacks(program: Program) -> None:
    """One ``FallbackWarning`` a call where the functions are torch callbacks."""
    if program.refusal is not None:
        warn_caller(
            f"the problem's functions cannot be compiled because of {program.refusal}; torch evaluates them at "
            "every step instead, which is slower.",
            FallbackWarning,
        )
