"""Networks made of blocks that can be exchanged while they answer, and the runtime that keeps several within limits.

Nothing here needs torch: :class:`ScaledNetwork` is what :class:`~sparing.adaptive.lego.LegoModel` (torch modules) and
:class:`~sparing.adaptive.lego_predictor.LegoPredictor` (ONNX graphs) have in common.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparing.adaptive.scaling import (
    LatencyEstimate,
    Profile,
    ScalingOptimizer,
    Selection,
    bytes_moved,
    bytes_moved_whole,
    estimate_latency,
)
from sparing.core.errors import InvalidValue, did_you_mean, shown

Options = tuple[int, ...]
"""Index into the sparsities, for each block."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a network: a block, or the part of the frame between two blocks."""

    inputs: tuple[str, ...]
    """Names of the tensors it reads."""
    outputs: tuple[str, ...]
    """Names of the tensors that later pieces, or the network's output, read."""
    block: int | None = None
    """Number of the block; None: part of the frame."""


@dataclass(frozen=True)
class Layout:
    """How the pieces of a network hang together. JSON-able by :meth:`to_config`."""

    inputs: tuple[str, ...]
    """Names of the network's inputs."""
    pieces: tuple[Piece, ...]
    """In the order in which they run."""
    output: Any
    """Tree (lists, dicts) of the names of the tensors the network gives."""

    def to_config(self) -> dict[str, Any]:
        """As JSON values."""
        pieces = [
            {"inputs": list(piece.inputs), "outputs": list(piece.outputs), "block": piece.block}
            for piece in self.pieces
        ]
        return {"inputs": list(self.inputs), "pieces": pieces, "output": self.output}

    @classmethod
    def from_config(cls, config: Any) -> Layout:
        """Of :meth:`to_config`'s values; raises :class:`InvalidValue` where a piece reads what none has made."""
        try:
            pieces = tuple(
                Piece(tuple(map(str, item["inputs"])), tuple(map(str, item["outputs"])), item["block"])
                for item in config["pieces"]
            )
            made = cls(tuple(map(str, config["inputs"])), pieces, config["output"])
        except (KeyError, TypeError) as error:
            raise InvalidValue(f"layout = {shown(config)}: {type(error).__name__}: {error}") from error
        made.check()
        return made

    def check(self) -> None:
        """Refuse a layout whose pieces cannot run one after the other."""
        known = set(self.inputs)
        blocks = [piece.block for piece in self.pieces if piece.block is not None]
        if blocks != list(range(len(blocks))) or not blocks:
            raise InvalidValue(f"the layout's blocks are {blocks}; 0, 1, 2 … are needed")
        for number, piece in enumerate(self.pieces):
            if missing := sorted(set(piece.inputs) - known):
                raise InvalidValue(f"piece {number} reads {missing[0]!r}, which no piece before it makes")
            known |= set(piece.outputs)
        if missing := sorted(set(_names(self.output)) - known):
            raise InvalidValue(f"the output reads {missing[0]!r}, which no piece makes")

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return sum(piece.block is not None for piece in self.pieces)


