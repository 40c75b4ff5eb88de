"""Node classification: splits over one graph, what training may see, the whole way on real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import sparing
from guarded_graph import Guarded
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, RecipeError, SparingError
from sparing.core.metrics import macro_f1
from sparing.core.predictor import ModulePredictor, build_model, to_onnx
from sparing.core.training import fit
from sparing.data.nodes import NodeSet
from sparing.data.planetoid import read_planetoid
from sparing.tasks.graphs.published import Citeseer, Cora
from sparing.testing import QUICK, TaskCase, TinyGraph, check_task

GCN = sparing.Train(id="gcn", epochs=60, optimizer="Adam", lr=0.02, validate_every=20)


class Relabelled(TinyGraph):
    """Whose test nodes have other labels."""

    def read(self, root):
        data = super().read(root)
        data.y[data.test_mask] = (data.y[data.test_mask] + 1) % 3
        return data


def test_a_user_can_have_the_checks_for_a_graph_of_his_own(tmp_path):
    check_task(TaskCase(TinyGraph), tmp_path)


def test_splits_are_nodes_of_one_graph():
    task = TinyGraph()
    splits, data = task.splits(), task.read(None)
    parts = [splits.train, splits.val, splits.calibration, splits.test]
    assert [len(part) for part in parts] == [54, 30, 6, 30]
    nodes = torch.cat([part.nodes for part in parts])
    assert sorted(nodes.tolist()) == list(range(120))
    for part in parts:
        assert torch.equal(part.labels, data.y[part.nodes])
        assert part.x is splits.train.x
    assert torch.bincount(splits.calibration.labels).tolist() == [2, 2, 2]
    assert set(splits.calibration.nodes.tolist()) < set(data.train_mask.nonzero().flatten().tolist())


def test_loss_and_evaluation_are_over_the_split_alone():
    task = TinyGraph()
    splits = task.splits()
    model = task.default_model().eval()
    batch = task.collate([splits.val[i] for i in range(4)])
    logits = task.outputs(model, batch)
    assert logits.shape == (120, 3)
    one_by_one = [-logits[node].log_softmax(0)[label] for node, label in zip(batch[2], batch[3], strict=True)]
    assert task.loss(logits, batch).item() == pytest.approx(torch.stack(one_by_one).mean().item())
    found = task.evaluate(ModulePredictor(model, task), splits.test)
    outcome = logits.argmax(1)[splits.test.nodes] == splits.test.labels
    assert found.per_unit.tolist() == outcome.tolist()
    assert found.metrics["accuracy"] == pytest.approx(outcome.float().mean().item())


def test_macro_f1_is_scikit_learns():
    draw = np.random.default_rng(0)
    predicted, targets = draw.integers(0, 4, 50), draw.integers(0, 5, 50)  # class 4 is never predicted
    assert macro_f1(predicted, targets, 6) == pytest.approx(f1_score(targets, predicted, average="macro"))


def test_training_never_looks_at_a_test_label():
    """Features of test nodes are inputs of a transductive task; their labels are out of reach."""
    task = Guarded()
    splits = task.splits()
    result = fit(task.default_model(), task, splits.train, splits.val, GCN)
    assert result.steps == 60
    with pytest.raises(SparingError, match="a label of the test split was looked at"):
        task.evaluate(ModulePredictor(result.model, task), splits.test)


def test_other_test_labels_train_the_same_weights():
    weights, curves = [], []
    for kind in (TinyGraph, Relabelled):
        task = kind()
        splits = task.splits()
        torch.manual_seed(0)
        result = fit(task.default_model(), task, splits.train, splits.val, GCN)
        weights.append(torch.nn.utils.parameters_to_vector(result.model.parameters()))
        curves.append(result.curves)
    assert not torch.equal(TinyGraph().splits().test.labels, Relabelled().splits().test.labels)
    assert torch.equal(*weights)
    assert curves[0] == curves[1]


def test_a_smaller_network_is_taught_quantised_saved_and_loaded(tmp_path):
    task = TinyGraph()
    steps = [
        GCN,
        sparing.Distil(id="student", teacher="gcn", model={"name": "gcn", "hidden": 4}, epochs=60, lr=0.02),
        sparing.Quantize(id="int8", goal="bytes", max_loss=0.2),
    ]
    done = sparing.run(task=task, steps=steps, meter=QUICK, out=tmp_path / "run")
    large, small, last = done.ledger.rows
    assert [row.runtime for row in done.ledger.rows] == ["onnxruntime"] * 3
    assert large.figures["accuracy"].value > 0.85
    assert small.figures["accuracy"].value > 0.75
    assert small.figures["parameters"].value == 24 * 4 + 4 + 4 * 3 + 3
    assert large.figures["training samples"].value == 60 * 54  # a sample is a node
    assert large.figures["macro_f1"].value > 0.8
    assert done.ledger.outcomes["0/gcn"].shape == (30,)
    assert large.figures["throughput"].note.startswith("124 at once")  # the nodes of the graph, not the batch of 4
    loaded = sparing.load(done.folder / "model")
    assert loaded.labels == ("a", "b", "c")
    again = task.evaluate(loaded, task.splits().test)
    assert again.metrics["accuracy"] == last.figures["accuracy"].value


def test_in_the_module_runtime_too(tmp_path):
    for name in ("gat", "sage"):
        done = sparing.run(
            task=TinyGraph(),
            model={"name": name},
            steps=[GCN],
            meter=QUICK | {"runtime": "module"},
            out=tmp_path / name,
        )
        (row,) = done.ledger.rows
        assert row.runtime == "torch"
        assert row.figures["accuracy"].value > 0.85
        loaded = sparing.load(done.folder / "model")
        assert loaded.kind == "module"
        assert (
            TinyGraph().evaluate(loaded, TinyGraph().splits().test).metrics["accuracy"] == row.figures["accuracy"].value
        )


@pytest.mark.parametrize("name", ["gcn", "gat", "sage"])
def test_an_exported_network_takes_any_graph_with_sparse_features_too(name):
    task = TinyGraph()
    model = build_model(name, task)
    graph = to_onnx(model, task=task)
    assert graph.origin["max_abs_diff"] < 1e-5
    data = task.read(None)
    expected = model.eval()(data.x, data.edge_index).detach().numpy()
    np.testing.assert_allclose(graph(data.x, data.edge_index), expected, rtol=1e-4, atol=1e-5)


def test_steps_for_images_are_refused_with_the_reason():
    step = next(kind for kind in all_steps() if "images" in kind.needs)
    with pytest.raises((IncompatibleStep, RecipeError), match="images"):
        sparing.run(task=TinyGraph(), steps=[step(), GCN], meter=QUICK)


def all_steps():
    from sparing.core.registry import parts, resolve

    return [resolve("steps", name) for name in parts("steps")]


def test_wrong_graphs_are_named():
    class Wider(TinyGraph):
        in_features = 25

    with pytest.raises(DataError, match="tiny_graph: 24 features; 25 are expected"):
        Wider().splits()

    class Unlabelled(TinyGraph):
        def read(self, root):
            data = super().read(root)
            data.y[7] = -1
            return data

    with pytest.raises(DataError, match="node 7 of train has the label -1; 0…2"):
        Unlabelled().splits()
    task = TinyGraph()
    splits = task.splits()
    empty = NodeSet(splits.test.x, splits.test.edge_index, splits.test.nodes[:0], splits.test.labels[:0])
    with pytest.raises(InvalidValue, match="holds no node"):
        task.evaluate(ModulePredictor(task.default_model(), task), empty)
    with pytest.raises(InvalidValue, match=r"outputs of shape \(120, 2\); logits of all nodes, \(120, 3\)"):
        task.evaluate(ModulePredictor(build_model("gcn", task, num_classes=2), task), splits.test)


@pytest.mark.parametrize(
    ("kind", "classes", "sizes"), [(Cora, 7, [126, 500, 14, 1000]), (Citeseer, 6, [108, 500, 12, 1000])]
)
def test_the_published_graphs(data_root: Path, kind: type, classes: int, sizes: list[int]):
    task = kind()
    splits, data = task.splits(data_root), read_planetoid(data_root, task.name)
    assert [len(getattr(splits, name)) for name in ("train", "val", "calibration", "test")] == sizes
    assert torch.equal(splits.test.nodes, data.test_mask.nonzero().flatten())
    assert torch.bincount(splits.train.labels).tolist() == [18] * classes
    assert (task.example_nodes, task.example_edges) == (data.num_nodes, data.num_edges)
    assert task.example_nonzeros == round(len(data.x.values()) / data.num_nodes)
    rows = torch.sparse.sum(splits.train.x, 1).to_dense()
    assert torch.all(torch.isclose(rows, torch.ones(()), atol=1e-5) | (rows == 0))
    assert task.default_model()(splits.train.x, splits.train.edge_index).shape == (data.num_nodes, classes)


def test_cora_is_learned(data_root: Path):
    task = Cora()
    splits = task.splits(data_root)
    torch.manual_seed(0)
    settings = sparing.Train(
        epochs=100, batch_size=140, optimizer="Adam", lr=0.01, weight_decay=5e-4, validate_every=100
    )
    result = fit(task.default_model(), task, splits.train, splits.val, settings)
    assert result.steps == 100  # full batches
    assert task.evaluate(ModulePredictor(result.model, task), splits.test).metrics["accuracy"] > 0.78
