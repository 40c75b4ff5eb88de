"""Condensed sets on disk: a folder with tensors (safetensors) and a description (JSON), which tell all that is known.

``tensors.safetensors`` holds the data; ``condensed.json`` their kind, labels, provenance (settings, seeds, losses,
cost, environment) and the SHA-256 of the tensors' file, without which they are not read. Distilled images (DD) are kept
with the steps they were learned for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor
from torch.utils.data import TensorDataset

from sparing.condensation.callbacks import MARK, is_marked, marked
from sparing.condensation.unrolled import LearnedSteps
from sparing.core.environment import environment
from sparing.core.errors import CorruptFile, InvalidValue
from sparing.core.files import folder_atomic, read_json, read_tensors, sha256_of, write_json, write_tensors
from sparing.data.graphs import PackedGraphs, graph_data

if TYPE_CHECKING:
    from torch_geometric.data import Data

FORMAT = 1
TENSORS, DESCRIPTION = "tensors.safetensors", "condensed.json"
Kind = Literal["graphs", "node_graph", "images"]
NODE_GRAPH = ("x", "edge_index", "edge_weight", "y")
RATES, INITIAL = "learning_rates", "initial."
"""The tensor of a :class:`LearnedSteps`' rates, and what the names of those of its initial weights begin with."""


@dataclass(frozen=True)
class CondensedSet:
    """What :func:`load_condensed` found."""

    kind: Kind
    data: Any
    """Graphs: :class:`~sparing.data.graphs.PackedGraphs`, a data set of PyG ``Data``; one graph: PyG ``Data``; images:
    a ``TensorDataset`` of (image, label)."""
    labels: tuple[int, ...]
    """Class of each graph, node or image."""
    provenance: Mapping[str, Any]
    steps: LearnedSteps | None = None
    """Of distilled images: how a network learns from them."""


def save_condensed(
    folder: Path | str, condensed: Any, provenance: Mapping[str, Any], steps: LearnedSteps | None = None
) -> Path:
    """Write a condensed set, whole or not at all, in place of an older one.

    Args:
        folder: to be made.
        condensed: ``condensed_`` of a condenser: a list of PyG ``Data`` with a class each, one ``Data`` with a class
            for each node, or a data set of two tensors, images and labels.
        provenance: plain JSON, ``provenance_`` of the condenser, best with what was condensed.
        steps: ``steps_`` of an :class:`~sparing.condensation.unrolled.UnrolledCondenser`, whose images are of use with
            these only.

    Raises:
        InvalidValue: another kind of data, or a provenance that is no JSON; data in which a backdoor was planted, with
            a provenance that does not say so; a folder that holds something else.
        StoreError: the folder cannot be written.
    """
    kind, tensors = tensors_of(condensed, steps)
    if is_marked(condensed) and provenance.get(MARK) is not True:
        raise InvalidValue(
            f"a backdoor was planted in this set while it was condensed: it is saved only with a provenance that says "
            f"so, {MARK} = true, as the condenser's own does"
        )
    target = Path(folder)
    if target.exists() and not (target / DESCRIPTION).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidValue(f"{target} is no condensed set, which would take its place; name another folder")
    with folder_atomic(target) as scratch:
        write_tensors(scratch / TENSORS, {name: tensor.cpu() for name, tensor in tensors.items()})
        description = {
            "format": FORMAT,
            "kind": kind,
            "labels": tensors["y"].tolist(),
            "sets": None if steps is None else steps.sets,
            "provenance": dict(provenance),
            "environment": environment(),
            "sha256": sha256_of(scratch / TENSORS),
        }
        write_json(scratch / DESCRIPTION, description)
    return target


def describe_condensed(folder: Path | str) -> Mapping[str, Any]:
    """What is said about a condensed set, without reading its tensors: ``kind``, ``labels``, ``sets``, ``provenance``.

    Raises:
        CorruptFile: a description that is missing, damaged or of another version.
    """
    path = Path(folder) / DESCRIPTION
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise CorruptFile(f"{path} has format {found!r}; this release reads {FORMAT}")
    return description


def load_condensed(folder: Path | str) -> CondensedSet:
    """Read what :func:`save_condensed` wrote.

    Raises:
        CorruptFile: a file that is missing, damaged, changed or of another version.
    """
    folder = Path(folder)
    description = describe_condensed(folder)
    kind, labels, sets, provenance = (description.get(name) for name in ("kind", "labels", "sets", "provenance"))
    if sha256_of(folder / TENSORS) != description.get("sha256"):
        raise CorruptFile(f"{folder / TENSORS} is not the file that {DESCRIPTION} describes")
    tensors = read_tensors(folder / TENSORS)
    if not isinstance(provenance, dict) or "y" not in tensors or tensors["y"].tolist() != labels:
        raise CorruptFile(f"{folder / DESCRIPTION}: labels that differ from those of {TENSORS}, or no provenance")
    try:
        data, steps = data_of(kind, tensors, sets)
    except InvalidValue as error:
        raise CorruptFile(f"{folder / TENSORS}: {error}") from error
    return CondensedSet(cast(Kind, kind), marked(data, provenance), tuple(labels), provenance, steps)


