"""One small finished run, shared by the tests of what looks at finished runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparing.cli import main

RECIPE = """\
# A small run on the embedded digits.
task: digits
model: {name: mlp, widths: [16]}
meter: {min_seconds: 0, max_seconds: 0.3, memory: false, energy: estimate}
steps:
  - train: {id: baseline, epochs: 2}
  - quantize: {id: int8, goal: bytes, max_loss: 1.0}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    base = tmp_path_factory.mktemp("finished")
    (base / "small.yaml").write_text(RECIPE, encoding="utf-8")
    assert main(["run", str(base / "small.yaml"), "--out", str(base / "run"), "--quiet"]) == 0
    return base / "run"


@pytest.fixture
def sparing() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in a fresh process."""

    def call(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sparing.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **more)  # type: ignore[call-overload]

    return call
