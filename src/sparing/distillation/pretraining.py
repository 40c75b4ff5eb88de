"""Pre-training without labels: masked autoencoding (He et al. 2022, arXiv 2111.06377), and what its stages share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.job import TrainingPlan
from sparing.core.predictor import Preprocessing
from sparing.core.randomness import isolated_rng
from sparing.core.step import step
from sparing.core.store import JSON, TENSORS, All
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.core.training import FitResult, Train, fit
from sparing.core.training.step import load_weights
from sparing.data.augmentation import Augmentation, AugmentedImages, HorizontalFlip, Pair, RandomResizedCrop
from sparing.data.folders import read_images
from sparing.data.images import LabelledImages
from sparing.models.mae import MAE, TRUNK, MAEViT, ViTTrunk, mae_loss, patchify

if TYPE_CHECKING:
    from sparing.core.job import Job
    from sparing.core.predictor import Predictor

WARMUP_SHARE = 1 / 20
"""Share of a training that is warm-up when nothing is said: 40 of 800 epochs, 15 of 300, 5 of 100."""


def half_cosine(epoch: float, lr: float, warmup: float, epochs: float, floor: float = 0.0) -> float:
    """The learning rate at a fractional epoch: linear warm-up from 0, then half a cosine (MAE, appendix A).

    With e = ``epoch`` + share of it that is over, w = ``warmup`` and E = ``epochs``::

        e < w:   lr · e / w
        e ≥ w:   floor + ½ (lr − floor) (1 + cos(π (e − w) / (E − w)))

    Args:
        epoch: e, at least 0; the floor is kept from E on.
        lr: the highest rate.
        warmup: w, in epochs; at least 0 and below E.
        epochs: E.
        floor: the rate at the end.
    """
    if not 0 <= warmup < epochs:
        raise InvalidValue(f"warmup = {warmup} epochs of {epochs}; at least 0 and fewer than all are expected")
    if not 0 <= floor <= lr:
        raise InvalidValue(f"floor = {floor}; 0 … lr = {lr} is expected")
    if epoch < 0:
        raise InvalidValue(f"epoch = {epoch}; 0 or more is expected")
    if epoch < warmup:
        return lr * epoch / warmup
    return floor + (lr - floor) * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / (epochs - warmup)))) / 2


def half_cosine_scheduler(
    lr: float, epochs: float, warmup: float | None = None, floor: float = 0.0
) -> Callable[[Any, int], Any]:
    """:func:`half_cosine` as a training plan's schedule: (optimizer, total steps) → ``LambdaLR``.

    Each group of the optimizer keeps the share of ``lr`` that its own rate is. ``warmup`` in epochs; None: a twentieth.
    """
    begun = epochs * WARMUP_SHARE if warmup is None else warmup
    half_cosine(0, lr, begun, epochs, floor)  # refuses what it would refuse later

    def scheduler(optimizer: Any, total: int) -> Any:
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, lambda done: half_cosine(done * epochs / total, lr, begun, epochs, floor) / lr)

    return scheduler


def scaled_lr(base: float, batch: int) -> float:
    """The rule lr = base · batch / 256 (Goyal et al. 2017), with the batch of one optimizer step in all."""
    return base * batch / 256


def check_warmup(step: str, warmup_epochs: float | None, epochs: int) -> None:
    """Raise :class:`InvalidValue` for a warm-up that leaves nothing of the training."""
    if warmup_epochs is not None and warmup_epochs >= epochs:
        raise InvalidValue(f"{step}: warmup_epochs = {warmup_epochs:g}; fewer than epochs = {epochs} are expected")


class OwnLoss(Task):
    """A task as a model sees it that computes its loss itself, from a batch: what is trained without labels.

    Args:
        task: the task whose data they are.
        compute: (model, batch) → loss, a scalar.
    """

    metrics = (Metric("loss", "lower"),)

    def __init__(self, task: Task, compute: Callable[[Any, Any], Tensor]) -> None:
        self.task, self.compute = task, compute
        self.name = task.name

    def outputs(self, model: Any, batch: Any) -> Tensor:
        """The loss."""
        return self.compute(model, batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The same."""
        return outputs

    def splits(self, root: Any) -> Splits:
        """The task's."""
        return self.task.splits(root)

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """The task's, of a model that answers it."""
        return self.task.evaluate(predictor, split)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """The task's."""
        return self.task.example_input(batch)

    def default_model(self) -> nn.Module:
        """The task's."""
        return self.task.default_model()


