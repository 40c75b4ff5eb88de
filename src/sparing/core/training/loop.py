"""The loop itself: Lightning's, made exactly resumable. Imported only when something is trained.

Lightning's own resumption in the middle of an epoch repeats no random numbers and starts again at the first batch. Here
batches and random numbers are pure functions of (seed, epoch, batch), so the state worth keeping is what Lightning's
checkpoint holds anyway — weights, optimizer, schedule, callbacks, loop counters — taken at two moments between batches:
after a batch (when the gradient is not half accumulated) and after an epoch with its validation. No state is kept once
the training is about to end, so that a resumed run always lives through the end and its hooks.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from sparing.core import errors
from sparing.core.bar import Bar
from sparing.core.collation import batches_of
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, SparingError, TrainingDiverged
from sparing.core.predictor import ModulePredictor, Predictor
from sparing.core.predictor.tree import map_leaves, to_numpy
from sparing.core.training.batches import Batches, SeededItems, reseed
from sparing.core.training.fit import FitResult, Keeper
from sparing.core.training.optimization import decay_groups, make_optimizer, make_scheduler

if TYPE_CHECKING:
    from sparing.core.job import TrainingPlan
    from sparing.core.task import Task
    from sparing.core.training.step import Train

RESUME = "sparing:progress"
"""The checkpoint "path" that stands for the keeper instead of a file."""
POINTS = 100
"""Points of the training loss curve, about."""
SAVING_SHARE = 0.05
"""Saving may take this share of the time."""
SMALL_BUFFER = 1 << 16
"""Buffers of so many elements at most are running statistics that a skipped batch must not touch; others are tables."""
SILENCED = (
    r".*does not have many workers.*",  # the caller chose the number of workers
    r".*Consider setting `persistent_workers=True`.*",
    r".*your dataloader is not resumable.*",  # ours is, by its batch sampler
    r".*is smaller than the logging interval.*",  # curves are logged by their own rule
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*available but not used.*",  # a device the caller did not ask for
    r".*lr_scheduler\.step\(\)` before `optimizer\.step\(\)`.*",  # wrong after a restart, where torch forgets the count
    r".*isinstance\(treespec, LeafSpec\).*",  # between Lightning and torch
)
"""Warnings of Lightning and torch that say nothing about a training run from here; all others are let through."""


# --- what is trained -------------------------------------------------------------------------------------------------


class Live(ModulePredictor):
    """A predictor around the model as it is right now: not copied, no gradients. Only for validation."""

    def __init__(self, model: nn.Module, task: Task, place: Any) -> None:
        Predictor.__init__(self, task)
        self.model = model
        self.example = None
        self._description = None
        self._place = place

    def __call__(self, *inputs: Any) -> Any:
        """Arrays or tensors in any tree → arrays in the tree the module returns."""

        def tensor(leaf: Any) -> Any:
            return torch.from_numpy(np.require(leaf, requirements=["C", "W"])) if isinstance(leaf, np.ndarray) else leaf

        return map_leaves(to_numpy, self.model(*self._place([map_leaves(tensor, item) for item in inputs])))


class RunningStatistics:
    """Remembers a model's small buffers, so that what a skipped batch did to them can be undone.

    A forward pass with NaN spoils the running statistics of batch norm for good, although the weights stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places = [(module._buffers, name) for module in model.modules() for name in module._buffers]
        self.kept: list[tuple[Any, str, Tensor]] = []
        self.copies: list[Tensor] = []

    def keep(self) -> None:
        """Remember the buffers as they are. A few microseconds: what was remembered is overwritten in place."""
        here = ((owner, name, owner.get(name)) for owner, name in self.places)
        now = [(owner, name, tensor) for owner, name, tensor in here if tensor is not None and _is_small(tensor)]
        if len(now) != len(self.kept) or any(a[2] is not b[2] for a, b in zip(now, self.kept, strict=True)):
            self.kept, self.copies = now, [tensor.detach().clone() for _, _, tensor in now]
        elif now:
            torch._foreach_copy_(self.copies, [tensor for _, _, tensor in now])

    def undo(self) -> None:
        """Put them back."""
        for owner, name, tensor in self.kept:
            owner[name] = tensor
        if self.kept:
            torch._foreach_copy_([tensor for _, _, tensor in self.kept], self.copies)


