"""The loop of the condensers: what it shows."""

from __future__ import annotations

import sys

import pytest
import torch

from sparing.condensation import run
from sparing.condensation.callbacks import Callbacks


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_nothing_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparing.core.bar.AFTER_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    tensor = torch.zeros(1, requires_grad=True)
    with run.Run({"x": tensor}, torch.optim.SGD([tensor], lr=1.0), Callbacks(()), {}, 3, None, 1) as going:
        for iteration in going.left():
            going.end(iteration, 0.25 + iteration)
    shown = capsys.readouterr()
    assert ("condensing, loss 0.25" in shown.err) == terminal
    assert not shown.out
    assert going.losses == [0.25, 1.25, 2.25]
