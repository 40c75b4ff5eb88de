"""A user's own datasets, model, loss and metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.fingerprint import NoFingerprint, fingerprint
from sparing.tasks.custom import CustomTask

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(dim=1, keepdim=True)
TRAIN, TEST = TensorDataset(X[:40], Y[:40]), TensorDataset(X[40:], Y[40:])


def squared(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return ((outputs - targets) ** 2)[:, 0]


def largest(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.abs(outputs - targets).max())


def task(**changes: Any) -> CustomTask:
    fields: dict[str, Any] = {
        "train": TRAIN,
        "test": TEST,
        "model": nn.Linear(3, 1),
        "loss": nn.functional.mse_loss,
        "metrics": {"mse": squared, "largest": largest},
        "better": "lower",
    }
    return CustomTask("sums", **(fields | changes))


def predictor(weight: float) -> Any:
    return lambda inputs: weight * np.asarray(inputs).sum(axis=1, keepdims=True)


def test_metrics_are_taken_over_the_whole_split() -> None:
    made = task()
    result = made.evaluate(predictor(0.5), TEST)
    errors = (0.5 * Y[40:, 0].numpy()) ** 2
    assert result.per_unit is not None
    np.testing.assert_allclose(result.per_unit, errors, rtol=1e-4)
    assert result.metrics["mse"] == pytest.approx(errors.mean(), rel=1e-4)
    assert result.metrics["largest"] == pytest.approx(np.sqrt(errors.max()), rel=1e-4)
    assert [(metric.name, metric.better) for metric in made.metrics] == [("mse", "lower"), ("largest", "lower")]


def test_a_headline_that_is_one_number_has_no_units() -> None:
    made = task(headline="largest", better={"largest": "lower"})
    assert [(metric.name, metric.better) for metric in made.metrics] == [("largest", "lower"), ("mse", "higher")]
    assert made.evaluate(predictor(1.0), TEST).per_unit is None


def test_missing_parts_are_cut_from_train_for_good() -> None:
    splits = task().splits()
    assert (len(splits.train), len(splits.val), len(splits.calibration), len(splits.test)) == (34, 4, 2, 20)
    together = torch.cat(
        [torch.stack([part[i][0] for i in range(len(part))]) for part in (splits.train, splits.val, splits.calibration)]
    )
    assert sorted(together[:, 0].tolist()) == sorted(X[:40, 0].tolist())
    assert fingerprint(splits.val) == fingerprint(task().splits().val)
    assert splits.test is TEST


def test_given_parts_are_used_as_they_are() -> None:
    val = TensorDataset(X[:5], Y[:5])
    splits = task(val=val, calibration=val).splits()
    assert splits.val is val
    assert splits.train is TRAIN


def test_models_are_copied_or_made() -> None:
    live = nn.Linear(3, 1)
    copied = task(model=live).default_model()
    assert copied is not live
    assert torch.equal(copied.weight, live.weight)  # type: ignore[arg-type]
    assert isinstance(task(model=lambda: nn.Linear(3, 1)).default_model(), nn.Linear)
    named = CustomTask(
        "grey",
        TensorDataset(torch.zeros(9, 1, 28, 28), torch.zeros(9, dtype=torch.long)),
        TensorDataset(torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)),
        model="convnet",
        loss=nn.functional.cross_entropy,
        labels=("a", "b", "c"),
    )
    assert named.default_model().eval()(*named.example_input()).shape == (2, 3)
    with pytest.raises(InvalidValue, match="model made a int"):
        task(model=lambda: 3).default_model()


def test_labels_bring_the_figures_of_a_classifier() -> None:
    data = TensorDataset(X[:40], (Y[:40, 0] > 0).long())
    made = CustomTask("sign", data, data, model=nn.Linear(3, 2), loss=nn.functional.cross_entropy, labels=("-", "+"))
    assert made.capabilities == {"classification"}
    result = made.evaluate(lambda x: np.stack([-np.asarray(x).sum(1), np.asarray(x).sum(1)], 1), data)  # type: ignore[arg-type]
    assert result.metrics["accuracy"] == 1
    assert set(result.by_class) == {"-", "+"}


def test_outputs_and_targets_may_be_trees() -> None:
    class Pairs:
        def __len__(self) -> int:
            return 300

        def __getitem__(self, index: int) -> Any:
            return torch.full((2,), float(index)), {"a": float(index), "b": torch.ones(3)}

    def match(outputs: Any, targets: Any) -> np.ndarray:
        return (outputs["twice"][:, 0] == 2 * targets["a"]) & (targets["b"].shape == (300, 3))

    made = task(train=Pairs(), test=Pairs(), metrics={"match": match})
    result = made.evaluate(lambda inputs: {"twice": 2 * np.asarray(inputs)}, Pairs())  # type: ignore[arg-type]
    assert result.metrics["match"] == 1
    assert result.per_unit is not None
    assert len(result.per_unit) == 300


class NoLength:
    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([])


HOLES = X[:40].clone()
HOLES[17, 1] = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": NoLength()}, DataError, "sums: train is a NoLength; a map-style dataset with __len__"),
        ({"train": Stream()}, DataError, "sums: train"),
        ({"test": TensorDataset(X[:0], Y[:0])}, DataError, "sums: test is empty"),
        ({"val": []}, DataError, "sums: val is empty"),
        ({"train": [1, 2, 3]}, DataError, r"item 0 is a int; a pair \(input, target\)"),
        ({"train": TensorDataset(X)}, DataError, "item 0 is a tuple"),
        ({"train": TensorDataset(HOLES, Y[:40])}, DataError, "the input of item 17 holds NaN"),
        ({"test": None}, DataError, "sums: test is a NoneType"),
        ({"loss": "mse"}, InvalidValue, "loss is a str; a function"),
        ({"metrics": {}}, InvalidValue, "metrics is empty"),
        ({"metrics": {"mse": 3}}, InvalidValue, "mse is a int; a function"),
        ({"metrics": None}, InvalidValue, "give metrics, or at least two labels"),
        ({"headline": "mze"}, InvalidValue, "'mze' is no metric. Did you mean 'mse'"),
        ({"better": "bigger"}, InvalidValue, "'bigger'"),
        ({"better": {"mse2": "lower"}}, InvalidValue, r"better\['mse2'\]"),
        ({"model": 5}, InvalidValue, "model is a int"),
        ({"val_share": 1.5}, InvalidValue, "val_share = 1.5"),
        ({"loss_reduction": "max"}, InvalidValue, "loss_reduction = 'max'"),
    ],
)
def test_what_is_wrong_is_said_at_once(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        task(**changes)


def test_too_little_to_cut() -> None:
    with pytest.raises(DataError, match=r"train has 2 items, too few to cut val and calibration.*at least 3"):
        task(train=TensorDataset(X[:2], Y[:2])).splits()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda outputs, targets: float("nan"), "metric 'bad' is NaN"),
        (lambda outputs, targets: np.where(np.arange(20) == 4, np.inf, 0.0), "infinite for unit 4"),
        (lambda outputs, targets: np.zeros(7), r"shape \(7,\); one number, or one for each of the 20 units"),
        (lambda outputs, targets: "good", "returned <U4"),
        (lambda outputs, targets: None, "returned object"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(metric: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        task(metrics={"bad": metric}).evaluate(predictor(1.0), TEST)


def test_metrics_may_return_tensors_and_booleans() -> None:
    def near(outputs: np.ndarray, targets: np.ndarray) -> Any:
        return torch.from_numpy(np.abs(outputs - targets)[:, 0] < 1e-3)

    assert task(metrics={"near": near}).evaluate(predictor(1.0), TEST).metrics == {"near": 1.0}


class Opaque:
    def __init__(self) -> None:
        self.made = object()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


def test_data_without_content_needs_a_version() -> None:
    with pytest.raises(NoFingerprint):
        fingerprint(task(train=Opaque()).splits().train)
    one, same, two = (task(train=Opaque(), version=version).splits() for version in ("1", "1", "2"))
    assert fingerprint(one.train) == fingerprint(same.train) != fingerprint(two.train)
    assert len({fingerprint(part) for part in (one.train, one.val, one.calibration, one.test)}) == 4


def test_the_tasks_fingerprint_follows_its_functions() -> None:
    base = task().fingerprint()
    assert base == task().fingerprint()
    assert base != task(metrics={"mse": largest, "largest": largest}).fingerprint()
    assert base != task(better="higher").fingerprint()
    assert base != task(loss=nn.functional.l1_loss).fingerprint()
    assert base != task(version="2").fingerprint()


def test_an_item_of_a_cut_split_is_told_by_its_number_in_the_users_data() -> None:
    class Torn(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if index == bad:
                raise OSError("torn page")
            return super().__getitem__(index)

    bad = -1
    split = task(train=Torn(X[:40], Y[:40]), version="1").splits().val
    bad = int(split.dataset.indices[2])
    with pytest.raises(DataError, match=rf"^sample {bad} cannot be read: OSError: torn page$"):
        list(batches_of(split, 8))
