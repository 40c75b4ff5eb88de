"""Networks whose blocks are exchanged while they answer: torch modules, ONNX graphs, several under one budget."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lego_cases import Row, counting_profile, counting_zoo, read
from torch import fx, nn

import sparing
from sparing.adaptive.blocks import extract_blocks
from sparing.adaptive.descendants import BlockZoo
from sparing.adaptive.lego import LegoModel, cut
from sparing.adaptive.lego_predictor import LegoPredictor
from sparing.adaptive.lego_runtime import Budget, Layout, LegoRuntime
from sparing.adaptive.load import Request, poisson_load, serve
from sparing.adaptive.scaling import InfeasibleError, Profile, ScalingOptimizer
from sparing.core.errors import CorruptFile, InvalidValue, SparingError
from sparing.core.predictor import build_model

X = torch.zeros(2, 1, 2, 2)


@pytest.fixture(scope="module")
def zoo() -> Any:
    return counting_zoo()


@pytest.fixture(scope="module")
def profile(zoo: Any) -> Profile:
    return counting_profile(zoo)


@pytest.fixture(scope="module")
def saved(zoo: Any, profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    predictor = LegoPredictor.from_zoo(zoo, profile, (X,), current=(1, 0, 2))
    return predictor.save(tmp_path_factory.mktemp("lego") / "model")


@pytest.fixture(params=["memory", "disk", "onnx", "onnx in memory"])
def network(request: pytest.FixtureRequest, zoo: Any, profile: Profile, saved: Path) -> Any:
    if request.param in ("memory", "disk"):
        return LegoModel(counting_zoo(), profile, residency=request.param)
    predictor = sparing.load(saved, threads=1)
    assert isinstance(predictor, LegoPredictor)
    if request.param == "onnx in memory":
        predictor.set_residency("memory")
    predictor.apply([0, 0, 0])
    return predictor


# --- one network


def test_the_pieces_of_a_network_are_the_network() -> None:
    torch.manual_seed(0)

    class Branched(nn.Module):
        """Two tensors leave the first part of the frame; a parameter of its own is used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
            self.gain = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, Any]:
            stem = self.stem(x) * self.gain
            after = torch.relu(self.two(torch.relu(self.one(stem))))
            return {"sum": after + stem * self.gain, "pair": (shift, after)}

    network = Branched().eval()
    layout, frame = cut(fx.symbolic_trace(network), [["one", "relu", "two"]])
    assert [piece.block for piece in layout.pieces] == [None, 0, None]
    assert Layout.from_config(json.loads(json.dumps(layout.to_config()))) == Layout.from_config(layout.to_config())
    x, shift = torch.randn(2, 3, 5, 5), torch.randn(2)
    values = dict(zip(layout.inputs, (x, shift), strict=True))
    for number, piece in enumerate(layout.pieces):
        arguments = [values[name] for name in piece.inputs]
        made = frame[number](*arguments) if piece.block is None else network.two(network.one(*arguments).relu())
        values.update(zip(piece.outputs, (made,) if len(piece.outputs) == 1 else made, strict=True))
    wanted = network(x, shift)
    torch.testing.assert_close(values[layout.output["sum"]], wanted["sum"])
    torch.testing.assert_close(values[layout.output["pair"][1]], wanted["pair"][1])
    assert layout.output["pair"][0] == "shift"


def test_every_selection_answers_as_itself(network: Any) -> None:
    assert network.options == 4**3
    for options in itertools.product(range(4), repeat=3):
        network.apply(options)
        assert network.current == options
        assert read(network(X)) == (options, options)
        output, current = network.answer(X)
        assert (read(output)[0], current) == (options, options)


def test_moving_is_counted_for_blocks_that_change(network: Any) -> None:
    sizes = network.sizes
    assert network.apply([0, 0, 0]) == 0
    assert network.apply([0, 3, 0]) == sizes[1, 0] + sizes[1, 3]
    assert network.apply([1, 3, 1]) == sizes[0, :2].sum() + sizes[2, :2].sum()


