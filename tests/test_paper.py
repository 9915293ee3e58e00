"""Each statement of Gould, Hartley and Campbell (arXiv 1909.04866) against its formula, on random problems.

The formulas stand as in the paper, with its Lagrangian L = f - lam^T h and its names: y the solution,
A = D_Y h, C = D_X h, H = D2_YY L, B = D2_XY L. Our multipliers are nu = -lam.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch.func import grad, jacrev

import ddn_solvers as ddn
from ddn_solvers.program import compile_program
from ddn_solvers.registry import able

D = torch.float64
M, N = 24, 21  # variables and parameters


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def hessian(function):
    """torch.func.hessian in reverse mode; forward mode would compile with the deprecated torch.jit.script."""
    return jacrev(grad(function))


def close(found, expected, tolerance=1e-9):
    """To a tolerance relative to the largest entry, at least 1."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max()))
    )


W, V, Q = rand(M, M, seed=1) / 3, rand(M, N, seed=2) / 2, rand(M, M, seed=3) / 3
Q = Q @ Q.T + torch.eye(M, dtype=D)
X = rand(N, seed=4)


def smooth(u, x):
    """Strictly convex in u, all of H, B dense and moving with u and x."""
    return torch.logsumexp(W @ u - V @ torch.sin(x), 0) + 0.5 * (u - V @ x).square().sum()


def quadratic(u, x):
    return 0.5 * u @ Q @ u - u @ (V @ torch.sin(x))


SLOW = "cvxpy:SCS"  # seconds a problem at its own accuracy; it has its turn with proposition 4.10
OBJECTIVES = {"smooth": smooth, "quadratic": quadratic}


def node(objective, **constraints):
    return ddn.Problem({"u": (M,)}, {"x": (N,)}, objective, **constraints)


def on_all_solvers(make, convex=True):
    """Parametrize over (objective, problem, solver): every installed solver that takes the problem.

    Those that take the smooth objective have it; the quadratic one is for those that take no other.
    """
    found, seen = [], {SLOW}
    for name, objective in OBJECTIVES.items():
        problem = make(objective)
        solvers = {s for s in able(compile_program(problem)) if convex or not s.startswith("cvxpy")}
        found += [pytest.param(objective, problem, s, id=f"{name}-{s}") for s in sorted(solvers - seen)]
        seen |= solvers
    return pytest.mark.parametrize(("objective", "problem", "solver"), found)


def solved(problem, solver, x=X, **keywords):
    x = x.detach().clone().requires_grad_()
    return ddn.solve(problem, {"x": x}, solver=solver, **keywords), x


def rows(output, x):
    """The Jacobian of an output, one backward pass a row, (*output, *x)."""
    flat = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in output.reshape(-1)]
    return torch.stack(flat).reshape((*output.shape, *x.shape))


