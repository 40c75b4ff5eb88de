"""Annotated images in COCO's format: objects as boxes, polygons and run-length masks (Lin et al. 2014, arXiv
1405.0312).

A file holds ``images`` (id, file_name, width, height), ``categories`` (id, name) and ``annotations`` (image_id,
category_id, bbox, area, iscrowd, segmentation). Ids may have gaps; a class is a category's place in the order of the
ids. Everything is checked as it is read, and :class:`DataError` names the file and the entry.

Polygons are drawn by ``pycocotools``: ``pip install 'sparing[detection]'``. Run-length masks need nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Integer

from sparing.core.errors import DataError, InvalidValue, MissingDependency, shown
from sparing.core.fingerprint import fingerprint
from sparing.core.task import IGNORED
from sparing.data.images import ArrayImages, ImageFiles, LabelledImages
from sparing.data.preprocessing import MAX_ENCODED_BYTES, MAX_PIXELS
from sparing.data.text import read_text

if TYPE_CHECKING:
    import torch

ARCHIVES = (".zip", ".tar")
Merge = Literal["", "supercategories", "all"]
"""Which categories are one class: none, those of one supercategory, or all."""


class Instance(NamedTuple):
    """One object."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels, inside the image."""
    label: int
    area: float
    """In square pixels, as the file says (the mask's in COCO); that of the box where it says nothing."""
    crowd: bool
    """Many objects under one mask. Detectors neither learn nor miss it."""
    segmentation: Any
    """Polygons [[x, y, …], …], or {"size": [height, width], "counts": runs}, or None."""


@dataclass(frozen=True)
class CocoImage:
    """One image and what is in it."""

    file: str
    width: int
    height: int
    objects: tuple[Instance, ...]


@dataclass(frozen=True)
class CocoFile:
    """What an annotation file says."""

    path: Path
    names: tuple[str, ...]
    """Of the classes."""
    images: tuple[CocoImage, ...]


def read_coco(path: Path, merge: Merge = "") -> CocoFile:
    """An annotation file in COCO's format, JSON, gzipped or plain.

    Boxes are cut at the image's edges; an object without any extent there is left out, as COCO's own tools do. Raises
    :class:`DataError` for anything else that is not sound: ids that occur twice or lead nowhere, numbers that are none,
    masks of another size than their image.
    """
    if merge not in ("", "supercategories", "all"):
        raise InvalidValue(f'merge = {merge!r}; "", "supercategories" or "all" is expected')
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: a {type(found).__name__}; a mapping of images, categories, annotations is expected")
    names, label_of = _classes(_list(found, "categories", path), merge, path)
    places: dict[Any, int] = {}
    heads: list[tuple[str, int, int]] = []
    for number, entry in enumerate(_list(found, "images", path)):
        where = f"{path}: images[{number}]"
        id = _whole(entry, "id", where)
        if id in places:
            raise DataError(f"{where}: the id {id} occurs twice")
        places[id] = number
        width, height = (_whole(entry, side, where, 1) for side in ("width", "height"))
        if width * height > MAX_PIXELS:
            raise DataError(f"{where}: {width}×{height} pixels; at most {MAX_PIXELS} are accepted")
        heads.append((_name(entry, "file_name", where), width, height))
    if not heads:
        raise DataError(f"{path}: lists no image")
    objects: list[list[Instance]] = [[] for _ in heads]
    for number, entry in enumerate(_list(found, "annotations", path)):
        where = f"{path}: annotations[{number}]"
        id = _whole(entry, "image_id", where)
        category = _whole(entry, "category_id", where)
        if id not in places:
            raise DataError(f"{where}: the image_id {id}, which no image has")
        if category not in label_of:
            raise DataError(f"{where}: the category_id {category}, which no category has")
        _, width, height = heads[places[id]]
        instance = _instance(entry, label_of[category], width, height, where)
        if instance is not None:
            objects[places[id]].append(instance)
    images = tuple(CocoImage(*head, tuple(inside)) for head, inside in zip(heads, objects, strict=True))
    return CocoFile(path, names, images)


def _list(found: dict[str, Any], key: str, path: Path) -> list[Any]:
    if not isinstance(found.get(key), list):
        raise DataError(f"{path}: {key} is {shown(found.get(key), 60)}; a list is expected, as in COCO's files")
    return found[key]


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f"{where}: has no {key!r}")
    return entry[key]


