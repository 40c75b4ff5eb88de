"""EMO: windows and attention beside a plain loop, the block, whole models, refusals, checkpoints, export, int8."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sparing
from sparing.core.errors import InvalidValue
from sparing.core.predictor import ModulePredictor, to_onnx
from sparing.models.emo import (
    EMO,
    VARIANTS,
    DropPath,
    InvertedResidualMobileBlock,
    LayerNorm2d,
    SqueezeExcite,
    WindowAttention2d,
    emo_1m,
    emo_2m,
    emo_5m,
    emo_6m,
    iRMB,
    window_index,
)

SMALL: dict[str, Any] = {
    "variant": "0.14M",
    "num_classes": 3,
    "depths": [1, 1, 2, 2],
    "stem_dim": 4,
    "embed_dims": [4, 6, 8, 8],
    "dim_heads": [2, 2, 4, 4],
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def told(model: nn.Module, *shape: int) -> list[str]:
    """The warnings of one forward pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.zeros(*shape))
    return [str(warning.message) for warning in caught]


# --- windows


def where(row: int, column: int, height: int, width: int, size: int, mode: str) -> tuple[int, int, int, int]:
    """(window down, window across, row in it, column in it), by the definition."""
    n1, n2 = -(-height // size), -(-width // size)
    if mode == "strided":
        return row % n1, column % n2, row // n1, column // n2
    return row // size, column // size, row % size, column % size


@pytest.mark.parametrize("mode", ["strided", "contiguous"])
@pytest.mark.parametrize(("height", "width", "size"), [(14, 14, 7), (10, 9, 4), (4, 4, 7), (6, 3, 3), (5, 7, 1)])
def test_every_pixel_is_where_the_definition_puts_it(height: int, width: int, size: int, mode: str) -> None:
    index = window_index(height, width, size, mode)  # type: ignore[arg-type]
    n1, n2 = -(-height // size), -(-width // size)
    assert index.shape == (n1 * n2, size, size)
    for row, column in itertools.product(range(height), range(width)):
        down, across, r, c = where(row, column, height, width, size, mode)
        assert index[down * n2 + across, r, c] == row * width + column
    assert int((index >= 0).sum()) == height * width  # all else is padding


def test_no_window_size_is_one_window_without_shuffling() -> None:
    for size in (0, -1):
        assert torch.equal(window_index(3, 5, size), torch.arange(15).view(1, 3, 5))


def by_loops(layer: WindowAttention2d, x: Tensor, v: Tensor) -> Tensor:
    """Attention window by window and head by head, pixel lists instead of reshapes."""
    batch, _, height, width = x.shape
    size = layer.window_size
    weight, bias = layer.qk.conv.weight[:, :, 0, 0], layer.qk.conv.bias  # type: ignore[union-attr]
    out = torch.zeros_like(v)
    index = window_index(height, width, size, layer.mode).flatten(1)
    flat_x, flat_v, flat_out = x.flatten(2), v.flatten(2), out.flatten(2)
    d, values = layer.dim // layer.heads, v.shape[1] // layer.heads
    for b, pixels in itertools.product(range(batch), index):
        real = pixels >= 0
        keys = pixels[real] if layer.pad_mask else pixels
        inside = torch.stack([flat_x[b, :, p] if p >= 0 else torch.zeros(layer.dim) for p in keys])
        at = torch.stack([flat_v[b, :, p] if p >= 0 else torch.zeros(v.shape[1]) for p in keys])
        q = flat_x[b, :, pixels[real]].T @ weight[: layer.dim].T + bias[: layer.dim]
        k = inside @ weight[layer.dim :].T + bias[layer.dim :]
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            shares = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d), dim=1)
            channels = slice(head * values, (head + 1) * values)
            flat_out[b, channels, pixels[real]] = (shares @ at[:, channels]).T
    return flat_out.view_as(v)


