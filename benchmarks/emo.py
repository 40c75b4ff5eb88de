"""EMO's claims: exact counts, faithful exports, and what the block is worth at equal parameters on real photographs.

python benchmarks/emo.py [counts] [onnx] [block_in_vit] [equal_parameters] [fashion_mnist] [latency]

The trainings run two at a time on one thread each, and go on where they were interrupted (``--store`` is
``build/benchmarks/emo``). Run ``latency`` on a quiet machine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _claims import Claim, main
from sparing import Quantize, SparingError, Train, run
from sparing.core.ledger import CPU, MODEL_BYTES, P50, Ledger, cross_difference
from sparing.core.predictor import ModulePredictor, build_model
from sparing.core.randomness import isolated_rng
from sparing.core.step import Step
from sparing.data.augmentation import Augment
from sparing.optimization.label_smoothing import SmoothLabels
from sparing.optimization.schedules import WarmupCosine

SHEET = "EMO sheet, Demonstration"
ISSUE = "issue First guests, gates"
STORE = Path("build/benchmarks/emo")
DATA = os.environ.get("SPARING_DATA")
PARALLEL = 2
HASTY = {"min_seconds": 0.0, "max_seconds": 0.2, "memory": False}
"""Trainings run side by side, so their rows' clocks are not looked at."""

PUBLISHED = {
    "1M": (1_361_168, 260_843_664),
    "2M": (2_377_472, 439_363_064),
    "5M": (5_108_848, 902_583_776),
    "6M": (6_168_496, 960_752_512),
}
"""Variant → (parameters, multiply-accumulates at 224 pixels by fvcore's rule), from the reference implementation."""

SMALL = {"name": "emo", "variant": "0.14M"}
ARMS: dict[str, dict[str, Any]] = {
    "EMO-0.14M": SMALL,
    "without attention": {**SMALL, "attn_ss": [False] * 4, "exp_ratios": [2, 2.5, 3, 4.25]},
    "without convolution": {**SMALL, "dw_kss": [3, 3, 1, 1], "exp_ratios": [2, 2.5, 3.5, 4.5]},
    "MobileNetV2-style": {"name": "mobilenet"},
}
VIT_ARMS: dict[str, dict[str, Any]] = {
    "plain block": {"name": "vit", "block": "transformer"},
    "iRMB": {"name": "vit", "block": "irmb"},
}


def recipe(epochs: int, batch_size: int = 64) -> list[Step]:
    """The sheet's training, at a tenth of its length: AdamW, unshifted cosine, smoothed labels, crops and colour."""
    return [
        Augment(crop="padded", jitter=0.4),
        SmoothLabels(epsilon=0.1),
        WarmupCosine(warmup_share=0.1),
        Train(
            epochs=epochs,
            batch_size=batch_size,
            lr=2e-3,
            weight_decay=0.05,
            decay="matrices",
            gradient_clip=5.0,
            validate_every=epochs,
        ),
    ]


def trained(task: dict[str, Any], model: dict[str, Any], steps: Sequence[Step], seeds: Sequence[int]) -> Ledger:
    """Train and measure one arm; what the store has is read."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(task=task, model=model, steps=steps, seeds=seeds, store=STORE, data=DATA, meter=HASTY).ledger


def race(task: dict[str, Any], arms: dict[str, dict[str, Any]], steps: list[Step], seeds: int) -> dict[str, Ledger]:
    """Every arm with every seed, two trainings at a time; arm → its ledger over all seeds."""
    from joblib import Parallel, delayed

    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    Parallel(n_jobs=PARALLEL, verbose=10)(delayed(trained)(task, arms[arm], steps, [seed]) for arm, seed in jobs)
    return {arm: trained(task, model, steps, range(seeds)) for arm, model in arms.items()}


def accuracies(ledger: Ledger) -> list[float]:
    """The trained row's test accuracy for each seed."""
    return [float(row.figures["accuracy"].value or 0) for row in ledger.of("train")]


