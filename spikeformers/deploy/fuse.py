"""Merging for inference: batch norms into convolutions, RepConv into one dense 3x3. Nothing is approximated.

Paper: Meta-SpikeFormer, Sec. 3.2 (re-parameterisation). A layer says how it merges by its own `merge()`; this file
only knows where to put the result. SepConv has none: as a dense 7x7 it would be slower (`merge_spatial` builds it).
"""

import copy

import torch
from torch import nn

from spikeformers.layers import Pretrained, merge_conv_bn
from spikeformers.quantize import FixedPointNorm, plain


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode where every layer that can is one nn.Conv2d; `model` stays as it is.

    Layers with `merge()` (ConvBN, RepConv) and, in plain nn.Sequential, a Conv2d followed by a BatchNorm2d. A model in
    train mode comes back in eval mode too: merged batch norms can only use their running statistics.
    Equal to `model.eval()` up to rounding: in float64, spikes equal and logits within 1e-12.
    Raises ValueError for an exact network, whose norms round.
    """
    refuse_exact(model, "merge")
    fused = plain_copy(model)
    if hasattr(fused, "merge"):
        return fused.merge().eval()
    _merge_children(fused)
    if isinstance(fused, Pretrained):
        fused.origin = None  # its weights no longer fit the catalogue's model: saving must refuse
    return fused


def refuse_exact(model: nn.Module, verb: str) -> None:
    """Raises ValueError for a network whose norms round, and so stand in no layer of torch's."""
    if any(isinstance(module, FixedPointNorm) for module in model.modules()):
        raise ValueError(
            f"this network was prepared exact (quantize.exact_integer): its norms round, so it cannot {verb}; the "
            "engine, model.spk, ONNX, unroll and audit take it as it is"
        )


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, without the wrapper that torch.compile puts around a module.

    Low-bit layers become torch's own with the weights that they multiply by.
    """
    return plain(copy.deepcopy(getattr(model, "_orig_mod", model))).eval()


def _merge_children(parent: nn.Module) -> None:
    """Replace what merges below `parent`, in place."""
    for name, child in parent.named_children():
        if hasattr(child, "merge"):
            setattr(parent, name, child.merge().eval())
        else:
            _merge_children(child)
    if type(parent) is nn.Sequential:
        _merge_pairs(parent)


def _merge_pairs(chain: nn.Sequential) -> None:
    """Merge each Conv2d directly followed by a BatchNorm2d; the norm's place keeps an Identity, so that names stay."""
    for index in range(len(chain) - 1):
        conv, norm = chain[index], chain[index + 1]
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
            chain[index], chain[index + 1] = merge_conv_bn(conv, norm).eval(), nn.Identity()
