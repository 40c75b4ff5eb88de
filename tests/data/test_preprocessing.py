"""Operations on images: values, vectorised against one by one, orientation, hostile and wrong input."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparing.core.errors import DataError, InvalidValue, SparingError
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.data.preprocessing import (
    CentreCrop,
    ChannelsFirst,
    Decode,
    Normalise,
    Resize,
    ResizeShorter,
    ToFloat,
    decode_image,
)

RNG = np.random.RandomState(0)
COLOUR = RNG.randint(0, 256, (13, 9, 3)).astype(np.uint8)


def png(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(COLOUR))
    for raw in (path, str(path), png(COLOUR), bytearray(png(COLOUR)), Image.fromarray(COLOUR), COLOUR):
        np.testing.assert_array_equal(decode_image(raw), COLOUR)


def test_grey_weights_are_those_of_pillow() -> None:
    expected = np.asarray(Image.fromarray(COLOUR).convert("L"))[..., None]
    np.testing.assert_array_equal(decode_image(COLOUR, "L"), expected)
    np.testing.assert_array_equal(decode_image(png(COLOUR), "L"), expected)


def test_grey_becomes_colour_by_repetition() -> None:
    grey = COLOUR[..., :1]
    assert decode_image(grey[..., 0], "RGB").shape == (13, 9, 3)
    assert (decode_image(grey, "RGB") == grey).all()


def test_sixteen_bit_grey_keeps_the_high_byte() -> None:
    wide = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000).astype(np.uint16)
    np.testing.assert_array_equal(decode_image(png(wide), "L")[..., 0], (wide >> 8).astype(np.uint8))


def test_camera_orientation_is_applied() -> None:
    image = Image.fromarray(COLOUR)
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 270 degrees to show
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), np.rot90(COLOUR, 3))


def test_a_pipeline_computes_its_formula() -> None:
    images = RNG.randint(0, 256, (4, 6, 5, 3)).astype(np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    pipeline = Preprocessing((Decode("RGB"), Resize(6, 5), ChannelsFirst(), ToFloat(), Normalise(mean, std)))
    expected = (images / 255 - np.array(mean)) / np.array(std)
    result = pipeline(list(images))
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_whole_batches_equal_single_images_bit_for_bit() -> None:
    images = RNG.randint(0, 256, (5, 20, 31, 3)).astype(np.uint8)
    operations = (
        Decode("L"),
        ResizeShorter(12),
        CentreCrop(12, 12),
        ChannelsFirst(),
        ToFloat(),
        Normalise((0.3,), (0.2,)),
    )
    batch: object = images
    for operation in operations:
        batch = operation(batch)
    single = np.concatenate([Preprocessing(operations)([image]) for image in images])
    np.testing.assert_array_equal(batch, single)


def test_images_of_different_sizes_meet_in_a_resize() -> None:
    raws = [COLOUR, np.repeat(COLOUR, 3, axis=1)]
    assert Preprocessing((Decode(), Resize(8, 8), ChannelsFirst()))(raws).shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match=r"image 1 has shape \(13, 27, 3\), image 0 \(13, 9, 3\)"):
        Preprocessing((Decode(), ChannelsFirst()))(raws)


def test_resize_shorter_keeps_the_proportion_and_crop_the_centre() -> None:
    wide = np.zeros((10, 40, 1), np.uint8)
    wide[:, 15:25] = 255
    (small,) = ResizeShorter(5)([wide])
    assert small.shape == (5, 20, 1)
    (cut,) = CentreCrop(10, 10)([wide])
    assert (cut == 255).all()
    with pytest.raises(DataError, match=r"image 0: 10×40 pixels, fewer than the 11×10"):
        CentreCrop(11, 10)([wide])


@pytest.mark.parametrize("operation", [Decode("L"), Resize(3, 4), ResizeShorter(7), CentreCrop(2, 3), ToFloat(16.0)])
def test_operations_survive_their_config(operation: object) -> None:
    pipeline = Preprocessing((operation, ChannelsFirst(), Normalise((0.5, 0.25), (1.0, 2.0))))  # type: ignore[arg-type]
    assert Preprocessing.from_config(pipeline.to_config()) == pipeline


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decode("CMYK"), "'CMYK'; one of L, RGB"),  # type: ignore[arg-type]
        (lambda: Resize(0, 4), "height = 0"),
        (lambda: CentreCrop(4, -1), "width = -1"),
        (lambda: ResizeShorter(True), "size = True"),
        (lambda: ToFloat(0.0), "full = 0.0"),
        (lambda: Normalise((0.1,), (0.2, 0.3)), "1 means and 2 standard deviations"),
        (lambda: Normalise((0.1,), (0.0,)), r"std = \(0.0,\)"),
        (lambda: Normalise((float("nan"),), (1.0,)), "finite"),
    ],
)
def test_fields_are_checked(make: object, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "image 1: 0 bytes"),
        (b"no image at all", "image 1: of no known format"),
        (png(COLOUR)[:-30], "image 1: damaged"),
        (Path("/nowhere/a.png"), "/nowhere/a.png.*No such file"),
        (COLOUR.astype(np.float32), "image 1: pixels of type float32; uint8"),
        (COLOUR[None], r"image 1: shape \(1, 13, 9, 3\)"),
        (COLOUR[:0], "holds no pixel"),
        (42, "image 1: cannot read a int"),
        (None, "image 1: cannot read a NoneType"),
    ],
)
def test_unreadable_images_are_named(raw: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Decode()([COLOUR, raw])


def test_one_image_that_is_no_list_is_refused() -> None:
    with pytest.raises(DataError, match="put it into a list"):
        Decode()(b"abc")
    with pytest.raises(DataError, match="empty"):
        Decode()([])


@pytest.mark.parametrize(("side", "message"), [(8_000, "declares 8000×8000 pixels"), (30_000, "900000000 pixels")])
def test_a_tiny_file_cannot_claim_a_huge_image(side: int, message: str) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=message):
        decode_image(bomb)


def test_programs_of_other_formats_are_not_started() -> None:
    with pytest.raises(DataError, match="no known format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


GOOD = [png(COLOUR), png(COLOUR, "JPEG"), png(COLOUR[..., 0], "BMP"), png(COLOUR, "GIF"), png(COLOUR, "TIFF")]


@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4), st.data())
def test_damaged_images_give_an_image_or_a_data_error(
    content: bytes, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for place, value in changes:
        if damaged:
            damaged[place % len(damaged)] = value
    try:
        image = decode_image(bytes(damaged))
    except SparingError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3


def test_preprocessing_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "from sparing.core.predictor.preprocessing import Preprocessing\n"
        "p = Preprocessing.from_config([{'operation': 'decode', 'mode': 'L'}, {'operation': 'resize', 'height': 4, "
        "'width': 4}, {'operation': 'channels_first'}, {'operation': 'to_float', 'full': 255.0}, "
        "{'operation': 'normalise', 'mean': [0.5], 'std': [0.5]}])\n"
        "assert p([np.zeros((8, 8), np.uint8)]).tolist() == [[[[-1.0] * 4] * 4]]\n"
        "assert not {'torch', 'lightning', 'sklearn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
