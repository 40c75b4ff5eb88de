"""TinyMIM: a small vision transformer learns how the tokens of a large one relate, without labels.

Ren et al., "TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models", CVPR 2023, arXiv 2301.01296. A teacher
that was pre-trained by masked image modelling sees an image; one of its blocks says how much each token has to do with
each other one (query · key, value · value). The last block of the student is to say the same. In a loop of your own::

    config = student_config(ViTConfig.named("vit_small"), teacher.config, block=18)      # takes the teacher's heads
    student = RelationStudent(config, teacher.config, target_block=18)
    loss = student(freeze(teacher), images, jittered_images)
    loss.backward()
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import layer_norm, log_softmax

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.job import TrainingPlan
from sparing.core.predictor import build_model, load, named_model, outline
from sparing.core.randomness import isolated_rng
from sparing.core.step import step
from sparing.data.augmentation import ColourJitter, PairedImages
from sparing.data.preprocessing import IMAGENET
from sparing.distillation.pretraining import OwnLoss, Pretrain, trunk_of
from sparing.models.emo import DropPath
from sparing.models.mae import (
    FEATURES,
    MAE,
    TRUNK,
    Feature,
    MAEViT,
    ViTConfig,
    ViTEncoder,
    ViTTrunk,
    block_feature,
    check_block,
    check_mask_ratio,
    load_vit,
    mae_loss,
    patchify,
    random_masking,
)
from sparing.models.vit import EPS, TransformerBlock

if TYPE_CHECKING:
    from sparing.core.job import Job
    from sparing.core.task import Task

Target = Literal["relations", "features", "cls_token"]
Relation = Literal["qk", "vv", "qq", "kk"]
RELATIONS: tuple[Relation, ...] = ("qk", "vv", "qq", "kk")
BETA = 2.0
"""Of smooth-L1: where it goes over from squares to absolute values."""

# ---------------------------------------------------------------------------------------------------------- losses


class _Relation(torch.autograd.Function):
    """The sum of one loss over heads, head by head: of the relations of a block one head's are in memory at a time.

    The gradient of both losses by the scores is a difference that the forward pass knows; it is turned at once into
    that of the student's two factors, which is all that is kept.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, a_t: Tensor, b_t: Tensor, a_s: Tensor, b_s: Tensor, softmax: bool) -> Tensor:
        """Four (B, M, N, d) → the mean over batch, heads and queries (with keys: for smooth-L1), a scalar."""
        batch, heads, tokens, _ = a_s.shape
        count = batch * heads * tokens * (1 if softmax else tokens)
        scale_t, scale_s = a_t.shape[3] ** -0.5, a_s.shape[3] ** -0.5
        total = a_s.new_zeros(())
        slope_a, slope_b = torch.empty_like(a_s), torch.empty_like(b_s)
        for head in range(heads):
            taught = a_t[:, head] @ b_t[:, head].mT * scale_t
            known = a_s[:, head] @ b_s[:, head].mT * scale_s
            if softmax:
                taught, known = log_softmax(taught, -1), log_softmax(known, -1)
                p = taught.exp()
                total += (p * (taught - known)).sum()
                slope = known.exp_() - p
            else:
                total += nn.functional.smooth_l1_loss(known, taught, reduction="sum", beta=BETA)
                slope = ((known - taught) / BETA).clamp_(-1, 1)
            slope *= scale_s / count
            slope_a[:, head] = slope @ b_s[:, head]
            slope_b[:, head] = slope.mT @ a_s[:, head]
        ctx.save_for_backward(slope_a, slope_b)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """The slope of the loss → those of the student's factors; the teacher's have none."""
        slope_a, slope_b = ctx.saved_tensors
        return None, None, slopes[0] * slope_a, slopes[0] * slope_b, None


