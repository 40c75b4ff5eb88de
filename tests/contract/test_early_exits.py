"""Guest: early exits over an INT8 predictor: a predictor made of several ONNX stages, saved and loaded as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from harness import Points, go, survives_kills
from pydantic import Field
from torch import Tensor, nn

from sparing.core.errors import CorruptFile, NoEffect, RecipeError
from sparing.core.job import Job
from sparing.core.predictor import (
    Description,
    Manifest,
    OnnxPredictor,
    Predictor,
    build_model,
    load,
    nest,
    to_onnx,
    unnest,
)
from sparing.core.predictor.tree import to_numpy
from sparing.core.step import Stage, Step, step
from sparing.core.store import PREDICTOR
from sparing.core.training import Train


class Staged(nn.Module):
    """A trunk with a head after each of its two stages: (N, inputs) → logits (N, classes) of the last head."""

    capabilities = frozenset({"ordered_stages"})

    def __init__(self, inputs: int = 6, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)])
        self.heads = nn.ModuleList([nn.Linear(hidden, classes), nn.Linear(hidden, classes)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stages[0](x).relu()
        return self.heads[1](self.stages[1](hidden).relu()) + self.heads[0](hidden)


class Stage0(nn.Module):
    """x → (hidden, first logits)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stage, self.head = model.stages[0], model.heads[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stage(x).relu()
        return hidden, self.head(hidden)


class Stage1(nn.Module):
    """(hidden, first logits) → last logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stage, self.head = model.stages[1], model.heads[1]

    def forward(self, hidden: Tensor, first: Tensor) -> Tensor:
        return self.head(self.stage(hidden).relu()) + first


def int8(predictor: OnnxPredictor, folder: Any) -> OnnxPredictor:
    """Dynamic quantisation of the graph's matrix products by ONNX Runtime."""
    from onnxruntime.quantization import quantize_dynamic

    source, target = folder / "fp32.onnx", folder / "int8.onnx"
    source.write_bytes(predictor.content)
    quantize_dynamic(source, target)
    return predictor.with_graph(target.read_bytes(), precision="int8 (dynamic)")


class Exits(Predictor):
    """Answers with the first stage where it is sure, with the second elsewhere."""

    kind: ClassVar[str] = "exits"

    def __init__(self, parts: Mapping[str, Predictor], threshold: float, task: Any = None) -> None:
        self.parts, self.threshold = dict(parts), threshold
        super().__init__(task)

    @property
    def runtime(self) -> str:
        return self.parts["stage0"].runtime

    def set_threads(self, threads: int | None) -> None:
        super().set_threads(threads)
        for part in self.parts.values():
            part.set_threads(threads)

    def __call__(self, *inputs: Any) -> Any:
        hidden, logits = self.parts["stage0"](*(to_numpy(value) for value in inputs))
        margin = np.sort(logits, 1)[:, -1] - np.sort(logits, 1)[:, -2]
        unsure = margin < self.threshold
        logits = logits.copy()
        if unsure.any():
            logits[unsure] = self.parts["stage1"](hidden[unsure], logits[unsure])
        return logits

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        content, manifests = nest(self.parts)
        return content, {"parts": manifests, "threshold": self.threshold}

    @classmethod
    def load_files(cls, files: Mapping[str, bytes], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        return cls(unnest(files, manifest.config["parts"], trust), manifest.config["threshold"], manifest.context())

    def describe(self) -> Description:
        inside = [part.describe() for part in self.parts.values()]
        return Description(
            kind=self.kind,
            runtime=self.runtime,
            precision=inside[0].precision,
            parameters=sum(d.parameters or 0 for d in inside),
            nonzero=sum(d.nonzero or 0 for d in inside),
            macs=None,
            macs_rule="depends on the input",
            model_bytes=sum(d.model_bytes for d in inside),
        )


@step("exits_int8")
class ExitsInt8(Step):
    """Cut the model after its first stage, quantise both parts, and stop where the first is sure."""

    stage = Stage.INFERENCE
    needs = frozenset({"trained", "ordered_stages"})

    threshold: float = Field(2.0, ge=0)

    def apply(self, job: Job) -> Job:
        made: Exits = job.store.once("exits", lambda: self.build(job), PREDICTOR)
        share = np.mean([self.stops(made, x) for x, _ in job.val])
        if share == 0:
            raise NoEffect(f"none of {len(job.val)} validation samples has a margin of {self.threshold} at the exit")
        job.record("stopped early", float(share), "", "measured", "higher")
        return job.replace(predictor=made)

    def stops(self, made: Exits, x: Tensor) -> bool:
        top = np.sort(made.parts["stage0"](x[None].numpy())[1][0])
        return bool(top[-1] - top[-2] >= self.threshold)

    def build(self, job: Job) -> Exits:
        import tempfile
        from pathlib import Path

        example = tuple(value for value in job.task.example_input())
        with tempfile.TemporaryDirectory() as folder:
            with torch.no_grad():
                model = job.fresh_model().eval()
                middle = Stage0(model)(*example)
            parts = {
                "stage0": int8(to_onnx(Stage0(model), example), Path(folder)),
                "stage1": int8(to_onnx(Stage1(model), middle), Path(folder)),
            }
        return Exits(parts, self.threshold, job.task)


class StagedPoints(Points):
    """Points for a model with two stages."""

    name = "staged_points"

    def default_model(self) -> nn.Module:
        return build_model(Staged)


TRAIN = Train(epochs=6, batch_size=16, lr=0.02)


def test_a_predictor_of_predictors_is_measured_saved_and_survives_kills(tmp_path, register):
    register("predictors", Exits)
    done = survives_kills(go(StagedPoints(), TRAIN, ExitsInt8()), tmp_path)
    row = done.ledger.rows[-1]
    assert (row.kind, row.runtime) == ("exits", "onnxruntime")
    assert 0 < row.figures["stopped early"].value < 1
    again = load(done.folder / "model")
    assert isinstance(again, Exits)
    assert set(again.parts) == {"stage0", "stage1"}
    assert again.labels == ("a", "b", "c")
    assert row.figures["model bytes"].value == sum(
        path.stat().st_size for path in (done.folder / "model").rglob("*.onnx")
    )  # everything it needs to answer counts
    assert row.figures["parameters"].value == done.ledger.rows[0].figures["parameters"].value  # scales are none
    x = StagedPoints().part(40, 9).tensors[0]
    np.testing.assert_array_equal(again(x), done.predictor(x))


def test_every_part_is_verified_on_loading(tmp_path, register):
    register("predictors", Exits)
    done = go(StagedPoints(), TRAIN, ExitsInt8())(tmp_path)
    graph = done.folder / "model" / "stage1" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"stage1/model\.onnx was changed"):
        load(done.folder / "model")


def test_refused_for_a_model_without_stages_and_where_no_sample_stops(tmp_path, register):
    register("predictors", Exits)
    with pytest.raises(RecipeError, match="'exits_int8' needs 'ordered_stages'"):
        go(Points(), TRAIN, ExitsInt8())(tmp_path / "a")
    with pytest.raises(RecipeError, match=r"'exits_int8' needs 'trained'.*steps that give it:.*train"):
        go(StagedPoints(), ExitsInt8())(tmp_path / "b")
    with pytest.raises(NoEffect, match="none of 24 validation samples"):
        go(StagedPoints(), TRAIN, ExitsInt8(threshold=1e9))(tmp_path / "c")
