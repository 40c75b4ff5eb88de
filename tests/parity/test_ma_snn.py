"""MA-SNN beside the reference: gates, neurons, layers, networks, residual nets, events, counts and energy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from sparing.data.events.framing import clip_starts, events_to_frames
from sparing.data.events.stream import EventStream
from sparing.models.spiking.attention import MultiDimAttention, SpatialAttention
from sparing.models.spiking.gesture import GestureSNN
from sparing.models.spiking.layers import ConvAttLIF, gate
from sparing.models.spiking.neurons import LIF, SpikeRect
from sparing.models.spiking.report import base_energy, spike_report
from sparing.models.spiking.residual import MSBlock, MSResSNN, residual_lif

Arrays = Mapping[str, np.ndarray]
VARIANTS = ("TCSA", "TCA", "TSA", "CSA", "TA", "CA", "SA")
SENSOR = 128
"""Pixels along a side, as the fixtures' README says."""


def close(found: Any, expected: np.ndarray, what: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, {expected.shape} in the reference"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=what)


def gradient(found: Any, expected: np.ndarray, what: str) -> None:
    close(found, expected, what, 1e-3, 3e-6 * float(np.abs(expected).max()))


def exact(found: Any, expected: np.ndarray, what: str) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    np.testing.assert_array_equal(found, expected, err_msg=what)


def number(value: np.ndarray) -> Any:
    return value.item()


def group(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


# --- filling by rule


def filled_names(model: nn.Module) -> list[str]:
    return sorted(name for name in model.state_dict() if not name.endswith("num_batches_tracked"))


def fill(model: nn.Module, seed: int) -> None:
    """The fixtures' rule for weights that are not stored."""
    draw, state = np.random.default_rng(seed), model.state_dict()
    for name in filled_names(model):
        z = draw.standard_normal(tuple(state[name].shape))
        if name.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        elif name.endswith(("running_mean", "bias")):
            z = 0.1 * z
        elif z.ndim == 1:
            z = 1 + 0.1 * z
        else:
            z = z / np.sqrt(np.prod(z.shape[1:]))
        state[name].copy_(torch.from_numpy(z.astype(np.float32)))


def check_names(model: nn.Module, names: np.ndarray, shapes: np.ndarray) -> None:
    state = model.state_dict()
    ours = [(name, "x".join(map(str, state[name].shape))) for name in filled_names(model)]
    assert ours == list(zip(names.tolist(), shapes.tolist(), strict=True))


def check_norms(model: nn.Module, names: np.ndarray, norms: np.ndarray, what: str) -> None:
    found = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(names.tolist()), f"{what}: gradients of {sorted(found)}"
    largest = float(norms.max())
    for name, norm in zip(names.tolist(), norms.tolist(), strict=True):
        noise = 3e-6 if name.endswith(("conv2d.bias", "linear.bias")) else 1e-6
        np.testing.assert_allclose(found[name], norm, rtol=1e-3, atol=noise * largest, err_msg=f"{what}: {name}")


# --- gates


def attention(arrays: Arrays) -> set[str]:
    x, shape = arrays["x"], tuple(arrays["shape"].tolist())
    assert x.shape == shape
    exact(np.random.default_rng(number(arrays["x_seed"])).standard_normal(shape).astype(np.float32), x, "x")
    T, C = shape[1:3]
    r_t, r_c = number(arrays["t_ratio"]), number(arrays["c_ratio"])
    compared = {"x", "shape", "x_seed", "t_ratio", "c_ratio"}
    for variant in [v for v in VARIANTS if f"{v}.y" in arrays]:
        module = MultiDimAttention(variant, T, C, r_t, r_c)
        load(module, group(arrays, f"{variant}.w."))
        input = torch.tensor(x, requires_grad=True)
        y = module(input)
        close(y, arrays[f"{variant}.y"], f"{variant}.y")
        y.square().sum().backward()
        gradient(input.grad, arrays[f"{variant}.grad_x"], f"{variant}.grad_x")
        for letter, each in module.gates.items():
            name = f"{variant}.{letter.lower()}a_on_x"
            close(each(torch.tensor(x)), arrays[name], name)
            compared.add(name)
        compared |= {f"{variant}.y", f"{variant}.grad_x"} | {f"{variant}.w.{n}" for n in module.state_dict()}
    if "TAfc.x" in arrays:
        module = MultiDimAttention("TA", arrays["TAfc.x"].shape[1], r_t=r_t, flat=True)
        load(module, group(arrays, "TAfc.w."))
        close(module(torch.tensor(arrays["TAfc.x"])), arrays["TAfc.y"], "TAfc.y")
        compared |= {"TAfc.x", "TAfc.y"} | {f"TAfc.w.{n}" for n in module.state_dict()}
    for kernel in {int(m[1]) for name in arrays if (m := re.match(r"SA(\d+)\.", name))}:
        module = SpatialAttention(kernel)
        load(module, group(arrays, f"SA{kernel}.w."))
        close(module(torch.tensor(x)), arrays[f"SA{kernel}.gate"], f"SA{kernel}.gate")
        compared |= {f"SA{kernel}.gate", f"SA{kernel}.w.conv.weight"}
    return compared


def load(module: nn.Module, weights: Arrays) -> None:
    module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})


