"""Condensed sets on disk, and what networks learn from condensed graphs."""

from __future__ import annotations

import json

import pytest
import torch
from graph_cases import FEATURES, citations, graphs
from torch.utils.data import TensorDataset

from sparing.condensation.graph_evaluation import (
    evaluate_condensed_graphs,
    evaluate_condensed_nodes,
    graph_accuracy,
    graph_embeddings,
    train_on_graphs,
    train_on_node_graph,
)
from sparing.condensation.saved import load_condensed, save_condensed
from sparing.core.errors import CorruptFile, InvalidValue, TrainingDiverged
from sparing.models.gnn import GCN, GraphClassifier, GraphSAGE

PROVENANCE = {"settings": {"rate": 0.1}, "loss_curve": [1.0, 0.5]}


def network() -> GraphClassifier:
    return GraphClassifier(FEATURES, 2, hidden=8, depth=2)


def node_graph():
    data = citations()
    data.edge_weight = torch.linspace(0.1, 0.9, data.edge_index.shape[1])
    data.val_mask = data.test_mask
    return data


# --- on disk


def test_sets_of_graphs_come_back(tmp_path) -> None:
    given = graphs(6)
    found = load_condensed(save_condensed(tmp_path / "set", given, PROVENANCE))
    assert found.kind == "graphs"
    assert found.labels == (0, 1, 0, 1, 0, 1)
    assert found.provenance == PROVENANCE
    assert len(found.data) == 6
    for one, other in zip(given, found.data, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("x", "edge_index", "y"))


def test_one_graph_and_images_come_back(tmp_path) -> None:
    given = node_graph()
    found = load_condensed(save_condensed(tmp_path / "graph", given, PROVENANCE))
    assert found.kind == "node_graph"
    assert all(torch.equal(given[name], found.data[name]) for name in ("x", "edge_index", "edge_weight", "y"))
    images = TensorDataset(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1]))
    again = load_condensed(save_condensed(tmp_path / "images", images, PROVENANCE))
    assert again.labels == (0, 1, 1)
    assert torch.equal(again.data.tensors[0], images.tensors[0])
    with pytest.raises(InvalidValue, match="a int cannot be kept"):
        save_condensed(tmp_path / "no", 3, PROVENANCE)
    with pytest.raises(InvalidValue, match="cannot write"):
        save_condensed(tmp_path / "no", images, {"loss": float("nan")})
    assert not (tmp_path / "no").exists()


def test_changed_folders_are_refused(tmp_path) -> None:
    folder = save_condensed(tmp_path / "set", graphs(4), PROVENANCE)
    description = json.loads((folder / "condensed.json").read_text())

    def described(**changes) -> None:
        (folder / "condensed.json").write_text(json.dumps(description | changes))

    for changes, message in (
        ({"format": 9}, "has format 9; this release reads 1"),
        ({"sha256": "0"}, "is not the file that"),
        ({"labels": [1, 1, 1, 1]}, "labels that differ"),
        ({"kind": "sounds"}, "kind = 'sounds'"),
        ({"kind": "images"}, "images x \\(N, C, H, W\\) and labels y"),
    ):
        described(**changes)
        with pytest.raises(CorruptFile, match=message):
            load_condensed(folder)
    described()
    tensors = folder / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="is not the file that"):
        load_condensed(folder)


# --- evaluation


def test_networks_learn_from_graphs_and_are_scored() -> None:
    train, val, test = graphs(40, seed=1), graphs(20, seed=2), graphs(40, seed=3)
    scores = evaluate_condensed_graphs(
        train, val, test, {"gcn": network}, seeds=(0, 1), whole_set={"gcn": 1.0}, epochs=25, lr=0.05
    )
    (score,) = scores
    assert score.mean > 0.9
    assert score.ratio == score.mean
    found = graph_embeddings(network(), test, batch_size=7)
    assert found.shape == (40, 8)
    again = evaluate_condensed_graphs(train, val, test, {"gcn": network}, seeds=(0,), epochs=25, lr=0.05)
    assert again[0].accuracies == score.accuracies[:1]


def test_the_best_epoch_is_kept() -> None:
    torch.manual_seed(0)
    val = graphs(20, seed=2)
    swapped = [item.clone() for item in graphs(20, seed=2)]
    for item in swapped:
        item.y = 1 - item.y
    trained = train_on_graphs(network(), graphs(20), val, epochs=20, lr=0.05)
    torch.manual_seed(0)
    spoilt = train_on_graphs(network(), graphs(20), swapped, epochs=20, lr=0.05)
    assert graph_accuracy(trained, val) > graph_accuracy(spoilt, val)
    for chosen in ({"val": None}, {"val": swapped, "validate_every": 50}):  # a look at the end only chooses nothing
        torch.manual_seed(0)
        last = train_on_graphs(network(), graphs(20), **chosen, epochs=20, lr=0.05)
        assert graph_accuracy(last, val) > graph_accuracy(spoilt, val)


def test_networks_learn_from_one_graph_and_its_light_edges_are_cut() -> None:
    data = node_graph()
    del data.edge_weight
    condensed = citations(30, seed=4)
    del condensed.train_mask
    # light edges that join nodes of other classes harm; heavy ones join nodes of one
    same = condensed.y[condensed.edge_index[0]] == condensed.y[condensed.edge_index[1]]
    strangers = (condensed.y[:, None] != condensed.y).nonzero().T
    condensed.edge_index = torch.cat([condensed.edge_index[:, same], strangers], dim=1)
    condensed.edge_weight = torch.cat([torch.full((int(same.sum()),), 0.8), torch.full((strangers.shape[1],), 0.3)])
    cuts = {"edge_thresholds": (0.5, 0.1), "seeds": (0, 1), "epochs": 30, "lr": 0.05}
    (score,) = evaluate_condensed_nodes(condensed, data, {"gcn": lambda: GCN(8, 3, hidden=16)}, **cuts)
    assert score.mean > 0.8
    assert score.record()["edge_threshold"] == 0.5
    cuts |= {"epochs": 2, "seeds": (0,)}
    (other,) = evaluate_condensed_nodes(condensed, data, {"sage": lambda: GraphSAGE(8, 3)}, **cuts)  # takes no weights
    assert other.architecture == "sage"


def test_refuses_what_cannot_be_evaluated() -> None:
    with pytest.raises(InvalidValue, match="0 kinds of network and 1 seeds"):
        evaluate_condensed_graphs(graphs(4), None, graphs(4), {}, seeds=(0,))
    with pytest.raises(InvalidValue, match=r"whole_set\['gin'\] = 0.9"):
        evaluate_condensed_graphs(graphs(4), None, graphs(4), {"gcn": network}, whole_set={"gin": 0.9})
    with pytest.raises(InvalidValue, match="edge_thresholds is empty"):
        evaluate_condensed_nodes(node_graph(), node_graph(), {"gcn": lambda: GCN(8, 3)}, edge_thresholds=())
    with pytest.raises(InvalidValue, match="epochs = 0"):
        train_on_graphs(network(), graphs(4), epochs=0)
    broken = citations()
    broken.x = broken.x * float("inf")
    with pytest.raises(TrainingDiverged, match="epoch 1"):
        train_on_node_graph(GCN(8, 3), broken, epochs=2)