def versus(
    id: str, statement: str, ours: Ledger, other: Ledger, name: str, source: str, at_least: float | None = None
) -> Claim:
    """Our arm against another at equal parameters: paired difference of test accuracy over the seeds, in points.

    The reach is ``at_least`` points, a gate; or None: not worse by more than the half-width of the 95 % interval.
    """
    difference = cross_difference((other, "train"), (ours, "train"))
    assert difference is not None
    assert difference.interval is not None
    low, high = (100 * bound for bound in difference.interval)
    return Claim(
        id=id,
        statement=statement,
        source=source,
        figure=100 * difference.value,
        unit="points of accuracy",
        comparison=">=",
        threshold=-(high - low) / 2 if at_least is None else at_least,
        gate=at_least is not None,
        interval95=(low, high),
        seeds=ours.seeds,
        baselines=[{"name": f"{name}, %", "figure": 100 * float(np.mean(accuracies(other)))}],
        details={
            "accuracy": {"ours": accuracies(ours), name: accuracies(other)},
            "parameters": {arm: ledger.rows[-1].figures["parameters"].value for arm, ledger in _two(ours, name, other)},
            "MACs": {arm: ledger.rows[-1].figures["MACs"].value for arm, ledger in _two(ours, name, other)},
            "train CPU s": {arm: _cpu(ledger) for arm, ledger in _two(ours, name, other)},
        },
    )


def _two(ours: Ledger, name: str, other: Ledger) -> list[tuple[str, Ledger]]:
    return [("ours", ours), (name, other)]


def _cpu(ledger: Ledger) -> list[float]:
    """CPU seconds each training took, two at a time on the machine."""
    return [row.figures[CPU].number for row in ledger.of("train")]


# ---------------------------------------------------------------------------------------------- counts and exports


def measure_counts() -> list[Claim]:
    """Parameters and multiply-accumulates of the four published sizes."""
    import torch

    from sparing.core.cost import mac_count

    found = {}
    for variant in PUBLISHED:
        model = build_model("emo", variant=variant, num_classes=1000)
        macs = mac_count(model, (torch.zeros(1, 3, 224, 224),), "fvcore").total
        found[variant] = (sum(p.numel() for p in model.parameters()), macs)
    exact = sum(ours == theirs for v, pair in PUBLISHED.items() for ours, theirs in zip(found[v], pair, strict=True))
    return [
        Claim(
            id="emo_counts",
            statement="parameters and multiply-accumulates of the four published sizes are the reference's, exactly",
            source=ISSUE,
            figure=float(exact),
            unit="of 8 figures equal",
            comparison="==",
            threshold=8.0,
            details={variant: {"parameters": p, "macs": m} for variant, (p, m) in found.items()},
        )
    ]


def measure_onnx() -> list[Claim]:
    """Largest difference between a model's outputs in torch and in ONNX Runtime, over random weights and inputs."""
    from sparing.core.predictor import to_onnx

    worst: dict[str, float] = {}
    cases = {"1M": 224, "2M": 224, "5M": 224, "6M": 224, "0.14M": 64}
    for variant, size in cases.items():
        with isolated_rng("onnx", variant):
            model = _drawn(build_model("emo", variant=variant, num_classes=10, image_size=size)).eval()
            task = _shapes(size)
            graph = to_onnx(ModulePredictor(model, task))
            draw = np.random.default_rng(1)
            differences = []
            for batch in (1, 2, 5):
                images = draw.standard_normal((batch, 3, size, size)).astype(np.float32)
                differences.append(float(np.abs(graph(images) - ModulePredictor(model, task)(images)).max()))
        worst[variant] = max(differences)
    return [
        Claim(
            id="emo_onnx",
            statement="an exported EMO answers in ONNX Runtime as in torch, at any batch size",
            source=ISSUE,
            figure=max(worst.values()),
            unit="largest difference of a logit",
            comparison="<",
            threshold=1e-4,
            details=worst,
        )
    ]


def _drawn(model: Any) -> Any:
    """The model with random gains, biases and statistics, too: as made, they are all 1 or 0 and hide mistakes."""
    import torch

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor).abs())
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            elif tensor.ndim > 1:
                tensor.copy_(torch.randn_like(tensor) / tensor[0].numel() ** 0.5)
    return model


# --------------------------------------------------------------------------------------------------------- trainings

SIGNS = {"name": "sign_digits"}


def measure_block_in_vit(seeds: int = 5) -> list[Claim]:
    """The block in place of a plain transformer block, in a small columnar ViT at equal parameters."""
    ledgers = race(SIGNS, VIT_ARMS, recipe(epochs=30), seeds)
    statement = "in a small plain ViT, iRMB gains over the transformer block at equal parameters (photographs of hands)"
    ours, plain = ledgers["iRMB"], ledgers["plain block"]
    return [versus("emo_block_in_vit", statement, ours, plain, "plain block", ISSUE, at_least=2.0)]


def measure_equal_parameters(seeds: int = 3) -> list[Claim]:
    """EMO-0.14M on photographs of hands against the same net without one of its parts, and a MobileNetV2-style net."""
    return _ablation("emo_signs", "photographs of hands", SIGNS, ARMS, recipe(epochs=30), seeds)


