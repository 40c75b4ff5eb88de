"""``sparing cache`` and ``sparing doctor``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparing.cli import output
from sparing.cli.output import Finished
from sparing.core import text
from sparing.core.errors import InvalidValue, SparingError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

COMPROMISED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""Releases that stole credentials on import (GHSA-w37p-236h-pfx3)."""
DOT_PRODUCTS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})
"""CPU features without which INT8 seldom beats FP32."""
LITTLE_DISK = 2e9
IMPORT_SECONDS = 120


def tend_cache(prune: float | None, clear: bool, store: Path | None, *, json: bool) -> Any:
    """Show the store of finished work, after pruning or clearing it; a document."""
    from sparing.core.store import Store

    if prune is not None and clear:
        raise InvalidValue("--prune and --clear exclude each other")
    kept = Store(store)
    freed = kept.clear() if clear else kept.prune(prune) if prune is not None else None
    entries = sorted(kept.entries(), key=lambda entry: entry.made, reverse=True)
    size = kept.size()
    if not json:
        output.say(f"{kept.path}: {len(entries)} results, {text.number(size, 'B')}")
        if freed is not None:
            output.say(f"freed {text.number(freed, 'B')}")
        shown = output.table("result", "size", "made", "took", right=("size", "took"))
        for entry in entries:
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.made))
            cells = (entry.name, text.number(entry.bytes, "B"), made, text.number(entry.wall_s, "s"))
            shown.add_row(*map(output.literal, cells))
        if entries:
            output.console().print(shown)
    return {
        "path": str(kept.path),
        "bytes": size,
        "freed": freed,
        "entries": [
            {"name": e.name, "bytes": e.bytes, "made": e.made, "wall_s": e.wall_s, "folder": str(e.folder)}
            for e in entries
        ],
    }


@dataclass(frozen=True)
class Finding:
    """One line of ``sparing doctor``."""

    name: str
    state: Literal["ok", "note", "wrong"]
    detail: str
    cure: str = ""


def examine(*, json: bool) -> Any:
    """Everything about this machine that decides whether Sparing works and how fast; a document, exit code 1 if bad."""
    from sparing.core.environment import environment

    findings = [
        *_machine(environment()),
        *_packages(),
        _lightning(),
        _torchvision(),
        _torch_threads(),
        *_engine(),
        *_extras(),
        _energy_counter(),
        *_store(),
        _data(),
    ]
    bad = [finding for finding in findings if finding.state == "wrong"]
    if not json:
        for finding in findings:
            mark = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}[finding.state]
            output.say(f"{mark}  {finding.name}: {finding.detail}")
            if finding.cure:
                output.say(f"       → {finding.cure}")
        output.say("", f"{len(bad)} of {len(findings)} checks found something wrong" if bad else "nothing is wrong")
    document = {"ok": not bad, "environment": environment(), "findings": [asdict(finding) for finding in findings]}
    return Finished(document, 1 if bad else 0)


