"""Predictive Exit on Fashion-MNIST: multiply-accumulates, exit evaluations, simulated energy and wall time.

python benchmarks/predictive_exit.py [tables] [speed]
SEEDS=0,1 python benchmarks/predictive_exit.py …      # fewer seeds; the results say which

A VGG-like network of 10 convolutions with an exit behind each of them. Trainings and tables of logits are kept in the
system's folder for temporary files, and made anew when the code they depend on changes; all policies are calibrated and
compared on these tables, on the same exits, with the same costs.
"""

from __future__ import annotations

import functools
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from _claims import Claim, main, revision
from sparing.adaptive import exit_training, exits
from sparing.adaptive.calibration import Calibrated, activation_rules, calibrate, worthwhile_exits
from sparing.adaptive.dvfs import EnergyModel
from sparing.adaptive.exit_cost import CostModel
from sparing.adaptive.exit_predictor import EarlyExitPredictor, needed_exits, staged, tabulated, timed
from sparing.adaptive.exit_training import train_exits
from sparing.adaptive.exits import MultiExitModel, attach_exits
from sparing.adaptive.forecast import first_passing, fit_kernel
from sparing.adaptive.policies import FullNetworkPolicy, OraclePolicy, PredictiveExitPolicy
from sparing.core import files
from sparing.core.fingerprint import fingerprint
from sparing.core.predictor import ModulePredictor, build_model, load, to_onnx
from sparing.core.randomness import isolated_rng
from sparing.core.statistics import difference_over_seeds
from sparing.core.store import Progress
from sparing.core.training import Train, fit
from sparing.models import convnet
from sparing.tasks.custom import CustomTask
from sparing.tasks.images.published import FashionMNIST

ISSUE = "issue Cheaper inference II, gates"
SHEET = "sheet predictive_exit, demonstration"
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2").split(",")]
TRAIN, VAL, TEST = 15_000, 2_000, 5_000
NET: dict[str, Any] = {"widths": [32, 64, 128, 128], "depths": [2, 2, 3, 3], "image_size": 32}
MAX_LOSS = 0.005
RHOS = (0.0, 0.05, 0.1, 0.3)
ORDERS = 10
BASELINES = ("every", "branchynet", "passalis", "sdn", "patience", "placed")


def backbone_settings() -> Train:
    """Stage (a): Adam 5e-4, six passes."""
    return Train(epochs=6, batch_size=128, optimizer="Adam", lr=5e-4, accelerator="cpu", scheduler="one_cycle")


def exit_settings(frozen: bool) -> Train:
    """Stage (b): four passes with the network frozen; for the arm with a free one, four more from there.

    The histograms an exit's linear layers read are about 1/64 each, so that Adam's 1e-3 learns little in four passes;
    the rate was chosen on the calibration images, of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1.
    """
    lr = 3e-2 if frozen else 5e-4
    return Train(epochs=4, batch_size=128, optimizer="Adam", lr=lr, scheduler="one_cycle", accelerator="cpu")


# ------------------------------------------------------------------------------------------------------------ trainings


def work() -> Path:
    """Where trainings and tables are kept; another folder when what decides them has changed."""
    sources = [inspect.getsource(module) for module in (convnet, exits, exit_training)]
    settings = [inspect.getsource(backbone_settings), inspect.getsource(exit_settings), repr((NET, TRAIN, VAL, TEST))]
    key = fingerprint([*sources, *settings, torch.__version__])[:16]
    return Path(tempfile.gettempdir()) / "sparing-benchmarks" / f"predictive_exit-{key}"


