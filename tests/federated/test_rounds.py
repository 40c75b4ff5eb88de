"""The server's side of a fleet: drawing, checking, averaging, counting, and going on after a kill."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from federated.fleets import END, ENDING, plan, same, unclocked, weights
from sparing.core import files
from sparing.core.errors import InvalidValue
from sparing.core.store import Progress
from sparing.federated.clients import Update
from sparing.federated.rounds import (
    FolderShelf,
    NoUpdate,
    average,
    checked,
    pack,
    run_federated,
    sampled,
    unpack,
)


def test_the_average_weighs_by_examples_and_rounds_integers() -> None:
    one, other = weights(), weights()
    one["layer.weight"] += 1.0
    one["seen"] += 1
    other["seen"] += 2
    updates = [Update(one, 30, {}), Update(other, 10, {})]
    mean = average(updates)
    assert torch.equal(mean["layer.weight"], torch.full((4, 3), 0.75))
    assert mean["layer.weight"].dtype == torch.float32
    assert mean["seen"].item() == 1
    assert mean["seen"].dtype == torch.int64
    assert torch.equal(average(updates, "equal")["layer.weight"], torch.full((4, 3), 0.5))
    with pytest.raises(NoUpdate, match="no update"):
        average([])


def test_a_fraction_of_the_clients_is_drawn_anew_each_round() -> None:
    drawn = [sampled(plan(clients=30, fraction=0.1), number) for number in range(20)]
    assert all(len(set(each)) == 3 and list(each) == sorted(each) for each in drawn)
    assert len(set(drawn)) > 10
    assert drawn == [sampled(plan(clients=30, fraction=0.1), number) for number in range(20)]
    assert sampled(plan(fraction=0.34), 0) != sampled(plan(fraction=0.01), 0)  # two of three, and one of three
    assert sampled(plan(), 3) == (0, 1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fraction": 0.0},
        {"clients": 0},
        {"rounds_per_task": 0},
        {"blocks": ()},
        {"weights": {}},
        {"weighting": "size"},
        {"time_limit": 0.0},
        {"orders": ((0, 1),)},
        {"orders": ((0, 0), (0, 1), (0, 1))},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_senseless_plan_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidValue, match=next(iter(wrong))):
        plan(**wrong)


def test_a_run_counts_rounds_bytes_and_metrics() -> None:
    ends = []

    def note(t: int, *_: object) -> int:
        ends.append(t)
        return t

    result = run_federated(plan(), on_task_end=note)
    assert [report.round for report in result.rounds] == [0, 1, 2, 3]
    assert result.figures == (0, 1)
    assert ends == [0, 1]
    # shares 10, 20, 30 of 60: (1·1 + 2·2 + 3·3)/6 = 2.33 a round, rounded each time
    assert result.weights["seen"].item() == 8
    shared = sum(tensor.nbytes for tensor in weights().values())
    for report in result.rounds:
        assert report.averaged == report.asked == (0, 1, 2)
        assert not report.dropped
        assert 3 * shared < report.bytes_down < 3 * (shared + 600)
        assert 3 * shared < report.bytes_up < 3 * (shared + 700)
        assert {found["steps"] for found in report.metrics.values()} == {1.0}
    assert result.total("steps") == 12.0
    assert [report.metrics[0]["ended"] for report in result.rounds] == [0.0, 0.0, 1.0, 1.0]
    assert same(result.weights, run_federated(plan()).weights)
    assert not same(result.weights, run_federated(plan(seed=6)).weights)


def test_each_client_may_meet_the_tasks_in_its_own_order() -> None:
    own = plan(orders=((1, 0), (0, 1), (1, 0)))
    assert own.stream(0, 0)[1] == range(2, 4)
    assert own.stream(1, 0)[1] == range(2)
    assert own.stream(2, 0)[0].tolist() == [12.0] * 3
    assert not same(run_federated(own).weights, run_federated(plan()).weights)


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("raise", "raised", "ArithmeticError: no more battery"),
        ("nan", "not finite", "layer.bias"),
        ("shape", "wrong shape", "layer.bias has shape [5], not [4]"),
        ("key", "wrong shape", "layer.bias is missing"),
        ("dtype", "wrong shape", "layer.bias is torch.float64"),
        ("nan examples", "wrong shape", "it counts nan examples"),
        ("numpy examples", "wrong shape", "TypeError: Object of type int64 is not JSON serializable"),
        ("list of weights", "wrong shape", "AttributeError: 'list' object has no attribute 'items'"),
        ("sparse", "wrong shape", "RuntimeError: "),
        ("no metric", "wrong shape", "error: required argument is not a float"),
        ("nan metric", "not finite", "the metric steps = nan"),
    ],
)
def test_a_client_that_fails_is_left_out_with_its_reason_and_the_run_goes_on(
    fault: str, reason: str, detail: str
) -> None:
    result = run_federated(plan({1: {1: fault}}))
    report = result.rounds[1]
    assert report.averaged == (0, 2)
    assert [(each.client, each.reason) for each in report.dropped] == [(1, reason)]
    assert detail in report.dropped[0].detail
    assert result.dropped == {reason: 1}
    assert all(each.averaged == (0, 1, 2) for each in (result.rounds[0], *result.rounds[2:]))
    # the round never happened for that client: however it failed, it goes on from the state before
    assert same(result.weights, run_federated(plan({1: {1: "raise"}})).weights)
    assert not same(result.weights, run_federated(plan()).weights)


def test_a_client_over_the_time_limit_is_left_out() -> None:
    result = run_federated(plan({0: {0: "slow"}}, time_limit=2.0, rounds_per_task=1))
    assert result.dropped == {"slow": 1}
    assert "the limit is 2 s" in result.rounds[0].dropped[0].detail


def test_a_round_in_which_nobody_answers_rightly_is_an_error() -> None:
    with pytest.raises(NoUpdate, match=r"round 2 \(task 1\): none of 3 clients .*client 1 not finite \(layer.bias"):
        run_federated(plan({0: {2: "raise"}, 1: {2: "nan"}, 2: {2: "shape"}}))


def test_clients_that_share_nothing_keep_their_own_weights_and_send_none() -> None:
    result = run_federated(plan({client: {-1: "local"} for client in range(3)}))
    assert same(result.weights, weights())
    assert sorted(result.local) == [0, 1, 2]
    assert not same(result.local[0], result.local[1])
    # weights go to a client once; up they go in every round, since the figures are taken from them
    size = sum(tensor.nbytes for tensor in weights().values())
    down, up = [each.bytes_down for each in result.rounds], [each.bytes_up for each in result.rounds]
    assert down[0] > 3 * size
    assert max(down[1:]) < down[0] - 3 * size
    assert min(up) > 3 * size


def test_a_client_is_told_the_classes_of_tasks_in_which_it_was_not_asked() -> None:
    result = run_federated(plan(fraction=0.3, rounds_per_task=1, seed=1))
    first, second = result.rounds
    assert first.asked != second.asked
    assert second.metrics[second.asked[0]]["blocks"] == 4.0


def test_what_goes_wrong_at_the_end_is_counted() -> None:
    result = run_federated(plan({1: {END: "raise"}}, blocks=(range(0, 2),)))
    assert not any(report.dropped for report in result.rounds)
    assert result.dropped == {"raised": 1}
    assert "no more battery" in result.end.dropped[0].detail


def test_the_clients_clocks_run_over_the_whole_order_and_the_end() -> None:
    result = run_federated(plan())
    assert all(found["seconds"] >= ENDING for found in result.rounds[2].metrics.values())  # the first task ends there
    assert all(found["seconds"] >= ENDING for found in result.end.metrics.values())
    assert result.total("seconds") >= 6 * ENDING
    assert all(found["cpu_s"] >= 0 and found["peak_bytes"] > 0 for found in result.end.metrics.values())


@pytest.mark.parametrize("lost", ["newest", "all", "damaged"])
def test_a_client_that_lost_its_state_goes_on_from_an_older_one_or_anew(tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "progress" / "clients" / "1"

    def lose(t: int, *_: object) -> int:
        kept = sorted(folder.glob("*.safetensors"))
        if t == 0:
            assert len(kept) == 2
            for path in kept if lost == "all" else kept[-1:]:
                if lost == "damaged":
                    path.write_bytes(path.read_bytes()[:-3])
                else:
                    path.unlink()
        return t

    result = run_federated(plan(), keeper=Progress(tmp_path / "progress"), on_task_end=lose)
    assert all(report.averaged == (0, 1, 2) for report in result.rounds)
    told = [[client for client, found in each.metrics.items() if "state_lost" in found] for each in result.rounds]
    assert told == [[], [], [1], []]
    assert result.total("state_lost") == 1.0
    # it ends the first task where it has a state from there
    assert result.rounds[2].metrics[1]["ended"] == (0.0 if lost == "all" else 1.0)


def test_updates_are_checked_before_they_count() -> None:
    assert checked(Update(weights(), 1, {}), weights()) is None
    assert checked(Update(weights(), 1, {"steps": 2, "loss": 0.5}), weights()) is None


@pytest.mark.parametrize("examples", [0, -3, math.nan, 1.0, "many", True, None, 2**60], ids=str)
def test_an_update_counts_a_whole_number_of_examples(examples: object) -> None:
    reason, detail = checked(Update(weights(), examples, {}), weights())
    assert reason == "wrong shape"
    assert detail.endswith("examples: a whole number ≥ 1 is needed")


@pytest.mark.parametrize(
    ("metric", "fault"),
    [
        (math.nan, ("not finite", "the metric loss = nan")),
        (math.inf, ("not finite", "the metric loss = inf")),
        ([1.0], ("wrong shape", "the metric loss = [1.0]: a number is needed")),
        (True, ("wrong shape", "the metric loss = True: a number is needed")),
    ],
    ids=str,
)
def test_metrics_are_finite_numbers(metric: object, fault: tuple[str, str]) -> None:
    assert checked(Update(weights(), 1, {"loss": metric}), weights()) == fault


def test_a_message_survives_as_bytes_and_a_broken_one_is_refused() -> None:
    sent = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    facts, found = unpack(pack({"round": 3}, sent))
    assert facts == {"round": 3}
    assert same(found, sent)
    for broken in (b"", b"\x03", pack({}, sent)[:-5]):
        with pytest.raises(files.CorruptFile, match="cannot be read"):
            unpack(broken)


def test_a_client_keeps_the_states_the_server_may_ask_for(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path)
    for number, since in [(0, -1), (1, 0), (2, 1), (3, 1), (5, 3)]:
        shelf.keep(number, {"x": torch.tensor(number)}, since)
    assert shelf.rounds() == [1, 3, 5]
    assert shelf.get(3)["x"].item() == 3


@pytest.mark.parametrize("moment", [1, 5, 8, 13, 22, 40, 44], ids=lambda moment: f"write-{moment}")
def test_a_run_killed_between_or_within_rounds_ends_with_the_same_bits(tmp_path: Path, moment: int) -> None:
    faults = {2: {1: "nan"}}
    whole = run_federated(plan(faults, fraction=0.6))
    if (child := os.fork()) == 0:
        seen = 0

        def kill(stage: str, target: Path) -> None:
            nonlocal seen
            seen += stage == "rename"
            if seen == moment // 3 + 1:
                os.kill(os.getpid(), signal.SIGKILL)

        torch.set_num_threads(1)
        files.fault_hook = kill
        run_federated(plan(faults, fraction=0.6), keeper=Progress(tmp_path / "progress"))
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    result = run_federated(plan(faults, fraction=0.6), keeper=Progress(tmp_path / "progress"))
    assert same(result.weights, whole.weights)
    assert [(each.asked, each.averaged, each.bytes_up) for each in result.rounds] == [
        (each.asked, each.averaged, each.bytes_up) for each in whole.rounds
    ]
    assert unclocked(result.end.metrics) == unclocked(whole.end.metrics)


def test_a_run_goes_on_from_the_state_before_when_the_last_is_damaged(tmp_path: Path) -> None:
    short = Progress(tmp_path / "progress")
    whole = run_federated(plan())

    class Stop(Exception):
        pass

    def stop(t: int, *_: object) -> int:
        if t == 1:
            raise Stop
        return t

    with pytest.raises(Stop):
        run_federated(plan(), keeper=short, on_task_end=stop)
    newest = max((tmp_path / "progress").glob("*.state"))
    newest.write_bytes(newest.read_bytes()[:-9])
    again = run_federated(plan(), keeper=Progress(tmp_path / "progress"), on_task_end=lambda t, *_: t)
    assert same(again.weights, whole.weights)
    assert again.figures == (0, 1)
