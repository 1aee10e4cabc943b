"""Layers that compute with counts: uint8 in, 8-bit weights, and one epilogue for scale, batch norm and neuron.

The readable path defines each number: integer sums, times a float32 scale, plus a float32 bias, then (where a neuron
follows) clipped to 0..D and rounded. The fast path is one oneDNN primitive with the same epilogue, bit for bit: it is
probed once per process and left alone where it is missing or disagrees.
Source of the symmetric 8-bit weights: Nagel et al., "A White Paper on Neural Network Quantization", 2021, Sec. 2.3.
"""

import functools
import logging

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.neurons import IELIF, ILIF, NILIF, Neuron

logger = logging.getLogger(__name__)
LARGEST_WEIGHT = 127
PACKED_SHAPES = 4  # input shapes for which a layer keeps packed weights
PAIR_LIMIT = 32767  # CPUs without VNNI add two products in 16 bits and saturate beyond this


def quantize_weight(weight: Float[Tensor, " O *rest"]) -> tuple[Int8[Tensor, " O *rest"], Float[Tensor, " O"]]:
    """Symmetric 8-bit weights per output channel, and the value of one unit of each channel (largest / 127)."""
    step = weight.flatten(1).abs().amax(1) / LARGEST_WEIGHT
    step = torch.where(step > 0, step, torch.ones_like(step))
    units = weight / step.view(-1, *[1] * (weight.ndim - 1))
    return units.round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).to(torch.int8), step


def fires_by_itself(neuron: Neuron) -> bool:
    """True if the neuron's counts depend on nothing but the present current, so that a convolution can emit them."""
    single = not isinstance(neuron.threshold, Tensor) or neuron.threshold.numel() == 1
    return isinstance(neuron, ILIF | NILIF | IELIF) and not neuron.carries and single


def round_counts(levels: Tensor, *, largest: int, half_up: bool) -> UInt8[Tensor, "..."]:
    """Currents in units of one count -> counts 0..largest, halves up (IE-LIF) or to even."""
    clipped = levels.clamp(0, largest)
    return (clipped.add_(0.5).floor_() if half_up else clipped.round_()).to(torch.uint8)


class CountNeuron(nn.Module):
    """Stands in a neuron's place and emits its counts: uint8, or where others read them `dtype`, each worth `unit`.

    `fused`: the convolution before it has already fired and brings the counts.
    """

    def __init__(self, neuron: Neuron, *, fused: bool, dtype: torch.dtype | None, unit: float | None = None) -> None:
        super().__init__()
        self.neuron = None if fused else neuron
        self.levels = neuron.levels
        self.unit = neuron.unit if unit is None else unit
        self.dtype = dtype
        self.stateless = fires_by_itself(neuron)
        self.half_up = isinstance(neuron, IELIF)

    def forward(self, x: Tensor) -> Tensor:
        """Currents (or, if fused, counts) [T*B, ...] -> counts of the same shape."""
        counts = x if self.neuron is None else self.fire(x)
        if self.dtype is None:
            return counts
        wide = counts.to(self.dtype)
        return wide if self.unit == 1 else wide * self.unit

    def fire(self, x: Tensor) -> UInt8[Tensor, "..."]:
        """Counts of the currents `x`; the membrane, where there is one, stays in floating point."""
        if not self.stateless:
            return self.neuron.counts(self.neuron(x))
        return round_counts(self.neuron.charge(x, None), largest=self.levels, half_up=self.half_up)

    def counts(self, output: Tensor) -> UInt8[Tensor, "..."]:
        """What `forward` gave -> counts."""
        return output if output.dtype == torch.uint8 else (output / self.unit).round().to(torch.uint8)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, unit={self.unit:g}, fused={self.neuron is None}, dtype={self.dtype}"


