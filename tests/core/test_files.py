"""The atomic writer and the readers: faults anywhere, damage of every kind, and what was written comes back."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.torch import save as safetensors_bytes

from bounds import SECONDS, refuses, watched, within_bounds
from faults import fail_at, in_child, names
from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue, SparingError, StoreError

STAGES = ("write", "fsync", "rename")


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares hypothesis hundreds of waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


many = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# ------------------------------------------------------------------------------------------------- the atomic writer


def write_file(target: Path, text: str) -> None:
    files.write_atomic(target, text.encode())


def write_folder(target: Path, text: str) -> None:
    with files.folder_atomic(target) as scratch:
        (scratch / "inner").mkdir()
        files.write_atomic(scratch / "inner" / "a", text.encode())
        (scratch / "b").write_text(text)


def content(target: Path) -> str | None:
    if target.is_dir():
        inner, outer = (target / "inner" / "a").read_text(), (target / "b").read_text()
        assert inner == outer
        return outer
    return target.read_text() if target.exists() else None


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])
OLD = pytest.mark.parametrize("old", [None, "old"])


def hooks_called(write: Callable[[Path, str], None], target: Path) -> int:
    calls: list[str] = []
    files.fault_hook = lambda stage, _: calls.append(stage)
    write(target, "counted")
    files.fault_hook = None
    return len(calls)


@WRITERS
def test_the_hook_is_called_before_each_stage_of_each_file(tmp_path, write):
    calls: list[tuple[str, str]] = []
    files.fault_hook = lambda stage, target: calls.append((stage, target.name))
    write(tmp_path / "target", "new")
    inner = [(stage, "a") for stage in STAGES] if write is write_folder else []
    assert calls == [("write", "target"), *inner, ("fsync", "target"), ("rename", "target")]


@WRITERS
def test_missing_folders_on_the_way_are_made(tmp_path, write):
    write(tmp_path / "several" / "folders" / "deep" / "target", "new")
    assert content(tmp_path / "several" / "folders" / "deep" / "target") == "new"


@WRITERS
@OLD
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_moment_leaves_the_old_content_and_nothing_aside(tmp_path, write, old, number):
    counted = hooks_called(write, tmp_path / "count" / "target")
    target = tmp_path / "here" / "target"
    target.parent.mkdir()
    if old:
        write(target, old)
    before = names(target.parent)
    for position in range(1, counted + 1):
        files.fault_hook = fail_at(position, number)
        with pytest.raises(StoreError) as caught:
            write(target, "new")
        files.fault_hook = None
        assert str(target.parent) in str(caught.value)
        assert os.strerror(number) in str(caught.value)
        assert content(target) == old
        assert names(target.parent) == before
    files.fault_hook = fail_at(counted + 1)
    write(target, "new")
    assert content(target) == "new"


@WRITERS
@OLD
@pytest.mark.parametrize("die", [lambda: os._exit(7), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_death_at_any_moment_leaves_old_or_new_content_whole(tmp_path, write, old, die):
    for position in range(1, hooks_called(write, tmp_path / "count" / "target") + 1):
        target = tmp_path / str(position) / "target"
        if old:
            write(target, old)

        def act(position: int = position, target: Path = target) -> None:
            calls = [0]

            def hook(stage: str, path: Path) -> None:
                calls[0] += 1
                if calls[0] == position:
                    die()

            files.fault_hook = hook
            write(target, "new")

        assert in_child(act) in {7, -signal.SIGKILL}
        assert content(target) == old
        write(target, "newer")
        assert content(target) == "newer"


def test_replacing_a_folder_has_no_moment_without_one(tmp_path):
    write_folder(tmp_path / "target", "old")
    stop = time.monotonic() + 0.3
    if (child := os.fork()) == 0:
        while time.monotonic() < stop:
            write_folder(tmp_path / "target", "new")
        os._exit(0)
    try:
        seen = {(tmp_path / "target").is_dir() for _ in iter(lambda: time.monotonic() < stop, False)}
    finally:
        os.waitpid(child, 0)
    assert seen == {True}


def test_without_an_exchange_a_folder_is_replaced_in_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    write_folder(tmp_path / "target", "old")
    write_folder(tmp_path / "target", "new")
    assert content(tmp_path / "target") == "new"
    assert names(tmp_path) == ["target", "target/b", "target/inner", "target/inner/a"]


def test_without_an_exchange_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "target", "old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename, seen = os.replace, []

    def failing(source: Path, goal: Path) -> None:
        seen.append((source, goal))
        if len(seen) == 4:  # two files inside, the old folder aside, the new one in place
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, goal)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, goal: failing(source, goal))
        seen.append((tmp_path, tmp_path))
        with pytest.raises(StoreError, match="Input/output error"):
            write_folder(tmp_path / "target", "new")
    assert content(tmp_path / "target") == "old"
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_what_the_system_says_about_an_exchange(tmp_path, monkeypatch, number):
    import ctypes

    class Library:
        def renameat2(self, *arguments: Any) -> int:
            ctypes.set_errno(number)
            return -1

    write_folder(tmp_path / "target", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
    if number == errno.EIO:
        with pytest.raises(StoreError, match="Input/output error"):
            write_folder(tmp_path / "target", "new")
        assert content(tmp_path / "target") == "old"
    else:
        write_folder(tmp_path / "target", "new")
        assert content(tmp_path / "target") == "new"
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    write_folder(tmp_path / "target", "newest")
    assert content(tmp_path / "target") == "newest"


@pytest.mark.parametrize("build", [lambda t: t.write_text("file"), lambda t: t.symlink_to("nowhere")])
def test_a_folder_takes_the_place_of_a_file_or_a_broken_link(tmp_path, build):
    build(tmp_path / "target")
    write_folder(tmp_path / "target", "new")
    assert content(tmp_path / "target") == "new"
    assert names(tmp_path) == ["target", "target/b", "target/inner", "target/inner/a"]


def test_an_error_of_the_block_itself_passes_and_leaves_the_old_folder(tmp_path):
    def half(scratch: Path) -> None:
        (scratch / "b").write_text("half")
        raise ZeroDivisionError

    write_folder(tmp_path / "target", "old")
    with pytest.raises(ZeroDivisionError), files.folder_atomic(tmp_path / "target") as scratch:
        half(scratch)
    assert content(tmp_path / "target") == "old"
    assert len(names(tmp_path)) == 4


def test_the_disk_is_full_in_the_middle_of_a_write(tmp_path):
    """A limit on the size of files makes the system itself refuse half of the content."""
    (tmp_path / "target").write_text("old")

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(StoreError, match="target"):
            files.write_atomic(tmp_path / "target", bytes(5000))

    assert in_child(act) == 0
    assert (tmp_path / "target").read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_a_writer_killed_in_the_middle_of_a_write_is_harmless_and_cleared_away_later(tmp_path):
    target = tmp_path / "target"
    (tmp_path / ".target.0a1b2c3d.tmp").write_text("ha")
    (tmp_path / ".target.00000000.tmp").mkdir()
    (tmp_path / ".target.00000000.tmp" / "part").write_text("ha")
    (tmp_path / ".target.11111111.tmp").symlink_to("nowhere")
    other = [".other.0a1b2c3d.tmp", ".target", "target.0a1b2c3d.tmp", ".target.2.part"]
    for name in other:
        (tmp_path / name).write_text("not ours")
    files.write_atomic(target, b"new")
    assert len(names(tmp_path)) == 9, "a writer may still be at work on what is young"
    hour_ago = time.time() - files.STALE_AFTER_S - 1
    for path in tmp_path.iterdir():
        os.utime(path, (hour_ago, hour_ago), follow_symlinks=False)
    files.write_atomic(target, b"newer")
    assert names(tmp_path) == sorted([*other, "target"])
    assert target.read_text() == "newer"


def test_clearing_away_tolerates_a_rival_that_was_faster(tmp_path, monkeypatch):
    leftover = tmp_path / ".target.0a1b2c3d.tmp"
    leftover.touch()
    lstat = Path.lstat

    def gone(self: Path) -> os.stat_result:
        self.unlink(missing_ok=True)
        return lstat(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", gone)
        files.write_atomic(tmp_path / "target", b"new")
    assert names(tmp_path) == ["target"]


@WRITERS
def test_a_parent_that_is_a_file(tmp_path, write):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "target", tmp_path / "file" / "deeper" / "target"):
        with pytest.raises(StoreError, match=r"cannot write .*target"):
            write(target, "new")


@WRITERS
def test_a_folder_that_cannot_be_written_to(tmp_path, write, read_only):
    write(tmp_path / "folder" / "target", "old")
    before = names(tmp_path)
    with read_only(tmp_path / "folder"), pytest.raises(StoreError, match=r"cannot write .*target"):
        write(tmp_path / "folder" / "target", "new")
    assert content(tmp_path / "folder" / "target") == "old"
    assert names(tmp_path) == before


def test_files_and_folders_have_the_permissions_of_any_other(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    write_file(tmp_path / "written", "")
    write_folder(tmp_path / "made", "")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "file").stat().st_mode
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_file_written_in_pieces_is_put_in_place(tmp_path):
    (tmp_path / "part").write_text("whole")
    for stage in ("fsync", "rename"):
        files.fault_hook = fail_at(1 if stage == "fsync" else 2, errno.EIO)
        with pytest.raises(StoreError, match="target"):
            files.put_in_place(tmp_path / "part", tmp_path / "target")
        files.fault_hook = None
    assert names(tmp_path) == ["part"]
    files.put_in_place(tmp_path / "part", tmp_path / "target")
    assert names(tmp_path) == ["target"]


# ------------------------------------------------------------------------------------- formats: what is written is read

text = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)
plain_dtypes = arrays_of.scalar_dtypes() | arrays_of.unicode_string_dtypes() | arrays_of.byte_string_dtypes()
some_arrays = st.dictionaries(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    arrays_of.arrays(plain_dtypes, arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
    max_size=4,
)
TENSOR_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@st.composite
def some_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    made = {}
    for name in draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(TENSOR_DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        values = torch.empty(shape, dtype=dtype)
        count = values.numel() * values.element_size()
        raw = draw(st.binary(min_size=count, max_size=count))
        if count:
            raw = bytes(byte & 1 for byte in raw) if dtype == torch.bool else raw
            values = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
        made[name] = values.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else values
    return made


@many
@given(value=json_values)
@pytest.mark.usefixtures("no_fsync")
def test_json_round_trip(tmp_path, value):
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    assert json.loads(files.canonical_json(value)) == value


@many
@given(arrays=some_arrays)
@pytest.mark.usefixtures("no_fsync")
def test_npz_round_trip(tmp_path, arrays):
    files.write_arrays(tmp_path / "x.npz", arrays)
    found = files.read_arrays(tmp_path / "x.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)


@many
@given(tensors=some_tensors())
@pytest.mark.usefixtures("no_fsync")
def test_safetensors_round_trip(tmp_path, tensors):
    files.write_tensors(tmp_path / "x.safetensors", tensors, {"note": "ü"})
    found = files.read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor) if t.numel()]
        assert not as_bytes or torch.equal(*as_bytes)


def test_no_tensors_at_all_can_be_read_again(tmp_path):
    for number, metadata in enumerate((None, {}, {"note": "nothing"})):
        files.write_tensors(tmp_path / f"{number}.safetensors", {}, metadata)
        assert files.read_tensors(tmp_path / f"{number}.safetensors") == {}


def test_equal_arrays_give_equal_bytes_and_any_name_will_do(tmp_path):
    arrays = {name: np.arange(3) for name in ("file", "allow_pickle", "x.npy", "a/b", "../x", "", "arr_0")}
    files.write_arrays(tmp_path / "one", arrays)
    time.sleep(0.01)
    files.write_arrays(tmp_path / "two", arrays)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert files.read_arrays(tmp_path / "one").keys() == arrays.keys()


def test_arrays_that_numpy_wrote_are_read_packed_or_not(tmp_path):
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "x.npz", a=np.arange(1000), b=np.asfortranarray(np.ones((3, 4))))
        found = files.read_arrays(tmp_path / "x.npz")
        np.testing.assert_array_equal(found["a"], np.arange(1000))
        np.testing.assert_array_equal(found["b"], np.ones((3, 4)))


def test_tensors_read_do_not_change_with_the_file(tmp_path):
    files.write_tensors(tmp_path / "x", {"a": torch.zeros(4)})
    tensor = files.read_tensors(tmp_path / "x")["a"]
    with (tmp_path / "x").open("r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(b"\1" * 16)
    assert torch.equal(tensor, torch.zeros(4))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "nan"),
        ([float("inf")], "inf"),
        ({"a": object()}, "object"),
        ({1: 0, "1": 1}, "'1' appears twice"),
        ("\ud800", "surrogates"),
        ("x" * (files.MAX_JSON_BYTES + 1), "npz"),
        ([0] * (files.MAX_JSON_ITEMS + 1), "more than 1000000 values"),
    ],
)
def test_json_that_could_not_be_read_back_is_not_written(tmp_path, value, message):
    with pytest.raises(InvalidValue, match=message) as caught:
        files.write_json(tmp_path / "x.json", value)
    assert str(tmp_path / "x.json") in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"bad": np.array([{}])}, "'bad' is a ndarray of object"),
        ({"bad": np.zeros(2, dtype=[("x", "f4")])}, "'bad' is a ndarray of .*'x'"),
        ({"bad": np.ma.masked_array([1, 2], [0, 1])}, "'bad' is a MaskedArray"),
        ({"a\0b": np.zeros(1)}, r"'a\\x00b' is no name"),
        ({"\ud800": np.zeros(1)}, "is no name"),
    ],
)
def test_arrays_that_could_not_be_read_back_are_not_written(tmp_path, arrays, message):
    with pytest.raises(InvalidValue, match=message) as caught:
        files.write_arrays(tmp_path / "x.npz", arrays)
    assert str(tmp_path / "x.npz") in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bad": torch.eye(2).to_sparse()}, "'bad' is torch.float32, torch.sparse_coo"),
        ({"bad": torch.zeros(2, dtype=torch.complex128)}, "'bad' is torch.complex128"),
        ({"good": torch.zeros(1), "bad": torch.zeros(2, device="meta")}, "'bad' is .*on meta"),
        ({"__metadata__": torch.zeros(1)}, "'__metadata__' is no name"),
        ({"\ud800": torch.zeros(1)}, "surrogates"),
    ],
)
def test_tensors_that_could_not_be_read_back_are_not_written(tmp_path, tensors, message):
    with pytest.raises(InvalidValue, match=message) as caught:
        files.write_tensors(tmp_path / "x.safetensors", tensors)
    assert str(tmp_path / "x.safetensors") in str(caught.value)
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------- formats: the corruptions


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def npy_header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1") + data


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def directory_of(count: int) -> bytes:
    """An archive whose table of contents lists one member so many times."""
    one = zipped(("a.npy", npy(np.zeros(1))))
    end = one.index(b"PK\5\6")
    start = one.index(b"PK\1\2")
    size = (end - start) * count
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count % 65536, count % 65536, size, start, 0)
    return one[:start] + one[start:end] * count + last


def bomb(unpacked: int) -> bytes:
    """An npz of one member that unpacks to so many zeros, a thousandth of which are read from the file."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    header = npy_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({unpacked},)}}\n")
    check = zlib.crc32(header)
    parts = [packer.compress(header)]
    block = bytes(1 << 20)
    for _ in range(unpacked >> 20):
        parts.append(packer.compress(block))
        check = zlib.crc32(block, check)
    data = b"".join([*parts, packer.flush()])
    sizes = (check, len(data), unpacked + len(header))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, *sizes, 5, 0) + b"a.npy" + data
    central = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 33, *sizes, 5, 0, 0, 0, 0, 0, 0) + b"a.npy"
    return local + central + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)


