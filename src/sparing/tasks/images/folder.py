"""A user's own folder of images as a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import Splits
from sparing.data.folders import ImageTree, read_image_tree
from sparing.data.images import ArrayImages, ImageSource, LabelledImages, stratified_cut
from sparing.data.preprocessing import CentreCrop, ChannelsFirst, Decode, Normalise, ResizeShorter, ToFloat
from sparing.data.root import data_root, own_data
from sparing.tasks.images.classification import ImageClassification

SAMPLE = 2000
"""Most training images from which mean and standard deviation are taken."""


class ImageFolder(ImageClassification):
    """Your own images: a folder (or zip file) of class sub-folders, with or without train/val/test above them.

    Images are decoded, their shorter side is brought to ``resize``, and the centre is cut out. What a split lacks is
    cut from the training images, the same on every run.

    Args:
        path: the folder or zip file; a relative one is looked for from the working folder, then from the data root.
        size: height and width of model inputs in pixels.
        channels: 3 for colour, 1 for grey.
        resize: pixels of the shorter side before the centre is cut out; None: ``size``, so that least is cut off.
        test_share: share of each class for the test split, when there is no test folder.
        val_share: share of each class for validation, when there is no val folder.
        calibration_share: share of each training class for calibration.
        memory_mb: decoded images are kept in memory when they take less than this; else decoded whenever asked for.
    """

    name = "image_folder"

    def __init__(
        self,
        path: str,
        size: int = 64,
        channels: int = 3,
        resize: int | None = None,
        test_share: float = 0.2,
        val_share: float = 0.1,
        calibration_share: float = 0.05,
        memory_mb: int | float = 512,
    ) -> None:
        super().__init__()
        if isinstance(size, bool) or not isinstance(size, int) or not 4 <= size <= 2048:
            raise InvalidValue(f"image_folder: size = {size!r}; a whole number in 4…2048 is expected")
        if isinstance(channels, bool) or channels not in (1, 3):
            raise InvalidValue(f"image_folder: channels = {channels!r}; 1 (grey) or 3 (colour) is expected")
        if resize is not None and (isinstance(resize, bool) or not isinstance(resize, int) or resize < size):
            raise InvalidValue(f"image_folder: resize = {resize!r}; at least size = {size}, or none, is expected")
        shares = {"test_share": test_share, "val_share": val_share, "calibration_share": calibration_share}
        for name, share in shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
                raise InvalidValue(f"image_folder: {name} = {share!r}; a share above 0 and below 1 is expected")
        if sum(shares.values()) >= 1:
            raise InvalidValue(f"image_folder: {' + '.join(shares)} = {sum(shares.values())}; below 1 is expected")
        if isinstance(memory_mb, bool) or not isinstance(memory_mb, int | float) or not memory_mb >= 0:
            raise InvalidValue(f"image_folder: memory_mb = {memory_mb!r}; a number of at least 0 is expected")
        self.path = str(path)
        self.name = f"image_folder:{Path(path).name}"
        self.image_size, self.in_channels = size, channels
        self.resize = size if resize is None else resize
        self._shares = {name.removesuffix("_share"): float(share) for name, share in shares.items()}
        self._memory = memory_mb * 1e6
        self._root: Path | None = None
        self._tree: ImageTree | None = None
        self._parts: dict[str, np.ndarray] = {}
        self._source: ImageSource | None = None
        self._normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def _located(self) -> Path:
        expected = "a folder or zip file with one sub-folder of images for each class"
        return own_data("image_folder", self.path, data_root(self._root), expected)

    @property
    def tree(self) -> ImageTree:
        """The images found, by class and split; listed once."""
        if self._tree is None:
            tree = read_image_tree(self._located())
            self._parts = self._cut(tree)
            self._tree = tree
        return self._tree

    def _cut(self, tree: ImageTree) -> dict[str, np.ndarray]:
        """Rows of train, val, calibration and test."""
        given = {name: rows for name, rows in tree.rows.items() if name != "train"}
        shares = {name: share for name, share in self._shares.items() if name not in given}
        base = tree.rows.get("train", np.arange(len(tree.labels)))
        cut = stratified_cut(tree.labels[base], shares, seed=0)
        parts = {"train" if name == "rest" else name: base[rows] for name, rows in cut.items()} | given
        for name, rows in parts.items():
            if len(rows) == 0:
                raise DataError(
                    f"{tree.files.base}: {len(base)} images of {len(tree.class_names)} classes leave none for the "
                    f"split {name!r}; a class needs at least {len(shares) + 1} images to take part in every split"
                )
        return parts

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the class folders, sorted."""
        return self.tree.class_names

    def _geometry(self) -> tuple[Any, ...]:
        size = self.image_size
        mode = Decode("L" if self.in_channels == 1 else "RGB")
        return (mode, ResizeShorter(self.resize), CentreCrop(size, size))

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the training pixels of (at most 2,000, evenly spaced) images; a channel that never varies gets std 1."""
        if self._normalisation is None:
            raw = Preprocessing((*self._geometry(), ChannelsFirst(), ToFloat(self.full)))
            tree = self.tree
            rows = self._parts["train"]
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int))]
            view = LabelledImages(self._images(), tree.labels, raw, tree.class_names, rows, str(tree.files.base))
            total, squares, count = np.zeros(self.in_channels), np.zeros(self.in_channels), 0
            for start in range(0, len(view), 64):
                images, _ = view.batch(np.arange(start, min(start + 64, len(view))))
                total += images.sum(axis=(0, 2, 3), dtype=np.float64)
                squares += np.square(images, dtype=np.float64).sum(axis=(0, 2, 3))
                count += images.size // self.in_channels
            mean = total / count
            std = np.sqrt(np.maximum(squares / count - mean**2, 0))
            std[std < 1e-4] = 1.0
            self._normalisation = (tuple(np.round(mean, 4).tolist()), tuple(np.round(std, 4).tolist()))
        return self._normalisation

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """Decode, shorter side to ``resize``, centre crop, scale to 0…1, normalise by the training pixels."""
        return Preprocessing((*self._geometry(), ChannelsFirst(), ToFloat(self.full), Normalise(*self.normalisation)))

    def _images(self) -> ImageSource:
        """All images decoded in memory when they fit, else the files."""
        if self._source is None:
            tree = self.tree
            size = self.image_size
            self._source = tree.files
            if len(tree.labels) * size * size * self.in_channels <= self._memory:
                pixels = np.empty((len(tree.labels), size, size, self.in_channels), np.uint8)
                plain = Preprocessing((*self._geometry(), ChannelsFirst()))
                files = LabelledImages(tree.files, tree.labels, plain, self.labels, where=str(tree.files.base))
                for start in range(0, len(files), 64):
                    rows = np.arange(start, min(start + 64, len(files)))
                    pixels[rows] = files.pixels(rows)
                self._source = ArrayImages(pixels, str(tree.files.base))
        return self._source

    def splits(self, root: Path | None = None) -> Splits:
        """As the folders say; what is missing is cut from the training images, each class in the same shares."""
        if self._tree is None:
            self._root = root
        return super().splits(root)

    def read(self, root: Path | None) -> Splits:
        """All four parts share one source of images."""
        tree, source, preprocessing = self.tree, self._images(), self.preprocessing

        def part(name: str) -> LabelledImages:
            where = str(tree.files.base)
            return LabelledImages(source, tree.labels, preprocessing, self.labels, self._parts[name], where)

        return Splits(part("train"), part("val"), part("calibration"), part("test"))

    def raw_example(self) -> list[Any]:
        """The first image as its file's bytes, so that timing with preprocessing includes decoding."""
        raw = self.tree.files.take(np.array([0]))[0]
        return [raw if isinstance(raw, bytes) else raw.read_bytes()]

    @property
    def model(self) -> dict[str, Any]:  # type: ignore[override]
        """A convnet with as many stages as the image size allows, at most five."""
        stages = int(np.clip(np.log2(self.image_size) - 1, 1, 5))
        return {"widths": [16, 32, 64, 128, 256][:stages]}

    def definition(self) -> dict[str, Any]:
        """With the shares; the images themselves are fingerprinted with the splits."""
        return {**super().definition(), "shares": self._shares}
