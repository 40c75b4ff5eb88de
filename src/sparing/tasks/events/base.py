"""Classification of recordings of event cameras: one class for each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.data.events.framing import EventsToFrames, FramedEvents, FrameMode, check_framing
from sparing.data.events.stream import FIELDS, EventRecordings
from sparing.data.images import stratified_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 64
NOISE_HZ = 20.0
LOSS = 0.5


class EventClassification(Task):
    """Recordings of one sensor and one class each, seen as T frames of event counts; headline: accuracy.

    Batches are ``(frames float32 (N, T, 2, width, height), labels int64 (N,))``. A model maps the frames to a class's
    mean output over the steps (N, classes), which is trained towards 1 for the recording's class and 0 for the others
    (mean squared error, Yao et al. 2023) and of which the largest is the answer. Calibration error and likelihood take
    these outputs as logits, which squared errors do not make of them: expect poor ones.

    Args:
        dt_us: microseconds of one frame.
        T: frames of a recording; later events are not looked at.
        downsample: pixels of the sensor that become one, along both sides.
        mode: "count" of events, "binary", or "max_scaled".
        calibration_share: share of each training class that calibrates instead.
    """

    unit: ClassVar[str] = "recording"
    metrics: tuple[Metric, ...] = CLASSIFICATION_METRICS
    capabilities: frozenset[str] = frozenset({"classification", "events"})
    sensor_size: tuple[int, int]
    """(width, height) in pixels."""
    start: str | int = "first"
    """Where the frames of a test recording begin; see :func:`~sparing.data.events.framing.events_to_frames`."""
    train_start: str | int = "first"
    """Where those of a training recording do."""
    model: Mapping[str, Any] = {}
    """Fields of the default model, a "gesture_snn"."""

    def __init__(self, dt_us: int, T: int, downsample: int, mode: FrameMode, calibration_share: float = 0.05) -> None:
        check_framing(self.name, dt_us, T, downsample, mode)
        self.check_share("calibration_share", calibration_share)
        self.dt_us, self.T, self.downsample, self.mode = int(dt_us), int(T), int(downsample), mode
        self.calibration_share = calibration_share
        self._splits: dict[Path | None, Splits] = {}

    def check_share(self, name: str, share: Any) -> None:
        """Raise :class:`InvalidValue` for what is no share above 0 and below 0.9."""
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 0.9:
            raise InvalidValue(f"{self.name}: {name} = {share!r}; a share above 0 and below 0.9 is expected")

    @abstractmethod
    def read(self, root: Path | None) -> dict[str, EventRecordings | tuple[EventRecordings, np.ndarray]]:
        """ "train", "val" and "test" under ``root``: recordings, or recordings and which of them."""

    def splits(self, root: Path | None = None) -> Splits:
        """Calibration is cut from the training recordings; read once for each ``root``."""
        if root not in self._splits:
            parts = {}
            for name, found in self.read(root).items():
                recordings, rows = found if isinstance(found, tuple) else (found, np.arange(len(found)))
                parts[name] = (recordings, rows)
            recordings, rows = parts["train"]
            cut = stratified_cut(recordings.labels[rows], {"calibration": self.calibration_share}, seed=0)
            parts["calibration"] = (recordings, rows[cut["calibration"]])
            parts["train"] = (recordings, rows[cut["rest"]])
            for name, (recordings, rows) in parts.items():
                if len(rows) == 0:
                    raise DataError(f"{recordings.where}: no recording is left for the split {name!r}")
                if recordings.sensor_size != self.sensor_size:
                    raise DataError(
                        f"{recordings.where}: a sensor of {recordings.sensor_size} pixels; {self.sensor_size} expected"
                    )
            self._splits[root] = Splits(**{name: self.framed(name, *part) for name, part in parts.items()})
        return self._splits[root]

    def framed(self, split: str, recordings: EventRecordings, rows: np.ndarray) -> FramedEvents:
        """One split as frames."""
        start: Any = self.train_start if split == "train" else self.start
        return FramedEvents(recordings, self.dt_us, self.T, self.downsample, self.mode, start, rows)

    @property
    def image_size(self) -> int:
        """Height and width of a frame."""
        width, height = self.sensor_size
        if width != height:
            raise InvalidValue(f"{self.name}: a sensor of {width}×{height} pixels; networks here take squares")
        return -(-width // self.downsample)

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """Streams of events to frames."""
        width, height = self.sensor_size
        start: Any = self.start
        return Preprocessing((EventsToFrames(self.dt_us, self.T, width, height, self.downsample, self.mode, start),))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean squared error of outputs (N, classes) and one-hot labels, over recordings and classes.

        Labels may be given as probabilities (N, classes), too.
        """
        from torch.nn.functional import mse_loss, one_hot

        targets = batch[1]
        if targets.ndim == 1:
            targets = one_hot(targets, outputs.shape[-1])
        return mse_loss(outputs, targets.to(outputs.dtype))

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Accuracy, worst class's accuracy, calibration error and likelihood; of equal outputs the first class's."""
        outputs, targets = [], []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            outputs.append(np.asarray(self.outputs(predictor, batch)))
            targets.append(np.asarray(batch[1]))
        if not outputs:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no recording")
        return evaluate_classification(np.concatenate(outputs), np.concatenate(targets), self.labels)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Counts of events, about one in three places, the same on every call: (float32 (batch, T, 2, W, H),)."""
        import torch

        size = self.image_size
        counts = np.random.RandomState(0).poisson(0.4, (batch, self.T, 2, size, size)).astype(np.float32)
        if self.mode != "count":
            counts = np.minimum(counts, 1)
        return (torch.from_numpy(counts),)

    def model_fields(self) -> Mapping[str, Any]:
        """``in_channels``, ``num_classes``, ``image_size`` and ``T``."""
        return {"in_channels": 2, "num_classes": len(self.labels), "image_size": self.image_size, "T": self.T}

    def default_model(self) -> nn.Module:
        """A spiking network of a size that suits the task."""
        from sparing.core.predictor import build_model

        return build_model("gesture_snn", self, **{"r_t": min(5, self.T), **self.model})

    def raw_example(self) -> Sequence[Any]:
        """One recording of 2,000 events, evenly distributed."""
        draw, (width, height) = np.random.RandomState(0), self.sensor_size
        events = np.zeros(2000, dtype=[("x", "<i4"), ("y", "<i4"), ("t", "<i8"), ("p", "u1")])
        events["x"], events["y"], events["p"] = (draw.randint(0, n, 2000) for n in (width, height, 2))
        events["t"] = np.sort(draw.randint(0, self.dt_us * self.T, 2000))
        return [events]

    def corruptions(self, split: Any) -> Mapping[str, FramedEvents]:
        """Background noise of 20 Hz more per pixel, and the loss of half the events; the same every time."""
        if not isinstance(split, FramedEvents):
            return {}
        return {
            "noise": split.changed(lambda recordings: noisy(recordings, NOISE_HZ)),
            "event loss": split.changed(lambda recordings: thinned(recordings, LOSS)),
        }

    def fingerprint(self) -> str:
        """Of all that decides splits and figures besides the source code."""
        from sparing.core.fingerprint import fingerprint

        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return fingerprint([self.name, public, list(self.labels), list(self.sensor_size), self.start, self.train_start])


