"""Steps that need, give, remove, promise and realise something, and a task to go to; nothing of it is ever computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from sparing.core.job import Job
from sparing.core.step import RowId, Stage, Step, step
from sparing.core.task import Splits, Task
from sparing.tasks.images.digits import Digits


class Guest(Step):
    stage: ClassVar[Stage] = Stage.MODEL
    source: ClassVar[str] = "these tests"

    def apply(self, job: Job) -> Job:
        raise AssertionError(f"planning applied {self.id}")


@step("learn")
class Learn(Guest):
    """Trains."""

    gives = frozenset({"trained"})
    realises = frozenset({"training"})


@step("forget")
class Forget(Guest):
    """Makes the model untrained again."""

    removes = frozenset({"trained"})


@step("mask")
class Mask(Guest):
    """Promises sparsity."""

    needs = frozenset({"trained"})
    promises = frozenset({"sparsity"})


@step("shrink")
class Shrink(Guest):
    """Realises sparsity."""

    realises = frozenset({"sparsity"})


@step("pace")
class Pace(Guest):
    """Fills a slot of the next training."""

    promises = frozenset({"training"})
    slots = frozenset({"batch_sampler"})


@step("stages")
class Stages(Guest):
    """Needs what nobody gives."""

    needs = frozenset({"ordered_stages"})


@step("follow")
class Follow(Guest):
    """Names an earlier row."""

    teacher: RowId
    second: RowId | None = None


@step("hold")
class Hold(Guest):
    """Holds steps."""

    stage: ClassVar[Stage] = Stage.AUDIT
    one: Step | None = None
    more: tuple[Step, ...] = ()


class Letters(Digits):
    """Another task on the same images, which is of another kind."""

    name = "letters"
    capabilities = frozenset({"letters"})


class Unknowable:
    """Two items, and nothing that tells what they are."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return range(2)[index], 0


class Bare(Task):
    """A task whose data have no fingerprint."""

    name = "bare"
    metrics = Digits.metrics

    def __init__(self, broken: str = "") -> None:
        if broken:
            raise TypeError(f"broken = {broken!r}")

    def splits(self, root: Path | None) -> Splits:
        return Splits(*(Unknowable() for _ in range(4)))

    def loss(self, outputs: Any, batch: Any) -> Any: ...

    def evaluate(self, predictor: Any, split: Any) -> Any: ...

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return ()

    def default_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def fingerprint(self) -> str:
        return "bare"


@step("go")
class Go(Guest):
    """Changes the task."""

    def target_task(self) -> Task:
        return Letters()
