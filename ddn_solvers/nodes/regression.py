"""Linear least squares: weighted, with a ridge and a bias, and on a sphere.

    y = argmin_u  1/2 sum_i w_i (a_i^T u - b_i)^2 + 1/2 sum_j rho_j u_j^2 - q^T u
    y = argmin_u  1/2 |A u - b|^2    subject to  |u| = r

The first is solved by QR, and its vjp and jvp are problems of the same kind: with z the solution for b = 0, q = v,

    v^T dy = z^T dq + (W A z)^T db + (e * A z)^T dw - (y * z)^T drho + <W (e z^T - A z y^T), dA>,    e = b - A y

The second is solved to its global minimum in the singular vectors of A, where |u| = r is an equation in the multiplier.

Sources: Björck (1996), section 2.4; Gander (1981), Moré and Sorensen (1983) for the sphere; Gould et al. (2019),
propositions 4.5 and 4.6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ddn_solvers.dense_lu import solved
from ddn_solvers.errors import DegeneracyWarning, ProblemError, warn_caller
from ddn_solvers.nodes.closed_form import Rule, Tensors, apply, keep, positive, times, working_dtype
from ddn_solvers.problem import Problem

_ITERATIONS = 100


def _outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[..., :, None] * b[..., None, :]


class _LeastSquares(Rule):
    """Of A (..., m, n), b (..., m), w (..., m), rho (..., n), q (..., n)."""

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        A, b, w, rho, q = inputs
        for name, values in (("weights", w), ("ridge", rho)):
            if not ((values >= 0) & (values < math.inf)).all():
                raise ProblemError(name, expected="finite entries, none negative", got=values)
        root = w.sqrt()
        stacked = torch.cat([root[..., None] * A, torch.diag_embed(rho.sqrt())], -2)
        size = torch.linalg.vector_norm(stacked, dim=-2, keepdim=True)
        Q, R = torch.linalg.qr(stacked / torch.where(size > 0, size, 1))
        _check_rank(R)
        size = size[..., 0, :]
        right = times(Q.mT, torch.cat([root * b, torch.zeros_like(rho)], -1))
        # R^T R (size y) = R^T Q^T b + q / size
        linear = torch.linalg.solve_triangular(R.mT, (q / size)[..., None], upper=False)
        return torch.linalg.solve_triangular(R, right[..., None] + linear, upper=True)[..., 0] / size

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        A, b, w, rho, _ = inputs
        z = apply(self, A, torch.zeros_like(b), w, rho, cotangent)
        fitted, error = times(A, z), b - times(A, y)
        return (
            w[..., None] * (_outer(error, z) - _outer(fitted, y)) if needed[0] else None,
            w * fitted if needed[1] else None,
            error * fitted if needed[2] else None,
            -y * z if needed[3] else None,
            z if needed[4] else None,
        )

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        A, b, w, rho, _ = inputs
        d_A, d_b, d_w, d_rho, d_q = (
            torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)
        )
        error = b - times(A, y)
        linear = d_q - d_rho * y + times(d_A.mT, w * error) + times(A.mT, d_w * error)
        return apply(self, A, d_b - times(d_A, y), w, rho, linear)


def _check_rank(R: torch.Tensor) -> None:
    """Columns have length one: R is singular to rounding if its inverse has an entry of the size of 1 / eps."""
    n = R.shape[-1]
    if not R.numel():
        return
    unit = torch.eye(n, dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, unit.expand_as(R), upper=True)
    bound = 1 / (10 * n * torch.finfo(R.dtype).eps)
    dependent = ~(torch.linalg.matrix_norm(inverse) < bound) & R.isfinite().all((-1, -2))
    if dependent.any():
        raise ProblemError(
            f"{int(dependent.sum())} of {dependent.numel()} least-squares problems have more than one solution: "
            f"columns of A (or the bias) depend on each other, or fewer rows than {n} have weight",
            fix="Give a ridge, or drop columns.",
        )


def least_squares(
    A: torch.Tensor,
    b: torch.Tensor,
    weights: torch.Tensor | None = None,
    ridge: float | torch.Tensor = 0.0,
    bias: bool = False,
) -> torch.Tensor:
    """The coefficients of a linear model: ``1/2 sum w (A u - b)^2 + 1/2 ridge |u|^2`` at its minimum.

    By QR, so errors grow with the condition of A and not with its square. Differentiable in every input, to any order,
    in forward mode and under ``torch.func``; the backward is one more problem with the same matrix.

    Args:
        A: Shape (..., m, n).
        b: Shape (..., m).
        weights: Not negative, broadcasts against ``b``.
        ridge: Not negative, a number or a tensor that broadcasts against the coefficients (..., n): one for all is of
            shape () or (..., 1).
        bias: Fit a constant too, which has no ridge.

    Returns:
        Shape (..., n), or (..., n + 1) with the bias last.

    Raises:
        ProblemError: Shapes do not fit, weights or ridge are negative or not finite, or the minimum is not unique.
    """
    dtype = working_dtype(A)
    if A.ndim < 2 or b.ndim < 1 or A.shape[-2] != b.shape[-1]:
        raise ProblemError(
            "A and b",
            expected="shapes (..., m, n) and (..., m)",
            got=f"{tuple(A.shape)} and {tuple(b.shape)}",
        )
    m, n = A.shape[-2:]
    w = torch.ones((m,), dtype=dtype, device=A.device) if weights is None else weights.to(dtype)
    rho = torch.as_tensor(ridge, dtype=dtype, device=A.device)
    try:
        w = w.expand(torch.broadcast_shapes(w.shape, (m,)))
        rho = rho.expand(torch.broadcast_shapes(rho.shape, (n,)))
        batch = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1], w.shape[:-1], rho.shape[:-1])
        matrix, target = A.to(dtype).expand(*batch, m, n), b.to(dtype).expand(*batch, m)
        w, rho = w.expand(*batch, m), rho.expand(*batch, n)
    except RuntimeError:
        raise ProblemError(
            f"A, b, weights and ridge do not broadcast: {tuple(A.shape)}, {tuple(b.shape)}, {tuple(w.shape)} against "
            f"b, {tuple(rho.shape)} against the {n} coefficients"
        ) from None
    if bias:
        matrix = torch.cat([matrix, torch.ones_like(matrix[..., :1])], -1)
        rho = torch.cat([rho, torch.zeros_like(rho[..., :1])], -1)
    return apply(_LeastSquares(), matrix, target, w, rho, torch.zeros_like(rho)).to(A.dtype)


class _SphereLeastSquares(Rule):
    """Of A (..., m, n), b (..., m), r (..., 1)."""

    def solve(self, *inputs: torch.Tensor) -> torch.Tensor:
        A, b, r = inputs
        if not A.isfinite().all() or not b.isfinite().all():
            raise ProblemError("A and b", expected="finite entries")
        m, n = A.shape[-2:]
        if m < n:
            A = torch.cat([A, A.new_zeros((*A.shape[:-2], n - m, n))], -2)
            b = torch.cat([b, b.new_zeros((*b.shape[:-1], n - m))], -1)
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        return times(Vh.mT, _secular(s, times(U.mT, b), r))

    def _bordered(self, inputs: Tensors, y: torch.Tensor) -> torch.Tensor:
        """[[A^T A + lambda I, y], [y^T, 0]]."""
        A, b, r = inputs
        multiplier = (y * times(A.mT, b - times(A, y))).sum(-1, keepdim=True) / r.square()
        hessian = A.mT @ A + torch.diag_embed(multiplier.expand_as(y))
        bottom = torch.cat([y, torch.zeros_like(r)], -1)[..., None, :]
        return torch.cat([torch.cat([hessian, y[..., None]], -1), bottom], -2)

    def vjp(
        self, inputs: Tensors, y: torch.Tensor, cotangent: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        A, b, r = inputs
        found = solved(self._bordered(inputs, y), torch.cat([cotangent, torch.zeros_like(r)], -1))
        z, nu = found[..., :-1], found[..., -1:]
        fitted, error = times(A, z), b - times(A, y)
        return (
            _outer(error, z) - _outer(fitted, y) if needed[0] else None,
            fitted if needed[1] else None,
            nu * r if needed[2] else None,
        )

    def jvp(self, inputs: Tensors, y: torch.Tensor, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor:
        A, b, r = inputs
        d_A, d_b, d_r = (
            torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)
        )
        right = times(d_A.mT, b - times(A, y)) + times(A.mT, d_b - times(d_A, y))
        return solved(self._bordered(inputs, y), torch.cat([right, r * d_r], -1))[..., :-1]


def _secular(s: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The minimum in the singular vectors: u_k = s_k g_k / (d_k + t), d_k = s_k^2 - min s^2, t >= 0 with |u| = r.

    1 / |u| is concave in t and Newton's method on it rises to the solution from where |u| >= r (Moré and Sorensen 1983).
    Where |u| < r at t = 0, the rest is along the last singular vector, with either sign.
    """
    least = s[..., -1:]
    d, top = (s - least) * (s + least), s * g
    t = (top.abs() / r - d).amax(-1, keepdim=True).clamp(min=0)
    floor = torch.finfo(s.dtype).tiny ** 0.5

    def at(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u = top / (d + t).clamp(min=floor)
        return u, torch.linalg.vector_norm(u, dim=-1, keepdim=True)

    for _ in range(_ITERATIONS):
        u, size = at(t)
        slope = (u / size).square() / (d + t).clamp(min=floor)
        step = (size / r - 1) / slope.sum(-1, keepdim=True)
        step = torch.where((size > r) & step.isfinite(), step, 0)
        if not (step > 2 * torch.finfo(s.dtype).eps * t).any():
            break
        t = t + step
    u, size = at(t)
    missing = (r.square() - size.square()).clamp(min=0).sqrt()
    short = missing > math.sqrt(32 * torch.finfo(s.dtype).eps) * r
    if short.any():
        rounding = 8 * s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1].square()
        connected = int((short & ((d <= rounding).sum(-1, keepdim=True) > 1)).sum())
        if connected:
            raise ProblemError(
                f"{connected} of {short.numel()} problems have a whole circle or sphere of minima: the least singular "
                "value of A is a multiple one and b has no part along its vectors",
                fix="Give more rows (of a prior, say), or a smaller radius.",
            )
        warn_caller(
            f"sphere_least_squares: {int(short.sum())} of {short.numel()} problems have two minima of the same value, "
            "as b has no part along the least singular vector of A; one is returned.",
            DegeneracyWarning,
        )
    last = u[..., -1:] + torch.where(short, missing, 0)
    u = torch.cat([u[..., :-1], last], -1)
    return u * (r / torch.linalg.vector_norm(u, dim=-1, keepdim=True))


