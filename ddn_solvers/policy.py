"""What to do where a solution or a derivative is not what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ddn_solvers.errors import ProblemError

_CHOICES: dict[str, tuple[str, ...]] = {
    "on_failure": ("raise", "warn", "nan", "mask", "closest"),
    "on_singular": ("least_squares", "raise", "proximal"),
    "weakly_active": ("active", "inactive", "mean", "raise"),
    "nonsmooth": ("manifold", "clarke"),
}
_LINEAR_SOLVERS = ("auto", "dense", "sparse", "iterative")


@dataclass(frozen=True)
class Policy:
    """Choices for failures and degenerate derivatives; the defaults never hide anything.

    Attributes:
        on_failure: A sample without a verified solution: ``"raise"`` a ``SolveError``; ``"warn"``
            and return the last point; ``"nan"``: values and gradients NaN; ``"mask"``: the last
            point with zero gradient; ``"closest"``: of a sample that is infeasible, the point of smallest
            violation with its own gradient, and ``solution.slacks``; any other failure raises. Smallest in
            the sense of least squares, over all constraints as they are written, within the bounds; among
            points alike in that, the best objective. To about 1e-5 relative: the objective pulls that much.
        on_singular: A singular KKT matrix: ``"least_squares"`` (minimum norm through the
            pseudo-inverse, one ``DegeneracyWarning``), ``"raise"``, or ``"proximal"`` (adds
            ``proximal / 2 |u - y|^2``; error O(proximal)).
        proximal: The paper's delta, used by that choice.
        weakly_active: A constraint with neither slack nor multiplier: treat as ``"active"`` (as
            ReLU's 0 at 0), ``"inactive"``, the ``"mean"`` of both, or ``"raise"``. For reverse mode:
            a jvp is the directional derivative. A function that bends there (``relu(u)**2``) takes its
            side r > 0, and the zero of a vector's norm is kept, whatever is chosen.
        nonsmooth: ``"manifold"`` (kinks act as active constraints) or ``"clarke"`` (the middle of the
            subdifferential in place of each kink).
        smoothing: tau of the barrier-smoothed derivative; 0 is exact. Kinks stay exact.
        accuracy: What "solved" means: scaled residuals and the predicted Newton step, relative.
        active_tol: Scaled slack and multiplier below which a constraint counts as weakly active;
            ``None`` derives it from ``accuracy`` and the caller's dtype.
        linear_solver: How the KKT system is solved: ``"dense"`` (batched LU), ``"sparse"`` (SuperLU on the
            nonzeros of each sample), ``"iterative"`` (MINRES on products with the matrix, which is never
            formed but for samples on which MINRES fails: those go to SuperLU), or a callable
            ``(matrix, rhs) -> solution`` on (B, N, N) and (B, N) tensors. ``"auto"``: sparse from 200 unknowns
            on if at most 2 % of the matrix are nonzeros, or all are near the diagonal; otherwise dense, for large
            batches by the Cholesky factors of Hessian and Schur complement where the Hessian is positive
            definite. On horizons and chains the sparse one is a band Cholesky of the Schur complement, where the
            Hessian consists of small positive definite blocks. Which samples are singular does not depend on the
            choice. Higher derivatives, torch.func transforms and ``smoothing`` use dense algebra.

    Raises:
        ProblemError: An unknown choice, or a number that is negative or not finite.
    """

    on_failure: str = "raise"
    on_singular: str = "least_squares"
    proximal: float = 1e-6
    weakly_active: str = "active"
    nonsmooth: str = "manifold"
    smoothing: float = 0.0
    accuracy: float = 1e-6
    active_tol: float | None = None
    linear_solver: str | Callable[..., Any] = "auto"

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ProblemError(
                    f"policy.{field} is not a known choice",
                    expected="one of " + ", ".join(map(repr, choices)),
                    got=repr(value),
                )
        if not callable(self.linear_solver) and self.linear_solver not in _LINEAR_SOLVERS:
            raise ProblemError(
                "policy.linear_solver is not a known choice",
                expected="a callable or one of " + ", ".join(map(repr, _LINEAR_SOLVERS)),
                got=repr(self.linear_solver),
            )
        for field, zero_allowed in (
            ("proximal", False),
            ("accuracy", False),
            ("smoothing", True),
            ("active_tol", True),
        ):
            value = getattr(self, field)
            if field == "active_tol" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
                raise ProblemError(
                    f"policy.{field} is not a valid number",
                    expected="a finite number " + (">= 0" if zero_allowed else "> 0"),
                    got=repr(value),
                )

    def activity_tolerance(self, dtype: torch.dtype) -> float:
        """Scaled slack or multiplier below which a constraint is weakly active.

        A polished point is far better than ``accuracy``, so its square root of safety suffices in
        float64; in a narrower dtype the parameters themselves are only known to its rounding.
        """
        if self.active_tol is not None:
            return self.active_tol
        return max(1e-2 * self.accuracy, 10 * torch.finfo(dtype).eps)


def as_policy(policy: Policy | None) -> Policy:
    """The default policy for ``None``.

    Raises:
        ProblemError: It is something else than a ``Policy``.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise ProblemError("policy is not a policy", expected="a ddn.Policy", got=type(policy).__name__)
    return policy or Policy()
