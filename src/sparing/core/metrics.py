"""Figures of quality shared by tasks, in plain NumPy: functions of outputs and targets, nothing of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray

from sparing.core.errors import DataError, InvalidValue
from sparing.core.task import Evaluation, Metric

CALIBRATION_BINS = 15
CLASSIFICATION_METRICS = (
    Metric("accuracy", "higher"),
    Metric("worst_class_accuracy", "higher"),
    Metric("ece", "lower"),
    Metric("nll", "lower", "nats"),
)


def log_softmax(logits: Float[ndarray, "n c"]) -> Float[ndarray, "n c"]:
    """Logits (N, C) → log-probabilities (N, C) in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def correct(logits: Float[ndarray, "n c"], targets: Integer[ndarray, " n"]) -> Float[ndarray, " n"]:
    """1.0 where the largest logit is the target's, else 0.0: (N, C), (N,) → (N,). Ties go to the lower class."""
    return (logits.argmax(axis=1) == targets).astype(np.float64)


def negative_log_likelihood(log_probabilities: Float[ndarray, "n c"], targets: Integer[ndarray, " n"]) -> float:
    """Mean of −log p(target), in nats: (N, C), (N,) → one number."""
    return float(-log_probabilities[np.arange(len(targets)), targets].mean())


def expected_calibration_error(
    confidence: Float[ndarray, " n"], outcome: Float[ndarray, " n"], bins: int = CALIBRATION_BINS
) -> float:
    """Mean distance between confidence and accuracy over equal-width bins, weighted by their counts.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3; bin b holds the confidences in ((b−1)/B, b/B].

    Args:
        confidence: probability of the predicted class (N,), in 0…1.
        outcome: 1.0 where the prediction is right, else 0.0 (N,).
        bins: their number B.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=outcome, minlength=bins) - np.bincount(index, weights=confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def accuracy_by_class(
    outcome: Float[ndarray, " n"], targets: Integer[ndarray, " n"], classes: int
) -> Float[ndarray, " c"]:
    """Share of right predictions for each class (C,); NaN for a class without a unit."""
    counts = np.bincount(targets, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(targets, weights=outcome, minlength=classes) / counts


def macro_f1(predicted: Integer[ndarray, " n"], targets: Integer[ndarray, " n"], classes: int) -> float:
    """Unweighted mean over classes of F1 = 2·TP / (2·TP + FP + FN), for predictions and targets (N,).

    Classes that occur neither among predictions nor among targets take no part.
    """
    hits = np.bincount(targets[predicted == targets], minlength=classes)
    counts = np.bincount(predicted, minlength=classes) + np.bincount(targets, minlength=classes)
    return float((2 * hits[counts > 0] / counts[counts > 0]).mean())


def roc_auc(scores: Float[ndarray, " n"], positive: Bool[ndarray, " n"]) -> float:
    """Area under the ROC curve: how often a positive's score (N,) is above a negative's, ties counted half.

    NaN without a positive or a negative.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, scores)) if 0 < int(positive.sum()) < len(scores) else float("nan")


def evaluate_classification(logits: np.ndarray, targets: np.ndarray, class_names: Sequence[str]) -> Evaluation:
    """Accuracy (headline), worst class's accuracy, calibration error and likelihood of logits (N, C) for targets (N,).

    Classes without a unit take no part in the worst class. Raises :class:`InvalidValue` naming the unit when a logit
    is NaN or infinite, or when shapes disagree, and :class:`DataError` naming it when its target is no class.
    """
    classes = len(class_names)
    if not isinstance(logits, np.ndarray):
        raise InvalidValue(
            f"the outputs are a {type(logits).__name__}; one array ({len(targets)}, {classes}) is expected"
        )
    if logits.ndim != 2 or logits.shape[1] != classes or len(logits) != len(targets):
        raise InvalidValue(
            f"outputs of shape {logits.shape} for {len(targets)} units of {classes} classes; "
            f"({len(targets)}, {classes}) is expected"
        )
    if len(targets) == 0:
        raise InvalidValue("no unit to evaluate; at least one is expected")
    if targets.ndim != 1 or targets.dtype.kind not in "biu":
        raise DataError(
            f"targets of type {targets.dtype} and shape {targets.shape}; a class number in 0…{classes - 1} for each of "
            f"{len(targets)} units is expected"
        )
    targets = targets.astype(np.int64)
    wrong = np.flatnonzero((targets < 0) | (targets >= classes))
    if len(wrong):
        raise DataError(
            f"unit {wrong[0]} has the label {targets[wrong[0]]}; 0…{classes - 1} is expected ({len(wrong)} such units)"
        )
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(wrong):
        raise InvalidValue(f"the output for unit {wrong[0]} is not finite ({len(wrong)} of {len(logits)} units)")
    outcome = correct(logits, targets)
    log_probabilities = log_softmax(logits)
    by_class = accuracy_by_class(outcome, targets, classes)
    present = ~np.isnan(by_class)
    return Evaluation(
        metrics={
            "accuracy": float(outcome.mean()),
            "worst_class_accuracy": float(by_class[present].min()),
            "ece": expected_calibration_error(np.exp(log_probabilities.max(axis=1)), outcome),
            "nll": negative_log_likelihood(log_probabilities, targets),
        },
        per_unit=outcome,
        by_class={name: float(value) for name, value in zip(class_names, by_class, strict=True) if not np.isnan(value)},
    )
