"""LegoDNN on Fashion-MNIST: accuracy at every size and deadline against other ways to several sizes, and speed.

python benchmarks/legodnn.py train                    # only the trainings
python benchmarks/legodnn.py [tables] [speed]
SEEDS=0,1 python benchmarks/legodnn.py …              # fewer seeds; the results say which

A small ResNet of 8 blocks and a VGG-like network of 3. Trainings and accuracies of composed networks are kept in the
system's folder for temporary files, and made anew when the code they depend on changes.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from _claims import Claim, main
from sparing.adaptive import block_distillation, blocks, descendants
from sparing.adaptive.block_distillation import distill_blocks
from sparing.adaptive.block_profile import profile_accuracy
from sparing.adaptive.blocks import extract_blocks
from sparing.adaptive.descendants import SPARSITIES, BlockZoo
from sparing.adaptive.lego import LegoModel
from sparing.adaptive.lego_predictor import LegoPredictor
from sparing.adaptive.lego_runtime import Budget, LegoRuntime, Options, ScaledNetwork
from sparing.adaptive.load import poisson_load, serve
from sparing.adaptive.scaling import (
    InfeasibleError,
    Profile,
    ScalingOptimizer,
    Selection,
    bytes_moved,
    bytes_moved_whole,
)
from sparing.core import files
from sparing.core.fingerprint import fingerprint
from sparing.core.predictor import build_model
from sparing.core.randomness import isolated_rng
from sparing.core.statistics import difference_over_seeds
from sparing.core.store import Progress
from sparing.core.training import Batches, Train, fit
from sparing.models import convnet, resnet
from sparing.tasks.custom import CustomTask
from sparing.tasks.images.published import FashionMNIST

ISSUE = "issue Cheaper inference II, gates"
SHEET = "sheet legodnn, demonstration"
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2").split(",")]
TRAIN, VAL, TEST = 20_000, 2_000, 5_000
BATCH, BLOCK_EPOCHS, TUNING_EPOCHS = 128, 3, 3
NETS: dict[str, dict[str, Any]] = {
    "resnet": {"kind": "resnet", "max_ratio": 0.125, "widths": [16, 32, 64, 128]},
    "vgg": {"kind": "convnet", "max_ratio": 0.25, "widths": [16, 32, 64, 128], "depths": [2, 2, 2, 1]},
}


def original_settings() -> Train:
    """The network: SGD 0.1, momentum 0.9, weight decay 5e-4, a tenth of the rate at half and at three quarters."""
    steps = 8 * -(-TRAIN // BATCH)
    return Train(
        epochs=8,
        batch_size=BATCH,
        optimizer="SGD",
        lr=0.1,
        weight_decay=5e-4,
        optimizer_args={"momentum": 0.9},
        scheduler="MultiStepLR",
        scheduler_args={"milestones": [steps // 2, 3 * steps // 4], "gamma": 0.1},
        accelerator="cpu",
    )


def tuning_settings() -> Train:
    """Fine-tuning of a pruned network with labels: SGD 0.01, momentum 0.9."""
    return Train(
        epochs=TUNING_EPOCHS,
        batch_size=BATCH,
        optimizer="SGD",
        lr=0.01,
        optimizer_args={"momentum": 0.9},
        accelerator="cpu",
    )


# ------------------------------------------------------------------------------------------------------------ trainings


@functools.cache
def work() -> Path:
    """Where trainings and tables are kept; another folder when what decides them has changed."""
    sources = [inspect.getsource(module) for module in (blocks, descendants, block_distillation, convnet, resnet)]
    settings = [inspect.getsource(original_settings), inspect.getsource(tuning_settings)]
    about = repr((NETS, TRAIN, VAL, TEST, BATCH, BLOCK_EPOCHS, TUNING_EPOCHS, SPARSITIES))
    key = fingerprint([*sources, *settings, about, torch.__version__])[:16]
    return Path(tempfile.gettempdir()) / "sparing-benchmarks" / f"legodnn-{key}"


@functools.cache
def task(net: str) -> CustomTask:
    """Fashion-MNIST: 20,000 images to train on, 2,000 to profile on, 5,000 to test on."""
    root = os.environ.get("SPARING_DATA")
    splits = FashionMNIST().splits(Path(root) if root else None)

    def tensors(split: Any, start: int, count: int) -> TensorDataset:
        pairs = [split[i] for i in range(start, start + count)]
        images = torch.stack([torch.as_tensor(x) for x, _ in pairs])
        return TensorDataset(images, torch.tensor([int(y) for _, y in pairs]))

    about = {name: value for name, value in NETS[net].items() if name not in ("kind", "max_ratio")}
    return CustomTask(
        "fashion_mnist_28",
        tensors(splits.train, 0, TRAIN),
        tensors(splits.test, 0, TEST),
        val=tensors(splits.train, TRAIN, VAL),
        calibration=tensors(splits.train, TRAIN + VAL, 512),
        model=lambda: build_model(NETS[net]["kind"], in_channels=1, num_classes=10, **about),
        loss=torch.nn.functional.cross_entropy,
        labels=FashionMNIST.labels,
    )


def kept(net: str, name: str, seed: int, module: nn.Module, train: Callable[[Progress], Any]) -> None:
    """Put a training's weights into a module: those of before, or new ones, whose training can be killed."""
    target = work() / net / f"seed{seed}" / f"{name}.npz"
    if not target.is_file():
        progress = Progress(work() / "progress" / net / str(seed) / name)
        train(progress)
        files.write_arrays(target, {key: value.numpy() for key, value in state(module).items()})
        wall, cpu = progress.spent
        print(f"{net}, seed {seed}, {name}: {wall:.0f} s, {cpu:.0f} s of CPU", flush=True)
        progress.clear()
    values = {key: torch.from_numpy(value.copy()) for key, value in files.read_arrays(target).items()}
    module.load_state_dict(values)
    module.eval()


