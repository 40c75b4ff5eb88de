"""Text classification tasks: splits, vocabulary, figures, corruptions, texts of one's own."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparing
from sparing import TextClassification, Train, load
from sparing.core.errors import DataError, InvalidValue
from sparing.core.recipe import load_recipe
from sparing.core.registry import resolve
from sparing.core.transfer import transfer_model
from sparing.data.text import LabelledTexts
from sparing.tasks.text.corruptions import CORRUPTIONS, missing_letters, missing_words, swapped_letters
from sparing.tasks.text.masked_lm import MaskedLM
from sparing.tasks.text.own import TextFile
from sparing.tasks.text.published import SST2, TREC, AGNews
from sparing.testing import QUICK

PARTS = ("train", "val", "calibration", "test")
SHORT = {"length": 12, "vocab_size": 80}


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Small files in the published layouts."""
    phrases = [f"{'good' if n % 2 else 'bad'} film number {n}\t{n % 2}" for n in range(120)]
    topics = ("World", "Sports", "Business", "Sci/Tech")
    articles = [f"news of day {n} on {topics[n % 4].lower()}\t{topics[n % 4]}" for n in range(160)]
    kinds = ("ABBR\tabb", "DESC\tdef", "ENTY\tfood", "HUM\tind", "LOC\tcity", "NUM\tdate")
    questions = [f"what is question {n} ?\t{kinds[n % 6]}" for n in range(120)]
    for name, lines in (("train", phrases), ("dev", phrases[:20]), ("test", phrases[:10])):
        changed = [line if name == "train" else f"{name} {line}" for line in lines]
        write(tmp_path / "sst2" / f"{name}.tsv.gz", ["sentence\tlabel", *changed])
    write(tmp_path / "ag_news" / "train10k.tsv.gz", ["text\tlabel", *articles])
    write(tmp_path / "ag_news" / "test.tsv.gz", ["text\tlabel", *(f"old {line}" for line in articles[:12])])
    write(tmp_path / "trec" / "train.tsv.gz", ["question\tcoarse\tfine", *questions])
    write(tmp_path / "trec" / "test.tsv.gz", ["question\tcoarse\tfine", *(f"so {line}" for line in questions[:6])])
    return tmp_path


def small(**fields: Any) -> TextClassification:
    texts = [
        f"{'good' if n % 3 == 0 else 'bad' if n % 3 == 1 else 'dull'} film {'very ' * (n % 5)}{n}" for n in range(90)
    ]
    return TextClassification("films", texts, ["gbd"[n % 3] for n in range(90)], **{**SHORT, **fields})


class Oracle:
    """Says the class its answers name for a text, which it knows by its numbers."""

    def __init__(self, split: LabelledTexts, wrong: tuple[int, ...] = ()) -> None:
        self.classes = len(split.class_names)
        self.answers = {
            tuple(ids.tolist()): (label + (index in wrong)) % self.classes for index, (ids, label) in enumerate(split)
        }

    def __call__(self, ids: Any) -> np.ndarray:
        rows = [tuple(number for number in row if number) for row in np.asarray(ids).tolist()]
        return 50 * np.eye(self.classes, dtype=np.float32)[[self.answers[row] for row in rows]]


def test_published_sets_have_their_splits(data_root):
    sizes = {
        "sst2": (SST2(), [54552, 4849, 1213, 7607]),
        "ag_news": (AGNews(), [9000, 801, 200, 7600]),
        "trec": (TREC(), [4906, 437, 109, 500]),
    }
    for name, (task, expected) in sizes.items():
        splits = task.splits(data_root)
        assert [len(getattr(splits, part)) for part in PARTS] == expected, name
        assert len(task.wordpiece.vocabulary) == 8000
        assert max(len(splits.train[i][0]) for i in range(300)) <= task.length
        unknown = sum(int((ids == 1).sum()) for ids, _ in (splits.test[i] for i in range(300)))
        assert unknown < 30
    vocabularies = {task.wordpiece.vocabulary for task, _ in sizes.values()} | {MaskedLM().wordpiece.vocabulary}
    assert len(vocabularies) == 1


