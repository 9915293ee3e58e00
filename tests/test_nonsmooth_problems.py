"""Kinks beside smooth constraints, bounds and other kinks; kinks that move; paths, transforms and starts."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddn_solvers as ddn

# torch's forward mode compiles decompositions with the deprecated torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
D = torch.float64
N = 20
SOLVERS = ("cvxpy:CLARABEL", "casadi:ipopt", "scipy:SLSQP")
on_all = pytest.mark.parametrize("solver", SOLVERS)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def number(value):
    return torch.tensor(value, dtype=D)


def close(found, expected, tolerance=1e-9):
    """To a tolerance relative to the largest entry, at least 1."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance * scale)


def leaves(parameters):
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def quietly(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)
        return function()


def check(problem, parameters, formula, solver, initial=None, tolerance=1e-9):
    """Point and gradient in every parameter equal those of a differentiable formula; both are returned."""
    ours, theirs = leaves(parameters), leaves(parameters)
    s = ddn.solve(problem, ours, solver=solver, initial=initial)
    expected = formula(s["u"].detach(), **theirs)
    close(s["u"], expected, tolerance)
    v = rand(*expected.shape, seed=99)
    keywords = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad((s["u"] * v).sum(), list(ours.values()), **keywords)
    wanted = torch.autograd.grad((expected * v).sum(), list(theirs.values()), **keywords)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, tolerance)
    assert s.certificate.ok.all()
    assert (s.residuals.stationarity < 1e-8).all()
    return s


def half_squares(u, x):
    return 0.5 * (u - x).square().sum()


# -- regression with an L1 norm -------------------------------------------------------------------------------------

SOFT = ddn.Problem({"u": (N,)}, {"x": (N,), "t": ()}, lambda u, x, t: half_squares(u, x) + t * u.abs().sum())


def soft_threshold(_, x, t):
    return x.sign() * (x.abs() - t).relu()


@pytest.mark.parametrize("solver", [*SOLVERS, "cvxpy:OSQP", "auto"])
def test_lasso_with_an_orthogonal_design_is_the_soft_threshold(solver):
    s = check(SOFT, {"x": rand(N, seed=1), "t": number(0.7)}, soft_threshold, solver)
    assert 3 < int((s["u"].abs() < 1e-12).sum()) < N - 3


LASSO = ddn.Problem(
    {"u": (N,)},
    {"A": (30, N), "b": (30,), "t": ()},
    lambda u, A, b, t: 0.5 * (A @ u - b).square().sum() + t * u.abs().sum(),
)
LASSO_AT = {"A": rand(30, N, seed=2), "b": 3 * rand(30, seed=3), "t": number(9.0)}


def lasso(u, A, b, t):
    """On the support S with its signs: A_S^T (A_S u_S - b) + t sign = 0."""
    on = torch.nonzero(u.abs() > 1e-9)[:, 0]
    part = A[:, on]
    return torch.zeros(N, dtype=D).index_put(
        (on,), torch.linalg.solve(part.T @ part, part.T @ b - t * u[on].sign())
    )


@on_all
def test_lasso_within_a_plane(solver):
    """A smooth constraint beside the kinks."""
    problem = ddn.Problem(
        {"u": (N,)}, {"x": (N,), "t": (), "d": ()}, lambda u, x, t: half_squares(u, x) + t * u.abs().sum(),
        {"plane": lambda u, d: u.sum() - d},
    )  # fmt: skip

    def formula(u, x, t, d):
        on = (u.abs() > 1e-9).to(D)
        free = on * (x - t * u.sign())
        return free - on * (free.sum() - d) / on.sum()

    s = check(problem, {"x": rand(N, seed=4), "t": number(0.8), "d": number(1.0)}, formula, solver)
    assert 3 < int((s["u"].abs() < 1e-12).sum()) < N - 3


