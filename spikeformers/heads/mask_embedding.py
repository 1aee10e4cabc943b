"""SDME, spike-driven mask embedding: from queries to classes and to the spikes whose product with pixels is a mask.

Paper: Spike2Former, Eqs. 14-15 and Fig. 1(D); the rows of Table 3 about it are the shortcuts below.
Departures from the paper, all as in the authors' code, since the published numbers come from it: queries pass a sigmoid
before they spike (their neurons then fire once, where sigmoid > 1/2, that is where the query is positive); spikes here
are worth `alpha` times as much, which with alpha = D undoes the normalisation of NI-LIF (of I-LIF, which has none, it
makes D times the counts); the convolution of the ME-shortcut mixes queries, not channels.
All states of a decoder pass together, one a row: batch norm pools its statistics over them.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.layers import ConvBN
from spikeformers.neurons import NeuronBuilder

Shortcut = Callable[[int], nn.Module]
"""Called as `shortcut(queries)`; the module maps membranes and their spikes [TB, C, L, Q] to what is added."""


class SpikeShortcut(nn.Module):
    """Spikes around the mask MLP, times one learnable number: Table 3, "w/o Conv in ME-Shortcut"."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, membrane: Real[Tensor, "TB C L Q"], spikes: Real[Tensor, "TB C L Q"]) -> Real[Tensor, "TB C L Q"]:
        return self.weight * spikes


class ConvShortcut(SpikeShortcut):
    """The ME-shortcut: spikes through a convolution, every query a weighted sum of all."""

    def __init__(self, queries: int) -> None:
        super().__init__(queries)
        self.conv = ConvBN(queries, queries, 1)

    def forward(self, membrane: Real[Tensor, "TB C L Q"], spikes: Real[Tensor, "TB C L Q"]) -> Real[Tensor, "TB C L Q"]:
        return self.weight * self.conv(spikes.transpose(1, 3)).transpose(1, 3)


class MembraneShortcut(SpikeShortcut):
    """Membranes around the mask MLP, as they are before the sigmoid: Table 3, "ME-Shortcut -> Membrane Shortcut"."""

    def forward(self, membrane: Real[Tensor, "TB C L Q"], spikes: Real[Tensor, "TB C L Q"]) -> Real[Tensor, "TB C L Q"]:
        return self.weight * membrane


class NoShortcut(nn.Module):
    """Nothing around the mask MLP: Table 3, "Vanilla Spike Mask Embedding"."""

    def __init__(self, queries: int) -> None:
        super().__init__()

    def forward(self, membrane: Real[Tensor, "TB C L Q"], spikes: Real[Tensor, "TB C L Q"]) -> Real[Tensor, "TB C L Q"]:
        return torch.zeros_like(membrane)


SHORTCUTS = {"conv": ConvShortcut, "none": NoShortcut, "spikes": SpikeShortcut, "membrane": MembraneShortcut}


class ScaledSpikes(nn.Module):
    """A neuron whose spikes are worth `alpha` times as much: alpha SN(x).  Raises ValueError for alpha <= 0."""

    def __init__(self, alpha: float, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha, what a spike of the mask embedding is worth, must be above 0, got {alpha}")
        self.alpha = alpha
        self.neuron = neuron()

    def forward(self, x: Real[Tensor, " TB *shape"]) -> Real[Tensor, " TB *shape"]:
        return self.neuron(x) * self.alpha


class MaskEmbedding(nn.Module):
    """Queries [TB, C, L, Q] of L states -> class currents [TB, classes + 1, L, Q] and mask spikes [TB, C, L, Q].

    The last class is "no object".
    """

    quantize_role: ClassVar[str] = "linear"

    def __init__(
        self, dim: int, *, queries: int, num_classes: int, shortcut: Shortcut, neuron: NeuronBuilder, alpha: float = 4.0
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.query_spikes = ScaledSpikes(alpha, neuron=neuron)
        self.classifier = nn.Conv2d(dim, num_classes + 1, 1)
        self.mask_mlp = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(dim, dim, 1, bias=False),
                spikes1=ScaledSpikes(alpha, neuron=neuron),
                conv2=nn.Conv2d(dim, dim, 1, bias=False),
                spikes2=ScaledSpikes(alpha, neuron=neuron),
                conv3=nn.Conv2d(dim, dim, 1),
            )
        )
        self.shortcut = shortcut(queries)
        self.mask_spikes = ScaledSpikes(alpha, neuron=neuron)
        for layer in (self.classifier, self.mask_mlp.conv3):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, states: Real[Tensor, "TB C L Q"]) -> tuple[Real[Tensor, "TB K L Q"], Real[Tensor, "TB C L Q"]]:
        spikes = self.query_spikes(states.sigmoid())
        mask = self.mask_mlp(spikes) + self.shortcut(states, spikes)
        return self.classifier(spikes), self.mask_spikes(mask)
