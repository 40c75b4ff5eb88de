"""The convolutional network and the perceptron: shapes, sizes, refusals, rebuilding, export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparing.core.errors import InvalidValue
from sparing.core.predictor import build_model, spec_of
from sparing.models.convnet import ConvNet
from sparing.models.mlp import MLP


@pytest.mark.parametrize("size", [8, 9, 28, 33, 224])
@pytest.mark.parametrize("downsample", ["pool", "stride"])
@pytest.mark.parametrize("head", ["average", "flatten"])
def test_every_size_and_form(size: int, downsample: str, head: str) -> None:
    model = ConvNet(3, 7, size, widths=(4, 6, 8, 10), depths=(1, 2, 1, 1), downsample=downsample, head=head)  # type: ignore[arg-type]
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_stages_halve_the_resolution() -> None:
    model = ConvNet(1, 10, 28, widths=(2, 3, 4))
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 1, 28, 28))
    assert sizes == [(2, 28, 28), (3, 14, 14), (4, 7, 7)]


def test_the_default_is_large_enough_to_be_worth_shrinking() -> None:
    assert sum(parameter.numel() for parameter in ConvNet().parameters()) >= 300_000


def test_only_plain_operations() -> None:
    kinds = {type(module) for module in ConvNet(downsample="stride").modules() if not list(module.children())}
    assert kinds <= {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 4, "widths": [8, 8, 8, 8]}, "4 stages halve the image 3 times.* at least 8, not 4"),
        ({"widths": []}, "widths is empty"),
        ({"widths": [8, 16], "depths": [1, 2, 3]}, "depths has 3 entries, widths has 2"),
        ({"widths": [8, 0]}, r"widths\[1\] = 0"),
        ({"depths": 0}, r"depths\[0\] = 0"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"num_classes": 2.5}, "num_classes = 2.5"),
        ({"downsample": "crop"}, "downsample = 'crop'"),
        ({"head": "max"}, "head = 'max'"),
    ],
)
def test_impossible_networks_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        ConvNet(**fields)  # type: ignore[arg-type]


def test_a_wrong_input_names_both_shapes() -> None:
    with pytest.raises(InvalidValue, match=r"\(2, 1, 28, 28\); \(N, 3, 28, 28\)"):
        ConvNet(3)(torch.zeros(2, 1, 28, 28))
    with pytest.raises(InvalidValue, match=r"\(2, 1, 9, 9\); 64 numbers"):
        MLP(1, 10, 8)(torch.zeros(2, 1, 9, 9))


@pytest.mark.parametrize("name", ["convnet", "mlp"])
def test_built_again_from_its_spec(name: str) -> None:
    model = build_model(name, widths=[8, 4], image_size=12)
    spec = spec_of(model)
    assert spec is not None
    again = build_model(spec)
    again.load_state_dict(model.state_dict())
    images = torch.randn(3, 1, 12, 12)
    assert torch.equal(model.eval()(images), again.eval()(images))


def test_perceptron_shapes() -> None:
    assert MLP(3, 5, 8, widths=(16, 8), dropout=0.5)(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert MLP(in_features=13, num_classes=2, widths=())(torch.zeros(4, 13)).shape == (4, 2)
    with pytest.raises(InvalidValue, match=r"dropout = 1\.0"):
        MLP(dropout=1.0)
    with pytest.raises(InvalidValue, match=r"widths\[0\] = -3"):
        MLP(widths=(-3,))


@pytest.mark.parametrize("head", ["average", "flatten"])
@pytest.mark.parametrize("downsample", ["pool", "stride"])
def test_exported_it_computes_the_same(head: str, downsample: str) -> None:
    from sparing.core.predictor import to_onnx

    model = build_model("convnet", image_size=8, widths=[8, 16], downsample=downsample, head=head).eval()
    images = torch.randn(5, 1, 8, 8)
    predictor = to_onnx(model, (images[:2],))
    np.testing.assert_allclose(predictor(images.numpy()), model(images).detach().numpy(), atol=1e-4)
