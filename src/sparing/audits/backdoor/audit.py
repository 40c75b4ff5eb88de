"""The audit: how exposed is a condensed set, or a network, to a backdoor, and which defences notice?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from sparing.audits.backdoor.condensed import OwnSetComparison, PatchScan, PixelRange, ResidualMap
from sparing.audits.backdoor.finding import Defence, Finding, Images, Stamp, Subject, jsonable
from sparing.audits.backdoor.latent import ActivationClustering, SpectralSignatures
from sparing.audits.backdoor.layers import predict
from sparing.audits.backdoor.metrics import BackdoorRates, Rate, backdoor_rates, check_target
from sparing.audits.backdoor.neural_cleanse import NeuralCleanse
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.repair import AttentionDistillation, FinePruning
from sparing.audits.backdoor.stimulation import UnitStimulation
from sparing.audits.backdoor.strip import Strip
from sparing.audits.backdoor.transformations import InputTransforms
from sparing.audits.backdoor.triggers import PatchTrigger
from sparing.condensation.evaluation import train_on_condensed
from sparing.condensation.images import labelled_images
from sparing.core.errors import InvalidValue
from sparing.core.randomness import isolated_rng

Trigger = PatchTrigger | Callable[[Tensor], Tensor]


def every_defence() -> list[Defence]:
    """One of each, with its published settings."""
    return [
        NeuralCleanse(),
        UnitStimulation(),
        PatchScan(),
        FinePruning(),
        AttentionDistillation(),
        Strip(),
        InputTransforms(),
        PixelRange(),
        SpectralSignatures(),
        ActivationClustering(),
        ResidualMap(),
        OwnSetComparison(),
    ]


@dataclass(frozen=True)
class Victim:
    """One network's rates: on clean images always, with a trigger where one is known."""

    cta: Rate
    backdoor: BackdoorRates | None = None


