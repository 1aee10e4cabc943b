"""The transformer block: attention, then a multilayer perceptron, each inside a shortcut.

Paper: Spikformer V2, Eqs. 4-5; Meta-SpikeFormer, Eqs. 11-14. LayerScale: Touvron et al., 2021 (CaiT).
"""

from collections.abc import Callable

import torch
from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.neurons import NeuronBuilder

Mixer = Callable[..., nn.Module]
"""Called as `mixer(dim, neuron=builder)`; the module maps spikes [TB, C, H, W] to currents of the same shape."""


class TransformerBlock(nn.Module):
    """x' = x + SN(Attention(x)); x'' = x' + SN(MLP(x')), or whatever sum and place of SN the shortcut has."""

    def __init__(
        self, dim: int, *, token_mixer: Mixer, channel_mixer: Mixer, shortcut: Mixer, neuron: NeuronBuilder
    ) -> None:
        super().__init__()
        self.attn_shortcut = shortcut(neuron=neuron)
        self.attn = token_mixer(dim, neuron=neuron)
        self.mlp_shortcut = shortcut(neuron=neuron)
        self.mlp = channel_mixer(dim, neuron=neuron)

    def forward(self, x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        x = self.attn_shortcut(x, self.attn)
        return self.mlp_shortcut(x, self.mlp)


class LayerScaleBlock(TransformerBlock):
    """The same with both branches multiplied by a learnable number per channel, started at `layer_scale`."""

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: Mixer,
        channel_mixer: Mixer,
        shortcut: Mixer,
        neuron: NeuronBuilder,
        layer_scale: float,
    ) -> None:
        super().__init__(dim, token_mixer=token_mixer, channel_mixer=channel_mixer, shortcut=shortcut, neuron=neuron)
        self.attn_scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.mlp_scale = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        x = self.attn_shortcut(x, lambda spikes: self.attn_scale.view(-1, 1, 1) * self.attn(spikes))
        return self.mlp_shortcut(x, lambda spikes: self.mlp_scale.view(-1, 1, 1) * self.mlp(spikes))
