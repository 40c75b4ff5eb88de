"""Events: streams, frames, clips, the simulator, DVS128 Gesture's files, and tonic's."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from event_files import dvs_folder, write_aedat31
from sparing.core.errors import DataError, InvalidValue, MissingDependency
from sparing.data.events.dvs_gesture import read_aedat31, read_dvs_gesture, read_trials
from sparing.data.events.framing import (
    EventsToFrames,
    FramedEvents,
    clip_starts,
    clip_votes,
    events_to_frames,
)
from sparing.data.events.simulator import MOTIONS, EventSimulator, move_image
from sparing.data.events.stream import EventRecordings, EventStream, from_tonic, read_packed

ROW = {"x": [0, 3, 3], "y": [1, 1, 2], "t": [10, 20, 39], "p": [0, 1, 1]}


def stream(**changes) -> EventStream:
    columns = {name: np.array(values) for name, values in {**ROW, **changes}.items()}
    return EventStream(**columns, sensor_size=(4, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t": [10, 9, 39]}, r"event 1 at 9 µs comes after one at 10"),
        ({"x": [0, 4, 3]}, r"event 1 has x = 4, out of the sensor: 0…3"),
        ({"y": [0, 0, -1]}, r"event 2 has y = -1"),
        ({"p": [-1, 1, 1]}, r"polarity -1.*convert them"),
        ({"p": [0, 1, 2]}, r"polarity 2"),
        ({"x": [0.5, 1, 1]}, r"x is float64"),
        ({"x": [0, 1]}, r"2 x, 3 y"),
        ({"x": [], "y": [], "t": [], "p": []}, r"x is float64 of shape \(0,\)"),
    ],
)
def test_what_is_no_stream_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        stream(**changes)


def test_an_empty_stream_is_refused():
    nothing = np.empty(0, np.int64)
    with pytest.raises(DataError, match="no event"):
        EventStream(nothing, nothing, nothing, nothing, 4)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="sensor_size"):
        EventStream(nothing, nothing, nothing, nothing, (4, 0))


def test_a_stream_of_named_columns():
    events = np.zeros(2, dtype=[("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "?")])
    events["t"] = 5, 7
    made = EventStream.of(events, (4, 3))
    assert len(made) == 2
    assert made.duration_us == 2
    assert EventStream.of(made) is made
    with pytest.raises(InvalidValue, match="sensor_size is needed"):
        EventStream.of(events)
    with pytest.raises(DataError, match="no named columns"):
        EventStream.of(np.zeros((2, 4)), 4)
    with pytest.raises(DataError, match="sensor of"):
        EventStream.of(made, 9)


def test_frames_count_events_of_their_span():
    frames = events_to_frames(stream(), 10, 3)
    assert frames.shape == (3, 2, 4, 3)
    assert frames.sum() == 3
    assert frames[0, 0, 0, 1] == frames[1, 1, 3, 1] == frames[2, 1, 3, 2] == 1
    assert events_to_frames(stream(), 10, 2).sum() == 2  # what comes later is dropped
    assert events_to_frames(stream(), 10, 3, start=20).sum() == 2  # and what comes before
    assert events_to_frames(stream(), 30, 1, downsample=2).shape == (1, 2, 2, 2)
    pair = stream(x=[3, 3, 3], y=[1, 1, 1], p=[1, 1, 0])
    assert events_to_frames(pair, 30, 1).max() == 2
    assert set(np.unique(events_to_frames(pair, 30, 1, mode="binary"))) == {0, 1}
    assert set(np.unique(events_to_frames(pair, 30, 1, mode="max_scaled"))) == {0, 0.5, 1}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_every_event_is_in_one_frame_or_none(dt, T, downsample, seed):
    draw = np.random.default_rng(seed)
    t = np.sort(draw.integers(0, 300, 40))
    events = EventStream(draw.integers(0, 7, 40), draw.integers(0, 5, 40), t, draw.integers(0, 2, 40), (7, 5))
    frames = events_to_frames(events, dt, T, downsample)
    k = (t - t[0]) // dt
    assert frames.sum(axis=(1, 2, 3)).tolist() == [int((k == i).sum()) for i in range(T)]


def test_a_random_start_leaves_room_for_all_frames():
    draws = [np.random.default_rng(seed) for seed in range(9)]
    found = {events_to_frames(stream(), 5, 2, start="random", generator=draw).tobytes() for draw in draws}
    assert len(found) > 1
    with pytest.raises(InvalidValue, match="shorter than"):
        events_to_frames(stream(), 50, 2, start="random", generator=draws[0])
    with pytest.raises(InvalidValue, match="generator"):
        events_to_frames(stream(), 5, 2, start="random")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dt_us": 0}, "dt_us = 0"),
        ({"T": 1.5}, "T = 1.5"),
        ({"mode": "sum"}, "mode = 'sum'"),
        ({"start": "last"}, "start"),
    ],
)
def test_fields_of_frames_are_refused(fields, words):
    with pytest.raises(InvalidValue, match=words):
        events_to_frames(stream(), **{"dt_us": 5, "T": 2, **fields})


def test_clips_and_their_votes():
    assert clip_starts(100, 5, 4, 3).tolist() == [0, 33, 66]
    assert clip_starts(30, 5, 4, 3).tolist() == [0, 10, 10]
    with pytest.raises(InvalidValue, match="shorter"):
        clip_starts(19, 5, 4)
    predicted = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert clip_votes(predicted, np.array([1, 1])).tolist() == [False, True]  # half is not more than half


def test_frames_travel_with_a_model():
    operation = EventsToFrames(10, 3, 4, 3)
    made = operation([stream(), {name: np.array(values) for name, values in ROW.items()}])
    assert made.shape == (2, 3, 2, 4, 3)
    assert np.array_equal(made[0], made[1])
    with pytest.raises(DataError, match="recording 1"):
        operation([stream(), np.zeros(3)])


def packed() -> EventRecordings:
    return EventRecordings.of([stream(), stream(p=[1, 1, 1])], [0, 1], ("a", "b"), [7, 8])


def test_recordings_are_packed_and_cut():
    recordings = packed()
    assert [len(each) for each in recordings] == [3, 3]
    assert recordings.subset(np.array([1])).labels.tolist() == [1]
    assert recordings.subset(np.array([1])).fingerprint() != recordings.fingerprint()
    frames = FramedEvents(recordings, 10, 3)
    assert frames[1][1] == 1
    with pytest.raises(IndexError):
        frames[2]
    with pytest.raises(DataError, match="class 2"):
        EventRecordings.of([stream()], [2], ("a", "b"))
    other = EventStream(stream().x, stream().y, stream().t, stream().p, (9, 9))
    with pytest.raises(DataError, match="one size"):
        EventRecordings.of([stream(), other], [0, 1], ("a", "b"))
    bad = recordings.t.copy()
    bad[4] = 0
    with pytest.raises(DataError, match="stream 1: event 1 at"):
        replace(recordings, t=bad)


def test_a_packed_file(tmp_path):
    path, recordings = tmp_path / "a.npz", packed()
    columns = {name: getattr(recordings, name) for name in ("x", "y", "t", "p", "offsets")}
    np.savez(path, **columns, label=recordings.labels, class_names=np.array(["a", "b"]))
    assert read_packed(path, (4, 3), unit_us=10).t.tolist() == (10 * recordings.t).tolist()
    np.savez(path, **columns)
    with pytest.raises(DataError, match="no array 'label'"):
        read_packed(path, (4, 3))
    path.write_bytes(b"no")
    with pytest.raises(DataError, match="npz"):
        read_packed(path, (4, 3))


# --- simulator


def test_a_step_of_light_gives_as_many_events_as_thresholds_fit():
    simulator = EventSimulator(threshold=0.25, threshold_sigma=0, refractory_us=0, noise_hz=0)
    frames = np.full((3, 2, 2), 0.1)
    frames[1:, 0, 1] = 0.5
    frames[2, 0, 1] = 0.1
    events = simulator.from_frames(frames, np.array([0, 1000, 2000]))
    gap = np.log(0.55) - np.log(0.15)
    assert (events.x == 1).all()
    assert (events.y == 0).all()
    up, down = events.t[events.p == 1], events.t[events.p == 0]
    assert len(up) == int(gap / 0.25)
    # the crossings of a ramp in L are evenly spaced
    assert up.tolist() == [int(1000 * 0.25 * (k + 1) / gap) for k in range(len(up))]
    assert len(down) == len(up) - 1 or len(down) == len(up)
    assert (down > 1000).all()


def test_a_pixel_rests_after_an_event():
    frames = np.stack([np.full((1, 1), value) for value in np.linspace(0, 1, 11)])
    times = np.arange(11) * 1000
    free = EventSimulator(threshold_sigma=0, refractory_us=0, noise_hz=0).from_frames(frames, times)
    rested = EventSimulator(threshold_sigma=0, refractory_us=1500, noise_hz=0).from_frames(frames, times)
    assert (np.diff(rested.t) >= 1500).all()
    kept = [free.t[0]]
    for t in free.t[1:]:
        if t - kept[-1] >= 1500:
            kept.append(t)
    assert rested.t.tolist() == kept


def test_noise_and_mismatch_are_the_seeds():
    simulator = EventSimulator(noise_hz=500)
    frames = np.random.default_rng(0).random((5, 6, 7))
    times = np.arange(5) * 20_000
    one, same, other = (simulator.from_frames(frames, times, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.t, same.t)
    assert not np.array_equal(one.t, other.t)
    assert (np.diff(one.t) >= 0).all()
    assert one.sensor_size == (7, 6)
    quiet = EventSimulator(noise_hz=100).from_frames(np.full((2, 20, 20), 0.5), np.array([0, 1_000_000]))
    assert abs(len(quiet) - 40_000) < 5 * 200  # Poisson


@pytest.mark.parametrize(
    ("frames", "times", "words"),
    [
        (np.full((2, 2, 2), np.nan), [0, 1], "frame 0 holds NaN"),
        (np.full((2, 2, 2), 2.0), [0, 1], "out of 0…1"),
        (np.zeros((2, 2, 2)), [1, 1], "rising"),
        (np.zeros((1, 2, 2)), [1], "N ≥ 2"),
        (np.zeros((2, 2, 2)), [0, 1000], "no pixel"),
    ],
)
def test_films_are_refused(frames, times, words):
    with pytest.raises(DataError, match=words):
        EventSimulator(noise_hz=0).from_frames(frames, np.array(times))


def test_fields_of_the_simulator_are_refused():
    with pytest.raises(InvalidValue, match="threshold = 0"):
        EventSimulator(threshold=0)
    with pytest.raises(InvalidValue, match="noise_hz = nan"):
        EventSimulator(noise_hz=float("nan"))


def dot(row: int, column: int) -> np.ndarray:
    image = np.full((64, 64), 20, np.uint8)
    image[row - 4 : row + 5, column - 4 : column + 5] = 250
    return image


def path_of(motion: str, image: np.ndarray, **fields) -> np.ndarray:
    """(row, column) of the brightest spot of each frame."""
    frames, _ = move_image(image, motion, **fields)
    bright = frames - frames.min()
    rows, columns = np.mgrid[:32, :32]
    return np.stack([(bright * axis).sum((1, 2)) / bright.sum((1, 2)) for axis in (rows, columns)], 1)


def test_images_move_as_their_motion_says():
    middle, right = dot(32, 32), dot(32, 52)
    wave = path_of("wave_horizontal", middle)
    assert np.ptp(wave[:, 0]) < 0.5
    assert np.ptp(wave[:, 1]) == pytest.approx(10, abs=0.5)
    assert np.ptp(path_of("wave_vertical", middle)[:, 0]) == pytest.approx(10, abs=0.5)
    # rows run down: from the right, clockwise goes down first
    for motion, image in (("circle", middle), ("rotate", right)):
        for sense, sign in (("clockwise", 1), ("counter_clockwise", -1)):
            path = path_of(f"{motion}_{sense}", image)
            assert sign * (path[10, 0] - path[0, 0]) > 0.5, (motion, sense)
    size = {motion: (move_image(middle, motion)[0] > 0.5).sum((1, 2)) for motion in ("approach", "recede")}
    assert size["approach"][-1] > 3 * size["approach"][0]
    assert size["recede"].tolist() == size["approach"][::-1].tolist()


@pytest.mark.parametrize("motion", MOTIONS)
def test_images_become_events(motion):
    frames, times = move_image(dot(32, 44), motion, side=16)
    assert times[-1] == 300_000
    events = EventSimulator(noise_hz=0).from_frames(frames, times)
    assert len(events) > 20
    assert events.sensor_size == (16, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"motion": "jump"}, "motion = 'jump'"),
        ({"side": 0}, "side = 0"),
        ({"every_us": 400_000}, "more than duration_us"),
        ({"image": np.zeros((2, 2, 3))}, "grey"),
        ({"image": np.full((2, 2), np.nan)}, "NaN"),
    ],
)
def test_images_that_cannot_move_are_refused(change, words):
    with pytest.raises((InvalidValue, DataError), match=words):
        move_image(**{"image": dot(32, 32), "motion": "approach", **change})


# --- DVS128 Gesture


def test_an_aedat_file_gives_its_valid_polarity_events(tmp_path):
    path = tmp_path / "a.aedat"
    draw = np.random.default_rng(0)
    t = np.sort(draw.integers(0, 1 << 20, 50)) + (1 << 31) - (1 << 19)  # overflows on the way
    x, y, p = (draw.integers(0, n, 50) for n in (128, 128, 2))
    valid = np.arange(50) % 5 != 0
    write_aedat31(path, x, y, t, p, valid, packet=1, foreign=True)
    events = read_aedat31(path)
    for name, values in {"x": x, "y": y, "t": t, "p": p}.items():
        assert np.array_equal(getattr(events, name), values[valid]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"#!AER-DAT2.0" + content[12:], "begins with"),
        (lambda content: content.replace(b"END-HEADER", b"NO-HEADERS"), "no line"),
        (lambda content: content[:-3], "more than the file holds"),
        (lambda content: content + b"1234", "cut off within its header"),
        (lambda content: content.replace(b"\x08\x00\x00\x00\x04", b"\x10\x00\x00\x00\x04", 1), "4 events of 16 bytes"),
        (lambda content: content.replace(b"\x08\x00\x00\x00\x04", b"\x08\x00\x00\x00\x05", 1), "times at 5"),
    ],
)
def test_damaged_aedat_files_are_refused(tmp_path, change, words):
    path = tmp_path / "a.aedat"
    write_aedat31(path, *(np.zeros(4, np.int64) for _ in range(4)), packet=4)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        read_aedat31(path)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.aedat cannot be read"):
        read_aedat31(tmp_path / "none.aedat")


def test_the_published_layout_is_read(tmp_path):
    dvs_folder(tmp_path)
    train = read_dvs_gesture(tmp_path, train=True)
    assert len(train) == 4
    assert train.class_names[0] == "hand_clapping"
    assert train.people is not None
    assert train.people.tolist() == [1, 1, 2, 2]
    assert train.labels.tolist() == [0, 10, 0, 10]
    assert [int(each.t[0]) >= 1000 for each in train] == [False, True, False, True]
    assert len(read_dvs_gesture(tmp_path, train=False)) == 2


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("trials_to_train.txt", "../user01_lab.aedat\n", "names like user01"),
        ("trials_to_train.txt", "user09_lab.aedat\n", "user09_lab.aedat cannot be read"),
        ("user01_lab_labels.csv", "a,b,c\n", "first line"),
        ("user01_lab_labels.csv", "class,startTime_usec,endTime_usec\n12,0,9\n", "line 2.*1…11"),
        ("user01_lab_labels.csv", "class,startTime_usec,endTime_usec\n1,0\n", "three whole numbers"),
        ("user01_lab_labels.csv", "class,startTime_usec,endTime_usec\n1,900000,900001\n", "no event between"),
    ],
)
def test_a_wrong_layout_is_refused(tmp_path, file, text, words):
    dvs_folder(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=words):
        read_dvs_gesture(tmp_path, train=True)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"trials_to_test\.txt cannot be read"):
        read_dvs_gesture(tmp_path, train=False)
    with pytest.raises(DataError, match="cannot be read"):
        read_trials(tmp_path / "none.csv")


# --- tonic


def test_tonic_is_asked_for_only_where_it_is_used(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tonic", None)
    with pytest.raises(MissingDependency, match="pip install tonic"):
        from_tonic("DVSGesture", tmp_path)


def test_what_tonic_gives_is_taken_over(monkeypatch, tmp_path):
    events = np.zeros(3, dtype=[("x", "<i2"), ("y", "<i2"), ("p", "?"), ("t", "<i8")])

    class Theirs:
        sensor_size, classes = (8, 6, 2), ("a", "b")

        def __init__(self, save_to, train=True):
            assert save_to == str(tmp_path)
            self.items = [(events, 0), (events, 1)][: 2 if train else 1]

        def __iter__(self):
            return iter(self.items)

    module = types.SimpleNamespace(datasets=types.SimpleNamespace(Theirs=Theirs))
    monkeypatch.setitem(sys.modules, "tonic", module)
    assert from_tonic("Theirs", tmp_path).sensor_size == (8, 6)
    assert len(from_tonic("Theirs", tmp_path, train=False)) == 1
    with pytest.raises(InvalidValue, match="no 'Other'"):
        from_tonic("Other", tmp_path)
