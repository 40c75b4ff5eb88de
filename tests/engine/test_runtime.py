"""Engines: what they take and refuse, batches, memory, choice of kernels, and life without native code."""

from __future__ import annotations

import threading
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import bert, quantised, texts

from sparing.core.errors import InvalidValue, NoEffect, UnsupportedISA
from sparing.core.predictor import build_model
from sparing.engine import compiler, native
from sparing.engine.compiler import compile_encoder
from sparing.engine.linear import Int8Linear
from sparing.engine.native import Capability, cpu_capability
from sparing.engine.program import Buffer, plan_memory
from sparing.engine.runtime import Engine, NativeEngine, OnnxEngine

needs_native = pytest.mark.skipif(not cpu_capability().compiled, reason="the native library is not built here")


@pytest.fixture(scope="module")
def engine(sparse_bert: Any) -> Engine:
    return compile_encoder(sparse_bert, 4, 48, engine="sparse")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where no compiler was found at installation."""
    missing = Capability(False, "no C++ compiler was found", "some CPU", (), ())
    monkeypatch.setattr(native, "cpu_capability", lambda: missing)
    monkeypatch.setattr(compiler, "cpu_capability", lambda: missing)


# ------------------------------------------------------------------------------------------------- input


@needs_native
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([[5] * 49],), "49 tokens long.*at most 48"),
        (([5, 6],), r"\(sequences, tokens\), not \[2\]"),
        ((np.zeros((0, 4), dtype=np.int64),), r"\[0, 4\]"),
        (([[5.0, 6.0]],), "whole numbers, not float64"),
        (([[5, 6], [7]],), "rectangular"),
        (([[5, 97]],), "hold 97; token numbers are 0…96"),
        (([[5, -1]],), "hold -1"),
        (([[5, 6]], [[1, 1, 1]]), r"\[1, 3\].*\[1, 2\]"),
        (([[5, 6]], [[1, 2]]), "zeros and ones"),
        (([[5, 6], [5, 6]], [[1, 0], [0, 0]]), "sequence 1 has no token"),
        (([[0, 0]],), "sequence 0 has no token"),
        (([[5, 6]], None, [[0, 1]]), "must be in 0…0, not 1"),
        (([[5, 6]], None, [[0]]), r"\[1, 1\]"),
    ],
)
def test_inputs_that_are_refused(engine: Engine, arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        engine.run(*arguments)


@needs_native
def test_longer_batches_are_split_and_padding_changes_nothing(sparse_bert: Any, engine: Engine) -> None:
    ids = texts(sparse_bert, 11, 48)
    whole = engine.run(ids)
    assert whole.shape == (11, 2)
    assert whole.dtype == np.float32
    for row, answer in zip(ids, whole, strict=True):
        alone = row[row != sparse_bert.pad_id]
        assert np.array_equal(engine.run(alone[None])[0], answer)
    assert np.array_equal(engine.run(torch.from_numpy(ids)), whole)
    assert np.array_equal(engine(ids.astype(np.int32), (ids != 0).tolist()), whole)


@needs_native
def test_types_are_read_off_the_separator_or_given() -> None:
    model = quantised(bert(segments=2))
    engine = compile_encoder(model, 2, 32)
    ids = np.array([[5, 6, 3, 7, 8, 3], [5, 3, 9, 0, 0, 0]])
    types = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]])
    assert np.array_equal(engine.run(ids), engine.run(ids, None, types))
    assert not np.array_equal(engine.run(ids), engine.run(ids, None, np.zeros_like(types)))


@needs_native
def test_fewer_tokens_cost_less(sparse_bert: Any) -> None:
    engine = compile_encoder(sparse_bert, 8, 80, engine="sparse")
    assert seconds_of(engine, 1, 16) < seconds_of(engine, 8, 80) * 3 / 4, "it is 1/40 of the tokens"


def seconds_of(engine: Engine, batch: int, length: int) -> float:
    """Processor time of some calls, the least of three times."""
    taken = []
    for _ in range(3):
        start = process_time()
        engine.profile(batch, length, 10)
        taken.append(process_time() - start)
    return min(taken)


# ------------------------------------------------------------------------------------------------ compiling


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_batch": 0}, "max_batch .* not 0"),
        ({"max_batch": 1 << 16, "max_length": 512}, "65536 sequences of 512 tokens; .* 16777216"),
        ({"max_length": True}, "max_length .* not True"),
        ({"max_length": 32769}, "max_length must be a whole number in 1…32768, not 32769"),
        ({"max_length": 81}, "max_length = 81; the model has positions for 80"),
        ({"engine": "fast"}, "not 'fast'"),
        ({"tokens": [0]}, "at least 1"),
    ],
)
def test_settings_that_are_refused(sparse_bert: Any, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        compile_encoder(sparse_bert, **({"max_batch": 1, "max_length": 16} | changes))


def test_models_that_are_refused() -> None:
    model = quantised(bert())
    model.blocks[1].attention_norm.weight.data[3] = float("nan")
    with pytest.raises(InvalidValue, match=r"1\.attention_norm.weight holds 1 values that are NaN"):
        compile_encoder(model, 1, 16)
    with pytest.raises(InvalidValue, match="masked_lm"):
        compile_encoder(bert(head="masked_lm"), 1, 16)
    with pytest.raises(InvalidValue, match=r"blocks.0.up is 250 × 128; .* multiples of 4"):
        compile_encoder(bert(hidden=250), 1, 16)
    with pytest.raises(InvalidValue, match=r"a head of 2052 features; .* a multiple of 4, at most 2048"):
        compile_encoder(build_model("bert", vocab_size=8, dim=2052, heads=1, hidden=4, depth=1), 1, 16)
    model = bert()
    model.blocks[0].up = torch.nn.Identity()
    with pytest.raises(InvalidValue, match=r"blocks\.0\.up is a Identity"):
        compile_encoder(model, 1, 16)


@pytest.mark.parametrize("engine", ["auto", "sparse", "dense", "onnxruntime", "torch"])
@pytest.mark.parametrize("narrower", [[1], [0, 1]], ids=["one block", "all blocks"])
def test_cut_heads_are_refused_by_every_engine(engine: Any, narrower: list[int]) -> None:
    """What shrinking leaves where heads were cut: a head of 64 of two, still answering vectors of 128."""
    model = quantised(bert())
    for number in narrower:
        block = model.blocks[number]
        block.heads = 1
        for name in ("query", "key", "value"):
            setattr(block, name, torch.nn.Linear(128, 64))
        block.attention_out = torch.nn.Linear(64, 128)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]]))).all(), "a model as any other to torch"
    named = rf"blocks\.{narrower[0]}\.query has 64 outputs, dim is 128; the engine needs heads × head size = dim"
    with pytest.raises(InvalidValue, match=named):
        compile_encoder(model, 1, 16, engine=engine)


@needs_native
def test_sparse_needs_zeros_and_native_needs_integers() -> None:
    with pytest.raises(NoEffect, match=r"no layer has 70% zero 4×1 blocks; the most is 4\d\.\d%"):
        compile_encoder(quantised(bert(sparsity=0.45)), 1, 16, engine="sparse")
    with pytest.raises(NoEffect, match="none of the 8 layers is INT8"):
        compile_encoder(bert(), 1, 16, engine="dense")


@needs_native
def test_kernels_are_chosen_by_time_and_the_times_are_kept(sparse_bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(ratio: float) -> Any:
        def seconds(self: Any) -> float:
            return 1.0 if self.form == "dense" else ratio

        return seconds

    for ratio, wins in ((0.96, False), (0.94, True)):
        monkeypatch.setattr(compiler._Product, "seconds", told(ratio))
        engine = compile_encoder(sparse_bert, 2, 32)
        chosen = set(engine.describe()["layers"].values())
        assert (chosen != {"dense"}) == wins
        assert all(record["ratio"] == ratio and record["tokens"] == [32, 64] for record in engine.manifest.timings)
        assert Engine.load(engine.to_bytes()).manifest.timings == engine.manifest.timings
    below = compile_encoder(quantised(bert(sparsity=0.6)), 2, 32)
    assert set(below.describe()["layers"].values()) == {"dense"}
    assert not below.manifest.timings


def test_a_layer_that_fits_no_tiles_leaves_the_others_on_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMX one 4×1 layer takes the whole model to vnni: "auto" never makes one, only "sparse" does."""
    monkeypatch.setattr(compiler._Product, "seconds", lambda self: 1.0 if self.form == "dense" else 0.5)
    found = compiler.extract(quantised(bert(hidden=136, depth=1, sparsity=0.8)))
    formats, timings = compiler._choose(found, "amx", "auto", [32])
    assert formats == {"0.qkv": "tiles", "0.attention_out": "tiles", "0.up": "dense", "0.down": "dense"}
    assert [(record["layer"], record["path"]) for record in timings] == [("0.qkv", "amx"), ("0.attention_out", "amx")]
    forced, _ = compiler._choose(found, "amx", "sparse", [32])
    assert set(forced.values()) == {"4x1"}
    others, timings = compiler._choose(found, "vnni", "auto", [32])
    assert set(others.values()) == {"4x1"}
    assert {record["path"] for record in timings} == {"vnni"}