@functools.cache
def task() -> CustomTask:
    """Fashion-MNIST on 32×32 pixels: 15,000 images to train on, 2,000 to calibrate on, 5,000 to test on."""
    root = os.environ.get("SPARING_DATA")
    splits = FashionMNIST().splits(Path(root) if root else None)

    def tensors(split: Any, start: int, count: int) -> TensorDataset:
        pairs = [split[i] for i in range(start, start + count)]
        images = torch.nn.functional.pad(torch.stack([torch.as_tensor(x) for x, _ in pairs]), (2, 2, 2, 2))
        return TensorDataset(images, torch.tensor([int(y) for _, y in pairs]))

    made = CustomTask(
        "fashion_mnist_32",
        tensors(splits.train, 0, TRAIN),
        tensors(splits.test, 0, TEST),
        val=tensors(splits.train, TRAIN, VAL),
        calibration=tensors(splits.train, TRAIN + VAL, 512),
        model=lambda: build_model("convnet", in_channels=1, num_classes=10, **NET),
        loss=torch.nn.functional.cross_entropy,
        labels=FashionMNIST.labels,
    )
    return made


def backbone(seed: int) -> torch.nn.Module:
    """The network, trained by itself."""
    folder = work() / f"backbone/seed{seed}"
    if not (folder / "sparing.json").is_file():
        with isolated_rng("predictive_exit", seed):
            model = task().default_model()
        progress = Progress(work() / "progress" / f"backbone{seed}")
        data = task().splits(None)
        trained = fit(model, task(), data.train, None, backbone_settings(), None, seed, progress).model
        ModulePredictor(trained, task()).save(folder)
        print(f"backbone, seed {seed}: {progress.spent[1]:.0f} s of CPU", flush=True)
        progress.clear()
    return load(folder).model.eval()  # type: ignore[attr-defined]


def with_exits(seed: int, frozen: bool = True) -> MultiExitModel:
    """The network with trained exits."""
    if frozen:
        with isolated_rng("predictive_exit", "exits", seed):
            model = attach_exits(backbone(seed), example=task().example_input(2))
    else:
        model = with_exits(seed)
    target = work() / f"exits{'' if frozen else ' and backbone'}/seed{seed}.npz"
    if not target.is_file():
        progress = Progress(work() / "progress" / target.parent.name.replace(" ", "-") / str(seed))
        data = task().splits(None)
        settings = exit_settings(frozen)
        train_exits(model, task(), data.train, None, settings, freeze_backbone=frozen, seed=seed, progress=progress)
        files.write_arrays(target, {name: value.numpy() for name, value in model.state_dict().items()})
        print(f"{target.parent.name}, seed {seed}: {progress.spent[1]:.0f} s of CPU", flush=True)
        progress.clear()
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in files.read_arrays(target).items()})
    return model.eval()


@dataclass(frozen=True)
class Table:
    """Logits of all exits and the final head, on calibration and test images."""

    val: np.ndarray
    val_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    cost: CostModel


@functools.cache
def table(seed: int, frozen: bool = True) -> Table:
    """As ONNX Runtime computes them."""
    target = work() / f"table{'' if frozen else ' and backbone'}/seed{seed}.npz"
    if not target.is_file():
        model, data = with_exits(seed, frozen), task().splits(None)
        cost = model.costs(task().example_input(1))
        whole = EarlyExitPredictor(*staged(model, task()), FullNetworkPolicy(), cost, task())
        arrays = {}
        for name, split in {"val": data.val, "test": data.test}.items():
            arrays[name], arrays[f"{name}_labels"] = tabulated(whole, task(), split)
        arrays |= {"layer_macs": np.asarray(cost.layer_macs), "exit_macs": np.asarray(cost.exit_macs)}
        files.write_arrays(target, arrays)
    a = files.read_arrays(target)
    cost = CostModel(tuple(a["layer_macs"].tolist()), tuple(a["exit_macs"].tolist()), 3.0 * a["test"].shape[-1])
    return Table(a["val"], a["val_labels"], a["test"], a["test_labels"], cost)


# ------------------------------------------------------------------------------------------------------------- policies


@dataclass(frozen=True)
class Scored:
    """A calibrated policy on the test images."""

    policy: Any
    loss: float
    """Points of accuracy below the full network."""
    macs: float
    """Share of the full network's."""
    evaluations: float
    reference_macs: float
    """Share by the reference's accounting."""


