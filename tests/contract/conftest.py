"""Guests bring their own parts; these fixtures make them known for the length of one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sparing.core import clock, registry
from sparing.parts import PARTS, Part


@pytest.fixture(autouse=True, scope="module")
def _hasty_clock() -> Iterator[None]:
    """Nothing here depends on what the clock shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "WARM_UP_SECONDS", 0.002)
        patch.setattr(clock, "BLOCK_SECONDS", 0.002)
        yield


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
