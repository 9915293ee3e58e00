"""Other libraries behind one call: quadratic programs as torch tensors in, a differentiable solution out.

    minimise  1/2 u P u + q u   subject to   A u = b,   G u <= h        all (B, ...) float64

Each peer is a function that takes the tensors once, to set up what can be set up before, and returns the call that is
timed. A peer that is not installed raises ``ImportError`` and is left out. Tolerances are the tightest that each
peer reaches on these problems, so that times stand beside comparable accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from contest import Call, Tensors


def qpth(_: Tensors) -> Call:
    from qpth.qp import QPFunction

    solve = QPFunction(eps=1e-12, verbose=-1, maxIter=30, check_Q_spd=False)
    return lambda t: solve(t["P"], t["q"], t["G"], t["h"], t["A"], t["b"])


def qplayer(_: Tensors) -> Call:
    from proxsuite.torch.qplayer import QPFunction

    solve = QPFunction(structural_feasibility=True, eps=1e-9, maxIter=1000)

    def call(t: Tensors) -> torch.Tensor:
        low = torch.full_like(t["h"], -1e20)
        return solve(t["P"], t["q"], t["A"], t["b"], t["G"], low, t["h"])[0]

    return call


def _moreau(solver: str) -> Callable[[Tensors], Call]:
    def make(t: Tensors) -> Call:
        import moreau
        from moreau.torch import Solver

        B, n = t["q"].shape
        m, k = t["b"].shape[-1], t["h"].shape[-1]

        def dense(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.arange(rows + 1) * n, torch.arange(n).repeat(rows)

        settings = moreau.Settings(solver=solver, device="cpu", batch_size=B, enable_grad=True)
        cones = moreau.Cones(num_zero_cones=m, num_nonneg_cones=k)
        engine = Solver(n, m + k, *dense(n), *dense(m + k), cones=cones, settings=settings)

        def call(t: Tensors) -> torch.Tensor:
            rows, sides = torch.cat([t["A"], t["G"]], 1), torch.cat([t["b"], t["h"]], 1)
            solution = engine.solve(t["P"].reshape(B, -1), rows.reshape(B, -1), t["q"], sides)
            return solution.x

        return call

    return make


def libdqp(_: Tensors) -> Call:
    from dqp import build_settings, dQP_layer

    settings = build_settings(
        solve_type="dense", qp_solver="daqp", lin_solver="scipy LU", warm_start_from_previous=False
    )
    layer = dQP_layer(settings=settings)

    def call(t: Tensors) -> torch.Tensor:
        alone = len(t["q"]) == 1  # it takes no batch of one
        inputs = [t[name][0] if alone else t[name] for name in ("P", "q", "G", "h", "A", "b")]
        return layer(*inputs)[0].reshape(t["q"].shape)

    return call


def _cvxpylayers(**options: Any) -> Callable[[Tensors], Call]:
    def make(t: Tensors) -> Call:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        n, m, k = t["q"].shape[-1], t["b"].shape[-1], t["h"].shape[-1]
        u = cp.Variable(n)
        L, q = cp.Parameter((n, n)), cp.Parameter(n)
        A, b, G, h = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter((k, n)), cp.Parameter(k)
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(L @ u) + q @ u), [A @ u == b, G @ u <= h])
        layer = CvxpyLayer(problem, parameters=[L, q, A, b, G, h], variables=[u])

        def call(t: Tensors) -> torch.Tensor:
            root = torch.linalg.cholesky(t["P"]).mT
            return layer(root, t["q"], t["A"], t["b"], t["G"], t["h"], solver_args=options)[0]

        return call

    return make


def jaxopt(_: Tensors) -> Call:
    """Its OSQP, mapped over the batch; gradients cross to torch through a Function."""
    import jax
    from jaxopt import OSQP

    jax.config.update("jax_enable_x64", True)
    solver = OSQP(tol=1e-8, maxiter=20_000)

    def one(P: Any, q: Any, A: Any, b: Any, G: Any, h: Any) -> Any:
        return solver.run(params_obj=(P, q), params_eq=(A, b), params_ineq=(G, h)).params.primal

    mapped = jax.jit(jax.vmap(one))
    pulled = jax.jit(lambda inputs, v: jax.vjp(jax.vmap(one), *inputs)[1](v))

    class Bridge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            ctx.inputs = tuple(i.detach().numpy() for i in inputs)
            return torch.from_numpy(np.array(mapped(*ctx.inputs)))

        @staticmethod
        def backward(ctx: Any, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(torch.from_numpy(np.array(g)) for g in pulled(ctx.inputs, v.numpy()))

    return lambda t: Bridge.apply(*(t[name] for name in ("P", "q", "A", "b", "G", "h")))


def ddn_solvers(solver: str) -> Callable[[Tensors], Call]:
    def make(t: Tensors) -> Call:
        import ddn_solvers as ddn

        problem = ddn.quadratic_program(t["q"].shape[-1], t["b"].shape[-1], t["h"].shape[-1])
        layer = ddn.DeclarativeLayer(problem, solver=solver)
        return lambda t: layer(**{name: t[name] for name in problem.parameters})

    return make


QP: Mapping[str, Callable[[Tensors], Call]] = {
    "ddn_solvers": ddn_solvers("auto"),
    "moreau, active set": _moreau("active_set"),
    "moreau, interior point": _moreau("ipm"),
    "QPLayer": qplayer,
    "libdqp, daqp": libdqp,
    "qpth": qpth,
    "cvxpylayers": _cvxpylayers(),
    "cvxpylayers, Clarabel": _cvxpylayers(solve_method="Clarabel"),
    "jaxopt, OSQP": jaxopt,
}
