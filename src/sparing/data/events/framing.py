"""Frames of events: what was seen in each of T equal spans of time (Yao et al. 2023, arXiv:2209.13929, code)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray

from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor.preprocessing import Operation
from sparing.data.events.stream import EventRecordings, EventStream, sensor_of

FrameMode = Literal["count", "binary", "max_scaled"]
MODES = ("count", "binary", "max_scaled")


def _whole(where: str, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InvalidValue(f"{where}: {name} = {value!r}; a whole number of at least 1 is expected")


def check_framing(where: str, dt_us: Any, T: Any, downsample: Any, mode: Any) -> None:
    """Raise :class:`InvalidValue`, which begins with ``where``, for what makes no frames."""
    _whole(where, dt_us=dt_us, T=T, downsample=downsample)
    if mode not in MODES:
        raise InvalidValue(f"{where}: mode = {mode!r}; one of {', '.join(MODES)} is expected")


def events_to_frames(
    events: EventStream,
    dt_us: int,
    T: int,
    downsample: int = 1,
    mode: FrameMode = "count",
    start: Literal["first", "random"] | int = "first",
    generator: np.random.Generator | None = None,
) -> Float[ndarray, "t 2 x y"]:
    """Frames float32 (T, 2, ⌈width/downsample⌉, ⌈height/downsample⌉): polarity, then x, then y.

    Frame k counts the events with t0 + k·dt_us ≤ t < t0 + (k + 1)·dt_us; later and earlier ones are dropped.

    Args:
        events: the stream.
        dt_us: microseconds of one frame.
        T: number of frames.
        downsample: pixels that become one, along both sides.
        mode: "count" of events, "binary" (whether there was one), or "max_scaled" (counts over the largest of all).
        start: t0: the time of the "first" event; "random", even in first…last − T·dt_us; or a time in microseconds.
        generator: for "random".
    """
    check_framing("frames", dt_us, T, downsample, mode)
    t0 = _start(events, start, dt_us * T, generator)
    width, height = (-(-side // downsample) for side in events.sensor_size)
    k = (events.t - t0) // dt_us
    inside = (k >= 0) & (k < T)
    index = ((k * 2 + events.p) * width + events.x // downsample) * height + events.y // downsample
    counts = np.bincount(index[inside], minlength=T * 2 * width * height)
    frames = counts.reshape(T, 2, width, height).astype(np.float32)
    if mode == "binary":
        return (frames > 0).astype(np.float32)
    if mode == "max_scaled":
        return frames / np.float32(max(frames.max(), 1.0))
    return frames


def _start(events: EventStream, start: Any, span: int, generator: np.random.Generator | None) -> int:
    first = int(events.t[0])
    if isinstance(start, str):
        if start == "first":
            return first
        if start != "random":
            raise InvalidValue(f'frames: start = {start!r}; "first", "random" or a time in microseconds is expected')
        if generator is None:
            raise InvalidValue('frames: start = "random" needs a generator: numpy.random.default_rng(seed)')
        return first + int(generator.integers(0, _room(events.duration_us, span) + 1))
    if isinstance(start, bool) or not isinstance(start, int | np.integer):
        raise InvalidValue(f'frames: start = {start!r}; "first", "random" or a time in microseconds is expected')
    return int(start)


def _room(duration_us: int, span: int) -> int:
    if duration_us < span:
        raise InvalidValue(f"frames: a recording of {duration_us} µs is shorter than its T·dt_us = {span} µs")
    return duration_us - span


def clip_starts(duration_us: int, dt_us: int, T: int, clips: int = 10) -> Integer[ndarray, " clips"]:
    """Where the clips of a test recording begin, in microseconds from its first event: min(i·D // clips, D − T·dt).

    Raises :class:`InvalidValue` for a recording that is shorter than a clip.
    """
    _whole("frames", dt_us=dt_us, T=T, clips=clips)
    room = _room(int(duration_us), dt_us * T)
    return np.array([min(i * int(duration_us) // clips, room) for i in range(clips)], dtype=np.int64)


def clip_votes(predicted: Integer[ndarray, "n clips"], labels: Integer[ndarray, " n"]) -> Bool[ndarray, " n"]:
    """Whether MORE than half the clips of each recording (n, clips) were given its label (n,)."""
    return 2 * (predicted == labels[:, None]).sum(1) > predicted.shape[1]


@dataclass(frozen=True)
class EventsToFrames(Operation):
    """Streams of events, or structured arrays with fields x, y, t and p → frames float32 (N, T, 2, x, y)."""

    dt_us: int
    T: int
    width: int
    height: int
    downsample: int = 1
    mode: FrameMode = "count"
    start: Literal["first"] | int = "first"
    """"first" event, or a time in microseconds."""

    def __post_init__(self) -> None:
        check_framing("events_to_frames", self.dt_us, self.T, self.downsample, self.mode)
        sensor_of((self.width, self.height))

    def __call__(self, batch: Sequence[Any]) -> np.ndarray:
        """Raw streams → frames; :class:`DataError` names the index of one that is wrong."""
        frames = []
        for index, raw in enumerate(batch):
            try:
                stream = EventStream.of(raw, (self.width, self.height))
            except DataError as error:
                raise DataError(f"recording {index}: {error}") from error
            frames.append(events_to_frames(stream, self.dt_us, self.T, self.downsample, self.mode, self.start))
        return np.stack(frames)


class FramedEvents:
    """Recordings as a map-style data set of (frames float32 (T, 2, x, y), class number).

    Args:
        recordings: the streams.
        dt_us: microseconds of one frame.
        T: number of frames.
        downsample: pixels that become one, along both sides.
        mode: "count", "binary" or "max_scaled".
        start: "first" event, a time in microseconds, or "random": drawn from torch's global generator each time.
        rows: which streams, all by default.
    """

    def __init__(
        self,
        recordings: EventRecordings,
        dt_us: int,
        T: int,
        downsample: int = 1,
        mode: FrameMode = "count",
        start: Literal["first", "random"] | int = "first",
        rows: np.ndarray | None = None,
    ) -> None:
        check_framing("frames", dt_us, T, downsample, mode)
        self.recordings, self.start = recordings, start
        self.settings = (dt_us, T, downsample, mode)
        self.rows = np.arange(len(recordings)) if rows is None else np.asarray(rows)

    @property
    def labels(self) -> np.ndarray:
        """Class number of each item (n,)."""
        return self.recordings.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(self.rows[index])
        generator = None
        if self.start == "random":
            import torch

            generator = np.random.default_rng(int(torch.randint(1 << 62, ())))
        frames = events_to_frames(self.recordings[row], *self.settings, start=self.start, generator=generator)
        return frames, int(self.recordings.labels[row])

    def at(self, start: Literal["first", "random"] | int) -> FramedEvents:
        """The same recordings, begun elsewhere."""
        return FramedEvents(self.recordings, *self.settings, start=start, rows=self.rows)

    def changed(self, change: Callable[[EventRecordings], EventRecordings]) -> FramedEvents:
        """These recordings alone, after ``change``."""
        return FramedEvents(change(self.recordings.subset(self.rows)), *self.settings, start=self.start)

    def fingerprint(self) -> str:
        """Changes with the recordings, the rows and how they become frames."""
        from sparing.core.fingerprint import fingerprint

        return fingerprint([self.recordings.fingerprint(), self.rows, list(self.settings), self.start])
