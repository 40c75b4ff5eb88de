"""Question answering: the official metric, the choice of a span, windows, and the task."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import sparing
from sparing import postprocess_spans, squad_metrics
from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor import ModulePredictor
from sparing.data.squad import Question
from sparing.data.wordpiece import SPECIAL, WordPiece
from sparing.distillation.logits import distillation_loss, distillation_term
from sparing.tasks.text.spans import best_answers, exact_match, f1_score, normalise_answer, score_answers
from sparing.tasks.text.squad import OUTSIDE, Squad, SquadWindows, make_windows
from sparing.testing import QUICK

WORDS = "who sat in the old house on hill a cat dog red then slept for 5 ##0 years".split()  # noqa: SIM905
WORDPIECE = WordPiece((*SPECIAL, *WORDS), 16)
CONTEXT = "A red cat sat in the old house on the hill. Then the dog slept for 50 years."


def asked(answer: str, text: str = "who sat", context: str = CONTEXT) -> Question:
    return Question("q", text, context, ((answer, context.index(answer)),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, an U.S. a-la", "cat us ala"),
        ("theatre an1 anthem", "theatre an1 anthem"),
        ("24–10", "24–10"),
        ("", ""),
        ("A the AN", ""),
    ],
)
def test_answers_are_normalised_as_the_official_script_does(text, expected):
    assert normalise_answer(text) == expected


def test_words_in_common_are_counted():
    assert f1_score("the red cat", "red cat sat") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1_score("cat cat cat", "cat cat") == pytest.approx(0.8)
    assert (exact_match("the", "a"), f1_score("the", "a")) == (1.0, 0.0)
    assert f1_score("dog", "cat") == 0.0


def test_the_best_gold_counts_and_no_answer_scores_nothing():
    golds = {"a": ["red cat", "cat"], "b": ["dog"], "c": ["house"]}
    assert squad_metrics({"a": "Cat!", "b": "the big dog"}, golds) == {
        "exact_match": pytest.approx(100 / 3),
        "f1": pytest.approx(100 * (1 + 2 / 3) / 3),
    }
    assert squad_metrics([None, "dog"], [["x"], ["dog"]]) == {"exact_match": 50.0, "f1": 50.0}


@pytest.mark.parametrize(
    ("predictions", "golds", "message"),
    [
        ({"z": "x"}, {"a": ["x"]}, "a prediction for 'z', which is no question"),
        (["x"], {"a": ["x"]}, "golds are named and predictions are not"),
        (["x"], [["x"], ["y"]], "1 predictions for 2 questions"),
        ([], [], "no question to score"),
        (["x"], [[]], r"the golds of question '0' are \[\]"),
        (["x"], ["x"], "the golds of question '0' are 'x'"),
    ],
)
def test_scores_need_golds_for_each_question(predictions, golds, message):
    with pytest.raises(InvalidValue, match=message):
        squad_metrics(predictions, golds)


def brute_force(starts, ends, mask, n_best, longest):
    """Every pair, one after the other."""
    first = set(np.argsort(-starts, kind="stable")[:n_best].tolist())
    last = set(np.argsort(-ends, kind="stable")[:n_best].tolist())
    best = ((-1, -1), -np.inf)
    for i in sorted(first):
        for j in sorted(last):
            if mask[i] and mask[j] and i <= j < i + longest and starts[i] + ends[j] > best[1]:
                best = ((i, j), starts[i] + ends[j])
    return best


def test_a_span_is_the_best_of_all_pairs():
    draw = np.random.default_rng(0)
    for n_best, longest in ((1, 30), (3, 4), (20, 1), (100, 100)):
        starts, ends = draw.integers(-4, 5, (2, 40, 23)).astype(float)  # with ties
        mask = draw.random((40, 23)) < 0.6
        mask[0] = False
        spans, scores = postprocess_spans(starts, ends, mask, n_best, longest)
        for row in range(40):
            span, score = brute_force(starts[row], ends[row], mask[row], n_best, longest)
            assert (tuple(spans[row]), scores[row]) == (span, score)
        assert spans[0].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end_logits": np.zeros((2, 4))}, r"shapes \(2, 5\) and \(2, 4\)"),
        ({"start_logits": np.full((2, 5), np.nan)}, "the logits of window 0 are not finite"),
        ({"n_best": 0}, "n_best = 0"),
        ({"max_answer_length": -1}, "max_answer_length = -1"),
    ],
)
def test_wrong_logits_are_refused(change, message):
    given = {"start_logits": np.zeros((2, 5)), "end_logits": np.zeros((2, 5)), "context_mask": np.ones((2, 5), bool)}
    with pytest.raises(InvalidValue, match=message):
        postprocess_spans(**{**given, **change})


def test_the_best_window_answers_and_none_answers_nothing():
    spans, scores = np.array([[1, 2], [0, 0], [-1, -1]]), np.array([1.0, 3.0, -np.inf])
    offsets = [np.array([[0, 1], [2, 5], [6, 9]])] * 3
    contexts = ["a red cat"] * 3
    assert best_answers(spans, scores, [0, 0, 1], offsets, contexts) == {0: "a", 1: ""}
    assert best_answers(spans[:1], scores[:1], [4], offsets, contexts) == {4: "red cat"}


def test_a_short_context_is_one_window():
    (window,) = make_windows(WORDPIECE, asked("red cat", context="A red cat sat."), stride=4)
    assert window.ids.tolist() == WORDPIECE([("who sat", "A red cat sat.")])[0].tolist()
    assert window.offsets.tolist() == [[-1, -1]] * 4 + [[0, 1], [2, 5], [6, 9], [10, 13], [13, 14], [-1, -1]]
    assert window.span == (5, 6)


def test_a_long_context_is_cut_into_windows_that_share_the_stride():
    question = asked("50 years")
    windows = make_windows(WORDPIECE, question, stride=4)
    pieces = WORDPIECE.words(CONTEXT)[0]
    room = 16 - 2 - 3
    parts = [window.ids[4:-1].tolist() for window in windows]
    assert [part[:4] for part in parts[1:]] == [part[-4:] for part in parts[:-1]]
    assert [*parts[0], *(piece for part in parts[1:] for piece in part[4:])] == pieces
    assert all(len(part) == room for part in parts[:-1])
    assert all(len(window.ids) <= 16 for window in windows)
    for window in windows:
        first, last = window.span
        if window.span != (0, 0):
            assert CONTEXT[window.offsets[first][0] : window.offsets[last][1]] == "50 years"
    assert [window.span != (0, 0) for window in windows].count(True) >= 1
    whole = WORDPIECE.vocabulary.index("5")
    for window in windows:
        held = whole in window.ids.tolist() and window.ids.tolist().count(WORDPIECE.vocabulary.index("years")) == 1
        assert (window.span != (0, 0)) == held


def test_pieces_that_hold_more_than_the_answer_belong_to_it():
    (window,) = make_windows(WORDPIECE, asked("at", context="A red cat sat."), stride=4)
    assert window.span == (6, 6)
    (none,) = make_windows(WORDPIECE, Question("q", "who", "", (("x", 0),)), stride=4)
    assert none.span == (0, 0)


def test_questions_are_cut_and_must_leave_room():
    wide = WordPiece(WORDPIECE.vocabulary, 100)
    (window,) = make_windows(wide, asked("cat", text="who " * 90), stride=8)
    assert window.ids.tolist().count(5) == 64
    with pytest.raises(
        InvalidValue, match="'q' of 10 pieces leaves 3 of 16 for the context, no more than the stride of 4"
    ):
        make_windows(WORDPIECE, asked("cat", text="who " * 10), stride=4)


def files(folder, count=40):
    """Passages that name who sits where; the answer is the animal."""
    draw = np.random.RandomState(0)
    animals, places = ["cat", "dog", "red cat", "old dog"], ["house", "hill"]

    def part(name, size, start):
        paragraphs = []
        for number in range(start, start + size):
            animal, place = animals[draw.randint(4)], places[draw.randint(2)]
            context = f"for {number} years a {animal} sat on the {place} ."
            answers = [{"text": animal, "answer_start": context.index(animal)}]
            paragraphs.append(
                {"context": context, "qas": [{"id": f"q{number}", "question": "who sat ?", "answers": answers}]}
            )
        (folder / name).write_text(json.dumps({"data": [{"title": "", "paragraphs": paragraphs}]}))
        return str(folder / name)

    return {"train": part("train.json", count, 0), "test": part("test.json", 12, 500)}


def small(folder, count=40, **fields):
    settings = {"length": 24, "stride": 4, "vocabulary": None, "vocab_size": 60}
    return Squad(**files(folder, count), **{**settings, **fields})


def test_passages_are_in_one_split_only(tmp_path):
    splits = small(tmp_path).splits(None)
    passages = [{d.questions[row].context for row in d.rows} for d in vars(splits).values()]
    assert sum(map(len, passages)) == len(set.union(*passages)) == 52
    assert [len(found) for found in passages] == [37, 2, 1, 12]


def test_the_loss_is_the_mean_of_both_and_padding_has_no_share(tmp_path):
    task = small(tmp_path)
    train = task.splits(None).train
    batch = task.collate([train[0]] * 3)
    logits = torch.randn(*batch[0].shape, 2)
    starts, ends = (torch.nn.functional.cross_entropy(logits[..., i], batch[1][:, i]) for i in (0, 1))
    assert (batch[0] != 0).all()
    torch.testing.assert_close(task.loss(logits, batch), (starts + ends) / 2)
    longer = (torch.nn.functional.pad(batch[0], (0, 5)), batch[1])
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 5), value=9.0)
    torch.testing.assert_close(task.loss(padded, longer), task.loss(logits, batch))
    rows, positions = task.class_logits(padded, longer)
    assert positions.tolist() == batch[1].flatten().tolist()
    assert rows.shape == (6, padded.shape[1])
    assert (rows[:, -5:] == OUTSIDE).all()
    assert torch.equal(rows[2, :-5], logits[1, :, 0])
    assert torch.equal(rows[3, :-5], logits[1, :, 1])


def test_padding_is_not_distilled(tmp_path):
    """Ragged windows: what either network says behind a text is no part of the comparison."""
    task = small(tmp_path)
    items = sorted(task.splits(None).train, key=lambda item: len(item[0]))
    batch = task.collate([items[0], items[-1]])
    padding = batch[0] == task.wordpiece.pad_id
    assert padding.any()
    torch.manual_seed(0)
    outputs = torch.randn(*batch[0].shape, 2, requires_grad=True)
    answers = np.random.RandomState(1).standard_normal(outputs.shape).astype(np.float32)

    def term(student, behind):
        said = np.where(padding[..., None], np.float32(behind), answers)
        return distillation_term(lambda ids: said, task, 2.0, 1.0)(
            torch.tensor(0.0), student, batch, torch.nn.Identity()
        )

    loss = term(outputs, 0.0)
    assert term(outputs, 40.0) == loss
    assert term(outputs.masked_fill(padding[..., None], -7.0), 0.0) == loss
    parts = []  # each window alone, without padding
    for row, length in enumerate((~padding).sum(1).tolist()):
        pair = (outputs[row, :length].T, torch.from_numpy(answers[row, :length]).T)
        parts.append(distillation_loss(*pair, 2.0))
    torch.testing.assert_close(loss, sum(parts) / 2)
    loss.backward()
    assert outputs.grad.isfinite().all()
    assert torch.equal(outputs.grad.abs().sum(-1) == 0, padding)


class Oracle:
    """Points at the answer, but in the windows of ``silent`` questions."""

    def __init__(self, split: SquadWindows, silent: tuple[int, ...] = ()) -> None:
        self.spans = {
            tuple(window.ids.tolist()): None if row in silent else window.span for row, window in split.windows
        }

    def __call__(self, ids):
        logits = np.zeros((*ids.shape, 2), np.float32)
        for row, numbers in enumerate(np.asarray(ids).tolist()):
            span = self.spans[tuple(number for number in numbers if number)]
            if span is not None:
                logits[row, span[0], 0] = logits[row, span[1], 1] = 9
            else:
                logits[row, 0] = 9
        return logits


def test_figures_are_the_metric_over_questions(tmp_path):
    task = small(tmp_path, n_best=1)
    test = task.splits(None).test
    found = task.evaluate(Oracle(test), test)
    assert found.metrics == {"f1": 1.0, "exact_match": 1.0}
    silent = test.rows[3]
    found = task.evaluate(Oracle(test, silent=(silent,)), test)
    assert found.per_unit.tolist() == [row != silent for row in test.rows]
    answers = task.answers(Oracle(test), test)
    golds = {row: [text for text, _ in test.questions[row].answers] for row in test.rows}
    exact, _ = score_answers([answers[row] for row in test.rows], [golds[row] for row in test.rows])
    assert exact.all()
    with pytest.raises(InvalidValue, match="squad: the split to evaluate holds no window"):
        task.evaluate(Oracle(test), [])
    with pytest.raises(InvalidValue, match="squad: the split is a list; a split of the task, or a torch Subset"):
        task.evaluate(Oracle(test), [test[0]])
    with pytest.raises(InvalidValue, match="squad: outputs of shape"):
        task.evaluate(lambda ids: np.zeros(ids.shape), test)


@pytest.mark.parametrize("behind", [0.0, -9.0, np.nan])
def test_what_is_said_behind_a_text_does_not_answer(behind, tmp_path):
    """Logits are mostly below the 0 that runtimes leave there; answers must not depend on a window's batch mates."""
    task = small(tmp_path, n_best=1, length=64)  # a window holds a passage
    test = task.splits(None).test
    oracle, filled = Oracle(test), []

    def predictor(ids):
        padding = np.asarray(ids) == task.wordpiece.pad_id
        filled.append(padding.any(axis=1))
        return np.where(padding[..., None], behind, oracle(ids) - 20)

    assert task.evaluate(predictor, test).metrics == {"f1": 1.0, "exact_match": 1.0}
    assert np.concatenate(filled).any()


