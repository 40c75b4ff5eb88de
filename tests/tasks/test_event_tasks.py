"""Tasks on events: splits by people, training, clips, folders of one's own, and what the ledger counts of spikes."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

import event_files
import sparing
from sparing.core.errors import DataError, InvalidValue
from sparing.core.ledger import ADDITIONS, ENERGY, MACS
from sparing.core.meter import Meter
from sparing.core.predictor import ModulePredictor, to_onnx
from sparing.data.events.framing import clip_starts, events_to_frames
from sparing.models.spiking.report import operations_of
from sparing.models.spiking.streaming import StreamingPredictor
from sparing.tasks.events.gestures import DVSGesture, GestureEvents, by_people
from sparing.tasks.events.own import EventFolder

QUICK = Meter(min_seconds=0, max_seconds=0.01, memory=False, energy="estimate", batch=2)
SMALL = {"widths": [3, 4], "pools": [1, 2], "hidden": [5], "r_t": 2, "r_c": 2}


def own(place: Path, **fields) -> EventFolder:
    return EventFolder(str(place), **{"side": 8, "dt_us": 1000, "T": 4, "downsample": 1, **fields})


@pytest.fixture
def bars(tmp_path: Path) -> EventFolder:
    return own(event_files.bars(tmp_path / "bars", count=20))


def test_people_are_in_one_part_only():
    people = np.repeat(np.arange(10), 3)
    rest, held = by_people(people, 0.15)
    assert not set(people[rest]) & set(people[held])
    assert len(set(people[held])) == 2
    assert sorted([*rest, *held]) == list(range(30))


def test_simulated_gestures_are_split_by_people(data_root):
    task = GestureEvents()
    splits = task.splits(data_root)
    people = splits.train.recordings.people
    assert not set(people[splits.train.rows]) & set(people[splits.val.rows])
    assert not set(people) & set(splits.test.recordings.people)
    frames, label = splits.test[0]
    assert frames.shape == (10, 2, 16, 16)
    assert frames.sum() == len(splits.test.recordings[0])  # the clock begins at 0 for all
    assert task.labels[label] == "wave_horizontal"


def test_gestures_that_are_missing_are_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"train\.npz is missing.*simulated"):
        GestureEvents().splits(tmp_path)
    with pytest.raises(DataError, match=r"dvs128_gesture is missing.*IBM"):
        DVSGesture().splits(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GestureEvents(T=0), "T = 0"),
        (lambda: GestureEvents(mode="sum"), "mode = 'sum'"),  # type: ignore[arg-type]
        (lambda: GestureEvents(val_share=1.0), "val_share = 1.0"),
        (lambda: DVSGesture(clips=0), "clips = 0"),
        (lambda: DVSGesture(train_start="last"), "train_start = 'last'"),  # type: ignore[arg-type]
        (lambda: EventFolder("here", test_share=0), "test_share = 0"),
        (lambda: EventFolder("here", side=0), "sensor_size"),
    ],
)
def test_fields_are_refused(make, words):
    with pytest.raises(InvalidValue, match=words):
        make()


def test_a_clip_counts_where_most_are_right(tmp_path):
    task = DVSGesture(dt_us=500, T=4, downsample=16, clips=3)
    test = task.splits(event_files.dvs_files(tmp_path)).test

    class Fixed:
        """Says class 0 of the first two clips of a recording and class 1 of the third."""

        def __call__(self, frames):
            assert len(frames) == 3
            seen.append(np.asarray(frames))
            return np.eye(11, dtype=np.float32)[[0, 0, 1]]

    seen: list[np.ndarray] = []
    found = task.evaluate(Fixed(), test)  # type: ignore[arg-type]
    assert found.per_unit is not None
    assert found.per_unit.tolist() == [float(label == 0) for label in test.labels]
    assert found.metrics["accuracy"] == pytest.approx(found.per_unit.mean())
    assert found.by_class["hand_clapping"] == 1
    stream = test.recordings[0]
    starts = clip_starts(stream.duration_us, 500, 4, 3) + stream.t[0]
    expected = [events_to_frames(stream, 500, 4, 16, start=int(start)) for start in starts]
    np.testing.assert_array_equal(seen[0], np.stack(expected))


def test_training_recordings_may_begin_at_random(tmp_path):
    train = (
        DVSGesture(dt_us=500, T=4, downsample=16, train_start="random").splits(event_files.dvs_files(tmp_path)).train
    )
    torch.manual_seed(0)
    first, second = train[0][0], train[0][0]
    assert not np.array_equal(first, second)
    torch.manual_seed(0)
    assert np.array_equal(first, train[0][0])


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
    splits = own(event_files.bars(tmp_path, ("train", "valid", "test"), 8)).splits(None)
    assert len(splits.test) == len(splits.val) == 16
    assert len(splits.train) + len(splits.calibration) == 16


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: np.savez(place / "up/0.npz", x=[9], y=[0], t=[0], p=[0]), r"0\.npz.*x = 9, out of the sensor"),
        (lambda place: np.savez(place / "up/0.npz", x=[1], y=[0], t=[0]), "no array 'p'"),
        (lambda place: (place / "up/0.npz").write_bytes(b"no"), r"0\.npz"),
        (lambda place: (place / "up/a.aedat").write_bytes(b"no"), r"a\.aedat begins with"),
    ],
)
def test_a_recording_that_is_wrong_is_named(tmp_path, spoil, words):
    spoil(event_files.bars(tmp_path, count=3))
    with pytest.raises(DataError, match=words):
        own(tmp_path).splits(None)


def test_a_folder_of_one_class_is_refused(tmp_path):
    (tmp_path / "only").mkdir()
    with pytest.raises(DataError, match="1 class sub-folders"):
        _ = own(tmp_path).labels


def test_squared_errors_of_labels_and_of_probabilities(bars):
    outputs = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(bars.loss(outputs, (None, torch.tensor([0, 1])))) == pytest.approx(0.25)
    assert float(bars.loss(outputs, (None, torch.tensor([[0.5, 0.5], [0.0, 0.0]])))) == pytest.approx(0.125)


def test_corruptions_add_or_lose_events(bars):
    test = bars.splits(None).test
    worse = bars.corruptions(test)
    assert worse["event loss"][0][0].sum() < test[0][0].sum()
    assert len(worse["noise"].recordings.t) > sum(len(test.recordings[int(row)]) for row in test.rows)


# --- what the ledger counts


def test_the_ledger_counts_at_the_rates_of_the_test_split(bars):
    torch.manual_seed(0)
    model = sparing.build_model("gesture_snn", bars, **SMALL).train()
    splits = bars.splits(None)
    for i in range(0, 24, 8):
        model(torch.stack([torch.from_numpy(splits.train[j][0]) for j in range(i, i + 8)]))
    predictor = ModulePredictor(model.eval(), bars)
    graph = to_onnx(predictor, task=bars)
    frames = torch.stack([torch.from_numpy(item[0]) for item in (splits.test[i] for i in range(len(splits.test)))])
    expected = operations_of(model, frames)
    for deployed, source in ((graph, predictor), (StreamingPredictor(predictor), None)):
        figures = QUICK.measure(bars, deployed, splits.test, source).figures
        assert figures[MACS].value == expected.macs
        assert figures[ADDITIONS].value == expected.accumulates
        assert "firing rates" in figures[MACS].note
        read = deployed.describe().model_bytes * 1950 / 8
        mj = (4.6 * expected.macs + 0.9 * expected.accumulates + read) * 1e-9
        assert figures[ENERGY].value == pytest.approx(mj)
        assert figures[ENERGY].how == "est"
        assert "addition" in figures[ENERGY].note
    dense = QUICK.measure(bars, graph, splits.test).figures
    assert dense[MACS].value > expected.macs
    assert ADDITIONS not in dense


def test_a_recipe_from_events_to_a_streaming_predictor(bars, tmp_path):
    steps = [sparing.Leap(rho=0.1), sparing.Train(epochs=2, batch_size=8, lr=0.01), sparing.StreamSpikes()]
    run = sparing.run(
        task=bars, model={"name": "gesture_snn", **SMALL}, steps=steps, meter=asdict(QUICK), out=tmp_path / "out"
    )
    row = run.ledger.rows[-1]
    assert row.kind == "spiking"
    assert {"spikes per recording", "NASAR", "firing rate of FC1", ADDITIONS} <= set(row.figures)
    assert any("answer comes with the last of its 4 steps" in remark for remark in row.remarks)
    predictor = sparing.load(tmp_path / "out" / "model")
    events = bars.splits(None).test.recordings[0]
    frames = predictor.preprocessing([events])
    stream = predictor.stream()
    for step in range(4):
        answer = stream.push(frames[:, step])
    np.testing.assert_array_equal(answer, predictor.predict([events]))


# --- in scikit-learn's manner


def test_a_classifier_learns_bars_that_move(bars):
    recordings = bars.splits(None).train.recordings
    labels = np.array(["right", "up"])[1 - recordings.labels]  # the folders are sorted: right, up
    streams = list(recordings)
    fields = {"widths": [6, 8], "pools": [1, 2], "hidden": [16], "r_t": 2, "r_c": 2}
    classifier = sparing.SNNClassifier(dt_us=1000, T=4, epochs=12, lr=0.02, batch_size=8, fields=fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier.fit(streams, labels)
    assert classifier.score(streams, labels) >= 0.9
    assert classifier.report_.steps == 4
    frames = np.stack([events_to_frames(stream, 1000, 4) for stream in streams[:3]])
    assert classifier.predict(frames).tolist() == classifier.predict(streams[:3]).tolist()
    stream = classifier.predictor_.stream()
    answers = [stream.push(frames[:, t]) for t in range(4)]
    np.testing.assert_array_equal(answers[-1], classifier.decision_function(frames))


def test_what_a_classifier_refuses():
    frames = np.zeros((4, 3, 2, 8, 8), np.float32)
    with pytest.raises(NotFittedError):
        sparing.SNNClassifier().predict(frames)
    with pytest.raises(DataError, match="one each"):
        sparing.SNNClassifier().fit(frames, [0, 1])
    with pytest.raises(DataError, match="at least two classes"):
        sparing.SNNClassifier().fit(frames, [1, 1, 1, 1])
    broken = frames.copy()
    broken[2, 0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="recording 2 holds frames that are NaN"):
        sparing.SNNClassifier().fit(broken, [0, 1, 0, 1])
    with pytest.raises(DataError, match="X is a dict"):
        sparing.SNNClassifier().fit({}, [0])
    with pytest.raises(DataError, match="squares"):
        sparing.SNNClassifier().fit(frames[..., :4], [0, 1, 0, 1])


def test_a_classifier_warns_of_layers_that_never_fire():
    frames = np.zeros((4, 3, 2, 8, 8), np.float32)
    classifier = sparing.SNNClassifier(
        epochs=1, lr=1e-9, fields={"widths": [2, 2], "pools": [2, 2], "r_t": 2, "r_c": 2}
    )
    with pytest.warns(UserWarning, match="fires in"):
        classifier.fit(frames, [0, 1, 0, 1])
