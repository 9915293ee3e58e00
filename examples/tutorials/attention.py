"""Attention as two optimization problems, one after the other.

    p(s) = argmin_p  -s^T p + sum_i p_i log p_i   subject to   sum(p) = 1        s = K q / sqrt(d)
    o(p) = argmin_o  1/2 sum_i p_i |o - v_i|^2

Closed form: p = softmax(s), the entropy-regularised argmax, and o = sum_i p_i v_i, the weighted mean:
``scaled_dot_product_attention``, with its gradient. Change the entropy to 1/2 |p|^2 with p >= 0 and the
attention is sparse; change the square to a robust penalty and values that do not agree lose their say.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import ddn_solvers as ddn

QUERIES, KEYS, WIDTH = 6, 20, 8

weights = ddn.Problem(
    variables={"p": (KEYS,)},
    parameters={"s": (KEYS,)},
    objective=lambda p, s: (p * p.log()).sum() - s @ p,
    equality={"total": lambda p: p.sum() - 1},
    bounds={"p": (0.0, None)},  # never active: the slope of x log x is infinite at zero
)
output = ddn.Problem(
    variables={"o": (WIDTH,)},
    parameters={"p": (KEYS,), "v": (KEYS, WIDTH)},
    objective=lambda o, p, v: 0.5 * (p @ (o - v).square()).sum(),
)


class Result(NamedTuple):
    """Both ways, detached: outputs (QUERIES, WIDTH) and gradients of a loss by queries, keys and values."""

    found: torch.Tensor
    expected: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    expected_gradients: tuple[torch.Tensor, ...]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, solver: str = "auto") -> torch.Tensor:
    """Attend with queries (QUERIES, WIDTH) to keys and values (KEYS, WIDTH): a batch of QUERIES problems."""
    scores = q @ k.T / math.sqrt(WIDTH)
    uniform = torch.full((KEYS,), 1 / KEYS, dtype=q.dtype)
    p = ddn.solve(weights, {"s": scores}, solver=solver, initial=uniform)["p"]
    return ddn.solve(output, {"p": p, "v": v}, solver=solver)["o"]


def main(solver: str = "auto") -> Result:
    """Attend both ways, print how far they are apart, and return both."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        for rows in (QUERIES, KEYS, KEYS, QUERIES)
    )
    inputs = tuple(tensor.requires_grad_() for tensor in (q, k, v))
    values, gradients = [], []
    for result in (attention(q, k, v, solver), scaled_dot_product_attention(q, k, v)):
        values.append(result.detach())
        gradients.append(torch.autograd.grad(result, inputs, cotangent))
    apart = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    print(f"outputs    apart by {(values[0] - values[1]).abs().max():.1e}")
    print(f"gradients  apart by {apart:.1e}")
    return Result(*values, *gradients)


if __name__ == "__main__":
    main()
