from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparing.compression.pruning import (
    BlockMagnitudePruner,
    CubicSchedule,
    block_mask,
    block_scores,
    lock_pattern,
    prunable_layers,
    rewound_rate,
    sparsity_of,
)
from sparing.compression.pruning_lightning import BlockPruning
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect
from sparing.core.predictor import build_model


def by_definition(weight: np.ndarray, block: tuple[int, int], sparsity: float, score: str) -> np.ndarray:
    """The sheet's words, block by block."""
    r, c = block
    out, inputs = weight.shape
    scores = np.array(
        [
            [
                (
                    np.abs(weight[i : i + r, j : j + c]).mean
                    if score == "mean"
                    else np.abs(weight[i : i + r, j : j + c]).max
                )()
                for j in range(0, inputs, c)
            ]
            for i in range(0, out, r)
        ]
    )
    k = int(sparsity * scores.size + 1e-9)
    kept = scores > np.sort(scores, axis=None)[k - 1] if k else np.ones_like(scores, dtype=bool)
    return np.kron(kept, np.ones(block, dtype=bool))


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sparsity=st.floats(0, 0.99),
    score=st.sampled_from(["mean", "max"]),
    seed=st.integers(0, 99),
)
def test_the_mask_is_the_definition(rows, columns, block, sparsity, score, seed) -> None:
    draw = np.random.default_rng(seed)
    weight = draw.integers(-5, 6, (rows * block[0], columns * block[1])).astype(np.float32)  # with ties
    found = block_mask(torch.from_numpy(weight), block, sparsity, score).numpy()
    # means of whole numbers: in float32 as in float64 unless they differ by less than the last bit
    np.testing.assert_array_equal(found, by_definition(weight.astype(np.float32), block, sparsity, score))


def test_ten_blocks_lose_eight_and_ties_go() -> None:
    assert int(block_mask(torch.arange(1.0, 11).view(10, 1), (1, 1), 0.8).sum()) == 2  # 0.8 · 10 is 8, exactly
    assert int(block_mask(torch.arange(1.0, 11).view(10, 1), (1, 1), 0.3 * 1.0).sum()) == 7  # 0.3 · 10 < 3 in binary
    assert not block_mask(torch.ones(4, 4), (1, 1), 0.25).any()
    assert block_mask(torch.ones(4, 4), (1, 1), 0.0).all()
    weight = torch.tensor([[1.0, -4], [1, 0], [1, 0], [1, 0]])
    assert block_scores(weight, (4, 1), "mean").tolist() == [[1.0, 1.0]]
    assert block_scores(weight, (4, 1), "max").tolist() == [[1.0, 4.0]]


def test_wrong_arguments_say_the_numbers() -> None:
    with pytest.raises(InvalidValue, match=r"6 outputs × 3 inputs.*4 × 1"):
        block_mask(torch.ones(6, 3))
    with pytest.raises(InvalidValue, match=r"sparsity = 1\.0"):
        block_mask(torch.ones(4, 4), sparsity=1.0)
    with pytest.raises(InvalidValue, match=r"4 of 16 weights are NaN"):
        block_mask(torch.ones(4, 4).fill_diagonal_(torch.nan))
    with pytest.raises(InvalidValue, match=r"block = \(0, 1\)"):
        block_mask(torch.ones(4, 4), (0, 1))
    with pytest.raises(InvalidValue, match="score = 'median'"):
        block_mask(torch.ones(4, 4), score="median")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match=r"t0 = 5, t1 = 5"):
        CubicSchedule(5, 5)
    with pytest.raises(InvalidValue, match="begin = 9, end = 3"):
        CubicSchedule(0, 2, end=3, begin=9)
    with pytest.raises(InvalidValue, match="freq = 0"):
        CubicSchedule(0, 5, freq=0)
    with pytest.raises(InvalidValue, match="initial = 1"):
        CubicSchedule(0, 5, initial=1)


