"""Siamese augmentation: what each operation does to pixels, and how its numbers are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparing.condensation.siamese import (
    FAMILIES,
    OPERATIONS,
    Draws,
    crop,
    cutout,
    draw_augmentation,
    draw_parameters,
    rotate,
    saturation,
    scale,
    siamese_augment,
)
from sparing.core.errors import InvalidValue


def pictures(height: int = 6, width: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("a", "b"), [(0, 0), (2, -1), (-3, 0), (6, 4), (-7, 9)])
def test_crop_reads_from_a_shifted_place(a: int, b: int) -> None:
    x = pictures()
    expected = torch.zeros_like(x)
    for i in range(6):
        for j in range(4):
            if 0 <= i + a < 6 and 0 <= j + b < 4:
                expected[:, :, i, j] = x[:, :, i + a, j + b]
    assert torch.equal(crop(x, a, b), expected)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (3, 2), (5, 4), (6, 0)])
def test_cutout_clears_half_the_sides(a: int, b: int) -> None:
    x = pictures()
    expected = x.clone()
    for i in range(a - 1, a + 2):  # sides 3 and 2
        for j in range(b - 1, b + 1):
            if 0 <= i < 6 and 0 <= j < 4:
                expected[:, :, i, j] = 0
    assert torch.equal(cutout(x, a, b), expected)


def test_turns_and_zooms_that_are_known() -> None:
    x = pictures(5, 5)
    torch.testing.assert_close(rotate(x, math.pi / 2), x.rot90(1, (2, 3)))
    torch.testing.assert_close(scale(x, 1.0, 1.0), x)
    torch.testing.assert_close(scale(x, -1.0, 1.0), x.flip(3))


def test_grey_pictures_have_no_saturation() -> None:
    grey = pictures(channels=1)
    torch.testing.assert_close(saturation(grey, 0.9), grey)
    assert not torch.allclose(saturation(pictures(), 0.9), pictures())


@given(seed=st.integers(0, 2**31), height=st.integers(2, 9), width=st.integers(2, 9), channels=st.sampled_from([1, 3]))
def test_one_draw_for_all_pictures_and_derivatives(seed: int, height: int, width: int, channels: int) -> None:
    x = pictures(height, width, channels).requires_grad_()
    augment = draw_augmentation(height, width, Draws(torch.Generator().manual_seed(seed)))
    assert augment.operation in FAMILIES
    seen = augment(x)
    assert seen.shape == x.shape
    torch.testing.assert_close(seen[1:], augment(x[1:]))  # each picture for itself, all alike
    (slope,) = torch.autograd.grad(seen.sum(), x)
    assert slope.isfinite().all()


@given(seed=st.integers(0, 2**31), height=st.integers(1, 40), width=st.integers(1, 40))
def test_ranges_of_what_is_drawn(seed: int, height: int, width: int) -> None:
    draws = Draws(torch.Generator().manual_seed(seed))
    drawn = {name: draw_parameters(name, height, width, draws) for name in OPERATIONS}
    for size, shift, centre in zip((height, width), drawn["crop"], drawn["cutout"], strict=True):
        assert abs(shift) <= int(0.125 * size + 0.5)
        assert 0 <= centre <= size - int(0.5 * size + 0.5) % 2
    assert all(1 / 1.2 <= s <= 1.2 for s in drawn["scale"])
    assert abs(drawn["rotate"][0]) <= math.radians(15)
    assert all(0 <= u < 1 for name in ("color", "flip", "contrast") for u in drawn[name])


def test_families_are_picked_from_those_given() -> None:
    draws = Draws(torch.Generator().manual_seed(0))
    assert {draw_augmentation(8, 8, draws, ("flip", "crop")).operation for _ in range(40)} == {"flip", "crop"}


def test_refusals() -> None:
    x, draws = pictures(), Draws(torch.Generator())
    with pytest.raises(InvalidValue, match=r"no augmentation 'rotat'.*Did you mean 'rotate'"):
        siamese_augment(x, "rotat", (0.1,))
    with pytest.raises(InvalidValue, match="scale: 1 parameters; 2 are expected"):
        siamese_augment(x, "scale", (0.1,))
    with pytest.raises(InvalidValue, match="families = 'flip'"):
        draw_augmentation(8, 8, draws, "flip")
    with pytest.raises(InvalidValue, match=r"families = \(\)"):
        draw_augmentation(8, 8, draws, ())
    with pytest.raises(InvalidValue, match="no augmentation 'contrast'"):
        draw_augmentation(8, 8, draws, ("contrast",))
