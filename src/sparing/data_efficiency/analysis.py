"""Ordering a corpus by difficulty off-line: a map over shards of samples, in processes, and an external reduce.

Li et al. 2022, arXiv:2212.03597, section 3.1. A shard is a fixed range of samples, however many workers there are, and
is written whole with a manifest. What is killed leaves finished shards; running again does the rest, and the result is
the same to the byte. Memory: one shard's values in a worker; in the reduce one shard's, the different values, and a
byte for each sample while all are checked.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from sparing.core import files
from sparing.core.bar import Bar
from sparing.core.collation import items_of
from sparing.core.errors import CorruptFile, DataError, InvalidValue, SparingError, StoreError, shown
from sparing.core.fingerprint import fingerprint
from sparing.data_efficiency.index import ARRAYS, VERSION, DifficultyIndex, narrowest
from sparing.data_efficiency.metrics import CorpusStatistic, DifficultyMetric
from sparing.data_efficiency.settings import changes, whole_number

SHARD = 1 << 18
MAPPED = 1 << 26
"""Bytes that are read through one mapping: they are in memory as long as it is there."""
BINS = 5000
"""A metric of real numbers with more different values is rounded down to a grid of so many."""


class DataAnalyzer:
    """Metrics of all samples of a dataset, each as a :class:`~sparing.data_efficiency.index.DifficultyIndex`.

    ``run()`` does it all. On a cluster, each machine calls ``DataAnalyzer(…, num_workers=W, worker_id=w).map()`` on one
    shared folder, and then one of them ``reduce()``. Where a metric has a first pass, ``map()`` does that alone until a
    ``reduce()`` has summed it up; then map and reduce again.

    Processes are joblib's: ``with joblib.parallel_backend("ray"):`` around ``run()`` spreads the shards over a cluster.

    Args:
        dataset: an array (N, …), on disk if it is mapped (``np.load(…, mmap_mode="r")``, ``np.memmap``), a mapping of
            such arrays, or any map-style dataset. Metrics are given slices of arrays, and collated items of the others.
        metrics: metrics and statistics of different names; a metric's first pass is added by itself.
        out_dir: a folder; each metric and statistic gets one of its name in it.
        num_workers: processes; with ``worker_id``, workers that share the shards.
        worker_id: map only this worker's part, 0 … num_workers − 1; None: all.
        batch_size: samples that a metric is given at a time.
        shard_size: samples of a shard.
        collate: items → batch, for map-style datasets; None: torch's ``default_collate``.
        version: a text that stands for the dataset's content; None: its fingerprint, which reads all of it.
        index_field: when a batch has this field, it holds the samples' numbers; each must occur once.

    Raises:
        DataError: an empty dataset, a metric that gives another number of values than samples, or NaN.
        StoreError: another run works on this folder; the disk is full.
        InvalidValue: arguments outside these bounds.
    """

    def __init__(
        self,
        dataset: Any,
        metrics: Sequence[DifficultyMetric | CorpusStatistic],
        out_dir: Path | str,
        num_workers: int = 1,
        worker_id: int | None = None,
        *,
        batch_size: int = 4096,
        shard_size: int = SHARD,
        collate: Callable[[list[Any]], Any] | None = None,
        version: str | None = None,
        index_field: str = "index",
    ) -> None:
        self.dataset, self.folder, self.collate, self.index_field = dataset, Path(out_dir), collate, index_field
        self.num_workers = whole_number("num_workers", num_workers, 1)
        if worker_id is not None and whole_number("worker_id", worker_id, 0) >= num_workers:
            raise InvalidValue(f"worker_id = {worker_id}; 0 … {num_workers - 1} is possible with {num_workers} workers")
        self.worker_id = worker_id
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.shard_size = whole_number("shard_size", shard_size, 1)
        self.size = _length(dataset)
        if self.size == 0:
            raise DataError("the dataset is empty; at least one sample is needed")
        self.jobs = _with_first_passes(metrics)
        self.data_fingerprint = _fingerprint_of(dataset) if version is None else version

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.size // self.shard_size)

    def run(self) -> dict[str, DifficultyIndex]:
        """Map what is missing and reduce: the index of each metric, by name."""
        with self._alone("analysis"):
            for statistics in (True, False):
                due = self._due(statistics)
                self._map(due, None)
                self._reduce(due)
            for job in self.jobs:
                self._clear(job)  # whoever died after the last result left its shards
            return self._opened()

    def map(self) -> None:
        """Map the shards that this worker has to and that are not there yet."""
        with self._alone("analysis" if self.worker_id is None else f"worker-{self.worker_id}"):
            self._map(self._due(True) or self._due(False), self.worker_id)

    def reduce(self) -> dict[str, DifficultyIndex]:
        """Make the indexes of all metrics whose shards are there; :class:`DataError` names shards that are missing."""
        with self._alone("analysis"):
            statistics = self._due(True)
            self._reduce(statistics or self._due(False))
            return {} if statistics and self._due(False) else self._opened()

    # --- what there is to do

    def _due(self, statistics: bool) -> list[DifficultyMetric | CorpusStatistic]:
        """Statistics or metrics that are not finished; the metrics with the results of their first passes."""
        due = [job for job in self.jobs if isinstance(job, CorpusStatistic) == statistics and not self._finished(job)]
        if statistics:
            return due
        ready: list[DifficultyMetric | CorpusStatistic] = []
        for metric in due:
            assert isinstance(metric, DifficultyMetric)
            first = metric.first_pass()
            ready.append(metric if first is None else metric.fitted(read_statistic(self.folder / first.name)))
        return ready

    def identity(self, job: DifficultyMetric | CorpusStatistic) -> dict[str, Any]:
        """What a shard and a result depend on: data, their number, and the metric's settings."""
        job = next(known for known in self.jobs if known.name == job.name)  # before its first pass was filled in
        return {
            "version": VERSION,
            "dataset": self.data_fingerprint,
            "samples": self.size,
            "metric": {"name": job.name, **job.config()},
        }

    def _finished(self, job: DifficultyMetric | CorpusStatistic) -> bool:
        """Whether a result is there and is this one's; another's is told and will be replaced."""
        file = self.folder / job.name / "meta.json"
        if not file.exists():
            return False
        try:
            there = files.read_json(file)
            if there["identity"] == self.identity(job):
                if isinstance(job, DifficultyMetric):
                    DifficultyIndex.open(file.parent)
                else:
                    read_statistic(file.parent)
                return True
            reason = "; ".join(changes(there["identity"], self.identity(job)))
        except (CorruptFile, KeyError, TypeError) as error:
            reason = f"it cannot be read: {error}"
        warnings.warn(f"the result in {file.parent} is made anew: {reason}", stacklevel=4)
        return False

    def _opened(self) -> dict[str, DifficultyIndex]:
        names = [job.name for job in self.jobs if isinstance(job, DifficultyMetric)]
        return {
            name: DifficultyIndex.open(self.folder / name, samples=self.size, dataset=self.data_fingerprint)
            for name in names
        }

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{what}.lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise StoreError(
                f"another analysis is at work in {self.folder}; wait for its end or use another folder"
            ) from None
        except OSError as error:
            raise StoreError(f"cannot write {self.folder}: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    # --- map

    def _parts(self, job: DifficultyMetric | CorpusStatistic) -> Path:
        """A folder of its own for each identity: shards of other settings are never taken for these."""
        return self.folder / "parts" / f"{job.name}-{fingerprint(files.canonical_json(self.identity(job)))[:16]}"

    def _map(self, jobs: Sequence[DifficultyMetric | CorpusStatistic], worker: int | None) -> None:
        if not jobs:
            return
        first, last = 0, self.shards
        if worker is not None:
            first, last = (int(b) for b in np.linspace(0, self.shards, self.num_workers + 1)[worker : worker + 2])
        tasks = []
        for shard in range(first, last):
            missing = [
                (job, self._parts(job)) for job in jobs if not _is_whole(self._parts(job), shard, self._range(shard))
            ]
            if missing:
                tasks.append((missing, shard, *self._range(shard)))
        processes = self.num_workers if worker is None else 1
        common = (self.dataset, self.batch_size, self.collate, self.index_field, self.size)
        shown_tasks = _with_bar(tasks, f"analysing {', '.join(job.name for job in jobs)}")
        if processes == 1:
            for task in shown_tasks:
                _map_shard(common, *task)
            return
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        try:
            Parallel(n_jobs=processes)(delayed(_map_shard)(common, *task) for task in shown_tasks)
        except TerminatedWorkerError as error:
            raise SparingError(
                f"a process of the analysis was ended from outside (out of memory?): {error}. Finished shards are kept "
                f"in {self.folder}; run again for the rest"
            ) from error

    def _range(self, shard: int) -> tuple[int, int]:
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.size)

    # --- reduce

    def _reduce(self, jobs: Sequence[DifficultyMetric | CorpusStatistic]) -> None:
        for job in jobs:
            parts = self._parts(job)
            lost = [shard for shard in range(self.shards) if not _is_whole(parts, shard, self._range(shard))]
            if lost:
                raise DataError(
                    f"{len(lost)} of {self.shards} shards of {job.name!r} are missing in {parts}: "
                    f"{', '.join(map(str, lost[:10]))}{' …' if len(lost) > 10 else ''}. Map them first"
                )
            target = self.folder / job.name
            if isinstance(job, CorpusStatistic):
                total = sum(read_part(parts, shard)["total"] for shard in range(self.shards))
                with files.folder_atomic(target) as scratch:
                    said = _store(scratch / "total.npy", np.asarray(total))
                    files.write_json(scratch / "meta.json", {"identity": self.identity(job), "arrays": {"total": said}})
            else:
                with files.folder_atomic(target) as scratch:
                    self._order(job, parts, scratch)
            self._clear(job)

    def _clear(self, job: DifficultyMetric | CorpusStatistic) -> None:
        """Remove a finished job's shards, also of earlier settings."""
        for old in self.folder.glob("parts/*"):
            if old.name.rsplit("-", 1)[0] == job.name:
                files.remove(old)

    def _order(self, job: DifficultyMetric | CorpusStatistic, parts: Path, scratch: Path) -> None:
        """Sort by (value, number): different values first, then each shard's samples behind those before it."""
        manifests = [_manifest(parts, shard) for shard in range(self.shards)]
        real = any(manifest["real"] for manifest in manifests)
        least, greatest = min(m["least"] for m in manifests), max(m["greatest"] for m in manifests)
        values, counts = self._different(parts, None)
        grid = (float(least), (float(greatest) - float(least)) / BINS) if real and len(values) > BINS else None
        if grid is not None:
            values, counts = self._different(parts, grid)
        dtype = np.dtype(np.float64) if real else narrowest(int(least), int(greatest))
        offsets = np.concatenate(([0], np.cumsum(counts)))
        ids_dtype = narrowest(0, self.size - 1)
        in_order, ids = scratch / "sample_to_metric.npy", scratch / "ids.npy"
        _allocate(in_order, dtype, self.size)
        _allocate(ids, ids_dtype, self.size)
        seen = np.zeros(self.size, bool)
        for shard in range(self.shards):
            part = read_part(parts, shard)
            numbers = part["ids"] if "ids" in part else np.arange(*self._range(shard))
            ordered = np.sort(numbers)
            twice = np.append(numbers[seen[numbers]], ordered[1:][ordered[1:] == ordered[:-1]])
            if len(twice):
                raise DataError(
                    f"the field {self.index_field!r} gives sample {twice[0]} twice; each number once is expected"
                )
            seen[numbers] = True
            found = part["values"] if grid is None else _on_grid(part["values"], grid)
            _open(in_order)[numbers] = found
        cursor = offsets[:-1].copy()
        for start in range(0, self.size, self.shard_size):
            found = np.array(_open(in_order)[start : start + self.shard_size])
            order = np.argsort(found, kind="stable")
            rows = np.searchsorted(values, found[order])
            sizes = np.bincount(rows, minlength=len(values))
            within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            _open(ids)[cursor[rows] + within] = order + start
            cursor += sizes
        said = {
            "values": _store(scratch / "values.npy", values.astype(dtype)),
            "offsets": _store(scratch / "offsets.npy", offsets.astype(narrowest(0, self.size))),
            **{name: _described(scratch / f"{name}.npy") for name in ("sample_to_metric", "ids")},
        }
        assert set(said) == set(ARRAYS)
        meta = {
            "version": VERSION,
            "samples": self.size,
            "dataset": self.data_fingerprint,
            "identity": self.identity(job),
            "bins": None if grid is None else {"count": BINS, "least": grid[0], "width": grid[1]},
            "arrays": said,
        }
        files.write_json(scratch / "meta.json", meta)
        DifficultyIndex.open(scratch, verify=False).check()

    def _different(self, parts: Path, grid: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray]:
        """(different values growing, how often each occurs), on a grid if there is one."""
        values, counts = np.empty(0), np.empty(0, np.int64)
        for shard in range(self.shards):
            found = read_part(parts, shard)["values"]
            more, sizes = np.unique(found if grid is None else _on_grid(found, grid), return_counts=True)
            if not len(values):
                values, counts = more, sizes
                continue
            values, places = np.unique(np.append(values, more), return_inverse=True)
            summed = np.zeros(len(values), np.int64)
            np.add.at(summed, places, np.append(counts, sizes))
            counts = summed
            if grid is None and values.dtype.kind == "f" and len(values) > BINS:
                break  # a grid will be needed
        return values, counts


