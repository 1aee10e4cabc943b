"""Spiking vision transformers for PyTorch."""

from spikeformers import deploy, energy
from spikeformers.energy import record
from spikeformers.layers.version import __version__
from spikeformers.neurons import set_steps, streaming
from spikeformers.weights import load_official
from spikeformers.zoo import create_model, from_pretrained, list_models

__all__ = [
    "__version__",
    "create_model",
    "deploy",
    "energy",
    "from_pretrained",
    "list_models",
    "load_official",
    "record",
    "set_steps",
    "streaming",
]
