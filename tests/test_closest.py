"""``on_failure="closest"``: infeasible samples at the point of smallest violation, with its gradient and slacks."""

import pytest
import torch

import ddn_solvers as ddn

# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

CLOSEST = ddn.Policy(on_failure="closest")
SOLVERS = ("auto", "casadi:ipopt", "casadi:daqp", "scipy:SLSQP", "cvxpy:CLARABEL")
N, M = 20, 30


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def overdetermined():
    A = torch.randn(M, N)
    return A, ddn.Problem(
        variables={"u": (N,)},
        parameters={"b": (M,), "x": (N,)},
        objective=lambda u, x: 0.5 * (u - x).square().sum(),
        equality={"lin": lambda u, b: A @ u - b},
    )


def half_spaces():
    """In 20 dimensions; its last two rows contradict where ``gap`` is positive."""
    A = torch.randn(12, N)
    return ddn.Problem(
        variables={"u": (N,)},
        parameters={"x": (N,), "gap": ()},
        objective=lambda u, x: 0.5 * (u - x).square().sum() + 0.1 * u.pow(4).sum(),
        inequality={
            "sides": lambda u: A @ u - 1.0,
            "low": lambda u, gap: gap + u[:5].sum(),
            "high": lambda u, gap: gap - u[:5].sum() + 0.1 * u[5].square(),
        },
        bounds={"u": (-1.5, 1.5)},
    )


def differences(function, at, directions, step=1e-4):
    return torch.stack([(function(at + step * d) - function(at - step * d)) / (2 * step) for d in directions])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore:the problem's functions")
def test_the_point_and_its_gradient_are_those_of_least_squares(solver):
    A, problem = overdetermined()
    b, x = torch.randn(M, requires_grad=True), torch.randn(N, requires_grad=True)
    v = torch.randn(N)
    solution = ddn.solve(problem, {"b": b, "x": x}, solver=solver, policy=CLOSEST)
    inverse = torch.linalg.pinv(A)
    assert solution.status == (ddn.Status.INFEASIBLE,)
    assert not solution.converged
    torch.testing.assert_close(solution["u"], inverse @ b, rtol=0, atol=2e-5)
    torch.testing.assert_close(solution.slacks["lin"], A @ solution["u"] - b, rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.residuals.feasibility, solution.slacks["lin"].abs().max())
    torch.testing.assert_close(solution.objective, 0.5 * (solution["u"] - x).square().sum())
    of_b, of_x = torch.autograd.grad(solution["u"] @ v, [b, x])
    torch.testing.assert_close(of_b, inverse.T @ v, rtol=0, atol=2e-5)
    torch.testing.assert_close(of_x, torch.zeros(N), rtol=0, atol=2e-5)
    assert solution.certificate.ok


