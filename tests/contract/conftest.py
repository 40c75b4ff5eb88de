"""Guests bring their own parts; these fixtures make them known for the length of one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sparing.core import registry
from sparing.parts import PARTS, Part


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``register("steps", Guest, ...)`` adds parts under their names, as an entry point would."""

    def add(kind: str, *things: Any) -> None:
        for thing in things:
            name = thing.kind if kind == "predictors" else thing.name
            part = Part(f"{thing.__module__}:{thing.__qualname__}", (thing.__doc__ or "").partition("\n")[0])
            monkeypatch.setitem(PARTS[kind], name, part)
        registry.parts.cache_clear()

    yield add
    registry.parts.cache_clear()
