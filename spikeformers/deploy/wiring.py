"""Who feeds whom: one probing forward pass that follows tensors from neurons to convolutions.

What a layer is fed is told by the marks of spikes (energy/marks.py). Who reads a tensor is told by identity: one that
no function but a watched module reads can change its type, and everything else must stay as the model wrote it. Views
and copies count as other readers, so that what cannot be proven stays in floating point.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from spikeformers.energy.marks import Mark, SpikeMarks
from spikeformers.neurons import Neuron
from spikeformers.quantize import FixedPointNorm, PackedLayer

OTHER = ""  # a reader that is no watched module
METADATA = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout)


@dataclass
class Wiring:
    """Module names of one forward pass: `fed[layer]` is the unit and the most spikes of an element of what it read, if
    that is spikes, and alike in all of its `calls`; `readers[module]` read what it wrote."""

    fed: dict[str, Mark] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    """Notes every function outside the watched modules that reads a tensor which one of them wrote."""

    def __init__(self, marks: SpikeMarks) -> None:
        super().__init__()
        self.wiring = Wiring()
        self.marks = marks
        self.inside = 0
        self.written = WeakTensorKeyDictionary()  # tensor -> name of its writer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.inside and not isinstance(result, METADATA):
            self.read((args, kwargs), OTHER)
        return result

    def read(self, values: object, reader: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self.written:
                self.wiring.readers[self.written[value]].append(reader)

    def enter(self, name: str, args: tuple, kwargs: dict) -> None:
        self.read((args, kwargs), name)
        mark = self.marks.of(args[0]) if args else None
        if mark is not None and name not in self.wiring.calls:
            self.wiring.fed[name] = mark
        elif self.wiring.fed.get(name) != mark:
            self.wiring.fed.pop(name, None)
        self.inside += 1
        self.wiring.calls[name] = self.wiring.calls.get(name, 0) + 1

    def leave(self, name: str, module: nn.Module, output: Tensor) -> None:
        self.inside -= 1
        if isinstance(module, Neuron):
            self.marks.put(output, Mark(module.unit, module.levels))
        self.wiring.readers.setdefault(name, [])
        self.wiring.shapes[name] = output.shape
        self.written[output] = name


def is_layer(module: nn.Module) -> bool:
    """True for a two-dimensional convolution or linear layer that computes as torch's own do, packed or not."""
    packed = isinstance(module, PackedLayer) and isinstance(module, nn.Conv2d | nn.Linear)
    return packed or type(module) in (nn.Conv2d, nn.Linear)


def probe(model: nn.Module, images: Tensor) -> Wiring:
    """Run `model(images)` once and tell who fed whom among its neurons, layers and norms that round."""
    marks = SpikeMarks()
    watch, handles = _Watch(marks), []
    for name, module in model.named_modules():
        if isinstance(module, Neuron | FixedPointNorm) or is_layer(module):
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: watch.enter(name, args, kwargs), with_kwargs=True
            )
            after = module.register_forward_hook(lambda m, args, out, name=name: watch.leave(name, m, out))
            handles += [before, after]
    try:
        # The version counter of a tensor, which tells that a mark is stale, needs inference mode off.
        with torch.inference_mode(False), torch.no_grad(), marks, watch:
            result = model(images)
        watch.read(result, OTHER)
    finally:
        for handle in handles:
            handle.remove()
    return watch.wiring
