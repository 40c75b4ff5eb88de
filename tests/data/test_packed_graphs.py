"""Graphs in one piece: what goes in comes out, in any order."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch, Data

from sparing.core.errors import InvalidValue
from sparing.data.graphs import PackedGraphs, class_counts


def some() -> list[Data]:
    """Three graphs; the second has no edges."""
    edges = [torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.empty(2, 0, dtype=torch.int64), torch.tensor([[1], [0]])]
    return [
        Data(x=torch.rand(size, 2), edge_index=edges[i], y=torch.tensor([i]), edge_weight=torch.rand(edges[i].shape[1]))
        for i, size in enumerate((3, 1, 2))
    ]


def test_items_come_back() -> None:
    given = some()
    packed = PackedGraphs.of(given)
    assert len(packed) == 3
    assert packed.sizes.tolist() == [3, 1, 2]
    for one, other in zip(given, packed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("x", "edge_index", "y", "edge_weight"))
    assert torch.equal(packed[-1].x, given[2].x)
    with pytest.raises(IndexError, match="graph 3 of 3"):
        packed[3]
    assert PackedGraphs.of(packed) is packed


def test_a_batch_is_that_of_pyg() -> None:
    given, rows = some(), [2, 0, 1, 0]
    expected = Batch.from_data_list([given[i] for i in rows])
    found = PackedGraphs.of(given).take(torch.tensor(rows))
    for name in ("x", "edge_index", "batch", "y", "edge_weight"):
        assert torch.equal(getattr(found, name), expected[name]), name


def test_tensors_make_the_same_set_and_wrong_ones_none() -> None:
    tensors = PackedGraphs.of(some()).tensors()
    again = PackedGraphs.from_tensors(tensors).tensors()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    for changes, message in (
        ({"node_ptr": torch.tensor([0, 3, 4, 9])}, r"node_ptr \[0, 3, 4, 9\]; rising numbers from 0 to 6"),
        ({"edge_ptr": torch.tensor([0, 4, 3, 4])}, "edge_ptr"),
        ({"edge_index": tensors["edge_index"] + 1}, "edge_index names nodes that its graph does not have"),
        ({"edge_weight": torch.rand(2)}, r"edge_weight torch.float32 \(2,\)"),
        ({"y": torch.rand(3)}, "whole numbers"),
        ({"more": torch.rand(3)}, r"tensors \['edge_index'"),
    ):
        with pytest.raises(InvalidValue, match=message):
            PackedGraphs.from_tensors(tensors | changes)


def test_weights_in_all_or_in_none() -> None:
    mixed = some()
    del mixed[1].edge_weight
    with pytest.raises(InvalidValue, match="graph 1: edge_weight in some graphs only"):
        PackedGraphs.of(mixed)
    with pytest.raises(InvalidValue, match="no graphs; at least one"):
        PackedGraphs.of([])


def test_every_class_is_there() -> None:
    assert class_counts(torch.tensor([1, 0, 1])) == [1, 2]
    with pytest.raises(InvalidValue, match="no sample of class 1, but of 2"):
        class_counts(torch.tensor([0, 2]))
    with pytest.raises(InvalidValue, match="classes 0…C − 1 are expected"):
        class_counts(torch.tensor([0, -1]))
