"""Clocks that follow forecasts, in files of a temporary folder; and files that cannot be put back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparing.adaptive.clock_files import Clock, ClockNotSettable
from sparing.adaptive.confidence import ConfidenceRule
from sparing.adaptive.dvfs import DVFSGovernor, EnergyModel
from sparing.adaptive.exit_cost import CostModel
from sparing.adaptive.exit_predictor import EarlyExitPredictor, staged
from sparing.adaptive.exits import attach_exits
from sparing.adaptive.forecast import ExitPredictor
from sparing.adaptive.pacing import Paced
from sparing.adaptive.policies import EveryExitPolicy, PlacedExitPolicy, PredictiveExitPolicy
from sparing.core.errors import InvalidValue
from sparing.models.convnet import ConvNet
from sparing.testing import tiny_task

LEVELS = tuple(range(100, 1001, 100))
GOVERNOR = DVFSGovernor(tuple(map(float, LEVELS)), floor=None)
ENERGY = EnergyModel(GOVERNOR, t_switch=0.0)


@pytest.fixture(scope="module")
def predictor() -> EarlyExitPredictor:
    """Six exits, each asked for one jump ahead; layers of equal cost."""
    torch.manual_seed(0)
    task = tiny_task()
    channels, size = task.example_input(2)[0].shape[1:3]
    net = ConvNet(channels, len(task.labels) or 2, size, widths=[4, 4], depths=[3, 3]).eval()
    model = attach_exits(net, example=task.example_input(2), codewords=4).eval()
    exits = len(model.exits)
    cost = CostModel((100.0,) * exits + (100.0,), (1.0,) * exits)
    policy = PredictiveExitPolicy(1, ExitPredictor(ConfidenceRule.softmax(0.999), max_round=2), single_jump=False)
    return EarlyExitPredictor(*staged(model, task), policy, cost, task)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scaling_setspeed"
    path.write_text("300")
    return path


def image(seed: int = 0) -> np.ndarray:
    shape = tiny_task().example_input(1)[0].shape[1:]
    return np.random.RandomState(seed).randn(1, *shape).astype(np.float32)


def test_the_clock_follows_the_forecasts_and_is_put_back(predictor: EarlyExitPredictor, file: Path) -> None:
    logits, trace = predictor.trace(image())
    asked = np.flatnonzero(trace.jumps[0])
    assert len(asked) > 1, "a first forecast and one after it failed"
    with Paced(predictor, Clock((file,), LEVELS, write=True), ENERGY) as paced:
        np.testing.assert_array_equal(paced(image()), logits)
        assert file.read_text() == "1000", "full clock after each sample"
        target = asked[1]
        cost = predictor.cost
        left = ENERGY.spent(cost.full, 9)[0] - ENERGY.spent(sum(cost.layer_macs[:1]) + cost.exit_macs[0], 9)[0]
        level = ENERGY.level(0, int(target), left, cost)
        assert level < 9
        assert [value for _, value in paced.clock.log] == [1000, LEVELS[level], 1000]
        paced(image(1))
    assert file.read_text() == "300"
    assert predictor.policy.to_config()["kind"] == "predictive", "the predictor itself is as it was"


def test_the_levels_are_those_of_the_simulation(predictor: EarlyExitPredictor, file: Path) -> None:
    switches = 0.0
    with Paced(predictor, Clock((file,), LEVELS), ENERGY) as paced:
        for seed in range(5):
            paced(image(seed))
            switches += ENERGY.simulate(predictor.trace(image(seed))[1], predictor.cost).switches
        assert len(paced.clock.log) == 1 + switches
    assert file.read_text() == "300", "a dry clock writes nothing"


def test_refusals(predictor: EarlyExitPredictor, file: Path) -> None:
    with pytest.raises(InvalidValue, match="are not the governor's"):
        Paced(predictor, Clock((file,), (1, 2)), ENERGY)
    paced = Paced(predictor, Clock((file,), LEVELS), ENERGY)
    with pytest.raises(InvalidValue, match="with Paced"):
        paced(image())
    with paced, pytest.raises(InvalidValue, match="a batch of 2"):
        paced(np.concatenate([image(), image()]))
    assert paced.clock.level == -1


def test_a_clock_is_set_again_when_entered_again(file: Path) -> None:
    clock = Clock((file,), LEVELS, write=True)
    for _ in range(2):
        with clock:
            assert file.read_text() == "1000"
        assert file.read_text() == "300"


def test_one_file_that_cannot_be_put_back_does_not_keep_the_other(tmp_path: Path) -> None:
    files = tmp_path / "min_freq", tmp_path / "max_freq"
    for path, value in zip(files, ("200", "300"), strict=True):
        path.write_text(value)
    clock = Clock(files, LEVELS, write=True)
    clock.__enter__()
    files[0].unlink()
    files[0].mkdir()
    with pytest.raises(ClockNotSettable, match="min_freq: cannot write 200"):
        clock.__exit__(None, None, None)
    assert files[1].read_text() == "300"


def test_thresholds_of_another_number_of_exits_are_refused_everywhere() -> None:
    rule = ConfidenceRule.activation(np.ones(3), 2.0)
    table = np.zeros((2, 6, 2))
    for policy in (EveryExitPolicy(rule), PlacedExitPolicy(rule, (0,)), PredictiveExitPolicy(1, ExitPredictor(rule))):
        with pytest.raises(InvalidValue, match="thresholds of 3 exits; the network has 5"):
            policy.run(table)


def test_a_jump_cut_at_the_last_exit_gets_the_clock_of_where_it_leads() -> None:
    rule = ConfidenceRule.activation(np.ones(4), 10.0)
    logits = np.zeros((1, 5, 2))
    logits[0, 3, 0] = 11.0
    trace = PredictiveExitPolicy(1, ExitPredictor(rule)).run(logits)
    assert (trace.exit_index[0], trace.jumps[0, 0]) == (3, 8)
    cost = CostModel((100.0, 100.0, 100.0, 100.0, 400.0), (0.0,) * 4)
    found = replace(ENERGY).simulate(trace, cost)
    assert found.switches == 2
    assert found.seconds <= found.deadline
    assert found.joules < found.full_clock_joules
