"""Map-style datasets of labelled images: in memory as raw uint8, or decoded from files as they are asked for.

A dataset keeps *raw* images and turns them into model inputs by the executable preprocessing that is saved with the
model, a whole batch at a time, so training sees exactly what the deployed predictor will compute.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from sparing.core.errors import DataError, InvalidValue
from sparing.core.files import canonical_json
from sparing.core.fingerprint import fingerprint
from sparing.data.preprocessing import MAX_ENCODED_BYTES, ChannelsFirst, ImageBatch

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.core.predictor import Preprocessing

Corruption = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 images (n, H, W, C), their indices in the split (n,)) → uint8 images of the same shape."""


@runtime_checkable
class ImageSource(Protocol):
    """Where raw images come from."""

    def __len__(self) -> int:
        """Number of images."""

    def take(self, rows: np.ndarray) -> np.ndarray | list[Any]:
        """The raw images at ``rows`` (n,), as preprocessing accepts them."""

    def fingerprint(self) -> str:
        """Changes when any image changes."""


class ArrayImages:
    """Raw images in memory: uint8 (N, H, W, C)."""

    def __init__(self, images: np.ndarray, where: str = "images") -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
            raise DataError(
                f"{where}: {images.dtype} of shape {images.shape}; "
                "uint8 (images, height, width, 1 or 3 channels) is expected"
            )
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Uint8 (n, H, W, C)."""
        return self.images[rows]

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.images)

    def fingerprint(self) -> str:
        """By content, computed once."""
        return self._fingerprint


class ImageFiles:
    """Encoded images in files, or in members of one zip archive, read when asked for.

    Args:
        names: paths relative to ``base``.
        base: a folder or a zip file.
    """

    def __init__(self, names: Sequence[str], base: Path) -> None:
        self.names, self.base = list(names), base
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        """The place of an image for messages."""
        return f"{self.base}/{self.names[row]}"

    def take(self, rows: np.ndarray) -> list[Any]:
        """Paths of a folder's files; the bytes of an archive's members."""
        if self.base.is_dir():
            return [self.base / self.names[row] for row in rows]
        return [self._member(int(row)) for row in rows]

    def _member(self, row: int) -> bytes:
        try:
            # A forked worker shares the parent's file position, so each process opens the archive for itself.
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), zipfile.ZipFile(self.base))
            archive = self._opened[1]
            size = archive.getinfo(self.names[row]).file_size
            if size > MAX_ENCODED_BYTES:
                raise DataError(f"{self.where(row)}: {size} bytes, more than the {MAX_ENCODED_BYTES} an image may have")
            return archive.read(self.names[row])
        except DataError:
            raise
        except Exception as error:  # zipfile raises BadZipFile, zlib.error, NotImplementedError, KeyError, OSError …
            raise DataError(f"{self.where(row)}: cannot be read: {error}; an intact zip member is expected") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @cached_property
    def _fingerprint(self) -> str:
        if self.base.is_dir():
            return fingerprint([[name, self.base / name] for name in self.names])
        return fingerprint([self.names, self.base])

    def fingerprint(self) -> str:
        """By the content of every file (digests are kept by size and time of change)."""
        return self._fingerprint


@dataclass(frozen=True)
class _Corrupt:
    name: str
    apply: Corruption


class LabelledImages:
    """Map-style dataset of ``(float tensor (C, H, W), label)``.

    Args:
        source: raw images, or a uint8 array (N, H, W, C).
        labels: class of each image of the source, integers (N,) in 0…len(class_names) − 1.
        preprocessing: raw images → float32 (n, C, H, W).
        class_names: name of each class.
        rows: the images of the source this dataset holds, in its order; None: all.
        where: what messages call this data.
    """

    def __init__(
        self,
        source: ImageSource | np.ndarray,
        labels: np.ndarray,
        preprocessing: Preprocessing,
        class_names: Sequence[str],
        rows: np.ndarray | None = None,
        where: str = "images",
        _corrupt: _Corrupt | None = None,
    ) -> None:
        self.source: ImageSource = ArrayImages(source, where) if isinstance(source, np.ndarray) else source
        self.all_labels = check_labels(labels, len(self.source), class_names, where)
        self.preprocessing = preprocessing
        self.class_names = tuple(class_names)
        self.rows = np.arange(len(self.source)) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(self.rows) == 0:
            raise DataError(f"{where}: no image; at least one is expected")
        self.where = where
        self._corrupt = _corrupt

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, int64 (len,)."""
        return self.all_labels[self.rows]

    def raw(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | list[Any]:
        """Raw images at ``indices``, as a predictor's ``predict`` takes them (never corrupted)."""
        return self.source.take(self.rows[np.asarray(indices, dtype=np.int64)])

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Uint8 (n, H, W, C): decoded, brought to the model's size and, in a corrupted view, corrupted."""
        indices = np.asarray(indices, dtype=np.int64)
        raws = self.raw(indices)
        try:
            images = self._apply(raws, self._stages[0])
        except DataError:
            self._name_the_damaged(indices, raws)
            raise
        if self._corrupt is not None:
            images = self._corrupt.apply(images, indices)
        return images

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 (n, C, H, W), int64 (n,)) at ``indices``."""
        indices = np.asarray(indices, dtype=np.int64)
        images = self.pixels(indices)
        for operation in self._stages[1]:
            images = operation(images)
        return images, self.all_labels[self.rows[indices]]

    @cached_property
    def _stages(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The operations up to uint8 images of one size, and those from there to model inputs."""
        operations = tuple(self.preprocessing.operations)
        cut = next((i for i, op in enumerate(operations) if isinstance(op, ChannelsFirst)), None)
        if cut is None:
            raise InvalidValue(f"{self.where}: the preprocessing has no channels_first; image models need (N, C, H, W)")
        return operations[:cut], operations[cut:]

    def _apply(self, raws: Any, operations: Sequence[Any]) -> Any:
        images: ImageBatch = raws
        for operation in operations:
            images = operation(images)
        if not isinstance(images, np.ndarray):
            raise DataError(f"{self.where}: images of different sizes after preprocessing; add a resize to it")
        return images

    def _name_the_damaged(self, indices: np.ndarray, raws: Any) -> None:
        """Operations know an image's place in the batch; say which file or record it is."""
        place = getattr(self.source, "where", lambda row: f"{self.where}: record {row}")
        for index, raw in zip(indices, raws, strict=True):
            try:
                self._apply([raw], self._stages[0])
            except DataError as error:
                reason = str(error).split(": ", 1)[-1]
                raise DataError(f"{place(int(self.rows[index]))}: {reason}") from error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Many items at the price of one preprocessing call; torch's data loader uses it."""
        import torch

        images, labels = self.batch(indices)
        return list(zip(torch.from_numpy(images).unbind(0), labels.tolist(), strict=True))

    def subset(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """The images at ``indices``, sharing this dataset's memory."""
        return self._derive(rows=self.rows[np.asarray(indices, dtype=np.int64)])

    def corrupted(self, name: str, corruption: Corruption) -> LabelledImages:
        """A view whose images pass through ``corruption`` before they become floats."""
        return self._derive(corrupt=_Corrupt(name, corruption))

    def _derive(self, rows: np.ndarray | None = None, corrupt: _Corrupt | None = None) -> LabelledImages:
        return LabelledImages(
            self.source,
            self.all_labels,
            self.preprocessing,
            self.class_names,
            self.rows if rows is None else rows,
            self.where,
            corrupt or self._corrupt,
        )

    @cached_property
    def _fingerprint(self) -> str:
        parts = [
            self.source.fingerprint(),
            fingerprint([self.labels, self.rows]),
            canonical_json([self.preprocessing.to_config(), list(self.class_names)]),
            self._corrupt.name if self._corrupt else "",
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes with any image, label, class name or preprocessing operation; computed once."""
        return self._fingerprint


def check_labels(labels: np.ndarray, count: int, class_names: Sequence[str], where: str) -> np.ndarray:
    """Labels as int64 (count,), or :class:`DataError` naming the first record that is wrong."""
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise DataError(f"{where}: {count} images and labels of shape {labels.shape}; one label for each is expected")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels of type {labels.dtype}; integers 0…{len(class_names) - 1} are expected")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise DataError(
            f"{where}: record {wrong[0]} has the label {labels[wrong[0]]}; 0…{len(class_names) - 1} is expected "
            f"({len(wrong)} such records)"
        )
    return labels.astype(np.int64)


def stratified_cut(labels: np.ndarray, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Cut records into named parts, each class in the same shares; what is left is the part "rest".

    Args:
        labels: class of each record (N,).
        shares: part → share of each class, in 0…1 together; a class with enough records gives each part at least one.
        seed: decides which records go where; the same on every machine.

    Returns:
        Part → sorted record numbers. Parts do not overlap and cover everything.
    """
    if any(not 0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise InvalidValue(f"shares {dict(shares)}; each in 0…1, and their sum below 1, are expected")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*shares, "rest")}
    for label in np.unique(labels):
        # RandomState's streams are frozen for good; the newer generators may change between NumPy releases.
        members = np.flatnonzero(labels == label)
        members = members[np.random.RandomState((seed * 1_000_003 + int(label)) % (1 << 32)).permutation(len(members))]
        start = 0
        for name, share in shares.items():
            least = 1 if share > 0 and len(members) > len(shares) else 0
            end = start + max(least, int(share * len(members) + 0.5))
            parts[name].append(members[start:end])
            start = end
        parts["rest"].append(members[start:])
    return {name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()}