def _relation(a_t: Tensor, b_t: Tensor, a_s: Tensor, b_s: Tensor, softmax: bool) -> Tensor:
    tokens_agree = all(one.shape[:3] == other.shape[:3] for one, other in pairwise((a_t, b_t, a_s, b_s)))
    if not tokens_agree or a_t.shape != b_t.shape or a_s.shape != b_s.shape:
        raise InvalidValue(
            f"relations of {tuple(a_t.shape)} · {tuple(b_t.shape)} (teacher) and {tuple(a_s.shape)} · "
            f"{tuple(b_s.shape)} (student): equal batches, heads and tokens are expected"
        )
    with torch.autocast(a_s.device.type, enabled=False):  # half precision would not do for scores and their logarithms
        wide = [_wide(tensor) for tensor in (a_t.detach(), b_t.detach(), a_s, b_s)]
        return _Relation.apply(*wide, softmax)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def relation_kl(
    a_t: Float[Tensor, "b m n d_t"],
    b_t: Float[Tensor, "..."],
    a_s: Float[Tensor, "..."],
    b_s: Float[Tensor, "..."],
) -> Float[Tensor, ""]:
    """KL(R_t ‖ R_s) with R = softmax(A Bᵀ / √d): how the student's relations differ (section 3 of the paper).

    Args:
        a_t: the teacher's queries, keys or values (B, M, N, d_t), M heads; no gradient flows into them.
        b_t: those they are compared with; d is each network's own head size.
        a_s: the student's (B, M, N, d_s).
        b_s: the student's.

    Returns:
        In nats, summed over keys, averaged over batch, heads and queries. Computed in float32 also under autocast, head
        by head: no more than one head's relations are in memory. Its gradient cannot be differentiated again.
    """
    return _relation(a_t, b_t, a_s, b_s, softmax=True)


def relation_smooth_l1(
    a_t: Float[Tensor, "b m n d_t"],
    b_t: Float[Tensor, "..."],
    a_s: Float[Tensor, "..."],
    b_s: Float[Tensor, "..."],
) -> Float[Tensor, ""]:
    """Smooth-L1 (β = 2) between scaled scores A Bᵀ / √d without soft-max, averaged over all entries.

    The paper compares relations without soft-max and does not name the loss for it: this one is ours. Arguments as of
    :func:`relation_kl`.
    """
    return _relation(a_t, b_t, a_s, b_s, softmax=False)


def feature_smooth_l1(
    teacher: Float[Tensor, "b n dim"], student: Float[Tensor, "..."], beta: float = BETA
) -> Float[Tensor, ""]:
    """Smooth-L1 between the student's projected features and the teacher's behind a layer norm without gain and bias.

    With the absolute difference e of an entry: ½ e²/β where e ≤ β, e − ½ β elsewhere; averaged over all entries.

    Args:
        teacher: (B, N, D); normalised here; no gradient flows into it.
        student: (B, N, D), brought to the teacher's width by a linear layer.
        beta: β > 0.
    """
    if teacher.shape != student.shape:
        raise InvalidValue(f"features of {tuple(teacher.shape)} (teacher) and {tuple(student.shape)} (student) differ")
    if not beta > 0:
        raise InvalidValue(f"beta = {beta}; more than 0 is expected")
    teacher, student = _wide(teacher.detach()), _wide(student)
    return nn.functional.smooth_l1_loss(student, layer_norm(teacher, teacher.shape[-1:], eps=EPS), beta=beta)


