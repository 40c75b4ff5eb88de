"""Folders that refuse, whoever asks; no fault outlives its test."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparing.core import files


@pytest.fixture
def read_only() -> Callable[[Path], AbstractContextManager[None]]:
    """``with read_only(folder):`` nothing below it can be made, renamed or removed, not even by root."""

    @contextmanager
    def lock(folder: Path) -> Iterator[None]:
        inside = str(folder)

        def refuse(path: Any) -> None:
            if str(path).startswith(inside):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
                original = getattr(os, name)
                patch.setattr(os, name, lambda path, *a, _o=original, **k: (refuse(path), _o(path, *a, **k))[1])
            original_open = os.open

            def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
                if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    refuse(path)
                return original_open(path, flags, *rest, **more)

            patch.setattr(os, "open", open_)
            original_path_open = Path.open

            def path_open(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
                if set(mode) & set("wxa+"):
                    refuse(self)
                return original_path_open(self, mode, *rest, **more)

            patch.setattr(Path, "open", path_open)
            yield

    return lock


@pytest.fixture(autouse=True)
def _no_hook() -> Iterator[None]:
    yield
    files.fault_hook = None
