"""Evaluators over batches of what a graph was compiled to: values, derivatives, adjoint, tangent.

Everything works on flat float64 NumPy arrays: z (B, n), parameters a tuple with one array per block,
(B, size) or (size,) where all samples share it. Constraints are stacked, c = [h; g], and k rows of kinks
behind them where the graph has been taken apart into its smooth pieces, c = [h; g; r] (``pieces.py``); two
blocks behind the parameters then select the piece, sigma and tau.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import fx

from ddn_solvers.arrays import Array
from ddn_solvers.lowering.pattern import Pattern

if TYPE_CHECKING:
    from ddn_solvers.lowering.callbacks import CallbackFunctions
    from ddn_solvers.lowering.kernel import Kernel
    from ddn_solvers.lowering.linear_map import LinearMap
    from ddn_solvers.lowering.symbolic import SymbolicFunctions

T = TypeVar("T")


@dataclass(frozen=True)
class FirstOrder:
    """Values and first derivatives of a batch."""

    objective: Array  # (B,)
    gradient: Array  # (B, n)
    constraints: Array  # (B, rows)
    jacobian: Array  # (B, nnz), in the order of jacobian_pattern


@dataclass(frozen=True)
class Coefficients:
    """Of an LP or QP: everything at z = 0, for a batch. H and J are the same at every point."""

    objective: Array  # (B,)
    gradient: Array  # (B, n)
    constraints: Array  # (B, rows)
    jacobian: Array  # (B, nnz)
    hessian: Array  # (B, nnz)

    def take(self, samples: Any) -> Coefficients:
        return Coefficients(**{name: values[samples] for name, values in vars(self).items()})


class Evaluators:
    """The compiled functions of one graph, each made on first use.

    Args:
        functions: What the graph was compiled to.
        rows: Number of rows of c.
        blocks: Number of parameter blocks in which the adjoint and the tangent differentiate.
    """

    def __init__(self, functions: SymbolicFunctions | CallbackFunctions, rows: int, blocks: int) -> None:
        self._functions, self.rows, self._blocks = functions, rows, blocks
        self._memo: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    def memo(self, key: Hashable, build: Callable[[], T]) -> T:
        """What ``build`` returned the first time; for models that a backend makes once a problem."""
        with self._lock:
            if key not in self._memo:
                self._memo[key] = build()
            value: T = self._memo[key]
            return value

    def _kernel(self, name: str, reduced: dict[int, int] | None = None) -> Kernel:
        from ddn_solvers.lowering.kernel import Kernel

        return self.memo(("kernel", name), lambda: Kernel(getattr(self._functions, name), reduced))

    @property
    def functions(self) -> SymbolicFunctions | CallbackFunctions:
        """The CasADi functions themselves (values, first_order, hessian, bounds, ...)."""
        return self._functions

    @property
    def jacobian_pattern(self) -> Pattern:
        return self._functions.jacobian_pattern

    @property
    def hessian_pattern(self) -> Pattern:
        return self._functions.hessian_pattern

    def values(self, z: Array, parameters: Sequence[Array]) -> tuple[Array, Array]:
        """f (B, 1) and c (B, constraints)."""
        f, c = self._kernel("values")(_batched(z), *parameters)
        return f, c

    def first_order(self, z: Array, parameters: Sequence[Array]) -> FirstOrder:
        constant = self._map("jacobian_map")
        if constant is not None:
            f, gradient, c = self.slopes(z, parameters)
            return FirstOrder(f, gradient, c, constant(parameters, len(f)))
        f, gradient, c, jacobian = self._kernel("first_order")(_batched(z), *parameters)
        return FirstOrder(f[:, 0], gradient, c, jacobian)

    def coefficients(self, parameters: Sequence[Array], batch: int | None = None) -> Coefficients:
        """Of an LP or QP; of anything else its expansion at zero with constraints made linear.

        Args:
            batch: Number of samples, unless the parameters tell.
        """
        samples = samples_of(parameters, batch or 1)
        zero = np.zeros((samples, self.jacobian_pattern.shape[1]))
        constant = self._map("jacobian_map")
        if constant is None:
            first = self.first_order(zero, parameters)
        else:
            first = FirstOrder(*self.at_zero(parameters, samples), constant(parameters, samples))
        hessian = self.hessian(zero, parameters, np.zeros(self.rows))
        return Coefficients(first.objective, first.gradient, first.constraints, first.jacobian, hessian)

    def at_zero(self, parameters: Sequence[Array], samples: int) -> tuple[Array, Array, Array]:
        """``slopes`` at z = 0, of so many samples."""
        f, gradient, c = self._kernel("origin")(*parameters)
        if len(f) < samples:  # of shared parameters
            f, gradient, c = (np.repeat(values, samples, axis=0) for values in (f, gradient, c))
        return f[:, 0], gradient, c

    def slopes(self, z: Array, parameters: Sequence[Array]) -> tuple[Array, Array, Array]:
        """f (B,), grad f (B, n) and c (B, rows); of compiled functions only."""
        f, gradient, c = self._kernel("slopes")(_batched(z), *parameters)
        return f[:, 0], gradient, c

    def _map(self, name: str) -> LinearMap | None:
        """Of a matrix that depends on the parameters alone, and simply; torch callbacks have none."""
        return self.memo(("map", name), lambda: getattr(self._functions, name, None))

    def hessian(self, z: Array, parameters: Sequence[Array], weights: Array, objective: float = 1.0) -> Array:
        """Nonzeros of the Hessian of objective * f + weights^T c, (B, nnz)."""
        z = _batched(z)
        constant = self._map("hessian_map")
        if constant is not None:
            batch = samples_of(parameters, len(z))
            nonzeros = constant(parameters, max(batch, len(z)))
            return nonzeros if objective == 1.0 else objective * nonzeros
        sigma = np.full((len(z), 1), objective)
        weights = np.broadcast_to(weights, (len(z), self.rows))
        return self._kernel("hessian")(z, *parameters, weights, sigma)[0]

    def bounds(self, parameters: Sequence[Array]) -> tuple[Array, Array]:
        """lower and upper, (B, n), infinite where there is none."""
        lower, upper = self._kernel("bounds")(*parameters)
        return lower, upper

    def kink_residuals(self, z: Array, parameters: Sequence[Array]) -> Array:
        """(B, len(kinks)); an entry is zero where that operation is not differentiable."""
        return self._kernel("kinks")(_batched(z), *parameters)[0]

    def kink_weights(self, z: Array, parameters: Sequence[Array], y: Array) -> Array:
        """w = d/dtau (f + y^T c), (B, kinks): the force that a unit of |r| exerts; of smooth pieces only."""
        return self._kernel("kink_weights")(_batched(z), *parameters, y)[0]

    def adjoint(
        self,
        z: Array,
        parameters: Sequence[Array],
        y: Array,
        w: Array,
        s: Array,
        sl: Array,
        su: Array,
        e: Array,
    ) -> list[Array]:
        """Gradient of e f - w^T grad_z(f + y^T c) - s^T c - sl^T lower + su^T upper by parameter block.

        (B, size) each, or (size,), summed over the batch, for a shared block.
        """
        reduced = {i: 1 + i for i in range(self._blocks)}
        return self._kernel("adjoint", reduced)(_batched(z), *parameters, y, w, s, sl, su, e)

    def tangent(
        self, z: Array, parameters: Sequence[Array], y: Array, tangents: Sequence[Array]
    ) -> list[Array]:
        """Directional derivatives of f, grad_z(f + y^T c), c, lower, upper along ``tangents``."""
        return self._kernel("tangent")(_batched(z), *parameters, y, *tangents)

    def evaluate_nodes(self, nodes: Sequence[fx.Node], parameters: Sequence[Array]) -> list[Array]:
        """Values of graph nodes that depend on parameters alone, (B, size) each."""
        from ddn_solvers.lowering.kernel import Kernel

        key = ("nodes", *(node.name for node in nodes))
        kernel = self.memo(key, lambda: Kernel(self._functions.nodes(nodes)))  # type: ignore[union-attr]  # only where there is a graph
        return kernel(*parameters)


def samples_of(parameters: Sequence[Array], otherwise: int) -> int:
    """How many samples parameter blocks are of; ``otherwise``, where all are shared."""
    return max((len(p) for p in parameters if p.ndim == 2), default=otherwise)


def _batched(z: Array) -> Array:
    return z if z.ndim == 2 else z[None]