def _is_small(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.numel() <= SMALL_BUFFER


class Training(pl.LightningModule):
    """A model, its task and its plan, as Lightning wants them. Everything that must survive a kill is in its state."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        train: Any,
        val: Any,
        settings: Train,
        plan: TrainingPlan,
        seed: int,
        batches: Batches,
        total_steps: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.task, self.train_data, self.val_data = task, train, val
        self.settings, self.plan, self.seed = settings, plan, seed
        self.batches, self.total_steps = batches, total_steps
        self.transforms = [make() for make in plan.batch_transforms]
        self.terms = [make() for make in plan.loss_terms]
        self.statistics = RunningStatistics(model)
        self.beside: dict[str, nn.Module] = {}
        """Models with other weights (an average, say) that a callback puts here in ``on_fit_start``, by name.
        Validations score them, too: the curves ``val_<name>_<metric>``. The callback keeps their state."""
        self.candidates: tuple[str, ...] = ("",)
        """Whose weights may be handed on: names in ``beside``, and "" for the trained ones. Early stopping, the best
        epoch and the end go by the best of them, the earlier of equals."""
        self.plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self.every = max(1, len(batches) * settings.epochs // POINTS)
        if settings.max_steps is not None:
            self.every = max(1, settings.max_steps * settings.accumulate // POINTS)
        self.figures: dict[str, Any] = {
            "samples": 0,
            "batches": 0,
            "steps": 0,
            "epochs": 0,
            "skipped": 0,
            "streak": 0,
            "waited": 0,
            "best_epoch": None,
            "best_value": None,
            "candidate": None,
            "candidates": [""],
            "stopped_early": False,
            "window": [0.0, 0],
            "gaps": {},
            "remarks": [],
            "recorded": {},
            "curves": {"train_loss": [], "lr": []},
        }
        self.best_weights: dict[str, Tensor] = {}
        self.value = math.nan
        self.finite = True
        self._shares: tuple[int, list[tuple[int, int]]] = (-1, [])

    def get_extra_state(self) -> dict[str, Any]:
        """Figures, best weights and plateau schedule: they travel with the weights, also home from other processes."""
        plateau = {} if self.plateau is None else self.plateau.state_dict()
        return {"figures": self.figures, "best_weights": self.best_weights, "plateau": plateau}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.figures, self.best_weights = state["figures"], dict(state["best_weights"])
        self._plateau_state = state["plateau"]

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's part of the batches."""
        self.batches.shard(self.trainer.global_rank, self.trainer.world_size)
        items: Any = SeededItems(self.train_data, self.seed)
        return DataLoader(
            items,
            batch_sampler=self.batches,
            num_workers=self.settings.workers,
            persistent_workers=self.settings.workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=self.batches.collation(self.task.collate),
            generator=torch.Generator().manual_seed(self.seed),  # else the loader draws from the global generator
        )

    def configure_optimizers(self) -> Any:
        """Optimizer → wraps → schedule on the outermost."""
        settings, plan = self.settings, self.plan
        if plan.optimizer is not None:
            optimizer = plan.optimizer(self.model)
        else:
            parameters: Any = [p for p in self.model.parameters() if p.requires_grad]
            if settings.decay == "matrices":
                parameters = decay_groups(self.model, settings.weight_decay)
            optimizer = make_optimizer(
                settings.optimizer, parameters, settings.lr, settings.weight_decay, settings.optimizer_args
            )
        for wrap in plan.wrap_optimizer:
            optimizer = wrap(optimizer)
        if plan.scheduler is not None:
            scheduler = plan.scheduler(optimizer, self.total_steps)
        else:
            scheduler = make_scheduler(
                settings.scheduler,
                optimizer,
                self.total_steps,
                settings.scheduler_args,
                settings.warmup_steps,
                "lower" if settings.monitor == "loss" else self.task.headline.better,
            )
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if self.val_data is None:
                raise InvalidValue("ReduceLROnPlateau goes by a validation figure, but there are no validation data")
            self.plateau = scheduler
            if state := getattr(self, "_plateau_state", None):
                scheduler.load_state_dict(state)
            return optimizer
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """After every optimizer step."""
        scheduler.step()

    # --- one batch

    def share(self, epoch: int, number: int) -> tuple[int, int, float]:
        """(samples of the batch, samples of this process, factor on the loss) of one batch.

        Lightning divides the loss by the number of accumulated batches and averages gradients over processes. The
        factor turns that into the mean, or the sum, over all samples of the optimizer step.
        """
        if self._shares[0] != epoch:
            self._shares = (epoch, self.batches.shares(epoch))
        shares = self._shares[1]
        total, own = shares[number]
        world, accumulate = self.batches.world, self.settings.accumulate
        if world == 1 and accumulate == 1:
            return total, own, 1.0
        if self.task.loss_reduction == "sum":
            return total, own, float(world * accumulate if own else 0)
        first = number - number % accumulate
        group = sum(size for size, _ in shares[first : first + accumulate])
        return total, own, world * accumulate * own / group

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Transforms → outputs → the task's loss → loss terms."""
        for transform in self.transforms:
            batch = transform(batch)
        self.statistics.keep()
        try:
            outputs = self.task.outputs(self.model, batch)
            loss = self.task.loss(outputs, batch)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            if isinstance(error, SparingError | torch.OutOfMemoryError):
                raise
            where = f"batch {batch_idx} of epoch {self.current_epoch}"
            raise DataError(explain(self.model, self.task, batch, where, error)) from error
        for term in self.terms:
            loss = term(loss, outputs, batch, self.model)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            raise InvalidValue(
                f"the loss of {type(self.task).__name__} {found}; a scalar, reduced by "
                f"{self.task.loss_reduction!r} over the batch, is needed"
            )
        self.value = loss.item()
        self.finite = math.isfinite(self.value)
        if self.batches.world > 1:
            self.finite = self._all(self.finite)
        if not self.finite:
            self.statistics.undo()
        factor = self.share(self.current_epoch, batch_idx)[2]
        return loss if factor == 1.0 else loss * factor

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagate, unless the loss is not finite: then there is no gradient (a scaler sees to it itself)."""
        if self.finite or getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            loss.backward(*args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step; what back-propagation or the optimizer refuse (sparse gradients, say) names them."""
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            name = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise InvalidValue(f"batch {batch_idx} of epoch {epoch}: {name} cannot make a step: {error}") from error

    def _all(self, flag: bool) -> bool:
        vote = torch.tensor([float(flag)], device=self.device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN)
        return bool(vote.item())

    def account(self, number: int) -> None:
        """Book one batch: samples, losses, curve; raise when the loss stays not finite."""
        figures, epoch = self.figures, self.current_epoch
        total, own, _ = self.share(epoch, number)
        figures["samples"] += total
        figures["batches"] += 1
        figures["steps"] = self.trainer.global_step
        if self.finite:
            figures["streak"] = 0
            if own:
                window = figures["window"]
                window[0] += self.value if self.task.loss_reduction == "sum" else self.value * own
                window[1] += own
        else:
            figures["skipped"] += 1
            figures["streak"] += 1
            if figures["streak"] >= self.settings.nan_patience:
                first = figures["batches"] - figures["streak"]
                raise TrainingDiverged(
                    f"the loss was not finite ({self.value}) for {figures['streak']} batches in a row: batches {first} "
                    f"… {figures['batches'] - 1} of the training, the last being batch {number} of epoch {epoch} (step "
                    f"{figures['steps']}). A lower rate "
                    f"(lr = {self.settings.lr}) or gradient_clip may help, or the data hold NaN"
                )
        if figures["batches"] % self.every == 0 or figures["steps"] >= self.total_steps:
            self._point()

    def tell(self, remark: str) -> None:
        """Add a remark to the training's row; for callbacks."""
        self.figures["remarks"].append(remark)

    def record(self, name: str, value: float, unit: str, better: str = "lower", how: str = "measured") -> None:
        """Add a figure to the training's row, as ``job.record`` does, or put it in the place of an earlier one."""
        self.figures["recorded"][name] = [float(value), unit, how, better]

    def _point(self) -> None:
        figures = self.figures
        summed, count = figures["window"]
        if self.batches.world > 1:
            both = torch.tensor([summed, count], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(both)
            summed, count = both.tolist()
        if not count:
            return
        rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.curve({"train_loss": summed / count, "lr": rate})
        figures["window"] = [0.0, 0]

    def curve(self, values: Mapping[str, float]) -> None:
        """Add a point to each of these curves, at the steps made so far; for callbacks as well."""
        step = self.figures["steps"]
        for name, value in values.items():
            if math.isfinite(value):
                self.figures["curves"].setdefault(name, []).append([step, value])
            else:
                self.figures["gaps"][name] = self.figures["gaps"].get(name, 0) + 1
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=step)

    # --- validation

    def validate(self) -> None:
        """Score the validation data; keep the best weights, step a plateau schedule, decide on stopping."""
        settings, figures, trainer = self.settings, self.figures, self.trainer
        figures["epochs"] = self.current_epoch + 1
        last = trainer.should_stop or self.current_epoch + 1 == trainer.max_epochs
        if self.val_data is None or not (last or (self.current_epoch + 1) % settings.validate_every == 0):
            return
        values: dict[str, float] = {}
        alone = isinstance(trainer.strategy, DDPStrategy)
        if trainer.is_global_zero or not alone:
            values = self._scores()
        if self.batches.world > 1:
            values = trainer.strategy.broadcast(values)
        self.curve(values)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        headline = self.task.headline
        lower = settings.monitor == "loss" or headline.better == "lower"
        monitored = "loss" if settings.monitor == "loss" else headline.name
        scores = {name: values[curve_name(monitored, name)] for name in self.candidates}
        finite = {name: score for name, score in scores.items() if math.isfinite(score)} or scores
        chosen = (min if lower else max)(finite, key=lambda name: finite[name])
        value = scores[chosen]
        if self.plateau is not None:
            self.plateau.step(value)
        best = figures["best_value"]
        if math.isfinite(value) and (best is None or (value < best if lower else value > best)):
            figures.update(best_value=value, best_epoch=figures["epochs"], waited=0, candidate=chosen)
            if settings.restore_best:
                self.best_weights = {
                    name: tensor.detach().cpu().clone() if isinstance(tensor, Tensor) else tensor
                    for name, tensor in self._model_of(chosen).state_dict().items()
                }
        else:
            figures["waited"] += 1
            if settings.early_stopping is not None and figures["waited"] >= settings.early_stopping and not last:
                figures["stopped_early"] = True
                trainer.should_stop = True
        if not settings.restore_best:
            figures["candidate"] = chosen

    def on_fit_start(self) -> None:
        """A choice between candidates needs validation data; called after the callbacks' own."""
        if len(self.candidates) > 1 and self.val_data is None:
            names = " and ".join(name or "trained" for name in self.candidates)
            raise InvalidValue(f"the choice between the {names} weights needs validation data, but there are none")
        self.figures["candidates"] = list(self.candidates)

    def on_train_end(self) -> None:
        """Put the chosen candidate's weights in place; with ``restore_best`` the best ones follow when all is done."""
        chosen = self.figures["candidate"]
        if chosen is None:
            chosen = self.candidates[0]
        if chosen and not self.settings.restore_best:
            self.model.load_state_dict(self.beside[chosen].state_dict())

    def _model_of(self, candidate: str) -> nn.Module:
        return self.beside[candidate] if candidate else self.model

    def _scores(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name in ("", *self.beside):
            scores = self._scores_of(self._model_of(name))
            values |= {curve_name(metric, name): value for metric, value in scores.items()}
        return values

    def _scores_of(self, model: nn.Module) -> dict[str, float]:
        training = {module: module.training for module in model.modules()}
        model.eval()
        plugin, strategy = self.trainer.precision_plugin, self.trainer.strategy

        def place(batch: Any) -> Any:
            return strategy.batch_to_device(plugin.convert_input(batch))

        try:
            with torch.no_grad(), plugin.val_step_context():
                scores = self.task.evaluate(Live(model, self.task, place), self.val_data)
                values = {name: float(value) for name, value in scores.metrics.items()}
                if self.settings.monitor == "loss":
                    values["loss"] = self._loss_on_validation(model, place)
        finally:
            for module, flag in training.items():
                module.training = flag
        return values

    def _loss_on_validation(self, model: nn.Module, place: Any) -> float:
        """Loss per sample."""
        size, count, summed = self.settings.batch_size, len(self.val_data), 0.0
        for number, batch in enumerate(batches_of(self.val_data, size, self.task.collate)):
            batch = place(batch)
            loss = float(self.task.loss(self.task.outputs(model, batch), batch))
            summed += loss if self.task.loss_reduction == "sum" else loss * min(size, count - number * size)
        return summed / count


def curve_name(metric: str, candidate: str = "") -> str:
    """What a validation figure of the trained weights, or of those beside them, is called."""
    return f"val_{candidate}_{metric}" if candidate else f"val_{metric}"


def explain(model: nn.Module, task: Task, batch: Any, where: str, error: Exception) -> str:
    """Which layer refused what, found by running the batch again with hooks."""
    inside: list[tuple[str, nn.Module, Any]] = []
    refused: list[tuple[str, nn.Module, Any]] = []
    hooks = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            inside.append((name, module, args))

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    outputs = None
    try:
        with torch.no_grad():
            outputs = task.outputs(model, batch)
    except Exception:
        refused = inside[-1:]
    finally:
        for hook in hooks:
            hook.remove()
    reason = f"{type(error).__name__}: {error}"
    if "more than 1 value per channel" in str(error):
        reason += ". Batch norm needs more than one sample: set drop_last = True or another batch_size"
    if refused:
        name, module, args = refused[0]
        layer = f"the layer {name!r}" if name else "the model"
        return f"{where} ({shapes(batch)}): {layer} ({module}) refused its input of shape {shapes(args)}: {reason}"
    if outputs is not None:
        return f"{where} ({shapes(batch)}): the loss refused outputs of shape {shapes(outputs)}: {reason}"
    return f"{where} ({shapes(batch)}): {reason}"


def shapes(tree: Any) -> str:
    """Shapes and types of a tree's tensors in one line."""
    if isinstance(tree, Tensor | np.ndarray):
        return f"{tuple(tree.shape)} {str(tree.dtype).removeprefix('torch.')}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {shapes(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        return shapes(tree[0]) if len(tree) == 1 else ", ".join(shapes(item) for item in tree[:8])
    return type(tree).__name__


# --- what happens around it ------------------------------------------------------------------------------------------


class Conductor(Callback):
    """Runs before all other callbacks: seeds each step, books each batch, validates each epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Seed what callbacks draw here."""
        reseed(pl_module.seed, "epoch", trainer.current_epoch, trainer.global_rank)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed this step."""
        reseed(pl_module.seed, "step", trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Book this batch; end a training that is counted in steps."""
        pl_module.account(batch_idx)
        if trainer.global_step >= pl_module.total_steps and pl_module.settings.max_steps is not None:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Validate."""
        reseed(pl_module.seed, "validation", trainer.current_epoch, trainer.global_rank)
        pl_module.validate()


class Saver(Checkpoint):
    """Runs after all other callbacks and keeps a state from which the training can go on."""

    def __init__(self, every_s: float, every_batches: int | None) -> None:
        self.every_s, self.every_batches = every_s, every_batches
        self.next = time.monotonic() + every_s
        self.position: tuple[int, int] = (0, 0)
        """(epoch, batches of it consumed)."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Between two optimizer steps, when it is time."""
        consumed, accumulate = batch_idx + 1, pl_module.settings.accumulate
        if trainer.should_stop or (consumed % accumulate and consumed < len(pl_module.batches)):
            return
        counted = self.every_batches is not None and consumed % self.every_batches == 0
        self._save_if(trainer, pl_module, counted, (trainer.current_epoch, consumed))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """After the validation, unless this was the last epoch."""
        epoch = trainer.current_epoch + 1
        if not trainer.should_stop and epoch != trainer.max_epochs:
            self._save_if(trainer, pl_module, self.every_batches is not None, (epoch, 0))

    def _save_if(self, trainer: pl.Trainer, module: Training, counted: bool, position: tuple[int, int]) -> None:
        due = counted if self.every_batches is not None else time.monotonic() >= self.next
        if trainer.world_size > 1 and self.every_batches is None:  # the processes' clocks differ: the first decides
            decision = torch.tensor([float(due)], device=module.device)
            torch.distributed.broadcast(decision, 0)
            due = bool(decision.item())
        if not due:
            return
        self.position = position
        start = time.monotonic()
        trainer.save_checkpoint(RESUME)
        end = time.monotonic()
        self.next = end + max(self.every_s, (end - start) / SAVING_SHARE)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Set the loop counters to where they stand between two batches: the hooks run before Lightning does that."""
        epoch, consumed = self.position
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        begun = epoch + 1 if consumed else epoch  # an epoch goes on only if it has begun
        for counts in (epochs["total"], epochs["current"]):
            counts.update(ready=begun, started=begun, processed=epoch, completed=epoch)
        done = batches["total"]["ready"]
        batches["total"].update(ready=done, started=done, processed=done, completed=done)
        batches["current"].update(ready=consumed, started=consumed, processed=consumed, completed=consumed)
        batches["is_last_batch"] = False
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step
        checkpoint["position"] = {"epoch": epoch, "consumed": consumed}


class KeeperIO(TorchCheckpointIO):
    """Lightning's checkpoints go to the keeper and come from it; other files are never unpickled."""

    def __init__(self, keeper: Keeper | None, state: dict[str, Any] | None) -> None:
        self.keeper, self.state = keeper, state

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Keep a training state, or write a file."""
        if path == RESUME:
            assert self.keeper is not None
            self.keeper.save(plain(checkpoint))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """The state that was kept, or a file with tensors and plain values."""
        if path == RESUME:
            return self.state
        return torch.load(path, map_location="cpu", weights_only=True)


def plain(value: Any, place: str = "") -> Any:
    """Mappings as dicts, NumPy numbers as Python's; anything that cannot be kept is refused with its place."""
    if isinstance(value, Mapping):
        return {key: plain(item, f"{place}.{key}" if place else str(key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return value
    raise InvalidValue(
        f"the training's state holds a {type(value).__name__} at {place}; a callback, optimizer or schedule may keep "
        "tensors, numbers, strings and nested dicts and lists of them"
    )


class ProgressBar(Callback):
    """A :class:`~sparing.core.bar.Bar` of the training."""

    def __init__(self) -> None:
        self.bar = Bar()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Draw."""
        if self.bar.due and trainer.is_global_zero:
            text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, loss {pl_module.value:.4g}"
            self.bar.draw(trainer.global_step, pl_module.total_steps, text)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Take it away."""
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Take it away."""
        self.bar.stop()


@contextmanager
def surroundings(deterministic: bool) -> Iterator[None]:
    """Deterministic kernels, quiet libraries and free use of the random generators inside; all put back after it."""
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills: Any = torch.utils.deterministic
    fill, benchmark = fills.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    workspace, interrupt = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), signal.getsignal(signal.SIGINT)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        for message in SILENCED:
            warnings.filterwarnings("ignore", message)
        try:
            for logger in loggers:
                logger.setLevel(max(logging.WARNING, logger.level))
            if deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
                fills.fill_uninitialized_memory = False  # costs time, changes no defined result
                torch.backends.cudnn.benchmark = False
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
            fills.fill_uninitialized_memory = fill
            torch.backends.cudnn.benchmark = benchmark
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if signal.getsignal(signal.SIGINT) is not interrupt and interrupt is not None:
                signal.signal(signal.SIGINT, interrupt)


# --- all of it -------------------------------------------------------------------------------------------------------


def run(
    model: nn.Module,
    task: Task,
    train: Any,
    val: Any,
    settings: Train,
    plan: TrainingPlan,
    seed: int,
    keeper: Keeper | None,
    callbacks: Sequence[Any],
    loggers: Sequence[Any],
) -> FitResult:
    """See :func:`sparing.core.training.fit`."""
    batches = make_batches(train, settings, plan, seed)
    if val is None and (settings.early_stopping is not None or settings.restore_best):
        raise InvalidValue("early_stopping and restore_best need validation data, but there are none")
    if plan.scheduler is not None and (settings.scheduler or settings.warmup_steps):
        raise IncompatibleStep(
            f"an earlier step has set the schedule of the learning rate, so scheduler = {settings.scheduler!r} and "
            f"warmup_steps = {settings.warmup_steps} would have no effect; leave them out"
        )
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters) and plan.optimizer is None and not plan.model_wraps:
        frozen = f"all its {len(parameters)} parameters are frozen" if parameters else "it has no parameters"
        raise IncompatibleStep(f"the model {type(model).__name__} has nothing to train: {frozen}")
    home = parameters[0].device if parameters else torch.device("cpu")
    modes = {module: module.training for module in model.modules()}
    total = batches.begin(settings.epochs, settings.max_steps, settings.accumulate)
    epochs = -(-total // -(-len(batches) // settings.accumulate))
    with surroundings(settings.deterministic):
        reseed(seed, "start")
        model.train()
        undo = []
        for wrap in plan.model_wraps:
            model, back = wrap(model)
            undo.append(back)
        state = None if keeper is None else keeper.load()
        module = Training(model, task, train, val, settings, plan, seed, batches, total)
        if state is not None:
            batches.seek(state["position"]["epoch"], state["position"]["consumed"])
        with tempfile.TemporaryDirectory(prefix="sparing-") as folder:
            trainer = make_trainer(module, plan, settings, epochs, KeeperIO(keeper, state), callbacks, loggers, folder)
            remarks = differences(model, trainer.world_size, settings.batch_size)
            with sparing_errors():
                trainer.fit(module, ckpt_path=None if state is None else RESUME)
        if settings.restore_best and module.best_weights:
            model.load_state_dict(module.best_weights)
        for back in reversed(undo):
            model = back()
        model.to(home)
        for layer, mode in modes.items():
            layer.training = mode
    figures = module.figures
    kept = {name: figures[name] for name in ("samples", "steps", "epochs", "best_epoch", "best_value", "stopped_early")}
    if figures["skipped"] and figures["skipped"] == figures["batches"]:
        raise TrainingDiverged(
            f"the loss was not finite in any of the {figures['batches']} batches, so nothing was learned: the data may "
            "hold NaN, or the loss may be undefined for this model's outputs"
        )
    if figures["skipped"]:
        remarks = [
            *remarks,
            f"{figures['skipped']} of {figures['batches']} batches were skipped: their loss was not finite",
        ]
    if len(figures["candidates"]) > 1:
        named = f"the weights {figures['candidate']!r}" if figures["candidate"] else "the trained weights"
        remarks = [*remarks, f"{named} were the best on the validation data and are handed on"]
    remarks = [*remarks, *figures["remarks"]]
    for name, count in figures["gaps"].items():
        remarks.append(f"{name} was not finite {count} times; its curve leaves these points out")
    return FitResult(
        model,
        {name: [(float(x), float(y)) for x, y in points] for name, points in figures["curves"].items()},
        skipped=figures["skipped"],
        restored=bool(settings.restore_best and module.best_weights),
        remarks=tuple(remarks),
        figures={name: tuple(given) for name, given in figures["recorded"].items()},
        **kept,
    )


def make_batches(train: Any, settings: Train, plan: TrainingPlan, seed: int) -> Batches:
    """The plan's sampler, or a shuffled one."""
    if plan.batch_sampler is None:
        return Batches(train, settings.batch_size, seed, drop_last=settings.drop_last)
    batches = plan.batch_sampler(train, settings.batch_size, seed)
    if not isinstance(batches, Batches):
        raise InvalidValue(f"the plan's batch_sampler made a {type(batches).__name__}; a Batches is needed")
    return batches


def make_trainer(
    module: Training,
    plan: TrainingPlan,
    settings: Train,
    epochs: int,
    io: KeeperIO,
    callbacks: Sequence[Any],
    loggers: Sequence[Any],
    folder: str,
) -> pl.Trainer:
    """The Lightning trainer of one training."""
    every: list[Any] = [Conductor(), *(make() for make in plan.callbacks), *callbacks]
    if sys.stderr.isatty():
        every.append(ProgressBar())
    every.append(Saver(settings.checkpoint_every_s, settings.checkpoint_every_batches) if io.keeper else Checkpoint())
    if settings.logger == "csv":
        from lightning.pytorch.loggers import CSVLogger

        loggers = [*loggers, CSVLogger(settings.log_folder, name=settings.id)]
    return _placed_trainer(
        settings,
        max_epochs=epochs,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip,
        callbacks=every,
        logger=loggers or False,
        plugins=[io],
        default_root_dir=folder,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def check_placement(settings: Train) -> None:
    """Raise :class:`InvalidValue` when Lightning cannot give the devices, strategy or precision asked for."""
    with surroundings(deterministic=False):
        _placed_trainer(settings, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def _placed_trainer(settings: Train, **more: Any) -> pl.Trainer:
    strategy = settings.strategy
    if strategy == "auto" and settings.num_nodes == 1 and settings.devices not in (1, "1", "auto", -1, "-1"):
        strategy = "ddp_fork"
    try:
        return pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy,
            precision=settings.precision,  # type: ignore[arg-type]
            **more,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise InvalidValue(
            f"Lightning refuses accelerator = {settings.accelerator!r}, devices = {settings.devices!r}, "
            f"strategy = {strategy!r}, precision = {settings.precision!r}: {error}"
        ) from error


def differences(model: nn.Module, world: int, batch_size: int) -> list[str]:
    """In what a training by several processes differs from one by a single process, beyond rounding."""
    if world == 1:
        return []
    found = []
    norms = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
    ]
    drops = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p
    ]
    if norms:
        found.append(
            f"trained by {world} processes: batch norm ({', '.join(norms[:4])}{' …' if len(norms) > 4 else ''}) saw "
            f"{-(-batch_size // world)} samples at a time instead of {batch_size}, so the weights differ from those of "
            "one process"
        )
    if drops:
        found.append(
            f"trained by {world} processes: dropout ({', '.join(drops[:4])}{' …' if len(drops) > 4 else ''}) drew "
            "other masks than one process draws, so the weights differ"
        )
    return found


@contextmanager
def sparing_errors() -> Iterator[None]:
    """Our own errors as they were raised, when they come out of another process; Ctrl-C as such."""
    try:
        yield
    except (SparingError, ProcessRaisedException) as error:
        text = str(error)
        matches = list(re.finditer(r"(?m)^sparing\.core\.errors\.(\w+): ", text))
        if not matches:
            raise
        kind = getattr(errors, matches[-1].group(1), SparingError)
        raise kind(text[matches[-1].end() :].strip()) from error
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
