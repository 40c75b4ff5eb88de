"""Graph classification: a class for each of many graphs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification, macro_f1, roc_auc
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.data.images import stratified_cut
from sparing.data.root import data_root, own_data
from sparing.data.tu import TU_SETS, Features, TuGraphs, check_features, pack_tu, read_published, read_tu, tu_split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor
    from sparing.data.graphs import GraphBatch, PackedGraphs

EVALUATION_BATCH = 256
METRICS = (*CLASSIFICATION_METRICS, Metric("macro_f1"))


def _joined(graphs: Any) -> GraphBatch:
    """:func:`~sparing.data.graphs.join_graphs`, which needs torch."""
    from sparing.data.graphs import join_graphs

    return join_graphs(graphs)


class GraphClassification(Task):
    """Classes of whole graphs; headline: accuracy.

    A subclass sets the class variables and reads its graphs in :meth:`read`. Splits are
    :class:`~sparing.data.graphs.PackedGraphs`, data sets of PyG ``Data``. A batch is a
    :class:`~sparing.data.graphs.GraphBatch`, ``(x (nodes, F), edge_index (2, E), node_ptr (graphs + 1,), y (graphs,),
    edge_weight (E,) or None)``. A model maps ``x, edge_index, node_ptr`` to logits (graphs, classes); the weights of
    a batch that has them are its fourth input. Condensed graphs may have weights though the set has none: a model is
    then trained with a fourth input and deployed without.

    With ``one_logit`` two classes share one logit z, the second's probability is 1 / (1 + exp(−z)), the loss is the
    binary cross-entropy, and the headline is the area under the ROC curve, as for the molecules of the Open Graph
    Benchmark (Hu et al. 2020, arXiv:2005.00687). It is not known on a split that lacks one of the classes.

    Args:
        split_seed: of the permutation that :func:`~sparing.data.tu.tu_split` cuts.
        train_limit: use the first so many graphs of the training split (those for calibration are cut from them); None:
            all.
        test_limit: use the first so many of the test split; None: all.
    """

    unit: ClassVar[str] = "graph"
    metrics: tuple[Metric, ...] = METRICS
    capabilities: frozenset[str] = frozenset({"classification", "graph", "graph_classification"})
    collate = staticmethod(_joined)
    in_features: int
    """Features of a node."""
    example_nodes: int
    """Nodes of a graph of an example input, about the mean of the set."""
    example_edges: int
    """Edges of a graph of an example input, each direction counted, about the mean of the set."""
    edge_weight: bool = False
    """Whether edges have weights, a model's fourth input."""
    one_logit: bool = False
    """Whether two classes share one logit."""
    calibration_share: ClassVar[float] = 0.1
    """Share of each class's training graphs that calibrates instead."""

    def __init__(self, split_seed: int = 0, train_limit: int | None = None, test_limit: int | None = None) -> None:
        if isinstance(split_seed, bool) or not isinstance(split_seed, int) or not 0 <= split_seed < 1 << 63:
            raise InvalidValue(f"{self.name}: split_seed = {split_seed!r}; a whole number of at least 0 is expected")
        for name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
                raise InvalidValue(
                    f"{self.name}: {name} = {limit!r}; a whole number of at least 1 is expected, or none"
                )
        self.split_seed, self.train_limit, self.test_limit = split_seed, train_limit, test_limit
        self._splits: dict[Path | None, Splits] = {}
        if self.one_logit:
            self.metrics = (Metric("roc_auc"), *METRICS)

    @abstractmethod
    def read(self, root: Path | None) -> Any:
        """The graphs under ``root``: :class:`~sparing.data.graphs.PackedGraphs`, or a sequence of PyG ``Data``."""

    def splits(self, root: Path | None = None) -> Splits:
        """A tenth tests, a tenth validates, and calibration is cut from the rest; read once for each ``root``."""
        if root not in self._splits:
            self._splits[root] = self._cut(self.read(root))
        return self._splits[root]

    def _cut(self, given: Any) -> Splits:
        import torch

        from sparing.data.graphs import PackedGraphs

        graphs = PackedGraphs.of(given)
        if graphs.x.shape[1] != self.in_features:
            raise DataError(f"{self.name}: {graphs.x.shape[1]} features; {self.in_features} are expected")
        if (graphs.edge_weight is not None) != self.edge_weight:
            raise DataError(
                f"{self.name}: edges {'without' if self.edge_weight else 'with'} weights, but edge_weight = "
                f"{self.edge_weight}"
            )
        for graph in ((graphs.y < 0) | (graphs.y >= len(self.labels))).nonzero()[:1, 0].tolist():
            raise DataError(
                f"{self.name}: graph {graph} has the class {int(graphs.y[graph])}; 0…{len(self.labels) - 1} is expected"
            )
        rows = tu_split(len(graphs), self.split_seed)
        train = rows["train"][: self.train_limit]
        if len(train) == 0:
            raise DataError(f"{self.name}: {len(graphs)} graphs leave none for training")
        parts = stratified_cut(graphs.y[torch.from_numpy(train)].numpy(), {"calibration": self.calibration_share}, 0)
        rows |= {"test": rows["test"][: self.test_limit]}
        rows |= {"train": train[parts["rest"]], "calibration": train[parts["calibration"]]}
        for name, members in rows.items():
            if len(members) == 0:
                raise DataError(f"{self.name}: {len(graphs)} graphs leave none for the split {name!r}")
        return Splits(**{name: graphs.subset(torch.from_numpy(members)) for name, members in rows.items()})

    def outputs(self, model: nn.Module | Predictor, batch: Any) -> Any:
        """Logits (graphs, classes), or (graphs, 1) with ``one_logit``."""
        x, edge_index, node_ptr, _, edge_weight = batch
        return model(x, edge_index, node_ptr, *(() if edge_weight is None else (edge_weight,)))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy over the graphs, in nats."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(*self.class_logits(outputs, batch))

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (graphs, classes), classes (graphs,)); one logit z becomes (0, z), of the same probabilities."""
        import torch

        logits = torch.cat([torch.zeros_like(outputs), outputs], 1) if self.one_logit else outputs
        return logits, batch[3]

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Accuracy, worst class's accuracy, calibration error (15 bins), negative log-likelihood and macro-F1.

        With ``one_logit`` the area under the ROC curve comes first; there is then no outcome of a single graph.
        """
        found, targets = [], []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            found.append(np.asarray(self.outputs(predictor, batch)))
            targets.append(np.asarray(batch[3]))
        if not found:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no graph")
        logits, y = np.concatenate(found), np.concatenate(targets)
        if self.one_logit:
            if logits.shape != (len(y), 1):
                raise InvalidValue(
                    f"{self.name}: outputs of shape {logits.shape}; one logit, ({len(y)}, 1), is expected"
                )
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        scored = evaluate_classification(logits, y, self.labels)
        metrics = {**scored.metrics, "macro_f1": macro_f1(logits.argmax(axis=1), y, len(self.labels))}
        if self.one_logit:
            return Evaluation({"roc_auc": roc_auc(logits[:, 1], y == 1), **metrics})
        return Evaluation(metrics, scored.per_unit, scored.by_class)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """``batch`` random graphs of about the set's mean size: (x, edge_index, node_ptr[, weights of the edges]).

        The first is of that size, those after it larger or smaller, so that numbers of nodes and edges are free.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        size = max(self.example_nodes, 3)
        sizes = [size + (0, size // 4 + 1, -(size // 4))[graph % 3] for graph in range(batch)]
        node_ptr = torch.tensor([0, *sizes]).cumsum(0)
        pairs = []
        for graph, size in enumerate(sizes):
            ends = torch.randint(size, (2, max(self.example_edges // 2, 1) + graph % 3), generator=generator)
            pairs.append(torch.cat([ends, ends.flip(0)], 1) + node_ptr[graph])
        x = torch.rand(int(node_ptr[-1]), self.in_features, generator=generator)
        edge_index = torch.cat(pairs, 1)
        weights = (torch.rand(edge_index.shape[1], generator=generator),) if self.edge_weight else ()
        return x, edge_index, node_ptr, *weights

    def model_fields(self) -> Mapping[str, Any]:
        """``in_features`` and ``num_classes``, which is 1 with ``one_logit``."""
        return {"in_features": self.in_features, "num_classes": 1 if self.one_logit else len(self.labels)}

    def default_model(self) -> nn.Module:
        """Three graph convolutions, their mean over a graph's nodes, and a linear layer."""
        from sparing.core.predictor import build_model

        return build_model("graph_gcn", self)


