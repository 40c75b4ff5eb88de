"""The machine and the versions a ledger was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DATA_FOLDER: ContextVar[Path | None] = ContextVar("data folder", default=None)
"""The data folder given for the recipe that is being planned: a model is outlined before any data are read."""

PACKAGES = ("torch", "lightning", "onnxruntime", "onnx", "numpy", "scipy")
FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""CPU features that decide how fast a number format is."""


@cache
def environment() -> dict[str, Any]:
    """JSON values: Sparing's version and revision, packages, Python, operating system, CPU and its features."""
    from sparing.core.clock import usable_cores

    model, features = cpu()
    return {
        "sparing": version_of("sparing"),
        "revision": _revision(),
        "packages": {name: found for name in PACKAGES if (found := version_of(name))},
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": model,
        "cpu_features": list(features),
        "cores": os.cpu_count() or 1,
        "usable_cores": len(usable_cores()),
        "omp_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "memory_mib": _memory_mib(),
    }


def version_of(package: str) -> str:
    """The installed version of a package; empty when it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def cpu() -> tuple[str, tuple[str, ...]]:
    """(model name, those of :data:`FEATURES` it has); no features where the system has no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = entries.get("flags", entries.get("Features", "")).split()
    model = entries.get("model name") or platform.processor() or platform.machine()
    return model, tuple(name for name in FEATURES if name in flags)


def _memory_mib() -> int:
    import psutil

    return int(psutil.virtual_memory().total) >> 20


def _revision() -> str:
    """The commit this source is checked out at, marked when it was changed since; empty for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
