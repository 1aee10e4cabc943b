"""ESC, the energy-efficient separable convolution: a neuron in front of each of its three convolutions.

Paper: Spike2Former, Eqs. 1-3. Unlike SepConv it owns its first neuron, since it stands on membranes, and its second
pointwise convolution reads spikes. `Pointwise` is what Table 3 puts in its place ("w/o. ESC").
Departures from the paper: a batch norm after each convolution, and 2 C channels inside, as in the authors' code.
"""

from collections import OrderedDict

from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.layers.conv_bn import ConvBN
from spikeformers.neurons import NeuronBuilder


class Pointwise(nn.Sequential):
    """SN - 1x1 convolution - norm. Membranes [TB, C, H, W] -> currents [TB, O, H, W]; O = C if not given."""

    def __init__(self, dim: int, out_channels: int | None = None, *, neuron: NeuronBuilder) -> None:
        super().__init__(OrderedDict(neuron=neuron(), conv=ConvBN(dim, out_channels or dim, 1, bias=True)))


class ESC(nn.Module):
    """Membranes [TB, C, H, W] -> currents [TB, C, H, W] through `ratio` * C channels."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder, kernel: int = 3, ratio: int = 2) -> None:
        super().__init__()
        hidden = ratio * dim
        self.pw1_neuron = neuron()
        self.pw1 = ConvBN(dim, hidden, 1)
        self.dw_neuron = neuron()
        self.dw = ConvBN(hidden, hidden, kernel, groups=hidden)
        self.pw2_neuron = neuron()
        self.pw2 = ConvBN(hidden, dim, 1)

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Float[Tensor, "TB C H W"]:
        u = self.pw1(self.pw1_neuron(u))
        u = self.dw(self.dw_neuron(u))
        return self.pw2(self.pw2_neuron(u))
