"""N1 to N4: nonlinear programs and bounded optimal control, beside other ways to solve and differentiate them.

    N1   32 problems, n = 10 and n = 50: exponentials, logarithms and a norm on a sphere
    N2   a cart-pole, 30 steps of the midpoint rule: 154 variables, 124 equalities
    N3   the same horizon with a neural network (2 x 32, tanh) as dynamics, all of whose weights are parameters
    N4   128 bounded LQR problems, horizon 20, 8 states, 4 inputs; bounds 1e4 and 1 (A = I + 0.2 N, B, b = N)

Reference points and gradients come from Newton's method on the KKT conditions and one dense solve, in torch, without
this library. ``CasADi by hand`` is the model that one would write without any library: it has no backward pass. Run it
as ``python benchmarks/nlp.py [N1 N2 N3 N4]`` where the peers are installed (``pip install pounce-solver cvxpylayers``,
``pip install --no-deps mpc``).
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import casadi as ca
import numpy as np
import torch
from contest import OURS, Call, Contestant, Reference, Tensors, contest
from rich.console import Console

import ddn_solvers as ddn

D = torch.float64
STEPS, H = 30, 0.05
Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Program:
    """min f(z, p)  subject to  c(z, p) = 0, of flat vectors; the same again by hand, and where to start.

    Attributes:
        by_hand: z and p as CasADi symbols -> f and c.
        p: (B, parameters).
    """

    n: int
    m: int
    f: Function
    c: Function
    by_hand: Callable[[ca.SX, ca.SX], tuple[ca.SX, ca.SX]]
    p: torch.Tensor
    start: torch.Tensor


# -- N1 -----------------------------------------------------------------------------------------------


def sphere(n: int, batch: int = 32) -> Program:
    g = torch.Generator().manual_seed(n)
    x, y = (torch.randn(batch, n, generator=g, dtype=D) for _ in range(2))

    def f(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        x, y = p[:n], p[n:]
        return (
            (0.3 * z - x).exp().sum() + (1 + (z - y).square()).log().sum() + torch.linalg.vector_norm(z - y)
        )

    def by_hand(z: ca.SX, p: ca.SX) -> tuple[ca.SX, ca.SX]:
        x, y = p[:n], p[n:]
        terms = ca.sum1(ca.exp(0.3 * z - x)) + ca.sum1(ca.log(1 + (z - y) ** 2))
        return terms + ca.norm_2(z - y), ca.sumsqr(z) - 1

    def c(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return z.square().sum(0, keepdim=True) - 1

    start = torch.full((n,), n**-0.5, dtype=D)
    return Program(n, 1, f, c, by_hand, torch.cat([x, y], dim=1), start)


# -- N2, N3 -------------------------------------------------------------------------------------------


def _control(slopes: Function, slopes_by_hand: Any, p: torch.Tensor, start: torch.Tensor) -> Program:
    """States (31, 4), forces (30,): the way to zero; p begins with the initial state and the two weights."""
    n = 4 * (STEPS + 1)

    def f(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        s, u = z[:n].reshape(-1, 4), z[n:]
        return p[4] * s.square().sum() * H + p[5] * u.square().sum() * H + 10 * s[-1].square().sum()

    def c(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        s, u = z[:n].reshape(-1, 4), z[n:]
        now, force = s[:-1], u[:, None]
        middle = now + 0.5 * H * slopes(torch.cat([now, force], 1), p[6:])
        after = now + H * slopes(torch.cat([middle, force], 1), p[6:])
        return torch.cat([s[0] - p[:4], (s[1:] - after).reshape(-1)])

    def by_hand(z: ca.SX, p: ca.SX) -> tuple[ca.SX, ca.SX]:
        s, u = ca.reshape(z[:n], 4, STEPS + 1), z[n:]
        rows = [s[:, 0] - p[:4]]
        for t in range(STEPS):
            middle = s[:, t] + 0.5 * H * slopes_by_hand(s[:, t], u[t], p[6:])
            rows.append(s[:, t + 1] - s[:, t] - H * slopes_by_hand(middle, u[t], p[6:]))
        cost = p[4] * ca.sumsqr(s) * H + p[5] * ca.sumsqr(u) * H + 10 * ca.sumsqr(s[:, -1])
        return cost, ca.vertcat(*rows)

    return Program(n + STEPS, n, f, c, by_hand, p[None], start)


def cart_pole() -> Program:
    def slopes(su: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        _, angle, v, w, force = su.unbind(1)
        cart, pole, length = p.unbind()
        sin, cos = angle.sin(), angle.cos()
        push = (force + pole * length * w.square() * sin) / (cart + pole)
        turn = (9.81 * sin - cos * push) / (length * (4 / 3 - pole * cos.square() / (cart + pole)))
        return torch.stack([v, w, push - pole * length * turn * cos / (cart + pole), turn], 1)

    def by_hand(s: ca.SX, force: ca.SX, p: ca.SX) -> ca.SX:
        cart, pole, length = p[0], p[1], p[2]
        sin, cos, w = ca.sin(s[1]), ca.cos(s[1]), s[3]
        push = (force + pole * length * w**2 * sin) / (cart + pole)
        turn = (9.81 * sin - cos * push) / (length * (4 / 3 - pole * cos**2 / (cart + pole)))
        return ca.vertcat(s[2], w, push - pole * length * turn * cos / (cart + pole), turn)

    p = torch.tensor([0.5, 0.6, 0.0, 0.0, 1.0, 0.05, 1.0, 0.2, 0.5], dtype=D)
    return _control(slopes, by_hand, p, torch.zeros(5 * STEPS + 4, dtype=D))


WIDTHS = (5, 32, 32, 4)


def network() -> Program:
    g = torch.Generator().manual_seed(0)
    shapes = [(b, a) for a, b in itertools.pairwise(WIDTHS)]
    sizes = [k for b, a in shapes for k in (a * b, b)]
    weights = torch.cat(
        [torch.randn(k, generator=g, dtype=D) * (0.8 if i % 2 == 0 else 0.1) for i, k in enumerate(sizes)]
    )
    scale = torch.cat([torch.full((b * a + b,), a**-0.5, dtype=D) for b, a in shapes])

    def slopes(su: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        parts, out = p.split(sizes), su
        for k, (b, a) in enumerate(shapes):
            out = out @ parts[2 * k].reshape(b, a).T + parts[2 * k + 1]
            out = out.tanh() if k < len(shapes) - 1 else out
        return out

    cuts = np.cumsum([0, *sizes]).tolist()

    def by_hand(s: ca.SX, force: ca.SX, p: ca.SX) -> ca.SX:
        parts, out = ca.vertsplit(p, cuts), ca.vertcat(s, force)
        for k, (b, a) in enumerate(shapes):
            out = ca.reshape(parts[2 * k], a, b).T @ out + parts[2 * k + 1]
            out = ca.tanh(out) if k < len(shapes) - 1 else out
        return out

    p = torch.cat([torch.tensor([0.5, 0.6, 0.0, 0.0, 1.0, 0.05], dtype=D), weights * scale])
    return _control(slopes, by_hand, p, torch.zeros(5 * STEPS + 4, dtype=D))


# -- contestants --------------------------------------------------------------------------------------


def ours(program: Program, solver: str = "auto", compiled: bool = True) -> Contestant:
    def make(_: Tensors) -> Call:
        f, c = (program.f, program.c) if compiled else (_opaque(program.f), _opaque(program.c))
        problem = ddn.Problem(
            {"z": (program.n,)}, {"p": program.p.shape[1:]}, lambda z, p: f(z, p), lambda z, p: c(z, p)
        )
        layer = ddn.DeclarativeLayer(problem, solver=solver)
        start = program.start.expand(len(program.p), -1)
        return lambda t: layer.solve(p=t["p"], initial=start)["z"]

    return make


def _opaque(function: Function) -> Function:
    """The same with a branch on a value, which no graph shows."""

    def called(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        found = function(z, p)
        return found if found.sum() < torch.inf else 2 * found

    return called


def pounce(program: Program) -> Contestant:
    def make(t: Tensors) -> Call:
        from pounce.torch import TorchProblem

        zero = np.zeros(program.m)
        engine = TorchProblem(
            f=program.f,
            g=program.c,
            n=program.n,
            m=program.m,
            p_example=t["p"][0].detach().numpy(),
            cl=zero,
            cu=zero,
            options={"tol": 1e-10, "print_level": 0},
            sparse=program.n > 100,
        )
        if len(t["p"]) == 1:
            return lambda t: engine.solve(t["p"][0], program.start)[None]
        return lambda t: engine.batched_solve(t["p"], program.start)

    return make


def by_hand(program: Program) -> Contestant:
    """IPOPT with the derivatives that CasADi makes of the model, and the options of our own."""

    def make(_: Tensors) -> Call:
        z, p = ca.SX.sym("z", program.n), ca.SX.sym("p", program.p.shape[1])
        f, c = program.by_hand(z, p)
        options = {"ipopt.print_level": 0, "print_time": False, "ipopt.sb": "yes", "ipopt.tol": 1e-9}
        solver = ca.nlpsol("solver", "ipopt", {"x": z, "p": p, "f": f, "g": c}, options)

        def call(t: Tensors) -> torch.Tensor:
            rows = [
                solver(x0=program.start.numpy(), p=row, lbg=0, ubg=0)["x"] for row in t["p"].detach().numpy()
            ]
            return torch.from_numpy(np.stack([row.full()[:, 0] for row in rows]))

        return call

    return make


def contestants(program: Program) -> Mapping[str, Contestant]:
    return {
        OURS: ours(program),
        "ddn_solvers, sqpmethod": ours(program, "casadi:sqpmethod"),
        "torch callbacks in IPOPT": ours(program, "casadi:ipopt", compiled=False),
        "POUNCE": pounce(program),
        "CasADi by hand, IPOPT": by_hand(program),
    }


# -- N4 -----------------------------------------------------------------------------------------------

T, NX, NU = 20, 8, 4


def regulators(batch: int = 128) -> Tensors:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=g, dtype=D)

    tensors = {
        "A": torch.eye(NX, dtype=D) + 0.2 * normal(NX, NX),
        "B": normal(NX, NU),
        "b": normal(NX),
        "x": normal(NX),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def cost(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of forces (20, 4), the states following from them."""
    total = 0.5 * u.square().sum()
    for t in range(T):
        total = total + 0.5 * x.square().sum()
        x = A @ x + B @ u[t] + b
    return total


