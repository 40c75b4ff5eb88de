"""Where finished results and unfinished progress are kept, so that no work is done twice and none is lost.

Layout under the store's folder::

    FORMAT                         the layout's version
    entries/<ab>/<step key>/<name>/   entry.json, payload/          one finished result
    progress/<step key>/<name>/       <number>.state                the last two states of an unfinished one
    locks/<step key>.<name>.lock      held while a result is being made
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue, StoreError
from sparing.core.fingerprint import NoFingerprint, fingerprint

FORMAT = "1"
log = logging.getLogger("sparing")
T = TypeVar("T")


class Codec(Protocol[T]):
    """How a value becomes files in a folder and back."""

    def save(self, value: T, folder: Path) -> None:
        """Write ``value`` into the existing, empty ``folder``."""

    def load(self, folder: Path) -> T:
        """The value written there."""


class _Json:
    def save(self, value: Any, folder: Path) -> None:
        files.write_json(folder / "value.json", value)

    def load(self, folder: Path) -> Any:
        return files.read_json(folder / "value.json")


class _Tensors:
    def save(self, value: dict[str, Any], folder: Path) -> None:
        files.write_tensors(folder / "tensors.safetensors", value)

    def load(self, folder: Path) -> dict[str, Any]:
        return files.read_tensors(folder / "tensors.safetensors")


class _Arrays:
    def save(self, value: dict[str, Any], folder: Path) -> None:
        files.write_arrays(folder / "arrays.npz", value)

    def load(self, folder: Path) -> dict[str, Any]:
        return files.read_arrays(folder / "arrays.npz")


class _Predictor:
    def save(self, value: Any, folder: Path) -> None:
        value.save(folder / "predictor")

    def load(self, folder: Path) -> Any:
        from sparing.core.predictor import load

        return load(folder / "predictor")


JSON = _Json()
"""Plain JSON values."""
TENSORS = _Tensors()
"""Mapping of names to tensors, e.g. a state dict."""
ARRAYS = _Arrays()
"""Mapping of names to NumPy arrays."""
PREDICTOR = _Predictor()
"""A predictor that can be saved and loaded without trusting anybody's code."""


@dataclass(frozen=True)
class All(Generic[T]):
    """Several values under names, each with its own codec."""

    parts: dict[str, Codec[Any]]

    def save(self, value: dict[str, Any], folder: Path) -> None:
        """Write each part into a subfolder of its name."""
        if value.keys() != self.parts.keys():
            raise InvalidValue(f"this result has the parts {sorted(self.parts)}, but {sorted(value)} were given")
        for name, codec in self.parts.items():
            (folder / name).mkdir()
            codec.save(value[name], folder / name)

    def load(self, folder: Path) -> dict[str, Any]:
        """Read each part from its subfolder."""
        return {name: codec.load(folder / name) for name, codec in self.parts.items()}


@dataclass
class Cost:
    """Wall and CPU seconds it took to make results, also when they were made in an earlier run."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    depth: int = 0

    def add(self, wall_s: float, cpu_s: float) -> None:
        """Add, unless an enclosing result is being made (which counts these seconds already)."""
        if self.depth == 0:
            self.wall_s += wall_s
            self.cpu_s += cpu_s


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_HEADER = struct.Struct("<8s32sdd")
_MAGIC = b"SPARING\x01"


class Progress:
    """The state of an unfinished computation: written atomically, the last two kept, the newest intact one read."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        """None: nothing is kept (the job has no fingerprint)."""
        self._restart_clocks(0.0, 0.0)

    def _restart_clocks(self, wall_s: float, cpu_s: float) -> None:
        self._before = (wall_s, cpu_s)
        self._start = (time.perf_counter(), cpu_seconds())

    @property
    def spent(self) -> tuple[float, float]:
        """(wall, CPU) seconds of this attempt and of the killed ones before it, up to their last state."""
        return (
            self._before[0] + time.perf_counter() - self._start[0],
            self._before[1] + cpu_seconds() - self._start[1],
        )

    def _states(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("*.state") if path.stem.isdigit())

    def load(self) -> Any | None:
        """The newest intact state, or None when there is none; starts this attempt's clocks."""
        import torch

        for path in reversed(self._states()):
            try:
                content = files.read_bytes(path, limit=1 << 40)
                if len(content) < _HEADER.size:
                    raise CorruptFile(f"{path} is truncated")
                magic, digest, wall_s, cpu_s = _HEADER.unpack_from(content)
                payload = memoryview(content)[_HEADER.size :]
                if magic != _MAGIC or hashlib.sha256(payload).digest() != digest:
                    raise CorruptFile(f"{path} is damaged")
            except CorruptFile as error:
                log.warning("%s; an older state is used if there is one", error)
                continue
            self._restart_clocks(wall_s, cpu_s)
            return torch.load(io.BytesIO(payload), weights_only=True)
        self._restart_clocks(0.0, 0.0)
        return None

    def save(self, state: Any) -> None:
        """Keep ``state``: nested dicts, lists and tuples of tensors, numbers, strings and None."""
        if self.folder is None:
            return
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        header = _HEADER.pack(_MAGIC, hashlib.sha256(payload).digest(), *self.spent)
        before = self._states()
        number = int(before[-1].stem) + 1 if before else 1
        files.write_atomic(self.folder / f"{number:08d}.state", header + payload)
        for path in before[:-1]:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Entry:
    """A finished result as the ``cache`` command lists it."""

    folder: Path
    name: str
    bytes: int
    made: float
    wall_s: float


