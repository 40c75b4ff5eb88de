"""Sheets of images and drawings of graphs: what is where on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparing.condensation.pictures import COLOURS, UNKNOWN, beside, graph_picture, image_sheet
from sparing.core.errors import InvalidValue
from sparing.core.ledger import PICTURE_SIDE, Picture


def test_a_sheet_has_a_row_for_each_class_and_clips_what_it_draws():
    images = torch.zeros(4, 1, 8, 8)
    images[0], images[1], images[2], images[3] = -9.0, 0.0, 5.0, 99.0
    labels = torch.tensor([0, 1, 1, 0])
    sheet = image_sheet(images, labels, torch.tensor([0.0]), torch.tensor([10.0]))
    assert sheet.shape == (2 * 10 * 4, 2 * 10 * 4)  # two rows of two, a pixel of white around each, four times as large
    tiles = sheet[::4, ::4].reshape(2, 10, 2, 10).transpose(0, 2, 1, 3)
    assert (tiles[:, :, 0] == 255).all()
    assert [int(tiles[r, k, 5, 5]) for r in (0, 1) for k in (0, 1)] == [0, 255, 0, 128]


def test_colour_keeps_its_channels_and_each_its_range():
    images = torch.ones(1, 3, 4, 4)
    sheet = image_sheet(images, torch.tensor([0]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert sheet.shape == (24, 24, 3)
    assert sheet[12, 12].tolist() == [255, 0, 128]


@pytest.mark.parametrize(("count", "classes", "size"), [(300, 100, 28), (40, 10, 224), (3, 3, 700), (2, 2, 1)])
def test_any_set_fits_into_a_ledger(count, classes, size):
    sheet = image_sheet(
        torch.rand(count, 3, size, size), torch.arange(count) % classes, torch.zeros(3), torch.ones(3), per_class=50
    )
    assert Picture.of(sheet, "a sheet").png


def test_nodes_have_the_colour_of_their_kind_and_edges_are_drawn():
    edges = torch.tensor([[0, 1, 1, 2, 0], [1, 0, 2, 1, 0]])
    kinds = torch.tensor([0, 11, -1])
    drawn = graph_picture(3, edges, kinds)
    assert drawn.shape == (200, 200, 3)
    pixels = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}
    assert {COLOURS[0], COLOURS[1], UNKNOWN} <= pixels
    without = graph_picture(3, edges[:, :0], kinds)
    assert (without == 255).all(2).sum() > (drawn == 255).all(2).sum()
    np.testing.assert_array_equal(drawn, graph_picture(3, edges, kinds))
    with pytest.raises(InvalidValue, match=r"3 nodes and kinds \(2,\)"):
        graph_picture(3, edges, kinds[:2])


def test_a_single_node_is_drawn():
    drawn = graph_picture(1, torch.zeros(2, 0).long(), torch.tensor([2]))
    assert COLOURS[2] in {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}


def test_pictures_stand_beside_each_other_as_far_as_there_is_room():
    red, blue = np.zeros((50, 40, 3), np.uint8), np.full((50, 40, 3), 9, np.uint8)
    both = beside([[red, blue], [blue]])
    assert both.shape == (106, 86, 3)
    assert (both[:50, :40] == 0).all()
    assert (both[:50, 46:] == 9).all()
    assert (both[56:, :40] == 9).all()
    assert (both[56:, 46:] == 225).all()
    many = beside([[red] * 100] * 100)
    assert max(many.shape) <= PICTURE_SIDE
