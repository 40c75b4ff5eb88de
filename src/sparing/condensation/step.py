"""The step ``condense``: a few samples in place of many, synthetic ones or chosen ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.core import registry
from sparing.core.devices import check_device, device_named
from sparing.core.errors import IncompatibleStep, InvalidValue, SparingError
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from torch import nn

    from sparing.condensation.kinds import DataKind, Made
    from sparing.core.job import Job
    from sparing.core.task import Task

Method = Literal["random", "herding", "k_center", "dc", "dsa", "dm", "dd", "one_step", "multi_step"]
CURVE_POINTS = 200
"""Most points of a curve in the ledger."""
WITH_SAVED = frozenset({"id", "saved", "network"})
"""Fields that say something about a set that is there already."""


@step("condense")
class Condense(Step):
    """Replace the training data by a few samples: synthetic ones that teach nearly as much, or a chosen core set.

    For images there are ``dm``, ``dc``, ``dsa`` and ``dd``, for sets of graphs and for the nodes of one graph
    ``one_step`` and ``multi_step``; and for all of them ``random``, ``herding`` and ``k_center``, which choose real
    samples. Validation and calibration data stay as they are. With an output folder the set is written there, in a
    folder of the step's id, from where ``saved`` reads it in another run.
    """

    stage: ClassVar[Stage] = Stage.DATA
    needs: ClassVar[frozenset[str]] = frozenset({"classification"})
    source: ClassVar[str] = (
        "Jin et al. 2022, Condensing Graphs via One-Step Gradient Matching, KDD, arXiv:2206.07746, algorithm 1; GCond "
        "arXiv:2110.07580; DC arXiv:2006.05929; DSA arXiv:2102.08259; DM arXiv:2110.04181; DD arXiv:1811.10959"
    )

    method: Method | None = None
    """How. None: ``dm`` for images, ``one_step`` for graphs and nodes. ``multi_step`` is GCond for nodes, DCG for
    sets of graphs."""
    per_class: int | None = Field(default=None, ge=1)
    """Samples of each class; with ``dd``, in each of its steps. None, and no ``rate``: 10, for nodes half of them."""
    rate: float | None = Field(default=None, gt=0, le=1)
    """Share of the training samples instead; the rarest class has at least one."""
    saved: Path | None = None
    """A folder that ``save_condensed`` wrote, one's own or somebody else's, whose set is taken as it is."""
    network: str | dict[str, Any] | None = None
    """What the samples are matched with or compared by: a registered model's name, or {name: …, field: value}; for
    nodes ``gcn`` or ``sgc``, with hidden. None: the papers'."""
    iterations: int | None = Field(default=None, ge=1)
    """Updates of the synthetic data, each of a fresh network's. None: 1000, for ``dm`` 20 000. ``dd`` counts epochs."""
    outer_steps: int | None = Field(default=None, ge=1)
    """Updates with each network."""
    inner_steps: int | None = Field(default=None, ge=0)
    """Epochs that the network is trained for between two of them."""
    batch_real: int | None = Field(default=None, ge=1)
    """Real samples of a class in a batch; of all classes for ``dd``. None: 256, and 1024 for ``dd``."""
    lr_img: float | None = Field(default=None, gt=0)
    """Learning rate of synthetic images."""
    lr_net: float | None = Field(default=None, gt=0)
    """Learning rate of the network that is trained on them; with ``dd`` that of its steps, to begin with."""
    lr_adj: float | None = Field(default=None, gt=0)
    """Learning rate of synthetic edges."""
    lr_feat: float | None = Field(default=None, gt=0)
    """Learning rate of synthetic nodes' features."""
    edge_threshold: float | None = Field(default=None, ge=0, lt=1)
    """Edges of synthetic nodes with a smaller weight are cut. None: the best of 0.01, 0.1 and 0.5 for a network that is
    tried on the validation nodes."""
    embed_epochs: int | None = Field(default=None, ge=1)
    """Passes over all training data for the network that ``herding`` and ``k_center`` compare samples by. None: as a
    network is trained on condensed data, 300 for images, 500 for sets of graphs, 600 for nodes."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Further arguments by name of what condenses: ``ImageCondenser``, ``UnrolledCondenser`` for ``dd``,
    ``GraphSetCondenser`` or ``NodeCondenser``."""
    device: str = "auto"
    """Where it is done, as torch names it; "auto": a GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_class is not None and self.rate is not None:
            raise InvalidValue(
                f"{self.id}: per_class = {self.per_class} and rate = {self.rate}; one of them is expected"
            )
        if self.id == "model":
            raise InvalidValue("id = 'model': the saved model's folder has this name; the set needs another")
        if self.network is not None:
            self.named_network()
        if self.saved is not None:
            for item in fields(self):
                value = getattr(self, item.name)
                if item.name not in WITH_SAVED and value not in (None, {}, "auto"):
                    raise InvalidValue(
                        f"{self.id}: saved = {self.saved} is a finished set, and {item.name} = {value!r} makes one"
                    )
            if self.network is not None and self.saved_description.get("sets") is None:
                raise InvalidValue(
                    f"{self.id}: network = {self.network!r}: saved = {self.saved} are no distilled images, which alone "
                    "need one"
                )
        check_device(self.device)

    @cached_property
    def saved_description(self) -> Mapping[str, Any]:
        """What is said about the saved set; empty without one."""
        from sparing.condensation.saved import describe_condensed

        if self.saved is None:
            return {}
        try:
            return describe_condensed(self.saved)
        except SparingError as error:
            raise InvalidValue(f"saved = {self.saved}: no condensed set that can be read: {error}") from error

    @property
    def gives(self) -> frozenset[str]:  # type: ignore[override]  # dd gives more
        """ "condensed"; with ``dd`` also "trained": its images come with the steps that train a network."""
        distilled = self.method == "dd" or self.saved_description.get("sets") is not None
        return frozenset({"condensed", "trained"} if distilled else {"condensed"})

    def named_network(self) -> tuple[str, dict[str, Any]]:
        """(name, fields) of ``network``."""
        from sparing.core.predictor import named_model

        assert self.network is not None
        return named_model(self.network, f"{self.id}: network", also=("sgc",))

    def check(self, task: Task) -> None:
        """The method is one for the task's data, and everything given is of use to it."""
        from sparing.condensation.kinds import kind_of

        super().check(task)
        kind_of(self, task).check()

    def apply(self, job: Job) -> Job:
        """The job with the condensed training data; with ``dd`` also with the network that they train."""
        from sparing.condensation.kinds import kind_of
        from sparing.condensation.saved import load_condensed, save_condensed
        from sparing.core.store import JSON, TENSORS, All

        kind = kind_of(self, job.task)
        kind.check()
        real = kind.read(job)
        if self.saved is not None:
            found = load_condensed(self.saved)
            made, provenance = kind.check_saved(found, real), dict(found.provenance)
        else:
            kind.check_size(real)
            codec: All[Any] = All({"tensors": TENSORS, "record": JSON})
            stored: dict[str, Any] = job.store.once(
                "condensed", lambda: kind.make(job, real, device_named(self.device)).stored(), codec
            )
            made = kind.restored(stored)
            made = kind.finished(job, made, real)
            cost = {"wall_s": job.store.cost.wall_s, "cpu_s": job.store.cost.cpu_s}
            provenance = {
                "from": {"task": job.task.name, "data": job.data_key, "samples": len(real.labels)},
                "seed": job.seed,
                **made.record,
                "cost": {**cost, **{name: made.record[name] for name in ("bytes_before", "bytes_after")}},
            }
        self._report(job, kind, made, len(real.labels), real.bytes)
        for title, pixels, caption in kind.pictures(job, made, real):
            job.illustrate(title, pixels, caption)
        kept = job.replace(
            train=kind.training_set(job, made),
            folders={**job.folders, self.id: lambda folder: save_condensed(folder, made.data, provenance, made.steps)},
        )
        return self._with_network(kept, made, provenance) if made.steps is not None else kept

    def _report(self, job: Job, kind: DataKind[Any], made: Made, samples: int, size: int) -> None:
        """What the ledger is told."""
        job.record("samples before", samples, "", better="")
        job.record("samples", len(made.labels), "", better="lower")
        job.record("data bytes before", size, "B", better="")
        job.record("data bytes", made.record["bytes_after"], "B", better="lower")
        curve = made.record.get("loss_curve", [])
        if curve:
            job.record("first matching loss", curve[0], "", better="")
            job.record("last matching loss", curve[-1], "", better="")
            step = -(-len(curve) // CURVE_POINTS)
            job.notes.curves["matching loss"] = [(float(i), curve[i]) for i in range(0, len(curve), step)]
        job.notes.outcome = f"read from {self.saved}" if self.saved is not None else kind.method
        if "trained" in job.capabilities and made.steps is None:
            job.notes.remarks.append(
                "the model has been trained already: a training on the condensed data goes on from there; distil with "
                "weight = 0 and a model begins with a fresh one"
            )

    def _with_network(self, job: Job, made: Made, provenance: Mapping[str, Any]) -> Job:
        """The job with the network that distilled images train by the steps they were learned for."""
        from sparing.core.predictor import ModulePredictor, build_model
        from sparing.core.store import TENSORS

        steps = made.steps
        assert steps is not None
        name, own = self._network_of(job, made, provenance)

        def build() -> nn.Module:
            from sparing.core.randomness import isolated_rng

            with isolated_rng("distilled network", job.seed):
                return build_model(name, job.task, **own)

        model = build()
        weights = job.store.once(
            "network", lambda: dict(steps.train(build(), *made.data.tensors).state_dict()), TENSORS
        )
        model.load_state_dict(weights)
        job.notes.remarks.append(
            f"the model is now the {name} that the images train in {len(steps.learning_rates)} steps, from "
            f"{'the weights' if steps.initial_weights is not None else 'any weights'} and by the rates that were "
            "learned with them; a training by other steps learns less from these images"
        )
        return job.replace(model=model, predictor=ModulePredictor(model, job.task))

    def _network_of(self, job: Job, made: Made, provenance: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """(name, fields) of the network of distilled images, which somebody else's folder may name wrongly."""
        from sparing.core.predictor import build_model, outline

        assert made.steps is not None
        if self.network is not None:
            return self.named_network()
        told = provenance.get("settings", {})
        own = dict(told.get("network") or {}) if isinstance(told, Mapping) else {}
        name = own.pop("name", None)
        if name not in registry.parts("models") or (self.saved is not None and made.steps.initial_weights is None):
            raise IncompatibleStep(
                f"{self.id!r}: saved = {self.saved} does not say which registered model its images train; give network"
            )
        shapes = {
            key: parameter.shape for key, parameter in outline(lambda: build_model(name, **own)).named_parameters()
        }
        initial = made.steps.initial_weights
        if initial is not None and shapes != {key: weight.shape for key, weight in initial.items()}:
            raise IncompatibleStep(f"{self.id!r}: saved = {self.saved}: its weights are not those of its {name}")
        return name, own
