"""Kinks: with `nonsmooth="manifold"` one that the solution sits on acts as an active equality.

Every reference is a closed form or a dense system of the pattern that the solution has (which entries vanish, tie,
or lie on the margin), written out in torch; the pattern is that of the reference, never the library's.
"""

import math
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ddn_solvers as ddn

# torch's own forward-mode support compiles a few decompositions with torch.jit.script when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
D = torch.float64
N = 20
SMOOTH = ("casadi:ipopt", "scipy:SLSQP")
CONVEX = ("cvxpy:CLARABEL", *SMOOTH)
PIECEWISE_QP = (*CONVEX, "casadi:daqp")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def number(value):
    return torch.tensor(value, dtype=D)


def leaves(parameters):
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.detach().abs().max()))
    )


def quietly(function):
    """The result, and how many DegeneracyWarnings came with it; no other warning may."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = function()
    assert all(issubclass(w.category, ddn.DegeneracyWarning) for w in record), [
        str(w.message) for w in record
    ]
    return result, len(record)


def jacobian(output, x):
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].reshape(-1) for entry in output.reshape(-1)]
    return torch.stack(rows).reshape(*output.shape, *x.shape)


def same_derivatives(output, expected, ours, theirs, tolerance=1e-9):
    """Every parameter's gradient of a random functional of the output."""
    v = rand(*output.shape, seed=99)
    found = torch.autograd.grad((output * v).sum(), list(ours.values()), retain_graph=True)
    reference = torch.autograd.grad(
        (expected * v).sum(), list(theirs.values()), allow_unused=True, materialize_grads=True
    )
    for a, b in zip(found, reference, strict=True):
        close(a, b, tolerance)


# -- proximal operators: argmin 1/2 |u - x|^2 + w phi(u) --------------------------------------------------------


def clip(x, low, high):
    return torch.minimum(torch.maximum(x, low), high)


def soft(x, w):
    return x - clip(x, -w, w)


def pinned_maximum(x, w):
    """min(x, t) with sum (x - t)_+ = w: the largest entries lose w together."""
    ordered = x.sort(descending=True).values
    levels = (ordered.cumsum(0) - w) / torch.arange(1, len(x) + 1, dtype=D)
    return torch.minimum(x, levels[int((ordered > levels).sum()) - 1])


def pinned_magnitude(x, w):
    return x.sign() * pinned_maximum(x.abs(), w)


def block_soft(x, w):
    return x * (1 - w / x.norm()).clamp(min=0)


def in_rows(prox):
    return lambda x, w: torch.stack([prox(row, w) for row in x.reshape(4, 5)]).reshape(-1)


def paired(x, w):
    """Of the pairs (x_i, x_(10+i)), the larger loses w; where that would turn them round they meet."""
    a, b = x.chunk(2)
    meet = (a + b - w) / 2
    low, high = torch.where(a - b > w, a - w, a), torch.where(b - a > w, b - w, b)
    together = (a - b).abs() <= w
    return torch.cat([torch.where(together, meet, low), torch.where(together, meet, high)])


def segments(x, w):
    """Total variation: means over the segments that the dual solution by projected Newton steps leaves whole."""
    difference = torch.diff(torch.eye(N, dtype=D), dim=0)
    free, bound = torch.ones(N - 1, dtype=torch.bool), torch.zeros(N - 1, dtype=D)
    for _ in range(5 * N):  # active-set method for min 1/2 |x - D^T z|^2, |z| <= w
        target = difference[free] @ (x.detach() - difference[~free].T @ bound[~free])
        z = bound.clone()
        z[free] = torch.linalg.solve(difference[free] @ difference[free].T, target)
        moved = z.abs() > w + 1e-12
        jump = difference @ (x.detach() - difference.T @ z)
        wrong = ~free & (jump * bound.sign() < -1e-12)
        if not moved.any() and not wrong.any():
            break
        free, bound = (
            (free & ~moved) | wrong,
            torch.where(wrong, 0.0, torch.where(moved, z.sign() * w.detach(), bound)),
        )
    else:
        raise AssertionError("the dual did not settle")
    z = torch.where(free, 0.0, bound.sign()) * w
    inside = torch.linalg.solve(
        difference[free] @ difference[free].T, difference[free] @ (x - difference.T @ z)
    )
    return x - difference.T @ z - difference[free].T @ inside


CENTRE, TAU = rand(N, seed=3), 0.3


def pinball(u):
    return torch.maximum(TAU * u, (TAU - 1) * u).sum()


@dataclass
class Prox:
    phi: Any
    formula: Any
    w: float = 0.6
    x: torch.Tensor = field(default_factory=lambda: rand(N, seed=4))
    solvers: tuple = PIECEWISE_QP
    problem: ddn.Problem = field(init=False)

    def __post_init__(self):
        phi = self.phi
        self.problem = ddn.Problem(
            {"u": (N,)}, {"x": (N,), "w": ()}, lambda u, x, w: 0.5 * (u - x).square().sum() + w * phi(u)
        )

    @property
    def parameters(self):
        return {"x": self.x, "w": number(self.w)}


PROX = {
    "lasso": Prox(lambda u: u.abs().sum(), soft),
    "l1_loss": Prox(lambda u: F.l1_loss(u, CENTRE, reduction="sum"), lambda x, w: CENTRE + soft(x - CENTRE, w)),
    "vector_norm 1": Prox(lambda u: torch.linalg.vector_norm(u, 1), soft),
    "vector_norm inf": Prox(lambda u: torch.linalg.vector_norm(u, math.inf), pinned_magnitude, 2.0),
    "vector_norm 2": Prox(lambda u: torch.linalg.vector_norm(u), block_soft, solvers=CONVEX),
    "vector_norm 2 at zero": Prox(lambda u: torch.linalg.vector_norm(u), block_soft, 9.0, solvers=CONVEX),
    "group lasso": Prox(
        lambda u: u.reshape(4, 5).norm(dim=1).sum(), in_rows(block_soft), 2.0, solvers=CONVEX
    ),
    "rows inf": Prox(
        lambda u: torch.linalg.vector_norm(u.reshape(4, 5), math.inf, dim=1).sum(), in_rows(pinned_magnitude)
    ),
    "relu": Prox(lambda u: u.relu().sum(), lambda x, w: x - clip(x, 0 * w, w)),
    "leaky_relu": Prox(lambda u: F.leaky_relu(u, 0.2).sum(), lambda x, w: x - clip(x, 0.2 * w, w)),
    "clamp min": Prox(lambda u: u.clamp(min=-0.3).sum(), lambda x, w: x - clip(x + 0.3, 0 * w, w)),
    "clamp max": Prox(lambda u: -u.clamp(max=0.3).sum(), lambda x, w: x - clip(x - 0.3, -w, 0 * w)),
    "max": Prox(lambda u: u.max(), pinned_maximum, 2.0),
    "amax": Prox(lambda u: u.amax(0), pinned_maximum, 2.0),
    "max of rows": Prox(lambda u: u.reshape(4, 5).max(dim=1).values.sum(), in_rows(pinned_maximum)),
    "min": Prox(lambda u: -u.min(), lambda x, w: -pinned_maximum(-x, w), 2.0),
    "amin": Prox(lambda u: -u.reshape(4, 5).amin(1).sum(), lambda x, w: -in_rows(pinned_maximum)(-x, w)),
    "maximum": Prox(lambda u: torch.maximum(u[:10], u[10:]).sum(), paired),
    "minimum": Prox(lambda u: -torch.minimum(u[:10], u[10:]).sum(), lambda x, w: -paired(-x, w)),
    "pinball": Prox(pinball, lambda x, w: x - clip(x, (TAU - 1) * w, TAU * w)),
    "total variation": Prox(lambda u: u.diff().abs().sum(), segments, x=2 * rand(N, seed=4)),
    "nested: dead zone": Prox(
        lambda u: torch.relu(u.abs() - 0.5).sum(), lambda x, w: x - clip(soft(x, number(0.5)), -w, w)
    ),
    "nested: largest of relus": Prox(lambda u: u.relu().amax(), pinned_maximum, 2.0),
    "nested: relu of the largest": Prox(lambda u: u.amax().relu(), lambda x, w: -torch.relu(-x) + 0 * w, 20.0),
}  # fmt: skip
on_prox = pytest.mark.parametrize(
    ("case", "solver"),
    [pytest.param(c, s, id=f"{name}-{s}") for name, c in PROX.items() for s in c.solvers],
)
on_prox_once = pytest.mark.parametrize("case", PROX.values(), ids=PROX)


