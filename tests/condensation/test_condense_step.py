"""The step condense: what it hands on, what it refuses and why, what it keeps, and what follows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import sparing
from guarded_graph import Guarded
from sparing.condensation.saved import save_condensed
from sparing.condensation.unrolled import LearnedSteps
from sparing.core.errors import (
    CorruptFile,
    DataError,
    IncompatibleStep,
    InvalidValue,
    NoEffect,
    RecipeError,
    SparingError,
)
from sparing.core.files import read_json, write_json
from sparing.core.job import Job
from sparing.core.ledger import Row
from sparing.core.pipeline import advance, begin
from sparing.core.predictor import build_model
from sparing.core.recipe import parse_recipe
from sparing.core.store import Store
from sparing.data.graphs import PackedGraphs, graph_data
from sparing.data.nodes import NodeSet, join_nodes
from sparing.testing import QUICK, TinyGraph, TinyGraphs, survives_kills, tiny_task

BLOCKS = {"name": "blocknet", "num_classes": 3, "image_size": 8, "width": 4, "depth": 1}
PLAIN = {**BLOCKS, "norm": "none"}
SMALL = {"generator_hidden": 8, "checkpoint_every": 2}
IMAGES: dict[str, dict[str, Any]] = {
    "random": {},
    "herding": {"network": BLOCKS, "embed_epochs": 1},
    "k_center": {"network": BLOCKS, "embed_epochs": 1},
    "dc": {"network": BLOCKS, "iterations": 2, "outer_steps": 2, "inner_steps": 1},
    "dsa": {"network": BLOCKS, "iterations": 2, "outer_steps": 1, "inner_steps": 0},
    "dm": {"network": BLOCKS, "iterations": 2},
    "dd": {"network": PLAIN, "settings": {"epochs": 2, "distill_steps": 2, "distill_epochs": 2}},
}
NODES: dict[str, dict[str, Any]] = {
    "random": {},
    "herding": {"network": {"name": "gcn", "hidden": 4}, "embed_epochs": 2},
    "k_center": {"network": {"name": "sage", "hidden": 4}, "embed_epochs": 2},
    "one_step": {"iterations": 3, "network": {"name": "gcn", "hidden": 8}, "edge_threshold": 0.01, "settings": SMALL},
    "multi_step": {"iterations": 1, "outer_steps": 2, "inner_steps": 1, "edge_threshold": 0.01, "settings": SMALL},
}
GRAPHS: dict[str, dict[str, Any]] = {
    "random": {},
    "herding": {"network": {"name": "graph_gcn", "hidden": 4}, "embed_epochs": 1},
    "k_center": {"network": {"name": "graph_gcn", "hidden": 4}, "embed_epochs": 1},
    "one_step": {"iterations": 2, "network": {"name": "graph_gcn", "hidden": 4}},
    "multi_step": {"iterations": 1, "network": {"name": "graph_gcn", "hidden": 4}, "inner_steps": 1, "outer_steps": 2},
}
CASES = [
    pytest.param(make, units, method, fields, id=f"{method}-{units}")
    for make, units, methods in (
        (tiny_task, "image", IMAGES),
        (TinyGraph, "node", NODES),
        (TinyGraphs, "graph", GRAPHS),
    )
    for method, fields in methods.items()
]


def applied(task: sparing.Task, step: sparing.Step) -> tuple[Job, Row]:
    job = begin(task, meter=QUICK)
    after, row, _ = advance(job, step, task.splits(None).test)
    return after, row


def labels_of(data: Any) -> torch.Tensor:
    if isinstance(data, TensorDataset):
        return data.tensors[1]
    return data.labels if isinstance(data, NodeSet) else data.y


def raw_task(mean: float = 100.0, std: float = 20.0, **parts: Any) -> sparing.CustomTask:
    """Images of a mean and deviation that no network would like."""
    tiny = tiny_task().splits(None)
    given = {
        name: TensorDataset(mean + std * getattr(tiny, name).tensors[0], getattr(tiny, name).tensors[1])
        for name in ("train", "test", "val", "calibration")
    } | parts
    return sparing.CustomTask(
        "raw",
        *(given[name] for name in ("train", "test", "val", "calibration")),
        model=lambda: build_model("convnet", num_classes=3, image_size=8, widths=[4]),
        loss=cross_entropy,
        labels="abc",
        capabilities={"images"},
    )


@pytest.mark.parametrize(("make", "units", "method", "fields"), CASES)
def test_the_training_data_are_replaced_by_so_many_of_each_class(make, units, method, fields):
    task = make()
    after, row = applied(task, sparing.Condense(method=method, per_class=2, **fields))
    wanted = 2 * (2 if method == "dd" else 1)
    splits = task.splits(None)
    assert torch.bincount(labels_of(after.train)).tolist() == [wanted] * len(task.labels)
    assert after.val is splits.val
    assert after.calibration is splits.calibration
    assert "condensed" in after.capabilities
    figures = {name: figure.value for name, figure in row.figures.items()}
    assert figures["samples"] == wanted * len(task.labels) == len(after.train)
    assert figures["samples before"] == len(splits.train)
    assert 0 < figures["data bytes"] < figures["data bytes before"]
    assert row.outcome == method
    learned = method not in ("random", "herding", "k_center")
    assert (row.curves.keys() == {"matching loss"}) == learned
    if learned:
        curve = row.curves["matching loss"]
        assert figures["first matching loss"] == curve[0][1]
        assert figures["last matching loss"] == curve[-1][1]
    (picture,) = row.pictures.values()
    assert picture.caption
    # what follows can use it
    batch = (task.collate or torch.utils.data.default_collate)([after.train[i] for i in range(len(after.train))])
    loss = task.loss(task.outputs(after.model, batch), batch)
    assert loss.isfinite()


# --- images


def test_images_are_learned_normalised_and_handed_on_in_the_tasks_own_space_unclipped():
    task = raw_task()
    quiet = {"network": BLOCKS, "iterations": 1, "lr_img": 1e-30}
    after, _ = applied(task, sparing.Condense(method="dm", per_class=4, **quiet))
    real = {tuple(image.flatten().round(decimals=2).tolist()) for image in task.splits(None).train.tensors[0]}
    begun = [tuple(image.flatten().round(decimals=2).tolist()) for image in after.train.tensors[0]]
    assert sum(image in real for image in begun) == 12  # real images to begin with, there and back
    noise, _ = applied(task, sparing.Condense(method="dc", per_class=10, outer_steps=1, inner_steps=0, **quiet))
    images, every = noise.train.tensors[0], task.splits(None).train.tensors[0]
    assert abs(float(images.mean() - every.mean())) < 0.1 * float(every.std())
    assert abs(float(images.std() / every.std()) - 1) < 0.1
    assert images.max() > every.max() - 20  # nothing pulls them back into the range of real ones


def test_chosen_images_are_real_ones_bit_for_bit_and_no_two_the_same():
    task = raw_task()
    rows = {}
    for method in ("random", "herding", "k_center"):
        after, _ = applied(task, sparing.Condense(method=method, per_class=3, **IMAGES[method]))
        every = task.splits(None).train.tensors[0]
        found = [[i for i in range(len(every)) if torch.equal(every[i], image)] for image, _ in after.train]
        assert all(len(places) == 1 for places in found)
        rows[method] = [places[0] for places in found]
        assert len(set(rows[method])) == 9
    assert len(set(map(tuple, rows.values()))) == 3


def test_a_rate_gives_each_class_its_share():
    after, _ = applied(tiny_task(), sparing.Condense(method="random", rate=0.25))
    assert torch.bincount(after.train.tensors[1]).tolist() == [4, 4, 4]


def test_ones_own_folder_of_images(tmp_path):
    draw = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        for number in range(16):
            pixels = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    step = sparing.Condense(
        method="dm", per_class=2, iterations=2, network={"name": "blocknet", "width": 4, "depth": 2}
    )
    done = sparing.run(
        task={"name": "image_folder", "path": str(tmp_path), "size": 8},
        steps=[step, sparing.Train(epochs=1)],
        meter=QUICK,
    )
    assert len(done.job.train) == 4
    (picture,) = done.ledger.rows[0].pictures.values()
    assert "'cats'" in picture.caption
    assert done.ledger.rows[-1].figures["training samples"].value == 4


def test_the_seed_is_the_jobs():
    step = sparing.Condense(method="random", per_class=2)
    job = begin(tiny_task(), meter=QUICK)
    test = job.task.splits(None).test
    one, other, again = (
        advance(job.replace(seed=seed, store=dataclasses.replace(job.store, seed=seed)), step, test)[0].train.tensors[0]
        for seed in (0, 1, 0)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# --- distilled images


def test_distilled_images_hand_on_the_network_that_they_train(tmp_path):
    step = sparing.Condense(method="dd", per_class=2, **IMAGES["dd"])
    done = sparing.run(task=tiny_task(), steps=[step], meter=QUICK, out=tmp_path / "out")
    (row,) = done.ledger.rows
    assert "accuracy" in row.figures  # it is a network, and is measured as one
    assert any("by other steps learns less" in remark for remark in row.remarks)
    found = sparing.load_condensed(tmp_path / "out" / "condense")
    assert found.steps is not None
    assert (found.steps.sets, len(found.steps.learning_rates)) == (2, 4)
    network = plain()
    found.steps.train(network, *found.data.tensors)
    for name, weight in done.job.model.state_dict().items():
        assert torch.equal(weight, network.state_dict()[name]), name
    again = sparing.run(task=tiny_task(), steps=[sparing.Condense(saved=tmp_path / "out" / "condense")], meter=QUICK)
    assert fingerprints(again.job.model) == fingerprints(done.job.model)
    assert again.ledger.rows[0].figures["accuracy"].value == row.figures["accuracy"].value


def plain(**fields: Any) -> nn.Module:
    """The network of distilled images here."""
    return build_model("blocknet", **{name: value for name, value in (PLAIN | fields).items() if name != "name"})


def fingerprints(model: nn.Module) -> dict[str, list[float]]:
    return {name: weight.flatten().tolist() for name, weight in model.state_dict().items()}


def test_distilled_images_are_a_row_that_needs_no_training():
    text = "task: digits\nsteps:\n  - condense: {method: dd}\n  - quantize: {}\n"
    assert sparing.plan(parse_recipe(text)).steps
    with pytest.raises(RecipeError, match="'quantize' needs 'trained'"):
        sparing.plan(parse_recipe(text.replace("{method: dd}", "{method: dm}")))


def test_steps_that_do_not_fit_their_images_or_network():
    condenser = sparing.UnrolledCondenser(2, 2, 1, network=lambda: plain(num_classes=2), epochs=1)
    condenser.fit(torch.randn(6, 1, 8, 8), torch.arange(6) % 2)
    images, labels = condenser.condensed_.tensors
    with pytest.raises(InvalidValue, match="7 images and 7 labels are no 2 sets"):
        condenser.steps_.train(nn.Linear(1, 1), torch.zeros(7, 1, 8, 8), torch.zeros(7, dtype=torch.int64))
    with pytest.raises(InvalidValue, match="missing or not the network's"):
        condenser.steps_.train(plain(depth=2), images, labels)


def test_distilled_images_are_not_read_without_their_steps(tmp_path):
    images = TensorDataset(torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2]).repeat(2))
    steps = LearnedSteps(2, torch.full((4,), 0.1), None)
    folder = save_condensed(tmp_path / "set", images, {}, steps)
    found = sparing.load_condensed(folder)
    assert found.steps is not None
    assert (found.steps.sets, found.steps.initial_weights) == (2, None)
    assert torch.equal(found.steps.learning_rates, steps.learning_rates)
    described = read_json(folder / "condensed.json")
    for sets in (None, 4, 0, True, "2"):
        write_json(folder / "condensed.json", {**described, "sets": sets})
        with pytest.raises(
            CorruptFile, match=rf"sets = {sets!r} of 6 images; equal sets and learning_rates, or neither"
        ):
            sparing.load_condensed(folder)
    with pytest.raises(InvalidValue, match="only images have steps of their own"):
        save_condensed(tmp_path / "no", TinyGraphs().read(None), {}, steps)


def test_a_foreign_folder_cannot_name_any_code_or_size_as_its_network(tmp_path):
    steps = [sparing.Condense(method="dd", per_class=1, **IMAGES["dd"])]
    sparing.run(task=tiny_task(), steps=steps, meter=QUICK, out=tmp_path / "out")
    found = sparing.load_condensed(tmp_path / "out" / "condense")
    settings = found.provenance["settings"]
    for network in ({"name": "os:system"}, {**settings["network"], "width": 10**6}, None):
        told = {**found.provenance, "settings": {**settings, "network": network}}
        save_condensed(tmp_path / "forged", found.data, told, found.steps)
        with pytest.raises(IncompatibleStep, match=r"give network|its weights are not those"):
            applied(tiny_task(), sparing.Condense(saved=tmp_path / "forged"))
    after, _ = applied(tiny_task(), sparing.Condense(saved=tmp_path / "forged", network=PLAIN))
    assert after.predictor is not None


# --- nodes


def test_light_edges_are_cut_where_validation_nodes_say_and_no_test_label_is_seen(monkeypatch):
    monkeypatch.setattr("sparing.condensation.kinds.CUT_EPOCHS", 20)
    step = sparing.Condense(per_class=4, iterations=4, network={"name": "gcn", "hidden": 8}, settings=SMALL)
    after, row = applied(Guarded(), step)
    assert {entry["edge_threshold"] for entry in row.candidates} <= {0.01, 0.1, 0.5}
    (chosen,) = [entry for entry in row.candidates if entry["chosen"]]
    assert chosen["val accuracy"] == max(entry["val accuracy"] for entry in row.candidates)
    assert after.train.edge_index.shape[1] == chosen["edges"] == len(after.train.edge_weight)
    fixed, row = applied(TinyGraph(), dataclasses.replace(step, edge_threshold=0.9))
    assert fixed.train.edge_index.shape == (2, 0)
    assert not row.candidates


def test_chosen_nodes_keep_their_features_and_the_edges_among_them():
    after, _ = applied(TinyGraph(), sparing.Condense(method="random", per_class=6))
    real = TinyGraph().splits(None).train
    dense = real.x.to_dense()
    places = [(dense == row).all(1).nonzero().flatten().tolist() for row in after.train.x]
    assert all(places)
    assert after.train.edge_weight is None
    among = {(a, b) for a, b in real.edge_index.t().tolist()}
    for a, b in after.train.edge_index.t().tolist():
        assert any((i, j) in among for i in places[a] for j in places[b])


def test_weights_of_edges_reach_the_networks_that_take_them():
    x, edges = torch.rand(3, 24), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    nodes, labels = torch.arange(3), torch.tensor([0, 1, 2])
    weighted = NodeSet(x, edges, nodes, labels, torch.tensor([1.0, 1.0, 0.1, 0.1]))
    task = TinyGraph()
    batch = join_nodes([weighted[i] for i in range(3)])
    assert len(batch) == 5
    gcn = build_model("gcn", task).eval()
    taught = sparing.Teacher(gcn)
    expected = gcn(x, edges, weighted.edge_weight)
    assert torch.equal(task.outputs(gcn, batch), expected)
    assert torch.equal(task.outputs(taught, batch), expected)
    assert not torch.allclose(expected, gcn(x, edges))
    gat = build_model("gat", task, hidden=2).eval()
    assert torch.equal(task.outputs(gat, batch), gat(x, edges))
    with pytest.raises(DataError, match=r"edge_weight of shape \(3,\); \(4,\) is expected"):
        NodeSet(x, edges, nodes, labels, torch.ones(3))


# --- sets of graphs


def test_chosen_graphs_stay_as_they_are():
    after, _ = applied(TinyGraphs(), sparing.Condense(method="random", per_class=3))
    real = TinyGraphs().splits(None).train
    everything = [tuple(tensor.flatten().tolist() for tensor in (graph.x, graph.edge_index)) for graph in real]
    for graph in after.train:
        assert tuple(tensor.flatten().tolist() for tensor in (graph.x, graph.edge_index)) in everything


# --- what is refused before anything runs


@pytest.mark.parametrize(
    ("task", "fields", "reason"),
    [
        ("digits", {"method": "one_step"}, r"method = 'one_step' is not for images.*random, herding.*dm, dd"),
        (TinyGraph(), {"method": "dc"}, r"method = 'dc' is not for nodes.*one_step, multi_step"),
        (TinyGraphs(), {"method": "dd"}, r"method = 'dd' is not for graphs"),
        ("digits", {"lr_adj": 0.1}, r"lr_adj = 0.1: dm has no use for it; it takes .*lr_img"),
        ("digits", {"method": "random", "iterations": 3}, r"iterations = 3: random has no use for it"),
        ("digits", {"method": "dm", "rate": 0.1}, r"rate = 0.1: dm has no use for it"),
        ("digits", {"method": "dd", "iterations": 3}, r"iterations = 3: dd has no use for it; it takes .*epochs"),
        ("digits", {"settings": {"momentun": 0.1}}, r"'momentun', which dm does not take. Did you mean 'momentum'"),
        ("digits", {"settings": {"max_iter": 10}}, r"settings has 'max_iter', which is a field"),
        ("digits", {"settings": {"momentum": 2}}, r"momentum = 2; 0 ≤ momentum < 1"),
        ("digits", {"method": "dc", "per_class": 7}, r"outer_steps and inner_steps are known for .*for 7 give both"),
        ("digits", {"embed_epochs": 3}, r"embed_epochs = 3: only herding and k_center"),
        ("digits", {"edge_threshold": 0.1}, r"edge_threshold = 0.1: dm gives no weights"),
        (TinyGraph(), {"edge_threshold": 0.1, "settings": {"structure": "identity"}}, r"one_step gives no weights"),
        (TinyGraph(), {"network": {"name": "gat"}}, r"nodes are condensed with 'gcn'"),
        (TinyGraph(), {"network": {"name": "gcn", "depth": 3}}, r"nodes are condensed with 'gcn'"),
        (TinyGraphs(), {"network": "gcn"}, r"'gcn' has no forward_dense; graph_gcn is one that has"),
        (TinyGraphs(), {"lr_img": 0.1}, r"lr_img = 0.1: one_step has no use for it; it takes .*lr_adj"),
        ("digits", {"method": "random", "network": "blocknet"}, r"random looks at no network"),
        ("digits", {"network": {"name": "blocknet", "widht": 3}}, r"widht"),
        (
            "digits",
            {"method": "dd", "network": {"name": "blocknet", "norm": "batch"}},
            r"has a batch norm \(features.1\), whose statistics dd could not learn through",
        ),
        ("trec", {}, r"condenses classified images, node_classification, graph_classification; 'trec' has"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else value.name,
)
def test_planning_refuses_what_does_not_fit(task, fields, reason):
    step = sparing.Condense(**fields)
    if isinstance(task, str):
        from sparing.core.registry import resolve

        task = resolve("tasks", task)()
    with pytest.raises(SparingError, match=reason):
        step.check(task)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"per_class": 3, "rate": 0.1}, r"per_class = 3 and rate = 0.1"),
        ({"network": "blocknett"}, r"network = 'blocknett': .*Did you mean 'blocknet'"),
        ({"network": {"width": 3}}, r"the key 'name' is needed"),
        ({"device": "abacus"}, r"device = 'abacus'"),
        ({"id": "model"}, r"the saved model's folder has this name"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_fields_that_contradict_each_other(fields, reason):
    with pytest.raises(InvalidValue, match=reason):
        sparing.Condense(**fields)


def test_a_step_that_needs_condensed_data_is_told_who_gives_them():
    from sparing.core.pipeline import _steps_with

    assert _steps_with("gives", "condensed") == ["condense"]
    assert _steps_with("gives", "trained") == [
        "distil",
        "distil_fair",
        "federate",
        "finetune",
        "predictive_exit",
        "train",
    ]


# --- what is refused when the data are seen, with the culprit's place


def spoiled(place: int, value: float) -> sparing.CustomTask:
    images, labels = tiny_task().splits(None).train.tensors
    images = images.clone()
    images[place, 0, 1, 2] = value
    return raw_task(train=list(zip(images, labels, strict=True)))


@pytest.mark.parametrize("method", ["random", "dm"])
def test_bad_images_are_named(method):
    step = sparing.Condense(method=method, per_class=2, **IMAGES[method])
    with pytest.raises(InvalidValue, match="image 17 has entries that are not finite"):
        applied(spoiled(17, float("nan")), step)
    images, labels = tiny_task().splits(None).train.tensors
    with pytest.raises(DataError, match="no training sample of class 'c', of 32"):
        applied(raw_task(train=TensorDataset(images[labels < 2], labels[labels < 2])), step)
    with pytest.raises(DataError, match=r"label 3; 0…2 is expected"):
        applied(raw_task(train=TensorDataset(images, labels.where(torch.arange(48) != 5, 3))), step)
    soft = torch.nn.functional.one_hot(labels, 3).float()
    with pytest.raises(InvalidValue, match=r"48 samples and labels \(48, 3\)"):
        applied(raw_task(train=TensorDataset(images, soft)), step)
    rare = torch.cat([torch.arange(48)[labels < 2], torch.tensor([2])])
    with pytest.raises(InvalidValue, match=r"2 images of class ('c'|2).*(it has|there are) 1"):
        applied(raw_task(train=TensorDataset(images[rare], labels[rare])), step)


def test_images_that_change_when_they_are_read_are_not_condensed(tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "b").mkdir()
    for number in range(16):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png")
    steps = [sparing.Augment(flip=0.5), sparing.Condense(method="random", per_class=1), sparing.Train(epochs=1)]
    with pytest.raises(IncompatibleStep, match="change at random whenever they are read"):
        sparing.run(
            task={"name": "image_folder", "path": str(tmp_path / "photos"), "size": 8}, steps=steps, meter=QUICK
        )


class Directed(TinyGraph):
    """With one edge that does not run back."""

    def read(self, root):
        data = super().read(root)
        data.edge_index = torch.cat([torch.tensor([[0], [119]]), data.edge_index], 1)
        return data


class NoClass(TinyGraph):
    """Without training nodes of one class."""

    def read(self, root):
        data = super().read(root)
        data.train_mask &= data.y != 1
        return data


class Infinite(TinyGraph):
    """With a feature that is no number."""

    def read(self, root):
        data = super().read(root)
        x = data.x.to_dense()
        x[33, 0] = float("inf")
        data.x = x
        return data


@pytest.mark.parametrize(
    ("task", "fields", "reason"),
    [
        (Directed, {}, "edge 0 from 0 to 119 does not run back"),
        (NoClass, {}, "no training sample of class 'b'"),
        (Infinite, {}, "the features of node 33 are not finite"),
        (TinyGraph, {"per_class": 19}, "class 0: 19 nodes to begin with, but it has 18|no smaller"),
        (TinyGraph, {"rate": 0.01}, r"gets no synthetic sample|fewer than one for each"),
    ],
    ids=["directed", "no-class", "infinite", "too-few", "rate"],
)
def test_bad_graphs_of_nodes_are_named(task, fields, reason):
    with pytest.raises(SparingError, match=reason):
        applied(
            task(),
            sparing.Condense(
                iterations=1, settings=SMALL, **({"per_class": 2} | fields if "rate" not in fields else fields)
            ),
        )


class OneWay(TinyGraphs):
    """Whose graphs are directed, the ninth at least."""

    def read(self, root):
        graphs = list(PackedGraphs.of(super().read(root)))
        return PackedGraphs.of(
            [graph_data(g.x, torch.cat([g.edge_index, torch.tensor([[0], [2]])], 1), g.y) for g in graphs]
        )


def test_directed_graphs_are_named_and_taken_when_asked_for():
    fields: dict[str, Any] = {"per_class": 1, **GRAPHS["one_step"]}
    with pytest.raises(InvalidValue, match=r"graph \d+: its edge from 0 to 2 does not run back; .*symmetric=False"):
        applied(OneWay(), sparing.Condense(**fields))
    after, _ = applied(OneWay(), sparing.Condense(**fields, settings={"symmetric": False}))
    assert len(after.train) == 2


def test_a_set_that_is_no_smaller_is_no_economy():
    for step in (
        sparing.Condense(method="random", rate=1),
        sparing.Condense(method="dm", per_class=16, **IMAGES["dm"]),
        sparing.Condense(method="dd", per_class=8, **IMAGES["dd"]),
    ):
        with pytest.raises(NoEffect, match="condensed set of 48 images is no smaller than the 48 real ones"):
            applied(tiny_task(), step)


# --- what is kept


def test_the_set_lies_beside_the_model_with_all_that_is_known_of_it(tmp_path):
    step = sparing.Condense(method="dm", per_class=2, **IMAGES["dm"])
    steps = [step, sparing.Train(epochs=1)]
    done = sparing.run(task=tiny_task(), steps=steps, meter=QUICK, out=tmp_path / "out", seeds=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "condense",
        "condense-seed1",
        "model",
        "model-seed1",
    }
    found = sparing.load_condensed(tmp_path / "out" / "condense")
    for (image, label), (kept, of) in zip(found.data, done.job.train, strict=True):
        assert torch.equal(image, kept)
        assert label == of
    told = found.provenance
    assert told["from"]["task"] == "tiny"
    assert told["from"]["samples"] == 48
    assert len(told["from"]["data"]) == 64
    assert told["seed"] == 0
    assert sparing.load_condensed(tmp_path / "out" / "condense-seed1").provenance["seed"] == 1
    assert told["settings"]["method"] == "dm"
    assert told["settings"]["network"]["width"] == 4
    assert len(told["loss_curve"]) == 2
    assert len(told["mean"]) == len(told["std"]) == 1
    assert told["cost"]["wall_s"] > 0
    assert told["cost"]["bytes_before"] > told["cost"]["bytes_after"]


@pytest.mark.parametrize(
    ("task", "fields"),
    [(tiny_task, IMAGES["dm"]), (TinyGraph, NODES["one_step"]), (TinyGraphs, GRAPHS["one_step"])],
    ids=["images", "nodes", "graphs"],
)
def test_a_saved_set_trains_the_same_network_as_the_one_that_was_made(task, fields, tmp_path):
    train = sparing.Train(epochs=2, batch_size=4)
    made = sparing.run(
        task=task(), steps=[sparing.Condense(per_class=2, **fields), train], meter=QUICK, out=tmp_path / "out"
    )
    saved = sparing.Condense(id="other", saved=tmp_path / "out" / "condense")
    again = sparing.run(task=task(), steps=[saved, train], meter=QUICK, out=tmp_path / "again")
    assert fingerprints(again.job.model) == fingerprints(made.job.model)
    row = again.ledger.rows[0]
    assert row.outcome == f"read from {tmp_path / 'out' / 'condense'}"
    assert row.figures["samples"].value == made.ledger.rows[0].figures["samples"].value
    one, other = (sparing.load_condensed(tmp_path / name) for name in ("out/condense", "again/other"))
    assert one.provenance == other.provenance


def test_somebody_elses_set_is_taken_as_it_is(tmp_path):
    images, labels = torch.rand(6, 1, 8, 8) * 300 - 20, torch.tensor([0, 0, 1, 1, 2, 2])
    save_condensed(tmp_path / "theirs", TensorDataset(images, labels), {"from": "a mail"})
    after, row = applied(tiny_task(), sparing.Condense(saved=tmp_path / "theirs"))
    assert torch.equal(after.train.tensors[0], images)
    assert row.figures["samples"].value == 6


@pytest.mark.parametrize(
    ("data", "task", "reason"),
    [
        (
            TensorDataset(torch.zeros(2, 1, 9, 9), torch.arange(2)),
            tiny_task,
            r"images \(1, 9, 9\) .* has images \(1, 8, 8\)",
        ),
        (TensorDataset(torch.zeros(2, 1, 8, 8), torch.tensor([0, 3])), tiny_task, "classes up to 3"),
        (TensorDataset(torch.zeros(2, 1, 8, 8), torch.arange(2)), TinyGraph, "holds images; node_graph are needed"),
        (TensorDataset(torch.full((2, 1, 8, 8), torch.nan), torch.arange(2)), tiny_task, "image 0 has entries"),
        (graph_data(torch.zeros(2, 5), torch.zeros(2, 0, dtype=torch.int64), torch.arange(2)), TinyGraph, "5 features"),
        (
            [graph_data(torch.zeros(2, 9), torch.zeros(2, 0, dtype=torch.int64), torch.tensor([1]))],
            TinyGraphs,
            "9 features",
        ),
    ],
    ids=["size", "class", "kind", "nan", "node-features", "graph-features"],
)
def test_a_saved_set_that_does_not_fit_the_task(data, task, reason, tmp_path):
    save_condensed(tmp_path / "set", data, {})
    with pytest.raises(SparingError, match=reason):
        applied(task(), sparing.Condense(saved=tmp_path / "set"))


def test_a_saved_set_leaves_nothing_to_be_said_about_its_making(tmp_path):
    save_condensed(tmp_path / "set", TensorDataset(torch.zeros(2, 1, 8, 8), torch.arange(2)), {})
    with pytest.raises(InvalidValue, match=r"saved = .* is a finished set, and per_class = 3 makes one"):
        sparing.Condense(saved=tmp_path / "set", per_class=3)
    with pytest.raises(InvalidValue, match=r"network = 'blocknet': saved = .* are no distilled images"):
        sparing.Condense(saved=tmp_path / "set", network="blocknet")
    with pytest.raises(IncompatibleStep, match="holds images; graphs are needed for 'tiny_graphs'"):
        sparing.Condense(saved=tmp_path / "set").check(TinyGraphs())
    with pytest.raises(InvalidValue, match=r"saved = nowhere: no condensed set that can be read"):
        sparing.Condense(saved="nowhere").check(tiny_task())


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(b"")
    with pytest.raises(InvalidValue, match="is no condensed set, which would take its place"):
        save_condensed(tmp_path / "photos", TensorDataset(torch.zeros(2, 1, 8, 8), torch.arange(2)), {})
    assert (tmp_path / "photos" / "holiday.png").exists()


# --- what follows, and what comes before


def test_a_condensed_set_trains_a_perturbed_student_that_is_quantised():
    steps = [
        sparing.Train(id="whole", epochs=8, batch_size=8, lr=0.02),
        sparing.Condense(method="dm", per_class=4, **{**IMAGES["dm"], "iterations": 20}),
        sparing.Leap(rho=0.3),
        sparing.Distil(
            teacher="whole",
            model={"name": "convnet", "num_classes": 3, "image_size": 8, "widths": [4]},
            epochs=5,
            batch_size=12,
            lr=0.05,
            validate_every=5,
        ),
        sparing.Quantize(goal="bytes", max_loss=1.0, samples=8),
    ]
    done = sparing.run(task=tiny_task(), steps=steps, meter=QUICK)
    rows = {row.id: row for row in done.ledger.rows}
    assert any("has been trained already" in remark for remark in rows["condense"].remarks)
    assert rows["distil"].figures["training samples"].value == 5 * 12
    assert rows["quantize"].figures["model bytes"].value < rows["distil"].figures["model bytes"].value


def test_a_condensed_graph_trains_a_network_that_is_taught_and_exported():
    steps = [
        sparing.Train(id="whole", epochs=60, lr=0.02),
        sparing.Condense(per_class=6, **{**NODES["one_step"], "iterations": 20}),
        sparing.Distil(teacher="whole", model="gcn", epochs=60, lr=0.02, temperature=1),
        sparing.Export(),
    ]
    done = sparing.run(task=TinyGraph(), steps=steps, meter=QUICK)
    assert done.ledger.rows[-1].figures["accuracy"].value > 0.6
    assert done.predictor.kind == "onnx"


def test_condensed_graphs_train_a_network_that_is_averaged_and_exported():
    steps = [
        sparing.Condense(per_class=4, **{**GRAPHS["one_step"], "iterations": 10}),
        sparing.Ema(decay=0.9),
        sparing.Train(epochs=60, batch_size=8, lr=0.02),
        sparing.Export(),
    ]
    done = sparing.run(task=TinyGraphs(), steps=steps, meter=QUICK)
    assert done.ledger.rows[-1].figures["accuracy"].value > 0.6
    assert done.predictor.kind == "onnx"


KILLED = {
    "nodes": (TinyGraph, NODES["one_step"] | {"edge_threshold": None}),
    "graphs": (TinyGraphs, GRAPHS["multi_step"] | {"iterations": 3, "settings": {"checkpoint_every": 1}}),
    "herding": (tiny_task, {"method": "herding", "network": BLOCKS, "embed_epochs": 2}),
    "dd": (
        tiny_task,
        {"method": "dd", "network": PLAIN, "settings": {**IMAGES["dd"]["settings"], "checkpoint_every": 1}},
    ),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_condensing_ends_with_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sparing.condensation.kinds.CUT_EPOCHS", 3)
    task, fields = KILLED[name]
    method = "multi_step" if name == "graphs" else fields.get("method")
    step = sparing.Condense(**{"per_class": 2, **fields, "method": method})

    def start(place: Path) -> Any:
        return sparing.run(task=task(), steps=[step], meter=QUICK, store=Store(place / "store"), out=place / "out")

    whole = survives_kills(start, tmp_path, deaths=3)
    one, other = (sparing.load_condensed(tmp_path / place / "out" / "condense") for place in ("whole", "broken"))
    assert whole.ledger.rows
    assert tensors(one) == tensors(other)
    assert one.provenance["loss_curve"] == other.provenance["loss_curve"]


def tensors(found: Any) -> dict[str, list[Any]]:
    from sparing.condensation.saved import tensors_of

    return {name: tensor.flatten().tolist() for name, tensor in tensors_of(found.data, found.steps)[1].items()}
