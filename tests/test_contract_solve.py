"""Solving: batches, shapes, dtypes, statuses, backends, failures. Nothing is ever a silent number."""

import copy
import time
import warnings

import numpy as np
import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
SOLVERS = ("scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt")
NLP_SOLVERS = ("scipy:SLSQP", "scipy:trust-constr", "casadi:ipopt", "casadi:sqpmethod")
QP_SOLVERS = (*NLP_SOLVERS, "cvxpy:CLARABEL", "casadi:daqp", "casadi:qpoases", "casadi:osqp")
NAN, INF = float("nan"), float("inf")
on_all = pytest.mark.parametrize("solver", SOLVERS)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def close(a, b, atol=1e-9):
    return torch.allclose(a, b, rtol=0, atol=atol)


# The example of the design, word by word.
EXAMPLE = ddn.Problem(
    variables={"u": (3,)},
    parameters={"x": (3,), "r": ()},
    objective=lambda u, x: 0.5 * (u - x).square().sum(),
    equality={"plane": lambda u: u.sum()},
    inequality={"ball": lambda u, r: u.square().sum() - r**2},
    bounds={"u": (None, "x")},
)
# and one whose solution has a closed form: the projection onto {sum u = 0, |u| <= r}.
PLANE_BALL = ddn.Problem(
    variables={"u": (3,)},
    parameters={"x": (3,), "r": ()},
    objective=lambda u, x: 0.5 * (u - x).square().sum(),
    equality={"plane": lambda u: u.sum()},
    inequality={"ball": lambda u, r: u.square().sum() - r**2},
)
BOX = ddn.Problem(
    {"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), bounds={"u": (-1.0, 1.0)}
)


def plane_ball(x, r):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (r[..., None] / centred.norm(dim=-1, keepdim=True)).clamp(max=1.0)


# -- batches -----------------------------------------------------------------------------------------------

BATCHES = {
    # id: (batch of x, batch of r, batch of the result)
    "none": ((), (), ()),
    "both": ((4,), (4,), (4,)),
    "x-only": ((4,), (), (4,)),
    "r-only": ((), (4,), (4,)),
    "outer": ((2, 1), (3,), (2, 3)),
    "one": ((1,), (), (1,)),
    "one-against-many": ((1,), (3,), (3,)),
    "deep": ((2, 1, 2), (1, 2, 1), (2, 2, 2)),
}


@on_all
@pytest.mark.parametrize("case", BATCHES.values(), ids=BATCHES)
def test_leading_batch_dimensions_broadcast(case, solver):
    x_batch, r_batch, batch = case
    x, r = rand(*x_batch, 3), 0.5 + rand(*r_batch, seed=1).abs()
    solution = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)
    samples = int(np.prod(batch))
    assert solution["u"].shape == (*batch, 3)
    assert close(solution["u"], plane_ball(x, r).expand(*batch, 3))
    assert solution.objective.shape == batch
    assert solution.dual.equality["plane"].shape == batch
    assert solution.dual.inequality["ball"].shape == batch
    assert solution.converged.shape == batch
    assert solution.converged.dtype == torch.bool
    assert solution.status == (ddn.Status.OPTIMAL,) * samples
    for name in ("stationarity", "feasibility", "complementarity"):
        residual = getattr(solution.residuals, name)
        assert residual.shape == batch
        assert residual.max() < 1e-8
    for field in (solution.stats.backend, solution.stats.method, solution.stats.iterations):
        assert isinstance(field, tuple)
        assert len(field) == samples
    assert set(solution.stats.backend) == {solver.split(":")[0]}
    assert solution.stats.seconds > 0


@on_all
def test_gradients_of_broadcast_parameters_are_summed(solver):
    x, r = rand(2, 1, 3).requires_grad_(), (0.5 + rand(3, seed=1).abs()).requires_grad_()
    v = rand(2, 3, 3, seed=2)
    found = torch.autograd.grad(
        (ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)["u"] * v).sum(), (x, r)
    )
    expected = torch.autograd.grad((plane_ball(x, r) * v).sum(), (x, r))
    for a, b, p in zip(found, expected, (x, r), strict=True):
        assert a.shape == p.shape
        assert close(a, b)


@on_all
def test_each_sample_stands_alone(solver):
    x, r = (3 * rand(6, 3)).requires_grad_(), (0.3 + rand(6, seed=1).abs()).requires_grad_()
    v = rand(6, 3, seed=2)

    def run(x, r, v):
        solution = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)
        return (
            solution["u"],
            solution.dual.inequality["ball"],
            *torch.autograd.grad((solution["u"] * v).sum(), (x, r)),
        )

    whole = run(x, r, v)
    for i in range(6):
        alone = run(x[i], r[i], v[i])
        pair = run(x[[i, 0]], r[[i, 0]], v[[i, 0]])
        for a, b, c in zip(whole, alone, pair, strict=True):
            assert close(a[i], b, 1e-12)
            assert close(a[i], c[0], 1e-12)


@pytest.mark.parametrize("solver", QP_SOLVERS)
def test_mixed_active_sets_stand_alone(solver):
    """Box QPs of one batch with different active bounds, fixed variables among them."""
    problem = ddn.Problem(
        {"u": (4,)}, {"P": (4, 4), "q": (4,), "low": (4,)}, lambda u, P, q: 0.5 * u @ P @ u + q @ u,
        bounds={"u": ("low", 1.0)},
    )  # fmt: skip
    root = rand(5, 4, 4)
    P, q, low = root @ root.mT + torch.eye(4, dtype=D), 4 * rand(5, 4, seed=1), -rand(5, 4, seed=2).abs()
    low[1, 2] = low[3, 0] = 1.0  # coincides with the upper bound

    def run(i):
        values = {"P": P[i], "q": q[i].requires_grad_(False).clone().requires_grad_(), "low": low[i]}
        u = ddn.solve(problem, values, solver=solver)["u"]
        return u, torch.autograd.grad(u.sum(), values["q"])[0]

    whole = run(slice(None))
    for i in range(5):
        for a, b in zip(whole, run(i), strict=True):
            assert close(a[i], b, 1e-12)


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_an_empty_batch(solver):
    x, r = torch.zeros(0, 3, dtype=D, requires_grad=True), torch.tensor(1.0, dtype=D, requires_grad=True)
    solution = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)
    assert solution["u"].shape == (0, 3)
    assert solution.status == ()
    assert solution.converged.shape == (0,)
    solution["u"].sum().backward()
    assert x.grad.shape == (0, 3)
    assert r.grad == 0
    assert ddn.solve(PLANE_BALL, {"x": torch.zeros(2, 0, 3, dtype=D), "r": r}, solver=solver)["u"].shape == (
        2,
        0,
        3,
    )
    assert solution.certificate.ok.shape == (0,)


