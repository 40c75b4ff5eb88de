"""Smaller versions of each block, all with the block's input and output: filters leave, and the block really shrinks.

Han et al. 2021, LegoDNN, MobiCom, arXiv:2112.09852; filters by the L1 norm of Li et al. 2017, arXiv:1608.08710,
section 3.1. Which channels belong together is worked out on the block's ``torch.fx`` graph: each filter is a unit that
is followed through whatever acts on channels alone, up to the layers that read it. Channels that meet in a sum are one
unit and leave jointly; a unit that reaches the block's output, or an operation that is not known, stays.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparing.adaptive.blocks import BlockGraph
from sparing.adaptive.scaling import SPARSITIES, check_sparsities, check_sparsity
from sparing.compression.shrinking import ELEMENTWISE, ELEMENTWISE_FUNCTIONS, POOL_FUNCTIONS, POOLS
from sparing.core.errors import InvalidValue, NoEffect, shown
from sparing.core.predictor.module import count_macs

Scorer = Literal["l1", "l2"] | Callable[[Tensor], Tensor]
MakeDescendant = Callable[[nn.Module, Sequence[str], Tensor, float], nn.Module]
"""(a copy of the block, paths of the layers that may lose filters, an input (1, …), sparsity) → the descendant."""

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
FIXED = -1
"""Label of a channel that stays."""


def kept_filters(scores: Tensor, sparsity: float) -> Tensor:
    """Indices of the filters that stay, ascending, of scores (F,).

    With ``k = int(F · sparsity)`` those leave whose score is at most the k-th smallest; where that is all of them, the
    largest stays. None leaves if ``k < 1`` or ``F < 2``.
    """
    count = len(scores)
    k = int(count * sparsity)
    if k < 1 or count < 2:
        return torch.arange(count)
    stays = scores > scores.kthvalue(k).values
    if not stays.any():
        stays[scores.argmax()] = True
    return stays.nonzero().flatten()


def filter_scores(layer: nn.Module, scorer: Scorer = "l1") -> Tensor:
    """A layer's filters' scores, (F,): the norm of each one's weights, or what a function of (F, …) gives."""
    weight: Tensor = layer.get_parameter("weight").detach()
    flat = (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1)
    if callable(scorer):
        scores = scorer(flat)
        if scores.shape != flat.shape[:1]:
            raise InvalidValue(f"scorer: gave {tuple(scores.shape)} for {tuple(flat.shape)}; ({len(flat)},) is needed")
        return scores
    if scorer not in ("l1", "l2"):
        raise InvalidValue(f'scorer = {shown(scorer)}; "l1", "l2" or a function is expected')
    return flat.abs().sum(1) if scorer == "l1" else flat.pow(2).sum(1).sqrt()


# --- which channels belong together ----------------------------------------------------------------------------------


