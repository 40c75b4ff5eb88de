"""A stream of tasks, each with a block of classes of its own, that one model learns one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import IncompatibleStep, InvalidValue, shown
from sparing.core.fingerprint import fingerprint
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.randomness import derive_seed
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.core.transfer import named_task
from sparing.data.images import LabelledImages
from sparing.data.permuted import PermutedImages
from sparing.tasks.images.classification import ImageClassification

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor, Preprocessing

EVALUATION_BATCH = 256
OUTSIDE = -1e11
"""The logit of classes outside a sample's block, so that their probability is 0."""


class Continual(Task):
    """Several tasks in a row for one model: a set of images under permutations of pixels, or its classes in blocks.

    The model has one head for the classes of all tasks, and is told which task a sample is of: loss and figures look
    at the logits of that task's block of classes alone (task-incremental learning). The headline is the mean over
    tasks of their accuracy. ``train``, ``val``, ``calibration`` and ``test`` hold the samples of all tasks; who learns
    them one after the other, as the step ``federate`` does, finds the blocks in :attr:`class_blocks`.

    Args:
        of: the task that the stream is made of: a registered one's name, {name: …, field: value}, or a task made in
            Python. A classification of images; for ``classes`` also one of texts.
        stream: "permuted": each task has all images and all classes, with the pixels in an order of its own.
            "classes": the classes in their order, cut into blocks.
        tasks: how many. For ``classes`` it divides the number of classes.
        seed: decides the permutations.
    """

    name = "continual"

    def __init__(
        self,
        of: str | Mapping[str, Any] | Task = "fashion_mnist",
        stream: Literal["permuted", "classes"] = "permuted",
        tasks: int = 4,
        seed: int = 0,
    ) -> None:
        self.of = base = named_task(of, "continual: of")
        if stream not in ("permuted", "classes"):
            raise InvalidValue(f'continual: stream = {shown(stream)}; "permuted" or "classes" is expected')
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise InvalidValue(f"continual: tasks = {shown(tasks)}; a whole number of at least 1 is expected")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InvalidValue(f"continual: seed = {shown(seed)}; a whole number of at least 0 is expected")
        if stream == "permuted" and not isinstance(base, ImageClassification):
            raise InvalidValue(f"continual: pixels of {base.name!r} cannot be permuted: it is no image classification")
        if "classification" not in base.capabilities or base.capabilities & {"graph", "events", "continual"}:
            raise InvalidValue(
                f"continual: of = {base.name!r}, whose capabilities are {', '.join(sorted(base.capabilities))}; a "
                "classification of images or texts is expected"
            )
        self.stream, self.tasks, self.seed = stream, tasks, seed
        self.name = f"continual:{base.name}"
        self.unit, self.loss_reduction = base.unit, base.loss_reduction  # type: ignore[misc]  # this task's own
        self.capabilities = base.capabilities | {"continual"}
        self.collate, self.postprocessing = base.collate, base.postprocessing
        self.metrics = (*CLASSIFICATION_METRICS, *(Metric(accuracy_of(number)) for number in range(tasks)))
        self._splits: dict[Path | None, Splits] = {}

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes of all tasks, block after block."""
        if self.stream == "classes":
            return tuple(self.of.labels)
        return tuple(f"{label}, task {number + 1}" for number in range(self.tasks) for label in self.of.labels)

    @property
    def width(self) -> int:
        """Classes of one task. Raises :class:`InvalidValue` when they cannot be shared out evenly."""
        if self.stream == "permuted":
            return len(self.of.labels)
        if len(self.of.labels) % self.tasks:
            raise InvalidValue(
                f"continual: {len(self.of.labels)} classes of {self.of.name!r} cannot be cut into {self.tasks} equal "
                "blocks"
            )
        return len(self.of.labels) // self.tasks

    @property
    def class_blocks(self) -> tuple[range, ...]:
        """The classes of each task, in the order in which they are learnt."""
        return tuple(range(number * self.width, (number + 1) * self.width) for number in range(self.tasks))

    @property
    def preprocessing(self) -> Preprocessing | None:  # type: ignore[override]
        """That of the task it is made of: a device's own pixels are in its own order already."""
        return self.of.preprocessing

    # --- data

    def splits(self, root: Path | None = None) -> Splits:
        """The splits of the task it is made of, as classes in blocks or under every permutation; made once."""
        if root not in self._splits:
            splits = self.of.splits(root)
            _ = self.width
            if self.stream == "permuted":
                splits = Splits(
                    *(self._permuted(part) for part in (splits.train, splits.val, splits.calibration, splits.test))
                )
            self._splits[root] = splits
        return self._splits[root]

    def _permuted(self, part: Any) -> LabelledImages:
        if not isinstance(part, LabelledImages):
            raise InvalidValue(
                f"continual: a split of {self.of.name!r} is a {type(part).__name__}; LabelledImages, whose pixels can "
                "change places, are expected"
            )
        places = int(np.prod(part.pixels([0]).shape[1:3]))
        permutations = np.stack(
            [
                np.random.RandomState(derive_seed("continual", self.seed, number)).permutation(places)
                for number in range(self.tasks)
            ]
        )
        labels = np.stack([part.labels + block.start for block in self.class_blocks], axis=1).reshape(-1)
        assert part.preprocessing is not None
        return LabelledImages(
            PermutedImages(part, permutations), labels, part.preprocessing, self.labels, where=part.where
        )

    def corruptions(self, split: Any) -> Mapping[str, Any]:
        """Those of the task it is made of."""
        return self.of.corruptions(split)

    # --- loss and figures

    def outputs(self, model: nn.Module | Predictor, batch: Any) -> Any:
        """As the task it is made of calls a model; the logits of all classes."""
        return self.of.outputs(model, batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy over the classes of each sample's task.

        ``batch[1]`` holds classes (N,), or probabilities (N, classes) as mixing makes them: then over the classes of
        all tasks that a sample has a share of.
        """
        import torch
        from torch.nn.functional import cross_entropy

        labels = batch[1]
        if labels.ndim == 1:
            return cross_entropy(*self.class_logits(outputs, batch), reduction=self.loss_reduction)
        shares = labels.unflatten(1, (self.tasks, self.width)).sum(dim=2) > 0
        inside = shares.repeat_interleave(self.width, dim=1)
        scores = torch.log_softmax(outputs.masked_fill(~inside, OUTSIDE), dim=1)
        losses = -(labels * scores.masked_fill(~inside, 0)).sum(dim=1)
        return losses.sum() if self.loss_reduction == "sum" else losses.mean()

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (N, classes of a task), classes (N,) from 0 in their block): what the softmax of a sample runs over.

        Probabilities (N, classes) as labels stand for their largest. Raises :class:`InvalidValue` for outputs that are
        no logits of all classes.
        """
        import torch

        if outputs.ndim != 2 or outputs.shape[1] != len(self.labels):
            raise InvalidValue(
                f"outputs of shape {tuple(outputs.shape)}; (samples, {len(self.labels)}), a logit for each class of "
                "all tasks, is expected"
            )
        labels = batch[1] if batch[1].ndim == 1 else batch[1].argmax(dim=1)
        start = labels.div(self.width, rounding_mode="floor") * self.width
        inside = start[:, None] + torch.arange(self.width, device=labels.device)
        return outputs.gather(1, inside), labels - start

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Accuracy of each task and their mean; of all samples the worst class, calibration error and likelihood.

        A task that the split has no sample of takes no part in the mean. A right sample counts 1 where all tasks have
        equally many, and otherwise as much as makes the mean over samples that over tasks.
        """
        found, targets = [], []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            found.append(np.asarray(self.outputs(predictor, batch)))
            targets.append(np.asarray(batch[1]))
        if not found:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no {self.unit}")
        logits, classes = np.concatenate(found), np.concatenate(targets)
        number = classes // self.width
        if logits.ndim == 2 and logits.shape[1] == len(self.labels) and classes.ndim == 1:
            outside = np.arange(len(self.labels)) // self.width != number[:, None]
            # what is not finite stays, to be refused
            logits = np.where(outside & np.isfinite(logits), np.float64(OUTSIDE), logits)
        whole = evaluate_classification(logits, classes, self.labels)
        assert whole.per_unit is not None
        counts = np.bincount(number, minlength=self.tasks)
        with np.errstate(invalid="ignore"):
            by_task = np.bincount(number, weights=whole.per_unit, minlength=self.tasks) / counts
        metrics = {**whole.metrics, "accuracy": float(np.nanmean(by_task))}
        return Evaluation(
            metrics={**metrics, **{accuracy_of(task): float(value) for task, value in enumerate(by_task)}},
            per_unit=whole.per_unit * (len(number) / np.count_nonzero(counts) / counts[number]),
            by_class=whole.by_class,
        )

    # --- models

    def model_fields(self) -> Mapping[str, Any]:
        """Those of the task it is made of, with the number of all classes."""
        return {**self.of.model_fields(), "num_classes": len(self.labels)}

    def default_model(self) -> nn.Module:
        """The default model of the task it is made of, with a head for all classes."""
        from sparing.core.predictor import build_model, spec_of

        model = self.of.default_model()
        if self.stream == "classes":
            return model
        spec = spec_of(model)
        if spec is None:
            raise IncompatibleStep(
                f"the default model of {self.of.name!r} was built by hand, so it cannot be built for the "
                f"{len(self.labels)} classes of the stream: name a model, or make it with build_model"
            )
        told = self.of.model_fields()
        return build_model(spec.builder, self, **{name: v for name, v in spec.config.items() if name not in told})

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """That of the task it is made of."""
        return self.of.example_input(batch)

    def raw_example(self) -> Sequence[Any] | None:
        """That of the task it is made of."""
        return self.of.raw_example()

    def fingerprint(self) -> str:
        """Changes with the task it is made of, the stream, the number of tasks and the seed."""
        return fingerprint([type(self.of), self.of.fingerprint(), self.stream, self.tasks, self.seed])


def accuracy_of(number: int) -> str:
    """The metric's name for the task with this number from 0."""
    return f"accuracy of task {number + 1}"
