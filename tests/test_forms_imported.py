"""Problems taken over from CVXPY and CasADi: against these libraries alone, in values, points and gradients."""

import functools
import pickle
import warnings

import casadi as ca
import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import ddn_solvers as ddn

FLOAT = torch.float64


def tensors(values, requires_grad=False):
    return {
        name: torch.tensor(np.asarray(value), dtype=FLOAT, requires_grad=requires_grad)
        for name, value in values.items()
    }


# --- expressions: the functions that come out have the values that CVXPY computes -----------------------------

u, v = cp.Variable(3, name="u"), cp.Variable(4, name="v")
s = cp.Variable(name="s")
M, R = cp.Variable((3, 3), name="M"), cp.Variable((2, 3), name="R")
K = cp.Variable((2, 3, 4), name="K")
a, W = cp.Parameter(3, name="a"), cp.Parameter((3, 3), name="W")
LEAVES = {leaf.name(): leaf for leaf in (u, v, s, M, R, K, a, W)}
ROWS = np.arange(1.0, 13.0).reshape(4, 3)
SPARSE = sp.csc_array(np.diag([1.0, 0.0, 3.0]))


def deprecated(make):
    with warnings.catch_warnings(action="ignore"):
        return make()


EXPRESSIONS = {
    # affine
    "add": u + a - 2 + s,
    "promote": s + np.ones((2, 2)),
    "negate": -(R - 1),
    "times a number": 3 * u / 4,
    "times a parameter": cp.multiply(a, u),
    "row times column": cp.multiply(R, np.array([[1.0], [2.0]])),
    "broadcast": cp.broadcast_to(u, (2, 3)) + R,
    "divide": u / (a + 1),
    "matrix vector": W @ u,
    "vector matrix": u @ W,
    "matrix matrix": R @ W @ M,
    "dot": a @ u,
    "scalar @ vector": s * u,
    "constants folded": cp.exp(cp.Constant(np.ones(3))) @ u,
    "sparse constant": SPARSE @ u,
    "batched matmul": K @ ROWS,
    "sum": cp.sum(R),
    "sum over rows": cp.sum(R, axis=0),
    "sum kept": cp.sum(R, axis=1, keepdims=True),
    "sum over two axes": cp.sum(K, axis=(0, 2)),
    "mean": cp.mean(R, axis=1),
    "trace": cp.trace(M @ W),
    "cumsum": cp.cumsum(R, axis=1),
    "cumsum over rows": cp.cumsum(R, axis=0),
    "diff": cp.diff(v, k=2),
    "kron": cp.kron(np.array([[1.0, 2.0], [3.0, 4.0]]), R),
    "conv": deprecated(lambda: cp.conv(np.array([1.0, -2.0, 0.5]), v)),
    "convolve": cp.convolve(a, v),
    "outer": cp.outer(a, u),
    "vdot": cp.vdot(W, M),
    # movements, Fortran order above all
    "vec": cp.vec(R, order="F"),
    "vec in C order": cp.vec(R, order="C"),
    "reshape": cp.reshape(R, (3, 2), order="F"),
    "reshape in C order": cp.reshape(R, (3, 2), order="C"),
    "reshape of three axes": cp.reshape(K, (4, 6), order="F"),
    "flatten": R.flatten(order="F"),
    "transpose": R.T,
    "permute": cp.transpose(K, (2, 0, 1)),
    "transposed and reshaped": cp.reshape(R.T @ R, (9,), order="F"),
    "slice": v[1:4:2],
    "reversed": v[::-1],
    "entry": R[1, 2],
    "row": R[1],
    "negative": v[-1],
    "new axis": u[:, None] + u[None, :],
    "list of rows": W[[2, 0]] @ u,
    "mask": u[np.array([True, False, True])],
    "pairs": M[[0, 1, 2], [2, 1, 0]],
    "hstack": cp.hstack([u, v, s]),
    "hstack of matrices": cp.hstack([R, np.ones((2, 1))]),
    "vstack": cp.vstack([R, M]),
    "bmat": cp.bmat([[R, np.zeros((2, 1))], [M, np.ones((3, 1))]]),
    "concatenate": cp.concatenate([R, M], axis=0),
    "stack": cp.stack([u, a], axis=1),
    "diagonal matrix": cp.diag(u) @ W,
    "shifted diagonal": cp.diag(u, k=1),
    "diagonal": cp.diag(M @ W),
    "upper triangle": cp.upper_tri(M),
    "matrix of triangle": cp.vec_to_upper_tri(u, strict=True),
    "squeeze": cp.squeeze(cp.reshape(u, (1, 3), order="C")),
    "einsum": cp.einsum("ij,j->i", W, u),
    "wraps": cp.psd_wrap(W) @ u,
    # atoms
    "abs": cp.abs(u - 2),
    "square": cp.square(u - a),
    "power 3": cp.power(u, 3),
    "power 1.5": cp.power(u, 1.5),
    "power -1": cp.power(u, -1),
    "atoms of a scalar": cp.hstack(
        [cp.log_sum_exp(s), cp.norm(s), cp.max(s), cp.sum_squares(s), cp.norm1(s), cp.sum(s)]
    ),
    "conv of a column": deprecated(
        lambda: cp.conv(np.array([1.0, -2.0, 0.5]), cp.reshape(v, (4, 1), order="F"))
    ),
    "power -2": cp.power(u, -2),
    "power -3": cp.power(u, -3),
    "power 0": cp.power(u, 0),
    "sqrt": cp.sqrt(u),
    "inv_pos": cp.inv_pos(u),
    "inv_prod": cp.inv_prod(u),
    "exp": cp.exp(u),
    "log": cp.log(u),
    "log1p": cp.log1p(u),
    "entr": cp.entr(u),
    "kl_div": cp.kl_div(u, a),
    "rel_entr": cp.rel_entr(u, a),
    "xexp": cp.xexp(u),
    "logistic": cp.logistic(20 * u),
    "huber": cp.huber(3 * u - 4, 1.5),
    "pos": cp.pos(u - 2),
    "neg": cp.neg(u - 2),
    "scalene": cp.scalene(u - 2, 2, 3),
    "maximum": cp.maximum(u, a, 2.0),
    "minimum": cp.minimum(u, a, 2.0),
    "sum_squares": cp.sum_squares(W @ u - a),
    "sum_squares over rows": cp.sum_squares(R, axis=1),
    "quad_form": cp.quad_form(u, np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])),
    "quad_over_lin": cp.quad_over_lin(u, s),
    "quad_over_lin of matrices": cp.quad_over_lin(R, cp.reshape(s, (1,), order="F")),
    "matrix_frac": cp.matrix_frac(u, W + 4 * np.eye(3) + W.T),
    "norm": cp.norm(u),
    "norm 1": cp.norm(R - 2, 1, axis=0),
    "norm1 of a matrix": cp.norm1(R - 2),
    "norm inf": cp.norm(u - 2, "inf"),
    "norm inf of rows": cp.norm_inf(R - 2, axis=1),
    "norm of rows": cp.norm(R, 2, axis=1),
    "Frobenius": cp.norm(R, "fro"),
    "pnorm": cp.pnorm(u, 3),
    "pnorm of less than one": cp.pnorm(u, 0.5),
    "harmonic_mean": cp.harmonic_mean(u),
    "mixed_norm": cp.mixed_norm(R, 2, 1),
    "max": cp.max(R),
    "max over rows": cp.max(R, axis=0),
    "min kept": cp.min(R, axis=1, keepdims=True),
    "ptp": cp.ptp(u),
    "log_sum_exp": cp.log_sum_exp(u),
    "log_sum_exp of rows": cp.log_sum_exp(R, axis=1, keepdims=True),
    "geo_mean": cp.geo_mean(u, [1, 2, 1]),
    "geo_mean of a matrix": cp.geo_mean(R, np.array([1, 2, 3, 1, 1, 2])),
    "geo_mean of rows": cp.geo_mean(R, [1, 2, 3], axis=1),
    "sum_largest": cp.sum_largest(R, 2),
    "sum_largest of a fraction": cp.sum_largest(v, 2.5),
    "sum_largest of rows": cp.sum_largest(R, 2, axis=1),
    "sum_smallest": cp.sum_smallest(v, 2),
    "cvar": cp.cvar(v, 0.6),
    "tv": cp.tv(v),
    "tv of a matrix": cp.tv(R),
    "std": cp.std(u),
    "var": cp.var(u),
    "prod": cp.prod(R, axis=1),
    "log_det": cp.log_det(M @ M.T + 3 * np.eye(3)),
    "tr_inv": cp.tr_inv(M @ M.T + 3 * np.eye(3)),
    "lambda_max": cp.lambda_max(M + M.T),
    "lambda_min": cp.lambda_min(M + M.T),
    "sigma_max": cp.sigma_max(R),
    "normNuc": cp.normNuc(R),
    "log_normcdf": cp.log_normcdf(u),
    "loggamma": cp.loggamma(u),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_has_the_values_that_cvxpy_computes(name):
    expression = EXPRESSIONS[name]
    rng = np.random.default_rng(3)
    for leaf in LEAVES.values():
        leaf.save_value(rng.uniform(0.5, 2.5, leaf.shape))
    problem = ddn.from_cvxpy(
        cp.Problem(cp.Minimize(0), [cp.constraints.Zero(expression)]),
        expression.parameters(),
        expression.variables(),
    )
    function = problem.equality["equality0"]
    values = tensors({name: LEAVES[name].value for name in function.arguments})
    result = function(**values)
    assert result.dtype == FLOAT
    assert tuple(result.shape) == expression.shape
    # CVXPY computes upper_tri without the second axis that it declares.
    computed = np.reshape(expression.value, expression.shape)
    np.testing.assert_allclose(result.numpy(), computed, rtol=1e-12, atol=1e-14)


