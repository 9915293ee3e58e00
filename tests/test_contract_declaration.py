"""The declaration: what is accepted, and that every mistake is a ``ProblemError`` naming its field."""

import dataclasses
import functools

import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
NAN, INF = float("nan"), float("inf")


def squares(u, x):
    return 0.5 * (u - x).square().sum()


BASE = {"variables": {"u": (3,)}, "parameters": {"x": (3,)}, "objective": squares}
X = torch.tensor([1.5, -2.0, 0.25], dtype=D)


def declare(**changes):
    return ddn.Problem.from_dict({**BASE, **changes})


# -- mistakes that the declaration itself shows ---------------------------------------------------------

MISTAKES = {
    # id: (changed fields, what the message must contain)
    "unknown-field": ({"objectives": squares}, "objectives"),
    "unknown-field-bound": ({"bound": {"u": (0, 1)}}, "bound"),
    "variables-none": ({"variables": None}, "variables"),
    "variables-list": ({"variables": ["u"]}, "variables"),
    "variables-empty": ({"variables": {}}, "variables"),
    "parameters-list": ({"parameters": ["x"]}, "parameters"),
    "shape-int": ({"variables": {"u": 3}}, "u"),
    "shape-negative": ({"variables": {"u": (-1,)}}, "u"),
    "shape-float": ({"variables": {"u": (3.0,)}}, "u"),
    "shape-string": ({"variables": {"u": "3"}}, "u"),
    "shape-none": ({"variables": {"u": None}}, "u"),
    "shape-bool": ({"parameters": {"x": (True,)}}, "x"),
    "parameter-shape-int": ({"parameters": {"x": 3}}, "x"),
    "name-number": ({"variables": {1: (3,)}}, "1"),
    "name-dot": ({"variables": {"u.v": (3,)}, "objective": None}, "u.v"),
    "parameter-dot": ({"parameters": {"x.y": (3,)}, "objective": None}, "x.y"),
    "name-twice": ({"parameters": {"u": (3,)}, "objective": None}, "u"),
    "objective-string": ({"objective": "squares"}, "objective"),
    "objective-tensor": ({"objective": torch.zeros(())}, "objective"),
    "objective-unknown-argument": ({"objective": lambda u, z: (u - z).sum()}, "z"),
    "objective-var-args": ({"objective": lambda *args: args[0].sum()}, "args"),
    "objective-var-keywords": ({"objective": lambda u, **rest: u.sum()}, "rest"),
    "equality-number": ({"equality": 0.0}, "equality"),
    "equality-string": ({"equality": "u"}, "equality"),
    "equality-list-of-numbers": ({"equality": [1.0]}, "equality"),
    "equality-unknown-argument": ({"equality": {"plane": lambda w: w.sum()}}, "plane"),
    "equality-unknown-argument-name": ({"equality": {"plane": lambda w: w.sum()}}, "w"),
    "inequality-unknown-argument": ({"inequality": [lambda v: v]}, "inequality0"),
    "inequality-tensor": ({"inequality": torch.zeros(3)}, "inequality"),
    "constraint-name-number": ({"inequality": {0: lambda u: u}}, "inequality"),
    "constraint-name-twice": ({"equality": {"c": lambda u: u.sum()}, "inequality": {"c": lambda u: u}}, "c"),
    "constraint-name-twice-generated": (
        {"equality": lambda u: u.sum(), "inequality": {"equality0": lambda u: u}},
        "equality0",
    ),
    "bounds-list": ({"bounds": [(0, 1)]}, "bounds"),
    "bounds-unknown-variable": ({"bounds": {"v": (0, 1)}}, "v"),
    "bounds-of-parameter": ({"bounds": {"x": (0, 1)}}, "x"),
    "bounds-number": ({"bounds": {"u": 1.0}}, "u"),
    "bounds-triple": ({"bounds": {"u": (0, 1, 2)}}, "u"),
    "bounds-bool": ({"bounds": {"u": (False, None)}}, "u"),
    "bounds-unknown-parameter": ({"bounds": {"u": (None, "r")}}, "r"),
    "bounds-named-variable": ({"bounds": {"u": (None, "u")}}, "u"),
    "bounds-callable-of-variable": ({"bounds": {"u": (lambda u: u, None)}}, "u"),
    "bounds-tensor-shape": ({"bounds": {"u": (torch.zeros(4, dtype=D), None)}}, "shape"),
    "bounds-tensor-too-many-dims": ({"bounds": {"u": (torch.zeros(2, 3, dtype=D), None)}}, "shape"),
    "bounds-parameter-shape": ({"parameters": {"x": (3,), "r": (2,)}, "bounds": {"u": (None, "r")}}, "shape"),
    "bounds-integer-tensor": ({"bounds": {"u": (torch.zeros(3, dtype=torch.long), None)}}, "dtype"),
    "bounds-complex-tensor": ({"bounds": {"u": (torch.zeros(3, dtype=torch.cfloat), None)}}, "dtype"),
    "bounds-nan": ({"bounds": {"u": (NAN, None)}}, "NaN"),
    "bounds-nan-tensor": ({"bounds": {"u": (torch.tensor([0.0, NAN, 0.0]), None)}}, "NaN"),
    "bounds-crossed-numbers": ({"bounds": {"u": (1.0, 0.0)}}, "contradict"),
    "bounds-crossed-tensors": (
        {"bounds": {"u": (torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]))}},
        "contradict",
    ),
    "bounds-crossed-mixed": ({"bounds": {"u": (torch.full((3,), 2.0), 1)}}, "contradict"),
    "bounds-lower-inf": ({"bounds": {"u": (INF, None)}}, "u"),
    "bounds-upper-minus-inf": ({"bounds": {"u": (None, -INF)}}, "u"),
    "bounds-string-number": ({"bounds": {"u": ("0", None)}}, "u"),
    "bounds-dict": ({"bounds": {"u": {"lower": 0}}}, "u"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_declaration_is_named(mistake):
    changes, named = mistake
    with pytest.raises(ddn.ProblemError) as caught:
        declare(**changes)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["initial", "warm_start", "policy"])