def _whole(entry: Any, key: str, where: str, least: int | None = None) -> int:
    value = _get(entry, key, where)
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        limit = "" if least is None else f" of at least {least}"
        raise DataError(f"{where}: {key} = {shown(value, 60)}; a whole number{limit} is expected")
    return value


def _name(entry: Any, key: str, where: str) -> str:
    value = _get(entry, key, where)
    parts = Path(value).parts if isinstance(value, str) else ("..",)
    if not parts or ".." in parts or Path(value).is_absolute() or "\0" in value:
        raise DataError(f"{where}: {key} = {shown(value, 60)}; the name of a file below the images' folder is expected")
    return value


def _classes(categories: list[Any], merge: Merge, path: Path) -> tuple[tuple[str, ...], dict[int, int]]:
    """(names of the classes, category id → class)."""
    named: dict[int, tuple[str, str]] = {}
    for number, entry in enumerate(categories):
        where = f"{path}: categories[{number}]"
        id, name = _whole(entry, "id", where), _get(entry, "name", where)
        if id in named:
            raise DataError(f"{where}: the id {id} occurs twice")
        above = _get(entry, "supercategory", where) if merge == "supercategories" else ""
        if not isinstance(name, str) or not isinstance(above, str):
            raise DataError(f"{where}: name = {shown(name, 60)}; a text is expected")
        named[id] = (name, above)
    if not named:
        raise DataError(f"{path}: lists no category")
    order = sorted(named)
    if merge == "":
        return tuple(named[id][0] for id in order), {id: place for place, id in enumerate(order)}
    if merge == "all":
        return ("object",), dict.fromkeys(order, 0)
    names = list(dict.fromkeys(named[id][1] for id in order))
    return tuple(names), {id: names.index(named[id][1]) for id in order}


