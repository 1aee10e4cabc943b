"""The integer form of a network: what the engine runs, still in torch's own layers and in float64.

Low-bit weights are packed integers. Batch norms, MPRF and layer scales are folded into step sizes and biases. RepConv
stays its three convolutions, whose first one reads spikes: dense, its kernel would need more bits than were trained
(QSD-Transformer), and on a CPU the three are faster as well. Nothing is approximated.
"""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from spikeformers.attention import Rectified
from spikeformers.layers import LayerScaleBlock, RepConv, TransformerBlock, bn_affine, conv2d_from
from spikeformers.quantize import FixedPointNorm, LSQLayer, PackedLayer, convert


def integer_form(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU, in eval mode and float64, in its integer form; `model` stays as it is.

    Equal to `model.eval()` up to rounding: in float64, spikes equal and logits within 1e-12. A plain nn.Sequential must
    run its modules one after the other; `integer` checks that.
    """
    return folded(packed(model))


@torch.no_grad()
def packed(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode and float64, its low-bit weights as integers, no module in two places."""
    net = copy.deepcopy(getattr(model, "_orig_mod", model)).cpu().eval()
    integers = {}
    if any(isinstance(layer, LSQLayer) for layer in net.modules()):
        # Weights are rounded in the precision in which they trained, norms folded in float64.
        stored = convert(copy.deepcopy(net))
        integers = {name: layer.packed for name, layer in stored.named_modules() if isinstance(layer, PackedLayer)}
        net = convert(net.double())
    net = net.double()
    for name, layer in list(net.named_modules()):
        if name in integers:
            layer.packed.copy_(integers[name])
        if isinstance(layer, PackedLayer) and layer.offset is not None:
            layer.to_plain()  # an offset is no multiple of the step size
    _untie(net, {net})
    return net


def _untie(parent: nn.Module, seen: set[nn.Module]) -> None:
    """Give a module that stands in several places a copy of its own in each: what follows may differ."""
    for name, child in parent._modules.items():
        if child in seen:
            child = parent._modules[name] = copy.deepcopy(child)
        if child is not None:
            seen.add(child)
            _untie(child, seen)


@torch.no_grad()
def folded(net: nn.Module) -> nn.Module:
    """`net`, which `packed` made, with norms and layer scales folded and RepConv as its factors; changed in place."""
    if (whole := collapsed(net)) is not None:
        return whole
    _collapse_below(net)
    return net


def _collapse_below(parent: nn.Module) -> None:
    """Replace what collapses below `parent`, in place, and fold the scales of its branches."""
    for name, child in parent.named_children():
        whole = collapsed(child)
        if whole is None:
            _collapse_below(child)
        else:
            setattr(parent, name, whole)
    if type(parent) is nn.Sequential:
        for index in range(len(parent) - 1):
            layer, norm = parent[index], parent[index + 1]
            if is_convolution(layer) and folds(norm):
                parent[index], parent[index + 1] = absorbed(layer, *bn_affine(norm)), nn.Identity()
    if isinstance(parent, LayerScaleBlock):
        _fold_scales(parent)


def collapsed(module: nn.Module) -> nn.Module | None:
    """`module` without norms: one convolution, three for RepConv; None if it is neither of the layers that can.

    The norms of an exact network (`quantize.prepare(..., exact=True)`) round, so they stay.
    """
    if not hasattr(module, "norm_chain") or any(isinstance(each, FixedPointNorm) for each in module.modules()):
        return None
    if isinstance(module, RepConv):
        return factors(module)
    if isinstance(module, Rectified):
        return with_last(collapsed(module.projection), *bn_affine(module.mprf))
    layer, norms = module.norm_chain()
    for holder, name in norms:
        norm = getattr(holder, name)
        layer = layer if isinstance(norm, nn.Identity) else absorbed(layer, *bn_affine(norm))
    return layer


class Factors(nn.Sequential):
    """Convolutions in a row that stand where one layer stood."""


def factors(layer: RepConv) -> Factors:
    """RepConv in eval mode as three convolutions with nothing between; the middle one pads with zeros.

    Only the scale of bn1 stands before the padding. Its shift, which the border shares, is a number per channel behind
    the depthwise convolution: shift x the sum of the kernel.
    """
    scale, shift = bn_affine(layer.bn1)
    first = absorbed(layer.pw1, scale, torch.zeros_like(shift))
    depthwise = layer.dw
    depthwise.padding = (1, 1)
    kernel = depthwise.quantized_weight() if isinstance(depthwise, PackedLayer) else depthwise.weight
    depthwise = absorbed(depthwise, torch.ones_like(shift), shift * kernel.sum((1, 2, 3)))
    last = layer.pw2
    for norm in (layer.bn2, layer.bn3):
        last = last if isinstance(norm, nn.Identity) else absorbed(last, *bn_affine(norm))
    return Factors(OrderedDict(pw1=first, dw=depthwise, pw2=last))


def absorbed(layer: nn.Conv2d, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """`layer` followed by y = scale x + shift, as one layer; packed integers stay."""
    if isinstance(layer, PackedLayer):
        layer.absorb(scale, shift)
        return layer
    bias = 0 if layer.bias is None else layer.bias
    return conv2d_from(layer.weight * scale.view(-1, 1, 1, 1), bias * scale + shift, like=layer)


def with_last(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """`layer`, a convolution or a sequence of them, whose last one also does y = scale x + shift."""
    if isinstance(layer, nn.Sequential):
        layer[-1] = absorbed(layer[-1], scale, shift)
        return layer
    return absorbed(layer, scale, shift)


def folds(norm: nn.Module) -> bool:
    """True for a batch norm that is a scale and a shift: with running statistics, and not rounding."""
    tracked = isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    return tracked and not isinstance(norm, FixedPointNorm)


def is_convolution(layer: nn.Module) -> bool:
    """True for torch's own two-dimensional convolution and its packed form."""
    return type(layer) is nn.Conv2d or (isinstance(layer, PackedLayer) and isinstance(layer, nn.Conv2d))


def _fold_scales(block: LayerScaleBlock) -> None:
    """Let the last convolution of each branch do the scaling, if there is one; else the block stays as it is."""
    branches = ((block.attn, "proj", block.attn_scale), (block.mlp, "conv2", block.mlp_scale))
    lasts = [getattr(branch, name, None) for branch, name, _ in branches]
    if not all(is_convolution(last[-1] if isinstance(last, nn.Sequential) else last) for last in lasts):
        return
    for (branch, name, scale), last in zip(branches, lasts, strict=True):
        setattr(branch, name, with_last(last, scale, torch.zeros_like(scale)))
    unscale(block)


def unscale(block: LayerScaleBlock) -> None:
    """Make `block` one without scales."""
    del block.attn_scale, block.mlp_scale
    block.__class__ = TransformerBlock
