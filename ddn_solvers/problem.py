"""The declaration of a problem, and the one statement of its Lagrangian.

    y(x) = argmin_u f(u, x)   subject to   h(u, x) = 0,  g(u, x) <= 0,  lower(x) <= u <= upper(x)

    L(u, nu, lambda, l, r; x) = f + nu^T h + lambda^T g + l^T (lower - u) + r^T (u - upper)

with lambda, l, r >= 0 and nu free. At a KKT point grad_u L = 0, and lambda_i g_i = 0,
l_i (lower_i - u_i) = 0, r_i (u_i - upper_i) = 0. Every adapter converts to these signs. (The
paper, arXiv 1909.04866, writes L = f - lam^T h; its lam is minus ours.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ddn_solvers import validation
from ddn_solvers.layout import Shape

Function = Callable[..., torch.Tensor]
Bound = float | torch.Tensor | str | Function | None
Constraints = Function | Sequence[Function] | Mapping[str, Function] | None


@dataclass(frozen=True, eq=False)
class Problem:
    """A parametrised optimization problem, written for one instance (no batch dimension).

    Attributes:
        variables: Name to shape of one instance; ``()`` is a scalar.
        parameters: Name to shape of one instance.
        objective: Function of variables and parameters, bound by argument name, returning a 0-d
            tensor; ``None`` for a feasibility problem.
        equality: A function, a list, or a dict by name; each element of what it returns is one
            constraint ``= 0``. Unnamed ones are called ``equality0``, ``equality1``, ...
        inequality: The same for ``<= 0``.
        bounds: Variable name to ``(lower, upper)``; each side ``None``, a number, a tensor, the
            name of a parameter, or a function of parameters, broadcast to the variable's shape.

    Raises:
        ProblemError: A field is not what it has to be; the message names it.
    """

    variables: Mapping[str, Shape]
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    objective: Function | None = None
    equality: Constraints = None
    inequality: Constraints = None
    bounds: Mapping[str, tuple[Bound, Bound]] | None = None

    def __post_init__(self) -> None:
        for name, value in validation.normalise(self).items():
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Problem:
        return self  # immutable, and copies share what was compiled

    def __reduce__(self) -> Any:
        fields = {name: getattr(self, name) for name in validation.FIELDS}
        validation.check_picklable(fields)
        return Problem.from_dict, (fields,)

    @staticmethod
    def from_dict(declaration: Mapping[str, Any]) -> Problem:
        """Build a ``Problem`` from a dict with the same fields.

        Raises:
            ProblemError: An unknown or missing field, or a field that is not what it has to be.
        """
        return Problem(**validation.checked_fields(declaration))


def as_problem(declaration: Problem | Mapping[str, Any]) -> Problem:
    """Accept a ``Problem`` or the dict that ``Problem.from_dict`` takes."""
    return declaration if isinstance(declaration, Problem) else Problem.from_dict(declaration)
