"""The one atomic writer and the one reader harness behind every file Sparing keeps.

Writers put a file or folder in place whole or not at all, whatever moment the process dies. Readers never unpickle,
bound what they allocate, and let only :class:`SparingError` out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import CorruptFile, StoreError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 64 << 20
MAX_ARRAY_BYTES = 8 << 30
ZIP_RATIO = 200
SMALL_MEMBER = 16 << 20
"""An npz member above SMALL_MEMBER bytes may not unpack to more than ZIP_RATIO times its packed size."""

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


def write_atomic(target: Path, content: bytes) -> None:
    """Put ``content`` at ``target``: written aside, synced, renamed, folder synced."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _at("write", target)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            _at("fsync", target)
            os.fsync(file.fileno())
        _at("rename", target)
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise _storage_error("write", target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _at("write", target)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
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
        scratch.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
            os.replace(target, old / "replaced")
            os.replace(scratch, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(scratch, target)
        scratch = None
        _sync_folder(target.parent)
    except OSError as error:
        raise _storage_error("write", target, error) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def canonical_json(value: Any) -> str:
    """The same text for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def write_json(target: Path, value: Any) -> None:
    """Write readable JSON atomically; NaN and infinities are refused."""
    write_atomic(target, (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read_bytes(source: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes."""
    try:
        if not source.is_file():
            raise CorruptFile(f"{source} is {'a folder' if source.is_dir() else 'missing'}; a file is expected there")
        size = source.stat().st_size
        if size > limit:
            raise CorruptFile(f"{source} holds {size} bytes, more than the {limit} a file of this kind may have")
        return source.read_bytes()
    except OSError as error:
        raise _storage_error("read", source, error) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def read_json(source: Path) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN or infinity, bounded size and depth."""
    content = read_bytes(source, MAX_JSON_BYTES)
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{source} is not valid JSON: {error}") from error


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Shared storage is written once per name, non-contiguous ones packed."""
    from safetensors.torch import save

    write_atomic(target, save({k: t.detach().contiguous().clone() for k, t in tensors.items()}, dict(metadata or {})))


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _must_be_file(source)
    try:
        return load_file(source)
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise CorruptFile(f"{source} is not a valid safetensors file: {error}") from error


def _must_be_file(source: Path) -> None:
    if not source.is_file():
        raise CorruptFile(f"{source} is {'a folder' if source.is_dir() else 'missing'}; a file is expected there")


def write_arrays(target: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write plain NumPy arrays (no objects) as an npz, atomically."""
    import io

    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise StoreError(f"cannot write {target}: array {name!r} holds Python objects")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(target, buffer.getvalue())


def read_arrays(source: Path) -> dict[str, np.ndarray]:
    """Read an npz without objects; refuses members that would unpack to more than their packed size allows."""
    _must_be_file(source)
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) != len(members):
                raise ValueError("a member name appears twice")
            total = sum(member.file_size for member in members)
            bomb = next((m for m in members if m.file_size > max(SMALL_MEMBER, ZIP_RATIO * m.compress_size)), None)
            if bomb is not None or total > MAX_ARRAY_BYTES:
                raise ValueError(f"it would unpack to {total} bytes")
        with np.load(source, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
        raise CorruptFile(f"{source} is not a valid npz file: {error}") from error
    except Exception as error:  # zlib.error, tokenizer errors of a damaged npy header, struct.error
        raise CorruptFile(f"{source} is not a valid npz file: {type(error).__name__}: {error}") from error


def sha256_of(source: Path) -> str:
    """Hex digest of a file's content."""
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _storage_error("read", source, error) from error