# -- variables of every shape ------------------------------------------------------------------------------------


@on_all
def test_several_variables_of_different_shapes(solver):
    problem = ddn.Problem(
        variables={"s": (), "v": (2,), "M": (2, 2), "T": (1, 2, 1)},
        parameters={"a": (), "B": (2, 2)},
        objective=lambda s, v, M, T, a, B: (
            (s - a).square() + (v - a).square().sum() + (M - B).square().sum() + (T + 1).square().sum()
        ),
        equality={"row": lambda M, v: M.sum(0) - v, "shape": lambda T: T - 2.0},
        inequality={"cap": lambda s: s - 1.0},
        bounds={"v": (0.0, None), "M": (None, "B")},
    )
    B, a = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=D), torch.tensor([4.0, 0.5], dtype=D)
    solution = ddn.solve(problem, {"a": a, "B": B}, solver=solver)
    shapes = {"s": (2,), "v": (2, 2), "M": (2, 2, 2), "T": (2, 1, 2, 1)}
    assert {k: tuple(t.shape) for k, t in solution.primal.items()} == shapes
    assert {k: tuple(t.shape) for k, t in solution.dual.lower.items() if k == "v"} == {"v": (2, 2)}
    assert solution.dual.upper["M"].shape == (2, 2, 2)
    assert solution.dual.equality["shape"].shape == (2, 1, 2, 1)
    assert close(solution["s"], torch.tensor([1.0, 0.5], dtype=D))
    assert close(solution["T"], torch.full((2, 1, 2, 1), 2.0, dtype=D))
    layer = ddn.DeclarativeLayer(problem, solver=solver)
    outputs = layer(a, B=B)
    assert isinstance(outputs, tuple)
    assert all(torch.equal(o, p) for o, p in zip(outputs, solution.primal.values(), strict=True))


@on_all
def test_a_scalar_variable(solver):
    problem = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: (u - x).square(), bounds={"u": (0, None)})
    x = torch.tensor([-1.0, 2.0], dtype=D, requires_grad=True)
    u = ddn.solve(problem, {"x": x}, solver=solver)["u"]
    assert close(u, x.clamp(min=0))
    u.sum().backward()
    assert close(x.grad, torch.tensor([0.0, 1.0], dtype=D))


def test_layer_takes_parameters_by_position_and_by_name():
    layer = ddn.DeclarativeLayer(PLANE_BALL)
    x, r = rand(3), torch.tensor(0.5, dtype=D)
    expected = plane_ball(x, r)
    for y in (layer(x, r), layer(x, r=r), layer(r=r, x=x)):
        assert close(y, expected)
    assert isinstance(layer.solve(x, r), ddn.Solution)


# -- dtypes -----------------------------------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_callers_dtype_comes_back(solver, dtype):
    x, r = rand(2, 3).to(dtype).requires_grad_(), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    solution = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)
    exact = ddn.solve(PLANE_BALL, {"x": x.detach().double(), "r": r.detach().double()}, solver=solver)
    tensors = [
        solution["u"], solution.objective, solution.dual.equality["plane"], solution.dual.inequality["ball"],
        solution.residuals.stationarity,
    ]  # fmt: skip
    assert {t.dtype for t in tensors} == {dtype}
    assert torch.equal(solution["u"], exact["u"].to(dtype))
    solution["u"].sum().backward()
    assert x.grad.dtype == dtype
    assert r.grad.dtype == dtype


@on_all
def test_float32_gradients_are_computed_in_float64(solver):
    x = (3 * rand(4, 3)).float()
    r = torch.full((4,), 0.7)
    v = rand(4, 3, seed=3)
    small = [t.clone().requires_grad_() for t in (x, r)]
    large = [t.double().requires_grad_() for t in (x, r)]
    for tensors in (small, large):
        u = ddn.solve(PLANE_BALL, dict(zip("xr", tensors, strict=True)), solver=solver)["u"]
        (u * v.to(u.dtype)).sum().backward()
    for a, b in zip(small, large, strict=True):
        assert torch.allclose(a.grad.double(), b.grad, rtol=1e-6, atol=1e-7)


def test_mixed_dtypes_promote():
    u = ddn.solve(PLANE_BALL, {"x": rand(3).float(), "r": torch.tensor(0.5, dtype=D)})["u"]
    assert u.dtype == D


# -- the result proves itself -----------------------------------------------------------------------------------------


@on_all
def test_multipliers_have_our_signs(solver):
    """grad f + nu grad h + lambda grad g - lower + upper = 0 with every kind of constraint active."""
    problem = ddn.Problem(
        {"u": (4,)}, {"q": (4,)}, lambda u, q: 0.5 * u.square().sum() - q @ u,
        equality={"sum": lambda u: u[:2].sum() - 1.0}, inequality={"cap": lambda u: u[2] - 0.5},
        bounds={"u": (torch.tensor([-INF, 0.25, -INF, -INF], dtype=D),
                      torch.tensor([INF, INF, INF, 0.0], dtype=D))},
    )  # fmt: skip
    q = torch.tensor([3.0, -1.0, 2.0, 1.5], dtype=D)
    s = ddn.solve(problem, {"q": q}, solver=solver)
    assert close(s["u"], torch.tensor([0.75, 0.25, 0.5, 0.0], dtype=D))
    assert close(s.dual.equality["sum"], torch.tensor(2.25, dtype=D))
    assert close(s.dual.inequality["cap"], torch.tensor(1.5, dtype=D))
    assert close(s.dual.lower["u"], torch.tensor([0.0, 3.5, 0.0, 0.0], dtype=D))
    assert close(s.dual.upper["u"], torch.tensor([0.0, 0.0, 0.0, 1.5], dtype=D))
    assert close(s.objective, 0.5 * s["u"].square().sum() - q @ s["u"])
    active = s.certificate.active
    assert active["cap"].item()
    assert active["u.lower"].tolist() == [False, True, False, False]
    assert active["u.upper"].tolist() == [False, False, False, True]


