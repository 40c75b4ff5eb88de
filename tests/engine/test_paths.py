"""Every instruction path gives the bits of the NumPy reference; none runs where it cannot."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import bert, quantised, texts

from sparing.core.errors import InvalidValue, UnsupportedISA
from sparing.engine import native, packing, program, reference
from sparing.engine.compiler import compile_encoder
from sparing.engine.native import PATHS, Capability, cpu_capability
from sparing.engine.runtime import Engine, NativeEngine
from sparing.engine.sparse_linear import SparseInt8Linear

pytestmark = pytest.mark.skipif(not cpu_capability().compiled, reason="the native library is not built here")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sparse": ({"sparsity": 0.8}, {}, "sparse"),
    "dense": ({}, {}, "dense"),
    "some layers in float": (
        {"sparsity": 0.8, "head": "span", "segments": 2, "position_offset": 2},
        {"keep_float": ("0.up", "1.key", "1.down")},
        "sparse",
    ),
    "attention in float": ({"head": "tokens", "heads": 4}, {"integer_attention": False}, "dense"),
    "float around integers": (
        {"head": "embedding"},
        {"keep_float": ("0.attention_out", "0.query", "0.key", "0.value", "1.up")},
        "dense",
    ),
    "sizes of no tile": (
        {"head": "embedding", "pooling": "mean", "dim": 60, "heads": 3, "hidden": 100, "sparsity": 0.75},
        {},
        "sparse",
    ),
    "heads of 32, half a tile": ({"pooler": "tanh", "dim": 192, "heads": 6, "hidden": 80}, {}, "dense"),
    "relu pooler": ({"pooler": "relu", "sparsity": 0.75, "num_classes": 5}, {}, "sparse"),
}


def expected(engine: NativeEngine, ids: np.ndarray, mask: np.ndarray | None = None) -> list[np.ndarray]:
    """The reference's output for each sequence up to its last kept token."""
    about, keep = engine.encoder, (ids != engine.encoder.pad_id) if mask is None else mask != 0
    segments = engine._types(ids, None)
    found = []
    for row in range(len(ids)):
        length = int(np.flatnonzero(keep[row]).max()) + 1
        positions = np.arange(length)
        if about.position_offset:
            positions = (np.cumsum(keep[row]) * keep[row])[:length] + about.position_offset - 1
        types = np.zeros(length, dtype=int) if segments is None else segments[row, :length]
        found.append(reference.encode(engine.pack, ids[row, :length], keep[row, :length], positions, types))
    return found


def check(engine: Engine, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
    assert isinstance(engine, NativeEngine)
    output = engine.run(ids, mask)
    for row, wanted in enumerate(expected(engine, ids, mask)):
        answer = output[row] if output.ndim == 2 else output[row, : len(wanted)]
        assert np.array_equal(answer, wanted), f"sequence {row}: {np.abs(answer - wanted).max():.3g} apart"
        if output.ndim == 3:
            assert not output[row, len(wanted) :].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_bit_equal_to_the_reference_and_close_to_torch(case: str, path: str) -> None:
    fields, kept, kind = CASES[case]
    if path not in cpu_capability().usable:
        pytest.skip(f"this CPU does not run {path}")
    model = quantised(bert(**fields), **kept)
    if case == "sizes of no tile" and path == "amx":
        with pytest.raises(UnsupportedISA, match="without the tile form"):
            compile_encoder(model, 3, 70, engine=kind, isa=path)
        return
    engine = compile_encoder(model, 3, 70, engine=kind, isa=path)
    ids = texts(model, 5, 67)
    check(engine, ids)
    assert engine.isa == path
    forms = {"sparse": {"tiles"} if path == "amx" else {"4x1"}, "dense": {"dense"}}[kind]
    assert set(engine.describe()["layers"].values()) - {"float"} == forms
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids)).numpy()
    if wanted.ndim == 3:
        wanted = wanted * (ids != model.pad_id)[:, :, None]
    assert np.abs(engine.run(ids) - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 64, 65, 80])
@pytest.mark.parametrize("path", PATHS[1:])
def test_every_length_is_bit_equal(sparse_bert: Any, path: str, length: int) -> None:
    if path not in cpu_capability().usable:
        pytest.skip(f"this CPU does not run {path}")
    engine = compile_encoder(sparse_bert, 2, 80, engine="sparse", isa=path)
    check(engine, texts(sparse_bert, 2, length, seed=length))


