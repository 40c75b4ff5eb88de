"""Rates of a backdoored network, outliers, and the layers that defences look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backdoor_cases import fresh, pictures
from torch import nn

from sparing.audits.backdoor.layers import block_ends, block_outputs, penultimate_features, predict, weight_layers
from sparing.audits.backdoor.metrics import Rate, backdoor_rates, mad_outliers
from sparing.core.errors import InvalidValue
from sparing.models.blocknet import AlexNet, BlockNet
from sparing.models.resnet import ResNet


def test_images_of_the_target_class_do_not_count_for_the_attack():
    labels = torch.tensor([0, 0, 1, 2])
    clean = torch.eye(3)[[0, 1, 1, 0]]
    triggered = torch.eye(3)[[0, 0, 0, 2]]
    rates = backdoor_rates(clean, triggered, labels, 0)
    assert (rates.cta, rates.asr, rates.asr_all, rates.null) == (Rate(2, 4), Rate(1, 2), Rate(3, 4), Rate(1, 2))
    assert rates.excess == 0
    low, high = Rate(9, 10).interval
    assert low == pytest.approx(0.5958, abs=1e-4)  # Wilson, by hand
    assert high == pytest.approx(0.9821, abs=1e-4)


def test_rates_over_nothing_are_refused():
    logits = torch.eye(3)
    with pytest.raises(InvalidValue, match="target = 3 is no class; 0 to 2"):
        backdoor_rates(logits, logits, torch.arange(3), 3)
    with pytest.raises(InvalidValue, match="all 3 images are of the target class 1"):
        backdoor_rates(logits, logits, torch.ones(3, dtype=torch.long), 1)
    with pytest.raises(InvalidValue, match="no images"):
        Rate(0, 0)


def test_outliers_need_five_values_that_differ():
    values = np.array([1.0, 10, 11, 12, 13, 40])
    assert mad_outliers(values, "lower").flagged == (0,)
    assert mad_outliers(values, "upper").flagged == (5,)
    left_out = mad_outliers(np.append(values, np.inf), "upper")
    assert left_out.flagged == (5,)
    assert np.isnan(left_out.index[-1])
    assert mad_outliers(np.array([1.0, 2, 3, 4, np.inf]), "lower") is None
    assert mad_outliers(np.array([5.0, 5, 5, 5, 1]), "lower") is None
    with pytest.raises(InvalidValue, match="'both'"):
        mad_outliers(values, "both")


def test_layers_are_found_in_the_order_of_the_input():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 3), nn.Linear(9, 4)
            self.unused = nn.Linear(1, 1)

        def forward(self, x):
            return self.last(self.first(x.flatten(1)))

    assert [name for name, _ in weight_layers(Crossed(), torch.zeros(1, 1, 3, 3))] == ["first", "last"]


@pytest.mark.parametrize(
    ("network", "ends"),
    [
        (BlockNet(1, 6, 12, 4, 2, "instance"), ["features.3", "features.7"]),
        (AlexNet(1, 6, 12), ["features.3", "features.7"]),
        (ResNet(in_channels=1, num_classes=6, widths=(4,), depths=1), None),
    ],
    ids=["blocknet", "alexnet", "resnet"],
)
def test_blocks_end_before_the_next_convolution(network, ends):
    x = pictures(4, 0).x
    found = block_ends(network, x[:1])
    assert ends is None or [name for name, _ in found] == ends
    network.eval()
    logits, outputs = block_outputs(network, x, found)
    assert torch.equal(logits, network(x))
    assert all(output.ndim == 4 for output in outputs)
    assert len(outputs) == sum(isinstance(module, nn.Conv2d) for module in network.modules())


def test_blocks_need_convolutions_and_ends_of_their_own():
    with pytest.raises(InvalidValue, match="no convolution"):
        block_ends(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), pictures(1, 0).x)
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Conv2d(1, 2, 3), shared, nn.Conv2d(2, 2, 3), shared)
    with pytest.raises(InvalidValue, match="one module 1"):
        block_ends(twice, pictures(1, 0).x)


def test_penultimate_features_are_what_the_last_layer_is_given():
    network, x = fresh().train(), pictures(7, 0).x
    features = penultimate_features(network, x, batch=3)
    assert features.shape == (7, 24)
    torch.testing.assert_close(network.classifier[2](features), predict(network, x))
    assert network.training
