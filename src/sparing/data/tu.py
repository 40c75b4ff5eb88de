"""Sets of graphs in the form of the TUDataset collection (Morris et al. 2020, arXiv:2007.08663): text files, or an npz.

The published form of a set DS is a folder of text files. Nodes, edges and graphs are numbered from 1, in one count over
the whole set:

- ``DS_A.txt``: an edge in each line, "source, target"; undirected edges stand there in both directions;
- ``DS_graph_indicator.txt``: the graph of each node, those of a graph one after the other;
- ``DS_graph_labels.txt``: the class of each graph, any whole number;
- ``DS_node_labels.txt``, ``DS_node_attributes.txt`` and ``DS_edge_attributes.txt``, which not every set has: a row for
  each node or edge, its entries separated by commas. Other files are not looked at.

The npz, which :func:`save_tu` writes, is smaller and read much faster. Its arrays: ``node_ptr`` and ``edge_ptr``
(n + 1,), first node and edge of each graph, and their number; ``edge_src`` and ``edge_dst`` (E,), numbers from 0 within
the graph; ``graph_label`` (n,); and, where the set has them, ``node_label`` (nodes,) or (nodes, L), ``node_attribute``
(nodes, A) and ``edge_attribute`` (E, B).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparing.core.errors import CorruptFile, DataError, InvalidValue, UnknownName, did_you_mean, shown
from sparing.core.files import read_arrays, write_arrays
from sparing.data.root import Source

if TYPE_CHECKING:
    from sparing.data.graphs import PackedGraphs

MAX_FEATURES = 1 << 16
"""Most features that a node may get."""
Features = Literal["auto", "labels", "attributes", "degree", "constant"]
FEATURES: tuple[Features, ...] = ("auto", "labels", "attributes", "degree", "constant")
_POINTERS = ("node_ptr", "edge_ptr")
_NUMBERS = (*_POINTERS, "edge_src", "edge_dst", "graph_label")
_OPTIONAL = ("node_label", "node_attribute", "edge_attribute")


@dataclass(frozen=True, eq=False)
class TuGraphs:
    """A set of graphs as its files hold it. Self loops are left out, and repeated edges kept once."""

    where: str
    """The folder or file it was read from."""
    node_ptr: np.ndarray
    """First node of each graph, and the number of nodes: int64 (n + 1,)."""
    edge_index: np.ndarray
    """Source and target of each edge as numbers within its graph, int64 (2, E), sorted within each graph."""
    edge_ptr: np.ndarray
    """First edge of each graph, and the number of edges: int64 (n + 1,)."""
    graph_label: np.ndarray
    """Class of each graph, int64 (n,): 0…C − 1, in the order of the numbers in the file."""
    classes: tuple[str, ...]
    """The numbers that the classes have in the file."""
    node_label: np.ndarray | None = None
    """Int64 (nodes, L), each column from 0 on."""
    node_attribute: np.ndarray | None = None
    """Float32 (nodes, A)."""
    edge_attribute: np.ndarray | None = None
    """Float32 (E, B)."""


@dataclass(frozen=True)
class TuSet:
    """What a published set must agree with."""

    source: Source
    graphs: int
    features: int
    """Of a node: values of its label, one of which is its."""
    labels: tuple[str, ...]


def _published(name: str, official: str, summary: str, graphs: int, features: int, labels: tuple[str, ...]) -> TuSet:
    home = "https://chrsmrrs.github.io/datasets"
    made = (
        f"It is made of the text files of https://www.chrsmrrs.com/graphkerneldatasets/{official}.zip; where the zip "
        f"file is unpacked:\n"
        "  from sparing.data.tu import read_tu, save_tu\n"
        f'  save_tu(read_tu("{official}"), "{{path}}")'
    )
    licence = "none stated (free research data)"
    return TuSet(Source(name, summary, licence, home, (), f"tu_graphs/{official}.npz", made), graphs, features, labels)


TU_SETS: Mapping[str, TuSet] = {
    published.source.name: published
    for published in (
        _published("mutag", "MUTAG", "188 graphs: molecules, mutagenic or not", 188, 7, ("not mutagenic", "mutagenic")),
        _published(
            "nci1",
            "NCI1",
            "4,110 graphs: molecules, active against lung cancer cells or not",
            4110,
            37,
            ("inactive", "active"),
        ),
        _published("proteins", "PROTEINS", "1,113 graphs: proteins, enzymes or not", 1113, 3, ("enzyme", "no enzyme")),
        _published("dd", "DD", "1,178 graphs: large proteins, enzymes or not", 1178, 89, ("enzyme", "no enzyme")),
    )
}


def read_tu(path: Path | str) -> TuGraphs:
    """A set of graphs from a folder of text files, or from an npz; see the head of this module.

    Raises :class:`DataError` naming file, line or array, and graph (from 0), for what is missing, damaged or does not
    fit together: a graph without nodes, an edge to a node there is not or to one of another graph, a number that is
    none or not finite.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise DataError(f"{path} is missing; a folder with TU's text files, or an npz, is expected")
    try:
        return _of_arrays(read_arrays(path), path)
    except CorruptFile as error:
        raise DataError(str(error)) from error


