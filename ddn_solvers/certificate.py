"""What can be said of each sample's derivative, as data and as a short report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ddn_solvers.kkt.curvature import curvature
from ddn_solvers.kkt.linear import SINGULAR
from ddn_solvers.kkt.system import System
from ddn_solvers.kkt.verify import Verified
from ddn_solvers.policy import Policy

_SHOWN = 5  # names of active constraints listed in a report


@dataclass(frozen=True, eq=False)
class Certificate:
    """Evidence for the derivative of every sample; tensors of the batch's shape.

    Attributes:
        ok: A unique two-sided derivative exists and was computed at a verified point.
        licq: The gradients of all active constraints are linearly independent.
        rank_deficiency: How many of them are dependent on others.
        sosc: The second-order sufficient condition holds, weakly active constraints kept active.
        strictly_complementary: No constraint is weakly active.
        singular: The KKT matrix is singular.
        one_sided: Some constraint is weakly active, so the derivative is one-sided.
        margin: Smallest of scaled slack or multiplier that decided the active set; infinite where
            there is nothing to decide.
        condition: Estimate of the condition number of the equilibrated KKT matrix.
        stationarity, feasibility, complementarity: Unscaled maximum norms at the polished point.
        active, weakly_active: By constraint name and ``"variable.lower"`` / ``"variable.upper"``,
            bool tensors (*batch, *shape).
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
    stationarity: torch.Tensor
    feasibility: torch.Tensor
    complementarity: torch.Tensor
    active: Mapping[str, torch.Tensor]
    weakly_active: Mapping[str, torch.Tensor]
    null_space: list[torch.Tensor]
    policy: Policy
    distance: torch.Tensor
    reasons: tuple[str, ...]

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
        lines = [
            f"{title}{verdict}",
            f"  residuals         stationarity {at(self.stationarity):.1e}, feasibility {at(self.feasibility):.1e}, "
            f"complementarity {at(self.complementarity):.1e}",
            f"  active            {self._names(self.active, i)}",
            f"  weakly active     {self._names(self.weakly_active, i)} (margin {at(self.margin):.1e})",
            f"  LICQ              {_yes(at(self.licq))}"
            + (f", {int(at(self.rank_deficiency))} dependent" if at(self.rank_deficiency) else ""),
            f"  second order      {_yes(at(self.sosc))}",
            f"  KKT matrix        {'singular' if at(self.singular) else 'regular'}, condition {at(self.condition):.1e}",
        ]
        if at(self.singular):
            lines.append(f"  derivative        by policy.on_singular = {self.policy.on_singular!r}")
        if at(self.one_sided):
            lines.append(f"  derivative        by policy.weakly_active = {self.policy.weakly_active!r}")
        return "\n".join(lines)

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
    program = evaluation.program
    with np.errstate(all="ignore"):
        system = System(
            evaluation.H.map(np.nan_to_num),
            evaluation.regular_J.map(np.nan_to_num),
            torch.from_numpy(active.constraints),
            torch.from_numpy(active.fixed),
        )
        bent = curvature(evaluation, active)
    one_sided = active.weak.any(axis=1)
    singular = system.singular.numpy()
    sides = {
        "lower": (active.lower, active.weak[:, -2 * active.n : -active.n]),
        "upper": (active.upper, active.weak[:, -active.n :]),
    }
    strong: dict[str, torch.Tensor] = {}
    weak: dict[str, torch.Tensor] = {}
    rows = torch.from_numpy(active.constraints)
    weak_rows = torch.from_numpy(
        np.concatenate(
            [np.zeros((len(rows), active.equalities), dtype=bool), active.weak[:, : -2 * active.n]], 1
        )
    )
    for layout, start in ((program.equality, 0), (program.inequality, active.equalities)):
        stop = start + layout.size
        strong |= layout.split(rows[:, start:stop].reshape(*batch, layout.size))
        weak |= layout.split(weak_rows[:, start:stop].reshape(*batch, layout.size))
    for side, (mask, weak_mask) in sides.items():
        for target, values in ((strong, mask), (weak, weak_mask)):
            split = program.variables.split(torch.from_numpy(values).reshape(*batch, active.n))
            bounded = {t.name for t in program.graph.terms if t.kind == side}
            target |= {f"{name}.{side}": value for name, value in split.items() if name in bounded}

    def shaped(values: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values)).reshape(batch)

    return Certificate(
        ok=shaped(verified.optimal & ~one_sided & ~singular),
        licq=shaped(bent.rank == bent.rows),
        rank_deficiency=shaped(bent.rows - bent.rank),
        sosc=shaped(bent.positive),
        strictly_complementary=shaped(~one_sided),
        singular=shaped(singular),
        one_sided=shaped(one_sided),
        margin=shaped(active.margin),
        condition=shaped(system.condition.numpy()),
        **{
            name: shaped(values)
            for name, values in zip(
                ("stationarity", "feasibility", "complementarity"), evaluation.norms, strict=True
            )
        },
        active=strong,
        weakly_active=weak,
        null_space=_null_spaces(verified),
        policy=policy,
        distance=shaped(distance),
        reasons=verified.reasons,
    )


def _null_spaces(verified: Verified) -> list[torch.Tensor]:
    """Directions x with H x in the span of the active rows and A x = 0: where dz is free, (n, k) each."""
    evaluation, active = verified.evaluation, verified.active
    bases = []
    for i in range(len(evaluation.point.z)):
        rows = np.concatenate(
            [evaluation.jacobian[i][active.constraints[i]], np.eye(active.n)[active.fixed[i]]]
        )
        hessian = np.nan_to_num(evaluation.hessian[i])
        norm = np.abs(hessian).max(initial=0.0) or 1.0
        _, s, right = np.linalg.svd(np.nan_to_num(rows), full_matrices=True)
        rank = int((s > 1e-10 * s.max(initial=1e-300)).sum())
        null = right[rank:].T  # (n, n - rank)
        values, vectors = np.linalg.eigh(null.T @ hessian @ null / norm)
        bases.append(torch.from_numpy(null @ vectors[:, np.abs(values) < 10 / SINGULAR]))
    return bases
