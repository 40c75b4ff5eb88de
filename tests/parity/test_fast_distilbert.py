"""Fast DistilBERT beside the reference's numbers: masks, pruned training, distillation, INT8, packing, answers, choice.

The arrays of a file are named ``group/…``; each group has its check, which fails on a name it does not know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fast_distilbert_engine
import fast_distilbert_prune
import fast_distilbert_text
import numpy as np
import pytest

GROUPS: Mapping[str, Callable[[Any], int]] = {
    **fast_distilbert_prune.GROUPS,
    **fast_distilbert_engine.GROUPS,
    **fast_distilbert_text.GROUPS,
}


def test_every_array_of_every_file(oracles: Callable[[str], list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    compared: dict[str, int] = defaultdict(int)
    for path in oracles("fast_distilbert"):
        with np.load(path, allow_pickle=False) as archive:
            groups: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
            for name in archive.files:
                group, slash, _ = name.partition("/")
                assert slash, f"{path}: {name!r} is in no group"
                assert group in GROUPS, f"{path}: no check for {name!r}; groups: {', '.join(GROUPS)}"
                groups[group][name] = archive[name]
        assert groups, f"{path} holds nothing"
        for group, arrays in groups.items():
            count = GROUPS[group](arrays)
            assert count, f"{path}: nothing of {group} was compared"
            compared[group] += count
    with capsys.disabled():
        listed = ", ".join(f"{count} of {group}" for group, count in compared.items())
        print(f"\nfast_distilbert: {sum(compared.values())} arrays compared: {listed}")
