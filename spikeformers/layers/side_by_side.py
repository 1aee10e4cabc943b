"""Layers of one input computed as one layer, for training steps: the q, k and v projections of an attention.

Weights, norms and their running statistics stay where they are; in each call they are put together for one convolution,
one batch norm and so on over all outputs. The same numbers but for rounding, in fewer and larger operations.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.layers.conv_bn import ConvBN, bias_in_use, weight_in_use
from spikeformers.layers.rep_conv import RepConv, pad_with_bn_of_zero

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def side_by_side(layers: Sequence[nn.Module], x: Real[Tensor, "TB C H W"]) -> list[Float[Tensor, "TB O _ _"]]:
    """What each layer gives for `x`: computed as one layer if `can_be_one_layer`, else one after the other."""
    if not can_be_one_layer(layers):
        return [layer(x) for layer in layers]
    together = _rep_convs if isinstance(layers[0], RepConv) else _conv_bns
    return list(together(layers, x).chunk(len(layers), 1))


def can_be_one_layer(layers: Sequence[nn.Module]) -> bool:
    """Whether these can be one layer in training.

    All `ConvBN` or all `RepConv`, with plain batch norms that use the batch, and nobody listens to a part of one.
    """
    return all(map(_plain, layers)) and len({_kind(layer) for layer in layers}) == 1


def _plain(layer: nn.Module) -> bool:
    """Whether the layer is one that can be put together, and none of its modules must be called for its own sake."""
    if type(layer) not in (ConvBN, RepConv):
        return False
    inside = list(layer.children())
    known = all(_plain_norm(each) if isinstance(each, nn.BatchNorm2d) else _plain_conv(each) for each in inside)
    heard = any(getattr(module, hooks) for module in (layer, *inside) for hooks in _HOOKS)
    return known and inside[0].groups == 1 and not heard


def _plain_norm(norm: nn.BatchNorm2d) -> bool:
    tracked = norm.affine and norm.track_running_stats and norm.momentum is not None
    return type(norm) is nn.BatchNorm2d and norm.training and tracked


def _plain_conv(conv: nn.Module) -> bool:
    """Whether it is a convolution by its weight in use."""
    known = isinstance(conv, nn.Conv2d) and (
        type(conv).forward is nn.Conv2d.forward or hasattr(conv, "quantized_weight")
    )
    return known and conv.padding_mode == "zeros"


def _kind(layer: nn.Module) -> tuple:
    """Equal for layers that can be put together."""
    parts = []
    for name, part in layer.named_children():
        if isinstance(part, nn.BatchNorm2d):
            parts.append((name, part.momentum, part.eps))
        else:
            sizes = (part.stride, part.padding, part.dilation, part.groups)
            parts.append((name, *part.weight.shape, part.bias is None, *sizes))
    return type(layer), *parts


def _conv(convs: Sequence[nn.Conv2d], x: Tensor, *, apart: bool = False) -> Tensor:
    """All convolutions of `x`, or with `apart` each of its own part of x's channels."""
    one = convs[0]
    weight = torch.cat([weight_in_use(conv) for conv in convs])
    bias = None if one.bias is None else torch.cat([bias_in_use(conv) for conv in convs])
    groups = one.groups * len(convs) if apart else 1
    return F.conv2d(x, weight, bias, one.stride, one.padding, one.dilation, groups)


def _normed(norms: Sequence[nn.BatchNorm2d], x: Tensor) -> Tensor:
    one = norms[0]
    mean, variance, weight, bias = (
        torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var", "weight", "bias")
    )
    y = F.batch_norm(x, mean, variance, weight, bias, True, one.momentum, one.eps)
    with torch.no_grad():
        for norm, m, v in zip(norms, mean.chunk(len(norms)), variance.chunk(len(norms)), strict=True):
            norm.running_mean.copy_(m)
            norm.running_var.copy_(v)
            norm.num_batches_tracked.add_(1)
    return y


def _conv_bns(layers: Sequence[ConvBN], x: Tensor) -> Tensor:
    return _normed([layer.bn for layer in layers], _conv([layer.conv for layer in layers], x))


def _rep_convs(layers: Sequence[RepConv], x: Tensor) -> Tensor:
    first = [layer.bn1 for layer in layers]
    x = pad_with_bn_of_zero(_normed(first, _conv([layer.pw1 for layer in layers], x)), *first)
    x = _conv([layer.dw for layer in layers], x, apart=True)
    x = _conv([layer.pw2 for layer in layers], x, apart=True)
    return _normed([layer.bn3 for layer in layers], _normed([layer.bn2 for layer in layers], x))
