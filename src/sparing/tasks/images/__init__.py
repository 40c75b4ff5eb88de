"""Image classification: embedded digits, published sets, and a user's own folder of images."""

from sparing.tasks.images.classification import ImageClassification

__all__ = ["ImageClassification"]
