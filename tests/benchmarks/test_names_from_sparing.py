"""What benchmarks import from Sparing is there: they are run by hand, and would tell only then."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


def missing(source: str) -> list[str]:
    """``module.name`` of everything that a program imports from Sparing and that is not there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparing":
            module = import_module(str(node.module))
            wanted = (f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name))
            found += [name for name in wanted if not hasattr(module, "__path__") or find_spec(name) is None]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_name_is_there(file: Path) -> None:
    assert missing(file.read_text()) == []


def test_a_name_that_is_not_there_is_found() -> None:
    source = "from sparing.models import emo\ndef later():\n    from sparing.models.emo import EMO, applied\n"
    assert missing(source) == ["sparing.models.emo.applied"]