@pytest.mark.parametrize("pad_mask", [False, True])
@pytest.mark.parametrize("mode", ["strided", "contiguous"])
@pytest.mark.parametrize(("height", "width", "size"), [(6, 6, 3), (5, 6, 4), (2, 3, 4)])
def test_attention_is_what_a_loop_over_windows_gives(
    height: int, width: int, size: int, mode: str, pad_mask: bool
) -> None:
    torch.manual_seed(0)
    layer = WindowAttention2d(6, 3, size, mode, pad_mask)  # type: ignore[arg-type]
    x, v = torch.randn(2, 6, height, width), torch.randn(2, 10, height, width)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_loops(layer, x, x))
        torch.testing.assert_close(layer(x, v), by_loops(layer, x, v))


def test_a_mask_matters_only_where_there_is_padding() -> None:
    torch.manual_seed(0)
    plain, masked = WindowAttention2d(4, 2, 4), WindowAttention2d(4, 2, 4, pad_mask=True)
    masked.load_state_dict(plain.state_dict())
    fits, padded = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 7, 8)
    assert torch.equal(plain(fits), masked(fits))
    assert not torch.allclose(plain(padded), masked(padded))
    # constant values stay constant under weights that sum to 1 over what is there, and are diluted by padding
    ones = torch.ones(1, 4, 7, 8)
    torch.testing.assert_close(masked(padded, ones), ones)
    assert plain(padded, ones).min() < 0.9


def test_a_window_of_the_whole_map_is_no_window_at_all() -> None:
    torch.manual_seed(0)
    whole, window, tiles = (
        WindowAttention2d(4, 2, 0),
        WindowAttention2d(4, 2, 5),
        WindowAttention2d(4, 2, 5, "contiguous"),
    )
    x = torch.randn(2, 4, 5, 5)
    for other in (window, tiles):
        other.load_state_dict(whole.state_dict())
        torch.testing.assert_close(whole(x), other(x))


# --- the block


def test_the_block_has_two_names() -> None:
    assert iRMB is InvertedResidualMobileBlock


def test_attention_before_and_after_the_values_agree_for_grouped_values_without_bias_and_activation() -> None:
    torch.manual_seed(0)
    fields = {"exp_ratio": 2.0, "dim_head": 4, "window_size": 3, "v_group": True, "norm_layer": "ln_2d"}
    before = InvertedResidualMobileBlock(8, 8, **fields, attn_pre=True).eval()  # type: ignore[arg-type]
    after = InvertedResidualMobileBlock(8, 8, **fields, attn_pre=False).eval()  # type: ignore[arg-type]
    after.load_state_dict(before.state_dict())
    x = torch.randn(2, 8, 6, 6)
    assert not torch.allclose(before(x), after(x))
    for block in (before, after):
        block.v.act = nn.Identity()  # type: ignore[union-attr]
    torch.testing.assert_close(before(x), after(x))


