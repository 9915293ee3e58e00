"""``on_failure="closest"``: samples that have no feasible point, at the point of smallest violation.

They are solved a second time, as elastic problems (``derived.py``), whose solutions are differentiated like any
other: their gradient is exact for the penalty that was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ddn_solvers.arrays import Array, Index
from ddn_solvers.binding import Binding
from ddn_solvers.certificate import Certificate, certify
from ddn_solvers.derived import elastic, with_extra
from ddn_solvers.diagnosis import nearest_feasible, violation
from ddn_solvers.errors import BackendCannotSolve, ProblemError
from ddn_solvers.implicit import Operation, Outputs, apply
from ddn_solvers.kkt.verify import Verified
from ddn_solvers.program import Program
from ddn_solvers.residuals import Bound, Evaluation, PrimalDual
from ddn_solvers.routing import Solver, routes
from ddn_solvers.search import Search, Start
from ddn_solvers.solution import Status

_PENALTY = 1e5  # force of the largest slack relative to what the objective exerts, within a factor of four
_ACCURACY = 1e-9  # of the elastic problem, in which the objective is a small force
_OFF_GRID = 0.13  # so that round numbers are not where the penalty jumps


@dataclass(frozen=True)
class Closest:
    """Samples that have no feasible point, where they come closest to one.

    Attributes:
        samples: Their numbers in the batch, row-major.
        slacks: By constraint name and ``"variable.lower"`` / ``"variable.upper"``, (*batch, *shape): by how
            much a constraint is violated, signed for equalities; zero for all other samples.
    """

    samples: tuple[int, ...]
    slacks: Mapping[str, torch.Tensor]
    _verified: Verified | None = None  # of these samples, of the elastic problem

    def vouch(self, certificate: Certificate) -> Certificate:
        """``certificate``, with what can be said of the derivatives of these samples."""
        if self._verified is None:
            return certificate
        count = len(self.samples)
        return certificate.replaced(
            self.samples, certify(self._verified, certificate.policy, (count,), np.zeros(count))
        )


def replace_infeasible(
    search: Search, binding: Binding, outputs: Outputs, solver: Solver
) -> tuple[Outputs, Closest]:
    """``outputs`` with the samples that ``search`` found infeasible at their closest points.

    A sample whose elastic problem cannot be solved stays as it is; ``search.reasons`` says why.

    Raises:
        ProblemError: ``torch.func.vmap`` maps over the call: which samples are replaced is not the same for all.
    """
    infeasible = np.flatnonzero([status is Status.INFEASIBLE for status in search.status])
    if not infeasible.size:
        return outputs, Closest((), _slacks(search.program, binding, None))
    if len(search.status) != binding.samples:
        raise ProblemError(
            "policy.on_failure='closest' under torch.func.vmap",
            expected="a batch of parameters instead of vmap",
            fix="Give the parameters a leading batch dimension.",
        )
    program, n, m = search.program, search.program.variables.size, search.program.equality.size
    again, found, bound = _solve_elastic(search, binding, infeasible, solver)
    for k, i in enumerate(infeasible):
        if again.status[k] is not Status.OPTIMAL:
            why = f"its elastic problem: {again.status[k].value} {again.reasons[k]}".rstrip()
            search.reasons[i] = "; ".join(text for text in (search.reasons[i], why) if text)
    good = np.flatnonzero([status is Status.OPTIMAL for status in again.status])
    if not good.size:
        return outputs, Closest((), _slacks(program, binding, None))
    kept, where = torch.from_numpy(good), torch.from_numpy(infeasible[good])
    assert again.verified is not None
    verified = again.verified.take(good)
    z, y, left, right = (
        values[kept] for values in (found.z[:, :n], found.y, found.lower[:, :n], found.upper[:, :n])
    )
    f, c, lower, upper = program.evaluate_batch(z, _taken(_taken(binding.blocks, infeasible), good))
    residuals = _residuals(program, bound.take(good), verified.evaluation.point)
    merged = {"z": z, "y": y, "lower": left, "upper": right, "objective": f, "residuals": residuals}
    merged = {name: getattr(outputs, name).index_copy(0, where, values) for name, values in merged.items()}
    violations = (c[:, :m], c[:, m:].relu(), (lower - z).relu(), (z - upper).relu())
    whole = [v.new_zeros(binding.samples, v.shape[1]).index_copy(0, where, v) for v in violations]
    closest = Closest(tuple(where.tolist()), _slacks(program, binding, whole), verified)
    return outputs._replace(**merged), closest


def _solve_elastic(
    search: Search, binding: Binding, samples: Index, solver: Solver
) -> tuple[Search, Outputs, Bound]:
    """The elastic problems of some samples: their search, what it found, and bounds that do not contradict."""
    assert search.verified is not None
    bound = _uncrossed(search.verified.evaluation.bound)
    given = search.start(Start.GIVEN, bound.lower, bound.upper)[samples]
    bound = bound.take(samples)
    with temporarily_clear_interpreter_stack():  # numbers, inside of a torch.func transform too
        starts = [_start(search.program, bound.take([k]), z) for k, z in enumerate(given)]
    start, unit, penalty = (np.stack(column) for column in zip(*starts, strict=True))
    weights = [torch.from_numpy(unit), torch.from_numpy(penalty)]
    blocks = with_extra(search.program, _taken(binding.blocks, samples), weights)
    relaxed, options = elastic(search.program), search.options
    try:
        tried = routes(solver, relaxed)
    except BackendCannotSolve:  # an LP's solver
        tried, options = routes("auto", relaxed), replace(options, native={})
    policy = replace(search.policy, accuracy=min(search.policy.accuracy, _ACCURACY))
    again = Search(
        program=relaxed,
        policy=policy,
        dtype=search.dtype,
        samples=len(samples),
        routes=tried,
        options=options,
        initial=start,
        warm_start=None,
    )
    return again, apply(Operation(relaxed, policy, again.find, options.threads), blocks), bound


def _taken(blocks: Sequence[torch.Tensor], samples: Index) -> list[torch.Tensor]:
    index = torch.from_numpy(samples)
    return [block.index_select(0, index) if block.dim() == 2 else block for block in blocks]


def _uncrossed(bound: Bound) -> Bound:
    """Bounds that contradict replaced by their middle, as in the elastic problem."""
    crossed = bound.lower > bound.upper
    middle = (np.where(crossed, bound.lower, 0.0) + np.where(crossed, bound.upper, 0.0)) / 2
    lower, upper = (np.where(crossed, middle, side) for side in (bound.lower, bound.upper))
    return replace(bound, lower=lower, upper=upper)


def _start(program: Program, bound: Bound, z: Array) -> tuple[Array, Array, Array]:
    """Point and slacks from which one sample's elastic problem is solved, its unit of slacks, its penalty.

    The penalty of a slack in the constraints' own units is a power of 16, so that it does not change with small
    changes of the parameters; whatever the unit of s is, the solution is the same.
    """
    closest = nearest_feasible(program, bound, z)
    slacks = violation(program, bound, closest)
    largest = np.abs(slacks).max(initial=0.0) or 1.0
    unit = 2.0 ** np.round(np.log2(largest))
    point = PrimalDual.resting(program, bound.parameters, closest[None])
    force = Evaluation.at(program, bound, point).force[0, 0]
    penalty = 16.0 ** np.round(np.log2(_PENALTY * force / largest**2) / 4 + _OFF_GRID)
    return np.concatenate([closest, slacks / unit]), np.array([unit]), np.array([penalty * unit**2])


def _residuals(program: Program, bound: Bound, point: PrimalDual) -> torch.Tensor:
    """Those of the problem itself at points of its elastic problem, (B, 3)."""
    n = program.variables.size
    own = replace(point, z=point.z[:, :n], lower=point.lower[:, :n], upper=point.upper[:, :n])
    with temporarily_clear_interpreter_stack():
        return torch.from_numpy(np.stack(Evaluation.at(program, bound, own).norms, axis=1))


def _slacks(
    program: Program, binding: Binding, violations: Sequence[torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """By name: violations of h, g, lower and upper bounds, (B, size) each; zeros without any."""
    layouts = (program.equality, program.inequality, program.variables, program.variables)
    if violations is None:
        violations = [torch.zeros(binding.samples, layout.size, dtype=torch.float64) for layout in layouts]
    h, g, *sides = (
        layout.split(binding.give_back(values, layout.size))
        for layout, values in zip(layouts, violations, strict=True)
    )
    bounded = {(term.kind, term.name) for term in program.graph.terms}
    named: dict[str, Any] = {**h, **g}
    for side, values in zip(("lower", "upper"), sides, strict=True):
        named |= {f"{name}.{side}": v for name, v in values.items() if (side, name) in bounded}
    return named
