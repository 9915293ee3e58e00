"""The batched Newton's method: what auto tries first on small problems with equality constraints alone."""

import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
SPHERE = ddn.Problem(
    variables={"u": (20,)},
    parameters={"x": (20,), "y": (20,)},
    objective=lambda u, x, y: (0.3 * u - x).exp().sum() + torch.linalg.vector_norm(u - y),
    equality={"sphere": lambda u: u.square().sum() - 1},
)


def inputs(batch: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {name: torch.randn(batch, 20, generator=g, dtype=D) for name in "xy"}


def start(batch: int) -> dict[str, torch.Tensor]:
    return {"u": torch.full((batch, 20), 20**-0.5, dtype=D)}


def test_auto_begins_with_it_and_gradients_are_those_of_ipopt() -> None:
    found = {}
    for solver in ("auto", "casadi:ipopt"):
        leaves = {name: value.requires_grad_() for name, value in inputs(9).items()}
        solution = ddn.solve(SPHERE, leaves, solver=solver, initial=start(9))
        found[solver] = (
            solution["u"],
            *torch.autograd.grad(
                solution["u"].square().sum(1) @ torch.arange(9.0, dtype=D) + solution["u"][:, 0].sum(),
                list(leaves.values()),
            ),
        )
        backend = "newton" if solver == "auto" else "casadi"
        assert solution.stats.backend == (backend,) * 9
    for ours, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-9)


def test_each_sample_gets_the_same_point_in_any_batch() -> None:
    values, batch = inputs(33), 33
    together = ddn.solve(SPHERE, values, solver="newton", initial=start(batch))
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    mixed = ddn.solve(SPHERE, {k: v[order] for k, v in values.items()}, solver="newton", initial=start(batch))
    torch.testing.assert_close(mixed["u"], together["u"][order], rtol=1e-12, atol=1e-13)
    for i in (0, 7, 32):
        alone = ddn.solve(
            SPHERE, {k: v[i : i + 1] for k, v in values.items()}, solver="newton", initial=start(1)
        )
        torch.testing.assert_close(alone["u"][0], together["u"][i], rtol=1e-12, atol=1e-13)
        assert alone.stats.iterations[0] == together.stats.iterations[i]


def test_steps_along_a_curved_constraint_are_not_cut() -> None:
    """Powell's example, at which Newton steps raise f + sigma |c|_1 (Nocedal and Wright 2006, example 15.4)."""
    problem = ddn.Problem(
        variables={"u": (2,)},
        parameters={"t": ()},
        objective=lambda u, t: 2 * (u.square().sum() - 1) - t * u[0],
        equality=lambda u: u.square().sum() - 1,
    )
    angle = torch.tensor([0.3, 1.0, 2.0], dtype=D)
    begin = {"u": torch.stack([angle.cos(), angle.sin()], 1)}
    solution = ddn.solve(problem, {"t": torch.ones(3, dtype=D)}, solver="newton", initial=begin)
    torch.testing.assert_close(solution["u"], torch.tensor([[1.0, 0.0]], dtype=D).expand(3, 2))
    assert max(n or 0 for n in solution.stats.iterations) <= 12


def test_negative_curvature_is_left_for_a_minimum() -> None:
    """From between two wells, where the Hessian is negative, to one of them and not to the top."""
    problem = ddn.Problem({"u": (1,)}, {"x": ()}, lambda u, x: ((u**2 - 1) ** 2).sum() + x * u.sum())
    solution = ddn.solve(
        problem,
        {"x": torch.tensor([-0.1, 0.1], dtype=D)},
        solver="newton",
        initial={"u": torch.tensor([[0.05], [-0.05]], dtype=D)},
    )
    assert solution.stats.backend == ("newton",) * 2
    assert (solution["u"][:, 0].abs() > 0.9).all()
    assert solution.converged.all()


def test_what_it_cannot_solve_is_left_to_others_and_it_has_no_verdict() -> None:
    """At zero the sphere has no tangent, and a Newton step no direction: IPOPT takes that sample alone."""
    begin = start(3)["u"].clone()
    begin[1] = 0.0
    solution = ddn.solve(SPHERE, inputs(3), initial={"u": begin})
    assert solution.stats.backend == ("newton", "casadi", "newton")
    assert solution.converged.all()
    expected = ddn.solve(SPHERE, inputs(3), solver="casadi:ipopt", initial=start(3))
    torch.testing.assert_close(solution["u"], expected["u"])


def test_an_unbounded_and_an_infeasible_problem_are_named_by_others() -> None:
    unbounded = ddn.Problem({"u": (2,)}, {"x": (2,)}, lambda u, x: (u[0] - x[0]).exp() + x[1] * u[1])
    with pytest.raises(ddn.SolveError, match=r"unbounded|diverg"):
        ddn.solve(unbounded, {"x": torch.ones(2, dtype=D)})
    infeasible = ddn.Problem(
        {"u": (2,)}, {"x": (2,)}, lambda u, x: (u - x).exp().sum(), {"never": lambda u: u.square().sum() + 1}
    )
    with pytest.raises(ddn.SolveError, match="infeasible"):
        ddn.solve(infeasible, {"x": torch.ones(2, dtype=D)})


def test_inequalities_bounds_and_kinks_of_numbers_are_not_put_to_it() -> None:
    def first(**more: object) -> str:
        base = {"objective": lambda u, x: (u - x).exp().sum() - u.sum()}
        problem = ddn.Problem({"u": (2,)}, {"x": (2,)}, **{**base, **more})  # type: ignore[arg-type]
        return ddn.solve(problem, {"x": torch.ones(2, dtype=D)}).stats.backend[0]

    assert first() == "newton"
    assert first(inequality=lambda u: u.sum() - 100) != "newton"
    assert first(bounds={"u": (-100.0, 100.0)}) != "newton"
    assert first(objective=lambda u, x: (u - x).exp().sum() + (u - 5).abs().sum()) != "newton"


def test_dependent_rows_do_not_stop_it() -> None:
    problem = ddn.Problem(
        {"u": (3,)},
        {"x": (3,)},
        lambda u, x: (u - x).exp().sum() - u.sum(),
        lambda u: torch.stack([u.sum(), 2 * u.sum()]),
    )
    x = torch.tensor([0.3, -0.1, 0.5], dtype=D)
    solution = ddn.solve(problem, {"x": x.requires_grad_()}, solver="newton")
    torch.testing.assert_close(solution["u"], x - x.mean())
    with pytest.warns(ddn.DegeneracyWarning):
        (gradient,) = torch.autograd.grad(solution["u"][0], x)
    torch.testing.assert_close(gradient, torch.tensor([2.0, -1.0, -1.0], dtype=D) / 3)
