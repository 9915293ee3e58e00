"""The problems of Hock and Schittkowski (1981), by their numbers: what methods for small nonlinear programs are tried on.

Starts and optimal values are those of the book; where it has a local minimum besides, or a start leads to one, both are
here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import ddn_solvers as ddn

D = torch.float64
inf = float("inf")


@dataclass(frozen=True)
class Known:
    problem: ddn.Problem
    start: torch.Tensor
    minima: tuple[float, ...]


def known(
    objective: Callable[[torch.Tensor], torch.Tensor],
    start: list[float],
    *minima: float,
    eq: Any = None,
    ineq: Any = None,
    lo: Any = None,
    up: Any = None,
) -> Known:
    lower, upper = (torch.tensor(side, dtype=D) if isinstance(side, list) else side for side in (lo, up))
    bounds = None if lo is None and up is None else {"x": (lower, upper)}
    problem = ddn.Problem({"x": (len(start),)}, {}, objective, equality=eq, inequality=ineq, bounds=bounds)
    return Known(problem, torch.tensor(start, dtype=D), minima)


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


PROBLEMS = {
    1: known(rosenbrock, [-2.0, 1], 0, lo=[-inf, -1.5]),
    2: known(rosenbrock, [-2.0, 1], 0.0504261879, 4.9412293, lo=[-inf, 1.5]),
    3: known(lambda x: x[1] + 1e-5 * (x[1] - x[0]) ** 2, [10.0, 1], 0, lo=[-inf, 0.0]),
    4: known(lambda x: (x[0] + 1) ** 3 / 3 + x[1], [1.125, 0.125], 8 / 3, lo=[1.0, 0.0]),
    5: known(
        lambda x: torch.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1,
        [0.0, 0],
        -1.9132229549,
        lo=[-1.5, -3.0],
        up=[4.0, 3.0],
    ),
    6: known(lambda x: (1 - x[0]) ** 2, [-1.2, 1], 0, eq=lambda x: 10 * (x[1] - x[0] ** 2)),
    7: known(
        lambda x: torch.log(1 + x[0] ** 2) - x[1],
        [2.0, 2],
        -(3**0.5),
        eq=lambda x: (1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4,
    ),
    10: known(
        lambda x: x[0] - x[1], [-10.0, 10], -1, ineq=lambda x: 3 * x[0] ** 2 - 2 * x[0] * x[1] + x[1] ** 2 - 1
    ),
    11: known(
        lambda x: (x[0] - 5) ** 2 + x[1] ** 2 - 25, [4.9, 0.1], -8.498464223, ineq=lambda x: x[0] ** 2 - x[1]
    ),
    12: known(
        lambda x: 0.5 * x[0] ** 2 + x[1] ** 2 - x[0] * x[1] - 7 * x[0] - 7 * x[1],
        [0.0, 0],
        -30,
        ineq=lambda x: 4 * x[0] ** 2 + x[1] ** 2 - 25,
    ),
    14: known(
        lambda x: (x[0] - 2) ** 2 + (x[1] - 1) ** 2,
        [2.0, 2],
        9 - 2.875 * 7**0.5,
        eq=lambda x: x[0] - 2 * x[1] + 1,
        ineq=lambda x: 0.25 * x[0] ** 2 + x[1] ** 2 - 1,
    ),
    15: known(
        rosenbrock,
        [-2.0, 1],
        306.5,
        ineq=[lambda x: 1 - x[0] * x[1], lambda x: -x[0] - x[1] ** 2],
        up=[0.5, inf],
    ),
    16: known(
        rosenbrock,
        [-2.0, 1],
        0.25,
        23.14466,
        ineq=[lambda x: -x[0] - x[1] ** 2, lambda x: -(x[0] ** 2) - x[1]],
        lo=[-0.5, -inf],
        up=[0.5, 1.0],
    ),
    17: known(
        rosenbrock,
        [-2.0, 1],
        1,
        ineq=[lambda x: x[0] - x[1] ** 2, lambda x: x[1] - x[0] ** 2],
        lo=[-0.5, -inf],
        up=[0.5, 1.0],
    ),
    18: known(
        lambda x: 0.01 * x[0] ** 2 + x[1] ** 2,
        [2.0, 2],
        5,
        ineq=[lambda x: 25 - x[0] * x[1], lambda x: 25 - x[0] ** 2 - x[1] ** 2],
        lo=[2.0, 0.0],
        up=[50.0, 50.0],
    ),
    19: known(
        lambda x: (x[0] - 10) ** 3 + (x[1] - 20) ** 3,
        [20.1, 5.84],
        -6961.81381,
        ineq=[
            lambda x: 100 - (x[0] - 5) ** 2 - (x[1] - 5) ** 2,
            lambda x: (x[1] - 5) ** 2 + (x[0] - 6) ** 2 - 82.81,
        ],
        lo=[13.0, 0.0],
        up=[100.0, 100.0],
    ),
    20: known(
        rosenbrock,
        [-2.0, 1],
        81.5 - 25 * 3**0.5,
        40.198731,
        ineq=[
            lambda x: -x[0] - x[1] ** 2,
            lambda x: -(x[0] ** 2) - x[1],
            lambda x: 1 - x[0] ** 2 - x[1] ** 2,
        ],
        lo=[-0.5, -inf],
        up=[0.5, inf],
    ),
    21: known(
        lambda x: 0.01 * x[0] ** 2 + x[1] ** 2 - 100,
        [-1.0, -1],
        -99.96,
        ineq=lambda x: 10 - 10 * x[0] + x[1],
        lo=[2.0, -50.0],
        up=[50.0, 50.0],
    ),
    22: known(
        lambda x: (x[0] - 2) ** 2 + (x[1] - 1) ** 2,
        [2.0, 2],
        1,
        ineq=[lambda x: x[0] + x[1] - 2, lambda x: x[0] ** 2 - x[1]],
    ),
    23: known(
        lambda x: x[0] ** 2 + x[1] ** 2,
        [3.0, 1],
        2,
        ineq=[
            lambda x: 1 - x[0] - x[1],
            lambda x: 1 - x[0] ** 2 - x[1] ** 2,
            lambda x: 9 - 9 * x[0] ** 2 - x[1] ** 2,
            lambda x: -(x[0] ** 2) + x[1],
            lambda x: -(x[1] ** 2) + x[0],
        ],
        lo=-50.0,
        up=50.0,
    ),
    24: known(
        lambda x: ((x[0] - 3) ** 2 - 9) * x[1] ** 3 / (27 * 3**0.5),
        [1.0, 0.5],
        -1,
        ineq=[
            lambda x: -x[0] / 3**0.5 + x[1],
            lambda x: -x[0] - 3**0.5 * x[1],
            lambda x: x[0] + 3**0.5 * x[1] - 6,
        ],
        lo=0.0,
    ),
    26: known(
        lambda x: (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4,
        [-2.6, 2, 2],
        0,
        eq=lambda x: (1 + x[1] ** 2) * x[0] + x[2] ** 4 - 3,
    ),
    29: known(
        lambda x: -x[0] * x[1] * x[2],
        [1.0, 1, 1],
        -16 * 2**0.5,
        ineq=lambda x: x[0] ** 2 + 2 * x[1] ** 2 + 4 * x[2] ** 2 - 48,
    ),
    30: known(
        lambda x: x.square().sum(),
        [1.0, 1, 1],
        1,
        ineq=lambda x: 1 - x[0] ** 2 - x[1] ** 2,
        lo=[1.0, -10.0, -10.0],
        up=10.0,
    ),
    31: known(
        lambda x: 9 * x[0] ** 2 + x[1] ** 2 + 9 * x[2] ** 2,
        [1.0, 1, 1],
        6,
        ineq=lambda x: 1 - x[0] * x[1],
        lo=[-10.0, 1.0, -10.0],
        up=[10.0, 10.0, 1.0],
    ),
    32: known(
        lambda x: (x[0] + 3 * x[1] + x[2]) ** 2 + 4 * (x[0] - x[1]) ** 2,
        [0.1, 0.7, 0.2],
        1,
        eq=lambda x: 1 - x.sum(),
        ineq=lambda x: -(6 * x[1] + 4 * x[2] - x[0] ** 3 - 3),
        lo=0.0,
    ),
    33: known(
        lambda x: (x[0] - 1) * (x[0] - 2) * (x[0] - 3) + x[2],
        [0.0, 0, 3],
        2**0.5 - 6,
        ineq=[lambda x: -(x[2] ** 2) + x[1] ** 2 + x[0] ** 2, lambda x: 4 - x.square().sum()],
        lo=0.0,
        up=[inf, inf, 5.0],
    ),
    34: known(
        lambda x: -x[0],
        [0.0, 1.05, 2.9],
        -0.8340324452,
        ineq=[lambda x: -x[1] + torch.exp(x[0]), lambda x: -x[2] + torch.exp(x[1])],
        lo=0.0,
        up=[100.0, 100.0, 10.0],
    ),
    35: known(
        lambda x: (
            9
            - 8 * x[0]
            - 6 * x[1]
            - 4 * x[2]
            + 2 * x[0] ** 2
            + 2 * x[1] ** 2
            + x[2] ** 2
            + 2 * x[0] * x[1]
            + 2 * x[0] * x[2]
        ),
        [0.5, 0.5, 0.5],
        1 / 9,
        ineq=lambda x: x[0] + x[1] + 2 * x[2] - 3,
        lo=0.0,
    ),
    36: known(
        lambda x: -x[0] * x[1] * x[2],
        [10.0, 10, 10],
        -3300,
        ineq=lambda x: x[0] + 2 * x[1] + 2 * x[2] - 72,
        lo=0.0,
        up=[20.0, 11.0, 42.0],
    ),
    37: known(
        lambda x: -x[0] * x[1] * x[2],
        [10.0, 10, 10],
        -3456,
        ineq=[lambda x: x[0] + 2 * x[1] + 2 * x[2] - 72, lambda x: -(x[0] + 2 * x[1] + 2 * x[2])],
        lo=0.0,
        up=42.0,
    ),
    38: known(
        lambda x: (
            100 * (x[1] - x[0] ** 2) ** 2
            + (1 - x[0]) ** 2
            + 90 * (x[3] - x[2] ** 2) ** 2
            + (1 - x[2]) ** 2
            + 10.1 * ((x[1] - 1) ** 2 + (x[3] - 1) ** 2)
            + 19.8 * (x[1] - 1) * (x[3] - 1)
        ),
        [-3.0, -1, -3, -1],
        0,
        lo=-10.0,
        up=10.0,
    ),
    39: known(
        lambda x: -x[0],
        [2.0, 2, 2, 2],
        -1,
        eq=[lambda x: x[1] - x[0] ** 3 - x[2] ** 2, lambda x: x[0] ** 2 - x[1] - x[3] ** 2],
    ),
    40: known(
        lambda x: -x.prod(),
        [0.8, 0.8, 0.8, 0.8],
        -0.25,
        eq=[
            lambda x: x[0] ** 3 + x[1] ** 2 - 1,
            lambda x: x[0] ** 2 * x[3] - x[2],
            lambda x: x[3] ** 2 - x[1],
        ],
    ),
    41: known(
        lambda x: 2 - x[0] * x[1] * x[2],
        [2.0, 2, 2, 2],
        52 / 27,
        eq=lambda x: x[0] + 2 * x[1] + 2 * x[2] - x[3],
        lo=0.0,
        up=[1.0, 1.0, 1.0, 2.0],
    ),
    43: known(
        lambda x: (
            x[0] ** 2 + x[1] ** 2 + 2 * x[2] ** 2 + x[3] ** 2 - 5 * x[0] - 5 * x[1] - 21 * x[2] + 7 * x[3]
        ),
        [0.0, 0, 0, 0],
        -44,
        ineq=[
            lambda x: -(8 - x[0] ** 2 - x[1] ** 2 - x[2] ** 2 - x[3] ** 2 - x[0] + x[1] - x[2] + x[3]),
            lambda x: -(10 - x[0] ** 2 - 2 * x[1] ** 2 - x[2] ** 2 - 2 * x[3] ** 2 + x[0] + x[3]),
            lambda x: -(5 - 2 * x[0] ** 2 - x[1] ** 2 - x[2] ** 2 - 2 * x[0] + x[1] + x[3]),
        ],
    ),
    45: known(lambda x: 2 - x.prod() / 120, [2.0, 2, 2, 2, 2], 1, lo=0.0, up=[1.0, 2.0, 3.0, 4.0, 5.0]),
    60: known(
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4,
        [2.0, 2, 2],
        0.03256820025,
        eq=lambda x: x[0] * (1 + x[1] ** 2) + x[2] ** 4 - 4 - 3 * 2**0.5,
        lo=-10.0,
        up=10.0,
    ),
    63: known(
        lambda x: 1000 - x[0] ** 2 - 2 * x[1] ** 2 - x[2] ** 2 - x[0] * x[1] - x[0] * x[2],
        [2.0, 2, 2],
        961.7151721,
        eq=[lambda x: 8 * x[0] + 14 * x[1] + 7 * x[2] - 56, lambda x: x.square().sum() - 25],
        lo=0.0,
    ),
    64: known(
        lambda x: 5 * x[0] + 50000 / x[0] + 20 * x[1] + 72000 / x[1] + 10 * x[2] + 144000 / x[2],
        [1.0, 1, 1],
        6299.842428,
        ineq=lambda x: -(1 - 4 / x[0] - 32 / x[1] - 120 / x[2]),
        lo=1e-5,
    ),
    65: known(
        lambda x: (x[0] - x[1]) ** 2 + (x[0] + x[1] - 10) ** 2 / 9 + (x[2] - 5) ** 2,
        [-5.0, 5, 0],
        0.9535288567,
        ineq=lambda x: x.square().sum() - 48,
        lo=[-4.5, -4.5, -5.0],
        up=[4.5, 4.5, 5.0],
    ),
    66: known(
        lambda x: 0.2 * x[2] - 0.8 * x[0],
        [0.0, 1.05, 2.9],
        0.5181632741,
        ineq=[lambda x: -x[1] + torch.exp(x[0]), lambda x: -x[2] + torch.exp(x[1])],
        lo=0.0,
        up=[100.0, 100.0, 10.0],
    ),
    71: known(
        lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
        [1.0, 5, 5, 1],
        17.0140173,
        eq=lambda x: x.square().sum() - 40,
        ineq=lambda x: 25 - x.prod(),
        lo=1.0,
        up=5.0,
    ),
    72: known(
        lambda x: 1 + x.sum(),
        [1.0, 1, 1, 1],
        727.67937,
        ineq=[
            lambda x: 4 / x[0] + 2.25 / x[1] + 1 / x[2] + 0.25 / x[3] - 0.0401,
            lambda x: 0.16 / x[0] + 0.36 / x[1] + 0.64 / x[2] + 0.64 / x[3] - 0.010085,
        ],
        lo=0.001,
        up=[4e5, 3e5, 2e5, 1e5],
    ),
    73: known(
        lambda x: 24.55 * x[0] + 26.75 * x[1] + 39 * x[2] + 40.5 * x[3],
        [1.0, 1, 1, 1],
        29.89437816,
        eq=lambda x: x.sum() - 1,
        ineq=[
            lambda x: -(2.3 * x[0] + 5.6 * x[1] + 11.1 * x[2] + 1.3 * x[3] - 5),
            lambda x: (
                -(
                    12 * x[0]
                    + 11.9 * x[1]
                    + 41.8 * x[2]
                    + 52.1 * x[3]
                    - 21
                    - 1.645
                    * torch.sqrt(0.28 * x[0] ** 2 + 0.19 * x[1] ** 2 + 20.5 * x[2] ** 2 + 0.62 * x[3] ** 2)
                )
            ),
        ],
        lo=0.0,
    ),
    74: known(
        lambda x: 3 * x[0] + 1e-6 * x[0] ** 3 + 2 * x[1] + 2e-6 / 3 * x[1] ** 3,
        [0.0, 0, 0, 0],
        5126.4981,
        eq=[
            lambda x: 1000 * torch.sin(-x[2] - 0.25) + 1000 * torch.sin(-x[3] - 0.25) + 894.8 - x[0],
            lambda x: 1000 * torch.sin(x[2] - 0.25) + 1000 * torch.sin(x[2] - x[3] - 0.25) + 894.8 - x[1],
            lambda x: 1000 * torch.sin(x[3] - 0.25) + 1000 * torch.sin(x[3] - x[2] - 0.25) + 1294.8,
        ],
        ineq=[lambda x: -(x[3] - x[2] + 0.55), lambda x: -(x[2] - x[3] + 0.55)],
        lo=[0.0, 0.0, -0.55, -0.55],
        up=[1200.0, 1200.0, 0.55, 0.55],
    ),
    76: known(
        lambda x: (
            x[0] ** 2
            + 0.5 * x[1] ** 2
            + x[2] ** 2
            + 0.5 * x[3] ** 2
            - x[0] * x[2]
            + x[2] * x[3]
            - x[0]
            - 3 * x[1]
            + x[2]
            - x[3]
        ),
        [0.5, 0.5, 0.5, 0.5],
        -4.681818181,
        ineq=[
            lambda x: x[0] + 2 * x[1] + x[2] + x[3] - 5,
            lambda x: 3 * x[0] + x[1] + 2 * x[2] - x[3] - 4,
            lambda x: 1.5 - x[1] - 4 * x[2],
        ],
        lo=0.0,
    ),
    77: known(
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6,
        [2.0, 2, 2, 2, 2],
        0.24150513,
        eq=[
            lambda x: x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * 2**0.5,
            lambda x: x[1] + x[2] ** 4 * x[3] ** 2 - 8 - 2**0.5,
        ],
    ),
    78: known(
        lambda x: x.prod(),
        [-2.0, 1.5, 2, -1, -1],
        -2.91970041,
        eq=[
            lambda x: x.square().sum() - 10,
            lambda x: x[1] * x[2] - 5 * x[3] * x[4],
            lambda x: x[0] ** 3 + x[1] ** 3 + 1,
        ],
    ),
    80: known(
        lambda x: torch.exp(x.prod()),
        [-2.0, 2, 2, -1, -1],
        0.0539498478,
        eq=[
            lambda x: x.square().sum() - 10,
            lambda x: x[1] * x[2] - 5 * x[3] * x[4],
            lambda x: x[0] ** 3 + x[1] ** 3 + 1,
        ],
        lo=[-2.3, -2.3, -3.2, -3.2, -3.2],
        up=[2.3, 2.3, 3.2, 3.2, 3.2],
    ),
    81: known(
        lambda x: torch.exp(x.prod()) - 0.5 * (x[0] ** 3 + x[1] ** 3 + 1) ** 2,
        [-2.0, 2, 2, -1, -1],
        0.0539498478,
        eq=[
            lambda x: x.square().sum() - 10,
            lambda x: x[1] * x[2] - 5 * x[3] * x[4],
            lambda x: x[0] ** 3 + x[1] ** 3 + 1,
        ],
        lo=[-2.3, -2.3, -3.2, -3.2, -3.2],
        up=[2.3, 2.3, 3.2, 3.2, 3.2],
    ),
    93: known(
        lambda x: (
            0.0204 * x[0] * x[3] * (x[0] + x[1] + x[2])
            + 0.0187 * x[1] * x[2] * (x[0] + 1.57 * x[1] + x[3])
            + 0.0607 * x[0] * x[3] * x[4] ** 2 * (x[0] + x[1] + x[2])
            + 0.0437 * x[1] * x[2] * x[5] ** 2 * (x[0] + 1.57 * x[1] + x[3])
        ),
        [5.54, 4.4, 12.02, 11.82, 0.702, 0.852],
        135.075961,
        ineq=[
            lambda x: -(0.001 * x.prod() - 2.07),
            lambda x: (
                -(
                    1
                    - 0.00062 * x[0] * x[3] * x[4] ** 2 * (x[0] + x[1] + x[2])
                    - 0.00058 * x[1] * x[2] * x[5] ** 2 * (x[0] + 1.57 * x[1] + x[3])
                )
            ),
        ],
        lo=0.0,
    ),
    100: known(
        lambda x: (
            (x[0] - 10) ** 2
            + 5 * (x[1] - 12) ** 2
            + x[2] ** 4
            + 3 * (x[3] - 11) ** 2
            + 10 * x[4] ** 6
            + 7 * x[5] ** 2
            + x[6] ** 4
            - 4 * x[5] * x[6]
            - 10 * x[5]
            - 8 * x[6]
        ),
        [1.0, 2, 0, 4, 0, 1, 1],
        680.6300573,
        ineq=[
            lambda x: -(127 - 2 * x[0] ** 2 - 3 * x[1] ** 4 - x[2] - 4 * x[3] ** 2 - 5 * x[4]),
            lambda x: -(282 - 7 * x[0] - 3 * x[1] - 10 * x[2] ** 2 - x[3] + x[4]),
            lambda x: -(196 - 23 * x[0] - x[1] ** 2 - 6 * x[5] ** 2 + 8 * x[6]),
            lambda x: -(-4 * x[0] ** 2 - x[1] ** 2 + 3 * x[0] * x[1] - 2 * x[2] ** 2 - 5 * x[5] + 11 * x[6]),
        ],
    ),
    104: known(
        lambda x: 0.4 * x[0] ** 0.67 * x[6] ** -0.67 + 0.4 * x[1] ** 0.67 * x[7] ** -0.67 + 10 - x[0] - x[1],
        [6.0, 3, 0.4, 0.2, 6, 6, 1, 0.5],
        3.9511634396,
        ineq=[
            lambda x: -(1 - 0.0588 * x[4] * x[6] - 0.1 * x[0]),
            lambda x: -(1 - 0.0588 * x[5] * x[7] - 0.1 * x[0] - 0.1 * x[1]),
            lambda x: -(1 - 4 * x[2] / x[4] - 2 * x[2] ** -0.71 / x[4] - 0.0588 * x[2] ** -1.3 * x[6]),
            lambda x: -(1 - 4 * x[3] / x[5] - 2 * x[3] ** -0.71 / x[5] - 0.0588 * x[3] ** -1.3 * x[7]),
            lambda x: (
                1
                - (0.4 * x[0] ** 0.67 * x[6] ** -0.67 + 0.4 * x[1] ** 0.67 * x[7] ** -0.67 + 10 - x[0] - x[1])
            ),
            lambda x: (
                (0.4 * x[0] ** 0.67 * x[6] ** -0.67 + 0.4 * x[1] ** 0.67 * x[7] ** -0.67 + 10 - x[0] - x[1])
                - 4.2
            ),
        ],
        lo=0.1,
        up=10.0,
    ),
    113: known(
        lambda x: (
            x[0] ** 2
            + x[1] ** 2
            + x[0] * x[1]
            - 14 * x[0]
            - 16 * x[1]
            + (x[2] - 10) ** 2
            + 4 * (x[3] - 5) ** 2
            + (x[4] - 3) ** 2
            + 2 * (x[5] - 1) ** 2
            + 5 * x[6] ** 2
            + 7 * (x[7] - 11) ** 2
            + 2 * (x[8] - 10) ** 2
            + (x[9] - 7) ** 2
            + 45
        ),
        [2.0, 3, 5, 5, 1, 2, 7, 3, 6, 10],
        24.3062091,
        ineq=[
            lambda x: -(105 - 4 * x[0] - 5 * x[1] + 3 * x[6] - 9 * x[7]),
            lambda x: -(-10 * x[0] + 8 * x[1] + 17 * x[6] - 2 * x[7]),
            lambda x: -(8 * x[0] - 2 * x[1] - 5 * x[8] + 2 * x[9] + 12),
            lambda x: -(-3 * (x[0] - 2) ** 2 - 4 * (x[1] - 3) ** 2 - 2 * x[2] ** 2 + 7 * x[3] + 120),
            lambda x: -(-5 * x[0] ** 2 - 8 * x[1] - (x[2] - 6) ** 2 + 2 * x[3] + 40),
            lambda x: -(-0.5 * (x[0] - 8) ** 2 - 2 * (x[1] - 4) ** 2 - 3 * x[4] ** 2 + x[5] + 30),
            lambda x: -(-(x[0] ** 2) - 2 * (x[1] - 2) ** 2 + 2 * x[0] * x[1] - 14 * x[4] + 6 * x[5]),
            lambda x: -(3 * x[0] - 6 * x[1] - 12 * (x[8] - 8) ** 2 + 7 * x[9]),
        ],
    ),
}


@pytest.mark.parametrize("solver", ["newton", "casadi:ipopt"])
@pytest.mark.parametrize("number", list(PROBLEMS))
def test_a_published_minimum_is_found(number: int, solver: str) -> None:
    known = PROBLEMS[number]
    solution = ddn.solve(known.problem, {}, solver=solver, initial=known.start)
    assert solution.stats.backend[0] == solver.partition(":")[0]
    assert any(
        solution.objective.item() == pytest.approx(minimum, rel=1e-6, abs=1e-6) for minimum in known.minima
    )


@pytest.mark.parametrize("steep", [1e3, 1e7])
def test_a_row_that_is_steep_in_a_variable_at_its_bound_is_no_cusp(steep: float) -> None:
    """What it holds of the free variables is little beside that, but not nothing."""
    problem = ddn.Problem(
        {"u": (2,)},
        {"a": ()},
        lambda u, a: (u[1] - a) ** 2 + 3 * u[0] + 0.1 * u[0] ** 4,
        inequality=lambda u: steep * (u[0] - 1) + u[1] - 0.5,
        bounds={"u": (torch.tensor([1.0, -inf], dtype=D), None)},
    )
    a = torch.tensor(2.0, dtype=D, requires_grad=True)
    solution = ddn.solve(problem, {"a": a})
    assert solution.certificate.ok
    (gradient,) = torch.autograd.grad(solution["u"][1], a)
    assert abs(gradient.item()) < 1e-9


def test_a_cusp_has_no_multipliers_and_is_no_kkt_point() -> None:
    """Number 13 with a parameter: at (1, 0) the objective pushes to where the gradients of constraint and bound do not.

    Multipliers without limit balance it nearly, in a system that is regular once its rows are equilibrated.
    """
    problem = ddn.Problem(
        {"x": (2,)},
        {"t": ()},
        lambda x, t: (x[0] - 2) ** 2 + x[1] ** 2 + t * x[1],
        inequality=lambda x: x[1] - (1 - x[0]) ** 3,
        bounds={"x": (0, None)},
    )
    t, start = torch.tensor(0.0, dtype=D, requires_grad=True), torch.tensor([-2.0, -2.0], dtype=D)
    with pytest.raises(ddn.SolveError, match="not a KKT point") as refused:
        ddn.solve(problem, {"t": t}, initial=start)
    last = refused.value.solution
    torch.testing.assert_close(last["x"].detach(), torch.tensor([1.0, 0.0], dtype=D), rtol=0, atol=1e-2)
    assert not last.certificate.ok
    with pytest.raises(ddn.SensitivityError, match="not a KKT point"):
        ddn.sensitivity(problem, {"t": t}, torch.tensor([1.0, 0.0], dtype=D))
