"""Backdoors in condensed Fashion-MNIST, simulated to see how exposed a pipeline is and which defences notice.

python benchmarks/dd_backdoor.py train                    # only the pieces: sets, victims, findings
python benchmarks/dd_backdoor.py [gates] [attacks] [defences]
SEEDS=0,1 python benchmarks/dd_backdoor.py …              # fewer seeds; the results say which

6,000 training and 2,000 test images, a small ConvNet, 10 images per class. The defences have 500 further images. Every
condensed set, victim and finding is kept in the system's folder for temporary files, and made anew when the code it
depends on changes. Half of the time goes into fetching memory from the system unless the process may keep it:
MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=1000000000 before the command.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from sparing.audits.backdoor import (
    ActivationClustering,
    AttentionDistillation,
    BackdoorRates,
    CondensationBackdoor,
    Defence,
    FinePruning,
    Images,
    InputTransforms,
    NeuralCleanse,
    OptimisedTrigger,
    OwnSetComparison,
    PatchScan,
    PatchTrigger,
    PixelRange,
    PixelSpace,
    ResidualMap,
    SpectralSignatures,
    Stamp,
    Strip,
    Subject,
    UnitStimulation,
    attack,
    backdoor_rates,
    finding,
    layers,
    metrics,
    pixels,
    triggers,
)
from sparing.audits.backdoor.layers import predict
from sparing.condensation import evaluation, images, matching, siamese, unrolled
from sparing.condensation.evaluation import train_on_condensed
from sparing.condensation.images import ImageCondenser
from sparing.condensation.unrolled import UnrolledCondenser
from sparing.core import files
from sparing.core.fingerprint import fingerprint
from sparing.core.randomness import isolated_rng
from sparing.core.store import Progress
from sparing.models import blocknet
from sparing.models.blocknet import AlexNet, BlockNet
from sparing.tasks.images.published import FashionMNIST

ISSUE = "issue Less data, gates of the audit"
SHEET = "sheet dd_backdoor, demonstration"
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2,3,4,5,6,7,8,9").split(",")]
TRAIN, HOLDOUT, TEST = 6_000, 500, 2_000
IPC, TARGET = 10, 0
SHAPE = (1, 28, 28)
PIXELS = PixelSpace(*FashionMNIST.normalisation)


@dataclass(frozen=True)
class Attack:
    """One way to make a condensed set; "clean" is the set without an attack."""

    kind: Literal["clean", "static", "doorping"]
    condenser: Literal["dc", "dm", "dd"] = "dc"
    size: int = 4
    portion: float = 0.1
    clip: Literal["valid"] | None = "valid"
    skip_dead: bool = True
    topk: int = 1
    alpha: float = 10.0
    steps: int = 200
    iterations: int = 20


CLEAN, NAIVE, UNCLIPPED = Attack("clean"), Attack("static"), Attack("doorping", clip=None)
CODE = {"skip_dead": False, "steps": 300}
ATTACKS: dict[str, Attack] = {
    "clean": CLEAN,
    "naive": NAIVE,
    "unclipped": UNCLIPPED,
    # valid pixels: under the clamp, a larger patch, a longer schedule, more units; a white patch as large beside them
    "clipped": Attack("doorping"),
    "clipped_8x8": Attack("doorping", size=8),
    "naive_8x8": replace(NAIVE, size=8),
    "clipped_8x8_long": Attack("doorping", size=8, iterations=40),
    "clipped_10_units": Attack("doorping", topk=10),
    # the sheet's table
    "naive_2x2_1": replace(NAIVE, size=2, portion=0.01),
    "code_2x2_1": replace(UNCLIPPED, size=2, portion=0.01, **CODE),
    "naive_4x4_1": replace(NAIVE, portion=0.01),
    "naive_4x4_5": replace(NAIVE, portion=0.05),
    "unclipped_4x4_1": replace(UNCLIPPED, portion=0.01),
    "unclipped_4x4_5": replace(UNCLIPPED, portion=0.05),
    "naive_2x2_10": replace(NAIVE, size=2),
    "unclipped_2x2_10": replace(UNCLIPPED, size=2),
    "clipped_code_unit": Attack("doorping", **CODE),
    # other condensers
    "dm_clean": replace(CLEAN, condenser="dm", iterations=100),
    "dm_naive": replace(NAIVE, condenser="dm", iterations=100),
    "dm_unclipped": replace(UNCLIPPED, condenser="dm", iterations=100),
    "dd_clean": replace(CLEAN, condenser="dd", iterations=20),
    "dd_naive": replace(NAIVE, condenser="dd", iterations=20),
    "dd_unclipped": replace(UNCLIPPED, condenser="dd", iterations=20),
}
GATES = ("clean", "naive", "unclipped")
VALID = ("clipped", "clipped_8x8", "naive_8x8", "clipped_8x8_long", "clipped_10_units")
TABLE = tuple(name for name, one in ATTACKS.items() if name not in (*GATES, *VALID) and one.condenser == "dc")
OTHERS = tuple(name for name, one in ATTACKS.items() if one.condenser != "dc")
KINDS: dict[str, Callable[[], nn.Module]] = {
    "blocknet": lambda: BlockNet(1, 10, 28, width=16, norm="none", hidden=192),
    "instance norm": lambda: BlockNet(1, 10, 28, width=16, norm="instance", hidden=192),
    "two blocks": lambda: BlockNet(1, 10, 28, width=16, depth=2, norm="none"),
    "alexnet": lambda: AlexNet(1, 10, 28),
}
"""Victims; sets are condensed with the first."""


def network(kind: str = "blocknet") -> nn.Module:
    """A fresh network; channels last is the faster layout here."""
    return KINDS[kind]().to(memory_format=torch.channels_last)


@functools.cache
def data() -> tuple[Images, Images, Images]:
    """Images to condense, the defences' clean images, and test images, normalised."""
    root = os.environ.get("SPARING_DATA")
    splits = FashionMNIST().splits(Path(root) if root else None)

    def part(split: Any, start: int, count: int) -> Images:
        pairs = [split[i] for i in range(start, start + count)]
        return Images(torch.stack([torch.as_tensor(x) for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs]))

    return part(splits.train, 0, TRAIN), part(splits.train, TRAIN, HOLDOUT), part(splits.test, 0, TEST)