class PerImage(nn.Module):
    """A float layer run image by image: its rounding, and every spike after it, then ignores the batch size."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, " TB *shape"]) -> Float[Tensor, " TB *out"]:
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
        return self.layer(x) if len(x) == 1 else torch.cat([self.layer(image) for image in x.split(1)])


class IntegerConv(nn.Module):
    """Convolution of counts with 8-bit weights: uint8 [TB, C, H, W] -> float32, or uint8 where a neuron is fused in.

    `unit`: what one input count is worth; `max_count`: the largest. `neuron`: the one that reads only this layer.
    Spikes that arrive in floating point, because others read them too, are turned back into counts first.
    """

    def __init__(
        self, conv: nn.Conv2d, *, unit: float, max_count: int, neuron: Neuron | None = None, fast: bool = True
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.unit, self.max_count = unit, max_count
        self.levels = 0 if neuron is None else neuron.levels
        self.half_up = isinstance(neuron, IELIF)
        weight, step = quantize_weight(conv.weight.detach())
        bias = step.new_zeros(len(step)) if conv.bias is None else conv.bias.detach()
        gain = 1.0 if neuron is None else getattr(neuron, "gain", 1.0) / float(neuron.threshold)
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", (step * unit * gain).float())
        self.register_buffer("bias", (bias * gain).float())
        self.fast = fast and 2 * max_count * LARGEST_WEIGHT <= PAIR_LIMIT
        self.emits = self.levels > 0 and not (self.half_up and self.meets_a_tie())
        self.packed: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        counts = x if x.dtype == torch.uint8 else (x / self.unit).round().to(torch.uint8)
        if not self.runs_fast(counts):
            return self.readable(counts)
        y = self.primitive(counts)
        return y if self.emits or not self.levels else round_counts(y, largest=self.levels, half_up=self.half_up)

    def runs_fast(self, counts: Tensor) -> bool:
        """True if the primitive may take these counts."""
        return self.fast and counts.device.type == "cpu" and primitive_agrees()

    def readable(self, counts: UInt8[Tensor, "TB C H W"]) -> Tensor:
        """The definition. Sums are exact in float64 whatever algorithm the convolution runs (float32 may be TF32)."""
        weight = self.weight.double()
        sums = F.conv2d(counts.double(), weight, None, self.stride, self.padding, self.dilation, self.groups)
        y = sums.float().mul_(self.scale.view(-1, 1, 1)).add_(self.bias.view(-1, 1, 1))
        y = y.contiguous(memory_format=torch.channels_last)
        return round_counts(y, largest=self.levels, half_up=self.half_up) if self.levels else y

    def primitive(self, counts: UInt8[Tensor, "TB C H W"]) -> Tensor:
        """The same numbers from one call; float32 where the neuron's halves need the plain rounding."""
        ops, geometry = torch.ops.onednn, (self.stride, self.padding, self.dilation, self.groups)
        packed = self.packed.get(counts.shape)
        if packed is None:
            if len(self.packed) == PACKED_SHAPES:
                self.packed.clear()
            # Packed for another shape, weights are laid out anew in every call: up to 60 times slower (measured).
            packed = ops.qconv_prepack(self.weight.contiguous(), self.scale, 1.0, 0, *geometry, counts.shape)
            self.packed[counts.shape] = packed
        end = (torch.uint8, "hardtanh", [0, self.levels]) if self.emits else (torch.float32, "none", [])
        zero = torch.zeros(1, dtype=torch.int32)
        return ops.qconv2d_pointwise(counts, 1.0, 0, packed, self.scale, zero, self.bias, *geometry, 1.0, 0, *end, None)

    def meets_a_tie(self) -> bool:
        """True if some reachable sum lands where rounding half up and half to even differ.

        That is k + 1/2, or the float just below it (adding 1/2 to it may round up). The epilogue grows with the sum,
        so bisection finds the first sum that reaches each of them.
        """
        half = torch.arange(self.levels, device=self.scale.device) + 0.5
        below = torch.nextafter(half, torch.zeros_like(half))
        reach = self.max_count * self.weight.flatten(1).to(torch.int64).abs().sum(1, keepdim=True)
        low, high = (-reach - 1).expand(-1, self.levels), (reach + 1).expand(-1, self.levels)
        for _ in range(int(reach.max()).bit_length() + 2):
            middle = (low + high).div(2, rounding_mode="floor")
            enough = self.epilogue(middle) >= below
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return bool(((high <= reach) & (self.epilogue(high) <= half)).any())

    def epilogue(self, sums: Tensor) -> Tensor:
        """Scale and bias for integer sums [O, ...], as both paths apply them."""
        return sums.float() * self.scale[:, None] + self.bias[:, None]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"packed": {}}  # packed weights belong to this process and cannot be copied

    def _load_from_state_dict(self, *args) -> None:
        self.packed = {}
        super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse=True):
        self.packed = {}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        out, inside, *kernel = self.weight.shape
        return f"{inside * self.groups}, {out}, kernel={tuple(kernel)}, levels={self.levels}, unit={self.unit:g}"


class IntegerLinear(IntegerConv):
    """nn.Linear on counts, as a 1x1 convolution: uint8 [..., C] -> float32 [..., O] (uint8 with a fused neuron)."""

    def __init__(
        self, linear: nn.Linear, *, unit: float, max_count: int, neuron: Neuron | None = None, fast: bool = True
    ) -> None:
        conv = nn.Conv2d(linear.in_features, linear.out_features, 1, device="meta")
        conv.weight = nn.Parameter(linear.weight.detach()[..., None, None], requires_grad=False)
        conv.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        super().__init__(conv, unit=unit, max_count=max_count, neuron=neuron, fast=fast)

    def forward(self, x: Tensor) -> Tensor:
        flat = super().forward(x.reshape(-1, x.shape[-1], 1, 1))
        return flat.reshape(*x.shape[:-1], -1)


@functools.cache
def primitive_agrees() -> bool:
    """True if this process has oneDNN's integer convolution and it equals the readable path; asked once, logged if not.

    Covers kernels 1, 3 and 7, strides 1 and 2, depthwise, both output types, ties of every channel, the largest counts.
    """
    cases = [(13, 24, 1, 1, 1), (16, 19, 3, 2, 1), (24, 24, 7, 1, 24), (8, 16, 3, 1, 1)]
    generator = torch.Generator().manual_seed(0)
    try:
        for inside, out, kernel, stride, groups in cases:
            conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, device="meta").to_empty(
                device="cpu"
            )
            nn.init.uniform_(conv.weight.data, -0.99, 0.99, generator=generator)
            conv.weight.data[:, 0, 0, 0] = LARGEST_WEIGHT / 128  # then every step is 1/128 and ties are met
            conv.bias.data.copy_(torch.randint(-8, 8, (out,), generator=generator) / 4)
            for max_count, neuron in ((4, ILIF(levels=4)), (129, None)):
                layer = IntegerConv(conv, unit=1.0, max_count=max_count, neuron=neuron)
                shape = (2, inside, 9, 9)
                counts = torch.randint(0, max_count + 1, shape, generator=generator, dtype=torch.uint8)
                if not torch.equal(layer.primitive(counts), layer.readable(counts)):
                    logger.warning("oneDNN's integer convolution differs here: the engine takes its readable path")
                    return False
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        logger.warning("no oneDNN integer convolution here (%s): the engine takes its readable path", error)
        return False
    return True
