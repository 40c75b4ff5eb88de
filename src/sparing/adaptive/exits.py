"""Exits: small classifiers on the way through a network, on any sequential or residual backbone.

Predictive Exit (Li et al. 2023, AAAI, arXiv:2206.04685), section "unified exits", after Bag-of-Features pooling
(Passalis et al. 2020, "Efficient adaptive inference for deep convolutional neural networks using hierarchical early
exits").
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from sparing.adaptive.exit_cost import CostModel
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect
from sparing.core.predictor.module import count_macs

CODEWORDS = 64
EPSILON = 5e-16
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish)
CONVOLUTIONS = (nn.Conv2d, nn.Conv1d, nn.Conv3d)


class BoFPooling(nn.Module):
    """Bag-of-features pooling: how much of each codeword there is, in each part of the map.

    u = tanh(a·conv1×1(x) + c), (u + 1)/2, normalised over the codewords; then averaged. ``variant`` 2: adaptively to
    ``pool`` × ``pool``. ``variant`` 1: with kernel and stride ``horizon``, a remainder dropped, times the trained
    scalars n1 (initially the number of codewords) and n2 (initially ``horizon``).

    Shapes: (N, channels, H, W) → (N, codewords · rows · columns), in this order.
    """

    def __init__(
        self,
        in_channels: int,
        codewords: int = CODEWORDS,
        pool: int = 2,
        variant: Literal[1, 2] = 2,
        horizon: int | None = None,
        codebook: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.variant, self.pool, self.horizon = variant, pool, horizon
        self.codebook = nn.Conv2d(in_channels, codewords, 1) if codebook is None else codebook
        self.a = nn.Parameter(torch.ones(1))
        self.c = nn.Parameter(torch.zeros(1))
        if variant == 1:
            if horizon is None:
                raise InvalidValue("variant 1 averages with a kernel: horizon, its size in positions, is needed")
            self.n1 = nn.Parameter(torch.full((1,), float(codewords)))
            self.n2 = nn.Parameter(torch.full((1,), float(horizon)))

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n features"]:
        """The pooled histograms."""
        # (tanh(z) + 1) / 2 as the sigmoid of 2z, which keeps its digits where a codeword is rare: where all are, the
        # quotient below is made of them. The Sigmoid of ONNX Runtime does not keep them.
        z = 2 * self.a * self.codebook(x) + 2 * self.c
        u = 1 / (1 + torch.exp(-z)) if torch.onnx.is_in_onnx_export() else torch.sigmoid(z)
        u = u / (u.sum(dim=1, keepdim=True) + EPSILON)
        if self.variant == 1:
            return (F.avg_pool2d(u * self.n1, self.horizon or 1) * self.n2).flatten(1)
        return F.adaptive_avg_pool2d(u, self.pool).flatten(1)


class BoFExit(nn.Module):
    """An exit: :class:`BoFPooling`, then two linear layers without anything between them.

    Shapes: (N, channels, H, W) → logits (N, num_classes). ``pool=1`` leaves the first linear layer out, as variant 1
    does where its pooled map is 1×1. ``hidden`` and ``classifier`` may be given, to be shared with other exits.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        codewords: int = CODEWORDS,
        pool: int = 2,
        variant: Literal[1, 2] = 2,
        horizon: int | None = None,
        *,
        codebook: nn.Module | None = None,
        hidden: nn.Module | None = None,
        classifier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InvalidValue(f"num_classes = {num_classes}; an exit needs at least 2")
        if pool < 1 or codewords < 1:
            raise InvalidValue(f"codewords = {codewords}, pool = {pool}; at least 1 is expected of each")
        self.pooling = BoFPooling(in_channels, codewords, pool, variant, horizon, codebook)
        if pool == 1:
            self.hidden: nn.Module = nn.Identity()
        else:
            self.hidden = nn.Linear(codewords * pool * pool, codewords) if hidden is None else hidden
        self.classifier = nn.Linear(codewords, num_classes) if classifier is None else classifier

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        return self.classifier(self.hidden(self.pooling(x)))


class _Sized(fx.Proxy):
    """A traced tensor whose sizes are the example's numbers; only the first, of the samples, stays open."""

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim"):
            assert isinstance(self.tracer, _Tracer)
            value = self.tracer.value(self.node)
            if isinstance(value, Tensor):
                samples: Any = super().__getattr__("shape")
                return value.ndim if name == "ndim" else (samples[0], *value.shape[1:])
        return super().__getattr__(name)


