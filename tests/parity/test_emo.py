"""EMO beside the reference: counts, names, whole models, single blocks with gradients, windows, the schedule.

What a file holds is read from its keys, and every key has to be understood; sizes, seeds and settings come from it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparing.core.cost import mac_count
from sparing.models.emo import EMO, VARIANTS, InvertedResidualMobileBlock, window_index
from sparing.optimization.schedules import cosine_unshifted

MODEL = 1e-4
UNIT = 1e-5
"""Relative and absolute tolerances of the README."""
LARGE = 224
"""Side of the images that counts without "@" are for, says the README."""


class Oracle(Mapping[str, np.ndarray]):
    """A file's arrays, which knows what of it was read and counts what was compared."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "") -> None:
        self.arrays, self.name, self.read, self.compared = dict(arrays), name, set[str](), 0

    def __getitem__(self, key: str) -> np.ndarray:
        value = self.arrays[key]
        self.read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def text(self, key: str) -> Any:
        return json.loads(str(self[key]))

    def close(self, key: str, found: Any, tolerance: float, scaled: bool = False) -> None:
        """``found`` is the array ``key``, to ``tolerance``, if the file has it.

        ``scaled``: in units of the array's largest number, as rounding errors of gradients of large sums are.
        """
        if key in self.arrays:
            found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
            assert found.shape == self[key].shape, f"{self.name}: {key}: {found.shape}, not {self[key].shape}"
            absolute = tolerance * max(1.0, float(np.abs(self[key]).max(initial=0))) if scaled else tolerance
            np.testing.assert_allclose(found, self[key], rtol=tolerance, atol=absolute, err_msg=f"{self.name}: {key}")
            self.compared += 1

    def equal(self, key: str, found: Sequence[Any] | int) -> None:
        """``found`` is the array ``key`` exactly, if the file has it."""
        if key in self.arrays:
            assert self[key].tolist() == found, f"{self.name}: {key}"
            self.compared += 1

    def done(self) -> int:
        """Number of arrays compared; all have been read."""
        unread = sorted(self.arrays.keys() - self.read)
        assert not unread, f"{self.name}: not understood: {unread}"
        assert self.compared, f"{self.name}: nothing was compared"
        return self.compared


# --- the README's rules


def names_of(model: nn.Module) -> list[str]:
    return sorted(name for name in model.state_dict() if not name.endswith("num_batches_tracked"))


