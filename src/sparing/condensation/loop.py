"""What every condenser's loop shares: callbacks, labels, unfinished work that is kept, a progress bar, and its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.probe import peak_mib

if TYPE_CHECKING:
    from sparing.core.training.fit import Keeper

SAVE_EVERY_S = 20.0
"""Seconds between two states of an unfinished condensation."""


class Callback(Protocol):
    """What may follow or change a condensation; a callback has any of these methods.

    One with ``state_dict()`` and ``load_state_dict(state)`` has its state kept with the unfinished condensation.
    """

    def on_data_ready(self, data: Any) -> Any:
        """Once, before anything is taken from the real data; what it returns is condensed instead."""

    def before_synthetic_update(self, iteration: int, outer: int) -> None:
        """Before each update of the synthetic data."""

    def after_network_update(self, network: nn.Module) -> None:
        """After the network has been trained on the synthetic data, between two updates of these."""

    def on_iteration_end(self, iteration: int, loss: float) -> None:
        """After each iteration, with its mean matching loss."""


class Callbacks:
    """Calls the methods that each of several callbacks has."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = tuple(callbacks)

    def _having(self, method: str) -> Iterator[Callable[..., Any]]:
        for callback in self.callbacks:
            found = getattr(callback, method, None)
            if callable(found):
                yield found

    def ready(self, data: Any) -> Any:
        """``on_data_ready`` of each, one after the other."""
        for method in self._having("on_data_ready"):
            data = method(data)
        return data

    def call(self, method: str, *arguments: Any) -> None:
        """``method`` of each that has it."""
        for found in self._having(method):
            found(*arguments)

    def state(self) -> list[Any]:
        """Of each: its ``state_dict()`` or None."""
        return [c.state_dict() if hasattr(c, "state_dict") else None for c in self.callbacks]

    def restore(self, states: Sequence[Any]) -> None:
        """What :meth:`state` gave."""
        for callback, state in zip(self.callbacks, states, strict=True):
            if state is not None:
                callback.load_state_dict(state)


@dataclass(frozen=True)
class CondensingCost:
    """What a condensation took."""

    seconds: float
    """Wall seconds of all attempts, up to their last kept state for those that were killed."""
    peak_bytes: int
    """Most memory: of the device where tensors lie on one, else the process's highest resident memory so far."""
    bytes_before: int
    """Bytes of the real data."""
    bytes_after: int
    """Bytes of the synthetic data."""


def condensing_cost(seconds: float, before: Sequence[Tensor], after: Sequence[Tensor]) -> CondensingCost:
    """The cost, with the bytes of the tensors and the peak memory as they are now."""
    device = before[0].device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else int(peak_mib() * (1 << 20))
    return CondensingCost(seconds, peak, sum(map(_bytes, before)), sum(map(_bytes, after)))


def _bytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return _bytes(tensor.indices()) + _bytes(tensor.values())
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class LabelAllocation:
    """The classes of the synthetic samples."""

    labels: Tensor
    """Class of each row, int64 (n,)."""
    ranges: tuple[tuple[int, int], ...]
    """Of each class: its first row and the one after its last."""


def allocate_labels(
    counts: Sequence[int], *, per_class: int | None = None, rate: float | None = None
) -> LabelAllocation:
    """How many synthetic samples each class gets, and which rows (GCond, Jin et al. 2022, arXiv:2110.07580, its code).

    With ``per_class``, so many of each class, 0…C − 1. With ``rate``, ⌊rate · count⌋ but at least 1 of each class, from
    the rarest to the most frequent (of equals, the lower number first), and for the last what is missing to
    ⌊rate · total⌋, which may be none.

    Args:
        counts: real samples of each class 0…C − 1.
        per_class: at least 1.
        rate: 0 < rate ≤ 1. One of the two is given.

    Raises:
        InvalidValue: neither or both are given, or out of range; nothing, or less, is left for the last class.
    """
    if (per_class is None) == (rate is None):
        raise InvalidValue(f"per_class = {per_class}, rate = {rate}; one of the two is expected")
    if per_class is not None:
        check_whole(per_class=per_class)
        order, sizes = list(range(len(counts))), [per_class] * len(counts)
    else:
        assert rate is not None
        check_rate(rate)
        order = sorted(range(len(counts)), key=lambda c: counts[c])
        sizes = [max(int(counts[c] * rate), 1) for c in order[:-1]]
        left = int(sum(counts) * rate) - sum(sizes)
        if left < 0:
            raise InvalidValue(
                f"rate = {rate} of {sum(counts)} samples makes {int(sum(counts) * rate)}, fewer than one for each of "
                f"the other {len(sizes)} classes; a higher rate is expected"
            )
        sizes.append(left)
    ranges = [(0, 0)] * len(counts)
    first = 0
    for number, size in zip(order, sizes, strict=True):
        ranges[number] = (first, first + size)
        first += size
    return LabelAllocation(torch.tensor(order).repeat_interleave(torch.tensor(sizes)), tuple(ranges))


