"""Descendants: filters that leave together, against blocks in which they are only silenced; distillation, profile."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparing.adaptive.block_distillation import distill_blocks
from sparing.adaptive.block_profile import environments, profile_accuracy, profile_blocks, profile_latency
from sparing.adaptive.blocks import extract_blocks
from sparing.adaptive.descendants import BlockZoo, kept_filters, prune_filters
from sparing.adaptive.lego import LegoModel
from sparing.core.errors import DataError, InvalidValue, NoEffect, TrainingDiverged
from sparing.core.store import Progress
from sparing.models.resnet import ResNet


class Added(nn.Module):
    """Two prunable convolutions that meet in a sum, with a depth-wise one and a pool behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.norm, self.deep = nn.BatchNorm2d(10), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(10, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(torch.relu(self.deep(self.norm(self.a(x) + self.b(x))))))


class Joined(nn.Module):
    """Two prunable convolutions side by side, then one transposed, then one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 8, 1)
        self.up, self.last = nn.ConvTranspose2d(14, 10, 2, stride=2), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.relu(self.up(torch.cat([self.a(x), self.b(x)], 1))))


class Skipped(nn.Module):
    """A convolution whose channels meet the block's input in a sum: they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(x + self.a(x))))


class Again(nn.Module):
    """A convolution called twice: what it reads and what it gives are one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.b(self.a(x))))))


def silenced(block: nn.Module, made: nn.Module, readers: dict[str, Tensor]) -> nn.Module:
    """The block, whose readers do not see the channels that left."""
    quiet = copy.deepcopy(block)
    for name, left in readers.items():
        layer: Any = quiet.get_submodule(name)
        with torch.no_grad():
            (layer.weight if isinstance(layer, nn.ConvTranspose2d) else layer.weight.transpose(0, 1))[left] = 0
    return quiet


def left(scores: Tensor, sparsity: float) -> Tensor:
    gone = torch.ones(len(scores), dtype=torch.bool)
    gone[kept_filters(scores, sparsity)] = False
    return gone


def l1(layer: Any) -> Tensor:
    weight = layer.weight.detach()
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).abs().flatten(1).sum(1)


def compare(block: nn.Module, prunable: Sequence[str], channels: int, readers: dict[str, Tensor], s: float) -> Any:
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.weight, 0.5, 2)
    block.eval()
    x = torch.rand(2, channels, 6, 6)
    made = prune_filters(block, prunable, x[:1], s)
    torch.testing.assert_close(made(x), silenced(block, made, readers)(x), rtol=1e-5, atol=1e-5)
    return made


@pytest.mark.parametrize("s", [0.2, 0.5, 0.9])
def test_channels_that_meet_in_a_sum_leave_jointly(s: float) -> None:
    torch.manual_seed(0)
    block = Added()
    gone = left(l1(block.a) + l1(block.b), s)
    made = compare(block, ["a", "b"], 3, {"last": gone}, s)
    stay = 10 - int(gone.sum())
    assert made.a.out_channels == made.b.out_channels == made.norm.num_features == made.deep.groups == stay
    assert made.deep.weight.shape == (stay, 1, 3, 3)
    assert made.last.weight.shape == (4, stay, 3, 3)


@pytest.mark.parametrize("s", [0.3, 0.6])
def test_channels_that_are_joined_and_transposed_convolutions(s: float) -> None:
    torch.manual_seed(0)
    block = Joined()
    read = torch.cat([left(l1(block.a), s), left(l1(block.b), s)])
    made = compare(block, ["a", "b", "up"], 3, {"up": read, "last": left(l1(block.up), s)}, s)
    assert made.up.weight.shape == (14 - int(read.sum()), 10 - int(10 * s), 2, 2)
    assert made.up.in_channels == 14 - int(read.sum())


def test_channels_that_meet_the_blocks_input_stay() -> None:
    torch.manual_seed(0)
    block = Skipped()
    made = compare(block, ["a", "b"], 8, {"last": left(l1(block.b), 0.5)}, 0.5)
    assert (made.a.out_channels, made.b.in_channels, made.b.out_channels) == (8, 8, 6)


def test_a_convolution_that_is_called_twice() -> None:
    torch.manual_seed(0)
    block = Again()
    gone = left(l1(block.a) + l1(block.b), 0.4)
    made = compare(block, ["a", "b"], 3, {"b": gone, "last": gone}, 0.4)
    assert made.b.weight.shape == (6, 6, 1, 1)


def test_what_is_not_known_keeps_its_channels() -> None:
    block = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).eval()
    assert prune_filters(block, ["0"], torch.rand(1, 3, 4, 4), 0.5).get_parameter("0.weight").shape[0] == 8


def test_kept_filters() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0])
    assert kept_filters(scores, 0.2).tolist() == [0, 2, 4]  # a tie leaves as a whole
    assert kept_filters(scores, 0.19).tolist() == [0, 1, 2, 3, 4]
    assert kept_filters(torch.ones(4), 0.5).tolist() == [0]  # the largest stays
    assert kept_filters(torch.ones(1), 0.9).tolist() == [0]


# --- zoo


def small_zoo(**options: Any) -> BlockZoo:
    torch.manual_seed(0)
    graph = extract_blocks(ResNet(1, 4, (6, 10), 1), torch.zeros(2, 1, 8, 8), 0.5)
    return BlockZoo.build(graph, options.pop("sparsities", (0, 0.3, 0.6)), **options)


def test_a_zoos_figures() -> None:
    zoo = small_zoo()
    for b, row in enumerate(zoo.blocks):
        for s, module in enumerate(row):
            tensors = [*module.parameters(), *module.buffers()]
            assert zoo.bytes[b, s] == sum(t.numel() * t.element_size() for t in tensors)
    whole = zoo.graph.module
    assert zoo.frame_bytes + zoo.bytes[:, 0].sum() == sum(
        t.numel() * t.element_size() for t in (*whole.parameters(), *whole.buffers())
    )
    assert (np.diff(zoo.bytes, axis=1) < 0).all()
    assert (np.diff(zoo.macs, axis=1) < 0).all()
    assert zoo.options == 3 ** len(zoo.blocks)


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [
        ((0, 1.0), "sparsity = 1.0"),
        ((0, -0.1), "sparsity = -0.1"),
        ((0.2, 0.4), "0 first"),
        ((0, 0.4, 0.4), "each once"),
        ((), "0 first"),
        ((0, float("nan")), "sparsity = nan"),
    ],
)
def test_wrong_sparsities_are_refused(sparsities: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        small_zoo(sparsities=sparsities)


def test_sparsities_too_small_to_take_a_filter_have_no_effect() -> None:
    with pytest.raises(NoEffect, match="larger sparsities"):
        small_zoo(sparsities=(0, 0.01))


def test_descendants_of_another_kind() -> None:
    def halved(block: nn.Module, prunable: Sequence[str], x: Tensor, sparsity: float) -> nn.Module:
        return block.half().float() if sparsity < 0.5 else prune_filters(block, prunable, x, 0.5)

    zoo = small_zoo(make_descendant=halved)
    assert (zoo.bytes[:, 1] == zoo.bytes[:, 0]).all()
    assert (zoo.bytes[:, 2] < zoo.bytes[:, 0]).all()
    with pytest.raises(InvalidValue, match="is needed"):
        small_zoo(make_descendant=lambda *given: nn.AdaptiveAvgPool2d(1))


# --- distillation


def data(seed: int = 0) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(48, 1, 8, 8, generator=draw), torch.randint(0, 4, (48,), generator=draw)
    return DataLoader(TensorDataset(images, labels), 16, shuffle=True)


def test_descendants_learn_what_their_blocks_do_and_originals_stay() -> None:
    zoo = small_zoo()
    before = {key: t.clone() for key, t in zoo.graph.module.state_dict().items()}
    first = [copy.deepcopy(row[0].state_dict()) for row in zoo.blocks]
    losses = distill_blocks(zoo, data(), 8, 1e-2)
    assert (losses[:, 0] == 0).all()
    assert (losses[:, 1:, -1] < 0.7 * losses[:, 1:, 0]).all()
    assert all(torch.equal(t, before[key]) for key, t in zoo.graph.module.state_dict().items())
    for row, state in zip(zoo.blocks, first, strict=True):
        assert all(torch.equal(t, state[key]) for key, t in row[0].state_dict().items())
        assert not any(module.training for module in row)


def test_the_best_epochs_weights_are_kept() -> None:
    zoo, other = small_zoo(), small_zoo()
    calm = distill_blocks(zoo, data(), 3, 1e-3)
    # the fourth epoch has images of another size of numbers, and a far larger loss
    spoilt = distill_blocks(other, lambda epoch: data() if epoch < 3 else [torch.full((4, 1, 8, 8), 100.0)], 4, 1e-3)
    np.testing.assert_array_equal(spoilt[..., :3], calm)
    assert (spoilt[:, 1:, 3] > calm[:, 1:, 2]).all()
    assert all(torch.equal(t, other.state_dict()[key]) for key, t in zoo.state_dict().items())


def test_jobs_give_the_same() -> None:
    alone, apart = small_zoo(), small_zoo()
    np.testing.assert_array_equal(distill_blocks(alone, data(), 2), distill_blocks(apart, data(), 2, n_jobs=2))
    assert all(torch.equal(t, apart.state_dict()[key]) for key, t in alone.state_dict().items())


class Killed(Exception):
    pass


def test_it_goes_on_after_being_killed(tmp_path: Any) -> None:
    whole, cut = small_zoo(), small_zoo()
    expected = distill_blocks(whole, data(), 3)

    def killing(epoch: int) -> Any:
        if epoch == 2:
            raise Killed
        return data()

    with pytest.raises(Killed):
        distill_blocks(cut, killing, 3, progress=Progress(tmp_path))
    again, asked = small_zoo(), []

    def counted(epoch: int) -> Any:
        asked.append(epoch)
        return data()

    np.testing.assert_array_equal(distill_blocks(again, counted, 3, progress=Progress(tmp_path)), expected)
    assert asked == [2]
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in whole.state_dict().items())


def test_frozen_statistics_stay() -> None:
    zoo = small_zoo()
    before = {key: t for key, t in zoo.state_dict().items() if "running" in key}
    distill_blocks(zoo, data(), 1, freeze_bn=True)
    assert before
    assert all(torch.equal(t, zoo.state_dict()[key]) for key, t in before.items())


def test_wrong_arguments_of_the_distillation() -> None:
    zoo = small_zoo()
    for options, message in (({"epochs": 0}, "epochs = 0"), ({"lr": 0}, "lr = 0"), ({"n_jobs": 0}, "n_jobs = 0")):
        with pytest.raises(InvalidValue, match=message):
            distill_blocks(zoo, data(), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="no batch"):
        distill_blocks(zoo, [], 1)
    with pytest.raises(TrainingDiverged, match=r"block 0, sparsity 0\.3"):
        distill_blocks(zoo, [torch.full((4, 1, 8, 8), float("nan"))], 1)


def test_weights_go_out_and_in() -> None:
    zoo, other = small_zoo(), small_zoo()
    distill_blocks(zoo, data(), 1)
    other.load_state_dict(zoo.state_dict())
    x = torch.rand(2, 1, 8, 8)
    networks = LegoModel(zoo), LegoModel(other)
    for network in networks:
        network.apply([2] * len(zoo.blocks))
    torch.testing.assert_close(networks[0](x), networks[1](x), rtol=0, atol=0)
    with pytest.raises(InvalidValue, match="other descendants"):
        other.load_state_dict({})


# --- profile


def test_surroundings() -> None:
    assert environments(2, 5).tolist() == [[-1, -1], [1, 1], [4, 4]]
    assert environments(1, 2).tolist() == [[-1], [0], [1]]


def test_the_drop_is_the_mean_over_the_surroundings() -> None:
    zoo = small_zoo()
    weights = np.array([1.0, 10.0])[: len(zoo.blocks)]

    def figure(network: Any) -> float:
        return 100 - float(weights @ np.array(network.current) ** 2)

    accuracy, drops = profile_accuracy(zoo, figure)
    assert accuracy == 100
    np.testing.assert_allclose(drops, weights[:, None] * np.arange(3) ** 2)


def test_a_profile_of_a_small_network() -> None:
    zoo = small_zoo()
    found = profile_blocks(zoo, data(), runs=4)
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    assert found.accuracy == pytest.approx(float((zoo.graph.module(x).argmax(1) == y).float().mean()))
    assert (found.drops[:, 0] == 0).all()
    assert (found.rel[:, 0] == 0).all()
    assert (found.latency > 0).all()
    np.testing.assert_array_equal(found.bytes, zoo.bytes)


def test_latency_in_the_runtime_of_the_predictor() -> None:
    latency, rel, whole = profile_latency(small_zoo(), 3, 1, "onnxruntime")
    assert (latency > 0).all()
    assert whole > 0
    assert (rel < 1).all()
    with pytest.raises(InvalidValue, match="runs = 0"):
        profile_latency(small_zoo(), 0)


def test_profiling_data_without_samples() -> None:
    with pytest.raises(DataError, match="empty"):
        profile_accuracy(small_zoo(), [])
    with pytest.raises(InvalidValue, match="images and labels"):
        profile_accuracy(small_zoo(), [torch.zeros(2, 1, 8, 8)])
