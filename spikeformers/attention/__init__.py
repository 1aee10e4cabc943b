"""Spiking attention operators, and the ones they are measured against."""

from spikeformers.attention.q_sdsa import MPRF, QSDSA, Rectified, integer_attention
from spikeformers.attention.sdsa import SDSA, SDSA1, SDSA2, SDSA3, SDSA4
from spikeformers.attention.ssa import SCALE, SSA, LearnableScaleSSA, SpikeAttention, spike_attention
from spikeformers.attention.vsa import VSA, IdentityMap, LeakyReLUMap, ReLUMap, SoftmaxAttention, VSAFloatV

__all__ = [
    "MPRF",
    "QSDSA",
    "SCALE",
    "SDSA",
    "SDSA1",
    "SDSA2",
    "SDSA3",
    "SDSA4",
    "SSA",
    "VSA",
    "IdentityMap",
    "LeakyReLUMap",
    "LearnableScaleSSA",
    "ReLUMap",
    "Rectified",
    "SoftmaxAttention",
    "SpikeAttention",
    "VSAFloatV",
    "integer_attention",
    "spike_attention",
]
