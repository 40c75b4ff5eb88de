"""The step ``transfer``: another task and its data, the same model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from sparing.core import registry
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, SparingError, shown
from sparing.core.step import Stage, Step, step
from sparing.core.task import Task

if TYPE_CHECKING:
    from torch import nn

    from sparing.core.job import Job


def transfer_model(model: nn.Module, old: Task, new: Task) -> tuple[nn.Module, list[str]]:
    """(a copy of ``model`` for the task ``new``, names of the layers that begin anew).

    A model with a spec is built again with what the new task tells its builder, then takes over every tensor of equal
    shape. Only layers at the end of the model, in order of definition, may differ in shape: the head. For a model built
    by hand, the last linear layer is replaced when the tasks differ in their number of labels. Raises
    :class:`IncompatibleStep` naming a tensor and both its shapes when the trunk differs.
    """
    import copy

    import torch

    from sparing.core.predictor import build_model, spec_of

    spec = spec_of(model)
    if spec is None:
        moved, begun = _new_head(copy.deepcopy(model), len(old.labels), len(new.labels))
    else:
        told = old.model_fields().keys() & new.model_fields().keys()  # what the new task does not tell stays as it was
        own = {name: value for name, value in spec.config.items() if name not in told}
        moved = build_model(spec.builder, new, **own)
        begun = _take_over(moved, model.state_dict(), f"{old.name} → {new.name}")
    try:
        with torch.no_grad():
            copy.deepcopy(moved).eval()(*new.example_input(2))
    except (RuntimeError, TypeError, ValueError) as error:
        raise IncompatibleStep(f"the model does not run on an input of the task {new.name!r}: {error}") from error
    return moved, begun


def build_on(model: nn.Module, old: Task, new: Task, wanted: str | dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """(another model for the task ``new``, on ``model`` as its backbone; names of its layers that begin anew).

    ``wanted`` names a registered model with a field ``backbone`` and a method ``load_backbone``, as detectors and
    segmenters have; its backbone is built with the fields of ``model`` and takes over its weights. Raises
    :class:`IncompatibleStep` for a model built by hand and for one that cannot stand on another.
    """
    from sparing.core.predictor import build_model, spec_of
    from sparing.core.predictor.module import named_model

    spec = spec_of(model)
    if spec is None:
        raise IncompatibleStep(
            f"{type(model).__name__} was built by hand, so it cannot be built again as a backbone: make it with "
            "build_model"
        )
    name, fields = named_model(wanted, "model")
    trunk = {field: value for field, value in spec.config.items() if field not in old.model_fields()}
    moved = build_model(name, new, **{"backbone": {"name": spec.builder, **trunk}, **fields})
    load: Any = getattr(moved, "load_backbone", None)
    if load is None:
        raise IncompatibleStep(f"the model {name!r} has no load_backbone, so it cannot stand on {spec.builder!r}")
    load(model.state_dict())
    begun = [child for child, part in moved.named_children() if child != "backbone" and part.state_dict()]
    return moved, begun


def _take_over(moved: nn.Module, state: dict[str, Any], where: str) -> list[str]:
    import torch

    own = moved.state_dict()
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in own))
    different = {
        name.rpartition(".")[0]: name for name in own if name not in state or state[name].shape != own[name].shape
    }
    first = next((index for index, layer in enumerate(layers) if layer in different), len(layers))
    kept_after = [layer for layer in layers[first:] if layer not in different]
    if first == 0 or kept_after:
        name = different[layers[first]]
        before = tuple(state[name].shape) if name in state else "absent"
        raise IncompatibleStep(
            f"{where}: {name!r} is {before} in the model and {tuple(own[name].shape)} for the new task, and it is not "
            "part of the model's last layers; only a head may begin anew"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name.rpartition(".")[0] not in different:
                tensor.copy_(state[name])
    return list(different)


def _new_head(model: nn.Module, old_labels: int, new_labels: int) -> tuple[nn.Module, list[str]]:
    from torch import nn

    if old_labels == new_labels:
        return model, []
    linear = [(name, module) for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not linear or linear[-1][1].out_features != old_labels:
        found = f"its last linear layer gives {linear[-1][1].out_features}" if linear else "it has no linear layer"
        raise IncompatibleStep(
            f"the tasks have {old_labels} and {new_labels} labels, and the model's head cannot be told: {found}; make "
            "the model with build_model, so that it can be built for another task"
        )
    name, head = linear[-1]
    parent, _, attribute = name.rpartition(".")
    fresh = nn.Linear(head.in_features, new_labels, head.bias is not None).to(head.weight)
    setattr(model.get_submodule(parent), attribute, fresh)
    return model, [name]


def named_task(wanted: str | Mapping[str, Any] | Task, where: str) -> Task:
    """The task that a field called ``where`` names: a task, a registered one's name, or {name: …, field: value}.

    Raises :class:`InvalidValue` when it cannot be made, and what the task itself raises.
    """
    if isinstance(wanted, Task):
        return wanted
    named: Mapping[str, Any] = {"name": wanted} if isinstance(wanted, str) else wanted
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise InvalidValue(
            f"{where} = {shown(wanted)}: a registered task's name is needed, for example {{name: digits}}"
        )
    fields = {key: value for key, value in named.items() if key != "name"}
    made = registry.resolve("tasks", named["name"])
    try:
        return made(**fields)
    except SparingError:
        raise
    except TypeError as error:
        raise InvalidValue(f"{where} = {named['name']!r} cannot be made with {fields}: {error}") from error


@step("transfer")
class Transfer(Step):
    """Go on with another task and its data; the model stays, but for a head that does not fit.

    Pre-train on one task, ``transfer``, then train on the other: fine-tuning. Ledger differences are formed between
    rows of one task only, and the job has no predictor until the model is trained again.
    """

    stage: ClassVar[Stage] = Stage.DATA
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    removes: ClassVar[frozenset[str]] = frozenset({"trained"})
    source: ClassVar[str] = "ours"

    task: str | dict[str, Any] | Task
    """The task to go on with: a registered one's name or {name: …, field: value}, or a task made in Python."""
    model: str | dict[str, Any] | None = None
    """A model that takes the trained one as its backbone, such as ssdlite or {name: segmenter, field: value}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_task()
        if self.model is not None:
            from sparing.core.predictor.module import named_model

            named_model(self.model, "model")

    @cached_property
    def _target(self) -> Task:
        return named_task(self.task, "task")

    def target_task(self) -> Task:
        """The task this step changes the job to."""
        return self._target

    def apply(self, job: Job) -> Job:
        """The job on the new task's training, validation and calibration data, without a predictor."""
        from sparing.core.randomness import isolated_rng

        if not job.training.empty:
            raise IncompatibleStep(
                f"{self.id!r}: the training plan made for the task {job.task.name!r} has not been used; train first"
            )
        task = self.target_task()
        if task is job.task or (task.name, task.fingerprint()) == (job.task.name, job.task.fingerprint()):
            raise NoEffect(f"{self.id!r}: the job is on the task {task.name!r} already, with the same definition")
        splits = task.splits(job.root)
        with isolated_rng("transfer", job.seed, self.id):
            if self.model is None:
                model, begun = transfer_model(job.fresh_model(), job.task, task)
            else:
                model, begun = build_on(job.fresh_model(), job.task, task, self.model)
        job.notes.remarks.append(f"{job.task.name} → {task.name}; begun anew: {', '.join(begun) or 'no layer'}")
        return job.replace(
            task=task,
            train=splits.train,
            val=splits.val,
            calibration=splits.calibration,
            model=model,
            predictor=None,
        )
