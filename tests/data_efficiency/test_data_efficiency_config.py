"""DeepSpeed's configuration, read."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sparing.core.errors import CorruptFile, InvalidValue
from sparing.data_efficiency.analysis import DataAnalyzer
from sparing.data_efficiency.config import DataEfficiency
from sparing.data_efficiency.metrics import FunctionMetric
from sparing.data_efficiency.pacing import linear
from sparing.models.bert import Bert


@pytest.fixture
def config(tmp_path) -> dict[str, Any]:
    data = np.arange(40)[:, None]
    DataAnalyzer(data, [FunctionMetric("rarity", lambda batch: batch[:, 0], "1")], tmp_path).run()
    return {
        "enabled": True,
        "seed": 7,
        "data_sampling": {
            "enabled": True,
            "num_epochs": 3,
            "num_workers": 0,
            "curriculum_learning": {
                "enabled": True,
                "data_cluster_path": "unused",
                "curriculum_metrics": {
                    "rarity": {
                        "index_to_sample_path": str(tmp_path / "rarity"),
                        "index_to_metric_path": str(tmp_path / "rarity"),
                        "difficulty_type": "percentile",
                        "clustering_type": "schedule_based",
                        "min_difficulty": 10,
                        "max_difficulty": 100,
                        "schedule_type": "fixed_linear",
                        "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 10},
                    },
                    "seqlen_truncate": {
                        "difficulty_type": "value",
                        "clustering_type": "single_cluster",
                        "min_difficulty": 8,
                        "max_difficulty": 64,
                        "schedule_type": "fixed_linear",
                        "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 8},
                    },
                },
            },
        },
        "data_routing": {
            "enabled": True,
            "random_ltd": {
                "enabled": True,
                "total_layer_num": 4,
                "random_ltd_layer_num": 2,
                "random_ltd_layer_id": [1, 2],
                "model_mask_name": "mask",
                "model_type": "encoder",
                "hidden_state_order": "batch_seq_dim",
                "random_ltd_schedule": {
                    "min_value": 4,
                    "max_value": 12,
                    "schedule_type": "fixed_linear",
                    "schedule_config": {"require_steps": 5, "seq_per_step": 2},
                },
                "layer_token_lr_schedule": {"enabled": True, "total_layer_tokens": 1000, "warmup_layer_tokens": 100},
            },
        },
    }


def test_a_configuration_becomes_sampler_dropping_and_schedule(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data_efficiency": config}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data_efficiency": config}))
    for given in (config, tmp_path / "config.json", str(tmp_path / "config.yaml")):
        read = DataEfficiency.from_config(given)
        sampler = read.sampler(4, samples=40)
        assert len(sampler) == 30
        assert [batch.difficulties for batch in sampler][-1] == {"rarity": 100, "seqlen_truncate": 64}
        model = Bert(30, dim=8, depth=4, heads=2, max_length=12, head="tokens")
        dropping = read.drop_tokens(model)
        assert (dropping.dropping, dropping.schedule, dropping.seed) == ([1, 2], linear(4, 12, 5, 2), 7)
        schedule = read.layer_token_schedule(torch.optim.SGD(model.parameters()), 0.5)
        schedule.step(100)
        assert schedule.get_last_lr() == [0.5]
        with pytest.raises(InvalidValue, match="total_layer_num = 4; the model has 5 blocks"):
            read.drop_tokens(Bert(30, dim=8, depth=5, heads=2, max_length=12, head="tokens"))


def test_what_is_not_enabled_is_not_there(config):
    off = DataEfficiency.from_config(config | {"enabled": False})
    assert off.curriculum is off.dropping is off.layer_token_lr is None
    for call, named in (
        (lambda: off.sampler(2), "curriculum_learning is not enabled"),
        (lambda: off.drop_tokens(torch.nn.Linear(1, 1)), "random_ltd is not enabled"),
        (lambda: off.layer_token_schedule(torch.optim.SGD([torch.zeros(1)]), 1.0), "layer_token_lr_schedule is not"),
    ):
        with pytest.raises(InvalidValue, match=named):
            call()


METRIC = ("data_sampling", "curriculum_learning", "curriculum_metrics", "rarity")
LTD = ("data_routing", "random_ltd")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("seeds",), 3, "data_efficiency has no 'seeds'. Did you mean 'seed'"),
        (("enabled",), 1, "enabled of data_efficiency is 1"),
        (("data_sampling", "num_epochs"), 0, "num_epochs = 0"),
        (METRIC[:-1], {}, "at least one metric"),
        ((*LTD, "random_ltd_layer_num"), 3, "random_ltd_layer_num = 3, .* has 2"),
        ((*LTD, "model_type"), "encode", "Did you mean 'encoder'"),
        ((*LTD, "random_ltd_schedule", "schedule_type"), "fixed_root", "fixed_linear is needed"),
        ((*LTD, "layer_token_lr_schedule", "warmup_type"), "cosine", "only 'linear'"),
        ((*METRIC, "index_to_metric_path"), "b", "2 folders"),
        ((*METRIC, "clustering_type"), "x", "clustering_type"),
    ],
)  # fmt: skip
def test_bad_keys_and_values_are_named(config, path, value, named):
    changed = copy.deepcopy(config)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(InvalidValue, match=named):
        DataEfficiency.from_config(changed)


def test_files_that_are_no_yaml_are_refused_with_the_line(tmp_path):
    for text in ("a: [", "enabled: &x true\nseed: *x", "a: !!python/object:os.system 1"):
        (tmp_path / "bad.yml").write_text(text)
        with pytest.raises(CorruptFile, match=r"bad\.yml:\d"):
            DataEfficiency.from_config(tmp_path / "bad.yml")


def test_files_that_are_no_json_are_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CorruptFile, match="not valid JSON"):
        DataEfficiency.from_config(tmp_path / "bad.json")