def quietly(function):
    """The result, and the DegeneracyWarnings that came with it."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = function()
    assert all(issubclass(w.category, ddn.DegeneracyWarning) for w in record)
    return result, len(record)


@dataclass
class Derivatives:
    """What the propositions are made of, at y and x."""

    f: Callable
    h: Callable
    y: torch.Tensor
    x: torch.Tensor

    def __post_init__(self):
        self.A, self.C = jacrev(self.h, 0)(self.y, self.x), jacrev(self.h, 1)(self.y, self.x)
        self.lam = torch.linalg.solve(self.A @ self.A.T, self.A @ grad(self.f)(self.y, self.x))
        self.H = hessian(self.lagrangian)(self.y, self.x)
        self.B = jacrev(grad(self.lagrangian), 1)(self.y, self.x)

    def lagrangian(self, u, x):
        return self.f(u, x) - self.lam @ self.h(u, x)


def proposition_4_5(d):
    """Dy = H^-1 A^T (A H^-1 A^T)^-1 (A H^-1 B - C) - H^-1 B, and D lam from its proof."""
    inverse = torch.linalg.inv(d.H)
    D_lam = torch.linalg.solve(d.A @ inverse @ d.A.T, d.A @ inverse @ d.B - d.C)
    return inverse @ d.A.T @ D_lam - inverse @ d.B, D_lam


# -- proposition 4.4 ------------------------------------------------------------------------------------------


@on_all_solvers(node)
def test_proposition_4_4_unconstrained(objective, problem, solver):
    """Dy = -H^-1 B."""
    s, x = solved(problem, solver)
    y = s["u"].detach()
    close(grad(objective)(y, X), torch.zeros(M, dtype=D))
    expected = -torch.linalg.solve(hessian(objective)(y, X), jacrev(grad(objective), 1)(y, X))
    close(rows(s["u"], x), expected)


@pytest.mark.parametrize("signs", ["minimum", "saddle", "maximum"])
def test_proposition_4_4_at_any_stationary_point(signs):
    """f = g(u - c(x)) with g's Hessian of any inertia at its stationary point: Dy = -H^-1 B, here D c."""
    diagonal = {"minimum": torch.ones(M, dtype=D), "saddle": rand(M, seed=5).sign(), "maximum": -torch.ones(M, dtype=D)}[signs]  # fmt: skip
    basis, _ = torch.linalg.qr(rand(M, M, seed=6))
    K = basis @ (diagonal * (1 + rand(M, seed=7).abs()).diag()) @ basis.T

    def objective(u, x):
        r = u - torch.tanh(V @ x)
        return 0.5 * r @ K @ r + r.pow(3).sum()

    y = torch.tanh(V @ X)
    expected = -torch.linalg.solve(hessian(objective)(y, X), jacrev(grad(objective), 1)(y, X))
    found = ddn.sensitivity(node(objective), {"x": X}, y)
    close(found.jacobian(), expected)
    assert found.certificate.sosc == (signs == "minimum")
    x = X.clone().requires_grad_()
    close(rows(ddn.attach(node(objective), {"x": x}, y)["u"], x), expected)


# -- proposition 4.5 ------------------------------------------------------------------------------------------

G = rand(5, M, seed=8)
COUPLING = rand(5, N, seed=9)


def linear_in_u(u, x):
    """Rows that move with x: A(x) u = d(x)."""
    return (G + 0.1 * torch.outer(COUPLING @ x, torch.ones(M, dtype=D))) @ u - torch.cos(COUPLING @ x)


def curved(u, x):
    """A sphere and an exponential surface within planes."""
    return torch.cat([
        (u.square().sum() - 6 - x[0].square())[None], (torch.exp(0.3 * u[:5]).sum() - x[1] - 6)[None],
        (G @ u - COUPLING @ x)[:3],
    ])  # fmt: skip


def with_linear(objective):
    return node(objective, equality={"h": linear_in_u})


def with_curved(objective):
    return node(objective, equality={"h": curved})


def check_proposition_4_5(objective, constraint, s, x):
    d = Derivatives(objective, constraint, s["u"].detach(), X)
    Dy, D_lam = proposition_4_5(d)
    close(s.dual.equality["h"].detach(), -d.lam)
    close(rows(s["u"], x), Dy)
    close(rows(s.dual.equality["h"], x), -D_lam)


@on_all_solvers(with_linear)
def test_proposition_4_5_linear_constraints_that_move(objective, problem, solver):
    """Dy, lam^T A = D_Y f, and D lam = (A H^-1 A^T)^-1 (A H^-1 B - C)."""
    check_proposition_4_5(objective, linear_in_u, *solved(problem, solver))


@on_all_solvers(with_curved, convex=False)
def test_proposition_4_5_nonlinear_constraints(objective, problem, solver):
    check_proposition_4_5(objective, curved, *solved(problem, solver, initial=rand(M, seed=10)))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_proposition_4_5_as_one_system(objective):
    """[H, -A^T; A, 0] [Dy; D lam] = -[B; C]: what sensitivity returns satisfies it."""
    problem = with_curved(objective)
    y = ddn.solve(problem, {"x": X}, initial=rand(M, seed=10))["u"]
    found = ddn.sensitivity(problem, {"x": X}, y)
    d = Derivatives(objective, curved, y, X)
    Dy, D_lam = found.jacobian("u"), -found.jacobian("equality.h")
    close(d.H @ Dy - d.A.T @ D_lam, -d.B)
    close(d.A @ Dy, -d.C)


# -- proposition 4.6, observation 4.8, figure 3 ------------------------------------------------------------------


