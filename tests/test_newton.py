"""What "auto" tries before a solver: the batched interior point method, and Newton steps on the active set of a QP."""

import threading

import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.threads import limited

D = torch.float64
SPHERE = ddn.Problem(
    variables={"u": (20,)},
    parameters={"x": (20,), "y": (20,)},
    objective=lambda u, x, y: (0.3 * u - x).exp().sum() + torch.linalg.vector_norm(u - y),
    equality={"sphere": lambda u: u.square().sum() - 1},
)


def inputs(batch: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {name: torch.randn(batch, 20, generator=g, dtype=D) for name in "xy"}


def start(batch: int) -> dict[str, torch.Tensor]:
    return {"u": torch.full((batch, 20), 20**-0.5, dtype=D)}


def test_auto_begins_with_it_and_gradients_are_those_of_ipopt() -> None:
    found = {}
    for solver in ("auto", "casadi:ipopt"):
        leaves = {name: value.requires_grad_() for name, value in inputs(9).items()}
        solution = ddn.solve(SPHERE, leaves, solver=solver, initial=start(9))
        found[solver] = (
            solution["u"],
            *torch.autograd.grad(
                solution["u"].square().sum(1) @ torch.arange(9.0, dtype=D) + solution["u"][:, 0].sum(),
                list(leaves.values()),
            ),
        )
        backend = "newton" if solver == "auto" else "casadi"
        assert solution.stats.backend == (backend,) * 9
    for ours, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-9)


def test_each_sample_gets_the_same_point_in_any_batch() -> None:
    values, batch = inputs(33), 33
    together = ddn.solve(SPHERE, values, solver="newton", initial=start(batch))
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    mixed = ddn.solve(SPHERE, {k: v[order] for k, v in values.items()}, solver="newton", initial=start(batch))
    torch.testing.assert_close(mixed["u"], together["u"][order], rtol=1e-12, atol=1e-13)
    for i in (0, 7, 32):
        alone = ddn.solve(
            SPHERE, {k: v[i : i + 1] for k, v in values.items()}, solver="newton", initial=start(1)
        )
        torch.testing.assert_close(alone["u"][0], together["u"][i], rtol=1e-12, atol=1e-13)
        assert alone.stats.iterations[0] == together.stats.iterations[i]


def test_steps_along_a_curved_constraint_are_not_cut() -> None:
    """Powell's example, at which Newton steps raise f + sigma |c|_1 (Nocedal and Wright 2006, example 15.4)."""
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"t": ()},
        objective=lambda u, t: 2 * (u.square().sum() - 1) - t * u[0],
        equality=lambda u: u.square().sum() - 1,
    )
    angle = torch.tensor([0.3, 1.0, -0.7], dtype=D)
    begin = {"u": torch.stack([angle.cos(), angle.sin()], 1)}
    solution = ddn.solve(problem, {"t": torch.ones(3, dtype=D)}, solver="newton", initial=begin)
    torch.testing.assert_close(solution["u"], torch.tensor([[1.0, 0.0]], dtype=D).expand(3, 2))
    assert max(n or 0 for n in solution.stats.iterations) <= 10


def test_negative_curvature_is_left_for_a_minimum() -> None:
    """From between two wells, where the Hessian is negative, to one of them and not to the top."""
    problem = ddn.Problem({"u": (1,)}, {"x": ()}, lambda u, x: ((u**2 - 1) ** 2).sum() + x * u.sum())
    solution = ddn.solve(
        problem,
        {"x": torch.tensor([-0.1, 0.1], dtype=D)},
        solver="newton",
        initial={"u": torch.tensor([[0.05], [-0.05]], dtype=D)},
    )
    assert solution.stats.backend == ("newton",) * 2
    assert (solution["u"][:, 0].abs() > 0.9).all()
    assert solution.converged.all()


def test_what_it_cannot_solve_is_left_to_others_and_it_has_no_verdict() -> None:
    """Along Rosenbrock's valley in forty dimensions it does not get to the end: IPOPT takes those samples alone."""

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (100 * (u[1:] - u[:-1] ** 2) ** 2 + (x - u[:-1]) ** 2).sum()

    problem = ddn.Problem({"u": (40,)}, {"x": ()}, objective)
    solution = ddn.solve(problem, {"x": torch.tensor([0.0, 1.0, 0.0], dtype=D)})
    assert solution.stats.backend == ("newton", "casadi", "newton")
    torch.testing.assert_close(solution["u"][1], torch.ones(40, dtype=D))
    assert solution.converged.all()
    assert solution.stats.message[1] == ""


