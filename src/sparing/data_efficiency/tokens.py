"""Counting what was really computed, and a learning rate that follows that count.

Steps of a curriculum, or with token dropping, carry fewer tokens than the last ones do. A learning rate that decays
with steps would decay too early, so here its clock is the tokens consumed (Li et al. 2022, arXiv:2212.03597, section
3.3), or the tokens that layers computed ("LayerToken LR": Yao et al. 2022, arXiv:2211.11586).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.core.errors import InvalidValue, did_you_mean, shown
from sparing.core.step import Stage, Step, step
from sparing.data_efficiency.pacing import PacingFunction
from sparing.data_efficiency.settings import agree, number, whole_number

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sparing.core.job import Job, TrainingPlan

STYLES = ("linear", "cosine")


# --- counting --------------------------------------------------------------------------------------------------------


def effective_length(length: int, kept: int, layers: int, dropping: int) -> int:
    """e: tokens of a sequence that count as consumed when some layers compute only ``kept`` of its ``length``.

    e = length if kept ≥ length, else (length · (L − n) + kept · n) // L, with L = ``layers`` of which n = ``dropping``
    drop tokens.
    """
    return length if kept >= length else (length * (layers - dropping) + kept * dropping) // layers


def layer_tokens(rows: int, length: int, kept: int, layers: int, dropping: int) -> int:
    """Tokens times layers that ``rows`` sequences cost: rows · (min(kept, length) · n + length · (L − n))."""
    return rows * (min(kept, length) * dropping + length * (layers - dropping))


class TokenCounter:
    """Tokens and layer tokens consumed so far.

    Args:
        layers: L, layers of the model.
        dropping: n ≤ L, layers that drop tokens.
        budget: consumed tokens after which :attr:`finished` is true; None: never.
    """

    tokens: int
    """Consumed tokens, by effective length."""
    layer_tokens: int
    """Tokens times layers computed."""
    rows: int
    """Sequences seen."""
    steps: int
    """Times that :meth:`add` was called."""

    def __init__(self, layers: int = 1, dropping: int = 0, budget: int | None = None) -> None:
        self.layers = whole_number("layers", layers, 1)
        self.dropping = whole_number("dropping", dropping, 0)
        if dropping > layers:
            raise InvalidValue(f"dropping = {dropping} of layers = {layers}; at most all of them can drop tokens")
        self.budget = None if budget is None else whole_number("budget", budget, 1)
        self.tokens = self.layer_tokens = self.rows = self.steps = 0

    def add(self, rows: int, length: int, kept: int | None = None, real: int | None = None) -> int:
        """Count one step, or one micro batch of it, after it; returns all consumed tokens.

        Args:
            rows: sequences of the global batch, as they came out of the post-processing.
            length: their length in tokens.
            kept: tokens that dropping layers compute; None: all.
            real: tokens of all rows that are no padding; None: none is. Only these are consumed, in the proportion in
                which all are computed, as dropping does not look at what it drops; layers compute padding as well.
        """
        whole_number("rows", rows, 0)
        whole_number("length", length, 1)
        kept = length if kept is None else whole_number("kept", kept, 1)
        effective = effective_length(length, kept, self.layers, self.dropping)
        if real is None:
            self.tokens += rows * effective
        elif whole_number("real", real, 0) > rows * length:
            raise InvalidValue(f"real = {real} tokens in {rows} rows of {length}; at most {rows * length} is possible")
        else:
            self.tokens += real * effective // length
        self.layer_tokens += layer_tokens(rows, length, kept, self.layers, self.dropping)
        self.rows += rows
        self.steps += 1
        return self.tokens

    @property
    def finished(self) -> bool:
        """Whether the budget is used up."""
        return self.budget is not None and self.tokens >= self.budget

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the numbers of layers they were made with."""
        names = ("tokens", "layer_tokens", "rows", "steps", "layers", "dropping")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from counts; :class:`InvalidValue` for those of other layers."""
        for name in ("layers", "dropping"):
            if state_dict.get(name) != getattr(self, name):
                raise InvalidValue(
                    f"the saved counts have {name} = {state_dict.get(name)}, this counter has {getattr(self, name)}"
                )
        counts = {name: whole_number(name, state_dict.get(name), 0)
                  for name in ("tokens", "layer_tokens", "rows", "steps")}  # fmt: skip
        vars(self).update(counts)


def planned_tokens(
    steps: int,
    rows: int,
    length: int,
    layers: int = 1,
    dropping: int = 0,
    curriculum: PacingFunction | None = None,
    kept: PacingFunction | None = None,
    reshaped: bool | None = None,
) -> TokenCounter:
    """The counts after ``steps`` steps of ``rows`` sequences, without training: what a schedule will consume.

    The curriculum's length is asked at step i + 1 and at most ``length``, the kept length at i. ``reshaped``, when it
    is not None, is ``shifted`` of :func:`~sparing.data_efficiency.postprocessing.reshape_batch`, which changes the
    number of rows.
    """
    from sparing.data_efficiency.postprocessing import reshaped_rows

    counter = TokenCounter(layers, dropping)
    length = whole_number("length", length, 1)
    now: float | None = None
    reserved: float | None = None
    for i in range(whole_number("steps", steps, 0)):
        now = None if curriculum is None else curriculum.after(now, i + 1)
        reserved = None if kept is None else kept.after(reserved, i)
        short = length if now is None else min(int(now), length)
        made = rows if reshaped is None else reshaped_rows(rows, length + reshaped, short + reshaped)
        counter.add(made, short, None if reserved is None else int(reserved))
    return counter


def count_tokens() -> Any:
    """A callback for a training plan that counts the tokens of the training, if its model has a stack of blocks."""
    from sparing.data_efficiency.callbacks import TokenCount

    return TokenCount(optional=True)


def counting(plan: TrainingPlan) -> TrainingPlan:
    """A plan with :func:`count_tokens`, once."""
    return plan if count_tokens in plan.callbacks else plan.adding(callbacks=count_tokens)


# --- the learning rate -----------------------------------------------------------------------------------------------


def token_lr(
    tokens: float, max_lr: float, min_lr: float, warmup_tokens: float, decay_tokens: float, style: str = "cosine"
) -> float:
    """The learning rate after ``tokens`` k have been consumed.

    With kᵥ = ``warmup_tokens``, kₑ = ``decay_tokens`` and ρ = (k − kᵥ) / (kₑ − kᵥ)::

        k ≤ kᵥ:        max · k / kᵥ
        kᵥ < k ≤ kₑ:   min + (1 − ρ) (max − min)              linear
                       min + ½ (1 + cos πρ) (max − min)       cosine
        k > kₑ:        min

    Without a warm-up (kᵥ = 0) the rate of k = 0 is max.
    """
    if tokens > decay_tokens:
        return min_lr
    if warmup_tokens and tokens <= warmup_tokens:
        return max_lr * tokens / warmup_tokens
    if tokens == warmup_tokens:
        return max_lr
    rho = (tokens - warmup_tokens) / (decay_tokens - warmup_tokens)
    falling = 1 - rho if style == "linear" else 0.5 * (1 + math.cos(math.pi * rho))
    return min_lr + falling * (max_lr - min_lr)


def peak_lr(max_lr: float, share: float) -> float:
    """The peak for a training on a ``share`` of the tokens: max_lr / share (the published recipes' rule)."""
    if not 0 < number("share", share) <= 1:
        raise InvalidValue(f"share = {share}; 0 < share ≤ 1 is needed")
    return max_lr / share


class TokenLR:
    """:func:`token_lr` for an optimizer.

    After the optimizer's step::

        counter.add(rows, length, kept)
        schedule.step(counter.tokens)

    The rate of the first step is that of no tokens: 0 with a warm-up. With layer tokens as the clock
    (``counter.layer_tokens``, and the limits in them: see :func:`planned_tokens`) it is LayerToken LR.

    Args:
        optimizer: its groups' ``lr`` is set.
        max_lr: the peak, for all groups or for each.
        min_lr: the rate at the end, ≤ every peak.
        decay_tokens: the count at which the end is reached.
        warmup_tokens: length of the warm-up in tokens; 0 for none.
        warmup_steps: or its length in steps: max · i / warmup_steps after i of them, and the tokens consumed by the
            last of these take the place of ``warmup_tokens`` from then on.
        style: "linear" or "cosine".

    Raises:
        InvalidValue: a number out of bounds, both lengths of warm-up, a warm-up that does not end before the decay.
    """

    tokens: float
    """Tokens consumed by the last :meth:`step`."""
    steps: int
    """Times that :meth:`step` was called."""

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        min_lr: float = 0.0,
        *,
        decay_tokens: float,
        warmup_tokens: float = 0,
        warmup_steps: int = 0,
        style: str = "cosine",
    ) -> None:
        groups = len(optimizer.param_groups)
        peaks = [max_lr] * groups if isinstance(max_lr, int | float) else list(max_lr)
        if len(peaks) != groups:
            raise InvalidValue(f"max_lr has {len(peaks)} values; the optimizer has {groups} groups of parameters")
        if not 0 <= number("min_lr", min_lr) <= min(number("max_lr", peak) for peak in peaks):
            raise InvalidValue(f"min_lr = {min_lr}, max_lr = {max_lr}; 0 ≤ min_lr ≤ max_lr is needed")
        if style not in STYLES:
            hint = did_you_mean(style, STYLES) if isinstance(style, str) else ""
            raise InvalidValue(f"style = {shown(style)}; one of {', '.join(STYLES)} is needed.{hint}")
        if warmup_tokens and warmup_steps:
            raise InvalidValue(f"warmup_tokens = {warmup_tokens} and warmup_steps = {warmup_steps}; give one of them")
        whole_number("warmup_steps", warmup_steps, 0)
        if not 0 <= number("warmup_tokens", warmup_tokens) < number("decay_tokens", decay_tokens):
            raise InvalidValue(
                f"warmup_tokens = {warmup_tokens}, decay_tokens = {decay_tokens}; "
                "0 ≤ warmup_tokens < decay_tokens is needed"
            )
        self.optimizer, self.peaks, self.min_lr, self.style = optimizer, peaks, min_lr, style
        self.decay_tokens, self.warmup_steps = decay_tokens, warmup_steps
        self.warmup_tokens: float | None = None if warmup_steps else warmup_tokens
        self.tokens, self.steps = 0, 0
        self._set()

    def step(self, tokens: float) -> None:
        """Set the rates of the next step from all tokens consumed so far, which cannot become fewer."""
        if number("tokens", tokens) < self.tokens:
            raise InvalidValue(f"tokens = {tokens} after {self.tokens}; all tokens consumed so far are expected")
        if self.warmup_tokens is None and self.steps + 1 == self.warmup_steps:
            if tokens >= self.decay_tokens:
                raise InvalidValue(
                    f"the warm-up of {self.warmup_steps} steps ends at {tokens} tokens, decay_tokens = "
                    f"{self.decay_tokens}; the decay must end later"
                )
            self.warmup_tokens = tokens
        self.tokens, self.steps = tokens, self.steps + 1
        self._set()

    def get_last_lr(self) -> list[float]:
        """The rates that are set, of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _set(self) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if self.warmup_tokens is None or self.steps < self.warmup_steps:
                group["lr"] = peak * self.steps / self.warmup_steps
            elif self.steps == self.warmup_steps and self.warmup_steps:
                group["lr"] = peak
            else:
                group["lr"] = token_lr(
                    self.tokens, peak, self.min_lr, self.warmup_tokens, self.decay_tokens, self.style
                )

    def config(self) -> dict[str, Any]:
        """What a saved state must agree on."""
        names = ("peaks", "min_lr", "style", "decay_tokens", "warmup_steps")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Tokens, steps, where the warm-up ended, and the settings."""
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "warmup_tokens": self.warmup_tokens,
            "config": self.config(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; :class:`InvalidValue` for one of other settings."""
        agree(state_dict.get("config", {}), self.config(), "TokenLR")
        if not self.warmup_steps and state_dict["warmup_tokens"] != self.warmup_tokens:
            raise InvalidValue(
                f"the saved state of TokenLR has warmup_tokens = {state_dict['warmup_tokens']}, this one has "
                f"{self.warmup_tokens}"
            )
        self.tokens, self.steps = state_dict["tokens"], state_dict["steps"]
        self.warmup_tokens = state_dict["warmup_tokens"]
        self._set()


# --- the step --------------------------------------------------------------------------------------------------------


@step("token_lr")
class TokenLr(Step):
    """Let the learning rate of the next training follow the tokens consumed, and end it at a budget of them.

    The peak is the learning rate of the training's optimizer. What counts is what is left of each batch: cut or folded
    by a curriculum, without padding where it can be told, and fewer tokens in layers that drop some.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    slots: ClassVar[frozenset[str]] = frozenset({"scheduler"})
    source: ClassVar[str] = (
        "Li et al. 2022, DeepSpeed Data Efficiency, arXiv:2212.03597, section 3.3; layer tokens of Yao et al. 2022, "
        "arXiv:2211.11586"
    )

    budget: int | None = Field(default=None, ge=1)
    """Tokens after which the training ends and the decay with it; the steps of the training are the most it may take.
    None: it makes its steps, and the decay takes what a dry run of the schedules says these consume."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Instead of a budget: this share of the tokens that the training's steps have at full length. The peak is then the
    training's learning rate / share, the rule of the published recipes, unless ``scale_peak`` is off."""
    scale_peak: bool = True
    """Divide the peak by ``share``."""
    clock: Literal["tokens", "layer_tokens"] = "tokens"
    """What is counted: tokens of the sequences ("tokens", by effective length) or of all layers together."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the decay's tokens in which the rate climbs from 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which it climbs, instead of a share."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end."""
    style: Literal["cosine", "linear"] = "cosine"
    """Form of the decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.share is not None:
            raise InvalidValue(f"{self.id}: budget = {self.budget} and share = {self.share:g}; give one of them")

    def apply(self, job: Job) -> Job:
        """The job, whose next training goes by tokens."""
        from sparing.data_efficiency.token_dropping import seen_length

        length, layers = seen_length(job.fresh_model(), job.task)
        ends = "after the training's steps"
        if self.budget is not None:
            ends = f"after {self.budget:,} {self.clock.replace('_', ' ')}"
        elif self.share is not None:
            ends = f"after {self.share:.0%} of the tokens that its steps have at full length"
        job.notes.remarks.append(
            f"the learning rate of the next training goes by the {self.clock.replace('_', ' ')} consumed in {layers} "
            f"layers, sequences of up to {length}; it ends {ends}"
        )

        def callback() -> Any:
            from sparing.data_efficiency.callbacks import TokenLRCallback

            return TokenLRCallback(
                budget=self.budget,
                share=self.share,
                scale_peak=self.scale_peak,
                clock=self.clock,
                warmup=self.warmup,
                warmup_steps=self.warmup_steps,
                min_lr=self.min_lr,
                style=self.style,
                length=length,
            )

        # the slot is taken, and the rate set by the callback, which sees the batches
        plan = counting(job.training).adding(scheduler=_no_other_schedule, callbacks=callback)
        return job.replace(training=plan)


def _no_other_schedule(optimizer: Optimizer, total: int) -> None:
    return None
