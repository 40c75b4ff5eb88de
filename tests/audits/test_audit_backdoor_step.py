"""The step: what it audits, what it simulates, what it tells, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from backdoor_cases import CLASSES, SIZE, TARGET, pictures, white_patch
from torch import nn
from torch.utils.data import TensorDataset

import sparing
from sparing.audits.backdoor.finding import Finding
from sparing.audits.backdoor.neural_cleanse import NeuralCleanse, Reversed, stamp_of
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.step import AuditBackdoor, begun_anew, packed, picture, pixels_of, unpacked
from sparing.condensation.saved import save_condensed
from sparing.condensation.step import Condense
from sparing.core.errors import InvalidValue, NoEffect, RecipeError
from sparing.core.predictor import build_model
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.store import Store
from sparing.data.preprocessing import ChannelsFirst, Decode, Normalise, ToFloat
from sparing.testing import QUICK
from sparing.testing.graphs import TinyGraph, TinyGraphs

NETWORK = {
    **{"name": "blocknet", "in_channels": 1, "num_classes": CLASSES, "image_size": SIZE},
    **{"width": 8, "depth": 2, "norm": "none", "hidden": 24, "first_padding": 1},
}
CONDENSE = Condense(
    method="dc", per_class=2, iterations=1, outer_steps=2, inner_steps=1, batch_real=8, network=NETWORK,
    settings={"init": "real"},
)  # fmt: skip
FEW = {
    "neural_cleanse": {"epochs": 1},
    "unit_stimulation": {"steps": 2, "pairs": 2},
    "patch_scan": {"sides": [4], "random": 0, "images": 20},
    "strip": {"blends": 3, "inputs": 8},
    "fine_pruning": {"epochs": 1},
    "nad": {"epochs": 1},
}
"""Settings that cost little."""
TRAIN = sparing.Train(epochs=8, batch_size=16, lr=0.01)
CHEAP = ("patch_scan", "pixel_range", "residual_map", "own_set_comparison")


def task(name: str = "pictures", labels: str = "abcdef", tests: int = 60, **given) -> sparing.CustomTask:
    sets = [TensorDataset(*pictures(count, seed)) for seed, count in enumerate((120, tests, 24, 24))]
    preprocessing = Preprocessing((Decode("L"), ChannelsFirst(), ToFloat(), Normalise((0.4,), (0.25,))))
    fields = {"preprocessing": preprocessing, "capabilities": {"images"}} | given
    return sparing.CustomTask(
        name,
        *sets,
        model=lambda: named(NETWORK),
        loss=nn.functional.cross_entropy,
        labels=labels,
        **fields,
    )


def named(fields: dict) -> nn.Module:
    own = dict(fields)
    return build_model(own.pop("name"), **own)


def cheap(*defences: str, **given) -> AuditBackdoor:
    asked = defences or CHEAP
    settings = {name: FEW[name] for name in asked if name in FEW}
    return AuditBackdoor(**{"defences": asked, "settings": settings, "victims": 2, "epochs": 2} | given)


def run(folder, *steps, **given):
    return sparing.run(
        task=task(), steps=steps, meter=QUICK, store=Store(folder / "store"), out=folder / "out", **given
    )


def verdicts(row, end: str = "") -> dict[str, str]:
    found = {entry["name"]: entry["verdict"] for entry in row.candidates}
    return {name.removesuffix(end): verdict for name, verdict in found.items() if name.endswith(end)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Condensed, audited by every defence, with an attack that leaves the range of pixels."""
    folder = tmp_path_factory.mktemp("whole")
    audit = AuditBackdoor(
        settings=FEW, holdout=60, victims=2, epochs=2, condense=CONDENSE, simulate="doorping", portion=0.1, size=3,
        clip=None, alpha=1000, max_steps=10,
    )  # fmt: skip
    return folder, run(folder, CONDENSE, audit)


def test_a_given_set_is_audited_without_knowing_an_attack(whole):
    row = whole[1].ledger.rows[-1]
    found = {entry["name"]: entry for entry in row.candidates if "attack" not in entry["name"]}
    assert len(found) == 12
    assert found["spectral_signatures"]["verdict"] == "not applicable"
    assert "at most 2 images a class" in found["spectral_signatures"]["remark"]
    assert found["residual_map"]["verdict"] in ("evidence", "no evidence")
    assert found["own_set_comparison"]["verdict"] in ("evidence", "no evidence")  # against one condensed by itself
    assert row.figures["clean accuracy"].interval is not None
    assert "does not mean it is safe" in row.remarks[0] or "False alarms happen" in row.remarks[0]
    assert row.outcome.startswith("audit: ")


