"""TinyMIM beside training from scratch and masked pre-training of the student itself: signed digits, few labels.

python benchmarks/tinymim.py [few_labels]
TINY=1 python benchmarks/tinymim.py … --out DIR   # a few steps of everything, to see that it runs

People in the test images are in no other. Stages without labels see all training images and no others, twice, with
other seeds; the 10 or 40 labels of each class are the same for all arms of a seed of fine-tuning; there are three.
Every stage is kept in a store in the system's folder for temporary files, so an interrupted benchmark goes on where it
was; it is made anew when any code of Sparing changes.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _claims import Claim, main
from sparing.core.pipeline import apply_steps, begin
from sparing.core.predictor import build_model
from sparing.core.randomness import isolated_rng
from sparing.core.statistics import difference_over_seeds
from sparing.core.store import Store
from sparing.data.augmentation import Augment
from sparing.distillation.finetuning import FineTune
from sparing.distillation.pretraining import Pretrain
from sparing.distillation.relations import DistilRelations
from sparing.optimization.label_smoothing import SmoothLabels
from sparing.tasks.images.sign_digits import SignDigits

ISSUE = "issue Smaller models, gates"
SHEET = "sheet tinymim, demonstration"
TINY = bool(os.environ.get("TINY"))
SEEDS = (0, 1) if TINY else (0, 1, 2)
"""Of fine-tuning: labels, order, head. Arms are paired by them."""
STAGE_SEEDS = (0,) if TINY else (0, 1)
"""Of what comes before it, teachers included; figures of one seed of fine-tuning are means over these."""
LABELS = (10, 40) if TINY else (10, 40, None)
"""Labelled images of each class; None: all."""
DECAYS = (0.65, 1.0)
"""Layer-wise decay of fine-tuning: each arm has the better of them on the validation images."""
TEACHER = {"patch_size": 8, "dim": 128, "depth": 6, "heads": 4}
STUDENT = {"patch_size": 8, "dim": 64, "depth": 4, "heads": 2}
DECODER = {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
STAGE = {"batch_size": 64, "lr": 1e-3, "scale": (0.75, 1.0), "flip": 0.5, "accelerator": "cpu"}
PROBES = (1, 2) if TINY else (1, 6)
"""Epochs of two short trainings of the student's own, whose difference tells how long an epoch takes."""
EPOCHS = {"teacher": 150, "distillation": 60, 10: 60, 40: 40, None: 40}
SETTINGS = {
    "teacher": TEACHER,
    "student": STUDENT,
    "decoder": DECODER,
    "stages without labels": STAGE,
    "epochs": {str(name): count for name, count in EPOCHS.items()},
    "fine-tuning": {"batch_size": 50, "lr": 2e-3, "label_smoothing": 0.1, "crops": [0.75, 1.0], "flip": 0.5},
    "layer decay": DECAYS,
    "warm-up epochs": 5,
}


@dataclass(frozen=True)
class Stage:
    """A pre-trained student, and what it took."""

    weights: Any
    """The state of a "mae_vit", or None: from scratch."""
    cpu_s: float = 0.0
    """CPU seconds of its own stage, the teacher's not counted."""
    epochs: int = 0


