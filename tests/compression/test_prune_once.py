"""The steps in a pipeline: pruned in pre-training, transferred, and trained on with the pattern locked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import sparing
from sparing.compression.pruning import BlockPrune, LockPattern, sparsity_of
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, RecipeError
from sparing.core.job import Job
from sparing.core.pipeline import plan, run
from sparing.core.predictor import build_model
from sparing.core.recipe import parse_recipe
from sparing.core.step import Stage, Step, step
from sparing.testing import QUICK
from sparing.testing.cases import registered
from sparing.testing.kills import survives_kills

WORDS, LENGTH = 24, 6
FAST: dict[str, Any] = {"batch_size": 16, "lr": 0.01, "checkpoint_every_batches": 1}


@step("count_zeros")
class CountZeros(Step):
    """Stands for what makes sparsity real: it only counts."""

    stage = Stage.MODEL
    realises: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    source = "ours"

    def apply(self, job: Job) -> Job:
        """Record the share of zeros."""
        assert job.model is not None
        job.record("zeros", sparsity_of(job.model, names=blocks_of(job.model)).sparsity, "", better="higher")
        return job


def blocks_of(model: nn.Module) -> list[str]:
    return [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")
    ]


def texts(count: int, seed: int) -> torch.Tensor:
    """Sentences in which each word follows from the one before."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(4, WORDS, (count, 1), generator=draw)
    return (first - 4 + torch.arange(LENGTH)) % (WORDS - 4) + 4


