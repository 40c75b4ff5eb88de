"""The masked autoencoder and its networks: tables, masks, losses, refusals, files, and weights of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparing
from bounds import MEBIBYTES, SECONDS, watched
from sparing.core.errors import CorruptFile, DataError, InvalidValue
from sparing.core.predictor import ModulePredictor, build_model, to_onnx
from sparing.models.mae import (
    FEATURES,
    MAE,
    MAEViT,
    ViTConfig,
    ViTEncoder,
    block_feature,
    interpolate_positions,
    load_vit,
    mae_loss,
    patchify,
    random_masking,
    save_vit,
    sincos_2d,
    unpatchify,
    vit_from_transformers,
)

SMALL = ViTConfig(16, 4, 8, 3, 2)


def images(count: int = 2, config: ViTConfig = SMALL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, config.in_channels, config.image_size, config.image_size, generator=generator)


# --- tables, patches, masks


def test_the_table_by_its_formula_column_first() -> None:
    dim, grid = 8, 3
    table = sincos_2d(dim, grid)
    assert torch.equal(table[0], torch.zeros(dim))
    row, column = 2, 1
    omega = [10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
    expected = [f(axis * w) for axis, f in ((column, math.sin), (column, math.cos)) for w in omega]
    expected += [f(axis * w) for axis, f in ((row, math.sin), (row, math.cos)) for w in omega]
    torch.testing.assert_close(table[1 + row * grid + column], torch.tensor(expected))
    assert torch.equal(sincos_2d(dim, grid, cls_token=False), table[1:])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_patches_and_images_are_each_others_inverse(batch: int, channels: int, patch: int, side: int) -> None:
    pixels = torch.arange(batch * channels * (patch * side) ** 2.0).reshape(batch, channels, patch * side, -1)
    cut = patchify(pixels, patch)
    assert cut.shape == (batch, side**2, patch**2 * channels)
    assert torch.equal(unpatchify(cut, patch), pixels)
    assert torch.equal(cut[0, -1, -channels:], pixels[0, :, -1, -1])  # channels innermost, rows and columns before


@given(st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 99))
def test_masks_keep_the_smallest_noise(count: int, ratio: float, seed: int) -> None:
    noise = torch.rand(3, count, generator=torch.Generator().manual_seed(seed))
    kept = int(count * (1 - ratio))
    if not kept:
        with pytest.raises(InvalidValue, match=f"none of {count}"):
            random_masking(noise, ratio)
        return
    keep, mask, restore = random_masking(noise, ratio)
    assert keep.shape == (3, kept)
    assert mask.sum(1).tolist() == [count - kept] * 3
    for row in range(3):
        assert set(keep[row].tolist()) == set(noise[row].argsort()[:kept].tolist())
        assert mask[row, keep[row]].sum() == 0
    shuffled = torch.cat([noise.gather(1, keep), noise.sort(1).values[:, kept:]], 1)
    assert torch.equal(shuffled.gather(1, restore), noise)


def test_the_loss_is_over_removed_patches_only() -> None:
    target, pred = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    removed = mask.bool()
    torch.testing.assert_close(mae_loss(target, pred, mask, False), (target - pred)[removed].square().mean())
    spread = target.var(-1, keepdim=True, correction=1)
    normal = (target - target.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()
    torch.testing.assert_close(mae_loss(target, pred, mask), (normal - pred)[removed].square().mean())
    half = mae_loss(target.half(), pred.half(), mask.half())
    assert half.dtype == torch.float32


def test_positions_on_another_grid() -> None:
    table = sincos_2d(8, 3)[None]
    assert interpolate_positions(table, 3) is table
    larger = interpolate_positions(table, 5)
    assert larger.shape == (1, 26, 8)
    assert torch.equal(larger[:, 0], table[:, 0])
    with pytest.raises(InvalidValue, match="9 rows"):
        interpolate_positions(table[:, 1:], 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ViTConfig(30, 8), "patch_size = 8 does not divide image_size = 30"),
        (lambda: ViTConfig(32, 8, 30), "dim = 30; a multiple of 4"),
        (lambda: ViTConfig(32, 8, 24, heads=5), "dim = 24 cannot be shared among heads = 5"),
        (lambda: ViTConfig(32, 8, 24, heads=2, last_heads=5), "last_heads = 5"),
        (lambda: ViTConfig(mlp_ratio=0), "mlp_ratio = 0"),
        (lambda: ViTConfig.named("vit_tny"), "Did you mean 'vit_tiny'"),
        (lambda: sincos_2d(6, 2), "dim = 6"),
        (lambda: patchify(torch.zeros(1, 3, 9, 8), 4), "does not divide images of 9×8"),
        (lambda: unpatchify(torch.zeros(1, 3, 48), 4), "square number"),
        (lambda: random_masking(torch.rand(1, 4), 1.0), "mask_ratio = 1.0"),
        (lambda: MAE(SMALL, 8, 1, 2, mask_ratio=0.0), "mask_ratio = 0.0"),
        (lambda: MAE(SMALL, 6, 1, 2), "dim = 6"),
        (lambda: mae_loss(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(1, 4)), "0 everywhere"),
        (lambda: ViTEncoder(SMALL)(torch.zeros(1, 3, 15, 16)), r"shape \(1, 3, 15, 16\); \(B, 3, 16, 16\)"),
        (lambda: ViTEncoder(SMALL).into(torch.zeros(1, 17, 8), 4), "target_block = 4; 1 … 3"),
        (lambda: ViTEncoder(SMALL, [0.1]), "1 rates of drop_path"),
        (lambda: MAEViT(drop_path=1.0), "drop_path = 1.0"),
        (lambda: block_feature(ViTEncoder(SMALL).blocks[0], torch.zeros(1, 2, 8), "other"), "feature = 'other'"),
    ],
)
def test_what_is_refused(call: Any, words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        call()


# --- networks


def test_first_weights() -> None:
    model = MAE(ViTConfig(32, 8, 64, 2, 2), 32, 1, 2)
    assert model.cls_token.std() < 0.04
    assert model.mask_token.abs().max() > 0
    bound = math.sqrt(6 / (64 + 3 * 64))
    weight = model.patch_embed.proj.weight
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.9 * bound
    assert not model.blocks[0].attn.qkv.bias.any()
    assert {name for name, _ in model.named_buffers()} == {"pos_embed", "decoder_pos_embed"}  # fixed, not trained
    head = MAEViT(dim=64).head.weight
    assert 0 < head.abs().max() < 1e-4


def test_an_encoder_sees_kept_patches_in_their_order() -> None:
    model = ViTEncoder(SMALL).eval()
    keep = torch.tensor([[5, 2], [0, 15]])
    tokens, some = model.tokens(images()), model.tokens(images(), keep)
    assert torch.equal(some[:, 0], tokens[:, 0])
    assert torch.equal(some[0, 1:], tokens[0, 1 + keep[0]])
    torch.testing.assert_close(tokens[:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1))


def test_the_classifier_means_over_patches_without_the_class_token() -> None:
    model = MAEViT(3, 5, 16, 4, 8, 2, 2).eval()
    tokens = model.blocks(model.tokens(images()))
    torch.testing.assert_close(model(images()), model.head(model.fc_norm(tokens[:, 1:].mean(1))))


def test_features_of_a_block_add_up() -> None:
    block, x = ViTEncoder(SMALL).blocks[0].eval(), torch.randn(2, 5, 8)
    made = {feature: block_feature(block, x, feature) for feature in FEATURES}
    torch.testing.assert_close(made["attention_residual"], x + made["attention"])
    torch.testing.assert_close(made["block"], made["attention_residual"] + made["ffn"])
    torch.testing.assert_close(made["block"], block(x))
    assert made["qkv"].shape == (2, 5, 24)


def test_masked_patches_do_not_reach_the_encoder() -> None:
    model = MAE(SMALL, 8, 1, 2).eval()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    pred, mask = model.reconstruct(images(), noise)
    hidden = unpatchify(patchify(images(), 4) + 100 * mask[:, :, None], 4)
    assert torch.equal(model(hidden, noise), pred)
    assert not torch.equal(model(images() + 1, noise), pred)


def test_a_trunk_is_taken_over_on_another_grid_and_with_other_heads() -> None:
    source = MAE(ViTConfig(16, 4, 8, 3, 2, last_heads=4), 8, 1, 2)
    target = MAEViT(3, 5, 24, 4, 8, 3, 2)
    target.take_over(source)
    assert torch.equal(target.blocks[2].attn.qkv.weight, source.blocks[2].attn.qkv.weight)
    assert target.blocks[2].attn.heads == 2
    assert target.pos_embed.shape == (1, 37, 8)
    with pytest.raises(InvalidValue, match="depth = 2 here and 3"):
        MAEViT(3, 5, 16, 4, 8, 2, 2).take_over(source)


def test_it_is_exported_and_saved(tmp_path: Path) -> None:
    model = build_model("mae_vit", num_classes=5, image_size=16, patch_size=4, dim=8, depth=2, heads=2, last_heads=4)
    predictor = ModulePredictor(model.eval(), example=(images(1),))
    expected = model(images()).detach().numpy()
    np.testing.assert_allclose(to_onnx(predictor, (images(),))(images().numpy()), expected, rtol=1e-4, atol=1e-5)
    again = sparing.load(predictor.save(tmp_path / "model"))
    assert again.model.config.heads_of == (2, 4)
    np.testing.assert_array_equal(again(images().numpy()), predictor(images().numpy()))


# --- files


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTEncoder(ViTConfig(16, 4, 8, 2, 2, last_heads=4)),
        lambda: MAE(SMALL, 8, 1, 2, mask_ratio=0.6),
        lambda: MAEViT(3, 5, 16, 4, 8, 2, 2, last_heads=4),
    ],
    ids=["encoder", "mae", "classifier"],
)
def test_a_saved_network_comes_back_with_the_heads_of_each_block(make: Any, tmp_path: Path) -> None:
    model = make()
    save_vit(model, tmp_path / "vit")
    again = load_vit(tmp_path / "vit")
    assert type(again) is type(model)
    assert [block.attn.heads for block in again.blocks] == [block.attn.heads for block in model.blocks]
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if isinstance(model, MAE):
        assert isinstance(again, MAE)
        assert again.mask_ratio == 0.6


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json is missing"):
        load_vit(tmp_path)
    save_vit(ViTEncoder(SMALL), tmp_path / "vit")
    config = tmp_path / "vit" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "heads_of": [2, 2, 4]}))
    with pytest.raises(CorruptFile, match=r"heads_of = \[2, 2, 4\]"):
        load_vit(tmp_path / "vit")
    config.write_text(json.dumps({**said, "trunk": {**said["trunk"], "dim": 12}}))
    with pytest.raises(DataError, match=r"8.*; .*12.* is expected"):
        load_vit(tmp_path / "vit")
    config.write_text(json.dumps({**said, "trunk": {**said["trunk"], "depth": 2}, "heads_of": [2, 2]}))
    with pytest.raises(DataError, match=r"blocks\.2.* is not understood"):
        load_vit(tmp_path / "vit")
    bombs = [
        ("dim", 10**9),
        ("depth", 10**9),
        ("image_size", 4 * 10**6),
        ("image_size", 10**12 + 1),
        ("mlp_ratio", 1e9),
    ]
    for name, size in bombs:
        config.write_text(json.dumps({**said, "trunk": {**said["trunk"], name: size}}))
        ended = watched(lambda: load_vit(tmp_path / "vit"))
        assert ended.deliberate, ended.raised
        assert ended.seconds < SECONDS, name
        assert ended.mebibytes < MEBIBYTES, name
    config.write_text(json.dumps({**said, "model_type": "bert"}))
    with pytest.raises(InvalidValue, match="model_type = 'bert'"):
        load_vit(tmp_path / "vit")


# --- weights of transformers

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.2,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
def test_a_public_masked_autoencoder_answers_the_same(transformers: Any, live: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    public = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, **DECODER)).eval()
    with torch.no_grad():  # as a checkpoint would
        public.vit.embeddings.position_embeddings.copy_(sincos_2d(24, 4)[None])
        public.decoder.decoder_pos_embed.copy_(sincos_2d(16, 4)[None])
    public.save_pretrained(tmp_path)
    ours = (vit_from_transformers(public) if live else load_vit(tmp_path)).eval()
    assert isinstance(ours, MAE)
    pixels, noise = images(2, ours.config), torch.rand(2, 16)
    with torch.no_grad():
        theirs = public(pixels, noise=noise)
        pred, mask = ours.reconstruct(pixels, noise)
    torch.testing.assert_close(pred, theirs.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mask, theirs.mask)
    torch.testing.assert_close(mae_loss(patchify(pixels, 8), pred, mask, False), theirs.loss)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_public_encoder_answers_the_same(transformers: Any, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    public = getattr(transformers, kind)(transformers.ViTConfig(**SIZES)).eval()
    public.save_pretrained(tmp_path)
    ours = load_vit(tmp_path).eval()
    assert type(ours) is ViTEncoder
    pixels = images(2, ours.config)
    with torch.no_grad():
        theirs = getattr(public, "vit", public)(pixels).last_hidden_state
        torch.testing.assert_close(ours(pixels), theirs, rtol=1e-4, atol=1e-5)


def test_a_public_network_without_positions_gets_the_table(transformers: Any) -> None:
    public = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES, **DECODER))
    with torch.no_grad():
        public.embeddings.position_embeddings.zero_()
    ours = vit_from_transformers(public)
    assert torch.equal(ours.pos_embed[0], sincos_2d(24, 4))


def test_public_weights_that_do_not_fit_are_refused(transformers: Any, tmp_path: Path) -> None:
    from sparing.core import files

    transformers.ViTModel(transformers.ViTConfig(**SIZES)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = files.read_tensors(weights)
    files.write_tensors(weights, {**state, "something.else": torch.zeros(2)})
    with pytest.raises(DataError, match=r"'something\.else' is not understood"):
        load_vit(tmp_path)
    files.write_tensors(
        weights, {name: tensor for name, tensor in state.items() if not name.endswith("0.layernorm_before.bias")}
    )
    with pytest.raises(DataError, match=r"norm1.* is missing"):
        load_vit(tmp_path)
    files.write_tensors(
        weights, {name: t for name, t in state.items() if not name.endswith("0.attention.attention.key.bias")}
    )
    with pytest.raises(DataError, match=r"attn\.k\.bias is missing beside"):
        load_vit(tmp_path)
    files.write_tensors(weights, state)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (({"hidden_act": "relu"}, "relu"), ({"qkv_bias": False}, "qkv_bias = False")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InvalidValue, match=words):
            load_vit(tmp_path)
