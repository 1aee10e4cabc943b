"""SepConv: the inverted separable convolution that mixes tokens in convolutional blocks.

Paper: Meta-SpikeFormer, Eq. 9, after MobileNetV2. The neuron in front of Conv_pw1 belongs to the shortcut; there is
none between Conv_dw and Conv_pw2, as in the equation, so Conv_pw2 sees real numbers unless both merge to a dense 7x7.
"""

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.layers.conv_bn import ConvBN, conv2d_from, weight_of
from spikeformers.neurons import NeuronBuilder


class SepConv(nn.Module):
    """Spikes [TB, C, H, W] -> currents [TB, C, H, W]; expands to 2 C; 4 C^2 + 104 C parameters."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder, kernel: int = 7) -> None:
        super().__init__()
        self.pw1 = ConvBN(dim, 2 * dim, 1)
        self.neuron = neuron()
        self.dw = nn.Conv2d(2 * dim, 2 * dim, kernel, padding=kernel // 2, groups=2 * dim, bias=False)
        self.pw2 = ConvBN(2 * dim, dim, 1)

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Float[Tensor, "TB C H W"]:
        return self.pw2(self.dw(self.neuron(self.pw1(spikes))))

    @torch.no_grad()
    def merge_spatial(self) -> nn.Conv2d:
        """The dense 7x7 convolution 2C -> C, zero padding 3, that equals dw, pw2 and its batch norm in eval mode."""
        last = self.pw2.merge()
        kernel = torch.einsum("om,mij->omij", last.weight[:, :, 0, 0], weight_of(self.dw)[:, 0])
        like = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], padding=self.dw.padding, device="meta")
        return conv2d_from(kernel, last.bias, like=like)
