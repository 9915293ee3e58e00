"""The exception and warning tree.

DDNError
├── ProblemError (ValueError)      the declaration or its parameters are wrong
├── TraceError                     a function cannot be turned into a graph, and must not be guessed at
├── BackendNotFound                no such backend or method
├── BackendNotInstalled            the backend exists, its package is not installed
├── BackendCannotSolve             the backend lacks what the problem needs
├── SolveError                     no verified solution; ``.solution`` holds what was found
└── SensitivityError               the derivative that was asked for does not exist

DDNWarning (UserWarning)
├── DegeneracyWarning              the derivative is one of several (minimum norm, one side)
├── FallbackWarning                a slower route was taken
└── ConvergenceWarning             a sample failed and the policy let it pass
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddn_solvers.solution import Solution


class DDNError(Exception):
    """Root of every error that this library raises on purpose."""


class ProblemError(DDNError, ValueError):
    """A declaration, parameter, option or policy is not what it has to be.

    Args:
        what: The field and what is wrong with it.
        expected: What would have been accepted.
        got: What came instead.
        fix: What to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        message = "; ".join(parts)
        self.args = (
            f"{message}. {fix}" if fix else message,
        )  # Dynamo can trace this, but no super().__init__()


class TraceError(DDNError):
    """A function of the problem uses an operation that has no sound derivative or no fixed value."""


class BackendNotFound(DDNError):
    """The named backend or method does not exist; the message lists what does."""


class BackendNotInstalled(DDNError):
    """The backend's package is missing; the message carries the pip line."""


class BackendCannotSolve(DDNError):
    """The problem needs a class or feature that the backend lacks; the message says who has it."""


class SolveError(DDNError):
    """At least one sample has no verified solution.

    Attributes:
        solution: The whole ``Solution``, good samples included.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> Any:
        return SolveError, (str(self), self.solution)


class SensitivityError(DDNError):
    """The derivative does not exist at this point, or the point is not a KKT point."""


def warn_caller(message: str, category: type[DDNWarning]) -> None:
    """Warn with the line of the caller's code, however deep in this library or in torch we are."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("ddn_solvers", "ddn_adapters", "torch"):
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class DDNWarning(UserWarning):
    """Root of the library's warnings."""


class DegeneracyWarning(DDNWarning):
    """The derivative is not unique; the policy chose one."""


class FallbackWarning(DDNWarning):
    """A slower route was taken (torch callbacks, canonicalisation at every call)."""


class ConvergenceWarning(DDNWarning):
    """A sample is not a verified solution and the policy let it pass."""
