"""CasADi: IPOPT and an SQP method for anything smooth, active-set and splitting solvers for QPs.

CasADi's signs are L = f + lam_g^T g(x) + lam_x^T x with lam >= 0 at upper and lam <= 0 at lower limits:

    [nu; lambda] = lam_g  (h: 0 <= h <= 0,  g: -inf <= g <= 0),    l = max(-lam_x, 0),   r = max(lam_x, 0)

CasADi's plugins load on first use, and only those named here: some others crash beside each other.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    BackendCannotSolve,
    Batch,
    Capabilities,
    Feature,
    Instance,
    Method,
    Options,
    Point,
    ProblemClass,
    ProblemError,
    Status,
)

if TYPE_CHECKING:
    from ddn_solvers.program import Program

Array = np.ndarray[Any, np.dtype[np.float64]]

_NONLINEAR = frozenset(ProblemClass)
_QUADRATIC = frozenset({ProblemClass.LP, ProblemClass.QP})
_NLPSOL = ("ipopt", "sqpmethod")
_CONSTRAINED = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY})
_SMOOTH = _CONSTRAINED | {Feature.NONCONVEX, Feature.CALLBACKS, Feature.NONSMOOTH}
_SOLVED = 1e-6  # relative KKT residual above which a sample of a map is solved again to learn its status
_MARKS = itertools.count(1)
_INFINITE = 1e10  # an entry beyond this is a ray that was followed, whatever the solver says
# Of every CasADi function; what a plugin adds to them, it lists itself.
_COMMON = frozenset(
    {"expand", "jit", "compiler", "jit_options", "verbose", "print_time", "record_time", "calc_multipliers"}
    | {
        "iteration_callback",
        "iteration_callback_step",
        "iteration_callback_ignore_errors",
        "bound_consistency",
    }
    | {
        "min_lam",
        "oracle_options",
        "common_options",
        "specific_options",
        "show_eval_warnings",
        "error_on_fail",
    }
    | {"warn_initial_bounds", "discrete", "inputs_check", "regularity_check", "monitor", "max_num_threads"}
)


@dataclass(frozen=True)
class _Plugin:
    """One CasADi plugin as data; a dotted option is one of the solver behind it.

    Attributes:
        status: Its ``return_status`` to ours; anything else is a numerical error.
        time_limit: ``None``: cannot be interrupted, bounded by its iterations alone.
        warm: Options for a solve that starts from an earlier solution.
    """

    max_iter: str
    tolerance: tuple[str, ...]
    time_limit: str | None
    status: Mapping[str, Status]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    warm: Mapping[str, Any] = field(default_factory=dict)


# Multipliers of the parameters are ours to compute, and callbacks do not offer what they take.
_NLP = {"print_time": False, "show_eval_warnings": False, "error_on_fail": False, "calc_lam_p": False}
_CONIC = {"error_on_fail": False, "print_time": False}
_NLP_STATUS = {
    "Solve_Succeeded": Status.OPTIMAL,
    "Solved_To_Acceptable_Level": Status.OPTIMAL,
    "Feasible_Point_Found": Status.OPTIMAL,
    "Infeasible_Problem_Detected": Status.INFEASIBLE,
    "Diverging_Iterates": Status.UNBOUNDED,
    "Maximum_Iterations_Exceeded": Status.ITERATION_LIMIT,
    "Maximum_CpuTime_Exceeded": Status.TIME_LIMIT,
    "Maximum_WallTime_Exceeded": Status.TIME_LIMIT,
    "Invalid_Problem_Definition": Status.BACKEND_ERROR,
    "Unrecoverable_Exception": Status.BACKEND_ERROR,
    "NonIpopt_Exception_Thrown": Status.BACKEND_ERROR,
    "Insufficient_Memory": Status.BACKEND_ERROR,
    "Internal_Error": Status.BACKEND_ERROR,
}
_PLUGINS = {
    "ipopt": _Plugin(
        "ipopt.max_iter",
        ("ipopt.tol", "ipopt.constr_viol_tol"),
        "ipopt.max_wall_time",
        _NLP_STATUS,
        {
            **_NLP,
            "ipopt.print_level": 0,
            "ipopt.sb": "yes",
            "ipopt.tol": 1e-9,
            "ipopt.constr_viol_tol": 1e-9,
            "ipopt.bound_relax_factor": 0.0,  # else the point lies outside its bounds by 1e-8
        },
        {
            "ipopt.warm_start_init_point": "yes",
            "ipopt.mu_init": 1e-7,
            "ipopt.warm_start_bound_push": 1e-9,
            "ipopt.warm_start_bound_frac": 1e-9,
            "ipopt.warm_start_slack_bound_push": 1e-9,
            "ipopt.warm_start_slack_bound_frac": 1e-9,
            "ipopt.warm_start_mult_bound_push": 1e-9,
        },
    ),
    "sqpmethod": _Plugin(
        "max_iter",
        ("tol_pr", "tol_du"),
        None,  # ours to watch
        {**_NLP_STATUS, "User_Requested_Stop": Status.TIME_LIMIT},
        {
            **_NLP,
            "print_header": False,
            "print_iteration": False,
            "print_status": False,
            "max_iter": 200,
            "tol_pr": 1e-9,
            "tol_du": 1e-9,
            # daqp needs a convex QP. Reflecting eigenvalues leaves a convex Hessian as it is, so that Newton
            # stays Newton; the default of 3 step lengths accepts steps that multiply the merit function.
            "convexify_strategy": "eigen-reflect",
            "max_iter_ls": 10,
            "beta": 0.5,
            "qpsol": "daqp",
            "qpsol_options.error_on_fail": False,
            "qpsol_options.daqp": {"eps_prox": 1e-6, "eta_prox": 1e-12, "primal_tol": 1e-9},
        },
    ),
    "daqp": _Plugin(
        "daqp.iter_limit",
        ("daqp.primal_tol", "daqp.dual_tol"),
        None,
        {"1": Status.OPTIMAL, "2": Status.OPTIMAL, "-1": Status.INFEASIBLE, "-3": Status.UNBOUNDED}
        | {"-4": Status.ITERATION_LIMIT, "-7": Status.TIME_LIMIT},
        # Proximal-point iterations take singular Hessians (an LP's is zero) and cost a regular one nothing.
        {**_CONIC, "daqp.primal_tol": 1e-9, "daqp.eps_prox": 1e-6, "daqp.eta_prox": 1e-10},
    ),
    "qpoases": _Plugin(
        "nWSR",
        ("terminationTolerance",),
        "CPUtime",
        {
            "Successful return.": Status.OPTIMAL,
            "Initial QP could not be solved due to infeasibility!": Status.INFEASIBLE,
            "Initial QP could not be solved due to unboundedness!": Status.UNBOUNDED,
            "Premature homotopy termination because QP is infeasible.": Status.INFEASIBLE,
            "Premature homotopy termination because QP is unbounded.": Status.UNBOUNDED,
            "Maximum number of working set recalculations performed.": Status.ITERATION_LIMIT,
        },
        {**_CONIC, "printLevel": "none"},
    ),
    "osqp": _Plugin(
        "osqp.max_iter",
        ("osqp.eps_abs", "osqp.eps_rel"),
        None,
        {
            "solved": Status.OPTIMAL,
            "solved inaccurate": Status.OPTIMAL,
            "primal infeasible": Status.INFEASIBLE,
            "primal infeasible inaccurate": Status.INFEASIBLE,
            "dual infeasible": Status.UNBOUNDED,
            "dual infeasible inaccurate": Status.UNBOUNDED,
            "maximum iterations reached": Status.ITERATION_LIMIT,
        },
        {
            **_CONIC,
            "osqp.verbose": False,
            "osqp.eps_abs": 1e-9,
            "osqp.eps_rel": 1e-9,
            "osqp.max_iter": 100_000,
        },
    ),
    "qrqp": _Plugin(
        "max_iter",
        ("constr_viol_tol", "dual_inf_tol"),
        None,
        {"success": Status.OPTIMAL, "Maximum number of iterations reached": Status.ITERATION_LIMIT},
        # Its iterations are dense and may cycle: minutes at the default limit of 1000 and some 100 variables.
        {**_CONIC, "print_iter": False, "print_header": False, "print_info": False, "max_iter": 300},
    ),
}


class CasADiAdapter(Adapter):
    """What CasADi's ``nlpsol`` and ``conic`` solve, on the compiled functions themselves."""

    capabilities = Capabilities(
        summary="nonlinear problems by IPOPT; batches of QPs in compiled code",
        package="casadi",
        pip="casadi",
        methods=(
            Method("daqp", _QUADRATIC, _CONSTRAINED),
            Method("ipopt", _NONLINEAR, _SMOOTH),
            Method("sqpmethod", _NONLINEAR, _SMOOTH),
            Method("qpoases", _QUADRATIC, _CONSTRAINED),
            Method("osqp", _QUADRATIC, _CONSTRAINED),
            Method("qrqp", _QUADRATIC, _CONSTRAINED),
        ),
    )

    def solve(self, instance: Instance) -> Point:
        program, method = instance.program, instance.method
        _refuse(self.method(method), program)
        if method not in _NLPSOL:
            alone = Batch(
                program,
                instance.parameters,
                instance.lower[None],
                instance.upper[None],
                instance.initial[None],
                method,
                instance.options,
                [instance.warm_start],
            )
            return self.solve_batch(alone)[0]
        warm = instance.warm_start is not None and instance.warm_start.lower is not None
        model: _Nonlinear = _memo(_Nonlinear, program, method, instance.options, warm)
        try:
            return model.solve(instance)
        except Exception as error:
            _propagate_interrupt(str(error))
            return _failure(instance.initial, error)

    def solve_batch(self, batch: Batch) -> list[Point]:
        _refuse(self.method(batch.method), batch.program)
        if batch.method in _NLPSOL:
            return super().solve_batch(batch)
        model: _Conic = _memo(_Conic, batch.program, batch.method, batch.options, False)
        with _silent(batch.method):
            return model.solve_batch(batch)


