"""The step of LegoDNN: a trained network cut into blocks, each in several sizes, of which one selection serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.adaptive.scaling import (
    SPARSITIES,
    InfeasibleError,
    Profile,
    ScalingOptimizer,
    Selection,
    check_sparsities,
)
from sparing.core.devices import check_device, device_named
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, NoEffect
from sparing.core.step import Stage, Step, step
from sparing.core.store import ARRAYS, JSON, PREDICTOR, TENSORS, All

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sparing.adaptive.descendants import BlockZoo
    from sparing.adaptive.lego_predictor import LegoPredictor
    from sparing.core.job import Job
    from sparing.core.task import Task


@step("block_scaling")
class BlockScaling(Step):
    """Cut the network into blocks of several sizes each, of which the most accurate within given limits serve.

    Every smaller size of a block learns alone, from what the trained network feeds and answers there; labels are not
    used. What each costs and loses is measured on the validation data and on this machine, and an integer programme
    chooses one size for each block. The saved predictor holds all of them once and can be told other limits at any
    time: ``choose(max_bytes=…)``. Its bytes in the ledger are those of all sizes; ``bytes loaded`` are the selection's.
    """

    stage: ClassVar[Stage] = Stage.INFERENCE
    needs: ClassVar[frozenset[str]] = frozenset({"module", "trained"})
    removes: ClassVar[frozenset[str]] = frozenset({"module"})
    by_clock: ClassVar[bool] = True
    source: ClassVar[str] = "Han et al. 2021, LegoDNN, MobiCom, arXiv:2112.09852"

    max_ratio: float = Field(default=0.125, gt=0, le=1)
    """Share of the network's convolutions that a block may hold; two it may always."""
    boundaries: tuple[tuple[str, str], ...] | None = Field(default=None, min_length=1)
    """(first, last) of each block in place of the detection: paths of modules, or names in the traced network."""
    sparsities: tuple[float, ...] = SPARSITIES
    """Shares of filters that the sizes of a block lose, ascending from 0."""
    scorer: Literal["l1", "l2"] = "l1"
    """Norm of a filter's weights; the filters of the smallest leave."""
    epochs: int = Field(default=65, ge=1)
    """Passes over the training data for the blocks."""
    batch_size: int = Field(default=128, ge=1)
    """Samples in a batch."""
    lr: float = Field(default=3e-4, gt=0)
    """Learning rate of each block's Adam."""
    alpha: float = Field(default=1.0, gt=0)
    """Weight of the blocks' loss, the mean squared error of what they give."""
    freeze_bn: bool = False
    """Keep the batch norms' statistics as they were in the trained network."""
    n_jobs: int = 1
    """Blocks that are trained at a time, each in a process of its own; −1: as many as there are cores."""
    device: str = "auto"
    """Where they are trained, as torch names it; "auto": a GPU if there is one and ``n_jobs`` is 1, else the CPU."""
    samples: int = Field(default=2000, ge=1)
    """Validation samples on which losses are measured, spread evenly over the validation data."""
    runs: int = Field(default=100, ge=1)
    """Calls at batch 1 by which the sizes of a block are timed."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Limit for the parameters and buffers of the selection that is saved; None: any."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Its deadline in milliseconds at batch 1 on this machine; None: none."""
    relax: bool = False
    """Raise limits that cannot be kept as little as needed, first memory, then the deadline, in place of an error."""
    residency: Literal["disk", "memory"] = "disk"
    """What the predictor keeps loaded: its selection only, or all sizes of all blocks, to switch without reading."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsities(self.sparsities)
        if self.n_jobs != -1 and self.n_jobs < 1:
            raise InvalidValue(f"n_jobs = {self.n_jobs}; at least 1 is expected, or -1 for all cores")
        if self.n_jobs != 1 and self.device not in ("auto", "cpu"):
            raise InvalidValue(f"device = {self.device!r} with n_jobs = {self.n_jobs}; processes train on the CPU")
        check_device(self.device)

    def apply(self, job: Job) -> Job:
        """The job with a predictor of exchangeable blocks. Its model stays the original network.

        Raises :class:`~sparing.adaptive.scaling.InfeasibleError`, naming the least that can be kept, for limits that no
        selection keeps.
        """
        self._check(job)
        trained = job.store.once("blocks", lambda: self._trained(job), All({"weights": TENSORS, "losses": ARRAYS}))
        predictor: LegoPredictor = job.store.once(
            "predictor", lambda: self._predictor(job, trained["weights"]), PREDICTOR
        )
        timed = job.store.once("timings", lambda: self._timed(job, predictor), JSON)
        predictor.profile = Profile.from_config(timed["profile"])
        selection = self._selected(predictor.profile)
        predictor.apply(selection)
        predictor.set_residency(self.residency)
        self._report(job, predictor, selection, timed, trained["losses"]["losses"])
        return job.replace(predictor=predictor)

    def _check(self, job: Job) -> None:
        if job.predictor is not None:
            kind, precision = job.predictor.kind, job.predictor.describe().precision
            if kind not in ("module", "onnx"):
                raise IncompatibleStep(
                    f"{self.id!r} cuts a module or onnx predictor; the job has a {kind!r}, which would be lost"
                )
            if "int8" in precision:
                raise IncompatibleStep(
                    f"{self.id!r} makes its blocks from the torch module, in floating point; the job's predictor is "
                    f"{precision}, which would be lost: leave the quantisation out"
                )
        from torch import nn

        model = job.fresh_model()
        count = sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
        if count < 2:
            raise NoEffect(
                f"{self.id!r}: {type(model).__name__} has {count} convolutions (Conv2d, ConvTranspose2d were looked "
                "for); a block needs two"
            )

    def _zoo(self, job: Job, device: torch.device | str = "cpu") -> BlockZoo:
        """Blocks and their sizes, still to be trained."""
        from sparing.adaptive.blocks import extract_blocks
        from sparing.adaptive.descendants import BlockZoo

        example = job.task.example_input(2)
        if len(example) != 1:
            raise IncompatibleStep(
                f"{self.id!r} needs a network of one input; that of {job.task.name!r} takes {len(example)}"
            )
        model: nn.Module = job.fresh_model().to(device)
        graph = extract_blocks(model, example[0].to(device), self.max_ratio, self.boundaries)
        return BlockZoo.build(graph, self.sparsities, self.scorer)

    def _trained(self, job: Job) -> dict[str, Any]:
        from sparing.adaptive.block_distillation import distill_blocks

        zoo = self._zoo(job, self._device())
        least = zoo.frame_bytes + zoo.bytes.min(1).sum()
        if self.max_bytes is not None and self.max_bytes < least and not self.relax:  # known before anything is trained
            raise InfeasibleError(
                f"{self.id}: max_bytes = {self.max_bytes} cannot be kept: the smallest selection takes {least:.0f} "
                "bytes"
            )
        losses = distill_blocks(
            zoo,
            _Epochs(job.train, self.batch_size, job.task, job.seed),
            self.epochs,
            self.lr,
            self.n_jobs,
            alpha=self.alpha,
            freeze_bn=self.freeze_bn,
            seed=job.seed,
            progress=job.store.progress("blocks"),
        )
        return {
            "weights": {name: tensor.cpu() for name, tensor in zoo.state_dict().items()},
            "losses": {"losses": losses},
        }

    def _device(self) -> torch.device:
        return device_named("cpu" if self.n_jobs != 1 else self.device)

    def _predictor(self, job: Job, weights: dict[str, torch.Tensor]) -> LegoPredictor:
        """The graphs, and what each size loses on the validation data; not yet timed."""
        import numpy as np

        from sparing.adaptive.block_profile import accuracy_drops
        from sparing.adaptive.lego_predictor import LegoPredictor

        zoo = self._zoo(job)
        zoo.load_state_dict(weights)
        blocks, sizes = zoo.bytes.shape
        unknown = np.zeros((blocks, sizes))
        blank = Profile(
            sparsities=np.array(zoo.sparsities),
            drops=unknown,
            bytes=zoo.bytes,
            latency=unknown[:, 0],
            rel=unknown,
            model_latency=0.0,
            frame_bytes=zoo.frame_bytes,
            accuracy=0.0,
        )
        example = job.task.example_input(2)
        predictor = LegoPredictor.from_zoo(zoo, blank, example, job.task, residency="memory")
        validation = self._validation(job)
        known: dict[tuple[int, ...], float] = {}

        def accuracy(composition: tuple[int, ...]) -> float:
            options = tuple(max(option, 0) for option in composition)  # size 0 is the original itself
            if options not in known:
                predictor.apply(options)
                known[options] = _score(job.task, predictor, validation)
            return known[options]

        drops = accuracy_drops(accuracy, blocks, sizes)
        predictor.profile = replace(blank, drops=drops, accuracy=accuracy((0,) * blocks))
        predictor.apply((0,) * blocks)
        predictor.set_residency("disk")
        return predictor

    def _validation(self, job: Job) -> Any:
        import numpy as np
        from torch.utils.data import Subset

        count = len(job.val)
        chosen = np.unique(np.linspace(0, count - 1, min(self.samples, count)).round().astype(int))
        return Subset(job.val, chosen.tolist())

    def _timed(self, job: Job, predictor: LegoPredictor) -> dict[str, Any]:
        """The profile with the times of this machine, and what the selection does in truth."""
        from sparing.core.clock import in_turns
        from sparing.core.predictor.tree import to_numpy

        inputs = [to_numpy(value) for value in job.task.example_input(1)]
        before = predictor.threads
        predictor.set_threads(job.meter.threads if job.meter else 1)
        profile = predictor.profile_latency(*inputs, runs=self.runs)
        predictor.apply(self._selected(profile))
        (seconds,) = in_turns([lambda: predictor(*inputs)], self.runs, min(10, self.runs))
        score = _score(job.task, predictor, self._validation(job))
        predictor.set_threads(before)
        return {"profile": profile.to_config(), "seconds": float(seconds), "score": score}

    def _selected(self, profile: Profile) -> Selection:
        deadline = None if self.max_latency_ms is None else self.max_latency_ms / 1000
        return ScalingOptimizer(profile).solve(deadline, self.max_bytes, self.relax)

    def _report(
        self, job: Job, predictor: LegoPredictor, selection: Selection, timed: dict[str, Any], losses: Any
    ) -> None:
        profile, headline = predictor.profile, job.task.headline
        better = headline.better
        blocks, sizes = profile.bytes.shape
        chosen = ", ".join(f"{sparsity:g}" for sparsity in selection.sparsities)
        raised = ""
        if selection.relaxed:
            limits = []
            if self.max_bytes is not None:
                limits.append(f"{selection.max_bytes:.0f} bytes")
            if self.max_latency_ms is not None:
                limits.append(f"{selection.max_latency * 1000:.3g} ms")
            raised = f"; limits raised to {' and '.join(limits)}"
        job.notes.outcome = f"blocks at sparsity {chosen}{raised}"
        optimizer = ScalingOptimizer(profile)
        uniform: list[Selection] = [optimizer.selection([s] * blocks) for s in range(sizes)]  # type: ignore[misc]
        named = [(f"all blocks at {one.sparsities[0]:g}", one) for one in uniform]
        job.notes.candidates.extend(
            {
                "name": name,
                f"val {headline.name}, estimated": _shown(one.est_accuracy, better),
                "selection bytes": one.est_bytes,
                "ms, estimated": one.est_latency * 1000,
                "chosen": one is selection,
            }
            for name, one in [*named, ("the selection", selection)]
        )
        for s in range(1, sizes):
            mean = losses[:, s].mean(0)
            job.notes.curves[f"block loss at sparsity {profile.sparsities[s]:g}"] = [
                (float(epoch + 1), float(value)) for epoch, value in enumerate(mean)
            ]
        job.notes.remarks.append(
            f"{sizes} sizes of each block; losses are measured on {min(self.samples, len(job.val))} validation samples"
        )
        figures: list[tuple[str, Any, str, Any, Any]] = [
            ("blocks", blocks, "", "derived", ""),
            ("selections", predictor.options, "", "derived", "higher"),
            ("selection bytes", selection.est_bytes, "B", "derived", "lower"),
            ("bytes loaded", predictor.loaded_bytes, "B", "measured", "lower"),
            ("bytes on disk", predictor.describe().model_bytes, "B", "measured", "lower"),
            (f"val {headline.name}, estimated", _shown(selection.est_accuracy, better), headline.unit, "est", better),
            (f"val {headline.name}, measured", _shown(timed["score"], better), headline.unit, "measured", better),
            (f"val {headline.name} lost", profile.accuracy - timed["score"], headline.unit, "measured", "lower"),
            ("latency, estimated", selection.est_latency * 1000, "ms", "est", "lower"),
            ("latency, measured", timed["seconds"] * 1000, "ms", "measured", "lower"),
            ("limits raised", "yes" if selection.relaxed else "no", "", "derived", ""),
        ]
        for name, value, unit, how, good in figures:
            job.record(name, value, unit, how, good)


def _score(task: Task, predictor: LegoPredictor, dataset: Any) -> float:
    """The headline metric, turned so that larger is better."""
    value = float(task.evaluate(predictor, dataset).metrics[task.headline.name])
    if value != value or abs(value) == float("inf"):
        raise DataError(f"the validation data give {task.headline.name} = {value}")
    return _shown(value, task.headline.better)


def _shown(value: float, better: str) -> float:
    """Between a figure of which more is better and the metric; the same in both directions."""
    return value if better == "higher" else -value


@dataclass(frozen=True)
class _Epochs:
    """Epoch → shuffled batches; can be sent to another process."""

    dataset: Any
    size: int
    task: Task
    seed: int

    def __call__(self, epoch: int) -> Iterator[Any]:
        from torch.utils.data import default_collate

        from sparing.core.collation import items_of
        from sparing.core.training.batches import Batches

        batches = Batches(self.dataset, self.size, self.seed).epoch_batches(epoch)
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()  # a batch norm needs more than one sample
        for batch in batches:
            yield (self.task.collate or default_collate)(
                items_of(self.dataset, batch.tolist(), "of the training data ")
            )


__all__ = ["BlockScaling"]
