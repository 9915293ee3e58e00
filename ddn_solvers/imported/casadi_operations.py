"""A CasADi function, scalar instruction by scalar instruction, as steps in torch on whole vectors.

CasADi lists the instructions of an expanded (SX) function in the order of their evaluation. Instructions that
depend on each other in the same way are taken together: those of one operation, at one depth, on the same
kinds of operands (constants, parameters, variables) become one step on gathered vectors. Sums, differences
and multiples are first collected into linear combinations, so that a sum of n terms is one step, not n.

    v_i = op(v_j, v_k) for i in a group   ->   v_group = op(v[j of group], v[k of group])
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddn_solvers.errors import ProblemError
from ddn_solvers.imported.formula import Formula, FormulaBuilder, Operation
from ddn_solvers.layout import Shape

CONSTANT, PARAMETER, VARIABLE = range(3)


def _number(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64)


def _less(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _number(x < y)


def _less_or_equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _number(x <= y)


def _equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _number(x == y)


def _unequal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _number(x != y)


def _true(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bool)  # not x != 0: what has a kink is the comparison that x mostly comes from


def _not(x: torch.Tensor) -> torch.Tensor:
    return _number(~_true(x))


def _and(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _number(_true(x) & _true(y))


def _or(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _number(_true(x) | _true(y))


def _if_else_zero(condition: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(_true(condition), x, 0.0)


def _remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x - y * torch.round(x / y)  # of C: to the nearest multiple, where torch's goes below


# By the name of CasADi's code, without its OP_.
OPERATIONS: dict[str, Operation] = {
    "ACOS": torch.acos,
    "ACOSH": torch.acosh,
    "AND": _and,
    "ASIN": torch.asin,
    "ASINH": torch.asinh,
    "ATAN": torch.atan,
    "ATAN2": torch.atan2,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "CONSTPOW": torch.pow,
    "COPYSIGN": torch.copysign,
    "COS": torch.cos,
    "COSH": torch.cosh,
    "DIV": torch.div,
    "EQ": _equal,
    "ERF": torch.erf,
    "ERFINV": torch.erfinv,
    "EXP": torch.exp,
    "EXPM1": torch.expm1,
    "FABS": torch.abs,
    "FLOOR": torch.floor,
    "FMAX": torch.maximum,
    "FMIN": torch.minimum,
    "FMOD": torch.fmod,
    "HYPOT": torch.hypot,
    "IF_ELSE_ZERO": _if_else_zero,
    "INV": torch.reciprocal,
    "LE": _less_or_equal,
    "LOG": torch.log,
    "LOG1P": torch.log1p,
    "LT": _less,
    "MUL": torch.mul,
    "NE": _unequal,
    "NOT": _not,
    "OR": _or,
    "POW": torch.pow,
    "REMAINDER": _remainder,
    "SIGN": torch.sign,
    "SIN": torch.sin,
    "SINH": torch.sinh,
    "SQ": torch.square,
    "SQRT": torch.sqrt,
    "TAN": torch.tan,
    "TANH": torch.tanh,
}


@dataclass(frozen=True)
class Linear:
    """``offset + sum_i coefficient_i * value_i``; the operands are the values' instructions."""

    coefficients: tuple[float, ...]
    offset: float


@dataclass(frozen=True)
class Instruction:
    """One scalar value: an entry of an input, a number, a linear combination, or an operation."""

    what: tuple[int, int] | float | Linear | str
    operands: tuple[int, ...] = ()


# --- reading ---------------------------------------------------------------------------------------------------


def instructions_of(function: Any) -> tuple[list[Instruction], list[list[int]]]:
    """The scalar instructions of an SX function, and for each output the instruction of each entry.

    Raises:
        ProblemError: An operation has no counterpart in torch; the message names it.
    """
    import casadi as ca

    names = {getattr(ca, name): name[3:] for name in dir(ca) if name.startswith("OP_")}
    listed: list[Instruction] = []
    outputs = [[-1] * function.numel_out(k) for k in range(function.n_out())]
    held: dict[int, int] = {}  # place in CasADi's work vector -> instruction whose value is there
    for k in range(function.n_instructions()):
        name = names[function.instruction_id(k)]
        inputs, results = function.instruction_input(k), function.instruction_output(k)
        if name == "OUTPUT":
            outputs[results[0]][results[1]] = held[inputs[0]]
            continue
        if name == "INPUT":
            instruction = Instruction((inputs[0], inputs[1]))
        elif name == "CONST":
            instruction = Instruction(float(function.instruction_constant(k)))
        else:
            instruction = _instruction(name, tuple(held[place] for place in inputs), listed)
        held[results[0]] = len(listed)
        listed.append(instruction)
    return listed, outputs


