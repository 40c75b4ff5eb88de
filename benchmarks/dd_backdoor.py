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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from _claims import Claim, main
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
from sparing.core.statistics import share_interval, t_interval
from sparing.core.store import Progress
from sparing.models import blocknet
from sparing.models.blocknet import AlexNet, BlockNet
from sparing.tasks.images.published import FashionMNIST

ISSUE = "issue Less data, gates of the audit"
SHEET = "sheet dd_backdoor, demonstration"
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2,3,4").split(",")]
TRAIN, HOLDOUT, TEST = 6_000, 500, 2_000
IPC, TARGET = 10, 0
VICTIMS = 2
"""Of each of the sets that the gates are about; the others have at least one."""
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
    alpha: float = 30.0
    steps: int = 200
    iterations: int = 15
    lr_img: float = 1.0

    def made_like(self, other: Attack) -> bool:
        """Whether the condensers are the same."""
        return (self.condenser, self.lr_img, self.iterations) == (other.condenser, other.lr_img, other.iterations)


CLEAN, NAIVE, UNCLIPPED = Attack("clean"), Attack("static"), Attack("doorping", clip=None)
SLOW: dict[str, Any] = {"lr_img": 0.1, "alpha": 10.0, "iterations": 20}
"""The sheet's settings: the published learning rate of the images, which hardly move in so few iterations, and the
published target of the trigger's units, which many an update finds reached from the start."""
MIDDLE: dict[str, Any] = {"lr_img": 0.3, "iterations": 10}
LONG: dict[str, Any] = {"iterations": 25}
CODE: dict[str, Any] = {"skip_dead": False, "steps": 300, "alpha": 10.0}
ATTACKS: dict[str, Attack] = {
    "clean": CLEAN,
    "naive": NAIVE,
    "unclipped": UNCLIPPED,
    "clean_slow": replace(CLEAN, **SLOW),
    "naive_slow": replace(NAIVE, **SLOW),
    "unclipped_slow": replace(UNCLIPPED, **SLOW),
    "clean_middle": replace(CLEAN, **MIDDLE),
    "naive_middle": replace(NAIVE, **MIDDLE),
    "unclipped_middle": replace(UNCLIPPED, **MIDDLE),
    "clean_long": replace(CLEAN, **LONG),
    "naive_long": replace(NAIVE, **LONG),
    "unclipped_3": replace(UNCLIPPED, portion=0.03, topk=10),
    # valid pixels: under the clamp, a larger patch, a longer schedule, more units; a white patch as large beside them
    "clipped": Attack("doorping"),
    "clipped_8x8": Attack("doorping", size=8),
    "naive_8x8": replace(NAIVE, size=8),
    "clipped_slow": Attack("doorping", **SLOW),
    "clipped_8x8_slow": Attack("doorping", size=8, **SLOW),
    "naive_8x8_slow": replace(NAIVE, size=8, **SLOW),
    "clipped_8x8_long": Attack("doorping", size=8, **LONG),
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
    "unclipped_alpha_10": replace(UNCLIPPED, alpha=10.0),
    "clipped_code_unit": Attack("doorping", **CODE),
    # other condensers
    "dm_clean": replace(CLEAN, condenser="dm", lr_img=1.0, iterations=100),
    "dm_naive": replace(NAIVE, condenser="dm", lr_img=1.0, iterations=100),
    "dm_unclipped": replace(UNCLIPPED, condenser="dm", lr_img=1.0, iterations=100, steps=50),
    "dd_clean": replace(CLEAN, condenser="dd", iterations=10),
    "dd_naive": replace(NAIVE, condenser="dd", iterations=10),
    "dd_unclipped": replace(UNCLIPPED, condenser="dd", iterations=10),
}
EXAMINED = ("clean", "naive", "unclipped")
"""What the defences are asked about."""
JUDGED: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "doorping_unclipped": ("unclipped_3", 0.9, ("unclipped", "unclipped_4x4_5", "unclipped_4x4_1", "unclipped_slow")),
    "naive": ("naive_long", 0.35, ("naive", "naive_slow", "naive_middle")),
}
"""Claim → the attack it is about, its bar, and the same attack with other settings."""
VALID = tuple(name for name in ATTACKS if (name.startswith("clipped") and "code" not in name) or "8x8" in name)
RATES = tuple(f"{name}_{rate}" for rate in ("slow", "middle") for name in EXAMINED)
"""The same with smaller learning rates of the images."""
TABLE = tuple(
    name for name, one in ATTACKS.items() if name not in (*EXAMINED, *VALID, *RATES) and one.condenser == "dc"
)
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
        made = ImageCondenser("dm", IPC, max_iter=one.iterations, batch_real=64, lr_img=one.lr_img, **common)
    else:
        settings: dict[str, Any] = {"outer_steps": 5, "inner_steps": 5, "batch_real": 64, "lr_img": one.lr_img}
        made = ImageCondenser("dc", IPC, init="real", max_iter=one.iterations, checkpoint_every=4, **settings, **common)
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


