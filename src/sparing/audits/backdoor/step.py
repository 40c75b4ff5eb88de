"""The step ``audit_backdoor``: how exposed is a job's training set or network to a backdoor, and what notices?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Subset

from sparing.audits.backdoor.attack import CondensationBackdoor
from sparing.audits.backdoor.audit import AuditReport, BackdoorAudit, every_defence, mean_and_deviation
from sparing.audits.backdoor.finding import Defence, Finding, Images, Subject
from sparing.audits.backdoor.graph_simulation import CONDENSED, GraphSimulation, timed
from sparing.audits.backdoor.metrics import Rate, check_target
from sparing.audits.backdoor.neural_cleanse import Reversed, stamp_of
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.subgraphs import OptimisedSubgraph, SubgraphTrigger
from sparing.audits.backdoor.triggers import OptimisedTrigger, PatchTrigger
from sparing.condensation.callbacks import is_marked
from sparing.condensation.evaluation import train_on_condensed
from sparing.condensation.images import labelled_images
from sparing.condensation.kinds import CORE_SETS, ImageKind, RealImages, check_answer, kind_of
from sparing.condensation.step import Condense
from sparing.core.devices import check_device, device_named
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, did_you_mean
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.core.statistics import t_interval
from sparing.core.step import Stage, Step, step
from sparing.core.store import JSON, TENSORS, All

if TYPE_CHECKING:
    from sparing.condensation.unrolled import LearnedSteps
    from sparing.core.job import Job
    from sparing.core.task import Task

GRAPHS = frozenset({"graph_classification", "node_classification"})
REFERENCE_IMAGES = 6000
"""Real training images that a condensed set is held against, at most."""
SHOWN_SIDE = 224
"""Small pictures are enlarged to about so many pixels for the report."""
FINDING: All[Any] = All({"finding": JSON, "pictures": TENSORS, "stamps": TENSORS})
SAID_POISONED = {"poisoned": True, "note": "it says of itself that a backdoor was planted in it"}


class Condensed(NamedTuple):
    """A set that the audit has condensed itself."""

    images: Images
    """In the task's space."""
    steps: LearnedSteps | None
    """Of distilled images: how a network learns from them."""
    factory: Callable[[], nn.Module]
    """Makes the network that it was condensed with."""
    provenance: Mapping[str, Any]
    pictures: Sequence[tuple[str, np.ndarray, str]]


def pixels_of(task: Task, channels: int) -> PixelSpace:
    """The space of a task's images: that of the last ``Normalise`` of its preprocessing, else [0, 1] itself."""
    from sparing.data.preprocessing import Normalise

    operations = task.preprocessing.operations if task.preprocessing is not None else ()
    found = [operation for operation in operations if isinstance(operation, Normalise)]
    return PixelSpace(found[-1].mean, found[-1].std) if found else PixelSpace((0.0,) * channels, (1.0,) * channels)


def some_images(dataset: Any, count: int, *seed: int | str) -> Images:
    """Up to ``count`` images of a data set at random, in their order."""

    generator = torch.Generator().manual_seed(derive_seed(*seed))
    places = torch.randperm(len(dataset), generator=generator)[:count].sort().values
    return Images(*labelled_images(Subset(dataset, places.tolist()), every_class=False))


def begun_anew(model: nn.Module) -> nn.Module:
    """A network like this one with fresh weights, from torch's global generator.

    Raises :class:`InvalidValue` for a network that cannot be made again: one built by hand, with weights that no layer
    of torch's resets.
    """
    import copy

    from sparing.core.predictor import build_model, spec_of

    spec = spec_of(model)
    if spec is not None:
        return build_model(spec)
    made = copy.deepcopy(model)
    for name, module in made.named_modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise InvalidValue(
                f"{name or type(model).__name__} has weights and no reset_parameters, so that the network cannot begin "
                "anew; name one in the step's field 'model'"
            )
    return made


