"""Condensing images by matching gradients or distributions: DC, DSA and DM.

A few synthetic images of each class are fitted until a network sees in them what it sees in all real ones. DC matches
the gradients of a network while it is trained (Zhao, Mopuri and Bilen 2021, arXiv:2006.05929, algorithm 1), DSA does so
under augmentations that real and synthetic images share (Zhao and Bilen 2021, arXiv:2102.08259), DM matches the mean
embeddings of untrained networks (Zhao and Bilen 2023, arXiv:2110.04181, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparing.condensation.callbacks import Callbacks, marked
from sparing.condensation.coresets import class_labels
from sparing.condensation.matching import METRICS, Metric, distribution_matching_loss, gradient_matching_loss
from sparing.condensation.run import Run
from sparing.condensation.siamese import FAMILIES, Draws, check_families, draw_augmentation
from sparing.core.collation import batches_of
from sparing.core.errors import InvalidValue, shown
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.models.blocknet import BlockNet
from sparing.models.convnet import whole

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

    from sparing.core.training.fit import Keeper

Method = Literal["dc", "dsa", "dm"]
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Images of each class → (updates of the images in an iteration, epochs of the network between two of them)."""
STATISTICS = 16
"""Real images of each class that batch norms take their statistics from."""


def labelled_images(
    X: Any, y: Any = None, *, every_class: bool = True
) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """(images (n, C, H, W), labels (n,) int64) of a tensor or array and labels, or of a dataset of such pairs.

    Raises:
        InvalidValue: no images, images of different sizes or none of floating point, or one that is not finite, with
            its index; labels that are not one whole number 0 … C−1 for each, or that leave one of these classes out
            (unless ``every_class`` is False).
    """
    if y is None:
        try:
            batches = list(batches_of(X, 256))
        except (RuntimeError, TypeError) as error:
            raise InvalidValue(f"a dataset of images of one size and labels is expected: {error}") from error
        if not batches:
            raise InvalidValue("the dataset is empty; images and labels are expected")
        if not all(isinstance(batch, list | tuple) and len(batch) == 2 for batch in batches):
            raise InvalidValue(f"a dataset of pairs (image, label) is expected, not of {shown(type(batches[0]))}")
        X, y = (torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(*batches, strict=True))
    images = torch.as_tensor(X)
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise InvalidValue(
            f"images {tuple(images.shape)} of type {images.dtype}; floating-point numbers (n, channels, height, width) "
            "are expected"
        )
    labels = torch.as_tensor(class_labels(y, len(images)), device=images.device)
    finite = images.flatten(1).isfinite().all(1)
    if not finite.all():
        raise InvalidValue(f"image {int((~finite).nonzero()[0])} has entries that are not finite")
    missing = (labels.bincount() == 0).nonzero().flatten().tolist()
    if missing and every_class:
        raise InvalidValue(f"no image of class {missing[0]}, though labels go up to {int(labels.max())}")
    return images, labels


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    batch_size: int,
    generator: torch.Generator,
    families: Sequence[str] = (),
) -> None:
    """One pass over the images in random order, by cross-entropy; each batch augmented once if there are families."""
    height, width = images.shape[2:]
    for rows in torch.randperm(len(images), generator=generator).split(batch_size):
        rows = rows.to(images.device)
        batch = images[rows]
        if families:
            batch = draw_augmentation(height, width, Draws(generator), families)(batch)
        optimizer.zero_grad()
        cross_entropy(network(batch), labels[rows]).backward()
        optimizer.step()