def test_unchanged_blocks_stay_the_same_objects(network: Any) -> None:
    before = network._loaded.blocks
    network.apply([0, 2, 0])
    after = network._loaded.blocks
    assert [one is other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_choosing_keeps_the_limits_and_loads(network: Any) -> None:
    network.apply([0, 0, 0])
    original = float(network.sizes[:, 0].sum())
    found = network.choose(max_latency=2.5e-3, max_bytes=original * 0.6)
    assert found == ScalingOptimizer(network.profile).solve(2.5e-3, original * 0.6)
    assert network.current == found.options != (0, 0, 0)
    assert found.est_bytes == network.sizes[range(3), found.options].sum() <= original * 0.6
    with pytest.raises(InfeasibleError):
        network.choose(max_bytes=1)
    assert network.current == found.options, "a choice that failed changed the network"
    assert network.choose(max_bytes=1, relax=True).relaxed


def test_latencies_are_corrected_by_a_run(network: Any) -> None:
    seconds, options = network.measure(X, runs=3)
    assert options == network.current
    assert seconds.shape == (3,)
    assert (seconds > 0).all()
    now = network.latency_now(X)
    assert now.block_latency.shape == (3,)
    assert 0 < now.model_latency < 1
    found = network.choose(max_latency=now.model_latency - float(now.drop[:, 2].sum()), now=now)
    assert found.est_latency <= now.model_latency - float(now.drop[:, 2].sum()) + 1e-9


def test_a_call_under_way_is_answered_by_one_selection(network: Any) -> None:
    """Every answer is one of the two selections that are switched between as fast as possible."""
    allowed, seen, stop = {(0, 0, 0), (3, 2, 1)}, set(), threading.Event()
    wrong: list[Any] = []

    def ask() -> None:
        while not stop.is_set():
            output, options = network.answer(X)
            (one, other) = read(output)
            seen.add(one)
            if not one == other == options or one not in allowed:
                wrong.append((one, other, options))

    network.apply([0, 0, 0])
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(5000):
        network.apply([3, 2, 1] if turn % 2 == 0 else [0, 0, 0])
        time.sleep(1e-4)
        if turn >= 60 and seen == allowed:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert seen == allowed


def test_only_loaded_blocks_are_in_memory(profile: Profile, tmp_path: Path) -> None:
    zoo = counting_zoo()
    model = LegoModel(zoo, profile, residency="disk", folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 12
    assert all(parameter.is_meta for row in model._shelf.hollow for block in row for parameter in block.parameters())
    assert model.bytes == zoo.bytes[:, 0].sum()
    model.apply([3, 3, 3])
    assert sum(p.numel() * 4 for p in model.parameters()) == model.bytes == zoo.bytes[:, 3].sum()


def test_blocks_from_disk_are_modules_of_their_own() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    network = build_model("convnet", widths=[4, 8], depths=[2, 2], image_size=8)
    zoo = BlockZoo.build(extract_blocks(network, x, boundaries=[("stages.0.0", "stages.0.3")]), (0, 0.5))
    model, kept = LegoModel(zoo, residency="disk"), LegoModel(zoo)
    for options in ([1], [0], [1]):
        model.apply(options)
        kept.apply(options)
        assert torch.equal(model(x), kept(x))
    one, other = model._fetch(0, 1), model._fetch(0, 1)
    assert type(one) is type(other)  # the traced graph is compiled once
    assert not {id(tensor) for tensor in one.parameters()} & {id(tensor) for tensor in other.parameters()}
    before = other(x)
    for parameter in one.parameters():
        parameter.zero_()
    assert torch.equal(other(x), before)
    assert not torch.equal(one(x), before)


def test_module_apply_is_still_there(zoo: Any) -> None:
    seen: list[nn.Module] = []
    model = LegoModel(zoo)
    assert model.apply(seen.append) is model
    assert sum(isinstance(module, nn.Conv2d) for module in seen) == 6
    with pytest.raises(InvalidValue, match="no profile"):
        model.choose(max_bytes=1)


# --- the saved predictor


def test_a_saved_network_answers_the_same_and_holds_each_descendant_once(saved: Path) -> None:
    predictor = sparing.load(saved)
    assert isinstance(predictor, LegoPredictor)
    assert predictor.current == (1, 0, 2)
    assert read(predictor(X)) == ((1, 0, 2), (1, 0, 2))
    files = [path.name for path in saved.glob("*.pack")]
    assert len(files) == 3 * 4 + sum(piece.block is None for piece in predictor.layout.pieces)
    about = predictor.describe()
    assert about.model_bytes == sum(path.stat().st_size for path in saved.glob("*.pack"))
    assert about.parameters == sum(width * 2 + 1 for width in (8, 4, 2, 1)) * 3
    smaller = predictor.describe().macs
    predictor.apply([0, 0, 0])
    assert smaller < predictor.describe().macs == 3 * 4 * 16
    again = sparing.load(predictor.save(saved.parent / "again"))
    assert again.current == (0, 0, 0)
    assert again.describe() == predictor.describe()


def test_loading_and_choosing_import_no_torch(saved: Path) -> None:
    program = f"""
import sys
import numpy as np
import sparing
model = sparing.load({str(saved)!r})
found = model.choose(max_bytes=60)
print(model(np.zeros((1, 1, 2, 2), np.float32))[0, 0], found.options)
assert "torch" not in sys.modules and "scipy.optimize" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    number, options = done.stdout.split(" ", 1)
    assert read(np.array([[float(number)]]))[0] == tuple(json.loads(options.replace("(", "[").replace(")", "]")))


def test_profiling_on_this_machine_replaces_latencies_only(saved: Path) -> None:
    predictor = sparing.load(saved, threads=1)
    assert isinstance(predictor, LegoPredictor)
    before = predictor.profile
    found = predictor.profile_latency(X[:1].numpy(), runs=3, warmup=1)
    assert found is predictor.profile
    assert (found.latency > 0).all()
    assert (found.rel[:, 0] == 0).all()
    assert found.model_latency >= found.latency.max()
    np.testing.assert_array_equal(found.drops, before.drops)
    assert predictor.current == (1, 0, 2)


@pytest.mark.parametrize("damage", ["layout", "profile", "current", "counts", "missing"])
def test_settings_that_do_not_fit_are_refused(saved: Path, damage: str) -> None:
    predictor = sparing.load(saved)
    files, config = predictor.payload()
    if damage == "missing":
        files.pop("block0_1.onnx.pack")
    elif damage == "layout":
        config["layout"]["pieces"][0]["inputs"] = ["nothing"]
    elif damage == "profile":
        config["profile"]["drops"] = [[None]]
    elif damage == "current":
        config["current"] = [0, 0, 9]
    else:
        config["counts"]["block0_1"] = "many"
    manifest: Any = type("Manifest", (), {"config": config, "context": predictor.context.__class__})
    with pytest.raises(CorruptFile):
        LegoPredictor.load_files(files, manifest)


# --- several networks


def runtime_of(kind: str, saved: Path) -> LegoRuntime:
    if kind == "torch":
        zoos = {name: counting_zoo() for name in "ab"}
        return LegoRuntime({name: LegoModel(zoo, counting_profile(zoo)) for name, zoo in zoos.items()}, {"a": 2.0})
    return LegoRuntime({name: sparing.load(saved, threads=1) for name in "ab"}, {"a": 2.0})  # type: ignore[misc]


def test_networks_share_a_budget() -> None:
    runtime = runtime_of("torch", Path())
    whole = sum(float(network.sizes[:, 0].sum()) for network in runtime.networks.values())
    first = runtime.adapt(Budget(whole * 0.7, {"b": 2e-3}))
    assert first.moved == first.moved_whole == 0
    assert sum(selection.est_bytes for selection in first.selections.values()) <= whole * 0.7
    assert first.selections["b"].est_latency <= 2e-3
    for name, network in runtime.networks.items():
        assert network.current == first.selections[name].options
    second = runtime.adapt(Budget(whole * 0.6, {"b": 2e-3}))
    changed = [
        (network.sizes, first.selections[name].options, second.selections[name].options)
        for name, network in runtime.networks.items()
    ]
    assert second.moved == sum(
        sizes[b, old] + sizes[b, new]
        for sizes, before, after in changed
        for b, (old, new) in enumerate(zip(before, after, strict=True))
        if old != new
    )
    assert 0 < second.moved < second.moved_whole
    with pytest.raises(InfeasibleError):
        runtime.adapt(Budget(1.0))
    assert [n.current for n in runtime.networks.values()] == [s.options for s in second.selections.values()]
    with pytest.raises(InvalidValue, match="no network 'c'"):
        runtime.adapt(Budget(max_latency={"c": 1.0}))


def test_networks_that_shrink_switch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of("torch", Path())
    most = []

    def held() -> float:
        return sum(network.bytes for network in runtime.networks.values())  # type: ignore[attr-defined]

    usual = LegoModel.apply

    def watched(self: LegoModel, selection: Any) -> Any:
        moved = usual(self, selection)
        most.append(held())
        return moved

    original = held()
    runtime.adapt(Budget(original * 0.6, {"a": 1.5e-3}))
    monkeypatch.setattr(LegoModel, "apply", watched)
    runtime.adapt(Budget(original * 0.6, {"b": 1.5e-3}))
    assert max(most) <= original * 0.6


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_load_is_answered_to_the_last_request_while_budgets_change(kind: str, saved: Path) -> None:
    runtime = runtime_of(kind, saved)
    whole = sum(float(network.sizes[:, 0].sum()) for network in runtime.networks.values())
    sample = X if kind == "torch" else X.numpy()
    requests = poisson_load({name: [(sample,)] for name in "ab"}, {"a": 300.0, "b": 150.0}, 1.0, seed=3)
    budgets = [(i * 0.05, Budget(whole * (0.4 if i % 2 else 0.9), {"a": 2e-3})) for i in range(18)]
    report = serve(runtime, requests, budgets, workers=2, keep_outputs=True)
    assert [answer.request for answer in report.answers] == requests
    assert len(report.adaptations) == len(budgets)
    loaded: dict[str, set[Any]] = {
        name: {adaptation.selections[name].options for _, adaptation in report.adaptations} for name in "ab"
    }
    used = set()
    for answer in report.answers:
        assert read(answer.output) == (answer.options, answer.options), "a half-switched network answered"
        assert answer.options in loaded[answer.request.network] | {(0, 0, 0), (1, 0, 2)}
        assert answer.request.at_s <= answer.begun_s + 1e-3 <= answer.done_s + 1e-3
        used.add(answer.options)
    assert len(used) >= 3
    assert report.moved > 0
    assert 0 < report.latency(0.5) <= report.latency(0.99)


def test_the_load_is_poisson_and_the_same_under_a_seed() -> None:
    samples = {"a": [(1,), (2,)], "b": [(3,)]}
    requests = poisson_load(samples, {"a": 400.0, "b": 100.0}, 10.0, seed=1)
    assert requests == poisson_load(samples, {"a": 400.0, "b": 100.0}, 10.0, seed=1)
    assert requests != poisson_load(samples, {"a": 400.0, "b": 100.0}, 10.0, seed=2)
    counts = [sum(request.network == name for request in requests) for name in "ab"]
    assert counts[0] == pytest.approx(4000, abs=4 * 4000**0.5)
    assert counts[1] == pytest.approx(1000, abs=4 * 1000**0.5)
    assert all(one.at_s <= other.at_s for one, other in itertools.pairwise(requests))
    with pytest.raises(InvalidValue, match="positive rate"):
        poisson_load(samples, 0.0, 1.0)
    with pytest.raises(InvalidValue, match="seconds = 0"):
        poisson_load(samples, 1.0, 0)


def test_a_request_that_fails_is_named_and_no_thread_is_left() -> None:
    runtime = runtime_of("torch", Path())
    before = threading.active_count()
    bad = [Request("a", (X,), 0.0), Request("b", (torch.zeros(1, 5, 2, 2),), 0.01)]
    with pytest.raises(SparingError, match="request 1 to 'b' failed"):
        serve(runtime, bad, [])
    with pytest.raises(SparingError, match=r"the budget at 0.01 s failed: InfeasibleError"):
        serve(runtime, bad[:1], [(0.01, Budget(1.0))])
    assert threading.active_count() == before
    with pytest.raises(InvalidValue, match="no network 'c'"):
        serve(runtime, [Request("c", (X,), 0.0)], [])
    with pytest.raises(InvalidValue, match="workers = 0"):
        serve(runtime, [], [], workers=0)


# --- bad input


def test_bad_arguments_are_named(zoo: Any, profile: Profile) -> None:
    with pytest.raises(InvalidValue, match="residency = 'cloud'"):
        LegoModel(zoo, residency="cloud")  # type: ignore[arg-type]
    model = LegoModel(zoo, profile)
    with pytest.raises(InvalidValue, match=r"options = \[0, 0\]: 3 indices"):
        model.apply([0, 0])
    with pytest.raises(InvalidValue, match=r"\[0, 0, 4\].*0 … 3"):
        model.apply([0, 0, 4])
    with pytest.raises(InvalidValue, match="2 inputs"):
        model(X, X)
    with pytest.raises(InvalidValue, match="runs = 0"):
        model.measure(X, runs=0)
    with pytest.raises(InvalidValue, match="at least one"):
        LegoRuntime({})
    traced = fx.symbolic_trace(Row(3))
    with pytest.raises(InvalidValue, match="'nowhere'"):
        cut(traced, [["nowhere"]])
    with pytest.raises(InvalidValue, match="no stretch"):
        cut(traced, [["blocks_0_spread", "blocks_1_spread"]])
    with pytest.raises(InvalidValue, match="one tensor each"):
        cut(traced, [["mul", "add", "blocks_0_spread"]])
    with pytest.raises(InvalidValue, match=r"profile: bytes \(3, 3\)"):
        Profile(**{**profile.__dict__, "bytes": profile.bytes[:, :3]})
