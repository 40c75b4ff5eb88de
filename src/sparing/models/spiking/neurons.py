"""Leaky integrate-and-fire neurons, with surrogate gradients and the whole recurrence over time in one operator.

M. Yao et al., "Attention Spiking Neural Networks", IEEE TPAMI 45(8), 2023, arXiv:2209.13929, eq. 4, and its published
code. Only the neuron's state depends on the step before; what lies between neurons works on all steps at once.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparing.core.errors import InvalidValue

Reset = Literal["clamp", "hard"]
Mode = Literal["spike", "mem"]


class SpikeRect(torch.autograd.Function):
    """Heaviside step with a rectangular surrogate derivative.

    Forward: 1 where v ≥ 0 (``strict``: v > 0), else 0. Backward: 1/(2·lens) where the distance of v from 0 is below
    ``lens``, else 0. ``SpikeRect.apply(v, lens, strict)``; v, any shape, is membrane minus threshold.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, lens: float = 0.25, strict: bool = False) -> Tensor:
        """Spikes, 0.0 or 1.0, of v's shape and type."""
        ctx.save_for_backward(v)
        ctx.lens = lens
        return (v > 0 if strict else v >= 0).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient that passes through the window."""
        (v,) = ctx.saved_tensors
        return grad * (v.abs() < ctx.lens) / (2 * ctx.lens), None, None


class Cell(NamedTuple):
    """What a neuron is; see :class:`LIF`."""

    alpha: float
    v_th: float
    lens: float
    reset: str
    mode: str
    threshold_relu: bool
    b: float
    strict: bool
    detach_reset: bool

    def fires(self, u: Tensor) -> Tensor:
        """Where the membrane potential u reaches the threshold, bool."""
        return u > self.v_th if self.strict else u >= self.v_th

    def after(self, u: Tensor) -> Tensor:
        """The state that the next step begins with."""
        if self.reset == "clamp":  # s·Vth + (1 − s)·u is the smaller of the two
            h = u.clamp(max=self.v_th) * self.alpha
            return h + self.b if self.b else h
        return (u * self.alpha).masked_fill(self.fires(u), 0.0)

    def output(self, u: Tensor) -> Tensor:
        """What the neuron sends on."""
        if self.mode == "spike":
            return self.fires(u).to(u.dtype)
        return torch.relu(u - self.v_th) if self.threshold_relu else torch.relu(u)


class _Recurrence(torch.autograd.Function):
    """All steps of a cell: currents (B, T, …) → outputs (B, T, …), with the gradient through time in closed form.

    With u_t = h_{t−1} + x_t and h_t = f(u_t), ∂L/∂u_t = ∂L/∂o_t·o'(u_t) + f'(u_t)·∂L/∂u_{t+1}. Both factors are made
    for all steps at once; only the product with the later step's gradient is a loop.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, cell: Cell) -> Tensor:
        u = torch.empty_like(current, memory_format=torch.contiguous_format)
        s = torch.empty_like(u)
        compare = torch.gt if cell.strict else torch.ge  # into floats: faster than through booleans
        h = torch.zeros_like(current[:, 0])
        for t in range(current.shape[1]):
            now, fired = u.select(1, t), s.select(1, t)
            torch.add(h, current.select(1, t), out=now)
            if cell.reset == "clamp":
                torch.clamp(now, max=cell.v_th, out=h)
                h.mul_(cell.alpha)
                if cell.b:
                    h.add_(cell.b)
            else:
                compare(now, cell.v_th, out=fired)
                torch.mul(now, cell.alpha, out=h)
                h.addcmul_(h, fired, value=-1)
        if cell.reset == "clamp":
            compare(u, cell.v_th, out=s)
        ctx.save_for_backward(u, s)
        ctx.cell = cell
        return s if cell.mode == "spike" else cell.output(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u, s), cell = ctx.saved_tensors, ctx.cell
        away = u - cell.v_th
        window = away.abs()
        torch.lt(window, cell.lens, out=window).div_(2 * cell.lens)
        through = 1 - s
        if not cell.detach_reset:
            # ∂s/∂u times what a spike changes in the state: Vth − u (clamp) or −u (hard)
            through.addcmul_(away if cell.reset == "clamp" else u, window, value=-1)
        through.mul_(cell.alpha)
        along = window.mul_(grad) if cell.mode == "spike" else grad * ((away if cell.threshold_relu else u) > 0)
        for t in range(u.shape[1] - 2, -1, -1):
            along.select(1, t).addcmul_(through.select(1, t), along.select(1, t + 1))
        return along, None


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons without parameters; the state is 0 at the start of every sample.

    Each step: u = h + x; s = 1 where u ≥ v_th; then the state h becomes alpha·(s·v_th + (1 − s)·u) + b ("clamp", the
    published code: after a spike the state is alpha·v_th, not 0) or alpha·u·(1 − s) ("hard", eq. 4 with reset potential
    0). Gradients run back through all steps, and through s by :class:`SpikeRect`.

    Shapes: (B, T, …) → (B, T, …), of any shape behind the steps.

    Args:
        alpha: what is left of the state from one step to the next, 0…1.
        v_th: threshold.
        lens: half the width of the surrogate's window.
        reset: "clamp" or "hard".
        mode: what is sent on: "spike" s, or "mem" relu(u), while the state still goes by s (LIAF).
        threshold_relu: with "mem", relu(u − v_th) instead.
        b: added to the state after each step; with "clamp" only.
        strict: a spike needs u > v_th.
        detach_reset: no gradient through the s of the reset.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        v_th: float = 0.3,
        lens: float = 0.25,
        reset: Reset = "clamp",
        mode: Mode = "spike",
        threshold_relu: bool = False,
        b: float = 0.0,
        strict: bool = False,
        detach_reset: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("alpha", alpha, 0.0, 1.0),
            ("v_th", v_th, 0.0, math.inf),
            ("lens", lens, 0.0, math.inf),
            ("b", b, -math.inf, math.inf),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not least <= value <= most or (value == 0 and name in ("v_th", "lens")):
                wanted = {"alpha": "a number in 0…1", "b": "a finite number"}.get(name, "a finite number above 0")
                raise InvalidValue(f"LIF: {name} = {value!r}; {wanted} is expected")
        if reset not in ("clamp", "hard"):
            raise InvalidValue(f'LIF: reset = {reset!r}; "clamp" or "hard" is expected')
        if mode not in ("spike", "mem"):
            raise InvalidValue(f'LIF: mode = {mode!r}; "spike" or "mem" is expected')
        if b and reset == "hard":
            raise InvalidValue(f'LIF: b = {b!r} with reset = "hard"; it belongs to "clamp"')
        if threshold_relu and mode == "spike":
            raise InvalidValue('LIF: threshold_relu = True with mode = "spike"; it belongs to "mem"')
        self.cell = Cell(
            float(alpha), float(v_th), float(lens), reset, mode, threshold_relu, float(b), strict, detach_reset
        )

    def forward(self, current: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b t *rest"]:
        """Currents (B, T, …) of all steps → outputs of all steps."""
        if current.requires_grad and torch.is_grad_enabled():
            return _Recurrence.apply(current, self.cell)
        # the same steps in operators that every exporter knows
        h, outputs = None, []
        for x in current.unbind(1):
            out, h = self.step(x, h)
            outputs.append(out)
        return torch.stack(outputs, 1)

    def step(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: current x (B, …) and state h (None: 0) → (output, next state)."""
        return self.fire(x if h is None else h + x)

    def fire(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Membrane potentials u (B, …) → (output, next state), with surrogate gradients where u asks for them."""
        cell = self.cell
        if not (u.requires_grad and torch.is_grad_enabled()):
            return cell.output(u), cell.after(u)
        s = SpikeRect.apply(u - cell.v_th, cell.lens, cell.strict)
        held = s.detach() if cell.detach_reset else s
        if cell.reset == "clamp":
            h = cell.alpha * (held * cell.v_th + (1 - held) * u) + cell.b
        else:
            h = cell.alpha * u * (1 - held)
        return (s if cell.mode == "spike" else cell.output(u)), h

    def extra_repr(self) -> str:
        """All fields."""
        return ", ".join(f"{name}={value!r}" for name, value in self.cell._asdict().items())
