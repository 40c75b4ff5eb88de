"""DC, DSA and DM: what an update is, what callbacks see, and that an interrupted condensing goes on exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sparing.condensation.images import ImageCondenser, freeze_batch_norms, labelled_images, train_epoch
from sparing.condensation.matching import embeddings, gradient_matching_loss
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.store import Progress
from sparing.models.blocknet import BlockNet
from sparing.models.mlp import MLP
from sparing.tasks.images.digits import Digits

CLASSES, EACH, SIZE = 3, 6, 8


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES * EACH) % CLASSES
    return torch.randn(len(labels), 1, SIZE, SIZE, generator=draw) + labels[:, None, None, None], labels


def small() -> nn.Module:
    return BlockNet(1, CLASSES, SIZE, width=4, depth=2)


def pixels() -> nn.Module:
    """What enters its head are the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES))


def condenser(method: Any, **changes: Any) -> ImageCondenser:
    fields: dict[str, Any] = {"n_per_class": 2, "network": small, "max_iter": 4, "batch_real": 4, "checkpoint_every": 1}
    loops = {} if method == "dm" else {"outer_steps": 3, "inner_steps": 2}
    return ImageCondenser(method, **{**fields, **loops, **changes})


class Memory:
    """A keeper that can be cut off after so many states."""

    def __init__(self, die_after: int | None = None) -> None:
        self.die_after, self.state, self.count = die_after, None, 0

    def load(self) -> Any:
        return copy.deepcopy(self.state)

    def save(self, state: Any) -> None:
        self.state = copy.deepcopy(state)
        self.count += 1
        if self.count == self.die_after:
            raise KeyboardInterrupt