@needs_native
def test_measuring_times_both_kernels(sparse_bert: Any) -> None:
    engine = compile_encoder(sparse_bert, 2, 32)
    assert isinstance(engine, NativeEngine)
    assert engine.manifest.timings
    for record in engine.manifest.timings:
        assert record["block_sparsity"] == pytest.approx(0.8, abs=0.02)
        assert len(record["milliseconds"]) == 2
        assert all(min(times) > 0 for times in record["milliseconds"].values())
        assert (record["chosen"] != "dense") == (record["ratio"] <= 0.95)


def test_models_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=60, dim=64, n_layers=1, n_heads=2, hidden_dim=64)
    torch.manual_seed(0)
    model = transformers.DistilBertForQuestionAnswering(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with torch.inference_mode():
        answer = model(ids, attention_mask=(ids != 0).long())
    wanted = torch.stack([answer.start_logits, answer.end_logits], dim=2).numpy()
    for source in (model, tmp_path / "model"):
        engine = compile_encoder(source, 2, 16)
        found = engine.run(ids)
        assert engine.kind == "onnxruntime"
        assert "no layer of the blocks is INT8" in engine.reason
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
        np.testing.assert_allclose(found[1, :2], wanted[1, :2], atol=1e-5)
    linear = model.distilbert.transformer.layer[0].ffn.lin1
    model.distilbert.transformer.layer[0].ffn.lin1 = Int8Linear.of(linear, (-1.0, 1.0))
    with pytest.raises(InvalidValue, match=r"take the model over with from_transformers first, then quantize_ptq"):
        compile_encoder(model, 2, 16)


# ---------------------------------------------------------------------------------------------- other runtimes


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head": "span", "segments": 2, "position_offset": 2},
        {"head": "embedding", "pooling": "mean"},
        {"pooler": "tanh"},
        {"head": "tokens"},
    ],
    ids=str,
)
def test_the_runtimes_agree(fields: dict[str, Any]) -> None:
    model = quantised(bert(**fields), keep_float=("0.up", "1.query"))
    ids = texts(model, 5, 40)
    kinds = ["torch", "onnxruntime"] + (["dense"] if cpu_capability().compiled else [])
    answers = {kind: compile_encoder(model, 3, 40, engine=kind).run(ids) for kind in kinds}
    largest = np.abs(answers["torch"]).max()
    for kind, answer in answers.items():
        assert np.abs(answer - answers["torch"]).max() < 0.02 * largest, kind


