"""Streams of events, one for a recording, and many of them packed together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparing.core import files
from sparing.core.errors import CorruptFile, DataError, InvalidValue, MissingDependency
from sparing.core.fingerprint import fingerprint

FIELDS = ("x", "y", "t", "p")


def sensor_of(size: Any) -> tuple[int, int]:
    """(width, height) of a sensor: two whole numbers above 0, or one for a square one."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int | np.integer) or s < 1 for s in sides):
        raise InvalidValue(f"sensor_size = {size!r}; (width, height) in pixels, whole numbers above 0, is expected")
    return int(sides[0]), int(sides[1])


def check_events(columns: Sequence[np.ndarray], sensor: Any, where: str) -> None:
    """Raise :class:`DataError`, which begins with ``where``, for columns x, y, t and p that are no stream."""
    x, y, t, p = columns
    width, height = sensor_of(sensor)
    for name, values in zip(FIELDS, columns, strict=True):
        if values.ndim != 1 or values.dtype.kind not in "biu":
            raise DataError(
                f"{where}: {name} is {values.dtype} of shape {values.shape}; whole numbers (n,) are expected"
            )
    if len({len(values) for values in (x, y, t, p)}) != 1:
        raise DataError(f"{where}: {len(x)} x, {len(y)} y, {len(t)} t and {len(p)} p; equal numbers are expected")
    if not len(t):
        raise DataError(f"{where}: no event; at least one is expected")
    for name, values, side in (("x", x, width), ("y", y, height)):
        wrong = np.flatnonzero((values < 0) | (values >= side))
        if len(wrong):
            raise DataError(
                f"{where}: event {wrong[0]} has {name} = {values[wrong[0]]}, out of the sensor: 0…{side - 1} is "
                f"expected ({len(wrong)} such events)"
            )
    wrong = np.flatnonzero((p != 0) & (p != 1))
    if len(wrong):
        raise DataError(
            f"{where}: event {wrong[0]} has the polarity {p[wrong[0]]}; 0 (darker) or 1 (brighter) is expected. Where "
            "the codes are −1 and 1, convert them: (p > 0)"
        )
    wrong = np.flatnonzero(t[1:] < t[:-1])
    if len(wrong):
        raise DataError(
            f"{where}: event {wrong[0] + 1} at {t[wrong[0] + 1]} µs comes after one at {t[wrong[0]]} µs; events sorted "
            "by time are expected"
        )


@dataclass(frozen=True, eq=False)
class EventStream:
    """One recording: columns of equal length (n,), sorted by time.

    Raises :class:`DataError` for events that are unsorted, out of the sensor, or of no polarity 0 or 1, and for none.
    """

    x: np.ndarray
    """Column of the pixel, from 0."""
    y: np.ndarray
    """Row of the pixel, from 0."""
    t: np.ndarray
    """Microseconds, int64."""
    p: np.ndarray
    """Polarity: 1 brighter, 0 darker."""
    sensor_size: tuple[int, int]
    """(width, height) in pixels; one number for a square sensor."""

    def __post_init__(self) -> None:
        sensor = sensor_of(self.sensor_size)
        columns = [np.asarray(getattr(self, name)) for name in FIELDS]
        check_events(columns, sensor, "events")
        object.__setattr__(self, "sensor_size", sensor)
        for name, values, kind in zip(FIELDS, columns, (np.int32, np.int32, np.int64, np.uint8), strict=True):
            object.__setattr__(self, name, values.astype(kind))

    def __len__(self) -> int:
        return len(self.t)

    @property
    def duration_us(self) -> int:
        """From the first event to the last."""
        return int(self.t[-1] - self.t[0])

    @classmethod
    def of(cls, events: Any, sensor_size: Any = None) -> EventStream:
        """A stream of whatever holds columns x, y, t (µs) and p: a structured array, a mapping, or a stream.

        ``sensor_size``: (width, height); only a stream has its own.
        """
        if isinstance(events, EventStream):
            if sensor_size is not None and sensor_of(sensor_size) != events.sensor_size:
                raise DataError(f"events of a sensor of {events.sensor_size} pixels; {sensor_size} are expected")
            return events
        names = events.keys() if isinstance(events, Mapping) else getattr(getattr(events, "dtype", None), "names", None)
        if names is None or not set(FIELDS) <= set(names):
            held = "no named columns" if names is None else f"the columns {', '.join(names)}"
            raise DataError(f"events: a {type(events).__name__} with {held}; x, y, t (µs) and p are expected")
        if sensor_size is None:
            raise InvalidValue("events: sensor_size is needed: the array does not say how large the sensor is")
        x, y, t, p = (np.asarray(events[name]) for name in FIELDS)
        return cls(x, y, t, p, sensor_size)


