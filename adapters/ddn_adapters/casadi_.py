"""CasADi: IPOPT and an SQP method for anything smooth, active-set and splitting solvers for QPs.

CasADi's signs are L = f + lam_g^T g(x) + lam_x^T x with lam >= 0 at upper and lam <= 0 at lower limits:

    [nu; lambda] = lam_g  (h: 0 <= h <= 0,  g: -inf <= g <= 0),    l = max(-lam_x, 0),   r = max(lam_x, 0)

CasADi's plugins load on first use, and only those named here: some others crash beside each other.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ddn_solvers.adapter import (
    Adapter,
    Array,
    Batch,
    Capabilities,
    Dialect,
    Feature,
    Instance,
    Method,
    Point,
    Points,
    ProblemClass,
    ProblemError,
    Status,
    bound_multipliers,
    interruptible,
)

if TYPE_CHECKING:
    from ddn_solvers.evaluators import Coefficients
    from ddn_solvers.program import Program

_NONLINEAR = frozenset(ProblemClass)
_QUADRATIC = frozenset({ProblemClass.LP, ProblemClass.QP})
_NLPSOL = ("ipopt", "sqpmethod")
_QP_FAILED = {"return_status": "the QP of a step was not solved", "success": False}
_CONSTRAINED = frozenset({Feature.BOUNDS, Feature.EQUALITY, Feature.INEQUALITY})
_SMOOTH = _CONSTRAINED | {Feature.NONCONVEX, Feature.CALLBACKS, Feature.NONSMOOTH}
_SOLVED = 1e-6  # relative KKT residual above which a sample of a map is solved again to learn its status
# Multipliers of the parameters are ours to compute, and callbacks do not offer what they take.
_NLP = {"print_time": False, "show_eval_warnings": False, "error_on_fail": False, "calc_lam_p": False}
_CONIC = {"error_on_fail": False, "print_time": False}
# What the word of a solver contains, the first that fits; anything else is a numerical error, or success.
_WORDS = {
    "Acceptable": Status.OPTIMAL,
    "solved inaccurate": Status.OPTIMAL,
    "dual infeasible": Status.UNBOUNDED,
    "unbounded": Status.UNBOUNDED,
    "Diverging": Status.UNBOUNDED,
    "nfeasib": Status.INFEASIBLE,
    "Time": Status.TIME_LIMIT,
    "User_Requested_Stop": Status.TIME_LIMIT,  # by our stopwatch
    "aximum": Status.ITERATION_LIMIT,
    "Exception": Status.BACKEND_ERROR,
    "-1": Status.INFEASIBLE,  # DAQP has numbers
    "-3": Status.UNBOUNDED,
    "-4": Status.ITERATION_LIMIT,
}
# A dotted option is one of the solver behind the plugin. Where a QP solver has no time limit, it cannot be
# interrupted and is bounded by its iterations alone.
_IPOPT = Dialect(
    max_iter="ipopt.max_iter",
    tolerance="ipopt.tol ipopt.constr_viol_tol",
    time_limit="ipopt.max_wall_time",
    tight=1e-9,
    # Without the last one, the point lies outside its bounds by 1e-8.
    defaults={**_NLP, "ipopt.print_level": 0, "ipopt.sb": "yes", "ipopt.bound_relax_factor": 0.0},
)
_PUSHES = "bound_push bound_frac slack_bound_push slack_bound_frac mult_bound_push"
_IPOPT_WARM = {"ipopt.warm_start_init_point": "yes", "ipopt.mu_init": 1e-7} | {
    f"ipopt.warm_start_{push}": 1e-9 for push in _PUSHES.split()
}
_SQPMETHOD = Dialect(
    max_iter="max_iter",
    tolerance="tol_pr tol_du",
    time_limit="",
    tight=1e-9,
    defaults={
        **_NLP,
        **dict.fromkeys(("print_header", "print_iteration", "print_status"), False),
        "max_iter": 200,
        # daqp needs a convex QP. Reflecting eigenvalues leaves a convex Hessian as it is, so that Newton
        # stays Newton; the default of 3 step lengths accepts steps that multiply the merit function.
        "convexify_strategy": "eigen-reflect",
        "max_iter_ls": 10,
        "beta": 0.5,
        "qpsol": "daqp",
        "qpsol_options.error_on_fail": False,
        "qpsol_options.daqp": {"eps_prox": 1e-6, "eta_prox": 1e-12, "primal_tol": 1e-9},
    },
)
_DAQP = Dialect(
    max_iter="daqp.iter_limit",
    tolerance="daqp.primal_tol daqp.dual_tol",
    time_limit="",
    # Proximal-point iterations take singular Hessians (an LP's is zero) and cost a regular one nothing.
    defaults={**_CONIC, "daqp.primal_tol": 1e-9, "daqp.eps_prox": 1e-6, "daqp.eta_prox": 1e-10},
)
_QPOASES = Dialect(
    max_iter="nWSR",
    tolerance="terminationTolerance",
    time_limit="CPUtime",
    defaults={**_CONIC, "printLevel": "none"},
)
_OSQP = Dialect(
    max_iter="osqp.max_iter",
    tolerance="osqp.eps_abs osqp.eps_rel",
    time_limit="",
    tight=1e-9,
    defaults={**_CONIC, "osqp.verbose": False, "osqp.max_iter": 100_000},
)
_QRQP = Dialect(
    max_iter="max_iter",
    tolerance="constr_viol_tol dual_inf_tol",
    time_limit="",
    # Its iterations are dense and may cycle: minutes at the default limit of 1000 and some 100 variables.
    defaults={**_CONIC, "print_iter": False, "print_header": False, "print_info": False, "max_iter": 300},
)


_STATEFUL = (
    "qpoases",
    "osqp",
)  # begin where the last call ended, so that the same call is not the same again


class CasADiAdapter(Adapter):
    """What CasADi's ``nlpsol`` and ``conic`` solve, on the compiled functions themselves."""

    capabilities = Capabilities(
        summary="nonlinear problems by IPOPT; batches of QPs in compiled code",
        package="casadi",
        pip="casadi",
        methods=(
            Method("daqp", _QUADRATIC, _CONSTRAINED, dialect=_DAQP),
            Method("ipopt", _NONLINEAR, _SMOOTH, dialect=_IPOPT),
            Method("sqpmethod", _NONLINEAR, _SMOOTH, dialect=_SQPMETHOD),
            Method("qpoases", _QUADRATIC, _CONSTRAINED, dialect=_QPOASES),
            Method("osqp", _QUADRATIC, _CONSTRAINED, dialect=_OSQP),
            Method("qrqp", _QUADRATIC, _CONSTRAINED, dialect=_QRQP),
        ),
    )

    def solve(self, instance: Instance) -> Point:
        with _silent(instance.method):
            found, stats = self._model(instance).solve(instance)
        # IPOPT finds out at the solve alone.
        if stats["return_status"] == "Invalid_Option" and instance.options.native:
            raise self._refusal(instance, "Invalid_Option, as of a linear solver that is not installed")
        return self._point(instance, [column.full().ravel() for column in found], stats)

    def solve_batch(self, batch: Batch) -> Sequence[Point]:
        """QPs all at once in compiled code; one by one what is not solved so, to learn why."""
        if batch.method in _NLPSOL:
            return super().solve_batch(batch)
        try:
            with interruptible(), _silent(batch.method):
                x, rows, bounds, residual = self._model(batch).solve_batch(batch)
        except RuntimeError:  # of one sample, and none says which
            return super().solve_batch(batch)
        # Stopped at a limit it leaves multipliers that are not finite, now and then.
        solved = residual[:, 0] <= _SOLVED
        solved &= np.isfinite(x + bounds).all(axis=1) & np.isfinite(rows).all(axis=1)
        points = Points.at(batch.program, batch.initial, Status.OPTIMAL)
        points.primal[:], m = x, batch.program.equality.size
        points.message[:] = [f"{batch.method}: solved by a map"] * len(batch)
        points.put_forces(slice(None), bounds, rows[:, :m], rows[:, m:])
        for i in np.flatnonzero(~solved):
            points.put(i, self.attempt(batch[int(i)]))
        return points

    def _point(self, instance: Instance, found: Sequence[Array], stats: Mapping[str, Any]) -> Point:
        (x, lam_g, lam_x), m = found, instance.program.equality.size
        message = str(stats["return_status"])
        unknown = Status.OPTIMAL if stats["success"] else Status.NUMERICAL_ERROR
        status = next((status for word, status in _WORDS.items() if word in message), unknown)
        iterations = stats["iter_count"] if stats.get("iter_count", -1) >= 0 else None
        if instance.method == "ipopt" and "iterations" not in stats:
            iterations = 0  # it has not begun, and the count is what was in memory
        message = f"{instance.method}: {message}"
        if not all(np.isfinite(part).all() for part in found):  # DAQP leaves at a limit what was in memory
            status = Status.NUMERICAL_ERROR if status is Status.OPTIMAL else status
            return Point(instance.initial, status, iterations=iterations, message=message)
        multipliers = {"equality": lam_g[:m], "inequality": lam_g[m:], **bound_multipliers(lam_x)}
        return Point(x, status, **multipliers, iterations=iterations, message=message)

    def _model(self, of: Instance | Batch) -> Any:
        """The solver object for these options, made once a program if it forgets what it has solved."""
        program, method, warm = of.program, of.method, of.warm_start is not None
        native = self.dialect(method).native(of.options, self.where(method))
        if warm and method == "ipopt":
            native = {**_IPOPT_WARM, **native}
        if "qpsol" in of.options.native and "qpsol_options.daqp" not in of.options.native:
            native.pop("qpsol_options.daqp", None)
        limited = method == "sqpmethod" and of.options.time_limit is not None  # IPOPT keeps that itself
        watched = method in _NLPSOL and (limited or np.isfinite(of.options.deadline))
        kind = _Nonlinear if method in _NLPSOL else _Conic
        key = ("casadi", method, repr(sorted(native.items())), watched)

        def build() -> Any:
            return kind(program, method, _nested(method, native), watched)

        try:
            return build() if method in _STATEFUL else program.memo(key, build)
        except RuntimeError as error:  # OSQP does not say which
            if not of.options.native:
                raise
            raise self._refusal(of, str(error).splitlines()[-1]) from error

    def _refusal(self, of: Instance | Batch, why: str) -> ProblemError:
        names = " or ".join(map(repr, of.options.native))
        return ProblemError(f"{self.where(of.method)} does not accept the option {names}", got=why)