@pytest.mark.parametrize("solver", QP_SOLVERS)
def test_points_are_polished(solver):
    """Whatever the backend's tolerance, the returned point is exact to rounding."""
    x, r = 3 * rand(4, 3), torch.full((4,), 0.7, dtype=D)
    box = ddn.solve(BOX, {"x": x}, solver=solver)
    assert close(box["u"], x.clamp(-1, 1), 1e-13)
    if solver in NLP_SOLVERS or solver.startswith("cvxpy"):
        ball = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)
        assert close(ball["u"], plane_ball(x, r), 1e-12)
        assert max(getattr(ball.residuals, n).max() for n in ("stationarity", "feasibility")) < 1e-11


@on_all
def test_a_loose_backend_tolerance_still_gives_an_exact_point(solver):
    x, r = 3 * rand(3, 3), torch.full((3,), 0.7, dtype=D)
    u = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver, options={"tolerance": 1e-4})["u"]
    assert close(u, plane_ball(x, r), 1e-10)


def test_solution_is_the_whole_story():
    s = ddn.solve(
        EXAMPLE, {"x": torch.tensor([1.0, 2.0, -4.0], dtype=D), "r": 3.0}, policy=ddn.Policy("mask")
    )
    assert s["u"] is s.primal["u"]
    with pytest.raises(KeyError):
        s["v"]
    text = str(s.certificate)
    assert 0 < len(text.splitlines()) < 30
    for name in ("ok", "licq", "rank_deficiency", "sosc", "strictly_complementary", "singular", "one_sided",
                 "margin", "condition", "stationarity", "feasibility", "complementarity"):  # fmt: skip
        assert getattr(s.certificate, name).shape == (), name
    assert set(s.certificate.active) >= {"plane", "ball", "u.upper"}
    assert set(s.certificate.weakly_active) >= {"ball", "u.upper"}
    assert isinstance(s.certificate.null_space, list)


# -- initial points and warm starts -----------------------------------------------------------------------------

TWO_WELLS = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: (u.square() - x.square()).square())


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "scipy:L-BFGS-B", "casadi:ipopt"])
def test_the_initial_point_chooses_the_minimum(solver):
    x = torch.tensor(1.5, dtype=D)
    for start in (2.0, -2.0):
        for initial in (torch.tensor(start, dtype=D), {"u": torch.tensor(start, dtype=D)}):
            u = ddn.solve(TWO_WELLS, {"x": x}, solver=solver, initial=initial)["u"]
            assert close(u, torch.tensor(start / 2 * 1.5, dtype=D))
    layer = ddn.DeclarativeLayer(TWO_WELLS, solver=solver)
    assert close(layer(x, initial=torch.tensor(-2.0, dtype=D)), torch.tensor(-1.5, dtype=D))
    batch = layer(x.expand(2), initial=torch.tensor([-2.0, 2.0], dtype=D))
    assert close(batch, torch.tensor([-1.5, 1.5], dtype=D))


def test_initial_may_bring_the_batch_and_part_of_the_variables():
    u = ddn.solve(TWO_WELLS, {"x": torch.tensor(1.0, dtype=D)}, initial=torch.tensor([-2.0, 2.0], dtype=D))[
        "u"
    ]
    assert close(u, torch.tensor([-1.0, 1.0], dtype=D))
    problem = ddn.Problem({"u": (), "v": ()}, {}, lambda u, v: (u.square() - 1).square() + (v - 3).square())
    s = ddn.solve(problem, {}, initial={"u": torch.tensor(-2.0, dtype=D)})
    assert close(s["u"].double(), torch.tensor(-1.0, dtype=D))


@on_all
def test_an_initial_point_outside_the_bounds_is_moved_in(solver):
    x = 3 * rand(2, 3)
    u = ddn.solve(BOX, {"x": x}, solver=solver, initial=torch.full((3,), 50.0, dtype=D))["u"]
    assert close(u, x.clamp(-1, 1))


def test_the_default_start_is_zero_moved_into_the_bounds():
    """log(u - 2) is NaN at zero; with the bound it starts inside its domain."""
    problem = ddn.Problem(
        {"u": ()}, {"x": ()}, lambda u, x: u - x * torch.log(u - 2), bounds={"u": (2.5, None)}
    )
    for solver in ("scipy:SLSQP", "casadi:ipopt"):
        u = ddn.solve(problem, {"x": torch.tensor(3.0, dtype=D)}, solver=solver)["u"]
        assert close(u, torch.tensor(5.0, dtype=D))


@on_all
def test_a_warm_start_is_a_solution(solver):
    x, r = rand(4, 3), torch.full((4,), 0.5, dtype=D)
    first = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)
    moved = x + 0.01
    again = ddn.solve(PLANE_BALL, {"x": moved, "r": r}, solver=solver, warm_start=first)
    assert close(again["u"], plane_ball(moved, r))
    with pytest.raises(ddn.ProblemError, match="warm_start"):
        ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver, warm_start=first["u"])


def test_a_warm_start_keeps_the_minimum():
    first = ddn.solve(
        TWO_WELLS,
        {"x": torch.tensor(1.0, dtype=D)},
        solver="casadi:ipopt",
        initial=torch.tensor(-2.0, dtype=D),
    )
    again = ddn.solve(TWO_WELLS, {"x": torch.tensor(1.1, dtype=D)}, solver="casadi:ipopt", warm_start=first)
    assert close(again["u"], torch.tensor(-1.1, dtype=D))


@on_all
def test_a_layer_that_warm_starts(solver):
    layer = ddn.DeclarativeLayer(PLANE_BALL, solver=solver, warm_start=True)
    r = torch.tensor(0.5, dtype=D)
    for batch in ((), (4,), (4,), (2,), (2, 2), (0,), (4,)):
        x = rand(*batch, 3).requires_grad_()
        y = layer(x, r)
        assert close(y, plane_ball(x, r))
        y.sum().backward()
    copy.deepcopy(layer)(rand(3), r)


# -- names of solvers, and options ----------------------------------------------------------------------------

