"""Cora and Citeseer with the Planetoid splits (Yang, Cohen and Salakhutdinov 2016, arXiv:1603.08861), from npz files.

The published files (``ind.cora.x`` and so on) are Python pickles. Opening a pickle can run code in it, so Sparing never
does; :func:`save_planetoid` writes the npz from a graph that another program, such as PyG, has read.

Arrays of ``planetoid/<name>.npz``: ``x_indptr`` (N + 1,), ``x_indices`` and ``x_shape`` (2,), the words of each node as
compressed sparse rows whose values are all 1; ``edge_index`` (2, E), each undirected edge once; ``label`` (N,);
``train_idx``, ``val_idx``, ``test_idx``, node numbers; ``unlabelled``, the nodes whose label is a filler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparing.core.errors import (
    DataError,
    InvalidValue,
    MissingDependency,
    UnknownName,
    did_you_mean,
    shown,
)
from sparing.core.files import read_arrays, write_arrays
from sparing.data.root import Source

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data

SPLITS = ("train", "val", "test")
_ARRAYS = (
    "x_indptr",
    "x_indices",
    "x_shape",
    "edge_index",
    "label",
    *(f"{split}_idx" for split in SPLITS),
    "unlabelled",
)
MAX_NODES = 1 << 24
"""Most nodes that a file may hold."""
MAX_FEATURES = 1 << 20
"""Most features that a node may have."""


@dataclass(frozen=True)
class CitationGraph:
    """What a graph's file must agree with."""

    source: Source
    features: int
    labels: tuple[str, ...]


def _source(name: str, summary: str) -> Source:
    home = "https://github.com/kimiyoung/planetoid"
    made = (
        f"It is made of the files of {home}. These are Python pickles, which can run code when they are opened, so "
        "Sparing never does; where you trust them, PyG does:\n"
        "  from torch_geometric.datasets import Planetoid\n"
        "  from sparing.data.planetoid import save_planetoid\n"
        f'  save_planetoid(Planetoid("planetoid-pickles", "{name}")[0], "{{path}}")'
    )
    return Source(name, summary, "MIT", home, (), f"planetoid/{name}.npz", made)


CORA = CitationGraph(
    _source("cora", "1 graph: 2,708 papers on machine learning, 5,278 citations, 7 subjects"),
    1433,
    (
        "theory",
        "reinforcement learning",
        "genetic algorithms",
        "neural networks",
        "probabilistic methods",
        "case-based",
        "rule learning",
    ),
)
CITESEER = CitationGraph(
    _source("citeseer", "1 graph: 3,327 papers on computer science, 4,552 citations, 6 subjects"),
    3703,
    (
        "artificial intelligence",
        "machine learning",
        "information retrieval",
        "databases",
        "agents",
        "human-computer interaction",
    ),
)
GRAPHS: Mapping[str, CitationGraph] = {graph.source.name: graph for graph in (CORA, CITESEER)}


def read_planetoid(root: Path, name: str, layout: Literal["sparse", "dense"] = "sparse") -> Data:
    """``planetoid/<name>.npz`` under the data root as one PyG graph.

    ``x`` float32 (N, F) of zeros and ones, a sparse COO tensor or a dense one; ``edge_index`` int64 (2, 2E), each edge
    in both directions, sorted; ``y`` int64 (N,), −1 for nodes without a label; ``train_mask``, ``val_mask`` and
    ``test_mask`` bool (N,).

    Raises :class:`DataError` naming file, array and record, :class:`UnknownName`, and :class:`MissingDependency`
    without PyG.
    """
    if name not in GRAPHS:
        raise UnknownName(f"unknown graph {name!r}.{did_you_mean(name, GRAPHS)} Known: {', '.join(sorted(GRAPHS))}")
    if layout not in ("sparse", "dense"):
        raise InvalidValue(f'layout = {layout!r}; "sparse" or "dense" is expected')
    _need_pyg(f"reading {name}")
    import torch
    from torch_geometric.data import Data

    arrays = read_planetoid_arrays(root, name)
    nodes, features = arrays["x_shape"].tolist()
    counts = np.diff(arrays["x_indptr"])
    places = torch.from_numpy(np.stack([np.repeat(np.arange(nodes), counts), arrays["x_indices"]]))
    x = torch.sparse_coo_tensor(
        places, torch.ones(places.shape[1]), (nodes, features), is_coalesced=True, check_invariants=True
    )
    one, other = arrays["edge_index"]
    ends = np.stack([np.concatenate([one, other]), np.concatenate([other, one])])
    label = arrays["label"].copy()
    label[arrays["unlabelled"]] = -1
    masks = {}
    for split in SPLITS:
        masks[f"{split}_mask"] = torch.zeros(nodes, dtype=torch.bool)
        masks[f"{split}_mask"][torch.from_numpy(arrays[f"{split}_idx"])] = True
    return Data(
        x=x if layout == "sparse" else x.to_dense(),
        edge_index=torch.from_numpy(np.ascontiguousarray(ends[:, np.lexsort(ends[::-1])])),
        y=torch.from_numpy(label),
        **masks,
    )