def _instruction(name: str, operands: tuple[int, ...], before: Sequence[Instruction]) -> Instruction:
    numbers = [before[i].what if isinstance(before[i].what, float) else None for i in operands]
    match name, numbers:
        case "ADD", _:
            return Instruction(Linear((1.0, 1.0), 0.0), operands)
        case "SUB", _:
            return Instruction(Linear((1.0, -1.0), 0.0), operands)
        case "NEG", _:
            return Instruction(Linear((-1.0,), 0.0), operands)
        case "TWICE", _:
            return Instruction(Linear((2.0,), 0.0), operands)
        case "MUL", [float(number), None]:
            return Instruction(Linear((number,), 0.0), operands[1:])
        case "MUL", [None, float(number)]:
            return Instruction(Linear((number,), 0.0), operands[:1])
        case "DIV", [None, float(number)] if number != 0:
            return Instruction(Linear((1 / number,), 0.0), operands[:1])
    if name not in OPERATIONS:
        raise ProblemError(
            f"CasADi's operation OP_{name} has no counterpart in torch",
            expected="functions made of elementary operations",
            fix="External functions, interpolants and solvers cannot be taken apart; integrators with simplify=True can.",
        )
    return Instruction(name, operands)


def _collected(listed: Sequence[Instruction], results: Sequence[int]) -> dict[int, Instruction]:
    """What ``results`` need, each linear combination merged with those that serve it alone."""
    needed = _needed(listed, results)
    uses: dict[int, int] = defaultdict(int)
    for used in (*results, *(operand for i in needed for operand in listed[i].operands)):
        uses[used] += 1
    merged: dict[int, Instruction] = {}
    for i in sorted(needed):  # operands come before what is made of them
        instruction = listed[i]
        merged[i] = (
            _merged(instruction, merged, uses) if isinstance(instruction.what, Linear) else instruction
        )
    return {i: merged[i] for i in sorted(_needed(merged, results))}


def _needed(
    instructions: Sequence[Instruction] | Mapping[int, Instruction], results: Sequence[int]
) -> set[int]:
    needed, pending = set(results), list(results)
    while pending:
        for operand in instructions[pending.pop()].operands:
            if operand not in needed:
                needed.add(operand)
                pending.append(operand)
    return needed


def _merged(outer: Instruction, merged: dict[int, Instruction], uses: Mapping[int, int]) -> Instruction:
    """A linear combination with the constants and the linear combinations among its operands worked in."""
    assert isinstance(outer.what, Linear)
    weights: dict[int, float] = {}
    offset = outer.what.offset
    for factor, operand in zip(outer.what.coefficients, outer.operands, strict=True):
        inner, terms = merged[operand], [(1.0, operand)]
        if isinstance(inner.what, float):
            offset, terms = offset + factor * inner.what, []
        elif isinstance(inner.what, Linear) and uses[operand] == 1:
            offset += factor * inner.what.offset
            terms = list(zip(inner.what.coefficients, inner.operands, strict=True))
        for coefficient, term in terms:
            weights[term] = weights.get(term, 0.0) + factor * coefficient
    return Instruction(Linear(tuple(weights.values()), offset) if weights else offset, tuple(weights))


# --- writing ---------------------------------------------------------------------------------------------------


class Inputs:
    """The two inputs of a CasADi function, x and p, as named tensors, whose columns they hold one after the other.

    Args:
        variables: Names and shapes of what x is made of.
        parameters: The same for p.
    """

    def __init__(self, variables: Mapping[str, Shape], parameters: Mapping[str, Shape]) -> None:
        self.shapes = {**variables, **parameters}
        self.kinds = {**dict.fromkeys(parameters, PARAMETER), **dict.fromkeys(variables, VARIABLE)}
        self.entries = [
            [(name, place) for name, shape in block.items() for place in column_by_column(shape)]
            for block in (variables, parameters)
        ]


def column_by_column(shape: Shape) -> list[int]:
    """Row-major places of the entries of a tensor in the order in which CasADi holds them."""
    return np.arange(math.prod(shape)).reshape(shape).ravel(order="F").tolist()


def vectorised(
    label: str, listed: Sequence[Instruction], results: Sequence[int], inputs: Inputs, shape: Shape
) -> Formula:
    """The function whose entries, in row-major order, are the values of the instructions ``results``."""
    writer = _Writer(label, _collected(listed, results), inputs)
    place = writer.builder.step(torch.reshape, writer.gathered(results), shape=shape)
    return writer.builder.formula(label, place)