# --- neurons

MODES = {
    "spike_NTR": {"mode": "spike"},
    "mem_NTR": {"mode": "mem"},
    "mem_TR": {"mode": "mem", "threshold_relu": True},
}


def neuron(arrays: Arrays) -> set[str]:
    alpha, v_th, b = (number(arrays[name]) for name in ("alpha", "Vthres", "beta"))
    current = torch.tensor(arrays["current"]).transpose(0, 1)
    weight = torch.tensor(arrays["out_weight"]).transpose(0, 1)
    compared = {"alpha", "Vthres", "beta", "current", "out_weight"}
    for name in [m for m in MODES if f"{m}.out" in arrays]:
        lif = LIF(alpha, v_th, 0.25, b=b, **MODES[name])
        input = current.clone().requires_grad_()
        out = lif(input)
        (out * weight).sum().backward()
        state, states, plain = None, [], []
        for x in current.unbind(1):
            o, state = lif.step(x, state)
            states.append(state)
            plain.append(o)
        check = exact if name.startswith("spike") else close
        check(out.transpose(0, 1), arrays[f"{name}.out"], f"{name}.out")
        check(torch.stack(plain), arrays[f"{name}.out"], f"{name}.out, step by step")
        close(torch.stack(states), arrays[f"{name}.state"], f"{name}.state")
        assert input.grad is not None
        gradient(input.grad.transpose(0, 1), arrays[f"{name}.grad_current"], f"{name}.grad_current")
        compared |= {f"{name}.{what}" for what in ("out", "state", "grad_current")}
    hard = group(arrays, "paper_hard_reset.")
    if hard:
        lif = LIF(0.3, v_th, reset="hard")
        exact(lif(current).transpose(0, 1), hard["spikes"], "paper_hard_reset.spikes")
        exact(lif(current.clone().requires_grad_()).transpose(0, 1), hard["spikes"], "paper_hard_reset, with gradient")
        state, membranes = torch.zeros_like(current[:, 0]), []
        for x in current.unbind(1):
            membranes.append(state + x)
            _, state = lif.step(x, state)
        close(torch.stack(membranes), hard["u"], "paper_hard_reset.u")
        compared |= {"paper_hard_reset.spikes", "paper_hard_reset.u"}
    return compared | surrogate(arrays, 0.0, 0.25, False)


def surrogate(arrays: Arrays, threshold: float, lens: float, strict: bool) -> set[str]:
    x = torch.tensor(arrays["surrogate.x"], requires_grad=True)
    y = SpikeRect.apply(x - threshold, lens, strict)
    y.sum().backward()
    exact(y, arrays["surrogate.y"], "surrogate.y")
    exact(x.grad, arrays["surrogate.grad"], "surrogate.grad")
    return {"surrogate.x", "surrogate.y", "surrogate.grad"}


