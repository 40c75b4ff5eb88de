"""Trees of arrays: what predictors take and give. A tree is a leaf, or a tuple, list or dict of trees.

The leaves of a dict are visited in sorted key order, so that the same content always flattens the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs in a fixed order; paths read like ``0.image``, and the path of a bare leaf is empty."""
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from leaves(tree[key], f"{path}.{key}" if path else str(key))
    elif isinstance(tree, tuple | list):
        for index, item in enumerate(tree):
            yield from leaves(item, f"{path}.{index}" if path else str(index))
    else:
        yield path, tree


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with ``function`` applied to each leaf; named tuples stay named tuples, mappings become dicts."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, tree[key]) for key in sorted(tree, key=str)}
    if isinstance(tree, tuple | list):
        items = [map_leaves(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(tree)


def skeleton(tree: Any) -> Any:
    """The tree's shape as JSON: dicts, lists, and each leaf's position in flattening order."""
    count = iter(range(1 << 30))

    def visit(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {str(key): visit(node[key]) for key in sorted(node, key=str)}
        if isinstance(node, tuple | list):
            return [visit(item) for item in node]
        return next(count)

    return visit(tree)


def grow(shape: Any, flat: list[Any]) -> Any:
    """The tree of ``shape`` (a :func:`skeleton`) with the leaves ``flat``; lists come back as tuples."""
    if isinstance(shape, Mapping):
        return {key: grow(value, flat) for key, value in shape.items()}
    if isinstance(shape, list | tuple):
        return tuple(grow(item, flat) for item in shape)
    return flat[shape]


def to_numpy(leaf: Any) -> Any:
    """A torch tensor as an array on the CPU (bfloat16 as float32, sparse as dense); anything else unchanged."""
    if not hasattr(leaf, "detach"):
        return leaf
    tensor = leaf.detach().cpu()
    if str(tensor.layout) != "torch.strided":
        tensor = tensor.to_dense()
    return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)