def _numbers(value: Any, count: int | None = None) -> list[float] | None:
    """A list of (``count``) finite numbers, or None."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        return None
    kind = all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    return [float(item) for item in value] if kind and all(map(_is_finite, value)) else None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _instance(entry: Any, label: int, width: int, height: int, where: str) -> Instance | None:
    box = _numbers(_get(entry, "bbox", where), 4)
    if box is None or min(box[2:]) < 0:
        raise DataError(
            f"{where}: bbox = {shown(entry['bbox'], 80)}; [left, top, width, height] in pixels, none negative, is right"
        )
    left, top = min(max(box[0], 0), width), min(max(box[1], 0), height)
    right, bottom = min(max(box[0] + box[2], 0), width), min(max(box[1] + box[3], 0), height)
    if right <= left or bottom <= top:
        return None
    area = entry.get("area", box[2] * box[3])
    if _numbers([area]) is None or area < 0:
        raise DataError(f"{where}: area = {shown(area, 60)}; a number of pixels is expected")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"{where}: iscrowd = {shown(crowd, 60)}; 0 or 1 is expected")
    segmentation = entry.get("segmentation") or None
    if segmentation is not None:
        _check_mask(segmentation, width, height, where)
    return Instance((left, top, right, bottom), label, float(area), bool(crowd), segmentation)


def _check_mask(segmentation: Any, width: int, height: int, where: str) -> None:
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise DataError(
                f"{where}: a mask of size {shown(segmentation.get('size'), 60)}; [{height}, {width}], the height and "
                "width of its image, is expected"
            )
        if not isinstance(segmentation.get("counts"), str | list):
            raise DataError(
                f"{where}: counts = {shown(segmentation.get('counts'), 60)}; runs, a text or a list, are expected"
            )
        return
    polygons = segmentation if isinstance(segmentation, list) else [None]
    for polygon in polygons:
        numbers = _numbers(polygon)
        if numbers is None or len(numbers) < 6 or len(numbers) % 2:
            raise DataError(
                f"{where}: a polygon {shown(polygon, 80)}; [x, y, x, y, x, y, …], at least three points, is expected"
            )
        beyond = max(max(-x, x - width) for x in numbers[::2]), max(max(-y, y - height) for y in numbers[1::2])
        if beyond[0] > width or beyond[1] > height:
            raise DataError(f"{where}: a polygon reaches {max(beyond):g} pixels out of its image of {width}×{height}")


def rle_runs(counts: str | list[int]) -> list[int]:
    """Lengths of the runs of a mask, alternately without and with the object: COCO's compressed text, or the list
    itself.

    Each number is cut into groups of five bits, lowest first, each in a character from "0" on whose sixth bit says that
    more follow and whose fifth, in the last, is the sign; from the third number on, differences from the one before the
    last are kept. Raises ``ValueError`` for anything else.
    """
    if not isinstance(counts, str):
        if not all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts):
            raise ValueError("runs that are no whole numbers of at least 0")
        return list(counts)
    runs: list[int] = []
    value = shift = 0
    for sign in counts:
        code = ord(sign) - 48
        if not 0 <= code < 64:
            raise ValueError(f"the character {sign!r}, which no run-length text has")
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("a run longer than any image")
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
        if runs[-1] < 0:
            raise ValueError(f"a run of {runs[-1]} pixels")
    if shift:
        raise ValueError("a text that ends inside a number")
    return runs


def mask_of(segmentation: Any, width: int, height: int, where: str = "mask") -> Bool[np.ndarray, "h w"]:
    """Which pixels an object covers, bool (height, width): of polygons, together, or of a run-length mask.

    Raises :class:`DataError`, beginning with ``where``, for runs that do not fill the image, and
    :class:`MissingDependency` for polygons without pycocotools.
    """
    if isinstance(segmentation, dict):
        try:
            runs = rle_runs(segmentation["counts"])
            if sum(runs) != width * height:
                raise ValueError(f"runs of {sum(runs)} pixels for an image of {width * height}")
        except ValueError as error:
            raise DataError(f"{where}: {error}; a run-length mask is expected") from error
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return inside.reshape(width, height).T  # columns first
    try:
        from pycocotools import mask as masks
    except ModuleNotFoundError as error:
        raise MissingDependency("pycocotools", "detection", "drawing polygons") from error
    drawn = masks.frPyObjects([[float(x) for x in polygon] for polygon in segmentation], height, width)
    return masks.decode(drawn).any(-1)


def label_map(image: CocoImage, where: str = "image") -> Integer[np.ndarray, "h w"]:
    """The class of each pixel, int16 (height, width): 0 is background, class c becomes c + 1.

    Where objects overlap, the one of the smallest area is seen. An object without a mask covers its box.
    """
    found = np.zeros((image.height, image.width), np.int16)
    for number in sorted(range(len(image.objects)), key=lambda n: -image.objects[n].area):
        instance = image.objects[number]
        if instance.segmentation is None:
            left, top, right, bottom = instance.box
            found[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = instance.label + 1
        else:
            mask = mask_of(instance.segmentation, image.width, image.height, f"{where}, object {number}")
            found[mask] = instance.label + 1
    return found


def nearest_cells(size: int, target: int) -> Integer[np.ndarray, " target"]:
    """In which of ``size`` cells along a side the centre of each of ``target`` lies."""
    return ((np.arange(target) + 0.5) * size / target).astype(int)


def nearest(labels: Integer[np.ndarray, "h w"], height: int, width: int) -> Integer[np.ndarray, "height width"]:
    """A map of another size, whose pixels take the class at their centre."""
    if labels.shape == (height, width):
        return labels
    return labels[np.ix_(nearest_cells(labels.shape[0], height), nearest_cells(labels.shape[1], width))]


# ----------------------------------------------------------------------------------------------------------- the files


class TarFiles:
    """Encoded images in an uncompressed tar archive; its members are looked up once, and read when asked for.

    Args:
        names: members.
        base: the archive.
    """

    def __init__(self, names: Sequence[str], base: Path) -> None:
        self.names, self.base = list(names), base
        try:
            with tarfile.open(base, "r:") as archive:
                members = {member.name.removeprefix("./"): member for member in archive if member.isreg()}
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            raise DataError(f"{base}: cannot be read: {error}; an uncompressed tar archive is expected") from error
        missing = next((name for name in self.names if name not in members), None)
        if missing is not None:
            raise DataError(f"{base}: has no member {missing!r}, which the annotations name")
        self._places = [(members[name].offset_data, members[name].size) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        """The place of an image for messages."""
        return f"{self.base}/{self.names[row]}"

    def take(self, rows: np.ndarray) -> list[bytes]:
        """The bytes of the members."""
        found = []
        try:
            with self.base.open("rb") as file:  # opened anew: forked workers would share one position
                for row in rows:
                    offset, size = self._places[row]
                    if size > MAX_ENCODED_BYTES:
                        raise DataError(f"{self.where(row)}: {size} bytes; an image may have {MAX_ENCODED_BYTES}")
                    file.seek(offset)
                    found.append(file.read(size))
        except OSError as error:
            raise DataError(f"{self.base}: cannot be read: {error}") from error
        return found

    def fingerprint(self) -> str:
        """By the content of the archive (its digest is kept by size and time of change)."""
        return fingerprint([self.names, self.base])


def images_of(annotations: Path, files: Sequence[str], folder: Path | None = None) -> ImageFiles | TarFiles:
    """The images that belong to an annotation file, which may lie in a folder, a zip or a tar archive.

    Without ``folder`` they are looked for beside the file, under its name without endings and without ``instances_``
    (``val.json`` → ``val/``, ``val.zip`` or ``val.tar``; ``annotations/instances_val2017.json`` → ``val2017/`` beside
    ``annotations/`` too), and then under ``images``.
    """
    if folder is not None:
        places = [folder]
    else:
        stem = annotations.name.removesuffix(".gz").removesuffix(".json").removeprefix("instances_")
        above = [annotations.parent, annotations.parent.parent] if annotations.parent.name == "annotations" else []
        bases = [*above, annotations.parent]
        places = [
            base / f"{name}{end}"
            for base in dict.fromkeys(bases)
            for name in (stem, "images")
            for end in ("", *ARCHIVES)
        ]
    for place in places:
        if place.is_dir() or (place.suffix in ARCHIVES and place.is_file()):
            if place.suffix == ".tar" and place.is_file():
                return TarFiles(files, place)
            return ImageFiles(files, place)
    raise DataError(f"{annotations}: no images: none of {', '.join(map(str, places))} exists")


# ------------------------------------------------------------------------------------------------------------ datasets


class Boxes(NamedTuple):
    """The objects of one image."""

    boxes: Float[np.ndarray, "m 4"]
    """(x1, y1, x2, y2) as shares of the image, float32."""
    labels: Integer[np.ndarray, " m"]
    crowd: Bool[np.ndarray, " m"]
    area: Float[np.ndarray, " m"]
    """In the file's square pixels, float32."""