class Stamp:
    """Brightens the real images a little after each training of the network; keeps how much."""

    def __init__(self) -> None:
        self.added = 0.0
        self.images: Tensor | None = None

    def on_data_ready(self, data: Any) -> Any:
        self.clean, labels = data
        self.images = self.clean.clone()
        self._stamp()
        return self.images, labels

    def _stamp(self) -> None:
        assert self.images is not None
        self.images.copy_(self.clean + self.added)

    def after_network_update(self, network: nn.Module) -> None:
        self.added += 0.25
        self._stamp()

    def state_dict(self) -> dict[str, Any]:
        return {"added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added = state["added"]
        self._stamp()


# --- updates


@pytest.mark.parametrize("distance", ["mse", "layer_cos"])
def test_one_update_is_a_step_down_the_summed_distances(distance: Any) -> None:
    X, y = data()
    torch.manual_seed(3)
    fixed = small()
    made = condenser(
        "dc",
        network=lambda: copy.deepcopy(fixed),
        init="real",
        distance=distance,
        max_iter=1,
        outer_steps=1,
        batch_real=100,
        lr_img=0.3,
    ).fit(X, y)
    start = condenser("dc", init="real", max_iter=1, lr_img=1e-12).fit(X, y).images_.requires_grad_()
    terms = [gradient_matching_loss(fixed, X[y == c], start[2 * c : 2 * c + 2], c, distance) for c in range(CLASSES)]
    total = torch.stack(terms).sum()
    (slope,) = torch.autograd.grad(total, start)
    torch.testing.assert_close(made.images_, start - 0.3 * slope, rtol=1e-4, atol=1e-5)
    assert made.loss_curve_ == [pytest.approx(float(total.detach()), rel=1e-4)]


def test_distribution_matching_finds_the_mean_of_each_class() -> None:
    X, y = data()
    made = condenser("dm", network=pixels, families=(), max_iter=60, batch_real=100, lr_img=0.3).fit(X, y)
    for c in range(CLASSES):
        torch.testing.assert_close(made.images_[2 * c : 2 * c + 2].mean(0), X[y == c].mean(0), atol=1e-3, rtol=1e-3)
    assert made.loss_curve_[-1] < 1e-4 < made.loss_curve_[0]


@pytest.mark.parametrize("method", ["dc", "dsa", "dm"])
def test_fresh_networks_find_the_images_more_alike(method: Any) -> None:
    X, y = data()
    first, last = (
        condenser(method, max_iter=iterations, init="noise", batch_real=100).fit(X, y).images_ for iterations in (1, 12)
    )

    def apart(images: Tensor) -> float:
        torch.manual_seed(99)
        networks = [small() for _ in range(5)]
        if method == "dm":
            from sparing.condensation.matching import distribution_matching_loss as loss

            terms = [loss(n, X[y == c], images[2 * c : 2 * c + 2]) for n in networks for c in range(CLASSES)]
        else:
            terms = [
                gradient_matching_loss(n, X[y == c], images[2 * c : 2 * c + 2], c)
                for n in networks
                for c in range(CLASSES)
            ]
        return float(torch.stack(terms).detach().sum())

    assert apart(last) < 0.9 * apart(first)


def test_shapes_labels_and_cost() -> None:
    X, y = data()
    made = condenser("dc", max_iter=1).fit(TensorDataset(X, y))
    assert made.images_.shape == (CLASSES * 2, 1, SIZE, SIZE)
    assert made.labels_.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(made.condensed_[3][0], made.images_[3])
    assert made.cost_["bytes_before"] == X.nbytes + y.nbytes
    assert made.cost_["bytes_after"] == made.images_.nbytes + made.labels_.nbytes
    assert made.cost_["wall_s"] > 0
    assert made.provenance_["settings"]["method"] == "dc"


def test_defaults_are_the_papers() -> None:
    assert (ImageCondenser("dc", 50).outer_steps, ImageCondenser("dc", 50).inner_steps) == (50, 10)
    dc, dm = ImageCondenser("dc"), ImageCondenser("dm")
    assert (dc.init, dc.lr_img, dc.max_iter, dc.families) == ("noise", 0.1, 1000, ())
    assert (dm.init, dm.lr_img, dm.max_iter, len(dm.families)) == ("real", 1.0, 20_000, 6)


# --- the same again


@pytest.mark.parametrize("method", ["dc", "dsa", "dm"])
def test_cut_off_anywhere_it_ends_with_the_same_bits(method: Any) -> None:
    X, y = data()
    whole = condenser(method, callbacks=(Stamp(),)).fit(X, y)
    for died in (1, 3):
        memory = Memory(died)
        with pytest.raises(KeyboardInterrupt):
            condenser(method, callbacks=(Stamp(),)).fit(X, y, keeper=memory)
        torch.manual_seed(died)
        resumed = condenser(method, callbacks=(Stamp(),)).fit(X, y, keeper=memory)
        assert torch.equal(resumed.images_, whole.images_)
        assert resumed.loss_curve_ == whole.loss_curve_
    assert not torch.equal(condenser(method, random_state=1).fit(X, y).images_, whole.images_)


def test_a_stores_progress_keeps_the_state(tmp_path: Path) -> None:
    X, y = data()
    whole = condenser("dsa", callbacks=(Stamp(),)).fit(X, y)
    kept = Progress(tmp_path / "progress")
    condenser("dsa", callbacks=(Stamp(),)).fit(X, y, keeper=kept)
    last = max((tmp_path / "progress").glob("*.state"))
    last.write_bytes(last.read_bytes()[:-9])  # as a kill in the middle of a write would leave it
    resumed = condenser("dsa", callbacks=(Stamp(),)).fit(X, y, keeper=kept)
    assert torch.equal(resumed.images_, whole.images_)
    assert resumed.cost_["wall_s"] > 0


def test_the_state_of_another_condensing_is_refused() -> None:
    X, y = data()
    memory = Memory()
    condenser("dc", max_iter=1).fit(X, y, keeper=memory)
    with pytest.raises(InvalidValue, match=r"'lr_img': 0\.5"):
        condenser("dc", max_iter=1, lr_img=0.5).fit(X, y, keeper=memory)
    with pytest.raises(InvalidValue, match="a state of 0 callbacks, but 1"):
        condenser("dc", max_iter=1, callbacks=(Stamp(),)).fit(X, y, keeper=memory)


def test_the_callers_chance_and_data_stay_as_they_were() -> None:
    X, y = data()
    before, state = X.clone(), torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()  # type: ignore[index]
    condenser("dsa", callbacks=(Stamp(),)).fit(X, y)
    assert torch.equal(X, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numbers)  # type: ignore[index]


# --- callbacks


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_data_ready(self, data: Any) -> Any:
        self.heard.append(("data", tuple(data[0].shape)))
        return data

    def before_synthetic_update(self, iteration: int, outer: int) -> None:
        self.heard.append(("before", iteration, outer))

    def after_network_update(self, network: nn.Module) -> None:
        self.heard.append(("network", type(network).__name__))
        network.eval()  # what a callback leaves behind is put right
        torch.rand(3)  # nor does it matter what it draws

    def on_iteration_end(self, iteration: int, loss: float) -> None:
        self.heard.append(("end", iteration, type(loss)))


@pytest.mark.parametrize("method", ["dc", "dm"])
def test_what_callbacks_hear_changes_nothing(method: Any) -> None:
    X, y = data()
    listener = Listener()
    heard = condenser(method, max_iter=2, callbacks=(listener,)).fit(X, y)
    trained = [("network", "BlockNet")]
    per_iteration = {
        "dc": lambda i: [("before", i, 0), *trained, ("before", i, 1), *trained, ("before", i, 2), ("end", i, float)],
        "dm": lambda i: [*trained, ("before", i, 0), ("end", i, float)],
    }[method]
    assert listener.heard == [("data", tuple(X.shape)), *per_iteration(0), *per_iteration(1)]
    assert torch.equal(heard.images_, condenser(method, max_iter=2).fit(X, y).images_)


def test_data_that_a_callback_changes_are_the_data_condensed() -> None:
    X, y = data()
    stamp = Stamp()
    fields: dict[str, Any] = {"network": pixels, "families": (), "batch_real": 100, "lr_img": 1.0, "momentum": 0.0}
    # each of two images moves by the difference of the means: theirs lands on the mean that is real at that moment
    made = condenser("dm", max_iter=3, callbacks=(stamp,), **fields).fit(X, y)
    assert stamp.added == 0.75
    for c in range(CLASSES):
        torch.testing.assert_close(made.images_[2 * c : 2 * c + 2].mean(0), X[y == c].mean(0) + 0.75)


def test_callbacks_that_cannot_be() -> None:
    X, y = data()
    with pytest.raises(InvalidValue, match=r"callback 0 \(int\) has none of the methods on_data_ready"):
        condenser("dc", callbacks=(1,)).fit(X, y)
    half = type("Half", (), {"on_iteration_end": lambda *_: None, "state_dict": dict})()
    with pytest.raises(InvalidValue, match=r"callback 0 \(Half\) has one of state_dict and load_state_dict"):
        condenser("dc", callbacks=(half,)).fit(X, y)
    fewer = type("Fewer", (), {"on_data_ready": lambda _, data: (data[0], data[1] * 2)})()
    with pytest.raises(InvalidValue, match="no image of class 1"):
        condenser("dc", callbacks=(fewer,)).fit(X, y)


# --- networks


def test_batch_norms_keep_the_statistics_they_were_given() -> None:
    torch.manual_seed(0)
    network = BlockNet(1, CLASSES, SIZE, width=4, depth=2, norm="batch").train()
    X, _ = data()
    expected = network.features[0](X)
    freeze_batch_norms(network, X)
    norm: Any = network.features[1]
    torch.testing.assert_close(norm.running_mean, expected.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, expected.var((0, 2, 3)))
    kept = norm.running_mean.clone()
    torch.testing.assert_close(network(X * 3)[:2], network(X[:2] * 3))
    assert torch.equal(norm.running_mean, kept)
    assert network.training
    assert norm.momentum == 0.1


def test_other_networks_can_be_matched_on() -> None:
    X, y = data()
    for network in (
        lambda: BlockNet(1, CLASSES, SIZE, width=4, depth=1, norm="batch"),
        lambda: MLP(1, CLASSES, SIZE, widths=(8,), dropout=0.2),
    ):
        for method in ("dc", "dm"):
            assert condenser(method, network=network, max_iter=1).fit(X, y).images_.isfinite().all()


def test_embeddings_are_what_enters_the_head() -> None:
    X, _ = data()
    model = MLP(1, CLASSES, SIZE, widths=(8,))
    torch.testing.assert_close(model.head(embeddings(model, X)), model(X))
    assert torch.equal(embeddings(pixels(), X), X.flatten(1))
    with pytest.raises(InvalidValue, match="Flatten has neither"):
        embeddings(nn.Flatten(), X)


def test_an_epoch_takes_each_image_once() -> None:
    X, y = data()
    seen = []
    network = pixels()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    train_epoch(network, torch.optim.SGD(network.parameters(), lr=0.1), X, y, 5, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in seen] == [5, 5, 5, 3]
    together = torch.cat(seen)
    assert not torch.equal(together, X)
    assert torch.equal(together.flatten(1).sum(1).sort().values, X.flatten(1).sum(1).sort().values)


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mtt"}, "method = 'mtt'"),
        ({"n_per_class": 0}, "n_per_class = 0"),
        ({"n_per_class": 7}, "known for n_per_class = 1, 10, 20, 30, 40, 50; for 7 give both"),
        ({"method": "dm", "outer_steps": 5}, "outer_steps = 5, inner_steps = None: DM"),
        ({"init": "zeros"}, "init = 'zeros'"),
        ({"distance": "l1"}, "distance = 'l1'"),
        ({"lr_img": 0.0}, "lr_img = 0.0"),
        ({"lr_net": -1.0}, "lr_net = -1.0"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"max_iter": 0}, "max_iter = 0"),
        ({"inner_steps": -1}, "inner_steps = -1"),
        ({"checkpoint_every": 0}, "checkpoint_every = 0"),
        ({"families": ("flip",)}, 'with method "dc"'),
        ({"method": "dsa", "families": ()}, 'empty with method "dsa"'),
        ({"method": "dm", "families": ("flop",)}, "no augmentation 'flop'"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        ImageCondenser(**arguments)


def test_a_tasks_images_are_read_whole() -> None:
    split = Digits().splits(None).val
    images, labels = labelled_images(split)
    assert images.shape == (len(split), 1, 8, 8)
    torch.testing.assert_close(images[7], torch.as_tensor(split[7][0]))
    assert labels[7] == split[7][1]


def test_images_that_cannot_be() -> None:
    X, y = data()
    spoiled = X.clone()
    spoiled[4, 0, 0, 0] = float("nan")
    cases: list[tuple[Any, Any, str]] = [
        (spoiled, y, "image 4 has entries that are not finite"),
        (X, y * 2, "no image of class 1, though labels go up to 4"),
        (X, y - 1, "label -1 of sample 0"),
        (X, y.float(), "labels of type float32"),
        (X, y[:-1], r"18 samples and labels \(17,\)"),
        (X[:, 0], y, r"images \(18, 8, 8\)"),
        ((X * 255).to(torch.uint8), y, "type torch.uint8"),
        (X[:0], y[:0], r"images \(0, 1, 8, 8\)"),
        ([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 3), 1)], None, "images of one size"),
        ([torch.zeros(1, 2, 2)], None, r"pairs \(image, label\)"),
        ([], None, "the dataset is empty"),
    ]
    for images, labels, message in cases:
        with pytest.raises(InvalidValue, match=message):
            labelled_images(images, labels)
    assert labelled_images(X.numpy(), (y * 2).numpy(), every_class=False)[1].dtype == torch.int64
    with pytest.raises(InvalidValue, match='init = "real" needs 7 images of class 0, but there are 6'):
        condenser("dm", n_per_class=7).fit(X, y)
    with pytest.raises(InvalidValue, match="images of 8×6 pixels are not square; give a network"):
        ImageCondenser("dm", 1, max_iter=1).fit(X[:, :, :, :6], y)


def test_a_loss_that_is_lost_is_told() -> None:
    X, y = data()
    with pytest.raises(TrainingDiverged, match=r"the loss of iteration \d is"):
        condenser("dm", network=pixels, families=(), max_iter=9, lr_img=1e30).fit(X, y)
