"""Input that peers answer with a plausible number: here a right answer or a named error, before any solver runs."""

import pickle
import random

import numpy as np
import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
X = torch.tensor([1.5, -2.0, 0.25], dtype=D)
INF, NAN = float("inf"), float("nan")


def distance(u, x):
    return (u - x).square().sum()


def problem(objective=distance, **fields):
    return ddn.Problem({"u": (3,)}, {"x": (3,)}, objective, **fields)


# -- parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (X.to("meta"), "no numbers"),
        (X.to_sparse(), "not dense.*to_dense"),
        (X.to(torch.complex128), "dtype"),
        (X.long(), "dtype"),
        (X.bool(), "dtype"),
        ([1.0, 2.0, 3.0], "not a tensor"),
        ("1, 2, 3", "not a tensor"),
        (None, "not a tensor"),
        (X[:2], "shape"),
        (X * NAN, "not finite"),
        (X * INF, "not finite"),
    ],
    ids=str,
)
def test_a_parameter_that_cannot_be_solved_for_is_named(value, named):
    with pytest.raises(ddn.ProblemError, match=rf"parameter 'x' .*{named}"):
        ddn.solve(problem(), {"x": value})


def test_an_empty_parameter_and_an_empty_batch():
    extended = ddn.Problem(
        {"u": (3,)}, {"x": (3,), "none": (0,)}, lambda u, x, none: distance(u, x) + none.sum()
    )
    x, none = X.clone().requires_grad_(), torch.zeros(0, dtype=D, requires_grad=True)
    u = ddn.solve(extended, {"x": x, "none": none})["u"]
    gradients = torch.autograd.grad(u.sum(), (x, none))
    assert torch.allclose(gradients[0], torch.ones(3, dtype=D))
    assert gradients[1].shape == (0,)
    x = torch.zeros(0, 3, dtype=D, requires_grad=True)
    u = ddn.solve(problem(), {"x": x})["u"]
    assert torch.autograd.grad(u.sum(), x)[0].shape == u.shape == (0, 3)


@pytest.mark.parametrize("solver", ["auto", "scipy:SLSQP", "casadi:ipopt", "cvxpy:CLARABEL"])
@pytest.mark.parametrize("power", [6, 9, 12])
def test_huge_numbers(power, solver):
    """The projection of X on sum u = 0, u <= 0.5, times 10^power."""
    scale = 10.0**power
    whole = problem(equality={"sum": lambda u: u.sum()}, bounds={"u": (None, 0.5 * scale)})
    x = (X * scale).requires_grad_()
    u = ddn.solve(whole, {"x": x}, solver=solver)["u"]
    assert torch.allclose(u / scale, torch.tensor([0.5, -1.0, 0.5], dtype=D), rtol=0, atol=1e-12)
    # two variables are at their bound: the third is what the equality leaves, whatever x
    assert torch.autograd.grad(u @ X, x)[0].abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1e-300, 1e-310], ids=["tiny", "denormal"])
def test_tiny_numbers_without_constraints(scale):
    x = (X * scale).requires_grad_()
    u = ddn.solve(problem(), {"x": x})["u"]
    torch.testing.assert_close(u, x, rtol=1e-15, atol=0)
    assert torch.equal(torch.autograd.grad(u.sum(), x)[0], torch.ones(3, dtype=D))


def test_an_overflow_is_a_failure():
    with pytest.raises(ddn.SolveError, match="not finite"):
        ddn.solve(problem(), {"x": X * 1e300})


def in_a_branch(u, M, b):
    return (u - torch.linalg.solve(M, b)).square().sum() if b[0] < 100 else u.sum()


SINGULAR = {
    "solve": lambda u, M, b: (u - torch.linalg.solve(M, b)).square().sum(),
    "inv": lambda u, M, b: (u - torch.linalg.inv(M) @ b).square().sum() + u.exp().sum(),
    "log": lambda u, M, b: (u - M[0, 0].log() * b).exp().sum() + u.square().sum(),
}