def test_an_unbounded_and_an_infeasible_problem_are_named_by_others() -> None:
    unbounded = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: (u[0] - x[0]).exp() + x[1] * u[1])
    with pytest.raises(ddn.SolveError, match=r"unbounded|diverg"):
        ddn.solve(unbounded, {"x": torch.ones(2, dtype=D)})
    infeasible = ddn.Problem(
        {"u": (2,)}, {"x": (2,)}, lambda u, x: (u - x).exp().sum(), {"never": lambda u: u.square().sum() + 1}
    )
    with pytest.raises(ddn.SolveError, match="infeasible"):
        ddn.solve(infeasible, {"x": torch.ones(2, dtype=D)})


def test_it_comes_first_on_small_problems_that_are_no_quadratic_programs() -> None:
    def first(n: int = 2, **more: object) -> str:
        base = {"objective": lambda u, x: (u - x[0]).exp().sum() - u.sum()}
        problem = ddn.Problem({"u": (n,)}, {"x": (2,)}, **{**base, **more})
        return ddn.solve(problem, {"x": torch.ones(2, dtype=D)}).stats.backend[0]

    assert first() == "newton"
    assert first(inequality=lambda u: u.sum() - 100) == "newton"
    assert first(bounds={"u": (-100.0, 100.0)}) == "newton"
    assert first(objective=lambda u, x: (u - x).exp().sum() + (u - 5).abs().sum()) == "newton"
    assert first(n=100) == "newton"
    assert first(n=100, bounds={"u": (-100.0, 100.0)}) == "casadi"
    assert first(objective=lambda u, x: (u - x).square().sum(), bounds={"u": (-1.0, 1.0)}) != "newton"


MIXED = ddn.Problem(
    variables={"u": (20,)},
    parameters={"x": (20,), "low": (20,), "r": ()},
    objective=lambda u, x: (u - x).square().sum() + (u[1:] * u[:-1]).square().sum(),
    equality={"sum": lambda u: u.sum() - 1},
    inequality={"ball": lambda u, r: u.square().sum() - r, "each": lambda u, x: (u * x)[:5] - 0.2},
    bounds={"u": (lambda low: torch.where(low < -10, -torch.inf, low), 1.0)},
)


def mixed_inputs(batch: int) -> dict[str, torch.Tensor]:
    """Bounds of some samples are infinite, or coincide."""
    g = torch.Generator().manual_seed(8)
    x = torch.randn(batch, 20, generator=g, dtype=D)
    low = torch.full((batch, 20), -0.5, dtype=D)
    low[::3, 4:] = -20.0
    low[1::3, 7] = 1.0
    return {"x": x, "low": low, "r": 2 + torch.rand(batch, generator=g, dtype=D)}


def test_inequalities_and_bounds_have_the_points_multipliers_and_gradients_of_ipopt() -> None:
    found = {}
    for solver in ("newton", "casadi:ipopt"):
        values = mixed_inputs(9)
        leaves = [values[name].requires_grad_() for name in ("x", "r")]
        solution = ddn.solve(MIXED, values, solver=solver)
        assert solution.stats.backend == (solver.partition(":")[0],) * 9
        assert (solution.dual.inequality["ball"] > 1e-3).any()
        assert ((solution.dual.lower["u"] > 1e-3).sum() > 9) & (solution.dual.lower["u"] == 0).any()
        v = torch.linspace(-1, 1, 20, dtype=D)
        gradients = torch.autograd.grad((solution["u"] @ v).sum(), leaves, retain_graph=True)
        of_duals = torch.autograd.grad(solution.dual.inequality["ball"].sum(), leaves)
        found[solver] = (solution["u"], *solution.dual.inequality.values(), *gradients, *of_duals)
    for ours, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-9)


def test_each_sample_with_inequalities_gets_the_same_point_in_any_batch() -> None:
    values = mixed_inputs(33)
    together = ddn.solve(MIXED, values, solver="newton")
    for i in (0, 1, 17, 32):
        alone = ddn.solve(MIXED, {k: v[i : i + 1] for k, v in values.items()}, solver="newton")
        torch.testing.assert_close(alone["u"][0], together["u"][i], rtol=1e-12, atol=1e-13)
        assert alone.stats.iterations[0] == together.stats.iterations[i]


