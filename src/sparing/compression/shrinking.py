"""Structured pruning that really cuts: whole neurons, channels and attention heads leave, and the model is smaller.

Which tensors belong together is found by running the model once and watching which layer's output becomes which
layer's input. A unit (a neuron, a channel, a head) leaves with its row in the layer that makes it, its entries in the
norms on the way, and its column in the layer that reads it. Units are ranked by the norm of all these numbers, the
group norm of Li et al. 2017 ("Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3) extended to the
reading side (Fang et al. 2023, DepGraph, arXiv:2301.12900, eq. 5).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from sparing.compression.pruning import GUARD, check_sparsity, reasons, sparsity_of
from sparing.core.errors import InvalidValue, NoEffect, did_you_mean, shown
from sparing.core.predictor import ModelSpec, ModulePredictor, build_model, outline, spec_of
from sparing.core.predictor.module import count_macs
from sparing.core.predictor.tree import leaves
from sparing.core.step import Stage, Step, step
from sparing.models.bert import Bert, EncoderBlock
from sparing.models.convnet import ConvNet
from sparing.models.mlp import MLP
from sparing.models.mobilenet import MobileNet
from sparing.models.surgery import arguments_of, run_on
from sparing.models.vit import Attention, TransformerBlock, ViT

if TYPE_CHECKING:
    from sparing.core.job import Job

Kind = Literal["neurons", "channels", "heads"]
Norm = Literal["l1", "l2"]
ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Identity,
    nn.Dropout,
)
"""Layers that act on each number alone."""
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d)
"""Layers that act on each channel alone."""
ELEMENTWISE_FUNCTIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "hardswish", "hardtanh", "sigmoid",
    "tanh", "softplus", "dropout", "contiguous",
}  # fmt: skip
POOL_FUNCTIONS = {
    "max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "dropout2d",
}  # fmt: skip
SAME = 1e-4
"""How far, of the largest output, the cut model may be from the one whose units are only silenced."""


# --- what belongs together -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """Where a group's units lie in one tensor: along ``dim``, unit u at [o, u, i] of (outer, units, inner)."""

    module: str
    tensor: str
    dim: int
    outer: int = 1
    inner: int = 1
    offset: int = 0
    """Entries before the first."""

    def entries(self, units: Tensor, size: int) -> Tensor:
        """Indices along ``dim`` of these of ``size`` units, in the tensor's order."""
        rows = torch.arange(self.outer)[:, None, None] * size + units[None, :, None]
        return (rows * self.inner + torch.arange(self.inner)).flatten() + self.offset

    def of(self, model: nn.Module) -> Tensor:
        """The tensor."""
        return getattr(model.get_submodule(self.module), self.tensor)

    def by_unit(self, model: nn.Module, size: int) -> Tensor:
        """The tensor's numbers that belong to each unit, (units, …)."""
        tensor = self.of(model).detach().movedim(self.dim, 0)
        chosen = tensor[self.entries(torch.arange(size), size).to(tensor.device)]
        return chosen.reshape(self.outer, size, self.inner, -1).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Group:
    """Units that can leave one by one, and the tensors they leave from."""

    name: str
    """The layer that makes them; of heads the attention."""
    kind: Kind
    size: int
    """How many units there are."""
    slices: tuple[Slice, ...]
    """All of their numbers, those of the reader included."""
    made_by: Slice
    """The weight that makes a unit: where it is zero, the unit is constant."""
    read_by: Slice
    """The weight that reads it: where it is zero, the unit has no effect."""
    constant: Callable[[nn.Module], Tensor]
    """model → the constant (units · inner,) that the reader gets for a unit that is made by zeros; NaN where it is
    none, at an image's border for example."""

    def norms(self, model: nn.Module, norm: Norm = "l2") -> Tensor:
        """The norm of each unit's weights, (units,): of those that make it, that act on it, and that read it."""
        power = 1 if norm == "l1" else 2
        parts = [item.by_unit(model, self.size) for item in self.slices if item.of(model).ndim > 1]
        return torch.cat(parts, 1).double().abs().pow(power).sum(1).pow(1 / power).cpu()

    def idle(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """(which units change no output when they leave, the constants to be added to what the reader computes)."""
        unread = ~self.read_by.by_unit(model, self.size).any(1).cpu()
        unmade = ~self.made_by.by_unit(model, self.size).any(1).cpu()
        constant = self.constant(model).reshape(self.size, -1).cpu()
        reader: Any = model.get_submodule(self.read_by.module)
        borders = isinstance(reader, nn.Conv2d) and reader.padding not in (0, (0, 0), "valid")
        silent = (constant == 0).all(1)
        stays = constant.isfinite().all(1) & (reader.bias is not None) & (not borders)
        folded = unmade & stays & ~silent & ~unread
        return unread | (unmade & silent) | folded, torch.where(folded[:, None], constant, 0.0)


@dataclass(frozen=True)
class Look:
    """What one run of a model showed: its groups, and why other layers make none."""

    groups: tuple[Group, ...]
    passed_over: Mapping[str, str]


@dataclass(eq=False)
class _Node:
    """One call of a layer without children, or of a function outside of such layers."""

    name: str
    module: nn.Module | None
    inputs: list[_Node | None]
    """Who made its tensor inputs; None: nobody that was seen."""
    shape: tuple[int, ...]
    """Of its output."""
    from_shape: tuple[int, ...]
    """Of its first tensor input."""
    again: Callable[[Tensor], Any]
    """The same call on another tensor."""
    users: list[_Node] = field(default_factory=list)
    given_out: bool = False


class _Watch(TorchFunctionMode):
    """Records calls of layers without children and of functions outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.nodes: list[_Node] = []
        self.made: dict[int, _Node] = {}
        self.alive: list[Any] = []  # so that no id is used twice
        self.direct: set[int] = set()
        """Ids of parameters that a function outside of their layer takes."""

    def run(self, model: nn.Module, example: Any) -> None:
        """Watch one call."""
        given = arguments_of(example)
        hooks = []
        for name, module in model.named_modules():
            if any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention):
                continue
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leaver(name), with_kwargs=True))
        try:
            with self:
                answer = run_on(model, given)
        finally:
            for hook in hooks:
                hook.remove()
        for _, leaf in leaves(answer):
            if isinstance(leaf, Tensor) and id(leaf) in self.made:
                self.made[id(leaf)].given_out = True

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leaver(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, named: Any, answer: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                self._add(name, module, (args, named), answer, module)

        return leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.depth:
            return func(*args, **named)
        self.depth += 1  # what a function calls inside is its own affair
        try:
            answer = func(*args, **named)
        finally:
            self.depth -= 1
        if any(isinstance(leaf, Tensor) for _, leaf in leaves(answer)):

            def again(tensor: Tensor) -> Any:
                given = [tensor if isinstance(value, Tensor) else value for value in args]
                return func(*given, **{name: tensor if isinstance(v, Tensor) else v for name, v in named.items()})

            self._add(getattr(func, "__name__", "?"), None, (args, named), answer, again)
        return answer

    def _add(self, name: str, module: nn.Module | None, given: Any, answer: Any, again: Callable[..., Any]) -> None:
        tensors = [leaf for _, leaf in leaves(given) if isinstance(leaf, Tensor)]
        outputs = [leaf for _, leaf in leaves(answer) if isinstance(leaf, Tensor)]
        self.direct |= {id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)}
        sources = [self.made.get(id(tensor)) for tensor in tensors]
        shape = tuple(outputs[0].shape) if len(outputs) == 1 else ()
        node = _Node(name, module, sources, shape, tuple(tensors[0].shape) if tensors else (), again)
        for source in sources:
            if source is not None:
                source.users.append(node)
        self.nodes.append(node)
        self.alive += [*tensors, *outputs]
        self.made |= {id(tensor): node for tensor in outputs}


def find_groups(model: nn.Module, example: Any, kinds: Collection[Kind] = ("neurons", "channels", "heads")) -> Look:
    """What can be cut out of a model, by running it once on ``example`` in evaluation mode.

    Neurons between two linear layers and channels between two convolutions, or a convolution and a linear layer, where
    nothing but activations, batch norms, depth-wise convolutions, pooling and flattening stands between and nobody else
    reads them; whole heads of the attention of ``bert`` and ``vit``. What is added to something (a residual sum) or
    normalised over its units (a layer norm) stays.

    ``example``: a tensor, a tuple of positional inputs, or a mapping of named ones.
    """
    model = copy.deepcopy(model).eval()
    watch = _Watch()
    watch.run(model, example)
    calls: dict[str, int] = {}
    for node in watch.nodes:
        if node.module is not None:
            calls[node.name] = calls.get(node.name, 0) + 1
    held: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held[id(parameter)] = held.get(id(parameter), 0) + 1
    shared = watch.direct | {key for key, count in held.items() if count > 1}
    found: list[Group] = []
    passed = {
        name: "it is parametrised; fold what is on it first"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and parametrize.is_parametrized(layer)
    }
    in_heads: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, EncoderBlock | Attention) and not any(key.startswith(f"{name}.") for key in passed):
            found.append(_heads(name, module))
            in_heads |= {item.module for item in found[-1].slices}
    for node in watch.nodes:
        layer = node.module
        if not isinstance(layer, nn.Linear | nn.Conv2d) or node.name in in_heads:
            continue
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            passed[node.name] = "a convolution in groups"
            continue
        group = _follow(node, calls, shared)
        if isinstance(group, Group):
            found.append(group)
        else:
            passed[node.name] = group
    along = {item.module for group in found for item in group.slices} - {item.read_by.module for item in found}
    passed = {name: reason for name, reason in passed.items() if name not in along}
    passed |= {group.name: f"{group.kind} are not asked for" for group in found if group.kind not in kinds}
    return Look(tuple(group for group in found if group.kind in kinds), passed)


def _heads(name: str, module: EncoderBlock | Attention) -> Group:
    """The heads of one attention. Its weights sum to one, so where all values are a bias, that is what a head gives."""
    prefix, heads = f"{name}." if name else "", module.heads
    if isinstance(module, EncoderBlock):
        names, out, width, outer = ["query", "key", "value"], "attention_out", module.value.out_features // heads, 1
    else:
        names, out, width, outer = ["qkv"], "proj", module.proj.in_features // heads, 3
    rows = [Slice(f"{prefix}{part}", tensor, 0, outer, width) for part in names for tensor in ("weight", "bias")]
    reader = Slice(f"{prefix}{out}", "weight", 1, 1, width)
    values = Slice(f"{prefix}{names[-1]}", "weight", 0, 1, width, (outer - 1) * heads * width)

    def constant(model: nn.Module) -> Tensor:
        bias: Any = model.get_submodule(values.module).bias
        return bias.detach()[values.offset :]

    return Group(name or out, "heads", heads, (*rows, reader), values, reader, constant)


def _follow(start: _Node, calls: Mapping[str, int], shared: Collection[int]) -> Group | str:
    """The group of a layer's units, or why they cannot be cut."""
    first: Any = start.module
    linear = isinstance(first, nn.Linear)
    size = first.out_features if linear else first.out_channels
    slices = [Slice(start.name, name, 0) for name in ("weight", "bias") if getattr(first, name) is not None]
    path: list[_Node] = []
    inner, node = 1, start
    while True:
        if problem := _blocked(node, calls, shared) or _unread(node):
            return problem
        reader = node.users[0]
        layer: Any = reader.module
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            break
        own = _acts_on_each(reader, size, linear)
        if isinstance(own, str):
            return own
        if reader.name == "flatten" or isinstance(layer, nn.Flatten):
            inner *= math.prod(reader.from_shape[2:])
        slices += own
        path.append(reader)
        node = reader
    if problem := _blocked(reader, calls, shared):
        return problem
    reads = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    straight = linear or not isinstance(layer, nn.Linear) or len(reader.from_shape) == 2
    if reads != size * inner or not straight or (linear and isinstance(layer, nn.Conv2d)):
        return f"{reader.name} reads something else than its units"
    end = Slice(reader.name, "weight", 1, 1, inner)

    def constant(model: nn.Module) -> Tensor:
        begins: Any = model.get_submodule(start.name)
        value = begins.weight.new_zeros(size) if begins.bias is None else begins.bias.detach().clone()
        with torch.no_grad():
            for passage in path:
                value = _through(model, passage, value)
        return value.repeat_interleave(inner)

    kind: Kind = "neurons" if linear else "channels"
    return Group(start.name, kind, size, (*slices, end), slices[0], end, constant)


def _blocked(node: _Node, calls: Mapping[str, int], shared: Collection[int]) -> str:
    """Why a layer's tensors cannot be cut, or an empty text."""
    if node.module is None or not any(True for _ in node.module.parameters(recurse=False)):
        return ""
    if calls[node.name] > 1:
        return f"{node.name} is called {calls[node.name]} times"
    if any(id(parameter) in shared for parameter in node.module.parameters(recurse=False)):
        return f"the weight of {node.name} is used elsewhere, too"
    return ""


def _unread(node: _Node) -> str:
    """Why it is not known who reads a node's output, or an empty text."""
    if node.given_out:
        return "it gives the outputs"
    if len(node.users) != 1:
        names = ", ".join(user.name for user in node.users)
        return f"{len(node.users)} others read it ({names})" if names else "nobody reads it"
    if len(node.users[0].inputs) != 1:
        return f"{node.users[0].name} joins it with something else"
    return ""


def _acts_on_each(reader: _Node, size: int, linear: bool) -> list[Slice] | str:
    """Tensors of a layer that acts on each unit alone, or why it is not known to."""
    layer: Any = reader.module
    if isinstance(layer, nn.Conv2d):
        if linear or not layer.groups == layer.in_channels == layer.out_channels == size:
            return f"{reader.name} is a convolution in {layer.groups} groups"
        return [Slice(reader.name, name, 0) for name in ("weight", "bias") if getattr(layer, name) is not None]
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.num_features != size or (linear and len(reader.from_shape) != 2):
            return f"{reader.name} normalises something else than its units"
        names = ("weight", "bias", "running_mean", "running_var")
        return [Slice(reader.name, name, 0) for name in names if getattr(layer, name) is not None]
    if isinstance(layer, nn.Flatten) or (layer is None and reader.name == "flatten"):
        if reader.shape != (reader.from_shape[0], math.prod(reader.from_shape[1:])):
            return f"a flattening of {reader.from_shape} to {reader.shape} is not followed"
        return (
            []
            if len(reader.from_shape) == 2 or not linear
            else "its units are flattened together with other dimensions"
        )
    known = (
        isinstance(layer, ELEMENTWISE)
        or type(layer).__name__ == "GELUActivation"  # of transformers
        or (layer is None and reader.name in ELEMENTWISE_FUNCTIONS)
    )
    pools = isinstance(layer, POOLS) or (layer is None and reader.name in POOL_FUNCTIONS)
    if known or (pools and not linear and len(reader.from_shape) == 4):
        return []
    what = f"{reader.name}, a {type(layer).__name__}," if layer is not None else f"the function {reader.name}"
    return f"{what} is not known to act on each unit alone"


def _through(model: nn.Module, node: _Node, value: Tensor) -> Tensor:
    """What becomes of a constant for each unit; NaN where it does not stay one."""
    layer: Any = None if node.module is None else model.get_submodule(node.name)
    if isinstance(layer, nn.Conv2d):
        bias = value.new_zeros(()) if layer.bias is None else layer.bias
        if layer.padding in (0, (0, 0), "valid"):
            return value * layer.weight.flatten(1).sum(1) + bias
        return torch.where(value == 0, bias.expand_as(value), math.nan)
    if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
        return layer(value[None, :, None, None] if isinstance(layer, nn.BatchNorm2d) else value[None]).flatten()
    if isinstance(layer, nn.Flatten) or (layer is None and node.name == "flatten"):
        return value
    if isinstance(layer, POOLS) or (layer is None and node.name in POOL_FUNCTIONS):
        averages = isinstance(layer, nn.AvgPool2d) or node.name == "avg_pool2d"
        return torch.where(value == 0, value, math.nan) if averages else value  # zeros may be averaged in at a border
    return node.again(value) if layer is None else layer(value)


# --- cutting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CutGroup:
    """What became of one group."""

    name: str
    kind: Kind
    before: int
    after: int
    idle: int
    """Units among those that left which had no effect on the outputs, but for a constant that a bias took over."""


@dataclass(frozen=True)
class ShrinkReport:
    """What :func:`shrink` cut."""

    groups: tuple[CutGroup, ...]
    passed_over: Mapping[str, str]
    """Everything that was looked at besides → why it stays."""
    parameters: tuple[int, int]
    """Before and after."""
    macs: tuple[int, int] | None
    """Multiply-accumulates of one sample before and after; None where the example is no tuple."""
    rebuilt: bool
    """Whether the model's builder can build the smaller one, so that it can be saved as weights."""

    def __str__(self) -> str:
        listed = ", ".join(f"{group.name} {group.before} → {group.after} {group.kind}" for group in self.groups)
        idle = sum(group.idle for group in self.groups)
        left = sum(group.before - group.after for group in self.groups)
        return f"{listed}; {idle} of the {left} units that left had no effect; passed over: {reasons(self.passed_over)}"


def shrink(
    model: nn.Module,
    example: Any,
    ratio: float = 0.25,
    norm: Norm = "l2",
    *,
    kinds: Collection[Kind] = ("neurons", "channels", "heads"),
    exclude: Sequence[str] = (),
    multiple_of: int = 1,
) -> tuple[nn.Module, ShrinkReport]:
    """Cut units out of a model: (a smaller copy, what was cut).

    From every group of :func:`find_groups` a share ``ratio`` of its units leaves: first those without any effect (what
    a pruning set to zero), then those with the smallest norm of the weights that make, change and read them. With
    ``ratio=0`` only the former leave, and the outputs stay what they are. At least one unit of each group stays.

    A model that :func:`~sparing.build_model` built of ``bert``, ``vit``, ``convnet``, ``mobilenet`` or ``mlp`` remains
    one: its spec has the new widths. Another is no longer what its builder makes, and is deployed as an ONNX graph.

    Args:
        model: stays as it is; without parametrisations on the layers to be cut.
        example: inputs of the model: a tensor, a tuple of positional or a mapping of named ones. The result is
            compared with the original on them, in which the same units are silenced.
        ratio: share of the units of each group, 0 ≤ ratio < 1.
        norm: "l1" or "l2".
        kinds: what may leave: "neurons", "channels", "heads".
        exclude: patterns of names of groups to leave as they are.
        multiple_of: the number of units that stay is rounded up to a multiple of this.

    Raises:
        InvalidValue: arguments outside what is allowed, or weights that are NaN or infinite, naming the layer.
        NoEffect: nothing could be cut; the message lists what was looked at, and why it stays.
    """
    check_sparsity(ratio, "ratio")
    _check(norm, kinds, multiple_of)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InvalidValue(f"{name} holds NaN or infinity; its size says nothing about what can go")
    look = find_groups(model, example, kinds)
    names = [group.name for group in look.groups]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidValue(
                f"exclude: {pattern!r} matches nothing that could be cut.{did_you_mean(pattern, names)} There are: "
                f"{', '.join(names) or 'none'}"
            )
    passed = dict(look.passed_over)
    made, silenced = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    done: list[CutGroup] = []
    for group in look.groups:
        if any(fnmatchcase(group.name, pattern) for pattern in exclude):
            passed[group.name] = "excluded"
            continue
        smaller, quiet = copy.deepcopy(made), copy.deepcopy(silenced)
        cut = _cut_group(smaller, quiet, group, ratio, norm, multiple_of)
        if cut.after == cut.before:
            passed[group.name] = f"all its {cut.before} {cut.kind} stay"
        elif problem := _difference(smaller, quiet, example):
            passed[group.name] = problem
        else:
            made, silenced = smaller, quiet
            done.append(cut)
    if not done:
        raise NoEffect(f"nothing of {type(model).__name__} can be cut with ratio = {ratio:g}; {reasons(passed)}")
    for one, original in zip(made.modules(), model.modules(), strict=True):
        one.training = original.training
    sizes = (_count(model), _count(made))
    macs = None
    if isinstance(example, tuple):
        macs = (count_macs(model, example)[0], count_macs(made, example)[0])
    return made, ShrinkReport(tuple(done), passed, sizes, macs, _name_sizes(made))


def _check(norm: Any, kinds: Any, multiple_of: Any) -> None:
    if norm not in ("l1", "l2"):
        raise InvalidValue(f'norm = {shown(norm)}; "l1" or "l2" is expected')
    known = ("neurons", "channels", "heads")
    if isinstance(kinds, str) or not kinds or any(kind not in known for kind in kinds):
        raise InvalidValue(f"kinds = {shown(kinds)}; some of {', '.join(known)} are expected")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise InvalidValue(f"multiple_of = {shown(multiple_of)}; a whole number of at least 1 is expected")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _cut_group(
    made: nn.Module, silenced: nn.Module, group: Group, ratio: float, norm: Norm, multiple_of: int
) -> CutGroup:
    """Cut one group in ``made``; in ``silenced`` its units stay, but are not read."""
    size = group.size
    idle, constants = group.idle(made)
    leaving = max(int(idle.sum()), int(ratio * size + GUARD))
    staying = min(size, max(1, -(-max(size - leaving, 1) // multiple_of) * multiple_of))
    norms = group.norms(made, norm)
    order = torch.argsort(torch.where(idle, -1.0, norms), stable=True)
    gone, kept = order[: size - staying].sort().values, order[size - staying :].sort().values
    if len(gone):
        for model in (made, silenced):
            _fold(model, group, constants, gone)
        with torch.no_grad():
            read = group.read_by.of(silenced)
            read.index_fill_(group.read_by.dim, group.read_by.entries(gone, size).to(read.device), 0.0)
        for item in group.slices:
            _keep(made, item, kept, size)
        if group.kind == "heads":
            attention: Any = made.get_submodule(group.name)
            attention.heads = staying
    return CutGroup(group.name, group.kind, size, staying, int(idle[gone].sum()))


def _fold(model: nn.Module, group: Group, constants: Tensor, gone: Tensor) -> None:
    """Add what the reader computes of the constants of the units that leave to its bias."""
    leaving = torch.zeros_like(constants)
    leaving[gone] = constants[gone]
    if not bool(leaving.any()):
        return
    reader: Any = model.get_submodule(group.read_by.module)
    weight = reader.weight.detach()
    matrix = weight if weight.ndim == 2 else weight.flatten(2).sum(2)
    with torch.no_grad():
        reader.bias += matrix @ leaving.flatten().to(matrix)


def _keep(model: nn.Module, item: Slice, kept: Tensor, size: int) -> None:
    module: Any = model.get_submodule(item.module)
    tensor = getattr(module, item.tensor)
    smaller = tensor.detach().index_select(item.dim, item.entries(kept, size).to(tensor.device)).clone()
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, tensor.requires_grad)
    setattr(module, item.tensor, smaller)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        if module.groups > 1:
            module.groups = module.weight.shape[0]
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = len(smaller)


def _difference(made: nn.Module, silenced: nn.Module, example: Any) -> str:
    """Why the cut model does not answer as the whole one whose units are silenced, or an empty text.

    Models may look at their own sizes, which nobody but they knows.
    """
    answers = []
    for model in (made, silenced):
        try:
            tree = run_on(model, arguments_of(example))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            return f"without some of its units the model does not run: {error}"
        answers.append([leaf.double() for _, leaf in leaves(tree) if isinstance(leaf, Tensor)])
    for one, other in zip(*answers, strict=True):
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        if one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=SAME * scale, equal_nan=True):
            return "without some of its units the model answers otherwise than when they are silenced"
    return ""


# --- how a builder is told -------------------------------------------------------------------------------------------


def _name_sizes(model: nn.Module) -> bool:
    """Give a model's spec its new sizes; it loses it where its builder cannot be told."""
    spec = spec_of(model)
    fields = _sizes(model)
    model.__dict__.pop("_sparing_spec", None)
    if spec is None or fields is None:
        return False
    told = ModelSpec(spec.builder, {**spec.config, **fields})
    again = outline(lambda: build_model(told))
    shapes = [{name: t.shape for name, t in each.state_dict().items()} for each in (model, again)]
    if shapes[0] != shapes[1]:
        return False
    model._sparing_spec = spec_of(again)  # type: ignore[assignment]
    return True


def _sizes(model: nn.Module) -> dict[str, Any] | None:
    """The fields by which the builder of one of our models makes it with the sizes it has."""
    if isinstance(model, MLP):
        return {"widths": [layer.out_features for layer in model.layers if isinstance(layer, nn.Linear)]}
    if isinstance(model, ConvNet):
        stages = [
            [part.out_channels for part in stage.children() if isinstance(part, nn.Conv2d)] for stage in model.stages
        ]
        return {"widths": [_one(stage) for stage in stages]}
    if isinstance(model, MobileNet):
        blocks: list[Any] = [list(stage.children()) for stage in model.stages]
        return {
            "stem_dim": model.stem[0].out_channels,
            "widths": [stage[-1].project[0].out_channels for stage in blocks],
            "hidden": [block.expand[0].out_channels for stage in blocks for block in stage],
        }
    if isinstance(model, Bert):
        encoders: list[Any] = list(model.blocks)
        return {
            "heads": _one([block.heads for block in encoders]),
            "head_dim": encoders[0].query.out_features // encoders[0].heads,
            "hidden": _one([block.up.out_features for block in encoders]),
        }
    if isinstance(model, ViT) and all(isinstance(block, TransformerBlock) for block in model.blocks):
        vits: list[Any] = list(model.blocks)
        return {
            "heads": _one([block.attn.heads for block in vits]),
            "head_dim": vits[0].attn.proj.in_features // vits[0].attn.heads,
            "hidden": _one([block.mlp.fc1.out_features for block in vits]),
        }
    return None


def _one(values: list[int]) -> int | list[int]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else values


# --- the step --------------------------------------------------------------------------------------------------------


@step("shrink")
class Shrink(Step):
    """Cut whole neurons, channels and attention heads out of the model, so that it is smaller in every runtime.

    Those that a pruning has set to zero leave first, then those with the smallest weights. Train again afterwards.
    """

    stage: ClassVar[Stage] = Stage.MODEL
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    realises: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    source: ClassVar[str] = (
        "Li et al. 2017, Pruning Filters for Efficient ConvNets, arXiv:1608.08710, section 3; groups after Fang et al. "
        "2023, DepGraph, arXiv:2301.12900; heads: Michel et al. 2019, arXiv:1905.10650"
    )

    ratio: float = Field(default=0.25, ge=0, lt=1)
    """Share of the units of each group that leaves; 0: only those without effect."""
    norm: Norm = "l2"
    """How a unit's weights are measured."""
    kinds: tuple[Kind, ...] = ("neurons", "channels", "heads")
    """What may leave."""
    exclude: tuple[str, ...] = ()
    """Patterns of names of layers whose units stay, e.g. "blocks.0.*"."""
    multiple_of: int = Field(default=1, ge=1)
    """The number of units that stay is rounded up to a multiple of this; kernels like 4, 8 or 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _check(self.norm, self.kinds, self.multiple_of)
        except InvalidValue as error:
            raise InvalidValue(f"{self.id}: {error}") from None

    def apply(self, job: Job) -> Job:
        """The job with the smaller model, and its predictor if it had one."""
        made, report = shrink(
            job.fresh_model(),
            job.task.example_input(2),
            self.ratio,
            self.norm,
            kinds=self.kinds,
            exclude=self.exclude,
            multiple_of=self.multiple_of,
        )
        before, after = report.parameters
        job.record("parameters cut", before - after, "", how="derived", better="higher")
        if report.macs is not None:
            job.record("MACs cut", report.macs[0] - report.macs[1], "", how="derived", better="higher")
        left = {group.kind: 0 for group in report.groups}
        for group in report.groups:
            left[group.kind] += group.before - group.after
        for kind, count in left.items():
            job.record(f"{kind} cut", count, "", how="derived", better="higher")
        job.notes.remarks.append(str(report))
        stayed = sparsity_of(made)
        zeros = stayed.sparsity if stayed.layers else 0.0
        if zeros > 0.01:
            job.notes.remarks.append(f"{zeros:.0%} of the weights that stay are zero, which only compile leaves out")
        if not report.rebuilt:
            job.notes.remarks.append(
                "the smaller model is not what its builder makes, so it is saved as an ONNX graph only (see export)"
            )
        predictor = None if job.predictor is None else ModulePredictor(made, job.task)
        return job.replace(model=made, predictor=predictor)
