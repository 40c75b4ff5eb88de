"""``sparing init``: a commented file to start from, for one's own images or one's own model."""

from __future__ import annotations

import importlib
import inspect
import json as jsonlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.cli import output
from sparing.core.errors import DataError, InvalidValue

if TYPE_CHECKING:
    from sparing.data.images import ImageFiles

SAMPLE = 200
"""Images opened to learn how large they are and whether they have colour."""
SIZES = (32, 48, 64, 96, 128)
"""Input sizes that are suggested; training on larger ones takes long on a CPU."""
UPDATES = 3000
"""Optimizer steps that the suggested number of epochs comes to, more or less."""


def write_start(source: str, out: Path | None, *, force: bool, json: bool) -> Any:
    """Write a recipe for an image folder, or a script for a model class; a document."""
    path = Path(source).expanduser()
    if path.exists():
        content, found = recipe_for_images(path)
        target = out or Path(f"{_plain_name(path.resolve().stem)}.yaml")
        following = f"sparing run {target}"
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source):
        content, found = script_for_model(source)
        target = out or Path(f"{_plain_name(source.rpartition(':')[2].lower())}_sparing.py")
        following = f"python {target}, once your data are in it"
    else:
        raise DataError(
            f"{source} is neither a folder (or zip file) with a sub-folder of images for each class, "
            "nor a model class as package.module:Class"
        )
    if target.exists() and not force:
        raise InvalidValue(f"{target} is there already; --force replaces it, --out names another file")
    from sparing.core.files import write_atomic

    write_atomic(target, content.encode())
    if not json:
        output.say(f"{target} written", f"next: {following}")
    return {"written": str(target), "next": following, "found": found}


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "own"


def recipe_for_images(path: Path) -> tuple[str, dict[str, Any]]:
    """A recipe for a folder or zip file of images, checked by reading it, and what was found there."""
    from sparing.core.recipe import parse_recipe
    from sparing.data.folders import read_image_tree

    tree = read_image_tree(path)
    counts = Counter(tree.labels.tolist())
    images = {name: counts[label] for label, name in enumerate(tree.class_names)}
    total = len(tree.labels)
    width, height, grey = _look(tree.files)
    size = max((one for one in SIZES if one <= min(width, height)), default=SIZES[0])
    size = min(size, 64) if total > 5000 else size
    train = int((tree.rows["train"].size if tree.rows else 0.65 * total) or 1)
    batch = 64 if train >= 640 else 16
    epochs = max(5, min(60, round(UPDATES * batch / max(train, 1))))
    common = f"epochs: {epochs}, batch_size: {batch}, scheduler: cosine"
    located = _portable(path)
    few = min(images, key=lambda name: images[name])
    listed = ", ".join(f"{name} {count}" for name, count in list(images.items())[:12])
    more = f" and {len(images) - 12} more" if len(images) > 12 else ""
    splits = "its own " + ", ".join(tree.rows) if tree.rows else "cut from all images, the same on every run"
    shade = "grey" if grey else "colour"
    content = f"""\
# {_one_line(path.name)}: {total} images of {len(images)} classes, about {width}×{height} pixels, {shade}
# ({_one_line(listed)}{more}; fewest: {_one_line(few)}, {images[few]}). Splits: {splits}.
#
#     sparing run FILE --dry-run     # checks everything, trains nothing
#     sparing run FILE               # ledger, report and model go to runs/
#     sparing show train             # every field of a step, with its range
task:
  name: image_folder
  path: {jsonlib.dumps(located, ensure_ascii=False)}
  size: {size}          # pixels; halving it makes training and model about four times as fast
  channels: {1 if grey else 3}       # 3 for colour, 1 for grey
model:
  name: convnet
  widths: [32, 64, 128, 256]
steps:
  # What everything below is compared with.
  - train: {{id: baseline, {common}, lr: 3.0e-3, restore_best: true}}
  # A smaller network learns from the baseline's outputs.
  - distil:
      id: student
      teacher: baseline
      model: {{name: convnet, widths: [16, 32, 64]}}
      {common.replace(", ", chr(10) + "      ")}
      lr: 3.0e-3
      restore_best: true
  # INT8 if it is faster on this machine and loses at most one point of accuracy; otherwise FP32 is kept, and the ledger
  # says why. goal: bytes keeps it when it is smaller.
  - quantize: {{id: int8, goal: latency, max_loss: 0.01}}
"""
    parse_recipe(content, file=str(path))
    return content, {
        "images": total,
        "classes": images,
        "width": width,
        "height": height,
        "grey": grey,
        "splits": {name: int(rows.size) for name, rows in tree.rows.items()},
    }


def _one_line(name: str) -> str:
    """A name as it can stand in a comment."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _portable(path: Path) -> str:
    """Relative to the working folder where it lies below it."""
    whole, here = path.resolve(), Path.cwd()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else str(whole)


def _look(files: ImageFiles) -> tuple[int, int, bool]:
    """(median width, median height, all grey?) of evenly spaced images; raises :class:`DataError` for a broken one."""
    import statistics

    import numpy as np

    from sparing.data.preprocessing import Decode

    rows = np.unique(np.linspace(0, len(files) - 1, min(SAMPLE, len(files))).astype(int))
    widths, heights, grey = [], [], True
    for row in rows:
        (image,) = Decode("RGB")(files.take(np.array([row])))
        heights.append(image.shape[0])
        widths.append(image.shape[1])
        grey = grey and bool((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all())
    return int(statistics.median(widths)), int(statistics.median(heights)), grey


def script_for_model(target: str) -> tuple[str, dict[str, Any]]:
    """A Python script that brings a model class to Sparing, and the arguments it takes."""
    from torch import nn

    module, _, name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidValue(f"{target} cannot be imported from {here}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise InvalidValue(f"{target} is no subclass of torch.nn.Module")
    arguments = [
        parameter
        for parameter in inspect.signature(found).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    needed = [argument.name for argument in arguments if argument.default is argument.empty]
    optional = ", ".join(f"{a.name}={a.default!r}" for a in arguments if a.default is not a.empty)
    fill = "".join(f", {argument}=..." for argument in needed)
    base = name.partition(".")[0]
    content = f'''\
"""{name} under Sparing: trained, distilled into a smaller one, quantised if that wins, and measured after every step.

Put your data and settings where ... stands, then run this file.
"""

from torch.nn.functional import cross_entropy

import sparing
from {module} import {base}

# Two map-style datasets of (input, class number) items; validation and calibration data are cut from the first.
train_data = ...
test_data = ...

task = sparing.CustomTask(
    "{name.lower()}",
    train=train_data,
    test=test_data,
    model=lambda: sparing.build_model({name}{fill}),{f"  # also: {optional}" if optional else ""}
    loss=cross_entropy,
    labels=[...],  # names of the classes; give metrics={{name: function}} instead for anything but classification
)
run = sparing.run(
    task=task,
    steps=[
        sparing.Train(id="baseline", epochs=10),
        # A smaller network of the same class learns from the baseline.
        sparing.Distil(id="student", teacher="baseline", model=sparing.build_model({name}{fill}), epochs=10),
        sparing.Quantize(id="int8", goal="latency", max_loss=0.01),
    ],
    out="runs/{name.lower()}",
)
print(run.ledger.to_markdown())
'''
    compile(content, target, "exec")
    return content, {"needed": needed, "optional": optional}
