"""A batch norm handed on so that the neuron behind it keeps the norm's input for backward, and not its output.

The norm keeps its input x anyway; a neuron that keeps y = norm(x) beside it keeps the same numbers twice. `Normed` is y
for everybody, and for a neuron's fast form also the way back to x. On a CPU y is computed, read once and dropped, and
recomputed in backward with its very bits; on CUDA (`kernels.normed_triton`) no memory ever holds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from spikeformers.kernels import blocked
from spikeformers.kernels.forms import IntegerForm, LIFForm


@dataclass(frozen=True)
class Norm:
    """One batch norm y of x [T*B, C, H, W], with what it took from x.

    `centre`, `spread` [C]: mean and 1/deviation of this batch, or without `batch` the running mean and variance.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    centre: Tensor
    spread: Tensor
    batch: bool
    eps: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What an autograd function saves of it."""
        return self.x, self.weight, self.bias, self.centre, self.spread

    def again(self) -> Tensor:
        """y once more, bit for bit that of `aten.native_batch_norm` on a CPU."""
        if not self.batch:
            numbers = self.weight, self.bias, self.centre, self.spread
            return torch.native_batch_norm(self.x, *numbers, False, 0.0, self.eps)[0]
        # A norm by running numbers forms weight * 1/deviation first, as one by those of its batch does.
        numbers = self.weight * self.spread, self.bias, self.centre, torch.ones_like(self.spread)
        return torch.native_batch_norm(self.x, *numbers, False, 0.0, 0.0)[0]

    def differentiable(self) -> Tensor:
        """y as a function of x, weight and bias, through the statistics too."""
        running = (None, None) if self.batch else (self.centre, self.spread)
        return F.batch_norm(self.x, *running, self.weight, self.bias, self.batch, 0.0, self.eps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [C] of y = scale * x + shift."""
        scale = self.weight * (self.spread if self.batch else (self.spread + self.eps).rsqrt())
        return scale, self.bias - self.centre * scale

    def gradients(self, grad: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of x, weight and bias, as far as `wanted`, from that of y."""
        statistics = (None, None, self.centre, self.spread) if self.batch else (self.centre, self.spread, None, None)
        return torch.ops.aten.native_batch_norm_backward(
            grad, self.x, self.weight, *statistics, self.batch, self.eps, wanted
        )


def _metadata() -> set[Callable]:
    """What may be asked of y without computing it."""
    properties = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim)
    return {each.__get__ for each in properties} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}


class Normed(Tensor):
    """The output y of `norm`: a neuron's fast form reads `norm`; whoever else touches it gets y, with its gradient.

    `y` None: not computed yet.  `taken`, `seen`: whether a neuron has met it, and whether something else has.
    Raises ValueError where an operation reaches it below torch's functions, so that y cannot be put in its place.
    """

    @staticmethod
    def __new__(cls, norm: Norm, y: Tensor | None) -> Self:
        x = norm.x
        made = Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)
        made.norm, made.y, made.taken, made.seen = norm, y, False, False
        return made

    def computed(self) -> Tensor:
        """y, an ordinary tensor."""
        if self.y is None:
            self.y = self.norm.differentiable()
        return self.y

    def asked_for(self) -> Tensor:
        """y for something that is no neuron."""
        self.seen = True
        return self.computed()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(cls, cls.asked_for, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise ValueError(
            f"{func} met a batch norm that is left to the neuron behind it: call separate_norms(model) for this network"
        )


_METADATA = _metadata()


class _InPlaceOf(Function):
    """The place of y in the graph where y has one: autograd functions find it there when they are given a `Normed`."""

    @staticmethod
    def forward(ctx, y: Tensor, norm: Norm) -> Normed:
        return Normed(norm, None)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _Unapplied(Function):
    """The place of a y that nobody computes: batch norm's gradient without its output."""

    @staticmethod
    def forward(x: Tensor, weight, bias, centre, spread, batch: bool, eps: float) -> Normed:
        return Normed(Norm(x, weight, bias, centre, spread, batch, eps), None)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.batch, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        norm = Norm(*ctx.saved_tensors, batch=ctx.batch, eps=ctx.eps)
        return *norm.gradients(grad, list(ctx.needs_input_grad[:3])), *[None] * 4


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    batch: bool,
    momentum: float,
    eps: float,
) -> Normed:
    """Batch norm of x [T*B, C, H, W] by the numbers of this `batch`, or by running ones; the former move the latter.

    Parameters [C] in float32 or float64.
    """
    y, *found = torch.native_batch_norm(x, weight, bias, running_mean, running_var, batch, momentum, eps)
    statistics = found if batch else (running_mean.clone(), running_var.clone())  # those may move before backward
    norm = Norm(x, weight, bias, *statistics, batch=batch, eps=eps)
    made = _InPlaceOf.apply(y, norm)
    made.y = y
    return made


def unapplied(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    batch: bool,
    momentum: float,
    eps: float,
) -> Normed:
    """The same for kernels that apply the norm: takes its statistics and computes no y."""
    if batch:
        with torch.no_grad():
            mean, variance = torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
            statistics = mean, (variance + eps).rsqrt()
    else:
        statistics = running_mean.clone(), running_var.clone()
    made = _Unapplied.apply(x, weight, bias, *statistics, batch, eps)
    made.norm = Norm(x, weight, bias, *statistics, batch=batch, eps=eps)  # inside the function x has no history
    return made


@dataclass(frozen=True)
class Firing:
    """How the neuron behind a norm fires; `loop` is its definition, for derivatives of the derivative."""

    form: LIFForm | IntegerForm
    steps: int
    loop: Callable[[Tensor], Tensor]


def blocked_lif(current: Normed, firing: Firing) -> Tensor:
    """`kernels.blocked` behind a norm on a CPU: the same spikes and gradients, bit for bit."""
    norm = current.norm
    return _Blocked.apply(current.y, *norm.tensors, norm.batch, norm.eps, firing)


def twice_differentiable(grad: Tensor, norm: Norm, firing: Firing) -> Tensor:
    """Gradient of y from that of the spikes, itself a function of x and the parameters."""
    y = norm.differentiable()
    (found,) = torch.autograd.grad(firing.loop(y), y, grad, create_graph=True)
    return found


class _Blocked(Function):
    """The gradient goes to y, and through it to x and the parameters: arguments because only those can be saved."""

    @staticmethod
    def forward(y: Tensor, x, weight, bias, centre, spread, batch: bool, eps: float, firing: Firing) -> Tensor:
        return blocked.spikes_of(y, firing.form, firing.steps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, *tensors, ctx.batch, ctx.eps, ctx.firing = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        norm, firing = Norm(*ctx.saved_tensors, batch=ctx.batch, eps=ctx.eps), ctx.firing
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            found = twice_differentiable(grad, norm, firing)
        else:
            found = blocked.gradient_of(grad, norm.again(), firing.form, firing.steps)
        return found, *[None] * 8
