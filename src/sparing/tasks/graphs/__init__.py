"""Tasks on graphs."""

from sparing.tasks.graphs.nodes import NodeClassification

__all__ = ["NodeClassification"]
