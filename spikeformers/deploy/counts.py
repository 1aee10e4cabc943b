"""Layers that compute with counts: uint8 in, integer weights of up to 8 bits, and one epilogue for all that follows.

A layer that no neuron follows is integer sums I, times a float32 scale, plus a float32 bias. One that fires is integer
sums and D thresholds per channel: count = how many of them I reaches (or, where the scale is negative, -I does). The
thresholds are computed in float64 from the network itself, so that the counts are the network's for every sum there is.
The readable path does that as it is said. The fast path is one oneDNN primitive, whose float32 epilogue is verified
against the thresholds at each of them and just below (it grows with I, so nothing between can differ).
Source of 8-bit weights where the network has float ones: Nagel et al., "A White Paper on Neural Network Quantization",
2021, Sec. 2.3 (symmetric, per channel). Thresholds: QSD-Transformer's deployment, as any integrate-and-fire neuron.
"""

import functools
import logging
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.deploy.geometry import Geometry
from spikeformers.neurons import IELIF, ILIF, NILIF, Neuron
from spikeformers.quantize import PackedLayer

logger = logging.getLogger(__name__)
LARGEST_WEIGHT = 127
LARGEST_COUNT = 255
PREPARED_SHAPES = 8  # input shapes for which a layer keeps its weights laid out; five maps may share one layer
PAIR_LIMIT = 32767  # CPUs without VNNI add two products in 16 bits and saturate beyond this
EXACT_FLOAT32 = 2**24  # up to here float32 holds every integer
EPSILON = 2**-23  # of float32
NUDGES = (0.5, -0.5, 1, -1, 2, -2, 4, -4, 8, -8)  # last places by which a bias moves where float32 misses a threshold

Counts = UInt8[Tensor, " TB *shape"]


def quantize_weight(weight: Float[Tensor, " O *rest"]) -> tuple[Int8[Tensor, " O *rest"], Float[Tensor, " O"]]:
    """Symmetric 8-bit weights per output channel, and the value of one unit of each channel (largest / 127)."""
    step = weight.flatten(1).abs().amax(1) / LARGEST_WEIGHT
    step = torch.where(step > 0, step, torch.ones_like(step))
    units = weight / step.view(-1, *[1] * (weight.ndim - 1))
    return units.round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).to(torch.int8), step


def integer_weight(layer: nn.Module) -> tuple[Int8[Tensor, " O *rest"], Float[Tensor, " O"], int]:
    """Integers, step sizes and bits of a layer: its own if its weights are packed, else those of `quantize_weight`."""
    if isinstance(layer, PackedLayer):
        return layer.integers(), layer.alpha.expand(layer.shape[0]), layer.bits
    return *quantize_weight(layer.weight.detach()), 8


def fires_by_itself(neuron: Neuron) -> bool:
    """True if the neuron's counts depend on nothing but the present current, and grow with it.

    A convolution can then emit them.
    """
    single = not isinstance(neuron.threshold, Tensor) or neuron.threshold.numel() == 1
    alone = isinstance(neuron, ILIF | NILIF | IELIF) and not neuron.carries and single
    return alone and getattr(neuron, "gain", 1.0) / float(neuron.threshold) > 0


def to_uint8(x: Tensor, *, largest: int = LARGEST_COUNT) -> Counts:
    """Numbers 0..`largest` in floating point -> uint8, rounded down. torch takes eight times as long straight."""
    return x.to(torch.int8).view(torch.uint8) if largest < 128 else x.to(torch.int16).to(torch.uint8)


