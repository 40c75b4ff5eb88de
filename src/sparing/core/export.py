"""The step ``export``: the model as a file for another runtime."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from sparing.core.errors import IncompatibleStep, NoEffect, NotExportable
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from sparing.core.job import Job
    from sparing.core.predictor import ModulePredictor

PT2 = "model.pt2"


def torch_export(predictor: ModulePredictor, tolerance: float) -> tuple[bytes, float]:
    """(``torch.export`` file with a dynamic batch, largest difference from the module); checked on two batch sizes.

    Raises :class:`NotExportable` with the reason.
    """
    import torch

    from sparing.core.predictor.module import baked
    from sparing.core.predictor.torch_to_onnx import batched, difference, more, quiet, reason
    from sparing.core.predictor.tree import map_leaves

    if predictor.example is None:
        raise NotExportable("exporting needs an example input, which the predictor was not made with")
    inputs = batched(predictor.example)
    module = baked(predictor.model).cpu().eval()
    batch = torch.export.Dim("batch")
    try:
        with quiet():
            program = torch.export.export(
                module, inputs, dynamic_shapes=tuple(map_leaves(lambda _: {0: batch}, item) for item in inputs)
            )
            gap = max(difference(program.module(), module, example, tolerance) for example in (inputs, more(inputs)))
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
    except Exception as error:  # torch.export raises anything
        raise NotExportable(f"{type(predictor.model).__name__} cannot be exported: {reason(error)}") from error
    return buffer.getvalue(), gap


@step("export")
class Export(Step):
    """Write the model for another runtime: an ONNX graph, or a ``torch.export`` file beside the model.

    "onnx" makes the predictor an ONNX graph. "torch_export" keeps the predictor and adds ``model.pt2`` to its folder;
    it is written for others and never opened by Sparing, since opening one can run code. Either is compared with the
    module on two batch sizes before it counts.
    """

    stage: ClassVar[Stage] = Stage.INFERENCE
    needs: ClassVar[frozenset[str]] = frozenset({"trained"})
    source: ClassVar[str] = "ours"

    format: Literal["onnx", "torch_export"] = "onnx"
    """What to write."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Largest accepted difference from the module's outputs, relative to the largest of them."""

    def apply(self, job: Job) -> Job:
        """The job with the exported predictor."""
        from sparing.core.predictor import ModulePredictor, to_onnx
        from sparing.core.store import ARRAYS, JSON, PREDICTOR, All

        predictor = job.predictor
        if not isinstance(predictor, ModulePredictor):
            kind = "none yet" if predictor is None else f"one of kind {predictor.kind!r}"
            if self.format == "onnx" and predictor is not None and predictor.kind == "onnx":
                raise NoEffect(f"{self.id!r}: the predictor is an ONNX graph already")
            raise IncompatibleStep(f"{self.id!r} exports a module predictor; the job has {kind}")
        if self.format == "onnx":
            exported = job.store.once(
                "onnx", lambda: to_onnx(predictor, task=job.task, tolerance=self.tolerance), PREDICTOR
            )
            job.record("largest difference from the module", exported.origin["max_abs_diff"], "")
            return job.replace(predictor=exported)

        def compute() -> dict[str, Any]:
            content, gap = torch_export(ModulePredictor(predictor.model, job.task), self.tolerance)
            return {"file": {"pt2": np.frombuffer(content, dtype=np.uint8)}, "gap": gap}

        found = job.store.once("torch_export", compute, All({"file": ARRAYS, "gap": JSON}))
        content = np.asarray(found["file"]["pt2"], dtype=np.uint8).tobytes()
        carrying = ModulePredictor(predictor.model, job.task)
        carrying.attachments = predictor.attachments | {PT2: content}
        job.record("largest difference from the module", found["gap"], "")
        job.record(f"{PT2} bytes", len(content), "B")
        return job.replace(predictor=carrying)
