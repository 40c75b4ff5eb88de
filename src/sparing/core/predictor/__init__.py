"""The saved, deployable thing: predictors, their preprocessing, and the folder they live in.

Importing this imports neither torch nor onnxruntime; a predictor imports what runs it when it is made.
"""

from sparing.core.predictor.base import Context, Description, Operations, Predictor
from sparing.core.predictor.folder import Manifest, load, nest, unnest
from sparing.core.predictor.module import ModelSpec, ModulePredictor, build_model, named_model, outline, spec_of
from sparing.core.predictor.onnx import OnnxPredictor, to_onnx
from sparing.core.predictor.preprocessing import Operation, Preprocessing

__all__ = [
    "Context",
    "Description",
    "Manifest",
    "ModelSpec",
    "ModulePredictor",
    "OnnxPredictor",
    "Operation",
    "Operations",
    "Predictor",
    "Preprocessing",
    "build_model",
    "load",
    "named_model",
    "nest",
    "outline",
    "spec_of",
    "to_onnx",
    "unnest",
]
