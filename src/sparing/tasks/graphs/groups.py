"""Node classification where a sensitive attribute makes two groups of nodes, which every row of a ledger compares."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import DataError, InvalidValue, SparingError, did_you_mean
from sparing.core.fairness import delta_eo, delta_sp, rate_by_group
from sparing.core.metrics import roc_auc
from sparing.core.task import Evaluation, Metric, Splits
from sparing.data.ctr import leaking
from sparing.data.node_tables import TABLES, NodeTable, read_node_table, read_published_table
from sparing.data.root import data_root, own_data
from sparing.tasks.graphs.nodes import NodeClassification

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data

log = logging.getLogger("sparing")


class GroupedNodeClassification(NodeClassification):
    """Classes of nodes in two groups; headline: accuracy, beside it gaps between the groups.

    Further metrics are "auc" (of the positive class against all others), "delta_sp" and "delta_eo" (see
    :mod:`sparing.core.fairness`) and the accuracy of each group. The graph that :meth:`read` gives has ``sens`` (N,),
    the group of each node: 0, 1, or −1 for neither, which are scored but not compared.
    """

    capabilities: frozenset[str] = NodeClassification.capabilities | {"groups"}
    group_names: Sequence[str]
    """Of the groups 0 and 1."""
    positive: int = 1
    """The class that stands for a positive decision."""

    def __init__(self) -> None:
        super().__init__()
        self._sens: np.ndarray | None = None
        self._tested: np.ndarray | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Those of any node classification, "auc", the two gaps, and the accuracy of each group."""
        gaps = (Metric("auc"), Metric("delta_sp", "lower"), Metric("delta_eo", "lower"))
        return (*NodeClassification.metrics, *gaps, *(Metric(f"accuracy of {name}") for name in self.group_names))

    def splits(self, root: Path | None = None) -> Splits:
        """As of any node classification; the groups are kept for :meth:`evaluate`."""
        found = super().splits(root)
        self._sens, self._tested = found.train.sens.numpy(), found.test.nodes.numpy()
        return found

    def groups_of(self, data: Data) -> Tensor:
        """The graph's ``sens``, checked."""
        import torch

        sens = getattr(data, "sens", None)
        if sens is None or sens.shape != data.y.shape:
            raise DataError(f"{self.name}: the graph has no sens (N,), the group of each node")
        for node in ((sens < -1) | (sens > 1)).nonzero().flatten()[:1].tolist():
            raise DataError(
                f"{self.name}: node {node} is in group {int(sens[node])}; 0, 1 or −1 for neither is expected"
            )
        return sens.to(torch.int64)

    def scored(self, logits: np.ndarray, targets: np.ndarray, nodes: np.ndarray) -> Evaluation:
        """As of any node classification, and the gaps; a gap is NaN where a group has nobody to compare."""
        found = super().scored(logits, targets, nodes)
        if self._sens is None:
            raise SparingError(f"{self.name}: groups are known once splits() has read the graph")
        sens, predicted = self._sens[nodes], logits.argmax(axis=1)

        def gap(measure: Callable[..., float], *what: Any) -> float:
            try:
                return measure(predicted, *what, sens, positive=self.positive, groups=(0, 1))
            except InvalidValue:  # nobody in a group
                return math.nan

        by_group = zip(self.group_names, rate_by_group(predicted == targets, sens, (0, 1)), strict=True)
        others = np.delete(logits, self.positive, axis=1).astype(np.float64)
        more = {
            "auc": roc_auc(logits[:, self.positive] - np.logaddexp.reduce(others, axis=1), targets == self.positive),
            "delta_sp": gap(delta_sp),
            "delta_eo": gap(delta_eo, targets),
            **{f"accuracy of {name}": share for name, share in by_group},
        }
        return Evaluation({**found.metrics, **more}, found.per_unit, found.by_class)

    @property
    def groups(self) -> np.ndarray | None:
        """The group's name for each test node (n,), None for those that are not compared; None until read.

        They are those of the graph that :meth:`splits` gave last.
        """
        if self._sens is None or self._tested is None:
            return None
        return np.array([*self.group_names, None], dtype=object)[self._sens[self._tested]]

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """A random graph of the task's size and ``batch`` nodes more, each with a loop.

        (x float32 (N, F), edge_index int64 (2, E)).
        """
        import torch

        draw = torch.Generator().manual_seed(0)
        nodes = self.example_nodes + batch
        ends = torch.randint(nodes, (2, max(self.example_edges - self.example_nodes, 0)), generator=draw)
        loops = torch.arange(nodes).expand(2, -1)
        return torch.randn(nodes, self.in_features, generator=draw), torch.cat([ends, loops], 1)

    def model_fields(self) -> dict[str, Any]:
        """``in_features``, ``num_classes`` and ``num_nodes``."""
        return {**super().model_fields(), "num_nodes": self.example_nodes}


