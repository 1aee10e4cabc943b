"""Spiking attention operators."""

from spikeformers.attention.sdsa import SDSA, SDSA1, SDSA2, SDSA3, SDSA4, spike_attention

__all__ = ["SDSA", "SDSA1", "SDSA2", "SDSA3", "SDSA4", "spike_attention"]
