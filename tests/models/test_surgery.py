"""Other blocks in the place of a network's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparing.core.errors import InvalidValue, NoEffect
from sparing.core.predictor import ModulePredictor, build_model, spec_of, to_onnx
from sparing.models.emo import EMO, InvertedResidualMobileBlock
from sparing.models.mobilenet import InvertedResidual
from sparing.models.surgery import replace_blocks
from sparing.models.vit import OnGrid, TransformerBlock


def irmb(name: str, module: nn.Module) -> nn.Module | None:
    """EMO's block for MobileNet's where the shape stays."""
    if not isinstance(module, InvertedResidual) or not module.skip:
        return None
    width = module.project[0].out_channels
    return InvertedResidualMobileBlock(width, width, exp_ratio=2.0, dim_head=8, window_size=0)  # type: ignore[arg-type]


def test_blocks_of_a_network_are_replaced_and_the_network_is_not() -> None:
    model = build_model("mobilenet", image_size=32).eval()
    images = torch.randn(3, 3, 32, 32)
    before = model(images)
    changed, replaced = replace_blocks(model, irmb)
    assert replaced == ["stages.2.1", "stages.2.2", "stages.3.1"]
    assert all(isinstance(changed.get_submodule(name), InvertedResidualMobileBlock) for name in replaced)
    assert isinstance(changed.get_submodule("stages.2.0"), InvertedResidual)
    assert torch.equal(model(images), before)
    assert not any(isinstance(module, InvertedResidualMobileBlock) for module in model.modules())
    assert changed.stem[0].weight.data_ptr() != model.stem[0].weight.data_ptr()


def test_what_was_replaced_can_be_exported_and_is_not_taken_for_its_builders() -> None:
    model = build_model("mobilenet", image_size=32)
    changed, _ = replace_blocks(model, irmb)
    assert spec_of(model) is not None
    assert spec_of(changed) is None
    with pytest.raises(InvalidValue, match="built by hand"):
        ModulePredictor(changed).payload()
    images = torch.randn(4, 3, 32, 32)
    graph = to_onnx(changed.eval(), (images[:2],))
    assert np.abs(graph(images.numpy()) - changed(images).detach().numpy()).max() < 1e-4


def test_a_transformers_blocks_become_mobile_ones() -> None:
    vit = build_model("vit", image_size=16, patch_size=4, dim=16, depth=2, heads=2)

    def other(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, TransformerBlock):
            return None
        return OnGrid(InvertedResidualMobileBlock(16, 16, norm_layer="ln_2d", dim_head=8, window_size=4), 4, 4)

    changed, replaced = replace_blocks(vit, other)
    assert replaced == ["blocks.0", "blocks.1"]
    assert changed(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_what_was_put_in_is_not_asked_for_and_what_is_kept_is_asked_inside() -> None:
    asked = []

    def wrap(name: str, module: nn.Module) -> nn.Module | None:
        asked.append(name)
        return nn.Sequential(module, nn.ReLU()) if isinstance(module, nn.Conv2d) else None

    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 5, 1))
    changed, replaced = replace_blocks(net, wrap)
    assert asked == ["0", "0.0", "0.1", "1"]
    assert replaced == ["0.0", "1"]
    assert isinstance(changed[0][0][0], nn.Conv2d)


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    calls = []

    def fn(name: str, module: nn.Module) -> nn.Module | None:
        calls.append(name)
        return nn.Linear(4, 4, bias=False) if isinstance(module, nn.Linear) else None

    changed, replaced = replace_blocks(net, fn)
    assert (calls, replaced) == (["0", "1"], ["0", "2"])
    assert changed[0] is changed[2]


def test_nothing_replaced_is_no_effect_and_lists_what_was_looked_at() -> None:
    with pytest.raises(NoEffect, match=r"every module of EMO: .*8 × InvertedResidualMobileBlock"):
        replace_blocks(EMO("0.14M", 10), lambda name, module: None)
    with pytest.raises(NoEffect, match="1 × ReLU"):
        replace_blocks(nn.Sequential(nn.ReLU()), lambda name, module: module)


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(InvalidValue, match="for '0' the function returned a str"):
        replace_blocks(nn.Sequential(nn.ReLU()), lambda name, module: "gelu")  # type: ignore[arg-type,return-value]