@on_all
def test_second_derivatives_with_kinks(solver):
    """Double backward against the active-set formula, in the design, the data and the weight."""

    def second(solve):
        p = leaves(LASSO_AT)
        u = solve(p)
        first = torch.autograd.grad(u.pow(3).sum(), list(p.values()), create_graph=True)
        inner = sum((g * rand(*g.shape, seed=50 + i)).sum() for i, g in enumerate(first))
        return torch.autograd.grad(inner, list(p.values()))

    u = ddn.solve(LASSO, LASSO_AT)["u"]
    found = second(lambda p: ddn.solve(LASSO, p, solver=solver)["u"])
    for a, b in zip(found, second(lambda p: lasso(u, **p)), strict=True):
        close(a, b, 1e-8)


# -- classics -------------------------------------------------------------------------------------------------------

VARIATION = ddn.Problem(
    {"u": (N,)}, {"x": (N,), "t": ()}, lambda u, x, t: half_squares(u, x) + t * (u[1:] - u[:-1]).abs().sum()
)
STEPS = torch.cat([torch.full((7,), 1.0, dtype=D), torch.full((8,), -1.0, dtype=D), torch.full((5,), 0.5, dtype=D)])  # fmt: skip
NOISY = {"x": STEPS + 0.3 * rand(N, seed=6), "t": number(0.4)}


def variation(u, x, t):
    """Runs of equal values: their mean, moved by t at each jump."""
    jumps = u[1:] - u[:-1]
    sign = torch.where(jumps.abs() > 1e-9, jumps.sign(), torch.zeros_like(jumps))
    zero = torch.zeros(1, dtype=D)
    force = torch.cat([sign, zero]) - torch.cat([zero, sign])
    run = torch.cat([zero, (sign != 0).to(D).cumsum(0)])
    same = (run[:, None] == run[None, :]).to(D)
    return (same / same.sum(1, keepdim=True)) @ (x + t * force)


@pytest.mark.parametrize("solver", [*SOLVERS, "cvxpy:OSQP"])
def test_total_variation(solver):
    s = check(VARIATION, NOISY, variation, solver)
    assert 2 < int(((s["u"][1:] - s["u"][:-1]).abs() > 1e-9).sum()) < N - 5


def test_total_variation_equals_differences_of_re_solves_by_cvxpy():
    u, x = cp.Variable(N), cp.Parameter(N)
    other = cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2 + 0.4 * cp.norm1(cp.diff(u))))
    p = leaves(NOISY)
    v = rand(N, seed=7)
    (found,) = torch.autograd.grad(ddn.solve(VARIATION, p)["u"] @ v, p["x"])
    for j in range(0, N, 3):
        values = []
        for sign in (1, -1):
            x.value = NOISY["x"].numpy() + sign * 1e-3 * np.eye(N)[j]
            other.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
            values.append(float(v.numpy() @ u.value))
        assert abs(found[j] - (values[0] - values[1]) / 2e-3) < 1e-5


QUANTILE = ddn.Problem(
    {"u": (4,)},
    {"X": (25, 4), "b": (25,), "q": ()},
    lambda u, X, b, q: torch.maximum(q * (b - X @ u), (q - 1) * (b - X @ u)).sum(),
)


def quantile(u, X, b, q):
    """As many residuals vanish as there are coefficients."""
    on = torch.argsort((X.detach() @ u - b.detach()).abs())[:4]
    return torch.linalg.solve(X[on], b[on]) + 0 * q


@on_all
def test_one_kink_written_as_two(solver):
    """relu(r) and relu(-r): dependent rows, reported; the solution and its derivative are the same."""
    problem = ddn.Problem(
        {"u": (4,)},
        {"X": (25, 4), "b": (25,), "q": ()},
        lambda u, X, b, q: (q * torch.relu(b - X @ u) + (1 - q) * torch.relu(X @ u - b)).sum(),
    )
    X = torch.cat([torch.ones(25, 1, dtype=D), rand(25, 3, seed=9)], 1)
    given = {"X": X, "b": X @ rand(4, seed=10) + rand(25, seed=11), "q": number(0.3)}
    results = []
    for one in (QUANTILE, problem):
        p = leaves(given)
        u = ddn.solve(one, p, solver=solver)["u"]
        results.append(
            [u, *quietly(lambda u=u, p=p: torch.autograd.grad(u @ rand(4, seed=12), [p["X"], p["b"]]))]
        )
    for a, b in zip(*results, strict=True):
        close(a, b)


