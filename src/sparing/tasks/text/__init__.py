"""Tasks on texts: classification (published sets and your own), masked language modelling, question answering."""

from sparing.tasks.text.classification import TextClassification

__all__ = ["TextClassification"]
