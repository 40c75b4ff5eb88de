"""The predictor kind "engine": a compiled encoder in a model folder. Loading one imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from sparing.core.errors import CorruptFile, InvalidValue
from sparing.core.predictor.base import Context, Description, Predictor
from sparing.core.predictor.tree import to_numpy
from sparing.engine.runtime import Engine, NativeEngine, OnnxEngine

if TYPE_CHECKING:
    from sparing.core.predictor.folder import Manifest
    from sparing.core.task import Task

PACK = "model.pack"


class EnginePredictor(Predictor):
    """An :class:`~sparing.engine.runtime.Engine` on token numbers (N, T), padded behind, to the head's output.

    ``source`` describes the model that was compiled: its parameters and multiply-accumulates are the engine's. With
    several threads the sequences of a call are shared among them; one sequence is one thread's work. Each thread has a
    workspace of its own, all have the same weights.
    """

    kind: ClassVar[str] = "engine"

    def __init__(
        self,
        engine: Engine,
        task: Context | Task | Predictor | None = None,
        *,
        source: Description,
        threads: int | None = None,
    ) -> None:
        if not isinstance(engine, NativeEngine | OnnxEngine):
            raise InvalidValue(f"an engine of kind {engine.kind!r} has no file; compile with engine='auto'")
        self.engine = engine
        self._instances: list[Engine] = [engine]
        self._source = source
        super().__init__(task, threads=threads)

    @property
    def runtime(self) -> str:
        """ "sparing" for native code, else what serves in its place."""
        return "sparing" if self.engine.kind == "native" else self.engine.kind

    def set_threads(self, threads: int | None) -> None:
        """Use this many threads from now on; None: one."""
        super().set_threads(threads)
        wanted = threads or 1
        while len(self._instances) < wanted:
            self._instances.append(self.engine.instance())
        del self._instances[wanted:]

    def __call__(self, *inputs: Any) -> np.ndarray:
        """Token numbers (N, T) → float32 (N, outputs), or (N, T, outputs) for a head that answers for each token."""
        if len(inputs) != 1:
            raise InvalidValue(f"{len(inputs)} inputs; the engine takes one, token numbers (N, T)")
        ids = np.asarray(to_numpy(inputs[0]))
        if len(self._instances) == 1 or ids.ndim != 2 or len(ids) < 2:
            return self.engine.run(ids)
        parts = np.array_split(ids, min(len(ids), len(self._instances)))
        with ThreadPoolExecutor(len(parts)) as pool:
            answers = list(pool.map(lambda engine, part: engine.run(part), self._instances, parts))
        return np.concatenate(answers)

    def describe(self) -> Description:
        """The compiled model's counts, the engine's formats and bytes."""
        return replace(
            self._source,
            kind=self.kind,
            runtime=self.runtime,
            precision=_precision(self.engine),
            model_bytes=self.engine.pack.nbytes,
        )

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The pack; it holds all that the engine needs."""
        return {PACK: self.engine.to_bytes()}, {}

    @classmethod
    def load_files(cls, files: Mapping[str, Any], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        """An engine over the mapped pack, which all processes that load the folder share."""
        if set(files) != {PACK} or manifest.config:
            raise CorruptFile(f"an engine predictor needs {PACK} and no settings")
        return cls(Engine.load(files[PACK]), manifest.context(), source=manifest.description)


def _precision(engine: Engine) -> str:
    layers = [layer for block in engine.encoder.blocks for layer in block.values()]
    formats = [layer.format for layer in layers]
    floats = formats.count("float")
    sparse = sum(form in ("4x1", "tiles") for form in formats)
    if floats == len(formats):
        return "fp32"
    text = f"int8 (static, per channel; 4×1 blocks in {sparse} of {len(formats)} layers)"
    return text if not floats else f"{text} + fp32 ({floats} layers)"