@on_all
def test_kinks_on_bounds(solver):
    """|u| with u >= 0: row and bound depend on each other where both hold; the derivative is unique."""
    problem = ddn.Problem(
        {"u": (N,)}, {"x": (N,), "t": ()}, lambda u, x, t: half_squares(u, x) + t * u.abs().sum(),
        bounds={"u": (0.0, None)},
    )  # fmt: skip
    p = leaves({"x": rand(N, seed=1), "t": number(0.7)})
    s = ddn.solve(problem, p, solver=solver)
    expected = (p["x"] - p["t"]).relu()
    close(s["u"], expected)
    found = quietly(lambda: torch.autograd.grad(s["u"] @ rand(N, seed=2), list(p.values())))
    for a, b in zip(found, torch.autograd.grad(expected @ rand(N, seed=2), list(p.values())), strict=True):
        close(a, b)


@on_all
def test_kinks_that_move_with_a_parameter(solver):
    """|u - c|: where u sits on c it follows it."""
    problem = ddn.Problem(
        {"u": (N,)}, {"x": (N,), "c": (N,), "t": ()}, lambda u, x, c, t: half_squares(u, x) + t * (u - c).abs().sum()
    )  # fmt: skip
    given = {"x": rand(N, seed=1), "c": rand(N, seed=2), "t": number(0.7)}
    s = check(problem, given, lambda _, x, c, t: c + soft_threshold(_, x - c, t), solver)
    assert 3 < int(((s["u"] - given["c"]).abs() < 1e-12).sum()) < N - 3


FUSED = ddn.Problem(
    {"u": (N,)},
    {"A": (30, N), "b": (30,), "t": ()},
    lambda u, A, b, t: (
        0.5 * (A @ u - b).square().sum() + t * torch.linalg.vector_norm(u.reshape(5, 4), dim=1).sum()
    ),
)


@on_all
def test_second_derivatives_of_a_group_lasso(solver):
    """General design: curved norms beside those at zero, against differences of re-solved gradients."""
    given = {"A": rand(30, N, seed=2), "b": 3 * rand(30, seed=3), "t": number(30.0)}
    direction = {name: rand(*value.shape, seed=60 + i) for i, (name, value) in enumerate(given.items())}

    def gradient(p, solver, create_graph=False):
        u = ddn.solve(FUSED, p, solver=solver)["u"]
        return torch.autograd.grad((u * rand(N, seed=4)).sum(), list(p.values()), create_graph=create_graph)

    zero = ddn.solve(FUSED, given, solver=solver)["u"].reshape(5, 4).abs().amax(1) < 1e-12
    assert zero.any()
    assert not zero.all()
    p = leaves(given)
    first = gradient(p, solver, create_graph=True)
    second = torch.autograd.grad(
        sum((g * t).sum() for g, t in zip(first, direction.values(), strict=True)), list(p.values())
    )
    step = 1e-5
    above, below = (
        gradient(leaves({k: given[k] + sign * step * direction[k] for k in given}), "casadi:ipopt")
        for sign in (1, -1)
    )
    for found, a, b in zip(second, above, below, strict=True):
        close(found, (a - b) / (2 * step), 1e-7)


# -- every operation with a kink: proximal operators in closed form ------------------------------------------------------


def simplex(x, size):
    ordered, _ = x.sort(descending=True)
    threshold = (ordered.cumsum(0) - size) / torch.arange(1, len(x) + 1, dtype=D)
    return (x - threshold[int((ordered > threshold).sum()) - 1]).relu()


