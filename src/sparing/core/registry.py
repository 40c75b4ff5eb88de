"""Finding parts by name: our own table first, then the entry points of installed packages."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from sparing.core.errors import SparingError, UnknownName, did_you_mean, shown
from sparing.parts import PARTS, Part

KINDS = tuple(PARTS)


@cache
def parts(kind: str) -> dict[str, Part]:
    """All parts of one ``kind`` ("tasks", "steps", "models", "predictors", "operations"), ours and third parties'.

    A third party's name may not hide one of ours.
    """
    found = dict(PARTS[kind])
    for entry in entry_points(group=f"sparing.{kind}"):
        if entry.name in found:
            raise SparingError(
                f"{entry.dist.name if entry.dist else entry.value} declares the {kind[:-1]} {entry.name!r}, "
                f"a name already taken by {found[entry.name].target}"
            )
        found[entry.name] = Part(entry.value, f"from {entry.dist.name if entry.dist else entry.value}")
    return found


def resolve(kind: str, name: str) -> Any:
    """The class or function registered as ``name``; raises :class:`UnknownName` with the closest known name."""
    known = parts(kind)
    if name not in known:
        raise UnknownName(
            f"unknown {kind[:-1]} {shown(name)}.{did_you_mean(name, known)} Known {kind}: {', '.join(sorted(known))}"
        )
    module, _, attribute = known[name].target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except SparingError:
        raise
    except Exception as error:  # whatever somebody else's package does when it is imported
        raise SparingError(
            f"the {kind[:-1]} {name!r} ({known[name].summary}) cannot be imported from {known[name].target}: "
            f"{type(error).__name__}: {error}"
        ) from error


def name_of(kind: str, thing: Any) -> str | None:
    """The registered name of a class or function, or None when it is nobody's part."""
    target = f"{thing.__module__}:{thing.__qualname__}"
    return next((name for name, part in parts(kind).items() if part.target == target), None)
