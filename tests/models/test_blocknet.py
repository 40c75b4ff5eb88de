"""The networks that condensed images are made with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparing.core.errors import InvalidValue
from sparing.models.blocknet import VGG11, AlexNet, BlockNet, LeNet, SixLayerCNN


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize(("channels", "size", "features"), [(1, 28, 4), (3, 32, 4), (3, 28, 3), (1, 13, 2)])
def test_shapes(norm: Any, channels: int, size: int, features: int) -> None:
    model = BlockNet(channels, 7, size, width=5, norm=norm)
    images = torch.randn(2, channels, size, size)
    assert model.embed(images).shape == (2, 5 * features * features)
    torch.testing.assert_close(model.classifier(model.embed(images)), model(images))
    assert model(images).shape == (2, 7)


def test_head_of_two_layers_and_the_first_padding() -> None:
    model = BlockNet(1, 10, 28, width=4, hidden=192, norm="none")
    assert [type(layer) for layer in model.classifier.children()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert {name for name, _ in model.named_parameters()} >= {"features.6.weight", "classifier.0.bias"}
    assert BlockNet(1, 10, 28, first_padding=1).embed(torch.zeros(1, 1, 28, 28)).shape == (1, 128 * 3 * 3)


def test_instance_norm_sees_each_image_alone() -> None:
    model = BlockNet(3, 4, 16, width=4, depth=2)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))
    brighter = model.features[1](model.features[0](images) * 3 + 2)
    torch.testing.assert_close(brighter, model.features[1](model.features[0](images)), atol=1e-3, rtol=1e-3)


def test_alexnet() -> None:
    model = AlexNet()
    assert model.classifier[0].in_features == 4096
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert AlexNet(1, 3, 9)(torch.randn(2, 1, 9, 9)).shape == (2, 3)


def test_lenet_and_vgg11() -> None:
    """Sizes of the literature: both see grey images of 28 pixels as 32, and end with 400 and 512 numbers."""
    for kind, features in ((LeNet, 16 * 5 * 5), (VGG11, 512)):
        for channels, size in ((1, 28), (3, 32)):
            model = kind(channels, 7, size)
            images = torch.randn(2, channels, size, size)
            assert model.embed(images).shape == (2, features)
            assert model(images).shape == (2, 7)
    assert sum(p.numel() for p in LeNet(1, 10, 28).parameters()) == 61706
    assert sum(isinstance(layer, nn.Conv2d) for layer in VGG11(width=2).features) == 8


@pytest.mark.parametrize("kind", [LeNet, VGG11])
def test_norms_of_lenet_and_vgg11(kind: Any) -> None:
    small = {"width": 2} if kind is VGG11 else {}
    for norm, layer in (("batch", nn.BatchNorm2d), ("instance", nn.GroupNorm)):
        model = kind(1, 3, 28, norm=norm, **small)
        assert sum(isinstance(module, layer) for module in model.modules()) == (8 if kind is VGG11 else 2)
    bare = kind(1, 3, 28, norm="none", **small)
    assert not [module for module in bare.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNet(1, 3, 11), "lenet: image_size = 11.*at least 12"),
        (lambda: LeNet(3, 3, 15), "lenet: image_size = 15.*at least 16"),
        (lambda: VGG11(1, 3, 27), "vgg11: image_size = 27.*at least 28"),
        (lambda: VGG11(3, 3, 31), "vgg11: image_size = 31.*at least 32"),
        (lambda: VGG11(norm="layer"), "vgg11: norm = 'layer'"),
        (lambda: LeNet(norm="layer"), "lenet: norm = 'layer'"),
    ],
)
def test_impossible_lenets_and_vggs_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()
    assert LeNet(1, 3, 12)(torch.zeros(1, 1, 12, 12)).shape == LeNet(3, 3, 16)(torch.zeros(1, 3, 16, 16)).shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width = 0"),
        ({"norm": "layer"}, "norm = 'layer'"),
        ({"hidden": -1}, "hidden = -1"),
        ({"first_padding": -1}, "first_padding = -1"),
        ({"in_channels": 3, "image_size": 7, "depth": 3}, "3 blocks halve an image of 7 pixels.*at most 2"),
    ],
)
def test_impossible_networks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        BlockNet(**fields)


@pytest.mark.parametrize("kind", [BlockNet, AlexNet, LeNet, VGG11])
def test_a_wrong_input_names_both_shapes(kind: Any) -> None:
    with pytest.raises(InvalidValue, match=r"\(2, 1, 16, 16\); \(N, 3, 32, 32\)"):
        kind(3, 10, 32)(torch.zeros(2, 1, 16, 16))


def test_the_six_layer_network_is_that_of_fedknow():
    model = SixLayerCNN()
    widths = [module.out_channels for module in model.features if isinstance(module, nn.Conv2d)]
    assert widths == [32, 32, 64, 64, 128, 128]
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.25, 0.25, 0.5]
    linear = [module for module in model.classifier if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(2048, 1024), (1024, 100)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    with pytest.raises(InvalidValue, match="image_size = 7"):
        SixLayerCNN(image_size=7)
    with pytest.raises(InvalidValue, match=r"dropout = 0\.5"):
        SixLayerCNN(dropout=0.5)
