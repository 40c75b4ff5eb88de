"""The predictor kind "early_exit": a network in stages that stops where its policy says. Loading imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from jaxtyping import Float

from sparing.adaptive.confidence import ConfidenceRule
from sparing.adaptive.exit_cost import CostModel
from sparing.adaptive.forecast import ExitPredictor
from sparing.adaptive.policies import (
    ExitTrace,
    FullNetworkPolicy,
    PlacedExitPolicy,
    Policy,
    PredictiveExitPolicy,
    Walk,
    policy_from,
)
from sparing.core.clock import in_turns
from sparing.core.errors import CorruptFile, IncompatibleStep, InvalidValue
from sparing.core.predictor.base import Context, Description, Predictor
from sparing.core.predictor.folder import nest, unnest
from sparing.core.predictor.onnx import OnnxPredictor
from sparing.core.predictor.tree import leaves

if TYPE_CHECKING:
    from sparing.adaptive.exits import MultiExitModel
    from sparing.core.predictor.folder import Manifest
    from sparing.core.task import Task

ALONE = np.zeros(1, dtype=np.int64)
"""The number of the only sample."""
MACS_RULE = "mean over calibration samples of what each of them runs through: layers, exits and forecasts"


class EarlyExitPredictor(Predictor):
    """Stages and exits in ONNX Runtime, and the policy that chooses among them.

    A sample's stages end where it leaves, and an exit is computed only where the policy asks for it. In a batch the
    samples that remain go on together; each is answered as it would be alone.

    ``stages``: one more than ``exits``; each gives the map its exit reads, then whatever later stages read.
    ``places``: the number of each exit, from 0, among the ``cost.exits`` the policy was calibrated with; exits that
    no sample can be asked at need not be here. ``mean_macs``: of a sample, on calibration data.
    """

    kind: ClassVar[str] = "early_exit"

    def __init__(
        self,
        stages: Sequence[OnnxPredictor],
        exits: Sequence[OnnxPredictor],
        policy: Policy,
        cost: CostModel,
        task: Context | Task | Predictor | None = None,
        *,
        places: Sequence[int] | None = None,
        mean_macs: float | None = None,
        threads: int | None = None,
    ) -> None:
        self.stages, self.exits = list(stages), list(exits)
        self.places = list(range(cost.exits)) if places is None else [int(place) for place in places]
        if len(self.exits) != len(self.places) or len(self.stages) != len(self.places) + 1:
            raise InvalidValue(
                f"{len(self.stages)} stages and {len(self.exits)} exits at {len(self.places)} places; one stage more "
                "than exits is expected"
            )
        missing = needed_exits(policy, cost.exits) - set(self.places)
        if missing or self.places != sorted(set(self.places)) or (self.places and self.places[-1] >= cost.exits):
            raise InvalidValue(
                f"exits at {self.places}; the policy can ask for {sorted(needed_exits(policy, cost.exits))} of "
                f"{cost.exits}"
            )
        policy.walk(1, cost.exits)  # raises for a policy of another network
        self.policy, self.cost, self.mean_macs = policy, cost, mean_macs
        super().__init__(task, threads=threads)

    @property
    def runtime(self) -> str:
        """ONNX Runtime runs every part."""
        return "onnxruntime"

    def set_threads(self, threads: int | None) -> None:
        """Use this many threads in every part."""
        super().set_threads(threads)
        for part in (*self.stages, *self.exits):
            part.set_threads(threads)

    def __call__(self, *inputs: Any) -> Float[np.ndarray, "n classes"]:
        """Images (N, …) → logits (N, classes) of the exit each of them left at."""
        return self.trace(*inputs)[0]

    def trace(self, *inputs: Any) -> tuple[Float[np.ndarray, "n classes"], ExitTrace]:
        """(logits, where and how each sample left)."""
        values = _arrays(self.stages[0](*inputs))
        samples = len(values[0])
        if samples == 1:
            return self._alone(values)
        walk = self.policy.walk(samples, self.cost.exits)
        left = np.full(samples, self.cost.exits)
        evaluated = np.zeros((samples, self.cost.exits), dtype=bool)
        alive = np.arange(samples)
        answers: np.ndarray | None = None
        for place in range(len(self.stages)):
            if place:
                values = _run(self.stages[place], values)
            if place == len(self.places):
                answers = _put(answers, samples, alive, values[0])
                break
            number = self.places[place]
            asked = np.flatnonzero(walk.wants(number)[alive])
            if not len(asked):
                continue
            logits = _run(self.exits[place], [values[0] if len(asked) == len(alive) else values[0][asked]])[0]
            evaluated[alive[asked], number] = True
            leaves_ = walk.observe(number, alive[asked], logits)
            if not leaves_.any():
                continue
            gone = asked[leaves_]
            answers = _put(answers, samples, alive[gone], logits[leaves_])
            left[alive[gone]] = number
            stays = np.ones(len(alive), dtype=bool)
            stays[gone] = False
            if not stays.any():
                break
            alive, values = alive[stays], [value[stays] for value in values]
        assert answers is not None
        return answers, ExitTrace(left, evaluated, walk.jumps)

    def _alone(self, values: list[np.ndarray]) -> tuple[np.ndarray, ExitTrace]:
        """:meth:`trace` of one sample, without the bookkeeping of a batch: at this size it costs as much as a layer."""
        walk = self.policy.walk(1, self.cost.exits)
        evaluated = np.zeros((1, self.cost.exits), dtype=bool)
        for place, number in enumerate(self.places):
            if walk.wants(number)[0]:
                logits = _run(self.exits[place], values[:1])[0]
                evaluated[0, number] = True
                if walk.observe(number, ALONE, logits)[0]:
                    return logits, ExitTrace(np.array([number]), evaluated, walk.jumps)
            values = _run(self.stages[place + 1], values)
        return values[0], ExitTrace(np.array([self.cost.exits]), evaluated, walk.jumps)

    def table(self, *inputs: Any) -> Float[np.ndarray, "n heads classes"]:
        """Logits of every exit that is here and of the final head: what policies are calibrated on."""
        values = _arrays(self.stages[0](*inputs))
        found = []
        for place, exit_ in enumerate(self.exits):
            found.append(_run(exit_, values[:1])[0])
            values = _run(self.stages[place + 1], values)
        return np.stack([*found, values[0]], axis=1)

    def with_policy(self, policy: Policy, mean_macs: float | None = None) -> EarlyExitPredictor:
        """The same parts under another policy."""
        return EarlyExitPredictor(
            self.stages,
            self.exits,
            policy,
            self.cost,
            self,
            places=self.places,
            mean_macs=mean_macs,
            threads=self.threads,
        )

    def describe(self) -> Description:
        """Sums over all parts; the multiply-accumulates are means."""
        parts = [part.describe() for part in (*self.stages, *self.exits)]
        formats = sorted({fragment for part in parts for fragment in part.precision.split(" + ")} - {"n.a."})
        return Description(
            kind=self.kind,
            runtime=self.runtime,
            precision=" + ".join(formats) or "n.a.",
            parameters=sum(part.parameters or 0 for part in parts),
            nonzero=sum(part.nonzero or 0 for part in parts),
            macs=None if self.mean_macs is None else round(self.mean_macs),
            macs_rule=MACS_RULE,
            model_bytes=sum(part.model_bytes for part in parts),
            layers=tuple(
                {**layer, "name": f"{name}.{layer['name']}"}
                for name, part in zip(self._names(), parts, strict=True)
                for layer in part.layers
            ),
        )

    def _names(self) -> list[str]:
        stages = [f"stage_{i:02d}" for i in range(len(self.stages))]
        return stages + [f"exit_{place:02d}" for place in self.places]

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """A graph for each stage and each exit; the policy and the costs are settings."""
        files, parts = nest(dict(zip(self._names(), (*self.stages, *self.exits), strict=True)))
        return files, {
            "parts": parts,
            "places": self.places,
            "policy": self.policy.to_config(),
            "layer_macs": list(self.cost.layer_macs),
            "exit_macs": list(self.cost.exit_macs),
            "round_macs": self.cost.round_macs,
            "mean_macs": self.mean_macs,
        }

    @classmethod
    def load_files(cls, files: Mapping[str, Any], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        """The predictor of a saved folder."""
        config = manifest.config
        try:
            parts = unnest(files, config["parts"], trust)
            places = [int(place) for place in config["places"]]
            stages = [parts.pop(f"stage_{i:02d}") for i in range(len(places) + 1)]
            exits = [parts.pop(f"exit_{place:02d}") for place in places]
            cost = CostModel(tuple(config["layer_macs"]), tuple(config["exit_macs"]), float(config["round_macs"]))
            macs = None if config["mean_macs"] is None else float(config["mean_macs"])
            policy = policy_from(config["policy"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"the settings of an early_exit predictor are not complete: {error!r}") from error
        if parts or not all(isinstance(part, OnnxPredictor) for part in (*stages, *exits)):
            raise CorruptFile("the parts of an early_exit predictor are ONNX graphs, one for each stage and exit")
        return cls(stages, exits, policy, cost, manifest.context(), places=places, mean_macs=macs)  # type: ignore[arg-type]


def needed_exits(policy: Policy, exits: int) -> set[int]:
    """The exits, from 0, that a policy can ask for in a network of so many."""
    if isinstance(policy, FullNetworkPolicy):
        return set()
    if isinstance(policy, PlacedExitPolicy):
        return set(policy.exits)
    if isinstance(policy, PredictiveExitPolicy):
        return set(range(policy.start - 1, exits))
    return set(range(exits))


def _arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for _, leaf in leaves(tree)]


def _run(part: OnnxPredictor, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    session = part.session
    names = [item.name for item in session.get_inputs()]
    return list(session.run(None, dict(zip(names, values, strict=True))))


def _put(answers: np.ndarray | None, samples: int, who: np.ndarray, logits: np.ndarray) -> np.ndarray:
    if answers is None:
        answers = np.empty((samples, *logits.shape[1:]), dtype=logits.dtype)
    answers[who] = logits
    return answers


def staged(
    model: MultiExitModel, task: Task, places: Sequence[int] | None = None
) -> tuple[list[OnnxPredictor], list[OnnxPredictor]]:
    """(stages, exits) of a trained model as ONNX graphs, the batch free; cut at the exits of ``places``, None: all."""
    import torch

    from sparing.core.predictor import to_onnx

    kept = list(range(len(model.exits))) if places is None else list(places)
    plain = Context(task.name)  # labels and preprocessing belong to the whole
    values: Any = tuple(torch.as_tensor(item) for item in task.example_input(2))
    samples = len(values[0])
    stages, exits = [], []
    with torch.no_grad():
        for i, stage in enumerate(model.eval().stages(kept)):
            stages.append(to_onnx(stage, values, plain))
            values = stage(*values)
            values = values if isinstance(values, tuple) else (values,)
            if any(len(value) != samples for value in values):
                raise IncompatibleStep(
                    f"stage {i} hands on values of shapes {[list(value.shape) for value in values]} for {samples} "
                    f"samples; exits need places where the first axis of all that later layers read counts samples"
                )
            if i < len(kept):
                exits.append(to_onnx(model.exits[kept[i]], (values[0],), plain))
    return stages, exits


def timed(predictor: EarlyExitPredictor, example: tuple[Any, ...], runs: int = 100) -> CostModel:
    """Seconds of each stage, and of each exit with the decision about its logits: means of the middle half of ``runs``.

    ``predictor`` has all exits; ``example`` is one sample, for latencies of one alone.
    """

    def seconds(call: Callable[[], Any]) -> float:
        return float(in_turns([call], runs, warmup=1)[0])

    stages: list[float] = []
    exits: list[float] = []
    forecast = PredictiveExitPolicy(1, ExitPredictor(ConfidenceRule.softmax(0.999999)))
    values = list(predictor.stages[0].feeds(*example).values())
    for number, stage in enumerate(predictor.stages):
        stages.append(seconds(functools.partial(_run, stage, values)))
        values = _run(stage, values)
        if number < predictor.cost.exits:
            walk = forecast.walk(1, predictor.cost.exits)

            def decide(number: int = number, values: list[np.ndarray] = values, walk: Walk = walk) -> None:
                walk.observe(number, ALONE, _run(predictor.exits[number], values[:1])[0])

            exits.append(seconds(decide))
    return CostModel(tuple(stages), tuple(exits))


def quantised(
    stages: Sequence[OnnxPredictor], exits: Sequence[OnnxPredictor], task: Task, calibration: Any, samples: int = 512
) -> tuple[list[OnnxPredictor], list[OnnxPredictor]]:
    """The parts with INT8 weights and activations; a part without a layer to quantise stays as it is.

    Ranges come from up to ``samples`` items of ``calibration``, each part fed what the parts before it give in float.
    """
    from sparing.compression.calibration import calibration_batches
    from sparing.compression.quantization import Scheme, layers_of, prepare, quantize_onnx

    fed: dict[int, list[list[np.ndarray]]] = {}

    def record(*inputs: Any) -> np.ndarray:
        first = stages[0].feeds(*inputs)
        values = list(first.values())
        for i, stage in enumerate(stages):
            fed.setdefault(i, []).append(values)
            values = _run(stage, values)
        return values[0]

    for batch in calibration_batches(task, calibration, samples):
        task.outputs(record, batch)  # type: ignore[arg-type]

    def made(part: OnnxPredictor, batches: Sequence[Sequence[np.ndarray]]) -> OnnxPredictor:
        graph, scheme = prepare(part.content), Scheme()
        layers = [node.name for node in layers_of(graph)]
        if not layers:
            return part
        only = layers if part in exits else []  # a histogram of codewords in 8 bits loses the rare ones
        names = [item.name for item in part.session.get_inputs()]
        feeds = [dict(zip(names, values, strict=True)) for values in batches]
        return part.with_graph(
            quantize_onnx(graph, scheme, feeds, only).SerializeToString(deterministic=True), str(scheme)
        )

    return (
        [made(stage, fed[i]) for i, stage in enumerate(stages)],
        [made(exit_, [values[:1] for values in fed[i + 1]]) for i, exit_ in enumerate(exits)],
    )


def tabulated(predictor: EarlyExitPredictor, task: Task, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """(logits (S, heads, K) of every exit and the final head, classes (S,)) of a data set, for calibration."""
    import torch

    from sparing.core.collation import batches_of

    logits, classes = [], []
    for batch in batches_of(dataset, 256, task.collate):
        found = np.asarray(task.outputs(predictor.table, batch))  # type: ignore[arg-type]
        logits.append(found)
        classes.append(task.class_logits(torch.from_numpy(found[:, -1]), batch)[1].numpy())
    return np.concatenate(logits), np.concatenate(classes)
