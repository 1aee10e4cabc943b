"""SDDA, spike-driven deformable attention: every pixel reads nine points around it that it chooses itself.

Paper: Spike2Former, Eq. 4 (`deformable_sampling`), Eqs. 5-8 (`SDDA`), Fig. 2 (`sampling_points`, `SpikingQuerySDDA`).
The G groups share a map's channels; K = 9 points start at the pixels of the 3x3 window and move by learned offsets;
the attention weights A are spikes, not softmax, so that sampled values are added up where A fires. The bilinear taps
in front of that are products of real numbers (in `SpikingQuerySDDA` the weights are, too).
Departures from the paper: W_g and W'_g are an ESC in front and one behind, as in the authors' code (Eq. 5 names one).
`ReleasedSDDA` keeps the slips of the authors' code, for their checkpoints; `SoftmaxSDDA` is the ordinary form.
"""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.layers.block import Mixer
from spikeformers.layers.conv_bn import ConvBN
from spikeformers.layers.esc import ESC
from spikeformers.neurons import NeuronBuilder, as_membrane

POINTS = 9  # K of Eq. 4: the 3x3 window
WIDE_ESC = partial(ESC, kernel=5)


def points_of(offsets: Float[Tensor, "TB G 9 2 H W"]) -> Float[Tensor, "TB G 9 2 H W"]:
    """p_0 + p_k + offset as (x, y) in pixels, (0, 0) the centre of the first one; k runs down the window's columns."""
    height, width = offsets.shape[-2:]
    as_offsets = {"dtype": offsets.dtype, "device": offsets.device}
    window = torch.arange(-1, 2, **as_offsets)
    x = window.repeat_interleave(3).view(-1, 1, 1) + torch.arange(width, **as_offsets)
    y = window.repeat(3).view(-1, 1, 1) + torch.arange(height, **as_offsets).view(-1, 1)
    return offsets + torch.stack(torch.broadcast_tensors(x, y), 1)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    power = 1
    while power < size:
        power *= 2
    return power


def bilinear(
    values: Real[Tensor, "TB C H W"], points: Float[Tensor, "TB G 9 2 H W"]
) -> Float[Tensor, "TB G C//G 9 H W"]:
    """`values` of each group at its points, zero outside the map; G divides C.

    grid_sample counts in fractions of the map's size. Those of a power of two are exact, so that the map is padded to
    one: a fresh layer's points are whole pixels, and a rounded one would take its slope from either side by chance.
    """
    groups, size = points.shape[1], points.shape[-2:]
    height, width = (power_of_two(side) for side in size)
    padded = F.pad(values, (0, width - size[1], 0, height - size[0]))
    x, y = points.unbind(3)
    grid = torch.stack((x * (2 / width) + (1 / width - 1), y * (2 / height) + (1 / height - 1)), -1)
    maps = padded.unflatten(1, (groups, -1)).flatten(0, 1)
    sampled = F.grid_sample(maps, grid.flatten(0, 1).flatten(1, 2), align_corners=False)
    return sampled.unflatten(0, (-1, groups)).unflatten(3, (-1, size[0]))


def deformable_sampling(
    values: Real[Tensor, "TB C H W"],
    offsets: Float[Tensor, "TB G 9 2 H W"],
    weights: Real[Tensor, "TB G 9 H W"],
) -> Real[Tensor, "TB C H W"]:
    """For each pixel p and group g: sum_k A_gk(p) v_g(p + p_k + offset_gk(p)), in float32 or wider.

    Source: Spike2Former, Eq. 4, between its two projections.
    """
    sampled = bilinear(as_membrane(values), points_of(as_membrane(offsets)))
    return (weights.unsqueeze(2) * sampled).sum(3).flatten(1, 2)


