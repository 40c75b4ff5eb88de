"""A corpus ordered by difficulty, on disk: sorted values, the samples of each, opened without being read into memory.

Four arrays in a folder, with ``meta.json`` that names their types, sizes, digests and what they were made from:

- ``sample_to_metric.npy``: the value of each sample, in dataset order;
- ``values.npy``: the different values, growing;
- ``offsets.npy``, ``ids.npy``: row j, ``ids[offsets[j]:offsets[j + 1]]``, are the samples of value j, growing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Num

from sparing.core import files
from sparing.core.errors import CorruptFile, DataError, InvalidValue, MissingDependency, shown

VERSION = 1
ARRAYS = ("sample_to_metric", "values", "offsets", "ids")
BUFFER = 1 << 18
"""Samples that are held in memory at a time."""


class DifficultyIndex:
    """An index on disk. Its arrays are mapped, so that opening one costs nothing but the check of its digests."""

    path: Path
    """The folder."""
    meta: dict[str, Any]
    """What ``meta.json`` says."""
    sample_to_metric: np.ndarray
    """(N,), value of each sample."""
    values: np.ndarray
    """(rows,), the different values, growing."""
    offsets: np.ndarray
    """(rows + 1,), where the samples of each begin in ``ids``."""
    ids: np.ndarray
    """(N,), samples ordered by value, those of one value by number."""

    def __init__(self, path: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.path, self.meta = path, meta
        self.sample_to_metric, self.values = arrays["sample_to_metric"], arrays["values"]
        self.offsets, self.ids = arrays["offsets"], arrays["ids"]

    @classmethod
    def open(
        cls, path: Path | str, *, samples: int | None = None, dataset: str | None = None, verify: bool = True
    ) -> DifficultyIndex:
        """Open the index in a folder.

        Args:
            path: the folder of one metric that an analysis made.
            samples: N of the dataset that it is to be used with; None: any.
            dataset: that dataset's fingerprint or version; None: any.
            verify: read all arrays once to compare their digests. False: only their types and sizes.

        Raises:
            CorruptFile: a file that is missing, cut off or changed, or of another version.
            DataError: the index of another dataset.
        """
        folder = Path(path)
        meta = files.read_json(folder / "meta.json")
        try:
            if meta["version"] != VERSION:
                raise CorruptFile(f"{folder} is an index of version {shown(meta['version'])}; {VERSION} is expected")
            arrays = {name: _mapped(folder / f"{name}.npy", meta["arrays"][name], verify) for name in ARRAYS}
            found, made_from = meta["samples"], meta["dataset"]
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"{folder / 'meta.json'} is not an index's: {error!r}") from error
        count, rows = len(arrays["ids"]), len(arrays["values"])
        if count != found or len(arrays["sample_to_metric"]) != found or len(arrays["offsets"]) != rows + 1:
            raise CorruptFile(f"{folder}: arrays of {[len(array) for array in arrays.values()]} entries do not fit")
        if samples is not None and samples != found:
            raise DataError(f"{folder} is an index of {found} samples; the dataset has {samples}. Analyse it anew")
        if dataset is not None and dataset != made_from:
            raise DataError(
                f"{folder} was made from the dataset {shown(made_from)}, this one is {shown(dataset)}. Analyse it anew"
            )
        return cls(folder, meta, arrays)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Digest of the order that this index gives."""
        return self.meta["arrays"]["ids"]["sha256"] + self.meta["arrays"]["values"]["sha256"]

    def count_up_to(self, value: float) -> int:
        """How many samples have values ≤ ``value``: they are the first of ``ids``."""
        return int(self.offsets[np.searchsorted(self.values, value, side="right")])

    def ids_between(self, low: float, high: float) -> Integer[np.ndarray, " n"]:
        """Samples with low < value ≤ high, by value."""
        if not low <= high:
            raise InvalidValue(f"low = {low}, high = {high}; low ≤ high is needed")
        return self.ids[self.count_up_to(low) : self.count_up_to(high)]

    def ids_up_to_percentile(self, percentile: float, of: float = 100) -> Integer[np.ndarray, " n"]:
        """The ⌊N · percentile / of⌋ easiest samples, by value."""
        if not 0 <= percentile <= of:
            raise InvalidValue(f"percentile = {percentile}; 0 … {of} is needed")
        return self.ids[: int(len(self) * percentile // of)]

    def percentile_offsets(self) -> Integer[np.ndarray, " rows"]:
        """Offsets into ``ids`` of rows merged in runs of max(1, rows // 100)."""
        rows = len(self.values)
        starts = np.arange(0, rows, max(1, rows // 100))
        return np.append(self.offsets[starts], self.offsets[rows])

    def check(self) -> None:
        """Raise :class:`CorruptFile` unless values grow, counts add up, and each sample is there once, in its row."""
        if len(self.values) > 1 and not (self.values[1:] > self.values[:-1]).all():
            raise CorruptFile(f"{self.path}: the values do not grow strictly")
        if (
            self.offsets[0] != 0
            or self.offsets[-1] != len(self)
            or not (np.diff(self.offsets.astype(np.int64)) > 0).all()
        ):
            raise CorruptFile(f"{self.path}: the offsets do not split {len(self)} samples")
        seen = np.zeros(len(self), bool)
        for start in range(0, len(self), BUFFER):
            ids = np.asarray(self.ids[start : start + BUFFER])
            if ids.max() >= len(self):
                raise CorruptFile(f"{self.path}: there is no sample {ids.max()} of {len(self)}")
            seen[ids] = True
            rows = np.searchsorted(self.offsets, np.arange(start, start + len(ids)), side="right") - 1
            if (self.sample_to_metric[ids] != self.values[rows]).any():
                raise CorruptFile(f"{self.path}: a sample stands under a value that is not its own")
        if not seen.all():
            raise CorruptFile(f"{self.path}: sample {int(seen.argmin())} is missing, another is there twice")

    def to_parquet(self, target: Path | str) -> None:
        """Write (id, value) of all samples in dataset order, a buffer at a time; needs the extra ``tables``."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingDependency("pyarrow", "tables", "writing Parquet") from None
        target = Path(target)
        aside = files.aside(target)
        values = self.sample_to_metric
        schema = pa.schema([("id", pa.uint64()), ("value", pa.from_numpy_dtype(values.dtype))])
        try:
            with pq.ParquetWriter(aside, schema) as writer:
                for start in range(0, len(self), BUFFER):
                    part = np.array(values[start : start + BUFFER])
                    numbers = np.arange(start, start + len(part), dtype=np.uint64)
                    writer.write_table(pa.table({"id": numbers, "value": part}, schema))
            files.put_in_place(aside, target)
        finally:
            files.remove(aside)


def narrowest(least: int, greatest: int) -> np.dtype[Any]:
    """The narrowest of uint8 … uint64 (least ≥ 0) or int8 … int64 that holds both."""
    for bits in (8, 16, 32, 64):
        limits = np.iinfo(f"{'u' if least >= 0 else ''}int{bits}")
        if limits.min <= least and greatest <= limits.max:
            return np.dtype(limits.dtype)
    raise InvalidValue(f"{least} … {greatest} does not fit into 64 bits")


def _mapped(file: Path, said: dict[str, Any], verify: bool) -> Num[np.ndarray, " n"]:
    if verify and files.sha256_of(file) != said["sha256"]:
        raise CorruptFile(f"{file} is not what was written: its digest differs from the one in meta.json")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptFile(f"{file} is not a valid npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.str != said["dtype"] or array.ndim != 1:
        raise CorruptFile(f"{file} holds {getattr(array, 'dtype', 'no array')}; {said['dtype']} (n,) is expected")
    return array
