"""Spiking attention operators, and the ones they are measured against."""

from spikeformers.attention.balance import balance
from spikeformers.attention.q_sdsa import MPRF, QSDSA, Rectified, integer_attention
from spikeformers.attention.sdda import (
    SDDA,
    DepthwiseQuery,
    ReleasedSDDA,
    SoftmaxSDDA,
    SpikeQuery,
    SpikingQuerySDDA,
    deformable_sampling,
)
from spikeformers.attention.sdsa import SDSA, SDSA1, SDSA2, SDSA3, SDSA4, WidthScaledSDSA
from spikeformers.attention.ssa import (
    SCALE,
    SSA,
    LearnableScaleSSA,
    LearnableWidthScaledSSA,
    SpikeAttention,
    WidthScaledSSA,
    learnable,
    spike_attention,
)
from spikeformers.attention.vsa import VSA, IdentityMap, LeakyReLUMap, ReLUMap, SoftmaxAttention, VSAFloatV

__all__ = [
    "MPRF",
    "QSDSA",
    "SCALE",
    "SDDA",
    "SDSA",
    "SDSA1",
    "SDSA2",
    "SDSA3",
    "SDSA4",
    "SSA",
    "VSA",
    "DepthwiseQuery",
    "IdentityMap",
    "LeakyReLUMap",
    "LearnableScaleSSA",
    "LearnableWidthScaledSSA",
    "ReLUMap",
    "Rectified",
    "ReleasedSDDA",
    "SoftmaxAttention",
    "SoftmaxSDDA",
    "SpikeAttention",
    "SpikeQuery",
    "SpikingQuerySDDA",
    "VSAFloatV",
    "WidthScaledSDSA",
    "WidthScaledSSA",
    "balance",
    "deformable_sampling",
    "integer_attention",
    "learnable",
    "spike_attention",
]
