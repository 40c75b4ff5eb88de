"""The reader of SQuAD v1.1, in its official layout and word-tokenised."""

from __future__ import annotations

import copy
import gzip
import json

import pytest

from sparing.core.errors import DataError
from sparing.data.squad import read_squad

OFFICIAL = {
    "version": "1.1",
    "data": [
        {
            "title": "Cats",
            "paragraphs": [
                {
                    "context": "A cat sat, 50 years.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Who sat?",
                            "answers": [{"text": "A cat", "answer_start": 0}, {"text": "cat", "answer_start": 2}],
                        }
                    ],
                }
            ],
        }
    ],
}
TOKENISED = {
    "contexts": ["A cat sat .", "It ran"],
    "examples": [[0, "Who ?", 1, 1], [1, "What ?", 0, 1], [0, "Nothing ?", 3, 2]],
}


def write(path, content, packed=False):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_both_layouts_are_read(tmp_path, packed):
    (one,) = read_squad(write(tmp_path / "a.json", OFFICIAL, packed))
    assert (one.id, one.question, one.context) == ("q1", "Who sat?", "A cat sat, 50 years.")
    assert one.answers == (("A cat", 0), ("cat", 2))
    first, second = read_squad(write(tmp_path / "b.json", TOKENISED, packed))
    assert (first.answers, second.answers) == ((("cat", 2),), (("It ran", 0),))
    assert (first.context, second.id) == ("A cat sat .", "1")


def changed(*path, value):
    made = copy.deepcopy(OFFICIAL)
    at = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return made


QA = ("data", 0, "paragraphs", 0, "qas", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json: is no JSON"),
        ([], 'neither "data" nor "contexts"'),
        ({"data": []}, "holds no question"),
        (changed("data", 0, "paragraphs", value=3), r"data\[0\]: 'paragraphs' is 3; a list is expected"),
        (changed("data", 0, value={}), r"data\[0\]: has no 'paragraphs'"),
        (changed(*QA, "id", value=7), r"data\[0\].paragraphs\[0\].qas\[0\]: 'id' is 7; a str"),
        (changed(*QA, "answers", value=[]), r"qas\[0\]: has no answer"),
        (
            changed(*QA, "answers", 1, "answer_start", value=3),
            r"qas\[0\].answers\[1\]: 'cat' does not stand at character 3",
        ),
        (changed(*QA, "answers", 1, "answer_start", value=-18), "'cat' does not stand at character -18"),
        (changed(*QA, "answers", 0, "answer_start", value=True), "'answer_start' is True; a int"),
        ({**TOKENISED, "examples": [[2, "a", 0, 0]]}, r"examples\[0\]: the context 2; 0…1"),
        ({**TOKENISED, "examples": [[0, "a", 0, 4]]}, r"examples\[0\]: the tokens 0…4; a span in 0…3"),
        ({**TOKENISED, "examples": [[0, "a", 3, 1]]}, r"examples\[0\]: the tokens 3…1"),
        ({**TOKENISED, "examples": [[0, "a"]]}, r"examples\[0\]: has no 2"),
        ({**TOKENISED, "contexts": [1, 2]}, "0 is 1; a str is expected"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_squad(write(tmp_path / "a.json", content))


def test_the_real_files_have_their_published_sizes(data_root):
    folder = data_root / "squad_v1_1_subset"
    found = {path.name.split(".")[0]: read_squad(path) for path in sorted(folder.glob("*.json.gz"))}
    assert {name: len(questions) for name, questions in found.items()} == {
        "dev_240_paragraphs": 1190,
        "dev_super_bowl_50": 810,
        "train_notre_dame": 269,
        "train_sample_tokenized": 4284,  # of 4,285 one has an empty answer
    }
    ids = [{question.id for question in found[name]} for name in ("dev_240_paragraphs", "dev_super_bowl_50")]
    assert len(ids[0] & ids[1]) == 74
    for questions in found.values():
        for question in questions:
            for text, start in question.answers:
                assert question.context[start : start + len(text)] == text
