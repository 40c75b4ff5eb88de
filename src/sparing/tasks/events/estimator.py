"""Spiking classifiers of events in scikit-learn's manner: ``fit``, ``predict``, ``score``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from sparing.core.errors import DataError, InvalidValue
from sparing.data.events.framing import FrameMode, events_to_frames
from sparing.data.events.stream import EventRecordings, EventStream
from sparing.tasks.events.base import EVALUATION_BATCH, EventClassification


class SNNClassifier(ClassifierMixin, BaseEstimator):
    """A spiking network with attention (Yao et al. 2023), trained from scratch on recordings in memory.

    Recordings are a sequence of streams of events (:class:`~sparing.data.events.stream.EventStream`, or anything with
    columns x, y, t in µs, p, then with ``sensor_size``), or frames (n, T, C, size, size) as float or whole numbers.
    Warns of layers that hardly ever fire after the training, or nearly always.

    Args:
        attention: "none", TA, CA, SA, TCA, TSA, CSA or TCSA.
        placement: of gates over channels and places: "input" or "membrane".
        dt_us: microseconds of a frame.
        T: frames of a recording, from its first event on; of frames, their own number counts.
        downsample: pixels that become one, along both sides.
        mode: "count", "binary" or "max_scaled".
        sensor_size: (width, height) in pixels, where the recordings do not say it.
        epochs: passes over the recordings; gates slow the start, so 24 or more.
        lr: highest learning rate of one cycle.
        batch_size: recordings per step.
        seed: decides weights and order.
        fields: further fields of the model :class:`~sparing.models.spiking.gesture.GestureSNN`.

    Attributes:
        classes_: the labels seen in ``fit``, sorted.
        predictor_: a :class:`~sparing.models.spiking.streaming.StreamingPredictor`: save it, or stream to it.
        report_: a :class:`~sparing.models.spiking.report.SpikeReport` on the recordings of ``fit``.
    """

    def __init__(
        self,
        attention: str = "TCSA",
        placement: str = "input",
        dt_us: int = 30_000,
        T: int = 10,
        downsample: int = 1,
        mode: FrameMode = "count",
        sensor_size: tuple[int, int] | None = None,
        epochs: int = 30,
        lr: float = 4e-3,
        batch_size: int = 33,
        seed: int = 0,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.attention = attention
        self.placement = placement
        self.dt_us = dt_us
        self.T = T
        self.downsample = downsample
        self.mode = mode
        self.sensor_size = sensor_size
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed
        self.fields = fields

    def fit(self, X: Any, y: Sequence[Any] | np.ndarray) -> SNNClassifier:
        """Train on recordings with a label each, of at least two classes."""
        from torch import as_tensor
        from torch.utils.data import TensorDataset

        from sparing.core.predictor import ModulePredictor, build_model
        from sparing.core.randomness import isolated_rng
        from sparing.core.training import Train, fit
        from sparing.models.spiking.report import spike_report
        from sparing.models.spiking.streaming import StreamingPredictor

        frames, labels = self._frames(X), np.asarray(y)
        if labels.shape != (len(frames),):
            raise DataError(f"fit: {len(frames)} recordings and labels of shape {labels.shape}; one each is expected")
        classes, numbers = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise DataError(f"fit: all labels are {classes[0]!r}; at least two classes are expected")
        task = _InMemory(frames, [str(label) for label in classes])
        fields = {"widths": [8, 16, 16], "hidden": [64], "r_c": 4, **(self.fields or {})}
        fields |= {"attention": self.attention, "placement": self.placement, "in_channels": frames.shape[2]}
        with isolated_rng(self.seed):
            model = build_model("gesture_snn", task, **fields)
        plan: dict[str, Any] = {"optimizer": "Adam", "scheduler": "one_cycle"}
        settings = Train(**plan, **{name: getattr(self, name) for name in ("epochs", "batch_size", "lr")})
        data = TensorDataset(as_tensor(frames), as_tensor(numbers))
        trained = fit(model, task, data, None, settings, seed=self.seed).model.eval()
        self.classes_, self._shape = classes, frames.shape[1:]
        self.report_ = spike_report(trained, as_tensor(frames).split(EVALUATION_BATCH))
        for remark in self.report_.remarks:
            warnings.warn(remark, stacklevel=2)
        self.predictor_ = StreamingPredictor(ModulePredictor(trained, task))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Mean outputs over the steps (n, classes)."""
        if not hasattr(self, "predictor_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(X, y) first")
        frames = self._frames(X)
        if frames.shape[1:] != self._shape:
            raise DataError(f"frames of shape {frames.shape[1:]}; {self._shape}, as in fit, are expected")
        starts = range(0, len(frames), EVALUATION_BATCH)
        return np.concatenate([self.predictor_(frames[start : start + EVALUATION_BATCH]) for start in starts])

    def predict(self, X: Any) -> np.ndarray:
        """The label with the largest output for each recording (n,); of equal ones the first."""
        outputs = self.decision_function(X)
        return self.classes_[outputs.argmax(axis=1)]

    def score(self, X: Any, y: Sequence[Any] | np.ndarray) -> float:
        """Share of recordings whose label is predicted."""
        return float(np.mean(self.predict(X) == np.asarray(y)))

    def _frames(self, X: Any) -> np.ndarray:
        """Float32 (n, T, C, size, size)."""
        if isinstance(X, np.ndarray) and X.dtype.names is None and X.ndim == 5:
            frames = X.astype(np.float32)
            if not np.isfinite(frames).all():
                wrong = int(np.flatnonzero(~np.isfinite(frames).all((1, 2, 3, 4)))[0])
                raise DataError(f"recording {wrong} holds frames that are NaN or infinite")
        elif isinstance(X, Sequence | EventRecordings) and len(X):
            streams = [EventStream.of(each, self.sensor_size) for each in X]
            frames = np.stack([events_to_frames(s, self.dt_us, self.T, self.downsample, self.mode) for s in streams])
        else:
            raise DataError(
                f"X is a {type(X).__name__}; streams of events, or frames (n, T, C, size, size), are expected"
            )
        if not len(frames) or frames.shape[3] != frames.shape[4]:
            raise DataError(f"frames of shape {frames.shape}; at least one recording, and squares, are expected")
        return frames


class _InMemory(EventClassification):
    """Frames in memory, for one fit."""

    name = "snn_classifier"

    def __init__(self, frames: np.ndarray, labels: Sequence[str]) -> None:
        super().__init__(1, frames.shape[1], 1, "count")
        self.labels, self.sensor_size, self._example = tuple(labels), frames.shape[3:], frames[:1]

    @property
    def preprocessing(self) -> None:  # type: ignore[override]
        """None: the predictor is called with frames."""

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """The first recording, repeated."""
        return (np.repeat(self._example, batch, axis=0),)

    def read(self, root: Path | None) -> Any:
        """There is nothing to read."""
        raise InvalidValue(f"{self.name}: recordings in memory have no splits")
