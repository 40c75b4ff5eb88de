from __future__ import annotations

import logging
from pathlib import Path

import guests
import numpy as np
import pytest
import torch
from onnx import TensorProto, ValueInfoProto, helper
from torch import nn

from sparing.core.errors import CorruptFile, InvalidValue, NotExportable
from sparing.core.predictor import Context, ModulePredictor, OnnxPredictor, build_model, load, to_onnx, torch_to_onnx
from sparing.core.predictor.graph import lean, weights_of
from sparing.core.predictor.tree import leaves


def test_outputs_agree_at_any_batch_size(module: ModulePredictor, onnx: OnnxPredictor, images: np.ndarray) -> None:
    for batch in (1, 2, 5):
        np.testing.assert_allclose(onnx(images[:batch]), module(images[:batch]), atol=1e-5)
    assert onnx.origin["max_abs_diff"] < 1e-5
    assert onnx.origin["exporter"] == "trace"
    np.testing.assert_array_equal(onnx(torch.from_numpy(images)), onnx(images))


def test_description_carries_macs_and_counts_the_graph(module: ModulePredictor, onnx: OnnxPredictor) -> None:
    described = onnx.describe()
    assert described.macs == module.describe().macs == 5 * 64 * 9 + 5 * 3
    assert described.precision == "fp32"
    assert described.parameters == 5 * 9 + 5 + 5 * 3 + 3  # the batch norm went into the convolution and its bias
    assert described.model_bytes == len(onnx.content)
    assert [layer["name"] for layer in described.layers] == ["head/Gemm", "body/body.0/Conv"]


def test_the_file_holds_no_source_paths(onnx: OnnxPredictor) -> None:
    assert b".py" not in onnx.content
    assert str(Path.home()).encode() not in onnx.content


def test_trees_keep_their_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = ({"ids": torch.randint(0, 20, (2, 5)), "mask": torch.ones(2, 5)},)
    module = ModulePredictor(build_model(guests.TwoInputs), example=example)
    again = load(to_onnx(module).save(tmp_path / "trees"))
    ids = np.random.default_rng(0).integers(0, 20, (4, 5))
    given = {"mask": np.ones((4, 5), np.float32), "ids": ids}
    for (path, one), (other_path, other) in zip(leaves(again(given)), leaves(module(given)), strict=True):
        assert path == other_path
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert set(again(given)) == {"logits", "states"}
    with pytest.raises(InvalidValue, match=r"0\.mask"):
        again({"ids": ids})


def test_wrong_inputs_are_named(onnx: OnnxPredictor, images: np.ndarray) -> None:
    with pytest.raises(InvalidValue, match=r"\[5, 1, 8, 7\]"):
        onnx(images[..., :7])
    with pytest.raises(InvalidValue, match="complex64"):
        onnx(images.astype(np.complex64))
    np.testing.assert_allclose(onnx(images.astype(np.float64)), onnx(images))
    with pytest.raises(InvalidValue, match="takes"):
        onnx(images, images)


def test_threads_are_the_sessions(onnx: OnnxPredictor) -> None:
    again = OnnxPredictor(onnx.content, threads=2)
    assert again.session.get_session_options().intra_op_num_threads == 2
    again.set_threads(1)
    assert again.session.get_session_options().intra_op_num_threads == 1


def test_garbage_is_no_graph() -> None:
    with pytest.raises(CorruptFile, match="cannot read the graph"):
        OnnxPredictor(b"no graph")


@pytest.mark.parametrize(
    ("model", "example", "says"),
    [
        (guests.Branching(), (torch.ones(2, 3),), r"guests\.py:\d+: return x \* 2 if x\.sum\(\) > 0 else x"),
        (guests.Bessel(), (torch.ones(2, 3),), "bessel_j0"),
        (guests.FixedBatch(), (torch.ones(2, 3),), "FixedBatch"),
    ],
)
def test_what_cannot_be_exported_says_why(
    model: nn.Module, example: tuple[torch.Tensor], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotExportable, match=says):
        to_onnx(model, example)
    assert capfd.readouterr().out == ""