def test_a_split_is_scored_by_its_own_questions(tmp_path):
    """Whatever was read since: the same task may be asked for the splits of several data folders."""
    roots = [tmp_path / "a", tmp_path / "b"]
    for root, count in zip(roots, (40, 60), strict=True):
        root.mkdir()
        files(root, count)
    names = {"train": "train.json", "test": "test.json"}
    task = Squad(**names, length=24, stride=4, vocabulary=None, vocab_size=60)
    tests = [task.splits(root).test for root in roots]
    assert [test.rows[0] for test in tests] == [40, 60]
    task.splits(roots[0])  # read before: kept
    for test in reversed(tests):
        assert task.evaluate(Oracle(test), test).metrics == {"f1": 1.0, "exact_match": 1.0}
        some = Subset(Subset(test, range(6)), [1, 2, 4])
        assert task.evaluate(Oracle(test), some).metrics["exact_match"] == 1.0


def test_windows_of_one_question_answer_together(tmp_path):
    task = small(tmp_path, length=16, stride=6, vocab_size=200)
    test = task.splits(None).test
    assert len(test) > len(test.rows)
    found = task.evaluate(Oracle(test), test)
    assert len(found.per_unit) == len(test.rows)
    assert found.metrics["exact_match"] == 1


def test_a_network_learns_to_answer_and_is_exported(tmp_path):
    task = small(tmp_path, count=300, vocab_size=200)
    steps = [sparing.Train(epochs=10, batch_size=16, lr=3e-3, warmup_steps=20), sparing.Export()]
    model = {"name": "bert", "dim": 32, "depth": 2, "heads": 2, "segments": 2, "dropout": 0.0}
    done = sparing.run(task=task, model=model, steps=steps, meter=QUICK)
    trained, exported = done.ledger.rows
    assert trained.figures["exact_match"].value > 0.9
    assert exported.runtime == "onnxruntime"
    assert exported.figures["f1"].value == pytest.approx(trained.figures["f1"].value, abs=0.05)
    logits = done.job.predictor.predict([("who sat ?", "for 3 years a cat sat on the hill .")])
    assert logits.shape[2] == 2


