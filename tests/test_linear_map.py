"""Matrices that are affine in the parameters are gathered from them; they are those that CasADi evaluates."""

import casadi as ca
import numpy as np
import pytest
import torch

import ddn_solvers as ddn
from ddn_solvers.derived import scaled
from ddn_solvers.evaluators import Evaluators
from ddn_solvers.program import compile_program

D = torch.float64
CONSTANT = torch.linspace(0.5, 2.0, 6, dtype=D)


def weighted(u, w, x):
    return (w * (u - x).square()).sum() + 0.5 * CONSTANT @ u.square() + u[0] * u[1] * (w[0] - 2 * w[1] + 3)


PROBLEMS = {
    "parametrised QP": ddn.quadratic_program(6, 2, 3),
    "LP": ddn.linear_program(6, 2, 3),
    "constant": ddn.Problem(
        {"u": (6,)}, {"x": (6,)}, lambda u, x: (CONSTANT * (u - x).square()).sum(), lambda u: u.sum()
    ),
    "sums": ddn.Problem({"u": (6,)}, {"w": (6,), "x": (6,)}, weighted, lambda u, w: (w + 1) * u - CONSTANT),
    "product": ddn.Problem(
        {"u": (6,)}, {"w": (6,)}, lambda u, w: (w * w * u.square()).sum(), lambda u, w: w @ u
    ),
    "quartic": ddn.Problem(
        {"u": (6,)}, {"w": (6,)}, lambda u, w: (w * u**4).sum(), lambda u, w: w * u.square()
    ),
}
NO_PARAMETERS = ddn.Problem(
    {"u": (6,)}, {}, lambda u: (CONSTANT * u.square()).sum() - u.sum(), lambda u: u[:3].sum()
)
MAPPED = {"parametrised QP", "LP", "constant", "sums"}