ROOM = torch.tensor([0.05, 0.05, 0.05, 0.05, 20.0], dtype=D)


def halfspaces(u, x):
    return G @ u - 0.3 * torch.sin(COUPLING @ x) - ROOM


def balls(u, x):
    parts = torch.stack([u[:8].square().sum(), u[8:16].square().sum(), torch.exp(0.5 * u[16:]).sum() - 60])
    return parts - 1.5 - 0.3 * torch.sin(x[:3])


def with_halfspaces(objective):
    return node(objective, equality={"h": linear_in_u_two}, inequality={"g": halfspaces})


def linear_in_u_two(u, x):
    return linear_in_u(u, x)[:2] - u[0]


def with_balls(objective):
    return node(objective, equality={"h": linear_in_u_two}, inequality={"g": balls})


def check_proposition_4_6(objective, inequality, s, x):
    active = s.certificate.active["g"]
    assert active.any()
    assert not active.all()
    assert s.certificate.ok
    d = Derivatives(
        objective,
        lambda u, x: torch.cat([linear_in_u_two(u, x), inequality(u, x)[active]]),
        s["u"].detach(),
        X,
    )
    assert (d.lam[2:] < 0).all()
    Dy, D_lam = proposition_4_5(d)
    close(rows(s["u"], x), Dy)
    close(s.dual.inequality["g"][active].detach(), -d.lam[2:])
    close(rows(s.dual.inequality["g"][active], x), -D_lam[2:])
    assert not rows(s.dual.inequality["g"][~active], x).any()


@on_all_solvers(with_halfspaces)
def test_proposition_4_6_linear_inequalities(objective, problem, solver):
    """The formula of 4.5 with the active rows; inactive ones have no part in it."""
    check_proposition_4_6(objective, halfspaces, *solved(problem, solver))


@on_all_solvers(with_balls)
def test_proposition_4_6_nonlinear_inequalities(objective, problem, solver):
    check_proposition_4_6(objective, balls, *solved(problem, solver))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_proposition_4_6_inactive_constraints_change_nothing(objective):
    whole, x = solved(with_balls(objective), "casadi:ipopt")
    active = whole.certificate.active["g"]
    only = node(
        objective, equality={"h": linear_in_u_two}, inequality={"g": lambda u, x: balls(u, x)[active]}
    )
    alone, x_alone = solved(only, "casadi:ipopt")
    close(whole["u"].detach(), alone["u"].detach())
    close(rows(whole["u"], x), rows(alone["u"], x_alone))


NORMAL = rand(M, seed=11)


def half(u, d):
    return NORMAL @ u - d


WITH_HALF = {
    name: ddn.Problem({"u": (M,)}, {"x": (N,), "d": ()}, objective, inequality={"half": half})
    for name, objective in OBJECTIVES.items()
}
on_figure_3 = pytest.mark.parametrize(
    ("name", "solver"),
    [
        pytest.param(name, solver, id=f"{name}-{solver}")
        for name, problem in WITH_HALF.items()
        for solver in sorted({*able(compile_program(problem))} - {SLOW})
        if name == "smooth" or solver not in able(compile_program(WITH_HALF["smooth"]))
    ],
)


@cache
def free(name):
    """The unconstrained solution, with its Dy and with that of NORMAL @ u = d there."""
    f = OBJECTIVES[name]
    y = ddn.solve(node(f), {"x": X}, solver="casadi:ipopt")["u"]
    Dy = -torch.linalg.solve(hessian(f)(y, X), jacrev(grad(f), 1)(y, X))
    return y, Dy, proposition_4_5(Derivatives(f, lambda u, x: half(u, 0)[None] + 0 * x.sum(), y, X))[0]


def solve_figure_3(name, solver, room, **keywords):
    x = X.clone().requires_grad_()
    d = NORMAL @ free(name)[0] + room
    return ddn.solve(WITH_HALF[name], {"x": x, "d": d}, solver=solver, **keywords), x


@on_figure_3
def test_figure_3_inactive_is_as_unconstrained(name, solver):
    s, x = solve_figure_3(name, solver, 0.5)
    close(s["u"].detach(), free(name)[0])
    close(rows(s["u"], x), free(name)[1])
    assert s.certificate.ok
    assert not s.certificate.active["half"]


