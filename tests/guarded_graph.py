"""A graph whose test labels are not to be had."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sparing.core.task import Splits
from sparing.data.nodes import NodeSet
from sparing.testing import TinyGraph


class Untouchable(NodeSet):
    """A split whose labels must not be looked at."""

    def __init__(self, real: NodeSet) -> None:
        self.x, self.edge_index, self.nodes, self.edge_weight = real.x, real.edge_index, real.nodes, None

    @property
    def labels(self):
        raise AssertionError("a label of the test split was looked at")

    def fingerprint(self) -> str:
        return "untouchable"


class Guarded(TinyGraph):
    """Nodes of three kinds, the labels of whose test split raise."""

    def splits(self, root: Path | None = None) -> Splits:
        splits = super().splits(root)
        return dataclasses.replace(splits, test=Untouchable(splits.test))