@dataclass(frozen=True, eq=False)
class EventRecordings:
    """Many streams of one sensor, end to end: stream i has the events ``offsets[i]`` to ``offsets[i + 1]``.

    Raises :class:`DataError` naming the stream that is wrong.
    """

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    """Microseconds."""
    p: np.ndarray
    offsets: np.ndarray
    """(streams + 1,)."""
    labels: np.ndarray
    """Class number of each stream."""
    class_names: tuple[str, ...]
    sensor_size: tuple[int, int]
    people: np.ndarray | None = None
    """Number of the person of each stream, where known."""
    where: str = "recordings"
    """What messages call them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sensor_size", sensor_of(self.sensor_size))
        object.__setattr__(self, "class_names", tuple(map(str, self.class_names)))
        offsets, labels = np.asarray(self.offsets), np.asarray(self.labels)
        count = len(offsets) - 1
        if offsets.ndim != 1 or count < 1 or offsets.dtype.kind not in "iu":
            raise DataError(
                f"{self.where}: offsets of shape {offsets.shape}; one more than there are streams is expected"
            )
        if offsets[0] != 0 or offsets[-1] != len(self.t) or (np.diff(offsets.astype(np.int64)) < 1).any():
            raise DataError(f"{self.where}: offsets that do not rise from 0 to the number of events, {len(self.t)}")
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise DataError(
                f"{self.where}: labels {labels.dtype} of shape {labels.shape}; {count} classes are expected"
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
        if len(wrong):
            raise DataError(
                f"{self.where}: stream {wrong[0]} has the class {labels[wrong[0]]}; 0…{len(self.class_names) - 1} is "
                "expected"
            )
        if self.people is not None and np.shape(self.people) != (count,):
            raise DataError(f"{self.where}: people of shape {np.shape(self.people)}; {count} are expected")
        object.__setattr__(self, "offsets", offsets.astype(np.int64))
        object.__setattr__(self, "labels", labels.astype(np.int64))
        if self._sound():
            return
        for i in range(count):  # names the stream and the event that are wrong
            inside = slice(offsets[i], offsets[i + 1])
            columns = [np.asarray(getattr(self, name))[inside] for name in FIELDS]
            check_events(columns, self.sensor_size, f"{self.where}: stream {i}")

    def _sound(self) -> bool:
        """Whether all events are in order, at once for all streams."""
        width, height = self.sensor_size
        columns = [np.asarray(getattr(self, name)) for name in FIELDS]
        if any(each.ndim != 1 or each.dtype.kind not in "biu" or len(each) != len(columns[2]) for each in columns):
            return False
        rising = np.diff(columns[2].astype(np.int64)) >= 0
        rising[self.offsets[1:-1] - 1] = True
        return bool(
            rising.all()
            and all(
                each.min() >= 0 and each.max() < side
                for each, side in zip((columns[0], columns[1], columns[3]), (width, height, 2), strict=True)
            )
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> EventStream:
        if not 0 <= index < len(self):
            raise IndexError(index)
        inside = slice(self.offsets[index], self.offsets[index + 1])
        x, y, t, p = (np.asarray(getattr(self, name))[inside] for name in FIELDS)
        return EventStream(x, y, t, p, self.sensor_size)

    def __iter__(self) -> Iterator[EventStream]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def of(
        cls,
        streams: Sequence[EventStream],
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        people: Sequence[int] | np.ndarray | None = None,
        where: str = "recordings",
    ) -> EventRecordings:
        """Streams of one sensor, packed."""
        if not streams:
            raise DataError(f"{where}: no stream; at least one is expected")
        sensors = {stream.sensor_size for stream in streams}
        if len(sensors) > 1:
            raise DataError(f"{where}: sensors of {sorted(sensors)} pixels; one size for all is expected")
        columns = {name: np.concatenate([getattr(stream, name) for stream in streams]) for name in FIELDS}
        offsets = np.concatenate([[0], np.cumsum([len(stream) for stream in streams])])
        known = None if people is None else np.asarray(people)
        return cls(
            **columns,
            offsets=offsets,
            labels=np.asarray(labels),
            class_names=tuple(class_names),
            sensor_size=sensors.pop(),
            people=known,
            where=where,
        )

    def subset(self, rows: np.ndarray) -> EventRecordings:
        """Some of the streams, in the order given."""
        inside = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        columns = {name: np.asarray(getattr(self, name))[inside] for name in FIELDS}
        counts = np.diff(self.offsets)[rows]
        people = None if self.people is None else np.asarray(self.people)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return replace(self, **columns, offsets=offsets, labels=self.labels[rows], people=people)

    def replaced(self, columns: Mapping[str, np.ndarray], counts: np.ndarray) -> EventRecordings:
        """As many streams with other events: columns x, y, t and p, and how many of them each stream has."""
        x, y, t, p = (columns[name] for name in FIELDS)
        return replace(self, x=x, y=y, t=t, p=p, offsets=np.concatenate([[0], np.cumsum(counts)]))

    @cached_property
    def _fingerprint(self) -> str:
        arrays = [np.asarray(getattr(self, name)) for name in (*FIELDS, "offsets", "labels")]
        text = f"{fingerprint(arrays)} {self.class_names} {self.sensor_size}"
        return hashlib.sha256(text.encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes with any event, label, class name or the size of the sensor; computed once."""
        return self._fingerprint


