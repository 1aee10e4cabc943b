"""Q-SDSA, quantised spike-driven self-attention: SDSA-3 on counts; and MPRF, which centres what its neurons read.

Paper: QSD-Transformer, Eq. 6 (Q-SDSA), Eq. 12 and App. D (MPRF). The low-bit weights come from `quantize.prepare`.
In integers: with I = q (k^T v) of counts 0..4 the attention emits clamp((I + 32) >> 6, 0, 4) (`integer_attention`).
Departures from the paper: its text gives no scale and no unit; 1/4 and twice that of q, k, v are the authors' code's.
MPRF has no code: it is inferred to be a batch norm of each channel of q, k and v (docs/errata.md). The second norm at
the end of RepConv stands there already, so published weights need no more; `Rectified` adds one that starts centred.
"""

from collections import OrderedDict
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor, nn

from spikeformers.attention.sdsa import SDSA3
from spikeformers.attention.ssa import Projection
from spikeformers.layers import NormChain, merge_conv_bn
from spikeformers.neurons import IELIF, NeuronBuilder


class MPRF(nn.BatchNorm2d):
    """Membrane potential rectify function: y = gamma (U - mu) / sqrt(var + eps) + beta per channel.

    Starts at mean 1/2 and deviation 1/4, so that two deviations on either side fill the range 0..1 in which IE-LIF
    neurons count.  Source: Eq. 12 (its formula is lost; inferred from the text and the paper's Fig. 1).
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.25)
        nn.init.constant_(self.bias, 0.5)


class Rectified(nn.Sequential):
    """A projection with an MPRF behind it. [TB, C, H, W] -> [TB, O, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, *, projection: Projection) -> None:
        super().__init__(OrderedDict(projection=projection(in_channels, out_channels), mprf=MPRF(out_channels)))

    def norm_chain(self) -> NormChain:
        """What `quantize.fold` folds: App. D."""
        conv, norms = self.projection.norm_chain()
        return conv, (*norms, (self, "mprf"))

    def merge(self) -> nn.Conv2d:
        """The one convolution that equals this layer in eval mode."""
        return merge_conv_bn(self.projection.merge(), self.mprf)


class QSDSA(SDSA3):
    """SN(Q K^T V / 4) per head of IE-LIF counts, then the projection; linear in N. [TB, C, H, W] -> [TB, C, H, W].

    Counts of the attention are worth 2/D, those of q, k and v 1/D.  Raises ValueError for a neuron that is no IE-LIF.
    Source: Eq. 6, constants as coded.
    """

    default_scale: ClassVar[float] = 0.25

    def mixed_neuron(self, *, neuron: NeuronBuilder) -> nn.Module:
        built = neuron()
        if not isinstance(built, IELIF):
            raise ValueError(f'q_sdsa is made for the neuron "ie_lif"; with {built} take attention="sdsa3"')
        built.unit *= 2
        return built


def integer_attention(product: Int[Tensor, " *shape"], *, levels: int = 4) -> Int[Tensor, " *shape"]:
    """Counts 0..D that Q-SDSA's neuron emits, I = q (k^T v): (I + 2 D^2) // (4 D^2), clipped; D = `levels`.

    For D = 4 that is clamp((I + 32) >> 6, 0, 4). The neuron's own floats equal it where D is a power of two; elsewhere
    they may round an exact tie down.  Source: QSD-Transformer, Eq. 6 and 9, constants as coded.
    """
    return ((product + 2 * levels**2) // (4 * levels**2)).clamp(0, levels)
