"""Flights that left Houston in 2011: the published table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparing.core.errors import DataError
from sparing.data.root import Source
from sparing.data.tables import arrow

HFLIGHTS = Source(
    "hflights",
    "Flights from Houston in 2011, late by more than 15 minutes or not",
    "CC0",
    "https://github.com/hadley/hflights",
    (),
    place="hflights_delay/hflights_delay.parquet",
    made="A Parquet file with the columns label, month, day_of_month, day_of_week, day_of_year, sched_dep_minute, "
    "carrier, flight_num, tail_num, origin, dest, distance and fold (0 … 9) belongs at {path}.",
)
TEST_FOLD = 9


def read_hflights(root: Path) -> Any:
    """The table, a ``pyarrow.Table``."""
    pa = arrow("the data set hflights")

    def read(path: Path) -> Any:
        try:
            return pa.parquet.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: {error}") from error

    return HFLIGHTS.read(root, read)


def split_of(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the rows, labels 0 or 1) of the test fold, or of all others, both (N,)."""
    table = read_hflights(root)
    rows = np.flatnonzero((table["fold"].to_numpy() == TEST_FOLD) != train)
    return rows, table["label"].to_numpy()[rows]
