"""Gestures before an event camera: simulated ones, and the recordings of DVS128 Gesture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import accuracy_by_class, evaluate_classification
from sparing.core.task import Evaluation
from sparing.data.events.dvs_gesture import CLASSES, SIDE, read_dvs_gesture
from sparing.data.events.framing import FramedEvents, FrameMode, clip_starts, clip_votes, events_to_frames
from sparing.data.events.simulator import MOTIONS
from sparing.data.events.stream import EventRecordings, read_packed
from sparing.data.root import data_root
from sparing.tasks.events.base import EVALUATION_BATCH, EventClassification

if TYPE_CHECKING:
    from sparing.core.predictor import Predictor

FOLDER = "gesture_events_sim"


def by_people(people: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows in two parts without a person in common; the second gets a ``share`` of the people, at least one."""
    everybody = np.unique(people)
    chosen = np.random.RandomState(0).permutation(everybody)[: max(1, round(share * len(everybody)))]
    held = np.isin(people, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)


class GestureEvents(EventClassification):
    """Simulated events of hands that wave, circle, turn, approach and recede: 32×32 pixels, 8 motions, people disjoint.

    Simulated, not recorded: photographs of hands that sign digits (Mavi 2020, arXiv 2011.08927, Apache-2.0) are moved
    for 0.3 s before an ideal sensor with mismatch, refractory time and noise. 720 recordings train and 240 test; the
    senses of circles and turns, and approach and recede, differ in the order of events only. Read from
    ``gesture_events_sim/train.npz`` and ``test.npz`` under the data root. All recordings share the clock, from 0.

    Args:
        dt_us: microseconds of one frame.
        T: frames of a recording.
        downsample: pixels that become one, along both sides.
        mode: "count" of events, "binary", or "max_scaled".
        val_share: share of the training people whose recordings validate.
        calibration_share: share of each training class that calibrates.
    """

    name = "gesture_events"
    labels = MOTIONS
    sensor_size = (32, 32)
    start: str | int = 0
    train_start: str | int = 0
    model: Mapping[str, Any] = {"widths": [8, 16, 16], "hidden": [64], "r_c": 4}

    def __init__(
        self,
        dt_us: int = 30_000,
        T: int = 10,
        downsample: int = 2,
        mode: FrameMode = "count",
        val_share: float = 0.15,
        calibration_share: float = 0.05,
    ) -> None:
        super().__init__(dt_us, T, downsample, mode, calibration_share)
        self.check_share("val_share", val_share)
        self.val_share = val_share

    def read(self, root: Path | None) -> dict[str, EventRecordings | tuple[EventRecordings, np.ndarray]]:
        """Validation is cut from the training people."""
        found = {}
        for split in ("train", "test"):
            path = data_root(root) / FOLDER / f"{split}.npz"
            if not path.is_file():
                raise DataError(
                    f"{path} is missing. It holds simulated events (t in units of 10 µs, x, y, p, offsets, label, "
                    "person, class_names); sparing.data.events.simulator makes such events of films of your own"
                )
            found[split] = read_packed(path, self.sensor_size, unit_us=10)
            if found[split].class_names != self.labels or found[split].people is None:
                raise DataError(f"{path}: the classes {', '.join(self.labels)} and a person for each are expected")
        people = found["train"].people
        assert people is not None
        rest, held = by_people(people, self.val_share)
        return {"train": (found["train"], rest), "val": (found["train"], held), "test": found["test"]}


class DVSGesture(EventClassification):
    """DVS128 Gesture: recordings of 11 hand and arm gestures by 29 people, 128×128 pixels (Amir et al. 2017).

    The folder ``dvs128_gesture`` under the data root holds what IBM publishes: ``trials_to_train.txt``,
    ``trials_to_test.txt``, the .aedat files they name and their tables of labels. The people of the lists are disjoint.

    Args:
        dt_us: microseconds of one frame.
        T: frames of a recording.
        downsample: pixels that become one, along both sides.
        mode: "count" of events, "binary", or "max_scaled".
        clips: a test recording is classified from its first event on (1), or as many evenly spaced times and counts as
            right where more than half the answers are.
        train_start: a training recording is seen from its "first" event on, or, anew each time, from a "random" time.
        val_share: share of the training people whose recordings validate.
        calibration_share: share of each training class that calibrates.
    """

    name = "dvs128_gesture"
    labels = CLASSES
    sensor_size = (SIDE, SIDE)

    def __init__(
        self,
        dt_us: int = 15_000,
        T: int = 60,
        downsample: int = 4,
        mode: FrameMode = "count",
        clips: int = 1,
        train_start: Literal["first", "random"] = "first",
        val_share: float = 0.15,
        calibration_share: float = 0.05,
    ) -> None:
        super().__init__(dt_us, T, downsample, mode, calibration_share)
        self.check_share("val_share", val_share)
        if isinstance(clips, bool) or not isinstance(clips, int) or clips < 1:
            raise InvalidValue(f"dvs128_gesture: clips = {clips!r}; a whole number of at least 1 is expected")
        if train_start not in ("first", "random"):
            raise InvalidValue(f'dvs128_gesture: train_start = {train_start!r}; "first" or "random" is expected')
        self.val_share, self.clips, self.train_start = val_share, clips, train_start

    def read(self, root: Path | None) -> dict[str, EventRecordings | tuple[EventRecordings, np.ndarray]]:
        """Validation is cut from the training people."""
        folder = data_root(root) / self.name
        if not folder.is_dir():
            raise DataError(
                f"{folder} is missing. DVS128 Gesture is not downloaded: get it from IBM Research under its licence, "
                "and unpack it there, or read it elsewhere with sparing.data.events.dvs_gesture"
            )
        train, test = (read_dvs_gesture(folder, split) for split in (True, False))
        assert train.people is not None
        rest, held = by_people(train.people, self.val_share)
        return {"train": (train, rest), "val": (train, held), "test": test}

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """As for one clip; with several, accuracies count recordings of which most clips are right."""
        if self.clips == 1 or not isinstance(split, FramedEvents):
            return super().evaluate(predictor, split)
        outputs = np.stack([self._clips(predictor, split, i) for i in range(len(split))])
        found = evaluate_classification(outputs.mean(1), split.labels, self.labels)
        votes = clip_votes(outputs.argmax(2), split.labels).astype(np.float64)
        by_class = accuracy_by_class(votes, split.labels, len(self.labels))
        named = {name: float(v) for name, v in zip(self.labels, by_class, strict=True) if not np.isnan(v)}
        metrics = {**found.metrics, "accuracy": float(votes.mean()), "worst_class_accuracy": min(named.values())}
        return replace(found, metrics=metrics, per_unit=votes, by_class=named)

    def _clips(self, predictor: Predictor, split: FramedEvents, index: int) -> np.ndarray:
        """Outputs (clips, classes) of one recording."""
        stream = split.recordings[int(split.rows[index])]
        starts = clip_starts(stream.duration_us, self.dt_us, self.T, self.clips) + int(stream.t[0])
        items = [(events_to_frames(stream, *split.settings, start=int(start)), 0) for start in starts]
        batches = batches_of(items, EVALUATION_BATCH, self.collate)
        return np.concatenate([np.asarray(self.outputs(predictor, batch)) for batch in batches])
