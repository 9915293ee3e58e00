"""A function of a problem that came from elsewhere: named arguments, constants, and steps in torch.

    v_0 .. v_a = arguments,   v_a+1 .. v_c = constants,   v_k = operation_k(v_i, v_j, ...; options_k)

The last value is the function's. Evaluated on tensors it is an ordinary torch function, which the trace
takes apart like any other; its steps are data, so it can be pickled where its operations can.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddn_solvers.arrays import Array

Operation = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Step:
    """``operation(*values at inputs, **options)``; ``source`` is what it was, for messages."""

    operation: Operation
    inputs: tuple[int, ...]
    options: Mapping[str, Any]
    source: str


class Formula:
    """A function of named tensors, bound by these names as a user's own function is.

    Args:
        label: What messages call it: the expression as its own library prints it.
        arguments: Names of the variables and parameters it takes.
        constants: Tensors it holds, float64.
        steps: In order; the last one's result is returned.
    """

    def __init__(
        self, label: str, arguments: Sequence[str], constants: Sequence[torch.Tensor], steps: Sequence[Step]
    ) -> None:
        self.__qualname__ = label if len(label) <= 80 else f"{label[:77]}..."
        self.arguments, self.constants, self.steps = tuple(arguments), tuple(constants), tuple(steps)

    @property
    def __signature__(self) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in self.arguments])

    def __call__(self, *positional: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        bound = self.__signature__.bind(*positional, **named).arguments
        values = [*(bound[name] for name in self.arguments), *self.constants]
        for step in self.steps:
            formula_source = step.source  # noqa: F841  # ``terms.user_line`` looks for it on the stack
            values.append(step.operation(*(values[place] for place in step.inputs), **step.options))
        return values[-1]


class FormulaBuilder:
    """Collects the steps of one ``Formula``; what it hands out are places of values, not yet numbered."""

    def __init__(self) -> None:
        self.source = ""  # of the steps to come
        self._arguments: dict[str, int] = {}
        self._constants: dict[Hashable, int] = {}
        self._order: list[tuple[str, Any]] = []

    def argument(self, name: str) -> int:
        if name not in self._arguments:
            self._arguments[name] = self._placed("argument", name)
        return self._arguments[name]

    def constant(self, array: Array | float) -> int:
        """A copy of ``array``; equal ones share a place."""
        held = np.array(array, dtype=np.float64)
        key = (held.shape, held.tobytes())
        if key not in self._constants:
            self._constants[key] = self._placed("constant", torch.from_numpy(held))
        return self._constants[key]

    def step(self, operation: Operation, *inputs: int, **options: Any) -> int:
        return self._placed("step", Step(operation, inputs, options, self.source))

    def _placed(self, kind: str, content: Any) -> int:
        self._order.append((kind, content))
        return len(self._order) - 1

    def formula(self, label: str, result: int) -> Formula:
        """The function whose value is at ``result``; only what that needs is kept."""
        if self._order[result][0] != "step":
            result = self.step(torch.clone, result)  # nobody gets hold of a constant itself
        needed = self._needed(result)
        contents: dict[str, list[int]] = {"argument": [], "constant": [], "step": []}
        for place in sorted(needed):
            contents[self._order[place][0]].append(place)
        in_order = [*contents["argument"], *contents["constant"], *contents["step"]]
        numbers = {place: k for k, place in enumerate(in_order)}
        steps = []
        for place in contents["step"]:
            step = self._order[place][1]
            steps.append(
                Step(step.operation, tuple(numbers[i] for i in step.inputs), step.options, step.source)
            )
        names = [self._order[place][1] for place in contents["argument"]]
        return Formula(label, names, [self._order[place][1] for place in contents["constant"]], steps)

    def _needed(self, result: int) -> set[int]:
        needed, pending = set(), [result]
        while pending:
            place = pending.pop()
            if place not in needed:
                needed.add(place)
                kind, content = self._order[place]
                pending.extend(content.inputs if kind == "step" else ())
        return needed
