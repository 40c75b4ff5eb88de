"""Pre-training, distillation and fine-tuning of vision transformers in scikit-learn's manner, on images in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from sparing.core.cost import CostReport, cost_report
from sparing.core.errors import InvalidValue
from sparing.core.registry import resolve
from sparing.core.task import Splits
from sparing.data.images import ArrayImages, LabelledImages
from sparing.distillation.finetuning import FineTune
from sparing.distillation.pretraining import Pretrain
from sparing.distillation.relations import DistilRelations, Relation, Target, default_block, load_teacher
from sparing.models.mae import Feature, MAEViT, ViTConfig, ViTTrunk, save_vit
from sparing.tasks.images.classification import ImageClassification
from sparing.tasks.images.estimator import ImageClassifier, images_of, moments_of

if TYPE_CHECKING:
    from sparing.core.step import Step

Size = str | ViTConfig
"""A preset of :class:`ViTConfig`, at the size of the images, or a config."""
Rate = float | Literal["scaled"]


@dataclass(frozen=True)
class StageReport:
    """What a stage took, and what the network it made costs."""

    stage: str
    """"pre-training", "distillation" or "fine-tuning"."""
    cost: CostReport
    """Of one image: parameters, bytes, multiply-accumulates, memory, latency on this machine."""
    seconds: float
    """Wall seconds of the training."""
    cpu_seconds: float
    """CPU seconds of the training."""
    learning_rate: float
    """The highest."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Name → [(optimizer steps, value)]: "train_loss", "lr" and, of fine-tuning, figures of validation."""
    remarks: tuple[str, ...]
    """Among them the tensors that a distillation leaves untrained."""

    def __str__(self) -> str:
        """Several lines for people."""
        losses = [value for _, value in self.curves.get("train_loss", ())]
        fell = f"; loss {losses[0]:.4g} → {losses[-1]:.4g}" if losses else ""
        first = f"{self.stage}: {self.seconds:.3g} s, {self.cpu_seconds:.3g} CPU s, lr {self.learning_rate:.3g}{fell}"
        return "\n".join([first, *self.remarks, str(self.cost)])


@dataclass(eq=False, repr=False, kw_only=True)
class _Training:
    """What all stages are trained by."""

    lr: Rate = "scaled"
    batch_size: int = 256
    accumulate: int = 1
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    precision: str = "32-true"
    accelerator: str = "auto"
    seed: int = 0
    store: Path | str | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class _Unsupervised(_Training):
    """What the stages without labels are trained by besides."""

    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5


class _Stage(_Unsupervised, BaseEstimator):
    """What the stages without labels have in common."""

    stage: ClassVar[str] = "pre-training"
    """What a report calls it."""
    model_: MAEViT
    """The network, whose head has learnt nothing, with the head numbers it was taught with."""
    curves_: dict[str, Any]
    """Name → [(optimizer steps, value)] of loss and learning rate."""

    def _run(self, task: ImageClassification, model: Any, step: Pretrain) -> Self:
        from sparing.core.pipeline import apply_steps, begin

        job = apply_steps(begin(task, model, seed=self.seed, store=self.store), [step])
        assert isinstance(job.model, MAEViT)
        self.model_, self.curves_ = job.model, dict(job.notes.curves)
        self._told = {
            "seconds": job.store.cost.wall_s,
            "cpu_seconds": job.store.cost.cpu_s,
            "learning_rate": step.rate,
            "remarks": tuple(job.notes.remarks),
        }
        return self

    def save(self, folder: Path | str) -> None:
        """Write the network, for :func:`sparing.models.mae.load_vit` or as a step's ``teacher_folder``."""
        save_vit(self._fitted(), folder)

    def report(self) -> StageReport:
        """What the stage took, and what the network costs."""
        return _report(self.stage, self._fitted(), self.curves_, **self._told)

    def _fitted(self) -> MAEViT:
        if not hasattr(self, "model_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(X) first")
        return self.model_


