"""What detection and segmentation share: annotated images in COCO's format, a user's own or published ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from sparing.core.errors import DataError, InvalidValue
from sparing.core.files import canonical_json
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import Splits, Task
from sparing.data.coco import CocoFile, CocoImage, DenseImages, Merge, images_of, read_coco
from sparing.data.images import ArrayImages, LabelledImages
from sparing.data.preprocessing import IMAGENET, ChannelsFirst, Decode, Normalise, Resize, ToFloat
from sparing.data.root import data_root, own_data
from sparing.tasks.images.corruptions import corruption_functions

if TYPE_CHECKING:
    from torch import nn

FULL = 255.0
ENDINGS = (".json", ".json.gz")
ALONE = ("train", "instances", "annotations")
"""Names of the file that holds the training images, where none is said."""


class AnnotatedImages(Task):
    """The base of tasks on images in COCO's format; what is missing of validation, calibration and test is cut off.

    Args:
        path: a folder; a relative one is looked for from the working folder, then from the data root.
        train: the annotation file of the training images, or several, relative to ``path``; None: ``train.json``,
            ``instances.json`` or ``annotations.json`` in it, gzipped or not.
        val: that of the validation images; None: ``val.json``, if there is one.
        test: that of the images to measure on; None: ``test.json``, if there is one.
        images: folder or archive of all images, relative to ``path``; None: beside each annotation file, by its name.
        size: height and width of model inputs in pixels; images are stretched to it.
        merge: "supercategories" makes one class of all categories of a supercategory, "all" of all; "" of each its own.
        test_share: share of the training images that are measured on, when there is no test file.
        val_share: share of the training images for validation, when there is no val file.
        calibration_share: share of the training images for calibration.
        train_limit: use the first so many images of the training files; None: all.
        test_limit: use the first so many test images; None: all.
        memory_mb: decoded images are kept in memory when they take less than this; else decoded whenever asked for.
    """

    unit: ClassVar[str] = "image"
    kind: ClassVar[Literal["boxes", "maps"]]
    in_channels: ClassVar[int] = 3

    def __init__(
        self,
        path: str,
        train: str | Sequence[str] | None = None,
        val: str | None = None,
        test: str | None = None,
        images: str | None = None,
        size: int = 96,
        merge: Merge = "",
        test_share: float = 0.2,
        val_share: float = 0.1,
        calibration_share: float = 0.05,
        train_limit: int | None = None,
        test_limit: int | None = None,
        memory_mb: int | float = 512,
    ) -> None:
        own = type(self).name
        if isinstance(size, bool) or not isinstance(size, int) or not 16 <= size <= 2048:
            raise InvalidValue(f"{own}: size = {size!r}; a whole number in 16…2048 is expected")
        if merge not in ("", "supercategories", "all"):
            raise InvalidValue(f'{own}: merge = {merge!r}; "", "supercategories" or "all" is expected')
        shares = {"test": test_share, "val": val_share, "calibration": calibration_share}
        for name, share in shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
                raise InvalidValue(f"{own}: {name}_share = {share!r}; a share above 0 and below 1 is expected")
        if sum(shares.values()) >= 1:
            raise InvalidValue(f"{own}: the shares of test, val and calibration add up to {sum(shares.values())}")
        for name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 4):
                raise InvalidValue(f"{own}: {name} = {limit!r}; a whole number of at least 4, or none, is expected")
        if isinstance(memory_mb, bool) or not isinstance(memory_mb, int | float) or not memory_mb >= 0:
            raise InvalidValue(f"{own}: memory_mb = {memory_mb!r}; a number of at least 0 is expected")
        if val is not None and val == test:
            raise InvalidValue(
                f"{own}: val and test both are {val!r}; what is chosen by validation would have seen the test"
            )
        self.path = str(path)
        self.name = f"{own}:{Path(path).name}"
        self.image_size, self.merge = size, merge
        self.files = {"train": [train] if isinstance(train, str) else train, "val": val, "test": test, "images": images}
        self._shares = {name: float(share) for name, share in shares.items()}
        self._limits = {"train": train_limit, "test": test_limit}
        self._memory = memory_mb * 1e6
        self._root: Path | None = None
        self._found: dict[str, list[CocoFile]] | None = None
        self._splits: Splits | None = None

    # ----------------------------------------------------------------------------------------------------------- data

    def _located(self) -> Path:
        expected = "a folder with annotation files in COCO's format"
        return own_data(type(self).name, self.path, data_root(self._root), expected)

    def _read(self) -> dict[str, list[CocoFile]]:
        """The annotation files of train and, where there are any, val and test; read once."""
        if self._found is None:
            folder = self._located()
            chosen: dict[str, list[Path]] = {}
            for split in ("train", "val", "test"):
                named: Any = self.files[split]
                if named is None:
                    names = ALONE if split == "train" else (split,)
                    there = (folder / f"{name}{end}" for name in names for end in ENDINGS)
                    chosen[split] = [path for path in there if path.is_file()][:1]
                else:
                    chosen[split] = [folder / name for name in ([named] if isinstance(named, str) else named)]
            if self.files["val"] is None:  # as COCO's own is, the file may be the one to measure on
                chosen["val"] = [path for path in chosen["val"] if path not in chosen["test"]]
            if not chosen["train"]:
                raise DataError(
                    f"{folder}: no annotations: none of {', '.join(f'{name}.json[.gz]' for name in ALONE)} in it; name "
                    "the file by train"
                )
            found = {split: [read_coco(path, self.merge) for path in paths] for split, paths in chosen.items() if paths}
            first = found["train"][0]
            for file in (file for files in found.values() for file in files):
                if file.names != first.names:
                    raise DataError(f"{file.path}: its categories are not those of {first.path}")
            self._found = found
        return self._found

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the kinds of objects."""
        return self._read()["train"][0].names

    def _plain(self) -> tuple[Any, ...]:
        return (Decode("RGB"), Resize(self.image_size, self.image_size), ChannelsFirst())

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """Decode, stretch to the task's size, scale to 0…1, normalise by ImageNet's mean and standard deviation."""
        return Preprocessing((*self._plain(), ToFloat(FULL), Normalise(*IMAGENET)))

    def _part(self, files: Sequence[CocoFile], limit: int | None) -> DenseImages:
        """The images of some files as one dataset, in memory where they fit."""
        given = self.files["images"]
        folder = None if given is None else self._located() / str(given)
        parts: list[tuple[Any, tuple[CocoImage, ...], Path]] = []
        size, room = self.image_size, limit
        for file in files:
            images = file.images[:room]
            room = None if room is None else room - len(images)
            if images:
                parts.append((images_of(file.path, [image.file for image in images], folder), images, file.path))
        annotations = [image for part in parts for image in part[1]]
        where = ", ".join(str(part[2]) for part in parts)
        fits = len(annotations) * size * size * 3 <= self._memory
        if not fits and len(parts) > 1:
            raise DataError(
                f"{where}: {len(annotations)} images of {size}×{size} pixels do not fit into memory_mb, and those of "
                "several files are kept in memory: raise memory_mb or name one file"
            )
        source: Any = parts[0][0]
        if fits:
            pixels = np.empty((len(annotations), size, size, 3), np.uint8)
            start = 0
            for source, images, path in parts:
                files_ = LabelledImages(
                    source, np.zeros(len(images), int), Preprocessing(self._plain()), ("image",), where=str(path)
                )
                for begin in range(0, len(images), 64):
                    rows = np.arange(begin, min(begin + 64, len(images)))
                    pixels[start + rows] = files_.pixels(rows)
                start += len(images)
            source = ArrayImages(pixels, where)
        zeros = np.zeros(len(annotations), int)
        return DenseImages(
            LabelledImages(source, zeros, self.preprocessing, self.labels, where=where), annotations, self.kind
        )

    def splits(self, root: Path | None = None) -> Splits:
        """As the files say; what is missing is cut from the training images, the same on every run."""
        if self._splits is None:
            self._root = root
            found = self._read()
            train = self._part(found["train"], self._limits["train"])
            given = {
                split: self._part(found[split], self._limits["test"] if split == "test" else None)
                for split in ("val", "test")
                if split in found
            }
            order = np.random.RandomState(0).permutation(len(train))
            parts: dict[str, Any] = {}
            start = 0
            for name, share in self._shares.items():
                if name not in given:
                    end = start + max(1, round(share * len(train)))
                    parts[name] = train.subset(np.sort(order[start:end])) if end < len(train) else None
                    start = end
            if start >= len(train) or None in parts.values():
                raise DataError(
                    f"{train.images.where}: {len(train)} images leave none for every split; more are needed, or files "
                    "of their own for val and test"
                )
            parts["train"] = train.subset(np.sort(order[start:]))
            self._splits = Splits(**parts, **given)
        return self._splits

    # ---------------------------------------------------------------------------------------------------------- models

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Standard normal numbers, the same on every call: (float32 (batch, 3, H, W),)."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return (torch.randn(batch, 3, self.image_size, self.image_size, generator=generator),)

    def model_fields(self) -> Mapping[str, Any]:
        """``in_channels``, ``num_classes`` and ``image_size``."""
        return {"in_channels": 3, "num_classes": len(self.labels), "image_size": self.image_size}

    model: Mapping[str, Any] = {}
    """Name and fields of the default model."""

    def default_model(self) -> nn.Module:
        """A small network on EMO-0.14M."""
        from sparing.core.predictor import build_model

        return build_model(self.model["name"], self, **{k: v for k, v in self.model.items() if k != "name"})

    def raw_example(self) -> Sequence[Any]:
        """One uint8 image (H, W, 3) of evenly distributed pixel values."""
        shape = (self.image_size, self.image_size, 3)
        return [np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)]

    def corruptions(self, split: Any) -> Mapping[str, DenseImages]:
        """Noise, blur and loss of contrast at fixed severity (see :mod:`sparing.tasks.images.corruptions`)."""
        if not isinstance(split, DenseImages):
            return {}
        functions = corruption_functions(FULL, self.image_size)
        return {name: split.corrupted(name, function) for name, function in functions.items()}

    def definition(self) -> dict[str, Any]:
        """What besides the source code and the files decides this task's splits and figures, JSON-able."""
        return {
            "task": f"{type(self).__module__}.{type(self).__qualname__}",
            "files": self.files,
            "size": self.image_size,
            "merge": self.merge,
            "shares": self._shares,
            "limits": self._limits,
            "metrics": [metric.name for metric in self.metrics],
            "model": dict(self.model),
        }

    def fingerprint(self) -> str:
        """Hash of :meth:`definition`."""
        return hashlib.sha256(canonical_json(self.definition()).encode()).hexdigest()


