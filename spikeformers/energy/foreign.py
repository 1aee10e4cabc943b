"""Neurons of other libraries: which modules are, how many steps they hold, and what they fire.

Known by themselves are those of spikingjelly, by the module that defines them (it is never imported here); others are
named by their classes. Their spikes are whole counts 0..levels, times a unit: 1 and 1 unless the neuron has
attributes `levels` and `unit` (for spikingjelly's ILIFNode D is `surrogate_function.max_spike_count`).
How they keep time is not asked: with one image at a time [T, 1, ...], [T*1, ...] and T calls of [1, ...] are alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikeformers.energy.firing import neurons_of, plain_name
from spikeformers.neurons import Neuron

LIBRARIES = ("spikingjelly.activation_based.neuron", "spikingjelly.clock_driven.neuron")
SILENT = "NonSpiking"  # these integrate only


@dataclass(frozen=True, eq=False)
class ForeignNeuron:
    """A neuron of another library in a pass of one image, over `steps` time steps."""

    module: nn.Module
    steps: int
    levels: int = 1
    unit: float = 1.0
    carries: bool = True

    def emitted(self, name: str, output: Tensor | tuple) -> Tensor:
        """What it fired. Raises ValueError if that is not whole counts 0..levels of its unit."""
        spikes = output[0] if isinstance(output, tuple) else output
        counts = spikes.detach() / self.unit
        broken = (counts - counts.round()).abs() > 1e-3  # a unit such as 0.1 leaves rounding
        if counts.numel() and (counts.min() < 0 or counts.max() > self.levels + 1e-3 or broken.any()):
            kind = type(self.module).__name__
            raise ValueError(
                f"{name} ({kind}) fired {float(spikes.min()):g} to {float(spikes.max()):g}, which are no counts 0 to "
                f"{self.levels} of {self.unit:g}: give {kind} the attributes `levels` and `unit` of what it fires"
            )
        return spikes


Spiking = Neuron | ForeignNeuron


def foreign_modules(model: nn.Module, classes: Sequence[type] = ()) -> dict[str, nn.Module]:
    """Neurons of other libraries by plain name, the outermost ones. `classes`: others that are neurons."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and not isinstance(module, Neuron) and (isinstance(module, tuple(classes)) or _known(module)):
            found[name] = module
    return {plain_name(name): module for name, module in found.items()}


def _known(module: nn.Module) -> bool:
    """True for a neuron of a library that is known by itself."""
    ancestors = type(module).__mro__
    spiking = any(each.__module__.startswith(LIBRARIES) for each in ancestors)
    return spiking and not any(SILENT in each.__name__ for each in ancestors)


def spiking_of(model: nn.Module, image: Tensor, classes: Sequence[type] = ()) -> dict[str, Spiking]:
    """All neurons of `model` by plain name. Runs `model(image)`, one image, if some are of other libraries: to learn T.

    Raises ValueError if none of those ran.
    """
    foreign = foreign_modules(model, classes)
    if not foreign:
        return dict(neurons_of(model))
    rows: dict[str, list[int]] = {name: [] for name in foreign}
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"), torch.no_grad():
        for name, module in foreign.items():

            def hook(_, __, output: Tensor | tuple, name: str = name) -> None:
                rows[name].append(len(output[0] if isinstance(output, tuple) else output))

            hooks.callback(module.register_forward_hook(hook).remove)
        at_rest(model, foreign.values())
        model(image)
    at_rest(model, foreign.values())
    ran = [each for each in rows.values() if each]
    if not ran:
        raise ValueError("no neuron of the model ran in its forward pass: there is no spike to count")
    steps = max(max(each) for each in ran)
    steps = min(len(each) for each in ran) if steps == 1 else steps  # called step by step
    return dict(neurons_of(model)) | {
        name: ForeignNeuron(module, steps, _levels(module), float(getattr(module, "unit", 1.0)))
        for name, module in foreign.items()
    }


def _levels(module: nn.Module) -> int:
    """D of a neuron, 1 if it does not say."""
    stated = getattr(getattr(module, "surrogate_function", None), "max_spike_count", 1)
    return int(getattr(module, "levels", stated))


def at_rest(model: nn.Module, foreign: Iterable[nn.Module]) -> None:
    """Forget membranes: call `reset()` of those of `foreign` that have one, and of all modules of spikingjelly."""
    theirs = [
        module for module in model.modules() if any(_package(each) == "spikingjelly" for each in type(module).__mro__)
    ]
    for module in {*foreign, *theirs}:
        reset = getattr(module, "reset", None)
        if callable(reset):
            reset()


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def one_by_one(images: Tensor) -> Iterator[Tensor]:
    """Images [B, C, H, W], [B, F] or clips [T, B, C, H, W], each as a batch of its own.

    Raises ValueError for other shapes of more than one image.
    """
    if images.ndim in (2, 4):
        yield from images.split(1)
    elif images.ndim == 5:
        yield from images.split(1, dim=1)
    elif len(images) == 1:
        yield images
    else:
        raise ValueError(
            f"shape {tuple(images.shape)} may be a batch or time steps: give images [B, C, H, W], clips "
            "[T, B, C, H, W], or one image at a time"
        )