def read_channels_last(x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
    """What a map becomes if the memory of [TB, C, H, W] is read as [TB, H, W, C]: the slip of the authors' code."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class SpikeQuery(nn.Module):
    """SN alone: Table 3, "w/o. DWConv". Membranes -> spikes [TB, C, H, W]."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        self.neuron = neuron()

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        return self.neuron(u)


class DepthwiseQuery(SpikeQuery):
    """SN(x') with x' = BN(DWConv(SN(x))), Eq. 6. Membranes -> spikes [TB, C, H, W]."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder, kernel: int = 5) -> None:
        super().__init__(dim, neuron=neuron)
        self.dw = ConvBN(dim, dim, kernel, groups=dim)
        self.spikes = neuron()

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        return self.spikes(self.dw(self.neuron(u)))


class SDDA(nn.Module):
    """Membranes [TB, C, H, W] -> currents [TB, C, H, W]; attention weights are spikes, sampled values are not.

    `proj` stands in front of the sampling and behind it, on membranes (Table 3: ESC, or Pointwise); `query` makes the
    spikes that choose points and weights (Table 3: DepthwiseQuery, or SpikeQuery).
    Offsets and weights start at zero: until the first step nothing is attended to.
    Raises ValueError if groups does not divide dim.  Source: Spike2Former, Eqs. 4-8.
    """

    quantize_role: ClassVar[str] = "attention"

    def __init__(
        self,
        dim: int,
        *,
        neuron: NeuronBuilder,
        groups: int = 32,
        proj: Mixer = WIDE_ESC,
        query: Mixer = DepthwiseQuery,
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"dim must be a multiple of groups, got dim={dim}, groups={groups}")
        self.groups = groups
        self.input_proj = proj(dim, neuron=neuron)
        self.query = query(dim, neuron=neuron)
        self.offset_conv = ConvBN(dim, groups * POINTS * 2, 1, bias=True)
        self.attn_conv = ConvBN(dim, groups * POINTS, 1, bias=True)
        self.value, self.attn = self.operands(neuron=neuron)
        self.output_proj = proj(dim, neuron=neuron)
        for conv in (self.offset_conv.conv, self.attn_conv.conv):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def operands(self, *, neuron: NeuronBuilder) -> tuple[nn.Module, nn.Module]:
        """What the currents of sampled values and of attention weights go through."""
        return nn.Identity(), neuron()

    def layout(self, x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        """A map of offsets or weights as its channels and pixels are read."""
        return x

    def offsets(self, query: Real[Tensor, "TB C H W"]) -> Float[Tensor, "TB G 9 2 H W"]:
        """Eq. 8, from the spikes of the query."""
        return self.layout(self.offset_conv(query)).unflatten(1, (self.groups, POINTS, 2))

    def sampling_points(self, u: Real[Tensor, "TB C H W"]) -> Float[Tensor, "TB G 9 2 H W"]:
        """Where each pixel of `u` samples, (x, y) in pixels of the map, centres of pixels on whole numbers."""
        return points_of(as_membrane(self.offsets(self.query(u))))

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        values = self.value(self.input_proj(u))
        query = self.query(u)
        weights = self.attn(self.layout(self.attn_conv(query))).unflatten(1, (self.groups, POINTS))
        return self.output_proj(deformable_sampling(values, self.offsets(query), weights))


class SpikingQuerySDDA(SDDA):
    """Table 3, "Spiking in Query": what is sampled are spikes, the attention weights are real numbers."""

    def operands(self, *, neuron: NeuronBuilder) -> tuple[nn.Module, nn.Module]:
        return neuron(), nn.Identity()


class SoftmaxSDDA(SDDA):
    """The ordinary form, as in Deformable DETR: the weights of a group's points are a softmax. For the ANN twin."""

    def operands(self, *, neuron: NeuronBuilder) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), PointSoftmax()


class PointSoftmax(nn.Module):
    """Currents [TB, G*9, H, W] -> weights that add up to 1 over the points of each group."""

    def forward(self, currents: Real[Tensor, "TB Gk H W"]) -> Real[Tensor, "TB Gk H W"]:
        return currents.unflatten(1, (-1, POINTS)).softmax(2).flatten(1, 2)


class ReleasedSDDA(SDDA):
    """SDDA as the authors' code has it: offsets and weights scrambled over pixels and channels; same parameters."""

    def layout(self, x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        return read_channels_last(x)
