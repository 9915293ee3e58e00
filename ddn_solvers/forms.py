"""Ready-made problems: the classics, declared once with the same functions a user would write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddn_solvers.errors import ProblemError
from ddn_solvers.layout import Shape
from ddn_solvers.problem import Problem


def quadratic_program(n: int, equalities: int = 0, inequalities: int = 0, bounds: Any = None) -> Problem:
    """minimise 1/2 u^T P u + q^T u  subject to  A u = b, G u <= h, and bounds.

    Args:
        n: Number of variables; the variable is called ``"u"``.
        equalities: Rows of A; without any, there are no parameters A and b.
        inequalities: Rows of G; without any, there are no parameters G and h.
        bounds: ``(lower, upper)`` for u, each side as in ``Problem``.

    Returns:
        A ``Problem`` with parameters P (n, n), q (n,), A (equalities, n), b, G (inequalities, n), h, and
        constraints ``"equality"`` and ``"inequality"``. Only the symmetric part of P counts.
    """
    return _linear_constraints(_quadratic, {"P": (n, n), "q": (n,)}, n, equalities, inequalities, bounds)


def linear_program(n: int, equalities: int = 0, inequalities: int = 0, bounds: Any = None) -> Problem:
    """minimise c^T u  subject to  A u = b, G u <= h, and bounds.

    Args and Returns: As ``quadratic_program``, with the one cost parameter c (n,).
    """
    return _linear_constraints(_linear, {"c": (n,)}, n, equalities, inequalities, bounds)


def least_squares(
    rows: int, n: int, equalities: int = 0, inequalities: int = 0, bounds: Any = None, ridge: bool = False
) -> Problem:
    """minimise 1/2 |M u - y|^2 (+ 1/2 sum_i w_i u_i^2)  subject to  A u = b, G u <= h, and bounds.

    Args:
        rows: Rows of M, the number of residuals.
        ridge: Add a parameter w (n,), one penalty weight a variable.

    Others and Returns: As ``quadratic_program``, with parameters M (rows, n), y (rows,) and w.
    """
    parameters: dict[str, Shape] = {"M": (rows, n), "y": (rows,)}
    if ridge:
        parameters["w"] = (n,)
    objective = _ridge if ridge else _squares
    return _linear_constraints(objective, parameters, n, equalities, inequalities, bounds)


def _linear_constraints(
    objective: Callable[..., torch.Tensor],
    parameters: dict[str, Shape],
    n: int,
    equalities: int,
    inequalities: int,
    bounds: Any,
) -> Problem:
    for name, count in (("n", n), ("equalities", equalities), ("inequalities", inequalities)):
        if not isinstance(count, int) or isinstance(count, bool) or count < (name == "n"):
            raise ProblemError(f"{name} is not a count", expected="an integer >= 0 (n >= 1)", got=repr(count))
    if equalities:
        parameters |= {"A": (equalities, n), "b": (equalities,)}
    if inequalities:
        parameters |= {"G": (inequalities, n), "h": (inequalities,)}
    return Problem(
        variables={"u": (n,)},
        parameters=parameters,
        objective=objective,
        equality={"equality": _equality} if equalities else None,
        inequality={"inequality": _inequality} if inequalities else None,
        bounds=None if bounds is None else {"u": bounds},
    )


def _quadratic(u: torch.Tensor, P: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return 0.5 * (u @ (P @ u)) + q @ u


def _linear(u: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return c @ u


def _squares(u: torch.Tensor, M: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * (M @ u - y).square().sum()


def _ridge(u: torch.Tensor, M: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return 0.5 * (M @ u - y).square().sum() + 0.5 * (w * u.square()).sum()


def _equality(u: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return A @ u - b


def _inequality(u: torch.Tensor, G: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return G @ u - h