def read_planetoid_arrays(root: Path, name: str) -> dict[str, np.ndarray]:
    """The checked arrays of ``planetoid/<name>.npz``, all int64; see the head of this module."""
    graph = GRAPHS[name]
    return _checked(graph.source.read(root, read_arrays), graph.source.path(root), graph)


def split_of(name: str, root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """(node numbers, labels) of the training or the test split, both int64 (n,)."""
    arrays = read_planetoid_arrays(root, name)
    nodes = arrays["train_idx" if train else "test_idx"]
    return nodes, arrays["label"][nodes]


def row_normalised(x: Tensor) -> Tensor:
    """Each row of non-negative x (N, F), dense or sparse COO, divided by its sum; rows of zeros stay zero."""
    import torch

    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        sums = torch.sparse.sum(x, 1).to_dense()
        values = x.values() / sums[x.indices()[0]]
        return torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True, check_invariants=False)
    sums = x.sum(1, keepdim=True)
    return x / torch.where(sums == 0, torch.ones_like(sums), sums)


def save_planetoid(data: Data, path: Path | str) -> None:
    """Write a graph with 0/1 features, labels and masks as the npz that :func:`read_planetoid` reads.

    Nodes with a negative label, and nodes of no split without any feature (so PyG gives Citeseer's 15 papers of which
    only citations are known), become ``unlabelled``. Self loops are left out, and repeated or reversed edges kept once.
    Raises :class:`InvalidValue` naming the attribute that is missing or has other values.
    """
    import torch

    for attribute in ("x", "edge_index", "y", *(f"{split}_mask" for split in SPLITS)):
        if not isinstance(getattr(data, attribute, None), torch.Tensor):
            raise InvalidValue(f"the graph has no tensor {attribute!r}; x, edge_index, y and three masks are expected")
    data = data.cpu()
    x = data.x.to_dense() if data.x.layout != torch.strided else data.x
    if not bool(((x == 0) | (x == 1)).all()):
        raise InvalidValue("x holds other values than 0 and 1; features before any normalisation are expected")
    masks = {split: getattr(data, f"{split}_mask").numpy() for split in SPLITS}
    rows, columns = np.nonzero(x.numpy())
    counts = np.bincount(rows, minlength=len(x))
    ends = np.sort(data.edge_index.numpy().astype(np.int64), axis=0)
    label = data.y.numpy().astype(np.int64)
    used = np.logical_or.reduce(list(masks.values()))
    unlabelled = (label < 0) | ((counts == 0) & ~used)
    arrays = {
        "x_indptr": np.concatenate([[0], np.cumsum(counts)]),
        "x_indices": columns,
        "x_shape": np.array(x.shape),
        "edge_index": np.unique(ends[:, ends[0] != ends[1]], axis=1),
        "label": np.where(unlabelled, 0, label),
        **{f"{split}_idx": np.flatnonzero(mask) for split, mask in masks.items()},
        "unlabelled": np.flatnonzero(unlabelled),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_arrays(Path(path), arrays)


def _need_pyg(purpose: str) -> None:
    from importlib.util import find_spec

    if find_spec("torch_geometric") is None:
        raise MissingDependency("torch_geometric", "graphs", purpose)


def _checked(arrays: Mapping[str, np.ndarray], path: Path, graph: CitationGraph) -> dict[str, np.ndarray]:
    """All arrays as int64, or :class:`DataError` for the first that is not as it must be."""

    def wrong(name: str, problem: str) -> DataError:
        return DataError(f"{path}: {name!r} {problem}")

    for name in _ARRAYS:
        if name not in arrays:
            raise DataError(f"{path}: no array {name!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
        array, rank = arrays[name], 2 if name == "edge_index" else 1
        if array.dtype.kind not in "iu" or array.ndim != rank:
            form = "(2, E)" if rank == 2 else "one dimension"
            raise wrong(name, f"is {array.dtype} of shape {array.shape}; whole numbers of {form} are expected")
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise wrong(name, f"holds {array.max()}, which no index can be")
    found = {name: arrays[name].astype(np.int64) for name in _ARRAYS}
    if found["x_shape"].shape != (2,):
        raise wrong("x_shape", f"has shape {found['x_shape'].shape}; two numbers, nodes and features, are expected")
    nodes, features = found["x_shape"].tolist()
    if not (1 <= nodes <= MAX_NODES and features == graph.features <= MAX_FEATURES):
        raise wrong("x_shape", f"is {[nodes, features]}; 1…{MAX_NODES} nodes of {graph.features} features are expected")
    _check_words(found["x_indptr"], found["x_indices"], nodes, features, wrong)
    _check_edges(found["edge_index"], nodes, wrong)
    label, classes = found["label"], len(graph.labels)
    if len(label) != nodes:
        raise wrong("label", f"has {len(label)} entries; one for each of {nodes} nodes is expected")
    for node in np.flatnonzero((label < 0) | (label >= classes))[:1]:
        raise wrong("label", f"of node {node} is {label[node]}; 0…{classes - 1} is expected")
    _check_nodes(found, nodes, wrong)
    return found


def _check_words(indptr: np.ndarray, indices: np.ndarray, nodes: int, features: int, wrong: Any) -> None:
    if len(indptr) != nodes + 1 or indptr[0] != 0 or indptr[-1] != len(indices):
        raise wrong(
            "x_indptr",
            f"has {len(indptr)} entries, the first {shown(indptr[:1].tolist())} and the last "
            f"{shown(indptr[-1:].tolist())}; {nodes + 1} entries from 0 to {len(indices)}, the length of 'x_indices', "
            "are expected",
        )
    for node in np.flatnonzero(np.diff(indptr) < 0)[:1]:
        raise wrong("x_indptr", f"falls from {indptr[node]} to {indptr[node + 1]} at node {node}; it must not fall")
    rows = np.repeat(np.arange(nodes), np.diff(indptr))
    for place in np.flatnonzero((indices < 0) | (indices >= features))[:1]:
        raise wrong("x_indices", f"holds {indices[place]} for node {rows[place]}; 0…{features - 1} is expected")
    unsorted = np.flatnonzero((np.diff(rows) == 0) & (np.diff(indices) <= 0))
    for place in unsorted[:1]:
        raise wrong(
            "x_indices",
            f"holds {indices[place]} and then {indices[place + 1]} for node {rows[place]}; each feature once, in "
            "rising order, is expected",
        )


def _check_edges(edges: np.ndarray, nodes: int, wrong: Any) -> None:
    if edges.shape[0] != 2 or edges.shape[1] == 0:
        raise wrong("edge_index", f"has shape {edges.shape}; (2, E) with at least one edge is expected")

    def edge(number: int) -> str:
        return f"{number}, between nodes {edges[0, number]} and {edges[1, number]}"

    for number in np.flatnonzero(((edges < 0) | (edges >= nodes)).any(axis=0))[:1]:
        raise wrong("edge_index", f"has the edge {edge(number)}; nodes are 0…{nodes - 1}")
    for number in np.flatnonzero(edges[0] == edges[1])[:1]:
        raise wrong("edge_index", f"has the edge {edge(number)}; no self loops are expected")
    low, high = np.sort(edges, axis=0)
    _, first = np.unique(low * nodes + high, return_index=True)
    if len(first) < edges.shape[1]:
        number = np.setdiff1d(np.arange(edges.shape[1]), first)[0]
        raise wrong("edge_index", f"has the edge {edge(number)}, for a second time; each undirected edge once")


def _check_nodes(found: Mapping[str, np.ndarray], nodes: int, wrong: Any) -> None:
    """The splits and the unlabelled: existing nodes, each in one of them at most."""
    owner = np.full(nodes, -1)
    names = [*(f"{split}_idx" for split in SPLITS), "unlabelled"]
    for number, name in enumerate(names):
        index = found[name]
        if len(index) == 0 and name != "unlabelled":
            raise wrong(name, "is empty; at least one node is expected")
        for node in index[(index < 0) | (index >= nodes)][:1]:
            raise wrong(name, f"holds the node {node}; 0…{nodes - 1} is expected")
        for node in index[owner[index] >= 0][:1]:
            raise wrong(name, f"holds the node {node}, as does {names[owner[node]]!r}; they must not overlap")
        unique, counts = np.unique(index, return_counts=True)
        for node in unique[counts > 1][:1]:
            raise wrong(name, f"holds the node {node} twice; each once is expected")
        owner[index] = number
