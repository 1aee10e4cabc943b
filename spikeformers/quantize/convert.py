"""`convert`: integer weights packed bit by bit, batch norms as one scale and one shift; and what all that weighs.

Paper: QSD-Transformer, Tables 1 and 9 (sizes), App. D (fusion). Nothing is approximated: a packed layer multiplies by
the very weights that the trained one did, and a scale and shift are what a batch norm computes in eval mode.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.layers import NormChain, bn_affine
from spikeformers.quantize.bounds import exact_bits
from spikeformers.quantize.exact import NORMS, ExactDepthwise, FixedPointNorm, fixed_point
from spikeformers.quantize.lsq import LSQLayer, integer_range


def pack(integers: Int8[Tensor, " *shape"], *, bits: int) -> UInt8[Tensor, " bytes"]:
    """Integers Qn..Qp, `bits` bits each, one behind the other, lowest bit first; the last byte is filled with zeros."""
    low, _ = integer_range(bits)
    values = (integers.flatten().to(torch.int16) - low).to(torch.uint8)
    spread = (values[:, None] >> _places(bits, values)) & 1
    flat = F.pad(spread.flatten(), (0, -spread.numel() % 8)).view(-1, 8)
    return (flat << _places(8, flat)).sum(1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, " bytes"], *, bits: int, shape: tuple[int, ...]) -> Int8[Tensor, " *shape"]:
    """What `pack` packed."""
    low, _ = integer_range(bits)
    count = math.prod(shape)
    flat = ((packed[:, None] >> _places(8, packed)) & 1).flatten()[: count * bits].view(count, bits)
    return ((flat << _places(bits, flat)).sum(1, dtype=torch.int16) + low).to(torch.int8).view(shape)


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


class PackedLayer(nn.Module):
    """What a layer with packed weights adds: `packed` (uint8), step sizes `alpha` and, after LSQ+, an `offset`."""

    bits: int
    shape: tuple[int, ...]

    @torch.no_grad()
    def attach(
        self, *, bits: int, shape: tuple[int, ...], packed: Tensor, alpha: Tensor, offset: Tensor | None
    ) -> None:
        """Make the buffers of a layer that has just become one of this class; its weight goes."""
        self.bits, self.shape = bits, shape
        del self.weight
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.register_buffer("packed", packed)
        self.register_buffer("alpha", alpha)
        self.register_buffer("offset", offset)
        self.unpacked: Tensor | None = None

    def step(self) -> Float[Tensor, " A"]:
        """The step sizes, `alpha`."""
        return self.alpha

    def quantized_bias(self) -> Tensor | None:
        """The bias that the layer adds."""
        return self.bias

    def integers(self) -> Int8[Tensor, " O *rest"]:
        """The weight in units of its step sizes, Qn..Qp."""
        return unpack(self.packed, bits=self.bits, shape=self.shape)

    def quantized_weight(self) -> Float[Tensor, " O *rest"]:
        """The weight that the layer multiplies by; unpacked at the first call."""
        kept = self.unpacked
        if kept is None or (kept.device, kept.dtype) != (self.alpha.device, self.alpha.dtype):
            shape = (-1, *[1] * (len(self.shape) - 1))
            # A first call in inference mode would keep a tensor that no later gradient could pass by.
            with torch.inference_mode(False), torch.no_grad():
                kept = self.integers().to(self.alpha.dtype) * self.alpha.view(shape)
                self.unpacked = kept if self.offset is None else kept + self.offset.view(shape)
        return self.unpacked

    def absorb(self, scale: Float[Tensor, " O"], shift: Float[Tensor, " O"]) -> None:
        """Also do what y = scale x + shift would do behind this layer, by step sizes and bias."""
        bias = 0 if self.bias is None else self.bias
        self.alpha = (self.alpha * scale).detach().clone()
        self.offset = None if self.offset is None else self.offset * scale
        self.bias = nn.Parameter((bias * scale + shift).expand(self.shape[0]).clone(), requires_grad=False)
        self.unpacked = None

    def to_plain(self) -> None:
        """Become torch's own layer with that weight."""
        weight = self.quantized_weight()
        for name in ("packed", "alpha", "offset", "bits", "shape", "unpacked"):
            delattr(self, name)
        self.__class__ = PLAIN_OF[type(self)]
        self.weight = nn.Parameter(weight)

    def _load_from_state_dict(self, *args) -> None:
        self.unpacked = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"unpacked": None}  # a copy or a pickle stays small

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, bits={self.bits}"


class PackedConv1d(PackedLayer, nn.Conv1d):
    """nn.Conv1d with packed weights."""

    def forward(self, x: Float[Tensor, "B C N"]) -> Float[Tensor, "B O M"]:
        return self._conv_forward(x, self.quantized_weight(), self.bias)


