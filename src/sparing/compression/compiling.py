"""Compile a trained text encoder for the CPU engine: calibrate, quantise, pack, choose kernels by their times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.compression.pruning import sparsity_of
from sparing.core.errors import IncompatibleStep, NoEffect
from sparing.core.predictor import ModulePredictor, Predictor
from sparing.core.step import Stage, Step, step
from sparing.core.store import JSON, PREDICTOR, All

if TYPE_CHECKING:
    from torch import nn

    from sparing.compression.ptq import PTQReport
    from sparing.core.job import Job
    from sparing.core.task import Task
    from sparing.engine.arithmetic import RangeMethod
    from sparing.engine.predictor import EnginePredictor
    from sparing.models.bert import Bert


def compile_model(
    model: nn.Module,
    task: Task,
    calibration: Any,
    val: Any,
    *,
    max_batch: int = 8,
    max_length: int | None = None,
    kernels: Literal["auto", "sparse", "dense"] = "auto",
    tolerance: float = 0.01,
    method: RangeMethod = "minmax",
    percentile: float = 0.1,
    samples: int = 512,
    exclude: Sequence[str] = (),
) -> tuple[EnginePredictor, PTQReport]:
    """(the task's model in INT8 on the engine, what quantisation did to each layer).

    Args:
        model: a trained :class:`~sparing.models.bert.Bert`; stays as it is.
        task: scores and feeds it.
        calibration: data set that activations' ranges are taken from.
        val: data set by which layers return to floating point; see
            :func:`~sparing.compression.ptq.quantize_ptq` for ``tolerance``, ``method``, ``percentile`` and
            ``exclude``. The engine itself is scored on it as well: where it loses more than the tolerance, attention
            goes to floating point.
        max_batch: sequences that are run at a time.
        max_length: longest input in tokens; None: the model's.
        kernels: see :func:`~sparing.engine.compiler.compile_encoder`.
        samples: how many items of ``calibration`` are used.

    Raises:
        IncompatibleStep: the model is no :class:`~sparing.models.bert.Bert`.
        NoEffect: the model was pruned, but not in blocks that the engine can leave out.
    """
    from sparing.compression.ptq import calibration_inputs, quantize_ptq
    from sparing.engine.compiler import compile_encoder
    from sparing.engine.predictor import EnginePredictor
    from sparing.models.bert import Bert

    if not isinstance(model, Bert):
        raise IncompatibleStep(
            f"the engine runs text encoders (the model bert, or one taken over with from_transformers), not a "
            f"{type(model).__name__}; export it to ONNX and quantise that"
        )
    _check_zeros(model)
    headline, source = task.headline, ModulePredictor(model, task)
    inputs = calibration_inputs(task, model, calibration, samples)

    def score(predictor: Predictor) -> float:
        return float(task.evaluate(predictor, val).metrics[headline.name])

    def made(integer_attention: bool) -> tuple[EnginePredictor, PTQReport]:
        quantised, report = quantize_ptq(
            model,
            inputs,
            method=method,
            percentile=percentile,
            tolerance=tolerance,
            score=lambda candidate: score(ModulePredictor(candidate, task)),
            better=headline.better,
            exclude=exclude,
            integer_attention=integer_attention,
        )
        engine = compile_encoder(quantised, max_batch, max_length or model.max_length, kernels)
        predictor = EnginePredictor(engine, task, source=source.describe())
        return predictor, replace(report, score=score(predictor))

    predictor, report = made(integer_attention=True)
    assert report.score is not None
    assert report.score_float is not None
    loss = report.score_float - report.score if headline.better == "higher" else report.score - report.score_float
    if loss > tolerance * abs(report.score_float):  # what the engine rounds besides: weights of attention
        return made(integer_attention=False)
    return predictor, report


def _check_zeros(model: Bert) -> None:
    """Refuse a pruned model whose zeros the engine could not leave out."""
    from sparing.engine.compiler import SPARSE_FROM

    layers = [name for name, _ in model.named_modules() if name.startswith("blocks.")]
    zeros, blocks = (sparsity_of(model, block, layers) for block in ((1, 1), (4, 1)))
    shares = [
        sum(layer.pruned for layer in found.layers) / sum(layer.blocks for layer in found.layers)
        for found in (zeros, blocks)
    ]
    if shares[0] >= SPARSE_FROM > shares[1]:
        raise NoEffect(
            f"{shares[0]:.0%} of the weights of the encoder are zero, but only {shares[1]:.0%} of their blocks of "
            "4 outputs × 1 input, and the engine leaves out only whole ones: prune with block: [4, 1]"
        )


@step("compile")
class Compile(Step):
    """Compile a text encoder for the CPU engine: INT8, with zeros in 4×1 blocks left out where that is faster.

    Ranges come from the calibration data. Layers return to floating point, the most damaging first, while the loss on
    the validation data is more than ``tolerance``. Kernels are chosen layer by layer, on this machine. The row is
    measured in the engine, and says so; where the engine was not built, ONNX Runtime serves the same INT8 model.
    """

    stage: ClassVar[Stage] = Stage.INFERENCE
    needs: ClassVar[frozenset[str]] = frozenset({"trained", "text_encoder"})
    realises: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    by_clock: ClassVar[bool] = True
    source: ClassVar[str] = "Shen et al. 2022, Fast DistilBERT on CPUs, arXiv:2211.07715; kernels: ours"

    max_batch: int = Field(default=8, ge=1, le=1 << 16)
    """Sequences that are run at a time; larger batches are split. Memory is planned for so many."""
    max_length: int | None = Field(default=None, ge=1, le=1 << 16)
    """Longest input in tokens; longer ones are refused. None: as the model was built."""
    kernels: Literal["auto", "sparse", "dense"] = "auto"
    """"auto": sparse ones where 70 % of the blocks are zero and they win by 5 %; else one kind wherever it can be."""
    tolerance: float = Field(default=0.01, ge=0, lt=1)
    """Accepted loss on the validation data, as a share of the headline metric."""
    method: Literal["minmax", "percentile", "kl"] = "minmax"
    """How calibration turns observed activations into a range."""
    percentile: float = Field(default=0.1, ge=0, lt=50)
    """What the method "percentile" cuts off at each end, in percent of all calibration values."""
    samples: int = Field(default=512, ge=1)
    """Calibration samples, spread evenly over the calibration split."""
    exclude: tuple[str, ...] = ()
    """Patterns of names of layers that stay in floating point, e.g. "blocks.0.*"."""

    def check(self, task: Task) -> None:
        """The engine has no head for masked words."""
        super().check(task)
        if "masked_lm" in task.capabilities:
            raise IncompatibleStep(
                f"the engine has no head that predicts masked words, which {task.name!r} asks for; put a transfer to "
                "the task that is served before compile"
            )

    def apply(self, job: Job) -> Job:
        """The job with an engine predictor; its model stays the one that was compiled."""
        if not isinstance(job.predictor, ModulePredictor) and job.model is None:
            raise IncompatibleStep(f"{self.id!r} compiles a torch module; the job has none")
        found = job.store.once("compiled", lambda: self._compute(job), All({"predictor": PREDICTOR, "report": JSON}))
        report: dict[str, Any] = found["report"]
        job.notes.outcome = report["outcome"]
        job.notes.candidates.extend(report["candidates"])
        job.notes.remarks.extend(report["remarks"])
        for name, value, unit, better in report["figures"]:
            job.record(name, value, unit, how="derived", better=better)
        return job.replace(predictor=found["predictor"])

    def _compute(self, job: Job) -> dict[str, Any]:
        predictor, ptq = compile_model(
            job.fresh_model(),
            job.task,
            job.calibration,
            job.val,
            max_batch=self.max_batch,
            max_length=self.max_length,
            kernels=self.kernels,
            tolerance=self.tolerance,
            method=self.method,
            percentile=self.percentile,
            samples=self.samples,
            exclude=self.exclude,
        )
        about = predictor.engine.describe()
        formats = Counter(layer.format for block in predictor.engine.encoder.blocks for layer in block.values())
        layers = ", ".join(f"{count} × {form}" for form, count in sorted(formats.items()))
        figures = [("layers in float", len(ptq.in_float), "layers", "lower")]
        if plan := predictor.engine.memory_plan:
            figures.append(("workspace of the engine", plan.nbytes, "B", "lower"))
        return {
            "predictor": predictor,
            "report": {
                "outcome": f"{about['kind']}: {layers}",
                "candidates": [entry for timing in about["timings"] for entry in _candidates(timing)],
                "remarks": [f"{about['kind']} runs it: {about['reason']}", str(ptq)],
                "figures": figures,
            },
        }


def _candidates(timing: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry for each kernel that was timed on a layer."""
    return [
        {
            "name": f"{timing['layer']}, {kernel}",
            "block sparsity": timing["block_sparsity"],
            **{f"ms at {count} tokens": ms for count, ms in zip(timing["tokens"], values, strict=True)},
            "chosen": kernel == timing["chosen"],
        }
        for kernel, values in timing["milliseconds"].items()
    ]