def safe(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: str = "F32", shape: list[int] | None = None, start: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [start, end]}


GOOD_JSON = json.dumps({"a": [1, 2.5, "ü", None], "b": {"c": True}}, ensure_ascii=False, indent=1).encode()
GOOD_TENSORS = safetensors_bytes({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.int8)})
GOOD_ARRAYS = zipped(("a.npy", npy(np.arange(6.0).reshape(2, 3))), ("b.npy", npy(np.array("text"))))

READERS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "json": (files.read_json, GOOD_JSON),
    "safetensors": (files.read_tensors, GOOD_TENSORS),
    "npz": (files.read_arrays, GOOD_ARRAYS),
}


def listed_with(offset: int, value: int) -> bytes:
    """The good archive with one byte of its first entry in the table of contents changed."""
    position = GOOD_ARRAYS.index(b"PK\1\2") + offset
    return GOOD_ARRAYS[:position] + bytes([value]) + GOOD_ARRAYS[position + 1 :]


DAMAGED: dict[str, dict[str, bytes]] = {
    "json": {
        "empty": b"",
        "NaN": b'{"a": NaN}',
        "infinity": b'{"a": -Infinity}',
        "a number that overflows to infinity": b'{"a": 1e999}',
        "duplicate keys": b'{"a": 1, "a": 1}',
        "duplicate keys inside": b'[{"x": {"a": 1, "b": 2, "a": 3}}]',
        "deep nesting": b"[" * 100_000 + b"]" * 100_000,
        "deep nesting of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a forest of empty lists": b"[" + b"[]," * 5_000_000 + b"[]]",
        "a forest of small objects": b"[" + b'{"a":1},' * 1_900_000 + b"{}]",
        "too large": b'"' + b"x" * (files.MAX_JSON_BYTES + 1) + b'"',
        "a number of many digits": b"1" * 1_000_000,
        "trailing bytes": GOOD_JSON + b"x",
        "a second document": GOOD_JSON + GOOD_JSON,
        "not UTF-8": b'"\xff"',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf{}",
        "control characters": b'"\x00"',
        "single quotes": b"{'a': 1}",
        "a comment": b"{} // done",
        "another format": GOOD_TENSORS,
    },
    "safetensors": {
        "empty": b"",
        "shorter than its length field": b"\0\0\0",
        "header of no bytes": safe(b""),
        "huge header": safe({}, length=2**63),
        "header longer than the file": safe({"a": one()}, bytes(8), length=10_000),
        "a long header": safe(b" " * (files.MAX_HEADER_BYTES + 1) + b"{}"),
        "overlap": safe({"a": one(), "b": one()}, bytes(8)),
        "partial overlap": safe({"a": one(), "b": one(start=4, end=12)}, bytes(12)),
        "hole": safe({"a": one(), "b": one(start=12, end=20)}, bytes(20)),
        "trailing bytes": safe({"a": one()}, bytes(9)),
        "wrong dtype": safe({"a": one("F64")}, bytes(8)),
        "unknown dtype": safe({"a": one("object")}, bytes(8)),
        "dtype of 6 bits": safe({"a": one("F6_E2M3", end=2)}, bytes(2)),
        "wrong shape": safe({"a": one(shape=[3])}, bytes(8)),
        "negative shape": safe({"a": one(shape=[-2])}, bytes(8)),
        "overflowing shape": safe({"a": one(shape=[2**40, 2**40])}, bytes(8)),
        "shape beyond an index": safe({"a": one(shape=[2**63, 0], end=0)}),
        "negative offsets": safe({"a": one(start=-8, end=0)}, bytes(8)),
        "reversed offsets": safe({"a": one(start=8, end=0)}, bytes(8)),
        "offsets beyond the end": safe({"a": one(start=2**62, end=2**62 + 8)}, bytes(8)),
        "duplicate keys": safe(b'{"a":%b,"a":%b}' % ((json.dumps(one()).encode(),) * 2), bytes(8)),
        "NaN": safe(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
        "deep nesting": safe(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "metadata that is no text": safe({"__metadata__": {"a": 1}}),
        "a missing field": safe({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        "an unknown version of the header": safe([1, 2]),
        "another format": GOOD_ARRAYS,
    },
    "npz": {
        "empty": b"",
        "another format": GOOD_JSON,
        "objects": zipped(("a.npy", npy(np.array([{}, None])))),
        "zip bomb": bomb(1 << 30),
        "many members that unpack to much": zipped(
            *((f"{i}.npy", npy(np.zeros(15 << 20, np.uint8))) for i in range(20)), method=zipfile.ZIP_DEFLATED
        ),
        "duplicate members": directory_of(2),
        "huge header": directory_of(1_000_000),
        "huge header in the member": zipped(("a.npy", npy_header("{" + " " * 60_000 + "}"))),
        "trailing bytes": GOOD_ARRAYS + b"x",
        "another archive behind it": GOOD_ARRAYS + GOOD_ARRAYS,
        "bytes before it": b"x" * 100 + GOOD_ARRAYS,
        "trailing bytes in a member": zipped(("a.npy", npy(np.zeros(3)) + b"x")),
        "a member cut off": zipped(("a.npy", npy(np.zeros(3))[:-1])),
        "a shape that does not fit": zipped(
            ("a.npy", npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (10**12,)}\n", bytes(8))),
        ),
        "a huge shape": zipped(
            ("a.npy", npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n", bytes(8))),
        ),
        "a negative shape": zipped(
            ("a.npy", npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}\n", bytes(8))),
        ),
        "wrong dtype": zipped(
            ("a.npy", npy_header("{'descr': '<q9', 'fortran_order': False, 'shape': (1,)}\n", bytes(8)))
        ),
        "objects without data": zipped(
            ("a.npy", npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (0,)}\n")),
        ),
        "a header that is code": zipped(("a.npy", npy_header("__import__('os').abort()\n"))),
        "a header of deep nesting": zipped(("a.npy", npy_header("(" * 9000 + ")" * 9000))),
        "a foreign version": zipped(("a.npy", b"\x93NUMPY\x09\x00" + npy(np.zeros(1))[8:])),
        "a version for field names in UTF-8": zipped(("a.npy", npy(np.zeros(1), version=(3, 0)))),
        "a member that is no array": zipped(("a.txt", b"hello")),
        "a pickle as the member": zipped(("a.npy", b"\x80\x04cos\nsystem\n.")),
        "an encrypted member": listed_with(8, 1),
        "an unknown packing": listed_with(10, 97),
        "a forged position": GOOD_ARRAYS[:-6] + struct.pack("<L", 2**32 - 2) + GOOD_ARRAYS[-2:],
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, named in DAMAGED.items() for name in named])
def test_named_corruptions_are_refused_in_time_and_memory(tmp_path, kind, name):
    (tmp_path / "damaged").write_bytes(DAMAGED[kind][name])
    raised = refuses(lambda: READERS[kind][0](tmp_path / "damaged"))
    assert raised.startswith("CorruptFile")
    assert str(tmp_path / "damaged") in raised
    assert len(raised) < 1000
    with pytest.raises(CorruptFile):  # once more where coverage sees it
        READERS[kind][0](tmp_path / "damaged")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("place", ["missing", "folder", "loop", "dangling", "pipe", "x" * 300, "nul\0", "file/below"])
def test_what_is_no_file_is_refused(tmp_path, kind, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((CorruptFile, StoreError)) as caught:
        READERS[kind][0](tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)
    with pytest.raises((CorruptFile, StoreError)):
        files.sha256_of(tmp_path / place)


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_cannot_be_read(tmp_path, kind, monkeypatch):
    (tmp_path / "x").write_bytes(READERS[kind][1])

    def failing(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", failing)
    monkeypatch.setattr(files._ShortReads, "read", failing)
    with pytest.raises(StoreError, match=r"cannot read .*Input/output error"):
        READERS[kind][0](tmp_path / "x")


@pytest.mark.parametrize("kind", READERS)
def test_cut_off_anywhere_it_is_refused(tmp_path, kind):
    read, good = READERS[kind]
    read(written(tmp_path, good))
    for end in np.unique(np.linspace(0, len(good) - 1, 64).astype(int)):
        with pytest.raises(CorruptFile):
            read(written(tmp_path, good[:end]))


@pytest.mark.parametrize("kind", READERS)
@many
@given(data=st.data())
def test_flipped_bits_are_refused_or_make_another_value(tmp_path, kind, data):
    read, good = READERS[kind]
    flipped = bytearray(good)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=4)):
        flipped[bit // 8] ^= 1 << bit % 8
    start = time.process_time()
    with suppress(SparingError):
        read(written(tmp_path, bytes(flipped)))
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("kind", READERS)
@many
@given(noise=st.binary(max_size=300), head=st.integers(0, 200))
def test_noise_is_refused_or_read(tmp_path, kind, noise, head):
    read, good = READERS[kind]
    with suppress(SparingError):
        read(written(tmp_path, good[:head] + noise))


def test_npz_data_with_a_flipped_bit_never_pass(tmp_path):
    array = np.arange(50.0)
    good = zipped(("a.npy", npy(array)))
    start = good.index(array.tobytes())
    for position in range(start, start + array.nbytes, 7):
        damaged = bytearray(good)
        damaged[position] ^= 4
        with pytest.raises(CorruptFile, match="CRC"):
            files.read_arrays(written(tmp_path, bytes(damaged)))


@pytest.mark.parametrize(
    ("kind", "large"),
    [
        ("json", lambda: b"[" + b'{"a":1},' * 400_000 + b"{}]"),
        ("json", lambda: b"[" + b"[]," * 499_000 + b"[]]"),
        ("json", lambda: ('"' + "x" * (files.MAX_JSON_BYTES - 6) + "\U0001f600" + '"').encode()),
        ("json", lambda: b'"' + b"\\u0041" * ((files.MAX_JSON_BYTES - 2) // 6) + b'"'),
        ("safetensors", lambda: safetensors_bytes({"a": torch.zeros(10_000_000)})),
        ("npz", lambda: zipped(("a.npy", npy(np.zeros(10_000_000, np.float32))))),
    ],
)
def test_large_but_sound_files_are_read_within_the_bounds(tmp_path, kind, large, request):
    (tmp_path / "x").write_bytes(large())
    outcome = watched(lambda: READERS[kind][0](tmp_path / "x"))
    assert outcome.raised == ""
    within_bounds(outcome, slower=5 if request.config.getoption("--shapes") else 1)


def written(folder: Path, data: bytes) -> Path:
    (folder / "x").write_bytes(data)
    return folder / "x"


class SmallFiles:
    """``os`` as it was when the file was still empty."""

    def fstat(self, descriptor: int) -> os.stat_result:
        return os.stat_result((0,) * 10)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def test_a_file_that_grew_while_it_was_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(20))
    monkeypatch.setattr(files, "os", SmallFiles())
    with pytest.raises(CorruptFile, match="changed from 0 to 1 bytes or more"):
        files.read_bytes(tmp_path / "x", limit=10)


def test_sha256_of_a_file(tmp_path):
    assert files.sha256_of(written(tmp_path, b"abc")).startswith("ba7816bf8f01cfea")


# ------------------------------------------------------------------------------------------------------------- mapping


def test_a_mapped_file_is_read_only_and_outlives_its_replacement(tmp_path):
    target = tmp_path / "a.pack"
    files.write_atomic(target, b"old content")
    mapped = files.map_bytes(target)
    files.write_atomic(target, b"new")
    assert (bytes(mapped), bytes(files.map_bytes(target)), mapped.readonly) == (b"old content", b"new", True)
    files.write_atomic(target, b"")
    assert bytes(files.map_bytes(target)) == b""


def test_what_cannot_be_mapped_is_refused_by_name(tmp_path):
    with pytest.raises(CorruptFile, match="gone is missing; a file is expected"):
        files.map_bytes(tmp_path / "gone")
    with pytest.raises(CorruptFile, match="is a folder"):
        files.map_bytes(tmp_path)
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(CorruptFile, match="holds 5 bytes, more than the 4"):
        files.map_bytes(tmp_path / "large", 4)