def test_limits_and_choices(root):
    both = SST2(train_limit=60, test_limit=12, vocab_size=80).splits(root)
    assert sum(len(getattr(both, part)) for part in PARTS[:3]) == 60
    assert [text.split()[0] for text in both.test.texts] == ["test"] * 10 + ["dev"] * 2
    assert len(SST2(test="official").splits(root).test) == 10
    assert len(SST2(test="held_out").splits(root).test) == 20
    assert TREC(fine=True).labels[-1] == "NUM:weight"
    assert TREC(fine=True).fingerprint() != TREC().fingerprint()
    assert len({SST2().fingerprint(), SST2(test="official").fingerprint(), SST2(length=31).fingerprint()}) == 3
    for part in ("dev", "test"):
        (root / "sst2" / f"{part}.tsv.gz").rename(root / "sst2" / f"{part}.old")
    write(root / "sst2" / "dev.tsv.gz", ["sentence\tlabel", "glue\t1", "stick\t0"])
    assert len(SST2().splits(root).test) == 2
    with pytest.raises(InvalidValue, match=r"test = 'held_out'; .*sst2 has no such part"):
        SST2(test="held_out").splits(root)


def test_the_vocabulary_is_of_the_corpora_named(root, tmp_path):
    own, named = TREC(vocabulary=None, vocab_size=60), TREC(vocabulary="trec", vocab_size=60)
    shared = TREC(vocab_size=120)
    for task in (own, named, shared):
        task.splits(root)
    assert own.wordpiece == named.wordpiece
    assert own.wordpiece != shared.wordpiece
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", "what", "is"]))
    told = TREC(vocabulary=str(file))
    assert told.splits(root).train[0][0][:3].tolist() == [2, 5, 6]
    assert told.model_fields()["vocab_size"] == 7
    (root / "trec" / "vocab.txt").write_text(file.read_text())
    inside = TREC(vocabulary="trec/vocab.txt")
    inside.splits(root)
    assert inside.wordpiece == told.wordpiece


def test_a_missing_corpus_of_the_vocabulary_is_told_with_the_way_out(root):
    (root / "ag_news" / "train10k.tsv.gz").unlink()
    with pytest.raises(
        DataError, match=r"(?s)ag_news/train10k.tsv.gz is missing.*vocabulary of 'trec' is made of: sst2, ag_news. Give"
    ):
        TREC().splits(root)
    assert len(TREC(vocabulary=["sst2"], vocab_size=60).splits(root).test) == 6
    with pytest.raises(DataError, match=r"(?s)the vocabulary 'my_vocab.txt' is neither at.*The vocabulary of 'trec'"):
        TREC(vocabulary="my_vocab.txt").splits(root)


def test_no_word_of_a_test_split_that_is_cut_makes_the_vocabulary():
    texts = [f"film {chr(0x4E00 + n)}" for n in range(40)]
    task = TextClassification("signs", texts, [n % 2 for n in range(40)], length=8)
    splits = task.splits(None)
    tested = {text[-1] for text in splits.test.texts}
    assert not tested & set(task.wordpiece.vocabulary)
    assert {text[-1] for text in splits.train.texts} <= set(task.wordpiece.vocabulary)


def test_figures_are_of_each_text_in_the_order_of_the_split():
    task = small()
    split = task.splits(None).test
    found = task.evaluate(Oracle(split, wrong=(0, 3)), split)
    assert np.flatnonzero(found.per_unit == 0).tolist() == [0, 3]
    assert found.metrics["accuracy"] == pytest.approx(1 - 2 / len(split))
    with pytest.raises(InvalidValue, match="films: the split to evaluate holds no text"):
        task.evaluate(Oracle(split), [])