def test_examples_must_be_batches() -> None:
    with pytest.raises(InvalidValue, match="example"):
        to_onnx(nn.Linear(2, 2))
    with pytest.raises(NotExportable, match="batch dimension"):
        to_onnx(nn.Identity(), (torch.tensor(1.0),))
    with pytest.raises(NotExportable, match="tensors only"):
        to_onnx(nn.Identity(), ("text",))

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x, None

    with pytest.raises(NotExportable, match="output 1 is a NoneType"):
        to_onnx(Pair(), (torch.ones(2, 2),))


def test_an_example_of_one_row_still_gives_a_dynamic_batch(images: np.ndarray) -> None:
    made = to_onnx(build_model(guests.SmallNet), (torch.from_numpy(images[:1]),))
    assert made(images).shape == (5, 3)


def test_export_is_quiet_and_leaves_settings_alone(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    level = logging.getLogger("torch.onnx._internal.exporter._registration").level
    fast = torch.backends.mha.get_fastpath_enabled()
    generator = torch.get_rng_state()
    to_onnx(build_model("convnet", image_size=8), (torch.zeros(2, 1, 8, 8),))
    out, err = capfd.readouterr()
    assert (out, err, list(recwarn)) == ("", "", [])
    assert logging.getLogger("torch.onnx._internal.exporter._registration").level == level
    assert torch.backends.mha.get_fastpath_enabled() is fast
    del generator


def test_a_lean_graph_answers_the_same_in_fewer_bytes(onnx: OnnxPredictor, images: np.ndarray) -> None:
    graph = onnx.graph()
    lean(graph)
    content = graph.SerializeToString()
    assert len(content) < len(onnx.content)
    made = OnnxPredictor(content, Context())
    np.testing.assert_array_equal(made(images), onnx(images))
    assert weights_of(graph)[1:3] == weights_of(onnx.graph())[1:3]


@pytest.mark.parametrize("exporter", ["trace", "torch_export"])
def test_rows_are_added_by_index_as_torch_adds_them(exporter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all threads, and each index many times: a graph that loses sums would do so now and then."""

    class Sums(nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            count = x.new_ones(50).index_add(0, index, torch.ones_like(index, dtype=x.dtype))
            return x.new_zeros(50, x.shape[1]).index_add(0, index, x) / count[:, None]

    def failing(*_: object) -> bytes:
        raise RuntimeError("not this one")

    if exporter == "torch_export":
        monkeypatch.setattr(torch_to_onnx, "_trace", failing)
    x, index = torch.randn(20_000, 24), torch.arange(20_000) % 50
    made = to_onnx(Sums(), (x, index))
    assert made.origin["exporter"] == exporter
    expected = Sums()(x, index).numpy()
    for _ in range(20):
        np.testing.assert_allclose(made(x.numpy(), index.numpy()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "reduction", "branch", "threads"),
    [
        ("ScatterND", "add", False, 1),
        ("ScatterND", "add", True, 1),
        ("ScatterND", "none", False, 4),
        ("ScatterElements", "add", False, 4),
    ],
)
def test_a_graph_that_would_lose_sums_runs_on_one_thread(
    operator: str, reduction: str, branch: bool, threads: int
) -> None:
    rows, width = 200_000, 24

    def value(name: str, kind: int, *shape: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    places = (rows, 1) if operator == "ScatterND" else (rows, width)
    out = value("out", TensorProto.FLOAT, 1, width)
    nodes = [helper.make_node(operator, ["into", "places", "rows"], ["out"], reduction=reduction)]
    if branch:
        inner = helper.make_graph(nodes, "inner", [], [out])
        always = helper.make_node(
            "Constant", [], ["always"], value=helper.make_tensor("", TensorProto.BOOL, (), [True])
        )
        nodes = [always, helper.make_node("If", ["always"], ["out"], then_branch=inner, else_branch=inner)]
    inputs = [
        value("into", TensorProto.FLOAT, 1, width),
        value("places", TensorProto.INT64, *places),
        value("rows", TensorProto.FLOAT, rows, width),
    ]
    graph = helper.make_graph(nodes, "graph", inputs, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made = OnnxPredictor(model.SerializeToString(), threads=4)
    assert made.session.get_session_options().intra_op_num_threads == threads
    given = np.zeros((1, width), np.float32), np.zeros(places, np.int64), np.ones((rows, width), np.float32)
    for _ in range(10):
        assert (made(*given) == (rows if reduction == "add" else 1)).all()
