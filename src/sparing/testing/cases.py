"""What the checks are told about a step, and what they stand on."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core import registry
from sparing.core.errors import SparingError
from sparing.core.fingerprint import fingerprint
from sparing.core.pipeline import advance, begin
from sparing.core.step import Step
from sparing.core.store import Store
from sparing.core.task import Task

if TYPE_CHECKING:
    from sparing.core.job import Job

QUICK: Mapping[str, Any] = {"min_seconds": 0, "max_seconds": 0.01, "memory": False, "energy": "off", "batch": 4}
"""Fields of a meter that wastes no time on clocks."""


def tiny_task() -> Task:
    """Three classes of 8×8 images in memory, and a small convolutional network: what a step is tried on by default."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.data import TensorDataset

    from sparing.core.predictor import build_model
    from sparing.tasks.custom import CustomTask

    def part(count: int, seed: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(seed)
        y = torch.arange(count) % 3
        rows = torch.arange(8).view(1, 1, 8, 1) // 3 == y.view(-1, 1, 1, 1)
        return TensorDataset(2.0 * rows + torch.randn(count, 1, 8, 8, generator=draw), y)

    return CustomTask(
        "tiny",
        part(48, 1),
        part(30, 2),
        part(24, 3),
        part(24, 4),
        model=lambda: build_model("convnet", num_classes=3, image_size=8, widths=[4, 8]),
        loss=cross_entropy,
        labels=("top", "middle", "bottom"),
        unit="image",
        capabilities={"images"},
    )


@dataclass(frozen=True)
class StepCase:
    """How to try a step: all that the checks need to know about it."""

    step: Step
    """With fields that make it as cheap as it can be."""
    nothing: StepCase | str
    """A case in which it has nothing to act on and must raise ``NoEffect``, or why there is no such case."""
    before: tuple[Step, ...] = ()
    """Steps that bring a job to where it can run."""
    after: tuple[Step, ...] = ()
    """Steps that make real what it promises, e.g. a training."""
    task: Callable[[], Task] = tiny_task
    """What it is tried on; it must have what the step needs, and a model that can be saved."""

    @property
    def kind(self) -> type[Step]:
        """The step's class."""
        return type(self.step)

    @property
    def fields(self) -> list[str]:
        """The step's own fields."""
        return [item.name for item in dataclasses.fields(self.step) if item.name != "id"]

    def recipe(self) -> dict[str, Any]:
        """Arguments for :func:`sparing.run`."""
        return {"task": self.task(), "steps": [*self.before, self.step, *self.after], "meter": QUICK}

    def job(self) -> Job:
        """The job this step is to be applied to; what ``before`` makes is kept for the next call."""
        job = begin(self.task(), store=kept_store(), meter=QUICK)
        for step in self.before:
            job = advance(job, step, job.task.splits(job.root).test)[0]
        return job

    def fresh(self, folder: Path) -> Job:
        """The same job with an empty store in ``folder``."""
        job = self.job()
        return job.replace(store=dataclasses.replace(job.store, store=Store(folder)))


@cache
def kept_store() -> Store:
    """A store for what several checks need, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="sparing-checks-")
    store = Store(Path(folder.name) / "store")
    store.scratch = folder  # type: ignore[attr-defined]  # lives as long as the store
    return store


def refusal(call: Callable[[], Any], kind: type[SparingError] = SparingError) -> str | None:
    """The message with which ``call`` raises a ``kind``, or None when it returns; other errors come out."""
    try:
        call()
    except kind as error:
        return str(error)
    return None


def generators() -> str:
    """A digest of the state of Python's, NumPy's and torch's global generators."""
    import torch

    return fingerprint([random.getstate(), list(np.random.get_state()), torch.get_rng_state()])


def reseed(seed: int) -> None:
    """Put the global generators into a known state."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def flat(tree: Any) -> list[np.ndarray]:
    """The leaves of a tree as arrays."""
    from sparing.core.predictor.tree import leaves, to_numpy

    return [np.asarray(to_numpy(leaf)) for _, leaf in leaves(tree)]


@contextlib.contextmanager
def registered(*kinds: type[Step]) -> Iterator[None]:
    """Steps that no package declares, known by name inside the block."""
    known = registry.parts("steps")
    added = {kind.name: kind for kind in kinds if registry.name_of("steps", kind) is None}
    for name in added.keys() & known.keys():
        raise AssertionError(f"another step is registered as {name!r}: {known[name].target}")
    known.update({name: registry.Part(f"{kind.__module__}:{kind.__qualname__}", "") for name, kind in added.items()})
    try:
        yield
    finally:
        for name in added:
            known.pop(name, None)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside the block every connection but to this machine is refused."""
    connect = socket.socket.connect

    def refused(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1")):
            raise AssertionError(f"tries to reach {address}")
        return connect(self, address)

    socket.socket.connect = refused  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]
