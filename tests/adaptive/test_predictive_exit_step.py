"""The step ``predictive_exit`` and the predictor it makes: decisions, saving, INT8, composition, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sparing
from sparing.adaptive.confidence import log_softmax
from sparing.adaptive.exit_predictor import EarlyExitPredictor, needed_exits, quantised, staged, timed
from sparing.adaptive.exits import attach_exits
from sparing.adaptive.policies import EveryExitPolicy, FullNetworkPolicy, PlacedExitPolicy, PredictiveExitPolicy
from sparing.core.errors import CorruptFile, IncompatibleStep, InvalidValue, RecipeError
from sparing.core.pipeline import Run
from sparing.testing import QUICK, tiny_task

RULE = sparing.ConfidenceRule.softmax(0.5)
TRAIN = sparing.Train(id="first", epochs=8, batch_size=16, lr=0.02)
EXITS = {"codewords": 4, "epochs": 40, "batch_size": 16, "lr": 0.05, "max_loss": 0.3}
"""With more codewords an exit costs more than the whole of this network."""


def parts() -> EarlyExitPredictor:
    """Untrained exits on an untrained network: sure of nothing in particular."""
    torch.manual_seed(0)
    task = tiny_task()
    model = attach_exits(task.default_model().eval(), example=task.example_input(2), codewords=4).eval()
    cost = model.costs(task.example_input(1))
    whole = EarlyExitPredictor(*staged(model, task), FullNetworkPolicy(), cost, task, mean_macs=cost.full)
    sure = np.exp(log_softmax(whole.table(images(50))[:, :-1]).max(-1))
    every = EveryExitPolicy(sparing.ConfidenceRule.softmax(float(np.quantile(sure, 0.7))))
    return whole.with_policy(every, cost.full)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("exits")
    steps = [TRAIN, sparing.PredictiveExit(**EXITS)]
    return sparing.run(task=tiny_task(), steps=steps, out=folder / "run", store=folder / "store", meter=QUICK)


def images(count: int, seed: int = 0) -> np.ndarray:
    shape = tiny_task().example_input(2)[0].shape[1:]
    return np.random.RandomState(seed).randn(count, *shape).astype(np.float32) * 2


@pytest.mark.parametrize("policy", ["every", "predictive", "single", "placed", "full", "patience"])
def test_it_runs_what_the_policy_says_and_nothing_else(policy: str) -> None:
    whole = parts()
    exits = whole.cost.exits
    chosen = {
        "every": EveryExitPolicy(RULE),
        "predictive": PredictiveExitPolicy(1, sparing.ExitPredictor(RULE)),
        "single": PredictiveExitPolicy(1, sparing.ExitPredictor(RULE), single_jump=True),
        "placed": PlacedExitPolicy(RULE, (exits - 1,)),
        "full": FullNetworkPolicy(),
        "patience": EveryExitPolicy(sparing.ConfidenceRule.patience(2)),
    }[policy]
    predictor, x = whole.with_policy(chosen), images(40)
    table = whole.table(x)
    expected = chosen.run(table)
    calls: dict[str, int] = {}

    def count(name: str, part: object, run: object) -> object:
        class Counting:
            def __init__(self) -> None:
                self.get_inputs = part.session.get_inputs  # type: ignore[attr-defined]

            def run(self, names: object, feeds: dict[str, np.ndarray]) -> object:
                calls[name] = calls.get(name, 0) + len(next(iter(feeds.values())))
                return run(names, feeds)  # type: ignore[operator]

        return Counting()

    for name, part in zip(predictor._names(), (*predictor.stages, *predictor.exits), strict=True):
        part._session = count(name, part, part.session.run)
    logits, trace = predictor.trace(x)
    np.testing.assert_array_equal(trace.exit_index, expected.exit_index)
    np.testing.assert_array_equal(trace.evaluated, expected.evaluated)
    np.testing.assert_array_equal(trace.jumps, expected.jumps)
    np.testing.assert_allclose(logits, table[np.arange(40), trace.exit_index], atol=1e-5)
    for i in range(exits + 1):
        assert calls.get(f"stage_{i:02d}", 0) == (trace.exit_index >= i).sum()
        assert i == exits or calls.get(f"exit_{i:02d}", 0) == trace.evaluated[:, i].sum()


def test_one_at_a_time_it_decides_the_same() -> None:
    predictor, x = parts(), images(25, 1)
    logits, trace = predictor.trace(x)
    assert 0 < (trace.exit_index < predictor.cost.exits).mean() < 1, "some leave, some stay"
    for i in range(len(x)):
        one, alone = predictor.trace(x[i : i + 1])
        assert alone.exit_index[0] == trace.exit_index[i]
        np.testing.assert_allclose(one[0], logits[i], atol=1e-5)


def test_saved_and_loaded_it_answers_the_same(ran: Run, tmp_path: Path) -> None:
    before = parts()
    again = sparing.load(before.save(tmp_path / "model"))
    assert isinstance(again, EarlyExitPredictor)
    assert again.policy == before.policy
    assert again.cost == before.cost
    np.testing.assert_array_equal(again(images(9)), before(images(9)))
    assert again.describe() == before.describe()
    last = ran.ledger.rows[-1]
    assert last.kind == "early_exit"
    assert last.runtime == "onnxruntime"


def test_without_torch_it_is_loaded(tmp_path: Path) -> None:
    import subprocess
    import sys

    parts().save(tmp_path / "model")
    code = (
        "import sys, numpy, sparing; p = sparing.load(sys.argv[1]);"
        f"print(p(numpy.zeros({(2, *images(1).shape[1:])}, numpy.float32)).shape);"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 3)", done.stderr


def test_exits_that_nobody_asks_at_are_left_out() -> None:
    task, whole = tiny_task(), parts()
    torch.manual_seed(0)
    model = attach_exits(task.default_model().eval(), example=task.example_input(2), codewords=4).eval()
    last = whole.cost.exits - 1
    policy = PlacedExitPolicy(RULE, (last,))
    assert needed_exits(policy, whole.cost.exits) == {last}
    small = EarlyExitPredictor(*staged(model, task, [last]), policy, whole.cost, task, places=[last])
    assert len(small.stages) == 2
    np.testing.assert_allclose(small(images(20)), whole.with_policy(policy)(images(20)), atol=1e-5)
    assert small.describe().model_bytes < whole.describe().model_bytes
    with pytest.raises(InvalidValue, match="can ask for"):
        small.with_policy(EveryExitPolicy(RULE))


def test_stages_in_int8() -> None:
    task, whole = tiny_task(), parts()
    stages, exits = quantised(whole.stages, whole.exits, task, task.splits(None).calibration, 16)
    small = EarlyExitPredictor(stages, exits, whole.policy, whole.cost, task)
    assert "int8" in small.describe().precision
    x = np.stack([item[0] for item in task.splits(None).calibration][:8])
    np.testing.assert_allclose(small.table(x), whole.table(x), atol=0.1)


def test_the_row_says_what_was_chosen_and_what_else_was_tried(ran: Run) -> None:
    first, last = ran.ledger.rows
    assert {entry["name"] for entry in last.candidates} == {
        "predictive", "isotonic", "every", "branchynet", "passalis", "sdn", "patience", "placed"
    }  # fmt: skip
    assert last.outcome == "predictive"
    assert last.figures["MACs"].value < first.figures["MACs"].value
    assert 0 < last.figures["leave early"].value <= 1
    assert last.figures["exit evaluations"].value >= 0
    for name in ("energy over full clock", "energy over full network"):
        assert last.figures[name].how == "est"
        assert 0 < last.figures[name].value <= 1.02
    assert any("leave at exit" in remark for remark in last.remarks)
    assert any("simulated" in remark for remark in last.remarks)


@pytest.mark.parametrize("policy", ["every", "sdn", "patience", "isotonic"])
def test_other_policies_and_int8_follow_the_predictor_that_comes_in(policy: str, tmp_path: Path) -> None:
    steps = [
        TRAIN,
        sparing.Quantize(id="int8", goal="bytes", max_loss=1.0, samples=16),
        sparing.PredictiveExit(policy=policy, **EXITS),
    ]
    run = sparing.run(task=tiny_task(), steps=steps, store=tmp_path / "store", out=tmp_path / "run", meter=QUICK)
    assert run.ledger.rows[-1].outcome == policy
    precision = sparing.load(tmp_path / "run" / "model").describe().precision
    assert "int8" in precision, "the stages are quantised as the network was"


def test_with_distillation_a_learning_rate_that_jumps_and_a_pruning(tmp_path: Path) -> None:
    steps = [
        TRAIN,
        sparing.Leap(rho=0.2),
        sparing.Distil(id="student", teacher="first", epochs=2, batch_size=16, lr=0.02),
        sparing.BlockPrune(sparsity=0.3, convolutions=True),
        sparing.Train(id="pruned", epochs=1, batch_size=16, lr=0.01),
        sparing.Shrink(id="cut"),
        sparing.PredictiveExit(**EXITS),
    ]
    run = sparing.run(task=tiny_task(), steps=steps, store=tmp_path / "store", out=tmp_path / "run", meter=QUICK)
    assert run.ledger.rows[-1].kind in ("early_exit", "module", "onnx")
    assert run.ledger.rows[-1].id == "predictive_exit"


def test_when_no_policy_will_do_the_predictor_stays(tmp_path: Path) -> None:
    steps = [TRAIN, sparing.PredictiveExit(epochs=1, batch_size=48, lr=1e-6, max_loss=0.0, policy="patience")]
    run = sparing.run(task=tiny_task(), steps=steps, store=tmp_path / "store", out=tmp_path / "run", meter=QUICK)
    first, last = run.ledger.rows
    if last.outcome != "patience":
        assert last.outcome.startswith("kept the network without exits")
        assert last.figures["MACs"].value == first.figures["MACs"].value
        assert last.figures["accuracy"].value == first.figures["accuracy"].value


def test_refusals(tmp_path: Path) -> None:
    where = {"store": tmp_path / "store", "out": tmp_path / "run", "meter": QUICK}
    with pytest.raises(RecipeError, match="module"):
        sparing.run(task=tiny_task(), steps=[TRAIN, sparing.PredictiveExit(**EXITS), sparing.Train()], **where)
    with pytest.raises(IncompatibleStep, match="early_exit"):
        sparing.run(task=tiny_task(), steps=[TRAIN, sparing.PredictiveExit(**EXITS), sparing.Quantize()], **where)
    pruned = [TRAIN, sparing.BlockPrune(convolutions=True), sparing.Train(), sparing.PredictiveExit(**EXITS)]
    with pytest.raises(RecipeError, match="sparsity"):
        sparing.run(task=tiny_task(), steps=pruned, **where)
    with pytest.raises(RecipeError, match="trained"):
        sparing.run(task=tiny_task(), steps=[sparing.PredictiveExit(**EXITS)], **where)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kernel": [1.0, 1.0]}, "odd number"),
        ({"max_loss": 1.0}, "max_loss"),
        ({"policy": "best"}, "policy"),
        ({"layers": []}, "layers"),
        ({"max_round": 0}, "max_round"),
        ({"history": 0}, "history"),
        ({"share": "all"}, "share"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        sparing.PredictiveExit(**fields)


def test_a_task_without_classes_is_refused(tmp_path: Path) -> None:
    task = tiny_task()
    task.capabilities = frozenset({"images"})
    with pytest.raises(RecipeError, match="no classification"):
        sparing.run(task=task, steps=[TRAIN, sparing.PredictiveExit(**EXITS)], out=tmp_path / "run", meter=QUICK)


@pytest.mark.parametrize("key", ["parts", "places", "policy", "layer_macs", "exit_macs", "round_macs", "mean_macs"])
def test_spoilt_settings_are_refused(key: str, tmp_path: Path) -> None:
    from sparing.core.predictor.folder import digest_of

    folder = parts().save(tmp_path / "model")
    manifest = json.loads((folder / "sparing.json").read_text())
    del manifest["config"][key]
    manifest["digest"] = digest_of(manifest)
    (folder / "sparing.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile):
        sparing.load(folder)


def test_time_is_measured_of_each_stage_and_each_exit() -> None:
    whole = parts()
    seconds = timed(whole, tiny_task().example_input(1), runs=3)
    assert len(seconds.layer_macs) == len(whole.stages)
    assert len(seconds.exit_macs) == len(whole.exits)
    assert all(0 < value < 1 for value in (*seconds.layer_macs, *seconds.exit_macs))


@pytest.mark.parametrize("objective", ["macs", "latency", "energy"])
def test_policies_are_chosen_by_the_objective(objective: str, ran: Run, tmp_path: Path) -> None:
    fields: dict[str, object] = {**EXITS, "objective": objective, "epochs": 10, "choose_exits": True}
    run = sparing.run(task=tiny_task(), steps=[TRAIN, sparing.PredictiveExit(**fields)], out=tmp_path, meter=QUICK)
    row = run.ledger.rows[-1]
    assert {entry["name"] for entry in row.candidates} == {entry["name"] for entry in ran.ledger.rows[-1].candidates}
    assert row.figures["energy over full clock"].how == "est"
    early, image = run.job.predictor, images(1)
    if objective == "latency":  # a network of some microseconds is quicker than the decision to leave it
        assert early.kind == "module"
        return
    assert isinstance(early, EarlyExitPredictor)
    assert early.cost.exits <= len(attach_exits(run.job.fresh_model(), example=tiny_task().example_input(2)).exits)
    np.testing.assert_array_equal(sparing.load(tmp_path / "model")(image), early(image))
