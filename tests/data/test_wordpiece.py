"""WordPiece: vocabularies that come out the same every time, BERT's way of cutting, any text a user may have."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor import Preprocessing
from sparing.data import wordpiece as module
from sparing.data.wordpiece import SPECIAL, WordPiece, read_vocabulary, train_wordpiece

VOCABULARY = (*SPECIAL, "the", "cat", "sat", "un", "##want", "##ed", ",", "runn", "##ing", "😀", "中", "e")


def cut(*texts, **fields):
    return WordPiece(VOCABULARY, **{"max_length": 12, **fields})(list(texts)).tolist()


@pytest.fixture
def texts() -> list[str]:
    """Words of which many pairs of letters are equally frequent."""
    draw = np.random.RandomState(3)
    return [" ".join("".join(draw.choice(list("abcdefghij"), 5)) for _ in range(6)) for _ in range(200)]


def test_special_pieces_come_first_and_words_are_cut_greedily():
    assert cut("The cat, unwanted") == [[2, 5, 6, 11, 8, 9, 10, 3]]
    assert cut("running xyz", "the") == [[2, 12, 13, 1, 3], [2, 5, 3, 0, 0]]


def test_pairs_are_separated():
    assert cut(("the cat", "sat"), "cat") == [[2, 5, 6, 3, 7, 3], [2, 6, 3, 0, 0, 0]]
    made = WordPiece(VOCABULARY)([("the", "cat"), ["the", "cat"]])
    assert made.dtype == np.int64
    assert (made[0] == made[1]).all()


@pytest.mark.parametrize(
    ("one", "other", "kept"),
    [(2, 9, (2, 7)), (9, 2, (7, 2)), (9, 9, (5, 4)), (4, 5, (4, 5)), (5, 9, (5, 4)), (9, 5, (5, 4)), (4, 6, (4, 5))],
)
def test_of_a_pair_the_longer_text_is_cut_first(one, other, kept):
    (row,) = cut(("the " * one, "cat " * other))
    assert (row.count(5), row.count(6)) == kept
    assert len(row) == 12
    lengths = [one, other]  # as if the longer one lost a piece at a time
    while sum(lengths) > 9:
        lengths[lengths[1] >= lengths[0]] -= 1
    assert tuple(lengths) == kept


def test_texts_are_cut_to_the_length():
    assert cut("the " * 50) == [[2, *[5] * 10, 3]]
    assert cut("the " * 50, max_length=3) == [[2, 5, 3]]


def test_lower_case_takes_accents_with_it():
    assert cut("É THE") == [[2, 16, 5, 3]]
    assert cut("É THE", lowercase=False) == [[2, 1, 1, 3]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [2, 3]),
        ("   \t\r\n ", [2, 3]),
        ("\0the\0", [2, 5, 3]),
        ("the\u200bcat", [2, 1, 3]),
        ("the\u00a0cat\u3000sat", [2, 5, 6, 7, 3]),
        ("cat😀", [2, 1, 3]),
        ("cat 😀", [2, 6, 14, 3]),
        ("the中cat", [2, 5, 15, 6, 3]),
        ("[SEP] [MASK]", [2, 1, 1, 1, 1, 1, 1, 3]),
        ("t" * 200, [2, 1, 3]),
        ("e\u0301", [2, 16, 3]),
    ],
)
def test_any_text_has_an_answer(text, expected):
    assert cut(text) == [expected]


def test_a_line_of_ten_megabytes_is_cut_quickly_and_exactly():
    long = "the cat sat " * 850_000
    start = time.process_time()
    assert cut(long) == cut(long[:500])
    assert time.process_time() - start < 3
    assert cut(" " * 70_000 + "cat") == [[2, 6, 3]]


def test_what_is_no_text_is_named():
    for texts, message in (
        (["the", 7], "text 1 is a int; a str is expected"),
        (["the", None], "text 1 is a NoneType"),
        (["the", b"cat"], "text 1 is a bytes"),
        (["a", "b\ud800"], "text 1: character 1 is half of a surrogate pair"),
        ([("a", "b", "c")], "text 0 is a sequence of 3; a str or a pair"),
        ([("a", 3)], "text 0, its second part, is a int"),
    ):
        with pytest.raises(DataError, match=message):
            cut(*texts)
    with pytest.raises(DataError, match="not one str; put it into a list"):
        WordPiece(VOCABULARY)("the cat")


def test_a_vocabulary_is_the_same_in_every_process(texts):
    def digest() -> str:
        program = (
            "import sys, json; from sparing.data.wordpiece import train_wordpiece;"
            "print(json.dumps(train_wordpiece(json.load(sys.stdin), 120)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(texts), capture_output=True, text=True, check=True
        )
        return hashlib.sha256(done.stdout.encode()).hexdigest()

    here = hashlib.sha256((json.dumps(train_wordpiece(texts, 120)) + "\n").encode()).hexdigest()
    assert {digest(), digest(), digest()} == {here}


def test_a_trained_vocabulary_knows_its_texts(texts):
    pieces = train_wordpiece(texts, 120)
    assert pieces[:5] == SPECIAL
    assert len(pieces) == len(set(pieces)) == 120
    assert pieces[5:15] == tuple("abcdefghij")
    assert pieces[15:25] == tuple(f"##{c}" for c in "abcdefghij")
    wordpiece = WordPiece(pieces, 64)
    made = wordpiece(texts)
    assert wordpiece.vocabulary.index("[UNK]") not in made
    assert made.shape[1] < sum(map(len, texts[0].split()))


def test_few_texts_make_few_pieces_and_none_make_none():
    assert train_wordpiece(["a b", "b"], 100) == (*SPECIAL, "a", "b", "##a", "##b")
    assert len(train_wordpiece(["".join(map(chr, range(0x4E00, 0x5600)))], 25)) == 25
    with pytest.raises(DataError, match="2 texts without a word of 1…100 characters"):
        train_wordpiece(["", " \0"])
    with pytest.raises(InvalidValue, match="size = 6; a whole number of pieces in 7"):
        train_wordpiece(["a"], 6)
    with pytest.raises(DataError, match="text 1 is a float"):
        train_wordpiece(["a", 0.5])


def test_words_that_are_too_long_to_be_known_make_no_pieces_and_cost_no_time():
    start = time.process_time()
    pieces = train_wordpiece(["x" * 1_000_000, "the cat " * 3, "y" * 100 + " " + "中" * 300], 40)
    assert time.process_time() - start < 15
    assert "x" not in pieces
    assert {"t", "y", "##yy", "中"} <= set(pieces)
    assert "##中中" not in pieces


def test_ten_thousand_texts_take_seconds(texts):
    wordpiece = WordPiece(train_wordpiece(texts, 500))
    many = [f"{text} {number}" for number in range(50) for text in texts]
    start = time.process_time()
    assert len(wordpiece(many)) == 10_000
    assert time.process_time() - start < 6


def test_it_goes_through_a_config_and_needs_no_torch(tmp_path):
    preprocessing = Preprocessing((WordPiece(VOCABULARY, 9, lowercase=False),))
    config = json.loads(json.dumps(preprocessing.to_config()))
    assert config[0]["operation"] == "wordpiece"
    assert Preprocessing.from_config(config) == preprocessing
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = (
        "import json, sys; from sparing.core.predictor.preprocessing import Preprocessing;"
        f"made = Preprocessing.from_config(json.load(open({str(tmp_path / 'config.json')!r})));"
        "print(made(['the cat', ('sat', 'the')]).tolist());"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules), 'too much is imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == preprocessing(["the cat", ("sat", "the")]).tolist()


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"), r"\[MASK\] is missing from 5 pieces"),
        ((*SPECIAL, "a", "b", "a"), "piece 7 is 'a', as piece 5 is already"),
        ((*SPECIAL, ""), "piece 5 is ''"),
    ],
)
def test_a_vocabulary_must_be_one(vocabulary, message):
    with pytest.raises(DataError, match=message):
        WordPiece(vocabulary)


def test_a_length_must_hold_a_piece():
    with pytest.raises(InvalidValue, match="max_length = 2; a whole number in 3"):
        WordPiece(VOCABULARY, 2)


def test_a_vocabulary_of_bert_is_read(tmp_path):
    path = tmp_path / "vocab.txt"
    pieces = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##é")
    path.write_bytes("\r\n".join(pieces).encode())
    assert read_vocabulary(path) == (pieces, None)
    path.write_text("\n".join(pieces) + "\n", "utf8")
    assert read_vocabulary(path) == (pieces, None)
    assert WordPiece(pieces)(["the x"]).tolist() == [[3, 6, 2, 4]]
    for content, message in (
        (b"[PAD]\n\xff\n", r"vocab.txt: byte 6 is not UTF-8"),
        (b"[PAD]\nthe\n", r"vocab.txt: \[UNK\], \[CLS\], \[SEP\], \[MASK\] is missing from 2 pieces"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_vocabulary(path)


def test_a_tokenizer_file_is_read_and_another_kind_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(VOCABULARY), "utf8")
    theirs = tokenizers.BertWordPieceTokenizer(str(vocab), lowercase=False)
    path = tmp_path / "tokenizer.json"
    theirs.save(str(path))
    pieces, lowercase = read_vocabulary(path)
    assert (pieces, lowercase) == (VOCABULARY, False)
    for text in ("The cat, unwanted 😀", "the中cat running", "é \0 sat", "[CLS] the"):
        ours = WordPiece(pieces, 64, lowercase)([text])[0].tolist()
        assert ours == theirs.encode(text).ids or "[" in text, text
    for change, message in (
        ({"model": {"type": "BPE"}}, r"model and normalizer are \('BPE', 'BertNormalizer'\)"),
        ({"normalizer": None}, r"\('WordPiece', None\)"),
        ({"model": 3}, r"not the tokenizer.json of a WordPiece tokenizer: AttributeError"),
        ({"normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": False}}, "is not that of BERT"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(DataError, match=message):
            read_vocabulary(path)
        theirs.save(str(path))


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"cutting texts into pieces needs the package 'tokenizers': pip install"):
        module.train_wordpiece(["a"])
