"""Going through a map-style dataset in order, batch by batch, without a data loader's processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sparing.core.errors import DataError, SparingError


def batches_of(dataset: Any, size: int, collate: Callable[[list[Any]], Any] | None = None) -> Iterator[Any]:
    """Batches of ``size`` consecutive items (the last may be smaller), collated as torch's data loader does.

    An item that cannot be read raises :class:`DataError` with its index.
    """
    from torch.utils.data import default_collate

    count = len(dataset)
    for start in range(0, count, size):
        yield (collate or default_collate)(items_of(dataset, range(start, min(start + size, count))))


def items_of(dataset: Any, indices: Sequence[int], where: str = "") -> list[Any]:
    """The items at ``indices``, at once where the dataset can; one that cannot be read raises :class:`DataError`."""
    fetch = getattr(dataset, "__getitems__", None)
    if fetch is None:
        return [_item(dataset, index, where) for index in indices]
    try:
        return fetch(list(indices))
    except SparingError:
        raise
    except Exception as error:
        for index in indices:
            _item(dataset, index, where)  # names the one that is to blame
        raise DataError(
            f"samples {indices[0]} … {indices[-1]} {where}can be read one by one, but not together: "
            f"{type(error).__name__}: {error}"
        ) from error


def _item(dataset: Any, index: int, where: str) -> Any:
    try:
        return dataset[index]
    except SparingError:
        raise
    except Exception as error:
        while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch's Subset, and what is like it
            dataset, index = dataset.dataset, int(dataset.indices[index])
        raise DataError(f"sample {index} {where}cannot be read: {type(error).__name__}: {error}") from error
