"""Curriculum, token dropping and token clocks in Lightning: of Sparing's trainings, and of scripts of your own.

In a script, a curriculum is the loader's batch sampler, and its place is kept by a callback::

    loader = DataLoader(CurriculumItems(data), batch_sampler=sampler, collate_fn=CurriculumCollate(cut))
    callbacks = [
        CurriculumCallback(sampler),
        TokenDroppingCallback(linear(128, 1024, 10_000, 8), kind="decoder"),
        TokenCount(),
        TokenLRCallback(budget=2_000_000_000),
    ]
    Trainer(max_epochs=1, callbacks=callbacks, use_distributed_sampler=False).fit(module, loader)

All state is in Lightning's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.training.callbacks import ResumedCallback, network_of, training_steps
from sparing.data_efficiency.curriculum import LENGTH, CurriculumBatches, padding_of
from sparing.data_efficiency.pacing import PacingFunction
from sparing.data_efficiency.sampler import CurriculumSampler
from sparing.data_efficiency.token_dropping import TokenDropping, drop_tokens, find_blocks, in_backward
from sparing.data_efficiency.tokens import TokenCounter, TokenLR, layer_tokens, planned_tokens

# --- curriculum ------------------------------------------------------------------------------------------------------


class CurriculumCallback(ResumedCallback):
    """Keeps a curriculum's place in the checkpoints.

    Args:
        sampler: the loader's; None: the batches of a training of Sparing.
    """

    def __init__(self, sampler: CurriculumSampler | None = None) -> None:
        self.sampler, self.consumed = sampler, 0
        self._batches: CurriculumBatches | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on from the checkpoint, before the loader draws a batch."""
        if self.sampler is None:
            found = getattr(pl_module, "batches", None)
            if not isinstance(found, CurriculumBatches):
                raise InvalidValue("CurriculumCallback() is for trainings of Sparing; give it the loader's sampler")
            self._batches = found
        state = self.taken_state()
        if state is None:
            self.consumed = 0 if self.sampler is None else self.sampler.yielded
        elif self._batches is not None:
            self._batches.load_state_dict(state["batches"])
        else:
            assert self.sampler is not None
            self.sampler.load_state_dict(state["sampler"])
            self.consumed = self.sampler.yielded

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One more batch is consumed; a training of Sparing draws the curves of its difficulties."""
        self.consumed += 1
        if self._batches is not None and pl_module.figures["batches"] % pl_module.every == 0:
            at = self._batches.difficulties(trainer.current_epoch, batch_idx)
            pl_module.curve({f"difficulty: {name}": value for name, value in at.items()})

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state after the batches that were consumed."""
        if self._batches is not None:
            return {"batches": self._batches.state_dict()}
        return {} if self.sampler is None else {"sampler": self.sampler.state_dict(self.consumed)}


# --- token dropping --------------------------------------------------------------------------------------------------


class TokenDroppingCallback(ResumedCallback):
    """Random layerwise token dropping through a training (:func:`~sparing.data_efficiency.token_dropping.drop_tokens`).

    Args:
        schedule: r_t at optimizer step t, or a function that makes it for a training of so many steps.
        network: name of the Lightning module's attribute that holds the network.
        settings: further arguments of ``drop_tokens``: layers, kind, stack …

    Raises:
        InvalidValue: when the training begins: no such network, what ``drop_tokens`` refuses, a training of unknown
            length with a schedule that needs it.
    """

    def __init__(
        self,
        schedule: PacingFunction | Callable[[int], PacingFunction],
        *,
        network: str = "model",
        **settings: Any,
    ) -> None:
        self.given, self.network, self.settings = schedule, network, settings
        self.dropping: TokenDropping | None = None
        """There while the training goes on."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the layers."""
        self.begin(trainer, pl_module)

    def begin(self, trainer: Any, pl_module: Any) -> TokenDropping:
        """Hook the layers, if that is not done yet: what counts tokens may come first."""
        if self.dropping is not None:
            return self.dropping
        schedule = self.given
        if not isinstance(schedule, PacingFunction):
            schedule = schedule(training_steps(trainer, pl_module))
        self.dropping = drop_tokens(network_of(pl_module, self.network), schedule, **self.settings)
        if (state := self.taken_state()) is not None:
            self.dropping.load_state_dict(state["dropping"])
        return self.dropping

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The next r_t, if this batch ended an optimizer step."""
        if not self.stepped(trainer) or self.dropping is None:
            return
        before = self.dropping.reserved_length
        self.dropping.step()
        if self.dropping.reserved_length != before and callable(curve := getattr(pl_module, "curve", None)):
            curve({"tokens kept": float(self.dropping.reserved_length)})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks out."""
        if self.dropping is not None and stage == "fit":
            self.dropping.remove()
            self.dropping = None

    def state_dict(self) -> dict[str, Any]:
        """Of the dropping."""
        return {} if self.dropping is None else {"dropping": self.dropping.state_dict()}