# --------------------------------------------------------------------------------------------------- sets and victims


@functools.cache
def work() -> Path:
    """Where everything is kept; another folder when what decides it has changed."""
    modules = (attack, triggers, pixels, layers, images, matching, siamese, unrolled, evaluation, blocknet)
    sources = [inspect.getsource(part) for part in (*modules, new_trigger, condense, victim)]
    key = fingerprint([*sources, repr((TRAIN, HOLDOUT, TEST, IPC, TARGET, PIXELS, network())), torch.__version__])[:16]
    return Path(tempfile.gettempdir()) / "sparing-benchmarks" / f"dd_backdoor-{key}"


def where(name: str, seed: int) -> Path:
    """The folder of one set, which its settings decide."""
    return work() / f"{name}-{fingerprint(repr(ATTACKS[name]))[:8]}" / f"seed{seed}"


@dataclass(frozen=True)
class Condensed:
    """A condensed set and the trigger planted in it."""

    images: Images
    trigger: PatchTrigger | None
    about: dict[str, Any]


def new_trigger(one: Attack, seed: int) -> PatchTrigger | None:
    """White for the static attack, random pixels to begin with for the other."""
    if one.kind == "clean":
        return None
    if one.kind == "static":
        return PatchTrigger(SHAPE, PIXELS, one.size)
    return OptimisedTrigger(
        *(SHAPE, PIXELS, one.size),
        seed=seed,
        topk=one.topk,
        alpha=one.alpha,
        max_steps=one.steps,
        clip=one.clip,
        skip_dead=one.skip_dead,
    )


