"""Blocks of consecutive convolutions: the parts of a network that can be exchanged one by one.

Han et al. 2021, LegoDNN, MobiCom, arXiv:2112.09852. A block reads one tensor and gives one, holds at least two
convolutions of which some can lose filters, and reaches as far as a share of the network's convolutions allows. What is
in no block is the frame.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from sparing.adaptive.exits import traced
from sparing.core.errors import IncompatibleStep, InvalidValue, did_you_mean, shown

COMPRESSIBLE = ("Conv2d", "ConvTranspose2d")
"""Operations whose filters can be removed."""
PARAMETRIC = ("Conv", "Linear", "BatchNorm")
"""What a parametric layer's type holds; one that is called several times stays within one block."""
MIN_CONVOLUTIONS = 2

Side = Literal["input", "output"]
Hook = tuple[str, Side]


@dataclass(frozen=True)
class Block:
    """One block of a graph, in the graph's names."""

    nodes: tuple[str, ...]
    """What it executes, in order."""
    start: str
    """Where it begins: its first node, or the node before it whose output several of its nodes read."""
    end: str
    """The node whose output is the block's."""
    prunable: tuple[str, ...]
    """Convolutions that may lose filters."""
    frozen: tuple[str, ...]
    """Convolutions that make the block's output and keep all filters, nearest to the end first."""
    start_hook: Hook | None
    """(module, side) at which the block's input can be read."""
    end_hook: Hook | None
    """The same of its output."""
    input: str = ""
    """Name of the tensor it reads: the node that makes it, or the network's input."""

    @property
    def start_is_placeholder(self) -> bool:
        """Whether :attr:`start` lies before the block, which then does not execute it."""
        return self.start not in self.nodes

    @property
    def output(self) -> str:
        """Name of the tensor it gives."""
        return self.end


