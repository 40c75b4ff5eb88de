"""What must be done well: the contract of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Operation, Predictor, Preprocessing

IGNORED = -100
"""The class of what counts for nothing, as torch's cross-entropy has it."""


@dataclass(frozen=True)
class Metric:
    """A named figure of quality, with the direction that is better and its unit ("" for a share in 0…1)."""

    name: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""


@dataclass(frozen=True)
class Splits:
    """Map-style datasets of one task. ``calibration`` is cut from the training data; ``test`` is for meters, audits."""

    train: Any
    val: Any
    calibration: Any
    test: Any


@dataclass(frozen=True)
class Evaluation:
    """What a predictor scored on one split.

    ``metrics`` maps metric names to values; ``per_unit`` (n_units,) holds the headline's outcome for each unit in split
    order (its mean is the headline), or None when the headline is no mean over units; ``by_class`` maps a class name to
    its headline value.
    """

    metrics: Mapping[str, float]
    per_unit: np.ndarray | None = None
    by_class: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """Splits, outputs, loss and metrics of one problem.

    ``outputs`` and ``loss`` are pure torch and know nothing of the pipeline. A batch is whatever ``collate`` makes of a
    list of dataset items (default: torch's default collation; for ``(x, y)`` items a pair of stacked tensors).
    """

    name: str
    unit: ClassVar[str] = "sample"
    metrics: tuple[Metric, ...]
    """Every figure ``evaluate`` returns; the first is the headline."""
    capabilities: frozenset[str] = frozenset()
    loss_reduction: ClassVar[Literal["mean", "sum"]] = "mean"
    preprocessing: Preprocessing | None = None
    """Turns raw inputs into model inputs; saved with every predictor of this task."""
    postprocessing: Operation | None = None
    """Turns a model's outputs into answers where they are none yet, as boxes are made of a detector's; saved, too."""
    labels: Sequence[str] = ()
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def headline(self) -> Metric:
        """The metric the ledger compares by."""
        return self.metrics[0]

    @abstractmethod
    def splits(self, root: Path | None) -> Splits:
        """The datasets under the data folder ``root`` (None: embedded data, or what the task itself was given)."""

    def outputs(self, model: nn.Module | Predictor, batch: Any) -> Any:
        """The model's outputs on a batch; by default the model is called with the batch's first element."""
        return model(batch[0])

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The training loss, a scalar reduced by ``loss_reduction`` over the batch."""

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (M, K), classes (M,)): the rows a softmax runs over; distillation compares two models by them.

        A class is :data:`IGNORED` where none is known. By default, for "classification": outputs (N, K) or (N, K, …)
        and targets in ``batch[1]``. Raises :class:`IncompatibleStep` for other tasks that do not define it.
        """
        from sparing.core.errors import IncompatibleStep

        if "classification" in self.capabilities:
            return (outputs if outputs.ndim == 2 else outputs.movedim(1, -1).flatten(0, -2)), batch[1].flatten()
        raise IncompatibleStep(
            f"the outputs of {self.name!r} are not known to be logits: its capabilities are "
            f"{', '.join(sorted(self.capabilities)) or 'none'}; classification is needed, or a task that defines "
            "class_logits(outputs, batch)"
        )

    @abstractmethod
    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Score a predictor on a split; deterministic, no shuffling."""

    @abstractmethod
    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Positional model inputs of the right shapes and dtypes (a tuple of pytrees), for export and timing.

        Exports are checked on them: they are as varied as real inputs, and the same on every call. Sizes that differ
        between two batch sizes are free in an exported model: usually the first alone. A task on texts lets the length
        differ as well, one on graphs the number of nodes.
        """

    @abstractmethod
    def default_model(self) -> nn.Module:
        """The model used when a recipe names none."""

    def model_fields(self) -> Mapping[str, Any]:
        """What this task tells a registered model's builder (e.g. ``num_classes``); a builder takes those it knows."""
        return {}

    def raw_example(self) -> Sequence[Any] | None:
        """One raw input as a sequence of length 1, for timing with preprocessing, or None."""
        return None

    def corruptions(self, split: Any) -> Mapping[str, Any]:
        """Name → the split under a fixed corruption, for the robustness columns; empty when none is defined."""
        return {}

    @property
    def groups(self) -> Any:
        """Group of each test unit (n_units,) for fairness columns, None for a unit that is in none; or None at all."""
        return None

    def fingerprint(self) -> str:
        """Changes whenever this task's definition changes (its data, and the code of its class, are looked at apart).

        By default the task's public attributes decide.
        """
        from sparing.core.fingerprint import fingerprint

        return fingerprint({name: value for name, value in vars(self).items() if not name.startswith("_")})