# --- problems of CVXPY: points and gradients ---------------------------------------------------------------------

RNG = np.random.default_rng(12)


def seeded(make):
    """The numbers of a problem do not depend on which others were made before."""

    @functools.wraps(make)
    def fresh():
        RNG.bit_generator.state = np.random.default_rng(12).bit_generator.state
        return make()

    return fresh


TIGHT = {"solver": "CLARABEL", "tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
# Exponential cones do not always reach that. Where one variant ends as "optimal_inaccurate", too coarse for
# differences, others do not: their median is good.
VARIANTS = (
    {},
    {"equilibrate_enable": False},
    {"static_regularization_constant": 1e-13, "static_regularization_proportional": 0.0},
    {
        "iterative_refinement_reltol": 1e-16,
        "iterative_refinement_abstol": 1e-16,
        "iterative_refinement_max_iter": 50,
    },
    {"max_step_fraction": 0.9},
    {"max_step_fraction": 0.95},
)
CONVEX = ("auto", "cvxpy:CLARABEL", "casadi:ipopt", "scipy:SLSQP", "newton")


@seeded
def readme_of_cvxpylayers():
    x, A, b = cp.Variable(2, name="x"), cp.Parameter((3, 2), name="A"), cp.Parameter(3, name="b")
    problem = cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0])
    return problem, [A, b], [x], {"A": RNG.standard_normal((3, 2)), "b": RNG.standard_normal(3)}


@seeded
def portfolio():
    w, mu, root = cp.Variable(4), cp.Parameter(4), cp.Parameter((4, 4))
    problem = cp.Problem(
        cp.Maximize(mu @ w - cp.sum_squares(root @ w)),
        [(cp.sum(w) == 1).set_label("budget"), w >= 0, w <= 0.6],
    )
    mu_value, root_value = RNG.uniform(0, 1, 4), 0.5 * RNG.standard_normal((4, 4)) + np.eye(4)
    return problem, [mu, root], [w], {mu.name(): mu_value, root.name(): root_value}


@seeded
def fortran_order():
    """Would have another solution if reshapes and vec were taken row by row."""
    X, C = cp.Variable((2, 3), name="X"), cp.Parameter((3, 2), name="C")
    weights = np.arange(1.0, 7.0)
    objective = cp.sum_squares(cp.reshape(X, (3, 2), order="F") - C) + cp.square(
        weights @ cp.vec(X, order="F")
    )
    problem = cp.Problem(cp.Minimize(objective), [X[0] <= 0.4, cp.vec(X.T, order="F")[2] == 0.1])
    return problem, [C], [X], {"C": RNG.standard_normal((3, 2))}


@seeded
def entropy():
    p, q = cp.Variable(4, name="p"), cp.Parameter(4, name="q", pos=True)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.kl_div(p, q))), [cp.sum(p) == 1, p[0] + p[1] >= 0.7])
    return problem, [q], [p], {"q": RNG.uniform(0.5, 1.5, 4)}


@seeded
def logistic_regression():
    theta, offset = cp.Variable(3, name="theta"), cp.Variable(name="offset")
    X, y = cp.Parameter((8, 3), name="X"), np.sign(RNG.standard_normal(8))
    loss = cp.sum(cp.logistic(cp.multiply(-y, X @ theta + offset))) + 0.1 * cp.sum_squares(theta)
    return cp.Problem(cp.Minimize(loss)), [X], [theta, offset], {"X": RNG.standard_normal((8, 3))}


def cone():
    x, t, c = cp.Variable(3, name="x"), cp.Variable(name="t"), cp.Parameter(3, name="c")
    problem = cp.Problem(cp.Minimize(c @ x + t + 0.5 * t**2), [cp.SOC(t, x - np.array([1.0, 2.0, 3.0]))])
    return problem, [c], [x, t], {"c": np.array([0.5, 0.9, -0.3])}


def cones():
    X, r, C = cp.Variable((2, 3), name="X"), cp.Parameter(3, name="r"), cp.Parameter((2, 3), name="C")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.SOC(r, X, axis=0)])
    return (
        problem,
        [r, C],
        [X],
        {"r": np.array([0.5, 1.0, 0.2]), "C": np.array([[1.0, 1.2, 0.4], [2.0, 0.3, -1.0]])},
    )


def bounds_by_attributes():
    x = cp.Variable(3, name="x", nonneg=True)
    y = cp.Variable((2, 2), name="y", diag=True)
    z = cp.Variable(2, name="z", bounds=[np.array([-np.inf, 0.3]), 0.5])
    c = cp.Parameter(3, name="c")
    objective = cp.sum_squares(x - c) + cp.sum_squares(y - 1 - c[0]) + cp.sum_squares(z - c[1:])
    return (
        cp.Problem(cp.Minimize(objective + cp.sum(y) + cp.sum(x))),
        [c],
        [x, y, z],
        {"c": np.array([1.0, -2.0, 0.2])},
    )


