"""The predictor kind "lego": every block's descendants as ONNX graphs, of which one selection is loaded.

Loading one imports no torch. A descendant is on disk once, whatever the selections that use it; its file is mapped, so
that memory holds the loaded ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from sparing.adaptive.lego_runtime import Layout, ScaledNetwork
from sparing.adaptive.scaling import Profile
from sparing.core.clock import in_turns
from sparing.core.errors import CorruptFile, InvalidValue, shown
from sparing.core.predictor.base import Context, Description, Predictor
from sparing.core.predictor.tree import to_numpy

if TYPE_CHECKING:
    from sparing.adaptive.descendants import BlockZoo
    from sparing.core.predictor.folder import Manifest
    from sparing.core.task import Task

SUFFIX = ".onnx.pack"
"""Files that end in ".pack" are mapped into memory instead of read."""
Residency = Literal["memory", "disk"]
Counts = Mapping[str, tuple[int, int, int | None]]
"""Graph → (parameters, those not zero, multiply-accumulates for one sample)."""


def frame_name(piece: int) -> str:
    """The graph of a piece of the frame."""
    return f"frame{piece}"


def block_name(block: int, option: int) -> str:
    """The graph of a descendant."""
    return f"block{block}_{option}"


class _Graph:
    """A session on one graph: arrays in, an array or several out."""

    def __init__(self, content: Any, name: str, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # a network is many sessions: threads of one that wait for work would take it from the next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(
                bytes(content), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # its exceptions have no common base
            raise CorruptFile(f"ONNX Runtime cannot read the graph {name}: {error}") from error
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.name = name

    def __call__(self, *arrays: np.ndarray) -> Any:
        try:
            made = self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:
            shapes = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
            takes = ", ".join(f"{item.type} {item.shape}" for item in self.session.get_inputs())
            raise InvalidValue(f"the graph {self.name} cannot run on {shapes} (it takes {takes}): {error}") from error
        return made[0] if len(made) == 1 else tuple(made)


class LegoPredictor(ScaledNetwork, Predictor):
    """A network of ONNX graphs whose blocks are exchanged while it serves.

    :meth:`choose` loads the most accurate selection within a deadline and a size, :meth:`apply` a given one. Calls may
    come from several threads meanwhile: each is answered by one selection.

    Args:
        graphs: content by name, see :func:`frame_name` and :func:`block_name`.
        layout: how they hang together.
        profile: what each descendant costs and loses.
        counts: parameters and multiply-accumulates of each graph.
        macs_rule: how these were counted.
        current: the selection to load; None: the original blocks.
        residency: "disk" has sessions of the loaded selection only; "memory" of all descendants, so that switching
            takes no time.
    """

    kind: ClassVar[str] = "lego"
    profile: Profile

    def __init__(
        self,
        graphs: Mapping[str, Any],
        layout: Layout,
        profile: Profile,
        task: Context | Task | Predictor | None = None,
        *,
        counts: Counts,
        macs_rule: str = "",
        current: Sequence[int] | None = None,
        residency: Residency = "disk",
        threads: int | None = None,
    ) -> None:
        if residency not in ("memory", "disk"):
            raise InvalidValue(f"residency = {shown(residency)}: 'memory' or 'disk' is needed")
        self.layout, self.profile, self.sizes = layout, profile, profile.bytes
        self.graphs, self.counts, self.macs_rule = dict(graphs), dict(counts), macs_rule
        self.residency: Residency = residency
        self._ready: dict[tuple[int, int], _Graph] = {}
        layout.check()
        blocks, sizes = profile.bytes.shape
        wanted = {frame_name(i) for i, piece in enumerate(layout.pieces) if piece.block is None}
        wanted |= {block_name(b, s) for b in range(blocks) for s in range(sizes)}
        for what, found in (("graphs", self.graphs), ("counts", self.counts)):
            if found.keys() != wanted:
                raise InvalidValue(f"{what}: {sorted(found.keys() ^ wanted)} are missing or too many")
        if layout.blocks != blocks:
            raise InvalidValue(f"the layout has {layout.blocks} blocks, the profile {blocks}")
        self._wanted = tuple(current) if current is not None else (0,) * blocks
        Predictor.__init__(self, task, threads=threads)  # calls set_threads, which makes the sessions

    @classmethod
    def from_zoo(
        cls,
        zoo: BlockZoo,
        profile: Profile,
        example: tuple[Any, ...],
        task: Context | Task | Predictor | None = None,
        **options: Any,
    ) -> Self:
        """Export the frame and every descendant; ``example`` is a tuple of the network's inputs.

        Each graph is compared with its module on two batch sizes, and the original network as a whole. Raises
        :class:`NotExportable`, naming the piece.
        """
        import torch

        from sparing.adaptive.lego import LegoModel
        from sparing.core.errors import NotExportable
        from sparing.core.predictor.onnx import to_onnx
        from sparing.core.predictor.torch_to_onnx import TOLERANCE, batched, difference

        model, inputs = LegoModel(zoo, profile), batched(example)
        values = dict(zip(model.layout.inputs, inputs, strict=True))
        graphs: dict[str, bytes] = {}
        counts: dict[str, tuple[int, int, int | None]] = {}
        rule = ""

        def add(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
            nonlocal rule
            try:
                made = to_onnx(module, arguments)
            except NotExportable as error:
                raise NotExportable(f"{name}: {error}") from error
            about = made.describe()
            graphs[name] = made.content
            counts[name] = (about.parameters or 0, about.nonzero or 0, about.macs)
            rule = about.macs_rule or rule

        with torch.no_grad():
            for number, piece in enumerate(model.layout.pieces):
                arguments = tuple(values[name] for name in piece.inputs)
                # an operation in place must not reach what the next graphs are made with
                given = tuple(argument.clone() for argument in arguments)
                if piece.block is None:
                    module: Callable[..., Any] = model.frame[number]
                    add(frame_name(number), module, given)
                else:
                    for option, descendant in enumerate(zoo.blocks[piece.block]):
                        add(block_name(piece.block, option), descendant, given)
                    module = zoo.blocks[piece.block][0]
                result = module(*(argument.clone() for argument in arguments))
                values.update(zip(piece.outputs, (result,) if len(piece.outputs) == 1 else result, strict=True))
        found = cls(graphs, model.layout, profile, task, counts=counts, macs_rule=rule, **options)
        wanted = found.current
        found.apply([0] * len(wanted))
        difference(found, model, inputs, 10 * TOLERANCE)
        found.apply(wanted)
        return found

    @property
    def runtime(self) -> str:
        """ONNX Runtime, for every piece."""
        return "onnxruntime"

    def set_threads(self, threads: int | None) -> None:
        """Use this many threads from now on; None for the runtime's default."""
        Predictor.set_threads(self, threads)
        wanted = self.current if hasattr(self, "_loaded") else self._wanted
        self._ready = {}
        self.frame = {
            number: _Graph(self.graphs[frame_name(number)], frame_name(number), threads)
            for number, piece in enumerate(self.layout.pieces)
            if piece.block is None
        }
        if self.residency == "memory":
            blocks, sizes = self.sizes.shape
            self._ready = {(b, s): self._session(b, s) for b in range(blocks) for s in range(sizes)}
        self._start(wanted)

    def set_residency(self, residency: Residency) -> None:
        """Keep sessions of all descendants ("memory"), or of the loaded selection only ("disk")."""
        if residency not in ("memory", "disk"):
            raise InvalidValue(f"residency = {shown(residency)}: 'memory' or 'disk' is needed")
        self.residency = residency
        self.set_threads(self.threads)

    def _session(self, block: int, option: int) -> _Graph:
        name = block_name(block, option)
        return _Graph(self.graphs[name], name, self.threads)

    def _fetch(self, block: int, option: int) -> _Graph:
        return self._ready.get((block, option)) or self._session(block, option)

    def __call__(self, *inputs: Any) -> Any:
        """Arrays (or tensors) → arrays; all computed by the selection that was loaded when the call began."""
        return self._run(self._loaded, inputs)

    def _run(self, loaded: Any, inputs: Sequence[Any], seconds: np.ndarray | None = None) -> Any:
        arrays = [np.asarray(to_numpy(item)) for item in inputs]
        arrays = [array.astype(np.float32) if array.dtype == np.float64 else array for array in arrays]
        return super()._run(loaded, arrays, seconds)

    def profile_latency(self, *inputs: Any, runs: int = 100, warmup: int = 10) -> Profile:
        """Time every descendant on this machine, in this runtime, and go by that from now on.

        ``inputs`` is usually one sample. Seconds of ``runs`` calls after ``warmup`` of them (:func:`in_turns
        <sparing.core.clock.in_turns>`), for the descendants of each block on what the original network feeds
        it, and for the original network.
        """
        if runs < 1 or warmup < 0:
            raise InvalidValue(f"runs = {runs}, warmup = {warmup}: at least 1 and 0 are needed")

        blocks, sizes = self.sizes.shape
        reached: dict[int, Any] = {}
        originals = [self._fetch(b, 0) for b in range(blocks)]

        def watched(block: int) -> Callable[[Any], Any]:
            def run(array: Any) -> Any:
                reached[block] = array
                return originals[block](array)

            return run

        loaded = type(self._loaded)((0,) * blocks, tuple(watched(b) for b in range(blocks)))
        self._run(loaded, inputs)
        plain = replace(loaded, blocks=tuple(originals))
        whole = float(in_turns([lambda: self._run(plain, inputs)], runs, warmup)[0])
        seconds = np.zeros((blocks, sizes))
        for b in range(blocks):
            graphs = [originals[b], *(self._fetch(b, s) for s in range(1, sizes))]
            seconds[b] = in_turns([partial(graph, reached[b]) for graph in graphs], runs, warmup)
        saved = 1 - seconds / seconds[:, :1]
        self.profile = replace(self.profile, latency=seconds[:, 0], rel=saved, model_latency=whole)
        return self.profile

    def _loaded_graphs(self) -> list[str]:
        chosen = {block_name(b, s) for b, s in enumerate(self.current)}
        return [name for name in self.graphs if name.startswith("frame") or name in chosen]

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the graphs of the loaded selection and the frame."""
        return sum(len(self.graphs[name]) for name in self._loaded_graphs())

    def describe(self) -> Description:
        """All descendants' parameters and bytes, and the multiply-accumulates of the loaded selection."""
        macs = [self.counts[name][2] for name in self._loaded_graphs()]
        return Description(
            kind=self.kind,
            runtime=self.runtime,
            precision="fp32",
            parameters=sum(count[0] for count in self.counts.values()),
            nonzero=sum(count[1] for count in self.counts.values()),
            macs=None if None in macs else sum(count or 0 for count in macs),
            macs_rule=f"{self.macs_rule}; of the loaded selection" if self.macs_rule else "",
            model_bytes=sum(len(content) for content in self.graphs.values()),
            fetched_bytes=self.loaded_bytes,
        )

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The graphs, each once, and what selections are made by."""
        files = {f"{name}{SUFFIX}": bytes(content) for name, content in self.graphs.items()}
        return files, {
            "layout": self.layout.to_config(),
            "profile": self.profile.to_config(),
            "counts": {name: list(count) for name, count in self.counts.items()},
            "macs_rule": self.macs_rule,
            "current": list(self.current),
            "residency": self.residency,
        }

    @classmethod
    def load_files(cls, files: Mapping[str, Any], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        """Sessions on the verified graphs of the selection that was loaded when it was saved."""
        config = manifest.config
        if config.keys() != {"layout", "profile", "counts", "macs_rule", "current", "residency"}:
            raise CorruptFile(f"a lego predictor's settings are {sorted(config)}")
        for name, content in files.items():
            if not name.endswith(SUFFIX):
                raise CorruptFile(f"{name!r} is no graph of a lego predictor")
            if b"location" in bytes(content):  # the key every reference to external data has
                from sparing.core.predictor.graph import refuse_external

                refuse_external(bytes(content), name)
        try:
            counts = {
                str(name): (int(parameters), int(nonzero), None if macs is None else int(macs))
                for name, (parameters, nonzero, macs) in config["counts"].items()
            }
            return cls(
                {name.removesuffix(SUFFIX): content for name, content in files.items()},
                Layout.from_config(config["layout"]),
                Profile.from_config(config["profile"]),
                manifest.context(),
                counts=counts,
                macs_rule=str(config["macs_rule"]),
                current=config["current"],
                residency=config["residency"],
            )
        except (InvalidValue, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"the settings of a lego predictor do not fit its graphs: {error}") from error


__all__ = ["LegoPredictor", "block_name", "frame_name"]
