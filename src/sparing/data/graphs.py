"""Sets of graphs in one piece, so that a batch is a few gathers and not a loop over graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from sparing.core.errors import InvalidValue, MissingDependency, shown

if TYPE_CHECKING:
    from torch_geometric.data import Data


class GraphBatch(NamedTuple):
    """Some graphs side by side: the batch of a task on sets of graphs."""

    x: Tensor
    """Features of all nodes, float (nodes, F)."""
    edge_index: Tensor
    """Source and target of each edge, as numbers of all nodes, int64 (2, E)."""
    node_ptr: Tensor
    """First node of each graph, and the number of nodes: int64 (graphs + 1,)."""
    y: Tensor
    """The class of each graph, int64 (graphs,)."""
    edge_weight: Tensor | None = None
    """Float (E,), or None: all 1."""

    @property
    def batch(self) -> Tensor:
        """The graph of each node, int64 (nodes,), as PyG's layers take it."""
        sizes = self.node_ptr.diff()
        return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)


def graph_data(x: Tensor, edge_index: Tensor, y: Tensor, edge_weight: Tensor | None = None) -> Data:
    """A PyG graph; raises :class:`MissingDependency` without PyG."""
    try:
        from torch_geometric.data import Data
    except ModuleNotFoundError as error:
        raise MissingDependency("torch_geometric", "graphs", "a PyG graph") from error
    weights = {} if edge_weight is None else {"edge_weight": edge_weight}
    return Data(x=x, edge_index=edge_index, y=y, **weights)


