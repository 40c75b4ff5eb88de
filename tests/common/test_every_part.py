"""The table of parts names every part there is, and says of it what its docstring says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
from torch import nn

import sparing
from sparing.core.predictor import Operation, Predictor
from sparing.core.registry import resolve
from sparing.core.step import Step
from sparing.core.task import Task
from sparing.parts import PARTS

ENTRIES = [(kind, name) for kind in PARTS for name in PARTS[kind]]
NOT_BY_NAME = {
    "AdjacencyGCN": "takes an adjacency matrix, which no task's batch holds",
    "AdjacencySGC": "takes an adjacency matrix, which no task's batch holds",
    "EventClassification": "is the base of tasks on events",
    "Detection": "is the base of detection tasks",
    "Segmentation": "is the base of segmentation tasks",
    "AnnotatedImages": "is the base of tasks in COCO's format",
    "CustomTask": "is made of live data sets and functions",
    "ExitTask": "is another task as a network with exits sees it",
    "ImageClassification": "is the base of image tasks",
    "TextClassification": "is made of lists of texts",
    "Live": "wraps the model in training for its validation",
    "_Published": "is the base of published sets",
    "_PublishedTable": "is the base of published tables",
    "_InMemory": "is made of the arrays an estimator is fitted on",
    "OwnLoss": "is another task as a model sees it that computes its own loss",
    "_Unlabelled": "is made of the arrays an estimator is fitted on",
    "_Recorder": "stands in for another predictor while it is fed",
}
"""Classes that no recipe and no folder can name, and why."""


NO_MODULES = ("__main__", "._native")
"""Ends of names: what runs when it is imported, and the engine's library, which is none of Python's."""


def defined() -> dict[str, list[type]]:
    """Every class of a kind that sparing's modules define."""
    found: dict[str, list[type]] = {kind: [] for kind in PARTS}
    bases = {"steps": Step, "tasks": Task, "predictors": Predictor, "operations": Operation}
    for module in pkgutil.walk_packages(sparing.__path__, "sparing."):
        if module.name.startswith("sparing.testing") or module.name.endswith(NO_MODULES):
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(thing) or thing.__module__ != module.name or thing.__name__ in NOT_BY_NAME:
                continue
            for kind, base in bases.items():
                if issubclass(thing, base) and thing is not base and not inspect.isabstract(thing):
                    found[kind].append(thing)
            model = issubclass(thing, nn.Module) and not inspect.isabstract(thing)
            # what is not asked for its number of classes is a layer
            if (
                module.name.startswith("sparing.models.")
                and model
                and "num_classes" in inspect.signature(thing).parameters
            ):
                found["models"].append(thing)
    return found


def test_every_part_is_in_the_table():
    for kind, classes in defined().items():
        listed = {part.target for part in PARTS[kind].values()}
        absent = [f"{cls.__module__}:{cls.__qualname__}" for cls in classes]
        absent = [target for target in absent if target not in listed]
        assert not absent, f"no line in the table of {kind} for {absent}"


def test_what_is_excused_exists():
    names = {
        name
        for module in pkgutil.walk_packages(sparing.__path__, "sparing.")
        if not module.name.endswith(NO_MODULES)
        for name, thing in vars(importlib.import_module(module.name)).items()
        if inspect.isclass(thing)
    }
    assert set(NOT_BY_NAME) <= names


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_a_line_says_what_the_docstring_says(kind, name):
    part, thing = PARTS[kind][name], resolve(kind, name)
    assert f"{thing.__module__}:{thing.__qualname__}" == part.target
    assert part.summary == inspect.getdoc(thing).partition("\n")[0]
    assert part.summary.endswith(".")


@pytest.mark.parametrize("name", PARTS["steps"])
def test_a_step_carries_its_name(name):
    assert resolve("steps", name).name == name


@pytest.mark.parametrize("name", PARTS["predictors"])
def test_a_predictor_carries_its_kind(name):
    assert resolve("predictors", name).kind == name


def test_ours_come_from_sparing():
    assert all(PARTS[kind][name].target.startswith("sparing.") for kind, name in ENTRIES)
