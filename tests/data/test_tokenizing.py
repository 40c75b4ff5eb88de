"""Characters and byte pairs: the same vocabulary every time, any text, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.data.tokenizing import END, BytePairs, Characters, train_byte_pairs

TEXTS = ["the cat sat on the mat", "the hat\nthat the cat had", "Ünïcödé – 猫 and 🐈"] * 3


@pytest.fixture(scope="module")
def pairs() -> BytePairs:
    return BytePairs(*train_byte_pairs(TEXTS, 280), max_length=6, begin=True)


def test_characters_have_the_numbers_of_the_vocabulary():
    made = Characters((END, "a", "b", "\n"), max_length=4)
    assert made(["ab\nba", "b"]).tolist() == [[1, 2, 3, 2], [2, 0, 0, 0]]
    assert [ids.tolist() for ids in made.encode(["ab\nba", ""])] == [[1, 2, 3, 2, 1], []]
    assert made.characters.tolist() == [0, 1, 1, 1]
    begun = dataclasses.replace(made, begin=True)
    assert begun(["", "abab"]).tolist() == [[0, 0, 0, 0], [0, 1, 2, 1]]
    with pytest.raises(DataError, match="text 1 is empty; at least one character"):
        made(["a", ""])
    with pytest.raises(DataError, match=r"text 1, character 2: 'z' is none of the 4 characters"):
        made(["a", "abz"])
    with pytest.raises(InvalidValue, match=f"the vocabulary has no '{END}'".replace("|", r"\|")):
        _ = Characters(("a",)).end_id


def test_byte_pairs_are_the_same_every_time_and_hold_any_text(pairs: BytePairs):
    vocabulary, merges = train_byte_pairs(iter(TEXTS), 280)
    assert (vocabulary, merges) == (pairs.vocabulary, pairs.merges)
    assert vocabulary[0] == END
    assert len(vocabulary) == 280 == 257 + len(merges)
    assert "Ġthe" in vocabulary  # the most frequent word, its space before it
    texts = [*TEXTS[:3], "", "\0\r\n", END, "زن 😀 never seen"]
    for text, ids in zip(texts, pairs.encode(texts), strict=True):
        assert pairs.characters[ids].sum() == len(text)
        assert not (ids == pairs.end_id).any()
    (the,) = pairs.encode([" the"])
    assert [vocabulary[number] for number in the] == ["Ġthe"]


def test_byte_pairs_are_cut_and_padded(pairs: BytePairs):
    long, short, empty = pairs([TEXTS[0], "the", ""]).tolist()
    assert len(long) == 6
    assert long[1:] == pairs.encode([TEXTS[0]])[0][:5].tolist()
    assert short == [0, *pairs.encode(["the"])[0].tolist(), *[0] * (5 - len(pairs.encode(["the"])[0]))]
    assert empty == [0] * 6


def test_operations_travel_with_a_model(pairs: BytePairs):
    for operation in (pairs, Characters(("a", "ß", "\n"), 5)):
        made = Preprocessing((operation,))
        again = Preprocessing.from_config(made.to_config())
        assert again == made
        assert np.array_equal(again(["aß\n"]), made(["aß\n"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pairs: Characters(()), "at least one"),
        (lambda pairs: Characters(("a", "a")), "a token is twice in the vocabulary of 2"),
        (lambda pairs: Characters(("ab",)), "'ab' in the vocabulary is not one character"),
        (lambda pairs: Characters(("a",), begin=True), "is missing from the vocabulary"),
        (lambda pairs: Characters(("a",), 0), "max_length = 0"),
        (lambda pairs: dataclasses.replace(pairs, vocabulary=(END, *pairs.vocabulary[2:])), "the byte '!' is missing"),
        (lambda pairs: dataclasses.replace(pairs, merges=("a",)), "merge 'a'; two tokens"),
        (lambda pairs: dataclasses.replace(pairs, merges=("Q Q",)), "merge 'Q Q'; two tokens"),
        (lambda pairs: dataclasses.replace(pairs, begin=2), "begin = 2"),
        (lambda pairs: train_byte_pairs(TEXTS, 257), "size = 257; a whole number of tokens in 258…"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_vocabulary_can_be(make, message, pairs):
    with pytest.raises(InvalidValue, match=message):
        make(pairs)


def test_what_is_no_text(pairs: BytePairs):
    for wrong, message in ((["a", 3], "text 1 is a int"), (["\ud800"], "text 0: character 0 is half of a surrogate")):
        with pytest.raises(DataError, match=message):
            pairs(wrong)
    with pytest.raises(DataError, match="not one str; put it into a list"):
        pairs("abc")
    with pytest.raises(DataError, match="2 texts without a character"):
        train_byte_pairs(["", ""])
