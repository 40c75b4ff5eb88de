"""What each descendant loses and saves: accuracy, bytes and time, block by block.

Han et al. 2021, LegoDNN, MobiCom, arXiv:2112.09852. The loss of accuracy of a descendant is its mean over a few
surroundings, which are settings of all the other blocks; the optimiser takes these losses as additive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparing.adaptive.block_distillation import images_of
from sparing.adaptive.descendants import BlockZoo
from sparing.adaptive.lego import LegoModel
from sparing.adaptive.scaling import Profile
from sparing.core.clock import in_turns
from sparing.core.errors import DataError, InvalidValue, shown

ORIGINAL = -1
"""In a composition: the original block."""
Runtime = Literal["module", "onnxruntime"]


def environments(blocks: int, sizes: int) -> np.ndarray:
    """Surroundings in which a block is measured, (≤ 3, blocks): indices of sparsities, −1 for the original block.

    All blocks original, then all at the same sparsity, each in turn; of more than three the first, the middle and the
    last.
    """
    rows = [ORIGINAL, *range(sizes)]
    if len(rows) > 3:
        rows = [rows[0], rows[(len(rows) - 1) // 2], rows[-1]]
    return np.tile(np.array(rows)[:, None], (1, blocks))


def accuracy_drops(
    accuracy: Callable[[tuple[int, ...]], float], blocks: int, sizes: int, surroundings: np.ndarray | None = None
) -> np.ndarray:
    """The accuracy that each descendant costs, (blocks, sizes), mean over surroundings.

    Args:
        accuracy: of the network composed of one index into the sparsities for each block, −1 for the original; called
            once for each composition.
        blocks: their number.
        sizes: number of sparsities.
        surroundings: (E, blocks); by default :func:`environments`.
    """
    rows = environments(blocks, sizes) if surroundings is None else np.asarray(surroundings)
    if rows.ndim != 2 or rows.shape[1] != blocks or not len(rows):
        raise InvalidValue(f"surroundings: shape {rows.shape}; (at least 1, {blocks}) is needed")
    if rows.dtype.kind not in "iu" or (rows < ORIGINAL).any() or (rows >= sizes).any():
        raise InvalidValue(f"surroundings: {shown(rows.tolist())}; whole numbers from -1 to {sizes - 1} are needed")
    known: dict[tuple[int, ...], float] = {}

    def of(row: np.ndarray, block: int, option: int) -> float:
        composition = tuple(option if b == block else int(other) for b, other in enumerate(row))
        if composition not in known:
            known[composition] = accuracy(composition)
        return known[composition]

    drops = np.zeros((blocks, sizes))
    for b in range(blocks):
        for s in range(sizes):
            drops[b, s] = np.mean([of(row, b, ORIGINAL) - of(row, b, s) for row in rows])
    return drops


def profile_accuracy(
    zoo: BlockZoo,
    loader: Iterable[Any] | Callable[[nn.Module], float],
    environments: np.ndarray | Literal["auto"] = "auto",
) -> tuple[float, np.ndarray]:
    """(accuracy of the original network, what each descendant costs of it (B, S)).

    Args:
        zoo: with trained descendants.
        loader: batches (images, labels, …), read once and kept, and the share of right answers is the accuracy; or a
            function of the composed network that gives its figure, larger being better. Not the test data.
        environments: (E, B) surroundings, see :func:`environments`; "auto": its three.
    """
    network = LegoModel(zoo)
    if callable(loader):
        figure: Callable[[nn.Module], float] = loader
    else:
        batches = [(images_of(batch), _labels(batch)) for batch in loader]
        if not sum(len(labels) for _, labels in batches):
            raise DataError("the profiling data are empty")

        def figure(network: nn.Module) -> float:
            with torch.no_grad():
                right = sum(int((network(x).argmax(1) == y.to(x.device)).sum()) for x, y in batches)
            return right / sum(len(y) for _, y in batches)

    seen: dict[tuple[int, ...], float] = {}

    def accuracy(composition: tuple[int, ...]) -> float:
        options = tuple(max(option, 0) for option in composition)  # option 0 is the original itself
        if options not in seen:
            network.apply(options)
            seen[options] = float(figure(network))
            if not np.isfinite(seen[options]):
                raise DataError(f"the figure of the composition {options} is {seen[options]}")
        return seen[options]

    blocks, sizes = zoo.bytes.shape
    drops = accuracy_drops(accuracy, blocks, sizes, None if isinstance(environments, str) else np.asarray(environments))
    return accuracy((0,) * blocks), drops


def _labels(batch: Any) -> Tensor:
    values = list(batch.values() if isinstance(batch, dict) else batch)
    if isinstance(batch, Tensor) or len(values) < 2 or not isinstance(values[1], Tensor):
        raise InvalidValue("a batch for the profile of accuracy holds images and labels")
    return values[1]


def profile_latency(
    zoo: BlockZoo, runs: int = 100, warmup: int = 10, runtime: Runtime = "module"
) -> tuple[np.ndarray, np.ndarray, float]:
    """Time at batch 1: (seconds of the original blocks (B,), share that each descendant saves (B, S), of the network).

    The descendants of a block take turns, so that what else the machine does meets all of them alike, and the mean is
    over the middle half of the runs, so that a single interruption does not count.

    Args:
        zoo: blocks and descendants.
        runs: calls of each.
        warmup: calls before them.
        runtime: "module" (torch) or "onnxruntime", one graph for each descendant.
    """
    for name, value, least in (("runs", runs, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidValue(f"{name} = {shown(value)}; a whole number of at least {least} is expected")
    if runtime not in ("module", "onnxruntime"):
        raise InvalidValue(f'runtime = {shown(runtime)}; "module" or "onnxruntime" is expected')
    with torch.inference_mode():
        seconds = np.array(
            [
                in_turns([_call(module, x, runtime) for module in row], runs, warmup)
                for row, x in zip(zoo.blocks, zoo.graph.block_inputs, strict=True)
            ]
        )
        whole = float(in_turns([_call(zoo.graph.module, zoo.graph.example, runtime)], runs, warmup)[0])
    rel = (seconds[:, :1] - seconds) / seconds[:, :1]
    return seconds[:, 0], rel, whole


def _call(module: nn.Module, x: Tensor, runtime: Runtime) -> Callable[[], Any]:
    if runtime == "module":
        return lambda: module(x)
    from sparing.core.predictor.onnx import to_onnx

    made, array = to_onnx(module, (x,)), x.cpu().numpy()
    return lambda: made(array)


def profile_blocks(
    zoo: BlockZoo,
    loader: Iterable[Any] | Callable[[nn.Module], float],
    *,
    runs: int = 100,
    runtime: Runtime = "module",
    environments: np.ndarray | Literal["auto"] = "auto",
) -> Profile:
    """All that the optimiser needs to know of a zoo: :func:`profile_accuracy`, :func:`profile_latency` and bytes."""
    accuracy, drops = profile_accuracy(zoo, loader, environments)
    latency, rel, whole = profile_latency(zoo, runs, runtime=runtime)
    return Profile(
        sparsities=np.array(zoo.sparsities),
        drops=drops,
        bytes=zoo.bytes,
        latency=latency,
        rel=rel,
        model_latency=whole,
        frame_bytes=zoo.frame_bytes,
        accuracy=accuracy,
    )


__all__ = [
    "ORIGINAL",
    "Profile",
    "accuracy_drops",
    "environments",
    "profile_accuracy",
    "profile_blocks",
    "profile_latency",
]