NAMES = {
    "unknown-backend": ("gurobi_of_the_future", ddn.BackendNotFound, "scipy"),
    "unknown-method": ("scipy:SQLSP", ddn.BackendNotFound, "SLSQP"),
    "unknown-method-casadi": ("casadi:nope", ddn.BackendNotFound, "ipopt"),
    "unknown-method-cvxpy": ("cvxpy:NOPE", ddn.BackendNotFound, "CLARABEL"),
    "empty": ("", ddn.BackendNotFound, "scipy"),
    "only-method": (":SLSQP", ddn.BackendNotFound, "scipy"),
    "empty-list": ([], ddn.DDNError, "solver"),
    "number": (3, ddn.DDNError, "solver"),
    "list-with-unknown": (["scipy:SLSQP", "nothere"], ddn.BackendNotFound, "nothere"),
    "lp-only": ("scipy:highs", ddn.BackendCannotSolve, "(?s)highs.*SLSQP|SLSQP.*highs"),
    "no-constraints": ("scipy:L-BFGS-B", ddn.BackendCannotSolve, "ipopt"),
    "qp-only": ("casadi:daqp", ddn.BackendCannotSolve, "ipopt"),
}


@pytest.mark.parametrize("case", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("entry", ["solve", "layer"])
def test_wrong_solver_names(case, entry):
    solver, error, match = case
    run = {
        "solve": lambda: ddn.solve(PLANE_BALL, {"x": rand(3), "r": 1.0}, solver=solver),
        "layer": lambda: ddn.DeclarativeLayer(PLANE_BALL, solver=solver),
    }
    with pytest.raises(error, match=match):
        run[entry]()


NONCONVEX = ddn.Problem(
    {"u": (2,)},
    {"x": (2,)},
    lambda u, x: (u - x).square().sum(),
    equality={"circle": lambda u: u.square().sum() - 1.0},
)


def test_cvxpy_refuses_what_is_not_convex_and_names_it():
    with pytest.raises(ddn.BackendCannotSolve, match=r"(?s)circle.*(ipopt|SLSQP)"):
        ddn.solve(NONCONVEX, {"x": rand(2)}, solver="cvxpy:CLARABEL")


def test_a_list_skips_what_cannot_and_fails_over_per_sample():
    x = rand(3, 2)
    s = ddn.solve(NONCONVEX, {"x": x}, solver=["cvxpy:CLARABEL", "scipy:SLSQP"], initial=x)
    assert s.stats.backend == ("scipy",) * 3
    assert close(s["u"], x / x.norm(dim=-1, keepdim=True))
    # with a single iteration the first backend solves only the sample that starts at its solution
    start, target = torch.tensor([5.0, 80.0], dtype=D), torch.tensor(5.0, dtype=D)
    s = ddn.solve(TWO_WELLS, {"x": target}, ["scipy:SLSQP", "casadi:ipopt"], start, options={"max_iter": 60})
    assert close(s["u"], target.expand(2))
    assert s.converged.all()


@pytest.mark.parametrize(
    "solver", [("scipy:SLSQP", "casadi:ipopt"), ["casadi:ipopt", "auto"], ["cvxpy", "scipy"]]
)
def test_lists_of_solvers(solver):
    x, r = rand(2, 3), torch.tensor(0.5, dtype=D)
    assert close(ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)["u"], plane_ball(x, r))


@pytest.mark.parametrize("solver", ["auto", "scipy", "cvxpy", "casadi"])
def test_a_bare_backend_chooses_a_method(solver):
    x, r = rand(2, 3), torch.tensor(0.5, dtype=D)
    s = ddn.solve(PLANE_BALL, {"x": x, "r": r}, solver=solver)
    assert close(s["u"], plane_ball(x, r))
    assert solver in ("auto", s.stats.backend[0])


@pytest.mark.parametrize("solver", ["auto", "casadi"])
def test_a_qp_does_not_go_to_a_general_solver_by_default(solver):
    assert ddn.solve(BOX, {"x": rand(3)}, solver=solver).stats.method[0] not in (
        "ipopt",
        "SLSQP",
        "sqpmethod",
    )


def test_an_lp_goes_to_an_lp_solver_by_default():
    problem = ddn.linear_program(2, bounds=(0, 1))
    assert ddn.solve(problem, {"c": rand(2)}).stats.method[0] == "highs"


@pytest.mark.parametrize("solver", QP_SOLVERS)
def test_an_unknown_option_is_an_error_by_name(solver):
    with pytest.raises(ddn.ProblemError, match="max_itter"):
        ddn.solve(BOX, {"x": rand(3)}, solver=solver, options={"max_itter": 10})


@pytest.mark.parametrize("solver", QP_SOLVERS)
@pytest.mark.parametrize("options", [{"max_iter": 2000}, {"tolerance": 1e-8}, {"time_limit": 30.0}, {"time_limit": 30}],
                         ids=["max_iter", "tolerance", "time_limit", "time_limit-int"])  # fmt: skip
def test_every_adapter_translates_the_common_options(solver, options):
    x = 2 * rand(3)
    assert close(ddn.solve(BOX, {"x": x}, solver=solver, options=options)["u"], x.clamp(-1, 1))