@pytest.mark.parametrize("path", PATHS)
def test_heads_beyond_one_slab_of_sequences(path: str) -> None:
    """The pooler fills its features up to 16; the classifier reads the second slab where that one wrote it."""
    if path not in cpu_capability().usable:
        pytest.skip(f"this CPU does not run {path}")
    model = quantised(bert(dim=20, heads=1, hidden=40, depth=1, pooler="tanh", num_classes=3, max_length=16))
    check(compile_encoder(model, 80, 16, engine="dense", isa=path), texts(model, 80, 9))


@pytest.mark.parametrize("kind", ["dense", "onnxruntime"])
def test_outputs_stay_on_their_grids_where_a_neighbour_is_in_float(kind: Any) -> None:
    """As the torch module answers that was scored: with coarse grids, the roundings are most of what it does."""
    model = quantised(bert(), keep_float=("0.query", "1.key"))
    layers = [getattr(block, name) for block in model.blocks for name in ("query", "key", "value")]
    coarse = [layer for layer in layers if getattr(layer, "output_scale", None) is not None]
    assert len(coarse) == 4
    for layer in coarse:
        layer.output_scale.mul_(24)
        layer.output_zero.fill_(128)
    ids = texts(model, 5, 67)
    answer = compile_encoder(model, 3, 70, engine=kind).run(ids)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids)).numpy()
        for layer in coarse:
            layer.output_scale = None
        without = model(torch.from_numpy(ids)).numpy()
    assert np.abs(answer - wanted).max() < 0.25 * np.abs(without - wanted).max()


@pytest.mark.parametrize("path", PATHS)
def test_more_keys_than_256(path: str) -> None:
    """Attention then takes 16 queries at a time, not 32."""
    if path not in cpu_capability().usable:
        pytest.skip(f"this CPU does not run {path}")
    model = quantised(bert(max_length=300, depth=1, dim=64, hidden=64))
    check(compile_encoder(model, 2, 300, engine="dense", isa=path), texts(model, 2, 300))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("path", PATHS)