def test_the_gradient_is_exact_for_the_penalty():
    A, problem = overdetermined()
    b, x, v = torch.randn(M), torch.randn(N), torch.randn(N)
    jacobian = torch.func.jacrev(lambda b: ddn.solve(problem, {"b": b, "x": x}, policy=CLOSEST)["u"])(b)
    # (A^T A + w I) u = A^T b + w x for some weight w of the objective; u says which.
    u = ddn.solve(problem, {"b": b, "x": x}, policy=CLOSEST)["u"]
    pull, push = x - u, A.T @ (A @ u - b)
    w = (push @ pull) / (pull @ pull)
    torch.testing.assert_close(push, w * pull, rtol=1e-5, atol=0)
    exact = torch.linalg.solve(A.T @ A + w * torch.eye(N), A.T)
    torch.testing.assert_close(v @ jacobian, v @ exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP"])
def test_gradients_agree_with_differences_of_solves_and_leave_the_feasible_samples_alone(solver):
    problem = half_spaces()
    x, gap = torch.randn(4, N), torch.tensor([0.3, -2.0, 0.7, -1.0])
    v = torch.randn(4, N)

    def total(x, gap):
        solution = ddn.solve(problem, {"x": x, "gap": gap}, solver=solver, policy=CLOSEST)
        assert [s.name for s in solution.status] == ["INFEASIBLE", "OPTIMAL", "INFEASIBLE", "OPTIMAL"]
        return (
            (v * solution["u"]).sum()
            + solution.objective.sum()
            + sum(s.sum() for s in solution.slacks.values())
        )

    of_x, of_gap = torch.func.grad(total, argnums=(0, 1))(x, gap)
    directions = torch.randn(5, 4, N)
    expected = differences(lambda at: total(at, gap), x, directions)
    torch.testing.assert_close((of_x * directions).sum((1, 2)), expected, rtol=1e-6, atol=1e-6)
    expected = differences(lambda at: total(x, at), gap, torch.eye(4))
    torch.testing.assert_close(of_gap, expected, rtol=1e-6, atol=1e-6)

    whole = ddn.solve(problem, {"x": x, "gap": gap}, solver=solver, policy=CLOSEST)
    alone = ddn.solve(problem, {"x": x[[1, 3]], "gap": gap[[1, 3]]}, solver=solver)
    torch.testing.assert_close(whole["u"][[1, 3]], alone["u"], rtol=1e-12, atol=1e-12)
    for slacks in whole.slacks.values():
        assert (slacks[[1, 3]] == 0).all()
    # Violations are shared between the two that conflict, so that neither can be made smaller alone.
    assert (whole.slacks["low"][[0, 2]] > 0.1).all()
    assert (whole.slacks["high"][[0, 2]] > 0.1).all()


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_scale_of_the_objective_does_not_matter(factor):
    A, _ = overdetermined()
    problem = ddn.Problem(
        variables={"u": (N,)},
        parameters={"b": (M,)},
        objective=lambda u: factor * 0.5 * (u - 1.0).square().sum(),
        equality={"lin": lambda u, b: A @ u - b},
    )
    b = torch.randn(M)
    for size in (1e-3, 1.0, 1e3):
        solution = ddn.solve(problem, {"b": size * b}, policy=CLOSEST)
        torch.testing.assert_close(
            solution["u"], size * torch.linalg.pinv(A) @ b, rtol=0, atol=2e-5 * max(1, size)
        )


def disjoint_balls(traceable):
    def far(u, c):
        distance = (u - c).square().sum()
        if not traceable and distance > 1e6:
            distance = 2 * distance
        return distance - 1.0

    return ddn.Problem(
        variables={"u": (N,)},
        parameters={"c": (N,)},
        objective=lambda u: (u - 0.3).square().sum(),
        inequality={"near": lambda u: u.square().sum() - 1.0, "far": far},
    )


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.filterwarnings("ignore:the problem's functions cannot be compiled")
def test_disjoint_balls_meet_in_the_middle(traceable):
    problem = disjoint_balls(traceable)
    c = torch.zeros(N).index_fill(0, torch.tensor([3]), 4.0) + 0.1 * torch.randn(N)
    solution = ddn.solve(problem, {"c": c}, policy=CLOSEST)
    torch.testing.assert_close(solution["u"], c / 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(solution.slacks["near"], solution.slacks["far"], rtol=1e-4, atol=0)
    jacobian = torch.func.jacrev(lambda c: ddn.solve(problem, {"c": c}, policy=CLOSEST)["u"])(c)
    torch.testing.assert_close(jacobian, torch.eye(N) / 2, rtol=0, atol=1e-4)


def test_contradicting_bounds_meet_in_the_middle():
    problem = ddn.Problem(
        variables={"u": (3,)},
        parameters={"low": (3,), "high": ()},
        objective=lambda u: u.square().sum(),
        equality={"sum": lambda u: u[1:].sum() - 1.0},
        bounds={"u": ("low", lambda high: high * torch.ones(3))},
    )
    low = torch.tensor([[2.0, 0.0, 0.0], [0.5, -1.0, -1.0]], requires_grad=True)
    high = torch.tensor(1.0, requires_grad=True)
    solution = ddn.solve(problem, {"low": low, "high": high}, policy=CLOSEST)
    assert [s.name for s in solution.status] == ["INFEASIBLE", "OPTIMAL"]
    torch.testing.assert_close(solution["u"], torch.tensor([[1.5, 0.5, 0.5], [0.5, 0.5, 0.5]]))
    torch.testing.assert_close(solution.slacks["u.lower"], torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(solution.slacks["u.upper"], torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    of_low, of_high = torch.autograd.grad(solution["u"][:, 0].sum(), [low, high])
    torch.testing.assert_close(of_low, torch.tensor([[0.5, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(of_high, torch.tensor(0.5))


@pytest.mark.parametrize("solver", ["auto", "scipy:highs"])
def test_a_linear_program_goes_to_a_solver_that_takes_the_elastic_problem(solver):
    problem = ddn.Problem(
        variables={"u": (N,)},
        parameters={"c": (N,), "r": ()},
        objective=lambda u, c: c @ u,
        equality={"sum": lambda u: u.sum() - 2.0},
        inequality={"cap": lambda u, r: u[:10].sum() - r},
        bounds={"u": (0.0, torch.cat([torch.ones(10), torch.zeros(10)]))},
    )
    c, r = torch.randn(N), torch.tensor(1.0, requires_grad=True)
    solution = ddn.solve(problem, {"c": c, "r": r}, solver=solver, policy=CLOSEST)
    torch.testing.assert_close(solution["u"].sum(), torch.tensor(1.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(solution["u"].sum(), r)[0], torch.tensor(0.5), rtol=0, atol=1e-5
    )


def test_a_feasibility_problem_and_kinks():
    for objective in (None, lambda u: u.abs().sum()):
        problem = ddn.Problem(
            variables={"u": (2,)},
            parameters={"a": (3,)},
            objective=objective,
            equality={"same": lambda u, a: torch.stack([u[0] - a[0], u[0] - a[1], u[1] + 0 * a[2]])},
        )
        a = torch.tensor([1.0, 3.0, 0.0], requires_grad=True)
        solution = ddn.solve(problem, {"a": a}, policy=CLOSEST)
        torch.testing.assert_close(solution["u"], torch.tensor([2.0, 0.0]), rtol=0, atol=1e-5)
        gradient = torch.autograd.grad(solution["u"].sum(), a)[0]
        torch.testing.assert_close(gradient, torch.tensor([0.5, 0.5, 0.0]), rtol=0, atol=1e-5)


def test_derivatives_of_any_order():
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"c": (2,)},
        objective=lambda u: (u - 0.3).square().sum(),
        inequality={
            "near": lambda u: u.square().sum() - 1.0,
            "far": lambda u, c: (u - c).square().sum() + 0.2 * (u - c).pow(4).sum() - 1.0,
        },
    )
    c = torch.tensor([[4.0, 0.5], [0.5, 0.2]], requires_grad=True)

    def point(c):
        return ddn.solve(problem, {"c": c}, policy=CLOSEST)["u"]

    assert torch.autograd.gradcheck(point, c, eps=1e-5, atol=1e-6, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(point, c, eps=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.func.jacfwd(point)(c.detach()), torch.func.jacrev(point)(c.detach()), rtol=1e-8, atol=1e-10
    )


def test_other_failures_raise_and_say_why():
    A = torch.randn(3, 2)
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"b": (3,)},
        objective=lambda u: u[1],
        equality={"lin": lambda u, b: A[:, 0] * u[0] - b},
    )
    with pytest.raises(ddn.SolveError, match=r"infeasible .*its elastic problem: "):
        ddn.solve(problem, {"b": torch.randn(3)}, policy=CLOSEST)
    problem = ddn.linear_program(2)
    with pytest.raises(ddn.SolveError, match="unbounded"):
        ddn.solve(problem, {"c": torch.ones(2)}, policy=CLOSEST)
    with pytest.raises(ddn.SolveError, match="iteration limit"):
        ddn.solve(
            half_spaces(), {"x": 9 * torch.ones(N), "gap": torch.tensor(-2.0)}, "casadi:ipopt", options={"max_iter": 1},
            policy=CLOSEST,
        )  # fmt: skip
    A, problem = overdetermined()
    with pytest.raises(ddn.SensitivityError, match="not a KKT point"):
        ddn.attach(problem, {"b": torch.randn(M), "x": torch.ones(N)}, {"u": torch.ones(N)}, policy=CLOSEST)
    with pytest.raises(ddn.ProblemError, match=r"on_failure='closest' under torch.func.vmap"):
        torch.func.vmap(lambda b: ddn.solve(problem, {"b": b, "x": torch.ones(N)}, policy=CLOSEST)["u"])(
            torch.randn(2, M)
        )


def test_where_nothing_is_infeasible_nothing_changes():
    problem = half_spaces()
    values = {"x": torch.randn(3, N), "gap": torch.full((3,), -2.0)}
    plain, closest = ddn.solve(problem, values), ddn.solve(problem, values, policy=CLOSEST)
    assert torch.equal(plain["u"], closest["u"])
    assert plain.slacks is None
    assert set(closest.slacks) == {"sides", "low", "high", "u.lower", "u.upper"}
    assert all((slacks == 0).all() for slacks in closest.slacks.values())


def test_the_certificate_speaks_of_the_derivative_that_was_taken():
    problem = half_spaces()
    solution = ddn.solve(problem, {"x": torch.randn(2, N), "gap": torch.tensor([0.3, -2.0])}, policy=CLOSEST)
    certificate = solution.certificate
    assert certificate.ok.tolist() == [True, True]
    assert certificate.active["low"].tolist() == [True, False]
    assert certificate.active["high"].tolist() == [True, False]
    assert certificate.active["u.lower"].shape == (2, N)
    assert [basis.shape[0] for basis in certificate.null_space] == [N, N]


def test_a_layer_trains_through_infeasible_samples():
    layer = ddn.DeclarativeLayer(half_spaces(), policy=CLOSEST)
    gap = torch.tensor([1.0, 0.5], requires_grad=True)
    x = torch.randn(2, N)
    optimizer = torch.optim.SGD([gap], lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        solution = layer.solve(x, gap)
        loss = solution.slacks["low"].square().sum() + solution.slacks["high"].square().sum()
        if bool(solution.converged.all()):
            break
        loss.backward()
        optimizer.step()
    assert loss < 1e-4


def test_a_compiled_model_takes_the_eager_way():
    _A, problem = overdetermined()
    layer = ddn.DeclarativeLayer(problem, policy=CLOSEST)
    b, x = torch.randn(M), torch.randn(N)
    compiled = torch.compile(lambda b, x: layer(2 * b, x).sum(), backend="eager")
    torch.testing.assert_close(compiled(b, x), layer(2 * b, x).sum())