@on_prox
def test_proximal_operators_equal_their_closed_forms(case, solver):
    """Point, gradient in x and in the weight, from every backend; two-sided, and the kinks say so."""
    ours, theirs = leaves(case.parameters), leaves(case.parameters)
    s = ddn.solve(case.problem, ours, solver=solver)
    expected = case.formula(**theirs)
    close(s["u"], expected, 1e-10)
    same_derivatives(s["u"], expected, ours, theirs)
    assert s.certificate.ok
    assert s.residuals.stationarity < 1e-9


def patterns(case):
    """Four samples with different patterns, the case's own first."""
    x = torch.stack([case.x, 0.3 * case.x, 3 * rand(N, seed=5), rand(N, seed=6) + 0.5])
    return {"x": x, "w": number(case.w) * torch.tensor([1.0, 0.7, 1.3, 2.0], dtype=D)}


@on_prox_once
def test_a_batch_of_different_kink_patterns_equals_its_samples(case):
    many = leaves(patterns(case))
    s = ddn.solve(case.problem, many)
    theirs = leaves(patterns(case))
    expected = torch.stack([case.formula(*sample) for sample in zip(*theirs.values(), strict=True)])
    close(s["u"], expected, 1e-10)
    same_derivatives(s["u"], expected, many, theirs)
    assert s.certificate.ok.all()
    ours = torch.autograd.grad(s["u"].pow(2).sum(), list(many.values()))
    for i in range(4):
        one = leaves({name: p[i] for name, p in patterns(case).items()})
        alone = ddn.solve(case.problem, one)
        close(s["u"][i], alone["u"], 1e-13)
        for a, b in zip(ours, torch.autograd.grad(alone["u"].pow(2).sum(), list(one.values())), strict=True):
            close(a[i], b, 1e-12)


@on_prox_once
def test_sensitivity_and_attach_at_the_closed_form(case):
    """Multipliers of constraints and forces of kinks found by least squares; vjp and jvp of one system."""
    point = case.formula(**case.parameters)
    given = point + 1e-8 * rand(N, seed=7)
    found = ddn.sensitivity(case.problem, case.parameters, given)
    theirs = leaves(case.parameters)
    expected = jacobian(case.formula(**theirs), theirs["x"])
    close(found.jacobian("u", "x"), expected)
    tangent = rand(N, seed=8)
    close(found.jvp({"x": tangent})["u"], expected @ tangent)
    ours = leaves(case.parameters)
    attached = ddn.attach(case.problem, ours, given)
    assert torch.equal(attached["u"], given)
    same_derivatives(attached["u"], case.formula(**theirs), ours, theirs)


# -- balls and spheres: section 5.2 of the paper -----------------------------------------------------------------

NORMS = {
    "L1": lambda u: u.abs().sum(),
    "L2": torch.linalg.vector_norm,
    "Linf": lambda u: torch.linalg.vector_norm(u, math.inf),
}
RADIUS = {"L1": 4.0, "L2": 1.5, "Linf": 0.7}


def half_squares(u, x):
    return 0.5 * (u - x).square().sum()


def onto(norm, kind):
    constraint = {"set": lambda u, r: NORMS[norm](u) - r}
    return ddn.Problem({"u": (N,)}, {"x": (N,), "r": ()}, half_squares, **{kind: constraint})


SETS = {(norm, kind): onto(norm, kind) for norm in NORMS for kind in ("equality", "inequality")}
on_sets = pytest.mark.parametrize(
    ("norm", "kind", "solver"),
    [
        pytest.param(*key, s, id=f"{key[0]}-{'sphere' if key[1] == 'equality' else 'ball'}-{s}")
        for key in SETS
        for s in (SMOOTH if key[1] == "equality" else CONVEX)
    ],
)


def paper_table(norm, x, y, r):
    """Dy and Dzy of the table in section 5.2, for the radius r."""
    one = torch.eye(N, dtype=D)
    if norm == "L2":
        same = (one - torch.outer(y, y) / r**2) * r / x.norm()
        return same, same
    on = y.abs() > 1e-8 if norm == "L1" else y.abs() > r - 1e-8
    a = torch.where(on, y.sign(), 0.0)
    tangential = one - torch.outer(a, a) / (a @ a)
    masked = a.abs().diag() - torch.outer(a, a) / (a @ a) if norm == "L1" else one - a.abs().diag()
    return tangential, masked


@on_sets
@pytest.mark.parametrize("choice", ["manifold", "clarke"])
def test_projections_onto_balls_and_spheres(norm, kind, solver, choice):
    """`nonsmooth="clarke"` gives the paper's Dy, "manifold" its Dzy; several entries vanish or are clipped."""
    x, r = rand(N, seed=9).requires_grad_(), number(RADIUS[norm])
    s = ddn.solve(
        SETS[norm, kind],
        {"x": x, "r": r},
        solver=solver,
        initial=0.5 * x.detach(),
        policy=ddn.Policy(nonsmooth=choice),
    )
    y = s["u"].detach()
    if norm == "L1":
        close(y, x.detach() - pinned_magnitude_dual(x.detach(), r))
        assert 3 <= (y.abs() < 1e-9).sum() <= N - 3
    elif norm == "Linf":
        close(y, x.detach().clamp(-RADIUS[norm], RADIUS[norm]))
        assert 3 <= (y.abs() > RADIUS[norm] - 1e-9).sum() <= N - 3
    else:
        close(y, r * x.detach() / x.detach().norm())
    clarke, manifold = paper_table(norm, x.detach(), y, r)
    close(jacobian(s["u"], x), clarke if choice == "clarke" else manifold)
    assert s.certificate.ok


def pinned_magnitude_dual(x, r):
    """Moreau: the projection onto the L1 ball is x minus the proximal operator of r |.|_inf."""
    return pinned_magnitude(x, r)


