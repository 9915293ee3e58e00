"""The functions of ``symbolic.py`` made out of torch, for functions that no graph can hold.

Slower by one or two orders of magnitude, since each evaluation runs Python; exact all the same:
derivatives are torch's own. Sparsity is unknown, so patterns are full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import casadi as ca
import numpy as np
import torch

from ddn_solvers.errors import DDNError
from ddn_solvers.lowering.pattern import Pattern
from ddn_solvers.lowering.to_casadi import KinkExpression

# (z, parameter blocks) -> f, c, lower, upper; flat tensors, differentiable
Evaluate = Callable[[torch.Tensor, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


class _TorchCallback(ca.Callback):  # type: ignore[misc]  # casadi has no stubs
    """A CasADi function whose numbers come from ``compute``.

    Attributes:
        refusal: The error of ours that ended the last evaluation, of which CasADi keeps the text alone.
    """

    def __init__(
        self, name: str, sizes_in: Sequence[int], sizes_out: Sequence[int], compute: Callable[..., Any]
    ) -> None:
        ca.Callback.__init__(self)
        self._sizes_in, self._sizes_out, self._compute = sizes_in, sizes_out, compute
        self._reverse: list[_TorchCallback] = []  # casadi keeps no reference to what it was given
        self.refusal: DDNError | None = None
        self.construct(name, {})

    def get_n_in(self) -> int:
        return len(self._sizes_in)

    def get_n_out(self) -> int:
        return len(self._sizes_out)

    def get_sparsity_in(self, i: int) -> ca.Sparsity:
        return ca.Sparsity.dense(self._sizes_in[i], 1)

    def get_sparsity_out(self, i: int) -> ca.Sparsity:
        return ca.Sparsity.dense(self._sizes_out[i], 1)

    def eval(self, arguments: Sequence[Any]) -> list[Any]:
        tensors = [torch.tensor(a.full().reshape(-1), dtype=torch.float64) for a in arguments]
        self.refusal = None
        try:
            with torch.enable_grad():
                return [ca.DM(t.detach().reshape(-1).numpy()) for t in self._compute(*tensors)]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is there; no value, as of a logarithm
            return [ca.DM([math.nan] * size) for size in self._sizes_out]
        except DDNError as error:
            self.refusal = error
            raise

    def has_reverse(self, seeds: int) -> bool:
        return seeds == 1

    def get_reverse(self, seeds: int, name: str, *_: Any) -> ca.Function:
        """(inputs, outputs, cotangents) -> gradients: nlpsol asks for it before it is told not to."""
        inputs, outputs = len(self._sizes_in), len(self._sizes_out)

        def compute(*tensors: torch.Tensor) -> Any:
            arguments = [t.requires_grad_() for t in tensors[:inputs]]
            cotangents = tensors[inputs + outputs :]
            total = sum(
                (v.reshape(-1) @ c for v, c in zip(self._compute(*arguments), cotangents, strict=True)),
                torch.zeros((), dtype=torch.float64),
            )
            return [_gradient(total, argument, retain_graph=True) for argument in arguments]

        sizes = [*self._sizes_in, *self._sizes_out, *self._sizes_out]
        self._reverse.append(_TorchCallback(name, sizes, self._sizes_in, compute))
        return self._reverse[-1]


class CallbackFunctions:
    """Same functions, same names as ``SymbolicFunctions``."""

    kink_terms: tuple[KinkExpression, ...] = ()

    def __init__(self, evaluate: Evaluate, n: int, constraints: int, parameter_sizes: Sequence[int]) -> None:
        self._evaluate, self._n, self._m = evaluate, n, constraints
        self._sizes = list(parameter_sizes)
        self.jacobian_pattern = _full(constraints, n)
        self.hessian_pattern = _full(n, n)

    def constant_hessian(self) -> None:
        """Unknown, as the degree is."""

    def degree(self, kind: str, name: str) -> int | None:
        """Unknown: nothing can be read off a function without a graph."""
        return None

    @cached_property
    def values(self) -> ca.Function:
        def compute(z: torch.Tensor, *p: torch.Tensor) -> Any:
            return self._evaluate(z, p)[:2]

        return self._function("values", [], [1, self._m], compute)

    @cached_property
    def first_order(self) -> ca.Function:
        def compute(z: torch.Tensor, *p: torch.Tensor) -> Any:
            z = z.requires_grad_()
            f, c = self._evaluate(z, p)[:2]
            jacobian = _rows(c, z)
            return f, _gradient(f, z), c, jacobian.T  # nonzeros go by column

        return self._function("first_order", [], [1, self._n, self._m, self._m * self._n], compute)

    @cached_property
    def hessian(self) -> ca.Function:
        def compute(z: torch.Tensor, *rest: torch.Tensor) -> Any:
            *p, y, sigma = rest
            z = z.requires_grad_()
            f, c = self._evaluate(z, p)[:2]
            gradient = _gradient(sigma[0] * f + y @ c, z, create_graph=True)
            return (_rows(gradient, z),)

        return self._function("hessian", [self._m, 1], [self._n**2], compute)

    @cached_property
    def bounds(self) -> ca.Function:
        def compute(*p: torch.Tensor) -> Any:
            return self._evaluate(torch.zeros(self._n, dtype=torch.float64), p)[2:]

        return _TorchCallback("bounds", self._sizes, [self._n, self._n], compute)

    @cached_property
    def adjoint(self) -> ca.Function:
        k = len(self._sizes)

        def compute(z: torch.Tensor, *rest: torch.Tensor) -> Any:
            p = [tensor.requires_grad_() for tensor in rest[:k]]
            y, w, s, sl, su, e = rest[k:]
            z = z.requires_grad_()
            f, c, lower, upper = self._evaluate(z, p)
            gradient = _gradient(f + y @ c, z, create_graph=True)
            total = e[0] * f - w @ gradient - s @ c - _finite_dot(sl, lower) + _finite_dot(su, upper)
            return [_gradient(total, block, retain_graph=True) for block in p]

        sizes = [self._m, self._n, self._m, self._n, self._n, 1]
        return self._function("adjoint", sizes, self._sizes, compute)

    @cached_property
    def tangent(self) -> ca.Function:
        k = len(self._sizes)

        def compute(z: torch.Tensor, *rest: torch.Tensor) -> Any:
            p, y, dp = list(rest[:k]), rest[k], rest[k + 1 :]

            def all_of(*p: torch.Tensor) -> Any:
                def value(z: torch.Tensor) -> torch.Tensor:
                    f, c = self._evaluate(z, p)[:2]
                    return f + y @ c

                f, c, lower, upper = self._evaluate(z, p)
                return f, torch.func.grad(value)(z), c, lower, upper

            return torch.func.jvp(all_of, tuple(p), tuple(dp))[1]

        return self._function(
            "tangent", [self._m, *self._sizes], [1, self._n, self._m, self._n, self._n], compute
        )

    @cached_property
    def kinks(self) -> ca.Function:
        return self._function("kinks", [], [0], lambda *_: (torch.zeros(0, dtype=torch.float64),))

    def _function(
        self, name: str, extra: Sequence[int], sizes_out: Sequence[int], compute: Callable[..., Any]
    ) -> ca.Function:
        return _TorchCallback(name, [self._n, *self._sizes, *extra], sizes_out, compute)


def _gradient(value: torch.Tensor, of: torch.Tensor, **options: Any) -> torch.Tensor:
    if not value.requires_grad:
        return torch.zeros_like(of)
    (gradient,) = torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True, **options)
    return gradient


def _rows(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Jacobian row by row: works for every function that torch can differentiate at all."""
    rows = [_gradient(value, of, retain_graph=True) for value in values]
    return torch.stack(rows) if rows else of.new_zeros(0, of.numel())


def _finite_dot(weight: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    return weight @ torch.where(torch.isfinite(bound), bound, 0.0)


def _full(rows: int, columns: int) -> Pattern:
    indices = np.tile(np.arange(rows), columns)
    return Pattern((rows, columns), np.arange(columns + 1) * rows, indices)
