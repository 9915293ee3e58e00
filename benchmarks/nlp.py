"""N1 to N4: nonlinear programs and bounded optimal control, beside other ways to solve and differentiate them.

    N1   32 problems, n = 10 and n = 50: exponentials, logarithms and a norm on a sphere
    N2   a cart-pole, 30 steps of the midpoint rule: 154 variables, 124 equalities
    N3   the same horizon with a neural network (2 x 32, tanh) as dynamics, all of whose weights are parameters
    N4   128 bounded LQR problems, horizon 20, 8 states, 4 inputs; bounds 1e4 and 1 (A = I + 0.2 N, B, b = N)

Reference points and gradients come from Newton's method on the KKT conditions and one dense solve, in torch; on N4 the
active bounds are first guessed from our own solution, and the signs of the multipliers checked. A contestant that ends in
another local minimum shows an error of about 1 (sqpmethod does on N3).
``CasADi by hand`` is the model that one would write without any library, as scalar expressions (SX) or as operations
on whole horizons (MX); it has no backward pass. cvxpylayers has Clarabel on N4: SCS takes minutes. Run it
as ``python benchmarks/nlp.py [N1 N2 N3 N4]`` where the peers are installed (``pip install pounce-solver cvxpylayers``,
``pip install --no-deps mpc``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import casadi as ca
import numpy as np
import torch
from contest import OURS, Call, Contestant, Reference, Tensors, contest, refined
from rich.console import Console

import ddn_solvers as ddn

D = torch.float64
STEPS, H = 30, 0.05
TOLERANCE = 1e-9  # of IPOPT and POUNCE; our own default
ByHand = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Program:
    """A problem as declared, its parameters, and where to start; the same again by hand.

    Attributes:
        by_hand: name -> z and p as CasADi symbols, flat and in declared order, -> f and c; which form is the
            faster one depends on the problem.
        p: name -> (B, *shape).
        start: (variables,).
    """

    problem: ddn.Problem
    by_hand: Mapping[str, ByHand]
    p: dict[str, torch.Tensor]
    start: torch.Tensor

    @property
    def m(self) -> int:
        return len(self.c(self.start, self.flat(self.p)[0]))

    @staticmethod
    def flat(p: Tensors) -> torch.Tensor:
        return torch.cat([block.reshape(len(block), -1) for block in p.values()], 1)

    def f(self, z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return self._call(self.problem.objective, z, p)

    def c(self, z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        rows = [self._call(h, z, p).reshape(-1) for h in self.problem.equality.values()]
        return torch.cat(rows)

    def _call(self, function: Callable[..., torch.Tensor], z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        known = unpacked(z, self.problem.variables) | unpacked(p, self.problem.parameters)
        return function(**{name: known[name] for name in inspect.signature(function).parameters})


def unpacked(flat: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


# -- N1 -----------------------------------------------------------------------------------------------


def sphere(n: int, batch: int = 32) -> Program:
    g = torch.Generator().manual_seed(n)
    x, y = (torch.randn(batch, n, generator=g, dtype=D) for _ in range(2))

    def objective(u: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        far = u - y
        return (0.3 * u - x).exp().sum() + (1 + far.square()).log().sum() + torch.linalg.vector_norm(far)

    def by_hand(z: ca.SX, p: ca.SX) -> tuple[ca.SX, ca.SX]:
        x, y = p[:n], p[n : 2 * n]
        terms = ca.sum1(ca.exp(0.3 * z - x)) + ca.sum1(ca.log(1 + (z - y) ** 2))
        return terms + ca.norm_2(z - y), ca.sumsqr(z) - p[-1]

    problem = ddn.Problem(
        {"u": (n,)}, {"x": (n,), "y": (n,), "r": ()}, objective, {"sphere": lambda u, r: u.square().sum() - r}
    )
    r = 0.5 + torch.rand(batch, generator=g, dtype=D)
    return Program(problem, {"": by_hand}, {"x": x, "y": y, "r": r}, torch.full((n,), n**-0.5, dtype=D))


# -- N2, N3 -------------------------------------------------------------------------------------------


def _control(
    dynamics: Callable[..., torch.Tensor], slopes: Any, model: Mapping[str, torch.Tensor]
) -> Program:
    """States (31, 4), forces (30, 1): the way to zero. ``dynamics`` takes the model's parameters by name."""
    n, first = 4 * (STEPS + 1), torch.tensor([0.5, 0.6, 0.0, 0.0], dtype=D)
    p = {"x": first, "q": torch.tensor(1.0, dtype=D), "r": torch.tensor(0.05, dtype=D), **model}

    def objective(s: torch.Tensor, u: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return q * s.square().sum() * H + r * u.square().sum() * H + 10 * s[-1].square().sum()

    def step(s: Any, u: Any, p: Any) -> Any:
        return s + H * slopes(s + 0.5 * H * slopes(s, u, p), u, p)

    def cost(s: Any, u: Any, p: Any) -> Any:
        return p[4] * ca.sumsqr(s) * H + p[5] * ca.sumsqr(u) * H + 10 * ca.sumsqr(s[:, -1])

    def unrolled(z: ca.SX, p: ca.SX) -> tuple[ca.SX, ca.SX]:
        s, u = ca.reshape(z[:n], 4, STEPS + 1), z[n:]
        rows = [s[:, t + 1] - step(s[:, t], u[t], p[6:]) for t in range(STEPS)]
        return cost(s, u, p), ca.vertcat(s[:, 0] - p[:4], *rows)

    def vectorised(z: ca.MX, p: ca.MX) -> tuple[ca.MX, ca.MX]:
        s, u = ca.reshape(z[:n], 4, STEPS + 1), z[n:]
        after = step(s[:, :-1], u.T, p[6:])
        return cost(s, u, p), ca.vertcat(s[:, 0] - p[:4], ca.vec(s[:, 1:] - after))

    problem = ddn.Problem(
        {"s": (STEPS + 1, 4), "u": (STEPS, 1)},
        {name: tuple(block.shape) for name, block in p.items()},
        objective,
        {"first": lambda s, x: s[0] - x, "dynamics": dynamics},
    )
    batched = {name: block[None] for name, block in p.items()}
    return Program(problem, {", SX": unrolled, ", MX": vectorised}, batched, torch.zeros(n + STEPS, dtype=D))


def _defects(s: torch.Tensor, u: torch.Tensor, slopes: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Of the midpoint rule."""
    now = s[:-1]
    middle = now + 0.5 * H * slopes(torch.cat([now, u], 1))
    return s[1:] - now - H * slopes(torch.cat([middle, u], 1))


def cart_pole() -> Program:
    def dynamics(
        s: torch.Tensor, u: torch.Tensor, cart: torch.Tensor, pole: torch.Tensor, length: torch.Tensor
    ) -> torch.Tensor:
        def slopes(su: torch.Tensor) -> torch.Tensor:
            _, angle, v, w, force = su.unbind(1)
            sin, cos = angle.sin(), angle.cos()
            push = (force + pole * length * w.square() * sin) / (cart + pole)
            turn = (9.81 * sin - cos * push) / (length * (4 / 3 - pole * cos.square() / (cart + pole)))
            return torch.stack([v, w, push - pole * length * turn * cos / (cart + pole), turn], 1)

        return _defects(s, u, slopes)

    def by_hand(s: Any, force: Any, p: Any) -> Any:
        cart, pole, length = p[0], p[1], p[2]
        sin, cos, v, w = ca.sin(s[1, :]), ca.cos(s[1, :]), s[2, :], s[3, :]
        push = (force + pole * length * w**2 * sin) / (cart + pole)
        turn = (9.81 * sin - cos * push) / (length * (4 / 3 - pole * cos**2 / (cart + pole)))
        return ca.vertcat(v, w, push - pole * length * turn * cos / (cart + pole), turn)

    masses = {"cart": 1.0, "pole": 0.2, "length": 0.5}
    return _control(dynamics, by_hand, {name: torch.tensor(v, dtype=D) for name, v in masses.items()})


WIDTHS = (5, 32, 32, 4)


def network() -> Program:
    g = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for k, (a, b) in enumerate(itertools.pairwise(WIDTHS)):
        weights[f"W{k}"] = 0.8 * a**-0.5 * torch.randn(b, a, generator=g, dtype=D)
        weights[f"b{k}"] = 0.1 * a**-0.5 * torch.randn(b, generator=g, dtype=D)

    def dynamics(
        s: torch.Tensor,
        u: torch.Tensor,
        W0: torch.Tensor,
        b0: torch.Tensor,
        W1: torch.Tensor,
        b1: torch.Tensor,
        W2: torch.Tensor,
        b2: torch.Tensor,
    ) -> torch.Tensor:
        def slopes(su: torch.Tensor) -> torch.Tensor:
            return ((su @ W0.T + b0).tanh() @ W1.T + b1).tanh() @ W2.T + b2

        return _defects(s, u, slopes)

    cuts = np.cumsum([0, *(block.numel() for block in weights.values())]).tolist()

    def by_hand(s: Any, force: Any, p: Any) -> Any:
        parts, out = ca.vertsplit(p, cuts), ca.vertcat(s, force)
        for k, (a, b) in enumerate(itertools.pairwise(WIDTHS)):
            out = ca.tanh(out) if k else out
            out = ca.reshape(parts[2 * k], a, b).T @ out + ca.repmat(parts[2 * k + 1], 1, s.shape[1])
        return out

    return _control(dynamics, by_hand, weights)


# -- contestants --------------------------------------------------------------------------------------


def ours(program: Program, solver: str = "auto", compiled: bool = True) -> Contestant:
    def make(_: Tensors) -> Call:
        declared, batch = program.problem, len(next(iter(program.p.values())))
        problem = declared if compiled else replace(declared, objective=_opaque(declared.objective))
        layer = ddn.DeclarativeLayer(problem, solver=solver)
        start = {
            name: part.expand(batch, *part.shape)
            for name, part in unpacked(program.start, declared.variables).items()
        }

        def call(t: Tensors) -> torch.Tensor:
            return torch.cat([u.flatten(1) for u in layer.solve(**t, initial=start).primal.values()], 1)

        return call

    return make


def _opaque(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same with a branch on a value, which no graph shows."""

    @functools.wraps(function)
    def called(*values: torch.Tensor, **by_name: torch.Tensor) -> torch.Tensor:
        found = function(*values, **by_name)
        return found if found.sum() < torch.inf else 2 * found

    return called


def pounce(program: Program) -> Contestant:
    """Its sparse mode for the horizons; the loop over a batch is its own."""

    def make(t: Tensors) -> Call:
        from pounce.torch import TorchProblem

        n, zero = len(program.start), np.zeros(program.m)
        engine = TorchProblem(
            f=program.f,
            g=program.c,
            n=n,
            m=program.m,
            p_example=program.flat(t)[0].detach().numpy(),
            cl=zero,
            cu=zero,
            options={"tol": TOLERANCE, "print_level": 0},
            sparse=n > 100,
        )

        def call(t: Tensors) -> torch.Tensor:
            p = program.flat(t)
            if len(p) == 1:
                return engine.solve(p[0], program.start)[None]
            return engine.batched_solve(p, program.start)

        return call

    return make


def by_hand(program: Program, form: str) -> Contestant:
    """IPOPT with the derivatives that CasADi makes of the model, and the options of our own."""

    def make(_: Tensors) -> Call:
        kind = ca.MX if "MX" in form else ca.SX
        z = kind.sym("z", len(program.start))
        p = kind.sym("p", program.flat(program.p).shape[1])
        f, c = program.by_hand[form](z, p)
        ipopt = {"print_level": 0, "sb": "yes", "bound_relax_factor": 0.0, "tol": TOLERANCE}
        options = {f"ipopt.{name}": value for name, value in ipopt.items()}
        options |= {"print_time": False, "calc_lam_p": False, "ipopt.constr_viol_tol": TOLERANCE}
        solver = ca.nlpsol("solver", "ipopt", {"x": z, "p": p, "f": f, "g": c}, options)

        def call(t: Tensors) -> torch.Tensor:
            rows = [
                solver(x0=program.start.numpy(), p=row, lbg=0, ubg=0)["x"].full()[:, 0]
                for row in program.flat(t).detach().numpy()
            ]
            return torch.from_numpy(np.stack(rows))

        return call

    return make


def contestants(program: Program) -> Mapping[str, Contestant]:
    return {
        OURS: ours(program),
        "ddn_solvers, sqpmethod": ours(program, "casadi:sqpmethod"),
        "torch callbacks in IPOPT": ours(program, "casadi:ipopt", compiled=False),
        "POUNCE": pounce(program),
        **{f"CasADi by hand{form}": by_hand(program, form) for form in program.by_hand},
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


def cvxpylayers(limit: float, **options: Any) -> Contestant:
    def make(_: Tensors) -> Call:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        u, s = cp.Variable((T, NU)), cp.Variable((T, NX))
        A, B, b, x = cp.Parameter((NX, NX)), cp.Parameter((NX, NU)), cp.Parameter(NX), cp.Parameter(NX)
        rows = [s[0] == x, *(s[t + 1] == A @ s[t] + B @ u[t] + b for t in range(T - 1)), cp.abs(u) <= limit]
        problem = cp.Problem(cp.Minimize(0.5 * (cp.sum_squares(u) + cp.sum_squares(s))), rows)
        layer = CvxpyLayer(problem, parameters=[A, B, b, x], variables=[u])
        return lambda t: layer(t["A"], t["B"], t["b"], t["x"], solver_args=options)[0].flatten(1)

    return make


def regulator_contestants(limit: float) -> Mapping[str, Contestant]:
    return {
        OURS: our_regulator(limit, condensed=False),
        "ddn_solvers, states eliminated": our_regulator(limit, condensed=True),
        "mpc.pytorch": mpc_pytorch(limit),
        "cvxpylayers, Clarabel": cvxpylayers(limit, solve_method="Clarabel"),
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
    found = _solved(K, torch.cat([torch.zeros(count, dtype=D), -c(fixed, plain)]))
    z[free], y = found[:count], found[count:]
    push = -(z + C.T @ y)[:forces]
    assert (z[:forces].abs() <= limit * (1 + 1e-9)).all()
    assert (push * side >= 0).all()
    found = _solved(K, torch.cat([v[side == 0], torch.zeros(2 * states, dtype=D)]))
    w[free], s = found[:count], found[count:]
    needing = tuple(t.detach().requires_grad_() for t in row)
    slope = torch.func.grad(lambda z: 0.5 * z @ z + y @ c(z, needing))(z)
    gradients = torch.autograd.grad(-(slope @ w + s @ c(z, needing)), needing)
    return z[:forces], *gradients


def _bordered(C: torch.Tensor) -> torch.Tensor:
    top = torch.cat([torch.eye(C.shape[1], dtype=D), C.T], 1)
    return torch.cat([top, torch.cat([C, torch.zeros(len(C), len(C), dtype=D)], 1)])


def _solved(K: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(refined(K.numpy(), right.numpy()))


# -- references of N1 to N3 -----------------------------------------------------------------------------


def reference(program: Program) -> Reference:
    """Of the minimum that IPOPT finds from the program's start; another one of the same problem is no error."""
    tensors = {name: block.clone().requires_grad_() for name, block in program.p.items()}
    near, p = by_hand(program, next(iter(program.by_hand)))(tensors)(tensors), program.flat(program.p)
    v = torch.randn(near.shape, generator=torch.Generator().manual_seed(3), dtype=D)
    rows = [_exact(program, p[i], near[i], v[i]) for i in range(len(near))]
    u = torch.stack([point for point, _ in rows]).numpy()
    blocks = [unpacked(gradient, program.problem.parameters) for _, gradient in rows]
    gradients = {name: torch.stack([block[name] for block in blocks]).numpy() for name in tensors}
    return Reference(tensors, v, u, gradients)


def _exact(
    program: Program, p: torch.Tensor, z: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Point and gradient by Newton's method on the KKT conditions, and the adjoint of their linear system."""
    n, needing = len(z), p.clone().requires_grad_()

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