def test_loss_and_rows_for_distillation():
    task = small()
    batch = task.collate([task.splits(None).train[i] for i in range(4)])
    logits = torch.randn(4, 3)
    assert torch.equal(task.loss(logits, batch), torch.nn.functional.cross_entropy(logits, batch[1]))
    rows, classes = task.class_logits(logits, batch)
    assert rows is logits
    assert torch.equal(classes, batch[1])


def test_what_is_not_given_is_cut_and_what_is_given_is_kept():
    parts = {part: getattr(small().splits(None), part) for part in PARTS}
    assert {part: len(found) for part, found in parts.items()} == {"train": 57, "val": 9, "calibration": 6, "test": 18}
    assert len({text for found in parts.values() for text in found.texts}) == 90
    given = small(test=(["good film", "😀"], ["g", "b"]), val=(["x"], ["d"])).splits(None)
    assert given.test.texts == ["good film", "😀"]
    assert given.test.labels.tolist() == [2, 0]
    assert (len(given.val), len(given.train), len(given.calibration)) == (1, 84, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 7}, r"films: length = 7; a whole number in 8"),
        ({"vocab_size": 6}, "films: vocab_size = 6"),
        ({"vocabulary": []}, r"films: vocabulary = \[\]; names of corpora"),
        ({"vocabulary": [3]}, r"films: vocabulary = \[3\]"),
        ({"lowercase": 1}, "films: lowercase = 1"),
        ({"test_share": 1.0}, "films: test_share = 1.0"),
        ({"test_share": 0.6, "val_share": 0.5}, r"films: test_share \+ val_share \+ calibration_share = 1.1"),
        ({"test": (["a"], [])}, "films test: 1 texts and 0 labels"),
        ({"test": (["a"], ["z"])}, "films test: text 0 has the label 'z'; one of b, d, g is expected"),
        ({"val": (["a", 4], ["b", "b"])}, "films val: text 1 is a int"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises((InvalidValue, DataError), match=message):
        small(**change)


def test_too_few_texts_and_one_class_are_refused():
    with pytest.raises(DataError, match=r"one: the 2 labels are all \['1'\]"):
        TextClassification("one", ["a", "b"], [1, 1])
    with pytest.raises(DataError, match="two: 2 training texts of 2 classes leave none for the split 'test'"):
        TextClassification("two", ["a", "b"], [0, 1]).splits(None)
    for name, fields, message in (
        ("sst2", {"test": "dev"}, "sst2: test = 'dev'"),
        ("trec", {"fine": "yes"}, "trec: fine = 'yes'"),
        ("ag_news", {"train_limit": 0}, "ag_news: train_limit = 0"),
    ):
        with pytest.raises(InvalidValue, match=message):
            resolve("tasks", name)(**fields)


def test_odd_texts_get_an_answer():
    texts = ["", "\0", "😀" * 50, "x" * 100_000, "a b " * 50_000, "\u202eright to left"] * 6
    task = TextClassification("odd", texts, [n % 2 for n in range(36)], length=10, vocab_size=60)
    splits = task.splits(None)
    batch = task.collate([splits.train[i] for i in range(len(splits.train))])
    assert task.default_model().eval()(batch[0]).isfinite().all()
    for worse in task.corruptions(splits.test).values():
        assert len(worse[0][0]) >= 2


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_changes_some_words_and_no_other(name):
    text = "the charming and often affecting journey of wonderful people ends , at last , in 1984"
    worse = CORRUPTIONS[name](text, 5)
    assert worse == CORRUPTIONS[name](text, 5)
    assert len({CORRUPTIONS[name](text, index) for index in range(20)}) > 5
    for short in ("", "a", " \0 "):
        assert CORRUPTIONS[name](short, 0) == short
    before, after = text.split(), worse.split()
    if name == "missing_words":
        assert len(after) == len(before) - 2
        places = iter(before)
        assert all(word in places for word in after), "another word, or another order"
    else:
        changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
        assert len(changed) == 2  # a fifth of the eight words of four letters or more
        for one, other in changed:
            assert len(one) >= 4
            assert (one[0], one[-1]) == (other[0], other[-1])
            assert len(one) - len(other) == (name == "missing_letters")
            assert name == "missing_letters" or sorted(one) == sorted(other)


def test_corruptions_can_be_as_strong_as_one_likes():
    text = "wonderful charming journey"
    assert all(a != b for a, b in zip(text.split(), swapped_letters(text, 0, 1.0).split(), strict=True))
    assert len(missing_letters(text, 0, 1.0)) == len(text) - 3
    assert len(missing_words(text, 0, 0.67).split()) == 1
    assert swapped_letters("aaaa", 0) == "aaaa"


def test_a_corrupted_split_is_made_once_and_a_foreign_one_has_none():
    task = small()
    test = task.splits(None).test
    assert list(task.corruptions(test)) == ["swapped_letters", "missing_letters", "missing_words"]
    assert task.corruptions(test)["missing_words"] is task.corruptions(test)["missing_words"]
    assert task.corruptions([(torch.zeros(3), 1)]) == {}


def table(path: Path, rows: int = 60, header: str = "review,stars") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(f'"{"fine" if n % 2 else "poor"}, film {n}",{n % 2 + 4}' for n in range(rows))]
    path.write_text("\n".join(lines))
    return path