def reference_cost(cost: CostModel) -> CostModel:
    """The reference's accounting of this network: layers without the area of their 3×3 kernels."""
    *layers, head = cost.layer_macs
    return replace(cost, layer_macs=(*(macs / 9 for macs in layers), head))


def scored(found: Calibrated, t: Table) -> Scored:
    """On the test images."""
    trace = found.policy.run(t.test)
    return scored_trace(found.policy, trace, t)


def scored_trace(policy: Any, trace: Any, t: Table) -> Scored:
    """What a way through the network costs and loses."""
    full = (t.test[:, -1].argmax(-1) == t.test_labels).mean()
    reference = reference_cost(t.cost)
    return Scored(
        policy,
        100 * float(full - (trace.answers(t.test) == t.test_labels).mean()),
        float(t.cost.per_sample(trace).mean() / t.cost.full),
        float(trace.n_exit_evals.mean()),
        float(reference.per_sample(trace).mean() / reference.full),
    )


@functools.cache
def chosen(family: str, seed: int, frozen: bool = True, **settings: Any) -> Scored:
    """The family's cheapest policy that loses at most half a point on the calibration images."""
    t = table(seed, frozen)
    if family == "predictive, activation rule":
        rules = activation_rules(t.val)
        return scored(calibrate("predictive", t.val, t.val_labels, t.cost, max_loss=MAX_LOSS, rules=rules), t)
    return scored(calibrate(family, t.val, t.val_labels, t.cost, max_loss=MAX_LOSS, **settings), t)  # type: ignore[arg-type]


def mean(values: Sequence[float]) -> float:
    """Over seeds."""
    return statistics.fmean(values)


def energy(seed: int, rho: float, scored_: Scored) -> Any:
    """Simulated, with a change of clock that takes half a percent of a full run."""
    t = table(seed)
    return EnergyModel.of_network(t.cost, rho).simulate(scored_.policy.run(t.test), t.cost)


@functools.cache
def best_for_energy(seed: int, single_jump: bool) -> Scored:
    """Of the predictive policies within the allowed loss, the one with the least simulated energy in calibration."""
    t = table(seed)
    model = EnergyModel.of_network(t.cost)

    def joules(trace: Any) -> float:
        return float(model.simulate(trace, t.cost).joules)

    found = calibrate(
        "predictive", t.val, t.val_labels, t.cost, max_loss=MAX_LOSS, objective=joules, single_jump=single_jump
    )
    return scored(found, t)


def forecast_accuracy(seed: int) -> float:
    """Share of first forecasts that name the first passing exit; one of the full length counts when it is that far."""
    t, policy = table(seed), chosen("predictive", seed).policy
    assert isinstance(policy, PredictiveExitPolicy)
    trace = policy.run(t.test)
    start = policy.start - 1
    asked = trace.jumps[:, start] > 0
    rule = policy.predictor.rule
    later = first_passing(t.test[asked][:, start + 1 :], rule) + 1
    jumps = trace.jumps[asked, start]
    longest = min(policy.predictor.max_round, t.cost.exits - start)
    return float(((jumps == later) | ((jumps == longest) & (later >= longest))).mean())


def class_orders(seed: int) -> list[float]:
    """Share of the full network's multiply-accumulates under random orders of the classes, calibrated anew."""
    t = table(seed)
    found = []
    for order in range(ORDERS):
        permutation = np.random.RandomState(order).permutation(t.test.shape[-1])
        place = np.argsort(permutation)
        moved = Table(
            t.val[..., permutation], place[t.val_labels], t.test[..., permutation], place[t.test_labels], t.cost
        )
        best = calibrate("predictive", moved.val, moved.val_labels, moved.cost, max_loss=MAX_LOSS)
        found.append(scored(best, moved).macs)
    return found