CENTRE = 0.3 * rand(N, seed=13)
OPERATIONS = {
    # name: (term, proximal operator of t * term)
    "leaky-relu": (
        lambda u: F.leaky_relu(u, 0.1).sum(),
        lambda _, x, t: torch.where(x < 0.1 * t, x - 0.1 * t, (x - t).relu()),
    ),
    "l1-loss": (
        lambda u: F.l1_loss(u, CENTRE, reduction="sum"), lambda _, x, t: CENTRE + soft_threshold(_, x - CENTRE, t),
    ),
    "hinge": (lambda u: torch.relu(1 - u).sum(), lambda _, x, t: x + torch.minimum((1 - x).relu(), t)),
    "insensitive-loss": (
        lambda u: torch.relu(u.abs() - 0.3).sum(),
        lambda _, x, t: x - x.sign() * torch.minimum((x.abs() - 0.3).relu(), t),
    ),
    "max-of-a-norm-and-a-number": (
        lambda u: torch.maximum(u.abs(), 0.5 * u.abs() + 0.2).sum(),  # slope 1/2 below |u| = 0.4, 1 above
        lambda _, x, t: x.sign() * torch.where(
            x.abs() < 0.4 + 0.5 * t, (x.abs() - 0.5 * t).relu(), torch.maximum(x.abs() - t, torch.full_like(x, 0.4))
        ),
    ),
    "largest-hinge": (lambda u: torch.relu(u.amax() - 0.2), None),
}  # fmt: skip


def largest_hinge(_, x, t):
    """Either the mean pull of amax, or everything above 0.2 held there, or nothing."""
    pulled = x - simplex(x, t)
    return pulled if pulled.detach().max() > 0.2 else torch.minimum(x, torch.full_like(x, 0.2)) + 0 * t


@on_all
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, solver):
    """argmin 1/2 |u - x|^2 + t * term(u): the proximal operator, with some entries on the kink."""
    term, proximal = OPERATIONS[name]
    problem = ddn.Problem({"u": (N,)}, {"x": (N,), "t": ()}, lambda u, x, t: half_squares(u, x) + t * term(u))
    given = {"x": rand(N, seed=14), "t": number(0.7)}
    check(problem, given, proximal or largest_hinge, solver)


@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP"])
def test_a_nonconvex_operation_at_its_convex_kink(solver):
    """clamp(u, -1, 1) bends upwards at -1: entries of x between -1 and -1 + t end there."""
    problem = ddn.Problem(
        {"u": (N,)},
        {"x": (N,), "t": ()},
        lambda u, x, t: half_squares(u, x) + t * u.clamp(-1, 1).sum(),
    )
    x = torch.linspace(-1.6, -0.2, N, dtype=D)

    def formula(_, x, t):
        return torch.where(x < -1, x, torch.maximum(x - t, torch.full_like(x, -1.0)))

    check(problem, {"x": x, "t": number(0.5)}, formula, solver, initial=x)


@on_all
def test_a_largest_entry_as_a_constraint(solver):
    """amax(u) <= c and a budget of positive parts."""
    problem = ddn.Problem(
        {"u": (N,)}, {"x": (N,), "c": ()}, half_squares,
        inequality={"top": lambda u, c: u.amax() - c},
    )  # fmt: skip
    check(problem, {"x": rand(N, seed=18), "c": number(0.4)}, lambda _, x, c: torch.minimum(x, c), solver)
    budget = ddn.Problem(
        {"u": (N,)},
        {"x": (N,), "c": ()},
        half_squares,
        inequality={"budget": lambda u, c: torch.relu(u).sum() - c},
    )
    given = {"x": rand(N, seed=18), "c": number(2.0)}
    s = check(budget, given, lambda _, x, c: torch.where(x > 0, simplex(x.relu(), c), x), solver)
    assert (s["u"].abs() < 1e-12).any()


WEAK = ddn.Problem({"u": (3,)}, {"x": (3,), "t": ()}, lambda u, x, t: half_squares(u, x) + t * u.abs().sum())


