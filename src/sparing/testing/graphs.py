"""Small graphs, and a small set of graphs, in memory: what steps and models on graphs are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparing.tasks.graphs.groups import GroupedNodeClassification
from sparing.tasks.graphs.nodes import NodeClassification
from sparing.tasks.graphs.sets import GraphClassification

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data


class TinyGraph(NodeClassification):
    """Three classes of 120 nodes that mostly cite their own class and use its words, features sparse."""

    name = "tiny_graph"
    labels = ("a", "b", "c")
    in_features = 24
    example_nodes = 120
    example_edges = 480
    example_nonzeros = 4

    def read(self, root: Path | None) -> Data:
        """Made by a generator of its own: 60 nodes train and calibrate, 30 validate, 30 test."""
        import torch
        from torch_geometric.data import Data
        from torch_geometric.utils import to_undirected

        draw = torch.Generator().manual_seed(0)
        y = torch.arange(120) % 3
        words = torch.rand(120, 24, generator=draw) + torch.eye(3).repeat_interleave(8, 1)[y] > 0.95
        words[:, 0] = True
        pairs = torch.randint(120, (2, 1200), generator=draw)
        alike = (y[pairs[0]] == y[pairs[1]]) | (torch.rand(1200, generator=draw) < 0.1)
        pairs = pairs[:, alike & (pairs[0] != pairs[1])]
        part = torch.arange(120) // 30
        return Data(
            x=(words / words.sum(1, keepdim=True)).to_sparse(),
            edge_index=to_undirected(pairs),
            y=y,
            train_mask=part < 2,
            val_mask=part == 2,
            test_mask=part == 3,
        )


class TinyPeople(GroupedNodeClassification):
    """Two classes of 120 nodes in two groups, which know their own and mostly their own class.

    The class "yes" is more frequent in the group "b". A feature tells the group, another the class; features are dense,
    and each node has a loop.
    """

    name = "tiny_people"
    labels = ("no", "yes")
    group_names = ("a", "b")
    in_features = 4
    example_nodes = 120
    example_edges = 600

    def read(self, root: Path | None) -> Data:
        """Made by a generator of its own: 60 nodes train and calibrate, 30 validate, 30 test."""
        import torch
        from torch_geometric.data import Data
        from torch_geometric.utils import add_self_loops, to_undirected

        draw = torch.Generator().manual_seed(0)
        sens = torch.arange(120) % 2
        y = (torch.rand(120, generator=draw) < 0.3 + 0.4 * sens).long()
        x = torch.randn(120, 4, generator=draw)
        x[:, 0] += 2 * y
        x[:, 1] += 2 * sens
        pairs = torch.randint(120, (2, 1200), generator=draw)
        alike = (y[pairs[0]] == y[pairs[1]]) | (torch.rand(1200, generator=draw) < 0.2)
        pairs = pairs[:, alike & (sens[pairs[0]] == sens[pairs[1]]) & (pairs[0] != pairs[1])]
        part = torch.arange(120) // 30
        return Data(
            x=x,
            edge_index=add_self_loops(to_undirected(pairs, num_nodes=120), num_nodes=120)[0],
            y=y,
            sens=sens,
            train_mask=part < 2,
            val_mask=part == 2,
            test_mask=part == 3,
        )


class TinyGraphs(GraphClassification):
    """Two classes of 120 graphs of four to eight nodes, paths or rings; nodes have two features that say little."""

    name = "tiny_graphs"
    labels = ("path", "ring")
    in_features = 2
    example_nodes = 6
    example_edges = 12

    def read(self, root: Path | None) -> list[Data]:
        """Made by a generator of its own: 12 graphs test, 12 validate, of the others 86 train and 10 calibrate."""
        import torch
        from torch_geometric.data import Data
        from torch_geometric.utils import to_undirected

        draw = torch.Generator().manual_seed(0)
        graphs = []
        for number in range(120):
            size, ring = 4 + number // 2 % 5, number % 2
            nodes = torch.arange(size - 1 + ring)
            edges = to_undirected(torch.stack([nodes, (nodes + 1) % size]), num_nodes=size)
            end = torch.bincount(edges[0], minlength=size) == 1
            x = torch.stack([end + 0.5 * torch.rand(size, generator=draw), torch.rand(size, generator=draw)], 1)
            graphs.append(Data(x=x, edge_index=edges, y=torch.tensor(ring)))
        return graphs


def graph_of(inputs: tuple[Tensor, Tensor, Tensor], number: int) -> tuple[Tensor, Tensor, Tensor]:
    """One of the graphs that a model is given as (x, edge_index, node_ptr)."""
    x, edge_index, node_ptr = inputs
    start, end = node_ptr[number : number + 2].tolist()
    inside = (edge_index[0] >= start) & (edge_index[0] < end)
    return x[start:end], edge_index[:, inside] - start, node_ptr[number : number + 2] - start