# --- networks


def network_of(config: Mapping[str, Any], variant: str) -> GestureSNN:
    return GestureSNN(
        in_channels=config["channels"][0],
        num_classes=config["fc"][-1],
        image_size=config["size"],
        T=config["T"],
        widths=config["channels"][1:],
        pools=config["pool"],
        hidden=config["fc"][:-1],
        attention="none" if variant == "no" else variant,
        r_t=config["t_ratio"],
        r_c=config["c_ratio"],
    )


NETWORK = frozenset(
    {"seed", "fill_names", "fill_shapes", "bn_gain", "min_margin", "neurons"}
    | {f"train.{name}" for name in ("out", "mse", "grad_norms", "grad_names")}
    | {f"eval.{name}" for name in ("out", "spike_rate", "spikes_total", "layer0", "nasar")}
)


def network(arrays: Arrays) -> set[str]:
    config = json.loads(str(arrays["config"]))
    x = torch.tensor(arrays["x"].astype(np.float32))
    assert len(x) == config["batch"]
    compared = {"config", "x", "x_seed"}
    variants = [name.removesuffix(".seed") for name in arrays if name.endswith(".seed")]
    assert variants
    for variant in variants:
        case = group(arrays, f"{variant}.")
        model = network_of(config, variant)
        check_names(model, case["fill_names"], case["fill_shapes"])
        fill(model, number(case["seed"]))
        for layer in model.layers:
            layer.BNLayer.weight.data *= number(case["bn_gain"])
        trained(model, x, case, variant)
        # evaluation looks at running statistics, which training has moved
        fill(model, number(case["seed"]))
        for layer in model.layers:
            layer.BNLayer.weight.data *= number(case["bn_gain"])
        evaluated(model, x, case, variant)
        compared |= {f"{variant}.{name}" for name in NETWORK}
    return compared


def trained(model: GestureSNN, x: Tensor, case: Arrays, what: str) -> None:
    model.train()
    out = model(x)
    target = one_hot(torch.arange(len(x)) % model.num_classes, model.num_classes).float()
    loss = mse_loss(out, target)
    loss.backward()
    close(out, case["train.out"], f"{what}.train.out")
    close(loss, case["train.mse"], f"{what}.train.mse")
    check_norms(model, case["train.grad_names"], case["train.grad_norms"], f"{what}.train")


def evaluated(model: GestureSNN, x: Tensor, case: Arrays, what: str) -> None:
    model.eval()
    first: list[Tensor] = []
    handle = model.layers[0].register_forward_hook(lambda module, inputs, output: first.append(output))
    report = spike_report(model, x)
    handle.remove()
    with torch.no_grad():
        close(model(x), case["eval.out"], f"{what}.eval.out")
    exact(np.packbits(first[0].numpy().astype(np.uint8)), case["eval.layer0"], f"{what}.eval.layer0")
    exact([layer.neurons for layer in report.layers], case["neurons"], f"{what}.neurons")
    exact([round(layer.spikes * len(x), 6) for layer in report.layers], case["eval.spikes_total"], f"{what}.spikes")
    close([layer.rate for layer in report.layers], case["eval.spike_rate"], f"{what}.spike_rate", 1e-5)
    close(report.nasar, case["eval.nasar"], f"{what}.nasar", 1e-5)


# --- the paper's placement


