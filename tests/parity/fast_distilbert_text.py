"""Groups of the Fast DistilBERT fixtures that are about texts: the metric of SQuAD, and the choice of a span."""

from __future__ import annotations

import json

import numpy as np

from sparing.tasks.text.spans import normalise_answer, postprocess_spans, score_answers, squad_metrics

TOLERANCE = 1e-10


def close(found, expected) -> None:
    """Equal to within the fixtures' tolerance, relative to the largest value."""
    assert np.shape(found) == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * max(np.abs(expected).max(), 1e-300))


def squad(arrays: dict[str, np.ndarray]) -> int:
    """Pairs of a prediction and its golds."""
    expected = {"squad/pairs_json", "squad/exact", "squad/f1", "squad/normalized", "squad/overall_em_f1_percent"}
    assert set(arrays) == expected, f"other arrays than known: {sorted(set(arrays) ^ expected)}"
    predictions, golds = zip(*json.loads(str(arrays["squad/pairs_json"])), strict=True)
    exact, f1 = score_answers(predictions, golds)
    np.testing.assert_array_equal(exact, arrays["squad/exact"])
    close(f1, arrays["squad/f1"])
    assert [normalise_answer(text) for text in predictions] == json.loads(str(arrays["squad/normalized"]))
    overall = squad_metrics(predictions, golds)
    close([overall["exact_match"], overall["f1"]], arrays["squad/overall_em_f1_percent"])
    return len(arrays) - 1  # the pairs are input


def span(arrays: dict[str, np.ndarray]) -> int:
    """The best span of each row of logits."""
    inputs = {"span/start_logits", "span/end_logits", "span/context_mask", "span/n_best", "span/max_answer_length"}
    expected = inputs | {"span/best", "span/score"}
    assert set(arrays) == expected, f"other arrays than known: {sorted(set(arrays) ^ expected)}"
    given = {name.removeprefix("span/"): arrays[name] for name in inputs}
    limits = {name: int(given.pop(name)) for name in ("n_best", "max_answer_length")}
    spans, scores = postprocess_spans(**given, **limits)
    np.testing.assert_array_equal(spans, arrays["span/best"])
    close(scores, arrays["span/score"])
    return len(expected - inputs)


GROUPS = {"squad": squad, "span": span}
