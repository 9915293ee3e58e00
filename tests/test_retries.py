"""What is tried again, from where, and how failures are told."""

import pickle
import time
from dataclasses import replace

import pytest
import torch

import ddn_solvers as ddn

D = torch.float64

# u^4 - 3 u^2 + x u: a maximum near zero, minima near -1.2 and 1.2
TWO_VALLEYS = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: u**4 - 3 * u**2 + x * u)
# Newton's method leaves the far, flat ends of this valley for infinity; from zero it converges.
VALLEY = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: (1 + (u - x).square()).log().sum())
STRIP = ddn.Problem(
    {"u": (2,)},
    {"x": ()},
    lambda u, x: (u - x).square().sum(),
    inequality={"above": lambda u, x: u.sum() - x, "below": lambda u, x: 2 * x - u.sum()},
)


def test_auto_tries_another_start_where_the_first_ends_on_a_maximum():
    x = torch.zeros((), dtype=D, requires_grad=True)
    s = ddn.solve(TWO_VALLEYS, {"x": x})
    assert s.status == (ddn.Status.OPTIMAL,)
    assert s["u"].abs().item() == pytest.approx(1.5**0.5, abs=1e-12)
    assert "another start" in s.stats.message[0]
    assert "not a minimum" in s.stats.message[0]
    (gradient,) = torch.autograd.grad(s["u"], x)
    assert gradient.item() == pytest.approx(-1 / 12, abs=1e-12)  # -1 / f'', f'' = 12 u^2 - 6
    with pytest.raises(ddn.SolveError, match="not a minimum"):  # a solver by name is tried as it is
        ddn.solve(TWO_VALLEYS, {"x": x}, solver="casadi:ipopt")


def test_a_start_that_misleads_is_followed_by_a_fresh_one():
    x = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=D)
    far = torch.tensor([[1e9, -1e9], [0.0, 0.0]], dtype=D)
    s = ddn.solve(VALLEY, {"x": x}, solver="casadi:ipopt", initial=far)
    assert torch.allclose(s["u"], x, rtol=0, atol=1e-9)
    assert s.stats.message[0].startswith("solved by casadi:ipopt from a fresh start, after: ")
    assert s.stats.message[1] == ""


def test_a_warm_start_that_misleads_is_followed_by_a_fresh_one():
    x = torch.tensor([0.3, -0.2], dtype=D)
    lost = ddn.solve(
        VALLEY,
        {"x": torch.tensor([1e9, -1e9], dtype=D)},
        solver="casadi:ipopt",
        initial=torch.tensor([1e9, -1e9], dtype=D),
    )
    s = ddn.solve(VALLEY, {"x": x}, solver="casadi:ipopt", warm_start=lost)
    assert torch.allclose(s["u"], x, rtol=0, atol=1e-9)
    assert "from a fresh start" in s.stats.message[0]


def test_a_maximum_stands_where_the_caller_chose_the_start():
    x, start = torch.zeros((), dtype=D), torch.zeros((), dtype=D)
    for solver in ("auto", "scipy:SLSQP"):
        with pytest.raises(ddn.SolveError, match="not a minimum"):
            ddn.solve(TWO_VALLEYS, {"x": x}, solver=solver, initial=start)


def test_explain_says_where_auto_starts(capsys):
    assert "casadi:ipopt from another start" in ddn.compile(TWO_VALLEYS).explain()
    capsys.readouterr()
    assert "another start" not in ddn.compile(STRIP).explain()  # a QP


def test_the_error_names_every_failing_sample():
    x = torch.tensor([1.0, -1, 2, 3, 4, 5, 6, -2, 7, 8, -1, 9], dtype=D)
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(STRIP, {"x": x})
    message = str(caught.value)
    assert message.startswith("9 of 12 samples have no verified solution: sample 0: infeasible (")
    assert message.endswith("; infeasible too: samples 6, 8-9, 11")
    assert "above" in message
    assert "below" in message
    good = caught.value.solution.converged
    assert torch.equal(good, x < 0)
    assert all(caught.value.solution.stats.message[i] for i in torch.nonzero(~good).flatten())


