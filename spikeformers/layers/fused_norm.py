"""Batch norms that hand their input on to the neuron behind them, in any network, whose code stays as it is.

A network computes y = norm(conv(x)), then spikes = neuron(y). The norm keeps conv(x) for backward and the neuron y: the
same numbers twice. `fuse_norms` finds the norms whose output nothing but neurons reads, and there the neuron keeps the
norm's input instead; on CUDA one kernel computes both. Names, parameters and running statistics stay where they were.
On a CPU every bit stays as it was, on CUDA y rounds differently in its last one (kernels.normed_triton).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Real
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from spikeformers import kernels


class FusedNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that leaves its output to the neuron behind it wherever gradients are wanted.

    What is no neuron gets the output all the same, with its gradient.
    """

    def forward(self, x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        y = kernels.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            batch=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        if y is None:
            return super().forward(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        return y


def fuse_norms(model: nn.Module, example: Tensor) -> list[str]:
    """Let neurons take the batch norms in front of them, in place; returns the names of those norms.

    `model(example)` runs twice in train mode to find them: plain nn.BatchNorm2d that are called, and whose outputs go
    to neurons with a fast form and nowhere else. Running statistics, random state and modes are left as they were.
    Before the model is wrapped (DDP, compile); after its norms are synchronised, since such a norm stays as it is.
    Raises ValueError for a model whose norms are fused already.
    """
    if any(type(module) is FusedNorm2d for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has fused norms already: call separate_norms(model) first")
    with _as_before(model):
        called = _called(model, example)
    norms = {name: each for name, each in model.named_modules() if each in called and _can_be_fused(each)}
    for norm in norms.values():
        norm.__class__ = FusedNorm2d
    found: list[str] = []
    try:
        with _as_before(model):
            handed = _handed(model, norms, example)
        found = [name for name, tensors in handed.items() if tensors and all(y.taken and not y.seen for y in tensors)]
    finally:
        for name in norms.keys() - set(found):
            norms[name].__class__ = nn.BatchNorm2d
    return found


def separate_norms(model: nn.Module) -> nn.Module:
    """Undo `fuse_norms`, in place."""
    for module in model.modules():
        if type(module) is FusedNorm2d:
            module.__class__ = nn.BatchNorm2d
    return model


def _can_be_fused(module: nn.Module) -> bool:
    tracked = type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats
    return tracked and module.momentum is not None and module.running_mean is not None


def _called(model: nn.Module, example: Tensor) -> set[nn.Module]:
    """Modules that are called: layers put side by side use the numbers of norms and call none."""
    called: set[nn.Module] = set()
    # A hook for all modules, since side by side go only those without hooks of their own.
    hook = register_module_forward_hook(lambda module, _, __: called.add(module))
    try:
        model(example)
    finally:
        hook.remove()
    return called


def _handed(model: nn.Module, norms: dict[str, FusedNorm2d], example: Tensor) -> dict[str, list[kernels.Normed]]:
    """What each norm handed on in one forward pass; what the model itself returns counts as seen."""
    handed: dict[str, list[kernels.Normed]] = {name: [] for name in norms}

    def keep(name: str, y: Tensor) -> None:
        if isinstance(y, kernels.Normed):
            handed[name].append(y)

    hooks = [norm.register_forward_hook(lambda _, __, y, name=name: keep(name, y)) for name, norm in norms.items()]
    try:
        returned = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    for y in tree_leaves(returned):
        if isinstance(y, kernels.Normed):
            y.seen = True
    return handed


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Train mode with gradients; afterwards buffers, random state and modes are what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {each.device for each in (*model.parameters(), *model.buffers()) if each.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            model.train()
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