def test_a_large_batch_is_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = mixed_inputs(12)
    together = ddn.solve(MIXED, values, solver="newton")
    monkeypatch.setattr("ddn_adapters.newton_._AT_ONCE", 5 * 40**2)
    in_parts = ddn.solve(MIXED, values, solver="newton")
    torch.testing.assert_close(in_parts["u"], together["u"], rtol=1e-12, atol=1e-13)
    assert in_parts.stats.iterations == together.stats.iterations


def test_its_steps_do_not_depend_on_the_unit_of_the_objective() -> None:
    problem = ddn.Problem(
        {"u": (5,)},
        {"x": (5,), "unit": ()},
        lambda u, x, unit: unit * ((u - x).square().sum() + u.exp().sum()),
        inequality=lambda u: u.square().sum() - 1,
        bounds={"u": (-0.4, None)},
    )
    x = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=D).expand(3, 5)
    unit = torch.tensor([1e-6, 1.0, 1e6], dtype=D)
    solution = ddn.solve(problem, {"x": x, "unit": unit}, solver="newton")
    assert len(set(solution.stats.iterations)) == 1
    torch.testing.assert_close(solution["u"], solution["u"][:1].expand(3, 5), rtol=0, atol=1e-12)


def test_infeasible_inequalities_are_told_by_others() -> None:
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,)},
        lambda u, x: (u - x).exp().sum(),
        inequality={"near": lambda u: u.square().sum() - 1, "far": lambda u: 4 - u.sum()},
    )
    with pytest.raises(ddn.SolveError, match="infeasible"):
        ddn.solve(problem, {"x": torch.ones(3, dtype=D)})


def test_dependent_rows_do_not_stop_it() -> None:
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,)},
        lambda u, x: (u - x).exp().sum() - u.sum(),
        lambda u: torch.stack([u.sum(), 2 * u.sum()]),
    )
    x = torch.tensor([0.3, -0.1, 0.5], dtype=D)
    solution = ddn.solve(problem, {"x": x.requires_grad_()}, solver="newton")
    torch.testing.assert_close(solution["u"], x - x.mean())
    with pytest.warns(ddn.DegeneracyWarning):
        (gradient,) = torch.autograd.grad(solution["u"][0], x)
    torch.testing.assert_close(gradient, torch.tensor([2.0, -1.0, -1.0], dtype=D) / 3)


def test_a_sample_that_searches_longer_has_no_other_point_for_it() -> None:
    """Near zero the first of these takes no part of its step; the second makes the search go on."""

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        far = u + 0.5e-12 * u**2 + 1e-30 * (1 - u**2).sqrt()
        near = 0.5 * u**2 - 1e-10 * torch.tanh(u / 1e-10)
        return (x * far + (1 - x) * near).sum()

    problem = ddn.Problem({"u": (1,)}, {"x": ()}, objective)
    found = [
        ddn.solve(problem, {"x": torch.tensor(x, dtype=D)}, solver="newton", policy=ddn.Policy("mask"))
        for x in ([1.0], [1.0, 0.0])
    ]
    torch.testing.assert_close(found[0]["u"][0], found[1]["u"][0], equal_nan=True)
    assert found[0].stats.iterations[0] == found[1].stats.iterations[0]


def test_a_start_in_the_middle_of_a_sphere_is_left() -> None:
    solution = ddn.solve(SPHERE, inputs(5), solver="newton")
    assert solution.converged.all()


def test_a_start_in_the_middle_of_a_sphere_is_left_for_a_point_inside_of_the_bounds() -> None:
    """Multipliers of the bounds had become NaN on the way."""
    problem = ddn.Problem(
        {"u": (4,)},
        {"x": (4,)},
        lambda u, x: (u - x).square().sum() + 0.01 * u.pow(4).sum(),
        {"sphere": lambda u: u.square().sum() - 1},
        bounds={"u": (-0.9, 2.0)},
    )
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    ours, other = (ddn.solve(problem, {"x": x}, solver=solver) for solver in ("newton", "casadi:ipopt"))
    assert ours.converged.all()
    torch.testing.assert_close(ours.objective, other.objective)


