"""The data root, what belongs in it, and how it gets there.

``$SPARING_DATA`` (or ``--data``, or the user data folder of the system) holds one folder for each published data set.
Nothing is downloaded unasked: a missing file is named together with address, size and SHA-256 of what belongs there.
"""

from __future__ import annotations

import ipaddress
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sparing.core.environment import DATA_FOLDER
from sparing.core.errors import CorruptFile, DataError, InvalidValue
from sparing.core.files import put_in_place, sha256_of

T = TypeVar("T")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
CHUNK = 1 << 20
ATTEMPTS = 3
TIMEOUT = 30.0
"""Seconds without a byte before an attempt is given up."""


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its name in the data set's folder, where it comes from, and what it must be."""

    name: str
    url: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """A published data set."""

    name: str
    summary: str
    licence: str
    homepage: str
    files: tuple[RemoteFile, ...]
    """What can be downloaded; nothing, where the published form is one that Sparing does not read."""
    place: str = ""
    """The one file that is read, below the data root; "": a folder of this set's name."""
    made: str = ""
    """How that file comes to be, where nothing can be downloaded; ``{path}`` stands for where it belongs."""

    def path(self, root: Path) -> Path:
        """The file or folder that is read."""
        return root / (self.place or self.name)

    def folder(self, root: Path) -> Path:
        """The folder this set lies in."""
        return self.path(root).parent if self.place else self.path(root)

    def present(self, root: Path) -> bool:
        """Whether its file, or its folder and anything in it, is there."""
        path = self.path(root)
        return path.is_file() if self.place else path.is_dir() and any(path.iterdir())

    def how_to_place(self, root: Path) -> str:
        """What to place where, for a set that cannot be downloaded."""
        return (
            f"Place it there, or point SPARING_DATA at a folder that holds {self.place or self.name}. "
            f"{self.made.format(path=self.path(root))}"
        )

    def read(self, root: Path, reader: Callable[[Path], T]) -> T:
        """What ``reader`` makes of the one file; where it is missing or damaged, :class:`DataError` says what to do."""
        path = self.path(root)
        if not path.is_file():
            raise DataError(f"{path} is missing.\n{self.how_to_place(root)}")
        try:
            return reader(path)
        except (CorruptFile, DataError) as error:
            raise DataError(f"{error}\n{self.how_to_place(root)}") from error


def own_data(task: str, path: str, root: Path, expected: str) -> Path:
    """A user's own file or folder: a relative ``path`` is looked for from the working folder, then from ``root``."""
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [given, root / given]
    for place in places:
        if place.exists():
            return place
    looked = " nor ".join(str(place) for place in places)
    raise DataError(f"{task}: path = {path!r}: neither {looked} exists; {expected} is expected")


def cut_shares(task: str, **shares: float) -> dict[str, float]:
    """``shares`` (split → share of the records), or :class:`InvalidValue` naming the one that is none."""
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InvalidValue(f"{task}: {name}_share = {share!r}; a share above 0 and below 1 is expected")
    if sum(shares.values()) >= 1:
        raise InvalidValue(
            f"{task}: {' + '.join(f'{name}_share' for name in shares)} = {sum(shares.values()):g}; below 1 is expected"
        )
    return {name: float(share) for name, share in shares.items()}


def own_splits(task: str, path: str, root: Path, expected: str, suffixes: Sequence[str]) -> dict[str, Path]:
    """Split → file of a user's own data: a file is "train"; a folder holds one for train, and may for val and test.

    Files are named after their split and end in one of ``suffixes``; val may be called valid, validation or dev.
    """
    place = own_data(task, path, root, expected)
    if place.is_file():
        return {"train": place}
    files: dict[str, Path] = {}
    for split, names in SPLITS.items():
        found = [place / f"{name}{suffix}" for name in names for suffix in suffixes]
        found = [file for file in found if file.is_file()]
        if len(found) > 1:
            raise DataError(f"{found[0]} and {found[1]} both are the split {split!r}; one file is expected")
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise DataError(f"{place}: no file train{suffixes[0]} (or {', '.join(suffixes[1:])}) in it")
    return files


def data_root(given: Path | str | None = None) -> Path:
    """The data folder: ``given``, else ``$SPARING_DATA``, else the system's folder for user data.

    While a recipe is planned, the data folder it was given stands for one that is not given here.
    """
    if given is None:
        given = DATA_FOLDER.get()
    if given is not None:
        return Path(given).expanduser()
    if named := os.environ.get("SPARING_DATA"):
        return Path(named).expanduser()
    from platformdirs import user_data_path

    return user_data_path("sparing", appauthor=False) / "data"


