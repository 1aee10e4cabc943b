"""A feature pyramid of spiking convolutions: what heads that read maps of several sizes begin with.

Paper: Lin et al., CVPR 2017 (FPN), with a neuron in front of every convolution, as Meta-SpikeFormer, Secs. 4.3-4.4, and
QSD-Transformer, Tables 2-3, use it.
Departures from the papers: they say nothing about it; wiring and sizes are the authors' code's.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.neurons import NeuronBuilder, as_membrane


class SpikingConv(nn.Module):
    """SN - Conv (- BN): membranes [B, C, H, W] -> membranes [B, O, H', W']."""

    def __init__(self, convolution: nn.Module, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        self.neuron = neuron()
        self.conv = convolution

    def forward(self, membrane: Real[Tensor, "B C H W"]) -> Real[Tensor, "B O _ _"]:
        return self.conv(self.neuron(membrane))


def plain_conv(in_channels: int, out_channels: int, kernel: int, *, bias: bool = True) -> nn.Conv2d:
    """A convolution without batch norm, as in the neck of the LIF form."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)


class FeaturePyramid(nn.Module):
    """Maps [B, C_i, H_i, W_i], fine to coarse -> as many of `dim` channels.

    Coarse ones are repeated onto finer ones (nearest), then each is convolved.  `convolution(in, out, kernel, bias=)`
    builds the layers.
    """

    def __init__(
        self, channels: tuple[int, ...], dim: int, *, convolution: Callable[..., nn.Module], neuron: NeuronBuilder
    ) -> None:
        super().__init__()
        build = partial(SpikingConv, neuron=neuron)
        self.lateral = nn.ModuleList(build(convolution(width, dim, 1, bias=True)) for width in channels)
        self.output = nn.ModuleList(build(convolution(dim, dim, 3, bias=True)) for _ in channels)

    def forward(self, maps: list[Real[Tensor, "B _ _ _"]]) -> list[Real[Tensor, "B _ _ _"]]:
        maps = [as_membrane(layer(each)) for layer, each in zip(self.lateral, maps, strict=True)]
        for level in range(len(maps) - 1, 0, -1):
            maps[level - 1] = maps[level - 1] + F.interpolate(maps[level], size=maps[level - 1].shape[2:])
        return [layer(each) for layer, each in zip(self.output, maps, strict=True)]