@seeded
def symmetric():
    S, A = cp.Variable((3, 3), name="S", symmetric=True), cp.Parameter((3, 3), name="A")
    objective = cp.sum_squares(S - A) + cp.square(cp.trace(S)) + cp.sum(S[0])
    return cp.Problem(cp.Minimize(objective), [S[0, 2] <= 0.1]), [A], [S], {"A": RNG.standard_normal((3, 3))}


def domains():
    x, y, k = cp.Variable(3, name="x"), cp.Variable(2, name="y"), cp.Parameter(3, name="k")
    objective = cp.sum(cp.power(x, 3)) + k @ x - cp.sum(cp.sqrt(y + x[:2] + 1)) + cp.sum_squares(y)
    return cp.Problem(cp.Minimize(objective)), [k], [x, y], {"k": np.array([-1.0, -2.0, -0.5])}


def total_variation():
    x, b = cp.Variable(6, name="x"), cp.Parameter(6, name="b")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b) + 0.5 * cp.tv(x)))
    return problem, [b], [x], {"b": np.array([1.0, 1.1, 0.9, 3.0, 3.1, 2.0])}


@seeded
def huber_fit():
    x, A, b = cp.Variable(2, name="x"), cp.Parameter((6, 2), name="A"), cp.Parameter(6, name="b")
    objective = cp.sum(cp.huber(A @ x - b, 0.5)) + 0.1 * cp.log_sum_exp(x) + 0.01 * cp.sum_squares(x)
    values = {"A": RNG.standard_normal((6, 2)), "b": RNG.standard_normal(6)}
    return cp.Problem(cp.Minimize(objective)), [A, b], [x], values


@seeded
def quadratic_form():
    x, P, q = cp.Variable(3, name="x"), cp.Parameter((3, 3), name="P", PSD=True), cp.Parameter(3, name="q")
    root = RNG.standard_normal((3, 3))
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [x >= -0.5, cp.sum(x) == 1])
    return problem, [P, q], [x], {"P": root @ root.T + np.eye(3), "q": RNG.standard_normal(3)}


CVXPY_PROBLEMS = (
    readme_of_cvxpylayers,
    portfolio,
    fortran_order,
    entropy,
    logistic_regression,
    cone,
    cones,
    bounds_by_attributes,
    symmetric,
    domains,
    total_variation,
    huber_fit,
    quadratic_form,
)


def solved_by_cvxpy(problem, parameters, variables, values):
    for parameter in parameters:
        value = values[parameter.name()]
        # CVXPY reads one triangle of what it takes for symmetric.
        parameter.save_value((value + value.T) / 2 if parameter.attributes["PSD"] else value)
    points = []
    with warnings.catch_warnings(action="ignore"):  # of inaccurate solutions
        for variant in VARIANTS:
            problem.solve(**TIGHT | variant)
            dense = [v.value.toarray() if sp.issparse(v.value) else v.value for v in variables]
            points.append(np.concatenate([np.ravel(value) for value in dense]))
            if problem.status == "optimal":
                return points[-1]
    return np.median(points, axis=0)


def flat(solution):
    return torch.cat([value.reshape(-1) for value in solution.primal.values()])


def differences(point, values, weights, h=1e-2):
    """Of weights . point in every entry of every parameter: central, extrapolated from h, h / 2 and h / 4."""

    def slope(name, index, step):
        ends = []
        for sign in (1, -1):
            moved = np.array(values[name], dtype=float)
            moved[index] += sign * step
            ends.append(weights @ point({**values, name: moved}))
        return (ends[0] - ends[1]) / (2 * step)

    gradients = {}
    for name, value in values.items():
        gradients[name] = np.zeros(np.shape(value))
        for index in np.ndindex(np.shape(value)):
            coarse, middle, fine = (slope(name, index, step) for step in (h, h / 2, h / 4))
            gradients[name][index] = (64 * fine - 20 * middle + coarse) / 45
    return gradients


def gradient_of(problem, values, weights, solver, initial=None):
    inputs = tensors(values, requires_grad=True)
    solution = ddn.solve(problem, inputs, solver=solver, initial=initial)
    (torch.tensor(weights) @ flat(solution)).backward()
    return solution, {name: value.grad.numpy() for name, value in inputs.items()}


# What a problem needs besides the defaults: how far to step in differences, backends that cannot take it.
STEP = {domains: 5e-2, entropy: 2e-3, huber_fit: 2e-3}  # CVXPY finds its point to 1e-8 only, and not always
NOT_BY = {(readme_of_cvxpylayers, "newton")}  # does not get past the kinks
CASES = [(make, solver) for make in CVXPY_PROBLEMS for solver in CONVEX if (make, solver) not in NOT_BY]


@pytest.fixture(scope="module")
def reference():
    """Each problem with CVXPY's point, weights, and the differences of CVXPY's solutions; made once."""
    made = {}

    def of(make):
        if make not in made:
            problem, parameters, variables, values = make()
            point = solved_by_cvxpy(problem, parameters, variables, values)
            value = problem.value
            weights = np.random.default_rng(5).standard_normal(len(point))
            slopes = differences(
                lambda moved: solved_by_cvxpy(problem, parameters, variables, moved),
                values,
                weights,
                STEP.get(make, 1e-2),
            )
            imported = ddn.from_cvxpy(problem, parameters, variables)
            made[make] = problem, imported, values, point, value, weights, slopes
        return made[make]

    return of


@pytest.mark.parametrize(("make", "solver"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_points_and_gradients_are_those_of_cvxpy(make, solver, reference):
    problem, imported, values, point, value, weights, slopes = reference(make)
    solution, gradients = gradient_of(imported, values, weights, solver)
    sign = -1 if isinstance(problem.objective, cp.Maximize) else 1
    np.testing.assert_allclose(flat(solution).detach().numpy(), point, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(float(solution.objective.detach()), sign * value, rtol=1e-7, atol=1e-7)
    assert bool(solution.certificate.ok)
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, rtol=1e-6, atol=1e-6 * max(1, abs(slope).max()))


def test_the_readme_of_cvxpylayers():
    torch.manual_seed(0)
    n, m = 2, 3
    x, A, b = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0])
    layer = ddn.DeclarativeLayer(ddn.from_cvxpy(problem, parameters=[A, b], variables=[x]))
    A_tch = torch.randn(5, m, n, dtype=FLOAT, requires_grad=True)
    b_tch = torch.randn(m, dtype=FLOAT, requires_grad=True)

    solution = layer(A_tch, b_tch)

    solution.sum().backward()
    assert solution.shape == (5, 2)
    assert A_tch.grad.shape == (5, m, n)
    assert b_tch.grad.shape == (m,)
    for k in range(5):
        A.value, b.value = A_tch[k].detach().numpy(), b_tch.detach().numpy()
        problem.solve(**TIGHT)
        np.testing.assert_allclose(solution[k].detach().numpy(), x.value, atol=1e-8)
        alone = layer(A_tch[k], b_tch)
        np.testing.assert_array_equal(alone.detach(), solution[k].detach())


@pytest.mark.parametrize("make", [portfolio, fortran_order, entropy, quadratic_form])
def test_a_batch_is_its_samples(make):
    problem, parameters, variables, values = make()
    layer = ddn.DeclarativeLayer(ddn.from_cvxpy(problem, parameters, variables))
    batch = [
        value + 0.01 * torch.arange(3.0, dtype=FLOAT).reshape(3, *[1] * value.dim())
        for value in tensors(values).values()
    ]
    whole = layer(*batch)
    for k in range(3):
        np.testing.assert_array_equal(layer(*(value[k] for value in batch)), whole[k])