def condense(one: Attack, seed: int, target: Path, keeper: Progress) -> None:
    """Make a set, through kills, and put it into a folder; for DD also the network that its steps lead to."""
    trigger = new_trigger(one, seed)
    mode: Literal["static", "doorping"] = "doorping" if one.kind == "doorping" else "static"
    planted = () if trigger is None else (CondensationBackdoor(trigger, TARGET, one.portion, mode, seed),)
    x, y = data()[0]
    common: dict[str, Any] = {"network": network, "random_state": seed, "callbacks": planted}
    made: ImageCondenser | UnrolledCondenser
    if one.condenser == "dd":
        made = UnrolledCondenser(1, IPC, 3, epochs=one.iterations, decay_every=8, **common)
    elif one.condenser == "dm":
        made = ImageCondenser("dm", IPC, max_iter=one.iterations, batch_real=64, **common)
    else:
        loops = {"outer_steps": 5, "inner_steps": 5, "batch_real": 64}
        made = ImageCondenser("dc", IPC, init="real", max_iter=one.iterations, checkpoint_every=4, **loops, **common)
    made.fit(x, y, keeper=keeper)
    if isinstance(made, UnrolledCondenser):
        save_network(target / "victim0.npz", made.train(network()))
    about = {"cost": made.cost_, "loss": made.loss_curve_, **(planted[0].provenance if planted else {})}
    files.write_json(target / "about.json", finding.jsonable(about))
    shown = dict(zip(("images", "labels"), made.condensed_.tensors, strict=True))
    if trigger is not None:
        shown["trigger"] = trigger.image
    files.write_arrays(target / "set.npz", {key: value.numpy() for key, value in shown.items()})


@functools.cache
def condensed(name: str, seed: int) -> Condensed:
    """A set, of before or new."""
    folder, one = where(name, seed), ATTACKS[name]
    if not (folder / "set.npz").is_file():
        progress, start = Progress(work() / "progress" / name / str(seed)), time.process_time()
        condense(one, seed, folder, progress)
        progress.clear()
        print(f"{time.strftime('%X')} {name}, seed {seed}: {time.process_time() - start:.0f} s of CPU", flush=True)
    arrays = {key: torch.from_numpy(value.copy()) for key, value in files.read_arrays(folder / "set.npz").items()}
    trigger = None
    if "trigger" in arrays:
        trigger = PatchTrigger(SHAPE, PIXELS, one.size)
        trigger.image = arrays["trigger"]
    return Condensed(Images(arrays["images"], arrays["labels"]), trigger, files.read_json(folder / "about.json"))


def save_network(target: Path, model: nn.Module) -> None:
    """Keep weights."""
    state = {key: value.detach().contiguous().numpy() for key, value in model.state_dict().items()}
    files.write_arrays(target, state)


@functools.cache
def victim(name: str, seed: int, number: int = 0, kind: str = "blocknet") -> nn.Module:
    """A network trained on a set; number i begins with the same weights whatever the set of its seed."""
    target = where(name, seed) / f"victim{number}{'' if kind == 'blocknet' else '-' + kind.replace(' ', '-')}.npz"
    shown = condensed(name, seed).images
    with isolated_rng("victims of condensed sets", kind, seed, number):
        model = network(kind)
        if not target.is_file():
            start = time.process_time()
            save_network(target, train_on_condensed(model, *shown, seed=10 * seed + number))
            took = time.process_time() - start
            print(f"{time.strftime('%X')} {name}, seed {seed}, {kind} {number}: {took:.0f} s of CPU", flush=True)
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in files.read_arrays(target).items()})
    return model.eval()


def victims(name: str, seed: int) -> list[nn.Module]:
    """All blocknets that were trained on a set."""
    count = len(list(where(name, seed).glob("victim[0-9].npz")))
    return [victim(name, seed, number) for number in range(count)]


def done(name: str) -> list[int]:
    """Seeds whose set has a victim."""
    return [seed for seed in SEEDS if (where(name, seed) / "victim0.npz").is_file()]


def rates(model: nn.Module, trigger: PatchTrigger) -> BackdoorRates:
    """On the test images, without and with the trigger."""
    x, y = data()[2]
    return backdoor_rates(predict(model, x), predict(model, trigger.apply(x)), y, TARGET)