class _Nonlinear:
    """``nlpsol`` on the compiled functions (or callbacks) and their own derivatives; one program's, reused."""

    def __init__(
        self, program: Program, method: str, options: dict[str, Any], time_limit: float | None
    ) -> None:
        import casadi as ca

        functions, rows = program.functions, program.constraints
        z, p, blocks = _symbols(program)
        y, sigma = ca.MX.sym("y", rows), ca.MX.sym("sigma")

        def inlined(function: Any, *more: Any) -> Any:
            """As expressions, so that each function below evaluates no more than it returns."""
            return function.call([z, *blocks, *more], program.compiled, False)

        f, c = inlined(functions.values)
        _, gradient, _, nonzeros = inlined(functions.first_order)
        jacobian = _matrix(program.jacobian_pattern, nonzeros)
        hessian = _matrix(program.hessian_pattern, inlined(functions.hessian, y, sigma)[0])

        def function(name: str, outputs: list[Any], names: list[str], weights: bool = False) -> Any:
            inputs = {"x": z, "p": p, **({"lam:f": sigma, "lam:g": y} if weights else {})}
            return ca.Function(f"nlp_{name}", list(inputs.values()), outputs, list(inputs), names)

        if method == "ipopt":
            options["grad_f"] = function("grad_f", [f, gradient], ["f", "grad:f:x"])
            options["jac_g"] = function("jac_g", [c, jacobian], ["g", "jac:g:x"])
            options["hess_lag"] = function(
                "hess_l", [ca.triu(hessian)], ["triu:hess:gamma:x:x"], weights=True
            )
        else:
            first = {"f": f, "grad:f:x": gradient, "g": c, "jac:g:x": jacobian}
            options["jac_fg"] = function("jac_fg", list(first.values()), list(first))
            options["hess_lag"] = function("hess_l", [hessian], ["hess:gamma:x:x"], weights=True)
        self._stopwatch = None
        if time_limit is not None and _PLUGINS[method].time_limit is None:
            self._stopwatch = options["iteration_callback"] = _stopwatch(
                [z.numel(), 1, rows, z.numel(), rows, p.numel()]
            )
        self._solver = ca.nlpsol("solver", method, {"x": z, "p": p, "f": f, "g": c}, options)
        self._lock = threading.Lock()  # a solver's statistics are those of its last call

    def solve(self, instance: Instance) -> Point:
        program, warm = instance.program, instance.warm_start
        m, rows = program.equality.size, program.constraints
        limits = np.full(rows, -np.inf)
        limits[:m] = 0.0
        start = instance.initial if warm is None else np.clip(warm.primal, instance.lower, instance.upper)
        arguments = [
            start,
            np.concatenate([*instance.parameters, np.zeros(0)]),
            instance.lower,
            instance.upper,
        ]
        arguments += [limits, np.zeros(rows), *_multipliers(warm, len(start), rows)]
        with self._lock:
            if self._stopwatch is not None:
                self._stopwatch.deadline = time.monotonic() + (instance.options.time_limit or np.inf)
            found = self._solver.call(arguments)
            stats = self._solver.stats()
        x, _, _, lam_x, lam_g, _ = (column.full().ravel() for column in found)
        return _point(instance.method, m, instance.lower, instance.upper, x, lam_g, lam_x, stats)