def test_a_file_of_ones_own(tmp_path):
    task = TextFile(str(table(tmp_path / "a.csv")), text="review", label="stars", **SHORT)
    splits = task.splits(None)
    assert task.labels == ("4", "5")
    assert task.name == "text_file:a.csv"
    assert {part: len(getattr(splits, part)) for part in PARTS} == {"train": 38, "val": 6, "calibration": 4, "test": 12}
    assert TextFile("a.csv", text="review", label="stars").splits(tmp_path).train.texts == splits.train.texts
    folder = tmp_path / "set"
    table(folder / "train.csv")
    table(folder / "test.csv", 4)
    table(folder / "dev.csv", 6)
    given = TextFile(str(folder), text="review", label="stars", **SHORT).splits(None)
    assert (len(given.test), len(given.val), len(given.train)) == (4, 6, 56)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: None, r"text_file: path = '.*a.csv': neither .*a.csv exists"),
        (lambda at: at.write_text("text,label\na,1\nb,\n"), "a.csv:3: the label is empty"),
        (lambda at: at.write_text("text,label\na,1\nb,1\n"), "a.csv: all 2 labels are '1'; at least two"),
        (lambda at: at.write_text("text,stars\na,1\n"), r"a.csv:1: no column 'label'. Columns: 'text', 'stars'"),
        (lambda at: at.mkdir(), "a.csv: no file train.tsv"),
        (
            lambda at: (table(at / "train.csv", 9, "text,label"), table(at / "train.tsv", 9)),
            r"train.tsv and .*train.csv both are the split 'train'",
        ),
        (
            lambda at: (table(at / "train.csv", 9, "text,label"), (at / "test.csv").write_text("text,label\na,7\n")),
            r"test.csv:2: the label '7'. One of 4, 5 is expected",
        ),
    ],
)
def test_what_is_wrong_in_files_of_ones_own_is_named(make, message, tmp_path):
    place = tmp_path / "a.csv"
    make(place)
    with pytest.raises(DataError, match=message):
        TextFile(str(place)).splits(None)


