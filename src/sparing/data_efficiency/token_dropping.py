"""Random layerwise token dropping: each middle layer computes a fresh random subset of the tokens.

Yao et al. 2022, Random-LTD, arXiv:2211.11586; Li et al. 2022, arXiv:2212.03597, section 3.2. In training, a layer of
the chosen ones is given r_t of a sequence's T tokens, drawn for each sample and layer and kept in order; the others
pass it unchanged. In a loop of your own::

    dropping = drop_tokens(model, schedule=linear(128, 1024, 10_000, 8), kind="decoder")
    for batch in loader:
        ...                      # forward, backward, optimizer step
        dropping.step()          # once for each optimizer step
    dropping.remove()

Layers are hooked, not wrapped: the model's names and weights stay as they are.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn

from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, SparingError, did_you_mean, shown
from sparing.core.randomness import derive_seed
from sparing.core.step import Stage, Step, step
from sparing.data_efficiency.pacing import PacingFunction, linear
from sparing.data_efficiency.settings import agree, distributed, whole_number
from sparing.data_efficiency.tokens import counting

if TYPE_CHECKING:
    from sparing.core.job import Job

VERSION = 1
MASKS = ("attention_mask", "mask", "attn_mask", "src_mask", "src_key_padding_mask", "key_padding_mask")
"""Arguments of layers that are taken for masks."""
POSITIONS = ("position_ids", "position_embeddings", "alibi")
"""Arguments that say where a token stands; tuples, as of cosines and sines, are taken apart."""

Kind = Literal["decoder", "encoder"]
Layout = Literal["batch_seq_dim", "seq_batch_dim"]


# --- the method ------------------------------------------------------------------------------------------------------


def sample_tokens(
    layers: int, batch: int, length: int, kept: int, generator: torch.Generator
) -> Int[Tensor, "layers batch kept"]:
    """Positions that each layer computes of each sample: uniform without replacement, growing (layers, B, r)."""
    if not 1 <= kept <= length:
        raise InvalidValue(f"kept = {kept} of length = {length} tokens; 1 … {length} is possible")
    keys = torch.rand(layers, batch, length, generator=generator, device=generator.device)
    return keys.topk(kept, dim=2).indices.sort(dim=2).values


def gather_tokens(hidden: Shaped[Tensor, "b t ..."], indices: Int[Tensor, "b r"]) -> Shaped[Tensor, "b r ..."]:
    """The rows of each sample at its indices: (B, T, …) → (B, r, …)."""
    rows = hidden.flatten(0, 1).index_select(
        0, _rows(indices, hidden.shape[1])
    )  # whole rows: gather copies each number
    return rows.unflatten(0, indices.shape)


def scatter_tokens(
    hidden: Float[Tensor, "b t d"], computed: Float[Tensor, "b r d"], indices: Int[Tensor, "b r"]
) -> Float[Tensor, "b t d"]:
    """``hidden`` with the rows at each sample's indices replaced by ``computed``, in the latter's type."""
    batch, length = hidden.shape[:2]
    rows = hidden.to(computed.dtype).flatten(0, 1).index_copy(0, _rows(indices, length), computed.flatten(0, 1))
    return rows.unflatten(0, (batch, length))


def keep_mask(
    mask: Shaped[Tensor, "..."], indices: Int[Tensor, "b r"], length: int, kind: Kind
) -> Shaped[Tensor, "..."]:
    """The mask of the kept tokens.

    A mask whose last two axes are queries and keys, (B or 1, T, T) or (B or 1, heads or 1, T or 1, T), is gathered on
    each axis of size T by each sample's own indices, so that padding and windows stay right. Of a decoder's mask
    (T, T), which all samples share, [:r, :r] is left: of a causal one that is the same, as the indices grow. An
    encoder's mask (B, T) says which keys are padding.

    Args:
        mask: of any type.
        indices: positions kept (B, r).
        length: T.
        kind: what a mask of two axes means.

    Raises:
        InvalidValue: a mask of another shape.
    """
    batch, kept = indices.shape
    if mask.ndim == 2 and kind == "decoder" and mask.shape == (length, length):
        return mask[:kept, :kept]
    if mask.ndim == 2 and mask.shape[0] in (1, batch) and mask.shape[1] == length:
        return mask.expand(batch, -1).gather(1, indices)
    fits = (
        mask.ndim in (3, 4)
        and mask.shape[-1] == length
        and mask.shape[-2] in (1, length)
        and mask.shape[0] in (1, batch)
    )
    if not fits:
        raise InvalidValue(
            f"a mask {tuple(mask.shape)} with {batch} samples of {length} tokens and kind = {kind!r}; (T, T) for a "
            "decoder, (B, T) for an encoder, (B, T, T) or (B, heads, T, T) is expected; axes but the last may be 1"
        )
    mask = mask.expand(batch, *mask.shape[1:])
    for axis in (-2, -1):
        if mask.shape[axis] == length:
            shape = [batch] + [1] * (mask.ndim - 1)
            shape[axis] = kept
            wide = list(mask.shape)
            wide[axis] = kept
            mask = mask.gather(axis, indices.view(shape).expand(wide))
    return mask


def keep_positions(positions: Shaped[Tensor, "..."], indices: Int[Tensor, "b r"], length: int) -> Shaped[Tensor, "..."]:
    """Positions, their embeddings or biases on keys, of the kept tokens.

    (B or 1, T), (B or 1, T, …) and (T, d) have the tokens in the axis before the features; (B · heads, 1, T) is ALiBi's
    bias.
    """
    batch = len(indices)
    if positions.ndim == 3 and positions.shape[1:] == (1, length) and positions.shape[0] % batch == 0 and length > 1:
        heads = positions.shape[0] // batch
        return positions.gather(2, indices.repeat_interleave(heads, 0)[:, None])
    if positions.shape[0] == length and positions.ndim <= 2 and (positions.ndim == 1 or positions.shape[1] != length):
        positions = positions[None]
    if positions.ndim < 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != length:
        raise InvalidValue(
            f"positions {tuple(positions.shape)}; (B, T, …) with {batch} samples of {length} tokens is expected"
        )
    return gather_tokens(positions.expand(batch, *positions.shape[1:]), indices)


def _rows(indices: Tensor, length: int) -> Tensor:
    """Numbers of the rows in a batch whose sequences lie one behind the other."""
    return (indices + length * torch.arange(len(indices), device=indices.device)[:, None]).flatten()


def in_backward() -> bool:
    """Whether gradients are being computed in this thread.

    torch has no public way to ask; its own checkpointing asks as this does. Raises :class:`SparingError` for a torch
    that no longer answers, since layers that run again would then compute other tokens than they did.
    """
    ask = getattr(torch._C, "_current_graph_task_id", None)
    if ask is None:
        raise SparingError(
            f"token dropping cannot tell a layer's second run in the backward pass from a first one with torch "
            f"{torch.__version__}: torch._C._current_graph_task_id is gone. Use an earlier torch"
        )
    return ask() != -1


# --- on a model ------------------------------------------------------------------------------------------------------


class TokenDropping:
    """Token dropping at work in a model; made by :func:`drop_tokens`. Its ``with`` block ends with :meth:`remove`."""

    step_number: int
    """t: optimizer steps made."""
    reserved_length: int
    """r_t: tokens that the dropping layers compute of a longer sequence."""
    layers: int
    """L: blocks of the stack."""
    dropping: list[int]
    """Numbers of the blocks that drop tokens."""
    last_indices: Tensor | None
    """Positions of the last forward pass in training (n, B, r); None when no token was dropped in it."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        dropping: Sequence[int],
        schedule: PacingFunction,
        kind: Kind,
        mask_args: Sequence[str],
        position_args: Sequence[str],
        layout: Layout,
        seed: int,
        rank: int,
    ) -> None:
        self.schedule, self.kind, self.layout, self.seed, self.rank = schedule, kind, layout, seed, rank
        self.mask_args, self.position_args = tuple(mask_args), tuple(position_args)
        self.layers, self.dropping = len(blocks), list(dropping)
        self.step_number, self._passes = 0, 0
        self.reserved_length = int(schedule.after(None, 0))
        self.last_indices = None
        self._last_place, self._length, self._warned = len(dropping), 0, False
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._signatures = {number: inspect.signature(blocks[number].forward) for number in dropping}
        self._hooks: list[Any] = []
        for place, number in enumerate(dropping):
            block = blocks[number]
            self._hooks += [
                block.register_forward_pre_hook(partial(self._before, place, number), with_kwargs=True),
                block.register_forward_hook(partial(self._after, place, number), with_kwargs=True),
            ]

    def step(self) -> None:
        """Go to the next optimizer step: a new r_t."""
        self.step_number += 1
        self._passes = 0
        self.reserved_length = int(self.schedule.after(self.reserved_length, self.step_number))

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def config(self) -> dict[str, Any]:
        """What a saved state must agree on."""
        return {
            "schedule": self.schedule.config(),
            "kind": self.kind,
            "layers": self.layers,
            "dropping": self.dropping,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Step, reserved length, forward passes within the step, settings: what, with the seed, the draws depend on."""
        return {
            "version": VERSION,
            "config": self.config(),
            "step": self.step_number,
            "reserved_length": self.reserved_length,
            "passes": self._passes,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; :class:`InvalidValue` for one of other settings."""
        if state_dict.get("version") != VERSION:
            raise InvalidValue(f"a state of version {shown(state_dict.get('version'))}; {VERSION} is expected")
        agree(state_dict["config"], self.config(), "TokenDropping")
        self.step_number, self._passes = state_dict["step"], state_dict["passes"]
        self.reserved_length = state_dict["reserved_length"]

    # --- hooks

    def _draw(self, batch: int, length: int, device: torch.device) -> None:
        """Positions for all dropping layers of one forward pass."""
        seed = derive_seed(self.seed, "token dropping", self.rank, self.step_number, self._passes)
        generator = torch.Generator(device).manual_seed(seed)
        self.last_indices = sample_tokens(len(self.dropping), batch, length, self.reserved_length, generator)
        self._length = length
        self._passes += 1

    def _before(self, place: int, number: int, block: nn.Module, args: Any, kwargs: Any) -> Any:
        self._pending.pop(place, None)
        if not block.training:
            return None
        bound = self._signatures[number].bind(*args, **kwargs)
        given = bound.arguments
        first = next(iter(given), "")
        hidden = given.get(first)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise InvalidValue(
                f"layer {number} ({type(block).__name__}) is given {shown(hidden)} first; hidden states of three axes "
                "are expected"
            )
        hidden = hidden if self.layout == "batch_seq_dim" else hidden.transpose(0, 1)
        batch, length = hidden.shape[:2]
        if self.reserved_length >= length:
            return None
        # while gradients are computed a layer runs again for activations that were not kept: with its old positions
        if not in_backward():
            if place <= self._last_place:
                self._draw(batch, length, hidden.device)
            self._last_place = place
        assert self.last_indices is not None
        if self.last_indices.shape[1] != batch or self._length != length:
            raise InvalidValue(
                f"layer {number} is given {batch} sequences of {length} tokens, the dropping layers before it "
                f"{self.last_indices.shape[1]} of {self._length}; the same is expected in all of them"
            )
        indices = self.last_indices[place]
        kept = gather_tokens(hidden, indices)
        self._pending[place] = (hidden, indices)
        given[first] = kept if self.layout == "batch_seq_dim" else kept.transpose(0, 1)
        parameters = self._signatures[number].parameters
        more = [given[name] for name in given if parameters[name].kind is inspect.Parameter.VAR_KEYWORD]
        masks = [name for name in self.mask_args if name in parameters]
        if self.kind == "encoder" and masks and not self._warned and all(given.get(name) is None for name in masks):
            self._warned = True
            warnings.warn(
                f"layer {number} of an encoder is given no {' or '.join(masks)}: padding, if any, is attended to",
                stacklevel=2,
            )
        for arguments in (given, *more):
            for name in self.mask_args:
                if arguments.get(name) is not None:
                    arguments[name] = self._kept_mask(name, arguments[name], indices, number)
            for name in self.position_args:
                if arguments.get(name) is not None:
                    arguments[name] = self._kept_positions(name, arguments[name], indices, number)
        return bound.args, bound.kwargs

    def _after(self, place: int, number: int, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if place not in self._pending:
            return None
        hidden, indices = self._pending.pop(place)
        computed = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(computed, Tensor) or computed.ndim != 3:
            raise InvalidValue(
                f"layer {number} ({type(block).__name__}) returns {shown(output)}; hidden states, or a tuple that "
                "begins with them, are expected"
            )
        computed = computed if self.layout == "batch_seq_dim" else computed.transpose(0, 1)
        whole = scatter_tokens(hidden, computed, indices)
        whole = whole if self.layout == "batch_seq_dim" else whole.transpose(0, 1).contiguous()
        if isinstance(output, Tensor):
            return whole
        if hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: whole})
        return type(output)([whole, *output[1:]])

    def _kept_mask(self, name: str, mask: Any, indices: Tensor, number: int) -> Tensor:
        if not isinstance(mask, Tensor):
            raise InvalidValue(f"layer {number} is given {name} = a {type(mask).__name__}; only tensors can be cut")
        kind: Kind = "encoder" if "key_padding" in name else self.kind
        return keep_mask(mask, indices, self._length, kind)

    def _kept_positions(self, name: str, positions: Any, indices: Tensor, number: int) -> Any:
        if isinstance(positions, tuple | list):
            return type(positions)(self._kept_positions(name, part, indices, number) for part in positions)
        if not isinstance(positions, Tensor):
            raise InvalidValue(f"layer {number} is given {name} = a {type(positions).__name__}; tensors are expected")
        return keep_positions(positions, indices, self._length)