@pytest.mark.parametrize("norm", NORMS)
def test_inside_a_ball_the_projection_is_the_identity(norm):
    x = 0.01 * rand(N, seed=9).requires_grad_()
    for choice in ("manifold", "clarke"):
        s = ddn.solve(
            SETS[norm, "inequality"], {"x": x, "r": number(1.0)}, policy=ddn.Policy(nonsmooth=choice)
        )
        close(s["u"], x)
        close(jacobian(s["u"], x), torch.eye(N, dtype=D))
        assert s.certificate.ok


@pytest.mark.parametrize("norm", ["L1", "Linf"])
def test_the_radius_moves_the_projection(norm):
    """dy/dr: sign(y) / |support| of the L1 ball, sign(y) on the clipped entries of the Linf ball."""
    x, r = rand(N, seed=9), number(RADIUS[norm]).requires_grad_()
    y = ddn.solve(SETS[norm, "inequality"], {"x": x, "r": r})["u"]
    at = y.detach()
    on = (at.abs() > 1e-8) if norm == "L1" else at.abs() > RADIUS[norm] - 1e-8
    expected = on * at.sign() / (on.sum() if norm == "L1" else 1)
    close(jacobian(y, r), expected.to(D))


TIES = {
    name: ddn.Problem({"u": (N,)}, {"x": (N,)}, half_squares, inequality=function)
    for name, function in {
        "amax": lambda u: u.amax() - 1,
        "vector_norm": lambda u: NORMS["Linf"](u) - 1,
    }.items()
}


