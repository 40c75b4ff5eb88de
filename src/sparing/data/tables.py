"""Tables larger than memory, read in batches: CSV and TSV with or without a header, gzipped or not, and Parquet.

PyArrow reads them, and only the columns that are asked for. It is needed: ``pip install 'sparing[tables]'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from sparing.core.errors import DataError, InvalidValue, MissingDependency, did_you_mean, shown
from sparing.core.randomness import derive_seed

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1 << 16
"""Rows of a batch that is read."""
BLOCK = 1 << 24
"""Bytes of a text file that are parsed at a time."""
BUFFER = 1 << 20
"""Bytes of a column of a Parquet file that are read at a time."""


@dataclass(frozen=True)
class TableLayout:
    """How a text file of rows is to be read.

    Args:
        delimiter: between columns.
        columns: their names, for files without a first line of names; none: the first line has them.
        quoted: whether a column may stand in quotation marks.
    """

    delimiter: str = ","
    columns: tuple[str, ...] = ()
    quoted: bool = True


CRITEO = TableLayout("\t", ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))), quoted=False)
"""Criteo's TSV: label, 13 whole numbers, 26 categories; an empty column is a missing value."""
LAYOUTS = {
    "csv": TableLayout(),
    "tsv": TableLayout("\t"),
    "criteo": CRITEO,
    "avazu": TableLayout(),  # id, click, hour (YYMMDDHH), C1, banner_pos, site_id …, named by the first line
}
"""Layouts of text files by name."""

Layout = Literal["csv", "tsv", "criteo", "avazu"]
Source = Any
"""What rows are read from: a path or several, an Arrow table, a Polars data frame or lazy frame."""
Column = Literal["text", "number"]