@on_figure_3
def test_figure_3_active_with_a_gradient_is_as_an_equality(name, solver):
    s, x = solve_figure_3(name, solver, -0.5)
    y, f = s["u"].detach(), OBJECTIVES[name]
    d = Derivatives(f, lambda u, x: half(u, 0)[None] + 0 * x.sum(), y, X)
    close(half(y, NORMAL @ free(name)[0]), torch.tensor(-0.5, dtype=D))
    close(rows(s["u"], x), proposition_4_5(d)[0])
    assert s.certificate.ok
    assert s.certificate.active["half"]


@on_figure_3
def test_figure_3_active_without_a_gradient_is_the_callers_choice(name, solver):
    """D_Y f = 0 on the boundary: undefined; either one-sided gradient is valid, and the caller is told."""
    y, unconstrained, equality = free(name)
    for choice, expected in (
        ("active", equality),
        ("inactive", unconstrained),
        ("mean", (equality + unconstrained) / 2),
    ):
        s, x = solve_figure_3(name, solver, 0.0, policy=ddn.Policy(weakly_active=choice))
        close(s["u"].detach(), y)
        close(rows(s["u"], x), expected)
        assert s.certificate.one_sided
        assert s.certificate.weakly_active["half"]
        assert not s.certificate.ok


def fixed_curved(u):
    return torch.stack([u.square().sum() - 5, (G[0] @ u).sinh() - 0.2])


def with_fixed_curved(objective):
    return node(objective, equality={"h": fixed_curved})


@on_all_solvers(with_fixed_curved, convex=False)
def test_observation_4_8_the_solution_moves_within_a_fixed_constraint(objective, problem, solver):
    """D_Y h Dy = 0 where h does not depend on x."""
    s, x = solved(problem, solver, initial=rand(M, seed=10))
    A = jacrev(fixed_curved)(s["u"].detach())
    Dy = rows(s["u"], x)
    close(A @ Dy, torch.zeros(2, N, dtype=D))
    assert Dy.abs().max() > 1e-2


@pytest.mark.parametrize("function", ["solve", "attach", "sensitivity"])
def test_observation_4_8_a_sum_of_squares_is_detected(function):
    """Equalities folded into one have D_Y h = 0: the derivative is refused, or reported as degenerate."""
    problem = node(smooth, equality={"folded": lambda u, x: linear_in_u(u, x).square().sum()})
    y = ddn.solve(with_linear(smooth), {"x": X})["u"]
    x = X.clone().requires_grad_()
    try:
        if function == "solve":
            found = ddn.solve(problem, {"x": x}, solver="scipy:SLSQP", initial=y)
        elif function == "attach":
            found = ddn.attach(problem, {"x": x}, y)
        else:
            found = ddn.sensitivity(problem, {"x": X}, y)
    except (ddn.SolveError, ddn.SensitivityError):
        return
    assert not found.certificate.ok
    assert not found.certificate.licq
    assert found.certificate.rank_deficiency == 1


# -- corollaries 4.7 and 4.9, equation 27 -------------------------------------------------------------------------


def single(u):
    return u.square().sum() + NORMAL @ u - 3


def with_single(objective):
    return node(objective, equality={"h": single})


def check_corollary_4_7(objective, constraint, s, x):
    y = s["u"].detach()
    a, df = grad(constraint)(y), grad(objective)(y, X)
    i = torch.where(a.abs() > 1e-2)[0]
    lam = df[i] / a[i]  # the same for any i
    close(lam, lam[:1].expand_as(lam))
    H = hessian(lambda u: objective(u, X) - lam[0] * constraint(u))(y)
    B = jacrev(grad(objective), 1)(y, X)
    inverse = torch.linalg.inv(H)
    aa = torch.outer(inverse @ a, a @ inverse)
    close(rows(s["u"], x), (aa / (a @ inverse @ a) - inverse) @ B)
    close(s.dual.equality["h"].detach(), -lam[0])


@on_all_solvers(with_single, convex=False)
def test_corollary_4_7_one_fixed_constraint(objective, problem, solver):
    """Dy = (H^-1 a a^T H^-1 / (a^T H^-1 a) - H^-1) B; lam = (df/dy_i) / (dh/dy_i) for any i."""
    check_corollary_4_7(objective, single, *solved(problem, solver, initial=rand(M, seed=10)))


