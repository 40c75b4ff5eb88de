"""Rules, forecasts and policies on tables of logits; calibration."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.adaptive.calibration import (
    FAMILIES,
    activation_rules,
    calibrate,
    candidates,
    entropy_rules,
    greedy_exits,
    softmax_rules,
    worthwhile_exits,
)
from sparing.adaptive.confidence import ConfidenceRule, activation_thresholds
from sparing.adaptive.exit_cost import CostModel, placement_scores, sdn_exits
from sparing.adaptive.forecast import ExitPredictor, convolved, first_passing, fit_isotonic, fit_kernel
from sparing.adaptive.policies import (
    EveryExitPolicy,
    ExitTrace,
    FullNetworkPolicy,
    OraclePolicy,
    PlacedExitPolicy,
    Policy,
    PredictiveExitPolicy,
    policy_from,
)
from sparing.core.errors import CorruptFile, InvalidValue


def table(samples: int = 60, exits: int = 6, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(logits that grow surer and righter from exit to exit, labels)."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, classes, samples)
    ease = rng.rand(samples, 1) * 2
    growth = np.linspace(0.2, 3, exits + 1)[None] * ease
    logits = rng.randn(samples, exits + 1, classes) * 0.7
    logits[np.arange(samples)[:, None], np.arange(exits + 1)[None], labels[:, None]] += 2 * growth
    return logits.astype(np.float32), labels


COST = CostModel((10.0,) * 6 + (1.0,), (1.0,) * 6, 0.1)


def policies(logits: np.ndarray) -> list[Policy]:
    rule = ConfidenceRule.softmax(0.9)
    activation = ConfidenceRule.activation(activation_thresholds(logits[:, :-1]) + 0.1, 8)
    return [
        FullNetworkPolicy(),
        EveryExitPolicy(rule),
        EveryExitPolicy(ConfidenceRule.entropy(0.3)),
        EveryExitPolicy(ConfidenceRule.patience(2)),
        EveryExitPolicy(activation),
        PlacedExitPolicy(rule, (1, 4)),
        PlacedExitPolicy(ConfidenceRule.patience(2), (0, 2, 4)),
        PredictiveExitPolicy(1, ExitPredictor(rule)),
        PredictiveExitPolicy(2, ExitPredictor(rule, max_round=2)),
        PredictiveExitPolicy(3, ExitPredictor(rule), single_jump=True),
        PredictiveExitPolicy(1, ExitPredictor(rule, (0.2, 1.0, 0.1), history=3)),
        PredictiveExitPolicy(2, ExitPredictor(activation)),
        PredictiveExitPolicy(1, ExitPredictor(ConfidenceRule.entropy(0.3))),
        PredictiveExitPolicy(1, fit_isotonic(logits, rule)),
    ]


@pytest.mark.parametrize("index", range(14))
def test_a_batch_is_decided_as_its_samples_are_alone(index: int) -> None:
    logits, _ = table()
    policy = policies(logits)[index]
    whole = policy.run(logits)
    for s in range(len(logits)):
        one = policy.run(logits[s : s + 1])
        assert one.exit_index[0] == whole.exit_index[s]
        np.testing.assert_array_equal(one.evaluated[0], whole.evaluated[s])
        np.testing.assert_array_equal(one.jumps[0], whole.jumps[s])
    again = policy_from(json.loads(json.dumps(policy.to_config())))
    assert again == policy


def by_hand(row: np.ndarray, start: int, beta: float, single: bool) -> tuple[int, int, int]:
    """Section 5's loop for one sample with the softmax rule, written down once more."""
    exits = len(row) - 1
    target, evaluations, predictions = start, 0, 0

    def best(z: np.ndarray) -> float:
        return float(np.exp(z - z.max()).max() / np.exp(z - z.max()).sum())

    for i in range(1, exits + 1):
        if i != target:
            continue
        z = row[i - 1].astype(np.float64)
        evaluations += 1
        if best(z) >= beta or (single and predictions):
            return i - 1, evaluations, predictions
        if i < exits:
            rounds = exits - i + 1 if single else min(8, exits - i + 1)
            jump = rounds
            for r in range(1, rounds):
                z = convolved(z, (1.0, 1.0, 1.0))
                if best(z) > beta:
                    jump = r
                    break
            predictions += 1
            target = min(i + jump, exits + 1)
    return exits, evaluations, predictions


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 12), st.floats(0.3, 0.99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_loop_is_the_one_on_the_sheet(seed: int, exits: int, start: int, beta: float, single: bool) -> None:
    logits, _ = table(5, exits, 4, seed)
    start = min(start, exits)
    trace = PredictiveExitPolicy(start, ExitPredictor(ConfidenceRule.softmax(beta)), single).run(logits)
    for s, row in enumerate(logits):
        expected = by_hand(row, start, beta, single)
        assert (trace.exit_index[s], trace.n_exit_evals[s], trace.n_predictions[s]) == expected


def test_the_first_exit_divides_by_beta_times_t() -> None:
    """The reference's first exit computes max/β·t, which is another number."""
    rule = ConfidenceRule.activation(np.array([2.0, 2.0]), 3.0)
    logits = np.array([[5.0, 0.0]])
    assert rule.ratio(logits, 0)[0] == pytest.approx(5 / 6)
    assert not rule.passes(logits, 0)[0]


def test_oracles_and_costs() -> None:
    logits, labels = table(400)
    rule = ConfidenceRule.softmax(0.9)
    every, perfect = EveryExitPolicy(rule).run(logits), OraclePolicy(rule).run(logits)
    np.testing.assert_array_equal(every.exit_index, perfect.exit_index)
    assert perfect.n_exit_evals.max() == 1
    right = OraclePolicy(rule).run(logits, labels)
    some = (logits[:, :-1].argmax(-1) == labels[:, None]).any(1)
    np.testing.assert_array_equal(right.exit_index < 6, some)
    assert (right.answers(logits) == labels).mean() >= (perfect.answers(logits) == labels).mean()
    predictive = PredictiveExitPolicy(1, ExitPredictor(rule)).run(logits)
    means = [float(COST.per_sample(trace).mean()) for trace in (perfect, predictive, every)]
    assert means[0] < min(means[1:])
    assert predictive.n_exit_evals.mean() < every.n_exit_evals.mean()
    one = ExitTrace(np.array([2]), np.array([[1, 0, 1, 0, 0, 0]], bool), np.array([[2, 0, 0, 0, 0, 0]]))
    assert COST.per_sample(one)[0] == pytest.approx(3 * 10 + 2 * 1 + 2 * 0.1)
    full = FullNetworkPolicy().run(logits)
    assert (COST.per_sample(full) == COST.full).all()
    assert (first_passing(logits, rule) == every.exit_index).all()


def test_patience_counts_exits_that_agree() -> None:
    row = np.array([[[1.0, 0], [0, 1], [0, 1], [0, 1], [1, 0]]])
    assert EveryExitPolicy(ConfidenceRule.patience(1)).run(row).exit_index[0] == 0
    assert EveryExitPolicy(ConfidenceRule.patience(2)).run(row).exit_index[0] == 2
    assert EveryExitPolicy(ConfidenceRule.patience(3)).run(row).exit_index[0] == 3
    assert EveryExitPolicy(ConfidenceRule.patience(4)).run(row).exit_index[0] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_takes_the_cheapest_that_is_accurate(family: str) -> None:
    logits, labels = table(500, seed=1)
    logits[0, :-1] += 0.5  # t_i away from 0
    found = calibrate(family, logits, labels, COST, max_loss=0.02, caution=0)  # type: ignore[arg-type]
    assert found.spent == found.macs
    trace = found.policy.run(logits)
    accuracy = (trace.answers(logits) == labels).mean()
    assert accuracy == pytest.approx(found.accuracy)
    assert accuracy >= found.full_accuracy - 0.02
    assert float(COST.per_sample(trace).mean()) == pytest.approx(found.macs)
    assert found.macs < COST.full or family == "passalis"
    if family not in ("placed", "patience"):
        for policy in candidates(family, logits, COST):  # type: ignore[arg-type]
            other = policy.run(logits)
            fine = (other.answers(logits) == labels).mean() >= found.full_accuracy - 0.02
            assert not fine or COST.per_sample(other).mean() >= found.macs - 1e-9


def test_caution_counts_the_error_of_a_loss() -> None:
    logits, labels = table(500, seed=1)
    bold, careful = (calibrate("predictive", logits, labels, COST, max_loss=0.02, caution=c) for c in (0.0, 2.0))
    assert bold.macs < careful.macs
    right = [c.policy.run(logits).answers(logits) == labels for c in (bold, careful)]
    full = logits[:, -1].argmax(axis=-1) == labels
    bounds = [full.mean() - r.mean() + 2 * np.std(full.astype(float) - r) / np.sqrt(500) for r in right]
    assert bounds[0] > 0.02 >= bounds[1] - 1e-9
    with pytest.raises(InvalidValue, match=r"caution = -1"):
        calibrate("predictive", logits, labels, COST, caution=-1.0)


@pytest.mark.parametrize("family", ["predictive", "placed"])
def test_calibration_for_another_objective(family: str) -> None:
    logits, labels = table(500, seed=1)
    dear = replace(COST, exit_macs=(9.0,) * COST.exits)

    def asked(trace: ExitTrace) -> float:
        return float(dear.per_sample(trace).mean())

    by_macs = calibrate(family, logits, labels, COST, max_loss=0.05)  # type: ignore[arg-type]
    by_other = calibrate(family, logits, labels, COST, max_loss=0.05, objective=asked)  # type: ignore[arg-type]
    assert by_other.spent == asked(by_other.policy.run(logits)) <= asked(by_macs.policy.run(logits))
    assert by_other.macs >= by_macs.macs == by_macs.spent


def test_a_cost_of_some_exits_alone() -> None:
    cost = CostModel((1.0, 2.0, 4.0, 8.0), (0.1, 0.2, 0.3), 0.01)
    assert cost.of_exits((0, 2)) == CostModel((1.0, 6.0, 8.0), (0.1, 0.3), 0.01)
    assert cost.of_exits((0, 1, 2)) == cost
    for wrong in ((), (1, 0), (0, 3), (-1,), (1, 1)):
        with pytest.raises(InvalidValue, match=r"exits = .*0…2"):
            cost.of_exits(wrong)


def test_exits_that_do_not_pay_are_left_out() -> None:
    logits, labels = table(500, seed=1)
    cost = replace(COST, exit_macs=(1.0, 60.0, 1.0, 60.0, 1.0, 60.0))
    kept = worthwhile_exits("predictive", logits, labels, cost, max_loss=0.05)
    assert set(kept) <= {0, 2, 4}
    heads = [*kept, cost.exits]
    few = calibrate("predictive", logits[:, heads], labels, cost.of_exits(kept), max_loss=0.05)
    assert few.macs < calibrate("predictive", logits, labels, cost, max_loss=0.05).macs
    by_other = worthwhile_exits("predictive", logits, labels, COST, objective=cost.objective, max_loss=0.05)
    assert by_other == kept


def test_calibration_keeps_the_network_when_nothing_will_do() -> None:
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 3, 200)
    logits = rng.randn(200, 5, 3) * 9
    logits[:, -1] = np.eye(3)[labels] * 9
    cost = CostModel((1.0,) * 5, (0.5,) * 4)
    assert calibrate("every", logits, labels, cost, max_loss=0).policy == FullNetworkPolicy()
    assert greedy_exits(logits, labels, cost, 1.0).policy == FullNetworkPolicy()