def filled(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Fill the state by the README's rule; returns what was filled in."""
    draw = np.random.default_rng(seed)
    state = model.state_dict()
    values = {}
    for name in names_of(model):
        shape = tuple(state[name].shape)
        z = draw.standard_normal(shape)
        if name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(z)
        elif name.endswith(("running_mean", "bias")):
            value = 0.1 * z
        elif len(shape) == 1:
            value = 1 + 0.1 * z
        else:
            value = z / np.sqrt(np.prod(shape[1:]))
        values[name] = torch.from_numpy(value.astype(np.float32))
    model.load_state_dict(values, strict=False)
    return values


def images(seed: Any, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(int(seed)).standard_normal(shape).astype(np.float32))


def shapes_of(state: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    return ["x".join(map(str, state[name].shape)) for name in names]


def built(variant: str = "1M", **config: Any) -> EMO:
    if "in_chans" in config:
        config["in_channels"] = config.pop("in_chans")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return EMO(variant, **config)


def stages(model: EMO, x: Tensor) -> list[Tensor]:
    """Outputs of stages 0 to 4, as a pyramid gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # odd sizes are padded, as they are meant to be
        first: list[Tensor] = []
        handle = model.stage0.register_forward_hook(lambda module, inputs, output: first.append(output))
        rest = model.forward_features(x)
        handle.remove()
    return [*first, *rest]


def logits(model: EMO, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        out = model(x)
    assert isinstance(out, Tensor)
    return out


# --- what a file may hold


def counts(oracle: Oracle) -> None:
    """Keys ``TAG.…``: exact numbers and names of a variant."""
    tags = {key.split(".")[0] for key in oracle if re.match(r"[^.]+\.(params_total|macs_total|state_names)", key)}
    for tag in sorted(tags):
        variant = tag.removeprefix("EMO_")
        assert variant in VARIANTS, f"{oracle.name}: {tag} names no variant"
        sizes = dict(zip(oracle.get(f"{tag}.state_names", ()), oracle.get(f"{tag}.state_shapes", ()), strict=True))
        classes = int(str(sizes.get("head.weight", "1000")).split("x")[0])
        model = built(variant, num_classes=classes)
        state = model.state_dict()
        oracle.equal(f"{tag}.params_total", sum(p.numel() for p in model.parameters()))
        oracle.equal(f"{tag}.buffers_total", sum(b.numel() for b in model.buffers()))
        oracle.equal(f"{tag}.state_names", list(state))
        oracle.equal(f"{tag}.state_shapes", shapes_of(state, list(state)))
        oracle.close(f"{tag}.drop_path", model.drop_path_rates, 1e-6)
        oracle.equal(f"{tag}.no_weight_decay_names", model.no_weight_decay_names())
        if f"{tag}.modules" in oracle:
            modules = oracle[f"{tag}.modules"].tolist()
            assert set(modules) == {name for name, part in model.named_children() if list(part.parameters())}
            found = [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in modules]
            oracle.equal(f"{tag}.params_by_module", found)
        totals = {key: int(key.partition("@")[2] or LARGE) for key in oracle if key.startswith(f"{tag}.macs_total")}
        hollow = model.to("meta")  # shapes without numbers are enough to count
        for side in {*totals.values(), *([LARGE] if f"{tag}.macs_by_module" in oracle else [])}:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                found_macs = mac_count(hollow, (torch.zeros(1, 3, side, side),), "fvcore")
            for key, wanted in totals.items():
                if wanted == side:
                    oracle.equal(key, found_macs.total)
            if side == LARGE and f"{tag}.macs_by_module" in oracle:
                oracle.equal(f"{tag}.macs_by_module", [found_macs.by_module[name] for name in modules])
            if side == LARGE and f"{tag}.macs_by_operator" in oracle:
                operators = oracle[f"{tag}.operators"].tolist()
                assert set(operators) == set(found_macs.by_operator)
                oracle.equal(f"{tag}.macs_by_operator", [found_macs.by_operator[name] for name in operators])


def small_models(oracle: Oracle) -> None:
    """``config``: a small model, rule-filled, in evaluation and in training mode."""
    config, seed = oracle.text("config"), int(oracle["seed"])
    model = built(**config)
    filled(model, seed)
    oracle.equal("fill_names", names_of(model))
    oracle.equal("fill_shapes", shapes_of(model.state_dict(), names_of(model)))
    sizes = list(dict.fromkeys(m[1] for key in oracle if (m := re.match(r"(\d+x\d+)\.", key))))
    batches = {}
    for size in sizes:
        height, width = map(int, size.split("x"))
        x_seed = oracle[f"{size}.x_seed"] if f"{size}.x_seed" in oracle else 1000 + height + width
        batch = next(oracle[key].shape[0] for key in oracle if key.startswith(f"{size}.eval."))
        x = batches[size] = images(x_seed, batch, model.in_channels, height, width)
        model.eval()
        with torch.no_grad():
            oracle.close(f"{size}.eval.logits", logits(model, x), MODEL)
            for number, output in enumerate(stages(model, x)):
                oracle.close(f"{size}.eval.stage{number}", output, MODEL)
    if any(key.startswith("train.") for key in oracle):
        training(oracle, model, batches[sizes[0]])


def training(oracle: Oracle, model: EMO, x: Tensor) -> None:
    """Keys ``train.…``: one forward and backward pass over the first batch."""
    targets = torch.from_numpy(oracle["train.targets"])
    out = logits(model.train(), x)
    loss = nn.functional.cross_entropy(out, targets, label_smoothing=0.1)
    loss.backward()
    oracle.close("train.logits", out, MODEL)
    oracle.close("train.label_smoothing_ce", loss, MODEL)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    oracle.equal("train.grad_names", list(gradients))
    oracle.close("train.grad_norms", [float(grad.norm()) for grad in gradients.values()], MODEL, scaled=True)
    for key in oracle:
        if key.startswith("train.grad."):
            oracle.close(key, gradients[key.removeprefix("train.grad.")], MODEL, scaled=True)
        if found := re.match(r"train\.(running_mean|running_var)\.(.+)", key):
            oracle.close(key, getattr(model.get_submodule(f"{found[2]}.norm"), found[1]), MODEL)


def large_models(oracle: Oracle) -> None:
    """``stageK.shape``: a published model, rule-filled; the outputs' statistics."""
    shapes = [oracle[f"stage{number}.shape"].tolist() for number in range(5)]
    widths = tuple(shape[1] for shape in shapes[1:])
    variant = next(name for name, fields in VARIANTS.items() if tuple(fields["embed_dims"]) == widths)
    batch, _, height, width = shapes[0]
    model = built(variant, num_classes=oracle["logits"].shape[-1]).eval()
    filled(model, int(oracle["seed"]))
    x = images(oracle["x_seed"], batch, 3, 2 * height, 2 * width)
    with torch.no_grad():
        oracle.close("logits", logits(model, x).reshape(oracle["logits"].shape), MODEL)
        for number, output in enumerate(stages(model, x)):
            oracle.equal(f"stage{number}.shape", list(output.shape))
            oracle.close(f"stage{number}.channel_mean", output.mean((0, 2, 3)), MODEL)
            oracle.close(f"stage{number}.std", output.std(), MODEL)


def units(oracle: Oracle) -> None:
    """Keys ``TAG.kwargs``, …: single blocks with their weights."""
    for tag in [key.removesuffix(".kwargs") for key in oracle if key.endswith(".kwargs")]:
        off = {"attn_s": False, "attn_pre": False, "qkv_bias": False, "v_group": False}
        block = InvertedResidualMobileBlock(**{**off, **oracle.text(f"{tag}.kwargs")})
        weights = filled(block, int(oracle[f"{tag}.seed"]))
        stored = {key.removeprefix(f"{tag}.w."): key for key in oracle if key.startswith(f"{tag}.w.")}
        assert not stored or stored.keys() == weights.keys(), f"{oracle.name}: {tag}: other weights than ours"
        for name, key in stored.items():
            oracle.close(key, weights[name], 1e-7)
        block.load_state_dict({name: torch.from_numpy(oracle[key]) for name, key in stored.items()}, strict=False)
        oracle.equal(f"{tag}.names", sorted(weights))
        x = torch.from_numpy(oracle[f"{tag}.x"]).requires_grad_()
        oracle.close(f"{tag}.y_eval", block.eval()(x), UNIT)
        y = block.train()(x)
        oracle.close(f"{tag}.y_train", y, UNIT)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        oracle.close(f"{tag}.grad_x", gradient, UNIT, scaled=True)


def schedules(oracle: Oracle) -> None:
    """Which pixel sits where in which window; rates by iteration."""
    for key in oracle:
        if found := re.fullmatch(r"window_index_(\d+)x(\d+)_ws(-?\d+)", key):
            oracle.equal(key, window_index(*map(int, found.groups())).tolist())
    if "lr_setting" in oracle:
        number = r"([\d.eE+-]+)"
        pattern = f"{number} epochs x {number} iterations, warm-up {number} epochs, peak {number}, warm-up start "
        found = re.fullmatch(f"{pattern}{number}, floor {number}", str(oracle["lr_setting"]))
        assert found, f"{oracle.name}: {oracle['lr_setting']}"
        epochs, iterations, warmup, peak, start, floor = map(float, found.groups())
        rates = [
            cosine_unshifted(iteration, round(epochs * iterations), round(warmup * iterations), peak, start, floor)
            for iteration in oracle["lr_iterations"].tolist()
        ]
        np.testing.assert_allclose(rates, oracle["lr_values"], rtol=1e-6, atol=0)
        oracle.close("lr_values", rates, 1e-9)


def compare(arrays: Mapping[str, np.ndarray], name: str) -> int:
    """Number of arrays compared."""
    oracle = Oracle(arrays, name)
    counts(oracle)
    units(oracle)
    schedules(oracle)
    if "config" in oracle:
        small_models(oracle)
    if "stage0.shape" in oracle:
        large_models(oracle)
    return oracle.done()


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("emo"):
        with np.load(file, allow_pickle=False) as opened:
            count += compare(dict(opened), file.name)
    record_property("arrays", count)
    print(f"EMO: {count} arrays compared")


# --- the comparison itself notices


@pytest.fixture
def files(oracles: Callable[[str], list[Path]]) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(file, allow_pickle=False)) for file in oracles("emo")]


