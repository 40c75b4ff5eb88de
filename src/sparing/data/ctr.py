"""Click-through data: what becomes of each column, fitted in one pass over a table of any size, and the ids it makes.

::

    schema = CTRSchema((Categorical("carrier", min_count=5), Numeric("distance", missing="zero")), label="label")
    encoder = CTREncoder(schema).fit("train.parquet")
    for ids, clicked in encoder.transform("train.parquet", batch_size=2048):
        ...  # int64 (B, F), float32 (B,)

An id is a number in 0 … N_f − 1 for each field, or −1 for what is unknown: a missing value, one that was not in the
training data, or one that was there fewer than ``min_count`` times.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int, Integer
from numpy import ndarray

from sparing.core.errors import CorruptFile, DataError, InvalidRecord, InvalidValue, SparingError, did_you_mean, shown
from sparing.core.files import aside, canonical_json, folder_atomic, put_in_place, read_json, remove, write_json
from sparing.core.fingerprint import fingerprint
from sparing.core.metrics import roc_auc
from sparing.core.predictor.preprocessing import Operation
from sparing.data.binning import libffm_bins, linear_bins, log2_bins, log_square_bins, quantile_bins
from sparing.data.tables import ROWS, Column, Layout, Source, TableLayout, arrow, as_numbers, record_batches

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 1 << 16
"""Rows, drawn evenly from all, that quantiles and the check for leaks go by."""
LEAK = 0.95
"""A column whose own area under the ROC curve reaches this is reported."""
LEAK_BINS = 256
PENDING = 1 << 20
"""Distinct values of batches that are kept before they are counted together."""
FORMAT = 1


@dataclass(frozen=True)
class Categorical:
    """A field of categories: each distinct value, as text, is one.

    Args:
        name: of the field, and of its column unless ``column`` says otherwise.
        min_count: training rows that a value (with hashing: a bucket) must be in; with fewer it is unknown.
        hash_buckets: fold values into so many buckets by :func:`fnv1a`, so that no list of values is kept.
        column: the column it is read from.
        characters: (first, end): only these characters of the value, as (6, 8) for the hour in YYMMDDHH.
    """

    name: str
    min_count: int = 20
    hash_buckets: int | None = None
    column: str | None = None
    characters: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_names(self)
        _check_whole(self, "min_count", 1)
        if self.hash_buckets is not None:
            _check_whole(self, "hash_buckets", 1)
        if self.characters is not None:
            object.__setattr__(self, "characters", tuple(self.characters))
            first, end = self.characters if len(self.characters) == 2 else (0, 0)
            if not 0 <= first < end:
                raise InvalidValue(f"{self.name}: characters = {self.characters}; (first, end), 0 ≤ first < end")


@dataclass(frozen=True)
class Numeric:
    """A field of numbers, which bins turn into categories.

    Args:
        name: of the field, and of its column unless ``column`` says otherwise.
        binning: "log_square", "libffm", "linear", "log2" (see :mod:`sparing.data.binning`), or "quantile": as many
            training rows in each bin as can be, by the quantiles of :data:`SAMPLE` rows.
        buckets: bins there may be; numbers beyond the last are in it, those below the first in the first.
        width: of a bin, for "linear" and "log2".
        missing: what NaN and null are: "zero", "unknown" (id −1), or None: refused.
        min_count: training rows that a bin must hold; with fewer it is unknown.
        column: the column it is read from.
    """

    name: str
    binning: Literal["log_square", "libffm", "linear", "log2", "quantile"] = "log_square"
    buckets: int = 64
    width: float = 1.0
    missing: Literal["zero", "unknown"] | None = None
    min_count: int = 1
    column: str | None = None

    def __post_init__(self) -> None:
        _check_names(self)
        if self.binning not in ("log_square", "libffm", "linear", "log2", "quantile"):
            raise InvalidValue(
                f"{self.name}: binning = {self.binning!r}; log_square, libffm, linear, log2 or quantile is expected"
            )
        if self.missing not in ("zero", "unknown", None):
            raise InvalidValue(f'{self.name}: missing = {self.missing!r}; "zero", "unknown" or none is expected')
        _check_whole(self, "buckets", 2, 1 << 24)
        _check_whole(self, "min_count", 1)
        if isinstance(self.width, bool) or not isinstance(self.width, int | float) or not 0 < self.width < math.inf:
            raise InvalidValue(f"{self.name}: width = {self.width!r}; a number of more than 0 is expected")


Field = Categorical | Numeric


def _check_names(field: Field) -> None:
    for value in (field.name, field.column if field.column is not None else "column"):
        if not isinstance(value, str) or not value:
            raise InvalidValue(f"{type(field).__name__}: {value!r} is no name of a field or column")


def _check_whole(field: Field, name: str, least: int, most: int = 1 << 31) -> None:
    value = getattr(field, name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidValue(f"{field.name}: {name} = {shown(value)}; a whole number in {least}…{most} is expected")


@dataclass(frozen=True)
class CTRSchema:
    """The fields of a model, in order, and the column of what is predicted, 0 or 1.

    Args:
        fields: at least one, of different names; none read from the label's column.
        label: the column of the label.
    """

    fields: tuple[Field, ...]
    label: str = "label"

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        if not self.fields or not all(isinstance(field, Categorical | Numeric) for field in self.fields):
            raise InvalidValue(f"fields = {shown(self.fields)}; at least one Categorical or Numeric is expected")
        names = [field.name for field in self.fields]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidValue(f"two fields are called {repeated[0]!r}")
        for field in self.fields:
            if column_of(field) == self.label:
                raise InvalidValue(f"the field {field.name!r} is read from {self.label!r}, which is the label")

    def columns(self, label: bool = True) -> dict[str, Column]:
        """The columns that are read, and how."""
        found: dict[str, Column] = {self.label: "number"} if label else {}
        for field in self.fields:
            kind: Column = "text" if isinstance(field, Categorical) else "number"
            if found.setdefault(column_of(field), kind) != kind:
                found[column_of(field)] = "text"  # read as text, it can be both
        return found

    def to_config(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        kinds = {Categorical: "categorical", Numeric: "numeric"}
        fields = [{"kind": kinds[type(field)], **dataclasses.asdict(field)} for field in self.fields]
        return {"label": self.label, "fields": fields}

    @classmethod
    def from_config(cls, config: Any) -> CTRSchema:
        """The inverse of :meth:`to_config`; :class:`InvalidValue` for anything else."""
        kinds: dict[Any, type] = {"categorical": Categorical, "numeric": Numeric}
        try:
            fields = [dict(entry) for entry in config["fields"]]
            return cls(tuple(kinds[entry.pop("kind")](**entry) for entry in fields), config["label"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SparingError):
                raise
            raise InvalidValue(f"this is no schema: {type(error).__name__}: {error}") from error


def column_of(field: Field) -> str:
    """The column a field is read from."""
    return field.column or field.name


def fields_of(kinds: Mapping[str, Column], min_count: int = 5) -> tuple[Field, ...]:
    """Fields that follow from the kinds of columns: numbers become bins of equal shares, all else a category.

    Missing numbers are unknown. ``min_count`` is that of the categories.
    """
    return tuple(
        Numeric(name, "quantile", missing="unknown") if kind == "number" else Categorical(name, min_count)
        for name, kind in kinds.items()
    )


def criteo_schema(min_count: int = 21, binning: Literal["log_square", "libffm"] = "log_square") -> CTRSchema:
    """Criteo's 13 numbers (a missing one is 0) and 26 categories; the published recipe keeps values seen over 20 times.

    Source: xDeepInt's recipe, which by a slip leaves out I13; libFFM's for ``binning="libffm"``.
    """
    buckets = 64 if binning == "log_square" else 512
    numbers = [Numeric(f"I{i}", binning, buckets, missing="zero") for i in range(1, 14)]
    return CTRSchema((*numbers, *(Categorical(f"C{i}", min_count) for i in range(1, 27))), "label")


AVAZU_FIELDS = (
    "C1 banner_pos site_id site_domain site_category app_id app_domain app_category device_id device_ip device_model "
    "device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21"
)


def avazu_schema(min_count: int = 20) -> CTRSchema:
    """Avazu's 21 categories and the hour of the day; the row's own ``id`` is no field, nor is the date."""
    hour = Categorical("hour_of_day", min_count, column="hour", characters=(6, 8))
    return CTRSchema((hour, *(Categorical(name, min_count) for name in AVAZU_FIELDS.split())), "click")


def in_published_training(rows: Int[ndarray, " n"]) -> ndarray:
    """Whether lines (n,), counted from 0, are in the training part of xDeepInt's recipe: 801 of each 1000."""
    return rows % 1000 <= 800


