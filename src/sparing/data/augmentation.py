"""Augmentation: random changes of uint8 training images that leave their labels true.

The operations are plain callables for anybody's own loop: uint8 (N, H, W, C), or one image (H, W, C), with C = 1 or 3
→ the same kind, never in place. Every image of a batch draws for itself, from NumPy's global generator; ``np.random.
seed`` makes a result repeatable, and a training by :class:`sparing.core.training.SeededItems` seeds each batch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, NoEffect
from sparing.core.files import canonical_json
from sparing.core.step import Stage, Step, step
from sparing.core.task import IGNORED
from sparing.data.coco import Boxes, DenseImages, Target, nearest
from sparing.data.images import LabelledImages
from sparing.data.preprocessing import Decode, Normalise

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparing.core.job import Job

Interpolation = Literal["bilinear", "bicubic", "random"]
Pair = tuple[float, float]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in grey (ITU-R 601-2)."""


class Augmentation(ABC):
    """A random change of uint8 images; subclasses are dataclasses and define :meth:`change`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Uint8 (N, H, W, C) or (H, W, C) → the same kind; :class:`DataError` for anything else."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] not in (1, 3) or not images.size:
            raise DataError(
                f"{type(self).__name__}: {images.dtype} of shape {images.shape}; uint8 ([images,] height, width, 1 or "
                "3 channels) is expected"
            )
        return self.change(images) if images.ndim == 4 else self.change(images[None])[0]

    @abstractmethod
    def change(self, images: np.ndarray) -> np.ndarray:
        """Uint8 (N, H, W, C) → uint8 (N, H', W', C)."""

    def _require(self, holds: bool, fields: str, right: str) -> None:
        if not holds:
            given = ", ".join(f"{name} = {getattr(self, name)!r}" for name in fields.split())
            raise InvalidValue(f"{type(self).__name__}: {given}; {right} is expected")


# ----------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class RandomCrop(Augmentation):
    """Pad all sides and cut a part of the old size from anywhere (He et al. 2016, section 4.2: 4 of 32 pixels)."""

    padding: int
    """Pixels added on each side."""
    mode: Literal["constant", "edge", "reflect"] = "constant"
    """What they hold: black, the outermost pixel, or the mirrored image."""

    def __post_init__(self) -> None:
        self._require(self.padding >= 1, "padding", "at least 1")
        self._require(self.mode in ("constant", "edge", "reflect"), "mode", "constant, edge or reflect")

    def change(self, images: np.ndarray) -> np.ndarray:
        """Same shape."""
        count, height, width, _ = images.shape
        pad = self.padding
        if self.mode == "reflect" and pad >= min(height, width):
            raise DataError(f"RandomCrop: padding = {pad} cannot mirror images of {height}×{width} pixels")
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=self.mode)
        result = np.empty_like(images)
        offsets = np.random.randint(0, 2 * pad + 1, (count, 2))
        for number, (top, left) in enumerate(offsets.tolist()):
            result[number] = padded[number, top : top + height, left : left + width]
        return result


@dataclass(frozen=True)
class RandomResizedCrop(Augmentation):
    """Cut a part of random area and proportions and bring it to one size (Szegedy et al. 2015, section 6).

    The part's share of the area is uniform in ``scale``, the logarithm of width / height uniform in that of ``ratio``.
    A part that would not fit is drawn again; after ten times the largest central part within ``ratio`` is taken. Images
    may come as a list of different sizes.
    """

    size: int | tuple[int, int]
    """Side of the square result, or (height, width)."""
    scale: Pair = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: Pair = (3 / 4, 4 / 3)
    """Smallest and largest width / height."""
    interpolation: Interpolation = "random"
    """Pillow's antialiased bilinear or bicubic filter, or one of the two by chance for each image."""

    def __post_init__(self) -> None:
        self._require(min(self._target) >= 1, "size", "at least 1 pixel")
        self._require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "0 < least ≤ most ≤ 1")
        self._require(0 < self.ratio[0] <= self.ratio[1], "ratio", "0 < least ≤ most")
        self._require(self.interpolation in _FILTERS, "interpolation", ", ".join(_FILTERS))

    @property
    def _target(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __call__(self, images: np.ndarray | list[np.ndarray]) -> np.ndarray:
        """Uint8 (N, H, W, C), a list of uint8 (H, W, C), or one (H, W, C) → uint8 (N, height, width, C) or one."""
        if isinstance(images, list):
            return np.stack([super(RandomResizedCrop, self).__call__(image) for image in images])
        return super().__call__(images)

    def change(self, images: np.ndarray) -> np.ndarray:
        """Uint8 (N, H, W, C) → uint8 (N, height, width, C)."""
        return np.stack([self._one(image) for image in images])

    def _one(self, image: np.ndarray) -> np.ndarray:
        top, left, height, width = self.box(*image.shape[:2])
        part = _to_pillow(image[top : top + height, left : left + width])
        target = self._target
        return _to_array(part.resize((target[1], target[0]), _draw_filter(self.interpolation)))

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part, drawn at random, of an image of ``height`` × ``width`` pixels."""
        for _ in range(10):
            area = height * width * np.random.uniform(*self.scale)
            ratio = np.exp(np.random.uniform(*np.log(self.ratio)))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(np.random.randint(0, height - h + 1)), int(np.random.randint(0, width - w + 1)), h, w
        ratio = float(np.clip(width / height, *self.ratio))
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class HorizontalFlip(Augmentation):
    """Mirror left and right."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        self._require(0 <= self.probability <= 1, "probability", "0…1")

    def change(self, images: np.ndarray) -> np.ndarray:
        """Same shape."""
        flipped = np.random.random_sample(len(images)) < self.probability
        result = images.copy()
        result[flipped] = images[flipped, :, ::-1]
        return result


# ------------------------------------------------------------------------------------------------------------- colour


@dataclass(frozen=True)
class ColourJitter(Augmentation):
    """Scale brightness, then contrast about the mean grey, then saturation about each pixel's grey, by random factors.

    Each factor is uniform in [max(0, 1 − s), 1 + s] with the strength s of its field. The three are one linear map of
    the pixel, so values are rounded and cut to 0…255 once, at the end. Grey images have no saturation to change.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            self._require(0 <= getattr(self, name) < np.inf, name, "0 or more")

    def change(self, images: np.ndarray) -> np.ndarray:
        """Same shape."""
        strengths = np.array([[self.brightness], [self.contrast], [self.saturation]])
        factors = np.random.uniform(np.maximum(0, 1 - strengths), 1 + strengths, (3, len(images)))
        return jittered(images, *factors.astype(np.float32))


def jittered(images: np.ndarray, brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Uint8 images (N, H, W, C) under given factors (N,) each; see :class:`ColourJitter`.

    With grey g = w·x of a pixel x, and g̅ its mean over the image: b x → c (b x) + (1 − c) b g̅ → s y + (1 − s) w·y.
    """
    count, height, width, channels = images.shape
    pixels = images.reshape(count, height * width, channels)
    weights = LUMA if channels == 3 else np.ones(1, np.float32)
    mean_grey = pixels.mean(axis=1, dtype=np.float32) @ weights
    mix = saturation[:, None, None] * np.eye(channels, dtype=np.float32)
    mix = (mix + (1 - saturation)[:, None, None] * weights[:, None]) * (brightness * contrast)[:, None, None]
    result = pixels.astype(np.float32) @ mix
    result += (brightness * (1 - contrast) * mean_grey + np.float32(0.5))[:, None, None]
    np.clip(result, 0, 255.5, out=result)  # the half is for rounding: uint8 drops what is behind the point
    return result.astype(np.uint8).reshape(images.shape)


@dataclass(frozen=True)
class Erase(Augmentation):
    """Fill a random rectangle with random pixels (Zhong et al. 2020, "Random Erasing Data Augmentation")."""

    probability: float = 0.25
    """Share of images from which a part is erased."""
    scale: Pair = (0.02, 1 / 3)
    """Smallest and largest share of the image's area."""
    ratio: Pair = (0.3, 1 / 0.3)
    """Smallest and largest width / height."""

    def __post_init__(self) -> None:
        self._require(0 <= self.probability <= 1, "probability", "0…1")
        self._require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "0 < least ≤ most ≤ 1")
        self._require(0 < self.ratio[0] <= self.ratio[1], "ratio", "0 < least ≤ most")

    def change(self, images: np.ndarray) -> np.ndarray:
        """Same shape."""
        result = images.copy()
        where = RandomResizedCrop(1, self.scale, self.ratio)
        for number in np.flatnonzero(np.random.random_sample(len(images)) < self.probability):
            top, left, height, width = where.box(*images.shape[1:3])
            shape = (height, width, images.shape[3])
            result[number, top : top + height, left : left + width] = np.random.randint(0, 256, shape, np.uint8)
        return result