class PackedConv2d(PackedLayer, nn.Conv2d):
    """nn.Conv2d with packed weights."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O _ _"]:
        return self._conv_forward(x, self.quantized_weight(), self.bias)


class PackedDepthwise(PackedConv2d):
    """A packed `ExactDepthwise`, which see."""

    grid: float
    limit: float

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C _ _"]:
        return fixed_point(super().forward(x), grid=self.grid, limit=self.limit)


class PackedLinear(PackedLayer, nn.Linear):
    """nn.Linear with packed weights."""

    def forward(self, x: Float[Tensor, " *batch C"]) -> Float[Tensor, " *batch O"]:
        return F.linear(x, self.quantized_weight(), self.bias)


PACKED_OF = {nn.Conv1d: PackedConv1d, nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}
PLAIN_OF = {packed: plain for plain, packed in PACKED_OF.items()}


class ChannelAffine(nn.Module):
    """y = weight x + bias per channel: what a batch norm is in eval mode, and here in train mode too.

    It runs as a batch norm of mean 0, variance 1 and eps 0, so that rounding stays what it was.
    """

    @torch.no_grad()
    def attach(self) -> None:
        """Fold the statistics of a batch norm that has just become one of this class into its weight and bias."""
        mean, variance, zero = self.running_mean, self.running_var, torch.zeros_like(self.running_mean)
        # The norm of 1 around mean 0, and of 0: rounded as torch's kernel rounds them, in whatever order it multiplies.
        one, nought = torch.ones_like(mean)[None], zero[None]
        scale = F.batch_norm(one, zero, variance, self.weight, None, False, 0.0, self.eps)[0]
        shift = F.batch_norm(nought, mean, variance, self.weight, self.bias, False, 0.0, self.eps)[0]
        self.norm_eps = self.eps
        self.weight, self.bias = (nn.Parameter(each, requires_grad=False) for each in (scale, shift))
        self.register_buffer("running_mean", torch.zeros_like(scale), persistent=False)
        self.register_buffer("running_var", torch.ones_like(scale), persistent=False)
        self.num_batches_tracked = None
        self.eps = 0.0

    def _load_from_state_dict(self, *args) -> None:
        nn.Module._load_from_state_dict(self, *args)  # a batch norm's would want the counter that is gone

    def forward(self, x: Float[Tensor, " B C *rest"]) -> Float[Tensor, " B C *rest"]:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def to_plain(self) -> None:
        """Become a batch norm again, that of mean 0 and variance 1 - eps."""
        self.__class__ = NORM_OF[type(self)]
        self.eps = self.norm_eps
        del self.norm_eps
        self.register_buffer("running_mean", self.running_mean)
        self.register_buffer("running_var", self.running_var - self.eps)
        self.num_batches_tracked = torch.zeros((), dtype=torch.long, device=self.weight.device)


class ChannelAffine1d(ChannelAffine, nn.BatchNorm1d):
    """nn.BatchNorm1d as a scale and a shift."""


class ChannelAffine2d(ChannelAffine, nn.BatchNorm2d):
    """nn.BatchNorm2d as a scale and a shift."""


AFFINE_OF = {nn.BatchNorm1d: ChannelAffine1d, nn.BatchNorm2d: ChannelAffine2d}
NORM_OF = {affine: norm for norm, affine in AFFINE_OF.items()}


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Turn a prepared `model` into what is stored and shipped, in place and in eval mode; returns it.

    Quantised weights become packed integers and step sizes, batch norms one scale and one shift per channel. Every
    prediction stays, on a CPU in 32 or 64 bits bit for bit (but borders of RepConv, and norms of maps that are neither
    contiguous nor channels-last, round otherwise). The float weights are gone: keep a copy of what should train on.
    An exact network stays exact, in all of it.
    Raises ValueError if no layer is quantised, a step size is zero, a weight not finite, or an exact network's sums may
    pass 24 bits; nothing is changed then.
    """
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, LSQLayer)]
    if not layers and any(isinstance(each, PackedLayer) for each in model.modules()):
        raise ValueError("this model was converted already")
    if not layers:
        raise ValueError("no layer of this model has quantised weights: call quantize.prepare first")
    for name, layer in layers:
        if not bool(layer.quantized_weight().isfinite().all() & (layer.alpha != 0).all()):
            who = name or type(layer).__name__
            raise ValueError(f"{who} has a step size of zero or weights that are not finite, so these have no integers")
    if any(isinstance(module, FixedPointNorm) for module in model.modules()):
        exact_bits(model)
    for _, layer in layers:
        _pack_layer(layer)
    for module in model.modules():
        norm = norm_of(module)
        if isinstance(module, FixedPointNorm):
            scale, shift = module.scale(), module.shift()
            _, module.__class__ = NORMS[norm]
            module.attach(scale=scale, shift=shift)
        elif norm is not None and module.running_mean is not None:
            module.__class__ = AFFINE_OF[norm]
            module.attach()
    _record(model, "converted")
    return model.eval()


