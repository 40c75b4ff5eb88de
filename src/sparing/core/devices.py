"""Where loops of our own run: the device that a step's field names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparing.core.errors import InvalidValue

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""A GPU if there is one, else the CPU."""


def device_named(name: str) -> torch.device:
    """The device "auto" stands for, or the one that torch knows by this name; :class:`InvalidValue` for another."""
    import torch

    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidValue(f"device = {name!r}: {error}") from None


def check_device(name: str) -> None:
    """Raise :class:`InvalidValue` for a name that is no device's; "auto" is known without torch."""
    if name != AUTO:
        device_named(name)
