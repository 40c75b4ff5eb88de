"""IDX files: every type, both packings, and everything that can be wrong with one."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparing.core.errors import DataError
from sparing.data.idx import TYPES, read_fashion_mnist, read_idx, read_idx_pair


def idx(array: np.ndarray) -> bytes:
    code = next(code for code, name in TYPES.items() if np.dtype(name) == array.dtype.newbyteorder(">"))
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", TYPES.values())
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_type_comes_back(tmp_path: Path, name: str, suffix: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(np.dtype(name).newbyteorder("="))
    result = read_idx(write(tmp_path / f"a{suffix}", idx(array)))
    assert result.dtype == array.dtype
    assert result.dtype.isnative
    np.testing.assert_array_equal(result, array)


IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"begins with b''"),
        (b"\x00\x00\x08", "begins with"),
        (b"PK\x03\x04", "begins with"),
        (b"\x00\x00\x77\x01" + bytes(8), "type code 0x77"),
        (b"\x00\x00\x08\x00", "0 dimensions"),
        (b"\x00\x00\x08\x09" + bytes(99), "9 dimensions"),
        (b"\x00\x00\x08\x03" + bytes(5), "ends inside its header"),
        (b"\x00\x00\x08\x02" + struct.pack(">2I", 0, 3), "holds no value"),
        (idx(IMAGES)[:-1], "ends inside record 4 of 5: 59 of 60 bytes"),
        (idx(IMAGES)[:-25], "ends inside record 2 of 5"),
        (idx(IMAGES) + b"x", "goes on after its 5 records"),
        (b"\x00\x00\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(50), "are plausible"),
        (b"\x00\x00\x08\x01" + struct.pack(">I", 2**31) + bytes(50), "are plausible"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_nan_names_the_record(tmp_path: Path) -> None:
    array = np.ones((4, 2), np.float32)
    array[2, 1] = np.nan
    with pytest.raises(DataError, match="record 2 holds NaN"):
        read_idx(write(tmp_path / "a", idx(array)))


def test_missing_folder_and_broken_gzip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_idx(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder"):
        read_idx(tmp_path)
    whole = gzip.compress(idx(IMAGES))
    for broken in (whole[:-10], whole[:20], b"plain", whole[:12] + b"\xff\xff\xff" + whole[15:]):
        (tmp_path / "a.gz").write_bytes(broken)
        with pytest.raises(DataError):
            read_idx(tmp_path / "a.gz")


def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path: Path) -> None:
    size = 1 << 28
    path = tmp_path / "a.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"\x00\x00\x08\x01" + struct.pack(">I", size))
        for _ in range(64):
            file.write(bytes(1 << 22))
    # Real content, but packed 200 times and more: no image set compresses like that.
    tracemalloc.start()
    with pytest.raises(DataError, match="are plausible"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def pair(folder: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return read_idx_pair(write(folder / "images", idx(images)), write(folder / "labels", idx(labels)), 10)


def test_pairs_are_checked(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 3, 9], np.uint8)
    images, targets = pair(tmp_path, IMAGES, labels)
    assert images.shape == (5, 4, 3, 1)
    assert targets.dtype == np.int64
    with pytest.raises(DataError, match=r"5 images.*4 labels.*one split"):
        pair(tmp_path, IMAGES, labels[:4])
    with pytest.raises(DataError, match="record 4 has the label 10; 0…9"):
        pair(tmp_path, IMAGES, labels + np.uint8(1))
    with pytest.raises(DataError, match=r"images: float32 of shape"):
        pair(tmp_path, IMAGES.astype(np.float32), labels)
    with pytest.raises(DataError, match=r"labels: uint8 of shape \(5, 4, 3\)"):
        pair(tmp_path, IMAGES, IMAGES)


def array_or_named(path: Path) -> None:
    """Nothing but an array, or an error that names the file, may come out."""
    message = str(path)
    try:
        assert read_idx(path).size > 0
    except DataError as error:
        message = str(error)
    assert str(path) in message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), packed=st.booleans())
def test_random_damage_gives_the_array_or_a_data_error(tmp_path: Path, data: st.DataObject, packed: bool) -> None:
    content = bytearray(gzip.compress(idx(IMAGES)) if packed else idx(IMAGES))
    del content[data.draw(st.integers(0, len(content))) :]
    for place in data.draw(st.lists(st.integers(0, 120), max_size=4)):
        if place < len(content):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(bytes(content))
    array_or_named(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), packed=st.booleans())
def test_random_bytes_give_a_data_error_or_an_array(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = write(tmp_path / ("a.gz" if packed else "a"), content)
    array_or_named(path)


def test_the_real_files(data_root: Path) -> None:
    images, labels = read_fashion_mnist(data_root, train=False)
    assert images.shape == (10_000, 28, 28, 1)
    assert np.bincount(labels).tolist() == [1000] * 10


def test_a_missing_file_says_what_to_place_where(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_fashion_mnist(tmp_path, train=True)
    message = str(caught.value)
    for word in (
        str(tmp_path / "fashion_mnist/train-images-idx3-ubyte.gz"),
        "https://",
        "26421880",
        "3aede38d61863908",
    ):
        assert word in message