@pytest.mark.parametrize("field", ["variables", "parameters"])
def test_reserved_names_are_refused(field, name):
    fields = {"variables": {"u": (3,)}, "parameters": {}}
    fields[field] = {**fields[field], name: (3,)}
    with pytest.raises(ddn.ProblemError, match=name):
        ddn.Problem(**fields)


@pytest.mark.parametrize(
    "given", [None, 3, "problem", [("variables", {})], squares], ids=lambda given: type(given).__name__
)
def test_what_is_no_declaration_at_all(given):
    with pytest.raises(ddn.ProblemError):
        ddn.Problem.from_dict(given)
    with pytest.raises(ddn.ProblemError):
        ddn.solve(given, {})
    with pytest.raises(ddn.ProblemError):
        ddn.DeclarativeLayer(given)


def test_missing_variables_field():
    with pytest.raises(ddn.ProblemError, match="variables"):
        ddn.Problem.from_dict({"objective": lambda u: u})


def test_a_problem_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ddn.Problem(**BASE).objective = None


def test_the_error_says_what_was_expected_and_what_came():
    with pytest.raises(ddn.ProblemError, match=r"(?s)expected.*got") as caught:
        declare(variables={"u": 3})
    assert isinstance(caught.value, ValueError)


# -- mistakes that only running the functions shows -----------------------------------------------------

RETURNS = {
    "objective-vector": ({"objective": lambda u: u}, "objective"),
    "objective-one-element": ({"objective": lambda u: u[:1]}, "objective"),
    "objective-float": ({"objective": lambda u: 1.0}, "objective"),
    "objective-none": ({"objective": lambda u: None}, "objective"),
    "objective-tuple": ({"objective": lambda u: (u.sum(),)}, "objective"),
    "objective-integer": ({"objective": lambda u: u.sum().long()}, "objective"),
    "objective-bool": ({"objective": lambda u: u.sum() > 0}, "objective"),
    "objective-complex": ({"objective": lambda u: u.sum() + 1j}, "objective"),
    "equality-none": ({"equality": {"plane": lambda u: None}}, "plane"),
    "equality-float": ({"equality": {"plane": lambda u: 0.0}}, "plane"),
    "equality-list": ({"equality": {"plane": lambda u: [u.sum()]}}, "plane"),
    "inequality-bool": ({"inequality": {"ball": lambda u: u > 0}}, "ball"),
    "inequality-integer": ({"inequality": {"ball": lambda u: u.round().long()}}, "ball"),
    "bound-none": ({"bounds": {"u": (lambda x: None, None)}}, "u"),
    "bound-shape": ({"bounds": {"u": (lambda x: x[:2], None)}}, "u"),
    "bound-matrix": ({"bounds": {"u": (lambda x: x.outer(x), None)}}, "u"),
    "bound-integer": ({"bounds": {"u": (lambda x: x.long(), None)}}, "u"),
}


