"""The store: nothing is done twice, nothing is lost, and what a result cost is known however often it was killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from faults import fail_at, in_child, names
from sparing.core import files, store
from sparing.core.errors import CorruptFile, InvalidValue, StoreError
from sparing.core.fingerprint import NoFingerprint
from sparing.core.randomness import isolated_rng, seed_everything
from sparing.core.store import ARRAYS, JSON, PREDICTOR, TENSORS, All, BoundStore, Store


@pytest.fixture
def bound(tmp_path: Path) -> BoundStore:
    return Store(tmp_path / "store").bind("data", seed=0)


class Counted:
    """A computation that knows how often it ran."""

    def __init__(self, value: Any = 1) -> None:
        self.value, self.runs = value, 0

    def __call__(self) -> Any:
        self.runs += 1
        return self.value


def entry_of(bound: BoundStore, name: str = "x", seed: bool = True) -> Path:
    assert bound.store is not None
    return bound.store.entry_folder(bound.key(seed), name)


# ------------------------------------------------------------------------------------------------------- once


def test_once_computes_once(bound):
    compute = Counted({"a": [1, 2]})
    assert not bound.has("x")
    assert bound.once("x", compute, JSON) == {"a": [1, 2]}
    assert bound.has("x")
    assert bound.once("x", compute, JSON) == {"a": [1, 2]}
    assert compute.runs == 1


def test_the_first_time_gives_what_every_later_time_gives(bound):
    assert bound.once("x", lambda: (1, 2), JSON) == [1, 2]
    assert bound.once("x", lambda: (1, 2), JSON) == [1, 2]


def test_each_codec_gives_back_what_it_was_given(bound):
    parts = {"a": JSON, "b": ARRAYS, "c": TENSORS}
    value = {"a": "ü", "b": {"x": np.arange(3)}, "c": {"w": torch.arange(4.0)}}
    for _ in range(2):
        found = bound.once("x", lambda: value, All(parts))
        assert found["a"] == "ü"
        np.testing.assert_array_equal(found["b"]["x"], np.arange(3))
        assert torch.equal(found["c"]["w"], torch.arange(4.0))


def test_a_predictor_is_kept(bound):
    from sparing.core.predictor import ModulePredictor, build_model
    from sparing.tasks.images.digits import Digits

    task = Digits()
    predictor = ModulePredictor(build_model("mlp", task, widths=[4]), task)
    found = bound.once("x", lambda: predictor, PREDICTOR)
    inputs = task.example_input()
    np.testing.assert_array_equal(found(*inputs), predictor(*inputs))


def test_parts_that_are_missing_are_named(bound):
    with pytest.raises(InvalidValue, match=r"the parts \['a', 'b'\], but \['a'\] were given"):
        bound.once("x", lambda: {"a": 1}, All({"a": JSON, "b": JSON}))
    assert not bound.has("x")


def test_a_computation_that_fails_keeps_nothing_and_is_tried_again(bound):
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bound.once("x", fail, JSON)
    assert bound.once("x", lambda: 1, JSON) == 1
    assert bound.cost.depth == 0


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "a b", "x\0"])
def test_names_that_are_no_file_names_are_refused(bound, name):
    for act in (bound.progress, lambda name: bound.once(name, Counted(), JSON)):
        with pytest.raises(InvalidValue, match="letters, digits"):
            act(name)


def test_a_result_wanted_while_it_is_being_made_is_refused_instead_of_waiting_for_itself(bound):
    with pytest.raises(InvalidValue, match=r"\.x is wanted while it is being made"):
        bound.once("x", lambda: bound.once("x", lambda: 1, JSON), JSON)
    assert bound.once("x", lambda: 1, JSON) == 1


def test_without_a_fingerprint_nothing_is_kept_and_everything_works(bound, caplog):
    bare = bound.child(object())
    assert "results from here on are not kept" in caplog.text
    assert "builtins.object" in caplog.text
    compute = Counted()
    for below in (bare, bare.child("more")):
        assert [below.once("x", compute, JSON) for _ in range(2)] == [1, 1]
        assert not below.has("x")
        assert below.stored_cost() is None
        progress = below.progress("x")
        progress.save({"a": 1})
        assert progress.load() is None
        progress.clear()
        assert below.cost.wall_s > 0
    assert compute.runs == 4
    with pytest.raises(NoFingerprint, match=r"builtins\.object"):
        bound.store.bind(object(), seed=0)


# ------------------------------------------------------------------------------------------------------- keys


def test_equal_inputs_have_one_key_and_other_inputs_another(tmp_path):
    kept = Store(tmp_path / "store")

    def key(*parts: Any, seed: int = 0, steps: tuple[Any, ...] = (), seeded: bool = True) -> str:
        bound = kept.bind(*parts, seed=seed)
        for step in steps:
            bound = bound.child(*step)
        return bound.key(seeded)

    assert key("d", [1.5, None]) == key("d", [1.5, None])
    others = [
        key("d"),
        key("e"),
        key("d", seed=1),
        key("d", seeded=False),
        key("d", steps=(("step", 1),)),
        key("d", steps=(("step", 2),)),
        key("d", steps=(("step", 1), ("step", 2))),
        key("d", steps=(("step", 2), ("step", 1))),
        key("d", steps=(("step", 1, "step", 2),)),
        key("d", "e"),
        key(["d"]),
    ]
    assert len(set(others)) == len(others)
    assert key("d", seed=1, seeded=False) == key("d", seed=2, seeded=False)


def test_code_threads_and_versions_make_another_key(monkeypatch):
    from sparing.core import fingerprint as module

    def key(threads: int = 1) -> str:
        return module.environment_fingerprint(threads)

    before = key()
    assert before == key()
    assert before != key(threads=2)
    for name, other in (("code_fingerprint", lambda: "other"), ("cpu", lambda: "other"), ("version_of", lambda _: "9")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, other)
            assert key() != before, name
    assert key() == before


def test_the_code_fingerprint_covers_every_source_file(tmp_path, monkeypatch):
    from sparing.core import fingerprint as module

    package = tmp_path / "package"
    shutil.copytree(Path(module.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "__file__", str(package / "core" / "fingerprint.py"))
    seen = [module.code_fingerprint.__wrapped__()]
    for change in ("core/losses_of_mine.py", "engine/kernel.cpp", "engine/kernel.h"):
        (package / change).parent.mkdir(exist_ok=True)
        (package / change).write_text("")
        seen.append(module.code_fingerprint.__wrapped__())
        (package / change).write_text("x")
        seen.append(module.code_fingerprint.__wrapped__())
    (package / "core" / "notes.txt").write_text("no code")
    seen.append(seen[-1])
    assert len(set(seen)) == 7
    assert module.code_fingerprint.__wrapped__() == seen[-1]


def test_seedless_work_is_shared_between_seeds(tmp_path):
    kept = Store(tmp_path / "store")
    compute = Counted()
    for seed in range(3):
        kept.bind("data", seed=seed).once("x", compute, JSON, seed=False)
    assert compute.runs == 1
    for seed in range(3):
        kept.bind("data", seed=seed).once("x", compute, JSON)
    assert compute.runs == 4


def test_a_child_shares_nothing_with_its_parent_but_the_way_to_it(bound):
    bound.once("x", lambda: "parent", JSON)
    child = bound.child("step", {"epochs": 3})
    assert child.once("x", lambda: "child", JSON) == "child"
    assert bound.child("step", {"epochs": 3}).once("x", lambda: "again", JSON) == "child"
    assert bound.child("step", {"epochs": 4}).once("x", lambda: "other", JSON) == "other"
    assert bound.once("x", lambda: "again", JSON) == "parent"


# ---------------------------------------------------------------------------------------------------- generators


def draws() -> list[float]:
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def test_what_follows_does_not_depend_on_whether_a_result_was_stored(bound):
    def both() -> tuple[list[float], list[float], list[float]]:
        with isolated_rng("step", 0):
            return bound.once("a", draws, JSON), draws(), bound.once("b", draws, JSON)

    unbroken = both()
    shutil.rmtree(entry_of(bound, "b"))
    assert both() == unbroken
    shutil.rmtree(entry_of(bound, "a"))
    assert both() == unbroken
    assert len({tuple(part) for part in unbroken}) == 3


def test_draws_follow_the_seed(bound):
    found = []
    for seed in (1, 1, 2):
        with isolated_rng(seed):
            found.append(bound.once("x", draws, JSON))
        shutil.rmtree(entry_of(bound))
    assert found[0] == found[1] != found[2]


def test_the_callers_generators_are_left_as_they_were(bound):
    with isolated_rng(0):
        seed_everything(3)
        expected = draws()
        seed_everything(3)
        bound.once("x", draws, JSON)
        assert draws() == expected


# --------------------------------------------------------------------------------------------------------- damage


def damage_payload(folder: Path) -> None:
    with (folder / "payload" / "value.json").open("a") as file:
        file.write(" ")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a changed payload": damage_payload,
    "a missing payload": lambda folder: shutil.rmtree(folder / "payload"),
    "a folder for a file": lambda folder: (
        (folder / "payload" / "value.json").unlink(),
        (folder / "payload" / "value.json").mkdir(),
    ),
    "an entry cut off": lambda folder: os.truncate(folder / "entry.json", 20),
    "an entry that is a list": lambda folder: (folder / "entry.json").write_text("[]"),
    "an entry without seconds": lambda folder: (folder / "entry.json").write_text('{"name": "x", "files": {}}'),
    "seconds that are text": lambda folder: (folder / "entry.json").write_text(
        '{"name": "x", "wall_s": "long", "cpu_s": 1, "files": {}}'
    ),
    "files that are a list": lambda folder: (folder / "entry.json").write_text(
        '{"name": "x", "wall_s": 1, "cpu_s": 1, "files": ["payload/value.json"]}'
    ),
    "no entry at all": lambda folder: (folder / "entry.json").unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_result_is_made_anew_with_a_warning(bound, name, caplog):
    compute = Counted([1, 2, 3])
    bound.once("x", compute, JSON)
    DAMAGE[name](entry_of(bound))
    assert bound.once("x", compute, JSON) == [1, 2, 3]
    assert compute.runs == 2
    if name != "no entry at all":
        assert "a stored result is damaged and will be made anew" in caplog.text
        assert str(entry_of(bound)) in caplog.text
    caplog.clear()
    assert bound.once("x", compute, JSON) == [1, 2, 3]
    assert (compute.runs, caplog.text) == (2, "")


def test_a_result_its_codec_cannot_read_is_damaged(bound):
    class Forgetful:
        def save(self, value: Any, folder: Path) -> None:
            files.write_json(folder / "value.json", value)

        def load(self, folder: Path) -> Any:
            return files.read_json(folder / "value.json")["never"]

    with pytest.raises(CorruptFile, match="not a readable result: 'never'"):
        bound.once("x", lambda: {}, Forgetful())


def test_a_damaged_entry_stops_neither_listing_nor_planning_nor_pruning(bound, caplog):
    for name in ("x", "y"):
        bound.once(name, Counted(), JSON)
    (entry_of(bound) / "entry.json").write_text("{")
    assert [entry.name for entry in bound.store.entries()] == ["y"]
    assert "damaged" in caplog.text
    assert bound.stored_cost()[0] == 1
    bound.store.prune(0)
    assert not entry_of(bound).exists()


# ----------------------------------------------------------------------------------------------------- processes


def fork_worker(action: Callable[[], Any]) -> int:
    if (child := os.fork()) == 0:
        try:
            action()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return child


def test_processes_that_want_one_result_compute_it_once(tmp_path):
    def work() -> None:
        bound = Store(tmp_path / "store").bind("data", seed=0)

        def compute() -> int:
            with (tmp_path / "ran").open("a") as file:
                file.write("x")
            time.sleep(0.2)
            return 7

        assert bound.once("x", compute, JSON) == 7

    children = [fork_worker(work) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "ran").read_text() == "x"


def test_threads_that_want_one_result_compute_it_once(bound):
    compute = Counted(3)
    found: list[int] = []
    with bound.store.lock(bound.key(), "x"):
        threads = [threading.Thread(target=lambda: found.append(bound.once("x", compute, JSON))) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert compute.runs == 0
    for thread in threads:
        thread.join()
    assert (found, compute.runs) == ([3, 3, 3], 1)


@pytest.mark.parametrize("helper", [False, True])
def test_a_killed_process_leaves_the_lock_free(bound, tmp_path, helper):
    """Also when a process it had forked, as a data loader does, lives on for a while."""

    def stuck() -> int:
        if helper and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        (tmp_path / "started").touch()
        time.sleep(20)
        return 0

    child = fork_worker(lambda: (os.setsid(), bound.once("x", stuck, JSON)))
    try:
        while not (tmp_path / "started").exists():
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        start = time.monotonic()
        assert bound.once("x", lambda: 1, JSON) == 1
        assert time.monotonic() - start < 5
    finally:
        if helper:
            os.killpg(child, signal.SIGKILL)


def test_processes_may_make_a_store_at_the_same_moment(tmp_path):
    def work() -> None:
        for number in range(20):
            Store(tmp_path / str(number)).bind("data", seed=0).once("x", lambda: 1, JSON)

    children = [fork_worker(work) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3


@pytest.mark.parametrize("position", [1, 2, 3])
def test_a_process_killed_while_it_made_the_store_leaves_a_usable_folder(tmp_path, position):
    def die() -> None:
        files.fault_hook = lambda stage, _: os._exit(7) if stage == ("write", "fsync", "rename")[position - 1] else None
        Store(tmp_path / "store")

    assert in_child(die) == 7
    assert Store(tmp_path / "store").bind("data", seed=0).once("x", lambda: 1, JSON) == 1


def test_death_in_any_write_window_of_a_result_leaves_it_to_be_made_again(tmp_path):
    calls: list[Path] = []
    files.fault_hook = lambda stage, target: calls.append(target)
    value = {"a": 1, "b": {"w": torch.ones(2)}}
    codec = All({"a": JSON, "b": TENSORS})
    Store(tmp_path / "counted").bind("data", seed=0).once("x", lambda: value, codec)
    files.fault_hook = None
    kept = Store(tmp_path / "store")
    for position in range(1, len(calls) - 2):  # the first three calls made the store itself
        bound = kept.bind(position, seed=0)

        def die(position: int = position, bound: BoundStore = bound) -> None:
            count = [0]

            def hook(stage: str, target: Path) -> None:
                count[0] += 1
                if count[0] == position:
                    os.kill(os.getpid(), signal.SIGKILL)

            files.fault_hook = hook
            bound.once("x", lambda: value, codec)

        assert in_child(die) == -signal.SIGKILL
        assert not bound.has("x")
        assert list(kept.entries()) == []
        compute = Counted(value)
        assert bound.once("x", compute, codec)["a"] == 1
        assert compute.runs == 1
        assert [path for path in names(kept.path) if ".tmp" in path] == []
        kept.clear()


# ------------------------------------------------------------------------------------------------------- progress


@pytest.fixture
def progress(bound: BoundStore) -> store.Progress:
    return bound.progress("x")


def states(progress: store.Progress) -> list[str]:
    return names(progress.folder) if progress.folder.is_dir() else []


def test_the_last_two_states_are_kept_and_the_newest_is_read(progress, bound):
    assert progress.load() is None
    for number in range(1, 5):
        progress.save({"step": number})
        assert bound.progress("x").load() == {"step": number}
    assert states(progress) == ["00000003.state", "00000004.state"]


def test_numbers_beyond_eight_digits_are_still_in_order(progress):
    progress.save(1)
    os.rename(progress.folder / "00000001.state", progress.folder / "99999999.state")
    for number in (2, 3):
        progress.save(number)
        assert progress.load() == number
    assert states(progress) == ["100000000.state", "100000001.state"]


def test_a_state_may_hold_whatever_a_training_has(progress):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {
        "model": OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
        "rest": (1, 2.5, "a", None, True, b"x", {1, 2}, torch.Size([3]), torch.float16, torch.device("cpu"), [1j]),
        "parameter": torch.nn.Parameter(torch.ones(1)),
        7: "a number for a key",
    }
    progress.save(state)
    found = progress.load()
    assert found["rest"] == state["rest"]
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(found["model"]["weight"], model.weight)
    assert torch.equal(found["generator"], state["generator"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, {"b": np.float64(1)}]}, r"the state\['a'\]\[1\]\['b'\] is a numpy.float64"),
        ({"a": {np.int64(1): 2}}, r"a key of the state\['a'\] is a numpy.int64"),
        (np.zeros(2), "the state is a numpy.ndarray"),
        ([Path("x")], r"the state\[0\] is a pathlib\."),
    ],
)
def test_a_state_that_could_not_be_read_back_is_refused_at_once(progress, state, message):
    with pytest.raises(InvalidValue, match=message):
        progress.save(state)
    assert states(progress) == []


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


STATE_DAMAGE = {
    "empty": lambda path: os.truncate(path, 0),
    "cut off in the header": lambda path: os.truncate(path, 30),
    "cut off in the payload": lambda path: os.truncate(path, path.stat().st_size - 1),
    "another magic": lambda path: flip(path, 0),
    "another digest": lambda path: flip(path, 10),
    "other seconds": lambda path: flip(path, 46),
    "another check": lambda path: flip(path, 58),
    "another payload": lambda path: flip(path, 200),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", STATE_DAMAGE)
def test_a_damaged_newest_state_gives_way_to_the_older_one(progress, bound, name, caplog):
    for number in (1, 2):
        progress.save({"step": number, "more": torch.arange(50)})
    STATE_DAMAGE[name](progress.folder / "00000002.state")
    assert bound.progress("x").load()["step"] == 1
    assert "00000002.state" in caplog.text
    assert "an older state is used if there is one" in caplog.text
    assert 0 <= progress.spent_before()[0] < 5
    progress.save({"step": 3})
    assert bound.progress("x").load() == {"step": 3}


def test_when_all_states_are_damaged_the_work_starts_anew(progress):
    for number in (1, 2):
        progress.save(number)
    for path in progress.folder.iterdir():
        STATE_DAMAGE["another digest"](path)
    assert progress.load() is None
    assert progress.spent_before() == (0.0, 0.0)


def test_foreign_files_among_the_states_are_left_alone(progress):
    progress.save(1)
    (progress.folder / "notes.state").write_text("")
    (progress.folder / ".00000009.state.abcdef01.tmp").write_text("")
    assert progress.load() == 1


def test_progress_is_deleted_when_the_result_is_stored_and_not_before(bound, progress):
    def compute() -> int:
        bound.progress("x").save({"step": 1})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bound.once("x", compute, JSON)
    assert states(progress) == ["00000001.state"]
    assert bound.once("x", lambda: bound.progress("x").load()["step"], JSON) == 1
    assert not progress.folder.exists()


def test_death_in_any_write_window_of_a_state_leaves_one_to_go_on_from(bound):
    for position in (1, 2, 3):
        progress = bound.progress(f"x{position}")

        def die(position: int = position, progress: store.Progress = progress) -> None:
            progress.save(1)
            count = [0]

            def hook(stage: str, target: Path) -> None:
                count[0] += 1
                if count[0] == position:
                    os.kill(os.getpid(), signal.SIGKILL)

            files.fault_hook = hook
            progress.save(2)

        assert in_child(die) == -signal.SIGKILL
        assert progress.load() == 1
        progress.save(3)
        assert progress.load() == 3


def test_a_full_disk_is_named_and_keeps_the_last_state(progress):
    progress.save(1)
    for position in (1, 2, 3):
        files.fault_hook = fail_at(position)
        with pytest.raises(StoreError, match=r"00000002\.state: No space left on device"):
            progress.save(2)
        files.fault_hook = None
        assert states(progress) == ["00000001.state"]
    assert progress.load() == 1


# ----------------------------------------------------------------------------------------------------------- cost


class Time:
    """A clock that only tests move: wall and CPU seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 100.0
        monkeypatch.setattr(store.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(store, "cpu_seconds", lambda: self.cpu)

    def passes(self, wall: float, value: Any = None) -> Any:
        self.wall += wall
        self.cpu += wall / 2
        return value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def fresh(bound: BoundStore) -> BoundStore:
    """The same point of the chain in a later run: its cost starts at zero."""
    return replace(bound, cost=store.Cost())


def test_a_result_costs_what_it_cost_to_make_also_when_it_is_read(bound, clock):
    for run in (bound, fresh(bound)):
        assert run.once("x", lambda: clock.passes(3, "done"), JSON) == "done"
        assert run.once("y", lambda: clock.passes(5, "done"), JSON) == "done"
        assert (run.cost.wall_s, run.cost.cpu_s) == (8, 4)
    assert clock.wall == 108
    assert bound.stored_cost() == (2, 8)
    assert sorted((entry.name, entry.wall_s) for entry in bound.store.entries()) == [("x", 3), ("y", 5)]


def nested(bound: BoundStore, clock: Time, inner: BoundStore | None = None) -> Callable[[], float]:
    def compute() -> float:
        clock.passes(1)
        (inner or bound).once("inner", lambda: clock.passes(10, 0), JSON)
        return clock.passes(2, 0)

    return lambda: bound.once("outer", compute, JSON)


@pytest.mark.parametrize("through_child", [False, True])
def test_a_result_inside_a_result_counts_once(bound, clock, through_child):
    inner = bound.child("below") if through_child else None
    nested(bound, clock, inner)()
    assert (bound.cost.wall_s, bound.cost.cpu_s) == (13, 6.5)
    if inner:
        assert inner.cost.wall_s == 10


@pytest.mark.parametrize("through_child", [False, True])
def test_a_result_inside_a_result_counts_though_it_was_made_earlier(bound, clock, through_child):
    inner = bound.child("below") if through_child else bound
    inner.once("inner", lambda: clock.passes(10, 0), JSON)
    later = fresh(bound)
    nested(later, clock, fresh(inner) if through_child else None)()
    assert (later.cost.wall_s, later.cost.cpu_s) == (13, 6.5)


def test_seconds_of_killed_attempts_are_added_up(bound, clock):
    """Each attempt is interrupted 2 s after its last state, which a kill would lose."""

    def attempt(stop: bool) -> Callable[[], int]:
        def compute() -> int:
            clock.passes(1)
            progress = bound.progress("x")
            done = progress.load() or 0
            bound.once("inner", lambda: clock.passes(100, 0), JSON)
            clock.passes(4)
            progress.save(done + 1)
            clock.passes(2)
            if stop:
                raise KeyboardInterrupt
            return done

        return compute

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            bound.once("x", attempt(True), JSON)
    assert bound.progress("x").spent_before() == (15, 7.5)
    assert bound.cost.wall_s == 0
    run = fresh(bound)
    assert run.once("x", attempt(False), JSON) == 3
    assert (run.cost.wall_s, run.cost.cpu_s) == (15 + 7 + 100, 61)
    assert bound.progress("x").spent_before() == (0, 0)


def test_progress_outside_of_a_result_has_a_clock_of_its_own(bound, clock):
    progress = bound.progress("x")
    clock.passes(3)
    progress.save(1)
    assert progress.spent == (3, 1.5)
    again = bound.progress("x")
    again.load()
    clock.passes(4)
    assert again.spent == (7, 3.5)


def test_waiting_for_another_process_costs_nothing(bound, clock, monkeypatch):
    """What another process made meanwhile counts what it took there."""
    acquire = Store._acquire

    def slow(self: Store, path: Path, wait: bool) -> Any:
        held = acquire(self, path, wait)
        monkeypatch.setattr(Store, "_acquire", acquire)
        monkeypatch.setattr(bound.store, "lock", lambda *_: nullcontext(True))
        bound.once("x", lambda: clock.passes(3, 0), JSON)
        clock.passes(50)
        return held

    monkeypatch.setattr(Store, "_acquire", slow)
    run = fresh(bound)
    run.once("x", Counted(), JSON)
    assert run.cost.wall_s == 3


def burn(seconds: float) -> None:
    stop = time.process_time() + seconds
    while time.process_time() < stop:
        pass


def test_real_seconds_are_measured_those_of_processes_started_as_well(bound):
    def work() -> int:
        burn(0.05)
        time.sleep(0.05)
        return in_child(lambda: burn(0.2))

    bound.once("x", work, JSON)
    assert 0.3 <= bound.cost.wall_s < 10
    assert 0.2 <= bound.cost.cpu_s < 0.5  # the system counts in hundredths


def test_seconds_without_a_fingerprint_count_the_same_way(bound, clock):
    bare = bound.child(object())
    nested(bare, clock)()
    assert bare.cost.wall_s == 13
    assert bare.child("next").cost.wall_s == 0


# --------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("found", ["2", "0.9", "\xff", ""])
def test_a_foreign_format_is_refused(tmp_path, found):
    Store(tmp_path / "store")
    (tmp_path / "store" / "FORMAT").write_text(found)
    with pytest.raises(StoreError, match=rf"has format {found}.*reads {store.FORMAT}|has format "):
        Store(tmp_path / "store")


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    (tmp_path / "entries").mkdir()
    with pytest.raises(StoreError, match=r"other files in it \(thesis\.tex\)"):
        Store(tmp_path)
    assert names(tmp_path) == ["entries", "thesis.tex"]


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="file"):
            Store(path)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refuse(self: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(StoreError, match=f"cannot read the store {tmp_path}: Permission denied"):
        Store(tmp_path)


def test_the_default_store(monkeypatch, store_folder, tmp_path):
    assert Store().path == store_folder
    monkeypatch.delenv("SPARING_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store.default_store_path() == tmp_path / "cache" / "sparing" / "store"


def test_a_store_that_was_moved_still_has_everything(tmp_path):
    bound = Store(tmp_path / "here").bind("data", seed=0)
    bound.once("x", lambda: 5, JSON)
    bound.progress("y").save(6)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = Store(tmp_path / "there").bind("data", seed=0)
    assert moved.once("x", Counted(), JSON) == 5
    assert moved.progress("y").load() == 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_at_any_write_is_named_and_nothing_half_done_stays(bound, number):
    compute = Counted({"a": torch.ones(2)})
    writes = 3 * 3  # the tensors, the entry, the folder: before the write, the sync, the renaming
    for position in range(1, writes + 1):
        files.fault_hook = fail_at(position, number)
        with pytest.raises(StoreError, match=os.strerror(number)):
            bound.once("x", compute, TENSORS)
        assert not bound.has("x")
        assert [path for path in names(bound.store.path) if ".tmp" in path] == []
    files.fault_hook = fail_at(writes + 1)
    bound.once("x", compute, TENSORS)
    assert compute.runs == writes + 1


def test_a_store_that_cannot_be_written_to(bound, read_only, monkeypatch):
    bound.once("x", lambda: 1, JSON)
    with read_only(bound.store.path), pytest.raises(StoreError, match="Read-only file system"):
        bound.once("y", lambda: 1, JSON)
    with read_only(bound.store.path), pytest.raises(StoreError, match="Read-only file system"):
        bound.progress("y").save(1)

    def refuse(self: FileLock, **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(StoreError, match=r"cannot lock .*\.y\.lock: Read-only file system"):
        bound.once("y", lambda: 1, JSON)


# ------------------------------------------------------------------------------------------------ entries, deletion


def test_entries_and_size_count_every_byte_of_results(bound):
    assert list(bound.store.entries()) == []
    bound.once("x", lambda: {"a": torch.zeros(1000)}, TENSORS)
    bound.child("more").once("y", lambda: 1, JSON)
    found = {entry.name: entry for entry in bound.store.entries()}
    assert found.keys() == {"x", "y"}
    assert 4000 < found["x"].bytes < 5000
    assert abs(found["x"].made - time.time()) < 60
    assert found["x"].folder == entry_of(bound)
    everything = sum(path.stat().st_size for path in bound.store.path.rglob("*") if path.is_file())
    assert bound.store.size() == everything
    assert sum(entry.bytes for entry in found.values()) < everything < sum(e.bytes for e in found.values()) + 500


def test_size_tolerates_files_that_vanish_meanwhile(bound, monkeypatch):
    bound.once("x", lambda: 1, JSON)
    before = bound.store.size()
    stat = Path.stat

    def vanishing(self: Path, **more: Any) -> os.stat_result:
        if self.name == "value.json":
            raise FileNotFoundError
        return stat(self, **more)

    monkeypatch.setattr(Path, "stat", vanishing)
    monkeypatch.setattr(Path, "is_file", lambda self: not os.path.isdir(self))
    assert 0 < bound.store.size() < before


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    for item in (path, *path.rglob("*")):
        os.utime(item, (then, then))


def test_prune_deletes_what_is_old_and_nothing_else(bound):
    for name in ("old", "young"):
        bound.once(name, lambda: {"a": torch.zeros(1000)}, TENSORS)
        bound.progress(f"unfinished-{name}").save(torch.zeros(1000))
    age(entry_of(bound, "old"), 11)
    age(bound.progress("unfinished-old").folder, 11)
    before = bound.store.size()
    freed = bound.store.prune(10)
    assert freed == before - bound.store.size() > 8000
    assert [bound.has(name) for name in ("old", "young")] == [False, True]
    assert bound.progress("unfinished-old").load() is None
    assert bound.progress("unfinished-young").load() is not None
    assert bound.store.prune(10) == 0
    assert bound.once("old", Counted(4), JSON) == 4


def test_prune_takes_what_killed_writers_left_aside_however_young(bound):
    bound.once("x", lambda: 1, JSON)
    bound.progress("y").save(1)
    root, key = bound.store.path, bound.key()
    left = [
        root / ".FORMAT.0a1b2c3d.tmp",
        entry_of(bound).with_name(".x.0a1b2c3d.tmp"),
        entry_of(bound).with_name(".never-finished.0a1b2c3d.tmp"),
        root / "progress" / key / "y" / ".00000002.state.0a1b2c3d.tmp",
        root / "progress" / key / "z" / ".00000001.state.0a1b2c3d.tmp",
    ]
    for path in left:
        if "entries" in path.parts:
            (path / "payload").mkdir(parents=True)
            (path / "entry.json").write_text("{}")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text("ha")
    assert [entry.name for entry in bound.store.entries()] == ["x"]
    assert bound.stored_cost()[0] == 1
    assert bound.store.prune(1) > 0
    assert [path for path in left if path.exists()] == []
    assert bound.has("x")
    assert bound.progress("y").load() == 1


def test_making_a_result_takes_what_was_left_of_it_and_nothing_else(bound):
    mine, others = (entry_of(bound).with_name(f".{name}.0a1b2c3d.tmp") for name in ("x", "y"))
    mine.mkdir(parents=True)
    others.mkdir()
    bound.once("x", lambda: 1, JSON)
    assert (mine.exists(), others.exists()) == (False, True)


def test_deletion_leaves_alone_what_a_process_is_making(bound, tmp_path):
    def slow() -> int:
        bound.progress("x").save(1)
        aside = entry_of(bound).with_name(".x.0a1b2c3d.tmp")
        aside.mkdir(parents=True)
        (tmp_path / "started").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.005)
        return int(aside.exists())

    bound.once("z", lambda: 1, JSON)
    child = fork_worker(lambda: bound.once("x", slow, JSON))
    while not (tmp_path / "started").exists():
        time.sleep(0.005)
    bound.store.clear()
    bound.store.prune(0)
    assert not bound.has("z")
    assert bound.progress("x").load() == 1
    (tmp_path / "go").touch()
    assert os.waitpid(child, 0)[1] == 0
    assert bound.once("x", Counted(), JSON) == 1


def test_clear_leaves_an_empty_usable_store(bound):
    bound.once("x", lambda: 1, JSON)
    bound.progress("y").save(1)
    assert bound.store.clear() > 0
    assert list(bound.store.entries()) == []
    assert bound.progress("y").load() is None
    assert Store(bound.store.path).bind("data", seed=0).once("x", lambda: 2, JSON) == 2


@pytest.mark.parametrize("days", [-1, float("nan"), float("inf")])
def test_prune_refuses_senseless_ages(bound, days):
    with pytest.raises(InvalidValue, match=f"older_than_days = {days}"):
        bound.store.prune(days)


def test_entries_are_plain_json(bound):
    bound.once("x", lambda: 1, JSON)
    meta = json.loads((entry_of(bound) / "entry.json").read_text())
    assert meta.keys() == {"name", "wall_s", "cpu_s", "files"}
    assert meta["files"].keys() == {"payload/value.json"}


def test_nothing_is_said_when_all_is_well(bound, caplog):
    caplog.set_level(logging.INFO)
    bound.once("x", lambda: 1, JSON)
    bound.once("x", lambda: 1, JSON)
    assert caplog.text == ""