def plane(u):
    return NORMAL @ u - 1


@on_all_solvers(lambda f: node(f, equality={"h": plane}))
def test_corollary_4_7_one_fixed_plane(objective, problem, solver):
    check_corollary_4_7(objective, plane, *solved(problem, solver))


OFFSETS = rand(5, seed=12)


@on_all_solvers(lambda f: node(f, equality={"h": lambda u: G @ u - OFFSETS}))
def test_corollary_4_9_fixed_linear_equalities(objective, problem, solver):
    """Dy = (H^-1 A^T (A H^-1 A^T)^-1 A H^-1 - H^-1) B."""
    s, x = solved(problem, solver)
    y = s["u"].detach()
    inverse = torch.linalg.inv(hessian(objective)(y, X))
    B = jacrev(grad(objective), 1)(y, X)
    expected = (inverse @ G.T @ torch.linalg.solve(G @ inverse @ G.T, G @ inverse) - inverse) @ B
    close(rows(s["u"], x), expected)


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "scipy:trust-constr", "casadi:ipopt", "casadi:sqpmethod"])
def test_equation_27_one_parameter_one_constraint(solver):
    """Dy = H^-1/2 (b~ - (a^ . b~) a^ + (c / |a~|) a^), where b~ = -H^-1/2 b, a~ = -H^-1/2 a, a^ = a~ / |a~|."""

    def objective(u, x):
        return smooth(u, x * X)

    def constraint(u, x):
        return u.square().sum() + (NORMAL @ u) * x - 3 - x.exp()

    problem = ddn.Problem({"u": (M,)}, {"x": ()}, objective, {"h": constraint})
    at = torch.tensor(0.7, dtype=D)
    s, x = solved(problem, solver, at, initial=rand(M, seed=10))
    y = s["u"].detach()
    d = Derivatives(objective, lambda u, x: constraint(u, x)[None], y, at)
    values, vectors = torch.linalg.eigh(d.H)
    assert values.min() > 0  # so that H^-1/2 exists, as the equation asks
    root = vectors @ (values.rsqrt().diag()) @ vectors.T
    a, b = -root @ d.A[0], -root @ d.B
    unit = a / a.norm()
    close(rows(s["u"], x), root @ (b - (unit @ b) * unit + d.C[0] / a.norm() * unit))


# -- proposition 4.10, equations 8 to 10 and 28 to 30 --------------------------------------------------------------


def explicit(x):
    return torch.tanh(V @ x) + torch.softmax(V @ x.square(), 0)


PROPOSITION_4_10 = node(lambda u, x: 0.5 * (u - explicit(x)).square().sum())


@pytest.mark.parametrize("solver", able(compile_program(PROPOSITION_4_10)))
def test_proposition_4_10_an_explicit_layer_is_declarative(solver):
    """argmin 1/2 |u - f~(x)|^2: y = f~(x), Dy = D f~."""
    s, x = solved(PROPOSITION_4_10, solver)
    close(s["u"].detach(), explicit(X), 1e-12)
    close(rows(s["u"], x), jacrev(explicit)(X), 1e-12)


SECOND = ddn.Problem(
    {"v": (N,)},
    {"z": (M,)},
    lambda v, z: torch.logsumexp(v - z @ V, 0) + (v - 0.1 * z.sum()).square().sum(),
    inequality={"ball": lambda v: v.square().sum() - 0.02},
)


@pytest.mark.parametrize("solver", sorted({*able(compile_program(SECOND))} - {SLOW}))
def test_equations_28_to_30_composition(solver):
    """y = second(first(x)): D y = D_Z y D z, from the loss backwards and as a whole."""
    first, second = (ddn.DeclarativeLayer(p, solver) for p in (with_halfspaces(smooth), SECOND))
    x = X.clone().requires_grad_()
    z = first(x)
    v = second(z)
    z_at, v_at = z.detach().clone().requires_grad_(), v.detach()
    Dz, Dv = rows(z, x), rows(second(z_at), z_at)
    assert grad(SECOND.objective)(v_at, z.detach()).norm() > 1e-3  # the ball holds it back
    d = Derivatives(
        SECOND.objective, lambda v, z: (v.square().sum() - 0.02)[None] + 0 * z.sum(), v_at, z.detach()
    )
    close(Dv, proposition_4_5(d)[0])
    close(rows(v, x), Dv @ Dz)
    w = rand(N, seed=13)
    (chained,) = torch.autograd.grad((v * w).sum() + v.square().sum(), x)
    close(chained, (w + 2 * v_at) @ Dv @ Dz)


