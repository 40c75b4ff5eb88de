"""What a curriculum over lengths does to a finished batch: cut it, or fold it into more and shorter rows.

Li et al. 2022, arXiv:2212.03597, section 3.1: *truncate* (seqtru), *reshape* (seqres) and *reorder* (seqreo). They take
one tensor, or a mapping of tensors of one width. ``shifted`` says what the width means: True for token numbers of which
inputs are ``[:, :-1]`` and labels ``[:, 1:]``, so that a difficulty of d tokens keeps d + 1; False for inputs, labels
and masks in fields of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from jaxtyping import Shaped
from torch import Tensor
from torch import cat as concatenated

from sparing.core.errors import InvalidValue, shown
from sparing.data_efficiency.settings import whole_number

Batch = TypeVar("Batch", bound=Tensor | Mapping[str, Any])


def truncate_batch(batch: Batch, difficulty: int, *, shifted: bool = True, multiple: int = 1) -> Batch:
    """The first ``difficulty`` tokens of each row; the others are lost.

    Args:
        batch: (B, W), or a mapping whose fields are (B, W); others in it, such as one label for each sample, stay.
        difficulty: d ≥ 1, rounded up to a ``multiple`` (8 for BERT). From the full length on nothing changes.
        shifted: keep d + 1 of the W = S + 1 columns, else d of the W = S.
        multiple: see ``difficulty``.

    Raises:
        InvalidValue: d < 1, or no field (B, W).
    """
    keep = -(-whole_number("difficulty", difficulty, 1) // whole_number("multiple", multiple, 1)) * multiple + shifted
    width = _width(batch)
    return batch if keep >= width else _mapped(batch, width, lambda rows: rows[:, :keep])


def reshape_batch(batch: Batch, difficulty: int, *, shifted: bool = True) -> Batch:
    """Rows of ``difficulty`` tokens, more of them: no token is lost but those of rows that even counts leave out.

    With w = d + 1 (``shifted``) or d: n = W // w pieces of each row one after another, then the last w tokens of each
    row, which overlap the others; of these the first min(⌈B·W/w⌉, n·B + B) rows, one fewer if that is odd and not 1.
    From the full length on nothing changes, nor is a row left out.

    Args:
        batch: (B, W), or a mapping whose fields all are.
        difficulty: d ≥ 1.
        shifted: see the module.

    Raises:
        InvalidValue: d < 1, or a field of another shape, which cannot follow its rows.
    """
    width = _width(batch)
    wide = whole_number("difficulty", difficulty, 1) + shifted
    if wide >= width:
        return batch
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            if not _is_field(value, width):
                raise InvalidValue(f"{name!r} is {_shape(value)}; only fields (B, {width}) can be reshaped")

    def fold(rows: Shaped[Tensor, "b w"]) -> Shaped[Tensor, "rows v"]:
        pieces, kept = width // wide, reshaped_rows(len(rows), width, wide)
        folded = rows[:, : pieces * wide].reshape(-1, wide)
        return concatenated((folded, rows[:, width - wide :]))[:kept]

    return _mapped(batch, width, fold)


def reshaped_rows(rows: int, width: int, wide: int) -> int:
    """How many rows of ``wide`` columns :func:`reshape_batch` makes of ``rows`` of ``width``."""
    if wide >= width:
        return rows
    kept = min(-(-rows * width // wide), (width // wide) * rows + rows)
    return kept - (kept > 1 and kept % 2)


def trim_batch(batch: Batch, mask: str = "attention_mask", multiple: int = 8) -> Batch:
    """All fields cut to the batch's longest member, rounded up to a ``multiple``: the second half of *reorder*.

    Args:
        batch: a mapping whose fields are (B, W), real tokens first; other fields stay.
        mask: the field that is not 0 where there is a token.
        multiple: what the new width is a multiple of, unless that would be more than W.
    """
    if not isinstance(batch, Mapping) or mask not in batch:
        known = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else _shape(batch)
        raise InvalidValue(f"a batch with the field {mask!r} is expected; this one has {known}")
    width = _width(cast("Any", batch[mask]))
    used = (batch[mask] != 0).any(0).nonzero()
    longest = int(used.max()) + 1 if len(used) else 1
    return truncate_batch(_of_width(batch, width), longest, shifted=False, multiple=multiple)


def _of_width(batch: Batch, width: int) -> Batch:
    found = _width(batch)
    if found != width:
        raise InvalidValue(f"a mask of width {width} and fields of width {found}; one width is expected")
    return batch


def _is_field(value: Any, width: int | None = None) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and (width is None or value.shape[1] == width)


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


def _width(batch: Any) -> int:
    """W of the first field (B, W), and of all of them."""
    fields = batch if isinstance(batch, Mapping) else {"the batch": batch}
    widths = {name: value.shape[1] for name, value in fields.items() if _is_field(value)}
    if not widths:
        raise InvalidValue(
            f"fields: {', '.join(f'{name} {_shape(value)}' for name, value in fields.items()) or 'none'}; at least one "
            "tensor (B, W) is needed"
        )
    if len(set(widths.values())) > 1:
        raise InvalidValue(f"fields of several widths: {widths}; one width is expected")
    return next(iter(widths.values()))


def _mapped(batch: Batch, width: int, change: Any) -> Batch:
    if isinstance(batch, Tensor):
        return change(batch)
    changed = {name: change(value) if _is_field(value, width) else value for name, value in batch.items()}
    return cast("Batch", changed)
