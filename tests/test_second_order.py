"""Derivatives as a contract: second and higher orders where multipliers move, every output, mixed batches, cost."""

import os
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import ddn_solvers as ddn
from ddn_solvers.kkt import linear, system

# torch's forward mode compiles decompositions with the deprecated torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
D = torch.float64
N = 20
SOLVERS = ("scipy:SLSQP", "casadi:ipopt", "cvxpy:CLARABEL")
on_all = pytest.mark.parametrize("solver", SOLVERS)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def close(found, expected, tolerance=1e-9):
    """To a tolerance relative to the largest entry, at least 1."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance * scale)


def leaves(parameters):
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


# -- closed forms whose multipliers move ---------------------------------------------------------------------------


def implicit_root(equations, start):
    """The root of ``equations(theta) = 0``, differentiable to order seven.

    Newton's method finds it; three more of its steps, recorded by autograd, double the order that is right.
    """
    theta = start
    for step in range(40):
        theta = theta.detach() if step < 37 else theta
        residual = equations(theta)
        jacobian = torch.stack([
            torch.autograd.grad(r, t, create_graph=True)[0]
            for t in [theta if theta.requires_grad else theta.requires_grad_()]
            for r in equations(t)
        ])  # fmt: skip
        theta = theta - torch.linalg.solve(jacobian, residual)
    return theta


WEIGHTS = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=D)


def ellipsoid(x, r, a):
    """argmin 1/2 |u - x|^2 with sum a u^2 = r^2: u = x / (1 + 2 nu a)."""

    def excess(nu):
        return ((a * (x / (1 + 2 * nu * a)).square()).sum() - r**2).reshape(1)

    nu = implicit_root(excess, torch.zeros(1, dtype=D))
    return x / (1 + 2 * nu * a), nu[0]


def entropic(x, d, C):
    """argmin sum u log u - x u with sum u = 1, C u = d: u = softmax(x + C^T theta)."""

    def excess(theta):
        return C @ torch.softmax(x + theta @ C, 0) - d

    theta = implicit_root(excess, torch.zeros(2, dtype=D))
    return torch.softmax(x + theta @ C, 0), -theta[0]


def sphere(x, r):
    return r * x / x.norm(), 0.5 * (x.norm() / r - 1)


MOMENTS = rand(2, N, seed=2)
ONE_FORM = {
    # name: problem, parameters, formula of (u, a multiplier), the multiplier's place, convex
    "ellipsoid": (
        ddn.Problem(
            {"u": (N,)}, {"x": (N,), "r": (), "a": (N,)}, lambda u, x: 0.5 * (u - x).square().sum(),
            {"c": lambda u, r, a: (a * u.square()).sum() - r**2},
        ),
        {"x": rand(N, seed=3), "r": torch.tensor(2.0, dtype=D), "a": WEIGHTS}, ellipsoid, lambda s: s.dual.equality["c"], False,
    ),
    "ellipsoid-ball": (
        ddn.Problem(
            {"u": (N,)}, {"x": (N,), "r": (), "a": (N,)}, lambda u, x: 0.5 * (u - x).square().sum(),
            inequality={"c": lambda u, r, a: (a * u.square()).sum() - r**2},
        ),
        {"x": rand(N, seed=3), "r": torch.tensor(2.0, dtype=D), "a": WEIGHTS}, ellipsoid, lambda s: s.dual.inequality["c"], True,
    ),
    "sphere-of-parametric-radius": (
        ddn.Problem(
            {"u": (N,)}, {"x": (N,), "r": ()}, lambda u, x: 0.5 * (u - x).square().sum(),
            {"c": lambda u, r: u.square().sum() - r**2},
        ),
        {"x": rand(N, seed=4), "r": torch.tensor(1.5, dtype=D)}, sphere, lambda s: s.dual.equality["c"], False,
    ),
    "entropic": (
        ddn.Problem(
            {"u": (N,)}, {"x": (N,), "d": (2,), "C": (2, N)}, lambda u, x: (u * u.log()).sum() - x @ u,
            {"sum": lambda u: u.sum() - 1, "moments": lambda u, d, C: C @ u - d}, bounds={"u": (1e-9, None)},
        ),
        {"x": 0.5 * rand(N, seed=5), "d": torch.tensor([0.2, -0.1], dtype=D), "C": MOMENTS}, entropic,
        lambda s: s.dual.equality["moments"][..., 0], True,
    ),
}  # fmt: skip
FORMS = [
    pytest.param(*form[:4], solver, id=f"{name}-{solver}")
    for name, form in ONE_FORM.items()
    for solver in SOLVERS
    if solver != "cvxpy:CLARABEL" or (form[4] and name != "entropic")
]
on_forms = pytest.mark.parametrize(("problem", "parameters", "formula", "multiplier", "solver"), FORMS)


def start_of(parameters):
    """The parameter x itself on its side of a sphere; a distribution for the entropic problem."""
    return {"u": torch.full((N,), 1 / N, dtype=D)} if "d" in parameters else {"u": parameters["x"]}


@on_forms
def test_second_derivatives_of_point_and_multiplier(problem, parameters, formula, multiplier, solver):
    """Full Hessians of a loss in every parameter, by double backward, against the formula's."""
    weights, names = rand(N, seed=6), list(parameters)

    def ours(*p):
        given = dict(zip(names, p, strict=True))
        s = ddn.solve(problem, given, solver=solver, initial=start_of(parameters))
        return (weights * s["u"]).sum() + s["u"].pow(3).sum() + multiplier(s).square()

    def theirs(*p):
        u, nu = formula(*p)
        return (weights * u).sum() + u.pow(3).sum() + nu.square()

    values = tuple(parameters.values())
    found = torch.autograd.functional.hessian(ours, values)
    expected = torch.autograd.functional.hessian(theirs, values)
    for a, b in zip(found, expected, strict=True):
        for ours_, theirs_ in zip(a, b, strict=True):
            close(ours_, theirs_)