class _Nonlinear:
    """``nlpsol`` on the compiled functions (or callbacks) and their own derivatives; one program's, reused."""

    def __init__(self, program: Program, method: str, options: dict[str, Any], watched: bool) -> None:
        import casadi as ca

        functions, rows = program.functions, program.constraints
        cuts = np.cumsum([0, *(block.size for block in program.parameters)]).tolist()
        z, p = ca.MX.sym("z", program.variables.size), ca.MX.sym("p", cuts[-1])
        blocks = ca.vertsplit(p, cuts) if len(cuts) > 1 else []
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
            upper = ca.triu(hessian)
            options["hess_lag"] = function("hess_l", [upper], ["triu:hess:gamma:x:x"], weights=True)
        else:
            first = {"f": f, "grad:f:x": gradient, "g": c, "jac:g:x": jacobian}
            options["jac_fg"] = function("jac_fg", list(first.values()), list(first))
            options["hess_lag"] = function("hess_l", [hessian], ["hess:gamma:x:x"], weights=True)
        self._stopwatch = None
        if watched:
            sizes = [z.numel(), 1, rows, z.numel(), rows, p.numel()]
            self._stopwatch = options["iteration_callback"] = _stopwatch(sizes)
        self._solver = ca.nlpsol("solver", method, {"x": z, "p": p, "f": f, "g": c}, options)
        self._lock = threading.Lock()  # a solver's statistics are those of its last call

    def solve(self, instance: Instance) -> tuple[list[Any], Mapping[str, Any]]:
        """x, lam_g, lam_x, and the solver's statistics."""
        m, rows = instance.program.equality.size, instance.program.constraints
        limits = np.zeros(rows)
        limits[m:] = -np.inf
        p = np.concatenate([*instance.parameters, np.zeros(0)])
        forces = _forces(instance.warm_start, instance.program)
        arguments = [instance.initial, p, instance.lower, instance.upper, limits, np.zeros(rows), *forces]
        with self._lock:
            if self._stopwatch is not None:
                self._stopwatch.deadline = instance.deadline
            x, _, _, lam_x, lam_g, _ = self._solver.call(arguments)
            try:
                stats = self._solver.stats()
            except RuntimeError:  # sqpmethod has no status where a QP failed, and CasADi reads it
                stats = _QP_FAILED
            return [x, lam_g, lam_x], stats