def test_a_layer_is_float32_outside_and_can_be_pickled():
    problem, parameters, variables, values = fortran_order()
    layer = pickle.loads(pickle.dumps(ddn.DeclarativeLayer(ddn.from_cvxpy(problem, parameters, variables))))
    C = torch.tensor(values["C"], dtype=torch.float32, requires_grad=True)
    X = layer(C)
    X.sum().backward()
    assert X.dtype == C.grad.dtype == torch.float32
    np.testing.assert_allclose(
        X.detach(),
        solved_by_cvxpy(problem, parameters, variables, values).reshape(2, 3),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_second_derivative_is_that_of_the_first():
    problem, parameters, variables, values = entropy()
    imported = ddn.from_cvxpy(problem, parameters, variables)
    q = tensors(values, requires_grad=True)["q"]
    assert torch.autograd.gradgradcheck(lambda q: ddn.solve(imported, {"q": q})["p"], q)


# --- declarations of CVXPY -----------------------------------------------------------------------------------------


def test_listed_variables_come_first_and_the_others_follow():
    x, y, z, p = (
        cp.Variable(2, name="x"),
        cp.Variable(name="y"),
        cp.Variable((1, 3), name="z"),
        cp.Parameter(name="p"),
    )
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p) + cp.square(y - 1) + cp.sum_squares(z)))
    imported = ddn.from_cvxpy(problem, [p], [z])
    assert list(imported.variables.items()) == [("z", (1, 3)), ("x", (2,)), ("y", ())]
    assert [tuple(value.shape) for value in ddn.DeclarativeLayer(imported)(torch.tensor(2.0))] == [
        (1, 3),
        (2,),
        (),
    ]


def test_names_are_those_of_cvxpy_where_they_can_be():
    x, same, also, odd = (
        cp.Variable(),
        cp.Variable(name="t"),
        cp.Parameter(name="t"),
        cp.Variable(name="my x"),
    )
    reserved, keyword, taken = (
        cp.Parameter(name="initial"),
        cp.Parameter(name="lambda"),
        cp.Variable(name="variable1"),
    )
    objective = cp.sum_squares(cp.hstack([x, same, odd, taken]) - also - reserved - keyword)
    imported = ddn.from_cvxpy(
        cp.Problem(cp.Minimize(objective)), [also, reserved, keyword], [x, same, odd, taken]
    )
    assert list(imported.variables) == [x.name(), "variable1_", "variable2", "variable1"]
    assert list(imported.parameters) == ["parameter0", "parameter1", "parameter2"]


def test_constraints_are_called_by_their_label_or_by_their_place():
    x, p = cp.Variable(2, name="x"), cp.Parameter(name="p")
    constraints = [
        x[0] == p,
        (cp.sum(x) <= 2).set_label("total"),
        x >= -1,
        cp.NonNeg(x + 5),
        cp.constraints.Zero(x[1] - 1),
        cp.SOC(p + 3, x),
        True,
        cp.Constant(1) <= 2,
    ]
    imported = ddn.from_cvxpy(cp.Problem(cp.Minimize(0), constraints), [p], [x])
    assert list(imported.equality) == ["equality0", "equality1"]
    assert list(imported.inequality) == ["total", "inequality1", "inequality2", "inequality3"]
    assert imported.objective is None
    solution = ddn.solve(imported, {"p": torch.tensor(0.5)})
    np.testing.assert_allclose(solution["x"], [0.5, 1.0])


def test_multipliers_are_those_of_cvxpy():
    problem, parameters, variables, values = portfolio()
    imported = ddn.from_cvxpy(problem, parameters, variables)
    solution = ddn.solve(imported, tensors(values))
    solved_by_cvxpy(problem, parameters, variables, values)
    for name, constraint in zip(("inequality0", "inequality1"), problem.constraints[1:], strict=True):
        np.testing.assert_allclose(solution.dual.inequality[name], constraint.dual_value, atol=1e-8)
    # Of an equality CVXPY negates the multiplier in the maximisation; ours is of the minimisation.
    np.testing.assert_allclose(
        abs(float(solution.dual.equality["budget"])), abs(problem.constraints[0].dual_value), atol=1e-8
    )


def test_attributes_become_bounds():
    p = cp.Parameter(2, name="p")
    free, nonneg, neg = (
        cp.Variable(name="free"),
        cp.Variable(2, name="nonneg", nonneg=True),
        cp.Variable(name="neg", neg=True),
    )
    boxed = cp.Variable(2, name="boxed", bounds=[-1, p])
    diagonal = cp.Variable((2, 2), name="diagonal", diag=True)
    sparse = cp.Variable((2, 2), name="sparse", sparsity=([0, 1], [1, 1]))
    every = [free, nonneg, neg, boxed, diagonal, sparse]
    imported = ddn.from_cvxpy(
        cp.Problem(cp.Minimize(sum(cp.sum_squares(variable - 3) for variable in every))), [p], []
    )
    assert imported.bounds["free"] == (None, None)
    assert imported.bounds["nonneg"][0].tolist() == [0, 0]
    assert imported.bounds["nonneg"][1] is None
    assert imported.bounds["neg"][1].tolist() == 0
    assert imported.bounds["boxed"][0].tolist() == [-1, -1]
    assert imported.bounds["diagonal"][0].tolist() == [[-np.inf, 0], [0, -np.inf]]
    assert imported.bounds["sparse"][1].tolist() == [[0, np.inf], [0, np.inf]]
    p_value = torch.tensor([0.5, 4.0], dtype=FLOAT, requires_grad=True)
    solution = ddn.solve(imported, {"p": p_value})
    solution["boxed"].sum().backward()
    np.testing.assert_allclose(solution["boxed"].detach(), [0.5, 3.0])
    np.testing.assert_allclose(p_value.grad, [1.0, 0.0])
    np.testing.assert_allclose(solution["neg"].detach(), 0.0)