def paper_layer(arrays: Arrays) -> set[str]:
    x = torch.tensor(arrays["x"])
    T, C = x.shape[1:3]
    hidden_t, hidden_c, kernel = arrays["W_t0"].shape[0], arrays["W_c0"].shape[0], arrays["K_s"].shape[-1]
    lif = LIF(number(arrays["beta"]), number(arrays["v_th"]), reset="hard")
    layer = ConvAttLIF(C, C, 1, "TCSA", T, "membrane", T // hidden_t, C // hidden_c, lif)
    assert layer.attention is not None
    layer.attention.sa = SpatialAttention(kernel)
    weights = {
        f"{gate}a.sharedMLP.{place}.weight": arrays[f"W_{gate}{i}"][..., None, None, None]
        for gate in "tc"
        for i, place in enumerate((0, 2))
    }
    load(layer.attention, weights | {"sa.conv.weight": arrays["K_s"]})
    close(layer.attention.ta(x).flatten(1), arrays["gate_t"], "gate_t")
    h, membranes, spikes = None, [], []
    with torch.no_grad():
        for now in layer.gated(x).unbind(1):
            u = now if h is None else h + now
            membranes.append(gate(u.unsqueeze(1), layer.attention, "CS").squeeze(1))
            out, h = layer.step(now, h)
            spikes.append(out)
    close(torch.stack(membranes, 1), arrays["membrane"], "membrane")
    exact(torch.stack(spikes, 1), arrays["spikes"], "spikes")
    layer.current = lambda given: given  # type: ignore[method-assign]  # the fixture begins at the currents
    exact(layer(x.clone().requires_grad_()), arrays["spikes"], "spikes of the whole layer, with gradient")
    weights_used = {"W_t0", "W_t1", "W_c0", "W_c1", "K_s"}
    return weights_used | {"x", "gate_t", "membrane", "spikes", "beta", "v_th", "min_margin"}


# --- residual networks


def residual_block(arrays: Arrays) -> set[str]:
    shape = tuple(arrays["x_shape"].tolist())
    assert shape[0] == number(arrays["T"])
    assert shape[2] == number(arrays["in_channels"])
    block = MSBlock(shape[2], number(arrays["out_channels"]), number(arrays["stride"]))
    check_names(block, arrays["fill_names"], arrays["fill_shapes"])
    fill(block, number(arrays["seed"]))
    x = np.random.default_rng(number(arrays["x_seed"])).standard_normal(shape).astype(np.float32)
    input = torch.tensor(x).transpose(0, 1)
    with torch.no_grad():
        close(block.eval()(input).transpose(0, 1), arrays["y_eval"], "y_eval")
    input = input.clone().requires_grad_()
    y = block.train()(input)
    close(y.transpose(0, 1), arrays["y_train"], "y_train")
    y.square().sum().backward()
    assert input.grad is not None
    gradient(input.grad.transpose(0, 1), arrays["grad_x"], "grad_x")
    check_norms(block, arrays["grad_names"], arrays["grad_norms"], "block")
    input = torch.tensor(arrays["lif.x"]).transpose(0, 1).requires_grad_()
    spikes = residual_lif()(input)
    exact(spikes.transpose(0, 1), arrays["lif.spikes"], "lif.spikes")
    (spikes.transpose(0, 1) * torch.tensor(arrays["lif.out_weight"])).sum().backward()
    assert input.grad is not None
    gradient(input.grad.transpose(0, 1), arrays["lif.grad_x"], "lif.grad_x")
    given = {"T", "stride", "in_channels", "out_channels", "seed", "x_seed", "x_shape", "fill_names", "fill_shapes"}
    answers = {"y_eval", "y_train", "grad_x", "grad_names", "grad_norms", "min_margin"}
    return given | answers | {f"lif.{name}" for name in ("x", "spikes", "out_weight", "grad_x")}


def residual_nets(arrays: Arrays) -> set[str]:
    compared = set()
    for name in [n for n in arrays if re.fullmatch(r"resnet\d+\.params", n)]:
        depth = int(name.removeprefix("resnet").partition(".")[0])
        with torch.device("meta"):
            model = MSResSNN(depth)
        gates = [
            p.numel() for each in model.modules() if isinstance(each, MultiDimAttention) for p in each.parameters()
        ]
        convolutions = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "attention" not in n]
        found = {"params": sum(p.numel() for p in model.parameters()), "attention_params": sum(gates)}
        for what, count in (found | {"layers": len(convolutions)}).items():
            exact(count, arrays[f"resnet{depth}.{what}"], f"resnet{depth}.{what}")
            compared.add(f"resnet{depth}.{what}")
    block = MSBlock(4, 4, 2, "none")
    norms = [block.residual_function[2], block.residual_function[5], block.shortcut[2]]
    if "init.bn_gains" in arrays:
        gains = [norm.bn.weight[0].item() for norm in norms]
        close(gains, arrays["init.bn_gains"], "init.bn_gains", 1e-6)
        compared.add("init.bn_gains")
    if "surrogate.x" in arrays:
        compared |= surrogate(arrays, 0.5, 0.5, True)
    for prefix in [n.removesuffix("logits") for n in arrays if n.endswith(".logits")]:
        case = group(arrays, prefix)
        found = re.fullmatch(r"net(\d+)_T(\d+)\.", prefix)
        assert found, f"{prefix}: not understood"
        shape = tuple(case["x_shape"].tolist())
        model = MSResSNN(
            18, shape[1], case["logits"].shape[-1], T=int(found[2]), blocks=[int(digit) for digit in found[1]]
        )
        fill(model, number(case["seed"]))
        x = np.random.default_rng(number(case["x_seed"])).standard_normal(shape).astype(np.float32)
        with torch.no_grad():
            close(model.eval()(torch.tensor(x)), case["logits"], f"{prefix}logits", 0, 2e-2)
        compared |= {f"{prefix}{name}" for name in ("seed", "x_seed", "x_shape", "logits", "min_margin")}
    return compared


