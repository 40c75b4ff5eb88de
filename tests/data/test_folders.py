"""Folders and zip files of a user's own images."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparing.core.errors import DataError
from sparing.data.folders import read_image_tree


def plant(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), len(name), np.uint8)).save(folder / name)
    return folder


def packed(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


PLAIN = ("cat/1.png", "cat/deep/2.JPG", "dog/1.png")
SPLIT = ("train/cat/1.png", "train/dog/1.png", "valid/cat/2.png", "test/dog/3.png", "test/cat/3.png")


@pytest.mark.parametrize("prefix", [None, "", "photos/", "a/b/"])
def test_plain_classes(tmp_path: Path, prefix: str | None) -> None:
    base = plant(tmp_path / "photos", *PLAIN)
    if prefix is not None:
        base = packed(base, tmp_path / "a.zip", prefix)
    tree = read_image_tree(base)
    assert tree.class_names == ("cat", "dog")
    assert tree.labels.tolist() == [0, 0, 1]
    assert tree.rows == {}


@pytest.mark.parametrize("prefix", [None, "", "photos/"])
def test_splits(tmp_path: Path, prefix: str | None) -> None:
    base = plant(tmp_path / "photos", *SPLIT)
    if prefix is not None:
        base = packed(base, tmp_path / "a.zip", prefix)
    tree = read_image_tree(base)
    assert tree.class_names == ("cat", "dog")
    names = {
        split: [tree.files.names[row].removeprefix(prefix or "") for row in rows] for split, rows in tree.rows.items()
    }
    assert names == {
        "train": ["train/cat/1.png", "train/dog/1.png"],
        "val": ["valid/cat/2.png"],
        "test": ["test/cat/3.png", "test/dog/3.png"],
    }


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    base = plant(tmp_path / "photos", *PLAIN, ".cache/x.png", "dog/._1.png")
    (base / "notes.txt").write_text("about")
    assert len(read_image_tree(base).labels) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no image"),
        (("cat/1.png",), "only one class, 'cat'"),
        (("cat/1.png", "dog/1.png", "3.png"), r"photos/3\.png lies in no class folder"),
        (("train/cat/1.png", "train/dog/1.png", "test/3.png"), "test/3.png lies in no class folder"),
        (("train/cat/1.png", "train/dog/1.png", "test/owl/1.png"), "the class 'owl' has no image under train/"),
        (("train/cat/1.png", "train/dog/1.png", "extra/cat/1.png"), "'train' stands beside folders that are no splits"),
    ],
)
def test_wrong_trees_say_what_is_wrong(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=message):
        read_image_tree(plant(tmp_path / "photos", *names))


def test_what_is_no_folder_or_zip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        read_image_tree(tmp_path / "none")
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="not a zip file"):
        read_image_tree(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("cat/1.png", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("cat/1.png", b"")
    with pytest.raises(DataError, match=r"'cat/1\.png' appears twice"):
        read_image_tree(tmp_path / "b.zip")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_archives_give_a_tree_or_a_data_error(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole.zip"
    if not whole.exists():
        packed(plant(tmp_path / "photos", *SPLIT), whole)
    content = bytearray(whole.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "a.zip"
    path.write_bytes(bytes(content))
    try:
        tree = read_image_tree(path)
        tree.files.take(np.arange(len(tree.labels)))
    except DataError as error:
        where = str(error)
    else:
        where = str(tree.files.base)
    assert "a.zip" in where
