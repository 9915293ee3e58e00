"""A lowered graph -> the compiled functions that backends and the backward pass call.

With z the flat variables, p_1 .. p_k the flat parameter blocks (captured tensors included; in the functions
of a smooth piece sigma and tau as well, in which nothing is differentiated), c = [h; g], or [h; g; r], and y the multipliers of c, each function is a dense-column CasADi function:

    values       (z, p..)                    -> f, c
    first_order  (z, p..)                    -> f, grad f, c, nonzeros of the Jacobian of c
    slopes       (z, p..)                    -> f, grad f, c
    origin       (p..)                       -> the same at z = 0, simplified
  hessian      (z, p.., y, sigma)          -> nonzeros of the Hessian of sigma f + y^T c
    bounds       (p..)                       -> lower, upper
    adjoint      (z, p.., y, w, s, sl, su, e)-> d/dp_i [ e f - w^T grad_z (f + y^T c) - s^T c - sl^T lower + su^T upper ]
    tangent      (z, p.., y, dp..)           -> directional derivatives of f, grad_z (f + y^T c), c, lower, upper
    kink_weights (z, p.., y)                 -> d/dtau (f + y^T c), tau being the last block; for smooth pieces
    kinks        (z, p..)                    -> residuals that vanish where a term is not differentiable

``callbacks.py`` makes the same functions out of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import casadi as ca
import numpy as np
from torch import fx

from ddn_solvers.layout import Layout
from ddn_solvers.lowering.linear_map import LinearMap, linear_map
from ddn_solvers.lowering.pattern import Pattern
from ddn_solvers.lowering.to_casadi import KinkExpression, lower

_DENSE = 0.25  # share of nonzeros from which a Hessian is one


class SymbolicFunctions:
    """Expressions of one graph and the functions made from them, each on first use."""

    def __init__(
        self,
        module: fx.GraphModule,
        outputs: Sequence[tuple[str, str]],
        variables: Layout,
        parameter_sizes: Sequence[int],
        differentiated: int | None = None,
    ) -> None:
        self.module, self.variables = module, variables
        self._differentiated = len(parameter_sizes) if differentiated is None else differentiated
        self.z = ca.MX.sym("z", variables.size)
        self.p = [ca.MX.sym(f"p{i}", size) for i, size in enumerate(parameter_sizes)]
        cuts = [block.start for block in variables] + [variables.size]
        self._inputs = [*ca.vertsplit(self.z, cuts), *self.p]
        lowered = lower(module, self._inputs, len(self.variables))
        self.terms = dict(zip(outputs, lowered.outputs, strict=True))
        self.kink_terms: tuple[KinkExpression, ...] = lowered.kinks
        self.f = self.terms["objective", ""]
        self.c = _stack(
            [e for (kind, _), e in self.terms.items() if kind in ("equality", "inequality", "kink")]
        )
        self.lower = _stack([self._side("lower", b.name, b.size, -np.inf) for b in variables])
        self.upper = _stack([self._side("upper", b.name, b.size, np.inf) for b in variables])
        self.y = ca.MX.sym("y", self.c.numel())

    def _side(self, kind: str, name: str, size: int, absent: float) -> ca.MX:
        return self.terms.get((kind, name), ca.MX(ca.DM([absent] * size)))

    @cached_property
    def gradient(self) -> ca.MX:
        return ca.gradient(self.f, self.z)

    @cached_property
    def jacobian(self) -> ca.MX:
        return ca.jacobian(self.c, self.z)

    @cached_property
    def hessian_matrix(self) -> ca.MX:
        """Of sigma f + y^T c, with ``self.sigma``."""
        return _hessian(self.sigma * self.f + ca.dot(self.y, self.c), self.z)

    @cached_property
    def sigma(self) -> ca.MX:
        return ca.MX.sym("sigma")

    @cached_property
    def jacobian_pattern(self) -> Pattern:
        return _pattern(self.jacobian)

    @cached_property
    def hessian_pattern(self) -> Pattern:
        return _pattern(self.hessian_matrix)

    def degree(self, kind: str, name: str) -> int | None:
        """Polynomial degree of a term in the variables: 0, 1, 2, or ``None`` for anything else."""
        expression = self.terms[kind, name]
        if self.kink_terms and self._has_kinks(kind, name):
            return None  # the derivative of |u| is constant almost everywhere
        for degree in range(3):
            if not ca.depends_on(expression, self.z):
                return degree
            expression = ca.jtimes(expression, self.z, ca.MX.sym(f"v{degree}", self.z.numel()))
        return None

    def _has_kinks(self, kind: str, name: str) -> bool:
        position = list(self.terms).index((kind, name))
        outputs: Any = self.module.graph.output_node().args[0]
        return bool(lower(self.module, self._inputs, len(self.variables), [outputs[position]]).kinks)

    def constant_hessian(self) -> tuple[Pattern, np.ndarray[Any, Any]] | None:
        """The objective's Hessian, pattern and nonzeros, if it depends on nothing, else ``None``."""
        along = ca.jtimes(self.gradient, self.z, ca.MX.sym("v", self.z.numel()))
        if ca.depends_on(along, ca.vertcat(self.z, *self.p)):
            return None
        hessian = _hessian(self.f, self.z)
        constant = ca.Function("constant", [self.z, *self.p], [ca.densify(_nonzeros(hessian))])
        nonzeros: np.ndarray[Any, Any] = constant(*[0] * (1 + len(self.p))).full().reshape(-1)
        return _pattern(hessian), nonzeros

    @cached_property
    def values(self) -> ca.Function:
        return self._function("values", [], [self.f, self.c])

    @cached_property
    def first_order(self) -> ca.Function:
        return self._function("first_order", [], [self.f, self.gradient, self.c, _nonzeros(self.jacobian)])

    @cached_property
    def slopes(self) -> ca.Function:
        """``first_order`` without the Jacobian."""
        return self._function("slopes", [], [self.f, self.gradient, self.c])

    @cached_property
    def origin(self) -> ca.Function:
        """``slopes`` at zero: of what is multiplied by z nothing is left."""
        zero = [ca.MX.zeros(self.z.numel())]
        outputs = ca.graph_substitute([self.f, self.gradient, self.c], [self.z], zero)
        return ca.Function("origin", self.p, [ca.densify(output) for output in outputs])

    def matrices_depend_on(self, block: int) -> bool:
        """Whether second derivatives of f, or first ones of c, depend on a parameter block by their expressions."""
        v = ca.MX.sym("v", self.z.numel())
        along = ca.vertcat(ca.jtimes(self.gradient, self.z, v), ca.jtimes(self.c, self.z, v))
        return bool(ca.depends_on(along, self.p[block]))

    @cached_property
    def jacobian_map(self) -> LinearMap | None:
        """The Jacobian's nonzeros, where they are affine in the parameters and depend on nothing else."""
        return linear_map(_nonzeros(self.jacobian), self.p)

    @cached_property
    def hessian_map(self) -> LinearMap | None:
        """The same of the objective's Hessian, where c is affine."""
        return linear_map(_nonzeros(self.hessian_matrix), self.p, [self.sigma])

    @cached_property
    def hessian(self) -> ca.Function:
        return self._function("hessian", [self.y, self.sigma], [_nonzeros(self.hessian_matrix)])

    @cached_property
    def bounds(self) -> ca.Function:
        return ca.Function("bounds", self.p, [ca.densify(self.lower), ca.densify(self.upper)])

    @cached_property
    def adjoint(self) -> ca.Function:
        w, sl, su = (ca.MX.sym(name, self.z.numel()) for name in ("w", "sl", "su"))
        s, e = ca.MX.sym("s", self.c.numel()), ca.MX.sym("e")
        along_w = ca.jtimes(self.f + ca.dot(self.y, self.c), self.z, w)
        total = e * self.f - along_w - ca.dot(s, self.c)
        for kind, weight, sign in (("lower", sl, -1.0), ("upper", su, 1.0)):
            total += sign * self._weighted_bounds(kind, weight)
        gradients = [ca.gradient(total, p) for p in self.p[: self._differentiated]]
        return self._function("adjoint", [self.y, w, s, sl, su, e], gradients)

    def _weighted_bounds(self, kind: str, weight: ca.MX) -> ca.MX:
        """weight^T bound over the bounds that exist: an absent one is infinite and has no term."""
        total = ca.MX(0)
        for block in self.variables:
            if (kind, block.name) in self.terms:
                total += ca.dot(weight[block.start : block.stop], self.terms[kind, block.name])
        return total

    @cached_property
    def tangent(self) -> ca.Function:
        parameters = self.p[: self._differentiated]
        dp = [ca.MX.sym(f"dp{i}", p.numel()) for i, p in enumerate(parameters)]
        gradient = ca.gradient(self.f + ca.dot(self.y, self.c), self.z)
        outputs = []
        for expression in (self.f, gradient, self.c, self.lower, self.upper):
            directional = ca.MX.zeros(expression.numel())
            for p, direction in zip(parameters, dp, strict=True):
                directional += ca.jtimes(expression, p, direction)
            outputs.append(directional)
        return self._function("tangent", [self.y, *dp], outputs)

    @cached_property
    def kinks(self) -> ca.Function:
        return self._function("kinks", [], [_stack([kink.residual for kink in self.kink_terms])])

    @cached_property
    def kink_weights(self) -> ca.Function:
        tau = self.p[-1]
        return self._function("kink_weights", [self.y], [ca.gradient(self.f + ca.dot(self.y, self.c), tau)])

    def nodes(self, nodes: Sequence[fx.Node]) -> ca.Function:
        """(p..) -> values of graph nodes that depend on parameters alone."""
        values = lower(self.module, self._inputs, len(self.variables), nodes).outputs
        return ca.Function("nodes", self.p, [ca.densify(value) for value in values])

    def _function(self, name: str, extra: list[Any], outputs: list[Any]) -> ca.Function:
        inputs = [self.z, *self.p, *extra]
        return ca.Function(name, inputs, [ca.densify(output) for output in outputs])


def _stack(columns: list[Any]) -> Any:
    return ca.vertcat(*columns) if columns else ca.MX(0, 1)


def _hessian(f: ca.MX, z: ca.MX) -> ca.MX:
    gradient = ca.gradient(f, z)
    # To make use of symmetry saves directions where H is sparse; where it is dense, it takes minutes and saves none.
    dense = ca.jacobian_sparsity(gradient, z).nnz() > _DENSE * z.numel() ** 2
    return ca.jacobian(gradient, z, {"symmetric": not dense})


def _nonzeros(matrix: Any) -> Any:
    return ca.vec(matrix.nz[:]) if matrix.nnz() else ca.MX(0, 1)  # that of a row is a row


def _pattern(matrix: Any) -> Pattern:
    sparsity = matrix.sparsity()
    return Pattern(matrix.shape, np.array(sparsity.colind(), dtype=int), np.array(sparsity.row(), dtype=int))
