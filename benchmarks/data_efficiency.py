"""What data efficiency costs: analysing a corpus, drawing a curriculum's batches, dropping tokens in a layer.

python benchmarks/data_efficiency.py [analysis] [sampler] [dropped_layer]
"""

from __future__ import annotations

import filecmp
import gc
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from _claims import Claim, main
from sparing.data_efficiency.analysis import SHARD, DataAnalyzer
from sparing.data_efficiency.metrics import SequenceLength, TokenFields, VocabularyRarity
from sparing.data_efficiency.pacing import linear, root
from sparing.data_efficiency.sampler import CurriculumMetric, CurriculumSampler
from sparing.data_efficiency.token_dropping import drop_tokens

ISSUE = "issue Less training, section 1, gates"
WIDTH, VOCABULARY = 32, 2000


# ------------------------------------------------------------------------------------------------------------- analysis

CHILD = """
import json, sys, time
import filelock
import numpy as np
from sparing.data_efficiency.analysis import DataAnalyzer
from sparing.data_efficiency.metrics import SequenceLength, TokenFields, VocabularyRarity, negative_log_frequency

what, corpus, counts, out, batch = sys.argv[1:6]
tokens, counts = np.load(corpus, mmap_mode="r"), np.load(counts)
fields = TokenFields(pad_id=0)
start, cpu = time.perf_counter(), time.process_time()
if what == "bare":
    surprisal = negative_log_frequency(counts)
    surprisal[0] = 0.0  # padding
    for first in range(0, len(tokens), int(batch)):
        part = tokens[first : first + int(batch)]
        lengths = np.count_nonzero(part != 0, axis=1)
        rarity = surprisal[part].sum(1).astype(np.int64)
elif what == "run":
    metrics = [SequenceLength(fields), VocabularyRarity(len(counts) - 1, fields)]
    DataAnalyzer(tokens, metrics, out, 2, batch_size=int(batch), version="synthetic").run()
else:
    metrics = [SequenceLength(fields), VocabularyRarity(len(counts) - 1, fields, counts)]
    analyzer = DataAnalyzer(tokens, metrics, out, 1, 0, batch_size=int(batch), version="synthetic")
    analyzer.map() if what == "map" else analyzer.reduce()
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # ru_maxrss would be the parent's
peak = int(status["VmHWM"].split()[0]) / 1024
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))
"""