@dataclass(eq=False, repr=False)
class MAEPretrainer(_Stage):
    """A vision transformer pre-trained on images without labels, as a masked autoencoder (He et al. 2022).

    A fit that is killed goes on where it was when it is called again with the same data and settings.

    Args:
        encoder: a preset, at the size of the images and patches of 16, or a :class:`ViTConfig`.
        mask_ratio: share of an image's patches that is removed.
        norm_pix_loss: let the decoder fill in patches of mean 0 and variance 1.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        epochs: passes over the images.
        lr: highest learning rate; "scaled": 1.5e-4 · images of a step / 256.
        batch_size: images per batch.
        accumulate: batches per optimizer step.
        weight_decay: of matrices.
        warmup_epochs: epochs of warm-up; None: a twentieth.
        scale: smallest and largest share of the area that a crop keeps.
        flip: probability of mirroring an image; 0 for hands, digits and text.
        precision: number format, as Lightning names them: 32-true, bf16-mixed, 16-mixed.
        accelerator: cpu, gpu …
        seed: decides weights, order, crops and masks.
        store: where unfinished and finished work is kept; the user's cache folder by default.
    """

    encoder: Size = "vit_tiny"
    _: KW_ONLY
    epochs: int = 800

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on uint8 images (n, H, W) or (n, H, W, 1 or 3); ``y`` is not looked at."""
        task = _Unlabelled(images_of(X))
        fields = {name: value for name, value in self.get_params().items() if name not in ("encoder", "seed", "store")}
        return self._run(task, _model_fields(self.encoder, task), Pretrain(**fields))


@dataclass(eq=False, repr=False)
class TinyMIMDistiller(_Stage):
    """A small vision transformer taught by one block of a large one, without labels (TinyMIM, Ren et al. 2023).

    Args:
        teacher: a fitted :class:`MAEPretrainer` or :class:`TinyMIMDistiller`, a network, or a folder with one: written
            by ``save``, or a ViT or ViTMAE that ``transformers`` saved.
        student: a preset, at the size of the images and patches of 16, or a :class:`ViTConfig` with the head number it
            is to be deployed with.
        target: "relations", "features" or "cls_token".
        relations: some of "qk", "vv", "qq", "kk".
        softmax: compare relations behind a soft-max.
        feature: "block", "ffn", "attention", "attention_residual" or "qkv".
        target_block: the teacher's block (from 1); None: the last, or 3/4 of the way up an MAE of over 12.
        student_heads: heads of the student's last block; "auto": the teacher's.
        input: "raw" or "masked".
        reconstruction: let the student fill in removed patches too.
        norm_pix_loss: as patches of mean 0 and variance 1.
        student_drop_path: rate of stochastic depth of every block but the last.
        teacher_drop_path: the teacher's rate: an ablation.
        teacher_normalisation: "data", or "imagenet" for public weights.
        jitter: strength of the colour jitter of the student's view.
        mask_ratio: share of the patches that is removed from a masked input.
        decoder_dim: width of the decoder for ``reconstruction``.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        epochs: passes over the images.
        lr: highest learning rate; "scaled": 1.5e-4 · images of a step / 256.
        batch_size: images per batch.
        accumulate: batches per optimizer step.
        weight_decay: of matrices.
        warmup_epochs: epochs of warm-up; None: a twentieth.
        scale: smallest and largest share of the area that a crop keeps.
        flip: probability of mirroring an image.
        precision: number format, as Lightning names them.
        accelerator: cpu, gpu …
        seed: decides weights, order, crops and colours.
        store: where unfinished and finished work is kept; the user's cache folder by default.
    """

    stage: ClassVar[str] = "distillation"

    teacher: _Stage | ViTTrunk | Path | str
    student: Size = "vit_tiny"
    target: Target = "relations"
    relations: Sequence[Relation] = ("qk", "vv")
    softmax: bool = True
    feature: Feature = "block"
    target_block: int | None = None
    student_heads: int | Literal["auto"] = "auto"
    input: Literal["raw", "masked"] = "raw"
    reconstruction: bool = False
    _: KW_ONLY
    student_drop_path: float = 0.1
    teacher_drop_path: float = 0.0
    teacher_normalisation: Literal["data", "imagenet"] = "data"
    jitter: float = 0.4
    epochs: int = 300

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on uint8 images (n, H, W) or (n, H, W, 1 or 3); ``y`` is not looked at."""
        task = _Unlabelled(images_of(X))
        skipped = ("teacher", "student", "student_drop_path", "seed", "store")
        fields = {name: value for name, value in self.get_params(deep=False).items() if name not in skipped}
        fields |= {"relations": tuple(self.relations), "drop_path": self.student_drop_path}
        fields |= {"model": _model_fields(self.student, task)}
        return self._run(task, teacher_of(self.teacher), DistilRelations(**fields))


