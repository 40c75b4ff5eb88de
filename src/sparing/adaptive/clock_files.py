"""Setting a clock through the files that Linux has for it: only when told to, and never left lowered.

cpufreq takes kHz in ``scaling_setspeed`` (governor "userspace"); devfreq takes Hz in ``min_freq`` and ``max_freq``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from sparing.core.errors import InvalidValue, SparingError


class ClockNotSettable(SparingError):
    """A clock file cannot be written; the message says which and why."""


@dataclass
class Clock:
    """One clock's levels and files; a context manager that restores what it found.

    Args:
        files: ("scaling_setspeed",) or ("min_freq", "max_freq"), as paths.
        frequencies: ascending, in the files' unit.
        write: False (the default): nothing is written, :attr:`log` says what would be.
    """

    files: tuple[Path, ...]
    frequencies: tuple[int, ...]
    write: bool = False
    log: list[tuple[Path, int]] = field(default_factory=list)
    """(file, value) of every write, made or not."""
    seconds: float = 0.0
    """Spent in writing: part of the latency of what runs."""
    switches: int = 0
    level: int = -1
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.files = tuple(Path(file) for file in self.files)
        if len(self.files) not in (1, 2):
            raise InvalidValue(
                f"{len(self.files)} clock files; scaling_setspeed, or min_freq and max_freq, are expected"
            )
        if not self.frequencies or list(self.frequencies) != sorted(set(self.frequencies)) or self.frequencies[0] <= 0:
            raise InvalidValue(f"frequencies = {list(self.frequencies)}; ascending numbers above 0 are expected")
        self._found: list[str] = []

    @property
    def highest(self) -> int:
        """The level of the full clock."""
        return len(self.frequencies) - 1

    def __enter__(self) -> Self:
        """Remember the files' values, and go to the highest level."""
        if self.write:
            self._found = [self._read(file) for file in self.files]
        try:
            self.set(self.highest)
        except BaseException:
            with contextlib.suppress(ClockNotSettable):  # the first error says more
                self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back what was found, whatever happened."""
        self._restore()

    def set(self, level: int) -> None:
        """Go to a level; nothing is written when it is the present one."""
        if not 0 <= level <= self.highest:
            raise InvalidValue(f"level = {level}; the clock has levels 0…{self.highest}")
        if level == self.level:
            return
        start = self.clock()
        # a minimum above the maximum is refused by the kernel at every moment: going up the maximum moves first
        ordered = reversed(self.files) if level > self.level else self.files
        for file in ordered:
            self._put(file, str(self.frequencies[level]))
        self.level = level
        self.switches += 1
        self.seconds += self.clock() - start

    def _restore(self) -> None:
        now = self.frequencies[self.level] if self.level >= 0 else 0
        self.level = -1  # entered again, the clock has to be set again
        found, self._found = self._found, []
        if not found:
            return
        pairs = list(zip(self.files, found, strict=True))
        rising = found[-1].isdigit() and int(found[-1]) > now
        failed: ClockNotSettable | None = None
        for file, value in reversed(pairs) if rising else pairs:
            try:
                self._put(file, value)
            except ClockNotSettable as error:  # the other file is put back all the same
                failed = failed or error
        if failed is not None:
            raise failed

    def _put(self, file: Path, value: str) -> None:
        self.log.append((file, int(value) if value.isdigit() else -1))
        if not self.write:
            return
        try:
            file.write_text(value, encoding="ascii")
        except OSError as error:
            raise ClockNotSettable(
                f"{file}: cannot write {value}: {error.strerror}; it takes root, and the governor 'userspace'"
            ) from error

    @staticmethod
    def _read(file: Path) -> str:
        try:
            return file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise ClockNotSettable(
                f"{file}: cannot be read: {error.strerror}; name a clock file of this machine"
            ) from error
