"""The one table of our own parts: name → where it lives and what it is, in one line.

Reading it imports nothing, so ``sparing list`` answers at once. Third parties add parts of their own through the
entry point groups ``sparing.tasks``, ``sparing.steps``, ``sparing.models``, ``sparing.predictors`` and ``sparing.operations``.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Where a part lives (``"module:Class"``) and the first line of its docstring."""

    target: str
    summary: str


PARTS: dict[str, dict[str, Part]] = {
    "tasks": {},
    "steps": {},
    "models": {},
    "predictors": {},
    "operations": {},
}
