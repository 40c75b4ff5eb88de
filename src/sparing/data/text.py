"""Readers of published text corpora and of tables of texts, and the dataset they become.

A reader gives raw texts and class numbers; what is wrong in a file is refused with the file and the line.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparing.core.errors import DataError, did_you_mean, shown
from sparing.core.files import canonical_json
from sparing.core.fingerprint import fingerprint
from sparing.data.images import check_labels
from sparing.data.root import Source, data_root
from sparing.data.wordpiece import WordPiece, checked_text, train_wordpiece

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 1 << 30
"""Most bytes of a text file, unpacked."""

TextCorruption = Callable[[str, int], str]
"""(text, its index in the split) → a text."""


class Labelled(NamedTuple):
    """Texts and the class of each."""

    texts: list[str]
    labels: np.ndarray
    """int64 (N,)."""


def read_text(path: Path, encoding: str = "utf8") -> str:
    """A text file, gzipped or plain, whole; :class:`DataError` names the file, and the line where it is not text."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(content)) as packed:
                content = packed.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}; a text file, gzipped or plain, is expected") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: more than the {MAX_BYTES} bytes that a text file may have")
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: the byte 0x{content[error.start]:02x} is not {encoding.upper()}") from error


def read_table(
    path: Path, columns: Sequence[str] | None = None, quoted: bool = True
) -> tuple[list[list[str]], list[int]]:
    """(rows, the line each begins in) of a TSV or CSV file, gzipped or plain.

    Args:
        path: ``….csv[.gz]`` is separated by commas, anything else by tabs.
        columns: names the first line must hold; rows then have these columns, in this order. None: there is no such
            line.
        quoted: whether a field that begins with a quotation mark ends with one, and may hold separators and line ends.
    """
    text = read_text(path)
    csv.field_size_limit(MAX_BYTES)
    comma = Path(path.name.removesuffix(".gz")).suffix.lower() == ".csv"
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="," if comma else "\t",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=quoted,
    )
    rows: list[list[str]] = []
    lines: list[int] = []
    header: list[str] | None = None
    before = 0
    try:
        for row in reader:
            line, before = before + 1, reader.line_num
            if not row:
                continue
            if columns is not None and header is None:
                header = row
                if missing := [name for name in columns if name not in header]:
                    raise DataError(
                        f"{path}:{line}: no column {missing[0]!r}.{did_you_mean(missing[0], header)} "
                        f"Columns: {', '.join(map(repr, header))[:500]}"
                    )
                places = [header.index(name) for name in columns]
                continue
            wanted = len(header) if header is not None else len(rows[0]) if rows else len(row)
            if len(row) != wanted:
                raise DataError(f"{path}:{line}: {len(row)} columns; {wanted} are expected, as in the line before")
            rows.append([row[place] for place in places] if columns is not None else row)
            lines.append(line)
    except csv.Error as error:
        raise DataError(f"{path}:{before + 1}: {error}; a table of one row a line is expected") from error
    if not rows:
        raise DataError(f"{path}: holds no row; at least one is expected")
    return rows, lines


def read_labelled(
    path: Path,
    classes: Mapping[str, int],
    text: str = "text",
    label: str = "label",
    quoted: bool = True,
) -> Labelled:
    """The columns ``text`` and ``label`` of a table; ``classes`` maps what stands in the file to a class number."""
    rows, lines = read_table(path, (text, label), quoted)
    return Labelled([row[0] for row in rows], _numbers(path, [row[1] for row in rows], lines, classes))


def _numbers(path: Path, found: Sequence[str], lines: Sequence[int], classes: Mapping[str, int]) -> np.ndarray:
    for name, line in zip(found, lines, strict=True):
        if name not in classes:
            raise DataError(
                f"{path}:{line}: the label {shown(name)}.{did_you_mean(name, classes)} "
                f"One of {', '.join(classes)[:500]} is expected"
            )
    return np.array([classes[name] for name in found], np.int64)