@pytest.mark.parametrize("solver", ["cvxpy:CLARABEL", "casadi:ipopt", "scipy:SLSQP"])
def test_a_weakly_active_norm(solver):
    """|x| = t: the norm holds u at zero with no force to spare. Kept, Dy = 0; off it, u leaves along x."""
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,), "t": ()},
        lambda u, x, t: half_squares(u, x) + t * torch.linalg.vector_norm(u),
    )
    x = torch.tensor([0.3, 0.0, 0.4], dtype=D, requires_grad=True)
    s = ddn.solve(problem, {"x": x, "t": number(0.5)}, solver=solver)
    close(s["u"], torch.zeros(3, dtype=D), 1e-8)
    assert s.certificate.one_sided
    assert not s.certificate.ok
    (gradient,) = quietly(lambda: torch.autograd.grad(s["u"].sum(), x))
    close(gradient, torch.zeros(3, dtype=D))


def test_the_certificate_names_the_kinks():
    c = ddn.solve(WEAK, {"x": torch.tensor([0.5, 2.0, -0.1], dtype=D), "t": number(0.5)}).certificate
    assert "abs" in str(c)
    line = next(line for line in str(c).splitlines() if "weakly active" in line)
    assert "abs" in line


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@on_all
def test_the_unit_of_the_objective_decides_nothing(scale, solver):
    problem = ddn.Problem(
        {"u": (N,)},
        {"x": (N,), "t": (), "s": ()},
        lambda u, x, t, s: s * (half_squares(u, x) + t * u.abs().sum()),
    )
    given = {"x": rand(N, seed=1), "t": number(0.7), "s": number(scale)}
    p = leaves(given)
    s = ddn.solve(problem, p, solver=solver)
    expected = soft_threshold(None, given["x"], given["t"])
    close(s["u"], expected)
    (gradient,) = torch.autograd.grad(s["u"].sum(), p["x"])
    close(gradient, (expected != 0).to(D))
    assert s.certificate.ok


# -- batches, dtypes, transforms -----------------------------------------------------------------------------------------


@on_all
def test_a_batch_of_different_kink_patterns(solver):
    given = {"A": LASSO_AT["A"], "b": 3 * rand(6, 30, seed=20), "t": torch.tensor([1e-3, 3, 6, 9, 20, 500], dtype=D)}  # fmt: skip
    p = leaves(given)
    s = ddn.solve(LASSO, p, solver=solver)
    zeros = (s["u"].abs() < 1e-12).sum(-1)
    assert len(set(zeros.tolist())) >= 5
    assert zeros[0] == 0
    assert zeros[-1] == N
    assert s.certificate.ok.all()
    v = rand(N, seed=21)
    found = torch.autograd.grad((s["u"] @ v).sum(), list(p.values()))
    q = leaves(given)
    total = sum(lasso(s["u"][i].detach(), q["A"], q["b"][i], q["t"][i]) @ v for i in range(5))
    expected = torch.autograd.grad(total, list(q.values()))
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    for i in range(6):
        alone = ddn.solve(LASSO, {"A": given["A"], "b": given["b"][i], "t": given["t"][i]}, solver=solver)
        close(alone["u"], s["u"][i], 1e-12)


def test_transforms_over_kinks():
    layer = ddn.DeclarativeLayer(SOFT, "casadi:ipopt")
    x, t = rand(4, N, seed=22), number(0.7)
    expected = torch.diag_embed((x.abs() > t).to(D))
    close(torch.func.vmap(torch.func.jacrev(layer), in_dims=(0, None))(x, t), expected)
    close(layer(x, t), soft_threshold(None, x, t))


def test_forward_mode_over_kinks():
    p = {"x": rand(N, seed=1), "t": number(0.7)}
    u = ddn.solve(SOFT, p)["u"]
    tangents = {"x": rand(N, seed=2), "t": number(0.3)}
    _, expected = torch.func.jvp(
        lambda x, t: soft_threshold(None, x, t), tuple(p.values()), tuple(tangents.values())
    )
    close(ddn.sensitivity(SOFT, p, u).jvp(tangents)["u"], expected)
    layer = ddn.DeclarativeLayer(SOFT, "cvxpy:CLARABEL")
    close(torch.func.jvp(layer, tuple(p.values()), tuple(tangents.values()))[1], expected)


