"""Installing: native code where there is a compiler, cleanly none where there is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what building needs."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=leave_out)
    return copy


def build(source: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=source,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_without_a_compiler_nothing_fails_and_nothing_is_built(source: Path) -> None:
    missing = {
        "CC": "/nonexistent/cc",
        "CXX": "/nonexistent/c++",
        "LDSHARED": "/nonexistent/ld",
        "LDCXXSHARED": "/no/ld",
    }
    done = build(source, "build_ext", "--inplace", **missing)
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stderr, "the build says what is missing"
    assert not list(source.rglob("*.so"))
    probe = (
        "from sparing.engine import cpu_capability, doctor_lines\n"
        "assert not cpu_capability().compiled\nprint(doctor_lines())"
    )
    found = subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {"PYTHONPATH": str(source / "src")},
        capture_output=True,
        text=True,
    )
    assert "ONNX Runtime serves: it was not compiled" in found.stdout, found.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_wheel_holds_the_library_and_is_for_any_python(source: Path, tmp_path: Path) -> None:
    """The installation of a wheel made by pip's own route, without a network."""
    done = build(source, "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "wheels"))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "sparing/engine/_native.so" in archive.namelist()
        archive.extractall(tmp_path / "installed")
    code = "from sparing.engine import cpu_capability\nprint(cpu_capability().usable)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert "portable" in found.stdout, found.stderr


def test_the_source_distribution_holds_the_sources_and_no_library(source: Path, tmp_path: Path) -> None:
    done = build(source, "-q", "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    names = subprocess.run(["tar", "tzf", str(archive)], capture_output=True, text=True, check=True).stdout
    for name in ("engine.h", "operators.h", "gelu_table.h", "isa_avx512.h", "path_amx.cpp", "entry.cpp"):
        assert f"native/{name}" in names
    assert ".so" not in names
