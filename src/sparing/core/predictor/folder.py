"""The model folder: ``sparing.json`` (the manifest), the payload it vouches for, and ``README.md`` (the model card).

Every byte but the card's is covered by a hash that is checked before anything is parsed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparing.core import files as storage
from sparing.core import registry
from sparing.core.errors import CorruptFile, InvalidValue
from sparing.core.predictor.base import Context, Description, Predictor
from sparing.core.predictor.preprocessing import Preprocessing

SCHEMA = 1
READABLE = (1,)
"""Schema versions this release reads."""
MANIFEST = "sparing.json"
CARD = "README.md"
MAX_FILE_BYTES = 32 << 30
MAPPED = ".pack"
"""Payload files that end so are mapped instead of read: all processes that serve a model share one copy of them."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of ``sparing.json``."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012
    schema: Literal[1]
    kind: str
    files: dict[str, FileRecord]
    attachments: dict[str, FileRecord]
    config: dict[str, Any]
    description: Description
    task: str
    labels: tuple[str, ...]
    preprocessing: list[dict[str, Any]] | None
    postprocessing: dict[str, Any] | None = None
    digest: str = ""
    """SHA-256 of the canonical JSON of all other entries."""

    def context(self) -> Context:
        """Task name, labels, preprocessing and postprocessing, these built from their registered operations."""
        made = None if self.preprocessing is None else Preprocessing.from_config(self.preprocessing)
        after = None
        if self.postprocessing is not None:
            (after,) = Preprocessing.from_config([self.postprocessing]).operations
        return Context(self.task, self.labels, made, after)

    @classmethod
    def parse(cls, value: Any, where: str) -> Manifest:
        """Check a parsed manifest's version, shape and digest."""
        from pydantic import TypeAdapter, ValidationError

        if not isinstance(value, dict) or "schema" not in value:
            raise CorruptFile(f"{where} is not the manifest of a Sparing model: the entry 'schema' is missing")
        if type(value["schema"]) is not int or value["schema"] not in READABLE:
            raise CorruptFile(
                f"{where} has schema version {value['schema']!r}; this release reads "
                f"{', '.join(str(version) for version in READABLE)}"
            )
        try:
            manifest = TypeAdapter(cls).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise CorruptFile(f"{where}: {place}: {first['msg']}") from error
        if manifest.digest != digest_of(value):
            raise CorruptFile(f"{where} was changed after it was written: its digest does not match its content")
        return manifest


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own ``digest`` entry."""
    try:
        text = storage.canonical_json({key: value for key, value in manifest.items() if key != "digest"})
        return hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, TypeError, RecursionError) as error:  # ValueError: NaN, or a lone surrogate that UTF-8 lacks
        raise InvalidValue(f"a model's settings must be plain JSON: {error}") from error


def pack(predictor: Predictor) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, file name → content) of a predictor."""
    payload, config = predictor.payload()
    description = predictor.describe()
    for name in (*payload, *predictor.attachments):
        if not _NAME.fullmatch(name) or name in (MANIFEST, CARD) or (name in payload and name in predictor.attachments):
            raise InvalidValue(f"{name!r} cannot be the name of a file in a model folder")
    preprocessing = predictor.preprocessing
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": predictor.kind,
        "files": {name: _record(content) for name, content in payload.items()},
        "attachments": {name: _record(content) for name, content in predictor.attachments.items()},
        "config": config,
        "description": dataclasses.asdict(description),
        "task": predictor.context.task,
        "labels": list(predictor.labels),
        "preprocessing": None if preprocessing is None else preprocessing.to_config(),
    }
    after = predictor.context.postprocessing
    if after is not None:
        (manifest["postprocessing"],) = Preprocessing((after,)).to_config()
    return manifest | {"digest": digest_of(manifest)}, payload | predictor.attachments


def unpack(manifest: Manifest, content: Mapping[str, Any], trust: Collection[str] = ()) -> Predictor:
    """The predictor of a verified manifest and its files."""
    kind: type[Predictor] = registry.resolve("predictors", manifest.kind)
    predictor = kind.load_files({name: content[name] for name in manifest.files}, manifest, trust)
    predictor.attachments = {name: content[name] for name in manifest.attachments}
    return predictor


def nest(parts: Mapping[str, Predictor]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Payload and settings that hold whole predictors, for predictors made of others; see :func:`unnest`."""
    payload: dict[str, bytes] = {}
    manifests = {}
    for name, predictor in parts.items():
        manifests[name], files = pack(predictor)
        payload |= {f"{name}/{file}": content for file, content in files.items()}
    return payload, manifests


def unnest(files: Mapping[str, Any], manifests: Mapping[str, Any], trust: Collection[str] = ()) -> dict[str, Predictor]:
    """The predictors that :func:`nest` packed, by name."""
    parts = {}
    for name, value in manifests.items():
        manifest = Manifest.parse(value, f"the part {name!r}")
        inside = {
            file.removeprefix(f"{name}/"): content for file, content in files.items() if file.startswith(f"{name}/")
        }
        listed = manifest.files | manifest.attachments
        if inside.keys() != listed.keys():
            raise CorruptFile(f"the part {name!r} holds {sorted(inside)}, its manifest lists {sorted(listed)}")
        parts[name] = unpack(manifest, inside, trust)
    return parts


def save(predictor: Predictor, folder: Path, *, ledger: str = "") -> Path:
    """Write a predictor's folder, whole or not at all."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InvalidValue(f"{folder} is not a folder; a model is saved into a folder of its own")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise InvalidValue(
            f"{folder} holds files that are no model; choose a new or empty folder, they would be replaced"
        )
    manifest, content = pack(predictor)
    card = model_card(predictor, manifest, ledger)
    with storage.folder_atomic(folder) as scratch:
        for name, data in content.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(data)
        storage.write_json(scratch / MANIFEST, manifest)
        (scratch / CARD).write_text(card, encoding="utf-8")
    return folder


