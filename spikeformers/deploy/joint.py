"""Attention whose q, k and v come from one projection: the same numbers from a third of the calls.

The first convolutions of q, k and v read the same spikes and become one with three times the outputs; what follows
each of them becomes one convolution with three times the groups.
"""

from collections import OrderedDict
from dataclasses import replace

import torch
from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.attention import SSA, spike_attention
from spikeformers.deploy.counts import CountNeuron, IntegerConv
from spikeformers.deploy.floats import FloatConv
from spikeformers.deploy.form import Factors

OPERANDS = ("q", "k", "v")


class JointAttention(nn.Module):
    """What an SSA (or SDSA-3, 4) computes from counts [TB, C, H, W], with one projection to q, k and v together."""

    def __init__(self, attention: SSA, *, projection: nn.Module, neuron: nn.Module) -> None:
        super().__init__()
        self.heads, self.scale = attention.heads, attention.scale
        self.qkv_conv, self.qkv = projection, neuron
        self.attn, self.proj = attention.attn, attention.proj

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        counts = self.qkv(self.qkv_conv(spikes)).flatten(2).unflatten(1, (3 * self.heads, -1))
        mixed = spike_attention(*counts.chunk(3, 1)) * self.scale
        return self.proj(self.attn(mixed.reshape(spikes.shape)))

    def describe(self) -> dict:
        """Plain values that, with the network's own attention, build this again."""
        return {"scale": self.scale}


def joined(attention: SSA) -> JointAttention | None:
    """`attention` of an engine with one projection; None if its projections are not alike."""
    if attention.operands != OPERANDS:
        return None
    projections = [getattr(attention, f"{name}_conv") for name in OPERANDS]
    neurons = [getattr(attention, name) for name in OPERANDS]
    alike = all(isinstance(each, CountNeuron) and each.describe() == neurons[0].describe() for each in neurons)
    if all(isinstance(each, Factors) for each in projections):
        columns = list(zip(*(each.named_children() for each in projections), strict=True))
        layers = [[layer for _, layer in column] for column in columns]
        names = [column[0][0] for column in columns]
    else:
        layers, names = [projections], []
    if not (alike and _joinable(layers)):
        return None
    made = [_together(column, shared=index == 0) for index, column in enumerate(layers)]
    projection = Factors(OrderedDict(zip(names, made, strict=True))) if names else made[0]
    return JointAttention(attention, projection=projection, neuron=neurons[0])


def _joinable(columns: list[list[nn.Module]]) -> bool:
    """True if each column is layers of one kind and size, and the first ones are not grouped."""
    for column in columns:
        first = column[0]
        if not all(type(each) in (IntegerConv, FloatConv) and type(each) is type(first) for each in column):
            return False
        if any(each.describe() != first.describe() for each in column):
            return False
    return columns[0][0].geometry.groups == 1


def _together(layers: list[nn.Module], *, shared: bool) -> nn.Module:
    """One layer for `layers`: they read the same input (`shared`), or each its own part of the channels."""
    first, count = layers[0], len(layers)
    sizes = replace(first.geometry, out_channels=count * first.geometry.out_channels)
    if not shared:
        sizes = replace(sizes, in_channels=count * sizes.in_channels, groups=count * sizes.groups)
    made = type(first)(**first.describe() | {"geometry": sizes})
    if isinstance(first, IntegerConv):
        made.wanted_fast = first.wanted_fast
    for name, buffer in made.named_buffers():
        buffer.copy_(torch.cat([getattr(each, name) for each in layers]))
    return made
