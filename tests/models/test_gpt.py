"""The causal transformer: attention by its formula, no look ahead, padding, dropped tokens, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparing.core.errors import InvalidValue
from sparing.data_efficiency.pacing import linear
from sparing.data_efficiency.token_dropping import drop_tokens, gather_tokens, scatter_tokens
from sparing.models.gpt import CausalAttention, DecoderBlock, Gpt, LogitsOf

SMALL: dict[str, Any] = {"vocab_size": 11, "max_length": 8, "dim": 8, "depth": 3, "heads": 2}


def ids(rows: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(1))


def by_formula(layer: CausalAttention, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """``seen`` (N, T, T): whether a query sees a key."""
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads = []
    for q, k, v in zip(*(part.chunk(layer.heads, -1) for part in (q, k, v)), strict=True):  # noqa: B020
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        heads.append(torch.softmax(scores, -1) @ v)
    return layer.proj(torch.cat(heads, -1))


def test_attention_by_its_formula() -> None:
    torch.manual_seed(0)
    layer, x = CausalAttention(6, 2), torch.randn(2, 5, 6)
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    torch.testing.assert_close(layer(x), by_formula(layer, x, causal))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    seen = causal & mask[:, None] | torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(layer(x, mask[:, None, None]), by_formula(layer, x, seen))


def test_a_block_adds_two_branches() -> None:
    torch.manual_seed(0)
    block, x = DecoderBlock(8, 2, 16), torch.randn(2, 4, 8)
    middle = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    assert torch.equal(DecoderBlock(8, 2, 16, dropout=0.999999).train()(x), x)


def test_initial_weights_and_their_number() -> None:
    torch.manual_seed(0)
    model = Gpt(65)
    block = 12 * 64**2 + 13 * 64  # four matrices, their biases, two norms
    assert sum(p.numel() for p in model.parameters()) == (65 + 128) * 64 + 6 * block + 2 * 64 + 65 * 64
    matrices = [p for p in model.parameters() if p.ndim == 2]
    assert {round(float(p.detach().std()), 3) for p in matrices} <= {0.019, 0.02, 0.021}
    assert all(not b.any() for name, b in model.named_parameters() if name.endswith("bias"))


def test_no_token_sees_what_follows_it() -> None:
    torch.manual_seed(0)
    model, x = Gpt(**SMALL).eval(), ids()
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    one, other = model(x), model(changed)
    assert one.shape == (3, 8, 11)
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.isclose(one[:, 5:], other[:, 5:]).all(-1).any()
    torch.testing.assert_close(model(x[:, :5]), one[:, :5])


def test_padding_behind_needs_no_mask_and_padding_in_front_is_not_seen() -> None:
    torch.manual_seed(0)
    model, x = Gpt(**SMALL).eval(), ids()
    behind = torch.tensor([[1] * 5 + [0] * 3]).expand(3, 8)
    torch.testing.assert_close(model(x, behind)[:, :5], model(x)[:, :5])
    front = behind.flip(1)
    changed = torch.where(front == 0, (x + 1) % 11, x)
    one, other = model(x, front), model(changed, front)
    assert torch.isfinite(one).all()
    torch.testing.assert_close(one[:, 3:], other[:, 3:])
    assert not torch.isclose(model(x)[:, 3:], model(changed)[:, 3:]).all(-1).any()


def test_a_tied_model_answers_with_its_embeddings() -> None:
    torch.manual_seed(0)
    model, x = Gpt(**SMALL, tied=True).eval(), ids()
    assert not [name for name, _ in model.named_parameters() if name.startswith("head")]
    torch.testing.assert_close(model(x), model.encode(x) @ model.words.weight.T)


@pytest.mark.parametrize("masked", [False, True])
def test_its_blocks_drop_tokens(masked: bool) -> None:
    torch.manual_seed(0)
    model, x = Gpt(**SMALL).train(), ids()
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [0] * 3 + [1] * 5]) if masked else None
    with drop_tokens(model, linear(4, 8, 100), kind="decoder") as dropping:
        found = model.encode(x, mask)
        assert dropping.last_indices is not None
        (chosen,) = dropping.last_indices
    keys = None if mask is None else mask.bool()[:, None, None]
    hidden = model.blocks[0](model.words(x) + model.positions.weight, keys)
    kept = None if keys is None else keys[:, 0, 0].gather(1, chosen)[:, None, None]
    hidden = scatter_tokens(hidden, model.blocks[1](gather_tokens(hidden, chosen), kept), chosen)
    torch.testing.assert_close(found, model.norm(model.blocks[2](hidden, keys)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "gpt: dim = 8 cannot be shared among heads = 3"),
        ({"dropout": 1.0}, "gpt: dropout = 1.0; 0 ≤ dropout < 1"),
        ({"tied": 1}, "gpt: tied = 1; true or false"),
        ({"eps": 0}, "gpt: eps = 0; 0 < eps < 1"),
        ({"depth": 0}, "gpt: depth = 0"),
        ({"hidden": 2.5}, "gpt: hidden = 2.5"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Gpt(**{**SMALL, **fields})


def test_wrong_inputs() -> None:
    model = Gpt(**SMALL)
    for x, message in (
        (torch.zeros(8, dtype=torch.long), r"gpt: an input of shape \(8,\)"),
        (torch.zeros(1, 8), "type torch.float32; token numbers"),
        (torch.zeros(1, 9, dtype=torch.long), r"gpt: 9 tokens; 1…8 \(max_length\)"),
        (torch.zeros(1, 0, dtype=torch.long), "gpt: 0 tokens"),
    ):
        with pytest.raises(InvalidValue, match=message):
            model(x)
    with pytest.raises(InvalidValue, match=r"gpt: a mask of shape \(3, 7\); \(3, 8\) is expected"):
        model(ids(), torch.ones(3, 7))


def test_a_model_of_transformers_gives_its_logits() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=3, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    model = LogitsOf(theirs)
    torch.testing.assert_close(model(ids()), theirs(ids()).logits)
    with drop_tokens(model.train(), linear(4, 8, 100), kind="decoder") as dropping:
        model(ids()).sum().backward()
        assert dropping.last_indices is not None
        assert dropping.last_indices.shape == (1, 3, 4)
    with pytest.raises(InvalidValue, match="model is a Linear; a causal model of transformers"):
        LogitsOf(torch.nn.Linear(2, 2))
