"""The residual network: counts, shapes, the skip, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparing.core.errors import InvalidValue
from sparing.models.resnet import BasicBlock, ResNet


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet18_and_34_have_the_parameters_that_are_known_of_them() -> None:
    wide = (64, 128, 256, 512)
    with torch.device("meta"):
        assert parameters(ResNet(3, 1000, wide, stem="large")) == 11_689_512
        assert parameters(ResNet(3, 1000, wide, (3, 4, 6, 3), "large")) == 21_797_672
        assert parameters(ResNet(1)) == 701_178


def test_stages_halve_the_resolution() -> None:
    model, sizes = ResNet(1, 5, (4, 6, 8), (1, 2, 1)), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 5)
    assert sizes == [(4, 28, 28), (6, 14, 14), (8, 7, 7)]
    assert ResNet(3, 5, (4,), 1, "large").stem(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 16, 16)


def test_without_its_convolutions_a_block_passes_its_input() -> None:
    block = BasicBlock(4, 4).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ()}, "widths is empty"),
        ({"widths": (8, 0)}, r"widths\[1\] = 0"),
        ({"depths": (1, 1)}, r"depths = \(1, 1\); a whole number, or 4"),
        ({"stem": "tiny"}, "stem = 'tiny'"),
        ({"in_channels": 0}, "in_channels = 0"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        ResNet(**fields)


def test_a_wrong_input_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"\(N, 3, H, W\)"):
        ResNet(3, 5, (4,), 1)(torch.zeros(1, 1, 8, 8))


def test_norms_and_the_resnet_of_condensed_images() -> None:
    """ResNet-18 for small images has 11.17 M parameters, with batch norm or instance norm; without, biases instead."""
    wide = {"widths": (64, 128, 256, 512), "depths": 2}
    for norm, parameters in (("batch", 11_173_962), ("instance", 11_173_962), ("none", 11_169_162)):
        with torch.device("meta"):
            assert sum(p.numel() for p in ResNet(3, 10, norm=norm, **wide).parameters()) == parameters
    model = ResNet(1, 3, (4, 8), 1, norm="instance")
    images = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))
    bare = ResNet(1, 3, (4, 8), 1, norm="none")
    assert bare.stages[1][0].conv1.bias is not None
    assert not [module for module in bare.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    with pytest.raises(InvalidValue, match="resnet: norm = 'layer'"):
        ResNet(norm="layer")
