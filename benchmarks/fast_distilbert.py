"""Fast DistilBERT's accuracy: what 80 % of 4×1 blocks and INT8 cost on three text sets, beside other patterns.

python benchmarks/fast_distilbert.py [ag_news] [sst2] [trec] [arms] [squad]
SEEDS=0,1 ARMS_SEEDS=0 python benchmarks/fast_distilbert.py …      # fewer seeds; the results say which

The trainings are kept in the system's folder for temporary files as they end, and their states while they last, so an
interrupted benchmark goes on where it was; they are made anew when the code they depend on changes.
"""

from __future__ import annotations

import functools
import inspect
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from _claims import Claim, main, revision
from sparing.compression import pruning, pruning_lightning
from sparing.compression.pruning import BlockPrune, lock_pattern, sparsity_of
from sparing.core import files
from sparing.core.fingerprint import fingerprint
from sparing.core.job import TrainingPlan
from sparing.core.predictor import ModulePredictor, build_model, load
from sparing.core.randomness import isolated_rng
from sparing.core.registry import resolve
from sparing.core.statistics import difference_over_seeds
from sparing.core.store import Progress
from sparing.core.training import Train, fit
from sparing.core.transfer import transfer_model
from sparing.distillation import logits
from sparing.models import bert

ISSUE = "issue Cheaper inference I, table of gates"
SHEET = "sheet fast_distilbert, demonstration A"
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2").split(",")]
ARMS_SEEDS = [int(seed) for seed in os.environ.get("ARMS_SEEDS", "0,1,2").split(",")]
MODEL: dict[str, Any] = {"dim": 256, "depth": 4, "heads": 4, "hidden": 1024, "dropout": 0.1}
MLM_STEPS = 500
LM_SEED = 0
"""The language models are trained once, for all tasks; the seeds are those of fine-tuning."""
TASKS: dict[str, dict[str, Any]] = {
    "ag_news": {"fields": {}, "steps": 500, "best": True},
    "sst2": {"fields": {"train_limit": 20_000}, "steps": 400, "best": False},
    "trec": {"fields": {}, "steps": 350, "best": False},
}
"""Task → its fields, optimizer steps of fine-tuning, and whether the best validation's weights are taken.

On AG News dense models lose more than a point from the third epoch on; the others see their data once or twice.
"""
PATTERNS: dict[str, tuple[int, int]] = {"4×1": (4, 1), "1×4": (1, 4), "unstructured": (1, 1)}
CALIBRATION = 512


def settings(steps: int, lr: float, best: bool = False) -> Train:
    """AdamW, a twentieth of warm-up, then a linear fall; bfloat16 products."""
    return Train(
        max_steps=steps,
        batch_size=64,
        lr=lr,
        weight_decay=0.01,
        decay="matrices",
        optimizer_args={"fused": True},
        scheduler="LinearLR",
        scheduler_args={"start_factor": 1.0, "end_factor": 0.0},
        warmup_steps=steps // 20,
        precision="bf16-mixed",
        accelerator="cpu",
        restore_best=best,
    )


# ------------------------------------------------------------------------------------------------------------ trainings


def work() -> Path:
    """Where trainings are kept; another folder when what decides them has changed."""
    sources = [inspect.getsource(module) for module in (bert, pruning, pruning_lightning, logits)]
    key = fingerprint([*sources, inspect.getsource(settings), repr(MODEL), torch.__version__])[:16]
    return Path(tempfile.gettempdir()) / "sparing-benchmarks" / f"fast_distilbert-{key}"


@functools.cache
def task(name: str) -> Any:
    """A registered task with this benchmark's fields, its data read."""
    return resolve("tasks", name)(**TASKS.get(name, {"fields": {}})["fields"])


@functools.cache
def splits(name: str) -> Any:
    """Its data, from the data root."""
    root = os.environ.get("SPARING_DATA")
    return task(name).splits(Path(root) if root else None)


def kept(name: str, task_name: str, make: Callable[[Progress], nn.Module]) -> nn.Module:
    """The model of this name, trained if it is not there."""
    folder = work() / name
    if not (folder / "sparing.json").is_file():
        progress = Progress(work() / "progress" / name.replace("/", "-"))
        model = make(progress)
        ModulePredictor(model, task(task_name)).save(folder)
        wall, cpu = progress.spent
        files.write_json(work() / f"{name}.cost.json", {"wall_s": wall, "cpu_s": cpu, "revision": revision()})
        progress.clear()
        print(f"{name}: {wall:.0f} s, {cpu:.0f} s of CPU", flush=True)
    return load(folder).model.requires_grad_(True)  # type: ignore[attr-defined]