class Bench:
    """The stages without labels of one seed, each made once, and what fine-tuning makes of them."""

    def __init__(self, task: SignDigits, seed: int, store: Store) -> None:
        self.task, self.seed, self.store = task, seed, store
        self.kept: dict[str, Stage] = {}

    def job(self, model: dict[str, Any], weights: Any = None, seed: int | None = None) -> Any:
        """A job that begins with a model of these sizes and weights; a fresh one is the same in every arm."""
        with isolated_rng("model", self.seed):
            made = build_model("mae_vit", self.task, **model)
        if weights is not None:
            made.load_state_dict(weights)
        return begin(self.task, made, seed=self.seed if seed is None else seed, store=self.store)

    def run(self, name: str, job: Any, step: Any) -> Stage:
        """A step's model and cost, told once."""
        if name not in self.kept:
            after = apply_steps(job, [step])
            cost = after.store.cost.cpu_s
            self.kept[name] = Stage((dict(after.model.state_dict()), after.model.config), cost, step.epochs)
            print(f"stage seed {self.seed}, {name}: {cost:.0f} CPU s for {step.epochs} epochs", flush=True)
        return self.kept[name]

    def teacher(self) -> Stage:
        """The masked autoencoder that all distillations learn from."""
        step = Pretrain(epochs=epochs("teacher"), warmup_epochs=warmup("teacher"), **STAGE, **DECODER)
        return self.run("teacher", self.job(TEACHER), step)

    def distilled(self, name: str, **target: Any) -> Stage:
        """The student after one kind of distillation."""
        step = DistilRelations(
            model={"name": "mae_vit", **STUDENT},
            epochs=epochs("distillation"),
            warmup_epochs=warmup("distillation"),
            **STAGE,
            **target,
        )
        return self.run(name, self.job(TEACHER, self.teacher().weights[0]), step)

    def own_mae(self) -> Stage:
        """The student's own masked pre-training, for as many CPU seconds as relations from block 4 took.

        How many epochs these are follows from two short trainings, rounded up.
        """
        budget = self.distilled("relations, block 4", target_block=4).cpu_s

        def stage(name: str, count: int) -> Stage:
            step = Pretrain(epochs=count, warmup_epochs=min(5.0, count / 4), **STAGE, **DECODER)
            return self.run(name, self.job(STUDENT), step)

        short, longer = (stage(f"own MAE, {count} epochs", count) for count in PROBES)
        each = max(longer.cpu_s - short.cpu_s, longer.cpu_s / 5) / (PROBES[1] - PROBES[0])  # clocks err
        start = short.cpu_s - PROBES[0] * each
        return stage("own MAE", max(1, math.ceil((budget - start) / each)))

    def arms(self) -> dict[str, Callable[[], Stage]]:
        """Name → its stage without labels."""
        depth = TEACHER["depth"]
        return {
            "scratch": lambda: Stage(None),
            "own MAE": self.own_mae,
            "class token": lambda: self.distilled("class token", target="cls_token", target_block=depth),
            "features, last block": lambda: self.distilled("features", target="features", target_block=depth),
            "relations, block 4": lambda: self.distilled("relations, block 4", target_block=4),
            "relations, last block": lambda: self.distilled("relations, last block", target_block=depth),
        }

    def accuracy(self, stage: Stage, labels: int | None, seed: int) -> dict[str, float]:
        """Test accuracy in percent after fine-tuning with the decay that does best on the validation images."""
        found = []
        for decay in DECAYS:
            job = self.job(STUDENT, seed=seed)
            if stage.weights is not None:
                state, config = stage.weights
                job = self.job({**STUDENT, "last_heads": config.last_heads}, state, seed)
            tune = FineTune(
                epochs=epochs(labels),
                warmup_epochs=warmup(labels),
                batch_size=50,
                lr=2e-3,
                layer_decay=decay,
                labels_per_class=labels,
                validate_every=1000,
                accelerator="cpu",
            )
            crops = Augment(crop="resized", scale=(0.75, 1.0), flip=0.5, jitter=0.0)
            job = apply_steps(job, [crops, SmoothLabels(epsilon=0.1), tune])
            val, test = (self.task.evaluate(job.predictor, split) for split in (job.val, self.splits().test))
            found.append({"val": val.metrics["accuracy"], "test": test.metrics["accuracy"], "decay": decay})
        best = max(found, key=lambda run: run["val"])  # the earlier of equals
        return {"accuracy": 100 * best["test"], "decay": best["decay"]}

    def splits(self) -> Any:
        """The task's, of which fine-tuning never sees the test split."""
        return self.task.splits(None)


def epochs(stage: Any) -> int:
    """Epochs of a stage."""
    return 1 if TINY else EPOCHS[stage]


def warmup(stage: Any) -> float:
    """Epochs of warm-up."""
    return min(5.0, epochs(stage) / 4)


def shown(labels: int | None) -> str:
    """How many labels these are."""
    return "all labels" if labels is None else f"{10 * labels} labels"