def sphere_least_squares(
    A: torch.Tensor, b: torch.Tensor, radius: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """The global minimum of ``1/2 |A u - b|^2`` on the sphere ``|u| = radius``.

    To rounding, from one singular value decomposition. Differentiable in every input, to any order, in forward mode
    and under ``torch.func``, through the bordered KKT matrix of one equality.

    Args:
        A: Shape (..., m, n), of any rank.
        b: Shape (..., m).
        radius: Positive; a number or a tensor that broadcasts against the batch.

    Returns:
        Shape (..., n).

    Raises:
        ProblemError: Shapes do not fit, entries are not finite, ``radius`` is not positive and finite, or the minima
            are not isolated.

    Warns:
        DegeneracyWarning: There are two minima; the derivative is that of the one returned.
    """
    dtype = working_dtype(A)
    if A.ndim < 2 or b.ndim < 1 or A.shape[-2] != b.shape[-1] or not A.shape[-1]:
        raise ProblemError(
            "A and b",
            expected="shapes (..., m, n) and (..., m)",
            got=f"{tuple(A.shape)} and {tuple(b.shape)}",
        )
    m, n = A.shape[-2:]
    r = torch.as_tensor(positive("radius", radius), dtype=dtype, device=A.device)
    try:
        batch = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1], r.shape)
    except RuntimeError:
        raise ProblemError(
            f"A, b and radius do not broadcast: {tuple(A.shape)}, {tuple(b.shape)}, {tuple(r.shape)}"
        ) from None
    matrix, target = A.to(dtype).expand(*batch, m, n), b.to(dtype).expand(*batch, m)
    return apply(_SphereLeastSquares(), matrix, target, r.expand(batch)[..., None]).to(A.dtype)


