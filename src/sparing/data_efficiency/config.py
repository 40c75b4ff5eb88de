"""DeepSpeed's ``data_efficiency`` configuration, read into samplers, token dropping and learning rates.

The keys are the reference's. Where they name its files, an index is a folder here: ``index_to_sample_path`` and
``index_to_metric_path`` both name that folder, one of them is enough, and ``data_cluster_path`` is not used, because
clusters are never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sparing.core import files
from sparing.core.errors import InvalidValue, did_you_mean, shown
from sparing.core.recipe import read_yaml
from sparing.data_efficiency.index import DifficultyIndex
from sparing.data_efficiency.pacing import PacingFunction, RootPacing, pacing_from_config
from sparing.data_efficiency.sampler import Clustering, CurriculumMetric, CurriculumSampler, DifficultyType
from sparing.data_efficiency.settings import known_keys, required, whole_number

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from sparing.data_efficiency.token_dropping import TokenDropping
    from sparing.data_efficiency.tokens import TokenLR

METRIC = (
    "index_to_sample_path",
    "index_to_metric_path",
    "difficulty_type",
    "clustering_type",
    "min_difficulty",
    "max_difficulty",
    "schedule_type",
    "schedule_config",
)
DROPPING = (
    "enabled",
    "total_layer_num",
    "random_ltd_layer_num",
    "random_ltd_layer_id",
    "model_mask_name",
    "model_type",
    "hidden_state_order",
    "random_ltd_schedule",
    "layer_token_lr_schedule",
    "global_batch_size",
    "micro_batch_size",
)
RATE = ("enabled", "total_layer_tokens", "warmup_type", "warmup_layer_tokens")


@dataclass(frozen=True)
class DataEfficiency:
    """A checked configuration. Parts that are not enabled are None."""

    seed: int
    """Of the sampler and of token dropping."""
    epochs: int
    """Times the data are gone through: N · epochs samples are drawn."""
    curriculum: Mapping[str, tuple[PacingFunction, Path | None, DifficultyType]] | None
    """For each metric its pacing, the folder of its index (None: it releases no samples), and what difficulties are."""
    dropping: Mapping[str, Any] | None
    """Settings of :func:`~sparing.data_efficiency.token_dropping.drop_tokens`, and ``total_layer_num``."""
    layer_token_lr: Mapping[str, float] | None
    """``decay_tokens`` and ``warmup_tokens`` of :class:`~sparing.data_efficiency.tokens.TokenLR`, in layer tokens."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Path | str, *, clamp_min: bool = True) -> DataEfficiency:
        """Read a configuration.

        Args:
            config: the mapping under ``data_efficiency``, or one that holds it under this key, or a file of either:
                YAML if its name ends in .yaml or .yml, else JSON.
            clamp_min: see :class:`~sparing.data_efficiency.pacing.RootPacing`.

        Raises:
            InvalidValue: a missing or unknown key, a value out of bounds.
            CorruptFile: a file that is no JSON, or no YAML.
        """
        given: Any = config
        if isinstance(config, Path | str):
            file = Path(config)
            given = read_yaml(file) if file.suffix.lower() in (".yaml", ".yml") else files.read_json(file)
        given = given.get("data_efficiency", given) if isinstance(given, Mapping) else given
        known_keys(given, ("enabled", "seed", "data_sampling", "data_routing"), "data_efficiency")
        on = _enabled(given, "data_efficiency")
        sampling, routing = given.get("data_sampling", {}), given.get("data_routing", {})
        known_keys(sampling, ("enabled", "num_epochs", "num_workers", "curriculum_learning"), "data_sampling")
        known_keys(routing, ("enabled", "random_ltd"), "data_routing")
        learning, ltd = sampling.get("curriculum_learning", {}), routing.get("random_ltd", {})
        known_keys(learning, ("enabled", "data_cluster_path", "curriculum_metrics"), "curriculum_learning")
        known_keys(ltd, DROPPING, "random_ltd")
        curriculum = dropping = rate = None
        if on and _enabled(sampling, "data_sampling") and _enabled(learning, "curriculum_learning"):
            metrics = required(learning, "curriculum_metrics", "curriculum_learning")
            if not isinstance(metrics, Mapping) or not metrics:
                raise InvalidValue(f"curriculum_metrics = {shown(metrics)}; a mapping of at least one metric is needed")
            curriculum = {name: _metric(name, metric, clamp_min) for name, metric in metrics.items()}
        if on and _enabled(routing, "data_routing") and _enabled(ltd, "random_ltd"):
            dropping, rate = _dropping(ltd, clamp_min), _rate(ltd.get("layer_token_lr_schedule", {}))
        seed = whole_number("seed", given.get("seed", 1234), 0)
        epochs = whole_number("num_epochs", sampling.get("num_epochs", 1000), 1)
        return cls(seed, epochs, curriculum, dropping, rate)

    def sampler(
        self, batch_size: int, *, samples: int | None = None, accumulation: int = 1, **options: Any
    ) -> CurriculumSampler:
        """The :class:`CurriculumSampler` over all epochs, its indexes opened and compared with ``samples``.

        Args:
            batch_size: samples of one process's micro batch.
            samples: N of the dataset.
            accumulation: micro batches of a step.
            options: further arguments of the sampler.
        """
        if self.curriculum is None:
            raise InvalidValue("curriculum_learning is not enabled in this configuration")
        metrics = {
            name: CurriculumMetric(pacing, None if path is None else DifficultyIndex.open(path, samples=samples), kind)
            for name, (pacing, path, kind) in self.curriculum.items()
        }
        arguments = {"samples": samples, "accumulation": accumulation, **options}
        one = CurriculumSampler(metrics, batch_size, 1, self.seed, **arguments)
        steps = one.samples * self.epochs // one.global_batch
        if steps < 1:
            raise InvalidValue(
                f"{one.samples} samples · {self.epochs} epochs do not fill one batch of {one.global_batch}"
            )
        return CurriculumSampler(metrics, batch_size, steps, self.seed, **arguments)

    def drop_tokens(self, model: nn.Module, **options: Any) -> TokenDropping:
        """Token dropping in a model; ``options`` are further arguments of ``drop_tokens``."""
        from sparing.data_efficiency.token_dropping import drop_tokens

        if self.dropping is None:
            raise InvalidValue("random_ltd is not enabled in this configuration")
        settings = {name: value for name, value in self.dropping.items() if name != "total_layer_num"}
        made = drop_tokens(model, **settings, **{"seed": self.seed, **options})
        if made.layers != self.dropping["total_layer_num"]:
            made.remove()
            raise InvalidValue(
                f"total_layer_num = {self.dropping['total_layer_num']}; the model has {made.layers} blocks"
            )
        return made

    def layer_token_schedule(self, optimizer: Optimizer, max_lr: float, **options: Any) -> TokenLR:
        """LayerToken LR: to be stepped with a counter's ``layer_tokens``; ``options`` are TokenLR's."""
        from sparing.data_efficiency.tokens import TokenLR

        if self.layer_token_lr is None:
            raise InvalidValue("layer_token_lr_schedule is not enabled in this configuration")
        return TokenLR(optimizer, max_lr, **{**self.layer_token_lr, **options})


