"""Second-order conditions: the Hessian of the Lagrangian on the null space of the active constraints.

With P = I - A^+ A the projection on that null space, the eigenvalues of P H P are those of the reduced
Hessian Z^T H Z and a zero for each active direction. A point is a strict minimum if the former are
positive (SOSC), and no minimum if one is clearly negative. Weakly active rows are kept active: only
then does a negative eigenvalue rule a minimum out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddn_solvers.active_set import ActiveSet
from ddn_solvers.arrays import Array
from ddn_solvers.kkt.linear import DEPENDENT
from ddn_solvers.residuals import Evaluation

_CLEARLY = 1e-7  # relative to the largest entry of H: below it, an eigenvalue may be rounding
_RHO = 1e3  # weight of the active rows, relative to H


@dataclass(frozen=True)
class Curvature:
    """Of each sample.

    Attributes:
        rank: Of the active rows, bounds included, (B,).
        rows: How many there are, (B,).
        smallest: Smallest eigenvalue of the reduced Hessian over |H|, (B,); inf where the null space is {0}.
        null: Orthonormal rows that span the null space of the active ones, the others zero, (B, n, n).
        unit: |H|, (B,), one where it vanishes.
    """

    rank: np.ndarray[Any, np.dtype[np.int64]]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    smallest: Array
    null: Array
    unit: Array

    @property
    def negative(self) -> Any:
        """(B,) bool: not a minimum."""
        return self.smallest < -_CLEARLY

    @property
    def positive(self) -> Any:
        """(B,) bool: the second-order sufficient condition holds."""
        return self.smallest > _CLEARLY


def curvature(evaluation: Evaluation, active: ActiveSet) -> Curvature:
    """Rank and curvature at a batch of points."""
    batch, n = evaluation.point.z.shape
    rows = np.where(active.constraints[:, :, None], _normalised(evaluation), 0.0)
    fixed = np.zeros((batch, n, n))
    fixed[:, np.arange(n), np.arange(n)] = active.fixed
    _, singular, right = np.linalg.svd(np.concatenate([rows, fixed], axis=1), full_matrices=True)
    counted = np.zeros((batch, n), dtype=bool)  # right singular vectors that span the rows
    largest = np.maximum(singular.max(axis=1, initial=0.0), 1e-300)[:, None]
    counted[:, : singular.shape[1]] = singular > DEPENDENT * largest
    null = np.where(counted[:, :, None], 0.0, right)
    reduced = null @ evaluation.hessian @ null.transpose(0, 2, 1)
    norm = np.abs(evaluation.hessian).max(axis=(1, 2), initial=0.0)
    unit = np.where(norm > 0, norm, 1.0)
    above = np.where(counted, 2.0 * n, 0.0)  # lifts the directions that do not count out of the way
    reduced = reduced / unit[:, None, None] + above[:, :, None] * np.eye(n)
    smallest = np.linalg.eigvalsh(reduced).min(axis=1, initial=np.inf)
    rank = counted.sum(axis=1)
    count = active.constraints.sum(axis=1) + active.fixed.sum(axis=1)
    return Curvature(rank, count, np.where(rank == n, np.inf, smallest), null, unit)


def surely_minimal(evaluation: Evaluation, active: ActiveSet) -> bool:
    """Whether H + rho A^T A is positive definite for every sample, which proves a positive reduced Hessian.

    One Cholesky factorization; where it fails nothing is proved (rho is finite), and ``curvature`` decides.
    """
    if not np.isfinite(evaluation.hessian).all() or not np.isfinite(evaluation.jacobian).all():
        return False
    rows = np.where(active.constraints[:, :, None], _normalised(evaluation), 0.0)
    norm = np.abs(evaluation.hessian).max(axis=(1, 2), initial=0.0)[:, None, None]
    matrix = evaluation.hessian + _RHO * norm * (rows.transpose(0, 2, 1) @ rows)
    diagonal = np.arange(active.n)
    matrix[:, diagonal, diagonal] += np.where(active.fixed, _RHO * norm[:, :, 0], 0.0)
    _, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    return not bool(info.any())


def _normalised(evaluation: Evaluation) -> Array:
    """Rows of unit norm, so that rank does not depend on the units of a constraint; vanishing ones zero."""
    norms = evaluation.row_norms[:, :, None]
    negligible = evaluation.vanishing[:, :, None] | (norms <= 1e-300)
    scaled: Array = np.where(negligible, 0.0, evaluation.jacobian / np.where(negligible, 1.0, norms))
    return scaled