def first_of(folder: Path, names: Sequence[str], how: str) -> Path:
    """The first of ``names`` there is in ``folder``; else :class:`DataError` that says what belongs there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder / names[0]} is missing. {how}")


def _with_gz(*names: str) -> list[str]:
    return [packed for name in names for packed in (f"{name}.gz", name)]


SST2_LABELS = ("negative", "positive")
SST2 = Source(
    "sst2",
    "Phrases of film reviews with their sentiment (Socher et al. 2013, in GLUE's form)",
    "research; check the treebank's terms",
    "https://gluebenchmark.com/tasks",
    (),
    made="train, dev and test (.tsv, gzipped or not) with the columns sentence and label (1 is positive) belong into "
    "{path}; GLUE's SST-2 is read too: of its files, dev is the test split.",
)


def read_sst2(root: Path, split: str) -> Labelled:
    """SST-2's "train", "held_out" (more training phrases) or "official" (GLUE's development set) part under ``root``.

    Folders are read as they are distributed with three labelled files, where "test" is the official development set,
    and as GLUE's, where "dev" is that, there is no held-out part and "test" has no labels.
    """
    folder = root / "sst2"
    how = SST2.how_to_place(root)
    test = next((folder / name for name in _with_gz("test.tsv") if (folder / name).is_file()), None)
    glue = test is None or "label" not in read_text(test).split("\n", 1)[0].rstrip("\r").split("\t")
    if split == "held_out" and glue:
        return Labelled([], np.zeros(0, np.int64))
    name = {"train": "train.tsv", "held_out": "dev.tsv", "official": "dev.tsv" if glue else "test.tsv"}[split]
    return read_labelled(first_of(folder, _with_gz(name), how), {"0": 0, "1": 1}, "sentence", quoted=False)


AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS = Source(
    "ag_news",
    "News articles on four topics (Zhang, Zhao and LeCun 2015)",
    "non-commercial, research",
    "http://groups.di.unipi.it/~gulli/AG_corpus_of_news_articles.html",
    (),
    made="train10k.tsv.gz and test.tsv.gz with the columns text and label belong into {path}; or the published "
    "train.csv and test.csv (class 1…4, title, description).",
)


def read_ag_news(root: Path, split: str) -> Labelled:
    """AG News: the "train" or "test" part under ``root``; from the published CSV, a text is title and description."""
    folder, how = root / "ag_news", AG_NEWS.how_to_place(root)
    tables = ["train10k.tsv", "train.tsv"] if split == "train" else ["test.tsv"]
    path = first_of(folder, [*_with_gz(*tables), *_with_gz(f"{split}.csv")], how)
    if ".csv" not in path.suffixes:
        return read_labelled(path, {name: number for number, name in enumerate(AG_NEWS_LABELS)})
    rows, lines = read_table(path)
    if len(rows[0]) != 3:
        raise DataError(f"{path}:{lines[0]}: {len(rows[0])} columns; class, title and description are expected")
    classes = {str(number + 1): number for number in range(4)}
    return Labelled([f"{row[1]} {row[2]}" for row in rows], _numbers(path, [row[0] for row in rows], lines, classes))


TREC_LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
TREC_FINE_LABELS = tuple(
    f"{coarse}:{fine}"
    for coarse, fines in (
        ("ABBR", "abb exp"),
        ("DESC", "def desc manner reason"),
        (
            "ENTY",
            "animal body color cremat currency dismed event food instru lang letter other plant product religion sport "
            "substance symbol techmeth termeq veh word",
        ),
        ("HUM", "desc gr ind title"),
        ("LOC", "city country mount other state"),
        ("NUM", "code count date dist money ord other perc period speed temp volsize weight"),
    )
    for fine in fines.split()
)
TREC = Source(
    "trec",
    "Questions by what they ask for, 6 coarse and 50 fine classes (Li and Roth 2002)",
    "research",
    "https://cogcomp.seas.upenn.edu/Data/QA/QC/",
    (),
    made="train.tsv.gz and test.tsv.gz with the columns question, coarse and fine belong into {path}; or the "
    "published train_5500.label and TREC_10.label.",
)


def read_trec(root: Path, split: str, fine: bool = False) -> Labelled:
    """TREC: the "train" or "test" part under ``root``, with 6 classes or, if ``fine``, 50."""
    folder, how = root / "trec", TREC.how_to_place(root)
    published = {"train": "train_5500.label", "test": "TREC_10.label"}[split]
    path = first_of(folder, _with_gz(f"{split}.tsv", published), how)
    if ".label" not in path.suffixes:
        rows, lines = read_table(path, ("question", "coarse", "fine"), quoted=False)
    else:
        rows, lines = [], []
        for line, content in enumerate(read_text(path, "latin-1").splitlines(), 1):
            label, _, question = content.partition(" ")
            coarse, colon, kind = label.partition(":")
            if not colon:
                raise DataError(f"{path}:{line}: {shown(content, 60)}; COARSE:fine and a question are expected")
            rows.append([question, coarse, kind])
            lines.append(line)
    names = TREC_FINE_LABELS if fine else TREC_LABELS
    found = [f"{row[1]}:{row[2]}" if fine else row[1] for row in rows]
    classes = {name: number for number, name in enumerate(names)}
    return Labelled([row[0] for row in rows], _numbers(path, found, lines, classes))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank; of ``….jsonl`` the value ``text`` of each line's object."""
    texts = []
    jsonl = Path(path.name.removesuffix(".gz")).suffix == ".jsonl"
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        if not jsonl:
            texts.append(line)
            continue
        try:
            texts.append(checked_text(json.loads(line)["text"], f"{path}:{number}: the value of 'text'"))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}:{number}: {error!r}; an object with the key "text" is expected') from error
    if not texts:
        raise DataError(f"{path}: holds no text; at least one line is expected")
    return texts


LM_FILES = {
    "tinyshakespeare": "tinyshakespeare.txt",
    "wikitext2": "wikitext2_valid.txt",
    "us_addresses": "us_addresses.jsonl",
}