NATIVE = {
    "scipy:SLSQP": {"ftol": 1e-14},
    "cvxpy:CLARABEL": {"tol_gap_abs": 1e-10},
    "casadi:ipopt": {"ipopt.mu_init": 0.01},
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_native_options(solver):
    x = 2 * rand(3)
    assert close(ddn.solve(BOX, {"x": x}, solver=solver, options=NATIVE[solver])["u"], x.clamp(-1, 1))


def test_ipopt_options_by_their_own_names():
    x = 2 * rand(3)
    assert close(
        ddn.solve(BOX, {"x": x}, solver="casadi:ipopt", options={"mu_init": 0.01})["u"], x.clamp(-1, 1)
    )


@pytest.mark.parametrize("bad", [{"max_iter": 0}, {"max_iter": -1}, {"max_iter": 1.5}, {"max_iter": "ten"},
                                 {"time_limit": -1.0}, {"tolerance": 0.0}, {"tolerance": NAN}], ids=str)  # fmt: skip
def test_wrong_values_of_common_options(bad):
    with pytest.raises(ddn.ProblemError, match=next(iter(bad))):
        ddn.solve(BOX, {"x": rand(3)}, options=bad)


ROSENBROCK = ddn.Problem(
    {"u": (6,)}, {"x": ()}, lambda u, x: (x * (u[1:] - u[:-1].square()).square() + (1 - u[:-1]).square()).sum(),
    inequality={"ball": lambda u: u.square().sum() - 4.0},
)  # fmt: skip


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "scipy:trust-constr", "casadi:ipopt", "casadi:sqpmethod"])
def test_an_iteration_limit_is_reported(solver):
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(ROSENBROCK, {"x": 100.0}, solver=solver, options={"max_iter": 2})
    assert caught.value.solution.status == (ddn.Status.ITERATION_LIMIT,)


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_a_time_limit_is_reported(solver):
    slow = ddn.Problem(
        {"u": (30,)},
        {"x": ()},
        lambda u, x: (x * (u[1:] - u[:-1].square()).square() + (1 - u[:-1]).square()).sum(),
    )
    begun = time.perf_counter()
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(
            slow, {"x": 1e4}, solver=solver, options={"time_limit": 1e-4}, initial=-torch.ones(30, dtype=D)
        )
    assert caught.value.solution.status == (ddn.Status.TIME_LIMIT,)
    assert time.perf_counter() - begun < 10


# -- failures are never silent -----------------------------------------------------------------------------------

S = ddn.Status
LINE = {"variables": {"u": (2,)}, "parameters": {"x": (2,)}}


def quadratic(u, x):
    return (u - x).square().sum()


FAILURES = {
    # id: (fields, solvers, statuses that are right)
    "infeasible-equalities": (
        {"objective": quadratic, "equality": {"a": lambda u: u.sum(), "b": lambda u: u.sum() - 1.0}},
        QP_SOLVERS, {S.INFEASIBLE},
    ),
    "infeasible-inequalities": (
        {"objective": quadratic, "inequality": {"a": lambda u: u.sum(), "b": lambda u: 1.0 - u.sum()}},
        QP_SOLVERS, {S.INFEASIBLE},
    ),
    "infeasible-against-bounds": (
        {"objective": quadratic, "equality": {"a": lambda u: u.sum() - 5.0}, "bounds": {"u": (0, 1)}},
        QP_SOLVERS, {S.INFEASIBLE},
    ),
    "infeasible-nonlinear": (
        {"objective": quadratic, "inequality": {"a": lambda u: u.square().sum() + 1.0}},
        (*NLP_SOLVERS, "cvxpy:CLARABEL"), {S.INFEASIBLE},
    ),
    "crossed-bounds": (
        {"objective": quadratic, "bounds": {"u": ("x", lambda x: x - 1.0)}}, QP_SOLVERS, {S.INFEASIBLE},
    ),
    "unbounded-linear": (
        {"objective": lambda u, x: u @ x, "bounds": {"u": (None, 0)}},
        ("scipy:highs", "scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt"), {S.UNBOUNDED},
    ),
    "unbounded-no-constraints": (
        {"objective": lambda u, x: u @ x}, ("scipy:highs", "cvxpy:CLARABEL", "casadi:ipopt", "scipy:SLSQP"), {S.UNBOUNDED},
    ),
    "unbounded-cubic": (
        {"objective": lambda u, x: (u - 1).pow(3).sum()}, ("scipy:SLSQP", "casadi:ipopt"), {S.UNBOUNDED},
    ),
    "infeasible-linear": (
        {"objective": lambda u, x: u @ x, "inequality": {"a": lambda u: u.sum(), "b": lambda u: 1.0 - u.sum()},
         "bounds": {"u": (-9, 9)}},
        ("scipy:highs", "cvxpy:CLARABEL", "casadi:ipopt"), {S.INFEASIBLE},
    ),
    "not-finite-anywhere": (
        {"objective": lambda u, x: torch.log(-1.0 - u.square()).sum()}, ("scipy:SLSQP", "casadi:ipopt"), None,
    ),
    "nan-objective": (
        {"objective": lambda u, x: (u - x).square().sum() + NAN}, ("scipy:SLSQP", "casadi:ipopt", "casadi:daqp"), None,
    ),
    "infinite-objective": ({"objective": lambda u, x: (u - x).square().sum() + INF}, ("scipy:SLSQP", "casadi:ipopt"), None),
    "nan-constraint": (
        {"objective": quadratic, "inequality": {"c": lambda u: u - NAN}}, ("scipy:SLSQP", "casadi:ipopt", "casadi:daqp"), None,
    ),
    "infimum-not-attained": ({"objective": lambda u, x: torch.exp(-u).sum()}, ("scipy:SLSQP", "casadi:ipopt"), None),
}  # fmt: skip
FAILING = [
    pytest.param(fields, solver, statuses, id=f"{name}-{solver}")
    for name, (fields, solvers, statuses) in FAILURES.items()
    for solver in solvers
]


@pytest.mark.parametrize(("fields", "solver", "statuses"), FAILING)
def test_a_failure_is_never_a_silent_number(fields, solver, statuses):
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve({**LINE, **fields}, {"x": torch.ones(2, dtype=D)}, solver=solver)
    solution = caught.value.solution
    assert isinstance(solution, ddn.Solution)
    assert not solution.converged
    assert solution.status[0] is not S.OPTIMAL


@pytest.mark.parametrize(("fields", "solver", "statuses"), [p for p in FAILING if p.values[2]])
def test_the_status_of_a_failure_says_why(fields, solver, statuses):
    s = ddn.solve({**LINE, **fields}, {"x": torch.ones(2, dtype=D)}, solver=solver, policy=ddn.Policy("mask"))
    assert s.status[0] in statuses


# a batch with one bad sample among good ones: lower = x, upper = x + gap, gap < 0 for the bad one
GAP = ddn.Problem(
    {"u": (2,)}, {"x": (2,), "gap": ()}, lambda u, x: 0.5 * (u + 3 - x).square().sum(),
    bounds={"u": ("x", lambda x, gap: x + gap)},
)  # fmt: skip
RING = ddn.Problem(  # infeasible as a conic or nonlinear problem, not by crossed bounds
    {"u": (2,)}, {"x": (2,), "gap": ()}, lambda u, x: 0.5 * (u - x).square().sum(),
    inequality={"ball": lambda u, gap: u.square().sum() - gap},
)  # fmt: skip