class _Tracer(fx.Tracer):
    """Tracing that answers a model's questions about shapes, as its checks of inputs ask them, from an example.

    Questions about values are refused: what is traced must hold for every input.
    """

    READ = ("item", "tolist", "numpy")

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.values: dict[fx.Node, Any] = {}
        self.evaluating = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self.evaluating else super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self.value(obj.node)
        if isinstance(value, Tensor):
            return super().to_bool(obj)  # raises, naming the line
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Any:
        value = self.value(obj.node)
        if isinstance(value, tuple):  # a shape, taken apart
            return iter([obj[i] for i in range(len(value))])  # type: ignore[index]
        return super().iter(obj)

    def value(self, node: fx.Node) -> Any:
        """What a node is for the example."""
        pending = [node]
        while pending:  # no recursion: it is as deep as the network
            current = pending[-1]
            missing = [earlier for earlier in current.all_input_nodes if earlier not in self.values]
            pending += missing
            if not missing:
                pending.pop()
                if current not in self.values:
                    self.evaluating = True
                    try:
                        self.values[current] = self._computed(current)
                    finally:
                        self.evaluating = False
        return self.values[node]

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "call_method" and node.target in self.READ:
            raise fx.proxy.TraceError(f"its way depends on a value, read by {node.target}()")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        if node.op == "placeholder":
            return self.example
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert not isinstance(self.root, dict)
        call = self.root.get_submodule(str(node.target)).forward if node.op == "call_module" else node.target
        return call(*args, **kwargs)  # type: ignore[operator]


def traced(model: nn.Module, example: Tensor, purpose: str = "exits") -> fx.GraphModule:
    """``torch.fx``'s graph of a model; raises :class:`IncompatibleStep` with the reason where there is none.

    ``purpose``: what the messages say the graph is needed for.
    """
    tracer = _Tracer(example)
    try:
        with torch.no_grad():
            graph = fx.GraphModule(model, tracer.trace(model))
    except Exception as error:  # tracing runs the model's own code, which raises anything
        last = next((node.name for node in reversed(getattr(tracer, "graph", fx.Graph()).nodes)), None)
        raise IncompatibleStep(
            f"{type(model).__name__} cannot be traced by torch.fx{f' at the node {last!r}' if last else ''} "
            f"({type(error).__name__}: {error}); {purpose} need a model whose way does not depend on its input's values"
        ) from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if sum(node.op == "placeholder" for node in graph.graph.nodes) != 1:
        raise IncompatibleStep(
            f"{type(model).__name__} takes several inputs; {purpose} need a model of one image tensor"
        )
    return graph


def _module(graph: fx.GraphModule, node: Any) -> nn.Module | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def _is_add(node: Any) -> bool:
    return isinstance(node, fx.Node) and (
        (node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add))
        or (node.op == "call_method" and node.target in ("add", "add_"))
    )


def _is_activation(graph: fx.GraphModule, node: fx.Node) -> bool:
    functions = (F.relu, torch.relu, F.relu6, F.silu, F.gelu, F.hardswish)
    return (
        isinstance(_module(graph, node), ACTIVATIONS)
        or (node.op == "call_function" and node.target in functions)
        or (node.op == "call_method" and node.target in ("relu", "relu_"))
    )


def exit_layers(graph: fx.GraphModule) -> list[str]:
    """Names of the places that can have an exit, in the order they are computed: nodes of a :func:`traced` graph.

    The end of each convolution → (batch norm) → activation, and of each residual sum → activation.
    """
    return [node.name for node in graph.graph.nodes if _is_activation(graph, node) and _ends_layer(graph, node)]


