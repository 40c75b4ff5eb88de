"""xDeepInt's benchmark, tiny: equal budgets, trainings that are kept, and claims that follow from their figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparing.core.predictor import build_model

SIZES = (4, 9, 3, 30, 6, 5, 40, 35, 2, 8, 3)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark with few made-up flights, whose results are kept in the test's folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import _kept
    import xdeepint

    draw = np.random.RandomState(0)

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.stack([draw.randint(-1, size, count) for size in SIZES], 1).astype(np.int64)
        late = draw.random_sample(count) < np.where(ids[:, 1] % 3 == 0, 0.7, 0.1)
        return torch.from_numpy(ids), torch.from_numpy(late.astype(np.float32))

    made = SIZES, {"fitted": rows(900), "val": rows(300), "test": rows(300)}
    monkeypatch.setattr(_kept.tempfile, "gettempdir", lambda: str(tmp_path))
    kept = _kept.Kept("xdeepint-test", "made up")
    monkeypatch.setattr(xdeepint, "kept", lambda: kept)
    monkeypatch.setattr(xdeepint, "flights", lambda split: made)
    monkeypatch.setattr(xdeepint, "BATCH", 100)
    return xdeepint


def test_every_arm_has_as_many_trials_about_the_sheets_setting(bench: Any) -> None:
    for arm, (name, _, optimizer, search) in bench.SEARCH.items():
        found = bench.trials(arm)
        assert found == bench.trials(arm)
        assert len({repr(each) for each in found}) == bench.TRIALS == 8
        assert {each["model"] for each in found} == {name}
        assert {each["optimizer"] for each in found} == {optimizer}
        for key, entry in search.items():
            values = [each["fields"][key] if key in bench.OF_THE_NETWORK else each["settings"][key] for each in found]
            assert values[0] == entry[1]
            low, high = (min(entry[0]), max(entry[0])) if isinstance(entry[0], list) else (entry[0], entry[2])
            assert all(low <= value <= high for value in values), (arm, key)
        for each in found:
            build_model(each["model"], cardinalities=list(SIZES), **each["fields"])


def test_a_second_search_is_about_the_best_of_the_first(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.trials("xDeepInt")
    monkeypatch.setattr(bench, "trained", lambda each, seed: {"val_log_loss": float(each != first[4])})
    ranges = bench.second("xDeepInt")
    again = bench.trials("xDeepInt", ranges)
    assert again[0] == first[4]
    assert len(again) == bench.TRIALS
    low, centre, high = ranges["alpha"]
    assert high / low == pytest.approx(bench.PROXIMAL["alpha"][2] / bench.PROXIMAL["alpha"][0])
    assert low < centre == first[4]["settings"]["alpha"] < high


@pytest.mark.parametrize("arm", ["FM", "xDeepInt"])
def test_a_training_is_that_of_its_seed(bench: Any, arm: str) -> None:
    chosen = bench.trials(arm)[0]
    first, again = (bench.train(chosen, 1, tested=True, epochs=2) for _ in range(2))
    other = bench.train(chosen, 2, epochs=2)
    assert {key: v for key, v in first.items() if key != "cpu_s"} == {k: v for k, v in again.items() if k != "cpu_s"}
    assert other["val_log_loss"] != first["val_log_loss"]
    assert first["val_log_loss"] == min(loss for loss, _ in first["history"])
    assert "test_log_loss" not in other  # no trial looks at the test rows
    assert first["differing"] == 0
    assert (first["zero_rows"] > 0) == (arm == "xDeepInt")


def test_finished_trainings_are_not_made_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, made = bench.trials("LR")[0], []

    def train(*arguments: Any) -> dict[str, float]:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(arguments)
        return {"val_log_loss": 0.5}

    monkeypatch.setattr(bench, "train", train)
    assert bench.trained(chosen, 0) == {"val_log_loss": 0.5}
    with pytest.raises(KeyboardInterrupt):
        bench.trained(chosen, 1)
    kept = type(bench.kept())("xdeepint-test", "made up")
    assert kept.file == bench.kept().file
    monkeypatch.setattr(bench, "kept", lambda: kept)
    assert bench.trained(chosen, 0) == {"val_log_loss": 0.5}
    assert len(made) == 1


AUC = {"lr": 0.70, "fm": 0.72, "deepfm": 0.71, "dcnv2": 0.715, "xdeepint": 0.725}
LOSS = {"lr": 0.46, "fm": 0.45, "deepfm": 0.449, "dcnv2": 0.452, "xdeepint": 0.4465}


@pytest.fixture
def made_up(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """What was asked for, of trainings whose figures are those above; the seventh trial of an arm is its best."""
    asked: list[tuple[str, str, bool]] = []
    best = [bench.trials(arm)[6] for arm in bench.SEARCH]

    def trained(chosen: Any, seed: int, split: str = "fold", tested: bool = False) -> dict[str, Any]:
        asked.append((chosen["model"], split, tested))
        name, shift = chosen["model"], seed / 1000
        worse = 0.1 * (chosen not in best) - 0.02 * (split == "time")
        return {
            **{"val_log_loss": 0.4 + worse, "epoch": 1, "zero_rows": 0.5, "zero_interactions": 0.0},
            **{"test_roc_auc": AUC[name] + shift - worse, "test_log_loss": LOSS[name] + shift},
            **{"test_normalised_entropy": 0.9, "differing": 0, "bytes": 100, "bytes_pruned": 60},
        }

    monkeypatch.setattr(bench, "trained", trained)
    return asked


def test_claims_are_held_against_the_best_baseline(bench: Any, made_up: list[tuple[str, str, bool]]) -> None:
    claims = {claim.id: claim for claim in bench.measure_flights()}
    auc, loss = claims["auc"], claims["logloss"]
    assert auc.gate
    assert auc.holds
    assert auc.figure == pytest.approx(0.005)
    assert "FM" in auc.unit
    assert loss.gate
    assert not loss.holds
    assert loss.figure == pytest.approx(0.0025)
    assert "DeepFM" in loss.unit
    assert claims["zero_rows"].gate
    assert claims["zero_rows"].figure == 0.5
    assert claims["pruned"].holds
    for model in AUC:
        assert sum(each == (model, "fold", True) for each in made_up) == len(bench.SEEDS)


@pytest.mark.usefixtures("made_up")
def test_variants_and_a_second_search_are_no_gates(bench: Any) -> None:
    claims = {claim.id: claim for claim in (*bench.measure_variants(), *bench.measure_second())}
    assert {name: round(claim.figure, 6) for name, claim in claims.items()} == {
        **{"same_optimizer": 0.005, "over_adam": 0.0, "sub_spaces": 0.1, "later_days": 0.005},
        **{"auc_second_search": 0.005, "logloss_second_search": 0.0025},
    }
    assert not any(claim.gate for claim in claims.values())
    assert not claims["over_adam"].holds
    assert claims["sub_spaces"].holds


def test_what_it_costs_is_measured(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("pyarrow")
    (pipeline,) = bench.measure_pipeline(rows=3000, repeats=2)
    assert pipeline.figure > 0
    assert pipeline.details["fields"] == 11
    (memory,) = bench.measure_memory((3000, 6000))
    first, last = memory.details["MiB"]
    assert memory.figure == pytest.approx(abs(last["peak"] / first["peak"] - 1))
    assert 0 < first["imported"] <= first["fitted"] <= first["peak"]
    (step,) = bench.measure_step(large=2000, small=200, touched=100, rounds=3)
    assert step.figure > 0
    assert [len(values) for values in step.details["CPU ms"].values()] == [3, 3]
    monkeypatch.delenv("PEERS", raising=False)
    monkeypatch.setitem(sys.modules, "deepctr_torch", None)
    assert bench.measure_peers() == []
    assert "package not installed" in capsys.readouterr().out
