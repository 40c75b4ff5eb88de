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
import math
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue, StoreError
from sparing.core.fingerprint import NoFingerprint, fingerprint
from sparing.core.randomness import isolated_rng

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT = "1"
log = logging.getLogger("sparing")
T = TypeVar("T")


@runtime_checkable
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


class _Clock:
    """Wall and CPU seconds since it was made, split at the results that are made or read meanwhile.

    A result counts what it took to make the results inside it, also when they were read this time.
    """

    def __init__(self) -> None:
        self.start = (time.perf_counter(), cpu_seconds())
        self.inside = (0.0, 0.0)
        """Seconds that went by inside, waiting and reading included."""
        self.results = (0.0, 0.0)
        """Seconds it once took to make what was made or read inside."""

    def elapsed(self) -> tuple[float, float]:
        return _difference((time.perf_counter(), cpu_seconds()), self.start)

    def own(self) -> tuple[float, float]:
        """Seconds spent outside of other results."""
        return _difference(self.elapsed(), self.inside)


def _sum(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _difference(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] - other[0], one[1] - other[1]


_running: ContextVar[_Clock | None] = ContextVar("running", default=None)
"""The clock of the innermost result being made."""

_HEADER = struct.Struct("<8s32sdd")
_CHECK = 8
_MAGIC = b"SPARING\x01"


def _header(content: bytes, path: Path) -> tuple[bytes, tuple[float, float]]:
    """(digest of the payload, (wall, CPU) seconds) of a state; checked by the first bytes of its own digest."""
    head, check = content[: _HEADER.size], content[_HEADER.size : _HEADER.size + _CHECK]
    if not head.startswith(_MAGIC) or hashlib.sha256(head).digest()[:_CHECK] != check:
        raise CorruptFile(f"{path} is damaged or cut off")
    _, digest, wall_s, cpu_s = _HEADER.unpack(head)
    return digest, (wall_s, cpu_s)


_LEAVES = (type(None), bool, int, float, complex, str, bytes)


def _check_state(state: Any, where: str) -> None:
    """Refuse now what could not be read back after a kill."""
    import torch

    if type(state) in (dict, OrderedDict):
        for key, value in state.items():
            _check_state(key, f"a key of {where}")
            _check_state(value, f"{where}[{key!r}]")
    elif type(state) in (list, tuple, set):
        for index, value in enumerate(state):
            _check_state(value, f"{where}[{index}]")
    elif type(state) not in (*_LEAVES, torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device):
        raise InvalidValue(
            f"{where} is a {type(state).__module__}.{type(state).__qualname__}; progress is kept as dicts, lists and "
            "tuples of tensors, numbers, texts and None"
        )


class Progress:
    """The state of an unfinished computation: written atomically, the last two kept, the newest intact one read."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        """None: nothing is kept (the job has no fingerprint)."""
        self._before = (0.0, 0.0)
        self._clock = _running.get() or _Clock()

    @property
    def spent(self) -> tuple[float, float]:
        """(wall, CPU) seconds of this attempt and of the killed ones before it, up to their last state."""
        return _sum(self._before, self._clock.own())

    def _states(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        found = [path for path in self.folder.glob("*.state") if path.stem.isdecimal()]
        return sorted(found, key=lambda path: int(path.stem))

    def load(self) -> Any | None:
        """The newest intact state, or None when there is none."""
        import torch

        for path in reversed(self._states()):
            try:
                content = files.read_bytes(path)
                digest, self._before = _header(content, path)
                payload = memoryview(content)[_HEADER.size + _CHECK :]
                if hashlib.sha256(payload).digest() != digest:
                    raise CorruptFile(f"{path} is damaged or cut off")
                return torch.load(io.BytesIO(payload), weights_only=True)
            except CorruptFile as error:
                log.warning("%s; an older state is used if there is one", error)
        self._before = (0.0, 0.0)
        return None

    def save(self, state: Any) -> None:
        """Keep ``state``: nested dicts, lists and tuples of tensors, numbers, strings and None."""
        if self.folder is None:
            return
        import torch

        _check_state(state, "the state")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getbuffer()
        head = _HEADER.pack(_MAGIC, hashlib.sha256(payload).digest(), *self.spent)
        before = self._states()
        number = int(before[-1].stem) + 1 if before else 1
        check = hashlib.sha256(head).digest()[:_CHECK]
        files.write_atomic(self.folder / f"{number:08d}.state", b"".join((head, check, payload)))
        for path in before[:-1]:
            files.remove(path)

    def spent_before(self) -> tuple[float, float]:
        """(wall, CPU) seconds of the attempts before this one, without loading their state."""
        for path in reversed(self._states()):
            try:
                with path.open("rb") as file:
                    return _header(file.read(_HEADER.size + _CHECK), path)[1]
            except (CorruptFile, OSError):
                continue
        return 0.0, 0.0

    def clear(self) -> None:
        """Forget everything kept."""
        if self.folder is not None:
            files.remove(self.folder)


@dataclass(frozen=True)
class _Meta:
    """The content of ``entry.json``."""

    name: str
    wall_s: float
    cpu_s: float
    files: dict[str, str]
    """Path in the entry's folder → SHA-256."""

    @classmethod
    def read(cls, source: Path) -> _Meta:
        meta = files.read_json(source)
        try:
            digests = {str(path): str(digest) for path, digest in meta["files"].items()}
            return cls(str(meta["name"]), float(meta["wall_s"]), float(meta["cpu_s"]), digests)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{source} describes no result: {type(error).__name__}: {error}") from error


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

    FOLDERS = ("entries", "progress", "locks")

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
            return
        try:
            content = list(self.path.iterdir()) if self.path.is_dir() else []
        except OSError as error:
            raise StoreError(f"cannot read the store {self.path}: {error.strerror or error}") from error
        # FORMAT may be there by now, or half of it: another process makes this store, or was killed while it did
        known = {*self.FOLDERS, "FORMAT"}
        if foreign := sorted(file.name for file in content if (files.leftover_of(file) or file.name) not in known):
            raise StoreError(
                f"{self.path} is a folder with other files in it ({foreign[0]}), not a store: name an empty one"
            )
        files.write_atomic(marker, FORMAT.encode())

    def bind(self, *parts: Any, seed: int) -> BoundStore:
        """A view for one job; ``parts`` is what its results depend on besides the seed and the steps to come."""
        return BoundStore(self, (fingerprint(parts),), seed)

    def entry_folder(self, step_key: str, name: str) -> Path:
        """Where the result ``name`` of the step with this key lies or will lie."""
        return self.path / "entries" / step_key[:2] / step_key / name

    def progress_folder(self, step_key: str, name: str) -> Path:
        """Where the unfinished states of that result lie."""
        return self.path / "progress" / step_key / name

    @contextmanager
    def lock(self, step_key: str, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the right to make a result; yields False when somebody else has it and ``wait`` is False."""
        held = self._acquire(self.path / "locks" / f"{step_key}.{name}.lock", wait)
        try:
            yield held is not None
        finally:
            if held is not None:
                held.release()

    def _acquire(self, path: Path, wait: bool) -> BaseFileLock | None:
        from filelock import FileLock, Timeout

        lock = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=wait)
        except Timeout:
            return None
        except RuntimeError as error:  # this thread holds it already, and would wait for itself
            raise InvalidValue(f"the result of {path.stem} is wanted while it is being made") from error
        except OSError as error:
            raise StoreError(f"cannot lock {path}: {error.strerror or error}") from error
        return lock

    def entries(self) -> Iterator[Entry]:
        """Every finished result."""
        for marker in sorted(self.path.glob("entries/*/*/[!.]*/entry.json")):
            try:
                meta, made = _Meta.read(marker), marker.stat().st_mtime
            except (CorruptFile, FileNotFoundError) as error:
                log.warning("a stored result is damaged and will be made anew: %s", error)
            else:
                yield Entry(marker.parent, meta.name, _bytes_below(marker.parent), made, meta.wall_s)

    def size(self) -> int:
        """Bytes of everything kept."""
        return _bytes_below(self.path)

    def prune(self, older_than_days: float) -> int:
        """Delete results made and progress saved more than so many days ago, and all that killed writers left aside.

        What a process is making at this moment stays. Returns the bytes freed.
        """
        if not 0 <= older_than_days < math.inf:
            raise InvalidValue(f"older_than_days = {older_than_days}: a number of days ≥ 0 is needed")
        return self._delete(time.time() - older_than_days * 86400)

    def clear(self) -> int:
        """Delete everything kept but what a process is making at this moment; returns the bytes freed."""
        return self._delete(math.inf)

    def _delete(self, made_before: float) -> int:
        before = self.size()
        for path in self.path.glob(".FORMAT.*.tmp"):
            files.remove(path)
        found = [*self.path.glob("entries/*/*/*"), *self.path.glob("progress/*/*")]
        for key, name in sorted({(path.parent.name, files.leftover_of(path) or path.name) for path in found}):
            with self.lock(key, name, wait=False) as free:
                entry, progress = self.entry_folder(key, name), self.progress_folder(key, name)
                for path in [*entry.parent.glob(".*"), *progress.glob(".*")] if free else []:
                    if files.leftover_of(path) == name or path.parent == progress:
                        files.remove(path)
                for folder in (entry, progress) if free else ():
                    if folder.exists() and folder.stat().st_mtime < made_before:
                        files.remove(folder)
        return before - self.size()


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process works here too
            if path.is_file():
                total += path.stat().st_size
    return total


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
        return Progress(self.store.progress_folder(self.key(seed), _plain(name)))

    def has(self, name: str, seed: bool = True) -> bool:
        """Whether the result ``name`` is finished."""
        return self.store is not None and (self.store.entry_folder(self.key(seed), name) / "entry.json").is_file()

    def stored_cost(self) -> tuple[int, float] | None:
        """(number of results, their wall seconds) kept for this point of the chain, or None when there are none."""
        if self.store is None:
            return None
        seconds = []
        for key in (self.key(True), self.key(False)):
            for marker in self.store.entry_folder(key, "x").parent.glob("[!.]*/entry.json"):
                with suppress(CorruptFile):
                    seconds.append(_Meta.read(marker).wall_s)
        return (len(seconds), sum(seconds)) if seconds else None

    def once(self, name: str, compute: Callable[[], T], codec: Codec[T], seed: bool = True) -> T:
        """The result ``name``: read if it is there, else computed, kept, and read back, so that both ways are one.

        ``compute`` draws from generators of its own, seeded from the caller's last seed and the name, so that nothing
        after it depends on whether it ran. Two processes that want the same result wait for each other. A damaged
        entry is reported and made anew.
        """
        name, clock = _plain(name), _Clock()
        if self.store is None:
            value, cost = self._compute(name, compute)
        else:
            key = self.key(seed)
            with self.store.lock(key, name):
                value, cost = self._read_or_make(key, name, compute, codec)
        self.cost.add(*cost)
        if outer := _running.get():
            outer.inside = _sum(outer.inside, clock.elapsed())
            outer.results = _sum(outer.results, cost)
        return value

    def _compute(self, name: str, compute: Callable[[], T]) -> tuple[T, tuple[float, float]]:
        """What ``compute`` returns, and the seconds of it and of the results inside it."""
        import torch

        clock = _Clock()
        token = _running.set(clock)
        self.cost.depth += 1
        try:
            with isolated_rng("once", torch.initial_seed(), name):
                value = compute()
            return value, _sum(clock.own(), clock.results)
        finally:
            self.cost.depth -= 1
            _running.reset(token)

    def _read_or_make(
        self, key: str, name: str, compute: Callable[[], T], codec: Codec[T]
    ) -> tuple[T, tuple[float, float]]:
        assert self.store is not None
        folder, progress = self.store.entry_folder(key, name), Progress(self.store.progress_folder(key, name))
        if (folder / "entry.json").is_file():
            try:
                return _read(folder, codec)
            except CorruptFile as error:
                log.warning("a stored result is damaged and will be made anew: %s", error)
        earlier = progress.spent_before()
        value, cost = self._compute(name, compute)
        wall_s, cpu_s = _sum(earlier, cost)
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
        return _read(folder, codec)


def _read(folder: Path, codec: Codec[T]) -> tuple[T, tuple[float, float]]:
    """A stored result, and the seconds it took to make."""
    try:
        meta = _Meta.read(folder / "entry.json")
        for path, digest in meta.files.items():
            if files.sha256_of(folder / path) != digest:
                raise CorruptFile(f"{folder / path} has changed since it was written")
        return codec.load(folder / "payload"), (meta.wall_s, meta.cpu_s)
    except CorruptFile:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, StoreError) as error:
        raise CorruptFile(f"{folder} is not a readable result: {error}") from error


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
