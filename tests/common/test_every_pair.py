"""Every step after every other: the pair runs, or is refused with the reason; it never crashes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from common_settings import STEPS

from sparing import run
from sparing.core.errors import SparingError
from sparing.core.store import Store
from sparing.testing import QUICK


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all pairs, so that what they begin with is made once."""
    return Store(tmp_path_factory.mktemp("pairs") / "store")


def joined(these, others):
    """These steps and the others, of which those that do the same for both cases have the same id."""
    ids = {step.id for step in these}
    return [*these, *(step for step in others if step.id not in ids)]


def without_checkpoints(step):
    """The cases keep a state after each batch, for the check of kills; here that is time spent on nothing."""
    fields = {field.name for field in dataclasses.fields(step)}
    return dataclasses.replace(step, checkpoint_every_batches=None) if "checkpoint_every_batches" in fields else step


@pytest.mark.parametrize(("first", "second"), list(itertools.product(STEPS, STEPS)))
def test_pair(first, second, store):
    one, two = STEPS[first], STEPS[second]
    before, after = joined(one.before, two.before), joined(two.after, one.after)
    steps = [*before, dataclasses.replace(one.step, id="one"), dataclasses.replace(two.step, id="two"), *after]
    steps = [without_checkpoints(step) for step in steps]
    refused = ""
    try:
        done = run(task=one.task(), steps=steps, meter=QUICK, store=store)
        assert done.ledger.ids == tuple(step.id for step in steps)
    except SparingError as error:
        refused = "\n".join([str(error), *getattr(error, "__notes__", ())])
    # a step that closes one of the cases may find that the other's task has nothing for it
    named = ("one", "two", *(step.id for step in after))
    assert not refused or any(f"'{id_}'" in refused for id_ in named), f"refused, but which step? {refused}"