def test_float32_with_kinks():
    x, t = rand(N, seed=1).float().requires_grad_(), torch.tensor(0.7)
    s = ddn.solve(SOFT, {"x": x, "t": t})
    assert s["u"].dtype == torch.float32
    (gradient,) = torch.autograd.grad(s["u"].sum(), x)
    torch.testing.assert_close(gradient, (x.abs() > t).float())
    assert s.certificate.ok


@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP"])
def test_smooth_solvers_agree_with_cvxpy_from_any_start(solver):
    for seed in range(3):
        given = {"A": rand(30, N, seed=30 + seed), "b": 3 * rand(30, seed=40 + seed), "t": number(8.0)}
        reference = ddn.solve(LASSO, given, solver="cvxpy:CLARABEL")
        found = ddn.solve(LASSO, given, solver=solver, initial=rand(N, seed=50 + seed))
        close(found["u"], reference["u"])
        close(found.objective, reference.objective)


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "cvxpy:CLARABEL"])
@pytest.mark.parametrize("seed", range(3))
def test_least_absolute_deviations_of_many_data(solver, seed):
    """Some residuals of a hundred are within a thousandth of zero, and are not zero: those were taken for kinks."""
    X, m, n = rand(100, 5, seed=seed), 100, 5
    y = X @ rand(n, seed=10 + seed) + 0.3 * rand(m, seed=20 + seed)
    problem = ddn.Problem({"w": (n,)}, {"y": (m,)}, lambda w, y: (X @ w - y).abs().sum())
    given = y.clone().requires_grad_()
    solution = ddn.solve(problem, {"y": given}, solver=solver)
    residuals = (X @ solution["w"] - y).abs().detach()
    fitted = residuals.argsort()[:n]  # a vertex: as many data are met as there are unknowns
    assert residuals[fitted].max() < 1e-9 < residuals.sort().values[n]
    close(solution["w"], torch.linalg.solve(X[fitted], y[fitted]))
    w = cp.Variable(n)
    close(
        solution.objective,
        number(cp.Problem(cp.Minimize(cp.norm1(X.numpy() @ w - y.numpy()))).solve(cp.CLARABEL)),
        1e-7,
    )
    (gradient,) = torch.autograd.grad(solution["w"].sum(), given)
    expected = torch.zeros(m, dtype=D)
    expected[fitted] = torch.linalg.inv(X[fitted]).sum(0)
    close(gradient, expected)
    attached = ddn.attach(problem, {"y": y}, solution["w"].detach())
    assert attached.certificate.ok


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:highs"])
def test_the_median_of_a_thousand(solver):
    x = rand(1001, seed=3)
    problem = ddn.Problem({"u": ()}, {"x": (1001,)}, lambda u, x: (u - x).abs().sum())
    close(ddn.solve(problem, {"x": x}, solver=solver)["u"], x.median())


NORMS = {
    "norm": lambda u: u.norm() - 1,
    "root": lambda u: u.square().sum().sqrt() - 1,
    "largest": lambda u: u.abs().max() - 1,
    "sum": lambda u: u.abs().sum() - 1,
    "positive part": lambda u: u.relu().norm() - 1,
}


@pytest.mark.parametrize("solver", ["auto", "newton", *SOLVERS])
@pytest.mark.parametrize("name", NORMS)
def test_inside_of_a_ball_its_kink_holds_nothing(name, solver):
    """|u| <= 1 with slack: a multiplier that a backend left there held u at 0, where |u| has no gradient to show it."""
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), inequality=NORMS[name]
    )
    for size in (1e-2, 1e-3, 1e-4, 0.0):
        x = (size * rand(4, 3, seed=5)).requires_grad_()
        solution = ddn.solve(problem, {"x": x}, solver=solver)
        close(solution["u"], x)
        assert solution.residuals.complementarity.max() < 1e-9
        (gradient,) = torch.autograd.grad(solution["u"].sum(), x)
        close(gradient, torch.ones(4, 3, dtype=D), 1e-6)


