"""Answers that are spans: the official metric of SQuAD v1.1, and the choice of a span by its logits.

Pure functions of texts and arrays, for anybody's loop.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from sparing.core.errors import InvalidValue

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
N_BEST = 20
MAX_ANSWER_LENGTH = 30


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and the words a, an and the; words separated by one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1.0 when both are the same after :func:`normalise_answer`, else 0.0."""
    return float(normalise_answer(prediction) == normalise_answer(gold))


def f1_score(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words of :func:`normalise_answer`, each counted as often as it is.

    Without a word in common it is 0, so for two texts that both normalise to nothing too.
    """
    ours, theirs = normalise_answer(prediction).split(), normalise_answer(gold).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def score_answers(
    predictions: Mapping[str, str] | Sequence[str | None], golds: Mapping[str, Sequence[str]] | Sequence[Sequence[str]]
) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """(exact match, F1) of each question (N,), in 0…1: the best over its golds; what has no answer scores 0.

    Both are sequences in the same order, or mappings by a question's name.
    """
    if isinstance(golds, Mapping):
        if not isinstance(predictions, Mapping):
            raise InvalidValue("golds are named and predictions are not; both by name, or both in order, are expected")
        if unknown := [name for name in predictions if name not in golds]:
            raise InvalidValue(f"a prediction for {unknown[0]!r}, which is no question ({len(unknown)} such)")
        names = list(golds)
        given = [predictions.get(name) for name in names]
        wanted = [golds[name] for name in names]
    else:
        if isinstance(predictions, Mapping) or len(predictions) != len(golds):
            raise InvalidValue(f"{len(predictions)} predictions for {len(golds)} questions; one for each is expected")
        names, given, wanted = [str(number) for number in range(len(golds))], list(predictions), list(golds)
    if not names:
        raise InvalidValue("no question to score; at least one is expected")
    for name, texts in zip(names, wanted, strict=True):
        if isinstance(texts, str) or len(texts) == 0:
            raise InvalidValue(f"the golds of question {name!r} are {texts!r}; a list of at least one text is expected")
    scores = [
        (0.0, 0.0)
        if text is None
        else (max(exact_match(text, gold) for gold in texts), max(f1_score(text, gold) for gold in texts))
        for text, texts in zip(given, wanted, strict=True)
    ]
    exact, f1 = np.array(scores, np.float64).T
    return exact, f1


def squad_metrics(
    predictions: Mapping[str, str] | Sequence[str | None], golds: Mapping[str, Sequence[str]] | Sequence[Sequence[str]]
) -> dict[str, float]:
    """{"exact_match": …, "f1": …} in percent: the official metric of SQuAD v1.1, averaged over the questions.

    Args:
        predictions: one text for each question, by its name or in order; what is missing or None scores 0.
        golds: the answers people gave to each question, by the same names or in the same order.

    Raises:
        InvalidValue: for a question without a gold, none at all, or sequences of different lengths.
    """
    exact, f1 = score_answers(predictions, golds)
    return {"exact_match": 100 * float(exact.mean()), "f1": 100 * float(f1.mean())}


def postprocess_spans(
    start_logits: Float[ndarray, "..."],
    end_logits: Float[ndarray, "..."],
    context_mask: Bool[ndarray, "..."],
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> tuple[np.ndarray, Float[ndarray, " n"]]:
    """The best span of each window: (spans int64 (N, 2), both ends inclusive; their sums of logits (N,)).

    Of the ``n_best`` starts and ends with the largest logits in the whole window, pairs that are not both inside the
    context, whose end lies before the start, or which are longer than ``max_answer_length`` are dropped; of the rest
    the one with the largest sum is taken (the earliest start, then end, of equal ones). A window without a pair left
    has the span (−1, −1) and the sum −∞: the empty answer.

    Args:
        start_logits: of each position being the first of the answer (N, T).
        end_logits: of each position being the last one (N, T).
        context_mask: positions an answer may have (N, T).
        n_best: positions of either kind that are looked at.
        max_answer_length: most positions of an answer.
    """
    starts, ends, mask = np.asarray(start_logits), np.asarray(end_logits), np.asarray(context_mask)
    if starts.ndim != 2 or starts.shape != ends.shape or starts.shape != mask.shape:
        raise InvalidValue(
            f"logits of shapes {starts.shape} and {ends.shape} and a mask {mask.shape}; three times (N, T) is expected"
        )
    for name, value in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InvalidValue(f"{name} = {value!r}; a whole number of at least 1 is expected")
    wrong = np.flatnonzero(~(np.isfinite(starts) & np.isfinite(ends)).all(axis=1))
    if len(wrong):
        raise InvalidValue(f"the logits of window {wrong[0]} are not finite ({len(wrong)} of {len(starts)} windows)")
    spans, scores = np.full((len(starts), 2), -1, np.int64), np.full(len(starts), -np.inf)
    for row in range(len(starts)):
        first, last = (np.sort(np.argsort(-of[row], kind="stable")[:n_best]) for of in (starts, ends))
        length = last[None, :] - first[:, None] + 1
        allowed = (length >= 1) & (length <= max_answer_length) & mask[row, first][:, None] & mask[row, last][None, :]
        if not allowed.any():
            continue
        sums = np.where(allowed, starts[row, first][:, None] + ends[row, last][None, :], -np.inf)
        best = np.unravel_index(int(sums.argmax()), sums.shape)
        spans[row], scores[row] = (first[best[0]], last[best[1]]), sums[best]
    return spans, scores


def best_answers(
    spans: np.ndarray,
    scores: np.ndarray,
    questions: Sequence[int],
    offsets: Sequence[np.ndarray],
    contexts: Sequence[str],
) -> dict[int, str]:
    """Question → the text of the best span over all its windows; "" for one without a span.

    Args:
        spans: of each window, as :func:`postprocess_spans` gives them.
        scores: of each window.
        questions: the number of the question each window belongs to.
        offsets: for each window the characters (begin, end) of the context that each position stands for (T, 2).
        contexts: of each window.
    """
    best: dict[int, Any] = {}
    for row, question in enumerate(questions):
        if question not in best or scores[row] > scores[best[question]]:
            best[question] = row
    texts = {}
    for question, row in best.items():
        first, last = spans[row]
        texts[question] = "" if first < 0 else contexts[row][offsets[row][first][0] : offsets[row][last][1]]
    return texts
