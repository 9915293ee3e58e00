"""Every method of every built-in adapter on every problem of known answer, and what else the contract says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.adapter import (
    Adapter,
    BackendCannotSolve,
    Batch,
    BatchAdapter,
    Instance,
    Options,
    Point,
    Points,
    ProblemError,
    Status,
)
from ddn_solvers.problem import Problem
from ddn_solvers.testing import AdapterConformance, Case, case, check_adapter, make_batch, random_qp

CLASSES = {
    "scipy": ("ddn_adapters.scipy_", "SciPyAdapter"),
    "casadi": ("ddn_adapters.casadi_", "CasADiAdapter"),
    "cvxpy": ("ddn_adapters.cvxpy_", "CVXPYAdapter"),
    "clarabel": ("ddn_adapters.clarabel_", "ClarabelAdapter"),
    "daqp": ("ddn_adapters.daqp_", "DAQPAdapter"),
    "highs": ("ddn_adapters.highs_", "HiGHSAdapter"),
    "newton": ("ddn_adapters.newton_", "NewtonAdapter"),
}
ADAPTERS: dict[str, Adapter] = {
    backend: getattr(import_module(module), name)() for backend, (module, name) in CLASSES.items()
}
ITERATIVE = [
    ("scipy", "SLSQP"),
    ("scipy", "trust-constr"),
    ("scipy", "L-BFGS-B"),
    ("casadi", "ipopt"),
    ("casadi", "sqpmethod"),
]
CONIC = [
    ("casadi", "daqp"),
    ("casadi", "qpoases"),
    ("casadi", "osqp"),
    ("daqp", "active-set"),
    ("clarabel", "interior-point"),
]


def pairs(methods: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("backend", "method"), methods, ids=[":".join(pair) for pair in methods])


class TestSciPy(AdapterConformance):
    adapter = ADAPTERS["scipy"]


class TestCasADi(AdapterConformance):
    adapter = ADAPTERS["casadi"]


class TestCVXPY(AdapterConformance):
    adapter = ADAPTERS["cvxpy"]


class TestClarabel(AdapterConformance):
    adapter = ADAPTERS["clarabel"]


class TestDAQP(AdapterConformance):
    adapter = ADAPTERS["daqp"]


class TestHiGHS(AdapterConformance):
    adapter = ADAPTERS["highs"]


class TestNewton(AdapterConformance):
    adapter = ADAPTERS["newton"]


class Flipped(Adapter):
    """An adapter with one wrong sign."""

    def __init__(self, inner: Adapter, field: str) -> None:
        self.inner, self.field = inner, field
        self.capabilities = inner.capabilities  # type: ignore[misc]  # an instance of its own

    def solve(self, instance: Instance) -> Point:
        point = self.inner.solve(instance)
        return replace(point, **{self.field: -getattr(point, self.field)})


@pytest.mark.parametrize(
    ("field", "name"),
    [("equality", "simplex"), ("inequality", "qp_mixed"), ("lower", "simplex"), ("upper", "qp_mixed")],
)
def test_a_flipped_sign_cannot_pass(field: str, name: str) -> None:
    with pytest.raises(AssertionError, match=r"multiplier|Lagrangian"):
        check_adapter(Flipped(ADAPTERS["casadi"], field), "daqp", case(name))


def test_unknown_options_name_their_neighbours() -> None:
    with pytest.raises(ProblemError, match=r"'max_itr'.*maxiter"):
        ADAPTERS["scipy"].solve_batch(make_batch(case("scalar"), "SLSQP", Options(native={"max_itr": 3})))
    batch = make_batch(case("scalar"), "ipopt", Options(native={"ipopt.max_iterations": 3}))
    with pytest.raises(ProblemError, match="max_iterations"):
        ADAPTERS["casadi"].solve_batch(batch)


@pytest.mark.parametrize("name", ["max_cpu_time", "ipopt.max_cpu_time"])
def test_ipopt_options_go_with_and_without_prefix(name: str) -> None:
    check_adapter(ADAPTERS["casadi"], "ipopt", case("entropy"), options=Options(native={name: 10.0}))


@pairs([*ITERATIVE, ("casadi", "osqp")])
def test_iteration_limit(backend: str, method: str) -> None:
    name = {"L-BFGS-B": "least_squares", "osqp": "simplex"}.get(method, "exponential")
    point = ADAPTERS[backend].solve(make_batch(case(name), method, Options(max_iter=2))[0])
    assert point.status is Status.ITERATION_LIMIT, point.message
    assert np.isfinite(point.primal).all()


@pairs(ITERATIVE)
def test_time_limit(backend: str, method: str) -> None:
    name = "least_squares" if method == "L-BFGS-B" else "exponential"
    (point,) = ADAPTERS[backend].solve_batch(make_batch(case(name), method, Options(time_limit=1e-6)))
    assert point.status is Status.TIME_LIMIT, point.message


@pairs([("casadi", "ipopt"), ("casadi", "sqpmethod"), ("scipy", "SLSQP")])
def test_warm_start_saves_iterations(backend: str, method: str) -> None:
    cold = make_batch(case("exponential"), method)[0]
    first = ADAPTERS[backend].solve(cold)
    again = ADAPTERS[backend].solve(replace(cold, initial=first.primal, warm_start=first))
    assert again.status is Status.OPTIMAL
    assert again.iterations is not None
    assert first.iterations is not None
    assert again.iterations < first.iterations
    np.testing.assert_allclose(again.primal, first.primal, atol=1e-6)


@pairs([("scipy", "highs"), ("scipy", "L-BFGS-B"), *CONIC])
def test_routing_refuses_what_a_method_lacks(backend: str, method: str) -> None:
    exponential = case("exponential")
    with pytest.raises(BackendCannotSolve, match=r"does not take.*casadi:ipopt"):
        ddn.solve(exponential.problem, exponential.parameters, solver=f"{backend}:{method}")


@pairs(CONIC)
def test_a_bad_sample_leaves_its_batch_alone(backend: str, method: str) -> None:
    """Sample 1 is not convex, sample 3 is infeasible; no sample sees another."""
    family = random_qp(6, 2, 4, seed=5, batch=(5,))
    parameters = {name: value.clone() for name, value in family.parameters.items()}
    parameters["P"][1] -= 10 * torch.eye(6, dtype=torch.float64)
    parameters["G"][3, 1], parameters["h"][3, :2] = -parameters["G"][3, 0], torch.tensor([0.0, -1.0])
    points = ADAPTERS[backend].solve_batch(make_batch(replace(family, parameters=parameters), method))
    assert family.primal is not None
    for i in (0, 2, 4):
        assert points[i].status is Status.OPTIMAL
        np.testing.assert_allclose(points[i].primal, family.primal["u"][i], atol=1e-6)
    assert points[1].status is not Status.OPTIMAL
    assert points[3].status is Status.INFEASIBLE


def test_singular_hessians_are_convex_too() -> None:
    """daqp factorises the Hessian: an LP and a semidefinite one go through its proximal iterations."""

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (u[0] + u[1] - x[0]).square() + x[1] * u[2]

    problem = Problem({"u": (3,)}, {"x": (2,)}, objective, bounds={"u": (0.0, 4.0)})
    semidefinite = Case("semidefinite", problem, {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)})
    point = ADAPTERS["casadi"].solve(make_batch(semidefinite, "daqp")[0])
    assert point.status is Status.OPTIMAL
    np.testing.assert_allclose([point.primal[0] + point.primal[1], point.primal[2]], [1, 0], atol=1e-6)


def test_fifty_variables() -> None:
    family = random_qp(50, 25, 50, seed=3, batch=(4,))
    for backend, method in [("casadi", "daqp"), ("casadi", "ipopt"), ("scipy", "SLSQP")]:
        check_adapter(ADAPTERS[backend], method, family)


def failing(method: str, happens: Callable[[], object]) -> Batch:
    """A problem of torch callbacks in which something happens once a solver runs."""
    count = -1

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        if count >= 0:
            count += 1
            if count > 3:
                happens()
        return (u - x).exp().sum() - u.sum() if u[0] < 1e6 else u.sum()

    broken = Case("broken", Problem({"u": (2,)}, {"x": (2,)}, objective), {"x": torch.tensor([1.0, 2.0])})
    batch = make_batch(broken, method)
    count = 0
    return batch


def throw(error: BaseException) -> None:
    raise error


def test_ctrl_c_is_what_the_signal_says_not_what_ipopt_does() -> None:
    """IPOPT reports any exception that is not its own as it reports Ctrl-C."""
    (point,) = ADAPTERS["casadi"].solve_batch(failing("ipopt", lambda: throw(KeyboardInterrupt())))
    assert point.status is Status.BACKEND_ERROR
    assert "NonIpopt" in point.message


def test_daqp_keeps_the_time_limit_of_the_call_between_samples() -> None:
    batch = make_batch(random_qp(6, 2, 4, seed=1, batch=(3,)), "active-set", Options(deadline=0.0))
    points = ADAPTERS["daqp"].solve_batch(batch)
    assert [point.status for point in points] == [Status.TIME_LIMIT] * 3


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_daqp_solves_linear_programs_in_any_unit(unit: float) -> None:
    """Its proximal steps have a length of their own: costs of 1e6 went past the corner, or never reached it."""
    problem, g = ddn.linear_program(6, 2, 6), torch.Generator().manual_seed(3)
    A, u, c = (torch.rand(*size, generator=g, dtype=torch.float64) for size in ((2, 6), (6,), (6,)))
    rows = {
        "A": A,
        "b": A @ u,
        "G": -torch.eye(6, dtype=torch.float64),
        "h": torch.zeros(6, dtype=torch.float64),
    }
    expected = ddn.solve(problem, {"c": c, **rows}, solver="highs")
    found = ddn.solve(problem, {"c": unit * c, **rows}, solver="daqp")
    assert found.stats.backend == ("daqp",)
    assert found["u"] == pytest.approx(expected["u"], abs=1e-9)
    (mine,), (theirs,) = found.dual.inequality.values(), expected.dual.inequality.values()
    assert mine == pytest.approx(unit * theirs, abs=1e-9 * unit)


def points_of(batch: Batch) -> Points:
    found = ADAPTERS["daqp"].solve_batch(batch)
    assert isinstance(found, Points)
    return found


def test_daqp_that_gives_up_has_no_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more active constraints than variables it returns what was in memory."""
    daqp = pytest.importorskip("daqp")

    def gives_up(P: Any, q: Any, J: Any, upper: Any, *_: Any, **settings: Any) -> Any:
        return np.full(len(q), 7e22), 0.0, -6, {"lam": np.full(len(upper), 3e11), "iterations": 4}

    monkeypatch.setattr(daqp, "solve", gives_up)
    batch = make_batch(random_qp(6, 2, 4, seed=1, batch=(2,)), "active-set")
    points = points_of(batch)
    assert points.status == [Status.INFEASIBLE] * 2
    assert np.array_equal(points.primal, batch.initial)
    assert points.multipliers(bounded=batch.program.bounded)[1].all()


