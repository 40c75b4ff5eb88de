"""The step ``train``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.step import Stage, Step, step
from sparing.core.training.fit import FitResult, fit

if TYPE_CHECKING:
    from torch import nn

    from sparing.core.job import Job, TrainingPlan
    from sparing.core.task import Task


@step("train")
class Train(Step):
    """Train the model on the task's training data with an optimizer and schedule of torch, by Lightning."""

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    gives: ClassVar[frozenset[str]] = frozenset({"trained"})
    realises: ClassVar[frozenset[str]] = frozenset({"training"})
    source: ClassVar[str] = "ours"

    epochs: int = Field(default=10, ge=1)
    """Passes over the training data; not looked at when ``max_steps`` is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps to train for, however many epochs that takes."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per batch, of all processes together."""
    drop_last: bool = False
    """Leave out an epoch's last batch when it is not full."""
    optimizer: str = "AdamW"
    """A class of ``torch.optim``, in any case: AdamW, SGD …"""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate the schedule starts from; with "one_cycle" the highest."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, in the optimizer's own sense; refused where it has none."""
    decay: Literal["all", "matrices"] = "all"
    """"matrices": biases and parameters of one dimension (gains of norms) have no weight decay."""
    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {momentum: 0.9}."""
    scheduler: str = ""
    """A class of ``torch.optim.lr_scheduler``, "cosine" or "one_cycle", stepped after each optimizer step; "": none."""
    scheduler_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the schedule, lengths in optimizer steps; T_max, total_steps, total_iters: all by default."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear growth of the learning rate before the schedule begins."""
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest Euclidean norm of the gradient of all parameters."""
    accumulate: int = Field(default=1, ge=1)
    """Batches per optimizer step."""
    workers: int = Field(default=0, ge=0)
    """Processes that read data; the result does not depend on their number."""
    validate_every: int = Field(default=1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    monitor: Literal["headline", "loss"] = "headline"
    """What early stopping and the best epoch go by: the task's headline metric or its loss, on the validation data."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better value."""
    restore_best: bool = False
    """Hand on the weights of the best validation instead of the last."""
    nan_patience: int = Field(default=10, ge=1)
    """So many batches in a row with a NaN or infinite loss end the training; fewer are skipped and counted."""
    precision: str = "32-true"
    """Number format, as Lightning names them: 32-true, bf16-mixed …"""
    accelerator: str = "auto"
    """Passed to Lightning: cpu, gpu …"""
    devices: int | str = 1
    """Passed to Lightning: how many, or "auto" for all."""
    strategy: str = "auto"
    """"auto" with several devices of one machine: "ddp_fork", which does not run the user's command again."""
    num_nodes: int = Field(default=1, ge=1)
    """Passed to Lightning: machines that train together."""
    deterministic: bool = True
    """Use deterministic kernels only; without them a run on a GPU is not repeated bit for bit."""
    logger: Literal["", "csv"] = ""
    """"csv": Lightning's CSV logger writes into ``log_folder``. The ledger has the curves in any case."""
    log_folder: str = "logs"
    """Where the logger writes."""
    checkpoint_every_s: float = Field(default=10.0, gt=0)
    """Seconds between the states from which a killed training goes on; more when saving takes over 5 % of the time."""
    checkpoint_every_batches: int | None = Field(default=None, ge=1)
    """Batches between these states, instead of seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler_args and not self.scheduler:
            raise InvalidValue(f"scheduler_args = {self.scheduler_args}, but no scheduler is named")
        if self.decay == "matrices" and not self.weight_decay:
            raise InvalidValue(f"decay = {self.decay!r} says what weight_decay acts on, but weight_decay = 0")
        # the usual choices need no torch to be checked
        if self.optimizer not in {"AdamW", "Adam", "SGD"} or self.optimizer_args:
            from sparing.core.training.optimization import optimizer_class

            _checked("optimizer", self.optimizer, self.optimizer_args, optimizer_class)
        if self.scheduler not in {"", "cosine", "one_cycle"} or self.scheduler_args:
            from sparing.core.training.optimization import scheduler_class

            _checked("scheduler", self.scheduler, self.scheduler_args, scheduler_class)

    @property
    def slots(self) -> frozenset[str]:  # type: ignore[override]  # filled for this very training
        """The schedule and the optimizer, where others than the defaults are asked for here."""
        taken = {"scheduler"} if self.scheduler or self.warmup_steps else set()
        known: Any = type(self).__pydantic_fields__  # type: ignore[attr-defined]  # pydantic's decorator adds it
        for name in ("optimizer", "lr", "weight_decay", "decay", "optimizer_args"):
            if getattr(self, name) != known[name].get_default(call_default_factory=True):
                taken.add("optimizer")
        return frozenset(taken)

    def check(self, task: Task) -> None:
        """Lightning takes the devices, strategy and precision, where others than its defaults are asked for."""
        super().check(task)
        asked = (self.accelerator, self.devices, self.strategy, self.num_nodes, self.precision)
        if asked != ("auto", 1, "auto", 1, "32-true"):
            from sparing.core.training.loop import check_placement

            check_placement(self)

    def prepare(self, job: Job) -> tuple[nn.Module, TrainingPlan]:
        """The model to train and the plan to train it by. Subclasses override this, e.g. to add a loss term.

        Called with random generators seeded from the job, also when the result is read from the store, so it must be
        cheap (load what is costly inside the plan's factories) and always make the same model.
        """
        return job.fresh_model(), job.training

    def apply(self, job: Job) -> Job:
        """The job with the trained model, its predictor, and an emptied training plan."""
        from sparing.core.job import TrainingPlan
        from sparing.core.predictor import ModulePredictor
        from sparing.core.randomness import isolated_rng
        from sparing.core.store import JSON, TENSORS, All

        def prepare() -> tuple[nn.Module, TrainingPlan]:
            with isolated_rng(job.seed, self.name, "prepare"):
                return self.prepare(job)

        def compute() -> dict[str, Any]:
            model, plan = prepare()
            result = fit(model, job.task, job.train, job.val, self, plan, job.seed, job.store.progress("model"))
            return {"weights": dict(result.model.state_dict()), "record": result.record()}

        stored = job.store.once("model", compute, All({"weights": TENSORS, "record": JSON}))
        trained, _ = prepare()
        load_weights(trained, stored["weights"])
        result = FitResult.of(trained, stored["record"])
        self.report(job, result)
        return job.replace(model=trained, predictor=ModulePredictor(trained, job.task), training=TrainingPlan())

    def report(self, job: Job, result: FitResult) -> None:
        """Tell the ledger what the training took and how it went."""
        job.record("training samples", result.samples, "", better="lower")
        job.record("optimizer steps", result.steps, "", better="lower")
        if result.best_epoch is not None:
            job.record("best epoch", result.best_epoch, "", better="")
        if result.skipped:
            job.record("skipped batches", result.skipped, "", better="lower")
        for name, (value, unit, how, better) in result.figures.items():
            job.record(name, value, unit, how, better)
        job.notes.curves.update(result.curves)
        job.notes.remarks.extend(result.remarks)


def _checked(field: str, name: str, args: dict[str, Any], check: Callable[[str, dict[str, Any]], Any]) -> None:
    """Name the fields that ``check`` refuses."""
    try:
        check(name, args)
    except InvalidValue as error:
        given = f"{field} = {name!r}" + (f", {field}_args = {args!r}" if args else "")
        raise InvalidValue(f"{given}: {error}") from None


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Fill ``model``; raises :class:`IncompatibleStep` when the training left a model of another structure."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise IncompatibleStep(
            f"the trained model has another structure than the one the training was given; a model_wraps entry must "
            f"undo what it changed: {error}"
        ) from error
