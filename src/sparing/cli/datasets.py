"""``sparing data list`` and ``sparing data check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparing.cli import output
from sparing.cli.output import Finished
from sparing.core.errors import SparingError


def list_data(root: Path | None, *, json: bool) -> Any:
    """The published data sets with a reader, and whether each is in the data folder; a document."""
    from sparing.data.catalogue import listing
    from sparing.data.root import data_root

    lines = listing(root)
    if not json:
        shown = output.table("data set", "there", "what it is", "licence", "folder")
        for line in lines:
            cells = (line.name, "yes" if line.present else "no", line.summary, line.licence, line.folder)
            shown.add_row(*map(output.literal, cells))
        output.say(f"Data folder: {data_root(root)}")
        output.console().print(shown)
    return {"root": str(data_root(root)), "data": [asdict(line) for line in lines]}


def check_data(names: Sequence[str], root: Path | None, *, json: bool) -> Any:
    """Read each data set or image folder completely; a document, exit code 1 when one is not sound."""
    from sparing.data.catalogue import READERS, listing

    chosen = list(names) or [line.name for line in listing(root) if line.present]
    found = [_check(name, root) for name in chosen if name in READERS or not _is_folder(name)]
    found += [_check_folder(Path(name)) for name in chosen if name not in READERS and _is_folder(name)]
    if not json:
        for one in found:
            counts = ", ".join(f"{split} {count}" for split, count in one["splits"].items())
            output.say(f"{one['name']}: {'sound' if one['ok'] else 'NOT sound'}{f' ({counts})' if counts else ''}")
            output.say(*(f"  {file}: {state}" for file, state in one["files"].items()))
            output.say(*(f"  {line}" for line in one["problem"].splitlines()))
        if not found:
            output.say("no data set is in the data folder; see: sparing data list")
    return Finished(found, 0 if all(one["ok"] for one in found) else 1)


def _is_folder(name: str) -> bool:
    return Path(name).is_dir()


def _check(name: str, root: Path | None) -> dict[str, Any]:
    from sparing.data.catalogue import check

    return asdict(check(name, root))


def _check_folder(folder: Path) -> dict[str, Any]:
    """Decode every image of a user's own folder."""
    import numpy as np

    from sparing.tasks.images.folder import ImageFolder

    splits: dict[str, int] = {}
    try:
        found = ImageFolder(str(folder.absolute()), memory_mb=0).splits(None)
        for split in ("train", "val", "calibration", "test"):
            images = getattr(found, split)
            for start in range(0, len(images), 256):
                images.batch(np.arange(start, min(start + 256, len(images))))
            splits[split] = len(images)
    except SparingError as error:
        return {"name": str(folder), "ok": False, "splits": splits, "files": {}, "problem": str(error)}
    return {"name": str(folder), "ok": True, "splits": splits, "files": {}, "problem": ""}