class _Published(GraphClassification):
    """A published set, its nodes' labels as zeros and a one. Classes and features are those of :data:`TU_SETS`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.labels, cls.in_features = TU_SETS[cls.name].labels, TU_SETS[cls.name].features

    def read(self, root: Path | None) -> PackedGraphs:
        """All graphs, in the order of their file."""
        return pack_tu(read_published(data_root(root), self.name), "labels")


class Mutag(_Published):
    """MUTAG: 188 molecules of up to 28 atoms, mutagenic or not (Debnath et al. 1991, in the form of TUDataset).

    19 graphs test, 19 validate; of the 150 others 135 train and 15 calibrate. Read from ``tu_graphs/MUTAG.npz`` under
    the data root.
    """

    name = "mutag"
    example_nodes, example_edges = 18, 40


class NCI1(_Published):
    """NCI1: 4,110 molecules, active against lung cancer cells or not (Wale and Karypis 2006, as in TUDataset).

    411 graphs test, 411 validate; of the 3,288 others nine tenths train and the rest calibrate. Read from
    ``tu_graphs/NCI1.npz`` under the data root.
    """

    name = "nci1"
    example_nodes, example_edges = 30, 64


class Proteins(_Published):
    """PROTEINS: 1,113 proteins as graphs of their helices, sheets and turns, enzymes or not (Borgwardt et al. 2005).

    112 graphs test, 112 validate; of the 889 others nine tenths train and the rest calibrate. Read from
    ``tu_graphs/PROTEINS.npz`` under the data root.
    """

    name = "proteins"
    example_nodes, example_edges = 39, 146


class DD(_Published):
    """D&D: 1,178 proteins as graphs of their amino acids, enzymes or not (Dobson and Doig 2003, as in TUDataset).

    118 graphs test, 118 validate; of the 942 others nine tenths train and the rest calibrate. Read from
    ``tu_graphs/DD.npz`` under the data root.
    """

    name = "dd"
    example_nodes, example_edges = 284, 1432


class TuFolder(GraphClassification):
    """Your own graphs: a folder of text files as those of the TUDataset collection, or an npz of the same content.

    :mod:`sparing.data.tu` says what the files hold. Classes are the numbers of ``DS_graph_labels.txt`` in rising order.

    Args:
        path: the folder or npz; a relative one is looked for from the working folder, then from the data root.
        features: of nodes: "auto" (attributes and labels, whichever there are, else degrees), "labels" (zeros and a
            one), "attributes" (as they are), "degree" (zeros and a one) or "constant" (a single 1).
        max_degree: for degrees: nodes of this one and of more are alike.
        edge_weight: take the only column of ``DS_edge_attributes.txt`` as weights.
        undirected: add the reverse of each edge that has none.
        one_logit: two classes share one logit, and the headline is the area under the ROC curve.
        split_seed: of the permutation of which the first tenth tests and the second validates.
        train_limit: use the first so many graphs of the training split; None: all.
        test_limit: use the first so many of the test split; None: all.
    """

    name = "tu_folder"

    def __init__(
        self,
        path: str,
        features: Features = "auto",
        max_degree: int = 100,
        edge_weight: bool = False,
        undirected: bool = False,
        one_logit: bool = False,
        split_seed: int = 0,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        check_features(features, max_degree)
        switches = {"edge_weight": edge_weight, "undirected": undirected, "one_logit": one_logit}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise InvalidValue(f"tu_folder: {name} = {value!r}; true or false is expected")
        self.one_logit = one_logit
        super().__init__(split_seed, train_limit, test_limit)
        self.path = str(path)
        self.name = f"tu_folder:{Path(path).stem}"
        self.features, self.max_degree = features, max_degree
        self.edge_weight, self.undirected = edge_weight, undirected
        self._root: Path | None = None
        self._files: TuGraphs | None = None
        self._packed: PackedGraphs | None = None

    def _graphs(self) -> TuGraphs:
        """What the files hold; read once."""
        if self._files is None:
            expected = "a folder with TU's text files, or an npz,"
            files = read_tu(own_data("tu_folder", self.path, data_root(self._root), expected))
            if len(files.classes) < 2 or (self.one_logit and len(files.classes) != 2):
                wanted = "two, which one logit tells apart," if self.one_logit else "at least two"
                raise DataError(f"{files.where}: {len(files.classes)} classes; {wanted} are expected")
            self._files = files
        return self._files

    def _all(self) -> PackedGraphs:
        """All graphs; packed once."""
        if self._packed is None:
            self._packed = pack_tu(self._graphs(), self.features, self.max_degree, self.edge_weight, self.undirected)
        return self._packed

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """The numbers that the classes have in the files."""
        return self._graphs().classes

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Features of a node."""
        return self._all().x.shape[1]

    @property
    def example_nodes(self) -> int:  # type: ignore[override]
        """Mean number of a graph's nodes, rounded."""
        return max(round(len(self._all().x) / len(self._all())), 1)

    @property
    def example_edges(self) -> int:  # type: ignore[override]
        """Mean number of a graph's edges, each direction counted, rounded."""
        return round(self._all().edge_index.shape[1] / len(self._all()))

    def splits(self, root: Path | None = None) -> Splits:
        """Read once; ``root`` is where a relative path is looked for, too."""
        if self._files is None:
            self._root = root
        return super().splits(root)

    def read(self, root: Path | None) -> PackedGraphs:
        """All graphs, in the order of the files."""
        return self._all()
