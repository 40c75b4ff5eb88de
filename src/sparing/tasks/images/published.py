"""Tasks on published image sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sparing.core.errors import InvalidValue
from sparing.core.task import Splits
from sparing.data.cifar import CIFAR10_LABELS, CIFAR100_LABELS, read_cifar10, read_cifar100
from sparing.data.idx import FASHION_MNIST_LABELS, read_fashion_mnist
from sparing.data.images import ArrayImages, LabelledImages, stratified_cut
from sparing.data.root import data_root
from sparing.tasks.images.classification import ImageClassification


class _Published(ImageClassification):
    """A set with an official test split; 8 % of each training class are for validation, 2 % for calibration.

    Args:
        train_limit: use the first so many training images (validation and calibration are cut from them); None: all.
        test_limit: use the first so many test images; None: all.
    """

    VAL_SHARE: ClassVar[float] = 0.08
    CALIBRATION_SHARE: ClassVar[float] = 0.02

    def __init__(self, train_limit: int | None = None, test_limit: int | None = None) -> None:
        super().__init__()
        for name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
                raise InvalidValue(
                    f"{self.name}: {name} = {limit!r}; a whole number of at least 1 is expected, or none"
                )
        self.train_limit, self.test_limit = train_limit, test_limit

    def definition(self) -> dict[str, Any]:
        """With the limits."""
        return {**super().definition(), "limits": [self.train_limit, self.test_limit]}

    def _cut(self, read: Callable[[bool, int | None], tuple[np.ndarray, np.ndarray]]) -> Splits:
        images, labels = read(True, self.train_limit)
        source, where = ArrayImages(images, self.name), f"{self.name} train"
        parts = stratified_cut(labels, {"val": self.VAL_SHARE, "calibration": self.CALIBRATION_SHARE}, seed=0)

        def part(name: str) -> LabelledImages:
            return LabelledImages(source, labels, self.preprocessing, self.labels, parts[name], where)

        test = LabelledImages(*read(False, self.test_limit), self.preprocessing, self.labels, where=f"{self.name} test")
        return Splits(train=part("rest"), val=part("val"), calibration=part("calibration"), test=test)


class FashionMNIST(_Published):
    """Fashion-MNIST: grey images of clothes, 28×28, 10 classes (Xiao, Rasul and Vollgraf 2017).

    Read from its published IDX files (``fashion_mnist/*-ubyte.gz`` under the data root, gzipped or unpacked).
    """

    name = "fashion_mnist"
    labels = FASHION_MNIST_LABELS
    in_channels = 1
    image_size = 28
    normalisation = ((0.2860,), (0.3530,))
    model: Mapping[str, Any] = {"widths": [16, 32, 128, 256]}

    def read(self, root: Path | None) -> Splits:
        """Both official splits, validation and calibration cut from the training part."""

        def read(train: bool, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
            images, labels = read_fashion_mnist(data_root(root), train)
            return images[:limit], labels[:limit]

        return self._cut(read)


class CIFAR10(_Published):
    """CIFAR-10: colour images of animals and vehicles, 32×32, 10 classes (Krizhevsky 2009).

    Read from the official binary batches or archive, or from the npz of JPEG copies (``cifar10/`` under the data root).
    """

    name = "cifar10"
    labels = CIFAR10_LABELS
    in_channels = 3
    image_size = 32
    normalisation = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    model: Mapping[str, Any] = {"widths": [32, 64, 128, 256], "depths": [1, 1, 2, 1]}

    def read(self, root: Path | None) -> Splits:
        """Both official splits, validation and calibration cut from the training part."""
        return self._cut(lambda train, limit: read_cifar10(data_root(root), train, limit))


class CIFAR100(_Published):
    """CIFAR-100: colour images of animals, plants, things and people, 32×32, 100 classes (Krizhevsky 2009).

    Read from the official binary files or archive (``cifar100/`` under the data root).
    """

    name = "cifar100"
    labels = CIFAR100_LABELS
    in_channels = 3
    image_size = 32
    normalisation = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    model: Mapping[str, Any] = {"widths": [64, 128, 256, 512], "depths": [1, 1, 2, 1]}

    def read(self, root: Path | None) -> Splits:
        """Both official splits, validation and calibration cut from the training part."""
        return self._cut(lambda train, limit: read_cifar100(data_root(root), train, limit))
