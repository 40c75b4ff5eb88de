"""Graphs whose nodes are rows of a table, people for instance, with a sensitive attribute: npz files.

Arrays of an npz: ``x`` (N, F), numbers; ``feature_names`` (F,); ``y`` (N,), the classes, whole numbers; ``sens`` (N,),
the sensitive attribute, unless a column of ``x`` is one; the edges, each undirected one once, as ``edge_index`` (2, E)
or as rows of a matrix, ``edge_indptr`` (N + 1,) and ``edge_indices`` (E,); and ``idx_train``, ``idx_val`` and
``idx_test``, node numbers, unless the nodes are to be split here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparing.core.errors import DataError, did_you_mean, shown
from sparing.core.files import read_arrays, write_arrays
from sparing.data.images import stratified_cut
from sparing.data.root import Source

SPLITS = ("train", "val", "test")
SHARES = {"test": 0.25, "val": 0.25}
"""Of each class's nodes, where a file has no split."""
_NIFTY = "https://github.com/chirag126/nifty"


@dataclass(frozen=True)
class NodeTable:
    """Rows of a table and the edges between them."""

    where: str
    """The file, for messages."""
    x: np.ndarray
    """float32 (N, F)."""
    features: tuple[str, ...]
    """Names of the F columns."""
    y: np.ndarray
    """int64 (N,), as in the file."""
    sens: np.ndarray | None
    """(N,), or None."""
    edges: np.ndarray
    """int64 (2, E), each undirected edge once, no loops."""
    splits: Mapping[str, np.ndarray]
    """Node numbers of train, val and test, int64, apart and in rising order."""

    def column(self, name: str) -> int:
        """The number of a column, or :class:`DataError` with the names there are."""
        if name not in self.features:
            there = ", ".join(self.features)[:500]
            raise DataError(f"{self.where}: no column {name!r}.{did_you_mean(name, self.features)} Columns: {there}")
        return self.features.index(name)


@dataclass(frozen=True)
class PublishedTable:
    """A published graph of people, and what its file must agree with."""

    source: Source
    features: tuple[str, ...]
    nodes: int
    edges: int
    """Each undirected one once."""


def _published(name: str, summary: str, licence: str, nodes: int, edges: int, features: str) -> PublishedTable:
    made = (
        "An npz with the arrays that sparing.data.node_tables names belongs at {path}; save_node_table writes one from "
        f"arrays. The rows come from {_NIFTY}; its list of edges, or edges between rows that are alike, go with them."
    )
    return PublishedTable(
        Source(name, summary, licence, _NIFTY, (), f"{name}/{name}.npz", made), tuple(features.split()), nodes, edges
    )


RECIDIVISM = _published(
    "recidivism",
    "1 graph: 18,876 people released from prison, 311,870 edges between those alike, who came back or not",
    "MIT",
    18_876,
    311_870,
    "WHITE ALCHY JUNKY SUPER MARRIED FELON WORKREL PROPTY PERSON MALE PRIORS SCHOOL RULE AGE TSERVD FOLLOW TIME FILE",
)
CREDIT_DEFAULT = _published(
    "credit_default",
    "1 graph: 30,000 holders of credit cards, 1,635,712 edges between those alike, who paid or not",
    "CC BY 4.0",
    30_000,
    1_635_712,
    "Married Age EducationLevel MaxBillAmountOverLast6Months MaxPaymentAmountOverLast6Months "
    "MonthsWithZeroBalanceOverLast6Months MonthsWithLowSpendingOverLast6Months MonthsWithHighSpendingOverLast6Months "
    "MostRecentBillAmount MostRecentPaymentAmount TotalOverdueCounts TotalMonthsOverdue HistoryOfOverduePayments",
)
GERMAN_CREDIT = _published(
    "german_credit",
    "1 graph: 1,000 clients of a bank, 21,742 edges between those alike, good ones or not",
    "CC BY 4.0",
    1_000,
    21_742,
    "Gender ForeignWorker Single Age LoanDuration LoanAmount LoanRateAsPercentOfIncome YearsAtCurrentHome "
    "NumberOfOtherLoansAtBank NumberOfLiableIndividuals HasTelephone CheckingAccountBalance_geq_0 "
    "CheckingAccountBalance_geq_200 SavingsAccountBalance_geq_100 SavingsAccountBalance_geq_500 MissedPayments "
    "NoCurrentLoan CriticalAccountOrLoansElsewhere OtherLoansAtBank HasCoapplicant HasGuarantor OwnsHouse RentsHouse "
    "Unemployed YearsAtCurrentJob_lt_1 YearsAtCurrentJob_geq_4 JobClassIsSkilled",
)
TABLES: Mapping[str, PublishedTable] = {
    table.source.name: table for table in (RECIDIVISM, CREDIT_DEFAULT, GERMAN_CREDIT)
}


def read_published_table(root: Path, name: str) -> NodeTable:
    """``<name>/<name>.npz`` under the data root, a graph of :data:`TABLES`; :class:`DataError` says what is wrong."""
    table = TABLES[name]

    def read(path: Path) -> NodeTable:
        found = read_node_table(path)
        expected = (table.nodes, table.edges, table.features)
        if (len(found.x), found.edges.shape[1], found.features) != expected or found.sens is None:
            raise DataError(
                f"{path}: {len(found.x)} nodes, {found.edges.shape[1]} edges and the columns "
                f"{shown(', '.join(found.features), 300)}; {table.nodes}, {table.edges} and "
                f"{', '.join(table.features)}, with an array 'sens', are expected"
            )
        return found

    return table.source.read(root, read)


