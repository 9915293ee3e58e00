"""Gradients: closed forms, finite differences, higher order, transforms, degenerate cases, certificates."""

import warnings
from dataclasses import dataclass, field

import pytest
import torch

import ddn_solvers as ddn

# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
D = torch.float64
SOLVERS = ("scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt")
NLP = ("scipy:SLSQP", "casadi:ipopt")
on_all = pytest.mark.parametrize("solver", SOLVERS)
on_nlp = pytest.mark.parametrize("solver", NLP)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def vector(*values):
    return torch.tensor(values, dtype=D)


def close(a, b, atol=1e-9):
    return torch.allclose(a, b, rtol=0, atol=atol)


def leaves(parameters):
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


# -- closed forms ---------------------------------------------------------------------------------------------


@dataclass
class Closed:
    """A problem whose solution is a differentiable formula of its parameters."""

    problem: ddn.Problem
    parameters: dict
    formula: object
    solvers: tuple = SOLVERS
    initial: object = None
    batched: bool = field(default=True)


def half_squares(u, x):
    return 0.5 * (u - x).square().sum()


def affine(x, A, b):
    return x - A.mT @ torch.linalg.solve(A @ A.mT, A @ x - b)


def simplex(x):
    sorted_x, _ = x.sort(descending=True)
    k = torch.arange(1, len(x) + 1, dtype=D)
    threshold = (sorted_x.cumsum(0) - 1) / k
    return (x - threshold[int((sorted_x > threshold).sum()) - 1]).clamp(min=0)


def ball(x, r):
    return x * (r / x.norm()).clamp(max=1.0)


def kkt(P, q, A, b):
    n, m = len(q), len(b)
    K = torch.cat([torch.cat([0.5 * (P + P.mT), A.mT], 1), torch.cat([A, torch.zeros(m, m, dtype=D)], 1)])
    return torch.linalg.solve(K, torch.cat([-q, b]))[:n]


def top_eigenvector(X):
    return (
        torch.linalg.eigh(0.5 * (X + X.mT))[1][:, -1]
        * torch.linalg.eigh(0.5 * (X + X.mT))[1][0, -1].sign().detach()
    )


def pseudo_huber(x, a):
    """Its solution by Newton's method, differentiable through its last step."""
    y = x.median().detach()
    for _ in range(60):
        z = (y - x) / a
        y = y - ((y - x) / (1 + z**2).sqrt()).sum() / (1 + z**2).pow(-1.5).sum()
        y = y if _ == 59 else y.detach()
    return y


ROOT = rand(4, 4, seed=7)
SPD = ROOT @ ROOT.mT + torch.eye(4, dtype=D)
G, C = rand(6, 4, seed=11), rand(4, seed=12)