class _TableGraph(GroupedNodeClassification):
    """A graph whose nodes are rows of a table.

    Columns are shifted and scaled by mean and standard deviation of the training nodes; each node gets a loop. Columns
    that alone predict the label are warned of in the log "sparing", and listed in :attr:`leaks`.
    """

    _leaks: dict[str, float] | None = None

    def __init__(self, drop: Sequence[str]) -> None:
        if isinstance(drop, str) or not all(isinstance(name, str) for name in drop):
            raise InvalidValue(f"{self.name}: drop = {drop!r}; a list of names of columns is expected")
        self.drop = tuple(drop)
        super().__init__()

    @property
    def leaks(self) -> dict[str, float]:
        """Columns that alone predict the label, and the area under the ROC curve of each (one class against the
        others, the largest)."""
        if self._leaks is None:
            raise SparingError(f"{self.name}: leaks are known once splits() has read the graph")
        return self._leaks

    def _graph(self, table: NodeTable, y: np.ndarray, sens: np.ndarray) -> Data:
        """What :meth:`read` gives: of classes (N,) from 0 and groups (N,)."""
        import torch
        from torch_geometric.data import Data

        dropped = {table.column(name) for name in self.drop}
        kept = [number for number in range(len(table.features)) if number not in dropped]
        if not kept:
            raise DataError(f"{table.where}: no column is left to predict from")
        train = table.splits["train"]
        x = table.x[:, kept].astype(np.float64)
        mean, spread = x[train].mean(0), x[train].std(0)
        columns = {table.features[number]: x[train, place] for place, number in enumerate(kept)}
        self._look_for_leaks(columns, y[train])
        x = (x - mean) / np.where(spread > 0, spread, 1.0)
        loops = np.arange(len(x))
        ends = [np.concatenate(side) for side in ((*table.edges, loops), (*table.edges[::-1], loops))]
        order = np.lexsort((ends[0], ends[1]))
        masks = {}
        for name, nodes in table.splits.items():
            masks[f"{name}_mask"] = torch.zeros(len(x), dtype=torch.bool)
            masks[f"{name}_mask"][torch.from_numpy(nodes)] = True
        return Data(
            x=torch.from_numpy(x.astype(np.float32)),
            edge_index=torch.from_numpy(np.stack([end[order] for end in ends])),
            y=torch.from_numpy(y),
            sens=torch.from_numpy(sens),
            **masks,
        )

    def _look_for_leaks(self, columns: dict[str, np.ndarray], y: np.ndarray) -> None:
        found: dict[str, float] = {}
        for label in range(1 if len(self.labels) == 2 else 0, len(self.labels)):
            for name, area in leaking(columns, y == label).items():
                found[name] = max(area, found.get(name, 0.0))
        self._leaks = found
        if found:
            shown = ", ".join(f"{name!r} ({area:.3f})" for name, area in found.items())
            log.warning(
                "%s: columns that alone predict the label, with the area under their ROC curve: %s. Are they known "
                "before it is? drop leaves them out",
                self.name,
                shown,
            )


