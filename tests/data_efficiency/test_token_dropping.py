"""Random layerwise token dropping in our own models and those of transformers and torch."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparing.core.errors import InvalidValue
from sparing.data_efficiency.pacing import linear
from sparing.data_efficiency.token_dropping import (
    TokenDropping,
    drop_tokens,
    gather_tokens,
    keep_mask,
    keep_positions,
    sample_tokens,
    scatter_tokens,
)
from sparing.models.bert import Bert
from sparing.models.vit import TransformerBlock


def bert() -> Bert:
    torch.manual_seed(0)
    return Bert(50, dim=16, depth=5, heads=2, max_length=20, dropout=0.0, head="tokens")


def texts(rows: int = 3, length: int = 12, padded: int = 4) -> Tensor:
    ids = torch.randint(4, 50, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[0, length - padded :] = 0
    return ids


def fixed(kept: int = 5, full: int = 20) -> Any:
    return linear(kept, full, 1e9)  # stays for long


# --- the parts


@given(
    layers=st.integers(1, 3), batch=st.integers(1, 4), length=st.integers(1, 20), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_scattered_is_found_again_and_the_rest_stays(layers, batch, length, share, seed):
    kept = max(1, int(share * length))
    generator = torch.Generator().manual_seed(seed)
    indices = sample_tokens(layers, batch, length, kept, generator)
    assert indices.shape == (layers, batch, kept)
    assert (indices[..., 1:] > indices[..., :-1]).all()
    hidden = torch.randn(batch, length, 4, generator=generator)
    computed = torch.randn(batch, kept, 4, generator=generator)
    whole = scatter_tokens(hidden, computed, indices[0])
    assert torch.equal(gather_tokens(whole, indices[0]), computed)
    untouched = torch.ones(batch, length, dtype=torch.bool).scatter(1, indices[0], False)
    assert torch.equal(whole[untouched], hidden[untouched])


def test_every_position_is_drawn_equally_often():
    indices = sample_tokens(2, 500, 10, 3, torch.Generator().manual_seed(0))
    counts = torch.bincount(indices.flatten(), minlength=10).float()
    assert counts.sum() == 3000
    assert (counts - 300).abs().max() < 5 * 300**0.5
    assert not torch.equal(indices[0], indices[1])


def test_masks_of_all_forms_are_those_of_the_kept_tokens():
    indices = sample_tokens(1, 3, 8, 4, torch.Generator().manual_seed(0))[0]
    draw = torch.Generator().manual_seed(1)
    causal = torch.full((8, 8), -1e9).triu(1)
    assert torch.equal(keep_mask(causal, indices, 8, "decoder"), torch.full((4, 4), -1e9).triu(1))
    assert torch.equal(keep_mask(causal[None, None], indices, 8, "decoder")[1, 0], torch.full((4, 4), -1e9).triu(1))
    for shape in ((3, 1, 8, 8), (1, 2, 8, 8), (3, 8, 8), (3, 1, 1, 8), (1, 1, 1, 8)):
        mask = torch.rand(shape, generator=draw)
        kept = keep_mask(mask, indices, 8, "encoder")
        wide = mask.expand(3, *mask.shape[1:])
        for sample, row in enumerate(indices):
            expected = wide[sample][..., row]
            expected = expected if expected.shape[-2] == 1 else expected[..., row, :]
            assert torch.equal(kept[sample], expected), shape
    keys = torch.rand(3, 8, generator=draw)
    assert torch.equal(keep_mask(keys, indices, 8, "encoder"), keys.gather(1, indices))
    with pytest.raises(InvalidValue, match=r"a mask \(3, 7\) with 3 samples of 8 tokens"):
        keep_mask(keys[:, :7], indices, 8, "encoder")
    with pytest.raises(InvalidValue, match=r"a mask \(2, 1, 8, 8\)"):
        keep_mask(torch.zeros(2, 1, 8, 8), indices, 8, "encoder")


def test_positions_of_all_forms_are_those_of_the_kept_tokens():
    indices = sample_tokens(1, 3, 8, 4, torch.Generator().manual_seed(0))[0]
    assert torch.equal(keep_positions(torch.arange(8)[None], indices, 8), indices)
    assert torch.equal(keep_positions(torch.arange(8), indices, 8), indices)
    cosines = torch.rand(1, 8, 6)
    assert torch.equal(keep_positions(cosines, indices, 8), cosines[0][indices])
    assert torch.equal(keep_positions(cosines[0], indices, 8), cosines[0][indices])
    alibi = torch.rand(6, 1, 8)  # three samples of two heads
    kept = keep_positions(alibi, indices, 8)
    assert torch.equal(kept[3, 0], alibi[3, 0][indices[1]])
    with pytest.raises(InvalidValue, match=r"positions \(2, 8\)"):
        keep_positions(torch.zeros(2, 8), indices, 8)


def test_a_mixed_precision_layer_decides_the_type():
    whole = scatter_tokens(torch.ones(1, 4, 2), torch.zeros(1, 2, 2, dtype=torch.bfloat16), torch.tensor([[0, 3]]))
    assert whole.dtype == torch.bfloat16
    assert whole[0, :, 0].tolist() == [0, 1, 1, 0]


# --- in models


def by_hand(model: Bert, ids: Tensor, indices: Tensor) -> Tensor:
    x = model.embeddings(ids)
    mask = torch.zeros(ids.shape, dtype=x.dtype).masked_fill(ids == 0, -1e9)
    for number, block in enumerate(model.blocks):
        if number in (0, len(model.blocks) - 1):
            x = block(x, mask[:, None, None])
            continue
        rows = indices[number - 1]
        part = torch.stack([x[i, row] for i, row in enumerate(rows)])
        part_mask = torch.stack([mask[i, row] for i, row in enumerate(rows)])
        part = block(part, part_mask[:, None, None])
        x = torch.stack([x[i].index_copy(0, row, part[i]) for i, row in enumerate(rows)])
    return x


def test_our_encoder_computes_what_is_written_out_by_hand():
    model, plain = bert().train(), bert().train()
    ids = texts()
    with drop_tokens(model, fixed(), kind="encoder") as dropping:
        assert dropping.dropping == [1, 2, 3]
        found = model(ids)
        assert dropping.last_indices is not None
        expected = by_hand(plain, ids, dropping.last_indices)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)
        assert torch.equal(model.eval()(ids), plain.eval()(ids))  # in evaluation no token is dropped
        assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.train()(ids), plain.train()(ids))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_vision_transformer_drops_patches_and_keeps_the_rest():
    torch.manual_seed(0)
    blocks = nn.Sequential(*(TransformerBlock(8, 2) for _ in range(3))).train()
    x = torch.randn(2, 9, 8)
    with drop_tokens(blocks, fixed(4), kind="encoder") as dropping:
        middle = blocks[1](x)
        changed = (middle != x).any(2)
        assert changed.sum(1).tolist() == [4, 4]
        assert torch.equal(changed.nonzero()[:, 1].view(2, 4), dropping.last_indices[0])


def gpt2(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_of_transformers_never_looks_ahead(attention, padded):
    model = gpt2(attn_implementation=attention).train()
    ids = texts(padded=0)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    dropping = drop_tokens(model, fixed(), kind="decoder", seed=3)
    first = model(input_ids=ids, attention_mask=mask).logits
    assert dropping.last_indices.shape == (2, 3, 5)
    for changed in range(5, 12):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 50
        dropping.load_state_dict(dropping.state_dict() | {"passes": 0})  # the same positions
        logits = model(input_ids=other, attention_mask=mask).logits
        before = mask.bool() & (torch.arange(12) < changed)  # a row that is all padding has no place to look at
        torch.testing.assert_close(logits[before], first[before])
        assert not torch.allclose(logits[:, changed], first[:, changed])
    if padded:
        other = ids.clone()
        other[0, :3] = 7
        dropping.load_state_dict(dropping.state_dict() | {"passes": 0})
        logits = model(input_ids=other, attention_mask=mask).logits
        torch.testing.assert_close(logits[:, 3:], first[:, 3:])
    model.eval()
    kept = model(input_ids=ids, attention_mask=mask).logits
    dropping.remove()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, kept)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_encoder_of_transformers_equals_ours_with_its_weights(attention):
    transformers = pytest.importorskip("transformers")
    from sparing.models.bert import from_transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=2,
        attn_implementation=attention,
    )  # fmt: skip
    theirs = transformers.BertModel(config, add_pooling_layer=False).train()
    ours = from_transformers(theirs, sep_id=3).train()
    ids = texts()
    one, other = drop_tokens(theirs, fixed(), kind="encoder"), drop_tokens(ours, fixed(), kind="encoder")
    found = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    expected = ours(ids)
    assert torch.equal(one.last_indices, other.last_indices)
    real = ids != 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_rotary_positions_are_those_of_the_kept_tokens():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaModel(config).train()
    seen: list[Tensor] = []
    dropping = drop_tokens(model, fixed(4), kind="decoder")
    model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    ids = texts(padded=0)
    model(input_ids=ids)
    cosines = model.rotary_emb(torch.zeros(1), torch.arange(12)[None])[0][0]
    torch.testing.assert_close(seen[0], cosines[dropping.last_indices[0]])


@pytest.mark.parametrize("first", [True, False])
def test_the_encoder_layers_of_torch_in_both_layouts(first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=first)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).train()
    x, padding = torch.randn(3, 10, 8), torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 6:] = True
    layout = "batch_seq_dim" if first else "seq_batch_dim"
    with drop_tokens(model, fixed(7), kind="encoder", layout=layout) as dropping:
        given_ = x if first else x.transpose(0, 1)
        out = model(given_, src_key_padding_mask=padding)
        assert out.shape == given_.shape
        assert dropping.last_indices.shape == (2, 3, 7)
        changed = x.clone()
        changed[1, 6:] += 1.0  # padding is not looked at by the others
        dropping.load_state_dict(dropping.state_dict() | {"passes": 0})
        again = model(changed if first else changed.transpose(0, 1), src_key_padding_mask=padding)
        one, other = (t if first else t.transpose(0, 1) for t in (out, again))
        torch.testing.assert_close(one[1, :6], other[1, :6])


def test_an_encoder_that_could_have_a_mask_and_has_none_is_told_once():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).train()
    with drop_tokens(model, fixed(3), kind="encoder"):
        with pytest.warns(UserWarning, match="given no src_mask or src_key_padding_mask: padding") as told:
            [model(torch.randn(2, 5, 8)) for _ in range(2)]
        assert len(told) == 1


# --- draws and steps


def test_each_pass_layer_and_process_draws_afresh_and_others_keep_their_chance():
    draws = []
    for rank in (0, 1):
        model = bert().train()
        dropping = drop_tokens(model, fixed(), kind="encoder", rank=rank)
        for _ in range(2):
            for _ in range(2):
                torch.manual_seed(5)
                model(texts())
                assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
                draws += list(dropping.last_indices)
            dropping.step()
    assert len({json.dumps(draw.tolist()) for draw in draws}) == len(draws) == 2 * 2 * 2 * 3


def test_dropping_ends_when_the_full_length_is_reached():
    model, ids = bert().train(), texts()
    dropping = drop_tokens(model, linear(6, 12, 4, 2), kind="encoder")
    lengths = []
    for _ in range(7):
        model(ids)
        lengths.append(dropping.reserved_length)
        if dropping.reserved_length < 12:
            assert dropping.last_indices.shape[2] == dropping.reserved_length
        dropping.step()
    assert lengths == [6, 6, 8, 10, 12, 12, 12]
    assert torch.equal(model(ids), bert().train()(ids))


def test_a_resumed_dropping_draws_the_same():
    model, ids = bert().train(), texts()

    def run(dropping: TokenDropping, steps: int) -> list[Tensor]:
        found = []
        for _ in range(steps):
            for _ in range(2):  # accumulated
                model(ids)
                found.append(dropping.last_indices)
            dropping.step()
        return found

    with drop_tokens(model, linear(4, 12, 9), kind="encoder", seed=1) as whole:
        run(whole, 3)
        model(ids)
        state = json.loads(json.dumps(whole.state_dict()))
        model(ids)
        whole.step()
        expected = run(whole, 3)
    with drop_tokens(model, linear(4, 12, 9), kind="encoder", seed=1) as other:
        other.load_state_dict(state)
        model(ids)
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(run(other, 3), expected, strict=True))
    for made, named in (
        (lambda: drop_tokens(model, linear(4, 12, 9), kind="encoder", seed=2), "seed was 1, is 2"),
        (lambda: drop_tokens(model, linear(4, 12, 8), kind="encoder", seed=1), "schedule.total_steps was 9, is 8"),
        (lambda: drop_tokens(model, linear(4, 12, 9), [1], kind="encoder", seed=1), "dropping was"),
    ):
        with made() as foreign, pytest.raises(InvalidValue, match=named):
            foreign.load_state_dict(state)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(TransformerBlock(8, 2) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_compute_the_same_tokens(reentrant):
    grads = []
    for how in (None, reentrant):
        model = Checkpointed(how).train()
        dropping = drop_tokens(model, fixed(4), kind="encoder")
        x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(2):
            model(x).square().sum().backward()
        assert dropping.state_dict()["passes"] == 2
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_mixed_precision_and_copies_work():
    model = bert().train()
    dropping = drop_tokens(model, fixed(), kind="encoder")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(texts())
    out.float().sum().backward()
    assert dropping.last_indices.shape == (3, 3, 5)
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(texts()), bert().eval()(texts()))


# --- refusals


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"hidden": x}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": [0]}, "layer 0 is the first of 5"),
        ({"layers": ["blocks.4"]}, "layer 4 is the last of 5"),
        ({"layers": [1, 1]}, "layer 1 is there twice"),
        ({"layers": ["blocks.1", 1]}, "layer 1 is there twice"),
        ({"layers": ["blocks.11"]}, r"no layer 'blocks\.11'"),
        ({"layers": [9]}, r"no layer 9; the stack has 0 … 4"),
        ({"layers": []}, "at least one is needed"),
        ({"layers": lambda number, block: False}, "at least one is needed"),
        ({"kind": "both"}, "kind = 'both'"),
        ({"layout": "bsd"}, "layout = 'bsd'"),
        ({"stack": "block"}, "Did you mean 'blocks'"),
        ({"schedule": 5}, "schedule = 5; a PacingFunction"),
        ({"schedule": linear(0, 12, 5)}, "begins with 0 tokens"),
    ],
)
def test_bad_arguments_are_named(options, named):
    arguments: dict[str, Any] = {"schedule": fixed(), "kind": "encoder"} | options
    with pytest.raises(InvalidValue, match=named):
        drop_tokens(bert(), **arguments)


def test_layers_are_chosen_by_number_name_or_predicate():
    for layers in ([3, 1], ["blocks.1", "blocks.3"], lambda number, block: number % 2 == 1):
        assert drop_tokens(bert(), fixed(), layers, kind="encoder").dropping == [1, 3]
    assert drop_tokens(bert(), fixed(), [0], kind="encoder", allow_ends=True).dropping == [0]


def test_stacks_that_cannot_be_told_apart_or_share_weights_are_refused():
    blocks = [TransformerBlock(8, 2) for _ in range(3)]
    with pytest.raises(InvalidValue, match="has 2 stacks of 3 equal blocks"):
        drop_tokens(nn.ModuleDict({"a": nn.Sequential(*blocks), "b": nn.Sequential(*blocks)}), fixed(), kind="encoder")
    with pytest.raises(InvalidValue, match="no container of three or more blocks"):
        drop_tokens(nn.Linear(3, 3), fixed(), kind="encoder")
    with pytest.raises(InvalidValue, match="stands in the stack twice"):
        drop_tokens(nn.Sequential(), fixed(), kind="encoder", stack=[blocks[0], blocks[1], blocks[1], blocks[2]])


def test_layers_without_hidden_states_are_named():
    odd = nn.ModuleList([Odd(), Odd(), Odd()]).train()
    with drop_tokens(odd, fixed(2), kind="encoder"):
        with pytest.raises(InvalidValue, match=r"layer 1 \(Odd\) returns .*'hidden'"):
            odd[1](torch.ones(1, 4, 2))
        with pytest.raises(InvalidValue, match=r"layer 1 \(Odd\) is given"):
            odd[1](torch.ones(4, 2))
    blocks = nn.Sequential(*(TransformerBlock(8, 2) for _ in range(4))).train()
    with drop_tokens(blocks, fixed(2), kind="encoder"):
        blocks[1](torch.ones(1, 4, 8))
        with pytest.raises(InvalidValue, match="given 1 sequences of 5 tokens, the dropping layers before it 1 of 4"):
            blocks[2](torch.ones(1, 5, 8))