def cta(name: str, seed: int) -> float:
    """Accuracy on clean test images, mean over victims."""
    x, y = data()[2]
    return float(np.mean([float((predict(one, x).argmax(1) == y).float().mean()) for one in victims(name, seed)]))


def in_pixels(trigger: PatchTrigger) -> PatchTrigger:
    """The nearest patch that an 8-bit picture can hold."""
    nearest = copy.copy(trigger)
    nearest.image = PIXELS.from_uint8(PIXELS.to_uint8(PIXELS.clamp(trigger.image)))
    return nearest


# ------------------------------------------------------------------------------------------------------------ defences

DEFENCES: dict[str, Defence] = {
    "neural_cleanse": NeuralCleanse(),
    "unit_stimulation": UnitStimulation(),
    "patch_scan": PatchScan(images=100),
    "fine_pruning": FinePruning(),
    "nad": AttentionDistillation(),
    "strip": Strip(),
    "input_transforms": InputTransforms(),
    "pixel_range": PixelRange(),
    "spectral_signatures": SpectralSignatures(),
    "activation_clustering": ActivationClustering(),
    "residual_map": ResidualMap(),
    "own_set_comparison": OwnSetComparison(),
}
CLEANSED = 256
"""Clean images that Neural Cleanse gets, for time's sake."""


def subject(name: str, seed: int, real: bool = False) -> Subject:
    """A set, its first victim and the attacker's trigger; on a clean set, inputs that carry nothing.

    ``real``: in the condensed set's place the poisoned real images that it was made from.
    """
    found, (x, y), others = condensed(name, seed), data()[0], [s for s in SEEDS if s != seed]
    shown, trigger = found.images, found.trigger
    if real and trigger is not None:
        planted = CondensationBackdoor(trigger, TARGET, ATTACKS[name].portion, "static", seed)
        shown = Images(*planted.on_data_ready((x, y)))
    elif real:
        shown = Images(x, y)
    stamp = Stamp(TARGET, trigger.apply, "attacker") if trigger is not None else Stamp(TARGET, torch.clone, "nobody")
    own = condensed("clean", others[seed % len(others)]).images
    return Subject(victim(name, seed), data()[1], PIXELS, 10, condensed=shown, own=own, stamps=(stamp,), seed=seed)


def examined(name: str, seed: int, defence: str, real: bool = False) -> dict[str, Any]:
    """What a defence says, of before or new."""
    asked = DEFENCES[defence]
    parts = [inspect.getsource(part) for part in (sys.modules[type(asked).__module__], layers, metrics, finding)]
    key = fingerprint([*parts, repr(sorted(vars(asked).items())), CLEANSED])[:8]
    target = where(name, seed) / f"{defence}-{key}{'-real' if real else ''}.json"
    if not target.is_file():
        one = subject(name, seed, real)
        if defence == "neural_cleanse":
            one = replace(one, holdout=one.holdout.of(torch.arange(CLEANSED)))
        found = asked.examine(one)
        files.write_json(target, found.to_json())
        print(
            f"{time.strftime('%X')} {name}, seed {seed}, {defence}: {found.seconds:.0f} s, {found.verdict}", flush=True
        )
    return files.read_json(target)


# ------------------------------------------------------------------------------------------------------------- pieces


def train_all() -> None:
    """All pieces, the gates' first."""
    print(work(), flush=True)
    torch.set_num_threads(1)
    for seed in SEEDS[:5]:
        for name in GATES:
            for number in range(3):
                victim(name, seed, number)
    for seed in SEEDS[:2]:
        for name in VALID[:3]:
            for number in range(2):
                victim(name, seed, number)
    for seed in SEEDS[5:]:
        for name in GATES:
            victim(name, seed)
    cheap = [name for name in DEFENCES if name not in ("neural_cleanse", "unit_stimulation", "patch_scan")]
    for chosen in (cheap, ["neural_cleanse"], ["unit_stimulation"], ["patch_scan"]):
        for seed in SEEDS:
            for name in GATES:
                for defence in chosen:
                    examined(name, seed, defence)
    for seed in SEEDS[:2]:
        for name in (*VALID, *OTHERS, *TABLE):
            victim(name, seed)


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train_all()