class _Units:
    """Disjoint sets of channels; the set of ``FIXED`` stays."""

    def __init__(self) -> None:
        self.parent = {FIXED: FIXED}

    def new(self, count: int) -> list[int]:
        start = len(self.parent) - 1
        self.parent |= {start + i: start + i for i in range(count)}
        return list(range(start, start + count))

    def of(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def join(self, one: int, other: int) -> None:
        a, b = sorted((self.of(one), self.of(other)))
        self.parent[b] = a  # FIXED is the smallest, so it wins


class _Channels(fx.Interpreter):
    """Follows the units of a block's filters, by running the block once."""

    def __init__(self, block: fx.GraphModule, prunable: Sequence[str]) -> None:
        super().__init__(block)
        self.block, self.prunable = block, frozenset(prunable)
        self.units = _Units()
        self.made: dict[str, list[int]] = {}
        """Layer → the unit of each channel it gives."""
        self.read: dict[str, list[int]] = {}
        """Layer → the unit of each channel it reads."""
        self.labels: dict[fx.Node, list[int]] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            for source in n.all_input_nodes:
                self._fix(source)
        elif isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            labels = self._follow(n)
            if labels is None or len(labels) != (value.shape[1] if value.ndim > 1 else 0):
                for source in n.all_input_nodes:
                    self._fix(source)
                labels = [FIXED] * (value.shape[1] if value.ndim > 1 else 0)
            self.labels[n] = labels
        else:
            for source in n.all_input_nodes:
                # a question about the shape: the answer may be a number of channels
                self._fix(source)
        return value

    def _fix(self, node: fx.Node) -> None:
        for unit in self.labels.get(node, ()):
            self.units.join(unit, FIXED)

    def _remember(self, kept: dict[str, list[int]], name: str, labels: list[int]) -> list[int]:
        """A layer that is called again has the same channels as before."""
        if name in kept:
            if len(kept[name]) != len(labels):
                raise InvalidValue(f"{name} is called with {len(kept[name])} and {len(labels)} channels")
            for one, other in zip(kept[name], labels, strict=True):
                self.units.join(one, other)
        return kept.setdefault(name, labels)

    def _follow(self, node: fx.Node) -> list[int] | None:
        """The units of a node's channels; None: it is not known what it does with channels."""
        tensors = [source for source in node.all_input_nodes if source in self.shapes]
        if node.op == "call_module":
            if len(tensors) != 1:
                return None
            return self._layer(str(node.target), self.labels[tensors[0]], self.shapes[tensors[0]], self.shapes[node])
        if node.op not in ("call_function", "call_method") or not tensors:
            return None
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
            if along not in (1, 1 - len(self.shapes[node])) or not isinstance(parts, list | tuple):
                return None
            return [unit for part in parts for unit in self.labels[part]]
        if node.target in SUMS or (node.op == "call_method" and name in SUM_METHODS):
            if len(tensors) == 1:
                return self.labels[tensors[0]]
            shapes = [self.shapes[source] for source in tensors]
            if len({len(shape) for shape in shapes}) > 1 or len({shape[1:2] for shape in shapes}) > 1:
                return None
            first, *others = (self.labels[source] for source in tensors)
            for other in others:
                for a, b in zip(first, other, strict=True):
                    self.units.join(a, b)
            return first
        if len(tensors) != 1:
            return None
        source, shape = tensors[0], self.shapes[tensors[0]]
        if name in ELEMENTWISE_FUNCTIONS or (name in POOL_FUNCTIONS and len(shape) == 4):
            return self.labels[source]
        if name == "flatten" and self.shapes[node] == (shape[0], int(np.prod(shape[1:]))):
            return self._flattened(self.labels[source], shape)
        return None

    def _flattened(self, labels: list[int], shape: tuple[int, ...]) -> list[int]:
        inner = int(np.prod(shape[2:]))
        return [unit for unit in labels for _ in range(inner)]

    def _layer(self, name: str, labels: list[int], shape: tuple[int, ...], gives: tuple[int, ...]) -> list[int] | None:
        layer: Any = self.block.get_submodule(name)
        if isinstance(layer, CONVOLUTIONS):
            if layer.groups == layer.in_channels == layer.out_channels > 1:  # depth-wise
                return self._remember(self.made, name, labels)
            if layer.groups > 1:
                return None
            self._remember(self.read, name, labels)
            fresh = name not in self.made and name in self.prunable
            return self.made.get(name) or self._remember(
                self.made, name, self.units.new(layer.out_channels) if fresh else [FIXED] * layer.out_channels
            )
        if isinstance(layer, nn.Linear) and len(shape) == 2:
            self._remember(self.read, name, labels)
            return [FIXED] * layer.out_features
        if isinstance(layer, NORMS) or (isinstance(layer, nn.PReLU) and layer.num_parameters > 1):
            return self._remember(self.made, name, labels)
        if isinstance(layer, nn.Flatten) and gives == (shape[0], int(np.prod(shape[1:]))):
            return self._flattened(labels, shape)
        if isinstance(layer, (*ELEMENTWISE, nn.PReLU)) or (isinstance(layer, POOLS) and len(shape) == 4):
            return labels
        return None


SUMS = (operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.sub, torch.mul)
SUM_METHODS = ("add", "add_", "sub", "mul", "mul_")


# --- cutting ----------------------------------------------------------------------------------------------------------


def prune_filters(
    block: nn.Module, prunable: Sequence[str], example: Tensor, sparsity: float, scorer: Scorer = "l1"
) -> fx.GraphModule:
    """A copy of a block that is smaller by the share ``sparsity`` of each prunable layer's filters.

    Args:
        block: one tensor → one tensor, both of the same shape afterwards.
        prunable: paths of the convolutions that may lose filters.
        example: an input of the block, (1, …).
        sparsity: 0 ≤ sparsity < 1.
        scorer: "l1" or "l2", the norm of a filter's weights, or a function of the weights (F, …) → scores (F,); the
            lowest leave. Filters that meet in a sum are ranked by the sum of their scores.

    Raises:
        InvalidValue: arguments outside what is allowed.
    """
    check_sparsity(sparsity)
    graph = block if isinstance(block, fx.GraphModule) else fx.symbolic_trace(block)
    made = copy.deepcopy(graph)
    was = made.training
    made.eval()
    channels = _Channels(made, prunable)
    with torch.no_grad():
        channels.run(example)
    stays = _staying(made, channels, prunable, sparsity, scorer)
    with torch.no_grad():
        for name in {**channels.made, **channels.read}:
            outputs, inputs = (
                None if labels is None else torch.tensor([i for i, unit in enumerate(labels) if stays(unit)])
                for labels in (channels.made.get(name), channels.read.get(name))
            )
            _cut(made.get_submodule(name), outputs, inputs)
    made.train(was)
    return made


def _staying(
    block: nn.Module, channels: _Channels, prunable: Sequence[str], sparsity: float, scorer: Scorer
) -> Callable[[int], bool]:
    """Whether a unit stays."""
    makers: dict[int, list[str]] = {}
    scores: dict[int, float] = {}
    for name in prunable:
        layer: Any = block.get_submodule(name)
        if name not in channels.made or name not in channels.read:
            continue  # depth-wise: it follows the layer before it
        for unit, score in zip(channels.made[name], filter_scores(layer, scorer).tolist(), strict=True):
            found = channels.units.of(unit)
            makers.setdefault(found, []).append(name)
            scores[found] = scores.get(found, 0.0) + score
    leaving = set()
    groups: dict[tuple[str, ...], list[int]] = {}
    for unit, names in makers.items():
        if unit != FIXED:
            groups.setdefault(tuple(names), []).append(unit)
    for units in groups.values():
        kept = kept_filters(torch.tensor([scores[unit] for unit in units], dtype=torch.float64), sparsity)
        leaving |= set(units) - {units[i] for i in kept.tolist()}
    return lambda unit: channels.units.of(unit) not in leaving


def _cut(layer: Any, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Leave these channels of what a layer gives and reads; None: all."""
    if isinstance(layer, NORMS):
        assert outputs is not None
        layer.num_features = len(outputs)
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(layer, name, 0, outputs)
        return
    if isinstance(layer, nn.PReLU):
        assert outputs is not None
        layer.num_parameters = len(outputs)
        _take(layer, "weight", 0, outputs)
        return
    if isinstance(layer, nn.Linear):
        assert inputs is not None
        layer.in_features = len(inputs)
        _take(layer, "weight", 1, inputs)
        return
    assert outputs is not None
    transposed = isinstance(layer, nn.ConvTranspose2d)
    layer.out_channels = len(outputs)
    _take(layer, "bias", 0, outputs)
    if inputs is None:  # depth-wise
        layer.in_channels = layer.groups = len(outputs)
        _take(layer, "weight", 0, outputs)
    else:
        layer.in_channels = len(inputs)
        _take(layer, "weight", 1 if transposed else 0, outputs)
        _take(layer, "weight", 0 if transposed else 1, inputs)


def _take(layer: nn.Module, name: str, dim: int, indices: Tensor) -> None:
    tensor = getattr(layer, name)
    if tensor is None or tensor.shape[dim] == len(indices):
        return
    taken = tensor.detach().index_select(dim, indices.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        taken = nn.Parameter(taken, requires_grad=tensor.requires_grad)
    setattr(layer, name, taken)


# --- all descendants of all blocks ------------------------------------------------------------------------------------


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True, eq=False)
class BlockZoo:
    """A network's blocks (B) and the descendants of each, one for every sparsity (S)."""

    graph: BlockGraph
    sparsities: tuple[float, ...]
    """The first is 0: the original block."""
    blocks: tuple[tuple[nn.Module, ...], ...]
    """[b][s]: descendant s of block b; each is a module of its own, one tensor → one tensor."""
    bytes: np.ndarray = field(init=False)
    """(B, S) parameters and buffers."""
    parameters: np.ndarray = field(init=False)
    """(B, S)."""
    macs: np.ndarray = field(init=False)
    """(B, S) multiply-accumulates of one sample."""
    frame_bytes: float = field(init=False)
    """Parameters and buffers of what is in no block."""

    def __post_init__(self) -> None:
        def table(count: Callable[[int, nn.Module], float]) -> np.ndarray:
            return np.array([[count(b, module) for module in row] for b, row in enumerate(self.blocks)], float)

        inputs = self.graph.block_inputs
        found = {
            "bytes": table(lambda b, module: bytes_of(module)),
            "parameters": table(lambda b, module: sum(p.numel() for p in module.parameters())),
            "macs": table(lambda b, module: count_macs(module, (inputs[b],))[0]),
        }
        found_frame = float(bytes_of(self.graph.module) - found["bytes"][:, 0].sum())
        for name, value in {**found, "frame_bytes": found_frame}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def build(
        cls,
        graph: BlockGraph,
        sparsities: Sequence[float] = SPARSITIES,
        scorer: Scorer = "l1",
        make_descendant: MakeDescendant | None = None,
    ) -> Self:
        """Make all descendants; they are still to be trained (:func:`~sparing.adaptive.distill_blocks`).

        Args:
            graph: of :func:`~sparing.adaptive.blocks.extract_blocks`.
            sparsities: 0 first, ascending, all below 1.
            scorer: see :func:`prune_filters`.
            make_descendant: makes one in another way: (copy of the block, paths of its prunable layers, an input
                (1, …), sparsity) → a module with the same input and an output of the same shape.

        Raises:
            InvalidValue: sparsities outside [0, 1), twice, out of order or without 0; a descendant whose output has
                another shape.
            NoEffect: all descendants are as large as their blocks.
        """
        levels = tuple(sparsities)
        check_sparsities(levels)
        rows = []
        for number, block in enumerate(graph.blocks):
            original, example = graph.block_module(number).eval(), graph.block_inputs[number]
            prunable = list(dict.fromkeys(graph.layer(name) for name in block.prunable))
            row: list[nn.Module] = [original]
            for sparsity in levels[1:]:
                if make_descendant is None:
                    made: nn.Module = prune_filters(original, prunable, example, sparsity, scorer)
                else:
                    made = make_descendant(copy.deepcopy(original), prunable, example, sparsity)
                made.eval()
                with torch.no_grad():
                    shape, expected = made(example.clone()).shape, original(example.clone()).shape
                if shape != expected:
                    raise InvalidValue(
                        f"block {number}, sparsity {sparsity:g}: the descendant gives {tuple(shape)}, "
                        f"{tuple(expected)} is needed"
                    )
                row.append(made)
            rows.append(tuple(row))
        zoo = cls(graph, tuple(float(level) for level in levels), tuple(rows))
        if len(levels) > 1 and (zoo.bytes[:, 1:] >= zoo.bytes[:, :1]).all():
            raise NoEffect("no descendant is smaller than its block; larger sparsities or wider layers are needed")
        return zoo

    @property
    def options(self) -> int:
        """Number of networks that can be composed."""
        return len(self.sparsities) ** len(self.blocks)

    def named_descendants(self) -> Iterator[tuple[str, nn.Module]]:
        """("b.s", module) of all but the originals."""
        for b, row in enumerate(self.blocks):
            for s, module in enumerate(row[1:], 1):
                yield f"{b}.{s}", module

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers of all descendants but the originals, under "b.s.name"."""
        return {
            f"{name}.{key}": tensor.detach().clone()
            for name, module in self.named_descendants()
            for key, tensor in module.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put them back; raises :class:`InvalidValue` for those of another zoo."""
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
        if wrong:
            raise InvalidValue(f"these weights are of other descendants: {shown(wrong[0])} is missing or does not fit")
        for name, module in self.named_descendants():
            module.load_state_dict({key: state[f"{name}.{key}"] for key in module.state_dict()})


__all__ = ["SPARSITIES", "BlockZoo", "bytes_of", "filter_scores", "kept_filters", "prune_filters"]
