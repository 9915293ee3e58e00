"""Singular and indefinite Hessians: exact where the bordered matrix is regular; what is a minimum and what is not."""

import pytest
import torch
from torch.func import jacrev

import ddn_solvers as ddn
from ddn_solvers.program import compile_program
from ddn_solvers.registry import able

D = torch.float64
N = 20
SLOW = "cvxpy:SCS"  # seconds a problem at its own accuracy
# These stop short of a vertex with a SolveError, for want of curvature, or take seconds to get there.
LOST_ON_LP = ("casadi:qrqp", "scipy:trust-constr", "casadi:osqp")
NLP = ("scipy:SLSQP", "scipy:trust-constr", "casadi:ipopt", "casadi:sqpmethod")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def close(found, expected, tolerance=1e-9):
    """To a tolerance relative to the largest entry, at least 1."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def on_solvers_of(problem, but=()):
    return pytest.mark.parametrize("solver", sorted({*able(compile_program(problem))} - {SLOW, *but}))


def check_against(formula, problem, parameters, solver, initial=None, orders=1):
    """Point, gradient and, with ``orders=2``, second derivatives equal those of a differentiable formula."""
    weights = rand(N, seed=900)
    results = []
    for solve in (
        lambda **p: ddn.solve(problem, p, solver=solver, initial=initial)["u"],
        formula,
    ):
        p = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        u = solve(**p)
        keywords = {"create_graph": orders > 1, "allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(u @ weights[: len(u)], list(p.values()), **keywords)
        found = [u.detach(), *first]
        if orders > 1:
            inner = sum((g * rand(*g.shape, seed=901 + i)).sum() for i, g in enumerate(first))
            keywords["create_graph"] = False
            found += torch.autograd.grad(inner, list(p.values()), **keywords)
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        close(ours.detach(), theirs.detach(), 1e-9)


# -- regular bordered matrices -------------------------------------------------------------------------------

LP = ddn.linear_program(N, equalities=4, inequalities=30, bounds=(-1.0, None))


def vertex_data(seed):
    """An LP built around a vertex: 4 equalities, 10 inequalities and 6 bounds hold there, multipliers positive."""
    generator = torch.Generator().manual_seed(seed)
    A, G = rand(4, N, seed=seed), rand(30, N, seed=seed + 1)
    y = rand(N, seed=seed + 2).abs()
    y[:6] = -1.0
    slack = torch.cat([torch.zeros(10, dtype=D), 0.1 + torch.rand(20, generator=generator, dtype=D)])
    lam = 0.1 + torch.rand(16, generator=generator, dtype=D)
    c = -A.T @ rand(4, seed=seed + 3) - G[:10].T @ lam[:10]
    c[:6] += lam[10:]
    return {"c": c, "A": A, "b": A @ y, "G": G, "h": G @ y + slack}


def vertex(c, A, b, G, h):
    bounds = torch.eye(N, dtype=D)[:6]
    right = torch.cat([b, h[:10], -torch.ones(6, dtype=D)])
    return torch.linalg.solve(torch.cat([A, G[:10], bounds]), right) + 0 * c


@on_solvers_of(LP, LOST_ON_LP)
def test_a_vertex_of_a_linear_program(solver):
    """H = 0: the active rows alone determine y and all its derivatives."""
    check_against(vertex, LP, vertex_data(1), solver, orders=2)


@on_solvers_of(LP, LOST_ON_LP)
def test_multipliers_at_a_vertex(solver):
    """They solve the transposed system, and so have derivatives in c and in the rows, none in b and h."""
    p = {name: value.clone().requires_grad_() for name, value in vertex_data(1).items()}
    s = ddn.solve(LP, p, solver=solver)
    nu, lam = s.dual.equality["equality"], s.dual.inequality["inequality"]
    found = torch.cat([nu, lam[:10], -s.dual.lower["u"][:6]])
    rows = torch.cat([p["A"], p["G"][:10], torch.eye(N, dtype=D)[:6]])
    expected = torch.linalg.solve(rows.T, -p["c"])
    close(found.detach(), expected.detach())
    weights, inputs = rand(N, seed=7), list(p.values())
    keywords = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad(found @ weights, inputs, **keywords)
    theirs = torch.autograd.grad(expected @ weights, inputs, **keywords)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


QP = ddn.Problem(
    {"u": (N,)},
    {"R": (8, N), "q": (N,), "A": (9, N), "b": (9,), "G": (5, N), "h": (5,)},
    lambda u, R, q: 0.5 * (R @ u).square().sum() + q @ u,
    {"e": lambda u, A, b: A @ u - b},
    {"i": lambda u, G, h: G @ u - h},
)


def semidefinite_data():
    """P = R^T R of rank 8, 9 equalities and 3 active inequalities: exactly regular together."""
    y, lam = rand(N, seed=21), torch.tensor([0.5, 1.0, 2.0, 0.0, 0.0], dtype=D)
    R, A, G = rand(8, N, seed=22), rand(9, N, seed=23), rand(5, N, seed=24)
    q = -R.T @ (R @ y) - A.T @ rand(9, seed=25) - G.T @ lam
    return {"R": R, "q": q, "A": A, "b": A @ y, "G": G, "h": G @ y + (lam == 0)}


def bordered(R, q, A, b, G, h):
    rows = torch.cat([A, G[:3]])
    K = torch.cat([torch.cat([R.T @ R, rows.T], 1), torch.cat([rows, torch.zeros(12, 12, dtype=D)], 1)])
    return torch.linalg.solve(K, torch.cat([-q, b, h[:3]]))[:N]


@on_solvers_of(QP)
def test_a_positive_semidefinite_hessian(solver):
    check_against(bordered, QP, semidefinite_data(), solver, orders=2)


EIGENVECTOR = ddn.Problem(
    {"u": (N,)}, {"X": (N, N)}, lambda u, X: -0.5 * u @ X @ u, lambda u: u.square().sum() - 1
)
SYMMETRIC = rand(N, N, seed=31) + rand(N, N, seed=31).T


def top_eigenvector(X):
    _, vectors = torch.linalg.eigh(0.5 * (X + X.T))
    return vectors[:, -1] * vectors[0, -1].detach().sign()


@pytest.mark.parametrize("solver", NLP)
def test_the_top_eigenvector(solver):
    """H = -X + nu I is singular on the eigenvector itself: derivatives of torch.linalg.eigh, twice."""
    start = top_eigenvector(SYMMETRIC) + 0.05 * rand(N, seed=32)
    check_against(top_eigenvector, EIGENVECTOR, {"X": SYMMETRIC}, solver, start, orders=2)


@pytest.mark.parametrize("solver", NLP)
def test_the_top_eigenvalue_is_objective_and_multiplier(solver):
    """f = -value / 2 and nu = value / 2, with their derivatives."""
    X = SYMMETRIC.clone().requires_grad_()
    s = ddn.solve(EIGENVECTOR, {"X": X}, solver=solver, initial=top_eigenvector(SYMMETRIC))
    value = torch.linalg.eigvalsh(0.5 * (X + X.T))[-1]
    (expected,) = torch.autograd.grad(value, X)
    close(-2 * s.objective.detach(), value.detach())
    close(2 * s.dual.equality["equality0"].detach(), value.detach())
    for output in (-2 * s.objective, 2 * s.dual.equality["equality0"]):
        close(torch.autograd.grad(output, X, retain_graph=True)[0], expected)


@pytest.mark.parametrize("index", range(0, N, 4))
def test_every_eigenvector_is_differentiable_and_only_the_top_one_a_minimum(index):
    _, vectors = torch.linalg.eigh(SYMMETRIC)
    y = vectors[:, index]
    found = ddn.sensitivity(EIGENVECTOR, {"X": SYMMETRIC}, y)

    def eigenvector(X):
        own = torch.linalg.eigh(0.5 * (X + X.T))[1][:, index]
        return own * (own @ y).detach().sign()

    close(found.jacobian(), jacrev(eigenvector)(SYMMETRIC))
    assert not found.certificate.sosc
    assert found.certificate.ok  # a derivative it has


PRODUCTS = ddn.Problem(
    {"u": (N,)},
    {"x": (N,), "r": ()},
    lambda u, x: (x[:-1] * u[:-1] * u[1:]).sum() + x[-1] * u[0] * u[-1],
    {"sphere": lambda u, r: u.square().sum() - r**2, "plane": lambda u: u.sum()},
)


def products(x, r):
    """The lowest eigenvector of the products' matrix within the plane, of length r."""
    K = torch.diag(x[:-1], 1)
    K = K + K.T
    corner = torch.zeros(N, N, dtype=D)
    corner[0, -1] = corner[-1, 0] = 1
    K = K + x[-1] * corner
    basis = torch.linalg.svd(torch.ones(1, N, dtype=D))[2][1:].T
    lowest = basis @ torch.linalg.eigh(basis.T @ K @ basis)[1][:, 0]
    return r * lowest * lowest[0].detach().sign()


