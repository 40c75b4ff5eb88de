"""Guests: prune → INT8 → compile, where only the last makes the zeros save anything, in a runtime of its own kind."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from harness import Points, go, survives_kills
from pydantic import Field
from torch import nn

from sparing.core.errors import CorruptFile, InvalidValue, NoEffect, RecipeError, UnknownName
from sparing.core.job import Job
from sparing.core.pipeline import run
from sparing.core.predictor import Description, Manifest, ModulePredictor, Predictor, load
from sparing.core.predictor.tree import to_numpy
from sparing.core.recipe import parse_recipe
from sparing.core.step import Stage, Step, step
from sparing.core.store import PREDICTOR
from sparing.core.training import Train


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


@step("prune_smallest")
class Prune(Step):
    """Set the smallest weights of every linear layer to zero."""

    stage = Stage.MODEL
    needs = frozenset({"trained"})
    promises = frozenset({"sparsity"})

    share: float = Field(0.75, gt=0, lt=1)

    def apply(self, job: Job) -> Job:
        model = job.fresh_model()
        if not linear_layers(model):
            kinds = sorted({type(layer).__name__ for layer in model.modules()})
            raise NoEffect(f"no linear layer to prune; the model holds {', '.join(kinds)}")
        for layer in linear_layers(model):
            weight = layer.weight.data
            weight[weight.abs() < weight.abs().flatten().quantile(self.share)] = 0
        return job.replace(model=model, predictor=ModulePredictor(model, job.task))


@step("round_to_int8")
class RoundToInt8(Step):
    """Round the weights of every linear layer to 255 levels of its largest weight."""

    stage = Stage.MODEL
    needs = frozenset({"trained"})
    gives = frozenset({"int8"})

    def apply(self, job: Job) -> Job:
        model = job.fresh_model()
        for layer in linear_layers(model):
            scale = layer.weight.data.abs().max() / 127
            layer.weight.data = (layer.weight.data / scale).round() * scale
        return job.replace(model=model, predictor=ModulePredictor(model, job.task))


class Engine(Predictor):
    """Two sparse INT8 layers in NumPy: only non-zero weights and their places are kept."""

    kind: ClassVar[str] = "sparse_engine"

    def __init__(self, layers: list[dict[str, np.ndarray]], task: Any = None, *, threads: int | None = None) -> None:
        super().__init__(task, threads=threads)
        self.layers = layers

    @classmethod
    def compiled(cls, model: nn.Module, task: Any) -> Engine:
        layers = []
        for layer in linear_layers(model):
            weight = layer.weight.detach().numpy()
            scale = np.abs(weight).max() / 127
            rows, columns = (places.astype(np.uint8) for places in np.nonzero(weight))
            values = np.rint(weight[rows, columns] / scale).astype(np.int8)
            made = {"rows": rows, "columns": columns, "values": values, "scale": np.asarray(scale)}
            layers.append(made | {"bias": layer.bias.detach().numpy()})
        return cls(layers, task)

    @property
    def runtime(self) -> str:
        return "sparse engine"

    def __call__(self, *inputs: Any) -> Any:
        (x,) = (np.asarray(to_numpy(value)) for value in inputs)
        for number, layer in enumerate(self.layers):
            made = np.tile(layer["bias"], (len(x), 1))
            np.add.at(made.T, layer["rows"], x[:, layer["columns"]].T * (layer["values"] * layer["scale"])[:, None])
            x = made if number == len(self.layers) - 1 else np.maximum(made, 0)
        return x.astype(np.float32)

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        buffer = io.BytesIO()
        arrays = {f"{i}.{name}": value for i, layer in enumerate(self.layers) for name, value in layer.items()}
        np.savez(buffer, **arrays)
        return {"engine.npz": buffer.getvalue()}, {"layers": len(self.layers)}

    @classmethod
    def load_files(cls, files: Mapping[str, bytes], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        if set(files) != {"engine.npz"}:
            raise CorruptFile(f"a sparse engine is one file engine.npz, not {sorted(files)}")
        with np.load(io.BytesIO(files["engine.npz"]), allow_pickle=False) as found:
            names = ("rows", "columns", "values", "scale", "bias")
            layers = [{name: found[f"{i}.{name}"] for name in names} for i in range(manifest.config["layers"])]
        return cls(layers, manifest.context())

    def describe(self) -> Description:
        kept = sum(layer["values"].size for layer in self.layers)
        biases = sum(layer["bias"].size for layer in self.layers)
        size = sum(len(content) for content in self.payload()[0].values())
        return Description(
            self.kind, self.runtime, "int8", kept + biases, kept + biases, kept, "non-zero products", size
        )


@step("compile_sparse")
class CompileSparse(Step):
    """Compile the model for the sparse engine."""

    stage = Stage.INFERENCE
    needs = frozenset({"int8"})
    realises = frozenset({"sparsity"})
    removes = frozenset({"int8"})

    def apply(self, job: Job) -> Job:
        made = job.store.once("engine", lambda: Engine.compiled(job.model, job.task), PREDICTOR)
        return job.replace(predictor=made)


TRAIN = Train(epochs=6, batch_size=16, lr=0.02)


def test_each_step_is_a_row_and_only_the_engine_is_smaller(tmp_path, register):
    register("predictors", Engine)
    done = survives_kills(go(Points(), TRAIN, Prune(), RoundToInt8(), CompileSparse()), tmp_path)
    train, prune, int8, compiled = done.ledger.rows
    assert prune.figures["model bytes"].value >= 0.95 * train.figures["model bytes"].value  # zeros alone save nothing
    assert prune.figures["non-zero parameters"].value < 0.5 * prune.figures["parameters"].value
    assert [row.runtime for row in (train, prune, int8, compiled)] == ["onnxruntime"] * 3 + ["sparse engine"]
    assert compiled.figures["accuracy"].value == int8.figures["accuracy"].value  # the same numbers, other arithmetic
    lines = done.ledger.summary()
    assert lines[2].ratios
    assert not lines[3].ratios  # no ratio is formed across runtimes
    again = load(done.folder / "model")
    x = Points().example_input(5)[0]
    assert isinstance(again, Engine)
    np.testing.assert_array_equal(again(x), done.predictor(x))
    torch.testing.assert_close(torch.from_numpy(again(x)), done.job.model.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_promise_nobody_keeps_is_refused(tmp_path, register):
    with pytest.raises(RecipeError, match=r"steps\[1\]: 'prune_smallest' promises sparsity.*add one of: .*shrink"):
        go(Points(), TRAIN, Prune(), RoundToInt8())(tmp_path)
    register("steps", CompileSparse)
    with pytest.raises(RecipeError, match=r"promises sparsity.*add one of: .*compile_sparse, shrink"):
        go(Points(), TRAIN, Prune())(tmp_path)
    assert not (tmp_path / "out").exists()  # refused before anything was computed


def test_every_problem_of_the_order_is_reported_at_once(tmp_path, register):
    register("steps", RoundToInt8)
    with pytest.raises(RecipeError) as caught:
        go(Points(), Prune(), CompileSparse(), TRAIN, Prune(id="late"))(tmp_path)
    text = str(caught.value)
    assert "'prune_smallest' needs 'trained'" in text
    assert "'compile_sparse' needs 'int8'" in text
    assert "steps that give it: round_to_int8" in text
    assert "'late' promises sparsity" in text
    assert len(caught.value.problems) == 3


def test_the_same_pipeline_as_a_recipe(tmp_path, register):
    register("predictors", Engine)
    register("steps", Prune, RoundToInt8, CompileSparse)
    register("tasks", Points)
    text = """
