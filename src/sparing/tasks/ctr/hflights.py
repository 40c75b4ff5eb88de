"""Flights that left Houston in 2011: which will arrive late?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparing.core.errors import InvalidValue
from sparing.data.ctr import Categorical, CTRSchema, Numeric
from sparing.data.hflights import TEST_FOLD, read_hflights
from sparing.data.tables import Source, arrow, evenly
from sparing.tasks.ctr.base import ClickThrough

LAST_TRAINING_DAY = 292
"""Of the split by time."""


class HFlights(ClickThrough):
    """Flights from Houston in 2011: does one arrive over 15 minutes late? 223,874 rows, a fifth of them late.

    Eleven fields known before departure: month, day of the month, of the week and of the year, the half hour of the
    scheduled departure, carrier, flight, aircraft, origin, destination, and the distance in steps of half an octave.
    Values in fewer than ``min_count`` training rows are unknown. Folds 0–7 train (a twentieth of them calibrates), fold
    8 validates and fold 9 tests. Read from ``hflights_delay/hflights_delay.parquet`` under the data root.

    With ``split="time"`` the folds are not looked at: days up to 292 train, validate and calibrate, later ones test.
    Every day of the test is then unknown, so every model falls.

    Args:
        min_count: training rows a value must be in.
        split: "fold" or "time".
        train_limit: at most so many rows train and calibrate, drawn evenly; None: all.
        test_limit: at most so many rows validate, and so many test.
    """

    name = "hflights"

    def __init__(
        self,
        min_count: int = 5,
        split: Literal["fold", "time"] = "fold",
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__()
        if split not in ("fold", "time"):
            raise InvalidValue(f'hflights: split = {split!r}; "fold" or "time" is expected')
        for name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
                raise InvalidValue(f"hflights: {name} = {limit!r}; a whole number of at least 1 is expected, or none")
        self.min_count, self.split = min_count, split
        self.train_limit, self.test_limit = train_limit, test_limit
        self.schema(Path())
        self._parts: dict[Path, dict[str, Any]] = {}

    def schema(self, root: Path) -> CTRSchema:
        """The eleven fields."""
        names = "month day_of_month day_of_week day_of_year carrier flight_num tail_num origin dest"
        fields: dict[str, Any] = {name: Categorical(name, self.min_count) for name in names.split()}
        slot = Numeric("half_hour", "linear", 64, 30.0, None, self.min_count, column="sched_dep_minute")
        distance = Numeric("distance", "log2", 64, 0.5, None, self.min_count)
        ordered = [*list(fields.values())[:4], slot, *list(fields.values())[4:], distance]
        return CTRSchema(tuple(ordered), "label")

    def _read(self, root: Path) -> dict[str, Any]:
        if root not in self._parts:
            pa, table = arrow("the task hflights"), read_hflights(root)
            rows = np.arange(len(table))
            if self.split == "fold":
                fold = table["fold"].to_numpy()
                training, val, test = fold < TEST_FOLD - 1, fold == TEST_FOLD - 1, fold == TEST_FOLD
            else:
                test = table["day_of_year"].to_numpy() > LAST_TRAINING_DAY
                val = ~test & (evenly(rows, 1) < 0.1)
                training = ~test & ~val
            training = _few(training, self.train_limit)
            val, test = (_few(mask, self.test_limit) for mask in (val, test))
            cut = training & (evenly(rows) < 0.05)
            masks = {"fitted": training, "train": training & ~cut, "val": val, "calibration": cut, "test": test}
            self._parts[root] = {name: table.filter(pa.array(mask)) for name, mask in masks.items()}
        return self._parts[root]

    def sources(self, root: Path) -> Mapping[str, Source]:
        """The rows of each split."""
        return self._read(root)

    def fitted_on(self, root: Path) -> Source:
        """All that train or calibrate."""
        return self._read(root)["fitted"]


def _few(mask: np.ndarray, limit: int | None) -> np.ndarray:
    """At most ``limit`` of the rows that a mask (n,) chooses, drawn evenly."""
    if limit is None:
        return mask
    chosen = np.flatnonzero(mask)
    kept = np.zeros_like(mask)
    kept[chosen[np.argsort(evenly(chosen, 2), kind="stable")[:limit]]] = True
    return kept
