"""The pixel decoder: SDTE refines the coarsest map of a pyramid, then a top-down pass brings it to the finer ones.

Paper: Spike2Former, "Spike-driven Deformable Transformer Encoder" (`SDTELayer`: ESC, SDDA, channel MLP), the SpikeFPN
behind it, and the encoder's rows of Table 3.
Departures from the paper, all as in the authors' code: each branch of a layer is multiplied by a learnable number per
channel that starts at 1e-6; the pass goes down to the finest map (1/2), where per-pixel embeddings are made; no
positions are added. Table 3 only names "Multi-Scale feature as query": here (`query_levels=3`) the finer memories pass
an encoder of their own each, behind the top-down step. 21 times the pixels fit the row's 68.5 mJ more, where the
encoder of the coarsest map costs 2.8 mJ.
"""

from collections import OrderedDict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.attention import SDDA, ReleasedSDDA, WidthScaledSSA
from spikeformers.attention.sdda import read_channels_last
from spikeformers.layers import ESC, ChannelMLP, ConvBN, MembraneShortcut, Mixer, Pointwise, TransformerBlock
from spikeformers.neurons import NeuronBuilder, as_membrane


class SpikeMLP(nn.Module):
    """SN - 1x1 - SN - 1x1, with norms. Membranes [TB, C, H, W] -> currents [TB, C, H, W] through `ratio` * C."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder, ratio: int = 4) -> None:
        super().__init__()
        self.neuron = neuron()
        self.mlp = ChannelMLP(dim, neuron=neuron, ratio=ratio)

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        return self.mlp(self.neuron(u))


class ReleasedSpikeMLP(SpikeMLP):
    """The same as the authors' code has it, its output scrambled over pixels and channels; same parameters."""

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        return read_channels_last(super().forward(u))


class SDTELayer(nn.Module):
    """x += ESC(x); x += SDDA(x); x += MLP(x), each branch scaled per channel. Membranes [TB, C, H, W]."""

    def __init__(
        self,
        dim: int,
        *,
        neuron: NeuronBuilder,
        attention: Mixer = SDDA,
        mlp: Mixer = SpikeMLP,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        self.esc = ESC(dim, neuron=neuron)
        self.esc_scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.attn = attention(dim, neuron=neuron)
        self.attn_scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.mlp = mlp(dim, neuron=neuron)
        self.mlp_scale = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        u = as_membrane(u)
        u = u + self.esc_scale.view(-1, 1, 1) * self.esc(u)
        u = u + self.attn_scale.view(-1, 1, 1) * self.attn(u)
        return u + self.mlp_scale.view(-1, 1, 1) * self.mlp(u)


ReleasedSDTELayer = partial(SDTELayer, attention=ReleasedSDDA, mlp=ReleasedSpikeMLP)
"""SDTELayer with every slip of the authors' code, for their checkpoints."""


class VanillaEncoderLayer(TransformerBlock):
    """Spiking self-attention and the channel MLP on membranes: Table 3, "Vanilla Transformer Encoder"."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder, attention: Mixer = WidthScaledSSA, ratio: int = 4) -> None:
        super().__init__(
            dim,
            token_mixer=attention,
            channel_mixer=partial(ChannelMLP, ratio=ratio),
            shortcut=MembraneShortcut,
            neuron=neuron,
        )


class Encoder(nn.Sequential):
    """`depth` layers one behind the other; none of them hands its input on (Table 3, "w/o. SDTE")."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder, layer: Mixer = SDTELayer, depth: int = 6) -> None:
        super().__init__(OrderedDict((f"layer{index}", layer(dim, neuron=neuron)) for index in range(depth)))


class TopDown(nn.Module):
    """A step of the SpikeFPN: y = conv(SN(fine)) + upsampled(coarse), then DWConv(SN(y)), with norms."""

    def __init__(self, channels: int, dim: int, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        self.lateral = Pointwise(channels, dim, neuron=neuron)
        self.neuron = neuron()
        self.output = ConvBN(dim, dim, 3, groups=dim)

    def forward(self, fine: Real[Tensor, "TB c H W"], coarse: Real[Tensor, "TB C h w"]) -> Real[Tensor, "TB C H W"]:
        upsampled = F.interpolate(as_membrane(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.output(self.neuron(self.lateral(fine) + upsampled))


class PixelMaps(NamedTuple):
    """`memories` [TB, C, h, w], coarse to fine, for the queries to read; `embedding` [TB, C, H, W] of every pixel."""

    memories: tuple[Tensor, ...]
    embedding: Tensor


class PixelDecoder(nn.Module):
    """Maps of a pyramid, fine to coarse, of `channels` -> PixelMaps of width `dim`.

    Memories are all maps but the finest (of one map, that one), the embedding is made of the finest. `encoder` builds
    what refines the coarsest map, called as `encoder(dim, neuron=neuron)`; `query_levels` of the coarsest memories get
    one each. Sizes are free: a coarse map is brought to the size of the finer one.
    Raises ValueError for no channels, for query_levels that are no number of memories, and, when called, if maps and
    channels differ in number.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        dim: int,
        neuron: NeuronBuilder,
        encoder: Mixer = Encoder,
        query_levels: int = 1,
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels must name at least one map of the pyramid, got none")
        self.num_memories = max(1, len(channels) - 1)
        if not 1 <= query_levels <= self.num_memories:
            raise ValueError(f"query_levels must be from 1 to {self.num_memories} (the memories), got {query_levels}")
        self.input_proj = Pointwise(channels[-1], dim, neuron=neuron)
        self.encoders = nn.ModuleList(encoder(dim, neuron=neuron) for _ in range(query_levels))
        self.output_proj = Pointwise(dim, neuron=neuron)
        self.top_down = nn.ModuleList(TopDown(width, dim, neuron=neuron) for width in channels[:-1])  # fine to coarse
        self.embedding_neuron = neuron()
        self.embedding = nn.Conv2d(dim, dim, 1)

    def forward(self, maps: list[Real[Tensor, "TB _ _ _"]]) -> PixelMaps:
        if len(maps) != len(self.top_down) + 1:
            raise ValueError(f"expected {len(self.top_down) + 1} maps, fine to coarse, got {len(maps)}")
        first, *finer = self.encoders
        y = self.output_proj(first(self.input_proj(maps[-1])))
        refined = [y]
        for level, step in reversed(list(enumerate(self.top_down))):
            y = step(maps[level], y)
            if len(refined) <= len(finer):
                y = finer[len(refined) - 1](y)
            refined.append(y)
        return PixelMaps(tuple(refined[: self.num_memories]), self.embedding(self.embedding_neuron(y)))
