"""Networks that float32 evaluates exactly: every number is a whole multiple of a power of two and has at most 24 bits.

Then no sum is rounded, in whatever order it is taken: spikes and logits are equal for any batch size, layout, number of
threads and library, in float64, and in integers. What `prepare(model, exact=True)` puts there, by class swap:

- weights q alpha with alpha a power of two, biases in steps of alpha / 16, both straight-through (`ExactLayer`);
- batch norms y = clamp(round(x 2^e) + b), a fixed-point number (`FixedPointNorm`), so that membranes are sums of such;
- what a depthwise convolution gives, which the next layer reads without a norm between, rounded (`ExactDepthwise`);
- images rounded as they enter (`FixedPointDoor`).

bounds.py proves that the sums of a network have 24 bits. Why it is done so: docs/decisions/0016. Source: ours; scales
that are powers of two are trained as by Jain et al., "Trained Quantization Thresholds", MLSys 2020.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from spikeformers.neurons import Door, as_membrane
from spikeformers.quantize.lsq import LSQConv1d, LSQConv2d, LSQLayer, LSQLinear

EXACT_BITS = 24  # float32 holds every whole number up to 2^24
GRID, LIMIT = 2.0**-8, 16.0  # of what norms give; 1/4, the spacing of IE-LIF's thresholds, is 64 of these steps
IMAGE_GRID, IMAGE_LIMIT = 2.0**-6, 8.0  # finer than the 1/255 of a photograph divided by its deviation
BIAS_GRID = 2.0**-4  # of biases, in step sizes of their weights
SHIFT_LIMIT = 2.0**15  # of a norm: in steps of GRID it then has 24 bits
_SPLIT = 181 / 256  # 1/sqrt(2), short enough for float32 and float64 to agree on what is above


class _PowerOfTwo(Function):
    """The nearest power of two (of log |x|), with the sign of x; 0 stays. Its gradient is passed straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        mantissa = torch.frexp(x).mantissa
        power = x / mantissa * torch.where(mantissa.abs() < _SPLIT, 0.5, 1.0).to(x.dtype) * mantissa.sign()
        return torch.where(x == 0, x, power)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Nothing is kept: the gradient passes as it is. torch wants the method all the same."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _Settle(Function):
    """clamp(round(x) + shift, -most, most), half to even, and the window (bool) in which the gradient passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shift: Tensor | None, most: float) -> tuple[Tensor, Tensor]:
        whole = x.round() if shift is None else x.round() + shift
        settled = whole.clamp(-most, most)
        return settled, settled == whole

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.shape = None if inputs[1] is None else inputs[1].shape
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        (window,) = ctx.saved_tensors
        passed = grad * window
        return passed, None if ctx.shape is None else passed.sum_to_size(ctx.shape), None


def power_of_two(x: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """The nearest power of two with the sign of x, by log |x| (up from 1.414 times one); 0 stays. Gradient 1."""
    return _PowerOfTwo.apply(x)


def fixed_point(x: Float[Tensor, " *shape"], *, grid: float, limit: float) -> Float[Tensor, " *shape"]:
    """`x` rounded to multiples of `grid`, half to even, then clamped to -limit..limit; gradient 1 where not clamped."""
    return _Settle.apply(x / grid, None, limit / grid)[0] * grid


class FixedPointDoor(Door):
    """The door of a network, which rounds images to multiples of `grid` within -`limit`..`limit`."""

    grid: ClassVar[float] = IMAGE_GRID
    limit: ClassVar[float] = IMAGE_LIMIT

    def forward(self, x: Tensor) -> Float[Tensor, "TB C H W"]:
        """As `Door`, which see."""
        return fixed_point(super().forward(x), grid=self.grid, limit=self.limit)


class ExactLayer(LSQLayer):
    """A layer whose step sizes are powers of two, and whose biases are whole multiples of 1/16 of them."""

    def step(self) -> Float[Tensor, " A"]:
        return power_of_two(self.alpha)

    def quantized_bias(self) -> Float[Tensor, " O"] | None:
        if self.bias is None:
            return None
        grid = self.step().detach().abs() * BIAS_GRID
        return _Settle.apply(self.bias / grid, None, math.inf)[0] * grid


class ExactConv1d(ExactLayer, LSQConv1d):
    """nn.Conv1d with such weights."""


class ExactConv2d(ExactLayer, LSQConv2d):
    """nn.Conv2d with such weights."""


class ExactLinear(ExactLayer, LSQLinear):
    """nn.Linear with such weights."""


class ExactDepthwise(ExactConv2d):
    """A depthwise nn.Conv2d that rounds what it gives to multiples of `grid` within -`limit`..`limit`.

    A pointwise convolution behind it, of the same bits, then stays exact whatever its weights are.
    """

    def attach(self, *, bits: int, per_channel: bool, offset: bool) -> None:
        super().attach(bits=bits, per_channel=per_channel, offset=offset)
        self.grid, self.limit = reading_format(self.out_channels, bits=bits)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C _ _"]:
        return fixed_point(super().forward(x), grid=self.grid, limit=self.limit)

    def release(self) -> None:
        del self.grid, self.limit
        super().release()


EXACT_OF: dict[type[nn.Module], type[ExactLayer]] = {
    each.plain: each for each in (ExactConv1d, ExactConv2d, ExactLinear)
}


def reading_format(inputs: int, *, bits: int) -> tuple[float, float]:
    """Grid and limit of numbers that a layer with `inputs` inputs an output can read, whatever its weights are.

    Their bits are what 24 leave beside the largest sum of weights: a limit of 8 first, then a grid down to 2^-8, then a
    limit of 16.
    """
    free = (2**EXACT_BITS // (inputs * 2 ** (bits - 1))).bit_length() - 1
    fraction = min(free - 3, round(-math.log2(GRID)))
    return 2.0**-fraction, min(2.0 ** (free - fraction), LIMIT)


class FixedPointNorm(nn.Module):
    """A batch norm that gives y = clamp(round(x scale()) + shift()): multiples of `grid` within -`limit`..`limit`.

    scale() is the power of two next to gamma / sqrt(var + eps), shift() lies on the grid. Monotone in x per channel.
    In train mode a batch norm whose gamma is changed by the factor that rounds the running scale, then rounded too: it
    normalises by the batch, and the power of two does not flicker with it.
    """

    grid: ClassVar[float] = GRID
    limit: ClassVar[float] = LIMIT

    def attach(self) -> None:
        """Make sure of what is needed. Raises ValueError for a norm without running statistics or affine part."""
        if self.running_var is None or self.weight is None or self.momentum is None:
            raise ValueError(
                "exact=True needs batch norms with weight, bias, momentum and running statistics, got "
                f"affine={self.affine}, momentum={self.momentum}, track_running_stats={self.track_running_stats}"
            )

    def scale(self) -> Float64[Tensor, " C"]:
        """The factor of each channel, a power of two with a sign; computed in float64 so that no dtype changes it."""
        return power_of_two(self._scale())

    def _scale(self) -> Float64[Tensor, " C"]:
        return self.weight.double() / torch.sqrt(self.running_var.double() + self.eps)

    def shift(self) -> Float64[Tensor, " C"]:
        """What is added to each channel, a multiple of `grid`."""
        exact = self.bias.double() - self.running_mean.double() * self.scale()
        return fixed_point(exact, grid=self.grid, limit=SHIFT_LIMIT)

    def of_zero(self) -> Float[Tensor, " C"]:
        """What each channel makes of a zero, in eval mode."""
        return self.shift().clamp(-self.limit, self.limit).to(self.weight.dtype)

    def forward(self, x: Float[Tensor, " B C *rest"]) -> Float[Tensor, " B C *rest"]:
        x = as_membrane(x)
        if not self.training:
            return self.settled(x)
        with torch.no_grad():
            exact = self._scale()
            factor = torch.where(exact == 0, 1, power_of_two(exact) / exact).to(self.weight.dtype)
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        y = F.batch_norm(x, *statistics, self.weight * factor, self.bias, True, self.momentum, self.eps)
        return fixed_point(y, grid=self.grid, limit=self.limit)

    def settled(self, x: Float[Tensor, " B C *rest"]) -> Float[Tensor, " B C *rest"]:
        """What the norm is in eval mode."""
        shape = (-1, *[1] * (x.ndim - 2))
        scale, shift = ((each / self.grid).to(x.dtype).view(shape) for each in (self.scale(), self.shift()))
        return _Settle.apply(x * scale, shift, self.limit / self.grid)[0] * self.grid

    def extra_repr(self) -> str:
        return f"{self.num_features}, grid={self.grid:g}, limit={self.limit:g}"


class FixedPointNorm1d(FixedPointNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d that gives fixed-point numbers."""


