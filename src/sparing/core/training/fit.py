"""Training one model to the end, through kills: :func:`fit` and what it returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from sparing.core.job import TrainingPlan
    from sparing.core.task import Task
    from sparing.core.training.step import Train


class Keeper(Protocol):
    """Keeps the state of an unfinished training; a store's ``Progress`` is one."""

    def load(self) -> Any | None:
        """The state last saved, or None."""

    def save(self, state: Any) -> None:
        """Keep nested dicts, lists and tuples of tensors, numbers, strings and None."""


@dataclass(frozen=True)
class FitResult:
    """What a training made."""

    model: nn.Module
    """The trained model, unwrapped, on the device and with the training flags it came with."""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Name → [(optimizer steps, value)]: "train_loss" per sample and "lr", about 100 points each; "val_<metric>" for
    each validation, "val_<name>_<metric>" for weights that were scored beside the trained ones."""
    samples: int = 0
    """Training samples seen, repetitions counted."""
    steps: int = 0
    """Optimizer steps."""
    epochs: int = 0
    """Epochs ended, the last possibly in the middle."""
    best_epoch: int | None = None
    """Epoch, counted from 1, of the best validation."""
    best_value: float | None = None
    """What the best validation scored on the monitored figure."""
    restored: bool = False
    """Whether the model has the weights of the best epoch instead of the last."""
    stopped_early: bool = False
    """Whether early stopping ended the training."""
    skipped: int = 0
    """Batches left out because their loss was not finite."""
    remarks: tuple[str, ...] = ()
    figures: dict[str, tuple[float, str, Any, Any]] = field(default_factory=dict)
    """What callbacks recorded for the training's row: name → (value, unit, how it is known, what is better)."""

    def record(self) -> dict[str, Any]:
        """Everything but the model, as plain JSON."""
        from dataclasses import fields

        record = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "model"}
        return record | {"remarks": list(self.remarks)}

    @classmethod
    def of(cls, model: nn.Module, record: dict[str, Any]) -> FitResult:
        """The result of a stored :meth:`record` and its model."""
        curves = {name: [(float(x), float(y)) for x, y in points] for name, points in record["curves"].items()}
        figures = {name: tuple(given) for name, given in record["figures"].items()}
        return cls(model, **record | {"curves": curves, "remarks": tuple(record["remarks"]), "figures": figures})


def fit(
    model: nn.Module,
    task: Task,
    train: Any,
    val: Any = None,
    settings: Train | None = None,
    plan: TrainingPlan | None = None,
    seed: int = 0,
    progress: Keeper | None = None,
    *,
    callbacks: Iterable[Any] = (),
    loggers: Iterable[Any] = (),
) -> FitResult:
    """Train ``model`` in place on ``train`` and return it with its figures.

    Args:
        model: any module that ``task.outputs`` can call.
        task: gives outputs, loss (scalar, reduced by ``task.loss_reduction``), collation and, for validation, metrics.
        train: map-style dataset; its ``__getitem__`` may draw random numbers from Python's, NumPy's or torch's global
            generators.
        val: the split ``task.evaluate`` scores after each validated epoch; None for no validation.
        settings: hyper-parameters; those of ``Train()`` when None.
        plan: wraps, loss terms, callbacks … of other economies, used in the order :class:`TrainingPlan` documents.
        seed: decides order, dropout, augmentation and whatever else draws random numbers.
        progress: where unfinished work is kept. A training that is killed and started again with the same arguments
            goes on from there and ends with the same bits as one that was never interrupted.
        callbacks: further Lightning callbacks. One that is stateful must save its state in ``state_dict``.
        loggers: Lightning loggers.

    One optimizer step uses ``batch_size`` × ``accumulate`` samples of all processes together. Its gradient is that of
    the mean loss over these samples for ``loss_reduction = "mean"`` (each sample counts the same, in a short last batch
    too), and of the sum of their losses for ``"sum"``, however many processes and accumulated batches there are.

    The caller's random states, deterministic flags, warning filters and log levels are as before afterwards.

    Raises:
        DataError: empty data, a sample that cannot be read, a batch that a layer refuses.
        TrainingDiverged: ``nan_patience`` batches in a row had a loss that is not finite.
        IncompatibleStep: the model has nothing to train.
        InvalidValue: settings that contradict each other or that Lightning or torch refuse.
    """
    from sparing.core.job import TrainingPlan
    from sparing.core.training.loop import run
    from sparing.core.training.step import Train

    return run(
        model,
        task,
        train,
        val,
        settings if settings is not None else Train(),
        plan if plan is not None else TrainingPlan(),
        seed,
        progress,
        list(callbacks),
        list(loggers),
    )
