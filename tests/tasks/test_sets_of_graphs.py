"""Graph classification: batches, splits, one logit, the whole way from real graphs to a saved INT8 folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import Subset
from torch_geometric.data import Data

import sparing
from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import roc_auc
from sparing.core.predictor import ModulePredictor, build_model, to_onnx
from sparing.core.predictor.module import count_macs
from sparing.core.registry import resolve
from sparing.core.training import fit
from sparing.data.graphs import PackedGraphs
from sparing.data.tu import read_tu, save_tu, tu_split
from sparing.tasks.graphs.sets import NCI1, Mutag, TuFolder
from sparing.testing import QUICK, TaskCase, TinyGraphs, check_task

SMALL = {"name": "graph_gcn", "hidden": 16, "depth": 2}
TRAIN = sparing.Train(id="gcn", epochs=20, batch_size=16, optimizer="Adam", lr=0.02, validate_every=20)


class OneLogit(TinyGraphs):
    """Paths and rings by one logit."""

    name = "one_logit"
    one_logit = True


class Weighted(TinyGraphs):
    """Whose edges have weights."""

    name = "weighted"
    edge_weight = True

    def read(self, root: Path | None) -> list[Data]:
        graphs = super().read(root)
        for graph in graphs:
            graph.edge_weight = torch.full((graph.edge_index.shape[1],), 0.5)
        return graphs


def rings(place: Path, count: int = 60, label: int = 2) -> Path:
    """A folder of text files without features: paths are of class 1, rings of ``label``."""
    lines: dict[str, list[str]] = {"A": [], "graph_indicator": [], "graph_labels": []}
    first = 1
    for number in range(count):
        size, ring = 4 + number // 2 % 4, number % 2
        for node in range(size - 1 + ring):
            one, other = first + node, first + (node + 1) % size
            lines["A"] += [f"{one}, {other}", f"{other}, {one}"]
        lines["graph_indicator"] += [str(number + 1)] * size
        lines["graph_labels"].append(str(label if ring else 1))
        first += size
    place.mkdir(exist_ok=True)
    for name, rows in lines.items():
        (place / f"RINGS_{name}.txt").write_text("\n".join(rows), "ascii")
    return place


@pytest.mark.parametrize("kind", [OneLogit, Weighted])
def test_a_user_can_have_the_checks_for_graphs_of_his_own(kind: type, tmp_path: Path) -> None:
    check_task(TaskCase(kind), tmp_path)


def test_splits_are_the_permutation_s_tenths() -> None:
    task = TinyGraphs()
    splits, everything, rows = task.splits(), PackedGraphs.of(task.read(None)), tu_split(120)
    assert [len(getattr(splits, name)) for name in ("train", "val", "calibration", "test")] == [86, 12, 10, 12]
    for name in ("val", "test"):
        expected = everything.subset(torch.from_numpy(rows[name])).tensors()
        assert all(torch.equal(expected[key], value) for key, value in getattr(splits, name).tensors().items())
    x = torch.cat([getattr(splits, name).x for name in ("train", "val", "calibration", "test")])
    assert torch.equal(x.sort(0).values, everything.x.sort(0).values)
    other = TinyGraphs(split_seed=1).splits()
    assert not torch.equal(other.test.x[:8], splits.test.x[:8])
    few = TinyGraphs(train_limit=20, test_limit=5).splits()
    assert (len(few.train), len(few.calibration), len(few.val), len(few.test)) == (18, 2, 12, 5)


def test_batches_are_gathered_and_pack_lists_alike() -> None:
    task = TinyGraphs()
    train = task.splits().train
    items = train.__getitems__([3, 0, 3])
    assert isinstance(items, PackedGraphs)  # no loop over graphs
    (gathered,) = batches_of(Subset(train, [3, 0, 3]), 3, task.collate)
    for batch in (task.collate([train[3], train[0], train[3]]), gathered, train.take(torch.tensor([3, 0, 3]))):
        assert torch.equal(batch.x, torch.cat([train[i].x for i in (3, 0, 3)]))
        assert batch.node_ptr.tolist() == [0, *np.cumsum([train[i].num_nodes for i in (3, 0, 3)])]
        assert torch.equal(batch.y, train.y[[3, 0, 3]])
        assert batch.edge_weight is None
        edges = batch.edge_index[:, -train[3].num_edges :] - batch.node_ptr[2]
        assert torch.equal(edges, train[3].edge_index)


def test_weights_of_edges_reach_the_model() -> None:
    task, plain = Weighted(), TinyGraphs()
    model = plain.default_model().eval()
    batch = task.collate(task.splits().val)
    assert batch.edge_weight is not None
    found = task.outputs(model, batch)
    torch.testing.assert_close(found, model(*batch[:3], batch.edge_weight))
    assert not torch.allclose(found, plain.outputs(model, plain.collate(plain.splits().val)), atol=1e-4)
    exported = to_onnx(model, task=task)
    np.testing.assert_allclose(task.outputs(exported, batch), found.detach(), rtol=1e-4, atol=1e-6)
    # condensed graphs with weights train a model for a set without
    once = sparing.Train(epochs=1, batch_size=32)
    assert fit(model, plain, task.splits().train, plain.splits().val, once).steps == 3
    with pytest.raises(InvalidValue, match="this graph takes"):
        plain.evaluate(to_onnx(model, task=plain), task.splits().test)
    with pytest.raises(DataError, match="weighted: edges without weights, but edge_weight = True"):
        Weighted._cut(task, plain.read(None))


def test_evaluation_and_multiply_accumulates_are_per_graph() -> None:
    task = TinyGraphs()
    model = build_model("graph_gcn", task, hidden=4, depth=1).eval()
    splits = task.splits()
    found = task.evaluate(ModulePredictor(model, task), splits.test)
    outcome = [model(*task.collate([graph])[:3]).argmax(1).item() == graph.y.item() for graph in splits.test]
    assert found.per_unit is not None
    assert found.per_unit.tolist() == outcome
    assert set(found.by_class) <= {"path", "ring"}
    for count in (1, 3):
        x, *_ = inputs = task.example_input(count)
        assert count_macs(model, inputs)[0] == (len(x) * 2 * 4 + count * 4 * 2) // count


def test_one_logit_is_the_binary_cross_entropy_and_the_area_under_the_curve() -> None:
    task = OneLogit()
    assert task.model_fields() == {"in_features": 2, "num_classes": 1}
    assert task.headline.name == "roc_auc"
    torch.manual_seed(0)
    model = task.default_model().eval()
    batch = task.collate(task.splits().train)
    logits = task.outputs(model, batch)
    assert logits.shape == (86, 1)
    expected = binary_cross_entropy_with_logits(logits[:, 0], batch.y.float())
    torch.testing.assert_close(task.loss(logits, batch), expected)
    found = task.evaluate(ModulePredictor(model, task), task.splits().train)
    scores = logits[:, 0].detach().numpy()
    assert found.metrics["roc_auc"] == pytest.approx(roc_auc_score(batch.y, scores))
    assert found.metrics["nll"] == pytest.approx(expected.item(), rel=1e-5)
    assert found.metrics["accuracy"] == np.mean((scores > 0) == (batch.y.numpy() == 1))
    assert found.per_unit is None
    assert found.by_class == {}
    one_class = task.splits().train.subset((task.splits().train.y == 1).nonzero()[:, 0])
    assert np.isnan(task.evaluate(ModulePredictor(model, task), one_class).metrics["roc_auc"])
    with pytest.raises(InvalidValue, match=r"outputs of shape \(12, 2\); one logit, \(12, 1\)"):
        task.evaluate(ModulePredictor(build_model("graph_gcn", task, num_classes=2), task), task.splits().test)


def test_the_area_under_the_curve_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = draw.integers(0, 9, 30).astype(np.float64), draw.random(30) < 0.3
        positive[:2] = True, False
        assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert np.isnan(roc_auc(np.arange(3.0), np.zeros(3, bool)))


def test_one_logit_the_whole_way(tmp_path: Path) -> None:
    done = sparing.run(task=OneLogit(), model=SMALL, steps=[TRAIN], meter=QUICK, out=tmp_path / "run")
    (row,) = done.ledger.rows
    assert row.runtime == "onnxruntime"
    assert row.figures["roc_auc"].value > 0.95
    assert done.ledger.outcomes.get("0/gcn") is None


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = rings(tmp_path / "rings")
    task = TuFolder(str(folder), split_seed=3)
    assert task.name == "tu_folder:rings"
    assert task.labels == ("1", "2")
    assert task.in_features == 3  # degrees 0, 1 and 2, for want of labels and attributes
    assert (task.example_nodes, task.example_edges) == (5, 10)
    assert TuFolder(str(folder), features="constant").in_features == 1
    assert TuFolder(str(folder), max_degree=1).in_features == 2
    assert len(task.splits().train) == 43
    save_tu(read_tu(folder), tmp_path / "rings.npz")
    again = TuFolder("rings.npz", split_seed=3).splits(tmp_path)  # looked for in the data root
    assert torch.equal(again.train.x, task.splits().train.x)
    assert TuFolder(str(folder), one_logit=True).headline.name == "roc_auc"
    with pytest.raises(DataError, match="'nowhere': neither nowhere nor"):
        TuFolder("nowhere").splits(tmp_path)
    with pytest.raises(DataError, match="1 classes; at least two"):
        TuFolder(str(rings(tmp_path / "one", label=1))).splits()
    for fields, message in (
        ({"features": "all"}, "features = 'all'"),
        ({"max_degree": 0}, "max_degree = 0"),
        ({"one_logit": 1}, "one_logit = 1; true or false"),
        ({"split_seed": -1}, "split_seed = -1"),
        ({"train_limit": 0}, "train_limit = 0"),
    ):
        with pytest.raises(InvalidValue, match=message):
            TuFolder(str(folder), **fields)


def test_wrong_graphs_are_named() -> None:
    class Wider(TinyGraphs):
        in_features = 3

    class Other(TinyGraphs):
        labels = ("path",)

    class Few(TinyGraphs):
        def read(self, root: Path | None) -> list[Data]:
            return super().read(root)[:2]

    with pytest.raises(DataError, match="tiny_graphs: 2 features; 3 are expected"):
        Wider().splits()
    with pytest.raises(DataError, match="graph 1 has the class 1; 0…0 is expected"):
        Other().splits()
    with pytest.raises(DataError, match="2 graphs leave none for training"):
        Few().splits()
    task = TinyGraphs()
    with pytest.raises(InvalidValue, match="holds no graph"):
        task.evaluate(ModulePredictor(task.default_model(), task), [])


@pytest.mark.parametrize("name", ["mutag", "nci1", "proteins"])
def test_published_sets_say_their_sizes(data_root: Path, name: str) -> None:
    task = resolve("tasks", name)()
    splits = task.splits(data_root)
    parts = [splits.train, splits.calibration, splits.val, splits.test]
    count = sum(map(len, parts))
    assert len(splits.test) == len(splits.val) == -(-count // 10)
    nodes, edges = sum(len(part.x) for part in parts), sum(part.edge_index.shape[1] for part in parts)
    assert task.example_nodes == round(nodes / count)
    assert abs(task.example_edges - edges / count) < 1
    if name == "mutag":
        assert [len(part) for part in parts] == [135, 15, 19, 19]
        assert len(Mutag(train_limit=40).splits(data_root).train) == 36


ANSWERS = """
import json, sys, numpy as np, sparing
z = np.load(sys.argv[2])
answer = sparing.load(sys.argv[1])(z["x"], z["edge_index"], z["node_ptr"])
print(json.dumps({"answer": np.asarray(answer).tolist(), "torch": "torch" in sys.modules}))
"""


def test_nci1_trained_quantised_and_answered_in_a_clean_process(data_root: Path, tmp_path: Path) -> None:
    task = NCI1(train_limit=200, test_limit=40)
    steps = [
        sparing.Train(id="gcn", epochs=4, batch_size=32, optimizer="Adam", lr=0.01, validate_every=4),
        sparing.Quantize(id="int8", goal="bytes", max_loss=1.0, samples=20),
    ]
    done = sparing.run(task=task, model=SMALL, steps=steps, meter=QUICK, data=data_root, out=tmp_path / "run")
    gcn, int8 = done.ledger.rows
    assert [row.runtime for row in (gcn, int8)] == ["onnxruntime"] * 2
    assert gcn.figures["parameters"].value == 37 * 16 + 16 + 16 * 16 + 16 + 2 * 16 + 2
    assert gcn.figures["training samples"].value == 4 * 180
    assert int8.figures["model bytes"].value < gcn.figures["model bytes"].value
    assert int8.outcome.startswith("int8")
    split = task.splits(data_root).test
    batch = task.collate(split)
    inputs = tmp_path / "graphs.npz"
    np.savez(inputs, **{name: getattr(batch, name).numpy() for name in ("x", "edge_index", "node_ptr")})
    told = subprocess.run(
        [sys.executable, "-c", ANSWERS, str(done.folder / "model"), str(inputs)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found = json.loads(told.stdout)
    assert not found["torch"]
    right = np.array(found["answer"]).argmax(1) == batch.y.numpy()
    assert right.mean() == int8.figures["accuracy"].value
    assert right.tolist() == done.ledger.outcomes["0/int8"].astype(bool).tolist()
