"""Tasks on graphs."""

from sparing.tasks.graphs.groups import GroupedNodeClassification
from sparing.tasks.graphs.nodes import NodeClassification
from sparing.tasks.graphs.sets import GraphClassification

__all__ = ["GraphClassification", "GroupedNodeClassification", "NodeClassification"]