CLOSED = {
    "unconstrained": Closed(
        ddn.Problem({"u": (4,)}, {"P": (4, 4), "q": (4,)}, lambda u, P, q: 0.5 * u @ P @ u + q @ u),
        {"P": SPD, "q": rand(4)}, lambda P, q: -torch.linalg.solve(0.5 * (P + P.mT), q),
        ("scipy:SLSQP", "scipy:L-BFGS-B", "casadi:ipopt", "casadi:daqp"),
    ),
    "affine-set": Closed(
        ddn.Problem({"u": (4,)}, {"x": (4,), "A": (2, 4), "b": (2,)}, half_squares, lambda u, A, b: A @ u - b),
        {"x": rand(4), "A": rand(2, 4, seed=1), "b": rand(2, seed=2)}, affine,
        (*SOLVERS, "scipy:trust-constr", "casadi:daqp", "casadi:qpoases", "casadi:sqpmethod"),
    ),
    "simplex": Closed(
        ddn.Problem({"u": (5,)}, {"x": (5,)}, half_squares, lambda u: u.sum() - 1, bounds={"u": (0, None)}),
        {"x": vector(0.6, -0.2, 0.45, 0.5, -1.0)}, simplex,
        (*SOLVERS, "scipy:trust-constr", "casadi:daqp", "casadi:osqp", "casadi:sqpmethod"),
    ),
    "box": Closed(
        ddn.Problem({"u": (4,)}, {"x": (4,), "a": (4,), "b": ()}, half_squares, bounds={"u": ("a", "b")}),
        {"x": vector(-3, 0.2, 0.4, 5), "a": vector(-1, -1, 0.5, -2), "b": vector(2.0)[0]},
        lambda x, a, b: torch.minimum(torch.maximum(x, a), b), (*SOLVERS, "scipy:L-BFGS-B", "casadi:daqp"),
    ),
    "box-callable": Closed(
        ddn.Problem({"u": (3,)}, {"x": (3,), "a": (3,)}, half_squares, bounds={"u": (lambda a: -a.exp(), lambda a: a.square())}),
        {"x": vector(-3, 0.2, 5), "a": vector(0.1, 0.7, 0.9)},
        lambda x, a: torch.minimum(torch.maximum(x, -a.exp()), a.square()),
    ),
    "halfspace": Closed(
        ddn.Problem({"u": (3,)}, {"x": (3,), "a": (3,), "b": ()}, half_squares, inequality=lambda u, a, b: a @ u - b),
        {"x": vector(1, 2, 3), "a": vector(1, -1, 2), "b": vector(0.5)[0]},
        lambda x, a, b: x - a * (a @ x - b) / a.square().sum(),
    ),
    "ball-outside": Closed(
        ddn.Problem({"u": (3,)}, {"x": (3,), "r": ()}, half_squares, inequality=lambda u, r: u.square().sum() - r**2),
        {"x": vector(1, 2, -2), "r": vector(1.5)[0]}, ball,
    ),
    "ball-inside": Closed(
        ddn.Problem({"u": (3,)}, {"x": (3,), "r": ()}, half_squares, inequality=lambda u, r: u.square().sum() - r**2),
        {"x": vector(0.1, 0.2, -0.2), "r": vector(1.5)[0]}, ball,
    ),
    "ball-norm": Closed(
        ddn.Problem({"u": (3,)}, {"x": (3,), "r": ()}, half_squares, inequality=lambda u, r: u.norm() - r),
        {"x": vector(1, 2, -2), "r": vector(1.5)[0]}, ball, SOLVERS, vector(0.1, 0.1, 0.1),
    ),
    "sphere": Closed(
        ddn.Problem({"u": (3,)}, {"x": (3,), "r": ()}, half_squares, lambda u, r: u.square().sum() - r**2),
        {"x": vector(1, 2, -2), "r": vector(1.5)[0]}, lambda x, r: r * x / x.norm(), (*NLP, "casadi:sqpmethod", "scipy:trust-constr"), vector(1, 2, -2),
    ),
    "equality-qp": Closed(
        ddn.quadratic_program(4, equalities=2),
        {"P": SPD, "q": rand(4), "A": rand(2, 4, seed=1), "b": rand(2, seed=2)}, kkt,
        (*SOLVERS, "casadi:daqp", "casadi:qpoases"),
    ),
    "indefinite-hessian-qp": Closed(
        ddn.Problem({"u": (2,)}, {"q": (2,), "b": ()}, lambda u, q: u[0] ** 2 - u[1] ** 2 + q @ u, lambda u, b: u[1] - b),
        {"q": vector(0.3, -0.5), "b": vector(0.7)[0]}, lambda q, b: torch.stack([-q[0] / 2, b]), NLP,
    ),
    "semidefinite-hessian-qp": Closed(
        ddn.Problem({"u": (2,)}, {"q": (), "b": ()}, lambda u, q: 0.5 * (u[0] - q) ** 2, lambda u, b: u.sum() - b),
        {"q": vector(0.3)[0], "b": vector(0.7)[0]}, lambda q, b: torch.stack([q, b - q]),
    ),
    "lp-vertex": Closed(
        ddn.linear_program(2, inequalities=3),
        {"c": vector(-1.0, -2.0), "G": torch.tensor([[1.0, 1.0], [0.2, 1.0], [-1.0, 0.3]], dtype=D), "h": vector(4.0, 2.0, 1.0)},
        lambda c, G, h: torch.linalg.solve(G[:2], h[:2]) + 0 * c, (*SOLVERS, "scipy:highs", "casadi:daqp"),
    ),
    "lp-bounds": Closed(
        ddn.Problem({"u": (3,)}, {"c": (3,), "b": (), "top": (3,)}, lambda u, c: c @ u, lambda u, b: u.sum() - b, bounds={"u": (0, "top")}),
        {"c": vector(1.0, 2.0, 3.0), "b": vector(1.5)[0], "top": vector(1.0, 0.7, 2.0)},
        lambda c, b, top: torch.stack([top[0], b - top[0], 0 * b]), (*SOLVERS, "scipy:highs"),
    ),
    "top-eigenvector": Closed(
        ddn.Problem({"u": (4,)}, {"X": (4, 4)}, lambda u, X: -u @ X @ u, lambda u: u @ u - 1),
        {"X": SPD}, top_eigenvector, NLP, top_eigenvector(SPD) + 0.1 * rand(4),
    ),
    "least-squares": Closed(
        ddn.least_squares(5, 3, ridge=True),
        {"M": rand(5, 3), "y": rand(5, seed=1), "w": vector(0.5, 1.0, 2.0)},
        lambda M, y, w: torch.linalg.solve(M.mT @ M + w.diag(), M.mT @ y),
    ),
    "softmax": Closed(
        ddn.Problem({"u": (4,)}, {"x": (4,)}, lambda u, x: (u * u.log()).sum() - x @ u, lambda u: u.sum() - 1, bounds={"u": (1e-12, None)}),
        {"x": rand(4)}, lambda x: torch.softmax(x, 0), NLP, torch.full((4,), 0.25, dtype=D),
    ),
    "sigmoid": Closed(
        ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: u * u.log() + (1 - u) * (1 - u).log() - x * u, bounds={"u": (1e-12, 1 - 1e-12)}),
        {"x": vector(0.7)[0]}, torch.sigmoid, NLP, {"u": vector(0.5)[0]},
    ),
    "relu": Closed(
        ddn.Problem({"u": (3,)}, {"x": (3,)}, half_squares, bounds={"u": (0, None)}), {"x": vector(-1, 0.5, 2)}, torch.relu,
    ),
    "explicit-layer": Closed(
        ddn.Problem({"u": (3,)}, {"x": (2,), "W": (3, 2)}, lambda u, x, W: 0.5 * (u - torch.tanh(W @ x)).square().sum()),
        {"x": rand(2), "W": rand(3, 2, seed=1)}, lambda x, W: torch.tanh(W @ x),
    ),
    "pseudo-huber-pooling": Closed(
        ddn.Problem({"u": ()}, {"x": (6,), "a": ()}, lambda u, x, a: a**2 * ((1 + ((u - x) / a) ** 2).sqrt() - 1).sum()),
        {"x": vector(-1, 0.1, 0.2, 0.4, 0.3, 5), "a": vector(0.5)[0]}, pseudo_huber, NLP,
    ),
    "feasibility-system": Closed(
        ddn.Problem({"u": (2,)}, {"A": (2, 2), "b": (2,)}, None, lambda u, A, b: A @ u - b),
        {"A": rand(2, 2, seed=5), "b": rand(2, seed=6)}, lambda A, b: torch.linalg.solve(A, b),
    ),
}  # fmt: skip
CASES = [
    pytest.param(case, solver, id=f"{name}-{solver}")
    for name, case in CLOSED.items()
    for solver in case.solvers
]
FIRST = [pytest.param(case, case.solvers[-1], id=name) for name, case in CLOSED.items()]


def solve(case, parameters, solver, **keywords):
    return ddn.solve(case.problem, parameters, solver=solver, initial=case.initial, **keywords)["u"]


@pytest.mark.parametrize(("case", "solver"), CASES)
def test_point_and_gradient_equal_the_closed_form(case, solver):
    ours, theirs = leaves(case.parameters), leaves(case.parameters)
    u, expected = solve(case, ours, solver), case.formula(**theirs)
    assert close(u, expected, 1e-10)
    v = rand(*u.shape, seed=9)
    found = torch.autograd.grad((u * v).sum(), list(ours.values()), allow_unused=True)
    reference = torch.autograd.grad((expected * v).sum(), list(theirs.values()), allow_unused=True)
    for name, a, b in zip(ours, found, reference, strict=True):
        assert close(a, torch.zeros_like(a) if b is None else b, 1e-8), name


@pytest.mark.parametrize(("case", "solver"), FIRST)
def test_batches_of_closed_forms(case, solver):
    """Three samples, every parameter perturbed a little, against the formula sample by sample."""
    many = {k: torch.stack([p * (1 + 0.02 * i) for i in range(3)]) for k, p in case.parameters.items()}
    ours, theirs = leaves(many), leaves(many)
    u = solve(case, ours, solver)
    expected = torch.stack([case.formula(**{k: p[i] for k, p in theirs.items()}) for i in range(3)])
    assert close(u, expected, 1e-10)
    v = rand(*u.shape, seed=9)
    found = torch.autograd.grad((u * v).sum(), list(ours.values()))
    reference = torch.autograd.grad((expected * v).sum(), list(theirs.values()), allow_unused=True)
    for name, a, b in zip(ours, found, reference, strict=True):
        assert close(a, torch.zeros_like(a) if b is None else b, 1e-8), name