@dataclass(eq=False, repr=False)
class SequentialDistiller(BaseEstimator):
    """A chain of distillations: each student, not fine-tuned, teaches the next and smaller one by its last block.

    MAE-L → TinyMIM-B → TinyMIM-S → TinyMIM-T in the paper. Each teacher's last block has the head number it was itself
    taught with, and its student takes that number.

    Args:
        teacher: the first teacher, as of :class:`TinyMIMDistiller`.
        students: sizes, the largest first.
        target_block: the first teacher's block (from 1); None: as of :class:`TinyMIMDistiller`.
        settings: further arguments of each :class:`TinyMIMDistiller`.
    """

    teacher: _Stage | ViTTrunk | Path | str
    students: Sequence[Size]
    target_block: int | None = None
    settings: Mapping[str, Any] | None = None

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train all students, one after the other, on uint8 images (n, H, W) or (n, H, W, 1 or 3)."""
        if not len(self.students):
            raise InvalidValue("SequentialDistiller: students is empty; at least one is expected")
        teacher: Any = teacher_of(self.teacher)
        block = default_block(teacher.config) if self.target_block is None else self.target_block
        self.stages_: list[TinyMIMDistiller] = []
        """The fitted distiller of each student."""
        for student in self.students:
            stage = TinyMIMDistiller(teacher, student, target_block=block, **(self.settings or {})).fit(X)
            self.stages_.append(stage)
            teacher, block = stage.model_, stage.model_.config.depth
        self.model_ = self.stages_[-1].model_
        """The last student."""
        return self

    def report(self) -> list[StageReport]:
        """Those of the stages."""
        if not hasattr(self, "stages_"):
            raise NotFittedError("this SequentialDistiller is not fitted yet: call fit(X) first")
        return [stage.report() for stage in self.stages_]


@dataclass(eq=False, repr=False)
class ViTFineTuner(_Training, ImageClassifier):
    """A pre-trained vision transformer fine-tuned on labelled images; early layers learn more slowly than later ones.

    Args:
        model: a fitted :class:`MAEPretrainer` or :class:`TinyMIMDistiller`, a network, a folder with one, or a
            :class:`ViTConfig` to begin from scratch (then with ``layer_decay=1``).
        layer_decay: factor on the learning rate from each layer to the one below.
        heads: attention heads of every deployed block; None: as the model's ``heads`` say.
        epochs: passes over the training images.
        lr: highest learning rate; "scaled": 5e-4 · images of a step / 256.
        batch_size: images per batch.
        accumulate: batches per optimizer step.
        weight_decay: of matrices.
        warmup_epochs: epochs of warm-up; None: a twentieth.
        drop_path: largest rate of stochastic depth, reached in the last block.
        label_smoothing: share of the target that is spread over all classes.
        mixup: α of mix-up; 0 switches it off.
        cutmix: α of CutMix; 0 switches it off.
        scale: smallest and largest share of the area that a crop keeps; None: no crops.
        flip: probability of mirroring an image.
        randaugment: operations of RandAugment for each image.
        erase: probability of filling a random rectangle with random pixels.
        val_share: share of each class held out to watch the training; None: none, for few labels.
        precision: number format, as Lightning names them.
        accelerator: cpu, gpu …
        seed: decides the head's weights, order and augmentation.
        store: where unfinished and finished work is kept; the user's cache folder by default.
    """

    model: _Stage | SequentialDistiller | ViTTrunk | ViTConfig | Path | str
    layer_decay: float = 0.65
    heads: int | None = None
    epochs: int = 100
    _: KW_ONLY
    drop_path: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    scale: tuple[float, float] | None = None
    flip: float = 0.0
    randaugment: int = 0
    erase: float = 0.0
    val_share: float | None = None

    def _model(self, task: ImageClassification) -> MAEViT:
        from sparing.core.predictor import build_model
        from sparing.core.randomness import isolated_rng

        given = self.model if isinstance(self.model, ViTConfig) else teacher_of(self.model)
        config = given if isinstance(given, ViTConfig) else given.config
        with isolated_rng("model", self.seed):
            model = build_model("mae_vit", task, **asdict(config) | {"image_size": task.image_size})
        assert isinstance(model, MAEViT)
        if not isinstance(given, ViTConfig):
            model.take_over(given)
        return model

    def _steps(self) -> list[Step]:
        steps: list[Step] = []
        if self.scale or self.flip or self.randaugment or self.erase:
            crops: dict[str, Any] = {"crop": "resized", "scale": self.scale} if self.scale else {"crop": "off"}
            more = {"flip": self.flip, "jitter": 0.0, "randaugment": self.randaugment, "erase": self.erase}
            steps.append(resolve("steps", "augment")(**crops, **more))
        if self.label_smoothing:
            steps.append(resolve("steps", "smooth_labels")(epsilon=self.label_smoothing))
        return [*steps, self._last_step()]

    def _last_step(self) -> FineTune:
        named = "layer_decay heads epochs lr batch_size accumulate weight_decay warmup_epochs drop_path mixup cutmix"
        named += " precision accelerator"
        return FineTune(**{name: getattr(self, name) for name in named.split()})

    def report(self) -> StageReport:
        """What the fine-tuning took, and what the network costs."""
        self._fitted()
        assert isinstance(self._trained, MAEViT)
        return _report(
            "fine-tuning",
            self._trained,
            self.curves_,
            seconds=self.seconds_,
            cpu_seconds=self.cpu_seconds_,
            learning_rate=self._last_step().rate,
            remarks=(),
        )


def teacher_of(given: Any) -> ViTTrunk:
    """The network of a fitted estimator, in a folder, or given as such."""
    network = getattr(given, "model_", given)
    if isinstance(network, str | Path):
        network = load_teacher(Path(network))
    if not isinstance(network, ViTTrunk):
        raise InvalidValue(f"a {type(network).__name__}; a fitted estimator, a network or its folder is expected")
    return network


def _report(stage: str, model: MAEViT, curves: Mapping[str, Any], **told: Any) -> StageReport:
    config = model.config
    cost = cost_report(model, (config.in_channels, config.image_size, config.image_size))
    return StageReport(stage, cost, curves=curves, **told)


def _model_fields(size: Size, task: ImageClassification) -> dict[str, Any]:
    """The fields of a "mae_vit" of a size, at the size of the task's images."""
    if isinstance(size, str):
        size = ViTConfig.named(size, image_size=task.image_size, in_channels=task.in_channels)
    if (size.image_size, size.in_channels) != (task.image_size, task.in_channels):
        raise InvalidValue(
            f"image_size = {size.image_size}, in_channels = {size.in_channels} of the config; the images have "
            f"{task.image_size} pixels and {task.in_channels} channels"
        )
    return {"name": "mae_vit", **asdict(size)}


class _Unlabelled(ImageClassification):
    """Images in memory; every split is all of them."""

    name = "unlabelled_images"
    labels = ("",)

    def __init__(self, images: np.ndarray) -> None:
        super().__init__()
        self._images, self._moments = images, moments_of(images)
        self.in_channels, self.image_size = images.shape[3], images.shape[1]

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of all pixels."""
        return self._moments

    def read(self, root: Path | None) -> Splits:
        """The images, four times; ``root`` is not looked at."""
        nothing = np.zeros(len(self._images), np.int64)
        part = LabelledImages(ArrayImages(self._images, "images"), nothing, self.preprocessing, self.labels)
        return Splits(part, part, part, part)
