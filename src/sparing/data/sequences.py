"""Token sequences for language modelling: windows of one long text, or a text each; and the readers of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparing.core.errors import DataError, InvalidValue
from sparing.core.fingerprint import fingerprint
from sparing.data.root import SPLITS, Source, own_data, own_splits
from sparing.data.text import read_lines, read_text

if TYPE_CHECKING:
    from torch import Tensor

TINY_SHAKESPEARE = Source(
    "tiny_shakespeare",
    "40,000 lines of Shakespeare's plays (Karpathy 2015)",
    "public domain",
    "https://github.com/karpathy/char-rnn",
    (),
    place="lm_text/tinyshakespeare.txt.gz",
    made="It is data/tinyshakespeare/input.txt of the homepage, gzipped, at {path}.",
)
US_ADDRESSES = Source(
    "us_addresses",
    "Inaugural and State of the Union addresses of US presidents, 124 documents (in NLTK's data)",
    "public domain",
    "https://github.com/nltk/nltk_data",
    (),
    place="lm_text/us_addresses.jsonl.gz",
    made='It is a file {path} with an object {{"text": …}} a line, made of the corpora inaugural and state_union.',
)
_SEED = 20_221_207
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def read_documents(path: Path) -> list[str]:
    """A text file as one document, or the value ``text`` of each line's object of a ``.jsonl``, gzipped or plain.

    Documents of white space alone are left out. Raises :class:`DataError` for a file that holds no other.
    """
    jsonl = Path(path.name.removesuffix(".gz")).suffix == ".jsonl"
    documents = read_lines(path) if jsonl else [read_text(path)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{path}: holds no text; at least one character is expected")
    return documents


def read_corpus_of(task: str, path: str, root: Path) -> dict[str, list[str]]:
    """Split → documents of a user's own texts: a file, a folder of text files, or one with a file for each split."""
    expected = "a text file, a JSONL file, or a folder of such"
    place = own_data(task, path, root, expected)
    files = [place]
    if place.is_dir():
        if any((place / f"train{suffix}").is_file() for suffix in SUFFIXES):
            found = own_splits(task, path, root, expected, SUFFIXES)
            return {split: read_documents(file) for split, file in found.items()}
        files = sorted(file for file in place.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        splits = {name for names in SPLITS.values() for name in names}
        if alone := [file for file in files if file.name.split(".")[0] in splits]:
            raise DataError(f"{place}: {alone[0].name} is there without train{SUFFIXES[0]}; both are expected, or none")
        if not files:
            raise DataError(f"{place}: no file that ends in {', '.join(SUFFIXES)} in it")
    return {"train": [document for file in files for document in read_documents(file)]}


def read_tiny_shakespeare(root: Path) -> dict[str, list[str]]:
    """Split → its part of the text: the last 10 % of all characters "test", 4 % before it "val", 1 % "calibration"."""
    documents = TINY_SHAKESPEARE.read(root, read_documents)
    return cut_tail(documents, {"calibration": 0.01, "val": 0.04, "test": 0.1})


def read_us_addresses(root: Path) -> dict[str, list[str]]:
    """Split → its documents: 0, 10, … are "test", 5, 15, … "val", 8, 28, … "calibration"."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "calibration": [], "test": []}
    for number, document in enumerate(US_ADDRESSES.read(root, read_documents)):
        name = "test" if number % 10 == 0 else "val" if number % 10 == 5 else "train"
        parts["calibration" if number % 20 == 8 else name].append(document)
    return parts


def cut_documents(documents: Sequence[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
    """Documents drawn for each split, at least one, the same on every run; "train" has the rest."""
    if len(documents) <= len(shares):
        raise DataError(
            f"{len(documents)} documents for train, {', '.join(shares)}; at least {len(shares) + 1} are needed, or "
            'split: "tail"'
        )
    order = np.random.RandomState(_SEED).permutation(len(documents))
    parts, start = {}, 0
    for name, share in shares.items():
        end = start + max(1, round(share * len(documents)))
        parts[name] = [documents[row] for row in np.sort(order[start:end])]
        start = end
    return {"train": [documents[row] for row in np.sort(order[start:])], **parts}


def cut_tail(documents: Sequence[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
    """All characters in order: first "train", then a share for each split; a document on a border is cut there."""
    total = sum(map(len, documents))
    ends = np.cumsum([1 - sum(shares.values()), *shares.values()])
    borders = [0, *(int(round(total * float(end), 6)) for end in ends[:-1]), total]
    parts: dict[str, list[str]] = {}
    for name, first, last in zip(("train", *shares), borders, borders[1:], strict=False):
        begin, parts[name] = 0, []
        for document in documents:
            piece = document[max(0, first - begin) : max(0, last - begin)]
            begin += len(document)
            if piece:
                parts[name].append(piece)
    return parts


class Sequences:
    """Map-style dataset of token numbers, int64 (T,): parts of one array, which may overlap.

    Args:
        ids: all tokens, one after the other.
        starts: where each sequence begins, int64 (N,).
        ends: where it ends, int64 (N,); all sequences have at least 2 tokens, so that there is one to predict.
    """

    def __init__(self, ids: Int[ndarray, " t"], starts: Int[ndarray, " _"], ends: Int[ndarray, " _"]) -> None:
        self.ids, self.starts, self.ends = np.asarray(ids), np.asarray(starts), np.asarray(ends)
        if self.starts.shape != self.ends.shape or self.starts.ndim != 1:
            raise InvalidValue(f"starts {self.starts.shape} and ends {self.ends.shape}; both (N,) are expected")
        if len(self.starts) and not (self.starts.min() >= 0 and self.ends.max() <= len(self.ids)):
            raise InvalidValue(f"a sequence lies outside of {len(self.ids)} tokens")
        if len(self.starts) and (self.ends - self.starts).min() < 2:
            raise InvalidValue(f"sequence {int((self.ends - self.starts).argmin())} has less than 2 tokens")

    @classmethod
    def windows(cls, ids: Int[ndarray, " t"], length: int, stride: int | None = None) -> Sequences:
        """Windows of ``length`` + 1 tokens, one every ``stride`` tokens (None: ``length``, so none is predicted twice).

        A window begins with the last token of the one before it. What does not fill a last window is left out.
        """
        starts = np.arange(0, max(0, len(ids) - length), length if stride is None else stride)
        return cls(ids, starts, starts + length + 1)

    @classmethod
    def rows(cls, rows: Sequence[Int[ndarray, " _"]], length: int) -> Sequences:
        """Each row cut to ``length`` + 1 tokens; rows of less than two are left out."""
        kept = [row[: length + 1] for row in rows if len(row) >= 2]
        ends = np.cumsum([len(row) for row in kept], dtype=np.int64)
        starts = ends - np.array([len(row) for row in kept], np.int64)
        return cls(np.concatenate(kept) if kept else np.zeros(0, np.int64), starts, ends)

    def first(self, count: int | None) -> Sequences:
        """The first ``count`` sequences; None: all."""
        return Sequences(self.ids, self.starts[:count], self.ends[:count])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        import torch

        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return torch.from_numpy(self.ids[self.starts[index] : self.ends[index]].astype(np.int64))

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint([self.ids, self.starts, self.ends])

    def fingerprint(self) -> str:
        """By content, computed once."""
        return self._fingerprint


def pad_sequences(items: Sequence[Tensor]) -> dict[str, Tensor]:
    """Items (T,) → ``input_ids`` (N, longest), padded behind with 0, and ``attention_mask``, 1 where there is a token.

    Inputs of a model are ``[:, :-1]``, what it is to predict ``[:, 1:]``: a curriculum cuts such a batch with
    ``truncate_batch(batch, length)``.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(list(items), batch_first=True)
    lengths = torch.tensor([len(item) for item in items])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
