"""The embedded default task: handwritten digits of 8×8 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sparing.core.task import Splits
from sparing.data.digits import read_digits
from sparing.data.images import ArrayImages, LabelledImages, stratified_cut
from sparing.tasks.images.classification import ImageClassification


class Digits(ImageClassification):
    """Handwritten digits of 8×8 pixels, embedded in scikit-learn.

    1,797 images (UCI "Optical Recognition of Handwritten Digits", test part; E. Alpaydin and C. Kaynak 1998), pixels
    0…16. The set has no official test split: 20 % of each class, chosen once for good, are the test split, 10 % each
    validation and calibration.
    """

    name = "digits"
    labels = tuple("0123456789")
    in_channels = 1
    image_size = 8
    full: ClassVar[float] = 16.0
    normalisation = ((0.3053,), (0.3763,))
    model: Mapping[str, Any] = {"widths": [32, 64, 128], "depths": 2}

    def read(self, root: Path | None) -> Splits:
        """Embedded: ``root`` is not looked at."""
        images, labels = read_digits()
        source = ArrayImages(images, "digits")
        parts = stratified_cut(labels, {"test": 0.2, "val": 0.1, "calibration": 0.1}, seed=0)

        def part(name: str) -> LabelledImages:
            return LabelledImages(source, labels, self.preprocessing, self.labels, parts[name], "digits")

        return Splits(train=part("rest"), val=part("val"), calibration=part("calibration"), test=part("test"))
