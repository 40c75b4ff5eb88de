"""A user's own table of clicks as a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparing.core.errors import DataError, InvalidValue, did_you_mean
from sparing.data.ctr import Categorical, CTRSchema, avazu_schema, criteo_schema, fields_of
from sparing.data.root import cut_shares, own_splits
from sparing.data.tables import LAYOUTS, Layout, Part, Source, column_kinds
from sparing.tasks.ctr.base import ClickThrough

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz", ".parquet", ".pq")


class ClickTable(ClickThrough):
    """Your own table of rows with a label 0 or 1: a CSV, TSV or Parquet file, or a folder train/val/test of such.

    The first line of a text file names the columns, but in Criteo's layout, where there is none. The files are read in
    batches; what is kept of a row is four bytes for each field. What there is no file for is drawn evenly from the
    training rows, the same on every run.

    Fields that are not given follow from the columns: real numbers become bins of equal shares (missing ones are
    unknown), everything else a category. With the layouts "criteo" and "avazu" they are those of these data sets.

    Args:
        path: the file or folder; a relative one is looked for from the working folder, then from the data root.
        label: the column of the label; None: "label", in Avazu's layout "click".
        fields: as :meth:`~sparing.data.ctr.CTRSchema.to_config` writes them, {kind: categorical, name: shop, …}.
        exclude: columns that are no fields, when ``fields`` are not given.
        min_count: training rows a value must be in, when ``fields`` are not given.
        layout: of text files: csv, tsv, criteo or avazu; None: by their names.
        test_share: share of the rows that test, when there is no test file.
        val_share: share of the rows that validate, when there is no val file.
        calibration_share: share of the rows that calibrate.
    """

    name = "click_table"

    def __init__(
        self,
        path: str,
        label: str | None = None,
        fields: Sequence[Mapping[str, Any]] | None = None,
        exclude: Sequence[str] = (),
        min_count: int = 5,
        layout: Layout | None = None,
        test_share: float = 0.1,
        val_share: float = 0.1,
        calibration_share: float = 0.05,
    ) -> None:
        super().__init__()
        if layout is not None and layout not in LAYOUTS:
            raise InvalidValue(
                f"click_table: layout = {layout!r}.{did_you_mean(str(layout), LAYOUTS)} One of {', '.join(LAYOUTS)}"
            )
        if isinstance(exclude, str):
            raise InvalidValue(f"click_table: exclude = {exclude!r}; a list of names of columns is expected")
        if fields is not None and exclude:
            raise InvalidValue("click_table: exclude says what is no field, and so do the fields; give one of them")
        self.shares = cut_shares("click_table", test=test_share, val=val_share, calibration=calibration_share)
        self.path, self.layout, self.min_count = str(path), layout, min_count
        self.label = label or ("click" if layout == "avazu" else "label")
        self.exclude = [str(name) for name in exclude]
        self.fields = None if fields is None else [dict(field) for field in fields]
        Categorical("any", min_count)
        if self.fields is not None:
            CTRSchema.from_config({"label": self.label, "fields": self.fields})
        self.name = f"click_table:{Path(path).name}"
        self._schemas: dict[Path, CTRSchema] = {}

    def _files(self, root: Path) -> dict[str, Path]:
        expected = "a CSV, TSV or Parquet file, or a folder with such files,"
        return own_splits("click_table", self.path, root, expected, SUFFIXES)

    def sources(self, root: Path) -> Mapping[str, Source]:
        """The files there are; of the training file the part that no other split is drawn from."""
        files, start = self._files(root), 0.0
        found: dict[str, Source] = {}
        for name, share in self.shares.items():
            if name in files:
                found[name] = files[name]
            else:
                found[name] = Part(files["train"], start, start + share)
                start += share
        return {**found, "train": Part(files["train"], start, 1.0)}

    def schema(self, root: Path) -> CTRSchema:
        """The fields that were given, or follow from the columns."""
        if root not in self._schemas:
            self._schemas[root] = self._schema(root)
        return self._schemas[root]

    def _schema(self, root: Path) -> CTRSchema:
        if self.fields is not None:
            return CTRSchema.from_config({"label": self.label, "fields": self.fields})
        if self.layout in ("criteo", "avazu"):
            known = criteo_schema(self.min_count) if self.layout == "criteo" else avazu_schema(self.min_count)
            wanted = [field for field in known.fields if (field.column or field.name) not in self.exclude]
            return CTRSchema(tuple(wanted), self.label)
        file = self._files(root)["train"]
        kinds = column_kinds(file, self.layout)
        for name in (self.label, *self.exclude):
            if name not in kinds:
                there = ", ".join(map(repr, kinds))[:500]
                raise DataError(f"{file}: no column {name!r}.{did_you_mean(name, kinds)} Columns: {there}")
        left = {name: kind for name, kind in kinds.items() if name != self.label and name not in self.exclude}
        if not left:
            raise DataError(f"{file}: no column besides the label {self.label!r} to predict it from")
        return CTRSchema(fields_of(left, self.min_count), self.label)
