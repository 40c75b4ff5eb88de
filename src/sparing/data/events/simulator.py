"""What an event camera would have seen of a film: an ideal sensor with mismatch, refractory time and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray

from sparing.core.errors import DataError, InvalidValue
from sparing.data.events.stream import EventStream

FLOOR = 0.05
"""Added to an intensity before its logarithm is taken."""
MOTIONS = (
    "wave_horizontal",
    "wave_vertical",
    "circle_clockwise",
    "circle_counter_clockwise",
    "rotate_clockwise",
    "rotate_counter_clockwise",
    "approach",
    "recede",
)
"""What :func:`move_image` knows; the classes of the task "gesture_events"."""


@dataclass(frozen=True)
class EventSimulator:
    """Events where the logarithm of the intensity has moved by a threshold since the pixel's last event.

    L = ln(I + 0.05), linear in time between frames. A pixel's reference begins as L of the first frame; each time L has
    moved by the pixel's threshold from it, up or down, an event is stamped at the crossing and the reference follows
    by that threshold.
    """

    threshold: float = 0.25
    """Of L, in nepers."""
    threshold_sigma: float = 0.1
    """Mismatch: each pixel and polarity has threshold·max(0.1, 1 + threshold_sigma·N(0, 1)), drawn once."""
    refractory_us: int = 1000
    """An event closer than this to the last one kept of its pixel is dropped; the reference moves all the same."""
    noise_hz: float = 2.0
    """Events of each pixel and second that have no cause, of random polarity."""

    def __post_init__(self) -> None:
        for name, least in (("threshold", 1e-6), ("threshold_sigma", 0), ("refractory_us", 0), ("noise_hz", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not np.isfinite(value) or value < least:
                raise InvalidValue(f"EventSimulator: {name} = {value!r}; a number of at least {least:g} is expected")

    def from_frames(
        self, frames: Float[ndarray, "n h w"], times_us: Integer[ndarray, " n"], seed: int = 0
    ) -> EventStream:
        """The events of a film.

        Args:
            frames: intensities in 0…1 (N, height, width), N ≥ 2.
            times_us: rising times of the frames in microseconds (N,).
            seed: of mismatch and noise.

        Raises :class:`DataError` for NaN or intensities out of 0…1, for times that do not rise, and where no pixel has
        an event.
        """
        frames, times = np.asarray(frames, dtype=np.float64), np.asarray(times_us)
        if frames.ndim != 3 or len(frames) < 2:
            raise DataError(f"frames of shape {frames.shape}; (N, height, width) with N ≥ 2 is expected")
        if times.shape != (len(frames),) or times.dtype.kind not in "iu" or (np.diff(times.astype(np.int64)) < 1).any():
            raise DataError(f"times_us of shape {times.shape}; {len(frames)} rising whole numbers are expected")
        wrong = np.flatnonzero(~((frames >= 0) & (frames <= 1)).all((1, 2)))  # NaN is neither
        if len(wrong):
            raise DataError(f"frame {wrong[0]} holds NaN or intensities out of 0…1 ({len(wrong)} such frames)")
        draw = np.random.default_rng(seed)
        height, width = frames.shape[1:]
        spread = 1 + self.threshold_sigma * draw.standard_normal((2, height * width))
        down, up = self.threshold * np.maximum(0.1, spread)
        level = np.log(frames.reshape(len(frames), -1) + FLOOR)
        pixels, stamps, polarities = self._crossings(level, times.astype(np.float64), down, up)
        kept = self._rested(pixels, stamps)
        columns = [pixels[kept], stamps[kept], polarities[kept]]
        first, last = int(times[0]), int(times[-1])
        noise = int(draw.poisson(self.noise_hz * 1e-6 * (last - first) * height * width))
        drawn = (draw.integers(0, n, noise) for n in (height * width, last - first, 2))
        pixels, stamps, polarities = (np.concatenate([own, more]) for own, more in zip(columns, drawn, strict=True))
        stamps[len(columns[0]) :] += first
        if not len(stamps):
            raise DataError("no pixel of these frames has an event; something that moves, or noise, is expected")
        order = np.argsort(stamps, kind="stable")
        pixels = pixels[order]
        return EventStream(pixels % width, pixels // width, stamps[order], polarities[order], (width, height))

    @staticmethod
    def _crossings(
        level: np.ndarray, times: np.ndarray, down: np.ndarray, up: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pixel, whole microsecond, polarity) of every crossing, in the order of frames and pixels."""
        reference = level[0].copy()
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for before, after, t0, t1 in zip(level[:-1], level[1:], times[:-1], times[1:], strict=True):
            rising = after > before
            step = np.where(rising, up, -down)
            # a crossing is due wherever the level has gone at least one threshold beyond the reference
            count = np.floor((after - reference) / step + 1e-12).astype(np.int64)
            count[(after == before) | (count < 0)] = 0
            pixel = np.repeat(np.arange(len(count)), count)
            number = np.arange(len(pixel)) - np.repeat(np.cumsum(count) - count, count) + 1
            crossed = reference[pixel] + number * step[pixel]
            share = (crossed - before[pixel]) / (after - before)[pixel]
            stamp = np.floor(t0 + np.clip(share, 0, 1) * (t1 - t0)).astype(np.int64)
            found.append((pixel, stamp, rising[pixel].astype(np.int64)))
            reference += count * step
        pixels, stamps, polarities = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return pixels, stamps, polarities

    def _rested(self, pixels: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Numbers of the events whose pixel had rested since the last one kept, in the order given."""
        order = np.argsort(pixels, kind="stable")  # of one pixel they are in the order of time already
        starts = np.flatnonzero(np.diff(pixels[order], prepend=-1))
        counts = np.diff(starts, append=len(order))
        last = np.full(len(starts), np.iinfo(np.int64).min // 2)
        kept = np.zeros(len(order), dtype=bool)
        for rank in range(int(counts.max(initial=0))):
            having = np.flatnonzero(counts > rank)
            place = order[starts[having] + rank]
            good = stamps[place] - last[having] >= self.refractory_us
            kept[place[good]] = True
            last[having[good]] = stamps[place[good]]
        return np.flatnonzero(kept)


def move_image(
    image: ndarray,
    motion: str,
    side: int = 32,
    duration_us: int = 300_000,
    every_us: int = 2000,
    amplitude: float = 5.0,
    cycles: float = 1.5,
    phase: float = 0.0,
    angle: float = 1.4,
    zoom: float = 2.0,
) -> tuple[Float[ndarray, "n side side"], Integer[ndarray, " n"]]:
    """A film of a still image that moves, for :meth:`EventSimulator.from_frames`: events of images of your own.

    Args:
        image: grey (height, width), whole numbers 0…255 or real ones 0…1; its longer side fills the frame at rest.
        motion: one of :data:`MOTIONS`; clockwise as it is seen, with rows running down.
        side: height and width of a frame in pixels.
        duration_us: length of the film in microseconds.
        every_us: microseconds from frame to frame.
        amplitude: of waves and circles, in pixels of a frame.
        cycles: waves or turns of a circle in the film.
        phase: of waves and circles at first, in radians.
        angle: of a rotation in the film, in radians.
        zoom: size at the end of an approach, or at the start of a recession.

    Returns:
        Frames in 0…1 (N, side, side) and their times in microseconds (N,), for ``from_frames``.
    """
    from scipy.ndimage import affine_transform

    if motion not in MOTIONS:
        raise InvalidValue(f"move_image: motion = {motion!r}; one of {', '.join(MOTIONS)} is expected")
    for name, value in (("side", side), ("duration_us", duration_us), ("every_us", every_us)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidValue(f"move_image: {name} = {value!r}; a whole number of at least 1 is expected")
    if every_us > duration_us:
        raise InvalidValue(f"move_image: every_us = {every_us} is more than duration_us = {duration_us}")
    picture = np.asarray(image)
    if picture.ndim != 2 or not picture.size:
        raise DataError(f"an image of shape {picture.shape}; grey (height, width) is expected")
    picture = picture / 255.0 if picture.dtype.kind in "iu" else picture.astype(np.float64)
    if not ((picture >= 0) & (picture <= 1)).all():
        raise DataError("an image that holds NaN or values out of range; 0…255 as whole numbers or 0…1 is expected")
    times = np.arange(0, duration_us + 1, every_us)
    rest = max(picture.shape) / side  # pixels of the image for one of a frame
    centre = (np.array(picture.shape) - 1) / 2
    middle = np.full(2, (side - 1) / 2)
    frames = []
    for share in times / duration_us:
        turned, scale, shift = 0.0, 1.0, np.zeros(2)
        around = 2 * np.pi * cycles * share + phase
        if motion.startswith("wave"):
            shift[int(motion == "wave_horizontal")] = amplitude * np.sin(around)
        elif motion.startswith("circle"):
            sense = 1 if motion == "circle_clockwise" else -1
            shift[:] = amplitude * np.sin(sense * around), amplitude * np.cos(around)
        elif motion.startswith("rotate"):
            turned = (1 if motion == "rotate_clockwise" else -1) * angle * share
        else:
            scale = zoom ** (share if motion == "approach" else 1 - share)
        # where a pixel of the frame comes from, rows first
        back = np.array([[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]]) * rest / scale
        frames.append(
            affine_transform(picture, back, centre - back @ (middle + shift), (side, side), order=1, mode="nearest")
        )
    return np.clip(np.stack(frames), 0, 1), times