def packed(finding: Finding) -> dict[str, Any]:
    """A finding as the store keeps it."""
    stamps = dict[str, Tensor]()
    for number, stamp in enumerate(finding.stamps):
        if stamp.parts is None:
            raise InvalidValue(f"{finding.defence}: a trigger without mask and pattern cannot be kept")
        found = {"target": torch.tensor(stamp.target), "mask": stamp.parts[0], "pattern": stamp.parts[1]}
        stamps |= {f"{number}.{name}": part.cpu().contiguous() for name, part in found.items()}
    pictures = {name: picture.detach().cpu().contiguous() for name, picture in finding.pictures.items()}
    return {"finding": replace(finding, seconds=0.0).to_json(), "pictures": pictures, "stamps": stamps}


def unpacked(kept: dict[str, Any], pixels: PixelSpace) -> Finding:
    """The finding that :func:`packed` was given."""
    fields, stamps = dict(kept["finding"]), kept["stamps"]
    numbers = sorted({int(name.partition(".")[0]) for name in stamps})
    made = [
        Reversed(int(stamps[f"{n}.target"]), stamps[f"{n}.mask"], stamps[f"{n}.pattern"], 0.0, 0.0) for n in numbers
    ]
    return Finding(
        **fields | {"suspects": tuple(fields["suspects"])},
        stamps=tuple(stamp_of(one, pixels, fields["defence"]) for one in made),
        pictures=kept["pictures"],
    )