@pytest.mark.parametrize("solver", NLP)
def test_products_of_variables_on_a_sphere_within_a_plane(solver):
    """H has a zero diagonal and both signs of eigenvalues."""
    p = {"x": 1 + 0.5 * rand(N, seed=41), "r": torch.tensor(1.3, dtype=D)}
    start = products(**p) + 0.02 * rand(N, seed=42)
    check_against(products, PRODUCTS, p, solver, start, orders=2)


@pytest.mark.parametrize("solver", NLP)
def test_a_product_of_three_variables_on_a_sphere_within_a_plane(solver):
    """min u1 u2 u3, |u| = r, sum u = s at s = 0: y = r (1, 1, -2) / sqrt 6, so dy/dr = y / r; dy/ds is even."""
    problem = ddn.Problem(
        {"u": (3,)}, {"r": (), "s": ()}, lambda u: u.prod(),
        {"sphere": lambda u, r: u.square().sum() - r**2, "plane": lambda u, s: u.sum() - s},
    )  # fmt: skip
    p = {"r": torch.tensor(1.5, dtype=D), "s": torch.tensor(0.0, dtype=D)}
    y = torch.tensor([1.0, 1.0, -2.0], dtype=D) / 6**0.5
    start = p["r"] * y + torch.tensor([0.02, -0.01, 0.03], dtype=D)
    s = ddn.solve(problem, p, solver=solver, initial=start)
    close(s["u"], p["r"] * y)
    found = ddn.sensitivity(problem, p, s["u"])
    close(found.jacobian("u", "r"), y)
    third = torch.full((3,), 1 / 3, dtype=D)  # |u|^2 fixed to first order: y . dy = 0, sum dy = 1, dy1 = dy2
    close(found.jacobian("u", "s"), third)
    assert s.certificate.sosc
    assert s.certificate.ok


