"""The contract of an adapter as one class of tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from ddn_solvers.adapter import Adapter, Batch, Feature, Options, Point, ProblemError, Status
from ddn_solvers.arrays import Array
from ddn_solvers.problem import Problem
from ddn_solvers.testing.cases import CASES, Case, case, random_qp
from ddn_solvers.testing.check import check_adapter, make_batch, takes

# The problems on which limits are tried, those first that take the most iterations.
_LONG = ("exponential", "entropy", "random_qp_20_5_12_0", "least_squares", "simplex", "lp_vertex", "scalar")
_PROMPTLY = 30.0  # seconds within which a method stops whose time is up from the start
_FAILED = (Status.BACKEND_ERROR, Status.NUMERICAL_ERROR)


class AdapterConformance:
    """Subclass it in a test module and set ``adapter``; pytest finds the tests.

    A test passes where a method does not say, in its ``Capabilities``, that it can what is tested.

    Attributes:
        adapter: The adapter.
        point_tolerance, dual_tolerance: As ``check_adapter``.
    """

    adapter: ClassVar[Adapter]
    point_tolerance: ClassVar[float] = 1e-5
    dual_tolerance: ClassVar[float] = 1e-4

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Every test for each of the adapter's methods, and for each case where it takes one."""
        if "method" in metafunc.fixturenames:
            metafunc.parametrize("method", [method.name for method in self.adapter.capabilities.methods])
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", CASES, ids=repr)

    # -- answers ----------------------------------------------------------------------------------

    def test_solves_what_it_claims_to(self, method: str, case: Case) -> None:
        """Points, multipliers with their signs, statuses; problems without a solution are not called solved."""
        self._check(method, case)

    def test_answers_are_the_same_again_and_alone(self, method: str) -> None:
        family = random_qp(6, 2, 4, seed=1, batch=(3,))
        if not takes(self.adapter, method, family):
            return
        batch = make_batch(family, method)
        first, second = self.adapter.solve_batch(batch), self.adapter.solve_batch(batch)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert np.array_equal(a.primal, b.primal), f"sample {i} differs in an identical call"
            alone = self.adapter.attempt(batch[i]).primal
            np.testing.assert_allclose(alone, a.primal, rtol=0, atol=self.point_tolerance)

    def test_a_warm_start_from_the_solution_ends_there(self, method: str) -> None:
        batch = make_batch(self._long(method), method)
        cold = self.adapter.solve_batch(batch)
        start = np.clip(np.stack([point.primal for point in cold]), batch.lower, batch.upper)
        warm = self.adapter.solve_batch(replace(batch, initial=start, warm_start=cold))
        for a, b in zip(cold, warm, strict=True):
            assert b.status is Status.OPTIMAL, b.message
            np.testing.assert_allclose(b.primal, a.primal, rtol=0, atol=10 * self.point_tolerance)

    # -- options and limits -----------------------------------------------------------------------

    def test_an_unknown_option_is_an_error_by_name(self, method: str) -> None:
        batch = make_batch(self._long(method), method, Options(native={"no_such_option": 1}))
        self._raises(ProblemError, "no_such_option", partial(self.adapter.solve_batch, batch))

    def test_common_options_are_translated_or_refused_by_name(self, method: str) -> None:
        limits: dict[str, Any] = {"max_iter": 5000, "time_limit": 60.0, "tolerance": 1e-9}
        for name, value in limits.items():
            options = replace(Options(), **{name: value})
            if getattr(self.adapter.dialect(method), name) is not None:
                self._check(method, self._long(method), options)
            else:
                batch = make_batch(self._long(method), method, options)
                self._raises(ProblemError, name, partial(self.adapter.solve_batch, batch))

    def test_the_iteration_limit_is_honoured(self, method: str) -> None:
        if self.adapter.dialect(method).max_iter is not None:
            self._limited(method, Options(max_iter=1), Status.ITERATION_LIMIT)

    def test_the_time_limit_is_honoured(self, method: str) -> None:
        if self.adapter.dialect(method).time_limit is not None:
            started = time.monotonic()
            self._limited(method, Options(time_limit=1e-6), Status.TIME_LIMIT, Status.ITERATION_LIMIT)
            assert time.monotonic() - started < _PROMPTLY

    # -- failures ---------------------------------------------------------------------------------

    def test_a_bad_sample_leaves_its_batch_alone(self, method: str) -> None:
        family = random_qp(6, 2, 4, seed=5, batch=(4,))
        if not takes(self.adapter, method, family):
            return
        assert family.primal is not None
        parameters = {name: value.clone() for name, value in family.parameters.items()}
        parameters["G"][2, 1] = -parameters["G"][2, 0]  # two parallel rows that contradict
        parameters["h"][2, :2] = torch.tensor([0.0, -1.0])
        points = self.adapter.solve_batch(make_batch(replace(family, parameters=parameters), method))
        assert points[2].status is not Status.OPTIMAL, "an infeasible sample is called solved"
        for i in (0, 1, 3):
            assert points[i].status is Status.OPTIMAL, points[i].message
            expected = family.primal["u"][i].numpy()
            np.testing.assert_allclose(points[i].primal, expected, rtol=0, atol=10 * self.point_tolerance)

    def test_an_exception_in_a_callback_fails_its_sample(self, method: str) -> None:
        for error in (ArithmeticError("out of range"), KeyError("lost")):
            batch = self._failing(method, _throwing(error))
            if batch is not None:
                (point,) = self.adapter.solve_batch(batch)
                assert point.status in _FAILED, point
                assert np.isfinite(point.primal).all()

    def test_ctrl_c_comes_out(self, method: str) -> None:
        handler = signal.getsignal(signal.SIGINT)
        batch = self._failing(method, lambda: signal.raise_signal(signal.SIGINT))
        if batch is not None:
            self._raises(KeyboardInterrupt, "", partial(self.adapter.solve_batch, batch))
            assert signal.getsignal(signal.SIGINT) is handler

    # -- a good citizen ---------------------------------------------------------------------------

    def test_threads_share_a_program(self, method: str) -> None:
        family = random_qp(8, 2, 4, seed=7, batch=(8,))
        if not takes(self.adapter, method, family):
            return
        assert family.primal is not None
        batch = make_batch(family, method)
        with ThreadPoolExecutor(4) as pool:
            points = list(pool.map(lambda i: self.adapter.attempt(batch[i]), range(len(batch))))
        for point, expected in zip(points, family.primal["u"].numpy(), strict=True):
            np.testing.assert_allclose(point.primal, expected, rtol=0, atol=10 * self.point_tolerance)

    def test_capabilities_load_no_backend(self) -> None:
        module, package = type(self.adapter).__module__, self.adapter.capabilities.package
        heavy = (
            f"{package}.optimize" if package == "scipy" else package
        )  # scipy itself comes with torch users
        before = f"import sys, ddn_solvers.adapter; before = {heavy!r} in sys.modules"
        code = f"{before}; import {module}; sys.exit(3 * ({heavy!r} in sys.modules and not before))"
        done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
        assert done.returncode != 3, f"importing {module} imports {heavy}: do it inside functions"

    # -- how --------------------------------------------------------------------------------------

    def _check(self, method: str, case: Case, options: Options | None = None) -> Sequence[Point]:
        tolerances = {"point_tolerance": self.point_tolerance, "dual_tolerance": self.dual_tolerance}
        return check_adapter(self.adapter, method, case, options=options, **tolerances)

    def _long(self, method: str) -> Case:
        """The problem of ``_LONG`` on which this method works longest."""
        return next(found for found in map(case, _LONG) if takes(self.adapter, method, found))

    def _limited(self, method: str, options: Options, *statuses: Status) -> None:
        """A limited solve ends with one of the statuses, or was fast enough; its points are finite."""
        found = self._long(method)
        for point in self.adapter.solve_batch(make_batch(found, method, options)):
            assert point.status in (*statuses, Status.OPTIMAL), point
            assert np.isfinite(point.primal).all()
            if point.status is Status.OPTIMAL:
                self._check(method, found, options)

    def _failing(self, method: str, happens: Callable[[], object]) -> Batch | None:
        """A problem of torch callbacks in which something happens once the method runs, if it takes such."""
        calls: list[Array] = []
        running = False

        def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            if running:
                calls.append(u.detach().numpy())
                if len(calls) > 3:
                    happens()
            return (u - x).exp().sum() - u.sum() if u[0] < 1e6 else u.sum()

        problem = Problem({"u": (2,)}, {"x": (2,)}, objective)
        broken = Case("broken", problem, {"x": torch.tensor([1.0, 2.0])})
        method_ = self.adapter.method(method)
        if (
            method_ is None
            or Feature.CALLBACKS not in method_.features
            or not takes(self.adapter, method, broken)
        ):
            return None
        batch = make_batch(broken, method)
        running = True
        return batch

    @staticmethod
    def _raises(kind: type[BaseException], said: str, call: Callable[[], object]) -> None:
        caught: BaseException | None = None
        try:
            call()
        except kind as error:
            caught = error
        assert caught is not None, f"{kind.__name__} is not raised"
        assert said in str(caught), f"the message does not name {said!r}: {caught}"


def _throwing(error: Exception) -> Callable[[], None]:
    def happens() -> None:
        raise error

    return happens
