"""Spiking neurons: functions of their input over T steps, with no state between forward passes."""

import difflib
from functools import partial

from spikeformers.neurons.integer import IELIF, ILIF, NILIF, i_lif, ie_lif, ni_lif
from spikeformers.neurons.lif import LIF
from spikeformers.neurons.neuron import Neuron, NeuronBuilder
from spikeformers.neurons.steps import Door, Stream, Temporal, TimeMean, set_steps, streaming, temporal_modules
from spikeformers.neurons.surrogate import ATan, Rectangle, Sigmoid

NEURONS = {"lif": LIF, "i_lif": ILIF, "ie_lif": IELIF, "ni_lif": NILIF}


def neuron_builder(neuron: str | NeuronBuilder, *, levels: int = 4, steps: int = 1) -> NeuronBuilder:
    """Neuron name, or a builder of your own -> a builder that blocks call as `neuron()` or `neuron(threshold=0.5)`.

    `levels` is D of the integer family; LIF is binary and ignores it. A builder of your own is called with
    `steps=` and `threshold=` only.  Raises ValueError for an unknown name.
    """
    if not isinstance(neuron, str):
        return partial(neuron, steps=steps)
    if neuron not in NEURONS:
        close = difflib.get_close_matches(neuron, NEURONS, n=3) or list(NEURONS)
        raise ValueError(f"unknown neuron {neuron!r}; closest: {', '.join(close)}")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    if neuron == "lif":
        return partial(LIF, steps=steps)
    return partial(NEURONS[neuron], steps=steps, levels=levels)


def build_neuron(neuron: str | NeuronBuilder, *, levels: int = 4, steps: int = 1, threshold: float = 1.0) -> Neuron:
    """One neuron by name; see `neuron_builder`."""
    return neuron_builder(neuron, levels=levels, steps=steps)(threshold=threshold)


__all__ = [
    "IELIF",
    "ILIF",
    "LIF",
    "NEURONS",
    "NILIF",
    "ATan",
    "Door",
    "Neuron",
    "NeuronBuilder",
    "Rectangle",
    "Sigmoid",
    "Stream",
    "Temporal",
    "TimeMean",
    "build_neuron",
    "i_lif",
    "ie_lif",
    "neuron_builder",
    "ni_lif",
    "set_steps",
    "streaming",
    "temporal_modules",
]