@pytest.mark.parametrize("ties", [2, 3, 4, 5, 7, 20])
@pytest.mark.parametrize("norm", TIES)
def test_clarke_shares_a_maximum_evenly_among_its_ties(norm, ties):
    """Also with three and more ties, where the halves of the tree of comparisons are not even."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(10))
    x = rand(N, seed=11).clamp(-0.5, 0.5)
    x[order[:ties]] = 2 + rand(ties, seed=12).abs()
    x.requires_grad_()
    a = torch.zeros(N, dtype=D)
    a[order[:ties]] = 1.0
    y = ddn.solve(TIES[norm], {"x": x}, policy=ddn.Policy(nonsmooth="clarke"))["u"]
    close(jacobian(y, x), torch.eye(N, dtype=D) - torch.outer(a, a) / ties)
    y = ddn.solve(TIES[norm], {"x": x})["u"]
    close(jacobian(y, x), (1 - a).diag())


# -- designs: regression and classification ------------------------------------------------------------------------

DESIGN = rand(35, N, seed=13)


def active_set_formula(hessian, linear, rows, values):
    """argmin 1/2 u^T H u - q^T u on rows u = values."""
    m, n = rows.shape
    matrix = torch.cat([torch.cat([hessian, rows.mT], 1), torch.cat([rows, hessian.new_zeros(m, m)], 1)])
    return torch.linalg.solve(matrix, torch.cat([linear, values]))[:n]


@pytest.mark.parametrize("solver", PIECEWISE_QP)
def test_lasso_of_a_general_design(solver):
    """On its support u_S = (M_S^T M_S)^-1 (M_S^T y - w sign(u_S)), zero elsewhere."""
    p = {
        "M": DESIGN,
        "y": DESIGN @ (rand(N, seed=14) * (rand(N, seed=15) > 0)) + rand(35, seed=16),
        "w": number(9.0),
    }
    ours, theirs = leaves(p), leaves(p)
    s = ddn.solve(LASSO, ours, solver=solver)
    u, (M, y, w) = s["u"].detach(), theirs.values()
    S, signs = u.abs() > 1e-7, u.sign()
    assert 3 <= S.sum() <= N - 3
    slack = w - (DESIGN.T @ (p["y"] - DESIGN @ u)).abs()[~S]
    assert slack.min() > 1e-2
    expected = torch.zeros(N, dtype=D)
    expected[S] = torch.linalg.solve(M[:, S].T @ M[:, S], M[:, S].T @ y - w * signs[S])
    close(s["u"], expected)
    assert (u[~S].abs() < 1e-14).all()
    same_derivatives(s["u"], expected, ours, theirs)
    assert s.certificate.ok


LASSO = ddn.Problem(
    {"u": (N,)}, {"M": (35, N), "y": (35,), "w": ()},
    lambda u, M, y, w: 0.5 * (M @ u - y).square().sum() + w * u.abs().sum(),
)  # fmt: skip
FUSED = ddn.Problem(
    {"u": (N,)}, {"M": (35, N), "y": (35,), "w": ()},
    lambda u, M, y, w: 0.5 * (M @ u - y).square().sum() + w * (u.abs().sum() + u.diff().abs().sum()),
)  # fmt: skip


@pytest.mark.parametrize("solver", PIECEWISE_QP)
def test_fused_lasso_of_a_general_design(solver):
    """Entries that vanish and neighbours that are equal, some of them both: dependent kinks that agree."""
    steps = torch.repeat_interleave(torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=D), 5)
    p = {"M": DESIGN, "y": DESIGN @ steps + rand(35, seed=16), "w": number(6.0)}
    ours, theirs = leaves(p), leaves(p)
    s = ddn.solve(FUSED, ours, solver=solver)
    u, (M, y, w) = s["u"].detach(), theirs.values()
    rows = torch.cat([torch.eye(N, dtype=D), torch.eye(N, dtype=D).diff(dim=0)])
    pinned = (rows @ u).abs() < 1e-8
    assert 5 <= pinned.sum() <= N
    basis = torch.linalg.svd(rows[pinned])[2][int(torch.linalg.matrix_rank(rows[pinned])) :]
    force = w * (rows[~pinned] @ u).sign() @ rows[~pinned]
    free = basis @ M.T @ M @ basis.T
    expected = basis.T @ torch.linalg.solve(free, basis @ (M.T @ y - force))
    close(s["u"], expected)
    same_derivatives(s["u"], expected, ours, theirs)


SVM = ddn.Problem(
    {"a": (N,), "b": ()}, {"X": (40, N), "c": ()},
    lambda a, b, X, c: 0.5 * a.square().sum() + c * torch.relu(1 - LABELS * (X @ a + b)).sum(),
)  # fmt: skip
LABELS = rand(40, seed=17).sign()


@pytest.mark.parametrize("solver", PIECEWISE_QP)
def test_support_vector_machine_with_hinge_loss(solver):
    """Points on the margin are equations y_i (a^T x_i + b) = 1, those inside push with c y_i x_i."""
    p = {"X": rand(40, N, seed=18) + 0.1 * LABELS[:, None] * rand(N, seed=19), "c": number(0.1)}
    ours, theirs = leaves(p), leaves(p)
    s = ddn.solve(SVM, ours, solver=solver)
    a, b = s["a"].detach(), s["b"].detach()
    margin = 1 - LABELS * (p["X"] @ a + b)
    on, inside = margin.abs() < 1e-8, margin > 1e-8
    assert on.sum() >= 3
    assert inside.sum() >= 3
    X, c = theirs.values()
    signed = LABELS[:, None] * torch.cat([X, torch.ones(40, 1, dtype=D)], 1)
    hessian = torch.cat([torch.ones(N, dtype=D), torch.zeros(1, dtype=D)]).diag()
    expected = active_set_formula(
        hessian, c * signed[inside].sum(0), signed[on], torch.ones(int(on.sum()), dtype=D)
    )
    whole = torch.cat([s["a"], s["b"][None]])
    close(whole, expected)
    same_derivatives(whole, expected, ours, theirs)
    assert s.certificate.ok


QUANTILE = ddn.Problem(
    {"u": (N,)}, {"M": (50, N), "y": (50,)},
    lambda u, M, y: torch.maximum(TAU * (y - M @ u), (TAU - 1) * (y - M @ u)).sum(),
)  # fmt: skip


@pytest.mark.parametrize("solver", [*PIECEWISE_QP, "scipy:highs"])
def test_quantile_regression_interpolates(solver):
    """A linear program: n observations are met exactly, u = M_S^-1 y_S; H vanishes, the rows hold it all."""
    p = {"M": rand(50, N, seed=20), "y": rand(50, seed=21)}
    ours, theirs = leaves(p), leaves(p)
    s = ddn.solve(QUANTILE, ours, solver=solver)
    S = (p["y"] - p["M"] @ s["u"].detach()).abs() < 1e-8
    assert S.sum() == N
    expected = torch.linalg.solve(theirs["M"][S], theirs["y"][S])
    close(s["u"], expected)
    same_derivatives(s["u"], expected, ours, theirs)
    assert s.certificate.ok


GROUPS = ddn.Problem(
    {"u": (N,)}, {"M": (35, N), "y": (35,), "w": ()},
    lambda u, M, y, w: 0.5 * (M @ u - y).square().sum() + w * u.reshape(5, 4).norm(dim=1).sum(),
)  # fmt: skip


@pytest.mark.parametrize("solver", CONVEX)
def test_group_lasso_of_a_general_design(solver):
    """Whole groups vanish; on the others the loss is smooth, and one Newton step in torch carries the derivative."""
    sparse = (rand(5, 4, seed=22) * torch.tensor([[1.0], [0], [1], [0], [1]], dtype=D)).reshape(-1)
    p = {"M": DESIGN, "y": DESIGN @ sparse + 0.3 * rand(35, seed=23), "w": number(12.0)}
    ours, theirs = leaves(p), leaves(p)
    s = ddn.solve(GROUPS, ours, solver=solver)
    u = s["u"].detach()
    lengths = u.reshape(5, 4).norm(dim=1)
    assert (lengths < 1e-12).sum() == 2
    S = (lengths > 1e-12).repeat_interleave(4)
    M, y, w = theirs.values()

    def gradient(v, M, y, w):
        return M[:, S].T @ (M[:, S] @ v - y) + w * (
            v.reshape(-1, 4) / v.reshape(-1, 4).norm(dim=1, keepdim=True)
        ).reshape(-1)

    residual = gradient(u[S], M, y, w)
    close(residual.detach(), torch.zeros(int(S.sum()), dtype=D))
    hessian = torch.func.jacrev(gradient)(u[S], p["M"], p["y"], p["w"])
    expected = torch.zeros(N, dtype=D).index_put(
        (S.nonzero()[:, 0],), u[S] - torch.linalg.solve(hessian, residual)
    )
    same_derivatives(s["u"], expected, ours, theirs)
    assert s.certificate.ok


# -- kinks in constraints -------------------------------------------------------------------------------------------

INSIDE = {
    # u -> kinked constraint <= level, and the rows that are pinned at a solution: (residual rows, |.| < 1e-8)
    "relu": (lambda u: u.relu().sum(), torch.eye(N, dtype=D), 2.0),
    "total variation": (lambda u: u.diff().abs().sum(), torch.eye(N, dtype=D).diff(dim=0), 6.0),
    "weighted L1": (lambda u: ((CENTRE.abs() + 0.5) * u.abs()).sum(), torch.eye(N, dtype=D), 5.0),
    "largest": (lambda u: u.reshape(4, 5).amax(1).sum(), None, 0.5),
}


def kinked_set(name):
    function = INSIDE[name][0]
    return ddn.Problem(
        {"u": (N,)},
        {"x": (N,), "level": ()},
        half_squares,
        inequality={"set": lambda u, level: function(u) - level},
    )


KINKED = {name: kinked_set(name) for name in INSIDE}


@pytest.mark.parametrize("solver", PIECEWISE_QP)
@pytest.mark.parametrize("name", INSIDE)
def test_kinks_in_a_constraint(name, solver):
    """The projection onto {phi <= level}: pinned rows are equations, and so is phi on its piece."""
    function, rows, level = INSIDE[name]
    p = {"x": rand(N, seed=24), "level": number(level)}
    ours, theirs = leaves(p), leaves(p)
    s = ddn.solve(KINKED[name], ours, solver=solver)
    u = s["u"].detach()
    close(function(u), p["level"])
    if rows is None:  # entries that tie with the largest of their row of five
        largest = u.reshape(4, 5).amax(1).repeat_interleave(5)
        first = u.reshape(4, 5).argmax(1) + 5 * torch.arange(4)
        rows = torch.eye(N, dtype=D) - torch.eye(N, dtype=D)[first].repeat_interleave(5, 0)
        tied = (u - largest).abs() < 1e-8
        tied[first] = False
        rows = rows[tied]
    else:
        rows = rows[(rows @ u).abs() < 1e-8]
    assert len(rows) >= 2
    slope = torch.func.grad(function)(u + 0 * rows.sum())
    null = torch.linalg.svd(rows)[2][len(rows) :]  # phi's own gradient counts within the pinned subspace only
    a = null.T @ (null @ slope)
    all_rows = torch.cat([rows, a[None]])
    # phi(u) = level is linear on the piece: a^T u = level
    expected = active_set_formula(
        torch.eye(N, dtype=D),
        theirs["x"],
        all_rows,
        torch.cat([torch.zeros(len(rows), dtype=D), (theirs["level"] - level + a @ u)[None]]),
    )
    close(s["u"], expected)
    same_derivatives(s["u"], expected, ours, theirs)
    lam = (p["x"] - u) @ a / (a @ a)
    close(s.dual.inequality["set"].detach(), lam)
    assert s.certificate.ok


# -- everything at once: higher derivatives, multipliers, residuals ---------------------------------------------------

MIX, SPREAD = rand(N, N, seed=25) / N**0.5, rand(N, 3, seed=26)


def mixed_objective(u, x, w):
    smooth = (u - SPREAD @ x).exp().sum() + 0.5 * (MIX @ u - SPREAD @ x.sin()).square().sum()
    return smooth + w * u[:4].abs().sum() + 6 * u[12:15].norm() + torch.relu(u[4:8] - u[8:12]).sum()


MIXED = ddn.Problem(
    {"u": (N,)}, {"x": (3,), "w": (), "r": ()}, mixed_objective,
    {"sum": lambda u, x: u[:5].sum() - x[0]}, {"ball": lambda u, r: u[15:].abs().sum() - r},
)  # fmt: skip
AT = {"x": torch.tensor([0.4, -0.6, 0.9], dtype=D), "w": number(5.0), "r": number(2.0)}


def mixed(x, w, r, solver="casadi:ipopt"):
    s = ddn.solve(MIXED, {"x": x, "w": w, "r": r}, solver=solver)
    return s["u"], s.dual.equality["sum"], s.dual.inequality["ball"], s.objective


def test_the_mixed_problem_has_every_kind_of_kink():
    s = ddn.solve(MIXED, AT)
    u = s["u"]
    assert s.certificate.ok
    assert s.certificate.margin > 1e-4
    assert 0 < (u[:4].abs() < 1e-9).sum() < 4
    assert u[12:15].norm() < 1e-9
    assert ((u[4:8] - u[8:12]).abs() < 1e-9).any()
    assert 0 < (u[15:].abs() < 1e-9).sum() < 5
    assert s.certificate.active["ball"]


@pytest.mark.parametrize("solver", CONVEX)
def test_all_backends_agree_on_the_mixed_problem(solver):
    ours, theirs = leaves(AT), leaves(AT)
    whole, reference = (
        torch.cat([o.reshape(-1) for o in mixed(**p, solver=s)])
        for p, s in ((ours, solver), (theirs, "auto"))
    )
    close(whole, reference.detach())
    same_derivatives(whole, reference, ours, theirs)


def test_gradcheck_and_gradgradcheck_with_kinks():
    """Of every output; in second order of a few combinations of them, which costs less."""
    inputs = tuple(leaves(AT).values())
    assert torch.autograd.gradcheck(mixed, inputs)
    weights = rand(3, N + 3, seed=29)
    assert torch.autograd.gradgradcheck(
        lambda *p: weights @ torch.cat([output.reshape(-1) for output in mixed(*p)]), inputs
    )


def test_the_hessian_of_a_group_lasso_through_a_layer():
    """Block soft threshold has second derivatives off zero, and none at zero."""
    case = PROX["group lasso"]
    layer = ddn.DeclarativeLayer(case.problem)
    weights, w = rand(N, seed=27), number(case.w)
    found = torch.func.hessian(lambda x: (layer(x, w) * weights).sum())(case.x)
    expected = torch.func.hessian(lambda x: (_blocks(x, w) * weights).sum())(case.x)
    close(found, expected, 1e-8)
    assert expected.abs().max() > 1e-2


def _blocks(x, w):
    rows = x.reshape(4, 5)
    return (rows * (1 - w / rows.norm(dim=1, keepdim=True)).clamp(min=0)).reshape(-1)


@pytest.mark.parametrize("solver", SMOOTH)
@pytest.mark.parametrize("steps", [1, 3])
def test_residuals_are_the_distance_to_the_subdifferential(solver, steps):
    """Of an unfinished point: |g + w sign(u)| off a kink, (|g| - w)_+ on it, whatever the backend thought."""
    problem = ddn.Problem(
        {"u": (N,)}, {"x": (N,), "w": ()},
        lambda u, x, w: (3 * (u - x)).exp().sum() + 0.5 * (MIX @ u - x).square().sum() + w * u.abs().sum(),
    )  # fmt: skip
    p = {"x": 1.5 * rand(N, seed=28), "w": number(1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.ConvergenceWarning)
        s = ddn.solve(
            problem, p, solver=solver, options={"max_iter": steps}, policy=ddn.Policy(on_failure="warn")
        )
    u, x, w = s["u"], p["x"], p["w"]
    g = 3 * (3 * (u - x)).exp() + MIX.T @ (MIX @ u - x)
    distance = torch.where(u == 0, (g.abs() - w).relu(), (g + w * u.sign()).abs())
    assert (u == 0).any() or steps == 1
    close(s.residuals.stationarity, distance.max())


@pytest.mark.parametrize("function", [ddn.attach, ddn.sensitivity], ids=["attach", "sensitivity"])
def test_a_point_outside_the_subdifferential_is_refused(function):
    """Zero, where |x_i| > w; and an entry on the wrong side of its kink."""
    case = PROX["lasso"]
    wrong = case.formula(**case.parameters)
    wrong[wrong.argmax()] *= -1
    for point in (torch.zeros(N, dtype=D), wrong):
        with pytest.raises(ddn.SensitivityError):
            function(case.problem, case.parameters, point)


SPARSE_GROUP = ddn.Problem(
    {"u": (N,)}, {"x": (N,), "w": ()},
    lambda u, x, w: half_squares(u, x) + w * torch.linalg.vector_norm(u[10:]) + 0.8 * u[:10].abs().sum(),
)  # fmt: skip


def sparse_group(x, w):
    return torch.cat([soft(x[:10], number(0.8)), block_soft(x[10:], w)])


def test_vmap_of_second_derivatives_over_different_kink_patterns():
    layer = ddn.DeclarativeLayer(SPARSE_GROUP)
    x, w = torch.stack([rand(N, seed=30), 0.35 * rand(N, seed=31), 3 * rand(N, seed=32)]), vector(0.5, 9, 0.8)
    close(layer(x, w), torch.stack([sparse_group(*sample) for sample in zip(x, w, strict=True)]))
    assert layer(x, w)[1, 10:].abs().max() < 1e-12
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = torch.func.vmap(transform(layer))(x, w)
        for i in range(3):
            close(found[i], torch.func.jacrev(sparse_group)(x[i], w[i]))
    found = torch.func.vmap(torch.func.hessian(lambda x, w: layer(x, w).pow(3).sum()))(x, w)
    for i in range(3):
        close(found[i], torch.func.hessian(lambda x: sparse_group(x, w[i]).pow(3).sum())(x[i]))  # noqa: B023  # called at once


@pytest.mark.parametrize("choice", ["manifold", "clarke"])
def test_every_mode_gives_the_same_derivative(choice):
    """Reverse and forward mode, compiled and differentiable backward, vjp and jvp of a sensitivity."""
    policy, x, w = ddn.Policy(nonsmooth=choice), rand(N, seed=30), number(0.5)
    layer = ddn.DeclarativeLayer(SPARSE_GROUP, policy=policy)
    reverse = torch.func.jacrev(layer)(x, w)
    close(torch.func.jacfwd(layer)(x, w), reverse, 1e-12)
    found = ddn.sensitivity(SPARSE_GROUP, {"x": x, "w": w}, sparse_group(x, w), policy=policy)
    close(found.jacobian("u", "x"), reverse, 1e-12)
    tangent, leaf = rand(N, seed=33), x.clone().requires_grad_()
    close(found.jvp({"x": tangent})["u"], reverse @ tangent, 1e-12)
    for differentiable in (False, True):
        (g,) = torch.autograd.grad(layer(leaf, w) @ tangent, leaf, create_graph=differentiable)
        close(g.detach(), tangent @ reverse, 1e-12)
    assert (choice == "manifold") == bool((reverse[sparse_group(x, w) == 0] == 0).all())


@pytest.mark.parametrize("name", ["lasso", "group lasso", "total variation", "max", "nested: dead zone"])
def test_float32_parameters_with_kinks(name):
    case = PROX[name]
    results = []
    for dtype in (torch.float32, D):
        p = {key: value.float().to(dtype).requires_grad_() for key, value in case.parameters.items()}
        s = ddn.solve(case.problem, p)
        assert s.certificate.ok
        results.append([s["u"], *torch.autograd.grad(s["u"].pow(2).sum(), list(p.values()))])
    for narrow, wide in zip(*results, strict=True):
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=1e-6)


# -- on the boundary of a subdifferential ------------------------------------------------------------------------------


def vector(*values):
    return torch.tensor(values, dtype=D)


def three(phi):
    return ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: half_squares(u, x) + phi(u))


EYE, PAIR = torch.eye(3, dtype=D), torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=D)
BOUNDARY = {
    # problem, x on the boundary, Jacobian on the manifold and off it
    "abs": (three(lambda u: u.abs().sum()), vector(1, -1, 2), vector(0, 0, 1).diag(), EYE),
    "relu": (three(lambda u: u.relu().sum()), vector(1, 0, 2), vector(0, 0, 1).diag(), EYE),
    "leaky_relu": (three(lambda u: F.leaky_relu(u, 0.5).sum()), vector(1, 0.5, 2), vector(0, 0, 1).diag(), EYE),
    "clamp": (three(lambda u: u.clamp(min=1).sum()), vector(2, 1, 3), vector(0, 0, 1).diag(), EYE),
    "amax": (three(lambda u: u.amax()), vector(2, 1, 0), PAIR, EYE),
    "amin": (three(lambda u: -u.amin()), vector(-2, -1, 0), PAIR, EYE),
    "maximum": (three(lambda u: torch.maximum(u[0], u[1])), vector(2, 1, 0), PAIR, EYE),
    "total variation": (three(lambda u: (u[0] - u[1]).abs()), vector(3, 1, 0), PAIR, EYE),
}  # fmt: skip


@pytest.mark.parametrize("solver", CONVEX)
@pytest.mark.parametrize("name", BOUNDARY)
def test_a_subgradient_on_the_boundary_is_one_sided(name, solver):
    problem, at, on, off = BOUNDARY[name]
    for choice, expected in (("active", on), ("inactive", off), ("mean", (on + off) / 2)):
        x = at.clone().requires_grad_()
        s = ddn.solve(problem, {"x": x}, solver=solver, policy=ddn.Policy(weakly_active=choice))
        c = s.certificate
        assert c.one_sided
        assert not c.ok
        assert not c.strictly_complementary
        assert not c.singular
        assert c.margin < 1e-8
        found, told = quietly(lambda: jacobian(s["u"], x))  # noqa: B023  # called at once
        assert told <= 3
        close(found, expected)


@pytest.mark.parametrize("name", BOUNDARY)
def test_a_subgradient_on_the_boundary_can_be_refused(name):
    problem, at, *_ = BOUNDARY[name]
    refuse = ddn.Policy(weakly_active="raise")
    with pytest.raises(ddn.SensitivityError):
        ddn.solve(problem, {"x": at.clone().requires_grad_()}, policy=refuse)["u"].sum().backward()
    # a little to either side the derivative is two-sided, and known
    for step in (1e-4, -1e-4):
        x = (at * (1 + step) + vector(0, step / 3, 0)).requires_grad_()
        s = ddn.solve(problem, {"x": x}, policy=refuse)
        assert s.certificate.ok
        assert torch.isfinite(jacobian(s["u"], x)).all()


def test_only_the_sample_on_the_boundary_is_one_sided():
    x = torch.stack([vector(1, -1, 2), vector(1.1, -0.9, 2)]).requires_grad_()
    s = ddn.solve(BOUNDARY["abs"][0], {"x": x}, policy=ddn.Policy(weakly_active="mean"))
    assert s.certificate.one_sided.tolist() == [True, False]
    gradient, _ = quietly(lambda: torch.autograd.grad(s["u"].sum(), x)[0])
    close(gradient, torch.stack([vector(0.5, 0.5, 1), vector(1, 0, 1)]))


NO_CHOICE = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="|mu| = w of a vector norm: the zero is kept whatever is chosen",
)


@pytest.mark.parametrize(
    "choice", ["active", pytest.param("inactive", marks=NO_CHOICE), pytest.param("mean", marks=NO_CHOICE)]
)
def test_the_boundary_of_a_vector_norm_is_one_sided(choice):
    """Block soft threshold at |x| = 1: 0 inside, x x^T outside."""
    x = vector(0.6, 0.8, 0).requires_grad_()
    s = ddn.solve(three(torch.linalg.vector_norm), {"x": x}, policy=ddn.Policy(weakly_active=choice))
    assert s.certificate.one_sided
    outside = torch.outer(x.detach(), x.detach())
    found, _ = quietly(lambda: jacobian(s["u"], x))
    close(found, {"active": 0 * outside, "inactive": outside, "mean": outside / 2}[choice])


# -- no kinks after all, bends, and kinks that are not known ---------------------------------------------------------

SMOOTH_AFTER_ALL = {
    "norm squared": (three(lambda u: 0.5 * u.norm().square()), vector(0, 0, 0)),
    "vector_norm ** 2": (three(lambda u: 0.5 * torch.linalg.vector_norm(u) ** 2), vector(0, 0, 0)),
    "abs squared": (three(lambda u: 0.5 * u.abs().square().sum()), vector(0, 0, 1)),
    "abs times abs": (three(lambda u: 0.5 * (u.abs() * u.abs()).sum()), vector(0, 0, 1)),
    "norms of rows squared": (
        three(lambda u: 0.5 * torch.stack([u, -u], 1).norm(dim=1).pow(2).sum() / 2), vector(0, 0, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("solver", ["auto", *SMOOTH])
@pytest.mark.parametrize("name", SMOOTH_AFTER_ALL)
def test_squares_of_norms_are_smooth(name, solver):
    problem, at = SMOOTH_AFTER_ALL[name]
    x = at.clone().requires_grad_()
    s = ddn.solve(problem, {"x": x}, solver=solver)
    close(s["u"], at / 2)
    assert s.certificate.ok
    close(jacobian(s["u"], x), EYE / 2)


def test_the_cube_of_an_absolute_value_is_smooth():
    x = vector(0, 0, 1).requires_grad_()
    s = ddn.solve(three(lambda u: u.abs().pow(3).sum()), {"x": x})
    close(jacobian(s["u"], x)[:2, :2], EYE[:2, :2])
    assert s.certificate.ok


BEND = three(lambda u: 0.5 * u.relu().square().sum())


def test_a_bend_is_one_sided_and_exact_off_it():
    """relu(u)^2: the second derivative jumps at 0, 1/2 above and 1 below; nothing holds the point there."""
    x = vector(1, 1e-4, -2).requires_grad_()
    s = ddn.solve(BEND, {"x": x})
    assert s.certificate.ok
    close(jacobian(s["u"], x), vector(0.5, 0.5, 1).diag())
    x = vector(1, 0, -2).requires_grad_()
    s = ddn.solve(BEND, {"x": x})
    assert s.certificate.one_sided
    assert not s.certificate.ok
    assert not s.certificate.singular
    found, _ = quietly(lambda: jacobian(s["u"], x))
    assert min(abs(found[1, 1] - side) for side in (0.5, 1.0)) < 1e-9
    close(found[[0, 2]], vector(0.5, 0, 1).diag()[[0, 2]])
    with pytest.raises(ddn.SensitivityError):
        ddn.solve(BEND, {"x": x}, policy=ddn.Policy(weakly_active="raise"))["u"].sum().backward()


def bent(solver, choice):
    x = vector(1, 0, -2).requires_grad_()
    s = ddn.solve(BEND, {"x": x}, solver=solver, policy=ddn.Policy(weakly_active=choice))
    return float(quietly(lambda: jacobian(s["u"], x)[1, 1])[0])


@pytest.mark.parametrize("choice", ["active", "inactive"])
def test_the_derivative_at_a_bend_does_not_depend_on_the_backend(choice):
    """Rounding put the point on one side or the other, by the backend."""
    found = [bent(solver, choice) for solver in CONVEX]
    assert found == pytest.approx([found[0]] * len(found))


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="a bend takes one side, whatever is chosen")
def test_the_mean_at_a_bend_is_that_of_its_sides():
    assert bent("casadi:ipopt", "mean") == pytest.approx(0.75)


UNKNOWN = {
    # operation that the message names: phi, x off the kink, solution there, x whose solution lies on it, that
    "sort": (lambda u: (u.sort().values * vector(1, 2, 3)).sum(), vector(0, 3, 9), vector(-1, 1, 6), vector(0, 0.2, 5), vector(-1.4, -1.4, 2)),
    "gt": (lambda u: torch.where(u > 0, 2 * u, u).sum(), vector(9, 4, -9), vector(7, 2, -10), vector(1.5, 4, -9), vector(0, 2, -10)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_kinks_that_are_not_known_are_refused_by_name_at_the_kink_only(name):
    phi, off, solution, on, kink = UNKNOWN[name]
    x = off.clone().requires_grad_()
    for solver in SMOOTH:
        s = ddn.solve(three(phi), {"x": x}, solver=solver)
        close(s["u"], solution)
        assert s.certificate.ok
        close(jacobian(s["u"], x), EYE)
    with pytest.raises(ddn.SolveError, match=f"kink of '{name}'.*{name if name != 'gt' else 'where'}"):
        ddn.solve(three(phi), {"x": on}, solver="scipy:SLSQP")
    for function in (ddn.attach, ddn.sensitivity):
        with pytest.raises(ddn.SensitivityError, match=f"kink of '{name}'"):
            function(three(phi), {"x": on}, kink)


# objective, x at which the solution is where torch changes its formula, that solution, du/dx and d^2u/dx^2 there
AT_A_CHANGE_OF_FORMULA = {
    "logaddexp": (lambda u, x: torch.logaddexp(u, x) - u / 2, 0.7, 0.7, 1.0, 0.0),
    "logaddexp2": (lambda u, x: torch.logaddexp2(u, x) - u / 2, 0.7, 0.7, 1.0, 0.0),
    "logits": (
        lambda u, x: F.binary_cross_entropy_with_logits(u, x),
        0.5,
        0.0,
        4.0,
        0.0,
    ),  # u = log(x / (1 - x))
    "sinc": (lambda u, x: -torch.sinc(u - x), 0.3, 0.3, 1.0, 0.0),
    "fmod": (lambda u, x: (torch.fmod(u, 10) - x).square(), 0.0, 0.0, 1.0, 0.0),
    "isfinite": (lambda u, x: torch.where(torch.isfinite(u), (u - x.sin()).square(), 0), 0.0, 0.0, 1.0, 0.0),
}


@pytest.mark.parametrize("name", AT_A_CHANGE_OF_FORMULA)
def test_a_smooth_function_is_no_kink_where_its_formula_changes(name):
    objective, at, expected, slope, curvature = AT_A_CHANGE_OF_FORMULA[name]
    x = number(at).requires_grad_()
    s = ddn.solve(ddn.Problem({"u": ()}, {"x": ()}, objective), {"x": x}, initial=number(expected) + 0.1)
    close(s["u"], number(expected))
    assert s.certificate.ok
    close(torch.autograd.grad(s["u"], x, retain_graph=True)[0], number(slope), 1e-8)
    if name != "sinc":  # of which torch has no second derivative at zero
        (first,) = torch.autograd.grad(s["u"], x, create_graph=True)
        close(torch.autograd.grad(first, x)[0], number(curvature), 1e-7)


# -- found with these tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["objective", "constraint"])
def test_the_same_kink_twice_with_unequal_weights(where):
    """Dependent rows whose forces have limits: the derivative is that of either row alone."""
    if where == "objective":
        problem = three(lambda u: 0.99 * u.abs().sum() + 0.01 * u.abs().sum())
    else:
        problem = ddn.Problem(
            {"u": (3,)}, {"x": (3,)}, lambda u, x: half_squares(u, x) + 0.01 * u.abs().sum(),
            inequality=lambda u: u.abs().sum() - 1,
        )  # fmt: skip
    x = vector(3, 0.95, -0.2).requires_grad_()
    s = ddn.solve(problem, {"x": x})
    found, _ = quietly(lambda: jacobian(s["u"], x))
    close(found, vector(1 if where == "objective" else 0, 0, 0).diag())
    assert s.residuals.stationarity < 1e-9
    assert not s.certificate.one_sided


@pytest.mark.parametrize("function", [ddn.attach, ddn.sensitivity], ids=["attach", "sensitivity"])
def test_the_zero_of_a_norm_that_is_no_solution_is_refused(function):
    with pytest.raises(ddn.SensitivityError):
        function(three(torch.linalg.vector_norm), {"x": vector(1, 2, 3)}, torch.zeros(3, dtype=D))


DEPENDENT = {
    # more kinks meet than there are dimensions: the derivative is unique, the forces are not
    "Linf norm at zero": (lambda u: 8 * torch.linalg.vector_norm(u, math.inf), vector(-0.2, 0.3, 2, -2), {}),
    "spread at zero": (lambda u: 8 * (u.amax() - u.amin()), vector(-0.2, 0.3, 2, -2), {}),
    "nonnegative lasso": (lambda u: 0.5 * u.abs().sum(), vector(-0.2, 0.3, 2, -2), {"bounds": {"u": (0, None)}}),
    "total variation of an image": (
        lambda u: 0.8 * (u.diff(dim=0).abs().sum() + u.diff(dim=1).abs().sum()), rand(3, 3, seed=1), {},
    ),
    "total variation of an image, weak": (
        lambda u: 0.3 * (u.diff(dim=0).abs().sum() + u.diff(dim=1).abs().sum()), rand(4, 4, seed=1), {},
    ),
}  # fmt: skip
UNLIMITED = (
    "the least-norm forces of dependent kinks exceed their weights: a residual of 0.1 to 0.4 at a solution"
)


@cache
def dependent(name):
    """The problem, and its Jacobian by central differences of re-solves."""
    phi, at, bounds = DEPENDENT[name]
    problem = ddn.Problem(
        {"u": tuple(at.shape)}, {"x": tuple(at.shape)}, lambda u, x: half_squares(u, x) + phi(u), **bounds
    )
    units = torch.eye(at.numel(), dtype=D).reshape(-1, *at.shape)
    above, below = (
        ddn.solve(problem, {"x": at + step * units}, solver="casadi:ipopt")["u"].reshape(at.numel(), -1)
        for step in (1e-5, -1e-5)
    )
    return problem, (above - below).T / 2e-5


@pytest.mark.parametrize("solver", CONVEX)
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_kinks_leave_the_derivative_unique(name, solver):
    problem, differences = dependent(name)
    x = DEPENDENT[name][1].clone().requires_grad_()
    found, _ = quietly(lambda: jacobian(ddn.solve(problem, {"x": x}, solver=solver)["u"].reshape(-1), x))
    close(found.reshape(differences.shape), differences, 1e-8)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name != "Linf norm at zero"
        else pytest.param(name, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=UNLIMITED))
        for name in DEPENDENT
    ],
)
def test_dependent_kinks_are_no_boundary_and_no_residual(name):
    s = ddn.solve(dependent(name)[0], {"x": DEPENDENT[name][1]})
    assert s.residuals.stationarity < 1e-9
    assert not s.certificate.one_sided


ISOTROPIC = ddn.Problem(
    {"u": (4, 4)}, {"x": (4, 4)},
    lambda u, x: half_squares(u, x)
    + 0.5 * torch.stack([u[:-1, :-1] - u[1:, :-1], u[:-1, :-1] - u[:-1, 1:]], -1).norm(dim=-1).sum(),
)  # fmt: skip


@pytest.mark.parametrize("solver", CONVEX)
def test_isotropic_total_variation_is_solved_or_refused(solver):
    x = rand(4, 4, seed=1)
    reference = ddn.solve(ISOTROPIC, {"x": x}, solver="cvxpy:CLARABEL").objective
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddn.ConvergenceWarning)
        s = ddn.solve(ISOTROPIC, {"x": x}, solver=solver, policy=ddn.Policy(on_failure="warn"))
    if s.converged:
        close(s.objective, reference)
        assert s.residuals.stationarity < 1e-8


def test_a_point_next_to_the_zero_of_a_norm_is_refused():
    problem = ddn.Problem(
        {"u": (4,)}, {"x": (2,)}, lambda u, x: half_squares(u[:2], x) + torch.linalg.vector_norm(u[:2])
    )
    with pytest.raises(ddn.SensitivityError):
        ddn.sensitivity(problem, {"x": vector(3, 4)}, vector(1e-13, 0, 0, 0))


SQUARE_ROOTS = {
    "sqrt of square": lambda u: u.square().sqrt().sum(),
    "pow of pow": lambda u: (u**2).pow(0.5).sum(),
    "sqrt of product": lambda u: (u * u).sqrt().sum(),
}


@pytest.mark.parametrize("name", SQUARE_ROOTS)
def test_an_absolute_value_written_as_a_root_is_right_or_refused_at_its_kink(name):
    zero = torch.zeros(3, dtype=D)
    try:
        found = ddn.sensitivity(three(SQUARE_ROOTS[name]), {"x": zero}, zero)
    except ddn.SensitivityError:
        return
    assert not found.certificate.ok or not found.jacobian().any()


def test_pairwise_distance_with_its_own_eps():
    problem = three(lambda u: F.pairwise_distance(u[None], torch.zeros(1, 3, dtype=D), eps=0.0).sum())
    x = vector(1, 2, 2)
    close(ddn.solve(problem, {"x": x})["u"], x * 2 / 3)


ORIGIN = torch.zeros(3, dtype=D)
BENDS = {
    # phi, x, u: the second derivative of phi jumps exactly there
    "huber_loss": (lambda u: F.huber_loss(u, ORIGIN, reduction="sum"), vector(2, 0.5, 9), vector(1, 0.25, 8)),
    "smooth_l1_loss": (lambda u: F.smooth_l1_loss(u, ORIGIN, reduction="sum"), vector(2, 0.5, 9), vector(1, 0.25, 8)),
    "elu": (lambda u: F.elu(u).sum(), vector(1, 3, 4), vector(0, 2, 3)),
}  # fmt: skip


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="these bends have no rows: ok, two-sided; huber_loss gives 4/7, neither 1/2 nor 1",
)
@pytest.mark.parametrize("name", BENDS)
def test_bends_of_other_operations_are_one_sided(name):
    phi, x, u = BENDS[name]
    problem = three(phi)
    found = ddn.sensitivity(problem, {"x": x}, u)
    assert found.certificate.one_sided
    assert not found.certificate.ok


def test_kinks_that_cancel_are_smooth():
    """The 'fair' loss |u| - log(1 + |u|) has the second derivative 1 / (1 + |u|)^2."""
    zero = torch.zeros(3, dtype=D)
    found = ddn.sensitivity(three(lambda u: (u.abs() - u.abs().log1p()).sum()), {"x": zero}, zero)
    close(found.jacobian(), EYE / 2)


OVERLAPPING = ddn.Problem(
    {"u": (6,)}, {"x": (6,)},
    lambda u, x: half_squares(u, x) + 3 * u.reshape(2, 3).norm(dim=1).sum() + 0.5 * u[:3].norm(),
    inequality=lambda u: u.abs().amax() - 2,
)  # fmt: skip


@pytest.mark.parametrize("solver", ["scipy:SLSQP", "casadi:ipopt"])
def test_overlapping_norms_that_vanish_together(solver):
    x = vector(1.4, 1.3, 0.5, -0.8, -1.1, -0.2).requires_grad_()
    s = ddn.solve(OVERLAPPING, {"x": x}, solver=solver)
    close(s["u"], torch.zeros(6, dtype=D))
    assert s.residuals.stationarity < 1e-8
    found, _ = quietly(lambda: jacobian(s["u"], x))
    close(found, torch.zeros(6, 6, dtype=D))


SPARSE_GROUPS = ddn.Problem(
    {"u": (4,)}, {"x": (4,), "M": (4, 4)},
    lambda u, x, M: half_squares(u, x) + 3 * u.reshape(2, 2).norm(dim=1).sum() + u.abs().sum()
    + 3 * torch.logsumexp(M @ u, 0),
)  # fmt: skip


@pytest.mark.parametrize("solver", CONVEX)
def test_sparse_group_lasso_with_a_nonlinear_loss(solver):
    """The convex problem's minimum: no lower value in any of many directions around it."""
    p = {"x": 1.5 * rand(4, seed=271340), "M": rand(4, 4, seed=271337)}
    s = ddn.solve(SPARSE_GROUPS, p, solver=solver)
    around = s["u"] + 1e-4 * rand(50, 4, seed=34)
    values = torch.func.vmap(lambda u: SPARSE_GROUPS.objective(u, **p))(around)
    assert (values >= s.objective).all()
    assert s.residuals.stationarity < 1e-8