@on_all_solvers(with_halfspaces)
def test_equations_8_and_9_bilevel(objective, problem, solver):
    """min_x J(x, y(x)): D J = D_X J + D_Y J Dy."""

    def upper(x, y):
        return (torch.sin(V @ x) * y).sum() + y.pow(3).sum()

    s, x = solved(problem, solver)
    (found,) = torch.autograd.grad(upper(x, s["u"]), x, retain_graph=True)
    by_x, by_y = grad(upper, (0, 1))(X, s["u"].detach())
    active, y = s.certificate.active["g"], s["u"].detach()
    d = Derivatives(
        objective, lambda u, x: torch.cat([linear_in_u_two(u, x), halfspaces(u, x)[active]]), y, X
    )
    close(found, by_x + by_y @ proposition_4_5(d)[0])


@on_all_solvers(node)
def test_equation_10_the_optimal_value_needs_no_derivative_of_the_solution(objective, problem, solver):
    """J = g(x, f(x, y)) over an unconstrained lower level: D J = D_X g + D_F g D_X f."""

    def upper(x, value):
        return torch.sin(value) + value * x.square().sum()

    s, x = solved(problem, solver)
    (found,) = torch.autograd.grad(upper(x, s.objective), x)
    by_x, by_f = grad(upper, (0, 1))(X, s.objective.detach())
    close(found, by_x + by_f * grad(objective, 1)(s["u"].detach(), X))


# -- multipliers where no solver gives them ------------------------------------------------------------------------


def test_minimum_norm_multipliers_at_a_given_point():
    """lam = (A A^T)^-1 A (D_Y f)^T."""
    y = ddn.solve(with_curved(smooth), {"x": X}, initial=rand(M, seed=10))["u"]
    d = Derivatives(smooth, curved, y, X)
    close(ddn.attach(with_curved(smooth), {"x": X}, y).dual.equality["h"], -d.lam)


@pytest.mark.parametrize("function", ["attach", "casadi:ipopt", "cvxpy:CLARABEL"])
def test_minimum_norm_multipliers_where_they_are_not_unique(function):
    """Dependent rows: lam = (A^T)^+ (D_Y f)^T, whatever the solver's choice was."""
    combined = torch.cat([G, rand(2, 5, seed=14) @ G])
    problem = node(smooth, equality={"h": lambda u: combined @ u})
    independent = node(smooth, equality={"h": lambda u: G @ u})
    y = ddn.solve(independent, {"x": X})["u"]
    s = ddn.attach(problem, {"x": X}, y) if function == "attach" else solved(problem, function)[0]
    close(s["u"].detach(), y)
    close(s.dual.equality["h"].detach(), -torch.linalg.pinv(combined.T) @ grad(smooth)(y, X), 1e-8)
    assert not s.certificate.licq
    assert s.certificate.rank_deficiency == 2


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_huge_multipliers_of_dependent_rows_do_not_hide_a_wrong_point(solver):
    """Both return 1e15 along the null space of A^T at points 0.1 to 1 away from the solution.

    A stationarity that was divided by those forces called them solved.
    """
    problem = ddn.Problem(
        {"u": (4,)}, {"x": (4,), "A": (3, 4)}, lambda u, x: 0.5 * (u - x).square().sum(), {"h": lambda u, A: A @ u}
    )  # fmt: skip
    for seed in range(8):
        two, x = rand(2, 4, seed=seed), rand(4, seed=100 + seed)
        A = torch.cat([two, rand(1, 2, seed=200 + seed) @ two])
        s = ddn.solve(problem, {"x": x, "A": A}, solver=solver)
        close(s["u"], x - two.T @ torch.linalg.solve(two @ two.T, two @ x))
        close(s.dual.equality["h"], torch.linalg.pinv(A.T) @ (x - s["u"]))