def _machine(found: dict[str, Any]) -> list[Finding]:
    features = found["cpu_features"]
    cores, usable = found["cores"], found["usable_cores"]
    fast = DOT_PRODUCTS & set(features)
    return [
        Finding("system", "ok", f"{found['os']}, {found['machine']}, Python {found['python']}"),
        Finding("sparing", "ok", found["sparing"] + (f" ({found['revision']})" if found["revision"] else "")),
        Finding("processor", "ok", f"{found['cpu'] or 'unknown'}; {', '.join(features) or 'no known feature'}"),
        Finding("INT8 dot products", "ok", ", ".join(sorted(fast)))
        if fast
        else Finding("INT8 dot products", "note", "none: INT8 makes models smaller here, but seldom faster"),
        Finding(
            "cores",
            "ok" if usable == cores else "note",
            f"{usable} of {cores} usable; OMP_NUM_THREADS is {found['omp_threads'] or 'not set'}",
        ),
        Finding("memory", "ok" if found["memory_mib"] >= 2048 else "note", f"{found['memory_mib']} MiB"),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _requirements(extra: str = "") -> list[Requirement]:
    """What this installation of Sparing declares to need, itself or for one of its extras."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in requires("sparing") or ()]
    except PackageNotFoundError:
        return []
    plain = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [one for one in declared if one not in plain and one.marker and one.marker.evaluate({"extra": extra})]


def _packages() -> list[Finding]:
    declared = _requirements()
    if not declared:
        return [
            Finding("packages", "note", "sparing is not installed as a package, so its requirements cannot be read")
        ]
    missing = [one.name for one in declared if not _version(one.name)]
    old = [
        f"{one.name} {_version(one.name)} ({one.specifier} is needed)"
        for one in declared
        if _version(one.name) and not one.specifier.contains(_version(one.name), prereleases=True)
    ]
    if missing or old:
        wrong = [*(f"{name} is missing" for name in missing), *old]
        return [Finding("packages", "wrong", "; ".join(wrong), "pip install --upgrade sparing")]
    named = ("torch", "lightning", "onnxruntime", "onnx", "numpy", "pydantic")
    return [Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in named))]


def _lightning() -> Finding:
    for package, releases in COMPROMISED.items():
        if (found := _version(package)) in releases:
            return Finding(
                package,
                "wrong",
                f"{found} is a compromised release that steals credentials when imported (GHSA-w37p-236h-pfx3)",
                f"pip uninstall {package}, change every credential this machine holds, "
                "then pip install 'lightning>=2.6.5'",
            )
    found = _version("lightning")
    if not found:
        return Finding("lightning", "wrong", "missing: nothing can be trained", "pip install 'lightning>=2.6.5'")
    return Finding("lightning", "ok", f"{found}, none of the compromised releases 2.6.2 and 2.6.3")


def _torchvision() -> Finding:
    """A torchvision that does not belong to the installed torch breaks the import of torchmetrics and Lightning."""
    found = _version("torchvision")
    if not found:
        return Finding("torchvision", "ok", "absent; Sparing does not use it")
    done = subprocess.run(
        [sys.executable, "-c", "import torch, torchvision; torchvision.ops.nms"],
        capture_output=True,
        text=True,
        timeout=IMPORT_SECONDS,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        return Finding(
            "torchvision",
            "wrong",
            f"{found} does not fit torch {_version('torch')}, which breaks torchmetrics and Lightning: {why}",
            "pip uninstall torchvision, or install the release that belongs to this torch",
        )
    return Finding("torchvision", "note", f"{found} is there and fits; Sparing does not use it")


def _torch_threads() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        return Finding("torch", "wrong", f"cannot be imported: {error}", "pip install --force-reinstall torch")
    devices = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {devices}")


def _engine() -> list[Finding]:
    """Whether the engine's native code is here, and which of its instruction paths runs."""
    from sparing.engine.native import cpu_capability, doctor_lines

    compiled = cpu_capability().compiled
    cure = (
        "" if compiled else "install a C++ compiler (g++ or clang++), then install sparing again, as it was installed"
    )
    return [Finding(name, "ok" if compiled else "note", detail, cure) for name, detail in doctor_lines()]


def _extras() -> list[Finding]:
    try:
        names = metadata("sparing").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return []
    findings = []
    for name in names:
        packages = [one.name for one in _requirements(name) if one.name != "sparing"]
        if not packages or name == "dev":
            continue
        missing = [package for package in packages if not _version(package)]
        detail = f"not installed: {', '.join(missing)}" if missing else ", ".join(packages)
        cure = f"pip install 'sparing[{name}]'" if missing else ""
        findings.append(Finding(f"extra {name}", "note" if missing else "ok", detail, cure))
    return findings


def _energy_counter() -> Finding:
    from sparing.core.energy import counter_missing

    missing = counter_missing()
    if missing:
        return Finding("energy counter", "note", f"{missing}; energy is estimated and marked est.")
    return Finding("energy counter", "ok", "zeus is installed; rows say measured where it finds a counter, else est.")


def _store() -> list[Finding]:
    from sparing.core.store import Store

    try:
        path = Store().path
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except (OSError, SparingError) as error:
        return [
            Finding("store", "wrong", f"cannot be written: {error}", "set SPARING_STORE to a folder you may write to")
        ]
    free = shutil.disk_usage(path).free
    shown = f"{path} can be written, {text.number(free, 'B')} free"
    return [Finding("store", "note" if free < LITTLE_DISK else "ok", shown)]


def _data() -> Finding:
    from sparing.data.catalogue import listing
    from sparing.data.root import data_root

    root = data_root()
    there = [line.name for line in listing() if line.present]
    source = "$SPARING_DATA" if os.environ.get("SPARING_DATA") else "default"
    return Finding("data", "ok" if there else "note", f"{root} ({source}): {', '.join(there) or 'no known data set'}")
