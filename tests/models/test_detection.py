"""SSDLite: anchors, matching and losses against brute-force restatements; published counts; refusals; export."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.core.predictor import build_model, to_onnx
from sparing.core.task import IGNORED
from sparing.data.boxes import decode_boxes
from sparing.models.detection import (
    LoneBatchNorm,
    SSDLiteDetector,
    corners,
    encode_boxes,
    level_sizes,
    match_anchors,
    ssd_anchors,
    ssd_losses,
)
from sparing.models.emo import EMO
from sparing.models.mobilenet import MobileNet

SMALL: dict[str, Any] = {"name": "mobilenet", "widths": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "expansion": 2}
PUBLISHED = {"1M": 2.3, "2M": 3.3, "5M": 6.0}
"""Million parameters with 80 classes, as published, cut behind the first digit."""


def small(**fields: Any) -> SSDLiteDetector:
    return SSDLiteDetector(SMALL, **{"num_classes": 3, "image_size": 32, "extra_channels": [8], **fields})


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def overlap(anchor: list[float], box: list[float]) -> float:
    cx, cy, w, h = anchor
    wide = min(cx + w / 2, box[2]) - max(cx - w / 2, box[0])
    tall = min(cy + h / 2, box[3]) - max(cy - h / 2, box[1])
    shared = max(0, wide) * max(0, tall)
    return shared / (w * h + (box[2] - box[0]) * (box[3] - box[1]) - shared)


def drawn_boxes(count: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    sides = torch.rand(count, 2, generator=draw) * 0.5 + 0.05
    corner = torch.rand(count, 2, generator=draw) * (1 - sides)
    return torch.cat([corner, corner + sides], 1)


def test_published_sizes() -> None:
    assert [round(320 * size) for size in level_sizes(6)] == [48, 100, 150, 202, 253, 304, 320]
    np.testing.assert_allclose(level_sizes(3), [0.15, 0.55, 0.95, 1.0])


def test_anchors_one_by_one() -> None:
    maps, sizes = [(3, 4), (2, 2)], [0.2, 0.4, 0.9]
    expected = []
    for (rows, columns), small_, large in zip(maps, sizes, sizes[1:], strict=False):
        for row in range(rows):
            for column in range(columns):
                cx, cy = (column + 0.5) * round(60 / columns) / 60, (row + 0.5) * round(60 / rows) / 60
                for w, h in (
                    (small_, small_),
                    (math.sqrt(small_ * large), math.sqrt(small_ * large)),
                    (small_ * math.sqrt(2), small_ / math.sqrt(2)),
                    (small_ / math.sqrt(2), small_ * math.sqrt(2)),
                    (small_ * math.sqrt(3), small_ / math.sqrt(3)),
                    (small_ / math.sqrt(3), small_ * math.sqrt(3)),
                ):
                    expected.append([cx, cy, w, h])
    np.testing.assert_allclose(ssd_anchors(maps, sizes, 60).numpy(), expected, rtol=1e-6)


def test_strides_of_320_pixels_are_the_published_ones() -> None:
    maps = [(side, side) for side in (20, 10, 5, 3, 2, 1)]
    anchors = ssd_anchors(maps, level_sizes(6), 320)
    assert len(anchors) == 3234
    first = 0
    for side, stride in zip((20, 10, 5, 3, 2, 1), (16, 32, 64, 107, 160, 320), strict=True):
        assert float(anchors[first, 0]) * 320 == pytest.approx(stride / 2)
        first += side * side * 6


@given(st.integers(0, 10_000), st.integers(0, 4), st.sampled_from([0.3, 0.5, 0.9]))
@settings(max_examples=50, deadline=None)
def test_matching_is_the_brute_one(seed: int, objects: int, threshold: float) -> None:
    anchors = ssd_anchors([(3, 3), (2, 2)], [0.25, 0.5, 0.9], 30)
    boxes = drawn_boxes(objects, seed)
    table = [[overlap(a, b) for b in boxes.tolist()] for a in anchors.tolist()]
    expected = [max(range(objects), key=row.__getitem__) if objects and max(row) >= threshold else -1 for row in table]
    for number in sorted(range(objects), key=lambda n: max(row[n] for row in table)):
        column = [row[number] for row in table]
        expected[column.index(max(column))] = number
    # ties of float32 apart, which the brute form works out in float64
    found = match_anchors(anchors, boxes, threshold).tolist()
    for anchor, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            close = [abs(v - threshold) < 1e-5 for v in table[anchor]]
            best = [max(row[n] for row in table) for n in range(objects)]
            assert any(close) or any(abs(table[anchor][n] - best[n]) < 1e-5 for n in range(objects))


def test_each_object_has_its_best_anchor() -> None:
    anchors = torch.tensor([[0.25, 0.25, 0.3, 0.3], [0.75, 0.75, 0.3, 0.3]])
    tiny, near = torch.tensor([0.7, 0.7, 0.72, 0.72]), torch.tensor([0.6, 0.6, 0.88, 0.88])
    assert match_anchors(anchors, tiny[None]).tolist() == [-1, 0]
    assert match_anchors(anchors, torch.stack([near, tiny])).tolist() == [-1, 0]  # who overlaps it most has it
    assert match_anchors(anchors, torch.stack([tiny, near])).tolist() == [-1, 1]
    assert match_anchors(anchors, torch.zeros(0, 4)).tolist() == [-1, -1]


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_encoding_and_decoding_undo_each_other(seed: int) -> None:
    anchors = ssd_anchors([(2, 3)], [0.3, 0.6], 60)
    boxes = drawn_boxes(len(anchors), seed)
    again = decode_boxes(encode_boxes(boxes, anchors).numpy(), anchors.numpy())
    np.testing.assert_allclose(again, boxes.numpy(), atol=1e-5)
    np.testing.assert_allclose(decode_boxes(np.zeros((6, 4)), anchors.numpy()[:6]), corners(anchors[:6]), atol=1e-6)


def brute_loss(logits: Tensor, offsets: Tensor, anchors: Tensor, boxes: Tensor, labels: list[int]) -> list[float]:
    """(classification, boxes, positives) of one image, anchor by anchor."""
    matched = match_anchors(anchors, boxes).tolist()
    classes = place = 0.0
    background = []
    for number, which in enumerate(matched):
        log_probabilities = logits[number].log_softmax(0).tolist()
        if which < 0:
            background.append(-log_probabilities[-1])
            continue
        classes -= log_probabilities[labels[which]]
        cx, cy, w, h = anchors[number].tolist()
        x1, y1, x2, y2 = boxes[which].tolist()
        aims = (
            ((x1 + x2) / 2 - cx) / w / 0.1,
            ((y1 + y2) / 2 - cy) / h / 0.1,
            math.log((x2 - x1) / w) / 0.2,
            math.log((y2 - y1) / h) / 0.2,
        )
        for ours, aim in zip(offsets[number].tolist(), aims, strict=True):
            gap = abs(ours - aim)
            place += gap * gap / 2 if gap < 1 else gap - 0.5
    positives = len(matched) - len(background)
    classes += sum(sorted(background, reverse=True)[: 3 * positives])
    return [classes, place, positives]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_loss_is_the_brute_one(seed: int) -> None:
    torch.manual_seed(seed)
    anchors = ssd_anchors([(4, 4), (2, 2)], [0.2, 0.45, 0.8], 32)
    counts = [2, 0, 3]
    boxes = torch.zeros(3, 3, 4)
    labels = torch.full((3, 3), IGNORED)
    for image, count in enumerate(counts):
        boxes[image, :count] = drawn_boxes(count, seed + image)
        labels[image, :count] = torch.randint(0, 4, (count,))
    logits, offsets = torch.randn(3, len(anchors), 5) * 2, torch.randn(3, len(anchors), 4) * 2
    found = ssd_losses(logits, offsets, anchors, boxes, labels)
    for image, count in enumerate(counts):
        expected = brute_loss(
            logits[image], offsets[image], anchors, boxes[image, :count], labels[image, :count].tolist()
        )
        np.testing.assert_allclose([float(part[image]) for part in found], expected, rtol=1e-4, atol=1e-4)
    assert float(found.classes[1]) == float(found.boxes[1]) == int(found.positives[1]) == 0


@pytest.mark.parametrize("variant", PUBLISHED)
def test_as_many_parameters_as_published(variant: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 320 pixels are padded to windows of 7
        with torch.device("meta"):
            count = parameters(SSDLiteDetector({"name": "emo", "variant": variant}))
    assert math.floor(count / 1e5) / 10 == PUBLISHED[variant]


def test_levels_and_outputs() -> None:
    model = small().eval()
    found = model(torch.randn(2, 3, 32, 32))
    count = 6 * (16 + 4 + 1)  # strides 8, 16 and 32 at 32 pixels with a stem that keeps them
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "logits": (2, count, 4),
        "offsets": (2, count, 4),
        "anchors": (2, count, 4),
    }
    torch.testing.assert_close(found["anchors"][0], found["anchors"][1])
    assert not any("anchors" in name for name in model.state_dict())


def test_an_anchors_outputs_come_from_its_cell() -> None:
    model = small().eval()
    images = torch.randn(1, 3, 32, 32)
    level = next(model.levels(images))
    row, column, kind = 2, 1, 4
    number = (row * 4 + column) * 6 + kind
    expected = model.classify[0](level)[0, kind * 4 : kind * 4 + 4, row, column]
    torch.testing.assert_close(model(images)["logits"][0, number], expected)


def test_a_classifiers_weights_become_the_backbone() -> None:
    plain = {name: value for name, value in SMALL.items() if name != "name"}
    classifier = MobileNet(num_classes=7, image_size=32, **plain)
    model = small()
    model.load_backbone(classifier.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(
        model.eval().backbone.forward_features(images), classifier.eval().forward_features(images), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(InvalidValue, match=r"stages\.0\.0\.expand\.0\.weight"):
        model.load_backbone(MobileNet(expansion=3, widths=(4, 6, 8, 8), depths=(1, 1, 1, 1)).state_dict())


def test_frozen_statistics_stay() -> None:
    for frozen in (True, False):
        model = small(frozen_statistics=frozen).train()
        before = model.state_dict()["backbone.stem.1.running_mean"].clone()
        model(torch.randn(4, 3, 32, 32) + 3)
        assert torch.equal(before, model.state_dict()["backbone.stem.1.running_mean"]) is frozen
        assert model.extra[0][0][1].training  # type: ignore[index]


def test_one_value_has_no_variance() -> None:
    norm = LoneBatchNorm(3).train()
    norm.running_mean.fill_(1.0)  # type: ignore[union-attr]
    torch.testing.assert_close(norm(torch.ones(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1), atol=1e-4, rtol=0)
    assert small().train()(torch.randn(1, 3, 32, 32))["logits"].isfinite().all()
    several = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(norm(several), nn.BatchNorm2d(3).train()(several))


class Halved(nn.Module):
    """What is asked of a backbone, and nothing more."""

    embed_dims = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(3, 4, 2, 2)

    def forward_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.only(images)]


def test_a_module_of_ones_own_may_be_the_backbone() -> None:
    backbone = EMO("0.14M-32px", features_only=True)
    model = SSDLiteDetector(backbone, num_classes=2, image_size=32, extra_channels=())
    assert model.backbone is backbone
    assert model(torch.randn(1, 3, 32, 32))["logits"].shape == (1, 6 * (16 + 4), 3)
    model = SSDLiteDetector(Halved(), num_classes=2, image_size=32, stages=(1,), extra_channels=())
    assert model(torch.randn(1, 3, 32, 32))["logits"].shape == (1, 6 * 256, 3)
    with pytest.raises(InvalidValue, match="forward_features"):
        SSDLiteDetector(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 0}, "num_classes = 0"),
        ({"stages": [4, 3]}, r"stages = \[4, 3\]"),
        ({"stages": [3, 5]}, r"some of 1…4"),
        ({"stages": []}, r"stages = \[\]"),
        ({"extra_channels": [8, 0]}, r"extra_channels\[1\] = 0"),
        ({"sizes": [4, 8]}, "4 growing numbers"),
        ({"sizes": [4, 16, 8, 20]}, "4 growing numbers"),
        ({"ratios": [2, -1]}, "ratios"),
        ({"backbone": "no such model"}, "ssdlite: backbone = 'no such model'"),
    ],
)
def test_impossible_detectors_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        SSDLiteDetector(**{"backbone": SMALL, "num_classes": 3, "image_size": 32, "extra_channels": [8], **fields})


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"\(N, channels, 32, 32\)"):
        small()(torch.zeros(1, 3, 48, 48))


def test_exported_a_detector_computes_the_same() -> None:
    model = build_model("ssdlite", backbone=SMALL, num_classes=3, image_size=32, extra_channels=[8]).eval()
    images = torch.randn(5, 3, 32, 32)
    graph, ours = to_onnx(model, (images[:2],))(images.numpy()), model(images)
    for name, part in ours.items():
        np.testing.assert_allclose(graph[name], part.detach().numpy(), atol=1e-4)
