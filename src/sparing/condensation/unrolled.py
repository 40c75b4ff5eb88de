"""Dataset distillation: images and learning rates that are right for a few steps of gradient descent.

Wang, Zhu, Torralba and Efros 2018, "Dataset Distillation", arXiv:1811.10959, algorithm 1 with several steps and epochs
(section 3.4), as the study of backdoors in distilled data uses it (Liu et al. 2023, arXiv:2301.01197). The loss on real
images after the last step is differentiated through all steps, with respect to the images and to the rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, softplus

from sparing.condensation.callbacks import Callbacks, marked
from sparing.condensation.images import fresh_network, labelled_images
from sparing.condensation.run import Run
from sparing.core.errors import InvalidValue
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.models.convnet import whole

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

    from sparing.core.training.fit import Keeper


def raw_rate(rate: float) -> float:
    """The number whose softplus is ``rate``: ln(e^rate − 1).

    Raises:
        InvalidValue: a rate that is not above 0.
    """
    if not 0 < rate < math.inf:
        raise InvalidValue(f"a learning rate of {rate!r}; more than 0 is expected")
    return rate + math.log(-math.expm1(-rate))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Name → copy of each parameter."""
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


def unrolled_steps(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor | Sequence[Tensor],
    labels: Int[Tensor, " m"],
    rates: Float[Tensor, " t"],
    *,
    create_graph: bool = True,
) -> tuple[dict[str, Tensor], Float[Tensor, " t"]]:
    """Weights after T steps w ← w − rate_t · ∇ CE(network(images_t; w), labels), and the loss before each of them.

    Args:
        network: gives logits (N, classes); its own parameters are neither read nor changed.
        weights: name → where each of its parameters begins.
        images: S tensors (M, C, H, W); step t learns from number t mod S.
        labels: of each of them.
        rates: T learning rates.
        create_graph: whether the result can be differentiated, through all steps, with respect to images and rates;
            that takes memory for all T steps.

    Raises:
        InvalidValue: no images or no rates, or weights that are not those of the network.
    """
    names = {name for name, _ in network.named_parameters()}
    if weights.keys() != names:
        raise InvalidValue(f"weights: {sorted(weights.keys() ^ names)} are missing or not the network's")
    if not len(images) or not len(rates):
        raise InvalidValue(f"{len(images)} sets of images and {len(rates)} learning rates; one of each is needed")
    moving = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}
    losses = []
    for step, rate in enumerate(rates):
        loss = cross_entropy(functional_call(network, moving, (images[step % len(images)],)), labels)
        slopes = torch.autograd.grad(loss, list(moving.values()), create_graph=create_graph)
        losses.append(loss.detach())
        moving = {name: w - rate * slope for (name, w), slope in zip(moving.items(), slopes, strict=True)}
        if not create_graph:
            moving = {name: w.detach().requires_grad_() for name, w in moving.items()}
    return moving, torch.stack(losses)


