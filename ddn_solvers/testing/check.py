"""One method of an adapter on one problem of known answer: point, multipliers and their signs, status.

Multipliers have to have the sign of L = f + nu^T h + lambda^T g + l^T (lower - u) + r^T (u - upper). Raw points are
checked to 1e-5, multipliers to 1e-4: polish comes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddn_solvers.adapter import Adapter, BackendCannotSolve, Batch, Feature, Options, Point
from ddn_solvers.arrays import Array
from ddn_solvers.evaluators import samples_of
from ddn_solvers.layout import Layout
from ddn_solvers.program import compile_program
from ddn_solvers.testing.cases import Case, Tensors


def make_batch(case: Case, method: str, options: Options | None = None) -> Batch:
    """The case as an adapter receives it: flat float64 arrays, batch dimensions laid end to end."""
    program = compile_program(case.problem)
    declared = case.problem.parameters
    batch = _batch_shape(case)
    parameters = []
    for name, shape in declared.items():
        value = case.parameters[name].detach().double()
        if value.dim() > len(shape):
            value = value.reshape(*value.shape[: value.dim() - len(shape)], -1)  # (*own batch, size)
            parameters.append(value.expand(*batch, -1).reshape(-1, value.shape[-1]).numpy())
        else:
            parameters.append(value.reshape(-1).numpy())
    parameters += [t.detach().double().reshape(-1).numpy() for t in program.graph.read_captures(None)]
    samples = samples_of(parameters, 1)
    n = program.variables.size
    lower, upper = (np.array(np.broadcast_to(side, (samples, n))) for side in program.bounds(parameters))
    start = np.zeros(n) if case.initial is None else _flat(program.variables, case.initial, 1)[0]
    initial = np.clip(np.broadcast_to(start, (samples, n)), lower, upper)
    return Batch(program, tuple(parameters), lower, upper, initial, method, options or Options())


def _flat(layout: Layout, tensors: Tensors, samples: int) -> Array:
    """{name: (*batch, *shape)} -> (samples, size)."""
    parts = [tensors[b.name].double().reshape(samples, b.size).numpy() for b in layout]
    return np.concatenate([np.zeros((samples, 0)), *parts], axis=1)


def _batch_shape(case: Case) -> tuple[int, ...]:
    shapes = [
        case.parameters[name].shape[: case.parameters[name].dim() - len(shape)]
        for name, shape in case.problem.parameters.items()
    ]
    return tuple(torch.broadcast_shapes(*shapes))


def takes(adapter: Adapter, method: str, case: Case) -> bool:
    """Whether the adapter claims, by its capabilities, to solve the case with that method."""
    claimed = adapter.method(method)
    nonconvex = "nonconvex" in case.tags and claimed is not None and Feature.NONCONVEX not in claimed.features
    return _reaches(adapter, method, case) and not nonconvex


def _reaches(adapter: Adapter, method: str, case: Case) -> bool:
    """Whether routing hands it the case, as far as the graph shows what that needs."""
    claimed, program = adapter.method(method), compile_program(case.problem)
    if claimed is None:
        return False
    return program.problem_class in claimed.classes and program.features <= claimed.features


def check_adapter(
    adapter: Adapter,
    method: str,
    case: Case,
    *,
    options: Options | None = None,
    point_tolerance: float = 1e-5,
    dual_tolerance: float = 1e-4,
) -> Sequence[Point]:
    """Hold one method of an adapter to its contract on one case; returns the points of the samples.

    What routing never hands to the method is passed over. A case whose non-convexity no graph shows, and
    that the method does not claim, must be refused by ``BackendCannotSolve`` or end in a status that is not
    ``OPTIMAL``; it may also simply be solved.

    Args:
        adapter: The adapter.
        method: One of its methods.
        case: Of ``CASES``, or ``random_qp(...)``.
        options: Passed on to it.
        point_tolerance: On variables (relative to the largest) and on the objective.
        dual_tolerance: On multipliers and stationarity, relative to the largest force.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    if not _reaches(adapter, method, case):
        return []
    batch = make_batch(case, method, options)
    if not takes(adapter, method, case):
        try:
            points = adapter.solve_batch(batch)
        except BackendCannotSolve:
            return []
        if not case.solvable:
            _check_statuses(case, points)
        return points
    points = adapter.solve_batch(batch)
    assert len(points) == len(batch), f"{case}: {len(points)} points for {len(batch)} samples"
    _check_statuses(case, points)
    if not case.solvable:
        return points
    answer = _flat_answer(case, batch)
    for i, point in enumerate(points):
        where = f"{case}, sample {i}, {method}: {point.message}"
        _close(point.primal, answer.primal[i], point_tolerance, f"{where}: primal")
        if case.objective is not None:
            _close(
                batch[i].objective(point.primal), answer.objective[i], point_tolerance, f"{where}: objective"
            )
        _check_multipliers(adapter, batch, i, point, answer, dual_tolerance, where)
    alone = adapter.attempt(batch[0])
    _close(alone.primal, points[0].primal, point_tolerance, f"{case}: sample 0 alone and in its batch")
    return points


