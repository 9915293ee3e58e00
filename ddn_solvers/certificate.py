"""What can be said of each sample's derivative, as data and as a short report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddn_solvers.arrays import Mask
from ddn_solvers.kkt.curvature import Curvature, curvature, regular_jacobian
from ddn_solvers.kkt.linear import SINGULAR
from ddn_solvers.kkt.multipliers import dependent_rows
from ddn_solvers.kkt.polish import kkt_system
from ddn_solvers.kkt.verify import Verified
from ddn_solvers.policy import Policy
from ddn_solvers.program import Program
from ddn_solvers.residuals import Evaluation

# Relative residual of the adjoint system from which on its solution is not what was asked for.
_INEXACT = 1e-6
_SHOWN = 5  # names of active constraints listed in a report


@dataclass(frozen=True, eq=False)
class Certificate:
    """Evidence for the derivative of every sample; tensors of the batch's shape.

    Attributes:
        ok: A unique two-sided derivative exists and was computed at a verified point.
        licq: The gradients of all active constraints are linearly independent.
        rank_deficiency: How many of them are dependent on others.
        sosc: The second-order sufficient condition holds, weakly active constraints kept active: the smallest
            eigenvalue of the reduced Hessian exceeds 1e-7 of the largest entry of H.
        strictly_complementary: No constraint is weakly active.
        singular: The KKT matrix is singular.
        one_sided: Some constraint is weakly active, so the derivative is one-sided.
        margin: Smallest of scaled slack or multiplier that decided the active set; infinite where
            there is nothing to decide.
        condition: Estimate of the condition number of the equilibrated KKT matrix.
        adjoint_residual: |K w - v| / |v| of the solve that a vjp makes, for a fixed v in the range of K.
        stationarity, feasibility, complementarity: Unscaled maximum norms at the polished point.
        active, weakly_active, dependent: By constraint name and ``"variable.lower"`` / ``"variable.upper"``,
            bool tensors (*batch, *shape); kinks on which some sample sits by operation and line,
            (*batch, number of kinks there).
            ``dependent``: active ones whose gradients depend on each other.
        null_space: One orthonormal basis a sample of the directions in which the KKT conditions do
            not determine the solution, (n, k).
        policy: What decided where there was a choice.
        distance: |given - polished| of a point found elsewhere, maximum norm; zero for ``solve``.
    """

    ok: torch.Tensor
    licq: torch.Tensor
    rank_deficiency: torch.Tensor
    sosc: torch.Tensor
    strictly_complementary: torch.Tensor
    singular: torch.Tensor
    one_sided: torch.Tensor
    margin: torch.Tensor
    condition: torch.Tensor
    adjoint_residual: torch.Tensor
    stationarity: torch.Tensor
    feasibility: torch.Tensor
    complementarity: torch.Tensor
    active: Mapping[str, torch.Tensor]
    weakly_active: Mapping[str, torch.Tensor]
    dependent: Mapping[str, torch.Tensor]
    null_space: list[torch.Tensor]
    policy: Policy
    distance: torch.Tensor
    reasons: tuple[str, ...]

    def replaced(self, samples: Sequence[int], other: Certificate) -> Certificate:
        """This certificate with what ``other`` says of its samples in place of ``samples``, row-major.

        Args:
            other: Of a batch of ``len(samples)`` and the same constraints; variables may follow behind.
        """
        index, batch = torch.tensor(samples), self.ok.shape

        def put(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            rows = mine.reshape(self.ok.numel(), *mine.shape[len(batch) :])
            return rows.index_copy(0, index, theirs).reshape(mine.shape)

        def by_name(
            mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
        ) -> dict[str, torch.Tensor]:
            found = dict(mine)
            for name, rows in theirs.items():
                found[name] = put(
                    mine.get(name, torch.zeros(*batch, *rows.shape[1:], dtype=torch.bool)), rows
                )
            for name in mine.keys() - theirs.keys():  # a kink is named only where some sample sits on it
                found[name] = put(
                    mine[name], torch.zeros(len(samples), *mine[name].shape[len(batch) :], dtype=torch.bool)
                )
            return found

        n = self.null_space[samples[0]].shape[0]
        null_space, reasons = list(self.null_space), list(self.reasons)
        for k, i in enumerate(samples):
            null_space[i], reasons[i] = other.null_space[k][:n], other.reasons[k]
        merged: dict[str, Any] = {}
        for name, mine in vars(self).items():
            if isinstance(mine, torch.Tensor):
                merged[name] = put(mine, getattr(other, name))
            elif isinstance(mine, Mapping):
                merged[name] = by_name(mine, getattr(other, name))
        return replace(self, **merged, null_space=null_space, reasons=tuple(reasons))

    def __str__(self) -> str:
        samples = self.ok.numel()
        return "\n".join(self._report(i, samples) for i in range(min(samples, _SHOWN))) + (
            f"\n... and {samples - _SHOWN} more samples" if samples > _SHOWN else ""
        )

    def _report(self, i: int, samples: int) -> str:
        def at(values: torch.Tensor) -> float:
            return values.reshape(-1)[i].item()

        title = f"sample {i}: " if samples > 1 else ""
        verdict = "unique two-sided derivative" if at(self.ok) else "NOT a unique two-sided derivative"
        if self.reasons[i]:
            verdict = f"not a verified solution ({self.reasons[i]})"
        dependent = f": {self._names(self.dependent, i)} depend on each other" if not at(self.licq) else ""
        flat = self.null_space[i].shape[1]
        lines = [
            f"{title}{verdict}",
            f"  residuals         stationarity {at(self.stationarity):.1e}, feasibility {at(self.feasibility):.1e}, "
            f"complementarity {at(self.complementarity):.1e}",
            f"  active            {self._names(self.active, i)}",
            f"  weakly active     {self._names(self.weakly_active, i)} (margin {at(self.margin):.1e})",
            f"  LICQ              {_yes(at(self.licq))}{dependent}",
            f"  second order      {_yes(at(self.sosc))}"
            + (f": {flat} flat direction{'s' if flat > 1 else ''}, in null_space" if flat else ""),
            f"  KKT matrix        {'singular' if at(self.singular) else 'regular'}, condition {at(self.condition):.1e}, "
            f"adjoint residual {at(self.adjoint_residual):.1e}",
            f"  derivative        {self._treatment(bool(at(self.singular)), bool(at(self.one_sided)))}",
        ]
        return "\n".join(lines)

    def _treatment(self, singular: bool, one_sided: bool) -> str:
        """What the policy made of a sample."""
        policy = self.policy
        if policy.smoothing:
            return f"smoothed: every slack and multiplier on s l = {policy.smoothing:.0e} (policy.smoothing)"
        parts = []
        if singular and policy.on_singular == "proximal":
            parts.append(
                f"with {policy.proximal:.0e} added to the curvature of flat directions (policy.on_singular)"
            )
        elif singular:
            parts.append("of minimum norm where it is not unique (policy.on_singular)")
        if one_sided:
            side = {"mean": "the mean of both sides", "inactive": "weakly active ones dropped"}
            chosen = side.get(policy.weakly_active, "weakly active ones kept")
            parts.append(f"vjp: {chosen} (policy.weakly_active); jvp: the directional derivative")
        if policy.nonsmooth == "clarke":
            parts.append("in the middle of the subdifferential at kinks (policy.nonsmooth)")
        return "; ".join(parts) or "exact"

    def _names(self, masks: Mapping[str, torch.Tensor], i: int) -> str:
        found = []
        batch = self.ok.dim()
        for name, mask in masks.items():
            one = mask.reshape((self.ok.numel(), *mask.shape[batch:]))[i]
            if one.dim() == 0:
                found += [name] if one else []
            else:
                found += [f"{name}{index.tolist()}" for index in one.nonzero()]
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return ", ".join(found[:_SHOWN]) + more if found else "none"


def _yes(value: float) -> str:
    return "holds" if value else "does not hold"


def certify(
    verified: Verified,
    policy: Policy,
    batch: tuple[int, ...],
    distance: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> Certificate:
    """The certificate of a batch of verified points."""
    evaluation, active = verified.evaluation, verified.active
    program, here = evaluation.program, evaluation.tame()
    with np.errstate(all="ignore"):
        regular = regular_jacobian(here, active)
        system = kkt_system(here, active, regular, linear_solver=policy.linear_solver)
        bent = curvature(here, active)
    one_sided, error = active.weak.any(axis=1), system.error().numpy()
    singular = system.singular.numpy() | verified.singular
    n, m = active.n, active.equalities
    weak = np.concatenate([np.zeros_like(active.constraints[:, :m]), active.weak[:, : -2 * n]], axis=1)
    strongly, weakly, dependent = (
        _by_name(program, batch, *masks)
        for masks in (
            (active.constraints, active.lower, active.upper),
            (weak, active.weak[:, -2 * n : -n], active.weak[:, -n:]),
            dependent_rows(here, active, bent),
        )
    )

    def shaped(values: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values)).reshape(batch)

    return Certificate(
        ok=shaped(verified.optimal & ~one_sided & ~singular & (error <= _INEXACT)),
        licq=shaped(bent.rank == bent.rows),
        rank_deficiency=shaped(bent.rows - bent.rank),
        sosc=shaped(bent.positive),
        strictly_complementary=shaped(~one_sided),
        singular=shaped(singular),
        one_sided=shaped(one_sided),
        margin=shaped(active.margin),
        condition=shaped(system.condition.numpy()),
        adjoint_residual=shaped(error),
        **{
            name: shaped(values)
            for name, values in zip(
                ("stationarity", "feasibility", "complementarity"), evaluation.norms, strict=True
            )
        },
        active=strongly,
        weakly_active=weakly,
        dependent=dependent,
        null_space=_flat_directions(here, bent),
        policy=policy,
        distance=shaped(distance),
        reasons=tuple(
            "" if good else why for good, why in zip(verified.optimal, verified.reasons, strict=True)
        ),
    )


def _by_name(
    program: Program, batch: tuple[int, ...], rows: Mask, lower: Mask, upper: Mask
) -> dict[str, torch.Tensor]:
    """Masks of rows of c (B, rows) and of bounds (B, n) by the names of what they belong to."""
    found: dict[str, torch.Tensor] = {}
    of_rows = torch.from_numpy(rows)
    m = program.equality.size
    for layout, start, stop in ((program.equality, 0, m), (program.inequality, m, program.constraints)):
        found |= layout.split(of_rows[:, start:stop].reshape(*batch, layout.size))
    if program.pieces is not None:
        names = [str(kink) for kink in program.pieces.kinks]
        for name in dict.fromkeys(names):
            index = [program.constraints + k for k, other in enumerate(names) if other == name]
            if rows[:, index].any():
                found[name] = of_rows[:, index].reshape(*batch, len(index))
    for side, mask in (("lower", lower), ("upper", upper)):
        split = program.variables.split(torch.from_numpy(mask).reshape(*batch, program.variables.size))
        bounded = {term.name for term in program.graph.terms if term.kind == side}
        found |= {f"{name}.{side}": value for name, value in split.items() if name in bounded}
    return found


def _flat_directions(evaluation: Evaluation, bent: Curvature) -> list[torch.Tensor]:
    """Directions in the null space of the active rows without curvature: where dz is free, (n, k) each."""
    batch, n = evaluation.point.z.shape
    if bent.null is None:
        return [torch.zeros(n, 0, dtype=torch.float64)] * batch
    bases = []
    for null, size, hessian, unit in zip(bent.null, bent.size, evaluation.hessian, bent.unit, strict=True):
        basis = null[(null != 0).any(axis=1)].T  # (n, n - rank)
        values, vectors = np.linalg.eigh(basis.T @ (size[:, None] * hessian * size) @ basis / unit)
        flat = basis @ vectors[:, np.abs(values) < 10 / SINGULAR]
        bases.append(torch.from_numpy(flat if (size == 1).all() else np.linalg.qr(size[:, None] * flat)[0]))
    return bases