# --- counts, events, energy


def counts(arrays: Arrays) -> set[str]:
    compared: set[str] = set()
    for name in [n for n in arrays if n.endswith(".params")]:
        family, variant, _ = name.split(".")
        found = re.fullmatch(r"gesture3(?:_ratio(\d+))?", family)
        assert found, f"{name}: not understood"
        ratios = {} if found[1] is None else {"r_t": int(found[1]), "r_c": int(found[1])}
        with torch.device("meta"):
            model = GestureSNN(attention="none" if variant == "no" else variant, **ratios)
        exact(sum(p.numel() for p in model.parameters()), arrays[name], name)
        compared.add(name)
    frames = torch.zeros(1, 60, 2, 32, 32)
    report = spike_report(GestureSNN(attention="none"), frames)
    neurons = [layer.neurons for layer in report.layers]
    if "gesture3.neurons" in arrays:
        exact(neurons, arrays["gesture3.neurons"], "gesture3.neurons")
        compared.add("gesture3.neurons")
    if "gait3.neurons_total" in arrays:
        exact(sum(neurons[:-1]) + 20, arrays["gait3.neurons_total"], "gait3.neurons_total")
        compared.add("gait3.neurons_total")
    if "events" in arrays:
        compared |= framing(arrays)
    if "energy.mac" in arrays:
        compared |= energy(arrays, report)
    if "paper_table5.ca_extra_mac" in arrays:
        compared |= overhead(arrays, frames)
    return compared | clips(arrays)


def framing(arrays: Arrays) -> set[str]:
    columns = dict(zip(arrays["events_columns"].tolist(), arrays["events"].T, strict=True))
    stream = EventStream(columns["x"], columns["y"], columns["t_us"], columns["polarity"], (SENSOR, SENSOR))
    compared = {"events", "events_columns"}
    for name in [n for n in arrays if n.startswith("frames_")]:
        found = re.fullmatch(r"frames_dt(\d+)ms_T(\d+)_ds(\d+)", name)
        assert found, f"{name}: not understood"
        dt, T, ds = (int(text) for text in found.groups())
        exact(events_to_frames(stream, 1000 * dt, T, ds), arrays[name], name)
        compared.add(name)
    return compared