class Language(sparing.CustomTask):
    """Guess the two words that are hidden in each sentence."""

    def __init__(self) -> None:
        super().__init__(
            "language",
            self.part(64, 0),
            self.part(24, 1),
            self.part(16, 2),
            self.part(16, 3),
            model="bert",
            loss=lambda outputs, labels: cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=-100),
            metrics={"accuracy": lambda outputs, labels: (outputs.argmax(-1) == labels).mean(1)},
            capabilities={"masked_lm"},
        )

    @staticmethod
    def part(count: int, seed: int) -> TensorDataset:
        ids = texts(count, seed)
        places = torch.tensor([[1, 4]]).expand(count, 2).contiguous()
        return TensorDataset(torch.cat([ids.scatter(1, places, 2), places], 1), ids.gather(1, places))

    def outputs(self, model: Any, batch: Any) -> Any:
        return model(batch[0][:, :LENGTH], batch[0][:, LENGTH:])

    def class_logits(self, outputs: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.flatten(0, 1), batch[1].flatten()

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        (both,) = super().example_input(batch)
        return both[:, :LENGTH].clone(), both[:, LENGTH:].clone()

    def model_fields(self) -> dict[str, Any]:
        return {**SMALL, "head": "masked_lm"}


class Topics(sparing.CustomTask):
    """Which third of the vocabulary a sentence begins in."""

    def __init__(self) -> None:
        parts = [self.part(count, seed) for seed, count in enumerate((48, 24, 16, 16))]
        super().__init__("topics", *parts, model="bert", loss=cross_entropy, labels="abc")

    @staticmethod
    def part(count: int, seed: int) -> TensorDataset:
        ids = texts(count, 10 + seed)
        return TensorDataset(ids, (ids[:, 0] - 4) * 3 // (WORDS - 4))

    def model_fields(self) -> dict[str, Any]:
        return {**SMALL, "head": "classifier", "num_classes": 3}


SMALL = {"vocab_size": WORDS, "dim": 8, "depth": 2, "heads": 2, "hidden": 16, "max_length": LENGTH, "dropout": 0.1}


def once_for_all() -> list[Step]:
    return [
        sparing.Train(id="dense", epochs=3, **FAST),
        BlockPrune(sparsity=0.75),
        sparing.Distil(id="sparse", teacher="dense", temperature=2, weight=0.5, epochs=4, **FAST),
        sparing.Transfer(task=Topics()),
        LockPattern(),
        sparing.Train(id="tuned", epochs=2, **FAST),
        CountZeros(),
    ]


def test_pruned_once_and_transferred_with_the_pattern_locked(tmp_path: Path) -> None:
    """Under kill -9, in the middle of the pruning and of the locked training too."""

    def start(place: Path) -> Any:
        return run(task=Language(), steps=once_for_all(), meter=QUICK, store=place / "store", out=place / "out")

    with registered(CountZeros):
        done = survives_kills(start, tmp_path, deaths=8)
    rows = {row.id: row for row in done.ledger.rows}
    assert rows["count_zeros"].figures["zeros"].value == pytest.approx(0.75)
    assert rows["lock_pattern"].figures["sparsity of locked layers"].value == pytest.approx(0.75)
    curve = [value for _, value in rows["sparse"].curves["sparsity"]]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(0.75)
    assert "75.00% of the weights of 12 layers are zero" in " ".join(rows["sparse"].remarks)
    assert "head.dense (outside the encoder's blocks)" in " ".join(rows["block_prune"].remarks)
    assert done.job.model is not None
    assert not any("parametrizations" in name for name in done.job.model.state_dict())
    again = sparing.load(done.folder / "model")  # type: ignore[operator]
    assert again.describe().nonzero == done.job.predictor.describe().nonzero  # type: ignore[union-attr]


def test_a_training_that_would_fill_the_zeros_is_refused_at_planning() -> None:
    with registered(CountZeros):
        steps = [BlockPrune(), sparing.Train(), sparing.Train(id="more"), CountZeros()]
        with pytest.raises(
            RecipeError, match=r"'more' would undo the sparsity of 'block_prune' at .*: block_prune, lock_pattern"
        ):
            run(task=Topics(), steps=steps, meter=QUICK)
        with pytest.raises(RecipeError, match=r"steps\[4\]: 'again' would undo the sparsity of 'lock_pattern'"):
            run(
                task=Topics(),
                steps=[*steps[:2], LockPattern(), sparing.Train(id="b"), sparing.Train(id="again"), CountZeros()],
                meter=QUICK,
            )
        with pytest.raises(RecipeError, match=r"'count_zeros' comes before the training in which 'block_prune' at"):
            run(task=Topics(), steps=[BlockPrune(), CountZeros(), sparing.Train()], meter=QUICK)
        with pytest.raises(RecipeError, match=r"'lock_pattern' sets the training plan's pattern of zeros"):
            run(task=Topics(), steps=[BlockPrune(), LockPattern(), sparing.Train(), CountZeros()], meter=QUICK)
        with pytest.raises(RecipeError, match=r"'train' sets the training plan's scheduler"):
            run(task=Topics(), steps=[BlockPrune(), sparing.Train(scheduler="cosine"), CountZeros()], meter=QUICK)
        plan(
            parse_recipe(
                "task: digits\nmodel: {name: mlp}\nsteps: [{block_prune: {rewind: false}}, "
                "{train: {scheduler: cosine}}, count_zeros, {train: {id: after}}]"
            )
        )  # what has been made real is no longer at risk
        plan(
            parse_recipe(
                "task: digits\nmodel: {name: mlp}\nsteps: [block_prune, train, ema, count_zeros, {train: {id: b}}]"
            )
        )  # another step's training may be to come
    with pytest.raises(RecipeError, match=r"'block_prune' promises sparsity"):
        run(task=Topics(), steps=[BlockPrune(), sparing.Train()], meter=QUICK)


def test_weights_from_before_the_end_of_the_pruning_are_not_handed_on(tmp_path: Path) -> None:
    with registered(CountZeros), pytest.raises(IncompatibleStep, match="restore_best = True"):
        run(
            task=Topics(),
            steps=[BlockPrune(), sparing.Train(epochs=2, restore_best=True), CountZeros()],
            meter=QUICK,
            store=tmp_path,
        )


def test_the_average_of_the_weights_is_as_sparse(tmp_path: Path) -> None:
    with registered(CountZeros):
        done = run(
            task=Topics(),
            steps=[sparing.Ema(decay=0.5), BlockPrune(sparsity=0.5), sparing.Train(epochs=4, **FAST), CountZeros()],
            meter=QUICK,
            store=tmp_path,
        )
    assert done.ledger.rows[-1].figures["zeros"].value == pytest.approx(0.5)


def test_wrong_fields_and_models_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"ramp = 0.9, end = 0.8"):
        BlockPrune(ramp=0.9)
    with pytest.raises(InvalidValue, match=r"initial = 0.9, sparsity = 0.8"):
        BlockPrune(initial=0.9)
    with pytest.raises(InvalidValue, match=r"block = \(4, 0\)"):
        BlockPrune(block=(4, 0))
    with registered(CountZeros):
        tail = [sparing.Train(epochs=1), CountZeros()]
        common: dict[str, Any] = {"task": Topics(), "meter": QUICK, "store": tmp_path}
        with pytest.raises(InvalidValue, match=r"blocks.0.query: a weight of 8 outputs × 8 inputs.*12 × 1"):
            run(steps=[BlockPrune(block=(12, 1)), *tail], **common)
        with pytest.raises(InvalidValue, match=r"'blocks.9.\*' matches no layer"):
            run(steps=[BlockPrune(exclude=("blocks.9.*",)), *tail], **common)
        with pytest.raises(NoEffect, match="no pattern of zeros to lock"):
            run(steps=[LockPattern(), *tail], **common)
        flat = build_model("mlp", in_features=LENGTH, num_classes=3, widths=[])
        with pytest.raises(NoEffect, match="no layer of MLP to prune"):
            run(model=flat, steps=[BlockPrune(), *tail], **common)


def test_the_recipe_says_the_same() -> None:
    steps = "[{block_prune: {block: [1, 4], sparsity: 0.5}}, train, count_zeros]"
    text = f"task: digits\nmodel: {{name: mlp}}\nsteps: {steps}"
    with registered(CountZeros):
        (first, *_) = parse_recipe(text).steps
    assert isinstance(first, BlockPrune)
    assert first.block == (1, 4)
    assert first.schedule(1000).t1 == 500
