"""Question answering: the span of a passage that answers a question (SQuAD v1.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sparing.core.collation import items_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.fingerprint import fingerprint
from sparing.core.task import Evaluation, Metric, Splits
from sparing.data.squad import SQUAD, Question, read_squad
from sparing.data.wordpiece import WordPiece
from sparing.tasks.text.base import ORDINARY, PIECES, VOCABULARY, TextTask
from sparing.tasks.text.spans import MAX_ANSWER_LENGTH, N_BEST, best_answers, postprocess_spans, score_answers

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.core.predictor import Predictor

QUESTION_PIECES = 64
"""Longer questions are cut, as in the published pre-processing."""
EVALUATION_BATCH = 16
OUTSIDE = -1e9
"""Logit of a position that only fills up a batch."""
PUBLISHED = {"train": ("squad/train-v1.1.json",), "test": ("squad/dev-v1.1.json",)}
SUBSET = {
    "train": ("squad_v1_1_subset/train_sample_tokenized.json", "squad_v1_1_subset/train_notre_dame.json"),
    "test": ("squad_v1_1_subset/dev_super_bowl_50.json", "squad_v1_1_subset/dev_240_paragraphs.json"),
}


class Window(NamedTuple):
    """One input ``[CLS] question [SEP] part of the context [SEP]``."""

    ids: np.ndarray
    """int64 (T,)."""
    offsets: np.ndarray
    """Characters (begin, end) of the context that each position stands for, int64 (T, 2); −1 outside the context."""
    span: tuple[int, int]
    """First and last position of the answer; (0, 0), the position of ``[CLS]``, when it is not whole in this window."""


def make_windows(wordpiece: WordPiece, question: Question, stride: int = 128) -> list[Window]:
    """The windows of at most ``wordpiece.max_length`` pieces over a question's context.

    Neighbouring windows share ``stride`` pieces of the context. The answer looked for is the first one given; a piece
    that holds more than the answer's characters belongs to it.
    """
    asked = wordpiece.words(question.question)[0][:QUESTION_PIECES]
    pieces, offsets = wordpiece.words(question.context)
    room = wordpiece.max_length - len(asked) - 3
    if room <= stride:
        raise InvalidValue(
            f"the question {question.id!r} of {len(asked)} pieces leaves {room} of {wordpiece.max_length} for the "
            f"context, no more than the stride of {stride}; a larger length or a smaller stride is needed"
        )
    text, begin = question.answers[0]
    windows, start = [], 0
    while True:
        part, places = pieces[start : start + room], offsets[start : start + room]
        ids = [wordpiece.cls_id, *asked, wordpiece.sep_id, *part, wordpiece.sep_id]
        where = np.full((len(ids), 2), -1, np.int64)
        lead = len(asked) + 2
        where[lead : lead + len(part)] = np.array(places, np.int64).reshape(-1, 2)
        windows.append(Window(np.array(ids, np.int64), where, _span(where, begin, begin + len(text))))
        if start + room >= len(pieces):
            return windows
        start += room - stride


def _span(offsets: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First and last position whose characters reach into begin…end, if both its ends are in the window."""
    touched = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 1] > begin) & (offsets[:, 0] < end))
    if len(touched) == 0 or offsets[touched[0], 0] > begin or offsets[touched[-1], 1] < end:
        return 0, 0
    return int(touched[0]), int(touched[-1])