def save_tu(graphs: TuGraphs, path: Path | str) -> None:
    """Write a set as the npz that :func:`read_tu` reads; the names of the classes become their numbers, 0…C − 1."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    optional = {name: getattr(graphs, name) for name in _OPTIONAL if getattr(graphs, name) is not None}
    arrays = {name: getattr(graphs, name) for name in (*_POINTERS, "graph_label")}
    write_arrays(Path(path), {**arrays, "edge_src": graphs.edge_index[0], "edge_dst": graphs.edge_index[1], **optional})


def pack_tu(
    graphs: TuGraphs,
    features: Features = "auto",
    max_degree: int = 100,
    edge_weight: bool = False,
    undirected: bool = False,
) -> PackedGraphs:
    """A set of graphs as tensors, its nodes with features.

    Args:
        graphs: what :func:`read_tu` gives.
        features: "labels": node labels as zeros and a one, each column as wide as its largest number less its smallest
            and 1; "attributes": as they are; "auto": attributes and labels, in this order, whichever there are, and
            "degree" where there are none; "degree": the number of edges that leave a node, as zeros and a one;
            "constant": a single 1.
        max_degree: nodes of this degree and of more are alike.
        edge_weight: take the only column of the edges' attributes as their weights.
        undirected: add the reverse of each edge that has none, with its weight.

    Raises:
        DataError: features or weights that the set does not have, or more than :data:`MAX_FEATURES` features.
        InvalidValue: arguments outside what is allowed.
    """
    import torch

    from sparing.data.graphs import PackedGraphs

    check_features(features, max_degree)
    ptr, edge_ptr, ends, weight = graphs.node_ptr, graphs.edge_ptr, graphs.edge_index, None
    if edge_weight:
        columns = 0 if graphs.edge_attribute is None else graphs.edge_attribute.shape[1]
        if graphs.edge_attribute is None or columns != 1:
            raise DataError(f"{graphs.where}: {columns} attributes of an edge; one, its weight, is expected")
        weight = graphs.edge_attribute[:, 0]
    if undirected:
        whole = ends + np.repeat(ptr[:-1], np.diff(edge_ptr))
        kept, whole = _cleaned(np.concatenate([whole, whole[::-1]], axis=1), int(ptr[-1]))
        weight = None if weight is None else np.concatenate([weight, weight])[kept]
        ends, edge_ptr = _within(whole, ptr)
    return PackedGraphs(
        torch.from_numpy(_features(graphs, features, max_degree, ends, edge_ptr)),
        torch.from_numpy(ptr),
        torch.from_numpy(ends),
        torch.from_numpy(edge_ptr),
        torch.from_numpy(graphs.graph_label),
        None if weight is None else torch.from_numpy(weight),
    )


def check_features(features: object, max_degree: object) -> None:
    """Raise :class:`InvalidValue` for arguments that :func:`pack_tu` does not take."""
    if features not in FEATURES:
        raise InvalidValue(f"features = {features!r}; one of {', '.join(FEATURES)} is expected")
    if isinstance(max_degree, bool) or not isinstance(max_degree, int) or not 1 <= max_degree < MAX_FEATURES:
        raise InvalidValue(f"max_degree = {max_degree!r}; a whole number in 1…{MAX_FEATURES - 1} is expected")


def tu_split(graphs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of "test", "val" and "train" of so many graphs: a tenth each, rounded up, and the rest.

    The split of Jin et al. 2022, arXiv:2206.07746: torch's random permutation under ``seed``, cut in this order.
    """
    import torch

    rows = torch.randperm(graphs, generator=torch.Generator().manual_seed(seed)).numpy()
    share = -(-graphs // 10)
    return {"test": rows[:share], "val": rows[share : 2 * share], "train": rows[2 * share :]}


def read_published(root: Path, name: str) -> TuGraphs:
    """The published set ``name`` of :data:`TU_SETS` under the data root; raises :class:`DataError` if it is another."""
    if name not in TU_SETS:
        raise UnknownName(f"unknown set {name!r}.{did_you_mean(name, TU_SETS)} Known: {', '.join(sorted(TU_SETS))}")
    published = TU_SETS[name]
    found = published.source.read(root, read_tu)
    width = 0 if found.node_label is None else int((found.node_label.max(0) + 1).sum())
    if (len(found.graph_label), width, len(found.classes)) != (
        published.graphs,
        published.features,
        len(published.labels),
    ):
        raise DataError(
            f"{found.where}: {len(found.graph_label)} graphs of {len(found.classes)} classes, {width} values of node "
            f"labels; {name} has {published.graphs}, {len(published.labels)} and {published.features}"
        )
    return found


def split_of(name: str, root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the graphs, labels) of the published set's training or test split, both int64 (n,)."""
    labels = read_published(root, name).graph_label
    rows = tu_split(len(labels))["train" if train else "test"]
    return rows, labels[rows]


def _features(
    graphs: TuGraphs, features: Features, max_degree: int, ends: np.ndarray, edge_ptr: np.ndarray
) -> np.ndarray:
    """Float32 (nodes, F)."""
    nodes = int(graphs.node_ptr[-1])
    parts = []
    if features in ("auto", "attributes") and graphs.node_attribute is not None:
        parts.append(graphs.node_attribute)
    if features in ("auto", "labels") and graphs.node_label is not None:
        parts += [_one_hot(column) for column in graphs.node_label.T]
    if not parts and features in ("labels", "attributes"):
        raise DataError(f'{graphs.where}: nodes have no {features}; "auto" takes what there is, else their degrees')
    if features == "degree" or (features == "auto" and not parts):
        sources = ends[0] + np.repeat(graphs.node_ptr[:-1], np.diff(edge_ptr))
        parts = [_one_hot(np.minimum(np.bincount(sources, minlength=nodes), max_degree))]
    if features == "constant":
        parts = [np.ones((nodes, 1), np.float32)]
    width = sum(part.shape[1] for part in parts)
    if width > MAX_FEATURES:
        raise DataError(f"{graphs.where}: {width} features of a node; at most {MAX_FEATURES} are possible")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _one_hot(numbers: np.ndarray) -> np.ndarray:
    hot = np.zeros((len(numbers), int(numbers.max()) + 1), np.float32)
    hot[np.arange(len(numbers)), numbers] = 1
    return hot


# --- what both forms share


def _cleaned(ends: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """(places kept, edges (2, E) between nodes of the whole set): sorted, without loops, repeated ones once."""
    _, first = np.unique(ends[0] * nodes + ends[1], return_index=True)
    first = first[ends[0, first] != ends[1, first]]
    return first, ends[:, first]


def _within(ends: np.ndarray, node_ptr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sorted edges as numbers within their graphs, first edge of each graph and their number)."""
    edge_ptr = np.searchsorted(ends[0], node_ptr)
    return ends - np.repeat(node_ptr[:-1], np.diff(edge_ptr)), edge_ptr


def _made(
    where: Path,
    node_ptr: np.ndarray,
    ends: np.ndarray,
    labels: np.ndarray,
    node_label: np.ndarray | None,
    node_attribute: np.ndarray | None,
    edge_attribute: np.ndarray | None,
) -> TuGraphs:
    """From checked arrays; ``ends`` (2, E) are nodes of the whole set."""
    kept, ends = _cleaned(ends, int(node_ptr[-1]))
    edge_index, edge_ptr = _within(ends, node_ptr)
    values, graph_label = np.unique(labels, return_inverse=True)
    for column in () if node_label is None else node_label.T:
        if int(column.max()) - int(column.min()) >= MAX_FEATURES:
            raise DataError(
                f"{where}: node labels from {column.min()} to {column.max()}; they may span {MAX_FEATURES} numbers"
            )
    return TuGraphs(
        str(where),
        node_ptr,
        np.ascontiguousarray(edge_index),
        edge_ptr,
        graph_label.astype(np.int64),
        tuple(str(value) for value in values),
        None if node_label is None else node_label - node_label.min(0),
        None if node_attribute is None else node_attribute.astype(np.float32),
        None if edge_attribute is None else edge_attribute[kept].astype(np.float32),
    )


# --- text files


def _read_folder(folder: Path) -> TuGraphs:
    names = sorted(path.name.removesuffix("_A.txt") for path in folder.glob("*_A.txt"))
    if len(names) != 1:
        raise DataError(
            f"{folder}: {len(names)} files …_A.txt{f' ({shown(names)})' if names else ''}; one, the edges of a TU data "
            "set, is expected"
        )

    def path(part: str) -> Path:
        return folder / f"{names[0]}_{part}.txt"

    def rows(part: str, count: int, of: str, kind: type) -> np.ndarray | None:
        if not path(part).is_file():
            return None
        found = _table(path(part), kind)
        if len(found) != count:
            raise DataError(f"{path(part)}: {len(found)} lines; one for each of {count} {of} is expected")
        return found

    labels = _column(path("graph_labels"))
    node_ptr, owner = _graphs(path("graph_indicator"), _column(path("graph_indicator")), labels, path("graph_labels"))
    ends = _edges(path("A"), _table(path("A"), int, columns=2, empty=True).T - 1, owner)
    return _made(
        folder,
        node_ptr,
        ends,
        labels,
        rows("node_labels", len(owner), "nodes", int),
        rows("node_attributes", len(owner), "nodes", float),
        rows("edge_attributes", ends.shape[1], "edges", float),
    )


def _graphs(path: Path, indicator: np.ndarray, labels: np.ndarray, labelled: Path) -> tuple[np.ndarray, np.ndarray]:
    """(first node of each graph and their number, graph of each node), graphs from 0."""
    steps = np.diff(indicator, prepend=0)
    for line in np.flatnonzero((steps < 0) | (steps > 1))[:1]:
        before, now = (int(indicator[line - 1]) if line else 0), int(indicator[line])
        if now > before:
            raise DataError(f"{path}, line {line + 1}: graph {before} (number {before + 1} there) has no nodes")
        raise DataError(
            f"{path}, line {line + 1}: a node of graph {now - 1} (number {now} there) after those of graph "
            f"{before - 1}; graphs are numbered from 1, and the nodes of each stand together"
        )
    count = int(indicator[-1])
    if indicator[0] == 0 or count > len(labels):
        line = int(np.argmax(indicator > len(labels))) if indicator[0] else 0
        raise DataError(
            f"{path}, line {line + 1}: the graph number {indicator[line]}; {labelled.name} has 1…{len(labels)}"
        )
    if count < len(labels):
        raise DataError(f"{labelled}, line {count + 1}: graph {count} (number {count + 1} there) has no nodes")
    return np.concatenate([[0], np.cumsum(np.bincount(indicator - 1))]), indicator - 1


def _edges(path: Path, ends: np.ndarray, owner: np.ndarray) -> np.ndarray:
    for edge in np.flatnonzero(((ends < 0) | (ends >= len(owner))).any(axis=0))[:1]:
        raise DataError(
            f"{path}, line {edge + 1}: joins the nodes {ends[0, edge] + 1} and {ends[1, edge] + 1}; 1…{len(owner)} is "
            "expected"
        )
    for edge in np.flatnonzero(owner[ends[0]] != owner[ends[1]])[:1]:
        one, other = ends[:, edge]
        raise DataError(
            f"{path}, line {edge + 1}: joins node {one + 1} of graph {owner[one]} to node {other + 1} of graph "
            f"{owner[other]}; edges stay within a graph"
        )
    return ends


def _not_finite(numbers: np.ndarray) -> np.ndarray:
    """Rows that hold a number that is not finite as a float32."""
    with np.errstate(over="ignore"):
        return np.flatnonzero(~np.isfinite(numbers.astype(np.float32)).all(axis=1))


def _column(path: Path) -> np.ndarray:
    """The only column (n,) of a file of whole numbers."""
    return _table(path, int, columns=1)[:, 0]


def _table(path: Path, kind: type, columns: int | None = None, empty: bool = False) -> np.ndarray:
    """The numbers of a text file (rows, columns), int64 or float64; :class:`DataError` naming the line."""
    try:
        text = path.read_text("ascii").rstrip()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is no ASCII character; a file of numbers is expected") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    dtype = np.int64 if kind is int else np.float64
    if not text:
        if empty:
            return np.empty((0, columns or 1), dtype)
        raise DataError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = np.loadtxt(io.StringIO(text), dtype, delimiter=",", comments=None, ndmin=2)
    except (ValueError, OverflowError, Warning) as error:
        raise _first_wrong_line(path, text, kind, columns) from error
    if len(found) != text.count("\n") + 1 or columns not in (None, found.shape[1]):  # loadtxt leaves out empty lines
        raise _first_wrong_line(path, text, kind, columns)
    for line in _not_finite(found)[:1]:
        raise DataError(
            f"{path}, line {line + 1}: {shown(text.splitlines()[line])}; numbers finite in 32 bits are expected"
        )
    return found


def _first_wrong_line(path: Path, text: str, kind: Callable[[str], Any], columns: int | None) -> DataError:
    numbers = "whole numbers" if kind is int else "numbers"
    for number, line in enumerate(text.split("\n"), 1):
        cells = line.split(",")
        columns = columns or len(cells)
        try:
            right = len(cells) == columns and all(abs(kind(cell)) < 1 << 63 or kind is float for cell in cells)
        except ValueError:
            right = False
        if not right:
            return DataError(f"{path}, line {number}: {shown(line)}; {columns} {numbers} (commas between) are expected")
    return DataError(f"{path}: no table of {numbers}")


# --- npz


def _of_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> TuGraphs:
    def wrong(name: str, problem: str) -> DataError:
        return DataError(f"{path}: {name!r} {problem}")

    for name in _NUMBERS:
        if name not in arrays:
            raise DataError(f"{path}: no array {name!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
    found = {name: arrays[name] for name in (*_NUMBERS, *_OPTIONAL) if name in arrays}
    for name, array in found.items():
        real = name.endswith("attribute")
        ranks = (2,) if real else (1, 2) if name == "node_label" else (1,)
        if array.dtype.kind not in ("iuf" if real else "iu") or array.ndim not in ranks or array.shape[1:] == (0,):
            form = f"{'' if real else 'whole '}numbers of {' or '.join(map(str, ranks))} dimensions"
            raise wrong(name, f"is {array.dtype} of shape {array.shape}; {form} are expected")
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise wrong(name, f"holds {array.max()}, which is too large")
    numbers = {name: found[name].astype(np.int64) for name in (*_NUMBERS, "node_label") if name in found}
    ptr, edge_ptr, labels = numbers["node_ptr"], numbers["edge_ptr"], numbers["graph_label"]
    if len(labels) == 0:
        raise wrong("graph_label", "is empty; at least one graph is expected")
    for name, least in (("node_ptr", 1), ("edge_ptr", 0)):
        pointer = numbers[name]
        if len(pointer) != len(labels) + 1 or pointer[0] != 0:
            raise wrong(
                name,
                f"has {len(pointer)} entries, the first {shown(pointer[:1].tolist())}; {len(labels) + 1} from 0 on, "
                "one more than there are graphs, are expected",
            )
        for graph in np.flatnonzero(np.diff(pointer) < least)[:1]:
            size = pointer[graph + 1] - pointer[graph]
            raise wrong(name, f"gives graph {graph} {size} {name[:4]}s; at least {least} is expected")
    for name, count in (
        *((name, int(edge_ptr[-1])) for name in ("edge_src", "edge_dst", "edge_attribute")),
        *((name, int(ptr[-1])) for name in ("node_label", "node_attribute")),
    ):
        if name in found and len(found[name]) != count:
            raise wrong(name, f"has {len(found[name])} rows; {count}, as its pointer says, are expected")
    ends = np.stack([numbers["edge_src"], numbers["edge_dst"]])
    graph_of = np.repeat(np.arange(len(labels)), np.diff(edge_ptr))
    for edge in np.flatnonzero(((ends < 0) | (ends >= np.diff(ptr)[graph_of])).any(axis=0))[:1]:
        graph = graph_of[edge]
        raise wrong(
            "edge_src" if not 0 <= ends[0, edge] < np.diff(ptr)[graph] else "edge_dst",
            f"and its fellow join the nodes {ends[0, edge]} and {ends[1, edge]} of graph {graph} at place {edge}; its "
            f"nodes are 0…{np.diff(ptr)[graph] - 1}",
        )
    for name in ("node_attribute", "edge_attribute"):
        for row in _not_finite(found[name])[:1] if name in found else ():
            raise wrong(name, f"holds a number in row {row} that is not finite in 32 bits")
    label = numbers.get("node_label")
    return _made(
        path,
        ptr,
        ends + ptr[graph_of],
        labels,
        label[:, None] if label is not None and label.ndim == 1 else label,
        found.get("node_attribute"),
        found.get("edge_attribute"),
    )