@pytest.mark.parametrize("through", ["layer", "solve"])
@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
@pytest.mark.parametrize("name", ["ellipsoid", "sphere-of-parametric-radius", "entropic"])
def test_torch_func_hessian(name, solver, through):
    problem, parameters, formula, _, _ = ONE_FORM[name]
    weights, start = rand(N, seed=6), start_of(parameters)
    x, *others = parameters.values()
    layer = ddn.DeclarativeLayer(problem, solver)

    def loss(x):
        if through == "layer":
            u = layer(x, *others, initial=start)
        else:
            given = dict(zip(parameters, (x, *others), strict=True))
            u = ddn.solve(problem, given, solver=solver, initial=start)["u"]
        return (weights * u).sum() + u.pow(3).sum()

    def reference(x):
        u = formula(x, *others)[0]
        return (weights * u).sum() + u.pow(3).sum()

    close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(reference, x))


@on_forms
def test_third_derivatives(problem, parameters, formula, multiplier, solver):
    """Along two directions: d/dp of d^2 loss [a, b], in every parameter, with the multiplier in the loss."""

    def third(solve):
        p = leaves(parameters)
        u, nu = solve(p)
        value = u.pow(3).sum() + (rand(N, seed=6) * u).sum() + nu.square()
        for seed in (60, 70):
            grads = torch.autograd.grad(value, list(p.values()), create_graph=True)
            value = sum((g * rand(*g.shape, seed=seed + i)).sum() for i, g in enumerate(grads))
        return torch.autograd.grad(value, list(p.values()))

    def solve(p):
        s = ddn.solve(problem, p, solver=solver, initial=start_of(parameters))
        return s["u"], multiplier(s)

    for ours, theirs in zip(third(solve), third(lambda p: formula(**p)), strict=True):
        close(ours, theirs, 1e-8)


# -- a problem with everything, n = 20 -----------------------------------------------------------------------------

