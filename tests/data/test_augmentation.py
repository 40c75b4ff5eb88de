"""Augmentation: every operation against what it should give, the view that carries them out, and the step."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import sparing
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, NoEffect, RecipeError
from sparing.core.job import Job
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.training import Train, fit
from sparing.data import augmentation
from sparing.data.augmentation import (
    RANDAUGMENT,
    Augment,
    AugmentedImages,
    ColourJitter,
    Erase,
    HorizontalFlip,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    randaugment_operation,
    strength,
)
from sparing.data.images import LabelledImages
from sparing.data.preprocessing import ChannelsFirst, Decode, Resize, ToFloat
from sparing.tasks.images.digits import Digits
from sparing.testing import QUICK, tiny_task


def images(count: int = 6, height: int = 20, width: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(3).randint(0, 256, (count, height, width, channels)).astype(np.uint8)


def dataset(channels: int = 3, count: int = 12, side: int = 8, target: int = 8) -> LabelledImages:
    operations = (Decode("RGB" if channels == 3 else "L"), Resize(target, target), ChannelsFirst(), ToFloat())
    raw = images(count, side, side, channels)
    return LabelledImages(raw, np.arange(count) % 3, Preprocessing(operations), "abc")


def shares(lists: list[int], of: int) -> np.ndarray:
    return np.bincount(lists, minlength=of) / len(lists)


EVERY = [
    RandomCrop(3), RandomCrop(3, "reflect"), RandomResizedCrop((20, 16)), HorizontalFlip(), ColourJitter(),
    RandAugment(4, probability=1.0), Erase(1.0),
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", EVERY, ids=lambda op: type(op).__name__)
def test_every_operation_is_seeded_leaves_its_input_and_takes_one_image(operation, channels):
    given = images(channels=channels)
    before = given.copy()
    np.random.seed(5)
    one = operation(given)
    np.random.seed(5)
    again = operation(given)
    other = operation(given)
    assert one.dtype == np.uint8
    assert one.shape == given.shape
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.array_equal(given, before)
    assert operation(given[0]).shape == given[0].shape


@pytest.mark.parametrize("operation", EVERY, ids=lambda op: type(op).__name__)
def test_what_is_no_uint8_image_is_refused_with_its_type_and_shape(operation):
    with pytest.raises(DataError, match=r"float32 of shape \(2, 8, 8, 3\)"):
        operation(np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(DataError, match=r"uint8 of shape \(8, 8\)"):
        operation(np.zeros((8, 8), np.uint8))


# ------------------------------------------------------------------------------------------------- crops, flip, erase


def test_padded_crop_shifts_each_image_by_up_to_the_padding():
    given = images(400, 10, 9)
    np.random.seed(0)
    out = RandomCrop(2)(given)
    shifts = []
    for one, other in zip(given, out, strict=True):
        padded = np.pad(one, ((2, 2), (2, 2), (0, 0)))
        (found,) = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(padded[top : top + 10, left : left + 9], other)
        ]
        shifts.append(5 * found[0] + found[1])
    assert shares(shifts, 25).min() > 0.01  # every one of the 25 comes, at about 4 %
    assert shares(shifts, 25).max() < 0.08


def test_padding_modes():
    given = np.full((1, 4, 4, 1), 200, np.uint8)
    np.random.seed(1)
    assert {RandomCrop(2)(given).min() for _ in range(200)} == {0, 200}
    assert RandomCrop(2, "edge")(given).min() == 200
    assert RandomCrop(2, "reflect")(given).min() == 200
    with pytest.raises(DataError, match="padding = 4 cannot mirror images of 4×4"):
        RandomCrop(4, "reflect")(given)


def test_flip_mirrors_the_share_it_is_told():
    given = images(1000, 4, 4)
    np.random.seed(0)
    out = HorizontalFlip(0.3)(given)
    flipped = [np.array_equal(one, other[:, ::-1]) for one, other in zip(given, out, strict=True)]
    kept = [np.array_equal(one, other) for one, other in zip(given, out, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 0.25 < np.mean(flipped) < 0.35


def test_resized_crop_draws_area_and_proportions_inside_their_ranges():
    crop = RandomResizedCrop(8, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    np.random.seed(0)
    boxes = np.array([crop.box(100, 100) for _ in range(2000)])
    area = boxes[:, 2] * boxes[:, 3] / 1e4
    ratio = boxes[:, 3] / boxes[:, 2]
    assert 0.19 < area.min() < 0.22
    assert 0.56 < area.max() < 0.61
    assert 0.48 < ratio.min() < 0.55
    assert 1.8 < ratio.max() < 2.1
    assert abs(np.log(ratio).mean()) < 0.05
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2]).max() == 100


def test_resized_crop_of_an_image_that_fits_no_part_takes_the_centre():
    assert RandomResizedCrop(8, scale=(1, 1)).box(10, 100) == (0, 43, 10, 13)
    assert RandomResizedCrop(8, scale=(1, 1)).box(100, 10) == (43, 0, 13, 10)


def test_resized_crop_is_pillows_resize_of_the_part(monkeypatch):
    (image,) = images(1)
    monkeypatch.setattr(RandomResizedCrop, "box", lambda self, height, width: (2, 3, 10, 12))
    part = Image.fromarray(image[2:12, 3:15])
    for name in ("bilinear", "bicubic"):
        expected = np.asarray(part.resize((7, 5), Image.Resampling[name.upper()]))
        assert np.array_equal(RandomResizedCrop((5, 7), interpolation=name)(image), expected)
    np.random.seed(0)
    both = {RandomResizedCrop((5, 7))(image).tobytes() for _ in range(20)}
    assert len(both) == 2


def test_resized_crop_takes_images_of_different_sizes():
    assert RandomResizedCrop(8)([images(1, 30, 20)[0], images(1, 9, 40)[0]]).shape == (2, 8, 8, 3)


def test_erase_fills_a_rectangle():
    given = np.full((300, 20, 20, 3), 7, np.uint8)
    np.random.seed(0)
    out = Erase(0.4, scale=(0.25, 0.25), ratio=(1, 1))(given)
    touched = [(one != 7).any(axis=2) for one in out]
    assert 0.3 < np.mean([one.any() for one in touched]) < 0.5
    for one in filter(np.any, touched):
        rows, columns = np.flatnonzero(one.any(axis=1)), np.flatnonzero(one.any(axis=0))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (10, 10)
        assert one.sum() > 90  # random pixels are 7 in all three channels hardly ever


# ------------------------------------------------------------------------------------------------------------- colour


def jitter(image: np.ndarray, brightness: float = 1, contrast: float = 1, saturation: float = 1) -> np.ndarray:
    factors = [np.array([factor], np.float32) for factor in (brightness, contrast, saturation)]
    return augmentation.jittered(image[None], *factors)[0]


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_one_factor_alone_is_pillows_enhancement(kind, factor):
    image = images(1)[0] // 2 + 50
    enhancer = getattr(ImageEnhance, {"saturation": "Color"}.get(kind, kind.capitalize()))
    expected = np.asarray(enhancer(Image.fromarray(image)).enhance(factor)).astype(int)
    assert abs(jitter(image, **{kind: factor}) - expected).max() <= 1


def test_three_factors_at_once_by_hand():
    image = np.array([[[100, 50, 20], [60, 60, 200]]], np.uint8)
    b, c, s = 1.2, 0.5, 1.5
    x = image.astype(float) * b
    weights = np.array([0.299, 0.587, 0.114])
    y = c * x + (1 - c) * (x @ weights).mean()
    z = s * y + (1 - s) * (y @ weights)[..., None]
    np.testing.assert_array_equal(jitter(image, b, c, s), np.clip(np.rint(z), 0, 255).astype(np.uint8))
    assert np.array_equal(jitter(image), image)
    assert jitter(image, 9.0).max() == 255


def test_grey_images_have_no_saturation():
    image = images(1, channels=1)[0]
    assert np.array_equal(jitter(image, saturation=0.3), image)
    assert abs(jitter(image, 0.5).astype(int) - image / 2).max() <= 0.5


def test_jitter_draws_its_factors_evenly(monkeypatch):
    drawn = []
    monkeypatch.setattr(augmentation, "jittered", lambda images, *factors: drawn.append(np.stack(factors)) or images)
    np.random.seed(0)
    ColourJitter(0.4, 0.2, 2.0)(images(4000, 2, 2))
    (factors,) = drawn
    for row, (low, high) in zip(factors, [(0.6, 1.4), (0.8, 1.2), (0.0, 3.0)], strict=True):
        assert low <= row.min() < low + 0.01 * (high - low)
        assert high >= row.max() > high - 0.01 * (high - low)
        assert abs(row.mean() - (low + high) / 2) < 0.02 * (high - low)


# -------------------------------------------------------------------------------------------------------- RandAugment


def done(image: np.ndarray, name: str, magnitude: float, sign: int = 1) -> np.ndarray:
    return randaugment_operation(image, name, magnitude, sign)


def test_the_list_holds_the_fifteen_operations():
    assert sorted(RANDAUGMENT) == sorted(
        ["auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "colour", "contrast",
         "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "magnitude", "sign", "expected"),
    [
        ("rotate", 9, 1, 27), ("rotate", 10, -1, -30), ("rotate", 0, 1, 0),
        ("posterize", 0, 1, 4), ("posterize", 5, 1, 2), ("posterize", 9, 1, 1), ("posterize", 10, -1, 0),
        ("solarize", 0, 1, 256), ("solarize", 9, 1, 26), ("solarize", 10, 1, 0),
        ("solarize_add", 9, 1, 99), ("solarize_add", 9.5, 1, 104),
        ("colour", 9, 1, 1.81), ("contrast", 9, -1, 0.19), ("brightness", 10, -1, 0.1), ("sharpness", 5, 1, 1.45),
        ("shear_x", 9, 1, 0.27), ("shear_y", 9, -1, -0.27),
        ("translate_x", 9, 1, 0.405), ("translate_y", 10, -1, -0.45),
        ("auto_contrast", 9, 1, None), ("equalize", 9, -1, None), ("invert", 9, 1, None),
    ],
)  # fmt: skip
def test_strengths(name, magnitude, sign, expected):
    assert strength(name, magnitude, sign) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_values_by_hand(channels):
    (image,) = images(1, channels=channels)
    x = image.astype(int)
    assert np.array_equal(done(image, "invert", 9), 255 - x)
    for magnitude, bits in ((0, 4), (5, 2), (9, 1), (10, 0)):
        step = 2 ** (8 - bits)
        assert np.array_equal(done(image, "posterize", magnitude), x // step * step)
    assert np.array_equal(done(image, "solarize", 9), np.where(x < 26, x, 255 - x))
    assert np.array_equal(done(image, "solarize", 0), x)
    assert np.array_equal(done(image, "solarize_add", 9), np.where(x < 128, np.minimum(x + 99, 255), x))
    for sign, factor in ((1, 1.81), (-1, 0.19)):
        np.testing.assert_allclose(done(image, "brightness", 9, sign), np.clip(x * factor, 0, 255), atol=1)
    narrow = (image // 2 + 30).astype(np.uint8)
    low, high = narrow.min(axis=(0, 1)), narrow.max(axis=(0, 1))
    np.testing.assert_allclose(done(narrow, "auto_contrast", 9), (narrow - low) / (high - low) * 255.0, atol=1)


@pytest.mark.parametrize("sign", [1, -1])
def test_colour_and_contrast_by_hand(sign):
    (image,) = images(1)
    factor = 1 + sign * 0.9 * 0.7
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    expected = {"colour": grey[..., None], "contrast": np.full((1, 1, 1), round(grey.mean()))}
    for name, from_ in expected.items():
        by_hand = np.clip(from_ + factor * (image - from_), 0, 255)
        np.testing.assert_allclose(done(image, name, 7, sign), by_hand, atol=1)
    grey_image = image[:, :, :1]
    assert np.array_equal(done(grey_image, "colour", 9, sign), grey_image)


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_by_pillow(channels):
    (image,) = images(1, channels=channels)
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    fill = 128 if channels == 1 else (128, 128, 128)

    def same(name, sign, expected):
        expected = np.asarray(expected)
        assert np.array_equal(done(image, name, 9, sign), expected[..., None] if channels == 1 else expected), name

    same("equalize", 1, ImageOps.equalize(picture))
    same("auto_contrast", 1, ImageOps.autocontrast(picture))
    for sign in (1, -1):
        same("sharpness", sign, ImageEnhance.Sharpness(picture).enhance(1 + sign * 0.81))
        same("rotate", sign, picture.rotate(sign * 27.0, Image.Resampling.BILINEAR, fillcolor=fill))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_translation_by_a_share_of_the_side(axis, channels):
    image = images(1, 20, 40, channels)[0]
    along = image if axis == "x" else image.transpose(1, 0, 2)
    given = np.ascontiguousarray(along)
    pixels = 18  # 0.45 of 40
    out = done(given, f"translate_{axis}", 10, 1)
    back = done(given, f"translate_{axis}", 10, -1)
    if axis == "y":
        out, back = out.transpose(1, 0, 2), back.transpose(1, 0, 2)
    assert np.array_equal(out[:, : 40 - pixels], image[:, pixels:])
    assert (out[:, 40 - pixels :] == 128).all()
    assert np.array_equal(back[:, pixels:], image[:, : 40 - pixels])
    assert (back[:, :pixels] == 128).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_shear_of_a_ramp(axis, sign):
    """A linear ramp sheared is a linear ramp: value 6 (x + slope (y + ½)), with pixel centres at halves."""
    side, slope = 40, sign * 0.27
    ramp = np.repeat((6 * np.arange(side))[None, :, None], side, 0).astype(np.uint8)
    given = ramp if axis == "x" else np.ascontiguousarray(ramp.transpose(1, 0, 2))
    out = done(given, f"shear_{axis}", 9, sign)[:, :, 0]
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    source = x + slope * (y + 0.5)
    out = out if axis == "x" else out.T
    inside = (source > 1) & (source < side - 2)
    np.testing.assert_allclose(out[inside], 6 * source[inside], atol=1)
    assert (out[(source < -1) | (source > side)] == 128).all()


def test_operations_are_drawn_evenly_with_the_asked_probability_and_magnitude(monkeypatch):
    calls: list[tuple[str, float, int]] = []

    def note(name, magnitude, sign=1):
        calls.append((name, magnitude, sign))
        return strength(name, magnitude, sign)

    monkeypatch.setattr(augmentation, "strength", note)
    np.random.seed(0)
    count = 3000
    RandAugment()(images(count, 2, 2))
    assert abs(len(calls) / (2 * count) - 0.5) < 0.03
    names = sorted(RANDAUGMENT)
    drawn = shares([names.index(name) for name, _, _ in calls], 15)
    assert drawn.min() > 0.05  # 1/15 each
    assert drawn.max() < 0.085
    magnitudes = np.array([magnitude for _, magnitude, _ in calls])
    assert abs(magnitudes.mean() - 9) < 0.05
    assert abs(magnitudes.std() - 0.5) < 0.05
    assert magnitudes.max() == 10  # cut there: 2.3 % of the draws
    assert abs(np.mean(magnitudes == 10) - 0.023) < 0.015
    assert abs(np.mean([sign for _, _, sign in calls])) < 0.06


def test_with_replacement_and_switched_off(monkeypatch):
    given = images(200, 4, 4)
    monkeypatch.setattr(RandAugment, "NAMES", ("invert",))
    assert np.array_equal(RandAugment(2, probability=1.0)(given), given)  # twice inverted
    assert np.array_equal(RandAugment(3, probability=1.0)(given), 255 - given)
    assert np.array_equal(RandAugment(2, probability=0.0)(given), given)
    np.random.seed(0)
    out = RandAugment(1, probability=0.25)(given)
    inverted = [np.array_equal(one, 255 - other) for one, other in zip(given, out, strict=True)]
    assert 0.17 < np.mean(inverted) < 0.33


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RandomCrop(0), "padding = 0"),
        (lambda: RandomCrop(2, "mirror"), "mode = 'mirror'; constant, edge or reflect"),
        (lambda: RandomResizedCrop(0), "size = 0"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 0.2)), r"scale = (0.5, 0.2)"),
        (lambda: RandomResizedCrop(8, ratio=(0, 2)), "ratio = (0, 2)"),
        (lambda: RandomResizedCrop(8, interpolation="nearest"), "interpolation = 'nearest'"),
        (lambda: HorizontalFlip(1.5), "probability = 1.5"),
        (lambda: ColourJitter(contrast=-1), "contrast = -1"),
        (lambda: RandAugment(0), "operations = 0"),
        (lambda: RandAugment(magnitude=11), "magnitude = 11; 0…10"),
        (lambda: RandAugment(std=-1), "std = -1"),
        (lambda: RandAugment(fill=256), "fill = 256"),
        (lambda: Erase(scale=(0.0, 0.5)), "scale = (0.0, 0.5)"),
        (lambda: strength("rotat", 9), "operation = 'rotat'"),
        (lambda: strength("rotate", 12), "magnitude = 12; 0…10"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises(InvalidValue) as caught:
        make()
    assert named in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- the view


def test_the_view_changes_pixels_before_they_become_floats_and_nothing_else():
    plain = dataset()
    view = AugmentedImages(plain, [HorizontalFlip(1.0)])
    x, y = view.batch([4, 2])
    expected, labels = plain.batch([4, 2])
    assert np.array_equal(x, expected[..., ::-1])
    assert x.dtype == np.float32
    assert np.array_equal(y, labels)
    assert np.array_equal(view.raw([4]), plain.raw([4]))
    assert np.array_equal(plain.pixels([4]), plain.raw([4]))  # the data it looks at are as they were
    assert torch.equal(view[-1][0], plain[-1][0].flip(-1))


def test_parts_of_a_view_are_augmented_and_corrupted_ones_too():
    plain = dataset()
    view = AugmentedImages(plain, [HorizontalFlip(1.0)])
    assert np.array_equal(view.subset([3, 1]).pixels([0]), plain.pixels([3])[:, :, ::-1])
    dark = view.corrupted("dark", lambda pixels, rows: pixels // 2)
    assert np.array_equal(dark.pixels([0]), plain.pixels([0])[:, :, ::-1] // 2)
    twice = AugmentedImages(view, [HorizontalFlip(1.0)])
    assert np.array_equal(twice.pixels([0, 1]), plain.pixels([0, 1]))


@pytest.mark.parametrize("nested", [False, True])
def test_a_resized_crop_cuts_from_the_whole_image_where_it_can(nested, monkeypatch):
    seen = []
    monkeypatch.setattr(RandomResizedCrop, "box", lambda self, h, w: seen.append((h, w)) or (0, 0, h, w))
    plain = dataset(side=24, target=8)
    below = AugmentedImages(plain, [HorizontalFlip(1.0)]) if nested else plain
    view = AugmentedImages(below, [RandomResizedCrop(8, interpolation="bicubic"), HorizontalFlip(1.0)])
    out = view.pixels([0, 5])
    assert seen == ([(8, 8)] * 2 if nested else [(24, 24)] * 2)
    expected = plain.pixels([0, 5])
    assert np.array_equal(out, expected if nested else expected[:, :, ::-1])


def test_encoded_files_of_different_sizes_are_decoded_and_cropped():
    def encoded(height, width):
        file = io.BytesIO()
        Image.fromarray(images(1, height, width)[0]).save(file, "PNG")
        return file.getvalue()

    class Files:
        def __len__(self):
            return 2

        def take(self, rows):
            return [encoded(20 + 10 * row, 30) for row in rows]

        def fingerprint(self):
            return "two"

    preprocessing = Preprocessing((Decode(), Resize(8, 8), ChannelsFirst(), ToFloat()))
    plain = LabelledImages(Files(), np.array([0, 1]), preprocessing, "ab")
    assert AugmentedImages(plain, [RandomResizedCrop(8)]).batch([0, 1])[0].shape == (2, 3, 8, 8)


def test_the_fingerprint_changes_with_settings_and_data():
    plain = dataset()
    views = [
        plain,
        AugmentedImages(plain, [RandomCrop(1)]),
        AugmentedImages(plain, [RandomCrop(2)]),
        AugmentedImages(plain, [RandomCrop(2), HorizontalFlip()]),
        AugmentedImages(plain, [HorizontalFlip(), RandomCrop(2)]),
        AugmentedImages(plain.subset([1, 2]), [RandomCrop(2)]),
        AugmentedImages(plain, [RandomCrop(2)]).subset([1, 2]),
    ]
    prints = [view.fingerprint() for view in views]
    assert prints[-1] == prints[-2]  # the same images, whichever came first
    assert len(set(prints)) == len(prints) - 1
    assert prints[2] == AugmentedImages(dataset(), [RandomCrop(2)]).fingerprint()


# ----------------------------------------------------------------------------------------------------------- the step


@pytest.fixture
def job(store_folder) -> Job:
    from sparing.core.store import Store

    splits = (task := Digits()).splits(None)
    few = replace(splits, train=splits.train.subset(range(48)), val=splits.val.subset(range(30)))
    bound = Store(store_folder).bind("digits", seed=5).child("augment")
    return Job(task, few.train, few.val, few.calibration, task.default_model(), 5, bound)


def test_only_training_images_change(job):
    after = Augment().apply(job)
    assert isinstance(after.train, AugmentedImages)
    assert [type(op).__name__ for op in after.train.augmentations] == ["RandomCrop", "ColourJitter"]
    assert after.train.augmentations[0] == RandomCrop(1)  # an eighth of 8 pixels
    assert after.val is job.val
    assert after.calibration is job.calibration
    assert "8×8, 1 channel" in after.notes.remarks[0]
    assert "RandomCrop(padding=1" in after.notes.remarks[0]


def test_fields_choose_the_operations():
    def made(**fields):
        return Augment(**fields).operations(64, 64)

    assert made() == (RandomCrop(8), ColourJitter(0.4, 0.4, 0.4))
    assert made(randaugment=2, flip=0.5, crop="resized") == (
        RandomResizedCrop((64, 64)),
        HorizontalFlip(0.5),
        RandAugment(2, 9.0, 0.5, 0.5),
    )
    assert made(randaugment=1, jitter=0.1, crop="off", erase=0.25, magnitude=5, magnitude_std=0, probability=1) == (
        ColourJitter(0.1, 0.1, 0.1),
        RandAugment(1, 5.0, 0.0, 1.0),
        Erase(0.25),
    )
    with pytest.raises(InvalidValue, match=r"augment: scale = \(0.5, 0.2\)"):
        Augment(scale=(0.5, 0.2))


def test_nothing_switched_on_has_no_effect(job):
    with pytest.raises(NoEffect, match="crop = off, flip = 0, jitter = 0, randaugment = 0, erase = 0"):
        Augment(crop="off", jitter=0).apply(job)


def test_data_without_pixels_are_refused(job):
    tensors = tiny_task().splits(None).train
    with pytest.raises(IncompatibleStep, match=r"torch\.utils\.data\.dataset\.TensorDataset; uint8 images"):
        Augment().apply(job.replace(train=tensors))


def test_a_recipe_without_training_after_it_is_refused():
    with pytest.raises(RecipeError, match="'augment' promises training"):
        sparing.run(task="digits", steps=[Augment()], meter=QUICK, store=None)


def test_what_is_trained_does_not_depend_on_workers_and_does_on_the_augmentation(job):
    def weights(data, workers):
        settings = Train(epochs=2, batch_size=16, workers=workers)
        torch.manual_seed(0)
        return fit(job.task.default_model(), job.task, data, None, settings, seed=1).model.state_dict()

    view = Augment(randaugment=2).apply(job).train
    alone, helped, plain = weights(view, 0), weights(view, 2), weights(job.train, 0)
    assert all(torch.equal(alone[name], helped[name]) for name in alone)
    assert not all(torch.equal(alone[name], plain[name]) for name in alone)
