"""Streams of tasks: which samples and labels they hold, what loss and figures look at, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import sparing
from sparing.core.collation import batches_of
from sparing.core.errors import InvalidValue
from sparing.core.predictor import ModulePredictor, build_model
from sparing.data.permuted import PermutedImages
from sparing.tasks.continual import Continual
from sparing.tasks.images.digits import Digits


@pytest.fixture(scope="module")
def permuted() -> Continual:
    return Continual(of="digits", tasks=3)


def test_every_task_has_every_image_in_an_order_of_its_own(permuted):
    plain, stream = Digits().splits(), permuted.splits()
    assert len(stream.train) == 3 * len(plain.train)
    assert isinstance(stream.train.source, PermutedImages)
    orders = stream.train.source.permutations
    assert len({tuple(order) for order in orders}) == 3
    for index in (0, 7):
        image, label = plain.val[index]
        for number in range(3):
            moved, block_label = stream.val[3 * index + number]
            assert block_label == label + 10 * number
            assert torch.equal(moved.flatten(), image.flatten()[orders[number]])
    assert torch.equal(stream.test[5][0], Continual(of="digits", tasks=3).splits().test[5][0])
    assert not torch.equal(stream.test[5][0], Continual(of="digits", tasks=3, seed=1).splits().test[5][0])


def test_no_pixel_is_kept_twice(permuted):
    train = permuted.splits().train
    assert train.source.images.source is permuted.of.splits().train.source


def test_a_permuted_image_has_a_place_for_messages(permuted):
    source = permuted.splits().val.source
    row = permuted.of.splits().val.rows[2]
    assert source.where(7) == f"digits: record {row} under permutation 2"


def test_classes_are_cut_into_blocks_and_stay_what_they_are():
    task = Continual(of="digits", stream="classes", tasks=5)
    assert task.class_blocks == (range(0, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 10))
    assert task.labels == Digits().labels
    assert task.splits().train is task.of.splits().train
    assert build_model("mlp", task, widths=[4]).head.out_features == 10


def test_the_loss_looks_at_the_block_of_each_sample(permuted):
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 30, generator=draw), torch.tensor([0, 9, 10, 15, 29, 20])
    masked = torch.full_like(logits, -1e11)
    for row, label in enumerate(labels.tolist()):
        block = slice(label // 10 * 10, label // 10 * 10 + 10)
        masked[row, block] = logits[row, block]
    batch = (torch.zeros(6, 1, 8, 8), labels)
    torch.testing.assert_close(permuted.loss(logits, batch), cross_entropy(masked, labels))
    shares = torch.nn.functional.one_hot(labels, 30).float()
    torch.testing.assert_close(permuted.loss(logits, (batch[0], shares)), cross_entropy(masked, labels))
    logits.requires_grad_(True)
    permuted.loss(logits, batch).backward()
    assert (logits.grad[masked == -1e11] == 0).all()
    assert (logits.grad[masked != -1e11] != 0).all()


def test_the_loss_of_a_mixture_is_over_the_blocks_it_has_a_share_of(permuted):
    logits = torch.zeros(1, 30)
    shares = torch.zeros(1, 30)
    shares[0, 0], shares[0, 12] = 0.5, 0.5
    assert permuted.loss(logits, (None, shares)).item() == pytest.approx(np.log(20))


def test_a_sample_is_right_when_it_is_right_among_the_classes_of_its_task(permuted):
    split = permuted.splits().test
    targets = split.labels

    class Answers:
        def __init__(self) -> None:
            self.at = 0

        def __call__(self, images):
            rows = np.arange(self.at, self.at + len(images))
            self.at += len(images)
            logits = np.zeros((len(images), 30))
            label = targets[rows]
            # task 1: right; task 2: always its first class; task 3: right, though a class of task 1 scores higher
            logits[np.arange(len(rows)), np.where(label // 10 == 1, 10, label)] = 1
            logits[label // 10 == 2, 0] = 2
            return logits

    found = permuted.evaluate(Answers(), split)
    zeros = float((targets[targets // 10 == 1] == 10).mean())
    assert [found.metrics[f"accuracy of task {number}"] for number in (1, 2, 3)] == [1, zeros, 1]
    assert found.metrics["accuracy"] == pytest.approx((2 + zeros) / 3)
    assert found.per_unit.mean() == pytest.approx(found.metrics["accuracy"])


def test_the_mean_is_over_tasks_and_not_over_samples():
    task = Continual(of="digits", stream="classes", tasks=2)
    split = task.splits().test
    rows = np.flatnonzero(split.labels < 5).tolist() + np.flatnonzero(split.labels >= 5)[:10].tolist()
    few = split.subset(rows)
    labels = split.labels[rows]
    answers = np.where(np.arange(len(rows)) % 3 == 0, labels, labels // 5 * 5 + (labels + 1) % 5)  # a third is right
    found = task.evaluate(lambda images: np.eye(10, dtype=np.float32)[answers], few)
    by_task = [found.metrics[f"accuracy of task {number}"] for number in (1, 2)]
    assert min(by_task) > 0
    assert found.metrics["accuracy"] == pytest.approx(np.mean(by_task))
    assert found.per_unit.mean() == pytest.approx(found.metrics["accuracy"])
    assert len(np.unique(found.per_unit)) == 3  # wrong, or right in either task


def test_a_model_that_answers_nothing_finite_is_refused(permuted):
    few = permuted.splits().test.subset(range(6))
    with pytest.raises(InvalidValue, match="the output for unit 0 is not finite"):
        permuted.evaluate(lambda images: np.full((len(images), 30), np.nan), few)
    with pytest.raises(InvalidValue, match=r"\(6, 30\) is expected"):
        permuted.evaluate(lambda images: np.zeros((len(images), 10)), few)
    with pytest.raises(InvalidValue, match=r"\(samples, 30\)"):
        permuted.loss(torch.zeros(2, 10), (None, torch.tensor([0, 1])))


def test_a_stream_of_texts():
    words = ["red", "green", "blue", "grey"]
    texts = [f"{words[number % 4]} is word number {number}" for number in range(60)]
    base = sparing.TextClassification("colours", texts, [number % 4 for number in range(60)], length=8, vocab_size=60)
    task = Continual(of=base, stream="classes", tasks=2)
    model = build_model("bert", task, dim=16, depth=1, heads=2)
    batch = next(batches_of(task.splits(None).train, 8, task.collate))
    outputs = task.outputs(model, batch)
    assert task.class_logits(outputs, batch)[0].shape == (8, 2)
    found = task.evaluate(ModulePredictor(model, task), task.splits(None).test)
    assert 0 <= found.metrics["accuracy"] <= 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"of": "digits", "stream": "shuffled"}, "stream = 'shuffled'"),
        ({"of": "digits", "tasks": 0}, "tasks = 0"),
        ({"of": "digits", "tasks": True}, "tasks = True"),
        ({"of": "digits", "seed": -1}, "seed = -1"),
        ({"of": "digits", "stream": "classes", "tasks": 3}, "10 classes of 'digits' cannot be cut into 3"),
        ({"of": "cora"}, "pixels of 'cora' cannot be permuted"),
        ({"of": "cora", "stream": "classes"}, "of = 'cora', whose capabilities are .*graph"),
        ({"of": {"name": "digits", "colour": 1}}, "of = 'digits' cannot be made with {'colour': 1}"),
        ({"of": 3}, "of = 3: a registered task's name"),
    ],
)
def test_what_makes_no_stream_is_refused(fields, says):
    with pytest.raises(InvalidValue, match=says):
        Continual(**fields).splits()
