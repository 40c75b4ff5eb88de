"""RELIANT's benchmark, tiny: claims that follow from the rows, each way to distil by its own epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FIGURES = ("accuracy", "f1", "auc", "delta_sp", "delta_eo")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, data_root: Path) -> Any:
    monkeypatch.setenv("SPARING_DATA", str(data_root))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import reliant

    return reliant


def test_german_credit_is_held_against_the_larger_class(bench: Any) -> None:
    (claim,) = bench.measure_german((0, 1), epochs=3, teacher_epochs=3)
    rows = {row["name"]: row["figure"] for row in claim.baselines}
    assert rows["share of the larger class"] == 0.7  # of 250, exactly
    assert claim.figure == pytest.approx(100 * (rows["RELIANT: accuracy"] - 0.7))
    assert claim.also == [("lower end of the interval", claim.interval95[0], ">", 0.0)]
    names = ("teacher", bench.PLAIN, f"{bench.PLAIN}, thresholds by group", bench.FAIR_LOSS, bench.RELIANT)
    assert rows.keys() == {"share of the larger class"} | {f"{name}: {figure}" for name in names for figure in FIGURES}


def test_every_way_to_distil_has_its_claim(bench: Any) -> None:
    claims = bench.measure_frameworks((0, 1), epochs=2, teacher_epochs=3, name="german_credit")
    assert [claim.id for claim in claims] == [f"reliant_{way}" for way in ("soft", "glnn", "cpf", "graphakd")]
    for claim, way in zip(claims, bench.FRAMEWORKS, strict=True):
        names = ("teacher", *(f"{way}, {kind}" for kind in ("plain", "fairness loss", "RELIANT")))
        assert [row["name"] for row in claim.baselines] == [f"{name}: {figure}" for name in names for figure in FIGURES]
        assert claim.details["epochs"] == 2
        rows = {row["name"]: row["figure"] for row in claim.baselines}
        ours, plain = (rows[f"{way}, {kind}: delta_sp"] for kind in ("RELIANT", "plain"))
        assert claim.figure == pytest.approx(ours / plain if plain > 0 else 1.0)


def test_every_way_to_distil_trains_its_own_epochs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def rows_of(name: str, drop: Any, seed: int, models: Any, epochs: int, teacher_epochs: int) -> Any:
        asked.update(dict.fromkeys((model.split(",")[0] for model in models), epochs))
        return {model: dict.fromkeys(FIGURES, 0.5 + seed / 10) for model in ("teacher", *models)}

    monkeypatch.setattr(bench, "rows_of", rows_of)
    claims = bench.measure_frameworks((0, 1))
    assert asked == {"soft": 200, "GLNN": 200, "CPF": 200, "GraphAKD": 600}
    assert [claim.details["epochs"] for claim in claims] == list(asked.values())
