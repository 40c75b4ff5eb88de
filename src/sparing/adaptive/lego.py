"""A torch network whose blocks are exchanged at run time."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import fx, nn

from sparing.adaptive.lego_runtime import Layout, Options, Piece, ScaledNetwork
from sparing.adaptive.scaling import Profile, Selection
from sparing.core import files
from sparing.core.errors import InvalidValue, shown

if TYPE_CHECKING:
    from sparing.adaptive.descendants import BlockZoo

Residency = Literal["memory", "disk"]


def cut(traced: fx.GraphModule, blocks: Sequence[Sequence[str]]) -> tuple[Layout, dict[int, fx.GraphModule]]:
    """(how the pieces hang together, the frame's pieces by their number).

    Args:
        traced: the whole network.
        blocks: for each block, in the order in which they run, the names of the nodes it executes: a stretch of the
            graph that reads one tensor and gives one.

    Raises:
        InvalidValue: nodes that are unknown, that do not form a stretch, or that read or give several tensors.
    """
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    place = {node.name: number for number, node in enumerate(nodes)}
    stretches: list[tuple[int, int, int | None]] = []
    end = 0
    for number, names in enumerate(blocks):
        unknown = [name for name in names if name not in place]
        if unknown or not names:
            raise InvalidValue(f"block {number}: {shown(unknown or names)} are no operations of this network")
        at = sorted(place[name] for name in names)
        if at != list(range(at[0], at[-1] + 1)) or at[0] < end:
            raise InvalidValue(f"block {number} ({names[0]} … {names[-1]}) is no stretch after the block before it")
        if at[0] > end:
            stretches.append((end, at[0], None))
        stretches.append((at[0], at[-1] + 1, number))
        end = at[-1] + 1
    if end < len(nodes):
        stretches.append((end, len(nodes), None))
    pieces: list[Piece] = []
    frame: dict[int, fx.GraphModule] = {}
    for start, stop, block in stretches:
        inputs, outputs, module = stretch(traced, nodes[start:stop])
        if block is None:
            frame[len(pieces)] = module
        elif len(inputs) != 1 or len(outputs) != 1:
            raise InvalidValue(
                f"block {block} reads {', '.join(inputs)} and gives {', '.join(outputs)}; one tensor each is needed"
            )
        pieces.append(Piece(inputs, outputs, block))
    (result,) = (node for node in traced.graph.nodes if node.op == "output")
    network_inputs = tuple(node.name for node in traced.graph.nodes if node.op == "placeholder")
    layout = Layout(network_inputs, tuple(pieces), _named(result.args[0]))
    layout.check()
    return layout, frame


def _named(tree: Any) -> Any:
    if isinstance(tree, fx.Node):
        return tree.name
    if isinstance(tree, dict):
        return {key: _named(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [_named(item) for item in tree]
    raise InvalidValue(f"the network gives {shown(tree)}, which none of its operations makes")


def stretch(
    traced: fx.GraphModule, nodes: Sequence[fx.Node]
) -> tuple[tuple[str, ...], tuple[str, ...], fx.GraphModule]:
    """(names read, names given, a module) of successive nodes."""
    graph, inside = fx.Graph(), set(nodes)
    made: dict[fx.Node, fx.Node] = {}
    inputs = []
    reads = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    for source in reads:  # placeholders first: a graph's arguments
        if source.op != "get_attr":
            inputs.append(source.name)
            made[source] = graph.placeholder(source.name)
    for source in reads:
        if source.op == "get_attr":
            made[source] = graph.node_copy(source)
    for node in nodes:
        made[node] = graph.node_copy(node, lambda source: made[source])
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    given = tuple(made[node] for node in outputs)
    graph.output(given[0] if len(given) == 1 else given)
    return tuple(inputs), tuple(node.name for node in outputs), fx.GraphModule(traced, graph).eval()


class LegoModel(ScaledNetwork, nn.Module):
    """The network of a :class:`~sparing.adaptive.descendants.BlockZoo`, as one selection of descendants.

    :meth:`apply` exchanges the blocks that change, at once for whoever calls meanwhile. It starts with the original
    blocks.

    Args:
        zoo: blocks and their descendants. They are not copied.
        profile: by which :meth:`choose` chooses; None: only :meth:`apply` works.
        residency: "memory" keeps all descendants there. "disk" writes them to files and keeps those of the loaded
            selection only; let go of the zoo then, so that its modules can leave memory.
        folder: where "disk" keeps its files; None: a temporary folder that ends with the model.
    """

    def __init__(
        self,
        zoo: BlockZoo,
        profile: Profile | None = None,
        *,
        residency: Residency = "memory",
        folder: Path | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if residency not in ("memory", "disk"):
            raise InvalidValue(f"residency = {shown(residency)}: 'memory' or 'disk' is needed")
        self.profile, self.residency = profile, residency
        self.sparsities = tuple(float(sparsity) for sparsity in zoo.sparsities)
        self.sizes = np.asarray(zoo.bytes, float)
        self.frame_bytes = float(zoo.frame_bytes)
        self.layout, frame = cut(zoo.graph.module, [block.nodes for block in zoo.graph.blocks])
        self.frame = frame
        self.frame_pieces = nn.ModuleList(frame.values())
        self._shelf: _Memory | _Disk = _Memory(zoo.blocks) if residency == "memory" else _Disk(zoo.blocks, folder)
        self._start([0] * len(self.sizes))
        self.blocks = nn.ModuleList(self._modules_of_now())
        self.eval()

    def _fetch(self, block: int, option: int) -> nn.Module:
        return self._shelf.fetch(block, option)

    def _modules_of_now(self) -> list[nn.Module]:
        return [block for block in self._loaded.blocks if isinstance(block, nn.Module)]

    def apply(self, selection: Selection | Sequence[int] | Callable[..., Any]) -> Any:
        """Load a selection and return the bytes moved: see :meth:`ScaledNetwork.apply`.

        Given a function, it is ``nn.Module.apply``.
        """
        if callable(selection):
            return nn.Module.apply(self, selection)
        moved = ScaledNetwork.apply(self, selection)
        self.blocks = nn.ModuleList(self._modules_of_now()).eval()
        return moved

    @torch.no_grad()
    def answer(self, *inputs: Any) -> tuple[Any, Options]:
        """(the network's output, without a gradient; the selection that computed it)."""
        return ScaledNetwork.answer(self, *inputs)

    @torch.no_grad()
    def measure(self, *inputs: Any, runs: int = 5) -> tuple[np.ndarray, Options]:
        """Seconds of each loaded block, without gradients: see :meth:`ScaledNetwork.measure`."""
        return ScaledNetwork.measure(self, *inputs, runs=runs)

    @property
    def bytes(self) -> float:
        """Bytes of the loaded blocks and the frame."""
        return self.frame_bytes + float(self.sizes[np.arange(len(self.sizes)), self.current].sum())

    def forward(self, *inputs: Any) -> Any:
        """The network's output, all of it computed by the selection that was loaded when the call began."""
        return self._run(self._loaded, inputs)


class _Memory:
    """All descendants, as they are."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]]) -> None:
        self.blocks = [[module.eval() for module in row] for row in blocks]

    def fetch(self, block: int, option: int) -> nn.Module:
        return self.blocks[block][option]


class _Disk:
    """Descendants as files, and modules without numbers to load them into."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], folder: Path | str | None) -> None:
        if folder is None:
            self.temporary = tempfile.TemporaryDirectory(prefix="sparing-lego-")  # lives as long as this
            folder = self.temporary.name
        self.folder = Path(folder)
        self.hollow = []
        for b, row in enumerate(blocks):
            self.hollow.append([copy.deepcopy(module).to("meta").eval() for module in row])
            for s, module in enumerate(row):
                weights = dict(module.state_dict())
                unsaved = [name for name, _ in module.named_buffers() if name not in weights]
                if unsaved:
                    raise InvalidValue(f"block {b}: the buffer {unsaved[0]!r} is not saved with its module")
                files.write_tensors(self._file(b, s), weights)

    def _file(self, block: int, option: int) -> Path:
        return self.folder / f"block{block}_{option}.safetensors"

    def fetch(self, block: int, option: int) -> nn.Module:
        return _filled(self.hollow[block][option], files.read_tensors(self._file(block, option)), "")


def _filled(module: nn.Module, weights: Mapping[str, torch.Tensor], prefix: str) -> nn.Module:
    """A module of its own with these weights. What computes is shared: copying a traced graph takes milliseconds."""
    made: nn.Module = object.__new__(type(module))
    parameters = {
        name: None if tensor is None else nn.Parameter(weights[prefix + name], requires_grad=False)
        for name, tensor in module._parameters.items()
    }
    buffers = {name: None if b is None else weights[prefix + name] for name, b in module._buffers.items()}
    children = {
        name: None if child is None else _filled(child, weights, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    made.__dict__ |= module.__dict__ | {"_parameters": parameters, "_buffers": buffers, "_modules": children}
    return made


__all__ = ["LegoModel", "Residency", "cut", "stretch"]
