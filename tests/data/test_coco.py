"""The reader of COCO's format: ids, boxes, masks, archives, what it refuses; and the datasets made of it."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from coco_cases import coco_folder, content, runs_of, scene
from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor import Preprocessing
from sparing.core.task import IGNORED
from sparing.data.coco import (
    DenseImages,
    TarFiles,
    collate_boxes,
    images_of,
    label_map,
    mask_of,
    nearest,
    read_coco,
    rle_runs,
)
from sparing.data.images import LabelledImages
from sparing.data.preprocessing import ChannelsFirst, Decode, ToFloat

PLAIN = Preprocessing((Decode("RGB"), ChannelsFirst(), ToFloat()))


def written(folder: Path, what: Any, name: str = "instances.json") -> Path:
    path = folder / name
    text = json.dumps(what).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    return path


def dataset(folder: Path, kind: Any) -> DenseImages:
    file = read_coco(coco_folder(folder, 6) / "instances.json")
    source = images_of(file.path, [image.file for image in file.images])
    return DenseImages(LabelledImages(source, np.zeros(6, int), PLAIN, ("image",)), file.images, kind)


@pytest.mark.parametrize("name", ["instances.json", "instances.json.gz"])
def test_a_file_is_read(tmp_path: Path, name: str) -> None:
    file = read_coco(written(tmp_path, content(3), name))
    assert file.names == ("square", "bar")
    assert [image.file for image in file.images] == ["000.png", "001.png", "002.png"]
    expected = scene(1)[1]
    for label, (instance, entry) in enumerate(zip(file.images[1].objects, expected, strict=True)):
        left, top, wide, tall = entry["bbox"]
        assert instance.box == (left, top, left + wide, top + tall)
        assert (instance.label, instance.area, instance.crowd) == (label, entry["area"], False)


def test_categories_are_merged(tmp_path: Path) -> None:
    path = written(tmp_path, content(2))
    assert read_coco(path, "all").names == ("object",)
    above = read_coco(path, "supercategories")
    assert above.names == ("shape",)
    assert {instance.label for image in above.images for instance in image.objects} == {0}
    with pytest.raises(InvalidValue, match="merge = 'some'"):
        read_coco(path, "some")  # type: ignore[arg-type]


def test_boxes_are_cut_at_the_edges(tmp_path: Path) -> None:
    what = content(1)
    what["annotations"][0] |= {"bbox": [-4, 28.5, 10, 10]}
    what["annotations"][1] |= {"bbox": [40, 40, 5, 5]}  # wholly outside
    (image,) = read_coco(written(tmp_path, what)).images
    assert [instance.box for instance in image.objects] == [(0, 28.5, 6, 32)]


def broken(**changes: Any) -> Any:
    what = content(2)
    for place, value in changes.items():
        part, _, key = place.partition("__")
        if not key:
            what[part] = value
        elif value is None:
            del what[part][1][key]
        else:
            what[part][1][key] = value
    return what


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([1], "a list; a mapping"),
        (broken(images=3), "images is 3; a list"),
        (broken(images=[]), "lists no image"),
        (broken(categories=[]), "lists no category"),
        (broken(images__id=None), r"images\[1\]: has no 'id'"),
        (broken(images__id=100), r"images\[1\]: the id 100 occurs twice"),
        (broken(images__width=0), r"images\[1\]: width = 0; a whole number of at least 1"),
        (broken(images__height=10**9), "10{9} pixels|1000000000 pixels"),
        (broken(images__file_name="../secret.png"), "a file below"),
        (broken(images__file_name="/etc/passwd"), "a file below"),
        (broken(categories__id=3), r"categories\[1\]: the id 3 occurs twice"),
        (broken(categories__name=5), r"categories\[1\]: name = 5"),
        (broken(annotations__image_id=7), r"annotations\[1\]: the image_id 7, which no image has"),
        (broken(annotations__category_id=4), r"annotations\[1\]: the category_id 4, which no category has"),
        (broken(annotations__bbox=[1, 2, 3]), r"bbox = \[1, 2, 3\]"),
        (broken(annotations__bbox=[1, 2, -3, 4]), r"bbox = \[1, 2, -3, 4\]"),
        (broken(annotations__bbox=[1, 2, float("nan"), 4]), "bbox = "),
        (broken(annotations__bbox=[1, 2, 10**400, 4]), "bbox = "),
        (broken(annotations__area="large"), "area = 'large'"),
        (broken(annotations__iscrowd=2), "iscrowd = 2"),
        (broken(annotations__segmentation={"size": [8, 8], "counts": [64]}), r"size \[8, 8\]; \[32, 32\]"),
        (broken(annotations__segmentation={"size": [32, 32], "counts": 5}), "counts = 5"),
        (broken(annotations__segmentation=[[1, 2, 3, 4]]), "at least three points"),
        (broken(annotations__segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "at least three points"),
        (broken(annotations__segmentation=[[1, 2, 3, 4, 5, 1e9]]), "out of its image"),
        (broken(annotations__segmentation="a text"), "a polygon"),
    ],
    ids=str,
)
def test_what_is_not_sound_is_refused(tmp_path: Path, what: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_coco(written(tmp_path, what))
    assert "instances.json" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=r"instances\.json"):
        read_coco(path)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1 << 30), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_masks_are_those_of_pycocotools(height: int, width: int, seed: int, density: float) -> None:
    mask = np.random.RandomState(seed).rand(height, width) < density
    packed = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = packed["counts"].decode()
    np.testing.assert_array_equal(mask_of({"size": [height, width], "counts": text}, width, height), mask)
    assert rle_runs(text) == runs_of(mask) == rle_runs(runs_of(mask))


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_mask_or_refused(text: str) -> None:
    with contextlib.suppress(DataError):  # nothing else may come out
        assert mask_of({"size": [5, 7], "counts": text}, 7, 5, "here").shape == (5, 7)


@pytest.mark.parametrize("counts", ["P", "o", "\x00", [3, -1], [3, 2.5], [1 << 62], "ooooooooooooooo0", [34]])
def test_runs_that_do_not_fill_the_image_are_refused(counts: Any) -> None:
    with pytest.raises(DataError, match="a run-length mask is expected"):
        mask_of({"size": [5, 7], "counts": counts}, 7, 5)


def test_a_polygon_is_drawn() -> None:
    found = mask_of([[1, 1, 5, 1, 5, 4, 1, 4], [7, 7, 9, 7, 9, 9, 7, 9]], 10, 10)
    expected = np.zeros((10, 10), bool)
    expected[1:4, 1:5] = expected[7:9, 7:9] = True
    np.testing.assert_array_equal(found, expected)


def test_of_overlapping_objects_the_smallest_is_seen(tmp_path: Path) -> None:
    what = content(1)
    what["annotations"][0] |= {"bbox": [0, 0, 20, 20], "area": 400, "segmentation": []}
    what["annotations"][1] |= {"bbox": [5, 5, 10, 4], "area": 40, "segmentation": None}
    for order in (1, -1):
        shuffled = copy.deepcopy(what)
        shuffled["annotations"] = shuffled["annotations"][::order]
        (image,) = read_coco(written(tmp_path, shuffled)).images
        found = label_map(image)
        expected = np.zeros((32, 32), int)
        expected[:20, :20] = 1
        expected[5:9, 5:15] = 2
        np.testing.assert_array_equal(found, expected)


def test_a_map_of_another_size_takes_the_class_at_the_centre() -> None:
    labels = np.arange(16).reshape(4, 4)
    assert nearest(labels, 4, 4) is labels
    np.testing.assert_array_equal(nearest(labels, 2, 2), [[5, 7], [13, 15]])
    np.testing.assert_array_equal(nearest(labels, 8, 4), np.repeat(labels, 2, 0))


@pytest.mark.parametrize("archive", ["folder", "zip", "tar", "said"])
def test_images_are_found(tmp_path: Path, archive: str) -> None:
    coco_folder(tmp_path, 3)
    images, path, given = tmp_path / "images", tmp_path / "instances.json", None
    if archive == "zip":
        with zipfile.ZipFile(tmp_path / "instances.zip", "w") as packed:
            for file in images.iterdir():
                packed.write(file, file.name)
    elif archive == "tar":
        with tarfile.open(tmp_path / "instances.tar", "w") as packed_tar:
            for file in sorted(images.iterdir()):
                packed_tar.add(file, f"./{file.name}")
    elif archive == "said":
        given = images.rename(tmp_path / "elsewhere")
    source = images_of(path, ["002.png", "000.png"], given)
    pixels = Decode("RGB")(source.take(np.array([1, 0])))
    np.testing.assert_array_equal(pixels, [scene(0)[0], scene(2)[0]])
    assert source.fingerprint() == images_of(path, ["002.png", "000.png"], given).fingerprint()


def test_images_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, content(1))
    with pytest.raises(DataError, match="no images: none of"):
        images_of(path, ["000.png"])
    with tarfile.open(tmp_path / "instances.tar", "w") as packed:
        packed.addfile(tarfile.TarInfo("other.png"), io.BytesIO())
    with pytest.raises(DataError, match=r"no member '000\.png'"):
        images_of(path, ["000.png"])
    (tmp_path / "instances.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match="tar archive is expected"):
        TarFiles(["000.png"], tmp_path / "instances.tar")


def test_items_with_boxes(tmp_path: Path) -> None:
    data = dataset(tmp_path, "boxes")
    image, target = data[2]
    pixels, entries = scene(2)
    torch.testing.assert_close(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    left, top, wide, tall = entries[1]["bbox"]
    torch.testing.assert_close(
        target["boxes"][1], torch.tensor([left, top, left + wide, top + tall]) / 32, check_dtype=False
    )
    assert target["labels"].tolist() == [0, 1]
    assert target["area"].tolist() == [100, 96]
    assert target["size"].tolist() == [32, 32]
    assert data.subset([2, 4])[0][1]["boxes"].equal(target["boxes"])
    with pytest.raises(IndexError):
        data[6]


def test_items_with_classes_of_pixels(tmp_path: Path) -> None:
    data = dataset(tmp_path, "maps")
    _, labels = data[3]
    assert labels.dtype == torch.int64
    for label, entry in enumerate(scene(3)[1]):
        left, top, wide, tall = entry["bbox"]
        assert (labels[top : top + tall, left : left + wide] == label + 1).all()
    assert int((labels > 0).sum()) == 196


def test_fingerprints_change_with_what_is_known(tmp_path: Path) -> None:
    one, maps = dataset(tmp_path, "boxes"), dataset(tmp_path, "maps")
    assert one.fingerprint() == dataset(tmp_path, "boxes").fingerprint() != maps.fingerprint()
    what = content(6)
    what["annotations"][5]["bbox"][0] += 1
    written(tmp_path, what)
    assert dataset(tmp_path, "boxes").fingerprint() != one.fingerprint()


def test_a_batch_is_filled_up(tmp_path: Path) -> None:
    what = content(6)
    what["annotations"] = [entry for entry in what["annotations"] if entry["image_id"] != 101][:-1]
    coco_folder(tmp_path, 6)
    written(tmp_path, what)
    data = dataset(tmp_path, "boxes")
    images, targets = collate_boxes([data[0], data[1], data[5]])
    assert images.shape == (3, 3, 32, 32)
    assert targets["labels"].tolist() == [[0, 1], [IGNORED, IGNORED], [0, IGNORED]]
    assert targets["boxes"].shape == (3, 2, 4)
    assert collate_boxes([data[1]])[1]["boxes"].shape == (1, 1, 4)


def test_real_files_of_coco(data_root: Path) -> None:
    path = data_root / "coco_mini" / "instances.json.gz"
    file = read_coco(path)
    assert len(file.images) == 92
    assert len(file.names) == 80
    found = json.loads(gzip.decompress(path.read_bytes()))
    assert sum(len(image.objects) for image in file.images) == len(found["annotations"]) == 967
    of = {entry["id"]: number for number, entry in enumerate(found["images"])}
    places = dict.fromkeys(range(92), 0)
    for entry in found["annotations"]:
        image = file.images[of[entry["image_id"]]]
        instance = image.objects[places[of[entry["image_id"]]]]
        places[of[entry["image_id"]]] += 1
        mask = mask_of(instance.segmentation, image.width, image.height)
        packed = entry["segmentation"]
        if isinstance(packed, dict) and isinstance(packed["counts"], str):
            expected = reference.decode({**packed, "counts": packed["counts"].encode()})
            np.testing.assert_array_equal(mask, expected)
        # what the mask covers lies in its box, to a pixel of rounding
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            left, top, right, bottom = instance.box
            assert columns[0] >= left - 1.5
            assert columns[-1] <= right + 1.5
            assert rows[0] >= top - 1.5
            assert rows[-1] <= bottom + 1.5
    source = images_of(path, [image.file for image in file.images])
    assert Decode("RGB")(source.take(np.array([0])))[0].shape == (file.images[0].height, file.images[0].width, 3)
