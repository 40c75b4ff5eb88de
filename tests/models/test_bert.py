"""The text encoder: its arithmetic, padding, heads and limits, and the models of transformers it takes over."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import sparing
from sparing import build_model
from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor import ModulePredictor, spec_of, to_onnx
from sparing.models.bert import Bert, from_transformers

SMALL = {"vocab_size": 40, "dim": 16, "depth": 2, "heads": 2, "max_length": 12}
IDS = torch.tensor([[2, 7, 8, 3, 9, 10, 3], [2, 11, 3, 12, 3, 0, 0], [2, 39, 3, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[1, 4], [2, 0], [1, 0]])


def small(**fields) -> Bert:
    torch.manual_seed(0)
    return build_model("bert", **{**SMALL, **fields}).eval()


@pytest.mark.parametrize(
    ("fields", "inputs", "shape"),
    [
        ({"num_classes": 5}, (IDS,), (3, 5)),
        ({"num_classes": 5, "pooler": "relu"}, (IDS,), (3, 5)),
        ({"head": "span"}, (IDS,), (3, 7, 2)),
        ({"head": "tokens", "segments": 2}, (IDS,), (3, 7, 16)),
        ({"head": "embedding", "pooling": "mean"}, (IDS,), (3, 16)),
        ({"head": "embedding"}, (IDS.int(),), (3, 16)),
        ({"head": "masked_lm"}, (IDS, POSITIONS), (3, 2, 40)),
        ({"head": "masked_lm"}, (IDS,), (3, 7, 40)),
    ],
)
def test_heads_give_what_they_say(fields, inputs, shape):
    assert small(**fields)(*inputs).shape == shape


def test_names_of_layers_are_those_that_engine_and_pruning_rely_on():
    model = small(segments=2, pooler="tanh")
    names = [name for name, _ in model.named_modules()]
    block = ["query", "key", "value", "attention_out", "attention_norm", "up", "down", "output_norm"]
    assert {f"embeddings.{part}" for part in ("words", "positions", "segments", "norm")} <= set(names)
    assert {f"blocks.1.{part}" for part in block} <= set(names)
    assert list(model.state_dict())[-4:] == [
        f"head.{layer}.{part}" for layer in ("pooler", "classifier") for part in ("weight", "bias")
    ]
    language = small(head="masked_lm").state_dict()
    assert set(list(language)[-5:]) == {
        "head.bias",
        *(f"head.{n}.{p}" for n in ("dense", "norm") for p in ("weight", "bias")),
    }
    assert not any(name.endswith("decoder.weight") for name in language)


def test_a_block_is_attention_and_feed_forward_each_added_and_normalised():
    block = small().blocks[0]
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = -1e9
    q, k, v = (layer(x).view(2, 5, 2, 8).transpose(1, 2) for layer in (block.query, block.key, block.value))
    mixed = ((q @ k.transpose(2, 3) / 8**0.5 + mask).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16)
    middle = nn.functional.layer_norm(
        x + block.attention_out(mixed), (16,), block.attention_norm.weight, block.attention_norm.bias, 1e-12
    )
    up = block.up(middle)
    exact = up * 0.5 * (1 + torch.erf(up / 2**0.5))
    expected = nn.functional.layer_norm(
        middle + block.down(exact), (16,), block.output_norm.weight, block.output_norm.bias, 1e-12
    )
    torch.testing.assert_close(block(x, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 2])
def test_padding_changes_no_answer(offset):
    model = small(num_classes=3, segments=2, position_offset=offset)
    longer = torch.cat([IDS, torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(longer), model(IDS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(IDS[2:, :3]), model(IDS[2:]), rtol=1e-5, atol=1e-6)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()


def test_tokens_behind_the_first_separator_are_of_the_second_type():
    model = small(head="tokens", segments=2)
    ids = torch.tensor([[2, 7, 3, 9, 3, 0]])
    before = model(ids)
    with torch.no_grad():
        model.embeddings.segments.weight[1] += torch.arange(16.0)
    changed = (model.embeddings(ids) - small(head="tokens", segments=2).embeddings(ids)).abs().sum(-1) > 1e-3
    assert changed.tolist() == [[False, False, False, True, True, False]]
    assert not torch.allclose(before, model(ids))


def test_masked_words_are_predicted_at_their_slots_alone():
    model = small(head="masked_lm")
    everywhere = model(IDS)
    expected = torch.stack([everywhere[row, POSITIONS[row]] for row in range(3)])
    torch.testing.assert_close(model(IDS, POSITIONS), expected)
    hidden = model.encode(IDS)
    last = model.head.norm(nn.functional.gelu(model.head.dense(hidden)))
    torch.testing.assert_close(everywhere, last @ model.embeddings.words.weight.T + model.head.bias)


@pytest.mark.parametrize("fields", [{"head": "masked_lm"}, {"head": "span", "segments": 2, "position_offset": 2}])
def test_a_graph_takes_any_batch_and_length(fields):
    model = small(**fields)

    def example(batch: int):
        ids = torch.arange(4, 4 + batch * (4 + batch)).view(batch, 4 + batch) % 40
        return (ids, torch.arange(batch).repeat(batch, 1)) if fields["head"] == "masked_lm" else (ids,)

    class Texts(sparing.CustomTask):
        """Examples of more than one length and number of slots."""

        def example_input(self, batch=2):
            return example(batch)

    task = Texts("texts", [(0, 0)], [(0, 0)], model=lambda: model, loss=lambda *_: 0, metrics={"m": lambda *_: 0.0})
    predictor = ModulePredictor(model)
    graph = to_onnx(predictor, task=task)
    assert graph.origin["exporter"] == "trace"
    for batch in (1, 2, 3, 5, 7):
        found, expected = graph(*example(batch)), predictor(*example(batch))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small()(torch.zeros(2, 13, dtype=torch.int64)), r"13 tokens; 1…12 \(max_length\)"),
        (lambda: small()(torch.zeros(2, 0, dtype=torch.int64)), "0 tokens; 1…12"),
        (lambda: small()(torch.zeros(2, 5)), r"shape \(2, 5\) and type torch.float32"),
        (lambda: small()(torch.zeros(5, dtype=torch.int64)), r"shape \(5,\)"),
        (lambda: small()(IDS, POSITIONS), "positions are for the head \"masked_lm\".*'classifier'"),
        (lambda: small(heads=3), "dim = 16 cannot be shared among heads = 3"),
        (lambda: small(dropout=1.0), "dropout = 1.0"),
        (lambda: small(pad_id=40), r"pad_id = 40; a whole number in 0…39"),
        (lambda: small(hidden=0), "hidden = 0"),
        (lambda: small(head="pooled"), "head = 'pooled'; one of classifier, masked_lm, span, tokens, embedding"),
        (lambda: small(eps=0.0), "eps = 0.0"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(InvalidValue, match=message):
        call()


CONFIG = {"vocab_size": 40, "max_position_embeddings": 14}
BIG = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FAMILIES = {
    "Bert": {**CONFIG, **BIG, "sep_token_id": 3},
    "DistilBert": {**CONFIG, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "Roberta": {**CONFIG, **BIG, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    "XLMRoberta": {**CONFIG, **BIG, "pad_token_id": 1},
    "Camembert": {**CONFIG, **BIG, "pad_token_id": 1, "type_vocab_size": 1},
    "Electra": {**CONFIG, **BIG, "embedding_size": 16, "sep_token_id": 3},
}


def theirs(family: str, head: str, **changes):
    """A model of transformers with random weights, biases and norms included."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}{head}")(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def answers(model, ids: torch.Tensor) -> torch.Tensor:
    pad = model.config.pad_token_id
    real = ids != pad
    told = {"input_ids": ids, "attention_mask": real.long()}
    if type(model).__name__.startswith(("Bert", "Electra")):
        separators = (ids == 3).long()
        told["token_type_ids"] = ((separators.cumsum(1) > separators) & real).long()
    found = model(**told)
    if hasattr(found, "start_logits"):
        return torch.stack([found.start_logits, found.end_logits], dim=2)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_answers_the_same_here(family, head):
    model = theirs(family, head, num_labels=2 if head == "ForQuestionAnswering" else 5)
    if (family, head) == ("Electra", "ForSequenceClassification"):
        with pytest.raises(InvalidValue, match="ElectraForSequenceClassification: its classifier has a GELU"):
            from_transformers(model)
        return
    ids = IDS if model.config.pad_token_id == 0 else torch.where(IDS == 0, 1, IDS)
    ours = from_transformers(model)
    assert not ours.training
    with torch.no_grad():
        expected, found = answers(model, ids), ours(ids)
    assert expected.std() > 0.1
    where = (ids != model.config.pad_token_id) if expected.ndim == 3 else slice(None)
    torch.testing.assert_close(found[where], expected[where], rtol=1e-5, atol=1e-5)
    assert build_model(spec_of(ours)).state_dict().keys() == ours.state_dict().keys()


def test_a_bare_model_can_give_embeddings():
    model = theirs("Bert", "Model")
    ours = from_transformers(model, pooling="mean")
    with torch.no_grad():
        expected = answers(model, IDS)
    real = (IDS != 0).unsqueeze(2)
    torch.testing.assert_close(ours(IDS), (expected * real).sum(1) / real.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("listed", "sep"), [("vocab.txt", 4), ("tokenizer.json", 5), (None, None)])
def test_a_folder_is_read_without_the_network(tmp_path, listed, sep, monkeypatch):
    model = theirs("Bert", "ForSequenceClassification", sep_token_id=None, num_labels=3)
    model.save_pretrained(tmp_path)
    if listed == "vocab.txt":
        (tmp_path / listed).write_text("\n".join(["[PAD]", "[UNK]", "a", "[CLS]", "[SEP]"]))
    elif listed == "tokenizer.json":
        (tmp_path / listed).write_text(json.dumps({"added_tokens": [{"id": 5, "content": "[SEP]"}]}))
    else:
        with pytest.raises(InvalidValue, match=r"2 token types, and its config names no sep_token_id.*pass sep_id"):
            from_transformers(tmp_path)
        assert from_transformers(tmp_path, sep_id=3).embeddings.sep_id == 3
        return
    ours = from_transformers(str(tmp_path))
    assert ours.embeddings.sep_id == sep
    for name, tensor in from_transformers(model, sep_id=sep).state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Bert", {"hidden_act": "gelu_new"}, "activation = 'gelu_new'"),
        ("DistilBert", {"activation": "relu"}, "activation = 'relu'"),
        ("Bert", {"is_decoder": True}, "it is a decoder"),
        ("Electra", {"embedding_size": 8}, "embeddings of size 8 are projected to 16"),
    ],
)
def test_what_the_network_is_not_is_refused(family, changes, message):
    with pytest.raises(InvalidValue, match=message):
        from_transformers(theirs(family, "Model", **changes))


