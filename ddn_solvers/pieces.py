"""A graph with kinks as smooth pieces that meet on manifolds.

Every kink that is known here is that of a Euclidean norm |r|, an absolute value where r is one number:

    relu(a) = (a + |a|) / 2,     max(a, b) = (a + b + |a - b|) / 2,     |a|_inf = a tree of max over |a_i|, ...

In the rewritten graph each |r| stands as  sigma |r| + tau  (sigma r + tau for one number) with two more
inputs: sigma = sign(r) selects the smooth piece, and sigma = 0 stands for the kink itself, where r = 0 is an
equation like any other constraint. Its multiplier mu is the part of the subgradient that belongs to the kink:

    L = f + y^T c + mu^T r,     |mu| <= w,     w = dL/dtau

so that the point is stationary in the sense of Clarke if w >= |mu|. On the manifold r = 0 everything is
smooth: there the derivative is that of an equality-constrained problem (Gould et al. 2019, section 4.7, the
Dzy of section 5). Operations that step, or that order their arguments, have no such pieces and stay.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ddn_solvers.trace import dependent_nodes, operation_name, retrace

Index = np.ndarray[Any, np.dtype[np.intp]]
_LEAF = -1


@dataclass(frozen=True)
class Kink:
    """Where a term of the problem is not differentiable."""

    operation: str
    source: str

    def __str__(self) -> str:
        return f"'{self.operation}' at {self.source}" if self.source else f"'{self.operation}'"


@dataclass(frozen=True, eq=False)
class Pieces:
    """The kinks of a graph, one row r_i each (several for the norm of a vector), and the graph without them.

    Attributes:
        smooth: The graph with inputs sigma and tau, (rows,) each, behind its own, and r behind its outputs.
        kinks: What each row belongs to.
        group: Number of the norm that each row belongs to, nondecreasing.
        branches: Rows of the maxima that are compared in a row, (rows, 2); -1 for none.
    """

    smooth: fx.GraphModule
    kinks: tuple[Kink, ...]
    group: Index
    branches: Index

    @property
    def first(self) -> Index:
        """The first row of each group."""
        return np.flatnonzero(np.diff(self.group, prepend=-1))

    @property
    def is_number(self) -> Any:
        """Whether r is one number, (rows,) bool: then sigma is its sign, and 1 otherwise."""
        return np.bincount(self.group)[self.group] == 1


def find_pieces(module: fx.GraphModule, variables: int) -> Pieces | None:
    """The smooth pieces of ``module``, whose first inputs are ``variables``; ``None`` if it has no known kink.

    Where only some of its kinks are known, the others stay in the graph.
    """
    targets = dependent_nodes(module, 0, variables)
    if not any(node in targets and node.op == "call_function" and _rule(node) for node in module.graph.nodes):
        return None
    shapes = _shapes(module)
    counted = _Kinks()
    _Rewriting(module, targets, counted).run(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    twins = _twins(module, targets, shapes, counted)
    own, count = twins.own, int(twins.own.sum())

    def smooth(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *given, sigma, tau = inputs
        kinks = _Kinks(sigma, tau, twins)
        outputs = _Rewriting(module, targets, kinks).run(*given)
        rows = torch.cat(kinks.rows)
        return (*outputs, rows if own.all() else _entries(rows, np.flatnonzero(own)))

    branches = np.array(counted.branches, dtype=np.intp)[own]
    return Pieces(
        retrace(smooth, [*shapes, (count,), (count,)]),
        tuple(kink for kink, keep in zip(counted.kinks, own, strict=True) if keep),
        np.unique(np.array(counted.group)[own], return_inverse=True)[1],
        np.where(branches == _LEAF, _LEAF, twins.place[branches]),
    )


@dataclass(frozen=True)
class _Twins:
    """Rows that are another one, or minus another one, whatever the inputs: one kink that is written twice.

    Attributes:
        own: Rows that are kept, (rows,) bool.
        place: Of each row, among those that are kept, the one that stands for it.
        sign: 1 or -1, (rows,).
    """

    own: Any
    place: Index
    sign: Any


def _twins(
    module: fx.GraphModule, targets: set[fx.Node], shapes: Sequence[tuple[int, ...]], counted: _Kinks
) -> _Twins:
    """Rows of single numbers that are compared with no others and agree to the last bit at two points."""
    group, compared = np.array(counted.group), {k for pair in counted.branches for k in pair}
    alone = np.bincount(group)[group] == 1
    alone &= np.array([pair == (_LEAF, _LEAF) for pair in counted.branches])
    alone &= ~np.isin(np.arange(counted.count), list(compared))
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(2):
        inputs = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        sigma, tau = torch.rand(2, counted.count, generator=generator, dtype=torch.float64)
        kinks = _Kinks(sigma, tau)
        try:
            _Rewriting(module, targets, kinks).run(*inputs)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is there; of a matrix that such numbers make
            alone[:] = False
            break
        values.append(torch.cat(kinks.rows).numpy())
    own, place, sign = np.ones(counted.count, dtype=bool), np.arange(counted.count), np.ones(counted.count)
    first: dict[bytes, int] = {}
    for k in np.flatnonzero(alone):
        at = np.array([value[k] for value in values])
        if not np.isfinite(at).all() or not at.any():
            continue
        sign[k] = 1.0 if at[at != 0][0] > 0 else -1.0
        place[k] = first.setdefault((sign[k] * at + 0.0).tobytes(), int(k))
        own[k] = place[k] == k
    sign = sign * sign[place]
    return _Twins(own, (np.cumsum(own) - 1)[place], sign)


def lift(pieces: Pieces, variables: int) -> tuple[fx.GraphModule, int]:
    """The graph with a variable t, (groups,), behind its own in place of each |r|, and |r| <= t.

    Returns:
        The graph, the inequalities |r| <= t (rows <= 0) behind its outputs, and their number.
    """
    groups, rows = len(pieces.first), len(pieces.kinks)
    on_kinks = retrace(lambda t: (torch.zeros(rows, dtype=t.dtype), _entries(t, pieces.group)), [(groups,)])
    epigraph = retrace(lambda r, t: (_epigraph(r, t, pieces.group),), [(rows,), (groups,)])
    graph, constants = fx.Graph(), torch.nn.Module()

    def inline(module: fx.GraphModule, values: Sequence[fx.Node]) -> Any:
        nodes = dict(zip(module.graph.find_nodes(op="placeholder"), values, strict=True))
        for node in module.graph.find_nodes(op="get_attr"):
            name = f"constant{len(constants._buffers)}"
            constants.register_buffer(name, operator.attrgetter(str(node.target))(module))
            nodes[node] = graph.create_node("get_attr", name)
            nodes[node].meta = dict(node.meta)
        return graph.graph_copy(module.graph, nodes)

    own = [graph.node_copy(node) for node in pieces.smooth.graph.find_nodes(op="placeholder")[:variables]]
    t = graph.node_copy(on_kinks.graph.find_nodes(op="placeholder")[0])
    own += [graph.node_copy(node) for node in pieces.smooth.graph.find_nodes(op="placeholder")[variables:-2]]
    *outputs, r = inline(pieces.smooth, [*own, *inline(on_kinks, [t])])
    (inequalities,) = inline(epigraph, [r, t])
    graph.output((*outputs, inequalities))
    return fx.GraphModule(constants, graph), int(inequalities.meta["val"].numel())


def _shapes(module: fx.GraphModule) -> list[tuple[int, ...]]:
    return [tuple(node.meta["val"].shape) for node in module.graph.find_nodes(op="placeholder")]


def _epigraph(r: torch.Tensor, t: torch.Tensor, group: Index) -> torch.Tensor:
    """|r| <= t, as r - t and -r - t where r is one number and as |r|^2 - t^2 where it is a vector, <= 0."""
    sizes = np.bincount(group)
    single, several = np.flatnonzero(sizes[group] == 1), np.flatnonzero(sizes > 1)
    one, bound = _entries(r, single), _entries(t, group[single])
    parts = [one - bound, -one - bound]
    if len(several):
        members = torch.from_numpy((several[:, None] == group).astype(float))
        long = _entries(t, several)
        parts += [members @ r.square() - long.square(), -long]
    return torch.cat(parts)


def _entries(values: torch.Tensor, index: Index) -> torch.Tensor:
    return values.index_select(0, torch.from_numpy(index))


class _Kinks:
    """Hands out sigma and tau, and collects the rows r that go with them.

    Args:
        sigma: The input; without one the kinks are only counted.
        tau: The input.
        twins: Which rows stand for which.
    """

    def __init__(
        self,
        sigma: torch.Tensor | None = None,
        tau: torch.Tensor | None = None,
        twins: _Twins | None = None,
    ) -> None:
        self._sigma, self._tau, self._twins = sigma, tau, twins
        self.rows: list[torch.Tensor] = []
        self.kinks: list[Kink] = []
        self.group: list[int] = []
        self.branches: list[tuple[int, int]] = []
        self.count = 0
        self.operation = self.source = ""

    def norm(self, r: torch.Tensor) -> torch.Tensor:
        """|r| over the last dimension."""
        size, groups = r.shape[-1], math.prod(r.shape[:-1])
        if size == 1:
            return _absolute(self, r.squeeze(-1))
        sigma, tau = self._take(r, np.repeat(np.arange(groups), size))
        on = sigma[..., 0]
        offset = torch.from_numpy(np.eye(1, size)[0])
        # On the kink nothing of the root may remain, nor of its derivative: 0 * sqrt(1) is both.
        inside = (r + (1 - on.square()).unsqueeze(-1) * offset).square().sum(-1)
        return on * inside.sqrt() + tau[..., 0]

    def absolute(self, r: torch.Tensor, branches: Index | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """sigma and tau with |r| = sigma r + tau, element by element."""
        return self._take(r, np.arange(r.numel()), branches)

    def _take(
        self, r: torch.Tensor, group: Index, branches: Index | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = self.count, self.count + r.numel()
        self.count = stop
        self.rows.append(r.reshape(-1))
        self.kinks += [Kink(self.operation, self.source)] * r.numel()
        self.group += (group + (self.group[-1] + 1 if self.group else 0)).tolist()
        none = np.full((r.numel(), 2), _LEAF)
        self.branches += map(tuple, (none if branches is None else branches).tolist())
        if self._sigma is None or self._tau is None:
            return torch.zeros_like(r), torch.zeros_like(r)
        if self._twins is None or self._twins.own.all():
            return self._sigma[start:stop].reshape(r.shape), self._tau[start:stop].reshape(r.shape)
        place, sign = (torch.from_numpy(v[start:stop]) for v in (self._twins.place, self._twins.sign))
        return (sign * self._sigma[place]).reshape(r.shape), self._tau[place].reshape(r.shape)


class _Rewriting(fx.Interpreter):
    """Runs a graph with the rule of this module in place of each operation that has a kink in the variables."""

    def __init__(self, module: fx.GraphModule, targets: set[fx.Node], kinks: _Kinks) -> None:
        super().__init__(module)
        self._targets, self._kinks = targets, kinks

    def run_node(self, n: fx.Node) -> Any:
        rule = _rule(n) if n in self._targets and n.op == "call_function" else None
        source = n.meta.get("source", "")
        with _labelled(source):
            if rule is None:
                return super().run_node(n)
            self._kinks.operation, self._kinks.source = operation_name(n), source
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return rule(self._kinks, *args, **kwargs)


def replay(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The outputs of ``module``; in a trace its nodes keep the user's lines."""
    outputs: Sequence[torch.Tensor] = _Rewriting(module, set(), _Kinks()).run(*inputs)
    return outputs