task: {name: points, spread: 1.0}
meter: {min_seconds: 0, max_seconds: 0.01, memory: false, energy: "off"}
steps:
  - train: {epochs: 2}
  - prune_smallest: {share: 0.5}
  - round_to_int8
  - compile_sparse
"""
    done = run(parse_recipe(text), out=tmp_path / "out")
    assert [row.id for row in done.ledger.rows] == ["train", "prune_smallest", "round_to_int8", "compile_sparse"]
    assert done.ledger.rows[1].config["share"] == 0.5
    with pytest.raises(RecipeError, match=r"<text>:6: prune_smallest: share = 5: .*less than 1"):
        parse_recipe(text.replace("0.5", "5"))


def test_nothing_to_prune_is_no_effect(tmp_path):
    class Bare(Points):
        def default_model(self) -> nn.Module:
            return nn.Bilinear(6, 6, 3)

        def outputs(self, model: Any, batch: Any) -> Any:
            return model(batch[0], batch[0])

        def example_input(self, batch: int = 2) -> tuple[Any, ...]:
            return super().example_input(batch) * 2

    with pytest.raises(NoEffect, match="no linear layer to prune; the model holds Bilinear"):
        go(Bare(), Train(epochs=1), Prune(), RoundToInt8(), CompileSparse())(tmp_path)


def test_a_folder_of_an_unknown_kind_is_refused(tmp_path, register):
    model = Points().default_model()
    Engine.compiled(model, Points()).save(tmp_path / "model")
    with pytest.raises(UnknownName, match="unknown predictor 'sparse_engine'"):
        load(tmp_path / "model")
    with pytest.raises(InvalidValue, match="holds files that are no model"):
        Engine.compiled(model, Points()).save(tmp_path)
