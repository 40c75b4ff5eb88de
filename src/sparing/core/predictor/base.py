"""What every predictor is: callable on arrays, describable, savable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sparing.core.errors import InvalidValue
from sparing.core.predictor.preprocessing import Operation, Preprocessing

if TYPE_CHECKING:
    from sparing.core.predictor.folder import Manifest
    from sparing.core.task import Task


@dataclass(frozen=True)
class Description:
    """What a predictor is made of, as figures. JSON-able."""

    kind: str
    runtime: str
    """What runs it: "torch", "onnxruntime", …"""
    precision: str
    """Number format of weights and activations, e.g. "fp32", "int8 (QDQ static, per channel)"."""
    parameters: int | None
    """Trained numbers the predictor holds; a tied tensor counts once."""
    nonzero: int | None
    """Those of them that are not zero."""
    macs: int | None
    """Multiply-accumulates for one sample; None when unknown."""
    macs_rule: str
    """How the multiply-accumulates were counted."""
    model_bytes: int
    """Bytes of the saved payload files: all that is needed to answer."""
    layers: tuple[dict[str, Any], ...] = ()
    """Per layer, where known: {"name", "type", "parameters", …}."""
    fetched_bytes: int | None = None
    """Bytes of the payload that one answer reads; None: all."""
    accumulates: int | None = None
    """Additions for one sample that take the place of multiply-accumulates, as spikes allow; None: there are none."""

    def counting(self, operations: Operations | None) -> Description:
        """The same with these operations, where there are any, in place of its own count."""
        if operations is None:
            return self
        return replace(self, macs=operations.macs, accumulates=operations.accumulates, macs_rule=operations.rule)


@dataclass(frozen=True)
class Operations:
    """What one sample costs where that depends on the data, measured on some."""

    macs: int
    accumulates: int
    """Additions that take the place of multiply-accumulates."""
    rule: str
    """How both were counted, and on what."""


@dataclass(frozen=True)
class Context:
    """What a model's users need besides its numbers; it stays the same through export and quantisation."""

    task: str = ""
    """The task's name."""
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    postprocessing: Operation | None = None
    """What makes answers of the model's outputs, where these are not answers yet."""

    @classmethod
    def of(cls, source: Context | Task | Predictor | None) -> Context:
        """The context of a task or of another predictor; an empty one for None."""
        if source is None:
            return cls()
        if isinstance(source, Context):
            return source
        if isinstance(source, Predictor):
            return source.context
        return cls(source.name, tuple(source.labels), source.preprocessing, source.postprocessing)


class Predictor(ABC):
    """The deployable thing: a callable from arrays to arrays, free of training code.

    Subclasses set ``kind`` (their registered name) and define :meth:`__call__`, :meth:`payload`, :meth:`load_files`,
    :meth:`describe` and ``runtime``.
    """

    kind: ClassVar[str]

    def __init__(self, task: Context | Task | Predictor | None = None, *, threads: int | None = None) -> None:
        """``task``: where name, labels and preprocessing come from. ``threads``: None for the runtime's default."""
        self.context = Context.of(task)
        self.attachments: dict[str, bytes] = {}
        """Further files of the saved folder, e.g. an outgoing ``model.pt2``: hashed, never opened, no model bytes."""
        self.threads: int | None = None
        self.set_threads(threads)

    @property
    @abstractmethod
    def runtime(self) -> str:
        """What runs this predictor, e.g. "torch" or "onnxruntime"."""

    @abstractmethod
    def __call__(self, *inputs: Any) -> Any:
        """Model inputs (arrays, or trees of arrays) → an array or a tree of arrays."""

    @abstractmethod
    def describe(self) -> Description:
        """Sizes and counts of this predictor."""

    def operations_on(self, task: Task, split: Any) -> Operations | None:
        """Operations of one sample of a split, where they depend on the data; None: :meth:`describe` has them."""
        return None

    @abstractmethod
    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """(file name → content, JSON-able settings): all that :meth:`load_files` needs to answer the same again."""

    @classmethod
    @abstractmethod
    def load_files(cls, files: Mapping[str, Any], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        """The predictor made of :meth:`payload`'s files and ``manifest.config``, both already verified.

        A file's content is its bytes; that of a file whose name ends in ".pack" is a read-only memoryview of the file
        mapped into memory. ``trust`` lists packages whose classes may be imported.
        """

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, where the task has them."""
        return self.context.labels

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What turns raw inputs into model inputs."""
        return self.context.preprocessing

    def predict(self, raws: Sequence[Any]) -> Any:
        """Raw inputs, as the task's files hold them → the answers: the model's outputs, after any postprocessing."""
        if self.preprocessing is None:
            raise InvalidValue("this predictor was saved without preprocessing; call it with model inputs instead")
        outputs = self(self.preprocessing(raws))
        return outputs if self.context.postprocessing is None else self.context.postprocessing(outputs)

    def set_threads(self, threads: int | None) -> None:
        """Use this many threads from now on; None for the runtime's default."""
        if threads is not None and threads < 1:
            raise InvalidValue(f"threads = {threads}; at least 1 is needed, or None for the runtime's default")
        self.threads = threads

    def save(self, folder: Path | str, *, ledger: str = "") -> Path:
        """Put this predictor into ``folder`` (new, empty, or an older model folder, which it replaces).

        ``ledger`` is text for the model card: what the steps that made the model saved and lost.
        """
        from sparing.core.predictor.folder import save

        return save(self, Path(folder), ledger=ledger)
