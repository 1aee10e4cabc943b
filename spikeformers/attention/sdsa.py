"""Spike-driven self-attention, operators 1 to 4: attention by masks and additions, without softmax.

Paper: Meta-SpikeFormer, Eq. 15 (SDSA-3), Eqs. 18-20 and App. A.2 (SDSA-1, 2, 4). Every operator maps spikes to
currents; the neuron in front of Q, K, V belongs to the shortcut.
Departures from the paper: SDSA-3 keeps the authors' explicit scale 1/8 and threshold 1/2 instead of one merged
threshold (the same neuron); the threshold of SDSA-2 is not given and is taken as that of SDSA-1, 1/2.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.layers.rep_conv import RepConv
from spikeformers.neurons import NeuronBuilder

Projection = Callable[[int, int], nn.Module]
ATTENTION_THRESHOLD = 0.5


def spike_attention(
    q: Float[Tensor, "TB M K N"], k: Float[Tensor, "TB M K N"], v: Float[Tensor, "TB M K N"]
) -> Float[Tensor, "TB M K N"]:
    """Q (K^T V) of spike maps with tokens last, M heads of width K: for token n, sum_m (q_n . k_m) v_m.

    Counts multiply exactly, so (Q K^T) V is the same number; the cheaper order is chosen by N against K.
    Source: Meta-SpikeFormer, Eq. 15 without its neuron.
    """
    width, tokens = q.shape[-2:]
    return (v @ k.mT) @ q if tokens > width else v @ (k.mT @ q)


class _SpikeAttention(nn.Module):
    """Q, K, V as spikes of projections of the input, one more neuron on their mixture, and its projection."""

    operands: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    def __init__(
        self,
        dim: int,
        *,
        neuron: NeuronBuilder,
        heads: int = 8,
        qkv: Projection = RepConv,
        proj: Projection = RepConv,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads = heads
        for name in self.operands:
            self.add_module(f"{name}_conv", qkv(dim, dim))
            self.add_module(name, neuron())
        self.attn = neuron(threshold=self.attention_threshold())
        self.proj = proj(dim, dim)

    def attention_threshold(self) -> float | nn.Parameter:
        """Threshold of the neuron that turns mixed values into spikes."""
        return ATTENTION_THRESHOLD

    def split(self, x: Float[Tensor, "TB C H W"]) -> Float[Tensor, "TB M K N"]:
        """Channels to heads (channel c = head * K + j), pixels to tokens."""
        return x.flatten(2).unflatten(1, (self.heads, -1))


class SDSA1(_SpikeAttention):
    """Q * SN(sum over tokens of K * V): O(N C), masks and additions only. [TB, C, H, W] -> [TB, C, H, W]."""

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        q, k, v = self.q(self.q_conv(spikes)), self.k(self.k_conv(spikes)), self.v(self.v_conv(spikes))
        return self.proj(q * self.attn((k * v).sum((2, 3), keepdim=True)))


class SDSA2(_SpikeAttention):
    """SN(sum over tokens of Q) * V: SDSA-1 without K. [TB, C, H, W] -> [TB, C, H, W]."""

    operands: ClassVar[tuple[str, ...]] = ("q", "v")

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        q, v = self.q(self.q_conv(spikes)), self.v(self.v_conv(spikes))
        return self.proj(self.attn(q.sum((2, 3), keepdim=True)) * v)


class SDSA3(_SpikeAttention):
    """SN(scale * Q (K^T V)) per head, linear in N; the default. [TB, C, H, W] -> [TB, C, H, W]."""

    scale: ClassVar[float] = 0.125  # fixed in the authors' code whatever the head width

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        q, k, v = self.q(self.q_conv(spikes)), self.k(self.k_conv(spikes)), self.v(self.v_conv(spikes))
        mixed = spike_attention(self.split(q), self.split(k), self.split(v)) * self.scale
        return self.proj(self.attn(mixed.reshape(spikes.shape)))


class SDSA4(SDSA3):
    """SDSA-3 with one learnable threshold per layer, started at that of SDSA-3."""

    def attention_threshold(self) -> float | nn.Parameter:
        return nn.Parameter(torch.tensor(ATTENTION_THRESHOLD))


SDSA = {"sdsa1": SDSA1, "sdsa2": SDSA2, "sdsa3": SDSA3, "sdsa4": SDSA4}
