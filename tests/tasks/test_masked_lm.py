"""Masked language modelling: packing, hiding, figures, and that something is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparing
from sparing import Train
from sparing.core.errors import DataError, InvalidValue
from sparing.core.fingerprint import fingerprint
from sparing.core.task import IGNORED
from sparing.data.wordpiece import SPECIAL, WordPiece
from sparing.tasks.text.masked_lm import MaskedLM, MaskedTexts, mask_pieces, pack_texts, pad_masked
from sparing.testing import QUICK

WORDPIECE = WordPiece((*SPECIAL, *"abcdefghij"))
SMALL = {"dim": 32, "depth": 1, "heads": 2, "dropout": 0.0}


def corpus(path, count=1500):
    """Texts in which every second word follows from the one before."""
    draw = np.random.RandomState(0)
    pairs = [("red", "rose"), ("blue", "sea"), ("green", "grass"), ("white", "snow")]
    texts = [" ".join(" ".join(pairs[i]) for i in draw.randint(4, size=3 + n % 4)) for n in range(count)]
    path.write_text("\n".join(texts))
    return str(path)


def task(tmp_path, **fields):
    settings = {"length": 16, "vocabulary": None, "vocab_size": 60, "copies": 3}
    return MaskedLM(corpora=corpus(tmp_path / "pairs.txt"), **{**settings, **fields})


def test_texts_are_packed_without_padding():
    blocks = pack_texts(WORDPIECE, ["a b c", "d", "", "e f"], 5)
    assert blocks.tolist() == [[2, 5, 6, 7, 3], [2, 3, 8, 3, 3]]  # what is left, "e f", fills no block
    assert pack_texts(WORDPIECE, ["a b", "c"], 10).tolist() == [[2, 5, 6, 3, 7, 0, 0, 0, 0, 3]]
    assert pack_texts(WORDPIECE, [""], 10).shape == (0, 10)
    assert pack_texts(WORDPIECE, [], 10).shape == (0, 10)


def test_pieces_are_hidden_in_the_shares_of_bert():
    ids = np.array([2, *[5] * 61, 1, 3])
    special, ordinary = np.arange(5), np.arange(5, 1005)
    shown = []
    for seed in range(600):
        hidden, positions = mask_pieces(ids, special, ordinary, 4, np.random.default_rng(seed))
        assert len(positions) == 10  # 15 % of 64
        assert (np.diff(positions) > 0).all()
        assert set(positions) <= set(range(1, 62))
        others = np.delete(np.arange(64), positions)
        assert (hidden[others] == ids[others]).all()
        shown.append(hidden[positions])
    shown = np.concatenate(shown)
    assert np.mean(shown == 4) == pytest.approx(0.8, abs=0.02)
    assert np.mean(shown == 5) == pytest.approx(0.1, abs=0.02)
    assert np.mean(shown > 5) == pytest.approx(0.1, abs=0.02)
    few, positions = mask_pieces(np.array([2, 7, 3]), special, ordinary, 4, np.random.default_rng(0), 0.9)
    assert positions.tolist() == [1]
    assert len(few) == 3


def test_an_item_is_a_pure_function_of_seed_and_index():
    blocks = pack_texts(WORDPIECE, ["a b c d e f g h i j " * 30], 34)
    data = MaskedTexts(blocks, WORDPIECE, seed=3, copies=4)
    assert len(data) == 4 * len(blocks)
    first, again = data[1], MaskedTexts(blocks, WORDPIECE, seed=3, copies=4)[1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    ids, positions, labels = first
    assert torch.equal(torch.from_numpy(blocks[1])[positions], labels)
    restored = ids.clone()
    restored[positions] = labels
    assert restored.tolist() == blocks[1].tolist()
    copies = [data[1 + copy * len(blocks)] for copy in range(4)]
    assert len({tuple(positions.tolist()) for _, positions, _ in copies}) > 1
    assert not torch.equal(MaskedTexts(blocks, WORDPIECE, seed=4)[1][1], positions)
    assert fingerprint(data) != fingerprint(MaskedTexts(blocks, WORDPIECE, seed=4, copies=4))
    with pytest.raises(IndexError, match="block 40 of"):
        data[40]


def test_slots_that_fill_up_a_batch_count_for_nothing(tmp_path):
    made = task(tmp_path)
    items = [
        (torch.tensor([2, 4, 6, 3]), torch.tensor([1]), torch.tensor([5])),
        (torch.tensor([2, 4, 4, 9, 3]), torch.tensor([1, 2]), torch.tensor([7, 8])),
    ]
    (ids, positions), labels = pad_masked(items, 0)
    assert ids.tolist() == [[2, 4, 6, 3, 0], [2, 4, 4, 9, 3]]
    assert (positions.tolist(), labels.tolist()) == ([[1, 0], [1, 2]], [[5, IGNORED], [7, 8]])
    batch, outputs = ((ids, positions), labels), torch.randn(2, 2, 15)
    rows, pieces = made.class_logits(outputs, batch)
    assert torch.equal(rows, torch.stack([outputs[0, 0], outputs[1, 0], outputs[1, 1]]))
    assert pieces.tolist() == [5, 7, 8]
    expected = torch.nn.functional.cross_entropy(rows, pieces)
    torch.testing.assert_close(made.loss(outputs, batch), expected)
    changed = outputs.clone()
    changed[0, 1] += 100
    torch.testing.assert_close(made.loss(changed, batch), expected)


def test_texts_of_one_split_are_in_no_other(tmp_path):
    file = tmp_path / "signs.txt"
    file.write_text("\n".join(" ".join([chr(0x4E00 + n)] * 20) for n in range(200)))
    splits = MaskedLM(corpora=[str(file)], length=12, vocabulary=[str(file)], vocab_size=500).splits(None)
    assert len(splits.train) == 10 * len(splits.train.blocks)
    seen = [set(np.unique(getattr(splits, part).blocks)) - set(range(5)) for part in ("train", "val", "test")]
    assert [len(pieces) for pieces in seen] == [184, 4, 10]
    assert len(set.union(*seen)) == 198  # each text has a piece of its own; those of two texts calibrate


def test_figures_are_those_of_each_slot(tmp_path):
    made = task(tmp_path, test_limit=7)
    split = made.splits(None).test
    size = len(made.wordpiece.vocabulary)

    def uniform(ids, positions):
        return np.zeros((*positions.shape, size), np.float32)

    found = made.evaluate(uniform, split)
    assert found.metrics["nll"] == pytest.approx(np.log(size))
    assert found.metrics["perplexity"] == pytest.approx(size)
    assert len(found.per_unit) == sum(len(labels) for _, _, labels in split)

    def broken(ids, positions):
        return np.full((*positions.shape, size), np.nan, np.float32)

    with pytest.raises(InvalidValue, match="masked_lm: the output for unit 0 is not finite"):
        made.evaluate(broken, split)
    with pytest.raises(InvalidValue, match=r"outputs of shape \(7, 2, 3\); logits \(7, 2, "):
        made.evaluate(lambda ids, positions: np.zeros((*positions.shape, 3)), split)


def test_a_small_network_learns_what_follows_what(tmp_path):
    made = task(tmp_path, copies=16)
    done = sparing.run(
        task=made,
        model={"name": "bert", **SMALL},
        steps=[Train(epochs=1, batch_size=32, lr=3e-3, warmup_steps=50), sparing.Export()],
        meter=QUICK,
    )
    trained, exported = done.ledger.rows
    # of nine in ten hidden words the neighbour tells which it is; by chance one in eight would be right
    assert trained.figures["accuracy"].value > 0.6
    assert trained.figures["nll"].value < 1.5
    assert trained.runtime == exported.runtime == "onnxruntime"
    assert exported.figures["accuracy"].value == pytest.approx(trained.figures["accuracy"].value, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpora": []}, r"masked_lm: corpora = \[\]"),
        ({"share": 1.0}, "masked_lm: share = 1.0"),
        ({"copies": 0}, "masked_lm: copies = 0"),
        ({"seed": -1}, "masked_lm: seed = -1"),
        ({"train_limit": 0}, "masked_lm: train_limit = 0"),
        ({"corpora": "sst3"}, "the corpus 'sst3' is neither one of"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises((InvalidValue, DataError), match=message):
        MaskedLM(**{"vocabulary": None, **fields}).splits(None)


def test_too_few_texts_are_refused(tmp_path):
    file = tmp_path / "few.txt"
    file.write_text("one word\nanother")
    with pytest.raises(DataError):
        MaskedLM(corpora=str(file), vocabulary=None).splits(None)


def test_each_choice_makes_another_task(tmp_path):
    made = [{}, {"copies": 4}, {"share": 0.2}, {"seed": 1}, {"length": 17}, {"test_limit": 3}]
    assert len({task(tmp_path, **fields).fingerprint() for fields in made}) == len(made)