def test_other_heads_families_and_loose_ends_are_refused(tmp_path):
    model = theirs("Bert", "ForTokenClassification")
    with pytest.raises(
        InvalidValue, match=r"a BertForTokenClassification .bert. cannot be made a bert: one of bert, distil"
    ):
        from_transformers(model)
    language = theirs("Bert", "ForMaskedLM", tie_word_embeddings=False)
    with pytest.raises(InvalidValue, match=r"cls.predictions.decoder.weight is not the table of its embeddings"):
        from_transformers(language)
    extended = copy.deepcopy(theirs("Bert", "Model"))
    extended.encoder.layer[0].adapter = nn.Linear(2, 2)
    with pytest.raises(InvalidValue, match=r"encoder.layer.0.adapter.bias has no place in a bert \(2 such"):
        from_transformers(extended)
    with pytest.raises(InvalidValue, match="pooling = 'mean' is for a bare model"):
        from_transformers(theirs("Bert", "ForQuestionAnswering"), pooling="mean")
    with pytest.raises(DataError, match=r"config.json is missing; a local folder"):
        from_transformers(tmp_path)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_a_folder_whose_weights_lack_the_head_is_refused(tmp_path, head):
    model = theirs("DistilBert", "Model")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [f"DistilBert{head}"]}))
    with pytest.raises(DataError, match=rf"lack (classifier|qa_outputs|pre_classifier)\.\w+ .*DistilBert{head}"):
        from_transformers(tmp_path)


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta"])
def test_a_folder_of_a_masked_language_model_with_its_tied_words_is_whole(tmp_path, family):
    model = theirs(family, "ForMaskedLM")
    model.save_pretrained(tmp_path)
    ours = from_transformers(tmp_path, sep_id=3)
    assert torch.equal(ours.embeddings.words.weight, model.get_input_embeddings().weight)