def expected_of(problem, x, gap):
    if problem is GAP:
        return x
    return x * (gap.clamp(min=0).sqrt()[:, None] / x.norm(dim=-1, keepdim=True)).clamp(max=1)


@on_all
@pytest.mark.parametrize("problem", [GAP, RING], ids=["crossed-bounds", "empty-ball"])
@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "mask"])
def test_the_policy_decides_for_bad_samples_and_good_ones_stay_exact(problem, on_failure, solver):
    x, gap = 1 + rand(4, 2).abs(), torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=D)
    x.requires_grad_()
    good = torch.tensor([True, False, True, True])
    policy = ddn.Policy(on_failure=on_failure)

    def solve():
        return ddn.solve(problem, {"x": x, "gap": gap}, solver=solver, policy=policy)

    if on_failure == "raise":
        with pytest.raises(ddn.SolveError, match=r"1\b.*4|sample 1") as caught:
            solve()
        solution = caught.value.solution
    elif on_failure == "warn":
        with pytest.warns(ddn.ConvergenceWarning) as record:
            solution = solve()
        assert len(record) == 1
    else:
        solution = solve()
    assert torch.equal(solution.converged, good)
    assert solution.status[1] is S.INFEASIBLE or (problem is RING and solver == "scipy:SLSQP")
    assert [s for i, s in enumerate(solution.status) if i != 1] == [S.OPTIMAL] * 3
    expected = expected_of(problem, x, gap)
    assert close(solution["u"][good], expected[good])
    v = rand(4, 2, seed=5)
    with_gradient = torch.autograd.grad((solution["u"][good] * v[good]).sum(), x, retain_graph=True)[0]
    reference = torch.autograd.grad((expected[good] * v[good]).sum(), x)[0]
    assert close(with_gradient[good], reference[good])
    bad = solution["u"][1]
    (gradient,) = torch.autograd.grad((solution["u"] * v).sum(), x)
    assert close(gradient[good], reference[good])
    if on_failure == "nan":
        assert bad.isnan().all()
        assert solution.objective[1].isnan()
        assert gradient[1].isnan().all()
    if on_failure == "mask":
        assert bad.isfinite().all()
        assert torch.equal(gradient[1], torch.zeros(2, dtype=D))
        assert close(with_gradient[1], torch.zeros(2, dtype=D))
    if on_failure == "warn":
        assert bad.isfinite().all()


@on_all
def test_nan_gradient_of_a_shared_parameter_does_not_hide(solver):
    """Under "nan" a parameter shared with a failed sample has a NaN gradient; under "mask" a clean one."""
    x, gap = torch.ones(2, dtype=D), torch.tensor([0.5, -1.0], dtype=D)
    for on_failure, clean in (("nan", False), ("mask", True)):
        shared = x.clone().requires_grad_()
        u = ddn.solve(RING, {"x": shared, "gap": gap}, solver=solver, policy=ddn.Policy(on_failure))["u"]
        u.sum().backward()
        assert shared.grad.isfinite().all() == clean


PARTLY_NAN = ddn.Problem(  # the functions of a sample with r < 0 are NaN, its parameters are not
    {"u": (2,)},
    {"x": (2,), "r": (), "s": ()},
    lambda u, x, r, s: (s * (u - x).square() + (s + r.sqrt()) * u.exp()).sum(),
)