def our_regulator(limit: float, condensed: bool) -> Contestant:
    def make(_: Tensors) -> Call:
        shapes = {"A": (NX, NX), "B": (NX, NU), "b": (NX,), "x": (NX,)}
        if condensed:
            problem = ddn.Problem({"u": (T, NU)}, shapes, cost, bounds={"u": (-limit, limit)})
        else:
            problem = ddn.Problem(
                {"u": (T, NU), "s": (T - 1, NX)},
                shapes,
                lambda u, s, x: 0.5 * (u.square().sum() + s.square().sum()),
                equality={"dynamics": _dynamics},
                bounds={"u": (-limit, limit)},
            )
        layer = ddn.DeclarativeLayer(problem)
        return lambda t: layer.solve(**t)["u"].flatten(1)

    return make


def _dynamics(
    u: torch.Tensor, s: torch.Tensor, A: torch.Tensor, B: torch.Tensor, b: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    now = torch.cat([x[None], s[:-1]])
    return s - now @ A.T - u[:-1] @ B.T - b


def mpc_pytorch(limit: float) -> Contestant:
    def make(_: Tensors) -> Call:
        from mpc import mpc

        eye = torch.eye(NX + NU, dtype=D)

        def call(t: Tensors) -> torch.Tensor:
            batch = len(t["A"])
            F = torch.cat([t["A"], t["B"]], 2).expand(T - 1, batch, NX, NX + NU)
            f = t["b"].expand(T - 1, batch, NX)
            quadratic = mpc.QuadCost(eye.expand(T, batch, -1, -1), torch.zeros(T, batch, NX + NU, dtype=D))
            engine = mpc.MPC(
                NX,
                NU,
                T,
                u_lower=-limit,
                u_upper=limit,
                lqr_iter=20,
                eps=1e-9,
                n_batch=batch,
                verbose=-1,
                exit_unconverged=False,
                detach_unconverged=False,
                backprop=True,
            )
            with contextlib.redirect_stdout(io.StringIO()):  # a warning for each sample and step
                _, u, _ = engine(t["x"], quadratic, mpc.LinDx(F, f))
            return u.transpose(0, 1).flatten(1)

        return call

    return make


def cvxpylayers(limit: float) -> Contestant:
    def make(_: Tensors) -> Call:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        u, s = cp.Variable((T, NU)), cp.Variable((T, NX))
        A, B, b, x = cp.Parameter((NX, NX)), cp.Parameter((NX, NU)), cp.Parameter(NX), cp.Parameter(NX)
        rows = [s[0] == x, *(s[t + 1] == A @ s[t] + B @ u[t] + b for t in range(T - 1)), cp.abs(u) <= limit]
        problem = cp.Problem(cp.Minimize(0.5 * (cp.sum_squares(u) + cp.sum_squares(s))), rows)
        layer = CvxpyLayer(problem, parameters=[A, B, b, x], variables=[u])
        return lambda t: layer(t["A"], t["B"], t["b"], t["x"])[0].flatten(1)

    return make


def regulator_contestants(limit: float) -> Mapping[str, Contestant]:
    return {
        OURS: our_regulator(limit, condensed=False),
        "ddn_solvers, states eliminated": our_regulator(limit, condensed=True),
        "mpc.pytorch": mpc_pytorch(limit),
        "cvxpylayers": cvxpylayers(limit),
    }


def regulator_reference(limit: float) -> Reference:
    """From the KKT system of forces and states; the active bounds are those that satisfy it."""
    tensors = regulators()
    rows = list(zip(*tensors.values(), strict=True))
    v = torch.randn(len(rows), T * NU, generator=torch.Generator().manual_seed(2), dtype=D)
    near = our_regulator(limit, condensed=False)(tensors)(tensors).detach()
    found = [_regulated(row, limit, near[i], v[i]) for i, row in enumerate(rows)]
    u, *gradients = (torch.stack(part).numpy() for part in zip(*found, strict=True))
    return Reference(dict(tensors), v, u, dict(zip(tensors, gradients, strict=True)))


def _regulated(
    row: tuple[torch.Tensor, ...], limit: float, near: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    forces, states = T * NU, (T - 1) * NX
    side = torch.where(near.abs() >= limit * (1 - 1e-9), near.sign(), 0.0)
    free = torch.cat([side == 0, torch.ones(states, dtype=torch.bool)])

    def c(z: torch.Tensor, row: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return _dynamics(z[:forces].reshape(T, NU), z[forces:].reshape(T - 1, NX), *row).reshape(-1)

    fixed = torch.cat([side * limit, torch.zeros(states, dtype=D)])
    plain = tuple(t.detach() for t in row)
    C = torch.func.jacrev(c)(fixed, plain)
    K, count = _bordered(C[:, free]), int(free.sum())
    z, w = fixed.clone(), torch.zeros_like(fixed)
    found = _refined(K, torch.cat([torch.zeros(count, dtype=D), -c(fixed, plain)]))
    z[free], y = found[:count], found[count:]
    push = -(z + C.T @ y)[:forces]
    assert (z[:forces].abs() <= limit * (1 + 1e-9)).all()
    assert (push * side >= 0).all()
    found = _refined(K, torch.cat([v[side == 0], torch.zeros(2 * states, dtype=D)]))
    w[free], s = found[:count], found[count:]
    needing = tuple(t.detach().requires_grad_() for t in row)
    slope = torch.func.grad(lambda z: 0.5 * z @ z + y @ c(z, needing))(z)
    gradients = torch.autograd.grad(-(slope @ w + s @ c(z, needing)), needing)
    return z[:forces], *gradients


def _bordered(C: torch.Tensor) -> torch.Tensor:
    top = torch.cat([torch.eye(C.shape[1], dtype=D), C.T], 1)
    return torch.cat([top, torch.cat([C, torch.zeros(len(C), len(C), dtype=D)], 1)])


def _refined(K: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """With residuals in extended precision."""
    factors, wide = torch.linalg.lu_factor(K), K.numpy().astype(np.longdouble)
    x = torch.linalg.lu_solve(*factors, right[:, None])[:, 0]
    for _ in range(3):
        left = torch.from_numpy((right.numpy() - wide @ x.numpy()).astype(float))
        x = x + torch.linalg.lu_solve(*factors, left[:, None])[:, 0]
    return x


# -- references of N1 to N3 -----------------------------------------------------------------------------


def reference(program: Program) -> Reference:
    tensors = {"p": program.p.clone().requires_grad_()}
    near = by_hand(program)(tensors)(tensors)
    v = torch.randn(near.shape, generator=torch.Generator().manual_seed(3), dtype=D)
    rows = [_exact(program, program.p[i], near[i], v[i]) for i in range(len(near))]
    u, gradient = (torch.stack(part).numpy() for part in zip(*rows, strict=True))
    return Reference(tensors, v, u, {"p": gradient})


def _exact(
    program: Program, p: torch.Tensor, z: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Point and gradient by Newton's method on the KKT conditions, and the adjoint of their linear system."""
    n, needing = program.n, p.clone().requires_grad_()

    def conditions(zy: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        force, pull = torch.func.vjp(lambda z: (program.f(z, p), program.c(z, p)), zy[:n])
        return torch.cat([pull((torch.ones((), dtype=D), zy[n:]))[0], force[1]])

    J = torch.func.jacrev(program.c)(z, p)
    y = torch.linalg.lstsq(J.T, -torch.func.grad(program.f)(z, p)[:, None]).solution[:, 0]
    zy = torch.cat([z, y])
    for _ in range(8):
        K = torch.func.jacrev(conditions)(zy, p)
        zy = zy - torch.linalg.solve(K, conditions(zy, p))
    w = torch.linalg.solve(K.T, torch.cat([v, torch.zeros(program.m, dtype=D)]))
    return zy[:n].detach(), -torch.autograd.grad(conditions(zy, needing) @ w, needing)[0]


PROGRAMS = {
    "N1": {"N1, n = 10": functools.partial(sphere, 10), "N1, n = 50": functools.partial(sphere, 50)},
    "N2": {"N2, cart-pole": cart_pole},
    "N3": {"N3, neural network": network},
}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console(width=120)
    for name in sys.argv[1:] or (*PROGRAMS, "N4"):
        for title, make in PROGRAMS.get(name, {}).items():
            program = make()
            console.print(contest(title, reference(program), contestants(program), 15))
        if name == "N4":
            for limit in (1e4, 1.0):
                title = f"N4, |u| <= {limit:g}"
                console.print(contest(title, regulator_reference(limit), regulator_contestants(limit), 5))


if __name__ == "__main__":
    main()