class _Conic:
    """``conic`` on coefficients that the library has evaluated at z = 0, the whole batch in one map."""

    def __init__(self, program: Program, method: str, options: dict[str, Any], _: bool) -> None:
        import casadi as ca

        from ddn_solvers.lowering.kernel import Kernel

        rows, m, n = program.constraints, program.equality.size, program.variables.size
        sizes = {"h": program.hessian_pattern.nnz, "g": n, "a": program.jacobian_pattern.nnz, "c": rows}
        sizes |= {"lower": n, "upper": n, "x0": n, "lam_x0": n, "lam_a0": rows}
        symbols = {name: ca.MX.sym(name, size) for name, size in sizes.items()}
        a = _matrix(program.jacobian_pattern, symbols["a"])
        h = _matrix(program.hessian_pattern, symbols["h"])
        one_sided, c = ca.DM([0.0] * m + [np.inf] * (rows - m)), symbols["c"]
        data = {"h": h, "g": symbols["g"], "a": a, "lba": -c - one_sided, "uba": -c}
        data |= {"lbx": symbols["lower"], "ubx": symbols["upper"]}
        data |= {name: symbols[name] for name in ("x0", "lam_x0", "lam_a0")}
        self._solver = ca.conic("solver", method, {"h": h.sparsity(), "a": a.sparsity()}, options)
        found = self._solver(**data)
        x, lam_a, lam_x = found["x"], found["lam_a"], found["lam_x"]
        inputs, outputs = list(symbols.values()), [x, lam_a, lam_x, _residual(data, x, lam_a, lam_x)]
        self._batch = Kernel(ca.Function("batch", inputs, [ca.densify(out) for out in outputs]))
        self._data = ca.Function("data", inputs, list(data.values()))
        self._lock = threading.Lock()

    def solve(self, instance: Instance) -> tuple[list[Any], Mapping[str, Any]]:
        """x, lam_a, lam_x, and the solver's statistics."""
        found = instance.program.coefficients(instance.parameters)
        coefficients = [part[0] for part in _data(found)]
        start = [instance.lower, instance.upper, instance.initial]
        arguments = [*coefficients, *start, *_forces(instance.warm_start, instance.program)]
        with self._lock:
            x, _, lam_a, lam_x = self._solver.call([*self._data.call(arguments), np.zeros(0), np.zeros(0)])
            return [x, lam_a, lam_x], self._solver.stats()

    def solve_batch(self, batch: Batch) -> list[Array]:
        """x, lam_a, lam_x and the residual of every sample; a map has no statistics."""
        warm = batch.warm_start or [None] * len(batch)
        forces = [np.stack(side) for side in zip(*(_forces(w, batch.program) for w in warm), strict=True)]
        return self._batch(*_data(batch.coefficients), batch.lower, batch.upper, batch.initial, *forces)