class CountNeuron(nn.Module):
    """Stands in a neuron's place and emits its counts: uint8, or where others read them `dtype`, each worth `unit`.

    `fused`: the convolution before it has already fired and brings the counts.  `exact_pixels`: of maps that are
    larger, what reads them would round in float32, so that they are float64; 0: no map is too large.
    """

    def __init__(
        self,
        neuron: Neuron,
        *,
        fused: bool,
        dtype: torch.dtype | None,
        unit: float | None = None,
        exact_pixels: int = 0,
    ) -> None:
        super().__init__()
        self.neuron = None if fused else neuron
        self.levels = neuron.levels
        self.unit = neuron.unit if unit is None else unit
        self.dtype, self.exact_pixels = dtype, exact_pixels
        self.stateless = fires_by_itself(neuron)
        self.half_up = isinstance(neuron, IELIF)
        self.half = torch.tensor(0.5)
        # If a current only changes its exponent, multiplying it and adding one half round once.
        alone = isinstance(neuron.threshold, float) and neuron.threshold == 1.0
        self.at_once = self.stateless and self.half_up and alone and math.frexp(neuron.gain)[0] == 0.5

    def forward(self, current: Tensor) -> Tensor:
        """Currents (or, if fused, counts) [T*B, ...] -> counts of the same shape."""
        counts = current if self.neuron is None else self.fire(current)
        if self.dtype is None:
            return counts if counts.dtype == torch.uint8 else to_uint8(counts, largest=self.levels)
        return self.spikes(counts)

    def spikes(self, counts: Tensor) -> Tensor:
        """Counts -> spikes in floating point."""
        wide = counts.to(self.wide_dtype(counts))
        return wide if self.unit == 1 else wide * self.unit

    def wide_dtype(self, counts: Tensor) -> torch.dtype:
        """Of the spikes that stand for a map of `counts`."""
        return torch.float64 if 0 < self.exact_pixels < counts.shape[2:].numel() else self.dtype

    def fire(self, x: Tensor) -> Tensor:
        """Counts of the currents `x`, in floating point, as is the membrane where there is one.

        As few passes over memory as the neuron's own arithmetic allows, bit for bit.
        """
        if self.at_once:
            levels = torch.add(self.half, x, alpha=self.neuron.gain).clamp_(0.5, self.levels + 0.5)
            return levels if self.dtype is None else levels.floor_()  # uint8 cuts the rest off
        if not self.stateless:
            return self.neuron.counts(self.neuron(x))
        levels = self.neuron.charge(x, None).clamp(0, self.levels)
        return levels.add_(0.5).floor_() if self.half_up else levels.round_()

    def counts(self, output: Tensor) -> Counts:
        """What `forward` gave -> counts."""
        return output if output.dtype == torch.uint8 else to_uint8((output / self.unit).round_())

    def describe(self) -> dict:
        """Plain values that, with the network's own neuron, build this again."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        values = {"fused": self.neuron is None, "dtype": dtype, "unit": self.unit}
        return values | {"exact_pixels": self.exact_pixels}

    def extra_repr(self) -> str:
        return f"levels={self.levels}, unit={self.unit:g}, fused={self.neuron is None}, dtype={self.dtype}"


class IntegerConv(nn.Module):
    """Convolution of counts with integer weights: uint8 [TB, C, H, W] -> float32, or uint8 if it fires.

    `unit`: what one input count is worth; `max_count`: the largest. `levels`: D of the neuron fused in, 0: none.
    `bits`: of a weight. Spikes that arrive in floating point, since others read them too, are counted first.
    Buffers: `weight` int8 [O, I/groups, kh, kw]; `scale`, `bias` float32 [O]; where it fires `thresholds` int32 [O, D].
    Built by `of`; this makes an empty one, for `load_state_dict`.
    """

    def __init__(
        self, geometry: Geometry, *, unit: float, max_count: int, levels: int = 0, bits: int = 8, fast: bool = True
    ) -> None:
        super().__init__()
        self.geometry, self.unit, self.max_count, self.levels, self.bits = geometry, unit, max_count, levels, bits
        self.wanted_fast = fast
        out = geometry.out_channels
        self.register_buffer("weight", torch.zeros(geometry.weight_shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out))
        self.register_buffer("bias", torch.zeros(out))
        if levels:
            self.register_buffer("thresholds", torch.zeros(out, levels, dtype=torch.int32))
        self._drop_cache()

    @classmethod
    def of(
        cls,
        layer: nn.Conv2d | nn.Linear,
        *,
        unit: float,
        max_count: int,
        neuron: Neuron | None = None,
        norm: nn.Module | None = None,
        fast: bool = True,
    ) -> "IntegerConv":
        """The integer form of `layer`, and of the neuron that alone reads it. Float weights are rounded to 8 bits.

        `norm`: one that rounds, between the two; where there is one, counts come from comparing sums with thresholds.
        """
        weight, step, bits = integer_weight(layer)
        levels = 0 if neuron is None else neuron.levels
        made = cls(Geometry.of(layer), unit=unit, max_count=max_count, levels=levels, bits=bits, fast=fast)
        bias = step.new_zeros(len(step)) if layer.bias is None else layer.bias.detach()
        gain = 1.0 if neuron is None else getattr(neuron, "gain", 1.0) / float(neuron.threshold)
        made.weight.copy_(weight.view(made.weight.shape))
        made.scale.copy_(step.detach().double() * unit * gain)
        made.bias.copy_(bias.double() * gain)
        if neuron is not None:
            value, shift = step.detach().double() * unit, bias.double()

            def respond(sums: Tensor) -> Tensor:
                currents = sums * value[:, None] + shift[:, None]
                return neuron.counts(neuron(currents if norm is None else norm(currents.mT).mT))

            falls = (norm.scale() < 0) ^ (value < 0) if norm is not None else value < 0
            made.scale.copy_(torch.where(falls, -made.scale.abs(), made.scale.abs()))
            made._threshold(respond)
        return made

    @torch.no_grad()
    def _threshold(self, respond: Callable[[Tensor], Tensor]) -> None:
        """Find the thresholds by bisection, and a float32 bias under which the primitive meets them all.

        `respond`: integer sums in float64 [O, n] -> counts [O, n], monotone in the sums.
        """
        sign = self.sign[:, None].long()
        wanted = torch.arange(1, self.levels + 1)
        reach = self.reach[:, None]
        low, high = (-reach - 1).expand(-1, self.levels), (reach + 1).expand(-1, self.levels)
        for _ in range(int(reach.max()).bit_length() + 2):
            middle = (low + high).div(2, rounding_mode="floor")
            enough = respond((sign * middle).double()) >= wanted
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        self.thresholds.copy_(high)
        exact, missing = self.bias.clone(), ~self.meets(self.bias)
        last_place = exact.abs().clamp(min=self.levels) * EPSILON
        for steps in NUDGES:
            if not missing.any():
                break
            nudged = exact + steps * last_place
            better = missing & self.meets(nudged)
            self.bias.copy_(torch.where(better, nudged, self.bias))
            missing &= ~better

    @property
    def sign(self) -> Tensor:
        """-1 for channels whose counts fall with their sums, else 1; int32 [O]."""
        return torch.where(self.scale < 0, -1, 1).int()

    @property
    def reach(self) -> Tensor:
        """The largest absolute sum of each channel; int64 [O]."""
        return self.max_count * self.weight.flatten(1).long().abs().sum(1)

    def meets(self, bias: Float[Tensor, " O"]) -> Tensor:
        """Channels whose float32 epilogue, with this bias, fires as the thresholds say; bool [O]."""
        sums = self.thresholds.long()
        reachable = [(sums <= self.reach[:, None]), (sums - 1 >= -self.reach[:, None])]
        wanted = torch.arange(1, self.levels + 1, device=sums.device)
        at, below = (self._rounded(each, bias) for each in (sums, sums - 1))
        return (((at >= wanted) | ~reachable[0]) & ((below < wanted) | ~reachable[1])).all(1)

    def _rounded(self, sums: Tensor, bias: Tensor) -> Tensor:
        """What the primitive makes of `sums` [O, n] (times -1 where the scale is negative)."""
        y = (self.sign[:, None] * sums).float() * self.scale[:, None] + bias[:, None]
        return y.clamp(0, self.levels).round()

    def forward(self, x: Tensor) -> Tensor:
        counts = x if x.dtype == torch.uint8 else to_uint8((x / self.unit).round_(), largest=self.max_count)
        return self.primitive(counts) if self.runs_fast(counts) else self.readable(counts)

    def runs_fast(self, counts: Tensor) -> bool:
        """True if the primitive may take these counts."""
        return counts.device.type == "cpu" and self.fast and primitive_agrees()

    @property
    def fast(self) -> bool:
        """True unless a CPU without VNNI could saturate, float32 not hold a sum, or the readable path was asked for."""
        if self._fits is None:
            pairs = 2 * self.max_count * int(self.weight.long().abs().max())
            self._fits = pairs <= PAIR_LIMIT and int(self.reach.max()) <= EXACT_FLOAT32
        return self.wanted_fast and self._fits

    @property
    def emits(self) -> bool:
        """True if the primitive itself gives the counts; else it gives sums, compared with the thresholds here."""
        if self._emits is None:
            self._emits = bool(self.levels) and bool(self.meets(self.bias).all())
        return self._emits

    def readable(self, counts: Counts) -> Tensor:
        """The definition. Sums are exact in float64 whatever algorithm the convolution runs (float32 may be TF32)."""
        sums = F.conv2d(counts.double(), self.weight.double(), None, *self.geometry.moves)
        if self.levels:
            return self.crossed(sums)
        y = sums.float().mul_(self.scale.view(-1, 1, 1)).add_(self.bias.view(-1, 1, 1))
        return y.contiguous(memory_format=torch.channels_last)

    def crossed(self, sums: Float[Tensor, "TB O H W"]) -> Counts:
        """How many thresholds each sum reaches."""
        sums = sums * self.sign.view(-1, 1, 1)
        counts = torch.zeros(sums.shape, dtype=torch.uint8, device=sums.device)
        for threshold in self.thresholds.T:
            counts += sums >= threshold.view(-1, 1, 1)
        return counts.contiguous(memory_format=torch.channels_last)

    def primitive(self, counts: Counts) -> Tensor:
        """The same numbers from one call."""
        run = self.prepared.get(counts.shape)
        if run is None:
            run = self.prepared[counts.shape] = self.prepare(counts.shape)
        return run(counts)

    def prepare(self, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        """`primitive` for inputs of `shape`, with the weights as oneDNN lays them out for that.

        Prepared for another shape, weights are laid out anew in every call: up to 60 times slower (measured).
        """
        if len(self.prepared) == PREPARED_SHAPES:
            self.prepared.clear()
        sums = bool(self.levels) and not self.emits
        scale, bias = (torch.ones_like(self.scale), torch.zeros_like(self.bias)) if sums else (self.scale, self.bias)
        end = (torch.uint8, "hardtanh", [0, self.levels]) if self.emits else (torch.float32, "none", [])
        moves, zero = self.geometry.moves, torch.zeros(1, dtype=torch.int32)
        weight = torch.ops.onednn.qconv_prepack(self.weight.contiguous(), scale, 1.0, 0, *moves, shape)
        run = torch.ops.onednn.qconv2d_pointwise.default

        def primitive(counts: Tensor) -> Tensor:
            y = run(counts, 1.0, 0, weight, scale, zero, bias, *moves, 1.0, 0, *end, None)
            return self.crossed(y) if sums else y

        return primitive

    def describe(self) -> dict:
        """Plain values that build an empty layer of these sizes."""
        sizes = {"unit": self.unit, "max_count": self.max_count, "levels": self.levels, "bits": self.bits}
        return {"geometry": self.geometry.describe(), **sizes}

    def _drop_cache(self) -> None:
        """Forget what was computed from the buffers."""
        self.prepared: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
        self._emits: bool | None = None
        self._fits: bool | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"prepared": {}}  # prepared weights belong to this process and cannot be copied

    def _load_from_state_dict(self, *args) -> None:
        self._drop_cache()
        super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse=True):
        self._drop_cache()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        sizes = self.geometry
        shape = f"{sizes.in_channels}, {sizes.out_channels}, kernel={sizes.kernel}"
        return f"{shape}, levels={self.levels}, unit={self.unit:g}, bits={self.bits}"


class IntegerLinear(IntegerConv):
    """nn.Linear on counts, as a 1x1 convolution: uint8 [..., C] -> float32 [..., O] (uint8 if it fires)."""

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
                layer = IntegerConv.of(conv, unit=1.0, max_count=max_count, neuron=neuron)
                shape = (2, inside, 9, 9)
                counts = torch.randint(0, max_count + 1, shape, generator=generator, dtype=torch.uint8)
                if not torch.equal(layer.primitive(counts), layer.readable(counts)):
                    logger.warning("oneDNN's integer convolution differs here: the engine takes its readable path")
                    return False
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        logger.warning("no oneDNN integer convolution here (%s): the engine takes its readable path", error)
        return False
    return True
