"""Damaged recipes, model folders and data files: what comes out, how long it takes, and how much memory.

Hypothesis chooses what to damage and how; each case runs in a process of its own, forked from one that has everything
imported, so that its time and memory are its own.
"""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bounds import MEBIBYTES, SECONDS, watched
from sparing import build_model, load
from sparing.core.predictor import ModulePredictor, to_onnx
from sparing.core.recipe import load_recipe, packaged
from sparing.core.registry import resolve
from sparing.data.cifar import read_cifar_binary, read_cifar_npz
from sparing.data.idx import read_idx

Reader = Callable[[Path], Any]
WORDS = (b"task", b"steps", b"- train", b": ", b"{", b"}", b"[", b"&a", b"*a", b"\n", b"  ", b"\x00", b"1e999", b"!!")


def originals(folder: Path) -> dict[str, tuple[Path, Reader]]:
    """One sound specimen of each kind, and what reads it."""
    task = resolve("tasks", "digits")()
    module = ModulePredictor(build_model("convnet", task, widths=[8, 8]), task)
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(packaged()["quickstart"].read_bytes())
    found: dict[str, tuple[Path, Reader]] = {
        "recipe": (recipe, load_recipe),
        "module folder": (module.save(folder / "module"), load),
        "onnx folder": (to_onnx(module, task.example_input(), module).save(folder / "onnx"), load),
    }
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    idx = b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()
    (folder / "images-idx3-ubyte").write_bytes(idx)
    (folder / "images-idx3-ubyte.gz").write_bytes(gzip.compress(idx))
    records = np.concatenate([rng.integers(0, 10, (20, 1)), rng.integers(0, 256, (20, 3072))], axis=1)
    (folder / "data_batch_1.bin").write_bytes(records.astype(np.uint8).tobytes())
    found["idx"] = (folder / "images-idx3-ubyte", read_idx)
    found["idx.gz"] = (folder / "images-idx3-ubyte.gz", read_idx)
    found["cifar binary"] = (folder / "data_batch_1.bin", read_cifar_binary)
    found["cifar npz"] = (_cifar_npz(folder / "cifar10_jpeg.npz", rng), lambda path: read_cifar_npz(path, True))
    found["image zip"] = (_image_zip(folder / "images.zip", rng), _read_images)
    return found


def _jpeg(rng: np.random.Generator) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def _cifar_npz(path: Path, rng: np.random.Generator) -> Path:
    """A file of the shape ``shared`` CIFAR copies have: one JPEG header, scans and their offsets."""
    pictures = [_jpeg(rng) for _ in range(20)]
    start = pictures[0].index(b"\xff\xda")
    scans = [picture[start:] for picture in pictures]
    parts: dict[str, Any] = {"header": np.frombuffer(pictures[0][:start], np.uint8)}
    for split in ("train", "test"):
        parts[f"{split}_scan"] = np.frombuffer(b"".join(scans), np.uint8)
        parts[f"{split}_offset"] = np.cumsum([0, *map(len, scans)])
        parts[f"{split}_label"] = np.arange(20) % 10
    np.savez(path, class_names=np.array([f"class {i}" for i in range(10)]), **parts)
    return path


def _image_zip(path: Path, rng: np.random.Generator) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val", "test"):
            for index in range(6):
                archive.writestr(f"{split}/{'ab'[index % 2]}/{index}.jpg", _jpeg(rng))
    return path


def _read_images(path: Path) -> Any:
    splits = resolve("tasks", "image_folder")(path=str(path), size=32).splits(None)
    return [splits.train[index] for index in range(len(splits.train))]


damages = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.sampled_from(WORDS) | st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(2, 60)),
        st.tuples(st.just("replace"), st.floats(0, 1), st.binary(max_size=200)),
        st.tuples(st.just("folder"), st.just(0.0), st.just(0)),
        st.tuples(st.just("remove"), st.just(0.0), st.just(0)),
    ),
    min_size=1,
    max_size=3,
)


def damage(target: Path, how: str, where: float, what: Any) -> None:
    """Damage one file in place."""
    if not target.is_file():
        return
    content = target.read_bytes()
    at = int(where * max(len(content) - 1, 0))
    if how == "flip" and content:
        content = content[:at] + bytes([content[at] ^ what]) + content[at + 1 :]
    elif how == "cut":
        content = content[:at]
    elif how == "insert":
        content = content[:at] + what + content[at:]
    elif how == "repeat":
        content = content[:at] + content[at : at + 16] * what + content[at + 16 :]
    elif how == "replace":
        content = content[:at] + what + content[at + len(what) :]
    target.unlink()
    if how == "folder":
        target.mkdir()
    elif how != "remove":
        target.write_bytes(content)


def run(cases: int) -> dict[str, Any]:
    """Run ``cases`` cases; returns counts, the slowest, the largest, and what came out that should not."""
    with tempfile.TemporaryDirectory() as scratch:
        sound = originals(Path(scratch))
        kinds, wrong = Counter[str](), list[str]()
        worst = {"seconds": 0.0, "mebibytes": 0.0}

        @settings(
            max_examples=cases, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.sampled_from(sorted(sound)), st.integers(0, 9), damages)
        def case(kind: str, which: int, wounds: list[tuple[str, float, Any]]) -> None:
            original, reader = sound[kind]
            target = Path(scratch) / "case" / original.name
            shutil.rmtree(target.parent, ignore_errors=True)
            target.parent.mkdir()
            shutil.copytree(original, target) if original.is_dir() else shutil.copy(original, target)
            for wound in wounds:
                inside = sorted(path for path in target.rglob("*")) if target.is_dir() else [target]
                damage(inside[which % len(inside)] if inside else target, *wound)
            outcome = watched(lambda: reader(target))
            kinds[f"{kind}: {'refused' if outcome.deliberate else 'read'}"] += 1
            worst["seconds"] = max(worst["seconds"], outcome.seconds)
            worst["mebibytes"] = max(worst["mebibytes"], outcome.mebibytes)
            if (
                (outcome.raised and not outcome.deliberate)
                or outcome.seconds > SECONDS
                or outcome.mebibytes > MEBIBYTES
            ):
                wrong.append(f"{kind} after {wounds}: {outcome}")

        case()
    return {"cases": sum(kinds.values()), "kinds": dict(sorted(kinds.items())), "worst": worst, "wrong": wrong}