# --- pieces of a map -------------------------------------------------------------------------------------------------


def _with_bar(tasks: Sequence[Any], text: str) -> Iterator[Any]:
    """The tasks, with a bar on a terminal that grows as they are given out."""
    bar = Bar()
    try:
        for number, task in enumerate(tasks):
            if bar.due and sys.stderr.isatty():
                bar.draw(number, len(tasks), text)
            yield task
    finally:
        bar.stop()


def _map_shard(
    common: tuple[Any, int, Any, str, int],
    jobs: Sequence[tuple[DifficultyMetric | CorpusStatistic, Path]],
    shard: int,
    first: int,
    last: int,
) -> None:
    """Values of one shard for all metrics: its batches are read once."""
    dataset, batch_size, collate, index_field, size = common
    found: list[np.ndarray | None] = [None] * len(jobs)
    totals: list[np.ndarray | None] = [None] * len(jobs)
    numbers: list[np.ndarray] = []
    every = max(1, MAPPED // max(1, batch_size * _mapped_bytes(dataset)))
    for number, start in enumerate(range(first, last, batch_size)):
        stop = min(start + batch_size, last)
        if number % every == 0:
            dataset = _reopened(dataset)
        batch = _batch(dataset, start, stop, collate)
        if isinstance(batch, Mapping) and index_field in batch:
            numbers.append(_numbers(batch[index_field], start, stop, size, index_field))
        for i, (job, _) in enumerate(jobs):
            try:
                if isinstance(job, CorpusStatistic):
                    totals[i] = _summed(totals[i], np.asarray(job(batch)), job.name)
                else:
                    values = _checked(job.values(batch), start, stop, job.name)
                    room = found[i] = _room(found[i], last - first, values.dtype)
                    room[start - first : stop - first] = values
            except (DataError, InvalidValue) as error:
                raise type(error)(f"{job.name!r}, samples {start} … {stop - 1}: {error}") from error
    if numbers and sum(map(len, numbers)) != last - first:
        raise DataError(f"only some batches of samples {first} … {last - 1} have the field {index_field!r}")
    for (job, folder), joined, total in zip(jobs, found, totals, strict=True):
        if isinstance(job, CorpusStatistic):
            assert total is not None
            arrays, facts = {"total": total}, {}
        else:
            assert joined is not None
            arrays = {"values": joined} | ({"ids": np.concatenate(numbers)} if numbers else {})
            real = joined.dtype.kind == "f"
            least, greatest = (x.item() for x in (joined.min(), joined.max()))
            facts = {"real": real, "least": least, "greatest": greatest}
        said = {name: _store(folder / f"part-{shard:05d}.{name}.npy", array) for name, array in arrays.items()}
        files.write_json(folder / f"part-{shard:05d}.json", {"range": [first, last], "arrays": said, **facts})


def _room(values: np.ndarray | None, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Where the values of a shard go; of real numbers as soon as one batch has them."""
    if values is None:
        return np.empty(count, dtype)
    return values.astype(np.float64) if dtype.kind == "f" and values.dtype.kind != "f" else values


def _batch(dataset: Any, start: int, stop: int, collate: Callable[[list[Any]], Any] | None) -> Any:
    if isinstance(dataset, Mapping):
        return {name: column[start:stop] for name, column in dataset.items()}
    if _is_array(dataset):
        return dataset[start:stop]
    return collated(dataset, range(start, stop), collate)


def collated(dataset: Any, rows: Sequence[int], collate: Callable[[list[Any]], Any] | None) -> Any:
    """A batch of these items of a map-style dataset; :class:`DataError` for items that make none."""
    from torch.utils.data import default_collate

    items = items_of(dataset, rows)
    try:
        return (collate or default_collate)(items)
    except SparingError:
        raise
    except Exception as error:
        raise DataError(
            f"samples {rows[0]} … {rows[-1]} cannot be made a batch: {type(error).__name__}: {error}"
        ) from error


def _is_array(dataset: Any) -> bool:
    """Whether it is sliced: arrays and tensors, as they all say their type and shape."""
    return hasattr(dataset, "dtype") and hasattr(dataset, "shape")


def _length(dataset: Any) -> int:
    if isinstance(dataset, Mapping):
        lengths = {name: len(column) for name, column in dataset.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidValue(f"columns of lengths {lengths}; at least one, and all of one length, are expected")
        return next(iter(lengths.values()))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InvalidValue(f"a {type(dataset).__name__} has no __len__ and __getitem__; a map-style dataset is needed")
    return len(dataset)


def _fingerprint_of(dataset: Any) -> str:
    """As :func:`fingerprint`, and a mapped array by its file, which is not read through the mapping."""
    if isinstance(dataset, Mapping):
        return fingerprint({name: _fingerprint_of(column) for name, column in dataset.items()})
    if isinstance(dataset, np.memmap) and isinstance(dataset.base, mmap.mmap) and dataset.filename is not None:
        return fingerprint((Path(dataset.filename), dataset.dtype.str, dataset.shape, dataset.offset))
    return fingerprint(dataset)


def _reopened(dataset: Any) -> Any:
    """A mapped array in a mapping of its own: what was read through it leaves memory with it."""
    if isinstance(dataset, Mapping):
        return {name: _reopened(column) for name, column in dataset.items()}
    if isinstance(dataset, np.memmap) and isinstance(dataset.base, mmap.mmap) and dataset.filename is not None:
        order = "C" if dataset.flags.c_contiguous else "F"
        return np.memmap(dataset.filename, dataset.dtype, "r", dataset.offset, dataset.shape, order)
    return dataset


def _mapped_bytes(dataset: Any) -> int:
    """Bytes of a sample that are read through mappings."""
    if isinstance(dataset, Mapping):
        return sum(map(_mapped_bytes, dataset.values()))
    if isinstance(dataset, np.memmap) and isinstance(dataset.base, mmap.mmap):
        return dataset.nbytes // len(dataset)
    return 0


def _numbers(given: Any, start: int, stop: int, size: int, field: str) -> np.ndarray:
    numbers = np.asarray(given)
    if numbers.shape != (stop - start,) or numbers.dtype.kind not in "iu":
        raise DataError(
            f"samples {start} … {stop - 1}: {field!r} is {numbers.shape} of {numbers.dtype}; one whole number each "
            "is expected"
        )
    if numbers.min() < 0 or numbers.max() >= size:
        raise DataError(
            f"samples {start} … {stop - 1}: {field!r} has {numbers.min()} … {numbers.max()}; 0 … {size - 1} is possible"
        )
    return numbers.astype(np.int64)


def _checked(given: Any, start: int, stop: int, name: str) -> np.ndarray:
    values = np.asarray(given)
    if values.shape != (stop - start,):
        raise DataError(f"values of shape {values.shape} for {stop - start} samples; ({stop - start},) is expected")
    if values.dtype.kind in "bi":
        return values.astype(np.int64)
    if values.dtype.kind == "u":
        if values.max() > np.iinfo(np.int64).max:
            raise DataError(f"the value {values.max()} does not fit into 64 bits with a sign")
        return values.astype(np.int64)
    if values.dtype.kind != "f":
        raise DataError(f"values of type {values.dtype}; whole or real numbers are expected")
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(
            f"the value of sample {start + int(bad.argmax())} is {values[bad][0]}; finite numbers are expected"
        )
    return values.astype(np.float64)


def _summed(total: np.ndarray | None, part: np.ndarray, name: str) -> np.ndarray:
    if part.dtype.kind not in "biuf":
        raise DataError(f"an array of type {part.dtype}; numbers are expected")
    part = part.astype(np.float64 if part.dtype.kind == "f" else np.int64)
    if total is not None and total.shape != part.shape:
        raise DataError(
            f"an array of shape {part.shape} after one of {total.shape}; the same for every batch is expected"
        )
    return part if total is None else total + part


# --- files -----------------------------------------------------------------------------------------------------------


def read_statistic(folder: Path) -> Num[np.ndarray, "..."]:
    """The sum that an analysis left in a statistic's folder; :class:`CorruptFile` when it is not what was written."""
    meta = files.read_json(folder / "meta.json")
    try:
        return _load(folder / "total.npy", meta["arrays"]["total"])
    except (KeyError, TypeError) as error:
        raise CorruptFile(f"{folder / 'meta.json'} is not a statistic's: {error!r}") from error


def read_part(folder: Path, shard: int) -> dict[str, np.ndarray]:
    """The arrays of one shard, compared with their digests."""
    said = _manifest(folder, shard)["arrays"]
    return {name: _load(folder / f"part-{shard:05d}.{name}.npy", facts) for name, facts in said.items()}


def _manifest(folder: Path, shard: int) -> dict[str, Any]:
    return files.read_json(folder / f"part-{shard:05d}.json")


def _is_whole(folder: Path, shard: int, limits: tuple[int, int]) -> bool:
    """Whether a shard of this range is there and is what was written."""
    if not (folder / f"part-{shard:05d}.json").exists():
        return False
    try:
        return _manifest(folder, shard)["range"] == list(limits) and bool(read_part(folder, shard))
    except (CorruptFile, KeyError, TypeError, AttributeError):
        return False


def _store(file: Path, array: np.ndarray) -> dict[str, Any]:
    header = io.BytesIO()
    array = np.asarray(array, order="C")
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    content = b"".join((header.getvalue(), array.data))
    files.write_atomic(file, content)
    return {"dtype": array.dtype.str, "sha256": hashlib.sha256(content).hexdigest()}


def _load(file: Path, said: Mapping[str, Any]) -> np.ndarray:
    content = files.read_bytes(file)
    if hashlib.sha256(content).hexdigest() != said["sha256"]:
        raise CorruptFile(f"{file} is not what was written: its digest differs from the one beside it")
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def _described(file: Path) -> dict[str, Any]:
    return {"dtype": _open(file).dtype.str, "sha256": files.sha256_of(file)}


def _allocate(file: Path, dtype: np.dtype[Any], count: int) -> None:
    """An array of zeros on disk. Its room is taken at once: writing to a mapping on a full disk ends the process."""
    array = np.lib.format.open_memmap(file, "w+", dtype, (count,))
    size = file.stat().st_size
    del array
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)


def _open(file: Path) -> np.memmap:
    """Mapped anew for each use, so that pages that were written leave memory."""
    return np.lib.format.open_memmap(file, "r+")


def _on_grid(values: np.ndarray, grid: tuple[float, float]) -> np.ndarray:
    """Rounded down to least + k · width, k = 0 … BINS − 1; the order stays."""
    least, width = grid
    return least + np.minimum((values - least) // width, BINS - 1) * width


def _with_first_passes(given: Sequence[DifficultyMetric | CorpusStatistic]) -> list[DifficultyMetric | CorpusStatistic]:
    jobs: dict[str, DifficultyMetric | CorpusStatistic] = {}
    first = [found for metric in given if isinstance(metric, DifficultyMetric) and (found := metric.first_pass())]
    for job in [*given, *first]:
        if not isinstance(job, DifficultyMetric | CorpusStatistic):
            raise InvalidValue(f"{shown(job)} is no DifficultyMetric or CorpusStatistic")
        if not job.name or job.name in (".", "..", "parts") or Path(job.name).name != job.name:
            raise InvalidValue(f"name = {job.name!r}; a name that a folder can have, and not 'parts', is needed")
        if job.name in jobs and (jobs[job.name].config() != job.config() or job in given):
            raise InvalidValue(f"two metrics or statistics are called {job.name!r}; give them different names")
        jobs.setdefault(job.name, job)
    if not jobs:
        raise InvalidValue("no metrics; at least one is needed")
    return list(jobs.values())