def _pack_layer(layer: nn.Module) -> None:
    """Turn one layer into the packed one that computes the same."""
    packed = pack(layer.integers(), bits=layer.bits)
    bits, shape, alpha = layer.bits, tuple(layer.weight.shape), layer.step().detach()
    offset = None if layer.offset is None else layer.offset.detach()
    bias, rounds = layer.quantized_bias(), (layer.grid, layer.limit) if isinstance(layer, ExactDepthwise) else None
    layer.release()
    if bias is not layer.bias:
        layer.bias = nn.Parameter(bias.detach())
    if rounds is None:
        layer.__class__ = PACKED_OF[type(layer)]
    else:
        layer.__class__ = PackedDepthwise
        layer.grid, layer.limit = rounds
    layer.attach(bits=bits, shape=shape, packed=packed, alpha=alpha, offset=offset)


def norm_of(module: nn.Module) -> type[nn.Module] | None:
    """The batch norm of torch that `module` computes as, or rounded is; one with another `forward` may do more."""
    kinds = (norm for norm in AFFINE_OF if isinstance(module, norm))
    return next((norm for norm in kinds if _computes_as(module, norm)), None)


def _computes_as(module: nn.Module, norm: type[nn.Module]) -> bool:
    return type(module).forward is norm.forward or isinstance(module, FixedPointNorm)


def _record(model: nn.Module, event: str) -> None:
    """Note what was done to `model` with every module in it that `prepare` was given."""
    for module in model.modules():
        if getattr(module, "quantization", None):
            module.quantization = module.quantization | {event: True}


def _norm_chains(module: nn.Module) -> Iterator[NormChain]:
    """The layers with norms right behind them that `module` holds."""
    if hasattr(module, "norm_chain"):
        yield module.norm_chain()
    elif type(module) is nn.Sequential:
        for (_, layer), (name, norm) in pairwise(module.named_children()):
            if isinstance(norm, ChannelAffine):
                yield layer, ((module, name),)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Fold norms right behind packed layers into their step sizes and bias, in place; returns `model`.

    It knows those of this package's layers and of torch's plain nn.Sequential; other networks keep their norms.

    alpha' = scale alpha, bias' = scale bias + shift: integer weights stay, an MPRF costs nothing (App. D, Eqs. 25-26).
    Exact up to rounding: in float64, spikes equal and logits within 1e-12.
    Raises ValueError if `model` has not been converted, or is exact: rounding stands between its layers and norms.
    """
    if any(isinstance(each, FixedPointNorm) for each in model.modules()):
        raise ValueError("an exact network's norms round what they give, so they fold into no layer: leave fold out")
    if not any(isinstance(each, PackedLayer) for each in model.modules()):
        raise ValueError("nothing to fold into: call quantize.convert first")
    for module in list(model.modules()):
        for layer, norms in _norm_chains(module):
            for holder, name in norms if isinstance(layer, PackedLayer) else ():
                norm = getattr(holder, name)
                if not isinstance(norm, nn.Identity):  # not folded already
                    layer.absorb(*bn_affine(norm))
                    setattr(holder, name, nn.Identity())
    _record(model, "folded")
    return model


@dataclass(frozen=True)
class Size:
    """What a model weighs. MB are 10^6 bytes.

    `parameters`: weights, biases and the scales and shifts of norms, without step sizes; as 32-bit floats they take
    `fp32_mb`.  `paper_m`: millions of "Param" as the paper counts: a weight of `bits` bits is bits/32 of one, a float
    one is one, and nothing else is charged.  `packed_mb`: what `convert` stores, scales, shifts, step sizes and biases
    included.
    """

    parameters: int
    fp32_mb: float
    paper_m: float
    packed_mb: float


def size(model: nn.Module) -> Size:
    """Sizes of a model, prepared, converted, or neither (every weight is then a 32-bit float)."""
    quantized = packed = rest = 0
    charged = 0.0
    float32: dict[nn.Parameter, int] = {}  # by identity: layers may share one
    for module in model.modules():
        if isinstance(module, LSQLayer | PackedLayer):
            weights = module.weight.numel() if isinstance(module, LSQLayer) else math.prod(module.shape)
            quantized += weights
            charged += weights * module.bits / 32
            packed += math.ceil(weights * module.bits / 8)
            rest += sum(each.numel() for each in (module.alpha, module.offset) if each is not None)
            kept = [module.bias] if module.bias is not None else []
        else:
            kept = module.parameters(recurse=False)
            charged += module.weight.numel() if isinstance(module, tuple(PACKED_OF)) else 0
        float32 |= {each: each.numel() for each in kept}
    parameters = sum(float32.values())
    total = parameters + quantized
    return Size(total, 4 * total / 1e6, charged / 1e6, (packed + 4 * (parameters + rest)) / 1e6)
