"""Sets of graphs in TU's form: text files, the npz, features, and what can be wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparing.core.errors import DataError, InvalidValue, SparingError, UnknownName
from sparing.core.files import write_arrays
from sparing.data import catalogue
from sparing.data.tu import TU_SETS, pack_tu, read_published, read_tu, save_tu, split_of, tu_split

# a triangle with a self loop and an edge given twice; a node without edges; a directed edge
FILES = {
    "A": "1, 2\n2, 1\n2,3\n3,2\n1,3\n3,1\n1,1\n1,2\n6,5",
    "graph_indicator": "1\n1\n1\n2\n3\n3",
    "graph_labels": "1\n-1\n1",
    "node_labels": "3\n3\n5\n4\n3\n3",
    "node_attributes": "0.5, 1\n1,2\n0,0\n-1e-3,0\n1,1\n2,2",
    "edge_attributes": "1\n1\n2\n2\n3\n3\n9\n8\n0.5",
}


def folder(place: Path, **changes: str | None) -> Path:
    place.mkdir(exist_ok=True)
    for name, text in {**FILES, **changes}.items():
        if text is not None:
            (place / f"SET_{name}.txt").write_text(f"{text}\n", "utf8")
    return place


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    return {
        "node_ptr": np.array([0, 3, 4, 6], np.int32),
        "edge_ptr": np.array([0, 6, 6, 7], np.int32),
        "edge_src": np.array([0, 0, 1, 1, 2, 2, 1], np.uint16),
        "edge_dst": np.array([1, 2, 0, 2, 0, 1, 0], np.uint16),
        "graph_label": np.array([1, 0, 1], np.uint8),
        "node_label": np.array([0, 0, 2, 1, 0, 0], np.uint8),
        **changes,
    }


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    found = read_tu(folder(tmp_path / "set"))
    assert found.node_ptr.tolist() == [0, 3, 4, 6]
    assert found.edge_ptr.tolist() == [0, 6, 6, 7]
    assert found.edge_index.tolist() == [[0, 0, 1, 1, 2, 2, 1], [1, 2, 0, 2, 0, 1, 0]]  # loop and repetition are gone
    assert found.classes == ("-1", "1")
    assert found.graph_label.tolist() == [1, 0, 1]
    assert found.edge_attribute is not None
    assert found.edge_attribute[:, 0].tolist() == [1, 3, 1, 2, 3, 2, 0.5]  # that of the first of equal edges
    packed = pack_tu(found)
    expected = np.zeros((6, 5), np.float32)
    expected[:, :2] = found.node_attribute
    expected[np.arange(6), 2 + np.array([0, 0, 2, 1, 0, 0])] = 1
    assert packed.x.tolist() == expected.tolist()
    assert packed.edge_weight is None
    assert packed[1].edge_index.shape == (2, 0)


def test_features_and_weights(tmp_path: Path) -> None:
    found = read_tu(folder(tmp_path / "set"))
    assert pack_tu(found, "labels").x.argmax(1).tolist() == [0, 0, 2, 1, 0, 0]
    assert pack_tu(found, "attributes").x.tolist() == found.node_attribute.tolist()
    assert pack_tu(found, "degree").x.argmax(1).tolist() == [2, 2, 2, 0, 0, 1]
    assert pack_tu(found, "degree", max_degree=1).x.tolist() == [[0, 1]] * 3 + [[1, 0]] * 2 + [[0, 1]]
    assert pack_tu(found, "constant").x.tolist() == [[1.0]] * 6
    assert pack_tu(found, edge_weight=True).edge_weight.tolist() == [1, 3, 1, 2, 3, 2, 0.5]
    both = pack_tu(found, "degree", edge_weight=True, undirected=True)
    assert both[2].edge_index.tolist() == [[0, 1], [1, 0]]
    assert both[2].edge_weight.tolist() == [0.5, 0.5]
    assert both.edge_ptr.tolist() == [0, 6, 6, 8]
    bare = read_tu(folder(tmp_path / "bare", node_labels=None, node_attributes=None, edge_attributes=None))
    assert torch.equal(pack_tu(bare).x, pack_tu(found, "degree").x)
    for fields, message in (
        ({"features": "labels"}, "nodes have no labels"),
        ({"features": "attributes"}, "nodes have no attributes"),
        ({"edge_weight": True}, "0 attributes of an edge; one"),
    ):
        with pytest.raises(DataError, match=message):
            pack_tu(bare, **fields)
    for fields, message in (({"features": "all"}, "features = 'all'"), ({"max_degree": 0}, "max_degree = 0")):
        with pytest.raises(InvalidValue, match=message):
            pack_tu(bare, **fields)


def test_the_npz_is_the_same_set(tmp_path: Path) -> None:
    text = read_tu(folder(tmp_path / "set"))
    save_tu(text, tmp_path / "deep" / "set.npz")
    again = read_tu(tmp_path / "deep" / "set.npz")
    for name in ("node_ptr", "edge_ptr", "edge_index", "graph_label", "node_label", "node_attribute", "edge_attribute"):
        assert getattr(again, name).tolist() == getattr(text, name).tolist(), name
    assert again.classes == ("0", "1")
    write_arrays(tmp_path / "plain.npz", arrays())
    plain = read_tu(tmp_path / "plain.npz")
    assert plain.edge_index.tolist() == text.edge_index.tolist()
    assert torch.equal(pack_tu(plain).x, pack_tu(text, "labels").x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"graph_indicator": "1\n1\n1\n3\n3\n3"},
            r"SET_graph_indicator.txt, line 4: graph 1 \(number 2 there\) has no n",
        ),
        (
            {"graph_indicator": "1\n1\n2\n1\n3\n3"},
            r"line 4: a node of graph 0 \(number 1 there\) after those of graph 1",
        ),
        ({"graph_indicator": "0\n1\n1\n2\n3\n3"}, "line 1: the graph number 0; SET_graph_labels.txt has 1…3"),
        ({"graph_labels": "1\n0"}, "line 5: the graph number 3; SET_graph_labels.txt has 1…2"),
        ({"graph_labels": "1\n0\n1\n0"}, r"SET_graph_labels.txt, line 4: graph 3 \(number 4 there\) has no nodes"),
        ({"graph_labels": "1\n0.5\n1"}, r"SET_graph_labels.txt, line 2: '0.5'; 1 whole numbers"),
        ({"graph_labels": None}, "SET_graph_labels.txt is missing"),
        ({"A": "1,2\n2,1\n3,7"}, "SET_A.txt, line 3: joins the nodes 3 and 7; 1…6"),
        ({"A": "1,2\n0,1"}, "SET_A.txt, line 2: joins the nodes 0 and 1"),
        ({"A": "1,2\n4,1"}, "SET_A.txt, line 2: joins node 4 of graph 1 to node 1 of graph 0"),
        ({"A": "1,2\n\n2,1"}, "SET_A.txt, line 2: ''; 2 whole numbers"),
        ({"A": "1,2\n2,1,3"}, "SET_A.txt, line 2: '2,1,3'; 2 whole numbers"),
        ({"A": "1,2\n99999999999999999999,1"}, "SET_A.txt, line 2: '9999"),
        ({"node_labels": "1\n2"}, "SET_node_labels.txt: 2 lines; one for each of 6 nodes"),
        ({"node_labels": "1\n2\n1\n1\n1\n9999999"}, "node labels from 1 to 9999999"),
        ({"node_labels": "1\nü\n1\n1\n1\n1"}, "SET_node_labels.txt: byte 2 is no ASCII"),
        ({"node_labels": ""}, "SET_node_labels.txt is empty"),
        ({"node_attributes": "1\n2\n1\nnan\n1\n1"}, "SET_node_attributes.txt, line 4: 'nan'; numbers finite"),
        ({"node_attributes": "1\n2\n1\n1e39\n1\n1"}, "SET_node_attributes.txt, line 4: '1e39'"),
        ({"node_attributes": "1,2\n2,1\n1\n1,2\n1,1\n1,1"}, "SET_node_attributes.txt, line 3: '1'; 2 numbers"),
        ({"edge_attributes": "1\n2"}, "SET_edge_attributes.txt: 2 lines; one for each of 9 edges"),
    ],
)
def test_wrong_text_files_are_named(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tu(folder(tmp_path / "set", **changes))


def test_graphs_without_edges_and_wrong_places(tmp_path: Path) -> None:
    none = read_tu(folder(tmp_path / "none", A="", edge_attributes=None))
    assert none.edge_ptr.tolist() == [0, 0, 0, 0]
    assert pack_tu(none, "degree").x.tolist() == [[1.0]] * 6
    with pytest.raises(DataError, match=r"0 files …_A.txt; one"):
        read_tu(tmp_path)
    (tmp_path / "none" / "TWO_A.txt").touch()
    with pytest.raises(DataError, match=r"2 files …_A.txt \(\['SET', 'TWO'\]\)"):
        read_tu(tmp_path / "none")
    with pytest.raises(DataError, match="absent is missing"):
        read_tu(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node_ptr": np.array([0, 3, 3, 6])}, "'node_ptr' gives graph 1 0 nodes; at least 1"),
        ({"edge_ptr": np.array([0, 7, 6, 7])}, "'edge_ptr' gives graph 1 -1 edges; at least 0"),
        ({"node_ptr": np.array([0, 3, 6])}, "'node_ptr' has 3 entries, the first .0.; 4 from 0 on"),
        ({"node_ptr": np.array([1, 3, 4, 6])}, "'node_ptr' has 4 entries, the first .1."),
        ({"edge_src": np.zeros(3, np.int64)}, "'edge_src' has 3 rows; 7"),
        (
            {"edge_dst": np.array([1, 2, 0, 2, 0, 3, 0])},
            r"'edge_dst' and its fellow join the nodes 2 and 3 of graph 0 at",
        ),
        (
            {"edge_src": np.array([0, 0, 1, 1, 2, -1, 1])},
            "'edge_src' and its fellow join the nodes -1 and 1 of graph 0",
        ),
        ({"node_label": np.zeros(5, np.int64)}, "'node_label' has 5 rows; 6"),
        ({"node_label": np.zeros((6, 0), np.int64)}, r"'node_label' is int64 of shape \(6, 0\)"),
        ({"graph_label": np.ones(3)}, "'graph_label' is float64"),
        ({"graph_label": np.ones(0, np.int64)}, "'graph_label' is empty"),
        ({"graph_label": np.full(3, 2**64 - 1, np.uint64)}, "'graph_label' holds 18446744073709551615"),
        ({"node_attribute": np.full((6, 2), np.inf)}, "'node_attribute' holds a number in row 0"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    write_arrays(tmp_path / "set.npz", arrays(**changes))
    with pytest.raises(DataError, match=message):
        read_tu(tmp_path / "set.npz")


def test_missing_arrays_and_no_npz(tmp_path: Path) -> None:
    kept = arrays()
    del kept["edge_dst"]
    write_arrays(tmp_path / "set.npz", kept)
    with pytest.raises(DataError, match="no array 'edge_dst'; it holds edge_ptr, edge_src"):
        read_tu(tmp_path / "set.npz")
    (tmp_path / "other.npz").write_bytes(b"PK no npz")
    with pytest.raises(DataError, match=r"other\.npz is not a valid npz"):
        read_tu(tmp_path / "other.npz")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(FILES)),
    change=st.tuples(st.integers(0, 40), st.binary(max_size=4)),
)
def test_damaged_text_raises_nothing_else(tmp_path: Path, name: str, change: tuple[int, bytes]) -> None:
    path = folder(tmp_path / "set") / f"SET_{name}.txt"
    at, new = change
    content = path.read_bytes()
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    with contextlib.suppress(SparingError):
        pack_tu(read_tu(path.parent))


def test_the_split_is_the_reference_s() -> None:
    rows = tu_split(188)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    expected = torch.randperm(188).numpy()
    torch.set_rng_state(state)
    assert np.array_equal(np.concatenate([rows["test"], rows["val"], rows["train"]]), expected)
    assert [len(rows[name]) for name in ("train", "val", "test")] == [150, 19, 19]
    assert not np.array_equal(tu_split(188, 1)["test"], rows["test"])


def test_a_published_set_must_be_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"MUTAG\.npz is missing(.|\n)*save_tu\(read_tu\(\"MUTAG\"\)"):
        read_published(tmp_path, "mutag")
    path = TU_SETS["mutag"].source.path(tmp_path)
    path.parent.mkdir()
    write_arrays(path, arrays())
    with pytest.raises(DataError, match="3 graphs of 2 classes, 3 values of node labels; mutag has 188, 2 and 7"):
        read_published(tmp_path, "mutag")
    with pytest.raises(UnknownName, match="Did you mean 'mutag'"):
        read_published(tmp_path, "mutagg")
    assert not catalogue.check("mutag", tmp_path).ok


@pytest.mark.parametrize("name", sorted(TU_SETS))
def test_the_published_sets(data_root: Path, name: str) -> None:
    published = TU_SETS[name]
    found = read_published(data_root, name)
    packed = pack_tu(found, "labels")
    assert packed.x.shape == (found.node_ptr[-1], published.features)
    assert torch.equal(packed.x.sum(1), torch.ones(len(packed.x)))
    with np.load(published.source.path(data_root)) as given:  # nothing is lost: its edges are sorted and without loops
        assert np.array_equal(found.edge_index, np.stack([given["edge_src"], given["edge_dst"]]))
        assert np.array_equal(found.graph_label, given["graph_label"])
    rows, labels = split_of(name, data_root, train=False)
    assert np.array_equal(labels, found.graph_label[rows])
    if name == "mutag":
        assert catalogue.check(name, data_root).splits == {"train": 150, "test": 19}


def test_a_set_written_and_read_as_text(data_root: Path, tmp_path: Path) -> None:
    """MUTAG as the text files that it was published in gives the same graphs."""
    found = read_published(data_root, "mutag")
    owner = np.repeat(np.arange(len(found.graph_label)), np.diff(found.node_ptr))
    ends = found.edge_index + np.repeat(found.node_ptr[:-1], np.diff(found.edge_ptr))

    def write(part: str, rows: np.ndarray) -> None:
        np.savetxt(tmp_path / f"MUTAG_{part}.txt", rows, "%d", delimiter=", ")

    write("A", ends.T + 1)
    write("graph_indicator", owner + 1)
    write("graph_labels", found.graph_label * 2 - 1)
    write("node_labels", found.node_label)
    again = read_tu(tmp_path)
    for one, other in zip(pack_tu(found).tensors().values(), pack_tu(again).tensors().values(), strict=True):
        assert torch.equal(one, other)