class _Conic:
    """``conic`` with its data taken from the compiled functions at z = 0, the whole batch in one map."""

    def __init__(self, program: Program, method: str, options: dict[str, Any], _: float | None) -> None:
        import casadi as ca

        from ddn_solvers.lowering.kernel import Kernel

        functions, rows, m = program.functions, program.constraints, program.equality.size
        n = program.variables.size
        parameters = [ca.MX.sym(f"p{i}", block.size) for i, block in enumerate(program.parameters)]
        lower, upper, x0, lam_x0 = (ca.MX.sym(name, n) for name in ("lower", "upper", "x0", "lam_x0"))
        lam_a0 = ca.MX.sym("lam_a0", rows)
        zero = ca.DM.zeros(n)
        _, q, c, nonzeros = functions.first_order(zero, *parameters)
        a = _matrix(program.jacobian_pattern, nonzeros)
        h = _matrix(program.hessian_pattern, functions.hessian(zero, *parameters, ca.DM.zeros(rows), 1.0))
        one_sided = ca.DM([0.0] * m + [np.inf] * (rows - m))
        data = {"h": h, "g": q, "a": a, "lba": -c - one_sided, "uba": -c, "lbx": lower, "ubx": upper}
        data |= {"x0": x0, "lam_x0": lam_x0, "lam_a0": lam_a0}
        self._solver = ca.conic("solver", method, {"h": h.sparsity(), "a": a.sparsity()}, options)
        found = self._solver(**data)
        x, lam_a, lam_x = found["x"], found["lam_a"], found["lam_x"]
        inputs = [*parameters, lower, upper, x0, lam_x0, lam_a0]
        # Where a solver fails, the rest of the map is not computed and its memory is left as it was found:
        # a mark that differs from call to call tells whether a sample's numbers are this call's.
        mark = ca.MX.sym("mark")
        outputs = [x, lam_a, lam_x, _residual(data, x, lam_a, lam_x) + mark]
        self._batch = Kernel(ca.Function("batch", [*inputs, mark], [ca.densify(out) for out in outputs]))
        self._data = ca.Function("data", inputs, list(data.values()))
        self._lock = threading.Lock()

    def solve_batch(self, batch: Batch) -> list[Point]:
        program, warm = batch.program, batch.warm_start or [None] * len(batch)
        n, rows, m = program.variables.size, program.constraints, program.equality.size
        lam_x, lam_a = (
            np.stack(side) for side in zip(*(_multipliers(w, n, rows) for w in warm), strict=True)
        )
        start = np.stack([np.zeros(n) if w is None else w.primal for w in warm])
        arguments = [*batch.parameters, batch.lower, batch.upper, start, lam_x, lam_a]
        try:
            mark = 1000.0 + 618.0339887 * next(_MARKS) % 1000.0  # a number that no other array holds
            x, lam_a, lam_x, marked = self._batch(*arguments, np.array([mark]))
            solved = np.abs(marked[:, 0] - mark) <= _SOLVED
        except RuntimeError as error:  # of one sample, and none says which
            _propagate_interrupt(str(error))
            return [self._again(batch, i, arguments) for i in range(len(batch))]
        stats = {"return_status": "solved", "success": True}
        return [
            _point(batch.method, m, batch.lower[i], batch.upper[i], x[i], lam_a[i], lam_x[i], stats)
            if solved[i]
            else self._again(batch, i, arguments)
            for i in range(len(batch))
        ]

    def _again(self, batch: Batch, i: int, arguments: Sequence[Array]) -> Point:
        """One sample alone: a map has no statistics, and leaves old numbers where it failed."""
        sample = [argument if argument.ndim == 1 else argument[i] for argument in arguments]
        try:
            with self._lock:
                found = self._solver.call([*self._data.call(sample), np.zeros(0), np.zeros(0)])
                stats = self._solver.stats()
        except Exception as error:
            _propagate_interrupt(str(error))
            return _failure(batch.initial[i], error)
        x, _, lam_a, lam_x = (column.full().ravel() for column in found)
        m = batch.program.equality.size
        return _point(batch.method, m, batch.lower[i], batch.upper[i], x, lam_a, lam_x, stats)


