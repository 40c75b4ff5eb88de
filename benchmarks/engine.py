"""The engine beside ONNX Runtime and OpenVINO: a DistilBERT-shaped encoder, one thread, from token numbers to outputs.

python benchmarks/engine.py [1x32] [1x128] [1x384] [8x128] [memory] [sharing] [production] [vnni] [record]

6 layers × 768 × 3072, 12 heads, 30,522 words, random weights, 4×1 blocks pruned by magnitude; a classifier on the first
token. All arms get token numbers and a mask of ones, and take turns; a figure is a ratio of medians of CPU time of the
process, which other work on the machine disturbs least; wall time stands beside it. Needs openvino and nncf.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from _claims import Claim, main
from sparing.core.errors import NoEffect
from sparing.engine import native
from sparing.engine.compiler import compile_encoder
from sparing.engine.runtime import Engine, NativeEngine

SOURCE = "issue Cheaper inference I, table of gates"
GATES = {
    "1x32": (1.2, 0.8),
    "1x128": (1.6, 0.9),
    "1x384": (1.5, 0.9),
    "8x128": (1.6, 0.9),
}
"""Times OpenVINO INT8: (sparse at 80 %, dense), at least."""
SPARSITIES = (70, 80, 90)
VOCABULARY = 30522
PEER = "OpenVINO INT8 (NNCF)"
Call = Callable[[np.ndarray, np.ndarray], Any]


# ---------------------------------------------------------------------------------------------------------- the arms


@functools.cache
def transformer(sparsity: int) -> Any:
    """DistilBERT of ``transformers`` with random weights, pruned."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    from sparing.compression.pruning import block_mask

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = DistilBertForSequenceClassification(DistilBertConfig()).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layer." in name:
            module.weight.data *= block_mask(module.weight.data, (4, 1), sparsity / 100, "mean")
    return model


def texts(batch: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1000, VOCABULARY, (batch, length))


@functools.cache
def quantised(sparsity: int) -> Any:
    """Our encoder with all layers of the blocks in INT8."""
    from sparing.compression.ptq import quantize_ptq
    from sparing.models.bert import from_transformers

    calibration = [torch.from_numpy(texts(1, 128, seed)) for seed in range(8)]
    return quantize_ptq(from_transformers(transformer(sparsity)), calibration)[0]


@functools.cache
def ours(sparsity: int, batch: int, length: int, kind: str) -> NativeEngine:
    engine = compile_encoder(quantised(sparsity), batch, length, engine=kind)  # type: ignore[arg-type]
    assert isinstance(engine, NativeEngine)
    return engine


class _Masked(torch.nn.Module):
    """The logits of ids and mask."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask).logits


@functools.cache
def openvino_models() -> tuple[Any, Any]:
    """(float, INT8 by NNCF with its preset for transformers)."""
    import nncf
    import openvino

    ids = torch.from_numpy(texts(2, 128, 0))
    model = openvino.convert_model(_Masked(transformer(80)), example_input=(ids, torch.ones_like(ids)))
    model.reshape({0: [-1, -1], 1: [-1, -1]})
    samples = [(texts(1, 128, seed), np.ones((1, 128), dtype=np.int64)) for seed in range(8)]
    dataset = nncf.Dataset(samples, lambda item: {0: item[0], 1: item[1]})
    integers = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples))
    return model, integers


@functools.cache
def openvino(integers: bool) -> Call:
    """One stream on one thread; what is not INT8 runs in BF16, OpenVINO's default on this kind of CPU."""
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(openvino_models()[integers], "CPU", settings)
    request = compiled.create_infer_request()
    return lambda ids, mask: request.infer({0: ids, 1: mask})


@functools.cache
def onnx_float() -> bytes:
    """The float encoder as our own graph for ONNX Runtime."""
    from sparing.engine.compiler import extract
    from sparing.engine.onnx_graph import graph
    from sparing.models.bert import from_transformers

    return graph(extract(from_transformers(transformer(80))))


@functools.cache
def onnx_int8(mode: str) -> bytes:
    """That graph through ONNX Runtime's own quantiser."""
    from sparing.compression.quantization import Scheme, prepare, quantize_onnx

    feeds = [{"ids": texts(1, 128, seed), "keep": np.ones((1, 128), dtype=bool)} for seed in range(8)]
    scheme = Scheme(mode=mode)  # type: ignore[arg-type]
    return quantize_onnx(prepare(onnx_float()), scheme, feeds if mode == "static" else ()).SerializeToString()


