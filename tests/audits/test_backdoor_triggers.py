"""Patches: where they lie, what they change, and how DOORPING moves them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backdoor_cases import PIXELS, SIZE, fresh, pictures, white_patch

from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.triggers import OptimisedTrigger, PatchTrigger, rank_units, update_trigger
from sparing.core.errors import InvalidValue

SHAPE = (1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("position", "row", "column"),
    [("bottom_right", 25, 25), ("top_left", 1, 1), ("top_right", 1, 25), ("bottom_left", 25, 1), ((0, 26), 0, 26)],
    ids=str,
)
def test_the_patch_lies_where_it_should(position, row, column):
    trigger = PatchTrigger((3, 28, 28), PixelSpace((0.5,) * 3, (0.5,) * 3), size=2, position=position)
    expected = torch.zeros(3, 28, 28)
    expected[:, row : row + 2, column : column + 2] = 1
    assert torch.equal(trigger.mask, expected)


def test_only_the_patch_changes_and_it_is_white():
    x = pictures(4, 0).x
    stamped = white_patch().apply(x)
    changed = stamped != x
    rows = slice(SIZE - 3, SIZE - 1)
    assert changed[:, :, rows, rows].all()
    assert changed.sum() == 4 * 4
    assert (PIXELS.to_uint8(stamped)[:, :, rows, rows] == 255).all()
    assert (white_patch().to_uint8() == 255).all()


def test_random_patches_follow_the_seed_and_are_never_zero():
    one, same, other = (PatchTrigger(SHAPE, PIXELS, 4, value="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.image, same.image)
    assert not torch.equal(one.image, other.image)
    assert int(one.to_uint8().min()) >= 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": SIZE}, "12 x 12 pixels at row -1"),
        ({"size": 0}, "0 x 0"),
        ({"position": (11, 11)}, "row 11, column 11"),
        ({"position": "middle"}, "'middle'"),
        ({"value": "grey"}, "'grey'"),
        ({"value": np.zeros((1, 3, 3), np.uint8)}, r"\(1, 3, 3\)"),
        ({"value": np.zeros((1, 2, 2))}, "float64"),
        ({"image_shape": (3, SIZE, SIZE)}, "3 channels"),
    ],
)
def test_a_patch_that_cannot_be_is_refused(arguments, named):
    with pytest.raises(InvalidValue, match=named):
        PatchTrigger(**{"image_shape": SHAPE, "pixels": PIXELS} | arguments)


def test_a_clipped_trigger_stays_a_picture_and_an_unclipped_one_does_not():
    network = fresh()
    clipped = OptimisedTrigger(SHAPE, PIXELS, 4, max_steps=60, alpha=1000)
    free = OptimisedTrigger(SHAPE, PIXELS, 4, max_steps=60, clip=None, alpha=1000)
    done = clipped.update(network)
    assert done.moved
    assert done.losses[-1] < done.losses[0]
    assert clipped.describe()["valid_pixels"] is True
    clipped.to_uint8()
    free.update(network)
    assert free.describe()["valid_pixels"] is False
    with pytest.raises(InvalidValue, match="8-bit"):
        free.to_uint8()
    outside = clipped.mask == 0
    assert torch.equal(clipped.image[outside], PatchTrigger(SHAPE, PIXELS, 4).image[outside])


def test_an_update_leaves_the_network_as_it_was():
    network = fresh().train()
    network.features[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trigger = OptimisedTrigger(SHAPE, PIXELS, max_steps=3)
    trigger.update(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.training
    assert not network.features[1].training
    assert not any(module._forward_hooks for module in network.modules())


def test_a_dead_unit_is_passed_over_or_stops_the_update():
    network = fresh()
    hidden = network.classifier[0]
    best = int(rank_units(hidden.weight)[0])
    with torch.no_grad():
        hidden.bias[best] = -1000
    image, mask = PatchTrigger(SHAPE, PIXELS, 4, value="random").image, PatchTrigger(SHAPE, PIXELS, 4).mask
    stuck = update_trigger(network, image, mask, max_steps=5)
    assert (stuck.units, stuck.losses, stuck.steps, stuck.moved) == ((best,), (0.0,), 0, False)
    other = update_trigger(network, image, mask, max_steps=5, alpha=1000, skip_dead=True)
    assert best not in other.units
    assert other.moved
    with torch.no_grad():
        hidden.bias.fill_(-1000)
    none = update_trigger(network, image, mask, max_steps=5, skip_dead=True)
    assert (none.units, none.losses, none.moved) == ((), (), False)
    assert torch.equal(none.image, image)


def test_the_history_counts_updates_and_survives_being_saved():
    network = fresh()
    trigger = OptimisedTrigger(SHAPE, PIXELS, 4, max_steps=2, alpha=1000)
    trigger.update(network)
    with torch.no_grad():
        network.classifier[0].bias.fill_(-1000)
    trigger.update(network)
    assert (trigger.history.updates, trigger.history.moved, len(trigger.history.images)) == (2, 1, 1)
    resumed = OptimisedTrigger(SHAPE, PIXELS, 4, max_steps=2, alpha=1000, seed=5)
    resumed.load_state_dict(trigger.state_dict())
    assert torch.equal(resumed.image, trigger.image)
    assert resumed.describe() == trigger.describe()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"layer": -3}, r"layer = -3 is features\.3, a Conv2d"),
        ({"layer": 9}, "layer = 9; the network has 4 layers"),
        ({"topk": 0}, "topk = 0"),
        ({"topk": 25}, "24 units"),
        ({"alpha": 0.0}, "alpha = 0.0"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_used_is_named(arguments, named):
    with pytest.raises(InvalidValue, match=named):
        update_trigger(fresh(), white_patch().image, white_patch().mask, **arguments)


def test_pixels_outside_the_range_are_named():
    x = pictures(4, 0).x
    x[2, 0, 3, 3] = 50.0
    with pytest.raises(InvalidValue, match=r"hold-out: image 2 spans .* to 12\.9"):
        PIXELS.check(x, "hold-out")
    x[2, 0, 3, 3] = torch.nan
    with pytest.raises(InvalidValue, match="image 2"):
        PIXELS.check(x, "hold-out")
    with pytest.raises(InvalidValue, match="std"):
        PixelSpace((0.5,), (0.0,))