def cls_kl(teacher: Float[Tensor, "b dim"], student: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """KL(softmax(teacher) ‖ softmax(student)) over the features of class tokens, in nats, averaged over the batch.

    The paper writes a divergence of the features themselves, which are no distributions: the soft-max over features is
    ours. Neither side is normalised before it.

    Args:
        teacher: (B, D); no gradient flows into it.
        student: (B, D), brought to the teacher's width by a linear layer.
    """
    if teacher.shape != student.shape:
        raise InvalidValue(f"features of {tuple(teacher.shape)} (teacher) and {tuple(student.shape)} (student) differ")
    return nn.functional.kl_div(
        log_softmax(_wide(student), -1),
        log_softmax(_wide(teacher.detach()), -1),
        reduction="batchmean",
        log_target=True,
    )


# --------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Objective:
    """What of a teacher's block the student's last block is to reproduce."""

    target: Target = "relations"
    """"relations" among tokens, "features" of tokens behind a linear layer, or the "cls_token"'s of them."""
    relations: tuple[Relation, ...] = ("qk", "vv")
    """Which relations: of queries, keys and values with each other. Their losses are added."""
    softmax: bool = True
    """Compare relations behind a soft-max, by a divergence; else the scores, by smooth-L1."""
    feature: Feature = "block"
    """Which feature, see :data:`sparing.models.mae.FEATURES`."""
    input: Literal["raw", "masked"] = "raw"
    """Show whole images, or both networks the same patches that are left of them."""
    mask_ratio: float = 0.75
    """Share of the patches that is removed from a masked input."""
    reconstruction: bool = False
    """Let the student fill in the removed patches as well, with a decoder of its own; its loss is added."""
    norm_pix_loss: bool = True
    """Let it fill in patches of mean 0 and variance 1 instead of pixels as they are."""

    def __post_init__(self) -> None:
        for name, known in (
            ("target", ("relations", "features", "cls_token")),
            ("feature", FEATURES),
            ("input", ("raw", "masked")),
        ):
            if getattr(self, name) not in known:
                raise InvalidValue(f"{name} = {getattr(self, name)!r}; one of {', '.join(known)} is expected")
        chosen = tuple(self.relations)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(RELATIONS):
            raise InvalidValue(f"relations = {chosen}; some of {', '.join(RELATIONS)}, each once, are expected")
        check_mask_ratio(self.mask_ratio)
        if self.reconstruction and self.input != "masked":
            raise InvalidValue(f'reconstruction needs removed patches: input = {self.input!r}; "masked" is expected')

    @property
    def untrained(self) -> tuple[str, ...]:
        """Parts of the student's last block that come behind what is compared, and its last norm."""
        if self.reconstruction:
            return ()
        behind: Mapping[str, tuple[str, ...]] = {
            "qkv": ("attn.proj", "norm2", "mlp"),
            "attention": ("norm2", "mlp"),
            "attention_residual": ("norm2", "mlp"),
        }
        compared = {"relations": "qkv", "features": self.feature, "cls_token": "block"}[self.target]
        return behind.get(compared, ())


def default_block(teacher: ViTConfig) -> int:
    """The block to learn from when none is named: three quarters of the way up a deep teacher, else the last.

    18 of 24 and 12 of 12, as in the paper. Of a teacher that was itself taught relations, which its last block's own
    number of heads tells, it is the last.
    """
    return teacher.depth * 3 // 4 if teacher.depth > 12 and teacher.last_heads is None else teacher.depth


def student_config(
    student: ViTConfig, teacher: ViTConfig, block: int | None = None, heads: int | Literal["auto"] | None = "auto"
) -> ViTConfig:
    """The student's config with the heads of its last block set for relations with block ``block`` of the teacher.

    ``heads``: "auto" takes the teacher's number; another number must equal it; None leaves the config as it is, which
    features allow. Weights keep their shapes whatever the number.

    Raises :class:`InvalidValue` for a width that the number does not divide.
    """
    if heads is None:
        return student
    block = default_block(teacher) if block is None else block
    check_block(block, teacher.depth)
    needed = teacher.heads_of[block - 1]
    if heads != "auto" and heads != needed:
        raise InvalidValue(
            f"student_heads = {heads}; block {block} of the teacher has {needed} heads, and relations are compared "
            'head by head: "auto" takes its number'
        )
    if student.dim % needed:
        raise InvalidValue(
            f"the student's width {student.dim} cannot be shared among the {needed} heads that block {block} of the "
            f"teacher has; a width that {needed} divides, or another target block, is needed"
        )
    return replace(student, last_heads=needed)


def freeze(teacher: ViTTrunk, drop_path: float = 0.0) -> ViTTrunk:
    """A copy that answers and never learns: evaluation mode, no gradients.

    With ``drop_path`` above 0 its blocks all the same leave out branches at random, at that rate: an ablation.
    """
    if not 0 <= drop_path < 1:
        raise InvalidValue(f"teacher_drop_path = {drop_path!r}; 0 ≤ rate < 1 is expected")
    copied = copy.deepcopy(teacher).requires_grad_(False).eval()
    for module in copied.modules():
        if isinstance(module, DropPath):
            module.rate = drop_path
            module.training = drop_path > 0
    return copied


class RelationStudent(nn.Module):
    """A student in training: its encoder, and what is thrown away afterwards.

    Calling it gives the loss, a scalar. ``encoder`` is the network to keep.

    Args:
        config: the student's sizes; for relations with ``last_heads`` as :func:`student_config` sets them.
        teacher: the teacher's sizes; the same grid of patches.
        objective: what is compared.
        target_block: which block of the teacher (from 1); None: :func:`default_block`.
        drop_path: rate of stochastic depth of every block but the last, which has none.
        decoder_dim: width of the decoder for ``reconstruction``.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
    """

    encoder: ViTEncoder
    """The student: an encoder, or a whole :class:`~sparing.models.mae.MAE` for ``reconstruction``."""
    projection: nn.Linear | None
    """The linear layer to the teacher's width; None for relations."""

    def __init__(
        self,
        config: ViTConfig,
        teacher: ViTConfig,
        objective: Objective | None = None,
        target_block: int | None = None,
        drop_path: float = 0.1,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        self.objective = Objective() if objective is None else objective
        self.target_block = default_block(teacher) if target_block is None else target_block
        check_block(self.target_block, teacher.depth)
        if config.grid != teacher.grid:
            raise InvalidValue(
                f"the student has {config.grid}² tokens ({config.image_size} pixels in patches of {config.patch_size}) "
                f"and the teacher {teacher.grid}² ({teacher.image_size} in {teacher.patch_size}); equal is needed"
            )
        mine, theirs = config.heads_of[-1], teacher.heads_of[self.target_block - 1]
        if self.objective.target == "relations" and mine != theirs:
            raise InvalidValue(
                f"the student's last block has {mine} heads, block {self.target_block} of the teacher {theirs}; set "
                "last_heads by student_config"
            )
        rates = flat_rates(drop_path, config.depth)
        if self.objective.reconstruction:
            decoder = (decoder_dim, decoder_depth, decoder_heads)
            self.encoder = MAE(config, *decoder, mask_ratio=self.objective.mask_ratio, drop_path=rates)
        else:
            self.encoder = ViTEncoder(config, rates)
        self.projection = None
        if self.objective.target != "relations":
            wide = 3 if (self.objective.target, self.objective.feature) == ("features", "qkv") else 1
            self.projection = nn.Linear(wide * config.dim, wide * teacher.dim)
            nn.init.xavier_uniform_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def untrained(self) -> list[str]:
        """Names of the encoder's tensors that no gradient reaches: they keep the weights they have."""
        last = f"blocks.{self.encoder.config.depth - 1}."
        behind = tuple(f"{last}{part}." for part in self.objective.untrained)
        if not self.objective.reconstruction:
            behind = (*behind, "norm.")
        fixed = [name for name, _ in self.encoder.named_buffers()]
        return [*fixed, *(name for name, _ in self.encoder.named_parameters() if name.startswith(behind))]

    def forward(
        self,
        teacher: ViTTrunk,
        teacher_images: Float[Tensor, "b c h w"],
        images: Float[Tensor, "b c2 h2 w2"],
        noise: Float[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss on one batch.

        Args:
            teacher: in evaluation mode (see :func:`freeze`). It runs up to the target block and no further.
            teacher_images: (B, C, H, W) as the teacher is used to see them.
            images: the same images for the student, its colours changed.
            noise: (B, L), decides which patches a masked input keeps; None: from torch's global generator.
        """
        if teacher.training:
            raise InvalidValue("the teacher is in training mode; freeze(teacher), or teacher.eval(), is needed")
        keep = mask = restore = None
        if self.objective.input == "masked":
            if noise is None:
                noise = torch.rand(len(images), self.encoder.config.grid**2, device=images.device)
            keep, mask, restore = random_masking(noise, self.objective.mask_ratio)
        taught = teacher.blocks[self.target_block - 1]
        last = self.encoder.blocks[-1]
        assert isinstance(taught, TransformerBlock)
        assert isinstance(last, TransformerBlock)
        with torch.no_grad():
            x_t = teacher.into(teacher.tokens(teacher_images, keep), self.target_block)
        x_s = self.encoder.into(self.encoder.tokens(images, keep), self.encoder.config.depth)
        loss = self.compare(taught, x_t, last, x_s)
        if self.objective.reconstruction:
            assert isinstance(self.encoder, MAE)
            assert restore is not None
            assert mask is not None
            pred = self.encoder.decode(self.encoder.norm(last(x_s)), restore)
            patches = patchify(images, self.encoder.config.patch_size)
            loss = loss + mae_loss(patches, pred, mask, self.objective.norm_pix_loss)
        return loss

    def compare(
        self,
        taught: TransformerBlock,
        x_t: Float[Tensor, "b n dim_t"],
        last: TransformerBlock,
        x_s: Float[Tensor, "b n dim_s"],
    ) -> Float[Tensor, ""]:
        """The loss of the objective alone, given the inputs of the teacher's block and of the student's last."""
        objective = self.objective
        if objective.target == "relations":
            with torch.no_grad():
                theirs = dict(zip("qkv", taught.attn.split(taught.norm1(x_t)), strict=True))
            mine = dict(zip("qkv", last.attn.split(last.norm1(x_s)), strict=True))
            differ = relation_kl if objective.softmax else relation_smooth_l1
            losses = [differ(theirs[a], theirs[b], mine[a], mine[b]) for a, b in objective.relations]
            return torch.stack(losses).sum()
        feature: Feature = objective.feature if objective.target == "features" else "block"
        with torch.no_grad():
            target = block_feature(taught, x_t, feature)
        assert self.projection is not None
        made = block_feature(last, x_s, feature)
        if objective.target == "cls_token":
            return cls_kl(target[:, 0], self.projection(made[:, 0]))
        return feature_smooth_l1(target, self.projection(made))


def flat_rates(rate: float, depth: int) -> list[float]:
    """The student's rates of stochastic depth: the same in every block but the last, which has none."""
    if not 0 <= rate < 1:
        raise InvalidValue(f"drop_path = {rate!r}; 0 ≤ rate < 1 is expected")
    return [rate] * (depth - 1) + [0.0]


# -------------------------------------------------------------------------------------------------------------- step


def load_teacher(folder: Path, trust: Collection[str] = ()) -> ViTTrunk:
    """A teacher from a folder: a model that Sparing saved, a network of :func:`sparing.models.mae.save_vit`, or a ViT
    or ViTMAE of ``transformers``."""
    if not (folder / "sparing.json").is_file():
        return load_vit(folder)
    predictor = load(folder, trust)
    model = getattr(predictor, "model", None)
    if not isinstance(model, ViTTrunk):
        raise InvalidValue(f'{folder}: a {predictor.kind} of {type(model).__name__}; a saved "mae_vit" is expected')
    return model


@step("distil_relations")
class DistilRelations(Pretrain):
    """Pre-train a small "mae_vit" on images without labels, by how a pre-trained teacher relates their parts.

    The teacher is the job's model, or one in a folder; the student takes its place, and may be the teacher of a next,
    smaller one. Its last block keeps the number of heads it was taught with until ``finetune`` sets it back.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"module", "images"})
    gives: ClassVar[frozenset[str]] = frozenset({TRUNK})
    source: ClassVar[str] = "Ren et al. 2023, TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models, CVPR"

    epochs: int = Field(default=300, ge=1)
    """Passes over the images; not looked at when ``max_steps`` is set."""
    model: Annotated[str, Field(min_length=1)] | dict[str, Any]
    """The student: {name: mae_vit, field: value}."""
    teacher_folder: Path | None = None
    """A folder with the teacher: saved by Sparing, or a ViT or ViTMAE saved by transformers. None: the job's model."""
    teacher_normalisation: Literal["data", "imagenet"] = "data"
    """By what the teacher's images are normalised: the task's own figures, or those of ImageNet for public weights."""
    target: Target = "relations"
    """What is reproduced: relations among tokens, features of tokens, or features of the class token alone."""
    relations: tuple[Relation, ...] = ("qk", "vv")
    """Which relations: some of qk, vv, qq, kk."""
    softmax: bool = True
    """Compare relations behind a soft-max; else the bare scores."""
    feature: Feature = "block"
    """Which feature of a block: block, ffn, attention, attention_residual or qkv."""
    target_block: int | None = Field(default=None, ge=1)
    """The teacher's block to learn from, counted from 1. None: the last, or 3/4 of the way up a deep MAE."""
    student_heads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Heads of the student's last block for relations; "auto": the teacher's number, which it must equal."""
    input: Literal["raw", "masked"] = "raw"
    """Whole images, or what is left of them when ``mask_ratio`` of the patches is removed."""
    reconstruction: bool = False
    """Let the student fill in the removed patches too."""
    jitter: float = Field(default=0.4, ge=0, le=1)
    """Strength of random brightness, contrast and saturation of the student's view."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Rate of stochastic depth of every block of the student but the last."""
    teacher_drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Rate of stochastic depth of the teacher: an ablation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.objective()
        except InvalidValue as error:
            raise InvalidValue(f"{self.id}: {error}") from None
        if named_model(self.model, f"{self.id}: model")[0] != "mae_vit":
            raise InvalidValue(f'{self.id}: model = {self.model!r}; a "mae_vit" is expected')
        if self.teacher_folder is not None and not self.teacher_folder.is_dir():
            raise InvalidValue(f"{self.id}: teacher_folder = {str(self.teacher_folder)!r}: there is no such folder")

    def objective(self) -> Objective:
        """What is compared."""
        return Objective(
            self.target,
            self.relations,
            self.softmax,
            self.feature,
            self.input,
            self.mask_ratio,
            self.reconstruction,
            self.norm_pix_loss,
        )

    def check(self, task: Task) -> None:
        """The student can be built."""
        super().check(task)
        name, own = named_model(self.model, f"{self.id}: model")
        outline(lambda: build_model(name, task, **own))

    def apply(self, job: Job) -> Job:
        """The job with the student in the teacher's place, without a predictor, and with an emptied training plan."""
        images = self.images(job)
        if self.teacher_folder is None:
            teacher = trunk_of(self.id, job, ViTTrunk)
        else:
            teacher = load_teacher(self.teacher_folder, job.trust)
        name, own = named_model(self.model, f"{self.id}: model")
        with isolated_rng("model", job.seed):  # as the same model begins when it is the job's
            student = build_model(name, job.task, **own)
        assert isinstance(student, MAEViT)
        config = student.config
        for what in ("image_size", "in_channels"):
            mine, theirs = getattr(config, what), getattr(teacher.config, what)
            if mine != theirs:
                raise IncompatibleStep(
                    f"{self.id}: {what} = {mine} of the student, {theirs} of the teacher; equal is needed"
                )
        block = default_block(teacher.config) if self.target_block is None else self.target_block
        if self.target == "relations":
            config = student_config(config, teacher.config, block, self.student_heads)
        with isolated_rng(job.seed, self.name, "prepare"):
            decoder = (self.decoder_dim, self.decoder_depth, self.decoder_heads)
            learner = RelationStudent(config, teacher.config, self.objective(), block, self.drop_path, *decoder)
        learner.encoder.take_over(student)
        left = learner.untrained()
        for part, parameter in learner.encoder.named_parameters():
            parameter.requires_grad_(part not in left)
        here: dict[torch.device, ViTTrunk] = {}  # beside the student, not in it: no state to save, nothing to train

        def loss(learner: RelationStudent, batch: Any) -> Tensor:
            device = batch[0].device
            if device not in here:
                here[device] = freeze(teacher, self.teacher_drop_path).to(device)
            return learner(here[device], *batch)

        side = config.image_size
        second = (ColourJitter(self.jitter, self.jitter, self.jitter),) if self.jitter else ()
        moments = IMAGENET if self.teacher_normalisation == "imagenet" else (None, None)
        data = PairedImages(images, self.crops(side), second, *moments)
        self.learn(job, learner, data, OwnLoss(job.task, loss))
        with isolated_rng("model", job.seed):  # again, with its last block's heads: the head begins as the student's
            taught = build_model(name, job.task, **own | {"last_heads": config.last_heads})
        assert isinstance(taught, MAEViT)
        taught.take_over(learner.encoder)
        what = {"relations": " + ".join(self.relations), "features": self.feature, "cls_token": "class token"}[
            self.target
        ]
        job.notes.remarks += [
            f"{what} of block {block} of {teacher.config.depth}, {teacher.config.heads_of[block - 1]} heads; the "
            f"student's blocks have {', '.join(map(str, config.heads_of))}",
            f"{len(left)} tensors were not trained and keep their first values: {', '.join(left)}",
        ]
        return job.replace(model=taught, predictor=None, training=TrainingPlan())
