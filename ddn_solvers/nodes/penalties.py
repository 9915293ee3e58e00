"""The penalties of robust pooling, with z = |u - x_i| / alpha and s = z^2.

    name          phi / scale              psi(z) / z           phi''(z)                sources
    quadratic     s / 2                    1                    1
    pseudo-huber  sqrt(1 + s) - 1          (1 + s)^(-1/2)       (1 + s)^(-3/2)          Charbonnier et al. (1994)
    huber         s / 2, then z - 1/2      1, then 1/z          [s <= 1]                Huber (1964)
    welsch        1 - exp(-s / 2)          exp(-s / 2)          (1 - s) exp(-s / 2)     Dennis and Welsch (1978)
    truncated     min(s, 1) / 2            [s <= 1]             [s <= 1]

Everything is a function of z alone, for phi(c z; c alpha) is phi(z; alpha) up to a factor: no power of alpha is
ever formed, so that nothing over- or underflows from alpha = 1e-6 to 1e6 in float32. Gould et al. (2019), Table 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ddn_solvers.transforms import is_transformed


class Penalty(ABC):
    """phi as a function of s = z^2; every method is elementwise and differentiable.

    Attributes:
        name: As users write it.
        convex: The pool's objective has one valley.
        smooth: phi'' is continuous, so that Newton's method converges quadratically to the end.
        scale: phi(z; alpha) is alpha^scale times ``value``.
    """

    name: str
    convex = True
    smooth = True
    scale = 2

    @abstractmethod
    def value(self, s: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def ratio(self, s: torch.Tensor) -> torch.Tensor:
        """psi(z) / z = phi'(z) / z: the weight of iteratively reweighted least squares."""

    @abstractmethod
    def bend(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """d/dz (psi / z) / z, so that the Hessian of phi(|d|) is ``ratio I + bend d d^T``."""

    @abstractmethod
    def curvature(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """phi''(z), which is ``ratio + s bend`` without its cancellation."""

    def newton(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """psi(z) and phi''(z)."""
        s = z * z
        ratio = self.ratio(s)
        return z * ratio, self.curvature(s, ratio)


def _inside(s: torch.Tensor) -> torch.Tensor:
    """[s <= 1] as numbers."""
    if torch.is_grad_enabled() or is_transformed(s):
        return (s <= 1).to(s.dtype)
    return torch.le(s, 1, out=torch.empty_like(s))  # ten times faster than by way of booleans


class _Quadratic(Penalty):
    name = "quadratic"

    def value(self, s: torch.Tensor) -> torch.Tensor:
        return s / 2

    def ratio(self, s: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(s)

    def bend(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(s)

    def curvature(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return ratio


class _PseudoHuber(Penalty):
    name = "pseudo-huber"

    def value(self, s: torch.Tensor) -> torch.Tensor:
        return s / (1 + (1 + s).sqrt())

    def ratio(self, s: torch.Tensor) -> torch.Tensor:
        return (1 + s).rsqrt()

    def bend(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return -ratio * ratio * ratio

    def curvature(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return ratio * ratio * ratio


class _Huber(Penalty):
    name = "huber"
    smooth = False

    def value(self, s: torch.Tensor) -> torch.Tensor:
        return s.clamp(max=1) / 2 + (s.clamp(min=1).sqrt() - 1)

    def ratio(self, s: torch.Tensor) -> torch.Tensor:
        return s.clamp(min=1).rsqrt()

    def bend(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return (_inside(s) - 1) * ratio * ratio * ratio

    def curvature(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return _inside(s)

    def newton(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return z.clamp(-1, 1), _inside(z.abs())


class _Welsch(Penalty):
    name = "welsch"
    convex = False
    scale = 0

    def value(self, s: torch.Tensor) -> torch.Tensor:
        return -torch.expm1(-s / 2)

    def ratio(self, s: torch.Tensor) -> torch.Tensor:
        return torch.exp(s * -0.5)

    def bend(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return -ratio

    def curvature(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(ratio, s, ratio, value=-1)


class _Truncated(Penalty):
    name = "truncated"
    convex = False
    smooth = False

    def value(self, s: torch.Tensor) -> torch.Tensor:
        return s.clamp(max=1) / 2

    def ratio(self, s: torch.Tensor) -> torch.Tensor:
        return _inside(s)

    def bend(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(s)

    def curvature(self, s: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return ratio


PENALTIES: dict[str, Penalty] = {
    penalty.name: penalty for penalty in (_Quadratic(), _PseudoHuber(), _Huber(), _Welsch(), _Truncated())
}
