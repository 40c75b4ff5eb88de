"""What a reader may take: a second of CPU time, 256 MiB, and no way out but a ``SparingError``."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparing.core.errors import SparingError

SECONDS = 1.0
MEBIBYTES = 256.0


@dataclass
class Outcome:
    """How a call ended in a process of its own, and what it took."""

    raised: str
    """Class and message of what it raised, or an empty text."""
    deliberate: bool
    """True for a ``SparingError``."""
    seconds: float
    """CPU time: the tests' machine may be busy with other things."""
    mebibytes: float
    """Peak of the resident memory above what the process had before."""


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def watched(function: Callable[[], Any]) -> Outcome:
    """Call ``function`` in a forked child, whose memory nothing else has touched."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            signal.alarm(60)
            gc.freeze()  # what the parent holds is not looked through again
            before, start = _resident(), time.process_time()
            raised, deliberate = "", False
            try:
                function()
            except BaseException as error:
                raised, deliberate = f"{type(error).__name__}: {error}", isinstance(error, SparingError)
            seconds = time.process_time() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            os.write(writing, json.dumps([raised[:2000], deliberate, seconds, peak - before]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, f"the child died with {answer!r}"
    return Outcome(*json.loads(answer))


def refuses(function: Callable[[], Any]) -> str:
    """Assert that ``function`` raises a ``SparingError`` within the bounds; returns its class and message."""
    outcome = watched(function)
    assert outcome.deliberate, outcome
    within_bounds(outcome)
    return outcome.raised


def within_bounds(outcome: Outcome, slower: float = 1) -> None:
    """Assert that a call kept to its memory and its second, times ``slower`` where annotations are checked."""
    assert outcome.seconds < SECONDS * slower, outcome
    assert outcome.mebibytes < MEBIBYTES, outcome
