"""What libraries do with quadratic programs that have no answer, side by side.

Each case is given to each peer of ``peers.py``, set up as there; said is whether it raises, and else
whether point and gradient are numbers that look like an answer. Run it as ``python benchmarks/failures.py``.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable

import torch
from peers import QP, Tensors
from rich.console import Console
from rich.table import Table

N, M, K, BATCH = 6, 2, 4, 3
D = torch.float64


def good() -> dict[str, torch.Tensor]:
    """Three strictly convex problems with an interior."""
    g = torch.Generator().manual_seed(0)
    L, A, G = (torch.randn(BATCH, rows, N, generator=g, dtype=D) for rows in (N, M, K))
    u, q = (torch.randn(BATCH, N, generator=g, dtype=D) for _ in range(2))
    P = L @ L.mT / N + 0.1 * torch.eye(N, dtype=D)
    b, h = (A @ u[..., None])[..., 0], (G @ u[..., None])[..., 0] + 0.5
    return {"P": P, "q": q, "A": A, "b": b, "G": G, "h": h}


def infeasible(samples: slice) -> dict[str, torch.Tensor]:
    """Two parallel inequalities that contradict."""
    t = good()
    t["G"][samples, 1] = -t["G"][samples, 0]
    t["h"][samples, 1] = -t["h"][samples, 0] - 1.0
    return t


def unbounded() -> dict[str, torch.Tensor]:
    """No curvature and no constraint along one direction, and a force there."""
    t = good()
    for name in ("P", "A", "G"):
        t[name][..., 0] = 0.0
    t["P"][:, 0] = 0.0
    return t


def not_a_number() -> dict[str, torch.Tensor]:
    t = good()
    t["q"][1, 2] = float("nan")
    return t


CASES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "all infeasible": lambda: infeasible(slice(None)),
    "one of three infeasible": lambda: infeasible(slice(1, 2)),
    "unbounded": unbounded,
    "a NaN in q of one": not_a_number,
}


def outcome(
    make: Callable[[Tensors], Callable[[Tensors], torch.Tensor]], tensors: dict[str, torch.Tensor]
) -> str:
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            u = make({k: v.detach() for k, v in leaves.items()})(leaves)
            gradient = torch.autograd.grad(u.sum(), leaves["q"])[0]
        except ImportError as error:
            return f"not installed: {error.name}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of compiled code is no Exception
            return f"raises {type(error).__name__}"
    said = " with a warning" if any(issubclass(w.category, UserWarning) for w in caught) else ""
    point, slope = bool(u.isfinite().all()), bool(gradient.isfinite().all())
    if point and slope:
        return f"a point and a gradient{said}"
    return f"{'a point' if point else 'NaN'}, {'a gradient' if slope else 'NaN gradient'}{said}"


def main() -> None:
    table = Table("library", *CASES)
    for peer, make in QP.items():
        table.add_row(peer, *(outcome(make, case()) for case in CASES.values()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
