"""IDX files, the format of MNIST and Fashion-MNIST, gzipped or plain.

Layout (LeCun): two zero bytes, a type code, the number of dimensions, one big-endian uint32 for each dimension, then
the values in row-major order, big-endian.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np

from sparing.core.errors import DataError
from sparing.data.root import RemoteFile, Source, locate

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMENSIONS = 8
MAX_BYTES = 4 << 30
"""Largest content that is read."""
MAX_RATIO = 200
SMALL = 16 << 20
"""Content above SMALL bytes may not be more than MAX_RATIO times the size of its gzip file."""
_CHUNK = 4 << 20

_BASE = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
_FILES = (
    ("train-images-idx3-ubyte.gz", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26421880),
    ("train-labels-idx1-ubyte.gz", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29515),
    ("t10k-images-idx3-ubyte.gz", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4422102),
    ("t10k-labels-idx1-ubyte.gz", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5148),
)
FASHION_MNIST = Source(
    "fashion_mnist",
    "60,000 + 10,000 grey images of clothes, 28×28, 10 classes",
    "MIT",
    "https://github.com/zalandoresearch/fashion-mnist",
    tuple(RemoteFile(name, _BASE + name, digest, size) for name, digest, size in _FILES),
)
FASHION_MNIST_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, in native byte order; a name that ends in ``.gz`` is unpacked on the way.

    Memory grows with what the file really holds, never with what its header claims. Raises :class:`DataError` naming
    the file, and the record where content is missing or not finite.
    """
    path = Path(path)
    try:
        packed = path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(file, path, packed)
    except (OSError, EOFError, zlib.error) as error:
        reason = "is a folder" if path.is_dir() else f"cannot be read: {error}"
        raise DataError(
            f"{path} {reason}; an IDX file{' in gzip' if path.suffix == '.gz' else ''} is expected"
        ) from error


def _read(file: io.BufferedIOBase, path: Path, packed: int) -> np.ndarray:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0":
        raise DataError(f"{path}: begins with {start!r}; an IDX file begins with two zero bytes, a type and a rank")
    code, rank = start[2], start[3]
    if code not in TYPES:
        known = ", ".join(f"0x{known:02x}" for known in TYPES)
        raise DataError(f"{path}: type code 0x{code:02x}; one of {known} is expected")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise DataError(f"{path}: {rank} dimensions; 1 to {MAX_DIMENSIONS} are expected")
    dimensions = file.read(4 * rank)
    if len(dimensions) < 4 * rank:
        raise DataError(f"{path}: ends inside its header; {rank} dimensions are announced")
    shape = tuple(int(size) for size in np.frombuffer(dimensions, ">u4"))
    if 0 in shape:
        raise DataError(f"{path}: shape {shape} holds no value; at least one record is expected")
    dtype = np.dtype(TYPES[code])
    size = math.prod(shape) * dtype.itemsize
    allowed = min(MAX_BYTES, max(SMALL, MAX_RATIO * packed))
    if size > allowed:
        raise DataError(
            f"{path}: announces shape {shape}, {size} bytes, in a file of {packed} bytes; at most {allowed} are "
            "plausible"
        )
    content = bytearray()
    while len(content) <= size and (chunk := file.read(min(_CHUNK, size + 1 - len(content)))):
        content += chunk
    record = size // shape[0]
    if len(content) < size:
        raise DataError(
            f"{path}: ends inside record {len(content) // record} of {shape[0]}: {len(content)} of {size} bytes "
            "are there"
        )
    if len(content) > size:
        raise DataError(f"{path}: goes on after its {shape[0]} records; exactly {size} bytes of content are expected")
    array = np.frombuffer(content, dtype).reshape(shape)
    array = array.astype(dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(array).reshape(shape[0], -1).all(axis=1))
        if len(wrong):
            raise DataError(f"{path}: record {wrong[0]} holds NaN or infinity; finite values are expected")
    return array


def read_idx_pair(images: Path, labels: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split: (uint8 (N, H, W, 1), int64 (N,) in 0…classes − 1)."""
    pixels, targets = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise DataError(f"{images}: {pixels.dtype} of shape {pixels.shape}; uint8 (images, height, width) is expected")
    if targets.ndim != 1 or targets.dtype != np.uint8:
        raise DataError(f"{labels}: {targets.dtype} of shape {targets.shape}; uint8 (labels,) is expected")
    if len(pixels) != len(targets):
        raise DataError(
            f"{images} holds {len(pixels)} images, {labels} holds {len(targets)} labels; one label for each image is "
            "expected: do both belong to one split?"
        )
    wrong = np.flatnonzero(targets >= classes)
    if len(wrong):
        raise DataError(f"{labels}: record {wrong[0]} has the label {targets[wrong[0]]}; 0…{classes - 1} is expected")
    return pixels[..., None], targets.astype(np.int64)


def read_fashion_mnist(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """One split of Fashion-MNIST under the data root: (uint8 (N, 28, 28, 1), int64 (N,)).

    Files may be gzipped, as published, or unpacked.
    """
    images, labels = FASHION_MNIST.files[:2] if train else FASHION_MNIST.files[2:]
    paths = [locate(FASHION_MNIST, file, root, (file.name.removesuffix(".gz"),)) for file in (images, labels)]
    pixels, targets = read_idx_pair(paths[0], paths[1], len(FASHION_MNIST_LABELS))
    if pixels.shape[1:] != (28, 28, 1):
        raise DataError(f"{paths[0]}: images of {pixels.shape[1]}×{pixels.shape[2]} pixels; 28×28 is expected")
    return pixels, targets
