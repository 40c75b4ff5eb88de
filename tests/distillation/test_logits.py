from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Subset

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.job import Job
from sparing.core.predictor import ModulePredictor, build_model, to_onnx
from sparing.core.store import Store
from sparing.core.training import Train
from sparing.distillation.logits import Distil, distillation_loss, distillation_term
from sparing.tasks.images.digits import Digits

STUDENT = {"name": "convnet", "widths": [4, 8]}
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.01}


def by_definition(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """T² Σᵢ pᵢ log(pᵢ/qᵢ), pᵢ = exp(vᵢ/T)/Σⱼ exp(vⱼ/T): eq. 1 of the paper, row by row, in double precision."""
    total = 0.0
    for z, v in zip(student.astype(np.float64), teacher.astype(np.float64), strict=True):
        p = np.exp(v / temperature) / np.exp(v / temperature).sum()
        q = np.exp(z / temperature) / np.exp(z / temperature).sum()
        total += float((p * np.log(p / q)).sum())
    return temperature**2 * total / len(student)


@given(rows=st.integers(1, 4), classes=st.integers(2, 6), temperature=st.floats(0.5, 20), seed=st.integers(0, 999))
def test_the_loss_is_the_papers(rows: int, classes: int, temperature: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    student, teacher = generator.standard_normal((2, rows, classes)) * 3
    found = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert float(found) == pytest.approx(by_definition(student, teacher, temperature), rel=1e-9, abs=1e-12)
    total = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature, reduction="sum")
    assert float(total) == pytest.approx(float(found) * rows)


def test_its_gradient_is_t_times_the_difference_of_probabilities() -> None:
    torch.manual_seed(0)
    student, teacher, temperature = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True), 4.0
    distillation_loss(student, teacher, temperature).backward()
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / 3  # eq. 2 · T²
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_classes_may_lie_in_another_dimension() -> None:
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    last = [logits.movedim(1, -1) for logits in (student, teacher)]
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), distillation_loss(*last, 2.0, dim=-1))


def test_wrong_arguments_name_what_disagrees() -> None:
    with pytest.raises(InvalidValue, match=r"\(2, 3\).*\(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)
    with pytest.raises(InvalidValue, match="temperature = 0"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


@pytest.fixture(scope="module")
def task() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def teacher(task: Digits) -> ModulePredictor:
    torch.manual_seed(1)
    return ModulePredictor(build_model("convnet", task, widths=[8, 16]), task)


def test_module_and_onnx_teachers_teach_the_same(task: Digits, teacher: ModulePredictor) -> None:
    batch = (task.example_input(4)[0], torch.tensor([1, 2, 3, 4]))
    outputs = torch.randn(4, 10)
    terms = [distillation_term(one, task, 3.0, 0.7) for one in (teacher, to_onnx(teacher, task=task))]
    values = [term(torch.tensor(2.0), outputs, batch, nn.Identity()) for term in terms]
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
    soft = distillation_loss(outputs, torch.from_numpy(teacher(batch[0])), 3.0)
    torch.testing.assert_close(values[0], 0.3 * 2.0 + 0.7 * soft)
    with pytest.raises(IncompatibleStep, match="tuple"):
        terms[0](torch.tensor(2.0), (outputs,), batch, nn.Identity())


def job_of(task: Digits, model: nn.Module, tmp_path: Path, teacher: ModulePredictor, name: str) -> Job:
    splits = task.splits(None)
    return Job(
        task=task,
        train=Subset(splits.train, range(256)),
        val=Subset(splits.val, range(32)),
        calibration=splits.calibration,
        model=model,
        seed=3,
        store=Store(tmp_path / name).bind(name, seed=3),
        capabilities=task.capabilities,
        earlier={"big": teacher},
    )


def weights(job: Job) -> dict[str, torch.Tensor]:
    return dict(job.model.state_dict())


def test_weight_zero_is_train_bit_for_bit_and_another_weight_is_not(
    task: Digits, teacher: ModulePredictor, tmp_path: Path
) -> None:
    from sparing.core.randomness import isolated_rng

    with isolated_rng("model", 3):  # as a recipe that names the student as its model
        model = build_model("convnet", task, widths=[4, 8])
    trained = weights(Train(**QUICK).apply(job_of(task, model, tmp_path, teacher, "train")))
    big = task.default_model()
    control = weights(
        Distil(teacher="big", weight=0, model=STUDENT, **QUICK).apply(job_of(task, big, tmp_path, teacher, "control"))
    )
    assert trained.keys() == control.keys()
    assert all(torch.equal(trained[name], control[name]) for name in trained)
    job = job_of(task, big, tmp_path, teacher, "taught")
    taught = Distil(teacher="big", weight=0.5, model=STUDENT, **QUICK).apply(job)
    assert not all(torch.equal(trained[name], weights(taught)[name]) for name in trained)
    assert taught.predictor is not None
    assert any("'big'" in remark for remark in job.notes.remarks)


def test_a_student_comes_to_agree_with_its_teacher(task: Digits, teacher: ModulePredictor, tmp_path: Path) -> None:
    """The teacher is random, so agreement with it cannot come from the labels."""
    images = np.stack([np.asarray(task.splits(None).val[index][0]) for index in range(100)])
    settings: dict[str, Any] = {**QUICK, "epochs": 6, "temperature": 2.0, "model": STUDENT}
    agree = {}
    for weight in (0.0, 1.0):
        job = job_of(task, task.default_model(), tmp_path, teacher, f"weight{weight}")
        student = Distil(teacher="big", weight=weight, **settings).apply(job).predictor
        assert student is not None
        agree[weight] = float((student(images).argmax(1) == teacher(images).argmax(1)).mean())
    assert agree[1.0] > agree[0.0] + 0.2


def test_a_saved_folder_may_teach(task: Digits, teacher: ModulePredictor, tmp_path: Path) -> None:
    folder = teacher.save(tmp_path / "teacher")
    results = [
        weights(step.apply(job_of(task, build_model("convnet", task, widths=[4, 8]), tmp_path, teacher, name)))
        for name, step in {
            "row": Distil(teacher="big", model=STUDENT, **QUICK),
            "folder": Distil(teacher_folder=folder, model=STUDENT, **QUICK),
        }.items()
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "teacher_folder"),
        ({"teacher": "a", "teacher_folder": "b"}, "one of"),
        ({"teacher": "a", "model": "convnt"}, "'convnet'"),
        ({"teacher": "a", "model": {"widths": [4]}}, "'name'"),
        ({"teacher": "a", "model": 3}, "module is expected"),
        ({"teacher": "a", "temperature": 0}, "temperature"),
        ({"teacher": "a", "weight": 1.5}, "weight"),
        ({"teacher": "a", "temprature": 1}, "'temperature'"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        Distil(**fields)


def test_an_unknown_row_is_named(task: Digits, teacher: ModulePredictor, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="'big'"):
        Distil(teacher="bog", model=STUDENT, **QUICK).apply(
            job_of(task, task.default_model(), tmp_path, teacher, "unknown")
        )
