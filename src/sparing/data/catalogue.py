"""The published data sets Sparing reads: which there are, what lies in the data root, and whether it is sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparing.core.errors import SparingError, UnknownName, did_you_mean
from sparing.core.files import sha256_of
from sparing.data.cifar import CIFAR10, CIFAR100, read_cifar10, read_cifar100
from sparing.data.hflights import HFLIGHTS
from sparing.data.hflights import split_of as flights_of
from sparing.data.idx import FASHION_MNIST, read_fashion_mnist
from sparing.data.node_tables import TABLES
from sparing.data.node_tables import split_of as table_split_of
from sparing.data.planetoid import CITESEER, CORA, split_of
from sparing.data.root import Source, data_root, fetch_files
from sparing.data.sequences import TINY_SHAKESPEARE, US_ADDRESSES, read_tiny_shakespeare, read_us_addresses
from sparing.data.squad import SQUAD, Question, read_published
from sparing.data.text import AG_NEWS, SST2, TREC, read_ag_news, read_sst2, read_trec
from sparing.data.tu import TU_SETS
from sparing.data.tu import split_of as tu_split_of

Reader = Callable[[Path, bool], tuple[Any, np.ndarray]]
"""(data root, train?) → (images uint8 (N, H, W, C), numbers of nodes, graphs or rows (N,), or N texts; labels (N,), or
numbers)."""

READERS: dict[str, tuple[Source, Reader]] = {
    FASHION_MNIST.name: (FASHION_MNIST, read_fashion_mnist),
    CIFAR10.name: (CIFAR10, read_cifar10),
    CIFAR100.name: (CIFAR100, read_cifar100),
    **{graph.source.name: (graph.source, partial(split_of, graph.source.name)) for graph in (CORA, CITESEER)},
    **{name: (tu.source, partial(tu_split_of, name)) for name, tu in TU_SETS.items()},
    **{name: (table.source, partial(table_split_of, name)) for name, table in TABLES.items()},
    SST2.name: (SST2, lambda root, train: read_sst2(root, "train" if train else "official")),
    AG_NEWS.name: (AG_NEWS, lambda root, train: read_ag_news(root, "train" if train else "test")),
    TREC.name: (TREC, lambda root, train: read_trec(root, "train" if train else "test")),
    HFLIGHTS.name: (HFLIGHTS, flights_of),
    SQUAD.name: (SQUAD, lambda root, train: _numbered(read_published(root, train))),
    TINY_SHAKESPEARE.name: (TINY_SHAKESPEARE, lambda root, train: _characters(read_tiny_shakespeare(root), train)),
    US_ADDRESSES.name: (US_ADDRESSES, lambda root, train: _characters(read_us_addresses(root), train)),
}


def _numbered(questions: list[Question]) -> tuple[list[str], np.ndarray]:
    """Their texts, and their numbers in place of labels."""
    return [question.question for question in questions], np.arange(len(questions))


def _characters(documents: dict[str, list[str]], train: bool) -> tuple[list[str], np.ndarray]:
    """Texts of the test split, or of all others, and numbers of their characters in place of labels."""
    texts = [text for name, texts in documents.items() if (name == "test") != train for text in texts]
    return texts, np.arange(sum(map(len, texts)))


@dataclass(frozen=True)
class Listed:
    """One line of ``sparing data list``."""

    name: str
    summary: str
    licence: str
    folder: str
    present: bool
    """Whether its file, or a folder with anything in it, is there; ``check`` reads it."""


@dataclass(frozen=True)
class Checked:
    """What ``sparing data check`` found: records of each split, files with digests, or what is wrong."""

    name: str
    ok: bool
    splits: dict[str, int]
    files: dict[str, str]
    """File → "as published", or "readable, SHA-256 …" for another packing of the content."""
    problem: str = ""


def _known(name: str) -> tuple[Source, Reader]:
    if name not in READERS:
        raise UnknownName(
            f"unknown data set {name!r}.{did_you_mean(name, READERS)} Known: {', '.join(sorted(READERS))}"
        )
    return READERS[name]


def listing(root: Path | str | None = None) -> list[Listed]:
    """All data sets Sparing has a reader for, and whether the data root has a folder for each."""
    base = data_root(root)
    lines = []
    for source, _ in READERS.values():
        folder = str(source.folder(base))
        lines.append(Listed(source.name, source.summary, source.licence, folder, source.present(base)))
    return lines


def check(name: str, root: Path | str | None = None) -> Checked:
    """Read a data set whole, and compare the digests of its files with the published ones."""
    source, read = _known(name)
    base = data_root(root)
    splits: dict[str, int] = {}
    try:
        for split in ("train", "test"):
            splits[split] = len(read(base, split == "train")[1])
    except SparingError as error:
        return Checked(name, False, splits, {}, str(error))
    files = {}
    for file in source.files:
        path = source.folder(base) / file.name
        if path.is_file():
            digest = sha256_of(path)
            files[file.name] = "as published" if digest == file.sha256 else f"readable, SHA-256 {digest}"
    if source.place:
        files[source.path(base).name] = f"readable, SHA-256 {sha256_of(source.path(base))}"
    return Checked(name, True, splits, files)


def fetch(name: str, root: Path | str | None = None) -> list[Path]:
    """Download what is missing of a data set into the data root; resumes, and checks every digest."""
    source, _ = _known(name)
    return fetch_files(source, data_root(root))
