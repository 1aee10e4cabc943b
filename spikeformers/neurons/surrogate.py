"""Step functions with derivatives of our choice: one step (a spike) and the staircases of integer neurons.

Source: Neftci et al., "Surrogate Gradient Learning in Spiking Neural Networks", 2019. The sigmoid of slope 4 is what
the authors of Spikformer and Meta-SpikeFormer train with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function


class _Spike(Function):
    """1 where the distance to the threshold is at least 0; subclasses give the derivative at the saved distance."""

    generate_vmap_rule = True

    @staticmethod
    def forward(distance: Tensor, slope: float) -> Tensor:
        return (distance >= 0).to(distance.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        distance, ctx.slope = inputs
        ctx.save_for_backward(distance)


class _SigmoidSpike(_Spike):
    @staticmethod
    def backward(ctx, grad: Tensor):
        (distance,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(ctx.slope * distance)
        return grad * ctx.slope * sigmoid * (1 - sigmoid), None


class _ATanSpike(_Spike):
    @staticmethod
    def backward(ctx, grad: Tensor):
        (distance,) = ctx.saved_tensors
        return grad * (ctx.slope / 2) / (1 + (math.pi / 2 * ctx.slope * distance) ** 2), None


class _RectangleSpike(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(distance: Tensor, width: float) -> tuple[Tensor, Tensor]:
        # The window is an output because only inputs and outputs can be saved; as a bool it costs one byte an element.
        return (distance >= 0).to(distance.dtype), distance.abs() < width / 2

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.width = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        (window,) = ctx.saved_tensors
        return grad * window / ctx.width, None


@dataclass(frozen=True)
class Sigmoid:
    """Derivative `slope * s(slope*x) * (1 - s(slope*x))` of a logistic step s; integrates to 1."""

    slope: float = 4.0

    def __call__(self, distance: Tensor) -> Tensor:
        return _SigmoidSpike.apply(distance, self.slope)


@dataclass(frozen=True)
class ATan:
    """Derivative `slope/2 / (1 + (pi/2 * slope * x)^2)`; integrates to 1 (Fang et al., 2021)."""

    slope: float = 2.0

    def __call__(self, distance: Tensor) -> Tensor:
        return _ATanSpike.apply(distance, self.slope)


@dataclass(frozen=True)
class Rectangle:
    """Derivative 1/width where |x| < width/2, else 0; integrates to 1 (Wu et al., 2018). Saves one byte an element."""

    width: float = 1.0

    def __call__(self, distance: Tensor) -> Tensor:
        return _RectangleSpike.apply(distance, self.width)[0]


Surrogate = Callable[[Tensor], Tensor]
"""Maps membrane minus threshold to spikes 0/1 (1 where the distance is >= 0) and owns the derivative."""


class _Staircase(Function):
    """A rounding, and the window (bool, one byte an element, all that backward needs) where its gradient is 1."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        (window,) = ctx.saved_tensors
        return grad * window, None


class _HalfEven(_Staircase):
    @staticmethod
    def forward(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        clipped = x.clamp(0, levels)
        # What clipping leaves alone is the window, ends included: one pass over memory instead of three comparisons.
        return clipped.round(), clipped == x


class _HalfUp(_Staircase):
    @staticmethod
    def forward(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        return (x.clamp(0, levels) + 0.5).floor(), (x > 0) & (x < levels)


def round_half_even(x: Tensor, levels: int) -> Tensor:
    """round(clip(x, 0, levels)), half to even; gradient 1 where 0 <= x <= levels, else 0."""
    return _HalfEven.apply(x, levels)[0]


def round_half_up(x: Tensor, levels: int) -> Tensor:
    """floor(clip(x, 0, levels) + 1/2); gradient 1 where 0 < x < levels, else 0."""
    return _HalfUp.apply(x, levels)[0]