@pytest.mark.usefixtures("without_native")
def test_without_native_code_onnx_runtime_serves_and_says_so(sparse_bert: Any, tmp_path: Path) -> None:
    engine = compile_encoder(sparse_bert, 2, 32)
    assert isinstance(engine, OnnxEngine)
    assert engine.reason == "native code is not here: no C++ compiler was found"
    assert engine.describe()["kind"] == "onnxruntime"
    assert engine.memory_plan is None
    ids = texts(sparse_bert, 3, 32)
    with torch.inference_mode():
        np.testing.assert_allclose(engine.run(ids), sparse_bert(torch.from_numpy(ids)).numpy(), atol=0.02)
    again = Engine.load(engine.save(tmp_path / "pack"))
    assert np.array_equal(again.run(ids), engine.run(ids))
    assert native.doctor_lines() == [("engine", "ONNX Runtime serves: no C++ compiler was found")]
    for forced in ("sparse", "dense"):
        with pytest.raises(UnsupportedISA, match="no C\\+\\+ compiler"):
            compile_encoder(sparse_bert, 2, 32, engine=forced)


def test_a_library_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.library.cache_clear()
    try:
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
        assert "not compiled when sparing was installed" in str(native.library())
        native.library.cache_clear()
        (tmp_path / "none.so").write_bytes(b"not a library")
        assert "cannot be loaded" in str(native.library())
        native.library.cache_clear()
        monkeypatch.undo()
        if cpu_capability().compiled:
            monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
            assert "is of another version of sparing; install it again" in str(native.library())
    finally:
        native.library.cache_clear()


