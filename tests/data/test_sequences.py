"""Windows and rows of tokens, batches of them, and how documents are read and shared out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparing.core.errors import DataError, InvalidValue
from sparing.core.fingerprint import fingerprint
from sparing.data.sequences import (
    Sequences,
    cut_documents,
    cut_tail,
    pad_sequences,
    read_corpus_of,
    read_documents,
    read_tiny_shakespeare,
    read_us_addresses,
)
from sparing.data_efficiency.postprocessing import reshape_batch, trim_batch, truncate_batch


def listed(data: Sequences) -> list[list[int]]:
    return [data[i].tolist() for i in range(len(data))]


def test_windows_share_one_token_with_the_next():
    ids = np.arange(11, dtype=np.int32)
    assert listed(Sequences.windows(ids, 4)) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert listed(Sequences.windows(ids[:9], 4)) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert [row[0] for row in listed(Sequences.windows(ids, 4, 3))] == [0, 3, 6]
    assert len(Sequences.windows(ids, 4, 1)) == 7
    assert len(Sequences.windows(ids[:4], 4)) == 0
    item = Sequences.windows(ids, 4)[-1]
    assert item.dtype == torch.int64
    with pytest.raises(IndexError, match="sequence 2 of 2"):
        Sequences.windows(ids, 4)[2]


def test_rows_are_cut_and_those_without_a_prediction_left_out():
    rows = [np.arange(n) for n in (3, 1, 0, 9, 2)]
    data = Sequences.rows(rows, 4)
    assert listed(data) == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1]]
    assert listed(data.first(2)) == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert len(data.first(None)) == 3
    assert len(Sequences.rows([np.arange(1)], 4)) == 0
    assert fingerprint(data) == fingerprint(Sequences.rows(rows, 4)) != fingerprint(data.first(2))


def test_what_no_sequences_can_be():
    cases = (([0], [1, 2], "both"), ([0, 3], [2, 4], "sequence 1 has less than 2"), ([0], [6], "outside of 5 tokens"))
    for starts, ends, message in cases:
        with pytest.raises(InvalidValue, match=message):
            Sequences(np.arange(5), np.array(starts), np.array(ends))


def test_batches_can_be_cut_by_a_curriculum():
    batch = pad_sequences([torch.arange(5), torch.arange(3)])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert {name: tuple(part.shape) for name, part in truncate_batch(batch, 2).items()} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 3),
    }
    assert reshape_batch(batch, 2)["input_ids"].shape == (4, 3)
    wide = {name: torch.nn.functional.pad(part, (0, 4)) for name, part in batch.items()}
    trimmed = trim_batch(wide, multiple=1)
    assert all(torch.equal(trimmed[name], batch[name]) for name in batch)


def test_files_become_documents(tmp_path: Path):
    (tmp_path / "one.txt").write_text("line one\n\nline two\n", "utf8")
    with gzip.open(tmp_path / "more.jsonl.gz", "wt", encoding="utf8") as file:
        file.write("\n".join(json.dumps({"text": text, "n": 1}) for text in ("a\nb", "  ", "c")))
    assert read_documents(tmp_path / "one.txt") == ["line one\n\nline two\n"]
    assert read_documents(tmp_path / "more.jsonl.gz") == ["a\nb", "c"]
    assert read_corpus_of("task", str(tmp_path), tmp_path) == {"train": ["a\nb", "c", "line one\n\nline two\n"]}
    assert read_corpus_of("task", "one.txt", tmp_path) == {"train": ["line one\n\nline two\n"]}
    with pytest.raises(DataError, match=r"neither .* exists; a text file, a JSONL file, or a folder"):
        read_corpus_of("task", "two.txt", tmp_path)
    (tmp_path / "val.txt").write_text("v")
    with pytest.raises(DataError, match=r"val\.txt is there without train\.txt"):
        read_corpus_of("task", str(tmp_path), tmp_path)
    (tmp_path / "train.txt").write_text("t")
    assert read_corpus_of("task", str(tmp_path), tmp_path) == {"train": ["t"], "val": ["v"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: holds no text"),
        ("blank.txt", b" \n\t", "holds no text"),
        ("no.jsonl", b"", r"no\.jsonl: holds no text"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"bad\.jsonl:2: .*an object with the key"),
        ("latin.txt", b"a\n\xe9", r"latin\.txt:2: the byte 0xe9 is not UTF8"),
        ("cut.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_files_that_hold_no_documents(name, content, message, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name)


def test_documents_are_shared_out_whole():
    documents = [str(n) for n in range(40)]
    parts = cut_documents(documents, {"val": 0.05, "test": 0.1})
    assert {name: len(part) for name, part in parts.items()} == {"train": 34, "val": 2, "test": 4}
    assert sorted((d for part in parts.values() for d in part), key=int) == documents
    assert parts == cut_documents(documents, {"val": 0.05, "test": 0.1})
    with pytest.raises(DataError, match=r'2 documents for train, val, test; at least 3 are needed, or split: "tail"'):
        cut_documents(documents[:2], {"val": 0.05, "test": 0.1})


def test_the_tail_is_of_all_characters():
    parts = cut_tail(["abcdef", "ghij"], {"val": 0.2, "test": 0.3})
    assert parts == {"train": ["abcde"], "val": ["f", "g"], "test": ["hij"]}
    assert "".join(piece for pieces in parts.values() for piece in pieces) == "abcdefghij"


def test_the_published_sets(data_root: Path):
    plays = read_tiny_shakespeare(data_root)
    assert {name: len(texts[0]) for name, texts in plays.items()} == {
        "train": 948_084,
        "calibration": 11_154,
        "val": 44_616,
        "test": 111_540,
    }
    addresses = read_us_addresses(data_root)
    assert {name: len(texts) for name, texts in addresses.items()} == {
        "train": 93,
        "val": 12,
        "calibration": 6,
        "test": 13,
    }
    assert addresses["test"][0].startswith("Fellow-Citizens of the Senate")
    with pytest.raises(DataError, match=r"tinyshakespeare\.txt\.gz is missing"):
        read_tiny_shakespeare(data_root / "lm_text")
