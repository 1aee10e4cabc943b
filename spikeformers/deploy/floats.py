"""Layers on real numbers whose rounding, and so every spike after it, ignores the batch size.

oneDNN's float convolution, its weights prepared once, which for small layers is a third faster than asking for it anew
in every call. A batch goes through it whole if a trial gives each image the bits that it has alone, else image by
image. Low-bit weights stay integers in memory and are widened where they are used.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.deploy.geometry import Geometry
from spikeformers.quantize import PackedLayer

PREPARED_SHAPES = 8  # input shapes for which a layer keeps prepared weights; five maps may share one layer
Run = Callable[[Tensor], Tensor]


class FloatConv(nn.Module):
    """Convolution of real numbers: float32 [TB, C, H, W] -> float32 [TB, O, H', W'], channels last.

    `bits` 32: buffer `weight` is float32; fewer: it is int8, in units of a buffer `step` float32 [O].  `bias` float32.
    Built by `of`; this makes an empty one, for `load_state_dict`.
    """

    def __init__(self, geometry: Geometry, *, bits: int = 32) -> None:
        super().__init__()
        self.geometry, self.bits = geometry, bits
        dtype = torch.float32 if bits == 32 else torch.int8
        self.register_buffer("weight", torch.zeros(geometry.weight_shape, dtype=dtype))
        if bits < 32:
            self.register_buffer("step", torch.ones(geometry.out_channels))
        self.register_buffer("bias", torch.zeros(geometry.out_channels))
        self.prepared: dict[tuple[torch.Size, int], Run] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Conv2d | nn.Linear) -> "FloatConv":
        """The same layer; one whose weights are packed integers (without an offset) keeps them."""
        low = isinstance(layer, PackedLayer) and layer.offset is None
        made = cls(Geometry.of(layer), bits=layer.bits if low else 32)
        weight = layer.integers() if low else layer.weight
        made.weight.copy_(weight.view(made.weight.shape))
        if low:
            made.step.copy_(layer.alpha)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
        return made

    def float_weight(self) -> Float[Tensor, "O I kh kw"]:
        """The weight that the layer multiplies by."""
        return self.weight if self.bits == 32 else self.weight * self.step.view(-1, 1, 1, 1)

    def forward(self, x: Float[Tensor, "TB C H W"]) -> Float[Tensor, "TB O _ _"]:
        x = x.contiguous(memory_format=torch.channels_last)
        if x.device.type != "cpu" or not prepares_weights():
            weight = self.float_weight()
            return torch.cat([F.conv2d(image, weight, self.bias, *self.geometry.moves) for image in x.split(1)])
        key = (x.shape, torch.get_num_threads())
        run = self.prepared.get(key)
        if run is None:
            if len(self.prepared) == PREPARED_SHAPES:
                self.prepared.clear()
            run = self.prepared[key] = self.prepare(x.shape)
        return run(x)

    def prepare(self, shape: torch.Size) -> Run:
        """This layer for inputs of `shape`: all images at once, where that changes no bit of them."""
        alone = self._laid_out((1, *shape[1:]))
        if shape[0] == 1:
            return alone
        # How a sum is ordered depends on sizes and threads: what is equal for random numbers is equal for all.
        together, trial = self._laid_out(shape), torch.randn(shape, generator=torch.Generator().manual_seed(0))
        trial = trial.contiguous(memory_format=torch.channels_last)
        one_by_one = _one_by_one(alone)
        return together if torch.equal(together(trial), one_by_one(trial)) else one_by_one

    def _laid_out(self, shape: tuple[int, ...]) -> Run:
        """oneDNN's convolution with the weights laid out for inputs of `shape`."""
        stride, padding, dilation, groups = self.geometry.moves
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = self.float_weight().to_mkldnn(), self.bias
            weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, padding, stride, dilation, groups, list(shape))
        run = torch.ops.mkldnn._convolution_pointwise.default
        return lambda x: run(x, weight, bias, padding, stride, dilation, groups, "none", [], "")

    def describe(self) -> dict:
        """Plain values that build an empty layer of these sizes."""
        return {"geometry": self.geometry.describe(), "bits": self.bits}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"prepared": {}}  # prepared weights belong to this process and cannot be copied

    def _load_from_state_dict(self, *args) -> None:
        self.prepared = {}
        super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse=True):
        self.prepared = {}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        sizes = self.geometry
        return f"{sizes.in_channels}, {sizes.out_channels}, kernel={sizes.kernel}, bits={self.bits}"


class FloatLinear(FloatConv):
    """nn.Linear on real numbers: float32 [TB, ..., C] -> float32 [TB, ..., O]."""

    def forward(self, x: Float[Tensor, "TB *shape C"]) -> Float[Tensor, "TB *shape O"]:
        weight = self.float_weight().flatten(1)
        return torch.cat([F.linear(row, weight, self.bias) for row in x.split(1)])


class PerImage(nn.Module):
    """A layer with a padding that FloatConv does not know, image by image."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "TB C H W"]) -> Float[Tensor, "TB O _ _"]:
        return torch.cat([self.layer(image) for image in x.split(1)])


def _one_by_one(run: Run) -> Run:
    return lambda x: torch.cat([run(image) for image in x.split(1)])


@functools.cache
def prepares_weights() -> bool:
    """True if this process has oneDNN's convolution with prepared weights, and it is F.conv2d; asked once."""
    conv = FloatConv(Geometry(6, 8, (3, 3), padding=(1, 1)))
    generator = torch.Generator().manual_seed(0)
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    image = torch.randn(1, 6, 9, 9, generator=generator).contiguous(memory_format=torch.channels_last)
    try:
        found = conv.prepare(image.shape)(image)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(found, F.conv2d(image, conv.weight, conv.bias, padding=1), rtol=1e-4, atol=1e-5)