def test_native_options_are_for_the_others() -> None:
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: (u - x).exp().sum() - u.sum())
    x = {"x": torch.ones(2, dtype=D)}
    solution = ddn.solve(problem, x, options={"ipopt.mu_strategy": "adaptive"})
    assert solution.stats.backend == ("casadi",)
    with pytest.raises(ddn.ProblemError, match=r"'penalty' is not one that newton:interior-point accepts"):
        ddn.solve(problem, x, solver="newton", options={"penalty": 1.0})


def test_a_time_limit_leaves_the_steps_taken_by_then() -> None:
    solution = ddn.solve(
        SPHERE, inputs(3), solver="newton", options={"time_limit": 1e-9}, policy=ddn.Policy("mask")
    )
    assert {status.name for status in solution.status} == {"TIME_LIMIT"}
    assert solution.stats.iterations == (0, 0, 0)


def test_minima_are_those_of_the_valley_in_which_it_starts() -> None:
    """Of ten sines: steps with too little added to negative curvature ended in other, worse ones."""
    problem = ddn.Problem(
        {"u": (10,)}, {"x": (10,)}, lambda u, x: (3 * u + x).sin().sum() + 0.05 * u.square().sum()
    )
    x = {"x": 2 * torch.randn(40, 10, generator=torch.Generator().manual_seed(0), dtype=D)}
    ours, other = (ddn.solve(problem, x, solver=solver) for solver in ("newton", "casadi:ipopt"))
    assert ours.converged.all()
    assert (ours.objective - other.objective).mean() < 0.1


# -- quadratic programs --------------------------------------------------------------------------------


def regulator(limit: float, steps: int = 30) -> ddn.Problem:
    """Two states, one force, a horizon: a band."""

    def dynamics(s: torch.Tensor, u: torch.Tensor, A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        before = torch.cat([x[None], s[:-1]])
        return s - before @ A.T - 0.1 * torch.stack([0 * u, u], dim=-1)

    return ddn.Problem(
        {"s": (steps * 4, 2), "u": (steps * 4,)},
        {"A": (2, 2), "x": (2,)},
        lambda s, u: s.square().sum() + 0.1 * u.square().sum(),
        equality={"dynamics": dynamics},
        bounds={"u": (-limit, limit)},
    )


def regulated() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    A = torch.tensor([[1.0, 0.1], [0.05, 0.98]], dtype=D).expand(6, 2, 2).clone()
    return {"A": A.requires_grad_(), "x": torch.randn(6, 2, generator=g, dtype=D).requires_grad_()}


@pytest.mark.parametrize(("limit", "by_steps"), [(100.0, 6), (2.0, 3)])
def test_a_horizon_is_solved_by_newton_steps_where_its_active_set_settles(
    limit: float, by_steps: int
) -> None:
    """With DAQP's points and gradients; what does not settle goes to it."""
    found = {}
    for solver in ("auto", "casadi:daqp"):
        p = regulated()
        solution = ddn.solve(regulator(limit), p, solver=solver)
        cotangent = torch.linspace(-1, 1, solution["u"].numel(), dtype=D).reshape(solution["u"].shape)
        found[solver] = (
            solution["u"],
            *torch.autograd.grad((cotangent * solution["u"]).sum(), list(p.values())),
        )
        if solver == "auto":
            assert solution.stats.backend.count("ddn_solvers") >= by_steps
            assert solution.stats.method.count("newton") >= by_steps
    for ours, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-9)


def test_an_active_set_that_does_not_settle_is_left_to_a_solver() -> None:
    solution = ddn.solve(regulator(0.05), regulated())
    assert "ddn_solvers" not in solution.stats.backend
    assert solution.converged.all()


def test_a_batch_of_horizons_without_any_solution_has_no_gradient() -> None:
    problem = regulator(1.0)
    p = regulated()
    p["x"] = p["x"].detach().requires_grad_()
    impossible = ddn.Problem(
        problem.variables,
        problem.parameters,
        problem.objective,
        equality={**problem.equality, "end": lambda s: s[-1] - 1e3},
        bounds=problem.bounds,
    )
    solution = ddn.solve(impossible, p, policy=ddn.Policy(on_failure="mask"))
    assert {status.name for status in solution.status} == {"INFEASIBLE"}
    assert not any(g.any() for g in torch.autograd.grad(solution["u"].sum(), list(p.values())))


