"""The KKT system where it is singular: dependent active rows, flat directions, more rows than variables.

With A the active rows of c and, as rows of the identity, the active bounds, and P = I - A^+ A,

    x = A^+ b + (P H P)^+ P (a - H A^+ b),        t = (A^+)^T (a - H x)

solves  H x + A^T t = a,  A x = b  with x and t of minimum norm, in least squares where it has no solution
(x = A^+ b where A has full column rank). It is linear and symmetric in (a, b), so forward and reverse mode
agree, and where H is positive semidefinite it is the pseudo-inverse of the bordered matrix (Gould et al. 2019,
section 4.7 and equation 35, with constraints). Norms are meant in the user's own units, as long as those of the
rows do not differ by more than a factor of a million.

Variables that a bound fixes are taken out first. With R the active rows in free and fixed variables, of which the
bounds say that they are v, and Z Z^T = I - R_free R_free^+, what R asks in vain of the free ones:

    A = [ R_free  R_fixed ]     x_fixed = v + E (b - R_fixed v),    E = G^T (I + G G^T)^-1,   G = Z Z^T R_fixed
        [   0        I    ]     x_free  = R_free^+ (b - R_fixed x_fixed)

so that singular values are taken of R_free alone: at a vertex of a linear program hardly any column is left.
"""

from __future__ import annotations

import numpy as np
import torch

from ddn_solvers.arrays import Array
from ddn_solvers.dense_lu import inverses
from ddn_solvers.kkt.linear import DEPENDENT, Step, least_squares
from ddn_solvers.kkt.operator import Bordered
from ddn_solvers.kkt.packing import Packing, pick, put
from ddn_solvers.transforms import is_transformed

_SMALL = 1e-6  # norm of a row relative to the largest up to which its unit is kept
_ROUNDING = 1e-13  # relative singular value of R_free, its rank being known, that is rounding
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
        transformed = any(map(is_transformed, (hessian, jacobian, active, fixed)))
        packing = (Packing.everything if transformed else Packing.of)(~fixed, active)
        self._packing, self._active, self._fixed, self._delta = packing, active, fixed, proximal or 0.0
        self._free = pick(~fixed, packing.variables)  # what fills up is not
        rows = packing.of_rows(torch.where(active.unsqueeze(-1), jacobian, 0.0))
        norms = torch.linalg.vector_norm(rows.detach(), dim=-1)
        norms = torch.where(norms > 0, norms, 1.0)
        largest = _SMALL * torch.nn.functional.pad(norms, (0, 1), value=1.0).amax(-1, keepdim=True)
        of_free = torch.where(self._free.unsqueeze(-2), packing.columns(rows), 0.0)
        normal = of_free / norms.unsqueeze(-1)  # the units of the rows do not decide the rank
        onto_rows = torch.linalg.pinv(normal, atol=DEPENDENT, rtol=DEPENDENT) @ normal
        self._projection = torch.diag_embed(self._free.to(rows.dtype)) - onto_rows
        self._units = (largest / norms).clamp(min=1.0)
        self._rows = self._units.unsqueeze(-1) * rows
        of_free = (self._units.unsqueeze(-1) * of_free) @ onto_rows
        self._inverse_of_free = torch.linalg.pinv(of_free, rtol=_ROUNDING)
        self._of_fixed = torch.where(fixed.unsqueeze(-2), self._rows, 0.0)
        self._in_vain = torch.eye(rows.shape[-2], dtype=rows.dtype) - of_free @ self._inverse_of_free
        self._yielding = None
        if transformed or bool(fixed.any()):
            asked = self._in_vain @ self._of_fixed
            stiffness = torch.diag_embed(largest.clamp(min=1.0).square().expand_as(norms))
            self._yielding = asked, inverses(stiffness + asked @ asked.mT)
        self._hessian = hessian
        reduced = self._projection @ packing.hessian(hessian) @ self._projection
        flat = _FLAT * hessian.detach().abs().amax((-2, -1))
        self._reduced = torch.linalg.pinv(
            reduced + self._delta * self._projection, atol=flat, rtol=torch.zeros_like(flat), hermitian=True
        )

    def solve(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> Step:
        """As ``System.solve``; refined once: a gradient whose terms cancel shows the rounding of formed inverses."""
        index = self._packing.rows
        b = self._units * pick(torch.where(self._active, b, 0.0), index)
        right = a, b, torch.where(self._fixed, v, 0.0)
        found = self._inverse(*right)
        left = (r - p for r, p in zip(right, self._product(*found), strict=True))
        x, t, q = (s + d for s, d in zip(found, self._inverse(*left), strict=True))
        t = put(self._units * t, index, self._active.shape[-1])
        return Step(x, torch.where(self._active, t, 0.0), -q)

    def _product(self, x: torch.Tensor, t: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K times a solution: forces, rows (in their units) and fixed variables."""
        forces = self._curved(x) + _times(self._rows.mT, t) + q
        return forces, _times(self._rows, x), torch.where(self._fixed, x, 0.0)

    def _inverse(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, t and the multipliers q of the bounds; zero for what lies outside of the range, so that refining is safe."""
        particular = self._within(b, v)
        along = _times(self._projection, self._of(a - self._curved(particular)))
        x = particular + self._whole(_times(self._reduced, along))
        return x, *self._balancing(a - self._curved(x))

    def _within(self, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A^+ [b; v]"""
        v = v + self._given_way(b - _times(self._of_fixed, v))
        return v + self._whole(_times(self._inverse_of_free, b - _times(self._of_fixed, v)))

    def _balancing(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(A^+)^T w, term by term the transpose of ``_within``"""
        t = _times(self._inverse_of_free.mT, self._of(w))
        q = torch.where(self._fixed, w - _times(self._of_fixed.mT, t), 0.0)
        if self._yielding is None:
            return t, q
        asked, softened = self._yielding
        more = _times(self._in_vain, _times(softened, _times(asked, q)))
        return t + more, q - _times(self._of_fixed.mT, more)

    def _given_way(self, r: torch.Tensor) -> torch.Tensor:
        """E r: how far bounds give way to rows that contradict them; one factor after the other, so that they cancel."""
        if self._yielding is None:
            return torch.zeros_like(self._fixed, dtype=r.dtype)
        asked, softened = self._yielding
        return _times(asked.mT, _times(softened, _times(self._in_vain, r)))

    def _curved(self, x: torch.Tensor) -> torch.Tensor:
        """(H + delta P) x"""
        forces = _times(self._hessian, x)
        return (
            forces + self._whole(self._delta * _times(self._projection, self._of(x)))
            if self._delta
            else forces
        )

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        """The free variables, (B, n')."""
        return pick(x, self._packing.variables)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse, zero elsewhere."""
        return put(torch.where(self._free, x, 0.0), self._packing.variables, self._packing.n)


class LargeDegenerate:
    """The same for large sparse systems, one sample at a time, by LSMR in place of pseudo-inverses.

    LSMR from zero gives the solution of least norm, of the bordered matrix for x and of A^T for t; where it does
    not converge the answer is NaN.

    Args:
        K: The bordered matrices with all variables and the active rows.
        fixed: Variables that an active bound fixes, (B, n) bool.
        proximal: As in ``Degenerate``.
    """

    def __init__(self, K: Bordered, fixed: torch.Tensor, proximal: float | None = None) -> None:
        self._K, self._fixed, self._delta = K, fixed, proximal or 0.0

    def solve(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> Step:
        """As ``System.solve``."""
        x, t, q = (torch.zeros_like(part) for part in (a, b, v))
        for i in range(len(a)):
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