def state(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights, apart from it."""
    return {key: value.detach().clone().contiguous() for key, value in module.state_dict().items()}


@functools.cache
def original(net: str, seed: int) -> nn.Module:
    """The network, trained by itself."""
    with isolated_rng("legodnn", net, seed):
        model = task(net).default_model().to(memory_format=torch.channels_last)
    data = task(net).splits(None)

    def train(progress: Progress) -> None:
        fit(model, task(net), data.train, None, original_settings(), None, seed, progress)

    kept(net, "original", seed, model, train)
    return model


def pruned(net: str, seed: int) -> BlockZoo:
    """Blocks and descendants that have not been trained."""
    graph = extract_blocks(original(net, seed), task(net).example_input(2)[0], NETS[net]["max_ratio"])
    return BlockZoo.build(graph)


@functools.cache
def zoo(net: str, seed: int) -> BlockZoo:
    """Blocks and their trained descendants."""
    made = pruned(net, seed)
    module = nn.ModuleDict({name.replace(".", "_"): one for name, one in made.named_descendants()})
    data = task(net).splits(None)
    images = data.train.tensors[0]

    def loader(epoch: int) -> Iterator[Tensor]:
        order = Batches(data.train, BATCH, seed)
        order.set_epoch(epoch)
        for batch in order:
            yield images[torch.tensor(batch)]

    def train(progress: Progress) -> None:
        distill_blocks(made, loader, BLOCK_EPOCHS, seed=seed, progress=progress)

    kept(net, "blocks", seed, module, train)
    return made


def tuned(net: str, seed: int, option: int) -> LegoModel:
    """The whole network at one sparsity, fine-tuned with labels for as many samples as its blocks together learn."""
    model = LegoModel(pruned(net, seed)).to(memory_format=torch.channels_last)
    model.apply((option,) * len(model.sizes))
    data = task(net).splits(None)

    def train(progress: Progress) -> None:
        fit(model, task(net), data.train, None, tuning_settings(), None, seed, progress)

    kept(net, f"tuned{option}", seed, model, train)
    return model


def train_all() -> None:
    """All trainings, seed by seed."""
    print(work(), flush=True)
    for net in NETS:
        for seed in SEEDS:
            zoo(net, seed)
            for option in range(1, len(SPARSITIES)):
                tuned(net, seed, option)


# ----------------------------------------------------------------------------------------------------------- accuracies


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers."""
    images, labels = data.tensors
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return right / len(labels)


class Composed:
    """Accuracies of composed networks; what one has in common with the one before it is not computed again."""

    def __init__(self, made: BlockZoo, data: TensorDataset) -> None:
        self.blocks, model = made.blocks, LegoModel(made)
        self.layout, self.frame, self.labels = model.layout, model.frame, data.tensors[1]
        (name,) = self.layout.inputs
        self.reached: list[list[dict[str, Tensor]]] = [[{name: x} for x in data.tensors[0].split(500)]]
        """[pieces that have run][batch]: the tensors that later ones read."""
        self.options: tuple[int, ...] = ()

    @torch.no_grad()
    def accuracy(self, options: Sequence[int]) -> float:
        """Share of right answers."""
        wanted = tuple(options)
        pieces = list(enumerate(self.layout.pieces))
        changed = len(pieces) if self.options else 0
        if self.options != wanted and self.options:
            same = [one == other for one, other in zip(self.options, wanted, strict=True)]
            changed = next(n for n, piece in pieces if piece.block is not None and not same[piece.block])
        del self.reached[changed + 1 :]
        self.options = wanted
        for number, piece in pieces[len(self.reached) - 1 :]:
            module = self.frame[number] if piece.block is None else self.blocks[piece.block][wanted[piece.block]]
            later = {name for _, other in pieces[number + 1 :] for name in other.inputs} | {self.layout.output}
            rows = []
            for values in self.reached[-1]:
                made = module(*(values[name] for name in piece.inputs))
                given = dict(zip(piece.outputs, (made,) if len(piece.outputs) == 1 else made, strict=True))
                rows.append({name: value for name, value in {**values, **given}.items() if name in later})
            self.reached.append(rows)
        logits = torch.cat([values[self.layout.output] for values in self.reached[-1]])
        return int((logits.argmax(1) == self.labels).sum()) / len(self.labels)


class Known:
    """Figures that are kept in a file, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, float] = files.read_json(path) if path.is_file() else {}

    def all(self, names: Sequence[str], compute: Callable[[str], float]) -> list[float]:
        """Those of some names; the missing ones are computed, in alphabetical order."""
        for number, name in enumerate(missing := sorted(set(names) - self.values.keys()), 1):
            self.values[name] = compute(name)
            if number % 10 == 0 or number == len(missing):
                files.write_json(self.path, self.values)
        return [self.values[name] for name in names]


def on_test(net: str, seed: int, selections: Sequence[Options]) -> list[float]:
    """Test accuracy of networks composed of trained descendants, in percent."""
    known = Known(work() / net / f"seed{seed}" / "test.json")
    composed = functools.cache(lambda: Composed(zoo(net, seed), task(net).splits(None).test))
    names = ["".join(map(str, options)) for options in selections]
    return [100 * value for value in known.all(names, lambda name: composed().accuracy([int(s) for s in name]))]


def at_one_sparsity(net: str, seed: int, arm: str, split: str) -> list[float]:
    """Accuracy in percent of the whole network at each sparsity: "blocks", "untrained" or "tuned"."""
    known = Known(work() / net / f"seed{seed}" / "uniform.json")
    data = getattr(task(net).splits(None), split)

    def compute(name: str) -> float:
        option = int(name[-1])
        if arm == "tuned" and option:
            return accuracy(tuned(net, seed, option), data)
        model = LegoModel(zoo(net, seed) if arm == "blocks" else pruned(net, seed))
        model.apply((option,) * len(model.sizes))
        return accuracy(model, data)

    return [100 * v for v in known.all([f"{arm}, {split}, {s}" for s in range(len(SPARSITIES))], compute)]


@functools.cache
def profile(net: str, seed: int) -> Profile:
    """As it was measured first: accuracies on the 2,000 images for that, latencies with one thread of ONNX Runtime."""
    target = work() / net / f"seed{seed}" / "profile.json"
    if not target.is_file():
        made = zoo(net, seed)
        composed = Composed(made, task(net).splits(None).val)
        whole, drops = profile_accuracy(made, lambda model: composed.accuracy(model.current))
        blocks = len(drops)
        empty = Profile(
            np.array(made.sparsities), drops, made.bytes, np.ones(blocks), 0 * drops, 1.0, made.frame_bytes, whole
        )
        served = LegoPredictor.from_zoo(made, empty, task(net).example_input(1), task(net), threads=1)
        files.write_json(target, served.profile_latency(image(net)).to_config())
    return Profile.from_config(files.read_json(target))


def image(net: str, number: int = 0) -> np.ndarray:
    """A test image, (1, 1, 28, 28)."""
    return task(net).splits(None).test.tensors[0][number : number + 1].numpy()


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Grid:
    """Test accuracies in percent at several budgets of bytes or seconds."""

    budgets: list[float]
    lego: list[float]
    uniform: list[float]
    untrained: list[float]
    tuned: list[float]
    random: list[float]

    def gain(self, arm: str) -> float:
        """Mean over the budgets of LegoDNN above another arm, in points."""
        return float(np.mean(np.subtract(self.lego, getattr(self, arm))))


@functools.cache
def grid(net: str, seed: int, by: str, steps: int) -> Grid:
    """Budgets from that of the smallest network of one sparsity, in ``steps`` steps, up to one below the original's.

    An arm of few sizes answers with the one of those within the budget that is most accurate on the profiling images.
    """
    known = profile(net, seed)
    optimizer = ScalingOptimizer(known)
    uniform = [optimizer.selection((s,) * len(known.drops)) for s in range(len(SPARSITIES))]
    sizes = [one.est_bytes if by == "bytes" else one.est_latency for one in uniform]
    budgets = [sizes[-1] + i / steps * (sizes[0] - sizes[-1]) for i in range(steps)]
    found = [optimizer.solve(**{"max_bytes" if by == "bytes" else "max_latency": budget}) for budget in budgets]
    every = np.indices((len(SPARSITIES),) * len(known.drops)).reshape(len(known.drops), -1)
    places = np.arange(len(known.drops))[:, None]
    costs = known.frame_bytes + known.bytes[places, every].sum(0)
    if by == "seconds":
        costs = known.model_latency - (known.latency[:, None] * known.rel)[places, every].sum(0)
    draw = np.random.default_rng([seed, steps])
    random = [draw.choice(np.flatnonzero(costs <= budget * (1 + 1e-9))) for budget in budgets]
    chosen = [one.options for one in found] + [tuple(map(int, every[:, place])) for place in random]
    measured = on_test(net, seed, chosen) if steps == 6 else on_test(net, seed, chosen[:steps]) + [np.nan] * steps

    def best(arm: str) -> list[float]:
        val, test = (at_one_sparsity(net, seed, arm, split) for split in ("val", "test"))
        fitting = [[s for s, size in enumerate(sizes) if size <= budget * (1 + 1e-9)] for budget in budgets]
        return [test[max(fits, key=val.__getitem__)] for fits in fitting]

    tuned_arm = best("tuned") if seed in done(net, "tuned") else []
    return Grid(budgets, measured[:steps], best("blocks"), best("untrained"), tuned_arm, measured[steps:])


def drawn(net: str, seed: int, count: int = 30) -> list[Options]:
    """Random selections."""
    blocks, sizes = profile(net, seed).drops.shape
    return [tuple(row) for row in np.random.default_rng([seed, 5]).integers(0, sizes, (count, blocks)).tolist()]


def predicted_accuracy(net: str, seed: int) -> tuple[float, float]:
    """(rank correlation of predicted and measured accuracy of random selections, mean error in points)."""
    selections = drawn(net, seed)
    optimizer = ScalingOptimizer(profile(net, seed))
    estimates = [100 * optimizer.selection(options).est_accuracy for options in selections]
    measured = on_test(net, seed, selections)
    return rank_correlation(estimates, measured), float(np.mean(np.subtract(estimates, measured)))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's."""
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def walk(known: Profile, seed: int, count: int = 50) -> list[Selection]:
    """Selections at byte budgets drawn between the smallest and the original network."""
    optimizer = ScalingOptimizer(known)
    draw = np.random.default_rng([seed, 50])
    budgets = draw.uniform(optimizer.smallest_bytes, optimizer.original_bytes, count)
    return [optimizer.solve(max_bytes=float(budget)) for budget in budgets]


def bytes_saved(net: str, seed: int) -> tuple[float, float]:
    """(% fewer bytes paged than by swapping whole models for the same selections, than by the five uniform models)."""
    known = profile(net, seed)
    path = walk(known, seed)
    pairs = list(pairwise(one.options for one in path))
    moved = sum(bytes_moved(known.bytes, *pair) for pair in pairs)
    whole = sum(bytes_moved_whole(known.bytes, *pair) for pair in pairs if pair[0] != pair[1])
    totals = known.frame_bytes + known.bytes.sum(0)
    fits = [int(np.flatnonzero(totals <= max(one.max_bytes, totals.min()))[0]) for one in path]
    blocks = len(known.bytes)
    uniform = sum(bytes_moved_whole(known.bytes, (a,) * blocks, (b,) * blocks) for a, b in pairwise(fits) if a != b)
    return 100 * (1 - moved / whole), 100 * (1 - moved / uniform)


def done(net: str, arm: str = "blocks") -> list[int]:
    """The seeds for which an arm of a network has been trained."""
    last = f"tuned{len(SPARSITIES) - 1}" if arm == "tuned" else "blocks"
    return [seed for seed in SEEDS if (work() / net / f"seed{seed}" / f"{last}.npz").is_file()]


def compared(arm: str) -> dict[str, Any]:
    """What a comparison shows, network by network and budget by budget."""
    about: dict[str, Any] = {}
    for net in NETS:
        for by in ("bytes", "seconds"):
            grids = [grid(net, seed, by, 6) for seed in done(net, arm)]
            if grids:
                about[f"{net}, budgets, {by}"] = np.mean([g.budgets for g in grids], 0).tolist()
                for name, one in {"LegoDNN": "lego", arm: arm}.items():
                    about[f"{net}, budgets of {by}, {name}, %"] = np.mean([getattr(g, one) for g in grids], 0).tolist()
        about[f"{net}, seeds"] = done(net, arm)
    return about


def versus(arm: str, net: str = "resnet") -> list[float]:
    """Points of accuracy above another arm for each seed, mean over the 6 budgets of bytes and the 6 of latency."""
    return [
        np.mean([grid(net, seed, by, 6).gain(arm) for by in ("bytes", "seconds")]).item() for seed in done(net, arm)
    ]


def measure_tables() -> list[Claim]:
    """Everything that the accuracies of composed networks tell."""
    if not done("resnet", "tuned"):
        raise SystemExit("no training is complete: python benchmarks/legodnn.py train")
    seeds = done("resnet")
    uniform, untrained, random = (difference_over_seeds(versus(arm)) for arm in ("uniform", "untrained", "random"))
    tuned_seeds = done("resnet", "tuned")
    fine = [grid("resnet", seed, "bytes", 25) for seed in tuned_seeds]
    tuning = difference_over_seeds([one.gain("tuned") for one in fine])
    additive = [predicted_accuracy("resnet", seed) for seed in seeds]
    walks = [bytes_saved("resnet", seed) for seed in seeds]
    first = profile("resnet", seeds[0])
    sizes = {
        "originals' accuracy, %": [at_one_sparsity("resnet", seed, "blocks", "test")[0] for seed in seeds],
        "sparsities": list(SPARSITIES),
        **{
            f"the whole network at each sparsity, {name}, %": np.mean(
                [at_one_sparsity("resnet", seed, arm, "test") for seed in done("resnet", arm)], 0
            ).tolist()
            for arm, name in (("blocks", "trained blocks"), ("untrained", "untrained"), ("tuned", "fine-tuned"))
        },
        "bytes at each sparsity": (first.frame_bytes + first.bytes.sum(0)).tolist(),
        "networks that can be composed": first.drops.shape[1] ** first.drops.shape[0],
    }
    for net in NETS:
        if net != "resnet" and done(net):
            sizes[f"{net}: points above"] = {arm: versus(arm, net) for arm in ("uniform", "untrained", "tuned")}
    losses = np.array([np.subtract(one.lego, one.tuned) for one in fine])

    def gain(name: str, statement: str, source: str, found: Any, gate: bool, details: dict[str, Any]) -> Claim:
        return Claim(
            id=name,
            statement=statement,
            source=source,
            figure=found.value,
            unit="points of test accuracy, mean over 6 budgets of bytes and 6 of latency",
            comparison=">",
            threshold=0.0,
            gate=gate,
            interval95=found.interval,
            seeds=seeds,
            also=[("seeds where it is behind", sum(value < 0 for value in details["by seed"]), "==", 0)],
            details=details,
        )

    return [
        gain(
            "beats_uniform",
            "choosing block by block is more accurate than the same sparsity everywhere, with the same blocks",
            ISSUE,
            uniform,
            True,
            compared("uniform") | sizes | {"by seed": versus("uniform")},
        ),
        gain(
            "beats_untrained_pruning",
            "it is more accurate than pruning the whole network without training it",
            ISSUE,
            untrained,
            True,
            compared("untrained") | {"by seed": versus("untrained")},
        ),
        Claim(
            id="versus_pruned_and_fine_tuned",
            statement="it is more accurate than five pruned sizes of the network, fine-tuned with labels at equal cost",
            source=SHEET,
            figure=tuning.value,
            unit="points of test accuracy, mean over 25 budgets of bytes",
            comparison=">=",
            threshold=1.0,
            gate=False,
            interval95=tuning.interval,
            seeds=tuned_seeds,
            details=compared("tuned")
            | {
                "points above, 6 budgets of bytes": np.mean(
                    [grid("resnet", s, "bytes", 6).gain("tuned") for s in tuned_seeds]
                ),
                "points above, 6 budgets of latency": np.mean(
                    [grid("resnet", s, "seconds", 6).gain("tuned") for s in tuned_seeds]
                ),
                "points above at each of the 25 budgets": losses.mean(0).tolist(),
                "share of the 25 budgets where it is behind, %": 100 * float((losses.mean(0) < 0).mean()),
            },
        ),
        gain(
            "versus_random",
            "it is more accurate than a random selection within the same budget",
            SHEET,
            random,
            False,
            compared("random") | {"by seed": versus("random")},
        ),
        Claim(
            id="additivity_accuracy",
            statement="the drops of single blocks add up: predicted and measured accuracy of 30 random selections",
            source=SHEET,
            figure=float(np.mean([one for one, _ in additive])),
            unit="rank correlation",
            comparison=">=",
            threshold=0.8,
            gate=False,
            seeds=seeds,
            details={
                "by seed": [one for one, _ in additive],
                "predicted above measured, points": [error for _, error in additive],
            },
        ),
        Claim(
            id="walk_bytes",
            statement="exchanging blocks pages fewer bytes than exchanging whole models, on 50 random budgets",
            source=SHEET,
            figure=float(np.mean([one for one, _ in walks])),
            unit="% fewer bytes than whole models for the same selections",
            comparison=">=",
            threshold=40.0,
            gate=False,
            seeds=seeds,
            details={
                "by seed": [one for one, _ in walks],
                "fewer than by exchanging five models of one sparsity each, %": [other for _, other in walks],
            },
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------- speed


def invented(draw: np.random.Generator, blocks: int = 8, sizes: int = 6) -> Profile:
    """A profile of a network whose drops and savings grow with sparsity, unevenly."""
    sparsities = np.arange(sizes) / sizes
    original = draw.uniform(2e4, 1.2e6, blocks)
    seconds = draw.uniform(5e-5, 2e-4, blocks)
    drops = draw.uniform(0.008, 0.12, (blocks, 1)) * sparsities**2 + draw.normal(0, 0.002, (blocks, sizes))
    rel = draw.uniform(0.6, 0.95, (blocks, 1)) * sparsities + draw.normal(0, 0.02, (blocks, sizes))
    drops[:, 0] = rel[:, 0] = 0
    size = original[:, None] * (1 - sparsities * draw.uniform(0.9, 1.05, (blocks, 1)))
    return Profile(sparsities, drops, size, seconds, rel, 1.1 * float(seconds.sum()), 5e4, 0.9)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(milliseconds, what was returned)."""
    start = time.perf_counter()
    made = call()
    return 1e3 * (time.perf_counter() - start), made


def measure_choose() -> Claim:
    """Random limits of three networks, each solved five times; HiGHS on every tenth instance."""
    draw = np.random.default_rng(0)
    best, single, highs, apart = [], [], [], 0.0
    for number in range(400):
        if number % 20 == 0:
            profiles = [invented(draw) for _ in range(3)]
            optimizer = ScalingOptimizer(profiles)
        deadlines = [
            one.model_latency - draw.uniform() * float((one.latency[:, None] * one.rel).max(1).sum())
            for one in profiles
        ]
        memory = draw.uniform(optimizer.smallest_bytes, optimizer.original_bytes)
        solve = functools.partial(optimizer.solve, deadlines, memory)
        try:
            runs = [timed(solve) for _ in range(5)]
        except InfeasibleError:
            continue
        single.append(runs[0][0])
        best.append(min(milliseconds for milliseconds, _ in runs))
        if number % 10 == 0:
            milliseconds, other = timed(functools.partial(solve, method="milp"))
            highs.append(milliseconds)
            sums = [sum(one.est_accuracy for one in found) for found in (runs[0][1], other)]
            apart = max(apart, abs(sums[0] - sums[1]))
    return Claim(
        id="choose",
        statement="choosing for 3 networks of 8 blocks and 6 options each takes milliseconds",
        source=ISSUE,
        figure=max(best),
        unit="ms, the slowest of the instances, each the fastest of 5 calls",
        comparison="<",
        threshold=5.0,
        baselines=[
            {"name": "HiGHS, median ms", "figure": float(np.median(highs))},
            {"name": "HiGHS, slowest, ms", "figure": max(highs)},
        ],
        also=[
            ("median ms", float(np.median(best)), "<", 5.0),
            ("largest difference of the objective from HiGHS's", apart, "<=", 1e-9),
        ],
        details={
            "instances": len(best),
            "single calls, 99th percentile ms": float(np.quantile(single, 0.99)),
            "instances solved by HiGHS": len(highs),
        },
    )


def served(net: str, seed: int, **options: Any) -> LegoPredictor:
    """The network as it serves, with one thread."""
    example = task(net).example_input(1)
    return LegoPredictor.from_zoo(zoo(net, seed), profile(net, seed), example, task(net), threads=1, **options)


def switches(network: ScaledNetwork, path: Sequence[Selection]) -> tuple[list[float], int, int]:
    """(milliseconds of each switch that changes something, blocks that changed, blocks moved without need)."""
    times, changed, needless = [], 0, 0
    for selection in path:
        before, held = network.current, network._loaded.blocks
        milliseconds, _ = timed(functools.partial(network.apply, selection))
        differs = [one != other for one, other in zip(before, selection.options, strict=True)]
        moved = [one is not other for one, other in zip(held, network._loaded.blocks, strict=True)]
        assert network.current == selection.options
        assert all(m for m, d in zip(moved, differs, strict=True) if d)
        changed += sum(differs)
        needless += sum(m and not d for m, d in zip(moved, differs, strict=True))
        if any(differs):
            times.append(milliseconds)
    return times, changed, needless


def measure_switch() -> Claim:
    """50 random budgets of bytes on the demonstration networks, three walks over the same; the fastest counts."""
    figures: dict[str, dict[str, float]] = {}
    total = 0
    for net in (net for net in NETS if done(net)):
        path = walk(profile(net, SEEDS[0]), SEEDS[0])
        networks: dict[str, ScaledNetwork] = {
            "memory": (onnx := served(net, SEEDS[0], residency="memory")),
            "disk": served(net, SEEDS[0], residency="disk"),
            "torch, memory": LegoModel(zoo(net, SEEDS[0])),
            "torch, disk": LegoModel(zoo(net, SEEDS[0]), residency="disk"),
        }
        for name, network in networks.items():
            rounds = []
            for _ in range(3):
                network.apply((0,) * len(onnx.sizes))
                times, changed, needless = switches(network, path)
                rounds.append(times)
                total += needless
            best = np.min(rounds, axis=0)
            figures[f"{net}, {name}"] = {
                "median ms": float(np.median(best)),
                "slowest ms": float(best.max()),
                "switches": len(best),
                "blocks changed": changed,
            }
    return Claim(
        id="switch",
        statement="a switch moves the blocks that change and no others, and takes milliseconds",
        source=ISSUE,
        figure=max(one["slowest ms"] for one in figures.values()),
        unit="ms, the slowest of 50 switches on random budgets, from memory and from disk, each the fastest of 3 walks",
        comparison="<",
        threshold=10.0,
        also=[("blocks moved that did not change", total, "==", 0)],
        details=figures,
    )


def measure_latencies() -> Claim:
    """Latency of 30 random selections, one image, as predicted from blocks and as measured in turn."""
    found = []
    for seed in done("resnet"):
        network = served("resnet", seed, residency="memory")
        x = image("resnet")
        known = network.profile_latency(x)
        optimizer = ScalingOptimizer(known)
        selections = drawn("resnet", seed)
        seconds = np.zeros((12, len(selections)))
        for row in seconds:
            for i, options in enumerate(selections):
                network.apply(options)
                network(x)
                row[i] = min(timed(functools.partial(network, x))[0] for _ in range(3))
        measured = np.median(seconds, axis=0)
        estimates = [1e3 * optimizer.selection(options).est_latency for options in selections]
        found.append(
            {
                "rank correlation": rank_correlation(estimates, measured.tolist()),
                "predicted over measured": float(np.mean(estimates / measured)),
                "original, ms": 1e3 * known.model_latency,
                "smallest, predicted ms": 1e3 * optimizer.selection((len(SPARSITIES) - 1,) * 8).est_latency,
            }
        )
    return Claim(
        id="additivity_latency",
        statement="latencies of blocks add up: predicted and measured latency of 30 random selections",
        source=SHEET,
        figure=float(np.mean([one["rank correlation"] for one in found])),
        unit="rank correlation, one image at a time, one thread of ONNX Runtime",
        comparison=">=",
        threshold=0.8,
        gate=False,
        seeds=done("resnet"),
        details={"by seed": found},
    )


def measure_several() -> Claim:
    """Three networks under one memory limit and a deadline each, while budgets change every quarter of a second."""
    available = [(net, seed) for seed in SEEDS for net in NETS if seed in done(net)]
    which = [available[i % len(available)] for i in range(3)]
    names = [f"{net} {seed}, {i}" for i, (net, seed) in enumerate(which)]
    networks = {name: served(*one, residency="disk") for name, one in zip(names, which, strict=True)}
    samples = {name: [(image(net, i),) for i in range(100)] for name, (net, _) in zip(names, which, strict=True)}
    runtime = LegoRuntime(networks)
    optimizer = ScalingOptimizer([profile(*one) for one in which])
    seconds, draw = 15.0, np.random.default_rng(0)
    budgets = []
    for number in range(60):
        deadlines = {
            name: profile(*one).model_latency * draw.uniform(0.8, 1.05) for name, one in zip(names, which, strict=True)
        }
        share = draw.uniform(0.2, 1.0)
        memory = optimizer.smallest_bytes + share * (optimizer.original_bytes - optimizer.smallest_bytes)
        budgets.append((number * seconds / 60, Budget(memory, deadlines)))
    requests = poisson_load(samples, 60.0, seconds)
    report = serve(runtime, requests, budgets, relax=True, keep_outputs=True)
    wrong, distinct = 0, set()
    by_selection = sorted(report.answers, key=lambda answer: (answer.request.network, answer.options))
    for answer in by_selection:
        network = networks[answer.request.network]
        if network.current != answer.options:
            network.apply(answer.options)
        distinct.add((answer.request.network, answer.options))
        wrong += not np.array_equal(network(*answer.request.inputs), answer.output)
    changes = [change for _, change in report.adaptations]
    over = sum(
        sum(s.est_bytes for s in c.selections.values()) > c.selections[names[0]].max_bytes * (1 + 1e-9) for c in changes
    )
    return Claim(
        id="several_networks",
        statement="three networks under one memory limit answer each request by one selection while budgets change",
        source=ISSUE,
        figure=float(len(requests) - len(report.answers) + wrong),
        unit="requests lost or not answered by the selection they name",
        comparison="==",
        threshold=0.0,
        gate=False,
        also=[("adaptations above their memory limit", over, "==", 0)],
        details={
            "networks": [f"{net}, seed {seed}" for net, seed in which],
            "requests": len(requests),
            "budgets": len(changes),
            "limits that had to be raised": sum(any(s.relaxed for s in c.selections.values()) for c in changes),
            "selections that answered": len(distinct),
            "answer after arrival, median ms": 1e3 * report.latency(0.5),
            "answer after arrival, 99th percentile ms": 1e3 * report.latency(0.99),
            "choosing, median ms": 1e3 * float(np.median([c.choosing_s for c in changes])),
            "choosing, slowest ms": 1e3 * max(c.choosing_s for c in changes),
            "switching, median ms": 1e3 * float(np.median([c.switching_s for c in changes])),
            "switching, slowest ms": 1e3 * max(c.switching_s for c in changes),
            "bytes moved over whole models'": report.moved / sum(c.moved_whole for c in changes),
        },
    )


def measure_speed() -> list[Claim]:
    """What takes time; to be run on a quiet machine."""
    torch.set_num_threads(1)
    return [measure_choose(), measure_switch(), measure_latencies(), measure_several()]


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {"tables": measure_tables, "speed": measure_speed}

if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train_all()
    else:
        sys.exit(main("legodnn", BENCHMARKS))