def test_an_engine_in_torch_has_no_file(sparse_bert: Any) -> None:
    engine = compile_encoder(sparse_bert, 2, 32, engine="torch")
    with pytest.raises(InvalidValue, match="has no file"):
        engine.to_bytes()
    with pytest.raises(InvalidValue, match="no times of single operators"):
        engine.profile()


# --------------------------------------------------------------------------------------------------- memory


def test_buffers_that_live_together_never_meet() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        firsts = rng.integers(0, 20, 30)
        buffers = [
            Buffer(str(index), int(rng.integers(1, 5000)), int(first), int(first + rng.integers(0, 6)))
            for index, first in enumerate(firsts)
        ]
        plan = plan_memory(buffers)
        for one in plan.buffers:
            assert one.offset % 64 == 0
            assert one.offset + one.nbytes <= plan.nbytes
            for other in plan.buffers:
                if one is not other and one.first <= other.last and other.first <= one.last:
                    assert one.offset + one.nbytes <= other.offset or other.offset + other.nbytes <= one.offset
        assert plan.nbytes <= plan.without_sharing


@needs_native
def test_the_plan_is_made_once_and_shares_memory(engine: Engine, sparse_bert: Any) -> None:
    plan = engine.memory_plan
    assert plan is not None
    assert plan.nbytes < plan.without_sharing / 1.5
    deeper = compile_encoder(quantised(bert(depth=6)), 4, 48, engine="dense").memory_plan
    assert deeper is not None
    assert deeper.nbytes == compile_encoder(quantised(bert(depth=2)), 4, 48, engine="dense").memory_plan.nbytes
    engine.run(texts(sparse_bert, 4, 48))
    assert engine.memory_plan is plan


@needs_native
def test_profile_names_every_operator(engine: Engine) -> None:
    times = engine.profile(2, 20, repetitions=2)
    names = [time.name for time in times]
    assert names[:2] == ["embeddings", "embeddings.norm"]
    assert names[-1] == "output"
    assert {"0.qkv", "0.attention", "1.up", "1.output_norm", "head.classifier"} <= set(names)
    assert all(time.seconds > 0 for time in times)


@needs_native
def test_threads_wait_and_instances_do_not_share_memory(engine: Engine, sparse_bert: Any) -> None:
    ids = [texts(sparse_bert, 4, 48, seed=seed) for seed in range(4)]
    wanted = [engine.run(batch) for batch in ids]
    for engines in ([engine] * 4, [engine.instance() for _ in range(4)]):
        answers: list[Any] = [None] * 4

        def serve(index: int, engines: list[Engine] = engines, answers: list[Any] = answers) -> None:
            for _ in range(20):
                answers[index] = engines[index].run(ids[index])

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(one, other) for one, other in zip(answers, wanted, strict=True))