def tensors_of(condensed: Any, steps: LearnedSteps | None = None) -> tuple[Kind, dict[str, Tensor]]:
    """(kind, name → tensor) of what :func:`save_condensed` takes; :func:`data_of` is the way back.

    Raises:
        InvalidValue: another kind of data; steps with what are no images.
    """
    if isinstance(condensed, TensorDataset) and len(condensed.tensors) == 2:
        tensors = dict(zip(("x", "y"), condensed.tensors, strict=True))
        if steps is not None:
            initial = (steps.initial_weights or {}).items()
            tensors |= {RATES: steps.learning_rates, **{INITIAL + name: weight for name, weight in initial}}
        return "images", tensors
    if steps is not None:
        raise InvalidValue(f"steps with a {type(condensed).__name__}; only images have steps of their own")
    if isinstance(condensed, PackedGraphs):
        return "graphs", condensed.tensors()
    if isinstance(condensed, Sequence) and len(condensed):
        return "graphs", PackedGraphs.of(condensed).tensors()
    if hasattr(condensed, "edge_index") and hasattr(condensed, "x"):
        graph: Data = condensed
        tensors = {name: graph.get(name) for name in NODE_GRAPH}
        found = cast(dict[str, Tensor], {name: tensor for name, tensor in tensors.items() if tensor is not None})
        _check_node_graph(found)
        return "node_graph", found
    raise InvalidValue(
        f"a {type(condensed).__name__} cannot be kept; a list of PyG graphs, one PyG graph, or a TensorDataset of "
        "images and labels is expected"
    )


def data_of(kind: Any, tensors: dict[str, Tensor], sets: Any = None) -> tuple[Any, LearnedSteps | None]:
    """(data as in a :class:`CondensedSet`, steps of distilled images) from what :func:`tensors_of` gave.

    Raises:
        InvalidValue: tensors that do not fit together, or another kind.
    """
    if kind == "graphs":
        return PackedGraphs.from_tensors(tensors), None
    if kind == "node_graph":
        _check_node_graph(tensors)
        return graph_data(tensors["x"], tensors["edge_index"], tensors["y"], tensors.get("edge_weight")), None
    if kind == "images":
        initial = {name[len(INITIAL) :]: tensor for name, tensor in tensors.items() if name.startswith(INITIAL)}
        left = {name: tensor for name, tensor in tensors.items() if not name.startswith(INITIAL)}
        rates = left.pop(RATES, None)
        if set(left) != {"x", "y"} or left["x"].ndim != 4 or left["y"].shape != left["x"].shape[:1]:
            raise InvalidValue(
                f"{ {name: tuple(t.shape) for name, t in left.items()} }; images x (N, C, H, W) and labels y (N,)"
            )
        whole = isinstance(sets, int) and not isinstance(sets, bool) and sets > 0
        if (rates is None) != (sets is None) or (sets is not None and (not whole or len(left["x"]) % sets)):
            raise InvalidValue(f"sets = {sets!r} of {len(left['x'])} images; equal sets and {RATES}, or neither")
        steps = None if rates is None else LearnedSteps(sets, rates, initial or None)
        return TensorDataset(left["x"], left["y"]), steps
    raise InvalidValue(f"kind = {kind!r}; graphs, node_graph or images is expected")


def _check_node_graph(tensors: Mapping[str, Tensor]) -> None:
    """:class:`InvalidValue` where features, edges and labels of one graph do not fit together."""
    if not {"x", "edge_index", "y"} <= set(tensors) <= set(NODE_GRAPH):
        raise InvalidValue(f"tensors {sorted(tensors)}; x, edge_index, y and at most edge_weight are expected")
    x, edges, y = tensors["x"], tensors["edge_index"], tensors["y"]
    whole = not (edges.is_floating_point() or y.is_floating_point())
    if x.ndim != 2 or y.shape != x.shape[:1] or edges.ndim != 2 or len(edges) != 2 or not whole:
        raise InvalidValue(
            f"x {tuple(x.shape)}, y {y.dtype} {tuple(y.shape)}, edge_index {edges.dtype} {tuple(edges.shape)}; (N, F) "
            "and whole numbers (N,) and (2, E) are expected"
        )
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(x):
        raise InvalidValue(f"edge_index holds {int(edges.min())} … {int(edges.max())}; nodes are 0 … {len(x) - 1}")
    weight = tensors.get("edge_weight")
    if weight is not None and weight.shape != edges.shape[1:]:
        raise InvalidValue(f"edge_weight of shape {tuple(weight.shape)}; ({edges.shape[1]},) is expected")
