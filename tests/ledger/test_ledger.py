"""Rows, differences, ratios, aggregation over seeds, canonical form."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from sparing.core.errors import CorruptFile, InvalidValue
from sparing.core.ledger import (
    BREAK_EVEN,
    MODEL_BYTES,
    P50,
    THROUGHPUT,
    Figure,
    Ledger,
    Picture,
    Row,
    aggregate,
    break_even,
    cross_difference,
    ordered,
)


def row(row_id, accuracy, *, seed=0, task="digits", runtime="onnxruntime", p50=None, size=1000, wall=None, **changes):
    figures = {"accuracy": Figure(accuracy, "", better="higher"), MODEL_BYTES: Figure(size, "B")}
    if p50 is not None:
        figures[P50] = Figure(p50, "ms", interval=(p50 * 0.98, p50 * 1.02))
    if wall is not None:
        figures["wall"] = Figure(wall, "s")
    return Row(row_id, "train", "model", task, seed, "accuracy", runtime, "onnx", figures, **changes)


def outcomes(right, n=100):
    return np.arange(n) < right


class TestPicture:
    @pytest.mark.parametrize(
        ("pixels", "message"),
        [
            (np.zeros((2, 2)), r"not float64 \(2, 2\)"),
            (np.zeros((2, 2, 4), np.uint8), r"not uint8 \(2, 2, 4\)"),
            (np.zeros(4, np.uint8), r"not uint8 \(4,\)"),
            (np.zeros((0, 2), np.uint8), "0×2 pixels"),
            (np.zeros((2, 1025), np.uint8), "2×1025 pixels; 1…1024"),
        ],
        ids=["floats", "four channels", "one row", "empty", "large"],
    )
    def test_other_pixels_are_refused(self, pixels, message):
        with pytest.raises(InvalidValue, match=message):
            Picture.of(pixels, "what it shows")

    def test_a_caption_is_asked_for(self):
        with pytest.raises(InvalidValue, match="caption"):
            Picture.of(np.zeros((2, 2), np.uint8), "")

    @pytest.mark.parametrize("png", ["", "iVBORw0KGgo", "PHN2Zz4=", '"><script>'])
    def test_what_is_no_png_in_base64_is_refused(self, png):
        with pytest.raises(InvalidValue, match="a PNG file in base64"):
            Picture(png, "what it shows")


class TestFigure:
    def test_numpy_scalars_become_plain(self):
        figure = Figure(np.float32(0.5), interval=(np.float64(0.4), 1))
        assert type(figure.value) is float
        assert figure.interval == (0.4, 1.0)
        assert type(Figure(np.int64(3)).value) is int

    @pytest.mark.parametrize("value", [math.nan, math.inf, np.float64("nan")])
    def test_not_finite(self, value):
        with pytest.raises(InvalidValue, match="record None"):
            Figure(value)

    @pytest.mark.parametrize("value", [True, [1.0], {"a": 1}, np.zeros(3)])
    def test_not_a_figure(self, value):
        with pytest.raises((InvalidValue, ValueError)):
            Figure(value)

    @pytest.mark.parametrize("interval", [(2.0, 1.0), (0.0, math.nan)])
    def test_bad_interval(self, interval):
        with pytest.raises(InvalidValue, match="lower first"):
            Figure(1.0, interval=interval)

    def test_none_is_not_available(self):
        assert Figure(None, "mJ").how == "n.a."
        with pytest.raises(InvalidValue, match=r"n\.a\."):
            Figure(1.0, how="n.a.")

    def test_from_json(self):
        figure = Figure(1.5, "ms", "derived", "higher", (1.0, 2.0), "note")
        value = json.loads(json.dumps(vars(figure)))
        assert Figure.from_json(value) == figure
        with pytest.raises(CorruptFile, match="not a figure"):
            Figure.from_json(value | {"colour": "red"})
        with pytest.raises(CorruptFile, match="not a figure"):
            Figure.from_json({"value": math.nan})


class TestDifferences:
    def test_paired_within_a_seed(self):
        ledger = Ledger()
        ledger.add(row("a", 0.90), outcomes(90))
        ledger.add(row("b", 0.80), outcomes(80))
        found = ledger.difference("a", "b")
        assert found is not None
        assert found.value == pytest.approx(-0.1)
        assert found.p == pytest.approx(2 / 2**10)  # ten lost, none gained
        assert found.shown
        assert "10 lost" in found.method

    def test_over_seeds(self):
        ledger = Ledger()
        for seed, (a, b) in enumerate(((0.90, 0.91), (0.92, 0.94), (0.91, 0.94))):
            ledger.add(row("a", a, seed=seed), outcomes(round(100 * a)))
            ledger.add(row("b", b, seed=seed), outcomes(round(100 * b)))
        found = ledger.difference("a", "b")
        assert found is not None
        assert (found.value, found.n) == (pytest.approx(0.02), 3)
        assert "Student" in found.method
        assert found.interval == pytest.approx((0.02 - 0.02484138, 0.02 + 0.02484138), abs=1e-6)

    def test_a_single_shared_seed_is_paired_over_units(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9, seed=0), outcomes(90))
        ledger.add(row("b", 0.8, seed=0), outcomes(80))
        ledger.add(row("a", 0.9, seed=1), outcomes(90))
        found = ledger.difference("a", "b")
        assert found is not None
        assert found.n == 100

    def test_without_outcomes_there_is_no_interval(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9))
        ledger.add(row("b", 0.8), outcomes(80))
        found = ledger.difference("a", "b")
        assert found is not None
        assert (found.value, found.interval) == (pytest.approx(-0.1), None)
        assert not found.shown

    def test_never_across_tasks(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9), outcomes(90))
        ledger.add(row("b", 0.8, task="other"), outcomes(80))
        ledger.add(row("c", 0.7), outcomes(70))
        assert ledger.difference("a", "b") is None
        _, b, c = ledger.summary()
        assert b.first == "b"
        assert b.to_first is None
        assert b.ratios == {}
        assert (c.first, c.previous) == ("a", "a")

    def test_previous_passes_over_rows_without_a_headline(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9), outcomes(90))
        ledger.add(Row("condense", "condense", "data", "digits", 0, "accuracy", "", "", {"wall": Figure(5.0, "s")}))
        ledger.add(row("b", 0.8), outcomes(80))
        _, condense, b = ledger.summary()
        assert b.previous == "a"
        assert condense.to_first is None
        assert condense.ratios == {}

    def test_between_ledgers_only_on_the_same_data(self):
        one, two = Ledger(tasks={"digits": "x"}), Ledger(tasks={"digits": "x"})
        one.add(row("a", 0.9), outcomes(90))
        two.add(row("z", 0.8), outcomes(80))
        found = cross_difference((one, "a"), (two, "z"))
        assert found is not None
        assert found.value == pytest.approx(-0.1)
        two.tasks["digits"] = "y"
        assert cross_difference((one, "a"), (two, "z")) is None
        one.tasks.clear()
        two.tasks.clear()
        assert cross_difference((one, "a"), (two, "z")) is None


class TestRatios:
    def test_in_one_runtime(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9, p50=2.0))
        ledger.add(row("b", 0.9, p50=1.0, size=250))
        ratios = ledger.summary()[1].ratios
        assert ratios[MODEL_BYTES].value == 0.25
        assert ratios[MODEL_BYTES].interval is None
        assert ratios[P50].value == 0.5
        assert ratios[P50].interval == pytest.approx((0.98 / 2.04, 1.02 / 1.96))
        assert "accuracy" not in ratios

    def test_none_where_the_runtime_changed(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9, p50=2.0))
        ledger.add(row("b", 0.9, p50=1.0, runtime="engine"))
        line = ledger.summary()[1]
        assert line.ratios == {}
        assert (line.first_runtime, line.runtime) == ("onnxruntime", "engine")
        assert "engine" in line.figures[BREAK_EVEN].note

    def test_measured_is_not_divided_by_estimated(self):
        ledger = Ledger()
        for name, how in (("a", "est"), ("b", "measured")):
            made = row(name, 0.9)
            ledger.add(Row(**vars(made) | {"figures": {**made.figures, "energy": Figure(1.0, "mJ", how)}}))
        assert "energy" not in ledger.summary()[1].ratios


class TestBreakEven:
    def test_by_hand(self):
        found = break_even(10.0, Figure(3.0, "ms", interval=(2.9, 3.1)), Figure(1.0, "ms", interval=(0.9, 1.1)))
        assert found.value == pytest.approx(5000)  # 10 s over 2 ms
        assert found.interval == pytest.approx((10_000 / 2.2, 10_000 / 1.8))
        assert (found.how, found.volatile) == ("derived", True)

    def test_not_where_latency_did_not_fall(self):
        before = Figure(1.0, "ms", interval=(0.9, 1.1))
        assert break_even(1.0, before, Figure(1.2, "ms", interval=(1.1, 1.3))).note == "latency did not fall"
        assert "uncertainty" in break_even(1.0, before, Figure(0.95, "ms", interval=(0.85, 1.0))).note

    def test_the_ledger_counts_unmeasured_rows_before(self):
        ledger = Ledger()
        first = ledger.add(row("a", 0.9, p50=3.0, wall=100.0))
        assert BREAK_EVEN not in first.figures
        ledger.add(Row("condense", "condense", "data", "digits", 0, "accuracy", "", "", {"wall": Figure(6.0, "s")}))
        kept = ledger.add(row("b", 0.9, p50=1.0, wall=4.0))
        assert kept.figures[BREAK_EVEN].value == pytest.approx(5000)
        assert ledger.rows[-1] == kept

    def test_seeds_and_tasks_are_kept_apart(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9, p50=3.0, wall=1.0))
        assert BREAK_EVEN not in ledger.add(row("a", 0.9, p50=1.0, wall=1.0, seed=1)).figures
        assert BREAK_EVEN not in ledger.add(row("b", 0.9, p50=1.0, wall=1.0, task="other")).figures


class TestSeeds:
    def test_mean_and_interval(self):
        ledger = Ledger()
        for seed, accuracy in enumerate((0.90, 0.92, 0.94)):
            ledger.add(row("a", accuracy, seed=seed))
        (line,) = ledger.summary()
        assert line.seeds == (0, 1, 2)
        assert line.figures["accuracy"].value == pytest.approx(0.92)
        assert line.figures["accuracy"].interval == pytest.approx((0.92 - 0.04968276, 0.92 + 0.04968276), abs=1e-6)
        assert line.figures[MODEL_BYTES] == Figure(1000, "B")
        assert ledger.only(1).summary()[0].figures["accuracy"].value == 0.92

    def test_some_seeds_without_a_value(self):
        found = aggregate([Figure(1.0, "ms"), Figure(None, "ms", note="none"), Figure(2.0, "ms", note="noisy: x")], 3)
        assert found.value == 1.5
        assert found.note == "noisy in 1 of 3 seeds, 2 of 3 seeds"

    def test_texts(self):
        assert aggregate([Figure("a"), Figure("b"), Figure("a")], 3).value == "a / b"
        assert aggregate([Figure(None), Figure(None)], 2).how == "n.a."


class TestAdding:
    def test_refusals(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9))
        with pytest.raises(InvalidValue, match="already has a row 'a' of seed 0"):
            ledger.add(row("a", 0.8))
        with pytest.raises(InvalidValue, match="letters"):
            ledger.add(row("a/b", 0.8))
        with pytest.raises(InvalidValue, match="Did you mean 'base'"):
            Ledger(rows=[row("base", 0.9)]).of("bases")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (np.zeros((2, 2)), r"\(2, 2\)"),
            (np.zeros(0), r"\(0,\)"),
            (np.array([0.5, np.nan]), "unit 1"),
            (np.array(["a"]), "dtype <U1"),
            (np.array([None]), "dtype object"),
        ],
    )
    def test_bad_outcomes(self, values, message):
        with pytest.raises(InvalidValue, match=message):
            Ledger().add(row("a", 0.9), values)

    def test_outcomes_are_kept_small(self):
        ledger = Ledger()
        ledger.add(row("a", 0.9), np.array([1.0, 0.0, 1.0]))
        ledger.add(row("b", 0.9), np.array([1.0, 0.5], dtype=np.float32))
        assert [ledger.outcomes[name].dtype for name in ("0/a", "0/b")] == [bool, np.float64]


class TestCanonical:
    def make(self, **changes):
        ledger = Ledger(recipe="task: digits", environment={"cpu": changes.pop("cpu", "x")})
        figures = {
            "accuracy": Figure(changes.pop("accuracy", 0.9), better="higher"),
            P50: Figure(changes.pop("p50", 1.0), "ms"),
            THROUGHPUT: Figure(changes.pop("throughput", 1.0), "1/s"),
            "peak memory": Figure(changes.pop("memory", 1.0), "MiB"),
            BREAK_EVEN: Figure(changes.pop("inferences", 1.0), "inferences"),
        }
        inner = Row("i", "s", "model", "t", 0, "accuracy", "r", "k", figures)
        candidates = [{"name": "fp32", "ms": changes.pop("timing", 1.0)}]
        ledger.add(
            Row("a", "s", "model", "t", 0, "accuracy", "r", "k", figures, candidates=candidates, sub={"x": [inner]}),
            np.array([1, changes.pop("outcome", 0)]),
        )
        assert not changes
        return ledger

    @pytest.mark.parametrize("changed", ["p50", "throughput", "memory", "inferences", "timing", "cpu"])
    def test_clocks_and_machines_do_not_count(self, changed):
        assert self.make(**{changed: 2.0}).digest() == self.make().digest()

    @pytest.mark.parametrize("changed", [{"accuracy": 0.8}, {"outcome": 1}])
    def test_what_was_learned_does(self, changed):
        assert self.make(**changed).digest() != self.make().digest()

    def test_created_does_not_count(self):
        one, two = self.make(), self.make()
        two.created = "1970-01-01T00:00:00+00:00"
        assert one.canonical() == two.canonical()
        assert json.loads(one.canonical())["rows"][0]["figures"].keys() == {"accuracy"}


def test_ordered_keeps_neighbours():
    assert ordered([["a", "c"], ["a", "b", "c", "d"]]) == ["a", "b", "c", "d"]


def test_importing_the_ledger_loads_neither_torch_nor_scipy():
    code = "import sys, sparing.core.ledger, sparing.core.table; print({'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