@pytest.mark.parametrize(
    "norm", [lambda u: (-u).relu().norm(), lambda u: (u - u.clamp(-1, 1)).norm()], ids=["relu", "clamp"]
)
@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP"])
def test_a_norm_that_is_zero_in_a_region_is_flat_there(solver, norm):
    """Its gradient is 0 / 0 by the formula: NaN came back at a solved sample."""
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: 0.5 * (u - x).square().sum() + 0.5 * norm(u))
    x = torch.tensor([0.5, 0.7], dtype=D, requires_grad=True)
    solution = ddn.solve(problem, {"x": x}, solver=solver)
    close(solution["u"], x)
    close(torch.autograd.grad(solution["u"].sum(), x)[0], torch.ones(2, dtype=D))
    assert solution.certificate.ok


def test_a_ball_without_a_radius_keeps_its_multiplier():
    """|u| <= r at r = 0: the multiplier of least norm was zero, as the row has no gradient, and its kink held nothing."""
    problem = ddn.Problem(
        {"u": (2,)}, {"r": ()}, lambda u: 0.5 * (u - 1).square().sum(), inequality=lambda u, r: u.norm() - r
    )
    solution = ddn.solve(problem, {"r": number(0.0)})
    close(solution["u"], torch.zeros(2, dtype=D))
    assert solution.residuals.stationarity < 1e-9
    assert solution.dual.inequality["inequality0"] > 2**0.5 - 1e-6
    assert not solution.certificate.ok


ENTANGLED = {
    "relu of |u|": lambda u, x: torch.relu(u.abs() - x),
    "largest of three": lambda u, x: torch.stack([u - x, -u - x, 0 * u]).max(),
}


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "cvxpy:CLARABEL"])
@pytest.mark.parametrize("name", ENTANGLED)
def test_kinks_that_hang_on_each_other_have_no_derivative(name, solver):
    """At x = 0 the slope is 1 to the right and 0 to the left, and no row tells on which side the outer kink is."""
    problem = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: ENTANGLED[name](u, x) + 0.5 * (u - x) ** 2)
    x = torch.tensor([-0.2, 0.0, 0.3], dtype=D, requires_grad=True)
    solution = ddn.solve(problem, {"x": x}, solver=solver)
    close(solution["u"], x.clamp(min=0))
    assert solution.certificate.ok.tolist() == [True, False, False]  # the last is weakly active
    with pytest.warns(ddn.DegeneracyWarning):
        (gradient,) = torch.autograd.grad(solution["u"].sum(), x)
    close(gradient[[0, 2]], torch.tensor([0.0, 1.0], dtype=D))


BALL = ddn.Problem(
    {"u": (3,)},
    {"x": (3,), "r": ()},
    lambda u, x: 0.5 * (u - x).square().sum(),
    inequality=lambda u, r: u.norm() - r,
)


@pytest.mark.parametrize("radius", [1.0, 1e-2])
def test_a_norm_that_is_left_is_a_norm_again(radius):
    """From the zero of |u|, warm or cold: on the piece of that zero |u| is zero wherever u goes, and no row."""
    x, r = torch.tensor([1.0, 0.3, -0.7], dtype=D), number(radius)
    at_zero = ddn.solve(BALL, {"x": 0 * x, "r": r})
    for solution in (
        ddn.solve(BALL, {"x": 3 * x, "r": r}, warm_start=at_zero),
        ddn.solve(BALL, {"x": 3 * x, "r": r}),
    ):
        close(solution["u"], radius * x / x.norm())
        assert solution.certificate.ok
    two = ddn.Problem(
        {"u": (4,)},
        {"x": (4,)},
        lambda u, x: 0.5 * (u - x).square().sum(),
        inequality=[lambda u: u[:2].norm() - 0.01, lambda u: u[2:].norm() - 1],
    )
    found = ddn.solve(two, {"x": torch.ones(4, dtype=D)})["u"]
    close(found, torch.tensor([0.01, 0.01, 1.0, 1.0], dtype=D) / 2**0.5)


