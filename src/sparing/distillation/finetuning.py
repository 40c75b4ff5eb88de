"""Fine-tuning of a pre-trained vision transformer: early layers learn more slowly than late ones.

Algorithm and settings as in MAE (He et al. 2022, appendix A; layer-wise decay after Clark et al. 2020, ELECTRA).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparing.core.errors import InvalidValue

FREE = ("cls_token", "pos_embed")
"""Parameters without weight decay though they are no vectors."""


def layer_decay_groups(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 0.65, lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rates fall from the head down to the patches.

    With L blocks and n = L + 1 a parameter of depth i has the scale layer_decay^(n − i): i = 0 for class token,
    positions and patches, b + 1 for block b, n for all others (norm and head).

    Args:
        model: with its blocks in ``model.blocks``.
        weight_decay: of matrices; parameters of one dimension, class token and positions have none.
        layer_decay: above 0, at most 1; 1 gives all the same rate.
        lr: the highest rate, to put each group's own into it; None: the groups say their scale only.

    Returns:
        Groups with ``params``, ``names``, ``lr_scale``, ``weight_decay`` and, with ``lr``, ``lr``. Frozen parameters
        are left out.
    """
    if not 0 < layer_decay <= 1:
        raise InvalidValue(f"layer_decay = {layer_decay!r}; above 0 and at most 1 is expected")
    if not weight_decay >= 0:
        raise InvalidValue(f"weight_decay = {weight_decay!r}; 0 or more is expected")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise InvalidValue(f"{type(model).__name__} has no blocks; a model with its layers in .blocks is expected")
    last = len(blocks) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        depth = 0 if parts[0] in (*FREE, "patch_embed") else int(parts[1]) + 1 if parts[0] == "blocks" else last
        free = parameter.ndim <= 1 or name in FREE
        scale = layer_decay ** (last - depth)
        group = groups.setdefault(
            (depth, free),
            {"params": [], "names": [], "lr_scale": scale, "weight_decay": 0.0 if free else weight_decay}
            | ({} if lr is None else {"lr": lr * scale}),
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]
