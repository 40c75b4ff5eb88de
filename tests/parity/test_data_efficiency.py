"""Data Efficiency beside the reference's outputs: schedules, analysis, sampler, post-processing, dropping, rates."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from sparing.data_efficiency.analysis import DataAnalyzer, read_statistic
from sparing.data_efficiency.index import DifficultyIndex, narrowest
from sparing.data_efficiency.metrics import (
    Composed,
    DifficultyMetric,
    SequenceLength,
    VocabularyRarity,
    negative_log_frequency,
    tie_factor,
)
from sparing.data_efficiency.pacing import linear as linear_pacing
from sparing.data_efficiency.pacing import pacing_from_config
from sparing.data_efficiency.postprocessing import reshape_batch, truncate_batch
from sparing.data_efficiency.sampler import CurriculumMetric, CurriculumSampler
from sparing.data_efficiency.token_dropping import drop_tokens, keep_mask
from sparing.data_efficiency.tokens import TokenCounter, TokenLR

SEED, MICRO_BATCH, WORLD, ACCUMULATION = 1234, 4, 2, 2
"""The same in every file of this format, says its README."""
RTOL, ATOL = 1e-4, 1e-5

Arrays = Mapping[str, np.ndarray]


def same(found: Any, expected: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(np.asarray(found), expected, err_msg=what)


def read(value: np.ndarray) -> Any:
    return json.loads(str(value))


# --- schedules


def quietly(config: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a start that is no multiple of the step
        return pacing_from_config(config, clamp_min=False)


def schedules(arrays: Arrays, beside: Path, scratch: Path) -> set[str]:
    compared = set()
    for name in (name for name in arrays if name.endswith("_config")):
        case, config = name.removesuffix("_config"), read(arrays[name])
        if case.startswith("pacing"):
            pacing = quietly(config)
            same([pacing(int(t)) for t in arrays[f"{case}_steps"]], arrays[f"{case}_difficulty"], case)
            now, path = None, []
            for t in arrays[f"{case}_update_steps"]:
                now = pacing.after(now, int(t))
                path.append(now)
            same(path, arrays[f"{case}_update_difficulty"], f"{case}, frozen")
            parts = ("config", "steps", "difficulty", "update_steps", "update_difficulty")
        else:
            assert case.startswith("ltd"), case
            schedule = config["random_ltd_schedule"]
            asked = schedule["schedule_config"]
            assert schedule["schedule_type"] == "fixed_linear"
            pacing = quietly(
                schedule
                | {
                    "min_difficulty": schedule["min_value"],
                    "max_difficulty": schedule["max_value"],
                    "schedule_config": {
                        "total_curriculum_step": asked["require_steps"],
                        "difficulty_step": asked["seq_per_step"],
                    },
                }
            )
            counter = TokenCounter(config["total_layer_num"], config["random_ltd_layer_num"])
            kept, lengths, consumed = None, [], []
            for t in range(len(arrays[f"{case}_reserved_length"])):
                kept = pacing.after(kept, t)
                counter.add(config["global_batch_size"], schedule["max_value"], kept)
                lengths.append(kept)
                consumed.append(counter.layer_tokens)
            same(lengths, arrays[f"{case}_reserved_length"], f"{case} reserved length")
            same(consumed, arrays[f"{case}_consumed_layer_tokens"], f"{case} layer tokens")
            parts = ("config", "reserved_length", "consumed_layer_tokens")
        compared |= {f"{case}_{part}" for part in parts}
    return compared


# --- analysis


def metrics_of(arrays: Arrays) -> list[DifficultyMetric]:
    parts = [SequenceLength(), VocabularyRarity(int(arrays["vocab_size"]))]
    return [*parts, Composed(parts, width=arrays["tokens"].shape[1])]


def analysed(arrays: Arrays, folder: Path, **options: Any) -> dict[str, DifficultyIndex]:
    data = {"input_ids": arrays["tokens"], "attention_mask": arrays["padding_mask"]}
    return DataAnalyzer(data, metrics_of(arrays), folder, **options).run()


def analyser(arrays: Arrays, beside: Path, scratch: Path) -> set[str]:
    compared = {"tokens", "padding_mask", "vocab_size"}
    batch = {"input_ids": arrays["tokens"], "attention_mask": arrays["padding_mask"]}
    for number, options in enumerate(({}, {"shard_size": 50, "batch_size": 7})):
        folder = scratch / f"analysis{number}"
        indexes = analysed(arrays, folder, **options)
        counts = read_statistic(folder / "total_vocab_freq")
        same(counts, arrays["total_vocab_freq"], "total_vocab_freq")
        surprisal = negative_log_frequency(counts)
        np.testing.assert_allclose(surprisal, arrays["neg_log_freq"], rtol=1e-12, err_msg="neg_log_freq")
        same(tie_factor(arrays["tokens"].shape[1] * surprisal.max()), arrays["seqlen_coeff"], "seqlen_coeff")
        compared |= {"total_vocab_freq", "neg_log_freq", "seqlen_coeff"}
        for metric in metrics_of(arrays):
            name, index = metric.name, indexes[metric.name]
            index.check()
            fitted = metric if metric.first_pass() is None else metric.fitted(counts)
            same(fitted.values(batch), arrays[f"{name}_sample_to_metric"], f"{name} of one batch")
            same(index.sample_to_metric, arrays[f"{name}_sample_to_metric"], f"{name}_sample_to_metric")
            assert index.sample_to_metric.dtype == str(arrays[f"{name}_sample_to_metric_dtype"]), name
            same(index.values, arrays[f"{name}_index_to_metric"], f"{name}_index_to_metric")
            same(index.ids, arrays[f"{name}_index_to_sample_flat"], f"{name}_index_to_sample_flat")
            same(index.offsets, arrays[f"{name}_index_to_sample_offsets"], f"{name}_index_to_sample_offsets")
            same(index.ids, arrays[f"{name}_percentile_merged_flat"], f"{name}_percentile_merged_flat")
            same(index.percentile_offsets(), arrays[f"{name}_percentile_merged_offsets"], f"{name}_percentile offsets")
            parts = ("sample_to_metric", "sample_to_metric_dtype", "index_to_metric", "index_to_sample_flat",
                     "index_to_sample_offsets", "percentile_merged_flat", "percentile_merged_offsets")  # fmt: skip
            compared |= {f"{name}_{part}" for part in parts}
    return compared


# --- sampler


def sampler(arrays: Arrays, beside: Path, scratch: Path) -> set[str]:
    with np.load(beside / "analyser.npz", allow_pickle=False) as opened:
        indexes = analysed(dict(opened), scratch / "indexes")
    compared = {"num_samples"}
    scenarios = [name.removesuffix("_metric_names") for name in arrays if name.endswith("_metric_names")]
    assert scenarios, "no scenario"
    for case in scenarios:
        configs = read(arrays[f"{case}_metrics"])
        same(list(configs), arrays[f"{case}_metric_names"], f"{case} names")
        metrics = {}
        for name, config in configs.items():
            alone = config["clustering_type"] == "single_cluster"
            metrics[name] = CurriculumMetric(
                quietly(config), None if alone else indexes[name], config["difficulty_type"]
            )
        batches, difficulties = arrays[f"{case}_global_batches"], arrays[f"{case}_difficulties"]
        assert batches.shape[1] == MICRO_BATCH * WORLD * ACCUMULATION, case
        made = curriculum(metrics, arrays, len(batches))
        for step, (batch, now) in enumerate(made.global_batches()):
            same(batch, batches[step], f"{case} batch {step}")
            same(list(now.values()), difficulties[step], f"{case} difficulties {step}")
        expected = np.split(arrays[f"{case}_clusters_flat"], arrays[f"{case}_clusters_offsets"][1:-1])
        assert len(made.clusters) == len(expected), f"{case}: {len(made.clusters)} clusters"
        for number, (cluster, reference) in enumerate(zip(made.clusters, expected, strict=True)):
            same(np.sort(cluster), np.sort(reference), f"{case} cluster {number}")
            if made._clusters[number].pass_ == 0:
                same(cluster, reference, f"{case} cluster {number} in order")
        keyed = curriculum(metrics, arrays, len(batches), rng_order="keyed")
        list(keyed.global_batches())
        for number, (cluster, reference) in enumerate(zip(keyed.clusters, expected, strict=True)):
            same(np.sort(cluster), np.sort(reference), f"{case} keyed cluster {number}")
        parts = [list(curriculum(metrics, arrays, len(batches), rank=rank)) for rank in range(WORLD)]
        joined = [[*one, *other] for one, other in zip(*parts, strict=True)]
        same(np.concatenate(joined).reshape(batches.shape), batches, f"{case} micro batches of all processes")
        names = ("metrics", "metric_names", "difficulties", "global_batches", "clusters_flat", "clusters_offsets")
        compared |= {f"{case}_{name}" for name in names}
    return compared


def curriculum(
    metrics: dict[str, CurriculumMetric], arrays: Arrays, steps: int, rank: int = 0, rng_order: Any = "reference"
) -> CurriculumSampler:
    return CurriculumSampler(
        metrics,
        MICRO_BATCH,
        steps,
        SEED,
        rank=rank,
        world_size=WORLD,
        accumulation=ACCUMULATION,
        samples=int(arrays["num_samples"]),
        rng_order=rng_order,
        percentile_rounding="reference",
    )


# --- post-processing


def postprocess(arrays: Arrays, beside: Path, scratch: Path) -> set[str]:
    text = torch.tensor(arrays["text"])
    compared = {"text", "seqlens"}
    for length in arrays["seqlens"].tolist():
        for name, change in (("truncate", truncate_batch), ("reshape", reshape_batch)):
            same(change(text, length), arrays[f"gpt_{name}_{length}"], f"gpt_{name}_{length}")
            compared.add(f"gpt_{name}_{length}")
    return compared


# --- token dropping


class Block(nn.Module):
    """The fixtures' pre-norm block; ``swap``: hidden states (T, B, D)."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int, swap: bool) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor))
        self.heads, self.swap = heads, swap

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
        x = hidden.transpose(0, 1) if self.swap else hidden

        def layer(name: str, value: Tensor) -> Tensor:
            return linear(value, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))

        def norm(name: str, value: Tensor) -> Tensor:
            return layer_norm(
                value, value.shape[-1:], getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"), 1e-5
            )

        q, k, v = layer("qkv", norm("ln1", x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + attention_mask
        x = x + layer("proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + layer("fc2", gelu(layer("fc1", norm("ln2", x))))
        return (x.transpose(0, 1) if self.swap else x), None


class Stack(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        hidden = [x]
        for block in self.blocks:
            hidden.append(block(hidden[-1], attention_mask=mask)[0])
        return hidden[1:]


def dropping(arrays: Arrays, beside: Path, scratch: Path) -> set[str]:
    config = read(arrays["config"])
    chosen, layout = config["random_ltd_layer_id"], config["hidden_state_order"]
    assert config["random_ltd_layer_num"] == len(chosen)
    swap = layout == "seq_batch_dim"
    blocks = []
    for i in range(config["total_layer_num"]):
        prefix = f"param.{i}."
        weights = {name.removeprefix(prefix): torch.tensor(arrays[name]) for name in arrays if name.startswith(prefix)}
        blocks.append(Block(weights, int(arrays["n_head"]), swap))
    model = Stack(blocks)
    x, mask = torch.tensor(arrays["x"], requires_grad=True), torch.tensor(arrays["mask"])
    indices = torch.tensor(arrays["sampled_indices"]).long()
    kept, length = indices.shape[2], mask.shape[-1]
    handle = drop_tokens(
        model, linear_pacing(kept, length, 10), chosen, kind=config["model_type"],
        mask_args=[config["model_mask_name"]], layout=layout,
    )  # fmt: skip
    assert handle.reserved_length == kept
    handle._draw = lambda batch, tokens, device: vars(handle).update(last_indices=indices, _length=tokens)  # type: ignore[method-assign]
    hidden = model.train()(x, mask)
    compared = {"config", "x", "mask", "sampled_indices", "cotangent", "n_head"}

    def close(found: Any, name: str) -> None:
        found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
        np.testing.assert_allclose(found, arrays[name], rtol=RTOL, atol=ATOL, err_msg=name)
        compared.add(name)

    parts = [keep_mask(mask, row, length, config["model_type"]) for row in indices]
    for part in parts:
        if arrays["part_mask"].ndim == 4:  # of a decoder: one for all layers
            close(part, "part_mask")
    if arrays["part_mask"].ndim == 5:
        close(torch.stack(parts), "part_mask")
    for i, states in enumerate(hidden):
        close(states, f"hidden_{i}")
    loss = (hidden[-1] * torch.tensor(arrays["cotangent"])).sum()
    loss.backward()
    close(loss, "loss")
    close(x.grad, "grad_x")
    for i, block in enumerate(blocks):
        for name in (name for name in arrays if name.startswith(f"param.{i}.")):
            inner = name.removeprefix(f"param.{i}.")
            close(getattr(block, inner.replace(".", "_")).grad, f"grad.{i}.{inner}")
            compared.add(name)
    close(model.eval()(x, mask)[-1], "eval_output")
    handle.remove()
    close(model.train()(x, mask)[-1], "eval_output")
    return compared


# --- the learning rate


def rates(arrays: Arrays, beside: Path, scratch: Path) -> set[str]:
    setup = read(arrays["setup"])
    full = setup["S"]
    curriculum_length = linear_pacing(setup["cl"][0], full, setup["cl"][1], 8, clamp_min=False)
    reserved_length = linear_pacing(setup["ltd"][0], full, setup["ltd"][1], 8, clamp_min=False)
    names = [name for name in arrays if name.startswith("lr_") and name not in ("lr_max", "lr_min")]
    assert names, "no learning rates"
    schedules = {}
    for name in names:
        style, warmup = name.removeprefix("lr_").split("_", 1)
        assert warmup in ("token_warmup", "step_warmup", "step_warmup_finetune"), name
        length = {"warmup_tokens": float(arrays["warmup_tokens"])}
        if warmup != "token_warmup":
            length = {"warmup_steps": int(arrays["warmup_steps"])}
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedules[name] = TokenLR(
            optimizer, float(arrays["lr_max"]), float(arrays["lr_min"]), style=style,
            decay_tokens=float(arrays["decay_tokens"]), **length,
        )  # fmt: skip
    found: dict[str, list[Any]] = {name: [schedule.get_last_lr()[0]] for name, schedule in schedules.items()}
    columns = ("curriculum_seqlen", "reserved_length", "effective_seqlen", "consumed_tokens")
    found |= {name: [] for name in columns}
    counter = TokenCounter(setup["L"], setup["n"])
    length = kept = None
    for i in range(setup["steps"]):
        length, kept = curriculum_length.after(length, i + 1), reserved_length.after(kept, i)
        before = counter.tokens
        counter.add(setup["gbs"], int(length), int(kept))
        row = (length, kept, (counter.tokens - before) // setup["gbs"], counter.tokens)
        for name, value in zip(columns, row, strict=True):
            found[name].append(value)
        for name, schedule in schedules.items():
            schedule.step(counter.tokens)
            found[name].append(schedule.get_last_lr()[0])
    for name in columns:
        same(found[name], arrays[name], name)
    for name in names:
        np.testing.assert_allclose(found[name], arrays[name], rtol=1e-9, atol=0, err_msg=name)
    for name in names:
        if "step_warmup" in name:
            assert schedules[name].warmup_tokens == arrays["warmup_tokens"]
    settings = {"setup", "lr_max", "lr_min", "warmup_steps", "warmup_tokens", "decay_tokens"}
    return set(found) | settings


GROUPS: dict[str, Callable[[Arrays, Path, Path], set[str]]] = {
    "_update_difficulty": schedules,
    "_consumed_layer_tokens": schedules,
    "neg_log_freq": analyser,
    "num_samples": sampler,
    "text": postprocess,
    "sampled_indices": dropping,
    "setup": rates,
}
"""The end of a name that tells what a file holds → a check of all of its arrays, which returns their names."""


def opened(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def test_every_file_is_understood_and_reproduced(
    oracles: Callable[[str], list[Path]], tmp_path: Path, record_property: Any
) -> None:
    count = 0
    for file in oracles("data_efficiency"):
        arrays = opened(file)
        checks = {check for marker, check in GROUPS.items() if any(name.endswith(marker) for name in arrays)}
        assert len(checks) == 1, f"{file.name}: not understood: {sorted(arrays)[:10]}"
        compared = checks.pop()(arrays, file.parent, tmp_path / file.stem)
        assert compared == arrays.keys(), f"{file.name}: missing or not understood: {sorted(arrays.keys() ^ compared)}"
        count += len(compared)
    record_property("arrays", count)
    print(f"data_efficiency: {count} arrays read, all that are outputs compared")


def one_with(files: list[Path], marker: str) -> tuple[dict[str, np.ndarray], Path]:
    return next((opened(file), file.parent) for file in files if marker in opened(file))


def test_other_positions_would_be_noticed(oracles: Callable[[str], list[Path]], tmp_path: Path) -> None:
    arrays, folder = one_with(oracles("data_efficiency"), "sampled_indices")
    with pytest.raises(AssertionError, match=r"part_mask|hidden_"):
        dropping(arrays | {"sampled_indices": arrays["sampled_indices"][::-1].copy()}, folder, tmp_path)


def test_another_order_of_batches_would_be_noticed(oracles: Callable[[str], list[Path]], tmp_path: Path) -> None:
    arrays, folder = one_with(oracles("data_efficiency"), "num_samples")
    name = next(name for name in arrays if name.endswith("_global_batches"))
    with pytest.raises(AssertionError, match="batch 0"):
        sampler(arrays | {name: arrays[name][:, ::-1].copy()}, folder, tmp_path)


def test_another_count_would_be_noticed(oracles: Callable[[str], list[Path]], tmp_path: Path) -> None:
    arrays, folder = one_with(oracles("data_efficiency"), "neg_log_freq")
    with pytest.raises(AssertionError, match="total_vocab_freq"):
        analyser(arrays | {"tokens": np.minimum(arrays["tokens"] + 1, arrays["vocab_size"])}, folder, tmp_path)


def test_types_are_the_narrowest() -> None:
    assert [narrowest(0, 255), narrowest(0, 256), narrowest(-1, 127), narrowest(-129, 0)] == [
        np.uint8, np.uint16, np.int8, np.int16]  # fmt: skip
