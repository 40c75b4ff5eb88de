"""Readers of text corpora and tables, and the dataset they become."""

from __future__ import annotations

import gzip
import pickle

import numpy as np
import pytest
import torch

from sparing.core.errors import DataError
from sparing.core.fingerprint import fingerprint
from sparing.data.catalogue import check, listing
from sparing.data.text import (
    CORPORA,
    TREC_FINE_LABELS,
    LabelledTexts,
    Texts,
    pad_texts,
    read_ag_news,
    read_corpus,
    read_labelled,
    read_lines,
    read_sst2,
    read_table,
    read_text,
    read_trec,
    vocabulary_of,
)
from sparing.data.wordpiece import SPECIAL, WordPiece

WORDPIECE = WordPiece((*SPECIAL, "good", "bad", "film", "##s"), 8)


def write(path, content, packed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_gives_the_columns_asked_for(tmp_path, packed):
    path = write(tmp_path / "a.tsv.gz", 'label\ttext\tid\n1\t"a ""b""\nc"\t7\n0\t\t8\n', packed)
    assert read_table(path, ("text", "label")) == ([['a "b"\nc', "1"], ["", "0"]], [2, 4])
    found = read_labelled(path, {"0": 0, "1": 1})
    assert found.texts == ['a "b"\nc', ""]
    assert found.labels.tolist() == [1, 0]
    write(path, 'text\tlabel\n"a\t1\n\'b"\t0\n', packed)
    assert read_table(path, ("text",), quoted=False)[0] == [['"a'], ["'b\""]]
    comma = write(tmp_path / "b.csv", '\ufefftext,label\r\n"x,y",1\r\n', packed)
    assert read_table(comma, ("text", "label")) == ([["x,y", "1"]], [2])
    assert read_table(write(tmp_path / "c.tsv", "1\ta\n2\tb\n"))[0] == [["1", "a"], ["2", "b"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text\tlabels\na\t1\n",
            r"t.tsv:1: no column 'label'. Did you mean 'labels'\? Columns: 'text', 'labels'",
        ),
        ("text\tlabel\na\t1\nb\n", "t.tsv:3: 1 columns; 2 are expected"),
        ("text\tlabel\na\t1\tb\n", "t.tsv:2: 3 columns; 2 are expected"),
        ("text\tlabel\na\t1\nb\tpositive\n", r"t.tsv:3: the label 'positive'. One of 0, 1 is expected"),
        ('text\tlabel\n"a\nb"\t1\nc\t2\n', r"t.tsv:4: the label '2'"),
        ('text\tlabel\na\t1\n"b\t0\n', "t.tsv:3: unexpected end of data"),
        (b"text\tlabel\na\t1\n\xff\t0\n", "t.tsv:3: the byte 0xff is not UTF8"),
        ("text\tlabel\n", "t.tsv: holds no row"),
        ("", "t.tsv: holds no row"),
        (gzip.compress(b"text\tlabel\na\t1\n" * 99, mtime=0)[:-20], "t.tsv: cannot be read: Compressed file ended"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path / "t.tsv", content), {"0": 0, "1": 1})


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.tsv", tmp_path):
        with pytest.raises(DataError, match=f"{path}: cannot be read"):
            read_text(path)


def test_nul_bytes_and_long_lines_are_read(tmp_path):
    long = "x" * 3_000_000
    path = write(tmp_path / "t.tsv", f"text\tlabel\na\0b 😀\t1\n{long}\t0\n")
    assert read_labelled(path, {"0": 0, "1": 1}).texts == ["a\0b 😀", long]


def test_sst2_is_read_as_it_is_distributed_and_as_in_glue(tmp_path):
    folder = tmp_path / "sst2"
    write(folder / "train.tsv.gz", 'sentence\tlabel\ngood " film\t1\n', packed=True)
    write(folder / "dev.tsv.gz", "sentence\tlabel\nbad\t0\n", packed=True)
    write(folder / "test.tsv.gz", "sentence\tlabel\nbad film\t0\ngood\t1\n", packed=True)
    assert read_sst2(tmp_path, "train").texts == ['good " film']
    assert read_sst2(tmp_path, "held_out").texts == ["bad"]
    assert read_sst2(tmp_path, "official").labels.tolist() == [0, 1]
    write(folder / "test.tsv.gz", "index\tsentence\n0\tgood\n", packed=True)
    assert read_sst2(tmp_path, "official").texts == ["bad"]
    assert read_sst2(tmp_path, "held_out").texts == []
    (folder / "test.tsv.gz").unlink()
    assert read_sst2(tmp_path, "official").texts == ["bad"]
    (folder / "train.tsv.gz").unlink()
    with pytest.raises(DataError, match=r"sst2/train.tsv.gz is missing. Place it there.*a folder that holds sst2"):
        read_sst2(tmp_path, "train")


def test_ag_news_is_read_in_both_forms(tmp_path):
    folder = tmp_path / "ag_news"
    write(folder / "train.csv", '"3","Shares ""up""","Today, a lot"\n"1","War","ends"\n')
    found = read_ag_news(tmp_path, "train")
    assert found.texts == ['Shares "up" Today, a lot', "War ends"]
    assert found.labels.tolist() == [2, 0]
    write(folder / "test.tsv.gz", 'text\tlabel\n"a ""b"""\tSci/Tech\n', packed=True)
    found = read_ag_news(tmp_path, "test")
    assert (found.texts, found.labels.tolist()) == (['a "b"'], [3])
    write(folder / "train.csv", '"5","a","b"\n')
    with pytest.raises(DataError, match=r"train.csv:1: the label '5'. One of 1, 2, 3, 4 is expected"):
        read_ag_news(tmp_path, "train")
    write(folder / "train.csv", '"1","a"\n')
    with pytest.raises(DataError, match=r"train.csv:1: 2 columns; class, title and description"):
        read_ag_news(tmp_path, "train")


def test_trec_is_read_in_both_forms(tmp_path):
    folder = tmp_path / "trec"
    write(folder / "train.tsv", 'question\tcoarse\tfine\nWho ?\tHUM\tind\nWhy " ?\tDESC\treason\n')
    assert read_trec(tmp_path, "train").labels.tolist() == [3, 1]
    assert [TREC_FINE_LABELS[n] for n in read_trec(tmp_path, "train", fine=True).labels] == ["HUM:ind", "DESC:reason"]
    write(folder / "TREC_10.label", "LOC:city Where is K\xf6ln ?\n".encode("latin-1"))
    assert read_trec(tmp_path, "test").texts == ["Where is Köln ?"]
    write(folder / "TREC_10.label", "LOC Where ?\n")
    with pytest.raises(DataError, match=r"TREC_10.label:1: 'LOC Where \?'; COARSE:fine"):
        read_trec(tmp_path, "test")


def test_lines_and_documents(tmp_path):
    assert read_lines(write(tmp_path / "a.txt.gz", "one\n\n two \n", packed=True)) == ["one", " two "]
    assert read_lines(write(tmp_path / "a.jsonl", '{"text": "one\\ntwo"}\n\n{"text": "x"}\n')) == ["one\ntwo", "x"]
    for content, message in (
        ('{"text": "x"}\n{"txt": 1}\n', "a.jsonl:2: KeyError"),
        ('{"text": 3}\n', "a.jsonl:1: the value of 'text' is a int"),
        ('{"text": "\\ud800"}\n', "a.jsonl:1: the value of 'text': character 0 is half"),
        ("{\n", "a.jsonl:1: JSONDecodeError"),
        ("\n", "a.jsonl: holds no text"),
    ):
        with pytest.raises(DataError, match=message):
            read_lines(write(tmp_path / "a.jsonl", content))


def test_a_corpus_is_named_or_a_file(tmp_path):
    write(tmp_path / "lm_text" / "tinyshakespeare.txt", "To be\n")
    write(tmp_path / "mine.txt", "or not\n")
    assert read_corpus("tinyshakespeare", tmp_path) == ["To be"]
    assert read_corpus("mine.txt", tmp_path) == read_corpus(str(tmp_path / "mine.txt"), None) == ["or not"]
    with pytest.raises(
        DataError, match=r"the corpus 'sst3' is neither one of sst2, ag_news, trec.*Did you mean 'sst2'"
    ):
        read_corpus("sst3", tmp_path)


def test_the_real_corpora_have_their_published_sizes(data_root):
    assert [len(read_sst2(data_root, part).texts) for part in ("train", "held_out", "official")] == [60614, 6735, 872]
    assert np.bincount(read_sst2(data_root, "official").labels).tolist() == [428, 444]
    assert [len(read_ag_news(data_root, part).texts) for part in ("train", "test")] == [10001, 7600]
    assert np.bincount(read_ag_news(data_root, "test").labels).tolist() == [1900] * 4
    assert [len(read_trec(data_root, part).texts) for part in ("train", "test")] == [5452, 500]
    fine = read_trec(data_root, "train", fine=True).labels
    assert sorted(set(fine.tolist())) == list(range(50))
    assert all(len(read_corpus(name, data_root)) > 100 for name in CORPORA)


def test_the_catalogue_knows_them(data_root, tmp_path):
    assert {"sst2", "ag_news", "trec"} <= {line.name for line in listing(data_root) if line.present}
    assert check("trec", data_root).splits == {"train": 5452, "test": 500}
    found = check("sst2", tmp_path)
    assert not found.ok
    assert f"{tmp_path}/sst2/train.tsv.gz is missing" in found.problem


def dataset(**changes):
    source = Texts(["good films", "bad", "", "film 😀"], WORDPIECE)
    return LabelledTexts(source, np.array([1, 0, 0, 1]), ("no", "yes"), **changes)


def test_items_are_numbers_of_each_texts_own_length():
    data = dataset()
    assert [ids.tolist() for ids, _ in data] == [[2, 5, 7, 8, 3], [2, 6, 3], [2, 3], [2, 7, 1, 3]]
    assert [label for _, label in data] == [1, 0, 0, 1]
    assert data[-1][0].tolist() == data[3][0].tolist()
    ids, labels = pad_texts([data[0], data[2]], 0)
    assert ids.tolist() == [[2, 5, 7, 8, 3], [2, 3, 0, 0, 0]]
    assert (labels.tolist(), ids.dtype, labels.dtype) == ([1, 0], torch.int64, torch.int64)
    part = data.subset([3, 1])
    assert (part.texts, part.labels.tolist()) == (["film 😀", "bad"], [1, 0])
    again = pickle.loads(pickle.dumps(part))  # noqa: S301 - our own
    assert again[0][0].tolist() == part[0][0].tolist()


def test_a_dataset_is_known_by_its_content():
    same, other = fingerprint(dataset()), dataset()
    assert fingerprint(other) == same
    assert len({same, fingerprint(other.subset([0, 1])), fingerprint(other.corrupted("x", lambda t, i: t + "s"))}) == 3
    shorter = Texts(other.texts, WordPiece(WORDPIECE.vocabulary, 7))
    assert fingerprint(LabelledTexts(shorter, other.labels, ("no", "yes"))) != same


def test_corrupted_texts_keep_their_labels():
    worse = dataset().subset([1, 0]).corrupted("numbered", lambda text, index: f"{text} {index}")
    assert (worse.texts, worse.labels.tolist()) == (["bad 0", "good films 1"], [0, 1])


def test_a_dataset_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="texts: text 1 is a int"):
        Texts(["a", 1], WORDPIECE)
    with pytest.raises(DataError, match="record 0 has the label 2; 0…1"):
        LabelledTexts(Texts(["a"], WORDPIECE), np.array([2]), ("no", "yes"))
    with pytest.raises(DataError, match="no text; at least one"):
        dataset(rows=[])
    with pytest.raises(IndexError, match="text 4 of 4"):
        dataset()[4]


def test_a_vocabulary_is_made_once_for_equal_texts(monkeypatch):
    made = []
    monkeypatch.setattr("sparing.data.text.train_wordpiece", lambda *given: made.append(given) or SPECIAL)
    texts = ["only here, once", "and once more"]
    assert vocabulary_of(texts, 50, True) == vocabulary_of(list(texts), 50, True) == SPECIAL
    vocabulary_of(texts, 51, True)
    assert len(made) == 2