@pytest.mark.parametrize("how", ["backward", "create_graph", "jvp", "second"])
def test_a_masked_sample_of_nan_functions_leaves_no_trace(how):
    """Also where the differentiable backward runs: its zero is a zero, and shared gradients stay finite."""
    values = {
        "x": 1 + rand(2, 2).abs(),
        "r": torch.tensor([1.0, -1.0], dtype=D),
        "s": torch.tensor(1.5, dtype=D),
    }

    def derivatives(values):
        p = {k: v.clone().requires_grad_() for k, v in values.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
            if how == "jvp":
                tangents = tuple(torch.ones_like(v) for v in values.values())
                run = lambda *v: solve(dict(zip(values, v, strict=True)))  # noqa: E731  # a formula
                return (torch.func.jvp(run, tuple(values.values()), tangents)[1],)
        grads = torch.autograd.grad(solve(p).sum(), list(p.values()), create_graph=how != "backward")
        if how != "second":
            return grads
        total = sum(g.sum() for g in grads)
        return torch.autograd.grad(total, list(p.values()))

    def solve(p):
        return ddn.solve(PARTLY_NAN, p, solver="casadi:ipopt", policy=ddn.Policy("mask"))["u"]

    whole = derivatives(values)
    alone = derivatives({k: v[0] if v.dim() and k != "s" else v for k, v in values.items()})
    for a, b in zip(whole, alone, strict=True):
        if a.shape == b.shape:
            assert close(a, b)
        else:
            assert close(a[0], b)
            assert torch.equal(a[1], torch.zeros_like(a[1]))


def test_residuals_of_a_failed_sample_are_those_of_its_last_point():
    x = torch.ones(2, 2, dtype=D)
    s = ddn.solve(RING, {"x": x, "gap": torch.tensor([1.0, -1.0], dtype=D)}, policy=ddn.Policy("mask"))
    violation = s["u"].square().sum(-1) - torch.tensor([1.0, -1.0], dtype=D)
    assert close(s.residuals.feasibility, violation.clamp(min=0))
    assert s.residuals.feasibility[1] >= 1


@on_all
def test_all_samples_bad(solver):
    x, gap = torch.ones(2, 2, dtype=D, requires_grad=True), torch.tensor(-1.0, dtype=D)
    for on_failure in ("nan", "mask"):
        s = ddn.solve(RING, {"x": x, "gap": gap}, solver=solver, policy=ddn.Policy(on_failure))
        assert not s.converged.any()
        (gradient,) = torch.autograd.grad(s["u"].sum(), x)
        assert gradient.isnan().all() if on_failure == "nan" else (gradient == 0).all()
        assert not s.certificate.ok.any()


def test_the_layers_policy_and_the_calls():
    layer = ddn.DeclarativeLayer(RING, solver="casadi:ipopt", policy=ddn.Policy("nan"))
    x = torch.ones(2, dtype=D)
    assert layer(x, -1.0).isnan().all()
    with pytest.raises(ddn.SolveError):
        layer(x, -1.0, policy=ddn.Policy())


def test_warnings_come_each_time_anew_and_point_at_the_caller():
    for _ in range(2):
        with pytest.warns(ddn.ConvergenceWarning) as record:
            ddn.solve(RING, {"x": torch.ones(2, dtype=D), "gap": -1.0}, policy=ddn.Policy("warn"))
        assert len(record) == 1
        assert record[0].filename == __file__


# -- not a minimum ----------------------------------------------------------------------------------------------------

SADDLES = {
    "saddle": (lambda u, x: (u[0] - x[0]).square() - (u[1] - x[1]).square(), {}, torch.zeros(2)),
    "maximum-between-bounds": (lambda u, x: -(u * u).sum(), {"bounds": {"u": (-1.0, 1.0)}}, torch.zeros(2)),
    "worst-on-circle": (
        lambda u, x: (u - x).square().sum(),
        {"equality": {"c": lambda u: u.square().sum() - 1}},
        None,
    ),
}


@pytest.mark.parametrize("case", SADDLES.values(), ids=SADDLES)
@pytest.mark.parametrize("solver", ["scipy:SLSQP", "scipy:trust-constr", "casadi:ipopt", "casadi:sqpmethod"])
def test_a_stationary_point_that_is_no_minimum_never_passes(case, solver):
    objective, fields, start = case
    x = torch.tensor([0.6, 0.8], dtype=D) if start is None else torch.zeros(2, dtype=D)
    start = -x if start is None else start.double()
    policy = ddn.Policy("mask")
    s = ddn.solve(
        ddn.Problem({"u": (2,)}, {"x": (2,)}, objective, **fields), {"x": x}, solver, start, policy=policy
    )
    if s.status == (S.OPTIMAL,):  # the backend got away from it: then it has to be a minimum
        assert s.certificate.sosc
        assert objective(s["u"], x) < objective(start, x) - 1e-3
    else:
        assert s.status[0] in {S.NOT_A_MINIMUM, S.UNBOUNDED}


def test_not_a_minimum_by_name():
    problem = ddn.Problem({"u": (2,)}, {}, lambda u: -(u * u).sum() + (u**4).sum(), bounds={"u": (-1.0, 1.0)})
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(problem, {}, solver="scipy:SLSQP")
    assert caught.value.solution.status == (S.NOT_A_MINIMUM,)


# -- corners of the declaration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", QP_SOLVERS)
def test_fixed_variables_follow_their_bound(solver):
    problem = ddn.Problem({"u": (3,)}, {"x": (3,), "b": ()}, lambda u, x: 0.5 * (u - x).square().sum() + 0.5 * u.sum().square(),
                          bounds={"u": (lambda b: torch.stack([b, b * 0 - 9, b * 0 - 9]), lambda b: torch.stack([b, b * 0 + 9, b * 0 + 9]))})  # fmt: skip
    x, b = rand(3).requires_grad_(), torch.tensor(0.7, dtype=D, requires_grad=True)
    u = ddn.solve(problem, {"x": x, "b": b}, solver=solver)["u"]
    A = torch.eye(2, dtype=D) + 1
    rest = torch.linalg.solve(A, x[1:] - b)
    expected = torch.cat([b[None], rest])
    assert close(u, expected)
    v = rand(3, seed=4)
    found, reference = (torch.autograd.grad(y @ v, (x, b), retain_graph=True) for y in (u, expected))
    for a, c in zip(found, reference, strict=True):
        assert close(a, c)


@on_all
def test_all_variables_fixed(solver):
    problem = ddn.Problem({"u": (2,)}, {"b": (2,)}, lambda u: u.square().sum(), bounds={"u": ("b", "b")})
    b = torch.tensor([1.0, -2.0], dtype=D, requires_grad=True)
    s = ddn.solve(problem, {"b": b}, solver=solver)
    assert close(s["u"], b, 1e-12)
    assert close(
        torch.autograd.functional.jacobian(lambda b: ddn.solve(problem, {"b": b}, solver=solver)["u"], b),
        torch.eye(2, dtype=D),
    )
    assert s.certificate.ok


@pytest.mark.parametrize("solver", QP_SOLVERS)
def test_tensor_bounds_with_infinities(solver):
    low, high = torch.tensor([-INF, 0.0, -INF], dtype=D), torch.tensor([1.0, INF, INF], dtype=D)
    x = torch.tensor([3.0, -3.0, 5.0], dtype=D, requires_grad=True)
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: 0.5 * (u - x).square().sum(), bounds={"u": (low, high)}
    )
    s = ddn.solve(problem, {"x": x}, solver=solver)
    assert close(s["u"], torch.tensor([1.0, 0.0, 5.0], dtype=D))
    s["u"].sum().backward()
    assert close(x.grad, torch.tensor([0.0, 0.0, 1.0], dtype=D))
    for side in (s.dual.lower["u"], s.dual.upper["u"]):
        assert side.isfinite().all()
        assert (side >= 0).all()


@on_all
def test_feasibility_problem_with_a_unique_point(solver):
    A, b = rand(3, 3), rand(3, seed=1).requires_grad_()
    problem = ddn.Problem({"u": (3,)}, {"b": (3,)}, None, equality={"system": lambda u, b: A @ u - b})
    s = ddn.solve(problem, {"b": b}, solver=solver)
    assert close(s["u"], torch.linalg.solve(A, b))
    assert s.objective == 0
    (gradient,) = torch.autograd.grad(s["u"].sum(), b)
    assert close(gradient, torch.linalg.solve(A.T, torch.ones(3, dtype=D)))
    assert s.certificate.ok


def test_underdetermined_feasibility_is_minimum_norm_and_reported():
    A = rand(2, 4)
    b = rand(2, seed=1).requires_grad_()
    problem = ddn.Problem({"u": (4,)}, {"b": (2,)}, None, equality={"system": lambda u, b: A @ u - b})
    s = ddn.solve(problem, {"b": b})
    assert close(A @ s["u"], b)
    assert not s.certificate.ok
    assert s.certificate.singular
    with pytest.warns(ddn.DegeneracyWarning) as record:
        (gradient,) = torch.autograd.grad(s["u"] @ torch.arange(4.0, dtype=D), b)
    assert len(record) == 1
    assert close(gradient, torch.linalg.pinv(A).T @ torch.arange(4.0, dtype=D))