@functools.cache
def onnxruntime(mode: str) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    content = onnx_float() if mode == "float" else onnx_int8(mode)
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"ids": ids, "keep": mask.astype(bool)})


def torch_bf16() -> Call:
    model = transformer(80)

    def call(ids: np.ndarray, mask: np.ndarray) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits

    return call


# ------------------------------------------------------------------------------------------------------------ timing


def interleaved(arms: dict[str, Call], batch: int, length: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Arm → its CPU and wall times in ms. Each turn of an arm is one call to warm its caches and three that count."""
    ids, mask = texts(batch, length, 99), np.ones((batch, length), dtype=np.int64)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for call in arms.values():
        for _ in range(3):
            call(ids, mask)
    until = time.perf_counter() + seconds
    order = list(arms)
    while time.perf_counter() < until or len(times[order[0]]) < 30:
        order.reverse()
        for name in order:
            arms[name](ids, mask)
            for _ in range(3):
                cpu, wall = time.process_time(), time.perf_counter()
                arms[name](ids, mask)
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "cpu ms": 1e3 * statistics.median(cpu for cpu, _ in found),
            "wall ms": 1e3 * statistics.median(wall for _, wall in found),
            "fastest wall ms": 1e3 * min(wall for _, wall in found),
            "calls": len(found),
            "cpu": [cpu for cpu, _ in found],
        }
        for name, found in times.items()
    }


def interval(ours_cpu: list[float], peer_cpu: list[float]) -> tuple[float, float]:
    """95 % of the ratio of medians, turns drawn anew."""
    rng = np.random.default_rng(0)
    turns = len(ours_cpu) // 3
    mine, other = (np.array(values[: turns * 3]).reshape(turns, 3) for values in (ours_cpu, peer_cpu))
    ratios = []
    for _ in range(2000):
        drawn = rng.integers(0, turns, turns)
        ratios.append(np.median(other[drawn]) / np.median(mine[drawn]))
    return float(np.quantile(ratios, 0.025)), float(np.quantile(ratios, 0.975))


def roofline(engine: NativeEngine, batch: int, length: int, cpu_ms: float) -> dict[str, Any]:
    """The least time that the products and the weights allow on this core, and the share of it that was reached.

    Products: multiplications over the peak of the instruction path, measured in registers. On tiles a sparse layer is
    multiplied whole, after its weights are unpacked, so all multiplications count; on vectors only those of blocks that
    are not zero. Weights: their packed bytes over the bandwidth at which a core reads an array of that size.
    """
    layers = {
        f"{number}.{name}": layer for number, block in enumerate(engine.encoder.blocks) for name, layer in block.items()
    }
    path = engine.isa
    multiplied = moved = 0
    for name, layer in layers.items():
        share = 1.0
        parts = ("weight",)
        if layer.format == "tiles" and path == "amx":
            parts = ("masks", "tile_values", "tile_ptr")
        elif layer.format in ("tiles", "4x1"):
            parts = ("row_ptr", "col_index", "values")
            share = engine.pack.arrays[f"{name}.values"].size / (layer.rows * layer.columns)
        multiplied += int(layer.rows * layer.columns * share) * batch * length
        moved += sum(engine.pack.arrays[f"{name}.{part}"].nbytes for part in parts)
    peak, bandwidth = native.peak(path), native.stream(np.ones(max(moved, 1 << 20), dtype=np.uint8))
    if not peak or not bandwidth:
        return {"path": path, "unknown": "no peak was measured for this path"}
    compute, memory = multiplied / peak * 1e3, moved / bandwidth * 1e3
    return {
        "path": path,
        "peak, 10⁹ multiplications/s": peak / 1e9,
        "bandwidth, 10⁹ bytes/s": bandwidth / 1e9,
        "products, ms": compute,
        "weights, ms": memory,
        "binds": "products" if compute > memory else "weights",
        "share of the limit": max(compute, memory) / cpu_ms,
    }


def measure_shape(shape: str, seconds: float = 30.0) -> list[Claim]:
    """Both claims of one batch × tokens."""
    batch, length = (int(part) for part in shape.split("x"))
    engines = {f"sparse {sparsity} %": ours(sparsity, batch, length, "auto") for sparsity in SPARSITIES}
    engines["dense"] = ours(80, batch, length, "dense")
    arms: dict[str, Call] = {f"Sparing {name}": engine.run for name, engine in engines.items()}
    arms |= {PEER: openvino(True), "ONNX Runtime FP32": onnxruntime("float")}
    arms |= {f"ONNX Runtime INT8, {mode}": onnxruntime(mode) for mode in ("static", "dynamic")}
    times = interleaved(arms, batch, length, seconds)
    raw = {name: found.pop("cpu") for name, found in times.items()}
    claims = []
    for kind, threshold in zip(("sparse", "dense"), GATES[shape], strict=True):
        name = "Sparing sparse 80 %" if kind == "sparse" else "Sparing dense"
        engine = engines[name.removeprefix("Sparing ")]
        wall = times[PEER]["wall ms"] / times[name]["wall ms"]
        claims.append(
            Claim(
                id=f"{kind}_{shape}",
                statement=f"{kind} INT8 on {shape} tokens against OpenVINO INT8, one thread",
                source=SOURCE,
                figure=times[PEER]["cpu ms"] / times[name]["cpu ms"],
                unit="× OpenVINO INT8",
                comparison=">=",
                threshold=threshold,
                interval95=interval(raw[name], raw[PEER]),
                baselines=[{"name": f"{arm}, CPU ms", "figure": found["cpu ms"]} for arm, found in times.items()],
                details={
                    "times": times,
                    "by wall time": wall,
                    "roofline": roofline(engine, batch, length, times[name]["cpu ms"]),
                    "layers": engine.describe()["layers"],
                    "kernels timed": list(engine.manifest.timings),
                    "operators, ms": operators(engine),
                },
            )
        )
    return claims


def operators(engine: Engine) -> dict[str, float]:
    """Milliseconds by kind of operator, all blocks together."""
    found: dict[str, float] = {}
    for name, seconds in engine.profile(repetitions=20):
        kind = name.split(".", 1)[1] if name[0].isdigit() else name
        found[kind] = found.get(kind, 0.0) + seconds * 1e3
    return found


# ------------------------------------------------------------------------------------------------------------ memory

CHILD = """
import json, os, re, sys
import numpy as np
from sparing.engine.runtime import Engine, example_ids
def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
pack, batch, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
engine = Engine.load(pack)
for _ in range(3):
    engine.run(example_ids(engine.encoder, batch, length))
print(json.dumps({"peak": status("VmHWM") - before, "weights": engine.pack.nbytes, "plan": engine.memory_plan.nbytes}))
sys.stdout.flush()
if sys.stdin.readline():
    text = open("/proc/self/smaps").read()
    parts = re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", text)
    of_pack = [part for part in parts if os.path.basename(pack) in part.splitlines()[0]]
    print(json.dumps({key: sum(int(n) << 10 for part in of_pack for n in re.findall(rf"^{key}:\\s+(\\d+)", part, re.M))
                      for key in ("Pss", "Rss")}))
    sys.stdout.flush()
    sys.stdin.readline()
"""


def measure_memory() -> list[Claim]:
    """Peak memory of serving, in a fresh process, over what its imports take."""
    details = {}
    with tempfile.TemporaryDirectory() as scratch:
        pack = ours(80, 8, 384, "auto").save(Path(scratch) / "encoder.pack")
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(pack), "8", "384"], input="", capture_output=True, text=True, check=True
        )
    details = json.loads(done.stdout)
    return [
        Claim(
            id="memory",
            statement="serving takes at most the weights and 1.3 times the planned workspace, at 8 × 384 tokens",
            source=SOURCE,
            figure=details["peak"] / (details["weights"] + 1.3 * details["plan"]),
            unit="× (weights + 1.3 × plan)",
            comparison="<=",
            threshold=1.0,
            details=details,
        )
    ]


def measure_sharing() -> list[Claim]:
    """Proportional set size of the pack in two processes that serve it at the same time."""
    with tempfile.TemporaryDirectory() as scratch:
        pack = ours(80, 8, 128, "auto").save(Path(scratch) / "encoder.pack")
        children = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, str(pack), "8", "128"], stdin=-1, stdout=-1, text=True, bufsize=1
            )
            for _ in range(2)
        ]
        for child in children:
            child.stdout.readline()  # type: ignore[union-attr]
        found = []
        for child in children:
            child.stdin.write("\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
            found.append(json.loads(child.stdout.readline()))  # type: ignore[union-attr]
        for child in children:
            child.communicate("\n")
    return [
        Claim(
            id="sharing",
            statement="two processes that serve one model hold one copy of its weights",
            source=SOURCE,
            figure=sum(one["Pss"] for one in found) / max(one["Rss"] for one in found),
            unit="× the pages one process uses",
            comparison="<=",
            threshold=1.05,
            details={"processes": found},
        )
    ]


def measure_record() -> list[Claim]:
    """OpenVINO and torch in BF16, once, beside the dense engine."""
    arms: dict[str, Call] = {"Sparing dense": ours(80, 1, 128, "dense").run, PEER: openvino(True)}
    arms |= {"OpenVINO BF16": openvino(False), "torch BF16": torch_bf16(), "ONNX Runtime FP32": onnxruntime("float")}
    times = interleaved(arms, 1, 128, 20)
    for found in times.values():
        del found["cpu"]
    return [
        Claim(
            id="record",
            statement="OpenVINO and torch in BF16 at 1 × 128 tokens, for the record",
            source=SOURCE,
            figure=times["OpenVINO BF16"]["cpu ms"] / times["Sparing dense"]["cpu ms"],
            unit="× OpenVINO BF16",
            comparison=">",
            threshold=0.0,
            gate=False,
            baselines=[{"name": f"{arm}, CPU ms", "figure": found["cpu ms"]} for arm, found in times.items()],
            details={"times": times},
        )
    ]


def measure_production(limits: tuple[float, ...] = (20.0, 50.0, 200.0)) -> list[Claim]:
    """Most sequences a second within latency limits: batches of 1 to 8 on one core, and on two at a time."""
    from sparing.engine.tuner import choose_production, tune_production

    engine = ours(80, 8, 128, "auto")
    table = tune_production(engine, max_latency_ms=1e6).table
    rows = [{**asdict(row), "throughput": row.throughput} for row in table]
    best: dict[str, Any] = {}
    for limit in limits:
        try:
            best[f"p99 ≤ {limit:g} ms"] = rows[choose_production(table, limit)]
        except NoEffect as error:
            best[f"p99 ≤ {limit:g} ms"] = str(error)
    alone, together = (max(row.throughput for row in table if row.instances == count) for count in (1, 2))
    return [
        Claim(
            id="production",
            statement="a second instance on a second core adds throughput, over one copy of the weights",
            source="sheet fast_distilbert, demonstration B",
            figure=together / alone,
            unit="× the sequences a second of one instance",
            comparison=">=",
            threshold=1.5,
            gate=False,
            baselines=[
                {"name": f"sequences a second, {name}", "figure": row["throughput"]}
                for name, row in best.items()
                if isinstance(row, dict)
            ],
            details={"tokens": 128, "table": rows, "best": best},
        )
    ]


def measure_vnni(shapes: tuple[str, ...] = tuple(GATES)) -> list[Claim]:
    """The same on AVX-512-VNNI where this processor has more: ours and OpenVINO's oneDNN are told to stop there."""
    if native.choose_path() != "amx":
        return []
    limits = {native.VARIABLE: "vnni", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, *shapes, "--out", scratch]
        subprocess.run(command, env=os.environ | limits, check=False)  # 1 when a gate does not hold
        found = json.loads((Path(scratch) / "engine.json").read_text())["claims"]
    return [
        Claim(
            id=f"vnni_{claim['id']}",
            statement=f"{claim['statement']}, both without AMX",
            source=SOURCE,
            figure=claim["figure"],
            unit=claim["unit"],
            comparison=">=",
            threshold=float(claim["threshold"].removeprefix(">= ")),
            gate=False,
            interval95=tuple(claim["interval95"]),
            baselines=claim["baselines"],
            details={"environment": limits, **claim["details"]},
        )
        for claim in found
    ]


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {
    **{shape: functools.partial(measure_shape, shape) for shape in GATES},
    "memory": measure_memory,
    "sharing": measure_sharing,
    "production": measure_production,
    "vnni": measure_vnni,
    "record": measure_record,
}

if __name__ == "__main__":
    sys.exit(main("engine", BENCHMARKS))
