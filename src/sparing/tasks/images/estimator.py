"""Image classifiers in scikit-learn's manner: ``fit``, ``predict``, ``score``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import log_softmax
from sparing.core.registry import resolve
from sparing.core.task import Splits
from sparing.data.images import ArrayImages, LabelledImages, stratified_cut
from sparing.tasks.images.classification import ImageClassification

if TYPE_CHECKING:
    from sparing.core.cost import CostReport
    from sparing.core.predictor import Predictor
    from sparing.core.step import Step


class ImageClassifier(ClassifierMixin, BaseEstimator, ABC):
    """What classifiers of images in memory have in common: a subclass says which model, and by which steps."""

    seed: int
    """Decides weights, order and augmentation."""
    store: Path | str | None
    """Where unfinished and finished work is kept; the user's cache folder by default."""
    val_share: float | None
    """Share of each class held out to watch the training; None: all images train."""
    classes_: np.ndarray
    """The labels seen in ``fit``, sorted."""
    predictor_: Predictor
    """The trained predictor: ``save`` it, or quantise it in a recipe."""
    curves_: dict[str, Any]
    """Name → [(optimizer steps, value)] of loss, learning rate and validation figures."""
    seconds_: float
    """Wall seconds of the training."""
    cpu_seconds_: float
    """CPU seconds of the training."""

    @abstractmethod
    def _model(self, task: ImageClassification) -> Any:
        """The model to begin with, as :func:`sparing.core.pipeline.begin` takes it."""

    @abstractmethod
    def _steps(self) -> list[Step]:
        """What is done to it; the last step trains."""

    def fit(self, X: Any, y: Sequence[Any] | np.ndarray) -> Self:
        """Train on uint8 images (n, H, W) or (n, H, W, 1 or 3) with a label each of at least two classes.

        Where some are held out, there must be enough of each class: 20 will do for two.
        """
        from sparing.core.pipeline import apply_steps, begin

        images, labels = images_of(X), np.asarray(y)
        if labels.shape != (len(images),):
            raise DataError(f"fit: {len(images)} images and labels of shape {labels.shape}; one label each is expected")
        classes, numbers = np.unique(labels, return_inverse=True)
        task = _InMemory(images, numbers, [str(label) for label in classes], self.val_share)
        job = apply_steps(begin(task, self._model(task), seed=self.seed, store=self.store), self._steps())
        assert job.predictor is not None
        assert job.model is not None
        self.classes_, self.n_features_in_ = classes, int(np.prod(images.shape[1:]))
        self.predictor_, self.curves_ = job.predictor, dict(job.notes.curves)
        self.seconds_, self.cpu_seconds_ = job.store.cost.wall_s, job.store.cost.cpu_s
        self._trained, self._shape = job.model, images.shape[1:]
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (n, classes) of uint8 images (n, H, W) or (n, H, W, C), resized to the size ``fit`` saw."""
        images = images_of(X)
        predictor = self._fitted()
        if images.shape[3] != self._shape[2]:
            raise DataError(f"images of {images.shape[3]} channels; {self._shape[2]}, as in fit, are expected")
        batches = [predictor.predict(list(images[start : start + 256])) for start in range(0, len(images), 256)]
        return np.concatenate(batches)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, classes), in the order of ``classes_``."""
        return np.exp(log_softmax(self.decision_function(X)))

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest label of each image (n,)."""
        logits = self.decision_function(X)
        return self.classes_[logits.argmax(axis=1)]

    def score(self, X: Any, y: Sequence[Any] | np.ndarray) -> float:
        """Share of images whose label is predicted."""
        return float(np.mean(self.predict(X) == np.asarray(y)))

    def _fitted(self) -> Predictor:
        if not hasattr(self, "predictor_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(X, y) first")
        return self.predictor_


class EMOClassifier(ImageClassifier):
    """An EMO network (Zhang et al. 2023) trained from scratch on images in memory, by EMO's own recipe.

    Crops and colour jitter, label smoothing, AdamW without decay on gains and biases, warm-up into an unshifted cosine.
    A fit that is killed goes on where it was when it is called again with the same data and settings.

    Args:
        variant: a size of :class:`sparing.models.emo.EMO`: "1M" … "6M", or one of the small ones.
        epochs: passes over the training images.
        lr: highest learning rate, for batches of ``batch_size``.
        batch_size: images per step.
        weight_decay: of AdamW.
        label_smoothing: share of the target that is spread over all classes.
        flip: probability of mirroring a training image; 0 for hands, digits and text.
        val_share: share of each class held out to watch the training (``curves_``).
        seed: decides weights, order and augmentation.
        fields: further fields of the model, e.g. {"window_sizes": (8, 8, 8, 4)}.
        store: where unfinished and finished work is kept; the user's cache folder by default.
    """

    def __init__(
        self,
        variant: str = "1M",
        epochs: int = 30,
        lr: float = 2e-3,
        batch_size: int = 64,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        flip: float = 0.5,
        val_share: float = 0.1,
        seed: int = 0,
        fields: Mapping[str, Any] | None = None,
        store: Path | str | None = None,
    ) -> None:
        self.variant = variant
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.flip = flip
        self.val_share = val_share
        self.seed = seed
        self.fields = fields
        self.store = store

    def _model(self, task: ImageClassification) -> Any:
        return {**(self.fields or {}), "name": "emo", "variant": self.variant}

    def _steps(self) -> list[Step]:
        fields: dict[str, dict[str, Any]] = {
            "augment": {"flip": self.flip},
            "smooth_labels": {"epsilon": self.label_smoothing},
            "warmup_cosine": {},
            "train": {
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "lr": self.lr,
                "weight_decay": self.weight_decay,
                "decay": "matrices",
                "gradient_clip": 5.0,
            },
        }
        if not self.label_smoothing:
            del fields["smooth_labels"]
        return [resolve("steps", name)(**values) for name, values in fields.items()]

    def report(self) -> CostReport:
        """What one image costs: parameters, bytes, multiply-accumulates, memory, latency on this machine."""
        from sparing.core.cost import cost_report

        self._fitted()
        height, width, channels = self._shape
        return cost_report(self._trained, (channels, height, width))


def images_of(X: Any) -> np.ndarray:
    """Uint8 squares (n, H, W) or (n, H, W, 1 or 3) as (n, H, W, C); :class:`DataError` for anything else."""
    images = np.asarray(X)
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"X is {images.dtype} of shape {images.shape}; uint8 images (n, height, width) or (n, height, width, 1 or "
            "3 channels) are expected, and at least one"
        )
    if images.shape[1] != images.shape[2]:
        raise DataError(f"X holds images of {images.shape[1]}×{images.shape[2]} pixels; squares are expected")
    return images


def moments_of(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (n, H, W, C), in 0…1; 1 where nothing varies."""
    pixels = images / 255.0
    mean, std = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    return tuple(mean.round(4).tolist()), tuple(np.where(std < 1e-4, 1.0, std).round(4).tolist())


