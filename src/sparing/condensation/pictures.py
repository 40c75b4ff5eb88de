"""Condensed data as pictures: images on a sheet, graphs drawn beside each other: uint8 arrays for a ledger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparing.core.errors import InvalidValue
from sparing.core.ledger import PICTURE_SIDE

COLOURS = (
    *((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)),
    *((140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207)),
)
"""Of nodes; kind 10 has that of kind 0 again."""
GAP, EDGE, UNKNOWN, DOT = 6, (150, 150, 150), (205, 205, 205), 4
FINER = 3
"""Graphs are drawn so many times as large and then made smaller, which smooths lines."""


def image_sheet(
    images: Float[Tensor, "m c h w"],
    labels: Int[Tensor, " m"],
    low: Float[Tensor, " c"],
    high: Float[Tensor, " c"],
    per_class: int = 10,
) -> np.ndarray:
    """The first images of each class in a row of their own: uint8 (height, width), or (height, width, 3) of colour.

    Args:
        images: with 3 channels in colour, otherwise the first channel in grey.
        labels: their classes.
        low: of each channel, what is black; darker is black, too.
        high: of each channel, what is fully lit.
        per_class: most images in a row.
    """
    channels = 3 if images.shape[1] == 3 else 1
    bounds = (low[:channels, None, None], high[:channels, None, None])
    span = (bounds[1] - bounds[0]).clamp(min=torch.finfo(images.dtype).tiny)
    pixels = ((images[:, :channels] - bounds[0]) / span).clamp(0, 1).mul(255).round().byte()
    step = -(-max(images.shape[2:]) // 128)
    tiles = pixels[:, :, ::step, ::step].permute(0, 2, 3, 1).cpu().numpy()
    height, width = tiles.shape[1] + 2, tiles.shape[2] + 2
    rows = [np.flatnonzero(labels.cpu().numpy() == c) for c in range(int(labels.max()) + 1)]
    rows = rows[: max(1, PICTURE_SIDE // height)]
    columns = min(per_class, PICTURE_SIDE // width, max(len(row) for row in rows))
    sheet = np.full((len(rows) * height, columns * width, channels), 255, np.uint8)
    for r, row in enumerate(rows):
        for k, number in enumerate(row[:columns]):
            sheet[r * height + 1 : (r + 1) * height - 1, k * width + 1 : (k + 1) * width - 1] = tiles[number]
    larger = max(1, min(4, PICTURE_SIDE // max(sheet.shape[:2])))
    sheet = sheet.repeat(larger, 0).repeat(larger, 1)
    return sheet[..., 0] if channels == 1 else sheet


def graph_picture(nodes: int, edge_index: Int[Tensor, "2 e"], kinds: Int[Tensor, " n"], side: int = 200) -> np.ndarray:
    """A drawing of a graph, uint8 (side, side, 3): nodes as dots, coloured by kind, where springs along edges put them.

    Args:
        nodes: how many.
        edge_index: their edges; directions and loops are not drawn.
        kinds: of each node, from 0; light grey where it is not known, below 0.
        side: pixels.

    Raises:
        InvalidValue: another number of kinds than nodes.
    """
    import networkx
    from PIL import Image, ImageDraw

    if nodes < 1 or kinds.shape != (nodes,):
        raise InvalidValue(f"{nodes} nodes and kinds {tuple(kinds.shape)}; one kind for each node is expected")
    graph = networkx.Graph()
    graph.add_nodes_from(range(nodes))
    graph.add_edges_from(tuple(pair) for pair in edge_index.t().tolist() if pair[0] != pair[1])
    placed = networkx.spring_layout(graph, seed=0)
    places = np.array([placed[node] for node in range(nodes)])
    low, high = places.min(0), places.max(0)
    wide, margin = side * FINER, DOT * FINER * 2
    places = margin + (places - low) / np.maximum(high - low, 1e-9) * (wide - 2 * margin)
    canvas = Image.new("RGB", (wide, wide), "white")
    pen = ImageDraw.Draw(canvas)
    for one, other in graph.edges:
        pen.line([*places[one], *places[other]], fill=EDGE, width=FINER)
    radius = FINER * (DOT if nodes <= 60 else DOT / 2)
    for (x, y), kind in zip(places, kinds.tolist(), strict=True):
        pen.ellipse(
            [x - radius, y - radius, x + radius, y + radius],
            fill=COLOURS[kind % len(COLOURS)] if kind >= 0 else UNKNOWN,
        )
    return np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS))


def beside(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Pictures of one size (h, w, 3) in rows, with gaps between; what a picture has no room for is left out."""
    height, width, channels = rows[0][0].shape
    count, columns = PICTURE_SIDE // (height + GAP), min(PICTURE_SIDE // (width + GAP), max(map(len, rows)))
    rows = [row[:columns] for row in rows[:count]]
    sheet = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 225, np.uint8)
    for r, row in enumerate(rows):
        for k, picture in enumerate(row):
            top, left = r * (height + GAP), k * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return sheet