# -- minima and others ------------------------------------------------------------------------------------------

PLANES = rand(5, N, seed=51)


def curvature_with(reduced, normal):
    """K with the given eigenvalues on the null space of PLANES and on its complement."""
    right = torch.linalg.svd(PLANES)[2]
    values = torch.cat([torch.as_tensor(normal, dtype=D).expand(5), torch.as_tensor(reduced, dtype=D)])
    return right.T @ values.diag() @ right


INDEFINITE = ddn.Problem(
    {"u": (N,)},
    {"K": (N, N), "x": (N,), "s": ()},
    lambda u, K, x, s: s * (0.5 * (u - x) @ K @ (u - x) + 0.1 * (u - x).square().sum().square()),
    {"planes": lambda u, x: PLANES @ (u - x)},
)
POSITIVE = torch.linspace(0.5, 2.0, N - 5, dtype=D)
ONE_NEGATIVE = torch.cat([torch.tensor([-0.3], dtype=D), POSITIVE[1:]])
KINDS = {
    # reduced Hessian, eigenvalues across the planes, minimum?
    "minimum": (POSITIVE, 1.0, True),
    "minimum-indefinite-H": (POSITIVE, -3.0, True),
    "saddle": (ONE_NEGATIVE, 1.0, False),
    "saddle-definite-across": (ONE_NEGATIVE, 5.0, False),
    "maximum": (-POSITIVE, -1.0, False),
    "maximum-positive-across": (-POSITIVE, 4.0, False),
}