def _residual(data: Mapping[str, Any], x: Any, lam_a: Any, lam_x: Any) -> Any:
    """The largest of stationarity, relative to the forces, infeasibility, to the limits, and complementarity."""
    import casadi as ca

    rows = data["a"] @ x
    forces = [data["h"] @ x, data["g"], data["a"].T @ lam_a, lam_x]
    unit = ca.fmax(ca.mmax(ca.fabs(ca.vertcat(*forces))), 1e-300)
    stationarity = ca.norm_inf(sum(forces[1:], forces[0])) / unit
    sizes = ca.fmax(1, ca.fabs(ca.vertcat(x, x, data["uba"], data["uba"])))
    slack = ca.vertcat(x - data["lbx"], data["ubx"] - x, rows - data["lba"], data["uba"] - rows) / sizes
    pushes = ca.vertcat(-lam_x, lam_x, -lam_a, lam_a) / unit  # positive ones have to be at their limit
    return ca.mmax(ca.vertcat(stationarity, -slack, ca.fmin(pushes, slack)))


def _symbols(program: Program) -> tuple[Any, Any, list[Any]]:
    """z, all parameters in one column, and its blocks."""
    import casadi as ca

    cuts = np.cumsum([0, *(block.size for block in program.parameters)]).tolist()
    z, p = ca.MX.sym("z", program.variables.size), ca.MX.sym("p", cuts[-1])
    return z, p, ca.vertsplit(p, cuts) if len(cuts) > 1 else []


