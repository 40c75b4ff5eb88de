"""What the guests share: a small task of their own, and the proof that a run survives being killed anywhere."""

from __future__ import annotations

import hashlib
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from sparing.core import files
from sparing.core.collation import batches_of
from sparing.core.fingerprint import fingerprint
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.pipeline import Run, run
from sparing.core.predictor import build_model
from sparing.core.store import Progress, Store
from sparing.core.task import Evaluation, Splits, Task

METER: dict[str, Any] = {"min_seconds": 0, "max_seconds": 0.01, "memory": False, "energy": "off", "batch": 4}
"""Nothing of what these tests prove depends on a clock."""


class Net(nn.Module):
    """Two layers with dropout: (N, inputs) → logits (N, classes)."""

    def __init__(self, inputs: int = 6, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x).relu()))


class Points(Task):
    """Points of three classes around their centres in six dimensions."""

    name = "points"
    unit: ClassVar[str] = "point"
    metrics = CLASSIFICATION_METRICS
    capabilities = frozenset({"classification"})
    labels = ("a", "b", "c")

    def __init__(self, seed: int = 0, spread: float = 1.5) -> None:
        self.seed, self.spread = seed, spread

    def part(self, count: int, part: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(1000 * self.seed + part)
        centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(self.seed)) * 2
        y = torch.arange(count) % 3
        return TensorDataset(centres[y] + self.spread * torch.randn(count, 6, generator=draw), y)

    def splits(self, root: Path | None) -> Splits:
        return Splits(self.part(96, 1), self.part(24, 2), self.part(24, 3), self.part(60, 4))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        pairs = [(self.outputs(predictor, batch), batch[1]) for batch in batches_of(split, 32)]
        logits = np.concatenate([np.asarray(out) for out, _ in pairs])
        return evaluate_classification(logits, np.concatenate([np.asarray(y) for _, y in pairs]), self.labels)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return (torch.randn(batch, 6, generator=torch.Generator().manual_seed(0)),)

    def default_model(self) -> nn.Module:
        return build_model(Net)

    def fingerprint(self) -> str:
        return fingerprint([self.name, self.seed, self.spread])


def go(task: Task, *steps: Any, **options: Any) -> Callable[[Path], Run]:
    """A run of ``steps`` with a store and an output folder below the folder it is given."""

    options = {"meter": METER} | options

    def start(folder: Path) -> Run:
        return run(task=task, steps=steps, store=Store(folder / "store"), out=folder / "out", **options)

    return start


def survives_kills(start: Callable[[Path], Run], folder: Path, deaths: int = 5) -> Run:
    """Run once unbroken and once killed again and again; both must leave the same ledger and the same tensors.

    Each attempt is a fork that sends itself SIGKILL inside one of the write windows (before write, fsync or rename),
    later in every attempt; a last attempt in this process completes the run. Returns the unbroken run.
    """
    count, keeps_progress = 0, False

    def counting(stage: str, target: Path) -> None:
        nonlocal count, keeps_progress
        count += 1
        keeps_progress |= target.suffix == ".state"

    files.fault_hook = counting
    try:
        whole = start(folder / "whole")
    finally:
        files.fault_hook = None
    stride = max(1, count // (deaths + 1))
    killed = [_dies(start, folder / "broken", number * stride + 1) for number in range(deaths + 1)]
    assert sum(killed) >= min(deaths, count) // 2, f"of {deaths + 1} attempts only {sum(killed)} were killed"
    again = start(folder / "broken")
    assert keeps_progress == (folder / "broken" / "went_on").exists(), "no attempt went on from the middle of its work"
    assert again.ledger.canonical() == whole.ledger.canonical()
    assert tensors(again) == tensors(whole)
    assert results(folder / "broken" / "store") == results(folder / "whole" / "store")
    left = list((folder / "broken" / "store").glob("progress/*/*/[0-9]*.state"))
    assert not left, f"the progress of finished work was left behind: {left}"
    return whole


def _dies(start: Callable[[Path], Run], folder: Path, moment: int) -> bool:
    """True when the attempt was killed before its ``moment``-th write event, False when it finished first."""
    child = os.fork()
    if child == 0:
        seen = 0

        def kill(stage: str, target: Path) -> None:
            nonlocal seen
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def load(progress: Progress) -> Any:
            if (state := load_progress(progress)) is not None:
                (folder / "went_on").touch()
            return state

        files.fault_hook, load_progress = kill, Progress.load
        Progress.load = load  # type: ignore[method-assign]
        try:
            start(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "an attempt failed, see its traceback"
    return False


def tensors(done: Run) -> dict[str, str]:
    """SHA-256 of the last model's tensors and of the saved folder's files."""
    state = done.job.model.state_dict() if done.job.model is not None else {}
    found = {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in state.items()}
    assert done.folder is not None
    if (done.folder / "model" / "sparing.json").is_file():
        manifest = files.read_json(done.folder / "model" / "sparing.json")
        found |= {name: record["sha256"] for name, record in manifest["files"].items()}
    return found


def results(store: Path) -> dict[str, Any]:
    """Every stored result by key and name: the digests of its files, except of measurements."""
    metas = {entry.folder: files.read_json(entry.folder / "entry.json") for entry in Store(store).entries()}
    found = {f"{folder.parent.name}/{meta['name']}": meta["files"] for folder, meta in metas.items()}
    assert len(found) == len(metas), "a result is listed twice"
    return {name: digests for name, digests in found.items() if not name.endswith("/row")}
