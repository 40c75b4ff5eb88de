"""Spiking networks that answer while a recording is still going on: state is kept from step to step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sparing.core.errors import CorruptFile, IncompatibleStep, InvalidValue, NoEffect
from sparing.core.predictor import Description, ModulePredictor, Operations, Predictor, nest, unnest
from sparing.core.step import Stage, Step, step
from sparing.models.spiking.gesture import GestureSNN, flattened

if TYPE_CHECKING:
    from sparing.core.job import Job
    from sparing.core.predictor.folder import Manifest
    from sparing.core.task import Task

PART = "network"


class SpikingStream:
    """A running recording, or several side by side: frames go in step by step.

    Layers without gates over all steps go through at once, and where all are so, every step has an answer: the mean
    output since :meth:`reset`. Gates over time, and those over channels and places of the input, look at all steps of a
    window: currents are kept from the first such layer on, and the answer comes with the window's last step. Then the
    next window begins.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: GestureSNN) -> None:
        if network.training:
            raise InvalidValue("SpikingStream: the network is in training mode; call eval() first")
        self.network, self._layers = network, network.layers
        causal = [layer.causal for layer in self._layers]
        self._through = causal.index(False) if False in causal else len(causal)
        self.reset()

    @property
    def causal(self) -> bool:
        """Whether every step has an answer."""
        return self._through == len(self._layers)

    @property
    def steps(self) -> int:
        """Frames since the recording, or the window, began."""
        return self._steps

    def reset(self) -> None:
        """Begin another recording."""
        self._states: list[Tensor | None] = [None] * self._through
        self._waiting: list[Tensor] = []
        self._total: Tensor | None = None
        self._steps = 0
        self._count: int | None = None

    @property
    def state_bytes(self) -> int:
        """What is kept from one step to the next, now."""
        kept = [*self._states, *self._waiting, self._total]
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def push(self, frames: Any) -> np.ndarray | None:
        """Frames of one step (N, C, H, W) → outputs (N, num_classes), or None before the window's last step."""
        x = torch.as_tensor(frames)
        self.network.check_frames(x.shape)
        if self._count not in (None, len(x)):
            raise InvalidValue(f"SpikingStream: {len(x)} recordings after {self._count}; call reset() before others")
        self._count = len(x)
        with torch.inference_mode():
            for i, layer in enumerate(self._layers[: self._through]):
                x, self._states[i] = layer.step(self._current(layer, x), self._states[i])
            self._steps += 1
            if self.causal:
                self._total = x if self._total is None else self._total + x
                return (self._total / self._steps).numpy()
            first, *rest = self._layers[self._through :]
            self._waiting.append(self._current(first, x))
            if self._steps < self.network.T:
                return None
            x = first.neurons(torch.stack(self._waiting, 1))
            for layer in rest:
                x = layer(flattened(layer, x, 2))
            self.reset()
            return x.mean(1).numpy()

    @staticmethod
    def _current(layer: Any, x: Tensor) -> Tensor:
        return layer.current(flattened(layer, x.unsqueeze(1), 2)).squeeze(1)