def _matrix(pattern: Any, nonzeros: Any) -> Any:
    import casadi as ca

    sparsity = ca.Sparsity(*pattern.shape, pattern.indptr.tolist(), pattern.indices.tolist())
    return ca.MX(sparsity, nonzeros)


def _multipliers(warm: Point | None, n: int, rows: int) -> tuple[Array, Array]:
    """lam_x and lam_g of an earlier solve, zero where it has none."""
    lam_x, lam_g = np.zeros(n), np.zeros(rows)
    if warm is not None and warm.lower is not None and warm.upper is not None:
        lam_x = warm.upper - warm.lower
    if warm is not None and warm.equality is not None and warm.inequality is not None:
        lam_g = np.concatenate([warm.equality, warm.inequality])
    return lam_x, lam_g


def _point(
    method: str,
    m: int,
    lower: Array,
    upper: Array,
    x: Array,
    lam_g: Array,
    lam_x: Array,
    stats: Mapping[str, Any],
) -> Point:
    message = str(stats["return_status"])
    _propagate_interrupt(message)
    status = _PLUGINS[method].status.get(message, Status.NUMERICAL_ERROR)
    if stats["success"] and status is Status.NUMERICAL_ERROR:
        status = Status.OPTIMAL
    if not (np.isfinite(x).all() and np.isfinite(lam_g).all() and np.isfinite(lam_x).all()):
        status = Status.NUMERICAL_ERROR if status is Status.OPTIMAL else status
    elif status is Status.OPTIMAL and np.abs(x).max(initial=0.0) > _INFINITE:
        status = Status.UNBOUNDED
    iterations = stats.get("iter_count", -1)
    return Point(
        x,
        status,
        equality=lam_g[:m],
        inequality=np.maximum(lam_g[m:], 0),
        lower=np.where(np.isfinite(lower), np.maximum(-lam_x, 0), 0),
        upper=np.where(np.isfinite(upper), np.maximum(lam_x, 0), 0),
        iterations=iterations if iterations >= 0 else None,
        message=f"{method}: {message}",
    )


