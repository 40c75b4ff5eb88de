"""LEAP: learning-rate perturbation towards flatter minima (Liu et al., CIKM 2022, arXiv:2208.11873).

At every step each parameter's learning rate is multiplied by a Gaussian factor of mean 1, drawn afresh:

    θ ← θ − η (1 + ρ ξ) ⊙ g,   ξ ~ N(0, I)

for plain gradient descent, and for any other optimizer the same factor on everything its learning rate multiplies: the
displacement Δ it would make by itself, with momentum, moments and weight decay in it. The optimizer's own state sees
clean gradients. In a loop of your own::

    optimizer = LEAP(torch.optim.AdamW(model.parameters(), lr=1e-3), rho=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)

and the rest as before. :class:`sparing.optimization.leap_lightning.LEAPCallback` does it to a Lightning trainer, the
step ``leap`` to the next training of a recipe.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Inexact
from pydantic import Field
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from sparing.core.errors import InvalidValue, did_you_mean, shown
from sparing.core.randomness import derive_seed
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from sparing.core.job import Job

MODES = ("relative", "absolute")
GRANULARITIES = ("per_parameter", "per_tensor", "scalar")
CHUNK = 2**22
"""Numbers whose old values are kept at a time; a single larger tensor is kept whole."""


# --- the method ----------------------------------------------------------------------------------------------------


def leap_factor(xi: Float[Tensor, "..."], rho: float, clip: float | None = None) -> Float[Tensor, "..."]:
    """1 + ρ ξ: what the learning rate is multiplied by.

    Args:
        xi: ξ, standard normal draws of any shape.
        rho: ρ ≥ 0, the standard deviation relative to the learning rate; σ/η for noise of a fixed size σ (section 3 of
            the paper adds h ~ N(0, σ² I) to the rate η).
        clip: bound on the size of ρ ξ, more than 0; below 1 no rate turns negative. None: no bound.

    Raises:
        InvalidValue: ρ negative or not finite, a bound that is not positive.
    """
    _not_negative("rho", rho)
    _positive("clip", clip)
    noise = rho * xi
    return (noise if clip is None else noise.clamp_(-clip, clip)).add_(1)


def apply_leap(
    before: Inexact[Tensor, "*shape"], after: Inexact[Tensor, "*shape"], factor: Float[Tensor, "..."]
) -> Inexact[Tensor, "*shape"]:
    """θ + f ⊙ (θ' − θ), with the base optimizer's step from ``before`` θ to ``after`` θ' and a :func:`leap_factor` f.

    It is worked out as θ' + (f − 1) ⊙ (θ' − θ) for f ≥ ½, so that f = 1 gives θ' itself. ``factor`` may have any shape
    that broadcasts to that of the parameter; half types are computed in the factor's precision.
    """
    dtype = torch.promote_types(after.dtype, factor.dtype)
    return torch.lerp(before.to(dtype), after.to(dtype), factor.to(dtype)).to(after.dtype)


class LEAP(Optimizer):
    """An optimizer of torch with learning-rate perturbation; in its place wherever an optimizer is asked for.

    ``state``, ``param_groups`` and ``defaults`` are those of the optimizer inside, so schedules, gradient scalers and
    trainers see nothing new. Gradients and learning rates are not changed, and ``get_last_lr()`` says what it said.

    Exact for every optimizer whose displacement is proportional to its learning rate (SGD in all forms, Adam, AdamW
    with its decoupled decay, RMSprop, Adagrad …), the natural extension for others. With ``rho=0``, and outside
    ``start_step … end_step``, each step is the inner optimizer's, bit for bit, and draws no random number.

    Under data-parallel training all processes must be given the same seed, as they are by default. The random numbers
    come from generators of its own, one for each device; the global ones are left alone.

    Args:
        optimizer: any ``torch.optim.Optimizer`` but LBFGS, SparseAdam and another LEAP.
        rho: ρ, standard deviation of the factor; a number ≥ 0, or a function of the number of steps taken so far.
        mode: "relative": factor 1 + ρ ξ. "absolute": 1 + (σ/η) ξ, where η is the group's learning rate in this very
            step; ``rho`` is then not looked at. Absolute noise does not fade with the schedule, so the weights do not
            settle.
        sigma: σ ≥ 0 of the absolute mode, in units of the learning rate; needed there and refused elsewhere.
        granularity: "per_parameter": a ξ for each number (the paper); "per_tensor": one for each tensor; "scalar": one
            for the whole step.
        generator: a seed, or a ``torch.Generator`` on the parameters' device. None: seed 0.
        clip: see :func:`leap_factor`.
        start_step: perturb from this step on; steps are counted from 0.
        end_step: perturb up to and without this step. None: to the end.
        exclude: parameters to leave to the inner optimizer, or a predicate on a parameter, such as
            ``lambda p: p.ndim < 2`` for biases and the scales of norms.

    Raises:
        InvalidValue: arguments outside these bounds; sparse gradients; a state of other settings.
    """

    base: Optimizer
    """The optimizer inside."""
    steps: int
    """Steps taken."""

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float | Callable[[int], float] = 0.1,
        mode: str = "relative",
        sigma: float | None = None,
        granularity: str = "per_parameter",
        generator: torch.Generator | int | None = None,
        clip: float | None = None,
        start_step: int = 0,
        end_step: int | None = None,
        exclude: Collection[Tensor] | Callable[[Tensor], bool] | None = None,
    ) -> None:
        _check_inner(optimizer)
        check_settings(rho, mode, sigma, granularity, clip, start_step, end_step)
        if generator is not None and not isinstance(generator, torch.Generator | int):
            raise InvalidValue(f"generator = {shown(generator)}; a seed, a torch.Generator or None is needed")
        self.base, self.steps = optimizer, 0
        self.rho, self.mode, self.sigma, self.granularity = rho, mode, sigma, granularity
        self.clip, self.start_step, self.end_step = clip, start_step, end_step
        self.exclude = exclude if exclude is None or callable(exclude) else list(exclude)
        self._seed = 0 if generator is None else generator
        self._generators: dict[torch.device, torch.Generator] = {}
        self._saved: list[Tensor] = []  # states for generators that have not been needed yet
        self._excluded: set[Tensor] = set()
        # torch's own way of making an optimizer that has its groups already
        self.__setstate__({"defaults": optimizer.defaults})
        for group in optimizer.param_groups:
            self._adopt(group)

    # --- as an optimizer of torch

    @property
    def state(self) -> Any:
        """The inner optimizer's."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the inner optimizer does it."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the inner optimizer another group."""
        self.base.add_param_group(param_group)
        self._adopt(self.base.param_groups[-1])

    def __repr__(self) -> str:
        return f"LEAP({', '.join(f'{name}={value!r}' for name, value in self.config().items())}) of {self.base!r}"

    def __getstate__(self) -> dict[str, Any]:
        # schedules replace ``step`` by a function that cannot be copied, and do so again when they are copied
        return {name: value for name, value in vars(self).items() if name != "step"}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One perturbed step; returns what ``closure`` returned, which is called with gradients enabled.

        A parameter without a gradient stays where it is and draws nothing.
        """
        closure = None if closure is None else self._checked(closure)
        if closure is None:
            self._refuse_gradients()
        spread = self._spread()
        if spread is None:
            loss = self.base.step() if closure is None else self.base.step(closure)
        elif self._by_parts():
            loss = None if closure is None else closure()
            self._step_by_parts(spread)
        else:
            loss = self._step_at_once(spread, closure)
        self.steps += 1
        return loss

    # --- resuming

    def config(self) -> dict[str, Any]:
        """What a saved state must agree on, as plain values."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {
            "rho": "a schedule" if callable(self.rho) else self.rho,
            "mode": self.mode,
            "sigma": self.sigma,
            "granularity": self.granularity,
            "clip": self.clip,
            "start_step": self.start_step,
            "end_step": self.end_step,
            "exclude": [i for i, p in enumerate(parameters) if p in self._excluded],
        }

    def state_dict(self) -> dict[str, Any]:
        """``base``: the inner optimizer's state; ``rng``: states of the generators; ``step``; ``config``."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        drawn = [generator.get_state() for generator in self._generators.values()]
        state = {
            "base": self.base.state_dict(),
            "rng": drawn + self._saved[len(drawn) :],
            "step": self.steps,
            "config": self.config(),
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: the same random numbers, the same step.

        Raises:
            InvalidValue: the state is a bare optimizer's, or of other settings, or of another kind of device.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        missing = [name for name in ("base", "rng", "step", "config") if name not in state_dict]
        if missing:
            raise InvalidValue(
                f"this is no state of LEAP: it lacks {', '.join(missing)} (it has {', '.join(map(str, state_dict))}). "
                "A state that was saved without LEAP is for the inner optimizer: leap.base.load_state_dict(…)"
            )
        saved, own = state_dict["config"], self.config()
        differing = [
            f"{name} was {saved.get(name)!r}, is {value!r}" for name, value in own.items() if saved.get(name) != value
        ]
        if differing:
            raise InvalidValue(f"the saved state of LEAP has other settings: {'; '.join(differing)}")
        self.base.load_state_dict(state_dict["base"])
        self.steps = state_dict["step"]
        self._generators, self._saved = {}, [state.cpu() for state in state_dict["rng"]]
        for parameter in self.param_groups[0]["params"][:1]:
            self._generator(parameter.device)  # refuses a state that it cannot take
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # --- inside

    def _adopt(self, group: dict[str, Any]) -> None:
        """Look at a group that is new."""
        if group.get("differentiable"):
            raise InvalidValue("LEAP cannot be differentiated through; set differentiable=False")
        if self.mode == "absolute" and "lr" not in group:
            raise InvalidValue(f"mode = 'absolute' needs a learning rate; {type(self.base).__name__} has none")
        listed = [] if self.exclude is None or callable(self.exclude) else self.exclude
        for parameter in group["params"]:
            if hasattr(parameter, "device_mesh"):
                raise InvalidValue("LEAP cannot perturb parameters that are sharded over devices (DTensor)")
            if isinstance(self._seed, torch.Generator):
                _same_device(self._seed, parameter.device)
            left_alone = self.exclude(parameter) if callable(self.exclude) else any(parameter is p for p in listed)
            if left_alone:
                self._excluded.add(parameter)

    def _spread(self) -> list[float] | None:
        """ρ for each group, or None when this step is the inner optimizer's."""
        if self.steps < self.start_step or (self.end_step is not None and self.steps >= self.end_step):
            return None
        if self.mode == "absolute":
            assert self.sigma is not None
            rates = [float(group["lr"]) for group in self.param_groups]
            spread = [self.sigma / rate if rate else 0.0 for rate in rates]
        else:
            rho = self.rho(self.steps) if callable(self.rho) else self.rho
            _not_negative(f"rho({self.steps})" if callable(self.rho) else "rho", rho)
            spread = [rho] * len(self.param_groups)
        return spread if any(spread) else None

    def _by_parts(self) -> bool:
        """Whether stepping a few tensors after the others equals stepping all: torch's optimizers treat each alone."""
        base = self.base
        if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
            return False  # hooks are called once for each step
        replaced = "step" in vars(base) and not getattr(base.step, "_wrapped_by_lr_sched", False)
        return type(base).__module__.startswith("torch.optim.") and not replaced

    def _step_by_parts(self, spread: list[float]) -> None:
        """Keep old values of a part of one group at a time."""
        groups = self.base.param_groups
        common: dict[str, Tensor] = {}
        try:
            for group, rho in zip(groups, spread, strict=True):
                for part in _parts([p for p in group["params"] if p.grad is not None]):
                    before = {p: p.detach().clone() for p in part if rho and p not in self._excluded}
                    self.base.param_groups = [{**group, "params": part}]
                    self.base.step()
                    for parameter in list(before):
                        self._perturb(parameter, before.pop(parameter), rho, common)
        finally:
            self.base.param_groups = groups

    def _step_at_once(self, spread: list[float], closure: Callable[[], Any] | None) -> Any:
        """Keep all old values; which parameters have gradients is known only after the closure."""
        before = [
            (parameter, parameter.detach().clone(), rho)
            for group, rho in zip(self.param_groups, spread, strict=True)
            for parameter in group["params"]
            if rho and parameter not in self._excluded and (closure is not None or parameter.grad is not None)
        ]
        loss = self.base.step() if closure is None else self.base.step(closure)
        common: dict[str, Tensor] = {}
        for parameter, old, rho in before:
            if parameter.grad is not None:
                self._perturb(parameter, old, rho, common)
        return loss

    def _perturb(self, parameter: Tensor, before: Tensor, rho: float, common: dict[str, Tensor]) -> None:
        """``common`` holds the one ξ of a scalar step."""
        if self.granularity != "scalar":
            factor = leap_factor(self._draw(parameter), rho, self.clip)
        else:
            if not common:
                common["xi"] = self._draw(parameter)
            factor = leap_factor(common["xi"].to(parameter.device), rho, self.clip)
        parameter.copy_(apply_leap(before, parameter, factor))

    def _draw(self, parameter: Tensor) -> Tensor:
        """Standard normal draws for one parameter, or one for all."""
        shape = parameter.shape if self.granularity == "per_parameter" else ()
        dtype = parameter.dtype.to_real()
        dtype = torch.float32 if dtype.itemsize < 4 else dtype
        device = parameter.device
        return torch.randn(shape, generator=self._generator(device), dtype=dtype, device=device)

    def reseed(self, seed: int) -> None:
        """Draw from here on what a generator with this seed gives: clients of a fleet have noise of their own."""
        self._seed, self._generators, self._saved = seed, {}, []

    def _generator(self, device: torch.device) -> torch.Generator:
        """The generator of a device. They count in the order of first use: the same on every process."""
        if device not in self._generators:
            number = len(self._generators)
            if isinstance(self._seed, torch.Generator):
                _same_device(self._seed, device)
                made = self._seed
            else:
                seed = derive_seed(self._seed, "leap", number) if number else self._seed
                made = torch.Generator(device).manual_seed(seed)
            if number < len(self._saved):
                try:
                    made.set_state(self._saved[number])
                except (RuntimeError, TypeError) as error:
                    raise InvalidValue(
                        f"the saved random state of LEAP was taken on another kind of device than {device}: {error}"
                    ) from error
            self._generators[device] = made
        return self._generators[device]

    def _checked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def checked() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._refuse_gradients()
            return loss

        return checked

    def _refuse_gradients(self) -> None:
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.is_sparse:
                    raise InvalidValue(
                        f"LEAP takes no sparse gradients; parameter {place} of group {number}, of shape "
                        f"{tuple(parameter.shape)}, has one (an embedding with sparse=True?)"
                    )


