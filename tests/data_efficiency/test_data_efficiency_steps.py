"""Curriculum, token dropping and the token clock in recipes and in Lightning scripts: what they do, refuse and keep."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sparing
from faults import DeadlyKeeper, Killed, in_child
from sparing.compression.pruning import BlockPrune
from sparing.compression.shrinking import Shrink
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, RecipeError
from sparing.core.job import Job, TrainingPlan
from sparing.core.pipeline import begin
from sparing.core.store import Store
from sparing.core.training import Train, fit
from sparing.data_efficiency import analysis
from sparing.data_efficiency.callbacks import (
    CurriculumCallback,
    TokenCount,
    TokenDroppingCallback,
    TokenLRCallback,
    real_tokens,
)
from sparing.data_efficiency.curriculum import Curriculum, CurriculumBatches, paced
from sparing.data_efficiency.pacing import linear
from sparing.data_efficiency.sampler import CurriculumCollate, CurriculumItems, CurriculumMetric, CurriculumSampler
from sparing.data_efficiency.token_dropping import DropTokens
from sparing.data_efficiency.tokens import TokenLr, planned_tokens, token_lr
from sparing.models.gpt import Gpt
from sparing.optimization.leap import Leap
from sparing.tasks.text.language_modelling import TextCorpus
from sparing.testing import tiny_task

LENGTH = 16
CUT = Curriculum(metrics={}, postprocess="truncate", length={"start": 4, "step": 2, "over": 1.0})
ALL = (
    Curriculum(metrics={"vocabulary_rarity": {"start": 20}}, postprocess="truncate", length={"start": 4, "over": 0.5}),
    DropTokens(start=2, multiple=1),
    TokenLr(warmup=0.2),
    Leap(rho=0.2),
)
PLAIN = Train(epochs=2, batch_size=4, accumulate=2, lr=0.01, checkpoint_every_batches=2)


def words(seed: int, count: int, least: int, most: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("abcdefg "), draw.integers(least, most))) for _ in range(count)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in windows of one length, and lines of their own lengths."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "windows.txt").write_text("".join(words(0, 60, 8, 20)))
    (folder / "lines.txt").write_text("\n".join(word.replace(" ", "h") for word in words(1, 60, 4, 16)))
    return folder


class SmallCorpus(TextCorpus):
    def default_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Gpt(len(self.tokens.vocabulary), self.length, dim=8, depth=4, heads=2)


def corpus(texts: Path, samples: str = "windows") -> SmallCorpus:
    return SmallCorpus(
        str(texts / f"{samples}.txt"),
        LENGTH,
        "characters",
        samples=samples,
        split="tail",  # type: ignore[arg-type]
    )


@pytest.fixture
def windows(texts: Path) -> SmallCorpus:
    return corpus(texts)


def plan_of(task: Any, steps: Sequence[Any], seed: int = 3) -> tuple[TrainingPlan, Job]:
    job = begin(task, seed=seed)
    for step in steps:
        job = step.apply(job)
    return job.training, job


def fitted(task: Any, steps: Sequence[Any], settings: Train = PLAIN, progress: Any = None, more: Any = ()) -> Any:
    plan, job = plan_of(task, steps)
    return fit(job.fresh_model(), task, job.train, None, settings, plan, 2, progress, callbacks=more)


class Look(pl.Callback):
    """Shapes, rates and kept lengths of each batch."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.rows: list[int] = []
        self.rates: list[float] = []
        self.clock: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ids = batch["input_ids"]
        self.widths.append(ids.shape[1] - 1)
        self.rows.append(len(ids))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        counts = [callback for callback in trainer.callbacks if isinstance(callback, TokenCount)]
        self.clock.append(counts[0].counter.tokens if counts and counts[0].counter else 0)


# --- what a training sees


