"""A user's own table of texts as a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparing.core.errors import DataError, InvalidValue
from sparing.data.root import cut_shares, data_root, own_splits
from sparing.data.text import Labelled, read_labelled, read_table
from sparing.tasks.text.base import PIECES
from sparing.tasks.text.classification import ClassifiedTexts

SUFFIXES = (".tsv", ".csv", ".tsv.gz", ".csv.gz")


class TextFile(ClassifiedTexts):
    """Your own texts: a TSV or CSV file with a column of texts and one of labels, or a folder train/val/test of such.

    The first line names the columns. A folder holds ``train.tsv`` (or ``.csv``, gzipped or not), and ``val`` and
    ``test`` where there are. What a split lacks is cut from the training texts, the same on every run. Classes are the
    labels of the training file in sorted order.

    Args:
        path: the file or folder; a relative one is looked for from the working folder, then from the data root.
        text: name of the column of texts.
        label: name of the column of labels.
        quoted: whether a field that begins with a quotation mark ends with one, as spreadsheets write them.
        length: most word pieces of an input; longer texts are cut.
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or ``tokenizer.json``; None: the training texts.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
        test_share: share of each class for the test split, when there is no test file.
        val_share: share of each class for validation, when there is no val file.
        calibration_share: share of each training class for calibration.
    """

    name = "text_file"

    def __init__(
        self,
        path: str,
        text: str = "text",
        label: str = "label",
        quoted: bool = True,
        length: int = 64,
        vocabulary: str | Sequence[str] | None = None,
        vocab_size: int = PIECES,
        lowercase: bool = True,
        test_share: float = 0.2,
        val_share: float = 0.1,
        calibration_share: float = 0.05,
    ) -> None:
        super().__init__(length, vocabulary, vocab_size, lowercase)
        if not isinstance(quoted, bool):
            raise InvalidValue(f"text_file: quoted = {quoted!r}; true or false is expected")
        self.path, self.text, self.label, self.quoted = str(path), str(text), str(label), quoted
        self.shares = cut_shares(self.name, test=test_share, val=val_share, calibration=calibration_share)
        self.name = f"text_file:{Path(path).name}"
        self._parts: dict[Path, tuple[tuple[str, ...], dict[str, Labelled]]] = {}

    def _files(self, root: Path) -> dict[str, Path]:
        expected = "a TSV or CSV file with a column of texts and one of labels, or a folder with such files,"
        return own_splits("text_file", self.path, root, expected, SUFFIXES)

    def _tables(self, root: Path) -> tuple[tuple[str, ...], dict[str, Labelled]]:
        """(classes, the parts there are files of); read once for each data folder."""
        if root not in self._parts:
            files = self._files(root)
            found, lines = read_table(files["train"], (self.label,), self.quoted)
            for (name,), line in zip(found, lines, strict=True):
                if not name.strip():
                    raise DataError(f"{files['train']}:{line}: the label is empty; the name of a class is expected")
            classes = tuple(sorted({name for (name,) in found}))
            if len(classes) < 2:
                raise DataError(
                    f"{files['train']}: all {len(found)} labels are {classes[0]!r}; at least two classes are expected"
                )
            numbers = {name: number for number, name in enumerate(classes)}
            parts = {
                split: read_labelled(file, numbers, self.text, self.label, self.quoted) for split, file in files.items()
            }
            self._parts[root] = (classes, parts)
        return self._parts[root]

    def read(self, root: Path) -> Mapping[str, Labelled]:
        """The parts there are files of."""
        return self._tables(root)[1]

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Labels of the training file, sorted."""
        return self._tables(data_root(self._root))[0]

    def definition(self) -> dict[str, Any]:
        """With the columns; the texts themselves are fingerprinted with the splits."""
        return {**super().definition(), "columns": [self.text, self.label, self.quoted]}