def locate(source: Source, file: RemoteFile, root: Path, alternatives: tuple[str, ...] = ()) -> Path:
    """The path of ``file`` or of the first of ``alternatives`` there is; else :class:`DataError` saying what to do."""
    folder = source.folder(root)
    for name in (file.name, *alternatives):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder / file.name} is missing.\n{how_to_get(source, file, root)}")


def how_to_get(source: Source, file: RemoteFile, root: Path) -> str:
    """What to place where, in words."""
    return (
        f"Place {file.url} ({file.bytes} bytes, SHA-256 {file.sha256}) at {source.folder(root) / file.name}, or point "
        f"SPARING_DATA at a folder that holds {source.name}/{file.name}, or fetch it from Python:\n"
        f"  from sparing.data.catalogue import fetch; fetch({source.name!r})"
    )


def fetch_files(source: Source, root: Path) -> list[Path]:
    """Download what is missing of a set; files that are there are left alone. Returns the paths of all files."""
    if not source.files:
        if source.present(root):
            return [source.path(root)]
        raise DataError(f"{source.path(root)} cannot be downloaded. {source.how_to_place(root)}")
    paths = []
    for file in source.files:
        path = source.folder(root) / file.name
        if not path.exists():
            try:
                download(file.url, path, file.sha256, file.bytes)
            except DataError as error:
                raise DataError(f"{error}\n{how_to_get(source, file, root)}") from error
        paths.append(path)
    return paths


def download(
    url: str,
    target: Path,
    sha256: str,
    size: int,
    attempts: int = ATTEMPTS,
    timeout: float = TIMEOUT,
    pause: float = 1.0,
) -> None:
    """Download ``url`` to ``target``; what arrives must have ``size`` bytes and the digest ``sha256``.

    Bytes are collected in ``target`` + ``.part``, which a later call goes on with (HTTP ranges); the file gets its name
    only once its digest is right. Two processes that want the same file take turns. Addresses must be HTTPS, or on this
    machine. Raises :class:`DataError` after ``attempts`` failures, or at once when the content is not the expected one.
    """
    from filelock import FileLock

    _check_address(url)
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")), _progress(target.name, size) as advance:
        if target.exists():
            return
        for attempt in range(1, attempts + 1):
            try:
                _continue(url, part, size, timeout, advance)
                break
            except OSError as error:  # URLError, HTTPError, timeouts, resets and broken reads are all OSErrors
                if attempt == attempts:
                    got = part.stat().st_size if part.exists() else 0
                    raise DataError(f"{url}: {error} ({got} of {size} bytes are kept for a next attempt)") from error
                time.sleep(pause * attempt)
        found = sha256_of(part)
        if found != sha256:
            part.unlink()
            raise DataError(f"{url}: what arrived has SHA-256 {found}; {sha256} is expected. It was thrown away")
        put_in_place(part, target)


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    local = parts.hostname == "localhost"
    with suppress(ValueError):  # a name is no address
        local = local or ipaddress.ip_address(parts.hostname or "").is_loopback
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise InvalidValue(f"{url}: only https:// addresses are downloaded from")


def _continue(url: str, part: Path, size: int, timeout: float, advance: Callable[[int], None]) -> None:
    """Append to ``part`` what is missing of ``size`` bytes."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    advance(have)
    if have == size:
        return
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=timeout) as answer:
            continued = answer.status == 206 and str(answer.headers.get("Content-Range", "")).startswith(
                f"bytes {have}-"
            )
            if have and not continued:
                have = 0  # the server sends the whole file
            with part.open("ab" if have else "wb") as file:
                while chunk := answer.read(CHUNK):
                    have += len(chunk)
                    if have > size:
                        part.unlink()
                        raise DataError(f"{url}: sends more than the expected {size} bytes")
                    file.write(chunk)
                    advance(have)
    except HTTPException as error:
        raise OSError(f"broken answer: {type(error).__name__}") from error
    if have < size:
        raise OSError(f"the connection ended after {have} of {size} bytes")


class _progress:  # noqa: N801 - a context manager
    """A bar on a terminal, nothing elsewhere; yields a function of the bytes there so far."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._bar: Any = None

    def __enter__(self) -> Callable[[int], None]:
        if not sys.stderr.isatty():
            return lambda done: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        console = Console(stderr=True)
        columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, console=console)
        self._bar.start()
        task = self._bar.add_task(self._name, total=self._size)
        return lambda done: self._bar.update(task, completed=done)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