@contextlib.contextmanager
def _labelled(source: str) -> Iterator[None]:
    """Nodes that are traced meanwhile belong to the user's line ``source``."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    root = mode.tracer.graph._root
    before = root._prev
    yield
    node = root._prev
    while node is not before:
        node.meta.setdefault("source", source)
        node = node._prev


# -- rules: what each operation is in terms of |r| -----------------------------------------------------

Rule = Callable[..., Any]
_RULES: dict[str, Rule] = {}


def _rule(node: fx.Node) -> Rule | None:
    if getattr(node.target, "namespace", None) != "aten":
        return None
    name = operation_name(node)
    overload = node.target._overloadname  # type: ignore[union-attr]  # has a namespace, so it is an OpOverload
    found = _RULES.get(f"{name}.{overload}") or _RULES.get(name)
    if name in _WITH_INDICES and overload == "dim" and _uses_indices(node):
        return None
    if name in _NORMS and not _known_order(node):
        return None
    return found


_WITH_INDICES = ("max", "min")
_NORMS = ("linalg_vector_norm", "linalg_norm", "cdist", "pairwise_distance")


def _uses_indices(node: fx.Node) -> bool:
    return any(user.args[1] != 0 for user in node.users if len(user.args) > 1)


def _known_order(node: Any) -> bool:
    """Whether a norm is one that is known here: of vectors, and of order 1, 2 or infinity."""
    of_pairs = operation_name(node) in ("cdist", "pairwise_distance")
    place, keyword = (2, "p") if of_pairs else (1, "ord")
    order = node.args[place] if len(node.args) > place else node.kwargs.get(keyword, 2)
    if order not in (None, 1, 2, math.inf, -math.inf):
        return False
    if operation_name(node) != "linalg_norm" or order is None or node.args[0].meta["val"].dim() == 1:
        return True
    dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    return isinstance(dims, int) or (dims is not None and len(dims) == 1)


def _has_kink(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _bent(kinks: _Kinks, x: torch.Tensor, below: Any, above: Any) -> torch.Tensor:
    """below * x for x < 0, above * x for x > 0."""
    sigma, tau = kinks.absolute(x)
    middle, half = (above + below) / 2, (above - below) / 2
    return (middle + half * sigma) * x + half * tau


def _larger(kinks: _Kinks, a: Any, b: Any, branches: Index | None = None) -> torch.Tensor:
    sigma, tau = kinks.absolute(a - b, branches)
    return (1 + sigma) / 2 * a + (1 - sigma) / 2 * b + tau / 2


def _smaller(kinks: _Kinks, a: Any, b: Any) -> torch.Tensor:
    return -_larger(kinks, -a, -b)


def _between(kinks: _Kinks, x: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """Clamped; a side that is absent or infinite has no kink."""
    for side, choose in ((low, _larger), (high, _smaller)):
        if side is not None and not (isinstance(side, int | float) and math.isinf(side)):
            x = choose(kinks, x, side)
    return x


def _largest(kinks: _Kinks, x: torch.Tensor, dims: Any, keepdim: bool) -> torch.Tensor:
    """Maximum over dimensions, two halves at a time."""
    chosen = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(x.dim()))
    chosen = sorted(d % x.dim() for d in chosen) if x.dim() else []
    kept = [d for d in range(x.dim()) if d not in chosen]
    shape = (
        [1 if d in chosen else x.shape[d] for d in range(x.dim())] if keepdim else [x.shape[d] for d in kept]
    )
    values = x.permute(kept + chosen).reshape(math.prod(x.shape[d] for d in kept), -1)
    rows = np.full(tuple(values.shape), _LEAF)
    while (size := values.shape[1]) > 1:
        half = size // 2
        start = kinks.count
        branches = np.stack([rows[:, :half], rows[:, half : 2 * half]], axis=-1).reshape(-1, 2)
        larger = _larger(kinks, values[:, :half], values[:, half : 2 * half], branches)
        values = torch.cat([larger, values[:, 2 * half :]], dim=1)
        new = np.arange(start, kinks.count).reshape(-1, half)
        rows = np.concatenate([new, rows[:, 2 * half :]], axis=1)
    return values.reshape(shape)


def _vector_norm(kinks: _Kinks, x: torch.Tensor, order: Any, dims: Any, keepdim: bool) -> torch.Tensor:
    if order == 1:
        return _absolute(kinks, x).sum(dims, keepdim) if dims is not None else _absolute(kinks, x).sum()
    if order in (math.inf, -math.inf):
        sign = 1.0 if order > 0 else -1.0
        return sign * _largest(kinks, sign * _absolute(kinks, x), dims, keepdim)
    chosen = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(x.dim()))
    chosen = sorted(d % x.dim() for d in chosen) if x.dim() else []
    kept = [d for d in range(x.dim()) if d not in chosen]
    shape = (
        [1 if d in chosen else x.shape[d] for d in range(x.dim())] if keepdim else [x.shape[d] for d in kept]
    )
    return kinks.norm(x.permute(kept + chosen).reshape(*(x.shape[d] for d in kept), -1)).reshape(shape)


@_has_kink("abs")
def _absolute(kinks: _Kinks, x: torch.Tensor) -> torch.Tensor:
    return _bent(kinks, x, -1.0, 1.0)


@_has_kink("relu")
def _relu(kinks: _Kinks, x: torch.Tensor) -> torch.Tensor:
    return _bent(kinks, x, 0.0, 1.0)


@_has_kink("leaky_relu")
def _leaky_relu(kinks: _Kinks, x: torch.Tensor, slope: float = 0.01) -> torch.Tensor:
    return _bent(kinks, x, slope, 1.0)


@_has_kink("prelu", "_prelu_kernel")
def _prelu(kinks: _Kinks, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.numel() > 1 and x.dim() > 1:
        weight = weight.reshape(-1, *[1] * (x.dim() - 2))
    return _bent(kinks, x, weight, 1.0)


@_has_kink("elu")
def _elu(kinks: _Kinks, x: torch.Tensor, alpha: float = 1, scale: float = 1, rate: float = 1) -> torch.Tensor:
    positive = _relu(kinks, x)
    return scale * (positive + alpha * torch.expm1(rate * (x - positive)))


@_has_kink("celu")
def _celu(kinks: _Kinks, x: torch.Tensor, alpha: float = 1) -> torch.Tensor:
    return _elu(kinks, x, alpha, 1, 1 / alpha)


@_has_kink("selu")
def _selu(kinks: _Kinks, x: torch.Tensor) -> torch.Tensor:
    return _elu(kinks, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@_has_kink("clamp", "clip")
def _clamp(kinks: _Kinks, x: torch.Tensor, min: Any = None, max: Any = None) -> torch.Tensor:
    return _between(kinks, x, min, max)


@_has_kink("hardtanh")
def _hardtanh(kinks: _Kinks, x: torch.Tensor, low: float = -1, high: float = 1) -> torch.Tensor:
    return _between(kinks, x, low, high)


@_has_kink("clamp_min")
def _clamp_min(kinks: _Kinks, x: torch.Tensor, low: Any) -> torch.Tensor:
    return _between(kinks, x, low, None)


@_has_kink("clamp_max")
def _clamp_max(kinks: _Kinks, x: torch.Tensor, high: Any) -> torch.Tensor:
    return _between(kinks, x, None, high)


@_has_kink("relu6")
def _relu6(kinks: _Kinks, x: torch.Tensor) -> torch.Tensor:
    return _between(kinks, x, 0.0, 6.0)


@_has_kink("hardsigmoid")
def _hardsigmoid(kinks: _Kinks, x: torch.Tensor) -> torch.Tensor:
    return _relu6(kinks, x + 3) / 6


@_has_kink("hardswish")
def _hardswish(kinks: _Kinks, x: torch.Tensor) -> torch.Tensor:
    return x * _hardsigmoid(kinks, x)


@_has_kink("softshrink")
def _softshrink(kinks: _Kinks, x: torch.Tensor, width: float = 0.5) -> torch.Tensor:
    return x - _between(kinks, x, -width, width)


@_has_kink("maximum", "fmax", "max.other")
def _maximum(kinks: _Kinks, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _larger(kinks, a, b)


@_has_kink("minimum", "fmin", "min.other")
def _minimum(kinks: _Kinks, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _smaller(kinks, a, b)


@_has_kink("amax", "max.default")
def _amax(kinks: _Kinks, x: torch.Tensor, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
    return _largest(kinks, x, dim, keepdim)


@_has_kink("amin", "min.default")
def _amin(kinks: _Kinks, x: torch.Tensor, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
    return -_largest(kinks, -x, dim, keepdim)


@_has_kink("max.dim")
def _max_over(kinks: _Kinks, x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, None]:
    return _largest(kinks, x, dim, keepdim), None


@_has_kink("min.dim")
def _min_over(kinks: _Kinks, x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, None]:
    return -_largest(kinks, -x, dim, keepdim), None


@_has_kink("linalg_vector_norm", "linalg_norm")
def _norm(
    kinks: _Kinks, x: torch.Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> torch.Tensor:
    return _vector_norm(kinks, x, 2 if ord is None else ord, dim, keepdim)


@_has_kink("hypot")
def _hypot(kinks: _Kinks, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return kinks.norm(torch.stack(torch.broadcast_tensors(a, b), dim=-1))


@_has_kink("pairwise_distance")
def _pairwise_distance(
    kinks: _Kinks, x: torch.Tensor, y: torch.Tensor, p: float = 2, eps: float = 1e-6, keepdim: bool = False
) -> torch.Tensor:
    return _vector_norm(kinks, x - y + eps, p, -1, keepdim)


@_has_kink("cdist")
def _cdist(kinks: _Kinks, x: torch.Tensor, y: torch.Tensor, p: float = 2, mode: Any = None) -> torch.Tensor:
    return _vector_norm(kinks, x.unsqueeze(-2) - y.unsqueeze(-3), p, -1, False)


@_has_kink("l1_loss")
def _l1_loss(kinks: _Kinks, x: torch.Tensor, target: torch.Tensor, reduction: int = 1) -> torch.Tensor:
    return _reduced(_absolute(kinks, x - target), reduction)


@_has_kink("margin_ranking_loss")
def _margin_ranking_loss(
    kinks: _Kinks,
    a: torch.Tensor,
    b: torch.Tensor,
    target: torch.Tensor,
    margin: float = 0,
    reduction: int = 1,
) -> torch.Tensor:
    return _reduced(_relu(kinks, margin - target * (a - b)), reduction)


def _reduced(losses: torch.Tensor, reduction: int) -> torch.Tensor:
    """0 keeps the entries, 1 is their mean, 2 their sum."""
    return losses if reduction == 0 else losses.mean() if reduction == 1 else losses.sum()


def spread(branches: Index, sigma: Sequence[int]) -> list[float]:
    """sigma of one sample with an even share for every entry of a maximum that ties, as torch divides it.

    The paper's Dy (Gould et al. 2019, section 5.2) takes the gradient [i in I*] sign(y_i) of the Linf norm.
    """
    tied, shares = [1] * len(sigma), list(map(float, sigma))
    for row, (left, right) in enumerate(branches):
        counts = [1 if branch == _LEAF else tied[branch] for branch in (left, right)]
        if sigma[row] == 0:
            tied[row] = sum(counts)
            shares[row] = (counts[0] - counts[1]) / sum(counts)
        else:
            tied[row] = counts[0] if sigma[row] > 0 else counts[1]
    return shares