def victim_file(name: str, seed: int, number: int, kind: str) -> Path:
    """Where a victim's weights are kept."""
    return where(name, seed) / f"victim{number}{'' if kind == 'blocknet' else '-' + kind.replace(' ', '-')}.npz"


@functools.cache
def victim(name: str, seed: int, number: int = 0, kind: str = "blocknet") -> nn.Module:
    """A network trained on a set; number i begins with the same weights whatever the set of its seed."""
    target = victim_file(name, seed, number, kind)
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


def victims(name: str, seed: int) -> range:
    """Numbers of the blocknets that were trained on a set."""
    return range(len(list(where(name, seed).glob("victim[0-9].npz"))))


def done(name: str) -> list[int]:
    """Seeds whose set has a victim."""
    return [seed for seed in SEEDS if (where(name, seed) / "victim0.npz").is_file()]


@functools.cache
def on_clean(name: str, seed: int, number: int, kind: str = "blocknet") -> Tensor:
    """A victim's logits of the test images."""
    return predict(victim(name, seed, number, kind), data()[2].x)


def rates(name: str, seed: int, number: int, trigger: PatchTrigger, kind: str = "blocknet") -> BackdoorRates:
    """A victim's on the test images, without and with the trigger."""
    x, y = data()[2]
    triggered = predict(victim(name, seed, number, kind), trigger.apply(x))
    return backdoor_rates(on_clean(name, seed, number, kind), triggered, y, TARGET)


def cta(name: str, seed: int) -> float:
    """Accuracy on clean test images, mean over victims."""
    right = [on_clean(name, seed, number).argmax(1) == data()[2].y for number in victims(name, seed)]
    return float(np.mean([float(one.float().mean()) for one in right]))


def in_pixels(trigger: PatchTrigger) -> PatchTrigger:
    """The nearest patch that an 8-bit picture can hold."""
    nearest = copy.copy(trigger)
    nearest.image = PIXELS.from_uint8(PIXELS.to_uint8(PIXELS.clamp(trigger.image)))
    return nearest


# ------------------------------------------------------------------------------------------------------------ defences