def measure_few_labels() -> list[Claim]:
    """Six ways of beginning, fine-tuned with 100, 400 and all labels."""
    store, task = Store(Path(tempfile.gettempdir()) / "sparing-benchmarks" / "tinymim"), SignDigits()
    found: dict[tuple[str, int | None], dict[int, list[float]]] = {}
    decays: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}
    for stage_seed in STAGE_SEEDS:
        bench = Bench(task, stage_seed, store)
        for name, make in bench.arms().items():
            stage = make()
            seconds.setdefault(name, []).append(stage.cpu_s)
            counts.setdefault(name, []).append(stage.epochs)
            for labels in LABELS if stage_seed == STAGE_SEEDS[0] else LABELS[:2]:
                for seed in SEEDS:
                    run = bench.accuracy(stage, labels, seed)
                    found.setdefault((name, labels), {}).setdefault(seed, []).append(run["accuracy"])
                    decays.setdefault(f"{name}, {shown(labels)}", []).append(run["decay"])
                    told = f"{run['accuracy']:.1f} %, decay {run['decay']}"
                    print(f"stage seed {stage_seed}, seed {seed}, {name}, {shown(labels)}: {told}", flush=True)
        seconds.setdefault("teacher", []).append(bench.teacher().cpu_s)
    names = list(dict.fromkeys(name for name, _ in found))
    relations, scratch, own_mae = "relations, block 4", "scratch", "own MAE"

    def accuracies(name: str, labels: int | None) -> list[float]:
        return [statistics.fmean(found[name, labels][seed]) for seed in SEEDS]

    def compared(id_: str, statement: str, one: str, other: str, labels: int | None, at_least: float, sign: str,
                 source: str, gate: bool) -> Claim:  # fmt: skip
        pairs = zip(accuracies(one, labels), accuracies(other, labels), strict=True)
        difference = difference_over_seeds([a - b for a, b in pairs])
        return Claim(
            id=id_,
            statement=statement,
            source=source,
            figure=difference.value,
            unit="points of test accuracy",
            comparison=sign,
            threshold=at_least,
            gate=gate,
            interval95=difference.interval,
            seeds=SEEDS,
            baselines=[
                {"name": f"{name}, {shown(labels)}, %", "figure": statistics.fmean(accuracies(name, labels))}
                for name in names
            ],
            details={
                "settings": SETTINGS,
                "chosen on": "203 validation photographs of other people: layer decay of fine-tuning, for each arm",
                "accuracy": {f"{name}, {shown(count)}": accuracies(name, count) for name in names for count in LABELS},
                "layer decay": decays,
                "seeds of the stages without labels": STAGE_SEEDS,
                "CPU seconds without labels": seconds,
                "the same with the teacher's": {
                    name: [own + first for own, first in zip(seconds[name], seconds["teacher"], strict=True)]
                    for name in names
                    if name not in (scratch, own_mae)
                },
                "epochs without labels": counts,
            },
        )

    return [
        compared("beats_scratch_100", "with 100 labels, relations of an MAE teacher beat training from scratch by 10 "
                 "points", relations, scratch, 10, 10.0, ">=", ISSUE, True),
        compared("beats_own_mae_100", "with 100 labels, relations beat the student's own masked pre-training for as "
                 "many CPU seconds", relations, own_mae, 10, 0.0, ">", ISSUE, True),
        compared("scratch_400", "with 400 labels, relations beat training from scratch by 10 points",
                 relations, scratch, 40, 10.0, ">=", SHEET, False),
        compared("own_mae_400", "with 400 labels, relations beat the student's own masked pre-training by 2 points",
                 relations, own_mae, 40, 2.0, ">=", SHEET, False),
        compared("features_over_cls_100", "with 100 labels, features teach more than the class token",
                 "features, last block", "class token", 10, 0.0, ">", SHEET, False),
        compared("block_4_over_last_100", "with 100 labels, relations of block 4 teach more than those of the last",
                 relations, "relations, last block", 10, 0.0, ">", SHEET, False),
    ]  # fmt: skip


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {"few_labels": measure_few_labels}


def run(argv: Iterable[str] | None = None) -> int:
    """All of it."""
    return main("tinymim", BENCHMARKS, None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(run())
