"""Every error Sparing raises on purpose.

One base class, so that ``except SparingError`` catches what a user can mend and lets bugs through. A message says
what was wrong, where it was (file:line, field, sample index, layer path) and what would be right.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class SparingError(Exception):
    """Base of every deliberate error."""


class InvalidValue(SparingError, ValueError):
    """An argument or field holds a value outside what is allowed."""


class UnknownName(InvalidValue):
    """A name that no task, step, model or recipe carries."""


class RecipeError(SparingError):
    """A recipe cannot be read or planned. ``problems`` lists everything found, each with its place."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(SparingError):
    """Data that is missing, corrupt, empty, mislabelled or of the wrong shape; names the file and the record."""


class InvalidRecord(DataError, InvalidValue):
    """A record of data holds a value outside what is allowed; names the record and the value."""


class CorruptFile(SparingError):
    """A file Sparing wrote is truncated, tampered with, or of a version this release does not read."""


class UntrustedCode(SparingError):
    """A model folder asks for a class that is neither Sparing's own nor declared as trusted by the caller."""


class IncompatibleStep(SparingError):
    """A step cannot run on this job: a missing capability, a taken slot, or a senseless order."""


class NoEffect(SparingError):
    """A step found nothing to act on; the message lists what was looked at and why each was passed over."""


class NotExportable(SparingError):
    """A model cannot be written in the requested format; names the operator or layer that stands in the way."""


class UnsupportedISA(SparingError):
    """An instruction path was asked for by name that this CPU, or this build of the engine, does not have."""


class TrainingDiverged(SparingError):
    """The loss stayed NaN or infinite for several steps in a row."""


class StoreError(SparingError):
    """The store cannot be read or written (disk full, read-only, foreign version)."""


class MissingDependency(SparingError, ImportError):
    """An optional package is needed; the message holds the command that installs it.

    ``extra`` is the extra of Sparing that has it; "" for one that Sparing never installs.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        wanted = f"'sparing[{extra}]'" if extra else package
        super().__init__(f"{purpose} needs the package {package!r}: pip install {wanted}")


def shown(value: Any, limit: int = 120) -> str:
    """A value as Python writes it, cut after ``limit`` characters, for messages."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``known``, or an empty string when nothing is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
