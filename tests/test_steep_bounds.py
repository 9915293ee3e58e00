"""Functions whose curvature or slope has no limit at a bound: entropies, powers below two, CES utilities."""

import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
SOLVERS = ("auto", "casadi:ipopt", "cvxpy:CLARABEL", "scipy:SLSQP", "scipy:trust-constr")


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def check(problem, parameters, formula, solver, initial=None, tolerance=1e-9):
    """Point and gradient beside a differentiable formula, the gradient relative to its largest entry."""
    ours = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    theirs = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    s = ddn.solve(problem, ours, solver=solver, initial=initial)
    (u,) = s.primal.values()
    expected = formula(**theirs)
    torch.testing.assert_close(u, expected, rtol=0, atol=tolerance)
    v = rand(*expected.shape, seed=7)
    found = torch.autograd.grad((u * v).sum(), list(ours.values()))
    wanted = torch.autograd.grad((expected * v).sum(), list(theirs.values()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * max(1.0, float(b.abs().max())))
    return s


def softmax(n):
    """argmin over the simplex of sum p log p - x^T p."""
    return ddn.Problem(
        {"p": (n,)},
        {"x": (n,)},
        lambda p, x: (p * p.log()).sum() - x @ p,
        equality={"sum": lambda p: p.sum() - 1},
        bounds={"p": (0.0, None)},
    )


SOFTMAX = softmax(4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("largest", [12.0, 24.0, 30.0])
def test_probabilities_down_to_1e_14(largest, solver):
    """The smallest are less than any tolerance, and no bound holds them."""
    x = torch.linspace(0, largest, 4, dtype=D)
    start = torch.full((4,), 0.25, dtype=D)
    s = check(SOFTMAX, {"x": x}, lambda x: x.softmax(0), solver, start, 1e-6)
    assert (s.dual.lower["p"] == 0).all()
    assert s.certificate.ok


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "cvxpy:CLARABEL"])
def test_an_entropic_plan_whose_smallest_entries_are_nothing(solver):
    from ddn_solvers.nodes import entropic_transport

    cost, share = rand(4, 5, seed=3), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D)
    to = torch.full((5,), 0.2, dtype=D)
    problem = ddn.Problem(
        {"P": (4, 5)},
        {"C": (4, 5)},
        lambda P, C: (P * C).sum() + 0.02 * (P * P.log()).sum(),
        equality=[lambda P: P.sum(1) - share, lambda P: (P.sum(0) - to)[:-1]],
        bounds={"P": (0.0, None)},
    )
    start = torch.full((4, 5), 1 / 20, dtype=D)
    s = check(
        problem, {"C": cost}, lambda C: entropic_transport(C, share, to, epsilon=0.02), solver, start, 1e-7
    )
    assert s["P"].min() < 1e-8


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(4))
def test_ces_demand(seed, solver):
    """x_i = I (a_i / p_i)^s / sum_j p_j (a_j / p_j)^s, with elasticity s = 10 (Arrow et al. 1961)."""
    problem = ddn.Problem(
        {"x": (4,)},
        {"p": (4,), "a": (4,)},
        lambda x, a: -torch.log((a * x**0.9).sum()) / 0.9,
        inequality={"budget": lambda x, p: p @ x - 5},
        bounds={"x": (0.0, None)},
    )

    def demand(p, a):
        share = (a / p) ** 10
        return 5 * share / (p @ share)

    prices, tastes = 0.5 + 2 * rand(4, seed=seed), torch.softmax(rand(4, seed=10 + seed), 0)
    s = check(problem, {"p": prices, "a": tastes}, demand, solver, {"x": torch.ones(4, dtype=D)})
    assert s.dual.lower["x"].abs().max() < 1e-9