def test_points_are_those_of_a_list() -> None:
    batch = make_batch(random_qp(6, 2, 4, seed=1, batch=(3,)), "active-set")
    stacked = points_of(batch)
    listed = Points.of(batch.program, list(stacked), batch.initial)
    for name, value in vars(stacked).items():
        there = getattr(listed, name)
        assert (
            np.array_equal(value, there, equal_nan=True) if isinstance(value, np.ndarray) else value == there
        )
    turned = Points.joined([stacked.take([2]), stacked[:2]])
    assert np.array_equal(turned.primal, stacked.primal[[2, 0, 1]])
    turned.put(0, Point(np.ones(6), Status.INFEASIBLE, message="none"))
    assert turned[0].equality is None
    assert turned[0].status is Status.INFEASIBLE


@pytest.mark.parametrize("name", ["primal", "equality", "inequality", "lower", "upper", "status", "message"])
def test_points_of_another_shape_are_a_failure_that_says_which(name: str) -> None:
    class Misshapen(BatchAdapter):
        capabilities = ADAPTERS["daqp"].capabilities

        def solve_all(self, batch: Batch) -> Points:
            found = points_of(batch)
            return replace(found, **{name: getattr(found, name)[1:]})

    batch = make_batch(random_qp(6, 2, 4, seed=1, batch=(3,)), "active-set")
    # A sample too few is no list of so many points at all.
    points = Misshapen().attempt_batch(batch)
    assert [point.status for point in points] == [Status.BACKEND_ERROR] * 3
    assert all(name in point.message or "3 points" in point.message for point in points)