Target = Boxes | np.ndarray
"""The objects of an image, or the class of each of its pixels, int16 (H, W)."""


class Change(Protocol):
    """A random change of images and what is known of them."""

    def __call__(self, images: np.ndarray, targets: list[Target]) -> tuple[np.ndarray, list[Target]]:
        """Uint8 (N, H, W, C) and N targets → the same kinds."""


class DenseImages:
    """Map-style dataset of images with boxes, or with a class for each pixel.

    Items are (float32 (C, H, W), target). For boxes the target maps "boxes" to float32 (m, 4), (x1, y1, x2, y2) as
    shares of the image; "labels" to int64 (m,); "crowd" to bool (m,); "area" to float32 (m,), in square pixels of the
    original; "size" to int64 (2,), the original's width and height. For classes of pixels it is int64 (H, W) of the
    model's size, :data:`~sparing.core.task.IGNORED` where none is known.

    Args:
        images: the images, whose labels are not looked at.
        annotations: what is in each image of the source of ``images``.
        kind: "boxes" or "maps".
        change: a random change of both.
        kept: maps of images that were drawn already, shared by all views.
    """

    def __init__(
        self,
        images: LabelledImages,
        annotations: Sequence[CocoImage],
        kind: Literal["boxes", "maps"],
        change: Change | None = None,
        kept: dict[int, np.ndarray] | None = None,
    ) -> None:
        if kind not in ("boxes", "maps"):
            raise InvalidValue(f'kind = {kind!r}; "boxes" or "maps" is expected')
        if len(annotations) != len(images.source):
            raise DataError(f"{images.where}: {len(images.source)} images and annotations of {len(annotations)}")
        self.images, self.annotations, self.kind, self.change = images, annotations, kind, change
        self._kept = {} if kept is None else kept

    def __len__(self) -> int:
        return len(self.images)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.images.class_names

    def raw(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | list[Any]:
        """Raw images at ``indices``, as a predictor's ``predict`` takes them."""
        return self.images.raw(indices)

    def target(self, index: int, height: int, width: int) -> Target:
        """What is known of an image, for its pixels at a size."""
        row = int(self.images.rows[index])
        image = self.annotations[row]
        if self.kind == "boxes":
            scale = np.array([image.width, image.height] * 2)
            boxes = np.array([instance.box for instance in image.objects], np.float64).reshape(-1, 4) / scale
            return Boxes(
                boxes.astype(np.float32),
                np.array([instance.label for instance in image.objects], np.int64),
                np.array([instance.crowd for instance in image.objects], bool),
                np.array([instance.area for instance in image.objects], np.float32),
            )
        if row in self._kept:
            return self._kept[row]
        found = nearest(label_map(image, f"{self.images.where}: {image.file}"), height, width)
        if isinstance(self.images.source, ArrayImages):  # where images fit into memory, their maps do
            self._kept[row] = found
        return found

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, list[Target]]:
        """(float32 (n, C, H, W), n targets) at ``indices``."""
        pixels = self.images.pixels(indices)
        targets = [self.target(int(index), *pixels.shape[1:3]) for index in indices]
        if self.change is not None:
            pixels, targets = self.change(pixels, targets)
        for operation in self.images._stages[1]:
            pixels = operation(pixels)
        return pixels, targets

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, Any]]:
        """Many items at the price of one preprocessing call; torch's data loader uses it."""
        import torch

        images, targets = self.batch(indices)
        items: list[tuple[torch.Tensor, Any]] = []
        for index, image, target in zip(indices, torch.from_numpy(images).unbind(0), targets, strict=True):
            if isinstance(target, Boxes):
                of = self.annotations[int(self.images.rows[index])]
                found = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in target._asdict().items()}
                items.append((image, {**found, "size": torch.tensor([of.width, of.height])}))
            else:
                items.append((image, torch.from_numpy(target.astype(np.int64))))
        return items

    def subset(self, indices: Sequence[int] | np.ndarray) -> DenseImages:
        """The images at ``indices``, sharing this dataset's memory."""
        return DenseImages(self.images.subset(indices), self.annotations, self.kind, self.change, self._kept)

    def corrupted(self, name: str, corruption: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> DenseImages:
        """A view whose images pass through ``corruption`` before they become floats."""
        images = self.images.corrupted(name, corruption)
        return DenseImages(images, self.annotations, self.kind, self.change, self._kept)

    def changed(self, change: Change) -> DenseImages:
        """A view that changes images and targets together."""
        return DenseImages(self.images, self.annotations, self.kind, change, self._kept)

    @cached_property
    def _fingerprint(self) -> str:
        known = [list(map(_plain, self.annotations[int(row)].objects)) for row in self.images.rows]
        text = json.dumps([self.kind, known, repr(self.change)])
        return hashlib.sha256(f"{self.images.fingerprint()}\n{text}".encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes with any image, object or class name; computed once."""
        return self._fingerprint


def _plain(instance: Instance) -> list[Any]:
    return list(instance)


def collate_boxes(items: Sequence[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> tuple[Any, dict[str, Any]]:
    """Items of images with boxes → (images (N, C, H, W), targets of (N, M, …)), filled up to the most objects M ≥ 1.

    Rows without an object have the label :data:`~sparing.core.task.IGNORED`.
    """
    import torch

    most = max(1, *(len(target["labels"]) for _, target in items))
    filled: dict[str, Any] = {}
    for name, value in {"boxes": 0.0, "labels": IGNORED, "crowd": False, "area": 0.0}.items():
        rows = torch.full((len(items), most, *items[0][1][name].shape[1:]), value, dtype=items[0][1][name].dtype)
        for row, (_, target) in zip(rows, items, strict=True):
            row[: len(target[name])] = target[name]
        filled[name] = rows
    filled["size"] = torch.stack([target["size"] for _, target in items])
    return torch.stack([image for image, _ in items]), filled
