"""Equal content gives equal fingerprints, in every process; other content gives others; the rest has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from itertools import combinations
from pathlib import Path

import fingerprinted
import numpy as np
import pytest
import torch
from fingerprinted import SAME, THINGS, UNKNOWN
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bounds import watched
from sparing.core import fingerprint as module
from sparing.core.fingerprint import NoFingerprint, fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", THINGS)
def test_a_thing_made_twice_has_one_fingerprint(name):
    assert fingerprint(THINGS[name]()) == fingerprint(THINGS[name]())
    assert len(fingerprint(THINGS[name]())) == 64


def test_different_things_have_different_fingerprints():
    found = {name: fingerprint(make()) for name, make in THINGS.items()}
    assert [pair for pair in combinations(found, 2) if found[pair[0]] == found[pair[1]]] == []


@pytest.mark.parametrize("name", SAME)
def test_what_is_no_content_does_not_count(name):
    one, other = SAME[name]
    assert fingerprint(one()) == fingerprint(other())


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_unknown_has_none_and_is_named(name):
    make, named = UNKNOWN[name]
    with pytest.raises(NoFingerprint) as caught:
        fingerprint(make())
    assert named in str(caught.value)
    if "object" in named and "array" not in named:
        assert "fingerprint()" in str(caught.value)


def test_fingerprints_are_the_same_in_another_process_with_other_hashes_and_another_folder(tmp_path):
    here = {name: fingerprint(make()) for name, make in THINGS.items()}
    environment = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import json, fingerprinted as f; from sparing.core.fingerprint import fingerprint; "
    code += "print(json.dumps({name: fingerprint(make()) for name, make in f.THINGS.items()}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert [name for name in here if here[name] != there[name]] == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values, values)
def test_values_have_equal_fingerprints_just_when_they_are_written_alike(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (in_order(one) == in_order(other))


def in_order(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{in_order(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({','.join(map(in_order, value))})"
    return repr(value)


# -------------------------------------------------------------------------------------------------- files and folders


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in {"a.txt": "one", "below/b.txt": "two", "below/c": ""}.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


CHANGES = {
    "content": lambda tree: (tree / "a.txt").write_text("ONE"),
    "content, at the same size and time": lambda tree: rewrite_quietly(tree / "a.txt"),
    "a new file": lambda tree: (tree / "new").touch(),
    "a new folder": lambda tree: (tree / "new").mkdir(),
    "a file less": lambda tree: (tree / "below" / "c").unlink(),
    "another name": lambda tree: (tree / "a.txt").rename(tree / "z.txt"),
    "another place": lambda tree: (tree / "a.txt").rename(tree / "below" / "a.txt"),
    "a name that is no UTF-8": lambda tree: os.rename(tree / "a.txt", os.fsencode(tree) + b"/\xff"),
    "a link to a folder": lambda tree: (tree / "link").symlink_to(tree / "below"),
    "a link back to the top": lambda tree: (tree / "below" / "link").symlink_to(tree),
}


def rewrite_quietly(path: Path) -> None:
    before = path.stat()
    path.write_text("ONE")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_a_folder_counts(tree, name):
    before = fingerprint(tree)
    assert before == fingerprint(tree)
    CHANGES[name](tree)
    after = fingerprint(tree)
    assert after != before
    assert after == fingerprint(tree)


def test_what_a_linked_folder_holds_counts(tree, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    before = fingerprint(tree)
    (tmp_path / "elsewhere" / "new").touch()
    assert fingerprint(tree) != before


def test_where_a_folder_lies_and_when_it_was_written_do_not_count(tree, tmp_path):
    before = fingerprint([tree, tree / "a.txt"])
    moved = tree.rename(tmp_path / "moved")
    os.utime(moved / "a.txt", (1, 1))
    assert fingerprint([moved, moved / "a.txt"]) == before


def test_a_file_is_read_once_while_it_stays_the_same(tree, monkeypatch):
    read: list[Path] = []
    digest = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: (read.append(path), digest(path))[1])
    for _ in range(3):
        fingerprint(tree)
    assert len(read) == 3
    (tree / "a.txt").write_text("three")
    fingerprint(tree)
    assert len(read) == 4


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("nowhere"), lambda p: p.symlink_to(p), os.mkfifo])
def test_what_is_neither_file_nor_folder_is_named(tree, make):
    make(tree / "odd")
    with pytest.raises(NoFingerprint, match=f"cannot fingerprint {tree}/odd"):
        fingerprint(tree)


def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch):
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(NoFingerprint, match=f"cannot fingerprint {tree}: .*Permission denied"):
        fingerprint(tree)


# ------------------------------------------------------------------------------------------------------------- memory

SIZE = 64 << 20


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda: np.ones(SIZE // 8), 0),
        (lambda: np.ones((SIZE // 800, 100)).T, 1),
        (lambda: torch.ones(SIZE // 4), 0),
        (lambda: torch.ones(SIZE // 400, 100).T, 1),
        (lambda: b"x" * SIZE, 0),
        (lambda: nn.Linear(1 << 12, SIZE >> 14, bias=False), 0),
    ],
    ids=["array", "transposed array", "tensor", "transposed tensor", "bytes", "module"],
)
def test_large_things_are_not_copied_more_than_once(make, copies):
    thing = make()
    outcome = watched(lambda: fingerprint(thing))
    assert outcome.raised == ""
    assert outcome.mebibytes < (copies + 0.25) * SIZE / 2**20, outcome


# ---------------------------------------------------------------------------------------------- functions and modules


def test_a_name_that_is_not_bound_yet():
    def make() -> types.FunctionType:
        def function() -> object:
            return later

        assert fingerprint(function)
        later = 1
        return function

    assert fingerprint(make())


def test_without_torch_everything_else_has_one(monkeypatch):
    before = fingerprint([1, np.arange(3)])
    monkeypatch.delitem(sys.modules, "torch")
    assert fingerprint([1, np.arange(3)]) == before
    with pytest.raises(NoFingerprint):
        fingerprint(object())


def test_another_activation_of_a_layer_of_torch_counts():
    def layer(activation: object) -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(4, 2, 8, activation=activation)

    assert fingerprint(layer(torch.sigmoid)) == fingerprint(layer(torch.sigmoid))
    assert fingerprint(layer(torch.sigmoid)) != fingerprint(layer(torch.tanh))


def test_a_class_of_ones_own_counts_with_its_module(monkeypatch):
    one = fingerprint(fingerprinted.Own("a"))
    monkeypatch.setattr(fingerprinted.Own, "__module__", "elsewhere")
    assert fingerprint(fingerprinted.Own("a")) != one
