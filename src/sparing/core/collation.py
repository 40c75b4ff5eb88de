"""Going through a map-style dataset in order, batch by batch, without a data loader's processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def batches_of(dataset: Any, size: int, collate: Callable[[list[Any]], Any] | None = None) -> Iterator[Any]:
    """Batches of ``size`` consecutive items (the last may be smaller), collated as torch's data loader does."""
    from torch.utils.data import default_collate

    fetch = getattr(dataset, "__getitems__", None) or (lambda indices: [dataset[i] for i in indices])
    count = len(dataset)
    for start in range(0, count, size):
        yield (collate or default_collate)(fetch(list(range(start, min(start + size, count)))))