def measure_tables() -> list[Claim]:
    """Everything that the tables of logits tell."""
    ours = [chosen("predictive", seed) for seed in SEEDS]
    every = [chosen("every", seed) for seed in SEEDS]
    saved = difference_over_seeds([100 * (1 - one.macs) for one in ours])
    lost = difference_over_seeds([one.loss for one in ours])
    ratio = difference_over_seeds([b.evaluations / max(a.evaluations, 1e-9) for a, b in zip(ours, every, strict=True)])
    others = {name: [chosen(name, seed) for seed in SEEDS] for name in BASELINES}
    variants: dict[str, list[Scored]] = {
        "single jump": [chosen("predictive", seed, single_jump=True) for seed in SEEDS],
        "learned kernel": [chosen("predictive", seed, kernel=fit_kernel(table(seed).val)) for seed in SEEDS],
        "isotonic regression": [chosen("isotonic", seed) for seed in SEEDS],
        "calibrated without caution": [chosen("predictive", seed, caution=0.0) for seed in SEEDS],
        "last three exits": [chosen("predictive", seed, history=3) for seed in SEEDS],
        "activation rule": [chosen("predictive, activation rule", seed) for seed in SEEDS],
        "oracle (a)": [
            scored_trace(None, OraclePolicy(one.policy.predictor.rule).run(table(seed).test), table(seed))
            for seed, one in zip(SEEDS, ours, strict=True)
        ],
        "oracle (b)": [
            scored_trace(None, OraclePolicy(one.policy.predictor.rule).run(t.test, t.test_labels), t)
            for one, t in zip(ours, map(table, SEEDS), strict=True)
        ],
    }
    if (work() / f"table and backbone/seed{SEEDS[0]}.npz").is_file():  # made by `train`; it takes as long as a seed
        variants[f"backbone trained with the exits, seed {SEEDS[0]}"] = [chosen("predictive", SEEDS[0], False)]

    def rows(arms: dict[str, list[Scored]]) -> dict[str, Any]:
        return {
            name: {
                "share of the full network's MACs": mean([one.macs for one in found]),
                "the same by the reference's accounting": mean([one.reference_macs for one in found]),
                "exit evaluations": mean([one.evaluations for one in found]),
                "points lost": mean([one.loss for one in found]),
            }
            for name, found in arms.items()
        }

    accuracy = [100 * float((t.test[:, -1].argmax(-1) == t.test_labels).mean()) for t in map(table, SEEDS)]
    common: dict[str, Any] = {}
    if any(name.startswith("backbone trained") for name in variants):
        free = table(SEEDS[0], False)
        head = 100 * float((free.test[:, -1].argmax(-1) == free.test_labels).mean())
        common[f"full network trained with its exits, seed {SEEDS[0]}, accuracy, %"] = head
    common |= {
        "full network, accuracy, %": accuracy,
        "accuracy of each exit, mean, %": np.mean(
            [100 * (t.test[:, :-1].argmax(-1) == t.test_labels[:, None]).mean(0) for t in map(table, SEEDS)], axis=0
        ).tolist(),
        "policies": [str(one.policy) for one in ours],
        "arms": rows({"predictive": ours, **others, **variants}),
    }
    spread = [class_orders(seed) for seed in SEEDS]
    energies = {rho: [energy(seed, rho, one) for seed, one in zip(SEEDS, ours, strict=True)] for rho in RHOS}
    tuned = {single: [best_for_energy(seed, single) for seed in SEEDS] for single in (False, True)}
    tuned_energy = {
        single: [energy(seed, 0.05, one) for seed, one in zip(SEEDS, found, strict=True)]
        for single, found in tuned.items()
    }
    saving = difference_over_seeds([100 * (1 - e.joules / e.full_clock_joules) for e in energies[0.05]])
    versus_every = difference_over_seeds([100 * (b.macs - a.macs) for a, b in zip(ours, every, strict=True)])
    details_energy = {
        **{
            f"saving over full clock at ρ = {rho:g}, %": mean(
                [100 * (1 - e.joules / e.full_clock_joules) for e in found]
            )
            for rho, found in energies.items()
        },
        "late samples, %": mean([100 * e.late for e in energies[0.05]]),
        "joules over the full network's": mean([e.joules / e.network_joules for e in energies[0.05]]),
    }
    for single, name in ((False, "chosen by energy"), (True, "chosen by energy, single jump")):
        details_energy[name] = {
            "saving over full clock, %": mean(
                [100 * (1 - e.joules / e.full_clock_joules) for e in tuned_energy[single]]
            ),
            "joules over the full network's": mean([e.joules / e.network_joules for e in tuned_energy[single]]),
            "late samples, %": mean([100 * e.late for e in tuned_energy[single]]),
            "points lost": mean([one.loss for one in tuned[single]]),
            "starts": [one.policy.start for one in tuned[single]],
        }
    return [
        Claim(
            id="macs",
            statement="at most half a point lost, Predictive Exit needs at least 30 % fewer multiply-accumulates",
            source=ISSUE,
            figure=saved.value,
            unit="% of the full network's multiply-accumulates, exits and forecasts counted",
            comparison=">=",
            threshold=30.0,
            interval95=saved.interval,
            seeds=SEEDS,
            baselines=[
                {"name": f"share of MACs, {n}, %", "figure": 100 * mean([o.macs for o in f])} for n, f in others.items()
            ],
            also=[("points of test accuracy lost", lost.value, "<=", 0.5)],
            details={**common, "points lost": [one.loss for one in ours]},
        ),
        Claim(
            id="exit_evals",
            statement="at equal accuracy it evaluates fewer exits than asking at every one",
            source=ISSUE,
            figure=ratio.value,
            unit="× fewer exit evaluations than at every exit",
            comparison=">=",
            threshold=1.5,
            interval95=ratio.interval,
            seeds=SEEDS,
            baselines=[
                {"name": "exit evaluations, predictive", "figure": mean([one.evaluations for one in ours])},
                {"name": "exit evaluations, every", "figure": mean([one.evaluations for one in every])},
            ],
            details={
                "points lost, predictive": mean([one.loss for one in ours]),
                "points lost, every": mean([one.loss for one in every]),
                "first forecasts that are right, %": mean([100 * forecast_accuracy(seed) for seed in SEEDS]),
            },
        ),
        Claim(
            id="macs_over_every",
            statement="it needs no more multiply-accumulates in all than asking at every exit",
            source=SHEET,
            figure=versus_every.value,
            unit="points of the full network's multiply-accumulates below every-exit",
            comparison=">=",
            threshold=0.0,
            gate=False,
            interval95=versus_every.interval,
            seeds=SEEDS,
            details={
                "by the reference's accounting": mean(
                    [100 * (b.reference_macs - a.reference_macs) for a, b in zip(ours, every, strict=True)]
                )
            },
        ),
        Claim(
            id="class_order",
            statement="the order of the classes decides little: the forecast's kernel runs over their numbers",
            source=SHEET,
            figure=max(100 * (max(s) - min(s)) for s in spread),
            unit="points of the full network's multiply-accumulates between the best and the worst of 10 orders",
            comparison="<=",
            threshold=2.0,
            gate=False,
            seeds=SEEDS,
            details={"share of MACs by order, %": [[100 * x for x in s] for s in spread]},
        ),
        Claim(
            id="energy_est",
            statement="the simulated governor saves energy over the same exits at full clock",
            source=ISSUE,
            figure=saving.value,
            unit="% of the energy at full clock, simulated (Jetson TX2 levels, ρ = 0.05)",
            comparison=">=",
            threshold=10.0,
            interval95=saving.interval,
            seeds=SEEDS,
            details=details_energy,
        ),
    ]


