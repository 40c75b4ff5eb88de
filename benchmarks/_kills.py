"""Runs killed at random moments and inside write windows, until they finish; then compared with an unbroken run.

Warm kills fork from this process, which has imported everything and computed nothing; cold ones are command lines.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparing.core import files
from sparing.core.ledger import Ledger
from sparing.testing.kills import results_of

RECIPE = """
task: digits
model: {{name: mlp, widths: [32], dropout: 0.3}}
seed: {seed}
meter: {{min_seconds: 0, max_seconds: 0.01, memory: false, energy: "off", batch: 4}}
steps:
  - train:
      id: teacher
      epochs: 3
      batch_size: 64
      scheduler: cosine
      workers: {workers}
      checkpoint_every_batches: 4
  - distil:
      id: student
      teacher: teacher
      model: {{name: convnet, widths: [4, 8]}}
      epochs: 2
      workers: {workers}
      restore_best: true
      checkpoint_every_batches: 3
  - quantize: {{goal: bytes, max_loss: 1.0}}
"""


def result(folder: Path) -> dict[str, Any]:
    """What two runs of one recipe share: the ledger without volatile figures, and the digest of every tensor."""
    manifest = files.read_json(folder / "out" / "model" / "sparing.json")
    return {
        "ledger": Ledger.load(folder / "out").canonical(),
        "model": {name: record["sha256"] for name, record in manifest["files"].items()},
        "store": results_of(folder / "store"),
    }


def _recipe(folder: Path, seed: int, workers: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(seed=seed, workers=workers))
    return path


def _run(recipe: Path, folder: Path) -> None:
    from sparing.core.pipeline import run
    from sparing.core.store import Store

    run(recipe, store=Store(folder / "store"), out=folder / "out")


def _fork(action: Callable[[], None]) -> int:
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.setpgid(0, 0)  # so that a kill takes data workers along
            action()
            status = 0
        finally:
            os._exit(status)
    return child


def _wait(child: int) -> bool:
    """True when it was killed, False when it finished."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise RuntimeError(f"a run failed with status {os.waitstatus_to_exitcode(status)}")
    return False


def _completed(recipe: Path, folder: Path) -> None:
    _wait(_fork(lambda: _run(recipe, folder)))


def _killed_at_random(recipe: Path, folder: Path, after_s: float, alone: bool) -> bool:
    """``alone``: data workers are not killed along, but left to find out for themselves."""
    child = _fork(lambda: _run(recipe, folder))
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):  # it finished first
        (os.kill if alone else os.killpg)(child, signal.SIGKILL)
    return _wait(child)


def _killed_writing(recipe: Path, folder: Path, event: int) -> bool:
    """Die at write event number ``event``: before a write, before its fsync, or before its rename."""

    def action() -> None:
        seen = 0

        def hook(stage: str, target: Path) -> None:
            nonlocal seen
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

        files.fault_hook = hook
        _run(recipe, folder)

    return _wait(_fork(action))


def warm(
    kills: int,
    rng: random.Random,
    report: Callable[[str], None],
    workers_of: Sequence[int] = (0, 0, 0, 2),
    deaths: int = 8,
) -> dict[str, Any]:
    """At least ``kills`` kills of forked runs, half at random moments, half inside write windows.

    Each run has as many data workers as is drawn from ``workers_of``, and up to ``deaths`` deaths before it may finish.
    """
    for module in ("lightning.pytorch", "onnxruntime.quantization", "torch.onnx", "sklearn.datasets"):
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    done, unequal, runs, windows = 0, 0, 0, 0
    while done < kills:
        seed, workers = rng.randrange(1000), rng.choice(workers_of)
        with tempfile.TemporaryDirectory() as scratch:
            whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
            recipe, start = _recipe(whole, seed, workers), time.perf_counter()
            _completed(recipe, whole)
            seconds = time.perf_counter() - start
            recipe = _recipe(broken, seed, workers)
            for _ in range(deaths):
                if rng.random() < 0.5:
                    killed = _killed_at_random(recipe, broken, rng.uniform(0, seconds), rng.random() < 0.5)
                else:
                    killed = _killed_writing(recipe, broken, rng.randrange(1, 40))
                    windows += killed
                done += killed
            _completed(recipe, broken)
            runs += 1
            if result(whole) != result(broken):
                unequal += 1
                report(f"seed {seed}, {workers} workers: the broken run differs")
    return {"kills": done, "inside write windows": windows, "runs": runs, "unequal": unequal}


def cold(kills: int, rng: random.Random, report: Callable[[str], None], deaths: int = 5) -> dict[str, Any]:
    """At least ``kills`` kills of the command line at random moments of its life, up to ``deaths`` in each run."""
    command = [str(Path(sys.executable).with_name("sparing")), "run", "--quiet"]
    done, unequal, runs = 0, 0, 0

    def arguments(recipe: Path, folder: Path) -> list[str]:
        return [*command, str(recipe), "--store", str(folder / "store"), "--out", str(folder / "out")]

    while done < kills:
        seed = rng.randrange(1000)
        with tempfile.TemporaryDirectory() as scratch:
            whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
            start = time.perf_counter()
            subprocess.run(arguments(_recipe(whole, seed, 0), whole), check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            recipe = _recipe(broken, seed, 0)
            for _ in range(deaths):
                process = subprocess.Popen(arguments(recipe, broken), stdout=subprocess.DEVNULL, start_new_session=True)
                try:
                    process.wait(rng.uniform(0.3, 1.0) * seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    done += 1
            subprocess.run(arguments(recipe, broken), check=True, stdout=subprocess.DEVNULL)
            runs += 1
            if result(whole) != result(broken):
                unequal += 1
                report(f"command line, seed {seed}: the broken run differs")
    return {"kills": done, "runs": runs, "unequal": unequal}
