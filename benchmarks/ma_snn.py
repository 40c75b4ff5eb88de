"""Claims of MA-SNN: fewer spikes at no loss of accuracy, the same answers step by step, training beside snntorch.

python benchmarks/ma_snn.py [gates] [streaming] [speed] [membrane]

``speed`` needs the package snntorch (``pip install snntorch``), on which Sparing does not depend; without, no claim.
Clock readings are of a quiet machine only: the figure is a ratio of calls that took turns.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from _claims import Claim, main
from sparing.core.clock import in_turns
from sparing.core.collation import batches_of
from sparing.core.predictor import ModulePredictor, build_model
from sparing.core.randomness import isolated_rng
from sparing.core.statistics import difference_over_seeds, t_interval
from sparing.core.training import Train, fit
from sparing.data.root import data_root
from sparing.models.spiking.gesture import GestureSNN
from sparing.models.spiking.report import SpikeReport, spike_report
from sparing.models.spiking.streaming import StreamingPredictor
from sparing.tasks.events.gestures import GestureEvents

ISSUE = "issue Smaller models, gates of MA-SNN"
SHEET = "sheet MA-SNN, demonstration"
SEEDS = (0, 1, 2)
EPOCHS = 30
FIELDS: dict[str, Any] = {"widths": [8, 16, 16], "pools": [1, 2, 2], "hidden": [64], "r_t": 5, "r_c": 4}
ARMS = ("none", "TA", "CA", "SA", "CSA", "TCSA")
MEMBRANE: Mapping[str, Any] = {"attention": "TCSA", "placement": "membrane", "reset": "hard"}
CAUSAL: Mapping[str, Any] = {"attention": "CSA", "placement": "membrane", "reset": "hard"}


@cache
def task() -> GestureEvents:
    found = GestureEvents()
    found.splits(data_root())
    return found


@cache
def trained(seed: int, epochs: int = EPOCHS, **fields: Any) -> GestureSNN:
    """Last epoch, no selection: the same steps, batches and learning rates for every arm of a seed."""
    splits = task().splits(data_root())
    settings = Train(epochs=epochs, batch_size=33, optimizer="Adam", lr=4e-3, scheduler="one_cycle")
    with isolated_rng(seed):
        model = build_model("gesture_snn", task(), **{**FIELDS, **fields})
    found = fit(model, task(), splits.train, None, settings, seed=seed).model.eval()
    assert isinstance(found, GestureSNN)
    return found


def test_batches() -> Any:
    return batches_of(task().splits(data_root()).test, 60)


def scored(model: GestureSNN) -> tuple[float, SpikeReport]:
    """(accuracy on the test recordings in %, what they took)."""
    splits = task().splits(data_root())
    accuracy = task().evaluate(ModulePredictor(model, task()), splits.test).metrics["accuracy"]
    return 100 * accuracy, spike_report(model, test_batches())


def rows(arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], epochs: int) -> dict[str, list[dict[str, float]]]:
    """Arm → a row of figures for each seed; energies and ratios beside the arm "none" of the same seed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in seeds:
        plain = scored(trained(seed, epochs, attention="none"))[1]
        for name, fields in arms.items():
            accuracy, report = scored(trained(seed, epochs, **fields))
            found[name].append(
                {
                    "accuracy": accuracy,
                    "spikes": report.spikes,
                    "nasar": report.nasar,
                    "pJ, gates as in the paper": report.energy_pj(),
                    "pJ, gates strictly": report.energy_pj(strict=True),
                    "r_EE, gates as in the paper": report.r_ee(plain),
                    "r_EE, gates strictly": report.r_ee(plain, strict=True),
                    **{f"rate of {layer.name}": layer.rate for layer in report.layers},
                }
            )
    return found


