"""LegoDNN on Fashion-MNIST: accuracy at every size and deadline against other ways to several sizes, and speed.

python benchmarks/legodnn.py train                    # only the trainings
python benchmarks/legodnn.py [tables] [speed]
SEEDS=0,1 python benchmarks/legodnn.py …              # fewer seeds; the results say which

A small ResNet of 8 blocks and a VGG-like network of 3. Trainings and accuracies of composed networks are kept in the
system's folder for temporary files, and made anew when the code they depend on changes.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from _claims import Claim, main
from sparing.adaptive import block_distillation, blocks, descendants
from sparing.adaptive.block_distillation import distill_blocks
from sparing.adaptive.blocks import extract_blocks
from sparing.adaptive.descendants import SPARSITIES, BlockZoo
from sparing.adaptive.lego import LegoModel
from sparing.core import files
from sparing.core.fingerprint import fingerprint
from sparing.core.predictor import build_model
from sparing.core.randomness import isolated_rng
from sparing.core.store import Progress
from sparing.core.training import Batches, Train, fit
from sparing.models import convnet, resnet
from sparing.tasks.custom import CustomTask
from sparing.tasks.images.published import FashionMNIST

SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2").split(",")]
TRAIN, VAL, TEST = 20_000, 2_000, 5_000
BATCH, BLOCK_EPOCHS, TUNING_EPOCHS = 128, 3, 3
NETS: dict[str, dict[str, Any]] = {
    "resnet": {"kind": "resnet", "max_ratio": 0.125, "widths": [16, 32, 64, 128]},
    "vgg": {"kind": "convnet", "max_ratio": 0.25, "widths": [16, 32, 64, 128], "depths": [2, 2, 2, 1]},
}


def original_settings() -> Train:
    """The network: SGD 0.1, momentum 0.9, weight decay 5e-4, a tenth of the rate at half and at three quarters."""
    steps = 8 * -(-TRAIN // BATCH)
    return Train(
        epochs=8,
        batch_size=BATCH,
        optimizer="SGD",
        lr=0.1,
        weight_decay=5e-4,
        optimizer_args={"momentum": 0.9},
        scheduler="MultiStepLR",
        scheduler_args={"milestones": [steps // 2, 3 * steps // 4], "gamma": 0.1},
        accelerator="cpu",
    )


def tuning_settings() -> Train:
    """Fine-tuning of a pruned network with labels: SGD 0.01, momentum 0.9."""
    return Train(
        epochs=TUNING_EPOCHS,
        batch_size=BATCH,
        optimizer="SGD",
        lr=0.01,
        optimizer_args={"momentum": 0.9},
        accelerator="cpu",
    )


# ------------------------------------------------------------------------------------------------------------ trainings


@functools.cache
def work() -> Path:
    """Where trainings and tables are kept; another folder when what decides them has changed."""
    sources = [inspect.getsource(module) for module in (blocks, descendants, block_distillation, convnet, resnet)]
    settings = [inspect.getsource(original_settings), inspect.getsource(tuning_settings)]
    about = repr((NETS, TRAIN, VAL, TEST, BATCH, BLOCK_EPOCHS, TUNING_EPOCHS, SPARSITIES))
    key = fingerprint([*sources, *settings, about, torch.__version__])[:16]
    return Path(tempfile.gettempdir()) / "sparing-benchmarks" / f"legodnn-{key}"


@functools.cache
def task(net: str) -> CustomTask:
    """Fashion-MNIST: 20,000 images to train on, 2,000 to profile on, 5,000 to test on."""
    root = os.environ.get("SPARING_DATA")
    splits = FashionMNIST().splits(Path(root) if root else None)

    def tensors(split: Any, start: int, count: int) -> TensorDataset:
        pairs = [split[i] for i in range(start, start + count)]
        images = torch.stack([torch.as_tensor(x) for x, _ in pairs])
        return TensorDataset(images, torch.tensor([int(y) for _, y in pairs]))

    about = {name: value for name, value in NETS[net].items() if name not in ("kind", "max_ratio")}
    return CustomTask(
        "fashion_mnist_28",
        tensors(splits.train, 0, TRAIN),
        tensors(splits.test, 0, TEST),
        val=tensors(splits.train, TRAIN, VAL),
        calibration=tensors(splits.train, TRAIN + VAL, 512),
        model=lambda: build_model(NETS[net]["kind"], in_channels=1, num_classes=10, **about),
        loss=torch.nn.functional.cross_entropy,
        labels=FashionMNIST.labels,
    )


def kept(net: str, name: str, seed: int, module: nn.Module, train: Callable[[Progress], Any]) -> None:
    """Put a training's weights into a module: those of before, or new ones, whose training can be killed."""
    target = work() / net / f"seed{seed}" / f"{name}.npz"
    if not target.is_file():
        progress = Progress(work() / "progress" / net / str(seed) / name)
        train(progress)
        files.write_arrays(target, {key: value.numpy() for key, value in state(module).items()})
        wall, cpu = progress.spent
        print(f"{net}, seed {seed}, {name}: {wall:.0f} s, {cpu:.0f} s of CPU", flush=True)
        progress.clear()
    values = {key: torch.from_numpy(value.copy()) for key, value in files.read_arrays(target).items()}
    module.load_state_dict(values)
    module.eval()


def state(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights, apart from it."""
    return {key: value.detach().clone().contiguous() for key, value in module.state_dict().items()}


@functools.cache
def original(net: str, seed: int) -> nn.Module:
    """The network, trained by itself."""
    with isolated_rng("legodnn", net, seed):
        model = task(net).default_model().to(memory_format=torch.channels_last)
    data = task(net).splits(None)

    def train(progress: Progress) -> None:
        fit(model, task(net), data.train, None, original_settings(), None, seed, progress)

    kept(net, "original", seed, model, train)
    return model


def pruned(net: str, seed: int) -> BlockZoo:
    """Blocks and descendants that have not been trained."""
    graph = extract_blocks(original(net, seed), task(net).example_input(2)[0], NETS[net]["max_ratio"])
    return BlockZoo.build(graph)


@functools.cache
def zoo(net: str, seed: int) -> BlockZoo:
    """Blocks and their trained descendants."""
    made = pruned(net, seed)
    module = nn.ModuleDict({name.replace(".", "_"): one for name, one in made.named_descendants()})
    data = task(net).splits(None)
    images = data.train.tensors[0]

    def loader(epoch: int) -> Iterator[Tensor]:
        order = Batches(data.train, BATCH, seed)
        order.set_epoch(epoch)
        for batch in order:
            yield images[torch.tensor(batch)]

    def train(progress: Progress) -> None:
        distill_blocks(made, loader, BLOCK_EPOCHS, seed=seed, progress=progress)

    kept(net, "blocks", seed, module, train)
    return made


def tuned(net: str, seed: int, option: int) -> LegoModel:
    """The whole network at one sparsity, fine-tuned with labels for as many samples as its blocks together learn."""
    model = LegoModel(pruned(net, seed)).to(memory_format=torch.channels_last)
    model.apply((option,) * len(model.sizes))
    data = task(net).splits(None)

    def train(progress: Progress) -> None:
        fit(model, task(net), data.train, None, tuning_settings(), None, seed, progress)

    kept(net, f"tuned{option}", seed, model, train)
    return model


def train_all() -> None:
    """All trainings, seed by seed."""
    print(work(), flush=True)
    for net in NETS:
        for seed in SEEDS:
            zoo(net, seed)
            for option in range(1, len(SPARSITIES)):
                tuned(net, seed, option)


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {}

if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train_all()
    else:
        sys.exit(main("legodnn", BENCHMARKS))
