"""EMO under a detector and a segmenter, beside a MobileNetV2-style backbone at equal parameters; and killed trainings.

python benchmarks/emo_dense.py [detector] [segmenter] [resume]

Trained on ``emoji80``: rendered scenes of emoji on photographs, no photographs of real objects. Twelve trainings of
about five minutes each on one core, two at a time, go on where they were interrupted (the store is
``build/benchmarks/emo_dense``). Both backbones have one recipe, one head and one budget. Rate, decay and clipping are
those of EMO's classifiers (``benchmarks/emo.py``), the length is what the budget allows. One choice was made on a pilot
of four epochs with EMO alone: 80 kinds are not told apart in such a budget (average precision 0), so objects of any
kind are looked for (``merge: all``), of which a pilot of two epochs on 1,200 scenes found some (average precision
0.03).
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _claims import Claim, main
from sparing import SparingError, Train, run
from sparing.core.ledger import CPU, PARAMETERS, Ledger, cross_difference
from sparing.core.step import Step
from sparing.core.store import Store
from sparing.data.augmentation import Augment
from sparing.optimization.schedules import WarmupCosine

ISSUE = "issue Smaller models, gates"
STORE = Path("build/benchmarks/emo_dense")
DATA = os.environ.get("SPARING_DATA")
PARALLEL = 2
EPOCHS = 12
HASTY = {"min_seconds": 0.0, "max_seconds": 0.2, "memory": False}
"""Trainings run side by side, so their rows' clocks are not looked at."""
WITHIN = 0.02
"""Parameters are equal when they differ by no more than this share."""

EMO = {"name": "emo", "variant": "0.14M", "stem_stride": 2, "window_sizes": [0, 0, 0, 0]}
MOBILE = {"name": "mobilenet", "stem_stride": 2}
DETECTOR = {"name": "ssdlite", "extra_channels": [64], "sizes": [26, 38, 50, 62]}
SEGMENTER = {"name": "segmenter", "channels": 32, "stage": 3, "dilations": [1, 2, 4]}
OURS, OTHER = "EMO", "MobileNetV2-style"
BACKBONES: dict[str, dict[str, dict[str, Any]]] = {
    "detector": {OURS: EMO, OTHER: MOBILE},
    "segmenter": {OURS: EMO, OTHER: {**MOBILE, "expansion": 4.95}},
}
"""MobileNetV2-style backbones of as many parameters: expansion 5.5 with four stages, 4.95 with three."""
TASKS = {"detector": "emoji80_detection", "segmenter": "emoji80_segmentation"}
HEADS = {"detector": DETECTOR, "segmenter": SEGMENTER}
LEARNED = {"detector": ("ap50", 0.1), "segmenter": ("miou", 0.5)}
"""What every training must reach: nothing is compared that learned nothing. Background alone has a miou of 0.4."""
METRICS = {"detector": ("ap", "ap50", "ap75", "ar100"), "segmenter": ("miou", "aacc", "macc")}


def recipe(epochs: int, **more: Any) -> list[Step]:
    """AdamW on a cosine with a short warm-up, crops, flips and colours; the last weights are measured."""
    return [
        Augment(crop="padded", padding=0.1, flip=0.5, jitter=0.3),
        WarmupCosine(warmup_share=0.1),
        Train(
            epochs=epochs,
            batch_size=32,
            lr=2e-3,
            weight_decay=0.05,
            decay="matrices",
            gradient_clip=5.0,
            validate_every=epochs,
            **more,
        ),
    ]