def pruned(plan: TrainingPlan, block: tuple[int, int]) -> TrainingPlan:
    """The plan with 80 % of the blocks pruned in it, the learning rate rewound."""
    step = BlockPrune(block=block, sparsity=0.8, warmup=0.05)
    return plan.adding(
        model_wraps=lambda model: (model, step.pruner(model).apply_),
        callbacks=lambda: pruning_lightning.BlockPruning(make=step.pruner, schedule=step.schedule),
        scheduler=step.rewound,
    )


def locked(plan: TrainingPlan) -> TrainingPlan:
    """The plan with the model's zeros kept in it."""
    return plan.adding(model_wraps=lambda model: (model, lock_pattern(model).apply_))


def taught(plan: TrainingPlan, teacher: nn.Module, task_name: str) -> TrainingPlan:
    """The plan with a teacher: α_CE = α_KD = 0.5, T = 2."""
    predictor = ModulePredictor(teacher, task(task_name))
    return plan.adding(loss_terms=lambda: logits.distillation_term(predictor, task(task_name), 2.0, 0.5))


def trained(
    name: str,
    task_name: str,
    start: Callable[[], nn.Module],
    steps: int,
    lr: float,
    seed: int,
    plan: TrainingPlan,
    best: bool = False,
) -> nn.Module:
    """``start()`` trained so many steps on the task, by the plan."""
    unwarmed = settings(steps, lr, best)
    if plan.scheduler is not None:  # set by the pruning
        fields = unwarmed.config() | {"scheduler": "", "scheduler_args": {}, "warmup_steps": 0}
        unwarmed = Train(**fields)

    def make(progress: Progress) -> nn.Module:
        with isolated_rng("fast_distilbert", name, seed):
            model = start()
        data = splits(task_name)
        val = data.val if best else None
        return fit(model, task(task_name), data.train, val, unwarmed, plan, seed, progress).model

    return kept(f"{name}/seed{seed}", task_name, make)


def teacher_lm() -> nn.Module:
    """The dense language model that teaches the sparse one."""

    def start() -> nn.Module:
        return build_model("bert", task("masked_lm"), **MODEL)

    return trained("lm", "masked_lm", start, MLM_STEPS, 5e-4, LM_SEED, TrainingPlan())


def dense_lm() -> nn.Module:
    """The control: as many further steps as the pruning takes, without it."""
    return trained("lm dense", "masked_lm", teacher_lm, MLM_STEPS, 5e-4, LM_SEED, TrainingPlan())


def sparse_lm(pattern: str = "4×1") -> nn.Module:
    """The language model pruned once, for all tasks."""
    plan = taught(pruned(TrainingPlan(), PATTERNS[pattern]), teacher_lm(), "masked_lm")
    return trained(f"lm {pattern}", "masked_lm", teacher_lm, MLM_STEPS, 5e-4, LM_SEED, plan)


LAST_WEIGHTS = ("pruned in fine-tuning", "sparse, last weights")
"""Pruning has to come to its end, so its last weights are taken; what stands beside it has its last weights as well."""


def moved(model: nn.Module, task_name: str) -> nn.Module:
    """A language model with a new head for the task."""
    return transfer_model(model, task("masked_lm"), task(task_name))[0]


def fine_tuned(arm: str, task_name: str, seed: int) -> nn.Module:
    """One arm's model on a task."""
    plan, steps = TrainingPlan(), TASKS[task_name]["steps"]
    make: Callable[[], nn.Module]
    if arm == "dense":
        make = dense_lm
    elif arm == "pruned in fine-tuning":
        make = dense_lm
        plan = taught(pruned(plan, (4, 1)), fine_tuned("dense", task_name, seed), task_name)
    else:
        pattern = arm if arm in PATTERNS else "4×1"
        make = functools.partial(sparse_lm, pattern)
        plan = locked(plan)
        if arm != "without a teacher":
            plan = taught(plan, fine_tuned("dense", task_name, seed), task_name)
    best = TASKS[task_name]["best"] and arm not in LAST_WEIGHTS
    name = f"{task_name} {arm} {steps} steps"
    return trained(name, task_name, lambda: moved(make(), task_name), steps, 3e-4, seed, plan, best)


# ----------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Scored:
    """What a model scored: outcome of each test unit, bytes, zeros."""

    outcomes: np.ndarray
    bytes: int
    sparsity: float


