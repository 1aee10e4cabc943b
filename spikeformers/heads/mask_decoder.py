"""SDTD, the spike-driven transformer decoder: a fixed set of queries reads the maps of a pixel decoder.

Paper: Spike2Former, Eqs. 9-11 (`DecoderLayer`: SDCA, SDSA, channel MLP), 12-13 (`SpikeCrossAttention`).
`SoftmaxCrossAttention` and `SoftmaxSelfAttention` stand in their places in an ANN twin.
Departures from the paper, all as in the authors' code: no softmax and no neuron on the scores; scores are divided by
the root of the whole width, not of a head's; queries and pixels carry positions on the way to q and k, not to v; no
masked attention. Queries are a map [TB, C, 1, Q], so that linear layers on them are 1x1 convolutions as everywhere.
A row and not a column: for maps of width 1 whose gradient comes transposed, torch 2.14's batch norm reads memory in the
wrong order on a CPU and gives wrong gradients without a word.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.attention import spike_attention
from spikeformers.layers import ConvBN
from spikeformers.neurons import NeuronBuilder

TEMPERATURE = 10000.0  # of the wavelengths, which grow from 2 pi to 2 pi times this


def sine_position(height: int, width: int, *, dim: int, like: Tensor) -> Float[Tensor, "1 C H W"]:
    """Where a pixel of a map is: sines and cosines of its row, then of its column, in the dtype and place of `like`.

    Rows count from 1 and are scaled so that the last one is 2 pi, whatever the size.
    Raises ValueError if dim is no multiple of 4.  Source: Carion et al., "DETR", 2020.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 (sine and cosine of rows and columns), got {dim}")
    frequencies = TEMPERATURE ** (-torch.arange(0, dim // 2, 2, dtype=torch.float64, device=like.device) / (dim // 2))

    def waves(size: int) -> Float[Tensor, "half size"]:
        places = torch.arange(1, size + 1, dtype=torch.float64, device=like.device)
        angles = frequencies[:, None] * places / (size + 1e-6) * 2 * math.pi
        return torch.stack([angles.sin(), angles.cos()], 1).flatten(0, 1)

    rows = waves(height)[:, :, None].expand(-1, -1, width)
    columns = waves(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])[None].to(like.dtype)


class CrossAttention(nn.Module):
    """Attention with Q from queries, K and V from a memory; subclasses say what becomes of currents, and how they mix.

    Membranes [TB, C, 1, Q] and [TB, C, H, W] -> currents [TB, C, 1, Q].  `scale` makes of 1/sqrt(C) what multiplies:
    the number itself, or `attention.learnable`.
    """

    quantize_role: ClassVar[str] = "attention"

    def __init__(
        self,
        dim: int,
        *,
        neuron: NeuronBuilder,
        heads: int = 8,
        scale: Callable[[float], float | nn.Parameter] = float,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads = heads
        self.scale = scale(dim**-0.5)
        self.q = self.operand(dim, neuron=neuron)
        self.k = self.operand(dim, neuron=neuron)
        self.v = self.operand(dim, neuron=neuron)
        self.attn = self.spikes(neuron=neuron)
        self.proj = ConvBN(dim, dim, 1, bias=True)

    def operand(self, dim: int, *, neuron: NeuronBuilder) -> nn.Sequential:
        """SN - 1x1 convolution and norm - `spikes`: from a membrane to what is multiplied."""
        parts = {"neuron": neuron(), "conv": ConvBN(dim, dim, 1, bias=True), "spikes": self.spikes(neuron=neuron)}
        return nn.Sequential(OrderedDict(parts))

    def spikes(self, *, neuron: NeuronBuilder) -> nn.Module:
        """What the currents of Q, K, V and of their mixture go through."""
        raise TypeError(f"{type(self).__name__} must define spikes()")

    def mix(
        self, q: Real[Tensor, "TB M K Q"], k: Real[Tensor, "TB M K N"], v: Real[Tensor, "TB M K N"]
    ) -> Real[Tensor, "TB M K Q"]:
        """Attention of M heads."""
        raise TypeError(f"{type(self).__name__} must define mix()")

    def forward(
        self,
        queries: Real[Tensor, "TB C 1 Q"],
        query_positions: Real[Tensor, "#TB C 1 Q"],
        memory: Real[Tensor, "TB C H W"],
        memory_positions: Real[Tensor, "#TB C H W"],
    ) -> Real[Tensor, "TB C 1 Q"]:
        q = self.q(queries + query_positions)
        k = self.k(memory + memory_positions)
        v = self.v(memory)
        mixed = self.mix(self.split(q), self.split(k), self.split(v))
        return self.proj(self.attn(mixed.reshape(queries.shape)))

    def split(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB M K N"]:
        """Channels to heads (channel c = head * K + j), pixels or queries to tokens."""
        return spikes.flatten(2).unflatten(1, (self.heads, -1))


class SpikeCrossAttention(CrossAttention):
    """SDCA: conv(SN(Q K^T V / sqrt(C))) per head, of spikes.  Source: Spike2Former, Eqs. 12-13."""

    def spikes(self, *, neuron: NeuronBuilder) -> nn.Module:
        return neuron()

    def mix(
        self, q: Real[Tensor, "TB M K Q"], k: Real[Tensor, "TB M K N"], v: Real[Tensor, "TB M K N"]
    ) -> Real[Tensor, "TB M K Q"]:
        return spike_attention(q, k, v) * self.scale


class SoftmaxCrossAttention(CrossAttention):
    """conv(Softmax(Q K^T / sqrt(C)) V) per head, of real numbers: an ordinary transformer's, for the ANN twin."""

    def spikes(self, *, neuron: NeuronBuilder) -> nn.Module:
        return nn.Identity()

    def mix(
        self, q: Real[Tensor, "TB M K Q"], k: Real[Tensor, "TB M K N"], v: Real[Tensor, "TB M K N"]
    ) -> Real[Tensor, "TB M K Q"]:
        return F.scaled_dot_product_attention(q.mT * self.scale, k.mT, v.mT, scale=1.0).mT


class SelfAttention(CrossAttention):
    """Attention whose memory is the queries themselves."""

    def forward(
        self, queries: Real[Tensor, "TB C 1 Q"], query_positions: Real[Tensor, "#TB C 1 Q"]
    ) -> Real[Tensor, "TB C 1 Q"]:
        return super().forward(queries, query_positions, queries, query_positions)


class SpikeSelfAttention(SelfAttention, SpikeCrossAttention):
    """SDSA of queries."""


class SoftmaxSelfAttention(SelfAttention, SoftmaxCrossAttention):
    """Self-attention of queries in the ANN twin."""


class FFN(nn.Module):
    """The channel MLP of Eq. 11: SN - conv - SN - conv. Membranes [TB, C, 1, Q] -> currents of the same shape."""

    quantize_role: ClassVar[str] = "linear"

    def __init__(self, dim: int, hidden: int, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        self.neuron1 = neuron()
        self.conv1 = ConvBN(dim, hidden, 1, bias=True)
        self.neuron2 = neuron()
        self.conv2 = ConvBN(hidden, dim, 1, bias=True)

    def forward(self, queries: Real[Tensor, "TB C 1 Q"]) -> Real[Tensor, "TB C 1 Q"]:
        return self.conv2(self.neuron2(self.conv1(self.neuron1(queries))))


class ReleasedFFN(FFN):
    """The same as the authors' code has it, for their checkpoints: queries and channels scrambled around the layers.

    Where it should transpose [Q, C] to [C, Q] it reads the same memory in the other shape, and back again at the end.
    """

    def forward(self, queries: Real[Tensor, "TB C 1 Q"]) -> Real[Tensor, "TB C 1 Q"]:
        batch, channels, _, count = queries.shape
        scrambled = queries.squeeze(2).mT.reshape(queries.shape)
        return super().forward(scrambled).reshape(batch, count, channels).mT.unsqueeze(2)


class DecoderLayer(nn.Module):
    """Q' = Q + SDCA(Q, F); Q'' = Q' + SDSA(Q'); Q''' = Q'' + MLP(Q'').  Source: Spike2Former, Eqs. 9-11."""

    def __init__(self, cross_attn: CrossAttention, self_attn: SelfAttention, ffn: FFN) -> None:
        super().__init__()
        self.cross_attn = cross_attn
        self.self_attn = self_attn
        self.ffn = ffn

    def forward(
        self,
        queries: Real[Tensor, "TB C 1 Q"],
        query_positions: Real[Tensor, "#TB C 1 Q"],
        memory: Real[Tensor, "TB C H W"],
        memory_positions: Real[Tensor, "#TB C H W"],
    ) -> Real[Tensor, "TB C 1 Q"]:
        queries = queries + self.cross_attn(queries, query_positions, memory, memory_positions)
        queries = queries + self.self_attn(queries, query_positions)
        return queries + self.ffn(queries)


class MaskDecoder(nn.Module):
    """Memories [TB, C, H_i, W_i], coarse to fine -> the queries [TB, C, 1, Q] before the first and after every layer.

    Layer i reads memory i mod their number.  `layer` builds one layer a call.
    """

    def __init__(self, dim: int, *, queries: int, memories: int, layers: int, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        for name, number in {"queries": queries, "memories": memories, "layers": layers}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.query_features = nn.Parameter(torch.randn(queries, dim))
        self.query_positions = nn.Parameter(torch.randn(queries, dim))
        self.level_embeddings = nn.Parameter(torch.randn(memories, dim))
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, memories: list[Real[Tensor, "TB C _ _"]]) -> list[Real[Tensor, "TB C 1 Q"]]:
        levels = [
            (memory + embedding[:, None, None], sine_position(*memory.shape[2:], dim=memory.shape[1], like=memory))
            for memory, embedding in zip(memories, self.level_embeddings, strict=True)
        ]
        positions = self.query_positions.mT[None, :, None]
        batch = memories[0].shape[0]  # len() would fix it in an exported graph
        states = [self.query_features.mT[None, :, None].expand(batch, -1, -1, -1)]
        for index, layer in enumerate(self.layers):
            states.append(layer(states[-1], positions, *levels[index % len(levels)]))
        return states
