from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import CorruptFile, InvalidValue, SparingError, UnknownName
from sparing.core.files import canonical_json
from sparing.core.predictor import Context, ModulePredictor, OnnxPredictor, Preprocessing, load, nest, unnest
from sparing.core.predictor.folder import digest_of


def resign(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its digest right again, as a forger would."""
    path = folder / "sparing.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["digest"] = digest_of(manifest)
    path.write_text(json.dumps(manifest))


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a payload file, hash and digest included."""
    (folder / name).write_bytes(content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    resign(folder, lambda manifest: manifest["files"].update({name: record}))


@pytest.fixture(scope="module")
def saved(onnx: OnnxPredictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    onnx.attachments = {"extra/model.pt2": b"never opened"}
    folder = onnx.save(tmp_path_factory.mktemp("saved") / "model")
    onnx.attachments = {}
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_an_onnx_folder_answers_the_same(saved: Path, onnx: OnnxPredictor, images: np.ndarray) -> None:
    again = load(saved)
    np.testing.assert_array_equal(again(images), onnx(images))
    assert again.describe() == onnx.describe()
    assert again.attachments == {"extra/model.pt2": b"never opened"}
    assert (again.labels, again.context.task) == (onnx.labels, "shapes")
    assert again.describe().model_bytes == (saved / "model.onnx").stat().st_size
    assert load(saved, threads=1).threads == 1


def test_loading_and_answering_needs_no_torch(saved: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import sparing\n"
        "from sparing.parts import PARTS, Part\n"
        "PARTS['operations']['scale'] = Part('plain_scale:Scale', '')\n"
        f"model = sparing.load({str(saved)!r})\n"
        "print(model.predict([np.zeros(64)] * 2).shape, model.describe().macs > 0)\n"
        "print([name for name in ('torch', 'lightning', 'onnx', 'scipy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["(2, 3) True", "[]"], done.stderr


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["sparing.json", "model.onnx", "extra/model.pt2"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        _flip,
        _replace_by_folder,
        _replace_by_link,
        _replace_by_pipe,
    ],
)
def test_damage_is_refused_and_the_file_named(folder: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(folder / name)
    with pytest.raises(CorruptFile, match=Path(name).name.replace(".", r"\.")):
        load(folder)


def test_what_the_manifest_does_not_list_is_refused(folder: Path) -> None:
    (folder / "payload.so").write_bytes(b"")
    with pytest.raises(CorruptFile, match=r"payload\.so does not belong"):
        load(folder)
    (folder / "payload.so").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(CorruptFile, match="does not belong"):
        load(folder)


def test_the_card_may_be_edited_or_removed(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    load(folder)
    (folder / "README.md").unlink()
    load(folder)
    (folder / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(CorruptFile, match="symbolic link"):
        load(folder)


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.0])
def test_a_foreign_version_is_named_with_those_read(folder: Path, version: object) -> None:
    resign(folder, lambda manifest: manifest.update(schema=version))
    with pytest.raises(CorruptFile, match=r"schema version .*this release reads 1"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/passwd", "a/../../b", "sparing.json", "README.md", "", ".hidden", "a\\b", "a//b"]
)
def test_names_that_lead_elsewhere_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside.onnx").write_bytes((folder / "model.onnx").read_bytes())
    resign(folder, lambda manifest: manifest["files"].update({name: manifest["files"]["model.onnx"]}))
    with pytest.raises(CorruptFile, match="forbidden name"):
        load(folder)


def test_an_unsigned_change_is_refused(folder: Path) -> None:
    path = folder / "sparing.json"
    path.write_text(path.read_text().replace('"square"', '"circle"'))
    with pytest.raises(CorruptFile, match="digest"):
        load(folder)


def test_a_missing_folder_a_file_and_an_unknown_kind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="missing"):
        load(tmp_path / "nowhere")
    with pytest.raises(CorruptFile, match="is a file"):
        load(folder / "model.onnx")
    resign(folder, lambda manifest: manifest.update(kind="onnxx"))
    with pytest.raises(UnknownName, match="onnx"):
        load(folder)


def test_a_graph_with_data_elsewhere_is_refused(folder: Path, onnx: OnnxPredictor) -> None:
    graph = onnx.graph()
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    forge(folder, "model.onnx", graph.SerializeToString())
    with pytest.raises(CorruptFile, match="another file"):
        load(folder)


def test_saving_replaces_models_only(onnx: OnnxPredictor, tmp_path: Path) -> None:
    onnx.save(tmp_path / "model")
    onnx.save(tmp_path / "model")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InvalidValue, match="holds files that are no model"):
        onnx.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    with pytest.raises(InvalidValue, match="not a folder"):
        onnx.save(tmp_path / "thesis" / "chapter.tex")
    onnx.attachments = {"../up": b""}
    with pytest.raises(InvalidValue, match="cannot be the name"):
        onnx.save(tmp_path / "bad")
    onnx.attachments = {}


def test_predictors_nest(onnx: OnnxPredictor, module: ModulePredictor, images: np.ndarray) -> None:
    files, manifests = nest({"first": onnx, "second": module})
    again = unnest(files, json.loads(json.dumps(manifests)), trust=("guests",))
    np.testing.assert_array_equal(again["first"](images), onnx(images))
    np.testing.assert_array_equal(again["second"](images), module(images))
    with pytest.raises(CorruptFile, match="first"):
        unnest({name: content for name, content in files.items() if name != "first/model.onnx"}, manifests)


def test_preprocessing_is_checked(onnx: OnnxPredictor, images: np.ndarray, tmp_path: Path) -> None:
    from guests import Scale, Unregistered

    steps = Preprocessing((Scale(2.0, (1, 8, 8)),))
    assert Preprocessing.from_config(json.loads(json.dumps(steps.to_config()))) == steps
    with pytest.raises(InvalidValue, match="Unregistered is not a registered operation"):
        Preprocessing((Unregistered(),)).to_config()
    with pytest.raises(InvalidValue, match="at least one"):
        steps([])
    with pytest.raises(InvalidValue, match="one row each"):
        Preprocessing((Unregistered(),))([1, 2])
    with pytest.raises(CorruptFile, match=r"'facto'.*factor"):
        Preprocessing.from_config([{"operation": "scale", "facto": 2}])
    with pytest.raises(CorruptFile, match="factor"):
        Preprocessing.from_config([{"operation": "scale", "factor": "much"}])
    with pytest.raises(InvalidValue, match="without preprocessing"):
        OnnxPredictor(onnx.content, Context()).predict([images[0]])


_COPY = Path(tempfile.mkdtemp(prefix="sparing-fuzz-"))


def _fresh(saved: Path) -> Path:
    shutil.rmtree(_COPY, ignore_errors=True)
    return Path(shutil.copytree(saved, _COPY))


def _same_json(one: bytes, other: bytes) -> bool:
    """Whether two texts differ in white space and order of keys only."""
    try:
        return canonical_json(json.loads(one)) == canonical_json(json.loads(other))
    except ValueError:
        return False


@given(data=st.data())
def test_fuzz_bytes(saved: Path, data: st.DataObject) -> None:
    """Whatever happens to a file, it is noticed."""
    folder = _fresh(saved)
    name = data.draw(st.sampled_from(["sparing.json", "model.onnx", "extra/model.pt2"]))
    original = (folder / name).read_bytes()
    at = data.draw(st.integers(0, len(original)))
    changed = original[:at] + data.draw(st.binary(max_size=12)) + original[data.draw(st.integers(at, len(original))) :]
    (folder / name).write_bytes(changed)
    if changed == original or (name == "sparing.json" and _same_json(changed, original)):
        load(folder)
        return
    with pytest.raises(CorruptFile):
        load(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inside for place in _places(item, (*path, key))]


@given(data=st.data())
def test_fuzz_signed_manifests(saved: Path, data: st.DataObject) -> None:
    """A manifest with a right digest may hold anything; only SparingError comes out."""
    folder = _fresh(saved)

    def change(manifest: dict[str, Any]) -> None:
        path = data.draw(st.sampled_from(_places(manifest)))
        holder: Any = manifest
        for key in path[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[path[-1]] = data.draw(JSON)
        elif isinstance(holder, dict):
            del holder[path[-1]]

    try:
        resign(folder, change)
    except SparingError:  # text that cannot be hashed cannot be forged either
        return
    with contextlib.suppress(SparingError):
        load(folder)


@given(data=st.data())
def test_fuzz_signed_payloads(saved: Path, onnx: OnnxPredictor, data: st.DataObject) -> None:
    """A graph with a right hash may be anything; only SparingError comes out."""
    folder = _fresh(saved)
    original = onnx.content
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=200))
    else:
        at = data.draw(st.integers(0, len(original) - 1))
        content = original[:at] + data.draw(st.binary(min_size=1, max_size=4)) + original[at + 1 :]
    forge(folder, "model.onnx", content)
    with contextlib.suppress(SparingError):
        load(folder)


@given(content=st.binary(max_size=300))
def test_fuzz_signed_tensors(module: ModulePredictor, content: bytes) -> None:
    shutil.rmtree(_COPY, ignore_errors=True)
    folder = module.save(_COPY)
    original = (folder / "model.safetensors").read_bytes()
    for forged in (content, content + original[len(content) :]):
        forge(folder, "model.safetensors", forged)
        with contextlib.suppress(SparingError):
            load(folder, trust=("guests",))
