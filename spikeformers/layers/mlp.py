"""Channel mixers: two convolutions with a neuron between, 3x3 in convolutional blocks and 1x1 in transformer blocks.

Paper: Meta-SpikeFormer, Eq. 10 (ChannelConv) and Eqs. 3, 13 (ChannelMLP). The first neuron belongs to the shortcut.
Departures from the paper: batch norms after both convolutions, as in the authors' code.
"""

from typing import ClassVar

from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.layers.conv_bn import ConvBN
from spikeformers.neurons import NeuronBuilder


class ChannelConv(nn.Module):
    """Spikes [TB, C, H, W] -> currents [TB, C, H, W] through `ratio` * C channels."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder, ratio: int = 4, kernel: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, ratio * dim, kernel, bias=bias)
        self.neuron = neuron()
        self.conv2 = ConvBN(ratio * dim, dim, kernel, bias=bias)

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        return self.conv2(self.neuron(self.conv1(spikes)))


class ChannelMLP(ChannelConv):
    """The 1x1 form: a multilayer perceptron on every token, biases on as in the authors' code."""

    quantize_role: ClassVar[str] = "linear"

    def __init__(self, dim: int, *, neuron: NeuronBuilder, ratio: int = 4) -> None:
        super().__init__(dim, neuron=neuron, ratio=ratio, kernel=1, bias=True)