def test_each_batch_is_cut_to_the_difficulty_it_was_drawn_under(windows: SmallCorpus) -> None:
    """Whatever is fetched ahead by other processes."""
    look = Look()
    settings = Train(epochs=3, batch_size=4, accumulate=2, workers=1)
    result = fitted(windows, [CUT], settings, more=[look])
    pace = linear(4, LENGTH, result.steps, 2)
    assert look.widths == [pace(step) for step in range(1, result.steps + 1) for _ in range(2)]
    assert set(look.rows) == {4}
    assert len(set(look.widths)) > 4
    # a point lies at the steps made, so that within a step the length is already the next one's
    assert all(value in (pace(int(step)), pace(int(step) + 1)) for step, value in result.curves["difficulty: length"])


def test_samples_come_from_easy_to_hard_in_whole_batches(windows: SmallCorpus) -> None:
    plan, job = plan_of(windows, [Curriculum(metrics={"vocabulary_rarity": {"start": 10, "pacing": "linear"}})])
    assert plan.batch_sampler is not None
    batches = plan.batch_sampler(job.train, 4, 5)
    total = batches.begin(4, None, 3)
    assert len(batches) % 3 == 0
    assert total == 4 * len(batches) // 3
    metric = batches.curriculum["vocabulary_rarity"]
    place = np.empty(len(job.train))
    place[np.asarray(metric.index.ids)] = np.arange(len(job.train))
    own = CurriculumSampler(batches.curriculum, 4, total, 5, rank=0, world_size=1, accumulation=3)
    expected = [list(batch) for batch in own]
    drawn = [batch.tolist() for epoch in range(4) for batch in batches.epoch_batches(epoch)]
    assert drawn == expected
    first = place[np.concatenate(expected[:3])]
    assert first.max() < 0.2 * len(job.train)
    assert place[np.concatenate(drawn[-len(batches) :])].max() > 0.9 * len(job.train)


def test_batches_of_an_epoch_do_not_depend_on_those_asked_before(windows: SmallCorpus) -> None:
    plan, job = plan_of(windows, [Curriculum()])
    assert plan.batch_sampler is not None

    def fresh() -> CurriculumBatches:
        made = plan.batch_sampler(job.train, 4, 5)
        made.begin(5, None, 1)
        return made

    whole = fresh()
    expected = [[part.tolist() for part in whole.epoch_batches(epoch)] for epoch in range(5)]
    state = whole.state_dict()
    assert list(state["epochs"]) == ["4", "5"]
    clusters = state["epochs"]["5"]["clusters"]
    assert 5 < len(clusters) <= 91  # percentiles from 10 to 100
    assert {frozenset(cluster) for cluster in clusters} == {frozenset({"difficulties", "pass", "taken"})}
    late = fresh()
    assert [part.tolist() for part in late.epoch_batches(4)] == expected[4]
    assert [part.tolist() for part in late.epoch_batches(1)] == expected[1]
    resumed = fresh()
    resumed.load_state_dict(state)
    resumed.seek(4, 2)
    assert [list(batch) for batch in resumed] == expected[4][2:]
    other = plan.batch_sampler(job.train, 4, 6)
    other.begin(5, None, 1)
    with pytest.raises(InvalidValue, match="seed was 5, is 6"):
        other.load_state_dict(state)


def test_tokens_and_rates_are_those_of_the_schedules(windows: SmallCorpus) -> None:
    """Reshaped batches under accumulation: counted, planned ahead, and followed by the rate."""
    look = Look()
    steps = [
        Curriculum(metrics={}, postprocess="reshape", length={"start": 4, "over": 0.8}),
        DropTokens(start=3, multiple=1, over=0.9),
        TokenLr(warmup=0.25, min_lr=0.001),
    ]
    result = fitted(windows, steps, more=[look])
    assert len(set(look.rows)) > 2
    pace, kept = linear(4, LENGTH, 0.8 * result.steps), linear(3, LENGTH, 0.9 * result.steps)
    planned = planned_tokens(result.steps, 4, LENGTH, 4, 2, pace, kept, reshaped=True)
    assert result.figures["consumed tokens"][0] == 2 * planned.tokens
    assert result.figures["layer tokens"][0] == 2 * planned.layer_tokens
    decay = 2 * planned.tokens
    expected = [token_lr(tokens, 0.01, 0.001, 0.25 * decay, decay) for tokens in look.clock]
    np.testing.assert_allclose(look.rates, np.repeat(expected[::2], 2)[: len(look.rates)], rtol=1e-12)
    assert 0 < result.figures["layer tokens saved"][0] < result.figures["operations saved in blocks"][0] < 1
    assert not any("padded" in remark for remark in result.remarks)


