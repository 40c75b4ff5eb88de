"""Language modelling: samples, figures, a model that learns and is asked again, and corpora that cannot be used."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparing
from sparing.core.errors import DataError, InvalidValue
from sparing.data.tokenizing import END, BytePairs, Characters
from sparing.tasks.text.language_modelling import TextCorpus, score_texts
from sparing.testing import QUICK

SMALL = {"name": "gpt", "dim": 16, "depth": 2, "heads": 2}


def corpus(path: Path, count: int = 40, lines: int = 5) -> str:
    """JSONL of documents in which every second letter follows from the one before it."""
    draw = np.random.RandomState(0)
    documents = [
        "\n".join("".join(f"{c}{c.upper()}" for c in draw.choice(list("abcde"), 4 + row % 5)) for row in range(lines))
        for _ in range(count)
    ]
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents), "utf8")
    return str(path)


def task(folder: Path, **fields: Any) -> TextCorpus:
    return TextCorpus(corpus(folder / "letters.jsonl"), **{"length": 16, "level": "characters", **fields})


class Uniform:
    """The same logits for every token."""

    def __init__(self, size: int, value: float = 0.0) -> None:
        self.size, self.value = size, value

    def __call__(self, ids: Any) -> np.ndarray:
        return np.full((*np.shape(ids), self.size), self.value, np.float32)


def test_documents_are_packed_with_a_token_between_them(tmp_path: Path):
    made = task(tmp_path)
    splits, vocabulary = made.splits(None), made.tokens.vocabulary
    assert vocabulary == (END, "\n", *"ABCDEabcde")
    texts = made.documents(tmp_path)
    stream = [number for i in range(len(splits.train)) for number in splits.train[i][:-1].tolist()]
    whole = END.join(texts["train"])
    spelt = "".join(vocabulary[number] for number in stream)
    assert len(whole) - 200 < len(spelt) <= len(whole)
    assert whole.startswith(spelt)
    assert {len(splits.train[i]) for i in range(len(splits.train))} == {17}
    assert [len(texts[name]) for name in ("train", "val", "calibration", "test")] == [33, 2, 1, 4]
    assert not set(texts["train"]) & {text for name in ("val", "calibration", "test") for text in texts[name]}
    assert len(task(tmp_path, stride=4).splits(None).train) == pytest.approx(4 * len(splits.train), abs=4)
    assert len(task(tmp_path, stride=4).splits(None).test) == len(splits.test)
    few = task(tmp_path, train_limit=3, test_limit=2).splits(None)
    assert (len(few.train), len(few.test)) == (3, 2)


def test_a_sample_for_each_line_or_document(tmp_path: Path):
    made = task(tmp_path, samples="lines", length=12)
    splits, texts = made.splits(None), made.documents(tmp_path)
    lines = [line for text in texts["train"] for line in text.split("\n")]
    assert len(splits.train) == len(lines) == 5 * len(texts["train"])
    assert splits.train[0].tolist() == [0, *made.tokens.encode([lines[0]])[0]]
    assert max(len(splits.train[i]) for i in range(len(lines))) == 13  # cut
    batch = made.collate([splits.train[i] for i in range(5)])
    assert batch["attention_mask"].sum(1).tolist() == [len(splits.train[i]) for i in range(5)]
    whole = task(tmp_path, samples="documents", length=64)
    assert len(whole.splits(None).test) == 4
    assert whole.preprocessing(["", "aA"]).tolist() == [[0, 0, 0], [0, *whole.tokens.encode(["aA"])[0]]]


def test_the_tail_of_one_long_text(tmp_path: Path):
    (tmp_path / "one.txt").write_text("abcdefghij" * 200)
    made = TextCorpus(str(tmp_path / "one.txt"), length=8, level="characters")
    assert made.tokens.vocabulary == tuple("abcdefghij")
    assert {name: len(texts[0]) for name, texts in made.documents(tmp_path).items()} == {
        "train": 1660,
        "calibration": 40,
        "val": 100,
        "test": 200,
    }
    pairs = TextCorpus(str(tmp_path / "one.txt"), length=8, vocab_size=262)
    assert isinstance(pairs.tokens, BytePairs)
    assert len(pairs.tokens.vocabulary) == 262


def test_padding_counts_for_nothing(tmp_path: Path):
    made = task(tmp_path, samples="lines")
    made.splits(None)
    batch = made.collate([torch.tensor([0, 3, 4, 5]), torch.tensor([0, 6])])
    outputs = torch.randn(2, 3, 12)
    rows, tokens = made.class_logits(outputs, batch)
    assert torch.equal(rows, torch.cat([outputs[0], outputs[1, :1]]))
    assert tokens.tolist() == [3, 4, 5, 6]
    expected = torch.nn.functional.cross_entropy(rows, tokens)
    torch.testing.assert_close(made.loss(outputs, batch), expected)
    changed = outputs.clone()
    changed[1, 1:] += torch.randn(2, 12)
    torch.testing.assert_close(made.loss(changed, batch), expected)


@pytest.mark.parametrize("fields", [{}, {"samples": "lines"}, {"level": "byte_pairs", "vocab_size": 270}])
def test_figures_are_over_tokens(fields: dict[str, Any], tmp_path: Path):
    made = task(tmp_path, **fields)
    split, size = made.splits(None).test, len(made.tokens.vocabulary)
    found = made.evaluate(Uniform(size), split)  # type: ignore[arg-type]
    predicted = np.concatenate([split[i][1:].numpy() for i in range(len(split))])
    assert found.metrics["loss"] == pytest.approx(math.log(size))
    assert found.metrics["perplexity"] == pytest.approx(size)
    characters = made.tokens.characters[predicted].sum()
    assert found.metrics["bits_per_character"] == pytest.approx(len(predicted) * math.log2(size) / characters)
    assert found.per_unit is not None
    assert found.per_unit.shape == predicted.shape


def test_units_stay_in_the_order_of_the_split(tmp_path: Path):
    made = task(tmp_path, samples="lines")
    split, size = made.splits(None).test, len(made.tokens.vocabulary)
    favour = np.linspace(0, 1, size)

    def predictor(ids: Any) -> np.ndarray:
        return np.tile(favour.astype(np.float32), (*np.shape(ids), 1))

    found = made.evaluate(predictor, split).per_unit  # type: ignore[arg-type]
    predicted = np.concatenate([split[i][1:].numpy() for i in range(len(split))])
    np.testing.assert_allclose(found, np.log(np.exp(favour).sum()) - favour[predicted], rtol=1e-5)


def test_outputs_that_are_no_logits(tmp_path: Path):
    made = task(tmp_path)
    split, size = made.splits(None).test, len(made.tokens.vocabulary)
    with pytest.raises(InvalidValue, match=rf"outputs of shape \(.*, 11\); logits \(.*, {size}\)"):
        made.evaluate(Uniform(11), split)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="the output for unit 0 is not finite"):
        made.evaluate(Uniform(size, np.nan), split)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="holds no sample"):
        made.evaluate(Uniform(size), split.first(0))  # type: ignore[arg-type]


def test_a_model_learns_and_the_saved_one_scores_texts(tmp_path: Path):
    made = task(tmp_path, samples="lines", length=20)
    done = sparing.run(
        task=made,
        model=SMALL,
        steps=[sparing.Train(epochs=6, batch_size=16, lr=0.03)],
        meter=QUICK,
        out=tmp_path / "out",
    )
    loss = done.ledger.rows[-1].figures["loss"].value
    assert loss < 0.75 * math.log(12)
    predictor = sparing.load(tmp_path / "out" / "model")
    assert predictor.predict(["aAbB", "e"]).shape == (2, 5, 12)
    texts = ["aAbBcC", "aBbCcA", "aAbBcC" * 10]
    found = sparing.score_texts(predictor, texts)
    assert found.tokens.tolist() == [6, 6, 60]
    assert found.log_probability[0] > found.log_probability[1] + 3
    np.testing.assert_allclose(score_texts(predictor, texts, 1).log_probability, found.log_probability, rtol=1e-4)
    lines = [line for text in made.documents(tmp_path)["test"] for line in text.split("\n")]
    scored = score_texts(predictor, lines)
    assert -scored.log_probability.sum() / scored.tokens.sum() == pytest.approx(loss, rel=1e-4)
    with pytest.raises(DataError, match="text 1, character 1: 'z' is none of the 12 characters"):
        score_texts(predictor, ["a", "az"])
    with pytest.raises(InvalidValue, match="a list of at least one text"):
        score_texts(predictor, [])
    with pytest.raises(InvalidValue, match="batch_size = 0"):
        score_texts(predictor, ["a"], 0)
    code = (
        "import sys; sys.modules['torch'] = None; import sparing; print(sparing.score_texts(sparing.load(sys.argv[1]), "
    )
    code += "['aAbBcC', 'aBbCcA'])[0].tolist())"
    alone = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out" / "model")], capture_output=True, text=True, check=True
    )
    np.testing.assert_allclose(json.loads(alone.stdout), found.log_probability[:2], rtol=1e-4)


def test_a_text_longer_than_the_model_is_read_in_windows(tmp_path: Path):
    made = task(tmp_path)
    made.splits(None)

    class Model(Uniform):
        preprocessing = made.preprocessing

    found = score_texts(Model(12), ["aAbB" * 10, "a"])  # type: ignore[arg-type]
    assert found.tokens.tolist() == [39, 0]  # nothing is known before a first character
    np.testing.assert_allclose(found.log_probability, [-39 * math.log(12), 0.0], rtol=1e-6)
    with pytest.raises(DataError, match="text 0 is empty"):
        score_texts(Model(12), [""])  # type: ignore[arg-type]

    class Other:
        preprocessing = None

    with pytest.raises(InvalidValue, match="the predictor of a language model is needed"):
        score_texts(Other(), ["a"])  # type: ignore[arg-type]


def test_distilling_compares_the_tokens_that_count(tmp_path: Path):
    made = task(tmp_path, samples="lines", train_limit=32, test_limit=8)
    done = sparing.run(
        task=made,
        model=SMALL,
        steps=[
            sparing.Train(id="first", epochs=1, batch_size=16),
            sparing.Distil(teacher="first", model={**SMALL, "dim": 8}, epochs=1, batch_size=16),
        ],
        meter=QUICK,
    )
    assert [row.step for row in done.ledger.rows] == ["train", "distil"]
    assert done.ledger.rows[1].figures["parameters"].value < done.ledger.rows[0].figures["parameters"].value


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("ab" * 200, {"length": 32}, r"tokens of the split '\w+' are fewer than a window of length \+ 1 = 33"),
        ("", {}, r"corpus\.txt: holds no text"),
        ("   \n  ", {}, "holds no text"),
        ("abc", {"length": 4}, "no text is left for the split 'val'"),
        ("a b c d e f g h", {"split": "documents"}, "1 documents for train, calibration, val, test"),
    ],
    ids=["short", "empty", "blank", "three", "one"],
)
def test_corpora_that_cannot_be_used(text: str, fields: dict[str, Any], message: str, tmp_path: Path):
    (tmp_path / "corpus.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        TextCorpus(str(tmp_path / "corpus.txt"), **{"level": "characters", **fields}).splits(None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 3}, "length = 3; a whole number in 4…8192"),
        ({"level": "words"}, "level = 'words'; one of characters, byte_pairs"),
        ({"samples": "rows"}, "samples = 'rows'; one of windows, lines, documents"),
        ({"vocab_size": 100}, "vocab_size = 100; a whole number in 258…"),
        ({"stride": 17}, "stride = 17; a whole number in 1…16"),
        ({"stride": 4, "samples": "lines"}, 'stride = 4 is for samples = "windows"'),
        ({"split": "head"}, "split = 'head'; one of documents, tail"),
        ({"test_share": 1.0}, "test_share = 1.0"),
        ({"train_limit": 0}, "train_limit = 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_fields(fields: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InvalidValue, match=message):
        task(tmp_path, **fields)


def test_own_test_files_are_used(tmp_path: Path):
    (tmp_path / "train.txt").write_text("abcdefgh" * 100)
    (tmp_path / "test.txt").write_text("hgfedcba!" * 10)
    made = TextCorpus(str(tmp_path), length=8, level="characters")
    splits = made.splits(None)
    assert made.documents(tmp_path)["test"] == ["hgfedcba!" * 10]
    assert isinstance(made.tokens, Characters)
    assert "!" in made.tokens.vocabulary  # which characters there are is known from all files
    assert len(splits.test) == 11
    assert made.fingerprint() != TextCorpus(str(tmp_path), length=9, level="characters").fingerprint()
