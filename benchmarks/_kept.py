"""Trainings of benchmarks that are kept as they end, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparing.core import files
from sparing.core.fingerprint import fingerprint


class Kept:
    """Results of trainings in a file, by name; another file when one of ``depends`` has changed."""

    def __init__(self, name: str, *depends: Any) -> None:
        parts = [item if isinstance(item, str | int | float | tuple) else inspect.getsource(item) for item in depends]
        key = fingerprint([*map(str, parts), torch.__version__])[:16]
        self.file = Path(tempfile.gettempdir()) / "sparing-benchmarks" / f"{name}-{key}.json"
        self.results: dict[str, Any] = files.read_json(self.file) if self.file.is_file() else {}

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this name, computed if it is not there."""
        if name not in self.results:
            self.results[name] = compute()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self.file, self.results)
            print(name, json.dumps(self.results[name]), flush=True)
        return dict(self.results[name])
