"""Checks of arguments and configurations that the modules of this room share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparing.core.errors import InvalidValue, did_you_mean, shown


def required(config: Mapping[str, Any], name: str, where: str) -> Any:
    """``config[name]``; :class:`InvalidValue` when it is not there."""
    if not isinstance(config, Mapping):
        raise InvalidValue(f"{where} is {shown(config)}; a mapping with {name!r} is expected")
    if name not in config:
        raise InvalidValue(f"{where} lacks {name!r}; it has {', '.join(map(str, config)) or 'nothing'}")
    return config[name]


def known_keys(config: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raise :class:`InvalidValue` for a key that is none of ``names``."""
    if not isinstance(config, Mapping):
        raise InvalidValue(f"{where} is {shown(config)}; a mapping of {', '.join(names)} is expected")
    for key in config:
        if key not in names:
            raise InvalidValue(f"{where} has no {key!r}.{did_you_mean(str(key), names)} Known: {', '.join(names)}")


def number(name: str, value: Any) -> float:
    """A finite real number; :class:`InvalidValue` for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InvalidValue(f"{name} = {shown(value)}; a finite number is needed")
    return value  # type: ignore[return-value]


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``; :class:`InvalidValue` for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InvalidValue(f"{name} = {shown(value)}; a whole number ≥ {least} is needed")
    return int(value)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What differs between two trees of plain values: "metric.vocab_size was 40, is 41", one text each."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{where}{name}.")
        elif old != new:
            yield f"{where}{name} was {shown(old)}, is {shown(new)}"


def agree(saved: Mapping[str, Any], own: Mapping[str, Any], of: str) -> None:
    """Raise :class:`InvalidValue` that names every setting in which a saved state differs from its new owner."""
    if differing := list(changes(saved, own)):
        raise InvalidValue(f"the saved state of {of} has other settings: {'; '.join(differing)}")


def distributed() -> tuple[int, int]:
    """(rank, processes) of torch.distributed, (0, 1) where it is not set up."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