DEFENCES: dict[str, Defence] = {
    "neural_cleanse": NeuralCleanse(),
    "unit_stimulation": UnitStimulation(images=32),
    "unit_stimulation_weighted": UnitStimulation(images=32, weight=0.01),
    "patch_scan": PatchScan(images=25),
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
CLEANSED = 64
"""Clean images that Neural Cleanse gets, for time's sake."""


def subject(name: str, seed: int, number: int, real: bool = False) -> Subject:
    """A set, a victim and the attacker's trigger; on a clean set, inputs that carry nothing.

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
    own = condensed(without_attack(name), others[seed % len(others)]).images
    return Subject(
        victim(name, seed, number), data()[1], PIXELS, 10, condensed=shown, own=own, stamps=(stamp,), seed=seed
    )


def kept_finding(name: str, seed: int, number: int, defence: str, real: bool) -> Path:
    """Where a finding is kept; another file when the defence has changed."""
    asked = DEFENCES[defence]
    parts = [inspect.getsource(part) for part in (sys.modules[type(asked).__module__], layers, metrics, finding)]
    key = fingerprint([*parts, repr(sorted(vars(asked).items())), CLEANSED])[:8]
    return where(name, seed) / f"{defence}-{key}-{number}{'-real' if real else ''}.json"


def examine(name: str, seed: int, number: int, defence: str, real: bool = False) -> None:
    """Ask a defence, unless it was asked before."""
    target = kept_finding(name, seed, number, defence, real)
    if target.is_file():
        return
    one = subject(name, seed, number, real)
    if defence == "neural_cleanse":
        one = replace(one, holdout=one.holdout.of(torch.arange(CLEANSED)))
    found = DEFENCES[defence].examine(one)
    files.write_json(target, found.to_json())
    said = f"{found.seconds:.0f} s, {found.verdict}"
    print(f"{time.strftime('%X')} {name}, {seed}.{number}, {defence}: {said}", flush=True)


def to_examine(name: str, defence: str, real: bool = False) -> list[tuple[str, int, int, str, bool]]:
    """The victims of each set; or sets, also those made with smaller learning rates."""
    asked = DEFENCES[defence]
    if real and not isinstance(asked, SpectralSignatures | ActivationClustering):
        return []
    if asked.level != "data":
        return [(name, seed, number, defence, False) for seed in done(name) for number in range(VICTIMS)]
    return [(one, seed, 0, defence, real) for one in (name, f"{name}_slow", f"{name}_middle") for seed in done(one)]


def seen(name: str, defence: str, real: bool = False) -> list[dict[str, Any]]:
    """What a defence said, as far as it was asked."""
    known = [kept_finding(*one) for one in to_examine(name, defence, real)]
    return [files.read_json(target) for target in known if target.is_file()]


# ------------------------------------------------------------------------------------------------------------- pieces


def train_all() -> None:
    """All pieces, the gates' first; what is made already is left alone."""
    print(work(), flush=True)
    judged = [name for name, _, _ in JUDGED.values()]
    for seed in SEEDS:
        for name in (*EXAMINED, "clean_long", *judged):
            for number in range(VICTIMS):
                victim(name, seed, number)
    for name in (*VALID[:3], *OTHERS[:3]):
        victim(name, SEEDS[0])
    slow = ("neural_cleanse", "unit_stimulation", "unit_stimulation_weighted", "patch_scan")
    for defence in sorted(DEFENCES, key=lambda name: name in slow):
        for name in EXAMINED:
            for real in (False, True):
                for one in to_examine(name, defence, real):
                    examine(*one)
    for seed in SEEDS[:3]:
        for kind in KINDS:
            for name in judged:
                victim(name, seed, 0, kind)
    for seed in SEEDS:
        for name in (*VALID, *OTHERS, *TABLE, *RATES):
            victim(name, seed)


# -------------------------------------------------------------------------------------------------------------- claims


def without_attack(name: str) -> str:
    """The clean set of the same condenser."""
    return next(other for other, one in ATTACKS.items() if one.kind == "clean" and one.made_like(ATTACKS[name]))


@functools.cache
def measured(name: str) -> list[dict[str, Any]]:
    """For each seed :func:`row`, of before or new."""
    found, clean = [], without_attack(name)
    for seed in (s for s in done(name) if s in done(clean) and ATTACKS[name].kind != "clean"):
        target = where(name, seed) / f"rates-{len(victims(name, seed))}-{len(victims(clean, seed))}.json"
        if not target.is_file():
            files.write_json(target, row(name, seed))
        found.append(files.read_json(target))
    return found


def row(name: str, seed: int) -> dict[str, Any]:
    """Rates, means over victims; the same trigger on victims of the clean set; the trigger moved into pixels."""
    made, clean = condensed(name, seed), without_attack(name)
    assert made.trigger is not None
    inside = in_pixels(made.trigger)
    own, valid = ([rates(name, seed, n, one) for n in victims(name, seed)] for one in (made.trigger, inside))
    other, valid_other = ([rates(clean, seed, n, one) for n in victims(clean, seed)] for one in (made.trigger, inside))
    lost = [100 * (control.cta.value - one.cta.value) for control, one in zip(other, own, strict=False)]

    def mean(which: str, over: list[BackdoorRates]) -> float:
        return float(np.mean([getattr(one, which).value for one in over]))

    return {
        "seed": seed,
        "victims": len(own),
        **{which: mean(which, own) for which in ("cta", "asr", "asr_all", "null")},
        "asr by victim": [one.asr.value for one in own],
        "asr by victim, 95 %": [list(one.asr.interval) for one in own],
        "cta by victim": [one.cta.value for one in own],
        "points of cta lost": float(np.mean(lost)),
        "asr, clean set": mean("asr", other),
        "asr, trigger in pixels": mean("asr", valid),
        "asr, trigger in pixels, clean set": mean("asr", valid_other),
        "lowest of the patch, std": float(made.trigger.patch.min()),
        "highest of the patch, std": float(made.trigger.patch.max()),
        "poisoned share of the class": made.about["effective_share"],
        "updates of the trigger": made.about["trigger"].get("updates"),
        "that moved it": made.about["trigger"].get("moved"),
        "bytes of the set": sum(part.nbytes for part in made.images),
        "condensing, s": made.about["cost"]["wall_s"],
    }


def over_seeds(name: str, which: str) -> float:
    """Mean over seeds."""
    return float(np.mean([one[which] for one in measured(name)]))


def beside(name: str) -> list[dict[str, Any]]:
    """What an attack's success stands beside."""
    shown = {
        "clean images that go there": "null",
        "same trigger, clean set": "asr, clean set",
        "clean accuracy": "cta",
        "points of it lost": "points of cta lost",
    }
    if ATTACKS[name].clip is None:
        shown |= {
            "trigger moved into pixels": "asr, trigger in pixels",
            "that on the clean set": "asr, trigger in pixels, clean set",
            "lowest of the patch, std": "lowest of the patch, std",
            "highest of the patch, std": "highest of the patch, std",
        }
    if ATTACKS[name].kind == "doorping":
        shown |= {"updates that moved it": "that moved it"}
    return [{"name": label, "figure": over_seeds(name, which)} for label, which in shown.items()]


def spread(name: str, which: str = "asr") -> tuple[float, float] | None:
    """95 % for the mean over seeds (Student)."""
    return t_interval([one[which] for one in measured(name)])


def showing(name: str, seed: int) -> int:
    """Synthetic images of the target's class whose patch is nearer to the white one than to black."""
    made = condensed(name, seed)
    assert made.trigger is not None
    shown = PIXELS.to_unit(made.images.of(made.images.y == TARGET).x)
    return int(((shown * made.trigger.mask).flatten(1).sum(1) > made.trigger.mask.sum() / 2).sum())


def about_attack(name: str) -> dict[str, Any]:
    """Settings, and everything by seed."""
    about = {"settings": asdict(ATTACKS[name]), "by seed": measured(name)}
    if ATTACKS[name].kind == "static":
        about["images of the target that show the patch, by seed"] = [showing(name, s["seed"]) for s in measured(name)]
    return about


UNIT = "attack success: share of triggered test images of other classes that go to the target"


def described(name: str) -> str:
    """An attack in words."""
    one = ATTACKS[name]
    parts = [f"{one.size}×{one.size}", f"{one.portion:.0%}", one.condenser.upper()]
    if one.condenser == "dc" and one.lr_img != CLEAN.lr_img:
        parts[-1] += f" with a rate of {one.lr_img:g}"
    if one.kind == "doorping":
        parts.append("valid pixels" if one.clip else "not clipped")
        parts.append("best live unit" if one.topk == 1 else f"{one.topk} best live units")
        if not one.skip_dead:
            parts[-1] = "the published code's unit"
        if one.alpha != UNCLIPPED.alpha:
            parts[-1] += f", alpha {one.alpha:g}"
    if one.condenser == "dc" and one.iterations != CLEAN.iterations:
        parts.append(f"{one.iterations} iterations")
    return f"{'NAIVEATTACK' if one.kind == 'static' else 'DOORPING'}, {', '.join(parts)}"


def measure_gates() -> list[Claim]:
    """The three claims that the issue sets."""
    claims = [
        Claim(
            id=claim,
            statement=described(name),
            source=ISSUE,
            figure=over_seeds(name, "asr"),
            unit=UNIT,
            comparison=">=",
            threshold=reach,
            interval95=spread(name),
            seeds=[one["seed"] for one in measured(name)],
            baselines=[
                *beside(name),
                *(
                    {"name": described(other), "figure": over_seeds(other, "asr")}
                    for other in others
                    if measured(other)
                ),
            ],
            details=about_attack(name),
        )
        for claim, (name, reach, others) in JUDGED.items()
    ]
    judged = [name for name, _, _ in JUDGED.values()]
    known = [name for name, one in ATTACKS.items() if one.kind != "clean" and measured(name)]
    lost = {name: over_seeds(name, "points of cta lost") for name in known}
    worst = max((name for name in known if len(measured(name)) >= 5), key=lambda name: lost[name])
    return [
        *claims,
        Claim(
            id="clean_accuracy",
            statement="attacked sets teach clean images as well as the clean set does; the worst attack of five sets",
            source=ISSUE,
            figure=lost[worst],
            unit=f"points of clean accuracy lost, mean over seeds; {described(worst)}",
            comparison="<=",
            threshold=3.0,
            interval95=spread(worst, "points of cta lost"),
            seeds=[one["seed"] for one in measured(worst)],
            baselines=[
                {"name": f"{described(name)} (n = {len(measured(name))})", "figure": value}
                for name, value in lost.items()
                if name != worst
            ],
            details={
                "clean accuracy of clean sets": {
                    name: {str(seed): cta(clean, seed) for seed in done(clean)}
                    for name, clean in ((name, without_attack(name)) for name in judged)
                },
                "most lost by a single set": max(one["points of cta lost"] for name in known for one in measured(name)),
                "points lost by seed": {name: [one["points of cta lost"] for one in measured(name)] for name in known},
            },
        ),
    ]


def measure_attacks() -> list[Claim]:
    """The sheet's table, the question of valid pixels, other condensers and other victims."""
    claims = [
        Claim(
            id=f"attack_{name}",
            statement=described(name),
            source=SHEET,
            figure=over_seeds(name, "asr"),
            unit=UNIT,
            comparison=">=",
            threshold=0.9,
            gate=False,
            interval95=spread(name),
            seeds=[one["seed"] for one in measured(name)],
            baselines=beside(name),
            details=about_attack(name),
        )
        for name in ATTACKS
        if name not in [judged for judged, _, _ in JUDGED.values()] and measured(name)
    ]
    tried = [name for name, one in ATTACKS.items() if one.kind == "doorping" and one.clip and measured(name)]
    if tried:
        best = max(tried, key=lambda name: over_seeds(name, "asr"))
        claims.append(
            Claim(
                id="doorping_valid_pixels",
                statement=f"DOORPING reaches 0.9 with pixels that a picture can hold; the best: {described(best)}",
                source=ISSUE,
                figure=over_seeds(best, "asr"),
                unit=UNIT,
                comparison=">=",
                threshold=0.9,
                gate=False,
                interval95=spread(best),
                seeds=[one["seed"] for one in measured(best)],
                baselines=[{"name": described(name), "figure": over_seeds(name, "asr")} for name in tried],
                details={"each attack": "its own claim, attack_…"},
            )
        )
    elsewhere = other_victims()
    return [*claims, elsewhere] if elsewhere else claims


def other_victims() -> Claim | None:
    """The two attacks that the gates are about on networks of other kinds than the condenser's."""
    found: dict[tuple[str, str], list[tuple[int, BackdoorRates]]] = {}
    for name, _, _ in JUDGED.values():
        for kind in list(KINDS)[1:]:
            for seed in done(name):
                trigger = condensed(name, seed).trigger
                if trigger is not None and victim_file(name, seed, 0, kind).is_file():
                    found.setdefault((name, kind), []).append((seed, rates(name, seed, 0, trigger, kind)))
    if not found:
        return None

    def mean(rows: list[tuple[int, BackdoorRates]], which: str) -> float:
        return float(np.mean([getattr(one, which).value for _, one in rows]))

    return Claim(
        id="other_victims",
        statement="both attacks carry over to victims of other architectures",
        source=SHEET,
        figure=min(mean(rows, "asr") for rows in found.values()),
        unit=f"{UNIT}; least of the attacks and architectures",
        comparison=">=",
        threshold=0.35,
        gate=False,
        seeds=sorted({seed for rows in found.values() for seed, _ in rows}),
        baselines=[
            {"name": f"{described(name)}; {kind}, {label} (n = {len(rows)})", "figure": mean(rows, which)}
            for (name, kind), rows in found.items()
            for label, which in (("attack success", "asr"), ("clean accuracy", "cta"))
        ],
    )


def share(findings: list[dict[str, Any]], verdict: str) -> tuple[int, int, tuple[float, float]]:
    """(findings with the verdict, all, Wilson's interval)."""
    hits = sum(one["verdict"] == verdict for one in findings)
    return hits, len(findings), share_interval(hits, len(findings))


def verdicts(defence: str, statement: str, groups: dict[str, list[dict[str, Any]]], verdict: str, **more: Any) -> Claim:
    """How often a defence says something of what NAIVEATTACK has touched; ``more``: further fields of the claim."""
    hits, n, interval = share(groups["naive"], verdict)
    asked = [one for name in EXAMINED for one in to_examine(name, defence) if kept_finding(*one).is_file()]
    more["details"]["seconds"] = float(np.mean([one["seconds"] for found in groups.values() for one in found]))
    return Claim(
        id=f"defence_{defence}",
        statement=statement,
        source=ISSUE,
        figure=hits / n,
        unit=f"of {n} sets or networks: {verdict}",
        comparison=">=",
        threshold=0.5,
        gate=False,
        interval95=interval,
        seeds=sorted({seed for _, seed, *_ in asked}),
        **more,
    )


def detection(defence: str) -> Claim:
    """True positives on both attacks beside false ones."""
    groups = {name: seen(name, defence) for name in EXAMINED}
    counts = {name: share(found, "evidence") for name, found in groups.items()}
    silent = {name: share(found, "not applicable")[0] for name, found in groups.items()}
    baselines = [
        {"name": f"{label} (95 %: {low:.2f} … {high:.2f})", "figure": hits / n}
        for label, (hits, n, (low, high)) in (
            ("unclipped DOORPING seen", counts["unclipped"]),
            ("false alarms on clean ones", counts["clean"]),
        )
    ]
    alarms = {name: [one for one in found if one["verdict"] == "evidence"] for name, found in groups.items()}
    for label, raised in (("alarms", alarms["naive"] + alarms["unclipped"]), ("false alarms", alarms["clean"])):
        if raised:
            named = sum(TARGET in one["suspects"] for one in raised) / len(raised)
            baselines.append({"name": f"{label} that name the target", "figure": named})
    if any(silent.values()):
        baselines += [
            {"name": f"not applicable, {name}", "figure": n / len(groups[name])} for name, n in silent.items()
        ]
    details: dict[str, Any] = {"evidence of all, by group": {name: found[:2] for name, found in counts.items()}}
    on_real = {name: seen(name, defence, real=True) for name in EXAMINED}
    if all(on_real.values()):
        baselines += [
            {"name": f"{label} real images", "figure": share(on_real[name], "evidence")[0] / len(on_real[name])}
            for label, name in (("seen on the naively poisoned", "naive"), ("false alarms on the clean", "clean"))
        ]
        details["classes, real images"] = {name: [one["suspects"] for one in found] for name, found in on_real.items()}
    details["scores"] = {name: [one["score"] for one in found] for name, found in groups.items()}
    details["classes"] = {name: [one["suspects"] for one in found] for name, found in groups.items()}
    return verdicts(
        defence,
        f"{defence} sees most of NAIVEATTACK's sets or networks, and raises few false alarms",
        groups,
        "evidence",
        baselines=baselines,
        also=[("false alarms", counts["clean"][0] / counts["clean"][1], "<=", 0.1)],
        details=details,
    )


def repair(defence: str) -> Claim:
    """Attack success and clean accuracy before and after."""
    groups = {name: seen(name, defence) for name in EXAMINED}

    def figures(name: str) -> dict[str, tuple[float, ...]]:
        """Name of the change → mean (attack success before, after, clean accuracy before, after)."""
        rows: dict[str, list[tuple[float, float, float, float]]] = {}
        for one in (found["figures"] for found in groups[name]):
            if "after" in one:
                before = (one["asr"][str(TARGET)], one["cta"])
                for change, after in one["after"].items():
                    rows.setdefault(change, []).append((before[0], after[f"asr_{TARGET}"], before[1], after["cta"]))
            else:
                asr = one[f"asr_before_{TARGET}"], one[f"asr_after_{TARGET}"]
                rows.setdefault(defence, []).append((*asr, one["cta_before"], one["cta_after"]))
        return {change: tuple(np.mean(found, axis=0).tolist()) for change, found in rows.items()}

    tables = {name: figures(name) for name in EXAMINED}
    allowed = 0.04
    labels = ("attack success before", "after", "clean accuracy before", "after")
    baselines = []
    for name in EXAMINED[1:]:
        kept = [change for change, (_, _, before, after) in tables[name].items() if before - after <= allowed]
        best = min(kept or tables[name], key=lambda change: tables[name][change][1])
        what = name if best == defence else f"{name}, {best}"
        baselines += [
            {"name": f"{what}, {label}", "figure": value}
            for label, value in zip(labels, tables[name][best], strict=True)
        ]
    hits, n, (low, high) = share(groups["unclipped"], "mitigated")
    return verdicts(
        defence,
        f"{defence} takes half of NAIVEATTACK's success for at most 4 points of clean accuracy",
        groups,
        "mitigated",
        baselines=[{"name": f"unclipped DOORPING (95 %: {low:.2f} … {high:.2f})", "figure": hits / n}, *baselines],
        details={
            "attack success before, after, clean accuracy before, after": tables,
            "verdicts": {name: [one["verdict"] for one in found] for name, found in groups.items()},
        },
    )


def measure_defences() -> list[Claim]:
    """Every defence on ten networks or sets of either attack and ten clean ones."""
    repairs = FinePruning | AttentionDistillation | InputTransforms
    asked = {name: one for name, one in DEFENCES.items() if all(seen(group, name) for group in EXAMINED)}
    return [repair(name) if isinstance(one, repairs) else detection(name) for name, one in asked.items()]


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {
    "gates": measure_gates,
    "attacks": measure_attacks,
    "defences": measure_defences,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["train"]:
        train_all()
    else:
        sys.exit(main("dd_backdoor", BENCHMARKS))