def measure_fashion_mnist(seeds: int = 3) -> list[Claim]:
    """The same on Fashion-MNIST: 5,000 training images of 28×28."""
    small = {"variant": "0.14M-32px"}
    arms = {arm: {**model, **(small if model["name"] == "emo" else {})} for arm, model in ARMS.items()}
    task = {"name": "fashion_mnist", "train_limit": 5_000}
    return _ablation("emo_fashion", "Fashion-MNIST, 5,000 images", task, arms, recipe(epochs=6), seeds)


def _ablation(
    prefix: str, data: str, task: dict[str, Any], arms: dict[str, dict[str, Any]], steps: list[Step], seeds: int
) -> list[Claim]:
    ledgers = race(task, arms, steps, seeds)
    ours = ledgers.pop("EMO-0.14M")
    return [
        versus(
            f"{prefix}_{name.split()[-1].lower().removesuffix('-style')}",
            f"EMO is within noise or better at equal parameters: against {name} ({data})",
            ours,
            ledger,
            name,
            SHEET,
        )
        for name, ledger in ledgers.items()
    ]


# ----------------------------------------------------------------------------------------------------------- latency


def _shapes(size: int) -> Any:
    """A task of ten classes of random images, for the shapes of export and timing."""
    import torch

    from sparing import CustomTask

    draw = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, size, size, generator=draw)
    data = torch.utils.data.TensorDataset(images, torch.arange(32) % 10)
    labels = [str(label) for label in range(10)]
    return CustomTask(
        f"{size} px", data, data, data, data, model="emo", loss=torch.nn.functional.cross_entropy, labels=labels
    )


def measure_latency() -> list[Claim]:
    """Milliseconds for one image in ONNX Runtime beside multiply-accumulates, FP32 and INT8, one thread."""
    models: dict[str, tuple[dict[str, Any], int]] = {
        **{f"EMO-{variant}": ({"name": "emo", "variant": variant}, 224) for variant in PUBLISHED},
        **{name: (model, 64) for name, model in ARMS.items()},
        "convnet": ({"name": "convnet"}, 64),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, (model, size) in models.items():
        fields = {"num_classes": 10, "image_size": size, "in_channels": 3}
        with isolated_rng("latency"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = build_model(model["name"], **fields, **{k: v for k, v in model.items() if k != "name"})
            ledger = run(
                task=_shapes(size),
                model=network,
                trained=True,
                steps=[Quantize(id="int8", goal="bytes", max_loss=1.0, samples=32)],
                store=STORE,
            ).ledger
        full, small = ledger.rows
        rows[name] = {
            "macs": full.figures["MACs"].value,
            "fp32 ms": full.figures[P50].value,
            "int8 ms": small.figures[P50].value,
            "int8 outcome": small.outcome,
            "fp32 bytes": full.figures[MODEL_BYTES].value,
            "int8 bytes": small.figures[MODEL_BYTES].value,
            "ns per 1000 macs": 1e9 * full.figures[P50].number / full.figures["MACs"].number,
        }
    ratios = {name: row["int8 ms"] / row["fp32 ms"] for name, row in rows.items() if name.startswith("EMO")}
    spread = [row["ns per 1000 macs"] for row in rows.values()]
    return [
        Claim(
            id="emo_int8_latency",
            statement="INT8 makes EMO faster in ONNX Runtime at batch 1 (slowest of its sizes)",
            source=SHEET,
            figure=max(ratios.values()),
            unit="× FP32 p50",
            comparison="<",
            threshold=1.0,
            gate=False,
            baselines=[{"name": f"{name}, × FP32", "figure": ratio} for name, ratio in ratios.items()],
            details=rows,
        ),
        Claim(
            id="emo_macs_predict_latency",
            statement="multiply-accumulates predict latency: time per MAC differs by less than half between these nets",
            source=SHEET,
            figure=max(spread) / min(spread),
            unit="× between slowest and quickest per MAC",
            comparison="<",
            threshold=1.5,
            gate=False,
            details={name: row["ns per 1000 macs"] for name, row in rows.items()},
        ),
    ]


if __name__ == "__main__":
    try:
        raise SystemExit(
            main(
                "emo",
                {
                    "counts": measure_counts,
                    "onnx": measure_onnx,
                    "block_in_vit": measure_block_in_vit,
                    "equal_parameters": measure_equal_parameters,
                    "fashion_mnist": measure_fashion_mnist,
                    "latency": measure_latency,
                },
            )
        )
    except SparingError as error:
        raise SystemExit(str(error)) from error
