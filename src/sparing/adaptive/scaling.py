"""Which descendant of each block runs now: the run-time optimiser of block-grained scaling.

Han et al. 2021, LegoDNN, MobiCom, arXiv:2112.09852. One descendant is chosen for each block, so that accuracy is the
highest that the deadline of each network and the memory they share allow: a multiple-choice knapsack with a constraint
for each deadline and one for memory. :class:`ScalingOptimizer` solves it exactly. Prices from its Lagrangian dual leave
only few options of each block within reach of the best selection found so far, and these are enumerated network by
network; where they are too many, HiGHS takes over (``scipy.optimize.milp``).

NumPy and SciPy only: nothing here needs torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self, overload

import numpy as np

from sparing.core.errors import InvalidValue, SparingError, shown

Method = Literal["auto", "enumerate", "milp"]
MEMORY_STEP = 0.1 * 1024 * 1024
"""Bytes by which the reference raises a memory limit that cannot be kept."""
LATENCY_STEP = 0.1
"""Seconds by which it raises a deadline."""
SLACK = 1e-9
"""Share by which a sum may exceed its limit: what adding in another order changes."""
MAX_STATES = 300_000
"""Partial selections the enumeration holds at a time before HiGHS takes over."""
SPARSITIES = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Shares of filters that the descendants of a block lose by default."""


class InfeasibleError(SparingError):
    """No selection keeps the limits; the message names the smallest ones that can be kept."""


def check_sparsity(sparsity: Any) -> None:
    """Raise :class:`InvalidValue` for what is no share of filters that may leave."""
    number = isinstance(sparsity, int | float | np.floating) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        raise InvalidValue(f"sparsity = {shown(sparsity)}; a number of at least 0 and below 1 is expected")


def check_sparsities(levels: Sequence[Any]) -> None:
    """Raise :class:`InvalidValue` unless they begin with 0, ascend and stay below 1."""
    for level in levels:
        check_sparsity(level)
    if not levels or levels[0] != 0 or list(levels) != sorted(set(levels)):
        raise InvalidValue(f"sparsities = {shown(tuple(levels))}; 0 first, then ascending, each once")


# --- what is known of a network ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What each descendant of each block costs and loses. B blocks, S sparsities, of which the first is 0."""

    sparsities: np.ndarray
    """(S,)."""
    drops: np.ndarray
    """(B, S) accuracy that is lost where the block is replaced by this descendant; may be negative."""
    bytes: np.ndarray
    """(B, S) parameters and buffers of the descendants."""
    latency: np.ndarray
    """(B,) seconds of the original blocks at batch 1."""
    rel: np.ndarray
    """(B, S) share of it that the descendants save."""
    model_latency: float
    """Seconds of the whole original network at batch 1."""
    frame_bytes: float
    """Bytes of what is in no block."""
    accuracy: float
    """Of the original network, on the data that drops were taken on."""

    def __post_init__(self) -> None:
        for name in ("sparsities", "drops", "bytes", "latency", "rel"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), float))
        blocks, count = self.drops.shape if self.drops.ndim == 2 else (0, 0)
        for name, shape in {
            "sparsities": (count,),
            "drops": (blocks, count),
            "bytes": (blocks, count),
            "latency": (blocks,),
            "rel": (blocks, count),
            "model_latency": (),
            "frame_bytes": (),
            "accuracy": (),
        }.items():
            array = np.asarray(getattr(self, name))
            if array.shape != shape or not blocks or not count:
                raise InvalidValue(f"profile: {name} {array.shape} beside drops {self.drops.shape}")
            if not np.isfinite(array).all():
                raise InvalidValue(f"profile: {name} = {shown(array.tolist())}: finite numbers are needed")

    def to_config(self) -> dict[str, Any]:
        """As JSON values; times as texts of one length, so that the size of a saved network is not a matter of them."""
        config = {item.name: np.asarray(getattr(self, item.name)).tolist() for item in fields(self)}
        return config | {name: _even(config[name]) for name in ("latency", "rel", "model_latency")}

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Of :meth:`to_config`'s values; raises :class:`InvalidValue` for others."""
        names = {item.name for item in fields(cls)}
        if not isinstance(config, dict) or config.keys() != names:
            raise InvalidValue(f"profile = {shown(config)}: {', '.join(sorted(names))} are needed")
        try:
            arrays = {name: np.asarray(value, float) for name, value in config.items()}
            made: dict[str, Any] = {name: float(a) if a.ndim == 0 else a for name, a in arrays.items()}
            return cls(**made)
        except (TypeError, ValueError) as error:
            raise InvalidValue(f"profile: {error}") from None


def _even(number: Any) -> Any:
    return [_even(item) for item in number] if isinstance(number, list) else f"{number:+.16e}"


# --- what latency is now (section 5) ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatencyEstimate:
    """A network's latencies as they are now, from one run of the selection that happens to be loaded."""

    ratio: np.ndarray
    """(B,) profiled latency of each block as it is now loaded, over the measured one."""
    kept: np.ndarray
    """(B,) bool: the ratios within one standard deviation of their mean."""
    mean_ratio: float
    """Mean of the ratios that were kept: how much faster than now the machine was when it was profiled."""
    model_latency: float
    """Seconds the whole original network would take now."""
    block_latency: np.ndarray
    """(B,) seconds each original block would take now."""
    drop: np.ndarray
    """(B, S) seconds by which each descendant is faster than its original block now."""


