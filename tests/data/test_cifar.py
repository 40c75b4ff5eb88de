"""CIFAR-10 in both forms, CIFAR-100, and what can be wrong with any."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparing.core.errors import DataError, SparingError
from sparing.data.cifar import (
    CIFAR100_LABELS,
    RECORD,
    batch_names,
    read_cifar10,
    read_cifar100,
    read_cifar_archive,
    read_cifar_binary,
    read_cifar_npz,
)

RNG = np.random.RandomState(0)


def records(labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + RNG.randint(0, 256, RECORD - 1).astype(np.uint8).tobytes() for label in labels)


def test_channels_and_rows_stand_where_the_format_says(tmp_path: Path) -> None:
    content = bytearray(records([3, 9]))
    pixel = RECORD + 1 + 1024 + 5 * 32 + 7  # second record, green plane, row 5, column 7
    content[pixel] = 201
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(content)
    images, labels = read_cifar_binary(path)
    assert images.shape == (2, 32, 32, 3)
    assert labels.tolist() == [3, 9]
    assert images[1, 5, 7, 1] == 201


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes end inside record 0"),
        (records([1, 2])[:-1], "6145 bytes end inside record 1"),
        (records([1, 2, 10]), "record 2 has the label 10"),
    ],
)
def test_wrong_batches_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_cifar_binary(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("below", ["cifar-10-batches-bin", "."])
def test_official_batches_are_joined_in_order(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "cifar10" / below
    folder.mkdir(parents=True)
    for number, name in enumerate(batch_names(True)):
        (folder / name).write_bytes(records([number, number + 1]))
    (folder / "test_batch.bin").write_bytes(records([8]))
    assert read_cifar10(tmp_path, True)[1].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert read_cifar10(tmp_path, True, limit=3)[1].tolist() == [0, 1, 1]
    assert read_cifar10(tmp_path, False)[0].shape == (1, 32, 32, 3)
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_4\.bin: cannot be read: No such file"):
        read_cifar10(tmp_path, True)


def test_another_archive_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"not it")
    with pytest.raises(DataError, match="is not the published archive: 170052171 bytes"):
        read_cifar_archive(path, True)


def test_nothing_there_says_what_to_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*cifar10_jpeg\.npz(.|\n)*170052171 bytes"):
        read_cifar10(tmp_path, True)


def jpeg_arrays(count: int = 4) -> dict[str, np.ndarray]:
    """The npz's arrays, made of real JPEG files that share one header."""
    files = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(RNG.randint(0, 256, (32, 32, 3)).astype(np.uint8)).save(buffer, "JPEG", quality=75)
        files.append(buffer.getvalue())
    cut = files[0].index(b"\xff\xda")
    assert all(file[:cut] == files[0][:cut] for file in files)
    scans = [file[cut:] for file in files]
    arrays: dict[str, np.ndarray] = {"header": np.frombuffer(files[0][:cut], np.uint8)}
    for split in ("train", "test"):
        arrays[f"{split}_scan"] = np.frombuffer(b"".join(scans), np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, scans)])
        arrays[f"{split}_label"] = np.arange(count)
    return arrays


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_npz_round_trip(tmp_path: Path) -> None:
    arrays = jpeg_arrays()
    images, labels = read_cifar_npz(npz(tmp_path / "a.npz", **arrays), train=True, limit=3)
    assert images.shape == (3, 32, 32, 3)
    assert labels.tolist() == [0, 1, 2]
    content = arrays["header"].tobytes() + arrays["train_scan"][: arrays["train_offset"][1]].tobytes()
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_label": np.array([0, 1, 2, 10])}, "train record 3 has the label 10"),
        ({"train_label": np.array([0, 1, 2])}, "3 train labels and 5 offsets"),
        ({"train_label": np.array([0.0, 1, 2, 3])}, "'train_label' is float64"),
        ({"train_offset": np.array([0, 5, 4, 9, 12])}, "train record 1 lies at 5…4"),
        ({"train_offset": np.array([0, 100, 200, 300, 10**9])}, "train record 3 lies at 300…1000000000"),
        ({"train_scan": np.zeros(20000, np.uint8)}, "train record 0"),
        ({"header": np.zeros(10, np.int32)}, "'header' is int32"),
    ],
)
def test_wrong_npz_names_the_record(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = npz(tmp_path / "a.npz", **(jpeg_arrays() | changes))
    with pytest.raises(DataError, match=message) as caught:
        read_cifar_npz(path, train=True)
    assert str(path) in str(caught.value)


def test_missing_array_is_named(tmp_path: Path) -> None:
    arrays = jpeg_arrays()
    del arrays["test_offset"]
    with pytest.raises(DataError, match="no array 'test_offset'"):
        read_cifar_npz(npz(tmp_path / "a.npz", **arrays), train=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_random_damage_to_an_npz(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.npz"
    if not path.exists():
        npz(path, **jpeg_arrays(2))
        (tmp_path / "whole").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    del content[data.draw(st.integers(0, len(content))) :]
    damaged = tmp_path / "b.npz"
    damaged.write_bytes(bytes(content))
    try:
        images, _ = read_cifar_npz(damaged, train=True)
        assert images.shape[1:] == (32, 32, 3)
    except SparingError:
        pass


def test_the_real_npz(data_root: Path) -> None:
    images, labels = read_cifar10(data_root, train=True, limit=200)
    assert images.shape == (200, 32, 32, 3)
    assert np.bincount(labels).tolist() == [20] * 10


def records_100(labels: list[int]) -> bytes:
    """Records with a superclass, which says nothing, before each class."""
    return b"".join(bytes([7, label]) + RNG.randint(0, 256, 3072).astype(np.uint8).tobytes() for label in labels)


def test_the_second_label_of_cifar100_is_the_class(tmp_path: Path) -> None:
    assert len(set(CIFAR100_LABELS)) == 100
    assert list(CIFAR100_LABELS) == sorted(CIFAR100_LABELS)
    content = bytearray(records_100([3, 99]))
    content[RECORD + 1 + 2 + 2048 + 5 * 32 + 7] = 201  # second record, blue plane, row 5, column 7
    folder = tmp_path / "cifar100" / "cifar-100-binary"
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(content)
    images, labels = read_cifar100(tmp_path, True)
    assert labels.tolist() == [3, 99]
    assert images[1, 5, 7, 2] == 201
    assert len(read_cifar100(tmp_path, True, limit=1)[0]) == 1
    with pytest.raises(DataError, match=r"no CIFAR-100 in .*test\.bin(.|\n)*168513733 bytes"):
        read_cifar100(tmp_path, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (records_100([1])[:-1], r"3073 bytes end inside record 0; .* 3074 bytes \(two labels"),
        (records_100([1, 100]), r"record 1 has the label 100; 0…99 is expected"),
    ],
    ids=["cut off", "no class"],
)
def test_wrong_files_of_cifar100_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_cifar_binary(path, classes=100)


def test_another_archive_of_cifar100_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "cifar100" / "cifar-100-binary.tar.gz"
    path.parent.mkdir()
    path.write_bytes(b"not it")
    with pytest.raises(DataError, match="is not the published archive: 168513733 bytes"):
        read_cifar100(tmp_path, True)
