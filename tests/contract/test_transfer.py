"""Guest: pre-train on one task, go on with another; differences are formed between rows of one task only."""

from __future__ import annotations

import pytest
import torch
from harness import Points, go, survives_kills

from sparing import Quantize
from sparing.core.errors import IncompatibleStep, RecipeError
from sparing.core.training import Train
from sparing.core.transfer import Transfer


class Target(Points):
    """Few other points of the same kind."""

    name = "target"

    def __init__(self) -> None:
        super().__init__(seed=0, spread=2.0)


class Wider(Points):
    """Points whose inputs no model of the others takes."""

    name = "wider"

    def example_input(self, batch: int = 2):
        return (torch.zeros(batch, 7),)


PRE = Train(id="pretrain", epochs=4, batch_size=16, lr=0.02, checkpoint_every_batches=3)
FINE = Train(id="finetune", epochs=2, batch_size=16, lr=0.01, checkpoint_every_batches=3)


def test_rows_of_two_tasks_are_never_compared(tmp_path):
    done = survives_kills(go(Points(), PRE, Transfer(task=Target()), FINE, Train(id="more", epochs=1)), tmp_path)
    assert [row.task for row in done.ledger.rows] == ["points", "target", "target", "target"]
    pre, moved, fine, more = done.ledger.summary()
    assert pre.to_first is None
    assert moved.to_first is None  # no model is measured when the task changes
    assert fine.to_previous is None or fine.previous == "transfer"
    assert more.to_previous is not None
    assert more.first in {"transfer", "finetune"}
    assert done.ledger.difference("pretrain", "finetune") is None
    assert set(done.ledger.tasks) == {"points", "target"}
    assert done.job.task.name == "target"


def test_what_was_learned_is_kept(tmp_path):
    pre = go(Points(), PRE)(tmp_path / "pre").job.model.first.weight
    moved = go(Points(), PRE, Transfer(task=Target()), Train(epochs=1, lr=1e-12))(
        tmp_path / "moved"
    ).job.model.first.weight
    torch.testing.assert_close(moved, pre, rtol=0, atol=1e-6)


def test_two_tasks_of_one_name_are_refused_since_rows_know_their_task_by_name(tmp_path):
    with pytest.raises(
        RecipeError, match=r"steps\[1\]: 'transfer' changes the task to one that is also called 'points'"
    ):
        go(Points(), PRE, Transfer(task=Points(seed=9)), FINE)(tmp_path)


def test_a_model_that_does_not_fit_the_new_task_is_refused(tmp_path):
    with pytest.raises(IncompatibleStep, match="does not run on an input of the task 'wider'"):
        go(Points(), PRE, Transfer(task=Wider()), FINE)(tmp_path)


def test_after_the_change_the_model_needs_training_again(tmp_path):
    with pytest.raises(RecipeError, match=r"'quantize' needs 'trained'.*steps that give it:.*train") as caught:
        go(Points(), PRE, Transfer(task=Target()), Quantize(), FINE, Quantize(id="again"))(tmp_path)
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "out").exists()