def test_grids() -> None:
    logits, _ = table()
    betas = [rule.threshold for rule in softmax_rules()]
    assert len(betas) == 25
    assert (betas[0], betas[-1]) == (pytest.approx(0.5), pytest.approx(0.999))
    assert betas == sorted(betas)
    assert [r.threshold for r in entropy_rules(logits)] == sorted(
        (r.threshold for r in entropy_rules(logits)), reverse=True
    )
    t = np.full(6, 0.5)
    assert [r.threshold for r in activation_rules(logits, t)] == sorted(
        r.threshold for r in activation_rules(logits, t)
    )


def test_sdn_exits_and_placement() -> None:
    assert sdn_exits(CostModel((1.0,) * 20, (0.1,) * 19)) == (2, 5, 8, 11, 14, 17)
    score = placement_scores([1, 2, 3], [0.5, 0.5], [0.2, 0.6])
    np.testing.assert_allclose(score, [0.3 * 2 - 0.8 * 0.5 - 0.5, -0.1 * 3 - 0.4 * 0.5 - 0.5 * 2])


def test_a_learned_kernel_follows_what_it_was_made_with() -> None:
    rng = np.random.RandomState(0)
    first = rng.randn(50, 1, 8)
    rows = [first]
    for _ in range(3):
        rows.append(convolved(rows[-1], (0.1, 0.9, 0.3)))
    np.testing.assert_allclose(fit_kernel(np.concatenate(rows, axis=1)), (0.1, 0.9, 0.3), atol=1e-10)


