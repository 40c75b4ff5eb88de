"""Executable image preprocessing: the operations that travel inside a saved model's folder.

Each is a frozen dataclass of JSON-able fields that maps a batch to a batch with NumPy and Pillow alone, so a clean
process without torch computes bit for bit what was measured. A batch of equally sized images is one array and each
operation one vectorised expression; images of different sizes travel as a list until a resize makes them equal.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor.preprocessing import Operation

MAX_PIXELS = 1 << 26
"""Largest number of pixels (width × height) of an image; checked before anything is decoded."""

SMALL_PIXELS = 1 << 24
PIXELS_PER_BYTE = 256
"""An encoded image above SMALL_PIXELS may not declare more than PIXELS_PER_BYTE pixels for each byte it has."""

MAX_ENCODED_BYTES = 1 << 26
"""Largest encoded image file that is read."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Encodings that are opened. Others are refused: some of Pillow's decoders start foreign programs."""

CHANNELS = {"L": 1, "RGB": 3}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green and blue in 0…1 that public weights were trained with."""
_ORIENTATION = 0x0112  # EXIF tag

Mode = Literal["L", "RGB"]
ImageBatch = np.ndarray | list[np.ndarray]
"""uint8 (N, H, W, C), or a list of uint8 (H, W, C) of different sizes."""


def decode_image(raw: Any, mode: Mode = "RGB", where: str = "image") -> np.ndarray:
    """One image as uint8 (H, W, C) with C = 1 for mode "L" and 3 for "RGB".

    ``raw`` is a path, the bytes of an encoded file, a Pillow image, or a uint8 array (H, W), (H, W, 1) or (H, W, 3).
    Orientation stored by cameras is applied; of 16-bit grey images the high byte is kept; alpha is dropped. Raises
    :class:`DataError` that begins with ``where``.
    """
    from PIL import Image

    if isinstance(raw, str | Path):
        where = str(raw) if where == "image" else f"{where} ({raw})"  # a path says more than a number
        raw = _file_bytes(Path(raw), where)
    if isinstance(raw, bytes | bytearray | memoryview):
        return _decode_bytes(bytes(raw), mode, where)
    if isinstance(raw, Image.Image):
        return _pixels(raw, mode, where)
    if not hasattr(raw, "__array__"):
        raise DataError(
            f"{where}: cannot read a {type(raw).__name__} as an image; give a path, the bytes of an image file, a "
            "Pillow image or a uint8 array (height, width[, channels])"
        )
    array = np.asarray(raw)
    if array.ndim == 2:
        array = array[:, :, None]
    _check_array(array, 3, where)
    return _to_mode(array, mode)


def _file_bytes(path: Path, where: str) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_ENCODED_BYTES:
            raise DataError(f"{where}: {size} bytes, more than the {MAX_ENCODED_BYTES} an image file may have")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{where}: cannot be read: {reason}; an image file is expected there") from error


def _decode_bytes(content: bytes, mode: Mode, where: str) -> np.ndarray:
    import warnings

    from PIL import Image

    if not content:
        raise DataError(f"{where}: 0 bytes; an image file ({', '.join(FORMATS)}) is expected")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return _pixels(image, mode, where, max(SMALL_PIXELS, PIXELS_PER_BYTE * len(content)))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        reason = "of no known format" if type(error).__name__ == "UnidentifiedImageError" else f"damaged ({error})"
        raise DataError(f"{where}: {reason}; a whole image file ({', '.join(FORMATS)}) is expected") from error


def _pixels(image: Any, mode: Mode, where: str, most: int = MAX_PIXELS) -> np.ndarray:
    from PIL import Image, ImageOps

    width, height = image.size
    if not 0 < width * height <= min(most, MAX_PIXELS):
        raise DataError(f"{where}: declares {width}×{height} pixels; 1 to {min(most, MAX_PIXELS)} are accepted")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise DataError(
            f"{where}: pixels of mode {image.mode!r} (32 bit) have no known range; 8 or 16 bit are accepted"
        )
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[:, :, None] if mode == "L" else pixels


def _check_array(array: np.ndarray, rank: int, where: str) -> None:
    """Refuse what is not uint8 of ``rank`` with 1 or 3 channels last and at least one pixel."""
    if array.dtype != np.uint8:
        raise DataError(f"{where}: pixels of type {array.dtype}; uint8 is expected")
    shape = "(height, width, channels)" if rank == 3 else "(images, height, width, channels)"
    if array.ndim != rank or array.shape[-1] not in (1, 3):
        raise DataError(f"{where}: shape {array.shape}; {shape} with 1 or 3 channels is expected")
    if 0 in array.shape[-3:]:
        raise DataError(f"{where}: shape {array.shape} holds no pixel")


def _to_mode(array: np.ndarray, mode: Mode) -> np.ndarray:
    """(…, C) → (…, C') for ``mode``; grey by the weights of ITU-R 601-2, as Pillow computes it."""
    have, want = array.shape[-1], CHANNELS[mode]
    if have == want:
        return array
    if want == 3:
        return np.repeat(array, 3, axis=-1)
    red, green, blue = (array[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[..., None]


def _stack(images: list[np.ndarray]) -> ImageBatch:
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def _each(batch: ImageBatch) -> Iterator[np.ndarray]:
    return iter(batch)


def _one_array(batch: ImageBatch, operation: str) -> np.ndarray:
    if isinstance(batch, np.ndarray):
        return batch
    shapes = [image.shape for image in batch]
    other = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
    raise DataError(
        f"{operation}: image {other} has shape {shapes[other]}, image 0 {shapes[0]}; images of one size are expected "
        "(add a resize before it)"
    )


def _positive(operation: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 13:
            raise InvalidValue(f"{operation}: {name} = {value!r}; a whole number in 1…{1 << 13} is expected")


@dataclass(frozen=True)
class Decode(Operation):
    """Paths, encoded bytes, Pillow images or arrays → uint8 images (H, W, C) of one mode.

    A uint8 array (N, H, W[, C]) is taken as a whole batch and passes through when its channels fit the mode.
    """

    mode: Mode = "RGB"

    def __post_init__(self) -> None:
        if self.mode not in CHANNELS:
            raise InvalidValue(f"decode: mode = {self.mode!r}; one of {', '.join(CHANNELS)} is expected")

    def __call__(self, batch: Sequence[Any] | np.ndarray) -> ImageBatch:
        """Raw inputs → images; :class:`DataError` names the index of the input that cannot be read."""
        if isinstance(batch, np.ndarray) and batch.ndim in (3, 4) and batch.dtype != object:
            array = batch[..., None] if batch.ndim == 3 else batch
            _check_array(array, 4, "images")
            return _to_mode(array, self.mode)
        if isinstance(batch, str | bytes | Path) or not hasattr(batch, "__len__"):
            raise DataError(f"a sequence of images is expected, not one {type(batch).__name__}; put it into a list")
        if len(batch) == 0:
            raise DataError("an empty sequence of images; at least one is expected")
        return _stack([decode_image(raw, self.mode, f"image {i}") for i, raw in enumerate(batch)])


@dataclass(frozen=True)
class Resize(Operation):
    """Images → (height, width), bicubic with antialiasing.

    Images that have that size already are left untouched.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        _positive("resize", height=self.height, width=self.width)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """Uint8 images → uint8 (N, height, width, C)."""
        if isinstance(batch, np.ndarray) and batch.shape[1:3] == (self.height, self.width):
            return batch
        return _stack([resize(image, self.height, self.width) for image in _each(batch)])


@dataclass(frozen=True)
class ResizeShorter(Operation):
    """Images → the shorter side becomes ``size`` pixels, the longer follows in proportion (bicubic)."""

    size: int

    def __post_init__(self) -> None:
        _positive("resize_shorter", size=self.size)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """Uint8 images → uint8 images."""
        if isinstance(batch, np.ndarray) and min(batch.shape[1:3]) == self.size:
            return batch
        return _stack([self._one(image) for image in _each(batch)])

    def _one(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        scale = self.size / min(height, width)
        target = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        if target[0] * target[1] > MAX_PIXELS:
            raise DataError(
                f"an image of {height}×{width} pixels would become {target[0]}×{target[1]}: too long a strip"
            )
        return resize(image, *target)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Uint8 (H, W, C) → uint8 (height, width, C) by Pillow's antialiased bicubic filter."""
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    grey = image.shape[2] == 1
    source = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if grey else image))
    result = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC))
    return result[:, :, None] if grey else result