class Store:
    """A folder of results, shared by all runs of a user and safe for several processes at once."""

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path is not None else default_store_path()
        marker = self.path / "FORMAT"
        if marker.is_file():
            found = files.read_bytes(marker, 64).decode("ascii", "replace").strip()
            if found != FORMAT:
                raise StoreError(
                    f"the store {self.path} has format {found}, this release reads {FORMAT}: "
                    "use another folder (--store), or delete it"
                )
        else:
            if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "locks").is_dir():
                raise StoreError(f"{self.path} is a folder with other files in it, not a store: name an empty one")
            files.write_atomic(marker, FORMAT.encode())

    def bind(self, *parts: Any, seed: int) -> BoundStore:
        """A view for one job; ``parts`` is what its results depend on besides the seed and the steps to come."""
        return BoundStore(self, (fingerprint(parts),), seed)

    def entry_folder(self, step_key: str, name: str) -> Path:
        """Where the result ``name`` of the step with this key lies or will lie."""
        return self.path / "entries" / step_key[:2] / step_key / name

    def entries(self) -> Iterator[Entry]:
        """Every finished result."""
        for marker in sorted(self.path.glob("entries/*/*/[!.]*/entry.json")):
            meta = files.read_json(marker)
            size = sum(path.stat().st_size for path in marker.parent.rglob("*") if path.is_file())
            yield Entry(marker.parent, meta["name"], size, marker.stat().st_mtime, meta["wall_s"])

    def size(self) -> int:
        """Bytes of everything kept."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def prune(self, older_than_days: float) -> int:
        """Delete results made more than so many days ago, and progress as old; returns the bytes freed."""
        before, limit = self.size(), time.time() - older_than_days * 86400
        for entry in list(self.entries()):
            if entry.made < limit:
                shutil.rmtree(entry.folder)
        for folder in self.path.glob("progress/*/*"):
            if folder.stat().st_mtime < limit:
                shutil.rmtree(folder)
        return before - self.size()

    def clear(self) -> int:
        """Delete everything kept; returns the bytes freed."""
        before = self.size()
        for name in ("entries", "progress"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        return before - self.size()


@dataclass(frozen=True)
class BoundStore:
    """The store as one job sees it: its keys hold everything the job's results depend on."""

    store: Store | None
    """None: nothing is kept, because something in the job has no fingerprint."""
    chain: tuple[str, ...]
    seed: int
    cost: Cost = field(default_factory=Cost)

    def child(self, *parts: Any) -> BoundStore:
        """The view of whoever comes next, after ``parts``; its cost starts at zero.

        Parts without a fingerprint make a view that keeps nothing.
        """
        if self.store is None:
            return replace(self, cost=Cost())
        try:
            return replace(self, chain=(*self.chain, fingerprint(parts)), cost=Cost())
        except NoFingerprint as error:
            log.warning("results from here on are not kept for later runs: %s", error)
            return replace(self, store=None, cost=Cost())

    def key(self, seed: bool = True) -> str:
        """The step key: a digest of the chain, and of the seed unless the result does not depend on it."""
        return fingerprint([*self.chain, self.seed if seed else "any seed"])

    def progress(self, name: str, seed: bool = True) -> Progress:
        """Keeps the state of the loop that makes the result ``name``."""
        if self.store is None:
            return Progress(None)
        return Progress(self.store.path / "progress" / self.key(seed) / _plain(name))

    def has(self, name: str, seed: bool = True) -> bool:
        """Whether the result ``name`` is finished."""
        return self.store is not None and (self.store.entry_folder(self.key(seed), name) / "entry.json").is_file()

    def stored_cost(self) -> tuple[int, float] | None:
        """(number of results, their wall seconds) kept for this point of the chain, or None when there are none."""
        if self.store is None:
            return None
        metas = [
            files.read_json(path)
            for key in (self.key(True), self.key(False))
            for path in self.store.entry_folder(key, "x").parent.glob("[!.]*/entry.json")
        ]
        return (len(metas), sum(meta["wall_s"] for meta in metas)) if metas else None

    def once(self, name: str, compute: Callable[[], T], codec: Codec[T], seed: bool = True) -> T:
        """The result ``name``: read if it is there, else computed, kept, and read back, so that both ways are one.

        Two processes that want the same result wait for each other. A damaged entry is reported and made anew.
        """
        if self.store is None:
            self.cost.depth += 1
            start, cpu = time.perf_counter(), cpu_seconds()
            try:
                value = compute()
            finally:
                self.cost.depth -= 1
            self.cost.add(time.perf_counter() - start, cpu_seconds() - cpu)
            return value
        from filelock import FileLock

        key, name = self.key(seed), _plain(name)
        lock = self.store.path / "locks" / f"{key}.{name}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held = FileLock(lock)
            held.acquire()
        except OSError as error:
            raise StoreError(f"cannot lock {lock}: {error.strerror or error}") from error
        try:
            folder = self.store.entry_folder(key, name)
            if (folder / "entry.json").is_file():
                try:
                    return self._read(folder, codec)
                except CorruptFile as error:
                    log.warning("stored result is damaged and will be made anew: %s", error)
                    shutil.rmtree(folder)
            self._make(folder, name, compute, codec, self.progress(name, seed))
            return self._read(folder, codec)
        finally:
            held.release()

    def _make(self, folder: Path, name: str, compute: Callable[[], T], codec: Codec[T], progress: Progress) -> None:
        earlier_wall, earlier_cpu = _killed_seconds(progress)
        start, cpu = time.perf_counter(), cpu_seconds()
        self.cost.depth += 1
        try:
            value = compute()
        finally:
            self.cost.depth -= 1
        wall_s = earlier_wall + time.perf_counter() - start
        cpu_s = earlier_cpu + cpu_seconds() - cpu
        if folder.parent.is_dir():  # nobody else writes this result while its lock is held
            for left in folder.parent.iterdir():
                if files.leftover_of(left) == name:
                    files.remove(left)
        with files.folder_atomic(folder) as scratch:
            (scratch / "payload").mkdir()
            codec.save(value, scratch / "payload")
            content = {
                path.relative_to(scratch).as_posix(): files.sha256_of(path)
                for path in sorted(scratch.rglob("*"))
                if path.is_file()
            }
            meta = {"name": name, "wall_s": wall_s, "cpu_s": cpu_s, "files": content}
            files.write_json(scratch / "entry.json", meta)
        progress.clear()

    def _read(self, folder: Path, codec: Codec[T]) -> T:
        meta = files.read_json(folder / "entry.json")
        try:
            for path, digest in meta["files"].items():
                if files.sha256_of(folder / path) != digest:
                    raise CorruptFile(f"{folder / path} has changed since it was written")
            value = codec.load(folder / "payload")
            self.cost.add(float(meta["wall_s"]), float(meta["cpu_s"]))
        except CorruptFile:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, StoreError) as error:
            raise CorruptFile(f"{folder} is not a readable result: {error}") from error
        return value


def _killed_seconds(progress: Progress) -> tuple[float, float]:
    """Seconds of attempts before this one, read from the newest intact header without loading the state."""
    for path in reversed(progress._states()):
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) == _HEADER.size and header.startswith(_MAGIC):
            _, _, wall_s, cpu_s = _HEADER.unpack(header)
            return wall_s, cpu_s
    return 0.0, 0.0


def _plain(name: str) -> str:
    if not name or not all(char.isalnum() or char in "-_." for char in name) or name.startswith("."):
        raise InvalidValue(f"a result's name is made of letters, digits, '-', '_' and '.', not {name!r}")
    return name


def default_store_path() -> Path:
    """``$SPARING_STORE``, or the user's cache folder."""
    if configured := os.environ.get("SPARING_STORE"):
        return Path(configured)
    from platformdirs import user_cache_path

    return user_cache_path("sparing") / "store"


__all__ = ["ARRAYS", "JSON", "PREDICTOR", "TENSORS", "All", "BoundStore", "Codec", "Cost", "Progress", "Store"]