def test_the_schedule_is_cubic_and_due_at_its_times() -> None:
    schedule = CubicSchedule(2, 16, end=20, freq=3, initial=0.1)
    assert [t for t in range(24) if schedule.due(t)] == [2, 5, 8, 11, 14, 17, 20]
    assert schedule.sparsity(0, 0.8) == schedule.sparsity(2, 0.8) == pytest.approx(0.1)
    assert schedule.sparsity(9, 0.8) == pytest.approx(0.1 + 0.7 * (1 - 0.5**3))
    assert schedule.sparsity(16, 0.8) == schedule.sparsity(99, 0.8) == pytest.approx(0.8)


@given(steps=st.integers(2, 3000), ramp=st.floats(0.01, 0.99), end=st.floats(0.01, 0.99), every=st.floats(0.001, 0.99))
def test_a_schedule_over_any_training_reaches_its_target(steps, ramp, end, every) -> None:
    schedule = CubicSchedule.over(steps, ramp, max(ramp, end), every)
    due = [t for t in range(steps) if schedule.due(t)]
    assert schedule.sparsity(due[-1], 0.8) == pytest.approx(0.8)


def test_the_proportions_are_those_of_the_reference_and_one_step_is_too_few() -> None:
    assert CubicSchedule.over(100_000) == CubicSchedule(0, 50_000, 80_000, 1000)
    assert CubicSchedule.over(2) == CubicSchedule(0, 1, 1, 1)
    with pytest.raises(InvalidValue, match="1 optimizer steps is too short"):
        CubicSchedule.over(1)


def test_the_learning_rate_begins_anew_when_the_target_is_reached() -> None:
    rates = [rewound_rate(t, 200, 100, 0.05) for t in range(200)]
    assert rates[:100] == rates[100:]
    assert max(rates) == rates[5] == 1.0
    assert all(a < b for a, b in pairwise(rates[:6]))
    assert all(a > b for a, b in pairwise(rates[5:100]))
    assert 0 < rates[99] < 0.02
    with pytest.raises(InvalidValue, match="rewind = 200"):
        rewound_rate(0, 200, 200)


# --- which layers


def bert(**fields):
    told = {"vocab_size": 30, "dim": 8, "depth": 2, "heads": 2, "hidden": 16, "max_length": 6, **fields}
    return build_model("bert", **told)


def test_of_an_encoder_the_blocks_are_taken_and_nothing_else() -> None:
    taken, passed = prunable_layers(bert(pooler="tanh"))
    parts = ("query", "key", "value", "attention_out", "up", "down")
    assert list(taken) == [f"blocks.{i}.{part}" for i in range(2) for part in parts]
    assert passed == dict.fromkeys(("head.pooler", "head.classifier"), "outside the encoder's blocks")
    language, passed = prunable_layers(bert(head="masked_lm"))
    assert list(language) == list(taken)
    assert list(passed) == ["head.dense"]


def test_of_transformers_encoders_too() -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    taken, passed = prunable_layers(model)
    assert len(taken) == 12
    assert all(name.startswith("bert.encoder.layer.") for name in taken)
    assert set(passed) == {"bert.pooler.dense", "classifier"}
    distil = transformers.DistilBertForQuestionAnswering(
        transformers.DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
    )
    assert len(prunable_layers(distil)[0]) == 12
    pruner = BlockMagnitudePruner(model, sparsity=0.5)
    assert pruner.report().sparsity == pytest.approx(0.5)
    assert model(torch.ones(2, 5, dtype=torch.long)).logits.isfinite().all()
    pruner.apply_()
    lock_pattern(model)


def test_of_any_other_model_all_but_the_last() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    taken, passed = prunable_layers(model)
    assert list(taken) == ["2"]
    assert passed == {"4": "it gives the outputs", "0": "a convolution"}
    assert list(prunable_layers(model, convolutions=True)[0]) == ["0", "2"]
    assert prunable_layers(model, exclude=("2",))[1]["2"] == "excluded"
    with pytest.raises(InvalidValue, match=r"'5' matches no layer"):
        prunable_layers(model, exclude=("5",))


