"""Image datasets: items, batches, loaders, subsets, fingerprints, cuts, and damage that is named."""

from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.data.images import ArrayImages, ImageFiles, LabelledImages, stratified_cut
from sparing.data.preprocessing import ChannelsFirst, Decode, Normalise, Resize, ToFloat

RNG = np.random.RandomState(0)
PIXELS = RNG.randint(0, 256, (30, 6, 5, 3)).astype(np.uint8)
LABELS = np.arange(30) % 3
NAMES = ("a", "b", "c")
PIPELINE = Preprocessing(
    (Decode("RGB"), Resize(6, 5), ChannelsFirst(), ToFloat(), Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
)


def dataset(**changes: object) -> LabelledImages:
    return LabelledImages(
        **({"source": PIXELS, "labels": LABELS, "preprocessing": PIPELINE, "class_names": NAMES} | changes)
    )  # type: ignore[arg-type]


def test_an_item_is_what_a_deployed_predictor_would_compute() -> None:
    image, label = dataset()[7]
    assert image.dtype == torch.float32
    assert (type(label), label) == (int, 1)
    np.testing.assert_array_equal(image.numpy(), PIPELINE([PIXELS[7]])[0])


def test_items_batches_and_loader_agree_bit_for_bit() -> None:
    data = dataset()
    images, labels = data.batch([3, 29, 0])
    for position, index in enumerate((3, 29, 0)):
        np.testing.assert_array_equal(images[position], data[index][0].numpy())
        assert labels[position] == data[index][1]
    for workers in (0, 2):
        got = list(DataLoader(data, 7, num_workers=workers))
        assert [len(targets) for _, targets in got] == [7, 7, 7, 7, 2]
        np.testing.assert_array_equal(torch.cat([x for x, _ in got]).numpy(), data.batch(np.arange(30))[0])


def test_indexing_ends_where_lists_do() -> None:
    data = dataset()
    assert data[-1][1] == data[29][1]
    assert len(list(data)) == 30
    for index in (30, -31):
        with pytest.raises(IndexError, match=f"image {index} of 30"):
            data[index]


def test_subsets_share_memory_and_compose() -> None:
    data = dataset().subset([4, 5, 6, 7]).subset([3, 0])
    assert data.labels.tolist() == [7 % 3, 4 % 3]
    np.testing.assert_array_equal(data.raw([0])[0], PIXELS[7])
    assert data.source is data.subset([0]).source


def test_fingerprints_follow_the_content() -> None:
    base = dataset().fingerprint()
    assert base == dataset(source=PIXELS.copy()).fingerprint()
    other = PIXELS.copy()
    other[3, 0, 0, 0] ^= 1
    variants = [
        dataset(source=other),
        dataset(labels=(LABELS + 1) % 3),
        dataset(class_names=("a", "b", "d")),
        dataset(preprocessing=Preprocessing((*PIPELINE.operations[:-1], Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.5))))),
        dataset().subset(np.arange(30)[::-1]),
        dataset().subset(np.arange(29)),
        dataset().corrupted("x", lambda images, indices: images),
    ]
    assert len({base, *(variant.fingerprint() for variant in variants)}) == len(variants) + 1