def test_the_domain_of_an_atom_is_stated_once():
    x, y, p = cp.Variable(2, name="x"), cp.Variable(2, name="y"), cp.Parameter(2, name="p", nonneg=True)
    objective = (
        cp.sum(cp.power(x, 3))
        + cp.sum(cp.power(y - 1, 3))
        - cp.sum(cp.log1p(cp.reshape(x, (2, 1), order="F")))
    )
    implied = cp.Problem(cp.Minimize(objective + p @ x + p @ y + cp.sum(cp.power(p, 3))))
    imported = ddn.from_cvxpy(implied, [p], [x, y])
    assert imported.bounds["x"][0].tolist() == [0, 0]
    assert imported.bounds["y"] == (None, None)
    assert list(imported.inequality) == ["domain0"]
    solution = ddn.solve(imported, {"p": torch.tensor([2.0, 0.5], dtype=FLOAT)})
    np.testing.assert_allclose(
        solution["y"], [1.0, 1.0]
    )  # at the domain's edge, outside of which y^3 goes on
    np.testing.assert_allclose(solution.dual.inequality["domain0"], [2.0, 0.5])
    stated = cp.Problem(cp.Minimize(cp.sum(cp.power(x, 3)) + p @ x), [x >= 0])
    assert list(ddn.from_cvxpy(stated, [p], [x]).inequality) == ["inequality0"]
    assert ddn.from_cvxpy(stated, [p], [x]).bounds["x"] == (None, None)  # else at x = 0 two rows would be one


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "newton", "cvxpy:CLARABEL"])
def test_a_logarithm_is_started_inside_its_domain(solver):
    x, y, c = cp.Variable(3, name="x"), cp.Variable((2, 2), name="y"), cp.Parameter(3, name="c", pos=True)
    gain = c @ cp.log(x) + cp.log(y[1, 0]) + cp.sqrt(y[0, 1]) - cp.sum_squares(y) - cp.inv_pos(y[1, 1])
    imported = ddn.from_cvxpy(cp.Problem(cp.Maximize(gain), [x >= 0, cp.sum(x) <= 1]), [c], [x, y])
    assert imported.bounds["x"][0].tolist() == [0, 0, 0]
    assert imported.bounds["y"][0].tolist() == [[-np.inf, 0], [0, 0]]
    solution = ddn.solve(imported, {"c": torch.tensor([1.0, 2.0, 5.0])}, solver=solver)
    np.testing.assert_allclose(solution["x"], [1 / 8, 2 / 8, 5 / 8], rtol=1e-6)
    np.testing.assert_allclose(
        solution["y"], [[0, 4 ** (-2 / 3)], [0.5**0.5, 0.5 ** (1 / 3)]], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("solver", CONVEX)
def test_a_reciprocal_stays_in_its_domain(solver):
    """1 / x goes on below zero, where inv_pos is not defined: the objective would have no minimum there."""
    x, p = cp.Variable(2, name="x"), cp.Parameter(2, name="p")
    problem = cp.Problem(cp.Minimize(cp.sum(cp.inv_pos(np.array([[1.0, 0.5], [0.0, 1.0]]) @ x + 1)) + p @ x))
    imported = ddn.from_cvxpy(problem, [p], [x])
    solution = ddn.solve(imported, {"p": torch.tensor([1.0, 2.0])}, solver=solver)
    p.value = np.array([1.0, 2.0])
    problem.solve(**TIGHT)
    np.testing.assert_allclose(solution["x"], x.value, atol=1e-6)


def test_problems_that_are_not_dcp_are_taken_too():
    x, p = cp.Variable(2, name="x"), cp.Parameter(name="p")
    problem = cp.Problem(cp.Minimize(cp.square(1 - x[0]) + p * cp.square(x[1] - cp.square(x[0]))))
    assert not problem.is_dcp()
    solution = ddn.solve(ddn.from_cvxpy(problem, [p], [x]), {"p": torch.tensor(100.0)}, solver="casadi:ipopt")
    np.testing.assert_allclose(solution["x"], [1.0, 1.0], atol=1e-6)


def test_log_det_of_a_symmetric_variable():
    """min trace(S X) - log det X, whose solution is the inverse of S; the path has to start inside."""
    X, S = cp.Variable((3, 3), name="X", symmetric=True), cp.Parameter((3, 3), name="S")
    imported = ddn.from_cvxpy(cp.Problem(cp.Minimize(cp.trace(S @ X) - cp.log_det(X))), [S], [X])
    root = torch.randn(3, 3, dtype=FLOAT, generator=torch.Generator().manual_seed(1))
    S_value = (root @ root.T + torch.eye(3, dtype=FLOAT)).requires_grad_()
    for solver in ("casadi:ipopt", "cvxpy:SCS"):
        options = {} if solver != "cvxpy:SCS" else {"tolerance": 1e-8}
        solution = ddn.solve(imported, {"S": S_value}, solver=solver, initial=torch.eye(3), options=options)
        np.testing.assert_allclose(solution["X"].detach(), torch.linalg.inv(S_value).detach(), atol=1e-7)
        (gradient,) = torch.autograd.grad(solution["X"][0, 1], S_value)
        (expected,) = torch.autograd.grad(torch.linalg.inv((S_value + S_value.T) / 2)[0, 1], S_value)
        np.testing.assert_allclose((gradient + gradient.T) / 2, expected, atol=1e-8)


def refused(match, make):
    return pytest.param(make, match, id=match)


def minimised(expression, *constraints, parameters=(), variables=()):
    return lambda: ddn.from_cvxpy(
        cp.Problem(cp.Minimize(expression), list(constraints)), list(parameters), list(variables)
    )


X2, BOOL, INT = (
    cp.Variable((2, 2), name="X2"),
    cp.Variable(name="bool", boolean=True),
    cp.Variable(name="int", integer=True),
)
q0 = cp.Parameter(name="q0", nonneg=True)
PROBLEM = cp.Problem(cp.Minimize(cp.sum_squares(u - a)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        refused(
            "problem is not a CVXPY problem; expected a cvxpy.Problem; got dict",
            lambda: ddn.from_cvxpy({}, [], []),
        ),
        refused(
            "parameters is not a list; expected a list of cvxpy.Parameter; got Parameter",
            lambda: ddn.from_cvxpy(PROBLEM, a, [u]),
        ),
        refused("variables is not a list", lambda: ddn.from_cvxpy(PROBLEM, [a], u)),
        refused(
            "variables holds something else than a cvxpy.Variable; got Parameter",
            lambda: ddn.from_cvxpy(PROBLEM, [a], [a]),
        ),
        refused("parameters lacks 'a'", lambda: ddn.from_cvxpy(PROBLEM, [], [u])),
        refused(
            "parameters lists 'W', which does not occur in the problem; expected out of 'a'",
            lambda: ddn.from_cvxpy(PROBLEM, [a, W], [u]),
        ),
        refused(
            "variables lists 'v', which does not occur in the problem",
            lambda: ddn.from_cvxpy(PROBLEM, [a], [u, v]),
        ),
        refused("variables lists 'u' twice", lambda: ddn.from_cvxpy(PROBLEM, [a], [u, u])),
        refused("the variable 'bool' is declared boolean", minimised(BOOL)),
        refused("the variable 'int' is declared integer", minimised(INT)),
        refused(
            "is declared PSD; .*symmetric=True with log_det",
            minimised(cp.trace(cp.Variable((2, 2), PSD=True))),
        ),
        refused("is declared complex", minimised(cp.abs(cp.Variable(complex=True)))),
        refused("is declared hermitian", minimised(cp.norm(cp.Variable((2, 2), hermitian=True)))),
        refused(
            "the parameter 'z' is complex",
            lambda: (lambda z: minimised(cp.abs(s - z), parameters=[z])())(
                cp.Parameter(complex=True, name="z")
            ),
        ),
        refused(
            "the constraint 'X2 .* >> 0' is a semidefinite cone; expected equalities, inequalities and second-order",
            minimised(cp.trace(X2), X2 >> 0),
        ),
        refused("is an exponential cone", minimised(s, cp.ExpCone(u[0], u[1], u[2]))),
        refused("is a power cone", minimised(s, cp.PowCone3D(u[0], u[1], u[2], 0.3))),
        refused("is a finite set", minimised(s, cp.FiniteSet(s, [1.0, 2.0]))),
        refused("the constraint '1.0 <= 0.0' does not hold for any value", minimised(s, False)),
        refused(
            "two constraints are called 'twice'",
            minimised(s, (s >= 0).set_label("twice"), (s == 0).set_label("twice")),
        ),
        refused(
            "inequality has an unusable name; expected a string without dots; got 'a.b'",
            minimised(s, (s >= 0).set_label("a.b")),
        ),
        refused(
            r"CVXPY's atom 'dotsort' in 'dotsort\(u, .*' is not known here",
            minimised(cp.dotsort(u, np.ones(3))),
        ),
        refused("CVXPY's atom 'ceil' in 'ceil", minimised(cp.ceil(s))),
        refused("the threshold of .* is a parameter", minimised(cp.huber(s, q0), parameters=[q0])),
        refused("is a geo_mean with a zero weight", minimised(-cp.geo_mean(u, [1, 0, 1]))),
        refused("'1j' is complex; expected real numbers", minimised(cp.abs(s + cp.Constant(1j)))),
        refused(
            "the constraint label 'domain0' is a name that is given to Promote",
            minimised(cp.sum(cp.power(u - 1, 3)), (u >= 0).set_label("domain0")),
        ),
        refused("variables is empty", minimised(cp.Constant(0))),
    ],
)
def test_what_cannot_be_taken_over_is_named(make, match):
    with pytest.raises(ddn.ProblemError, match=match):
        make()


def test_messages_quote_the_expression():
    x = cp.Variable(2, name="x")
    problem = ddn.from_cvxpy(
        cp.Problem(cp.Minimize(cp.sum(cp.exp(x) - cp.entr(x + 1) - cp.exp(2 * x)))), [], [x]
    )
    with pytest.raises(ddn.BackendCannotSolve, match=r"'add' at 'exp\(x\) \+ .*' is neither convex"):
        ddn.solve(problem, {}, solver="cvxpy:CLARABEL")


# --- CasADi: the functions that come out have the values that CasADi computes ----------------------------------


def of_two(function):
    return lambda x, p: function(x, p[0])


OPERATIONS = {
    "add": lambda x, p: x + p[0],
    "subtract": lambda x, p: x - ca.vertcat(p, 1),
    "negate": lambda x, p: -x,
    "twice": lambda x, p: 2 * x,
    "multiply": lambda x, p: x * p[1],
    "divide": lambda x, p: x / (p[0] + 3) + p[1] / x,
    "scale": lambda x, p: 3 * x / 7 - 1,
    "linear chain": lambda x, p: ca.sum1(x) - 2 * (x[0] - 3 * x[1] + p[0]) + 4 - x[0],
    "cancelling": lambda x, p: (x + p[0]) - (x + p[0]),
    "used twice": lambda x, p: (x + 1) ** 2 + (x + 1) * p[0],
    "powers": lambda x, p: ca.vertcat(
        x[0] ** 3, x[1] ** -2.5, x[2] ** 0.5, 2 ** x[0], x[1] ** p[0], x[2] ** 3
    ),
    "matrix product": lambda x, p: ca.mtimes(ca.mtimes(x, x.T), ca.DM(ROWS[:3])) @ x,
    "dot": lambda x, p: ca.dot(x, x * p[0]),
    "norms": lambda x, p: ca.vertcat(ca.norm_2(x), ca.norm_1(x), ca.norm_inf(x - 2), ca.sumsqr(x)),
    "determinant": lambda x, p: ca.det(ca.diag(x) + ca.DM.ones(3, 3)),
    "solve": lambda x, p: ca.solve(ca.diag(x) + ca.DM.ones(3, 3), ca.vertcat(p, 1)),
    "smooth": lambda x, p: ca.vertcat(
        *(
            f(x[0] / 4)
            for f in (ca.sin, ca.cos, ca.tan, ca.asin, ca.acos, ca.atan, ca.sinh, ca.cosh, ca.tanh, ca.asinh)
        ),
        *(f(x[1]) for f in (ca.exp, ca.log, ca.sqrt, ca.log1p, ca.expm1, ca.erf, ca.log10)),
        ca.acosh(x[1] + 1),
        ca.atanh(x[0] / 4),
        ca.atan2(x[1], x[0]),
        ca.erfinv(x[0] / 4),
        ca.hypot(x[0], x[1]),
        1 / x[2],
    ),
    "kinked": lambda x, p: ca.vertcat(
        ca.fabs(x - 1),
        ca.fmin(x, p[0]),
        ca.fmax(x, p[0]),
        ca.sign(x - 1),
        ca.floor(3 * x),
        ca.ceil(3 * x),
        ca.fmod(3 * x, p[0]),
        ca.remainder(7 * x, p[0]),
        ca.copysign(x, p[0] - 5),
        ca.mmax(x),
        ca.mmin(x),
    ),
    "logic": lambda x, p: ca.vertcat(
        x < p[0],
        x <= p[0],
        x == p[0],
        x != p[0],
        x > p[0],
        ca.logic_not(x > 1),
        ca.logic_and(x[0] > 1, x[1] > 1),
        ca.logic_or(x[0] > 1, x[1] > 1),
        ca.if_else(x > 1, ca.sin(x), x**2),
    ),
    "sparse": lambda x, p: ca.vec(ca.diag(x) * p[0]),
    "constant": lambda x, p: ca.vertcat(4.0, x[0], 0.0),
    "stacked": lambda x, p: ca.vertcat(x[2], p, x[0]),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in OPERATIONS for kind in (ca.SX, ca.MX) if (name, kind) != ("solve", ca.MX)],
)
def test_a_function_has_the_values_that_casadi_computes(name, kind):
    x, p = kind.sym("x", 3), kind.sym("p", 2)
    g = OPERATIONS[name](x, p)
    imported = ddn.from_casadi({"x": x, "p": p, "g": g}, lbg=0, ubg=0)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x_value, p_value = rng.uniform(0.3, 2.5, 3), rng.uniform(0.5, 2.0, 2)
        known = {"x": torch.tensor(x_value), "p": torch.tensor(p_value)}
        function = imported.equality["g_equal"]
        result = function(**{argument: known[argument] for argument in function.arguments})
        expected = ca.Function("g", [x, p], [g])(x_value, p_value).toarray().ravel(order="F")
        np.testing.assert_allclose(
            result.numpy(), expected, rtol=1e-8 if name == "smooth" else 1e-13, atol=1e-14
        )