def first(files: list[dict[str, np.ndarray]], ending: str) -> tuple[dict[str, np.ndarray], str]:
    """A file that has a key of this ending, and that key; the test is skipped when none of ``--oracles`` has."""
    for arrays in files:
        for key in arrays:
            if key.endswith(ending):
                return arrays, key
    pytest.skip(f"no key ends in {ending}")


def test_a_key_that_is_not_understood_is_told(files: list[dict[str, np.ndarray]]) -> None:
    arrays, _ = first(files, "lr_setting")
    with pytest.raises(AssertionError, match=r"not understood: \['lr_colour'\]"):
        compare({**arrays, "lr_colour": np.zeros(1)}, "file")


@pytest.mark.parametrize("ending", ["params_total", "macs_total", "macs_by_operator", "grad_x", "lr_values"])
def test_another_number_is_told(files: list[dict[str, np.ndarray]], ending: str) -> None:
    arrays, key = first(files, ending)
    mine = {name: value for name, value in arrays.items() if name.split(".")[0] == key.split(".")[0] or "lr_" in key}
    changed = mine[key] + 1 if mine[key].dtype.kind == "i" else mine[key] * 1.001
    with pytest.raises(AssertionError):
        compare({**mine, key: changed}, "file")


def test_another_seed_is_told(files: list[dict[str, np.ndarray]]) -> None:
    arrays, _ = first(files, "config")
    with pytest.raises(AssertionError, match="eval"):
        compare({**arrays, "seed": arrays["seed"] + 1}, "file")
