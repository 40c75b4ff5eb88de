"""The core's own claims: a quick command line, a trainer that costs next to nothing, savings in one runtime.

python benchmarks/core.py [help] [overhead] [quickstart] [int8_convnet] [meter_repeat] [kills] [fuzz]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _claims import Claim, main

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # bounds and the kill harness are the tests' own

from sparing.core.ledger import MODEL_BYTES, P50, Ledger
from sparing.core.registry import resolve
from sparing.core.statistics import t_interval

SOURCE = "issue Core, table of gates"
SPARING = Path(sys.executable).with_name("sparing")


def _sparing(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SPARING), *arguments], check=True, capture_output=True, text=True, **options)


def measure_help(repetitions: int = 21) -> list[Claim]:
    """Wall time of ``sparing --help``, a fresh process each time, and whether it imported torch."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        _sparing("--help")
        seconds.append(time.perf_counter() - start)
    probe = "import sys; from sparing.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    probe += "print('torch' in sys.modules, file=sys.stderr)"
    seen = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stderr
    return [
        Claim(
            id="help",
            statement="sparing --help answers in a fraction of a second, without importing torch",
            source=SOURCE,
            figure=statistics.median(seconds),
            unit="s",
            comparison="<",
            threshold=0.3,
            also=[("torch imported", float(seen.strip().splitlines()[-1] == "True"), "==", 0.0)],
            details={"repetitions": repetitions, "slowest": max(seconds)},
        )
    ]


# ---------------------------------------------------------------------------------------------------------- overhead


def measure_overhead(pairs: int = 7, steps: int = 100, batch: int = 128) -> list[Claim]:
    """CPU seconds of training by Sparing beside a bare PyTorch loop and plain Lightning, interleaved."""
    import torch

    from sparing.core.predictor import build_model
    from sparing.core.randomness import isolated_rng
    from sparing.core.training import Train, fit

    task = resolve("tasks", "fashion_mnist")()
    train = task.splits(_data()).train
    data = torch.utils.data.Subset(train, range(steps * batch))

    def model() -> torch.nn.Module:
        with isolated_rng("overhead"):
            return build_model("convnet", task)

    def loader() -> Any:
        return torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True)

    def bare() -> None:
        network = model().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
        for images, labels in loader():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

    def lightning() -> None:
        import lightning.pytorch as pl

        class Plain(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = model()

            def training_step(self, step_batch: Any, _: int) -> Any:
                return torch.nn.functional.cross_entropy(self.network(step_batch[0]), step_batch[1])

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)

        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet).fit(
            Plain(), loader()
        )

    def ours() -> None:
        fit(model(), task, data, None, Train(epochs=1, batch_size=batch, lr=1e-3))

    arms: dict[str, Callable[[], None]] = {"bare": bare, "lightning": lightning, "sparing": ours}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(pairs + 1):
        order = list(arms) if repetition % 2 else list(reversed(arms))
        for name in order:
            start = time.process_time()
            arms[name]()
            if repetition:  # the first round warms caches and imports
                seconds[name].append(time.process_time() - start)
    ratios = np.array(seconds["sparing"]) / np.array(seconds["bare"])
    per_step = (np.array(seconds["sparing"]) - np.array(seconds["lightning"])) / steps * 1e3
    return [
        Claim(
            id="overhead",
            statement="training by Sparing costs hardly more CPU time than a bare PyTorch loop",
            source=SOURCE,
            figure=float(np.median(ratios)),
            unit="× bare loop",
            comparison="<=",
            threshold=1.05,
            interval95=t_interval(ratios.tolist()),
            baselines=[
                {"name": "bare loop, CPU s", "figure": statistics.median(seconds["bare"])},
                {"name": "plain Lightning, CPU s", "figure": statistics.median(seconds["lightning"])},
            ],
            also=[("ms per step over plain Lightning", float(np.median(per_step)), "<=", 0.5)],
            details={"pairs": pairs, "steps": steps, "batch": batch, "threads": torch.get_num_threads()},
        )
    ]


# -------------------------------------------------------------------------------------------------------- quickstart


