"""LIF on a CPU: all steps of one block of elements while it stays in cache, one autograd node for T steps.

The readable loop makes a handful of passes over memory for each step, with autograd nodes that keep floats. Here the
same operations run in the same order on blocks that fit the cache, and backward keeps the currents alone, from which
it recomputes the membrane. Spikes of finite currents equal those of the loop bit for bit; gradients round differently.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from spikeformers.kernels.forms import LIFForm
from spikeformers.kernels.layout import dense, membrane_dtype, runs

BLOCK = 1 << 17  # elements of one step for each thread: scratch stays in cache, and calls cost little beside the work

_below = torch.ops.aten.hardtanh_backward.grad_input  # (x, h, -inf, threshold): x where h < threshold, else 0, at once
_logistic_gradient = torch.ops.aten.sigmoid_backward.grad_input


def lif(current: Tensor, *, form: LIFForm, steps: int, loop: Callable[[Tensor], Tensor]) -> Tensor:
    """currents [T*B, ...] -> spikes of the same shape, dtype and strides; membranes in float32 or wider.

    `loop` is the definition, for derivatives of the derivative.
    """
    return _Blocked.apply(current, form, steps, loop)


class _Constants:
    """The form's numbers as tensors of no axis, in the precision of membranes: torch wraps Python's in each call."""

    def __init__(self, form: LIFForm, dtype: torch.dtype) -> None:
        peak = {"sigmoid": form.slope, "atan": form.slope / 2, "rectangle": 1 / form.slope}[form.surrogate]
        self.exact = math.frexp(form.tau)[0] == 0.5  # by a power of two, multiplied is divided
        self.tau = torch.tensor(form.tau, dtype=dtype)
        self.leak = torch.tensor(1 / form.tau, dtype=dtype)
        self.threshold = torch.tensor(form.threshold, dtype=dtype)
        self.shift = torch.tensor(-form.slope * form.threshold, dtype=dtype)
        self.rest = torch.tensor(form.v_reset or 0.0, dtype=dtype)
        self.peak = torch.tensor(peak, dtype=dtype)
        self.scale = torch.tensor(peak / form.tau if form.decay_input else peak, dtype=dtype)
        self.kept = 1 - 1 / form.tau

    def divided(self, x: Tensor, *, out: Tensor) -> Tensor:
        """x / tau."""
        return torch.mul(x, self.leak, out=out) if self.exact else torch.div(x, self.tau, out=out)


class _Block:
    """The steps of one block of elements, in scratch that serves block after block."""

    def __init__(self, form: LIFForm, *, steps: int, width: int, dtype: torch.dtype) -> None:
        self.form, self.constants = form, _Constants(form, dtype)
        self.x, self.h, self.s = (torch.empty(steps, width, dtype=dtype) for _ in range(3))
        self.v, self.spare = (torch.empty(width, dtype=dtype) for _ in range(2))

    def cut(self, width: int) -> None:
        """Shrink to `width` elements, for the last block."""
        for name in ("x", "h", "s", "v", "spare"):
            setattr(self, name, getattr(self, name)[..., :width])

    def widened(self, block: Tensor) -> Tensor:
        """`block` in the precision of membranes."""
        return block if block.dtype == self.x.dtype else self.x.copy_(block)

    def charge(self, x: Tensor, v: Tensor | None, *, out: Tensor) -> None:
        """h[t] into `out`: the operations of `LIF.charge` in their order."""
        form, numbers = self.form, self.constants
        if v is None:
            numbers.divided(x, out=out) if form.decay_input else out.copy_(x)
            if form.v_reset:
                out.add_(numbers.rest)
            return
        leak = torch.sub(v, numbers.rest, out=self.spare) if form.v_reset else v
        if not form.decay_input:
            torch.sub(v, numbers.divided(leak, out=self.spare), out=out).add_(x)
        elif numbers.exact:
            torch.add(v, torch.sub(x, leak, out=self.spare), alpha=1 / form.tau, out=out)
        else:
            torch.add(v, torch.sub(x, leak, out=self.spare).div_(numbers.tau), out=out)

    def discharge(self, h: Tensor, s: Tensor, *, out: Tensor) -> None:
        """v[t] into `out`; `s` is read unless the reset is to zero."""
        if self.form.v_reset is None:
            torch.sub(h, s, alpha=self.form.threshold, out=out)
            return
        _below(h, h, -math.inf, self.form.threshold, grad_input=out)
        if self.form.v_reset:
            out.add_(s, alpha=self.form.v_reset)

    def charge_all(self, x: Tensor, *, spikes: Tensor | None) -> None:
        """Charged membranes of every step into `h`, spikes into `spikes` (None: only where a reset reads them)."""
        current, charged = self.widened(x).unbind(0), self.h.unbind(0)
        fired = (self.s if spikes is None else spikes).unbind(0)
        for t, h in enumerate(charged):
            self.charge(current[t], self.v if t else None, out=h)
            if spikes is not None or self.form.v_reset != 0:
                torch.ge(h, self.constants.threshold, out=fired[t])
            if t < len(charged) - 1:
                self.discharge(h, fired[t], out=self.v)

    def weighed(self, grad: Tensor, h: Tensor, *, out: Tensor) -> Tensor:
        """grad * surrogate derivative at `h` / its peak into `out`; `h` is overwritten."""
        slope, numbers = self.form.slope, self.constants
        if self.form.surrogate == "sigmoid":
            return _logistic_gradient(grad, torch.add(numbers.shift, h, alpha=slope, out=h).sigmoid_(), grad_input=out)
        distance = h.sub_(numbers.threshold)
        if self.form.surrogate == "atan":
            return torch.div(grad, distance.mul_(math.pi / 2 * slope).square_().add_(1), out=out)
        return torch.mul(grad, distance.abs_().lt_(slope / 2), out=out)

    def reset_gradient(self) -> Tensor | None:
        """dv[t]/dh[t] but of the last step, None where it is 1: 1 - s (hard), and what flows through s if attached."""
        form, numbers, h, s = self.form, self.constants, self.h[:-1], self.s[:-1]
        hard = form.v_reset is not None
        if form.detach_reset:
            return torch.lt(h, numbers.threshold, out=s) if hard else None
        ones = torch.ones_like(numbers.threshold).expand_as(h)
        slopes = self.weighed(ones, h.clone(), out=torch.empty_like(h)).mul_(numbers.peak)
        if not hard:
            return slopes.mul_(-form.threshold).add_(1)
        return torch.lt(h, numbers.threshold, out=s).addcmul_(slopes, numbers.rest - h)

    def differentiate(self, x: Tensor, grad: Tensor, *, out: Tensor) -> None:
        """dL/dx into `out`. dL/dh[t] = dL/ds[t] s'(h[t]) + (1 - 1/tau) dL/dh[t+1] dv[t]/dh[t]."""
        self.charge_all(x, spikes=None)
        reset = self.reset_gradient()
        h = self.weighed(self.widened(grad), self.h, out=self.h).unbind(0)
        reset = [None] * (len(h) - 1) if reset is None else reset.unbind(0)
        for t in reversed(range(len(h) - 1)):
            if reset[t] is None:
                h[t].add_(h[t + 1], alpha=self.constants.kept)
            else:
                h[t].addcmul_(h[t + 1], reset[t], value=self.constants.kept)
        torch.mul(self.h, self.constants.scale, out=out)