CORPORA: dict[str, Callable[[Path], list[str]]] = {
    "sst2": lambda root: read_sst2(root, "train").texts,
    "ag_news": lambda root: read_ag_news(root, "train").texts,
    "trec": lambda root: read_trec(root, "train").texts,
    **{
        name: lambda root, file=file: read_lines(  # type: ignore[misc]  # the file is bound now, not when it is called
            first_of(root / "lm_text", _with_gz(file), "A text file, gzipped or plain, belongs there.")
        )
        for name, file in LM_FILES.items()
    },
}
"""Name → its training texts under a data root."""


def read_corpus(name: str, root: Path | None) -> list[str]:
    """The training texts of a named corpus, or the lines of a text file (``.txt``, ``.jsonl``, gzipped or not)."""
    if name in CORPORA:
        return CORPORA[name](data_root(root))
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [path, data_root(root) / path]
    for place in places:
        if place.is_file():
            return read_lines(place)
    raise DataError(
        f"the corpus {name!r} is neither one of {', '.join(CORPORA)} nor a file that exists "
        f"({' or '.join(map(str, places))}).{did_you_mean(name, CORPORA)}"
    )


_TRAINED: dict[tuple[str, int, bool], tuple[str, ...]] = {}


def vocabulary_of(texts: Sequence[str], size: int, lowercase: bool) -> tuple[str, ...]:
    """What :func:`sparing.data.wordpiece.train_wordpiece` makes of ``texts``, kept until the process ends."""
    key = (fingerprint(list(texts)), size, lowercase)
    if key not in _TRAINED:
        _TRAINED[key] = train_wordpiece(texts, size, lowercase)
    return _TRAINED[key]


class Texts:
    """Raw texts and their numbers, cut once when they are first asked for."""

    def __init__(self, texts: Sequence[str], wordpiece: WordPiece, where: str = "texts") -> None:
        self.texts, self.wordpiece, self.where = list(texts), wordpiece, where
        for index, text in enumerate(self.texts):
            checked_text(text, f"{where}: text {index}")

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def ids(self) -> list[np.ndarray]:
        """For each text the pieces' numbers, int64 (its length,)."""
        return [np.array(numbers, np.int64) for numbers in self.wordpiece.encode(self.texts)]

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint([self.texts, dataclasses.asdict(self.wordpiece)])

    def fingerprint(self) -> str:
        """By content, computed once."""
        return self._fingerprint


class LabelledTexts:
    """Map-style dataset of ``(numbers of pieces int64 (T,), label)``, T being each text's own length.

    Args:
        source: the texts.
        labels: class of each text, integers (N,) in 0…len(class_names) − 1.
        class_names: name of each class.
        rows: the texts of the source this dataset holds, in its order; None: all.
        where: what messages call this data.
    """

    def __init__(
        self,
        source: Texts,
        labels: np.ndarray,
        class_names: Sequence[str],
        rows: np.ndarray | None = None,
        where: str = "texts",
    ) -> None:
        self.source = source
        self.all_labels = check_labels(labels, len(source), class_names, where)
        self.class_names = tuple(class_names)
        self.rows = np.arange(len(source)) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(self.rows) == 0:
            raise DataError(f"{where}: no text; at least one is expected")
        self.where = where
        self._views: dict[str, LabelledTexts] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """The class of each text, int64 (len,)."""
        return self.all_labels[self.rows]

    @property
    def texts(self) -> list[str]:
        """The raw texts, as a predictor's ``predict`` takes them."""
        return [self.source.texts[row] for row in self.rows]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import torch

        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        row = self.rows[index]
        return torch.from_numpy(self.source.ids[row]), int(self.all_labels[row])

    def subset(self, indices: Sequence[int] | np.ndarray) -> LabelledTexts:
        """The texts at ``indices``, sharing this dataset's memory."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        return LabelledTexts(self.source, self.all_labels, self.class_names, rows, self.where)

    def corrupted(self, name: str, corruption: TextCorruption) -> LabelledTexts:
        """The same labels with ``corruption`` of each text; made once for each name."""
        if name not in self._views:
            worse = [corruption(text, index) for index, text in enumerate(self.texts)]
            source = Texts(worse, self.source.wordpiece, f"{self.where} with {name}")
            self._views[name] = LabelledTexts(source, self.labels, self.class_names, where=source.where)
        return self._views[name]

    @cached_property
    def _fingerprint(self) -> str:
        parts = [
            self.source.fingerprint(),
            fingerprint([self.labels, self.rows]),
            canonical_json(list(self.class_names)),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes with any text, label, class name or piece of the vocabulary; computed once."""
        return self._fingerprint


def pad_texts(items: Sequence[tuple[Tensor, int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Items ``(ids (T,), label)`` → (ids int64 (N, longest), padded behind with ``pad_id``; labels int64 (N,))."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = zip(*items, strict=True)
    return pad_sequence(list(ids), batch_first=True, padding_value=pad_id), torch.tensor(labels)
