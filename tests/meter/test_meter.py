"""One row measured: every column, the right runtime, and honest gaps."""

import json
from functools import partial

import numpy as np
import pytest
from meter_guests import Blobs, Own

from sparing.core.errors import InvalidValue, NotExportable, SparingError
from sparing.core.ledger import Figure
from sparing.core.meter import Meter, comparable
from sparing.core.predictor import ModulePredictor, OnnxPredictor, build_model
from sparing.core.registry import resolve
from sparing.core.task import Evaluation

QUICK = Meter(min_seconds=0.05, max_seconds=0.6, memory=False, energy="estimate", batch=8)


@pytest.fixture(scope="module")
def digits():
    task = resolve("tasks", "digits")()
    return task, comparable(ModulePredictor(build_model("mlp", task), task), task)


@pytest.fixture(scope="module")
def full(digits):
    task, predictor = digits
    return Meter(min_seconds=0.2, max_seconds=1.5, batch=16).measure(task, predictor, task.splits(None).test)


class TestFields:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"runtime": "tensorrt"}, "meter: runtime = 'tensorrt'.*'onnxruntime' or 'module'"),
            ({"threads": 0}, "meter: threads = 0.*greater than or equal to 1"),
            ({"threads": "2"}, "meter: threads = '2'"),
            ({"batch": -1}, "meter: batch = -1"),
            ({"precision": 0.0}, "meter: precision = 0.0.*greater than 0"),
            ({"precision": float("nan")}, "precision"),
            ({"max_seconds": 0.5}, r"min_seconds = 2.0 is more than max_seconds = 0.5"),
            ({"bacth": 3}, "unknown field 'bacth'. Did you mean 'batch'?"),
            ({"energy": "free"}, "energy"),
        ],
    )
    def test_refused(self, fields, message):
        with pytest.raises(InvalidValue, match=message):
            Meter(**fields)

    def test_frozen(self):
        with pytest.raises(AttributeError):
            QUICK.batch = 3


class TestRow:
    def test_columns_in_order(self, full):
        assert list(full.figures) == [
            "accuracy", "worst_class_accuracy", "ece", "nll",
            "accuracy under gaussian_noise", "accuracy under gaussian_blur", "accuracy under contrast",
            "model bytes", "folder bytes", "parameters", "non-zero parameters", "MACs",
            "latency p50", "latency p99", "latency p50 with preprocessing", "latency p99 with preprocessing",
            "throughput", "threads", "peak memory", "memory above runtime", "energy",
        ]  # fmt: skip
        assert all(figure.value is not None for figure in full.figures.values())

    def test_quality_is_the_tasks(self, digits, full):
        task, predictor = digits
        test = task.splits(None).test
        expected = task.evaluate(predictor, test)
        for name, value in expected.metrics.items():
            assert full.figures[name].value == pytest.approx(value)
        assert np.array_equal(full.outcomes, expected.per_unit)
        assert full.by_class == expected.by_class
        accuracy = full.figures["accuracy"]
        assert accuracy.interval[0] < accuracy.value < accuracy.interval[1]
        assert accuracy.note == f"Wilson over {len(full.outcomes)} units"
        blurred = task.evaluate(predictor, task.corruptions(test)["gaussian_blur"])
        assert full.figures["accuracy under gaussian_blur"].value == pytest.approx(blurred.metrics["accuracy"])

    def test_sizes_are_bytes_on_disk(self, digits, full, tmp_path):
        _, predictor = digits
        predictor.save(tmp_path / "model")
        sizes = {path.name: path.stat().st_size for path in (tmp_path / "model").iterdir()}
        assert full.figures["model bytes"].value == sizes["model.onnx"]
        assert full.figures["folder bytes"].value == sum(sizes.values()) - sizes["README.md"]
        inputs, hidden, classes = 64, 256, 10
        assert full.figures["parameters"].value == (inputs + 1) * hidden + (hidden + 1) * classes
        assert full.figures["MACs"].value == inputs * hidden + hidden * classes
        assert "matrix multiplications" in full.figures["MACs"].note

    def test_speed(self, full):
        figures = full.figures
        assert figures["latency p50"].value <= figures["latency p99"].value
        assert figures["latency p50"].value < figures["latency p50 with preprocessing"].value
        assert "repetitions in" in figures["latency p50"].note
        assert figures["throughput"].value > 1000 / figures["latency p50"].value  # a batch is cheaper per image
        assert figures["throughput"].note.startswith("batch 16; ")
        assert (figures["threads"].value, figures["threads"].better) == (1, "")

    def test_memory_is_of_a_process_without_torch(self, full):
        assert 20 < full.figures["peak memory"].value < 200  # importing torch alone takes more
        assert 0 < full.figures["memory above runtime"].value < full.figures["peak memory"].value

    def test_energy_says_where_it_is_from(self, full):
        energy = full.figures["energy"]
        assert energy.how in ("est", "measured")
        assert "Horowitz" in energy.note if energy.how == "est" else "RAPL" in energy.note

    def test_threads_are_given_back(self, digits):
        task, predictor = digits
        predictor.set_threads(None)
        QUICK.measure(task, predictor, task.splits(None).test)
        assert predictor.threads is None

    def test_only_clocks_differ_between_two_measurements(self, digits):
        task, predictor = digits
        one, two = (QUICK.measure(task, predictor, task.splits(None).test) for _ in range(2))
        steady = [{n: f for n, f in m.figures.items() if not f.volatile} for m in (one, two)]
        assert steady[0] == steady[1]
        assert one.figures["latency p50"] != two.figures["latency p50"]

    def test_several_predictors_in_turns(self, digits):
        task, predictor = digits
        larger = comparable(ModulePredictor(build_model("mlp", task, widths=[2048, 2048]), task), task)
        found = QUICK.latency({"small": predictor, "large": larger}, task)
        assert found["small"].p50 < found["large"].p50
        assert larger.threads is None