def measure_analysis(samples: int = 10_000_000, batch: int = 4096, repeats: int = 3) -> list[Claim]:
    """Length and rarity of every sample of a mapped corpus, each phase in a process of its own; then a killed run."""
    with tempfile.TemporaryDirectory(prefix="sparing-analysis-") as name:
        folder = Path(name)
        counts = write_corpus(folder, samples)
        np.save(folder / "counts.npy", counts)

        def command(what: str, out: str, corpus: str = "tokens.npy") -> list[str]:
            places = [str(folder / part) for part in (corpus, "counts.npy", out)]
            return [sys.executable, "-c", CHILD, what, *places, str(batch)]

        def run(*args: str) -> dict[str, float]:
            done = subprocess.run(command(*args), capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{args[0]} failed:\n{done.stderr}")
            return json.loads(done.stdout)

        run("bare", "")  # the file into the system's cache
        found: dict[str, list[dict[str, float]]] = {"bare": [], "map": [], "reduce": []}
        for repeat in range(repeats):  # side by side: the machine may be busy
            for what, rows in found.items():
                rows.append(run(what, f"out{repeat}"))
        start = time.process_time()
        with (folder / "tokens.npy").open("rb") as corpus:
            hashlib.file_digest(corpus, "sha256")
        digest = time.process_time() - start
        np.lib.format.open_memmap(folder / "wide.npy", "w+", np.uint16, (samples // 50, 64 * WIDTH))[:] = 7
        long = run("map", "long", "wide.npy")
        killed = killed_run(command("run", "killed"), folder / "killed")
        again = run("run", "killed")
        wrong = [file for file in ARRAYS if not same_file(folder / "out0" / file, folder / "killed" / file)]
    cpu = {what: statistics.median(row["cpu"] for row in rows) for what, rows in found.items()}
    shares = [bare["cpu"] / mapped["cpu"] for bare, mapped in zip(found["bare"], found["map"], strict=True)]
    peak = max(row["peak"] for what in ("map", "reduce") for row in found[what])
    return [
        Claim(
            id="analysis_speed",
            statement="a worker of the analysis is about as fast as a bare NumPy pass over the same mapped corpus",
            source=ISSUE,
            figure=statistics.median(shares),
            unit="of the speed of a bare pass per core (CPU seconds)",
            comparison=">=",
            threshold=0.8,
            baselines=[{"name": f"{what}, CPU seconds", "figure": value} for what, value in cpu.items()]
            + [{"name": "digest of the corpus, unless it is given a version, CPU seconds", "figure": digest}],
            also=[
                ("peak of the resident memory of a worker and of the reduce, MiB", peak, "<", 300.0),
                ("peak of two workers side by side and of what starts them, MiB", killed["peak"], "<", 300.0),
                (f"peak of a worker on samples of {64 * WIDTH} tokens, MiB", long["peak"], "<", 300.0),
            ],
            details={
                "samples": samples,
                "tokens of a sample": WIDTH,
                "samples per second, map": samples / cpu["map"],
                "share with the reduce, which is one process's": cpu["bare"] / (cpu["map"] + cpu["reduce"]),
                "shares": shares,
                "rows": found,
            },
        ),
        Claim(
            id="analysis_resume",
            statement="an analysis of which a worker was killed goes on with what is missing, to the same index",
            source="sheet data_efficiency, fault and resume contract",
            figure=float(len(wrong)),
            unit="arrays of the index that differ from those of an undisturbed run of one worker",
            comparison="<=",
            threshold=0.0,
            baselines=[{"name": "arrays compared", "figure": float(len(ARRAYS))}],
            also=[
                ("the killed run failed with the reason", float(killed["told"]), ">=", 1.0),
                ("finished shards that it left", float(killed["left"]), ">", 0.0),
                ("shards that it had not made", float(killed["missing"]), ">", 0.0),
            ],
            details={"samples": samples, "wrong": wrong, "killed": killed, "again": again},
        ),
    ]


ARRAYS = tuple(
    f"{metric}/{array}.npy"
    for metric in ("seqlen", "vocab_rarity")
    for array in ("sample_to_metric", "values", "offsets", "ids")
)


def killed_run(command: list[str], out: Path) -> dict[str, float]:
    """Start an analysis of two workers and SIGKILL one of them while it maps the metrics."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, victim = 0.0, 0
    while process.poll() is None:
        family = [process.pid, *descendants(process.pid)]
        peak = max([peak, *map(resident_peak, family)])
        workers = [pid for pid in family[1:] if "loky" in command_line(pid) and "tracker" not in command_line(pid)]
        if not victim and workers and len(list(out.glob("parts/seqlen-*/*.json"))) >= 2:
            victim = workers[0]
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.002)
    assert process.stderr is not None
    told = "was ended from outside" in process.stderr.read()
    left = len(list(out.glob("parts/seqlen-*/*.json")))
    tokens = np.load(out.parent / "tokens.npy", mmap_mode="r")
    return {"told": told, "left": left, "missing": -(-len(tokens) // SHARD) - left, "victim": victim > 0, "peak": peak}


def descendants(pid: int) -> list[int]:
    """Numbers of all processes below one."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


def resident_peak(pid: int) -> float:
    """MiB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max([int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")], default=0.0)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def same_file(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def write_corpus(folder: Path, samples: int) -> np.ndarray:
    """Zipf-like tokens of random lengths, padded with 0; their counts (V + 1,)."""
    draw = np.random.default_rng(0)
    counts = np.zeros(VOCABULARY + 1, np.int64)
    file = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.uint16, (samples, WIDTH))
    for first in range(0, samples, 1 << 18):
        rows = min(1 << 18, samples - first)
        part = np.minimum(draw.pareto(0.8, (rows, WIDTH)) * 5 + 1, VOCABULARY - 1).astype(np.uint16)
        part[np.arange(WIDTH) >= draw.integers(1, WIDTH + 1, rows)[:, None]] = 0
        file[first : first + rows] = part
        counts += np.bincount(part[part > 0], minlength=VOCABULARY + 1)
    return counts


# -------------------------------------------------------------------------------------------------------------- sampler


def block(dim: int, heads: int) -> nn.Module:
    """A pre-norm block of torch."""
    return nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)


def measure_sampler(samples: int = 1_000_000, steps: int = 2000, trained: int = 40) -> list[Claim]:
    """Drawing batches of a curriculum over two metrics beside steps of the demonstration's decoder."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="sparing-sampler-") as name:
        tokens = draw.integers(1, VOCABULARY, (samples, 8))
        tokens[np.arange(8) >= draw.integers(1, 9, samples)[:, None]] = 0
        fields = TokenFields(pad_id=0)
        metrics = [SequenceLength(fields), VocabularyRarity(VOCABULARY, fields)]
        made = DataAnalyzer(tokens, metrics, name, version="synthetic").run()
        curriculum = {
            "vocab_rarity": CurriculumMetric(root(10, 100, steps * 0.6), made["vocab_rarity"]),
            "length": CurriculumMetric(linear(32, 128, steps * 0.6, 8)),
        }
        sampler = CurriculumSampler(curriculum, 8, steps)
        start = time.process_time()
        for _ in sampler:
            pass
        per_batch = (time.process_time() - start) / steps
    torch.manual_seed(0)
    words, head, blocks = nn.Embedding(65, 64), nn.Linear(64, 65), nn.ModuleList(block(64, 4) for _ in range(6))
    optimizer = torch.optim.AdamW([*words.parameters(), *blocks.parameters(), *head.parameters()])
    causal = nn.Transformer.generate_square_subsequent_mask(128)
    seconds = []
    for _ in range(trained):
        start = time.process_time()
        ids = torch.randint(0, 65, (8, 129))
        x = words(ids[:, :-1])
        for layer in blocks:
            x = layer(x, src_mask=causal)
        loss = nn.functional.cross_entropy(head(x).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    per_step = statistics.median(seconds)
    return [
        Claim(
            id="sampler_overhead",
            statement="drawing a curriculum's batch takes a small part of a step of the smallest demonstration",
            source=ISSUE,
            figure=100 * per_batch / per_step,
            unit="% of a training step (CPU seconds)",
            comparison="<",
            threshold=1.0,
            baselines=[
                {"name": "a batch, µs, all releases of clusters included", "figure": 1e6 * per_batch},
                {"name": "a step of the decoder L6 D64 S128 batch 8, µs", "figure": 1e6 * per_step},
            ],
            details={"samples": samples, "steps": steps},
        )
    ]


# -------------------------------------------------------------------------------------------------------- dropped layer


def measure_dropped_layer(
    lengths: tuple[int, ...] = (512, 1024),
    dim: int = 256,
    batch: int = 4,
    repeats: int = 30,
    shares: tuple[float, ...] = (0.25, 0.5, 0.75),
) -> list[Claim]:
    """Forward and backward of one layer that computes a part of the tokens, beside all of them."""
    if min(lengths) < 512:
        print(f"dropped_layer: {min(lengths)} tokens; the gate is about 512 and more")
    rows = []
    for length in lengths:
        torch.manual_seed(0)
        stack = nn.ModuleList(block(dim, 4) for _ in range(3)).train()
        x = torch.randn(batch, length, dim, requires_grad=True)
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        cotangent = torch.randn(batch, length, dim)
        layer = partial(forward_backward, stack, x, causal, cotangent)
        for share in shares:
            kept = int(share * length)
            full, dropped = [], []
            for repeat in range(repeats + 2):  # side by side
                whole = clocked(layer)
                with drop_tokens(stack, linear(kept, length, 1e9), [1], kind="decoder", seed=repeat):
                    part = clocked(layer)
                if repeat >= 2:
                    full.append(whole)
                    dropped.append(part)
            ratio = statistics.median(d / f for d, f in zip(dropped, full, strict=True))
            rows.append(
                {
                    "length": length,
                    "kept": kept / length,
                    "ratio": ratio,
                    "full_ms": 1e3 * statistics.median(full),
                    "dropped_ms": 1e3 * statistics.median(dropped),
                }
            )
    worst = max(rows, key=lambda row: row["ratio"] - row["kept"])
    return [
        Claim(
            id="dropped_layer_time",
            statement="a layer that drops tokens takes no more than the kept share of its time, at "
            f"{' and '.join(map(str, lengths))} tokens",
            source=ISSUE,
            figure=worst["ratio"] - worst["kept"],
            unit="of the full time above the kept share (worst of lengths and shares, CPU seconds)",
            comparison="<=",
            threshold=0.05,
            baselines=[
                {"name": f"of the full time, {row['kept']:.0%} of {row['length']} tokens kept", "figure": row["ratio"]}
                for row in rows
            ],
            details={"dim": dim, "batch": batch, "rows": rows},
        )
    ]


def forward_backward(stack: nn.ModuleList, x: Tensor, causal: Tensor, cotangent: Tensor) -> None:
    """The middle layer, there and back."""
    x.grad = None
    stack.zero_grad()
    (stack[1](x, src_mask=causal) * cotangent).sum().backward()


def clocked(call: Callable[[], None]) -> float:
    """CPU seconds of a call."""
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {
    "analysis": measure_analysis,
    "sampler": measure_sampler,
    "dropped_layer": measure_dropped_layer,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main("data_efficiency", BENCHMARKS))
