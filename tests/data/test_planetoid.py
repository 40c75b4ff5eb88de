"""Citation graphs: the npz, what can be wrong with it, and how it is written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data

from sparing.core.errors import DataError, InvalidValue, MissingDependency, SparingError, UnknownName
from sparing.data import catalogue
from sparing.data.nodes import NodeSet, join_nodes
from sparing.data.planetoid import CORA, read_planetoid, row_normalised, save_planetoid, split_of

WORDS = [[0, 5], [5], [1, 1432], [], [7, 8, 9], [0]]


def arrays() -> dict[str, np.ndarray]:
    """Six papers, five citations, the types of the real file."""
    return {
        "x_indptr": np.cumsum([0, *map(len, WORDS)]).astype(np.int32),
        "x_indices": np.concatenate([np.array(words, np.uint16) for words in WORDS]),
        "x_shape": np.array([6, 1433]),
        "edge_index": np.array([[0, 0, 1, 2, 4], [1, 2, 2, 3, 5]], np.uint16),
        "label": np.array([0, 1, 2, 0, 6, 3], np.uint8),
        "train_idx": np.array([0, 1], np.int32),
        "val_idx": np.array([4], np.int32),
        "test_idx": np.array([2, 5], np.int32),
        "unlabelled": np.array([3], np.int32),
    }


def place(root: Path, **changes: Any) -> Path:
    path = CORA.source.path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in (arrays() | changes).items() if array is not None})
    return path


def test_the_graph_is_what_the_file_says(tmp_path: Path) -> None:
    place(tmp_path)
    data = read_planetoid(tmp_path, "cora")
    assert isinstance(data, Data)
    assert data.x.layout == torch.sparse_coo
    assert data.x.is_coalesced()
    dense = torch.zeros(6, 1433)
    for node, words in enumerate(WORDS):
        dense[node, words] = 1.0
    assert torch.equal(data.x.to_dense(), dense)
    assert torch.equal(read_planetoid(tmp_path, "cora", layout="dense").x, dense)
    both = {(0, 1), (0, 2), (1, 2), (2, 3), (4, 5)} | {(1, 0), (2, 0), (2, 1), (3, 2), (5, 4)}
    assert set(map(tuple, data.edge_index.T.tolist())) == both
    assert data.edge_index.shape == (2, 10)
    assert data.is_undirected()
    assert not data.has_self_loops()
    assert data.y.tolist() == [0, 1, 2, -1, 6, 3]
    masks = [data[f"{split}_mask"].nonzero().flatten().tolist() for split in ("train", "val", "test")]
    assert masks == [[0, 1], [4], [2, 5]]
    assert data.validate()


def test_rows_are_divided_by_their_sums(tmp_path: Path) -> None:
    place(tmp_path)
    sparse, dense = (
        row_normalised(read_planetoid(tmp_path, "cora", layout=layout).x) for layout in ("sparse", "dense")
    )
    assert torch.equal(sparse.to_dense(), dense)
    assert dense.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 1, 1])
    assert dense[4, 7] == pytest.approx(1 / 3)


MALFORMED = [
    ({"train_idx": None}, "no array 'train_idx'; it holds .*val_idx"),
    ({"label": np.zeros(6)}, r"'label' is float64 of shape \(6,\); whole numbers of one dimension"),
    ({"edge_index": np.zeros(4, int)}, r"'edge_index' is int64 of shape \(4,\); whole numbers of \(2, E\)"),
    ({"edge_index": np.zeros((3, 4), int)}, r"'edge_index' has shape \(3, 4\); \(2, E\)"),
    ({"edge_index": np.zeros((2, 0), int)}, r"'edge_index' has shape \(2, 0\)"),
    ({"edge_index": np.array([[0, 1], [1, 6]])}, "edge 1, between nodes 1 and 6; nodes are 0…5"),
    ({"edge_index": np.array([[0, -1], [1, 2]])}, "edge 1, between nodes -1 and 2"),
    ({"edge_index": np.array([[0, 3], [1, 3]])}, "edge 1, between nodes 3 and 3; no self loops"),
    ({"edge_index": np.array([[0, 2, 1], [1, 3, 0]])}, "edge 2, between nodes 1 and 0, for a second time"),
    ({"x_shape": np.array([6])}, r"'x_shape' has shape \(1,\); two numbers"),
    ({"x_shape": np.array([6, 1432])}, r"'x_shape' is \[6, 1432\]; .* of 1433 features"),
    ({"x_shape": np.array([1 << 40, 1433])}, r"'x_shape' is \[1099511627776, 1433\]"),
    ({"x_shape": np.array([7, 1433])}, "'x_indptr' has 7 entries, .* 8 entries from 0 to 9"),
    ({"x_indptr": np.array([1, 2, 3, 5, 5, 8, 9])}, r"the first \[1\] and the last \[9\]"),
    ({"x_indptr": np.array([0, 2, 3, 5, 5, 8, 8])}, r"the last \[8\]; 7 entries from 0 to 9"),
    ({"x_indptr": np.array([0, 3, 2, 5, 5, 8, 9])}, "'x_indptr' falls from 3 to 2 at node 1"),
    ({"x_indices": np.array([0, 5, 5, 1, 1433, 7, 8, 9, 0])}, "'x_indices' holds 1433 for node 2; 0…1432"),
    ({"x_indices": np.array([5, 5, 5, 1, 1432, 7, 8, 9, 0])}, "'x_indices' holds 5 and then 5 for node 0"),
    ({"x_indices": np.array([0, 5, 5, 1, 1432, 7, 9, 8, 0])}, "'x_indices' holds 9 and then 8 for node 4"),
    ({"x_indices": np.array([2**64 - 1] * 9, np.uint64)}, "'x_indices' holds 18446744073709551615"),
    ({"label": np.array([0, 1, 2, 0, 7, 3])}, "'label' of node 4 is 7; 0…6"),
    ({"label": np.array([0, 1, 2, 0, 6])}, "'label' has 5 entries; one for each of 6 nodes"),
    ({"train_idx": np.array([0, 6])}, "'train_idx' holds the node 6; 0…5"),
    ({"val_idx": np.array([-1])}, "'val_idx' holds the node -1"),
    ({"val_idx": np.array([], int)}, "'val_idx' is empty"),
    ({"test_idx": np.array([2, 4])}, "'test_idx' holds the node 4, as does 'val_idx'"),
    ({"test_idx": np.array([2, 5, 2])}, "'test_idx' holds the node 2 twice"),
    ({"unlabelled": np.array([3, 1])}, "'unlabelled' holds the node 1, as does 'train_idx'"),
    ({"unlabelled": np.array([9])}, "'unlabelled' holds the node 9"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = place(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_planetoid(tmp_path, "cora")
    assert str(path) in str(caught.value)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    place(tmp_path, label=np.array([{}] * 6, dtype=object))
    with pytest.raises(DataError, match="not a valid npz"):
        read_planetoid(tmp_path, "cora")


@pytest.mark.parametrize("present", [False, True])
def test_without_a_sound_file_it_says_what_to_place_where(tmp_path: Path, present: bool) -> None:
    path = tmp_path / "planetoid" / "cora.npz"
    if present:
        path.parent.mkdir()
        path.write_bytes(b"a pickle, say")
    with pytest.raises(DataError) as caught:
        read_planetoid(tmp_path, "cora")
    for words in (
        str(path),
        "pickles, which can run code",
        f'save_planetoid(Planetoid("planetoid-pickles", "cora")[0], "{path}")',
    ):
        assert words in str(caught.value)
    found = catalogue.check("cora", tmp_path)
    assert not found.ok
    assert found.problem == str(caught.value)


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be downloaded(.|\n)*save_planetoid"):
        catalogue.fetch("cora", tmp_path)
    path = place(tmp_path)
    assert catalogue.fetch("cora", tmp_path) == [path]


def test_the_catalogue_lists_and_checks_it(tmp_path: Path) -> None:
    path = place(tmp_path)
    present = {line.name: line.present for line in catalogue.listing(tmp_path)}
    assert present["cora"]
    assert not present["citeseer"]  # though its folder is there
    found = catalogue.check("cora", tmp_path)
    assert found.ok
    assert found.splits == {"train": 2, "test": 2}
    assert list(found.files) == [path.name]


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'cora'"):
        read_planetoid(tmp_path, "corra")
    with pytest.raises(InvalidValue, match="layout = 'csr'"):
        read_planetoid(tmp_path, "cora", layout="csr")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'sparing\[graphs\]'"):
        read_planetoid(tmp_path, "cora")


def test_written_and_read_it_is_the_same_graph(tmp_path: Path) -> None:
    place(tmp_path / "a")
    data = read_planetoid(tmp_path / "a", "cora")
    for layout in ("sparse", "dense"):
        data = read_planetoid(tmp_path / "a", "cora", layout=layout)  # type: ignore[arg-type]
        data.y[3] = 0  # as others give a paper without features: with a label that is none
        data.edge_index = torch.cat([data.edge_index, data.edge_index[:, :3], torch.tensor([[2], [2]])], dim=1)
        save_planetoid(data, CORA.source.path(tmp_path / layout))
        again = read_planetoid(tmp_path / layout, "cora")
        expected = read_planetoid(tmp_path / "a", "cora")
        assert again.keys() == expected.keys()
        for name in expected.keys():  # noqa: SIM118 - a graph is no mapping
            assert torch.equal(again[name].to_dense(), expected[name].to_dense()), name


def test_normalised_features_are_not_written(tmp_path: Path) -> None:
    place(tmp_path)
    data = read_planetoid(tmp_path, "cora")
    data.x = row_normalised(data.x)
    with pytest.raises(InvalidValue, match="other values than 0 and 1"):
        save_planetoid(data, tmp_path / "b.npz")
    del data.val_mask
    with pytest.raises(InvalidValue, match="no tensor 'val_mask'"):
        save_planetoid(data, tmp_path / "b.npz")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(draw=st.data())
def test_random_damage(tmp_path: Path, draw: st.DataObject) -> None:
    sound = tmp_path / "sound"
    if not sound.exists():
        sound.write_bytes(place(tmp_path).read_bytes())
    content = bytearray(sound.read_bytes())
    for where in draw.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[where] ^= 1 << draw.draw(st.integers(0, 7))
    del content[draw.draw(st.integers(0, len(content))) :]
    CORA.source.path(tmp_path).write_bytes(bytes(content))
    with contextlib.suppress(SparingError):
        assert read_planetoid(tmp_path, "cora").x.shape == (6, 1433)


def test_a_split_holds_its_own_labels_only() -> None:
    x, edges = torch.eye(4), torch.tensor([[0, 1], [1, 0]])
    nodes = NodeSet(x, edges, torch.tensor([2, 0]), torch.tensor([1, 0]))
    assert len(nodes) == 2
    batch = join_nodes([nodes[0], nodes[1]])
    assert [part.tolist() for part in batch] == [x.tolist(), edges.tolist(), [2, 0], [1, 0]]
    with pytest.raises(IndexError):
        nodes[2]
    for wrong, message in (
        ((x, edges, torch.tensor([4]), torch.tensor([0])), "nodes holds 4 … 4; x has the nodes 0 … 3"),
        ((x, edges + 3, torch.tensor([0]), torch.tensor([0])), "edge_index holds 3 … 4"),
        ((x, edges, torch.tensor([0]), torch.tensor([0, 1])), "one label for each node"),
        ((x, edges[0], torch.tensor([0]), torch.tensor([0])), r"\(N, F\) and \(2, E\)"),
    ):
        with pytest.raises(DataError, match=message):
            NodeSet(*wrong)


@pytest.mark.parametrize(
    ("name", "nodes", "words", "edges", "train", "unlabelled"),
    [("cora", 2708, 49216, 5278, [20] * 7, 0), ("citeseer", 3327, 105165, 4552, [20] * 6, 15)],
)
def test_the_real_graphs(
    data_root: Path, name: str, nodes: int, words: int, edges: int, train: list[int], unlabelled: int
) -> None:
    data = read_planetoid(data_root, name)
    assert (data.num_nodes, len(data.x.values()), data.num_edges) == (nodes, words, 2 * edges)
    assert torch.bincount(data.y[data.train_mask]).tolist() == train
    assert [int(data[f"{split}_mask"].sum()) for split in ("val", "test")] == [500, 1000]
    assert int((data.y < 0).sum()) == unlabelled
    assert len(split_of(name, data_root, train=False)[0]) == 1000
    assert catalogue.check(name, data_root).ok