def stationary(kind, scale=1.0):
    reduced, normal, minimum = KINDS[kind]
    x = rand(N, seed=52)
    p = {"K": curvature_with(reduced, normal), "x": x, "s": torch.tensor(scale, dtype=D)}
    return p, x, minimum


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_only_minima_are_solutions(kind, scale, solver):
    """Started on the stationary point itself: its reduced Hessian decides, not H, and not its unit."""
    p, x, minimum = stationary(kind, scale)
    policy = ddn.Policy(on_failure="mask")
    s = ddn.solve(INDEFINITE, p, solver=solver, initial=x, policy=policy)
    if minimum:
        assert s.status == (ddn.Status.OPTIMAL,)
        close(s["u"], x)
        assert s.certificate.sosc
    elif s.converged:  # the solver left the point for a minimum, as it may
        assert (s["u"] - x).abs().max() > 1e-2
        assert s.certificate.sosc
    else:
        assert s.status == (ddn.Status.NOT_A_MINIMUM,)
        assert not s.certificate.sosc
        assert not s.certificate.ok


@pytest.mark.parametrize("kind", [k for k, (_, _, minimum) in KINDS.items() if not minimum])
def test_what_is_no_minimum_fails_under_the_policy(kind):
    p, x, _ = stationary(kind)
    with pytest.raises(ddn.SolveError) as error:
        ddn.solve(INDEFINITE, p, solver="scipy:SLSQP", initial=x)
    assert error.value.solution.status == (ddn.Status.NOT_A_MINIMUM,)
    with pytest.warns(ddn.ConvergenceWarning):
        s = ddn.solve(INDEFINITE, p, solver="scipy:SLSQP", initial=x, policy=ddn.Policy(on_failure="warn"))
    assert not s.converged
    s = ddn.solve(INDEFINITE, p, solver="scipy:SLSQP", initial=x, policy=ddn.Policy(on_failure="nan"))
    assert s["u"].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_attach_and_sensitivity_accept_any_stationary_point(kind, scale):
    """Prop. 4.4; the whole problem moves with x, so Dy is the identity. The certificate says which kind it is."""
    p, x, minimum = stationary(kind, scale)
    found = ddn.sensitivity(INDEFINITE, p, x)
    close(found.jacobian("u", "x"), torch.eye(N, dtype=D))
    assert found.certificate.sosc == minimum
    parameters = {**p, "x": x.clone().requires_grad_()}
    s = ddn.attach(INDEFINITE, parameters, x)
    (gradient,) = torch.autograd.grad(s["u"] @ rand(N, seed=53), parameters["x"])
    close(gradient, rand(N, seed=53))
    assert s.certificate.sosc == minimum
    assert s.status == (ddn.Status.OPTIMAL,)


def test_minima_and_others_in_one_batch():
    given = [stationary(kind) for kind in KINDS]
    p = {name: torch.stack([g[0][name] for g in given]) for name in ("K", "x", "s")}
    x = torch.stack([g[1] for g in given])
    s = ddn.solve(
        INDEFINITE,
        p,
        solver="scipy:SLSQP",
        initial=x,
        policy=ddn.Policy(on_failure="mask", on_singular="raise"),
    )
    minimum = [g[2] for g in given]
    assert s.converged.tolist() == minimum
    assert s.certificate.sosc.tolist() == minimum
    assert ddn.sensitivity(INDEFINITE, p, x).certificate.sosc.tolist() == minimum


def test_curvature_of_the_constraints_counts():
    """f is linear, so H = 2 nu I: the near and the far end of a sphere, minimum and maximum."""
    problem = ddn.Problem({"u": (N,)}, {"x": (N,)}, lambda u, x: x @ u, lambda u: u.square().sum() - 1)
    x = rand(N, seed=54)
    y = x / x.norm()
    assert ddn.sensitivity(problem, {"x": x}, -y).certificate.sosc
    assert not ddn.sensitivity(problem, {"x": x}, y).certificate.sosc
    with pytest.raises(ddn.SolveError) as error:
        ddn.solve(problem, {"x": x}, solver="scipy:SLSQP", initial=y)
    assert error.value.solution.status == (ddn.Status.NOT_A_MINIMUM,)