def _ends_layer(graph: fx.GraphModule, activation: fx.Node) -> bool:
    before = activation.args[0] if activation.args else None
    if _is_add(before):
        return True
    if isinstance(_module(graph, before), nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and before is not None:
        before = before.args[0]  # type: ignore[union-attr]
    return isinstance(_module(graph, before), CONVOLUTIONS)


class MultiExitModel(nn.Module):
    """A backbone with exits; made by :func:`attach_exits`.

    ``forward`` gives (N, exits + 1, classes), the final head last: all of them, for training and for tables. What runs
    only as far as it has to is :class:`~sparing.adaptive.exit_predictor.EarlyExitPredictor`, made of :meth:`stages`.
    """

    def __init__(self, graph: fx.GraphModule, layers: Sequence[str], exits: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.backbone = _with_taps(graph, self.layers)
        self.exits = nn.ModuleList(exits)
        self.frozen = False

    def train(self, mode: bool = True) -> MultiExitModel:
        """A frozen backbone stays in evaluation mode: its batch norms would change what it answers."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def freeze_backbone(self, frozen: bool = True) -> MultiExitModel:
        """Train the exits alone, so that the final head's answers stay what they were."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        return self.train(self.training)

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n heads classes"]:
        """Logits of every exit and of the final head."""
        if self.frozen:
            with torch.no_grad():
                *maps, final = self.backbone(x)
        else:
            *maps, final = self.backbone(x)
        return torch.stack([*(exit_(m) for exit_, m in zip(self.exits, maps, strict=True)), final], dim=1)

    def stages(self, places: Sequence[int] | None = None) -> list[fx.GraphModule]:
        """The backbone cut behind each exit's place: exits + 1 modules that give one another all live tensors.

        ``places``: numbers of the exits to cut at, from 0, ascending; None: all.

        Stage i takes what stage i − 1 gave (the first: the image) and gives the map that exit i reads first, then
        whatever later stages read besides, as a skip connection around the exit; the last gives the final logits.
        """
        chosen = self.layers if places is None else [self.layers[place] for place in places]
        return cut(self.backbone, chosen)

    def costs(self, example: tuple[Any, ...]) -> CostModel:
        """True multiply-accumulates of one sample: of each stage, each exit, and a round of a forecast."""
        layer_macs, exit_macs = [], []
        with torch.no_grad():
            values: Any = tuple(torch.as_tensor(item) for item in example)
            for i, stage in enumerate(self.stages()):
                layer_macs.append(float(count_macs(stage, values)[0]))
                values = stage.eval()(*values)
                values = values if isinstance(values, tuple) else (values,)
                if i < len(self.exits):
                    exit_macs.append(float(count_macs(self.exits[i], (values[0],))[0]))
        classes = int(values[0].shape[-1])
        return CostModel(tuple(layer_macs), tuple(exit_macs), 3.0 * classes)


def _with_taps(graph: fx.GraphModule, layers: Sequence[str]) -> fx.GraphModule:
    """The graph that gives the values of these nodes, then its own output."""
    taken = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    by_name: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            final = node.args[0]
            if not isinstance(final, fx.Node):
                raise IncompatibleStep("the backbone gives several outputs; exits need one tensor of logits")
            taken.output((*(by_name[name] for name in layers), made[final]))
        else:
            made[node] = taken.node_copy(node, lambda n: made[n])
            made[node].name = node.name
            by_name[node.name] = made[node]
    return fx.GraphModule(graph, taken)


def cut(graph: fx.GraphModule, layers: Sequence[str]) -> list[fx.GraphModule]:
    """Stages of a graph whose output is (value of each of ``layers`` …, final): see :meth:`MultiExitModel.stages`.

    Stages give one another values of samples only. Parameters, and numbers read from a shape, are found again in every
    stage that uses them: what is handed on loses the rows of samples that left.
    """
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    light = _light(nodes)
    places = [node.name for node in nodes]
    ends = [places.index(name) + 1 for name in layers] + [len(nodes)]
    output = next(node for node in graph.graph.nodes if node.op == "output")
    final: fx.Node = output.args[0][-1]
    made: list[fx.GraphModule] = []
    start = 0
    live: list[fx.Node] = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for stage, end in enumerate(ends):
        inside = [node for node in nodes[start:end] if node not in light]
        new = fx.Graph()
        copied = {node: new.placeholder(node.name) for node in live}
        for node in inside:
            _copy(new, node, copied)
        if stage == len(ends) - 1:
            new.output(copied[final])
        else:
            head = nodes[end - 1]
            read = {final}.union(*(_samples(node, light) for node in nodes[end:] if node not in light))
            kept = [node for node in (*live, *inside) if node is not head and node in read]
            new.output((copied[head], *(copied[node] for node in kept)))
            live = [head, *kept]
        made.append(fx.GraphModule(graph, new))
        start = end
    return made


def _light(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that hold no values of samples: parameters, numbers of a shape, and what is made of these alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        is_shape = (node.op == "call_method" and node.target in ("size", "dim")) or (
            node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")
        )
        if is_shape or all(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _samples(node: fx.Node, light: set[fx.Node]) -> set[fx.Node]:
    """The nodes with values of samples that ``node`` is computed from, directly or through light ones."""
    return set().union(*({a} if a not in light else _samples(a, light) for a in node.all_input_nodes))


def _copy(new: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> None:
    """Copy a node into a graph, after whatever it is computed from that is not there yet."""
    for argument in node.all_input_nodes:
        if argument not in copied:
            _copy(new, argument, copied)
    copied[node] = new.node_copy(node, copied.__getitem__)


def attach_exits(
    model: nn.Module,
    layers: Literal["all"] | Sequence[str] = "all",
    *,
    example: tuple[Any, ...],
    num_classes: int | None = None,
    codewords: int = CODEWORDS,
    pool: int = 2,
    share: Literal["stage"] | None = None,
) -> MultiExitModel:
    """A model with an exit at each of its layers; ``model`` stays as it is.

    Args:
        model: a trained classifier of images, sequential or residual.
        layers: "all" of :func:`exit_layers` but those inside a squeeze-and-excitation, or some of them.
        example: inputs to find shapes by.
        num_classes: of the exits; None: as many as the model has.
        codewords: of each exit.
        pool: each exit's map is pooled to pool × pool; with ``share`` the kernel is half the map's side.
        share: None: each exit has parameters of its own (later code). "stage": one codebook for all exits of one
            resolution and width, one pair of linear layers for all (AAAI code, variant 1).

    Raises:
        IncompatibleStep: the model cannot be traced, has no map of height and width at an exit, or gives no logits.
        NoEffect: it has no place for an exit.
        InvalidValue: a name that is no such place, fewer than 2 classes.
    """
    image = torch.as_tensor(example[0])
    graph = traced(copy.deepcopy(model), image)
    places = exit_layers(graph)
    if not places:
        raise NoEffect(
            f"{type(model).__name__} has no place for an exit: looked for a convolution, perhaps a batch norm, then an "
            "activation, and for a residual sum followed by an activation"
        )
    chosen = list(places if isinstance(layers, str) else layers)
    if isinstance(layers, str) and layers != "all":
        raise InvalidValue(f"layers = {layers!r}; 'all' or a list of names is expected: {', '.join(places)}")
    unknown = [name for name in chosen if name not in places]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        raise InvalidValue(f"layers = {chosen}; different names of {', '.join(places)} are expected")
    chosen.sort(key=places.index)
    taps = _with_taps(graph, chosen)
    with torch.no_grad():
        *maps, final = taps.eval()(image)
        _check_batch(taps, model, image)
    if layers == "all":
        kept = [i for i, m in enumerate(maps) if not _is_gate(m, maps[i + 1 :])]
        chosen, maps = [chosen[i] for i in kept], [maps[i] for i in kept]
    for name, value in zip(chosen, maps, strict=True):
        if value.ndim != 4:
            raise IncompatibleStep(f"{name} gives a value of shape {list(value.shape)}; an exit reads (N, C, H, W)")
    if final.ndim != 2:
        raise IncompatibleStep(f"the model gives {list(final.shape)}; exits need logits (N, classes)")
    classes = int(final.shape[1]) if num_classes is None else num_classes
    exits = _shared(maps, classes, codewords) if share == "stage" else [
        BoFExit(int(m.shape[1]), classes, codewords, min(pool, *m.shape[2:])) for m in maps
    ]  # fmt: skip
    return MultiExitModel(graph, chosen, exits)


def _is_gate(value: Tensor, later: Sequence[Tensor]) -> bool:
    """Whether a map is a squeeze-and-excitation's: one position, and larger maps after it."""
    return math.prod(value.shape[2:]) == 1 and any(math.prod(m.shape[2:]) > 1 for m in later)


def _check_batch(taps: fx.GraphModule, model: nn.Module, image: Tensor) -> None:
    """Refuse a trace that holds for the example's number of samples only."""
    one = image[:1]
    try:
        holds = torch.allclose(taps(one)[-1], copy.deepcopy(model).eval()(one), rtol=1e-3, atol=1e-4)
    except RuntimeError:  # shapes that do not fit
        holds = False
    if not holds:
        raise IncompatibleStep(
            f"{type(model).__name__} traced with {len(image)} samples computes something else for 1; exits need a "
            "model that treats each sample alone"
        )


def _shared(maps: Sequence[Tensor], classes: int, codewords: int) -> list[nn.Module]:
    """Exits of variant 1: a codebook for each shape of maps, two linear layers for all."""
    hidden, classifier = nn.Linear(codewords * 4, codewords), nn.Linear(codewords, classes)
    codebooks: dict[tuple[int, ...], nn.Module] = {}
    exits: list[nn.Module] = []
    for value in maps:
        shape = tuple(int(size) for size in value.shape[1:])
        codebook = codebooks.setdefault(shape, nn.Conv2d(shape[0], codewords, 1))
        side = min(shape[1:])
        horizon, pooled = (side // 2, 2) if side >= 2 else (1, 1)
        exits.append(
            BoFExit(
                shape[0],
                classes,
                codewords,
                pooled,
                1,
                horizon,
                codebook=codebook,
                hidden=hidden,
                classifier=classifier,
            )
        )
    return exits
