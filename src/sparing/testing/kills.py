"""Proof that a run which is killed and started again ends as one that never was."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparing.core import files
from sparing.core.fingerprint import fingerprint
from sparing.core.pipeline import Run
from sparing.core.store import Progress, Store


def survives_kills(start: Callable[[Path], Run], folder: Path, deaths: int = 4) -> Run:
    """Run once unbroken and once killed again and again; both must leave the same ledger and the same tensors.

    ``start(folder)`` runs with its store in ``folder/store`` and its output in ``folder/out``. Each attempt is a fork
    that sends itself SIGKILL inside one of the write windows (before write, fsync or rename), later in every attempt; a
    last attempt in this process completes the run. Returns the unbroken run.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork of a process that has used OpenMP threads must not use them
    try:
        return _survives_kills(start, folder, deaths)
    finally:
        torch.set_num_threads(threads)


def _survives_kills(start: Callable[[Path], Run], folder: Path, deaths: int) -> Run:
    events: list[tuple[str, bool]] = []

    def counting(stage: str, target: Path) -> None:
        events.append((stage, target.suffix == ".state"))

    files.fault_hook = counting
    try:
        whole = start(folder / "whole")
    finally:
        files.fault_hook = None
    broken = folder / "broken"
    broken.mkdir()
    stride = max(1, len(events) // (deaths + 1))
    moments = [number * stride + 1 for number in range(deaths + 1)]
    if ("rename", True) in events:  # die once with a state of unfinished work in place, to go on from
        moments.insert(1, max(moments[0], events.index(("rename", True)) + 2))
    killed = [_dies(start, broken, moment) for moment in moments]
    assert sum(killed) >= min(deaths, len(events)) // 2, f"of {len(moments)} attempts only {sum(killed)} were killed"
    again = start(broken)
    if ("rename", True) in events:
        assert (broken / "went_on").exists(), "no attempt went on from the middle of its work"
    assert again.ledger.canonical() == whole.ledger.canonical(), "the ledgers differ"
    assert _tensors(again) == _tensors(whole), "the tensors differ"
    assert results_of(broken / "store") == results_of(folder / "whole" / "store"), "the stored results differ"
    left = list((broken / "store").glob("progress/*/*/[0-9]*.state"))
    assert not left, f"the progress of finished work was left behind: {left}"
    return whole


def _dies(start: Callable[[Path], Run], folder: Path, moment: int) -> bool:
    """True when the attempt was killed before its ``moment``-th write event, False when it finished first."""
    child = os.fork()
    if child == 0:
        _attempt(start, folder, moment)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"an attempt died of signal {os.WTERMSIG(status)}"
        return True
    assert os.WEXITSTATUS(status) == 0, "an attempt failed, see its traceback"
    return False


def _attempt(start: Callable[[Path], Run], folder: Path, moment: int) -> None:
    """The child's side: never returns."""
    seen, load_progress = 0, Progress.load

    def kill(stage: str, target: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def load(progress: Progress) -> Any:
        if (state := load_progress(progress)) is not None:
            (folder / "went_on").touch()
        return state

    try:
        files.fault_hook = kill
        Progress.load = load  # type: ignore[method-assign,assignment]
        start(folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _tensors(done: Run) -> dict[str, str]:
    """Digests of the last model's tensors and of the saved folder's files."""
    state = done.job.model.state_dict() if done.job.model is not None else {}
    found = {name: fingerprint(value) for name, value in state.items()}
    manifest = None if done.folder is None else done.folder / "model" / "sparing.json"
    if manifest is not None and manifest.is_file():
        found |= {name: record["sha256"] for name, record in files.read_json(manifest)["files"].items()}
    return found


def results_of(store: Path) -> dict[str, Any]:
    """Every stored result by key and name: the digests of its files, except of measurements.

    Those are rows, and what a step stores under the name "timings" because it has read a clock.
    """
    metas = {entry.folder: files.read_json(entry.folder / "entry.json") for entry in Store(store).entries()}
    found = {f"{folder.parent.name}/{meta['name']}": meta["files"] for folder, meta in metas.items()}
    assert len(found) == len(metas), "a result is listed twice"
    return {name: digests for name, digests in found.items() if not name.endswith(("/row", "/timings"))}