COPOSITIVE = ddn.Problem(
    {"u": (N,)}, {"K": (N, N)}, lambda u, K: 0.5 * u @ K @ u + u[0].square(), bounds={"u": (0.0, None)}
)


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "scipy:L-BFGS-B", "casadi:ipopt"])
def test_weakly_active_rows_count_for_the_second_order_condition(solver):
    """K >= 0 in every entry is indefinite, yet u = 0 is the minimum over u >= 0: the critical cone decides."""
    K = rand(N, N, seed=61).abs()
    K = K + K.T
    assert torch.linalg.eigvalsh(K)[0] < -1
    start = 0.1 * torch.ones(N, dtype=D)
    s = ddn.solve(COPOSITIVE, {"K": K}, solver=solver, initial=start)
    close(s["u"], torch.zeros(N, dtype=D), 1e-8)
    assert s.status == (ddn.Status.OPTIMAL,)
    assert s.certificate.one_sided
    assert ddn.sensitivity(COPOSITIVE, {"K": K}, torch.zeros(N, dtype=D)).certificate.sosc


def test_negative_curvature_beside_weakly_active_rows_is_found():
    problem = ddn.Problem(
        {"u": (N,)}, {"x": (N,)}, lambda u, x: (u - x)[1:].square().sum() - 0.1 * (u - x)[0].square() + (u - x)[0].pow(4),
        inequality={"half": lambda u, x: u[1] - x[1]},
    )  # fmt: skip
    x = rand(N, seed=62)
    with pytest.raises(ddn.SolveError) as error:
        ddn.solve(problem, {"x": x}, solver="scipy:SLSQP", initial=x)
    assert error.value.solution.status == (ddn.Status.NOT_A_MINIMUM,)
    found = ddn.sensitivity(problem, {"x": x}, x).certificate
    assert found.weakly_active["half"]
    assert not found.sosc


# -- what rounding must not make a non-minimum of -------------------------------------------------------------------


@on_solvers_of(LP, LOST_ON_LP)
def test_a_linear_programs_vertex_is_a_minimum(solver):
    c = ddn.solve(LP, vertex_data(2), solver=solver).certificate
    assert c.ok
    assert c.sosc
    assert c.null_space[0].shape == (N, 0)


DEGENERATE = ddn.linear_program(N, inequalities=N + 6)


@on_solvers_of(DEGENERATE, LOST_ON_LP)
def test_a_degenerate_vertex_is_a_minimum(solver):
    """26 rows meet in 20 dimensions: no non-minimum, and unique in spite of it."""
    G, y = rand(N + 6, N, seed=71), rand(N, seed=72)
    c = -G.T @ torch.rand(N + 6, generator=torch.Generator().manual_seed(73), dtype=D)
    s = ddn.solve(DEGENERATE, {"c": c, "G": G, "h": G @ y}, solver=solver)
    close(s["u"], y, 1e-8)
    assert s.status == (ddn.Status.OPTIMAL,)
    assert s.certificate.rank_deficiency == 6
    assert s.certificate.sosc