Trunk = TypeVar("Trunk", bound=ViTTrunk)


def trunk_of(step: str, job: Job, kind: type[Trunk]) -> Trunk:
    """A copy of the job's model, which must be a vision transformer with a class token, such as "mae_vit"."""
    model = job.fresh_model()
    if not isinstance(model, kind):
        raise IncompatibleStep(f'{step}: the model is a {type(model).__name__}; a "mae_vit" is needed')
    return model


@step("pretrain")
class Pretrain(Train):
    """Pre-train a "mae_vit" on images without looking at their labels, as a masked autoencoder.

    A light decoder learns to fill in the patches that were removed from an image, and is thrown away. The head of the
    model has learnt nothing: ``finetune`` comes next, or ``distil_relations``, which teaches a smaller one first.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"module", "images", TRUNK})
    gives: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset({"trained"})
    source: ClassVar[str] = "He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, CVPR, arXiv:2111.06377"
    base_lr: ClassVar[float] = 1.5e-4
    """Of "scaled", for a batch of 256."""

    epochs: int = Field(default=800, ge=1)
    """Passes over the images; not looked at when ``max_steps`` is set."""
    batch_size: int = Field(default=256, ge=1)
    """Images per batch, of all processes together; ``accumulate`` makes several batches one step."""
    lr: Annotated[float, Field(gt=0)] | Literal["scaled"] = "scaled"  # type: ignore[assignment]  # one choice more
    """Highest learning rate. "scaled": 1.5e-4 · images of a step / 256, which is little for short trainings."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of matrices; with ``decay`` "all" of everything."""
    decay: Literal["all", "matrices"] = "matrices"
    """"matrices": biases and parameters of one dimension (gains of norms) have no weight decay."""
    optimizer_args: dict[str, Any] = Field(default_factory=lambda: {"betas": [0.9, 0.95]})
    """Further arguments of the optimizer."""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """Epochs of warm-up from 0, before half a cosine down to 0; None: a twentieth of them."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of an image's patches that is removed."""
    norm_pix_loss: bool = True
    """Let the decoder fill in patches of mean 0 and variance 1 instead of pixels as they are."""
    decoder_dim: int = Field(default=512, ge=4)
    """Width of the decoder; a multiple of 4 and of its heads."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder."""
    scale: Pair = (0.2, 1.0)
    """Smallest and largest share of an image's area that a crop keeps."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring left and right; 0 for hands, digits and text."""
    unlabelled: Path | None = None
    """A folder or zip file of images, at any depth, to train on. None: the job's training images, without labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, nothing in (
            ("scheduler", ""),
            ("warmup_steps", 0),
            ("early_stopping", None),
            ("restore_best", False),
        ):
            if getattr(self, name) != nothing:
                instead = "set warmup_epochs" if name in ("scheduler", "warmup_steps") else "labels are not looked at"
                raise InvalidValue(f"{self.id}: {name} = {getattr(self, name)!r} has no place here: {instead}")
        check_warmup(self.id, self.warmup_epochs, self.epochs)
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise InvalidValue(
                f"{self.id}: decoder_dim = {self.decoder_dim}, decoder_heads = {self.decoder_heads}; a multiple "
                "of 4 and of the heads is expected"
            )
        RandomResizedCrop(1, self.scale)
        if self.unlabelled is not None and not self.unlabelled.exists():
            raise InvalidValue(f"{self.id}: unlabelled = {str(self.unlabelled)!r}: there is no such folder or zip file")

    @property
    def slots(self) -> frozenset[str]:  # type: ignore[override]  # filled for this very training
        """The schedule, and the optimizer where another is asked for."""
        return super().slots | {"scheduler"}

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.lr == "scaled":
            return scaled_lr(self.base_lr, self.batch_size * self.accumulate)
        return self.lr

    def images(self, job: Job) -> LabelledImages:
        """The images to train on, as they are."""
        if self.unlabelled is not None:
            files = read_images(self.unlabelled)
            if not isinstance(job.task.preprocessing, Preprocessing):
                raise IncompatibleStep(
                    f"{self.id}: the task {job.task.name!r} does not say how to turn files into inputs"
                )
            nothing = np.zeros(len(files), np.int64)
            return LabelledImages(files, nothing, job.task.preprocessing, ("",), where=str(self.unlabelled))
        if not isinstance(job.train, LabelledImages):
            raise IncompatibleStep(
                f"{self.id}: the training data are a {type(job.train).__name__}; uint8 images that the task's "
                "preprocessing turns into floats (sparing.data.images.LabelledImages) are needed"
            )
        return job.train

    def crops(self, side: int) -> tuple[Augmentation, ...]:
        """What every image passes through."""
        crop = RandomResizedCrop(side, self.scale, interpolation="bicubic")
        return (crop, HorizontalFlip(self.flip)) if self.flip else (crop,)

    def apply(self, job: Job) -> Job:
        """The job with the pre-trained model, without a predictor, and with an emptied training plan."""
        model, images = trunk_of(self.id, job, MAEViT), self.images(job)
        with isolated_rng(job.seed, self.name, "prepare"):
            decoder = (self.decoder_dim, self.decoder_depth, self.decoder_heads)
            learner = MAE(model.config, *decoder, mask_ratio=self.mask_ratio)
        learner.take_over(model)

        def loss(learner: MAE, batch: Any) -> Tensor:
            pred, mask = learner.reconstruct(batch[0])
            return mae_loss(patchify(batch[0], learner.config.patch_size), pred, mask, self.norm_pix_loss)

        data = AugmentedImages(images, self.crops(model.config.image_size))
        self.learn(job, learner, data, OwnLoss(job.task, loss))
        model.take_over(learner)
        return job.replace(model=model, predictor=None, training=TrainingPlan())

    def learn(self, job: Job, learner: nn.Module, data: Any, task: OwnLoss) -> None:
        """Train ``learner`` in place, once, and tell the ledger."""
        plan = job.training
        if plan.loss_terms or plan.batch_transforms:
            raise IncompatibleStep(
                f"{self.id!r}: an earlier step changes the loss or the batches of the next training, which has no "
                "labels: put that step behind this one"
            )
        settings = Train(**{item.name: getattr(self, item.name) for item in fields(Train)} | {"lr": self.rate})
        schedule = half_cosine_scheduler(self.rate, self.epochs, self.warmup_epochs)

        def compute() -> dict[str, Any]:
            result = fit(
                learner,
                task,
                data,
                None,
                settings,
                plan.adding(scheduler=schedule),
                job.seed,
                job.store.progress("model"),
            )
            return {"weights": dict(result.model.state_dict()), "record": result.record()}

        stored = job.store.once("model", compute, All({"weights": TENSORS, "record": JSON}))
        load_weights(learner, stored["weights"])
        result = FitResult.of(learner, stored["record"])
        self.report(job, result)
        job.record("images", len(data), "", better="")
        job.record("learning rate", self.rate, "", "derived", better="")
        losses = [value for _, value in result.curves.get("train_loss", [])]
        if losses:
            job.record("loss, first", losses[0], "", better="lower")
            job.record("loss, last", losses[-1], "", better="lower")