@functools.cache
def scored(arm: str, task_name: str, seed: int, int8: bool) -> Scored:
    """An arm's model on the test split: in FP32 by ONNX Runtime, in INT8 by the engine."""
    from sparing.compression.compiling import compile_model
    from sparing.core.predictor import to_onnx

    model = fine_tuned(arm, task_name, seed).eval()
    about = task(task_name)
    kind = "int8" if int8 else "fp32"
    name = f"{task_name} {arm} {TASKS[task_name]['steps']} steps {kind}/seed{seed}.npz"
    target = work() / "scores" / name
    if not target.is_file():
        if int8:
            calibration = splits(task_name).calibration
            chosen = Subset(calibration, range(min(CALIBRATION, len(calibration))))
            predictor: Any = compile_model(model, about, chosen, splits(task_name).val)[0]
        else:
            predictor = to_onnx(model, None, about)
        predictor.set_threads(1)
        outcomes = about.evaluate(predictor, splits(task_name).test).per_unit
        zeros = sparsity_of(model, names=[n for n, _ in model.named_modules() if n.startswith("blocks.")]).sparsity
        files.write_arrays(
            target,
            {
                "outcomes": np.asarray(outcomes),
                "bytes": np.asarray(predictor.describe().model_bytes),
                "sparsity": np.asarray(zeros),
            },
        )
        print(f"{name}: {100 * np.mean(outcomes):.2f}", flush=True)
    found = files.read_arrays(target)
    return Scored(found["outcomes"], int(found["bytes"]), float(found["sparsity"]))


def points(arm: tuple[str, bool], beside: tuple[str, bool], task_name: str, seeds: Sequence[int]) -> Any:
    """Accuracy of ``arm`` minus that of ``beside`` on the same test units, in points: mean over seeds, interval."""
    differences = [
        100 * float(np.mean(scored(arm[0], task_name, s, arm[1]).outcomes))
        - 100 * float(np.mean(scored(beside[0], task_name, s, beside[1]).outcomes))
        for s in seeds
    ]
    return difference_over_seeds(differences)


def accuracy(arm: tuple[str, bool], task_name: str, seeds: Sequence[int]) -> float:
    """Mean accuracy over the seeds, in percent."""
    return statistics.fmean(100 * float(np.mean(scored(arm[0], task_name, s, arm[1]).outcomes)) for s in seeds)


COLUMNS: Mapping[str, tuple[str, bool]] = {
    "dense FP32": ("dense", False),
    "dense INT8": ("dense", True),
    "sparse FP32": ("sparse", False),
    "sparse INT8": ("sparse", True),
}


def measure_task(name: str, gate: bool) -> list[Claim]:
    """The four main columns on one task, over all seeds."""
    found = {
        column: points(which, COLUMNS["dense FP32"], name, SEEDS)
        for column, which in COLUMNS.items()
        if column != "dense FP32"
    }
    main_ = found["sparse INT8"]
    sizes = {column: scored(*which[:1], name, SEEDS[0], which[1]).bytes for column, which in COLUMNS.items()}
    return [
        Claim(
            id=name,
            statement=f"80 % of 4×1 blocks pruned once and INT8 lose at most a point of accuracy on {task(name).name} "
            "(one sparse and one dense language model, seeds of fine-tuning)",
            source=ISSUE if gate else SHEET,
            figure=main_.value,
            unit="points of test accuracy over dense FP32",
            comparison=">=",
            threshold=-1.0,
            gate=gate,
            interval95=main_.interval,
            seeds=SEEDS,
            baselines=[
                {"name": f"accuracy, {column}, %", "figure": accuracy(which, name, SEEDS)}
                for column, which in COLUMNS.items()
            ],
            details={
                "test units": len(scored("dense", name, SEEDS[0], False).outcomes),
                "over dense FP32": {
                    column: {"points": d.value, "interval95": d.interval, "shown": d.shown}
                    for column, d in found.items()
                },
                "sparse INT8 over dense INT8": points(COLUMNS["sparse INT8"], COLUMNS["dense INT8"], name, SEEDS).value,
                "accuracy by seed, %": {
                    column: [100 * float(np.mean(scored(which[0], name, s, which[1]).outcomes)) for s in SEEDS]
                    for column, which in COLUMNS.items()
                },
                "model bytes": sizes,
                "share of zeros in the blocks": scored("sparse", name, SEEDS[0], False).sparsity,
                "optimizer steps": {"language model": 2 * MLM_STEPS, "task": TASKS[name]["steps"]},
                "model": MODEL,
            },
        )
    ]