EMOJI80: Mapping[str, Any] = {"train": ["train_base.json.gz", "train_novel.json.gz"], "test": "val.json.gz"}
"""The files of ``emoji80/``."""
EMOJI80_FOLDER = "emoji80"
EMOJI80_BACKBONE: Mapping[str, Any] = {
    "name": "emo",
    "variant": "0.14M",
    "stem_stride": 2,
    "window_sizes": [0, 0, 0, 0],
}
"""EMO-0.14M with a stem that halves, as suits 96 pixels; windows are whole maps."""


class Emoji80(AnnotatedImages):
    """Where the scenes lie, and what of them is used; comes before the kind of task among a class's bases."""

    def __init__(self, merge: Merge = "", train_limit: int | None = None, test_limit: int | None = None) -> None:
        super().__init__(
            EMOJI80_FOLDER, **EMOJI80, size=96, merge=merge, train_limit=train_limit, test_limit=test_limit
        )
        self.name = type(self).name

    def _located(self) -> Path:
        folder = data_root(self._root) / EMOJI80_FOLDER
        if not (folder / EMOJI80["test"]).is_file():
            raise DataError(
                f"{folder / EMOJI80['test']} is missing. Place there train_base, train_novel and val, each as "
                "NAME.json.gz in COCO's format and NAME.tar with its images; for a folder of your own use "
                "coco_detection or coco_segmentation"
            )
        return folder
