"""Engines: compiled encoders that answer batches of token numbers."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue, UnsupportedISA, shown
from sparing.engine import native
from sparing.engine import pack as packs
from sparing.engine.native import choose_path
from sparing.engine.pack import Encoder, Manifest, Pack
from sparing.engine.program import GROUP, MemoryPlan, Program, padded_tokens

if TYPE_CHECKING:
    from torch import nn


class OperatorTime(NamedTuple):
    """What one operator took, in seconds for each call."""

    name: str
    seconds: float


class Batch(NamedTuple):
    """A checked input: arrays (N, T)."""

    ids: np.ndarray
    keep: np.ndarray
    segments: np.ndarray | None

    def part(self, first: int, last: int) -> Batch:
        """Some of its sequences."""
        types = None if self.segments is None else self.segments[first:last]
        return Batch(self.ids[first:last], self.keep[first:last], types)


class Engine(ABC):
    """A compiled encoder for at most ``max_length`` tokens.

    ``run`` answers any number of sequences, ``max_batch`` at a time. An engine serves one thread at a time; threads
    wait for each other. :meth:`instance` makes another over the same weights.
    """

    kind: ClassVar[str]
    """What runs: "native", "onnxruntime" or "torch"."""

    def __init__(self, manifest: Manifest, reason: str) -> None:
        self.manifest, self.reason = manifest, reason
        self.max_batch, self.max_length = manifest.max_batch, manifest.max_length
        self._lock = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        """Sizes and head of the model."""
        return self.manifest.encoder

    def run(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> np.ndarray:
        """The head's output, float32: (N, outputs), or (N, T, outputs) for the heads "span" and "tokens".

        There, what stands behind a sequence's last kept token is zero.

        Args:
            input_ids: whole numbers (N, T), T ≤ max_length: an array, a tensor or nested lists.
            attention_mask: 1 where a token may be attended to, else 0; None: all but the padding token.
            token_type_ids: None: 1 behind the first separator, if the model knows types.

        Raises:
            InvalidValue: for shapes, dtypes, lengths and token numbers that are not allowed, or a sequence without a
                token to attend to.
        """
        batch = self._checked(input_ids, attention_mask, token_type_ids)
        with self._lock:
            parts = [
                self._answer(batch.part(at, at + self.max_batch)) for at in range(0, len(batch.ids), self.max_batch)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    __call__ = run

    def _checked(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Batch:
        about = self.encoder
        ids = _whole_numbers(input_ids, "input_ids")
        if ids.ndim != 2 or 0 in ids.shape:
            raise InvalidValue(f"input_ids must be of shape (sequences, tokens), not {list(ids.shape)}")
        if ids.shape[1] > self.max_length:
            raise InvalidValue(f"input_ids are {ids.shape[1]} tokens long; this engine takes at most {self.max_length}")
        low, high = ids.min(), ids.max()
        if low < 0 or high >= about.vocabulary:
            wrong = ids[(ids < 0) | (ids >= about.vocabulary)][0]
            raise InvalidValue(f"input_ids hold {wrong}; token numbers are 0…{about.vocabulary - 1}")
        if attention_mask is None:
            keep = ids != about.pad_id
        else:
            mask = _whole_numbers(attention_mask, "attention_mask")
            if mask.shape != ids.shape:
                raise InvalidValue(f"attention_mask has shape {list(mask.shape)}, input_ids have {list(ids.shape)}")
            keep = mask != 0
            if not np.array_equal(keep, mask):
                raise InvalidValue("attention_mask must hold zeros and ones")
        empty = ~keep.any(axis=1)
        if empty.any():
            raise InvalidValue(f"sequence {int(empty.argmax())} has no token to attend to; at least one is needed")
        return Batch(ids, keep, self._types(ids, token_type_ids))

    def _types(self, ids: np.ndarray, token_type_ids: Any) -> np.ndarray | None:
        about = self.encoder
        if token_type_ids is None:
            if not about.segments:
                return None
            separators = ids == about.sep_id
            behind = (np.cumsum(separators, axis=1) > separators) & (ids != about.pad_id)
            return np.minimum(behind, about.segments - 1).astype(np.int32)
        types = _whole_numbers(token_type_ids, "token_type_ids")
        if types.shape != ids.shape:
            raise InvalidValue(f"token_type_ids have shape {list(types.shape)}, input_ids have {list(ids.shape)}")
        if types.min() < 0 or types.max() >= max(about.segments, 1):
            raise InvalidValue(f"token_type_ids must be in 0…{max(about.segments, 1) - 1}, not {types.max()}")
        return types.astype(np.int32) if about.segments else None

    @abstractmethod
    def _answer(self, batch: Batch) -> np.ndarray: ...

    @abstractmethod
    def instance(self) -> Engine:
        """Another engine over the same weights, with a workspace of its own."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The file's content."""

    def save(self, path: str | Path) -> Path:
        """Write the engine to a file, whole or not at all."""
        files.write_atomic(Path(path), self.to_bytes())
        return Path(path)

    @staticmethod
    def load(source: str | Path | bytes | bytearray | memoryview, isa: str | None = None) -> Engine:
        """An engine from a file, which is mapped and so shared by all processes that load it, or from its bytes.

        ``isa``: the instruction path; None: what SPARING_ENGINE_ISA names, else the fastest the pack and this CPU have.

        Raises:
            CorruptFile: for a file that is not exactly what was written.
            UnsupportedISA: for a path that does not run here.
        """
        pack = packs.read(Path(source) if isinstance(source, str | Path) else source)
        if pack.manifest.kind == "onnx":
            return OnnxEngine(pack, "the pack holds an ONNX graph")
        return NativeEngine(pack, path_for(pack.manifest, isa), "loaded from a pack")

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """Where the buffers of a call lie; None where another runtime decides that."""
        return None

    def profile(self, batch: int | None = None, length: int | None = None, repetitions: int = 10) -> list[OperatorTime]:
        """Mean time of each operator in order, for ``batch`` sequences of ``length`` tokens; default: the maxima."""
        raise InvalidValue(f"an engine of kind {self.kind!r} has no times of single operators")

    def describe(self) -> dict[str, Any]:
        """What runs and why, as JSON values."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "max_batch": self.max_batch,
            "max_length": self.max_length,
            "timings": list(self.manifest.timings),
        }


def _whole_numbers(value: Any, name: str) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidValue(f"{name} must be rectangular: {error}") from error
    if array.dtype.kind not in "iub":
        raise InvalidValue(f"{name} must be whole numbers, not {array.dtype}: {shown(value)}")
    return array


def path_for(manifest: Manifest, isa: str | None = None) -> str:
    """The instruction path for a pack: the one asked for, else the fastest that this CPU and the pack's forms allow."""
    path = choose_path(isa)
    forms = {layer.format for block in manifest.encoder.blocks for layer in block.values()}
    if path == "amx" and "4x1" in forms and (isa or os.environ.get(native.VARIABLE)) is None:
        return "vnni"  # tiles of weights were not the fastest where, or when, this was compiled
    if path == "amx" and "4x1" in forms:
        raise UnsupportedISA("the path 'amx' cannot run this pack: it has sparse layers without the tile form")
    return path