def test_shared_and_parametrised_weights_are_passed_over() -> None:
    one, two, three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    model = nn.Sequential(one, two, nn.utils.parametrizations.weight_norm(three), nn.Linear(4, 4), nn.Linear(4, 2))
    taken, passed = prunable_layers(model)
    assert list(taken) == ["3"]
    assert passed["0"] == "its weight is that of 1"
    assert passed["2"] == "it is parametrised already"


# --- in a loop of one's own


def loop(model: nn.Module, pruner: BlockMagnitudePruner | None, steps: int = 12) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 8, generator=draw)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def test_a_loop_prunes_to_the_target_and_folds() -> None:
    model = perceptron()
    pruner = BlockMagnitudePruner(model, sparsity=0.75, schedule=CubicSchedule(0, 6, 8, 2))
    seen = []
    for _ in range(3):
        loop(model, pruner, 3)
        seen.append(pruner.report().sparsity)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.75)
    masters = model[0].parametrizations.weight.original  # type: ignore[union-attr,index]
    assert int((masters == 0).sum()) == 0  # dense weights are kept until they are folded
    x = torch.randn(3, 8)
    before = model(x)
    pruner.apply_()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in perceptron().named_parameters()]
    assert type(model[0]) is nn.Linear
    report = pruner.report()
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert all(layer.pruned == 0.75 * layer.blocks for layer in report.layers)
    zeros = model[2].weight.view(4, 4, 16) == 0
    assert torch.equal(zeros.all(1), zeros.any(1))  # whole blocks of four outputs
    assert "4 (it gives the outputs)" in str(report)
    assert sparsity_of(model).layers[2].sparsity == 0


def test_a_block_comes_back_when_others_have_become_smaller() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2]]).expand(4, 2))
    pruner = BlockMagnitudePruner(model, sparsity=0.5, schedule=CubicSchedule(0, 1, 9, initial=0.5))
    assert pruner.report().layers[0].pruned == 1
    assert model[0].weight[:, 0].eq(0).all()
    with torch.no_grad():
        model[0].parametrizations.weight.original[:, 1] = 0.5  # type: ignore[index]
    pruner.step()
    assert model[0].weight[:, 1].eq(0).all()
    assert model[0].weight[:, 0].eq(1).all()


def test_pruned_weights_have_no_gradient() -> None:
    model = perceptron()
    BlockMagnitudePruner(model, sparsity=0.5)  # all at once
    model(torch.randn(4, 8)).sum().backward()
    grad = model[0].parametrizations.weight.original.grad  # type: ignore[index]
    assert grad is not None
    assert not bool(grad[model[0].weight == 0].any())
    assert bool(grad.any())


def test_convolutions_are_matrices_and_copies_are_independent() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    pruner = BlockMagnitudePruner(model, (4, 1), 0.5, CubicSchedule(0, 1, initial=0.5), convolutions=True)
    twin = copy.deepcopy(model)
    pruner.apply_()
    assert twin(torch.randn(1, 2, 3, 3)).shape == (1, 3)  # folding the one left the other whole
    matrix = model[0].weight.flatten(1)
    assert float((matrix == 0).float().mean()) == 0.5
    np.testing.assert_array_equal(np.kron((matrix[::4] != 0).numpy(), np.ones((4, 1), bool)), (matrix != 0).numpy())


def test_a_model_that_cannot_be_pruned_says_where_and_why() -> None:
    with pytest.raises(InvalidValue, match=r"2: a weight of 6 outputs × 16 inputs"):
        BlockMagnitudePruner(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.Linear(6, 1)))
    model = perceptron()
    with torch.no_grad():
        model[2].weight[3, 5] = torch.inf
    with pytest.raises(InvalidValue, match=r"2: 1 of 256 weights are NaN or infinite"):
        BlockMagnitudePruner(model)
    assert type(model[0]) is nn.Linear  # refused before anything was changed
    with pytest.raises(NoEffect, match=r"no layer of Linear to prune.*gives the outputs"):
        BlockMagnitudePruner(nn.Linear(4, 4))
    with pytest.raises(InvalidValue, match=r"sparsity = -0\.1"):
        BlockMagnitudePruner(perceptron(), sparsity=-0.1)
    again = perceptron()
    BlockMagnitudePruner(again, (4, 1))
    BlockMagnitudePruner(again, (4, 1))  # goes on with the masks it finds
    with pytest.raises(IncompatibleStep, match=r"0 has masks of blocks of \(4, 1\) already"):
        BlockMagnitudePruner(again, (1, 1))
    with pytest.raises(IncompatibleStep, match="0 has a mask already"):
        lock_pattern(again)