def test_a_corruption_acts_on_pixels_and_knows_the_index() -> None:
    data = dataset().subset(np.arange(10, 20))
    view = data.corrupted("index", lambda images, indices: np.full_like(images, indices[:, None, None, None]))
    assert (view.pixels([4])[0] == 4).all()
    np.testing.assert_array_equal(view[4][0].numpy(), PIPELINE([np.full((6, 5, 3), 4, np.uint8)])[0])
    np.testing.assert_array_equal(view.raw([4]), data.raw([4]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.where(np.arange(30) == 11, 3, LABELS)}, "record 11 has the label 3; 0…2 is expected"),
        ({"labels": LABELS - 1}, "record 0 has the label -1"),
        ({"labels": LABELS[:29]}, r"30 images and labels of shape \(29,\)"),
        ({"labels": LABELS * 1.0}, "labels of type float64"),
        ({"source": PIXELS.astype(np.float32)}, r"float32 of shape \(30, 6, 5, 3\); uint8"),
        ({"source": PIXELS[..., :2]}, r"shape \(30, 6, 5, 2\)"),
        ({"source": PIXELS[:0], "labels": LABELS[:0]}, "no image"),
        ({"rows": np.array([], int)}, "no image"),
    ],
)
def test_wrong_data_names_the_record(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset(**changes)


def test_preprocessing_without_channels_first_is_refused() -> None:
    with pytest.raises(InvalidValue, match="channels_first"):
        dataset(preprocessing=Preprocessing((Decode(),)))[0]


def write_files(folder: Path) -> list[str]:
    names = []
    for index, pixels in enumerate(PIXELS[:6]):
        names.append(f"{index}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return target


def test_files_and_archives_are_decoded_when_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = write_files(folder)
    for base in (folder, zipped(folder, tmp_path / "a.zip")):
        data = dataset(source=ImageFiles(names, base), labels=LABELS[:6])
        np.testing.assert_array_equal(data.batch(np.arange(6))[0], dataset().batch(np.arange(6))[0])
        data = copy.deepcopy(data)  # by its state, as a spawned worker receives it
        got = torch.cat([x for x, _ in DataLoader(data, 2, num_workers=2)])
        np.testing.assert_array_equal(got.numpy(), dataset().batch(np.arange(6))[0])


def test_a_damaged_file_is_named_within_its_batch(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = write_files(folder)
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:-30])
    data = dataset(source=ImageFiles(names, folder), labels=LABELS[:6])
    with pytest.raises(DataError, match=r"images/4\.png: damaged"):
        data.batch(np.arange(6))
    packed = dataset(source=ImageFiles(names, zipped(folder, tmp_path / "a.zip")), labels=LABELS[:6])
    with pytest.raises(DataError, match=r"a\.zip/4\.png: damaged"):
        packed.batch(np.arange(6))


def test_a_damaged_archive_names_the_member(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = write_files(folder)
    path = zipped(folder, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT") + 8
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.zip/0\.png: cannot be read: Bad CRC-32"):
        ImageFiles(names, path).take(np.array([0]))


def test_file_fingerprints_follow_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = write_files(folder)
    before = ImageFiles(names, folder).fingerprint()
    Image.fromarray(255 - PIXELS[0]).save(folder / names[0])
    assert ImageFiles(names, folder).fingerprint() != before


def test_array_images_read_grey() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[0, :, :, 0]).save(buffer, "PNG")
    assert ArrayImages(PIXELS[..., :1]).take(np.array([2])).shape == (1, 6, 5, 1)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    shares=st.tuples(st.floats(0.01, 0.45), st.floats(0.01, 0.45)),
    seed=st.integers(0, 2**31),
)
def test_cuts_cover_everything_once_and_keep_the_shares(
    counts: list[int], shares: tuple[float, float], seed: int
) -> None:
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = stratified_cut(labels, {"x": shares[0], "y": shares[1]}, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    for label, count in enumerate(counts):
        for name, share in zip("xy", shares, strict=True):
            got = int((labels[parts[name]] == label).sum())
            assert abs(got - share * count) <= 1
            assert got >= 1 or count <= 2
    again = stratified_cut(labels, {"x": shares[0], "y": shares[1]}, seed)
    assert all((again[name] == parts[name]).all() for name in parts)


def test_cuts_are_the_same_on_every_machine() -> None:
    parts = stratified_cut(np.arange(40) % 4, {"val": 0.2}, seed=0)
    assert parts["val"].tolist() == [6, 8, 9, 18, 19, 23, 32, 37]


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(InvalidValue, match="sum below 1"):
        stratified_cut(LABELS, {"x": 0.5, "y": 0.5}, 0)
