"""Spiking neurons: functions of their input over T steps, with no state between forward passes."""

from functools import partial

from torch import nn

from spikeformers.neurons.integer import IELIF, ILIF, NILIF, SigmoidL2, i_lif, ie_lif, ni_lif
from spikeformers.neurons.lif import LIF
from spikeformers.neurons.neuron import Neuron, NeuronBuilder, as_membrane
from spikeformers.neurons.steps import (
    AfterTime,
    Door,
    Stream,
    Temporal,
    TimeMean,
    set_steps,
    streaming,
    temporal_modules,
)
from spikeformers.neurons.suggest import choose, closest
from spikeformers.neurons.surrogate import ATan, Rectangle, Sigmoid

LEVELLED = (ILIF, IELIF, NILIF, SigmoidL2)  # take `levels`
NEURONS = {
    "lif": LIF,
    "i_lif": ILIF,
    "ie_lif": IELIF,
    "ie_lif_leaky": partial(IELIF, decay=0.5),  # with the membrane of QSD-Transformer's Eqs. 1-3, which its code lacks
    "ni_lif": NILIF,
    "ni_lif_const8": partial(NILIF, norm=8),  # these two: Spike2Former's ablations of its norm (Table 3)
    "sigmoid_l2": SigmoidL2,
}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}  # stand in neurons' places in the ANN twin of a network


def neuron_builder(neuron: str | NeuronBuilder, *, levels: int = 4, steps: int = 1) -> NeuronBuilder:
    """Neuron name, or a builder of your own -> a builder that blocks call as `neuron()` or `neuron(threshold=0.5)`.

    `levels` is D of the integer family, by name or class; LIF is binary and ignores it. A builder of your own is
    called with `steps=` and `threshold=` only.  A name in ACTIVATIONS builds that instead, for an ANN twin.
    Raises ValueError for an unknown name.
    """
    if isinstance(neuron, str):
        if neuron in ACTIVATIONS:
            activation = ACTIVATIONS[neuron]
            return lambda threshold=1.0, steps=1: activation()
        if neuron not in NEURONS:
            raise ValueError(f"unknown neuron {neuron!r}; {closest(neuron, (*NEURONS, *ACTIVATIONS))}")
        neuron = NEURONS[neuron]
    if getattr(neuron, "func", neuron) in LEVELLED:
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        return partial(neuron, steps=steps, levels=levels)
    return partial(neuron, steps=steps)


def build_neuron(neuron: str | NeuronBuilder, *, levels: int = 4, steps: int = 1, threshold: float = 1.0) -> Neuron:
    """One neuron by name; see `neuron_builder`."""
    return neuron_builder(neuron, levels=levels, steps=steps)(threshold=threshold)


__all__ = [
    "ACTIVATIONS",
    "IELIF",
    "ILIF",
    "LEVELLED",
    "LIF",
    "NEURONS",
    "NILIF",
    "ATan",
    "AfterTime",
    "Door",
    "Neuron",
    "NeuronBuilder",
    "Rectangle",
    "Sigmoid",
    "SigmoidL2",
    "Stream",
    "Temporal",
    "TimeMean",
    "as_membrane",
    "build_neuron",
    "choose",
    "closest",
    "i_lif",
    "ie_lif",
    "neuron_builder",
    "ni_lif",
    "set_steps",
    "streaming",
    "temporal_modules",
]
