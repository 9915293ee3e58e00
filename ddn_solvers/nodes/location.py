"""The global minimum of one-dimensional robust pools: M-estimates of location.

    v = argmin_u  sum_i w_i phi(u - t_i),     t = (x - mean) / alpha

Convex penalties: Newton's method on  sum_i w_i psi(v - t_i) = 0  inside a bracket (`_root`).
Welsch: the modes of the Gaussian kernel density of the points, bracketed on a grid of alpha / 8 where the density
comes from binned points (Silverman 1982), the best brackets then searched with `_root`.
Truncated quadratic: exact. At a local minimum u is the mean T(u) of the points within 1, and T never decreases, so
iterating it from both ends encloses all minima (Tarski); the windows of points in between are swept.

Every row stands alone: it stops by itself, and what its neighbours do changes nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ddn_solvers.nodes.penalties import PENALTIES, Penalty

_STEPS = 200  # bisection alone ends within these
_FINE = 0.125  # alphas a cell of the grid for modes
_REACH = 8.0  # alphas beyond which a Gaussian is nothing: exp(-32) = 1e-14
_CANDIDATES = 16  # modes a pool that are compared exactly

Weights = torch.Tensor | None


def location(penalty: Penalty, t: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimisers of rows of points.

    Args:
        penalty: The penalty.
        t: (R, n) points over alpha, their (weighted) means subtracted. A row with NaN gives NaN.
        w: (R, n) weights, not negative, some positive; none: all one.

    Returns:
        Minimisers (R, 1), and (R,) whether a minimiser is not unique but the middle of an interval of them.
    """
    flat = torch.zeros(len(t), dtype=torch.bool, device=t.device)
    lost = t.sum(1, keepdim=True).isnan()
    if bool(lost.any()):
        v, flat = location(penalty, t.masked_fill(lost, 0), w)
        return v.masked_fill(lost, math.nan), flat
    if penalty is PENALTIES["quadratic"]:
        return torch.zeros_like(t[:, :1]), flat
    if w is not None:  # weightless points must not stretch brackets, grids or windows
        t = torch.where(w > 0, t, t.gather(1, w.argmax(1, keepdim=True)))
    if penalty is PENALTIES["welsch"]:
        return _welsch(penalty, t, w), flat
    if penalty is PENALTIES["truncated"]:
        return _truncated(penalty, t, w), flat
    v = _root(penalty, t, w, torch.zeros_like(t[:, :1]), t.amin(1, keepdim=True), t.amax(1, keepdim=True))
    return _middle(t, v) if penalty is PENALTIES["huber"] else (v, flat)


def _weighted_sum(values: torch.Tensor, w: Weights) -> torch.Tensor:
    return (values if w is None else values * w).sum(1, keepdim=True)