def measure_quickstart() -> list[Claim]:
    """The packaged quickstart, by the command line, in an empty store."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(SPARING), "run", "quickstart", "--out", str(folder / "out"), "--store", str(folder / "store")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        first_row = None
        while process.poll() is None:
            if first_row is None and (folder / "out" / "ledger.json").is_file():
                first_row = time.perf_counter() - start
            time.sleep(0.02)
        total = time.perf_counter() - start
        if process.returncode or first_row is None:
            raise RuntimeError(f"quickstart failed: {process.stderr.read() if process.stderr else ''}")
        ledger = Ledger.load(folder / "out")
    first, last = ledger.rows[0], ledger.rows[-1]
    same = float(first.runtime == last.runtime)
    difference = ledger.difference(first.id, last.id)
    p50 = [row.figures[P50] for row in (first, last)]
    low, high = p50[1].interval or (p50[1].number, p50[1].number)
    return [
        Claim(
            id="quickstart_bytes",
            statement="the quickstart's last model has at most a quarter of the first one's bytes, in the same runtime",
            source=SOURCE,
            figure=_number(last, MODEL_BYTES) / _number(first, MODEL_BYTES),
            unit="× first row",
            comparison="<=",
            threshold=0.25,
            baselines=[{"name": f"{first.id}, bytes", "figure": _number(first, MODEL_BYTES)}],
            also=[
                ("same runtime", same, "==", 1.0),
                ("first row, s", first_row, "<", 20.0),
                ("all rows, s", total, "<", 120.0),
            ],
            details={
                "rows": [{"id": row.id, "outcome": row.outcome, **_shown(row)} for row in ledger.rows],
                "accuracy difference": None if difference is None else [difference.value, difference.interval],
            },
        ),
        Claim(
            id="quickstart_ms",
            statement="the quickstart's last model is not slower than the first, in the same runtime",
            source=SOURCE,
            figure=_number(last, P50) / _number(first, P50),
            unit="× first row",
            comparison="<=",
            threshold=1.0,
            interval95=(low / _number(first, P50), high / _number(first, P50)),
            baselines=[{"name": f"{first.id}, ms", "figure": _number(first, P50)}],
            also=[("same runtime", same, "==", 1.0)],
        ),
    ]


# ------------------------------------------------------------------------------------------------------ int8, repeat


def measure_int8_convnet(seeds: int = 3) -> list[Claim]:
    """Train the convnet on Fashion-MNIST, quantise it, and compare the two rows of each seed."""
    from sparing import Quantize, Train, run
    from sparing.core.store import Store

    with tempfile.TemporaryDirectory() as scratch:
        result = run(
            task="fashion_mnist",
            model="convnet",
            steps=[
                Train(id="fp32", epochs=5, batch_size=128, lr=3e-3, scheduler="one_cycle"),
                Quantize(id="int8", goal="latency"),
            ],
            seeds=seeds,
            data=_data(),
            store=Store(Path(scratch) / "store"),
        )
    ledger = result.ledger
    pairs = list(zip(ledger.of("fp32"), ledger.of("int8"), strict=True))
    share = [_number(small, MODEL_BYTES) / _number(full, MODEL_BYTES) for full, small in pairs]
    slowdown = [_number(small, P50) / _number(full, P50) for full, small in pairs]
    difference = ledger.difference("fp32", "int8")
    assert difference is not None
    return [
        Claim(
            id="int8_convnet",
            statement="INT8 makes a plain convnet smaller and faster in the same runtime at hardly any loss",
            source=SOURCE,
            figure=max(share),
            unit="× FP32 model bytes",
            comparison="<=",
            threshold=0.30,
            seeds=ledger.seeds,
            baselines=[
                {"name": "FP32 accuracy", "figure": statistics.fmean(_number(f, "accuracy") for f, _ in pairs)},
                {"name": "FP32 p50, ms", "figure": statistics.fmean(_number(f, P50) for f, _ in pairs)},
            ],
            also=[
                ("p50 × FP32, slowest seed", max(slowdown), "<", 1.0),
                ("accuracy difference", difference.value, ">=", -0.005),
                ("parameters", min(_number(full, "parameters") for full, _ in pairs), ">=", 3e5),
                ("same runtime", float(all(full.runtime == small.runtime for full, small in pairs)), "==", 1.0),
            ],
            details={
                "rows": [
                    {"id": row.id, "seed": row.seed, "outcome": row.outcome, **_shown(row)} for row in ledger.rows
                ],
                "accuracy difference": [difference.value, difference.interval],
            },
        )
    ]


def measure_meter_repeat(repetitions: int = 10) -> list[Claim]:
    """``sparing bench`` of one folder, several times, each pair of neighbours compared."""
    from sparing import build_model
    from sparing.core.predictor import ModulePredictor, to_onnx
    from sparing.core.randomness import isolated_rng

    task = resolve("tasks", "fashion_mnist")()
    with tempfile.TemporaryDirectory() as scratch:
        with isolated_rng("meter_repeat"):
            network = build_model("convnet", task)
        predictor = ModulePredictor(network, task)
        folder = to_onnx(predictor, task.example_input(), predictor).save(Path(scratch) / "model")
        rows = [json.loads(_sparing("bench", str(folder), "--json").stdout)["figures"][P50] for _ in range(repetitions)]
    noisy = ["noisy" in row["note"] for row in rows]
    apart = [
        0.0 if noisy[i] and noisy[i + 1] else abs(rows[i]["value"] / rows[i + 1]["value"] - 1)
        for i in range(repetitions - 1)
    ]
    return [
        Claim(
            id="meter_repeat",
            statement="the p50 of one folder measured twice agrees within 5 %, or both rows say noisy",
            source=SOURCE,
            figure=max(apart),
            unit="relative difference",
            comparison="<=",
            threshold=0.05,
            details={"p50 ms": [row["value"] for row in rows], "noisy": noisy},
        )
    ]


# ------------------------------------------------------------------------------------------------------ kills, fuzz


def measure_kills(warm: int = 200, cold: int = 20) -> list[Claim]:
    """Small runs with dropout, 0 and 2 data workers, killed until they finish."""
    import random

    import _kills

    rng = random.Random(0)
    found = {"forked": _kills.warm(warm, rng, print), "command line": _kills.cold(cold, rng, print)}
    return [
        Claim(
            id="kills",
            statement="a killed run goes on and ends with the ledger and the tensors of an unbroken one",
            source=SOURCE,
            figure=float(sum(part["unequal"] for part in found.values())),
            unit="runs that ended otherwise",
            comparison="==",
            threshold=0.0,
            also=[
                ("forks killed", float(found["forked"]["kills"]), ">=", 200.0),
                ("inside write windows", float(found["forked"]["inside write windows"]), ">", 0.0),
                ("command lines killed", float(found["command line"]["kills"]), ">=", 20.0),
            ],
            details=found,
        )
    ]


def measure_fuzz(cases: int = 5000) -> list[Claim]:
    """Damaged recipes, model folders and data files, each read in a process of its own."""
    import _fuzz

    found = _fuzz.run(cases)
    for line in found["wrong"][:20]:
        print(line)
    return [
        Claim(
            id="fuzz",
            statement="damaged recipes, model folders and data files are read or refused, in 1 s and 256 MiB",
            source=SOURCE,
            figure=float(len(found["wrong"])),
            unit="cases that ended otherwise",
            comparison="==",
            threshold=0.0,
            also=[
                ("cases", float(found["cases"]), ">=", 5000.0),
                ("slowest, s", found["worst"]["seconds"], "<=", 1.0),
                ("largest, MiB", found["worst"]["mebibytes"], "<=", 256.0),
            ],
            details={"kinds": found["kinds"], "wrong": found["wrong"][:20]},
        )
    ]


def _data() -> Path:
    import os

    return Path(os.environ["SPARING_DATA"])


def _number(row: Any, name: str) -> float:
    value = row.figures[name].number
    assert value is not None, f"row {row.id} has no {name}"
    return float(value)


def _shown(row: Any) -> dict[str, Any]:
    names = (row.headline, MODEL_BYTES, P50, "parameters", "MACs")
    return {name: row.figures[name].value for name in names if name in row.figures}


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {
    "help": measure_help,
    "overhead": measure_overhead,
    "quickstart": measure_quickstart,
    "int8_convnet": measure_int8_convnet,
    "meter_repeat": measure_meter_repeat,
    "kills": measure_kills,
    "fuzz": measure_fuzz,
}

if __name__ == "__main__":
    sys.exit(main("core", BENCHMARKS))