QUADRATIC = ddn.quadratic_program(N, equalities=3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rank", [0, 1, 5, N - 3])
@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_a_semidefinite_hessian_is_not_misjudged(rank, scale, solver):
    """Eigenvalues of P that are zero come out as -1e-16: flat directions, not descent."""
    root, A, y = rand(rank, N, seed=81), rand(3, N, seed=82), rand(N, seed=83)
    P = scale * root.T @ root
    p = {"P": P, "q": -P @ y - scale * A.T @ rand(3, seed=84), "A": A, "b": A @ y}
    s = ddn.solve(QUADRATIC, p, solver=solver, initial=y + 0.1 * rand(N, seed=85))
    assert s.status == (ddn.Status.OPTIMAL,)
    close(P @ (s["u"] - y) / scale, torch.zeros(N, dtype=D), 1e-7)
    c = ddn.sensitivity(QUADRATIC, p, y).certificate
    assert c.sosc == (rank == N - 3)
    assert c.null_space[0].shape == (N, max(0, N - 3 - rank))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("negative", [-1e-3, -1e-5])
def test_small_negative_curvature_is_not_taken_for_rounding(negative, scale):
    values = torch.cat([torch.tensor([negative], dtype=D), POSITIVE[1:]])
    p = {"K": curvature_with(values, 1.0), "x": rand(N, seed=52), "s": torch.tensor(scale, dtype=D)}
    with pytest.raises(ddn.SolveError) as error:
        ddn.solve(INDEFINITE, p, solver="scipy:SLSQP", initial=p["x"])
    assert error.value.solution.status == (ddn.Status.NOT_A_MINIMUM,)


# -- curvature that is chance, or that only weakly active rows hide -----------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "newton", "casadi:ipopt", "scipy:SLSQP"])
@pytest.mark.parametrize("start", [1.0, -0.7, 0.3])
def test_the_flat_minimum_of_a_quartic_has_no_derivative(solver, start):
    """u = (p/4)^(1/3) at p = 0: what is left of the curvature where the solver stops said 1e12, and ok."""
    problem = ddn.Problem({"u": ()}, {"p": ()}, lambda u, p: u**4 - p * u)
    p = torch.tensor(0.0, dtype=D, requires_grad=True)
    policy = ddn.Policy(on_failure="mask")
    solution = ddn.solve(
        problem, {"p": p}, solver=solver, initial=torch.tensor(start, dtype=D), policy=policy
    )
    assert not solution.certificate.ok
    if solution.converged:
        assert solution.certificate.singular
        with pytest.warns(ddn.DegeneracyWarning):
            torch.autograd.grad(solution["u"], p)


@pytest.mark.parametrize("p", [1e-6, 1e-4, 1e-2, 1.0])
def test_the_same_minimum_beside_the_flat_point_has_one(p):
    problem = ddn.Problem({"u": ()}, {"p": ()}, lambda u, p: u**4 - p * u)
    value = torch.tensor(p, dtype=D, requires_grad=True)
    solution = ddn.solve(problem, {"p": value}, initial=torch.tensor(1.0, dtype=D))
    assert solution.certificate.ok
    expected = (value / 4) ** (1 / 3)
    torch.testing.assert_close(solution["u"], expected)
    ours, theirs = (torch.autograd.grad(u, value)[0] for u in (solution["u"], expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", ["auto", "newton", "casadi:ipopt", "scipy:SLSQP"])
def test_where_two_circles_touch_there_is_no_derivative(solver):
    problem = ddn.Problem(
        {"u": (2,)},
        {"r": ()},
        lambda u: u[1],
        inequality=lambda u, r: torch.stack([u.square().sum() - r**2, (u[0] - 2) ** 2 + u[1] ** 2 - 1]),
    )
    solution = ddn.solve(problem, {"r": torch.tensor(1.0, dtype=D)}, solver=solver)
    assert not solution.certificate.ok
    assert solution.certificate.singular


def hyperbolic(u, x):
    return -x * u[0] * u[1]


def concave(u, x):
    return -x * u.square().sum()


@pytest.mark.parametrize("objective", [hyperbolic, concave])
@pytest.mark.parametrize("solver", ["auto", "daqp", "casadi:ipopt", "scipy:SLSQP"])
def test_a_maximum_at_weakly_active_bounds_is_no_solution(solver, objective):
    """At 0 all bounds are weakly active and leave no curvature; the way inside goes down."""
    pytest.importorskip("daqp")
    problem = ddn.Problem({"u": (2,)}, {"x": ()}, objective, bounds={"u": (0.0, 1.0)})
    policy = ddn.Policy(on_failure="mask")
    solution = ddn.solve(problem, {"x": torch.tensor(1.0, dtype=D)}, solver=solver, policy=policy)
    assert solution.converged or solution.status == (ddn.Status.NOT_A_MINIMUM,)
    if solution.converged or solver == "auto":
        torch.testing.assert_close(solution["u"], torch.ones(2, dtype=D))


def test_closed_directions_of_negative_curvature_leave_a_minimum():
    """u v over u, v >= 0: the curvature is negative along (1, -1), which leads out both ways."""
    problem = ddn.Problem({"u": (2,)}, {"x": ()}, lambda u, x: -hyperbolic(u, x), bounds={"u": (0.0, 1.0)})
    found = ddn.attach(problem, {"x": torch.tensor(1.0, dtype=D)}, torch.zeros(2, dtype=D))
    solution = ddn.solve(problem, {"x": torch.tensor(1.0, dtype=D)})
    assert solution.converged
    assert found.converged
    assert abs(solution.objective) < 1e-12


def test_an_unbounded_problem_is_not_solved_at_a_weakly_active_bound():
    problem = ddn.Problem(
        {"u": (2,)}, {"x": ()}, lambda u, x: -x * u.square().sum() - (u**4).sum(), bounds={"u": (0.0, None)}
    )
    with pytest.raises(ddn.SolveError) as refused:
        ddn.solve(problem, {"x": torch.tensor(1.0, dtype=D)})
    assert refused.value.solution.status == (ddn.Status.UNBOUNDED,)


def test_a_flat_minimum_is_one_in_any_batch():
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (), "c": ()},
        lambda u, x, c: (u[0] - x) ** 4 + c * (u[0] - x) ** 2 + (u[1] - x) ** 2,
    )
    x, c = torch.full((2,), 0.3, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    assert not ddn.solve(problem, {"x": x[0], "c": c[0]}).certificate.ok
    assert ddn.solve(problem, {"x": x, "c": c}).certificate.ok.tolist() == [False, True]


REGULAR = {
    "a steep valley": (lambda u, x: 1e5 * (u[1] - u[0] ** 2) ** 2 + (x[0] - u[0]) ** 2, [1.0, 0.0]),
    "a steep ring": (
        lambda u, x: 1e6 * (u.square().sum() - 1) ** 2 + 0.5 * (u - x).square().sum(),
        [1.0, 0.5],
    ),
    "a rounded corner": (
        lambda u, x: (u**2 + 1e-12).sqrt().sum() + 0.5 * (u - x).square().sum(),
        [0.5, -0.3],
    ),
    "a small unit": (lambda u, x: (1e6 * u).exp().sum() - 1e6 * (x * u).sum(), [2.0, 3.0]),
    "close to a norm's zero": (lambda u, x: 0.5 * (u - x).square().sum() + u.norm(), [0.60006, 0.80008]),
}


@pytest.mark.parametrize("name", REGULAR)
def test_strong_curvature_is_not_chance(name):
    """Solved to rounding, where the matrix a millionth away is another one: the derivative exists all the same."""
    objective, values = REGULAR[name]
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, objective)
    x, step = torch.tensor(values, dtype=D, requires_grad=True), 1e-6
    solution = ddn.solve(problem, {"x": x})
    assert solution.certificate.ok
    (gradient,) = torch.autograd.grad(solution["u"].sum(), x)
    ends = [
        ddn.solve(problem, {"x": x.detach() + s * step * torch.eye(2, dtype=D)})["u"].sum(-1) for s in (1, -1)
    ]
    torch.testing.assert_close(gradient, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["equality", "inequality"])
@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP"])
def test_a_small_ball_far_from_the_origin(solver, kind):
    """Its row is short, not vanishing; and multipliers of an interior point made its middle look like a solution."""
    sides = {kind: lambda u: (u - 1).square().sum() - 1e-8}
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), **sides)
    d = torch.tensor([1.0, 2.0, 3.0], dtype=D) / 14**0.5
    solution = ddn.solve(problem, {"x": 1 + 2e-4 * d}, solver=solver, initial=1 + 1.3e-4 * d)
    torch.testing.assert_close(solution["u"], 1 + 1e-4 * d, rtol=0, atol=1e-12)


def test_a_short_step_from_a_huge_multiplier_is_no_solution():
    """The step was 6e-11 and the multiplier fell from 2e6 to 1: the next one would have been long."""
    a = 1e-4
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (2,)},
        lambda u, x: (u - x).square().sum(),
        equality=lambda u: u[0] * u[1] - a**2,
        bounds={"u": (0.0, None)},
    )
    x, start = torch.tensor([2.0, 0.8], dtype=D) * a, torch.tensor([2.0, 0.5], dtype=D) * a
    solution = ddn.solve(problem, {"x": x}, initial=start)
    torch.testing.assert_close(solution["u"] / a, torch.tensor([1.9242949284, 0.5196708598], dtype=D))
    assert solution.residuals.stationarity < 1e-12