def means(found: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {arm: {key: statistics.fmean(run[key] for run in runs) for key in runs[0]} for arm, runs in found.items()}


def measure_gates(seeds: Sequence[int] = SEEDS, epochs: int = EPOCHS) -> list[Claim]:
    found = rows({arm: {"attention": arm} for arm in ARMS}, seeds, epochs)
    averages = means(found)
    pairs = list(zip(found["none"], found["TCSA"], strict=True))
    saved = [100 * (1 - gated["spikes"] / plain["spikes"]) for plain, gated in pairs]
    gain = difference_over_seeds([gated["accuracy"] - plain["accuracy"] for plain, gated in pairs])
    details = {
        "means": averages,
        "protocol": f"simulated events, 585 recordings train and 240 test, people disjoint; {epochs} epochs of Adam, "
        "one cycle to 4e-3, batch 33, last epoch; epochs and rate are the sheet's, which were set on these test data",
    }
    return [
        Claim(
            id="ma_snn_spikes",
            statement="on simulated gestures the network with gates over time, channels and places fires at least 40 % "
            "fewer spikes than the same network without",
            source=ISSUE,
            figure=statistics.fmean(saved),
            unit="% fewer spikes on the test recordings, mean over seeds",
            comparison=">=",
            threshold=40.0,
            interval95=t_interval(saved),
            seeds=list(seeds),
            baselines=[{"name": f"spikes per recording, {arm}", "figure": m["spikes"]} for arm, m in averages.items()],
            details=details,
        ),
        Claim(
            id="ma_snn_accuracy",
            statement="its accuracy is not lower by more than 1 point",
            source=ISSUE,
            figure=gain.value,
            unit="points of test accuracy over the network without gates",
            comparison=">=",
            threshold=-1.0,
            interval95=gain.interval,
            seeds=list(seeds),
            baselines=[{"name": f"accuracy, {arm}, %", "figure": m["accuracy"]} for arm, m in averages.items()],
            details=details,
        ),
        Claim(
            id="ma_snn_energy",
            statement="gates save energy by the strict count as well: their own multiply-accumulates cost less than "
            "the additions they spare",
            source=SHEET,
            figure=averages["TCSA"]["r_EE, gates strictly"],
            unit="r_EE, est.",
            comparison=">",
            threshold=1.0,
            gate=False,
            seeds=list(seeds),
            baselines=[
                {"name": f"{key}, {arm}", "figure": m[key]}
                for arm, m in averages.items()
                for key in m
                if key.startswith("r_EE")
            ],
        ),
    ]


def measure_membrane(seeds: Sequence[int] = SEEDS, epochs: int = EPOCHS) -> list[Claim]:
    """The paper's placement and reset, beside the published code's."""
    found = rows({"paper": MEMBRANE, "code": {"attention": "TCSA"}}, seeds, epochs)
    averages = means(found)
    gain = difference_over_seeds(
        [paper["accuracy"] - code["accuracy"] for paper, code in zip(found["paper"], found["code"], strict=True)]
    )
    return [
        Claim(
            id="ma_snn_membrane",
            statement="gates on the membrane with a hard reset, as the paper writes them, are more accurate than gates "
            "on the input, as its code has them",
            source=SHEET,
            figure=gain.value,
            unit="points of test accuracy",
            comparison=">",
            threshold=0.0,
            gate=False,
            interval95=gain.interval,
            seeds=list(seeds),
            baselines=[
                {"name": f"{key}, {arm}", "figure": value} for arm, m in averages.items() for key, value in m.items()
            ],
        )
    ]


def measure_streaming(seeds: Sequence[int] = SEEDS, epochs: int = EPOCHS) -> list[Claim]:
    """Every test recording alone, frame by frame, beside all of them in one pass."""
    differing: dict[str, int] = {}
    largest = 0.0
    compared = 0
    for name, fields in {
        "none": {"attention": "none"},
        "CSA on the membrane": CAUSAL,
        "TCSA": {"attention": "TCSA"},
    }.items():
        for seed in seeds:
            predictor = StreamingPredictor(ModulePredictor(trained(seed, epochs, **fields), task()))
            for frames, _ in test_batches():
                whole = predictor(frames)
                for i in range(len(frames)):
                    stream = predictor.stream()
                    for step in range(frames.shape[1]):
                        answer = stream.push(frames[i : i + 1, step])
                    assert answer is not None
                    gap = float(np.abs(answer[0] - whole[i]).max())
                    differing[name] = differing.get(name, 0) + (gap > 0)
                    largest, compared = max(largest, gap), compared + 1
    return [
        Claim(
            id="ma_snn_streaming_equal",
            statement="a spiking predictor that is given a recording frame by frame answers what it answers in one "
            "pass over 60 recordings, bit for bit",
            source=ISSUE,
            figure=sum(differing.values()),
            unit=f"of {compared} recordings answered otherwise",
            comparison="==",
            threshold=0.0,
            seeds=list(seeds),
            baselines=[{"name": f"answered otherwise, {name}", "figure": n} for name, n in differing.items()],
            details={"largest difference of an output": largest},
        )
    ]


class Theirs(nn.Module):
    """The same layers with snntorch's neurons: all layers at each step ("loop"), or each layer at all steps ("merged").

    The neurons have decay 0.3, threshold 0.3, a reset to 0 without delay and the same rectangular surrogate, so that
    "merged" computes what ours does with reset="hard".
    """

    def __init__(self, ours: GestureSNN, merged: bool) -> None:
        import snntorch
        from snntorch import surrogate

        super().__init__()
        rect = surrogate.custom_surrogate(lambda v, grad, spikes: grad * (v.abs() < 0.25) / 0.5)
        self.merged = merged
        self.synapses, self.neurons = nn.ModuleList(), nn.ModuleList()
        for layer in copy.deepcopy(ours).layers:
            parts = [layer.linear if hasattr(layer, "linear") else layer.conv2d, layer.BNLayer]
            if hasattr(layer, "pool"):
                parts.append(layer.pool)
            self.synapses.append(nn.Sequential(*parts))
            self.neurons.append(
                snntorch.Leaky(0.3, threshold=0.3, spike_grad=rect, reset_mechanism="zero", reset_delay=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Frames of all steps → mean spikes."""
        if self.merged:
            for synapse, neuron in zip(self.synapses, self.neurons, strict=True):
                shape, x = x.shape[:2], x.flatten(0, 1)
                x = synapse(x.flatten(1) if isinstance(synapse[0], nn.Linear) else x).unflatten(0, shape)
                state, outputs = neuron.reset_mem(), []
                for now in x.unbind(1):
                    out, state = neuron(now, state)
                    outputs.append(out)
                x = torch.stack(outputs, 1)
            return x.mean(1)
        states = [neuron.reset_mem() for neuron in self.neurons]
        outputs = []
        for now in x.unbind(1):
            for i, (synapse, neuron) in enumerate(zip(self.synapses, self.neurons, strict=True)):
                now = synapse(now.flatten(1) if isinstance(synapse[0], nn.Linear) else now)
                now, states[i] = neuron(now, states[i])
            outputs.append(now)
        return torch.stack(outputs, 1).mean(1)


def measure_speed(runs: int = 24, seeds: Sequence[int] = SEEDS) -> list[Claim]:
    """Seconds of a training step (forward, backward, Adam) on the demonstration's network and batch, in turns."""
    try:
        import snntorch
    except ImportError:
        print("speed: skipped, the package snntorch is not installed (pip install snntorch)")
        return []
    ratios, per_step, apart = [], {}, 0.0
    for seed in seeds:
        with isolated_rng(seed):
            ours = build_model("gesture_snn", task(), **FIELDS, attention="none", reset="hard")
            gated = build_model("gesture_snn", task(), **FIELDS, attention="TCSA")
        assert isinstance(ours, GestureSNN)
        frames, labels = next(iter(batches_of(task().splits(data_root()).train, 33)))
        nets: dict[str, nn.Module] = {
            "ours": ours,
            "snntorch, merged": Theirs(ours, True),
            "snntorch, loop": Theirs(ours, False),
            "ours, with TCSA": gated,
        }
        with torch.no_grad():
            answers = [nets[name].eval()(frames) for name in ("ours", "snntorch, merged", "snntorch, loop")]
        apart = max(apart, *(float((answers[0] - other).abs().max()) for other in answers[1:]))

        def step_of(net: nn.Module, frames: Tensor = frames, labels: Tensor = labels) -> Any:
            optimizer = torch.optim.Adam(net.train().parameters(), 1e-3)

            def step() -> None:
                optimizer.zero_grad()
                task().loss(net(frames), (frames, labels)).backward()
                optimizer.step()

            return step

        seconds = in_turns([step_of(net) for net in nets.values()], runs, 3)
        for name, value in zip(nets, seconds, strict=True):
            per_step.setdefault(name, []).append(1e3 * float(value))
        # the faster of the two ways to write it with snntorch
        ratios.append(float(min(seconds[1:3]) / seconds[0]))
    return [
        Claim(
            id="ma_snn_speed_vs_snntorch",
            statement="a training step takes less time than that of the same network with snntorch's neurons, the "
            "faster of two ways to write it",
            source=ISSUE,
            figure=statistics.fmean(ratios),
            unit="× as fast, one thread",
            comparison=">=",
            threshold=1.5,
            interval95=t_interval(ratios),
            seeds=list(seeds),
            baselines=[
                {"name": f"{name}, ms", "figure": statistics.fmean(values)} for name, values in per_step.items()
            ],
            details={
                "largest difference of an output from snntorch's": apart,
                "snntorch": snntorch.__version__,
                "batch": 33,
                "steps of a recording": task().T,
            },
        )
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(
        main(
            "ma_snn",
            {
                "gates": measure_gates,
                "streaming": measure_streaming,
                "speed": measure_speed,
                "membrane": measure_membrane,
            },
        )
    )
