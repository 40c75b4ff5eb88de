"""Image classification: one label for each image."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import InvalidValue
from sparing.core.files import canonical_json
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.data.images import LabelledImages
from sparing.data.preprocessing import ChannelsFirst, Decode, Normalise, Resize, ToFloat
from sparing.tasks.images.corruptions import corruption_functions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 256


class ImageClassification(Task):
    """Images of one size and one class each; headline: accuracy.

    A subclass sets the class variables and reads its data in :meth:`read`. Batches are ``(images float32 (N, C, H, W),
    labels int64 (N,))``; a model maps the images to logits (N, classes). Labels may also be given as probabilities
    (N, classes), as mixing and condensation do.
    """

    unit: ClassVar[str] = "image"
    metrics: tuple[Metric, ...] = CLASSIFICATION_METRICS
    capabilities: frozenset[str] = frozenset({"classification", "images"})
    in_channels: int
    image_size: int
    """Height and width of model inputs in pixels."""
    full: ClassVar[float] = 255.0
    """The raw value of a fully lit pixel."""

    def __init__(self) -> None:
        self._splits: dict[Path | None, Splits] = {}

    @abstractmethod
    def read(self, root: Path | None) -> Splits:
        """The datasets (:class:`LabelledImages`) under ``root``."""

    @property
    @abstractmethod
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training pixels in 0…1, for each channel."""

    def splits(self, root: Path | None = None) -> Splits:
        """Read once for each ``root`` and kept."""
        if root not in self._splits:
            self._splits[root] = self.read(root)
        return self._splits[root]

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """Decode, resize to the task's size, scale to 0…1, normalise by the training pixels."""
        mean, std = self.normalisation
        return Preprocessing(
            (
                Decode("L" if self.in_channels == 1 else "RGB"),
                Resize(self.image_size, self.image_size),
                ChannelsFirst(),
                ToFloat(self.full),
                Normalise(mean, std),
            )
        )

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy of logits (N, classes) and labels (N,) or probabilities (N, classes)."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Accuracy, worst class's accuracy, expected calibration error (15 bins) and negative log-likelihood."""
        outputs, targets = [], []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            outputs.append(np.asarray(self.outputs(predictor, batch)))
            targets.append(np.asarray(batch[1]))
        if not outputs:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no image")
        return evaluate_classification(np.concatenate(outputs), np.concatenate(targets), self.labels)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Standard normal numbers, the same on every call: (float32 (batch, C, H, W),)."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return (torch.randn(batch, self.in_channels, self.image_size, self.image_size, generator=generator),)

    def model_fields(self) -> Mapping[str, Any]:
        """``in_channels``, ``num_classes`` and ``image_size``."""
        return {"in_channels": self.in_channels, "num_classes": len(self.labels), "image_size": self.image_size}

    model: Mapping[str, Any] = {}
    """Fields of the default model, a "convnet"."""

    def default_model(self) -> nn.Module:
        """A plain convolutional network of a size that suits the task."""
        from sparing.core.predictor import build_model

        return build_model("convnet", self, **self.model)

    def raw_example(self) -> Sequence[Any]:
        """One uint8 image (H, W, C) of evenly distributed pixel values, as the data files hold them."""
        shape = (self.image_size, self.image_size, self.in_channels)
        return [np.random.RandomState(0).randint(0, int(self.full) + 1, shape).astype(np.uint8)]

    def corruptions(self, split: Any) -> Mapping[str, LabelledImages]:
        """Noise, blur and loss of contrast at fixed severity (see :mod:`sparing.tasks.images.corruptions`).

        They act on raw pixels; a split that holds none (not :class:`LabelledImages`) has no corrupted form.
        """
        if not isinstance(split, LabelledImages):
            return {}
        functions = corruption_functions(self.full, self.image_size)
        return {name: split.corrupted(name, function) for name, function in functions.items()}

    def definition(self) -> dict[str, Any]:
        """What besides the source code decides this task's splits and figures, JSON-able."""
        return {
            "task": f"{type(self).__module__}.{type(self).__qualname__}",
            "labels": list(self.labels),
            "image": [self.in_channels, self.image_size],
            "preprocessing": self.preprocessing.to_config(),
            "metrics": [metric.name for metric in self.metrics],
            "model": dict(self.model),
        }

    def fingerprint(self) -> str:
        """Hash of :meth:`definition`."""
        return hashlib.sha256(canonical_json(self.definition()).encode()).hexdigest()