def picture(values: Tensor) -> np.ndarray:
    """(C, H, W) of 0 to 1 → uint8 (H', W'), of three channels (H', W', 3), enlarged by whole steps."""
    shown = values if values.shape[0] in (1, 3) else values.mean(dim=0, keepdim=True)
    array = (shown * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    factor = max(1, SHOWN_SIDE // max(array.shape[:2]))
    array = array.repeat(factor, axis=0).repeat(factor, axis=1)
    return array[:, :, 0] if array.shape[2] == 1 else array


@step("audit_backdoor")
class AuditBackdoor(Step):
    """Look for a backdoor in the training set or the network, and measure which defences would notice one.

    What is examined is the job's condensed set, and its network if it is trained, else networks trained on the set. The
    attack need not be known. With ``simulate`` a set is condensed anew by the step ``condense`` while a backdoor is
    planted in it, and examined likewise: how exposed is this pipeline? Model and data of the job go on unchanged.
    With an output folder the full report is written there, ``audit.json`` and ``audit.md`` in a folder of the step's
    id.
    """

    stage: ClassVar[Stage] = Stage.AUDIT
    needs: ClassVar[frozenset[str]] = frozenset({"classification", "module"})
    source: ClassVar[str] = "Liu et al. 2023, Backdoor Attacks Against Dataset Distillation, NDSS, arXiv:2301.01197"

    defences: Literal["all"] | tuple[str, ...] = "all"
    """Names of the defences to ask; "all": each, and those that cannot judge this network say so."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Thresholds and other settings of defences: {name: {argument: value}}."""
    holdout: int = Field(default=500, ge=2)
    """Clean images of the test split that rates are measured on and defences work with, at most."""
    victims: int = Field(default=5, ge=1)
    """Networks trained on a condensed set, each from weights of its own."""
    model: Any = None
    """What they are: a registered model's name, or {name: …, field: value}. None: the job's model, begun anew."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes of their training. None: 300, by the papers' recipe."""
    condense: Condense | None = None
    """How you would condense: for the set to compare the given one with, and for ``simulate``."""
    simulate: Literal["naive", "doorping"] | None = None
    """The attack: "naive", a white patch, or "doorping", a patch that follows the networks it is condensed with."""
    target: int = Field(default=0, ge=0)
    """Class that the trigger is to lead to."""
    portion: float = Field(default=0.01, gt=0, lt=1)
    """Share of the training images that carry the trigger and the target's label."""
    size: int = Field(default=2, ge=1)
    """Side of the patch in pixels."""
    position: Literal["top_left", "top_right", "bottom_left", "bottom_right"] | tuple[int, int] = "bottom_right"
    """Its corner, or row and column of its upper left pixel."""
    margin: int = Field(default=1, ge=0)
    """Pixels between a corner's patch and the border."""
    clip: Literal["valid"] | None = "valid"
    """Keep an optimised patch inside the range of pixels; None: as the paper's code, which lets it leave that."""
    layer: int = -2
    """The linear layer whose units an optimised patch drives, counted among layers with weights."""
    topk: int = Field(default=1, ge=1)
    """How many of its units."""
    alpha: float = Field(default=10.0, gt=0)
    """Times their activation is the goal."""
    max_steps: int = Field(default=1000, ge=1)
    """Of Adam in one update of the patch."""
    device: str = "auto"
    """Where networks are trained and examined, as torch names it; "auto": a GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self._defences()
        for defence in asked:
            if self.holdout < defence.fewest_images:
                raise InvalidValue(
                    f"holdout = {self.holdout}: {defence.name} needs {defence.fewest_images} images or more"
                )
        if self.simulate is not None and self.condense is None:
            raise InvalidValue(
                f"simulate = {self.simulate!r} needs the field 'condense': the step that a backdoor is to be planted in"
            )
        if self.condense is not None and (self.condense.saved is not None or self.condense.method in CORE_SETS):
            raise InvalidValue(
                f"condense = {self.condense}: a method that learns synthetic images is expected, not a saved set, nor "
                f"{', '.join(CORE_SETS)}"
            )
        check_device(self.device)
        if self.model is not None:
            self._named()

    def _defences(self) -> list[Defence]:
        known = {type(defence).name: type(defence) for defence in every_defence()}
        names = tuple(known) if self.defences == "all" else self.defences
        for field, given in (("defences", names), ("settings", tuple(self.settings))):
            for name in given:
                if name not in known:
                    raise InvalidValue(
                        f"{field} = {name!r} is no defence.{did_you_mean(name, known)} There are {', '.join(known)}"
                    )
        if not names or len(set(names)) != len(names):
            raise InvalidValue(f"defences = {list(names)}: different names, at least one, or 'all' are expected")
        if unused := set(self.settings) - set(names):
            raise InvalidValue(f"settings = {sorted(unused)}: not among the defences that are asked")
        made = []
        for name in names:
            try:
                made.append(known[name](**self.settings.get(name, {})))
            except TypeError as error:
                raise InvalidValue(f"settings = {{{name!r}: {self.settings[name]}}}: {error}") from error
        return made

    def _named(self) -> tuple[str, dict[str, Any]]:
        """(name, fields) of the victims' network."""
        from sparing.core.predictor import named_model

        return named_model(self.model, f"{self.id}: model")

    def check(self, task: Task) -> None:
        """The task is one of images, or of graphs of which an attack is simulated; target, patch and victims fit it."""
        from sparing.core.predictor import build_model, outline

        graphs = GRAPHS & task.capabilities
        if "images" not in task.capabilities and not (graphs and self.simulate is not None):
            raise IncompatibleStep(
                f"{self.id!r} audits images; {task.name!r} has the capabilities {', '.join(sorted(task.capabilities))}"
                + ("; of graphs an attack can be simulated" if graphs else "")
            )
        if self.simulate is not None:
            check_target(self.target, len(task.labels))
            if "images" in task.capabilities:
                self._trigger(task, 0, self._pixels(task))
        if self.model is not None:
            name, fields = self._named()
            outline(lambda: build_model(name, task, **fields))

    def apply(self, job: Job) -> Job:
        """The job as it is; what was found is in its row."""
        self.check(job.task)
        given = job.capabilities & {"condensed", "trained"}
        if not given and self.simulate is None:
            raise NoEffect(
                f"{self.id!r}: there is nothing to audit: the training set is not condensed, the model is not trained, "
                "and no attack is simulated"
            )
        reports: dict[str, AuditReport] = {}
        if "images" not in job.capabilities:
            return self._told(job, {"attack": self._attacked_graphs(job)})
        own = self._condensed(job, "clean") if self.condense is not None else None
        if given:
            reports["audit"] = self._examined(job, own)
        if self.simulate is not None:
            assert own is not None
            reports["attack"] = self._attacked(job, own)
        return self._told(job, reports)

    def _told(self, job: Job, reports: Mapping[str, AuditReport]) -> Job:
        """The job with its row and the folder of the full report."""
        self._tell(job, reports)

        def write(folder: Path) -> None:
            from sparing.core.files import folder_atomic, write_atomic, write_json

            titles = {"audit": "Audit of what the job has", "attack": "A simulated attack"}
            pages = [report.to_markdown(titles[what]) for what, report in reports.items()]
            with folder_atomic(folder) as scratch:
                write_json(scratch / "audit.json", {what: report.to_json() for what, report in reports.items()})
                write_atomic(scratch / "audit.md", "\n".join(pages).encode())

        return job.replace(folders={**job.folders, self.id: write})

    # ------------------------------------------------------------------------------------------------- what is audited

    def _examined(self, job: Job, own: Condensed | None) -> AuditReport:
        """What the defences say of the job's set and network."""
        condensed, seconds = self._given(job), 0.0
        if "trained" in job.capabilities:
            models = [job.fresh_model().to(self._device).eval()]
        else:
            assert condensed is not None
            models, seconds = self._victims(job, "given", condensed)
        report = self._audit(job, "given").run(
            condensed,
            None,
            self._holdout(job),
            pixels=self._pixels(job.task),
            models=models,
            reference=self._reference(job) if condensed is not None else None,
            own=own.images if own is not None and condensed is not None else None,
            provenance=SAID_POISONED if is_marked(job.train) else None,
        )
        return replace(report, seconds=seconds)

    def _given(self, job: Job) -> Images | None:
        """The job's condensed set."""
        return self._placed(labelled_images(job.train)) if "condensed" in job.capabilities else None

    def _attacked(self, job: Job, clean: Condensed) -> AuditReport:
        """How well a backdoor in a set of one's own would work, and what the defences would say."""
        bad = self._condensed(job, "attacked")
        for title, pixels, caption in bad.pictures:
            job.illustrate(f"{title}, simulated attack", pixels, caption)
        trigger = PatchTrigger.described(bad.images.x.shape[1:], self._pixels(job.task), bad.provenance["trigger"])
        job.illustrate(
            "trigger, simulated attack",
            picture(trigger.pixels.to_unit(trigger.clamped().image)),
            "the trigger that was planted, on black; values that are no pixels are drawn as the nearest that are",
        )
        victims, seconds = self._victims(job, "attacked", bad.images, bad)
        controls, more = self._victims(job, "clean", clean.images, clean)
        report = self._audit(job, "attacked").run(
            bad.images,
            None,
            self._holdout(job),
            pixels=self._pixels(job.task),
            models=victims,
            control=controls,
            trigger=trigger,
            target=self.target,
            reference=self._reference(job),
            own=self._given(job),
            provenance=bad.provenance,
        )
        return replace(report, seconds=seconds + more)

    def _attacked_graphs(self, job: Job) -> AuditReport:
        """As :meth:`_attacked`, on graphs: a subgraph for a patch, and no defences."""
        assert self.condense is not None
        mode: Literal["static", "doorping"] = "static" if self.simulate == "naive" else "doorping"
        seed = derive_seed("audit", job.seed) % 2**31

        def attack(features: Tensor) -> CondensationBackdoor:
            if mode == "static":
                return CondensationBackdoor(SubgraphTrigger(features), self.target, self.portion, mode, seed)
            fitted = {name: getattr(self, name) for name in ("topk", "alpha", "max_steps")}
            trigger = OptimisedSubgraph(features, seed=seed, **fitted)
            return CondensationBackdoor(trigger, self.target, self.portion, mode, seed)

        return GraphSimulation(
            job, self.condense, attack, partial(self._fresh, job), self.victims, self.epochs
        ).report()

    def _fresh(self, job: Job, seed: int) -> nn.Module:
        """A victim before its training."""
        from sparing.core.predictor import build_model

        with isolated_rng("evaluating condensed images", seed):
            if self.model is None:
                return begun_anew(job.fresh_model())
            name, fields = self._named()
            network = build_model(name, job.task, **fields)
        check_answer(network, job.task, "model")
        return network

    def _condensed(self, job: Job, where: Literal["clean", "attacked"]) -> Condensed:
        """A set condensed from the task's own training images, while it is attacked or not, with one seed for both."""
        condense = self.condense
        assert condense is not None
        seed = derive_seed("audit", job.seed) % 2**31  # not the job's own: a set of one's own is another set
        child = job.fork(where, train=job.task.splits(job.root).train, seed=seed)
        kind = kind_of(condense, job.task)
        assert isinstance(kind, ImageKind)
        real = kind.read(child)
        kind.check_size(real)
        factory = kind.network(real.data.shape[1:])

        def made() -> dict[str, Any]:
            said: dict[str, Any] = {}
            if where == "attacked":
                attack = CondensationBackdoor(
                    self._trigger(job.task, seed, self._learned_in(job.task, real)),
                    self.target,
                    self.portion,
                    "static" if self.simulate == "naive" else "doorping",
                    seed,
                )
                kind.callbacks = (attack,)
            found = kind.make(child, real, device_named(condense.device)).stored()
            if where == "attacked":
                said = dict(attack.provenance)
            return {**found, "said": said}

        kept = child.store.once("condensed", made, CONDENSED)
        found = kind.restored(kept)
        return Condensed(
            self._placed(found.data.tensors),
            found.steps,
            factory,
            {**found.record, **kept["said"]},
            kind.pictures(child, found, real),
        )

    def _learned_in(self, task: Task, real: RealImages) -> PixelSpace:
        """The space in which images are condensed: DD in the task's, the others in one of mean 0 and deviation 1."""
        pixels = self._pixels(task)
        assert self.condense is not None
        if self.condense.method == "dd":
            return pixels
        shift, scale = real.mean.flatten().tolist(), real.std.flatten().tolist()
        return PixelSpace(
            tuple(mean + std * m for mean, std, m in zip(pixels.mean, pixels.std, shift, strict=True)),
            tuple(std * s for std, s in zip(pixels.std, scale, strict=True)),
        )

    def _audit(self, job: Job, where: str) -> BackdoorAudit:
        pixels, store = self._pixels(job.task), job.store

        def ask(defence: Defence, subject: Subject) -> Finding:
            name = f"{where}-{defence.name}"

            def judged() -> dict[str, Any]:
                try:
                    return packed(defence.examine(replace(subject, keeper=store.progress(name))))
                except InvalidValue as error:  # e.g. a network without convolutions
                    if self.defences != "all":
                        raise
                    return packed(defence.not_applicable(str(error)))

            kept, took = timed(store, name, judged, FINDING)
            return replace(unpacked(kept, pixels), seconds=took)

        return BackdoorAudit(self._defences(), ask)

    def _victims(
        self, job: Job, where: str, images: Images, made: Condensed | None = None
    ) -> tuple[list[nn.Module], float]:
        """Networks trained on a set, on distilled images by the steps that were learned with them; and the seconds."""
        from sparing.core.training.step import load_weights

        def fresh(seed: int) -> nn.Module:
            return made.factory() if made is not None and made.steps is not None else self._fresh(job, seed)

        def trained(seed: int) -> dict[str, Tensor]:
            network = fresh(seed)
            if made is not None and made.steps is not None:
                made.steps.train(network, images.x.cpu(), images.y.cpu())
            else:
                train_on_condensed(network.to(self._device), images.x, images.y, epochs=self.epochs, seed=seed)
            return dict(network.state_dict())

        networks, seconds = list[nn.Module](), 0.0
        known = made is not None and made.steps is not None and made.steps.initial_weights is not None
        for number in range(1 if known else self.victims):  # known weights end at the same ones every time
            seed = derive_seed("victim", job.seed, number)
            weights, took = timed(job.store, f"victim-{where}-{number}", partial(trained, seed), TENSORS)
            network = fresh(seed)
            load_weights(network, weights)
            networks.append(network.to(self._device).eval())
            seconds += took
        return networks, seconds

    # --------------------------------------------------------------------------------------------------- what with

    @property
    def _device(self) -> torch.device:
        return device_named(self.device)

    def _placed(self, images: Sequence[Tensor]) -> Images:
        return Images(*(part.to(self._device) for part in images))

    def _holdout(self, job: Job) -> Images:
        return self._placed(some_images(job.task.splits(job.root).test, self.holdout, "audit", "hold-out"))

    def _reference(self, job: Job) -> Images:
        """Real images as they were before anything was condensed."""
        return self._placed(some_images(job.task.splits(job.root).train, REFERENCE_IMAGES, "audit", "reference"))

    @staticmethod
    def _pixels(task: Task) -> PixelSpace:
        return pixels_of(task, int(task.example_input(1)[0].shape[1]))

    def _trigger(self, task: Task, seed: int, pixels: PixelSpace) -> PatchTrigger:
        """The patch as the attack begins with it."""
        place: dict[str, Any] = {"size": self.size, "position": self.position, "margin": self.margin}
        shape = tuple(task.example_input(1)[0].shape[1:])
        if self.simulate == "naive":
            return PatchTrigger(shape, pixels, **place)
        fitted = {name: getattr(self, name) for name in ("layer", "topk", "alpha", "max_steps", "clip")}
        return OptimisedTrigger(shape, pixels, **place, seed=seed, **fitted)

    # ---------------------------------------------------------------------------------------------------------- report

    def _tell(self, job: Job, reports: Mapping[str, AuditReport]) -> None:
        """Figures, candidates, remarks and pictures of the row."""
        names = {"audit": "", "attack": ", simulated attack"}
        for what, report in reports.items():
            where = names[what]
            cta = report.rates("cta")
            self._record(job, f"clean accuracy{where}", cta, "higher", report.victims[0].cta)
            if report.findings:
                job.record(f"detectors with evidence{where}", len(report.evidence), "", better="")
            job.notes.remarks.append(report.verdict)
            for one in report.findings:
                job.notes.candidates.append(
                    {
                        "name": f"{one.defence}{where}",
                        "level": one.level,
                        "verdict": one.verdict,
                        "score": one.score,
                        "threshold": one.threshold,
                        "classes": ", ".join(map(str, one.suspects)),
                        "remark": one.remark,
                    }
                )
                for name, values in one.pictures.items():
                    caption = f"What {one.defence} found for {name}{where}"
                    job.illustrate(f"{one.defence}, {name}{where}", picture(values), caption)
        if "attack" in reports:
            self._tell_attack(job, reports["attack"])
        job.notes.outcome = "; ".join(
            f"{what}: evidence by {', '.join(report.evidence)}"
            if report.evidence
            else f"{what}: {'no evidence found' if report.findings else 'no defence asked'}"
            for what, report in reports.items()
        )

    @staticmethod
    def _record(job: Job, name: str, rates: Sequence[float], better: Any, first: Rate | None = None) -> None:
        """The mean over networks: with Student's interval, of a single one with Wilson's."""
        mean, _ = mean_and_deviation(rates)
        interval = t_interval(rates) if len(rates) > 1 else first.interval if first is not None else None
        job.record(name, mean, "", better=better, interval=interval)

    def _tell_attack(self, job: Job, report: AuditReport) -> None:
        first = report.victims[0].backdoor
        assert first is not None
        described = report.provenance["trigger"]
        self._record(job, "attack success", report.rates("asr"), "lower", first.asr)
        self._record(job, "attack success, all images", report.rates("asr_all"), "lower", first.asr_all)
        self._record(job, "target without trigger", report.rates("null"), "lower", first.null)
        self._record(job, "attack success on clean set", report.rates("asr", report.control), "lower")
        if report.clamped:
            self._record(job, "attack success, valid pixels", report.rates("asr", report.clamped), "lower")
        lost = np.mean(report.rates("cta", report.control)) - np.mean(report.rates("cta"))
        job.record("accuracy lost to the attack", float(lost), "", "derived")
        job.record("poisoned share of the class", report.provenance["effective_share"], "", better="")
        if self.simulate == "doorping":
            job.record("updates of the trigger", described["updates"], "", better="")
            job.record("updates that moved it", described["moved"], "", better="")
        value = "pixel" if described["kind"] == "patch" else "feature"
        job.record(f"lowest {value} of the trigger", described["lowest"], "", better="")
        job.record(f"highest {value} of the trigger", described["highest"], "", better="")
        job.record("training of the victims", report.seconds, "s")
