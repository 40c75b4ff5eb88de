"""Dataset distillation: slopes through unrolled steps, and a condenser that can be cut off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import TensorDataset

from sparing.condensation.unrolled import UnrolledCondenser, raw_rate, unrolled_steps, weights_of
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.models.blocknet import BlockNet
from sparing.models.mlp import MLP


def data() -> tuple[Tensor, Tensor]:
    labels = torch.arange(14) % 2
    draw = torch.Generator().manual_seed(0)
    return torch.randn(14, 1, 4, 4, generator=draw) + 2 * labels[:, None, None, None], labels


def small() -> nn.Module:
    return MLP(1, 2, 4, widths=(5,))


def condenser(**changes: Any) -> UnrolledCondenser:
    fields = {"network": small, "epochs": 3, "batch_real": 5, "checkpoint_every": 1, "lr_net": 0.3}
    return UnrolledCondenser(2, 2, 2, **{**fields, **changes})


class Memory:
    def __init__(self, die_after: int | None = None) -> None:
        self.die_after, self.state, self.count = die_after, None, 0

    def load(self) -> Any:
        return copy.deepcopy(self.state)

    def save(self, state: Any) -> None:
        self.state, self.count = copy.deepcopy(state), self.count + 1
        if self.count == self.die_after:
            raise KeyboardInterrupt


def test_slopes_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    images = torch.randn(2, 2, 1, 2, 2, dtype=torch.double, requires_grad=True)
    raw = torch.full((3,), raw_rate(0.2), dtype=torch.double, requires_grad=True)
    x, y = torch.randn(5, 1, 2, 2, dtype=torch.double), torch.tensor([0, 1, 1, 0, 1])

    def loss(images: Tensor, raw: Tensor) -> Tensor:
        final, _ = unrolled_steps(network, weights_of(network), images, torch.tensor([0, 1]), softplus(raw))
        return cross_entropy(functional_call(network, final, (x,)), y)

    assert torch.autograd.gradcheck(loss, (images, raw))


def test_the_steps_are_those_of_plain_gradient_descent() -> None:
    torch.manual_seed(1)
    network, (X, y) = small(), data()
    before = weights_of(network)
    final, losses = unrolled_steps(network, before, [X[:6], X[6:12]], y[:6], torch.tensor([0.1, 0.2, 0.3]))
    assert all(torch.equal(before[name], weight) for name, weight in network.named_parameters())
    for step, rate in enumerate((0.1, 0.2, 0.3)):
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        optimizer.zero_grad()
        loss = cross_entropy(network(X[:6] if step != 1 else X[6:12]), y[:6])
        torch.testing.assert_close(losses[step], loss.detach())
        loss.backward()
        optimizer.step()
    for name, weight in network.named_parameters():
        torch.testing.assert_close(final[name], weight)
    cheap, _ = unrolled_steps(
        network, before, [X[:6], X[6:12]], y[:6], torch.tensor([0.1, 0.2, 0.3]), create_graph=False
    )
    assert all(w.grad_fn is None for w in cheap.values())
    torch.testing.assert_close(cheap, {name: weight.detach() for name, weight in final.items()}, check_stride=False)


def test_a_rate_there_and_back() -> None:
    for rate in (1e-8, 0.001, 0.02, 3.0, 50.0):
        assert float(softplus(torch.tensor(raw_rate(rate), dtype=torch.double))) == pytest.approx(rate, rel=1e-9)
    with pytest.raises(InvalidValue, match=r"rate of 0\.0"):
        raw_rate(0.0)


def test_a_few_learned_steps_teach_the_known_network() -> None:
    X, y = data()
    made = condenser(epochs=40, lr=0.1).fit(TensorDataset(X, y))
    assert made.images_.shape == (2, 4, 1, 4, 4)
    assert made.labels_.tolist() == [0, 1, 0, 1]
    assert made.learning_rates_.shape == (4,)
    assert len(made.condensed_) == 8
    assert made.condensed_[5][1] == 1
    assert made.loss_curve_[-1] < 0.2 * made.loss_curve_[0]
    network = made.train(small())
    assert not network.training
    assert float(cross_entropy(network(X), y).detach()) < 0.2
    assert made.cost_["bytes_after"] > made.images_.nbytes
    assert made.provenance_["settings"]["betas"] == [0.5, 0.999]


def test_known_and_fresh_weights_differ_in_nothing_else() -> None:
    torch.manual_seed(0)
    fixed, (X, y) = small(), data()
    known, fresh = (condenser(network=lambda: copy.deepcopy(fixed), known_init=k).fit(X, y) for k in (True, False))
    assert torch.equal(known.images_, fresh.images_)
    assert fresh.initial_weights_ is None
    assert known.initial_weights_ is not None
    assert torch.equal(known.initial_weights_["head.weight"], fixed.head.weight)  # type: ignore[union-attr]
    assert not torch.equal(condenser(known_init=False).fit(X, y).images_, condenser().fit(X, y).images_)
    for made in (known, fresh):
        again = made.train(copy.deepcopy(fixed))
        torch.testing.assert_close(again.head.weight, known.train(copy.deepcopy(fixed)).head.weight)  # type: ignore[union-attr]


class Blank:
    """Clears the real images when it first sees a trained network, or before."""

    def __init__(self, early: bool) -> None:
        self.early, self.cleared = early, False

    def on_data_ready(self, data: Any) -> Any:
        self.images = data[0].clone()
        if self.early:
            self.after_network_update(None)
        return self.images, data[1]

    def after_network_update(self, network: nn.Module | None) -> None:
        if not self.cleared and network is not None:
            self.weights = weights_of(network)
        self.images.zero_()
        self.cleared = True

    def state_dict(self) -> dict[str, Any]:
        return {"cleared": self.cleared}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["cleared"]:
            self.after_network_update(None)


@pytest.mark.parametrize("known", [True, False])
def test_cut_off_anywhere_it_ends_with_the_same_bits(known: bool) -> None:
    X, y = data()
    fields: dict[str, Any] = {"known_init": known, "decay_every": 2}
    whole = condenser(**fields, callbacks=(Blank(False),)).fit(X, y)
    assert len(whole.loss_curve_) == 9  # three batches in each of three epochs
    for died in (1, 7):
        memory = Memory(died)
        with pytest.raises(KeyboardInterrupt):
            condenser(**fields, callbacks=(Blank(False),)).fit(X, y, keeper=memory)
        torch.manual_seed(died)
        resumed = condenser(**fields, callbacks=(Blank(False),)).fit(X, y, keeper=memory)
        assert torch.equal(resumed.images_, whole.images_)
        assert torch.equal(resumed.learning_rates_, whole.learning_rates_)
        assert resumed.loss_curve_ == whole.loss_curve_


def test_callbacks_see_the_network_after_its_steps_and_before_the_batch() -> None:
    X, y = data()
    late = Blank(False)
    made = condenser(callbacks=(late,)).fit(X, y)
    assert torch.equal(made.images_, condenser(callbacks=(Blank(True),)).fit(X, y).images_)
    assert not torch.equal(made.images_, condenser().fit(X, y).images_)
    initial = made.initial_weights_
    assert initial is not None
    assert not torch.equal(late.weights["head.weight"], initial["head.weight"])
    assert torch.equal(X, data()[0])


def test_the_rate_of_adam_falls() -> None:
    X, y = data()
    first = condenser(epochs=1, batch_real=14).fit(X, y).images_
    kept, halved = (condenser(epochs=2, batch_real=14, decay_every=1, lr_decay=d).fit(X, y).images_ for d in (1.0, 0.5))
    torch.testing.assert_close(halved - first, (kept - first) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"lr_net": 0.0}, r"lr_net = 0\.0"),
        ({"lr_decay": -1.0}, r"lr_decay = -1\.0"),
        ({"betas": (0.5, 1.0)}, r"betas = \(0\.5, 1\.0\)"),
        ({"checkpoint_every": 0}, "checkpoint_every = 0"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        condenser(**arguments)


def test_what_cannot_be_unrolled() -> None:
    (X, y), network = data(), small()
    normed = condenser(network=lambda: BlockNet(1, 2, 4, 2, 1, norm="batch"))
    with pytest.raises(InvalidValue, match=r"batch norms \(features\.1\)"):
        normed.fit(X, y)
    with pytest.raises(InvalidValue, match=r"weights: \['head\.bias'\]"):
        unrolled_steps(
            network, {k: w for k, w in weights_of(network).items() if k != "head.bias"}, [X], y, torch.ones(1)
        )
    with pytest.raises(InvalidValue, match="1 sets of images and 0 learning rates"):
        unrolled_steps(network, weights_of(network), [X], y, torch.ones(0))
    memory = Memory()
    condenser(epochs=1).fit(X, y, keeper=memory)
    with pytest.raises(InvalidValue, match=r"'lr': 0\.5"):
        condenser(epochs=1, lr=0.5).fit(X, y, keeper=memory)
    with pytest.raises(TrainingDiverged, match="iteration 1 is nan"):
        condenser(lr=1e38).fit(X, y)