def _enabled(config: Mapping[str, Any], where: str) -> bool:
    value = config.get("enabled", False)
    if not isinstance(value, bool):
        raise InvalidValue(f"enabled of {where} is {shown(value)}; true or false is needed")
    return value


def _choice(config: Mapping[str, Any], name: str, choices: tuple[str, ...], where: str) -> Any:
    value = required(config, name, where)
    if value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise InvalidValue(f"{name} of {where} is {shown(value)}; one of {', '.join(choices)} is needed.{hint}")
    return value


def _metric(name: str, config: Any, clamp_min: bool) -> tuple[PacingFunction, Path | None, DifficultyType]:
    known_keys(config, METRIC, f"the metric {name!r}")
    kind = _choice(config, "difficulty_type", get_args(DifficultyType), f"the metric {name!r}")
    clustering = _choice(config, "clustering_type", get_args(Clustering), f"the metric {name!r}")
    pacing = pacing_from_config(config, clamp_min=clamp_min)
    if clustering == "single_cluster":
        return pacing, None, kind
    paths = {config[key] for key in ("index_to_sample_path", "index_to_metric_path") if key in config}
    if len(paths) != 1:
        raise InvalidValue(
            f"the metric {name!r} names {len(paths)} folders; index_to_sample_path, or both keys, must name "
            "the folder of its index"
        )
    return pacing, Path(paths.pop()), kind


def _dropping(config: Mapping[str, Any], clamp_min: bool) -> dict[str, Any]:
    layers = list(required(config, "random_ltd_layer_id", "random_ltd"))
    total = whole_number("total_layer_num", required(config, "total_layer_num", "random_ltd"), 1)
    if len(layers) != config.get("random_ltd_layer_num", len(layers)):
        raise InvalidValue(
            f"random_ltd_layer_num = {config['random_ltd_layer_num']}, random_ltd_layer_id has {len(layers)} layers"
        )
    schedule = required(config, "random_ltd_schedule", "random_ltd")
    known_keys(schedule, ("min_value", "max_value", "schedule_type", "schedule_config"), "random_ltd_schedule")
    _choice(schedule, "schedule_type", ("fixed_linear",), "random_ltd_schedule")
    how = required(schedule, "schedule_config", "random_ltd_schedule")
    known_keys(how, ("require_steps", "seq_per_step"), "schedule_config of random_ltd_schedule")
    low, high = (required(schedule, name, "random_ltd_schedule") for name in ("min_value", "max_value"))
    steps, multiple = (required(how, name, "schedule_config") for name in ("require_steps", "seq_per_step"))
    made = {
        "total_layer_num": total,
        "layers": layers,
        "schedule": RootPacing(low, high, steps, multiple, clamp_min=clamp_min),
        "kind": _choice(config, "model_type", ("decoder", "encoder"), "random_ltd"),
        "layout": _choice(config, "hidden_state_order", ("batch_seq_dim", "seq_batch_dim"), "random_ltd"),
    }
    mask = config.get("model_mask_name")
    return made if mask is None else made | {"mask_args": (mask,)}


def _rate(config: Mapping[str, Any]) -> dict[str, float] | None:
    known_keys(config, RATE, "layer_token_lr_schedule")
    if not _enabled(config, "layer_token_lr_schedule"):
        return None
    if config.get("warmup_type", "linear") != "linear":
        raise InvalidValue(f"warmup_type = {shown(config['warmup_type'])}; only 'linear' is known")
    return {
        "decay_tokens": required(config, "total_layer_tokens", "layer_token_lr_schedule"),
        "warmup_tokens": config.get("warmup_layer_tokens", 0),
    }
