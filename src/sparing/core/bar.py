"""A progress bar on a terminal for work that takes long."""

from __future__ import annotations

import time
from typing import Any

AFTER_S = 2.0


class Bar:
    """Appears once the work has taken two seconds; drawn at most five times a second, taken away by :meth:`stop`."""

    def __init__(self) -> None:
        self._start, self._drawn = time.monotonic(), 0.0
        self._bar: Any = None

    @property
    def due(self) -> bool:
        """Whether it is time to draw."""
        now = time.monotonic()
        return now - self._start >= AFTER_S and now - self._drawn >= 0.2

    def draw(self, done: int, total: int, text: str) -> None:
        """Show that ``done`` of ``total`` is over."""
        self._drawn = time.monotonic()
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done, description=text)

    def stop(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