def test_a_training_ends_at_the_first_step_that_reaches_the_budget(windows: SmallCorpus) -> None:
    look = Look()
    result = fitted(windows, [CUT, TokenLr(budget=400)], Train(epochs=9, batch_size=4, lr=0.01), more=[look])
    consumed = result.figures["consumed tokens"][0]
    assert look.clock[-1] < 400 <= consumed
    assert result.steps == len(look.clock)
    half = fitted(windows, [TokenLr(share=0.5, warmup=0)], Train(max_steps=12, batch_size=4, lr=0.01))
    assert half.steps == 6
    assert half.curves["lr"][0][1] == pytest.approx(0.02)
    short = fitted(windows, [TokenLr(budget=10**6)], Train(max_steps=2, batch_size=4))
    assert any(f"ended after {2 * 4 * LENGTH} of 1,000,000 tokens" in remark for remark in short.remarks)


def test_padding_is_not_consumed(texts: Path) -> None:
    task = corpus(texts, "lines")
    result = fitted(task, [TokenLr()], Train(epochs=1, batch_size=4))
    _, job = plan_of(task, [])
    assert result.figures["consumed tokens"][0] == sum(
        len(item) - 1 for item in (job.train[i] for i in range(len(job.train)))
    )
    assert result.figures["layer tokens"][0] > 4 * result.figures["consumed tokens"][0]
    assert any("Give a budget" in remark for remark in result.remarks)
    assert real_tokens((torch.ones(2, 3), torch.ones(2)), tiny_task()) is None


def test_dropping_follows_its_schedule_and_leaves_the_model_as_it_was(windows: SmallCorpus) -> None:
    seen: list[int] = []

    class Kept(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            dropping = next(c for c in trainer.callbacks if isinstance(c, TokenDroppingCallback)).dropping
            assert dropping is not None
            seen.append(0 if dropping.last_indices is None else dropping.last_indices.shape[2])

    result = fitted(windows, [DropTokens(start=2, multiple=1)], Train(epochs=2, batch_size=4), more=[Kept()])
    pace = linear(2, LENGTH, 0.7 * result.steps)
    growing = [int(pace(step)) for step in range(result.steps)]
    assert seen[: growing.index(LENGTH)] == growing[: growing.index(LENGTH)]
    assert not result.model._forward_pre_hooks
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in result.model.blocks)
    assert list(result.model.state_dict()) == list(windows.default_model().state_dict())


@pytest.mark.parametrize(
    "pace",
    [
        {"values": [20, 60, 100], "until": [0.2, 0.5]},
        {"difficulty": "value", "start": 6, "end": 16, "pacing": "linear"},
    ],
    ids=["discrete", "value"],
)
def test_metrics_of_your_own_and_other_paces(texts: Path, pace: Mapping[str, Any]) -> None:
    task = corpus(texts, "lines")
    step = Curriculum(
        metrics={"sequence_length+vocabulary_rarity": {}, "letters": dict(pace)},
        own={"letters": lambda batch: batch["attention_mask"].sum(1)},
        postprocess="longest",
    )
    _, job = plan_of(task, [step])
    batches = job.training.batch_sampler(job.train, 4, 0)
    batches.begin(3, None, 1)
    lengths = np.array([len(job.train[i]) for i in range(len(job.train))])
    assert np.array_equal(batches.curriculum["letters"].index.sample_to_metric, lengths)
    drawn = [lengths[part].max() for epoch in range(3) for part in batches.epoch_batches(epoch)]
    assert drawn[0] <= np.sort(lengths)[int(0.3 * len(lengths))] < np.median(lengths) <= max(drawn[-4:])
    assert fitted(task, [step], Train(max_steps=3, batch_size=4)).steps == 3