def estimate_latency(
    block_latency: np.ndarray,
    relative_drop: np.ndarray,
    model_latency: float,
    measured: np.ndarray,
    current: Sequence[int] | np.ndarray,
) -> LatencyEstimate:
    """Latencies as they are now.

    Args:
        block_latency: (B,) seconds of the original blocks when they were profiled.
        relative_drop: (B, S) share of it that each descendant saves.
        model_latency: seconds of the whole original network when it was profiled.
        measured: (B,) seconds each block of the loaded selection took just now.
        current: (B,) the loaded selection, as indices into the sparsities.

    Raises:
        InvalidValue: shapes that do not fit together, or a time that is not positive.
    """
    rel, lat, seen = (np.asarray(array, float) for array in (relative_drop, block_latency, measured))
    now = np.asarray(current, int)
    if rel.ndim != 2 or lat.shape != rel.shape[:1] or seen.shape != lat.shape or now.shape != lat.shape:
        raise InvalidValue(
            f"block_latency {lat.shape}, relative_drop {rel.shape}, measured {seen.shape} and current {now.shape}: "
            "(B,), (B, S), (B,) and (B,) are needed"
        )
    if ((now < 0) | (now >= rel.shape[1])).any():
        raise InvalidValue(f"current = {now.tolist()}: indices of sparsities are needed, 0 … {rel.shape[1] - 1}")
    if not (np.isfinite(seen).all() and (seen > 0).all()):
        raise InvalidValue(f"measured = {seen.tolist()}: a positive number of seconds for each block is needed")
    left = 1 - rel[np.arange(len(lat)), now]
    ratio = lat * left / seen
    kept = np.abs(ratio - ratio.mean()) < ratio.std()
    mean = float(ratio[kept].mean() if kept.any() else ratio.mean())  # all equal: none is within a deviation of zero
    original = seen / left
    return LatencyEstimate(ratio, kept, mean, model_latency / mean, original, original[:, None] * rel)


# --- selections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """One descendant for each block of a network, and what the profile says of it."""

    options: tuple[int, ...]
    """Index into the sparsities, for each block."""
    sparsities: tuple[float, ...]
    est_accuracy: float
    """Accuracy of the original network less the drops of the blocks; additivity is an assumption."""
    est_latency: float
    """Seconds."""
    est_bytes: float
    """Bytes of the network: its blocks and its frame."""
    relaxed: bool = False
    """Whether a limit had to be raised."""
    max_latency: float = math.inf
    """The network's deadline in seconds that this selection keeps."""
    max_bytes: float = math.inf
    """The memory limit that all networks together keep."""


def bytes_moved(block_bytes: np.ndarray, before: Sequence[int] | None, after: Sequence[int]) -> float:
    """Bytes paged out and in between two selections: old and new of the blocks that change; 0 the first time.

    ``block_bytes`` (B, S) are the bytes of each descendant.
    """
    if before is None:
        return 0.0
    blocks = np.arange(len(block_bytes))
    old, new = np.asarray(before, int), np.asarray(after, int)
    return float(np.where(old != new, block_bytes[blocks, old] + block_bytes[blocks, new], 0.0).sum())


def bytes_moved_whole(block_bytes: np.ndarray, before: Sequence[int], after: Sequence[int]) -> float:
    """Bytes paged where whole models are exchanged: old and new of all blocks, without the frame."""
    blocks = np.arange(len(block_bytes))
    return float((block_bytes[blocks, np.asarray(before, int)] + block_bytes[blocks, np.asarray(after, int)]).sum())


# --- the programme ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    """What the programme knows of one network; (B, S) arrays."""

    cost: np.ndarray
    drop: np.ndarray
    """Seconds saved."""
    bytes: np.ndarray
    usable: np.ndarray
    """Options that no other one of their block beats in all three."""

    @classmethod
    def of(cls, cost: np.ndarray, drop: np.ndarray, size: np.ndarray) -> _Network:
        return cls(cost, drop, size, _usable(cost, drop, size))

    def by_bytes(self) -> _Network:
        """The same network, where bytes are what is to be little."""
        return _Network.of(self.bytes, self.drop, np.zeros_like(self.bytes))

    def timeless(self) -> _Network:
        """The same network without a deadline: what a clock said must not decide between equals."""
        return _Network.of(self.cost, np.zeros_like(self.drop), self.bytes)

    def total(self, array: np.ndarray, options: np.ndarray) -> float:
        return float(array[np.arange(len(options)), options].sum())


def _usable(cost: np.ndarray, drop: np.ndarray, size: np.ndarray) -> np.ndarray:
    usable = np.ones(cost.shape, bool)
    for b in range(len(cost)):  # one block at a time: S may be hundreds
        c, d, m = cost[b], drop[b], size[b]
        as_good = (c[:, None] <= c) & (d[:, None] >= d) & (m[:, None] <= m)  # [t, s]: t is as good as s
        better = as_good & ~as_good.T
        equal_before = np.triu(as_good & as_good.T, 1)
        usable[b] = ~(better | equal_before).any(axis=0)
    return usable


class _Problem:
    """min Σ cost subject to, for each network, Σ drop ≥ need, and Σ bytes ≤ cap over all networks."""

    def __init__(self, networks: Sequence[_Network], need: Sequence[float], cap: float) -> None:
        self.networks = networks
        self.need = np.asarray(need, float)
        """(K,) seconds to save; −inf: no deadline."""
        self.cap = cap

    def solve(self, method: Method = "auto") -> list[np.ndarray] | None:
        """The options (B,) for each network, or None when there is no solution."""
        if any(_max(net.drop) < need for net, need in zip(self.networks, self.need, strict=True)):
            return None
        if sum(_min(net.bytes) for net in self.networks) > self.cap:
            return None
        if method != "milp":
            try:
                return _Enumeration(self).solve()
            except _TooMany:
                if method == "enumerate":
                    raise
        return _milp(self)


def _max(array: np.ndarray) -> float:
    return float(array.max(axis=1).sum())


def _min(array: np.ndarray) -> float:
    return float(array.min(axis=1).sum())


def _within(limit: float, scale: float) -> float:
    """A limit that a sum of numbers of this size keeps also when they are added in another order."""
    return limit + SLACK * max(abs(limit), scale) if math.isfinite(limit) else limit


class _TooMany(SparingError):
    """More partial selections are within reach than the enumeration holds."""


