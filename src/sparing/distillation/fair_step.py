"""The step ``distil_fair``: RELIANT (Dong et al. 2023) in a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.core.errors import DataError, IncompatibleStep, InvalidValue
from sparing.core.step import RowId, Stage, Step, step
from sparing.distillation.logits import check_teacher, teacher_of

if TYPE_CHECKING:
    from torch import nn
    from torch_geometric.data import Data

    from sparing.core.job import Job
    from sparing.core.predictor import Predictor
    from sparing.core.task import Task
    from sparing.distillation.frameworks import Framework, TeacherOutputs
    from sparing.distillation.reliant import FairDistiller

CURVE_POINTS = 100


@step("distil_fair")
class DistilFair(Step):
    """Distil a graph network into a student that treats two groups of nodes alike, by a proxy of bias.

    With ``alpha=0`` and ``proxy=false`` it is plain distillation by the same framework, the control; with
    ``proxy=false`` alone the fairness loss without the proxy. The student learns on the whole graph of the task: where
    an earlier step has condensed it, that step's graph taught the teacher.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"node_classification", "groups"})
    gives: ClassVar[frozenset[str]] = frozenset({"module", "trained"})
    source: ClassVar[str] = (
        "Dong et al. 2023, RELIANT: Fair Knowledge Distillation for Graph Neural Networks, SDM, arXiv:2301.01150"
    )

    teacher: RowId | None = None
    """The earlier row whose model teaches."""
    teacher_folder: Path | None = None
    """A saved model's folder, instead of an earlier row."""
    student: str | dict[str, Any] = Field(default_factory=lambda: {"name": "glnn", "hidden": 32, "hops": 2})
    """The student: a registered model's name, or {name: …, field: value}; ``cpf`` for the framework of that name, and
    for ``graphakd`` ``sgc_student``, as wide as the teacher's first layer."""
    framework: Literal["cpf", "graphakd", "glnn", "soft"] = "soft"
    """How it is distilled."""
    framework_args: dict[str, Any] = Field(default_factory=dict)
    """The framework's own fields: {lam: …} for ``glnn``, {temperature: …, label_weight: …} for ``soft``."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of the fairness loss; None: 10, for ``cpf`` 1000."""
    metric: Literal["sp", "eo"] = "sp"
    """What is to be equal: "sp", the shares of positive decisions; "eo", those among the positive."""
    proxy: bool = True
    """Whether there is a proxy of bias."""
    proxy_dim: int = Field(default=2, ge=1)
    """Columns of the proxy, q."""
    fair_nodes: Literal["train", "unlabelled", "all"] | None = None
    """The nodes that fairness is asked for; None: "unlabelled" for the student ``cpf``, which answers training nodes
    with their labels, and "train" for any other."""
    soft_step: Literal["reference", "legendre", "sigmoid"] = "reference"
    """The smooth stand-in for a decision."""
    epochs: int | None = Field(default=None, ge=1)
    """Steps of full batches; None, as for the following: the framework's."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better validation after which training ends."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of Adam."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of the student."""
    proxy_weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the proxy."""
    validate_every: int = Field(default=1, ge=1)
    """Epochs between validations; the best of them decides whose weights are handed on."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Epochs between the states from which a killed training goes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teacher(self.id, self.teacher, self.teacher_folder)
        self._named()
        if self.framework_args:
            self._framework()

    def _named(self) -> tuple[str, dict[str, Any]]:
        from sparing.core.predictor import named_model

        return named_model(self.student, f"{self.id}: student")

    def _framework(self) -> Framework:
        from sparing.distillation.frameworks import FRAMEWORKS, framework_settings

        kind = FRAMEWORKS[self.framework]
        known = framework_settings(kind)
        for name in self.framework_args:
            if name not in known:
                raise InvalidValue(
                    f"framework_args names {name!r}, which {self.framework!r} does not have; its fields: "
                    f"{', '.join(known) or 'none'}"
                )
        try:
            return kind(**self.framework_args)
        except (InvalidValue, TypeError) as error:
            raise InvalidValue(f"framework_args = {self.framework_args!r}: {error}") from None

    def check(self, task: Task) -> None:
        """The student can be built, has what the framework compares, and can be made fair on the nodes asked for."""
        from sparing.core.predictor import outline
        from sparing.distillation.reliant import check_embedding, check_fair_nodes

        super().check(task)
        if not self.needs <= task.capabilities:  # planning says so
            return
        fields = task.model_fields()
        built = outline(lambda: self._build(fields["in_features"], fields["num_classes"], fields.get("num_nodes", 1)))
        student, framework = self._student_in(built), self._framework()
        check_fair_nodes(student, self.fair_nodes, framework.alpha if self.alpha is None else self.alpha)
        if framework.needs_embedding:
            check_embedding(student)

    def _student_in(self, model: Any) -> nn.Module:
        """What is trained of the model that is handed on."""
        student: nn.Module = model.student if self.proxy else model
        return student

    def _build(self, in_features: int, num_classes: int, num_nodes: int) -> nn.Module:
        """The model that is handed on, untrained."""
        from sparing.core.predictor import build_model
        from sparing.models.gnn_students import FairStudent, student_fields

        name, own = self._named()
        told = student_fields(name, in_features, num_classes, self.proxy_dim if self.proxy else 0, num_nodes=num_nodes)
        if not self.proxy:
            return build_model(name, **told | own)
        student = {"name": name, **({"num_nodes": num_nodes} if "num_nodes" in told else {}), **own}
        return build_model(
            FairStudent, student=student, in_features=in_features, num_classes=num_classes, proxy_dim=self.proxy_dim
        )

    def apply(self, job: Job) -> Job:
        """The job with the trained student."""
        from sparing.core.predictor import ModulePredictor
        from sparing.core.randomness import isolated_rng
        from sparing.core.store import JSON, TENSORS, All
        from sparing.core.training.step import load_weights

        if not job.training.empty:
            raise IncompatibleStep(
                f"{self.id}: earlier steps changed the plan of the next training, which this step does not follow"
            )
        data = _graph_of(job)

        def build() -> nn.Module:
            with isolated_rng("model", job.seed):
                return self._build(data.x.shape[1], len(job.task.labels), len(data.x))

        def compute() -> dict[str, Any]:
            model = build()
            fitted = self._distiller(model, job, self._taught(job, data))
            fitted.fit(data, job.store.progress("student"), self.checkpoint_every)
            if fitted.proxy_ is not None:
                model.get_buffer("proxy").copy_(fitted.proxy_)
            record = {
                "history": [list(row) for row in fitted.history_],
                "validation": [list(row) for row in fitted.validation_],
                "best_epoch": fitted.best_epoch_,
                "alpha": fitted.alpha,
            }
            return {"weights": dict(model.state_dict()), "record": _without_nan(record)}

        stored = job.store.once("student", compute, All({"weights": TENSORS, "record": JSON}))
        model = build()
        load_weights(model, stored["weights"])
        self._report(job, stored["record"], len(data.x))
        return job.replace(model=model, predictor=ModulePredictor(model, job.task))

    def _distiller(self, model: nn.Module, job: Job, taught: TeacherOutputs) -> FairDistiller:
        from sparing.distillation.reliant import FairDistiller

        return FairDistiller(
            self._student_in(model),
            taught,
            self._framework(),
            self.alpha,
            self.metric,
            self.proxy,
            self.fair_nodes,
            self.soft_step,
            groups=(0, 1),
            positive=getattr(job.task, "positive", 1),
            proxy_dim=self.proxy_dim,
            epochs=self.epochs,
            patience=self.patience,
            lr=self.lr,
            weight_decay=self.weight_decay,
            proxy_weight_decay=self.proxy_weight_decay,
            validate_every=self.validate_every,
            seed=job.seed,
        )

    def _taught(self, job: Job, data: Data) -> TeacherOutputs:
        """What the teacher says of the graph."""
        import torch

        from sparing.core.predictor import ModulePredictor
        from sparing.distillation.frameworks import TeacherOutputs

        teacher: Predictor = teacher_of(job, self.teacher, self.teacher_folder)
        answers = torch.as_tensor(job.task.outputs(teacher, (data.x, data.edge_index))).to(torch.float32)
        embedding = None
        if self.framework == "graphakd":
            embed: Any = getattr(teacher.model, "embed", None) if isinstance(teacher, ModulePredictor) else None
            if embed is None:
                raise IncompatibleStep(
                    f"{self.id}: graphakd compares embeddings, which the teacher's predictor of kind {teacher.kind!r} "
                    "does not give; a module with the method embed is needed: gcn, gat or sage before any export"
                )
            with torch.no_grad():
                embedding = embed(data.x, data.edge_index)
        return TeacherOutputs(torch.log_softmax(answers, 1), embedding)

    def _report(self, job: Job, record: Mapping[str, Any], nodes: int) -> None:
        history = record["history"]
        job.record("optimizer steps", len(history), "", better="lower")
        job.record("training samples", len(history) * nodes, "", better="lower")
        job.record("best epoch", record["best_epoch"], "", better="")
        every = -(-len(history) // CURVE_POINTS)
        for place, name in enumerate(("distillation loss", "fairness loss", "fairness loss with the proxy")):
            curve = [(float(i + 1), history[i][place]) for i in range(0, len(history), every)]
            if curve[0][1] is not None:
                job.notes.curves[name] = curve
        taught = self.teacher or self.teacher_folder
        fair = f"{self.metric} at weight {record['alpha']:g}"
        proxied = f"a proxy of {self.proxy_dim} columns" if self.proxy else "no proxy"
        job.notes.remarks.append(f"taught by {str(taught)!r} through {self.framework}; {fair}, {proxied}")
        if getattr(job.train, "sens", None) is None:
            job.notes.remarks.append(f"the student learned on the task's own graph of {nodes} nodes")


def _without_nan(thing: Any) -> Any:
    """What was not computed becomes null."""
    if isinstance(thing, Mapping):
        return {name: _without_nan(value) for name, value in thing.items()}
    if isinstance(thing, list):
        return [_without_nan(value) for value in thing]
    return None if isinstance(thing, float) and thing != thing else thing


def _graph_of(job: Job) -> Data:
    """The graph to learn on, with groups, and the labels of the training and validation nodes alone."""
    import torch
    from torch_geometric.data import Data

    from sparing.core.collation import batches_of

    train = job.train if getattr(job.train, "sens", None) is not None else job.task.splits(job.root).train
    batches = {}
    for name, split in (("train", train), ("val", job.val)):
        if len(split) == 0:
            raise DataError(f"{job.task.name}: the split {name!r} holds no node")
        (batches[name],) = batches_of(split, len(split), job.task.collate)
    x, edge_index = batches["train"][:2]
    x = x.to_dense() if x.layout != torch.strided else x
    y = torch.full((len(x),), -1, dtype=torch.int64)
    masks = {}
    for name, batch in batches.items():
        nodes = batch[2]
        if int(nodes.max()) >= len(x):
            raise DataError(f"{job.task.name}: {name} names node {int(nodes.max())} of a graph of {len(x)}")
        y[nodes] = batch[3]
        masks[f"{name}_mask"] = torch.zeros(len(x), dtype=torch.bool)
        masks[f"{name}_mask"][nodes] = True
    return Data(x=x, edge_index=edge_index, y=y, sens=train.sens, **masks)
