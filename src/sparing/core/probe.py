"""A saved predictor in a fresh process: what memory it takes, and what energy where that can be read.

``python -m sparing.core.probe FOLDER INPUT RUNTIME THREADS ENERGY_SECONDS`` prints one JSON object. Nothing but the
predictor's runtime is imported: for an ONNX folder, no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sparing.core import files
from sparing.core.errors import SparingError, UntrustedCode
from sparing.core.predictor import load
from sparing.core.predictor.tree import grow, leaves, map_leaves, skeleton, to_numpy

TIMEOUT_S = 600


@dataclass(frozen=True)
class Probe:
    """What the fresh process found."""

    peak_mib: float
    """Highest resident memory from start to the last answer."""
    runtime_mib: float
    """The same before the folder was touched: interpreter and runtime."""
    energy_mj: float | None
    """Energy of one inference, or None."""
    energy_note: str
    """The counter and the calls it was read over, or why there is none."""
    modules: tuple[str, ...]
    """Top-level modules that were imported."""


def probe(
    folder: Path, inputs: tuple[Any, ...], runtime: str, *, threads: int = 1, energy_seconds: float = 0.0
) -> Probe:
    """Run the predictor saved in ``folder`` on ``inputs`` (trees of arrays) in a process of its own.

    Raises the child's :class:`SparingError` with its message (:class:`UntrustedCode` as such), and SparingError when
    the child dies or the inputs hold anything but arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in leaves(map_leaves(to_numpy, inputs)):
        if not isinstance(leaf, np.ndarray | np.generic | int | float) or np.asarray(leaf).dtype.hasobject:
            raise SparingError(f"input {path or 'itself'} is a {type(leaf).__name__}, which no file of arrays can hold")
        arrays[str(len(arrays))] = np.asarray(leaf)
    with tempfile.TemporaryDirectory(prefix="sparing-probe-") as scratch:
        source = Path(scratch) / "input"
        files.write_arrays(source.with_suffix(".npz"), arrays)
        files.write_json(source.with_suffix(".json"), skeleton(inputs))
        command = [sys.executable, "-m", "sparing.core.probe", str(folder.absolute()), str(source)]
        command += [runtime, str(threads), str(energy_seconds)]
        # the child must find this very sparing, also when it was put on sys.path by hand
        root = str(Path(__file__).parents[2])
        path_variable = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        try:
            done = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": path_variable},
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise SparingError(f"the predictor in {folder} gave no answer within {TIMEOUT_S} s") from error
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise SparingError(f"a fresh process could not run {folder} (exit status {done.returncode}): {last}") from None
    if "error" in found:
        raise (UntrustedCode if found["type"] == "UntrustedCode" else SparingError)(found["error"])
    return Probe(**found | {"modules": tuple(found["modules"])})


def main(arguments: list[str]) -> int:
    """The child's side of :func:`probe`."""
    folder, source, runtime, threads, energy_seconds = arguments
    try:
        if runtime.isidentifier() and find_spec(runtime):
            __import__(runtime)
        arrays = files.read_arrays(Path(f"{source}.npz"))
        flat = [arrays[str(index)] for index in range(len(arrays))]
        inputs = grow(files.read_json(Path(f"{source}.json")), flat)
        before = peak_mib()
        predictor = load(Path(folder))
        predictor.set_threads(int(threads))
        for _ in range(3):  # a runtime may plan its memory in the first calls
            predictor(*inputs)
        found: dict[str, Any] = {"peak_mib": peak_mib(), "runtime_mib": before}
        found["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
        found |= _energy(partial(predictor, *inputs), float(energy_seconds))
    except SparingError as error:
        found = {"error": str(error), "type": type(error).__name__}
    print(json.dumps(found), flush=True)
    return 1 if "error" in found else 0


def _energy(call: Any, seconds: float) -> dict[str, Any]:
    if seconds <= 0:
        return {"energy_mj": None, "energy_note": "not asked for"}
    from sparing.core.energy import joules_per_call, open_counter

    try:
        joules, name = open_counter()
        each, count = joules_per_call(call, joules, seconds)
    except Exception as error:  # zeus raises classes of its own, and OSError where the counters are locked away
        return {"energy_mj": None, "energy_note": f"no readable counter: {error}"}
    if each <= 0:
        return {"energy_mj": None, "energy_note": f"{name}: did not move in {count} inferences"}
    return {"energy_mj": each * 1000, "energy_note": f"{name}, over {count} inferences"}


def peak_mib() -> float:
    """The highest resident memory of this process so far, in MiB."""
    try:
        # not ru_maxrss: on Linux a child starts with its parent's, which says nothing about the child
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