@pytest.mark.parametrize("start", [3.0, -3.0])
@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_feasibility_by_branch(start, solver):
    """The paper's (33): find u with (u - 1)^2 = x^2: y = 1 +- x, Dy = +-1 by branch."""
    problem = ddn.Problem(
        {"u": ()}, {"x": ()}, None, equality={"branch": lambda u, x: (u - 1).square() - x.square()}
    )
    x = torch.tensor(0.5, dtype=D, requires_grad=True)
    u = ddn.solve(problem, {"x": x}, solver=solver, initial=torch.tensor(start, dtype=D))["u"]
    sign = 1.0 if start > 1 else -1.0
    assert close(u, 1 + sign * x)
    u.backward()
    assert abs(x.grad - sign) < 1e-9


@pytest.mark.parametrize("low", [1.0, -1.0, 2.5, 3.0])
@pytest.mark.parametrize("solver", [*SOLVERS, "scipy:highs", "casadi:daqp", "auto"])
def test_feasibility_with_inequalities_and_bounds_only(solver, low):
    problem = ddn.Problem(
        {"u": (2,)}, {"x": (2,)}, None, inequality={"half": lambda u, x: x - u}, bounds={"u": (None, 3.0)}
    )
    s = ddn.solve(problem, {"x": torch.full((2,), low, dtype=D)}, solver=solver)
    assert (s["u"] >= low - 1e-8).all()
    assert (s["u"] <= 3 + 1e-8).all()
    assert s.objective == 0


def test_constraints_without_elements():
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,)}, lambda u, x: (u - x).square().sum(), equality={"none": lambda u: u[:0]}
    )
    s = ddn.solve(problem, {"x": rand(3)})
    assert s.dual.equality["none"].shape == (0,)
    assert close(s["u"], rand(3))


@on_all
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_more_constraints_than_variables(solver, seed):
    """A redundant system that is consistent; the paper's non-regular case of full column rank."""
    A, x = rand(5, 2, seed=seed), rand(2, seed=1).requires_grad_()
    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, None, equality={"system": lambda u, x: A @ (u - x)})
    s = ddn.solve(problem, {"x": x}, solver=solver)
    assert close(s["u"], x)
    assert not s.certificate.licq
    assert s.certificate.rank_deficiency == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.DegeneracyWarning)
        (gradient,) = torch.autograd.grad(s["u"] @ torch.tensor([1.0, 2.0], dtype=D), x)
    assert close(gradient, torch.tensor([1.0, 2.0], dtype=D))


@on_all
def test_the_example_of_the_design(solver):
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 2.5]], dtype=D)
    s = ddn.solve(EXAMPLE, {"x": x, "r": torch.tensor(2.0, dtype=D)}, solver=solver)
    for sample, u in zip(x, s["u"], strict=True):
        assert abs(u.sum()) < 1e-10
        assert u.norm() < 2 + 1e-10
        assert (u <= sample + 1e-10).all()
    y = ddn.DeclarativeLayer(EXAMPLE, solver=solver)(x, torch.tensor(2.0, dtype=D))
    assert close(y, s["u"], 1e-12)


@on_all
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scaling_the_objective_changes_no_decision(scale, offset, solver):
    problem = ddn.Problem(
        {"u": (3,)}, {"x": (3,), "s": ()}, lambda u, x, s: s * (0.5 * (u - x).square().sum() + offset),
        {"plane": lambda u: u.sum()}, {"ball": lambda u: u.square().sum() - 1.0}, {"u": (-0.5, None)},
    )  # fmt: skip
    x = 3 * rand(4, 3)
    reference = ddn.solve(problem, {"x": x, "s": 1.0}, solver="casadi:ipopt")
    s = ddn.solve(problem, {"x": x, "s": scale}, solver=solver)
    assert close(s["u"], reference["u"], 1e-9)
    assert close(s.dual.inequality["ball"] / scale, reference.dual.inequality["ball"], 1e-8)
    for name, mask in reference.certificate.active.items():
        assert torch.equal(s.certificate.active[name], mask)
    assert torch.equal(s.certificate.ok, reference.certificate.ok)


def test_the_device_and_no_grad_are_respected():
    x, r = rand(3).requires_grad_(), torch.tensor(0.5, dtype=D)
    with torch.no_grad():
        assert not ddn.solve(PLANE_BALL, {"x": x, "r": r})["u"].requires_grad
    assert ddn.solve(PLANE_BALL, {"x": x, "r": r})["u"].requires_grad
    assert not ddn.solve(PLANE_BALL, {"x": x.detach(), "r": r})["u"].requires_grad
    with torch.inference_mode():
        ddn.solve(PLANE_BALL, {"x": x.detach(), "r": r})


def test_non_contiguous_and_expanded_parameters():
    x = rand(3, 4).T
    r = torch.tensor(0.5, dtype=D).expand(4)
    assert close(ddn.solve(PLANE_BALL, {"x": x, "r": r})["u"], plane_ball(x, r))


def test_inputs_are_not_changed_and_outputs_do_not_alias():
    x, r = rand(2, 3), torch.full((2,), 9.0, dtype=D)
    kept = x.clone()
    layer = ddn.DeclarativeLayer(PLANE_BALL)
    first = layer(x, r)
    saved = first.clone()
    layer(x + 1, r)
    assert torch.equal(first, saved)
    first.zero_()
    assert torch.equal(x, kept)


@pytest.mark.parametrize("accuracy", [1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize("solver", ["casadi:ipopt", "newton", "scipy:SLSQP"])
def test_an_accuracy_beyond_the_solver_s_is_reached_by_the_polish(solver: str, accuracy: float) -> None:
    """The last step of the polish counted as what is left to do, so that good points were refused."""
    problem = ddn.Problem(
        {"u": (10,)},
        {"x": (10,)},
        lambda u, x: (u - x).square().sum() + u.exp().sum(),
        inequality=lambda u: u.square().sum() - 1,
    )
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = ddn.solve(problem, {"x": x}, solver=solver, policy=ddn.Policy(accuracy=accuracy))
    assert solution.residuals.stationarity.max() < 1e-11
