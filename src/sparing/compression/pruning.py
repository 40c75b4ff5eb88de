"""Block magnitude pruning: blocks of weights that matter least are set to zero, more and more of them, while training.

The gradual schedule is that of Zhu and Gupta 2017 (arXiv:1710.01878); blocks of 4 outputs × 1 input pruned in
pre-training, and a pattern that later trainings keep, are *Prune Once for All* (Zafrir et al. 2021, arXiv:2111.05754)
and *Fast DistilBERT on CPUs* (Shen et al. 2022, arXiv:2211.07715).

A block is always given as (outputs, inputs), which are the dimensions of a linear layer's weight: (4, 1) is four
neighbouring outputs of one input. Kernel texts call it "4x1", names of published models "1x4".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, did_you_mean, shown
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from sparing.core.job import Job

Block = tuple[int, int]
Score = Literal["mean", "max"]
GUARD = 1e-9
"""Added to s·n before it is cut to a whole number, so that 0.8 · 10 blocks are 8 whatever the last bit of 0.8 says."""


# --- which blocks go -------------------------------------------------------------------------------------------------


def block_scores(weight: Float[Tensor, "out in"], block: Block = (4, 1), score: str = "mean") -> Float[Tensor, "b c"]:
    """Mean (or largest) absolute weight of each block, (out / block[0], in / block[1]).

    Raises :class:`InvalidValue` for a block that does not divide the weight, or another ``score``.
    """
    rows, columns = check_block(block)
    outputs, inputs = weight.shape
    if outputs % rows or inputs % columns:
        raise InvalidValue(
            f"a weight of {outputs} outputs × {inputs} inputs cannot be cut into blocks of {rows} × {columns}; choose "
            "a block that divides it, or leave it out with exclude"
        )
    blocks = weight.detach().abs().reshape(outputs // rows, rows, inputs // columns, columns)
    if score == "mean":
        return blocks.mean((1, 3))
    if score == "max":
        return blocks.amax((1, 3))
    raise InvalidValue(f'score = {shown(score)}; "mean" or "max" of the absolute weights is expected')


def block_mask(
    weight: Float[Tensor, "out in"], block: Block = (4, 1), sparsity: float = 0.8, score: str = "mean"
) -> Bool[Tensor, "out in"]:
    """True for the weights that stay when a share ``sparsity`` of the blocks with the smallest scores goes.

    Of n blocks the k = ⌊sparsity · n⌋ smallest go: all whose score is not above the k-th smallest. Blocks that
    equal it go too, so that of a weight with many equal blocks more than k can go.

    Args:
        weight: W, with y = x Wᵀ.
        block: (outputs, inputs) of a block; (1, 1) prunes single weights.
        sparsity: share of the blocks, 0 ≤ sparsity < 1.
        score: "mean" or "max" of the block's absolute weights.

    Raises:
        InvalidValue: a block that does not divide the weight, a sparsity outside [0, 1), or weights that are NaN or
            infinite.
    """
    check_sparsity(sparsity)
    if not bool(weight.isfinite().all()):
        raise InvalidValue(
            f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are NaN or infinite; their size says "
            "nothing about what can go"
        )
    scores = block_scores(weight, block, score).float()
    count = int(sparsity * scores.numel() + GUARD)
    kept = torch.ones_like(scores, dtype=torch.bool)
    if count:  # on the CPU, where the selection is deterministic
        kept = scores > scores.flatten().cpu().kthvalue(count).values.to(scores.device)
    return kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def check_block(block: Any) -> Block:
    """The block as two whole numbers; raises :class:`InvalidValue` for anything else."""
    sizes = tuple(block) if isinstance(block, tuple | list) else ()
    if len(sizes) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise InvalidValue(f"block = {shown(block)}; (outputs, inputs) of at least 1 are expected, e.g. (4, 1)")
    return sizes[0], sizes[1]


def check_sparsity(sparsity: Any, name: str = "sparsity") -> None:
    """Raise :class:`InvalidValue` unless 0 ≤ sparsity < 1."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise InvalidValue(f"{name} = {shown(sparsity)}; 0 ≤ {name} < 1 is expected")