class _InMemory(ImageClassification):
    """Images in memory; what is held out for validation stands for the test split, which nothing here looks at."""

    name = "images_in_memory"

    def __init__(self, images: np.ndarray, labels: np.ndarray, names: Sequence[str], val_share: float | None) -> None:
        super().__init__()
        if len(names) < 2:
            raise DataError(f"fit: all labels are {names[0]!r}; at least two classes are expected")
        if val_share is not None and not 0 < val_share < 0.9:
            raise InvalidValue(f"val_share = {val_share!r}; a share above 0 and below 0.9 is expected")
        self.labels, self._images, self._numbers = tuple(names), images, labels
        self.in_channels, self.image_size = images.shape[3], images.shape[1]
        if val_share is None:  # all images train, and all that is told of validation is told of them
            self._parts = dict.fromkeys(("rest", "val", "calibration"), np.arange(len(images)))
        else:
            self._parts = stratified_cut(labels, {"val": val_share, "calibration": 0.02}, seed=0)
        for part, rows in self._parts.items():
            if len(rows) == 0:
                raise DataError(f"fit: {len(images)} images of {len(names)} classes leave none for the part {part!r}")
        self._moments = moments_of(images[self._parts["rest"]])

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the training pixels."""
        return self._moments

    def read(self, root: Path | None) -> Splits:
        """The parts; ``root`` is not looked at."""
        source = ArrayImages(self._images, "X")

        def part(name: str) -> LabelledImages:
            return LabelledImages(source, self._numbers, self.preprocessing, self.labels, self._parts[name], "X")

        return Splits(part("rest"), part("val"), part("calibration"), part("val"))
