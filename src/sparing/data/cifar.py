"""CIFAR-10: the official binary batches, or the compact npz of JPEG copies.

Binary layout (Krizhevsky 2009): records of one label byte, then 1,024 red, 1,024 green and 1,024 blue bytes, row by
row. The npz holds one shared JPEG header, and for each split the concatenated scan data with offsets and labels.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparing.core.errors import CorruptFile, DataError
from sparing.core.files import read_arrays, sha256_of
from sparing.data.preprocessing import decode_image
from sparing.data.root import RemoteFile, Source, how_to_get

CIFAR10 = Source(
    "cifar10",
    "50,000 + 10,000 colour images, 32×32, 10 classes",
    "none stated; to be cited as Krizhevsky 2009",
    "https://www.cs.toronto.edu/~kriz/cifar.html",
    (
        RemoteFile(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            170052171,
        ),
    ),
)
CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NPZ = "cifar10_jpeg.npz"
BATCHES = "cifar-10-batches-bin"
RECORD = 1 + 3 * 32 * 32
MAX_RECORDS = 1 << 17
"""Most records that one binary file may hold (the official ones hold 10,000)."""


def batch_names(train: bool) -> list[str]:
    """The official files of one split."""
    return [f"data_batch_{number}.bin" for number in range(1, 6)] if train else ["test_batch.bin"]


def read_cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One binary batch: (uint8 (N, 32, 32, 3), int64 (N,)). :class:`DataError` names the file and the record."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_RECORDS * RECORD:
            raise DataError(f"{path}: {size} bytes; at most {MAX_RECORDS} records of {RECORD} bytes are expected")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; a CIFAR-10 batch is expected") from error
    return _records(content, str(path))


def _records(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % RECORD:
        raise DataError(
            f"{where}: {len(content)} bytes end inside record {len(content) // RECORD}; a whole number of records of "
            f"{RECORD} bytes (one label, 3×32×32 pixels) is expected"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0]
    wrong = np.flatnonzero(labels >= len(CIFAR10_LABELS))
    if len(wrong):
        raise DataError(f"{where}: record {wrong[0]} has the label {labels[wrong[0]]}; 0…9 is expected")
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int64)


def read_cifar_archive(path: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """One split out of the official ``cifar-10-binary.tar.gz``, whose digest is checked before it is opened."""
    file = CIFAR10.files[0]
    if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
        raise DataError(
            f"{path} is not the published archive: {file.bytes} bytes with SHA-256 {file.sha256} are expected"
        )
    wanted = {f"{BATCHES}/{name}": None for name in batch_names(train)}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                content = archive.extractfile(member) if name in wanted else None
                if content is not None:
                    found[name] = _records(content.read(), f"{path}/{name}")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(found) < len(wanted):
        raise DataError(f"{path}: {', '.join(sorted(wanted.keys() - found.keys()))} missing in it")
    return _joined([found[name] for name in wanted])


def read_cifar_npz(path: Path, train: bool, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One split of the npz of JPEG copies, its first ``limit`` images: (uint8 (N, 32, 32, 3), int64 (N,))."""
    split = "train" if train else "test"
    try:
        arrays = read_arrays(path)
    except CorruptFile as error:
        raise DataError(str(error)) from error
    header, scan, offsets, labels = _npz_parts(arrays, split, path)
    count = len(labels) if limit is None else min(limit, len(labels))
    images = np.empty((count, 32, 32, 3), np.uint8)
    for index in range(count):
        content = header + scan[offsets[index] : offsets[index + 1]].tobytes()
        image = decode_image(content, "RGB", f"{path}: {split} record {index}")
        if image.shape != (32, 32, 3):
            raise DataError(f"{path}: {split} record {index} has shape {image.shape}; (32, 32, 3) is expected")
        images[index] = image
    return images, labels[:count].astype(np.int64)


def _npz_parts(
    arrays: Mapping[str, np.ndarray], split: str, path: Path
) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    names = ("header", f"{split}_scan", f"{split}_offset", f"{split}_label")
    for name in names:
        if name not in arrays:
            raise DataError(f"{path}: no array {name!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
        kind = "u" if name.endswith(("header", "_scan")) else "iu"
        if arrays[name].ndim != 1 or arrays[name].dtype.kind not in kind:
            raise DataError(
                f"{path}: {name!r} is {arrays[name].dtype} of shape {arrays[name].shape}; a flat list of integers"
            )
    header, scan, offsets, labels = (arrays[name] for name in names)
    if header.dtype != np.uint8 or scan.dtype != np.uint8 or len(header) > 1 << 16:
        raise DataError(f"{path}: header and scan data are bytes (uint8), not {header.dtype} and {scan.dtype}")
    offsets = offsets.astype(np.int64)
    if len(labels) == 0 or len(offsets) != len(labels) + 1:
        raise DataError(f"{path}: {len(labels)} {split} labels and {len(offsets)} offsets; one offset more than labels")
    wrong = np.flatnonzero((np.diff(offsets) <= 0) | (offsets[:-1] < 0) | (offsets[1:] > len(scan)))
    if len(wrong):
        i = wrong[0]
        raise DataError(f"{path}: {split} record {i} lies at {offsets[i]}…{offsets[i + 1]} of {len(scan)} bytes")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CIFAR10_LABELS)))
    if len(wrong):
        raise DataError(f"{path}: {split} record {wrong[0]} has the label {labels[wrong[0]]}; 0…9 is expected")
    return header.tobytes(), scan, offsets, labels


def read_cifar10(root: Path, train: bool, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One split of CIFAR-10 under the data root, its first ``limit`` images: (uint8 (N, 32, 32, 3), int64 (N,)).

    Looks, in this order, for the unpacked official batches, the official archive, and the npz of JPEG copies.
    """
    folder = CIFAR10.folder(root)
    for place in (folder / BATCHES, folder):
        paths = [place / name for name in batch_names(train)]
        if any(path.exists() for path in paths):
            images, labels = _joined([read_cifar_binary(path) for path in paths])
            return images[:limit], labels[:limit]
    archive = folder / CIFAR10.files[0].name
    if archive.is_file():
        images, labels = read_cifar_archive(archive, train)
        return images[:limit], labels[:limit]
    if (folder / NPZ).is_file():
        return read_cifar_npz(folder / NPZ, train, limit)
    raise DataError(
        f"no CIFAR-10 in {folder}: neither {BATCHES}/{batch_names(train)[0]}, {archive.name} nor {NPZ}.\n"
        f"{how_to_get(CIFAR10, CIFAR10.files[0], root)}"
    )


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