def _failure(z: Array, error: Exception) -> Point:
    last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    return Point(z, Status.BACKEND_ERROR, message=f"{type(error).__name__}: {last}")


def _propagate_interrupt(message: str) -> None:
    """CasADi swallows Ctrl-C and reports it in these two ways."""
    if message == "NonIpopt_Exception_Thrown" or "KeyboardInterrupt" in message:
        raise KeyboardInterrupt


def _silent(method: str) -> contextlib.AbstractContextManager[Any]:
    """qpOASES prints its banner through Python's stdout, whatever its print level."""
    return contextlib.redirect_stdout(io.StringIO()) if method == "qpoases" else contextlib.nullcontext()


def _stopwatch(sizes: Sequence[int]) -> Any:
    """An iteration callback that stops at ``deadline``, for a solver without a time limit of its own."""
    import casadi as ca

    class Stopwatch(ca.Callback):  # type: ignore[misc]  # casadi has no stubs
        deadline = np.inf

        def __init__(self) -> None:
            ca.Callback.__init__(self)
            self.construct("stopwatch", {})

        def get_n_in(self) -> int:
            return len(sizes)

        def get_sparsity_in(self, i: int) -> Any:
            return ca.Sparsity.dense(sizes[i], 1)

        def eval(self, arguments: Sequence[Any]) -> list[Any]:
            return [float(time.monotonic() > self.deadline)]

    return Stopwatch()


def _memo(kind: Any, program: Program, method: str, options: Options, warm: bool) -> Any:
    """The solver object for these options, made once a program."""
    flat = _native(method, options, warm)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    key = ("casadi", method, repr(sorted(flat.items())), options.time_limit is None)

    def build() -> Any:
        try:
            with _silent(method):
                return kind(program, method, nested, options.time_limit)
        except RuntimeError as error:
            if not options.native:
                raise
            named = [name for name in options.native if name.rpartition(".")[2] in str(error)]
            raise ProblemError(
                f"casadi:{method} does not accept the option {' or '.join(map(repr, named or options.native))}",
                got=_failure(np.zeros(0), error).message,
            ) from error

    return program.memo(key, build)


def _native(method: str, options: Options, warm: bool) -> dict[str, Any]:
    """Dotted options: our defaults, the common ones, the native ones, in that order."""
    import casadi as ca

    plugin = _PLUGINS[method]
    flat = {**plugin.defaults, **(plugin.warm if warm else {})}
    if options.max_iter is not None:
        flat[plugin.max_iter] = options.max_iter
    if options.tolerance is not None:
        flat.update(dict.fromkeys(plugin.tolerance, options.tolerance))
    if options.time_limit is not None and plugin.time_limit is not None:
        flat[plugin.time_limit] = options.time_limit
    if method == "sqpmethod" and "qpsol" in options.native:
        del flat["qpsol_options.daqp"]
    own = set(ca.nlpsol_options(method) if method in _NLPSOL else ca.conic_options(method))
    for name, value in options.native.items():
        if name == method and isinstance(value, Mapping):  # as CasADi itself nests them
            flat.update({f"{method}.{inner}": v for inner, v in value.items()})
        elif "." in name or name in own | _COMMON:
            flat[name] = value
        elif method in own:
            flat[f"{method}.{name}"] = value
        else:
            near = difflib.get_close_matches(name, own) or sorted(own)
            raise ProblemError(
                f"option {name!r} is unknown to casadi:{method}", expected=f"one of {', '.join(near)}"
            )
    return flat


def _refuse(method: Method | None, program: Program) -> None:
    """Raise where the method lacks what the problem needs."""
    assert method is not None
    lacking = [feature.value for feature in program.features - method.features]
    if program.problem_class not in method.classes:
        lacking.append(f"problems of class {program.problem_class.value}")
    if lacking:
        raise BackendCannotSolve(
            f"casadi:{method.name} does not take {', '.join(sorted(lacking))}; casadi:ipopt does"
        )