def measure_arms(name: str = "ag_news") -> list[Claim]:
    """Other patterns, no teacher, and pruning in fine-tuning alone, beside the sparse model; all in FP32."""
    statements = {
        "without a teacher": ("no_teacher", "a teacher helps the sparse model in fine-tuning"),
        "1×4": ("block_1x4", "4×1 blocks are as good as 1×4 blocks"),
        "unstructured": ("unstructured", "4×1 blocks lose beside single weights"),
        "pruned in fine-tuning": ("fine_tuning_only", "pruning once in pre-training beats pruning in fine-tuning"),
    }
    claims = []
    for arm, (id_, statement) in statements.items():
        sparse = "sparse, last weights" if arm in LAST_WEIGHTS else "sparse"
        found = points((sparse, False), (arm, False), name, ARMS_SEEDS)
        claims.append(
            Claim(
                id=id_,
                statement=statement,
                source=SHEET,
                figure=found.value,
                unit=f"points of test accuracy on {task(name).name} of 4×1 pruned once, with a teacher, over: {arm}"
                + (" (the last weights of both)" if arm in LAST_WEIGHTS else ""),
                comparison="<=" if arm == "unstructured" else ">=",
                threshold=0.0,
                gate=False,
                interval95=found.interval,
                seeds=ARMS_SEEDS,
                baselines=[
                    {"name": f"accuracy, {arm}, %", "figure": accuracy((arm, False), name, ARMS_SEEDS)},
                    {"name": f"accuracy, {sparse}, FP32, %", "figure": accuracy((sparse, False), name, ARMS_SEEDS)},
                ],
                details={
                    "shown": found.shown,
                    "share of zeros in the blocks": scored(arm, name, ARMS_SEEDS[0], False).sparsity,
                    "optimizer steps": {"language model": 2 * MLM_STEPS, "task": TASKS[name]["steps"]},
                },
            )
        )
    return claims


def measure_squad(steps: int = 200) -> list[Claim]:
    """Questions and answers on real lengths: far too little data to learn from, enough to compare INT8 with FP32."""
    from sparing.compression.compiling import compile_model
    from sparing.core.predictor import to_onnx

    about, data = task("squad"), splits("squad")

    def start() -> nn.Module:
        return build_model("bert", about, **MODEL)

    model = trained(f"squad {steps} steps", "squad", start, steps, 3e-4, 0, TrainingPlan()).eval()
    engine, report = compile_model(model, about, data.calibration, data.val, samples=64)
    found = {}
    for name, predictor in {"FP32": to_onnx(model, None, about), "INT8 engine": engine}.items():
        predictor.set_threads(1)
        found[name] = about.evaluate(predictor, data.test)
    outcomes = {name: np.asarray(scores.per_unit) for name, scores in found.items()}
    change = 100 * (outcomes["INT8 engine"] - outcomes["FP32"])
    half = 1.96 * float(change.std(ddof=1)) / len(change) ** 0.5
    return [
        Claim(
            id="squad_smoke",
            statement="on real questions of up to 384 pieces the INT8 engine answers as well as FP32",
            source="sheet fast_distilbert, demonstration C",
            figure=float(change.mean()),
            unit="points of F1 over FP32",
            comparison=">=",
            threshold=-1.0,
            gate=False,
            interval95=(float(change.mean()) - half, float(change.mean()) + half),
            seeds=[0],
            baselines=[
                {"name": f"{metric}, {name}, %", "figure": 100 * scores.metrics[metric]}
                for name, scores in found.items()
                for metric in scores.metrics
                if metric in ("f1", "exact_match")
            ],
            details={
                "questions": len(change),
                "questions with the same F1": float((change == 0).mean()),
                "layers in float": len(report.in_float),
                "optimizer steps": steps,
                "model": MODEL,
            },
        )
    ]


def train_all() -> list[Claim]:
    """Only the trainings, those of the gates first."""
    for name in TASKS:
        for seed in SEEDS:
            fine_tuned("dense", name, seed)
            fine_tuned("sparse", name, seed)
    for seed in ARMS_SEEDS:
        for arm in ("without a teacher", *LAST_WEIGHTS, "1×4", "unstructured"):
            fine_tuned(arm, "ag_news", seed)
    return []


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(
        main(
            "fast_distilbert",
            {
                "train": train_all,
                "ag_news": lambda: measure_task("ag_news", gate=True),
                "sst2": lambda: measure_task("sst2", gate=True),
                "trec": lambda: measure_task("trec", gate=False),
                "arms": measure_arms,
                "squad": measure_squad,
            },
        )
    )
