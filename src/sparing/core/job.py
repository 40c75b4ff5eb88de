"""What travels through a pipeline: a job, and the training plan it carries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparing.core.errors import IncompatibleStep, InvalidValue, SparingError, did_you_mean
from sparing.core.ledger import METERED, Figure, Notes, Picture

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from sparing.core.meter import Meter
    from sparing.core.predictor import Predictor
    from sparing.core.store import BoundStore
    from sparing.core.task import Task


@dataclass(frozen=True)
class TrainingPlan:
    """How the next training is to be done, as factories: branches and seeds share no live object.

    Order in which a training uses them: ``model_wraps`` (in order, undone in reverse before the model is handed on) →
    ``optimizer`` → ``wrap_optimizer`` (first is innermost) → ``scheduler`` on the outermost → in each step
    ``batch_transforms`` → outputs → the task's loss → ``loss_terms`` in order.
    """

    optimizer: Callable[[nn.Module], Any] | None = None
    """model → optimizer. Exclusive slot. None: the training step's own choice by name."""
    wrap_optimizer: tuple[Callable[[Any], Any], ...] = ()
    """optimizer → optimizer."""
    scheduler: Callable[[Any, int], Any] | None = None
    """(optimizer, total optimizer steps) → learning-rate scheduler, stepped after every optimizer step. Exclusive."""
    batch_sampler: Callable[[Any, int, int], Any] | None = None
    """(dataset, batch size, seed) → :class:`sparing.core.training.Batches`. Exclusive."""
    batch_transforms: tuple[Callable[[], Callable[[Any], Any]], ...] = ()
    """() → (batch → batch); may draw from torch's global generator, which is seeded for each step."""
    loss_terms: tuple[Callable[[], Callable[[Any, Any, Any, Any], Any]], ...] = ()
    """() → ((loss so far, outputs, batch, model) → loss)."""
    model_wraps: tuple[Callable[[nn.Module], tuple[nn.Module, Callable[[], nn.Module]]], ...] = ()
    """model → (wrapped model, undo), where ``undo()`` returns the plain model with what was learned baked in."""
    callbacks: tuple[Callable[[], Any], ...] = ()
    """() → Lightning callback."""

    EXCLUSIVE = ("optimizer", "scheduler", "batch_sampler")

    def adding(self, **more: Any) -> TrainingPlan:
        """A plan with ``more`` in it: factories join the end of their list; a taken exclusive slot is refused."""
        changes: dict[str, Any] = {}
        for slot, factory in more.items():
            if slot in self.EXCLUSIVE:
                if getattr(self, slot) is not None:
                    raise IncompatibleStep(f"the training plan's {slot} is already set by an earlier step")
                changes[slot] = factory
            else:
                changes[slot] = (*getattr(self, slot), factory)
        return replace(self, **changes)

    @property
    def empty(self) -> bool:
        """True when no step has asked for anything."""
        return self == TrainingPlan()


@dataclass(frozen=True)
class Job:
    """A task, the data and the model as they stand between two steps. Immutable; ``model`` is never mutated."""

    task: Task
    train: Any
    val: Any
    calibration: Any
    model: nn.Module | None
    """None when the job began with a saved model that is no torch module (an ONNX file, say)."""
    seed: int
    store: BoundStore
    root: Path | None = None
    """The data folder, for ``job.task.splits(job.root)``."""
    trust: tuple[str, ...] = ()
    """Packages whose classes a saved model's folder may ask for."""
    data_key: str = ""
    """Fingerprint of the task and its data; empty when they have none."""
    training: TrainingPlan = field(default_factory=TrainingPlan)
    predictor: Predictor | None = None
    capabilities: frozenset[str] = frozenset()
    """The task's, plus what steps so far have given and not removed."""
    earlier: Mapping[str, Predictor] = field(default_factory=dict)
    """Predictors of the rows above, by row id."""
    folders: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict)
    """What a run with an output folder writes there besides the model: a step's id → writes a folder, to be made."""
    meter: Meter | None = None
    """Measures rows, here and in inner pipelines."""
    notes: Notes = field(default_factory=Notes)
    """Collects what :meth:`record` is told for this step's row."""

    def fresh_model(self) -> nn.Module:
        """A copy of the model to train or cut."""
        if self.model is None:
            raise IncompatibleStep(
                "this job has a saved predictor but no torch module, so there is nothing to train or cut"
            )
        return copy.deepcopy(self.model)

    def replace(self, **changes: Any) -> Job:
        """A job with some fields changed."""
        return replace(self, **changes)

    def fork(self, reason: str, **changes: Any) -> Job:
        """A child for an inner pipeline: its own store key, and rows that go to a sub-ledger called ``reason``.

        ``changes`` are fields of the child (data, model, seed …) and must follow from the job and the step's fields,
        since the key knows only those and the reason. A reason names one fork of a step.
        """
        self._not_while_storing("fork")
        store = replace(self.store.child("fork", reason), seed=changes.get("seed", self.seed), cost=self.store.cost)
        return replace(self, store=store, notes=self.notes.child(reason), **changes)

    def record(
        self,
        name: str,
        value: float | str | None,
        unit: str,
        how: Literal["measured", "est", "derived"] = "measured",
        better: Literal["lower", "higher", ""] = "lower",
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Add a figure to this step's row of the ledger; what the meter measures cannot be recorded."""
        self._not_while_storing("record")
        if not name or name in {*METERED, *(metric.name for metric in self.task.metrics)}:
            raise InvalidValue(f"record({name!r}, …): that column is the meter's; give the figure another name")
        self.notes.figures[name] = Figure(value, unit, how, better, interval)

    def illustrate(self, name: str, pixels: np.ndarray, caption: str) -> None:
        """Add a picture to this step's row of the ledger, for the report.

        Args:
            name: its title, unique in the row.
            pixels: uint8 (height, width) grey, or (height, width, 3) red, green and blue; at most 1024 along a side.
            caption: what it shows, also for those who cannot see it.
        """
        self._not_while_storing("illustrate")
        if not name or name in self.notes.pictures:
            raise InvalidValue(f"illustrate({name!r}, …): a picture needs a name that no other of its row has")
        self.notes.pictures[name] = Picture.of(pixels, caption)

    def _not_while_storing(self, action: str) -> None:
        if self.store.cost.depth:
            raise SparingError(
                f"{action}() was called while job.store.once computes a result: what it does would be lost when the "
                "result is read from the store; return what is needed from the computation and call it afterwards"
            )

    def row(self, row_id: str) -> Predictor:
        """The predictor of an earlier row; raises :class:`InvalidValue` naming the rows there are."""
        if row_id not in self.earlier:
            rows = ", ".join(self.earlier) or "none yet"
            raise InvalidValue(f"no earlier row {row_id!r}.{did_you_mean(row_id, self.earlier)} Rows so far: {rows}")
        return self.earlier[row_id]
