"""Requests that keep coming while budgets change: a load generator and the controller that adapts the networks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparing.adaptive.lego_runtime import Adaptation, Budget, LegoRuntime, Options
from sparing.core.errors import InvalidValue, SparingError


@dataclass(frozen=True)
class Request:
    """One input of one network, and when it arrives, in seconds from the beginning."""

    network: str
    inputs: tuple[Any, ...]
    at_s: float


@dataclass(frozen=True)
class Answer:
    """What became of a request; times in seconds from the beginning."""

    request: Request
    output: Any
    """None when outputs are not kept."""
    options: Options
    """The selection that computed it."""
    begun_s: float
    done_s: float

    @property
    def seconds(self) -> float:
        """From arrival to answer, waiting included."""
        return self.done_s - self.request.at_s


@dataclass(frozen=True)
class LoadReport:
    """A load that was served: an answer for each request, in the order of the requests."""

    answers: tuple[Answer, ...]
    adaptations: tuple[tuple[float, Adaptation], ...]
    """(seconds from the beginning, what changed)."""

    def latency(self, share: float = 0.5, network: str | None = None) -> float:
        """Quantile of the seconds from arrival to answer."""
        seconds = [answer.seconds for answer in self.answers if network in (None, answer.request.network)]
        return float(np.quantile(seconds, share))

    @property
    def moved(self) -> float:
        """Bytes paged in all adaptations."""
        return sum(adaptation.moved for _, adaptation in self.adaptations)


def poisson_load(
    samples: Mapping[str, Sequence[tuple[Any, ...]]], rate: Mapping[str, float] | float, seconds: float, seed: int = 0
) -> list[Request]:
    """Requests at independent exponential intervals, ``rate`` a second for each network, drawn from its samples."""
    if not seconds > 0:
        raise InvalidValue(f"seconds = {seconds}: a positive number is needed")
    draw, requests = np.random.default_rng(seed), []
    for name, inputs in samples.items():
        each = rate[name] if isinstance(rate, Mapping) else rate
        if not each > 0 or not len(inputs):
            raise InvalidValue(f"{name}: a positive rate ({each}) and at least one sample ({len(inputs)}) are needed")
        at = draw.exponential(1 / each)
        while at < seconds:
            requests.append(Request(name, inputs[int(draw.integers(len(inputs)))], float(at)))
            at += draw.exponential(1 / each)
    return sorted(requests, key=lambda request: request.at_s)


def serve(
    runtime: LegoRuntime,
    requests: Sequence[Request],
    budgets: Sequence[tuple[float, Budget]],
    *,
    workers: int = 2,
    relax: bool = False,
    keep_outputs: bool = False,
) -> LoadReport:
    """Send the requests at their times, answer them in ``workers`` threads, and adapt to each budget at its time.

    Args:
        runtime: the networks that the requests name.
        requests: see :func:`poisson_load`.
        budgets: (seconds from the beginning, budget).
        workers: threads that answer; a request waits while all are busy.
        relax: see :meth:`LegoRuntime.adapt`.
        keep_outputs: keep what was answered.

    Raises:
        SparingError: a request or an adaptation failed; the first failure, naming which. All threads have ended then.
    """
    if workers < 1:
        raise InvalidValue(f"workers = {workers}: at least 1 is needed")
    for request in requests:
        runtime._known(request.network)
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    answers: list[Answer | None] = [None] * len(requests)
    adaptations: list[tuple[float, Adaptation]] = []
    failures: list[tuple[str, Exception]] = []
    stop = threading.Event()
    start = time.perf_counter()

    def wait_until(at_s: float) -> bool:
        """False when something failed meanwhile."""
        return not stop.wait(max(0.0, start + at_s - time.perf_counter()))

    def send() -> None:
        for number, request in enumerate(requests):
            if not wait_until(request.at_s):
                break
            waiting.put(number)
        for _ in range(workers):
            waiting.put(None)

    def work() -> None:
        while (number := waiting.get()) is not None:
            request = requests[number]
            begun = time.perf_counter() - start
            try:
                output, options = runtime.networks[request.network].answer(*request.inputs)
            except Exception as error:  # whatever a network raises belongs to the request
                failures.append((f"request {number} to {request.network!r}", error))
                stop.set()
                continue
            done = time.perf_counter() - start
            answers[number] = Answer(request, output if keep_outputs else None, options, begun, done)

    def control() -> None:
        for at_s, budget in sorted(budgets, key=lambda item: item[0]):
            if not wait_until(at_s):
                return
            try:
                adaptations.append((time.perf_counter() - start, runtime.adapt(budget, relax=relax)))
            except Exception as error:
                failures.append((f"the budget at {at_s:g} s", error))
                stop.set()

    threads = [threading.Thread(target=target) for target in (send, control, *[work] * workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        where, error = failures[0]
        raise SparingError(f"{where} failed: {type(error).__name__}: {error}") from error
    assert all(answer is not None for answer in answers)
    return LoadReport(tuple(answer for answer in answers if answer is not None), tuple(adaptations))


__all__ = ["Answer", "LoadReport", "Request", "poisson_load", "serve"]
