"""Memory for time: keep the inputs of branches only, and run each branch again when its gradients are wanted.

Between two such stretches a network keeps one map for each step; what lies inside (currents, spikes and norms of four
times the width) is there for one stretch at a time. Neurons run through all T steps again from rest, so that membranes
are not kept over time either.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spikeformers.backbones.spikformer import SPSBlock
from spikeformers.layers import SHORTCUTS, RepConv
from spikeformers.quantize.exact import FixedPointNorm

STRETCHES = (*SHORTCUTS.values(), SPSBlock)
"""What runs again as a whole: every residual branch behind its neuron, and the blocks of a stem without branches."""


def recompute(model: nn.Module) -> nn.Module:
    """Let training steps of `model` run its stretches twice and keep only their inputs; in place, returns `model`.

    Gradients and running statistics are those of before, bit for bit where the arithmetic repeats itself. Each forward
    pass wants its backward before the next, or backward raises ValueError: borders of RepConv read running statistics.
    Raises ValueError for a network without such stretches, or with norms that round by running statistics
    (`quantize.prepare(..., exact=True)`).
    """
    for name, module in model.named_modules():
        if isinstance(module, FixedPointNorm):
            raise ValueError(
                f"{name} rounds by running statistics, which a second run finds changed: networks that are prepared "
                "with exact=True cannot recompute"
            )
    stretches = [module for module in model.modules() if isinstance(module, STRETCHES)]
    if not stretches:
        raise ValueError(f"{type(model).__name__} has no residual branch to recompute: leave it as it is")
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    borders = {module.bn1 for module in model.modules() if isinstance(module, RepConv)}
    for stretch in stretches:
        stretch.__class__ = _twice(type(stretch))
        stretch.norms, stretch.borders = norms, borders  # a plain list and set, so no children of the stretch
    return model


def undo_recompute(model: nn.Module) -> nn.Module:
    """Let `model` run as before `recompute`, in place; returns `model`."""
    for module in model.modules():
        if isinstance(module, _Twice):
            module.__class__ = type(module).__mro__[2]
            del module.norms, module.borders
    return model


class _Twice:
    """In front of a module's class: `forward` runs again in backward."""

    norms: list[nn.Module]
    borders: set[nn.Module]

    def forward(self, *inputs):
        run = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return run(*inputs)
        runs = _Runs(self.norms, self.borders)
        return checkpoint(run, *inputs, use_reentrant=False, context_fn=runs.contexts)


@cache
def _twice(kind: type[nn.Module]) -> type[nn.Module]:
    return kind if issubclass(kind, _Twice) else type(kind.__name__, (_Twice, kind), {})


class _Runs:
    """Both runs of one stretch: the second uses the batch as the first did and leaves running statistics alone."""

    def __init__(self, norms: list[nn.Module], borders: set[nn.Module]) -> None:
        self.norms = [norm for norm in norms if norm.num_batches_tracked is not None]
        self.borders = borders
        self.used: list[tuple[nn.Module, int]] = []  # norms that counted a batch, and their counts' version

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Around the first and around the second run."""
        return self.first(), self.second()

    @contextmanager
    def first(self) -> Iterator[None]:
        before = [norm.num_batches_tracked._version for norm in self.norms]
        yield
        now = [(norm, norm.num_batches_tracked._version) for norm in self.norms]
        self.used = [each for each, version in zip(now, before, strict=True) if each[1] != version]

    @contextmanager
    def second(self) -> Iterator[None]:
        if any(norm in self.borders and norm.num_batches_tracked._version != seen for norm, seen in self.used):
            raise ValueError(
                "recomputation found running statistics that moved since the forward pass: call backward after each "
                "forward pass, or train without recompute"
            )
        before = [(norm, norm.momentum, norm.num_batches_tracked) for norm, _ in self.used]
        for norm, _, count in before:
            norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(count)
        try:
            yield
        finally:
            for norm, momentum, count in before:
                norm.momentum, norm.num_batches_tracked = momentum, count