@pytest.mark.parametrize(
    "solver", ["auto", "casadi:ipopt", "scipy:SLSQP", "scipy:trust-constr", "cvxpy:CLARABEL"]
)
@pytest.mark.parametrize("curvature", [1.0, 1e5])
def test_a_variable_that_runs_off_does_not_hide_the_force_on_it(solver, curvature):
    """Beside curvature times 1e20 squared any force looked like rounding, and u[1] = -1e20 like a solution."""
    problem = ddn.Problem({"u": (2,)}, {}, lambda u: curvature * (u[0] - 1).square() + u[1])
    with pytest.raises(ddn.SolveError, match=r"unbounded|numerical error"):
        ddn.solve(problem, {}, solver=solver)


def test_an_error_and_its_solution_cross_process_borders():
    """Process pools send errors as pickles; one that cannot be made again breaks the pool."""
    x = torch.tensor([-1.0, 1.0], dtype=D, requires_grad=True)
    with pytest.raises(ddn.SolveError) as caught:
        ddn.solve(STRIP, {"x": x})
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert torch.equal(error.solution["u"], caught.value.solution["u"])
    assert error.solution.status == caught.value.solution.status
    assert not error.solution["u"].requires_grad
    assert torch.equal(error.solution.certificate.ok, caught.value.solution.certificate.ok)
    again = ddn.solve(
        STRIP, {"x": x}, warm_start=error.solution.detach(), policy=ddn.Policy(on_failure="mask")
    )
    assert torch.equal(again["u"][0], error.solution["u"][0])


@pytest.mark.parametrize("solver", ["auto", "casadi:ipopt", "scipy:SLSQP"])
def test_a_ray_of_rounding_curvature_has_no_solution(solver):
    """P d = 0 up to rounding, q d < 0: far out every force is less than the rounding of P u, and looked met."""
    g = torch.Generator().manual_seed(0)
    L, d = torch.randn(8, 8, generator=g, dtype=D), torch.randn(8, generator=g, dtype=D)
    off = torch.eye(8, dtype=D) - torch.outer(d, d) / d.square().sum()
    P = off @ (L @ L.T + torch.eye(8, dtype=D)) @ off
    problem = ddn.Problem({"u": (8,)}, {"q": (8,)}, lambda u, q: 0.5 * u @ P @ u + q @ u)
    s = ddn.solve(problem, {"q": P @ d.flip(0) - d}, solver=solver, policy=ddn.Policy(on_failure="mask"))
    assert s.status[0] is not ddn.Status.OPTIMAL


@pytest.mark.parametrize("solver", ["casadi:ipopt", "casadi:sqpmethod", "scipy:SLSQP"])
def test_one_constraint_that_some_variables_do_not_enter(solver):
    """The nonzeros of a sparse matrix of one row came as a row, of which CasADi makes no matrix."""
    problem = ddn.Problem(
        {"u": (2,), "t": ()},
        {"r": ()},
        lambda u, t: (u - 1).square().sum() + t.square() + t.cosh(),
        inequality=lambda u, r: u.square().sum() - r,
    )
    s = ddn.solve(problem, {"r": torch.tensor(0.5, dtype=D)}, solver=solver)
    assert torch.allclose(s["u"], torch.full((2,), 0.5, dtype=D), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["scipy:SLSQP", ["casadi:ipopt", "scipy:SLSQP"]])