class _Writer:
    """Turns instructions into steps; ``_at`` says of each value which vector holds it, and where."""

    def __init__(self, label: str, instructions: Mapping[int, Instruction], inputs: Inputs) -> None:
        self.builder, self._label = FormulaBuilder(), label
        self._instructions, self._inputs = instructions, inputs
        self._at: dict[int, tuple[int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, int] = {}
        self._write_inputs()
        for group in self._groups():
            self._write(group)

    def gathered(self, values: Sequence[int]) -> int:
        """Place of the vector of these values."""
        numbers = [self._number(i) for i in values]
        if None not in numbers:
            return self.builder.constant(np.array(numbers, dtype=np.float64))
        sources: dict[int, int] = {}  # place of a vector -> where it starts in their concatenation
        start, positions = 0, []
        for i, number in zip(values, numbers, strict=True):
            place, position = (
                self._at[i] if number is None else (self.builder.constant(np.array([number])), 0)
            )
            if place not in sources:
                sources[place] = start
                start += self._sizes.get(place, 1)
            positions.append(sources[place] + position)
        whole = next(iter(sources)) if len(sources) == 1 else self.builder.step(_joined, *sources)
        if positions == list(range(start)):
            return whole
        return self.builder.step(_taken, whole, positions=torch.tensor(positions))

    def _number(self, i: int) -> float | None:
        what = self._instructions[i].what
        return what if isinstance(what, float) else None

    def _write_inputs(self) -> None:
        flat: dict[str, int] = {}
        for i, instruction in self._instructions.items():
            if isinstance(instruction.what, float):
                self._kinds[i] = CONSTANT
            elif isinstance(instruction.what, tuple):
                name, position = self._inputs.entries[instruction.what[0]][instruction.what[1]]
                if name not in flat:
                    flat[name] = self.builder.step(torch.reshape, self.builder.argument(name), shape=(-1,))
                    self._sizes[flat[name]] = math.prod(self._inputs.shapes[name])
                self._at[i], self._kinds[i] = (flat[name], position), self._inputs.kinds[name]

    def _groups(self) -> list[list[int]]:
        """Instructions that can be evaluated at once, in an order in which they can."""
        depths: dict[int, int] = {}
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, instruction in self._instructions.items():
            depths[i] = 1 + max((depths[k] for k in instruction.operands), default=-1)
            if not instruction.operands:
                continue
            kinds = tuple(self._kinds[k] for k in instruction.operands)
            self._kinds[i] = max(kinds)
            if isinstance(instruction.what, Linear):
                groups[depths[i], "", len(kinds), max(kinds)].append(i)
            else:
                groups[depths[i], instruction.what, kinds, self._exponent(instruction)].append(i)
        return [groups[key] for key in sorted(groups, key=lambda key: key[0])]  # type: ignore[index]  # a tuple

    def _exponent(self, instruction: Instruction) -> float | None:
        """Of a power, if it is a number: equal ones go together, since each number has its own rules."""
        return self._number(instruction.operands[1]) if instruction.what in ("POW", "CONSTPOW") else None

    def _write(self, group: list[int]) -> None:
        first = self._instructions[group[0]]
        self.builder.source = (
            f"{self._label}, OP_{first.what}" if isinstance(first.what, str) else self._label
        )
        if isinstance(first.what, Linear):
            place = self._linear(group)
        else:
            assert isinstance(first.what, str)
            operands = zip(*(self._instructions[i].operands for i in group), strict=True)
            places = [self.gathered(values) for values in operands]
            exponent = self._exponent(first)
            if exponent is None:
                place = self.builder.step(OPERATIONS[first.what], *places)
            else:
                place = self.builder.step(torch.pow, places[0], exponent=exponent)
        self._sizes[place] = len(group)
        self._at |= {i: (place, position) for position, i in enumerate(group)}

    def _linear(self, group: list[int]) -> int:
        combinations = [self._instructions[i] for i in group]
        place = self.gathered([operand for combination in combinations for operand in combination.operands])
        shape = (len(group), len(combinations[0].operands))
        coefficients = np.array([c.what.coefficients for c in combinations])  # type: ignore[union-attr]  # all Linear
        if (coefficients == -1).all():
            place = self.builder.step(torch.neg, place)
        elif (coefficients != 1).any():
            place = self.builder.step(torch.mul, self.builder.constant(coefficients.ravel()), place)
        if shape[0] == 1:
            place = self.builder.step(_total, place)
        elif shape[1] > 1:
            place = self.builder.step(_row_sums, place, shape=shape)
        offsets = np.array([c.what.offset for c in combinations])  # type: ignore[union-attr]  # all Linear
        return self.builder.step(torch.add, place, self.builder.constant(offsets)) if offsets.any() else place


def _joined(*vectors: torch.Tensor) -> torch.Tensor:
    return torch.cat(vectors)


def _taken(vector: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return vector[positions]


def _total(vector: torch.Tensor) -> torch.Tensor:
    return vector.sum().reshape(1)


def _row_sums(vector: torch.Tensor, shape: Shape) -> torch.Tensor:
    return vector.reshape(shape).sum(1)