def _gather(pointer: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(positions of all items of ``rows``, which lie at pointer[r]…pointer[r + 1] − 1; items of each row)."""
    sizes = pointer[rows + 1] - pointer[rows]
    before = sizes.cumsum(0) - sizes
    return (
        torch.repeat_interleave(pointer[rows] - before, sizes) + torch.arange(int(sizes.sum()), device=rows.device),
        sizes,
    )


def _pointer(sizes: Tensor) -> Tensor:
    """(first item of each row, and the number of items): (n,) → (n + 1,)."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


class PackedGraphs:
    """Graphs with a class each, one after the other in a few tensors: a map-style data set of PyG ``Data``.

    Args:
        x: features of all nodes, float (nodes, F).
        node_ptr: first node of each graph, and their number: int64 (n + 1,).
        edge_index: source and target of each edge as numbers within its graph, int64 (2, E).
        edge_ptr: first edge of each graph, and their number: int64 (n + 1,).
        y: classes, int64 (n,).
        edge_weight: float (E,), or None: all 1.
    """

    def __init__(
        self,
        x: Float[Tensor, "nodes f"],
        node_ptr: Int[Tensor, " n1"],
        edge_index: Int[Tensor, "2 e"],
        edge_ptr: Int[Tensor, " n1"],
        y: Int[Tensor, " n"],
        edge_weight: Float[Tensor, " e"] | None = None,
    ) -> None:
        self.x, self.node_ptr, self.edge_index, self.edge_ptr = x, node_ptr, edge_index, edge_ptr
        self.y, self.edge_weight = y, edge_weight

    @classmethod
    def of(cls, graphs: Any) -> PackedGraphs:
        """Pack a sequence of PyG ``Data`` with ``x`` (N, F), ``edge_index`` (2, E), one whole number ``y`` and, where
        all have it, ``edge_weight`` (E,).

        Raises :class:`InvalidValue` naming the first graph that has no nodes, no features or another number of them,
        features that are not finite, edges between nodes it does not have, or no class.
        """
        if isinstance(graphs, PackedGraphs):
            return graphs
        items: Sequence[Data] = [graphs[i] for i in range(len(graphs))]
        if not items:
            raise InvalidValue("no graphs; at least one is expected")
        width = None
        weighted = items[0].get("edge_weight") is not None
        for number, item in enumerate(items):
            width = _checked(item, number, width, weighted)
        nodes = torch.tensor([0, *(item.x.shape[0] for item in items)])
        edges = torch.tensor([0, *(item.edge_index.shape[1] for item in items)])
        x = torch.cat([item.x for item in items])
        return cls(
            x,
            nodes.cumsum(0).to(x.device),
            torch.cat([item.edge_index.long() for item in items], dim=1),
            edges.cumsum(0).to(x.device),
            torch.stack([item.y.reshape(()) for item in items]).long().to(x.device),
            torch.cat([item.edge_weight for item in items]) if weighted else None,
        )

    def __len__(self) -> int:
        """Number of graphs, n."""
        return len(self.y)

    def __getitem__(self, index: int) -> Data:
        if not -len(self) <= index < len(self):
            raise IndexError(f"graph {index} of {len(self)}")
        batch = self.take(torch.tensor([index % len(self)], device=self.y.device))
        return graph_data(batch.x, batch.edge_index, batch.y, batch.edge_weight)

    @property
    def sizes(self) -> Int[Tensor, " n"]:
        """Nodes of each graph, (n,)."""
        return self.node_ptr[1:] - self.node_ptr[:-1]

    def subset(self, rows: Int[Tensor, " k"]) -> PackedGraphs:
        """The graphs at ``rows`` (k,), in this order, as a set of their own."""
        nodes, sizes = _gather(self.node_ptr, rows)
        edges, counts = _gather(self.edge_ptr, rows)
        return PackedGraphs(
            self.x[nodes],
            _pointer(sizes),
            self.edge_index[:, edges],
            _pointer(counts),
            self.y[rows],
            None if self.edge_weight is None else self.edge_weight[edges],
        )

    def __getitems__(self, indices: Sequence[int]) -> PackedGraphs:
        """The graphs at several indices, without a loop over them; a data loader asks so."""
        return self.subset(torch.tensor(indices, dtype=torch.int64, device=self.y.device))

    def together(self) -> GraphBatch:
        """All graphs side by side."""
        first = self.node_ptr[:-1].repeat_interleave(self.edge_ptr.diff())
        return GraphBatch(self.x, self.edge_index + first, self.node_ptr, self.y, self.edge_weight)

    def take(self, rows: Int[Tensor, " k"]) -> GraphBatch:
        """The graphs at ``rows`` (k,), side by side in this order."""
        return self.subset(rows).together()

    def fingerprint(self) -> list[Any]:
        """All tensors."""
        return [self.x, self.node_ptr, self.edge_index, self.edge_ptr, self.y, self.edge_weight]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as :meth:`from_tensors` takes it."""
        names = ("x", "node_ptr", "edge_index", "edge_ptr", "y", "edge_weight")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PackedGraphs:
        """The set that :meth:`tensors` describes; raises :class:`InvalidValue` where these do not fit together."""
        names = {"x", "node_ptr", "edge_index", "edge_ptr", "y"}
        if not names <= set(tensors) <= names | {"edge_weight"}:
            raise InvalidValue(f"tensors {sorted(tensors)}; {sorted(names)} and at most 'edge_weight' are expected")
        x, y, edges = tensors["x"], tensors["y"], tensors["edge_index"]
        whole = all(not tensors[name].is_floating_point() for name in names - {"x"})
        if not (
            x.ndim == 2 and x.is_floating_point() and y.ndim == 1 and edges.ndim == 2 and len(edges) == 2 and whole
        ):
            raise InvalidValue(
                f"x {x.dtype} {tuple(x.shape)}, y {y.dtype} {tuple(y.shape)}, edge_index {edges.dtype} "
                f"{tuple(edges.shape)}; float (nodes, F) and whole numbers (n,) and (2, E) are expected"
            )
        for name, total in (("node_ptr", len(x)), ("edge_ptr", edges.shape[1])):
            pointer = tensors[name]
            if (
                name == "node_ptr"
                and pointer.shape == (len(y) + 1,)
                and (empty := (pointer.diff() == 0).nonzero()).numel()
            ):
                raise InvalidValue(f"graph {int(empty[0])}: no nodes; at least one is expected")
            if pointer.shape != (len(y) + 1,) or pointer[0] != 0 or pointer[-1] != total or (pointer.diff() < 0).any():
                raise InvalidValue(f"{name} {shown(pointer.tolist())}; rising numbers from 0 to {total} are expected")
        weight = tensors.get("edge_weight")
        if weight is not None and (weight.shape != (edges.shape[1],) or not weight.is_floating_point()):
            raise InvalidValue(f"edge_weight {weight.dtype} {tuple(weight.shape)}; float ({edges.shape[1]},)")
        sizes = tensors["node_ptr"].diff().repeat_interleave(tensors["edge_ptr"].diff())
        if ((edges < 0) | (edges >= sizes)).any():
            raise InvalidValue("edge_index names nodes that its graph does not have")
        return cls(**tensors)


def join_graphs(graphs: Any) -> GraphBatch:
    """:class:`PackedGraphs`, or a sequence of PyG ``Data`` that can be packed → a batch."""
    return PackedGraphs.of(graphs).together()


def _checked(item: Data, number: int, width: int | None, weighted: bool) -> int:
    """The number of features of a graph that can be packed."""

    def wrong(problem: str) -> InvalidValue:
        return InvalidValue(f"graph {number}: {problem}")

    x, edges, y = item.get("x"), item.get("edge_index"), item.get("y")
    if x is None:
        raise wrong("no features x; float (N, F) is expected: where nodes have none, give all the same number")
    if x.ndim != 2 or not x.is_floating_point() or x.shape[1] == 0:
        raise wrong(f"x is {x.dtype} of shape {tuple(x.shape)}; float (N, F) is expected")
    if x.shape[0] == 0:
        raise wrong("no nodes; at least one is expected")
    if width is not None and x.shape[1] != width:
        raise wrong(f"{x.shape[1]} features; {width}, as the graphs before it have, are expected")
    for node in (~x.isfinite()).any(1).nonzero().flatten()[:1].tolist():
        raise wrong(f"the features of node {node} are not finite")
    if edges is None or edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        shape = "absent" if edges is None else f"{edges.dtype} of shape {tuple(edges.shape)}"
        raise wrong(f"edge_index is {shape}; whole numbers (2, E) are expected")
    for edge in ((edges < 0) | (edges >= x.shape[0])).any(0).nonzero().flatten()[:1].tolist():
        raise wrong(f"edge {edge} joins {edges[:, edge].tolist()}; its nodes are 0…{x.shape[0] - 1}")
    if y is None or y.numel() != 1 or y.is_floating_point() or y.dtype == torch.bool or int(y) < 0:
        raise wrong(f"y is {shown(y)}; one whole number of 0 or more, its class, is expected")
    weight = item.get("edge_weight")
    if (weight is not None) != weighted:
        raise wrong("edge_weight in some graphs only; in all or in none is expected")
    if weight is not None and (weight.shape != (edges.shape[1],) or not weight.isfinite().all()):
        raise wrong(f"edge_weight of shape {tuple(weight.shape)}; ({edges.shape[1]},) finite numbers are expected")
    return int(x.shape[1])


def class_counts(y: Integer[Tensor, " n"], where: str = "labels") -> list[int]:
    """How many of the labels (n,) are of each class 0…C − 1; raises :class:`InvalidValue` for a class that has none."""
    if y.numel() == 0 or int(y.min()) < 0:
        raise InvalidValue(f"{where}: classes 0…C − 1 are expected, not {shown(y[:8].tolist())}")
    counts = torch.bincount(y).tolist()
    for number, count in enumerate(counts):
        if count == 0:
            raise InvalidValue(f"{where}: no sample of class {number}, but of {len(counts) - 1}; classes are 0…C − 1")
    return counts
