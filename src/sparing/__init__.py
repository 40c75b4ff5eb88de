"""Deep learning that costs less, and a ledger that shows what was saved and what was lost.

Everything public is reached from here and imported on first use, so that ``import sparing`` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.adaptive.block_distillation import distill_blocks
    from sparing.adaptive.block_profile import profile_accuracy, profile_blocks, profile_latency
    from sparing.adaptive.block_scaling import BlockScaling
    from sparing.adaptive.blocks import detect_blocks, extract_blocks
    from sparing.adaptive.calibration import calibrate
    from sparing.adaptive.confidence import ConfidenceRule
    from sparing.adaptive.descendants import BlockZoo
    from sparing.adaptive.dvfs import DVFSGovernor, EnergyModel
    from sparing.adaptive.exit_cost import CostModel
    from sparing.adaptive.exit_predictor import EarlyExitPredictor
    from sparing.adaptive.exit_training import train_exits
    from sparing.adaptive.exits import BoFExit, MultiExitModel, attach_exits
    from sparing.adaptive.forecast import ExitPredictor
    from sparing.adaptive.lego import LegoModel
    from sparing.adaptive.lego_predictor import LegoPredictor
    from sparing.adaptive.lego_runtime import Budget, LegoRuntime
    from sparing.adaptive.policies import EveryExitPolicy, OraclePolicy, PlacedExitPolicy, PredictiveExitPolicy
    from sparing.adaptive.predictive_exit import PredictiveExit
    from sparing.adaptive.scaling import InfeasibleError, Profile, ScalingOptimizer, Selection
    from sparing.audits.backdoor.attack import CondensationBackdoor
    from sparing.audits.backdoor.audit import BackdoorAudit
    from sparing.audits.backdoor.pixels import PixelSpace
    from sparing.audits.backdoor.step import AuditBackdoor
    from sparing.audits.backdoor.triggers import OptimisedTrigger, PatchTrigger
    from sparing.compression.compiling import Compile, compile_model
    from sparing.compression.pruning import BlockMagnitudePruner, BlockPrune, CubicSchedule, LockPattern, lock_pattern
    from sparing.compression.pruning_lightning import BlockPruning
    from sparing.compression.ptq import quantize_ptq
    from sparing.compression.quantization import Quantize
    from sparing.compression.shrinking import Shrink, shrink
    from sparing.compression.zero_rows import DropZeroRows
    from sparing.condensation.coresets import CoresetSelector
    from sparing.condensation.graphs import GraphSetCondenser
    from sparing.condensation.images import ImageCondenser
    from sparing.condensation.nodes import NodeCondenser
    from sparing.condensation.saved import load_condensed, save_condensed
    from sparing.condensation.step import Condense
    from sparing.condensation.unrolled import UnrolledCondenser
    from sparing.core.cost import cost_report
    from sparing.core.errors import (
        CorruptFile,
        DataError,
        IncompatibleStep,
        InvalidValue,
        MissingDependency,
        NoEffect,
        NotExportable,
        RecipeError,
        SparingError,
        StoreError,
        TrainingDiverged,
        UnknownName,
        UntrustedCode,
    )
    from sparing.core.export import Export
    from sparing.core.fairness import delta_eo, delta_sp
    from sparing.core.job import Job
    from sparing.core.ledger import Ledger
    from sparing.core.pipeline import plan, run
    from sparing.core.predictor import build_model, load
    from sparing.core.step import Step, step
    from sparing.core.task import Task
    from sparing.core.training import Train
    from sparing.core.transfer import Transfer
    from sparing.data.augmentation import Augment
    from sparing.data.ctr import Categorical, CTREncoder, CTRSchema, Numeric
    from sparing.data.events.framing import events_to_frames
    from sparing.data.events.simulator import EventSimulator
    from sparing.data.events.stream import EventRecordings, EventStream
    from sparing.data.feature_map import FeatureMap
    from sparing.data.partition import dirichlet_partition, iid_partition, label_shard_partition
    from sparing.data.wordpiece import WordPiece, train_wordpiece
    from sparing.data_efficiency.analysis import DataAnalyzer
    from sparing.data_efficiency.callbacks import CurriculumCallback, TokenCount, TokenDroppingCallback, TokenLRCallback
    from sparing.data_efficiency.config import DataEfficiency
    from sparing.data_efficiency.curriculum import Curriculum
    from sparing.data_efficiency.index import DifficultyIndex
    from sparing.data_efficiency.metrics import Composed, DifficultyMetric, SequenceLength, VocabularyRarity
    from sparing.data_efficiency.pacing import PacingFunction
    from sparing.data_efficiency.postprocessing import reshape_batch, truncate_batch
    from sparing.data_efficiency.sampler import CurriculumCollate, CurriculumItems, CurriculumMetric, CurriculumSampler
    from sparing.data_efficiency.token_dropping import DropTokens, drop_tokens
    from sparing.data_efficiency.tokens import TokenCounter, TokenLR, TokenLr
    from sparing.distillation.fair_step import DistilFair
    from sparing.distillation.fairness import equal_opportunity_loss, soft_step, statistical_parity_loss
    from sparing.distillation.finetuning import FineTune, layer_decay_groups
    from sparing.distillation.frameworks import CPF, GLNN, GraphAKD, SoftKD, TeacherOutputs
    from sparing.distillation.logits import Distil, DistillationLoss, Teacher
    from sparing.distillation.pretraining import Pretrain
    from sparing.distillation.relations import DistilRelations, RelationStudent, cls_kl, feature_smooth_l1, relation_kl
    from sparing.distillation.reliant import BiasProxy, FairDistiller
    from sparing.engine.compiler import compile_encoder
    from sparing.engine.runtime import Engine
    from sparing.engine.tuner import tune_production
    from sparing.federated.metrics import ContinualMetrics
    from sparing.federated.step import Federate
    from sparing.models.bert import from_transformers
    from sparing.models.ctr import without_zero_rows
    from sparing.models.mae import MAE, ViTConfig, load_vit, mae_loss, save_vit, sincos_2d
    from sparing.models.spiking.attention import MultiDimAttention
    from sparing.models.spiking.gesture import GestureSNN
    from sparing.models.spiking.neurons import LIF
    from sparing.models.spiking.report import SpikeReport, spike_report
    from sparing.models.spiking.residual import MSResSNN
    from sparing.models.spiking.streaming import SpikingStream, StreamingPredictor, StreamSpikes
    from sparing.models.xdeepint import MultiHeadInteraction, PolynomialInteraction, XDeepInt
    from sparing.optimization.averaging import Ema
    from sparing.optimization.averaging_lightning import WeightAverage
    from sparing.optimization.flatness import hessian_trace, perturbation_flatness, sharpness
    from sparing.optimization.ftrl import FTRL, CombinedOptimizer, GroupFTRL, GroupFtrl, combined_optimizer
    from sparing.optimization.label_smoothing import SmoothLabels
    from sparing.optimization.leap import LEAP, Leap, apply_leap, leap_factor
    from sparing.optimization.leap_lightning import LEAPCallback
    from sparing.optimization.min_norm import predict_limit
    from sparing.optimization.min_norm_regressor import MinNormRegressor
    from sparing.optimization.rpgd import RPGD, Rpgd
    from sparing.optimization.schedules import WarmupCosine
    from sparing.optimization.weight_norm import WeightNormalization, bake, unit_direction, weight_normalize
    from sparing.optimization.weight_norm_lightning import Reparametrization
    from sparing.tasks.continual import Continual
    from sparing.tasks.ctr import ClickThrough
    from sparing.tasks.ctr.estimator import CTRClassifier
    from sparing.tasks.custom import CustomTask
    from sparing.tasks.events.base import EventClassification
    from sparing.tasks.events.estimator import SNNClassifier
    from sparing.tasks.graphs import GraphClassification, GroupedNodeClassification, NodeClassification
    from sparing.tasks.images import ImageClassification
    from sparing.tasks.text import TextClassification
    from sparing.tasks.text.language_modelling import score_texts
    from sparing.tasks.text.spans import postprocess_spans, squad_metrics

__version__ = "0.1.0"

_HOMES = {
    "sparing.adaptive.block_distillation": ("distill_blocks",),
    "sparing.adaptive.block_profile": ("profile_accuracy", "profile_blocks", "profile_latency"),
    "sparing.adaptive.block_scaling": ("BlockScaling",),
    "sparing.adaptive.blocks": ("detect_blocks", "extract_blocks"),
    "sparing.adaptive.calibration": ("calibrate",),
    "sparing.adaptive.confidence": ("ConfidenceRule",),
    "sparing.adaptive.descendants": ("BlockZoo",),
    "sparing.adaptive.dvfs": ("DVFSGovernor", "EnergyModel"),
    "sparing.adaptive.exit_cost": ("CostModel",),
    "sparing.adaptive.exit_predictor": ("EarlyExitPredictor",),
    "sparing.adaptive.exit_training": ("train_exits",),
    "sparing.adaptive.exits": ("BoFExit", "MultiExitModel", "attach_exits"),
    "sparing.adaptive.forecast": ("ExitPredictor",),
    "sparing.adaptive.lego": ("LegoModel",),
    "sparing.adaptive.lego_predictor": ("LegoPredictor",),
    "sparing.adaptive.lego_runtime": ("Budget", "LegoRuntime"),
    "sparing.adaptive.policies": ("EveryExitPolicy", "OraclePolicy", "PlacedExitPolicy", "PredictiveExitPolicy"),
    "sparing.adaptive.predictive_exit": ("PredictiveExit",),
    "sparing.adaptive.scaling": ("InfeasibleError", "Profile", "ScalingOptimizer", "Selection"),
    "sparing.audits.backdoor.attack": ("CondensationBackdoor",),
    "sparing.audits.backdoor.audit": ("BackdoorAudit",),
    "sparing.audits.backdoor.pixels": ("PixelSpace",),
    "sparing.audits.backdoor.step": ("AuditBackdoor",),
    "sparing.audits.backdoor.triggers": ("OptimisedTrigger", "PatchTrigger"),
    "sparing.compression.compiling": ("Compile", "compile_model"),
    "sparing.compression.pruning": (
        "BlockMagnitudePruner",
        "BlockPrune",
        "CubicSchedule",
        "LockPattern",
        "lock_pattern",
    ),
    "sparing.compression.pruning_lightning": ("BlockPruning",),
    "sparing.compression.ptq": ("quantize_ptq",),
    "sparing.compression.quantization": ("Quantize",),
    "sparing.compression.shrinking": ("Shrink", "shrink"),
    "sparing.compression.zero_rows": ("DropZeroRows",),
    "sparing.condensation.coresets": ("CoresetSelector",),
    "sparing.condensation.graphs": ("GraphSetCondenser",),
    "sparing.condensation.images": ("ImageCondenser",),
    "sparing.condensation.nodes": ("NodeCondenser",),
    "sparing.condensation.saved": ("load_condensed", "save_condensed"),
    "sparing.condensation.step": ("Condense",),
    "sparing.condensation.unrolled": ("UnrolledCondenser",),
    "sparing.core.cost": ("cost_report",),
    "sparing.core.errors": (
        "CorruptFile",
        "DataError",
        "IncompatibleStep",
        "InvalidValue",
        "MissingDependency",
        "NoEffect",
        "NotExportable",
        "RecipeError",
        "SparingError",
        "StoreError",
        "TrainingDiverged",
        "UnknownName",
        "UntrustedCode",
    ),
    "sparing.core.export": ("Export",),
    "sparing.core.fairness": ("delta_eo", "delta_sp"),
    "sparing.core.job": ("Job",),
    "sparing.core.ledger": ("Ledger",),
    "sparing.core.pipeline": ("plan", "run"),
    "sparing.core.predictor": ("build_model", "load"),
    "sparing.core.step": ("Step", "step"),
    "sparing.core.task": ("Task",),
    "sparing.core.training": ("Train",),
    "sparing.core.transfer": ("Transfer",),
    "sparing.data.augmentation": ("Augment",),
    "sparing.data.ctr": ("CTREncoder", "CTRSchema", "Categorical", "Numeric"),
    "sparing.data.events.framing": ("events_to_frames",),
    "sparing.data.events.simulator": ("EventSimulator",),
    "sparing.data.events.stream": ("EventRecordings", "EventStream"),
    "sparing.data.feature_map": ("FeatureMap",),
    "sparing.data.partition": ("dirichlet_partition", "iid_partition", "label_shard_partition"),
    "sparing.data.wordpiece": ("WordPiece", "train_wordpiece"),
    "sparing.data_efficiency.analysis": ("DataAnalyzer",),
    "sparing.data_efficiency.callbacks": (
        "CurriculumCallback",
        "TokenCount",
        "TokenDroppingCallback",
        "TokenLRCallback",
    ),
    "sparing.data_efficiency.config": ("DataEfficiency",),
    "sparing.data_efficiency.curriculum": ("Curriculum",),
    "sparing.data_efficiency.index": ("DifficultyIndex",),
    "sparing.data_efficiency.metrics": ("Composed", "DifficultyMetric", "SequenceLength", "VocabularyRarity"),
    "sparing.data_efficiency.pacing": ("PacingFunction",),
    "sparing.data_efficiency.postprocessing": ("reshape_batch", "truncate_batch"),
    "sparing.data_efficiency.sampler": (
        "CurriculumCollate",
        "CurriculumItems",
        "CurriculumMetric",
        "CurriculumSampler",
    ),
    "sparing.data_efficiency.token_dropping": ("DropTokens", "drop_tokens"),
    "sparing.data_efficiency.tokens": ("TokenCounter", "TokenLR", "TokenLr"),
    "sparing.distillation.fair_step": ("DistilFair",),
    "sparing.distillation.fairness": ("equal_opportunity_loss", "soft_step", "statistical_parity_loss"),
    "sparing.distillation.finetuning": ("FineTune", "layer_decay_groups"),
    "sparing.distillation.frameworks": ("CPF", "GLNN", "GraphAKD", "SoftKD", "TeacherOutputs"),
    "sparing.distillation.logits": ("Distil", "DistillationLoss", "Teacher"),
    "sparing.distillation.pretraining": ("Pretrain",),
    "sparing.distillation.relations": (
        "DistilRelations",
        "RelationStudent",
        "cls_kl",
        "feature_smooth_l1",
        "relation_kl",
    ),
    "sparing.distillation.reliant": ("BiasProxy", "FairDistiller"),
    "sparing.engine.compiler": ("compile_encoder",),
    "sparing.engine.runtime": ("Engine",),
    "sparing.engine.tuner": ("tune_production",),
    "sparing.federated.metrics": ("ContinualMetrics",),
    "sparing.federated.step": ("Federate",),
    "sparing.models.bert": ("from_transformers",),
    "sparing.models.ctr": ("without_zero_rows",),
    "sparing.models.mae": ("MAE", "ViTConfig", "load_vit", "mae_loss", "save_vit", "sincos_2d"),
    "sparing.models.spiking.attention": ("MultiDimAttention",),
    "sparing.models.spiking.gesture": ("GestureSNN",),
    "sparing.models.spiking.neurons": ("LIF",),
    "sparing.models.spiking.report": ("SpikeReport", "spike_report"),
    "sparing.models.spiking.residual": ("MSResSNN",),
    "sparing.models.spiking.streaming": ("SpikingStream", "StreamSpikes", "StreamingPredictor"),
    "sparing.models.xdeepint": ("MultiHeadInteraction", "PolynomialInteraction", "XDeepInt"),
    "sparing.optimization.averaging": ("Ema",),
    "sparing.optimization.averaging_lightning": ("WeightAverage",),
    "sparing.optimization.flatness": ("hessian_trace", "perturbation_flatness", "sharpness"),
    "sparing.optimization.ftrl": ("FTRL", "CombinedOptimizer", "GroupFTRL", "GroupFtrl", "combined_optimizer"),
    "sparing.optimization.label_smoothing": ("SmoothLabels",),
    "sparing.optimization.leap": ("LEAP", "Leap", "apply_leap", "leap_factor"),
    "sparing.optimization.leap_lightning": ("LEAPCallback",),
    "sparing.optimization.min_norm": ("predict_limit",),
    "sparing.optimization.min_norm_regressor": ("MinNormRegressor",),
    "sparing.optimization.rpgd": ("RPGD", "Rpgd"),
    "sparing.optimization.schedules": ("WarmupCosine",),
    "sparing.optimization.weight_norm": ("WeightNormalization", "bake", "unit_direction", "weight_normalize"),
    "sparing.optimization.weight_norm_lightning": ("Reparametrization",),
    "sparing.tasks.continual": ("Continual",),
    "sparing.tasks.ctr": ("ClickThrough",),
    "sparing.tasks.ctr.estimator": ("CTRClassifier",),
    "sparing.tasks.custom": ("CustomTask",),
    "sparing.tasks.events.base": ("EventClassification",),
    "sparing.tasks.events.estimator": ("SNNClassifier",),
    "sparing.tasks.graphs": ("GraphClassification", "GroupedNodeClassification", "NodeClassification"),
    "sparing.tasks.images": ("ImageClassification",),
    "sparing.tasks.text": ("TextClassification",),
    "sparing.tasks.text.language_modelling": ("score_texts",),
    "sparing.tasks.text.spans": ("postprocess_spans", "squad_metrics"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CPF",
    "FTRL",
    "GLNN",
    "LEAP",
    "LIF",
    "MAE",
    "RPGD",
    "AuditBackdoor",
    "Augment",
    "BackdoorAudit",
    "BiasProxy",
    "BlockMagnitudePruner",
    "BlockPrune",
    "BlockPruning",
    "BlockScaling",
    "BlockZoo",
    "BoFExit",
    "Budget",
    "CTRClassifier",
    "CTREncoder",
    "CTRSchema",
    "Categorical",
    "ClickThrough",
    "CombinedOptimizer",
    "Compile",
    "Composed",
    "CondensationBackdoor",
    "Condense",
    "ConfidenceRule",
    "Continual",
    "ContinualMetrics",
    "CoresetSelector",
    "CorruptFile",
    "CostModel",
    "CubicSchedule",
    "Curriculum",
    "CurriculumCallback",
    "CurriculumCollate",
    "CurriculumItems",
    "CurriculumMetric",
    "CurriculumSampler",
    "CustomTask",
    "DVFSGovernor",
    "DataAnalyzer",
    "DataEfficiency",
    "DataError",
    "DifficultyIndex",
    "DifficultyMetric",
    "Distil",
    "DistilFair",
    "DistilRelations",
    "DistillationLoss",
    "DropTokens",
    "DropZeroRows",
    "EarlyExitPredictor",
    "Ema",
    "EnergyModel",
    "Engine",
    "EventClassification",
    "EventRecordings",
    "EventSimulator",
    "EventStream",
    "EveryExitPolicy",
    "ExitPredictor",
    "Export",
    "FairDistiller",
    "FeatureMap",
    "Federate",
    "FineTune",
    "GestureSNN",
    "GraphAKD",
    "GraphClassification",
    "GraphSetCondenser",
    "GroupFTRL",
    "GroupFtrl",
    "GroupedNodeClassification",
    "ImageClassification",
    "ImageCondenser",
    "IncompatibleStep",
    "InfeasibleError",
    "InvalidValue",
    "Job",
    "LEAPCallback",
    "Leap",
    "Ledger",
    "LegoModel",
    "LegoPredictor",
    "LegoRuntime",
    "LockPattern",
    "MSResSNN",
    "MinNormRegressor",
    "MissingDependency",
    "MultiDimAttention",
    "MultiExitModel",
    "MultiHeadInteraction",
    "NoEffect",
    "NodeClassification",
    "NodeCondenser",
    "NotExportable",
    "Numeric",
    "OptimisedTrigger",
    "OraclePolicy",
    "PacingFunction",
    "PatchTrigger",
    "PixelSpace",
    "PlacedExitPolicy",
    "PolynomialInteraction",
    "PredictiveExit",
    "PredictiveExitPolicy",
    "Pretrain",
    "Profile",
    "Quantize",
    "RecipeError",
    "RelationStudent",
    "Reparametrization",
    "Rpgd",
    "SNNClassifier",
    "ScalingOptimizer",
    "Selection",
    "SequenceLength",
    "Shrink",
    "SmoothLabels",
    "SoftKD",
    "SparingError",
    "SpikeReport",
    "SpikingStream",
    "Step",
    "StoreError",
    "StreamSpikes",
    "StreamingPredictor",
    "Task",
    "Teacher",
    "TeacherOutputs",
    "TextClassification",
    "TokenCount",
    "TokenCounter",
    "TokenDroppingCallback",
    "TokenLR",
    "TokenLRCallback",
    "TokenLr",
    "Train",
    "TrainingDiverged",
    "Transfer",
    "UnknownName",
    "UnrolledCondenser",
    "UntrustedCode",
    "ViTConfig",
    "VocabularyRarity",
    "WarmupCosine",
    "WeightAverage",
    "WeightNormalization",
    "WordPiece",
    "XDeepInt",
    "__version__",
    "apply_leap",
    "attach_exits",
    "bake",
    "build_model",
    "calibrate",
    "cls_kl",
    "combined_optimizer",
    "compile_encoder",
    "compile_model",
    "cost_report",
    "delta_eo",
    "delta_sp",
    "detect_blocks",
    "dirichlet_partition",
    "distill_blocks",
    "drop_tokens",
    "equal_opportunity_loss",
    "events_to_frames",
    "extract_blocks",
    "feature_smooth_l1",
    "from_transformers",
    "hessian_trace",
    "iid_partition",
    "label_shard_partition",
    "layer_decay_groups",
    "leap_factor",
    "load",
    "load_condensed",
    "load_vit",
    "lock_pattern",
    "mae_loss",
    "perturbation_flatness",
    "plan",
    "postprocess_spans",
    "predict_limit",
    "profile_accuracy",
    "profile_blocks",
    "profile_latency",
    "quantize_ptq",
    "relation_kl",
    "reshape_batch",
    "run",
    "save_condensed",
    "save_vit",
    "score_texts",
    "sharpness",
    "shrink",
    "sincos_2d",
    "soft_step",
    "spike_report",
    "squad_metrics",
    "statistical_parity_loss",
    "step",
    "train_exits",
    "train_wordpiece",
    "truncate_batch",
    "tune_production",
    "unit_direction",
    "weight_normalize",
    "without_zero_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparing' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