# -- section 4.7: feasibility, singular systems -----------------------------------------------------------------------

NLP = ["scipy:SLSQP", "scipy:trust-constr", "casadi:ipopt", "casadi:sqpmethod"]


def square_system(u, x):
    return u + 0.3 * torch.tanh(W @ u) - torch.sin(V @ x)


@pytest.mark.parametrize("solver", NLP)
def test_equations_31_and_32_feasibility_as_many_equations_as_variables(solver):
    """A constant objective: A Dy = -C, unique since rank A = m."""
    problem = node(None, equality={"h": square_system})
    s, x = solved(problem, solver)
    y = s["u"].detach()
    close(square_system(y, X), torch.zeros(M, dtype=D))
    A, C = jacrev(square_system, 0)(y, X), jacrev(square_system, 1)(y, X)
    close(rows(s["u"], x), -torch.linalg.solve(A, C))
    assert s.certificate.ok


@pytest.mark.parametrize("solver", NLP)
def test_equation_32_feasibility_underdetermined(solver):
    """rank A < m: the minimum-norm -A^+ C, reported with the directions that are free."""
    problem = node(None, equality={"h": lambda u, x: square_system(u, x)[:6]})
    s, x = solved(problem, solver)
    y = s["u"].detach()
    A, C = (jacrev(square_system, i)(y, X)[:6] for i in (0, 1))
    found, told = quietly(lambda: rows(s["u"], x))
    close(found, -torch.linalg.pinv(A) @ C)
    assert told
    assert s.certificate.singular
    assert not s.certificate.ok
    (null,) = s.certificate.null_space
    assert null.shape == (M, M - 6)
    close(A @ null, torch.zeros(6, M - 6, dtype=D))


EXTRA = rand(4, M, seed=15)


@pytest.mark.parametrize("function", ["attach", "scipy:SLSQP", "casadi:ipopt"])
def test_equation_32_feasibility_overdetermined(function):
    """More consistent equations than variables, A of full column rank: the unique Dy by least squares."""

    def more(u, x):
        system = square_system(u, x)
        return torch.cat([system, EXTRA @ system])

    problem = node(None, equality={"h": more})
    y = ddn.solve(node(None, equality={"h": square_system}), {"x": X}, solver="casadi:ipopt")["u"]
    x = X.clone().requires_grad_()
    if function == "attach":
        s = ddn.attach(problem, {"x": x}, y)
    else:
        s = ddn.solve(problem, {"x": x}, solver=function, initial=y + 1e-3 * rand(M, seed=16))
    A, C = jacrev(more, 0)(y, X), jacrev(more, 1)(y, X)
    found, _ = quietly(lambda: rows(s["u"], x))
    close(found, -torch.linalg.lstsq(A, C).solution)
    assert s.certificate.rank_deficiency == 4


TWO_BRANCHES = ddn.Problem({"u": ()}, {"x": ()}, None, {"h": lambda u, x: (u - 1).square() - x.square()})


@pytest.mark.parametrize("solver", NLP)
@pytest.mark.parametrize("branch", [1.0, -1.0])
@pytest.mark.parametrize("at", [0.5, -0.8])
def test_equations_33_and_34_both_branches(branch, at, solver):
    """(u - 1)^2 = x^2: y = 1 + x or 1 - x, Dy = +1 or -1 by the branch that was returned."""
    start = torch.tensor(1 + branch * at * 1.1, dtype=D)
    s, x = solved(TWO_BRANCHES, solver, torch.tensor(at, dtype=D), initial=start)
    close(s["u"].detach(), torch.tensor(1 + branch * at, dtype=D))
    close(rows(s["u"], x), torch.tensor(branch, dtype=D))
    assert s.certificate.ok


def test_equations_33_and_34_where_the_branches_meet():
    """At x = 0, A = 0: reported."""
    s = ddn.attach(TWO_BRANCHES, {"x": torch.zeros((), dtype=D)}, torch.ones((), dtype=D))
    assert s.certificate.rank_deficiency == 1
    assert s.certificate.singular
    assert not s.certificate.ok


TALL = rand(9, M, seed=17)


