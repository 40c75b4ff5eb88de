"""A user's own images: a folder of class sub-folders, or the same in a zip archive.

``photos/cat/1.jpg, photos/dog/2.png`` or, with splits, ``photos/train/cat/1.jpg, photos/test/dog/2.png``. Splits are
called train, val (or valid, validation) and test. Below a class folder files may lie at any depth.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sparing.core.errors import DataError
from sparing.data.images import ImageFiles

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files with other endings are no images and are passed over."""
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LAYOUT = "class sub-folders with images (photos/cat/1.jpg, photos/dog/2.jpg), or the same below train/, val/ and test/"


@dataclass(frozen=True)
class ImageTree:
    """Images found in a folder or zip file; nothing is decoded yet.

    ``labels`` (N,) index ``class_names``; ``rows`` maps "train", "val", "test" to record numbers when the tree has
    splits, and is empty otherwise.
    """

    files: ImageFiles
    labels: np.ndarray
    class_names: tuple[str, ...]
    rows: dict[str, np.ndarray]


def read_image_tree(path: Path) -> ImageTree:
    """List the images of a folder or zip file by class (and split), in sorted order.

    Raises :class:`DataError` when there is no image, only one class, an image outside of any class folder, or a class
    that has no training image.
    """
    path = Path(path)
    names = sorted(_names(path))
    if not names:
        raise DataError(f"{path}: no image ({', '.join(SUFFIXES)}) in it; {_LAYOUT} are expected")
    cut = _common_top(names) if path.is_file() else 0
    parts = [PurePosixPath(name).parts[cut:] for name in names]
    splits = "train" in {part[0] for part in parts if len(part) > 2} and all(part[0] in SPLITS for part in parts)
    depth = 3 if splits else 2
    stray = next((name for name, part in zip(names, parts, strict=True) if len(part) < depth), None)
    if stray is not None:
        raise DataError(f"{path}/{stray} lies in no class folder; {_LAYOUT} are expected")
    if not splits and (named := {part[0] for part in parts} & {"train", "test"}):
        raise DataError(f"{path}: {min(named)!r} stands beside folders that are no splits; {_LAYOUT} are expected")
    classes = [part[depth - 2] for part in parts]
    class_names = tuple(sorted(set(classes)))
    if len(class_names) < 2:
        raise DataError(f"{path}: only one class, {class_names[0]!r}; at least two class folders are expected")
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[name] for name in classes], dtype=np.int64)
    rows: dict[str, np.ndarray] = {}
    if splits:
        of_split = np.array([SPLITS[part[0]] for part in parts])
        rows = {name: np.flatnonzero(of_split == name) for name in ("train", "val", "test") if (of_split == name).any()}
        untrained = sorted(set(range(len(class_names))) - set(labels[rows["train"]].tolist()))
        if untrained:
            raise DataError(f"{path}: the class {class_names[untrained[0]]!r} has no image under train/")
    return ImageTree(ImageFiles(names, path), labels, class_names, rows)


def read_images(path: Path) -> ImageFiles:
    """All images of a folder or zip file, at any depth, in sorted order; what their folders are called means nothing.

    Raises :class:`DataError` when there is none.
    """
    path = Path(path)
    names = sorted(_names(path))
    if not names:
        raise DataError(f"{path}: no image ({', '.join(SUFFIXES)}) in it; a folder or zip file of images is expected")
    return ImageFiles(names, path)


def _names(path: Path) -> Iterator[str]:
    """Names of all images below a folder or in a zip file, relative to it; hidden ones are passed over."""
    if path.is_dir():
        found: Iterator[str] = _folder_names(path)
    elif path.is_file():
        found = iter(_zip_names(path))
    else:
        raise DataError(f"{path} is missing; a folder or zip file of {_LAYOUT} is expected there")
    for name in found:
        hidden = any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
        if name.lower().endswith(SUFFIXES) and not hidden:
            yield name


def _folder_names(path: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for folder, _, files in os.walk(path, onerror=refuse):
        for file in files:
            yield Path(folder, file).relative_to(path).as_posix()


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist() if not member.is_dir()]
    except (
        Exception
    ) as error:  # zipfile raises BadZipFile, OSError, struct.error, UnicodeDecodeError, NotImplementedError
        raise DataError(f"{path}: {error}; an intact zip file of images is expected") from error
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{path}: the member {twice!r} appears twice")
    return names


def _common_top(names: list[str]) -> int:
    """How many leading folders an archive wraps around everything ("photos/" in photos/cat/1.jpg, photos/dog/2.jpg)."""
    parts = [PurePosixPath(name).parts for name in names]
    depth = 0
    while all(len(part) > depth + 2 for part in parts) and len({part[depth] for part in parts}) == 1:
        if parts[0][depth] in SPLITS:
            break
        depth += 1
    return depth
