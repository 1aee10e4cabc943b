"""Spike-driven self-attention, operators 1 to 4: attention by masks and additions, without softmax.

Paper: Meta-SpikeFormer, Eq. 15 (SDSA-3), Eqs. 18-20 and App. A.2 (SDSA-1, 2, 4). Every operator maps spikes to
currents; the neuron in front of Q, K, V belongs to the shortcut.
Departures from the paper: SDSA-3 keeps the authors' explicit scale 1/8 and threshold 1/2 instead of one merged
threshold (the same neuron); the threshold of SDSA-2 is not given and is taken as that of SDSA-1, 1/2.
"""

from typing import ClassVar

from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.attention.ssa import (
    ATTENTION_THRESHOLD,
    SSA,
    Projection,
    SpikeAttention,
    WidthScaledSSA,
    learnable,
)
from spikeformers.layers.rep_conv import RepConv
from spikeformers.neurons import NeuronBuilder


class _RepConvs:
    """Projections of Meta-SpikeFormer's operators, unless told otherwise."""

    default_qkv: ClassVar[Projection] = RepConv
    default_proj: ClassVar[Projection] = RepConv


class SDSA1(_RepConvs, SpikeAttention):
    """Q * SN(sum over tokens of K * V): O(N C), masks and additions only. [TB, C, H, W] -> [TB, C, H, W]."""

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        q, k, v = self.operands_of(spikes)
        return self.proj(q * self.attn((k * v).sum((2, 3), keepdim=True)))


class SDSA2(_RepConvs, SpikeAttention):
    """SN(sum over tokens of Q) * V: SDSA-1 without K. [TB, C, H, W] -> [TB, C, H, W]."""

    operands: ClassVar[tuple[str, ...]] = ("q", "v")

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        q, v = self.operands_of(spikes)
        return self.proj(self.attn(q.sum((2, 3), keepdim=True)) * v)


class SDSA3(_RepConvs, SSA):
    """SSA with RepConv projections; linear in N; the default of Meta-SpikeFormer. [TB, C, H, W] -> [TB, C, H, W]."""


class SDSA4(SDSA3):
    """SDSA-3 with one learnable threshold per layer, started at that of SDSA-3."""

    def mixed_neuron(self, *, neuron: NeuronBuilder) -> nn.Module:
        return neuron(threshold=learnable(ATTENTION_THRESHOLD))


class WidthScaledSDSA(SDSA3, WidthScaledSSA):
    """SDSA-3 with scale K^(-1/2) for head width K and threshold 1, as in Spike2Former's backbone."""


class LearnableScaleSDSA(WidthScaledSDSA):
    """The same with a learnable scale, for training from random weights: `balance` finds where it starts."""

    started_at = staticmethod(learnable)


SDSA = {
    "sdsa1": SDSA1,
    "sdsa2": SDSA2,
    "sdsa3": SDSA3,
    "sdsa4": SDSA4,
    "sdsa3_width": WidthScaledSDSA,
    "sdsa3_learned": LearnableScaleSDSA,
}