# --- counting --------------------------------------------------------------------------------------------------------


class TokenCount(ResumedCallback):
    """Counts the tokens that a training really computes, as its first block is given them, in all processes.

    In a training of Sparing the figures are recorded in its row, beside what the same samples cost at full length.

    Args:
        real: batch → its tokens that are no padding; None: in a training of Sparing what the batch's mask or the
            padding number says, else all.
        stack: name of the blocks' container, as of ``drop_tokens``; None: the one that drops tokens, or the longest.
        network: name of the Lightning module's attribute that holds the network.
        optional: count nothing, instead of raising, when the model has no stack of blocks.

    Raises:
        InvalidValue: when the training begins: no such network or stack.
    """

    def __init__(
        self,
        real: Callable[[Any], int] | None = None,
        *,
        stack: str | None = None,
        network: str = "model",
        optional: bool = False,
    ) -> None:
        self.real, self.stack, self.network, self.optional = real, stack, network, optional
        self.counter: TokenCounter | None = None
        """There from the training's beginning on, unless the model has no stack of blocks."""
        self.full_layer_tokens = 0
        """Layer tokens that the same samples have at full length, with none dropped."""
        self.operations, self.full_operations = 0.0, 0.0
        """Multiply-accumulates of the blocks' linear layers and attention, forward; and those of full length."""
        self._dropping: TokenDroppingCallback | None = None
        self._hook: Any = None
        self._weights = 0
        self._full: int | None = None
        self._samples: int | None = None
        self._now: int | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook the first block."""
        found = [callback for callback in trainer.callbacks if isinstance(callback, TokenDroppingCallback)]
        self._dropping = found[0] if found else None
        stack = self.stack if self._dropping is None else self._dropping.settings.get("stack", self.stack)
        try:
            blocks = find_blocks(network_of(pl_module, self.network), stack)
        except InvalidValue:
            if not self.optional:
                raise
            return
        dropped = 0 if self._dropping is None else len(self._dropping.begin(trainer, pl_module).dropping)
        self.counter = TokenCounter(len(blocks), dropped)
        self._weights = sum(p.numel() for p in blocks[0].parameters() if p.ndim == 2)
        curriculum = getattr(getattr(pl_module, "batches", None), "curriculum", {})
        self._full = int(curriculum[LENGTH].pacing.max_difficulty) if LENGTH in curriculum else None
        if (state := self.taken_state()) is not None:
            self.counter.load_state_dict(state["counter"])
            self.full_layer_tokens = state["full_layer_tokens"]
            self.operations, self.full_operations = state["operations"]
        self._hook = blocks[0].register_forward_pre_hook(self._count, with_kwargs=True, prepend=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Tokens of this batch that are no padding, and the samples it was made of."""
        if self.counter is None:
            return
        self._now = self.real(batch) if self.real is not None else real_tokens(batch, getattr(pl_module, "task", None))
        share = getattr(pl_module, "share", None)
        self._samples = share(trainer.current_epoch, batch_idx)[1] if callable(share) else None

    def _count(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if not block.training or self.counter is None or in_backward():
            return
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        layout = "batch_seq_dim" if self._dropping is None else self._dropping.settings.get("layout", "batch_seq_dim")
        rows, length = hidden.shape[:2] if layout == "batch_seq_dim" else (hidden.shape[1], hidden.shape[0])
        dropping = None if self._dropping is None else self._dropping.dropping
        kept = length if dropping is None else min(length, dropping.reserved_length)
        samples = rows if self._samples is None else self._samples
        real = rows * length if self._now is None else min(self._now, rows * length)
        for parts in gathered([rows, length, kept, real, samples], hidden.device):
            self._add(parts, hidden.shape[2])

    def _add(self, parts: list[int], dim: int) -> None:
        rows, length, kept, real, samples = parts
        assert self.counter is not None
        layers, dropping = self.counter.layers, self.counter.dropping
        self.counter.add(rows, length, kept, real)
        full = max(length, self._full or length)
        self.full_layer_tokens += layer_tokens(samples, full, full, layers, dropping)

        def cost(tokens: int) -> float:
            return tokens * self._weights + 2.0 * tokens * tokens * dim

        self.operations += rows * (dropping * cost(kept) + (layers - dropping) * cost(length))
        self.full_operations += samples * layers * cost(full)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the figures of a training of Sparing."""
        if self.counter is None or not self.counter.steps or not callable(record := getattr(pl_module, "record", None)):
            return
        record("consumed tokens", self.counter.tokens, "", "lower")
        record("layer tokens", self.counter.layer_tokens, "", "lower")
        record("layer tokens saved", 1 - self.counter.layer_tokens / self.full_layer_tokens, "of full length", "higher")
        record("operations saved in blocks", 1 - self.operations / self.full_operations, "of full length", "higher",
               "derived")  # fmt: skip

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook out."""
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        if self.counter is None:
            return {}
        return {
            "counter": self.counter.state_dict(),
            "full_layer_tokens": self.full_layer_tokens,
            "operations": [self.operations, self.full_operations],
        }


def real_tokens(batch: Any, task: Any) -> int | None:
    """Tokens of a batch of Sparing's tasks that are no padding; of a causal model those predicted. None: not known."""
    inputs = batch
    while isinstance(inputs, tuple | list) and inputs:
        inputs = inputs[0]
    if isinstance(inputs, Mapping) and isinstance(mask := inputs.get("attention_mask"), Tensor):
        shifted = "causal_lm" in getattr(task, "capabilities", ())
        return int((mask[:, 1:] if shifted else mask).sum())
    pad = padding_of(task)
    if pad is not None and isinstance(inputs, Tensor) and not inputs.is_floating_point():
        return int((inputs != pad).sum())
    return None


def gathered(numbers: list[int], device: torch.device) -> list[list[int]]:
    """The numbers of all processes."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [numbers]
    own = torch.tensor(numbers, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return [part.tolist() for part in every]


# --- the clock of the learning rate ----------------------------------------------------------------------------------


class TokenLRCallback(ResumedCallback):
    """Sets the learning rate by the tokens that a :class:`TokenCount` before it has counted; may end the training.

    The module configures no schedule of its own, and one optimizer, whose learning rate is the peak.

    Args:
        budget: count after which the training ends; the decay ends there, too.
        share: of what the training's steps have at full length, in place of a budget; needs ``length`` and a training
            of Sparing.
        scale_peak: divide the peak by ``share``.
        clock: "tokens" or "layer_tokens".
        warmup: share of the decay in which the rate climbs.
        warmup_steps: steps in which it climbs, instead; 0: the share.
        min_lr: the rate at the end.
        style: "cosine" or "linear".
        length: tokens of a full sequence, for a training of Sparing: without a budget, a dry run of the schedules says
            how many its steps will consume.
        decay: count at which the decay ends, where the training is not to end by it.

    Raises:
        InvalidValue: when the training begins: no counter, several optimizers, or what ``TokenLR`` refuses.
        IncompatibleStep: a model whose tokens cannot be counted.
    """

    def __init__(
        self,
        budget: int | None = None,
        *,
        share: float | None = None,
        scale_peak: bool = True,
        clock: Literal["tokens", "layer_tokens"] = "tokens",
        warmup: float = 0.05,
        warmup_steps: int = 0,
        min_lr: float = 0.0,
        style: str = "cosine",
        length: int | None = None,
        decay: int | None = None,
    ) -> None:
        if budget is None and decay is None and length is None:
            raise InvalidValue(
                "TokenLRCallback needs a budget, or decay: the count at which the learning rate has fallen"
            )
        self.budget, self.share, self.scale_peak, self.clock = budget, share, scale_peak, clock
        self.warmup, self.warmup_steps, self.min_lr, self.style = warmup, warmup_steps, min_lr, style
        self.length, self.decay = length, decay
        self.schedule: TokenLR | None = None
        """There from the training's beginning on."""
        self._count: TokenCount | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Know the counter, the peak and the decay."""
        counts = [callback for callback in trainer.callbacks if isinstance(callback, TokenCount)]
        if not counts or trainer.callbacks.index(counts[0]) > trainer.callbacks.index(self):
            raise InvalidValue("TokenLRCallback needs a TokenCount before it in the trainer's callbacks")
        if len(trainer.optimizers) != 1:
            raise InvalidValue(f"{len(trainer.optimizers)} optimizers; one is needed")
        self._count = counts[0]
        if self._count.counter is None:
            raise IncompatibleStep("the model has no stack of blocks, so its tokens cannot be counted")
        if self.share is not None:
            self.budget = int(self.share * self._planned(trainer, pl_module, full=True))
        decay = self.decay or self.budget or self._planned(trainer, pl_module, full=False)
        optimizer = trainer.optimizers[0]
        peaks = [
            group["lr"] / (self.share if self.share and self.scale_peak else 1) for group in optimizer.param_groups
        ]
        self.schedule = TokenLR(
            optimizer,
            peaks,
            self.min_lr,
            decay_tokens=decay,
            warmup_tokens=0 if self.warmup_steps else self.warmup * decay,
            warmup_steps=self.warmup_steps,
            style=self.style,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on from a checkpoint, after the optimizer's state was loaded."""
        super().on_train_start(trainer, pl_module)
        if self.schedule is not None and (state := self.taken_state()) is not None:
            self.schedule.load_state_dict(state["schedule"])

    def _planned(self, trainer: Any, pl_module: Any, full: bool) -> int:
        """Tokens on the clock that the steps of a training of Sparing will take."""
        assert self._count is not None
        assert self._count.counter is not None
        settings, counter = getattr(pl_module, "settings", None), self._count.counter
        if self.length is None or settings is None:
            raise InvalidValue("how many tokens the training will take is not known; give a budget, or decay")
        batches = pl_module.batches
        length, kept, dropping = None, None, self._count._dropping
        if isinstance(batches, CurriculumBatches) and LENGTH in batches.curriculum and not full:
            length = batches.curriculum[LENGTH].pacing
        if dropping is not None and dropping.dropping is not None and not full:
            kept = dropping.dropping.schedule
        reshaped = None if length is None else batches.reshaped
        planned = planned_tokens(
            pl_module.total_steps,
            batches.batch_size,
            self.length,
            counter.layers,
            counter.dropping,
            length,
            kept,
            reshaped,
        )
        return int(getattr(planned, self.clock)) * settings.accumulate

    @property
    def consumed(self) -> int:
        """The clock."""
        assert self._count is not None
        return int(getattr(self._count.counter, self.clock))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The next step's rate, if this batch ended a step; the end, if the budget is used up."""
        if not self.stepped(trainer) or self.schedule is None:
            return
        self.schedule.step(self.consumed)
        if self.budget is not None and self.consumed >= self.budget:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so when budget or decay were not reached."""
        if self.schedule is None or not callable(tell := getattr(pl_module, "tell", None)):
            return
        clock, decay = self.clock.replace("_", " "), self.schedule.decay_tokens
        if self.budget is not None and self.consumed < self.budget:
            tell(
                f"the training ended after {self.consumed:,} of {self.budget:,} {clock}: it has too few steps for them"
            )
        elif self.budget is None and self.consumed < 0.99 * decay:
            tell(f"the training consumed {self.consumed:,} {clock}, and its learning rate would have fallen until "
                 f"{decay:,.0f}: batches are padded, or not full. Give a budget")  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Of the schedule."""
        return {} if self.schedule is None else {"schedule": self.schedule.state_dict()}