def read_packed(path: Path, sensor_size: Any, unit_us: int = 1) -> EventRecordings:
    """Recordings in one npz: t, x, y, p, offsets, label, class_names and, where known, person.

    Args:
        path: the file.
        sensor_size: (width, height) in pixels.
        unit_us: microseconds of one unit of t.
    """
    try:
        arrays = files.read_arrays(path)
    except CorruptFile as error:
        raise DataError(str(error)) from error
    missing = [name for name in (*FIELDS, "offsets", "label", "class_names") if name not in arrays]
    if missing:
        raise DataError(f"{path}: no array {missing[0]!r}; {', '.join((*FIELDS, 'offsets', 'label', 'class_names'))}")
    return EventRecordings(
        arrays["x"],
        arrays["y"],
        arrays["t"].astype(np.int64) * unit_us,
        arrays["p"],
        arrays["offsets"],
        arrays["label"],
        tuple(arrays["class_names"].tolist()),
        sensor_size,
        arrays.get("person"),
        str(path),
    )


def from_tonic(name: str, folder: Path | str, **fields: Any) -> EventRecordings:
    """A data set of the package ``tonic``, which is asked for only here: "DVSGesture", "NMNIST", "CIFAR10DVS" …

    tonic is under the GPL and brings many packages, so that Sparing does not install it: ``pip install tonic``.

    Args:
        name: a class of ``tonic.datasets``.
        folder: its ``save_to``.
        **fields: its further arguments, such as ``train=False``.
    """
    try:
        import tonic
    except ImportError as error:
        raise MissingDependency("tonic", "", "from_tonic") from error
    make = getattr(tonic.datasets, name, None)
    if make is None:
        raise InvalidValue(f"from_tonic: tonic.datasets has no {name!r}")
    found = make(save_to=str(folder), **fields)
    width, height, _ = found.sensor_size
    streams, labels = [], []
    for events, label in found:
        columns = {key: events[key] for key in FIELDS}
        streams.append(EventStream.of(columns, (width, height)))
        labels.append(int(label))
    names = [str(each) for each in getattr(found, "classes", range(max(labels, default=0) + 1))]
    return EventRecordings.of(streams, labels, names, where=f"tonic's {name}")
