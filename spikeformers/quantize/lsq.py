"""LSQ: weights rounded to a few bits while they train, each output channel by a learned step size.

Paper: QSD-Transformer, Eqs. 4-5, after Esser et al., ICLR 2020 (LSQ) and Bhalgat et al., 2020 (LSQ+: the offset).
Departures from the paper: none in the mathematics; where the text leaves things open, the authors' code decides: one
step size for every output channel, all started at 2 mean|W| / sqrt(Qp), and a gradient scale that counts all weights.
Gradients are written out, ends of the range included: how torch differentiates a clamp at its ends varies by version.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

FEWEST_BITS, MOST_BITS = 2, 8
DERIVED = ("alpha", "offset")  # tensors that loading can compute from the weights


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed weight, Qn and Qp: -8 and 7 for 4 bits.

    Raises ValueError for bits that are no whole number from 2 to 8.
    """
    if type(bits) is not int or not FEWEST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"bits must be between {FEWEST_BITS} and {MOST_BITS}, got {bits!r}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class _FakeQuantize(Function):
    """round(clamp(v, Qn, Qp)) alpha + offset with v = (W - offset) / alpha, rounding half to even."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, alpha: Tensor, offset: Tensor | None, low: int, high: int, scale: float) -> Tensor:
        q = _units(weight, alpha, offset).clamp(low, high).round() * alpha
        return q if offset is None else q + offset

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, alpha, offset, ctx.low, ctx.high, ctx.scale = inputs
        ctx.save_for_backward(weight, alpha, offset)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, alpha, offset = ctx.saved_tensors
        v = _units(weight, alpha, offset)
        inside = (v >= ctx.low) & (v <= ctx.high)
        slope = v.clamp(ctx.low, ctx.high).round() - v * inside
        grad_alpha = (grad * slope).sum_to_size(alpha.shape) * ctx.scale
        grad_offset = None if offset is None else (grad * ~inside).sum_to_size(offset.shape) * ctx.scale
        return grad * inside, grad_alpha, grad_offset, None, None, None


def _units(weight: Tensor, alpha: Tensor, offset: Tensor | None) -> Tensor:
    """The weight in units of its step size."""
    return (weight if offset is None else weight - offset) / alpha


def fake_quantize(
    weight: Float[Tensor, " O *rest"], alpha: Float[Tensor, " A"], offset: Float[Tensor, " A"] | None, *, bits: int
) -> Float[Tensor, " O *rest"]:
    """The weights that `bits` bits can hold, in float: integers Qn..Qp times `alpha` (plus `offset`), A = O or 1.

    Gradients, with v = (W - offset) / alpha and in = (Qn <= v <= Qp): 1[in] for the weight; for the step size of a
    channel g * sum(grad * (round(clamp(v)) - v 1[in])); for its offset g * sum(grad * 1[not in]); g = 1/sqrt(numel Qp).
    Source: QSD-Transformer, Eq. 4; LSQ, Eqs. 1-5; LSQ+, Eqs. 3-5.
    """
    low, high = integer_range(bits)
    shape = (-1, *[1] * (weight.ndim - 1))
    scale = 1 / math.sqrt(weight.numel() * high)
    shift = None if offset is None else offset.view(shape)
    return _FakeQuantize.apply(weight, alpha.view(shape), shift, low, high, scale)


class LSQLayer(nn.Module):
    """What a layer with quantised weights adds: `bits`, the step size `alpha` [O] (or [1]) and, in LSQ+, an `offset`.

    `weight` stays the float one that trains, so names and checkpoints fit; without step sizes these are computed.
    """

    plain: ClassVar[type[nn.Module]]
    bits: int
    alpha: nn.Parameter
    offset: nn.Parameter | None

    def attach(self, *, bits: int, per_channel: bool, offset: bool) -> None:
        """Give a layer that has just become one of this class its step sizes."""
        integer_range(bits)
        self.bits = bits
        count = self.weight.shape[0] if per_channel else 1
        self.alpha = nn.Parameter(self.weight.detach().new_empty(count))
        self.register_parameter("offset", nn.Parameter(self.weight.detach().new_zeros(count)) if offset else None)
        self.reset_step()

    @torch.no_grad()
    def reset_step(self) -> None:
        """alpha = 2 mean|W| / sqrt(Qp), the same for every channel.

        Where all weights are zero, that of the weights torch starts with: zeros in steps of 1 would stay zeros.
        """
        mean = self.weight.abs().mean()
        usual = torch.full_like(mean, 1 / (2 * math.sqrt(self.weight[0].numel())))  # uniform, up to 1 / sqrt(inputs)
        step = 2 * torch.where(mean > 0, mean, usual) / math.sqrt(integer_range(self.bits)[1])
        self.alpha.copy_(step.expand_as(self.alpha))
        if self.offset is not None:
            self.offset.zero_()

    def quantized_weight(self) -> Tensor:
        """The weight that the layer multiplies by."""
        return fake_quantize(self.weight, self.step(), self.offset, bits=self.bits)

    def quantized_bias(self) -> Tensor | None:
        """The bias that the layer adds: here the float one."""
        return self.bias

    def step(self) -> Float[Tensor, " A"]:
        """The step sizes in use: here `alpha` itself."""
        return self.alpha

    @torch.no_grad()
    def integers(self) -> Int8[Tensor, " O *rest"]:
        """The weight in units of its step sizes, Qn..Qp."""
        shape = (-1, *[1] * (self.weight.ndim - 1))
        offset = None if self.offset is None else self.offset.view(shape)
        units = _units(self.weight, self.step().view(shape), offset)
        return units.clamp(*integer_range(self.bits)).round().to(torch.int8)

    def release(self) -> None:
        """Become torch's own layer again, with the float weight that trained."""
        for name in ("bits", *DERIVED):
            delattr(self, name)
        self.__class__ = self.plain

    @torch.no_grad()
    def to_plain(self) -> None:
        """Become torch's own layer with the weight that this one multiplied by."""
        weight = self.quantized_weight()
        self.release()
        self.weight = nn.Parameter(weight, self.weight.requires_grad)  # a new one: another layer may share the old

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        steps = {prefix + name: name for name in DERIVED if getattr(self, name) is not None}
        if prefix + "weight" not in state_dict or any(key in state_dict for key in steps):
            return
        for name in steps.values():
            step, weight = getattr(self, name), self.weight
            if (step.device, step.dtype) != (weight.device, weight.dtype):  # after load_state_dict(..., assign=True)
                setattr(self, name, nn.Parameter(torch.empty_like(step, device=weight.device, dtype=weight.dtype)))
        self.reset_step()
        missing[:] = [key for key in missing if key not in steps]

    def extra_repr(self) -> str:
        steps = "per channel" if len(self.alpha) == self.weight.shape[0] else "one step"
        return f"{super().extra_repr()}, bits={self.bits}, {steps}{', offset' if self.offset is not None else ''}"


class LSQConv1d(LSQLayer, nn.Conv1d):
    """nn.Conv1d with quantised weights."""

    plain = nn.Conv1d

    def forward(self, x: Float[Tensor, "B C N"]) -> Float[Tensor, "B O M"]:
        return self._conv_forward(x, self.quantized_weight(), self.quantized_bias())


class LSQConv2d(LSQLayer, nn.Conv2d):
    """nn.Conv2d with quantised weights."""

    plain = nn.Conv2d

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O _ _"]:
        return self._conv_forward(x, self.quantized_weight(), self.quantized_bias())


class LSQLinear(LSQLayer, nn.Linear):
    """nn.Linear with quantised weights."""

    plain = nn.Linear

    def forward(self, x: Float[Tensor, " *batch C"]) -> Float[Tensor, " *batch O"]:
        return F.linear(x, self.quantized_weight(), self.quantized_bias())


LSQ_OF: dict[type[nn.Module], type[LSQLayer]] = {each.plain: each for each in (LSQConv1d, LSQConv2d, LSQLinear)}