def arrow(purpose: str = "reading tables") -> ModuleType:
    """The package ``pyarrow``; :class:`MissingDependency` names the command that installs it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("pyarrow", "tables", purpose) from error
    return pyarrow


def layout_of(path: Path, layout: Layout | TableLayout | None = None) -> TableLayout:
    """The layout given or named; None: by the file's name, ".tsv" (also ".txt", and gzipped) or ".csv"."""
    if isinstance(layout, TableLayout):
        return layout
    if layout is None:
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        layout = "tsv" if suffix in (".tsv", ".txt") else "csv"
    if layout not in LAYOUTS:
        raise InvalidValue(f"layout = {layout!r}.{did_you_mean(str(layout), LAYOUTS)} One of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def is_parquet(path: Path) -> bool:
    """By the file's name."""
    return path.suffix.lower() in (".parquet", ".pq")


def column_names(source: Source, layout: Layout | TableLayout | None = None) -> list[str]:
    """Names of a source's columns, in order."""
    pa = arrow()
    if isinstance(source, Part):
        return column_names(source.source, layout)
    if _is_frame(source):
        return list(source.collect_schema().names() if hasattr(source, "collect_schema") else source.schema.names)
    path = _paths(source)[0]
    with _readable(path):
        if is_parquet(path):
            return list(pa.parquet.read_schema(path).names)
        kind = layout_of(path, layout)
        return list(kind.columns) or list(pa.csv.open_csv(path, **_options(kind)).schema.names)


def record_batches(
    source: Source,
    columns: Mapping[str, Column],
    layout: Layout | TableLayout | None = None,
    rows: int | None = None,
) -> Iterator[tuple[str, np.ndarray, pa.RecordBatch]]:
    """Batches of some columns of a source, in its order: (where it is, its rows counted from 0, the batch).

    A batch holds its columns as strings, without empty ones, or as float64, with NaN for missing.

    Args:
        source: a path or a sequence of paths that are read one after the other, a ``pyarrow.Table``, a
            ``polars.DataFrame`` or ``polars.LazyFrame``; or :class:`Part` of any of these.
        columns: their names, and whether they are text or numbers.
        layout: of text files; None: by their names.
        rows: most rows of a batch; None: :data:`ROWS`.

    Raises:
        DataError: a file that is missing, damaged, or has no such column; a column of another kind.
        InvalidValue: a source of another kind.
    """
    arrow()
    rows = ROWS if rows is None else rows
    if isinstance(source, Part):
        yield from _part(source, columns, layout, rows)
        return
    if not _is_frame(source):
        for path in _paths(source):
            start = 0
            with _readable(path):
                read = _read_parquet if is_parquet(path) else _read_text
                for batch in read(path, columns, layout, rows):
                    numbers = np.arange(start, start + batch.num_rows)
                    yield str(path), numbers, _plain(batch, columns, str(path))
                    start += batch.num_rows
        return
    start = 0
    for batch in _frames(source, columns, rows):
        yield "the table", np.arange(start, start + batch.num_rows), _plain(batch, columns, "the table")
        start += batch.num_rows


@dataclass(frozen=True)
class Part:
    """Some rows of a source, drawn evenly: those whose random number in [0, 1) is within [low, high).

    A row's number is a hash of its place in the source and the seed, so parts of one source with bounds that do not
    overlap have no row in common, and nothing is kept of the rows.
    """

    source: Source
    low: float
    high: float
    seed: int = 0

    def holds(self, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Whether rows, counted from 0 (n,), are of this part."""
        draw = evenly(rows, self.seed)
        return (self.low <= draw) & (draw < self.high)


def evenly(rows: Int[np.ndarray, " n"], seed: int = 0) -> Float[np.ndarray, " n"]:
    """A random number in [0, 1) for each place (n,), by SplitMix64 (Steele, Lea and Flood 2014)."""
    step = np.uint64(0x9E3779B97F4A7C15)
    mixed = (rows.astype(np.uint64) + np.uint64(1)) * step ^ np.uint64(derive_seed("part", seed))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) / float(1 << 53)


def _part(part: Part, columns: Mapping[str, Column], layout: Any, rows: int) -> Iterator[Any]:
    pa, start = arrow(), 0
    for where, numbers, batch in record_batches(part.source, columns, layout, rows):
        chosen = part.holds(np.arange(start, start + len(numbers)))
        start += len(numbers)
        yield where, numbers[chosen], batch.filter(pa.array(chosen))


def column_kinds(source: Source, layout: Layout | TableLayout | None = None) -> dict[str, Column]:
    """For each column of a source whether it holds text or numbers, by its type: "number" for real numbers alone.

    Whole numbers are "text", since they mostly name something. The types of a text file are those of its beginning.
    """
    pa = arrow()
    if isinstance(source, Part):
        return column_kinds(source.source, layout)
    if _is_frame(source):
        schema = next(_frames(source, dict.fromkeys(column_names(source), "text"), ROWS)).schema
    else:
        path = _paths(source)[0]
        with _readable(path):
            if is_parquet(path):
                schema = pa.parquet.read_schema(path)
            else:
                schema = pa.csv.open_csv(path, **_options(layout_of(path, layout))).schema
    real = (pa.types.is_floating, pa.types.is_decimal)
    return {field.name: "number" if any(kind(field.type) for kind in real) else "text" for field in schema}


def _is_frame(source: Any) -> bool:
    return hasattr(source, "select") and (hasattr(source, "collect_schema") or hasattr(source, "schema"))


def _plain(batch: pa.RecordBatch, columns: Mapping[str, Column], where: str) -> pa.RecordBatch:
    """The batch with its columns as text or numbers."""
    pa = arrow()
    plain = {
        name: as_text(batch.column(name), where, name)
        if kind == "text"
        else pa.array(as_numbers(batch.column(name), where, name))
        for name, kind in columns.items()
    }
    return pa.RecordBatch.from_pydict(plain)


def _paths(source: Any) -> list[Path]:
    given = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    if not given or not all(isinstance(path, str | Path) for path in given):
        raise InvalidValue(
            f"a table is read from a path, several, or an Arrow or Polars table; {shown(source)} is none of them"
        )
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is no file; a CSV, TSV or Parquet file is expected")
    return paths


def _options(kind: TableLayout) -> dict[str, Any]:
    pa = arrow()
    return {
        "read_options": pa.csv.ReadOptions(
            block_size=BLOCK, column_names=list(kind.columns) or None, use_threads=False
        ),
        "parse_options": pa.csv.ParseOptions(delimiter=kind.delimiter, quote_char='"' if kind.quoted else False),
    }


def _absent(where: object, wanted: Mapping[str, Column], there: Sequence[str]) -> None:
    for name in wanted:
        if name not in there:
            raise DataError(
                f"{where}: no column {name!r}.{did_you_mean(name, there)} Columns: {', '.join(map(repr, there))[:500]}"
            )


def _read_text(path: Path, columns: Mapping[str, Column], layout: Any, rows: int) -> Iterator[pa.RecordBatch]:
    pa = arrow()
    kind = layout_of(path, layout)
    _absent(path, columns, column_names(path, kind))
    types = {name: pa.string() if what == "text" else pa.float64() for name, what in columns.items()}
    convert = pa.csv.ConvertOptions(
        column_types=types, include_columns=list(columns), null_values=[""], strings_can_be_null=True
    )
    with pa.csv.open_csv(path, convert_options=convert, **_options(kind)) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


def _read_parquet(path: Path, columns: Mapping[str, Column], layout: Any, rows: int) -> Iterator[pa.RecordBatch]:
    # PyArrow's own choice, pre_buffer, keeps every byte it has read until the file is closed
    options = {"memory_map": False, "pre_buffer": False, "buffer_size": BUFFER}
    with arrow().parquet.ParquetFile(path, **options) as file:
        _absent(path, columns, file.schema_arrow.names)
        yield from file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False)


def _frames(source: Any, columns: Mapping[str, Column], rows: int) -> Iterator[pa.RecordBatch]:
    _absent("the table", columns, column_names(source))
    names = list(columns)
    if hasattr(source, "collect_batches"):  # a Polars lazy frame
        for frame in source.select(names).collect_batches(chunk_size=rows, maintain_order=True):
            yield from frame.to_arrow().to_batches(max_chunksize=rows)
    else:
        pa = arrow()
        table = pa.Table.from_batches([source]) if isinstance(source, pa.RecordBatch) else source
        table = table.select(names)
        table = table.to_arrow() if hasattr(table, "to_arrow") else table
        yield from table.to_batches(max_chunksize=rows)


class _readable:  # noqa: N801 - a context manager
    """What PyArrow says of a file, as :class:`DataError` with its name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, arrow().ArrowException | OSError | UnicodeDecodeError):
            raise DataError(f"{self.path}: {error}") from error


def as_text(array: pa.Array, where: str, name: str) -> pa.Array:
    """Strings of a column of text, whole numbers, truth values or dates; null and empty strings are null."""
    pa = arrow()
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if pa.types.is_floating(kind) or pa.types.is_nested(kind) or pa.types.is_binary(kind):
        raise DataError(
            f"{where}: {name!r} is a column of type {kind}; categories are text, whole numbers, truth values or dates"
        )
    text = array.cast(pa.string())
    return pa.compute.if_else(pa.compute.equal(text, ""), pa.scalar(None, pa.string()), text)


def as_numbers(array: pa.Array, where: str, name: str) -> np.ndarray:
    """float64 (n,), NaN for null, of a column of numbers, truth values, or text that is numbers."""
    pa = arrow()
    try:
        return array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(f"{where}: {name!r} is no column of numbers: {error}") from error
