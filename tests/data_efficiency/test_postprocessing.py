"""Cutting and folding finished batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import InvalidValue
from sparing.data_efficiency.postprocessing import reshape_batch, trim_batch, truncate_batch


@given(rows=st.integers(1, 6), width=st.integers(2, 40), difficulty=st.integers(1, 45), shifted=st.booleans())
def test_reshaping_loses_a_token_only_with_a_row_that_is_left_out(rows, width, difficulty, shifted):
    text = torch.arange(rows * width).view(rows, width)
    folded = reshape_batch(text, difficulty, shifted=shifted)
    wide = difficulty + shifted
    if wide >= width:
        assert folded is text
        return
    assert folded.shape[1] == wide
    assert len(folded) == 1 or len(folded) % 2 == 0
    for row in folded:  # each is a stretch of one sample
        assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + wide))
        assert int(row[0]) // width == int(row[-1]) // width
    pieces = width // wide
    if rows * -(-width // wide) <= len(folded):
        assert set(folded.flatten().tolist()) == set(range(rows * width))
    assert torch.equal(
        folded[: rows * pieces][: len(folded)], text[:, : pieces * wide].reshape(-1, wide)[: len(folded)]
    )


def test_the_parts_of_a_mapping_stay_together():
    ids = torch.arange(24).view(2, 12)
    batch = {"input_ids": ids, "labels": ids + 100}
    folded = reshape_batch(batch, 5, shifted=False)
    assert folded["input_ids"].shape == (4, 5)
    assert torch.equal(folded["labels"], folded["input_ids"] + 100)
    cut = truncate_batch(batch | {"label": torch.tensor([0, 1])}, 3, shifted=False, multiple=4)
    assert torch.equal(cut["input_ids"], ids[:, :4])
    assert torch.equal(cut["label"], torch.tensor([0, 1]))
    assert truncate_batch(batch, 12, shifted=False) is batch
    assert batch["input_ids"].shape == (2, 12)


def test_a_batch_is_trimmed_to_its_longest_member():
    mask = torch.zeros(3, 40, dtype=torch.long)
    mask[0, :3] = mask[1, :9] = 1
    batch = {"attention_mask": mask, "input_ids": torch.ones(3, 40)}
    assert trim_batch(batch)["input_ids"].shape == (3, 16)
    assert trim_batch(batch, multiple=1)["attention_mask"].shape == (3, 9)
    mask[2] = 1
    assert trim_batch(batch)["input_ids"].shape == (3, 40)
    assert trim_batch({"attention_mask": torch.zeros(2, 10)}, multiple=1)["attention_mask"].shape == (2, 1)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: truncate_batch(torch.ones(2, 5), 0), "difficulty = 0"),
        (lambda: truncate_batch(torch.ones(5), 2), r"of shape \(5,\); at least one tensor"),
        (lambda: reshape_batch({"a": torch.ones(2, 6), "b": torch.ones(2)}, 2), r"'b' is of shape \(2,\)"),
        (lambda: truncate_batch({"a": torch.ones(2, 6), "b": torch.ones(2, 5)}, 2), "several widths"),
        (lambda: trim_batch({"input_ids": torch.ones(2, 6)}), "'attention_mask' is expected; this one has input_ids"),
        (lambda: truncate_batch({}, 2), "none; at least one tensor"),
    ],
)
def test_bad_batches_are_named(call, named):
    with pytest.raises(InvalidValue, match=named):
        call()
