"""The one atomic writer and the one reader harness behind every file Sparing keeps.

Writers put a file or folder in place whole or not at all, whatever moment the process dies. Readers never unpickle,
bound what they allocate, and let only :class:`SparingError` out.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import mmap
import os
import secrets
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import CorruptFile, InvalidValue, StoreError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 16 << 20
MAX_JSON_ITEMS = 1_000_000
"""Bounds of a JSON document: its bytes, and its values, which take up to a hundred times their bytes once parsed."""
MAX_HEADER_BYTES = 4 << 20
"""Longest header of a safetensors file (some ten thousand tensors), and longest table of contents of an npz."""
MAX_FILE_BYTES = 64 << 30
ZIP_RATIO = 200
SMALL_ARCHIVE = 16 << 20
"""An npz may not unpack to more than SMALL_ARCHIVE bytes or ZIP_RATIO times its size, whichever is more."""
STALE_AFTER_S = 3600
"""What a killed writer left aside is removed by the next writer of the same target once it is that old."""

fault_hook: Callable[[str, Path], None] | None = None
"""Called with "write", "fsync" or "rename" and the target just before each; lets tests fail or die at that moment."""


def _at(stage: str, target: Path) -> None:
    if fault_hook is not None:
        fault_hook(stage, target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(action: str, target: Path, error: OSError) -> StoreError:
    return StoreError(f"cannot {action} {target}: {error.strerror or error}")


def aside(target: Path) -> Path:
    """A new hidden name beside ``target``, to write to before it is put in place; see :func:`leftover_of`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def leftover_of(path: Path) -> str | None:
    """The name of the target ``path`` was written aside for, or None when it is no such file or folder."""
    parts = path.name[1:].rsplit(".", 2)
    return parts[0] if path.name.startswith(".") and len(parts) == 3 and parts[2] == "tmp" else None


def remove(path: Path) -> None:
    """Remove a file, link or folder, as far as that is possible; one that is gone already is fine."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _prepare(target: Path) -> None:
    """Make the parent folder, and remove what writers of ``target`` killed long ago left in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for sibling in target.parent.iterdir():
        if leftover_of(sibling) == target.name:
            with suppress(FileNotFoundError):
                if sibling.lstat().st_mtime < time.time() - STALE_AFTER_S:
                    remove(sibling)


