"""Schedules, layer-wise decay, mixing and few labels: formulas, refusals, and the steps on small images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from relation_cases import LEARNING, TEACHING, task_of

import sparing
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue
from sparing.core.pipeline import begin
from sparing.data.augmentation import ColourJitter, HorizontalFlip, PairedImages
from sparing.data.folders import read_images
from sparing.distillation.finetuning import FineTune, Mix, first_per_class, layer_decay_groups
from sparing.distillation.pretraining import Pretrain, half_cosine, half_cosine_scheduler, scaled_lr
from sparing.models.mae import MAEViT

SMALL = {"epochs": 2, "batch_size": 12, "lr": 0.01, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


# --- schedule


@given(st.floats(0, 10), st.floats(0, 4), st.floats(0, 1e-3))
def test_the_schedule_climbs_and_falls(epoch: float, warmup: float, floor: float) -> None:
    value = half_cosine(epoch, 1e-3, warmup, 10, floor)
    assert 0 <= value <= 1e-3 * (1 + 1e-12)
    assert half_cosine(10, 1e-3, warmup, 10, floor) == pytest.approx(floor, abs=1e-12)
    assert half_cosine(warmup, 1e-3, warmup, 10, floor) == pytest.approx(1e-3)


def test_a_scheduler_keeps_the_ratio_of_groups() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 1.0}])
    scheduler = half_cosine_scheduler(1.0, epochs=4, warmup=1, floor=0.1)(optimizer, 8)  # two steps an epoch
    rates = []
    for _ in range(9):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [rate[1] for rate in rates] == pytest.approx([half_cosine(e / 2, 1.0, 1, 4, 0.1) for e in range(9)])
    assert [rate[0] for rate in rates] == pytest.approx([rate[1] / 2 for rate in rates])
    assert rates[0] == [0, 0]


def test_the_rule_for_large_batches() -> None:
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert Pretrain(batch_size=64).rate == pytest.approx(3.75e-5)
    assert Pretrain(batch_size=64, accumulate=4).rate == pytest.approx(1.5e-4)
    assert FineTune(batch_size=1024).rate == pytest.approx(2e-3)
    assert FineTune(lr=0.5).rate == 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: half_cosine(0, 1, 5, 5), "warmup = 5 epochs of 5"),
        (lambda: half_cosine(0, 1, 0, 5, 2), "floor = 2"),
        (lambda: half_cosine(-1, 1, 0, 5), "epoch = -1"),
        (lambda: layer_decay_groups(MAEViT(), layer_decay=0), "layer_decay = 0"),
        (lambda: layer_decay_groups(MAEViT(), weight_decay=-1), "weight_decay = -1"),
        (lambda: layer_decay_groups(torch.nn.Linear(2, 2)), "Linear has no blocks"),
        (lambda: Mix(0, 0, 3), "mixup = 0, cutmix = 0"),
        (lambda: first_per_class(np.array([0, 0, 1]), 2, 0), "labels_per_class = 2; class 1 has 1"),
        (lambda: Pretrain(epochs=3, warmup_epochs=3), "warmup_epochs = 3"),
        (lambda: Pretrain(scheduler="cosine"), "scheduler = 'cosine' has no place here"),
        (lambda: Pretrain(early_stopping=1), "early_stopping = 1"),
        (lambda: Pretrain(decoder_dim=18, decoder_heads=1), "decoder_dim = 18"),
        (lambda: Pretrain(scale=(0.5, 0.2)), "0.5, 0.2"),
        (lambda: Pretrain(unlabelled=Path("nowhere")), "unlabelled = 'nowhere'"),
        (lambda: Pretrain(mask_ratio=1.0), "mask_ratio = 1.0"),
        (lambda: FineTune(decay="all"), "decay = 'all'"),
        (lambda: FineTune(warmup_steps=3), "warmup_steps = 3"),
    ],
)
def test_what_is_refused(call: Any, words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        call()


# --- groups, mixing, few labels


def test_rates_fall_towards_the_patches() -> None:
    model = MAEViT(depth=3)
    model.blocks[0].mlp.fc1.bias.requires_grad_(False)
    groups = layer_decay_groups(model, 0.1, 0.5, lr=1.0)
    of = {name: group for group in groups for name in group["names"]}
    assert "blocks.0.mlp.fc1.bias" not in of
    assert len(of) == len(list(model.parameters())) - 1
    for name, lr, decay in (
        ("pos_embed", 0.5**4, 0),
        ("cls_token", 0.5**4, 0),
        ("patch_embed.proj.weight", 0.5**4, 0.1),
        ("blocks.0.attn.qkv.weight", 0.5**3, 0.1),
        ("blocks.2.norm1.weight", 0.5, 0),
        ("fc_norm.weight", 1, 0),
        ("head.weight", 1, 0.1),
    ):
        assert (of[name]["lr"], of[name]["lr_scale"], of[name]["weight_decay"]) == (lr, lr, decay), name
    torch.optim.AdamW(groups)


@given(st.integers(0, 40), st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]))
def test_mixed_labels_say_what_is_in_the_image(seed: int, alphas: tuple[float, float]) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    images = torch.eye(4)[:, :, None, None].expand(-1, -1, 6, 5).contiguous()  # channel k is 1 in images of class k
    torch.manual_seed(seed)
    mixed, targets = Mix(*alphas, 4)((images, labels))
    torch.testing.assert_close(mixed.mean((2, 3)), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert torch.equal(images.mean((2, 3)), torch.eye(4))  # the batch it was given is as it was


def test_few_labels_are_a_growing_set() -> None:
    labels = np.array([0, 1, 2] * 20)
    few, more = first_per_class(labels, 2, 5), first_per_class(labels, 7, 5)
    assert np.bincount(labels[few]).tolist() == [2, 2, 2]
    assert set(few.tolist()) < set(more.tolist())
    assert not np.array_equal(few, first_per_class(labels, 2, 6))


# --- images without labels


def test_two_views_share_their_cuts_and_not_their_colours(tmp_path: Path) -> None:
    images = task_of().splits(None).train
    pairs = PairedImages(images, (HorizontalFlip(1.0),), (), (0.0,) * 3, (1 / 255,) * 3)
    first, second = pairs.batch([0, 1])
    plain, _ = images.batch([0, 1])
    np.testing.assert_allclose(second, plain[..., ::-1], atol=1e-6)
    np.testing.assert_allclose(first, images.pixels([0, 1])[:, :, ::-1].transpose(0, 3, 1, 2), atol=1e-3)
    np.random.seed(0)
    coloured = PairedImages(images, (HorizontalFlip(1.0),), (ColourJitter(),))
    first, second = coloured.batch([0, 1])
    np.testing.assert_allclose(first, plain[..., ::-1], atol=1e-6)
    assert not np.allclose(first, second)
    assert len(coloured.__getitems__([0, 1, 2])) == 3
    prints = {view.fingerprint() for view in (images, pairs, coloured, PairedImages(images, (HorizontalFlip(1.0),)))}
    assert len(prints) == 4
    np.testing.assert_array_equal(pairs.subset([1]).batch([0])[0], pairs.batch([1])[0])
    with pytest.raises(InvalidValue, match="both or neither"):
        PairedImages(images, (HorizontalFlip(),), mean=(0.0,) * 3)


def test_a_heap_of_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        read_images(tmp_path)
    for name in ("b.png", "deep/er/a.png", ".hidden/c.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("png"):
            Image.fromarray(np.full((20, 24, 3), 7, np.uint8)).save(tmp_path / name)
    assert read_images(tmp_path).names == ["b.png", "deep/er/a.png"]


# --- steps


def test_pre_training_does_not_look_at_labels(tmp_path: Path) -> None:
    from sparing.tasks.images.estimator import _InMemory

    one = task_of()
    images, labels = one._images, one._numbers
    states = []
    for number, given_labels in enumerate((labels, labels[::-1].copy())):
        job = begin(_InMemory(images, given_labels, ["a", "b", "c"], None), LEARNING, store=tmp_path / str(number))
        states.append(Pretrain(**SMALL).apply(job).model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    first = begin(task_of(), LEARNING, store=tmp_path / "0").model.state_dict()
    assert torch.equal(states[0]["pos_embed"], first["pos_embed"])  # the table is fixed
    assert not torch.equal(states[0]["blocks.0.attn.qkv.weight"], first["blocks.0.attn.qkv.weight"])
    assert torch.equal(states[0]["head.weight"], first["head.weight"])


def test_a_folder_of_images_without_labels(tmp_path: Path) -> None:
    for number in range(6):
        place = tmp_path / "heap" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 256, (20 + number, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    job = begin(task_of(), LEARNING, store=tmp_path / "store")
    after = Pretrain(unlabelled=tmp_path / "heap", **{**SMALL, "batch_size": 3}).apply(job)
    assert after.predictor is None
    assert job.notes.figures["images"].value == 6
    assert job.notes.figures["learning rate"].value == 0.01


def test_another_model_or_loss_is_refused(tmp_path: Path) -> None:
    job = begin(task_of(), {"name": "vit", "patch_size": 4, "dim": 8, "depth": 1, "heads": 1}, store=tmp_path)
    for step in (Pretrain(**SMALL), FineTune(epochs=1, lr=0.1)):
        with pytest.raises(IncompatibleStep, match='the model is a ViT; a "mae_vit" is needed'):
            step.apply(job)
    smoothed = sparing.SmoothLabels().apply(begin(task_of(), LEARNING, store=tmp_path))
    with pytest.raises(IncompatibleStep, match="which has no labels"):
        Pretrain(**SMALL).apply(smoothed)
    with pytest.raises(sparing.RecipeError, match="pre-trainable"):
        sparing.run(task=task_of(), model="convnet", steps=[Pretrain(**SMALL)])


def test_fine_tuning_sees_only_the_labels_it_is_given(tmp_path: Path) -> None:
    job = begin(task_of(), {**LEARNING, "heads": 1, "last_heads": 2}, store=tmp_path)
    step = FineTune(epochs=1, batch_size=6, lr=0.01, labels_per_class=2, heads=4, mixup=0.8, cutmix=1.0)
    after = step.apply(job)
    assert len(after.train) == 6
    assert np.bincount(after.train.labels).tolist() == [2, 2, 2]
    assert after.model.config.heads_of == (4, 4)
    assert not math.isnan(job.notes.curves["train_loss"][-1][1])
    again = FineTune(**{**step.config(), "labels_seed": 3}).apply(job.replace(store=job.store.child("again")))
    assert not np.array_equal(again.train.rows, after.train.rows)
    drop = FineTune(epochs=1, lr=0.01, drop_path=0.4).prepare(job)[0]
    assert [block.drop_path.rate for block in drop.blocks] == [0.0, 0.4]


def test_half_precision_and_several_batches_in_a_step(tmp_path: Path) -> None:
    job = begin(task_of(), TEACHING, store=tmp_path)
    more = {"precision": "bf16-mixed", "accumulate": 2, "accelerator": "cpu"}
    taught = Pretrain(**SMALL, **more).apply(job)
    assert job.notes.figures["optimizer steps"].value == 2  # two epochs of two batches
    step = sparing.DistilRelations(model=LEARNING, epochs=2, batch_size=12, lr=0.01, **more)
    student = step.apply(taught.replace(store=job.store.child("student")))
    tuned = FineTune(epochs=1, batch_size=12, lr=0.01, **more).apply(student.replace(store=job.store.child("tuned")))
    assert all(bool(tensor.isfinite().all()) for tensor in tuned.model.state_dict().values())