def test_model_and_data_go_on_unchanged(whole):
    job = whole[1].job
    assert len(job.train) == 2 * CLASSES
    assert "trained" not in job.capabilities
    assert job.predictor is None


def test_an_attack_is_simulated_with_both_controls(whole):
    row = whole[1].ledger.rows[-1]
    figures = {name: figure.value for name, figure in row.figures.items()}
    assert figures["poisoned share of the class"] == pytest.approx(12 / (12 + 18), abs=0.05)
    assert figures["updates of the trigger"] == 1
    assert figures["updates that moved it"] == 1
    assert figures["highest pixel of the trigger"] > 1 or figures["lowest pixel of the trigger"] < 0
    for name in (
        "attack success",
        "attack success, all images",
        "attack success on clean set",
        "target without trigger",
    ):
        assert 0 <= figures[name] <= 1
    assert 0 <= figures["attack success, valid pixels"] <= 1
    lost = row.figures["accuracy lost to the attack"]
    assert lost.how == "derived"
    assert len(verdicts(row, ", simulated attack")) == 12
    assert verdicts(row, ", simulated attack")["pixel_range"] == "evidence"
    assert {"condensed images, simulated attack", "trigger, simulated attack"} <= set(row.pictures)


def test_the_full_report_is_in_the_runs_folder(whole):
    folder, done = whole
    report = json.loads((folder / "out" / "audit_backdoor" / "audit.json").read_text())
    assert set(report) == {"audit", "attack"}
    attack = report["attack"]
    assert attack["provenance"]["poisoned"] is True
    assert attack["provenance"]["mode"] == "doorping"
    assert attack["trigger"]["valid_pixels"] is False
    assert len(attack["victims"]) == len(attack["control"]) == len(attack["clamped"]) == 2
    assert attack["victims"][0]["asr"]["interval95"][0] <= attack["victims"][0]["asr"]["value"]
    assert attack["summary"]["victims"]["asr"]["mean"] == done.ledger.rows[-1].figures["attack success"].value
    assert len(report["audit"]["findings"]) == 12
    page = (folder / "out" / "audit_backdoor" / "audit.md").read_text()
    assert "# Audit of what the job has" in page
    assert "# A simulated attack" in page
    assert "the set, valid pixels" in page


def test_what_is_read_from_the_store_is_what_was_computed(whole):
    folder, done = whole
    again = run(folder, CONDENSE, AuditBackdoor(**done.ledger.rows[-1].config | {"condense": CONDENSE}))
    assert again.ledger.canonical() == done.ledger.canonical()


def test_a_network_alone_is_audited_by_what_needs_no_set(tmp_path):
    done = run(tmp_path, TRAIN, cheap(*CHEAP, "activation_clustering"))
    row = done.ledger.rows[-1]
    data_level = ("residual_map", "own_set_comparison", "activation_clustering")
    assert {verdicts(row)[name] for name in data_level} == {"not applicable"}
    assert verdicts(row)["patch_scan"] != "not applicable"
    assert row.figures["clean accuracy"].value == pytest.approx(done.ledger.rows[0].figures["accuracy"].value)


def test_somebody_elses_set_is_audited(tmp_path):
    """A set that somebody else made, of which nothing else is known, has a backdoor that shows in its mean images."""
    x, y = pictures(120, 7)
    bad = (torch.where((y == TARGET)[:, None, None, None], white_patch(3).apply(x), x), y)
    save_condensed(tmp_path / "given", TensorDataset(*bad), {"poisoned": True, "note": "made for a test"})
    done = run(tmp_path, Condense(saved=tmp_path / "given"), cheap("neural_cleanse", "residual_map"))
    row = done.ledger.rows[-1]
    assert verdicts(row)["residual_map"] == "evidence"
    (found,) = [entry for entry in row.candidates if entry["name"] == "residual_map"]
    assert found["classes"] == str(TARGET)
    assert row.pictures["residual_map, class 0"].caption
    assert "residual_map" in row.outcome
    assert row.figures["detectors with evidence"].value >= 1
    assert "Of the set: it says of itself that a backdoor was planted in it." in row.remarks[0]


