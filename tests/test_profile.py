"""``layer.profile``: where the time of a call goes."""

import torch

import ddn_solvers as ddn

D = torch.float64


def test_the_parts_of_a_call_add_up_and_are_told():
    scale = torch.nn.Parameter(torch.tensor(2.0, dtype=D))
    problem = ddn.Problem(
        {"u": (3,), "t": ()},
        {"x": (3,), "r": ()},
        lambda u, t, x, r: scale * (u - x).square().sum() + (t - r) ** 2,
        bounds={"u": (0, None)},
    )
    layer = ddn.DeclarativeLayer(problem)
    x = torch.randn(4, 3, dtype=D, requires_grad=True)
    found = layer.profile(x, r=1.0, repeats=3)
    parts = (found.backend, found.verification, found.rest, found.backward)
    assert all(part > 0 for part in parts)
    assert abs(found.total - sum(parts)) < 1e-12
    assert (found.samples, found.repeats) == (4, 3)
    assert x.grad is None
    assert scale.grad is None
    text = str(found)
    assert text.startswith("4 samples, medians of 3 calls")
    for part in ("backend", "verification", "rest", "backward", "total", "first call"):
        assert f"\n{part} " in text


def test_a_layer_without_parameters_has_no_backward():
    layer = ddn.DeclarativeLayer(ddn.Problem({"u": (2,)}, {}, lambda u: (u - 1).square().sum()))
    assert layer.profile(repeats=1).total > 0


def test_calls_that_are_measured_begin_where_they_are_told_to():
    problem = ddn.Problem({"u": (2,)}, {"r": ()}, lambda u: u.sum(), lambda u, r: u.square().sum() - r)
    layer = ddn.DeclarativeLayer(problem, solver="newton")  # at zero it has no direction
    assert layer.profile(r=torch.tensor(1.0), initial={"u": -torch.ones(2)}, repeats=1).total > 0


def test_phases_of_a_solve():
    solution = ddn.solve(ddn.Problem({"u": ()}, {}, lambda u: (u - 1) ** 2), {})
    phases = solution.stats.phases
    assert set(phases) == {"backend", "verification"}
    assert 0 < sum(phases.values()) <= solution.stats.seconds