class TestGaps:
    def test_no_preprocessing(self):
        task = Blobs()
        found = QUICK.measure(task, comparable(ModulePredictor(task.default_model(), task), task), task.splits().test)
        figure = found.figures["latency p50 with preprocessing"]
        assert (figure.how, figure.unit, figure.note) == ("n.a.", "ms", "the predictor has no preprocessing")
        assert found.figures["peak memory"].note == "memory is switched off in the meter"

    def test_a_module_that_cannot_be_saved(self):
        task = Blobs()
        found = Meter(min_seconds=0.05, max_seconds=0.3, runtime="module").measure(
            task, ModulePredictor(task.default_model(), task), task.splits().test
        )
        for name in ("folder bytes", "peak memory", "memory above runtime"):
            assert found.figures[name].how == "n.a."
            assert "built by hand" in found.figures[name].note
        assert found.figures["model bytes"].value > 0
        assert found.figures["energy"].how == "est"

    def test_a_users_own_class_in_the_module_runtime(self):
        task = Blobs()
        predictor = ModulePredictor(build_model(Own, width=3), task)
        found = Meter(min_seconds=0.05, max_seconds=0.3, runtime="module").measure(task, predictor, task.splits().test)
        assert found.figures["folder bytes"].value > 0
        assert found.figures["peak memory"].how == "n.a."
        assert "not told to trust" in found.figures["peak memory"].note
        assert "meter_guests" in found.figures["peak memory"].note

    def test_energy_switched_off_and_counter_only(self, monkeypatch):
        monkeypatch.setattr("sparing.core.energy.version_of", lambda name: "")
        task = Blobs()
        predictor = comparable(ModulePredictor(task.default_model(), task), task)
        for energy, note in (("off", "switched off"), ("counter", "pip install 'sparing[energy]'")):
            meter = Meter(min_seconds=0.02, max_seconds=0.2, memory=False, energy=energy)
            figure = meter.measure(task, predictor, task.splits().test).figures["energy"]
            assert (figure.how, figure.unit) == ("n.a.", "mJ")
            assert note in figure.note


class TestGroups:
    def quality(self, groups):
        task = Blobs(groups)
        return QUICK.quality(task, ModulePredictor(task.default_model(), task), task.splits().test)

    def test_gap(self):
        groups = np.repeat(["old", "young"], [20, 40])
        found = self.quality(groups)
        means = [found.outcomes[groups == name].mean() for name in ("old", "young")]
        gap = found.figures["accuracy gap between groups"]
        assert gap.value == pytest.approx(abs(means[0] - means[1]))
        assert "(n=20)" in gap.note
        assert "(n=40)" in gap.note
        assert gap.better == "lower"

    def test_wrong_length_names_the_task(self):
        with pytest.raises(SparingError, match=r"'blobs'.*\(3,\).*\(60,\)"):
            self.quality(np.zeros(3))

    def test_no_outcomes(self):
        task = Blobs(np.zeros(60))
        task.evaluate = lambda predictor, split: Evaluation({"accuracy": 0.5, "confidence": 1.0})
        figure = QUICK.quality(task, None, task.splits().test).figures["accuracy gap between groups"]
        assert figure.how == "n.a."


class TestBadTasks:
    def quality(self, *evaluation):
        task = Blobs()
        task.evaluate = lambda predictor, split: Evaluation(*evaluation)
        return QUICK.quality(task, None, task.splits().test)

    def test_missing_headline(self):
        with pytest.raises(SparingError, match="returned confidence, but not the headline 'accuracy'"):
            self.quality({"confidence": 1.0})

    def test_missing_metric(self):
        with pytest.raises(SparingError, match="did not return its metric 'confidence'"):
            self.quality({"accuracy": 1.0})

    def test_outcomes_that_are_not_the_headlines(self):
        with pytest.raises(SparingError, match=r"accuracy = 0\.9 as its mean; it has shape \(2,\) and mean 0\.5"):
            self.quality({"accuracy": 0.9, "confidence": 1.0}, np.array([0, 1]))

    def test_nan_is_not_available(self):
        found = self.quality({"accuracy": float("nan"), "confidence": float("inf")}, np.array([np.nan, 1]))
        assert found.figures["accuracy"] == Figure(None, "", "n.a.", "higher", note="evaluated to nan")
        assert found.figures["confidence"].note == "evaluated to inf"
        assert found.outcomes is None
        json.dumps({name: figure.value for name, figure in found.figures.items()}, allow_nan=False)


class TestComparable:
    def test_a_module_is_exported(self):
        task = Blobs()
        module = ModulePredictor(task.default_model(), task)
        found = comparable(module, task)
        assert isinstance(found, OnnxPredictor)
        x = task.splits().test[0]
        assert np.allclose(found(x), module(x), atol=1e-5)

    def test_in_the_module_runtime_it_stays(self):
        task = Blobs()
        module = ModulePredictor(task.default_model(), task)
        assert comparable(module, task, "module") is module

    def test_another_kind_keeps_its_runtime(self):
        task = Blobs()
        onnx = comparable(ModulePredictor(task.default_model(), task), task)
        assert comparable(onnx, task, export=partial(pytest.fail, "exported again")) is onnx

    def test_a_refusal_comes_out(self):
        def refuse(*arguments):
            raise NotExportable("operator x")

        task = Blobs()
        with pytest.raises(NotExportable, match="operator x"):
            comparable(ModulePredictor(task.default_model(), task), task, export=refuse)