def rows_for_all(allocation: LabelAllocation) -> LabelAllocation:
    """``allocation``, or :class:`InvalidValue` naming a class that got no row."""
    for number, (first, last) in enumerate(allocation.ranges):
        if first == last:
            raise InvalidValue(f"class {number} gets no synthetic sample; a higher rate, or n_per_class, is expected")
    return allocation


def check_whole(at_least: int = 1, **values: Any) -> None:
    """:class:`InvalidValue` for the first that is no whole number of ``at_least`` or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise InvalidValue(f"{name} = {value!r}; a whole number of at least {at_least} is expected")


def check_positive(zero: bool = False, **values: Any) -> None:
    """:class:`InvalidValue` for the first that is no finite number above 0, or from 0 on if ``zero``."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not zero):
            raise InvalidValue(f"{name} = {value!r}; a number {'≥' if zero else '>'} 0 is expected")


def check_rate(rate: Any) -> None:
    """:class:`InvalidValue` for what is no number in (0, 1]."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise InvalidValue(f"rate = {rate!r}; 0 < rate ≤ 1 is expected")


@contextmanager
def bar(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal once two seconds are over; yields (done, text) → None that moves it."""
    from rich.console import Console

    console = Console(stderr=True)
    start, shown = time.monotonic(), None

    def move(done: int, text: str) -> None:
        nonlocal shown
        if not console.is_terminal or time.monotonic() - start < 2:
            return
        if shown is None:
            from rich.progress import Progress

            shown = Progress(console=console, transient=True)
            shown.start()
            shown.add_task(what, total=total)
        shown.update(shown.task_ids[0], completed=done, description=f"{what}, {text}")

    try:
        yield move
    finally:
        if shown is not None:
            shown.stop()


def run_iterations(
    iterations: int,
    step: Callable[[int], float],
    state: Callable[[], dict[str, Any]],
    restore: Callable[[dict[str, Any]], None],
    callbacks: Callbacks,
    keeper: Keeper | None,
    what: str,
    save_every_s: float = SAVE_EVERY_S,
) -> tuple[list[float], float]:
    """Run ``step`` for each iteration, going on from the state that ``keeper`` has.

    Args:
        iterations: how many.
        step: iteration → loss. All its randomness must follow from the iteration, and from what ``state`` returns.
        state: what the next step depends on, as nested dicts and lists of tensors and plain values.
        restore: takes what ``state`` returned.
        callbacks: their state is kept too; ``on_iteration_end`` is called.
        keeper: keeps the state; None: nothing is kept.
        what: name in the progress bar.
        save_every_s: seconds between two kept states.

    Returns (the loss of each iteration, wall seconds of all attempts).

    Raises:
        TrainingDiverged: a loss is not finite.
    """
    losses: list[float] = []
    before = 0.0
    if keeper is not None and (kept := keeper.load()) is not None:
        losses, before = list(kept["losses"]), kept["seconds"]
        restore(kept["state"])
        callbacks.restore(kept["callbacks"])
    start = saved = time.monotonic()
    with bar(iterations, what) as move:
        for number in range(len(losses), iterations):
            loss = step(number)
            if not math.isfinite(loss):
                raise TrainingDiverged(
                    f"{what}: the matching loss is {loss} in iteration {number}; lower learning rates may help"
                )
            losses.append(loss)
            callbacks.call("on_iteration_end", number, loss)
            move(number + 1, f"loss {loss:.4g}")
            now = time.monotonic()
            if keeper is not None and now - saved >= save_every_s and number + 1 < iterations:
                keeper.save(
                    {
                        "losses": list(losses),
                        "seconds": before + now - start,
                        "state": state(),
                        "callbacks": callbacks.state(),
                    }
                )
                saved = now
    return losses, before + time.monotonic() - start
