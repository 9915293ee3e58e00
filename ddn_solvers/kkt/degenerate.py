"""The KKT system where it is singular: dependent active rows, flat directions, more rows than variables.

With A the active rows of c and, as rows of the identity, the active bounds, and P = I - A^+ A,

    x = A^+ b + (P H P)^+ P (a - H A^+ b),        t = (A^+)^T (a - H x)

solves  H x + A^T t = a,  A x = b  with x and t of minimum norm, in least squares where it has no solution
(x = A^+ b where A has full column rank). It is linear and symmetric in (a, b), so forward and reverse mode
agree, and where H is positive semidefinite it is the pseudo-inverse of the bordered matrix (Gould et al. 2019,
section 4.7 and equation 35, with constraints). Norms are meant in the user's own units, as long as those of the
rows do not differ by more than a factor of a million.
"""

from __future__ import annotations

import numpy as np
import torch

from ddn_solvers.arrays import Array
from ddn_solvers.kkt.linear import DEPENDENT, Step, least_squares
from ddn_solvers.kkt.operator import Bordered

_SMALL = 1e-6  # norm of a row relative to the largest up to which its unit is kept
_ROUNDING = 1e-13  # relative singular value of A, its rank being known, that is rounding
_FLAT = 1e-11  # eigenvalue of P H P relative to |H| below which a direction counts as flat


class Degenerate:
    """Pseudo-inverses of a batch of KKT systems; differentiable where the rank stays what it is.

    Args:
        hessian: H, (B, n, n).
        jacobian: Rows of all constraints, (B, m, n).
        active: Which of them are active, (B, m) bool.
        fixed: Variables that an active bound fixes, (B, n) bool.
        proximal: delta, added to P H P on the null space of A (the paper's delta / 2 |u - y|^2).
    """

    def __init__(
        self,
        hessian: torch.Tensor,
        jacobian: torch.Tensor,
        active: torch.Tensor,
        fixed: torch.Tensor,
        proximal: float | None = None,
    ) -> None:
        self.active, self.fixed = active, fixed
        rows = torch.where(active.unsqueeze(-1), jacobian, 0.0)
        bounds = torch.diag_embed(fixed.to(hessian.dtype))
        border = torch.cat([rows, bounds], dim=-2)  # A, (B, m + n, n)
        norms = torch.linalg.vector_norm(border.detach(), dim=-1)
        norms = torch.where(norms > 0, norms, 1.0)
        normal = border / norms.unsqueeze(-1)  # the units of the rows do not decide the rank
        onto_rows = torch.linalg.pinv(normal, rtol=DEPENDENT) @ normal
        self._projection = torch.eye(hessian.shape[-1], dtype=hessian.dtype) - onto_rows
        self._units = (_SMALL * norms.amax(-1, keepdim=True) / norms).clamp(min=1.0)
        self._rows = self._units.unsqueeze(-1) * border
        self._border = torch.linalg.pinv(self._rows @ onto_rows, rtol=_ROUNDING)
        self._hessian = hessian if proximal is None else hessian + proximal * self._projection
        reduced = self._projection @ self._hessian @ self._projection
        flat = _FLAT * hessian.detach().abs().amax((-2, -1))
        self._reduced = torch.linalg.pinv(reduced, atol=flat, rtol=torch.zeros_like(flat), hermitian=True)

    def solve(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> Step:
        """As ``System.solve``; refined once: a gradient whose terms cancel shows the rounding of formed inverses."""
        m = b.shape[-1]
        target = torch.cat([torch.where(self.active, b, 0.0), torch.where(self.fixed, v, 0.0)], dim=-1)
        target = self._units * target
        x, t = self._inverse(a, target)
        left = a - _times(self._hessian, x) - _times(self._rows.mT, t), target - _times(self._rows, x)
        dx, dt = self._inverse(*left)
        x, t = x + dx, self._units * (t + dt)
        return Step(x, torch.where(self.active, t[..., :m], 0.0), torch.where(self.fixed, -t[..., m:], 0.0))

    def _inverse(self, a: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x and t (in the units of the rows); zero for what lies outside of the range, so that refining is safe."""
        particular = _times(self._border, target)
        along = _times(self._projection, a - _times(self._hessian, particular))
        x = particular + _times(self._reduced, along)
        return x, _times(self._border.mT, a - _times(self._hessian, x))


class LargeDegenerate:
    """The same for large sparse systems, one sample at a time, by LSMR in place of pseudo-inverses.

    LSMR from zero gives the solution of least norm, of the bordered matrix for x and of A^T for t; where it does
    not converge the answer is NaN.

    Args:
        K: The bordered matrices with all variables and the active rows, nothing of regular samples.
        fixed: Variables that an active bound fixes, (B, n) bool.
        proximal: As in ``Degenerate``.
    """

    def __init__(self, K: Bordered, fixed: torch.Tensor, proximal: float | None = None) -> None:
        self._K, self._fixed, self._delta = K, fixed, proximal or 0.0
        self._samples = K.kept.any(-1).nonzero()[:, 0].tolist()

    def solve(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> Step:
        """As ``System.solve``; zero for regular samples."""
        x, t, q = (torch.zeros_like(part) for part in (a, b, v))
        for i in self._samples:
            mask = self._K.kept[i, self._K.n :]
            one = self._solve(i, *(part.numpy() for part in (a[i], b[i][mask], v[i][self._fixed[i]])))
            x[i], t[i, mask], q[i, self._fixed[i]] = (torch.from_numpy(part) for part in one)
        return Step(x, t, q)

    def _solve(self, i: int, a: Array, b: Array, v: Array) -> tuple[Array, Array, Array]:
        import scipy.sparse as sp

        matrix, n = self._K.kept_part(i)[0], self._K.n
        H, bounds = matrix[:n, :n], sp.eye_array(n, format="csr")[self._fixed[i].numpy()]
        A, target = sp.vstack([matrix[n:, :n], bounds]).tocsr(), np.concatenate([b, v])
        curvature = abs(H).max() or 1.0
        norms = sp.linalg.norm(A, axis=1)
        unit = sp.diags_array(1.0 / np.where(norms > 0, norms, 1.0))
        shifted = (H + self._delta * sp.eye_array(n)) / curvature
        bordered = sp.block_array([[shifted, (unit @ A).T], [unit @ A, None]]).tocsr()
        x = least_squares(bordered, np.concatenate([a / curvature, unit @ target]))[:n]
        t = least_squares(A.T.tocsr(), a - H @ x)
        return x, t[: len(b)], -t[len(b) :]


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)
