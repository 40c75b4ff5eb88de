"""Small encoders for the tests of the engine: random, sparse, in INT8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from sparing.core.predictor import build_model
from sparing.engine.linear import Int8Linear
from sparing.models.bert import Bert

LAYERS = ("query", "key", "value", "attention_out", "up", "down")


def bert(seed: int = 0, sparsity: float = 0.0, **fields: Any) -> Bert:
    """A random encoder whose weights are large enough to matter, 4×1 blocks of them zero."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": 97, "dim": 128, "depth": 2, "heads": 2, "hidden": 256, "max_length": 80}
    model = build_model("bert", **(defaults | fields))
    assert isinstance(model, Bert)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3)
        for block in model.blocks:
            for name in LAYERS:
                prune(getattr(block, name), sparsity)
    return model.eval()


def prune(layer: nn.Linear, sparsity: float) -> None:
    if not sparsity:
        return
    weight = layer.weight.data
    score = weight.abs().reshape(len(weight) // 4, 4, -1).mean(1)
    dropped = int(sparsity * score.numel())
    kept = score > score.flatten().kthvalue(dropped).values
    weight.mul_(kept.repeat_interleave(4, 0))


def quantised(model: Bert, keep_float: tuple[str, ...] = (), integer_attention: bool = True, seed: int = 1) -> Bert:
    """The same in INT8, ranges from random texts; ``keep_float``: layers such as "0.up"."""
    seen: dict[nn.Module, list[np.ndarray]] = {}
    hooks = [
        getattr(block, name).register_forward_hook(
            lambda module, inputs, output: seen.setdefault(module, []).append(
                np.array([inputs[0].min(), inputs[0].max(), output.min(), output.max()], dtype=np.float32)
            )
        )
        for block in model.blocks
        for name in LAYERS
    ]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model(torch.randint(4, model.embeddings.words.num_embeddings, (8, model.max_length), generator=generator))
    for hook in hooks:
        hook.remove()
    for number, block in enumerate(model.blocks):
        for name in LAYERS:
            if f"{number}.{name}" in keep_float:
                continue
            layer = getattr(block, name)
            low, high, out_low, out_high = seen[layer][0].tolist()
            grid = (out_low, out_high) if integer_attention and name in ("query", "key", "value") else None
            setattr(block, name, Int8Linear.of(layer, (low, high), grid))
    return model


def texts(model: Bert, count: int, length: int, seed: int = 2, ragged: bool = True) -> np.ndarray:
    """Token numbers (count, length), padded behind."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, model.embeddings.words.num_embeddings, (count, length))
    if ragged:
        for row in range(1, count):
            ids[row, rng.integers(1, length + 1) :] = model.pad_id
    return ids