@pytest.mark.parametrize(("stride", "dim_out", "skips"), [(1, 8, True), (2, 8, False), (1, 12, False)])
def test_input_is_added_where_the_shape_allows(stride: int, dim_out: int, skips: bool) -> None:
    block = InvertedResidualMobileBlock(8, dim_out, stride=stride, attn_s=False, exp_ratio=2.0).eval()
    nn.init.zeros_(block.proj.conv.weight)  # type: ignore[arg-type,union-attr]
    x = torch.randn(2, 8, 7, 6)
    shape = (2, dim_out, -(-7 // stride), -(-6 // stride))
    assert block(x).shape == shape
    assert torch.equal(block(x), x if skips else torch.zeros(shape))
    assert block.skip is skips


def test_dilation_keeps_the_size() -> None:
    block = InvertedResidualMobileBlock(4, 4, dw_ks=5, dilation=2, attn_s=False, exp_ratio=1.0)
    assert block(torch.randn(2, 4, 9, 8)).shape == (2, 4, 9, 8)


def test_no_activation_works_in_place() -> None:
    model = EMO("1M", se_ratios=[0.25] * 4, pre_dim=8)
    assert not [name for name, module in model.named_modules() if getattr(module, "inplace", False)]


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    dropped = layer(x)
    each = dropped.flatten(1)
    assert torch.equal(each.min(1).values, each.max(1).values)  # a sample is kept or dropped as a whole
    assert sorted(each[:, 0].unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert float(dropped.mean()) == pytest.approx(1, abs=4 * math.sqrt(0.25 / 0.75 / 4000))
    assert layer.eval()(x) is x
    assert DropPath()(x) is x
    assert "rate=0.25" in repr(layer)


def test_drop_path_grows_with_depth_and_leaves_only_the_input() -> None:
    model = EMO("2M", drop_path=0.17)
    assert model.drop_path_rates == pytest.approx(np.linspace(0, 0.17, 18))
    block = InvertedResidualMobileBlock(4, 4, attn_s=False, exp_ratio=2.0, drop_path=0.999999).train()
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_layer_norm_and_squeeze_excite_by_hand() -> None:
    x = torch.randn(2, 6, 3, 4)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(LayerNorm2d(6)(x), expected)
    gate = SqueezeExcite(6, 0.5)
    assert gate.conv_reduce.out_channels == 3
    nn.init.zeros_(gate.conv_expand.weight)
    nn.init.zeros_(gate.conv_expand.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(gate(x), x / 2)


# --- whole models


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 135_642),
        ({"attn_ss": [False] * 4, "exp_ratios": [2, 2.5, 3, 4.25]}, 136_170),
        ({"dw_kss": [3, 3, 1, 1], "exp_ratios": [2, 2.5, 3.5, 4.5]}, 136_410),
    ],
)
def test_the_small_model_and_its_two_halves_have_equal_parameters(fields: dict[str, Any], count: int) -> None:
    assert parameters(EMO("0.14M", 10, **fields)) == count


@pytest.mark.parametrize(
    ("make", "count"), [(emo_1m, 1_361_168), (emo_2m, 2_377_472), (emo_5m, 5_108_848), (emo_6m, 6_168_496)]
)
def test_factories(make: Any, count: int) -> None:
    assert parameters(make()) == count
    assert make(num_classes=7, in_channels=1).head.out_features == 7


@pytest.mark.parametrize(
    ("variant", "size", "maps"),
    [("0.14M", 64, [32, 16, 8, 4]), ("0.14M-32px", 32, [16, 8, 4, 2]), ("0.14M-32px", 28, [14, 7, 4, 2])],
)
def test_windows_of_the_small_variants_are_the_whole_maps(variant: str, size: int, maps: list[int]) -> None:
    model = EMO(variant, 10, in_channels=1, image_size=size)
    features = model.forward_features(torch.zeros(2, 1, size, size))
    assert [tuple(f.shape[2:]) for f in features] == [(side, side) for side in maps]
    assert [f.shape[1] for f in features] == [16, 24, 40, 64]
    assert list(VARIANTS[variant]["window_sizes"][2:]) == maps[2:]
    assert not told(EMO(variant, 10, in_channels=1), 2, 1, size, size)


def test_features_only_is_the_classifiers_trunk() -> None:
    classifier = EMO(**SMALL, pre_dim=0).eval()
    backbone = EMO(**SMALL, features_only=True).eval()
    backbone.load_checkpoint(classifier.state_dict())
    x = torch.randn(2, 3, 32, 48)
    pyramid = backbone(x)
    assert [tuple(f.shape) for f in pyramid] == [(2, 4, 16, 24), (2, 6, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]
    for one, other in zip(pyramid, classifier.forward_features(x), strict=True):
        assert torch.equal(one, other)
    assert not [name for name in backbone.state_dict() if name.startswith(("norm.", "head."))]


def test_checkpoints_that_do_not_fit_are_listed() -> None:
    state = EMO(**SMALL).state_dict()
    backbone = EMO(**{**SMALL, "embed_dims": [4, 6, 8, 12]}, features_only=True)
    with pytest.raises(InvalidValue) as error:
        backbone.load_checkpoint(state)
    message = str(error.value)
    assert "stage4.0.proj.conv.weight: (8, 56, 1, 1), here (12, 56, 1, 1)" in message
    assert "stage4.1.qk.conv.bias: (16,), here (24,)" in message
    assert "stage3" not in message
    assert "head.weight" not in message
    classifier = EMO(**{**SMALL, "num_classes": 4})
    with pytest.raises(InvalidValue, match=r"head\.weight: \(3, 8\), here \(4, 8\); head\.bias: \(3,\), here \(4,\)"):
        classifier.load_checkpoint(state)
    broken = {("stage5.x" if name == "stage1.0.norm.weight" else name): tensor for name, tensor in state.items()}
    with pytest.raises(InvalidValue, match=r"2 tensors.* stage1\.0\.norm\.weight: missing; stage5\.x: not of this"):
        EMO(**SMALL, features_only=True).load_checkpoint(broken)
    EMO(**SMALL).load_checkpoint(state)


def test_a_hidden_layer_before_the_logits() -> None:
    model = EMO(**SMALL, pre_dim=5)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert [name for name in model.state_dict() if name.startswith("pre_head")] == [
        "pre_head.0.weight",
        "pre_head.0.bias",
    ]
    assert {"pre_head.0.bias", "stage0.0.convs.0.1.weight"} <= set(model.no_weight_decay_names())
    assert "pre_head.0.weight" not in model.no_weight_decay_names()


def test_sizes_that_need_padding_are_told_once_and_by_name() -> None:
    model = EMO(**SMALL)
    (message,) = told(model, 1, 3, 40, 64)
    for said in (
        "40 × 64 pixels",
        "stage 3's map of 5 × 8 pixels into windows of 8",
        "stage 4's map of 3 × 4 pixels into windows of 4",
        "attention to padding (see pad_mask)",
    ):
        assert said in message
    assert not told(model, 1, 3, 40, 64)
    assert told(model, 1, 3, 48, 48)
    assert not told(model, 1, 3, 64, 64)
    with pytest.warns(UserWarning, match="more computation$"):
        EMO(**SMALL, image_size=40, pad_mask=True)
    assert not told(EMO(**SMALL, attn_ss=[False] * 4), 1, 3, 40, 40)
    assert not told(EMO(**SMALL, window_sizes=[0] * 4), 1, 3, 40, 40)


def test_pad_mask_changes_only_sizes_that_need_padding() -> None:
    plain, masked = EMO(**SMALL).eval(), EMO(**SMALL, pad_mask=True).eval()
    masked.load_state_dict(plain.state_dict())
    for size, same in ((64, True), (48, False)):
        x = torch.randn(2, 3, size, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(plain(x), masked(x)) is same


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "3M"}, "variant = '3M'; one of '1M', '2M', '5M', '6M', '0.14M', '0.14M-32px'"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"dim_heads": [16, 16, 20, 20]}, "dim_in = 168 cannot be divided into heads of dim_head = 20"),
        ({"window_sizes": [7, 7, 7, 3.5]}, "window_size = 3.5; a whole number"),
        ({"window_sizes": [7, 7, 7]}, r"window_sizes = \[7, 7, 7\]; one entry for each of stages 1–4"),
        ({"act_layers": ["silu", "silu", "tanh", "gelu"]}, "act_layer = 'tanh'"),
        ({"norm_layers": ["gn"] * 4}, "norm_layer = 'gn'"),
        ({"depths": [1, 0, 1, 1]}, r"depths\[1\] = 0"),
        ({"stem_stride": 3}, "stem_stride = 3"),
        ({"drop_path": 1.0}, r"drop_path = 1\.0"),
        ({"attn_drop": -0.1}, r"attn_drop = -0\.1"),
        ({"dw_kss": [3, 3, 4, 5]}, "dw_ks = 4; an odd"),
        ({"image_size": 31}, "images of 31 × 31 pixels; at least 32 × 32"),
        ({"variant": "0.14M", "image_size": 15}, "images of 15 × 15 pixels; at least 16 × 16"),
        ({"attn_pre": False}, "588 value channels .* cannot be shared among 8 heads"),
        ({"window_mode": "random"}, "window_mode = 'random'"),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as error:
        EMO(**fields)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"shape \(3, 64, 64\); \(N, 3, H, W\)"),
        ((2, 1, 64, 64), r"shape \(2, 1, 64, 64\); \(N, 3, H, W\)"),
        ((2, 3, 64, 31), "images of 64 × 31 pixels; at least 32 × 32"),
    ],
)
def test_impossible_inputs_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        emo_1m()(torch.zeros(shape))