@pytest.mark.parametrize(
    "solver", ["auto", "scipy:SLSQP", "casadi:ipopt", "casadi:sqpmethod", "cvxpy:CLARABEL"]
)
@pytest.mark.parametrize("name", SINGULAR)
def test_a_singular_matrix_fails_its_sample_alone(name, solver):
    one = ddn.Problem({"u": (2,)}, {"M": (2, 2), "b": (2,)}, SINGULAR[name])
    regular = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=D)
    M = torch.stack([regular, torch.zeros(2, 2, dtype=D), torch.eye(2, dtype=D)]).requires_grad_()
    b = torch.ones(2, dtype=D, requires_grad=True)
    s = ddn.solve(one, {"M": M, "b": b}, solver, policy=ddn.Policy("mask"))
    assert [status.name for status in s.status] == ["OPTIMAL", "NUMERICAL_ERROR", "OPTIMAL"]
    by_M, by_b = torch.autograd.grad(s["u"].sum(), (M, b))
    good = ddn.solve(one, {"M": M[[0, 2]], "b": b}, solver)
    of_good = torch.autograd.grad(good["u"].sum(), (M, b))
    torch.testing.assert_close(s["u"][[0, 2]], good["u"], rtol=0, atol=1e-9)
    torch.testing.assert_close(by_M, of_good[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(by_b, of_good[1], rtol=0, atol=1e-9)
    with pytest.raises(ddn.SolveError, match="sample 1: numerical error"):
        ddn.solve(one, {"M": M, "b": b}, solver)


def test_a_singular_matrix_in_a_function_that_only_torch_evaluates_fails_its_sample_alone():
    one = ddn.Problem({"u": (2,)}, {"M": (2, 2), "b": (2,)}, in_a_branch)
    M = torch.stack([torch.eye(2, dtype=D), torch.zeros(2, 2, dtype=D)])
    with pytest.warns(ddn.FallbackWarning):
        s = ddn.solve(one, {"M": M, "b": torch.ones(2, dtype=D)}, policy=ddn.Policy("mask"))
    assert s.converged.tolist() == [True, False]
    torch.testing.assert_close(s["u"][0], torch.ones(2, dtype=D), rtol=0, atol=1e-9)


def test_a_determinant_is_a_constraint_from_a_singular_start():
    """The closest matrix of determinant one to a I is I, whatever a; zero, where a solver starts, is singular."""
    whole = ddn.Problem(
        {"U": (2, 2)},
        {"M": (2, 2)},
        lambda U, M: (U - M).square().sum(),
        equality=lambda U: torch.linalg.det(U) - 1,
    )
    M = (1.5 * torch.eye(2, dtype=D)).requires_grad_()
    s = ddn.solve(whole, {"M": M})
    torch.testing.assert_close(s["U"], torch.eye(2, dtype=D), rtol=0, atol=1e-8)
    assert torch.autograd.grad(s["U"].trace(), M)[0].trace().abs() < 1e-8


# -- functions -----------------------------------------------------------------------------------------


def changes_its_argument(u, x):
    x.mul_(2)
    return distance(u, x)


def draws_from_python(u, x):
    return distance(u, x * random.random())


def draws_from_numpy(u, x):
    return distance(u, x * np.random.rand())  # noqa: NPY002  # what users do


def draws_an_array(u, x):
    return distance(u, x * torch.from_numpy(np.random.rand(3)))  # noqa: NPY002  # what users do


@pytest.mark.parametrize(
    ("objective", "error", "named"),
    [
        (changes_its_argument, ddn.TraceError, "'x' in place"),
        (draws_from_python, ddn.TraceError, "random numbers"),
        (draws_from_numpy, ddn.TraceError, "random numbers"),
        (draws_an_array, ddn.TraceError, "random numbers"),
        (lambda u, x: 1.0, ddn.ProblemError, "does not return a tensor"),
        (lambda u, x: u - x, ddn.ProblemError, "scalar"),
    ],
    ids=["mutates", "random", "numpy.random", "array", "number", "vector"],
)
def test_a_function_without_a_value_is_refused(objective, error, named):
    with pytest.raises(error, match=named):
        ddn.solve(problem(objective), {"x": X})


def test_a_function_may_seed_what_it_draws():
    def weighted(u, x):
        random.seed(0)
        return distance(u, x * random.random())

    u = ddn.solve(problem(weighted), {"x": X})["u"]
    assert torch.allclose(u, X * random.Random(0).random())


@pytest.mark.filterwarnings("ignore::ddn_solvers.FallbackWarning")
def test_a_shape_that_depends_on_the_values_is_named():
    def varying(u, x):
        return u if x.sum() > 0 else u[:2]

    with pytest.raises(ddn.ProblemError, match=r"inequality\['inequality0'\].*another shape.*\(2,\).*\(3,\)"):
        ddn.solve(
            problem(inequality=[varying]), {"x": torch.stack([X.abs(), -X.abs()])}, solver="scipy:SLSQP"
        )


# -- constraints ---------------------------------------------------------------------------------------


def test_bounds_that_contradict_fail_their_sample_alone():
    bounded = problem(bounds={"u": ("x", 1.0)})
    x = torch.stack([X, X.clamp(max=0.5)]).requires_grad_()
    with pytest.raises(ddn.SolveError, match=r"sample 0: infeasible \(the bounds of u\[0\] contradict"):
        ddn.solve(bounded, {"x": x})
    s = ddn.solve(bounded, {"x": x}, policy=ddn.Policy("mask"))
    assert s.converged.tolist() == [False, True]
    assert torch.allclose(s["u"][1], x[1])


def test_a_constraint_said_twice():
    twice = problem(equality={"a": lambda u: u.sum(), "b": lambda u: 2 * u.sum()})
    x = X.clone().requires_grad_()
    u = ddn.solve(twice, {"x": x})["u"]
    with pytest.warns(ddn.DegeneracyWarning):
        (gradient,) = torch.autograd.grad(u[0], x)
    assert torch.allclose(u, X - X.mean())
    assert torch.allclose(gradient, torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=D), atol=1e-12)


# -- from_dict -----------------------------------------------------------------------------------------

HOSTILE = {
    "code as a shape": {"variables": {"u": "__import__('os').system('true')"}},
    "code as a name": {"variables": {"__import__('os')": (3,)}},
    "code as an objective": {"variables": {"u": (3,)}, "objective": "u.sum()"},
    "code as a bound": {"variables": {"u": (3,)}, "bounds": {"u": ("eval('1')", None)}},
    "a pickle": {"variables": {"u": (3,)}, "equality": {"a": pickle.dumps(print)}},
    "a class": {"variables": {"u": (3,)}, "__class__": "os.system"},
    "a negative size": {"variables": {"u": (-1,)}},
    "a size that is no number": {"variables": {"u": (NAN,)}},
    "a size that is a bool": {"variables": {"u": (True,)}},
    "a name that is no string": {"variables": {3: (1,)}},
    "a field that is no string": {1: 2},
    "a name of ours": {"variables": {"self": (3,)}},
    "a dotted name": {"variables": {"u": (3,)}, "inequality": {"a.b": lambda u: u}},
    "a name twice": {"variables": {"u": (3,)}, "parameters": {"u": (3,)}},
    "a bound that is NaN": {"variables": {"u": (3,)}, "bounds": {"u": (NAN, None)}},
    "a bound that nothing meets": {"variables": {"u": (3,)}, "bounds": {"u": (INF, None)}},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("entry", [ddn.Problem.from_dict, ddn.solve, ddn.DeclarativeLayer])
def test_a_hostile_dict_raises(entry, fields):
    with pytest.raises(ddn.ProblemError):
        entry(fields)


def test_a_function_that_changes_what_it_captures_is_named():
    offset, calls, cache = torch.zeros(2, dtype=torch.float64), [0], {}

    def drifts(u, x):
        offset.add_(1.0)
        return (u - x - offset).square().sum()

    def counts(u, x):
        calls[0] += 1
        return (u - calls[0] * x).square().sum()

    for function, name in ((drifts, "offset"), (counts, r"calls\[0\]")):
        with pytest.raises(ddn.TraceError, match=rf"change what they capture \({name}\)"):
            ddn.solve(
                ddn.Problem({"u": (2,)}, {"x": (2,)}, function), {"x": torch.ones(2, dtype=torch.float64)}
            )

    def remembers(u, x):  # harmless, and so is a count that nothing depends on
        calls[0] += 1
        return (u - x).square().sum() * cache.setdefault("two", 2.0)

    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, remembers)
    for _ in range(2):
        solution = ddn.solve(problem, {"x": torch.ones(2, dtype=torch.float64)})
        assert torch.allclose(solution["u"], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "clarabel"])
def test_a_coefficient_that_is_infinite_fails_its_sample_without_a_warning(solver: str) -> None:
    """log(0) of a parameter in the matrices of a QP."""
    problem = ddn.Problem(
        {"u": (2,)}, {"x": (2,)}, lambda u, x: (u * x.log()).square().sum(), bounds={"u": (0, 1)}
    )
    x = torch.tensor([[0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    solution = ddn.solve(problem, {"x": x}, solver=solver, policy=ddn.Policy(on_failure="mask"))
    assert solution.status == (ddn.Status.NUMERICAL_ERROR, ddn.Status.OPTIMAL)