def drop_tokens(
    model: nn.Module,
    schedule: PacingFunction,
    layers: Collection[int | str] | Callable[[int, nn.Module], bool] | None = None,
    *,
    kind: Kind,
    stack: str | Sequence[nn.Module] | None = None,
    mask_args: Sequence[str] = MASKS,
    position_args: Sequence[str] = POSITIONS,
    layout: Layout = "batch_seq_dim",
    allow_ends: bool = False,
    seed: int = 0,
    rank: int | None = None,
) -> TokenDropping:
    """Let some layers of a stack of transformer blocks drop tokens in training, until ``remove()`` is called.

    A block's first argument and its output (or the first of them) must be hidden states of three axes. A layer that
    counts positions by itself, within its ``forward``, would count the kept ones; such a model is not for this method.

    Args:
        model: holds the stack.
        schedule: r_t at optimizer step t = 0, 1, …; at most the full length where dropping is to end.
        layers: numbers in the stack or full names, or a predicate of both number and block; None: all but the first and
            the last.
        kind: "decoder": a token sees those before it; "encoder": it sees all.
        stack: name of the blocks' container in the model, or the blocks; None: the longest container of three or more
            blocks of one class, if there is just one.
        mask_args: arguments of the blocks that are masks (see :func:`keep_mask`); others are ignored.
        position_args: arguments that say where tokens stand (see :func:`keep_positions`).
        layout: "batch_seq_dim" for hidden states (B, T, D), "seq_batch_dim" for (T, B, D).
        allow_ends: let the first and the last layer drop tokens, which the paper never does.
        seed: of the draws, which leave the global generators alone.
        rank: processes of different ranks draw differently; None: torch.distributed's, or 0.

    Raises:
        InvalidValue: no stack, or several; unknown, repeated or end layers; a schedule that does not keep 1 token.
    """
    for name, value, choices in (("kind", kind, Kind), ("layout", layout, Layout)):
        if value not in get_args(choices):
            raise InvalidValue(f"{name} = {shown(value)}; one of {', '.join(get_args(choices))} is needed")
    if not isinstance(schedule, PacingFunction):
        raise InvalidValue(f"schedule = {shown(schedule)}; a PacingFunction is needed")
    if schedule.min_difficulty < 1 or int(schedule(0)) < 1:
        raise InvalidValue(f"the schedule begins with {schedule(0)} tokens; at least 1 must be kept")
    in_backward()  # refused now, not in the first forward pass
    blocks = find_blocks(model, stack)
    chosen = _chosen(model, blocks, layers, allow_ends)
    return TokenDropping(
        blocks,
        chosen,
        schedule,
        kind,
        mask_args,
        position_args,
        layout,
        whole_number("seed", seed, 0),
        distributed()[0] if rank is None else whole_number("rank", rank, 0),
    )


