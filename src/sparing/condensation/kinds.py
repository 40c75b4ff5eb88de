"""How the data of each kind of task are read from a job, condensed, handed on and shown. The step is thin over this."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sparing.condensation.allocation import LabelAllocation, allocate_labels, rows_for_all
from sparing.condensation.coresets import CoresetSelector, Strategy
from sparing.condensation.evaluation import embed_images
from sparing.condensation.graph_evaluation import (
    EDGE_THRESHOLDS,
    evaluate_condensed_nodes,
    graph_embeddings,
    without_light_edges,
)
from sparing.condensation.graphs import GraphSetCondenser
from sparing.condensation.images import ImageCondenser, labelled_images
from sparing.condensation.nodes import NodeCondenser, check_node_data
from sparing.condensation.pictures import beside, graph_picture, image_sheet
from sparing.condensation.saved import CondensedSet, Kind, data_of, tensors_of
from sparing.condensation.unrolled import LearnedSteps, UnrolledCondenser
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, NoEffect, did_you_mean, shown
from sparing.core.store import JSON
from sparing.core.training import Train, fit
from sparing.data.augmentation import AugmentedImages
from sparing.data.graphs import PackedGraphs, graph_data
from sparing.data.nodes import NodeSet
from sparing.models.gnn import GCN

if TYPE_CHECKING:
    from torch_geometric.data import Data

    from sparing.condensation.step import Condense
    from sparing.core.job import Job
    from sparing.core.store import Progress
    from sparing.core.task import Task

CORE_SETS: Mapping[str, Strategy] = {"random": "random", "herding": "herding", "k_center": "kcenter"}
ARGUMENTS = {"per_class": "n_per_class", "iterations": "max_iter"}
"""Fields of the step that the condensers have under another name."""
FIELDS = (
    *("per_class", "rate", "iterations", "outer_steps", "inner_steps", "batch_real"),
    *("lr_img", "lr_net", "lr_adj", "lr_feat"),
)
"""Fields of the step that are a condenser's arguments."""
OWN = frozenset({"method", "network", "callbacks", "random_state"})
"""Arguments that the step gives itself."""
CUT_EPOCHS = 600
"""Steps of a network that tries how many edges to cut, as when a condensed graph is evaluated."""
DRAWN = 150
"""Most nodes of one graph in a drawing."""
BESIDE = 2
"""Condensed and real graphs of each class that are drawn."""
Condensers = Mapping[str, tuple[type, Mapping[str, Any]]]
"""Method → (condenser, its arguments where they differ from its own defaults)."""
Pictures = list[tuple[str, np.ndarray, str]]
"""(title, pixels, caption) of each."""


@dataclass(frozen=True)
class Made:
    """A condensed set and how it was made."""

    data: Any
    """As :class:`~sparing.condensation.saved.CondensedSet` holds it."""
    labels: Tensor
    """Class of each sample, (m,)."""
    record: Mapping[str, Any]
    """Plain JSON, the same in every run: settings, loss curve, bytes, what it began with or is made of."""
    steps: LearnedSteps | None = None

    def stored(self) -> dict[str, Any]:
        """What a store keeps."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_of(self.data, self.steps)[1].items()}
        return {"tensors": tensors, "record": dict(self.record)}


@dataclass(frozen=True)
class Real:
    """A job's training data."""

    data: Any
    labels: Tensor
    """Class of each training sample, (n,)."""
    counts: list[int]
    """How many of each class."""
    bytes: int


R = TypeVar("R", bound=Real)