@pytest.mark.parametrize("shared", ["none", "first", "all"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gathered_matrices_are_the_evaluated_ones(name, shared):
    program = compile_program(PROBLEMS[name])
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((4, block.size)) for block in program.parameters]
    blocks = [b[0] if shared == "all" or (shared == "first" and i == 0) else b for i, b in enumerate(blocks)]
    z, y = rng.standard_normal((4, 6)), rng.standard_normal((4, program.constraints))
    f, gradient, c, jacobian = program._kernel("first_order")(z, *blocks)
    (hessian,) = program._kernel("hessian")(z, *blocks, y, np.ones((4, 1)))
    first = program.first_order(z, blocks)
    np.testing.assert_array_equal(first.objective, f[:, 0])
    np.testing.assert_array_equal(first.gradient, gradient)
    np.testing.assert_array_equal(first.constraints, c)
    np.testing.assert_allclose(first.jacobian, jacobian, rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(program.hessian(z, blocks, y), hessian, rtol=1e-14, atol=1e-14)
    assert (program._map("jacobian_map") is not None) == (name in {*MAPPED, "product"})
    affine = name in MAPPED and program.hessian_pattern.nnz > 0
    assert (program._map("hessian_map") is not None) == affine


def test_a_problem_without_parameters():
    program = compile_program(NO_PARAMETERS)
    np.testing.assert_array_equal(
        program.hessian(np.zeros((3, 6)), [], np.zeros(1)), np.tile(2 * CONSTANT.numpy(), (3, 1))
    )
    solution = ddn.solve(NO_PARAMETERS, {})
    torch.testing.assert_close(solution["u"][3:].double(), 0.5 / CONSTANT[3:], rtol=0, atol=1e-6)


def test_scaled_variables_are_no_copy_of_the_parameters():
    """There the matrices are products of parameters, and evaluated."""
    program = scaled(compile_program(PROBLEMS["parametrised QP"]))
    assert program._map("hessian_map") is None


def test_a_dense_hessian_is_compiled_without_looking_for_symmetry():
    """With it CasADi takes 12 s where n is 400."""
    n = 60
    g = torch.Generator().manual_seed(0)
    L = torch.randn(n, n, dtype=D, generator=g)
    values = {"P": L @ L.T / n + torch.eye(n, dtype=D), "q": torch.randn(n, dtype=D, generator=g)}
    solution = ddn.solve(ddn.quadratic_program(n), values)
    torch.testing.assert_close(
        solution["u"], -torch.linalg.solve(values["P"], values["q"]), rtol=0, atol=1e-12
    )
    program = compile_program(ddn.quadratic_program(n))
    assert program.functions.hessian.n_nodes() < 20 * n


@pytest.fixture
def multiplied(monkeypatch):
    """Small problems as large dense ones are: nothing gathered, matrices as products in torch."""
    monkeypatch.setattr("ddn_solvers.lowering.linear_map._LARGEST", 0)
    monkeypatch.setattr("ddn_solvers.program._MULTIPLIED", 0)


def quadratic(seed=0, batch=()):
    g = torch.Generator().manual_seed(seed)
    L, A, G = (torch.randn(*batch, m, 6, dtype=D, generator=g) for m in (6, 2, 3))
    q, b = torch.randn(*batch, 6, dtype=D, generator=g), torch.randn(*batch, 2, dtype=D, generator=g)
    h = torch.rand(*batch, 3, dtype=D, generator=g) + 1
    return {"P": L @ L.mT + torch.eye(6, dtype=D), "q": q, "A": A, "b": b, "G": G, "h": h}


def of_pairs(u, w):
    return u[:3] @ (w.reshape(3, 2) @ u[3:5]) + u.square().sum()  # each nonzero one parameter, twice in H


def of_all(weight):
    return ddn.Problem({"u": (6,)}, {"w": (6,)}, lambda u, w: weight(w) * u.sum().square())


LARGE = {
    "parametrised QP": (ddn.quadratic_program(6, 2, 3), True),
    "LP": (ddn.linear_program(6, 2, 3), True),
    "pairs": (ddn.Problem({"u": (6,)}, {"w": (6,)}, of_pairs, lambda u, w: 3 * w @ u - 1), True),
    "products": (ddn.least_squares(6, 8), False),
    "a square": (of_all(lambda w: w[0] * w[0]), False),
    "three terms": (of_all(lambda w: w[:3].sum() + w[1]), False),
    "a difference": (of_all(lambda w: w[0] - w[1]), False),
    "a step": (of_all(lambda w: w[0].relu()), False),
    "a quotient": (of_all(lambda w: 1 / (1 + w[0].square())), False),
    "a small product": (of_all(lambda w: 1e-13 * w[0] * w[1]), False),
    "a product beside one": (of_all(lambda w: w[0] + 1e-14 * w[0] * w[1]), False),
}


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("shared", ["none", "first", "all"])
@pytest.mark.parametrize("name", LARGE)
def test_matrices_of_large_programs_are_the_evaluated_ones(name, shared):
    """Gathered where each nonzero is one parameter or the sum of two; multiplied where not."""
    problem, gathered = LARGE[name]
    program = compile_program(problem)
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((4, block.size)) for block in program.parameters]
    blocks = [b[0] if shared == "all" or (shared == "first" and i == 0) else b for i, b in enumerate(blocks)]
    assert program._large_and_dense
    assert (program._probed() is not None) == gathered
    found, expected = program.coefficients(blocks, 4), Evaluators.coefficients(program, blocks, 4)
    for part, values in vars(expected).items():
        np.testing.assert_allclose(getattr(found, part), values, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("multiplied")
def test_a_parameter_that_only_a_small_term_has_is_not_lost():
    """A scale before a whole matrix, which all values together say nothing of; and one block beside another."""
    for weight in (lambda s, w: 1e-20 * s * w[0], lambda s, w: w[0] + 1e-13 * s):
        problem = ddn.Problem(
            {"u": (6,)}, {"s": (), "w": (6,)}, lambda u, s, w, of=weight: of(s, w) * u.sum().square()
        )
        assert compile_program(problem)._probed() is None


@pytest.mark.usefixtures("multiplied")
def test_infinite_captured_bounds_do_not_enter_the_matrices():
    lower = torch.full((6,), -torch.inf, dtype=D)
    lower[5] = 0.5
    lower.requires_grad_()
    problem = ddn.Problem(
        {"u": (6,)},
        {"x": (6,)},
        lambda u, x: (u - x).square().sum() + u.sum().square(),
        bounds={"u": (lambda: lower, None)},
    )
    assert compile_program(problem)._probed() is not None
    assert ddn.solve(problem, {"x": torch.zeros(6, dtype=D)})["u"][5] == 0.5


@pytest.mark.usefixtures("multiplied")
def test_multiplied_matrices_in_every_mode_of_torch():
    problem, values = ddn.quadratic_program(6, 2, 3), quadratic(batch=(3,))
    layer = ddn.DeclarativeLayer(problem)
    plain = layer(**values)
    with torch.inference_mode():
        torch.testing.assert_close(layer(**values), plain)
    with torch.no_grad():
        torch.testing.assert_close(layer(**values), plain)

    def total(q, P):
        rest = {name: value[0] for name, value in values.items() if name not in "qP"}
        return layer(q=q, P=P, **rest).square().sum()

    q, P = values["q"], values["P"]
    found = torch.func.vmap(torch.func.grad(total))(q, P)
    for i in range(3):
        leaf = q[i].clone().requires_grad_()
        (one,) = torch.autograd.grad(total(leaf, P[i]), leaf)
        torch.testing.assert_close(found[i], one)


def test_large_dense_programs_are_gathered_and_small_or_sparse_ones_are_not_asked():
    program = compile_program(ddn.quadratic_program(250, 50, 300))
    assert program._large_and_dense
    assert program._probed() is not None
    assert not compile_program(ddn.quadratic_program(20, 5, 10))._large_and_dense
    chain = ddn.Problem({"u": (90_000,)}, {"x": (90_000,)}, lambda u, x: (u - x).square().sum())
    assert not compile_program(chain)._large_and_dense


STEPS = {
    "sign": lambda x: x.sign(),
    "where": lambda x: torch.where(x > 0, 3.0, 1.0),
    "comparison": lambda x: (x > 0.5) * 2.0,
    "floor": lambda x: x.floor(),
}


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_a_parameter_is_no_affine_map(name, solver):
    """Its derivative is zero: the matrix was taken at x = 0 for all x, by the solver and by the gradient."""
    step = STEPS[name]
    problem = ddn.Problem(
        {"u": (2,)},
        {"x": (2,)},
        lambda u, x: 0.5 * ((4 + step(x)) * (u - x).square()).sum(),
        lambda u, x: ((5 + step(x)) * u).sum() - 1,
    )
    for values in ([1.0, -1.0], [-2.3, 0.2], [1.7, 2.6]):
        x = torch.tensor(values, dtype=D, requires_grad=True)
        solution = ddn.solve(problem, {"x": x}, solver=solver)
        h, a = 4 + step(x).to(D), 5 + step(x).to(D)
        expected = x - (a / h) * (a @ x - 1) / (a.square() / h).sum()
        torch.testing.assert_close(solution["u"], expected)
        assert solution.certificate.ok
        ours, theirs = (torch.autograd.grad(u[0], x, retain_graph=True)[0] for u in (solution["u"], expected))
        torch.testing.assert_close(ours, theirs)


def test_a_product_of_matrices_is_not_written_out(monkeypatch):
    """X^T X of 200 variables was eight million scalar operations and half a minute at the first call."""
    expanded = []
    original = ca.Function.expand
    monkeypatch.setattr(ca.Function, "expand", lambda f, *more: expanded.append(f) or original(f, *more))
    n = 100
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=D)
    problem = ddn.Problem(
        {"u": (n,)}, {"x": (n,)}, lambda u, x: (X @ u - x).square().sum() + u.square().sum()
    )
    solution = ddn.solve(problem, {"x": torch.ones(n, dtype=D)})
    torch.testing.assert_close(
        solution["u"], torch.linalg.solve(X.T @ X + torch.eye(n, dtype=D), X.T @ torch.ones(n, dtype=D))
    )
    assert not [f for f in expanded if f.name() == "nonzeros"]


def test_the_matrices_of_a_larger_qp_are_gathered():
    """They are affine whatever their size: no count of what is merely moved may stand against it."""
    program = compile_program(ddn.quadratic_program(60, 30, 60))
    assert program._map("jacobian_map") is not None
    assert program._map("hessian_map") is not None