@pytest.mark.parametrize(("case", "solver"), FIRST)
def test_second_derivatives_equal_the_closed_form(case, solver):
    ours, theirs = leaves(case.parameters), leaves(case.parameters)
    if case is CLOSED["pseudo-huber-pooling"]:
        pytest.skip("the reference is differentiable once")
    seconds = []
    for u, tensors in ((solve(case, ours, solver), ours), (case.formula(**theirs), theirs)):
        loss = (u * rand(*u.shape, seed=9)).sum()
        grads = torch.autograd.grad(
            loss, list(tensors.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        inner = sum((g * rand(*g.shape, seed=20 + i)).sum() for i, g in enumerate(grads))
        if not inner.requires_grad:
            inner = inner + 0 * sum(t.sum() for t in tensors.values())
        seconds.append(
            torch.autograd.grad(inner, list(tensors.values()), allow_unused=True, materialize_grads=True)
        )
    for name, a, b in zip(ours, *seconds, strict=True):
        assert close(a, b, 1e-6 * max(1.0, float(b.abs().max()))), name


@pytest.mark.parametrize(("case", "solver"), FIRST)
def test_sensitivity_equals_the_closed_form(case, solver):
    """vjp, jvp and every Jacobian of a point found elsewhere, off by 1e-6, to 1e-8."""
    y = case.formula(**case.parameters)
    noise = 1e-6 * rand(*y.shape, seed=31)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sensitivity = ddn.sensitivity(case.problem, case.parameters, y + noise)
    assert sensitivity.certificate.ok
    names = list(case.parameters)
    exact = torch.autograd.functional.jacobian(
        lambda *p: case.formula(*p) + 0 * sum(t.sum() for t in p), tuple(case.parameters.values())
    )
    v = rand(*y.shape, seed=9)
    grads = sensitivity.vjp({"u": v})
    tangents = {n: rand(*p.shape, seed=40 + i) for i, (n, p) in enumerate(case.parameters.items())}
    total = torch.zeros_like(y)
    for name, jacobian in zip(names, exact, strict=True):
        found = sensitivity.jacobian(of="u", wrt=name)
        assert found.shape == jacobian.shape
        assert close(found, jacobian, 1e-8), name
        assert close(grads[name], torch.tensordot(v, jacobian, y.dim()), 1e-8), name
        part = torch.tensordot(jacobian, tangents[name], tangents[name].dim())
        total = total + part
        assert close(sensitivity.jvp({name: tangents[name]})["u"], part, 1e-8), name
    assert close(sensitivity.jvp(tangents)["u"], total, 1e-7)


@pytest.mark.parametrize(("case", "solver"), FIRST)
def test_attach_makes_the_same_point_differentiable(case, solver):
    ours, theirs = leaves(case.parameters), leaves(case.parameters)
    expected = case.formula(**theirs)
    given = expected.detach() + 1e-6 * rand(*expected.shape, seed=31)
    solution = ddn.attach(case.problem, ours, given)
    assert torch.equal(solution["u"], given)
    v = rand(*given.shape, seed=9)
    found = torch.autograd.grad((solution["u"] * v).sum(), list(ours.values()))
    reference = torch.autograd.grad((expected * v).sum(), list(theirs.values()), allow_unused=True)
    for name, a, b in zip(ours, found, reference, strict=True):
        assert close(a, torch.zeros_like(a) if b is None else b, 1e-8), name


@pytest.mark.parametrize(("case", "solver"), FIRST)
@pytest.mark.parametrize("mode", ["jacrev", "jacfwd", "jvp"])
def test_torch_func_equals_the_closed_form(case, solver, mode):
    layer = ddn.DeclarativeLayer(case.problem, solver=solver)
    names, values = list(case.parameters), tuple(case.parameters.values())

    def ours(*p):
        return layer(*p, initial=case.initial)

    def theirs(*p):
        return case.formula(**dict(zip(names, p, strict=True)))

    if mode == "jvp":
        tangents = tuple(rand(*p.shape, seed=40 + i) for i, p in enumerate(values))
        found, expected = (torch.func.jvp(f, values, tangents)[1] for f in (ours, theirs))
        assert close(found, expected, 1e-8)
        return
    transform = getattr(torch.func, mode)
    arguments = tuple(range(len(values)))
    expected = torch.func.jacrev(theirs, argnums=arguments)(*values)
    for a, b in zip(transform(ours, argnums=arguments)(*values), expected, strict=True):
        assert close(a, b, 1e-8)


# -- a nonlinear problem without closed form, all kinds of constraints active ------------------------------------

N = 20
MATRIX = rand(N, N, seed=50) / N**0.5


def nonlinear_objective(u, x):
    return torch.logsumexp(u - x, 0) + 0.5 * (MATRIX @ u - x).square().sum() + 0.1 * torch.exp(-u).sum()


NONLINEAR = ddn.Problem(
    {"u": (N,)}, {"x": (N,), "b": (), "r": (), "top": ()}, nonlinear_objective,
    {"sum": lambda u, b: u[: N // 2].sum() - b},
    {"ball": lambda u, r: u.square().sum() - r**2, "soft": lambda u: u[-3:].exp().sum() - 2.5},
    {"u": (-0.4, "top")},
)  # fmt: skip
POINT = {"x": rand(N, seed=51), "b": vector(0.3)[0], "r": vector(1.6)[0], "top": vector(0.6)[0]}


def outputs(solution):
    dual = solution.dual
    return torch.cat([
        solution["u"], dual.equality["sum"][None], dual.inequality["ball"][None], dual.inequality["soft"][None],
        dual.lower["u"], dual.upper["u"], solution.objective[None],
    ])  # fmt: skip


def test_the_nonlinear_problem_is_what_it_should_be():
    s = ddn.solve(NONLINEAR, POINT, solver="casadi:ipopt")
    active = s.certificate.active
    assert active["ball"]
    assert active["u.lower"].any()
    assert active["u.upper"].any()
    assert not (active["u.lower"] | active["u.upper"]).all()
    assert s.certificate.ok
    assert s.certificate.margin > 1e-4


@on_all
def test_gradients_of_point_multipliers_and_objective_equal_central_differences(solver):
    p = leaves(POINT)
    s = ddn.solve(NONLINEAR, p, solver=solver)
    v = rand(len(outputs(s)), seed=52)
    found = torch.autograd.grad(outputs(s) @ v, list(p.values()))
    step = 1e-5
    for (name, value), gradient in zip(POINT.items(), found, strict=True):
        units = torch.eye(value.numel(), dtype=D).reshape(-1, *value.shape)
        batch = {**POINT, name: torch.cat([value + step * units, value - step * units])}
        both = ddn.solve(NONLINEAR, batch, solver="casadi:ipopt")
        rows = torch.stack([
            outputs(_Sample(both, i)) @ v for i in range(2 * value.numel())
        ])  # fmt: skip
        difference = (rows[: value.numel()] - rows[value.numel() :]) / (2 * step)
        assert close(gradient.reshape(-1), difference, 2e-7 * max(1.0, float(difference.abs().max()))), name


class _Sample:
    """One sample of a batched solution, as ``outputs`` reads it."""

    def __init__(self, solution, i):
        take = lambda tensors: {k: t[i] for k, t in tensors.items()}  # noqa: E731  # a formula
        self.primal, self.objective = take(solution.primal), solution.objective[i]
        self.dual = type(solution.dual)(
            *(take(getattr(solution.dual, n)) for n in ("equality", "inequality", "lower", "upper"))
        )

    def __getitem__(self, name):
        return self.primal[name]


def test_gradients_agree_across_backends():
    found = []
    for solver in (*SOLVERS, "scipy:trust-constr", "casadi:sqpmethod"):
        p = leaves(POINT)
        s = ddn.solve(NONLINEAR, p, solver=solver)
        found.append(
            [s["u"], *torch.autograd.grad(outputs(s) @ rand(len(outputs(s)), seed=52), list(p.values()))]
        )
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert close(a, b, 1e-8)


@on_all
def test_gradcheck_and_gradgradcheck(solver):
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,), "r": ()}, lambda u, x: (u - x).exp().sum() - (u * x).sum() + u.square().sum(),
        {"plane": lambda u, x: u.sum() - x[0]}, {"ball": lambda u, r: u.square().sum() - r**2},
    )  # fmt: skip
    x, r = rand(2, 3, seed=3).requires_grad_(), vector(0.9).requires_grad_()

    def everything(x, r):
        s = ddn.solve(problem, {"x": x, "r": r}, solver=solver)
        return s["u"], s.dual.equality["plane"], s.dual.inequality["ball"], s.objective

    assert torch.autograd.gradcheck(everything, (x, r), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(everything, (x, r))


@on_nlp
def test_hessian_and_third_derivative(solver):
    case = CLOSED["sphere"]
    x, r = case.parameters["x"], case.parameters["r"]
    layer = ddn.DeclarativeLayer(case.problem, solver=solver)

    def loss(x):
        return layer(x, r, initial=case.initial).pow(3).sum()

    def reference(x):
        return (r * x * (x @ x).rsqrt()).pow(3).sum()

    assert close(torch.func.hessian(loss)(x), torch.func.hessian(reference)(x), 1e-8)
    third = torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(loss)))(x)
    assert close(third, torch.func.jacrev(torch.func.hessian(reference))(x), 1e-7)


