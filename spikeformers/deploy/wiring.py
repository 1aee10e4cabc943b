"""Who feeds whom: one probing forward pass that follows tensors from neurons to convolutions by identity.

A tensor that no function but a watched module reads can change its type; everything else must stay as the model
wrote it. Views and copies count as other readers, so that what cannot be proven stays in floating point. A tensor
changed in place is no longer what its module wrote; its version counter tells.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from spikeformers.neurons import Neuron

OTHER = ""  # a reader that is no watched module
METADATA = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout)


@dataclass
class Wiring:
    """Module names of one forward pass: `sources[conv]` wrote what it read, `readers[module]` read what it wrote."""

    sources: dict[str, str] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    """Notes every function outside the watched modules that reads a tensor which one of them wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.wiring = Wiring()
        self.inside = 0
        self.written = WeakTensorKeyDictionary()  # tensor -> name of its writer, and its version then

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.inside and not isinstance(result, METADATA):
            self.read((args, kwargs), OTHER)
        return result

    def read(self, values: object, reader: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self.written:
                source, version = self.written[value]
                self.wiring.readers[source].append(reader)
                if value._version == version:
                    self.wiring.sources[reader] = source

    def enter(self, name: str, args: tuple, kwargs: dict) -> None:
        self.read((args, kwargs), name)
        self.inside += 1
        self.wiring.calls[name] = self.wiring.calls.get(name, 0) + 1

    def leave(self, name: str, output: Tensor) -> None:
        self.inside -= 1
        self.wiring.readers.setdefault(name, [])
        self.wiring.shapes[name] = output.shape
        self.written[output] = (name, output._version)


def probe(model: nn.Module, images: Tensor) -> Wiring:
    """Run `model(images)` once and tell who fed whom among its neurons, Conv2d and Linear layers."""
    watch, handles = _Watch(), []
    for name, module in model.named_modules():
        if isinstance(module, Neuron) or type(module) in (nn.Conv2d, nn.Linear):
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: watch.enter(name, args, kwargs), with_kwargs=True
            )
            handles += [before, module.register_forward_hook(lambda _, args, out, name=name: watch.leave(name, out))]
    try:
        with torch.no_grad(), watch:
            result = model(images)
        watch.read(result, OTHER)
    finally:
        for handle in handles:
            handle.remove()
    return watch.wiring