def find_blocks(model: nn.Module, stack: str | Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """The stack of blocks of a model, as :func:`drop_tokens` takes it; :class:`InvalidValue` when there is none."""
    if isinstance(stack, str):
        found = dict(model.named_modules())
        if stack not in found:
            raise InvalidValue(f"stack = {stack!r}: the model has no such module.{did_you_mean(stack, found)}")
        blocks = list(found[stack].children())
    elif stack is not None:
        blocks = list(stack)
    else:
        stacks = {
            name: list(module.children())
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential)
            and len(module) >= 3
            and len({type(child) for child in module.children()}) == 1
        }
        longest = max(map(len, stacks.values()), default=0)
        names = [name for name, blocks in stacks.items() if len(blocks) == longest]
        if len(names) != 1:
            raise InvalidValue(
                f"{type(model).__name__} has {len(names)} stacks of {longest} equal blocks ({', '.join(names)}); say "
                "which by stack=…"
                if names
                else f"{type(model).__name__} has no container of three or more blocks of one class; give stack=…"
            )
        blocks = stacks[names[0]]
    if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
        raise InvalidValue(f"stack = {shown(stack)}; blocks are expected")
    return blocks


def _chosen(
    model: nn.Module,
    blocks: list[nn.Module],
    layers: Collection[int | str] | Callable[[int, nn.Module], bool] | None,
    allow_ends: bool,
) -> list[int]:
    count = len(blocks)
    names = dict(model.named_modules(remove_duplicate=False))
    numbers = {name: blocks.index(module) for name, module in names.items() if module in blocks}
    if layers is None:
        chosen = list(range(1, count - 1))
    elif callable(layers):
        chosen = [number for number, block in enumerate(blocks) if layers(number, block)]
    else:
        chosen = []
        for layer in layers:
            if isinstance(layer, str) and layer not in numbers:
                raise InvalidValue(f"there is no layer {layer!r} in the stack.{did_you_mean(layer, numbers)}")
            number = numbers[layer] if isinstance(layer, str) else whole_number("a layer", layer, 0)
            if number >= count:
                raise InvalidValue(f"there is no layer {number}; the stack has 0 … {count - 1}")
            if number in chosen:
                raise InvalidValue(f"layer {number} is there twice")
            chosen.append(number)
    if not chosen:
        raise InvalidValue(f"no layer of the stack of {count} is to drop tokens; at least one is needed")
    ends = [number for number in chosen if number in (0, count - 1)]
    if ends and not allow_ends:
        raise InvalidValue(
            f"layer {ends[0]} is the {'first' if ends[0] == 0 else 'last'} of {count}, which computes all tokens; "
            f"choose among 1 … {count - 2}, or allow_ends=True"
        )
    if len({id(blocks[number]) for number in chosen}) < len(chosen):
        raise InvalidValue("a block stands in the stack twice and shares its weights; it cannot drop tokens")
    return sorted(chosen)