def test_blocks_and_attention_refuse_what_cannot_be() -> None:
    with pytest.raises(InvalidValue, match=r"WindowAttention2d: dim = 8 .* dim_head = 3"):
        WindowAttention2d(8, 3)
    with pytest.raises(InvalidValue, match=r"window_size = 7\.5"):
        WindowAttention2d(8, 4, 7.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="values of shape"):
        WindowAttention2d(8, 4)(torch.zeros(1, 8, 7, 7), torch.zeros(1, 3, 7, 7))
    with pytest.raises(InvalidValue, match=r"shape \(1, 4, 7, 7\); \(B, 8, H, W\)"):
        WindowAttention2d(8, 4)(torch.zeros(1, 4, 7, 7))
    with pytest.raises(InvalidValue, match=r"shape \(8, 7, 7\)"):
        InvertedResidualMobileBlock(8, 8, attn_s=False)(torch.zeros(8, 7, 7))
    with pytest.raises(InvalidValue, match="4 channels cannot become 8"):
        InvertedResidualMobileBlock(4, 4, attn_s=False, v_proj=False, exp_ratio=2.0)
    with pytest.raises(InvalidValue, match="se_ratio"):
        InvertedResidualMobileBlock(4, 4, attn_s=False, se_ratio=0.01)


# --- saved, exported, quantised


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"variant": "0.14M"}, 64),
        ({"variant": "0.14M-32px", "in_channels": 1}, 28),
        ({**SMALL, "pad_mask": True}, 40),
        ({**SMALL, "window_sizes": [2, 2, 2, 2], "window_mode": "contiguous", "attn_ss": [True] * 4}, 32),
        ({**SMALL, "window_sizes": [0] * 4, "se_ratios": [0.5] * 4, "features_only": True}, 32),
        ({"variant": "1M", "num_classes": 10}, 224),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:emo")
