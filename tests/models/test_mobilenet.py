"""The MobileNetV2-style network: counts, shapes, skips, refusals, export."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparing.core.cost import mac_count
from sparing.core.errors import InvalidValue
from sparing.core.predictor import build_model, to_onnx
from sparing.models.emo import EMO
from sparing.models.mobilenet import InvertedResidual, MobileNet


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_as_many_parameters_as_the_small_emo() -> None:
    count = parameters(MobileNet())
    assert count == 136_770
    assert count == pytest.approx(parameters(EMO("0.14M", 10)), rel=0.02)


def test_parameters_of_a_block_counted_by_hand() -> None:
    expand, depthwise, project = 8 * 20 + 40, 20 * 9 + 40, 20 * 12 + 24
    assert parameters(InvertedResidual(8, 12, 20)) == expand + depthwise + project


def test_stages_halve_the_resolution() -> None:
    model, sizes = MobileNet(), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert sizes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (64, 4, 4)]
    assert MobileNet(1, 5, 33, stem_stride=2)(torch.zeros(2, 1, 33, 40)).shape == (2, 5)


@pytest.mark.parametrize(("dim_out", "stride", "skips"), [(8, 1, True), (12, 1, False), (8, 2, False)])
def test_the_input_is_added_where_the_shape_allows(dim_out: int, stride: int, skips: bool) -> None:
    block = InvertedResidual(8, dim_out, 16, stride).eval()
    nn.init.zeros_(block.project[0].weight)  # type: ignore[arg-type]
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x if skips else torch.zeros(2, dim_out, 6 // stride, 6 // stride))


def test_only_convolutions_and_a_linear_layer_multiply() -> None:
    count = mac_count(MobileNet(), (torch.zeros(1, 3, 64, 64),))
    assert set(count.by_operator) == {"conv", "linear"}
    assert count.by_operator["linear"] == 640


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 15}, "image_size = 15; 4 stages .* at least 16"),
        ({"stem_stride": 2, "image_size": 31}, "at least 32"),
        ({"widths": [8, 8]}, "2 widths and 4 depths"),
        ({"widths": []}, "0 widths"),
        ({"depths": [1, 0, 1, 1]}, r"depths\[1\] = 0"),
        ({"expansion": 0.5}, "expansion = 0.5"),
        ({"kernel": 4}, "kernel = 4; an odd"),
        ({"stem_stride": 3}, "stem_stride = 3"),
        ({"num_classes": 0}, "num_classes = 0"),
    ],
)
def test_impossible_networks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        MobileNet(**fields)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 8)])
def test_impossible_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidValue, match=r"\(N, 3, H, W\) with H and W of at least 16"):
        MobileNet()(torch.zeros(shape))


def test_exported_it_computes_the_same() -> None:
    model = build_model("mobilenet", image_size=32, expansion=2).eval()
    images = torch.randn(5, 3, 32, 32)
    graph = to_onnx(model, (images[:2],))
    np.testing.assert_allclose(graph(images.numpy()), model(images).detach().numpy(), atol=1e-4)


def test_features_only_is_the_classifiers_trunk() -> None:
    classifier, backbone = MobileNet(num_classes=7).eval(), MobileNet(features_only=True).eval()
    assert backbone.embed_dims == (16, 24, 40, 64)
    assert not any(name.startswith("head.") for name in backbone.state_dict())
    backbone.load_checkpoint(classifier.state_dict())
    images = torch.randn(2, 3, 64, 64)
    features = backbone(images)
    assert [tuple(map_.shape[1:]) for map_ in features] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (64, 4, 4)]
    torch.testing.assert_close(classifier.head(features[-1].mean((2, 3))), classifier(images))  # type: ignore[misc]
    with pytest.raises(InvalidValue, match=r"head\.weight: \(7, 64\), here \(10, 64\)"):
        MobileNet().load_checkpoint(classifier.state_dict())