def test_equal_stages_are_taken_together():
    """A hundred stages make as many steps as two: what depends on others in the same way is one vector."""

    def steps(stages):
        X, U = ca.SX.sym("X", 2, stages + 1), ca.SX.sym("U", stages)
        defects = [
            X[:, k + 1] - X[:, k] - 0.1 * ca.vertcat(X[1, k], ca.sin(X[0, k]) * U[k] + X[1, k] ** 2)
            for k in range(stages)
        ]
        nlp = {"x": ca.veccat(X, U), "f": ca.sumsqr(X) + ca.sumsqr(U), "g": ca.vertcat(*defects)}
        imported = ddn.from_casadi(nlp, lbg=0, ubg=0)
        return len(imported.equality["g_equal"].steps), len(imported.objective.steps)

    assert steps(100) == steps(2)


# --- NLPs of CasADi: points and gradients ------------------------------------------------------------------------

SILENT = {
    "ipopt.print_level": 0,
    "print_time": False,
    "ipopt.sb": "yes",
    "ipopt.tol": 1e-12,
    "ipopt.bound_relax_factor": 0.0,
}
GENERAL = ("auto", "casadi:ipopt", "scipy:SLSQP")


def rosenbrock():
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    nlp = {"x": x, "p": p, "f": (1 - x[0]) ** 2 + p[0] * (x[1] - x[0] ** 2) ** 2, "g": x[0] ** 2 + x[1] ** 2}
    return nlp, {"lbg": -np.inf, "ubg": p[1]}, {}, {"p": np.array([50.0, 1.0])}


