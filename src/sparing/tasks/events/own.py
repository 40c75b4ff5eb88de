"""A user's own recordings of an event camera as a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparing.core import files
from sparing.core.errors import CorruptFile, DataError
from sparing.data.events.dvs_gesture import read_aedat31
from sparing.data.events.framing import FrameMode
from sparing.data.events.stream import FIELDS, EventRecordings, EventStream, sensor_of
from sparing.data.images import stratified_cut
from sparing.data.root import SPLITS, data_root, own_data
from sparing.tasks.events.base import EventClassification

SUFFIXES = (".npz", ".aedat")


def read_recording(path: Path, sensor_size: tuple[int, int]) -> EventStream:
    """One recording: an npz with arrays x, y, t (µs) and p, or an AEDAT 3.1 file of a square sensor."""
    if path.suffix == ".aedat":
        return EventStream.of(read_aedat31(path, sensor_size[0]), sensor_size)
    try:
        arrays = files.read_arrays(path)
        missing = [name for name in FIELDS if name not in arrays]
        if missing:
            raise DataError(f"no array {missing[0]!r}; x, y, t (µs) and p are expected")
        return EventStream.of({name: arrays[name] for name in FIELDS}, sensor_size)
    except (CorruptFile, DataError) as error:
        raise DataError(f"{path}: {error}") from error


class EventFolder(EventClassification):
    """Your own recordings: a folder of class sub-folders of npz or AEDAT 3.1 files, with or without train/val/test.

    An npz holds the arrays x, y, t (microseconds, rising) and p (0 or 1). What a split lacks is cut from the training
    recordings, class by class and the same on every run.

    Args:
        path: the folder; a relative one is looked for from the working folder, then from the data root.
        side: pixels of the square sensor along a side.
        dt_us: microseconds of one frame.
        T: frames of a recording, from its first event on.
        downsample: pixels that become one, along both sides.
        mode: "count" of events, "binary", or "max_scaled".
        test_share: share of each class that tests, when there is no test folder.
        val_share: share of each class that validates, when there is no val folder.
        calibration_share: share of each training class that calibrates.
    """

    name = "event_folder"
    model: Mapping[str, Any] = {"widths": [16, 32, 32], "hidden": [64], "r_c": 4}

    def __init__(
        self,
        path: str,
        side: int = 128,
        dt_us: int = 15_000,
        T: int = 60,
        downsample: int = 4,
        mode: FrameMode = "count",
        test_share: float = 0.2,
        val_share: float = 0.15,
        calibration_share: float = 0.05,
    ) -> None:
        super().__init__(dt_us, T, downsample, mode, calibration_share)
        self.check_share("test_share", test_share)
        self.check_share("val_share", val_share)
        self.sensor_size = sensor_of(side)
        self.path = str(path)
        self.name = f"event_folder:{Path(path).name}"
        self.shares = {"test": test_share, "val": val_share}
        self._root: Path | None = None
        self._names: tuple[str, ...] | None = None

    def _folder(self) -> Path:
        expected = "a folder with one sub-folder of recordings for each class"
        return own_data("event_folder", self.path, data_root(self._root), expected)

    def _places(self) -> dict[str, Path]:
        """Split → folder of class folders."""
        base = self._folder()
        found = {split: base / name for split, names in SPLITS.items() for name in names if (base / name).is_dir()}
        return found if "train" in found else {"train": base}

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the class folders, sorted."""
        if self._names is None:
            train = self._places()["train"]
            self._names = tuple(sorted(each.name for each in train.iterdir() if each.is_dir()))
            if len(self._names) < 2:
                raise DataError(f"{train}: {len(self._names)} class sub-folders; at least two are expected")
        return self._names

    def splits(self, root: Path | None = None) -> Any:
        """Read once for each ``root``."""
        if root is not None:
            self._root = root
        return super().splits(root)

    def read(self, root: Path | None) -> dict[str, EventRecordings | tuple[EventRecordings, np.ndarray]]:
        """What there is no folder for is cut from the training recordings."""
        found: dict[str, EventRecordings] = {split: self._read(place) for split, place in self._places().items()}
        train = found["train"]
        cut = stratified_cut(train.labels, {name: s for name, s in self.shares.items() if name not in found}, seed=0)
        return {**found, **{"train" if name == "rest" else name: (train, rows) for name, rows in cut.items()}}

    def _read(self, place: Path) -> EventRecordings:
        streams, labels = [], []
        for folder in sorted(each for each in place.iterdir() if each.is_dir()):
            if folder.name not in self.labels:
                raise DataError(f"{folder}: no class of this name among the training recordings")
            for path in sorted(each for each in folder.iterdir() if each.suffix in SUFFIXES):
                streams.append(read_recording(path, self.sensor_size))
                labels.append(self.labels.index(folder.name))
        if not streams:
            raise DataError(f"{place}: no {' or '.join(SUFFIXES)} file in its class sub-folders")
        return EventRecordings.of(streams, labels, self.labels, where=str(place))