def test_the_subset_is_read_and_shared_questions_count_once(data_root):
    task = Squad(vocabulary=None, vocab_size=2000)
    splits = task.splits(data_root)
    assert [len(part.rows) for part in vars(splits).values()] == [4223, 235, 95, 1926]
    assert len(splits.train) >= 4223
    assert len(splits.test) >= 1926
    for row, window in splits.test.windows[:300]:
        text, begin = splits.test.questions[row].answers[0]
        if window.span != (0, 0):
            first, last = window.offsets[window.span[0]][0], window.offsets[window.span[1]][1]
            assert first <= begin
            assert last >= begin + len(text)
    untrained = ModulePredictor(task.default_model(), task)
    few = Subset(splits.test, range(8))
    assert 0 <= task.evaluate(untrained, few).metrics["f1"] <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 384}, "squad: stride = 384; a whole number in 0…380"),
        ({"n_best": 0}, "squad: n_best = 0"),
        ({"train": "a.json"}, "train and test are given together"),
        ({"train": "a.json", "test": []}, r"squad: test = \[\]"),
        ({"train": "a.json", "test": "b.json"}, "a.json is missing; a file of SQuAD v1.1"),
        ({}, r"squad/train-v1.1.json is missing. Place it there"),
    ],
)
def test_what_cannot_be_is_refused(fields, message, tmp_path):
    with pytest.raises((InvalidValue, DataError), match=message):
        Squad(vocabulary=None, **fields).splits(tmp_path)


def test_too_few_passages_are_refused(tmp_path):
    given = files(tmp_path, count=2)
    with pytest.raises(DataError, match="squad: 2 training passages leave none for the split 'train'"):
        Squad(**given, vocabulary=None, vocab_size=60).splits(None)


def test_a_teacher_of_spans_is_distilled(tmp_path):
    task, model = small(tmp_path), {"name": "bert", "dim": 16, "depth": 1, "heads": 2}
    quickly = {"epochs": 1, "batch_size": 16, "lr": 3e-3}

    def end(step):
        steps = [sparing.Train(id="first", **quickly), step]
        return sparing.run(task=task, model=model, steps=steps, meter=QUICK, store=tmp_path / "store").job.model

    plain = end(sparing.Train(id="second", **quickly)).state_dict()
    control = end(sparing.Distil(teacher="first", weight=0, **quickly)).state_dict()
    assert all(torch.equal(control[name], plain[name]) for name in plain)
    taught = end(sparing.Distil(teacher="first", weight=0.9, **quickly)).state_dict()
    assert not torch.equal(taught["head.classifier.weight"], plain["head.classifier.weight"])