MIX = rand(N, N, seed=10) / N**0.5
GENERAL = ddn.Problem(
    {"u": (N,)},
    {"x": (N,), "r": (2,), "top": ()},
    lambda u, x: torch.logsumexp(u - x, 0) + 0.5 * (MIX @ u - x).square().sum() + 0.1 * torch.exp(-u).sum(),
    {"sum": lambda u, r: u[: N // 2].sum() - r[0]},
    {"ball": lambda u, r: u.square().sum() - r[1].square(), "soft": lambda u: u[-3:].exp().sum() - 2.5},
    {"u": (-0.5, "top")},
)
AT = {"x": rand(N, seed=11), "r": torch.tensor([0.3, 1.6], dtype=D), "top": torch.tensor(0.6, dtype=D)}


def everything(s):
    """All differentiable outputs of a solution, (*batch, k)."""
    d = s.dual
    columns = (d.equality["sum"], d.inequality["ball"], d.inequality["soft"], s.objective)
    return torch.cat([s["u"], d.lower["u"], d.upper["u"], torch.stack(columns, -1)], -1)


def test_the_general_problem_has_every_kind_of_active_constraint():
    c = ddn.solve(GENERAL, AT, solver="casadi:ipopt").certificate
    assert c.ok
    assert c.active["ball"]
    assert c.active["u.lower"].any()
    assert c.active["u.upper"].any()
    assert c.margin > 1e-3


@pytest.mark.parametrize("solver", ["casadi:ipopt", "scipy:SLSQP"])
def test_gradcheck_at_default_tolerances(solver):
    names, values = list(AT), tuple(leaves(AT).values())

    def outputs(*p):
        s = ddn.solve(GENERAL, dict(zip(names, p, strict=True)), solver=solver)
        return s["u"], s.dual.equality["sum"], s.dual.inequality["ball"], s.dual.lower["u"], s.objective

    assert torch.autograd.gradcheck(outputs, values, check_forward_ad=solver == "casadi:ipopt")


def test_gradgradcheck_at_default_tolerances():
    names, values = list(AT), tuple(leaves(AT).values())

    def outputs(*p):
        s = ddn.solve(GENERAL, dict(zip(names, p, strict=True)), solver="casadi:ipopt")
        return s["u"], s.dual.equality["sum"], s.dual.inequality["ball"], s.dual.upper["u"], s.objective

    assert torch.autograd.gradgradcheck(outputs, values)


@on_all
def test_second_derivatives_of_every_output_equal_differences_of_re_solved_gradients(solver):
    """d/dp (v . outputs) differentiated along a direction, against its central difference."""
    v = rand(len(everything(ddn.solve(GENERAL, AT))), seed=12)
    direction = {name: rand(*value.shape, seed=13 + i) for i, (name, value) in enumerate(AT.items())}

    def gradient(p, solver, create_graph=False):
        outputs = everything(ddn.solve(GENERAL, p, solver=solver))
        return torch.autograd.grad(outputs @ v, list(p.values()), create_graph=create_graph)

    p = leaves(AT)
    first = gradient(p, solver, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(first, direction.values(), strict=True))
    second = torch.autograd.grad(along, list(p.values()))
    step = 1e-5
    either = [
        gradient(leaves({k: AT[k] + sign * step * direction[k] for k in AT}), "casadi:ipopt")
        for sign in (1, -1)
    ]
    for found, above, below in zip(second, *either, strict=True):
        close(found, (above - below) / (2 * step), 1e-7)


def test_jvp_of_every_output_is_the_transpose_of_its_vjp():
    tangents = {name: rand(*t.shape, seed=20 + i) for i, (name, t) in enumerate(AT.items())}
    with forward_ad.dual_level():
        p = {name: forward_ad.make_dual(AT[name], tangents[name]) for name in AT}
        forward = forward_ad.unpack_dual(everything(ddn.solve(GENERAL, p, solver="casadi:ipopt"))).tangent
    p = leaves(AT)
    v = rand(*forward.shape, seed=30)
    outputs = everything(ddn.solve(GENERAL, p, solver="casadi:ipopt"))
    backward = torch.autograd.grad(outputs @ v, list(p.values()))
    close(forward @ v, sum((b * t).sum() for b, t in zip(backward, tangents.values(), strict=True)), 1e-12)


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
def test_torch_func_over_a_problem_that_captures_a_constant(transform):
    """Whether the constant changed was looked up by an operation inside the transform, which has no data."""
    scales = WEIGHTS.clone()
    problem = ddn.Problem(
        {"u": (N,)}, {"x": (N,)}, lambda u, x: 0.5 * (scales * u.square()).sum() - u @ x.sin()
    )
    x = rand(N, seed=3)

    def loss(x):
        return ddn.solve(problem, {"x": x}, solver="casadi:daqp")["u"].pow(3)

    def reference(x):
        return (x.sin() / WEIGHTS).pow(3)

    if transform == "hessian":
        found, expected = (torch.func.hessian(lambda x, f=f: f(x).sum())(x) for f in (loss, reference))
    else:
        found, expected = (getattr(torch.func, transform)(f)(x) for f in (loss, reference))
    close(found, expected)


# -- the optimal value ---------------------------------------------------------------------------------------------


def test_the_optimal_values_gradient_is_that_of_the_lagrangian():
    """Envelope theorem: d/dp f* = d/dp L with point and multipliers held fixed; its second derivative is not."""
    p = leaves(AT)
    s = ddn.solve(GENERAL, p, solver="casadi:ipopt")
    found = torch.autograd.grad(s.objective, list(p.values()), create_graph=True)
    u, d = s["u"].detach(), s.dual
    fixed = leaves(AT)
    lagrangian = (
        GENERAL.objective(u, fixed["x"])
        + d.equality["sum"].detach() * (u[: N // 2].sum() - fixed["r"][0])
        + d.inequality["ball"].detach() * (u.square().sum() - fixed["r"][1].square())
        + (d.upper["u"].detach() * (u - fixed["top"])).sum()
    )
    for a, b in zip(found, torch.autograd.grad(lagrangian, list(fixed.values())), strict=True):
        close(a, b, 1e-12)
    (second,) = torch.autograd.grad(found[0] @ rand(N, seed=31), p["x"])
    step = 1e-5
    either = []
    for sign in (1, -1):
        q = leaves({**AT, "x": AT["x"] + sign * step * rand(N, seed=31)})
        either += torch.autograd.grad(ddn.solve(GENERAL, q, solver="casadi:ipopt").objective, q["x"])
    close(second, (either[0] - either[1]) / (2 * step), 1e-7)


def test_the_optimal_values_gradient_needs_no_solve(monkeypatch):
    p = leaves(AT)
    s = ddn.solve(GENERAL, p, solver="casadi:ipopt")
    found = ddn.sensitivity(GENERAL, AT, s["u"].detach())

    def refuse(*_args, **_keywords):
        raise AssertionError("a linear system was solved")

    monkeypatch.setattr(system.System, "solve", refuse)
    monkeypatch.setattr(system.System, "__init__", refuse)
    (gradient,) = torch.autograd.grad(s.objective, p["top"])
    close(gradient, -s.dual.upper["u"].sum(), 1e-12)
    close(found.vjp({"objective": torch.ones((), dtype=D)})["top"], gradient)


# -- batches --------------------------------------------------------------------------------------------------------

BOXED = ddn.Problem(
    {"u": (N,)},
    {"x": (N,), "low": (N,), "high": (N,), "r": (), "b": ()},
    lambda u, x: 0.5 * (u - x).square().sum() + 0.1 * torch.exp(u - x).sum() + 0.05 * (u * x).sum().square(),
    {"plane": lambda u, b: u[:4].sum() - b},
    {"ball": lambda u, r: u.square().sum() - r.square()},
    {"u": ("low", "high")},
)


def mixed_batch():
    """One sample a kind of active set: none, lower, upper, both, ball, ball and bounds, fixed variables."""
    far, half = torch.full((N,), 50.0, dtype=D), torch.full((N,), 0.4, dtype=D)
    fixed = torch.where(torch.arange(N) < 2, 0.2, far)
    kinds = [
        (-far, far, 50.0), (-half, far, 50.0), (-far, half, 50.0), (-half, half, 50.0), (-far, far, 1.0),
        (-half, half, 1.0), (torch.where(fixed == 0.2, 0.2, -far), fixed, 50.0),
        (torch.where(fixed == 0.2, 0.2, -half), torch.where(fixed == 0.2, 0.2, half), 1.2),
    ]  # fmt: skip
    return {
        "x": rand(len(kinds), N, seed=40),
        "low": torch.stack([k[0] for k in kinds]),
        "high": torch.stack([k[1] for k in kinds]),
        "r": torch.tensor([k[2] for k in kinds], dtype=D),
        "b": 0.3 + 0.05 * rand(len(kinds), seed=41),
    }


def derivatives(parameters, solver):
    """First and second derivatives of one loss per sample, of point, multipliers and objective."""
    p = leaves(parameters)
    s = ddn.solve(BOXED, p, solver=solver)
    d = s.dual
    outputs = torch.cat([
        s["u"], d.lower["u"], d.upper["u"], d.equality["plane"][..., None], d.inequality["ball"][..., None],
        s.objective[..., None],
    ], -1)  # fmt: skip
    loss = (outputs * rand(outputs.shape[-1], seed=42)).sum()
    first = torch.autograd.grad(loss, list(p.values()), create_graph=True)
    inner = sum((g * g).sum() for g in first)
    return s, [*first, *torch.autograd.grad(inner, list(p.values()))]


@on_all
def test_a_batch_of_every_kind_of_active_set_equals_its_samples_alone(solver):
    parameters = mixed_batch()
    s, together = derivatives(parameters, solver)
    active = s.certificate.active
    kinds = {
        tuple(bool(active[name][i].any()) for name in ("ball", "u.lower", "u.upper"))
        for i in range(len(s["u"]))
    }
    assert len(kinds) >= 6
    assert s.certificate.ok.all()
    for i in range(len(s["u"])):
        _, alone = derivatives({name: value[i] for name, value in parameters.items()}, solver)
        for a, b in zip(together, alone, strict=True):
            close(a[i], b, 1e-10)


def test_a_batch_of_every_kind_of_active_set_equals_differences():
    parameters = mixed_batch()
    p = leaves(parameters)
    weights = rand(N, seed=43)
    (found,) = torch.autograd.grad((ddn.solve(BOXED, p)["u"] @ weights).sum(), p["x"])
    step = 1e-5
    for j in (0, 1, 5, 12, N - 1):
        values = [
            ddn.solve(BOXED, {**parameters, "x": parameters["x"] + sign * step * torch.eye(N, dtype=D)[j]})[
                "u"
            ]
            @ weights
            for sign in (1, -1)
        ]
        close(found[:, j], (values[0] - values[1]) / (2 * step), 1e-8)


@pytest.mark.parametrize("create_graph", [False, True])
def test_degenerate_samples_leave_the_others_alone(create_graph):
    """A weakly active, a singular and a failing sample beside regular ones."""
    regular = mixed_batch()
    weak = {**{name: value[0] for name, value in regular.items()}, "x": regular["x"][0]}
    free = ddn.solve(BOXED, weak)["u"]
    weak["high"] = torch.where(torch.arange(N) == 7, free, weak["high"])
    pinned = {"x": rand(N, seed=44), "low": torch.full((N,), 0.1, dtype=D), "high": torch.full((N,), 0.1, dtype=D), "r": torch.tensor(50.0, dtype=D), "b": torch.tensor(0.4, dtype=D)}  # fmt: skip
    failing = {**pinned, "b": torch.tensor(3.0, dtype=D)}
    batch = {
        name: torch.cat([regular[name], torch.stack([one[name] for one in (weak, pinned, failing)])])
        for name in regular
    }
    p, alone = leaves(batch), leaves(regular)
    policy = ddn.Policy(on_failure="mask", weakly_active="mean")
    s = ddn.solve(BOXED, p, policy=policy)
    k = len(regular["x"])
    assert s.converged.tolist() == [True] * (k + 2) + [False]
    assert s.certificate.one_sided.tolist() == [False] * k + [True, False, False]
    assert s.certificate.ok.tolist() == [True] * k + [False] * 3
    with pytest.warns(ddn.DegeneracyWarning):  # of the pinned sample
        found = torch.autograd.grad(
            (s["u"] * rand(N, seed=45)).sum(), list(p.values()), create_graph=create_graph
        )
    expected = torch.autograd.grad(
        (ddn.solve(BOXED, alone)["u"] * rand(N, seed=45)).sum(), list(alone.values())
    )
    for a, b in zip(found, expected, strict=True):
        close(a[:k], b, 1e-10)
        assert a.isfinite().all()
        assert not a[-1].any()


def test_float32_parameters_have_float32_derivatives():
    parameters = {name: value.float() for name, value in AT.items()}
    results = []
    for dtype in (torch.float32, D):
        p = {name: value.to(dtype).requires_grad_() for name, value in parameters.items()}
        s = ddn.solve(GENERAL, p, solver="casadi:ipopt")
        outputs = everything(s)
        first = torch.autograd.grad(
            outputs @ rand(outputs.shape[-1], seed=12).to(dtype), list(p.values()), create_graph=True
        )
        second = torch.autograd.grad(sum((g * g).sum() for g in first), list(p.values()))
        results.append((outputs, *first, *second))
    for narrow, wide in zip(*results, strict=True):
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)


# -- cost ------------------------------------------------------------------------------------------------------------


def test_one_factorization_serves_every_product_of_a_sensitivity(monkeypatch):
    u = ddn.solve(GENERAL, AT, solver="casadi:ipopt")["u"]
    found = ddn.sensitivity(GENERAL, AT, u)
    count = 0
    init = linear.DenseLU.init

    def counted(self, matrix):
        nonlocal count
        count += 1
        return init(self, matrix)

    monkeypatch.setattr(linear.DenseLU, "init", counted)
    found.vjp({"u": torch.ones(N, dtype=D)})
    assert count <= 1
    found.vjp({"u": rand(N), "equality.sum": torch.ones((), dtype=D)})
    found.jvp({"x": rand(N)})
    found.jvp({"r": rand(2), "top": torch.ones((), dtype=D)})
    found.jacobian("u", "x")
    found.jacobian("upper.u", "top")
    assert count <= 1


def test_backward_factors_nothing_anew(monkeypatch):
    """The forward's factorization, refined, serves: at most the polish's own."""
    p = leaves(AT)
    s = ddn.solve(GENERAL, p, solver="casadi:ipopt")
    count = 0
    init = linear.DenseLU.init

    def counted(self, matrix):
        nonlocal count
        count += 1
        return init(self, matrix)

    monkeypatch.setattr(linear.DenseLU, "init", counted)
    for seed in range(3):
        torch.autograd.grad(s["u"] @ rand(N, seed=seed), list(p.values()), retain_graph=True)
    assert count <= 1


@pytest.mark.parametrize("entry", ["backward", "sensitivity"])
def test_a_vjp_at_a_million_parameters_makes_no_array_of_variables_by_parameters(entry):
    """Ten variables: that array would have 80 MB. Peak resident memory grows by a few vectors of 8 MB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc to reset the peak of resident memory")
    variables, parameters = 10, 1_000_000
    problem = ddn.Problem(
        {"u": (variables,)},
        {"x": (parameters,)},
        lambda u, x: 0.5 * u.square().sum() + 0.25 * u.square().sum().square()
        - u @ torch.sin(x).reshape(variables, -1).mean(1),
        {"plane": lambda u: u.sum()},
    )  # fmt: skip
    x = torch.linspace(-1, 1, parameters, dtype=D).requires_grad_()
    s = ddn.solve(problem, {"x": x}, solver="scipy:SLSQP")
    v = rand(variables)
    if entry == "backward":

        def vjp():
            return torch.autograd.grad(s["u"] @ v, x)[0]
    else:
        found = ddn.sensitivity(problem, {"x": x.detach()}, s["u"].detach())

        def vjp():
            return found.vjp({"u": v})["x"]

    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    gradient = vjp()
    grown = _resident("VmHWM") - before
    assert grown < 48e6, f"{grown / 1e6:.0f} MB"
    y = s["u"].detach()
    H = (1 + y.square().sum()) * torch.eye(variables, dtype=D) + 2 * torch.outer(y, y)
    ones = torch.ones(variables, 1, dtype=D)
    K = torch.cat([torch.cat([H, ones], 1), torch.cat([ones.T, torch.zeros(1, 1, dtype=D)], 1)])
    w = torch.linalg.solve(K, torch.cat([v, torch.zeros(1, dtype=D)]))[:variables]
    expected = (
        (w[:, None] * torch.cos(x.detach()).reshape(variables, -1)).reshape(-1) * variables / parameters
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def _resident(field):
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def test_an_attached_point_and_its_multiplier_are_differentiable_twice():
    """Though ``attach`` got no multiplier, and returns the given point itself."""
    problem, parameters, _, _, _ = ONE_FORM["sphere-of-parametric-radius"]
    weights = rand(N, seed=6)

    def ours(x, r):
        s = ddn.attach(problem, {"x": x, "r": r}, sphere(x, r)[0].detach())
        return (weights * s["u"]).sum() + s["u"].pow(3).sum() + s.dual.equality["c"].square() + s.objective

    def theirs(x, r):
        u, nu = sphere(x, r)
        return (weights * u).sum() + u.pow(3).sum() + nu.square() + 0.5 * (u - x).square().sum()

    values = tuple(parameters.values())
    expected = torch.autograd.functional.hessian(theirs, values)
    for a, b in zip(torch.autograd.functional.hessian(ours, values), expected, strict=True):
        for found, wanted in zip(a, b, strict=True):
            close(found, wanted)
    transformed = torch.func.hessian(ours)(*values)
    close(transformed, expected[0][0])
