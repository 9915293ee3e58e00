"""Problems with known answers.

Answers are closed forms, or problems built around a KKT point: choose u*, nu, lambda >= 0 and slacks,
then solve stationarity for the linear term and the constraints for their right-hand sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ddn_solvers.problem import Problem
from ddn_solvers.solution import DualSolution, Status

Tensors = Mapping[str, torch.Tensor]

_SOLVED = frozenset({Status.OPTIMAL})
# What a backend may call a problem without a solution; some cannot tell the two kinds apart.
_HOPELESS = frozenset(
    {
        Status.INFEASIBLE,
        Status.UNBOUNDED,
        Status.ITERATION_LIMIT,
        Status.NUMERICAL_ERROR,
        Status.BACKEND_ERROR,
    }
)


@dataclass(frozen=True, eq=False)
class Case:
    """A problem, numbers for its parameters, and its answer.

    Attributes:
        name: Unique in ``CASES``.
        problem: The declaration.
        parameters: Values; leading dimensions are batch dimensions, broadcast against each other.
        primal: The solution by variable, (*batch, *shape); ``None`` where there is none.
        dual: Its multipliers, or ``None`` where they are not unique or there is no solution.
        objective: Value at the solution, (*batch,).
        initial: Where to start, by variable, for problems whose answer depends on it.
        statuses: Statuses that a backend may return.
        tags: ``"LP"``, ``"QP"``, ``"NLP"``, ``"batch"``, ``"nonconvex"``, ``"nonsmooth"``,
            ``"callbacks"``, ``"infeasible"``, ``"unbounded"``.
    """

    name: str
    problem: Problem
    parameters: Tensors
    primal: Tensors | None = None
    dual: DualSolution | None = None
    objective: torch.Tensor | None = None
    initial: Tensors | None = None
    statuses: frozenset[Status] = _SOLVED
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def solvable(self) -> bool:
        return self.primal is not None

    def __repr__(self) -> str:
        return f"Case({self.name!r})"


def case(name: str) -> Case:
    """The case of ``CASES`` with that name."""
    return next(c for c in CASES if c.name == name)


def _t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _s(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _dual(
    equality: Tensors | None = None,
    inequality: Tensors | None = None,
    lower: Tensors | None = None,
    upper: Tensors | None = None,
) -> DualSolution:
    """Bounds that are not named have no multiplier other than zero."""
    return DualSolution(equality or {}, inequality or {}, lower or {}, upper or {})


def _half_square_distance(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (u - x).square().sum()


# -- linear and quadratic programs ----------------------------------------------------------------


def _lp_vertex() -> Case:
    """Two rows meet at (3, 1); c + G^T (1/2, 1/2) = 0."""

    def objective(u: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return c @ u

    def capacity(u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.stack([u[0] + u[1], u[0] + 3 * u[1]]) - h

    return Case(
        "lp_vertex",
        Problem(
            variables={"u": (2,)},
            parameters={"c": (2,), "h": (2,)},
            objective=objective,
            inequality={"capacity": capacity},
            bounds={"u": (0.0, None)},
        ),
        {"c": _t(-1.0, -2.0), "h": _t(4.0, 6.0)},
        {"u": _t(3.0, 1.0)},
        _dual(inequality={"capacity": _t(0.5, 0.5)}),
        _s(-5.0),
        tags=frozenset({"LP"}),
    )


def _qp_equality() -> Case:
    """u = x - nu, nu = (sum x - s) / n."""

    def total(u: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return u.sum() - s

    x, s = _t(1.0, -2.0, 3.0, 0.5), _s(1.0)
    nu = (x.sum() - s) / 4
    return Case(
        "qp_equality",
        Problem(
            variables={"u": (4,)},
            parameters={"x": (4,), "s": ()},
            objective=_half_square_distance,
            equality={"total": total},
        ),
        {"x": x, "s": s},
        {"u": x - nu},
        _dual(equality={"total": nu}),
        2 * nu**2,
        tags=frozenset({"QP"}),
    )


def _qp_mixed() -> Case:
    """One active and one inactive row, an active lower and an active upper bound."""

    def budget(u: torch.Tensor) -> torch.Tensor:
        return u[0] + u[1] - 1

    def loose(u: torch.Tensor) -> torch.Tensor:
        return u[2] - 5

    return Case(
        "qp_mixed",
        Problem(
            variables={"u": (5,)},
            parameters={"x": (5,)},
            objective=_half_square_distance,
            inequality={"budget": budget, "loose": loose},
            bounds={"u": (0.0, 3.0)},
        ),
        {"x": _t(2.0, 1.4, 1.0, -1.0, 9.0)},
        {"u": _t(0.8, 0.2, 1.0, 0.0, 3.0)},
        _dual(
            inequality={"budget": _s(1.2), "loose": _s(0.0)},
            lower={"u": _t(0.0, 0.0, 0.0, 1.0, 0.0)},
            upper={"u": _t(0.0, 0.0, 0.0, 0.0, 6.0)},
        ),
        _s(0.5 * (1.2**2 + 1.2**2 + 1.0 + 36.0)),
        tags=frozenset({"QP"}),
    )


def _simplex() -> Case:
    """u = max(x - nu, 0) with nu such that it sums to one (Held, Wolfe and Crowder, 1974)."""

    def total(u: torch.Tensor) -> torch.Tensor:
        return u.sum() - 1

    n = 20
    x = 0.4 * torch.sin(3.7 * torch.arange(n, dtype=torch.float64))
    ordered = x.sort(descending=True).values
    candidates = (ordered.cumsum(0) - 1) / torch.arange(1, n + 1)
    nu = candidates[int((ordered > candidates).sum()) - 1]
    u = (x - nu).clamp(min=0)
    return Case(
        "simplex",
        Problem(
            variables={"u": (n,)},
            parameters={"x": (n,)},
            objective=_half_square_distance,
            equality={"total": total},
            bounds={"u": (0.0, None)},
        ),
        {"x": x},
        {"u": u},
        _dual(equality={"total": nu}, lower={"u": (nu - x).clamp(min=0)}),
        _half_square_distance(u, x),
        tags=frozenset({"QP"}),
    )


def _box_qp() -> Case:
    """A dense convex quadratic in a box of parameters, built around its KKT point."""

    def objective(u: torch.Tensor, P: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return 0.5 * u @ P @ u + q @ u

    n = 8
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(n, n, dtype=torch.float64, generator=generator)
    P = root @ root.T / n + torch.eye(n, dtype=torch.float64)
    lo, hi = -torch.ones(n, dtype=torch.float64), torch.linspace(1, 2, n, dtype=torch.float64)
    u = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    lower, upper = torch.zeros_like(u), torch.zeros_like(u)
    u[:3], lower[:3] = lo[:3], _t(0.5, 1.0, 2.0)
    u[3:5], upper[3:5] = hi[3:5], _t(0.7, 1.5)
    q = -P @ u + lower - upper
    return Case(
        "box_qp",
        Problem(
            variables={"u": (n,)},
            parameters={"P": (n, n), "q": (n,), "lo": (n,), "hi": (n,)},
            objective=objective,
            bounds={"u": ("lo", "hi")},
        ),
        {"P": P, "q": q, "lo": lo, "hi": hi},
        {"u": u},
        _dual(lower={"u": lower}, upper={"u": upper}),
        objective(u, P, q),
        tags=frozenset({"QP"}),
    )


def _least_squares() -> Case:
    """u = (A^T A)^-1 A^T b."""

    def objective(u: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (A @ u - b).square().sum()

    generator = torch.Generator().manual_seed(2)
    A = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    b = torch.randn(12, dtype=torch.float64, generator=generator)
    u = torch.linalg.solve(A.T @ A, A.T @ b)
    return Case(
        "least_squares",
        Problem(variables={"u": (5,)}, parameters={"A": (12, 5), "b": (12,)}, objective=objective),
        {"A": A, "b": b},
        {"u": u},
        _dual(),
        objective(u, A, b),
        tags=frozenset({"QP"}),
    )


def _shapes() -> Case:
    """A matrix, a vector and a scalar: the rows of M sum to s, v <= t elementwise."""

    def objective(
        M: torch.Tensor, v: torch.Tensor, t: torch.Tensor, X: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        return 0.5 * ((M - X).square().sum() + (v - y).square().sum() + (t - 1).square())

    def rows(M: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return M.sum(dim=1) - s

    def ordered(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return v - t

    X, s = _t(1.0, -2.0, 0.5, 3.0, 1.0, -1.0).reshape(2, 3), _t(1.0, -2.0)
    nu = (X.sum(dim=1) - s) / 3
    M, v, t, y = X - nu[:, None], _t(1.5, 0.5, -1.0), _s(1.5), _t(2.0, 0.5, -1.0)
    return Case(
        "shapes",
        Problem(
            variables={"M": (2, 3), "v": (3,), "t": ()},
            parameters={"X": (2, 3), "y": (3,), "s": (2,)},
            objective=objective,
            equality={"rows": rows},
            inequality={"ordered": ordered},
        ),
        {"X": X, "y": y, "s": s},
        {"M": M, "v": v, "t": t},
        _dual(equality={"rows": nu}, inequality={"ordered": _t(0.5, 0.0, 0.0)}),
        objective(M, v, t, X, y),
        tags=frozenset({"QP"}),
    )


def _fixed() -> Case:
    """Coinciding bounds fix u_0; infinite entries are no bounds."""
    inf = float("inf")
    x = _t(3.0, 5.0, -2.0, 0.7)
    u = _t(1.0, 2.0, 0.0, 0.7)
    return Case(
        "fixed",
        Problem(
            variables={"u": (4,)},
            parameters={"x": (4,)},
            objective=_half_square_distance,
            bounds={"u": (_t(1.0, -inf, 0.0, -inf), _t(1.0, 2.0, inf, inf))},
        ),
        {"x": x},
        {"u": u},
        _dual(lower={"u": _t(0.0, 0.0, 2.0, 0.0)}, upper={"u": _t(2.0, 3.0, 0.0, 0.0)}),
        _half_square_distance(u, x),
        tags=frozenset({"QP"}),
    )


def random_qp(n: int, equalities: int, inequalities: int, seed: int, batch: tuple[int, ...] = ()) -> Case:
    """A strictly convex QP of known solution, all of P, q, A, b, G, h being parameters.

        min 1/2 u^T P u + q^T u   s.t.   A u = b,  G u <= h

    Strictly complementary: about half of the rows of G (and of what A leaves free) are active; active
    multipliers and inactive slacks lie in [0.5, 1.5].

    Args:
        n: Variables.
        equalities: Rows of A, at most n; without any there are no A and b.
        inequalities: Rows of G; without any there are no G and h.
        seed: Of the generator.
        batch: Leading dimensions of every parameter; samples are independent.
    """

    def objective(u: torch.Tensor, P: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return 0.5 * u @ P @ u + q @ u

    def balance(u: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return A @ u - b

    def limit(u: torch.Tensor, G: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return G @ u - h

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, dtype=torch.float64, generator=generator)

    def margin(*shape: int) -> torch.Tensor:
        return 0.5 + torch.rand(*batch, *shape, dtype=torch.float64, generator=generator)

    u, root = normal(n), normal(n, n)
    P = root @ root.mT / n + 0.5 * torch.eye(n, dtype=torch.float64)
    A, G = normal(equalities, n), normal(inequalities, n)
    active = torch.zeros(inequalities, dtype=torch.bool)
    active[: min((inequalities + 1) // 2, (n - equalities + 1) // 2)] = True
    nu, multiplier, slack = normal(equalities), margin(inequalities) * active, margin(inequalities) * ~active

    def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return (matrix @ vector[..., None])[..., 0]

    q = -(times(P, u) + times(A.mT, nu) + times(G.mT, multiplier))
    parameters = {"P": P, "q": q}
    if equalities:
        parameters |= {"A": A, "b": times(A, u)}
    if inequalities:
        parameters |= {"G": G, "h": times(G, u) + slack}
    return Case(
        f"random_qp_{n}_{equalities}_{inequalities}_{seed}",
        Problem(
            variables={"u": (n,)},
            parameters={name: tuple(value.shape[len(batch) :]) for name, value in parameters.items()},
            objective=objective,
            equality={"balance": balance} if equalities else None,
            inequality={"limit": limit} if inequalities else None,
        ),
        parameters,
        {"u": u},
        _dual({"balance": nu} if equalities else None, {"limit": multiplier} if inequalities else None),
        (u * (0.5 * times(P, u) + q)).sum(-1),
        tags=frozenset({"QP", "batch"} if batch else {"QP"}),
    )


# -- nonlinear problems -----------------------------------------------------------------------------


def _sphere() -> Case:
    """u = x / |x|, nu = (|x| - 1) / 2."""

    def norm(u: torch.Tensor) -> torch.Tensor:
        return u.square().sum() - 1

    n = 20
    x = torch.linspace(-1, 2, n, dtype=torch.float64)
    u = x / x.norm()
    return Case(
        "sphere",
        Problem(
            variables={"u": (n,)},
            parameters={"x": (n,)},
            objective=_half_square_distance,
            equality={"norm": norm},
        ),
        {"x": x},
        {"u": u},
        _dual(equality={"norm": (x.norm() - 1) / 2}),
        _half_square_distance(u, x),
        initial={"u": torch.full((n,), 0.2, dtype=torch.float64)},  # at zero the constraint has no gradient
        tags=frozenset({"NLP", "nonconvex"}),
    )


def _exponential() -> Case:
    """Built around a KKT point whose Lagrangian is convex: the solution is global and unique."""

    def objective(u: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return u.exp().sum() - q @ u

    def shell(u: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        return u.square().sum() - R

    def ball(u: torch.Tensor, c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return (u - c).square().sum() - r**2

    n = 25
    u = 0.8 * torch.cos(1.3 * torch.arange(n, dtype=torch.float64))
    c = 0.5 * torch.sin(0.7 * torch.arange(n, dtype=torch.float64))
    nu, multiplier = _s(0.6), _s(0.9)
    q = u.exp() + 2 * nu * u + 2 * multiplier * (u - c)
    return Case(
        "exponential",
        Problem(
            variables={"u": (n,)},
            parameters={"q": (n,), "R": (), "c": (n,), "r": ()},
            objective=objective,
            equality={"shell": shell},
            inequality={"ball": ball},
        ),
        {"q": q, "R": u.square().sum(), "c": c, "r": (u - c).norm()},
        {"u": u},
        _dual(equality={"shell": nu}, inequality={"ball": multiplier}),
        objective(u, q),
        initial={"u": torch.full((n,), 0.3, dtype=torch.float64)},
        tags=frozenset({"NLP", "nonconvex"}),
    )


def _rosenbrock() -> Case:
    """The bound a <= 1/2 cuts the valley: (a, b) = (1/2, 1/4), its multiplier 2 (1 - a) = 1."""

    def objective(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (1 - a).square() + w * (b - a.square()).square()

    return Case(
        "rosenbrock",
        Problem(
            variables={"a": (), "b": ()},
            parameters={"w": ()},
            objective=objective,
            bounds={"a": (None, 0.5)},
        ),
        {"w": _s(100.0)},
        {"a": _s(0.5), "b": _s(0.25)},
        _dual(upper={"a": _s(1.0)}),
        _s(0.25),
        tags=frozenset({"NLP", "nonconvex"}),
    )


def _entropy() -> Case:
    """u = softmax(x), nu = logsumexp(x) - 1."""

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (u * u.log()).sum() - x @ u

    def total(u: torch.Tensor) -> torch.Tensor:
        return u.sum() - 1

    x = _t(0.3, -1.0, 2.0, 0.0, 1.1, -0.4)
    return Case(
        "entropy",
        Problem(
            variables={"u": (6,)},
            parameters={"x": (6,)},
            objective=objective,
            equality={"total": total},
            bounds={"u": (1e-6, None)},
        ),
        {"x": x},
        {"u": x.softmax(0)},
        _dual(equality={"total": x.logsumexp(0) - 1}),
        -x.logsumexp(0),
        initial={"u": torch.full((6,), 1 / 6, dtype=torch.float64)},
        tags=frozenset({"NLP"}),
    )


def _ball_batch() -> Case:
    """With y = x - mean x: u = y min(1, r / |y|), nu = mean x, lambda = max(|y| / r - 1, 0) / 2."""

    def plane(u: torch.Tensor) -> torch.Tensor:
        return u.sum()

    def ball(u: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return u.square().sum() - r**2

    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(2, 3, 3, dtype=torch.float64, generator=generator)
    r = _t(0.5, 1.0, 4.0)  # (3,): broadcast over the first dimension
    nu = x.mean(-1)
    y = x - nu[..., None]
    stretch = y.norm(dim=-1) / r
    u = y / stretch.clamp(min=1)[..., None]
    return Case(
        "ball_batch",
        Problem(
            variables={"u": (3,)},
            parameters={"x": (3,), "r": ()},
            objective=_half_square_distance,
            equality={"plane": plane},
            inequality={"ball": ball},
        ),
        {"x": x, "r": r},
        {"u": u},
        _dual(equality={"plane": nu}, inequality={"ball": (stretch - 1).clamp(min=0) / 2}),
        0.5 * (u - x).square().sum(-1),
        tags=frozenset({"NLP", "batch"}),
    )


def _scalar() -> Case:
    """u = log x."""

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return u.exp() - x * u

    x = _s(2.5)
    return Case(
        "scalar",
        Problem(variables={"u": ()}, parameters={"x": ()}, objective=objective),
        {"x": x},
        {"u": x.log()},
        _dual(),
        x - x * x.log(),
        tags=frozenset({"NLP"}),
    )


def _off_kink() -> Case:
    """|u| is smooth where the solution lies: u = x - w sign(x)."""

    def objective(u: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return 0.5 * (u - x).square().sum() + w * u.abs().sum()

    x, w = _t(2.0, 1.5, 3.0, 1.2), _s(0.5)
    return Case(
        "off_kink",
        Problem(variables={"u": (4,)}, parameters={"x": (4,), "w": ()}, objective=objective),
        {"x": x, "w": w},
        {"u": x - w},
        _dual(),
        objective(x - w, x, w),
        initial={"u": torch.ones(4, dtype=torch.float64)},
        tags=frozenset({"NLP", "nonsmooth"}),
    )


def _callbacks() -> Case:
    """``qp_equality`` with a branch on values, which no graph can hold."""

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        distance = 0.5 * (u - x).square().sum()
        return distance if distance > -1.0 else -distance

    def total(u: torch.Tensor) -> torch.Tensor:
        return u.sum() - 1

    x = _t(1.0, -2.0, 3.0, 0.5)
    nu = (x.sum() - 1) / 4
    return Case(
        "callbacks",
        Problem(
            variables={"u": (4,)},
            parameters={"x": (4,)},
            objective=objective,
            equality={"total": total},
            bounds={"u": (-5.0, 5.0)},
        ),
        {"x": x},
        {"u": x - nu},
        _dual(equality={"total": nu}),
        2 * nu**2,
        tags=frozenset({"NLP", "callbacks"}),
    )


# -- problems without a solution --------------------------------------------------------------------


def _first(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (u * x).sum()


def _sum_is_one(u: torch.Tensor) -> torch.Tensor:
    return u.sum() - 1


def _above_two(u: torch.Tensor) -> torch.Tensor:
    return 2 - u.sum()


def _below_one(u: torch.Tensor) -> torch.Tensor:
    return u.sum() - 1


def _no_real_point(u: torch.Tensor) -> torch.Tensor:
    return u.square().sum() + 1


def _difference(u: torch.Tensor) -> torch.Tensor:
    return u[0] - u[1]


def _flat_direction(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * u[0].square() - x[1] * u[1]


def _falls_for_ever(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return u[0].exp() - x[1] * u[1]


def _hopeless(name: str, tags: set[str], objective: Any, **constraints: Any) -> Case:
    problem = Problem(variables={"u": (2,)}, parameters={"x": (2,)}, objective=objective, **constraints)
    return Case(name, problem, {"x": _t(1.0, 2.0)}, statuses=_HOPELESS, tags=frozenset(tags))


CASES: tuple[Case, ...] = (
    _lp_vertex(),
    _qp_equality(),
    _qp_mixed(),
    _simplex(),
    _box_qp(),
    _least_squares(),
    _shapes(),
    _fixed(),
    random_qp(20, 5, 12, seed=0),
    random_qp(6, 2, 4, seed=1, batch=(3,)),
    _sphere(),
    _exponential(),
    _rosenbrock(),
    _entropy(),
    _ball_batch(),
    _scalar(),
    _off_kink(),
    _callbacks(),
    _hopeless("infeasible_lp", {"LP", "infeasible"}, _first, equality=_sum_is_one, bounds={"u": (1.0, None)}),
    _hopeless(
        "infeasible_qp", {"QP", "infeasible"}, _half_square_distance, inequality=[_above_two, _below_one]
    ),
    _hopeless("infeasible_nlp", {"NLP", "infeasible"}, _half_square_distance, inequality=_no_real_point),
    _hopeless("unbounded_lp", {"LP", "unbounded"}, _first, equality=_difference, bounds={"u": (None, 5.0)}),
    _hopeless("unbounded_qp", {"QP", "unbounded"}, _flat_direction, inequality=_difference),
    _hopeless("unbounded_nlp", {"NLP", "unbounded"}, _falls_for_ever, inequality=_difference),
)
