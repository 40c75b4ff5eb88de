"""Steps of Predictive Exit: exits trained on a finished network, a policy calibrated, a predictor that really stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.adaptive.calibration import FAMILIES, Family
from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.predictor import OnnxPredictor
from sparing.core.step import Stage, step
from sparing.core.store import JSON, PREDICTOR, TENSORS, All
from sparing.core.training import FitResult, Train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from sparing.adaptive.calibration import Calibrated, Objective
    from sparing.adaptive.exit_cost import CostModel
    from sparing.adaptive.exit_predictor import EarlyExitPredictor
    from sparing.adaptive.exit_training import Weights
    from sparing.adaptive.exits import MultiExitModel
    from sparing.core.job import Job
    from sparing.core.task import Task


@step("predictive_exit")
class PredictiveExit(Train):
    """Let easy samples leave early: exits are trained, and forecasts say where a sample will be sure enough.

    The network is frozen unless ``freeze_backbone=False``. The policy that spends least of the ``objective`` and loses
    at most ``max_loss`` on the validation data is kept; the row lists what every other kind of policy did on the same
    exits. The saved predictor computes neither layers nor exits that a sample does not need. The fields of ``train``
    hold for the exits' training.
    """

    stage: ClassVar[Stage] = Stage.INFERENCE
    needs: ClassVar[frozenset[str]] = frozenset({"module", "trained"})
    removes: ClassVar[frozenset[str]] = frozenset({"module"})
    source: ClassVar[str] = "Li et al. 2023, Predictive Exit, AAAI, arXiv:2206.04685"

    epochs: int = Field(default=100, ge=1)
    """Passes over the training data for the exits."""
    batch_size: int = Field(default=128, ge=1)
    """Samples in an optimizer step."""
    optimizer: str = "Adam"
    """A class of torch.optim, or "module:Class"."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    layers: Literal["all"] | tuple[str, ...] = "all"
    """Places of exits, by their names in the traced network; "all": every convolution or residual sum that ends in an
    activation."""
    codewords: int = Field(default=64, ge=1)
    """Of each exit's bag of features."""
    pool: int = Field(default=2, ge=1)
    """Each exit's map is pooled to pool × pool."""
    share: Literal["stage"] | None = None
    """"stage": exits of one resolution share a codebook, all exits their linear layers, as in the AAAI code."""
    freeze_backbone: bool = True
    """Train the exits alone, so that the network without exits stays what it was."""
    weights: Literal["equal", "patience", "sdn"] = "equal"
    """Of the heads' losses."""
    policy: Family = "predictive"
    """What decides: "predictive" forecasts, "every" and the published baselines ask exit by exit."""
    max_loss: float = Field(default=0.005, ge=0, lt=1)
    """Accepted loss of accuracy on the validation data, as a share of all samples."""
    caution: float = Field(default=1.0, ge=0)
    """Standard errors that are added to a policy's loss, since the validation data flatter the one that is chosen."""
    objective: Literal["macs", "latency", "energy"] = "macs"
    """What is to be least: multiply-accumulates, time of one sample as measured here, or simulated joules."""
    choose_exits: bool = False
    """Leave out exits that do not pay for themselves by the objective: the network is cut behind each that is there."""
    kernel: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Of the forecast's convolution over the classes."""
    max_round: int = Field(default=8, ge=1)
    """Rounds of a forecast."""
    history: int = Field(default=1, ge=1)
    """Evaluated exits that a forecast looks at."""
    single_jump: bool = False
    """Trust the first forecast; only then a lowered clock can keep the deadline."""
    int8: bool | None = None
    """Stages in INT8, calibrated on the calibration data. None: as the predictor that comes in."""
    samples: int = Field(default=512, ge=1)
    """Calibration samples for INT8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        from sparing.adaptive.confidence import ConfidenceRule
        from sparing.adaptive.forecast import ExitPredictor

        ExitPredictor(ConfidenceRule.softmax(0.9), self.kernel, self.max_round, self.history)  # raises for a bad kernel
        if self.layers != "all" and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise InvalidValue(f"{self.id}: layers = {list(self.layers)}; different names, or 'all', are expected")

    def check(self, task: Task) -> None:
        """Exits are classifiers."""
        super().check(task)
        if "classification" not in task.capabilities:
            raise IncompatibleStep(
                f"{self.id!r} puts classifiers at the exits; {task.name!r} is no classification (its capabilities: "
                f"{', '.join(sorted(task.capabilities)) or 'none'})"
            )

    def apply(self, job: Job) -> Job:
        """The job with a predictor that stops early. Its model stays the one without exits, and is not trained on."""
        from sparing.core.job import TrainingPlan
        from sparing.core.training.step import load_weights

        if job.predictor is not None and job.predictor.kind not in ("module", "onnx"):
            raise IncompatibleStep(f"{self.id!r} cuts a module or onnx predictor; the job has a {job.predictor.kind!r}")

        def train() -> dict[str, Any]:
            model, result = self._trained(job)
            return {"weights": dict(model.state_dict()), "record": result.record()}

        stored = job.store.once("exits", train, All({"weights": TENSORS, "record": JSON}))
        model = self._attached(job)
        load_weights(model, stored["weights"])
        # what is chosen by time depends on the threads that time is taken with
        name = f"predictor-{self._threads(job)}-threads" if self.objective == "latency" else "predictor"
        found = job.store.once(name, lambda: self._predictor(job, model), All({"predictor": PREDICTOR, "report": JSON}))
        self.report(job, FitResult.of(model, stored["record"]))
        report: dict[str, Any] = found["report"]
        job.notes.outcome = report["outcome"]
        job.notes.candidates.extend(report["candidates"])
        job.notes.remarks.extend(report["remarks"])
        for name, value, unit, how, better in report["figures"]:
            job.record(name, value, unit, how=how, better=better)
        return job.replace(predictor=found["predictor"], training=TrainingPlan())

    def _attached(self, job: Job) -> MultiExitModel:
        from sparing.adaptive.exits import attach_exits
        from sparing.core.randomness import isolated_rng

        with isolated_rng(job.seed, self.name, "exits"):
            return attach_exits(
                job.fresh_model(),
                self.layers,
                example=job.task.example_input(2),
                codewords=self.codewords,
                pool=self.pool,
                share=self.share,
            )

    def _trained(self, job: Job) -> tuple[MultiExitModel, FitResult]:
        from sparing.adaptive.exit_training import train_exits

        model = self._attached(job)
        weights: Weights = self.weights
        result = train_exits(
            model,
            job.task,
            job.train,
            job.val if self.early_stopping or self.restore_best else None,
            self,
            freeze_backbone=self.freeze_backbone,
            weights=weights,
            plan=job.training,
            seed=job.seed,
            progress=job.store.progress("exits"),
        )
        return model, result

    def _int8(self, job: Job) -> bool:
        if self.int8 is not None:
            return self.int8
        return isinstance(job.predictor, OnnxPredictor) and job.predictor.precision is not None and (
            "int8" in job.predictor.precision
        )  # fmt: skip

    def _predictor(self, job: Job, model: MultiExitModel) -> dict[str, Any]:
        from sparing.adaptive.calibration import calibrate, worthwhile_exits
        from sparing.adaptive.exit_predictor import EarlyExitPredictor, needed_exits, quantised, staged, tabulated
        from sparing.adaptive.policies import FullNetworkPolicy

        cost = model.costs(job.task.example_input(1))
        int8 = self._int8(job)

        def made(exits: Sequence[int], cost: CostModel, places: Sequence[int]) -> EarlyExitPredictor:
            stages, parts = staged(model, job.task, exits)
            if int8:
                stages, parts = quantised(stages, parts, job.task, job.calibration, self.samples)
            policy = FullNetworkPolicy()
            return EarlyExitPredictor(stages, parts, policy, cost, job.task, places=places, mean_macs=cost.full)

        exits = tuple(range(cost.exits))
        whole = made(exits, cost, exits)
        logits, labels = tabulated(whole, job.task, job.val)
        objective = self._objective(whole, job)
        limits: dict[str, Any] = {"max_loss": self.max_loss, "caution": self.caution}
        own = self._settings()
        if self.choose_exits:
            exits = worthwhile_exits(self.policy, logits, labels, cost, objective=objective, **limits, **own)
            logits, cost = logits[:, [*exits, cost.exits]], cost.of_exits(exits)
        compared: dict[Family, Calibrated] = {
            family: calibrate(
                family,
                logits,
                labels,
                cost,
                objective=objective(exits),
                **limits,
                **(own if family == self.policy else {}),
            )
            for family in FAMILIES
        }
        chosen = compared[self.policy]
        report = self._report(compared, logits, cost, int8)
        if isinstance(chosen.policy, FullNetworkPolicy) and job.predictor is not None:
            return {"predictor": job.predictor, "report": report}
        places = sorted(needed_exits(chosen.policy, cost.exits))
        needed = [exits[place] for place in places]
        predictor = whole if len(needed) == len(whole.exits) else made(needed, cost, places)
        return {"predictor": predictor.with_policy(chosen.policy, chosen.macs), "report": report}

    def _threads(self, job: Job) -> int:
        return job.meter.threads if job.meter else 1

    def _objective(self, whole: EarlyExitPredictor, job: Job) -> Callable[[tuple[int, ...]], Objective | None]:
        """For some of the exits: what is to be least; None: the mean of multiply-accumulates."""
        from sparing.adaptive.dvfs import EnergyModel
        from sparing.adaptive.exit_predictor import timed

        if self.objective == "macs":
            return lambda exits: None
        if self.objective == "latency":
            before = whole.threads
            whole.set_threads(self._threads(job))
            seconds = timed(whole, job.task.example_input(1))
            whole.set_threads(before)
            return seconds.objective
        return EnergyModel.of_network(whole.cost).objective(whole.cost)

    def _settings(self) -> dict[str, Any]:
        if self.policy != "predictive":
            return {"single_jump": self.single_jump} if self.policy == "isotonic" else {}
        return {
            "kernel": self.kernel,
            "max_round": self.max_round,
            "single_jump": self.single_jump,
            "history": self.history,
        }

    def _report(
        self, compared: dict[Family, Calibrated], logits: np.ndarray, cost: CostModel, int8: bool
    ) -> dict[str, Any]:
        from sparing.adaptive.dvfs import EnergyModel
        from sparing.adaptive.policies import FullNetworkPolicy

        chosen = compared[self.policy]
        trace = chosen.policy.run(logits)
        energy = EnergyModel.of_network(cost).simulate(trace, cost)
        nothing = isinstance(chosen.policy, FullNetworkPolicy)
        shares = [float((trace.exit_index == i).mean()) for i in range(cost.exits + 1)]
        left = ", ".join(f"{i + 1}: {share:.0%}" for i, share in enumerate(shares[:-1]) if share)
        return {
            "outcome": "kept the network without exits: no policy was accurate enough" if nothing else self.policy,
            "candidates": [
                {
                    "name": name,
                    "val accuracy": found.accuracy,
                    "mean macs": found.macs,
                    "exit evaluations": float(found.policy.run(logits).n_exit_evals.mean()),
                    "policies tried": found.tried,
                    "chosen": name == self.policy,
                }
                for name, found in compared.items()
            ],
            "remarks": [
                f"exits at {cost.exits} places{', stages in INT8' if int8 else ''}; shares of the validation samples "
                f"that leave at exit {left or 'none'}; at the final head: {shares[-1]:.0%}",
                f"energy is simulated: a Jetson TX2's clock levels, {energy.switches:.2g} changes of clock a sample, "
                f"{energy.late:.1%} of the samples later than the full network",
            ],
            "figures": [
                ("exit evaluations", float(trace.n_exit_evals.mean()), "exits", "derived", "lower"),
                ("leave early", 1 - shares[-1], "", "derived", "higher"),
                ("energy over full clock", energy.joules / energy.full_clock_joules, "×", "est", "lower"),
                ("energy over full network", energy.joules / energy.network_joules, "×", "est", "lower"),
            ],
        }