def test_products_in_several_chunks(sparse_bert: Any, path: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if path not in cpu_capability().usable:
        pytest.skip(f"this CPU does not run {path}")
    whole = compile_encoder(sparse_bert, 5, 80, engine=kind, isa=path)
    monkeypatch.setattr(program, "CHUNK_BYTES", 2 * 128 * native.SLAB[path])
    chunked = compile_encoder(sparse_bert, 5, 80, engine=kind, isa=path)
    assert isinstance(whole, NativeEngine)
    assert isinstance(chunked, NativeEngine)
    chunks = [
        {step.name: step.fields["chunk"] for step in engine.program.steps if step.name in ("0.up", "0.down")}
        for engine in (whole, chunked)
    ]
    assert chunks[1] == {"0.up": 2, "0.down": 1}
    assert min(chunks[0].values()) * native.SLAB[path] > 400, "all tokens in one chunk, unless made small"
    ids = texts(sparse_bert, 5, 80)
    ids[0] = 5  # full length: more than 2 slabs
    assert np.array_equal(whole.run(ids), chunked.run(ids))
    check(chunked, ids)


@pytest.mark.parametrize("path", PATHS)
def test_masks_with_holes(sparse_bert: Any, path: str) -> None:
    if path not in cpu_capability().usable:
        pytest.skip(f"this CPU does not run {path}")
    ids = texts(sparse_bert, 3, 40, ragged=False)
    mask = (np.random.default_rng(5).random(ids.shape) < 0.6).astype(np.int64)
    mask[0, :7] = 0  # padded in front
    check(compile_encoder(sparse_bert, 3, 40, engine="dense", isa=path), ids, mask)


def test_extreme_activations_saturate_alike(sparse_bert: Any) -> None:
    """Inputs far outside the calibrated ranges, and weights of full size: no path overflows or wraps."""
    model = quantised(bert(seed=4))
    for block in model.blocks:
        block.up.weight.fill_(127)
        block.down.weight.fill_(-127)
        block.up.input_scale.mul_(0.01)
    outputs = []
    for path in cpu_capability().usable:
        engine = compile_encoder(model, 2, 32, engine="dense", isa=path)
        check(engine, texts(model, 2, 32))
        outputs.append(engine.run(texts(model, 2, 32)))
    assert all(np.array_equal(outputs[0], other) for other in outputs)


def test_one_pack_runs_on_every_path(sparse_bert: Any) -> None:
    """What was packed for the fastest path of this machine is run, to the same bits, by all slower ones."""
    content = compile_encoder(sparse_bert, 2, 64, engine="sparse").to_bytes()
    ids = texts(sparse_bert, 2, 50)
    answers = {path: Engine.load(content, isa=path).run(ids) for path in cpu_capability().usable}
    first = next(iter(answers.values()))
    assert all(np.array_equal(first, answer) for answer in answers.values())


@pytest.mark.parametrize("path", PATHS)
def test_one_sparse_layer(path: str) -> None:
    if path not in cpu_capability().usable:
        pytest.skip(f"this CPU does not run {path}")
    rng = np.random.default_rng(0)
    weight = (rng.integers(-127, 128, (20, 36)) * np.repeat(rng.random((5, 36)) < 0.3, 4, axis=0)).astype(np.int8)
    scale, bias = rng.random(20).astype(np.float32), rng.normal(size=20).astype(np.float32)
    layer = SparseInt8Linear(weight, scale, bias, (-1.0, 2.0), isa=path)
    x = rng.normal(size=(3, 30, 36)).astype(np.float32)
    q = reference.quantise(x.reshape(-1, 36).T, layer.grid)
    zero = layer.grid.zero * weight.sum(axis=1, dtype=np.int32)
    wanted = reference.int8_product(q, weight, zero, np.float32(layer.grid.scale) * scale, bias)
    assert np.array_equal(layer(x), wanted.T.reshape(3, 30, 20))
    with pytest.raises(InvalidValue, match="36 features, not 35"):
        layer(x[..., 1:])


# --------------------------------------------------------------------------------------------- which path runs


def test_a_path_can_be_named_by_the_environment(sparse_bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "portable")
    assert compile_encoder(sparse_bert, 1, 16, engine="dense").isa == "portable"
    monkeypatch.setenv(native.VARIABLE, "sse9")
    with pytest.raises(InvalidValue, match=r"SPARING_ENGINE_ISA must be one of portable, .*'sse9'"):
        compile_encoder(sparse_bert, 1, 16, engine="dense")


def test_a_path_this_cpu_lacks_is_refused(sparse_bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lesser = Capability(True, "", "an older CPU", PATHS, ("portable", "avx2"))
    monkeypatch.setattr(native, "cpu_capability", lambda: lesser)
    with pytest.raises(UnsupportedISA, match=r"'vnni' cannot run.*portable, avx2"):
        native.choose_path("vnni")
    assert native.choose_path() == "avx2"
    assert ("engine paths not on this CPU", "vnni, amx") in native.doctor_lines()
    assert native.doctor_lines()[0] == ("engine", "compiled, runs on avx2")


def test_the_doctor_names_the_path_that_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_capability", lambda: Capability(True, "", "a CPU", PATHS, PATHS[:3]))
    monkeypatch.setenv(native.VARIABLE, "portable")
    lines = native.doctor_lines()
    assert lines[0] == ("engine", "compiled, runs on portable")
    assert (native.VARIABLE, "portable") in lines
    monkeypatch.setenv(native.VARIABLE, "amx")
    assert "compiled, but will not run: the path 'amx' cannot run" in native.doctor_lines()[0][1]
    monkeypatch.setenv(native.VARIABLE, "sse9")
    assert "will not run: SPARING_ENGINE_ISA must be one of portable" in native.doctor_lines()[0][1]


def test_the_library_refuses_a_path_by_itself() -> None:
    found = native.library()
    assert not isinstance(found, str)
    assert found.sparing_run(17, None, 0, None, None) == -1


def test_nothing_is_compiled_and_torch_is_not_loaded_to_serve(sparse_bert: Any, tmp_path: Any) -> None:
    pack = compile_encoder(sparse_bert, 1, 16).save(tmp_path / "pack")
    code = (
        "import subprocess, sys\n"
        "def refuse(*a, **k): raise AssertionError(a)\n"
        "subprocess.Popen.__init__ = refuse\n"
        "from sparing.engine import Engine\n"
        f"print(Engine.load({str(pack)!r}).run([[5, 6, 7]]).shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 2) False", done.stderr


def test_blocks_of_a_real_weight_are_counted_alike(sparse_bert: Any) -> None:
    layer = sparse_bert.blocks[0].up
    assert packing.block_sparsity(layer.weight.numpy()) == pytest.approx(layer.block_sparsity)
