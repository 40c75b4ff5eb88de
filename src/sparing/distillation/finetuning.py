"""Fine-tuning of a pre-trained vision transformer: early layers learn more slowly than late ones.

Algorithm and settings as in MAE (He et al. 2022, appendix A; layer-wise decay after Clark et al. 2020, ELECTRA).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.predictor import build_model, spec_of
from sparing.core.randomness import derive_seed
from sparing.core.step import step
from sparing.core.training import Train, make_optimizer
from sparing.data.images import LabelledImages
from sparing.distillation.pretraining import check_warmup, half_cosine_scheduler, scaled_lr, trunk_of
from sparing.models.mae import TRUNK, MAEViT

if TYPE_CHECKING:
    from sparing.core.job import Job, TrainingPlan

FREE = ("cls_token", "pos_embed")
"""Parameters without weight decay though they are no vectors."""


def layer_decay_groups(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 0.65, lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rates fall from the head down to the patches.

    With L blocks and n = L + 1 a parameter of depth i has the scale layer_decay^(n − i): i = 0 for class token,
    positions and patches, b + 1 for block b, n for all others (norm and head).

    Args:
        model: with its blocks in ``model.blocks``.
        weight_decay: of matrices; parameters of one dimension, class token and positions have none.
        layer_decay: above 0, at most 1; 1 gives all the same rate.
        lr: the highest rate, to put each group's own into it; None: the groups say their scale only.

    Returns:
        Groups with ``params``, ``names``, ``lr_scale``, ``weight_decay`` and, with ``lr``, ``lr``. Frozen parameters
        are left out.
    """
    if not 0 < layer_decay <= 1:
        raise InvalidValue(f"layer_decay = {layer_decay!r}; above 0 and at most 1 is expected")
    if not weight_decay >= 0:
        raise InvalidValue(f"weight_decay = {weight_decay!r}; 0 or more is expected")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise InvalidValue(f"{type(model).__name__} has no blocks; a model with its layers in .blocks is expected")
    last = len(blocks) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        depth = 0 if parts[0] in (*FREE, "patch_embed") else int(parts[1]) + 1 if parts[0] == "blocks" else last
        free = parameter.ndim <= 1 or name in FREE
        scale = layer_decay ** (last - depth)
        group = groups.setdefault(
            (depth, free),
            {"params": [], "names": [], "lr_scale": scale, "weight_decay": 0.0 if free else weight_decay}
            | ({} if lr is None else {"lr": lr * scale}),
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


class Mix:
    """Mix-up (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch with itself in another order.

    A share λ ~ Beta(α, α) of an image stays; the rest comes from its partner, laid over it (mix-up) or cut out as one
    rectangle (CutMix: λ is then what of the area is left). Labels are mixed alike. With both, one is drawn each time.

    Args:
        mixup: α of mix-up; 0 switches it off.
        cutmix: α of CutMix; 0 switches it off.
        classes: number of classes.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        if not (mixup >= 0 and cutmix >= 0 and mixup + cutmix > 0):
            raise InvalidValue(f"mixup = {mixup}, cutmix = {cutmix}; 0 or more, and one of them above it, is expected")
        self.mixup, self.cutmix, self.classes = mixup, cutmix, classes

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(images (N, C, H, W), labels (N,) or probabilities (N, classes)) → (mixed images, probabilities).

        Drawn by torch's global generator.
        """
        images, labels = batch
        cut = bool(self.cutmix) and (not self.mixup or float(torch.rand(())) < 0.5)
        alpha = torch.tensor(self.cutmix if cut else self.mixup)
        kept = float(torch.distributions.Beta(alpha, alpha).sample())
        partner = torch.randperm(len(images)).to(images.device)
        if cut:
            height, width = images.shape[2:]
            sides = [round(side * (1 - kept) ** 0.5) for side in (height, width)]
            middle = [int(torch.randint(0, side, ())) for side in (height, width)]
            spans = [
                slice(max(0, at - side // 2), min(whole, at - side // 2 + side))
                for at, side, whole in zip(middle, sides, (height, width), strict=True)
            ]
            images = images.clone()
            images[:, :, spans[0], spans[1]] = batch[0][partner][:, :, spans[0], spans[1]]
            rows, columns = (len(range(*span.indices(side))) for span, side in zip(spans, (height, width), strict=True))
            kept = 1 - rows * columns / (height * width)
        else:
            images = kept * images + (1 - kept) * images[partner]
        targets = labels if labels.ndim == 2 else nn.functional.one_hot(labels, self.classes).to(images.dtype)
        return images, kept * targets + (1 - kept) * targets[partner]


def first_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of the first ``count`` of each class in a shuffle by ``seed``, sorted.

    Args:
        labels: class of each record, integers (N,).
        count: of each class; raises :class:`InvalidValue` where a class has fewer.
        seed: decides.
    """
    order = np.random.RandomState(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) < count:
            raise InvalidValue(f"labels_per_class = {count}; class {label} has {len(members)} records")
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


@step("finetune")
class FineTune(Train):
    """Fine-tune a pre-trained "mae_vit" on labels, perhaps a few; early layers learn more slowly than later ones.

    The head begins anew, and every block gets the head number the model is deployed with. Validation, and with it
    ``restore_best``, sees the whole of the validation data.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"module", "images", "classification", TRUNK})
    slots: ClassVar[frozenset[str]] = frozenset({"optimizer", "scheduler"})
    source: ClassVar[str] = "He et al. 2022, MAE, appendix A; Clark et al. 2020, ELECTRA (layer-wise decay)"
    base_lr: ClassVar[float] = 5e-4
    """Of "scaled", for a batch of 256."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training data; not looked at when ``max_steps`` is set."""
    batch_size: int = Field(default=256, ge=1)
    """Samples per batch, of all processes together; ``accumulate`` makes several batches one step."""
    lr: Annotated[float, Field(gt=0)] | Literal["scaled"] = "scaled"  # type: ignore[assignment]  # one choice more
    """Highest learning rate of the last layers. "scaled": 5e-4 · images of a step / 256."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of matrices; biases, gains of norms, class token and positions have none."""
    decay: Literal["all", "matrices"] = "matrices"
    """Always "matrices" here."""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """Epochs of warm-up from 0, before half a cosine down to ``floor``; None: a twentieth of them."""
    floor: float = Field(default=1e-6, ge=0)
    """Learning rate of the last layers at the end."""
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    """Factor on the learning rate from each layer to the one below; 1: all learn alike, as from scratch."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Largest rate of stochastic depth; blocks get evenly spaced rates from 0 to it."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads of every block of the deployed model; None: as the model's ``heads`` say."""
    labels_per_class: int | None = Field(default=None, ge=1)
    """Train on so many labelled images of each class, drawn at random; also the steps behind see no more. None: all."""
    labels_seed: int | None = Field(default=None, ge=0)
    """Decides which; None: the run's seed."""
    mixup: float = Field(default=0.0, ge=0)
    """α of mix-up; 0 switches it off. 0.8 was published."""
    cutmix: float = Field(default=0.0, ge=0)
    """α of CutMix; 0 switches it off. 1 was published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, nothing in (("scheduler", ""), ("warmup_steps", 0)):
            if getattr(self, name) != nothing:
                raise InvalidValue(f"{self.id}: {name} = {getattr(self, name)!r} has no place here: set warmup_epochs")
        if self.decay != "matrices":
            raise InvalidValue(f'{self.id}: decay = {self.decay!r}; "matrices" is expected')
        check_warmup(self.id, self.warmup_epochs, self.epochs)
        half_cosine_scheduler(self.rate, self.epochs, self.warmup_epochs, self.floor)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.lr == "scaled":
            return scaled_lr(self.base_lr, self.batch_size * self.accumulate)
        return self.lr

    def prepare(self, job: Job) -> tuple[nn.Module, TrainingPlan]:
        """The model to deploy, with the pre-trained trunk, and the plan with rates for each layer."""
        trained = trunk_of(self.id, job, MAEViT)
        spec = spec_of(trained)
        if spec is None:
            raise IncompatibleStep(f"{self.id}: the model was built by hand; make it with build_model")
        own: dict[str, Any] = {"last_heads": None, "drop_path": self.drop_path}
        model = build_model(spec, job.task, **own | ({} if self.heads is None else {"heads": self.heads}))
        assert isinstance(model, MAEViT)
        model.take_over(trained)

        def optimizer(model: nn.Module) -> Any:
            groups: Any = layer_decay_groups(model, self.weight_decay, self.layer_decay, self.rate)
            return make_optimizer(self.optimizer, groups, self.rate, self.weight_decay, self.optimizer_args)

        scheduler = half_cosine_scheduler(self.rate, self.epochs, self.warmup_epochs, self.floor)
        plan = job.training.adding(optimizer=optimizer, scheduler=scheduler)
        if self.mixup or self.cutmix:
            plan = plan.adding(batch_transforms=lambda: Mix(self.mixup, self.cutmix, len(job.task.labels)))
        return model, plan

    def apply(self, job: Job) -> Job:
        """The job with the fine-tuned model and its predictor, and with the labelled images it was given."""
        if self.labels_per_class is not None:
            if not isinstance(job.train, LabelledImages):
                raise IncompatibleStep(
                    f"{self.id}: labels_per_class needs images of sparing.data.images.LabelledImages; the training "
                    f"data are a {type(job.train).__name__}"
                )
            seed = derive_seed(job.seed if self.labels_seed is None else self.labels_seed, "labels")
            rows = first_per_class(job.train.labels, self.labels_per_class, seed)
            job = job.replace(train=job.train.subset(rows))
        after = super().apply(job)
        job.record("labelled images", len(job.train), "", better="lower")
        job.record("learning rate", self.rate, "", "derived", better="")
        return after
