"""Blocks of networks: detection beside hand-made graphs, boundaries, refusals, blocks that are the network again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparing.adaptive.blocks import Recorder, detect_blocks, extract_blocks
from sparing.adaptive.descendants import BlockZoo
from sparing.adaptive.lego import LegoModel
from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.models.convnet import ConvNet
from sparing.models.resnet import ResNet


class Twice(nn.Module):
    """Three convolutions, the second of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(self.again(self.first(x))))


class Forked(nn.Module):
    """Two convolutions that read the network's input beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.other(x)


def vgg8() -> ConvNet:
    return ConvNet(1, 10, 28, ((16, 16), (32, 32), (64, 64), (128,)), (2, 2, 2, 1))


def test_a_residual_network_has_a_block_for_each_of_its_own_and_leaves_the_stem() -> None:
    graph = extract_blocks(ResNet(1, 10), torch.zeros(2, 1, 28, 28))
    assert len(graph.blocks) == 8
    assert [len(block.prunable) for block in graph.blocks] == [1] * 8
    assert all("stem_0" not in block.nodes for block in graph.blocks)
    assert graph.blocks[0].input == "stem_0"
    assert graph.blocks[2].frozen == ("stages_1_0_conv2",)


def test_a_plain_network_has_blocks_of_two_and_leaves_the_last_convolution() -> None:
    graph = extract_blocks(vgg8(), torch.zeros(1, 1, 28, 28), 0.25)
    assert len(graph.blocks) == 3
    assert not any("stages_3_1" in block.nodes for block in graph.blocks)


def test_vgg16_has_the_published_blocks() -> None:
    model, x = ConvNet(3, 10, 32, (4,) * 5, (2, 2, 3, 3, 3)), torch.zeros(1, 3, 32, 32)
    for ratio, blocks, each in ((0.25, 4, 3), (0.125, 6, 2)):
        found = extract_blocks(model, x, ratio).blocks
        assert [len(block.prunable) + len(block.frozen) for block in found] == [each] * blocks
    ends = [f"stages.{stage}.{3 * (depth - 1) + (stage > 0)}" for stage, depth in enumerate((2, 2, 3, 3, 3))]
    starts = [f"stages.{stage}.{int(stage > 0)}" for stage in range(5)]
    found = extract_blocks(model, x, boundaries=list(zip(starts, ends, strict=True))).blocks
    assert [len(block.prunable) for block in found] == [1, 1, 2, 2, 2]


def test_blocks_and_frame_are_the_network_again() -> None:
    torch.manual_seed(0)
    model = ResNet(1, 10, (8, 16)).eval()
    x = torch.rand(3, 1, 12, 12)
    graph = extract_blocks(model, x, 0.3)
    kept = Recorder(graph.module, [name for b in graph.blocks for name in (b.input, b.output)]).record(x)
    for number, block in enumerate(graph.blocks):
        torch.testing.assert_close(graph.block_module(number)(kept[block.input]), kept[block.output])
    torch.testing.assert_close(LegoModel(BlockZoo.build(graph, (0, 0.5)))(x), model(x).detach())


def test_a_record_is_out_of_reach_of_operations_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True)).eval()
    x = torch.rand(2, 1, 4, 4)
    graph = extract_blocks(model, x, 1.0)
    (block,) = graph.blocks
    assert block.output == "_1"
    torch.testing.assert_close(Recorder(graph.module, [block.output]).record(x)["_1"], model[:2](x).detach())


def test_a_convolution_that_is_called_twice_counts_once_and_stays_in_one_block() -> None:
    (block,) = extract_blocks(Twice(), torch.zeros(1, 4, 5, 5), 0.5).blocks
    assert block.nodes == ("first", "again", "again_1")
    assert block.prunable == ("first",)
    (block,) = extract_blocks(Twice(), torch.zeros(1, 4, 5, 5), 1.0).blocks
    assert block.nodes == ("first", "again", "again_1", "last")
    assert block.prunable == ("first", "again")
    assert block.frozen == ("last",)


def test_a_convolution_that_is_also_called_elsewhere_is_in_no_block() -> None:
    names = ["a", "again", "b", "c", "again_1", "d"]
    inputs = [[], *([name] for name in names[:-1])]
    modules = ["a", "again", "b", "c", "again", "d"]
    given: Any = (names, ["Conv2d"] * 6, inputs, ["module"] * 6, 0.4)
    assert [block.nodes for block in detect_blocks(*given)] == [("a", "again"), ("b", "c"), ("again_1", "d")]
    assert [block.nodes for block in detect_blocks(*given, modules=modules)] == [("b", "c")]


def test_a_block_reads_one_tensor() -> None:
    with pytest.raises(IncompatibleStep, match="no block"):
        extract_blocks(Forked(), torch.zeros(1, 3, 5, 5), 1.0)


def test_boundaries_in_place_of_the_detection() -> None:
    pairs = [("stages.0.0", "stages.1.5"), ("stages.2.1", "stages.3.3")]
    graph = extract_blocks(vgg8(), torch.zeros(1, 1, 28, 28), boundaries=pairs)
    assert [len(block.prunable) + len(block.frozen) for block in graph.blocks] == [4, 3]


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([], "boundaries is empty"),
        ([("stages.0.0", "nowhere")], "'nowhere' is no node"),
        ([("stages.0.0", "stages.0.4"), ("stages.0.3", "stages.1.4")], "no stretch after the block before it"),
        ([("stages.0.3", "stages.0.0")], "no stretch"),
        ([("stages.0.0", "stages.0.2")], "none of its convolutions can lose filters"),
    ],
)
def test_wrong_boundaries_are_refused(boundaries: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        extract_blocks(vgg8(), torch.zeros(1, 1, 28, 28), boundaries=boundaries)


def test_boundaries_with_two_tensors_are_refused() -> None:
    with pytest.raises(InvalidValue, match="gives several tensors"):
        extract_blocks(ResNet(1, 10, (8, 16)), torch.zeros(1, 1, 12, 12), boundaries=[("stem.0", "stages.0.0.conv2")])


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan"), True, "0.5"])
def test_wrong_ratios_are_refused(ratio: Any) -> None:
    with pytest.raises(InvalidValue, match="max_ratio"):
        extract_blocks(vgg8(), torch.zeros(1, 1, 28, 28), ratio)


def test_a_network_of_one_convolution_is_refused() -> None:
    with pytest.raises(InvalidValue, match="1 convolutions"):
        extract_blocks(ConvNet(widths=(4,)), torch.zeros(1, 1, 28, 28))


def test_what_cannot_be_traced_is_refused_with_the_reason() -> None:
    class Fickle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(IncompatibleStep, match=r"at the node 'gt'.*blocks need a model whose way does not"):
        extract_blocks(Fickle(), torch.zeros(1, 1, 4, 4))


def test_a_list_that_is_no_graph_is_refused() -> None:
    with pytest.raises(InvalidValue, match="b reads 'c', which is no node before it"):
        detect_blocks(["a", "b", "c"], ["Conv2d"] * 3, [[], ["c"], []], ["module"] * 3, 0.5)
    with pytest.raises(InvalidValue, match="describe the same nodes"):
        detect_blocks(["a", "b"], ["Conv2d"], [[], []], ["module"] * 2, 0.5)