def _same_device(generator: torch.Generator, device: torch.device) -> None:
    own = generator.device
    if (own.type, own.index or 0) != (device.type, device.index or 0):
        raise InvalidValue(f"generator is on {own}, a parameter on {device}; give a seed, or a generator on {device}")


def _parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of together at most :data:`CHUNK` numbers, or a single larger tensor."""
    part: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if part and size + parameter.numel() > CHUNK:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.numel()
    if part:
        yield part


def _check_inner(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise InvalidValue(f"optimizer = {shown(optimizer)}; a torch.optim.Optimizer is needed")
    if isinstance(optimizer, LEAP):
        raise InvalidValue("this optimizer has LEAP around it already")
    if isinstance(optimizer, LBFGS):
        raise InvalidValue("LBFGS searches along a line with many evaluations in one step; LEAP needs a plain step")
    if isinstance(optimizer, SparseAdam):
        raise InvalidValue("SparseAdam is for sparse gradients, which LEAP does not take")


def check_settings(
    rho: float | Callable[[int], float],
    mode: str,
    sigma: float | None,
    granularity: str,
    clip: float | None,
    start_step: int,
    end_step: int | None,
) -> None:
    """Raise :class:`InvalidValue` for settings that :class:`LEAP` refuses."""
    if not callable(rho):
        _not_negative("rho", rho)
    for name, value, known in (("mode", mode, MODES), ("granularity", granularity, GRANULARITIES)):
        if value not in known:
            hint = did_you_mean(value, known) if isinstance(value, str) else ""
            raise InvalidValue(f"{name} = {shown(value)}; one of {', '.join(known)} is needed.{hint}")
    if mode == "absolute" and sigma is None:
        raise InvalidValue("mode = 'absolute' needs sigma, the standard deviation of the noise on the learning rate")
    if sigma is not None:
        _not_negative("sigma", sigma)
        if mode != "absolute":
            raise InvalidValue(f"sigma = {sigma} is for mode = 'absolute'; in mode = 'relative' set rho")
    _positive("clip", clip)
    for name, count in (("start_step", start_step), ("end_step", end_step)):
        if count is not None and (not isinstance(count, int) or count < 0):
            raise InvalidValue(f"{name} = {shown(count)}; a whole number ≥ 0 is needed")
    if end_step is not None and end_step <= start_step:
        raise InvalidValue(f"start_step = {start_step}, end_step = {end_step}: no step would be perturbed")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidValue(f"{name} = {shown(value)}; a number is needed")
    return float(value)


def _not_negative(name: str, value: Any) -> None:
    if not 0 <= _number(name, value) < math.inf:
        raise InvalidValue(f"{name} = {value}; a finite number ≥ 0 is needed")


def _positive(name: str, value: Any) -> None:
    if value is not None and not 0 < _number(name, value) < math.inf:
        raise InvalidValue(f"{name} = {value}; a finite number > 0, or None, is needed")


# --- the step ------------------------------------------------------------------------------------------------------


def is_vector(parameter: Tensor) -> bool:
    """True for biases and the scales and shifts of norms: parameters of fewer than two dimensions."""
    return parameter.ndim < 2


@step("leap")
class Leap(Step):
    """Multiply each parameter's learning rate in the next training by Gaussian noise of mean 1.

    With ``rho=0`` the training is the bare optimizer's, bit for bit: the control.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    slots: ClassVar[frozenset[str]] = frozenset({"learning-rate perturbation"})
    source: ClassVar[str] = "Liu et al. 2022, Learning Rate Perturbation, CIKM, arXiv:2208.11873"

    rho: float = Field(default=0.1, ge=0)
    """ρ: standard deviation of the noise relative to the learning rate."""
    mode: Literal["relative", "absolute"] = "relative"
    """"relative": the noise scales with the learning rate; "absolute": it has the fixed size ``sigma``."""
    sigma: float | None = Field(default=None, ge=0)
    """σ: standard deviation added to the learning rate in the absolute mode, where ``rho`` is not looked at."""
    granularity: Literal["per_parameter", "per_tensor", "scalar"] = "per_parameter"
    """A draw for each number, for each tensor, or one for the whole step."""
    clip: float | None = Field(default=None, gt=0)
    """Bound on the relative noise; below 1 no learning rate turns negative."""
    start_step: int = Field(default=0, ge=0)
    """First optimizer step that is perturbed, counted from 0."""
    end_step: int | None = Field(default=None, ge=0)
    """First optimizer step that is no longer perturbed."""
    exclude: Literal["", "vectors"] = ""
    """"vectors": biases and the scales of norms (parameters of fewer than two dimensions) are not perturbed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.rho, self.mode, self.sigma, self.granularity, self.clip, self.start_step, self.end_step)

    def apply(self, job: Job) -> Job:
        """The job, whose next training has :class:`LEAP` around its optimizer."""
        seed = derive_seed(job.seed, "leap")

        def wrap(optimizer: Optimizer) -> LEAP:
            return LEAP(
                optimizer,
                rho=self.rho,
                mode=self.mode,
                sigma=self.sigma,
                granularity=self.granularity,
                generator=seed,
                clip=self.clip,
                start_step=self.start_step,
                end_step=self.end_step,
                exclude=is_vector if self.exclude else None,
            )

        size = f"ρ = {self.rho:g}" if self.mode == "relative" else f"σ = {self.sigma:g}"
        job.notes.remarks.append(f"the next training perturbs its learning rates, {size}, {self.granularity}")
        return job.replace(training=job.training.adding(wrap_optimizer=wrap))
