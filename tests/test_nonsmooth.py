"""Kinks: with `nonsmooth="manifold"` one that the solution sits on acts as an active equality.

Every reference is a closed form or a dense system of the pattern that the solution has (which entries vanish, tie,
or lie on the margin), written out in torch; the pattern is that of the reference, never the library's.
"""

import math
import warnings
from dataclasses import dataclass, field
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
    found = torch.autograd.grad((output * v).sum(), list(ours.values()))
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
        free, bound = (free & ~moved) | wrong, torch.where(wrong, 0.0, torch.where(moved, z.sign() * w.detach(), bound))
    else:
        raise AssertionError("the dual did not settle")
    z = torch.where(free, 0.0, bound.sign()) * w
    inside = torch.linalg.solve(difference[free] @ difference[free].T, difference[free] @ (x - difference.T @ z))
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
    problem: ddn.Problem = None

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
