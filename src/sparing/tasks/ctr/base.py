"""Yes or no, predicted from categorical fields: what tasks on tables have in common."""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy import ndarray

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.files import canonical_json
from sparing.core.metrics import expected_calibration_error, roc_auc
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.data.ctr import Clicks, CTREncoder, CTRSchema, EncodeFields, join_clicks
from sparing.data.root import data_root
from sparing.data.tables import Layout, Source, TableLayout, record_batches

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 8192
CONFIG_IDS = 200_000
"""With more ids than these the encoder does not go into a saved model, whose settings would become too long."""


def click_metrics(logits: ndarray, clicked: ndarray) -> tuple[dict[str, float], np.ndarray]:
    """(figures, log-loss of each row (n,)) of logits and labels 0 or 1, both (n,).

    "log_loss" in nats; "roc_auc"; "normalised_entropy", the log-loss over the entropy of the base rate (He et al.
    2014); "ece", the calibration error of the predicted side over 15 bins. With a single class the second and third are
    NaN, which is warned of.

    Raises:
        InvalidValue: shapes that differ, a logit that is not finite, no row.
    """
    if logits.shape != clicked.shape or logits.ndim != 1 or len(logits) == 0:
        raise InvalidValue(
            f"logits of shape {logits.shape} for labels of shape {clicked.shape}; (n,) of both is expected"
        )
    for row in np.flatnonzero(~np.isfinite(logits))[:1]:
        raise InvalidValue(f"the logit of row {row} is {logits[row]}")
    logits, positive = logits.astype(np.float64), clicked > 0
    losses = np.logaddexp(0, np.where(positive, -logits, logits))
    rate = float(positive.mean())
    entropy = -sum(share * math.log(share) for share in (rate, 1 - rate) if share)
    if not entropy:
        warnings.warn(
            f"all {len(clicked)} labels are {int(rate)}: the area under the ROC curve is not known", stacklevel=2
        )
    confidence = 1 / (1 + np.exp(-np.abs(logits)))
    return {
        "log_loss": float(losses.mean()),
        "roc_auc": roc_auc(logits, positive),
        "normalised_entropy": float(losses.mean()) / entropy if entropy else float("nan"),
        "ece": expected_calibration_error(confidence, ((logits > 0) == positive).astype(np.float64)),
    }, losses


class ClickThrough(Task):
    """A label 0 or 1 for each row of a table; headline: log-loss.

    A batch is (ids int64 (B, F), labels float32 (B,)), and a model maps ids to logits (B,). The encoder is fitted on
    the training rows; what is not in them has the id −1. Columns that alone predict the label are warned of and listed
    in :attr:`leaks`. The loss is summed over a batch, as the strengths of xDeepInt's optimizers want it.

    A saved model takes rows as mappings of columns to values, unless there are more than 200,000 ids; the encoder is
    then to be kept by :meth:`~sparing.data.ctr.CTREncoder.save`.
    """

    unit: ClassVar[str] = "row"
    metrics: tuple[Metric, ...] = (
        Metric("log_loss", "lower", "nats"),
        Metric("roc_auc"),
        Metric("normalised_entropy", "lower"),
        Metric("ece", "lower"),
    )
    capabilities: frozenset[str] = frozenset({"tables"})
    loss_reduction = "sum"
    collate = staticmethod(join_clicks)
    layout: Layout | TableLayout | None = None
    """Of text files."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._splits: dict[Path, Splits] = {}
        self._encoders: dict[Path, CTREncoder] = {}

    @abstractmethod
    def sources(self, root: Path) -> Mapping[str, Source]:
        """What "train", "val", "calibration" and "test" are read from; see :mod:`sparing.data.tables`."""

    @abstractmethod
    def schema(self, root: Path) -> CTRSchema:
        """Fields and label."""

    def fitted_on(self, root: Path) -> Source:
        """The rows the encoder is fitted on; those of the split "train" where a task does not say otherwise."""
        return self.sources(root)["train"]

    @property
    def encoder(self) -> CTREncoder:
        """What turns rows into ids; fitted once for each data folder."""
        root = data_root(self._root)
        if root not in self._encoders:
            self._encoders[root] = CTREncoder(self.schema(root)).fit(self.fitted_on(root), self.layout)
        return self._encoders[root]

    @property
    def leaks(self) -> dict[str, float]:
        """Columns that alone predict the label, and the area under the ROC curve that each has."""
        return self.encoder.leaks

    def splits(self, root: Path | None = None) -> Splits:
        """Read once for each ``root`` and kept."""
        self._root, folder = root, data_root(root)
        if folder not in self._splits:
            sources = self.sources(folder)
            self._splits[folder] = Splits(
                **{
                    name: Clicks.of(self.encoder, sources[name], self.layout, f"{self.name}: the split {name!r}")
                    for name in ("train", "val", "calibration", "test")
                }
            )
        return self._splits[folder]

    def outputs(self, model: nn.Module | Predictor, batch: Any) -> Any:
        """Logits (B,)."""
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Sum over the batch of the binary cross-entropy, in nats."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(outputs, batch[1], reduction="sum")

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """A logit z becomes (0, z), of the same probabilities."""
        import torch

        return torch.stack([torch.zeros_like(outputs), outputs], 1), batch[1].long()

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Log-loss, area under the ROC curve, normalised entropy and calibration error; see :func:`click_metrics`."""
        logits, labels = [], []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            logits.append(np.asarray(self.outputs(predictor, batch)))
            labels.append(np.asarray(batch[1]))
        if not logits:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no row")
        metrics, losses = click_metrics(np.concatenate(logits), np.concatenate(labels))
        return Evaluation(metrics, losses)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Random ids, some of them unknown, the same on every call: (int64 (batch, F),)."""
        import torch

        draw = np.random.RandomState(0)
        ids = np.stack([draw.randint(-1, count, batch) for count in self.encoder.cardinalities], 1)
        return (torch.from_numpy(ids.astype(np.int64)),)

    def model_fields(self) -> Mapping[str, Any]:
        """``cardinalities``."""
        return {"cardinalities": list(self.encoder.cardinalities)}

    def default_model(self) -> nn.Module:
        """An "xdeepint" of three layers and four sub-spaces."""
        from sparing.core.predictor import build_model

        return build_model("xdeepint", self, num_layers=3)

    @property
    def preprocessing(self) -> Preprocessing | None:  # type: ignore[override]
        """Rows → ids."""
        if sum(self.encoder.cardinalities) > CONFIG_IDS:
            return None
        return Preprocessing((EncodeFields.of(self.encoder),))

    def raw_example(self) -> Sequence[Any] | None:
        """The first training row."""
        if self.preprocessing is None:
            return None
        root = data_root(self._root)
        columns = self.schema(root).columns(label=False)
        for _, _, batch in record_batches(self.sources(root)["train"], columns, self.layout):
            if batch.num_rows:
                return batch.slice(0, 1).to_pylist()
        raise DataError(f"{self.name}: no training row")

    def fingerprint(self) -> str:
        """Of the public attributes; the ids are looked at with the splits."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return hashlib.sha256(canonical_json(public).encode()).hexdigest()
