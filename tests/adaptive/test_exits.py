"""Exits on traced networks: where they go, what they cost, stages that together are the whole; their training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparing.adaptive.exit_training import ExitTask, train_exits
from sparing.adaptive.exits import BoFExit, BoFPooling, MultiExitModel, attach_exits, exit_layers, traced
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect
from sparing.core.predictor import build_model
from sparing.core.training import Train
from sparing.models.convnet import ConvNet
from sparing.models.mobilenet import MobileNet
from sparing.testing import tiny_task

NARROW = {"stem_dim": 4, "embed_dims": [4, 6, 8, 8], "dim_heads": [2, 2, 4, 4], "window_sizes": [1, 1, 2, 1]}


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.around = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[0](self.first(x)).relu()
        return torch.relu(self.norms[1](self.second(inner)) + self.around(x))


def residual() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), Block(4, 4), nn.MaxPool2d(2), Block(4, 6)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()


def through(model: MultiExitModel, x: Tensor, places: list[int] | None = None) -> Tensor:
    """Logits by way of the stages."""
    values: tuple[Tensor, ...] = (x,)
    kept = list(range(len(model.exits))) if places is None else places
    found = []
    for i, stage in enumerate(model.stages(kept)):
        out = stage(*values)
        values = out if isinstance(out, tuple) else (out,)
        found.append(model.exits[kept[i]](values[0]) if i < len(kept) else values[0])
    return torch.stack(found, dim=1)


MODELS = {
    "convnet": lambda: ConvNet(1, 3, 16, widths=[4, 6], depths=[2, 1]).eval(),
    "residual": residual,
    "emo": lambda: build_model("emo", variant="0.14M", in_channels=1, num_classes=3, image_size=16, **NARROW).eval(),
    "mobilenet": lambda: MobileNet(in_channels=1, num_classes=3).eval(),
}


@pytest.mark.parametrize("share", [None, "stage"])
@pytest.mark.parametrize("name", MODELS)
def test_the_stages_are_the_whole_and_the_head_is_the_model(name: str, share: str | None) -> None:
    model, x = MODELS[name](), torch.randn(3, 1, 16, 16)
    before = copy.deepcopy(model.state_dict())
    multi = attach_exits(model, example=(x,), share=share).eval()  # type: ignore[arg-type]
    logits = multi(x)
    assert logits.shape == (3, len(multi.exits) + 1, 3)
    torch.testing.assert_close(logits[:, -1], model(x))
    torch.testing.assert_close(through(multi, x), logits)
    some = list(range(0, len(multi.exits), 2))
    torch.testing.assert_close(through(multi, x, some), logits[:, [*some, len(multi.exits)]])
    torch.testing.assert_close(through(multi, x, []), logits[:, -1:])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    torch.testing.assert_close(multi(torch.randn(5, 1, 16, 16)).shape, torch.Size([5, len(multi.exits) + 1, 3]))


def test_every_layer_that_ends_in_an_activation_has_an_exit() -> None:
    graph = traced(residual(), torch.randn(2, 1, 16, 16))
    assert exit_layers(graph) == ["_1", "relu", "relu_1", "relu_2", "relu_3"]
    multi = attach_exits(residual(), example=(torch.randn(2, 1, 16, 16),))
    inner = multi.stages()[2]  # starts inside a block: the map and the way around it are both alive
    assert sum(node.op == "placeholder" for node in inner.graph.nodes) == 2
    assert multi.layers[1] == "relu"
    only = attach_exits(residual(), ["relu_2", "_1"], example=(torch.randn(2, 1, 16, 16),))
    assert only.layers == ["_1", "relu_2"], "in the order they are computed"


def test_costs_are_true_multiply_accumulates() -> None:
    model = ConvNet(1, 3, 16, widths=[4, 6], depths=[2, 1]).eval()
    cost = attach_exits(model, example=(torch.randn(2, 1, 16, 16),), codewords=8).costs((torch.randn(1, 1, 16, 16),))
    assert cost.layer_macs == (256 * 9 * 4, 256 * 9 * 16, 64 * 9 * 24, 6 * 3)
    assert cost.exit_macs == tuple(p * c * 8 + 8 * 4 * 8 + 8 * 3 for p, c in ((256, 4), (256, 4), (64, 6)))
    assert cost.round_macs == 9


def test_pooling_is_written_as_on_the_sheet() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    two, one = BoFPooling(3, 7, 2), BoFPooling(3, 7, variant=1, horizon=2)
    assert [two.a.item(), two.c.item()] == [1, 0]
    assert [one.n1.item(), one.n2.item()] == [7, 2]
    u = (torch.tanh(two.codebook(x)) + 1) / 2
    u = u / u.sum(1, keepdim=True)
    torch.testing.assert_close(two(x), nn.functional.adaptive_avg_pool2d(u, 2).flatten(1))
    assert one(x).shape == (2, 7 * 4), "a remainder is dropped"
    torch.testing.assert_close(two(x).reshape(2, 7, 4).sum(1), torch.ones(2, 4))
    exit_ = BoFExit(3, 5, codewords=7, pool=1)
    assert isinstance(exit_.hidden, nn.Identity)
    assert exit_(x).shape == (2, 5)


def test_shared_parts_are_shared() -> None:
    model = ConvNet(1, 3, 16, widths=[4, 6], depths=[2, 1]).eval()
    multi = attach_exits(model, example=(torch.randn(2, 1, 16, 16),), share="stage")
    first, second, third = multi.exits
    assert first.pooling.codebook is second.pooling.codebook is not third.pooling.codebook
    assert first.classifier is third.classifier
    assert first.hidden is third.hidden
    assert first.pooling.horizon == 8


@pytest.mark.parametrize("frozen", [True, False])
def test_training_moves_the_exits_and_only_then_the_network(frozen: bool) -> None:
    task = tiny_task()
    splits = task.splits(None)
    model = task.default_model().eval()
    multi = attach_exits(model, example=task.example_input(2))
    x = task.example_input(4)[0]
    before = multi.eval()(x).detach()
    result = train_exits(
        multi, task, splits.train, None, Train(epochs=2, batch_size=16, lr=1e-2), freeze_backbone=frozen
    )
    after = multi.eval()(x).detach()
    assert not torch.allclose(before[:, 0], after[:, 0])
    assert torch.equal(before[:, -1], after[:, -1]) == frozen
    assert result.steps > 0


def test_losses_of_the_baselines() -> None:
    task = tiny_task()
    outputs, batch = torch.randn(4, 3, 3), (torch.zeros(4), torch.tensor([0, 1, 2, 0]))
    losses = [task.loss(outputs[:, i], batch) for i in range(3)]
    torch.testing.assert_close(ExitTask(task).loss(outputs, batch), sum(losses))
    patience = ExitTask(task, "patience").loss(outputs, batch)
    torch.testing.assert_close(patience, (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6)
    sdn = ExitTask(task, "sdn", (0.3, 0.7))
    assert sdn.head_weights(3) == [0.01, 0.01, 1.0]
    sdn.progress = 1.0
    assert sdn.head_weights(3) == pytest.approx([0.3, 0.7, 1.0])
    with pytest.raises(InvalidValue, match="'most'"):
        ExitTask(task, "most")  # type: ignore[arg-type]


def test_sdn_weights_rise_while_training_goes_on() -> None:
    task = tiny_task()
    multi = attach_exits(task.default_model(), example=task.example_input(2))
    seen: list[float] = []
    plain = ExitTask.head_weights

    def watch(self: ExitTask, heads: int) -> list[float]:
        seen.append(self.progress)
        return plain(self, heads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExitTask, "head_weights", watch)
        train_exits(multi, task, task.splits(None).train, None, Train(epochs=2, batch_size=16), weights="sdn")
    assert seen[0] == 0
    assert seen[-1] == 1
    assert seen == sorted(seen)


class Values(nn.Module):
    """Goes another way for bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        return y if x.mean().item() > 0 else -y


@pytest.mark.parametrize(
    ("model", "layers", "named"),
    [
        (Values(), "all", "Values cannot be traced.*item"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "all", r"logits \(N, classes\)"),
    ],
)
def test_networks_that_cannot_have_exits(model: nn.Module, layers: str, named: str) -> None:
    with pytest.raises(IncompatibleStep, match=named):
        attach_exits(model, example=(torch.randn(2, 1, 16, 16),))


def test_a_network_without_a_place() -> None:
    with pytest.raises(NoEffect, match=r"no place for an exit.*a convolution"):
        attach_exits(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), example=(torch.randn(2, 1, 16, 16),))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layers": ["stages_9"]}, "stages_9.*stages_0_2"),
        ({"layers": []}, r"layers = \[\]"),
        ({"layers": "some"}, "'some'"),
        ({"num_classes": 1}, "num_classes = 1"),
        ({"codewords": 0}, "codewords = 0"),
    ],
)
def test_refusals(fields: dict[str, object], named: str) -> None:
    model = ConvNet(1, 3, 16, widths=[4, 6], depths=[2, 1]).eval()
    with pytest.raises(InvalidValue, match=named):
        attach_exits(model, example=(torch.randn(2, 1, 16, 16),), **fields)  # type: ignore[arg-type]