def measure_victim(model: nn.Module, holdout: Images, stamp: Stamp | None) -> Victim:
    """Rates of a network on real images."""
    clean = predict(model, holdout.x)
    if stamp is None:
        return Victim(Rate(int((clean.argmax(dim=1) == holdout.y).sum()), len(holdout.y)))
    rates = backdoor_rates(clean, predict(model, stamp.apply(holdout.x)), holdout.y, stamp.target)
    return Victim(rates.cta, rates)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (divisor n - 1; None for a single one)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class AuditReport:
    """What an audit measured and found."""

    victims: tuple[Victim, ...]
    findings: tuple[Finding, ...]
    control: tuple[Victim, ...] = ()
    """Networks trained on a clean condensed set, shown the same trigger."""
    clamped: tuple[Victim, ...] = ()
    """The victims again, shown the trigger with every value moved into the range of pixels, where it leaves that."""
    target: int | None = None
    trigger: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the condensed set says of itself."""
    bytes: int | None = None
    """Of the condensed set."""
    seconds: float = 0.0
    """Of training the networks."""
    units: str = "images"
    """What was shown to them."""

    def rates(self, name: str, victims: Sequence[Victim] | None = None) -> list[float]:
        """ "cta", "asr", "asr_all" or "null" of each network, of those for which it is known."""
        shown = self.victims if victims is None else victims
        if name == "cta":
            return [one.cta.value for one in shown]
        return [getattr(one.backdoor, name).value for one in shown if one.backdoor is not None]

    @property
    def evidence(self) -> dict[str, tuple[int, ...]]:
        """Detectors that found something → the classes they point at."""
        return {one.defence: one.suspects for one in self.findings if one.verdict == "evidence"}

    @property
    def verdict(self) -> str:
        """In plain words; "no evidence" is never "safe"."""
        judged = [one.defence for one in self.findings if one.verdict in ("evidence", "no evidence")]
        silent = [one.defence for one in self.findings if one.verdict == "not applicable"]
        words = []
        if self.evidence:
            seen = "; ".join(
                f"{name} (class {', '.join(map(str, classes))})" if classes else name
                for name, classes in self.evidence.items()
            )
            words.append(f"Evidence of a backdoor: {seen}. False alarms happen; compare with clean sets of your own.")
        elif judged:
            words.append(f"No evidence of a backdoor was found by {', '.join(judged)}. That does not mean it is safe.")
        else:
            words.append("No detector could judge. That does not mean it is safe.")
        if silent:
            words.append(f"Not applicable: {', '.join(silent)}.")
        if asr := self.rates("asr"):
            mean, null = float(np.mean(asr)), float(np.mean(self.rates("null")))
            words.append(
                f"The given trigger leads {mean:.1%} of {self.units} of other classes to class {self.target}; "
                f"without it {null:.1%} go there."
            )
            if self.control:
                clean = float(np.mean(self.rates("asr", self.control)))
                words.append(f"On networks trained on the clean set it leads {clean:.1%} there.")
        if self.trigger.get("valid_pixels") is False:
            words.append("Its patch leaves the range of pixels: no 8-bit image can carry it.")
        if self.clamped:
            valid = float(np.mean(self.rates("asr", self.clamped)))
            words.append(f"Moved into that range it leads {valid:.1%} there.")
        if note := self.provenance.get("note"):
            words.append(f"Of the set: {note}.")
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Everything but pictures, as plain JSON."""

        def shown(victims: Sequence[Victim]) -> list[dict[str, Any]]:
            return [
                {
                    name: {"value": rate.value, "interval95": rate.interval, "n": rate.n}
                    for name, rate in ({"cta": one.cta} | (vars(one.backdoor) if one.backdoor else {})).items()
                }
                for one in victims
            ]

        names = ("cta", "asr", "asr_all", "null")
        summary = {
            group: {
                name: dict(zip(("mean", "std"), mean_and_deviation(values), strict=True))
                for name in names
                if (values := self.rates(name, victims))
            }
            for group, victims in (("victims", self.victims), ("control", self.control), ("clamped", self.clamped))
            if victims
        }
        return jsonable(
            {
                "verdict": self.verdict,
                "target": self.target,
                "trigger": self.trigger,
                "provenance": self.provenance,
                "summary": summary,
                "victims": shown(self.victims),
                "control": shown(self.control),
                "clamped": shown(self.clamped),
                "findings": [one.to_json() for one in self.findings],
                "bytes": self.bytes,
                "training_seconds": self.seconds,
            }
        )

    def to_markdown(self, title: str = "Backdoor audit") -> str:
        """Verdict, rates and findings as a page."""

        def cell(name: str, victims: Sequence[Victim]) -> str:
            values = self.rates(name, victims)
            if not values:
                return "n.a."
            mean, std = mean_and_deviation(values)
            return f"{mean:.1%}" + (f" ± {std:.1%}" if std is not None else "")

        lines = [f"# {title}", "", self.verdict, ""]
        names = {
            "cta": "clean accuracy",
            "asr": "attack success",
            "asr_all": "the same over all classes",
            "null": "target without trigger",
        }
        lines += ["| networks trained on | n | " + " | ".join(names.values()) + " |", "|---" * 6 + "|"]
        groups = {"the set": self.victims, "a clean set": self.control, "the set, valid pixels": self.clamped}
        for group, victims in groups.items():
            if victims:
                cells = [group, str(len(victims)), *(cell(name, victims) for name in names)]
                lines.append(f"| {' | '.join(cells)} |")
        if self.control:
            drop = float(np.mean(self.rates("cta", self.control)) - np.mean(self.rates("cta")))
            lines += ["", f"Clean accuracy lost against the clean set: {100 * drop:.1f} points."]
        lines += ["", "| defence | level | verdict | score | threshold | classes | seconds |", "|---" * 7 + "|"]
        for one in self.findings:
            figures = [f"{value:.3g}" if value is not None else "" for value in (one.score, one.threshold)]
            verdict = one.verdict + (f" ({one.remark})" if one.remark else "")
            classes = ", ".join(map(str, one.suspects))
            cells = [one.defence, one.level, verdict, *figures, classes, f"{one.seconds:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


class BackdoorAudit:
    """Measures how exposed a condensed set or a network is to a backdoor, and what the defences say.

    Args:
        defences: what to ask; None: :func:`every_defence`. They examine the first network.
        ask: how each is asked, for whoever keeps what they answer.
    """

    def __init__(
        self,
        defences: Sequence[Defence] | None = None,
        ask: Callable[[Defence, Subject], Finding] = lambda defence, subject: defence.examine(subject),
    ) -> None:
        self.defences, self.ask = every_defence() if defences is None else list(defences), ask

    def run(
        self,
        condensed: tuple[Tensor, Tensor] | None,
        model_factory: Callable[[], nn.Module] | None,
        clean_holdout: tuple[Tensor, Tensor],
        seeds: int | Sequence[int] = 5,
        *,
        pixels: PixelSpace,
        models: Sequence[nn.Module] = (),
        trigger: Trigger | None = None,
        target: int | None = None,
        control: tuple[Tensor, Tensor] | Sequence[nn.Module] | None = None,
        reference: tuple[Tensor, Tensor] | None = None,
        own: tuple[Tensor, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> AuditReport:
        """Train networks on the set, measure them on the hold-out, and ask every defence.

        Only the set, the factory and the hold-out are needed: without the attacker's trigger, input-level defences are
        tried with what Neural Cleanse reconstructs, and say "not applicable" when that is nothing.

        Args:
            condensed: (normalised images (n, C, H, W), labels (n,)); None to audit ``models``.
            model_factory: makes a fresh network; drawn anew for each seed.
            clean_holdout: real images that nothing was condensed from, likewise normalised.
            seeds: how many networks, or their seeds.
            pixels: the space in which all images are given.
            models: trained networks to audit instead of training some; not changed.
            trigger: the attacker's, where it is known, with its ``target``.
            target: class that the trigger leads to.
            control: a clean condensed set, or networks trained on one, to tell a backdoor from a patch that upsets any
                network.
            reference: real images of every class for the residual map; None: the hold-out.
            own: a set condensed by oneself, for the comparison with it.
            provenance: what the set says of itself, copied into the report.
            recipe: arguments of :func:`~sparing.condensation.evaluation.train_on_condensed`.

        Raises:
            InvalidValue: neither a set with a factory nor models; a trigger without a target, or one that is no class;
                hold-out images outside the range of pixels, or fewer than a defence needs (50 for STRIP); a class
                missing from a condensed set; images that do not fit together.
            TrainingDiverged: from training the networks.
        """
        holdout = Images(*labelled_images(*clean_holdout, every_class=False))
        pixels.check(holdout.x, "hold-out")
        for defence in self.defences:
            if len(holdout.y) < defence.fewest_images:
                raise InvalidValue(
                    f"{defence.name}: a hold-out of {len(holdout.y)} images; {defence.fewest_images} are needed"
                )
        if (trigger is None) != (target is None):
            raise InvalidValue("a trigger and its target class go together; give both or neither")
        given = {"condensed": condensed, "reference": reference, "own": own}
        controls = list[nn.Module]()
        if control is not None and all(isinstance(one, nn.Module) for one in control):
            controls = [one for one in control if isinstance(one, nn.Module)]
        else:
            given["control"] = cast(tuple[Tensor, Tensor] | None, control)
        sets = {name: Images(*labelled_images(*pair)) for name, pair in given.items() if pair is not None}
        for name, images in sets.items():
            own_shape, shape = tuple(images.x.shape[1:]), tuple(holdout.x.shape[1:])
            if own_shape != shape:
                raise InvalidValue(f"{name}: images of {own_shape}; those of the hold-out are {shape}")
        numbers = range(seeds) if isinstance(seeds, int) else seeds
        start = time.perf_counter()
        victims = list(models) or self._train(sets.get("condensed"), model_factory, numbers, recipe)
        classes = predict(victims[0], holdout.x[:1]).shape[1]
        if int(holdout.y.max()) >= classes:
            raise InvalidValue(f"hold-out: class {int(holdout.y.max())}; the networks know 0 to {classes - 1}")
        for name, images in sets.items():
            known = int(images.y.max()) + 1
            if known != classes:
                raise InvalidValue(f"{name}: {known} classes; the networks have {classes}, and all must be there")
        stamp = None
        if trigger is not None and target is not None:
            check_target(target, classes)
            stamp = Stamp(target, trigger.apply if isinstance(trigger, PatchTrigger) else trigger, "attacker")
        if "control" in sets:
            controls = self._train(sets["control"], model_factory, numbers, recipe)
        seconds = time.perf_counter() - start
        clamped = None
        if isinstance(trigger, PatchTrigger) and stamp and not trigger.describe()["valid_pixels"]:
            clamped = replace(stamp, apply=trigger.clamped().apply)
        subject = Subject(
            model=victims[0],
            holdout=holdout,
            pixels=pixels,
            classes=classes,
            condensed=sets.get("condensed"),
            reference=sets.get("reference"),
            own=sets.get("own"),
            stamps=(stamp,) if stamp else (),
        )
        return AuditReport(
            victims=tuple(measure_victim(model, holdout, stamp) for model in victims),
            findings=tuple(self.examine(subject)),
            control=tuple(measure_victim(model, holdout, stamp) for model in controls),
            clamped=tuple(measure_victim(model, holdout, clamped) for model in victims) if clamped else (),
            target=target,
            trigger=trigger.describe() if isinstance(trigger, PatchTrigger) else {},
            provenance=dict(provenance or {}),
            bytes=sum(part.nbytes for part in sets["condensed"]) if "condensed" in sets else None,
            seconds=seconds,
        )

    def examine(self, subject: Subject) -> list[Finding]:
        """What every defence says, in the order in which they were given.

        Where the attacker's trigger is not known, those that reconstruct one are asked first, for the others' sake.
        """
        found = {i: self.ask(one, subject) for i, one in enumerate(self.defences) if one.reconstructs}
        if not subject.stamps:
            subject = replace(subject, stamps=tuple(stamp for one in found.values() for stamp in one.stamps))
        found |= {i: self.ask(one, subject) for i, one in enumerate(self.defences) if not one.reconstructs}
        return [found[i] for i in range(len(self.defences))]

    @staticmethod
    def _train(
        images: Images | None,
        factory: Callable[[], nn.Module] | None,
        seeds: Sequence[int],
        recipe: Mapping[str, Any] | None,
    ) -> list[nn.Module]:
        if images is None or factory is None or not len(seeds):
            raise InvalidValue("networks are trained on a condensed set by a factory, at least one; or give models")
        trained = []
        for seed in seeds:
            with isolated_rng("evaluating condensed images", seed):
                network = factory().to(images.x.device)
                trained.append(train_on_condensed(network, images.x, images.y, seed=seed, **(recipe or {})))
        return trained
