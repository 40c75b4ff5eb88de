"""Faults on purpose: an error or a death at a chosen call of the hook behind every file Sparing writes."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fail_at(count: int, number: int = errno.ENOSPC) -> Callable[[str, Path], None]:
    """A hook that raises an ``OSError`` at the call with this number, counted from 1."""
    calls = [0]

    def hook(stage: str, target: Path) -> None:
        calls[0] += 1
        if calls[0] == count:
            raise OSError(number, os.strerror(number))

    return hook


def in_child(action: Callable[[], Any]) -> int:
    """Run ``action`` in a forked child; returns how it ended, as ``os.waitstatus_to_exitcode`` puts it."""
    if (child := os.fork()) == 0:
        try:
            action()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class Killed(Exception):
    """As a kill."""


class DeadlyKeeper:
    """Keeps states in memory and raises :class:`Killed` after it has kept so many."""

    def __init__(self, deadly: int) -> None:
        self.state: Any = None
        self.deadly = deadly

    def load(self) -> Any:
        return copy.deepcopy(self.state)

    def save(self, state: Any) -> None:
        self.state = copy.deepcopy(state)
        self.deadly -= 1
        if self.deadly == 0:
            raise Killed