def test_findings_survive_the_store():
    mask, pattern = torch.rand(1, SIZE, SIZE), torch.rand(1, SIZE, SIZE)
    space = PixelSpace((0.4,), (0.25,))
    found = Finding(
        "neural_cleanse", "model", "evidence", 3.5, 2.0, suspects=(4,), figures={"mask_l1": [1.0, float("inf")]},
        stamps=(stamp_of(Reversed(4, mask, pattern, 1.0, 1.0), space, "neural_cleanse"),),
        pictures={"class 4": mask * pattern}, seconds=1.5,
    )  # fmt: skip
    again = unpacked(packed(found), space)
    assert (again.score, again.suspects, again.figures["mask_l1"]) == (3.5, (4,), [1.0, None])
    x = pictures(4, 0).x
    assert torch.equal(again.stamps[0].apply(x), found.stamps[0].apply(x))
    assert again.stamps[0].target == 4
    assert torch.equal(again.pictures["class 4"], mask * pattern)


def test_pictures_are_enlarged_by_whole_steps():
    grey = picture(torch.tensor([[[0.0, 1.0], [0.5, 2.0]]]))
    assert grey.shape == (224, 224)
    assert grey[0, 0] == 0
    assert grey[-1, -1] == grey[0, -1] == 255
    assert grey[-1, 0] == 128
    assert picture(torch.zeros(3, 300, 200)).shape == (300, 200, 3)
    assert picture(torch.ones(2, 300, 200)).shape == (300, 200)
    assert picture(torch.ones(2, 300, 200)).dtype == np.uint8


def test_networks_begin_anew():
    model = named(NETWORK)
    torch.manual_seed(0)
    one = begun_anew(model)
    assert not torch.equal(one.classifier[0].weight, model.classifier[0].weight)
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    other = begun_anew(plain)
    assert not torch.equal(other[0].weight, plain[0].weight)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(InvalidValue, match="Own has weights and no reset_parameters"):
        begun_anew(Own())


def test_the_space_of_pixels_is_that_of_the_preprocessing():
    assert pixels_of(task(), 1) == PixelSpace((0.4,), (0.25,))
    assert pixels_of(task(preprocessing=None), 3) == PixelSpace((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"defences": ("strap",)}, r"'strap' is no defence\. Did you mean 'strip'\?"),
        ({"defences": ()}, r"defences = \[\]: different names"),
        ({"defences": ("strip", "strip")}, "different names"),
        ({"defences": ("strip",), "settings": {"nad": {}}}, r"settings = \['nad'\]: not among"),
        ({"settings": {"strip": {"blend": 3}}}, "unexpected keyword argument 'blend'"),
        ({"settings": {"strip": {"frr": 1.5}}}, "strip: frr = 1.5"),
        ({"holdout": 49}, "holdout = 49: strip needs 50 images"),
        ({"simulate": "naive"}, "simulate = 'naive' needs the field 'condense'"),
        ({"simulate": "naive", "condense": Condense(method="random")}, "a method that learns synthetic images"),
        ({"portion": 0.0}, "portion = 0.0: Input should be greater than 0"),
        ({"portion": 1.0}, "portion = 1.0: Input should be less than 1"),
        ({"target": -1}, "target = -1"),
        ({"model": {"width": 3}}, "model = {'width': 3}; a registered model's name"),
        ({"model": "blocnet"}, "Did you mean 'blocknet'"),
    ],
    ids=str,
)
def test_wrong_fields_are_refused(fields, named):
    with pytest.raises(InvalidValue, match=named):
        AuditBackdoor(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target": CLASSES}, "target = 6 is no class; 0 to 5 is expected"),
        ({"size": 13}, "a patch of 13 x 13 pixels"),
        ({"position": (11, 0)}, "row 11, column 0 is not inside an image of 12 x 12"),
        ({"model": {"name": "blocknet", "depth": 9}}, "blocknet"),
    ],
    ids=str,
)
def test_an_attack_that_does_not_fit_the_task_is_refused_before_anything_runs(fields, named):
    steps = [CONDENSE, cheap(condense=CONDENSE, simulate="naive", **fields)]
    with pytest.raises(RecipeError, match=named):
        sparing.run(task=task(), steps=steps, meter=QUICK)


def test_bad_data_are_refused(tmp_path):
    attack = cheap(condense=CONDENSE, simulate="naive", portion=0.005)
    with pytest.raises(InvalidValue, match=r"portion = 0\.005 of 120 images is less than one"):
        run(tmp_path / "a", CONDENSE, attack)
    doorping = cheap(condense=CONDENSE, simulate="doorping", portion=0.1, layer=7)
    with pytest.raises(InvalidValue, match="layer = 7; the network has 4 layers"):
        run(tmp_path / "b", CONDENSE, doorping)
    wide = task(preprocessing=None)
    with pytest.raises(InvalidValue, match="hold-out: image 0 spans"):
        sparing.run(task=wide, steps=[sparing.Train(epochs=1), cheap()], meter=QUICK, store=tmp_path / "c")
    few = task(tests=40)
    with pytest.raises(InvalidValue, match="strip: a hold-out of 40 images; 50 are needed"):
        sparing.run(task=few, steps=[sparing.Train(epochs=1), cheap("strip")], meter=QUICK, store=tmp_path / "d")


