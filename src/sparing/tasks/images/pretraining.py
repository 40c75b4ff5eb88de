"""Pre-training, distillation and fine-tuning of vision transformers in scikit-learn's manner, on images in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    from sparing.core.job import Job
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


class _Stage(BaseEstimator):
    """What the stages without labels have in common."""

    seed: int
    """Decides weights, order and augmentation."""
    store: Path | str | None
    """Where unfinished and finished work is kept; the user's cache folder by default."""
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
        self._told = _told(job, step.rate)
        return self

    def save(self, folder: Path | str) -> None:
        """Write the network, for :func:`sparing.models.mae.load_vit` or as a step's ``teacher_folder``."""
        save_vit(self._fitted(), folder)

    def report(self) -> StageReport:
        """What the stage took, and what the network costs."""
        return _report(self.stage, self._fitted(), self._told, self.curves_)

    def _fitted(self) -> MAEViT:
        if not hasattr(self, "model_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(X) first")
        return self.model_


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

    def __init__(
        self,
        encoder: Size = "vit_tiny",
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        epochs: int = 800,
        lr: Rate = "scaled",
        batch_size: int = 256,
        accumulate: int = 1,
        weight_decay: float = 0.05,
        warmup_epochs: float | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        precision: str = "32-true",
        accelerator: str = "auto",
        seed: int = 0,
        store: Path | str | None = None,
    ) -> None:
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.decoder_dim = decoder_dim
        self.decoder_depth = decoder_depth
        self.decoder_heads = decoder_heads
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.scale = scale
        self.flip = flip
        self.precision = precision
        self.accelerator = accelerator
        self.seed = seed
        self.store = store

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on uint8 images (n, H, W) or (n, H, W, 1 or 3); ``y`` is not looked at."""
        task = _Unlabelled(images_of(X))
        fields = {name: value for name, value in self.get_params().items() if name not in ("encoder", "seed", "store")}
        return self._run(task, _model_fields(self.encoder, task), Pretrain(**fields))


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

    def __init__(
        self,
        teacher: _Stage | ViTTrunk | Path | str,
        student: Size = "vit_tiny",
        target: Target = "relations",
        relations: Sequence[Relation] = ("qk", "vv"),
        softmax: bool = True,
        feature: Feature = "block",
        target_block: int | None = None,
        student_heads: int | Literal["auto"] = "auto",
        input: Literal["raw", "masked"] = "raw",
        reconstruction: bool = False,
        norm_pix_loss: bool = True,
        student_drop_path: float = 0.1,
        teacher_drop_path: float = 0.0,
        teacher_normalisation: Literal["data", "imagenet"] = "data",
        jitter: float = 0.4,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        epochs: int = 300,
        lr: Rate = "scaled",
        batch_size: int = 256,
        accumulate: int = 1,
        weight_decay: float = 0.05,
        warmup_epochs: float | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        precision: str = "32-true",
        accelerator: str = "auto",
        seed: int = 0,
        store: Path | str | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.target = target
        self.relations = relations
        self.softmax = softmax
        self.feature = feature
        self.target_block = target_block
        self.student_heads = student_heads
        self.input = input
        self.reconstruction = reconstruction
        self.norm_pix_loss = norm_pix_loss
        self.student_drop_path = student_drop_path
        self.teacher_drop_path = teacher_drop_path
        self.teacher_normalisation = teacher_normalisation
        self.jitter = jitter
        self.mask_ratio = mask_ratio
        self.decoder_dim = decoder_dim
        self.decoder_depth = decoder_depth
        self.decoder_heads = decoder_heads
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.scale = scale
        self.flip = flip
        self.precision = precision
        self.accelerator = accelerator
        self.seed = seed
        self.store = store

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on uint8 images (n, H, W) or (n, H, W, 1 or 3); ``y`` is not looked at."""
        task = _Unlabelled(images_of(X))
        skipped = ("teacher", "student", "student_drop_path", "seed", "store")
        fields = {name: value for name, value in self.get_params(deep=False).items() if name not in skipped}
        fields |= {"relations": tuple(self.relations), "drop_path": self.student_drop_path}
        fields |= {"model": _model_fields(self.student, task)}
        return self._run(task, teacher_of(self.teacher), DistilRelations(**fields))


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

    stages_: list[TinyMIMDistiller]
    """The fitted distiller of each student."""
    model_: MAEViT
    """The last student."""

    def __init__(
        self,
        teacher: _Stage | ViTTrunk | Path | str,
        students: Sequence[Size],
        target_block: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.teacher = teacher
        self.students = students
        self.target_block = target_block
        self.settings = settings

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train all students, one after the other, on uint8 images (n, H, W) or (n, H, W, 1 or 3)."""
        if not len(self.students):
            raise InvalidValue("SequentialDistiller: students is empty; at least one is expected")
        teacher: Any = teacher_of(self.teacher)
        block = default_block(teacher.config) if self.target_block is None else self.target_block
        self.stages_ = []
        for student in self.students:
            stage = TinyMIMDistiller(teacher, student, target_block=block, **(self.settings or {})).fit(X)
            self.stages_.append(stage)
            teacher, block = stage.model_, stage.model_.config.depth
        self.model_ = self.stages_[-1].model_
        return self

    def report(self) -> list[StageReport]:
        """Those of the stages."""
        if not hasattr(self, "stages_"):
            raise NotFittedError("this SequentialDistiller is not fitted yet: call fit(X) first")
        return [stage.report() for stage in self.stages_]


class ViTFineTuner(ImageClassifier):
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

    def __init__(
        self,
        model: _Stage | SequentialDistiller | ViTTrunk | ViTConfig | Path | str,
        layer_decay: float = 0.65,
        heads: int | None = None,
        epochs: int = 100,
        lr: Rate = "scaled",
        batch_size: int = 256,
        accumulate: int = 1,
        weight_decay: float = 0.05,
        warmup_epochs: float | None = None,
        drop_path: float = 0.0,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        scale: tuple[float, float] | None = None,
        flip: float = 0.0,
        randaugment: int = 0,
        erase: float = 0.0,
        val_share: float | None = None,
        precision: str = "32-true",
        accelerator: str = "auto",
        seed: int = 0,
        store: Path | str | None = None,
    ) -> None:
        self.model = model
        self.layer_decay = layer_decay
        self.heads = heads
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.drop_path = drop_path
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.cutmix = cutmix
        self.scale = scale
        self.flip = flip
        self.randaugment = randaugment
        self.erase = erase
        self.val_share = val_share
        self.precision = precision
        self.accelerator = accelerator
        self.seed = seed
        self.store = store

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
        told = (self.seconds_, self.cpu_seconds_, self._last_step().rate, ())
        return _report("fine-tuning", self._trained, told, self.curves_)


def teacher_of(given: Any) -> ViTTrunk:
    """The network of a fitted estimator, in a folder, or given as such."""
    network = getattr(given, "model_", given)
    if isinstance(network, str | Path):
        network = load_teacher(Path(network))
    if not isinstance(network, ViTTrunk):
        raise InvalidValue(f"a {type(network).__name__}; a fitted estimator, a network or its folder is expected")
    return network


def _told(job: Job, rate: float) -> tuple[float, float, float, tuple[str, ...]]:
    return job.store.cost.wall_s, job.store.cost.cpu_s, rate, tuple(job.notes.remarks)


def _report(
    stage: str, model: MAEViT, told: tuple[float, float, float, tuple[str, ...]], curves: Mapping[str, Any]
) -> StageReport:
    config = model.config
    cost = cost_report(model, (config.in_channels, config.image_size, config.image_size))
    return StageReport(stage, cost, told[0], told[1], told[2], curves, told[3])


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
