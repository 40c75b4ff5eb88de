from __future__ import annotations

import copy
import threading
from pathlib import Path

import guests
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sparing.core.errors import CorruptFile, InvalidValue, UnknownName, UntrustedCode
from sparing.core.predictor import ModelSpec, ModulePredictor, build_model, load, spec_of
from sparing.core.predictor.module import count_macs


def test_spec_survives_deepcopy_and_builds_the_same_again() -> None:
    model = build_model("convnet", widths=[4, 8], image_size=8)
    spec = spec_of(copy.deepcopy(model))
    assert spec == ModelSpec("convnet", {"widths": [4, 8], "image_size": 8})
    assert [p.shape for p in build_model(spec).parameters()] == [p.shape for p in model.parameters()]
    assert spec_of(nn.Linear(2, 2)) is None


def test_task_fields_are_taken_where_the_signature_knows_them_and_overridden() -> None:
    class FakeTask:
        def model_fields(self) -> dict[str, int]:
            return {"classes": 7, "width": 9, "image_size": 8}

    spec = spec_of(build_model(guests.SmallNet, FakeTask(), width=2))  # type: ignore[arg-type]
    assert spec == ModelSpec("guests:SmallNet", {"classes": 7, "width": 2})


@pytest.mark.parametrize(
    ("builder", "fields", "error", "says"),
    [
        ("convnt", {}, UnknownName, "'convnet'"),
        ("convnet", {"width": 3}, InvalidValue, "'widths'"),
        ("guests:Missing", {}, InvalidValue, "cannot be imported"),
        (guests.Plain, {}, InvalidValue, "torch.nn.Module is needed"),
        (guests.SmallNet, {"width": {1, 2}}, InvalidValue, "plain JSON"),
        (guests.SmallNet, {"width": "wide"}, InvalidValue, "cannot be built"),
        (nn.Linear, {"in_features": 3}, InvalidValue, "out_features"),
    ],
)
def test_wrong_builders_say_what_is_wrong(builder: object, fields: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        build_model(builder, **fields)  # type: ignore[arg-type]


def test_answers_are_the_modules_and_the_module_is_left_alone(images: np.ndarray) -> None:
    model = build_model(guests.SmallNet).train()
    before = copy.deepcopy(model.state_dict())
    predictor = ModulePredictor(model)
    answer = predictor(images)
    assert isinstance(answer, np.ndarray)
    np.testing.assert_allclose(answer, copy.deepcopy(model).eval()(torch.from_numpy(images)).detach(), atol=1e-6)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.head.weight.zero_()
    np.testing.assert_array_equal(predictor(images), answer)


def test_read_only_and_strided_arrays_are_taken(module: ModulePredictor, images: np.ndarray) -> None:
    frozen = images.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(module(frozen), module(images))
    np.testing.assert_array_equal(module(images[::2]), module(images[::2].copy()))


def test_trees_go_in_and_come_out() -> None:
    predictor = ModulePredictor(build_model(guests.TwoInputs))
    out = predictor({"ids": np.ones((4, 5), np.int64), "mask": np.ones((4, 5), np.float32)})
    assert out["logits"].shape == (4, 3)
    assert [state.shape for state in out["states"]] == [(4, 5, 8), (4, 8)]


def test_threads_hold_for_the_call_only(images: np.ndarray) -> None:
    before = torch.get_num_threads()
    seen = []
    model = build_model(guests.SmallNet)
    model.head.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    ModulePredictor(model, threads=2)(images)
    assert seen == [2]
    assert torch.get_num_threads() == before
    with pytest.raises(InvalidValue, match="threads = 0"):
        ModulePredictor(model, threads=0)


def test_macs_follow_the_formulas() -> None:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
    total, _ = count_macs(nn.Sequential(conv, nn.Flatten(), nn.Linear(8 * 4 * 4, 5)), (torch.zeros(3, 3, 8, 8),))
    assert total == 8 * 4 * 4 * 3 * 9 + 8 * 4 * 4 * 5
    lstm, length, width, hidden = nn.LSTM(6, 7, batch_first=True), 5, 6, 7
    assert count_macs(lstm, (torch.zeros(2, length, width),))[0] == length * 4 * hidden * (width + hidden)
    layer, length, width, inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 5, 8, 16
    expected = length * (4 * width**2 + 2 * width * inner) + 2 * length**2 * width
    assert count_macs(layer, (torch.zeros(2, length, width),))[0] == expected


def test_description_counts_zeros_and_layers(images: np.ndarray) -> None:
    model = build_model(guests.SmallNet)
    with torch.no_grad():
        model.head.weight[:, :2] = 0
    described = ModulePredictor(model, example=(images[:1],)).describe()
    total = sum(p.numel() for p in model.parameters())
    zero = 6 + model.body[1].bias.numel()  # a batch norm starts with a zero bias
    assert (described.parameters, described.nonzero) == (total, total - zero)
    assert described.macs == 4 * 64 * 9 + 4 * 3
    assert [layer["name"] for layer in described.layers] == ["body.0", "body.1", "head"]
    assert ModulePredictor(model).describe().macs is None


def test_saved_and_loaded_it_answers_the_same(module: ModulePredictor, images: np.ndarray, tmp_path: Path) -> None:
    folder = module.save(tmp_path / "model", ledger="| a | b |")
    again = load(folder, trust=("guests",))
    np.testing.assert_array_equal(again(images), module(images))
    np.testing.assert_array_equal(again.predict(list(images)), module(images * 0.5))
    assert again.describe() == module.describe()
    assert again.labels == ("round", "square", "other")
    assert again.describe().model_bytes == (folder / "model.safetensors").stat().st_size
    card = (folder / "README.md").read_text()
    assert "| a | b |" in card
    assert "round, square, other" in card
    assert "scale" in card


def test_a_foreign_class_is_not_imported_without_trust(module: ModulePredictor, tmp_path: Path) -> None:
    folder = module.save(tmp_path / "model")
    with pytest.raises(UntrustedCode, match=r"guests:SmallNet.*trust=\('guests',\)"):
        load(folder)
    with pytest.raises(UntrustedCode):
        load(folder, trust=("guest", "guests.inner"))


def test_ties_are_stored_once_and_stay_ties(tmp_path: Path) -> None:
    predictor = ModulePredictor(build_model(guests.Tied), example=(torch.ones(2, 3, dtype=torch.long),))
    assert predictor.describe().parameters == 66
    again = load(predictor.save(tmp_path / "tied"), trust=("guests",))
    assert (tmp_path / "tied" / "model.safetensors").stat().st_size < 66 * 4 * 2
    assert again.model.out.weight is again.model.embedding.weight  # type: ignore[attr-defined]
    tokens = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(again(tokens), predictor(tokens))


def test_parametrisations_are_baked(images: np.ndarray, tmp_path: Path) -> None:
    model = build_model(guests.SmallNet)
    parametrizations.weight_norm(model.head)
    predictor = ModulePredictor(model, example=(images[:1],))
    folder = predictor.save(tmp_path / "baked")
    again = load(folder, trust=("guests",))
    assert "head.weight" in again.model.state_dict()  # type: ignore[attr-defined]
    np.testing.assert_allclose(again(images), predictor(images), rtol=1e-6)
    assert "head.parametrizations.weight.original0" in model.state_dict()
    model(torch.from_numpy(images)).sum().backward()  # the original is whole


def test_other_number_formats_come_back(images: np.ndarray, tmp_path: Path) -> None:
    predictor = ModulePredictor(build_model(guests.SmallNet).to(torch.bfloat16))
    assert predictor.describe().precision == "bf16"
    again = load(predictor.save(tmp_path / "half"), trust=("guests",))
    tensor = torch.from_numpy(images).to(torch.bfloat16)
    assert again(tensor).dtype == np.float32
    np.testing.assert_array_equal(again(tensor), predictor(tensor))


def test_what_would_not_come_back_is_refused(images: np.ndarray, tmp_path: Path) -> None:
    by_hand = nn.Linear(2, 2)
    with pytest.raises(InvalidValue, match="built by hand"):
        ModulePredictor(by_hand).save(tmp_path / "a")
    changed = build_model(guests.SmallNet)
    changed.body[2] = nn.GELU()
    with pytest.raises(InvalidValue, match=r"body\.2 is GELU"):
        ModulePredictor(changed).save(tmp_path / "b")
    cut = build_model(guests.SmallNet)
    cut.head = nn.Linear(4, 2)
    with pytest.raises(InvalidValue, match="head"):
        ModulePredictor(cut).save(tmp_path / "c")
    hooked = build_model(guests.SmallNet)
    hooked.head.register_forward_hook(lambda *given: given[2] * 2)
    with pytest.raises(InvalidValue, match="answers differently"):
        ModulePredictor(hooked, example=(images[:2],)).save(tmp_path / "d")
    uncopyable = build_model(guests.SmallNet)
    uncopyable.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InvalidValue, match="cannot be copied"):
        ModulePredictor(uncopyable)
    assert list(tmp_path.iterdir()) == []


def test_loading_leaves_the_callers_random_state(module: ModulePredictor, tmp_path: Path) -> None:
    folder = module.save(tmp_path / "model")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(folder, trust=("guests",))
    assert torch.equal(torch.rand(3), expected)


def test_a_forged_size_allocates_nothing(module: ModulePredictor, tmp_path: Path) -> None:
    from test_folder import resign

    folder = module.save(tmp_path / "model")
    resign(folder, lambda manifest: manifest["config"]["config"].update(width=1 << 40))
    with pytest.raises(CorruptFile, match=r"body\.0\.weight"):
        load(folder, trust=("guests",))