def clips(arrays: Arrays) -> set[str]:
    compared = set()
    for name in [n for n in arrays if n.startswith("clip_starts_")]:
        found = re.fullmatch(r"clip_starts_(\d+)us_dt(\d+)ms_T(\d+)", name)
        assert found, f"{name}: not understood"
        duration, dt, T = (int(text) for text in found.groups())
        exact(clip_starts(duration, 1000 * dt, T, len(arrays[name])), arrays[name], name)
        compared.add(name)
    return compared


def energy(arrays: Arrays, report: Any) -> set[str]:
    case = group(arrays, "energy.")
    operations = [*case["conv_flops"].tolist(), *case["fc_flops"].tolist()]
    exact([each.operations for each in report.synapses], np.array(operations), "energy.conv_flops, fc_flops")
    found = base_energy(operations, case["rates"].tolist(), number(case["phi0"]), number(case["T"]))
    for value, name in zip(found, ("mac", "ac", "total_pJ"), strict=True):
        close(value, case[name], f"energy.{name}", 1e-12, 0)
    return {f"energy.{name}" for name in ("conv_flops", "fc_flops", "rates", "phi0", "T", "mac", "ac", "total_pJ")}


def overhead(arrays: Arrays, frames: Tensor) -> set[str]:
    plain, gated = (GestureSNN(attention=variant, r_c=16) for variant in ("none", "CA"))
    more = sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in plain.parameters())
    exact(more, arrays["paper_table5.ca_extra_params"], "paper_table5.ca_extra_params")
    exact(spike_report(gated, frames).gate_macs, arrays["paper_table5.ca_extra_mac"], "paper_table5.ca_extra_mac")
    return {"paper_table5.ca_extra_params", "paper_table5.ca_extra_mac"}


# --- all

KINDS: dict[str, Callable[[Arrays], set[str]]] = {
    r"config": network,
    r"t_ratio": attention,
    r"Vthres": neuron,
    r"K_s": paper_layer,
    r"y_eval": residual_block,
    r"resnet\d+\..*|init\.bn_gains|net\d+_T\d+\.logits": residual_nets,
    r"events_columns|gesture3.*\.params|clip_starts_.*|energy\.mac": counts,
}
"""An array that only one kind of file has → what compares it."""


def compare(arrays: Arrays) -> set[str] | None:
    found = [kind for marker, kind in KINDS.items() if any(re.fullmatch(marker, name) for name in arrays)]
    return found[0](arrays) if found else None


def opened(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def one_with(files: Iterable[Path], marker: str) -> dict[str, np.ndarray]:
    return next(arrays for arrays in map(opened, files) if marker in arrays)


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("ma_snn"):
        arrays = opened(file)
        compared = compare(arrays)
        assert compared is not None, f"{file.name}: not understood"
        assert compared == arrays.keys(), f"{file.name}: missing or not understood: {sorted(arrays.keys() ^ compared)}"
        count += len(compared)
    record_property("arrays", count)
    print(f"MA-SNN: {count} arrays read, all that are outputs compared")


def test_another_input_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("ma_snn"), "Vthres")
    with pytest.raises(AssertionError, match="spike_NTR"):
        neuron(arrays | {"current": arrays["current"][::-1].copy()})


@pytest.mark.parametrize("marker", ["t_ratio", "Vthres", "K_s", "lif.x", "config"])
def test_an_array_that_is_not_known_would_be_noticed(oracles: Callable[[str], list[Path]], marker: str) -> None:
    arrays = one_with(oracles("ma_snn"), marker)
    if marker == "config":
        arrays = {name: array for name, array in arrays.items() if "." not in name or name.startswith("TCSA.")}
    assert compare(arrays) == set(arrays)
    assert "another" not in (compare(arrays | {"another": np.zeros(1), "TCSA.another": np.zeros(1)}) or set())


def test_a_file_that_is_not_known_would_be_noticed() -> None:
    assert compare({"another": np.zeros(1)}) is None