def test_points_are_copied_as_numbers() -> None:
    batch = make_batch(random_qp(6, 2, 4, seed=1, batch=(2,)), "active-set")
    given = Points.at(batch.program, batch.initial, Status.OPTIMAL)
    whole = replace(given, primal=np.arange(12).reshape(2, 6), status=tuple(given.status))
    whole.primal.setflags(write=False)
    found = Points.of(batch.program, whole, batch.initial)
    assert found.primal.dtype == np.float64
    found.primal[0], found.status[0] = 0.0, Status.NUMERICAL_ERROR
    assert whole.primal[0, 1] == 1
    refused = Points.of(batch.program, replace(given, primal=given.primal + 1j), batch.initial)
    assert refused.status == [Status.BACKEND_ERROR] * 2
    assert "primal" in refused.message[0]


@pytest.mark.parametrize(("objective", "row"), [(1e10, 1.0), (1.0, 1e-6), (1.0, 1e6), (1e-6, 1.0)])
def test_daqp_by_least_distance_keeps_rows_in_any_unit(
    objective: float, row: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DAQP drops rows that are short beside one: they are given at length one."""
    monkeypatch.setattr("ddn_adapters.daqp_._LARGE", 1)
    g, n = torch.Generator().manual_seed(0), 8
    L, A, G = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((n, n), (3, n), (10, n)))
    u, q = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    p = {"P": objective * (L @ L.T + torch.eye(n, dtype=torch.float64)), "q": objective * 10 * q}
    p |= {"A": row * A, "b": row * A @ u, "G": row * G, "h": row * (G @ u + 0.1)}
    found = ddn.solve(ddn.quadratic_program(n, 3, 10), p, solver="daqp")
    expected = ddn.solve(ddn.quadratic_program(n, 3, 10), p, solver="casadi:ipopt")
    assert found["u"] == pytest.approx(expected["u"], abs=1e-8)


def test_clarabel_is_given_no_zeros_of_a_dense_parameter() -> None:
    """It looks at the pattern: with them 400 variables of a diagonal P took as long as a full one."""
    n = 30
    problem = ddn.quadratic_program(n, 0, 2)
    p = {"P": torch.eye(n, dtype=torch.float64), "q": -torch.ones(n, dtype=torch.float64)}
    p |= {"G": torch.eye(n, dtype=torch.float64)[:2], "h": torch.tensor([0.25, 2.0], dtype=torch.float64)}
    seen: list[int] = []
    clarabel = pytest.importorskip("clarabel")
    inner = clarabel.DefaultSolver

    def watched(P: Any, q: Any, A: Any, *rest: Any) -> Any:
        seen.extend((P.nnz, A.nnz))
        return inner(P, q, A, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clarabel, "DefaultSolver", watched)
        found = ddn.solve(problem, p, solver="clarabel")
    assert seen == [n, 2]
    assert found["u"] == pytest.approx(torch.tensor([0.25] + [1.0] * (n - 1), dtype=torch.float64), abs=1e-9)


def test_highs_below_cvxpy_does_not_go_round_in_circles_for_ever() -> None:
    """Its active-set method for QPs has no limit of its own: it must come with one, and keep the caller's."""
    adapter = ADAPTERS["cvxpy"]
    batch = make_batch(random_qp(6, 2, 4, seed=1), "HIGHS")
    assert adapter.native(batch)["qp_iteration_limit"] <= 100_000
    limited = make_batch(random_qp(6, 2, 4, seed=1), "HIGHS", Options(max_iter=7))
    assert adapter.native(limited)["qp_iteration_limit"] == 7


def test_numbers_that_are_not_finite_are_no_point_of_casadi() -> None:
    """DAQP at its iteration limit leaves what was in memory: now and then NaN."""
    instance = make_batch(case("scalar"), "daqp")[0]
    found = [np.full(size, np.nan) for size in (1, instance.program.constraints, 1)]
    adapter = ADAPTERS["casadi"]
    point = adapter._point(instance, found, {"return_status": "", "success": True})
    assert point.status is Status.NUMERICAL_ERROR
    assert np.array_equal(point.primal, instance.initial)
    assert point.equality is None


def test_a_failed_qp_of_sqpmethod_is_told_and_its_point_kept() -> None:
    """Hock and Schittkowski 46: curvature vanishes at the solution, and CasADi has no status where DAQP fails."""
    hs46 = Problem(
        {"u": (5,)},
        {"x": ()},
        lambda u, x: (u[0] - u[1]) ** 2 + (u[2] - x) ** 2 + (u[3] - 1) ** 4 + (u[4] - 1) ** 6,
        equality=lambda u: torch.stack(
            [u[0] ** 2 * u[3] + torch.sin(u[3] - u[4]) - 1, u[1] + u[2] ** 4 * u[3] ** 2 - 2]
        ),
    )
    start = torch.tensor([0.5**0.5, 1.75, 0.5, 2.0, 2.0], dtype=torch.float64)
    x = torch.ones((), dtype=torch.float64)
    policy = ddn.Policy(on_failure="mask")
    s = ddn.solve(hs46, {"x": x}, "casadi:sqpmethod", initial=start, policy=policy)
    assert s.status[0] is Status.NUMERICAL_ERROR
    assert "the QP of a step was not solved" in s.stats.message[0]
    np.testing.assert_allclose(s["u"], 1, atol=0.1)


@pytest.mark.parametrize("solver", ["ma57", "ma27"])
def test_a_linear_solver_that_is_not_installed_is_an_error(solver: str) -> None:
    batch = make_batch(case("exponential"), "ipopt", Options(native={"ipopt.linear_solver": solver}))
    with pytest.raises(ProblemError, match=r"'ipopt\.linear_solver'.*not installed"):
        ADAPTERS["casadi"].solve_batch(batch)


def test_ipopt_counts_no_iterations_where_it_does_not_begin() -> None:
    """Three equations of one variable: its count was what had been in memory, 337 once."""
    over = Problem(
        {"u": ()}, {}, lambda u: u.exp(), equality=lambda u: torch.stack([u.square() - 1, u - 1, u.exp()])
    )
    for _ in range(2):
        instance = make_batch(Case("over", over, {}), "ipopt")[0]
        assert ADAPTERS["casadi"].solve(instance).iterations == 0


@pytest.mark.parametrize(
    "solver", ["highs", "clarabel", "casadi:daqp", "casadi:ipopt", "cvxpy:CLARABEL", "cvxpy:HIGHS"]
)
def test_a_backend_prints_nothing(solver: str, tmp_path: Path) -> None:
    """HiGHS had, when its first object was made: compiled code, to the process's own output."""
    program = tmp_path / "solves.py"
    program.write_text(
        "import torch, ddn_solvers as ddn\n"
        "problem = ddn.linear_program(2, bounds=(0, 1))\n"
        f"ddn.solve(problem, {{'c': torch.tensor([1.0, -1.0])}}, solver={solver!r})\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def box_qp(seed: int, twice: bool) -> tuple[Problem, dict[str, torch.Tensor]]:
    """Convex, with two equalities, which may say the same, inequalities, and bounds on one side or both; one fixed."""
    g, n = torch.Generator().manual_seed(seed), 12

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    L, A, G, u = random(n, n), 1e3 * random(2, n), random(8, n), random(n)
    A = torch.stack([A[0], 2 * A[0]]) if twice else A
    upper = torch.cat([torch.full((n // 2,), torch.inf, dtype=torch.float64), u[n // 2 :] + 0.5])
    lower = torch.cat([u[:1], u[1:] - 1.0])
    upper[0] = lower[0]
    problem = Problem(
        {"u": (n,)},
        {"q": (n,)},
        lambda u, q: 0.5 * (L @ u).square().sum() + 0.05 * u.square().sum() + q @ u,
        equality={"e": lambda u: A @ u - A @ start},
        inequality={"i": lambda u: G @ u - G @ start - 0.5},
        bounds={"u": (lower, upper)},
    )
    start = u
    return problem, {"q": 10 * random(3, n)}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("twice", [False, True], ids=["regular", "dependent"])
@pytest.mark.parametrize("seed", range(4))
def test_daqp_by_least_distance_finds_the_same(
    seed: int, twice: bool, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of 250 variables; dependent equalities are left to DAQP."""
    module = import_module("ddn_adapters.daqp_")
    problem, p = box_qp(seed, twice)
    direct = ddn.solve(problem, p, solver="daqp")
    found: list[bool] = []
    inner = module._QP.solved_by_distance

    def watched(self: Any, settings: Any) -> Any:
        result = inner(self, settings)
        found.append(result is not None)
        return result

    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module._QP, "solved_by_distance", watched)
    reduced = ddn.solve(problem, p, solver="daqp", warm_start=direct if warm else None)
    assert found == [not twice] * 3
    assert reduced["u"] == pytest.approx(direct["u"], abs=1e-10)
    if not twice:  # of dependent rows the multipliers are chosen
        for side in ("equality", "inequality", "lower", "upper"):
            for mine, theirs in zip(
                getattr(reduced.dual, side).values(), getattr(direct.dual, side).values(), strict=True
            ):
                assert mine == pytest.approx(theirs, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("parallel", [False, True])
def test_daqp_by_least_distance_tells_infeasible_problems(
    parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing but rounding is left of a row beside the equality."""
    monkeypatch.setattr("ddn_adapters.daqp_._LARGE", 1)
    problem, g = ddn.quadratic_program(5, 1, 2), torch.Generator().manual_seed(2)
    A, G = (torch.rand(rows, 5, generator=g, dtype=torch.float64) for rows in (1, 1))
    G = torch.cat([A, -A]) if parallel else torch.cat([G, -G])
    p = {"P": torch.eye(5, dtype=torch.float64), "q": torch.zeros(5, dtype=torch.float64), "A": A, "G": G}
    p |= {"b": torch.ones(1, dtype=torch.float64)}
    p |= {"h": torch.tensor([[0.5, -0.9], [1.5, 9.0]], dtype=torch.float64)}
    found = ddn.solve(problem, p, solver="daqp", policy=ddn.Policy(on_failure="mask"))
    assert found.status == (Status.INFEASIBLE, Status.OPTIMAL)