def fnv1a(values: Sequence[bytes]) -> Integer[ndarray, " n"]:
    """The 64-bit FNV-1a hash of each of n byte strings, as uint64 (n,): the same on every machine and in every version.

    Fowler, Noll and Vo; RFC 9923.
    """
    lengths = np.array([len(value) for value in values], np.int64)
    hashes = np.full(len(values), 0xCBF29CE484222325, np.uint64)
    joined = np.frombuffer(b"".join(values), np.uint8)
    starts = np.cumsum(lengths) - lengths
    prime = np.uint64(0x100000001B3)
    for place in range(int(lengths.max(initial=0))):
        alive = np.flatnonzero(lengths > place)
        hashes[alive] = (hashes[alive] ^ joined[starts[alive] + place]) * prime
    return hashes


# --- what models train on


class Clicks:
    """Map-style data set of (ids int64 (F,), label float32 ()): rows that are encoded already.

    Args:
        ids: whole numbers (n, F), which may be memory-mapped.
        labels: 0 or 1 (n,).
    """

    def __init__(self, ids: Int[ndarray, "n f"], labels: Float[ndarray, " n"]) -> None:
        if ids.ndim != 2 or labels.shape != (len(ids),):
            raise InvalidValue(
                f"ids of shape {ids.shape} and labels of shape {labels.shape}; (n, F) and (n,) are needed"
            )
        for row in np.flatnonzero((labels != 0) & (labels != 1))[:1]:
            raise InvalidRecord(f"row {row}: the label is {labels[row]:g}; 0 or 1 is expected")
        self.ids, self.labels = ids, labels

    @classmethod
    def of(
        cls, encoder: CTREncoder, source: Source, layout: Layout | TableLayout | None = None, where: str = ""
    ) -> Clicks:
        """All rows of a source, as int32."""
        parts = [(ids.astype(np.int32), labels) for ids, labels in encoder.transform(source, ROWS, layout)]
        if not parts:
            raise DataError(f"{where or shown(source)}: holds no row; at least one is expected")
        return cls(np.concatenate([ids for ids, _ in parts]), np.concatenate([labels for _, labels in parts]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import torch

        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return torch.from_numpy(self.ids[index].astype(np.int64)), torch.tensor(float(self.labels[index]))

    def __getitems__(self, indices: Sequence[int]) -> Clicks:
        """The rows at several indices at once; a data loader asks so."""
        return self.subset(indices)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Clicks:
        """The rows at ``indices``."""
        rows = np.asarray(indices, np.int64)
        return Clicks(self.ids[rows], self.labels[rows])

    def fingerprint(self) -> str:
        """By content, computed once."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = fingerprint([self.ids, self.labels])
        return self._fingerprint


def join_clicks(items: Clicks | Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch (ids int64 (B, F), labels float32 (B,)) of items, or of the rows a :class:`Clicks` gave at once."""
    import torch

    if isinstance(items, Clicks):
        labels = torch.from_numpy(items.labels.astype(np.float32))
        return torch.from_numpy(items.ids.astype(np.int64)), labels
    ids, clicked = zip(*items, strict=True)
    return torch.stack(ids), torch.stack(clicked)


@dataclass(frozen=True)
class EncodeFields(Operation):
    """Rows, mappings of a column to its value → ids, int64 (n, F), as a :class:`CTREncoder` gives them.

    PyArrow is needed: ``pip install 'sparing[tables]'``.
    """

    schema: dict[str, Any]
    """As :meth:`CTRSchema.to_config` writes it."""
    vocabulary: list[list[str | int]]
    """For each field its values, bins or buckets in the order of their ids."""
    edges: dict[str, list[float]]
    """Of fields that are binned by quantiles."""

    @classmethod
    def of(cls, encoder: CTREncoder) -> EncodeFields:
        """What an encoder found."""
        vocabulary = [values.tolist() for values in encoder.vocabulary]
        edges = {name: values.tolist() for name, values in encoder.edges.items()}
        return cls(json.loads(canonical_json(encoder.schema.to_config())), vocabulary, edges)

    @cached_property
    def encoder(self) -> CTREncoder:
        """An encoder that says the same."""
        encoder = CTREncoder(CTRSchema.from_config(self.schema))
        encoder.vocabulary = []
        for field, values in zip(encoder.schema.fields, self.vocabulary, strict=True):
            texts = isinstance(field, Categorical) and field.hash_buckets is None
            encoder.vocabulary.append(arrow().array(values, arrow().string()) if texts else np.array(values, np.int64))
        encoder.edges = {name: np.array(edges, np.float64) for name, edges in self.edges.items()}
        return encoder

    def __call__(self, batch: Any) -> Int[ndarray, "n f"]:
        """n mappings → ids (n, F); a column that a row lacks is missing there."""
        pa = arrow("encoding rows")
        for index, row in enumerate(batch):
            if not isinstance(row, Mapping):
                raise InvalidValue(f"input {index} is {shown(row)}; a mapping of columns to values is expected")
        columns = {}
        for name in self.encoder.schema.columns(label=False):
            if not any(name in row for row in batch):
                raise InvalidValue(f"no input has the column {name!r}.{did_you_mean(name, batch[0])}")
            try:
                columns[name] = pa.array([row.get(name) for row in batch])
            except (pa.ArrowException, TypeError, OverflowError) as error:
                raise InvalidValue(f"the column {name!r} of the inputs: {error}") from error
        return self.encoder.encode(pa.table(columns))


# --- fitting


class _Tally:
    """Counts of distinct strings over many batches."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.rows = 0
        self.merged = 0

    def add(self, text: Any) -> None:
        pa = arrow()
        counts = pa.compute.value_counts(text)
        part = pa.table({"value": counts.field("values"), "count": counts.field("counts")})
        self.parts.append(part)
        self.rows += part.num_rows
        if self.rows > max(PENDING, 2 * self.merged):
            self.merge()

    def merge(self) -> Any:
        pa = arrow()
        if len(self.parts) > 1:
            grouped = pa.concat_tables(self.parts).group_by("value", use_threads=False).aggregate([("count", "sum")])
            self.parts = [grouped.rename_columns({"count_sum": "count"})]
        self.merged = self.rows = self.parts[0].num_rows
        return self.parts[0]

    def kept(self, least: int) -> Any:
        """Values that were counted often enough: the most frequent first, equally frequent ones in order."""
        pa = arrow()
        table = self.merge()
        often = pa.compute.and_(pa.compute.greater_equal(table["count"], least), pa.compute.is_valid(table["value"]))
        order = [("count", "descending"), ("value", "ascending")]
        return table.filter(often).sort_by(order)["value"].combine_chunks()


class _Drawn:
    """An even sample of the rows of all batches: those with the smallest of random numbers."""

    def __init__(self, seed: int, size: int) -> None:
        self.generator, self.size = np.random.default_rng(seed), size
        self.parts: list[Any] = []
        self.priorities = np.empty(0)

    def add(self, batch: Any) -> None:
        pa = arrow()
        priorities = self.generator.random(batch.num_rows)
        if len(self.priorities) >= self.size:
            among = np.flatnonzero(priorities < self.priorities.max())
            batch, priorities = batch.take(pa.array(among)), priorities[among]
        self.parts.append(batch)
        self.priorities = np.concatenate([self.priorities, priorities])
        if len(self.priorities) > 2 * self.size:
            self.cut()

    def cut(self) -> Any:
        pa = arrow()
        order = np.argsort(self.priorities, kind="stable")[: self.size]
        table = pa.Table.from_batches(self.parts).take(pa.array(order)).combine_chunks()
        self.parts, self.priorities = table.to_batches(), self.priorities[order]
        return table


class CTREncoder:
    """Turns rows into ids: what :class:`CTRSchema` says, and what :meth:`fit` found in the training data.

    Args:
        schema: the fields and the label.
    """

    vocabulary: list[Any]
    """For each field its values in the order of their ids: an Arrow array of strings, or whole numbers of bins or
    buckets, int64."""
    edges: dict[str, np.ndarray]
    """Rising edges, float64, of each field that is binned by quantiles."""
    leaks: dict[str, float]
    """The columns that alone predict the label, and the area under the ROC curve that each has."""
    rows: int
    """Training rows."""

    def __init__(self, schema: CTRSchema) -> None:
        self.schema = schema
        self.leaks, self.edges, self.rows = {}, {}, 0

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """N_f, the ids of each field."""
        self._must_be_fitted()
        return tuple(len(values) for values in self.vocabulary)

    def fit(self, source: Source, layout: Layout | TableLayout | None = None, seed: int = 0) -> CTREncoder:
        """Look at every training row once; returns itself. Memory grows with the distinct values, not the rows.

        Args:
            source: see :func:`sparing.data.tables.record_batches`.
            layout: of text files.
            seed: of the draw of rows by which quantiles and leaks are found.

        Warns:
            UserWarning: for columns that alone predict the label (see :func:`leaking`).

        Raises:
            DataError: unreadable data; no row.
            InvalidRecord: a label other than 0 and 1; NaN without a rule for missing values.
        """
        counters: list[Any] = [None] * len(self.schema.fields)
        for place, field in enumerate(self.schema.fields):
            if isinstance(field, Categorical) and field.hash_buckets is None:
                counters[place] = _Tally()
            elif not (isinstance(field, Numeric) and field.binning == "quantile"):
                size = field.hash_buckets if isinstance(field, Categorical) else field.buckets
                counters[place] = np.zeros(int(size or 0), np.int64)
        drawn, rows = _Drawn(seed, SAMPLE), 0
        for where, numbers, batch in record_batches(source, self.schema.columns(), layout):
            self._labels(batch, where, numbers)
            rows += batch.num_rows
            drawn.add(batch)
            for field, counter in zip(self.schema.fields, counters, strict=True):
                if isinstance(counter, _Tally):
                    counter.add(_text(field, batch))
                elif counter is not None:
                    codes = _codes(field, batch, where, numbers, None)
                    counter += np.bincount(codes[codes >= 0], minlength=len(counter))
                else:
                    _values(field, batch, where, numbers)  # refuses what is not allowed, wherever it is
        if rows == 0:
            raise DataError(f"{shown(source)}: holds no row; at least one is expected")
        sample = drawn.cut()
        self.rows, self.edges, self.vocabulary = rows, {}, []
        for field, counter in zip(self.schema.fields, counters, strict=True):
            if isinstance(counter, _Tally):
                self.vocabulary.append(counter.kept(field.min_count))
            elif counter is not None:
                self.vocabulary.append(np.flatnonzero(counter >= field.min_count))
            else:
                self.vocabulary.append(self._quantiles(field, sample))
        columns = {
            name: sample[name].combine_chunks() if kind == "text" else sample[name].to_numpy()
            for name, kind in self.schema.columns(label=False).items()
        }
        self.leaks = leaking(columns, self._labels(sample, "the sample", np.arange(len(sample))) == 1)
        if self.leaks:
            found = ", ".join(f"{name!r} ({area:.3f})" for name, area in self.leaks.items())
            warnings.warn(
                f"columns that alone predict {self.schema.label!r}, with the area under their ROC curve: {found}. "
                "Are they known before it is?",
                stacklevel=2,
            )
        return self

    def _quantiles(self, field: Any, sample: Any) -> np.ndarray:
        values = _values(field, sample, "the sample", np.arange(len(sample)))
        values = values[~np.isnan(values)]
        inner = np.linspace(0, 1, field.buckets + 1)[1:-1]
        edges = np.unique(np.quantile(values, inner, method="higher")) if len(values) else np.empty(0)
        edges = edges[edges > values.min()] if len(values) else edges
        self.edges[field.name] = edges
        counts = np.bincount(quantile_bins(values, edges), minlength=len(edges) + 1)
        least = field.min_count * min(1.0, len(values) / self.rows)
        return np.flatnonzero(counts >= max(least, 1))

    # --- encoding

    def encode(self, table: Any) -> Int[ndarray, "n f"]:
        """Ids, int64 (n, F), of the rows of an Arrow table or batch (or Polars data frame); no label is looked for."""
        self._must_be_fitted()
        parts = list(record_batches(table, self.schema.columns(label=False)))
        found = [self._ids(batch, where, numbers) for where, numbers, batch in parts]
        return np.concatenate(found) if found else np.empty((0, len(self.schema.fields)), np.int64)

    def transform(
        self, source: Source, batch_size: int = 2048, layout: Layout | TableLayout | None = None
    ) -> Iterator[tuple[Int[ndarray, "b f"], Float[ndarray, " b"]]]:
        """Batches of (ids int64 (B, F), labels float32 (B,)) in the source's order; the last may be smaller.

        Memory does not grow with the rows.
        """
        self._must_be_fitted()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InvalidValue(f"batch_size = {batch_size!r}; a whole number of at least 1 is expected")
        ids = np.empty((0, len(self.schema.fields)), np.int64)
        labels = np.empty(0, np.float32)
        for where, numbers, batch in record_batches(source, self.schema.columns(), layout, max(ROWS, batch_size)):
            found = self._labels(batch, where, numbers).astype(np.float32)
            ids = np.concatenate([ids, self._ids(batch, where, numbers)])
            labels = np.concatenate([labels, found])
            whole = len(ids) - len(ids) % batch_size
            for first in range(0, whole, batch_size):
                yield ids[first : first + batch_size], labels[first : first + batch_size]
            ids, labels = ids[whole:], labels[whole:]
        if len(ids):
            yield ids, labels

    def unknown_shares(self, source: Source, layout: Layout | TableLayout | None = None) -> dict[str, float]:
        """For each field the share of a source's rows whose id is −1."""
        unknown, rows = np.zeros(len(self.schema.fields), np.int64), 0
        for ids, _ in self.transform(source, ROWS, layout):
            unknown += (ids < 0).sum(0)
            rows += len(ids)
        return {field.name: int(count) / max(rows, 1) for field, count in zip(self.schema.fields, unknown, strict=True)}

    def write(self, source: Source, target: Path | str, layout: Layout | TableLayout | None = None) -> int:
        """Write a source's ids (int32) and labels (uint8) as Parquet, a column for each field; returns the rows.

        Streamed, and put in place whole or not at all.
        """
        pa = arrow()
        target = Path(target)
        names = [field.name for field in self.schema.fields]
        if self.schema.label in names:
            raise InvalidValue(f"a field is called {self.schema.label!r}, as the label; give it another name")
        schema = pa.schema([*((name, pa.int32()) for name in names), (self.schema.label, pa.uint8())])
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, rows = aside(target), 0
        try:
            with pa.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for ids, labels in self.transform(source, ROWS, layout):
                    columns = [*ids.astype(np.int32).T, labels.astype(np.uint8)]
                    writer.write_table(pa.table([np.ascontiguousarray(c) for c in columns], schema=schema))
                    rows += len(ids)
            put_in_place(temporary, target)
        finally:
            remove(temporary)
        return rows

    def _must_be_fitted(self) -> None:
        if not hasattr(self, "vocabulary"):
            raise InvalidValue("this encoder has seen no data: call fit(training data) first")

    def _labels(self, batch: Any, where: str, numbers: np.ndarray) -> np.ndarray:
        label = self.schema.label
        values = batch.column(label).to_numpy()
        for row in np.flatnonzero((values != 0) & (values != 1))[:1]:
            raise InvalidRecord(
                f"{where}, row {numbers[row]}: the label {label!r} is {values[row]:g}; 0 or 1 is expected"
            )
        return values

    def _ids(self, batch: Any, where: str, numbers: np.ndarray) -> Int[ndarray, "n f"]:
        pa = arrow()
        ids = np.empty((batch.num_rows, len(self.schema.fields)), np.int64)
        for place, (field, values) in enumerate(zip(self.schema.fields, self.vocabulary, strict=True)):
            if isinstance(field, Categorical) and field.hash_buckets is None:
                found = pa.compute.index_in(_text(field, batch), value_set=values, skip_nulls=True)
                ids[:, place] = pa.compute.fill_null(found, -1).to_numpy(zero_copy_only=False)
            else:
                codes = _codes(field, batch, where, numbers, self.edges.get(field.name))
                near = np.searchsorted(values, codes)
                hit = near < len(values)
                hit[hit] = values[near[hit]] == codes[hit]
                ids[:, place] = np.where(hit, near, -1)
        return ids

    # --- keeping

    def save(self, folder: Path | str) -> None:
        """Write ``encoder.json`` and ``vocabulary.parquet`` into ``folder``, whole or not at all."""
        self._must_be_fitted()
        pa = arrow()
        texts = {place: values for place, values in enumerate(self.vocabulary) if not isinstance(values, np.ndarray)}
        codes = {
            str(place): values.tolist()
            for place, values in enumerate(self.vocabulary)
            if isinstance(values, np.ndarray)
        }
        kept = {
            "format": FORMAT,
            "schema": self.schema.to_config(),
            "codes": codes,
            "edges": {name: edges.tolist() for name, edges in self.edges.items()},
            "leaks": self.leaks,
            "rows": self.rows,
            "counts": {str(place): len(values) for place, values in texts.items()},
        }
        fields = np.repeat(list(texts), [len(values) for values in texts.values()]).astype(np.int32)
        values = pa.concat_arrays([*texts.values(), pa.array([], pa.string())])
        with folder_atomic(Path(folder)) as scratch:
            write_json(scratch / "encoder.json", kept)
            pa.parquet.write_table(pa.table({"field": fields, "value": values}), scratch / "vocabulary.parquet")

    @classmethod
    def load(cls, folder: Path | str) -> CTREncoder:
        """What :meth:`save` wrote; raises :class:`CorruptFile` for anything else."""
        pa = arrow()
        folder = Path(folder)
        kept = read_json(folder / "encoder.json")
        try:
            if kept["format"] != FORMAT:
                raise ValueError(f"format {kept['format']!r}; this release reads {FORMAT}")
            encoder = cls(CTRSchema.from_config(kept["schema"]))
            table = pa.parquet.read_table(folder / "vocabulary.parquet", memory_map=False)
            field, value = table["field"].to_numpy(), table["value"].combine_chunks().cast(pa.string())
            encoder.vocabulary, taken = [], 0
            for place in range(len(encoder.schema.fields)):
                if str(place) in kept["codes"]:
                    encoder.vocabulary.append(np.array(kept["codes"][str(place)], np.int64))
                    continue
                count = int(kept["counts"][str(place)])
                part = value.slice(taken, count)
                if len(part) != count or part.null_count or (field[taken : taken + count] != place).any():
                    raise ValueError(f"vocabulary.parquet does not hold the {count} values of field {place}")
                encoder.vocabulary.append(part)
                taken += count
            if taken != len(value):
                raise ValueError(f"vocabulary.parquet holds {len(value) - taken} values too many")
            encoder.edges = {name: np.array(edges, np.float64) for name, edges in kept["edges"].items()}
            encoder.leaks = {str(name): float(area) for name, area in kept["leaks"].items()}
            encoder.rows = int(kept["rows"])
        except (KeyError, TypeError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
            raise CorruptFile(f"{folder} holds no encoder that can be read: {error}") from error
        return encoder


def _text(field: Field, batch: Any) -> Any:
    pa = arrow()
    text = batch.column(column_of(field))
    if isinstance(field, Categorical) and field.characters is not None:
        text = pa.compute.utf8_slice_codeunits(text, *field.characters)
        text = pa.compute.if_else(pa.compute.equal(text, ""), pa.scalar(None, pa.string()), text)
    return text


def _values(field: Any, batch: Any, where: str, numbers: np.ndarray) -> np.ndarray:
    """Numbers of a numeric field, float64 (n,); NaN where they are unknown."""
    column = batch.column(column_of(field))
    if column.type == arrow().string():  # another field reads it as text
        column = as_numbers(column, where, column_of(field))
    values = column if isinstance(column, np.ndarray) else column.to_numpy()
    missing = np.isnan(values)
    if field.missing == "zero":
        return np.where(missing, 0.0, values)
    for row in np.flatnonzero(missing)[:1] if field.missing is None else ():
        raise InvalidRecord(
            f'{where}, row {numbers[row]}: no number in {column_of(field)!r}; say missing="zero" or missing="unknown"'
        )
    return values


def _codes(field: Any, batch: Any, where: str, numbers: np.ndarray, edges: np.ndarray | None) -> Int[ndarray, " n"]:
    """Bins or buckets, int64 (n,); −1 where the value is missing."""
    if isinstance(field, Categorical):
        distinct = _text(field, batch).dictionary_encode()
        hashes = fnv1a([value.encode() for value in distinct.dictionary.to_pylist()])
        buckets = (hashes % np.uint64(field.hash_buckets or 1)).astype(np.int64)
        places = arrow().compute.fill_null(distinct.indices, -1).to_numpy(zero_copy_only=False)
        return np.append(buckets, -1)[places]
    values = _values(field, batch, where, numbers)
    missing = np.isnan(values)
    values = np.where(missing, 0.0, values)
    if field.binning == "quantile":
        assert edges is not None
        bins = quantile_bins(values, edges)
    elif field.binning in ("linear", "log2"):
        bins = (linear_bins if field.binning == "linear" else log2_bins)(values, field.width)
    else:
        bins = (log_square_bins if field.binning == "log_square" else libffm_bins)(values)
    return np.where(missing, -1, np.clip(bins, 0, field.buckets - 1))


# --- leaks


def leaking(columns: Mapping[str, Any], positive: Any, threshold: float = LEAK) -> dict[str, float]:
    """Columns that alone predict the label, and the area under the ROC curve that each has.

    Rows are taken to be in random order. The rate of positives for each value of a column (numbers: each of up to 256
    quantiles) is learned on every second row and scores the others, and the other way round; so an identifier that
    never repeats predicts nothing. The two areas are averaged.

    Args:
        columns: name → values (n,), an array of numbers with NaN for missing or an Arrow array of strings.
        positive: whether the label is 1 (n,).
        threshold: areas from here on are reported.
    """
    found: dict[str, float] = {}
    positive = np.asarray(positive, bool)
    for name, values in columns.items():
        codes = _distinct(values)
        areas = []
        for learn in (slice(0, None, 2), slice(1, None, 2)):
            score = slice(1 - (learn.start or 0), None, 2)
            size = int(codes.max(initial=0)) + 1
            seen = np.bincount(codes[learn], minlength=size)
            rate = np.bincount(codes[learn], weights=positive[learn], minlength=size).astype(np.float64)
            rate = (rate + positive[learn].mean()) / (seen + 1) if len(seen) and positive[learn].size else rate
            areas.append(roc_auc(rate[codes[score]], positive[score]) if positive[score].size else float("nan"))
        area = float(np.mean(areas))
        if area >= threshold:
            found[name] = area
    return found


def _distinct(values: Any) -> np.ndarray:
    """Codes from 0 (n,) for the values of a column."""
    if not isinstance(values, np.ndarray):
        encoded = values.dictionary_encode()
        return arrow().compute.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy(zero_copy_only=False)
    known = values[~np.isnan(values)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, LEAK_BINS + 1)[1:-1])) if len(known) else np.empty(0)
    return np.where(np.isnan(values), len(edges) + 1, quantile_bins(values, edges))


# --- texts of libFFM and libsvm


def write_libffm(batches: Iterable[tuple[np.ndarray, np.ndarray]], target: Path | str) -> int:
    """Write batches of (ids, labels) as libFFM's text, ``label field:feature:1 …``; unknown ids are left out.

    Features are the ids of each field as they are. Returns the rows written; the file is whole or not there.
    """
    return _write_text(batches, target, lambda field, number: f"{field}:{number}:1")


def write_libsvm(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], cardinalities: Sequence[int], target: Path | str
) -> int:
    """Write batches of (ids, labels) as libsvm's text, ``label index:1 …``; unknown ids are left out.

    Ids are counted through all fields, of which ``cardinalities`` says how many each has, from 1. Returns the rows
    written; the file is whole or not there.
    """
    first = np.cumsum([1, *cardinalities]).tolist()
    return _write_text(batches, target, lambda field, number: f"{first[field] + number}:1")


