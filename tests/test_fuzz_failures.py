"""Random batches of samples with known answers, with none, and with one that runs away: no silent wrong answer.

A state machine calls one layer again and again: other batches, solvers, policies, limits, starts, bad input in between.
Whatever came before, a sample that is called optimal is at its closed form with its closed-form gradient, a sample
without a solution is never called optimal, and failures do what the policy says.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import ddn_solvers as ddn

TIMES = int(os.environ.get("DDN_FUZZ", "1"))
D = torch.float64
SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.lists(st.sampled_from(["good", "good", "infeasible", "unbounded"]), min_size=1, max_size=6)
POLICIES = st.sampled_from(["raise", "warn", "nan", "mask", "closest"])
S = ddn.Status


@dataclass
class Batch:
    """Parameters, which samples have a solution, and there the variables and d(v^T u) / d(parameters)."""

    parameters: dict[str, torch.Tensor]
    good: torch.Tensor
    point: torch.Tensor
    v: torch.Tensor
    gradients: dict[str, torch.Tensor]


# -- quadratic programs around a KKT point ------------------------------------------------------------


class Quadratic:
    """1/2 u P u + q u with equalities and inequalities; the last two inequalities contradict, or a ray is free."""

    solvers = ("auto", "auto", "casadi:ipopt", "casadi:daqp", "scipy:SLSQP", ("scipy:SLSQP", "auto"))

    def __init__(self, n: int) -> None:
        self.n, self.m, self.k = n, max(1, n // 4), n // 2 + 3
        self.problem = ddn.quadratic_program(n, self.m, self.k)

    def batch(self, kinds: list[str], seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        columns = [self._sample(kind, g) for kind in kinds]
        names = list(columns[0][0])
        return Batch(
            {name: torch.stack([c[0][name] for c in columns]) for name in names},
            torch.tensor([kind == "good" for kind in kinds]),
            torch.stack([c[1] for c in columns]),
            torch.stack([c[2] for c in columns]),
            {name: torch.stack([c[3][name] for c in columns]) for name in ("q", "b", "h")},
        )

    def _sample(self, kind: str, g: torch.Generator):
        n, m, k = self.n, self.m, self.k

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=D)

        def uniform(*shape: int) -> torch.Tensor:
            return 0.2 + torch.rand(*shape, generator=g, dtype=D)

        size = 10.0 ** (6 * torch.rand((), generator=g, dtype=D) - 3)  # of the variables
        L, A, G, u, v = normal(n, n), normal(m, n), normal(k, n), size * normal(n), normal(n)
        P = L @ L.T / n + 0.1 * torch.eye(n, dtype=D)
        direction = torch.nn.functional.normalize(normal(n), dim=0)
        if kind == "unbounded":  # nothing holds along the direction, and the objective falls
            off = torch.eye(n, dtype=D) - torch.outer(direction, direction)
            P, A, G = off @ P @ off, A @ off, G @ off
        if kind == "infeasible":
            G[-1] = -G[-2]
        active = torch.rand(k, generator=g) < 0.3
        active[-2:] = False
        active &= torch.cumsum(active, 0) <= n - m - 1  # LICQ
        lam, slack = torch.where(active, size * uniform(k), 0.0), torch.where(active, 0.0, size * uniform(k))
        nu = size * normal(m)
        q = -(P @ u + A.T @ nu + G.T @ lam)
        b, h = A @ u, G @ u + slack
        if kind == "unbounded":
            q = q - size * direction
        if kind == "infeasible":  # G[-2] u <= h[-2] and >= h[-2] + gap
            h[-1] = -h[-2] - size * 10.0 ** (3 * torch.rand((), generator=g, dtype=D) - 2)
        rows = torch.cat([A, G[active]])
        zero = torch.zeros(len(rows), len(rows), dtype=D)
        K = torch.cat([torch.cat([P, rows.T], 1), torch.cat([rows, zero], 1)])
        gradients = {"q": torch.zeros(n, dtype=D), "b": torch.zeros(m, dtype=D), "h": torch.zeros(k, dtype=D)}
        if kind == "good":
            w = torch.linalg.solve(K, torch.cat([v, torch.zeros(len(rows), dtype=D)]))
            gradients["q"], gradients["b"] = -w[:n], w[n : n + m]
            gradients["h"][active] = w[n + m :]
        return {"P": P, "q": q, "A": A, "b": b, "G": G, "h": h}, u, v, gradients


# -- a ball and a ray ---------------------------------------------------------------------------------


def _distance(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    square = (u - x).square().sum()
    return square + 0.1 * square.square()


class Ball:
    """The nearest point of a ball, which may be empty, and a variable that may run away."""

    solvers = (
        "auto",
        "auto",
        "casadi:ipopt",
        "scipy:SLSQP",
        "casadi:sqpmethod",
        ("casadi:sqpmethod", "auto"),
    )

    def __init__(self, n: int) -> None:
        self.n = n
        self.problem = ddn.Problem(
            {"u": (n,), "t": ()},
            {"x": (n,), "c": (n,), "r": (), "k": ()},
            lambda u, t, x, k: _distance(u, x) + k * t,
            inequality={"ball": lambda u, c, r: (u - c).square().sum() - r},
            bounds={"t": (0.0, None)},
        )

    def batch(self, kinds: list[str], seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        size = len(kinds)
        good = torch.tensor([kind == "good" for kind in kinds])
        c, v = (torch.randn(size, self.n, generator=g, dtype=D) for _ in range(2))
        away = torch.nn.functional.normalize(torch.randn(size, self.n, generator=g, dtype=D), dim=1)
        radius = 0.5 + torch.rand(size, generator=g, dtype=D)
        outside = torch.rand(size, generator=g) < 0.5
        far = radius * torch.where(outside, 1.3 + radius, 0.2 + 0.4 * radius)
        x = c + far[:, None] * away
        empty, falls = (
            torch.tensor([kind == name for kind in kinds]) for name in ("infeasible", "unbounded")
        )
        r = torch.where(empty, -radius, radius.square())
        k = torch.where(falls, -radius, radius)
        given = {"x": x, "c": c, "r": r, "k": k}
        needing = {name: t.clone().requires_grad_() for name, t in given.items()}
        step = needing["x"] - needing["c"]
        length = step.norm(dim=1)
        reach = torch.where(good, needing["r"], 1.0).sqrt()
        u = needing["c"] + step * torch.where(outside, reach / length, 1.0)[:, None]
        picked = torch.where(good[:, None], v, 0.0)
        wanted = [needing[name] for name in ("x", "c", "r")]
        gradients = torch.autograd.grad((picked * u).sum(), wanted)
        return Batch(given, good, u.detach(), v, dict(zip(("x", "c", "r"), gradients, strict=True)))


FAMILIES = {
    "qp-3": lambda: Quadratic(3),
    "qp-20": lambda: Quadratic(20),
    "ball-2": lambda: Ball(2),
    "ball-20": lambda: Ball(20),
}
_MADE: dict[str, Quadratic | Ball] = {}


def family(name: str) -> Quadratic | Ball:
    return _MADE.setdefault(name, FAMILIES[name]())


# -- the machine --------------------------------------------------------------------------------------


class Calls(RuleBasedStateMachine):
    """One layer and what is done to it."""

    @initialize(name=st.sampled_from(sorted(FAMILIES)), warm=st.booleans())
    def start(self, name: str, warm: bool) -> None:
        self.family = family(name)
        self.layer = ddn.DeclarativeLayer(self.family.problem, warm_start=warm)
        self.last: ddn.Solution | None = None

    @rule(solver=st.integers(0, 5), on_failure=POLICIES)
    def choose(self, solver: int, on_failure: str) -> None:
        solver = self.family.solvers[solver]
        self.layer.solver = list(solver) if isinstance(solver, tuple) else solver
        self.layer.policy = ddn.Policy(on_failure=on_failure)

    @rule(kinds=KINDS, seed=SEEDS, start=st.sampled_from(["none", "near", "far", "warm"]))
    def call(self, kinds: list[str], seed: int, start: str) -> None:
        batch = self.family.batch(kinds, seed)
        parameters = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
        arguments = {}
        if start in ("near", "far"):
            arguments["initial"] = {"u": batch.point + (0.1 if start == "near" else 1e3) * batch.v}
        if start == "warm" and self.last is not None and len(self.last.status) == len(kinds):
            arguments["warm_start"] = self.last
        solution = self._solve(parameters, arguments)
        self._judge(batch, solution, kinds, start)
        self._differentiate(batch, solution, parameters)
        self.last = solution

    @rule(
        kinds=KINDS, seed=SEEDS, where=st.integers(0, 3), value=st.sampled_from([float("nan"), float("inf")])
    )
    def bad_number(self, kinds: list[str], seed: int, where: int, value: float) -> None:
        parameters = dict(self.family.batch(kinds, seed).parameters)
        name = list(parameters)[where]
        parameters[name] = parameters[name].clone()
        parameters[name].reshape(-1)[-1] = value
        with pytest.raises(ddn.ProblemError, match=f"parameter '{name}' is not finite"):
            self.layer.solve(**parameters)

    @rule(kinds=KINDS, seed=SEEDS)
    def limited(self, kinds: list[str], seed: int) -> None:
        batch = self.family.batch(kinds, seed)
        self.layer.options = {"max_iter": 1}
        try:
            solution = self._solve(batch.parameters, {})
        finally:
            self.layer.options = None
        self._judge(batch, solution, kinds, "limited")

    @invariant()
    def the_problem_is_as_it_was(self) -> None:
        assert not hasattr(self, "layer") or self.layer.problem is self.family.problem

    def _solve(self, parameters: dict[str, torch.Tensor], arguments: dict[str, object]) -> ddn.Solution:
        policy = self.layer.policy or ddn.Policy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                solution = self.layer.solve(**parameters, **arguments)
            except ddn.SolveError as error:
                assert policy.on_failure in ("raise", "closest")
                solution = error.solution
                self.raised = True
            else:
                self.raised = False
        kinds = [w.category for w in caught]
        assert kinds.count(ddn.ConvergenceWarning) == (
            policy.on_failure == "warn" and not solution.converged.all()
        )
        if policy.on_failure == "raise":
            assert self.raised != bool(solution.converged.all())
        return solution

    def _judge(self, batch: Batch, solution: ddn.Solution, kinds: list[str], start: str) -> None:
        converged = solution.converged
        assert [s is S.OPTIMAL for s in solution.status] == converged.tolist()
        wrong = converged & ~batch.good
        assert not wrong.any(), f"{[kinds[i] for i in wrong.nonzero()[:, 0]]} called optimal"
        size = batch.point.abs().amax(1).clamp(min=1.0)
        error = (solution["u"] - batch.point).abs().amax(1) / size
        assert (error[converged] < 1e-8).all(), f"off by {error[converged].max():.1e}"
        if self.layer.solver == "auto" and start in ("none", "near"):
            missed = batch.good & ~converged
            assert not missed.any(), [solution.stats.message[i] for i in missed.nonzero()[:, 0]]
            for status, kind in zip(solution.status, kinds, strict=True):
                allowed = {
                    "good": (S.OPTIMAL,),
                    "infeasible": (S.INFEASIBLE,),
                    "unbounded": (
                        S.UNBOUNDED,
                        S.ITERATION_LIMIT,
                    ),  # a ray of rounding curvature is not always seen
                }
                assert status in allowed[kind], (kind, status, solution.stats.message)

    def _differentiate(
        self, batch: Batch, solution: ddn.Solution, parameters: dict[str, torch.Tensor]
    ) -> None:
        policy, converged = self.layer.policy or ddn.Policy(), solution.converged
        used = converged if policy.on_failure in ("raise", "warn", "closest") else torch.ones_like(converged)
        total = (batch.v * solution["u"])[used].sum()
        if not used.any():
            return
        with warnings.catch_warnings():
            if (
                policy.on_failure == "closest"
            ):  # whose elastic problem may be of a condition above 1e12, and says so
                warnings.simplefilter("ignore", ddn.DegeneracyWarning)
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None or name not in batch.gradients:
                continue
            exact = batch.gradients[name]
            for i in range(len(converged)):
                if converged[i]:
                    scale = exact[i].abs().max().clamp(min=1.0)
                    error = (gradient[i] - exact[i]).abs().max() / scale
                    assert error < 1e-7, f"gradient of sample {i} by {name} is off by {error:.1e}"
                elif policy.on_failure == "nan":
                    assert gradient[i].isnan().all()
                elif policy.on_failure == "mask":
                    assert (gradient[i] == 0).all()


Calls.TestCase.settings = settings(
    max_examples=10 * TIMES if TIMES > 1 else 12,
    stateful_step_count=25 if TIMES > 1 else 8,
    derandomize=TIMES == 1,
    print_blob=TIMES > 1,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestCalls = Calls.TestCase