def tree_prox(x, c):
    """Of c (|u| + |u[1:]| + |u[2:]| + |u_3|), from the leaves to the root (Jenatton et al. 2011, theorem 1)."""
    u = torch.cat([x[:3], x[3:].sign() * (x[3:].abs() - c).relu()])
    for k in (2, 1, 0):
        rest = u[k:]
        length = rest.norm()
        u = torch.cat([u[:k], rest * (1 - c / length).relu() if length > 0 else rest * 0])
    return u


@pytest.mark.filterwarnings("ignore::ddn_solvers.DegeneracyWarning")
@pytest.mark.parametrize("solver", ["auto", "newton", "casadi:ipopt", "cvxpy:CLARABEL", "scipy:SLSQP"])
@pytest.mark.parametrize("weight", [0.149, 0.15, 0.151])
def test_norms_of_parts_of_each_other_that_vanish_together(weight, solver):
    """Their forces are within all limits, as balls; least squares alone puts them outside, and a corner was called optimal."""
    problem = ddn.Problem(
        {"u": (4,)},
        {"x": (4,)},
        lambda u, x: (
            0.5 * (u - x).square().sum() + weight * (u.norm() + u[1:].norm() + u[2:].norm() + u[3].abs())
        ),
    )
    x = torch.tensor([0.3, -0.2, 0.1, 0.25], dtype=D, requires_grad=True)
    u = ddn.solve(problem, {"x": x}, solver=solver)["u"]
    expected = tree_prox(x, weight)
    close(u, expected)
    (found,) = torch.autograd.grad(u.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    close(found, wanted)


def _clusters(u):
    pairs = [(i, j) for i in range(4) for j in range(i)]
    return sum((u[2 * i : 2 * i + 2] - u[2 * j : 2 * j + 2]).norm() for i, j in pairs) / 3


VANISHING = {  # penalty, weight, solution
    "norm and total variation": (lambda u: u.norm() + u.diff().abs().sum(), 1.5, lambda x: 0 * x),
    "convex clustering": (_clusters, 3.0, lambda x: x.reshape(4, 2).mean(0).repeat(4)),
}


@pytest.mark.filterwarnings("ignore::ddn_solvers.DegeneracyWarning")
@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "cvxpy:CLARABEL"])
@pytest.mark.parametrize("name", VANISHING)
@pytest.mark.parametrize("seed", range(3))
def test_sums_of_norms_that_all_vanish(seed, name, solver):
    penalty, weight, formula = VANISHING[name]
    problem = ddn.Problem(
        {"u": (8,)}, {"x": (8,)}, lambda u, x: 0.5 * (u - x).square().sum() + weight * penalty(u)
    )
    x = (0.4 * rand(8, seed=seed)).requires_grad_()
    u = ddn.solve(problem, {"x": x}, solver=solver)["u"]
    close(u, formula(x))
    (found,) = torch.autograd.grad(u @ rand(8, seed=9), x)
    (wanted,) = torch.autograd.grad(formula(x) @ rand(8, seed=9), x)
    close(found, wanted)


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP"])
def test_one_kink_written_twice_is_one(solver):
    """Quantile regression with both its sides as relu: rows that were each other's negatives made the matrix singular."""
    X, y = rand(12, 3), rand(12, seed=1)
    spellings = (
        lambda b, y, tau: (tau * (y - X @ b).relu() + (1 - tau) * (X @ b - y).relu()).sum(),
        lambda b, y, tau: torch.maximum(tau * (y - X @ b), (tau - 1) * (y - X @ b)).sum(),
    )
    found = []
    for f in spellings:
        given = {"y": y.clone().requires_grad_(), "tau": number(0.3)}
        s = ddn.solve(ddn.Problem({"b": (3,)}, {"y": (12,), "tau": ()}, f), given, solver=solver)
        assert s.certificate.ok
        found.append((s["b"], *torch.autograd.grad(s["b"] @ rand(3, seed=2), given["y"])))
    for a, b in zip(*found, strict=True):
        close(a, b)
