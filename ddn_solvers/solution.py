"""What a solve returns: the point, its multipliers, and the evidence for both."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ddn_solvers.certificate import Certificate


class Status(enum.Enum):
    """Outcome of one sample. A backend's word is advice: OPTIMAL is given by our own residuals."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    UNBOUNDED = "unbounded"
    ITERATION_LIMIT = "iteration limit"
    TIME_LIMIT = "time limit"
    NUMERICAL_ERROR = "numerical error"
    NOT_A_KKT_POINT = "not a KKT point"
    NOT_A_MINIMUM = "not a minimum"
    BACKEND_ERROR = "backend error"


@dataclass(frozen=True)
class DualSolution:
    """Multipliers by name, signs as in ``L = f + nu^T h + lambda^T g``; shapes (*batch, *constraint).

    Attributes:
        equality: nu, free in sign.
        inequality: lambda >= 0.
        lower: Multipliers >= 0 of ``lower - u <= 0``, by variable; zero where there is no bound.
        upper: Multipliers >= 0 of ``u - upper <= 0``, by variable.
    """

    equality: Mapping[str, torch.Tensor]
    inequality: Mapping[str, torch.Tensor]
    lower: Mapping[str, torch.Tensor]
    upper: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Residuals:
    """Unscaled maximum norms at the returned point, tensors of the batch's shape.

    Attributes:
        stationarity: ``max |grad_u L|``.
        feasibility: Largest violation of an equality, inequality or bound.
        complementarity: Largest ``|multiplier * slack|``.
    """

    stationarity: torch.Tensor
    feasibility: torch.Tensor
    complementarity: torch.Tensor


@dataclass(frozen=True)
class Stats:
    """How the answer was found; tuples have one entry a sample, in row-major order of the batch.

    Attributes:
        backend: Backend that gave the returned point.
        method: Its method.
        iterations: Iterations it reports, or ``None`` where it reports none.
        message: What the backend (or the verification) said.
        seconds: Wall time of the whole call.
        phases: Of these, seconds in the ``"backend"`` and in ``"verification"``: polish, residuals, multipliers,
            active set, and the explanation of failures.
    """

    backend: tuple[str, ...]
    method: tuple[str, ...]
    iterations: tuple[int | None, ...]
    message: tuple[str, ...]
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Solution:
    """A verified solution of every sample; its tensors carry gradients to the parameters.

    Attributes:
        primal: Variable name to tensor of shape (*batch, *shape).
        dual: Multipliers, see ``DualSolution``.
        objective: (*batch,).
        status: One ``Status`` a sample, row-major; length 1 without a batch.
        converged: Bool tensor of the batch's shape.
        residuals: See ``Residuals``.
        stats: See ``Stats``.
        slacks: With ``Policy(on_failure="closest")``, else ``None``: by constraint name and
            ``"variable.lower"`` / ``"variable.upper"``, (*batch, *shape), by how much the returned point of an
            infeasible sample violates a constraint (an equality with its sign); zero for all other samples.
    """

    primal: Mapping[str, torch.Tensor]
    dual: DualSolution
    objective: torch.Tensor
    status: tuple[Status, ...]
    converged: torch.Tensor
    residuals: Residuals
    stats: Stats
    slacks: Mapping[str, torch.Tensor] | None
    _certify: Callable[[], Certificate] = field(repr=False)

    def __getitem__(self, variable: str) -> torch.Tensor:
        return self.primal[variable]

    @cached_property
    def certificate(self) -> Certificate:
        """What can be said of each sample's derivative; computed on first use."""
        return self._certify()

    def detach(self) -> Solution:
        """The same solution without gradients, as for a warm start later."""

        def of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.detach() for name, tensor in tensors.items()}

        return replace(
            self,
            primal=of(self.primal),
            dual=DualSolution(**{side: of(tensors) for side, tensors in vars(self.dual).items()}),
            objective=self.objective.detach(),
            slacks=None if self.slacks is None else of(self.slacks),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Another process, or a file, gets numbers: no gradients, and the certificate as it is."""
        return {**vars(self.detach()), "_certify": _Known(self.certificate)}


@dataclass(frozen=True)
class _Known:
    certificate: Certificate

    def __call__(self) -> Certificate:
        return self.certificate