class FixedPointNorm2d(FixedPointNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d that gives fixed-point numbers."""


class FixedPointAffine(FixedPointNorm):
    """What `convert` makes of it: `weight` is scale(), `bias` is shift(), in train mode too."""

    @torch.no_grad()
    def attach(self, *, scale: Float64[Tensor, " C"], shift: Float64[Tensor, " C"]) -> None:
        """Keep both; the statistics go."""
        dtype = self.weight.dtype
        self.weight, self.bias = (nn.Parameter(each.to(dtype), requires_grad=False) for each in (scale, shift))
        self.running_mean = self.running_var = self.num_batches_tracked = None

    def scale(self) -> Float64[Tensor, " C"]:
        return self.weight.double()

    def shift(self) -> Float64[Tensor, " C"]:
        return self.bias.double()

    def forward(self, x: Float[Tensor, " B C *rest"]) -> Float[Tensor, " B C *rest"]:
        return self.settled(as_membrane(x))

    def _load_from_state_dict(self, *args) -> None:
        nn.Module._load_from_state_dict(self, *args)  # a batch norm's would want the counter that is gone


class FixedPointAffine1d(FixedPointAffine, nn.BatchNorm1d):
    """nn.BatchNorm1d as such a scale and shift."""


class FixedPointAffine2d(FixedPointAffine, nn.BatchNorm2d):
    """nn.BatchNorm2d as such a scale and shift."""


NORMS = {  # torch's, trained, converted
    nn.BatchNorm1d: (FixedPointNorm1d, FixedPointAffine1d),
    nn.BatchNorm2d: (FixedPointNorm2d, FixedPointAffine2d),
}