@dataclass(frozen=True)
class LearnedSteps:
    """What distilled images are worth nothing without: the steps that a network learns from them by."""

    sets: int
    """The images are so many sets of equal size, one after the other; step t learns from number t mod ``sets``."""
    learning_rates: Float[Tensor, " t"]
    """Of each step, (T,)."""
    initial_weights: Mapping[str, Tensor] | None
    """Name → where each parameter of the network begins; None: anywhere."""

    def train(self, network: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> nn.Module:
        """Take the steps with a network, in place; it is returned in evaluation mode.

        Args:
            network: one like that which the images were learned for; it begins with ``initial_weights``, if there are.
            images: of all sets.
            labels: their classes, in each set the same.

        Raises:
            InvalidValue: images that are no such sets, or a network whose weights are not those that they were learned
                with.
        """
        if self.sets < 1 or len(images) % self.sets or len(images) != len(labels):
            raise InvalidValue(f"{len(images)} images and {len(labels)} labels are no {self.sets} sets of equal size")
        each = len(images) // self.sets
        network.train()
        weights = weights_of(network) if self.initial_weights is None else self.initial_weights
        final, _ = unrolled_steps(
            network, weights, images.split(each), labels[:each], self.learning_rates, create_graph=False
        )
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(final[name])
        return network.eval()


class UnrolledCondenser:
    """Dataset distillation (DD): ``distill_steps`` sets of images, learned with the rate of each step.

    For each batch of real images a network takes ``distill_steps`` · ``distill_epochs`` steps of gradient descent on
    the synthetic images, with ``known_init`` always from the same weights, else from fresh ones. Images (from normal
    noise) and rates then follow the gradient of its loss on the batch, by Adam. An iteration is such a batch. Callbacks
    hear of the network's update after its last step, when the batch has not been looked at yet.

    The images serve the steps they were learned for, see :meth:`train`; with ``known_init`` only from the weights they
    were learned with.

    Args:
        n_per_class: images of each class in a step.
        distill_steps: sets of images.
        distill_epochs: how often they are gone through.
        network: makes a network, (N, C, H, W) → logits (N, classes), without batch norm. None:
            :class:`~sparing.models.blocknet.BlockNet` without norm.
        known_init: begin with the same weights every time.
        epochs: passes over the real images.
        batch_real: real images in a batch.
        lr: of Adam, for images and for what the rates are the softplus of.
        betas: of Adam.
        lr_decay: what ``lr`` is multiplied by after each ``decay_every`` epochs.
        decay_every: in epochs.
        lr_net: rate of every step to begin with.
        random_state: seed.
        callbacks: see :class:`~sparing.condensation.callbacks.Callbacks`; data are (images, labels).
        checkpoint_every: iterations between two states that are kept, where :meth:`fit` is given a keeper.

    Raises:
        InvalidValue: arguments outside what is allowed.
    """

    images_: Float[Tensor, "s m c h w"]
    """(distill_steps, C · n_per_class, channels, H, W), classes 0 … C−1 again and again."""
    labels_: Int[Tensor, " m"]
    """(C · n_per_class,), of each set."""
    learning_rates_: Float[Tensor, " t"]
    """(distill_steps · distill_epochs,)."""
    initial_weights_: dict[str, Tensor] | None
    """Name → where the network begins; None without ``known_init``."""
    loss_curve_: list[float]
    """Loss on the real batch of each iteration."""
    cost_: dict[str, float]
    """As :class:`~sparing.condensation.images.ImageCondenser` has it."""

    def __init__(
        self,
        n_per_class: int = 10,
        distill_steps: int = 10,
        distill_epochs: int = 3,
        *,
        network: Callable[[], nn.Module] | None = None,
        known_init: bool = True,
        epochs: int = 400,
        batch_real: int = 1024,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.5, 0.999),
        lr_decay: float = 0.5,
        decay_every: int = 40,
        lr_net: float = 0.02,
        random_state: int = 0,
        callbacks: Sequence[Any] = (),
        checkpoint_every: int = 10,
    ) -> None:
        whole("UnrolledCondenser", n_per_class=n_per_class, distill_steps=distill_steps, distill_epochs=distill_epochs)
        whole("UnrolledCondenser", epochs=epochs, batch_real=batch_real, decay_every=decay_every)
        whole("UnrolledCondenser", checkpoint_every=checkpoint_every)
        for name, value in (("lr", lr), ("lr_decay", lr_decay), ("lr_net", lr_net)):
            if not 0 < value < math.inf:
                raise InvalidValue(f"{name} = {value!r}; more than 0 is expected")
        if not all(0 <= beta < 1 for beta in betas):
            raise InvalidValue(f"betas = {betas!r}; two numbers, 0 ≤ beta < 1, are expected")
        self.n_per_class, self.distill_steps, self.distill_epochs = n_per_class, distill_steps, distill_epochs
        self.network, self.known_init, self.epochs, self.batch_real = network, known_init, epochs, batch_real
        self.lr, self.betas, self.lr_decay, self.decay_every, self.lr_net = lr, betas, lr_decay, decay_every, lr_net
        self.random_state, self.callbacks, self.checkpoint_every = random_state, callbacks, checkpoint_every

    def fit(self, X: Any, y: Any = None, *, keeper: Keeper | None = None) -> Self:
        """Distil images ``X`` (n, C, H, W) with labels ``y`` (n,), or a dataset of (image, label).

        Args:
            X: floating-point images, normalised as networks will see them; or a dataset, which is read whole.
            y: whole numbers 0 … C−1, each at least once; None for a dataset.
            keeper: where the state is kept, and resumed from; a store's ``Progress`` is one.

        Raises:
            InvalidValue: what :func:`~sparing.condensation.images.labelled_images` raises; a state of another
                condensing; a network with batch norms, whose statistics are no weights that the steps could learn.
            TrainingDiverged: a loss that is not finite.
        """
        callbacks = Callbacks(self.callbacks)
        before = labelled_images(X, y)
        with isolated_rng("condensed images' data", self.random_state):
            real, labels = labelled_images(*callbacks.data_ready(before))
        classes = int(labels.max()) + 1
        generator = torch.Generator().manual_seed(derive_seed("first images", self.random_state))
        shape = (self.distill_steps, classes * self.n_per_class, *real.shape[1:])
        images = torch.randn(shape, generator=generator, dtype=real.dtype).to(real.device).requires_grad_()
        steps = self.distill_steps * self.distill_epochs
        raw = torch.full((steps,), raw_rate(self.lr_net), dtype=real.dtype, device=real.device).requires_grad_()
        self.labels_ = torch.arange(classes, device=real.device).repeat(self.n_per_class)
        optimizer = torch.optim.Adam([images, raw], lr=self.lr, betas=self.betas)
        batches = math.ceil(len(real) / self.batch_real)
        settings = self.settings() | {"data": [*real.shape, classes]}
        learned, known = {"images": images, "raw_rates": raw}, None
        if self.known_init:
            with isolated_rng("the network to distil for", self.random_state):
                known = self._fresh(real, classes)
            start = weights_of(known)
        total = self.epochs * batches
        with Run(learned, optimizer, callbacks, settings, total, keeper, self.checkpoint_every) as run:
            for iteration in run.left():
                epoch, batch = divmod(iteration, batches)
                with isolated_rng("distilling images", self.random_state, iteration):
                    network = known if known is not None else self._fresh(real, classes)
                    weights = start if known is not None else weights_of(network)
                    callbacks.before_synthetic_update(iteration, 0)
                    final, _ = unrolled_steps(network, weights, images, self.labels_, softplus(raw))
                    with torch.no_grad():
                        for name, parameter in network.named_parameters():
                            parameter.copy_(final[name])
                    callbacks.after_network_update(network)
                    network.train()
                    rows = self._order(epoch, len(real))[batch * self.batch_real : (batch + 1) * self.batch_real]
                    rows = rows.to(real.device)
                    loss = cross_entropy(functional_call(network, final, (real[rows],)), labels[rows])
                    optimizer.param_groups[0]["lr"] = self.lr * self.lr_decay ** (epoch // self.decay_every)
                    images.grad, raw.grad = torch.autograd.grad(loss, [images, raw])
                    optimizer.step()
                    run.end(iteration, float(loss.detach()))
        self.images_, self.learning_rates_ = images.detach(), softplus(raw).detach()
        self.initial_weights_ = start if known is not None else None
        self.loss_curve_ = run.losses
        kept = tuple((self.initial_weights_ or {}).values())
        self.cost_ = run.cost(before, (self.images_, self.labels_, self.learning_rates_, *kept))
        return self

    def train(self, network: nn.Module) -> nn.Module:
        """Take the learned steps with a network, in place, from ``initial_weights_`` where they are known.

        Returned in evaluation mode.

        Raises:
            InvalidValue: a network whose weights are not those that the images were learned with.
        """
        return self.steps_.train(network, *self.condensed_.tensors)

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on but data, network and callbacks, as plain JSON."""
        names = (
            *("n_per_class", "distill_steps", "distill_epochs", "known_init", "epochs", "batch_real", "lr"),
            *("lr_decay", "decay_every", "lr_net", "random_state"),
        )
        return {"method": "dd", **{name: getattr(self, name) for name in names}, "betas": list(self.betas)}

    @property
    def steps_(self) -> LearnedSteps:
        """The steps that the images were learned for; keep them with the images."""
        return LearnedSteps(self.distill_steps, self.learning_rates_, self.initial_weights_)

    @property
    def condensed_(self) -> TensorDataset:
        """The images of all steps with their labels."""
        from torch.utils.data import TensorDataset

        images = TensorDataset(self.images_.flatten(0, 1), self.labels_.repeat(self.distill_steps))
        return marked(images, Callbacks(self.callbacks).provenance())

    @property
    def provenance_(self) -> dict[str, Any]:
        """How the images were made, as plain JSON: settings, loss curve, cost, and what callbacks say of themselves."""
        made = {"settings": self.settings(), "loss_curve": self.loss_curve_, "cost": self.cost_}
        return made | Callbacks(self.callbacks).provenance()

    def _fresh(self, real: Tensor, classes: int) -> nn.Module:
        network = fresh_network(self.network, real, classes, norm="none")
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise InvalidValue(
                    f"dataset distillation cannot be done with batch norms ({name}); a network without them, or with "
                    "instance norms, is needed"
                )
        return network

    def _order(self, epoch: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("real images", self.random_state, epoch))
        return torch.randperm(count, generator=generator)