class DataKind(ABC, Generic[R]):
    """One kind of data: what can be done with it by the fields of one step, on one task."""

    capability: ClassVar[str]
    """What a task of this kind has."""
    saved: ClassVar[Kind]
    """What it is called on disk."""
    units: ClassVar[str]
    """What its samples are."""
    condensers: ClassVar[Condensers]
    default: ClassVar[str]
    """The method where none is named."""
    default_size: ClassVar[Mapping[str, Any]]
    """Of core sets."""
    callbacks: Sequence[Any] = ()
    """Of the condenser: an audit attacks it through these."""
    recipe: ClassVar[Mapping[str, Any]]
    """Fields of the training whose network tells samples apart for herding and k-center, epochs among them."""

    def __init__(self, step: Condense, task: Task) -> None:
        self.step, self.task, self.method = step, task, step.method or self.default
        if self.method not in (*CORE_SETS, *self.condensers):
            raise IncompatibleStep(
                f"{step.id!r}: method = {self.method!r} is not for {self.units}, which {task.name!r} is about; for "
                f"these there are {', '.join((*CORE_SETS, *self.condensers))}"
            )

    # --- before anything runs

    def check(self) -> None:
        """Raise for fields that do not suit the method, the data or each other."""
        if self.step.saved is None:
            self.condenser(0)
            self.check_network()
        elif (found := self.step.saved_description.get("kind")) != self.saved:
            raise self.refuse(f"{found}; {self.saved} are needed for {self.task.name!r}")

    def arguments(self) -> dict[str, Any]:
        """The fields as arguments of the condenser; what it has no use for is refused."""
        step, method = self.step, self.method
        kind, own = self.condensers.get(method, (None, {}))
        names = {"n_per_class", "rate"} if kind is None else set(inspect.signature(kind).parameters) - OWN
        outer = {argument: name for name, argument in ARGUMENTS.items()}
        known = sorted(outer.get(name, name) for name in names)
        given = {name: value for name in FIELDS if (value := getattr(step, name)) is not None}
        for name, value in given.items():
            if ARGUMENTS.get(name, name) not in names:
                raise InvalidValue(f"{name} = {value!r}: {method} has no use for it; it takes {', '.join(known)}")
        if step.embed_epochs is not None and method not in ("herding", "k_center"):
            raise InvalidValue(f"embed_epochs = {step.embed_epochs}: only herding and k_center compare embeddings")
        if step.network is not None and method == "random":
            raise InvalidValue(f"network = {step.network!r}: random looks at no network")
        if step.edge_threshold is not None and not self.weighted():
            raise InvalidValue(f"edge_threshold = {step.edge_threshold}: {method} gives no weights of edges here")
        for name in step.settings:
            if name in (*FIELDS, *ARGUMENTS.values(), *OWN):
                raise InvalidValue(f"settings has {name!r}, which is a field of the step, or its own affair")
            if name not in names:
                raise InvalidValue(
                    f"settings has {name!r}, which {method} does not take.{did_you_mean(name, known)} It takes "
                    f"{', '.join(known) or 'none'}"
                )
        return {**own, **{ARGUMENTS.get(name, name): value for name, value in given.items()}, **step.settings}

    def weighted(self) -> bool:
        """Whether what is made has edges of different weights, of which light ones may be cut."""
        return False

    def condenser(self, seed: int, factory: Any = None) -> Any:
        """What does it: a condenser; of core sets the arguments of their allocation, which are checked with it."""
        arguments = self.arguments()
        if self.method in CORE_SETS:
            return arguments or dict(self.default_size)
        kind = self.condensers[self.method][0]
        network = {} if factory is None else {"network": factory}
        try:
            return kind(**self.named(), **arguments, **network, random_state=seed, callbacks=self.callbacks)
        except TypeError as error:
            raise InvalidValue(f"{self.method}: {error}") from error

    def named(self) -> dict[str, Any]:
        """How the condenser is told the method."""
        return {}

    def check_network(self) -> None:
        """Raise for a network that cannot be built, or that does not answer the task's samples."""
        from sparing.core.randomness import isolated_rng

        if self.step.network is None:
            return
        with isolated_rng("does it fit", 0):
            network = self.build()
        check_answer(network, self.task, f"{self.step.id!r}: network = {self.step.network!r}")

    def build(self) -> nn.Module:
        """The network that is named."""
        from sparing.core.predictor import build_model

        name, fields = self.step.named_network()
        return build_model(name, self.task, **fields)

    # --- with a job

    @abstractmethod
    def read(self, job: Job) -> R:
        """The training data; raises with the index of what is wrong with them."""

    def counted(self, labels: Tensor) -> list[int]:
        """How many samples there are of each class of the task; raises :class:`DataError` for one that has none."""
        names = self.task.labels
        counts = torch.bincount(labels, minlength=len(names)).tolist()
        for number, count in enumerate(counts):
            if number >= len(names):
                raise DataError(f"{self.task.name}: label {number}; 0…{len(names) - 1} is expected")
            if count == 0:
                raise DataError(f"{self.task.name}: no training sample of class {names[number]!r}, of {sum(counts)}")
        return counts

    def allocation(self, counts: Sequence[int]) -> LabelAllocation:
        """How many samples each class gets; more than it has are refused."""
        size = {name: value for name in ("per_class", "rate") if (value := getattr(self.step, name)) is not None}
        return rows_for_all(allocate_labels(counts, **(size or self.default_size)))

    def size(self, counts: Sequence[int]) -> int:
        """Samples of the condensed set."""
        return len(self.allocation(counts).labels)

    def check_size(self, real: R) -> None:
        """Raise :class:`NoEffect` for a condensed set that is no smaller than the real one."""
        found = self.size(real.counts)
        if found >= len(real.labels):
            raise NoEffect(
                f"{self.step.id!r}: a condensed set of {found} {self.units} is no smaller than the {len(real.labels)} "
                "real ones; a smaller per_class or rate is needed"
            )

    def make(self, job: Job, real: R, device: torch.device) -> Made:
        """Condense; long work is kept in the job's store."""
        if self.method in CORE_SETS:
            return self.choose(job, real)
        return self.learn(job, real, device, job.store.progress("condensed"))

    @abstractmethod
    def learn(self, job: Job, real: R, device: torch.device, progress: Progress) -> Made:
        """A synthetic set."""

    def choose(self, job: Job, real: R) -> Made:
        """A core set."""
        allocation = self.allocation(real.counts)
        sizes = [last - first for first, last in allocation.ranges]
        for number, (wanted, there) in enumerate(zip(sizes, real.counts, strict=True)):
            if wanted > there:
                raise InvalidValue(
                    f"{self.step.id!r}: {wanted} {self.units} of class {self.task.labels[number]!r} are wanted, but it "
                    f"has {there}"
                )
        embed = None if self.method == "random" else lambda _: self.embed(job, real)
        selector = CoresetSelector(CORE_SETS[self.method], sizes, embed, random_state=job.seed)
        rows = torch.from_numpy(selector.fit(range(len(real.labels)), real.labels).indices_)
        data = self.subset(real, rows)
        record = {
            "settings": {"method": self.method, "sizes": sizes, "random_state": job.seed, **self.embedding_settings()},
            "rows": rows.tolist(),
            "loss_curve": [],
            "bytes_before": real.bytes,
            "bytes_after": nbytes(tensors_of(data)[1]),
        }
        return Made(data, real.labels[rows], record)

    @abstractmethod
    def subset(self, real: R, rows: Tensor) -> Any:
        """The real samples ``rows`` (m,) as a condensed set."""

    def embedding_settings(self) -> dict[str, Any]:
        """What embeddings depend on, for the record."""
        if self.method == "random":
            return {}
        epochs = self.step.embed_epochs or self.recipe["epochs"]
        return {"embed_epochs": epochs, "network": self.step.network or self.network_name}

    network_name: ClassVar[str]
    """Registered name of the network that is trained for embeddings where none is named."""

    @abstractmethod
    def embed(self, job: Job, real: R) -> Tensor:
        """An embedding of each training sample, (n, d), by a network trained on all of them."""

    def trained(self, job: Job, network: nn.Module, train: Any, val: Any) -> nn.Module:
        """The network after the evaluation's recipe on ``train``, kept in the store."""
        from sparing.core.store import TENSORS

        epochs = self.step.embed_epochs or self.recipe["epochs"]
        fields: dict[str, Any] = {"batch_size": len(train), **self.recipe, "epochs": epochs}
        batches = -(-len(train) // fields["batch_size"])
        drop = {"milestones": [(epochs // 2 + 1) * batches], "gamma": 0.1}
        fields |= {"scheduler": "MultiStepLR", "scheduler_args": drop, "restore_best": val is not None}
        settings = Train(id="embedding", **fields)

        def compute() -> Any:
            progress = job.store.progress("embedding_network")
            return dict(
                fit(network, self.task, train, val, settings, seed=job.seed, progress=progress).model.state_dict()
            )

        weights: dict[str, Any] = job.store.once("embedding_network", compute, TENSORS)
        network.load_state_dict(weights)
        return network.eval()

    @abstractmethod
    def check_saved(self, found: CondensedSet, real: R) -> Made:
        """A set from disk that fits the task; raises :class:`IncompatibleStep` for one that does not."""

    @abstractmethod
    def training_set(self, job: Job, made: Made) -> Any:
        """The condensed set as the task's training data."""

    @abstractmethod
    def pictures(self, job: Job, made: Made, real: R) -> Pictures:
        """The condensed set, to look at."""

    def finished(self, job: Job, made: Made, real: R) -> Made:
        """The set after what is chosen on validation data."""
        return made

    def refuse(self, reason: str) -> IncompatibleStep:
        """The error for a saved set."""
        return IncompatibleStep(f"{self.step.id!r}: saved = {self.step.saved} holds {reason}")

    def restored(self, stored: Mapping[str, Any]) -> Made:
        """What :meth:`Made.stored` was made of."""
        data, steps = data_of(self.saved, stored["tensors"], stored["record"].get("sets"))
        return Made(data, stored["tensors"]["y"], stored["record"], steps)


def check_answer(network: nn.Module, task: Task, field: str) -> None:
    """Raise :class:`InvalidValue`, saying ``field``, unless a network answers the task's samples with its logits.

    The network is then in evaluation mode.
    """
    try:
        with torch.no_grad():
            logits = network.eval()(*task.example_input(2)).shape[-1]
    except (RuntimeError, TypeError) as error:
        raise InvalidValue(f"{field}: the network does not run on samples of {task.name!r}: {error}") from error
    needed = task.model_fields().get("num_classes", len(task.labels))
    if logits != needed:
        raise InvalidValue(f"{field}: the network gives {logits} logits; {task.name!r} has {needed} classes")


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors, of sparse ones those of what they hold."""
    total = 0
    for tensor in tensors.values():
        parts = (tensor.coalesce().indices(), tensor.coalesce().values()) if tensor.is_sparse else (tensor,)
        total += sum(part.nbytes for part in parts)
    return total


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealImages(Real):
    """Images (n, C, H, W) in the task's own space, and how to get from there to mean 0 and deviation 1."""

    mean: Tensor = field(default_factory=lambda: torch.zeros(1))
    """Of each channel, (C, 1, 1)."""
    std: Tensor = field(default_factory=lambda: torch.ones(1))
    """Likewise; 1 for a channel that never varies."""

    def normalised(self) -> Tensor:
        """With mean 0 and standard deviation 1 in each channel."""
        return (self.data - self.mean) / self.std


class ImageKind(DataKind[RealImages]):
    """Labelled images."""

    capability = "images"
    saved = "images"
    units = "images"
    condensers: ClassVar[Condensers] = {
        "dc": (ImageCondenser, {}),
        "dsa": (ImageCondenser, {}),
        "dm": (ImageCondenser, {}),
        "dd": (UnrolledCondenser, {}),
    }
    default = "dm"
    default_size: ClassVar[Mapping[str, Any]] = {"per_class": 10}
    network_name = "blocknet"
    recipe: ClassVar[Mapping[str, Any]] = {
        "epochs": 300,
        "batch_size": 256,
        "optimizer": "SGD",
        "optimizer_args": {"momentum": 0.9},
        "lr": 0.01,
        "weight_decay": 5e-4,
    }

    def named(self) -> dict[str, Any]:
        """DD has a class of its own."""
        return {} if self.method == "dd" else {"method": self.method}

    def check_network(self) -> None:
        """Distillation through steps cannot follow what batch norms keep."""
        from sparing.core.predictor import outline

        super().check_network()
        if self.method == "dd" and self.step.network is not None:
            for name, module in outline(self.build).named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    raise IncompatibleStep(
                        f"{self.step.id!r}: network = {self.step.network!r} has a batch norm ({name}), whose "
                        "statistics dd could not learn through; one without, or with instance norms, is needed"
                    )

    def network(self, shape: Sequence[int]) -> Callable[[], nn.Module]:
        """What makes a fresh network for images of this shape (C, H, W)."""
        from sparing.core.predictor import build_model

        if self.step.network is not None:
            return self.build
        channels, height, width = shape
        if height != width:
            raise InvalidValue(f"{self.step.id!r}: images of {height}×{width} pixels are not square; give a network")
        norm = "none" if self.method == "dd" else "instance"
        sizes = {"in_channels": channels, "num_classes": len(self.task.labels), "image_size": height}
        return lambda: build_model("blocknet", **sizes, norm=norm)

    def size(self, counts: Sequence[int]) -> int:
        """DD has a set for each step."""
        if self.method in CORE_SETS:
            return super().size(counts)
        condenser = self.condenser(0)
        return condenser.n_per_class * len(counts) * getattr(condenser, "distill_steps", 1)

    def read(self, job: Job) -> RealImages:
        """All images in memory."""
        if isinstance(job.train, AugmentedImages):
            raise IncompatibleStep(
                f"{self.step.id!r}: the training images change at random whenever they are read, and one view of each "
                "would be condensed; leave out augment, or condense with dsa or dm, which augment as they go"
            )
        images, labels = labelled_images(job.train, every_class=False)
        counts = self.counted(labels)
        std, mean = torch.std_mean(images, (0, 2, 3), correction=0, keepdim=True)
        std = torch.where(std < 1e-6, 1.0, std)
        return RealImages(images, labels, counts, nbytes({"x": images, "y": labels}), mean[0], std[0])

    def learn(self, job: Job, real: RealImages, device: torch.device, progress: Progress) -> Made:
        """By DC, DSA or DM on normalised images; by DD in the task's own space, where its steps are taken."""
        condenser = self.condenser(job.seed, factory=self.network(real.data.shape[1:]))
        own = self.method == "dd"
        condenser.fit((real.data if own else real.normalised()).to(device), real.labels.to(device), keeper=progress)
        images, labels = (tensor.cpu() for tensor in condenser.condensed_.tensors)
        if not own:
            images = images * real.std + real.mean
        steps = condenser.steps_ if own else None
        record = {
            "settings": {**condenser.settings(), "network": self.described(real)},
            "loss_curve": condenser.loss_curve_,
            "mean": None if own else real.mean.flatten().tolist(),
            "std": None if own else real.std.flatten().tolist(),
            "sets": None if steps is None else steps.sets,
            "bytes_before": real.bytes,
            "bytes_after": int(condenser.cost_["bytes_after"]),
        }
        return Made(TensorDataset(images, labels), labels, record, steps)

    def described(self, real: RealImages) -> dict[str, Any]:
        """Name and fields of the network, with which it can be built again."""
        from sparing.core.predictor import outline, spec_of

        spec = spec_of(outline(self.network(real.data.shape[1:])))
        assert spec is not None
        return {"name": spec.builder, **spec.config}

    def subset(self, real: RealImages, rows: Tensor) -> TensorDataset:
        """Real images as they are."""
        return TensorDataset(real.data[rows].clone(), real.labels[rows])

    def embed(self, job: Job, real: RealImages) -> Tensor:
        """What enters the head, of normalised images."""
        from sparing.core.randomness import isolated_rng

        with isolated_rng("embedding network", job.seed):
            network = self.network(real.data.shape[1:])()
        images = real.normalised()
        return embed_images(self.trained(job, network, TensorDataset(images, real.labels), None), images)

    def check_saved(self, found: CondensedSet, real: RealImages) -> Made:
        """Images of the task's size and classes."""
        images, labels = labelled_images(*found.data.tensors, every_class=False)
        if images.shape[1:] != real.data.shape[1:] or int(labels.max()) >= len(real.counts):
            raise self.refuse(
                f"images {tuple(images.shape[1:])} of classes up to {int(labels.max())}; {self.task.name!r} has images "
                f"{tuple(real.data.shape[1:])} of classes 0…{len(real.counts) - 1}",
            )
        return Made(found.data, labels, {"bytes_after": nbytes(tensors_of(found.data, found.steps)[1])}, found.steps)

    def training_set(self, job: Job, made: Made) -> TensorDataset:
        """Pairs of an image and its class."""
        return made.data

    def pictures(self, job: Job, made: Made, real: RealImages) -> Pictures:
        """A sheet of the images, a row for each class."""
        images, labels = made.data.tensors
        low, high = real.data.amin((0, 2, 3)), real.data.amax((0, 2, 3))
        caption = (
            f"{self.units} of the condensed set, a row for each class from {self.task.labels[0]!r} to "
            f"{self.task.labels[-1]!r}, {len(labels)} in all; values beyond those of real images are drawn as the "
            "darkest or brightest of these"
        )
        return [("condensed images", image_sheet(images, labels, low, high), caption)]


# --- nodes of one graph ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealNodes(Real):
    """A PyG graph with ``train_mask`` and ``val_mask``, and its training nodes."""

    nodes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Their numbers, (n,)."""


class NodeKind(DataKind[RealNodes]):
    """Nodes of one graph."""

    capability = "node_classification"
    saved = "node_graph"
    units = "nodes"
    condensers: ClassVar[Condensers] = {
        "one_step": (NodeCondenser, {}),
        "multi_step": (
            NodeCondenser,
            {
                "network": "sgc",
                "distance": "layer_cos",
                "outer_steps": 20,
                "inner_steps": 15,
                "lr_feat": 1e-4,
                "lr_adj": 1e-4,
                "max_iter": 600,
            },
        ),
    }
    default = "one_step"
    default_size: ClassVar[Mapping[str, Any]] = {"rate": 0.5}
    network_name = "gcn"
    recipe: ClassVar[Mapping[str, Any]] = {
        "epochs": 600,
        "optimizer": "Adam",
        "lr": 0.01,
        "weight_decay": 5e-4,
        "validate_every": 10,
    }

    def weighted(self) -> bool:
        """The generator gives each edge a weight."""
        return self.method in self.condensers and self.step.settings.get("structure", "generator") == "generator"

    def arguments(self) -> dict[str, Any]:
        """The network is matched as a matrix product, by its name."""
        found = super().arguments()
        if self.step.network is None or self.method in CORE_SETS:
            return found
        name, own = self.step.named_network()
        if name not in ("gcn", "sgc") or own.keys() - ({"hidden"} if name == "gcn" else set()):
            raise IncompatibleStep(
                f"{self.step.id!r}: network = {self.step.network!r}; nodes are condensed with 'gcn' ({{name: gcn, "
                "hidden: 256}}) or 'sgc'"
            )
        return {**found, "network": name, **own}

    def check_network(self) -> None:
        """Only core sets are compared by a registered model."""
        if self.method in CORE_SETS:
            super().check_network()

    def read(self, job: Job) -> RealNodes:
        """The graph of the training and validation nodes, with the labels of these alone."""
        train, val = job.train, job.val
        if not isinstance(train, NodeSet) or not isinstance(val, NodeSet):
            raise IncompatibleStep(
                f"{self.step.id!r}: the training data are a {type(train).__name__}; nodes of one graph (a NodeSet) are "
                "needed"
            )
        y = torch.zeros(len(train.x), dtype=torch.int64)
        y[train.nodes], y[val.nodes] = train.labels, val.labels
        data = graph_data(train.x, train.edge_index, y, train.edge_weight)
        for name, nodes in (("train_mask", train.nodes), ("val_mask", val.nodes)):
            mask = torch.zeros(len(y), dtype=torch.bool)
            mask[nodes] = True
            data[name] = mask
        data.test_mask = data.val_mask  # what is chosen is chosen on validation nodes
        check_node_data(data)
        # in the graph's order, as the masks have them
        order = train.nodes.argsort()
        size = nbytes({"x": train.x, "edge_index": train.edge_index, "y": y})
        return RealNodes(data, train.labels[order], self.counted(train.labels), size, train.nodes[order])

    def learn(self, job: Job, real: RealNodes, device: torch.device, progress: Progress) -> Made:
        """By one-step matching or GCond; all edges are kept, whatever they weigh."""
        condenser = self.condenser(job.seed)
        condenser.fit(real.data.to(device), keeper=progress)
        graph = condenser.condensed_.cpu()
        record = {
            "settings": condenser.settings(),
            "loss_curve": condenser.loss_curve_,
            "rows": condenser.initial_,
            "bytes_before": real.bytes,
            "bytes_after": nbytes(tensors_of(graph)[1]),
        }
        return Made(graph, graph.y, record)

    def finished(self, job: Job, made: Made, real: RealNodes) -> Made:
        """Without light edges."""
        if not self.weighted():
            return made
        cut = self.step.edge_threshold
        if cut is None:
            scores = job.store.once("edge_threshold", lambda: self.compared(job, made, real), JSON)
            best = max(scores, key=lambda entry: (entry["val accuracy"], -entry["edge_threshold"]))
            cut = best["edge_threshold"]
            job.notes.candidates.extend({**entry, "chosen": entry is best} for entry in scores)
        graph = without_light_edges(made.data, cut)
        record = {**made.record, "edge_threshold": cut, "bytes_after": nbytes(tensors_of(graph)[1])}
        return Made(graph, made.labels, record)

    def compared(self, job: Job, made: Made, real: RealNodes) -> list[dict[str, Any]]:
        """What networks that learn from the graph with different cuts score on the validation nodes."""
        features, classes = real.data.x.shape[1], len(real.counts)
        scores, seen = [], set()
        for cut in EDGE_THRESHOLDS:
            edges = without_light_edges(made.data, cut).edge_index.shape[1]
            if edges in seen:
                continue
            seen.add(edges)
            (score,) = evaluate_condensed_nodes(
                *(made.data, real.data, {"gcn": lambda: GCN(features, classes, hidden=256)}),
                [job.seed],
                edge_thresholds=[cut],
                epochs=CUT_EPOCHS,
                validate_every=10,
            )
            name = f"edges of at least {cut:g}"
            scores.append({"name": name, "edge_threshold": cut, "edges": edges, "val accuracy": score.validation})
        return scores

    def subset(self, real: RealNodes, rows: Tensor) -> Data:
        """Real nodes and the edges among them."""
        nodes, data = real.nodes[rows], real.data
        place = torch.full((len(data.y),), -1)
        place[nodes] = torch.arange(len(nodes))
        ends = place[data.edge_index]
        kept = (ends >= 0).all(0)
        weight = data.get("edge_weight")
        x = data.x.index_select(0, nodes).to_dense()
        return graph_data(x, ends[:, kept], data.y[nodes], None if weight is None else weight[kept])

    def embed(self, job: Job, real: RealNodes) -> Tensor:
        """What enters the last layer."""
        from sparing.core.predictor import build_model
        from sparing.core.randomness import isolated_rng

        with isolated_rng("embedding network", job.seed):
            network = self.build() if self.step.network is not None else build_model("gcn", self.task, hidden=256)
        layers = getattr(network, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise IncompatibleStep(
                f"{self.step.id!r}: network = {self.step.network!r} has no layers; gcn, gat or sage can be compared by"
            )
        network = self.trained(job, network, job.train, job.val)
        seen: list[Tensor] = []
        handle = layers[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            network(real.data.x, real.data.edge_index)
        handle.remove()
        return seen[0].to_dense()[real.nodes]

    def check_saved(self, found: CondensedSet, real: RealNodes) -> Made:
        """A graph with the task's features and classes."""
        graph, width = found.data, real.data.x.shape[1]
        if graph.x.shape[1] != width or not 0 <= int(graph.y.min()) <= int(graph.y.max()) < len(real.counts):
            raise self.refuse(
                f"{graph.x.shape[1]} features and classes up to {int(graph.y.max())}; {self.task.name!r} has {width} "
                f"and the classes 0…{len(real.counts) - 1}",
            )
        if not graph.x.isfinite().all():
            raise self.refuse("features that are not finite")
        return Made(graph, graph.y, {"bytes_after": nbytes(tensors_of(graph)[1])})

    def training_set(self, job: Job, made: Made) -> NodeSet:
        """Every node of the condensed graph."""
        graph = made.data
        return NodeSet(graph.x, graph.edge_index, torch.arange(len(graph.y)), graph.y, graph.get("edge_weight"))

    def pictures(self, job: Job, made: Made, real: RealNodes) -> Pictures:
        """The condensed graph beside a part of the real one."""
        graph, data = made.data, real.data
        kinds = torch.where(data.train_mask, data.y, -1)
        nodes = data.train_mask.nonzero().flatten()[:DRAWN]
        source, target = data.edge_index
        around = torch.cat([nodes, target[torch.isin(source, nodes)]])
        part = torch.tensor(list(dict.fromkeys(around.tolist()))[:DRAWN])
        real_part = self.subset(RealNodes(data, kinds, [], 0, torch.arange(len(kinds))), part)
        few = torch.arange(min(len(graph.y), DRAWN))
        inside = (graph.edge_index < len(few)).all(0)
        drawn = [
            graph_picture(len(few), graph.edge_index[:, inside], graph.y[few], side=480),
            graph_picture(len(part), real_part.edge_index, kinds[part], side=480),
        ]
        caption = (
            f"left the condensed graph ({len(graph.y)} nodes, {graph.edge_index.shape[1]} edges counted in each "
            f"direction), right {len(part)} of the {len(kinds)} real nodes; colours are classes, grey where none is "
            "known in training"
        )
        return [("condensed graph", beside([drawn]), caption)]


# --- sets of graphs ---------------------------------------------------------------------------------------------------


class GraphKind(DataKind[Real]):
    """Graphs with a class each."""

    capability = "graph_classification"
    saved = "graphs"
    units = "graphs"
    condensers: ClassVar[Condensers] = {
        "one_step": (GraphSetCondenser, {}),
        "multi_step": (GraphSetCondenser, {"outer_steps": 5, "inner_steps": 10}),
    }
    default = "one_step"
    default_size: ClassVar[Mapping[str, Any]] = {"per_class": 10}
    network_name = "graph_gcn"
    recipe: ClassVar[Mapping[str, Any]] = {"epochs": 500, "batch_size": 128, "optimizer": "Adam", "lr": 1e-3}

    def network(self) -> nn.Module:
        """A fresh network."""
        from sparing.core.predictor import build_model

        return self.build() if self.step.network is not None else build_model(self.network_name, self.task)

    def check_network(self) -> None:
        """Graphs are matched as edges and as matrices."""
        from sparing.core.predictor import outline

        network = outline(self.network)
        for name in ("forward_dense", "forward_sparse", "embed_sparse"):
            if not callable(getattr(network, name, None)):
                raise IncompatibleStep(
                    f"{self.step.id!r}: network = {self.step.network!r} has no {name}; graph_gcn is one that has"
                )
        super().check_network()

    def read(self, job: Job) -> Real:
        """The graphs in one piece."""
        graphs = PackedGraphs.of(job.train)
        return Real(graphs, graphs.y, self.counted(graphs.y), nbytes(graphs.tensors()))

    def learn(self, job: Job, real: Real, device: torch.device, progress: Progress) -> Made:
        """By DosCond, or by DCG."""
        condenser = self.condenser(job.seed, factory=self.network)
        graphs = PackedGraphs(**{name: tensor.to(device) for name, tensor in real.data.tensors().items()})
        condenser.fit(graphs, keeper=progress)
        made = PackedGraphs.of([graph.cpu() for graph in condenser.condensed_])
        record = {
            "settings": {**condenser.settings(), "network": self.step.network or self.network_name},
            "loss_curve": condenser.loss_curve_,
            "rows": condenser.initial_,
            "sparsity": condenser.sparsity_,
            "bytes_before": real.bytes,
            "bytes_after": nbytes(made.tensors()),
        }
        return Made(made, made.y, record)

    def subset(self, real: Real, rows: Tensor) -> PackedGraphs:
        """Real graphs at their true sizes."""
        return real.data.subset(rows)

    def embed(self, job: Job, real: Real) -> Tensor:
        """What enters the head: the pooled vector."""
        from sparing.core.randomness import isolated_rng

        with isolated_rng("embedding network", job.seed):
            network = self.network()
        return graph_embeddings(self.trained(job, network, real.data, job.val), real.data)

    def check_saved(self, found: CondensedSet, real: Real) -> Made:
        """Graphs with the task's features and classes."""
        graphs, width = PackedGraphs.of(list(found.data)), real.data.x.shape[1]
        if graphs.x.shape[1] != width or int(graphs.y.max()) >= len(real.counts):
            raise self.refuse(
                f"{graphs.x.shape[1]} features and classes up to {int(graphs.y.max())}; {self.task.name!r} has {width} "
                f"and the classes 0…{len(real.counts) - 1}",
            )
        return Made(graphs, graphs.y, {"bytes_after": nbytes(graphs.tensors())})

    def training_set(self, job: Job, made: Made) -> PackedGraphs:
        """The graphs as they are."""
        return made.data

    def pictures(self, job: Job, made: Made, real: Real) -> Pictures:
        """Condensed graphs beside real ones, a row for each class."""
        rows = []
        for number in range(len(real.counts)):
            row = []
            for graphs in (made.data, real.data):
                for index in (graphs.y == number).nonzero().flatten()[:BESIDE].tolist():
                    graph = graphs[index]
                    row.append(graph_picture(len(graph.x), graph.edge_index, graph.x.argmax(1)))
            rows.append(row)
        caption = (
            f"a row for each class from {self.task.labels[0]!r} to {self.task.labels[-1]!r}: up to {BESIDE} condensed "
            f"graphs, of {len(made.labels)} in all, then as many real ones; colours are each node's largest feature"
        )
        return [("condensed graphs beside real ones", beside(rows), caption)]


KINDS: tuple[type[DataKind[Any]], ...] = (ImageKind, NodeKind, GraphKind)


def kind_of(step: Condense, task: Task) -> DataKind[Any]:
    """What the data of ``task`` are; raises :class:`IncompatibleStep` for others than can be condensed."""
    for kind in KINDS:
        if {kind.capability, "classification"} <= task.capabilities:
            return kind(step, task)
    raise IncompatibleStep(
        f"{step.id!r} condenses classified {', '.join(kind.capability for kind in KINDS)}; {task.name!r} has the "
        f"capabilities {shown(sorted(task.capabilities))}"
    )