def _check_statuses(case: Case, points: Sequence[Point]) -> None:
    for i, point in enumerate(points):
        assert point.status in case.statuses, (
            f"{case}, sample {i}: {point.status} ({point.message}), expected one of "
            f"{sorted(status.name for status in case.statuses)}"
        )


@dataclass(frozen=True)
class _Answer:
    """The answer of a case as flat arrays, one row a sample; no ``dual`` where the case has none."""

    primal: Array
    objective: Array
    dual: dict[str, Array] | None


def _flat_answer(case: Case, batch: Batch) -> _Answer:
    program, samples = batch.program, len(batch)
    assert case.primal is not None

    def flat(layout: Layout, tensors: Tensors) -> Array:
        shape = _batch_shape(case)
        filled = {b.name: tensors.get(b.name, torch.zeros(b.shape)).double() for b in layout}
        expanded = {b.name: filled[b.name].expand((*shape, *b.shape)) for b in layout}
        return _flat(layout, expanded, samples)

    dual = (
        None
        if case.dual is None
        else {
            "equality": flat(program.equality, case.dual.equality),
            "inequality": flat(program.inequality, case.dual.inequality),
            "lower": flat(program.variables, case.dual.lower),
            "upper": flat(program.variables, case.dual.upper),
        }
    )
    objective = np.zeros(samples) if case.objective is None else case.objective.double().reshape(-1).numpy()
    return _Answer(flat(program.variables, case.primal), objective, dual)


def _check_multipliers(
    adapter: Adapter, batch: Batch, i: int, point: Point, answer: _Answer, tolerance: float, where: str
) -> None:
    """Signs first: with multipliers of the wrong sign the gradient of the Lagrangian does not vanish."""
    program, z = batch.program, point.primal
    claimed = adapter.method(batch.method)
    assert claimed is not None
    if point.equality is None or point.inequality is None:
        assert not (claimed.duals and program.constraints), f"{where}: claims multipliers and returns none"
        return
    instance = batch[i]
    gradient = instance.gradient(z)
    forces = [
        gradient,
        instance.equality_jacobian(z).T @ point.equality,
        instance.inequality_jacobian(z).T @ point.inequality,
    ]
    unbalanced = np.sum(forces, axis=0)
    lower, upper = point.lower, point.upper
    if lower is None or upper is None:  # whatever else is right, bounds that hold have to balance it
        lower = np.where(np.abs(z - instance.lower) < 1e-4, np.maximum(unbalanced, 0), 0)
        upper = np.where(np.abs(z - instance.upper) < 1e-4, np.maximum(-unbalanced, 0), 0)
    found = {"equality": point.equality, "inequality": point.inequality, "lower": lower, "upper": upper}
    for name in ("inequality", "lower", "upper"):
        assert (found[name] >= -tolerance).all(), f"{where}: negative multiplier of {name}: {found[name]}"
    scale = max(1.0, *(np.abs(force).max(initial=0.0) for force in forces))
    _close((unbalanced - lower + upper) / scale, 0 * z, tolerance, f"{where}: gradient of the Lagrangian")
    if answer.dual is not None:
        for name, value in found.items():
            _close(value, answer.dual[name][i], tolerance, f"{where}: multipliers of {name}")


def _close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    error = np.abs(got - expected).max(initial=0.0) / scale
    assert error <= tolerance, f"{what}: off by {error:.2e}: {got}, expected {expected}"