@pytest.mark.parametrize("solver", [*SOLVERS, "scipy:L-BFGS-B"])
@pytest.mark.parametrize("power", [1.5, 1.2])
@pytest.mark.parametrize("accuracy", [1e-6, 1e-9])
def test_costs_with_a_power_below_two(accuracy, power, solver):
    """u = 0 where b <= 0, with the multiplier -b: the curvature there is infinite, and moves nothing."""
    problem = ddn.Problem(
        {"u": (4,)},
        {"b": (4,)},
        lambda u, b: (0.3 * u**power - b * u + 0.5 * u.square()).sum(),
        bounds={"u": (0.0, None)},
    )
    b = torch.tensor([-1.0, -0.3, 1.0, 2.0], dtype=D)
    s = ddn.solve(problem, {"b": b}, solver=solver, policy=ddn.Policy(accuracy=accuracy))
    assert s.certificate.ok
    torch.testing.assert_close(s.dual.lower["u"], (-b).clamp_min(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(s["u"][:2], torch.zeros(2, dtype=D), rtol=0, atol=0)
    inside = s["u"][2:].clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        (0.3 * inside**power - b[2:] * inside + 0.5 * inside.square()).sum(), inside
    )
    assert slope.abs().max() < 1e-12
    jacobian = ddn.sensitivity(problem, {"b": b}, s["u"], s.dual).jacobian()
    curved = 1 + 0.3 * power * (power - 1) * s["u"][2:] ** (power - 2)
    torch.testing.assert_close(jacobian, torch.diag(torch.cat([torch.zeros(2, dtype=D), 1 / curved])))


def test_a_point_on_a_bound_from_which_the_slope_leads_away_is_no_solution():
    """-sqrt(u) has no limit of its slope at zero: SLSQP stops there, and forces were lost beside the curvature."""
    problem = ddn.Problem(
        {"u": (5,)},
        {"b": (5,)},
        lambda u, b: (-0.3 * u**0.5 - b * u + 0.5 * u * u).sum(),
        bounds={"u": (0.0, None)},
    )
    b = 3 * torch.randn(5, generator=torch.Generator().manual_seed(14), dtype=D)
    for point in (torch.full((5,), 1e-19, dtype=D), torch.tensor([2e-3, 3e-3, 9e-5, 5e-5, 3e-19], dtype=D)):
        with pytest.raises(ddn.SensitivityError, match="not a KKT point"):
            ddn.sensitivity(problem, {"b": b}, point)
    s = ddn.solve(problem, {"b": b})
    assert s.certificate.ok
    assert s.residuals.stationarity < 1e-9


@pytest.mark.parametrize("power", [1.2, 1.5, 2.5])
def test_a_bound_beyond_which_a_function_has_no_value_is_regular(power):
    """Whether the matrix is chance was asked at points beyond the bound, where u^1.5 has none."""
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u**power).sum() - x @ u, bounds={"u": (0.0, None)}
    )
    x = torch.tensor([1.0, -1.0, -2.0], dtype=D, requires_grad=True)
    s = ddn.solve(problem, {"x": x})
    assert s.certificate.ok
    at = (1 / power) ** (1 / (power - 1))
    torch.testing.assert_close(s["u"], torch.tensor([at, 0.0, 0.0], dtype=D))
    (slope,) = torch.autograd.grad(s["u"].sum(), x)
    torch.testing.assert_close(slope, torch.tensor([at / (power - 1), 0.0, 0.0], dtype=D))


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt"])
@pytest.mark.parametrize("seed", range(3))
def test_many_probabilities(seed, solver):
    """Multipliers that an interior point method leaves on bounds that do not hold balanced the forces: no step was taken."""
    x = 3 * torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=D)
    start = torch.full((60,), 1 / 60, dtype=D)
    s = check(softmax(60), {"x": x}, lambda x: x.softmax(0), solver, start)
    assert s.certificate.ok


def test_a_barrier_far_from_its_bound_in_map_coordinates():
    """The same: a point good to 1e-6 of 1e4 was left as it was, and its gradient was off by 1e-3."""
    b = torch.tensor([-3.0, 0.5, 4.0], dtype=D)
    problem = ddn.Problem(
        {"u": (3,)},
        {"b": (3,)},
        lambda u, b: (-100 * (u - 1e4).log() - b * (u - 1e4) + 0.5 * (u - 1e4).square()).sum(),
        bounds={"u": (1e4, None)},
    )

    def solution(b):  # t - b = 100 / t
        return 1e4 + (b + (b.square() + 400).sqrt()) / 2

    start = torch.full((3,), 1e4 + 5, dtype=D)
    s = check(problem, {"b": b}, solution, "auto", start, 1e-7)
    assert s.certificate.ok
    assert (s.dual.lower["u"] == 0).all()


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:trust-constr"])
@pytest.mark.parametrize(("weight", "b"), [(1e-3, -0.1), (1e-3, -3.0), (1e-4, -0.6), (1e-2, -3.0)])
def test_entropies_whose_weight_is_too_small_to_hold_a_number_off_zero(weight, b, solver):
    """u = exp(b / w - 1) is below any number here: the bound holds it, as near as the slope has a value."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"b": (2,)},
        lambda u, b: (weight * u * u.log() - b * u + 0.5 * u.square()).sum(),
        bounds={"u": (0.0, None)},
    )
    given = torch.tensor([2.0, b], dtype=D, requires_grad=True)
    s = ddn.solve(problem, {"b": given}, solver=solver, initial=torch.ones(2, dtype=D))
    u = s["u"].detach()
    assert u[1] < 1e-29
    assert abs(weight * (u[0].log() + 1) - 2 + u[0]) < 1e-9
    (slope,) = torch.autograd.grad(s["u"].sum(), given)
    torch.testing.assert_close(slope, torch.stack([1 / (1 + weight / u[0]), 0 * u[0]]))


@pytest.mark.parametrize("solver", ["auto", "newton", "casadi:ipopt", "scipy:SLSQP"])
def test_a_power_whose_slope_has_no_value_at_the_bound(solver):
    """u sqrt(u), as people write u^1.5: its slope at zero is 0 times infinity, and leads nowhere."""
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u * u.sqrt()).sum() - x @ u, bounds={"u": (0.0, None)}
    )
    x = torch.tensor([1.0, -1.0, -2.0], dtype=D)
    s = ddn.solve(problem, {"x": x}, solver=solver, initial=torch.ones(3, dtype=D))
    torch.testing.assert_close(s["u"], torch.tensor([4 / 9, 0.0, 0.0], dtype=D), rtol=0, atol=1e-9)
    torch.testing.assert_close(s.dual.lower["u"], torch.tensor([0.0, 1.0, 2.0], dtype=D))
    assert s.certificate.ok


@pytest.mark.parametrize("largest", [45.0, 80.0])
def test_the_certificate_of_a_probability_of_nothing(largest):
    x = torch.linspace(0, largest, 4, dtype=D)
    s = check(SOFTMAX, {"x": x}, lambda x: x.softmax(0), "auto", torch.full((4,), 0.25, dtype=D))
    assert s.certificate.ok
    assert s.certificate.condition < 1e6