def _names(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _names(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _names(item)
    else:
        raise InvalidValue(f"the output holds {shown(tree)}; names of tensors are needed")


def _filled(tree: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(tree, str):
        return values[tree]
    if isinstance(tree, Mapping):
        return {key: _filled(item, values) for key, item in tree.items()}
    return tuple(_filled(item, values) for item in tree)


@dataclass(frozen=True)
class _Loaded:
    """What answers: a selection and its blocks. A reader holds one of these while it computes."""

    options: Options
    blocks: tuple[Callable[[Any], Any], ...]


class ScaledNetwork(ABC):
    """A network whose blocks are exchanged as a whole: a call is answered by one selection from beginning to end.

    Subclasses define :meth:`_fetch`, and set ``layout``, ``frame`` (a callable for each piece of the frame, by the
    piece's number), ``sizes`` (B, S; bytes of each descendant), ``profile`` (or None), and call ``_start``.
    """

    layout: Layout
    frame: Mapping[int, Callable[..., Any]]
    sizes: np.ndarray
    profile: Profile | None
    _loaded: _Loaded
    _switch: threading.Lock

    def _start(self, options: Sequence[int]) -> None:
        self._switch = threading.Lock()
        found = self._checked(options)
        self._loaded = _Loaded(found, tuple(self._fetch(b, s) for b, s in enumerate(found)))

    @abstractmethod
    def _fetch(self, block: int, option: int) -> Callable[[Any], Any]:
        """A descendant, ready to run."""

    @property
    def current(self) -> Options:
        """The loaded selection."""
        return self._loaded.options

    @property
    def options(self) -> int:
        """How many selections there are."""
        return math.prod([self.sizes.shape[1]] * self.sizes.shape[0])

    def _checked(self, options: Sequence[int]) -> Options:
        blocks, count = self.sizes.shape
        found = tuple(int(option) for option in options)
        if len(found) != blocks or any(not 0 <= option < count for option in found):
            raise InvalidValue(
                f"options = {shown(options)}: {blocks} indices of sparsities are needed, 0 … {count - 1}"
            )
        return found

    def apply(self, selection: Selection | Sequence[int]) -> float:
        """Load a selection; returns the bytes moved: old and new of the blocks that change.

        Only those are fetched. Calls that have begun are answered by the old selection, later ones by the new.
        """
        wanted = self._checked(selection.options if isinstance(selection, Selection) else selection)
        with self._switch:
            before = self._loaded
            blocks = tuple(
                old if one == other else self._fetch(b, one)
                for b, (one, other, old) in enumerate(zip(wanted, before.options, before.blocks, strict=True))
            )
            self._loaded = _Loaded(wanted, blocks)  # one assignment: whoever reads it has the old or the new
        return bytes_moved(self.sizes, before.options, wanted)

    def answer(self, *inputs: Any) -> tuple[Any, Options]:
        """(the network's output, the selection that computed it)."""
        loaded = self._loaded
        return self._run(loaded, inputs), loaded.options

    def _run(self, loaded: _Loaded, inputs: Sequence[Any], seconds: np.ndarray | None = None) -> Any:
        if len(inputs) != len(self.layout.inputs):
            raise InvalidValue(f"{len(inputs)} inputs; this network takes {len(self.layout.inputs)}")
        values: dict[str, Any] = dict(zip(self.layout.inputs, inputs, strict=True))
        for number, piece in enumerate(self.layout.pieces):
            arguments = [values[name] for name in piece.inputs]
            if piece.block is None:
                made = self.frame[number](*arguments)
            else:
                begin = time.perf_counter()
                made = loaded.blocks[piece.block](*arguments)
                if seconds is not None:
                    seconds[piece.block] += time.perf_counter() - begin
            values.update(zip(piece.outputs, (made,) if len(piece.outputs) == 1 else made, strict=True))
        return _filled(self.layout.output, values)

    def measure(self, *inputs: Any, runs: int = 5) -> tuple[np.ndarray, Options]:
        """((B,) seconds of each loaded block, medians over ``runs``; the selection they are of)."""
        if runs < 1:
            raise InvalidValue(f"runs = {runs}: at least 1 is needed")
        loaded = self._loaded
        self._run(loaded, inputs)
        seconds = np.zeros((runs, self.sizes.shape[0]))
        for run in seconds:
            self._run(loaded, inputs, run)
        return np.median(seconds, axis=0), loaded.options

    def latency_now(self, *inputs: Any, runs: int = 5) -> LatencyEstimate:
        """The profile's latencies, corrected by how long the loaded blocks take at this moment."""
        profile = self._profiled()
        seconds, options = self.measure(*inputs, runs=runs)
        return estimate_latency(profile.latency, profile.rel, profile.model_latency, seconds, options)

    def choose(
        self,
        max_latency: float | None = None,
        max_bytes: float | None = None,
        *,
        relax: bool = False,
        now: LatencyEstimate | None = None,
    ) -> Selection:
        """Load the most accurate selection within a deadline in seconds and so many bytes.

        See :class:`~sparing.adaptive.scaling.ScalingOptimizer`, whose errors it raises.
        ``now``: by :meth:`latency_now`; None: latencies as they were profiled.
        """
        selection = ScalingOptimizer(self._profiled(), now=now).solve(max_latency, max_bytes, relax)
        self.apply(selection)
        return selection

    def _profiled(self) -> Profile:
        if self.profile is None:
            raise InvalidValue("this network has no profile, by which to choose; apply takes a selection")
        return self.profile


# --- several networks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What several networks may take together, and each by itself."""

    max_bytes: float | None = None
    """Memory for all networks, frames included; None: any."""
    max_latency: Mapping[str, float] = field(default_factory=dict)
    """Deadline in seconds by network; one that is not named has none."""


@dataclass(frozen=True)
class Adaptation:
    """What changed when a budget did."""

    budget: Budget
    selections: Mapping[str, Selection]
    moved: float
    """Bytes paged out and in; 0 the first time."""
    moved_whole: float
    """Bytes that exchanging whole models for the same selections would have paged; 0 where nothing changed."""
    choosing_s: float
    """Seconds the optimiser took."""
    switching_s: float
    """Seconds the exchange of blocks took."""


class LegoRuntime:
    """Keeps several networks within one memory limit and a deadline each.

    Args:
        networks: by name, each with a profile.
        weights: how much an accuracy drop of a network counts; 1 by default.
    """

    def __init__(self, networks: Mapping[str, ScaledNetwork], weights: Mapping[str, float] | None = None) -> None:
        if not networks:
            raise InvalidValue("networks = {}: at least one is needed")
        self.networks = dict(networks)
        for name in weights or {}:
            self._known(name)
        self._weights = [float((weights or {}).get(name, 1.0)) for name in self.networks]
        self._profiles = [network._profiled() for network in self.networks.values()]
        self._optimizer = ScalingOptimizer(self._profiles, weights=self._weights)
        self._adapting = threading.Lock()
        self._adapted = False

    def _known(self, name: str) -> None:
        if name not in self.networks:
            raise InvalidValue(
                f"no network {name!r}.{did_you_mean(name, self.networks)} Networks: {', '.join(self.networks)}"
            )

    def adapt(
        self, budget: Budget, *, now: Mapping[str, LatencyEstimate] | None = None, relax: bool = False
    ) -> Adaptation:
        """Load the selections of least weighted accuracy drop within the budget.

        ``now``: latencies of some networks as they are now, by :meth:`ScaledNetwork.latency_now`. Networks that get
        smaller switch first, so that all together stay below the larger of the two limits while they switch.

        Raises:
            InfeasibleError: nothing keeps the budget, and ``relax`` is off; no network has changed then.
        """
        for name in {**budget.max_latency, **(now or {})}:
            self._known(name)
        with self._adapting:
            start = time.perf_counter()
            optimizer = self._optimizer
            if now:
                estimates = [now.get(name) for name in self.networks]
                optimizer = ScalingOptimizer(self._profiles, now=estimates, weights=self._weights)
            deadlines = [budget.max_latency.get(name) for name in self.networks]
            found = dict(zip(self.networks, optimizer.solve(deadlines, budget.max_bytes, relax), strict=True))
            chosen = time.perf_counter()
            before = {name: network.current for name, network in self.networks.items()}

            def growth(name: str) -> float:
                sizes = self.networks[name].sizes
                blocks = np.arange(len(sizes))
                return float((sizes[blocks, found[name].options] - sizes[blocks, before[name]]).sum())

            moved = sum(self.networks[name].apply(found[name]) for name in sorted(found, key=growth))
            changed = [name for name in found if before[name] != found[name].options]
            whole = float(sum(bytes_moved_whole(self.networks[n].sizes, before[n], found[n].options) for n in changed))
            switched = time.perf_counter()
            first, self._adapted = not self._adapted, True
        return Adaptation(
            budget, found, 0.0 if first else moved, 0.0 if first else whole, chosen - start, switched - chosen
        )


__all__ = ["Adaptation", "Budget", "Layout", "LegoRuntime", "Options", "Piece", "ScaledNetwork"]