class _Point(NamedTuple):
    """A network's part of the dual, at a price of seconds."""

    price: float
    value: float
    behind: float
    """Seconds that are still to be saved: the value's slope."""
    size: float
    places: np.ndarray
    """Of the options (B,) in the array of all."""


class _Enumeration:
    """Lagrangian dual, a first selection, and all that could still be better.

    With prices λ_k ≥ 0 of a second and μ ≥ 0 of a byte, an option's reduced cost is what it costs above the cheapest of
    its block at these prices. A selection's cost is the dual value + its reduced costs + λ·(seconds saved beyond need)
    + μ·(bytes left), so that one whose reduced costs exceed the gap to a known selection is never better.
    """

    def __init__(self, problem: _Problem) -> None:
        nets = problem.networks
        self.nets, self.count = nets, len(nets)
        blocks, options = max(len(net.cost) for net in nets), max(net.cost.shape[1] for net in nets)
        shape = (self.count, blocks, options)
        self.cost, self.drop, self.bytes = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
        for k, net in enumerate(nets):
            b, s = net.cost.shape
            self.cost[k, :b, :s] = np.where(net.usable, net.cost, np.inf)
            self.drop[k, :b, :s], self.bytes[k, :b, :s] = net.drop, net.bytes
            self.cost[k, b:, 0] = 0.0  # blocks that only fill up the array have one option of no weight
        finite = np.isfinite(self.cost)
        least = np.where(finite, self.drop, np.inf).min(-1).sum(-1)
        # −inf would make 0·∞ below; sums are added in several orders
        self.need = np.maximum(problem.need, least) - 1e-13 * np.abs(self.drop).sum((1, 2))
        self.cap = min(problem.cap, float(np.where(finite, self.bytes, -np.inf).max(-1).sum()))
        self.cap += 1e-13 * float(np.abs(self.bytes).sum())
        self.flat = np.stack([self.cost, self.drop, self.bytes]).reshape(3, self.count, -1)
        self.rows = np.arange(blocks) * options
        self.best: np.ndarray | None = None
        self.best_cost = np.inf
        self.tolerance = 1e-12 * max(1.0, float(np.abs(self.cost[finite]).sum()))

    def solve(self) -> list[np.ndarray] | None:
        bound, price_s, price_b = self._dual()
        if not math.isfinite(bound):
            return None
        reduced = self.cost - price_s[:, None, None] * self.drop + price_b * self.bytes
        reduced -= reduced.min(-1, keepdims=True)
        if self.best is not None:
            self._improve()
            gap = self.best_cost - bound
            if gap > self.tolerance:
                self._search(bound, gap, reduced, price_s, price_b)
        else:  # no selection is known: look ever further until one is found, which then bounds the rest
            gap, most = 1e-3 * max(float(reduced[np.isfinite(reduced)].max()), self.tolerance), self._most(reduced)
            while self.best is None:
                self._search(bound, gap, reduced, price_s, price_b)
                if self.best is None and gap > most:
                    return None
                gap *= 4
            if self.best_cost - bound > gap / 4:
                self._search(bound, self.best_cost - bound, reduced, price_s, price_b)
        assert self.best is not None
        return [self.best[k, : len(net.cost)] for k, net in enumerate(self.nets)]

    def _most(self, reduced: np.ndarray) -> float:
        return float(np.where(np.isfinite(reduced), reduced, 0).max(-1).sum())

    # the dual: concave and piecewise linear, maximised exactly over λ for a given μ, and then over μ

    def _at(self, k: int, base: np.ndarray, price_b: float, price_s: float) -> _Point:
        """A network's cheapest selection at these prices; ``base`` (B, S) are costs and the price of bytes."""
        places = self.rows + (base - price_s * self.drop[k]).argmin(1)
        cost, saved, size = self.flat[:, k, places].sum(1).tolist()
        behind = self.need[k] - saved
        return _Point(price_s, cost + price_b * size + price_s * behind, behind, size, places)

    def _inner(self, price_b: float) -> tuple[float, np.ndarray, float]:
        """(Σ of the maxima over λ, the maximising λ (K,), bytes of the selection, mixed so that its seconds fit)."""
        total, mixed, chosen = 0.0, 0.0, []
        for k, base in enumerate(self.cost + price_b * self.bytes):
            value, price, size, places = self._inner_of(k, base, price_b)
            self.last[k] = price
            total, mixed = total + value, mixed + size
            chosen.append(places)
        self._offer(np.stack(chosen) - self.rows)
        return total, self.last.copy(), mixed

    def _inner_of(self, k: int, base: np.ndarray, price_b: float) -> tuple[float, float, float, np.ndarray]:
        """(maximum over a network's λ, λ, bytes of the mixed selection, places of one whose seconds suffice)."""
        low = self._at(k, base, price_b, 0.0) if self.last[k] == 0 else None
        if low is not None and low.behind <= 0:
            return low.value, 0.0, low.size, low.places
        # a bracket around where the seconds begin to suffice, from where they did at the price of bytes before
        high, step = self._at(k, base, price_b, self.last[k] or self.scale_s), 2.0
        while high.behind > 0 and high.price < 1e60 * self.scale_s:
            low, high, step = high, self._at(k, base, price_b, high.price * step), min(step * step, 1e6)
        if high.behind > 0:  # they can be saved only just, and added in this order they are less
            return high.value, high.price, high.size, high.places
        step = 0.5
        while low is None:
            least = high.price < 1e-6 * self.scale_s
            point = self._at(k, base, price_b, 0.0 if least else high.price * step)
            if point.behind > 0:
                low = point
            elif least:
                return point.value, 0.0, point.size, point.places
            else:
                high, step = point, step * step
        best = low if low.value > high.value else high
        for _ in range(60):  # where the tangents at both ends meet
            price = high.value - low.value + low.behind * low.price - high.behind * high.price
            price /= low.behind - high.behind
            if not low.price < price < high.price:
                break
            point = self._at(k, base, price_b, price)
            best = point if point.value > best.value else best
            if low.value + low.behind * (price - low.price) - point.value <= 1e-12 * abs(point.value):
                break
            low, high = (point, high) if point.behind > 0 else (low, point)
        share = high.behind / (high.behind - low.behind)
        return best.value, best.price, share * low.size + (1 - share) * high.size, high.places

    def _dual(self) -> tuple[float, np.ndarray, float]:
        """(the dual's value, λ (K,), μ)."""
        finite = np.isfinite(self.cost)
        spread = [
            np.ptp(np.where(finite, array, array[..., :1]), axis=-1).sum()
            for array in (np.where(finite, self.cost, 0), self.drop, self.bytes)
        ]
        self.scale_s = float(spread[0] / spread[1]) if spread[0] > 0 and spread[1] > 0 else 1.0
        scale_b = float(spread[0] / spread[2]) if spread[0] > 0 and spread[2] > 0 else 1.0
        self.last = np.zeros(self.count)
        low = 0.0
        value_l, at_l, size_l = self._inner(low)
        if size_l <= self.cap:
            return value_l, at_l, low
        best = (value_l, at_l, low)
        high = scale_b
        for _ in range(60):
            value_h, at_h, size_h = self._inner(high)
            value_h -= high * self.cap
            if value_h > best[0]:
                best = (value_h, at_h, high)
            if size_h <= self.cap:
                break
            low, value_l, size_l, high = high, value_h, size_h, high * 8
        else:
            return best  # the bytes cannot be kept together with the deadlines, or only just: the search will tell
        for _ in range(60):
            slope_l, slope_h = size_l - self.cap, size_h - self.cap
            middle = (value_h - value_l + slope_l * low - slope_h * high) / (slope_l - slope_h)
            middle = min(max(middle, low), high)
            value, at, size = self._inner(middle)
            value -= middle * self.cap
            if value > best[0]:
                best = (value, at, middle)
            if value_l + slope_l * (middle - low) - value <= 1e-10 * (abs(value) + 1e-300):
                break
            if size > self.cap:
                low, value_l, size_l = middle, value, size
            else:
                high, value_h, size_h = middle, value, size
        return best

    # selections that are known

    def _take(self, array: np.ndarray, options: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, options[..., None], -1)[..., 0]

    def _offer(self, options: np.ndarray) -> None:
        """Keep a selection that is feasible and the best so far."""
        cost = float(self._take(self.cost, options).sum())
        fits = (self._take(self.drop, options).sum(-1) >= self.need).all()
        if fits and cost < self.best_cost and float(self._take(self.bytes, options).sum()) <= self.cap:
            self.best, self.best_cost = options.copy(), cost

    def _improve(self) -> None:
        """Exchange single options while that makes the best selection better."""
        assert self.best is not None
        while True:
            gain = self._take(self.cost, self.best)[..., None] - self.cost
            size = self._take(self.bytes, self.best)
            saved = self._take(self.drop, self.best)
            fits = size.sum() + self.bytes - size[..., None] <= self.cap
            fits &= (saved.sum(-1, keepdims=True) - saved)[..., None] + self.drop >= self.need[:, None, None]
            gain = np.where(fits, gain, -np.inf)
            k, b, s = np.unravel_index(gain.argmax(), gain.shape)
            if gain[k, b, s] <= self.tolerance:
                return
            self.best[k, b] = s
            self.best_cost = float(self._take(self.cost, self.best).sum())

    # all that could be better

    def _search(self, bound: float, gap: float, reduced: np.ndarray, price_s: np.ndarray, price_b: float) -> None:
        """Take over the best selection whose cost is at most ``bound + gap``, if it beats the one known."""
        limit = gap + self.tolerance
        least = np.where(np.isfinite(self.cost), self.bytes, np.inf).min(-1).sum(-1)
        halves = []
        for k in range(self.count):
            room = self.cap - (least.sum() - least[k])
            found = _Halves.of(self, k, room, limit, reduced[k], float(price_s[k]))
            if found is None:
                return
            halves.append(found)
        # what the deadline of a network costs it in any case leaves the others less of the gap
        owed = np.array([half.least for half in halves])
        if owed.sum() > limit:
            return
        chosen = np.zeros(self.rows.shape, int)[None].repeat(self.count, 0)
        for k, half in enumerate(halves):
            chosen[k] = half.best()
        self._offer(chosen)
        if self.best is not None:
            self._improve()
            limit = min(limit, self.best_cost - bound + self.tolerance)
        parts = [half.complete(limit - (owed.sum() - owed[k])) for k, half in enumerate(halves)]
        # join the networks: only bytes are shared, so that of each only what is best in (cost, bytes) matters
        extra, cost, size, _ = parts[0]
        chosen = np.arange(len(cost))[:, None]
        for k in range(1, self.count):
            extra_k, cost_k, size_k, _ = parts[k]
            if len(extra) * len(extra_k) > 16 * MAX_STATES:
                raise _TooMany("too many selections are within reach of the best")
            joined = extra[:, None] + extra_k
            keep = (joined + owed[k + 1 :].sum() <= limit) & (size[:, None] + size_k + least[k + 1 :].sum() <= self.cap)
            one, other = np.nonzero(keep)
            if len(one) > MAX_STATES:
                raise _TooMany("too many selections are within reach of the best")
            extra, cost, size = joined[keep], cost[one] + cost_k[other], size[one] + size_k[other]
            front = _front(cost, size)
            extra, cost, size = extra[front], cost[front], size[front]
            chosen = np.concatenate([chosen[one[front]], other[front][:, None]], axis=1)
        fits = np.flatnonzero(size <= self.cap)
        if len(fits):
            winner = fits[cost[fits].argmin()]
            if cost[winner] < self.best_cost:
                self.best_cost = float(cost[winner])
                self.best = np.stack([parts[k][3][chosen[winner, k]] for k in range(self.count)])


