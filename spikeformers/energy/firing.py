"""The named firing recorder: what every neuron of a model emitted in its last forward pass, as integer counts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from spikeformers.neurons import Neuron


def plain_name(name: str) -> str:
    """`name` as in the bare model: without the prefixes of torch.compile and of parallel wrappers."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def neurons_of(model: nn.Module) -> dict[str, Neuron]:
    """The neurons of `model` by plain name; none of an ANN."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, Neuron)}


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, UInt8[Tensor, " TB *shape"]]]:
    """Inside this context every forward pass fills the dict with name -> counts 0..levels, uint8, [T*B, ...].

    Example: `with record(model) as spikes: model(images)`. The dict keeps the last forward pass and stays valid after
    the context. Runs eagerly, also for a compiled model, whose graphs would skip the hooks without a word.
    Raises ValueError for a model without neurons, and RuntimeError at the end if none of them ran.
    """
    counts: dict[str, Tensor] = {}
    neurons = neurons_of(model)
    if not neurons:
        raise ValueError(f"{type(model).__name__} has no spiking neuron: build it from modules of spikeformers.neurons")

    def keep(name: str):
        def hook(neuron: Neuron, _, spikes: Tensor) -> None:
            counts[name] = neuron.counts(spikes.detach())

        return hook

    handles = [neuron.register_forward_hook(keep(name)) for name, neuron in neurons.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield counts
    finally:
        for handle in handles:
            handle.remove()
    if not counts:
        raise RuntimeError("no neuron ran while recording: call this same model inside the context")
