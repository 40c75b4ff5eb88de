"""Gaps between groups, beside counts by hand, scikit-learn and fairlearn; thresholds beside fairlearn's."""

from __future__ import annotations

import numpy as np
import pytest
from fairlearn.metrics import demographic_parity_difference, equal_opportunity_difference
from fairlearn.postprocessing import ThresholdOptimizer
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import confusion_matrix, recall_score

from sparing.core.errors import InvalidValue
from sparing.core.fairness import GroupThresholds, delta_eo, delta_sp, group_masks, rate_by_group

PREDICTED = np.array([1, 1, 0, 0, 1, 0, 0, 0])
LABELS = np.array([1, 0, 1, 0, 1, 1, 1, 0])
SENS = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def test_gaps_counted_by_hand():
    assert delta_sp(PREDICTED, SENS) == pytest.approx(2 / 4 - 1 / 4)
    assert delta_eo(PREDICTED, LABELS, SENS) == pytest.approx(1 / 2 - 1 / 3)
    assert rate_by_group(PREDICTED == LABELS, SENS) == pytest.approx((2 / 4, 2 / 4))


def test_another_class_may_stand_for_the_positive():
    assert delta_sp(2 * PREDICTED, SENS, positive=2) == delta_sp(PREDICTED, SENS)
    assert delta_eo(2 * PREDICTED, 2 * LABELS, SENS, positive=2) == delta_eo(PREDICTED, LABELS, SENS)


def test_named_groups_leave_the_others_out():
    sens = np.array([5, 5, 5, 5, 9, 9, 9, 9, 7])
    assert delta_sp(np.append(PREDICTED, 1), sens, groups=(5, 9)) == delta_sp(PREDICTED, SENS)
    words = np.array(["a", "b"])[SENS]
    assert delta_eo(PREDICTED, LABELS, words, groups=("b", "a")) == delta_eo(PREDICTED, LABELS, SENS)
    first, second = group_masks(sens, (9, 5))
    assert (first.sum(), second.sum()) == (4, 4)
    assert not (first & second).any()


units = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)), min_size=4, max_size=60)


@given(units)
def test_gaps_are_those_of_confusion_matrices(rows: list[tuple[int, int, int]]):
    predicted, labels, sens = np.array(rows).T
    assume(all(((sens == group) & (labels == 1)).any() for group in (0, 1)))
    tables = [confusion_matrix(labels[sens == g], predicted[sens == g], labels=[0, 1]) for g in (0, 1)]
    shares = [table[:, 1].sum() / table.sum() for table in tables]
    recalls = [recall_score(labels[sens == g], predicted[sens == g]) for g in (0, 1)]
    assert delta_sp(predicted, sens) == pytest.approx(abs(shares[0] - shares[1]))
    assert delta_eo(predicted, labels, sens) == pytest.approx(abs(recalls[0] - recalls[1]))
    theirs = demographic_parity_difference(labels, predicted, sensitive_features=sens)
    assert delta_sp(predicted, sens) == pytest.approx(theirs)
    theirs = equal_opportunity_difference(labels, predicted, sensitive_features=sens)
    assert delta_eo(predicted, labels, sens) == pytest.approx(theirs)
    assert delta_sp(predicted, 1 - sens) == delta_sp(predicted, sens)
    assert 0 <= delta_sp(predicted, sens) <= 1
    assert delta_sp(np.ones_like(predicted), sens) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delta_sp(PREDICTED, SENS + 1), r"values \[1, 2\]; 0 and 1 are expected, or groups"),
        (lambda: delta_sp(PREDICTED, np.zeros(8, int)), "group 1 of the sensitive attribute holds no unit"),
        (lambda: delta_sp(PREDICTED, SENS, groups=(0, 7)), "group 7 of the sensitive attribute holds no unit"),
        (lambda: delta_eo(PREDICTED, 1 - SENS, SENS), "group 1 .* holds no unit of class 1"),
        (lambda: delta_sp(PREDICTED, SENS, groups=(1, 1)), r"groups = \(1, 1\); two different values"),
        (lambda: delta_sp(PREDICTED, SENS[:7]), "8 predictions, 7 values"),
        (lambda: delta_eo(PREDICTED, LABELS[:7], SENS), "8 predictions, 8 values .* and 7 labels"),
    ],
)
def test_what_has_no_gap_is_refused(call, message):
    with pytest.raises(InvalidValue, match=message):
        call()