def test_defences_that_cannot_judge_a_network_say_so(tmp_path):
    """One without convolutions has no blocks to prune."""
    flat = {"name": "mlp", "in_features": SIZE * SIZE, "num_classes": CLASSES, "widths": [8]}
    settings = {"settings": FEW, "holdout": 60}
    mlp = sparing.CustomTask(
        "flat", *(TensorDataset(*pictures(n, i)) for i, n in enumerate((60, 60, 24, 24))), model=lambda: named(flat),
        loss=nn.functional.cross_entropy, labels="abcdef", preprocessing=task().preprocessing, capabilities={"images"},
    )  # fmt: skip
    done = sparing.run(task=mlp, steps=[TRAIN, AuditBackdoor(**settings)], meter=QUICK, store=tmp_path)
    assert verdicts(done.ledger.rows[-1])["patch_scan"] != "not applicable"
    assert verdicts(done.ledger.rows[-1])["fine_pruning"] == "not applicable"


def test_a_network_of_other_classes_is_refused(tmp_path):
    other = NETWORK | {"num_classes": 3}
    with pytest.raises(InvalidValue, match="model: the network gives 3 logits; 'pictures' has 6 classes"):
        run(tmp_path, CONDENSE, cheap(model=other))
    with pytest.raises(RecipeError, match=r"'condense': network = .* gives 3 logits; 'pictures' has 6 classes"):
        run(tmp_path, CONDENSE, cheap(condense=Condense(method="dc", per_class=1, network=other)))


def test_nothing_to_audit_has_no_effect(tmp_path):
    with pytest.raises(NoEffect, match="not condensed, the model is not trained, and no attack"):
        run(tmp_path, cheap())


def test_others_than_images_are_refused():
    with pytest.raises(RecipeError, match="'audit_backdoor' audits images; 'pictures' has the capabilities classif"):
        sparing.run(task=task(capabilities=()), steps=[TRAIN, cheap()], meter=QUICK)
    with pytest.raises(RecipeError, match="of graphs an attack can be simulated"):
        sparing.run(task=TinyGraph(), steps=[TRAIN, cheap()], meter=QUICK)


ON_GRAPHS = {
    "nodes": (TinyGraph, {"network": {"name": "gcn", "hidden": 8}, "edge_threshold": 0.01}),
    "graphs": (TinyGraphs, {"network": {"name": "graph_gcn", "hidden": 8, "depth": 1}}),
}


@pytest.mark.parametrize("units", ON_GRAPHS)
def test_the_attack_is_simulated_on_graphs(units, tmp_path):
    kind, given = ON_GRAPHS[units]
    sizes = {"per_class": 2, "iterations": 1, "outer_steps": 2, "inner_steps": 1}
    condense = Condense(method="multi_step", **sizes, **given)
    audit = AuditBackdoor(condense=condense, simulate="doorping", portion=0.2, victims=2, epochs=3, max_steps=3)
    start = {"task": kind(), "steps": [audit], "meter": QUICK, "store": Store(tmp_path / "store")}
    done = sparing.run(**start, out=tmp_path / "out")
    row = done.ledger.rows[-1]
    assert row.figures["updates of the trigger"].value == 1
    assert row.figures["lowest feature of the trigger"].value >= 0
    for name in ("attack success", "attack success on clean set", "clean accuracy, simulated attack"):
        assert 0 <= row.figures[name].value <= 1
    assert f"of {units} of other classes to class 0" in row.remarks[0]
    assert row.outcome == "attack: no defence asked"
    attack = json.loads((tmp_path / "out" / "audit_backdoor" / "audit.json").read_text())["attack"]
    assert attack["provenance"]["poisoned"] is True
    assert attack["provenance"]["trigger"]["kind"] == "subgraph"
    assert len(attack["victims"]) == len(attack["control"]) == 2
    assert sparing.run(**start).ledger.canonical() == done.ledger.canonical()


def test_every_defence_has_its_name_in_the_field():
    assert {one.name for one in AuditBackdoor()._defences()} >= {"neural_cleanse", "strip", "residual_map"}
    assert AuditBackdoor(settings={"neural_cleanse": {"epochs": 3}})._defences()[0].epochs == 3
    assert isinstance(AuditBackdoor(defences=("neural_cleanse",))._defences()[0], NeuralCleanse)
