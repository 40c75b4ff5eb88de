"""Spiking networks: gradients, gates, both placements, streaming, saving, what they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparing
from sparing.core.errors import CorruptFile, DataError, IncompatibleStep, InvalidValue, NoEffect
from sparing.core.predictor import ModulePredictor, build_model, nest
from sparing.models.spiking.attention import (
    ChannelAttention,
    MultiDimAttention,
    SpatialAttention,
    TemporalAttention,
    keep_top,
)
from sparing.models.spiking.gesture import GestureSNN
from sparing.models.spiking.layers import ConvAttLIF, LinearAttLIF
from sparing.models.spiking.neurons import LIF
from sparing.models.spiking.report import base_energy, efficiency_ratio, operations_of, spike_report
from sparing.models.spiking.residual import MSBlock, MSResSNN
from sparing.models.spiking.streaming import SpikingStream, StreamingPredictor

SMALL = {
    "num_classes": 3,
    "image_size": 8,
    "T": 4,
    "widths": (3, 4),
    "pools": (1, 2),
    "hidden": (5,),
    "r_t": 2,
    "r_c": 2,
}


def small(**fields) -> GestureSNN:
    torch.manual_seed(0)
    return build_model(GestureSNN, **{**SMALL, **fields})  # type: ignore[return-value]


def frames(count: int = 3, steps: int = 4, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.full((count, steps, 2, 8, 8), 0.7), generator=draw)


CELLS = [
    {},
    {"reset": "hard"},
    {"b": 0.05},
    {"mode": "mem"},
    {"mode": "mem", "threshold_relu": True, "reset": "hard"},
    {"strict": True, "detach_reset": True, "reset": "hard", "alpha": 0.25, "v_th": 0.5, "lens": 0.5},
    {"detach_reset": True},
]


@pytest.mark.parametrize("fields", CELLS, ids=[str(i) for i in range(len(CELLS))])
@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_recurrence_has_the_gradient_of_its_steps(fields, steps, seed):
    lif = LIF(**fields)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, steps, 3, generator=draw, dtype=torch.float64)
    weight = torch.randn(2, steps, 3, generator=draw, dtype=torch.float64)
    together, apart = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = lif(together)
    (out * weight).sum().backward()
    h, outputs = None, []
    for now in apart.unbind(1):
        o, h = lif.step(now, h)
        outputs.append(o)
    (torch.stack(outputs, 1) * weight).sum().backward()
    torch.testing.assert_close(out, torch.stack(outputs, 1))
    torch.testing.assert_close(together.grad, apart.grad)
    torch.testing.assert_close(lif(x), out.detach())  # without gradients


def test_after_a_spike_the_state_is_a_share_of_the_threshold_or_nothing():
    u = torch.tensor([[0.9], [0.2]])
    torch.testing.assert_close(LIF(0.3, 0.5).step(u)[1], torch.tensor([[0.15], [0.06]]))
    torch.testing.assert_close(LIF(0.3, 0.5, reset="hard").step(u)[1], torch.tensor([[0.0], [0.06]]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"v_th": 0}, "v_th = 0"),
        ({"lens": -1}, "lens = -1"),
        ({"reset": "soft"}, "reset = 'soft'"),
        ({"mode": "rate"}, "mode = 'rate'"),
        ({"b": 0.1, "reset": "hard"}, "b = 0.1"),
        ({"threshold_relu": True}, "threshold_relu"),
    ],
)
def test_fields_of_neurons_are_refused(fields, words):
    with pytest.raises(InvalidValue, match=words):
        LIF(**fields)


# --- gates


def test_the_first_of_equal_maxima_gets_the_gradient():
    gate = ChannelAttention(2, 1)
    x = torch.ones(1, 3, 2, 2, 2, requires_grad=True)
    pooled = x.transpose(1, 2).flatten(2).max(2).values.sum()
    pooled.backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() == 2
    assert torch.equal(x.grad[0, 0, :, 0, 0], torch.ones(2))
    assert gate(x).shape == (1, 1, 2, 1, 1)


def test_each_gate_sees_what_the_one_before_it_left():
    torch.manual_seed(0)
    gates = MultiDimAttention("TCSA", 4, 6, 2, 3)
    x = torch.randn(2, 4, 6, 5, 5)
    x1 = gates.ta(x) * x
    x2 = gates.ca(x1) * x1
    x3 = gates.sa(x2) * x2
    assert torch.equal(gates(x), torch.relu(x3))
    free = MultiDimAttention("TCSA", 4, 6, 2, 3, relu=False)
    free.load_state_dict(gates.state_dict())
    assert torch.equal(free(x), x3)


def test_what_gates_refuse():
    for dims in ("TAC", "ACS", "", "tcsa"):
        with pytest.raises(InvalidValue, match="attention = "):
            MultiDimAttention(dims, 4, 4)
    with pytest.raises(InvalidValue, match="at least one dimension"):
        MultiDimAttention("none", 4, 4)
    with pytest.raises(InvalidValue, match=r"r_t = 5 of T = 4 leaves 4//5"):
        TemporalAttention(4, 5)
    with pytest.raises(InvalidValue, match=r"r_c = 8 of C = 4 leaves 4//8"):
        ChannelAttention(4, 8)
    with pytest.raises(InvalidValue, match="needs a value for T"):
        MultiDimAttention("TCA", C=4)
    with pytest.raises(InvalidValue, match="flat"):
        MultiDimAttention("TCA", 4, 4, flat=True)
    with pytest.raises(InvalidValue, match="odd"):
        SpatialAttention(4)
    with pytest.raises(InvalidValue, match="3 steps; 4"):
        TemporalAttention(4, 2)(torch.zeros(1, 3, 2, 2, 2))
    with pytest.raises(InvalidValue, match="3 channels; 4"):
        ChannelAttention(4, 2)(torch.zeros(1, 3, 3, 2, 2))


def test_the_sparsifier_keeps_the_largest_gates():
    x = torch.ones(1, 2, 3, 1, 1)
    gate = torch.tensor([0.2, 0.9, 0.5]).view(1, 1, 3, 1, 1)
    assert keep_top(x, gate, 0.5)[0, 0].flatten().tolist() == pytest.approx([0, 0.9, 0.5])  # ⌈1.5⌉ = 2
    assert keep_top(x, gate, 0.1, coefficient=False)[0, 1].flatten().tolist() == [0, 1, 0]
    steps = torch.tensor([0.4, 0.4]).view(1, 2, 1, 1, 1)
    assert keep_top(x, steps, 0.5, coefficient=False)[0, :, 0].flatten().tolist() == [1, 0]
    with pytest.raises(InvalidValue, match="ratio = 0"):
        keep_top(x, gate, 0)
    with pytest.raises(InvalidValue, match="one over steps or channels"):
        keep_top(x, torch.rand(1, 1, 1, 2, 2), 0.5)


# --- layers and networks


def test_gates_on_the_membrane_change_with_the_state():
    torch.manual_seed(0)
    layer = ConvAttLIF(2, 4, 1, "CSA", None, "membrane", r_c=2, neuron=LIF(reset="hard"))
    layer.eval()
    x = frames()
    spikes = layer(x)
    with torch.enable_grad():
        assert torch.equal(layer(x.requires_grad_()), spikes)
    h, outputs = None, []
    assert layer.attention is not None
    for now in layer.current(x).unbind(1):
        u = now if h is None else now + h
        u = layer.attention.ca(u[:, None])[:, 0] * u
        u = layer.attention.sa(u[:, None])[:, 0] * u
        s = (u >= 0.3).float()
        outputs.append(s)
        h = 0.3 * u * (1 - s)
    assert torch.equal(torch.stack(outputs, 1), spikes)
    assert layer.attention.sa.conv.weight.shape[-1] == 7


@pytest.mark.parametrize("make", [lambda **f: small(**f), lambda **f: ConvAttLIF(2, 4, T=4, **f)])
def test_nothing_on_the_membrane_is_refused(make):
    with pytest.raises(InvalidValue, match="nothing on the membrane"):
        make(attention="TA", placement="membrane")


def test_what_networks_refuse():
    with pytest.raises(InvalidValue, match="Did you mean 'TCSA'"):
        small(attention="TCS")
    with pytest.raises(InvalidValue, match="placement"):
        small(placement="weights")
    with pytest.raises(InvalidValue, match="leave nothing"):
        small(pools=(4, 4))
    with pytest.raises(InvalidValue, match="3 steps; T = 4"):
        small()(frames(steps=3))
    assert small(attention="none")(frames(steps=3)).shape == (3, 3)
    with pytest.raises(InvalidValue, match=r"\(N, T, C, H, W\)"):
        small()(frames()[0])
    with pytest.raises(InvalidValue, match="frames of shape"):
        small()(frames()[..., :4])
    with pytest.raises(InvalidValue, match="r_t = 9"):
        small(r_t=9)
    with pytest.raises(InvalidValue, match="depth = 50"):
        MSResSNN(50)
    with pytest.raises(InvalidValue, match="attention = 'TCSA'"):
        MSResSNN(attention="TCSA")
    with pytest.raises(InvalidValue, match="multiples of 32"):
        MSResSNN(blocks=(1, 1, 1, 1), widths=(4, 4, 4, 4), r_c=2)(torch.zeros(1, 3, 40, 40))
    with pytest.raises(InvalidValue, match="placement"):
        LinearAttLIF(2, 2, placement="weights")  # type: ignore[arg-type]


def test_outputs_are_rates_of_a_layer_that_spikes_and_every_field_counts():
    x = frames()
    made = {}
    for name, fields in {
        "code": {},
        "hard": {"reset": "hard"},
        "membrane": {"placement": "membrane"},
        "mem": {"mode": "mem"},
        "none": {"attention": "none"},
        "five": {"widths": (3, 3, 3, 4, 4), "pools": (1, 2, 2, 1, 1)},
    }.items():
        made[name] = small(**fields).train()(x)
        assert made[name].shape == (3, 3)
        if name != "mem":
            assert set((made[name] * 4).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_weights_of_one_number_of_steps_fit_another_in_residual_networks():
    fields = {"num_classes": 3, "widths": (4, 4, 8, 8), "blocks": (1, 1, 1, 1), "r_c": 2}
    torch.manual_seed(0)
    once, often = MSResSNN(T=1, **fields).eval(), MSResSNN(T=3, **fields).eval()
    often.load_state_dict(once.state_dict())
    images = torch.randn(2, 3, 32, 32)
    repeated = images[:, None].repeat(1, 3, 1, 1, 1)
    assert torch.equal(often(images), often(repeated))
    assert torch.isfinite(once(images)).all()


def test_a_block_keeps_the_membrane_where_nothing_changes():
    block = MSBlock(4, 4, 1, "none")
    nn.init.zeros_(block.residual_function[5].bn.weight)
    x = torch.randn(1, 2, 4, 4, 4)
    assert torch.equal(block.eval()(x), x)


# --- streaming

VARIANTS = [
    ({"attention": "none"}, True),
    ({"attention": "CSA", "placement": "membrane", "reset": "hard"}, True),
    ({"attention": "CSA"}, False),
    ({"attention": "TCSA"}, False),
    ({"attention": "TCSA", "placement": "membrane"}, False),
]


@pytest.mark.parametrize(("fields", "causal"), VARIANTS, ids=["none", "membrane", "CSA", "TCSA", "TCSA-membrane"])
def test_a_stream_answers_what_one_pass_answers(fields, causal, tmp_path):
    model = small(**fields).train()
    for seed in range(3):
        model(frames(8, seed=seed))  # running statistics
    predictor = StreamingPredictor(ModulePredictor(model.eval(), example=(frames(1),)))
    x = frames(4, seed=9)
    whole = predictor(x.numpy())
    again = sparing.load(predictor.save(tmp_path / "model"), trust=("sparing",))
    assert isinstance(again, StreamingPredictor)
    np.testing.assert_array_equal(again(x.numpy()), whole)
    stream = again.stream()
    assert stream.causal == causal
    for _ in range(2):  # the second recording knows nothing of the first
        answers = [stream.push(x[:, t].numpy()) for t in range(4)]
        assert all((answer is None) == (not causal) for answer in answers[:-1])
        np.testing.assert_array_equal(answers[-1], whole)
        stream.reset()
    single = [again.stream() for _ in range(4)]
    for t in range(4):
        last = [each.push(x[i : i + 1, t].numpy()) for i, each in enumerate(single)]
    np.testing.assert_array_equal(np.concatenate(last), whole)
    assert single[0].state_bytes == 0 if not causal else single[0].state_bytes > 0


def test_a_causal_stream_goes_on_for_as_many_steps_as_come():
    model = small(attention="none").eval()
    stream = SpikingStream(model)
    x = frames(2, steps=9)
    for t in range(9):
        answer = stream.push(x[:, t])
        np.testing.assert_array_equal(answer, model(x[:, : t + 1]).detach().numpy())
    assert stream.steps == 9


def test_what_streams_refuse():
    with pytest.raises(InvalidValue, match="eval"):
        SpikingStream(small())
    stream = SpikingStream(small(attention="none").eval())
    stream.push(frames(2)[:, 0])
    with pytest.raises(InvalidValue, match="3 recordings after 2"):
        stream.push(frames(3)[:, 0])
    with pytest.raises(InvalidValue, match="frames of shape"):
        stream.push(frames(2))
    with pytest.raises(InvalidValue, match="GestureSNN"):
        StreamingPredictor(ModulePredictor(nn.Linear(2, 2), example=(torch.zeros(1, 2),)))


def test_a_folder_of_another_network_is_refused():
    linear = ModulePredictor(build_model("mlp", in_channels=1, image_size=2), example=(torch.zeros(1, 1, 2, 2),))
    files, parts = nest({"network": linear})

    class Told:
        config = {"parts": parts, "operations": None}  # noqa: RUF012

    with pytest.raises(CorruptFile, match="GestureSNN"):
        StreamingPredictor.load_files(files, Told())  # type: ignore[arg-type]
    Told.config = {"parts": {}}
    with pytest.raises(CorruptFile, match="needs the part"):
        StreamingPredictor.load_files(files, Told())  # type: ignore[arg-type]


# --- what it costs


def test_operations_are_those_of_the_spikes_there_are():
    model = small(attention="none").eval()
    x = frames()
    report = spike_report(model, x)
    first, second, *_ = report.synapses
    assert first.operations == 9 * 2 * 3 * 8 * 8
    assert first.macs == pytest.approx(4 * first.operations * float((x > 0).float().mean()))
    assert first.accumulates == 0
    assert second.macs == 0
    rates = [layer.rate for layer in report.layers]
    phi0 = float((x > 0).float().mean())
    expected = base_energy([each.operations for each in report.synapses], rates, phi0, 4)
    assert report.macs == pytest.approx(expected.macs)
    assert report.accumulates == pytest.approx(expected.accumulates)
    assert report.energy_pj() == pytest.approx(expected.pj)
    assert report.nasar == pytest.approx(report.spikes / (report.neurons * 4))
    assert report.gate_macs == 0
    batched = spike_report(model, [x[:1], (x[1:], "labels")])
    assert batched.spikes == pytest.approx(report.spikes)
    assert batched.samples == 3


def test_inputs_that_are_no_spikes_are_multiplied():
    report = spike_report(small(attention="none", mode="mem").eval(), frames())
    assert report.accumulates == 0
    assert all(each.macs > 0 for each in report.synapses[:2])


def test_gates_cost_what_the_paper_and_what_the_stricter_line_count():
    x = frames()
    model = small(attention="TCSA").eval()
    report = spike_report(model, x)
    making = 2 * 4 * 2 * 4  # TA of two convolutions and two linear layers
    making += 4 * 2 * (3 * 1 + 4 * 2) + 2 * 9 * (64 + 16)
    assert report.gate_macs == making
    again = 2 * 4 * 2 * 4 + 4 * 2 * (3 * 1 + 4 * 2)
    applied = 3 * 4 * (3 * 64 + 4 * 16) + 4 * (5 + 3)
    assert report.gate_macs_strict == making + again + applied
    assert report.gate_additions == applied
    counted = operations_of(model, x)
    assert counted.macs == round(report.macs + report.gate_macs_strict)
    on_membrane = spike_report(small(attention="SA", placement="membrane").eval(), x)
    assert on_membrane.gate_macs == 4 * 2 * 49 * (64 + 16)


def test_the_ratio_is_that_of_the_energies():
    x = frames()
    plain, gated = (spike_report(small(attention=a).eval(), x) for a in ("none", "TCSA"))
    for strict in (False, True):
        expected = plain.energy_pj(strict) / gated.energy_pj(strict)
        assert gated.r_ee(plain, strict) == pytest.approx(expected)
    assert efficiency_ratio(100.0, 0.0, 50 / 0.9) == pytest.approx(2.0)
    with pytest.raises(InvalidValue, match="2 rates"):
        base_energy([1, 2, 3, 4], [0.1, 0.2], 1, 1)


def test_silent_and_busy_layers_are_remarked_on():
    model = small(attention="none").eval()
    for layer in model.layers:
        layer.BNLayer.bias.data.fill_(-9)
    silent = spike_report(model, frames())
    assert len(silent.remarks) == 4
    assert "no gradient passes" in silent.remarks[0]
    for layer in model.layers:
        layer.BNLayer.bias.data.fill_(9)
    assert "little is saved" in spike_report(model, frames()).remarks[0]
    assert "memory traffic" in str(silent).lower()


def test_a_report_needs_spikes_and_data_and_leaves_the_network_as_it_was():
    model = small().train()
    spike_report(model, frames())
    assert model.training
    with pytest.raises(DataError, match="no sample"):
        spike_report(model, [])
    with pytest.raises(InvalidValue, match="no layer of spiking neurons"):
        spike_report(nn.Linear(3, 3), torch.zeros(2, 3))


def test_images_are_multiplied_in_the_first_layer_of_residual_networks():
    torch.manual_seed(0)
    model = MSResSNN(blocks=(1, 1, 1, 1), widths=(4, 4, 4, 4), num_classes=3, r_c=2, T=2).eval()
    report = spike_report(model, torch.randn(2, 3, 32, 32))
    assert report.synapses[0].macs == 2 * 49 * 3 * 4 * 16 * 16
    branch = next(each for each in report.synapses if each.name == "conv2_x.0.residual_function.1")
    assert branch.macs == 0
    shortcut = next(each for each in report.synapses if "shortcut" in each.name)
    assert shortcut.macs > 0  # the membrane is no spike
    assert report.steps == 2


# --- the step


def test_the_step_refuses_other_models_and_a_second_time():
    from sparing.models.spiking.streaming import StreamSpikes

    job = type("Job", (), {"predictor": StreamingPredictor(ModulePredictor(small().eval(), example=(frames(1),)))})()
    with pytest.raises(NoEffect, match="already"):
        StreamSpikes().apply(job)
    job.predictor = ModulePredictor(nn.Linear(2, 2), example=(torch.zeros(1, 2),))
    with pytest.raises(IncompatibleStep, match="that of a Linear"):
        StreamSpikes().apply(job)