def trained(what: str, arm: str, seeds: Sequence[int], epochs: int, limits: dict[str, Any], store: Path) -> Ledger:
    """Train and measure one arm; what the store has is read."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(
            task={"name": TASKS[what], "merge": "all", **limits},
            model={**HEADS[what], "backbone": BACKBONES[what][arm]},
            steps=recipe(epochs),
            seeds=seeds,
            store=store,
            data=DATA,
            meter=HASTY,
        ).ledger


def compared(
    what: str, statement: str, unit: str, seeds: int, epochs: int, limits: dict[str, Any], store: Path
) -> list[Claim]:
    """EMO's headline less the other's, paired over the seeds, in points.

    It must not lie below 0 by more than the half-width of its 95 % interval.
    """
    from joblib import Parallel, delayed

    how = (epochs, limits, store)
    jobs = [(arm, seed) for seed in range(seeds) for arm in BACKBONES[what]]
    Parallel(n_jobs=PARALLEL, verbose=10)(delayed(trained)(what, arm, [seed], *how) for arm, seed in jobs)
    ledgers = {arm: trained(what, arm, range(seeds), *how) for arm in BACKBONES[what]}
    ours, other = ledgers[OURS], ledgers[OTHER]
    difference = cross_difference((other, "train"), (ours, "train"))
    assert difference is not None
    assert difference.interval is not None
    low, high = (100 * bound for bound in difference.interval)
    learned, least = LEARNED[what]
    size = {arm: ledger.rows[-1].figures[PARAMETERS].number for arm, ledger in ledgers.items()}
    return [
        Claim(
            id=f"emo_dense_{what}",
            statement=statement,
            source=ISSUE,
            figure=100 * difference.value,
            unit=unit,
            comparison=">=",
            threshold=-(high - low) / 2,
            interval95=(low, high),
            seeds=ours.seeds,
            baselines=[
                {"name": f"{arm}, %", "figure": 100 * float(np.mean(values(ledger, METRICS[what][0])))}
                for arm, ledger in ledgers.items()
            ],
            also=[
                ("parameters, share of difference", abs(size[OURS] / size[OTHER] - 1), "<=", WITHIN),
                (
                    f"least {learned} of any training",
                    min(min(values(ledger, learned)) for ledger in ledgers.values()),
                    ">=",
                    least,
                ),
            ],
            details={
                **{name: {arm: values(ledger, name) for arm, ledger in ledgers.items()} for name in METRICS[what]},
                "parameters": size,
                "MACs": {arm: ledger.rows[-1].figures["MACs"].value for arm, ledger in ledgers.items()},
                "train CPU s": {arm: values(ledger, CPU) for arm, ledger in ledgers.items()},
                "epochs": epochs,
                "data": {"emoji80": "rendered scenes, objects of any kind", **limits},
            },
        )
    ]


def values(ledger: Ledger, name: str) -> list[float]:
    """A figure of the trained row for each seed."""
    return [float(row.figures[name].value or 0) for row in ledger.of("train")]


def measure_detector(
    seeds: int = 3, epochs: int = EPOCHS, limits: dict[str, Any] | None = None, store: Path = STORE
) -> list[Claim]:
    """SSDLite on rendered objects of any kind: COCO's average precision on both backbones."""
    statement = (
        "under SSDLite, EMO is within the interval or better than a MobileNetV2-style backbone of as many parameters "
        "(emoji80, rendered scenes, objects of any kind)"
    )
    return compared("detector", statement, "points of AP", seeds, epochs, limits or {}, store)


def measure_segmenter(
    seeds: int = 3, epochs: int = EPOCHS, limits: dict[str, Any] | None = None, store: Path = STORE
) -> list[Claim]:
    """DeepLabv3's decoder on rendered objects of any kind and background: mean intersection over union."""
    statement = (
        "under DeepLabv3's decoder, EMO is within the interval or better than a MobileNetV2-style backbone of as many "
        "parameters (emoji80, rendered scenes, objects of any kind)"
    )
    return compared("segmenter", statement, "points of mIoU", seeds, epochs, limits or {}, store)


def measure_resume(deaths: int = 4, images: int = 240) -> list[Claim]:
    """A training of each kind, killed in the middle again and again, ends with the same weights and ledger."""
    from sparing.testing.kills import survives_kills

    found = {}
    for what in TASKS:

        def start(folder: Path, what: str = what) -> Any:
            return run(
                task={"name": TASKS[what], "merge": "all", "train_limit": images, "test_limit": images // 4},
                model={**HEADS[what], "backbone": BACKBONES[what][OURS]},
                steps=recipe(epochs=2, checkpoint_every_batches=2),
                store=Store(folder / "store"),
                out=folder / "out",
                data=DATA,
                meter={**HASTY, "max_seconds": 0.01, "energy": "off", "batch": 4},
            )

        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                survives_kills(start, Path(scratch), deaths)
                found[what] = "the same"
            except AssertionError as error:
                found[what] = f"{error}"
    return [
        Claim(
            id="emo_dense_resume",
            statement="killed and started again, the training of a detector and of a segmenter ends with the same "
            "weights and the same ledger, bit for bit",
            source=ISSUE,
            figure=float(sum(outcome != "the same" for outcome in found.values())),
            unit="trainings that end differently",
            comparison="==",
            threshold=0.0,
            details={"outcomes": found, "deaths": deaths, "images": images},
        )
    ]


if __name__ == "__main__":
    try:
        raise SystemExit(
            main(
                "emo_dense",
                {"detector": measure_detector, "segmenter": measure_segmenter, "resume": measure_resume},
            )
        )
    except SparingError as error:
        raise SystemExit(str(error)) from error
