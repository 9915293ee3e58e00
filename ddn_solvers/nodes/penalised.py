"""What robust pools are given, checked: points, a penalty, alpha, weights and masks."""

from __future__ import annotations

import math

import torch
from torch import nn

from ddn_solvers.errors import ProblemError
from ddn_solvers.nodes.penalties import PENALTIES, Penalty


def penalty_named(name: str) -> Penalty:
    """Look a penalty up.

    Raises:
        ProblemError: There is none of this name.
    """
    if name not in PENALTIES:
        raise ProblemError(f"unknown penalty {name!r}; there are {', '.join(map(repr, PENALTIES))}")
    return PENALTIES[name]


def broadcast(values: torch.Tensor, shape: torch.Size, name: str, against: str) -> torch.Tensor:
    """Values expanded to a shape.

    Raises:
        ProblemError: They do not broadcast.
    """
    try:
        return values.expand(shape)
    except RuntimeError:
        raise ProblemError(
            f"{name} of shape {tuple(values.shape)} does not broadcast against {against}, of shape {tuple(shape)}"
        ) from None


def weights_of(
    weights: torch.Tensor | None, mask: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor | None:
    """Weights of the given shape, zero where masked out."""
    if mask is None:
        return None if weights is None else broadcast(weights.to(dtype), shape, "weights", "the points")
    mask = broadcast(mask.to(torch.bool), shape, "mask", "the points")
    return (
        mask.to(dtype)
        if weights is None
        else torch.where(mask, broadcast(weights.to(dtype), shape, "weights", "the points"), 0)
    )


def scale_of(
    alpha: float | torch.Tensor, batch: torch.Size, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Alpha as a tensor of as many dimensions as the batch, and one more."""
    scale = torch.as_tensor(alpha, dtype=dtype, device=device)
    broadcast(scale, batch, "alpha", "the result")
    return scale.reshape((1,) * (len(batch) - scale.ndim) + scale.shape + (1,))


def check_values(alpha: torch.Tensor, weights: torch.Tensor | None) -> None:
    """Check what only the values tell, of plain tensors; a pool is a set of weights along the last dimension.

    Raises:
        ProblemError: Alpha or a weight is out of range, or a pool has no weight.
    """
    if not bool(((alpha > 0) & (alpha < math.inf)).all()):
        raise ProblemError(f"alpha must be positive and finite; its smallest entry is {float(alpha.min())}")
    if weights is None or not weights.numel():
        return
    if not bool(((weights >= 0) & (weights < math.inf)).all()):
        raise ProblemError("weights must be finite and not negative")
    empty = int((weights.amax(-1) == 0).sum())
    if empty:
        raise ProblemError(f"{empty} pools are empty (no weight, or masked out): they have no minimum")


class Penalised(nn.Module):
    """A module with a penalty and its alpha.

    Args:
        penalty: "quadratic", "pseudo-huber", "huber", "welsch" or "truncated" (quadratic).
        alpha: The distance at which points begin to count as outliers; a tensor becomes a buffer.
        learnable: Make alpha a parameter, ``log_alpha``, which keeps it positive.
    """

    _alpha: torch.Tensor

    def __init__(
        self, penalty: str = "huber", alpha: float | torch.Tensor = 1.0, learnable: bool = False
    ) -> None:
        super().__init__()
        penalty_named(penalty)
        self.penalty, self.learnable = penalty, learnable
        start = torch.as_tensor(alpha, dtype=None if torch.is_tensor(alpha) else torch.get_default_dtype())
        check_values(start, None)
        if learnable:
            self.log_alpha = nn.Parameter(start.log())
        else:
            self.register_buffer("_alpha", start)

    @property
    def alpha(self) -> torch.Tensor:
        """The inlier threshold."""
        return self.log_alpha.exp() if self.learnable else self._alpha

    def extra_repr(self) -> str:
        return f"{self.penalty!r}, alpha={self.alpha.detach().tolist()}, learnable={self.learnable}"