def test_a_saved_model_answers_raw_texts_in_a_process_without_torch(tmp_path):
    model = {"name": "bert", "dim": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    steps = [Train(epochs=12, batch_size=16, lr=0.01), sparing.Export()]
    done = sparing.run(task=small(), model=model, steps=steps, meter=QUICK, out=tmp_path / "out")
    trained, exported = done.ledger.rows
    assert trained.figures["accuracy"].value > 0.6  # of 18 texts, of three classes
    assert {f"accuracy under {name}" for name in CORRUPTIONS} <= set(trained.figures)
    assert exported.figures["latency p50 with preprocessing"].value is not None
    folder, texts = done.folder / "model", ["a good film", "", "bad bad film 😀"]
    program = (
        "import json, sys, sparing;"
        f"made = sparing.load({str(folder)!r}).predict(json.loads(sys.argv[1]));"
        "print(json.dumps(made.tolist()));"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, json.dumps(texts)], capture_output=True, text=True, check=True
    )
    train = small().splits(None).train
    assert (load(folder).predict(train.texts).argmax(1) == train.labels).mean() > 0.9
    expected = load(folder).predict(texts)
    np.testing.assert_allclose(json.loads(told.stdout), expected, rtol=1e-5)
    assert expected.shape == (3, 3)
    for length in (1, 3, 12):
        assert load(folder)(np.ones((2, length), np.int64)).shape == (2, 3)
    with pytest.raises(DataError, match="text 1 is a float"):
        load(folder).predict(["a", 0.5])


def test_a_recipe_is_planned_on_the_data_folder_it_is_given(root, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARING_DATA", str(tmp_path / "elsewhere"))
    recipe = tmp_path / "texts.yaml"
    recipe.write_text(
        "task: {name: masked_lm, length: 16, vocab_size: 90, copies: 1}\n"
        "model: {name: bert, dim: 16, depth: 1, heads: 2}\n"
        "steps:\n"
        "  - train: {id: pretrain, epochs: 1}\n"
        "  - transfer: {task: {name: trec, vocab_size: 90}}\n"
        "  - train: {id: finetune, epochs: 1}\n"
    )
    planned = sparing.plan(recipe, data=root)
    assert [step.step.id for step in planned.steps] == ["pretrain", "transfer", "finetune"]
    done = sparing.run(
        load_recipe(recipe, ["meter.memory=false", "meter.min_seconds=0", "meter.max_seconds=0.01"]), data=root
    )
    assert [row.task for row in done.ledger.rows] == ["masked_lm", "trec", "trec"]
    with pytest.raises(
        sparing.RecipeError, match=r"texts.yaml:2: model bert: .*elsewhere/sst2/train.tsv.gz is missing"
    ):
        sparing.plan(recipe)


def test_a_published_model_is_trained_further_on_its_own_vocabulary(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "dull", "film", "very"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *"0123456789", *(f"##{digit}" for digit in range(10))]))
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        num_labels=3,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    task = small(vocabulary=str(tmp_path / "vocab.txt"))
    model = sparing.from_transformers(tmp_path)
    assert (model.embeddings.sep_id, model.pad_id) == (task.wordpiece.sep_id, task.wordpiece.pad_id) == (4, 0)
    steps = [Train(epochs=30, batch_size=16, lr=0.01)]
    done = sparing.run(task=task, model=model, steps=steps, meter=QUICK, out=tmp_path / "out")
    assert done.ledger.rows[0].figures["accuracy"].value > 0.6  # of 18 texts, of three classes
    train = task.splits(None).train
    answers = load(done.folder / "model").predict(train.texts).argmax(1)
    assert (answers == train.labels).mean() > 0.9


def test_a_pretrained_trunk_goes_from_task_to_task(root):
    language = MaskedLM(length=16, vocab_size=90)
    language.splits(root)
    torch.manual_seed(0)
    model = sparing.build_model("bert", language, dim=16, depth=2, heads=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task in (SST2(vocab_size=90), AGNews(vocab_size=90), TREC(vocab_size=90, length=24)):
        task.splits(root)
        moved, begun = transfer_model(model, language, task)
        assert begun == ["head.classifier"]
        kept = {name: tensor for name, tensor in moved.state_dict().items() if not name.startswith("head.")}
        assert len(kept) == len(before) - 5
        assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
        back, again = transfer_model(moved, task, language)
        assert sorted(again) == ["head", "head.dense", "head.norm"]
        assert torch.equal(back.embeddings.words.weight, before["embeddings.words.weight"])
