"""What every quantisation does around its arithmetic: choosing calibration data, and giving layers back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import DataError

if TYPE_CHECKING:
    from sparing.core.task import Task

BATCH = 64


def calibration_batches(task: Task, dataset: Any, samples: int) -> Iterator[Any]:
    """The task's batches of up to ``samples`` items spread evenly over ``dataset``.

    Raises :class:`DataError` for an empty data set.
    """
    from torch.utils.data import Subset

    count = len(dataset)
    if count == 0:
        raise DataError(f"{task.name}: the calibration split is empty; at least one {task.unit} is needed")
    chosen = np.unique(np.linspace(0, count - 1, min(samples, count)).round().astype(int)).tolist()
    return iter(batches_of(Subset(dataset, chosen), BATCH, task.collate))


def attempts(layers: int) -> list[int]:
    """How many of the layers to give back to floating point, attempt by attempt: one more each time, beyond eight in
    powers of two, and never all of them."""
    few = list(range(1, min(8, layers - 1) + 1))
    return few + [1 << power for power in range(4, 16) if 1 << power < layers]