# -------------------------------------------------------------------------------------------------------- RandAugment

_FILTERS = ("bilinear", "bicubic", "random")


def _to_pillow(image: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))


def _to_array(image: Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _draw_filter(interpolation: Interpolation) -> Any:
    from PIL.Image import Resampling

    if interpolation == "random":
        return (Resampling.BILINEAR, Resampling.BICUBIC)[np.random.randint(2)]
    return Resampling[interpolation.upper()]


def strength(operation: str, magnitude: float, sign: int = 1) -> float | int | None:
    """What an operation of RandAugment does at a magnitude m of 0…10, or None where it has no strength.

    ``rotate``: degrees, ±30 m/10. ``posterize``: bits kept, 4 − ⌊4 m/10⌋. ``solarize``: the threshold from which values
    are inverted, 256 − ⌊256 m/10⌋. ``solarize_add``: what is added to values below 128, ⌊110 m/10⌋. ``colour``,
    ``contrast``, ``brightness``, ``sharpness``: the factor, 1 ± 0.9 m/10, at least 0.1. ``shear_x``, ``shear_y``: the
    slope, ±0.3 m/10. ``translate_x``, ``translate_y``: share of the side, ±0.45 m/10. ``auto_contrast``, ``equalize``,
    ``invert``: None. All but these grow more violent with m.
    """
    if operation not in RANDAUGMENT:
        raise InvalidValue(f"operation = {operation!r}; one of {', '.join(RANDAUGMENT)} is expected")
    if not 0 <= magnitude <= 10:
        raise InvalidValue(f"magnitude = {magnitude}; 0…10 is expected")
    share = magnitude / 10
    if operation == "rotate":
        return sign * 30 * share
    if operation == "posterize":
        return 4 - int(4 * share)
    if operation == "solarize":
        return 256 - int(256 * share)
    if operation == "solarize_add":
        return int(110 * share)
    if operation in ("colour", "contrast", "brightness", "sharpness"):
        return max(0.1, 1 + sign * 0.9 * share)
    if operation.startswith("shear"):
        return sign * 0.3 * share
    if operation.startswith("translate"):
        return sign * 0.45 * share
    return None


def _affine(image: Image, matrix: Sequence[float], resample: Any, fill: int) -> Image:
    """Output pixel (x, y) is taken from (a x + b y + c, d x + e y + f); ``fill`` where that lies outside."""
    from PIL.Image import Transform

    return image.transform(image.size, Transform.AFFINE, tuple(matrix), resample, fillcolor=_shade(image, fill))


def _shade(image: Image, fill: int) -> Any:
    return fill if image.mode == "L" else (fill,) * 3


def _enhance(kind: str) -> Callable[..., Image]:
    def enhanced(image: Image, factor: float, resample: Any, fill: int) -> Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(image).enhance(factor)

    return enhanced


def _by_imageops(name: str) -> Callable[..., Image]:
    def operated(image: Image, amount: Any, resample: Any, fill: int) -> Image:
        from PIL import ImageOps

        function = getattr(ImageOps, name)
        return function(image) if amount is None else function(image, amount)

    return operated


def _posterized(image: Image, bits: Any, resample: Any, fill: int) -> Image:
    kept = 256 - (1 << (8 - int(bits)))
    return image.point([value & kept for value in range(256)] * len(image.getbands()))


def _solarized_add(image: Image, added: Any, resample: Any, fill: int) -> Image:
    table = [min(255, value + int(added)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


RANDAUGMENT: Mapping[str, Callable[[Image, Any, Any, int], Image]] = {
    "auto_contrast": _by_imageops("autocontrast"),
    "equalize": _by_imageops("equalize"),
    "invert": _by_imageops("invert"),
    "rotate": lambda image, angle, resample, fill: image.rotate(angle, resample, fillcolor=_shade(image, fill)),
    "posterize": _posterized,
    "solarize": _by_imageops("solarize"),
    "solarize_add": _solarized_add,
    "colour": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear_x": lambda image, slope, *how: _affine(image, (1, slope, 0, 0, 1, 0), *how),
    "shear_y": lambda image, slope, *how: _affine(image, (1, 0, 0, slope, 1, 0), *how),
    "translate_x": lambda image, share, *how: _affine(image, (1, 0, share * image.width, 0, 1, 0), *how),
    "translate_y": lambda image, share, *how: _affine(image, (1, 0, 0, 0, 1, share * image.height), *how),
}
"""Name → (Pillow image, :func:`strength`, resampling filter, grey value of pixels from outside) → Pillow image."""
_SIGNED = frozenset(RANDAUGMENT) - {"auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"}


def randaugment_operation(
    image: np.ndarray,
    operation: str,
    magnitude: float,
    sign: int = 1,
    interpolation: Interpolation = "bilinear",
    fill: int = 128,
) -> np.ndarray:
    """One operation of RandAugment on one image, uint8 (H, W, C), at a magnitude of 0…10; see :func:`strength`."""
    amount = strength(operation, magnitude, sign)
    return _to_array(RANDAUGMENT[operation](_to_pillow(image), amount, _draw_filter(interpolation), fill)).copy()


@dataclass(frozen=True)
class RandAugment(Augmentation):
    """A few operations of a fixed list, drawn at random, at one strength (Cubuk et al. 2020, "RandAugment").

    For each image ``operations`` are drawn from :data:`RANDAUGMENT`, with replacement; each is carried out with a
    ``probability``, at a magnitude drawn from a normal distribution and cut to 0…10, with a sign drawn by chance. The
    defaults are those EMO was trained with ("m9-mstd0.5-inc1": every operation grows more violent with the magnitude).
    """

    operations: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    """Standard deviation of the magnitude."""
    probability: float = 0.5
    interpolation: Interpolation = "random"
    """Filter of rotation, shear and translation: "bilinear", "bicubic", or one of them by chance."""
    fill: int = 128
    """Grey value of pixels from outside the image."""
    NAMES: ClassVar[tuple[str, ...]] = tuple(RANDAUGMENT)

    def __post_init__(self) -> None:
        self._require(self.operations >= 1, "operations", "at least 1")
        self._require(0 <= self.magnitude <= 10, "magnitude", "0…10")
        self._require(0 <= self.std < np.inf, "std", "0 or more")
        self._require(0 <= self.probability <= 1, "probability", "0…1")
        self._require(self.interpolation in _FILTERS, "interpolation", ", ".join(_FILTERS))
        self._require(0 <= self.fill <= 255, "fill", "0…255")

    def change(self, images: np.ndarray) -> np.ndarray:
        """Same shape."""
        shape = (len(images), self.operations)
        chosen = np.random.randint(0, len(self.NAMES), shape)
        done = np.random.random_sample(shape) < self.probability
        magnitudes = np.clip(np.random.normal(self.magnitude, self.std, shape), 0, 10)
        signs = np.where(np.random.random_sample(shape) < 0.5, -1, 1)
        result = images.copy()
        for number in np.flatnonzero(done.any(axis=1)):
            picture = _to_pillow(images[number])
            for place in np.flatnonzero(done[number]):
                name = self.NAMES[chosen[number, place]]
                amount = strength(name, float(magnitudes[number, place]), int(signs[number, place]))
                picture = RANDAUGMENT[name](picture, amount, _draw_filter(self.interpolation), self.fill)
            result[number] = _to_array(picture)
        return result


# ----------------------------------------------------------------------------------------------- a view, and the step


class AugmentedImages(LabelledImages):
    """A view of labelled images that are augmented anew whenever they are read.

    The operations act on the uint8 pixels between the preprocessing's geometry (decode, resize, crop) and its floats. A
    :class:`RandomResizedCrop` that comes first takes the place of the geometry: it cuts from the whole decoded image.
    ``raw`` gives the images as they are.
    """

    def __init__(self, images: LabelledImages, operations: Sequence[Augmentation]) -> None:
        self.plain = images
        self.augmentations = tuple(operations)
        super().__init__(
            images.source,
            images.all_labels,
            images.preprocessing,
            images.class_names,
            images.rows,
            images.where,
            images._corrupt,
        )

    @property
    def _whole(self) -> bool:
        """Whether the first operation cuts from the whole image."""
        return type(self.plain) is LabelledImages and isinstance(self.augmentations[0], RandomResizedCrop)

    @cached_property
    def _stages(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        before, after = self.plain._stages
        if self._whole:
            before = (*(operation for operation in before if isinstance(operation, Decode)), self.augmentations[0])
        return before, after

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Uint8 (n, H, W, C), augmented."""
        images = super().pixels(indices) if self._whole else self.plain.pixels(indices)
        for operation in self.augmentations[1 if self._whole else 0 :]:
            images = operation(images)
        return images

    def _derive(self, rows: np.ndarray | None = None, corrupt: Any = None) -> LabelledImages:
        return AugmentedImages(self.plain._derive(rows, corrupt), self.augmentations)

    @cached_property
    def _fingerprint(self) -> str:
        settings = [[type(operation).__name__, asdict(operation)] for operation in self.augmentations]
        return hashlib.sha256(f"{self.plain.fingerprint()}\n{canonical_json(settings)}".encode()).hexdigest()


class PairedImages(AugmentedImages):
    """Two views of each image, cut in the same way: map-style dataset of (first, second), float tensors (C, H, W).

    Args:
        images: whose labels are not looked at.
        operations: what both views pass through.
        second: what the second view passes through after that; it must keep the size.
        mean: mean of each channel in 0…1 by which the first view is normalised in place of the images' own
            preprocessing, or None.
        std: standard deviation of each channel in 0…1, with ``mean``.
    """

    def __init__(
        self,
        images: LabelledImages,
        operations: Sequence[Augmentation],
        second: Sequence[Augmentation] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(images, operations)
        if (mean is None) != (std is None):
            raise InvalidValue(f"PairedImages: mean = {mean}, std = {std}; both or neither are expected")
        self.second, self.moments = tuple(second), (mean, std)
        self.first_floats = self._stages[1]
        if mean is not None and std is not None:
            kept = tuple(operation for operation in self._stages[1] if not isinstance(operation, Normalise))
            self.first_floats = (*kept, Normalise(tuple(mean), tuple(std)))

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 (n, C, H, W), the same) at ``indices``."""
        first = second = self.pixels(np.asarray(indices, dtype=np.int64))
        for operation in self.second:
            second = operation(second)
        views = []
        for view, operations in ((first, self.first_floats), (second, self._stages[1])):
            for function in operations:
                view = function(view)
            views.append(view)
        return views[0], views[1]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Many pairs at the price of one call; torch's data loader uses it."""
        import torch

        first, second = self.batch(indices)
        return list(zip(torch.from_numpy(first).unbind(0), torch.from_numpy(second).unbind(0), strict=True))

    def _derive(self, rows: np.ndarray | None = None, corrupt: Any = None) -> LabelledImages:
        return PairedImages(self.plain._derive(rows, corrupt), self.augmentations, self.second, *self.moments)

    @cached_property
    def _fingerprint(self) -> str:
        settings = [[type(operation).__name__, asdict(operation)] for operation in self.second]
        own = canonical_json([settings, self.moments])
        return hashlib.sha256(f"{super()._fingerprint}\n{own}".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------- boxes and masks


def seen_through(
    image: np.ndarray, target: Target, window: tuple[int, int, int, int], flip: bool = False
) -> tuple[np.ndarray, Target]:
    """An image, and what is known of it, as seen through a window that is brought to the image's size.

    What lies outside the image is black, and of no known class. Boxes are cut at the window's edges; those whose centre
    lies outside are left out (Liu et al. 2016, section 2.2). Areas grow with the window's magnification.

    Args:
        image: uint8 (H, W, C).
        target: its boxes, or the class of each pixel (H, W).
        window: (top, left, height, width) in pixels, possibly beyond the image.
        flip: mirror left and right afterwards.
    """
    size = height, width = image.shape[:2]
    top, left, tall, wide = window
    inside = np.pad(image, _margins(window, size, 1))[top - min(top, 0) :, left - min(left, 0) :][:tall, :wide]
    if (tall, wide) != size:
        inside = _to_array(_to_pillow(inside).resize((width, height), _draw_filter("bilinear")))
    if isinstance(target, Boxes):
        scale, shift = np.array([width / wide, height / tall] * 2), np.array([left / wide, top / tall] * 2)
        boxes = target.boxes * scale - shift
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        keep = ((centres > 0) & (centres < 1)).all(1)
        boxes = boxes[keep].clip(0, 1)
        if flip:
            boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
        areas = target.area[keep] * np.float32(height * width / (tall * wide))
        target = Boxes(boxes.astype(np.float32), target.labels[keep], target.crowd[keep], areas)
    else:
        labels = np.pad(target, _margins(window, size, 0), constant_values=IGNORED)
        labels = nearest(labels[top - min(top, 0) :, left - min(left, 0) :][:tall, :wide], height, width)
        target = labels[:, ::-1] if flip else labels
    return inside[:, ::-1] if flip else inside, target


def _margins(window: tuple[int, int, int, int], size: tuple[int, int], channels: int) -> list[tuple[int, int]]:
    """What a window needs beyond each edge."""
    top, left, tall, wide = window
    down = (max(0, -top), max(0, top + tall - size[0]))
    return [down, (max(0, -left), max(0, left + wide - size[1])), *[(0, 0)] * channels]


@dataclass(frozen=True)
class DenseAugmentation:
    """Crops, flips and colours of images together with their boxes or classes of pixels.

    The fields are those of the step ``augment``.
    """

    crop: Literal["padded", "resized", "off"] = "padded"
    padding: float = 0.125
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: float = 0.4

    @property
    def nothing(self) -> bool:
        """Whether every operation is switched off."""
        return self.crop == "off" and not self.flip and not self.jitter

    def __call__(self, images: np.ndarray, targets: list[Target]) -> tuple[np.ndarray, list[Target]]:
        """Uint8 (N, H, W, C) and N targets → the same kinds, the images of the same shape."""
        height, width = images.shape[1:3]
        made: list[tuple[np.ndarray, Target]] = []
        for image, target in zip(images, targets, strict=True):
            window = (0, 0, height, width)
            if self.crop == "padded":
                pad = max(1, round(self.padding * max(height, width)))
                top, left = np.random.randint(-pad, pad + 1, 2).tolist()
                window = (top, left, height, width)
            elif self.crop == "resized":
                window = RandomResizedCrop((height, width), self.scale, self.ratio).box(height, width)
            made.append(seen_through(image, target, window, bool(np.random.random_sample() < self.flip)))
        pixels = np.stack([image for image, _ in made])
        if self.jitter:
            pixels = ColourJitter(self.jitter, self.jitter, self.jitter)(pixels)
        return pixels, [target for _, target in made]


@step("augment")
class Augment(Step):
    """Change the training images at random whenever they are read: crops, colours, RandAugment.

    Validation, calibration and test images stay as they are. The operations follow one another in the order of the
    fields.
    """

    stage: ClassVar[Stage] = Stage.DATA
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    source: ClassVar[str] = (
        "He et al. 2016 (padded crop); Szegedy et al. 2015 (resized crop); Cubuk et al. 2020, arXiv:1909.13719 "
        "(RandAugment); Zhong et al. 2020 (erasing)"
    )

    crop: Literal["padded", "resized", "off"] = "padded"
    """"padded": shift by a few pixels, with black behind. "resized": any part, brought to size; for large images."""
    padding: float = Field(default=0.125, gt=0, le=0.5)
    """How far a padded crop shifts, as a share of the image's side: 4 of 32 pixels."""
    scale: Pair = (0.08, 1.0)
    """Smallest and largest share of the area that a resized crop keeps."""
    ratio: Pair = (3 / 4, 4 / 3)
    """Smallest and largest width / height of what a resized crop keeps."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring left and right; 0.5 for most photographs, 0 for hands, digits and text."""
    jitter: float | None = Field(default=None, ge=0, le=1)
    """Strength of random brightness, contrast and saturation. None: 0.4, or 0 when RandAugment is on."""
    randaugment: int = Field(default=0, ge=0, le=10)
    """Operations of RandAugment for each image; 2 is usual, 0 switches it off."""
    magnitude: float = Field(default=9.0, ge=0, le=10)
    """Strength of RandAugment's operations."""
    magnitude_std: float = Field(default=0.5, ge=0, le=10)
    """Standard deviation of that strength."""
    probability: float = Field(default=0.5, gt=0, le=1)
    """Probability with which each drawn operation of RandAugment is carried out."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of filling a random rectangle with random pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("scale", 1), ("ratio", np.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise InvalidValue(
                    f"augment: {name} = {(low, high)}; 0 < least ≤ most{' ≤ 1' * (most == 1)} is expected"
                )

    def operations(self, height: int, width: int) -> tuple[Augmentation, ...]:
        """What the fields ask for, on images of ``height`` × ``width`` pixels, in order."""
        jitter = (0.0 if self.randaugment else 0.4) if self.jitter is None else self.jitter
        found: list[Augmentation] = []
        if self.crop == "padded":
            found.append(RandomCrop(max(1, round(self.padding * max(height, width)))))
        elif self.crop == "resized":
            found.append(RandomResizedCrop((height, width), self.scale, self.ratio))
        if self.flip:
            found.append(HorizontalFlip(self.flip))
        if jitter:
            found.append(ColourJitter(jitter, jitter, jitter))
        if self.randaugment:
            found.append(RandAugment(self.randaugment, self.magnitude, self.magnitude_std, self.probability))
        if self.erase:
            found.append(Erase(self.erase))
        return tuple(found)

    def dense_change(self) -> DenseAugmentation:
        """What the fields ask for, on images with boxes or classes of pixels."""
        if self.randaugment or self.erase:
            raise IncompatibleStep(
                f"augment: randaugment = {self.randaugment}, erase = {self.erase:g}: on images with boxes or classes "
                "of pixels only crop, flip and jitter are known; leave the others at 0"
            )
        jitter = 0.4 if self.jitter is None else self.jitter
        return DenseAugmentation(self.crop, self.padding, self.scale, self.ratio, self.flip, jitter)

    def apply(self, job: Job) -> Job:
        """The job with augmented training images."""
        if isinstance(job.train, DenseImages):
            change = self.dense_change()
            if change.nothing:
                raise NoEffect("augment: every operation is switched off: crop = off, flip = 0, jitter = 0")
            job.notes.remarks.append(f"training images and what is known of them pass through {change}")
            return job.replace(train=job.train.changed(change))
        if not isinstance(job.train, LabelledImages):
            raise IncompatibleStep(
                f"augment: the training data are a {type(job.train).__module__}.{type(job.train).__qualname__}; uint8 "
                "images that the task's preprocessing turns into floats (sparing.data.images.LabelledImages, or "
                "sparing.data.coco.DenseImages with boxes or maps) are needed"
            )
        height, width, channels = job.train.pixels([0]).shape[1:]
        operations = self.operations(height, width)
        if not operations:
            raise NoEffect(
                f"augment: every operation is switched off: crop = {self.crop}, flip = {self.flip:g}, jitter = "
                f"{self.jitter:g}, randaugment = {self.randaugment}, erase = {self.erase:g}"
            )
        job.notes.remarks.append(
            f"training images ({height}×{width}, {channels} channel{'s' * (channels > 1)}) pass through "
            + ", ".join(map(repr, operations))
        )
        return job.replace(train=AugmentedImages(job.train, operations))