# --- the step --------------------------------------------------------------------------------------------------------


def seen_length(model: nn.Module, task: Any, stack: str | None = None) -> tuple[int, int]:
    """(T, L): tokens of a full sequence as the blocks are given it, and the number of blocks.

    T is the task's ``length`` where it has one, and what the first block is given of the example input where that is
    more: examples vary in length.

    Raises :class:`IncompatibleStep` for a model without a stack of blocks that take hidden states of three axes.
    """
    try:
        blocks = find_blocks(model, stack)
    except InvalidValue as error:
        raise IncompatibleStep(f"this needs a model of equal blocks on sequences of tokens: {error}") from None
    shapes: list[tuple[int, ...]] = []

    def look(block: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:1]
        shapes.extend(tuple(value.shape) for value in given)

    hook = blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            model.eval()(*task.example_input(2))
    finally:
        hook.remove()
    if not shapes or len(shapes[0]) != 3:
        found = f"a tensor {shapes[0]}" if shapes else "no tensor"
        raise IncompatibleStep(
            f"the blocks of {type(model).__name__} ({type(blocks[0]).__name__}) are given {found}; sequences of "
            "tokens, of three axes, are needed"
        )
    length = getattr(task, "length", None)
    return max(shapes[0][1], length if isinstance(length, int) else 1), len(blocks)


