"""Masked language modelling: the pre-training of text encoders (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.fingerprint import fingerprint
from sparing.core.metrics import correct, log_softmax
from sparing.core.task import IGNORED, Evaluation, Metric, Splits
from sparing.data.text import read_corpus
from sparing.data.wordpiece import SPECIAL, WordPiece
from sparing.tasks.text.base import PIECES, VOCABULARY, TextTask

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 32
_SEED = 20_181_011


def pack_texts(wordpiece: WordPiece, texts: Sequence[str], length: int) -> Int[ndarray, "n length"]:
    """Texts one after the other, a ``[SEP]`` between them, in blocks ``[CLS] … [SEP]`` of ``length`` pieces.

    The way "full sentences" of Liu et al. 2019 (RoBERTa, section 4.2), across the borders of texts: no block is padded.
    What does not fill a last block is left out, unless it is the only one. Returns int64 (blocks, length).
    """
    stream: list[int] = []
    for pieces in wordpiece.pieces(texts):
        if pieces:
            stream += [*pieces, wordpiece.sep_id]
    inner = length - 2
    stream = stream[:-1]
    if len(stream) < inner:
        stream += [wordpiece.pad_id] * (inner - len(stream)) if stream else []
    count = len(stream) // inner
    blocks = np.empty((count, length), np.int64)
    blocks[:, 0], blocks[:, -1] = wordpiece.cls_id, wordpiece.sep_id
    blocks[:, 1:-1] = np.array(stream[: count * inner], np.int64).reshape(count, inner)
    return blocks


def mask_pieces(
    ids: Int[ndarray, " t"],
    special: Int[ndarray, " s"],
    ordinary: Int[ndarray, " o"],
    mask_id: int,
    generator: np.random.Generator,
    share: float = 0.15,
) -> tuple[Int[ndarray, " t"], Int[ndarray, " p"]]:
    """Choose ordinary pieces to be predicted, ``share`` of all pieces (at least one), and hide most of them.

    Of those chosen 80 % become ``[MASK]``, 10 % an ordinary piece drawn at random, 10 % stay (Devlin et al. 2019,
    section 3.1 and appendix A.1), each by an independent draw.

    Args:
        ids: one text's pieces.
        special: numbers of special pieces, which are not chosen.
        ordinary: numbers of the pieces to draw from.
        mask_id: the number of ``[MASK]``.
        generator: decides.
        share: of all pieces, special ones counted; rounded to a whole number.

    Returns:
        (ids with some hidden, positions of the chosen ones in order).
    """
    open_ = np.flatnonzero(~np.isin(ids, special))
    chosen = np.sort(generator.permutation(open_)[: max(1, round(share * len(ids)))])
    hidden, draw = ids.copy(), generator.random(len(chosen))
    hidden[chosen[draw < 0.8]] = mask_id
    others = chosen[(draw >= 0.8) & (draw < 0.9)]
    hidden[others] = generator.choice(ordinary, len(others))
    return hidden, chosen


class MaskedTexts:
    """Map-style dataset of ``(ids int64 (T,), positions int64 (P,), labels int64 (P,))``.

    Item i is block i modulo their number, hidden as (seed, i) decides: ``copies`` times as many items as blocks, in
    which each block is hidden in as many ways.

    Args:
        blocks: int64 (N, T).
        wordpiece: whose special pieces are not hidden.
        seed: decides, with an item's index, what is hidden.
        copies: how often a block occurs.
        share: of the pieces that are to be predicted.
    """

    def __init__(
        self, blocks: np.ndarray, wordpiece: WordPiece, seed: int, copies: int = 1, share: float = 0.15
    ) -> None:
        self.blocks, self.seed, self.copies, self.share = blocks, seed, copies, share
        self.special = np.array([wordpiece.vocabulary.index(piece) for piece in SPECIAL])
        self.ordinary = np.setdiff1d(np.arange(len(wordpiece.vocabulary)), self.special)
        self.mask_id = wordpiece.mask_id

    def __len__(self) -> int:
        return len(self.blocks) * self.copies

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        index = int(index) % len(self)
        generator = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        block = self.blocks[index % len(self.blocks)]
        ids, positions = mask_pieces(block, self.special, self.ordinary, self.mask_id, generator, self.share)
        return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(block[positions])

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint([self.blocks, self.seed, self.copies, self.share, self.special, self.ordinary, self.mask_id])

    def fingerprint(self) -> str:
        """By the blocks and what decides how they are hidden; computed once."""
        return self._fingerprint


def pad_masked(items: Sequence[tuple[Tensor, Tensor, Tensor]], pad_id: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Items → ((ids (N, T), positions (N, P)), labels (N, P)); filled up with ``pad_id``, position 0, label −100."""
    from torch.nn.utils.rnn import pad_sequence

    ids, positions, labels = (list(part) for part in zip(*items, strict=True))
    return (
        (pad_sequence(ids, batch_first=True, padding_value=pad_id), pad_sequence(positions, batch_first=True)),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


class MaskedLM(TextTask):
    """Masked language modelling: pre-train a text encoder on unlabelled texts (Devlin et al. 2019).

    15 % of the pieces are to be predicted: 80 % of these are hidden, 10 % replaced, 10 % left. The texts are packed one
    after the other into blocks of ``length`` pieces. Scored by accuracy on what is to be predicted (the headline),
    negative log-likelihood in nats and perplexity.

    A batch is ``((ids (N, T), positions (N, P)), labels (N, P))``, and a model maps ids and positions to logits
    (N, P, vocab_size): only slots that count are computed. A slot with the label −100 fills up and counts for nothing.

    5 % of the texts are the test split, 2 % validate and 1 % calibrate, drawn once and for all. Parts of one sentence
    of SST-2 may be in several splits. The default vocabulary is made of all training texts of SST-2 and AG News, so
    those of this task's test split are among them: their pieces are known (there are no labels), and the tasks that
    follow share it. ``vocabulary=None`` makes one of the training split alone.

    Args:
        corpora: names of corpora (sst2, ag_news, trec, tinyshakespeare, wikitext2, us_addresses), of which the training
            texts are taken, or paths of text files: one text a line, or ``.jsonl`` with the key "text".
        length: pieces of a block, the special ones counted.
        copies: how often an epoch goes through the texts, hiding others each time.
        share: of the pieces that are to be predicted.
        seed: decides which.
        train_limit: use the first so many training blocks; None: all.
        test_limit: use the first so many test blocks; None: all.
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or ``tokenizer.json``; None: the training texts.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
    """

    name = "masked_lm"
    unit: ClassVar[str] = "token"
    metrics: tuple[Metric, ...] = (
        Metric("accuracy", "higher"),
        Metric("nll", "lower", "nats"),
        Metric("perplexity", "lower"),
    )
    capabilities: frozenset[str] = frozenset({"masked_lm", "text"})
    head: ClassVar[str] = "masked_lm"
    SHARES: ClassVar[Mapping[str, float]] = {"test": 0.05, "val": 0.02, "calibration": 0.01}

    def __init__(
        self,
        corpora: str | Sequence[str] = VOCABULARY,
        length: int = 64,
        copies: int = 10,
        share: float = 0.15,
        seed: int = 0,
        train_limit: int | None = None,
        test_limit: int | None = None,
        vocabulary: str | Sequence[str] | None = VOCABULARY,
        vocab_size: int = PIECES,
        lowercase: bool = True,
    ) -> None:
        super().__init__(length, vocabulary, vocab_size, lowercase)
        names = [corpora] if isinstance(corpora, str | Path) else corpora
        if not names or not all(isinstance(name, str | Path) for name in names):
            raise InvalidValue(f"masked_lm: corpora = {corpora!r}; names of corpora or paths of files are expected")
        self.corpora = [str(name) for name in names]
        self.copies = self._whole("copies", copies, 1, 1 << 20)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InvalidValue(f"masked_lm: share = {share!r}; a share above 0 and below 1 is expected")
        self.share = float(share)
        self.seed = self._whole("seed", seed, 0, 1 << 31)
        self.train_limit = self._limit("train_limit", train_limit)
        self.test_limit = self._limit("test_limit", test_limit)

    def _parts(self, root: Path) -> dict[str, list[str]]:
        texts = [text for name in self.corpora for text in read_corpus(name, root)]
        order = np.random.RandomState(_SEED % (1 << 32)).permutation(len(texts))
        parts, start = {}, 0
        for name, share in self.SHARES.items():
            end = start + max(1, round(share * len(texts)))
            parts[name] = [texts[row] for row in order[start:end]]
            start = end
        return parts | {"train": [texts[row] for row in order[start:]]}

    def training_texts(self, root: Path) -> Sequence[str]:
        """All but those of the other splits."""
        return self._parts(root)["train"]

    def make_splits(self, root: Path) -> Splits:
        """Texts are shared out first and packed then, so that no text lies in two splits."""
        wordpiece, made = self.wordpiece, {}
        limits = {"train": self.train_limit, "test": self.test_limit}
        special = [wordpiece.vocabulary.index(piece) for piece in SPECIAL]
        for number, (name, texts) in enumerate(self._parts(root).items()):
            blocks = pack_texts(wordpiece, texts, self.length)
            blocks = blocks[~np.isin(blocks, special).all(axis=1)][: limits.get(name)]
            if len(blocks) == 0:
                raise DataError(f"masked_lm: {' and '.join(self.corpora)} leave no word for the split {name!r}")
            copies = self.copies if name == "train" else 1
            made[name] = MaskedTexts(blocks, wordpiece, 4 * self.seed + number, copies, self.share)
        return Splits(**made)

    @property
    def collate(self) -> Any:  # type: ignore[override]
        """Items ``(ids, positions, labels)`` → a batch."""
        return partial(pad_masked, pad_id=self.wordpiece.pad_id)

    @property
    def preprocessing(self) -> None:  # type: ignore[override]
        """None: what is to be predicted is no text that anybody has."""
        return None

    def raw_example(self) -> None:  # type: ignore[override]
        """None, as there is no preprocessing."""
        return None

    def outputs(self, model: Any, batch: Any) -> Any:
        """Logits (N, P, vocab_size) at the batch's positions."""
        return model(*batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy over the slots that count."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), ignore_index=IGNORED)

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (M, vocab_size), pieces (M,)) of the M slots that count."""
        counts = batch[1] != IGNORED
        return outputs[counts], batch[1][counts]

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Accuracy, negative log-likelihood and perplexity over the slots that count; each slot is a unit."""
        if len(split) == 0:
            raise InvalidValue("masked_lm: the split to evaluate holds no block")
        outcomes: list[np.ndarray] = []
        likelihoods: list[np.ndarray] = []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            outputs, labels = np.asarray(self.outputs(predictor, batch)), np.asarray(batch[1])
            expected = (*labels.shape, len(self.wordpiece.vocabulary))
            if outputs.shape != expected:
                raise InvalidValue(f"masked_lm: outputs of shape {outputs.shape}; logits {expected} are expected")
            logits, targets = outputs[labels != IGNORED], labels[labels != IGNORED]
            if not np.isfinite(logits).all():
                first = sum(len(part) for part in outcomes) + np.flatnonzero(~np.isfinite(logits).all(axis=1))[0]
                raise InvalidValue(f"masked_lm: the output for unit {first} is not finite")
            outcomes.append(correct(logits, targets))
            likelihoods.append(log_softmax(logits)[np.arange(len(targets)), targets])
        outcome, nll = np.concatenate(outcomes), -float(np.concatenate(likelihoods).mean())
        figures = {"accuracy": float(outcome.mean()), "nll": nll, "perplexity": float(np.exp(min(nll, 700.0)))}
        return Evaluation(figures, outcome)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Random pieces and slots to predict: (ids int64 (batch, T), positions int64 (batch, P))."""
        import torch

        ids = self.example_ids(batch)
        slots = max(2, round(self.share * self.length)) - (batch + 1) % 2
        return ids, torch.arange(batch * slots).view(batch, slots) % (ids.shape[1] - 1)

    def definition(self) -> dict[str, Any]:
        """With the corpora and what decides how they are hidden."""
        own = [self.corpora, self.copies, self.share, self.seed, self.train_limit, self.test_limit]
        return {**super().definition(), "masked": own}