def _root(
    penalty: Penalty, t: torch.Tensor, w: Weights, v: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Where the force changes sign from - to + within [low, high]: Newton's steps, bisection where they leave it."""
    eps = torch.finfo(t.dtype).eps
    tolerance = 0.25 * math.sqrt(eps) if penalty.smooth else 4 * eps
    for _ in range(_STEPS):
        force, curvature = (_weighted_sum(values, w) for values in penalty.newton(v - t))
        low, high = torch.where(force < 0, v, low), torch.where(force > 0, v, high)
        newton = v - force / curvature
        bad = ~((low <= newton) & (newton <= high) & (curvature > 0)) & (force != 0)
        new = torch.where(bad, (low + high) / 2, torch.where(force == 0, v, newton))
        moving = ((new - v).abs() > tolerance * (1 + v.abs())).squeeze(1)
        v = new
        count = int(moving.sum())
        if count == 0:
            return v
        if 2 * count <= len(t):  # go on with those that need it
            some = moving.nonzero().squeeze(1)
            rest = _root(penalty, t[some], None if w is None else w[some], v[some], low[some], high[some])
            return v.index_copy(0, some, rest)
        if count < len(t):
            frozen = ~moving[:, None]  # a bracket of one point holds a row where it is
            low, high = torch.where(frozen, v, low), torch.where(frozen, v, high)
    return v


def _middle(t: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Huber's minimisers are an interval where no point is nearer than alpha: half of the weight lies on each side.

    Its middle is the middle of the two points next to it, and the derivative is that of this middle.
    """
    room = 1 - 16 * torch.finfo(t.dtype).eps * (1 + v.abs())
    flat = ((v - t).abs().amin(1, keepdim=True) >= room).squeeze(1)
    if bool(flat.any()):
        some = flat.nonzero().squeeze(1)
        points, at = t[some], v[some]
        left = torch.where(points <= at, points, -math.inf).amax(1, keepdim=True)
        right = torch.where(points > at, points, math.inf).amin(1, keepdim=True)
        v = v.index_copy(0, some, (left + right) / 2)
    return v, flat


def _sorted(t: torch.Tensor, w: Weights) -> tuple[torch.Tensor, Weights]:
    if (
        w is None and t.device.type == "cpu"
    ):  # NumPy sorts several times faster where no indices are asked for
        return torch.from_numpy(np.sort(t.numpy(), axis=1)), None
    points, order = t.sort(1)
    return points, None if w is None else w.gather(1, order)


def _compact(points: torch.Tensor, gap: float) -> torch.Tensor:
    """Sorted points in float64 from zero on, with gaps above ``gap``, across which nothing acts, cut to it."""
    places = points.to(torch.float64, copy=True)
    places -= places[:, :1].clone()
    if float(places[:, -1].amax()) > 64 * gap:
        places[:, 1:] = places.diff(dim=1).clamp_(max=gap).cumsum(1)
    return places


# -- Welsch ----------------------------------------------------------------------------------------------------


def _welsch(penalty: Penalty, t: torch.Tensor, w: Weights) -> torch.Tensor:
    origin = t.amin(1, keepdim=True)
    spread = float((t.amax(1, keepdim=True) - origin).amax())
    if spread > 4 * _FINE * t.shape[1] + 8 * _REACH:  # more cells than the points are worth
        points, weights = _sorted(t, w)
        places = _compact(points, _REACH).to(t.dtype)
        place, likely = _modes(places, weights)
        # A mode has a point within alpha of it: it is told from that point, in the scale that is not compacted.
        after = torch.searchsorted(places, place).clamp(max=t.shape[1] - 1)
        before = (after - 1).clamp(min=0)
        nearest = torch.where(
            (places.gather(1, after) - place).abs() < (place - places.gather(1, before)).abs(), after, before
        )
        start = points.gather(1, nearest) + (place - places.gather(1, nearest))
    else:
        place, likely = _modes(t - origin, w)
        start = origin + place
    best = _near(penalty, t, w, start[:, :1])
    several = likely[:, 1:2].any(1).nonzero().squeeze(1)
    if len(several):
        data, mass = t[several], None if w is None else w[several]
        value = _weighted_sum(penalty.value((best[several] - data) ** 2), mass)
        for k in range(1, int(likely.sum(1).amax())):
            v = _near(penalty, data, mass, start[several, k, None])
            new = _weighted_sum(penalty.value((v - data) ** 2), mass)
            better = (new < value) & likely[several, k, None]
            best[several] = torch.where(better, v, best[several])
            value = torch.where(better, new, value)
    return best


def _near(penalty: Penalty, t: torch.Tensor, w: Weights, start: torch.Tensor) -> torch.Tensor:
    return _root(penalty, t, w, start, start - 2 * _FINE, start + 2 * _FINE)


def _modes(places: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the density may be highest (R, K), highest first, and which of these places are likely."""
    cells = int(places.amax() / _FINE) + 3
    left = places * (1 / _FINE)
    share = left.frac()  # of the right one of the two cells that a point lies between
    bins = places.new_zeros(len(places), cells)
    index = left.long()
    bins.scatter_add_(1, index, 1 - share if w is None else w * (1 - share))
    bins.scatter_add_(1, index.add_(1), share if w is None else w * share)
    reach = int(_REACH / _FINE)
    z2 = (torch.arange(-reach, reach + 1, dtype=places.dtype, device=places.device) * _FINE) ** 2
    kernel = torch.exp(-z2 / 2)
    size = cells + 2 * reach
    spectrum = torch.fft.rfft(bins, size)[:, None] * torch.fft.rfft(
        torch.stack((kernel, ((z2 - 1) * kernel).abs())), size
    )
    density, bend = torch.fft.irfft(spectrum, size)[..., reach : reach + cells].unbind(1)
    # Binning and the grid each cost the density at most cell^2 / 8 times its summed absolute bend.
    error = _FINE**2 / 4 * bend
    around = torch.nn.functional.pad(density, (1, 1))
    before, after = around[:, :-2], around[:, 2:]
    mode = (density >= before) & (density > after)
    likely = mode & (density + error >= (density - error).amax(1, keepdim=True))
    heights, cell = torch.where(likely, density, -math.inf).topk(min(_CANDIDATES, cells), 1)
    top, one, other = (values.gather(1, cell) for values in (density, before, after))
    peak = (0.5 * (one - other) / (one - 2 * top + other)).clamp(-0.5, 0.5)  # of the parabola
    return (cell + peak) * _FINE, heights > -math.inf


# -- Truncated quadratic -----------------------------------------------------------------------------------------


class _Windows:
    """Sorted rows of points, and the mean and the objective of any window of them in constant time.

    ``sums`` are running sums of weight, first and second moment (R, n + 1); without weights the first is the index.
    """

    def __init__(self, points: torch.Tensor, w: Weights) -> None:
        self.places = _compact(points, 2.5)
        self.weight = None if w is None else _running(w.double())
        first = self.places if w is None else self.places * w
        self.first, self.second = _running(first), _running(first * self.places)

    def at(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and one past last point within 1 of u (R, K)."""
        return torch.searchsorted(self.places, u - 1), torch.searchsorted(self.places, u + 1, right=True)

    def moments(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and first moment of windows (R, K)."""
        weight = right - left if self.weight is None else _between(self.weight, left, right)
        return weight.double(), _between(self.first, left, right)

    def mean(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        weight, first = self.moments(left, right)
        return first / weight

    def objective(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Twice the objective, less the weight of all points."""
        weight, first = self.moments(left, right)
        spread = _between(self.second, left, right) - first * first / weight
        return torch.where(weight > 0, spread - weight, math.inf)

    def enclosed(self) -> torch.Tensor:
        """(R, 2): the best u lies between these.

        The objective of a window is no less than minus its weight, so that among cells between quantiles those with
        too little weight in reach are out. In the rest, T(u) = mean of the points within 1 of u is iterated from
        both ends: it never decreases, so no fixed point is passed.
        """
        n = self.places.shape[1]
        edges = self.places[:, [*range(0, n - 1, max(1, n // 64)), n - 1]]
        if n == 1:
            return edges.expand(-1, 2)
        left, right = self.at(edges)
        least = self.objective(left, right).amin(1, keepdim=True)
        possible = self.moments(left[:, :-1], right[:, 1:])[0] >= -least * (1 - 1e-9)
        index = torch.arange(possible.shape[1], device=edges.device)
        low = torch.where(possible, index, len(index)).amin(1, keepdim=True).clamp(max=len(index) - 1)
        high = torch.where(possible, index, -1).amax(1, keepdim=True).clamp(min=0) + 1
        ends = edges.gather(1, torch.cat((low, high), 1))
        for _ in range(16):
            mean = self.mean(*self.at(ends))
            new = torch.stack(
                (torch.maximum(ends[:, 0], mean[:, 0]), torch.minimum(ends[:, 1], mean[:, 1])), 1
            )
            if torch.equal(new, ends):
                break
            ends = new
        return ends + torch.tensor([-1e-9, 1e-9], dtype=ends.dtype, device=ends.device)  # rounding of means

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the best window starts and its mean, (R, 1) each."""
        left, right = self.at(self.enclosed())
        start, mean = torch.empty_like(left[:, :1]), self.places.new_empty(len(left), 1)
        # Rows with few windows to compare and rows with many do not wait for each other.
        count = torch.maximum(right[:, 1] - right[:, 0], left[:, 1] - left[:, 0])
        size = count.clamp(min=1).double().log2().div(3).ceil()
        for some in ((size == k).nonzero().squeeze(1) for k in size.unique()):
            start[some], mean[some] = self._take(some)._sweep(left[some], right[some])
        return start, mean

    def _take(self, some: torch.Tensor) -> _Windows:
        if len(some) == len(self.places):
            return self
        taken = object.__new__(_Windows)
        for name, value in vars(self).items():
            setattr(taken, name, None if value is None else value[some])
        return taken

    def _sweep(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The window of u changes where a point enters, at u = place - 1, and where one leaves, at place + 1.
        last = _indices(right[:, :1], right[:, 1:])
        enter = torch.searchsorted(self.places, self.places.gather(1, last) - 2)
        first = _indices(left[:, :1], left[:, 1:])
        leave = torch.searchsorted(self.places, self.places.gather(1, first) + 2, right=True)
        starts = torch.cat((left[:, :1], enter, first + 1), 1)
        stops = torch.cat((right[:, :1], last + 1, leave), 1)
        choice = self.objective(starts, stops).argmin(1, keepdim=True)
        starts, stops = starts.gather(1, choice), stops.gather(1, choice)
        return starts, self.mean(starts, stops)


def _running(values: torch.Tensor) -> torch.Tensor:
    sums = values.new_zeros(values.shape[0], values.shape[1] + 1)
    torch.cumsum(values, 1, out=sums[:, 1:])
    return sums


def _between(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return sums.gather(1, right) - sums.gather(1, left)


def _indices(start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """(R, K) indices from start to before stop, each (R, 1); shorter rows repeat an index."""
    steps = torch.arange(int((stop - start).amax()), device=start.device)
    return torch.minimum(start + steps, (stop - 1).clamp(min=0))


def _truncated(penalty: Penalty, t: torch.Tensor, w: Weights) -> torch.Tensor:
    points, weights = _sorted(t, w)
    windows = _Windows(points, weights)
    start, mean = windows.best()
    v = (points.gather(1, start).double() + mean - windows.places.gather(1, start)).to(t.dtype)
    # The mean of the same points once more, not as a difference of long sums.
    inside = penalty.ratio((v - t) ** 2)
    inside = inside if w is None else inside * w
    return v + (inside * (t - v)).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
