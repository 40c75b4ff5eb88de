"""Text classification: one label for each text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparing.core.collation import items_of
from sparing.core.errors import DataError, InvalidValue, shown
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.task import Evaluation, Metric, Splits
from sparing.data.images import stratified_cut
from sparing.data.root import cut_shares
from sparing.data.text import Labelled, LabelledTexts, Texts, pad_texts
from sparing.data.wordpiece import checked_text
from sparing.tasks.text.base import PIECES, TextTask
from sparing.tasks.text.corruptions import CORRUPTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 64


class ClassifiedTexts(TextTask):
    """Texts and one class each; headline: accuracy.

    A subclass sets ``labels`` and reads its data in :meth:`read`. Batches are ``(ids int64 (N, T), labels int64
    (N,))``; a model maps the ids to logits (N, classes).
    """

    metrics: tuple[Metric, ...] = CLASSIFICATION_METRICS
    capabilities: frozenset[str] = frozenset({"classification", "text"})
    head: ClassVar[str] = "classifier"
    shares: Mapping[str, float] = {"val": 0.08, "calibration": 0.02}
    """Share of each training class that is cut off for a split that :meth:`read` does not give."""

    @abstractmethod
    def read(self, root: Path) -> Mapping[str, Labelled]:
        """Texts and labels of "train", and of "test" and "val" where the data have such parts of their own."""

    def training_texts(self, root: Path) -> Sequence[str]:
        """The texts of :meth:`read`'s part "train", but for those cut from it for the test split."""
        given = self.read(root)
        texts = given["train"].texts
        test = set(self._cut(given).get("test", ()))
        return [text for row, text in enumerate(texts) if row not in test]

    def _cut(self, given: Mapping[str, Labelled]) -> dict[str, np.ndarray]:
        shares = {name: share for name, share in self.shares.items() if name not in given}
        parts = stratified_cut(given["train"].labels, shares, seed=0)
        for name, rows in parts.items():
            if len(rows) == 0:
                raise DataError(
                    f"{self.name}: {len(given['train'].texts)} training texts of {len(self.labels)} classes leave none "
                    f"for the split {'train' if name == 'rest' else name!r}; a class needs at least {len(shares) + 1} "
                    "to take part in every split"
                )
        return parts

    def make_splits(self, root: Path) -> Splits:
        """What :meth:`read` gives; the rest is cut from its training part, each class in the same shares."""
        given = self.read(root)
        texts, labels = given["train"]
        source = Texts(texts, self.wordpiece, f"{self.name} train")
        made = {}
        for name, rows in self._cut(given).items():
            made["train" if name == "rest" else name] = LabelledTexts(source, labels, self.labels, rows, source.where)
        for name in given.keys() - {"train"}:
            where = f"{self.name} {name}"
            other = Texts(given[name].texts, self.wordpiece, where)
            made[name] = LabelledTexts(other, given[name].labels, self.labels, where=where)
        return Splits(**made)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:  # type: ignore[override]
        """Items ``(ids (T,), label)`` → a batch."""
        return partial(pad_texts, pad_id=self.wordpiece.pad_id)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy of logits (N, classes) and labels (N,)."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Accuracy, worst class's accuracy, expected calibration error (15 bins) and negative log-likelihood.

        Texts of like length are answered together, so that little is spent on padding.
        """
        if len(split) == 0:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no text")
        items = items_of(split, range(len(split)))
        order = sorted(range(len(items)), key=lambda index: len(items[index][0]))
        outputs: list[np.ndarray] = []
        for start in range(0, len(order), EVALUATION_BATCH):
            batch = self.collate([items[index] for index in order[start : start + EVALUATION_BATCH]])
            outputs.append(np.asarray(self.outputs(predictor, batch)))
        together = np.concatenate(outputs)
        logits = np.empty_like(together)
        logits[order] = together
        return evaluate_classification(logits, np.array([int(label) for _, label in items]), self.labels)

    def corruptions(self, split: Any) -> Mapping[str, LabelledTexts]:
        """Swapped letters, missing letters, missing words (see :mod:`sparing.tasks.text.corruptions`).

        They act on raw texts; a split that holds none (not :class:`LabelledTexts`) has no corrupted form.
        """
        if not isinstance(split, LabelledTexts):
            return {}
        return {name: split.corrupted(name, corruption) for name, corruption in CORRUPTIONS.items()}

    def definition(self) -> dict[str, Any]:
        """With the shares."""
        return {**super().definition(), "shares": dict(self.shares)}


class TextClassification(ClassifiedTexts):
    """Your own texts, given as lists, with one label each.

    What is not given is cut from the training texts, the same on every run.

    Args:
        name: what the ledger calls the task.
        texts: training texts.
        labels: the label of each, a word or a number; classes are in sorted order.
        test: (texts, labels) for the meter and audits only; None: cut from the training texts.
        val: (texts, labels) for validation; None: cut from the training texts.
        length: most word pieces of an input; longer texts are cut.
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or ``tokenizer.json``; None: made of ``texts``.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
        test_share: share of each class for the test split, when ``test`` is None.
        val_share: share of each class for validation, when ``val`` is None.
        calibration_share: share of each class for calibration.
    """

    def __init__(
        self,
        name: str,
        texts: Sequence[str],
        labels: Sequence[Any],
        test: tuple[Sequence[str], Sequence[Any]] | None = None,
        val: tuple[Sequence[str], Sequence[Any]] | None = None,
        *,
        length: int = 64,
        vocabulary: str | Sequence[str] | None = None,
        vocab_size: int = PIECES,
        lowercase: bool = True,
        test_share: float = 0.2,
        val_share: float = 0.1,
        calibration_share: float = 0.05,
    ) -> None:
        if not name or not isinstance(name, str):
            raise InvalidValue(f"name = {name!r}; a task needs a name")
        self.name = name
        super().__init__(length, vocabulary, vocab_size, lowercase)
        self.shares = cut_shares(name, test=test_share, val=val_share, calibration=calibration_share)
        classes = sorted({_as_name(label) for label in labels})
        if len(classes) < 2:
            raise DataError(f"{name}: the {len(labels)} labels are all {classes}; at least two classes are expected")
        self.labels = tuple(classes)
        self._given = {
            part: self._numbered(part, *pair)
            for part, pair in (("train", (texts, labels)), ("test", test), ("val", val))
            if pair is not None
        }

    def _numbered(self, part: str, texts: Sequence[str], labels: Sequence[Any]) -> Labelled:
        if len(texts) != len(labels):
            raise DataError(
                f"{self.name} {part}: {len(texts)} texts and {len(labels)} labels; one for each is expected"
            )
        numbers = {name: number for number, name in enumerate(self.labels)}
        for index, label in enumerate(labels):
            if _as_name(label) not in numbers:
                raise DataError(
                    f"{self.name} {part}: text {index} has the label {shown(label)}; one of {', '.join(self.labels)} "
                    "is expected"
                )
        return Labelled(
            [checked_text(text, f"{self.name} {part}: text {index}") for index, text in enumerate(texts)],
            np.array([numbers[_as_name(label)] for label in labels], np.int64),
        )

    def read(self, root: Path) -> Mapping[str, Labelled]:
        """As they were given."""
        return self._given


def _as_name(label: Any) -> str:
    return str(label.item() if hasattr(label, "item") else label)
