"""The plain vision transformer: counts, attention by its formula, blocks on the grid of tokens, refusals, export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparing
from sparing.core.errors import InvalidValue
from sparing.core.predictor import ModulePredictor, build_model, to_onnx
from sparing.models.emo import InvertedResidualMobileBlock
from sparing.models.vit import Attention, OnGrid, TransformerBlock, ViT


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_two_blocks_have_equal_parameters() -> None:
    plain, mobile = ViT(), ViT(block="irmb")
    assert parameters(plain.blocks[0]) == 49_984
    assert parameters(mobile.blocks[0]) == 49_888
    rest = 3 * 64 * 64 + 64 + 64 * 64 + 2 * 64 + 650  # patches, positions, norm, head
    assert (parameters(plain), parameters(mobile)) == (6 * 49_984 + rest, 6 * 49_888 + rest)


def test_attention_by_its_formula() -> None:
    torch.manual_seed(0)
    layer = Attention(6, 2)
    x = torch.randn(2, 5, 6)
    q, k, v = (layer.qkv(x)[..., 6 * i : 6 * (i + 1)] for i in range(3))
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        weights = torch.softmax(q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(3), -1)
        heads.append(weights @ v[..., head])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))


def test_a_block_adds_two_branches() -> None:
    block = TransformerBlock(8, 2)
    x = torch.randn(2, 4, 8)
    middle = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    dropped = TransformerBlock(8, 2, drop_path=0.999999).train()
    assert torch.equal(dropped(x), x)


def test_tokens_lie_row_by_row() -> None:
    model = ViT(1, 10, 8, patch_size=4, dim=4, depth=1, heads=1)
    images = torch.randn(1, 1, 8, 8)
    tokens = model.embed(images)
    assert tokens.shape == (1, 4, 4)
    weight, bias = model.patch_embed.weight.flatten(1), model.patch_embed.bias
    patch = images[0, 0, :4, 4:].flatten()  # first row, second column
    torch.testing.assert_close(tokens[0, 1], weight @ patch + bias + model.pos_embed[0, 1])


def test_a_block_on_the_grid_sees_rows_and_columns() -> None:
    class Mark(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (2, 5, 3, 4)
            return x + 100 * torch.arange(3.0).view(3, 1) + torch.arange(4.0)

    found = OnGrid(Mark(), 3, 4)(torch.zeros(2, 12, 5))
    assert torch.equal(found[1, :, 2], torch.tensor([100.0 * row + column for row in range(3) for column in range(4)]))


def test_the_mobile_block_attends_to_the_whole_grid() -> None:
    model = ViT(block="irmb", drop_path=0.1)
    block = model.blocks[5].block  # type: ignore[union-attr]
    assert isinstance(block, InvertedResidualMobileBlock)
    assert (block.heads, block.window_size, block.drop_path.rate) == (4, 0, 0.1)
    # a window of the grid's size is the same
    window = InvertedResidualMobileBlock(
        64,
        64,
        exp_ratio=4.625,
        norm_layer="ln_2d",
        act_layer="gelu",
        dim_head=16,
        window_size=8,
        qkv_bias=True,
        attn_pre=True,
    ).eval()
    window.load_state_dict(block.state_dict())
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(window(x), block.eval()(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 28}, "patch_size = 8 does not divide image_size = 28; 2, 4, 7, 14, 28 would"),
        ({"heads": 5}, "dim = 64 cannot be shared among heads = 5"),
        ({"block": "conv"}, "block = 'conv'"),
        ({"depth": 0}, "depth = 0"),
        ({"mlp_ratio": 0}, "mlp_ratio = 0"),
        ({"exp_ratio": -1.0}, r"exp_ratio = -1\.0"),
        ({"drop_path": 1}, "drop_path = 1"),
        ({"num_classes": 0}, "num_classes = 0"),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        ViT(**fields)


def test_another_size_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"\(2, 3, 32, 64\); \(N, 3, 64, 64\)"):
        ViT()(torch.zeros(2, 3, 32, 64))


@pytest.mark.parametrize("block", ["transformer", "irmb"])
def test_saved_and_exported_it_computes_the_same(block: str, tmp_path: Path) -> None:
    model = build_model("vit", image_size=16, patch_size=4, dim=16, depth=2, heads=2, block=block).eval()
    images = torch.randn(5, 3, 16, 16)
    expected = model(images).detach().numpy()
    graph = to_onnx(model, (images[:2],))
    assert np.abs(graph(images.numpy()) - expected).max() < 1e-4
    folder = ModulePredictor(model, example=(images,)).save(tmp_path / "model")
    np.testing.assert_array_equal(sparing.load(folder)(images.numpy()), ModulePredictor(model)(images))


def test_patches_begin_as_the_linear_layer_they_are() -> None:
    weight = ViT().patch_embed.weight.detach()
    bound = math.sqrt(6 / (64 + 3 * 64))
    assert 0.95 * bound < float(weight.abs().max()) <= bound