class SquadWindows:
    """Map-style dataset of ``(ids (T,), span (2,), offsets (T, 2), number of the question)``, one item a window.

    Args:
        questions: all questions of the task.
        rows: numbers of those this dataset holds; None: all.
        wordpiece: cuts texts; its length is that of a window.
        stride: pieces that neighbouring windows share.
    """

    def __init__(
        self, questions: Sequence[Question], wordpiece: WordPiece, stride: int, rows: Sequence[int] | None = None
    ) -> None:
        self.questions, self.wordpiece, self.stride = questions, wordpiece, stride
        self.rows = list(range(len(questions)) if rows is None else rows)

    @cached_property
    def windows(self) -> list[tuple[int, Window]]:
        """(number of the question, window), made when they are first asked for."""
        return [
            (row, window)
            for row in self.rows
            for window in make_windows(self.wordpiece, self.questions[row], self.stride)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        import torch

        row, window = self.windows[int(index)]
        return torch.from_numpy(window.ids), torch.tensor(window.span), torch.from_numpy(window.offsets), row

    @cached_property
    def _fingerprint(self) -> str:
        asked = [[q.id, q.question, q.context, q.answers] for q in (self.questions[row] for row in self.rows)]
        vocabulary = [self.wordpiece.vocabulary, self.wordpiece.max_length, self.wordpiece.lowercase]
        return hashlib.sha256(fingerprint([asked, self.rows, vocabulary, self.stride]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """By the questions, the vocabulary and how windows are cut; computed once."""
        return self._fingerprint


def _questions_of(split: Any) -> Sequence[Question]:
    """The questions that a split's numbers name; parts of a data set know it as torch's ``Subset`` does."""
    while not isinstance(split, SquadWindows):
        if not hasattr(split, "dataset"):
            raise InvalidValue(
                f"squad: the split is a {type(split).__name__}; a split of the task, or a torch Subset of it, is needed"
            )
        split = split.dataset
    return split.questions


def pad_windows(
    items: Sequence[tuple[Tensor, Tensor, Tensor, int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items → (ids (N, T), spans (N, 2), offsets (N, T, 2), numbers of questions (N,)); offsets are filled with −1."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, spans, offsets, rows = zip(*items, strict=True)
    return (
        pad_sequence(list(ids), batch_first=True, padding_value=pad_id),
        torch.stack(spans),
        pad_sequence(list(offsets), batch_first=True, padding_value=-1),
        torch.tensor(rows),
    )


class Squad(TextTask):
    """SQuAD v1.1: find the span of a passage that answers a question (Rajpurkar et al. 2016).

    Scored by F1 over words (the headline) and exact match, as the official script does, here as shares in 0…1; a unit
    is a question. An input is ``[CLS] question [SEP] passage [SEP]``; long passages are cut into overlapping windows,
    and the answer is the span with the largest sum of logits over all windows of a question.

    A batch is ``(ids (N, T), spans (N, 2), offsets (N, T, 2), questions (N,))``; a model maps the ids to a logit of
    being the first and one of being the last position of the answer (N, T, 2). In a window that does not hold the
    answer, both are to be 0, ``[CLS]``.

    Read from ``squad/train-v1.1.json`` and ``dev-v1.1.json`` under the data root, gzipped or not, or, where these are
    not there, from the small ``squad_v1_1_subset/``: 4,553 training questions, too few to learn answering from, and
    1,926 test questions; 74 that are in both its test files count once. 5 % of the training passages validate and 2 %
    calibrate.

    Args:
        train: paths of other training files, absolute or below the data root, in the official layout or word-tokenised.
        test: paths of other test files.
        length: pieces of a window, the special ones counted.
        stride: pieces of the passage that neighbouring windows share.
        n_best: starts and ends that are looked at.
        max_answer_length: most pieces of an answer.
        train_limit: use the first so many training questions; None: all.
        test_limit: use the first so many test questions; None: all.
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or ``tokenizer.json``; None: the training texts.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
    """

    name = "squad"
    unit: ClassVar[str] = "question"
    metrics: tuple[Metric, ...] = (Metric("f1", "higher"), Metric("exact_match", "higher"))
    capabilities: frozenset[str] = frozenset({"span", "text"})
    head: ClassVar[str] = "span"
    SHARES: ClassVar[Mapping[str, float]] = {"val": 0.05, "calibration": 0.02}

    def __init__(
        self,
        train: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        length: int = 384,
        stride: int = 128,
        n_best: int = N_BEST,
        max_answer_length: int = MAX_ANSWER_LENGTH,
        train_limit: int | None = None,
        test_limit: int | None = None,
        vocabulary: str | Sequence[str] | None = VOCABULARY,
        vocab_size: int = PIECES,
        lowercase: bool = True,
    ) -> None:
        super().__init__(length, vocabulary, vocab_size, lowercase)
        self.stride = self._whole("stride", stride, 0, self.length - 4)
        self.n_best = self._whole("n_best", n_best, 1, 1 << 13)
        self.max_answer_length = self._whole("max_answer_length", max_answer_length, 1, 1 << 13)
        self.train_limit = self._limit("train_limit", train_limit)
        self.test_limit = self._limit("test_limit", test_limit)
        if (train is None) != (test is None):
            raise InvalidValue("squad: train and test are given together: the paths of files, or none of both")
        self.files = {"train": train, "test": test}
        for split, names in self.files.items():
            names = [names] if isinstance(names, str | Path) else names
            if names is not None and (not names or not all(isinstance(name, str | Path) for name in names)):
                raise InvalidValue(f"squad: {split} = {names!r}; paths of files are expected")
            self.files[split] = None if names is None else [str(name) for name in names]
        self._read: dict[Path, dict[str, list[Question]]] = {}

    def _paths(self, root: Path) -> dict[str, list[Path]]:
        chosen: Mapping[str, Any] = self.files
        if self.files["train"] is None:
            published = any((root / f"{PUBLISHED['train'][0]}{end}").is_file() for end in ("", ".gz"))
            subset = (root / "squad_v1_1_subset").is_dir()
            if not published and not subset:
                raise DataError(f"{root / PUBLISHED['train'][0]} is missing. {SQUAD.how_to_place(root)}")
            chosen = PUBLISHED if published else SUBSET
        found: dict[str, list[Path]] = {"train": [], "test": []}
        for split, names in chosen.items():
            for name in names:
                given = Path(name).expanduser()
                places = [at for base in (given, root / given) for at in (base, base.with_name(f"{base.name}.gz"))]
                path = next((at for at in places if at.is_file()), None)
                if path is None:
                    raise DataError(
                        f"{root / given} is missing; a file of SQuAD v1.1, gzipped or not, is expected there"
                    )
                found[split].append(path)
        return found

    def questions(self, root: Path) -> dict[str, list[Question]]:
        """The questions of "train" and "test" under ``root``: of several with one id in a split the first.

        Questions of word-tokenised files are named by their rows, and a row's number is no id.
        """
        if root not in self._read:
            found: dict[str, list[Question]] = {}
            for split, paths in self._paths(root).items():
                seen: dict[tuple[str, str], Question] = {}
                for path in paths:
                    for question in read_squad(path):
                        own = path.name if question.id.isdecimal() else ""
                        seen.setdefault((question.id, own), question)
                limit = self.train_limit if split == "train" else self.test_limit
                found[split] = list(seen.values())[:limit]
            self._read[root] = found
        return self._read[root]

    def training_texts(self, root: Path) -> Sequence[str]:
        """Questions and passages of the training files, each passage once."""
        train = self.questions(root)["train"]
        return [*dict.fromkeys(question.context for question in train), *(question.question for question in train)]

    def make_splits(self, root: Path) -> Splits:
        """Validation and calibration are cut by passages, so that none is in two splits."""
        found = self.questions(root)
        questions = [*found["train"], *found["test"]]
        passages = list(dict.fromkeys(question.context for question in found["train"]))
        order = np.random.RandomState(0).permutation(len(passages))
        part_of, start = dict.fromkeys(passages, "train"), 0
        for name, share in self.SHARES.items():
            end = start + max(1, round(share * len(passages)))
            part_of |= {passages[number]: name for number in order[start:end]}
            start = end
        rows: dict[str, list[int]] = {"train": [], "val": [], "calibration": []}
        for row, question in enumerate(found["train"]):
            rows[part_of[question.context]].append(row)
        rows["test"] = list(range(len(found["train"]), len(questions)))
        for name, numbers in rows.items():
            if not numbers:
                raise DataError(f"squad: {len(passages)} training passages leave none for the split {name!r}")
        return Splits(**{name: SquadWindows(questions, self.wordpiece, self.stride, rows[name]) for name in rows})

    @property
    def collate(self) -> Any:  # type: ignore[override]
        """Items → a batch."""
        return partial(pad_windows, pad_id=self.wordpiece.pad_id)

    def raw_example(self) -> Sequence[Any]:
        """A question and a passage that fill the whole length, of ordinary words."""
        return [("who will go to the house ?", ORDINARY * (self.length // 8))]

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (2N, T), positions (2N,)): for each window a row of starts and one of ends.

        Padding has the logit −10⁹, so that a window's share of a loss does not depend on how long the others are.
        """
        padding = batch[0] == self.wordpiece.pad_id
        return outputs.transpose(1, 2).masked_fill(padding[:, None], OUTSIDE).flatten(0, 1), batch[1].flatten()

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean of the cross-entropies of starts and of ends."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(*self.class_logits(outputs, batch))

    def answers(self, predictor: Predictor, split: Any) -> dict[int, str]:
        """Number of a question → the text answered, from all of its windows in the split."""
        questions = _questions_of(split)
        spans, scores, rows, offsets = [], [], [], []
        items = items_of(split, range(len(split)))
        order = sorted(range(len(items)), key=lambda index: len(items[index][0]))  # little padding
        for start in range(0, len(order), EVALUATION_BATCH):
            batch = self.collate([items[index] for index in order[start : start + EVALUATION_BATCH]])
            outputs, places = np.asarray(self.outputs(predictor, batch)), np.asarray(batch[2])
            if outputs.shape != places.shape:
                raise InvalidValue(f"squad: outputs of shape {outputs.shape}; logits {places.shape} are expected")
            padding = np.asarray(batch[0] == self.wordpiece.pad_id)  # what is said behind a text is of no account
            outputs = np.where(padding[..., None], np.float32(OUTSIDE), outputs)
            found = postprocess_spans(
                outputs[..., 0], outputs[..., 1], places[..., 0] >= 0, self.n_best, self.max_answer_length
            )
            spans.append(found[0])
            scores.append(found[1])
            rows += np.asarray(batch[3]).tolist()
            offsets += list(places)
        back = np.argsort(order, kind="stable")  # ties between windows go to the earlier one
        together = np.concatenate(spans)[back], np.concatenate(scores)[back]
        rows, offsets = [rows[index] for index in back], [offsets[index] for index in back]
        return best_answers(*together, rows, offsets, [questions[row].context for row in rows])

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """F1 and exact match over the questions of the split, in 0…1."""
        if len(split) == 0:
            raise InvalidValue("squad: the split to evaluate holds no window")
        answers, questions = self.answers(predictor, split), _questions_of(split)
        golds = [[text for text, _ in questions[row].answers] for row in answers]
        exact, f1 = score_answers(list(answers.values()), golds)
        return Evaluation({"f1": float(f1.mean()), "exact_match": float(exact.mean())}, f1)

    def definition(self) -> dict[str, Any]:
        """With the files' names and how windows and answers are made."""
        own = [self.stride, self.n_best, self.max_answer_length, self.train_limit, self.test_limit]
        return {**super().definition(), "files": self.files, "squad": own}