def _write_text(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], target: Path | str, entry: Callable[[int, int], str]
) -> int:
    target, rows = Path(target), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(target)
    try:
        with temporary.open("x", encoding="ascii") as file:
            for ids, labels in batches:
                for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
                    entries = (entry(field, number) for field, number in enumerate(row) if number >= 0)
                    file.write(" ".join([str(int(label)), *entries]) + "\n")
                rows += len(ids)
        put_in_place(temporary, target)
    finally:
        remove(temporary)
    return rows


Batches = Iterator[tuple[Int[ndarray, "b f"], Float[ndarray, " b"]]]


def read_libffm(path: Path | str, fields: int, batch_size: int = 2048) -> Batches:
    """Batches of (ids int64 (B, F), labels float32 (B,)) of libFFM's text; a field that a line lacks is −1.

    Values other than 1, a field twice, and fields beyond ``fields`` are refused with the line: these models take one
    category of each field.
    """

    def place(parts: list[str]) -> tuple[int, int]:
        return int(parts[0]), int(parts[1])

    return _read_text(path, fields, batch_size, "field:feature:value", place, f"a field in 0…{fields - 1}")


def read_libsvm(path: Path | str, cardinalities: Sequence[int], batch_size: int = 2048) -> Batches:
    """Batches of (ids int64 (B, F), labels float32 (B,)) of libsvm's text; a field that a line lacks is −1.

    Indices are those of :func:`write_libsvm`. Values other than 1, two indices of one field, and indices beyond the
    last are refused with the line.
    """
    first = np.cumsum([1, *cardinalities])

    def place(parts: list[str]) -> tuple[int, int]:
        field = int(np.searchsorted(first, int(parts[0]), side="right")) - 1
        return field, int(parts[0]) - int(first[field])

    expected = f"an index in 1…{int(first[-1]) - 1}, one of a field"
    return _read_text(path, len(cardinalities), batch_size, "index:value", place, expected)