def test_the_time_limit_of_a_call_holds_for_all_samples_and_retries_together(solver):
    """A callback that sleeps: each sample takes a good part of the half second that the call has."""

    def slow(u, x):
        time.sleep(0.01)
        return (u - x).cosh().sum() if u.sum() < 1e6 else u.sum()

    problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, slow)
    x = 5 + torch.rand(20, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    policy, options = ddn.Policy(on_failure="mask"), {"call_time_limit": 0.5}
    with pytest.warns(ddn.FallbackWarning):
        solution = ddn.solve(problem, {"x": x}, solver=solver, options=options, policy=policy)
    late = [i for i, s in enumerate(solution.status) if s is ddn.Status.TIME_LIMIT]
    assert late
    assert 19 in late
    assert solution.stats.seconds < 20.0
    assert "time limit of the call" in solution.stats.message[19]
    for i, status in enumerate(solution.status):
        assert status in (ddn.Status.OPTIMAL, ddn.Status.TIME_LIMIT)
        if status is ddn.Status.OPTIMAL:
            assert torch.allclose(solution["u"][i], x[i], rtol=0, atol=1e-8)


@pytest.mark.parametrize("on_failure", ["nan", "mask"])
def test_a_layer_goes_back_to_the_last_good_point_of_a_sample(on_failure):
    layer = ddn.DeclarativeLayer(
        VALLEY, "casadi:ipopt", policy=ddn.Policy(on_failure=on_failure), warm_start=True
    )
    first = layer.solve(torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=D))
    layer.options = {"max_iter": 1}
    second = layer.solve(torch.tensor([[0.3, -0.2], [9.5, 8.0]], dtype=D))
    assert second.converged.tolist() == [True, False]
    kept = layer._previous["u"]
    assert torch.equal(kept[0], second["u"][0])
    assert torch.equal(kept[1], first["u"][1])


def test_auto_goes_on_from_a_warm_start_by_newton_steps_where_they_reach_a_minimum() -> None:
    """Nearby parameters need no backend; point and gradient are those of a cold call."""
    x = torch.linspace(0.2, 1.2, 20, dtype=D).expand(3, 20).clone()

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (u - x).exp().sum() + 0.5 * u.square().sum()

    problem = ddn.Problem({"u": (20,)}, {"x": (20,)}, objective, inequality=lambda u: u.square().sum() - 0.5)
    first = ddn.solve(problem, {"x": x})
    moved = (x + 0.02 * x.cos()).requires_grad_()
    warm, cold = ddn.solve(problem, {"x": moved}, warm_start=first), ddn.solve(problem, {"x": moved})
    assert warm.stats.method == ("newton",) * 3
    assert "newton" not in cold.stats.method
    torch.testing.assert_close(warm["u"], cold["u"], rtol=0, atol=1e-12)
    v = x.sin()
    gradients = [torch.autograd.grad(s["u"], moved, v)[0] for s in (warm, cold)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_newton_steps_that_lead_to_a_maximum_are_followed_by_a_backend() -> None:
    """At u = 0 between two valleys the gradient vanishes."""
    problem = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: (u.square() - x).square())
    x = torch.tensor([1.0, 1.0], dtype=D)
    first = ddn.solve(problem, {"x": x}, initial={"u": torch.tensor([0.5, 0.7], dtype=D)})
    on_top = replace(first, primal={"u": torch.tensor([0.0, 1.01], dtype=D)})
    s = ddn.solve(problem, {"x": x}, warm_start=on_top)
    assert s.stats.method[0] != "newton"
    assert s.stats.method[1] == "newton"
    torch.testing.assert_close(s["u"].abs(), torch.ones(2, dtype=D), rtol=0, atol=1e-12)


def test_a_qp_keeps_its_own_solver_when_warm_started() -> None:
    problem = ddn.Problem({"u": (3,)}, {"x": (3,)}, lambda u, x: (u - x).square().sum(), bounds={"u": (0, 1)})
    x = torch.tensor([0.5, -1.0, 2.0], dtype=D)
    first = ddn.solve(problem, {"x": x})
    assert ddn.solve(problem, {"x": x + 0.1}, warm_start=first).stats.method == first.stats.method


def test_functions_that_do_not_exist_at_the_start_are_named() -> None:
    """log(0): no solver gets away from it, and the message did not say what to do."""
    A = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    problem = ddn.Problem(
        {"x": (2,)}, {"c": (2,)}, lambda x: -(x.log()).sum(), inequality=lambda x, c: A @ x - c
    )
    c = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ddn.SolveError, match="not finite at zero, where the search begins: give an initial"):
        ddn.solve(problem, {"c": c})
    inside = torch.full((2,), 0.1, dtype=torch.float64)
    assert ddn.solve(problem, {"c": c}, initial=inside).certificate.ok