def load(folder: Path | str, trust: Collection[str] = (), *, threads: int | None = None) -> Predictor:
    """The predictor saved in ``folder``.

    Every file is hashed before anything is parsed; a folder that is truncated, tampered with or of a foreign version
    raises :class:`CorruptFile`. A model class from outside Sparing is imported only when its package is in ``trust``,
    otherwise :class:`UntrustedCode` is raised. ``threads``: see :class:`Predictor`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CorruptFile(f"{folder} is {'a file' if folder.exists() else 'missing'}; a model folder is expected there")
    _regular(folder, MANIFEST)
    manifest = Manifest.parse(storage.read_json(folder / MANIFEST), str(folder / MANIFEST))
    content = _verified(folder, manifest)
    predictor = unpack(manifest, content, (trust,) if isinstance(trust, str) else tuple(trust))
    if threads is not None:
        predictor.set_threads(threads)
    return predictor


def _record(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _regular(folder: Path, name: str) -> None:
    """Refuse anything but a plain file at ``folder/name``, links on the way to it included."""
    path = folder
    parts = name.split("/")
    for depth, part in enumerate(parts, start=1):
        path = path / part
        if path.is_symlink():
            raise CorruptFile(f"{path} is a symbolic link; a model folder holds plain files only")
        wanted = path.is_file() if depth == len(parts) else path.is_dir()
        if not wanted:
            found = "a folder" if path.is_dir() else "no plain file" if path.exists() else "missing"
            raise CorruptFile(f"{path} is {found}; a {'file' if depth == len(parts) else 'folder'} is expected there")


def _entries(folder: Path, prefix: str = "") -> Iterator[str]:
    """Names of everything in a folder that is not itself a folder, links included."""
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    yield f"{prefix}{entry.name}/"
                    yield from _entries(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    yield f"{prefix}{entry.name}"
    except OSError as error:
        raise storage._storage_error("read", folder, error) from error


def _verified(folder: Path, manifest: Manifest) -> dict[str, Any]:
    listed = manifest.files | manifest.attachments
    if twice := manifest.files.keys() & manifest.attachments.keys():
        raise CorruptFile(f"{folder / MANIFEST} lists {min(twice)!r} twice")
    for name in listed:
        if not _NAME.fullmatch(name) or name in (MANIFEST, CARD):
            raise CorruptFile(f"{folder / MANIFEST} lists a file under the forbidden name {name!r}")
    folders = {f"{parent}/" for name in listed for parent in _parents(name)}
    for found in _entries(folder):
        if found not in listed and found not in folders and found not in (MANIFEST, CARD):
            raise CorruptFile(f"{folder / found} does not belong to this model: the manifest does not list it")
    if os.path.lexists(folder / CARD):
        _regular(folder, CARD)
    content: dict[str, Any] = {}
    for name, record in listed.items():
        _regular(folder, name)
        path = folder / name
        size = path.stat().st_size
        if size != record.bytes:
            raise CorruptFile(f"{path} holds {size} bytes, the manifest says {record.bytes}")
        if name.endswith(MAPPED):
            digest = storage.sha256_of(path)  # by reading, which leaves pages that nobody needs unmapped
            content[name] = storage.map_bytes(path, MAX_FILE_BYTES)
        else:
            content[name] = storage.read_bytes(path, MAX_FILE_BYTES)
            digest = hashlib.sha256(content[name]).hexdigest()
        if digest != record.sha256:
            raise CorruptFile(f"{path} was changed after it was written: its SHA-256 does not match the manifest")
    return content


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def model_card(predictor: Predictor, manifest: Mapping[str, Any], ledger: str = "") -> str:
    """The folder's ``README.md``: what the model is, what it takes and gives, how to use it, what it cost."""
    description: Mapping[str, Any] = manifest["description"]

    def count(value: int | None) -> str:
        return "n.a." if value is None else f"{value:,}".replace(",", " ")

    rows = [
        ("task", predictor.context.task or "n.a."),
        ("kind", f"{predictor.kind}, run by {predictor.runtime}"),
        ("precision", description["precision"]),
        ("model bytes", count(description["model_bytes"])),
        ("parameters", f"{count(description['parameters'])}, of which {count(description['nonzero'])} not zero"),
        (
            "multiply-accumulates per sample",
            f"{count(description['macs'])} ({description['macs_rule'] or 'not counted'})",
        ),
        ("labels", ", ".join(predictor.labels) or "n.a."),
        ("preprocessing", " → ".join(entry["operation"] for entry in manifest["preprocessing"] or []) or "none"),
        ("postprocessing", (manifest.get("postprocessing") or {"operation": "none"})["operation"]),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    files = "\n".join(
        f"| `{name}` | {record['bytes']} | `{record['sha256']}` |"
        for name, record in (manifest["files"] | manifest["attachments"]).items()
    )
    call = "model.predict([raw_input])" if manifest["preprocessing"] is not None else "model(input_array)"
    parts = [
        f"# {_cell(predictor.context.task) or 'Model'} ({predictor.kind}, {_cell(description['precision'])})",
        f"| | |\n|---|---|\n{table}",
        f'```python\nimport sparing\n\nmodel = sparing.load("this/folder")\noutputs = {call}\n```',
        f"## What it cost\n\n{ledger.strip()}" if ledger.strip() else "",
        f"## Files\n\n| file | bytes | SHA-256 |\n|---|---|---|\n{files}",
        "Loading checks every file against these hashes. This card is not covered by them and may be edited.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
