"""CIFAR-10 and CIFAR-100: the official binary batches, and of CIFAR-10 also the compact npz of JPEG copies.

Binary layout (Krizhevsky 2009): records of one label byte (CIFAR-100: one of the superclass, which is not looked at,
then one of the class), then 1,024 red, 1,024 green and 1,024 blue bytes, row by row. The npz holds one shared JPEG
header, and for each split the concatenated scan data with offsets and labels.
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
CIFAR100 = Source(
    "cifar100",
    "50,000 + 10,000 colour images, 32×32, 100 classes",
    "none stated; to be cited as Krizhevsky 2009",
    "https://www.cs.toronto.edu/~kriz/cifar.html",
    (
        RemoteFile(
            "cifar-100-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            168513733,
        ),
    ),
)
_CLASSES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR100_LABELS = tuple(_CLASSES_100.split())
NPZ = "cifar10_jpeg.npz"
BATCHES = "cifar-10-batches-bin"
BATCHES_100 = "cifar-100-binary"
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS
MAX_RECORDS = 1 << 17
"""Most records that one binary file may hold (the official ones hold 10,000)."""


def batch_names(train: bool) -> list[str]:
    """The official files of one split."""
    return [f"data_batch_{number}.bin" for number in range(1, 6)] if train else ["test_batch.bin"]


def batch_names_100(train: bool) -> list[str]:
    """The official file of one split of CIFAR-100."""
    return ["train.bin" if train else "test.bin"]


def read_cifar_binary(path: Path, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """One binary batch: (uint8 (N, 32, 32, 3), int64 (N,)). :class:`DataError` names the file and the record.

    ``classes`` is 10, or 100 for records with two label bytes, of which the second is the class.
    """
    path, record = Path(path), PIXELS + _label_bytes(classes)
    try:
        size = path.stat().st_size
        if size > MAX_RECORDS * record:
            raise DataError(f"{path}: {size} bytes; at most {MAX_RECORDS} records of {record} bytes are expected")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; a CIFAR-{classes} batch is expected"
        ) from error
    return _records(content, str(path), classes)


def _label_bytes(classes: int) -> int:
    return 2 if classes == len(CIFAR100_LABELS) else 1


def _records(content: bytes, where: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    before = _label_bytes(classes)
    record = PIXELS + before
    if not content or len(content) % record:
        labelled = "one label" if before == 1 else "two labels"
        raise DataError(
            f"{where}: {len(content)} bytes end inside record {len(content) // record}; a whole number of records of "
            f"{record} bytes ({labelled}, 3×32×32 pixels) is expected"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, before - 1]
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise DataError(f"{where}: record {wrong[0]} has the label {labels[wrong[0]]}; 0…{classes - 1} is expected")
    images = np.ascontiguousarray(records[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int64)


def read_cifar_archive(path: Path, train: bool, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """One split out of the official archive of CIFAR-10 or CIFAR-100, whose digest is checked before it is opened."""
    source, below, names = _official(train, classes)
    file = source.files[0]
    if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
        raise DataError(
            f"{path} is not the published archive: {file.bytes} bytes with SHA-256 {file.sha256} are expected"
        )
    wanted = {f"{below}/{name}": None for name in names}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                content = archive.extractfile(member) if name in wanted else None
                if content is not None:
                    found[name] = _records(content.read(), f"{path}/{name}", classes)
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
    found = _unpacked_or_archived(root, train, 10)
    if found is not None:
        return found[0][:limit], found[1][:limit]
    folder = CIFAR10.folder(root)
    if (folder / NPZ).is_file():
        return read_cifar_npz(folder / NPZ, train, limit)
    raise DataError(
        f"no CIFAR-10 in {folder}: neither {BATCHES}/{batch_names(train)[0]}, {CIFAR10.files[0].name} nor {NPZ}.\n"
        f"{how_to_get(CIFAR10, CIFAR10.files[0], root)}"
    )


def read_cifar100(root: Path, train: bool, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One split of CIFAR-100 under the data root, its first ``limit`` images: (uint8 (N, 32, 32, 3), int64 (N,)).

    Looks for the unpacked official files, then for the official archive.
    """
    found = _unpacked_or_archived(root, train, 100)
    if found is None:
        raise DataError(
            f"no CIFAR-100 in {CIFAR100.folder(root)}: neither {BATCHES_100}/{batch_names_100(train)[0]} nor "
            f"{CIFAR100.files[0].name}.\n{how_to_get(CIFAR100, CIFAR100.files[0], root)}"
        )
    return found[0][:limit], found[1][:limit]


def _official(train: bool, classes: int) -> tuple[Source, str, list[str]]:
    """(source, folder inside the archive, names of the files of one split)."""
    if classes == len(CIFAR100_LABELS):
        return CIFAR100, BATCHES_100, batch_names_100(train)
    return CIFAR10, BATCHES, batch_names(train)


def _unpacked_or_archived(root: Path, train: bool, classes: int) -> tuple[np.ndarray, np.ndarray] | None:
    source, below, names = _official(train, classes)
    folder = source.folder(root)
    for place in (folder / below, folder):
        paths = [place / name for name in names]
        if any(path.exists() for path in paths):
            return _joined([read_cifar_binary(path, classes) for path in paths])
    archive = folder / source.files[0].name
    return read_cifar_archive(archive, train, classes) if archive.is_file() else None


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