def noisy(recordings: EventRecordings, hz: float) -> EventRecordings:
    """Recordings with ``hz`` more events per pixel and second, of random place and polarity."""
    draw, (width, height) = np.random.RandomState(0), recordings.sensor_size
    starts, ends = recordings.offsets[:-1], recordings.offsets[1:]
    first, span = recordings.t[starts], recordings.t[ends - 1] - recordings.t[starts] + 1
    counts = draw.poisson(hz * 1e-6 * span * width * height)
    owner = np.repeat(np.arange(len(recordings)), counts)
    more = {
        "x": draw.randint(0, width, len(owner)),
        "y": draw.randint(0, height, len(owner)),
        "t": first[owner] + (draw.random_sample(len(owner)) * span[owner]).astype(np.int64),
        "p": draw.randint(0, 2, len(owner)),
    }
    columns = {name: np.concatenate([getattr(recordings, name), values]) for name, values in more.items()}
    owners = np.concatenate([np.repeat(np.arange(len(recordings)), ends - starts), owner])
    order = np.lexsort((columns["t"], owners))
    return recordings.replaced({name: values[order] for name, values in columns.items()}, ends - starts + counts)


def thinned(recordings: EventRecordings, share: float) -> EventRecordings:
    """Recordings that lack a ``share`` of their events, at random; the first of each is kept."""
    kept = np.random.RandomState(0).random_sample(len(recordings.t)) >= share
    kept[recordings.offsets[:-1]] = True
    counts = np.add.reduceat(kept.astype(np.int64), recordings.offsets[:-1])
    columns = {name: getattr(recordings, name)[kept] for name in FIELDS}
    return recordings.replaced(columns, counts)
