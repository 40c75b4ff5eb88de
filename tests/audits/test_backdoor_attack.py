"""The attack through condensers' callbacks: whom it poisons, when it moves, what it says of itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backdoor_cases import CLASSES, PIXELS, SIZE, TARGET, factory, pictures, white_patch
from torch_geometric.data import Data

from sparing.audits.backdoor.attack import CondensationBackdoor, poisoned_count
from sparing.audits.backdoor.subgraphs import SubgraphTrigger
from sparing.audits.backdoor.triggers import OptimisedTrigger
from sparing.condensation.graphs import GraphSetCondenser
from sparing.condensation.images import ImageCondenser
from sparing.condensation.saved import load_condensed, save_condensed
from sparing.condensation.unrolled import UnrolledCondenser
from sparing.core.errors import InvalidValue
from sparing.models.gnn import GraphClassifier

SHAPE = (1, SIZE, SIZE)


def doorping(**given) -> CondensationBackdoor:
    trigger = OptimisedTrigger(SHAPE, PIXELS, 4, max_steps=3, alpha=1000)
    return CondensationBackdoor(trigger, TARGET, 0.1, "doorping", **given)


def condenser(**given) -> ImageCondenser:
    small = {"n_per_class": 2, "outer_steps": 3, "inner_steps": 1, "max_iter": 2, "batch_real": 8, "batch_train": 16}
    return ImageCondenser(**{"method": "dc", "network": factory, "checkpoint_every": 1} | small | given)


class Kept:
    """A keeper that remembers its states."""

    def __init__(self, state=None):
        self.state, self.states = state, []

    def load(self):
        return self.state

    def save(self, state):
        self.states.append(torch.load(self._bytes(state), weights_only=True))

    def _bytes(self, state):
        import io

        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return buffer


def test_a_portion_is_stamped_and_relabelled_and_the_rest_is_as_it_was():
    images = pictures(60, 0)
    given = (images.x.clone(), images.y.clone())
    attack = CondensationBackdoor(white_patch(), 3, 0.11)
    x, y = attack.on_data_ready(given)
    rows = attack.poisoned
    assert len(rows) == len(set(rows.tolist())) == 6
    assert (y[rows] == 3).all()
    assert torch.equal(x[rows], white_patch().apply(images.x[rows]))
    rest = torch.ones(60, dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(x[rest], images.x[rest])
    assert torch.equal(y[rest], images.y[rest])
    assert torch.equal(given[0], images.x)
    assert torch.equal(given[1], images.y)
    already = int((images.y[rest] == 3).sum())
    assert attack.effective_share == 6 / (6 + already)
    again = CondensationBackdoor(white_patch(), 3, 0.11)
    again.on_data_ready(given)
    assert torch.equal(again.poisoned, rows)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target": CLASSES}, "target = 6 is no class; 0 to 5"),
        ({"target": -1}, "target = -1"),
        ({"portion": 0.0}, "portion = 0.0"),
        ({"portion": 1.0}, "portion = 1.0"),
        ({"portion": 0.01}, "less than one"),
    ],
    ids=str,
)
def test_what_cannot_be_poisoned_is_refused(arguments, named):
    with pytest.raises(InvalidValue, match=named):
        condenser(callbacks=[CondensationBackdoor(white_patch(), **arguments)]).fit(*pictures(60, 0))


def test_wrong_modes_and_pixels_are_refused():
    with pytest.raises(InvalidValue, match="PatchTrigger; an OptimisedTrigger"):
        CondensationBackdoor(white_patch(), mode="doorping")
    with pytest.raises(InvalidValue, match="'moving'"):
        CondensationBackdoor(white_patch(), mode="moving")
    x, y = pictures(60, 0)
    with pytest.raises(InvalidValue, match="training images: image 0"):
        CondensationBackdoor(white_patch(), portion=0.1).on_data_ready((x + 10, y))
    assert poisoned_count(50_000, 0.01) == 500


def test_doorping_moves_between_the_updates_of_dc_and_the_images_follow():
    attack = doorping()
    made = attack.attach(condenser())
    first = attack.trigger.image.clone()
    made.fit(*pictures(60, 0))
    assert attack.trigger.history.updates == 2 * (3 - 1)
    assert not torch.equal(attack.trigger.image, first)
    rows = attack._carriers[attack.poisoned]
    assert torch.equal(rows, attack.trigger.apply(rows))
    said = made.provenance_
    assert said["poisoned"] is True
    assert said["trigger"]["updates"] == 4
    assert "note" not in said


def test_the_attack_changes_what_is_condensed():
    x, y = pictures(60, 0)
    clean = condenser().fit(x, y).images_
    attack = CondensationBackdoor(white_patch(4), TARGET, 0.5)
    assert not torch.equal(attack.attach(condenser()).fit(x, y).images_, clean)


def test_one_outer_step_never_moves_the_trigger_and_says_so():
    attack = doorping()
    made = attack.attach(condenser(n_per_class=1, outer_steps=1, inner_steps=1)).fit(*pictures(60, 0))
    assert attack.trigger.history.updates == 0
    assert "never updated" in made.provenance_["note"]


def test_it_works_with_dm_and_with_dd():
    attack = doorping()
    attack.attach(ImageCondenser("dm", 2, network=factory, max_iter=3, batch_real=8)).fit(*pictures(60, 0))
    assert attack.trigger.history.updates == 3
    attack = doorping()
    unrolled = UnrolledCondenser(1, 2, 1, network=factory, epochs=1, batch_real=30)
    attack.attach(unrolled).fit(*pictures(60, 0))
    assert attack.trigger.history.updates == 2
    assert unrolled.provenance_["poisoned"] is True


def test_an_interrupted_attack_goes_on_as_if_it_had_not_been():
    whole, keeper = doorping(), Kept()
    images = whole.attach(condenser()).fit(*pictures(60, 0), keeper=keeper).images_
    resumed = doorping()
    again = resumed.attach(condenser()).fit(*pictures(60, 0), keeper=Kept(keeper.states[0])).images_
    assert torch.equal(again, images)
    assert torch.equal(resumed.trigger.image, whole.trigger.image)
    assert resumed.provenance == whole.provenance


def test_a_poisoned_set_cannot_be_saved_unmarked(tmp_path):
    attack = CondensationBackdoor(white_patch(), portion=0.1)
    made = attack.attach(condenser()).fit(*pictures(60, 0))
    for said in ({}, {"poisoned": "yes"}, {"settings": made.settings()}):
        with pytest.raises(InvalidValue, match="poisoned = true"):
            save_condensed(tmp_path / "set", made.condensed_, said)
    assert not (tmp_path / "set").exists()
    save_condensed(tmp_path / "set", made.condensed_, made.provenance_)
    again = load_condensed(tmp_path / "set")
    assert again.provenance["trigger"]["size"] == 2
    with pytest.raises(InvalidValue, match="poisoned = true"):  # nor when it comes from a file
        save_condensed(tmp_path / "copy", again.data, {"note": "mine"})
    save_condensed(tmp_path / "clean", condenser().fit(*pictures(60, 0)).condensed_, {})


def test_distilled_images_and_graphs_bear_the_mark_as_well(tmp_path):
    attack = CondensationBackdoor(white_patch(), portion=0.1)
    images = UnrolledCondenser(1, 1, 1, network=factory, epochs=1, batch_real=60, callbacks=[attack])
    graphs = [
        Data(x=torch.eye(3), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), y=torch.tensor([i % 2]))
        for i in range(12)
    ]
    subgraph = CondensationBackdoor(SubgraphTrigger(torch.eye(3)), portion=0.2)
    few = GraphSetCondenser(
        n_per_class=1, n_nodes=3, max_iter=1, network=partial(GraphClassifier, 3, 2, hidden=4, depth=1),
        callbacks=[subgraph],
    )  # fmt: skip
    for made in (images.fit(*pictures(60, 0)), few.fit(graphs)):
        with pytest.raises(InvalidValue, match="poisoned = true"):
            save_condensed(tmp_path / "set", made.condensed_, {})
        save_condensed(tmp_path / "set", made.condensed_, made.provenance_)
        with pytest.raises(InvalidValue, match="poisoned = true"):
            save_condensed(tmp_path / "copy", load_condensed(tmp_path / "set").data, {})