@on_all
@pytest.mark.parametrize("outer", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("inner", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("mapped", [False, True], ids=["single", "vmap"])
def test_nested_transforms_are_right_or_refused(outer, inner, mapped, solver):
    """torch cannot nest forward mode through a Function; then an error is right, zeros are not."""
    layer = ddn.DeclarativeLayer(CLOSED["ball-outside"].problem, solver=solver)
    x, r = 3 * rand(3, 3, seed=4), vector(0.5, 0.7, 0.9)

    def nested(function, outer, inner):
        loss = lambda x, r: (function(x, r) * vector(1, -2, 0.5)).sum()  # noqa: E731  # a formula
        derivative = getattr(torch.func, outer)(getattr(torch.func, inner)(loss))
        return torch.func.vmap(derivative)(x, r) if mapped else derivative(x[0], r[0])

    reference = nested(ball, "jacrev", "jacrev")
    try:
        found = nested(layer, outer, inner)
    except (ddn.DDNError, NotImplementedError, RuntimeError):
        assert outer == inner == "jacfwd"
        return
    assert close(found, reference, 1e-8)


@pytest.mark.parametrize("how", ["is_grads_batched", "vectorize"])
def test_batched_cotangents_are_right_or_refused(how):
    """torch.autograd's own batching of cotangents, older than torch.func."""
    x, r = vector(1, 2, -2).requires_grad_(), vector(1.5)[0]
    layer = ddn.DeclarativeLayer(CLOSED["ball-outside"].problem)
    run = {
        "is_grads_batched": lambda: torch.autograd.grad(
            layer(x, r), x, torch.eye(3, dtype=D), is_grads_batched=True
        )[0],
        "vectorize": lambda: torch.autograd.functional.jacobian(lambda x: layer(x, r), x, vectorize=True),
    }
    try:
        found = run[how]()
    except ddn.SensitivityError:
        return
    assert close(found, torch.autograd.functional.jacobian(lambda x: ball(x, r), x))


@on_all
def test_vmap_and_its_compositions(solver):
    case = CLOSED["ball-outside"]
    layer = ddn.DeclarativeLayer(case.problem, solver=solver)
    x, r = 3 * rand(5, 3, seed=4), vector(0.5, 0.7, 0.9, 1.1, 1.3)
    expected = torch.stack([ball(*s) for s in zip(x, r, strict=True)])
    assert close(torch.func.vmap(layer)(x, r), expected)
    assert close(torch.func.vmap(layer, in_dims=(0, None))(x, r[0]), torch.stack([ball(s, r[0]) for s in x]))
    assert close(torch.func.vmap(layer, in_dims=(1, 0))(x.T, r), expected)
    nested = torch.func.vmap(torch.func.vmap(layer, in_dims=(None, 0)), in_dims=(0, None))(x, r)
    assert close(nested, torch.stack([torch.stack([ball(s, q) for q in r]) for s in x]))
    inside = torch.func.vmap(lambda x: layer(x, r))(x)  # a batch inside a batch
    assert close(inside, nested)
    jacobians = torch.func.vmap(torch.func.jacrev(layer))(x, r)
    assert close(jacobians, torch.func.vmap(torch.func.jacrev(ball))(x, r), 1e-8)
    grads = torch.func.vmap(torch.func.grad(lambda x, r: layer(x, r).pow(2).sum(), argnums=1))(x, r)
    assert close(grads, 2 * r, 1e-8)
    hessians = torch.func.vmap(torch.func.hessian(lambda x, r: layer(x, r).sum()))(x, r)
    assert close(hessians, torch.func.vmap(torch.func.hessian(lambda x, r: ball(x, r).sum()))(x, r), 1e-8)


def test_checkpointing_retained_graphs_and_partial_requirements():
    case = CLOSED["ball-outside"]
    x = case.parameters["x"].clone().requires_grad_()
    r = case.parameters["r"]
    layer = ddn.DeclarativeLayer(case.problem)
    y = torch.utils.checkpoint.checkpoint(lambda x: layer(2 * x, r), x, use_reentrant=False)
    (a,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(ball(2 * x, r).sum(), x)
    assert close(a, b)
    y = layer(x, r)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_chained_and_bilevel_layers():
    """Eqs 28-30: two nodes chained equal the composed formula; through a loss backwards."""
    first = ddn.DeclarativeLayer(CLOSED["ball-outside"].problem)
    second = ddn.DeclarativeLayer(CLOSED["relu"].problem)
    x, r = vector(1, -2, 2).requires_grad_(), vector(1.5)[0].requires_grad_()
    found = torch.autograd.grad(second(first(x, r)).square().sum(), (x, r))
    expected = torch.autograd.grad(ball(x, r).relu().square().sum(), (x, r))
    for a, b in zip(found, expected, strict=True):
        assert close(a, b)


def test_the_optimal_value_needs_no_derivative_of_the_point():
    """Eqs 8-10: the objective's gradient is that of the Lagrangian in the parameters."""
    p = leaves(POINT)
    s = ddn.solve(NONLINEAR, p)
    grads = dict(zip(p, torch.autograd.grad(s.objective, list(p.values())), strict=True))
    u = s["u"].detach()
    direct = torch.autograd.grad(nonlinear_objective(u, p["x"]), p["x"])[0]
    assert close(grads["x"], direct)
    assert close(grads["b"], -s.dual.equality["sum"])
    assert close(grads["r"], -2 * p["r"] * s.dual.inequality["ball"])
    assert close(grads["top"], -s.dual.upper["u"].sum())


# -- invariances -------------------------------------------------------------------------------------------------------

SCALED = ddn.Problem(
    {"u": (4,)}, {"x": (4,), "r": (), "s": (), "c": ()}, lambda u, x, s: s * ((u - x).exp().sum() + (u - x).square().sum()),
    {"plane": lambda u, c: c * u.sum()}, {"ball": lambda u, r, c: c * (u.square().sum() - r**2)}, {"u": (-0.5, 0.5)},
)  # fmt: skip


@pytest.mark.parametrize("which", ["s", "c"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("solver", ["cvxpy:CLARABEL", "casadi:ipopt", "scipy:SLSQP"])
def test_scaling_objective_or_constraints_changes_no_gradient(which, factor, solver):
    x, r = 2 * rand(3, 4, seed=5), vector(0.8)[0]
    found = []
    for scale in (1.0, factor):
        p = leaves({"x": x, "r": r})
        scales = {"s": vector(1.0)[0], "c": vector(1.0)[0], which: vector(scale)[0]}
        # the reference is IPOPT's: this is about derivatives, whatever the backend makes of bad scaling
        s = ddn.solve(SCALED, {**p, **scales}, solver=solver if scale != 1 else "casadi:ipopt")
        found.append(
            [
                s["u"],
                s.certificate.ok,
                *torch.autograd.grad((s["u"] * rand(3, 4, seed=6)).sum(), list(p.values())),
            ]
        )
    for a, b in zip(*found, strict=True):
        assert close(a.double(), b.double(), 1e-8)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_does_not_change_attach(factor):
    x, r = 2 * rand(3, 4, seed=5), vector(0.8)[0]
    one = vector(1.0)[0]
    base = ddn.solve(SCALED, {"x": x, "r": r, "s": one, "c": one})["u"]
    found = []
    for scale in (one, one * factor):
        p = leaves({"x": x, "r": r})
        s = ddn.attach(SCALED, {**p, "s": scale, "c": one}, base + 1e-7 * rand(3, 4, seed=8))
        found.append(torch.autograd.grad((s["u"] * rand(3, 4, seed=6)).sum(), list(p.values())))
    for a, b in zip(*found, strict=True):
        assert close(a, b, 1e-8)


@on_all
@pytest.mark.parametrize("margin", [1e-3, 1e-4, 1e-5, 1e-6])
def test_small_margins_are_decided_rightly(margin, solver):
    """Slack or multiplier of 1e-6 is far above rounding: the gradient is two-sided and exact."""
    x = vector(margin, -margin, 2 * margin).requires_grad_()
    s = ddn.solve(CLOSED["relu"].problem, {"x": x}, solver=solver)
    assert s.certificate.ok
    assert close(s["u"], x.relu(), 1e-12)
    s["u"].sum().backward()
    assert close(x.grad, vector(1, 0, 1))


@on_all
def test_a_loose_backend_and_a_small_margin_still_give_the_right_gradient(solver):
    """DESIGN section 6: a QP with one margin of 2e-4 and a 1e-5 point."""
    P = torch.diag(vector(1.0, 10.0, 100.0)) + 0.5
    problem = ddn.Problem(
        {"u": (3,)}, {"q": (3,)}, lambda u, q: 0.5 * u @ P @ u + q @ u, bounds={"u": (0, None)}
    )
    y, multiplier = vector(0.5, 2e-4, 0), vector(0, 0, 2e-4)
    q = (multiplier - P @ y).requires_grad_()
    u = ddn.solve(problem, {"q": q}, solver=solver, options={"tolerance": 1e-5})["u"]
    assert close(u, y, 1e-12)
    (gradient,) = torch.autograd.grad(u.sum(), q)
    free = torch.linalg.solve(P[:2, :2], -torch.ones(2, dtype=D))
    assert close(gradient, torch.cat([free, vector(0)]), 1e-9)


# -- degenerate derivatives: the policy decides, the certificate says so -----------------------------------------

WEAK_CASES = {
    # id: (problem, parameters, gradient of u.sum() in x with all active, with all inactive)
    "relu": (CLOSED["relu"].problem, {"x": vector(0, 0, 1)}, vector(0, 0, 1), vector(1, 1, 1)),
    "ball": (
        CLOSED["ball-outside"].problem, {"x": vector(3, 4, 0) / 5, "r": vector(1.0)[0]},
        vector(1, 1, 1) - 1.4 * vector(0.6, 0.8, 0), vector(1, 1, 1),
    ),
    "upper": (
        ddn.Problem({"u": (3,)}, {"x": (3,)}, half_squares, bounds={"u": (None, 1.0)}),
        {"x": vector(1, 0.5, 1)}, vector(0, 1, 0), vector(1, 1, 1),
    ),
    "linear": (
        ddn.Problem({"u": (3,)}, {"x": (3,)}, half_squares, inequality={"half": lambda u: u[0] + u[1]}),
        {"x": vector(1, -1, 2)}, vector(0, 0, 1), vector(1, 1, 1),
    ),
}  # fmt: skip


def quietly(function):
    """Run and return result and the DegeneracyWarnings that came."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = function()
    assert all(issubclass(w.category, ddn.DegeneracyWarning) for w in record), [
        str(w.message) for w in record
    ]
    return result, record


@on_all
@pytest.mark.parametrize("choice", ["active", "inactive", "mean"])
@pytest.mark.parametrize("case", WEAK_CASES.values(), ids=WEAK_CASES)
def test_weakly_active_choices(case, choice, solver):
    problem, parameters, active, inactive = case
    p = leaves(parameters)
    s = ddn.solve(problem, p, solver=solver, policy=ddn.Policy(weakly_active=choice))
    assert close(s["u"], parameters["x"])
    c = s.certificate
    assert c.one_sided
    assert not c.ok
    assert not c.strictly_complementary
    assert c.margin < 1e-8
    assert any(mask.any() for mask in c.weakly_active.values())
    gradient, record = quietly(lambda: torch.autograd.grad(s["u"].sum(), p["x"])[0])
    assert len(record) <= 1
    expected = {"active": active, "inactive": inactive, "mean": 0.5 * (active + inactive)}[choice]
    assert close(gradient, expected, 1e-8)


def differentiate(function, problem, parameters, point, policy):
    """Go through a whole backward, by whichever entry."""
    if function == "sensitivity":
        values = {name: value.detach() for name, value in parameters.items()}
        ddn.sensitivity(problem, values, point, policy=policy).vjp({"u": torch.ones(3, dtype=D)})
    elif function == "solve":
        ddn.solve(problem, leaves(parameters), policy=policy)["u"].sum().backward()
    else:
        ddn.attach(problem, leaves(parameters), point, policy=policy)["u"].sum().backward()


@pytest.mark.parametrize("case", WEAK_CASES.values(), ids=WEAK_CASES)
@pytest.mark.parametrize("function", ["solve", "sensitivity", "attach"])
def test_weakly_active_raise(case, function):
    problem, parameters, *_ = case
    policy = ddn.Policy(weakly_active="raise")
    with pytest.raises(ddn.SensitivityError):
        differentiate(function, problem, parameters, parameters["x"], policy)


def test_weakly_active_in_one_sample_only():
    """A weakly active sample leaves the gradient of the others alone, and only it is flagged."""
    x = torch.tensor([[0.0, -1.0, 1.0], [2.0, -1.0, 1.0]], dtype=D, requires_grad=True)
    s = ddn.solve(CLOSED["relu"].problem, {"x": x}, policy=ddn.Policy(weakly_active="mean"))
    assert s.certificate.ok.tolist() == [False, True]
    gradient, _ = quietly(lambda: torch.autograd.grad(s["u"].sum(), x)[0])
    assert close(gradient, torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.0, 1.0]], dtype=D))


SHARED_MINIMUM = ddn.Problem(
    {"u": (3,)}, {"A": (2, 3), "b": (2,)}, lambda u, A, b: 0.5 * (A @ u - b).square().sum()
)
ALONG = ddn.Problem(  # singular with an equality: only u0 + u1 matters, u2 is fixed by it
    {"u": (3,)},
    {"x": (), "b": ()},
    lambda u, x: 0.5 * (u[0] + u[1] - x).square(),
    {"third": lambda u, b: u[2] - b},
)


@on_all
def test_a_singular_system_gives_the_minimum_norm_derivative_and_one_warning(solver):
    A, b = rand(2, 3), rand(2, seed=1).requires_grad_()
    s = ddn.solve(SHARED_MINIMUM, {"A": A, "b": b}, solver=solver)
    assert s.certificate.singular
    assert not s.certificate.ok
    assert s.certificate.null_space[0].shape == (3, 1)
    assert close(A @ s.certificate.null_space[0], torch.zeros(2, 1, dtype=D), 1e-8)
    gradient, record = quietly(lambda: torch.autograd.grad(s["u"] @ vector(1, 2, 3), b)[0])
    assert len(record) == 1
    assert close(gradient, torch.linalg.pinv(A).mT @ vector(1, 2, 3), 1e-8)


def test_a_singular_system_with_a_constraint():
    p = leaves({"x": vector(1.0)[0], "b": vector(2.0)[0]})
    s = ddn.solve(ALONG, p)
    assert s.certificate.singular
    found, record = quietly(lambda: torch.autograd.grad(s["u"] @ vector(1, 3, 5), list(p.values())))
    assert len(record) == 1
    assert close(torch.stack(found), vector(2, 5), 1e-8)


@pytest.mark.parametrize("function", ["solve", "attach", "sensitivity"])
def test_singular_raise(function):
    A, b = rand(2, 3), rand(2, seed=1)
    policy = ddn.Policy(on_singular="raise")
    point = torch.linalg.pinv(A) @ b
    with pytest.raises(ddn.SensitivityError):
        differentiate(function, SHARED_MINIMUM, {"A": A, "b": b}, point, policy)


@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6])
def test_singular_proximal(delta):
    A, b = rand(2, 3), rand(2, seed=1).requires_grad_()
    s = ddn.solve(SHARED_MINIMUM, {"A": A, "b": b}, policy=ddn.Policy(on_singular="proximal", proximal=delta))
    gradient, record = quietly(lambda: torch.autograd.grad(s["u"] @ vector(1, 2, 3), b)[0])
    assert len(record) <= 1
    proximal = A @ torch.linalg.solve(A.mT @ A + delta * torch.eye(3, dtype=D), vector(1, 2, 3))
    assert close(gradient, proximal, 1e-7)


def test_the_papers_example_36():
    """f = -x^T u / |u| at y = alpha x: the pseudo-inverse gradient is alpha (I - x x^T / |x|^2)."""
    problem = ddn.Problem({"u": (4,)}, {"x": (4,)}, lambda u, x: -(x @ u) / u.norm())
    x, alpha = rand(4), 0.7
    sensitivity = ddn.sensitivity(problem, {"x": x}, alpha * x)
    jacobian, record = quietly(lambda: sensitivity.jacobian(of="u", wrt="x"))
    assert len(record) == 1
    expected = alpha * (torch.eye(4, dtype=D) - torch.outer(x, x) / x.square().sum())
    assert close(jacobian, expected, 1e-8)
    null = sensitivity.certificate.null_space[0]
    assert null.shape == (4, 1)
    assert close(null.abs()[:, 0], (x / x.norm()).abs(), 1e-7)


@on_all
def test_dependent_constraints_are_reported_and_the_derivative_is_right(solver):
    """The same plane twice: multipliers are not unique, the point and its derivative are."""
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, half_squares, {"one": lambda u: u.sum(), "two": lambda u: 2 * u.sum()}
    )
    x = rand(3).requires_grad_()
    s = ddn.solve(problem, {"x": x}, solver=solver)
    assert close(s["u"], x - x.mean())
    assert not s.certificate.licq
    assert s.certificate.rank_deficiency == 1
    jacobian, _ = quietly(
        lambda: torch.stack([torch.autograd.grad(s["u"][i], x, retain_graph=True)[0] for i in range(3)])
    )
    assert close(jacobian, torch.eye(3, dtype=D) - 1 / 3, 1e-8)


@on_nlp
def test_equalities_folded_into_a_sum_of_squares_are_detected(solver):
    """D_Y h = 0: no derivative must come out as if nothing were wrong."""
    problem = ddn.Problem(
        {"u": (2,)}, {"x": (2,)}, lambda u: u.square().sum(), {"folded": lambda u, x: (u - x).square().sum()}
    )
    x = vector(0.5, -0.3).requires_grad_()
    try:
        s = ddn.solve(problem, {"x": x}, solver=solver)
    except ddn.SolveError:
        return
    assert not s.certificate.ok
    assert not s.certificate.licq
    _, record = quietly(lambda: torch.autograd.grad(s["u"].sum(), x))
    assert len(record) == 1


STATIONARY = {
    "saddle": (
        lambda u, x: (u[0] - x[0]).square() - (u[1] - x[1] ** 2).square(),
        lambda x: torch.stack([x[0], x[1] ** 2]),
    ),
    "maximum": (lambda u, x: -(u - x.exp()).square().sum(), torch.exp),
    "minimum": (lambda u, x: (u - x.exp()).square().sum(), torch.exp),
}


@pytest.mark.parametrize("name", STATIONARY)
def test_prop_4_4_holds_at_any_stationary_point(name):
    objective, formula = STATIONARY[name]
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, objective)
    x = vector(0.4, -0.7)
    sensitivity = ddn.sensitivity(problem, {"x": x}, formula(x))
    assert bool(sensitivity.certificate.sosc) == (name == "minimum")
    expected = torch.autograd.functional.jacobian(formula, x)
    assert close(sensitivity.jacobian(of="u", wrt="x"), expected)
    y = x.clone().requires_grad_()
    ddn.attach(problem, {"x": y}, formula(x))["u"].sum().backward()
    assert close(y.grad, expected.sum(0))
    if name != "minimum":
        with pytest.raises(ddn.SolveError):
            ddn.solve(problem, {"x": x}, solver="scipy:SLSQP", initial=formula(x))


# -- points found elsewhere -------------------------------------------------------------------------------------------

BALL = CLOSED["ball-outside"].problem


@pytest.mark.parametrize("function", [ddn.sensitivity, ddn.attach], ids=["sensitivity", "attach"])
def test_a_point_that_is_no_solution_is_refused(function):
    x, r = vector(1, 2, -2), vector(1.5)[0]
    for point in (x, torch.zeros(3, dtype=D), ball(x, r) + 1e-2):
        with pytest.raises(ddn.SensitivityError):
            function(BALL, {"x": x, "r": r}, point)


INFINITE_AT_ZERO = {
    "entr": lambda u, c: (c * u - torch.special.entr(u)).sum(),
    "xlogy": lambda u, c: (c * u + torch.xlogy(u, u)).sum(),
    "log": lambda u, c: (c * u + u * u.log()).sum(),
    "sqrt": lambda u, c: (c * u - u.sqrt()).sum(),
    "reciprocal": lambda u, c: (c * u + 1 / u).sum(),
}


@pytest.mark.parametrize("bounds", [{}, {"u": (0.0, 1.0)}], ids=["free", "bounds"])
@pytest.mark.parametrize("name", INFINITE_AT_ZERO)
def test_a_point_where_a_slope_is_infinite_is_no_solution(name, bounds):
    """f'(0+) = -inf holds no multiplier of u >= 0, at one entry or at all; without a word of NumPy's."""
    problem = ddn.Problem({"u": (3,)}, {"c": ()}, INFINITE_AT_ZERO[name], bounds=bounds)
    for point in (vector(0, 0, 0), vector(0, 0.1, 0.2)):
        for function in (ddn.attach, ddn.sensitivity):
            with pytest.raises(ddn.SensitivityError, match="not a KKT point"):
                function(problem, {"c": vector(1)[0]}, point)


@pytest.mark.parametrize(
    "solver", ["scipy:SLSQP", "scipy:L-BFGS-B", "scipy:trust-constr", "casadi:ipopt", "auto"]
)
@pytest.mark.parametrize("name", ["entr", "xlogy", "log"])
def test_no_solver_stays_at_the_end_where_an_entropy_is_infinitely_steep(name, solver):
    """min c u + u log u over [0, 1] is at u = exp(-1 - c); from zero, where methods begin, and from where one steps there."""
    problem = ddn.Problem({"u": ()}, {"c": ()}, INFINITE_AT_ZERO[name], bounds={"u": (0.0, 1.0)})
    c = vector(1)[0].requires_grad_()
    for start in (0.0, 0.1, 0.5):
        s = ddn.solve(problem, {"c": c}, solver, initial=vector(start)[0])
        assert close(s["u"], torch.exp(-1 - c))
        assert close(torch.autograd.grad(s["u"], c)[0], -torch.exp(-1 - c))


def test_failed_given_points_follow_the_policy():
    x, r = torch.stack([vector(1, 2, -2)] * 2).requires_grad_(), vector(1.5)[0]
    point = torch.stack([ball(x[0], r), vector(5, 5, 5)]).detach()
    exact = torch.autograd.grad(ball(x[0], r).sum(), x)[0]
    s = ddn.attach(BALL, {"x": x, "r": r}, point, policy=ddn.Policy("mask"))
    (gradient,) = torch.autograd.grad(s["u"].sum(), x)
    assert close(gradient, exact)
    s = ddn.attach(BALL, {"x": x, "r": r}, point, policy=ddn.Policy("nan"))
    (gradient,) = torch.autograd.grad(s["u"][0].sum(), x, retain_graph=True)
    assert close(gradient[0], exact[0])
    assert torch.autograd.grad(s["u"].sum(), x)[0][1].isnan().all()
    with pytest.warns(ddn.ConvergenceWarning):
        ddn.sensitivity(BALL, {"x": x.detach(), "r": r}, point, policy=ddn.Policy("warn"))


def test_attach_in_float32():
    x, r = vector(1, 2, -2).float().requires_grad_(), torch.tensor(1.5, requires_grad=True)
    point = ball(x, r).detach()
    s = ddn.attach(BALL, {"x": x, "r": r}, point)
    assert s["u"].dtype == torch.float32
    assert torch.equal(s["u"], point)
    found = torch.autograd.grad(s["u"] @ torch.tensor([1.0, 2.0, 3.0]), (x, r))
    expected = torch.autograd.grad(ball(x.double(), r.double()) @ vector(1, 2, 3), (x, r))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sensitivity_takes_the_dual_of_a_solution():
    s = ddn.solve(NONLINEAR, POINT)
    with_dual = ddn.sensitivity(NONLINEAR, POINT, s.primal, s.dual)
    without = ddn.sensitivity(NONLINEAR, POINT, s.primal)
    for name in POINT:
        assert close(with_dual.jacobian("u", name), without.jacobian("u", name), 1e-8)
    assert with_dual.certificate.ok


def test_vjp_and_jacobian_by_every_key():
    p = leaves(POINT)
    s = ddn.solve(NONLINEAR, p)
    sensitivity = ddn.sensitivity(NONLINEAR, POINT, s["u"].detach())
    keys = {
        "u": s["u"], "objective": s.objective, "equality.sum": s.dual.equality["sum"], "inequality.ball": s.dual.inequality["ball"],
        "inequality.soft": s.dual.inequality["soft"], "lower.u": s.dual.lower["u"], "upper.u": s.dual.upper["u"],
    }  # fmt: skip
    for key, output in keys.items():
        v = rand(*output.shape, seed=9)
        expected = torch.autograd.grad((output * v).sum(), list(p.values()), retain_graph=True)
        found = sensitivity.vjp({key: v})
        assert list(found) == list(POINT)
        for name, e in zip(POINT, expected, strict=True):
            assert close(found[name], e, 1e-8), (key, name)
            jacobian = sensitivity.jacobian(of=key, wrt=name)
            assert jacobian.shape == (*output.shape, *POINT[name].shape)
            assert close(torch.tensordot(v, jacobian, v.dim()), e, 1e-8), (key, name)


WRONG_KEYS = {
    "cotangent": lambda s: s.vjp({"v": vector(1, 2, 3)}),
    "cotangent-multiplier": lambda s: s.vjp({"inequality.plane": vector(1)[0]}),
    "cotangent-shape": lambda s: s.vjp({"u": vector(1, 2)}),
    "cotangent-no-dict": lambda s: s.vjp([1]),
    "cotangent-tensor": lambda s: s.vjp(vector(1, 2, 3)),
    "tangent-no-dict": lambda s: s.jvp([1]),
    "tangent-none": lambda s: s.jvp(None),
    "tangent": lambda s: s.jvp({"y": vector(1, 2, 3)}),
    "tangent-shape": lambda s: s.jvp({"x": vector(1, 2)}),
    "jacobian-of": lambda s: s.jacobian(of="w", wrt="x"),
    "jacobian-wrt": lambda s: s.jacobian(of="u", wrt="w"),
}


@pytest.mark.parametrize("wrong", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_wrong_keys_of_a_sensitivity(wrong):
    x, r = vector(1, 2, -2), vector(1.5)[0]
    with pytest.raises(ddn.ProblemError):
        wrong(ddn.sensitivity(BALL, {"x": x, "r": r}, ball(x, r)))


def test_batched_sensitivity_shapes_and_shared_parameters():
    x, r = 3 * rand(2, 3, 3, seed=4), vector(0.5)[0]
    point = r * x / x.norm(dim=-1, keepdim=True)
    s = ddn.sensitivity(BALL, {"x": x, "r": r}, {"u": point})
    assert s.jacobian(of="u", wrt="x").shape == (2, 3, 3, 3)
    assert s.jacobian(of="u", wrt="r").shape == (2, 3, 3)
    assert close(s.jacobian(of="u", wrt="r"), x / x.norm(dim=-1, keepdim=True), 1e-8)
    grads = s.vjp({"u": torch.ones(3, dtype=D)})
    assert grads["x"].shape == (2, 3, 3)
    assert grads["r"].shape == ()
    assert close(grads["r"], (x / x.norm(dim=-1, keepdim=True)).sum(), 1e-8)
    assert s.jvp({"r": vector(1)[0]})["u"].shape == (2, 3, 3)
    assert s.certificate.ok.shape == (2, 3)
    assert s.jvp({})["u"].abs().max() == 0
    assert s.vjp({})["x"].abs().max() == 0


def test_attach_checks_the_point_only_against_the_parameters_given():
    """The batch of point and parameters broadcast: one parameter set, two KKT points of it."""
    problem = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: (u.square() - x.square()).square())
    x = vector(1.5)[0].requires_grad_()
    s = ddn.attach(problem, {"x": x}, vector(1.5, -1.5))
    jacobian = [torch.autograd.grad(s["u"][i], x, retain_graph=True)[0] for i in range(2)]
    assert close(torch.stack(jacobian), vector(1, -1))


def test_a_certificate_of_a_good_solution():
    c = ddn.solve(NONLINEAR, POINT).certificate
    for name in ("ok", "licq", "sosc", "strictly_complementary"):
        value = getattr(c, name)
        assert value.dtype == torch.bool
        assert value, name
    assert not c.singular
    assert not c.one_sided
    assert c.rank_deficiency == 0
    assert 1 <= c.condition < 1e8
    assert c.null_space[0].shape == (N, 0)
    assert set(c.active) == {"sum", "ball", "soft", "u.lower", "u.upper"}
    assert c.active["u.lower"].shape == (N,)
    for name in ("stationarity", "feasibility", "complementarity"):
        assert getattr(c, name) < 1e-10


def test_float32_in_gives_float32_gradients_and_a_decided_active_set():
    case = CLOSED["simplex"]
    x32 = case.parameters["x"].float().requires_grad_()
    x64 = x32.detach().double().requires_grad_()
    for x in (x32, x64):
        ddn.solve(case.problem, {"x": x})["u"].square().sum().backward()
    assert x32.grad.dtype == torch.float32
    assert torch.allclose(x32.grad.double(), x64.grad, rtol=1e-6, atol=1e-7)


def test_the_cost_of_unneeded_gradients_is_not_asked_for():
    x, r = vector(1, 2, -2).requires_grad_(), vector(1.5)[0]
    (ddn.solve(BALL, {"x": x, "r": r})["u"].sum() + 0 * r).backward()
    assert x.grad is not None
    assert r.grad is None


FALLING_SHORT = ddn.Problem(
    {"u": (2,)},
    {"x": (2,)},
    lambda u, x: (u - x).square().sum(),
    inequality={"i": lambda u: 100 * (u[0] - 1)},
)


@pytest.mark.parametrize(("choice", "failed"), [("nan", float("nan")), ("mask", 0.0)])
def test_sensitivity_at_a_point_that_is_no_kkt_point_is_what_the_policy_says(choice, failed):
    x = torch.tensor([[0.5, 2.0], [0.3, 0.4]], dtype=D)
    primal = torch.tensor([[0.5, 2.0], [0.0, 0.0]], dtype=D)
    s = ddn.sensitivity(FALLING_SHORT, {"x": x}, primal, policy=ddn.Policy(choice))
    assert s.certificate.ok.tolist() == [True, False]
    ones = torch.ones(2, 2, dtype=D)
    for found in (s.vjp({"u": ones})["x"], s.jvp({"x": ones})["u"]):
        torch.testing.assert_close(
            found, torch.tensor([[1.0, 1.0], [failed, failed]], dtype=D), equal_nan=True
        )
    jacobian = torch.stack([torch.eye(2, dtype=D), torch.full((2, 2), failed, dtype=D)])
    torch.testing.assert_close(s.jacobian(), jacobian, equal_nan=True)
    empty = torch.zeros(0, 2, dtype=D)
    assert ddn.sensitivity(FALLING_SHORT, {"x": empty}, empty).jacobian().shape == (0, 2, 2)


@pytest.mark.filterwarnings("ignore::ddn_solvers.ConvergenceWarning")
def test_attach_tells_objective_and_residuals_of_the_point_it_returns():
    x = torch.tensor([3.0, 2.0], dtype=D, requires_grad=True)
    near = ddn.attach(FALLING_SHORT, {"x": x}, torch.tensor([1 + 5e-6, 2.0], dtype=D))
    assert near.objective.item() == pytest.approx((2 - 5e-6) ** 2, abs=1e-14)
    assert near.residuals.feasibility.item() == pytest.approx(5e-4)
    (slope,) = torch.autograd.grad(near.objective, x)
    torch.testing.assert_close(slope, torch.tensor([4.0, 0.0], dtype=D))  # at the polish
    far = ddn.attach(FALLING_SHORT, {"x": x}, torch.tensor([1.5, 0.0], dtype=D), policy=ddn.Policy("warn"))
    assert far.objective.item() == 6.25
    assert far.residuals.feasibility.item() == 50.0


def test_second_derivatives_of_failed_samples_are_not_numbers_in_any_mode():
    problem = ddn.Problem(
        {"u": ()}, {"x": ()}, lambda u, x: (u - x) ** 2, inequality=[lambda u: u - 1, lambda u: 2 - u]
    )
    for choice, right in (("nan", float("nan")), ("mask", 0.0)):

        def square(x, choice=choice):
            return ddn.solve(problem, {"x": x}, policy=ddn.Policy(choice))["u"] ** 2

        at = torch.tensor(1.0, dtype=D)
        for transform in (torch.func.hessian, lambda f: torch.func.grad(torch.func.grad(f))):
            assert transform(square)(at).item() == pytest.approx(right, nan_ok=True)


def test_options_and_multipliers_that_are_no_such_thing_say_so():
    x = torch.ones(2, dtype=D)
    with pytest.raises(ddn.ProblemError, match="options are no dict"):
        ddn.solve(FALLING_SHORT, {"x": x}, options=3)
    with pytest.raises(ddn.ProblemError, match="dual is not valid"):
        ddn.sensitivity(FALLING_SHORT, {"x": x}, x, dual={"u": 3})