# --- resuming


@pytest.mark.parametrize("deadly", [1, 4])
def test_a_killed_training_ends_as_one_that_was_not(windows: SmallCorpus, deadly: int) -> None:
    """Sampler, dropping, clock and noise, under accumulation, within an epoch and at its end."""
    whole = fitted(windows, ALL)
    keeper = DeadlyKeeper(deadly)
    with pytest.raises(Killed):
        fitted(windows, ALL, progress=keeper)
    again = fitted(windows, ALL, progress=keeper)
    assert same(again.model, whole.model)
    assert again.curves == whole.curves
    assert again.figures == whole.figures
    assert not same(fitted(windows, ALL[:1]).model, whole.model)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_an_analysis_is_kept_by_the_store_and_goes_on_after_a_kill(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis.DataAnalyzer.__init__, "__kwdefaults__",
                        {**analysis.DataAnalyzer.__init__.__kwdefaults__, "shard_size": 16})  # fmt: skip
    mapped: list[int] = []
    real = analysis._map_shard

    def counted(common: Any, jobs: Any, shard: int, *limits: int) -> None:
        mapped.append(shard)
        real(common, jobs, shard, *limits)
        if len(mapped) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(analysis, "_map_shard", counted)
    step = Curriculum(metrics={"sequence_length": {}})

    def applied() -> Any:
        job = begin(corpus(texts, "lines"), seed=1, store=Store(tmp_path / "store"))
        return step.apply(job)

    deadly = 2
    assert in_child(applied) == -signal.SIGKILL
    deadly = 0
    applied()
    assert 0 not in mapped
    assert 2 in mapped
    mapped.clear()
    applied()
    assert not mapped


# --- composition


def test_three_economies_and_two_more_in_one_recipe(windows: SmallCorpus) -> None:
    steps = [
        *ALL[:2],
        Leap(rho=0.1),
        BlockPrune(sparsity=0.5, exclude=("head",)),
        Train(id="sparse", epochs=2, batch_size=4),
        Shrink(),
        sparing.Quantize(goal="bytes", max_loss=1.0, samples=8),
    ]
    ledger = sparing.run(
        task=windows, steps=steps, meter={"min_seconds": 0, "max_seconds": 0.1, "memory": False}
    ).ledger
    figures = ledger.rows[4].figures
    assert figures["layer tokens saved"].value > 0.1
    assert figures["operations saved in blocks"].how == "derived"
    assert "sparsity" in ledger.rows[4].curves
    assert "tokens kept" in ledger.rows[4].curves