def van_der_pol():
    """Multiple shooting by Runge and Kutta's method, as in CasADi's examples."""
    N, dt = 10, 0.5
    state, control = ca.MX.sym("state", 2), ca.MX.sym("control")
    slope = ca.vertcat((1 - state[1] ** 2) * state[0] - state[1] + control, state[0])
    f = ca.Function("f", [state, control], [slope])
    k1 = f(state, control)
    k2 = f(state + dt / 2 * k1, control)
    k3 = f(state + dt / 2 * k2, control)
    k4 = f(state + dt * k3, control)
    step = ca.Function("step", [state, control], [state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)])
    X, U, x0 = ca.MX.sym("X", 2, N + 1), ca.MX.sym("U", N), ca.MX.sym("x0", 2)
    defects = [step(X[:, k], U[k]) - X[:, k + 1] for k in range(N)]
    nlp = {
        "x": ca.veccat(X, U),
        "p": x0,
        "f": ca.sumsqr(X) + ca.sumsqr(U),
        "g": ca.vertcat(X[:, 0] - x0, *defects),
    }
    lower = np.r_[np.tile([-np.inf, -0.25], N + 1), -np.ones(N)]
    bounds = {"lbx": lower, "ubx": np.r_[np.full(2 * N + 2, np.inf), np.ones(N)], "lbg": 0, "ubg": 0}
    return (
        nlp,
        bounds,
        {"variables": {"X": (2, N + 1), "U": (N,)}, "parameters": {"x0": (2,)}},
        {"x0": np.array([0.0, 1.0])},
    )


def rows_of_every_kind():
    """Equal, one-sided, two-sided, free; bounds of x and of g that depend on p."""
    x, p = ca.MX.sym("x", 4), ca.MX.sym("p", 3)
    g = ca.vertcat(x[0] * x[1], ca.sin(x[2]) + x[3], ca.sum1(x), x[0] - x[3], x[1] ** 2)
    nlp = {"x": x, "p": p, "f": ca.sumsqr(x - ca.vertcat(p, 1)) + ca.exp(x[0]) * p[1] ** 2, "g": g}
    bounds = {
        "lbx": ca.vertcat(-p[0], -np.inf, 0.1, -1),
        "ubx": [1, 2, 3, ca.inf],
        "lbg": ca.vertcat(-1, p[0] - 0.2, -ca.inf, -ca.inf, -2),
        "ubg": ca.vertcat(0.3, p[0] - 0.2, p[2], ca.inf, 5),
    }
    return nlp, bounds, {}, {"p": np.array([0.7, 1.2, 0.5])}


def matrices():
    """X and B enter column by column."""
    X, B = ca.SX.sym("X", 2, 3), ca.SX.sym("B", 3, 2)
    nlp = {"x": ca.vec(X), "p": ca.vec(B), "f": ca.sumsqr(X - B.T) + ca.trace(X @ B) ** 2, "g": X[0, :].T}
    value = np.random.default_rng(2).standard_normal((3, 2))
    return nlp, {"ubg": 0.2}, {"variables": {"X": (2, 3)}, "parameters": {"B": (3, 2)}}, {"B": value}


NLPS = [rosenbrock, van_der_pol, rows_of_every_kind, matrices]


def solver_of_casadi(nlp, bounds):
    """Point as a function of the flat p; bounds that depend on p are moved into rows of g."""
    p, kind = nlp["p"], type(nlp["x"])
    solver = ca.nlpsol("solver", "ipopt", nlp, SILENT)
    evaluated = {
        name: ca.Function(name, [p], [ca.vec(kind(bound if isinstance(bound, kind) else ca.DM(bound)))])
        for name, bound in bounds.items()
    }

    def point(p_value):
        solution = solver(
            x0=0.1, p=p_value, **{name: function(p_value) for name, function in evaluated.items()}
        )
        assert solver.stats()["success"]
        return solution["x"].toarray().ravel(), float(solution["f"]), solution["lam_g"].toarray().ravel()

    return point


def column_by_column(values):
    return np.concatenate([np.ravel(value, order="F") for value in values.values()])


