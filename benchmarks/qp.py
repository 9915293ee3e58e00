"""T1 and T2: dense strictly convex quadratic programs, all six blocks differentiated, beside every peer that is there.

    T1   64 problems, n = 50, 25 equalities, 50 inequalities
    T2   one problem, n = 200, 100 equalities, 200 inequalities

One process, one thread, medians of calls that take turns (``contest.py``). Problems are built around a KKT point with a
known active set; reference gradients solve its KKT system with residuals in extended precision. Errors are relative to
the largest entry of a block, the worst block's is shown. Run it as ``python benchmarks/qp.py [T1 T2]`` where the peers
are installed (``pip install moreau proxsuite cvxpylayers jaxopt libdqp``, ``pip install --no-deps qpth``).
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch
from contest import Reference, contest, refined
from peers import QP
from rich.console import Console

BLOCKS = ("P", "q", "A", "b", "G", "h")
SIZES = {"T1": (64, 50, 25, 50), "T2": (1, 200, 100, 200)}
REPEATS = {"T1": 15, "T2": 25}


def reference(batch: int, n: int, m: int, k: int, seed: int = 0) -> Reference:
    g = np.random.default_rng(seed)
    L, A, G = (
        g.standard_normal((batch, n, n)),
        g.standard_normal((batch, m, n)),
        g.standard_normal((batch, k, n)),
    )
    P = L @ L.transpose(0, 2, 1) / n + 0.1 * np.eye(n)
    u, nu = g.standard_normal((batch, n)), g.standard_normal((batch, m))
    active = np.arange(k) < (n - m) // 2
    lam = np.where(active, 0.1 + g.random((batch, k)), 0.0)
    slack = np.where(active, 0.0, 0.1 + g.random((batch, k)))
    v = g.standard_normal((batch, n))

    def times(M: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.einsum("bij,bj->bi", M, x)

    data = {"P": P, "A": A, "G": G, "b": times(A, u), "h": times(G, u) + slack}
    data["q"] = -(times(P, u) + times(A.transpose(0, 2, 1), nu) + times(G.transpose(0, 2, 1), lam))
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value)).requires_grad_() for name, value in data.items()
    }
    tensors = {name: tensors[name] for name in BLOCKS}
    return Reference(tensors, torch.from_numpy(v), *_exact(data, v, active, u), symmetric=("P",))


def _exact(
    data: dict[str, np.ndarray], v: np.ndarray, active: np.ndarray, near: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The solution of the data as rounded, and its gradients; refined with residuals in long double."""
    batch, n = near.shape
    u, gradients = np.empty_like(near), {name: np.zeros_like(data[name]) for name in BLOCKS}
    for i in range(batch):
        P, q, A, b, G, h = (data[name][i] for name in BLOCKS)
        rows = np.concatenate([A, G[active]])
        K = np.block([[P, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
        point = refined(K, np.concatenate([-q, b, h[active]]))
        w = refined(K, np.concatenate([v[i], np.zeros(len(rows))]))
        u[i], y, (w, s) = point[:n], point[n:], (w[:n], w[n:])
        both, m = -(np.outer(y, w) + np.outer(s, u[i])), len(b)
        gradients["P"][i], gradients["q"][i] = -(np.outer(w, u[i]) + np.outer(u[i], w)) / 2, -w
        gradients["A"][i], gradients["b"][i] = both[:m], s[:m]
        gradients["G"][i][active], gradients["h"][i][active] = both[m:], s[m:]
    return u, gradients


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or SIZES:
        Console(width=120).print(contest(name, reference(*SIZES[name]), QP, REPEATS[name]))


if __name__ == "__main__":
    main()
