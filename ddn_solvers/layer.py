"""A problem as a torch module: parameters in, solution out, gradients through the KKT system."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ddn_solvers import compiled
from ddn_solvers.captures import Accessor
from ddn_solvers.errors import ProblemError
from ddn_solvers.policy import Policy, as_policy
from ddn_solvers.problem import Problem, as_problem
from ddn_solvers.profile import Profile, profile
from ddn_solvers.program import compile_program
from ddn_solvers.routing import Solver, routes
from ddn_solvers.solution import Solution
from ddn_solvers.solve import as_options, solve_captured
from ddn_solvers.uncompiled import uncompiled


class DeclarativeLayer(torch.nn.Module):
    """``y(x) = argmin_u f(u, x)`` subject to the problem's constraints, as an ``nn.Module``.

    Modules and Parameters that the problem's functions capture are registered under the names they
    have there, and the layer's own are what the functions see: ``parameters()``, ``to()``,
    ``state_dict``, ``deepcopy`` and ``torch.func.functional_call`` do what one expects.

    Args:
        problem: A ``Problem`` or the dict that ``Problem.from_dict`` takes.
        solver: As in ``ddn.solve``.
        options: As in ``ddn.solve``.
        policy: As in ``ddn.solve``.
        warm_start: Start each sample of a call from its last good solution, where the batch is the same.

    Raises:
        ProblemError: A wrong declaration, option or policy.
        BackendNotFound, BackendNotInstalled, BackendCannotSolve: The solver's name does not serve.
    """

    def __init__(
        self,
        problem: Problem | Mapping[str, Any],
        solver: Solver = "auto",
        options: Mapping[str, Any] | None = None,
        policy: Policy | None = None,
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        self.problem = as_problem(problem)
        self.solver, self.options, self.policy, self.warm_start = solver, options, policy, warm_start
        self._previous: Solution | None = None
        self._origins: dict[str, _Origin] = {}
        as_options(options)
        as_policy(policy)
        program = compile_program(self.problem)
        routes(solver, program)
        self._register_captures(program.graph.seen.accessors)
        self._front = compiled.Front(self, program)

    def forward(
        self,
        *parameters: Any,
        initial: Any = None,
        warm_start: Solution | None = None,
        policy: Policy | None = None,
        **by_name: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Solve for a batch of parameters.

        Args:
            *parameters: In declared order, each of shape (*batch, *shape).
            initial: Starting point, as in ``ddn.solve``.
            warm_start: An earlier ``Solution`` to start from.
            policy: In place of the layer's own.
            **by_name: The remaining parameters.

        Returns:
            The solution, (*batch, *shape); a tuple in declared order if there are several variables.

        Raises:
            ProblemError, SolveError: As ``ddn.solve``.
        """
        plain = initial is None and warm_start is None and policy is None and not self.warm_start
        plain = plain and as_policy(self.policy).on_failure != "closest"
        if plain and compiled.possible():
            values = compiled.forward(self, self._by_name(parameters, by_name))
        else:
            solution = self.solve(
                *parameters, initial=initial, warm_start=warm_start, policy=policy, **by_name
            )
            values = tuple(solution.primal.values())
        return values[0] if len(values) == 1 else values

    @uncompiled
    def solve(
        self,
        *parameters: Any,
        initial: Any = None,
        warm_start: Solution | None = None,
        policy: Policy | None = None,
        **by_name: Any,
    ) -> Solution:
        """The same with everything that is known about the solution; see ``Solution``."""
        values = self._by_name(parameters, by_name)
        remembers = self.warm_start and warm_start is None and initial is None
        if remembers and self._previous is not None and _same_batch(self._previous, values, self.problem):
            warm_start = self._previous
        solution = solve_captured(
            self.problem,
            values,
            self.solver,
            initial,
            warm_start,
            self.options,
            policy or self.policy,
            self._own_captures(),
        )
        if self.warm_start and not torch._C._are_functorch_transforms_active():
            self._previous = _last_good(solution.detach(), self._previous)
        return solution

    @uncompiled
    def profile(self, *parameters: Any, repeats: int = 20, initial: Any = None, **by_name: Any) -> Profile:
        """Where the time of a call and its backward goes; parameters as in a call.

        Args:
            repeats: Calls, after a first one, of which medians are taken.
            initial: As in ``solve``.

        Raises:
            ProblemError, SolveError: As a call.
        """
        values = self._by_name(parameters, by_name)
        inputs = {
            name: value.detach().requires_grad_()
            for name, value in values.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        return profile(lambda: self.solve(initial=initial, **{**values, **inputs}), inputs, repeats)

    def _by_name(self, parameters: tuple[Any, ...], by_name: dict[str, Any]) -> dict[str, Any]:
        declared = list(self.problem.parameters)
        if len(parameters) > len(declared):
            raise ProblemError(
                "too many parameters", expected=", ".join(declared) or "none", got=len(parameters)
            )
        positional = dict(zip(declared, parameters, strict=False))
        twice = sorted(set(positional) & set(by_name))
        if twice:
            raise ProblemError(f"parameter {twice[0]!r} is given both by position and by name")
        return {**positional, **by_name}

    # -- captured modules and Parameters ----------------------------------------------------------

    def _register_captures(self, accessors: tuple[Accessor, ...]) -> None:
        for accessor in accessors:
            if accessor.anchor is not None and accessor.anchor not in self._origins:
                self._adopt(accessor)

    def _adopt(self, accessor: Accessor) -> None:
        value = accessor.read_anchor()
        assert accessor.anchor is not None
        self._origins[accessor.anchor] = _Origin(accessor, value)
        setattr(self, accessor.anchor, value)  # registers a module as child, a Parameter as parameter

    def _rebound(self) -> list[str]:
        """Names that refer to another object by now than the one that was registered."""
        return [name for name, origin in self._origins.items() if origin.rebound()]

    def _own_captures(self) -> dict[str, Any]:
        """The layer's own objects; one whose name was rebound at its source since is adopted anew."""
        for name in self._rebound():
            self._adopt(self._origins[name].accessor)
        return {name: origin.now(getattr(self, name)) for name, origin in self._origins.items()}

    # -- copies -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_previous", "_origins", "_front")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_previous": None, "_origins": {}})  # type: ignore[no-untyped-call]  # torch leaves it untyped
        program = compile_program(self.problem)
        self._front = compiled.Front(self, program)
        for accessor in program.graph.seen.accessors:
            if accessor.anchor is not None and accessor.anchor in (*self._parameters, *self._modules):
                self._origins[accessor.anchor] = _Origin(accessor, accessor.read_anchor())

    def extra_repr(self) -> str:
        variables = ", ".join(f"{name} {shape}" for name, shape in self.problem.variables.items())
        parameters = ", ".join(f"{name} {shape}" for name, shape in self.problem.parameters.items())
        return f"{variables} <- {parameters or 'no parameters'}, solver={self.solver!r}"


class _Origin:
    """Where a registered object came from, and what was there then."""

    def __init__(self, accessor: Accessor, value: Any) -> None:
        self.accessor, self._value = accessor, weakref.ref(value)

    def rebound(self) -> bool:
        """Whether the name that the function uses refers to another module or Parameter by now."""
        value = self.accessor.read_anchor()
        return value is not self._value() and isinstance(value, (torch.nn.Module, torch.nn.Parameter))

    def now(self, own: Any) -> Any:
        """The layer's ``own``, or the plain tensor that ``functional_call`` has put at its source alone."""
        value = self.accessor.read_anchor()
        return value if own is self._value() and isinstance(value, torch.Tensor) else own


def _last_good(solution: Solution, before: Solution | None) -> Solution:
    """``solution``, with the points of ``before`` for samples that failed: what the next call starts from."""
    good, batch = solution.converged, solution.objective.shape
    if before is None or before.objective.shape != batch or bool(good.all()):
        return solution

    def kept(new: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wide = {name: good.reshape(*batch, *[1] * (t.dim() - len(batch))) for name, t in new.items()}
        return {name: torch.where(wide[name], t, old[name].to(t)) for name, t in new.items()}

    sides = {side: kept(tensors, getattr(before.dual, side)) for side, tensors in vars(solution.dual).items()}
    return replace(
        solution, primal=kept(solution.primal, before.primal), dual=replace(solution.dual, **sides)
    )


def _same_batch(solution: Solution, values: Mapping[str, Any], problem: Problem) -> bool:
    shapes = [
        value.shape[: value.dim() - len(problem.parameters[name])]
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and name in problem.parameters
    ]
    try:
        return torch.broadcast_shapes(*shapes) == solution.objective.shape
    except RuntimeError:
        return False  # the batches do not broadcast: the call itself says so