def test_weights_that_become_nan_are_named_at_the_step() -> None:
    model = perceptron()
    pruner = BlockMagnitudePruner(model)
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(InvalidValue, match="2: 1 of 256 weights"):
        pruner.step()


def test_a_locked_pattern_stays_through_a_training() -> None:
    model = perceptron()
    pruner = BlockMagnitudePruner(model, sparsity=0.5)
    loop(model, pruner, 3)
    pruner.apply_()
    zeros = [model[i].weight == 0 for i in (0, 2)]
    locked = lock_pattern(model)
    before = model[0].weight.detach().clone()
    loop(model, None)
    assert not torch.equal(model[0].weight, before)
    locked.apply_()
    assert all(torch.equal(model[i].weight == 0, zero) for i, zero in zip((0, 2), zeros, strict=True))
    assert locked.report().sparsity == pytest.approx(0.5)
    loop(model, None)  # without the lock they fill
    assert sparsity_of(model).sparsity < 0.1
    with pytest.raises(NoEffect, match=r"no pattern of zeros to lock.*0, 2 \(no weight is zero\)"):
        lock_pattern(perceptron())


def test_layers_that_begin_at_zero_are_not_locked() -> None:
    model = perceptron()
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[2].weight[0] = 0
    locked = lock_pattern(model)
    assert list(locked.masks) == ["2"]
    assert locked.passed_over["0"] == "all its weights are zero"


# --- in a Lightning script


def lightning_module(net: nn.Module):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch, number):
            return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module()


def test_a_script_of_ones_own_prunes_and_resumes(tmp_path) -> None:
    import lightning.pytorch as pl

    data = torch.utils.data.DataLoader(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)

    def trainer(epochs: int, *more):
        return pl.Trainer(
            max_epochs=epochs,
            callbacks=[BlockPruning(0.75, schedule=CubicSchedule(0, 12, 18, 1), network="net"), *more],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            accelerator="cpu",
        )

    whole = lightning_module(perceptron())
    trainer(2).fit(whole, data)
    assert type(whole.net[0]) is nn.Linear
    assert float((whole.net[0].weight == 0).float().mean()) == 0.75

    class Snapshot(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer(2, Snapshot()).fit(lightning_module(perceptron()), data)
    resumed = lightning_module(perceptron())
    trainer(2).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for one, other in zip(whole.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_share_that_is_pruned_from_the_start() -> None:
    import lightning.pytorch as pl

    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(float((pl_module.net[0].weight == 0).float().mean()))

    pruning = BlockPruning(0.75, schedule=lambda steps: CubicSchedule(4, 6, initial=0.25), network="net")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    data = torch.utils.data.DataLoader(torch.randn(40, 8), batch_size=4)
    pl.Trainer(max_epochs=1, callbacks=[pruning, Look()], enable_model_summary=False, **quiet).fit(
        lightning_module(perceptron()), data
    )
    assert seen[:5] == [0.25] * 5
    assert seen[7:] == [0.75] * 3


def test_a_callback_needs_the_network_and_a_length(tmp_path) -> None:
    import lightning.pytorch as pl

    with pytest.raises(InvalidValue, match="sparsity = 2"):
        BlockPruning(2)
    data = torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with pytest.raises(InvalidValue, match="network = 'model': Module has no such module"):
        pl.Trainer(max_steps=2, callbacks=[BlockPruning()], **quiet).fit(lightning_module(perceptron()), data)
    with pytest.raises(InvalidValue, match="no known length"):
        pl.Trainer(max_epochs=-1, callbacks=[BlockPruning(network="net")], **quiet).fit(
            lightning_module(perceptron()), data
        )