def flat_directions(u, x):
    """H = T^T T has rank 9 of M."""
    return 0.5 * (TALL @ (u - V @ torch.sin(x))).square().sum() + 0.1 * torch.exp(TALL[0] @ u)


@pytest.mark.parametrize("solver", sorted({*able(compile_program(node(flat_directions)))} - {SLOW}))
def test_equation_35_a_singular_hessian_has_a_family_of_derivatives(solver):
    """{-H^+ B + (I - H^+ H) Z}: ours has Z = 0, and the certificate spans the others."""
    s, x = solved(node(flat_directions), solver)
    y = s["u"].detach()
    H, B = hessian(flat_directions)(y, X), jacrev(grad(flat_directions), 1)(y, X)
    inverse = torch.linalg.pinv(H, rtol=1e-10, hermitian=True)
    found, told = quietly(lambda: rows(s["u"], x))
    close(found, -inverse @ B)
    assert told
    (null,) = s.certificate.null_space
    close(null @ null.T, torch.eye(M, dtype=D) - inverse @ H, 1e-8)
    member = found + null @ rand(M - 9, N, seed=18)
    close(H @ member, -B, 1e-8)


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt", "cvxpy:CLARABEL"])
def test_equation_35_with_constraints(solver):
    """The pseudo-inverse of the bordered matrix: minimum norm among all Dy that satisfy the conditions."""

    def constraint(u, x):
        return G @ u - COUPLING @ x

    problem = node(flat_directions, equality={"h": constraint})
    s, x = solved(problem, solver)
    y = s["u"].detach()
    d = Derivatives(flat_directions, constraint, y, X)
    bordered = torch.cat([torch.cat([d.H, -d.A.T], 1), torch.cat([d.A, torch.zeros(5, 5, dtype=D)], 1)])
    inverse = torch.linalg.pinv(bordered, rtol=1e-10)
    found, told = quietly(lambda: rows(s["u"], x))
    close(found, -(inverse @ torch.cat([d.B, d.C]))[:M], 1e-8)
    assert told
    assert s.certificate.null_space[0].shape == (M, M - 14)


@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6])
def test_a_proximal_term_for_a_singular_hessian(delta):
    """delta / 2 |u - y|^2: -(H + delta I)^-1 B, which tends to -H^+ B."""
    policy = ddn.Policy(on_singular="proximal", proximal=delta)
    s, x = solved(node(flat_directions), "casadi:ipopt", policy=policy)
    y = s["u"].detach()
    H, B = hessian(flat_directions)(y, X), jacrev(grad(flat_directions), 1)(y, X)
    found, _ = quietly(lambda: rows(s["u"], x))
    close(found, -torch.linalg.solve(H + delta * torch.eye(M, dtype=D), B), max(1e-9, 1e-13 / delta))
    exact = -torch.linalg.pinv(H, rtol=1e-10, hermitian=True) @ B
    assert (found - exact).abs().max() <= 10 * delta


@pytest.mark.parametrize("size", [4, 20])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_equations_36_to_38_an_unnormalised_direction(size, alpha):
    """f = -x^T u / |u|, y = alpha x: H of (36), the pseudo-inverse's Dy (38) and the sphere's (37)."""
    x = rand(size, seed=19)
    tangential = torch.eye(size, dtype=D) - torch.outer(x, x) / x.square().sum()

    def objective(u, x):
        return -(x @ u) / u.square().sum().sqrt()

    close(hessian(objective)(alpha * x, x), tangential / (alpha**2 * x.norm()))
    free = ddn.Problem({"u": (size,)}, {"x": (size,)}, objective)
    found = ddn.sensitivity(free, {"x": x}, alpha * x)
    jacobian, told = quietly(found.jacobian)
    close(jacobian, alpha * tangential)
    assert told == 1
    (null,) = found.certificate.null_space
    close(null @ null.T, torch.outer(x, x) / x.square().sum())
    sphere = ddn.Problem({"u": (size,)}, {"x": (size,)}, objective, lambda u: u.square().sum() - 1)
    on_sphere = ddn.sensitivity(sphere, {"x": x}, x / x.norm())
    close(on_sphere.jacobian(), tangential / x.norm())
    assert on_sphere.certificate.ok
