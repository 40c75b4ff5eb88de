"""The loss for a loop of one's own, and the teacher in it; spans and masked words in the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sparing
from sparing.core.errors import IncompatibleStep, InvalidValue, RecipeError
from sparing.core.predictor import ModulePredictor, build_model
from sparing.core.task import IGNORED, Evaluation, Metric, Splits, Task
from sparing.distillation.logits import DistillationLoss, Teacher, distillation_loss, distillation_term
from sparing.tasks.text.masked_lm import MaskedLM
from sparing.testing import QUICK, TinyGraph, tiny_task


def test_both_terms_are_weighed_means() -> None:
    student, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    found = DistillationLoss(0.3, 0.7, 3.0)(student, teacher, labels)
    torch.testing.assert_close(
        found, 0.3 * cross_entropy(student, labels) + 0.7 * distillation_loss(student, teacher, 3.0)
    )


def test_of_masked_words_those_that_are_no_label_do_not_count() -> None:
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    labels = torch.tensor([[1, IGNORED, 2], [IGNORED, 6, IGNORED]])
    found = DistillationLoss(0.5, 0.5, 2.0)(student, teacher, labels)
    rows = labels != IGNORED
    expected = 0.5 * cross_entropy(student[rows], labels[rows]) + 0.5 * distillation_loss(
        student[rows], teacher[rows], 2
    )
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad is not None
    assert torch.equal(student.grad.abs().sum(-1) > 0, rows)
    nothing = DistillationLoss()(student, teacher, torch.full((2, 3), IGNORED))
    assert nothing.item() == 0
    nothing.backward()  # a batch in which nothing counts teaches nothing


def test_start_and_end_weigh_the_same() -> None:
    student, teacher = torch.randn(3, 9, 2), torch.randn(3, 9, 2)  # (N, positions, start and end)
    labels = torch.tensor([[0, 2], [4, 4], [7, 8]])
    found = DistillationLoss(0.5, 0.5, 2.0)(student.transpose(1, 2), teacher.transpose(1, 2), labels)
    terms = [
        0.5 * cross_entropy(student[..., i], labels[:, i])
        + 0.5 * distillation_loss(student[..., i], teacher[..., i], 2.0)
        for i in (0, 1)
    ]
    torch.testing.assert_close(found, sum(terms) / 2)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InvalidValue, match=r"alpha_kd = -1"):
        DistillationLoss(alpha_kd=-1)
    with pytest.raises(InvalidValue, match=r"temperature = 0"):
        DistillationLoss(temperature=0)
    with pytest.raises(InvalidValue, match=r"temperature = nan"):
        DistillationLoss(temperature=float("nan"))
    with pytest.raises(InvalidValue, match=r"labels of shape \(3,\) for logits of shape \(2, 4\); \(2,\)"):
        DistillationLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InvalidValue, match=r"\(2, 4\), the teacher's \(2, 5\)"):
        DistillationLoss()(torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))


def test_a_teacher_answers_and_never_learns() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[3].weight = nn.Parameter(model[3].weight.detach())
    teacher = Teacher(model)
    holder = nn.ModuleDict({"student": nn.Linear(3, 2), "teacher": teacher}).train()
    assert len(list(holder.parameters())) == 2  # the student's: an optimizer sees no other
    assert not any(module.training for module in teacher.modules())
    x = torch.randn(5, 3)
    torch.testing.assert_close(teacher(x), model.eval()(x).detach())
    assert not teacher(x).requires_grad
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not torch.equal(teacher.model[0].weight, model[0].weight)  # a copy  # type: ignore[index]
    tied = build_model("bert", vocab_size=9, dim=4, depth=1, heads=1, max_length=4, head="masked_lm")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(Teacher(tied)(ids), tied.eval()(ids).detach())


# --- the step on other tasks than classification


class Answers(Task):
    """The place of the largest number is the answer's start, that of the smallest its end."""

    name = "answers"
    metrics = (Metric("start"),)
    capabilities = frozenset({"span"})

    def splits(self, root: Any) -> Splits:
        def part(count: int, seed: int) -> Any:
            x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
            return torch.utils.data.TensorDataset(x, torch.stack([x.argmax(1), x.argmin(1)], 1))

        return Splits(part(64, 0), part(24, 1), part(16, 2), part(24, 3))

    def class_logits(self, outputs: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.transpose(1, 2).flatten(0, 1), batch[1].flatten()

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return cross_entropy(*self.class_logits(outputs, batch))

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        x, y = (torch.stack(column).numpy() for column in zip(*split, strict=True))
        hits = predictor(x)[..., 0].argmax(1) == y[:, 0]
        return Evaluation({"start": float(hits.mean())}, hits.astype(float))

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return (torch.randn(batch, 6, generator=torch.Generator().manual_seed(4)),)

    def default_model(self) -> nn.Module:
        return Spans()


class Spans(nn.Module):
    """(N, 6) → (N, 6, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12))

    def forward(self, x):
        return self.layers(x).unflatten(1, (6, 2))


QUICKLY: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.01}


def test_spans_are_distilled_and_weight_zero_is_train(tmp_path) -> None:
    def end(*steps):
        return run(*steps).job.model.state_dict()

    def run(*steps):
        return sparing.run(
            task=Answers(), steps=[sparing.Train(id="first", **QUICKLY), *steps], meter=QUICK, store=tmp_path
        )

    taught = run(sparing.Distil(teacher="first", weight=1.0, temperature=2.0, model=Spans, **QUICKLY))
    _, student = taught.ledger.rows
    assert student.figures["start"].value > 0.3
    control = end(sparing.Distil(teacher="first", weight=0, **QUICKLY))
    plain = end(sparing.Train(id="second", **QUICKLY))
    assert all(torch.equal(control[name], plain[name]) for name in plain)


def test_the_term_of_spans_is_the_mean_of_both() -> None:
    task = Answers()
    torch.manual_seed(0)
    teacher = ModulePredictor(Spans(), task)
    batch = (task.example_input(4)[0], torch.zeros(4, 2, dtype=torch.long))
    outputs = torch.randn(4, 6, 2)
    found = distillation_term(teacher, task, 2.0, 0.5)(torch.tensor(1.0), outputs, batch, nn.Identity())
    answers = torch.from_numpy(teacher(batch[0]))
    soft = sum(distillation_loss(outputs[..., i], answers[..., i], 2.0) for i in (0, 1)) / 2
    torch.testing.assert_close(found, 0.5 + 0.5 * soft)
    with pytest.raises(InvalidValue, match=r"\(4, 5, 2\), the teacher's \(4, 6, 2\)"):
        distillation_term(teacher, task, 2.0, 0.5)(torch.tensor(1.0), outputs[:, :5], batch, nn.Identity())


def test_of_masked_words_only_the_labelled_are_compared() -> None:
    task = MaskedLM()
    outputs, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORED, 0], [IGNORED, IGNORED, IGNORED]])
    rows, classes = task.class_logits(outputs, (None, labels))
    assert torch.equal(rows, outputs[0, [0, 2]])
    assert classes.tolist() == [1, 0]


def test_a_task_that_predicts_no_logits_is_refused(tmp_path) -> None:
    class Numbers(Answers):
        capabilities = frozenset({"regression"})
        class_logits = Task.class_logits

    with pytest.raises(RecipeError, match=r"'answers' are not known to be logits.*regression; classification is"):
        sparing.run(task=Numbers(), steps=[sparing.Train(id="a"), sparing.Distil(teacher="a")], meter=QUICK)

    class Own(Numbers):
        def class_logits(self, outputs, batch):
            return outputs.flatten(0, 1), batch[1]

    sparing.Distil(teacher="a").check(Own())
    with pytest.raises(IncompatibleStep, match="classification"):
        Numbers().class_logits(torch.zeros(1), ())
    rows, classes = tiny_task().class_logits(torch.zeros(2, 3, 4), (None, torch.zeros(2, 4)))
    assert rows.shape == (8, 3)
    assert classes.shape == (8,)


def test_of_a_graph_all_nodes_are_compared() -> None:
    task = TinyGraph()
    batch = task.collate([task.splits(None).train[i] for i in range(3)])
    outputs = torch.randn(len(batch[0]), 3)
    rows, classes = task.class_logits(outputs, batch)
    assert rows is outputs
    assert torch.equal(classes[batch[2]], batch[3])
    assert int((classes == IGNORED).sum()) == len(outputs) - 3