def split_of(name: str, root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """(node numbers, classes) of the training or the test split, both int64 (n,)."""
    table = read_published_table(root, name)
    nodes = table.splits["train" if train else "test"]
    return nodes, table.y[nodes]


def read_node_table(path: Path) -> NodeTable:
    """An npz of the form at the head of this module.

    Raises :class:`DataError` naming file, array and record, and :class:`CorruptFile` for no npz.
    """
    return _checked(read_arrays(path), str(path))


def save_node_table(
    path: Path,
    x: np.ndarray,
    features: Sequence[str],
    y: np.ndarray,
    edge_index: np.ndarray,
    sens: np.ndarray | None = None,
    splits: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write what :func:`read_node_table` reads: its arrays; ``splits`` maps train, val and test to node numbers."""
    arrays = {
        "x": np.asarray(x, np.float32),
        "feature_names": np.array(list(features)),
        "y": np.asarray(y),
        "edge_index": np.asarray(edge_index),
        **({} if sens is None else {"sens": np.asarray(sens)}),
        **{f"idx_{name}": np.asarray(nodes) for name, nodes in (splits or {}).items()},
    }
    _checked(arrays, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arrays)


def _checked(arrays: Mapping[str, np.ndarray], where: str) -> NodeTable:
    def wrong(name: str, problem: str) -> DataError:
        return DataError(f"{where}: {name!r} {problem}")

    def array(name: str, kinds: str, rank: int) -> np.ndarray:
        if name not in arrays:
            raise DataError(f"{where}: no array {name!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
        found = arrays[name]
        if found.dtype.kind not in kinds or found.ndim != rank:
            what = {"iu": "whole numbers", "U": "names", "iuf": "numbers", "iufb": "numbers", "iuU": "values"}[kinds]
            raise wrong(name, f"is {found.dtype} of shape {found.shape}; {what} of {rank} dimensions are expected")
        return found

    x = array("x", "iufb", 2).astype(np.float32)
    nodes, columns = x.shape
    for node in np.flatnonzero(~np.isfinite(x).all(1))[:1]:
        raise wrong("x", f"of node {node} is not finite")
    features = tuple(str(name) for name in array("feature_names", "U", 1))
    if len(features) != columns or len(set(features)) != columns:
        raise wrong("feature_names", f"holds {len(features)} names; one of its own for each of {columns} columns of x")
    y = array("y", "iu", 1).astype(np.int64)
    sens = array("sens", "iuU", 1) if "sens" in arrays else None
    for name, values in (("y", y), ("sens", sens)):
        if values is not None and len(values) != nodes:
            raise wrong(name, f"has {len(values)} entries; one for each of {nodes} nodes is expected")
    if "edge_index" in arrays:
        ends = array("edge_index", "iu", 2).astype(np.int64)
        if len(ends) != 2:
            raise wrong("edge_index", f"has shape {ends.shape}; (2, E) is expected")
    else:
        indptr = array("edge_indptr", "iu", 1).astype(np.int64)
        indices = array("edge_indices", "iu", 1).astype(np.int64)
        if len(indptr) != nodes + 1 or indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
            raise wrong(
                "edge_indptr", f"must rise from 0 to {len(indices)}, the number of 'edge_indices', in {nodes + 1} steps"
            )
        ends = np.stack([np.repeat(np.arange(nodes), np.diff(indptr)), indices])
    for edge in np.flatnonzero(((ends < 0) | (ends >= nodes)).any(0))[:1]:
        raise DataError(f"{where}: edge {edge} joins {ends[0, edge]} and {ends[1, edge]}; 0…{nodes - 1} is expected")
    ends = np.sort(ends[:, ends[0] != ends[1]], axis=0)
    once = np.unique(ends[0] * nodes + ends[1])
    ends = np.stack([once // nodes, once % nodes])
    return NodeTable(where, x, features, y, sens, ends, _splits(arrays, array, y, wrong))


def _splits(
    arrays: Mapping[str, np.ndarray],
    array: Callable[[str, str, int], np.ndarray],
    y: np.ndarray,
    wrong: Callable[[str, str], DataError],
) -> dict[str, np.ndarray]:
    if not any(f"idx_{name}" in arrays for name in SPLITS):
        parts = stratified_cut(y, SHARES, seed=0)
        return {"train": parts["rest"], "val": parts["val"], "test": parts["test"]}
    found, owner = {}, np.full(len(y), -1)
    for number, name in enumerate(SPLITS):
        members = np.sort(array(f"idx_{name}", "iu", 1).astype(np.int64))
        if not len(members) or members[0] < 0 or members[-1] >= len(y):
            raise wrong(f"idx_{name}", f"must name at least one of the nodes 0…{len(y) - 1}, and no others")
        twice = members[(owner[members] >= 0) | (np.bincount(members, minlength=len(y))[members] > 1)]
        if len(twice):
            raise wrong(f"idx_{name}", f"names node {twice[0]}, which stands in a split already")
        owner[members] = number
        found[name] = members
    return found