def _data(of: Coefficients) -> list[Array]:
    """In the order of the function that solves a batch."""
    return [of.hessian, of.gradient, of.jacobian, of.constraints]


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


def _matrix(pattern: Any, nonzeros: Any) -> Any:
    import casadi as ca

    sparsity = ca.Sparsity(*pattern.shape, pattern.indptr.tolist(), pattern.indices.tolist())
    return ca.MX(sparsity, nonzeros)


def _forces(warm: Point | None, program: Program) -> tuple[Array, Array]:
    """lam_x and lam_g of an earlier solve, zero where it has none."""
    lam_x, lam_g = np.zeros(program.variables.size), np.zeros(program.constraints)
    if warm is not None and warm.lower is not None and warm.upper is not None:
        lam_x = warm.upper - warm.lower
    if warm is not None and warm.equality is not None and warm.inequality is not None:
        lam_g = np.concatenate([warm.equality, warm.inequality])
    return lam_x, lam_g


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


def _nested(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """As CasADi wants them; those of the solver behind the plugin go with or without its name before them."""
    import casadi as ca

    own = ca.nlpsol_options(method) if method in _NLPSOL else ca.conic_options(method)
    nested: dict[str, Any] = {}
    for name, value in options.items():
        outer, _, inner = name.partition(".")
        if not inner and method in own and name not in own and name not in _NLP:
            outer, inner = method, name
        if inner:
            nested.setdefault(outer, {})[inner] = value
        elif isinstance(value, Mapping):
            nested.setdefault(outer, {}).update(value)
        else:
            nested[outer] = value
    return nested