def test_isotonic_jumps_fall_with_confidence() -> None:
    logits, _ = table(500)
    predictor = fit_isotonic(logits, ConfidenceRule.softmax(0.95))
    sure = np.linspace(0, 3, 7)[:, None] * np.eye(4)[0][None]
    jumps = predictor.predict(sure, 1, 6)
    assert (np.diff(jumps) <= 0).all()
    assert 1 <= jumps.min() <= jumps.max() <= 6


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ConfidenceRule.softmax(1.0), "beta = 1"),
        (lambda: ConfidenceRule.softmax(0.0), "= 0.0"),
        (lambda: ConfidenceRule.activation(np.array([1.0, 0.0]), 3), "exit 2 is 0"),
        (lambda: ConfidenceRule.activation(np.array([np.nan]), 3), "exit 1 is nan"),
        (lambda: ConfidenceRule.activation(np.array([1.0]), -1), "-1"),
        (lambda: ConfidenceRule.patience(1.5), "1.5"),  # type: ignore[arg-type]
        (lambda: ExitPredictor(ConfidenceRule.softmax(0.9), (1.0, 1.0)), "odd number"),
        (lambda: ExitPredictor(ConfidenceRule.softmax(0.9), max_round=0), "max_round = 0"),
        (lambda: ExitPredictor(ConfidenceRule.patience(2)), "patience rule cannot be forecast"),
        (lambda: PredictiveExitPolicy(0, ExitPredictor(ConfidenceRule.softmax(0.9))), "start = 0"),
        (lambda: PredictiveExitPolicy(7, ExitPredictor(ConfidenceRule.softmax(0.9))).run(table()[0]), "start = 7.*1…6"),
        (lambda: PlacedExitPolicy(ConfidenceRule.softmax(0.9), (2, 1)), r"\[2, 1\]"),
        (lambda: PlacedExitPolicy(ConfidenceRule.softmax(0.9), (9,)).run(table()[0]), "0…5"),
        (lambda: EveryExitPolicy(ConfidenceRule.softmax(0.9)).run(np.zeros((3, 4, 1))), "1 class"),
        (lambda: EveryExitPolicy(ConfidenceRule.softmax(0.9)).run(np.full((3, 4, 2), np.nan)), r"\[0, 0, 0\] is nan"),
        (lambda: CostModel((1.0,), (1.0,)), "1 layer costs for 1 exits"),
        (lambda: CostModel((1.0, -1.0), (1.0,)), "negative"),
        (lambda: calibrate("every", table()[0], np.zeros(3, int), COST), "3 labels for 60"),
        (lambda: calibrate("most", table()[0], table()[1], COST), "'most'"),  # type: ignore[arg-type]
    ],
)
def test_refusals_name_the_value(make: object, named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("config", [{}, {"kind": "every"}, {"kind": "everyone"}, {"kind": "placed", "rule": 3}])
def test_a_spoilt_policy_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(CorruptFile, match="policy"):
        policy_from(config)