@step("drop_tokens")
class DropTokens(Step):
    """Let the middle layers compute a random part of the tokens in the next training, a part that grows to all.

    Random layerwise token dropping (random-LTD). The first and the last layer compute all tokens, and so does every
    layer outside training: the model and its predictor stay as they are.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    slots: ClassVar[frozenset[str]] = frozenset({"dropping of tokens"})
    source: ClassVar[str] = (
        "Yao et al. 2022, Random-LTD, arXiv:2211.11586; Li et al. 2022, arXiv:2212.03597, section 3.2"
    )

    start: int | None = Field(default=None, ge=1)
    """Tokens kept of a sequence in the first step; None: half of them."""
    end: int | None = Field(default=None, ge=1)
    """Tokens kept in the end; None: all. Sequences that are shorter than what is kept lose none."""
    over: float = Field(default=0.7, gt=0, le=1)
    """Share of the training in which the number grows."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in which it grows, instead of a share."""
    multiple: int = Field(default=8, ge=1)
    """Numbers kept are rounded down to a multiple of it, but never below ``start``."""
    layers: tuple[int | str, ...] = ()
    """Numbers or names of the layers that drop tokens; none: all but the first and the last."""
    kind: Literal["", "decoder", "encoder"] = ""
    """"decoder": a token sees those before it, "encoder": it sees all. "": decoder for a task of causal language
    modelling, else encoder."""
    stack: str = ""
    """Name of the container of blocks in the model; "": the longest one of equal blocks."""
    allow_ends: bool = False
    """Let the first and the last layer drop tokens as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None and self.end is not None and self.start > self.end:
            raise InvalidValue(f"{self.id}: start = {self.start}, end = {self.end}; start ≤ end is expected")

    def schedule(self, total: int, length: int) -> PacingFunction:
        """r_t of a training of ``total`` optimizer steps on sequences of ``length`` tokens."""
        end = length if self.end is None else self.end
        start = max(1, min(length, end) // 2) if self.start is None else self.start
        end = max(start, end)  # a start above the full length: nothing is ever dropped
        return linear(start, end, self.over * total if self.steps is None else self.steps, self.multiple)

    def apply(self, job: Job) -> Job:
        """The job, whose next training drops tokens."""
        model = job.fresh_model()
        length, layers = seen_length(model, job.task, self.stack or None)
        schedule = self.schedule(1000, length)
        if schedule.min_difficulty >= length:
            raise NoEffect(
                f"{self.id}: {schedule.min_difficulty:g} tokens are kept from the first step on, and a sequence has "
                f"{length}: none would ever be dropped"
            )
        kind: Kind = self.kind or ("decoder" if "causal_lm" in job.task.capabilities else "encoder")
        settings: dict[str, Any] = {
            "layers": list(self.layers) or None,
            "kind": kind,
            "stack": self.stack or None,
            "allow_ends": self.allow_ends,
            "seed": derive_seed(job.seed, "token dropping"),
        }
        try:
            # a forward pass that keeps one token, so that a model that does not take it is known before the training
            with (
                drop_tokens(model, linear(1, length, 1e9), rank=0, **settings) as tried,
                torch.no_grad(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                model.train()(*job.task.example_input(2))
        except (InvalidValue, RuntimeError) as error:
            raise IncompatibleStep(f"{self.id}: {type(model).__name__} does not go with it: {error}") from error
        job.notes.remarks.append(
            f"the next training drops tokens in {len(tried.dropping)} of {layers} layers ({kind}), keeping "
            f"{schedule.min_difficulty:g} to {schedule.max_difficulty:g} of {length}"
        )

        def callback() -> Any:
            from sparing.data_efficiency.callbacks import TokenDroppingCallback

            return TokenDroppingCallback(lambda total: self.schedule(total, length), **settings)

        # before what counts tokens looks for it
        plan = job.training.adding(callbacks=callback)
        return job.replace(training=counting(plan))