def _read_text(
    path: Path | str,
    fields: int,
    batch_size: int,
    form: str,
    place: Callable[[list[str]], tuple[int, int]],
    expected: str,
) -> Batches:
    rows: list[np.ndarray] = []
    labels: list[float] = []
    try:
        with Path(path).open(encoding="ascii") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                label, row = _text_line(line, fields, f"{path}:{number}", form, place, expected)
                labels.append(label)
                rows.append(row)
                if len(rows) == batch_size:
                    yield np.stack(rows), np.array(labels, np.float32)
                    rows, labels = [], []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if rows:
        yield np.stack(rows), np.array(labels, np.float32)


def _text_line(
    line: str, fields: int, where: str, form: str, place: Callable[[list[str]], tuple[int, int]], expected: str
) -> tuple[float, np.ndarray]:
    label, *entries = line.split()
    if label not in ("0", "1", "-1", "+1"):
        raise InvalidRecord(f"{where}: the label is {shown(label)}; 0 or 1 (or −1) is expected")
    row = np.full(fields, -1, np.int64)
    for entry in entries:
        parts = entry.split(":")
        try:
            if len(parts) != form.count(":") + 1:
                raise ValueError(f"{len(parts)} parts")
            (field, feature), value = place(parts), float(parts[-1])
        except ValueError as error:
            raise DataError(f"{where}: {shown(entry)}; {form} is expected") from error
        if not 0 <= field < fields or feature < 0 or value != 1 or row[field] != -1:
            raise DataError(f"{where}: {shown(entry)}; {expected}, each once, and the value 1 are expected")
        row[field] = feature
    return float(label in ("1", "+1")), row
