"""The step ``compile``: what runs afterwards, what it records, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparing
from sparing.compression.compiling import compile_model
from sparing.core.errors import IncompatibleStep, NoEffect, RecipeError
from sparing.core.pipeline import Run, plan
from sparing.core.predictor import ModulePredictor, build_model
from sparing.core.recipe import PartRef, Recipe
from sparing.engine.native import cpu_capability

METER = {"min_seconds": 0, "max_seconds": 0.01, "memory": False, "energy": "off", "batch": 4}
GROUPS = {"good": ("a fine film", "what a joy", "great fun"), "bad": ("a dull film", "what a bore", "no fun")}
compiled_here = pytest.mark.skipif(not cpu_capability().compiled, reason="the engine's native code is not here")


class Reviews(sparing.TextClassification):
    """Six sentences, many times."""

    def __init__(self) -> None:
        pairs = [(text, label) for label, texts in GROUPS.items() for text in texts for _ in range(30)]
        super().__init__("reviews", [text for text, _ in pairs], [label for _, label in pairs], vocab_size=60)

    def default_model(self) -> nn.Module:
        return build_model("bert", self, dim=64, depth=2, heads=4, dropout=0.0)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("compiled")
    steps = [
        sparing.Train(id="dense", epochs=2, batch_size=16, lr=2e-3),
        sparing.BlockPrune(sparsity=0.8),
        sparing.Train(id="sparse", epochs=5, batch_size=16, lr=2e-3),
        sparing.Compile(max_batch=4, kernels="sparse" if cpu_capability().compiled else "auto"),
    ]
    return sparing.run(task=Reviews(), steps=steps, meter=METER, out=folder / "run", store=folder / "store")


@compiled_here
def test_the_row_is_the_engines_and_says_what_runs(ran: Run) -> None:
    dense, _, sparse, row = ran.ledger.rows
    assert (row.runtime, row.kind, sparse.runtime) == ("sparing", "engine", "onnxruntime")
    assert row.outcome.startswith("native: 8 × ")
    assert "dense" not in row.outcome
    assert row.figures["layers in float"].value == 1  # the classifier
    assert row.figures["workspace of the engine"].value > 0
    assert row.figures["model bytes"].value < 0.6 * dense.figures["model bytes"].value
    assert row.figures["MACs"].value == sparse.figures["MACs"].value
    assert row.figures["accuracy"].value == sparse.figures["accuracy"].value == 1.0
    assert any("12 linear layers in INT8" in remark for remark in row.remarks)


def test_the_saved_folder_answers_raw_texts_as_the_torch_model_does(ran: Run) -> None:
    loaded = sparing.load(ran.folder / "model")
    texts = ["what fun", "what a dull film", "joy " * 200]
    ids = loaded.preprocessing(texts)
    expected = ModulePredictor(ran.job.model)(torch.from_numpy(ids))
    np.testing.assert_allclose(loaded.predict(texts), expected, atol=0.1 * np.abs(expected).max())
    many = np.concatenate([ids[:2]] * 7)  # more than max_batch
    np.testing.assert_array_equal(loaded(many), np.concatenate([loaded(ids[:2])] * 7))


@compiled_here
def test_threads_share_a_batch_and_change_nothing(ran: Run) -> None:
    loaded = sparing.load(ran.folder / "model")
    ids = loaded.preprocessing([text for texts in GROUPS.values() for text in texts])
    alone = loaded(ids)
    loaded.set_threads(4)
    np.testing.assert_array_equal(loaded(ids), alone)
    loaded.set_threads(1)
    np.testing.assert_array_equal(loaded(ids[:1]), alone[:1])


def test_planning_refuses_a_model_that_is_no_text_encoder() -> None:
    with pytest.raises(RecipeError, match="'compile' needs 'text_encoder'"):
        plan(Recipe(PartRef("digits"), (sparing.Train(id="a"), sparing.Compile())))
    task = Reviews()
    data = task.splits(None)
    with pytest.raises(IncompatibleStep, match="not a Linear"):
        compile_model(nn.Linear(2, 2), task, data.calibration, data.val)


@compiled_here
def test_sparse_kernels_of_a_dense_model_are_refused_with_its_sparsity() -> None:
    task = Reviews()
    data = task.splits(None)
    with pytest.raises(NoEffect, match=r"70%.*the most is 0\.0%"):
        compile_model(task.default_model(), task, data.calibration, data.val, kernels="sparse", tolerance=0.9)


def test_layers_return_to_float_when_the_loss_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Reviews()
    data = task.splits(None)
    whole = Reviews.evaluate

    def strict(self, predictor, split):  # whatever is in INT8 is wrong
        found = whole(self, predictor, split)
        model = getattr(predictor, "model", None)
        integers = model is not None and any("Int8" in type(module).__name__ for module in model.modules())
        return type(found)({**found.metrics, "accuracy": 0.2 if integers else 0.9}, None)

    monkeypatch.setattr(Reviews, "evaluate", strict)
    predictor, report = compile_model(task.default_model(), task, data.calibration, data.val)
    assert report.quantised == ()
    assert report.candidates[-1] == (12, 0.9)
    assert predictor.runtime == "onnxruntime"  # in float nothing is left for the engine to win
    assert predictor.describe().precision == "fp32"


@compiled_here
def test_the_engine_itself_is_scored_and_attention_goes_to_float_where_it_loses(monkeypatch) -> None:
    task = Reviews()
    data = task.splits(None)
    whole = Reviews.evaluate

    def strict(self, predictor, split):  # attention in integers is wrong, in the engine only
        found = whole(self, predictor, split)
        engine = getattr(predictor, "engine", None)
        integers = engine is not None and any(layer.outputs for layer in engine.encoder.blocks[0].values())
        return type(found)({**found.metrics, "accuracy": 0.2 if integers else 0.9}, None)

    monkeypatch.setattr(Reviews, "evaluate", strict)
    predictor, report = compile_model(task.default_model(), task, data.calibration, data.val)
    assert (report.score_float, report.score, len(report.quantised)) == (0.9, 0.9, 12)
    assert not any(layer.outputs for layer in predictor.engine.encoder.blocks[0].values())


def test_planning_refuses_a_task_of_masked_words() -> None:
    bert = PartRef("bert", {"dim": 16, "depth": 1, "heads": 2})
    steps = (sparing.Train(id="a"), sparing.Compile())
    with pytest.raises(RecipeError, match="no head that predicts masked words, which 'masked_lm' asks for"):
        plan(Recipe(PartRef("masked_lm"), steps, model=bert))


def test_zeros_that_the_engine_cannot_leave_out_are_refused_with_both_shares() -> None:
    task = Reviews()
    data = task.splits(None)
    model = task.default_model()
    sparing.BlockMagnitudePruner(model, block=(1, 1), sparsity=0.8).prune(0.8)
    for module in model.modules():
        if isinstance(module, nn.Linear) and torch.nn.utils.parametrize.is_parametrized(module):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    with pytest.raises(NoEffect, match=r"80% of the weights .* but only \d+% of their blocks of 4 outputs × 1 input"):
        compile_model(model, task, data.calibration, data.val)


def test_a_folder_with_another_file_or_a_damaged_pack_is_refused(ran: Run, tmp_path: Path) -> None:
    import shutil

    from sparing.core.errors import CorruptFile

    folder = Path(shutil.copytree(ran.folder / "model", tmp_path / "model"))
    content = bytearray((folder / "model.pack").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.pack").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"model\.pack was changed"):
        sparing.load(folder)
