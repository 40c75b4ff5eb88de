"""Optimizers and learning-rate schedules of torch by name, with errors that say which arguments they know."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from sparing.core.errors import InvalidValue, did_you_mean

CONVENIENT = {"cosine": "CosineAnnealingLR", "one_cycle": "OneCycleLR"}
"""Short names; any class of ``torch.optim.lr_scheduler`` goes by its own name, in any case."""
COMPOSITE = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
"""Schedules made of Python functions or other schedules: only through ``TrainingPlan.scheduler``."""
HORIZON = ("T_max", "total_steps", "total_iters")
"""Arguments that mean the length of the schedule; the whole training when not given."""


def _classes(module: Any, base: type) -> dict[str, type]:
    found = {name: thing for name, thing in vars(module).items() if isinstance(thing, type) and issubclass(thing, base)}
    return {name: thing for name, thing in found.items() if thing is not base and not name.startswith("_")}


def _find(kind: str, name: str, known: Mapping[str, Any], more: Iterable[str] = ()) -> Any:
    by_lower = {key.lower(): thing for key, thing in known.items()}
    if name.lower() not in by_lower:
        names = {alias.lower(): alias for alias in [*more, *sorted(known)]}
        close = [names[word] for word in get_close_matches(name.lower(), names, n=1)]
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InvalidValue(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names.values())}")
    return by_lower[name.lower()]


def _check_arguments(thing: type, args: Mapping[str, Any], reserved: Iterable[str]) -> dict[str, inspect.Parameter]:
    parameters = dict(list(inspect.signature(thing).parameters.items())[1:])  # the first: parameters, or the optimizer
    for name in reserved:
        parameters.pop(name, None)
    for name in args:
        if name not in parameters:
            raise InvalidValue(
                f"{thing.__name__} has no argument {name!r}.{did_you_mean(name, parameters)} "
                f"Arguments: {', '.join(parameters)}"
            )
    return parameters


def _call(thing: type, first: Any, args: Mapping[str, Any]) -> Any:
    try:
        return thing(first, **args)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in args.items())
        raise InvalidValue(f"{thing.__name__}({given}): {error}") from error


def optimizer_class(name: str, args: Mapping[str, Any] | None = None) -> type:
    """The class of ``torch.optim`` called ``name`` (in any case); ``args`` are checked against its signature."""
    import torch

    found: type = _find("optimizer", name, _classes(torch.optim, torch.optim.Optimizer))
    _check_arguments(found, args or {}, ("lr", "weight_decay"))
    return found


def decay_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a module in which only matrices (and larger tensors) have weight decay.

    Parameters of at most one dimension (gains and biases of norms, scales) and those called ``bias`` have none; frozen
    ones are left out. Each group keeps the order of ``named_parameters``.
    """
    matrices: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] == "bias"
            (others if free else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: str, parameters: Iterable[Any], lr: float, weight_decay: float = 0.0, args: Mapping[str, Any] | None = None
) -> Any:
    """An optimizer of ``torch.optim``. A weight decay is refused where the optimizer has none."""
    found = optimizer_class(name, args)
    known = inspect.signature(found).parameters
    every = {"lr": lr, **(args or {})}
    if "weight_decay" in known:
        every["weight_decay"] = weight_decay
    elif weight_decay:
        raise InvalidValue(f"{found.__name__} has no weight decay; set weight_decay = 0 (it is {weight_decay})")
    return _call(found, parameters, every)


def scheduler_class(name: str, args: Mapping[str, Any] | None = None) -> type:
    """The class of ``torch.optim.lr_scheduler`` called ``name`` (in any case, or a name of :data:`CONVENIENT`)."""
    from torch.optim import lr_scheduler

    known = _classes(lr_scheduler, lr_scheduler.LRScheduler)
    found: type = _find("scheduler", CONVENIENT.get(name.lower(), name), known, CONVENIENT)
    if found.__name__ in COMPOSITE:
        raise InvalidValue(f"{found.__name__} is made of Python objects, which a name cannot give")
    _check_arguments(found, args or {}, ("last_epoch", "verbose"))
    return found


def make_scheduler(
    name: str,
    optimizer: Any,
    total_steps: int,
    args: Mapping[str, Any] | None = None,
    warmup_steps: int = 0,
    better: str = "lower",
) -> Any:
    """A schedule of ``torch.optim.lr_scheduler`` that is stepped after every optimizer step.

    All its lengths are therefore counted in optimizer steps; a length that is not given (:data:`HORIZON`) is
    ``total_steps`` without the warm-up. ``OneCycleLR`` takes the optimizer's learning rate as ``max_lr``. An empty
    ``name`` keeps the rate constant. ``warmup_steps`` of linear growth from near zero come before it.
    ``ReduceLROnPlateau`` is stepped after each validation instead, with ``mode`` set from ``better``.
    """
    from torch.optim import lr_scheduler

    if warmup_steps >= total_steps and warmup_steps:
        raise InvalidValue(f"warmup_steps = {warmup_steps}; the whole training has {total_steps} optimizer steps")
    main = None
    if name:
        found = scheduler_class(name, args)
        parameters = _check_arguments(found, args or {}, ())
        every = dict(args or {})
        if found is lr_scheduler.ReduceLROnPlateau:
            every.setdefault("mode", "max" if better == "higher" else "min")
            if warmup_steps:
                raise InvalidValue("ReduceLROnPlateau cannot follow a warm-up; set warmup_steps = 0")
        if found is lr_scheduler.OneCycleLR:
            every.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
            if "epochs" in every or "steps_per_epoch" in every:
                raise InvalidValue("OneCycleLR: give total_steps (or nothing), not epochs and steps_per_epoch")
        for argument in HORIZON:
            if argument in parameters:
                every.setdefault(argument, total_steps - warmup_steps)
        main = _call(found, optimizer, every)
    if not warmup_steps:
        return main
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    if main is None:
        return warmup
    if isinstance(main, lr_scheduler.OneCycleLR):
        raise InvalidValue("OneCycleLR has a warm-up of its own (pct_start); set warmup_steps = 0")
    return lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])