# --- when ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CubicSchedule:
    """How much is pruned after step t = 0, 1, … of a training (Zhu and Gupta 2017, eq. 1)::

        base(t) = 1 − clip((1 − (t − t0) / (t1 − t0))³, 0, 1)
        s(t)    = s_i + (s_f − s_i) · base(t)

    Masks are made anew after every step t with begin ≤ t ≤ end and (t − begin) divisible by ``freq``. From t1 to the
    end the share stays, but which blocks they are may change. Raises :class:`InvalidValue` for t1 ≤ t0, end < begin,
    freq < 1 or an initial share outside [0, 1).
    """

    t0: int
    """Step at which the share begins to grow from ``initial``."""
    t1: int
    """Step at which it has reached its target."""
    end: int | None = None
    """Last step after which masks may change; None: t1."""
    freq: int = 1
    """Steps between two changes."""
    initial: float = 0.0
    """s_i: the share that is pruned from the start."""
    begin: int | None = None
    """First step after which masks may change; None: t0."""

    def __post_init__(self) -> None:
        for name, least in (("t0", 0), ("t1", 0), ("end", 0), ("freq", 1), ("begin", 0)):
            value = getattr(self, name)
            if value is None and name in ("end", "begin"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidValue(f"{name} = {shown(value)}; a whole number of at least {least} is expected")
        if self.t1 <= self.t0:
            raise InvalidValue(f"t0 = {self.t0}, t1 = {self.t1}; t1 > t0 is expected, or the share has no time to grow")
        if self.last < self.first:
            raise InvalidValue(f"begin = {self.first}, end = {self.last}; begin ≤ end is expected")
        check_sparsity(self.initial, "initial")

    @classmethod
    def over(
        cls, steps: int, ramp: float = 0.5, end: float = 0.8, every: float = 0.01, initial: float = 0.0
    ) -> CubicSchedule:
        """The schedule of a training of ``steps`` optimizer steps, with times as shares of it.

        t0 = 0, t1 = ramp · steps, the end at end · steps, a change every · steps apart, all rounded down to at least
        one step. Where that would never fall into t1 … end, changes are closer, so that the target is reached. Raises
        :class:`InvalidValue` when the training is too short for that.
        """
        t1 = max(1, int(ramp * steps + GUARD))
        last = max(t1, int(end * steps + GUARD))
        if last > steps - 1:
            raise InvalidValue(
                f"a training of {steps} optimizer steps is too short for a ramp of {ramp:g} and an end of {end:g}: "
                f"step {t1}, counted from 0, has to come; 2 steps are the least"
            )
        return cls(0, t1, last, max(1, min(int(every * steps + GUARD), last - t1)), initial)

    @property
    def first(self) -> int:
        """First step after which masks may change."""
        return self.t0 if self.begin is None else self.begin

    @property
    def last(self) -> int:
        """Last step after which masks may change."""
        return max(self.t1, self.first) if self.end is None else self.end

    def base(self, t: int) -> float:
        """Share of the way from the initial to the final sparsity at step t."""
        return 1 - min(max((1 - (t - self.t0) / (self.t1 - self.t0)) ** 3, 0.0), 1.0)

    def sparsity(self, t: int, final: float) -> float:
        """s(t) on the way to ``final``."""
        return self.initial + (final - self.initial) * self.base(t)

    def due(self, t: int) -> bool:
        """Whether masks are made anew after step t."""
        return self.first <= t <= self.last and (t - self.first) % self.freq == 0


def rewound_rate(t: int, total: int, rewind: int, warmup: float = 0.01) -> float:
    """Factor on the learning rate at step t: a warm-up and a linear fall to nothing, twice.

    The first goes from 0 to ``rewind``, the second from there to ``total``: late steps of a pruning, which change much,
    see a learning rate that can mend it. Each begins with a share ``warmup`` of growth. Prune Once for All rewinds its
    schedule, and does not say when; here that is when the target is reached.
    """
    if not 0 < rewind < total or not 0 <= warmup < 1:
        raise InvalidValue(
            f"total = {total}, rewind = {rewind}, warmup = {warmup}; 0 < rewind < total and 0 ≤ warmup < 1 are expected"
        )
    start, length = (0, rewind) if t < rewind else (rewind, total - rewind)
    at, rise = t - start, int(warmup * length + GUARD)
    if at < rise:
        return (at + 1) / (rise + 1)
    return max(0.0, (length - at) / (length - rise))


# --- which layers ----------------------------------------------------------------------------------------------------


def prunable_layers(
    model: nn.Module, exclude: Sequence[str] = (), convolutions: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(layers to prune by name, why each other layer is passed over).

    Of an encoder all linear layers of its blocks are taken: of :class:`~sparing.models.bert.Bert`, of ``transformers``
    models, of whatever else has a stack of equal modules with several linear layers in each. Of any other model all
    linear layers (with ``convolutions`` also those of two dimensions) but the last, which gives the outputs.

    ``exclude`` holds patterns of names as shells have them: ``"blocks.0.*"``, ``"*.query"``. Raises
    :class:`InvalidValue` for a pattern that names no layer.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InvalidValue(
                f"exclude: {pattern!r} matches no layer.{did_you_mean(pattern, layers)} Layers: "
                f"{', '.join(layers) or 'none'}"
            )
    stacks = tuple(_stacks(model))
    last = next(reversed(layers), None)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    taken: dict[str, nn.Module] = {}
    passed: dict[str, str] = {}
    for name, layer in layers.items():
        ours = _mask_of(layer) is not None
        others = [] if ours else [owner for owner in owners.get(id(layer.weight), []) if owner != name]
        if stacks and not name.startswith(stacks):
            passed[name] = "outside the encoder's blocks"
        elif not stacks and name == last:
            passed[name] = "it gives the outputs"
        elif any(fnmatchcase(name, pattern) for pattern in exclude):
            passed[name] = "excluded"
        elif others:
            passed[name] = f"its weight is that of {', '.join(others)}"
        elif parametrize.is_parametrized(layer) and not ours:
            passed[name] = "it is parametrised already"
        else:
            taken[name] = layer
    if not convolutions:
        passed |= {name: "a convolution" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return taken, passed


def _stacks(model: nn.Module) -> Iterable[str]:
    """Prefixes of the names of an encoder's blocks."""
    containers = (nn.ModuleList, nn.Sequential)
    for name, stack in model.named_modules():
        children = list(stack.children())
        if (
            isinstance(stack, containers)
            and children
            and len({type(child) for child in children}) == 1
            and not isinstance(children[0], (*containers, nn.ModuleDict))
            and all(sum(isinstance(part, nn.Linear) for part in child.modules()) > 1 for child in children)
        ):
            yield f"{name}." if name else ""


# --- masks on layers -------------------------------------------------------------------------------------------------


class BlockMask(nn.Module):
    """Parametrisation W · mask of a layer's weight: pruned entries get no gradient, their stored values are kept."""

    mask: Tensor

    def __init__(self, mask: Tensor, block: Block | None = None) -> None:
        super().__init__()
        self.block = block
        """The block it is pruned by; None for a pattern that is locked."""
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, with zeros for what is pruned."""
        return weight * self.mask


def _mask_of(layer: nn.Module) -> BlockMask | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    inner = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    return inner if isinstance(inner, BlockMask) else None


def _matrix(weight: Tensor) -> Tensor:
    """(out, in), for convolutions (out, in · height · width)."""
    return weight.flatten(1)


@dataclass(frozen=True)
class LayerSparsity:
    """What is pruned of one layer."""

    name: str
    shape: tuple[int, ...]
    """Of its weight, (outputs, inputs, …)."""
    blocks: int
    """How many there are."""
    pruned: int
    """How many of them are zero altogether."""
    sparsity: float
    """Share of single weights that are zero."""


@dataclass(frozen=True)
class PruningReport:
    """What is pruned of a model, layer by layer, and why the others are not."""

    block: Block
    layers: tuple[LayerSparsity, ...]
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of the weights of these layers that are zero."""
        total = sum(math.prod(layer.shape) for layer in self.layers)
        return sum(layer.sparsity * math.prod(layer.shape) for layer in self.layers) / total

    def __str__(self) -> str:
        shares = [layer.sparsity for layer in self.layers]
        blocks, pruned = sum(layer.blocks for layer in self.layers), sum(layer.pruned for layer in self.layers)
        text = (
            f"{self.sparsity:.2%} of the weights of {len(self.layers)} layers are zero ({min(shares):.2%} to "
            f"{max(shares):.2%}), {pruned:,} of {blocks:,} blocks of {self.block[0]}×{self.block[1]}"
        )
        return text if not self.passed_over else f"{text}; passed over: {reasons(self.passed_over)}"


def reasons(passed: Mapping[str, str]) -> str:
    """Names grouped by why they are passed over, in one line."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in passed.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()) or "nothing"


def sparsity_of(model: nn.Module, block: Block = (4, 1), names: Iterable[str] | None = None) -> PruningReport:
    """How many weights, and blocks, of a model's linear layers and convolutions are zero, masks included.

    ``names``: the layers to look at; None: all. A block that does not divide a layer counts single weights there.
    """
    wanted = None if names is None else set(names)
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or (wanted is not None and name not in wanted):
            continue
        weight = layer.weight.detach()
        matrix = _matrix(weight)
        fits = not any(size % part for size, part in zip(matrix.shape, block, strict=True))
        scores = block_scores(matrix, block if fits else (1, 1), "max")
        zeros = weight.numel() - int(weight.count_nonzero())
        found.append(
            LayerSparsity(
                name, tuple(weight.shape), scores.numel(), int((scores == 0).sum()), zeros / max(1, weight.numel())
            )
        )
    return PruningReport(block, tuple(found))


class Masks:
    """Masks on some layers of a model: what :class:`BlockMagnitudePruner` and :func:`lock_pattern` put there."""

    def __init__(
        self, model: nn.Module, masks: Mapping[str, BlockMask], block: Block, passed_over: Mapping[str, str]
    ) -> None:
        self.model, self.block, self.passed_over = model, block, dict(passed_over)
        self.masks = dict(masks)
        self._names = list(masks)

    def apply_(self) -> nn.Module:
        """Fold the masks into the weights, in place: the layers are plain again, pruned weights are exactly zero.

        An optimizer keeps its parameters. Returns the model.
        """
        for name in self.masks:
            layer = self.model.get_submodule(name)
            if _mask_of(layer) is not None:
                _fold(layer)
        self.masks = {}
        return self.model

    def report(self) -> PruningReport:
        """Zeros of each layer as they stand, and why other layers are passed over."""
        found = sparsity_of(self.model, self.block, self._names)
        return PruningReport(self.block, found.layers, self.passed_over)


def _fold(layer: nn.Module) -> None:
    """Not by torch's ``remove_parametrizations``: copies share the class, which that would break for them."""
    held: Any = layer.parametrizations
    weight = held.weight.original
    with torch.no_grad():
        weight.copy_(layer.weight)
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update({"weight": weight, **others})  # first, as the layer was built


class BlockMagnitudePruner(Masks):
    """Prunes a model in a loop of your own: masks are put around its layers at once, and grow with every step.

    Masks are set once, for the schedule's initial sparsity; then after each optimizer step call :meth:`step`, and in
    the end :meth:`apply_`::

        pruner = BlockMagnitudePruner(model, block=(4, 1), sparsity=0.8, schedule=CubicSchedule(0, 500, 800, 10))
        optimizer = torch.optim.AdamW(model.parameters())        # after the pruner, or before: the same parameters
        for batch in data:
            loss(model, batch).backward()
            optimizer.step()
            pruner.step()
        pruner.apply_()

    The weights that the layers use are W · mask; W itself is kept whole, and a block can come back when others have
    become smaller than it. Each layer is pruned to the same share.

    Args:
        model: changed in place; its masks are buffers and part of its state. A model that has masks of the same block
            already goes on with them.
        block: (outputs, inputs) of a block; must divide each layer that is taken.
        sparsity: the final share of pruned blocks in each layer, 0 ≤ sparsity < 1.
        schedule: when; None: all at once, now.
        exclude: patterns of names of layers to leave alone.
        score: "mean" or "max" of a block's absolute weights.
        convolutions: prune those of two dimensions too, as matrices (out, in · height · width).

    Raises:
        InvalidValue: values outside what is allowed, a block that does not divide a layer, weights that are not
            finite; the message names the layer.
        NoEffect: there is no layer to prune; the message says why each was passed over.
        IncompatibleStep: the model has masks of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        block: Block = (4, 1),
        sparsity: float = 0.8,
        schedule: CubicSchedule | None = None,
        exclude: Sequence[str] = (),
        score: Score = "mean",
        convolutions: bool = False,
    ) -> None:
        block = check_block(block)
        check_sparsity(sparsity)
        self.sparsity, self.score = sparsity, score
        self.schedule = schedule if schedule is not None else CubicSchedule(0, 1, initial=sparsity)
        """May be replaced before the first step."""
        self.t = 0
        """Steps made."""
        taken, passed = prunable_layers(model, exclude, convolutions)
        if not taken:
            raise NoEffect(f"no layer of {type(model).__name__} to prune; passed over: {reasons(passed)}")
        found = {name: _mask_of(layer) for name, layer in taken.items()}
        for name, mask in found.items():
            if mask is not None and mask.block != block:
                kind = "a locked pattern" if mask.block is None else f"masks of blocks of {mask.block}"
                raise IncompatibleStep(f"{name} has {kind} already; fold it with apply_() before pruning by {block}")
        made = {
            name: self._mask(name, layer.weight, block, self.schedule.initial)
            for name, layer in taken.items()
            if found[name] is None
        }
        for name, first in made.items():  # all were checked before the first is put in place
            parametrize.register_parametrization(taken[name], "weight", BlockMask(first, block))
        masks = {name: mask for name, layer in taken.items() if (mask := _mask_of(layer)) is not None}
        super().__init__(model, masks, block, passed)

    def step(self) -> None:
        """To be called after each optimizer step: makes the masks anew when the schedule says so."""
        if self.schedule.due(self.t):
            self.prune(self.schedule.sparsity(self.t, self.sparsity))
        self.t += 1

    def prune(self, share: float) -> None:
        """Make the masks anew, so that this share of each layer's blocks is pruned."""
        for name, mask in self.masks.items():
            original = self.model.get_submodule(name).parametrizations.weight.original  # type: ignore[union-attr]
            mask.mask.copy_(self._mask(name, original, self.block, share))

    def _mask(self, name: str, weight: Any, block: Block, share: float) -> Tensor:
        try:
            return block_mask(_matrix(weight.detach()), block, share, self.score).reshape(weight.shape)
        except InvalidValue as error:
            raise InvalidValue(f"{name}: {error}") from None


def lock_pattern(model: nn.Module, exclude: Sequence[str] = ()) -> Masks:
    """Keep the zeros of a pruned model through a training: mask = (W ≠ 0), set once, on the layers that pruning takes.

    Call ``apply_()`` on what is returned when the training has ended. Layers without a zero are left alone, and so are
    those that are zero altogether, as some layers begin.

    Args:
        model: changed in place.
        exclude: patterns of names of layers to leave alone.

    Raises:
        NoEffect: no layer has zeros; the message says what was looked at.
        IncompatibleStep: the model has masks already.
    """
    taken, passed = prunable_layers(model, exclude, convolutions=True)
    masks = {}
    for name, layer in taken.items():
        if _mask_of(layer) is not None:
            raise IncompatibleStep(f"{name} has a mask already; fold it with apply_() before its pattern is locked")
        pattern = layer.weight.detach() != 0  # type: ignore[operator]
        zeros = pattern.numel() - int(pattern.sum())
        if zeros == 0:
            passed[name] = "no weight is zero"
        elif zeros == pattern.numel():
            passed[name] = "all its weights are zero"
        else:
            masks[name] = BlockMask(pattern)
    if not masks:
        raise NoEffect(f"{type(model).__name__} has no pattern of zeros to lock; passed over: {reasons(passed)}")
    for name, mask in masks.items():
        parametrize.register_parametrization(taken[name], "weight", mask)
    return Masks(model, masks, (1, 1), passed)


# --- the steps -------------------------------------------------------------------------------------------------------


@step("block_prune")
class BlockPrune(Step):
    """Prune blocks of weights in the next training, gradually, by their magnitude.

    The trained model is as large as before, with zeros in it: a later ``compile`` or ``shrink`` makes them bytes and
    milliseconds. A further training would fill the zeros again unless ``lock_pattern`` stands before it.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training", "sparsity"})
    fragile: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    source: ClassVar[str] = (
        "Zafrir et al. 2021, Prune Once for All, arXiv:2111.05754; blocks of Shen et al. 2022, Fast DistilBERT on "
        "CPUs, arXiv:2211.07715; schedule of Zhu and Gupta 2017, arXiv:1710.01878, eq. 1"
    )

    block: tuple[int, int] = (4, 1)
    """(outputs, inputs) of a block; (1, 1) prunes single weights."""
    sparsity: float = Field(default=0.8, ge=0, lt=1)
    """Share of the blocks of each layer that is zero in the end."""
    score: Score = "mean"
    """A block's score: mean or largest absolute weight."""
    initial: float = Field(default=0.0, ge=0, lt=1)
    """Share that is pruned from the first step on."""
    ramp: float = Field(default=0.5, gt=0, lt=1)
    """Share of the training's steps in which the sparsity grows to its target (t1)."""
    end: float = Field(default=0.8, gt=0, lt=1)
    """Share of the steps after which the pattern stays."""
    every: float = Field(default=0.01, gt=0, lt=1)
    """Share of the steps between two changes of the pattern."""
    exclude: tuple[str, ...] = ()
    """Patterns of names of layers to leave alone, e.g. "blocks.0.*"."""
    convolutions: bool = False
    """Prune convolutions as well, as matrices of outputs × (inputs · height · width)."""
    rewind: bool = True
    """Set the learning rate's schedule: a warm-up and a linear fall until the target is reached, and once more from
    there. Off: the training's own schedule."""
    warmup: float = Field(default=0.01, ge=0, lt=1)
    """Share of each of the two that is warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_block(self.block)
        except InvalidValue as error:
            raise InvalidValue(f"{self.id}: {error}") from None
        if self.end < self.ramp:
            raise InvalidValue(f"{self.id}: ramp = {self.ramp:g}, end = {self.end:g}; ramp ≤ end is expected")
        if self.initial > self.sparsity:
            raise InvalidValue(
                f"{self.id}: initial = {self.initial:g}, sparsity = {self.sparsity:g}; initial ≤ sparsity is expected"
            )

    @property
    def slots(self) -> frozenset[str]:  # type: ignore[override]  # the schedule only with ``rewind``
        """The pattern of zeros, and the schedule where it is rewound."""
        return frozenset({"pattern of zeros", *(["scheduler"] if self.rewind else [])})

    def schedule(self, steps: int) -> CubicSchedule:
        """When masks change in a training of ``steps`` optimizer steps."""
        return CubicSchedule.over(steps, self.ramp, self.end, self.every, self.initial)

    def pruner(self, model: nn.Module) -> BlockMagnitudePruner:
        """Put masks on a model in place, or take up those it has; the schedule is to be set."""
        first = CubicSchedule(0, 1, initial=self.initial)
        return BlockMagnitudePruner(
            model, self.block, self.sparsity, first, self.exclude, self.score, self.convolutions
        )

    def rewound(self, optimizer: Any, total: int) -> Any:
        """The learning rate's schedule for an optimizer that will make ``total`` steps."""
        from torch.optim.lr_scheduler import LambdaLR

        t1 = self.schedule(total).t1
        return LambdaLR(optimizer, lambda done: rewound_rate(done, total, t1, self.warmup))

    def apply(self, job: Job) -> Job:
        """The job, whose next training prunes."""
        look = self.pruner(job.fresh_model()).report()
        blocks = sum(layer.blocks for layer in look.layers)
        job.notes.remarks.append(
            f"the next training prunes {self.sparsity:.0%} of {blocks:,} blocks of {self.block[0]}×{self.block[1]} in "
            f"{len(look.layers)} layers; passed over: {reasons(look.passed_over)}"
        )

        def wrap(model: nn.Module) -> tuple[nn.Module, Callable[[], nn.Module]]:
            return model, self.pruner(model).apply_

        def callback() -> Any:
            from sparing.compression.pruning_lightning import BlockPruning

            return BlockPruning(make=self.pruner, schedule=self.schedule)

        plan = job.training.adding(model_wraps=wrap, callbacks=callback)
        return job.replace(training=plan.adding(scheduler=self.rewound) if self.rewind else plan)


@step("lock_pattern")
class LockPattern(Step):
    """Keep the zeros of a pruned model through the next training.

    Prune once, then train for as many tasks as you like: each training needs a ``lock_pattern`` before it.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training", "sparsity"})
    fragile: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    slots: ClassVar[frozenset[str]] = frozenset({"pattern of zeros"})
    source: ClassVar[str] = "Zafrir et al. 2021, Prune Once for All, arXiv:2111.05754, section 3"

    exclude: tuple[str, ...] = ()
    """Patterns of names of layers to leave alone, e.g. "blocks.0.*"."""

    def apply(self, job: Job) -> Job:
        """The job, whose next training keeps the zeros."""
        locked = lock_pattern(job.fresh_model(), self.exclude).report()
        job.record("sparsity of locked layers", locked.sparsity, "", how="derived", better="higher")
        job.notes.remarks.append(f"the next training keeps these zeros: {locked}")

        def wrap(model: nn.Module) -> tuple[nn.Module, Callable[[], nn.Module]]:
            return model, lock_pattern(model, self.exclude).apply_

        return job.replace(training=job.training.adding(model_wraps=wrap))