# ------------------------------------------------------------------------------------------------------------ wall time


def in_turn(one: Callable[[Any], Any], other: Callable[[Any], Any], images: Sequence[Any], stretch: int) -> Any:
    """Milliseconds of an image, medians over stretches: both answer ``stretch`` images, then the next ones."""
    taken: list[list[float]] = []
    for start in range(0, len(images), stretch):
        row = []
        for arm in (one, other):
            begin = time.perf_counter()
            for image in images[start : start + stretch]:
                arm(image)
            row.append(1e3 * (time.perf_counter() - begin) / stretch)
        taken.append(row)
    return np.median(taken, axis=0).tolist()


def measure_speed() -> list[Claim]:
    """One image at a time, test images in turn, one thread of ONNX Runtime."""
    ratios, details = [], []
    for seed in SEEDS:
        model, data, t = with_exits(seed), task().splits(None), table(seed)
        whole = EarlyExitPredictor(*staged(model, task()), FullNetworkPolicy(), t.cost, task(), threads=1)
        seconds = timed(whole, task().example_input(1))
        limits: dict[str, Any] = {"max_loss": MAX_LOSS}
        kept = worthwhile_exits("predictive", t.val, t.val_labels, t.cost, objective=seconds.objective, **limits)

        def quickest(exits: tuple[int, ...], t: Table = t, seconds: CostModel = seconds) -> tuple[Table, Any]:
            """The network with these exits alone, and its policy with the least latency in calibration."""
            heads = [*exits, t.cost.exits]
            few = Table(t.val[:, heads], t.val_labels, t.test[:, heads], t.test_labels, t.cost.of_exits(exits))
            by_time = seconds.objective(exits)
            found = calibrate("predictive", few.val, few.val_labels, few.cost, max_loss=MAX_LOSS, objective=by_time)
            return few, found.policy

        def built(exits: tuple[int, ...], policy: Any, model: Any = model, t: Table = t) -> EarlyExitPredictor:
            cost = t.cost.of_exits(exits)
            places = sorted(needed_exits(policy, cost.exits))
            parts = staged(model, task(), [exits[place] for place in places])
            return EarlyExitPredictor(*parts, policy, cost, task(), places=places, threads=1)

        every = tuple(range(t.cost.exits))
        few, policy = quickest(kept)
        ours = scored_trace(policy, policy.run(few.test), few)
        placed = calibrate("placed", t.val, t.val_labels, t.cost, max_loss=MAX_LOSS)
        full = to_onnx(backbone(seed), None, task(), threads=1)
        arms: dict[str, Callable[[Any], Any]] = {
            "calibrated for latency, exits that pay": built(kept, policy),
            "calibrated for latency, all exits": built(every, quickest(every)[1]),
            "calibrated for macs, all exits": built(every, chosen("predictive", seed).policy),
            "exits placed, each asked": built(every, placed.policy),
        }
        images = [data.test[i][0][None].numpy() for i in range(2000)]
        times = {}
        for name, arm in arms.items():
            in_turn(full, arm, images[:200], 50)  # warm up
            times[name] = in_turn(full, arm, images, 50)
        whole_ms, ours_ms = times["calibrated for latency, exits that pay"]
        ratios.append(whole_ms / ours_ms)
        details.append(
            {
                "ms of the full network and of the other, 50 images each in turn": times,
                "exits": list(kept),
                "points lost": ours.loss,
                "share of the full network's MACs": ours.macs,
                "exit evaluations": ours.evaluations,
                "policy": str(policy),
            }
        )
    found = difference_over_seeds(ratios)
    return [
        Claim(
            id="wall",
            statement="one image at a time, the saved predictor is faster than the full network in the same runtime",
            source=ISSUE,
            figure=found.value,
            unit="× the full network's images a second",
            comparison=">",
            threshold=1.0,
            interval95=found.interval,
            seeds=SEEDS,
            details={"by seed": details, "revision of the trainings": revision()},
        )
    ]


def train_all() -> list[Claim]:
    """Only the trainings."""
    for seed in SEEDS:
        table(seed)
    table(SEEDS[0], False)
    return []


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {"tables": measure_tables, "speed": measure_speed}

if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train_all()
    else:
        sys.exit(main("predictive_exit", BENCHMARKS))
