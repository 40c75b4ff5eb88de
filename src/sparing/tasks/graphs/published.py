"""Tasks on published graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparing.data.planetoid import CITESEER, CORA, read_planetoid, row_normalised
from sparing.data.root import data_root
from sparing.tasks.graphs.nodes import NodeClassification

if TYPE_CHECKING:
    from torch_geometric.data import Data


def citations(root: Path | None, name: str) -> Data:
    """A Planetoid graph under ``root``, its rows of words divided by their sums as in Kipf and Welling 2017."""
    data = read_planetoid(data_root(root), name)
    data.x = row_normalised(data.x)
    return data


class Cora(NodeClassification):
    """Cora: papers on machine learning and their citations, 7 subjects (split of Yang et al. 2016).

    Of the split's 140 training nodes (20 for each class) 126 train and 14 calibrate; 500 validate, 1,000 test. Read
    from ``planetoid/cora.npz`` under the data root.
    """

    name = "cora"
    labels = CORA.labels
    in_features = CORA.features
    example_nodes = 2708
    example_edges = 10556
    example_nonzeros = 18

    def read(self, root: Path | None) -> Data:
        """The graph, its features sparse and row-normalised."""
        return citations(root, self.name)


class Citeseer(NodeClassification):
    """Citeseer: papers on computer science and their citations, 6 subjects (split of Yang et al. 2016).

    Of the split's 120 training nodes (20 for each class) 108 train and 12 calibrate; 500 validate, 1,000 test. 15
    papers are known from citations only: they pass messages and are in no split. Read from ``planetoid/citeseer.npz``
    under the data root.
    """

    name = "citeseer"
    labels = CITESEER.labels
    in_features = CITESEER.features
    example_nodes = 3327
    example_edges = 9104
    example_nonzeros = 32

    def read(self, root: Path | None) -> Data:
        """The graph, its features sparse and row-normalised."""
        return citations(root, self.name)
