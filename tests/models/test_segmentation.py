"""Segmentation decoders: published counts, shapes, the auxiliary head, refusals, export."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from sparing.core.errors import InvalidValue
from sparing.core.predictor import build_model, to_onnx
from sparing.models.mobilenet import MobileNet
from sparing.models.segmentation import AtrousPyramid, PooledPyramid, SegmentationModel, _means

SMALL: dict[str, Any] = {"name": "mobilenet", "widths": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "expansion": 2}
PUBLISHED = {
    ("1M", "deeplabv3"): 5.6,
    ("2M", "deeplabv3"): 6.9,
    ("5M", "deeplabv3"): 10.3,
    ("1M", "psp"): 4.3,
    ("2M", "psp"): 5.5,
    ("5M", "psp"): 8.5,
}
"""Million parameters with 150 classes, as published, cut behind the first digit."""


def small(**fields: Any) -> SegmentationModel:
    return SegmentationModel(SMALL, **{"num_classes": 5, "channels": 8, "dilations": [1, 2], **fields})


@pytest.mark.parametrize(("variant", "decoder"), PUBLISHED)
def test_as_many_parameters_as_published(variant: str, decoder: Any) -> None:
    with torch.device("meta"):
        model = SegmentationModel({"name": "emo", "variant": variant}, decoder=decoder)
    count = sum(p.numel() for p in model.parameters())
    assert math.floor(count / 1e5) / 10 == PUBLISHED[variant, decoder]


@pytest.mark.parametrize("decoder", ["deeplabv3", "psp"])
def test_shapes(decoder: Any) -> None:
    model = small(decoder=decoder)
    images = torch.randn(2, 3, 64, 48)
    main, other = model.train()(images)
    assert main.shape == (2, 5, 4, 3)  # stride 16
    assert other.shape == (2, 5, 8, 6)
    assert model.eval()(images).shape == (2, 5, 4, 3)
    assert small(decoder=decoder, auxiliary=False).train()(images).shape == (2, 5, 4, 3)
    assert small(decoder=decoder, stage=2).eval()(images).shape == (2, 5, 16, 12)


def test_the_branches_of_deeplab_by_hand() -> None:
    decoder = AtrousPyramid(3, 4, (1, 2)).eval()
    x = torch.randn(2, 3, 6, 7)
    image = decoder.image(x.mean((2, 3), keepdim=True)).expand(-1, -1, 6, 7)
    joined = torch.cat([image, decoder.branches[0](x), decoder.branches[1](x)], 1)
    torch.testing.assert_close(decoder(x), decoder.join(joined))
    dilated = decoder.branches[1][0]  # type: ignore[index]
    assert (dilated.dilation, dilated.padding, dilated.kernel_size) == ((2, 2), (2, 2), (3, 3))


@pytest.mark.parametrize(("height", "width", "parts"), [(6, 6, 3), (4, 5, 3), (2, 7, 6), (1, 1, 2)])
def test_means_of_parts_are_those_of_torch(height: int, width: int, parts: int) -> None:
    x = torch.randn(2, 3, height, width)
    ours = _means(height, parts) @ x @ _means(width, parts).T
    torch.testing.assert_close(ours, adaptive_avg_pool2d(x, parts))


@pytest.mark.parametrize("decoder", ["deeplabv3", "psp"])
def test_a_batch_of_one_can_be_trained_on(decoder: Any) -> None:
    main, other = small(decoder=decoder).train()(torch.randn(1, 3, 32, 32))
    (main.square().mean() + other.square().mean()).backward()
    assert main.isfinite().all()


def test_a_classifiers_weights_become_the_backbone() -> None:
    plain = {name: value for name, value in SMALL.items() if name != "name"}
    classifier, model = MobileNet(num_classes=7, **plain), small()
    model.load_backbone(classifier.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        model.eval().backbone.forward_features(images)[-1], classifier.eval().forward_features(images)[-1]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": "unet"}, "decoder = 'unet'"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"channels": 0}, "channels = 0"),
        ({"dilations": [1, 0]}, r"dilations\[1\] = 0"),
        ({"pools": [0]}, r"pools\[0\] = 0"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"stage": 5}, "stage = 5; 2…4"),
        ({"stage": 1}, "stage = 1; a whole number of at least 2"),
    ],
)
def test_impossible_segmenters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        small(**fields)


@pytest.mark.parametrize("backbone", [SMALL, {"name": "emo", "variant": "0.14M-32px"}], ids=["mobilenet", "emo"])
def test_stages_that_nothing_looks_at_are_left_out(backbone: dict[str, Any]) -> None:
    whole = build_model(backbone["name"], **{k: v for k, v in backbone.items() if k != "name"}, num_classes=10)
    model = SegmentationModel(backbone, 5, channels=8, dilations=[1, 2], stage=2)
    names = {name.removeprefix("backbone.").split(".block")[0] for name in model.state_dict()}
    assert not any(name.startswith(("stages.2", "stages.3", "stage3", "stage4")) for name in names)
    model.load_backbone(whole.state_dict())  # of the classifier's stages, those that are there
    images = torch.randn(2, 3, 32, 32)
    kept, all_ = model.eval().backbone(images), whole.eval().forward_features(images)  # type: ignore[operator]
    assert len(kept) == 2
    torch.testing.assert_close(kept[1], all_[1])
    (model.train()(images)[0].sum() + model(images)[1].sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.backbone.keep_stages(1)  # type: ignore[attr-defined]
    model.load_backbone(whole.state_dict())  # what was left out before is still known
    with pytest.raises(InvalidValue, match="keep_stages"):
        model.backbone.keep_stages(3)  # type: ignore[attr-defined]


def test_the_pyramid_keeps_the_map_itself() -> None:
    decoder = PooledPyramid(3, 4, (1, 2)).eval()
    assert decoder.join[0].in_channels == 3 + 2 * 4  # type: ignore[union-attr]
    assert isinstance(decoder.join[0], nn.Conv2d)


@pytest.mark.parametrize("decoder", ["deeplabv3", "psp"])
def test_exported_a_segmenter_computes_the_same(decoder: str) -> None:
    fields = {"backbone": SMALL, "num_classes": 5, "channels": 8, "dilations": [1, 2], "decoder": decoder}
    model = build_model("segmenter", **fields).eval()
    images = torch.randn(5, 3, 48, 48)
    graph = to_onnx(model, (images[:2],))
    np.testing.assert_allclose(graph(images.numpy()), model(images).detach().numpy(), atol=1e-4)