class StreamingPredictor(Predictor):
    """A spiking network in torch that answers whole recordings, or step by step with the same outputs.

    Called with frames (N, T, C, H, W) it answers in one pass; :meth:`stream` begins a recording whose frames come one
    after the other.

    Args:
        network: the predictor of a :class:`~sparing.models.spiking.gesture.GestureSNN`.
        operations: of a sample, at measured firing rates.
    """

    kind: ClassVar[str] = "spiking"

    def __init__(
        self, network: ModulePredictor, operations: Operations | None = None, *, threads: int | None = None
    ) -> None:
        if not isinstance(network.model, GestureSNN):
            raise InvalidValue(f"a predictor of a GestureSNN is expected, not of a {type(network.model).__name__}")
        self.network, self.operations = network, operations
        super().__init__(network, threads=threads)

    @property
    def runtime(self) -> str:
        """Eager torch."""
        return self.network.runtime

    def set_threads(self, threads: int | None) -> None:
        """Use this many threads from now on; None for the runtime's default."""
        super().set_threads(threads)
        self.network.set_threads(threads)

    def __call__(self, *inputs: Any) -> Any:
        """Frames of all steps (N, T, C, H, W) → outputs (N, num_classes)."""
        return self.network(*inputs)

    def stream(self) -> SpikingStream:
        """A recording that begins now; as many may run side by side as are asked for."""
        model = self.network.model
        assert isinstance(model, GestureSNN)
        return SpikingStream(model)

    def describe(self) -> Description:
        """The network's counts; operations are those at the firing rates that were measured, where they were."""
        return replace(self.network.describe(), kind=self.kind).counting(self.operations)

    def operations_on(self, task: Task, split: Any) -> Operations | None:
        """At the firing rates of this split."""
        return self.network.operations_on(task, split)

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The network's files, and the operations that were measured."""
        payload, parts = nest({PART: self.network})
        return payload, {"parts": parts, "operations": None if self.operations is None else asdict(self.operations)}

    @classmethod
    def load_files(cls, files: Mapping[str, Any], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        """The inverse of :meth:`payload`."""
        from pydantic import TypeAdapter, ValidationError

        config = manifest.config
        if not isinstance(config.get("parts"), dict) or set(config["parts"]) != {PART}:
            raise CorruptFile(f"a spiking predictor needs the part {PART!r}")
        network = unnest(files, config["parts"], trust)[PART]
        if not isinstance(network, ModulePredictor) or not isinstance(network.model, GestureSNN):
            raise CorruptFile(f"the part {PART!r} of a spiking predictor is of kind {network.kind!r}, or no GestureSNN")
        try:
            operations = TypeAdapter(Operations | None).validate_python(config.get("operations"))
        except ValidationError as error:
            raise CorruptFile(f"the operations of a spiking predictor: {error.errors()[0]['msg']}") from error
        predictor = cls(network, operations)
        predictor.context = manifest.context()
        return predictor


@step("stream")
class StreamSpikes(Step):
    """Deploy a spiking network that keeps its state, so that frames are answered as they come.

    Outputs are those of the trained network. The row gets spikes, firing rates and the energy of the operations alone
    (*est.*), at the rates of the calibration data; the columns of the meter are at those of the test split.
    """

    stage: ClassVar[Stage] = Stage.INFERENCE
    needs: ClassVar[frozenset[str]] = frozenset({"trained", "events"})
    source: ClassVar[str] = "ours; energy as in Yao et al. 2023, arXiv:2209.13929, section 3.4"

    def apply(self, job: Job) -> Job:
        """The job with the streaming predictor."""
        from sparing.core.collation import batches_of
        from sparing.core.store import JSON
        from sparing.models.spiking.report import CAVEATS, spike_report

        predictor = job.predictor
        if isinstance(predictor, StreamingPredictor):
            raise NoEffect(f"{self.id!r}: the predictor keeps its state already")
        if not isinstance(predictor, ModulePredictor) or not isinstance(predictor.model, GestureSNN):
            found = "none yet" if predictor is None else f"one of kind {predictor.kind!r}"
            if isinstance(predictor, ModulePredictor):
                found = f"that of a {type(predictor.model).__name__}"
            raise IncompatibleStep(f"{self.id!r} deploys the model gesture_snn; the job's predictor is {found}")
        model = predictor.model

        def measure() -> dict[str, Any]:
            report = spike_report(model, batches_of(job.calibration, 64, job.task.collate))
            return {
                "operations": asdict(report.operations),
                "spikes": report.spikes,
                "nasar": report.nasar,
                "rates": {layer.name: layer.rate for layer in report.layers},
                "paper_mj": report.energy_pj() * 1e-9,
                "strict_mj": report.energy_pj(strict=True) * 1e-9,
                "remarks": report.remarks,
            }

        found = job.store.once("rates", measure, JSON)
        deployed = StreamingPredictor(predictor, Operations(**found["operations"]))
        job.record("spikes per recording", found["spikes"], "")
        job.record("NASAR", found["nasar"], "")
        for name, rate in found["rates"].items():
            job.record(f"firing rate of {name}", rate, "", better="")
        job.record("energy of operations, gates as in the paper", found["paper_mj"], "mJ", how="est")
        job.record("energy of operations, gates strictly", found["strict_mj"], "mJ", how="est")
        answer = (
            "every step has an answer"
            if deployed.stream().causal
            else f"gates look at all steps of a window: the answer comes with the last of its {model.T} steps"
        )
        job.notes.remarks.extend([answer, *found["remarks"], CAVEATS])
        return job.replace(predictor=deployed)