class LeastSquares(nn.Module):
    """``least_squares`` as a module; an ``nn.Parameter`` as ridge is learnt."""

    ridge: float | torch.Tensor

    def __init__(self, ridge: float | torch.Tensor = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.bias = bias
        keep(self, ridge=ridge)

    def forward(self, A: torch.Tensor, b: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        return least_squares(A, b, weights, self.ridge, self.bias)

    def problem(self, m: int, n: int) -> Problem:
        """The problem that it solves: variable ``u`` (the bias last), parameters ``A``, ``b``, ``weights``."""
        ridge = self.ridge

        def objective(
            u: torch.Tensor, A: torch.Tensor, b: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            fitted = A @ u[:n] + u[n] if self.bias else A @ u
            return 0.5 * (weights * (fitted - b).square()).sum() + 0.5 * (ridge * u[:n].square()).sum()

        return Problem({"u": (n + self.bias,)}, {"A": (m, n), "b": (m,), "weights": (m,)}, objective)


class SphereLeastSquares(nn.Module):
    """``sphere_least_squares`` as a module; an ``nn.Parameter`` as radius is learnt."""

    radius: float | torch.Tensor

    def __init__(self, radius: float | torch.Tensor = 1.0) -> None:
        super().__init__()
        keep(self, radius=radius)

    def forward(self, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sphere_least_squares(A, b, self.radius)

    def problem(self, m: int, n: int) -> Problem:
        """The problem that it solves: variable ``u``, parameters ``A``, ``b``."""
        radius = self.radius
        return Problem(
            {"u": (n,)},
            {"A": (m, n), "b": (m,)},
            lambda u, A, b: 0.5 * (A @ u - b).square().sum(),
            {"sphere": lambda u: u.square().sum() - radius**2},
        )