def test_bf16(windows: SmallCorpus) -> None:
    result = fitted(windows, ALL, Train(max_steps=3, batch_size=4, precision="bf16-mixed"))
    assert result.steps == 3
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([Curriculum(), Curriculum(id="again"), Train()], "batch_sampler"),
        ([TokenLr(), Train(scheduler="cosine")], "scheduler"),
        ([TokenLr(), BlockPrune(), Train(), Shrink()], "scheduler"),
        ([DropTokens(), DropTokens(id="again"), Train()], "dropping of tokens"),
        ([DropTokens()], "training"),
    ],
    ids=["two samplers", "two schedules", "rewound", "two droppings", "no training"],
)
def test_what_does_not_go_together_is_refused_in_planning(
    windows: SmallCorpus, steps: Sequence[Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        sparing.run(task=windows, steps=steps)


@pytest.mark.parametrize("step", [DropTokens(), TokenLr()], ids=["drop_tokens", "token_lr"])
def test_models_without_blocks_of_tokens_are_refused(step: Any) -> None:
    with pytest.raises(IncompatibleStep, match="needs a model of equal blocks"):
        step.apply(begin(tiny_task(), seed=0))


@pytest.mark.parametrize(
    "step",
    [Curriculum(), Curriculum(metrics={}, postprocess="truncate"), Curriculum(metrics={"sequence_length": {}})],
    ids=["rarity", "truncate", "length"],
)
def test_tasks_without_tokens_are_refused(step: Any) -> None:
    with pytest.raises(RecipeError, match=r"sequences of tokens, and the task '.*' has none"):
        sparing.run(task=tiny_task(), steps=[step, Train()])


def test_data_of_one_length_cannot_be_ordered_by_it(windows: SmallCorpus) -> None:
    with pytest.raises(NoEffect, match=r"sequence_length is 17 for all .* vocabulary_rarity"):
        Curriculum(metrics={"sequence_length": {}}).apply(begin(windows, seed=0))


@pytest.mark.parametrize(
    ("collate", "postprocess", "says"),
    [
        (lambda ids: ((ids, ids > 0), ids), "truncate", "more than tokens and labels in it"),
        (lambda ids: (ids, ids[:, 0]), "reshape", r"cannot be done to the batches of .*: '1' is of shape \(4,\)"),
    ],
    ids=["places", "one label each"],
)
def test_batches_that_cannot_be_cut_are_refused(
    windows: SmallCorpus, monkeypatch: pytest.MonkeyPatch, collate: Any, postprocess: Any, says: str
) -> None:
    monkeypatch.setattr(windows, "collate", lambda items: collate(torch.stack(items)))
    with pytest.raises(IncompatibleStep, match=says):
        Curriculum(metrics={}, postprocess=postprocess).apply(begin(windows, seed=0))


def test_a_first_step_without_samples_is_refused_at_once(texts: Path) -> None:
    step = Curriculum(metrics={"sequence_length": {"difficulty": "value", "start": 0, "end": 9}})
    with pytest.raises(sparing.DataError, match="releases no sample"):
        step.apply(begin(corpus(texts, "lines"), seed=0))


def test_layers_that_cannot_drop_are_refused(windows: SmallCorpus) -> None:
    job = begin(windows, seed=0)
    refused = [
        (DropTokens(layers=(0,)), "the first of 4"),
        (DropTokens(layers=(9,)), "no layer 9"),
        (DropTokens(layers=(1, 1)), "twice"),
        (DropTokens(stack="bloks"), "Did you mean 'blocks'"),
    ]
    for step, says in refused:
        with pytest.raises(IncompatibleStep, match=says):
            step.apply(job)
    assert not any(block._forward_pre_hooks for block in job.model.blocks)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"metrics": {}}, "nothing would be paced"),
        ({"metrics": {"rarity": {}}}, "no metric 'rarity'"),
        ({"metrics": {"vocabulary_rarity": {"end": 50}}}, "percentiles end at 100"),
        ({"metrics": {"vocabulary_rarity": {"strat": 5}}}, "Did you mean 'start'"),
        ({"metrics": {"vocabulary_rarity": {"pacing": "liner"}}}, "Did you mean 'linear'"),
        ({"metrics": {"vocabulary_rarity": {"over": 0.5, "steps": 9}}}, "say the same thing"),
        ({"metrics": {"vocabulary_rarity": {"pacing": "linear", "degree": 2}}}, "degree cannot be said"),
        ({"metrics": {"vocabulary_rarity": {"over": 2}}}, "over = 2"),
        ({"metrics": {"vocabulary_rarity": {"values": [10, 100]}}}, "1 max_steps|n − 1"),
        ({"metrics": {"sequence_length": {"difficulty": "value"}}}, "needs start and end"),
        ({"length": {"start": 3}}, "is for postprocess"),
        ({"own": {"mine": 3}}, "a function or DifficultyMetric"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        Curriculum(**fields)


def test_a_pace_reaches_its_end_in_its_share() -> None:
    pace = paced({"over": 0.5, "degree": 2}, 100, 10, 100, "x")
    assert (pace(50), pace(49) < 100, pace(0)) == (100, True, 10)
    steps = paced({"values": [1, 2, 3], "until_steps": [4, 8]}, 100, 0, 0, "x")
    assert [steps(t) for t in (4, 5, 9)] == [1, 2, 3]
    with pytest.raises(InvalidValue, match="budget = 5 and share"):
        TokenLr(budget=5, share=0.5)
    with pytest.raises(InvalidValue, match="start = 8, end = 4"):
        DropTokens(start=8, end=4)


# --- in a Lightning script


class Script(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Gpt(12, 8, dim=8, depth=4, heads=2)

    def training_step(self, batch: Any, number: int) -> Tensor:
        ids = batch[0]
        return cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def cut(batch: Any, difficulties: Mapping[str, float]) -> Any:
    return [sparing.truncate_batch(batch[0], int(difficulties["length"]))]


def scripted(folder: Path, last: int | None = None, checkpoint: Path | None = None) -> tuple[nn.Module, Any]:
    """A whole training, or one that is saved and ends after ``last`` batches."""
    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randint(0, 12, (20, 9), generator=draw))
    sampler = CurriculumSampler({"length": CurriculumMetric(linear(3, 8, 6), None, "value")}, 4, 8, samples=20)
    loader = DataLoader(CurriculumItems(data), batch_sampler=sampler, collate_fn=CurriculumCollate(cut), num_workers=0)

    class End(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if last is not None and trainer.global_step == last:
                trainer.save_checkpoint(folder / "end.ckpt")
                trainer.should_stop = True

    count = TokenCount()
    made = [CurriculumCallback(sampler), TokenDroppingCallback(linear(2, 8, 6), kind="decoder"), count,
            TokenLRCallback(decay=150), End()]  # fmt: skip
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=made,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module = Script()
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return module.model, count.counter


@pytest.mark.filterwarnings("ignore")
def test_callbacks_serve_scripts_and_go_on_from_checkpoints(tmp_path: Path) -> None:
    whole, counted = scripted(tmp_path)
    assert counted.steps == 8
    assert counted.tokens == planned_tokens(8, 4, 8, 4, 2, linear(3, 8, 6), linear(2, 8, 6)).tokens
    assert not any(block._forward_pre_hooks for block in whole.blocks)
    scripted(tmp_path, 3)
    rest, again = scripted(tmp_path, None, tmp_path / "end.ckpt")
    assert again.state_dict() == counted.state_dict()
    assert same(rest, whole)


def test_a_torch_that_no_longer_tells_the_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.raises(sparing.SparingError, match=r"_current_graph_task_id is gone. Use an earlier torch"):
        sparing.drop_tokens(Script().model, linear(2, 8, 6), kind="decoder")


def test_a_bar_of_the_analysis_grows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int, str]] = []

    class Drawn:
        due = True

        def draw(self, *told: Any) -> None:
            drawn.append(told)

        def stop(self) -> None:
            drawn.append((-1, -1, "stopped"))

    monkeypatch.setattr(analysis, "Bar", Drawn)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(analysis._with_bar("abc", "at work")) == ["a", "b", "c"]
    assert drawn == [(0, 3, "at work"), (1, 3, "at work"), (2, 3, "at work"), (-1, -1, "stopped")]


def test_callbacks_say_what_they_lack() -> None:
    with pytest.raises(InvalidValue, match="needs a budget"):
        TokenLRCallback()
    with pytest.raises(InvalidValue, match="network = 'net': Script has no such module"):
        TokenDroppingCallback(linear(2, 8, 6), network="net").on_fit_start(None, Script())
    with pytest.raises(InvalidValue, match="give it the loader's sampler"):
        CurriculumCallback().on_fit_start(None, Script())