@pytest.mark.parametrize("choice", ["manifold", "clarke"])
def test_a_failed_sample_does_not_touch_the_degenerate_one_beside_it(choice):
    """Kinks written twice share their force alone or beside a sample that is not finite; Clarke's choice too."""
    problem = ddn.Problem(
        {"u": (2,)}, {"x": (2,), "a": ()},
        lambda u, x, a: half_squares(u, x) + 0.4 * u.abs().sum() + 0.01 * u.abs().sum() + torch.log(a),
    )  # fmt: skip
    policy = ddn.Policy(on_failure="mask", nonsmooth=choice)
    x = torch.tensor([[3.0, 0.3], [3.0, 0.3]], dtype=D, requires_grad=True)
    s = ddn.solve(
        problem, {"x": x, "a": torch.tensor([1.0, -1.0], dtype=D)}, solver="casadi:ipopt", policy=policy
    )
    alone = x[:1].detach().clone().requires_grad_()
    reference = ddn.solve(problem, {"x": alone, "a": number(1.0)}, solver="casadi:ipopt", policy=policy)
    assert s.converged.tolist() == [True, False]
    close(s["u"][0], reference["u"][0], 1e-12)
    assert s.certificate.one_sided[0] == reference.certificate.one_sided[0]
    found, expected = (
        quietly(lambda t=t, p=p: torch.autograd.grad(t[0].sum(), p)[0][0])[0]
        for t, p in ((s["u"], x), (reference["u"], alone))
    )
    close(found, expected, 1e-12)