def write_atomic(target: Path, content: bytes | memoryview) -> None:
    """Put ``content`` at ``target``: written aside, synced, renamed, folder synced."""
    temporary = aside(target)
    try:
        _prepare(target)
        _at("write", target)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            _at("fsync", target)
            os.fsync(file.fileno())
        _at("rename", target)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _storage_error("write", target, error) from error
    finally:
        remove(temporary)


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a finished file of the same folder its name: synced, renamed, folder synced. For files written in pieces."""
    try:
        _at("fsync", target)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _at("rename", target)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _storage_error("write", target, error) from error


@contextmanager
def folder_atomic(target: Path) -> Iterator[Path]:
    """A scratch folder that takes ``target``'s place, replacing an older one, when the block ends without an error."""
    scratch = aside(target)
    try:
        _prepare(target)
        _at("write", target)
        scratch.mkdir()
        yield scratch
        _at("fsync", target)
        for path in scratch.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            else:
                _sync_folder(path)
        _sync_folder(scratch)
        _at("rename", target)
        if not os.path.lexists(target):
            os.replace(scratch, target)
        elif not _exchange(scratch, target):
            _replace_in_two(scratch, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _storage_error("write", target, error) from error
    finally:
        remove(scratch)


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for in one step; False where the system or the file system cannot."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        return False
    raise OSError(number, os.strerror(number))


def _replace_in_two(scratch: Path, target: Path) -> None:
    """Put ``scratch`` in ``target``'s place; whoever dies between the two renames leaves the old content aside."""
    old = aside(target)
    os.replace(target, old)
    try:
        os.replace(scratch, target)
    except OSError:
        os.replace(old, target)
        raise
    remove(old)


def canonical_json(value: Any) -> str:
    """The same text for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def write_json(target: Path, value: Any) -> None:
    """Write readable JSON atomically; what :func:`read_json` would refuse is refused here: NaN, infinities, objects."""
    try:
        content = (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it takes {len(content)} bytes, more than {MAX_JSON_BYTES}; arrays belong into npz files")
        parse_json(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"cannot write {target}: {error}") from error
    write_atomic(target, content)


def read_bytes(source: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes."""
    try:
        _must_be_file(source)
        with source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CorruptFile(f"{source} holds {size} bytes, more than the {limit} a file of this kind may have")
            content = file.read(size + 1)
        if len(content) != size:
            raise CorruptFile(f"{source} changed from {size} to {len(content)} bytes or more while it was read")
        return content
    except OSError as error:
        raise _storage_error("read", source, error) from error


def map_bytes(source: Path, limit: int = MAX_FILE_BYTES) -> memoryview:
    """The content of a regular file, mapped into memory read-only: all processes that map it share one copy.

    Whoever replaces the file by another (as everything here does) leaves the mapping as it is; a file that is shortened
    in place takes the process down when the missing part is read.
    """
    try:
        _must_be_file(source)
        with source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CorruptFile(f"{source} holds {size} bytes, more than the {limit} a file of this kind may have")
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except OSError as error:
        raise _storage_error("read", source, error) from error


def _must_be_file(source: Path) -> None:
    if not source.is_file():
        found = "a folder" if source.is_dir() else "no plain file" if os.path.lexists(source) else "missing"
        raise CorruptFile(f"{source} is {found}; a file is expected there")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def parse_json(content: bytes) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, bounded in size and depth; else ``ValueError``."""
    if sum(content.count(sign) for sign in (b",", b"[", b"{")) > MAX_JSON_ITEMS:
        raise ValueError(f"it holds more than {MAX_JSON_ITEMS} values")
    text = content.decode("utf-8")
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def read_json(source: Path) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN or infinity, bounded in size and depth."""
    content = read_bytes(source, MAX_JSON_BYTES)
    try:
        return parse_json(content)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{source} is not valid JSON: {error}") from error


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Shared storage is written once per name, non-contiguous ones packed."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    if "__metadata__" in tensors:
        raise InvalidValue(f"cannot write {target}: '__metadata__' is no name for a tensor")
    said = dict(metadata or {}) if tensors or metadata else None  # with neither it writes what it cannot read
    try:
        content = save({k: t.detach().contiguous().clone() for k, t in tensors.items()}, said)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidValue(f"cannot write {target}: {_unwritable(tensors, error)}") from error
    write_atomic(target, content)


def _unwritable(tensors: Mapping[str, Tensor], error: Exception) -> str:
    """Which of the tensors safetensors cannot hold, and why."""
    import torch

    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype == torch.complex128:
            return f"{name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: safetensors holds no such tensors"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    from safetensors.torch import load

    content = read_bytes(source)
    try:
        length = int.from_bytes(content[:8], "little")
        if length > min(MAX_HEADER_BYTES, len(content) - 8):
            raise ValueError(f"its header of {length} bytes is cut off, or longer than {MAX_HEADER_BYTES}")
        parse_json(content[8 : 8 + length])
        return load(content)
    except Exception as error:  # the library's own, and KeyError, TypeError, OverflowError, RuntimeError of odd shapes
        raise CorruptFile(f"{source} is not a valid safetensors file: {_first_line(error)}") from error


def write_arrays(target: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write plain NumPy arrays (no objects, no records) as an npz, atomically; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in arrays.items():
            array = np.asanyarray(value)
            if array.dtype.kind in "OV" or isinstance(array, np.ma.MaskedArray):
                raise InvalidValue(
                    f"cannot write {target}: {name!r} is a {type(array).__name__} of {array.dtype}; "
                    "numbers, texts and times without a mask can be kept"
                )
            if "\0" in name or name.encode(errors="ignore").decode() != name:
                raise InvalidValue(f"cannot write {target}: {name!r} is no name for an array")
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    write_atomic(target, buffer.getbuffer())


_ZIP_END = struct.Struct("<4s18x")


class _ShortReads(io.FileIO):
    """A file that refuses to be read in large pieces, as a forged table of contents would have it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_HEADER_BYTES:
            raise ValueError(f"its table of contents is longer than {MAX_HEADER_BYTES} bytes")
        return super().read(size)


def read_arrays(source: Path) -> dict[str, np.ndarray]:
    """Read an npz without objects; refuses one that would unpack to more than its size allows."""
    try:
        _must_be_file(source)
        size = source.stat().st_size
        with _ShortReads(source) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) != len(members):
                raise ValueError("a member name appears twice")
            if file.seek(-_ZIP_END.size, os.SEEK_END) and _ZIP_END.unpack(file.read())[0] != b"PK\x05\x06":
                raise ValueError("bytes follow its end")
            if members and min(member.header_offset for member in members) != 0:
                raise ValueError("bytes come before its beginning")
            total = sum(member.file_size for member in members)
            if total > max(SMALL_ARCHIVE, ZIP_RATIO * size):
                raise ValueError(f"it would unpack to {total} bytes")
            return {member.filename.removesuffix(".npy"): _member(archive, member) for member in members}
    except CorruptFile:
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, RuntimeError (encrypted), errors of a damaged header
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno != errno.EINVAL:  # EINVAL: a forged position
            raise _storage_error("read", source, cause) from error
        raise CorruptFile(f"{source} is not a valid npz file: {_first_line(error)}") from error


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array of an npz, allocated only if the member holds as many bytes as its header says."""
    if not member.filename.endswith(".npy"):
        raise ValueError(f"the member {member.filename!r} is no array")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in {(1, 0), (2, 0)}:
            raise ValueError(f"the member {member.filename!r} has format version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError(
                f"the member {member.filename!r} holds {member.file_size - stream.tell()} bytes, "
                f"which is no array of shape {shape} and type {dtype}"
            )
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def sha256_of(source: Path) -> str:
    """Hex digest of a file's content."""
    try:
        _must_be_file(source)
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _storage_error("read", source, error) from error
