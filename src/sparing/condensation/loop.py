"""What the condensers of graphs share: which classes get how many rows, the loop that can be resumed, and its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparing.condensation.callbacks import Callbacks
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.probe import peak_mib
from sparing.core.randomness import isolated_rng
from sparing.core.store import cpu_seconds

if TYPE_CHECKING:
    from sparing.core.training.fit import Keeper


def cost_of(spent: Sequence[float], before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, float]:
    """What a condensation took: ``wall_s``, ``cpu_s``, ``peak_bytes``, ``bytes_before`` and ``bytes_after``.

    The peak is that of the device where tensors lie on one, else the highest resident memory of the process so far.

    Args:
        spent: (wall, CPU) seconds.
        before: the real data's tensors.
        after: the synthetic data's.
    """
    device = before[0].device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_mib() * (1 << 20)
    return {
        "wall_s": spent[0],
        "cpu_s": spent[1],
        "peak_bytes": float(peak),
        "bytes_before": float(sum(map(_bytes, before))),
        "bytes_after": float(sum(map(_bytes, after))),
    }


def _bytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices().nbytes + tensor.values().nbytes
    return tensor.nbytes


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
    *,
    what: str,
    settings: dict[str, Any],
    keeper: Keeper | None = None,
    checkpoint_every: int = 1,
) -> tuple[list[float], tuple[float, float]]:
    """Run ``step`` for each iteration, going on from the state that ``keeper`` has.

    Args:
        iterations: how many.
        step: iteration → loss. It is called with torch's, NumPy's and Python's generators seeded from the iteration's
            number and ``settings["random_state"]``; nothing else may be drawn from.
        state: what the next step depends on, as nested dicts and lists of tensors and plain values.
        restore: takes what ``state`` returned.
        callbacks: their state is kept too, and they are told of the iteration's end.
        what: is done, for messages and the progress bar.
        settings: that the result depends on, plain JSON; a state that was kept under others is refused.
        keeper: keeps the state; None: nothing is kept.
        checkpoint_every: iterations between two states that are kept.

    Returns (the loss of each iteration, (wall, CPU) seconds of all attempts up to their last state).

    Raises:
        TrainingDiverged: a loss is not finite.
        InvalidValue: a state of another condensation.
    """
    losses: list[float] = []
    spent = (0.0, 0.0)
    if keeper is not None and (kept := keeper.load()) is not None:
        if kept["settings"] != settings:
            raise InvalidValue(f"the kept state is of {kept['settings']}; this is {settings}")
        losses, spent = list(kept["losses"]), tuple(kept["spent"])
        restore(kept["state"])
        callbacks.load(kept["callbacks"])
    wall, cpu = time.perf_counter() - spent[0], cpu_seconds() - spent[1]
    with bar(iterations, what) as move:
        for number in range(len(losses), iterations):
            with isolated_rng(what, settings["random_state"], number):
                loss = step(number)
                if not math.isfinite(loss):
                    raise TrainingDiverged(
                        f"{what}: the loss is {loss} in iteration {number}; lower learning rates may help"
                    )
                losses.append(loss)
                callbacks.iteration_end(number, loss)
            move(number + 1, f"loss {loss:.4g}")
            if keeper is not None and (number + 1) % checkpoint_every == 0 and number + 1 < iterations:
                now = [time.perf_counter() - wall, cpu_seconds() - cpu]
                progress = {"settings": settings, "losses": list(losses), "spent": now, "state": state()}
                keeper.save(progress | {"callbacks": callbacks.state()})
    return losses, (time.perf_counter() - wall, cpu_seconds() - cpu)
