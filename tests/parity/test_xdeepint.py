"""xDeepInt beside its reference: interactions and their gradients, heads, both optimizers, training, binning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from sparing.data.binning import log_square_bins, signed_log
from sparing.models.xdeepint import MultiHeadInteraction, PolynomialInteraction, XDeepInt
from sparing.optimization.ftrl import FTRL, GroupFTRL, combined_optimizer, ftrl_update, group_ftrl_update

Arrays = Mapping[str, np.ndarray]
RTOL, ATOL = 1e-4, 1e-5


def close(found: Any, expected: np.ndarray, what: str, rtol: float = RTOL, atol: float = ATOL) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=what)


def activation(name: Any) -> str:
    return {"linear": "identity", "None": "identity", "": "identity", "swish": "silu"}.get(str(name), str(name))


def kernels(arrays: Arrays, prefix: str) -> list[np.ndarray]:
    """Arrays called ``prefix`` and a number, in the order of the numbers."""
    numbers = sorted(int(name.removeprefix(prefix)) for name in arrays if re.fullmatch(rf"{prefix}\d+", name))
    assert numbers == list(range(len(numbers))), f"{prefix}: numbers {numbers}"
    return [arrays[f"{prefix}{i}"] for i in numbers]


def fill(pin: nn.Module, given: list[np.ndarray]) -> None:
    layers: Any = pin.layers
    for layer, kernel in zip(layers, given, strict=True):
        layer.weight.data = torch.tensor(kernel.T)  # out[g] = Σ_f in[f] kernel[f, g]


# --- interactions


def interaction(arrays: Arrays) -> set[str]:
    batch, fields, dim, parts, layers, residual = (int(number) for number in arrays["cfg"])
    assert arrays["x"].shape == (batch, fields, dim)
    act, given = activation(arrays["activation"]), kernels(arrays, "kernel_")
    pin = PolynomialInteraction(fields, dim, layers, parts, act, residual=bool(residual))
    fill(pin, given)
    x = torch.tensor(arrays["x"], requires_grad=True)
    out = pin(x)
    close(out, arrays["out"], "out")
    # the rest through the whole network: one id for each field of each row, whose embedding is x
    model = XDeepInt([batch] * fields, dim, layers, parts, act, residual=bool(residual))
    fill(model.interaction, given)
    model.embedding.weight.data = x.detach().transpose(0, 1).reshape(-1, dim).clone()
    model.head.weight.data, model.head.bias.data = (
        torch.tensor(arrays["out_kernel"].T),
        torch.tensor(arrays["out_bias"]),
    )
    logit = model(torch.arange(batch)[:, None].expand(batch, fields))
    loss = binary_cross_entropy_with_logits(logit, torch.tensor(arrays["y"]), reduction="sum")
    loss.backward()
    close(logit, arrays["logit"], "logit")
    close(logit.sigmoid(), arrays["prob"], "prob")
    close(loss, arrays["loss_sum"], "loss_sum")
    assert model.embedding.weight.grad is not None
    close(model.embedding.weight.grad.view(fields, batch, dim).transpose(0, 1), arrays["grad_x"], "grad_x")
    close(model.head.weight.grad.T, arrays["grad_out_kernel"], "grad_out_kernel")
    close(model.head.bias.grad, arrays["grad_out_bias"], "grad_out_bias")
    for i, layer in enumerate(model.interaction.layers):
        close(layer.weight.grad.T, arrays[f"grad_kernel_{i}"], f"grad_kernel_{i}")
    named = {"cfg", "activation", "x", "y", "out", "logit", "prob", "loss_sum", "out_kernel", "out_bias", "grad_x"}
    numbered = {f"{kind}_{i}" for i in range(len(given)) for kind in ("kernel", "grad_kernel")}
    return named | numbered | {"grad_out_kernel", "grad_out_bias"}


def heads(arrays: Arrays) -> set[str]:
    layers, subspaces = arrays["layers"].tolist(), arrays["subspaces"].tolist()
    _, fields, dim = arrays["x"].shape
    acts = [activation(name) for name in arrays["activations"]]
    net = MultiHeadInteraction(fields, dim, arrays["projection"].shape[1], layers, subspaces, acts)
    net.projection.weight.data = torch.tensor(arrays["projection"].T)
    names = {"x", "projection", "out", "layers", "subspaces", "activations"}
    for number, head in enumerate(net.heads):
        fill(head, kernels(arrays, f"head{number}_kernel_"))
        names |= {f"head{number}_kernel_{i}" for i in range(layers[number])}
    close(net(torch.tensor(arrays["x"])), arrays["out"], "out")
    return names


# --- optimizers


def drive(make: Callable[[list[Tensor]], torch.optim.Optimizer], start: np.ndarray, grads: np.ndarray, sparse: bool):
    """After each step: (w, {"z", "n"}); sparse gradients name the rows that are not all zero, each of them twice."""
    parameter = torch.tensor(start, requires_grad=True)
    optimizer = make([parameter])
    for gradient in torch.tensor(grads):
        parameter.grad = gradient.clone()
        if sparse:
            rows = gradient.flatten(1).any(1).nonzero()[:, 0]
            halves = torch.cat([0.25 * gradient[rows], 0.75 * gradient[rows]])
            parameter.grad = torch.sparse_coo_tensor(
                rows.repeat(2)[None], halves, gradient.shape, check_invariants=True
            )
        optimizer.step()
        yield parameter, optimizer.state[parameter]


def group_ftrl(arrays: Arrays) -> set[str]:
    alpha, beta, lambda1, lambda2 = arrays["hyper"].tolist()

    def make(params: list[Tensor]) -> GroupFTRL:
        return GroupFTRL(params, alpha, beta, lambda1, lambda2)

    for sparse in (False, True):
        for t, (w, state) in enumerate(drive(make, arrays["w0"], arrays["grads"], sparse)):
            for name, found in (("w", w), ("z", state["z"]), ("n", state["n"])):
                close(found, arrays[name][t], f"{name}[{t}], sparse = {sparse}")
    w = torch.tensor(arrays["w0"]).double()
    z, n = torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(torch.tensor(arrays["grads"]).double()):
        w, z, n = group_ftrl_update(w, z, n, gradient, alpha, beta, lambda1, lambda2)
        close(w, arrays["w_float64"][t], f"w_float64[{t}]", 1e-9, 1e-11)
    return {"hyper", "w0", "grads", "w", "z", "n", "w_float64"}


def ftrl(arrays: Arrays) -> set[str]:
    lr, l1, l2, start = arrays["hyper"].tolist()

    def make(params: list[Tensor]) -> FTRL:
        return FTRL(params, lr, l1, l2, start)

    for sparse in (False, True):
        for t, (w, state) in enumerate(drive(make, arrays["w0"], arrays["grads"], sparse)):
            for name, found in (("w", w), ("linear", state["z"]), ("accum", state["n"])):
                close(found, arrays[name][t], f"{name}[{t}], sparse = {sparse}")
    w = torch.tensor(arrays["w0"])
    z, n = torch.zeros_like(w), torch.full_like(w, start)
    for t, gradient in enumerate(torch.tensor(arrays["grads"])):
        w, z, n = ftrl_update(w, z, n, gradient, lr, l1, l2)
        close(w, arrays["w"][t], f"w[{t}] of the function")
    return {"hyper", "w0", "grads", "w", "linear", "accum"}


# --- training


def training(arrays: Arrays) -> set[str]:
    batch, fields, dim, parts, layers = (int(number) for number in arrays["cfg"])
    assert arrays["ids"].shape[1:] == (batch, fields)
    tables = kernels(arrays, "init_embedding_")
    alpha, beta, lambda1, lambda2 = arrays["embedding_hyper"].tolist()
    lr, l1, l2, start = arrays["pin_hyper"].tolist()
    for sparse in (False, True):
        model = XDeepInt([len(table) for table in tables], dim, layers, parts)
        model.embedding.weight.data = torch.tensor(np.concatenate(tables))
        fill(model.interaction, kernels(arrays, "init_kernel_"))
        model.head.weight.data = torch.tensor(arrays["init_out_kernel"].T)
        model.head.bias.data = torch.tensor(arrays["init_out_bias"])
        optimizer = combined_optimizer(model, alpha, beta, lambda1, lambda2, lr, l1, l2, start, sparse)
        for t, (ids, clicked) in enumerate(zip(arrays["ids"], arrays["labels"], strict=True)):
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(model(torch.tensor(ids)), torch.tensor(clicked), reduction="sum")
            close(loss, arrays["loss_per_step"][t], f"loss_per_step[{t}], sparse = {sparse}")
            loss.backward()
            assert model.embedding.weight.grad is not None
            assert model.embedding.weight.grad.is_sparse == sparse
            optimizer.step()
        for i in range(fields):
            close(model.embedding.field(i), arrays[f"final_embedding_{i}"], f"final_embedding_{i}, sparse = {sparse}")
        for i, layer in enumerate(model.interaction.layers):
            close(layer.weight.T, arrays[f"final_kernel_{i}"], f"final_kernel_{i}, sparse = {sparse}")
        close(model.head.weight.T, arrays["final_out_kernel"], f"final_out_kernel, sparse = {sparse}")
        close(model.head.bias, arrays["final_out_bias"], f"final_out_bias, sparse = {sparse}")
    moments = ("init", "final")
    names = {f"{when}_embedding_{i}" for when in moments for i in range(fields)}
    names |= {f"{when}_kernel_{i}" for when in moments for i in range(layers)}
    names |= {f"{when}_{name}" for when in moments for name in ("out_kernel", "out_bias")}
    return names | {"ids", "labels", "loss_per_step", "cfg", "embedding_hyper", "pin_hyper"}


def binning(arrays: Arrays) -> set[str]:
    np.testing.assert_array_equal(log_square_bins(arrays["x"]), arrays["log_square_bin"])
    close(signed_log(arrays["x"]), arrays["signed_log"], "signed_log")
    return {"x", "log_square_bin", "signed_log"}


KINDS: dict[str, Callable[[Arrays], set[str]]] = {
    "grad_out_kernel": interaction,
    "projection": heads,
    "z": group_ftrl,
    "accum": ftrl,
    "loss_per_step": training,
    "log_square_bin": binning,
}
"""The array that tells what a file holds."""


def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as opened:
        return dict(opened)


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("xdeepint"):
        arrays = read(file)
        kinds = [compare for name, compare in KINDS.items() if name in arrays]
        assert len(kinds) == 1, f"{file.name}: not understood: {sorted(arrays)}"
        compared = kinds[0](arrays)
        assert compared == arrays.keys(), f"{file.name}: {sorted(arrays.keys() ^ compared)} not understood or missing"
        count += len(compared)
    record_property("arrays", count)
    print(f"xDeepInt: {count} arrays read, all that are outputs compared")


@pytest.mark.parametrize("name", list(KINDS))
def test_other_numbers_would_be_noticed(name: str, oracles: Callable[[str], list[Path]]) -> None:
    """A hundredth in one input, and the comparison fails."""
    changed = {"grad_out_kernel": "kernel_0", "projection": "projection", "z": "hyper", "accum": "hyper"}.get(name, "x")
    changed = "embedding_hyper" if name == "loss_per_step" else changed
    arrays = read(next(file for file in oracles("xdeepint") if name in read(file)))
    with pytest.raises(AssertionError):
        KINDS[name](arrays | {changed: arrays[changed] * 1.2 + 0.01})
