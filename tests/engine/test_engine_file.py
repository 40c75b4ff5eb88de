"""The engine's file: what is written comes back, what is not exactly that is refused and never reaches native code."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_models import texts

from sparing.core.errors import CorruptFile, SparingError
from sparing.engine import pack as packs
from sparing.engine.compiler import compile_encoder
from sparing.engine.native import cpu_capability
from sparing.engine.runtime import Engine

pytestmark = pytest.mark.skipif(not cpu_capability().compiled, reason="the native library is not built here")


@pytest.fixture(scope="module")
def content(sparse_bert: Any) -> bytes:
    return compile_encoder(sparse_bert, 2, 40, engine="sparse").to_bytes()


def signed(changed: bytearray) -> bytes:
    """With a checksum that fits: what a careful forger would write."""
    digest = hashlib.sha256(memoryview(changed)[packs.HEADER.size :]).digest()
    changed[packs.HEADER.size - 32 : packs.HEADER.size] = digest
    return bytes(changed)


def entry(content: bytes, name: str) -> tuple[int, list[Any]]:
    """(offset of a section's entry in the table, its fields)."""
    count = packs.HEADER.unpack(content[: packs.HEADER.size])[2]
    for index in range(count):
        place = packs.HEADER.size + index * packs.ENTRY.size
        fields = list(packs.ENTRY.unpack(content[place : place + packs.ENTRY.size]))
        if fields[0].rstrip(b"\0").decode() == name:
            return place, fields
    raise KeyError(name)


def with_entry(content: bytes, name: str, change: Callable[[list[Any]], None]) -> bytes:
    place, fields = entry(content, name)
    change(fields)
    made = bytearray(content)
    made[place : place + packs.ENTRY.size] = packs.ENTRY.pack(*fields)
    return signed(made)


def with_values(content: bytes, name: str, change: Callable[[np.ndarray], None]) -> bytes:
    _, fields = entry(content, name)
    made = bytearray(content)
    change(
        np.frombuffer(
            made, packs.DTYPES[fields[1]], offset=fields[6], count=fields[7] // packs.DTYPES[fields[1]].itemsize
        )
    )
    return signed(made)


def with_manifest(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    pack = packs.read(content)
    manifest = pack.manifest.model_dump(mode="json")
    change(manifest)
    forged = SimpleNamespace(model_dump=lambda mode: manifest)
    return packs.to_bytes(forged, pack.arrays)  # type: ignore[arg-type]


def test_round_trip_through_a_file(sparse_bert: Any, content: bytes, tmp_path: Path) -> None:
    engine = Engine.load(content)
    path = engine.save(tmp_path / "encoder.pack")
    assert path.read_bytes() == content, "equal engines give equal bytes"
    ids = texts(sparse_bert, 2, 33)
    assert np.array_equal(Engine.load(path).run(ids), engine.run(ids))
    assert Engine.load(str(path)).describe()["layers"] == engine.describe()["layers"]


def test_sections_are_aligned_and_shared(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pack").write_bytes(content)
    pack = packs.read(tmp_path / "pack")
    for name, array in pack.arrays.items():
        assert entry(content, name)[1][6] % 64 == 0
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
    maps = Path("/proc/self/maps").read_text()
    assert "r--s" in next(line for line in maps.splitlines() if str(tmp_path / "pack") in line)


def test_weights_come_back(sparse_bert: Any, content: bytes) -> None:
    pack = packs.read(content)
    found = np.concatenate([getattr(sparse_bert.blocks[0], name).weight.numpy() for name in ("query", "key", "value")])
    assert np.array_equal(pack.weight("0.qkv"), found)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "only a header": lambda c: c[: packs.HEADER.size],
    "cut off": lambda c: c[: len(c) // 2],
    "last byte missing": lambda c: c[:-1],
    "bytes behind": lambda c: c + b"\0" * 64,
    "another format": lambda c: b"PK\x03\x04" + c[4:],
    "a later version": lambda c: c[:8] + struct.pack("<I", 2) + c[12:],
    "a flipped bit": lambda c: c[:5000] + bytes([c[5000] ^ 1]) + c[5001:],
    "huge count of sections": lambda c: signed(bytearray(c[:12] + struct.pack("<I", 1 << 31) + c[16:])),
    "huge manifest": lambda c: signed(bytearray(c[:24] + struct.pack("<Q", 1 << 60) + c[32:])),
    "says another size": lambda c: signed(bytearray(c[:16] + struct.pack("<Q", len(c) + 64) + c[24:])),
    "signed, bytes behind": lambda c: signed(bytearray(c[:16] + struct.pack("<Q", len(c) + 64) + c[24:] + b"\0" * 64)),
    "huge section": lambda c: with_entry(c, "0.up.values", lambda f: f.__setitem__(7, 1 << 62)),
    "huge shape": lambda c: with_entry(c, "0.up.bias", lambda f: f.__setitem__(3, 1 << 63)),
    "unaligned": lambda c: with_entry(c, "0.up.bias", lambda f: f.__setitem__(6, f[6] + 4)),
    "overlapping": lambda c: with_entry(c, "0.up.bias", lambda f: f.__setitem__(6, f[6] - 64)),
    "outside": lambda c: with_entry(c, "0.up.bias", lambda f: f.__setitem__(6, 1 << 40)),
    "dtype": lambda c: with_entry(c, "0.up.bias", lambda f: f.__setitem__(1, 3)),
    "dtype unknown": lambda c: with_entry(c, "0.up.bias", lambda f: f.__setitem__(1, 99)),
    "twice the same name": lambda c: with_entry(
        c, "0.up.bias", lambda f: f.__setitem__(0, b"0.up.scale".ljust(48, b"\0"))
    ),
    "name not text": lambda c: with_entry(c, "0.up.bias", lambda f: f.__setitem__(0, b"\xff" * 48)),
    "index outside": lambda c: with_values(c, "0.up.col_index", lambda v: v.__setitem__(7, 65535)),
    "pointer descends": lambda c: with_values(c, "0.up.row_ptr", lambda v: v.__setitem__(1, 1 << 30)),
    "pointer negative": lambda c: with_values(c, "0.up.row_ptr", lambda v: v.__setitem__(0, -5)),
    "NaN": lambda c: with_values(c, "0.up.bias", lambda v: v.__setitem__(0, np.nan)),
    "infinite scale": lambda c: with_values(c, "0.down.scale", lambda v: v.__setitem__(3, np.inf)),
    "no JSON": lambda c: signed(bytearray(c.replace(b'{"encoder"', b'["encoder"'))),
    "a batch in words": lambda c: with_manifest(c, lambda m: m.update(max_batch="many")),
    "an unknown field": lambda c: with_manifest(c, lambda m: m.update(extra=1)),
    "no batch": lambda c: with_manifest(c, lambda m: m.update(max_batch=0)),
    "longer than positions": lambda c: with_manifest(c, lambda m: m.update(max_length=81)),
    "heads that do not divide": lambda c: with_manifest(c, lambda m: m["encoder"].update(heads=3)),
    "wider": lambda c: with_manifest(c, lambda m: m["encoder"].update(dim=192)),
    "larger vocabulary": lambda c: with_manifest(c, lambda m: m["encoder"].update(vocabulary=98)),
    "another kind": lambda c: with_manifest(c, lambda m: m.update(kind="onnx")),
    "negative zero point": lambda c: with_manifest(
        c, lambda m: m["encoder"]["blocks"][0]["up"]["input"].update(zero=-1)
    ),
    "more rows": lambda c: with_manifest(c, lambda m: m["encoder"]["blocks"][0]["up"].update(rows=512)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "buffer"])
def test_damaged_files_are_refused_at_once(content: bytes, damage: str, from_file: bool, tmp_path: Path) -> None:
    damaged = DAMAGES[damage](content)
    assert damaged != content
    source: Any = damaged
    if from_file:
        source = tmp_path / "pack"
        source.write_bytes(damaged)
    start = time.process_time()
    with pytest.raises(CorruptFile):
        Engine.load(source)
    assert time.process_time() - start < 3


def test_sizes_that_would_leave_32_bits_are_refused(content: bytes) -> None:
    """Named before any section is looked at: native code would answer such sizes, and wrongly."""
    wide = with_manifest(content, lambda m: m["encoder"].update(dim=2052, heads=1))
    with pytest.raises(CorruptFile, match="a head of 2052 features; at most 2048"):
        Engine.load(wide)
    long = with_manifest(content, lambda m: (m.update(max_length=32769), m["encoder"].update(positions=40000)))
    with pytest.raises(CorruptFile, match="max_length: Input should be less than or equal to 32768"):
        Engine.load(long)


def test_forged_tile_pointers_are_refused(content: bytes) -> None:
    if "tiles" not in Engine.load(content).describe()["layers"].values():
        pytest.skip("this CPU packs no tiles")
    for name, place, value in (("masks", 0, (1 << 64) - 1), ("tile_ptr", 1, 1 << 31)):
        forged = with_values(content, f"0.up.{name}", lambda v, p=place, x=value: v.__setitem__(p, x))
        with pytest.raises(CorruptFile, match="pointers do not follow"):
            Engine.load(forged)


def test_random_changes_with_a_fitting_checksum_never_crash(sparse_bert: Any, content: bytes) -> None:
    """A file that is accepted runs; numbers may be wrong, addresses may not."""
    rng = np.random.default_rng(0)
    count, _, length = packs.HEADER.unpack(content[: packs.HEADER.size])[2:5]
    head = packs.HEADER.size + packs.ENTRY.size * count + length
    ids = texts(sparse_bert, 2, 40)
    outcomes = {"refused": 0, "run": 0}
    for case in range(300):
        changed = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(8, head if case % 3 else len(content)))
            changed[place] = int(rng.integers(256))
        try:
            engine = Engine.load(signed(changed))
        except CorruptFile:
            outcomes["refused"] += 1
            continue
        if engine.max_batch * engine.max_length <= 1 << 20:
            try:
                engine.run(ids % engine.encoder.vocabulary)
            except SparingError:
                continue
            outcomes["run"] += 1
    assert outcomes["refused"] > 100, outcomes
    assert outcomes["run"] > 20, outcomes


def test_folders_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="is a folder"):
        Engine.load(tmp_path)
    with pytest.raises(CorruptFile, match="missing"):
        Engine.load(tmp_path / "none")
