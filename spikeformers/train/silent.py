"""Neurons that never fire, which a training seldom survives unnoticed.

Behind a silent neuron a map is constant, and each batch norm that follows multiplies gradients by 1/sqrt(eps), about
316: the norm of the first gradient may overflow (that of the whole Spike2Former from random weights does, with D = 8).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from spikeformers.data.segmentation import SegmentationData
from spikeformers.energy.firing import neurons_of
from spikeformers.train.recipe import Recipe
from spikeformers.weights.load import few

FIRST = "the first step"
GUIDE = '"Start from nothing" in docs/guides/segmentation.md'


@contextmanager
def silent_neurons(model: nn.Module) -> Iterator[list[str]]:
    """Names of the neurons that have not fired yet in any forward pass inside the block, in network order.

    It hears the network as it trains, on the statistics of the batch; spikes are not kept, so it costs no memory.
    """
    neurons = neurons_of(model)
    silent = list(neurons)

    def listen(name: str):
        def hook(neuron: nn.Module, _, spikes: Tensor) -> None:
            if name in silent and spikes.detach().any():
                silent.remove(name)

        return hook

    handles = [neuron.register_forward_hook(listen(name)) for name, neuron in neurons.items()]
    try:
        yield silent
    finally:
        for handle in handles:
            handle.remove()


def described(names: Sequence[str], where: str, *, silent: int, neurons: int) -> str:
    """A line that names neurons which gave no spike there, as `silent` of all `neurons` did."""
    return f"silent in {where}: {few(list(names))} ({silent} of {neurons} neurons without any spike, see {GUIDE})"


def cure(names: Sequence[str], *, neurons: int, recipe: Recipe) -> str:
    """What to add to the complaint about a first step that is not finite, given those of the `neurons` silent in it."""
    if not names:
        return ""
    text = (
        f"; {described(names, FIRST, silent=len(names), neurons=neurons)}: batch norms behind them swell gradients, "
        "so start from trained weights (init.backbone), or use larger batches or fewer model.levels"
    )
    if isinstance(recipe.data, SegmentationData) and not recipe.init.balance:
        text += (
            ", or let attention scales start from the pictures (init.balance=true model.options.attention="
            "sdsa3_learned, and with Spike2Former model.options.attention_scale=learnable)"
        )
    return text