def columns_of(solution):
    flat_values = [
        value.permute(*reversed(range(value.dim()))).reshape(-1) for value in solution.primal.values()
    ]
    return torch.cat(flat_values)


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("make", NLPS)
def test_points_and_gradients_are_those_of_casadi(make, solver):
    nlp, bounds, names, values = make()
    point = solver_of_casadi(nlp, bounds)
    expected, objective, _ = point(column_by_column(values))
    weights = np.random.default_rng(5).standard_normal(len(expected))
    inputs = tensors(values, requires_grad=True)
    initial = {
        name: torch.full(shape, 0.1)
        for name, shape in ddn.from_casadi(nlp, **bounds, **names).variables.items()
    }
    solution = ddn.solve(ddn.from_casadi(nlp, **bounds, **names), inputs, solver=solver, initial=initial)
    (torch.tensor(weights) @ columns_of(solution)).backward()
    np.testing.assert_allclose(columns_of(solution).detach().numpy(), expected, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(float(solution.objective.detach()), objective, rtol=1e-9, atol=1e-9)
    assert bool(solution.certificate.ok)
    slopes = differences(lambda moved: point(column_by_column(moved))[0], values, weights)
    for name, slope in slopes.items():
        np.testing.assert_allclose(inputs[name].grad, slope, rtol=1e-6, atol=1e-6 * max(1, abs(slope).max()))


@pytest.mark.parametrize("solver", GENERAL)
def test_an_nlp_takes_batches(solver):
    nlp, bounds, names, _ = rosenbrock()
    layer = ddn.DeclarativeLayer(ddn.from_casadi(nlp, **bounds, **names), solver=solver)
    p = torch.tensor([[50.0, 1.0], [20.0, 0.5], [100.0, 3.0]], dtype=FLOAT)
    whole = layer(p)
    for k in range(3):
        np.testing.assert_array_equal(layer(p[k]), whole[k])
        np.testing.assert_allclose(whole[k], solver_of_casadi(nlp, bounds)(p[k].numpy())[0], atol=1e-6)


def test_multipliers_are_those_of_casadi():
    nlp, bounds, _, values = rows_of_every_kind()
    _, _, lam_g = solver_of_casadi(nlp, bounds)(values["p"])
    dual = ddn.solve(ddn.from_casadi(nlp, **bounds), tensors(values)).dual
    np.testing.assert_allclose(dual.equality["g_equal"], lam_g[[1]], atol=1e-7)
    lower, upper = np.zeros(5), np.zeros(5)
    lower[[0, 4]], upper[[0, 2, 4]] = dual.inequality["g_lower"], dual.inequality["g_upper"]
    np.testing.assert_allclose((upper - lower)[[0, 2, 3, 4]], lam_g[[0, 2, 3, 4]], atol=1e-7)


def test_an_opti_is_taken_with_its_own_bounds():
    opti = ca.Opti()
    x, y = opti.variable(2), opti.variable()
    p, q = opti.parameter(), opti.parameter(2)
    opti.minimize(ca.sumsqr(x - p) + (y - x[0]) ** 2 + ca.exp(y))
    opti.subject_to(ca.sum1(x) == p)
    opti.subject_to(x >= q)
    opti.subject_to(opti.bounded(-1, y, q[1] / 2))
    opti.solver("ipopt", SILENT)
    opti.set_value(p, 1.0)
    opti.set_value(q, [0.8, -0.5])
    expected = opti.solve()
    imported = ddn.from_casadi(opti, variables={"x": (2,), "y": ()}, parameters={"p": (), "q": (2,)})
    solution = ddn.solve(
        imported, {"p": torch.tensor(1.0, dtype=FLOAT), "q": torch.tensor([0.8, -0.5], dtype=FLOAT)}
    )
    np.testing.assert_allclose(solution["x"], expected.value(x), atol=1e-7)
    np.testing.assert_allclose(solution["y"], expected.value(y), atol=1e-7)
    assert list(imported.equality) == ["g_equal"]


@pytest.mark.parametrize("solver", GENERAL)
def test_a_branch_that_is_not_at_its_edge_has_no_kink(solver):
    x, p = ca.MX.sym("x", 2), ca.MX.sym("p")
    condition = ca.logic_and(x[0] > 0, ca.logic_not(x[1] > p))
    branches = ca.if_else(condition, x[1] ** 2, -x[1], True)
    imported = ddn.from_casadi({"x": x, "p": p, "f": ca.sumsqr(x - 1) + branches})
    solution = ddn.solve(imported, {"p": torch.tensor([3.0])}, solver=solver, initial=torch.ones(2))
    np.testing.assert_allclose(solution["x"], [1.0, 0.5], rtol=1e-6)
    assert bool(solution.certificate.ok)


def test_mapped_and_accumulated_functions_are_expanded():
    state, control = ca.MX.sym("state", 2), ca.MX.sym("control")
    step = ca.Function(
        "step", [state, control], [ca.vertcat(state[0] + 0.1 * state[1], state[1] + ca.sin(control))]
    )
    U, x0 = ca.MX.sym("U", 1, 5), ca.MX.sym("x0", 2)
    nlp = {
        "x": ca.vec(U),
        "p": x0,
        "f": ca.sumsqr(step.mapaccum(5)(x0, U)) + ca.sumsqr(step.map(5)(ca.repmat(x0, 1, 5), U)),
    }
    solution = ddn.solve(ddn.from_casadi(nlp), {"p": torch.tensor([1.0, 0.5], dtype=FLOAT)})
    expected, _, _ = solver_of_casadi(nlp, {})([1.0, 0.5])
    np.testing.assert_allclose(solution["x"], expected, atol=1e-7)


def test_an_nlp_without_parameters_or_objective():
    x = ca.SX.sym("x")
    imported = ddn.from_casadi({"x": x, "g": x**3}, lbg=8, ubg=8)
    assert (imported.parameters, imported.objective, imported.bounds) == ({}, None, {"x": (None, None)})
    np.testing.assert_allclose(ddn.solve(imported, {}, initial=torch.ones(1))["x"], [2.0])


def test_a_layer_of_an_nlp_can_be_pickled():
    nlp, bounds, names, values = van_der_pol()
    layer = pickle.loads(pickle.dumps(ddn.DeclarativeLayer(ddn.from_casadi(nlp, **bounds, **names))))
    X, _ = layer(torch.tensor(values["x0"], dtype=torch.float32))
    assert X.dtype == torch.float32
    np.testing.assert_allclose(X[:, 0], values["x0"], atol=1e-6)


def test_an_nlp_is_explained(capsys):
    nlp, bounds, names, _ = van_der_pol()
    report = str(ddn.compile(ddn.from_casadi(nlp, **bounds, **names)).explain())
    assert "'mul' at g_equal of CasADi, OP_MUL multiplies two terms that depend on variables" in report
    assert "32 variables, 22 equalities" in report


x_, p_ = ca.SX.sym("x", 2), ca.SX.sym("p")
FREE = ca.SX.sym("free")
MX_ = ca.MX.sym("X", 2)
LOOKUP = ca.interpolant("LOOKUP", "linear", [[0.0, 1.0, 2.0]], [0.0, 1.0, 4.0])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        refused(
            "nlp is not a problem of CasADi's; expected a dict or an Opti; got float",
            lambda: ddn.from_casadi(1.0),
        ),
        refused(
            "nlp has an unknown field 'h'; expected only x, p, f, g",
            lambda: ddn.from_casadi({"x": x_, "h": x_}),
        ),
        refused(r"nlp\['x'\] is not a symbol of CasADi's", lambda: ddn.from_casadi({"f": x_})),
        refused(
            r"nlp\['x'\] is not a dense column; got shape \(2, 3\). Take casadi.vec",
            lambda: ddn.from_casadi({"x": ca.MX.sym("X", 2, 3)}),
        ),
        refused(r"nlp\['f'\] is not a scalar", lambda: ddn.from_casadi({"x": x_, "f": x_})),
        refused(
            r"nlp\['g'\] is not an expression; expected SX, as x",
            lambda: ddn.from_casadi({"x": x_, "g": MX_}),
        ),
        refused(
            "cannot be a function of x and p: .*free", lambda: ddn.from_casadi({"x": x_, "f": x_[0] * FREE})
        ),
        refused("cannot be a function of x and p", lambda: ddn.from_casadi({"x": 2 * x_, "f": x_[0]})),
        refused(
            "g has no bounds; expected lbg, ubg or both. For g", lambda: ddn.from_casadi({"x": x_, "g": x_})
        ),
        refused(
            "lbg has the wrong size; expected 1 or 2; got 3",
            lambda: ddn.from_casadi({"x": x_, "g": x_}, lbg=[1, 2, 3]),
        ),
        refused("ubx is not a bound", lambda: ddn.from_casadi({"x": x_}, ubx="1")),
        refused("lbx depends on x", lambda: ddn.from_casadi({"x": x_}, lbx=x_)),
        refused(
            r"lbg\[0\] is nan, which no value satisfies",
            lambda: ddn.from_casadi({"x": x_, "g": x_}, lbg=np.nan),
        ),
        refused(r"ubg\[1\] is -inf", lambda: ddn.from_casadi({"x": x_, "g": x_}, ubg=[0, -np.inf])),
        refused(
            r"the bounds of g\[0\] contradict; got lbg=1, ubg=0",
            lambda: ddn.from_casadi({"x": x_, "g": x_}, 0, 1, 1, 0),
        ),
        refused(r"bounds\['x'\] contradict", lambda: ddn.from_casadi({"x": x_, "f": x_[0]}, 1, 0)),
        refused(
            r"variables has 3 entries; expected the 2 of nlp\['x'\]",
            lambda: ddn.from_casadi({"x": x_}, variables={"a": (3,)}),
        ),
        refused(
            "parameters is not a dict from names to shapes",
            lambda: ddn.from_casadi({"x": x_, "p": p_}, parameters={"p": 1}),
        ),
        refused("'initial'", lambda: ddn.from_casadi({"x": x_}, variables={"initial": (2,)})),
        refused("lbx is given beside an Opti", lambda: ddn.from_casadi(ca.Opti(), lbx=0)),
        refused(
            r"nlp cannot be expanded into scalar operations: .*LogSumExp.*\. Write what is named",
            lambda: ddn.from_casadi({"x": MX_, "f": ca.logsumexp(MX_)}),
        ),
        refused(
            "eval_sx not defined for LinsolQr",
            lambda: ddn.from_casadi({"x": MX_, "f": ca.sum1(ca.solve(MX_ @ MX_.T + 1, MX_))}),
        ),
        refused(
            "CasADi's operation OP_CALL has no counterpart in torch",
            lambda: ddn.from_casadi({"x": MX_, "f": LOOKUP(MX_[0])}),
        ),
    ],
)
def test_what_cannot_be_taken_over_from_casadi_is_named(make, match):
    with pytest.raises(ddn.ProblemError, match=match):
        make()
