"""Graphs of people: the npz, what can be wrong with it, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparing.core.errors import CorruptFile, DataError
from sparing.data import catalogue
from sparing.data.node_tables import RECIDIVISM, TABLES, read_node_table, read_published_table, save_node_table


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    made = {
        "x": np.array([[1.0, 20], [0, 30], [1, 41], [0, 22]]),
        "feature_names": np.array(["white", "age"]),
        "y": np.array([0, 1, 1, 0]),
        "sens": np.array([1, 0, 1, 0]),
        "edge_index": np.array([[0, 1, 1, 2], [1, 2, 0, 2]]),
        "idx_train": np.array([0, 1]),
        "idx_val": np.array([2]),
        "idx_test": np.array([3]),
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


def place(folder: Path, **changes: Any) -> Path:
    path = folder / "people.npz"
    np.savez(path, **arrays(**changes))
    return path


def test_a_file_is_what_it_says(tmp_path: Path):
    table = read_node_table(place(tmp_path))
    assert table.features == ("white", "age")
    assert table.x.dtype == np.float32
    assert table.edges.tolist() == [[0, 1], [1, 2]]  # once each, no loop
    assert {name: nodes.tolist() for name, nodes in table.splits.items()} == {"train": [0, 1], "val": [2], "test": [3]}
    assert table.column("age") == 1


def test_edges_may_be_rows_of_a_matrix(tmp_path: Path):
    rows = {"edge_index": None, "edge_indptr": np.array([0, 1, 2, 2, 2]), "edge_indices": np.array([1, 2], np.uint16)}
    assert read_node_table(place(tmp_path, **rows)).edges.tolist() == [[0, 1], [1, 2]]


def test_without_a_split_one_is_drawn_class_by_class(tmp_path: Path):
    draw, path = np.random.default_rng(0), tmp_path / "drawn" / "people.npz"
    y = np.arange(80) % 2
    save_node_table(path, draw.random((80, 2)), ["a", "b"], y, draw.integers(0, 80, (2, 99)), sens=y)
    table = read_node_table(path)
    assert {name: len(nodes) for name, nodes in table.splits.items()} == {"train": 40, "val": 20, "test": 20}
    assert sorted(np.concatenate(list(table.splits.values())).tolist()) == list(range(80))
    assert all(np.bincount(y[nodes]).tolist() == [len(nodes) // 2] * 2 for nodes in table.splits.values())


def test_what_is_saved_is_read(tmp_path: Path):
    given = arrays()
    splits = {name: given[f"idx_{name}"] for name in ("train", "val", "test")}
    path = tmp_path / "again.npz"
    save_node_table(path, given["x"], given["feature_names"], given["y"], given["edge_index"], given["sens"], splits)
    one, other = read_node_table(path), read_node_table(place(tmp_path))
    assert np.array_equal(one.x, other.x)
    assert np.array_equal(one.edges, other.edges)
    assert one.features == other.features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "no array 'x'; it holds edge_index, feature_names"),
        ({"x": np.full((4, 2), np.nan)}, "'x' of node 0 is not finite"),
        ({"x": np.zeros(4)}, r"'x' is float64 of shape \(4,\); numbers of 2 dimensions"),
        ({"feature_names": np.array(["a", "a"])}, "'feature_names' holds 2 names; one of its own for each of 2"),
        ({"feature_names": np.array([1, 2])}, "names of 1 dimensions"),
        ({"y": np.array([0.5, 1, 1, 0])}, "'y' is float64"),
        ({"sens": np.array([1, 0])}, "'sens' has 2 entries; one for each of 4"),
        ({"edge_index": np.array([[0], [4]])}, "edge 0 joins 0 and 4; 0…3"),
        ({"edge_index": np.array([[0], [1], [2]])}, r"'edge_index' has shape \(3, 1\)"),
        ({"edge_index": None}, "no array 'edge_indptr'"),
        (
            {"edge_index": None, "edge_indptr": np.array([0, 2, 1, 1, 1]), "edge_indices": np.array([1])},
            "'edge_indptr' must rise from 0 to 1",
        ),
        ({"idx_val": np.array([1])}, "'idx_val' names node 1, which stands in a split already"),
        ({"idx_test": np.array([3, 3])}, "'idx_test' names node 3, which stands"),
        ({"idx_test": np.array([], int)}, "'idx_test' must name at least one"),
        ({"idx_test": np.array([4])}, "'idx_test' must name at least one of the nodes 0…3"),
        ({"idx_test": None}, "no array 'idx_test'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str):
    path = place(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_node_table(path)
    assert str(path) in str(caught.value)


def test_a_damaged_file_and_an_unknown_column(tmp_path: Path):
    path = place(tmp_path)
    with pytest.raises(DataError, match=r"no column 'ages'\. Did you mean 'age'"):
        read_node_table(path).column("ages")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CorruptFile, match="not a valid npz"):
        read_node_table(path)


def test_another_graph_is_not_the_published_one(tmp_path: Path):
    (tmp_path / "recidivism").mkdir()
    place(tmp_path / "recidivism").rename(RECIDIVISM.source.path(tmp_path))
    with pytest.raises(DataError, match="4 nodes, 2 edges and the columns 'white, age'; 18876, 311870 and WHITE"):
        read_published_table(tmp_path, "recidivism")
    with pytest.raises(DataError, match=r"(?s)german_credit.npz is missing.*save_node_table"):
        read_published_table(tmp_path, "german_credit")


@pytest.mark.parametrize("name", TABLES)
def test_the_published_graphs(data_root: Path, name: str):
    found = catalogue.check(name, data_root)
    assert found.ok, found.problem
    table = read_published_table(data_root, name)
    assert set(np.unique(table.sens)) == {0, 1}
    assert set(np.unique(table.y)) == {0, 1}
    assert sum(map(len, table.splits.values())) == len(table.x)