def biased() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores that are higher in the group 1 though labels depend on what lies beneath alone."""
    draw = np.random.default_rng(0)
    sens, merit = draw.integers(0, 2, 2000), draw.standard_normal(2000)
    return merit + 0.8 * sens, (merit + 0.3 * draw.standard_normal(2000) > 0).astype(np.int64), sens


@pytest.mark.parametrize("metric", ["sp", "eo"])
def test_thresholds_close_the_gap_and_keep_what_accuracy_they_can(metric):
    scores, labels, sens = biased()

    def gap(predicted: np.ndarray) -> float:
        return delta_sp(predicted, sens) if metric == "sp" else delta_eo(predicted, labels, sens)

    fitted = GroupThresholds(metric).fit(scores, labels, sens)
    found, plain = fitted.predict(scores, sens), (scores > 0.4).astype(np.int64)
    assert gap(plain) > 0.15
    assert gap(found) < 0.005
    assert (found == labels).mean() > (plain == labels).mean()
    assert fitted.thresholds_[1] - fitted.thresholds_[0] == pytest.approx(0.8, abs=0.25)


class Scores(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose scores are its inputs."""

    classes_ = np.array([0, 1])

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, x, y):
        return self

    def predict_proba(self, x):
        p = 1 / (1 + np.exp(-np.asarray(x)[:, 0]))
        return np.stack([1 - p, p], 1)


@pytest.mark.parametrize(("metric", "constraint"), [("sp", "demographic_parity"), ("eo", "true_positive_rate_parity")])
def test_thresholds_are_as_good_as_those_of_fairlearn_which_may_toss_coins(metric, constraint):
    scores, labels, sens = biased()
    x = scores[:, None]
    theirs = ThresholdOptimizer(
        estimator=Scores(), constraints=constraint, prefit=True, predict_method="predict_proba"
    ).fit(x, labels, sensitive_features=sens)
    decided = [theirs.predict(x, sensitive_features=sens, random_state=seed) for seed in range(20)]
    ours = GroupThresholds(metric).fit(scores, labels, sens).predict(scores, sens)

    def gap(predicted: np.ndarray) -> float:
        return delta_sp(predicted, sens) if metric == "sp" else delta_eo(predicted, labels, sens)

    accuracy = np.mean([(each == labels).mean() for each in decided])
    assert (ours == labels).mean() == pytest.approx(accuracy, abs=0.005)
    assert gap(ours) == pytest.approx(np.mean([gap(each) for each in decided]), abs=0.005)


def test_thresholds_need_both_groups():
    scores, labels, sens = biased()
    with pytest.raises(InvalidValue, match="group 1 holds no unit"):
        GroupThresholds().fit(scores, labels, 0 * sens)
    with pytest.raises(InvalidValue, match="group 1 holds no positive unit"):
        GroupThresholds("eo").fit(scores, np.where(sens == 1, 0, labels), sens)
    with pytest.raises(InvalidValue, match="not fitted yet: call fit"):
        GroupThresholds().predict(scores, sens)
    with pytest.raises(InvalidValue, match="metric = 'dp'"):
        GroupThresholds("dp").fit(scores, labels, sens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sens": np.full(2000, 2)}, "sens of unit 0 is 2; 0 or 1"),
        ({"sens": np.full(2000, -1)}, "sens of unit 0 is -1; 0 or 1"),
        ({"sens": np.zeros(9, int)}, r"shapes: scores \(2000,\), .*sens \(9,\)"),
        ({"scores": np.where(np.arange(2000) == 3, np.nan, 0.5)}, "scores of unit 3 is nan; a number"),
        ({"labels": np.full(2000, 2)}, "labels of unit 0 is 2; 0 or 1"),
        ({"labels": np.zeros((2000, 1), int)}, r"labels \(2000, 1\)"),
    ],
)
def test_thresholds_take_numbers_and_two_groups_alone(change, message):
    given = dict(zip(("scores", "labels", "sens"), biased(), strict=True))
    fitted = GroupThresholds().fit(**given)
    with pytest.raises(InvalidValue, match=message):
        GroupThresholds().fit(**given | change)
    if "labels" not in change:
        with pytest.raises(InvalidValue, match=message):
            fitted.predict(**{name: (given | change)[name] for name in ("scores", "sens")})