class NativeEngine(Engine):
    """The engine proper: fused operators in native code over one planned workspace."""

    kind = "native"

    def __init__(self, pack: Pack, path: str, reason: str) -> None:
        super().__init__(pack.manifest, reason)
        self.pack, self.isa = pack, path
        self.program = Program(pack, path)

    @property
    def memory_plan(self) -> MemoryPlan:
        """Where the buffers of a call lie, for the largest batch."""
        return self.program.plan

    def _answer(self, batch: Batch) -> np.ndarray:
        about = self.encoder
        count, length = batch.ids.shape
        counts = (length - np.argmax(batch.keep[:, ::-1], axis=1)).astype(np.int32)
        padded = -(-counts // GROUP) * GROUP
        starts = (np.cumsum(padded) - padded).astype(np.int32)
        total = int(padded.sum())
        if about.position_offset:  # counted over tokens, from the offset; padding has the place before
            positions = np.cumsum(batch.keep, axis=1) * batch.keep + about.position_offset - 1
        else:
            positions = np.broadcast_to(np.arange(length), batch.ids.shape)
        columns = [batch.ids, positions, batch.keep]
        if batch.segments is not None:
            columns.append(batch.segments)
        flat = [_flat(column, counts, starts, total) for column in columns]
        keep = flat[2].astype(np.uint8)
        per_token = about.head in ("span", "tokens")
        output = np.zeros((count, length, about.outputs) if per_token else (count, about.outputs), dtype=np.float32)
        call = native.Run(
            batch=count,
            tokens=total,
            length=length,
            outputs=about.outputs,
            start=starts.ctypes.data,
            count=counts.ctypes.data,
            ids=flat[0].ctypes.data,
            position=flat[1].ctypes.data,
            segment=flat[3].ctypes.data if batch.segments is not None else None,
            keep=keep.ctypes.data,
            output=output.ctypes.data,
        )
        assert total <= padded_tokens(self.max_batch, self.max_length, self.isa)
        self.program.run(call)
        return output

    def instance(self) -> NativeEngine:
        """Another engine over the same weights, with a workspace of its own."""
        return NativeEngine(self.pack, self.isa, self.reason)

    def to_bytes(self) -> bytes:
        """The file's content."""
        return packs.to_bytes(self.manifest, self.pack.arrays)

    def profile(self, batch: int | None = None, length: int | None = None, repetitions: int = 10) -> list[OperatorTime]:
        """Mean time of each operator in order, for ``batch`` sequences of ``length`` tokens; default: the maxima."""
        if repetitions < 1:
            raise InvalidValue(f"repetitions must be at least 1, not {repetitions}")
        ids = example_ids(self.encoder, batch or self.max_batch, length or self.max_length)
        self.run(ids)
        with self._lock:
            self.program.seconds()
            self.program.profiling = True
        try:
            for _ in range(repetitions):
                self.run(ids)
        finally:
            self.program.profiling = False
        times = self.program.seconds()
        return [
            OperatorTime(step.name, seconds / repetitions)
            for step, seconds in zip(self.program.steps, times, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """What runs and why, as JSON values."""
        formats = {
            f"{number}.{name}": layer.format
            for number, block in enumerate(self.encoder.blocks)
            for name, layer in block.items()
        }
        return super().describe() | {
            "isa": self.isa,
            "layers": formats,
            "weights_bytes": self.pack.nbytes,
            "workspace_bytes": self.program.plan.nbytes,
        }


def _flat(values: np.ndarray, counts: np.ndarray, starts: np.ndarray, total: int) -> np.ndarray:
    """Rows (N, T) behind each other, each from its start; zeros between."""
    made = np.zeros(total, dtype=np.int32)
    if (counts == counts[0]).all():
        made.reshape(len(counts), -1)[:, : counts[0]] = values[:, : counts[0]]
    else:
        for row, start, count in zip(values, starts, counts, strict=True):
            made[start : start + count] = row[:count]
    return made


def example_ids(encoder: Encoder, batch: int, length: int) -> np.ndarray:
    """Token numbers (batch, length) without padding, spread over the vocabulary."""
    ids = (np.arange(batch * length, dtype=np.int64) * 7919 + 11) % encoder.vocabulary
    return np.where(ids == encoder.pad_id, (encoder.pad_id + 1) % encoder.vocabulary, ids).reshape(batch, length)


class OnnxEngine(Engine):
    """The same INT8 model through ONNX Runtime, where the native library is missing or the model is all float."""

    kind = "onnxruntime"

    def __init__(self, pack: Pack, reason: str) -> None:
        super().__init__(pack.manifest, reason)
        import onnxruntime

        self.pack = pack
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # without VNNI the runtime would otherwise add pairs of products in 16 bits, which can overflow
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                pack.arrays["onnx"].tobytes(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # the runtime's own exceptions have no common base of ours
            raise CorruptFile(f"ONNX Runtime cannot run the pack's graph: {str(error).splitlines()[0]}") from error

    def _answer(self, batch: Batch) -> np.ndarray:
        feeds = {"ids": batch.ids.astype(np.int64), "keep": batch.keep}
        if self.encoder.segments:
            assert batch.segments is not None
            feeds["segments"] = batch.segments.astype(np.int64)
        return _zero_behind(self._session.run(None, feeds)[0], batch.keep, self.encoder.head)

    def instance(self) -> OnnxEngine:
        """Another session over the same graph."""
        return OnnxEngine(self.pack, self.reason)

    def to_bytes(self) -> bytes:
        """The file's content."""
        return packs.to_bytes(self.manifest, self.pack.arrays)


class TorchEngine(Engine):
    """The model as it is, in torch: to compare with."""

    kind = "torch"

    def __init__(self, module: nn.Module, manifest: Manifest, reason: str) -> None:
        super().__init__(manifest, reason)
        self._module = module

    def _answer(self, batch: Batch) -> np.ndarray:
        import torch

        inputs: Sequence[Any] = (torch.from_numpy(batch.ids.astype(np.int64)), torch.from_numpy(batch.keep))
        if batch.segments is not None:
            inputs = (*inputs, torch.from_numpy(batch.segments.astype(np.int64)))
        with torch.inference_mode():
            return _zero_behind(self._module(*inputs).numpy(), batch.keep, self.encoder.head)

    def instance(self) -> TorchEngine:
        """The same module; torch takes several threads at a time."""
        return TorchEngine(self._module, self.manifest, self.reason)

    def to_bytes(self) -> bytes:
        """Refused: torch's own formats keep a module."""
        raise InvalidValue("an engine of kind 'torch' has no file; compile with engine='auto' to save one")


def _zero_behind(output: np.ndarray, keep: np.ndarray, head: str) -> np.ndarray:
    """Outputs of tokens that stand behind the last kept one become zero."""
    if head not in ("span", "tokens"):
        return output
    last = keep.shape[1] - np.argmax(keep[:, ::-1], axis=1)
    return np.where((np.arange(keep.shape[1]) < last[:, None])[:, :, None], output, np.float32(0))