def test_exported_it_computes_the_same_for_any_batch(fields: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = sparing.build_model("emo", **fields).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of a trained model
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.2)
    images = torch.randn(3, fields.get("in_channels", 3), size, size)
    graph = to_onnx(model, (images[:2],))
    assert graph.origin["exporter"] == "trace"
    for batch in (1, 3):
        with torch.no_grad():
            expected = model(images[:batch])
        found = graph(images[:batch].numpy())
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
        for one, other in pairs:
            assert one.shape == other.shape
            assert np.abs(one - other.numpy()).max() < 1e-4


def test_saved_and_loaded_it_answers_the_same_bits(tmp_path: Path) -> None:
    model = sparing.build_model("emo", **{**SMALL, "window_mode": "contiguous"})
    predictor = ModulePredictor(model, example=(torch.randn(2, 3, 64, 64),))
    again = sparing.load(predictor.save(tmp_path / "model"))
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    np.testing.assert_array_equal(predictor(images), again(images))
    assert again.describe().parameters == parameters(model)


def test_quantised_it_names_what_stays_in_floating_point(caplog: pytest.LogCaptureFixture) -> None:
    draw = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 3, 32, 32, generator=draw), torch.arange(count) % 3)

    task = sparing.CustomTask(
        "noise",
        part(24),
        part(12),
        calibration=part(8),
        model=lambda: sparing.build_model("emo", **{**SMALL, "window_sizes": [0] * 4}),
        loss=nn.functional.cross_entropy,
        labels="abc",
        capabilities={"images"},
    )
    steps = [sparing.Train(epochs=1, batch_size=12, lr=0.01), sparing.Quantize(goal="bytes", max_loss=1.0, samples=8)]
    quick = {"min_seconds": 0, "max_seconds": 0.01, "memory": False, "energy": "off", "batch": 4}
    run = sparing.run(task=task, steps=steps, meter=quick)
    first, last = run.ledger.rows
    assert "INT8" in str(last.outcome).upper(), last.outcome
    assert last.figures["model bytes"].value < first.figures["model bytes"].value
    remarks = " ".join(last.remarks)
    for operator, in_float in {"LayerNormalization": True, "Gelu": True, "Conv": False, "MatMul": False}.items():
        assert (f"({operator})" in remarks) is in_float, remarks
    assert not caplog.records