class _PublishedTable(_TableGraph):
    """A published one."""

    def __init__(self, drop: Sequence[str] = ()) -> None:
        super().__init__(drop)
        names = TABLES[self.name].features
        for name in self.drop:
            if name not in names:
                raise InvalidValue(
                    f"{self.name}: drop names {name!r}, which is no column.{did_you_mean(name, names)} Columns: "
                    f"{', '.join(names)}"
                )
        if len(set(self.drop)) == len(names):
            raise InvalidValue(f"{self.name}: drop names all columns; at least one is needed to predict from")
        self.in_features = len(names) - len(set(self.drop))
        self.example_nodes = TABLES[self.name].nodes
        self.example_edges = 2 * TABLES[self.name].edges + self.example_nodes  # and a loop at each node

    def read(self, root: Path | None) -> Data:
        """The graph, its columns standardised."""
        table = read_published_table(data_root(root), self.name)
        assert table.sens is not None
        for name, values in (("y", table.y), ("sens", table.sens)):
            for node in np.flatnonzero((values < 0) | (values > 1))[:1]:
                raise DataError(f"{table.where}: {name!r} of node {node} is {values[node]}; 0 or 1 is expected")
        return self._graph(table, table.y, table.sens.astype(np.int64))


class Recidivism(_PublishedTable):
    """Recidivism: 18,876 people released from prison, by whether they came back; groups by race.

    Releases in North Carolina, 1978 and 1980 (Schmidt and Witte 1988), with edges between people alike, as NIFTY made
    them (Agarwal, Lakkaraju and Zitnik 2021, arXiv:2102.13186). Of the published split's 5,662 training nodes a tenth
    calibrates; 3,776 validate, 9,438 test. Race is among the columns. Read from ``recidivism/recidivism.npz`` under the
    data root.

    TIME is the time until a person came back, and FILE says which list a row is of: by default both are left out. With
    ``drop=[]`` the task is that of published results, which all use TIME, and a warning says so. The edges were made
    with all columns.

    Args:
        drop: columns to leave out.
    """

    name = "recidivism"
    labels = ("stayed out", "came back")
    group_names = ("other", "white")

    def __init__(self, drop: Sequence[str] = ("TIME", "FILE")) -> None:
        super().__init__(drop)


class CreditDefault(_PublishedTable):
    """Credit default: 30,000 holders of credit cards, by whether they paid; groups by age.

    Taiwan 2005 (Yeh and Lien 2009), as NIFTY has it (Agarwal et al. 2021), but with edges made anew between people
    alike: results are not comparable with published ones. Of 15,000 training nodes a tenth calibrates; 7,500 validate,
    7,500 test. The positive class is "paid", and "young" the smaller group. Read from
    ``credit_default/credit_default.npz`` under the data root.

    Args:
        drop: columns to leave out.
    """

    name = "credit_default"
    labels = ("did not pay", "paid")
    group_names = ("older", "young")


class GermanCredit(_PublishedTable):
    """German credit: 1,000 clients of a bank, good ones or not; groups by gender.

    Statlog (Hofmann 1994), with the edges of NIFTY (Agarwal et al. 2021). Of 500 training nodes a tenth calibrates; 250
    validate, 250 test. Seven in ten are good, which many a network says of nearly all. Read from
    ``german_credit/german_credit.npz`` under the data root.

    Args:
        drop: columns to leave out.
    """

    name = "german_credit"
    labels = ("bad", "good")
    group_names = ("men", "women")


