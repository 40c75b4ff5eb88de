"""A small graph in memory: what steps and models on graphs are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparing.tasks.graphs.nodes import NodeClassification

if TYPE_CHECKING:
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
