"""Predictors that are a torch module: built by a named builder, filled from safetensors."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from sparing.core import files as storage
from sparing.core import registry
from sparing.core.collation import batches_of
from sparing.core.errors import CorruptFile, InvalidValue, SparingError, UnknownName, UntrustedCode, did_you_mean
from sparing.core.predictor.base import Context, Description, Operations, Predictor
from sparing.core.predictor.tree import map_leaves, to_numpy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sparing.core.predictor.folder import Manifest
    from sparing.core.task import Task

WEIGHTS = "model.safetensors"
MEASURING_BATCH = 64
MACS_RULE = (
    "products of matrix multiplications, convolutions and attention for one sample (torch.utils.flop_counter / 2); "
    "normalisation, activations, pooling and bias not counted"
)


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model again: a registered model's name or ``"package.module:Class"``, and its arguments."""

    builder: str
    config: Mapping[str, Any] = field(default_factory=dict)


def build_model(
    builder: str | ModelSpec | Callable[..., nn.Module], task: Task | None = None, /, **fields: Any
) -> nn.Module:
    """Build a model and attach the :class:`ModelSpec` that builds it again (see :func:`spec_of`).

    ``builder`` is a registered model's name, a class or function of your own (importable by its module's name), its
    ``"package.module:Class"``, or a spec. The task's ``model_fields`` that the builder's signature names are passed to
    it; ``fields`` and a spec's own config go before them. All arguments must be JSON-able.
    """
    from torch import nn

    if isinstance(builder, ModelSpec):
        fields = {**builder.config, **fields}
        builder = builder.builder
    if isinstance(builder, str):
        name, make = builder, _import(builder) if ":" in builder else registry.resolve("models", builder)
    else:
        make = builder
        name = registry.name_of("models", make) or f"{make.__module__}:{make.__qualname__}"
    offered = {} if task is None else {k: v for k, v in task.model_fields().items() if k in _parameters(make)}
    config = _plain(name, {**offered, **fields})
    _fits(name, make, config)
    try:
        model = make(**config)
    except SparingError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        raise InvalidValue(f"the model {name!r} cannot be built with {config}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InvalidValue(f"the builder {name!r} made a {type(model).__name__}; a torch.nn.Module is needed")
    model._sparing_spec = ModelSpec(name, config)  # type: ignore[assignment]  # a plain attribute: deepcopy keeps it
    return model


def named_model(given: str | Mapping[str, Any], field: str, also: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """(name, fields) of a model as a step's field names one: a registered name, or {name: …, field: value}.

    Raises :class:`InvalidValue`, which says ``field``, for another form, or for a name that is neither registered, nor
    ``"package.module:Class"``, nor one of ``also``.
    """
    fields = dict(given) if isinstance(given, Mapping) else {}
    name = fields.pop("name", None) if isinstance(given, Mapping) else given
    if not isinstance(name, str):
        missing = ": the key 'name' is needed" if isinstance(given, Mapping) else ""
        raise InvalidValue(
            f"{field} = {given!r}; a registered model's name or {{name: …, field: value}} is expected{missing}"
        )
    if ":" not in name and name not in also and name not in registry.parts("models"):
        try:
            registry.resolve("models", name)
        except UnknownName as error:
            raise UnknownName(f"{field} = {given!r}: {error}") from None
    return name, fields


def spec_of(model: nn.Module) -> ModelSpec | None:
    """The spec that :func:`build_model` attached, or None for a model built by hand."""
    spec = model.__dict__.get("_sparing_spec")
    return spec if isinstance(spec, ModelSpec) else None


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidValue(f"the model builder {target!r} cannot be imported: {error}") from error
    return found


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


def _plain(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(storage.canonical_json(dict(config)))
    except (TypeError, ValueError) as error:
        raise InvalidValue(
            f"the arguments of the model {name!r} must be plain JSON, so that it can be built again: {error}"
        ) from error


def _fits(name: str, make: Callable[..., Any], config: Mapping[str, Any]) -> None:
    parameters = _parameters(make)
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in config:
            if key not in named:
                raise InvalidValue(
                    f"the model {name!r} has no field {key!r}.{did_you_mean(key, named)} "
                    f"Fields: {', '.join(named) or 'none'}"
                )
    missing = [key for key in named if parameters[key].default is inspect.Parameter.empty and key not in config]
    if missing:
        raise InvalidValue(f"the model {name!r} needs a value for {', '.join(missing)}")


class ModulePredictor(Predictor):
    """A torch module in evaluation mode, on arrays.

    ``model`` is copied, so that what happens to it later does not change this predictor. ``example`` is a tuple of
    model inputs for counting multiply-accumulates; default: the task's.
    """

    kind: ClassVar[str] = "module"

    def __init__(
        self,
        model: nn.Module,
        task: Context | Task | Predictor | None = None,
        *,
        example: tuple[Any, ...] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(task, threads=threads)
        try:
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
        except (RuntimeError, TypeError) as error:
            raise InvalidValue(f"the model {type(model).__name__} cannot be copied: {error}") from error
        self.example = example_of(task, 1) if example is None else example
        self._description: Description | None = None

    @property
    def runtime(self) -> str:
        """Eager torch."""
        return "torch"

    def __call__(self, *inputs: Any) -> Any:
        """Arrays or tensors in any tree → arrays in the tree the module returns."""
        import torch

        device = _device(self.model)
        with torch.inference_mode(), _torch_threads(self.threads):
            return map_leaves(to_numpy, self.model(*_tensors_of(inputs, device)))

    def describe(self) -> Description:
        """Counts over the module; multiply-accumulates by :data:`MACS_RULE` when an example input is known."""
        if self._description is None:
            total, layers = (None, {}) if self.example is None else count_macs(self.model, self.example)
            parameters = list(self.model.parameters())
            self._description = Description(
                kind=self.kind,
                runtime=self.runtime,
                precision=_precision(self.model),
                parameters=sum(p.numel() for p in parameters),
                nonzero=sum(int(p.count_nonzero()) for p in parameters),
                macs=total,
                macs_rule="" if total is None else MACS_RULE,
                model_bytes=len(_serialised(baked(self.model))[0]),
                layers=tuple(_layers(self.model, layers)),
            )
        return self._description

    def operations_on(self, task: Task, split: Any) -> Operations | None:
        """Measured by the module's own ``operations_of(batches)``, where it has one, as spiking networks do."""
        measure = getattr(self.model, "operations_of", None)
        return None if measure is None else measure(batches_of(split, MEASURING_BATCH, task.collate))

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Builder, config and weights; refuses, with the reason, a module that would not come back the same."""
        spec = spec_of(self.model)
        name = type(self.model).__name__
        if spec is None:
            raise InvalidValue(
                f"the model {name} was built by hand, so a saved folder could not build it again: make it with "
                "sparing's build_model(YourClass, **fields), or export it to ONNX"
            )
        module, _, attribute = spec.builder.partition(":")
        if module == "__main__" or "<" in attribute:
            raise InvalidValue(
                f"the model class {spec.builder} cannot be imported from another program: move it into a module of its "
                "own, or export the model to ONNX"
            )
        weights, ties = _serialised(baked(self.model))
        config = {"builder": spec.builder, "config": dict(spec.config), "ties": ties}
        self._check_round_trip(_filled(spec, _tensors(weights, ties)))
        return {WEIGHTS: weights}, config

    def _check_round_trip(self, again: nn.Module) -> None:
        """Raise unless the rebuilt module has the same layers, the same state bit for bit, and the same outputs."""
        import torch

        here = baked(self.model)
        for (name, one), (other_name, other) in zip(here.named_modules(), again.named_modules(), strict=False):
            if (name, type(one), one.extra_repr()) != (other_name, type(other), other.extra_repr()):
                raise InvalidValue(
                    f"the model was changed after it was built: {name or 'the model'} is {one}, "
                    f"its builder makes {other}"
                )
        state, rebuilt = here.state_dict(), again.state_dict()
        for name in state:
            if state[name].dtype != rebuilt[name].dtype or not _same_bits(state[name], rebuilt[name]):
                raise InvalidValue(f"the tensor {name!r} would not come back as it is")
        if self.example is None:
            return
        expected, twin = self(*self.example), ModulePredictor(again, self.context)(*self.example)
        from sparing.core.predictor.tree import leaves

        for (path, one), (_, other) in zip(leaves(expected), leaves(twin), strict=True):
            if isinstance(one, np.ndarray) and not torch.allclose(
                torch.from_numpy(one), torch.from_numpy(other), rtol=1e-5, atol=1e-6, equal_nan=True
            ):
                raise InvalidValue(
                    f"the rebuilt model answers differently{f' at output {path}' if path else ''}: it depends on "
                    "something besides its builder's fields and its state, or it is random in evaluation mode"
                )

    @classmethod
    def load_files(cls, files: Mapping[str, bytes], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        """Build the named model and fill it; a class from outside Sparing needs its package in ``trust``."""
        config = manifest.config
        if set(files) != {WEIGHTS} or not (
            isinstance(config.get("builder"), str)
            and isinstance(config.get("config"), dict)
            and isinstance(config.get("ties"), dict)
        ):
            raise CorruptFile(f"a module predictor needs {WEIGHTS} and the settings builder, config and ties")
        spec = ModelSpec(config["builder"], config["config"])
        _check_trust(spec.builder, trust)
        try:
            model = _filled(spec, _tensors(files[WEIGHTS], config["ties"]))
        except InvalidValue as error:
            raise CorruptFile(f"the model {spec.builder!r} cannot be restored: {error}") from error
        predictor = cls(model, manifest.context())
        predictor._description = manifest.description
        return predictor


def example_of(task: Context | Task | Predictor | None, batch: int) -> tuple[Any, ...] | None:
    """The task's example input, when a task is what was given."""
    return None if task is None or isinstance(task, Context | Predictor) else task.example_input(batch)


def _check_trust(builder: str, trust: Collection[str]) -> None:
    if ":" not in builder:
        return
    module = builder.partition(":")[0]
    if not any(module == name or module.startswith(f"{name}.") for name in trust):
        raise UntrustedCode(
            f"this model is built by {builder}, code that is not Sparing's: if you trust the package "
            f"{module.split('.')[0]!r}, load it with trust=({module.split('.')[0]!r},)"
        )


def baked(model: nn.Module) -> nn.Module:
    """A copy whose parametrised tensors (weight norm, masks, low-rank factors …) are plain parameters or buffers.

    Not by torch's ``remove_parametrizations``: copies share the class it takes the properties from, so that it would
    break the original.
    """
    from torch import nn
    from torch.nn.utils import parametrize

    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if not parametrize.is_parametrized(module):
            continue
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
        trained = {name: any(True for _ in module.parametrizations[name].parameters()) for name in values}  # type: ignore[index,union-attr]
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            if trained[name]:
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(name, value)
    return plain


def _serialised(model: nn.Module) -> tuple[bytes, dict[str, str]]:
    """(safetensors, {tied name: the name it is stored under}) of a model's state."""
    from safetensors.torch import save
    from torch import Tensor

    kept: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise InvalidValue(f"the state {name!r} is a {type(tensor).__name__}; only tensors can be saved")
        if tensor.layout.__str__() != "torch.strided":
            raise InvalidValue(f"the tensor {name!r} has the layout {tensor.layout}; only dense tensors can be saved")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            ties[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor.detach().cpu().contiguous().clone()
    return save(kept), ties


def _tensors(weights: bytes, ties: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(weights)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise CorruptFile(f"{WEIGHTS} is not a valid safetensors file: {error}") from error
    for name, source in ties.items():
        if not isinstance(source, str) or source not in tensors or name in tensors:
            raise CorruptFile(f"the tensor {name!r} is tied to {source!r}, which {WEIGHTS} does not hold")
        tensors[name] = tensors[source]
    return tensors


def outline(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes, without weights and memory for them where that is possible, to see whether it can be made.

    The caller's random state stays as it is.
    """
    import torch

    from sparing.core.randomness import isolated_rng

    with isolated_rng(0):
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError, SparingError) as error:
            if "meta" not in str(error):
                raise
            return build()  # it looks at values while it is built


def _filled(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build ``spec`` without touching the caller's random state and fill it with ``tensors``; shapes must agree.

    The shapes are compared on the meta device first, so that a forged size cannot allocate memory.
    """
    import torch

    try:
        with torch.device("meta"):
            outline = build_model(spec)
        if not any(_is_parametrized(module) for module in outline.modules()):
            _agree(outline.state_dict(), tensors)
    except (NotImplementedError, InvalidValue) as error:
        # a builder that computes with tensor values cannot run on meta; every other refusal stands
        if "meta" not in str(error):
            raise
    with torch.random.fork_rng(devices=[]):
        model = baked(build_model(spec))
    own = model.state_dict(keep_vars=True)
    _agree(own, tensors)
    with torch.no_grad():
        for name, target in own.items():
            target.data = tensors[name].clone()  # in place, dtype included: ties of the built model stay ties
    return model


def _is_parametrized(module: nn.Module) -> bool:
    from torch.nn.utils import parametrize

    return parametrize.is_parametrized(module)


def _agree(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    if missing := [name for name in own if name not in tensors]:
        raise InvalidValue(f"the state holds no tensor {missing[0]!r} ({len(missing)} missing)")
    if extra := [name for name in tensors if name not in own]:
        raise InvalidValue(f"the model has no tensor {extra[0]!r} ({len(extra)} too many)")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise InvalidValue(
                f"the tensor {name!r} is {tuple(tensors[name].shape)} in the state, {tuple(tensor.shape)} in the model"
            )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    import torch

    if one.shape != other.shape:
        return False
    as_bytes = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*as_bytes)


def _precision(model: nn.Module) -> str:
    names = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}
    found = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    return " + ".join(names.get(name, name) for name in found) or "n.a."


def _layers(model: nn.Module, macs: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            yield {
                "name": name or type(model).__name__,
                "type": type(module).__name__,
                "parameters": sum(p.numel() for p in own),
                "nonzero": sum(int(p.count_nonzero()) for p in own),
                "macs": macs.get(name),
            }


def count_macs(model: nn.Module, example: tuple[Any, ...]) -> tuple[int, dict[str, int]]:
    """(multiply-accumulates of one sample, the same by module name), by :data:`MACS_RULE`.

    The count is divided by the number of samples, :func:`samples_of` the inputs.
    """
    counts, batch = count_operations(model, example)
    macs = {name: sum(operations.values()) // 2 // batch for name, operations in counts.items()}
    return macs.pop(""), macs


def count_operations(
    model: nn.Module, example: tuple[Any, ...], formulas: Mapping[Any, Callable[..., int]] | None = None
) -> tuple[dict[str, dict[Any, int]], int]:
    """({module name, "" for the whole model: {operator: operations}}, samples answered).

    A product and the addition of it are two operations. ``formulas`` adds operators to those that torch's counter
    knows: operator → function of its arguments (shapes for tensors) and ``out_shape``, as the counter wants them. The
    fused attention and recurrent kernels, which it does not know, are switched off while it runs.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fast_path = torch.backends.mha.get_fastpath_enabled()
    onednn = torch.backends.mkldnn.set_flags(_enabled=False)
    counter = FlopCounterMode(display=False, custom_mapping=dict(formulas or {}))
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            answers = copy.deepcopy(model).eval()(*_tensors_of(example, _device(model)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.mkldnn.set_flags(_enabled=onednn[0])
    prefix = f"{type(model).__name__}."
    counts = counter.get_flop_counts()
    by_module = {name.removeprefix(prefix): dict(ops) for name, ops in counts.items() if name.startswith(prefix)}
    return {"": dict(counts.get("Global", {})), **by_module}, samples_of(answers, example)


def samples_of(answers: Any, inputs: Any) -> int:
    """How many samples a model answered: the first dimension that its inputs share, else that of its first output.

    The inputs of a model on graphs have different ones; its samples are the nodes, or the graphs, it answers for.
    """
    from sparing.core.predictor.tree import leaves

    given, made = (
        [leaf.shape[0] for _, leaf in leaves(tree) if getattr(leaf, "ndim", 0)] for tree in (inputs, answers)
    )
    return next(iter(given if len(set(given)) == 1 else [*made, *given]), 1)


def _device(model: nn.Module) -> torch.device:
    import torch

    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _tensors_of(inputs: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Arrays and tensors in any tree → tensors on ``device``; other leaves as they are."""
    import torch

    def place(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(np.require(leaf, requirements=["C", "W"]))
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    return tuple(map_leaves(place, item) for item in inputs)


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