@pytest.mark.parametrize("case", RETURNS.values(), ids=RETURNS)
@pytest.mark.parametrize("entry", ["compile", "solve", "layer"])
def test_a_function_that_returns_what_it_must_not(case, entry):
    changes, named = case
    problem = declare(**changes)
    run = {
        "compile": lambda: ddn.compile(problem),
        "solve": lambda: ddn.solve(problem, {"x": X}, solver="scipy:SLSQP"),
        "layer": lambda: ddn.DeclarativeLayer(problem, solver="scipy:SLSQP"),
    }
    with pytest.raises(ddn.ProblemError, match=named):
        run[entry]()


def test_an_error_inside_a_function_is_not_swallowed():
    """A bug of the user's (wrong shapes) must surface, not become a fallback or a silent number."""
    problem = declare(objective=lambda u, x: (u[:2] - x).sum())
    with pytest.raises((RuntimeError, ddn.DDNError)):
        ddn.solve(problem, {"x": X}, solver="scipy:SLSQP")


# -- values of parameters ---------------------------------------------------------------------------------

VALUES = {
    "missing": ({}, "x"),
    "unknown": ({"x": X, "z": X}, "z"),
    "shape": ({"x": X[:2]}, "x"),
    "scalar-for-vector": ({"x": torch.tensor(1.0, dtype=D)}, "x"),
    "trailing-batch": ({"x": torch.zeros(3, 2, dtype=D)}, "x"),
    "integer": ({"x": torch.ones(3, dtype=torch.long)}, "dtype"),
    "bool": ({"x": torch.ones(3, dtype=torch.bool)}, "dtype"),
    "complex": ({"x": torch.ones(3, dtype=torch.cdouble)}, "dtype"),
    "nan": ({"x": torch.tensor([0.0, NAN, 0.0], dtype=D)}, "x"),
    "inf": ({"x": torch.tensor([0.0, INF, 0.0], dtype=D)}, "x"),
    "minus-inf-in-batch": ({"x": torch.tensor([[0.0] * 3, [0.0, 0.0, -INF]], dtype=D)}, "x"),
    "string": ({"x": "1, 2, 3"}, "x"),
    "none": ({"x": None}, "x"),
}