class _Graph:
    """Nodes in the order of execution, and who reads whom."""

    def __init__(
        self,
        nodes: Sequence[str],
        op_types: Sequence[str],
        inputs: Sequence[Sequence[str]],
        kinds: Sequence[str],
        modules: Sequence[str] | None,
    ) -> None:
        lengths = {len(nodes), len(op_types), len(inputs), len(kinds), len(nodes if modules is None else modules)}
        if len(lengths) > 1 or len(set(nodes)) < len(nodes):
            raise InvalidValue("nodes, op_types, inputs, kinds (and modules) describe the same nodes, each named once")
        self.nodes = list(nodes)
        self.place = {name: number for number, name in enumerate(nodes)}
        for number, (name, sources) in enumerate(zip(nodes, inputs, strict=True)):
            wrong = [source for source in sources if self.place.get(source, number) >= number]
            if wrong:
                raise InvalidValue(f"{name} reads {shown(wrong[0])}, which is no node before it")
        self.inputs = {name: list(dict.fromkeys(sources)) for name, sources in zip(nodes, inputs, strict=True)}
        self.users: dict[str, list[str]] = {name: [] for name in nodes}
        for name, sources in self.inputs.items():
            for source in sources:
                self.users[source].append(name)
        self.type = dict(zip(nodes, op_types, strict=True))
        self.is_module = {name: kind == "module" for name, kind in zip(nodes, kinds, strict=True)}
        self.module = dict(zip(nodes, nodes if modules is None else modules, strict=True))
        self.calls: dict[str, list[str]] = {}
        for name in nodes:
            if self.is_module[name]:
                self.calls.setdefault(self.module[name], []).append(name)

    def convolutions(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Compressible modules among nodes → the nodes that call them."""
        found: dict[str, list[str]] = {}
        for name in names:
            if self.type[name] in COMPRESSIBLE:
                found.setdefault(self.module[name], []).append(name)
        return found

    def boundary(self, block: Sequence[str]) -> tuple[list[str], list[str]]:
        """(starts, ends) of a stretch; no starts where it reads the network's input beside something else."""
        inside = set(block)
        ends = [name for name in block if not self.users[name] or not inside.issuperset(self.users[name])]
        starts = [name for name in block if not self.inputs[name] or not inside.issuperset(self.inputs[name])]
        if len(starts) > 1:
            if not all(self.inputs[name] for name in starts):
                return [], ends
            starts = list(dict.fromkeys(source for name in starts for source in self.inputs[name]))
        return starts, ends

    def last_convolutions(self, block: Sequence[str], end: str) -> list[str]:
        """The compressible nodes nearest to the end on every way, breadth first."""
        inside, found = set(block), []
        waiting, seen = deque([end]), {end}
        while waiting:
            name = waiting.popleft()
            if self.type[name] in COMPRESSIBLE:
                found.append(name)
                continue
            for source in self.inputs[name]:
                if source in inside and source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return found

    def start_hook(self, start: str, block: Sequence[str]) -> Hook | None:
        if start not in block:
            if self.is_module[start]:
                return start, "output"
            inside = set(block)
            reader = next((user for user in self.users[start] if user in inside and self.is_module[user]), None)
            return None if reader is None else (reader, "input")
        if self.is_module[start]:
            return start, "input"
        before = next((source for source in self.inputs[start] if self.is_module[source]), None)
        return None if before is None else (before, "output")

    def end_hook(self, end: str) -> Hook | None:
        if self.is_module[end]:
            return end, "output"
        reader = next((user for user in self.users[end] if self.is_module[user]), None)
        return None if reader is None else (reader, "input")

    def block(self, names: Sequence[str]) -> Block | str:
        """The stretch as a block, or why it is none."""
        starts, ends = self.boundary(names)
        inside = set(names)
        reads = sum(1 if name not in inside else max(1, len(self.inputs[name])) for name in starts)
        if not starts or reads > 1:
            return "it reads several tensors"
        if len(ends) > 1:
            return f"it gives several tensors ({', '.join(ends)})"
        keep = self.last_convolutions(names, ends[0])
        kept = {self.module[name] for name in keep}
        convolutions = self.convolutions(names)
        if not convolutions.keys() - kept:
            return "none of its convolutions can lose filters without another shape of its output"
        for name in names:
            calls = self.calls.get(self.module[name], [])
            if len(calls) > 1 and any(kind in self.type[name] for kind in PARAMETRIC) and not inside.issuperset(calls):
                return f"{self.module[name]} is called outside of it, too"
        prunable = tuple(calls[0] for module, calls in convolutions.items() if module not in kept)
        hooks = self.start_hook(starts[0], names), self.end_hook(ends[0])
        return Block(tuple(names), starts[0], ends[0], prunable, tuple(keep), *hooks)


def detect_blocks(
    nodes: Sequence[str],
    op_types: Sequence[str],
    inputs: Sequence[Sequence[str]],
    kinds: Sequence[str],
    max_ratio: float = 0.125,
    *,
    modules: Sequence[str] | None = None,
) -> list[Block]:
    """Blocks of a graph of n nodes, in order of execution.

    Beginning at each node that is in no block yet, the block with the most convolutions is taken that holds at least
    two and at most ``max(2, floor(total · max_ratio))``; of several with as many, the one that ends first.

    Args:
        nodes: (n,) names, in order of execution.
        op_types: (n,) operations; "Conv2d" and "ConvTranspose2d" can lose filters.
        inputs: (n,) names of the nodes each reads; none: it reads the network's input.
        kinds: (n,) "module", or another word for what is no module.
        max_ratio: share of the network's convolutions that a block may hold, 0 < max_ratio ≤ 1.
        modules: (n,) the module each node calls, where one is called several times; by default the nodes' names. A
            convolution that is called several times counts once.

    Raises:
        InvalidValue: ``max_ratio`` outside its range, fewer than two convolutions, or lists that describe no graph.
    """
    _check_ratio(max_ratio)
    graph = _Graph(nodes, op_types, inputs, kinds, modules)
    most = _most(graph, max_ratio)
    blocks, start = [], 0
    while start < len(nodes) - 1:
        best: Block | None = None
        best_count = 0
        for stop in range(start + 1, len(nodes) + 1):
            names = graph.nodes[start:stop]
            count = len(graph.convolutions(names))
            if count > most:
                break
            if count < MIN_CONVOLUTIONS or count <= best_count:
                continue
            found = graph.block(names)
            if isinstance(found, Block) and found.start_hook is not None and found.end_hook is not None:
                best, best_count = found, count
        if best is None:
            start += 1
        else:
            blocks.append(best)
            start = graph.place[best.nodes[-1]] + 1
    return blocks


def _check_ratio(max_ratio: float) -> None:
    if isinstance(max_ratio, bool) or not isinstance(max_ratio, int | float) or not 0 < max_ratio <= 1:
        raise InvalidValue(f"max_ratio = {shown(max_ratio)}; a number above 0 and at most 1 is expected")


def _most(graph: _Graph, max_ratio: float) -> int:
    total = len(graph.convolutions(graph.nodes))
    if total < MIN_CONVOLUTIONS:
        raise InvalidValue(f"the network has {total} convolutions (Conv2d, ConvTranspose2d); a block needs two")
    return max(int(total * max_ratio), MIN_CONVOLUTIONS)


# --- networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockGraph:
    """A traced network, its blocks, and one tensor that each of them reads."""

    module: fx.GraphModule
    """The whole network in evaluation mode; a copy of what was given."""
    blocks: tuple[Block, ...]
    """In order of execution, in the names of the graph's nodes; ``prunable`` and ``frozen`` name convolutions."""
    example: Tensor
    """An input of the network, (1, …)."""
    block_inputs: tuple[Tensor, ...] = field(repr=False)
    """What each block reads of the example, (1, …)."""

    def layer(self, node: str) -> str:
        """The path of the module that a node calls."""
        return str(next(item.target for item in self.module.graph.nodes if item.name == node))

    def block_module(self, number: int) -> fx.GraphModule:
        """A copy of a block as a module of its own, input → output."""
        from sparing.adaptive.lego import stretch

        inside = set(self.blocks[number].nodes)
        made = stretch(self.module, [node for node in self.module.graph.nodes if node.name in inside])[2]
        return copy.deepcopy(made)


class Recorder(fx.Interpreter):
    """Runs a traced network and keeps copies of some tensors, which an operation in place cannot reach."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__(module)
        self.names, self.kept = frozenset(names), dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; a copy is kept if it is asked for."""
        value = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = value.clone()
        return value

    @torch.no_grad()
    def record(self, x: Tensor) -> Mapping[str, Tensor]:
        """Name → tensor, of a run on x."""
        self.kept = {}
        self.run(x)
        return self.kept


def extract_blocks(
    model: nn.Module,
    example_input: Tensor,
    max_ratio: float = 0.125,
    boundaries: Sequence[tuple[str, str]] | None = None,
) -> BlockGraph:
    """The blocks of a network, by :func:`detect_blocks` on its ``torch.fx`` graph.

    Args:
        model: takes one tensor; stays as it is.
        example_input: (N, …) with N ≥ 1, by which it is traced.
        max_ratio: share of the network's convolutions that a block may hold.
        boundaries: (first, last) of each block in place of the detection, in order of execution: names of nodes of the
            traced graph, or paths of modules.

    Raises:
        InvalidValue: ``max_ratio`` outside its range, fewer than two convolutions, or boundaries that are unknown,
            overlap, or read or give several tensors.
        IncompatibleStep: the network cannot be traced, or has no block; the message says why.
    """
    _check_ratio(max_ratio)
    example = example_input[:1].detach().clone()
    copied = copy.deepcopy(model).eval()
    whole = _portable(traced(copied, example, "blocks"))
    listed = [node for node in whole.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    known = {node.name for node in listed}
    modules = dict(whole.named_modules())
    names = [node.name for node in listed]
    types = [
        type(modules[str(node.target)]).__name__ if node.op == "call_module" else _function(node) for node in listed
    ]
    inputs = [[source.name for source in node.all_input_nodes if source.name in known] for node in listed]
    kinds = ["module" if node.op == "call_module" else "function" for node in listed]
    called = [str(node.target) if node.op == "call_module" else node.name for node in listed]
    if boundaries is None:
        found = detect_blocks(names, types, inputs, kinds, max_ratio, modules=called)
    else:
        graph = _Graph(names, types, inputs, kinds, called)
        _most(graph, max_ratio)
        found = _given(graph, boundaries)
    by_name = {node.name: node for node in whole.graph.nodes}
    blocks = []
    for block in found:
        inside = set(block.nodes)
        reads = {
            source.name
            for name in block.nodes
            for source in by_name[name].all_input_nodes
            if source.op != "get_attr" and source.name not in inside
        }
        if len(reads) != 1:
            raise IncompatibleStep(
                f"the block {block.nodes[0]} … {block.end} reads {', '.join(sorted(reads)) or 'nothing'}; one tensor "
                "is needed: give boundaries"
            )
        blocks.append(Block(**{**block.__dict__, "input": reads.pop()}))
    if not blocks:
        raise IncompatibleStep(
            f"{type(model).__name__} has no block: no stretch of at most "
            f"{_most(_Graph(names, types, inputs, kinds, called), max_ratio)} convolutions (max_ratio = {max_ratio:g}) "
            "reads one tensor and gives one; raise max_ratio or give boundaries"
        )
    kept = Recorder(whole, [block.input for block in blocks]).record(example)
    return BlockGraph(whole, tuple(blocks), example, tuple(kept[block.input] for block in blocks))


def _portable(whole: fx.GraphModule) -> fx.GraphModule:
    """Without what cannot be sent to another process: annotations of shapes, and who traced it."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(whole.graph, {}))
    for node in graph.nodes:
        node.type = None
    return fx.GraphModule(whole, graph).eval()


def _function(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _given(graph: _Graph, boundaries: Sequence[tuple[str, str]]) -> list[Block]:
    paths = {graph.module[name]: name for name in reversed(graph.nodes)}
    if not boundaries:
        raise InvalidValue("boundaries is empty; the first and last node of each block are expected")

    def place(name: Any) -> int:
        if name in graph.place:
            return graph.place[name]
        if name in paths:
            return graph.place[paths[name]]
        raise InvalidValue(
            f"boundaries: {shown(name)} is no node of this network.{did_you_mean(str(name), [*graph.nodes, *paths])}"
        )

    blocks, free = [], 0
    for pair in boundaries:
        if isinstance(pair, str) or len(pair) != 2:
            raise InvalidValue(f"boundaries: {shown(pair)}; the first and the last node of a block are expected")
        first, last = place(pair[0]), place(pair[1])
        if first < free or last < first:
            raise InvalidValue(
                f"boundaries: {pair[0]} … {pair[1]} is no stretch after the block before it, in order of execution"
            )
        block = graph.block(graph.nodes[first : last + 1])
        if isinstance(block, str):
            raise InvalidValue(f"boundaries: {pair[0]} … {pair[1]} is no block: {block}")
        blocks.append(block)
        free = last + 1
    return blocks


__all__ = ["COMPRESSIBLE", "Block", "BlockGraph", "Recorder", "detect_blocks", "extract_blocks"]