def test_a_qp_without_sides_needs_no_backend() -> None:
    problem = ddn.Problem(
        {"u": (20,)}, {"x": (20,)}, lambda u, x: (u - x).square().sum(), {"sum": lambda u: u.sum() - 1}
    )
    x = inputs(3)["x"].requires_grad_()
    solution = ddn.solve(problem, {"x": x}, initial={"u": torch.ones(20, dtype=D)})
    assert solution.stats.backend == ("ddn_solvers",) * 3
    exact = x - (x.sum(1, keepdim=True) - 1) / 20
    torch.testing.assert_close(solution["u"], exact, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(solution["u"][:, 0].sum(), x)
    torch.testing.assert_close(gradient[0], torch.eye(20, dtype=D)[0] - 1 / 20, rtol=0, atol=1e-14)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "saddle"])
def test_a_qp_without_one_minimum_is_left_to_backends(flat: bool) -> None:
    """They, or the verification, say what it is: one of many, or none."""
    weight = torch.tensor([1.0, 0.0 if flat else -1.0], dtype=D)
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: (weight * (u - x) ** 2).sum())
    policy = ddn.Policy(on_failure="mask", on_singular="proximal")
    solution = ddn.solve(problem, {"x": torch.ones(2, dtype=D)}, policy=policy)
    assert solution.stats.backend != ("ddn_solvers",)
    assert solution.converged.item() is flat


def test_a_guess_that_is_off_by_next_to_nothing_is_still_moved() -> None:
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: (u - x).square().sum())
    x = torch.tensor([1e-300, -1e-20], dtype=D)
    torch.testing.assert_close(ddn.solve(problem, {"x": x})["u"], x, rtol=1e-15, atol=0)


# -- threads -------------------------------------------------------------------------------------------


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def watched(seen: list[int], n: int = 2) -> ddn.Problem:
    """A problem that torch has to evaluate, and that notes with how many threads."""

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return (u - x).square().sum() if u.sum() < torch.inf else u.sum()

    return ddn.Problem({"u": (n,)}, {"x": (n,)}, objective)


@pytest.mark.filterwarnings("ignore::ddn_solvers.FallbackWarning")
@pytest.mark.parametrize(("threads", "expected"), [(None, 1), ("auto", 1), ("all", 3), (2, 2)])
def test_a_small_call_and_its_gradient_take_one_thread_and_put_back_what_was(
    three_threads: None, threads: int | str | None, expected: int
) -> None:
    seen: list[int] = []
    x = torch.ones(2, dtype=D, requires_grad=True)
    options = {} if threads is None else {"threads": threads}
    solution = ddn.solve(watched(seen), {"x": x}, options=options)
    del seen[:-1]  # the trace is no part of the call
    torch.autograd.grad(solution["u"].sum(), x)
    assert set(seen) == {expected}
    assert torch.get_num_threads() == 3


def test_threads_are_put_back_after_an_error_and_by_the_last_of_several_calls(three_threads: None) -> None:
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: -(u - x).square().sum())
    x = torch.ones(2, dtype=D)
    with pytest.raises(ddn.SolveError):
        ddn.solve(problem, {"x": x})
    assert torch.get_num_threads() == 3

    def call() -> None:
        for _ in range(5):
            ddn.solve(SPHERE, inputs(3), initial=start(3))

    workers = [threading.Thread(target=call) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    count: list[int] = []
    later = threading.Thread(target=lambda: count.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *count] == [3, 3]


def test_the_threads_of_a_call_are_those_of_its_compiled_backward() -> None:
    rule = ddn.DeclarativeLayer(SPHERE)._front
    program, policy = rule.program, ddn.Policy()
    one, two = (rule.rule(program, policy, threads) for threads in (1, "all"))
    assert (one.threads, two.threads) == (1, "all")
    assert rule.rule(program, policy, 1) is one


def test_a_call_inside_of_a_call_leaves_it_its_threads(three_threads: None) -> None:
    with limited(1, 10):
        with limited(2, 10):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "many"])
def test_a_number_of_threads_that_is_none(threads: object) -> None:
    with pytest.raises(
        ddn.ProblemError, match="option 'threads' is not valid; expected 'auto', 'all' or a positive"
    ):
        ddn.solve(SPHERE, inputs(1), options={"threads": threads})