@pytest.mark.parametrize("case", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("entry", ["solve", "layer", "sensitivity", "attach"])
def test_a_wrong_parameter_is_named(case, entry):
    values, named = case
    problem = declare()
    run = {
        "solve": lambda: ddn.solve(problem, values, solver="scipy:SLSQP"),
        "layer": lambda: ddn.DeclarativeLayer(problem, solver="scipy:SLSQP")(**values),
        "sensitivity": lambda: ddn.sensitivity(problem, values, {"u": X}),
        "attach": lambda: ddn.attach(problem, values, {"u": X}),
    }
    with pytest.raises(ddn.ProblemError, match=named):
        run[entry]()


@pytest.mark.parametrize("policy", ["nan", "mask", "warn"])
def test_nan_in_a_parameter_is_an_error_under_every_policy(policy):
    bad = torch.stack([X, X * NAN])
    with pytest.raises(ddn.ProblemError, match="x"):
        ddn.solve(declare(), {"x": bad}, policy=ddn.Policy(on_failure=policy))


def test_batches_that_do_not_broadcast():
    problem = declare(parameters={"x": (3,), "r": ()}, objective=lambda u, x, r: r * (u - x).square().sum())
    with pytest.raises(ddn.ProblemError, match="batch"):
        ddn.solve(problem, {"x": torch.zeros(2, 3, dtype=D), "r": torch.ones(3, dtype=D)})


LAYER_CALLS = {
    "too-many": ((X, X), {}),
    "twice": ((X,), {"x": X}),
    "none": ((), {}),
    "unknown": ((X,), {"y": X}),
}


@pytest.mark.parametrize("call", LAYER_CALLS.values(), ids=LAYER_CALLS)
def test_wrong_calls_of_a_layer(call):
    layer = ddn.DeclarativeLayer(declare(), solver="scipy:SLSQP")
    with pytest.raises(ddn.ProblemError):
        layer(*call[0], **call[1])


INITIALS = {
    "unknown-variable": {"v": X},
    "shape": {"u": X[:2]},
    "tensor-shape": X[:2],
    "nan": X * NAN,
    "inf": X * INF,
    "integer": torch.ones(3, dtype=torch.long),
    "string": "zero",
    "number-list": [0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("initial", INITIALS.values(), ids=INITIALS)
def test_a_wrong_initial_point(initial):
    with pytest.raises(ddn.ProblemError, match="initial"):
        ddn.solve(declare(), {"x": X}, solver="scipy:SLSQP", initial=initial)


def test_an_initial_tensor_needs_a_single_variable():
    problem = ddn.Problem({"u": (2,), "v": (2,)}, {}, lambda u, v: (u - 1).square().sum() + v.square().sum())
    with pytest.raises(ddn.ProblemError, match="initial"):
        ddn.solve(problem, {}, initial=torch.zeros(2, dtype=D))


# -- policies and options -----------------------------------------------------------------------------------

POLICIES = {
    "on_failure": {"on_failure": "ignore"},
    "on_singular": {"on_singular": "pinv"},
    "weakly_active": {"weakly_active": "both"},
    "nonsmooth": {"nonsmooth": "smooth"},
    "linear_solver": {"linear_solver": "cholmod"},
    "proximal": {"proximal": -1.0},
    "accuracy": {"accuracy": 0.0},
    "accuracy-nan": {"accuracy": NAN},
    "smoothing": {"smoothing": -1e-3},
    "active_tol": {"active_tol": -1.0},
    "on_failure-none": {"on_failure": None},
}


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_an_unknown_policy_choice_is_named(fields):
    with pytest.raises(ddn.ProblemError, match=next(iter(fields))):
        ddn.Policy(**fields)


def test_policy_defaults():
    policy = ddn.Policy()
    assert dataclasses.asdict(policy) == {
        "on_failure": "raise",
        "on_singular": "least_squares",
        "proximal": 1e-6,
        "weakly_active": "active",
        "nonsmooth": "manifold",
        "smoothing": 0.0,
        "accuracy": 1e-6,
        "active_tol": None,
        "linear_solver": "auto",
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.accuracy = 1.0


@pytest.mark.parametrize("entry", ["solve", "layer", "sensitivity", "attach"])
def test_a_policy_of_another_type(entry):
    run = {
        "solve": lambda: ddn.solve(declare(), {"x": X}, policy="raise"),
        "layer": lambda: ddn.DeclarativeLayer(declare(), policy="raise")(X),
        "sensitivity": lambda: ddn.sensitivity(declare(), {"x": X}, {"u": X}, policy="raise"),
        "attach": lambda: ddn.attach(declare(), {"x": X}, {"u": X}, policy="raise"),
    }
    with pytest.raises(ddn.ProblemError, match="policy"):
        run[entry]()


@pytest.mark.parametrize(
    "point", [X[:2], {"v": X}, X * NAN, None, {}], ids=["shape", "name", "nan", "none", "empty"]
)
@pytest.mark.parametrize("function", [ddn.sensitivity, ddn.attach], ids=["sensitivity", "attach"])
def test_a_wrong_given_point(function, point):
    with pytest.raises(ddn.ProblemError):
        function(declare(), {"x": X}, point)


# -- what is accepted ----------------------------------------------------------------------------------------

LOWER = {
    # id: (lower bound, its values)
    "none": (None, torch.full((3,), -INF, dtype=D)),
    "int": (0, torch.zeros(3, dtype=D)),
    "float": (-0.5, torch.full((3,), -0.5, dtype=D)),
    "minus-inf": (-INF, torch.full((3,), -INF, dtype=D)),
    "tensor": (torch.tensor([2.0, -1.0, 0.0], dtype=D), torch.tensor([2.0, -1.0, 0.0], dtype=D)),
    "tensor-float32": (torch.tensor([2.0, -1.0, 0.0]), torch.tensor([2.0, -1.0, 0.0], dtype=D)),
    "tensor-0d": (torch.tensor(0.5, dtype=D), torch.full((3,), 0.5, dtype=D)),
    "tensor-infinite": (torch.tensor([-INF, -1.0, -INF], dtype=D), torch.tensor([-INF, -1.0, -INF], dtype=D)),
    "parameter": ("low", torch.tensor([1.0, -3.0, 0.5], dtype=D)),
    "scalar-parameter": ("r", torch.full((3,), 0.75, dtype=D)),
    "callable": (lambda low, r: low + r, torch.tensor([1.75, -2.25, 1.25], dtype=D)),
    "callable-scalar": (lambda r: -r, torch.full((3,), -0.75, dtype=D)),
    "partial": (functools.partial(lambda low, k: low * k, k=0.5), torch.tensor([0.5, -1.5, 0.25], dtype=D)),
}
PARAMETERS = {"x": X, "low": torch.tensor([1.0, -3.0, 0.5], dtype=D), "r": torch.tensor(0.75, dtype=D)}


@pytest.mark.parametrize("kind", LOWER.values(), ids=LOWER)
@pytest.mark.parametrize("solver", ["scipy:SLSQP", "cvxpy:CLARABEL", "casadi:ipopt"])
def test_every_kind_of_bound(kind, solver):
    bound, values = kind
    problem = declare(parameters={"x": (3,), "low": (3,), "r": ()}, bounds={"u": (bound, None)})
    u = ddn.solve(problem, PARAMETERS, solver=solver)["u"]
    assert torch.allclose(u, torch.maximum(X, values), rtol=0, atol=1e-9)


def test_bounds_take_a_list_and_an_upper_side():
    u = ddn.solve(declare(bounds={"u": [-1, 1]}), {"x": X})["u"]
    assert torch.allclose(u, X.clamp(-1, 1), rtol=0, atol=1e-9)


def plane(u):
    return u.sum()


def pair(u):
    return torch.stack([u[0] - u[1], u[0] - 1.0])


CONSTRAINTS = {
    "callable": (plane, {"equality0": ()}),
    "list": ([plane, pair], {"equality0": (), "equality1": (2,)}),
    "tuple": ((plane,), {"equality0": ()}),
    "dict": ({"plane": plane, "pair": pair}, {"plane": (), "pair": (2,)}),
    "matrix-valued": ({"M": lambda u: u[:2].reshape(1, 2) - 1.0}, {"M": (1, 2)}),
}


@pytest.mark.parametrize("case", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_forms_and_names_of_constraints(case):
    given, shapes = case
    solution = ddn.solve(declare(equality=given), {"x": X})
    assert {name: tuple(nu.shape) for name, nu in solution.dual.equality.items()} == shapes
    assert list(solution.dual.inequality) == []
    mirrored = ddn.solve(declare(inequality=given), {"x": X})
    expected = {name.replace("equality", "inequality"): s for name, s in shapes.items()}
    assert {name: tuple(nu.shape) for name, nu in mirrored.dual.inequality.items()} == expected


class Method:
    weight = 2.0

    def value(self, u, x):
        return self.weight * (u - x).square().sum()

    def __call__(self, u, x):
        return self.value(u, x)


class Module(torch.nn.Module):
    def forward(self, u, x):
        return (u - x).square().sum()


def with_default(u, x, scale=3.0):
    return scale * (u - x).square().sum()


def swapped(x, u):
    return (u - x).square().sum() + u.sum() * 0


OBJECTIVES = {
    "lambda": lambda u, x: (u - x).square().sum(),
    "function": squares,
    "method": Method().value,
    "callable-object": Method(),
    "module": Module(),
    "default-argument": with_default,
    "partial": functools.partial(with_default, scale=2.0),
    "any-order": swapped,
    "no-parameter": lambda u: (u - X).square().sum(),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_kind_of_function(objective):
    assert torch.allclose(ddn.solve(declare(objective=objective), {"x": X})["u"], X, rtol=0, atol=1e-9)


def test_from_dict_solve_and_layer_take_the_same_fields():
    fields = {**BASE, "equality": {"plane": plane}, "bounds": {"u": ("x", 9)}}
    expected = ddn.solve(ddn.Problem(**fields), {"x": X})["u"]
    assert torch.equal(ddn.solve(ddn.Problem.from_dict(fields), {"x": X})["u"], expected)
    assert torch.equal(ddn.solve(fields, {"x": X})["u"], expected)
    assert torch.equal(ddn.DeclarativeLayer(fields)(X), expected)


def test_declaring_does_not_change_the_dict():
    fields = {**BASE, "equality": [plane], "bounds": {"u": (0, None)}}
    copy = dict(fields)
    ddn.Problem.from_dict(fields)
    assert fields == copy


def test_no_parameters_at_all():
    problem = ddn.Problem({"u": (2,)}, objective=lambda u: (u - 3).square().sum())
    for parameters in ({}, None):
        assert torch.allclose(ddn.solve(problem, parameters)["u"].double(), torch.full((2,), 3.0, dtype=D))
    assert ddn.DeclarativeLayer(problem)().shape == (2,)


def test_scalar_variable_and_numbers_as_parameters():
    problem = ddn.Problem({"u": ()}, {"x": ()}, lambda u, x: (u - x).square())
    assert abs(ddn.solve(problem, {"x": 2.5})["u"].item() - 2.5) < 1e-9


def test_explain_is_readable(capsys):
    weight = torch.tensor(2.0, dtype=D, requires_grad=True)
    problem = declare(objective=lambda u, x: weight * (u - x).square().sum(), equality={"plane": plane})
    text = str(ddn.compile(problem).explain()) + capsys.readouterr().out
    for word in ("QP", "weight", "casadi", "scipy", "auto", "convex"):
        assert word in text, word


EXPLAINED = {
    "sine": ({"x": (2,)}, lambda u, x: (u - x).square().sum(), lambda u: torch.sin(u[0]) - u[1], False),
    "sphere": ({"x": (2,)}, lambda u, x: (u - x).square().sum(), lambda u: u.square().sum() - 1, False),
    "kinks": ({"x": (2,)}, lambda u, x: u.abs().sum() * (u - x).sin().sum(), None, False),
    "projection": ({"x": (2,)}, lambda u, x: (u - x).square().sum(), lambda u: u.sum() - 1, True),
    "where-positive": ({"x": ()}, lambda u, x: x * u.exp().sum() + u.square().sum(), None, True),
    "where-semidefinite": ({"x": (2, 2)}, lambda u, x: u @ x @ u, None, True),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_lists_a_backend_if_and_only_if_it_takes_the_problem(name, capsys):
    parameters, objective, equality, convex = EXPLAINED[name]
    problem = ddn.Problem({"u": (2,)}, parameters, objective, equality=equality)
    lines = dict(line.split(None, 1) for line in ddn.compile(problem).explain().splitlines())
    values = {
        k: torch.eye(2, dtype=D) if len(s) == 2 else torch.ones(s, dtype=D) for k, s in parameters.items()
    }
    for solver in ("cvxpy:CLARABEL", "cvxpy:SCS"):
        assert (solver in lines["backends"].split(", ")) is convex
        if convex:
            ddn.solve(problem, values, solver=solver)
        else:
            assert "cvxpy" not in lines["auto"]
            with pytest.raises(ddn.BackendCannotSolve):
                ddn.solve(problem, values, solver=solver)


def test_error_tree():
    for error in (
        ddn.ProblemError, ddn.TraceError, ddn.BackendNotFound, ddn.BackendNotInstalled,
        ddn.BackendCannotSolve, ddn.SolveError, ddn.SensitivityError,
    ):  # fmt: skip
        assert issubclass(error, ddn.DDNError)
    assert issubclass(ddn.ProblemError, ValueError)
    for warning in (ddn.DegeneracyWarning, ddn.FallbackWarning, ddn.ConvergenceWarning):
        assert issubclass(warning, Warning)


FORMS = {
    "quadratic": (
        lambda: ddn.quadratic_program(2, equalities=1, inequalities=2),
        {"P": torch.eye(2, dtype=D), "q": torch.tensor([-1.0, -3.0], dtype=D), "A": torch.ones(1, 2, dtype=D),
         "b": torch.ones(1, dtype=D), "G": -torch.eye(2, dtype=D), "h": torch.zeros(2, dtype=D)},
        [0.0, 1.0],
    ),
    "linear": (
        lambda: ddn.linear_program(2, inequalities=1, bounds=(0, None)),
        {"c": torch.tensor([-1.0, -2.0], dtype=D), "G": torch.ones(1, 2, dtype=D), "h": torch.ones(1, dtype=D)},
        [0.0, 1.0],
    ),
    "least-squares": (
        lambda: ddn.least_squares(3, 2),
        {"M": torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=D),
         "y": torch.tensor([3.0, 4.0, 5.0], dtype=D)},
        [3.0, 2.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_ready_made_forms_build_problems(form):
    build, parameters, expected = form
    problem = build()
    assert isinstance(problem, ddn.Problem)
    u = ddn.solve(problem, parameters)["u"]
    assert torch.allclose(u, torch.tensor(expected, dtype=D), rtol=0, atol=1e-9)