@dataclass(frozen=True)
class CentreCrop(Operation):
    """Images → their central (height, width) part."""

    height: int
    width: int

    def __post_init__(self) -> None:
        _positive("centre_crop", height=self.height, width=self.width)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """Images (…, H, W, C) → (…, height, width, C); :class:`DataError` when an image is smaller than that."""
        if isinstance(batch, np.ndarray):
            return self._crop(batch, "the images")
        return _stack([self._crop(image, f"image {i}") for i, image in enumerate(batch)])

    def _crop(self, images: np.ndarray, where: str) -> np.ndarray:
        height, width = images.shape[-3:-1]
        if height < self.height or width < self.width:
            raise DataError(
                f"centre_crop: {where}: {height}×{width} pixels, fewer than the {self.height}×{self.width} to keep"
            )
        top, left = (height - self.height) // 2, (width - self.width) // 2
        return images[..., top : top + self.height, left : left + self.width, :]


@dataclass(frozen=True)
class ChannelsFirst(Operation):
    """(N, H, W, C) → (N, C, H, W), contiguous."""

    def __call__(self, batch: ImageBatch) -> np.ndarray:
        """Any dtype; images of different sizes are refused."""
        return np.ascontiguousarray(np.moveaxis(_one_array(batch, "channels_first"), -1, 1))


@dataclass(frozen=True)
class ToFloat(Operation):
    """Integers 0…``full`` → float32 0…1."""

    full: float = 255.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.full) or self.full <= 0:
            raise InvalidValue(f"to_float: full = {self.full!r}; a positive number is expected")

    def __call__(self, batch: ImageBatch) -> np.ndarray:
        """Any shape."""
        return np.multiply(_one_array(batch, "to_float"), np.float32(1 / self.full), dtype=np.float32)


@dataclass(frozen=True)
class Normalise(Operation):
    """(N, C, …) → (x − mean) / std for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if len(self.mean) != len(self.std) or not self.mean:
            raise InvalidValue(
                f"normalise: {len(self.mean)} means and {len(self.std)} standard deviations; equal numbers"
            )
        if not np.isfinite((*self.mean, *self.std)).all() or min(self.std) <= 0:
            raise InvalidValue(
                f"normalise: mean = {self.mean}, std = {self.std}; finite, and std above 0, are expected"
            )

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Float32 (N, C, …) → float32 of the same shape."""
        if batch.ndim < 2 or batch.shape[1] != len(self.mean):
            raise DataError(f"normalise: {len(self.mean)} channels are expected on axis 1 of the shape {batch.shape}")
        shape = (-1, *(1,) * (batch.ndim - 2))
        result = batch - np.asarray(self.mean, np.float32).reshape(shape)
        result *= (1 / np.asarray(self.std, np.float64)).astype(np.float32).reshape(shape)
        return result