def freeze_batch_norms(network: nn.Module, images: Float[Tensor, "n c h w"]) -> None:
    """Give batch norms the statistics of ``images``, and keep them from changing; the other layers stay as they are.

    A batch of one class would give each class other statistics, and gradients that no training meets.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches: of one, its own statistics
        norm.train()
    with torch.no_grad():
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def fresh_network(
    factory: Callable[[], nn.Module] | None,
    real: Float[Tensor, "n c h w"],
    classes: int,
    norm: Literal["instance", "none"] = "instance",
) -> nn.Module:
    """A new network for images like ``real``, in training mode where they are; a BlockNet without a factory.

    Raises:
        InvalidValue: images that are not square, which a BlockNet needs.
    """
    if factory is not None:
        return factory().to(real.device).train()
    channels, height, width = real.shape[1:]
    if height != width:
        raise InvalidValue(f"images of {height}×{width} pixels are not square; give a network")
    return BlockNet(channels, classes, height, norm=norm).to(real.device).train()


class ImageCondenser:
    """Condenses labelled images by DC, DSA or DM.

    In each iteration a fresh network is drawn. DC and DSA update the images by the distance of gradients, summed over
    classes, and then train the network on them, ``outer_steps`` times; the last update is not followed by training. DM
    updates them once, by the distance of mean embeddings, and trains nothing. DSA and DM augment the real and the
    synthetic batch of a class alike. Batch norms are frozen while images are updated.

    What is drawn follows from ``random_state`` and the iteration's number, so that a condensing that was interrupted
    goes on as if it had not been. Everything runs where the images are.

    Args:
        method: "dc", "dsa" or "dm".
        n_per_class: synthetic images of each class.
        network: makes a fresh network for images like those that are condensed, (N, C, H, W) → logits (N, classes).
            None: :class:`~sparing.models.blocknet.BlockNet`. Its embeddings, for DM, are those of
            :func:`~sparing.condensation.matching.embeddings`.
        init: "noise" (normal) or "real" (random images of the class). None: noise for DC, real for the others.
        distance: of gradients, see :func:`~sparing.condensation.matching.gradient_distance`; DM has no use for it.
        max_iter: iterations. None: 1000, for DM 20 000.
        outer_steps: updates of the images in an iteration. None: the papers' for 1, 10, 20, 30, 40 or 50 images of each
            class; DM has 1.
        inner_steps: epochs of training between two updates. None: likewise; DM has 0.
        batch_real: real images of each class in an update; all when there are fewer.
        batch_train: batch size of the network's training.
        lr_img: learning rate of the images, by gradient descent with momentum. None: 0.1, for DM 1.
        momentum: of the images.
        lr_net: learning rate of the network, by plain gradient descent.
        families: augmentations to pick from, see :mod:`~sparing.condensation.siamese`. None: all for DSA and DM, none
            for DC. DSA augments what the network is trained on, too.
        random_state: seed.
        callbacks: see :class:`~sparing.condensation.callbacks.Callbacks`; data are (images, labels).
        checkpoint_every: iterations between two states that are kept, where :meth:`fit` is given a keeper.

    Raises:
        InvalidValue: arguments outside what is allowed.
    """

    images_: Float[Tensor, "m c h w"]
    """(C · n_per_class, channels, H, W), class after class, in the space of the images that were given."""
    labels_: Int[Tensor, " m"]
    """(C · n_per_class,)."""
    loss_curve_: list[float]
    """For each iteration the loss, summed over classes, mean over updates."""
    cost_: dict[str, float]
    """``wall_s`` and ``cpu_s`` of all attempts up to their last state, ``peak_bytes`` of the process so far,
    ``bytes_before`` and ``bytes_after`` of images and labels."""

    def __init__(
        self,
        method: Method = "dc",
        n_per_class: int = 10,
        *,
        network: Callable[[], nn.Module] | None = None,
        init: Literal["noise", "real"] | None = None,
        distance: Metric = "layer_cos",
        max_iter: int | None = None,
        outer_steps: int | None = None,
        inner_steps: int | None = None,
        batch_real: int = 256,
        batch_train: int = 256,
        lr_img: float | None = None,
        momentum: float = 0.5,
        lr_net: float = 0.01,
        families: Sequence[str] | None = None,
        random_state: int = 0,
        callbacks: Sequence[Any] = (),
        checkpoint_every: int = 10,
    ) -> None:
        if method not in ("dc", "dsa", "dm"):
            raise InvalidValue(f'method = {method!r}; "dc", "dsa" or "dm" is expected')
        if init not in (None, "noise", "real"):
            raise InvalidValue(f'init = {init!r}; "noise", "real" or None is expected')
        if distance not in METRICS:
            raise InvalidValue(f"distance = {distance!r}; one of {', '.join(METRICS)} is expected")
        whole("ImageCondenser", n_per_class=n_per_class)
        if method == "dm":
            if outer_steps not in (None, 1) or inner_steps not in (None, 0):
                raise InvalidValue(
                    f"outer_steps = {outer_steps}, inner_steps = {inner_steps}: DM updates the images once for each "
                    "network and trains none; leave both out"
                )
            outer_steps, inner_steps = 1, 0
        elif outer_steps is None or inner_steps is None:
            if n_per_class not in LOOPS:
                raise InvalidValue(
                    f"outer_steps and inner_steps are known for n_per_class = {', '.join(map(str, LOOPS))}; for "
                    f"{n_per_class} give both"
                )
            known = LOOPS[n_per_class]
            outer_steps = known[0] if outer_steps is None else outer_steps
            inner_steps = known[1] if inner_steps is None else inner_steps
        self.method, self.n_per_class, self.network, self.distance = method, n_per_class, network, distance
        self.init = init or ("noise" if method == "dc" else "real")
        self.max_iter = (20_000 if method == "dm" else 1000) if max_iter is None else max_iter
        self.outer_steps, self.inner_steps = outer_steps, inner_steps
        self.batch_real, self.batch_train, self.checkpoint_every = batch_real, batch_train, checkpoint_every
        self.lr_img = (1.0 if method == "dm" else 0.1) if lr_img is None else lr_img
        self.momentum, self.lr_net = momentum, lr_net
        self.families = tuple(families if families is not None else () if method == "dc" else FAMILIES)
        self.random_state, self.callbacks = random_state, callbacks
        self._check()

    def _check(self) -> None:
        counts = ("max_iter", "outer_steps", "batch_real", "batch_train", "checkpoint_every")
        whole("ImageCondenser", **{name: getattr(self, name) for name in counts})
        whole("ImageCondenser", at_least=0, inner_steps=self.inner_steps)
        for name, rate in (("lr_img", self.lr_img), ("lr_net", self.lr_net)):
            if not 0 < rate < float("inf"):
                raise InvalidValue(f"{name} = {rate!r}; more than 0 is expected")
        if not 0 <= self.momentum < 1:
            raise InvalidValue(f"momentum = {self.momentum!r}; 0 ≤ momentum < 1 is expected")
        if self.families:
            check_families(self.families)
        if self.method == "dc" and self.families:
            raise InvalidValue(f'families = {self.families!r} with method "dc"; "dsa" is DC with augmentation')
        if self.method == "dsa" and not self.families:
            raise InvalidValue('families is empty with method "dsa"; "dc" is DSA without augmentation')

    def image_optimizer(self, images: Tensor) -> torch.optim.SGD:
        """What updates the synthetic images."""
        return torch.optim.SGD([images], lr=self.lr_img, momentum=self.momentum)

    def fit(self, X: Any, y: Any = None, *, keeper: Keeper | None = None) -> Self:
        """Condense images ``X`` (n, C, H, W) with labels ``y`` (n,), or a dataset of (image, label).

        Images are taken as they are: normalise them first, as the networks that learn from them will see them.

        Args:
            X: floating-point images, an array or tensor; or a dataset, which is read whole.
            y: whole numbers 0 … C−1, each at least once; None for a dataset.
            keeper: where the state is kept, and resumed from; a store's ``Progress`` is one.

        Raises:
            InvalidValue: what :func:`labelled_images` raises; fewer images of a class than ``init="real"`` needs; a
                state of another condensing.
            TrainingDiverged: a loss that is not finite.
        """
        callbacks = Callbacks(self.callbacks)
        before = labelled_images(X, y)
        with isolated_rng("condensed images' data", self.random_state):
            real, labels = labelled_images(*callbacks.data_ready(before))
        classes = int(labels.max()) + 1
        pools = [(labels == c).nonzero().flatten() for c in range(classes)]
        images = self._start(real, pools)
        optimizer = self.image_optimizer(images)
        self.labels_ = torch.arange(classes, device=real.device).repeat_interleave(self.n_per_class)
        settings = self.settings() | {"data": [*real.shape, classes]}
        iterate = self._match_distributions if self.method == "dm" else self._match_gradients
        with Run(
            {"images": images}, optimizer, callbacks, settings, self.max_iter, keeper, self.checkpoint_every
        ) as run:
            for iteration in run.left():
                with isolated_rng("condensing images", self.random_state, iteration):
                    loss = iterate(iteration, images, optimizer, real, pools, callbacks)
                    run.end(iteration, loss)
        self.images_, self.loss_curve_ = images.detach(), run.losses
        self.cost_ = run.cost(before, (self.images_, self.labels_))
        return self

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on but data, network and callbacks, as plain JSON."""
        names = (
            *("method", "n_per_class", "init", "distance", "max_iter", "outer_steps", "inner_steps", "batch_real"),
            *("batch_train", "lr_img", "momentum", "lr_net", "random_state"),
        )
        return {name: getattr(self, name) for name in names} | {"families": list(self.families)}

    @property
    def condensed_(self) -> TensorDataset:
        """The synthetic images with their labels."""
        from torch.utils.data import TensorDataset

        return marked(TensorDataset(self.images_, self.labels_), Callbacks(self.callbacks).provenance())

    @property
    def provenance_(self) -> dict[str, Any]:
        """How the images were made, as plain JSON: settings, loss curve, cost, and what callbacks say of themselves."""
        return {
            "settings": self.settings(),
            "loss_curve": self.loss_curve_,
            "cost": self.cost_,
            **Callbacks(self.callbacks).provenance(),
        }

    def _start(self, real: Tensor, pools: Sequence[Tensor]) -> Tensor:
        """The images to begin with."""
        generator = torch.Generator().manual_seed(derive_seed("first images", self.random_state))
        if self.init == "noise":
            shape = (len(pools) * self.n_per_class, *real.shape[1:])
            start = torch.randn(shape, generator=generator, dtype=real.dtype).to(real.device)
        else:
            for c, pool in enumerate(pools):
                if len(pool) < self.n_per_class:
                    raise InvalidValue(
                        f'init = "real" needs {self.n_per_class} images of class {c}, but there are {len(pool)}'
                    )
            start = torch.cat([real[_some(pool, self.n_per_class, generator)] for pool in pools])
        return start.clone().requires_grad_()

    def _update(
        self,
        images: Tensor,
        optimizer: torch.optim.Optimizer,
        real: Tensor,
        pools: Sequence[Tensor],
        generator: torch.Generator,
        loss_of: Callable[[Tensor, Tensor, int], Tensor],
    ) -> float:
        """One step of the images by ``loss_of(real batch, synthetic images, class)``, summed over classes."""
        total, gradients = 0.0, list[Tensor]()
        for c, pool in enumerate(pools):
            batch = real[_some(pool, self.batch_real, generator)]
            part = images[c * self.n_per_class : (c + 1) * self.n_per_class].detach().requires_grad_()
            seen = part
            if self.families:
                height, width = images.shape[2:]
                augment = draw_augmentation(height, width, Draws(generator), self.families)
                batch, seen = augment(batch), augment(part)
            loss = loss_of(batch, seen, c)
            gradients += torch.autograd.grad(loss, part)
            total += float(loss.detach())
        images.grad = torch.cat(gradients)
        optimizer.step()
        return total

    def _match_gradients(
        self,
        iteration: int,
        images: Tensor,
        optimizer: torch.optim.Optimizer,
        real: Tensor,
        pools: Sequence[Tensor],
        callbacks: Callbacks,
    ) -> float:
        """An iteration of DC or DSA; its mean loss."""
        network, generator = fresh_network(self.network, real, len(pools)), self._generator(iteration)
        learner = torch.optim.SGD(network.parameters(), lr=self.lr_net)
        total = 0.0
        for outer in range(self.outer_steps):
            self._freeze(network, real, pools, generator)
            callbacks.before_synthetic_update(iteration, outer)
            total += self._update(
                *(images, optimizer, real, pools, generator),
                lambda batch, mine, c: gradient_matching_loss(network, batch, mine, c, self.distance),
            )
            if outer == self.outer_steps - 1 or self.inner_steps == 0:
                continue
            network.train()
            for _ in range(self.inner_steps):
                train_epoch(
                    *(network, learner, images.detach(), self.labels_, self.batch_train, generator), self.families
                )
            callbacks.after_network_update(network)
            network.train()
        return total / self.outer_steps

    def _match_distributions(
        self,
        iteration: int,
        images: Tensor,
        optimizer: torch.optim.Optimizer,
        real: Tensor,
        pools: Sequence[Tensor],
        callbacks: Callbacks,
    ) -> float:
        """An iteration of DM; its loss. Callbacks get the network before the images are updated, untrained as it is."""
        network, generator = fresh_network(self.network, real, len(pools)), self._generator(iteration)
        callbacks.after_network_update(network)
        network.train().requires_grad_(False)
        self._freeze(network, real, pools, generator)
        callbacks.before_synthetic_update(iteration, 0)
        return self._update(
            *(images, optimizer, real, pools, generator),
            lambda batch, mine, c: distribution_matching_loss(network, batch, mine),
        )

    def _generator(self, iteration: int) -> torch.Generator:
        """Of batches, orders and augmentations: apart from the global one, which callbacks may draw from."""
        return torch.Generator().manual_seed(derive_seed("image batches", self.random_state, iteration))

    def _freeze(self, network: nn.Module, real: Tensor, pools: Sequence[Tensor], generator: torch.Generator) -> None:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            freeze_batch_norms(network, torch.cat([real[_some(pool, STATISTICS, generator)] for pool in pools]))


def _some(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to ``count`` different entries of ``pool``, at random."""
    return pool[torch.randperm(len(pool), generator=generator)[:count].to(pool.device)]