def _blocks(form: LIFForm, *tensors: Tensor) -> Iterator[tuple]:
    """Scratch, and the same block of each [T, size] tensor."""
    steps, size = tensors[0].shape
    width = min(size, BLOCK * torch.get_num_threads())
    block = _Block(form, steps=steps, width=width, dtype=membrane_dtype(tensors[0]))
    for begin in range(0, size, width):
        if size - begin < width:
            block.cut(size - begin)
        yield block, *(each[:, begin : begin + width] for each in tensors)


def spikes_of(current: Tensor, form: LIFForm, steps: int) -> Tensor:
    """`lif` without a gradient."""
    current = dense(current)
    spikes = torch.empty_like(current)
    if not current.numel():
        return spikes
    for block, x, s in _blocks(form, runs(current, steps), runs(spikes, steps)):
        if s.dtype == block.s.dtype:
            block.charge_all(x, spikes=s)
        else:
            block.charge_all(x, spikes=block.s)
            s.copy_(block.s)
    return spikes


def gradient_of(grad: Tensor, current: Tensor, form: LIFForm, steps: int) -> Tensor:
    """Gradient of the currents from that of the spikes."""
    current = dense(current)
    grad, found = dense(grad, like=current), torch.empty_like(current)
    if not current.numel():
        return found
    for block, x, g, out in _blocks(form, runs(current, steps), runs(grad, steps), runs(found, steps)):
        block.differentiate(x, g, out=out)
    return found


class _Blocked(Function):
    @staticmethod
    def forward(current: Tensor, form: LIFForm, steps: int, loop: Callable[[Tensor], Tensor]) -> Tensor:
        return spikes_of(current, form, steps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        current, ctx.form, ctx.steps, ctx.loop = inputs
        ctx.save_for_backward(current)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (current,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            (found,) = torch.autograd.grad(ctx.loop(current), current, grad, create_graph=True)
        else:
            found = gradient_of(grad, current, ctx.form, ctx.steps)
        return found, None, None, None

    @staticmethod
    def vmap(info, in_dims, current: Tensor, form: LIFForm, steps: int, loop: Callable[[Tensor], Tensor]):
        return _Blocked.apply(current.movedim(in_dims[0], 1), form, steps, loop), 1  # the first axis holds the steps