class NodeTableTask(_TableGraph):
    """Your own graph of people: rows of a table with edges between them and a sensitive attribute, in an npz.

    :mod:`sparing.data.node_tables` says what the file holds, and ``save_node_table`` writes one. Classes are the
    numbers of ``y`` in rising order. Where the file has no split, half of each class trains, a quarter validates and a
    quarter tests; a tenth of the training nodes calibrates.

    Args:
        path: the npz; a relative one is looked for from the working folder, then from the data root.
        sensitive: the column that is the sensitive attribute; None: the array ``sens``.
        groups: its two values that are compared, the others are in neither group; None: it has two.
        positive: the number in ``y`` of the class that stands for a positive decision; None: the largest.
        labels: names of the classes; None: their numbers.
        drop: columns to leave out. Leaving the sensitive one out makes nobody blind to it: others may tell.
    """

    name = "node_table"

    def __init__(
        self,
        path: str,
        sensitive: str | None = None,
        groups: Sequence[Any] | None = None,
        positive: int | None = None,
        labels: Sequence[str] | None = None,
        drop: Sequence[str] = (),
    ) -> None:
        if groups is not None and (isinstance(groups, str) or len(groups) != 2 or groups[0] == groups[1]):
            raise InvalidValue(f"node_table: groups = {groups!r}; two different values are expected")
        self.path, self.sensitive, self.given_groups = str(path), sensitive, None if groups is None else list(groups)
        self.given_positive, self.given_labels = positive, None if labels is None else list(labels)
        self._root: Path | None = None
        self._table: NodeTable | None = None
        super().__init__(drop)
        self.name = f"node_table:{Path(path).stem}"

    def _read(self) -> NodeTable:
        """What the file holds; read once."""
        if self._table is None:
            place = own_data("node_table", self.path, data_root(self._root), "an npz of rows and edges")
            table = read_node_table(place)
            if len(np.unique(table.y)) < 2:
                raise DataError(f"{table.where}: one class alone; at least two are expected")
            self._table = table
        return self._table

    def splits(self, root: Path | None = None) -> Splits:
        """Read once; ``root`` is where a relative path is looked for, too."""
        if self._table is None:
            self._root = root
        return super().splits(root)

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes."""
        classes = [str(value) for value in np.unique(self._read().y)]
        if self.given_labels is None:
            return tuple(classes)
        if len(self.given_labels) != len(classes):
            raise InvalidValue(
                f"node_table: {len(self.given_labels)} labels; {len(classes)} are expected, for the classes "
                f"{', '.join(classes)}"
            )
        return tuple(map(str, self.given_labels))

    @property
    def positive(self) -> int:  # type: ignore[override]
        """The place of the positive class."""
        classes = np.unique(self._read().y).tolist()
        if self.given_positive is None:
            return len(classes) - 1
        if self.given_positive not in classes:
            raise InvalidValue(f"node_table: positive = {self.given_positive!r}; one of {classes} is expected")
        return classes.index(self.given_positive)

    def _compared(self) -> tuple[np.ndarray, list[Any]]:
        """(the sensitive attribute (N,), its two values that are compared)."""
        table = self._read()
        if self.sensitive is not None:
            values = table.x[:, table.column(self.sensitive)]
        elif table.sens is not None:
            values = table.sens
        else:
            raise DataError(f"{table.where}: no array 'sens'; name a column as sensitive, or save the file with one")
        there = np.unique(values).tolist()
        if self.given_groups is None and len(there) != 2:
            raise InvalidValue(
                f"node_table: the sensitive attribute has {len(there)} values ({', '.join(map(str, there[:8]))}"
                f"{' …' if len(there) > 8 else ''}); name the two to compare, groups: [a, b]"
            )
        compared = there if self.given_groups is None else self.given_groups
        for value in compared:
            if value not in there:
                raise InvalidValue(f"node_table: groups names {value!r}, which nobody has; there are {there[:8]}")
        return values, compared

    @property
    def group_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The two values."""
        return tuple(f"{value:g}" if isinstance(value, float) else str(value) for value in self._compared()[1])

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns that are left."""
        return len(self._read().features) - len(set(self.drop))

    @property
    def example_nodes(self) -> int:  # type: ignore[override]
        """Nodes of the graph."""
        return len(self._read().x)

    @property
    def example_edges(self) -> int:  # type: ignore[override]
        """Edges of the graph in both directions, and loops."""
        return 2 * self._read().edges.shape[1] + self.example_nodes

    def read(self, root: Path | None) -> Data:
        """The graph, its columns standardised."""
        table, (values, compared) = self._read(), self._compared()
        sens = np.where(values == compared[0], 0, np.where(values == compared[1], 1, -1))
        return self._graph(table, np.unique(table.y, return_inverse=True)[1], sens)