@dataclass(frozen=True)
class _Half:
    """Selections of half of a network's blocks."""

    extra: np.ndarray
    """(N,) reduced costs and the price of the seconds saved."""
    cost: np.ndarray
    saved: np.ndarray
    size: np.ndarray
    options: np.ndarray
    """(N, blocks of this half)."""

    def __getitem__(self, index: np.ndarray) -> _Half:
        return _Half(*(getattr(self, item.name)[index] for item in fields(self)))


@dataclass(frozen=True)
class _Halves:
    """A network's selections within reach, as those of its first and of its last blocks."""

    first: _Half
    last: _Half
    need: float
    room: float
    to_first: np.ndarray
    """For each first half, the least ``extra`` of a last half with which the seconds suffice; for each last half:"""
    to_last: np.ndarray
    offset: float
    """What is to be subtracted from the sum of both ``extra`` for the reduced cost of the network."""

    @property
    def least(self) -> float:
        """The least reduced cost of the network, the price of seconds beyond its need counted."""
        return float((self.first.extra + self.to_first).min()) - self.offset

    def best(self) -> np.ndarray:
        """The options (B,) that attain it."""
        one = int((self.first.extra + self.to_first).argmin())
        enough = np.searchsorted(self.last.saved, self.need - self.first.saved[one])
        other = enough + int(self.last.extra[enough:].argmin())
        return np.concatenate([self.first.options[one], self.last.options[other]])

    @classmethod
    def of(
        cls, whole: _Enumeration, k: int, room: float, limit: float, reduced: np.ndarray, price_s: float
    ) -> _Halves | None:
        """None: nothing is within reach."""
        need, middle = float(whole.need[k]), len(reduced) // 2
        usable = reduced <= limit
        drop = np.where(usable, whole.drop[k], -np.inf).max(-1)
        size = np.where(usable, whole.bytes[k], np.inf).min(-1)
        made = []
        for blocks in (range(middle), range(middle, len(reduced))):
            rest_drop = drop.sum() - drop[blocks.start : blocks.stop].sum()
            rest_size = size.sum() - size[blocks.start : blocks.stop].sum()
            extra = saved = held = total = np.zeros(1)
            options = np.zeros((1, 0), int)
            for b in blocks:
                at = np.flatnonzero(usable[b])
                later = slice(b + 1, blocks.stop)
                next_extra = extra[:, None] + reduced[b, at]
                next_saved = saved[:, None] + whole.drop[k, b, at]
                next_held = held[:, None] + whole.bytes[k, b, at]
                keep = (next_extra <= limit) & (next_saved >= need - rest_drop - drop[later].sum())
                keep &= next_held <= room - rest_size - size[later].sum()
                parent, option = np.nonzero(keep)
                if not len(parent):
                    return None
                if len(parent) > MAX_STATES:
                    raise _TooMany("too many selections are within reach of the best")
                extra, saved, held = next_extra[keep], next_saved[keep], next_held[keep]
                total = total[parent] + whole.cost[k, b, at[option]]
                options = np.concatenate([options[parent], at[option][:, None]], axis=1)
            order = saved.argsort()
            made.append(_Half(extra + price_s * saved, total, saved, held, options)[order])
        first, last = made
        to_first, to_last = _partner(first, last, need), _partner(last, first, need)
        found = cls(first, last, need, room, to_first, to_last, price_s * need)
        return found if math.isfinite(found.least) else None

    def complete(self, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(reduced cost, cost, bytes, options) of the selections of at most this reduced cost."""
        most = limit + self.offset
        first = self.first[self.first.extra + self.to_first <= most]
        last = self.last[self.last.extra + self.to_last <= most]
        if len(first.extra) * len(last.extra) > 16 * MAX_STATES:
            raise _TooMany("too many selections are within reach of the best")
        one, other = np.nonzero(first.extra[:, None] + last.extra <= most)
        keep = first.saved[one] + last.saved[other] >= self.need
        keep &= first.size[one] + last.size[other] <= self.room
        one, other = one[keep], other[keep]
        cost, size = first.cost[one] + last.cost[other], first.size[one] + last.size[other]
        front = _front(cost, size)
        one, other = one[front], other[front]
        options = np.concatenate([first.options[one], last.options[other]], axis=1)
        return first.extra[one] + last.extra[other] - self.offset, cost[front], size[front], options


def _partner(half: _Half, other: _Half, need: float) -> np.ndarray:
    """For each of a half, the least ``extra`` of the other with which the seconds suffice; both by seconds saved."""
    least = np.append(np.minimum.accumulate(other.extra[::-1])[::-1], np.inf)
    return least[np.searchsorted(other.saved, need - half.saved)]


def _front(cost: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Indices of the pairs that no other one is as good as in both, by ascending size."""
    rough = size.argsort()  # a tenth of a sort by both; what it leaves, equals included, is little
    near = np.sort(rough[cost[rough] <= _least_before(cost[rough])])
    order = near[np.lexsort((cost[near], size[near]))]
    return order[cost[order] < _least_before(cost[order])]


def _least_before(cost: np.ndarray) -> np.ndarray:
    return np.minimum.accumulate(np.concatenate([[np.inf], cost]))[:-1]


def _milp(problem: _Problem) -> list[np.ndarray] | None:
    """The same programme by HiGHS, in milliseconds and megabytes: its tolerance is absolute."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    nets = problem.networks
    places = [(k, b, s) for k, net in enumerate(nets) for b, s in zip(*np.nonzero(net.usable), strict=True)]
    at = np.array(places)
    cost, drop, size = (
        np.array([getattr(nets[k], name)[b, s] for k, b, s in places]) for name in ("cost", "drop", "bytes")
    )
    rows: dict[tuple[int, int], int] = {}
    row = [rows.setdefault((k, b), len(rows)) for k, b, _ in places]
    one_each = csr_array((np.ones(len(places)), (row, np.arange(len(places)))), shape=(len(rows), len(places)))
    seconds = csr_array((drop * 1e3, (at[:, 0], np.arange(len(places)))), shape=(len(nets), len(places)))
    matrix: Any = vstack([one_each, seconds, csr_array(size[None] / 1e6)]).tocsr()
    low = np.concatenate([np.ones(len(rows)), problem.need * 1e3, [-np.inf]])
    high = np.concatenate([np.ones(len(rows)), np.full(len(nets), np.inf), [problem.cap / 1e6]])
    result = milp(
        cost / max(float(np.abs(cost).max()), 1e-300),
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, low, high),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    chosen = [np.zeros(len(net.cost), int) for net in nets]
    for (k, b, s), value in zip(places, result.x, strict=True):
        if value > 0.5:
            chosen[k][b] = s
    return chosen


# --- the optimiser ---------------------------------------------------------------------------------------------------

Limits = float | Sequence[float | None] | None


class ScalingOptimizer:
    """Chooses one descendant per block so that accuracy is the highest the limits allow (section 6 of the sheet).

    Args:
        profiles: of one network, or of several that share the memory.
        now: each network's latencies as they are now, by :func:`estimate_latency`; None: as profiled.
        weights: (K,) how much an accuracy drop of each network counts; 1 by default.

    With one profile :meth:`solve` takes and returns scalars; with a list of them, a list for each network.
    """

    def __init__(
        self,
        profiles: Profile | Sequence[Profile],
        *,
        now: LatencyEstimate | Sequence[LatencyEstimate | None] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.single = not isinstance(profiles, Sequence)
        self.profiles: list[Profile] = [profiles] if not isinstance(profiles, Sequence) else list(profiles)
        count = len(self.profiles)
        if not count:
            raise InvalidValue("profiles = []: at least one network is needed")
        estimates = list(now) if isinstance(now, Sequence) else [now] * count if now is None else [now]
        self.weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
        if len(estimates) != count or len(self.weights) != count:
            raise InvalidValue(
                f"{count} profiles, {len(estimates)} latency estimates and {len(self.weights)} weights: "
                "one of each is needed for each network"
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise InvalidValue(f"weights = {self.weights}: positive numbers are needed")
        self.networks, self.latencies = [], []
        """What each original network would take now, in seconds."""
        for number, (profile, estimate, weight) in enumerate(zip(self.profiles, estimates, self.weights, strict=True)):
            cost, size = np.asarray(profile.drops, float) * weight, np.asarray(profile.bytes, float)
            if estimate is None:
                saved = np.asarray(profile.latency, float)[:, None] * np.asarray(profile.rel, float)
                self.latencies.append(float(profile.model_latency))
            else:
                saved = np.asarray(estimate.drop, float)
                self.latencies.append(float(estimate.model_latency))
            for name, array in (("drops", cost), ("bytes", size), ("seconds saved", saved)):
                if array.shape != cost.shape or array.ndim != 2 or not array.size or not np.isfinite(array).all():
                    raise InvalidValue(
                        f"network {number}: {name} {array.shape} beside drops {cost.shape}: finite numbers (B, S) "
                        "are needed"
                    )
            self.networks.append(_Network.of(cost, saved, size))
        self._timeless: dict[int, _Network] = {}
        self.frame_bytes = float(sum(profile.frame_bytes for profile in self.profiles))

    @property
    def smallest_bytes(self) -> float:
        """Bytes that all networks take at least."""
        return self.frame_bytes + sum(_min(net.bytes) for net in self.networks)

    @property
    def original_bytes(self) -> float:
        """Bytes of all original networks: every block at the first sparsity, and the frames."""
        return self.frame_bytes + sum(float(net.bytes[:, 0].sum()) for net in self.networks)

    @overload
    def solve(
        self,
        max_latency: float | None = None,
        max_bytes: float | None = None,
        relax: bool = False,
        stepping: bool = False,
        method: Method = "auto",
    ) -> Selection: ...

    @overload
    def solve(
        self,
        max_latency: Sequence[float | None],
        max_bytes: float | None = None,
        relax: bool = False,
        stepping: bool = False,
        method: Method = "auto",
    ) -> list[Selection]: ...

    def solve(
        self,
        max_latency: Limits = None,
        max_bytes: float | None = None,
        relax: bool = False,
        stepping: bool = False,
        method: Method = "auto",
    ) -> Selection | list[Selection]:
        """The selection of least total accuracy drop within the limits; exact.

        Args:
            max_latency: deadline in seconds, one for each network where there are several; None: none.
            max_bytes: memory for all networks together, frames included; None: any.
            relax: where nothing keeps the limits, raise memory as little as needed; where no memory helps, keep the
                memory limit (or the smallest model's bytes) and raise the deadlines as little as needed, all by one
                factor. Without it, :class:`InfeasibleError` is raised.
            stepping: raise them as the reference does: memory by 0.1 MiB a time (at once to the smallest model's bytes
                where it is below) while it is below the original's, then the deadlines by 0.1 s a time.
            method: "auto": enumeration, and HiGHS where too many selections are within reach; or one of the two.

        Raises:
            InfeasibleError: nothing keeps the limits, and ``relax`` is off.
            InvalidValue: limits that are no positive numbers, or not one deadline for each network.
        """
        deadlines, memory = self._limits(max_latency, max_bytes)
        if method not in ("auto", "enumerate", "milp"):
            raise InvalidValue(f"method = {shown(method)}: one of 'auto', 'enumerate', 'milp' is needed")
        chosen = self._solve(deadlines, memory, method)
        relaxed = chosen is None
        if chosen is None:
            if not relax:
                raise InfeasibleError(self._why(deadlines, memory, method))
            deadlines, memory = (self._stepped if stepping else self._relaxed)(deadlines, memory, method)
            chosen = self._solve(deadlines, memory, method)
            if chosen is None:  # a limit was made so that it can be kept
                raise InfeasibleError(f"no selection keeps the raised limits {deadlines} s and {memory} bytes")
        selections = [self._selection(k, options, relaxed, deadlines[k], memory) for k, options in enumerate(chosen)]
        return selections[0] if self.single else selections

    def pareto_front(self, max_latency: Limits = None) -> list[Selection] | list[list[Selection]]:
        """All selections at this deadline that no other one beats in both bytes and accuracy, by ascending bytes.

        Several networks: a list of their selections for each point; bytes and (weighted) drops are those of all.
        Selections are extended block by block, and those dropped that another one equals in drop, bytes and seconds.

        Raises:
            InfeasibleError: the deadline cannot be kept by any selection.
        """
        deadlines, _ = self._limits(max_latency, None)
        cost, size = np.zeros(1), np.zeros(1)
        chosen: list[np.ndarray] = []
        for k, net in enumerate(self.networks):
            need = self._need(k, deadlines[k])
            part = _network_front(net, need)
            if part is None:
                raise InfeasibleError(self._why(deadlines, math.inf, "auto"))
            total, held, options = part
            one, other = (index.ravel() for index in np.indices((len(cost), len(total))))
            front = _front(cost[one] + total[other], size[one] + held[other])
            one, other = one[front], other[front]
            cost, size = cost[one] + total[other], size[one] + held[other]
            chosen = [*(before[one] for before in chosen), options[other]]
        found = [
            [self._selection(k, chosen[k][i], False, deadlines[k], math.inf) for k in range(len(chosen))]
            for i in range(len(cost))
        ]
        return [point[0] for point in found] if self.single else found

    def selection(self, options: Sequence[int] | Sequence[Sequence[int]]) -> Selection | list[Selection]:
        """What the profile says of a selection made by hand, as indices into the sparsities."""
        given: Any = [options] if self.single else options
        if len(given) != len(self.networks):
            raise InvalidValue(f"{len(given)} selections for {len(self.networks)} networks")
        made = []
        for k, (net, one) in enumerate(zip(self.networks, given, strict=True)):
            array = np.asarray(one)
            if array.shape != net.cost.shape[:1] or (array < 0).any() or (array >= net.cost.shape[1]).any():
                raise InvalidValue(
                    f"options = {shown(one)}: {len(net.cost)} indices of sparsities are needed, "
                    f"0 … {net.cost.shape[1] - 1}"
                )
            made.append(self._selection(k, array, False, math.inf, math.inf))
        return made[0] if self.single else made

    def _limits(self, max_latency: Limits, max_bytes: float | None) -> tuple[list[float], float]:
        count = len(self.networks)
        given = list(max_latency) if isinstance(max_latency, Sequence) else [max_latency]
        if max_latency is None:
            given = [None] * count
        if len(given) != count:
            raise InvalidValue(
                f"max_latency = {shown(max_latency)}: {count} deadlines are needed, one for each network"
            )
        for name, values in (("max_latency", given), ("max_bytes", [max_bytes])):
            for value in values:
                if value is not None and not value > 0:
                    raise InvalidValue(f"{name} = {shown(value)}: a positive number is needed, or None for no limit")
        return [math.inf if value is None else float(value) for value in given], (
            math.inf if max_bytes is None else float(max_bytes)
        )

    def _need(self, k: int, deadline: float) -> float:
        latency = self.latencies[k]
        return latency - _within(deadline, latency)

    def _without_deadline(self, k: int) -> _Network:
        if k not in self._timeless:
            self._timeless[k] = self.networks[k].timeless()
        return self._timeless[k]

    def _problem(self, deadlines: Sequence[float], memory: float, by_bytes: bool = False) -> _Problem:
        need = [self._need(k, deadline) for k, deadline in enumerate(deadlines)]
        networks = [
            self.networks[k] if math.isfinite(limit) else self._without_deadline(k) for k, limit in enumerate(need)
        ]
        if by_bytes:
            networks = [net.by_bytes() for net in networks]
        return _Problem(networks, need, math.inf if by_bytes else _within(memory, 1.0) - self.frame_bytes)

    def _solve(self, deadlines: Sequence[float], memory: float, method: Method) -> list[np.ndarray] | None:
        chosen = self._problem(deadlines, memory).solve(method)
        if chosen is not None and method != "enumerate" and not self._keeps(chosen, deadlines, memory):
            # HiGHS may exceed a limit by its tolerance: ask it again for what is a little below
            tighter = [deadline * (1 - 1e-6) for deadline in deadlines]
            chosen = self._problem(tighter, memory * (1 - 1e-6)).solve("milp")
        return chosen

    def _keeps(self, chosen: Sequence[np.ndarray], deadlines: Sequence[float], memory: float) -> bool:
        return self._bytes(chosen) <= _within(memory, 1.0) and all(
            net.total(net.drop, one) >= self._need(k, deadline) - SLACK * abs(self.latencies[k])
            for k, (net, one, deadline) in enumerate(zip(self.networks, chosen, deadlines, strict=True))
        )

    def _selection(self, k: int, options: np.ndarray, relaxed: bool, deadline: float, memory: float) -> Selection:
        net, profile = self.networks[k], self.profiles[k]
        return Selection(
            options=tuple(int(option) for option in options),
            sparsities=tuple(float(profile.sparsities[option]) for option in options),
            est_accuracy=float(profile.accuracy) - net.total(net.cost, options) / self.weights[k],
            est_latency=self.latencies[k] - net.total(net.drop, options),
            est_bytes=float(profile.frame_bytes) + net.total(net.bytes, options),
            relaxed=relaxed,
            max_latency=deadline,
            max_bytes=memory,
        )

    # limits that cannot be kept

    def _least_bytes(self, deadlines: Sequence[float], method: Method) -> float | None:
        """Bytes of the smallest networks that keep the deadlines; an integer programme: its LP would say too little."""
        chosen = self._problem(deadlines, math.inf, by_bytes=True).solve(method)
        if chosen is None:
            return None
        return self._bytes(chosen)

    def _relaxed(self, deadlines: list[float], memory: float, method: Method) -> tuple[list[float], float]:
        least = self._least_bytes(deadlines, method)
        if least is not None:
            return deadlines, max(memory, least)
        memory = max(memory, self.smallest_bytes)
        low, factor = 1.0, self._factor(deadlines, [net.bytes.argmin(1) for net in self.networks])
        exact = factor
        while factor - low > 1e-12 * factor:
            middle = (low + factor) / 2
            problem = self._problem([deadline * middle for deadline in deadlines], memory, by_bytes=True)
            chosen = problem.solve(method)
            if chosen is None or self._bytes(chosen) > _within(memory, 1.0):
                low = middle
            else:
                exact = self._factor(deadlines, chosen)
                factor = min(exact, middle)  # a sum may exceed its limit by a hair: that must not stop the halving
        return [deadline * exact for deadline in deadlines], memory

    def _factor(self, deadlines: Sequence[float], chosen: Sequence[np.ndarray]) -> float:
        """By how much all deadlines must grow for a selection to keep them."""
        return max(
            (latency - net.total(net.drop, one)) / deadline
            for latency, net, one, deadline in zip(self.latencies, self.networks, chosen, deadlines, strict=True)
        )

    def _bytes(self, chosen: Sequence[np.ndarray]) -> float:
        return self.frame_bytes + sum(net.total(net.bytes, one) for net, one in zip(self.networks, chosen, strict=True))

    def _stepped(self, deadlines: list[float], memory: float, method: Method) -> tuple[list[float], float]:
        """The first limits that can be kept, in the reference's steps; how many steps that takes is computed."""
        original, least = self.original_bytes, self._least_bytes(deadlines, method)
        memory = max(memory, self.smallest_bytes)
        wanted = original if least is None else least
        if memory < wanted:
            memory += math.ceil((wanted - memory) / MEMORY_STEP * (1 - SLACK)) * MEMORY_STEP
        if least is not None and least <= _within(memory, 1.0):
            return deadlines, memory
        factor = 0
        while self._problem(deadlines, memory).solve(method) is None:
            short = [
                (self._need(k, deadline) - _max(net.drop)) / LATENCY_STEP
                for k, (net, deadline) in enumerate(zip(self.networks, deadlines, strict=True))
            ]
            factor = max(1, math.ceil(max(short) * (1 - SLACK)))
            deadlines = [deadline + factor * LATENCY_STEP for deadline in deadlines]
        return deadlines, memory

    def _why(self, deadlines: Sequence[float], memory: float, method: Method) -> str:
        fastest = [latency - _max(net.drop) for latency, net in zip(self.latencies, self.networks, strict=True)]
        for k, (deadline, seconds) in enumerate(zip(deadlines, fastest, strict=True)):
            if seconds > _within(deadline, self.latencies[k]):
                which = "" if self.single else f"network {k}: "
                return (
                    f"{which}max_latency = {deadline:.6g} s cannot be kept: the fastest selection takes {seconds:.6g} s"
                )
        least = self._least_bytes(deadlines, method)
        assert least is not None
        within = "" if not any(map(math.isfinite, deadlines)) else " within the deadline"
        return f"max_bytes = {memory:.0f} cannot be kept: the smallest selection{within} takes {math.ceil(least)} bytes"


def _network_front(net: _Network, need: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(cost, bytes, options (N, B)) of the selections of a network that keep its deadline, dominated ones left out."""
    count = len(net.cost)
    future = np.append(np.cumsum(net.drop.max(-1)[::-1])[::-1], 0.0)
    least = np.append(np.cumsum(net.drop.min(-1)[::-1])[::-1], 0.0)
    cost = saved = size = np.zeros(1)
    chosen = np.zeros((1, 0), int)
    for b in range(count):
        options = np.flatnonzero(net.usable[b])
        one, other = (index.ravel() for index in np.indices((len(cost), len(options))))
        other = options[other]
        saved_b = saved[one] + net.drop[b, other]
        keep = saved_b + future[b + 1] >= need
        if not keep.any():
            return None
        one, other = one[keep], other[keep]
        # seconds beyond what any rest would need are worth nothing
        saved_b = np.minimum(saved_b[keep], need - least[b + 1])
        cost_b, size_b = cost[one] + net.cost[b, other], size[one] + net.bytes[b, other]
        front = _front3(cost_b, size_b, saved_b)
        one, other = one[front], other[front]
        cost, size, saved = cost_b[front], size_b[front], saved_b[front]
        chosen = np.concatenate([chosen[one], other[:, None]], axis=1)
    front = _front(cost, size)
    return cost[front], size[front], chosen[front]


def _front3(cost: np.ndarray, size: np.ndarray, saved: np.ndarray) -> np.ndarray:
    """Indices that no other one is as good as in cost, bytes (both little) and seconds saved (many)."""
    order = np.lexsort((-saved, cost, size))
    stairs_cost: list[float] = []
    stairs_saved: list[float] = []  # both ascending: to save more costs more
    kept = []
    for index in order:
        c, d = float(cost[index]), float(saved[index])
        at = bisect_right(stairs_cost, c)
        if at and stairs_saved[at - 1] >= d:
            continue
        kept.append(index)
        first = bisect_left(stairs_cost, c)
        last = bisect_right(stairs_saved, d, lo=first)
        stairs_cost[first:last], stairs_saved[first:last] = [c], [d]
    return np.asarray(kept)


__all__ = [
    "SPARSITIES",
    "InfeasibleError",
    "LatencyEstimate",
    "Profile",
    "ScalingOptimizer",
    "Selection",
    "bytes_moved",
    "bytes_moved_whole",
    "check_sparsities",
    "check_sparsity",
    "estimate_latency",
]
